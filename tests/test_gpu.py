"""Facts that only a GPU can show; skipped without one. All other tests run on the CPU."""

import copy

import conftest
import pytest
import torch
from conftest import FAMILIES, arguments, make_visual_llm, randomise, relative_error, values
from torch import nn
from torch.utils._triton import has_triton

import estimate
import loop
import train
import vpgtrans
from benchmarks import peers
from llm import attention, load_llm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not conftest.HAS_GPU, reason="torch sees no GPU")]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
PROMPTS = torch.tensor([vpgtrans.IMAGE] * 32 + [2]).expand(4, -1)
TARGETS = torch.tensor([
    [5, 6, 7, 8, 2],
    [5, 9, 2, -100, -100],
    [11, 2, -100, -100, -100],
    [7, 7, 7, 7, 2],
])
IMAGES = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # of the ViT's patch embedding, a convolution
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    if conftest.VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", conftest.VISIBLE)
    has_triton.cache_clear()  # what other tests were told
    yield
    has_triton.cache_clear()


def random_model(family):
    """A random model in which all of stage 2 trains, without dropout; with plain norms, so that what it says
    depends on the image."""
    model = randomise(make_visual_llm("cpu", family), scale=0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.constant_(parameter, float(name.endswith("weight")))
    vpgtrans.enter_stage(model, vpgtrans.STAGES["fine-tune"])
    return model.eval()


def new_optimizer(model, stage, lr):
    optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(model, stage), lr=lr, fused=True)
    optimizer.found_inf = torch.zeros((), device=GPU)
    return optimizer


# ------------------------------------------------------------------------------ the same as on the CPU


def loss_and_gradients(model, device, precision="fp32", prompts=PROMPTS, targets=TARGETS, compiled=False):
    """-> the mean loss a token, and all gradients in one vector; with bf16, frozen weights are in bf16."""
    model = copy.deepcopy(model)
    if precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    model = model.to(device)
    if compiled:
        for block in [*model.vpg.layers, *model.llm.layers]:
            block.compile()
    if targets.ndim == 2:  # packed ones are laid out on the CPU
        targets = targets.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss, tokens = model(prompts, targets, images=IMAGES.to(device))
    (loss / tokens).backward()
    gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad]
    return (loss / tokens).item(), torch.cat(gradients)


def assert_same(ours, theirs):
    """Of two results of loss_and_gradients."""
    loss, gradients = ours
    their_loss, their_gradients = theirs
    assert abs(loss - their_loss) < 1e-5 * their_loss
    assert relative_error(gradients, their_gradients) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["plain", "padded", "packed"])
def test_loss_and_gradients_are_those_of_the_cpu(family, form):
    if form == "packed" and family == "t5":
        pytest.skip("T5 packs no captions")
    prompts = PROMPTS
    targets = TARGETS
    if form == "padded":
        words = torch.tensor([[-100, 5], [-100, -100], [5, 6], [5, -100]])
        prompts = torch.cat([words, PROMPTS], dim=1)
    if form == "packed":
        targets = torch.stack([TARGETS, TARGETS.flip(0)], dim=1)
    model = random_model(family)
    on_gpu = loss_and_gradients(model, GPU, prompts=prompts, targets=targets)
    on_cpu = loss_and_gradients(model, CPU, prompts=prompts, targets=targets)
    assert_same(on_gpu, on_cpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_float32_as_on_the_cpu(family):
    model = random_model(family)
    _, exact = loss_and_gradients(model, CPU)
    _, on_gpu = loss_and_gradients(model, GPU, "bf16")
    _, on_cpu = loss_and_gradients(model, CPU, "bf16")
    assert 0 < relative_error(on_gpu, exact) < 1.5 * relative_error(on_cpu, exact)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("variant", ["opt", "llama-3.1", "flan-t5"])
def test_a_quantised_llm_is_the_same_as_on_the_cpu(tmp_path, variant, weights):
    """Read there, and with compiled blocks."""
    conftest.make_model(tmp_path, conftest.LLMS[variant])
    prefix = conftest.random_prefix(2, 6)
    target = conftest.random_ids(2, 5)
    gradients = []
    for device, compiled in ((CPU, False), (GPU, False), (GPU, True)):
        llm = load_llm(tmp_path, torch.float32, device, weights)
        for block in llm.layers if compiled else ():
            block.compile()
        x = prefix.to(device, copy=True).requires_grad_()
        llm.loss(x, target.to(device))[0].backward()
        gradients.append(x.grad.cpu())
    on_cpu, *on_gpu = gradients
    for gradient in on_gpu:  # a number halfway between two codes may be rounded either way
        assert relative_error(gradient, on_cpu) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_compute_the_same(family):
    model = random_model(family)
    for T in (5, 3):
        compiled = loss_and_gradients(model, GPU, targets=TARGETS[:, :T], compiled=True)
        assert_same(compiled, loss_and_gradients(model, GPU, targets=TARGETS[:, :T]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 5}], ids=["greedy", "beams"])
