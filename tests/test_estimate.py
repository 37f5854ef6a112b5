"""Facts about estimate.py: what it counts without weights is what a real step does."""

import pytest
import torch
from conftest import FAMILIES, make_visual_llm, write_source, write_target

import estimate
import loop
import pairs
import train
import transfer
import vpgtrans
from benchmarks import training


def inputs(device, B=2, T=14):
    return {
        "prompt_ids": torch.tensor([vpgtrans.IMAGE] * 32 + [2]).expand(B, -1),
        "target_ids": torch.full((B, T), 7, device=device),
        "images": torch.zeros(B, 3, 56, 56, device=device),
    }


def make_model(stage, device="meta", family="opt"):
    """A model as a stage trains it."""
    model = make_visual_llm(device, family)
    vpgtrans.enter_stage(model, vpgtrans.STAGES[stage])
    return model


def trace(model, device="meta", **size):
    return estimate.trace(model, inputs(device, **size))


# ----------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("stage", vpgtrans.STAGES)
def test_operations_are_those_of_the_formulas(stage):
    """The benchmarks count them by hand, from parameters and tokens."""
    model = make_model(stage)
    step = trace(model)
    by_hand = training.step_flops(model, vpgtrans.STAGES[stage], 2, 14) / 2
    assert abs(step.operations / by_hand - 1) < 0.04  # they count half of a causal attention
    assert step.logits == 4 * 1000 * 14


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["warm-up", "fine-tune"])
def test_what_is_kept_is_what_a_real_step_keeps(stage, family):
    """On the CPU attention is written out, as it is on the meta device, so that they keep the same up to
    details of it."""
    expected = trace(make_model(stage, "meta", family)).kept
    real = trace(make_model(stage, "cpu", family), "cpu").kept
    assert 0.8 < expected / real < 1.25
    eight = trace(make_model(stage, "meta", family), B=8).kept
    assert 0.98 < eight / expected <= 1  # per sample: weights are not among it


def test_memory_is_weights_gradients_and_moments():
    model = make_model("fine-tune").bfloat16()
    step = estimate.Step(operations=2e9, kept=5e6, logits=1e6)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def needs(micro_batch=3, world=1):
        return list(estimate.memory(model, step, micro_batch, world).values())

    assert needs() == [2 * frozen, 18 * trained, 15e6, 7.5e6]
    assert needs(world=8)[1] == 22 * trained
    assert needs(micro_batch=10**6)[3] == 3 * 2**28  # a block of logits is all there is
    model.float()
    assert needs()[:2] == [4 * frozen, 16 * trained]


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    model = make_model("fine-tune")
    step = trace(model)

    def total(micro_batch, world=1):
        return sum(estimate.memory(model, step, micro_batch, world).values())

    for capacity in (2e8, 1e9):
        most = estimate.largest_micro_batch(model, step, capacity, 10**9)
        assert total(most) <= 0.9 * capacity
        assert 0.9 * capacity < total(most + 1) or step.logits * most > 2**28
    assert estimate.largest_micro_batch(model, step, 1e9, most=3) == 3
    assert total(3, world=2) > total(3)
    with pytest.raises(ValueError, match="GPU memory"):
        estimate.largest_micro_batch(model, step, 1e6)


def test_hours_are_those_of_all_cards(monkeypatch):
    monkeypatch.setattr(estimate, "trace", lambda model, step: step)  # batches stand for what they need
    typical = estimate.Step(operations=2e12, kept=5e6, logits=1e6)
    longest = estimate.Step(operations=9e12, kept=5e6, logits=1e6)
    machine = ("card", None, 1e13)
    hours, *_ = estimate.report(make_visual_llm("meta"), longest, typical, samples=36_000_000,
                                machine=machine, micro_batch=4, world=8)
    assert hours.strip() == ("2 TFLOP a sample, 72,000.0 PFLOP in all: 250.0 hours on 8 x card, "
                             "2,000.0 hours of one")


# --------------------------------------------------------------------------- of a run of train.py


@pytest.fixture
def without_weights(tmp_path, world):
    """Arguments of train.py for models whose weights are not there."""
    write_source(tmp_path / "source")
    write_target(tmp_path / "target")
    for folder in ("source", "target"):
        (tmp_path / folder / "model.safetensors").unlink()
    models = ["--src", str(tmp_path / "source"), "--tgt", str(tmp_path / "target")]
    return [*models, "--data", str(world[2]), "--batch-size", "4", "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("card", ["h100", ""])
def test_a_dry_run_reads_no_weights(without_weights, tmp_path, capsys, card):
    train.main([*without_weights, "--dry-run", card])
    said = capsys.readouterr().out
    assert "stage warm-up: 5 steps of 4" in said
    assert "stage fine-tune: 55 steps" in said
    assert said.count("TFLOP a sample") == 2
    assert said.count("  projector ") == 2
    assert ("any micro-batch would fit" in said) == (card == "h100")
    assert "are free on that disk" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_for_an_unknown_card_names_those_that_are_known(without_weights, refused):
    refused(train.main, [*without_weights, "--dry-run", "no-card"], "rtx-4090")


def test_a_dry_run_without_data_takes_the_papers_amounts(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VPGTRANS_DATA", str(tmp_path))
    train.main(["--src", str(world[0]), "--tgt", str(world[1]), "--dry-run", "a100"])
    said = capsys.readouterr().out
    assert "the paper's amounts" in said
    assert "810 steps of 1,728" in said
    assert "7,500 steps of 1,728 = 12,960,000 samples" in said


@pytest.mark.slow
def test_on_a_gpu_the_micro_batch_follows_from_its_memory(world, monkeypatch):
    args = train.parse_arguments(["--src", str(world[0]), "--tgt", str(world[1]), "--data", str(world[2])])
    stages = train.choose_stages(args)
    tokenizer, tok = transfer.find_tokenizer(args.tgt)
    src, tgt = transfer.find_models(args.src, args.tgt, tokenizer)
    shapes = transfer.shape_model(args, src, tgt)
    sets = {name: ([pairs.read_pairs(str(world[2]))], None) for name in stages}

    def chosen(size, device="cuda", stages=stages):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size))
        processes = loop.Processes(0, 1, torch.device(device), "bf16")
        found = train.Found(processes, src, tgt, tok, shapes, sets)
        return train.choose_micro_batch(args, stages, found)

    assert chosen(24e9) == 36
    assert chosen(1, device="cpu") == 36
    both = chosen(6e6)
    alone = [chosen(6e6, stages={name: stage}) for name, stage in stages.items()]
    assert 1 <= both == min(alone) < max(alone)
    args.micro_batch = 5
    assert chosen(24e9) == 5
