"""Facts about llm.py, established against transformers on small random models in which every tensor is random."""

import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers import StoppingCriteria, StoppingCriteriaList

import llm as language_models
from conftest import randomise, relative_error
from llm import load_llm, read_word_embeddings

OPT = dict(model_type="opt", vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
           pad_token_id=1, bos_token_id=2, eos_token_id=2, word_embed_proj_dim=32)
LLAMA = dict(model_type="llama", vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
T5 = dict(model_type="t5", vocab_size=120, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
          relative_attention_num_buckets=8, relative_attention_max_distance=10, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
          decoder_start_token_id=0)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

# each row is what the models of that name do differently
VARIANTS = {
    "opt": OPT,
    "opt-350m": OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16),
    "llama-1": LLAMA,
    "llama-3.1": LLAMA | dict(num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "llama, linear rope": LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    "llama, biases": LLAMA | dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2),
    "smollm2": LLAMA | dict(num_key_value_heads=1, tie_word_embeddings=True),
    "mistral": LLAMA | dict(model_type="mistral", num_key_value_heads=2, head_dim=12, sliding_window=64),
    "qwen2": LLAMA | dict(model_type="qwen2", num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=300.0)),
    "qwen3": LLAMA | dict(model_type="qwen3", num_key_value_heads=2, head_dim=12),
    "flan-t5": T5,
    "blip-2 t5": T5 | dict(dense_act_fn="gelu"),
    "t5, tied": T5 | dict(tie_word_embeddings=True, decoder_start_token_id=3, layer_norm_epsilon=1e-2),
}


def make_model(folder, options):
    """A random model of transformers', written to a folder as files on the Hub are."""
    folder.mkdir(parents=True, exist_ok=True)
    if options["model_type"] != "t5":
        theirs = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), attn_implementation="eager"))
        theirs.save_pretrained(folder)
        return theirs
    theirs = T5ForConditionalGeneration._from_config(T5Config(**options), attn_implementation="eager")
    if not options["tie_word_embeddings"]:  # transformers ties the head of any new T5
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    randomise(theirs)
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(options))
    return theirs


def make_pair(folder, variant):
    """(our LLM, transformers', folder): the same weights, ours loaded from the folder."""
    theirs = make_model(folder, VARIANTS[variant])
    return load_llm(folder, dtype=torch.float32), theirs, folder


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("llm"), request.param)


def random_prefix(B, P, D=32, seed=1):
    return torch.randn(B, P, D, generator=torch.Generator().manual_seed(seed))


def random_ids(B, T, seed=2):
    return torch.randint(3, 120, (B, T), generator=torch.Generator().manual_seed(seed))


