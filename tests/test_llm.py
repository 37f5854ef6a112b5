"""Facts about llm.py, established against transformers on small random models in which every tensor is random."""

import json

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from conftest import randomise, relative_error
from llm import load_llm, read_word_embeddings

SMALL = dict(vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
             pad_token_id=1, bos_token_id=2, eos_token_id=2, word_embed_proj_dim=32)
VARIANTS = {"pre-norm": {}, "opt-350m": dict(do_layer_norm_before=False, word_embed_proj_dim=16)}


def make_pair(folder, variant):
    """(our OPT, transformers' OPT, folder): the same weights, ours loaded from the folder that transformers wrote."""
    theirs = randomise(OPTForCausalLM(OPTConfig(**(SMALL | VARIANTS[variant]), attn_implementation="eager")))
    theirs.save_pretrained(folder)
    return load_llm(folder, dtype=torch.float32), theirs, folder


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("opt"), request.param)


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


GENERATION = [(1, 1.0, 0), (3, 1.0, 0), (5, 1.0, 4), (5, -1.0, 0), (3, -1.0, 3)]


@pytest.mark.parametrize("num_beams, length_penalty, min_new_tokens", GENERATION)
def test_generation_equals_transformers(tmp_path, num_beams, length_penalty, min_new_tokens):
    ours, theirs, _ = make_pair(tmp_path, "pre-norm")  # transformers cannot generate from embeddings behind project_in
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


def test_several_stop_sequences_of_several_ids(pair):
    """A text ends at the first of them; without any it runs to the full length. Beams obey them too."""
    ours, prefix = pair[0], random_prefix(4, 5)
    whole = ours.generate(prefix, max_new_tokens=12, stop=())
    assert {len(ids) for ids in whole} == {12}
    stop = [tuple(whole[0][3:6]), tuple(whole[1][6:7])]
    for ids, full in zip(ours.generate(prefix, max_new_tokens=12, stop=stop), whole):
        text = " ".join(map(str, full)) + " "
        cut = min((text.find(" ".join(map(str, s)) + " ") for s in stop if " ".join(map(str, s)) + " " in text), default=len(text))
        assert ids == [int(i) for i in text[:cut].split()]
    for ids in ours.generate(prefix, max_new_tokens=12, num_beams=3, stop=stop):
        assert not any(tuple(ids[i : i + len(s)]) == s for s in stop for i in range(len(ids)))


def test_sampling_follows_the_nucleus(pair):
    """At a tiny top_p only the most probable token is left; at temperature 1 the draws differ."""
    ours, prefix = pair[0], random_prefix(1, 5).expand(8, -1, -1)
    assert ours.generate(prefix, temperature=1.0, top_p=1e-6) == ours.generate(prefix)
    torch.manual_seed(0)
    assert len(set(map(tuple, ours.generate(prefix, temperature=1.5)))) > 1


def test_word_embeddings_are_read_in_the_space_of_soft_prompts(pair):
    ours, _, folder = pair
    assert torch.allclose(read_word_embeddings(folder), ours.embed(torch.arange(120)), atol=1e-6)


# ------------------------------------------------------------------------------------------- checkpoints as they really are


def logits(folder, **options):
    with torch.no_grad():
        return load_llm(folder, dtype=torch.float32, **options)(random_prefix(1, 4), torch.tensor([[5, 6]]))


def test_a_bin_without_model_prefix_in_shards_loads(tmp_path):
    """facebook/opt-*: .bin files, tensors named decoder.*, a tied head that is there or not, half precision."""
    _, theirs, folder = make_pair(tmp_path / "a", "opt-350m")
    reference = logits(folder)
    tensors = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((folder / "config.json").read_text())
    torch.save(tensors, old / "pytorch_model.bin")
    assert relative_error(logits(old), reference) < 1e-6  # memory-mapped tensors are aligned otherwise
    (old / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    halves = {"one.bin": names[::2], "two.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, old / file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {n: f for f, part in halves.items() for n in part}}))
    assert relative_error(logits(old), reference) < 1e-6  # memory-mapped tensors are aligned otherwise
    (old / "two.bin").unlink()
    with pytest.raises(FileNotFoundError, match="two.bin"):
        load_llm(old)


def test_fields_left_out_of_the_config_have_opts_defaults(tmp_path):
    folder = make_pair(tmp_path, "pre-norm")[2]
    config, reference = json.loads((folder / "config.json").read_text()), logits(folder)
    for key in ("do_layer_norm_before", "_remove_final_layer_norm", "activation_function", "word_embed_proj_dim", "enable_bias", "layer_norm_elementwise_affine"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(folder), reference)


@pytest.mark.parametrize("key, value", [("activation_function", "gelu"), ("enable_bias", False)])
def test_what_is_not_implemented_is_refused_by_name(tmp_path, key, value):
    folder = make_pair(tmp_path, "pre-norm")[2]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{key} = {value!r} is not implemented"):
        load_llm(folder)


def test_pickles_with_code_are_never_run(tmp_path):
    folder = make_pair(tmp_path, "pre-norm")[2]
    (folder / "model.safetensors").unlink()

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    torch.save({"model.decoder.embed_tokens.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_llm(folder)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("prefix, target, says", [(random_prefix(1, 4)[:, :0], [[5]], "P >= 1"), (torch.zeros(1, 4, 31), [[5]], "32"),
                                                  (random_prefix(1, 60), [[5] * 6], "more than this OPT's 64")])
def test_inputs_that_do_not_fit_are_refused(pair, prefix, target, says):
    with pytest.raises(ValueError, match=says):
        pair[0](prefix, torch.tensor(target))
