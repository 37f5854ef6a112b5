"""Facts about a single question to a model, by sample.py and evaluate.py: one that stage 3 taught to
converse is asked in its chat template, any other continues a text."""

import json
import shutil
import signal
import threading
import time
import types

import pytest
import torch
import transformers
from conftest import ROOT, edit_config, save_image

import cache
import chat
import data
import evaluate
import loop
import sample
import transfer
from demo.questions import write_benchmarks

QUESTION = "What is it, a Red Square?"
ALONE = loop.Processes(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def taught(chat_models, tmp_path_factory):
    """{name: folder} of models that stage 3 taught to converse: what stage 3 leaves in config.json."""
    folders = {}
    for name, (folder, option) in chat_models.items():
        folders[name] = tmp_path_factory.mktemp("taught") / name
        shutil.copytree(folder, folders[name])
        template = transfer.choose_template(transfer.find_whole(folder), option)
        edit_config(folders[name], chat_template=transfer.describe_template(template))
    return folders


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four scenes and what is asked about them, in VQAv2's files."""
    folder = tmp_path_factory.mktemp("questions")
    write_benchmarks(folder, scenes=4)
    return folder


@pytest.fixture
def read(monkeypatch):
    """The prompts that models read, as ids: those of generate, and what is behind a prefix read before."""
    prompts = []
    of_image = transfer.vpgtrans.VisualLLM.prefix
    behind = evaluate.generate_behind

    def prefix(self, prompt_ids, *rest, **sees):
        prompts.extend([id for id in row if id != data.PADDING] for row in prompt_ids.tolist())
        return of_image(self, prompt_ids, *rest, **sees)

    def generate_behind(llm, kept, ids, *rest, **options):
        prompts.extend([id for id in row if id != data.PADDING] for row in ids.tolist())
        return behind(llm, kept, ids, *rest, **options)

    monkeypatch.setattr(transfer.vpgtrans.VisualLLM, "prefix", prefix)
    monkeypatch.setattr(evaluate, "generate_behind", generate_behind)
    return prompts


def in_conversation(folder, question):
    """The ids that chat.py has its model read before it answers a first question, and its answer."""
    model, tok, template = transfer.load_chat(str(folder), dtype=torch.float32)
    conversation = chat.Conversation(model, tok, template)
    conversation.show(data.load_image(folder / "picture.png"))
    ids = conversation.prompt(question, 8)
    return ids, "".join(conversation.ask(question, max_new_tokens=8)).strip()


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_who_was_taught_to_converse_is_asked_as_by_chat(taught, kind, read, capsys):
    """sample.py: the same ids to the model, the same answer from it; without a prompt, a request for a
    caption."""
    folder = taught[kind]
    picture = save_image(folder / "picture.png")
    ids, said = in_conversation(folder, QUESTION)
    asked, _ = in_conversation(folder, transfer.DESCRIBE)
    command = [str(picture), "--model", str(folder), "--precision", "fp32", "--num-beams", "1",
               "--max-new-tokens", "8"]
    read.clear()
    sample.main([*command, "--prompt", QUESTION])
    sample.main(command)
    assert read == [ids, asked]
    first = capsys.readouterr().out.removeprefix(f"{picture}: ")
    assert said and first.startswith(said)


def test_the_ids_are_those_of_transformers_template(taught, read):
    """Of what stands before and behind the picture, each encoded alone."""
    folder = taught["llama"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, behind = (tokenizer.encode(part, add_special_tokens=False) for part in text.split("<image>"))
    sample.main([str(save_image(folder / "picture.png")), "--model", str(folder), "--prompt", QUESTION])
    assert read == [before + [data.IMAGE] * 5 + behind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_evaluation_asks_as_people_write_and_for_a_short_answer(taught, questions, kind, read, tmp_path):
    """The whole of each prompt, its beginning read once for all questions of an image; and captions."""
    folder = taught[kind]
    template = transfer.find_template(str(folder))
    tok = data.load_tokenizer(folder)
    specs = [f"{name}={questions / name}" for name in ("vqav2", "coco")]
    evaluate.main(["--model", str(folder), "--out", str(tmp_path), "--precision", "fp32", *specs])
    file = questions / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
    expected = set()
    texts = [f"{row['question']}\nAnswer with one word or a short phrase."
             for row in json.loads(file.read_text())["questions"]]
    for text in [*texts, transfer.DESCRIBE]:
        ids, _ = data.chat_ids(tok, template, [[text, None]], 5)
        expected.add((*ids, tok.eos_id) if kind == "t5" else tuple(ids))
    begun = {tuple(ids) for ids in read if data.IMAGE in ids}
    whole = begun & expected
    for start in begun - expected:
        whole |= {(*start, *ids) for ids in map(tuple, read) if data.IMAGE not in ids}
    assert whole >= expected and len(expected) > 10
    assert len(begun - expected) == (0 if kind == "t5" else 1)


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_an_answer_ends_where_a_conversations_ends(taught, questions, kind):
    """Where its model says what ends an answer; a text that ends one is looked for in the text."""
    model, tok = transfer.load_model(str(taught[kind]), torch.float32)
    template = transfer.find_template(str(taught[kind]))
    image = torch.full((1, 3, 28, 28), 100, dtype=torch.uint8)
    (whole,) = transfer.answer(model, tok, image, QUESTION, template, max_new_tokens=12)
    assert len(whole) > 3
    end = whole[len(whole) // 2 :][:2]
    cut = data.ChatTemplate(**{**transfer.describe_template(template), "stop": end})
    assert transfer.read_answer(tok, tok.encode(whole), cut) == whole.partition(end)[0].strip()
    stops = transfer.ends(model, tok, template)
    assert set(stops) >= {*data.stop_ids(tok, template), (tok.eos_id,)}
    assert len(stops) == len(set(stops))


def test_a_newline_ends_a_caption_and_no_answer():
    """blip2-opt-2.7b's config.json names the newline as its end mark."""
    tok = types.SimpleNamespace(end_id=50118, eos_id=2)
    model = types.SimpleNamespace(llm=types.SimpleNamespace(stop=((50118,), (7,))))
    assert transfer.ends(model, tok) == ((50118,), (2,))
    assert transfer.answer_ends(model, tok) == [(7,), (2,)]
    no_newline = types.SimpleNamespace(end_id=2, eos_id=2)
    model.llm.stop = ((2,), (7,))
    assert (2,) in transfer.answer_ends(model, no_newline)


def test_any_other_model_continues_a_text(world, chat_models, tmp_path):
    """Although its language model may have a chat template, as that of a transfer to it has."""
    for folder in (world[0], chat_models["llama"][0]):
        assert transfer.find_template(str(folder)) is None
    model, tok = transfer.load_model(chat_models["llama"][0], torch.float32)
    assert transfer.ask_ids(tok, 5, "Question: red? ") == data.prompt_ids(tok, 5, "Question: red?")
    assert transfer.ends(model, tok) == ((tok.end_id,), (tok.eos_id,))


def test_a_model_is_asked_in_the_template_that_is_named_and_never_in_another_one(
        taught, chat_models, questions, tmp_path, capsys, fails):
    folder, _ = chat_models["opt"]
    named = transfer.find_template(folder, "vicuna-v0")
    assert transfer.describe_template(named) == transfer.describe_template(data.TEMPLATES["vicuna-v0"])
    picture = str(save_image(tmp_path / "picture.png"))
    says = "was taught to converse in another chat template than vicuna-v1.1"
    fails(sample.main, [picture, "--model", str(taught["opt"]), "--template", "vicuna-v1.1"], says)
    fails(evaluate.main, ["--model", str(taught["opt"]), f"vqav2={questions / 'vqav2'}", "--out",
                          str(tmp_path), "--template", "vicuna-v1.1"], says)
    sample.main([picture, "--model", str(taught["opt"]), "--template", "vicuna-v0"])
    fails(evaluate.main, ["--model", folder, f"vqav2={questions / 'vqav2'}", "--out", str(tmp_path),
                          "--template", "chatml"], "--template chatml: there are vicuna-v0, vicuna-v1.1")


# ---------------------------------------------------------------------- by other pictures, and by none


def answers(folder, spec, out, *more):
    """What evaluate.py finds -> {id: answer}, and what the first line of its answers says."""
    evaluate.main(["--model", str(folder), "--out", str(out), "--precision", "fp32", spec, *more])
    (made,) = out.glob("evaluation*")
    (file,) = (made / "answers").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["id"]: row["answer"] for row in rows[1:]}, rows[0]


def test_by_shuffled_images_each_is_taken_for_the_next_one(questions, tmp_path):
    """As if the files had changed places."""
    source = ROOT / "demo" / "source"
    coco = f"coco={questions / 'coco'}"
    by_others, header = answers(source, coco, tmp_path / "a", "--images", "shuffled")
    assert header["images"] == "shuffled" and (tmp_path / "a/evaluation-shuffled/scores.json").exists()
    moved = shutil.copytree(questions, tmp_path / "moved")
    files = sorted((questions / "coco/val2014").iterdir())
    for file, other in zip(files, files[1:] + files[:1]):
        shutil.copy(other, moved / "coco/val2014" / file.name)
    right, _ = answers(source, f"coco={moved / 'coco'}", tmp_path / "b")
    assert by_others == right
    assert right != answers(source, coco, tmp_path / "c")[0]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_without_an_image_the_language_model_alone_answers(taught, questions, kind, tmp_path):
    found, _ = answers(taught[kind], f"vqav2={questions / 'vqav2'}", tmp_path, "--images", "none")
    model, tok = transfer.load_model(str(taught[kind]), torch.float32)
    template = transfer.find_template(str(taught[kind]))
    file = questions / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
    options = evaluate.QUESTION | {"stop": transfer.ends(model, tok, template)}
    for row in json.loads(file.read_text())["questions"]:
        ids = transfer.ask_ids(tok, 0, evaluate.SHORTLY.format(row["question"]), template)
        assert data.IMAGE not in ids
        with torch.inference_mode():
            words = model.llm.embed(torch.tensor([ids]))
        (said,) = model.llm.generate(words, prompt_lengths=torch.tensor([len(ids)]), **options)
        assert found[row["question_id"]] == transfer.read_answer(tok, said, template)


def test_an_empty_prompt_and_no_image_leave_a_model_without_bos_something_to_read(chat_models, questions,
                                                                                  tmp_path):
    """Captions of no image, as Qwen would make them up."""
    model = shutil.copytree(chat_models["llama"][0], tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["bos_token"] = None
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = data.load_tokenizer(model)
    assert tok.bos_id is None
    found, _ = answers(model, f"coco={questions / 'coco'}", tmp_path / "out", "--images", "none")
    assert len(found) == 4 and len(set(found.values())) == 1


def test_answers_by_other_images_and_in_another_template_are_not_taken_for_these(taught, questions, tmp_path,
                                                                                 fails):
    spec = f"vqav2={questions / 'vqav2'}"
    command = ["--model", str(taught["llama"]), "--out", str(tmp_path), "--precision", "fp32", spec]
    evaluate.main(command)
    (tmp_path / "evaluation").rename(tmp_path / "evaluation-none")
    fails(evaluate.main, [*command, "--images", "none"], "holds answers with images = 'right'")
    (tmp_path / "evaluation-none").rename(tmp_path / "evaluation")
    model = shutil.copytree(taught["llama"], tmp_path / "model")
    same = ["--model", str(model), "--question-prompt", "{}?", "--out", str(tmp_path / "same"), spec]
    evaluate.main(same)
    edit_config(model, drop=["chat_template"])
    fails(evaluate.main, same, "holds answers with template = ")


def test_one_image_cannot_be_shuffled():
    with pytest.raises(ValueError, match="--images shuffled needs two images; here are 1"):
        evaluate.with_images([{"image": "a.png"}, {"image": "a.png"}, {"image": None}], "shuffled")


# ------------------------------------------------------------------------------ storage that hangs


@pytest.fixture
def hanging(monkeypatch):
    """Reading one of the images never ends, until the test does."""
    over = threading.Event()
    read = data.read_image

    def hang(file, size):
        if "000003" in str(file):
            over.wait(60)
        return read(file, size)

    monkeypatch.setattr(data, "read_image", hang)
    monkeypatch.setattr(cache, "LOOK_EVERY", 0.05)
    yield
    over.set()


def test_storage_that_hangs_is_named_and_what_was_answered_stays(taught, questions, tmp_path, hanging,
                                                                 monkeypatch, fails):
    monkeypatch.setattr(cache, "LONGEST_WAIT", 0.4)
    command = ["--model", str(taught["llama"]), "--out", str(tmp_path), "--batch-size", "1",
               f"coco={questions / 'coco'}"]
    fails(evaluate.main, command, "000000000003.jpg: has not been read for 0.4 seconds",
          "what was done before stays")
    rows = (tmp_path / "evaluation/answers/coco.0.jsonl").read_text().splitlines()
    assert len(rows) == 1 + 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_storage_that_hangs(taught, questions, tmp_path, hanging, capsys, number):
    """And the same command goes on."""
    command = ["--model", str(taught["llama"]), "--out", str(tmp_path), "--batch-size", "1", "--precision",
               "fp32", f"coco={questions / 'coco'}"]
    timer = threading.Timer(3, signal.raise_signal, [number])
    timer.start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(command)
    timer.cancel()
    assert stop.value.code == 130 and time.monotonic() - began < 30
    assert "stopped; the same command goes on" in capsys.readouterr().out
    kept = (tmp_path / "evaluation/answers/coco.0.jsonl").read_bytes()
    assert len(kept.splitlines()) == 1 + 3 and not (tmp_path / "evaluation/lock.json").exists()


def test_a_score_along_the_way_of_a_training_waits_no_longer(taught, questions, hanging, monkeypatch):
    model, tok = transfer.load_model(str(taught["llama"]), torch.float32)
    score = evaluate.scorer([f"coco={questions / 'coco'}"], None, tok, 2, ALONE)
    with loop.stopping_when_asked():
        loop.stop_asked.set()
        with pytest.raises(loop.Failure, match="stopped while the images of coco were waited for"):
            score(model)
    loop.stop_asked.clear()
    monkeypatch.setattr(cache, "LONGEST_WAIT", 0.3)
    with pytest.raises(OSError, match="has not been read for 0.3 seconds"):
        score(model)
