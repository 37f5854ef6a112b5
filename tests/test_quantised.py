"""Facts about llm.py's quantised frozen weights: what torchao and bitsandbytes say of the same matrices, and
that nothing but the numbers of the blocks' matrices changes."""

import json
import threading

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bitsandbytes
from conftest import (
    LLMS,
    arguments,
    edit_config,
    edit_tensors,
    make_model,
    random_ids,
    random_prefix,
    relative_error,
    values,
)
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import estimate
import export
import finetune
import hub
import llm as language_models
import qformer
import sample
import train
import transfer
import vpgtrans
from llm import QuantisedLinear, decode, decode_multiply, load_llm

WEIGHTS = ["int8", "nf4"]


def random_matrix(out, width, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def quantised_linear(weights, matrix, bias=None):
    """What load_llm makes of one linear layer."""
    with torch.device("meta"):
        layer = QuantisedLinear(nn.Linear(*matrix.T.shape, bias=bias is not None), weights)
    tensors = layer.take(matrix) | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False)


# ------------------------------------------------------------------------------ as other people's


def test_int8_codes_and_scales_equal_torchaos():
    matrix = random_matrix(96, 160)
    matrix[3] = 0
    matrix[5, 7] = 40  # an outlier
    theirs = nn.Sequential(nn.Linear(160, 96, bias=False))
    theirs[0].weight.data.copy_(matrix)
    quantize_(theirs, Int8WeightOnlyConfig())
    layer = quantised_linear("int8", matrix)
    assert torch.equal(layer.weight, theirs[0].weight.qdata)
    assert torch.equal(layer.weight_scale, theirs[0].weight.scale)
    x = random_matrix(5, 160, seed=1)
    assert relative_error(layer(x), theirs(x)) < 1e-6
    # per-row scales reach past the rows that are encoded at a time
    layer.ROWS = 7
    assert torch.equal(layer.take(matrix)["weight"], layer.weight)


def test_nf4_codes_scales_and_products_equal_bitsandbytes():
    matrix = random_matrix(96, 192)  # bitsandbytes' CPU kernel goes astray where a block crosses rows
    matrix[3] = 0
    matrix[5, 7] = 40
    codes, state = bitsandbytes.quantize_4bit(matrix, quant_type="nf4", blocksize=64)
    layer = quantised_linear("nf4", matrix)
    assert torch.allclose(language_models.nf4_numbers(), state.code, rtol=0, atol=2e-7)
    assert torch.equal(layer.weight.flatten(), codes.flatten())
    assert torch.equal(layer.weight_scale.flatten(), state.absmax)
    whole = bitsandbytes.dequantize_4bit(codes, state)
    assert relative_error(decode(layer.weight, layer.weight_scale, torch.float32), whole) < 1e-6
    x = random_matrix(5, 192, seed=1)
    assert relative_error(layer(x), F.linear(x, whole)) < 1e-6
    layer.ROWS = 8
    assert torch.equal(layer.take(matrix)["weight"], layer.weight)


# ------------------------------------------------------------------------------------- one product


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_decoded_matrix(weights, dtype):
    bias = random_matrix(1, 96)[0].to(dtype)
    layer = quantised_linear(weights, random_matrix(96, 160), bias)
    matrix = decode(layer.weight, layer.weight_scale, dtype)
    x = random_matrix(15, 160, seed=1).view(3, 5, 160).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, F.linear(x, matrix, bias)) < (0.01 if dtype == torch.bfloat16 else 1e-6)
    upstream = random_matrix(15, 96, seed=2).view(3, 5, 96).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, upstream @ matrix)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_autocast_says_the_arithmetic_as_for_a_linear_layer(weights):
    """On GPUs norms return float32 under it."""
    layer = quantised_linear(weights, random_matrix(96, 160), torch.ones(96))
    x = random_matrix(5, 160, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(160, 96)(x).dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_operation_is_one_that_torch_compiles_and_differentiates(weights):
    """torch's own checks of an operation: its gradient, its shapes without weights, what it may change."""
    layer = quantised_linear(weights, random_matrix(6, 64))
    x = random_matrix(4, 64, seed=1).requires_grad_()
    torch.library.opcheck(decode_multiply, (x, layer.weight, layer.weight_scale, False))
    back = random_matrix(4, 6, seed=1).requires_grad_()
    torch.library.opcheck(decode_multiply, (back, layer.weight, layer.weight_scale, True))
    exact = random_matrix(2, 64, seed=3).double().requires_grad_()
    torch.autograd.gradcheck(lambda x: decode_multiply(x, layer.weight, layer.weight_scale, False), exact)


def test_a_matrix_that_blocks_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="33 x 30"):
        quantised_linear("nf4", torch.zeros(33, 30))


