"""Facts about estimate.py: what it counts without weights is what a real step does."""

import pytest
import torch
from torch import nn

import bench
import pairs
import estimate
import llm as language_models
import loop
import qformer
import train
import transfer
import vpgtrans
from conftest import write_source, write_target


LLMS = {"opt": dict(model_type="opt", hidden_size=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=128, vocab_size=1000),
        "llama": dict(model_type="llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000),
        "t5": dict(model_type="t5", d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, vocab_size=1000, feed_forward_proj="gated-gelu")}


def build(device, llm="opt"):
    vit = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=7)
    former = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, encoder_hidden_size=96)
    with torch.device(device):
        vpg = qformer.VPG({"vision_config": vit, "qformer_config": former})
        llm = language_models.ARCHITECTURES[llm](LLMS[llm])
        return vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm).to(device)


def inputs(model, device, B=2, T=14):
    return {"prompt_ids": torch.tensor([vpgtrans.IMAGE] * 32 + [2]).expand(B, -1), "target_ids": torch.full((B, T), 7, device=device),
            "images": torch.zeros(B, 3, 56, 56, device=device)}


@pytest.mark.parametrize("name", vpgtrans.STAGES)
def test_operations_are_those_of_the_formulas(name):
    """bench.py counts them by hand, from parameters and tokens."""
    model, stage = build("meta"), vpgtrans.STAGES[name]
    vpgtrans.enter_stage(model, stage)
    step = estimate.trace(model, inputs(model, "meta"))
    assert abs(step.operations / (bench.step_flops(model, stage, 2, 14) / 2) - 1) < 0.04  # they count half of a causal attention
    assert step.logits == 4 * 1000 * 14


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("name", ["warm-up", "fine-tune"])
def test_what_is_kept_is_what_a_real_step_keeps(name, llm):
    """On the CPU attention is written out, as it is on the meta device, so that they keep the same up to details of it."""
    kept = []
    for device in ("meta", "cpu"):
        torch.manual_seed(0)
        model = build(device, llm)
        vpgtrans.enter_stage(model, vpgtrans.STAGES[name])
        kept.append(estimate.trace(model, inputs(model, device)).kept)
    assert 0.8 < kept[0] / kept[1] < 1.25
    model = build("meta", llm)
    vpgtrans.enter_stage(model, vpgtrans.STAGES[name])
    assert 0.98 < estimate.trace(model, inputs(model, "meta", B=8)).kept / kept[0] <= 1  # per sample: weights are not among it


def test_memory_is_weights_gradients_and_moments():
    model = build("meta").bfloat16()
    vpgtrans.enter_stage(model, vpgtrans.STAGES["fine-tune"])
    count = lambda trains: sum(p.numel() for p in model.parameters() if p.requires_grad == trains)
    step = estimate.Step(operations=2e9, kept=5e6, logits=1e6)
    assert list(estimate.memory(model, step, 3).values()) == [2 * count(False), 18 * count(True), 15e6, 7.5e6]
    assert list(estimate.memory(model, step, 3, world=8).values())[1] == 22 * count(True)
    assert list(estimate.memory(model.float(), step, 3).values())[:2] == [4 * count(False), 16 * count(True)]
    assert list(estimate.memory(model, step, 10**6).values())[3] == 3 * 2**28  # a block of logits is all there is


def test_hours_are_those_of_all_cards(monkeypatch):
    monkeypatch.setattr(estimate, "trace", lambda model, step: step)  # batches stand for what they need
    model, step = build("meta"), estimate.Step(operations=2e12, kept=5e6, logits=1e6)
    longer = estimate.Step(operations=9e12, kept=5e6, logits=1e6)
    first, *_ = estimate.report(model, longer, step, samples=36_000_000, machine=("card", None, 1e13), micro_batch=4, world=8)
    assert first.strip() == "2 TFLOP a sample, 72,000.0 PFLOP in all: 250.0 hours on 8 x card, 2,000.0 hours of one"


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    model = build("meta")
    vpgtrans.enter_stage(model, vpgtrans.STAGES["fine-tune"])
    step = estimate.trace(model, inputs(model, "meta"))
    total = lambda n, world=1: sum(estimate.memory(model, step, n, world).values())
    for capacity in (2e8, 1e9):
        most = estimate.largest_micro_batch(model, step, capacity, 10**9)
        assert total(most) <= 0.9 * capacity < total(most + 1) or step.logits * most > 2**28
    assert estimate.largest_micro_batch(model, step, 1e9, most=3) == 3 and total(3, world=2) > total(3)
    with pytest.raises(ValueError, match="GPU memory"):
        estimate.largest_micro_batch(model, step, 1e6)


def test_a_dry_run_reads_no_weights(world, tmp_path, capsys):
    write_source(tmp_path / "source"), write_target(tmp_path / "target")
    for folder in ("source", "target"):
        (tmp_path / folder / "model.safetensors").unlink()
    argv = ["--src", str(tmp_path / "source"), "--tgt", str(tmp_path / "target"), "--data", str(world[2]), "--out", str(tmp_path / "out"), "--batch-size", "4"]
    for card in ("h100", "", "no-card"):
        try:
            train.main([*argv, "--dry-run", card])
        except SystemExit as stop:
            assert card == "no-card" and stop.code == 2 and "rtx-4090" in capsys.readouterr().err
            continue
        said = capsys.readouterr().out
        assert "stage warm-up: 5 steps of 4" in said and "stage fine-tune: 55 steps" in said and said.count("TFLOP a sample") == 2
        assert said.count("  projector ") == 2 and ("any micro-batch would fit" in said) == (card == "h100") and "are free on that disk" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_without_data_takes_the_papers_amounts(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VPGTRANS_DATA", str(tmp_path))
    train.main(["--src", str(world[0]), "--tgt", str(world[1]), "--dry-run", "a100"])
    said = capsys.readouterr().out
    assert "the paper's amounts" in said and "810 steps of 1,728" in said and "7,500 steps of 1,728 = 12,960,000 samples" in said


def test_on_a_gpu_the_micro_batch_follows_from_its_memory(world, monkeypatch):
    args = train.parse_arguments(["--src", str(world[0]), "--tgt", str(world[1]), "--data", str(world[2])])
    stages = train.choose_stages(args)
    folder, tok = transfer.find_tokenizer(args.tgt)
    src, tgt = transfer.find_models(args.src, args.tgt, folder)
    sets = {name: ([pairs.read_pairs(str(world[2]))], None) for name in stages}
    shapes = transfer.shape_model(args, src, tgt)
    gpu, cpu = (loop.Processes(0, 1, torch.device(device), "bf16") for device in ("cuda", "cpu"))

    def chosen(processes, size, stages=stages):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size))
        return train.choose_micro_batch(args, stages, train.Found(processes, src, tgt, tok, shapes, sets))

    assert chosen(gpu, 24e9) == 36 == chosen(cpu, 1)
    both = chosen(gpu, 6e6)
    alone = [chosen(gpu, 6e6, {name: stage}) for name, stage in stages.items()]
    assert 1 <= both == min(alone) < max(alone)
    args.micro_batch = 5
    assert chosen(gpu, 24e9) == 5
