"""Facts that only a GPU can show; skipped without one. All other tests run on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._triton import has_triton

import conftest
import estimate
import loop
import train
import vpgtrans
from benchmarks import peers
from conftest import randomise, relative_error
from test_estimate import LLMS, build
from test_train import arguments, rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not conftest.HAS_GPU, reason="torch sees no GPU")]
GPU = torch.device("cuda", 0)
PROMPTS = torch.tensor([vpgtrans.IMAGE] * 32 + [2]).expand(4, -1)
TARGETS = torch.tensor([[5, 6, 7, 8, 2], [5, 9, 2, -100, -100], [11, 2, -100, -100, -100], [7, 7, 7, 7, 2]])
IMAGES = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the ViT's patch embedding, a convolution
    torch.set_float32_matmul_precision("highest")
    if conftest.VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", conftest.VISIBLE)
    has_triton.cache_clear()  # what other tests were told
    yield
    has_triton.cache_clear()


def random_model(llm):
    """A random model in which all of stage 2 trains, without dropout; with plain norms, so that what it says depends on the image."""
    model = randomise(build("cpu", llm), scale=0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.constant_(parameter, float(name.endswith("weight")))
    vpgtrans.enter_stage(model, vpgtrans.STAGES["fine-tune"])
    return model.eval()


def loss_and_gradients(model, device, precision="fp32", prompts=PROMPTS, targets=TARGETS, compiled=False):
    """-> the mean loss a token, and all gradients in one vector; with bf16, frozen weights are in bf16."""
    model = copy.deepcopy(model)
    for parameter in model.parameters() if precision == "bf16" else ():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    model = model.to(device)
    for block in [*model.vpg.layers, *model.llm.layers] if compiled else ():
        block.compile()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss, tokens = model(prompts, targets if targets.ndim == 3 else targets.to(device), images=IMAGES.to(device))
    (loss / tokens).backward()
    return (loss / tokens).item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("form", ["plain", "holes", "packed"])
def test_loss_and_gradients_are_those_of_the_cpu(llm, form):
    if form == "packed" and llm == "t5":
        pytest.skip("T5 packs no captions")
    prompts, targets = PROMPTS, TARGETS
    if form == "holes":
        prompts = torch.cat([torch.tensor([[-100, 5], [-100, -100], [5, 6], [5, -100]]), PROMPTS], dim=1)
    if form == "packed":
        targets = torch.stack([TARGETS, TARGETS.flip(0)], dim=1)
    model = random_model(llm)
    (loss, gradients), (theirs, their_gradients) = (loss_and_gradients(model, device, prompts=prompts, targets=targets) for device in (GPU, torch.device("cpu")))
    assert abs(loss - theirs) < 1e-5 * theirs and relative_error(gradients, their_gradients) < 1e-4


@pytest.mark.parametrize("llm", LLMS)
def test_bf16_is_as_near_to_float32_as_on_the_cpu(llm):
    model = random_model(llm)
    _, exact = loss_and_gradients(model, torch.device("cpu"))
    error, their_error = (relative_error(loss_and_gradients(model, device, "bf16")[1], exact) for device in (GPU, torch.device("cpu")))
    assert 0 < error < 1.5 * their_error


@pytest.mark.parametrize("llm", LLMS)
def test_compiled_blocks_compute_the_same(llm):
    model = random_model(llm)
    for T in (5, 3):
        (loss, gradients), (plain, plain_gradients) = (loss_and_gradients(model, GPU, targets=TARGETS[:, :T], compiled=c) for c in (True, False))
        assert abs(loss - plain) < 1e-5 * plain and relative_error(gradients, plain_gradients) < 1e-4


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 5}])
def test_captions_are_those_of_the_cpu(llm, options):
    model = random_model(llm)
    cpu = model.generate(PROMPTS, images=IMAGES, max_new_tokens=12, stop=((2,),), **options)
    assert len(set(map(tuple, cpu))) > 1
    assert model.to(GPU).generate(PROMPTS, images=IMAGES.to(GPU), max_new_tokens=12, stop=((2,),), **options) == cpu


@pytest.mark.parametrize("stage", ["warm-up", "fine-tune"])
def test_nothing_waits_for_the_gpu_in_a_step(stage):
    """As far as torch's sync debug mode sees it."""
    model, processes = random_model("opt").to(GPU), loop.Processes(0, 1, GPU, "bf16")
    vpgtrans.enter_stage(model, vpgtrans.STAGES[stage])
    optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(model, vpgtrans.STAGES[stage]), lr=1e-3, fused=True)
    optimizer.found_inf = torch.zeros((), device=GPU)
    micro_batches = [{"prompt_ids": PROMPTS, "target_ids": TARGETS, "images": torch.randint(256, IMAGES.shape, dtype=torch.uint8).pin_memory()}] * 2
    loop.optimizer_step(model, micro_batches, optimizer, processes, clip=0.5)  # allocates the moments
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            loop.optimizer_step(model, micro_batches, optimizer, processes, clip=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_a_run_trains_stops_and_resumes(world, tmp_path, compiled):
    command = arguments(world, tmp_path / "run", "--precision", "bf16", compiled, "--lr", "1e-2", "--steps", "40")
    step, seen = loop.optimizer_step, []

    def stop_later(*args):
        seen.append(next(args[0].parameters()).device)
        if len(seen) == 20:
            loop.stop_asked.set()
        return step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "optimizer_step", stop_later)
        train.main(command)
    train.main([*command, "--resume"])
    losses = [loss for loss, in rows(tmp_path / "run", "loss")]
    assert set(seen) == {GPU} and len(losses) == 43 and losses[-1] < losses[0] - 0.1
    assert 0 < max(peak for peak, in rows(tmp_path / "run", "peak_memory")) <= torch.cuda.max_memory_allocated()


def test_opt_6_7b_fine_tunes_on_a_card_of_24_gb():
    """Random weights at full size, captions of 32 tokens, as many samples at a time as estimate.py says."""
    card, (free, total) = 24e9, torch.cuda.mem_get_info()
    if free < card:
        pytest.skip(f"{free / 1e9:.1f} GB of GPU memory are free, 24 are needed")
    stage, T = vpgtrans.STAGES["fine-tune"], 32
    shapes = peers.build_models("opt-6.7b", torch.bfloat16, torch.device("meta"))["ours"].bfloat16()
    vpgtrans.enter_stage(shapes, stage)
    sample = lambda B, device, dtype: {"prompt_ids": PROMPTS[:1].expand(B, -1), "target_ids": torch.full((B, T), 7, device=device),
                                       "images": torch.zeros(B, 3, 224, 224, dtype=dtype, device=device)}
    B = estimate.largest_micro_batch(shapes, estimate.trace(shapes, sample(2, "meta", torch.bfloat16)), card)
    torch.cuda.set_per_process_memory_fraction(card / total)
    try:
        model = peers.build_models("opt-6.7b", torch.bfloat16, GPU)["ours"]
        vpgtrans.enter_stage(model, stage)
        optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(model, stage), lr=1e-4, fused=True)
        optimizer.found_inf = torch.zeros((), device=GPU)
        for _ in range(2):
            tokens, loss, _ = loop.optimizer_step(model, [sample(B, "cpu", torch.uint8)] * 2, optimizer, loop.Processes(0, 1, GPU, "bf16"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert B >= 8 and tokens == 2 * B * T and loss.isfinite() and optimizer.found_inf == 0
