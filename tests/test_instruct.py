"""Facts about finetune.py --instruct: how a model that sees learns to converse, and the folder of its run."""

import contextlib
import hashlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    COLOURS,
    LLAMA_CONFIG,
    T5_CONFIG,
    TEXT,
    arguments,
    assert_same_losses,
    bad_data,
    make_blip2,
    make_model,
    rows,
    train_in,
    values,
    write_kind,
    write_language_model,
    write_tokenizer,
)
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

import data
import export
import finetune
import llm as language_models
import loop
import qformer
import sample
import train
import transfer
import vpgtrans

CHATML = ("{% for message in messages %}{% if message.role == 'system' %}"
          "{{ raise_exception('no system text') }}{% endif %}{{ '<|im_start|>' + message.role + '\n'"
          " + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SAID = ["What colour is it?", "Is it red?", "Yes.", "No.", *(f"It is {colour}." for colour in COLOURS)]
ALONE = loop.Processes(0, 1, torch.device("cpu"), "fp32")


def write_talker(folder, template=CHATML):
    """A random BLIP-2 around a LLaMA, whose tokenizer has the ChatML marks, and a chat template or none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, [*TEXT, *SAID], 330)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = LLAMA_CONFIG | dict(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=2,
                               pad_token_id=1, max_position_embeddings=512)
    make_blip2(transformers.AutoConfig.for_model(**text)).save_pretrained(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llava(id, image, *said):
    """A conversation as LLaVA's files have it."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    if image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": id, "conversations": turns} | ({"image": image} if image else {})


def write_conversations(folder, count=24, more=()):
    """One about each of so many plain pictures, every other one of two turns."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(count):
        colour = list(COLOURS)[i % 4]
        Image.new("RGB", (30 + i, 30), COLOURS[colour]).save(folder / f"{i}.png")
        said = ["What colour is it?", f"It is {colour}."]
        said += ["Is it red?", "Yes." if colour == "red" else "No."] * (i % 2)
        found.append(llava(f"c{i}", f"{i}.png", *said))
    (folder / "talk.json").write_text(json.dumps([*found, *more]))
    return folder / "talk.json"


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """(folder of a model, file of conversations)"""
    folder = tmp_path_factory.mktemp("talk")
    return write_talker(folder / "model"), write_conversations(folder / "talk")


def command(talk, out, *more):
    model, conversations = talk
    return ["--model", str(model), "--instruct", str(conversations), "--out", str(out), "--batch-size", "4",
            "--steps", "6", "--lr", "0.01", "--val-samples", "6", "--micro-batch", "2", "--log-every", "1",
            "--val-every", "3", "--workers", "0", "--precision", "fp32", *map(str, more)]


def read(talk, *more):
    """The data of a run that is not begun. -> (its method, to train on, for validation, what is said)"""
    args = finetune.parse_arguments(command(talk, "run", *more))
    method = finetune.InstructionTuning(args, is_dry=True)
    said = []
    samples, held_out, weights = method.read(args, said.append)
    return method, samples, held_out, weights, "\n".join(said)


# ------------------------------------------------------------------------------------------ the recipe


def test_the_recipe_is_that_of_vl_vicuna(talk):
    """160 steps of 120 over cc_sbu_align's 3,439; 40 steps of warm-up; no mirroring, nor crops."""
    args = finetune.parse_arguments(["--model", str(talk[0]), "--instruct", str(talk[1])])
    method = finetune.InstructionTuning(args, is_dry=True)
    stage = method.stage(args)
    assert stage == vpgtrans.STAGES["instruct"] and stage.trains == vpgtrans.JOINTLY
    steps = finetune.count_steps(args, stage, 3_439, 4)
    assert (steps, stage.batch_size) == (160, 120)
    rates = [vpgtrans.learning_rate(stage, step, steps) for step in range(steps)]
    assert rates[0] == 1e-6 and rates[40] == max(rates) == 1e-5 and rates[-1] == pytest.approx(1e-6)
    assert finetune.count_steps(args, stage, 600, 4) == 50  # ten epochs at most
    args = finetune.parse_arguments(command(talk, "run", "--trains", "projector", "--lr", "3e-5"))
    stage = method.stage(args)
    assert stage.trains == ("projector",) and (stage.lr, stage.final_lr) == (3e-5, pytest.approx(3e-6))


def test_instructions_are_minigpt_4s():
    """By the sums of what prompts/alignment.txt has behind the image."""
    sums = [hashlib.sha256(text.encode()).hexdigest()[:8] for text in finetune.INSTRUCTIONS]
    assert sums == ["b9dd6565", "b6d64eff", "e3f66690", "6987af90"]


# -------------------------------------------------------------------------------------------- the data


def their_loss(theirs, tokenizer, row, conversation):
    """Of a sample, by transformers: the sum over the answers and their end marks, and how many tokens that
    is. The labels are made from the text."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (qformer.MEAN, qformer.STD))
    pixels = (row["image"].double() / 255 - mean) / std
    features = theirs.vision_model(pixels[None]).last_hidden_state
    queries = theirs.qformer(theirs.query_tokens, encoder_hidden_states=features).last_hidden_state
    text = ""
    for turn in conversation:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        text += f"<|im_start|>{role}\n{turn['value']}<|im_end|>\n"
    before, behind = text.split("<image>")
    pieces = [(before, False)]
    for n, piece in enumerate(re.split(r"(?<=assistant\n)(.*?<\|im_end\|>)", behind)):
        pieces.append((piece, n % 2 == 1))  # every second is an answer and its end
    embeddings, labels = [], []
    for n, (piece, counts) in enumerate(pieces):
        ids = tokenizer(piece, add_special_tokens=False).input_ids
        embeddings.append(theirs.get_input_embeddings()(torch.tensor([ids])))
        labels += ids if counts else [-100] * len(ids)
        if n == 0:
            embeddings.append(theirs.language_projection(queries))
            labels += [-100] * 5
    labels = torch.tensor([labels])
    out = theirs.language_model(inputs_embeds=torch.cat(embeddings, 1), labels=labels)
    answered = int((labels != -100).sum())
    return float(out.loss) * answered, answered


def test_the_loss_is_transformers_of_answers_alone(talk):
    """Conversations of one and two turns, side by side; our sum is taken in float32."""
    method, samples, *_ = read(talk)
    model = method.build(finetune.parse_arguments(command(talk, "run")), ALONE).double()
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(talk[0], dtype=torch.float64)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(talk[0] / "tokenizer.json"))
    conversations = {row["image"]: row["conversations"] for row in json.loads(talk[1].read_text())}
    chosen = [samples[0, i] for i in range(4)]
    batch = samples.collate(chosen)
    said = batch["prompt_ids"], batch["target_ids"], batch["scored"]
    expected = []
    with torch.no_grad():
        loss, tokens = model(*said, images=batch["images"])
        for row in chosen:
            conversation = conversations[Path(row["file"]).name]
            expected.append(their_loss(theirs, tokenizer, row, conversation))
    sums, counts = zip(*expected)
    assert len(set(counts)) > 1
    assert (int(tokens), float(loss)) == (sum(counts), pytest.approx(sum(sums), rel=1e-6))


@pytest.mark.slow
def test_what_trains_nothing_is_left_out_counted_and_explained(talk, tmp_path):
    """Conversations about no image, and those that the template refuses."""
    more = [llava(f"t{i}", None, "Who are you?", "A model.") for i in range(5)]
    for i in range(3):
        refused = llava(f"s{i}", f"{i}.png", "What colour is it?", "It is red.")
        refused["conversations"].insert(0, {"from": "system", "value": "Be brief."})
        more.append(refused)
    more.append(llava("long", "0.png", "Is it red? " * 60, "No."))
    more.append(llava("few signs of many tokens", "0.png", "紅" * 60, "No."))
    conversations = write_conversations(tmp_path, more=more)
    _, samples, held_out, _, said = read((talk[0], conversations), "--max-tokens", "100")
    assert "5 of 34 conversations left out: they are about no image" in said
    assert "3 left out: chat template: no system text" in said
    ids = {json.loads(text)["id"] for some in (samples, held_out) for text in some.sets[0].texts}
    assert ids == {f"c{i}" for i in range(24)}
    finetune.main(command((talk[0], conversations), tmp_path / "run", "--steps", "1", "--max-tokens", "100"))
    assert bad_data(tmp_path / "run", "chat template: no system text") == [
        f"{conversations}, s{i}" for i in range(3)]
    assert bad_data(tmp_path / "run", "a first question longer than --max-tokens 100") == [
        f"{conversations}, long", f"{conversations}, few signs of many tokens"]


def test_validation_has_images_of_its_own_each_once(talk, tmp_path):
    """LLaVA asks about an image several times: neighbours that lend each other their images need two."""
    again = [llava(f"again{i}", f"{i}.png", "Is it red?", "No.") for i in range(24)]
    conversations = write_conversations(tmp_path, more=again)
    _, samples, held_out, _, said = read((talk[0], conversations))
    seen, held = samples.sets[0].files(), held_out.sets[0].files()
    assert len(held) == len(held_out.sets[0]) == 2 and not set(seen) & set(held)
    assert len(samples.sets[0]) == 44 and "validation: 2 images of" in said
    _, samples, held_out, *_ = read((talk[0], conversations), "--val", talk[1])
    assert (len(samples.sets[0]), len(held_out.sets[0])) == (48, 6)


def test_sets_are_mixed_by_weight_and_captions_get_an_instruction(talk, tmp_path):
    """cc_sbu_align as downloaded, named by its folder, beside LLaVA's."""
    (tmp_path / "cc_sbu_align" / "image").mkdir(parents=True)
    notes = []
    for i in range(8):
        Image.new("RGB", (30, 30), "red").save(tmp_path / "cc_sbu_align" / "image" / f"{i}.jpg")
        notes.append({"image_id": str(i), "caption": "It is red."})
    (tmp_path / "cc_sbu_align" / "filter_cap.json").write_text(json.dumps({"annotations": notes}))
    (tmp_path / "cc_sbu_align" / "._filter_cap.json").write_text("macOS's")
    more = ["--instruct", f"{tmp_path / 'cc_sbu_align'}:3", "--val", str(talk[1])]
    method, samples, _, weights, _ = read((talk[0], f"{talk[1]}:1"), *more)
    assert weights == [1.0, 3.0] and [items.name for items in samples.sets] == ["talk", "cc_sbu_align"]
    prompts = [samples[position, 24]["prompt"] for position in range(40)]
    texts = [method.tok.encoder.decode([id for id in prompt if id >= 0]) for prompt in prompts]
    assert {asked for asked in finetune.INSTRUCTIONS if any(asked in text for text in texts)} == set(
        finetune.INSTRUCTIONS)
    args = finetune.parse_arguments(command((talk[0], f"{talk[1]}:1"), tmp_path / "run", *more))
    with contextlib.ExitStack() as held:
        _, job, _ = finetune.set_up(args, finetune.find(args, held), None)
    assert (job.order >= 24).mean() == pytest.approx(0.75, abs=0.05)


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("change, says", [
    (["--template", "vicuna-v1.1"], None),
    (["--instruct", "nowhere.json"], "nowhere.json: there is no such file"),
    (["--llm", "opt-125m"], "--llm is not for --instruct"),
    (["--rows", "3"], "--rows is not for --instruct"),
    (["--memvp", "scienceqa=x"], "one of --instruct and --memvp"),
    (["--val", "nowhere.json"], "nowhere.json: there is no such file"),
    (["--cache", "cache"], "--cache is for --trains projector: else the Q-Former trains"),
])
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(talk, tmp_path, capsys, monkeypatch, change,
                                                                  says):
    monkeypatch.setattr(language_models, "load_llm", None)
    with pytest.raises((SystemExit, TypeError)) as stop:
        finetune.main(command(talk, tmp_path / "run", *change))
    if says is None:  # goes on to load
        assert stop.type is TypeError
    else:
        assert stop.value.code == 2 and says in capsys.readouterr().err
        assert not (tmp_path / "run" / "config.json").exists()


def test_a_model_without_a_template_needs_the_option(tmp_path, talk, fails):
    mute = write_talker(tmp_path / "mute", template=None)
    fails(finetune.main, command((mute, talk[1]), tmp_path / "run"),
          "has no chat template", "--template vicuna-v0 or vicuna-v1.1")


def test_conversations_that_exceed_the_context_are_refused(talk, world, tmp_path, fails):
    """OPT has no position for a token that is one too far."""
    fails(finetune.main, command((world[0], talk[1]), tmp_path / "run", "--template", "vicuna-v0"),
          "--max-tokens 512", "64 with the", "would fit")


def test_a_folder_of_several_files_says_which_there_are(talk, tmp_path, fails):
    write_conversations(tmp_path / "two")
    write_conversations(tmp_path / "two" / "more").rename(tmp_path / "two" / "other.json")
    fails(finetune.main, command((talk[0], tmp_path / "two"), tmp_path / "run"),
          "here are: other.json, talk.json")


@pytest.mark.slow
def test_a_file_that_names_missing_pictures(talk, tmp_path, fails):
    """All of them missing: where they were looked for; some: named, and the run goes on."""
    conversations = write_conversations(tmp_path / "some")
    (tmp_path / "some" / "3.png").unlink()
    finetune.main(command((talk[0], conversations), tmp_path / "run", "--val", talk[1], "--steps", "6"))
    (missing,) = bad_data(tmp_path / "run", "unreadable image")
    assert "3.png" in missing
    for file in (tmp_path / "some").glob("*.png"):
        file.unlink()
    fails(finetune.main, command((talk[0], conversations), tmp_path / "other"), "its first images, 0.png")


# ------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(talk, tmp_path_factory):
    """A run of six steps, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune.main(command(talk, out))
    return out


@pytest.mark.slow
def test_a_run_learns_and_is_a_transfers_folder_with_a_template(talk, run):
    losses = values(run, "loss")
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert len(values(run, "val_loss_shuffled")) == 3
    config = json.loads((run / "config.json").read_text())
    assert config["model_type"] == "vpgtrans" and config["llm"]["name"] == str(talk[0])
    template = data.load_chat_template(talk[0])
    assert config["chat_template"] == transfer.describe_template(template)
    before, after = load_file(talk[0] / "model.safetensors"), load_file(run / "model.safetensors")
    assert {name.split(".")[0] for name in after} == {"vision_model", "query_tokens", "qformer",
                                                      "language_projection"}
    assert not any(torch.equal(before[name], after[name]) for name in ("query_tokens",
                                                                        "language_projection.weight"))


@pytest.mark.slow
def test_a_loaded_run_is_the_model_that_was_validated(talk, run):
    model, _, template = transfer.load_chat(str(run), dtype=torch.float32)
    _, _, held_out, *_ = read(talk)
    own = data.load_chat_template(talk[0])
    assert transfer.describe_template(template) == transfer.describe_template(own)
    matched, shuffled = loop.Validation(held_out, 2, ALONE).losses(model)
    last = rows(run, "val_loss", "val_loss_shuffled")[-1]
    assert (matched, shuffled) == pytest.approx(last, rel=1e-6)


@pytest.mark.slow
def test_a_stopped_run_continues_with_the_same_losses(talk, run, tmp_path):
    def stop(at):
        if at["step"] == 3:
            loop.stop_asked.set()

    out = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stopped:
        finetune.main(command(talk, out), watch=stop)
    assert stopped.value.code == 130
    finetune.main(command(talk, out, "--resume"))
    assert_same_losses(out, run, tolerance=0.0 + 1e-12)
    resumed, whole = load_file(out / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(talk, run, tmp_path):
    train_in(2, command(talk, tmp_path / "two"), finetune.main)
    assert_same_losses(tmp_path / "two", run)
    assert_same_losses(tmp_path / "two", run, "val_loss")


@pytest.mark.slow
def test_the_projector_alone_may_train(talk, tmp_path):
    finetune.main(command(talk, tmp_path / "run", "--trains", "projector", "--steps", "2"))
    before = load_file(talk[0] / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"language_projection.weight", "language_projection.bias"}


@pytest.mark.slow
def test_where_the_projector_alone_trains_queries_may_be_kept(talk, tmp_path, monkeypatch):
    """With the same losses; once they are there, training runs neither ViT nor Q-Former."""
    short = ["--trains", "projector", "--steps", "3"]
    cached = [*short, "--cache", str(tmp_path / "cache")]
    finetune.main(command(talk, tmp_path / "computed", *short))
    finetune.main(command(talk, tmp_path / "kept", *cached))
    assert_same_losses(tmp_path / "kept", tmp_path / "computed", tolerance=1e-6)
    assert (tmp_path / "cache" / "talk" / "00000.safetensors").exists()
    monkeypatch.setattr(finetune.cache.FeatureCache, "compute_rows", None)
    forward = vpgtrans.VisualLLM.forward
    given = set()

    def watched(self, *texts, **sees):
        given.update(sees)
        return forward(self, *texts, **sees)

    monkeypatch.setattr(vpgtrans.VisualLLM, "forward", watched)
    finetune.main(command(talk, tmp_path / "again", *cached))
    assert_same_losses(tmp_path / "again", tmp_path / "kept", tolerance=1e-12)
    assert given == {"scored", "queries"}


@pytest.mark.slow
def test_a_run_is_asked_in_its_own_template_alone(run, talk, tmp_path, fails):
    says = "was taught to converse in another chat template than vicuna-v0"
    with pytest.raises(ValueError, match=says):
        transfer.load_chat(str(run), "vicuna-v0")
    fails(finetune.main, command((run, talk[1]), tmp_path / "run", "--template", "vicuna-v0"), says)


@pytest.mark.slow
def test_commands_take_the_run_as_a_model(talk, run, tmp_path, capsys):
    """So does stage 3 itself, and the LLM and ViT stay those that the first run named."""
    picture = str(talk[1].parent / "1.png")
    sample.main([picture, "--model", str(run), "--precision", "fp32"])
    assert capsys.readouterr().out.startswith(f"{picture}: ")
    finetune.main(command((run, talk[1]), tmp_path / "again", "--steps", "1"))
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (run, tmp_path / "again"))
    assert all(first[key] == second[key] for key in ("vit", "llm", "chat_template"))
    losses = values(run, "val_loss")
    assert values(tmp_path / "again", "val_loss")[0] == pytest.approx(losses[-1], rel=1e-6)


def write_t5(folder):
    """A random T5 with its tokenizer."""
    write_kind(folder, "Unigram, bytes")
    make_model(folder, T5_CONFIG | dict(vocab_size=700))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("write_target", [write_language_model, write_t5])
def test_a_transfer_goes_on_to_stage_3(world, talk, tmp_path, write_target, monkeypatch):
    """train.py's run as it is, with a template of the command's for its LLM, which has none; and from there
    to train.py again. A T5 is not exported, which is said before weights are read."""
    target = write_target(tmp_path / "target")
    short = ["--no-warm-up", "--steps", "1"]
    train.main(arguments((world[0], target, world[2]), tmp_path / "moved", *short))
    vicuna = ["--template", "vicuna-v1.1", "--steps", "2"]
    finetune.main(command((tmp_path / "moved", talk[1]), tmp_path / "chat", *vicuna))
    model, tok, template = transfer.load_chat(str(tmp_path / "chat"), dtype=torch.float32)
    vicuna = data.TEMPLATES["vicuna-v1.1"]
    assert transfer.describe_template(template) == transfer.describe_template(vicuna)
    turns = [["What colour is it?", None]]
    assert data.chat_ids(tok, template, turns, 5) == data.chat_ids(tok, vicuna, turns, 5)
    moved, _ = transfer.load_model(str(tmp_path / "moved"), torch.float32)
    assert not torch.equal(model.projector.weight, moved.projector.weight)
    train.main(arguments((tmp_path / "chat", target, world[2]), tmp_path / "on", *short))
    if write_target is write_t5:
        monkeypatch.setattr(transfer, "load_model", None)
        with pytest.raises(ValueError, match="chat: a T5 that converses has no place for its template"):
            export.export(str(tmp_path / "chat"), tmp_path / "exported")


@pytest.mark.slow
def test_a_dry_run_needs_no_data_and_loads_no_weights(talk, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(language_models, "load_llm", None)
    nothing = command((talk[0], tmp_path / "nothing.json"), tmp_path / "run", "--dry-run", "a100")
    finetune.main(nothing)
    said = capsys.readouterr().out
    assert "taken are cc_sbu_align's amounts" in said
    assert "stage instruct: 6 steps of 4 = 24 samples" in said and "TFLOP a sample" in said
    finetune.main(command(talk, tmp_path / "run", "--dry-run", "a100"))
    assert "22 conversations" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------- exports


def run_card(folder, picture):
    """What README.md of an exported folder says, run there, about another picture. -> what it prints"""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = code.replace("cat.jpg", str(picture)).replace(f'"{folder.name}"', f'"{folder}"')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("max_new_tokens=300", "max_new_tokens=8"), "README.md", "exec"), {})
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("template", ["its own", "vicuna-v1.1", "vicuna-v0"])
def test_what_is_exported_converses_in_transformers_as_here(talk, tmp_path, template):
    """By the code of its README; and, for us, in the template that it was taught in."""
    conversations = write_conversations(tmp_path / "talk")
    model, more = talk[0], []
    if template != "its own":
        model = write_talker(tmp_path / "model", template=None)
        more = ["--template", template]
    finetune.main(command((model, conversations), tmp_path / "run", "--steps", "2", "--lr", "0.1", *more))
    export.main([str(tmp_path / "run"), str(tmp_path / "exported"), "--precision", "fp32"])
    picture = conversations.parent / "2.png"
    said = run_card(tmp_path / "exported", picture)
    for folder in ("run", "exported"):
        model, tok, found = transfer.load_chat(str(tmp_path / folder), dtype=torch.float32)
        ids, _ = data.chat_ids(tok, found, [["What is in the picture?", None]], 5)
        image = data.resize(Image.open(picture), 28)[None]
        (answer,) = model.generate(torch.tensor([ids]), images=image, stop=data.stop_ids(tok, found),
                                   max_new_tokens=8)
        assert answer and tok.decode(answer).strip() == said.strip()
    ends = json.loads((tmp_path / "exported" / "config.json").read_text())["text_config"]["eos_token_id"]
    assert ends == ([tok.encoder.token_to_id("<|im_end|>")] if template == "its own" else []) + [tok.eos_id]
