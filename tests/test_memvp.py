"""Facts about memvp.py: the identities of MemVP (arXiv 2405.05615), in float64, on small models with every
tensor random; the counts are those of the authors' code, less what it never uses."""

import copy
import inspect

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import make_llm_pair, random_ids, random_prefix, relative_error, write_clip, write_source
from torch.utils.flop_counter import FlopCounterMode

import memvp
import qformer
import vpgtrans
from benchmarks.memory import AnewEachLayer
from llm import LLaMA
from memvp import PADDING, AdaptedViT, InputPromptLLM, MemoryLLM, MemoryRead, VisualMemory
from qformer import load_vit, load_vpg

HAS_IMAGE = torch.tensor([True, False, True])
ROWS = 20  # four more than the ViT has patches


def randomise_trained(module, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return module


def random_memory(width=48, dim=32, **options):
    memory = VisualMemory(width, dim, rows=ROWS, hidden=8, image_scale=0.5, scale=0.7, **options)
    return randomise_trained(memory.double()).eval()


def random_images(B=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (B, 3, 28, 28), generator=generator, dtype=torch.uint8)


def random_prompts():
    """(3,6) ids, with padding on the left of row 1 and 2."""
    prompts = random_ids(3, 6)
    prompts[1, :2] = PADDING
    prompts[2, :1] = PADDING
    return prompts


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(transformers' CLIP in float64, its folder)"""
    folder = tmp_path_factory.mktemp("clip")
    return write_clip(folder).double(), folder


def make_adapted(folder, **options):
    vit = load_vit(folder, dtype=torch.float64, layers=2)  # of three, as the paper reads 23 of 24
    return AdaptedViT(vit, **options).double().eval()


@pytest.fixture(scope="module", params=["opt", "llama-3.1", "flan-t5"])
def model(request, clip, tmp_path_factory):
    """A MemoryLLM in float64, every tensor random; what MemVP trains has gradients."""
    llm, _, _ = make_llm_pair(tmp_path_factory.mktemp("llm"), request.param)
    adapted = make_adapted(clip[1])
    randomise_trained(adapted.adapters)
    return MemoryLLM(adapted, random_memory(), llm.double())


def fresh(model):
    """The same model, with what trains as it begins."""
    new = copy.deepcopy(model)
    torch.manual_seed(0)
    new.vit = AdaptedViT(new.vit.vit).double().eval()
    new.memory = VisualMemory(48, 32, rows=ROWS).double().eval()
    return new


@torch.no_grad()
def logits_of(model, prompts, targets, **sees):
    prefix, mask, memory = model.reads(prompts, **sees)
    return model.llm(prefix, targets, mask, memory)


@torch.no_grad()
def plain_logits(model, prompts, targets):
    prefix = model.embed(prompts)
    return model.llm(prefix, targets, model.mask(prompts != PADDING))


# --------------------------------------------------------------------------------------- the memory


def test_the_read_is_the_papers_sum():
    """s act(h K^T) V with K = P + E1 and V = P + E2, P padded by zero rows, written out for one row."""
    memory = random_memory()
    features = random_prefix(2, 16, 48).double()
    h = random_prefix(2, 5).double()
    read = memory(features, torch.tensor([True, False]))(h, F.silu)
    first, _, second = memory.projector
    for row, scale in ((0, 0.5), (1, 0.0)):
        image = torch.zeros(ROWS, 32, dtype=torch.float64)
        hidden = F.silu(features[row] @ first.weight.T + first.bias)
        image[:16] = scale * (hidden @ second.weight.T + second.bias)
        expected = torch.zeros(5, 32, dtype=torch.float64)
        for key, value in zip(image + memory.key_positions, image + memory.value_positions):
            expected += 0.7 * F.silu(h[row] @ key)[:, None] * value
        assert relative_error(read[row], expected) < 1e-12


def test_a_plain_ffn_with_memory_is_an_ffn_with_more_hidden_units():
    """W1' = [W1; K], W2' = [W2, V^T]; of a gated one, W_up' = [W_up; 0] with bias [0; 1]."""
    read = random_memory()(random_prefix(1, 16, 48).double())
    h = random_prefix(1, 5).double()
    W1, gate, up = random_prefix(3, 64, seed=4).double()
    W2 = random_prefix(1, 64, seed=5).double()[0].T
    W1_longer = torch.cat([W1, read.keys[0]])
    W2_longer = torch.cat([W2, read.values[0].T], dim=1)
    plain = F.gelu(h @ W1.T) @ W2.T + read(h, F.gelu)
    assert relative_error(plain, F.gelu(h @ W1_longer.T) @ W2_longer.T) < 1e-12
    gated = (F.silu(h @ gate.T) * (h @ up.T)) @ W2.T + read(h, F.silu)
    opened = F.pad(h @ up.T, (0, ROWS), value=1.0)
    hidden = F.silu(h @ torch.cat([gate, read.keys[0]]).T) * opened
    assert relative_error(gated, hidden @ W2_longer.T) < 1e-12


def test_rows_add_up_have_no_order_and_are_nothing_without_key_or_value():
    keys, values = random_prefix(2, 8, seed=3).double().chunk(2)
    h = random_prefix(1, 5).double()
    read = MemoryRead(keys, values)(h, F.silu)
    two = [MemoryRead(k, v)(h, F.silu) for k, v in zip(keys.split(3, 1), values.split(3, 1))]
    assert relative_error(sum(two), read) < 1e-12
    order = torch.randperm(8)
    assert relative_error(MemoryRead(keys[:, order], values[:, order])(h, F.silu), read) < 1e-12
    zero = torch.zeros_like(keys)
    more_keys = MemoryRead(torch.cat([keys, keys], 1), torch.cat([values, zero], 1))
    more_values = MemoryRead(torch.cat([keys, zero], 1), torch.cat([values, values], 1))
    for longer in (more_keys, more_values):
        assert relative_error(longer(h, F.silu), read) < 1e-12


@pytest.mark.parametrize("with_positions", [False, True])
def test_the_order_of_patches_is_known_by_their_positions_alone(with_positions):
    memory = random_memory()
    if not with_positions:
        memory.key_positions.data.zero_()
        memory.value_positions.data.zero_()
    features = random_prefix(1, 16, 48).double()
    h = random_prefix(1, 5).double()
    other = memory(features[:, torch.arange(15, -1, -1)])(h, F.silu)
    change = relative_error(other, memory(features)(h, F.silu))
    assert change > 0.01 if with_positions else change < 1e-12


def test_dropout_acts_on_what_is_read_with_in_train_mode():
    """With V the identity, the read is the coefficients: some zero, the others 1 / (1 - p) larger."""
    memory = random_memory(dim=ROWS, dropout=0.25)
    memory.projector[2].weight.data.zero_()
    memory.projector[2].bias.data.zero_()
    memory.value_positions.data = torch.eye(ROWS, dtype=torch.float64)
    features = random_prefix(1, 16, 48).double()
    h = random_prefix(1, 50, ROWS).double()
    whole = memory(features)(h, F.gelu)
    dropped = memory.train()(features)(h, F.gelu)
    kept = dropped != 0
    assert 0.15 < (~kept).float().mean() < 0.35
    assert relative_error(dropped[kept], whole[kept] / 0.75) < 1e-12


def test_keys_and_values_are_in_the_llms_dtype_and_follow_rows():
    memory = random_memory().float()
    features = random_prefix(3, 16, 48)
    read = memory(features, dtype=torch.bfloat16)
    h = random_prefix(2, 5).bfloat16()
    assert read(random_prefix(3, 5).bfloat16(), F.silu).dtype == torch.bfloat16
    some = read.rows(torch.tensor([2, 0]))
    alone = memory(features[[2, 0]], dtype=torch.bfloat16)
    assert torch.equal(some(h, F.silu), alone(h, F.silu))


def test_more_visual_tokens_than_rows_are_refused():
    with pytest.raises(ValueError, match="21 visual tokens do not fit into 20 rows"):
        random_memory()(random_prefix(1, 21, 48).double())


# ------------------------------------------------------------------------------------------ the ViT


def test_fresh_adapters_leave_clips_features_as_they_are(clip):
    """Of transformers' CLIP: hidden states behind the last block but one, its post-LayerNorm on patches."""
    theirs, folder = clip
    adapted = make_adapted(folder, normalise="clip")
    images = random_images()
    pixels = adapted.normalise(images).double()
    with torch.no_grad():
        hidden = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[2]
        expected = theirs.vision_model.post_layernorm(hidden[:, 1:])
        features = adapted(images)
        assert relative_error(features, expected) < 1e-6
        assert torch.equal(features, make_adapted(folder, normalise="clip", hidden=0)(images))
        assert relative_error(adapted(images), make_adapted(folder)(images)) > 1e-3  # ImageNet's numbers


def put_beside(layers, adapters):
    """Hooks that add to transformers' MLPs what adapters are by the paper's formula."""
    for layer, adapter in zip(layers, adapters, strict=False):
        down, up = adapter.down.weight, adapter.up.weight
        layer.mlp.register_forward_hook(
            lambda _, args, out, down=down, up=up: out + 0.1 * F.gelu(args[0] @ down.T) @ up.T)


def test_adapters_stand_beside_the_mlps_of_clip_and_eva(clip, tmp_path):
    theirs = copy.deepcopy(clip[0]).vision_model
    blip2 = write_source(tmp_path).double().vision_model
    images = random_images()
    for vision, folder, layers in ((theirs, clip[1], 2), (blip2, tmp_path, None)):
        adapted = AdaptedViT(load_vit(folder, dtype=torch.float64, layers=layers)).double().eval()
        randomise_trained(adapted.adapters)
        put_beside(vision.encoder.layers, adapted.adapters)
        with torch.no_grad():
            pixels = adapted.normalise(images).double()
            states = vision(pixels, output_hidden_states=True).hidden_states
            expected = vision.post_layernorm(states[len(adapted.adapters)][:, 1:])
            assert relative_error(adapted(images), expected) < 1e-6


def test_images_are_normalised_as_torchvision_writes_it(clip):
    images = random_images()
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert memvp.NORMALISE == {"imagenet": imagenet, "clip": (qformer.MEAN, qformer.STD)}
    for name, (mean, deviation) in memvp.NORMALISE.items():
        ours = make_adapted(clip[1], normalise=name).normalise(images)
        for channel in range(3):
            expected = (images[:, channel] / 255 - mean[channel]) / deviation[channel]
            assert relative_error(ours[:, channel], expected) < 1e-5


# ---------------------------------------------------------------------------------------- the model


def test_a_memory_that_says_nothing_leaves_the_llm_as_it_was(model):
    """A fresh memory without an image (V = E2 = 0), whatever E1; and s = 0 with one."""
    prompts, targets = random_prompts(), random_ids(3, 4)
    frozen = plain_logits(model, prompts, targets)
    begun = fresh(model)
    none = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(logits_of(begun, prompts, targets, has_image=none, images=random_images()), frozen)
    begun.memory.scale = 0
    assert torch.equal(logits_of(begun, prompts, targets, images=random_images()), frozen)
    assert relative_error(logits_of(model, prompts, targets, images=random_images()), frozen) > 0.01


def test_no_row_sees_anothers_image_and_text_only_rows_see_none(model):
    prompts, targets = random_prompts(), random_ids(3, 4)
    logits = logits_of(model, prompts, targets, has_image=HAS_IMAGE, images=random_images())
    other = random_images()
    other[1:] = random_images(2, seed=9)
    changed = logits_of(model, prompts, targets, has_image=HAS_IMAGE, images=other)
    assert torch.equal(logits[:2], changed[:2])
    assert relative_error(changed[2], logits[2]) > 0.001


def test_padding_and_rows_beside_change_nothing(model):
    """Left-padded, right-padded and alone, a row has the same logits."""
    prompts, targets = random_prompts(), random_ids(3, 4)
    images = random_images()
    logits = logits_of(model, prompts, targets, has_image=HAS_IMAGE, images=images)
    right = torch.stack([row.roll(-int((row == PADDING).sum())) for row in prompts])
    other = logits_of(model, right, targets, has_image=HAS_IMAGE, images=images)
    assert relative_error(other, logits) < 1e-12
    for row in range(3):
        one = slice(row, row + 1)
        alone = prompts[one, prompts[row] != PADDING]
        sees = dict(has_image=HAS_IMAGE[one], images=images[one])
        assert relative_error(logits_of(model, alone, targets[one], **sees), logits[one]) < 1e-6


def test_the_loss_is_the_cross_entropy_of_the_scored_targets(model):
    prompts, targets = random_prompts(), random_ids(3, 4)
    targets[1, 2:] = -100
    sees = dict(has_image=HAS_IMAGE, images=random_images())
    logits = logits_of(model, prompts, targets, **sees)
    scored = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    for marks in (None, scored):
        counted = targets if marks is None else targets.masked_fill(~marks, -100)
        loss, tokens = model(prompts, targets, marks, **sees)
        expected = F.cross_entropy(logits.flatten(0, 1).float(), counted.flatten(), reduction="sum")
        assert relative_error(loss, expected) < 1e-5
        assert tokens == (counted != -100).sum()


def test_features_may_be_given_in_the_place_of_images(model):
    prompts, targets = random_prompts(), random_ids(3, 4)
    images = random_images()
    sees = model.see(images)
    assert sees["features"].shape == (3, 16, 48)
    assert torch.equal(model(prompts, targets, **sees)[0], model(prompts, targets, images=images)[0])


def gradients(model, has_image):
    model = copy.deepcopy(model)
    vpgtrans.enter_stage(model, memvp.STAGES["scienceqa"])
    model.eval()
    loss, _ = model(random_prompts(), random_ids(3, 4), has_image=has_image, images=random_images())
    loss.backward()
    trained = model.saved()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    return {name: p.grad for name, p in trained.items()}


def test_gradients_reach_all_that_trains_and_nothing_else(model):
    assert all(gradient.norm() > 0 for gradient in gradients(model, HAS_IMAGE).values())


def test_gradients_of_the_first_step(model):
    """Without an image only E2 has one; with one, all but what stands before a matrix of zeros."""
    none = torch.zeros(3, dtype=torch.bool)
    text_only = {name for name, gradient in gradients(fresh(model), none).items() if gradient.any()}
    assert text_only == {"memory.value_positions"}
    zero = {name for name, gradient in gradients(fresh(model), HAS_IMAGE).items() if not gradient.any()}
    assert zero == {"vit.adapters.0.down.weight", "vit.adapters.1.down.weight"}


def test_micro_batches_add_up_also_where_one_has_text_only_questions(model):
    """Gradients of a batch are the sums over its micro-batches, every one of which has a gradient for every
    trained tensor: what DDP counts on."""
    whole = gradients(model, HAS_IMAGE)
    vpgtrans.enter_stage(model, memvp.STAGES["scienceqa"])
    model.eval()
    for order in ([1], [0, 2]):
        loss, _ = model(random_prompts()[order], random_ids(3, 4)[order], has_image=HAS_IMAGE[order],
                        images=random_images()[order])
        of_micro_batch = torch.autograd.grad(loss, list(model.saved().values()), retain_graph=True)
        assert all(gradient is not None for gradient in of_micro_batch)
        loss.backward()
    for name, parameter in model.saved().items():
        assert relative_error(parameter.grad, whole[name]) < 1e-6
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_reads_the_memory_at_every_step(model, num_beams):
    """Rows side by side as alone; greedy decoding is the argmax of the whole forward pass."""
    prompts, images = random_prompts(), random_images()
    options = dict(max_new_tokens=8, num_beams=num_beams, stop=())
    texts = model.generate(prompts, has_image=HAS_IMAGE, images=images, **options)
    for row in range(3):
        one = slice(row, row + 1)
        alone = prompts[one, prompts[row] != PADDING]
        sees = dict(has_image=HAS_IMAGE[one], images=images[one])
        assert model.generate(alone, **sees, **options) == [texts[row]]
    if num_beams == 1:
        ids = torch.tensor(texts)
        logits = logits_of(model, prompts, ids, has_image=HAS_IMAGE, images=images)
        assert torch.equal(logits.argmax(-1), ids)
    assert texts != model.generate(prompts, has_image=~HAS_IMAGE, images=images, **options)


def test_memory_on_top_of_a_transferred_vpg(world, model):
    """A VPG in the place of the ViT: its queries are what the memory holds, and nothing in it trains."""
    vpg = load_vpg(world[0], dtype=torch.float32)
    on_top = MemoryLLM(vpg, random_memory(width=32).float(), copy.deepcopy(model.llm).float())
    assert "adapters" not in on_top.parts
    images = random_images()
    assert torch.equal(on_top.see(images)["features"], vpg(images))
    loss, tokens = on_top(random_prompts(), random_ids(3, 4), has_image=HAS_IMAGE, images=images)
    loss.backward()
    assert tokens == 12 and all(p.grad.norm() > 0 for p in on_top.saved().values())
    assert all(p.grad is None for p in vpg.parameters())


def test_a_memory_of_other_widths_is_refused(model):
    with pytest.raises(ValueError, match="the memory is 40 -> 32; .* it must be 48 -> 32"):
        MemoryLLM(model.vit, random_memory(width=40), model.llm)


def test_input_prompts_are_the_same_features_in_front_of_the_question(model):
    """[P | words], without P where there is no image, beside a memory of static rows alone."""
    compared = InputPromptLLM(model.vit, model.memory, model.llm)
    prompts, targets, images = random_prompts(), random_ids(3, 4), random_images()
    logits = logits_of(compared, prompts, targets, has_image=HAS_IMAGE, images=images)
    with torch.no_grad():
        image = model.memory.project(model.vit(images))
        keys, values = model.memory.key_positions[None], 0.7 * model.memory.value_positions[None]
        for row in range(3):
            words = model.llm.embed(prompts[row, prompts[row] != PADDING][None])
            prefix = torch.cat([image[row, None], words], dim=1) if HAS_IMAGE[row] else words
            alone = model.llm(prefix, targets[row, None], memory=MemoryRead(keys, values))
            assert relative_error(logits[row, None], alone) < 1e-6


@pytest.mark.slow
def test_compiled_layers_read_each_batchs_memory_without_compiling_anew(model):
    """Whose keys and values are other tensors each time."""
    counter = torch._dynamo.testing.CompileCounter()
    compiled = copy.deepcopy(model)
    for layer in compiled.llm.layers:
        layer.compile(backend=counter)
    frames = []
    for seed in range(3):
        batch = dict(prompt_ids=random_prompts(), target_ids=random_ids(3, 4, seed), has_image=HAS_IMAGE)
        images = random_images(seed=seed)
        loss, _ = compiled(**batch, images=images)
        assert relative_error(loss, model(**batch, images=images)[0]) < 1e-5
        frames.append(counter.frame_count)
    assert frames[0] == frames[2] > 0


def test_the_benchmark_measures_the_same_sum(model):
    """Keys and values in each layer, as MemVP's authors compute them, give the same loss."""
    anew = AnewEachLayer(48, 32, ROWS, hidden=8, image_scale=0.5, scale=0.7).double().eval()
    anew.load_state_dict(model.memory.state_dict())
    other = MemoryLLM(model.vit, anew, model.llm)
    batch = dict(prompt_ids=random_prompts(), target_ids=random_ids(3, 4), has_image=HAS_IMAGE)
    ours, _ = model(**batch, images=random_images())
    theirs, _ = other(**batch, images=random_images())
    assert relative_error(theirs, ours) < 1e-6


# ----------------------------------------------------------------------------- numbers of the paper


@pytest.mark.parametrize("dim, rows, total", [(4096, 320, 3_879_040 - 24_576 - 8_192),
                                              (5120, 400, 5_487_744 - 24_576 - 10_240)])
def test_what_trains_counts_as_in_the_paper(dim, rows, total):
    """Less the adapter of the block that never runs, and a leftover modality embedding."""
    with torch.device("meta"):
        memory = VisualMemory(1024, dim, rows)
        adapters = [memvp.Adapter(1024) for _ in range(23)]
    modules = [memory, *adapters]
    assert sum(p.numel() for module in modules for p in module.parameters()) == total


def test_a_fresh_memory_has_the_papers_sizes():
    """RMS of P 0.002 for features of unit variance, of E1 0.02; E2 zero."""
    torch.manual_seed(0)
    memory = VisualMemory(1024, 4096)
    with torch.no_grad():
        image = memory.project(torch.randn(1, 256, 1024))
    assert 0.001 < image.square().mean().sqrt() < 0.003
    assert abs(memory.key_positions.std() - 0.02) < 1e-3 and not memory.value_positions.any()
    assert (memory.scale, memory.dropout, memory.image_scale) == (0.1, 0.1, 0.01)


def test_the_stage_is_the_papers():
    """AdamW's numbers; the rate is 1.125e-3 after two of twenty epochs, then a cosine to zero."""
    stage = memvp.STAGES["scienceqa"]
    steps = stage.epochs * (12_726 // stage.batch_size)
    assert (steps, stage.betas, stage.weight_decay) == (7_940, (0.9, 0.95), 0.02)
    rates = [vpgtrans.learning_rate(stage, step, steps) for step in range(steps)]
    assert max(rates) == rates[794] == stage.lr == pytest.approx(1.125e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    middle = (794 + 7_939) / 2
    assert (rates[int(middle)] + rates[int(middle) + 1]) / 2 == pytest.approx(stage.lr / 2, rel=1e-3)


def test_the_stage_class_is_that_of_vpgtrans():
    assert inspect.getsource(memvp.Stage) == inspect.getsource(vpgtrans.Stage)
    assert memvp.PADDING == vpgtrans.PADDING


def count_operations(llm, T, memory=None):
    """Floating-point operations of the layers over T positions, without the head."""
    x = torch.empty(1, T, llm.dim, device="meta")
    positions = torch.arange(T, device="meta")[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llm.read(x, positions, memory=memory)
    return counter.get_total_flops()


@pytest.mark.slow
def test_operations_are_those_of_the_formulas_at_7b():
    """N (2cT + 4T^2d + 4mTd) with the memory, N (2c(T+n) + 4(T+n)^2 d) with n soft prompts in the input; a
    layer has c = 4d^2 + 3dD parameters. Half the work at 256 positions of text."""
    layers, d, D, T, n, m = 32, 4096, 11008, 256, 256, 320
    with torch.device("meta"):
        llm = LLaMA(dict(model_type="llama")).to("meta")
        read = MemoryRead(torch.empty(1, m, d), torch.empty(1, m, d))
    c = 4 * d**2 + 3 * d * D
    by_memory = layers * (2 * c * T + 4 * T**2 * d + 4 * m * T * d)
    by_input = layers * (2 * c * (T + n) + 4 * (T + n) ** 2 * d)
    counted = count_operations(llm, T, read)
    assert counted == pytest.approx(by_memory, rel=0.01)
    assert count_operations(llm, T + n) == pytest.approx(by_input, rel=0.01)
    assert by_input / counted == pytest.approx(2.0, abs=0.02)
    assert (counted - count_operations(llm, T)) / counted == pytest.approx(0.013, abs=0.001)
