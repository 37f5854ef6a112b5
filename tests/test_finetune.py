"""Facts about finetune.py: how ScienceQA is read and asked, and whole runs on small models."""

import argparse
import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, curves, edit_config, randomise, train_in
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import export
import finetune
import hub
import llm as language_models
import loop
import memvp
import pairs
import sample
import transfer
from demo.questions import write_benchmarks
from study import memory

ROOT = Path(finetune.__file__).parent


def arguments(memvp_world, out, *more):
    clip, llm, questions = memvp_world
    return ["--llm", str(llm), "--vit", str(clip), "--memvp", f"scienceqa={questions}", "--out", str(out),
            "--batch-size", "4", "--steps", "6", "--lr", "0.01", "--rows", "20", "--val-samples", "6",
            "--micro-batch", "2", "--log-every", "1", "--workers", "0", "--precision", "fp32", *more]


def metrics(folder):
    """The lines of a run's log, without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "samples_per_second", "peak_memory")
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def refused(capsys, command):
    """What a command says that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        finetune.main(command)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def tok(memvp_world):
    return data.load_tokenizer(memvp_world[1])


# --------------------------------------------------------------------------------------- questions


def test_a_question_is_asked_as_by_memvps_code():
    """QCM-A of util/base_prompt.py: an empty context is N/A; each pair of blanks becomes one, once."""
    item = dict(question="Which  is it? ", choices=["a lake", "the  sea"], answer=1, hint="")
    item["caption"] = "a bay"
    prompt, target = finetune.ask_scienceqa(item)
    assert prompt == "Question: Which is it? \nContext: N/A\nOptions: (A) a lake (B) the sea\nResponse:"
    assert target == "The answer is B."
    hinted = item | dict(hint=" Look   here.")
    prompt, _ = finetune.ask_scienceqa(hinted, with_caption=True)
    assert prompt.splitlines()[1] == "Context: Look  here. a bay"
    assert finetune.ask_scienceqa(item, with_caption=True)[0].splitlines()[1] == "Context: a bay"


def test_prompt_and_target_are_one_text_for_a_decoder_only_llm(tok):
    prompt, target = finetune.question_ids(tok, "Options: (A) red\nResponse:", "The answer is A.")
    assert prompt[0] == tok.bos_id and target[-1] == tok.eos_id
    assert prompt[1:] + target[:-1] == tok.encode("Options: (A) red\nResponse:The answer is A.")


def test_a_token_across_the_end_of_the_prompt_is_not_read(tok):
    """Qwen's tokenizer has ":The"."""
    whole = tok.encode("Response: The answer is A.")
    prompt, target = finetune.question_ids(tok, "Response: The ans", "wer is A.")
    assert prompt[1:] == tok.encode("Response: The ans") and target[:-1] == tok.encode("wer is A.")
    assert prompt[1:] + target[:-1] != whole


def test_captions_that_are_not_there_are_no_captions():
    """`evaluate.py --captions` without captions.json."""
    args = evaluate.parse_arguments(["--model", "m", "--captions"])
    item = {"id": "1", "question": "Which?", "image": ""}
    with pytest.raises(ValueError, match="--captions: no question has one; captions.json"):
        evaluate.describe_asking(evaluate.Task("scienceqa", [item]), args, None, None)
    header = evaluate.describe_asking(evaluate.Task("scienceqa", [item | {"caption": "a"}]), args, None, None)
    assert header["captions"]


def test_a_t5_reads_the_prompt_in_its_encoder(tok):
    tok.encoder_decoder = True
    prompt, target = finetune.question_ids(tok, "Response:", "The answer is A.")
    assert prompt == tok.encode("Response:") + [tok.eos_id]
    assert target == tok.encode("The answer is A.") + [tok.eos_id]


def read_items(folder, split):
    items = pairs.read_questions(f"{folder}/problems.json#{split}")
    return [items[i] for i in range(len(items))]


def read_questions(memvp_world, tok, *more):
    """-> (to train on, for validation)"""
    args = finetune.parse_arguments(arguments(memvp_world, "run", *more))
    return finetune.read_questions(args, finetune.TASKS["scienceqa"], tok, 28, lambda line: None)


def test_questions_that_cannot_be_asked_are_left_out_and_named(memvp_world, tok, tmp_path):
    """Six choices, and a prompt over the limit, which is not cut: its end would be lost."""
    clip, llm, questions = memvp_world
    folder = shutil.copytree(questions, tmp_path / "scienceqa")
    problems = json.loads((folder / "problems.json").read_text())
    problems["2"]["choices"] = list("abcdef")
    problems["4"]["question"] = "long " * 200
    del problems["6"]
    (folder / "problem.json").write_text(json.dumps(problems))  # as MemVP's README calls it
    (folder / "problems.json").unlink()
    train_set, _ = read_questions((clip, llm, folder), tok, "--max-tokens", "200")
    (items,) = train_set.sets
    assert [items[i]["id"] for i in range(len(items))] == ["1", "3", "5", "7", "8", "9", "10", "11", "12"]
    place = f"{folder / 'problem.json'}, question"
    assert items.left_out == {
        "more than 5 choices": [f"{place} 2"], "longer than --max-tokens 200": [f"{place} 4"],
        "a question that is not there": [f"{place} 6"]}
    assert train_set.measure().sum(1).max() <= 200