def their_logits(theirs, prefix, target_ids):
    """transformers' logits for the targets of rows without holes."""
    if theirs.config.is_encoder_decoder:
        return theirs(inputs_embeds=prefix, labels=target_ids).logits
    words = theirs.get_input_embeddings()(target_ids[:, :-1].clamp(min=0))
    decoder = getattr(theirs.model, "decoder", None)
    project_in = getattr(decoder, "project_in", None)
    if project_in is not None:  # transformers takes embeddings before project_in; soft prompts enter after it
        words, decoder.project_in = project_in(words), None
    try:
        logits = theirs(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
    finally:
        if project_in is not None:
            decoder.project_in = project_in
    return logits[:, prefix.shape[1] - 1 :]


def test_logits_loss_and_gradient_equal_transformers(pair):
    ours, theirs, _ = pair
    target = random_ids(2, 11)
    target[0, 5:] = -100
    a, b = random_prefix(2, 20).requires_grad_(), random_prefix(2, 20).requires_grad_()
    logits, reference = ours(a, target), their_logits(theirs, b, target)
    real = target != -100
    assert relative_error(logits[real], reference[real]) < 2e-5
    loss, tokens = ours.loss(a, target)
    reference_loss = torch.nn.functional.cross_entropy(reference.flatten(0, 1), target.flatten(), reduction="sum")
    assert tokens == 16 and relative_error(loss, reference_loss) < 2e-5
    loss.backward()
    reference_loss.backward()
    assert relative_error(a.grad, b.grad) < 2e-5


def test_it_is_frozen_and_in_eval_mode(pair):
    assert not any(parameter.requires_grad for parameter in pair[0].parameters()) and not pair[0].training


@pytest.mark.parametrize("gradient", [True, False])  # on CPUs each takes another attention
def test_each_row_ignores_its_holes(pair, gradient):
    ours, theirs, _ = pair
    prefix, target = random_prefix(3, 6).requires_grad_(gradient), random_ids(3, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    logits = ours(prefix, target, mask)
    for row in range(3):
        alone = prefix[row : row + 1, mask[row]].detach().requires_grad_(gradient)
        reference = their_logits(theirs, alone, target[row : row + 1])
        assert relative_error(logits[row : row + 1], reference) < 2e-5
        if gradient:
            whole, = torch.autograd.grad(logits[row].square().sum(), prefix, retain_graph=True)
            expected, = torch.autograd.grad(reference.square().sum(), alone)
            assert relative_error(whole[row : row + 1, mask[row]], expected) < 2e-5 and not whole[row, ~mask[row]].any()


@pytest.mark.parametrize("variant", ["llama-1", "llama-3.1", "llama, linear rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_turn_by_transformers_angles(tmp_path, variant, dtype):
    """Also in bf16, in which angles of hundreds of radians would be rounded away."""
    _, theirs, folder = make_pair(tmp_path, variant)
    ours, seen, prefix = load_llm(folder, dtype=dtype), [], random_prefix(1, 240)
    ours.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs[1]))
    ours(prefix, random_ids(1, 1))
    for angles, reference in zip(seen, theirs.model.rotary_emb(prefix.to(dtype), torch.arange(240)[None])):
        assert relative_error(angles[0].float(), reference.float()) < 1e-5


def test_an_all_true_mask_equals_none(pair):
    ours, _, _ = pair
    prefix, target = random_prefix(2, 5), random_ids(2, 4)
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert relative_error(ours(prefix, target, everything), ours(prefix, target)) < 1e-6


def test_scaled_dot_product_attention_equals_plain_attention(pair, monkeypatch):
    """In whatever layout its result comes: from a GPU's kernels, with positions before heads."""
    (ours, _, _), sdpa = pair, F.scaled_dot_product_attention
    prefix, target = random_prefix(2, 5), random_ids(2, 4)
    monkeypatch.setattr(language_models.F, "scaled_dot_product_attention",
                        lambda *args, **options: sdpa(*args, **options).transpose(1, 2).contiguous().transpose(1, 2))
    for mask in (None, torch.tensor([[False] + [True] * 4, [True] * 5])):
        with torch.no_grad():
            fused = ours(prefix, target, mask)
        assert relative_error(ours(prefix.clone().requires_grad_(), target, mask), fused) < 1e-5


@pytest.mark.parametrize("holes", [False, True])
def test_captions_packed_behind_one_prefix_give_what_they_give_alone(pair, holes):
    ours = copy.deepcopy(pair[0]).double()
    target = random_ids(6, 9).view(2, 3, 9)
    for place, length in {(0, 0): 4, (0, 2): 1, (1, 1): 0, (1, 2): 6}.items():  # (1, 1): an image with fewer captions
        target[(*place, slice(length, None))] = -100
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) < 0.6 if holes else None
    a, b = (random_prefix(2, 7).double().requires_grad_() for _ in "ab")
    if ours.WORDS == "shared.weight":
        with pytest.raises(ValueError, match="decoder-only"):
            ours.loss(a, target, mask)
        return
    packed, tokens = ours.loss(a, target, mask)
    alone, count = ours.loss(b.repeat_interleave(3, 0), target.flatten(0, 1), None if mask is None else mask.repeat_interleave(3, 0))
    assert tokens == count == 29 and relative_error(packed, alone) < 1e-6
    packed.backward(), alone.backward()
    assert relative_error(a.grad, b.grad) < 1e-6


def test_a_caption_packed_with_others_reads_no_other(pair):
    ours = pair[0]
    if ours.WORDS == "shared.weight":
        return
    losses = []
    for other in (5, 9):
        target = random_ids(2, 6)[None].repeat(1, 1, 1)
        target[0, 0], target[0, 1, 5:] = other, -100
        alone, _ = ours.loss(random_prefix(1, 4), target[:, 0])
        losses.append(ours.loss(random_prefix(1, 4), target)[0] - alone)
    assert relative_error(*losses) < 1e-5
    assert ours.loss(random_prefix(1, 4), random_ids(3, 1).view(1, 3, 1))[1] == 3  # captions of one token


def test_packed_captions_that_do_not_fit_are_refused(tmp_path):
    opt, *_ = make_pair(tmp_path, "opt")
    for target, says in ((random_ids(2, 60)[None], "positions"), (torch.full((1, 2, 3), 120), "vocabulary"), (torch.full((1, 2, 3), -1), "vocabulary")):
        with pytest.raises(ValueError, match=says):
            opt.loss(random_prefix(1, 10), target)
    assert opt.loss(random_prefix(1, 10), random_ids(6, 50).view(1, 6, 50))[1] == 300  # 310 positions in all, of which each caption counts 60


@pytest.mark.parametrize("variant", ["opt", "flan-t5"])
def test_only_minus_100_stands_for_no_target(tmp_path, variant):
    ours, *_ = make_pair(tmp_path, variant)
    with pytest.raises(ValueError, match="ids from -1"):
        ours.loss(random_prefix(1, 4), torch.tensor([[4, 5, -1]]))


def test_there_is_no_second_derivative_of_a_frozen_heads_loss(tmp_path):
    opt, *_ = make_pair(tmp_path, "opt")
    x = random_prefix(1, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(opt.loss(x, random_ids(1, 5))[0], x, create_graph=True)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_the_loss_of_a_frozen_head_is_taken_a_block_of_rows_at_a_time(monkeypatch, rows):
    head, ids = nn.Linear(16, 50, bias=False).double(), torch.randint(50, (2, 10))
    ids[0, 4:], ids[1, 9] = -100, -100
    results, seen, slices, linear, log_softmax = [], [], [], nn.functional.linear, torch.Tensor.log_softmax
    monkeypatch.setattr(language_models.FrozenHeadLoss, "BLOCK", {"cpu": 8 * 50 * rows})
    monkeypatch.setattr(language_models.FrozenHeadLoss, "SLICE", {"cpu": 4 * 50 * 2})

    def count(x, weight, *bias):
        assert not any(logits() is not None for _, logits in seen), "two blocks of logits at a time"
        seen.append((len(x), weakref.ref(logits := linear(x, weight, *bias))))
        return logits

    monkeypatch.setattr(language_models.F, "linear", count)
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: slices.append(len(x)) or log_softmax(x, dim))
    for frozen in (True, False):
        x = random_prefix(2, 10, 16).double().requires_grad_()
        loss, tokens = language_models.caption_loss(head.requires_grad_(not frozen), x, ids)
        (loss * 3).backward()
        results.append((loss, x.grad))
        if frozen:
            heights = [height for height, _ in seen]
            assert tokens == 13 and max(heights) <= rows and max(slices) <= 2 and sum(heights) == sum(slices) == 20
    assert relative_error(results[0][0], results[1][0]) < 1e-6 and relative_error(results[0][1], results[1][1]) < 1e-6
    assert results[0][1][0, 4:].abs().max() == 0
    with torch.no_grad():
        assert relative_error(language_models.caption_loss(head.requires_grad_(False), x, ids)[0], results[1][0]) < 1e-6


def test_bf16_is_as_near_to_float32_as_transformers_bf16_is(pair):
    ours, theirs, folder = pair
    prefix, target, low = random_prefix(4, 9), random_ids(4, 6), load_llm(folder, dtype=torch.bfloat16)
    exact = ours(prefix, target)
    error = relative_error(low(prefix, target).float(), exact)
    their_error = relative_error(their_logits(copy.deepcopy(theirs).bfloat16(), prefix.bfloat16(), target).float(), exact)
    assert low.lm_head.weight.dtype == torch.bfloat16 and 0 < error < 1.5 * their_error


# ----------------------------------------------------------------------------------------------------------- generation

GENERATION = [(1, 1.0, 0), (1, 1.0, 4), (3, 1.0, 0), (5, 1.0, 4), (5, -1.0, 0), (3, -1.0, 3)]


@pytest.mark.parametrize("variant", ["opt", "llama-3.1", "qwen3", "flan-t5"])
@pytest.mark.parametrize("num_beams, length_penalty, min_new_tokens", GENERATION)
def test_generation_equals_transformers(tmp_path, variant, num_beams, length_penalty, min_new_tokens):
    """Rows side by side, with holes in their prefixes, against each row alone."""
    ours, theirs, _ = make_pair(tmp_path, variant)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    ends = [5, 17, 30]  # three end marks, so that random models end early, at different lengths
    for seed in range(6):
        prefix = random_prefix(3, 5, seed=seed)
        captions = ours.generate(prefix, mask, max_new_tokens=9, num_beams=num_beams, length_penalty=length_penalty,
                                 min_new_tokens=min_new_tokens, stop=[(e,) for e in ends])
        for row in range(3):
            theirs_ids = theirs.generate(inputs_embeds=prefix[row : row + 1, mask[row]], max_new_tokens=9, num_beams=num_beams,
                                         length_penalty=length_penalty, min_new_tokens=min_new_tokens, eos_token_id=ends,
                                         pad_token_id=1, do_sample=False)[0].tolist()
            theirs_ids = theirs_ids[int(theirs.config.is_encoder_decoder) :]  # its first token starts the decoder
            theirs_ids = theirs_ids[: next((i for i, t in enumerate(theirs_ids) if t in ends), len(theirs_ids))]
            assert captions[row] == theirs_ids


def test_generation_continues_what_forward_predicts(pair):
    """Greedy ids are the arg max of the logits of the same text read at once, also where transformers cannot generate."""
    ours, prefix = pair[0], random_prefix(4, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    ids = torch.tensor(ours.generate(prefix, mask, max_new_tokens=12, stop=()))
    assert torch.equal(ours(prefix, ids, mask).argmax(-1), ids)


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


class EndsWith(StoppingCriteria):
    def __init__(self, stop):
        self.stop = [torch.tensor(s) for s in stop]

    def __call__(self, ids, scores, **_):
        return torch.stack([(ids[:, -len(s) :] == s).all(1) if len(s) <= ids.shape[1] else ids[:, 0] < 0 for s in self.stop]).any(0)


@pytest.mark.parametrize("variant", ["opt", "llama-1", "flan-t5"])
@pytest.mark.parametrize("num_beams, length_penalty", [(2, 1.0), (5, -1.0)])
def test_beams_end_at_stop_sequences_as_transformers_do(tmp_path, variant, num_beams, length_penalty):
    ours, theirs, _ = make_pair(tmp_path, variant)
    options, early = dict(max_new_tokens=12, num_beams=num_beams, length_penalty=length_penalty), 0
    for seed in range(6):
        prefix = random_prefix(1, 5, seed=seed)
        whole, = ours.generate(prefix, **options, stop=())
        stop = [tuple(whole[3:5]), tuple(whole[6:9])]
        theirs_ids = theirs.generate(inputs_embeds=prefix, **options, eos_token_id=None, pad_token_id=1, do_sample=False,
                                     stopping_criteria=StoppingCriteriaList([EndsWith(stop)]))[0].tolist()
        ids, = ours.generate(prefix, **options, stop=stop)
        assert ids == language_models.without_end(theirs_ids[int(theirs.config.is_encoder_decoder) :], stop)
        early += len(ids) < 12
    assert early


def test_no_stop_sequence_is_completed_before_min_new_tokens(pair):
    ours, prefix = pair[0], random_prefix(4, 5)
    for whole, row in zip(ours.generate(prefix, max_new_tokens=9, stop=()), prefix):
        for num_beams in (1, 3):
            ids, = ours.generate(row[None], max_new_tokens=9, min_new_tokens=6, num_beams=num_beams, stop=[tuple(whole[2:4])])
            assert len(ids) >= 6 + 1 - 2


def test_the_nucleus_is_the_smallest_set_that_makes_up_top_p():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    for top_p, temperature, expected in ((0.7, 1.0, [5 / 8, 3 / 8, 0, 0]), (0.9, 1.0, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]), (1.0, 0.5, [0.685, 0.247, 0.062, 0.007])):
        shares = language_models.sample_next(logits, temperature, top_p).bincount(minlength=4) / 4000
        assert torch.allclose(shares, torch.tensor(expected), atol=0.03) and not shares[torch.tensor(expected) == 0].any()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_generates_under_autocast(pair, dtype):
    low = load_llm(pair[2], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(low.generate(random_prefix(1, 5), max_new_tokens=4, num_beams=2, stop=())[0]) == 4


def test_sampling_follows_the_nucleus(pair):
    """At a tiny top_p only the most probable token is left; at a high temperature the draws differ."""
    ours, prefix = pair[0], random_prefix(1, 5).expand(8, -1, -1)
    assert ours.generate(prefix, temperature=1.0, top_p=1e-6) == ours.generate(prefix)
    torch.manual_seed(0)
    assert len(set(map(tuple, ours.generate(prefix, temperature=9.0)))) > 1


@pytest.mark.parametrize("variant", ["opt", "llama-3.1", "flan-t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_decoding_step_is_one_static_graph(tmp_path, monkeypatch, variant, num_beams):
    """As on GPUs, where a step looks at all columns of the cache."""
    ours, prefix = make_pair(tmp_path, variant)[0], random_prefix(2, 5)
    ids, graphs = ours.generate(prefix, max_new_tokens=12, num_beams=num_beams), []
    monkeypatch.setattr(language_models.Cache, "width", lambda cache: cache.keys.shape[-2])

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ours.step = torch.compile(ours.step, fullgraph=True, dynamic=False, backend=count)
    assert ours.generate(prefix, max_new_tokens=12, num_beams=num_beams) == ids and len(graphs) == 1


# ------------------------------------------------------------------------------------------- checkpoints as they really are


def logits(folder, **options):
    with torch.no_grad():
        return load_llm(folder, dtype=torch.float32, **options)(random_prefix(1, 4), torch.tensor([[5, 6]]))


def edit_config(folder, drop=(), **new):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in (config | new).items() if key not in drop}))


def edit_tensors(folder, edit):
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_word_embeddings_are_read_in_the_space_of_soft_prompts(pair):
    ours, _, folder = pair
    assert torch.allclose(read_word_embeddings(folder), ours.embed(torch.arange(120)), atol=1e-6)


def test_reading_word_embeddings_reads_nothing_else(pair, monkeypatch):
    folder, read = pair[2], []
    original = language_models.read_file

    def watched(file, wanted):
        for name, tensor in original(file, wanted):
            read.extend([name] if tensor is not None else [])
            yield name, tensor

    monkeypatch.setattr(language_models, "read_file", watched)
    read_word_embeddings(folder)
    assert read and all(any(part in name for part in ("embed_tokens", "shared", "project_in")) for name in read)


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


def test_shards_and_an_llm_inside_a_blip2_folder_load(pair, tmp_path):
    folder = pair[2]
    tensors, reference = load_file(folder / "model.safetensors"), logits(folder)
    tensors = {"language_model." + name: tensor for name, tensor in tensors.items()} | {"query_tokens": torch.zeros(1)}
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, part in halves.items() for n in part}}))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2", "text_config": config}))
    assert relative_error(logits(tmp_path), reference) < 1e-6
    assert torch.equal(read_word_embeddings(tmp_path), read_word_embeddings(folder))


