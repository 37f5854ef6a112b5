"""Facts about --shard: processes that share the frozen blocks do what one does that has all of them."""

import ctypes
import datetime
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    FAMILIES,
    LLMS,
    T5_CONFIG,
    arguments,
    assert_same_losses,
    edit_config,
    edit_tensors,
    make_model,
    make_visual_llm,
    read_lines,
    stop_at,
    train_in,
    values,
    write_kind,
    write_language_model,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import estimate
import finetune
import hub
import llm as language_models
import loop
import qformer
import train
import transfer
import vpgtrans

COMMANDS = {"train": train, "finetune": finetune}
LLM_VARIANTS = {  # a width that two do not share evenly; project_in and out; tied head and word embeddings
    "odd": LLMS["smollm2"] | dict(intermediate_size=47),
    "opt-350m": LLMS["opt-350m"],
    "t5": LLMS["t5, tied"],
}
# of five samples, two at a time, one process has two micro-batches and the other one; the first alone has
# images of validation
LENGTH = ["--batch-size", 5, "--micro-batch", 2, "--warm-up-steps", 2, "--steps", 20, "--val-every", 10]
FINE_TUNING = ["--batch-size", 5, "--micro-batch", 2, "--steps", 10, "--lr", 1e-2, "--val-samples", 6,
               "--val-every", 5, "--log-every", 1, "--workers", 0, "--precision", "fp32"]


def write_packed(pairs, folder):
    """Two captions an image, and a benchmark of five of the images."""
    lines = read_lines(pairs)
    for line in lines:
        line["image"] = str(pairs.parent / line["image"])
        line["caption"] = [line["caption"], "a square"]
    (folder / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "coco_karpathy_val.json").write_text(json.dumps(lines[:5]))
    return folder / "two.jsonl", folder / "coco_karpathy_val.json"


def write_conversations(pairs, folder):
    talks = []
    for i, line in enumerate(read_lines(pairs)):
        said = [("human", "<image>\nWhat is it?"), ("gpt", line["caption"])]
        said += [("human", "Sure?"), ("gpt", "Yes.")] * (i % 2)
        turns = [{"from": who, "value": text} for who, text in said]
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


# -------------------------------------------------------------------- what each of two processes does


def touched():
    """Bytes of files and of its own that this process has in memory (Linux)."""
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith(("RssAnon:", "RssFile:"))]
    return sum(int(size) for _, size, _ in lines) * 1024