def test_a_folder_without_scienceqa_says_what_to_put_where(memvp_world, tok, tmp_path):
    clip, llm, _ = memvp_world
    says = r"(?s)no problems.json; put there, .*images/train/1/image.png"
    with pytest.raises(FileNotFoundError, match=says):
        read_questions((clip, llm, tmp_path), tok)


def test_batches_hold_images_prompts_and_targets(memvp_world, tok):
    items = read_items(memvp_world[2], "train")
    questions, _ = read_questions(memvp_world, tok)
    batch = questions.collate([questions[0, i] for i in range(4)])
    assert batch["has_image"].tolist() == [True, True, False, True]
    assert batch["images"].shape == (4, 3, 28, 28) and not batch["images"][2].any()
    assert batch["images"][1, :, 5, 5].tolist() == list(COLOURS["green"])
    for row in range(4):
        prompt, target = finetune.question_ids(tok, *finetune.ask_scienceqa(items[row]))
        padded = batch["prompt_ids"][row].tolist()
        assert padded == [data.PADDING] * (len(padded) - len(prompt)) + prompt
        assert [i for i in batch["target_ids"][row].tolist() if i >= 0] == target


def test_validation_questions_with_an_image_come_first(memvp_world, tok):
    """So that neighbours lend each other images."""
    _, held_out = read_questions(memvp_world, tok, "--val-samples", "7")
    (items,) = held_out.sets
    assert [items[i]["id"] for i in range(7)] == ["13", "14", "16", "17", "19", "15", "18"]