@pytest.mark.parametrize("variant", ["opt", "smollm2", "t5, tied"])
@pytest.mark.parametrize("kept", ["words", "head", "both"])
def test_tied_files_hold_either_name_or_both(tmp_path, variant, kept):
    ours, _, folder = make_pair(tmp_path, variant)
    reference, words = logits(folder), load_file(folder / "model.safetensors")[ours.WORDS]
    names = {"words": [ours.WORDS], "head": ["lm_head.weight"], "both": [ours.WORDS, "lm_head.weight"]}[kept]
    others = lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name and name not in ("shared.weight", "lm_head.weight")}
    edit_tensors(folder, lambda tensors: others(tensors) | {name: words for name in names})
    again = load_llm(folder, dtype=torch.float32)
    assert torch.equal(logits(folder), reference) and torch.equal(read_word_embeddings(folder), words)
    assert again.lm_head.weight is again.get_parameter(ours.WORDS)


def test_a_head_of_its_own_stays_in_a_file_that_is_said_to_be_tied(tmp_path):
    folder = make_pair(tmp_path, "llama-1")[2]
    reference = logits(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(folder), reference)


@pytest.mark.parametrize("variant", ["llama-1", "flan-t5"])
def test_a_head_that_is_missing_is_missed(tmp_path, variant):
    folder = make_pair(tmp_path, variant)[2]
    edit_tensors(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_llm(folder)


def test_a_t5_of_todays_writer_loads(tmp_path):
    """transformers 5 writes tie_word_embeddings = true for any T5, and scale_decoder_outputs = false for those that had it false."""
    _, theirs, folder = make_pair(tmp_path / "a", "flan-t5")
    theirs.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["tie_word_embeddings"] and not written["scale_decoder_outputs"]
    if not (tmp_path / "b" / "model.safetensors").read_bytes().count(b'"lm_head.weight"'):
        save_file(load_file(folder / "model.safetensors"), tmp_path / "b" / "model.safetensors")
    assert relative_error(logits(tmp_path / "b"), logits(folder)) < 1e-6


@pytest.mark.parametrize("variant, scaling", [("llama-1", None), ("llama, linear rope", dict(type="linear", factor=4.0)),
                                              ("llama-3.1", {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"})])
def test_the_older_spelling_of_rope_says_the_same(tmp_path, variant, scaling):
    folder = make_pair(tmp_path, variant)[2]
    reference, theta = logits(folder), json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
    edit_config(folder, drop=["rope_parameters", "dtype"], rope_theta=theta, rope_scaling=scaling, torch_dtype="float16")
    assert torch.equal(logits(folder), reference)


def test_stale_tensors_of_old_files_are_passed_over(tmp_path):
    folder = make_pair(tmp_path / "llama", "llama-1")[2]
    reference = logits(folder)
    edit_tensors(folder, lambda tensors: tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(3)})
    assert torch.equal(logits(folder), reference)
    folder = make_pair(tmp_path / "t5", "flan-t5")[2]
    reference = logits(folder)
    edit_tensors(folder, lambda tensors: tensors | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4)})
    assert torch.equal(logits(folder), reference)


LEFT_OUT = {"opt": ["do_layer_norm_before", "_remove_final_layer_norm", "activation_function", "word_embed_proj_dim", "enable_bias",
                    "layer_norm_elementwise_affine", "tie_word_embeddings"],
            "llama-1": ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "hidden_act", "attention_bias", "mlp_bias",
                        "tie_word_embeddings", "pretraining_tp"],
            "flan-t5": ["dense_act_fn", "is_gated_act", "decoder_start_token_id", "layer_norm_epsilon"]}


@pytest.mark.parametrize("variant", LEFT_OUT)
def test_fields_left_out_of_the_config_have_defaults(tmp_path, variant):
    folder = make_pair(tmp_path, variant)[2]
    reference = logits(folder)
    edit_config(folder, drop=LEFT_OUT[variant])
    assert torch.equal(logits(folder), reference)


@pytest.mark.parametrize("said", [dict(model_type="opt"), dict(model_type="llama"), dict(model_type="mistral"), dict(model_type="qwen2"),
                                  dict(model_type="qwen3", hidden_size=1024), dict(model_type="t5", feed_forward_proj="gated-gelu")])
def test_defaults_are_transformers_defaults(said):
    """A config.json that says hardly more than its type gives transformers' shapes, on the meta device."""
    config = AutoConfig.for_model(**said)
    with torch.device("meta"):
        theirs = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
        ours = language_models.ARCHITECTURES[said["model_type"]](said)
    rename = ours.checkpoint_name
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {rename(name): tensor.shape for name, tensor in theirs.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("variant, key, value", [
    ("opt", "activation_function", "gelu"), ("opt", "enable_bias", False), ("llama-1", "hidden_act", "gelu"),
    ("llama-1", "rope_scaling", {"type": "dynamic", "factor": 2.0}), ("llama-1", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
    ("llama-1", "partial_rotary_factor", 0.5), ("llama-1", "quantization_config", {"bits": 4}), ("flan-t5", "feed_forward_proj", "relu"),
    ("flan-t5", "dense_act_fn", "silu"), ("flan-t5", "is_gated_act", False)])
def test_what_is_not_implemented_is_refused_by_name(tmp_path, variant, key, value):
    folder = make_pair(tmp_path, variant)[2]
    edit_config(folder, drop=["rope_parameters"] if key != "rope_parameters" else [], **{key: value})
    named = {"rope_scaling": "rope_type = 'dynamic'", "rope_parameters": "rope_type = 'yarn'"}.get(key, f"{key} = ")
    with pytest.raises(ValueError, match=f"config.json: .*{named}.*not implemented"):
        load_llm(folder)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma2", None])
def test_an_unknown_architecture_is_refused_by_name(tmp_path, model_type):
    folder = make_pair(tmp_path, "llama-1")[2]
    edit_config(folder, model_type=model_type)
    with pytest.raises(ValueError, match=f"config.json: model_type {model_type!r}"):
        load_llm(folder)


def test_a_sliding_window_is_refused_where_it_would_matter(tmp_path):
    folder = make_pair(tmp_path, "mistral")[2]
    edit_config(folder, sliding_window=12)
    ours = load_llm(folder, dtype=torch.float32)
    assert ours(random_prefix(1, 8), random_ids(1, 5)).isfinite().all()  # 12 positions
    with pytest.raises(ValueError, match="13 positions .* 12"):
        ours(random_prefix(1, 8), random_ids(1, 6))
    with pytest.raises(ValueError, match="13 positions .* 12"):
        ours.generate(random_prefix(1, 8), max_new_tokens=6)
    folder = make_pair(tmp_path / "qwen2", "qwen2")[2]
    edit_config(folder, sliding_window=12)  # use_sliding_window is false
    assert load_llm(folder, dtype=torch.float32)(random_prefix(1, 8), random_ids(1, 6)).isfinite().all()
    edit_config(folder, drop=["sliding_window"], use_sliding_window=True)
    assert load_llm(folder).longest == 4096  # transformers' default


def test_pickles_with_code_are_never_run(tmp_path):
    folder = make_pair(tmp_path, "opt")[2]
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
    folder = make_pair(tmp_path, variant)[2]
    whole = load_file(folder / "model.safetensors")
    name = next(name for name in whole if name.endswith("layer_norm.weight") or name.endswith("layernorm.weight"))
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f"tensors missing, the first: {name}"):
        load_llm(folder)
    edit_tensors(folder, lambda tensors: tensors | {name: torch.zeros(7)})
    with pytest.raises(ValueError, match=rf"{name} is \(7,\), config.json says \(32,\)"):
        load_llm(folder)
    edit_tensors(folder, lambda tensors: whole | {"model.layers.9.unheard_of": torch.zeros(7)})
    with pytest.raises(ValueError, match="unknown tensors, the first: model.layers.9.unheard_of"):
        load_llm(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        load_llm(folder)


@pytest.mark.parametrize("prefix, target, says", [(random_prefix(1, 4)[:, :0], [[5]], "P >= 1"), (torch.zeros(1, 4, 31), [[5]], "32"),
                                                  (random_prefix(1, 4), [[5, 7, 120]], "from 5 to 120.* 0 to 119")])
def test_inputs_that_do_not_fit_are_refused(pair, prefix, target, says):
    with pytest.raises(ValueError, match=says):
        pair[0](prefix, torch.tensor(target))


@pytest.mark.parametrize("mask", [torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)])
def test_masks_that_do_not_fit_are_refused(pair, mask):
    for read in (lambda: pair[0](random_prefix(1, 4), random_ids(1, 3), mask), lambda: pair[0].generate(random_prefix(1, 4), mask)):
        with pytest.raises(ValueError, match="prefix_mask"):
            read()


@pytest.mark.parametrize("options", [dict(max_new_tokens=0), dict(num_beams=0), dict(num_beams=2, temperature=1.0), dict(temperature=-1.0), dict(top_p=1.5),
                                     dict(stop=(2,)), dict(stop=((),))])
def test_options_of_generate_that_make_no_sense_are_refused(pair, options):
    with pytest.raises(ValueError, match="generate: .*" + list(options)[-1]):
        pair[0].generate(random_prefix(1, 4), **options)


@pytest.mark.parametrize("variant, ends", [("opt", [(2,)]), ("llama-1", [(2,)]), ("flan-t5", [(1,)]), ("qwen2", [(2,)])])
def test_without_stop_sequences_the_eos_of_config_json_ends_a_text(tmp_path, variant, ends):
    folder = make_pair(tmp_path, variant)[2]
    assert load_llm(folder).stop == ends
    edit_config(folder, drop=["eos_token_id"])
    assert load_llm(folder).stop == ([] if variant == "qwen2" else ends)
    prefix = random_prefix(2, 5)
    whole = load_llm(folder, dtype=torch.float32).generate(prefix, stop=())
    edit_config(folder, eos_token_id=[whole[0][3], whole[1][2]])
    assert load_llm(folder, dtype=torch.float32).generate(prefix) == load_llm(folder, dtype=torch.float32).generate(
        prefix, stop=((whole[0][3],), (whole[1][2],))) != whole


def test_t5_in_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        load_llm(make_pair(tmp_path, "flan-t5")[2], dtype=torch.float16)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "{}"])
def test_a_damaged_index_is_named(tmp_path, index):
    folder = make_pair(tmp_path, "opt")[2]
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json: damaged"):
        load_llm(folder)


def test_a_text_longer_than_the_position_table_is_refused(tmp_path):
    ours = make_pair(tmp_path, "opt")[0]
    assert ours(random_prefix(1, 60), random_ids(1, 5)).isfinite().all()
    with pytest.raises(ValueError, match="65 positions .* more than this OPT's 64"):
        ours(random_prefix(1, 60), random_ids(1, 6))
    with pytest.raises(ValueError, match="65 positions"):
        ours.generate(random_prefix(1, 60), max_new_tokens=6)
