"""Facts about llm.py, established against transformers on small models in which every tensor is random."""

import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LLAMA3_ROPE,
    edit_config,
    edit_tensors,
    make_llm_pair,
    random_ids,
    random_prefix,
    relative_error,
    their_logits,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import llm as language_models
from llm import load_llm, read_word_embeddings


def test_logits_loss_and_gradient_equal_transformers(llm_pair):
    ours, theirs, _ = llm_pair
    target = random_ids(2, 11)
    target[0, 5:] = -100
    a = random_prefix(2, 20).requires_grad_()
    b = random_prefix(2, 20).requires_grad_()
    logits = ours(a, target)
    reference = their_logits(theirs, b, target)
    real = target != -100
    assert relative_error(logits[real], reference[real]) < 2e-5
    loss, tokens = ours.loss(a, target)
    reference_loss = F.cross_entropy(reference.flatten(0, 1), target.flatten(), reduction="sum")
    assert tokens == 16
    assert relative_error(loss, reference_loss) < 2e-5
    loss.backward()
    reference_loss.backward()
    assert relative_error(a.grad, b.grad) < 2e-5


def test_it_is_frozen_and_in_eval_mode(llm_pair):
    ours, _, _ = llm_pair
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training


@pytest.mark.parametrize("gradient", [True, False])  # on CPUs each takes another attention
def test_each_row_ignores_its_holes(llm_pair, gradient):
    ours, theirs, _ = llm_pair
    prefix = random_prefix(3, 6).requires_grad_(gradient)
    target = random_ids(3, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    logits = ours(prefix, target, mask)
    for row in range(3):
        alone = prefix[row : row + 1, mask[row]].detach().requires_grad_(gradient)
        reference = their_logits(theirs, alone, target[row : row + 1])
        assert relative_error(logits[row : row + 1], reference) < 2e-5
        if gradient:
            (whole,) = torch.autograd.grad(logits[row].square().sum(), prefix, retain_graph=True)
            (expected,) = torch.autograd.grad(reference.square().sum(), alone)
            assert relative_error(whole[row : row + 1, mask[row]], expected) < 2e-5
            assert not whole[row, ~mask[row]].any()


@pytest.mark.parametrize("variant", ["llama-1", "llama-3.1", "llama, linear rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_turn_by_transformers_angles(tmp_path, variant, dtype):
    """Also in bf16, in which angles of hundreds of radians would be rounded away."""
    _, theirs, folder = make_llm_pair(tmp_path, variant)
    ours = load_llm(folder, dtype=dtype)
    seen = []
    ours.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs[1]))
    prefix = random_prefix(1, 240)
    ours(prefix, random_ids(1, 1))
    references = theirs.model.rotary_emb(prefix.to(dtype), torch.arange(240)[None])
    for angles, reference in zip(seen, references, strict=True):
        assert relative_error(angles[0].float(), reference.float()) < 1e-5


def test_an_all_true_mask_equals_none(llm_pair):
    ours, _, _ = llm_pair
    prefix = random_prefix(2, 5)
    target = random_ids(2, 4)
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert relative_error(ours(prefix, target, everything), ours(prefix, target)) < 1e-6


def test_scaled_dot_product_attention_equals_plain_attention(llm_pair, monkeypatch):
    """In whatever layout its result comes: from a GPU's kernels, with positions before heads."""
    ours, _, _ = llm_pair
    prefix = random_prefix(2, 5)
    target = random_ids(2, 4)
    sdpa = F.scaled_dot_product_attention

    def laid_out_otherwise(*args, **options):
        return sdpa(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(language_models.F, "scaled_dot_product_attention", laid_out_otherwise)
    for mask in (None, torch.tensor([[False] + [True] * 4, [True] * 5])):
        with torch.no_grad():
            fused = ours(prefix, target, mask)
        assert relative_error(ours(prefix.clone().requires_grad_(), target, mask), fused) < 1e-5


def test_bf16_is_as_near_to_float32_as_transformers_bf16_is(llm_pair):
    ours, theirs, folder = llm_pair
    prefix = random_prefix(4, 9)
    target = random_ids(4, 6)
    low = load_llm(folder, dtype=torch.bfloat16)
    their_low = copy.deepcopy(theirs).bfloat16()
    exact = ours(prefix, target)
    error = relative_error(low(prefix, target).float(), exact)
    their_error = relative_error(their_logits(their_low, prefix.bfloat16(), target).float(), exact)
    assert low.lm_head.weight.dtype == torch.bfloat16
    assert 0 < error < 1.5 * their_error


# ---------------------------------------------------------------------------- several captions packed


@pytest.mark.parametrize("holes", [False, True])
def test_captions_packed_behind_one_prefix_give_what_they_give_alone(llm_pair, holes):
    ours = copy.deepcopy(llm_pair[0]).double()
    target = random_ids(6, 9).view(2, 3, 9)
    lengths = {(0, 0): 4, (0, 2): 1, (1, 1): 0, (1, 2): 6}  # (1, 1): an image with fewer captions
    for (row, caption), length in lengths.items():
        target[row, caption, length:] = -100
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) < 0.6 if holes else None
    a = random_prefix(2, 7).double().requires_grad_()
    b = random_prefix(2, 7).double().requires_grad_()
    if ours.WORDS == "shared.weight":
        with pytest.raises(ValueError, match="decoder-only"):
            ours.loss(a, target, mask)
        return
    packed, tokens = ours.loss(a, target, mask)
    repeated_mask = None if mask is None else mask.repeat_interleave(3, 0)
    alone, count = ours.loss(b.repeat_interleave(3, 0), target.flatten(0, 1), repeated_mask)
    assert tokens == count == 29
    assert relative_error(packed, alone) < 1e-6
    packed.backward()
    alone.backward()
    assert relative_error(a.grad, b.grad) < 1e-6


def test_a_caption_packed_with_others_reads_no_other(llm_pair):
    ours, _, _ = llm_pair
    if ours.WORDS == "shared.weight":
        return
    prefix = random_prefix(1, 4)
    losses = []
    for other in (5, 9):
        target = random_ids(2, 6)[None].clone()
        target[0, 0] = other
        target[0, 1, 5:] = -100
        alone, _ = ours.loss(prefix, target[:, 0])
        packed, _ = ours.loss(prefix, target)
        losses.append(packed - alone)
    assert relative_error(*losses) < 1e-5
    assert ours.loss(prefix, random_ids(3, 1).view(1, 3, 1))[1] == 3  # captions of one token


@pytest.mark.parametrize("target, says", [
    (random_ids(2, 60)[None], "positions"),
    (torch.full((1, 2, 3), 120), "vocabulary"),
    (torch.full((1, 2, 3), -1), "vocabulary")])
def test_packed_captions_that_do_not_fit_are_refused(tmp_path, target, says):
    opt, _, _ = make_llm_pair(tmp_path, "opt")
    with pytest.raises(ValueError, match=says):
        opt.loss(random_prefix(1, 10), target)
    many = random_ids(6, 50).view(1, 6, 50)  # 310 positions in all, of which each caption counts 60
    assert opt.loss(random_prefix(1, 10), many)[1] == 300


# --------------------------------------------------------------------- targets of which some are scored


@pytest.mark.parametrize("frozen_head", [True, False])
def test_scored_targets_alone_count(llm_pair, frozen_head):
    """As transformers' loss with the labels of the others masked; a mark on padding counts nothing."""
    ours = copy.deepcopy(llm_pair[0]).double()
    theirs = copy.deepcopy(llm_pair[1]).double()
    ours.lm_head.weight.requires_grad_(not frozen_head)
    target = random_ids(3, 7)
    target[0, 4:] = -100
    scored = torch.zeros(3, 7, dtype=torch.bool)
    scored[0, [1, 3, 5, 6]] = True
    scored[1, [0, 6]] = True
    a = random_prefix(3, 6).double().requires_grad_()
    b = random_prefix(3, 6).double().requires_grad_()
    loss, tokens = ours.loss(a, target, scored=scored)
    reference = their_logits(theirs, b, target)
    labels = target.masked_fill(~scored, -100)
    reference_loss = F.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="sum")
    assert tokens == 4
    assert relative_error(loss, reference_loss) < 1e-6
    loss.backward()
    reference_loss.backward()
    assert relative_error(a.grad, b.grad) < 1e-6
    assert not a.grad[2].any()


