"""Facts about --shard: processes that share the frozen blocks do what one does that has all of them."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import (
    LLMS,
    ROOT,
    T5_CONFIG,
    arguments,
    assert_same_losses,
    edit_config,
    edit_tensors,
    make_model,
    python,
    read_lines,
    rows,
    stop_at,
    torchrun,
    values,
    write_kind,
    write_language_model,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import estimate
import finetune
import loop
import train
import vpgtrans

# ------------------------------------------------------------------------------- in several processes

LLM_VARIANTS = {  # a width that two do not share evenly; project_in and out; tied head and word embeddings
    "odd": LLMS["smollm2"] | dict(intermediate_size=47),
    "opt-350m": LLMS["opt-350m"],
    "t5": LLMS["t5, tied"],
}
# of five samples, two at a time, one process has two micro-batches and the other one; the first alone has
# images of validation
LENGTH = ["--batch-size", 5, "--micro-batch", 2, "--warm-up-steps", 2, "--steps", 20, "--val-every", 10]
FINE_TUNING = ["--batch-size", 5, "--micro-batch", 2, "--steps", 10, "--lr", 1e-2, "--val-samples", 6,
               "--log-every", 1, "--workers", 0, "--precision", "fp32"]


def write_packed(pairs, folder):
    """Two captions an image, and a benchmark of three of the images."""
    lines = read_lines(pairs)
    for line in lines:
        line["image"] = str(pairs.parent / line["image"])
        line["caption"] = [line["caption"], "a square"]
    (folder / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "coco_karpathy_val.json").write_text(json.dumps(lines[:3]))
    return folder / "two.jsonl", folder / "coco_karpathy_val.json"


def write_conversations(pairs, folder):
    talks = []
    for i, line in enumerate(read_lines(pairs)):
        said = [("human", "<image>\nWhat is it?"), ("gpt", line["caption"]), ("human", "Sure?"), ("gpt", "Yes.")]
        turns = [{"from": who, "value": text} for who, text in said[: 2 + 2 * (i % 2)]]
        image = str(pairs.parent / line["image"])
        talks.append({"id": str(i), "image": image, "conversations": turns})
    (folder / "talk.json").write_text(json.dumps(talks))
    return folder / "talk.json"


@pytest.fixture(scope="module")
def commands(world, memvp_world, chat_models, tmp_path_factory):
    """{name: [command, arguments but for --out]}"""
    folder = tmp_path_factory.mktemp("shard")
    source, target, pairs = world
    two, coco = write_packed(pairs, folder)
    clip, llm, questions = memvp_world
    t5 = write_kind(folder / "t5", "Unigram")
    make_model(t5, T5_CONFIG | dict(vocab_size=800))
    llama = write_language_model(folder / "llama")
    some = ["--captions", "packed", "--init", "captions", "--score", f"coco={coco}"]
    talker, _ = chat_models["llama"]
    found = {
        "packed": ["train", *arguments((source, target, two), "", *LENGTH, *some)],
        "llama": ["train", *arguments((source, llama, pairs), "", *LENGTH)],
        "t5": ["train", *arguments((source, t5, pairs), "", *LENGTH)],
        "memvp": ["finetune", "--llm", llm, "--vit", clip, "--memvp", f"scienceqa={questions}", *FINE_TUNING],
        "instruct": ["finetune", "--model", talker, "--instruct", write_conversations(pairs, folder),
                     *FINE_TUNING],
    }
    return {name: [str(word) for word in words if word not in ("", "--out")] for name, words in found.items()}


def run_sharded(file, jobs):
    """Jobs of sharded.py in two processes, whose memory goes back when it is freed."""
    file.write_text(json.dumps(jobs, default=str))
    variables = dict(PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536")
    done = python(*torchrun(2), ROOT / "tests" / "sharded.py", file, **variables)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def both(commands, world, tmp_path_factory):
    """A folder of runs by one process, alone/NAME, and by two with --shard, sharded/NAME; of "llama" these
    are halves: "begun" was begun by the one and ended by the two, "ended" the other way round."""
    folder = tmp_path_factory.mktemp("both")
    alone, sharded = folder / "alone", folder / "sharded"
    jobs = [["vit", world[0]]]
    for name, options in LLM_VARIANTS.items():
        make_model(folder / name, options)
        jobs.append(["llm", folder / name])
    large = LLMS["llama-1"] | dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    make_model(folder / "large", large)
    edit_tensors(folder / "large", lambda tensors: {name: x.bfloat16() for name, x in tensors.items()})
    jobs.append(["loading", folder / "large"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", lambda x, *_, **__: x)
        for name, (command, *argv) in commands.items():
            {"train": train, "finetune": finetune}[command].main([*argv, "--out", str(alone / name)])
            if name != "llama":
                jobs.append(["run", command, [*argv, "--out", sharded / name, "--shard"]])
        command, *argv = commands["llama"]
        stop_at("fine-tune", 5, [*argv, "--out", str(folder / "begun")])
        jobs.append(["run", command, [*argv, "--out", folder / "begun", "--resume", "--shard", "all"]])
        jobs.append(["run", command, [*argv, "--out", folder / "ended", "--shard"], ["fine-tune", 5]])
        run_sharded(folder / "jobs.json", jobs)
        train.main([*argv, "--out", str(folder / "ended"), "--resume"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "t5", "memvp", "instruct"])
def test_sharded_runs_have_the_losses_scores_and_files_of_one_process(both, name):
    alone, sharded = both / "alone" / name, both / "sharded" / name
    for key in ("loss", "val_loss", "val_loss_shuffled"):
        assert_same_losses(alone, sharded, key)
    assert values(sharded, "scores") == values(alone, "scores")
    assert {file.name for file in sharded.iterdir()} == {file.name for file in alone.iterdir()}
    for file in ("model.safetensors", "resume.safetensors"):
        ours, theirs = load_file(sharded / file), load_file(alone / file)
        assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    configs = [json.loads((out / "config.json").read_text()) for out in (alone, sharded)]
    assert [configs[0][part] for part in ("vit", "llm")] == [configs[1][part] for part in ("vit", "llm")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["begun", "ended"])
def test_a_run_goes_on_with_and_without_it(both, name):
    for key in ("loss", "val_loss"):
        assert_same_losses(both / "alone" / "llama", both / name, key)