# --------------------------------------------------------------------------------- language models


# biases, tied heads, shared word embeddings, fewer key-value heads, norms of their own
SOME = ["opt", "opt-350m", "smollm2", "qwen3", "flan-t5", "t5, tied"]


@pytest.fixture(params=SOME, scope="module")
def folder(request, tmp_path_factory):
    """A random checkpoint in bf16, as those on the Hub are."""
    folder = tmp_path_factory.mktemp("llm")
    make_model(folder, LLMS[request.param])
    edit_tensors(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    return folder


def decoded(llm, folder):
    """The LLM of a folder, not quantised, with the matrices of a quantised one."""
    whole = load_llm(folder, dtype=torch.float32)
    for name, module in language_models.quantised(llm):
        matrix = decode(module.weight, module.weight_scale, torch.float32)
        whole.get_parameter(f"{name}.weight").data.copy_(matrix)
    return whole


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_quantised_llm_is_the_llm_with_decoded_matrices(folder, weights):
    """Logits, loss, gradient and beams; no weight gets a gradient."""
    ours = load_llm(folder, dtype=torch.float32, weights=weights)
    modules = [module for block in ours.layers for module in block.modules()]
    assert not [module for module in modules if isinstance(module, nn.Linear)]
    assert isinstance(ours.lm_head, nn.Linear)
    whole = decoded(ours, folder)
    a = random_prefix(2, 6).requires_grad_()
    b = random_prefix(2, 6).requires_grad_()
    mask = torch.tensor([[True] * 6, [False] + [True] * 5])
    target = random_ids(2, 5)
    assert relative_error(ours(a, target, mask), whole(b, target, mask)) < 1e-5
    one, _ = ours.loss(a, target, mask)
    other, _ = whole.loss(b, target, mask)
    one.backward()
    other.backward()
    assert relative_error(one, other) < 1e-5
    assert relative_error(a.grad, b.grad) < 1e-5
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    options = dict(max_new_tokens=5, num_beams=3)
    assert ours.generate(a.detach(), mask, **options) == whole.generate(b.detach(), mask, **options)
    ours.loss(a, target)[0].backward()  # what inference has made is used in training


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bf16_with_and_without_autocast(folder, weights):
    ours = load_llm(folder, weights=weights)
    exact = decoded(ours, folder)
    whole = decoded(ours, folder).bfloat16()
    prefix = random_prefix(2, 6)
    target = random_ids(2, 5)
    reference = exact(prefix, target)
    error = relative_error(whole(prefix, target).float(), reference)
    plain = ours(prefix, target)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ours(prefix, target)
    for logits in (plain, under_autocast):
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits.float(), reference) < max(0.02, 1.5 * error)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_fingerprints_are_those_of_the_checkpoint(folder, weights):
    whole = load_llm(folder)
    ours = load_llm(folder, weights=weights)
    expected = hub.fingerprint(dict(whole.named_parameters()))
    assert hub.fingerprint(ours.as_read()) == hub.fingerprint(whole.as_read()) == expected


def test_captions_packed_behind_one_prefix(tmp_path):
    make_model(tmp_path, LLMS["llama-3.1"])
    ours = load_llm(tmp_path, dtype=torch.float32, weights="nf4")
    whole = decoded(ours, tmp_path)
    prefix = random_prefix(2, 6)
    target = random_ids(6, 5).view(2, 3, 5)
    assert relative_error(ours.loss(prefix, target)[0], whole.loss(prefix, target)[0]) < 1e-5