def write_tasks(folder):
    """VQAv2, GQA and COCO as they are distributed, of eight plain images each."""
    colours = list(COLOURS)
    for part in ("train2014", "val2014"):
        names = [f"COCO_{part}_{i + 1:012d}.jpg" for i in range(8)]
        for i, name in enumerate(names):
            for place in (folder / "vqav2" / part, folder / "coco" / part):
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 30), COLOURS[colours[i % 4]]).save(place / name)
        questions = [dict(question_id=i, image_id=i + 1, question="What  Color is it?") for i in range(8)]
        answers = [["red"] * 7 + ["Blue"] * 2 + ["pink"] for _ in range(8)]
        notes = [dict(question_id=i, image_id=i + 1, answer_type="other", multiple_choice_answer="red",
                      answers=[dict(answer=text) for text in answers[i]]) for i in range(8)]
        files = {f"v2_OpenEnded_mscoco_{part}_questions": {"questions": questions, "data_subtype": part},
                 f"v2_mscoco_{part}_annotations": {"annotations": notes}}
        for name, content in files.items():
            (folder / "vqav2" / f"{name}.json").write_text(json.dumps(content))
    (folder / "gqa" / "images").mkdir(parents=True)
    for split in ("train", "val"):
        asked = {f"{split}{i}": dict(imageId=f"{split}{i}", question="Is it red?", answer="yes",
                                     types=dict(structural="verify")) for i in range(4)}
        for id in asked:
            Image.new("RGB", (30, 30), "red").save(folder / "gqa" / "images" / f"{id}.jpg")
        (folder / "gqa" / f"{split}_balanced_questions.json").write_text(json.dumps(asked))
    images = []
    for i in range(8):
        part = "train2014" if i < 6 else "val2014"
        sentences = [dict(raw=f"A red   square {n}.") for n in range(5)]
        images.append(dict(filepath=part, filename=f"COCO_{part}_{i + 1:012d}.jpg", cocoid=i + 1, imgid=i,
                           split=["train", "restval", "val"][i // 3], sentences=sentences))
    (folder / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.mark.parametrize("task, prompt, targets, count", [
    ("vqav2", "vqa: What  Color is it?", {" red", " Blue", " pink"}, 8),
    ("gqa", "gpa: Is it red?", {" yes"}, 4),
    ("coco", "caption:", {f" A red   square {n}." for n in range(5)}, 6),
])
def test_other_tasks_are_asked_by_vl_pets_protocol(memvp_world, tok, tmp_path, task, prompt, targets, count):
    """Case is kept, an answer is drawn anew each time, prompt and answer keep to their lengths."""
    folder = write_tasks(tmp_path) / task
    args = finetune.parse_arguments([*arguments(memvp_world, "run"), "--memvp", f"{task}={folder}"])
    train_set, held_out = finetune.read_questions(args, finetune.TASKS[task], tok, 28, lambda line: None)
    assert train_set.starts[-1] == count
    found = set()
    for position in range(40):
        sample = train_set[position, 0]
        whole = finetune.question_ids(tok, prompt, next(iter(targets)))[0]
        assert sample["prompt"] == whole[:20] and sample["image"].any()
        (target,) = sample["targets"]
        found.add(tuple(target))
    limit = finetune.TASKS[task].most[1]
    expected = {tuple(finetune.question_ids(tok, prompt, text)[1]) for text in targets}
    assert found == {(*ids[:-1][: limit - 1], tok.eos_id) for ids in expected}
    assert held_out[0, 0] and finetune.choose_stage(args, finetune.TASKS[task], True).trains == memvp.TRAINS


def test_answers_are_drawn_in_proportion_to_their_soft_scores():
    item = dict(answers=["red"] * 7 + ["blue"] * 2 + ["pink"])
    rng = np.random.default_rng(0)
    drawn = [finetune.draw_answer(item, rng)["drawn"] for _ in range(4000)]
    for text, score in (("red", 1.0), ("blue", 0.6), ("pink", 0.3)):
        assert drawn.count(text) / 4000 == pytest.approx(score / 1.9, abs=0.03)


def test_a_t5_gets_the_answer_without_the_blank(tok):
    tok.encoder_decoder = True
    prompt, target = finetune.question_ids(tok, "vqa: " + "long " * 30, " red", (20, 10))
    assert len(prompt) == 20 and prompt[-1] == tok.eos_id
    assert target == tok.encode("red") + [tok.eos_id]


# ------------------------------------------------------------------------------ questions of the study


def test_the_studys_questions_are_in_scienceqas_layout(tmp_path):
    """Two thirds have an image; answers are drawn evenly among three to five choices."""
    memory.make(tmp_path, {"train": 300, "val": 3})
    items = read_items(tmp_path, "train")
    assert len(items) == 300
    assert 0.55 < sum(bool(item["image"]) for item in items) / 300 < 0.78
    sizes = {len(item["choices"]) for item in items}
    assert sizes == {3, 4, 5} and all(len(set(item["choices"])) == len(item["choices"]) for item in items)
    asked = [item for item in items if item["image"] and "color" in item["question"]]
    colours = [item["choices"][item["answer"]] for item in asked]
    assert len(set(colours)) == 8 and max(map(colours.count, colours)) < 0.35 * len(colours)


def test_the_study_takes_the_choice_with_the_largest_logit(memvp_world):
    """Side by side as alone, by the first id of each choice."""
    clip, llm, questions = memvp_world
    models = ["--llm", str(llm), "--vit", str(clip)]
    args = finetune.parse_arguments([*models, "--memvp", f"scienceqa={questions}"])
    tok = data.load_tokenizer(llm)
    vit, place = hub.resolve(str(clip), "vpg"), hub.resolve(str(llm), "target")
    made = transfer.memory_options(args, vit, place)
    model = transfer.build_memory_llm(made, vit, place, torch.float32, "cpu").eval()
    randomise(model.memory, scale=1.0)
    items = read_items(questions, "train")
    items = [item | {"choices": ["red", "green", "blue", "white"]} for item in items]
    seen = torch.tensor([bool(item["image"]) for item in items])
    features = memory.read_image_features(model, items)
    together = memory.chosen(model, tok, items, seen, features)
    assert len(set(together)) > 1
    for i, item in enumerate(items):
        prompt, _ = finetune.question_ids(tok, *finetune.ask_in_words(item))
        prefix, _, read = model.reads(torch.tensor([prompt]), seen[i : i + 1], features=features[i : i + 1])
        with torch.no_grad():
            logits = model.llm(prefix, torch.zeros(1, 1, dtype=torch.long), memory=read)[0, 0]
        ids = [tok.encode(f"Answer: {choice}")[len(tok.encode("Answer:"))] for choice in item["choices"]]
        assert together[i] == int(logits[ids].argmax())


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(memvp_world, tmp_path_factory):
    """A run of six steps, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with curves(drawn=True):
        finetune.main(arguments(memvp_world, out))
    return out


@pytest.mark.slow
def test_a_run_learns_and_saves_what_was_trained_alone(run):
    rows = metrics(run)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    tensors = load_file(run / "model.safetensors")
    assert set(tensors) == {
        "memory.key_positions", "memory.value_positions", "memory.projector.0.weight",
        "memory.projector.0.bias", "memory.projector.2.weight", "memory.projector.2.bias",
        *(f"vit.adapters.{i}.{part}.weight" for i in range(2) for part in ("down", "up"))}
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in tensors.values())
    assert {file.name for file in run.iterdir()} >= {"config.json", "curves.png", "bad_data.jsonl"}


@pytest.mark.slow
def test_a_stopped_run_continues_with_the_same_losses(memvp_world, run, tmp_path):
    """Stopped after step 3, and resumed with other micro-batches for what draws nothing."""
    out = tmp_path / "stopped"

    def stop(at):
        if at["step"] == 3:
            loop.stop_asked.set()

    with pytest.raises(SystemExit) as stopped:
        finetune.main(arguments(memvp_world, out), watch=stop)
    assert stopped.value.code == 130
    finetune.main(arguments(memvp_world, out, "--resume"))
    seen = [row for row in metrics(out) if "loss" in row]
    assert seen == [row for row in metrics(run) if "loss" in row]
    resumed, whole = load_file(out / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


@pytest.mark.slow
def test_a_run_that_has_ended_says_so_once_more(memvp_world, run, tmp_path, capsys):
    """As where a scheduler starts the same command with --resume again."""
    shutil.copytree(run, tmp_path / "run")
    finetune.main(arguments(memvp_world, tmp_path / "run", "--resume"))
    assert "higher with shuffled images" in capsys.readouterr().out


def test_a_state_that_does_not_know_an_option_resumes_with_its_default(memvp_world, tmp_path):
    args = finetune.parse_arguments(arguments(memvp_world, tmp_path))
    saved = transfer.arguments(args)
    for name in ("prompts", "shard"):
        del saved[name]
    finetune.check_same_run(args, {"arguments": saved})
    args.prompts = "input"
    with pytest.raises(ValueError, match="--prompts was memory, is input"):
        finetune.check_same_run(args, {"arguments": saved})


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_though_one_has_no_image(memvp_world, tmp_path, monkeypatch):
    """Without dropout, whose draws differ: of a batch of two, sorted by length, one process has the text-only
    question."""
    clip, llm, _ = memvp_world
    folder = shutil.copytree(memvp_world[2], tmp_path / "scienceqa")
    splits = json.loads((folder / "pid_splits.json").read_text())
    (folder / "pid_splits.json").write_text(json.dumps(splits | {"train": ["2", "3"]}))
    monkeypatch.setattr(memvp.F, "dropout", lambda x, p: x)
    losses = []
    for world in (1, 2):
        out = tmp_path / str(world)
        options = arguments((clip, llm, folder), out, "--batch-size", "2", "--steps", "3", "--adapters", "0")
        train_in(world, options, finetune.main)
        losses.append([row["loss"] for row in metrics(out) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_commands_take_the_run_as_a_model(memvp_world, run, tmp_path, capsys):
    picture = str(memvp_world[2] / "images" / "val" / "13" / "image.png")
    capsys.readouterr()
    sample.main([picture, "--model", str(run), "--prompt", "Response:", "--precision", "fp32"])
    assert capsys.readouterr().out.startswith(f"{picture}: ")
    with pytest.raises(SystemExit):
        export.main([str(run), str(tmp_path / "exported")])
    assert "a run of MemVP" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- ScienceQA scored


def test_the_letter_is_the_first_capital_one():
    said = {" A": "A", "B.": "B", "": "", "the answer is C": "C", "a": "", "Z": "Z"}
    assert {text: evaluate.chosen_letter(text) for text in said} == said


def test_scienceqas_columns_are_those_of_its_papers():
    """As tools/evaluate_acc.py of lupantech/ScienceQA counts them; no letter, or one too far, is wrong."""
    item = dict(choices=["a", "b", "c"], subject="natural science", hint="", image=None, grade="grade7")
    items = [
        item | dict(id="1", answer=0),
        item | dict(id="2", answer=1, hint="Look.", image="x.png", grade="grade6"),
        item | dict(id="3", answer=2, subject="language science", grade="grade12"),
        item | dict(id="4", answer=0, subject="social science", image="y.png")]
    answers = {"1": "A", "2": " B", "3": "", "4": "E"}
    scores, of_question = evaluate.score_scienceqa(items, answers, None)
    assert scores == {"average": 50.0, "NAT": 100.0, "SOC": 0.0, "LAN": 0.0, "TXT": 100.0, "IMG": 50.0,
                      "NO": 50.0, "G1-6": 100.0, "G7-12": pytest.approx(100 / 3)}
    assert of_question == {"1": 1.0, "2": 1.0, "3": 0.0, "4": 0.0}
    letters = {"1": "A", "2": "A", "3": "C", "4": "B"}
    compared = evaluate.compare_letters(items, answers, letters)
    assert compared["average, largest logit"] == 50.0
    assert compared["answers that are not the letter of the largest logit"] == 75.0


@pytest.mark.slow
@pytest.mark.parametrize("captions", [[], ["--captions"]])
def test_scienceqa_is_asked_as_memvp_asks_it(memvp_world, run, tmp_path, captions):
    """Behind "The answer is", and the blank that this tokenizer writes apart, one greedy token, each question
    alone; and the likeliest of the letters offered."""
    command = [f"scienceqa={memvp_world[2]}", "--model", str(run), "--out", str(tmp_path),
               "--precision", "fp32", "--batch-size", "3", *captions]
    result = evaluate.main(command)["scienceqa"]
    model, tok = transfer.load_model(run, torch.float32)
    lines = (tmp_path / "evaluation" / "answers" / "scienceqa.0.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines[1:])}
    items = read_items(memvp_world[2], "test")
    assert len(rows) == result["items"] == len(items) == 5
    for item in items:
        prompt, _ = finetune.ask_scienceqa(item, with_caption=bool(captions))
        ids = torch.tensor([[tok.bos_id, *tok.encode(prompt + "The answer is ")]])
        image = data.read_image(item["image"], 28) if item["image"] else torch.zeros(3, 28, 28).byte()
        sees = dict(has_image=torch.tensor([bool(item["image"])]), images=image[None])
        ((token,),) = model.generate(ids, **sees, max_new_tokens=1, stop=())
        assert rows[item["id"]]["answer"] == tok.decode([token])
        prefix, _, read = model.reads(ids, **sees)
        logits = model.llm(prefix, torch.tensor([[0]]), memory=read)[0, 0]
        before = len(tok.encode("The answer is "))
        letters = "ABCDE"[: len(item["choices"])]
        offered = [tok.encode(f"The answer is {letter}.")[before] for letter in letters]
        assert rows[item["id"]]["letter"] == letters[int(logits[offered].argmax())]
    assert {"average", "NAT", "IMG", "G1-6", "average, largest logit"} <= result["scores"].keys()
    other = [*command, "--captions"] if not captions else command[:-1]
    with pytest.raises(SystemExit):
        evaluate.main(other)


@pytest.mark.slow
def test_scienceqa_is_for_runs_of_memvp(memvp_world, world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([f"scienceqa={memvp_world[2]}", "--model", str(world[0]), "--out", str(tmp_path)])
    assert "scienceqa is for runs of MemVP" in capsys.readouterr().err


@pytest.mark.slow
def test_other_benchmarks_ask_a_run_of_memvp_as_any_model(run, tmp_path):
    """Each answer is that of the model to this question alone."""
    write_benchmarks(tmp_path, scenes=4)
    command = [f"vqav2={tmp_path / 'vqav2'}", f"coco={tmp_path / 'coco'}", "--model", str(run),
               "--num-beams", "2", "--out", str(tmp_path / "out"), "--precision", "fp32"]
    results = evaluate.main(command)
    assert {"accuracy"} < results["vqav2"]["scores"].keys() and {"CIDEr"} < results["coco"]["scores"].keys()
    model, tok = transfer.load_model(run, torch.float32)
    task = evaluate.read_task("vqav2", str(tmp_path / "vqav2"))
    answers = {row["question_id"]: row["answer"]
               for row in json.loads((tmp_path / "out" / "evaluation" / "vqav2.json").read_text())}
    for item in task.items[:5]:
        question = evaluate.clean_question(item["question"])
        image = data.read_image(item["image"], 28)[None]
        options = dict(num_beams=2, max_new_tokens=10, length_penalty=-1.0, length_penalty_counts="prompt")
        (alone,) = transfer.answer(model, tok, image, f"Question: {question} Answer:", **options)
        assert answers[item["id"]] == alone


@pytest.mark.slow
@pytest.mark.parametrize("task, benchmark", [
    ("vqav2", "vqav2"), ("vqav2", "okvqa"), ("gqa", "gqa"), ("coco", "coco"), ("coco", "nocaps")])
def test_a_run_of_memvp_is_asked_as_its_task_taught_it(run, tmp_path, monkeypatch, task, benchmark):
    """The same ids as in training: its prompt, the question as it is written, cut at as many."""
    write_benchmarks(tmp_path, scenes=4)
    edit_config(shutil.copytree(run, tmp_path / "run"), arguments={"memvp": f"{task}=somewhere"})
    asked = []

    def generated(self, prompt_ids, **options):
        asked.extend(tuple(id for id in row if id != data.PADDING) for row in prompt_ids.tolist())
        return [[]] * len(prompt_ids)

    monkeypatch.setattr(memvp.MemoryLLM, "generate", generated)
    command = [f"{benchmark}={tmp_path / benchmark}", "--model", str(tmp_path / "run"), "--precision", "fp32"]
    evaluate.main(command)
    _, tok = transfer.load_model(tmp_path / "run", torch.float32)
    learnt = finetune.TASKS[task]
    expected = set()
    for item in evaluate.read_task(benchmark, str(tmp_path / benchmark)).items:
        ids, _ = finetune.question_ids(tok, *learnt.ask(item | {"drawn": "red"}), learnt.most)
        expected.add(tuple(ids))
    assert set(asked) == expected and (task == "coco" or max(map(len, expected)) == 20)


@pytest.mark.slow
def test_a_run_that_answers_in_words_is_not_asked_for_letters(memvp_world, run, tmp_path, capsys):
    edit_config(shutil.copytree(run, tmp_path / "run"), arguments={"memvp": "scienceqa-words"})
    with pytest.raises(SystemExit):
        evaluate.main([f"scienceqa={memvp_world[2]}", "--model", str(tmp_path / "run")])
    assert "study.memory score" in capsys.readouterr().err


@pytest.mark.parametrize("task, says", [
    ("scienceqa", "evaluate.py --model run scienceqa=somewhere"),
    ("scienceqa-words", "sample.py IMAGE --model run --prompt 'Question: What is it?\nAnswer:'"),
    ("gqa", "sample.py IMAGE --model run --prompt 'gpa: What is it?'"),
    ("coco", "sample.py IMAGE --model run --prompt caption:")])
def test_a_run_says_how_to_ask_it_as_it_was_taught(memvp_world, task, says):
    more = ["--memvp", f"{task}=somewhere"]
    assert finetune.way_to_ask(finetune.parse_arguments(arguments(memvp_world, "run", *more))) == says


@pytest.mark.slow
@pytest.mark.parametrize("images", ["right", "none"])
def test_without_images_memvp_is_asked_as_where_none_is(memvp_world, run, tmp_path, monkeypatch, images):
    """Its memory has rows of its own for that; of ScienceQA, too, where some questions have none anyway."""
    write_benchmarks(tmp_path, scenes=4)
    shown = []
    reads = memvp.MemoryLLM.reads

    def watched(self, prompt_ids, has_image=None, **sees):
        shown.append([True] * len(prompt_ids) if has_image is None else has_image.tolist())
        return reads(self, prompt_ids, has_image, **sees)

    def generated(self, prompt_ids, has_image=None, features=None, **options):
        shown.append([True] * len(prompt_ids) if has_image is None else has_image.tolist())
        return [[]] * len(prompt_ids)

    monkeypatch.setattr(memvp.MemoryLLM, "reads", watched)
    monkeypatch.setattr(memvp.MemoryLLM, "generate", generated)
    evaluate.main([f"vqav2={tmp_path / 'vqav2'}", f"scienceqa={memvp_world[2]}", "--model", str(run),
                   "--out", str(tmp_path / "out"), "--precision", "fp32", "--images", images])
    flags = sum(shown, [])
    pictured = [bool(item["image"]) for item in read_items(memvp_world[2], "test")]
    assert len(flags) > 15 + len(pictured)
    assert sum(flags) == (len(flags) - pictured.count(False) if images == "right" else 0)


# ------------------------------------------------------------------------------- a run as a model


@pytest.mark.slow
def test_a_loaded_run_is_the_model_that_was_validated(memvp_world, run):
    model, tok = transfer.load_model(run, torch.float32)
    _, questions = read_questions(memvp_world, tok)
    processes = loop.Processes(0, 1, torch.device("cpu"), "fp32")
    matched, shuffled = loop.Validation(questions, 2, processes).losses(model)
    last = [row for row in metrics(run) if "val_loss" in row][-1]
    assert (matched, shuffled) == pytest.approx((last["val_loss"], last["val_loss_shuffled"]), rel=1e-6)


@pytest.mark.slow
def test_a_memory_on_another_vit_or_llm_is_refused(memvp_world, run, tmp_path):
    for part in ("vit", "llm"):
        other = shutil.copytree(run, tmp_path / part)
        config = json.loads((other / "config.json").read_text())
        model = shutil.copytree(config[part]["name"], tmp_path / f"other {part}")
        tensors = load_file(model / "model.safetensors")
        name = next(name for name in tensors if "layers.0" in name and ("vision" in name or part == "llm"))
        torch.manual_seed(0)
        tensors[name] = torch.randn_like(tensors[name])
        save_file(tensors, model / "model.safetensors")
        config[part]["name"] = str(model)
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"was trained with the {part} of .* put that one back"):
            transfer.load_model(other, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--prompts", "input"], ["--features", "queries"], ["--adapters", "0"]])
def test_what_may_be_compared_trains_in_the_same_loop(memvp_world, world, tmp_path, more):
    clip, llm, questions = memvp_world
    sees = world[0] if "queries" in more else clip
    finetune.main(arguments((sees, llm, questions), tmp_path / "run", "--steps", "2", *more))
    model, _ = transfer.load_model(tmp_path / "run", torch.float32)
    assert isinstance(model, memvp.InputPromptLLM) == ("input" in more)
    assert ("adapters" in model.parts) == (more == ["--prompts", "input"])


@pytest.mark.slow
def test_features_kept_give_the_losses_of_features_computed(memvp_world, tmp_path, monkeypatch):
    """Once filled, the cache is all that training looks at."""
    losses = []
    for name, more in (("computed", []), ("kept", ["--cache", str(tmp_path / "cache")])):
        command = arguments(memvp_world, tmp_path / name, "--adapters", "0", "--steps", "3", *more)
        finetune.main(command)
        losses.append([row["loss"] for row in metrics(tmp_path / name) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (tmp_path / "cache" / "scienceqa" / "00000.safetensors").exists()
    monkeypatch.setattr(finetune.cache.FeatureCache, "compute_rows", None)
    finetune.main(arguments(memvp_world, tmp_path / "again", "--adapters", "0", "--steps", "3", *more))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "kept")


@pytest.mark.slow
def test_the_other_tasks_train(memvp_world, tmp_path, capsys):
    folder = write_tasks(tmp_path)
    for task in ("vqav2", "gqa", "coco"):
        command = arguments(memvp_world, tmp_path / "runs" / task, "--steps", "2", "--clip", "5")
        finetune.main([*command, "--memvp", f"{task}={folder / task}"])
        assert (tmp_path / "runs" / task / "model.safetensors").exists()
    said = capsys.readouterr().out
    assert "--prompt 'vqa: What is it?'" in said and "--prompt 'gpa: What is it?'" in said
    assert "--prompt caption:" in said


@pytest.mark.slow
def test_resuming_with_other_arguments_is_refused(memvp_world, run, capsys):
    said = refused(capsys, arguments(memvp_world, run, "--resume", "--image-scale", "0.1"))
    assert "--image-scale was 0.01, is 0.1" in said
    assert "already holds a run" in refused(capsys, arguments(memvp_world, run))


@pytest.mark.slow
def test_a_run_whose_loss_is_nan_stops_and_says_what_to_do(memvp_world, tmp_path, capsys):
    said = refused(capsys, arguments(memvp_world, tmp_path / "run", "--lr", "1e30"))
    assert "at step" in said and "Start anew with a lower --lr" in said
    assert (tmp_path / "run" / "broken.json").exists()


def as_the_authors_save(model):
    """A MemoryLLM's trained tensors by the names of MemVP's code under DDP, and what it saves beside."""
    memory, adapters = model.memory, model.vit.adapters
    named = {
        "adapter_emb1": memory.key_positions[None], "adapter_emb2": memory.value_positions[None],
        "adapter_modality_embedding.weight": torch.zeros(2, model.llm.dim)}
    for ours, theirs in ((0, "fc1"), (2, "fc2")):
        for name, tensor in memory.projector[ours].state_dict().items():
            named[f"adapter_proj.{theirs}.{name}"] = tensor
    for i, adapter in enumerate([*adapters, adapters[0]]):  # the last block's is never used
        place = f"backbone.visual.transformer.resblocks.{i}.adapter_mlp"
        named[f"{place}.fc1.weight"] = adapter.down.weight
        named[f"{place}.fc2.weight"] = adapter.up.weight
    return {f"module.{name}": tensor.detach().clone() for name, tensor in named.items()}


@pytest.fixture
def taught(memvp_world, tmp_path):
    """A MemoryLLM, and how its memory is made."""
    args = finetune.parse_arguments(arguments(memvp_world, tmp_path))
    method = finetune.MemVPTuning(args, is_dry=False)
    model = method.build(args, loop.Processes.start("fp32"))
    for parameter in model.saved().values():
        torch.nn.init.normal_(parameter)
    return model, method.options


def test_what_memvps_authors_saved_becomes_a_run(memvp_world, taught, tmp_path, capsys):
    clip, llm, _ = memvp_world
    model, options = taught
    content = {"model": as_the_authors_save(model), "epoch": 19, "args": argparse.Namespace(emb=20)}
    torch.save(content, tmp_path / "checkpoint-19.pth")
    export.main(["--from-memvp", str(tmp_path / "checkpoint-19.pth"), str(tmp_path / "theirs"),
                 "--llm", str(llm), "--vit", str(clip)])
    assert "evaluate.py --model" in capsys.readouterr().out
    again, _ = transfer.load_model(str(tmp_path / "theirs"), torch.float32)
    for name, tensor in model.saved().items():
        assert torch.equal(again.saved()[name], tensor), name
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["memory"] == options
    assert evaluate.taught_task(str(tmp_path / "theirs")) == "scienceqa"


@pytest.mark.parametrize("lost, said", [
    ("adapter_emb2", "lacks adapter_emb1"), ("adapter_proj.fc2.bias", "1 tensors missing.*projector.2.bias")])
def test_a_file_of_memvps_authors_that_lacks_something_is_refused(lost, said, memvp_world, taught, tmp_path,
                                                                 capsys):
    clip, llm, _ = memvp_world
    named = as_the_authors_save(taught[0])
    del named[f"module.{lost}"]
    torch.save({"model": named}, tmp_path / "a.pth")
    command = ["--from-memvp", str(tmp_path / "a.pth"), str(tmp_path / "new"), "--llm", str(llm)]
    with pytest.raises(SystemExit) as stop:
        export.main([*command, "--vit", str(clip)])
    assert stop.value.code == 2 and re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        export.main(command)
    assert "needs --llm and --vit" in capsys.readouterr().err


def test_the_longest_question_is_that_with_most_words_not_with_the_longest_lecture(tmp_path, tok):
    words = "how large is the third of the circles "
    rows = {str(i): dict(question="Which?", choices=["a", "b"], answer=0, hint="", image=None, grade="grade2",
                         subject="natural science", split="train", lecture=words * 60) for i in range(120)}
    rows["60"] |= {"hint": words * 20, "lecture": ""}
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    items = pairs.read_questions(f"{tmp_path}/problems.json#train")
    text = functools.partial(finetune.make_text, tok, finetune.TASKS["scienceqa"])
    questions = finetune.Questions([items], tok, 28, 0, augment=False, text=text)
    prompt, _ = finetune.question_ids(tok, *finetune.ask_scienceqa(items[60]))
    assert questions.longest()[0] == len(prompt) > 100


def test_on_a_gpu_the_micro_batch_follows_from_its_memory(memvp_world, tmp_path, monkeypatch):
    command = arguments(memvp_world, tmp_path)
    at = command.index("--micro-batch")
    args = finetune.parse_arguments(command[:at] + command[at + 2 :])
    method = finetune.MemVPTuning(args, is_dry=True)
    questions, *_ = method.read(args, print)

    def chosen(size, device="cuda"):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size))
        processes = loop.Processes(0, 1, torch.device(device), "fp32")
        found = finetune.Found(processes, method, questions)
        return finetune.choose_micro_batch(args, method.stage(args), found)

    assert chosen(24e9) == 36
    assert chosen(1, device="cpu") == 4
    assert 1 <= chosen(3e6) < chosen(5e6) < 36
    args.micro_batch = 5
    assert chosen(24e9) == 5


def test_a_dry_run_needs_no_data_and_loads_no_weights(memvp_world, tmp_path, capsys, monkeypatch):
    clip, llm, _ = memvp_world
    monkeypatch.setattr(language_models, "load_llm", None)
    finetune.main(arguments((clip, llm, tmp_path / "nothing"), tmp_path / "run", "--dry-run", "a100"))
    said = capsys.readouterr().out
    assert "taken are ScienceQA's amounts" in said and "no problems.json" in said
    assert "stage scienceqa: 6 steps of 4 = 24 samples" in said and "TFLOP a sample" in said
    assert not (tmp_path / "run").exists()


def test_the_papers_recipe_is_the_default(memvp_world):
    clip, llm, questions = memvp_world
    models = ["--llm", str(llm), "--vit", str(clip)]
    args = finetune.parse_arguments([*models, "--memvp", f"scienceqa={questions}"])
    task = finetune.TASKS["scienceqa"]
    stage = finetune.choose_stage(args, task, True)
    assert stage == memvp.STAGES["scienceqa"] and args.max_tokens == 512
    assert finetune.count_steps(args, stage, 12_726, 8) == 7_940
    args.batch_size = 64
    assert finetune.choose_stage(args, task, False).lr == pytest.approx(9e-3 * 64 / 256)
    assert finetune.choose_stage(args, task, False).trains == ("positions", "projector")


@pytest.mark.parametrize("more, says", [
    (["--memvp", "nlvr2=x"], "the tasks are scienceqa, scienceqa-words, vqav2, gqa, coco"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--rows", "0"], "--rows must be at least 1"),
    (["--adapters", "-1"], "--adapters must be at least 0"),
    (["--features", "queries", "--vit-layers", "2"], "--vit-layers is for --features patches"),
    (["--features", "queries", "--normalise", "clip"], "--normalise is for --features patches"),
    (["--features", "queries", "--adapters", "64"], "--adapters is for --features patches"),
    (["--cache", "cache"], "--cache is for --features queries or --adapters 0"),
])
def test_arguments_that_make_no_sense_are_refused(memvp_world, tmp_path, capsys, more, says):
    assert says in refused(capsys, arguments(memvp_world, tmp_path / "run", *more))


def test_too_many_unusable_questions_end_the_run(memvp_world, tmp_path, capsys):
    clip, llm, questions = memvp_world
    folder = shutil.copytree(questions, tmp_path / "scienceqa")
    problems = json.loads((folder / "problems.json").read_text())
    for id in "123456":
        problems[id]["answer"] = 7
    (folder / "problems.json").write_text(json.dumps(problems))
    command = arguments((clip, llm, folder), tmp_path / "run", "--max-bad", "0.005")
    said = refused(capsys, command)
    assert "6 of 12 annotations are unusable, more than --max-bad 0.005" in said
    assert "an answer that is none of the choices" in said
    said = refused(capsys, [*command, "--max-tokens", "20"])
    assert "no question can be asked" in said and "longer than --max-tokens 20" in said