def test_the_head_reads_scored_positions_alone(llm_pair, monkeypatch):
    ours, _, _ = llm_pair
    heights = []
    linear = nn.functional.linear

    def watched(x, weight, *bias):
        if weight is ours.lm_head.weight:
            heights.append(len(x))
        return linear(x, weight, *bias)

    monkeypatch.setattr(language_models.F, "linear", watched)
    scored = torch.zeros(2, 5, dtype=torch.bool)
    scored[0, 1] = scored[1, 2] = scored[1, 3] = True
    ours.loss(random_prefix(2, 4), random_ids(2, 5), scored=scored)
    assert heights == [3]


def test_holes_and_scored_targets_go_together(llm_pair):
    ours, _, _ = llm_pair
    target = random_ids(2, 5)
    scored = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    prefix = random_prefix(2, 4)
    log_p = ours(prefix, target, mask).log_softmax(-1).gather(2, target[..., None])[..., 0]
    loss, tokens = ours.loss(prefix, target, mask, scored)
    assert tokens == 4
    assert relative_error(loss, -log_p[scored].sum()) < 1e-5


@pytest.mark.parametrize("frozen_head", [True, False])
def test_a_batch_in_which_nothing_is_scored_has_a_loss_of_zero(tmp_path, frozen_head):
    """Of one rank or micro-batch among others; it has a gradient, which is zero, too."""
    opt, _, _ = make_llm_pair(tmp_path, "opt")
    opt.lm_head.weight.requires_grad_(not frozen_head)
    prefix = random_prefix(2, 4).requires_grad_()
    loss, tokens = opt.loss(prefix, random_ids(2, 5), scored=torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert tokens == 0
    assert not prefix.grad.any()


@pytest.mark.parametrize("target, scored, says", [
    (random_ids(2, 5), torch.ones(2, 4, dtype=torch.bool), r"\(2, 5\) of torch.bool.*not \(2, 4\)"),
    (random_ids(2, 5), torch.ones(2, 5), "of torch.float32"),
    (random_ids(4, 5).view(2, 2, 5), torch.ones(2, 2, 5, dtype=torch.bool), "packed")])
@pytest.mark.parametrize("variant", ["opt", "flan-t5"])
def test_scored_that_does_not_fit_is_refused(tmp_path, variant, target, scored, says):
    ours, _, _ = make_llm_pair(tmp_path, variant)
    with pytest.raises(ValueError, match=says):
        ours.loss(random_prefix(2, 4), target, scored=scored)


# ---------------------------------------------------------------------------- the loss of a frozen head


@pytest.mark.parametrize("variant", ["opt", "flan-t5"])
def test_only_minus_100_stands_for_no_target(tmp_path, variant):
    ours, _, _ = make_llm_pair(tmp_path, variant)
    with pytest.raises(ValueError, match="ids from -1"):
        ours.loss(random_prefix(1, 4), torch.tensor([[4, 5, -1]]))


def test_there_is_no_second_derivative_of_a_frozen_heads_loss(tmp_path):
    opt, _, _ = make_llm_pair(tmp_path, "opt")
    x = random_prefix(1, 4).requires_grad_()
    loss, _ = opt.loss(x, random_ids(1, 5))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_the_loss_of_a_frozen_head_is_taken_a_block_of_rows_at_a_time(monkeypatch, rows):
    head = nn.Linear(16, 50, bias=False).double()
    ids = torch.randint(50, (2, 10))
    ids[0, 4:] = -100
    ids[1, 9] = -100
    linear = nn.functional.linear
    log_softmax = torch.Tensor.log_softmax
    blocks = []  # (rows, a weak reference to their logits)
    slices = []  # rows
    monkeypatch.setattr(language_models.FrozenHeadLoss, "BLOCK", {"cpu": 8 * 50 * rows})
    monkeypatch.setattr(language_models.FrozenHeadLoss, "SLICE", {"cpu": 4 * 50 * 2})

    def watch_block(x, weight, *bias):
        assert all(logits() is None for _, logits in blocks), "two blocks of logits at a time"
        logits = linear(x, weight, *bias)
        blocks.append((len(x), weakref.ref(logits)))
        return logits

    def watch_slice(x, dim):
        slices.append(len(x))
        return log_softmax(x, dim)

    def loss_and_gradient():
        x = random_prefix(2, 10, 16).double().requires_grad_()
        loss, tokens = language_models.target_loss(head, x, ids)
        (loss * 3).backward()
        assert tokens == 13
        return loss, x.grad

    monkeypatch.setattr(language_models.F, "linear", watch_block)
    monkeypatch.setattr(torch.Tensor, "log_softmax", watch_slice)
    head.requires_grad_(False)
    loss, gradient = loss_and_gradient()
    heights = [height for height, _ in blocks]
    assert max(heights) <= rows
    assert max(slices) <= 2
    assert sum(heights) == sum(slices) == 20
    with torch.no_grad():
        without_gradient, _ = language_models.target_loss(head, random_prefix(2, 10, 16).double(), ids)
    head.requires_grad_()
    reference, reference_gradient = loss_and_gradient()
    assert relative_error(loss, reference) < 1e-6
    assert relative_error(without_gradient, reference) < 1e-6
    assert relative_error(gradient, reference_gradient) < 1e-6
    assert gradient[0, 4:].abs().max() == 0


# ------------------------------------------------------------------------ checkpoints as they really are


def logits(folder, **options):
    with torch.no_grad():
        return load_llm(folder, dtype=torch.float32, **options)(random_prefix(1, 4), torch.tensor([[5, 6]]))


def write_index(folder, shards, name):
    """The index of a checkpoint whose {file: names of its tensors}."""
    weight_map = {tensor: file for file, names in shards.items() for tensor in names}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def test_word_embeddings_are_read_in_the_space_of_soft_prompts(llm_pair):
    ours, _, folder = llm_pair
    assert torch.allclose(read_word_embeddings(folder), ours.embed(torch.arange(120)), atol=1e-6)


def test_reading_word_embeddings_reads_nothing_else(llm_pair, monkeypatch):
    _, _, folder = llm_pair
    original = language_models.read_file
    read = []

    def watched(file, wanted):
        for name, tensor in original(file, wanted):
            if tensor is not None:
                read.append(name)
            yield name, tensor

    monkeypatch.setattr(language_models, "read_file", watched)
    read_word_embeddings(folder)
    assert read
    assert all(any(part in name for part in ("embed_tokens", "shared", "project_in")) for name in read)


def test_a_bin_without_model_prefix_in_shards_loads(tmp_path):
    """facebook/opt-*: .bin files, tensors named decoder.*, a tied head that is there or not."""
    _, theirs, folder = make_llm_pair(tmp_path / "a", "opt-350m")
    reference = logits(folder)
    tensors = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((folder / "config.json").read_text())
    for archive in (False, True):  # as before torch 1.6, and since
        torch.save(tensors, old / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
        assert relative_error(logits(old), reference) < 1e-6  # memory-mapped tensors are aligned otherwise
    (old / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    shards = {"one.bin": names[::2], "two.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, old / file)
    write_index(old, shards, "pytorch_model.bin.index.json")
    assert relative_error(logits(old), reference) < 1e-6
    (old / "two.bin").unlink()
    with pytest.raises(FileNotFoundError, match="two.bin"):
        load_llm(old)


def test_shards_and_an_llm_inside_a_blip2_folder_load(llm_pair, tmp_path):
    _, _, folder = llm_pair
    whole = load_file(folder / "model.safetensors")
    tensors = {"language_model." + name: tensor for name, tensor in whole.items()}
    tensors["query_tokens"] = torch.zeros(1)
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    write_index(tmp_path, shards, "model.safetensors.index.json")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2", "text_config": config}))
    assert relative_error(logits(tmp_path), logits(folder)) < 1e-6
    assert torch.equal(read_word_embeddings(tmp_path), read_word_embeddings(folder))


@pytest.mark.parametrize("variant", ["opt", "smollm2", "t5, tied"])
@pytest.mark.parametrize("kept", ["words", "head", "both"])
def test_tied_files_hold_either_name_or_both(tmp_path, variant, kept):
    ours, _, folder = make_llm_pair(tmp_path, variant)
    reference = logits(folder)
    words = load_file(folder / "model.safetensors")[ours.WORDS]
    names = {"words": [ours.WORDS], "head": ["lm_head.weight"], "both": [ours.WORDS, "lm_head.weight"]}[kept]

    def rename_words(tensors):
        def is_word_table(name):
            return "embed_tokens" in name or name in ("shared.weight", "lm_head.weight")

        others = {name: tensor for name, tensor in tensors.items() if not is_word_table(name)}
        return others | dict.fromkeys(names, words)

    edit_tensors(folder, rename_words)
    again = load_llm(folder, dtype=torch.float32)
    assert torch.equal(logits(folder), reference)
    assert torch.equal(read_word_embeddings(folder), words)
    assert again.lm_head.weight is again.get_parameter(ours.WORDS)


def test_a_head_of_its_own_stays_in_a_file_that_is_said_to_be_tied(tmp_path):
    _, _, folder = make_llm_pair(tmp_path, "llama-1")
    reference = logits(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(folder), reference)


@pytest.mark.parametrize("variant", ["llama-1", "flan-t5"])
def test_a_head_that_is_missing_is_missed(tmp_path, variant):
    _, _, folder = make_llm_pair(tmp_path, variant)

    def without_head(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    edit_tensors(folder, without_head)
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_llm(folder)


def test_a_t5_of_todays_writer_loads(tmp_path):
    """transformers 5 writes tie_word_embeddings = true for any T5, and scale_decoder_outputs = false for
    those that had it false."""
    _, theirs, folder = make_llm_pair(tmp_path / "a", "flan-t5")
    written = tmp_path / "b"
    theirs.save_pretrained(written)
    config = json.loads((written / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert not config["scale_decoder_outputs"]
    if "lm_head.weight" not in load_file(written / "model.safetensors"):
        save_file(load_file(folder / "model.safetensors"), written / "model.safetensors")
    assert relative_error(logits(written), logits(folder)) < 1e-6


OLD_LLAMA3_ROPE = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}


@pytest.mark.parametrize("variant, scaling", [
    ("llama-1", None),
    ("llama, linear rope", dict(type="linear", factor=4.0)),
    ("llama-3.1", OLD_LLAMA3_ROPE)])
def test_the_older_spelling_of_rope_says_the_same(tmp_path, variant, scaling):
    _, _, folder = make_llm_pair(tmp_path, variant)
    reference = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    old = dict(rope_theta=theta, rope_scaling=scaling, torch_dtype="float16")
    edit_config(folder, drop=["rope_parameters", "dtype"], **old)
    assert torch.equal(logits(folder), reference)


OLD_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.mark.parametrize("variant, stale", [
    ("llama-1", {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(3)}),
    ("flan-t5", {OLD_BIAS: torch.zeros(8, 4)})])
def test_stale_tensors_of_old_files_are_passed_over(tmp_path, variant, stale):
    _, _, folder = make_llm_pair(tmp_path, variant)
    reference = logits(folder)
    edit_tensors(folder, lambda tensors: tensors | stale)
    assert torch.equal(logits(folder), reference)


LEFT_OUT = {
    "opt": ["do_layer_norm_before", "_remove_final_layer_norm", "activation_function", "word_embed_proj_dim",
            "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"],
    "llama-1": ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "hidden_act",
                "attention_bias", "mlp_bias", "tie_word_embeddings", "pretraining_tp"],
    "flan-t5": ["dense_act_fn", "is_gated_act", "decoder_start_token_id", "layer_norm_epsilon"],
    "t5 v1.0": ["feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings"]}


@pytest.mark.parametrize("variant", LEFT_OUT)
def test_fields_left_out_of_the_config_have_defaults(tmp_path, variant):
    _, _, folder = make_llm_pair(tmp_path, variant)
    reference = logits(folder)
    edit_config(folder, drop=LEFT_OUT[variant])
    assert torch.equal(logits(folder), reference)


@pytest.mark.parametrize("said", [
    dict(model_type="opt"),
    dict(model_type="llama"),
    dict(model_type="mistral"),
    dict(model_type="qwen2"),
    dict(model_type="qwen3", hidden_size=1024),
    dict(model_type="t5"),
    dict(model_type="t5", feed_forward_proj="gated-gelu")])
def test_defaults_are_transformers_defaults(said):
    """A config.json that says hardly more than its type gives transformers' shapes, on the meta device."""
    config = AutoConfig.for_model(**said)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        theirs = kind.from_config(config)
        ours = language_models.ARCHITECTURES[said["model_type"]](said)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    their_shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes == {ours.checkpoint_name(name): shape for name, shape in their_shapes.items()}


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("variant, key, value", [
    ("opt", "activation_function", "gelu"),
    ("opt", "enable_bias", False),
    ("llama-1", "hidden_act", "gelu"),
    ("llama-1", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("llama-1", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
    ("llama-1", "partial_rotary_factor", 0.5),
    ("llama-1", "quantization_config", {"bits": 4}),
    ("flan-t5", "feed_forward_proj", "gated-silu"),
    ("flan-t5", "dense_act_fn", "silu"),
    ("flan-t5", "is_gated_act", False),
    ("t5 v1.0", "dense_act_fn", "silu"),
    ("t5 v1.0", "is_gated_act", True)])
def test_what_is_not_implemented_is_refused_by_name(tmp_path, variant, key, value):
    _, _, folder = make_llm_pair(tmp_path, variant)
    edit_config(folder, drop=["rope_parameters"] if key != "rope_parameters" else [], **{key: value})
    ropes = {"rope_scaling": "rope_type = 'dynamic'", "rope_parameters": "rope_type = 'yarn'"}
    named = ropes.get(key, f"{key} = ")
    with pytest.raises(ValueError, match=f"config.json: .*{named}.*not implemented"):
        load_llm(folder)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma2", None])
def test_an_unknown_architecture_is_refused_by_name(tmp_path, model_type):
    _, _, folder = make_llm_pair(tmp_path, "llama-1")
    edit_config(folder, model_type=model_type)
    with pytest.raises(ValueError, match=f"config.json: model_type {model_type!r}"):
        load_llm(folder)


def test_a_sliding_window_is_refused_where_it_would_matter(tmp_path):
    _, _, folder = make_llm_pair(tmp_path, "mistral")
    edit_config(folder, sliding_window=12)
    ours = load_llm(folder, dtype=torch.float32)
    prefix = random_prefix(1, 8)
    assert ours(prefix, random_ids(1, 5)).isfinite().all()  # 12 positions
    with pytest.raises(ValueError, match="13 positions .* 12"):
        ours(prefix, random_ids(1, 6))
    with pytest.raises(ValueError, match="13 positions .* 12"):
        ours.generate(prefix, max_new_tokens=6)


def test_a_sliding_window_that_is_switched_off_does_not_matter(tmp_path):
    _, _, folder = make_llm_pair(tmp_path, "qwen2")
    edit_config(folder, sliding_window=12)  # use_sliding_window is false
    ours = load_llm(folder, dtype=torch.float32)
    assert ours(random_prefix(1, 8), random_ids(1, 6)).isfinite().all()
    edit_config(folder, drop=["sliding_window"], use_sliding_window=True)
    assert load_llm(folder).longest == 4096  # transformers' default


def test_pickles_with_code_are_never_run(tmp_path):
    _, _, folder = make_llm_pair(tmp_path, "opt")
    (folder / "model.safetensors").unlink()

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    torch.save({"model.decoder.embed_tokens.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_llm(folder)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("variant", ["opt", "llama-1", "flan-t5"])
def test_damaged_checkpoints_are_named(tmp_path, variant):
    _, _, folder = make_llm_pair(tmp_path, variant)
    whole = load_file(folder / "model.safetensors")
    norm = next(name for name in whole if name.endswith(("layer_norm.weight", "layernorm.weight")))
    without_norm = {name: tensor for name, tensor in whole.items() if name != norm}
    zeros = torch.zeros(7)
    extra = "model.layers.9.unheard_of"
    for tensors, says in (
            (without_norm, f"tensors missing, the first: {norm}"),
            (whole | {norm: zeros}, rf"{norm} is \(7,\), config.json says \(32,\)"),
            (whole | {extra: zeros}, f"unknown tensors, the first: {extra}")):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=says):
            load_llm(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        load_llm(folder)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("file, says", [
    ("adapter_config.json", "a PEFT adapter .*merge it into its base model with peft's merge_and_unload"),
    ("l-Q4_K.gguf", "l-Q4_K.gguf is a GGUF file.*from_pretrained.*gguf_file='l-Q4_K.gguf'.*save_pretrained")])
def test_an_adapter_or_a_gguf_file_alone_is_named_with_the_way_out(tmp_path, has_config, file, says):
    _, _, folder = make_llm_pair(tmp_path, "llama-1")
    (folder / file).write_text("{}")
    assert load_llm(folder).dim == 32  # beside a whole checkpoint it does not matter
    (folder / "model.safetensors").unlink()
    if not has_config:
        (folder / "config.json").unlink()
    for read in (load_llm, read_word_embeddings):
        with pytest.raises(FileNotFoundError, match=f"{'no weights' if has_config else 'missing'}.*{says}"):
            read(folder)


@pytest.mark.parametrize("prefix, target, says", [
    (random_prefix(1, 4)[:, :0], [[5]], "P >= 1"),
    (torch.zeros(1, 4, 31), [[5]], "32"),
    (random_prefix(1, 4), [[5, 7, 120]], "from 5 to 120.* 0 to 119")])
def test_inputs_that_do_not_fit_are_refused(llm_pair, prefix, target, says):
    ours, _, _ = llm_pair
    with pytest.raises(ValueError, match=says):
        ours(prefix, torch.tensor(target))


@pytest.mark.parametrize("mask", [
    torch.ones(1, 4, dtype=torch.long),
    torch.ones(1, 4),
    torch.ones(1, 5, dtype=torch.bool),
    torch.zeros(1, 4, dtype=torch.bool)])
def test_masks_that_do_not_fit_are_refused(llm_pair, mask):
    ours, _, _ = llm_pair
    prefix = random_prefix(1, 4)
    with pytest.raises(ValueError, match="prefix_mask"):
        ours(prefix, random_ids(1, 3), mask)
    with pytest.raises(ValueError, match="prefix_mask"):
        ours.generate(prefix, mask)


def test_t5_in_float16_is_refused(tmp_path):
    _, _, folder = make_llm_pair(tmp_path, "flan-t5")
    with pytest.raises(ValueError, match="bfloat16"):
        load_llm(folder, dtype=torch.float16)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "{}"])
def test_a_damaged_index_is_named(tmp_path, index):
    _, _, folder = make_llm_pair(tmp_path, "opt")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json: damaged"):
        load_llm(folder)


def test_a_text_longer_than_the_position_table_is_refused(tmp_path):
    opt, _, _ = make_llm_pair(tmp_path, "opt")
    prefix = random_prefix(1, 60)
    assert opt(prefix, random_ids(1, 5)).isfinite().all()
    with pytest.raises(ValueError, match="65 positions .* more than this OPT's 64"):
        opt(prefix, random_ids(1, 6))
    with pytest.raises(ValueError, match="65 positions"):
        opt.generate(prefix, max_new_tokens=6)