def kept_and_gradient(llm):
    """How many numbers each tensor has that is kept for the backward pass, parameters aside; the loss; its
    gradient."""
    own = {parameter.untyped_storage()._cdata for parameter in llm.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept.append(tensor.numel())
        return tensor

    prefix = random_prefix(1, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = llm.loss(prefix, random_ids(1, 2))
    loss.backward()
    return kept, loss.detach(), prefix.grad


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_compiled_blocks_keep_no_decoded_matrix(tmp_path, weights):
    """For the backward pass torch.compile would rather keep a matrix than make it twice. The backend cuts the
    graph in two as the default one does, and leaves out the code."""
    make_model(tmp_path, LLMS["llama-1"])
    llm = load_llm(tmp_path, dtype=torch.float32, weights=weights)
    del llm.layers[1:]
    kept, loss, gradient = kept_and_gradient(llm)
    assert 0 < max(kept) < 32 * 32  # 4 positions of 48 numbers; the matrices are 32 x 32 and 32 x 48
    llm.layers[0].compile(backend="aot_eager_decomp_partition")
    kept, same_loss, same_gradient = kept_and_gradient(llm)
    assert 0 < max(kept) < 32 * 32
    assert relative_error(same_loss, loss) < 1e-5
    assert relative_error(same_gradient, gradient) < 1e-5


# ------------------------------------------------------------------------------------------- bytes


def seven_b():
    """LLaMA-7B's shapes, two blocks of it."""
    config = dict(model_type="llama", num_hidden_layers=2)
    with torch.device("meta"):
        return language_models.LLaMA(config).to("meta", torch.bfloat16)


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.53), ("nf4", 0.31)])
def test_bytes_of_a_7bs_matrices(weights, most):
    llm = seven_b()
    before = sum(parameter.nbytes for parameter in llm.layers.parameters())
    language_models.quantise_blocks(llm, weights)
    after = sum(parameter.nbytes for parameter in llm.layers.parameters())
    assert after < most * before
    assert after > most / 1.11 * before  # or the bytes were not counted


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_dry_run_counts_the_bytes_that_are_loaded(world, folder, weights):
    args = train.parse_arguments(["--src", str(world[0]), "--tgt", str(folder), "--llm-weights", weights])
    place = hub.Place("", folder, folder, folder, folder)
    shapes = transfer.shape_model(args, hub.resolve(args.src, "shapes"), place)
    loaded = load_llm(folder, weights=weights)
    expected = {name: (p.shape, p.dtype) for name, p in loaded.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in shapes.llm.named_parameters()} == expected


@pytest.mark.parametrize("weights", WEIGHTS)
def test_operations_and_activations_are_those_of_the_whole_llm(weights):
    prefix = torch.empty(2, 8, 4096, device="meta", requires_grad=True)
    batch = {"prompt_ids": prefix, "target_ids": torch.zeros(2, 6, dtype=torch.long, device="meta")}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm = seven_b().requires_grad_(False)

        def forward(self, prompt_ids, target_ids):
            return self.llm.loss(prompt_ids, target_ids)

    model = Model()
    whole = estimate.trace(model, batch)
    language_models.quantise_blocks(model.llm, weights)
    step = estimate.trace(model, batch)
    assert step.operations == whole.operations
    assert step.kept == whole.kept
    needs = estimate.memory(model, step, micro_batch=3)
    assert needs["a quantised matrix at work"] == 4 * 4096 * 11008
    assert needs["frozen weights"] == sum(parameter.nbytes for parameter in model.llm.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "share"), [("int8", 0.53), ("nf4", 0.31)])