def check_rows(model, blocks, mesh):
    """Of the matrices of the blocks there are this process's rows, and no others; all else is whole."""
    inside = [module for block in blocks for module in block.modules()]
    matrices = {module.weight for module in inside if isinstance(module, nn.Linear)}
    assert matrices
    for parameter in model.parameters():
        assert hasattr(parameter, "to_local") == (parameter in matrices)
    for matrix in matrices:
        share = -(-len(matrix) // mesh.size())
        left = len(matrix) - mesh.get_local_rank() * share
        assert len(matrix.to_local()) == max(0, min(share, left))


def check_llm(mesh, folder):
    """A sharded LLM answers, scores and differentiates as the whole one, whichever is first, and has its
    fingerprint. Each process has other texts, and more or fewer of them, which end earlier or later."""
    rank = dist.get_rank()
    whole = language_models.load_llm(folder, torch.float32)
    part = language_models.load_llm(folder, torch.float32, mesh=mesh)
    check_rows(part, part.layers, mesh)
    assert hub.fingerprint(part.as_read()) == hub.fingerprint(whole.as_read())
    generator = torch.Generator().manual_seed(rank)
    prefix = torch.randn(2 + rank, 6, whole.dim, generator=generator)
    target = torch.randint(3, 100, (2 + rank, 5), generator=generator)
    said = whole.generate(prefix, max_new_tokens=6, stop=((-5,),))
    assert part.generate(prefix, max_new_tokens=6, stop=((-5,),)) == said
    stop = [(ids[rank],) for ids in said]
    for beams in (1, 3):
        options = dict(num_beams=beams, max_new_tokens=6, stop=stop)
        assert part.generate(prefix, **options) == whole.generate(prefix, **options)
    losses, gradients = [], []
    for llm in (whole, part):
        x = prefix.clone().requires_grad_()
        loss, _ = llm.loss(x, target)
        loss.backward()
        losses.append(loss)
        gradients.append(x.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def check_vit(mesh, folder):
    whole = qformer.load_vpg(folder, torch.float32)
    part = qformer.load_vpg(folder, torch.float32, mesh=mesh)
    check_rows(part, part.frozen_layers, mesh)
    assert hub.fingerprint(part.frozen_parameters()) == hub.fingerprint(whole.frozen_parameters())
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(part(images), whole(images))


def check_loading(mesh, folder):
    """No process reads more than its part, half of the file; the kernel maps some pages around it."""
    size = (Path(folder) / "model.safetensors").stat().st_size
    language_models.load_llm(folder, mesh=mesh)  # what is imported and cached by then does not count
    gc.collect()
    before = touched()
    llm = language_models.load_llm(folder, mesh=mesh)
    share = (touched() - before) / size
    assert 0.4 < share < 0.75
    assert llm.mesh is mesh


def run(mesh, command, argv, stop_at=None):
    """A command; `stop_at`: [stage, step] at which it is asked to stop."""
    def watch(at):
        if [at["stage"], at["step"]] == stop_at:
            loop.stop_asked.set()

    try:
        COMMANDS[command].main(argv, watch)
    except SystemExit as end:
        assert stop_at and end.code == 130, end.code


def do(jobs):
    """Jobs, [function, argument, ...] each, in one group of processes: the commands would begin a group each,
    and there can be but one."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
    dist.init_process_group = nothing
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    mesh = loop.shard_mesh("node", dist.get_world_size(), torch.device("cpu"))
    for job, *what in jobs:
        job(mesh, *what)


def nothing(*_, **__):
    pass


def without_dropout(x, *_, **__):
    return x


# ----------------------------------------------------------------------------------- one process and two


@pytest.fixture(scope="module")
def both(commands, world, tmp_path_factory):
    """A folder of runs by one process, alone/NAME, and by two with --shard, sharded/NAME; of "llama" these
    are halves: "begun" was begun by the one and ended by the two, "ended" the other way round."""
    folder = tmp_path_factory.mktemp("both")
    alone, sharded = folder / "alone", folder / "sharded"
    jobs = [[check_vit, world[0]]]
    for name, options in LLM_VARIANTS.items():
        make_model(folder / name, options)
        jobs.append([check_llm, folder / name])
    large = LLMS["llama-1"] | dict(hidden_size=2048, intermediate_size=4096, num_hidden_layers=1)
    make_model(folder / "large", large)
    edit_tensors(folder / "large", lambda tensors: {name: x.bfloat16() for name, x in tensors.items()})
    jobs.append([check_loading, folder / "large"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", without_dropout)  # each process would draw its own
        for name, (command, *argv) in commands.items():
            COMMANDS[command].main([*argv, "--out", str(alone / name)])
            if name != "llama":
                jobs.append([run, command, [*argv, "--out", str(sharded / name), "--shard"]])
        command, *argv = commands["llama"]
        stop_at("fine-tune", 5, [*argv, "--out", str(folder / "begun")])
        jobs.append([run, command, [*argv, "--out", str(folder / "begun"), "--resume", "--shard", "all"]])
        jobs.append([run, command, [*argv, "--out", str(folder / "ended"), "--shard"], ["fine-tune", 5]])
        train_in(2, [], lambda argv: do(jobs))
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


# ------------------------------------------------------------------------------------ which processes


@pytest.mark.parametrize(("shard", "together"), [("node", [2, 3]), ("all", [0, 1, 2, 3])])
def test_processes_of_a_node_or_all_share_the_blocks(monkeypatch, shard, together):
    """The third of four, two on each node."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        mesh = loop.shard_mesh(shard, 4, torch.device("cpu"))
        assert mesh.mesh.tolist() == together
        assert mesh.get_local_rank() == together.index(2)
    finally:
        dist.destroy_process_group()


def test_a_process_alone_and_options_that_do_not_go_together_are_refused(world, tmp_path, refused, fails,
                                                                         monkeypatch, chat_models):
    argv = arguments(world, tmp_path / "run", "--shard")
    refused(train.main, argv, "--shard node", "nobody to share", "--nproc-per-node", "--llm-weights")
    refused(train.main, [*argv, "--llm-weights", "nf4"], "--llm-weights: not allowed with argument --shard")
    refused(train.main, [*argv, "--cache", str(tmp_path)], "--cache and --shard exclude each other")
    refused(train.main, [*argv, "--dry-run", "a100"], "--dry-run 8xa100")
    memvp = ["--llm", "a", "--vit", "b", "--memvp", "scienceqa=c", "--adapters", "0"]
    fails(finetune.main, [*memvp, "--cache", "d", "--shard"], "--cache and --shard exclude each other")
    talker = tmp_path / "talker"
    shutil.copytree(chat_models["llama"][0], talker)
    edit_config(talker, arguments={"llm_weights": "nf4"})
    instruct = ["--model", talker, "--instruct", "talk.json", "--shard", "--dry-run", "8xa100"]
    fails(finetune.main, instruct, "trained beside an LLM in nf4", "leave --shard out")
    with pytest.raises(ValueError, match="quantised weights cannot be sharded"):
        language_models.load_llm(world[1], weights="int8", mesh="any")


# ------------------------------------------------------------------------------------------ dry runs


@pytest.mark.slow
def test_a_dry_run_counts_the_cards_and_what_they_share(world, tmp_path, capsys):
    argv = arguments(world, tmp_path / "run", "--shard", "--dry-run")
    train.main([*argv, "4xa100"])
    said = capsys.readouterr().out
    assert "on 4 x a100" in said
    assert said.count("gathered blocks") == 2  # stages
    train.main([*argv[:-2], "--dry-run", "4xa100"])
    said = capsys.readouterr().out
    assert "on 4 x a100" in said
    assert "gathered blocks" not in said


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_bytes_are_those_that_fsdp_keeps(family, shards):
    """As the first of so many processes has them, with the rows that even the shares out."""
    model = make_visual_llm("meta", family).requires_grad_(False)
    step = estimate.Step(operations=1e9, kept=1e6, logits=1e6)
    whole = estimate.memory(model, step, 2)
    needs = estimate.memory(model, step, 2, world=shards, shards=shards)
    largest = max(sum(x.weight.nbytes for x in block.modules() if isinstance(x, nn.Linear))
                  for block in model.frozen_layers)
    assert needs["gathered blocks"] == 3 * largest
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    try:
        mesh = loop.shard_mesh("all", shards, torch.device("cpu"))
        language_models.shard_blocks(model.llm, model.llm.layers, mesh)
        qformer.shard_blocks(model.vpg.vision_model, model.vpg.frozen_layers, mesh)
    finally:
        dist.destroy_process_group()
    assert transfer.size_of(model) == needs["frozen weights"] < whole["frozen weights"]


def test_a_card_too_small_names_more_cards():
    model = make_visual_llm("meta").requires_grad_(False)
    step = estimate.Step(operations=1e12, kept=1e9, logits=1e6)
    with pytest.raises(ValueError, match="--llm-weights int8 or nf4, --shard over several GPUs"):
        estimate.largest_micro_batch(model, step, 1e6)
    with pytest.raises(ValueError, match="--shard over more GPUs, or --llm-weights int8 or nf4 in its place"):
        estimate.largest_micro_batch(model, step, 1e6, shards=2)


# --------------------------------------------------------------------------------------- keeping in step


def test_a_batch_without_targets_counts_nothing_and_reaches_all_that_trains():
    for family, packed in (("opt", True), ("opt", False), ("t5", False)):
        model = make_visual_llm("cpu", family)
        vpgtrans.enter_stage(model, vpgtrans.STAGES["fine-tune"])
        targets = torch.randint(3, 99, (2, 3, 5) if packed else (2, 5))
        batch = {"prompt_ids": torch.tensor([[vpgtrans.IMAGE] * 32 + [2]] * 2), "target_ids": targets,
                 "images": torch.zeros(2, 3, 56, 56, dtype=torch.uint8), "files": ["a", "b"], "bad": ["c"],
                 "twins": {"a": "d"}}
        if not packed:
            batch["scored"] = torch.ones(2, 5, dtype=torch.bool)
        nothing = data.without_targets(batch)
        assert data.count_targets(nothing) == 0
        assert not any(nothing[what] for what in ("files", "bad", "twins"))
        assert data.count_targets(batch) == targets.numel()
        says = {name: nothing[name] for name in ("scored", "images") if name in nothing}
        loss, tokens = model(nothing["prompt_ids"], nothing["target_ids"], **says)
        assert loss == tokens == 0
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
