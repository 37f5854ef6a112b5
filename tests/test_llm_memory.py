"""Facts about what llm.py's FFNs read beside: in float64, as transformers' models with the same sum put in by
hooks; the identities are those of MemVP (arXiv 2405.05615)."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import make_llm_pair, random_ids, random_prefix, relative_error, their_logits

HOLES = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)


class Memory:
    """s act(h K^T) V, of keys and values (B,M,D)."""

    def __init__(self, keys, values, scale=0.5):
        self.keys = keys
        self.values = values
        self.scale = scale

    def __call__(self, h, activation):
        return self.scale * activation(h @ self.keys.transpose(1, 2)) @ self.values

    def rows(self, index):
        return Memory(self.keys[index], self.values[index], self.scale)


def random_memory(B, M=7, dtype=torch.float64, seed=5):
    keys = random_prefix(B, M, seed=seed).to(dtype).requires_grad_()
    values = random_prefix(B, M, seed=seed + 1).to(dtype).requires_grad_()
    return Memory(keys, values)


@contextlib.contextmanager
def put_into(theirs, read):
    """transformers' model, whose FFNs read this memory, too."""
    handles = []
    seen = {}

    def hook(module, args, output):
        activation = getattr(module, "act_fn", None) or module.act
        return output + read(args[0], activation)

    def fc1_hook(module, args):
        seen["input"] = args[0]

    def fc2_hook(module, args, output):
        h = seen["input"]
        rows = h.view(1, -1, h.shape[-1]) if h.ndim == 2 else h  # for OPT's FFN all tokens are one row
        return output + read(rows, F.relu).view(output.shape)

    for name, module in theirs.named_modules():
        if name.endswith((".mlp", ".DenseReluDense")):
            handles.append(module.register_forward_hook(hook))
        if name.endswith(".fc1"):
            handles.append(module.register_forward_pre_hook(fc1_hook))
        if name.endswith(".fc2"):
            handles.append(module.register_forward_hook(fc2_hook))
    yield theirs
    for handle in handles:
        handle.remove()
    assert handles


@pytest.fixture
def exact_pair(llm_pair):
    """Both models in float64."""
    return copy.deepcopy(llm_pair[0]).double(), copy.deepcopy(llm_pair[1]).double()


@pytest.mark.slow
def test_logits_and_gradients_equal_transformers_with_the_sum_put_in(exact_pair):
    """Rows side by side, with holes, against each row alone; frozen weights get no gradient."""
    ours, theirs = exact_pair
    prefix = random_prefix(3, 6).double().requires_grad_()
    target = random_ids(3, 4)
    memory = random_memory(3)
    logits = ours(prefix, target, HOLES, memory=memory)
    gradients = torch.autograd.grad(logits.square().sum(), [prefix, memory.keys, memory.values])
    for row in range(3):
        one = slice(row, row + 1)
        alone = prefix[one, HOLES[row]].detach().requires_grad_()
        row_memory = memory.rows(one)
        with put_into(theirs, row_memory):
            reference = their_logits(theirs, alone, target[one])
        assert relative_error(logits[one], reference) < 1e-6
        inputs = [alone, row_memory.keys, row_memory.values]
        expected = torch.autograd.grad(reference.square().sum(), inputs)
        assert relative_error(gradients[0][one, HOLES[row]], expected[0]) < 1e-6
        assert relative_error(gradients[1][one], expected[1]) < 1e-6
        assert relative_error(gradients[2][one], expected[2]) < 1e-6
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_the_loss_reads_memory_too(exact_pair):
    ours, _ = exact_pair
    prefix = random_prefix(3, 6).double()
    target = random_ids(3, 4)
    memory = random_memory(3)
    log_p = ours(prefix, target, HOLES, memory=memory).log_softmax(-1).gather(2, target[..., None])[..., 0]
    scored = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    for marks, expected in ((None, -log_p.sum()), (scored, -log_p[scored].sum())):
        loss, _ = ours.loss(prefix, target, HOLES, marks, memory)
        assert relative_error(loss, expected) < 1e-6


def test_captions_packed_behind_one_prefix_read_its_memory(exact_pair):
    ours, _ = exact_pair
    if ours.WORDS == "shared.weight":
        return
    prefix = random_prefix(2, 6).double()
    target = random_ids(6, 5).view(2, 3, 5)
    memory = random_memory(2)
    packed, _ = ours.loss(prefix, target, HOLES[:2], memory=memory)
    thrice = torch.tensor([0, 0, 0, 1, 1, 1])
    alone, _ = ours.loss(prefix[thrice], target.flatten(0, 1), HOLES[thrice], memory=memory.rows(thrice))
    assert relative_error(packed, alone) < 1e-6


def test_a_memory_without_values_changes_no_bit(llm_pair):
    ours, _, _ = llm_pair
    prefix = random_prefix(3, 6)
    target = random_ids(3, 4)
    memory = random_memory(3, dtype=torch.float32)
    memory.values = torch.zeros_like(memory.values)
    with torch.no_grad():
        assert torch.equal(ours(prefix, target, HOLES, memory=memory), ours(prefix, target, HOLES))