def test_while_loading_no_more_than_one_tensor_is_whole(tmp_path, weights, share):
    """What is alive at any time is what is quantised already, and what becomes of one tensor."""
    options = LLMS["llama-1"] | dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    make_model(tmp_path, options)
    edit_tensors(tmp_path, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    load_llm(tmp_path, weights=weights)  # what is imported and cached by then does not count
    before = written_memory()
    most = before
    ended = threading.Event()

    def watch():
        nonlocal most
        while not ended.wait(0.0005):
            most = max(most, written_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    llm = load_llm(tmp_path, weights=weights)
    ended.set()
    watcher.join()
    one = 1024 * 512
    kept = sum(parameter.nbytes for parameter in llm.parameters())
    assert kept < share * size * 1.05
    assert most - before < kept + 12 * one < 0.7 * size  # three of float32 on the way


def written_memory():
    """Bytes of this process that are not pages of files (Linux)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------ damage


def test_a_misshapen_or_missing_matrix_is_named(tmp_path):
    make_model(tmp_path, LLMS["opt"])
    name = "model.decoder.layers.0.fc1.weight"
    edit_tensors(tmp_path, lambda tensors: tensors | {name: torch.zeros(64, 30)})
    with pytest.raises(ValueError, match=r"0\.fc1\.weight is \(64, 30\), config.json says \(64, 32\)"):
        load_llm(tmp_path, weights="nf4")
    edit_tensors(tmp_path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"missing, the first: model\.decoder\.layers\.0\.fc1\.weight"):
        load_llm(tmp_path, weights="nf4")


@pytest.mark.parametrize("variant", ["flan-t5", "llama-1"])
def test_outliers_that_int8_cannot_stand_are_refused(tmp_path, variant):
    """One hidden unit of an FFN, a thousand times as large behind as the others."""
    make_model(tmp_path, LLMS[variant])
    behind = ("layers.1.mlp.down_proj.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight")

    def enlarge(tensors):
        for name, tensor in tensors.items():
            if name.endswith(behind):
                tensor[:, 5] *= 1000
        return tensors

    load_llm(tmp_path, weights="int8")
    edit_tensors(tmp_path, enlarge)
    with pytest.raises(ValueError, match=r"(wo|down_proj)\.weight: int8 would make zeros of \d\d% .* nf4"):
        load_llm(tmp_path, weights="int8")
    load_llm(tmp_path, weights="nf4")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_checkpoints_that_others_have_quantised_name_the_way_out(tmp_path, method):
    make_model(tmp_path, LLMS["llama-1"])
    edit_config(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match="not quantised; --llm-weights int8 or nf4"):
        load_llm(tmp_path)


# -------------------------------------------------------------------------------------- the commands


@pytest.mark.slow
def test_a_run_trains_resumes_and_answers_as_it_was_trained(world, tmp_path, capsys, monkeypatch, refused):
    out = tmp_path / "run"
    argv = [*arguments(world, out), "--llm-weights", "nf4"]
    train.main(argv)
    said = capsys.readouterr().out
    assert "in nf4" in said
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["llm_weights"] == "nf4"
    whole = load_llm(world[1])
    assert config["llm"]["fingerprint"] == hub.fingerprint(dict(whole.named_parameters()))
    train.main([*arguments(world, tmp_path / "whole")])
    assert values(out, "loss") != values(tmp_path / "whole", "loss")
    refused(train.main, [*argv[:-1], "int8", "--resume"], "--llm-weights was nf4")

    for weights, expected in ((None, "nf4"), ("full", None), ("int8", "int8")):
        model, _ = transfer.load_model(str(out), weights=weights)
        assert model.llm.weights == expected
    model, _ = transfer.load_model(str(world[0]))  # a BLIP-2
    assert model.llm.weights is None
    export.export(str(out), tmp_path / "exported")
    assert "written is the LLM of its checkpoint in bf16" in capsys.readouterr().out
    exported = load_llm(tmp_path / "exported")
    for one, other in zip(exported.layers.parameters(), whole.layers.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_memvp_beside_a_quantised_llm(memvp_world, tmp_path, capsys):
    clip, llm, questions = memvp_world
    models = ["--llm", str(llm), "--vit", str(clip), "--llm-weights", "int8"]
    argv = [*models, "--memvp", f"scienceqa={questions}", "--out", str(tmp_path), "--batch-size", "4",
            "--steps", "2", "--rows", "20", "--val-samples", "4", "--workers", "0", "--precision", "fp32"]
    finetune.main([*argv, "--dry-run", "l4"])
    assert "a quantised matrix at work" in capsys.readouterr().out
    finetune.main(argv)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = load_llm(llm, dtype=torch.float32)
    assert config["llm"]["fingerprint"] == hub.fingerprint(dict(whole.named_parameters()))
    model, _ = transfer.load_model(str(tmp_path))
    assert model.llm.weights == "int8"
    image = questions / "images" / "test" / "20" / "image.png"
    ask = [str(image), "--model", str(tmp_path), "--prompt", "Which colour?"]
    for weights in ("full", "nf4"):
        sample.main([*ask, "--llm-weights", weights])
        assert str(image) in capsys.readouterr().out


def test_a_card_too_small_names_what_takes_less():
    with torch.device("meta"):
        vpg = qformer.VPG({"vision_config": {}, "qformer_config": {}})
        llm = language_models.LLaMA(dict(model_type="llama", num_hidden_layers=2))
        model = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm).to("meta", torch.bfloat16)
    step = estimate.Step(operations=1e12, kept=1e9, logits=1e6)
    with pytest.raises(ValueError, match=r"need \d+\.\d GB .* int8 or nf4, --shard .* language model"):
        estimate.largest_micro_batch(model, step, 1e9)
    language_models.quantise_blocks(model.llm, "nf4")
    with pytest.raises(ValueError, match=r"use a smaller language model"):
        estimate.largest_micro_batch(model, step, 1e9)