def test_captions_are_those_of_the_cpu(family, options):
    model = random_model(family)
    options = options | dict(max_new_tokens=12, stop=((2,),))
    on_cpu = model.generate(PROMPTS, images=IMAGES, **options)
    assert len(set(map(tuple, on_cpu))) > 1
    assert model.to(GPU).generate(PROMPTS, images=IMAGES.to(GPU), **options) == on_cpu


# ------------------------------------------------------------------------------------------- training


def test_gradients_behind_a_mask_are_finite():
    """cuDNN's are not on Hopper, where scores are this low and keys as many (pytorch issue 196678)."""
    L, hd = 192, 64
    torch.manual_seed(0)
    q = torch.randn(1, 1, L, hd, device=GPU, dtype=torch.bfloat16) * 0.1
    k = torch.randn(1, 1, L, hd, device=GPU, dtype=torch.bfloat16) * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * hd**0.5
    q.requires_grad_()
    mask = torch.ones(L, L, dtype=torch.bool, device=GPU).tril()[None, None]
    attention(q, k, torch.randn_like(k), mask).float().sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("stage", ["warm-up", "fine-tune"])
def test_nothing_waits_for_the_gpu_in_a_step(stage):
    """As far as torch's sync debug mode sees it."""
    stage = vpgtrans.STAGES[stage]
    model = random_model("opt").to(GPU)
    vpgtrans.enter_stage(model, stage)
    optimizer = new_optimizer(model, stage, lr=1e-3)
    processes = loop.Processes(0, 1, GPU, "bf16")
    images = torch.randint(256, IMAGES.shape, dtype=torch.uint8).pin_memory()
    batch = {"prompt_ids": PROMPTS, "target_ids": TARGETS, "images": images}
    scored = torch.arange(TARGETS.shape[1]).expand_as(TARGETS) > 0  # as of a conversation's answers
    micro_batches = [batch, batch | {"scored": scored.pin_memory()}]
    loop.optimizer_step(model, micro_batches, optimizer, processes, clip=0.5)  # allocates the moments
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            loop.optimizer_step(model, micro_batches, optimizer, processes, clip=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_a_run_trains_stops_and_resumes(world, tmp_path, compiled):
    out = tmp_path / "run"
    argv = arguments(world, out, "--precision", "bf16", compiled, "--lr", "1e-2", "--steps", "40")
    step = loop.optimizer_step
    devices = []

    def stop_later(model, *rest):
        devices.append(next(model.parameters()).device)
        if len(devices) == 20:
            loop.stop_asked.set()
        return step(model, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "optimizer_step", stop_later)
        train.main(argv)
    train.main([*argv, "--resume"])
    assert set(devices) == {GPU}
    losses = values(out, "loss")
    assert len(losses) == 43
    assert losses[-1] < losses[0] - 0.1
    assert 0 < max(values(out, "peak_memory")) <= torch.cuda.max_memory_allocated()


def blank_batch(B, T, device, dtype):
    """A batch for images of 224 pixels and captions of T tokens."""
    return {
        "prompt_ids": PROMPTS[:1].expand(B, -1),
        "target_ids": torch.full((B, T), 7, device=device),
        "images": torch.zeros(B, 3, 224, 224, dtype=dtype, device=device),
    }


def test_opt_6_7b_fine_tunes_on_a_card_of_24_gb():
    """Random weights at full size, captions of 32 tokens, as many samples at a time as estimate.py says."""
    card = 24e9
    free, total = torch.cuda.mem_get_info()
    if free < card:
        pytest.skip(f"{free / 1e9:.1f} GB of GPU memory are free, 24 are needed")
    stage = vpgtrans.STAGES["fine-tune"]
    T = 32
    shapes = peers.build_models("opt-6.7b", torch.bfloat16, torch.device("meta"))["ours"].bfloat16()
    vpgtrans.enter_stage(shapes, stage)
    step = estimate.trace(shapes, blank_batch(2, T, "meta", torch.bfloat16))
    B = estimate.largest_micro_batch(shapes, step, card)
    assert B >= 8
    torch.cuda.set_per_process_memory_fraction(card / total)
    try:
        model = peers.build_models("opt-6.7b", torch.bfloat16, GPU)["ours"]
        vpgtrans.enter_stage(model, stage)
        optimizer = new_optimizer(model, stage, lr=1e-4)
        processes = loop.Processes(0, 1, GPU, "bf16")
        micro_batches = [blank_batch(B, T, "cpu", torch.uint8)] * 2
        for _ in range(2):
            tokens, loss, _ = loop.optimizer_step(model, micro_batches, optimizer, processes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tokens == 2 * B * T
    assert loss.isfinite()
    assert optimizer.found_inf == 0