@pytest.mark.parametrize("variant", ["opt", "opt-350m", "t5 v1.0"])
def test_memory_of_a_plain_ffn_is_an_ffn_with_more_hidden_units(tmp_path, variant):
    """W1' = [W1; K] and W2' = [W2, s V^T]."""
    ours, _, _ = make_llm_pair(tmp_path, variant)
    ours.double()
    memory = random_memory(1)
    x = random_prefix(1, 5).double()
    if variant.startswith("opt"):
        layer = ours.layers[1]
        result = layer.feed_forward(x, memory)
        first, second = layer.fc1, layer.fc2
        first.bias.data = F.pad(first.bias.data, (0, 7))
    else:
        ffn = ours.decoder.block[1].layer[-1]["DenseReluDense"]
        result = ffn(x, memory)
        first, second = ffn.wi, ffn.wo
    first.weight.data = torch.cat([first.weight, memory.keys[0]])
    second.weight.data = torch.cat([second.weight, memory.scale * memory.values[0].T], dim=1)
    extended = layer.feed_forward(x, None) if variant.startswith("opt") else ffn(x, None)
    assert relative_error(result, extended) < 1e-12


def test_memory_of_a_gated_ffn_passes_the_gate_open(tmp_path):
    """W_gate' = [W_gate; K], W_up' = [W_up; 0] with bias [b; 1], W_down' = [W_down, s V^T]."""
    ours, _, _ = make_llm_pair(tmp_path, "llama, biases")
    layer = ours.double().layers[1]
    memory = random_memory(1)
    x = random_prefix(1, 5).double()
    result = layer.feed_forward(x, memory)
    gate, up, down = layer.mlp["gate_proj"], layer.mlp["up_proj"], layer.mlp["down_proj"]
    gate.weight.data = torch.cat([gate.weight, memory.keys[0]])
    gate.bias.data = F.pad(gate.bias.data, (0, 7))
    up.weight.data = F.pad(up.weight.data, (0, 0, 0, 7))
    up.bias.data = F.pad(up.bias.data, (0, 7), value=1.0)
    down.weight.data = torch.cat([down.weight, memory.scale * memory.values[0].T], dim=1)
    assert relative_error(result, layer.feed_forward(x, None)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("variant", ["opt", "llama-3.1", "qwen3", "flan-t5", "t5 v1.0"])
def test_generation_with_memory_equals_transformers(tmp_path, variant, num_beams):
    """Rows side by side, each with holes and a memory of its own, against each row alone: all beams of a row
    read its memory."""
    ours, theirs, _ = make_llm_pair(tmp_path, variant)
    options = dict(max_new_tokens=9, num_beams=num_beams, min_new_tokens=3)
    ends = dict(eos_token_id=[5, 17], pad_token_id=1, do_sample=False)
    started = int(theirs.config.is_encoder_decoder)
    changed = 0
    for seed in range(3):
        prefix = random_prefix(3, 6, seed=seed)
        memory = random_memory(3, dtype=torch.float32, seed=seed)
        texts = ours.generate(prefix, HOLES, **options, stop=((5,), (17,)), memory=memory)
        changed += texts != ours.generate(prefix, HOLES, **options, stop=((5,), (17,)))
        for row in range(3):
            alone = prefix[row : row + 1, HOLES[row]]
            with put_into(theirs, memory.rows(slice(row, row + 1))):
                their_ids = theirs.generate(inputs_embeds=alone, **options, **ends)[0].tolist()[started:]
            assert texts[row] == list(itertools.takewhile(lambda token: token not in (5, 17), their_ids))
    assert changed


def test_cached_decoding_reads_what_forward_reads(llm_pair):
    ours, _, _ = llm_pair
    prefix = random_prefix(3, 6)
    memory = random_memory(3, dtype=torch.float32)
    ids = torch.tensor(ours.generate(prefix, HOLES, max_new_tokens=12, stop=(), memory=memory))
    assert torch.equal(ours(prefix, ids, HOLES, memory=memory).argmax(-1), ids)


@pytest.mark.parametrize("variant", ["opt", "llama-3.1"])
def test_memory_goes_with_the_rows_of_a_cache(tmp_path, variant):
    ours, _, _ = make_llm_pair(tmp_path, variant)
    prefix = random_prefix(3, 6)
    question = random_prefix(4, 3, seed=7)
    memory = random_memory(3, dtype=torch.float32)
    index = torch.tensor([2, 0, 1, 2])
    whole = torch.cat([prefix[index], question], dim=1)
    whole_mask = F.pad(HOLES[index], (0, 3), value=True)
    expected = ours.generate(whole, whole_mask, num_beams=2, stop=(), memory=memory.rows(index))
    cache = ours.read_prefix(prefix, HOLES, room=8, memory=memory)
    assert ours.generate(question, num_beams=2, stop=(), cache=cache.rows(index)) == expected
    alone = cache.rows([1])
    alone.extend(question[2:3, :1])
    stream = ours.stream(question[2:3, 1:], max_new_tokens=6, stop=(), cache=alone)
    expected = ours.generate(whole[2:3], whole_mask[2:3], max_new_tokens=6, stop=(), memory=memory.rows([1]))
    assert [list(stream)] == expected
