"""Facts about llm.py, established against transformers on small random models in which every tensor is random."""

import json

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from llm import OPT, load_llm, read_word_embeddings

SMALL = dict(vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
             pad_token_id=1, bos_token_id=2, eos_token_id=2, word_embed_proj_dim=32)
VARIANTS = {"pre-norm": {}, "opt-350m": dict(do_layer_norm_before=False, word_embed_proj_dim=16)}


def randomise(module, seed=0, scale=0.25):
    """Every tensor random, so that no comparison is vacuous: transformers starts biases at zero and norms at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    """(our OPT, transformers' OPT) with the same weights, ours loaded from the folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("opt")
    theirs = randomise(OPTForCausalLM(OPTConfig(**(SMALL | VARIANTS[request.param]), attn_implementation="eager")))
    theirs.save_pretrained(folder)
    return load_llm(folder, dtype=torch.float32), theirs, folder


def random_prefix(B, P, D=32, seed=1):
    return torch.randn(B, P, D, generator=torch.Generator().manual_seed(seed))


def their_logits(theirs, prefix, target_ids):
    """transformers' logits for the target of one row without holes."""
    words = theirs.get_input_embeddings()(target_ids[:, :-1].clamp(min=0))
    project_in = theirs.model.decoder.project_in
    # transformers takes inputs_embeds before project_in; soft prompts enter after it, so its decoder is run without
    words = words if project_in is None else project_in(words)
    theirs.model.decoder.project_in = None
    try:
        logits = theirs(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
    finally:
        theirs.model.decoder.project_in = project_in
    return logits[:, prefix.shape[1] - 1 :]


def test_logits_loss_and_gradient_equal_transformers(pair):
    ours, theirs, _ = pair
    target = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(2))
    target[0, 5:] = -100
    a, b = random_prefix(2, 5).requires_grad_(), random_prefix(2, 5).requires_grad_()
    logits, reference = ours(a, target), their_logits(theirs, b, target)
    real = target != -100
    assert relative_error(logits[real], reference[real]) < 2e-5
    loss, tokens = ours.loss(a, target)
    reference_loss = torch.nn.functional.cross_entropy(reference.flatten(0, 1), target.flatten(), reduction="sum")
    assert tokens == 12 and relative_error(loss, reference_loss) < 2e-5
    loss.backward()
    reference_loss.backward()
    assert relative_error(a.grad, b.grad) < 2e-5


def test_each_row_ignores_its_holes(pair):
    ours, theirs, _ = pair
    prefix, target = random_prefix(3, 6), torch.randint(3, 120, (3, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    logits = ours(prefix, target, mask)
    for row in range(3):
        alone = their_logits(theirs, prefix[row : row + 1, mask[row]], target[row : row + 1])
        assert relative_error(logits[row : row + 1], alone) < 2e-5


def test_an_all_true_mask_equals_none(pair):
    ours, _, _ = pair
    prefix, target = random_prefix(2, 5), torch.randint(3, 120, (2, 4), generator=torch.Generator().manual_seed(4))
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert relative_error(ours(prefix, target, everything), ours(prefix, target)) < 1e-6


def test_scaled_dot_product_attention_equals_plain_attention(pair):
    ours, _, _ = pair
    prefix, target = random_prefix(2, 5), torch.randint(3, 120, (2, 4), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        fused = ours(prefix, target)
    assert relative_error(ours(prefix.requires_grad_(), target), fused) < 1e-5


@pytest.mark.parametrize("num_beams, length_penalty, min_new_tokens", [(1, 1.0, 0), (3, 1.0, 0), (5, 1.0, 4), (5, -1.0, 0), (3, -1.0, 3)])
def test_generation_equals_transformers(pair, num_beams, length_penalty, min_new_tokens):
    ours, theirs, _ = pair
    if theirs.model.decoder.project_in is not None:
        pytest.skip("transformers cannot generate from embeddings behind project_in")
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    ends = [5, 17, 30]  # three end marks, so that random models end early, at different lengths
    for seed in range(6):
        prefix = random_prefix(3, 5, seed=seed)
        captions = ours.generate(prefix, mask, max_new_tokens=9, num_beams=num_beams, length_penalty=length_penalty,
                                 min_new_tokens=min_new_tokens, stop=[(e,) for e in ends])
        for row in range(3):
            theirs_ids = theirs.generate(inputs_embeds=prefix[row : row + 1, mask[row]], max_new_tokens=9, num_beams=num_beams,
                                         length_penalty=length_penalty, min_new_tokens=min_new_tokens, eos_token_id=ends,
                                         pad_token_id=1, do_sample=False)[0].tolist()
            theirs_ids = theirs_ids[: next((i for i, t in enumerate(theirs_ids) if t in ends), len(theirs_ids))]
            assert captions[row] == theirs_ids
