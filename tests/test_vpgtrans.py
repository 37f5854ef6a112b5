"""Facts about vpgtrans.py: word converter, merged projector, the model's loss, what trains in each stage."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA_CONFIG, OPT_CONFIG, T5_CONFIG, make_blip2, relative_error
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from llm import load_llm
from qformer import load_projector, load_vpg
from vpgtrans import (
    IMAGE,
    PADDING,
    STAGES,
    VisualLLM,
    enter_stage,
    fit_to_captions,
    fit_word_converter,
    learning_rate,
    merge,
    parameter_groups,
    shared_tokens,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(world):
    source, target, _ = world
    vpg = load_vpg(source, dtype=torch.float32)
    return VisualLLM(vpg, nn.Linear(32, 32), load_llm(target, dtype=torch.float32))


# ------------------------------------------------------------------------------ converter and merge


def test_shared_tokens_are_those_spelled_alike():
    source = {b" cat": 5, b"dog": 4, b"red": 9}
    target = {b"red": 1, b" cat": 7, b" dog": 2}
    src_ids, tgt_ids = shared_tokens(source, target)
    assert src_ids.tolist() == [5, 9]
    assert tgt_ids.tolist() == [7, 1]


def float64_solution(src, tgt, weight, ridge):
    """Weighted ridge regression with a bias by the normal equations of the augmented problem, in float64."""
    src = src.double()
    tgt = tgt.double()
    weight = weight.double() / weight.double().sum()
    X = torch.cat([src, torch.ones(len(src), 1, dtype=torch.float64)], dim=1)
    centred = src - weight @ src
    penalty = torch.eye(src.shape[1] + 1, dtype=torch.float64) * ridge * (weight @ centred**2).mean()
    penalty[-1, -1] = 0
    solution = torch.linalg.solve(X.T @ (weight[:, None] * X) + penalty, X.T @ (weight[:, None] * tgt))
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_converter_is_the_weighted_ridge_regression(ridge):
    """Embeddings with a common mean and very unequal weights, as real ones have; more than one block."""
    src = random(9000, 700) * 0.05 + 0.3 * random(700, seed=1)
    tgt = src @ random(700, 90, seed=2) + 0.1 * random(9000, 90, seed=3) - 1.0
    weight = torch.rand(9000, generator=torch.Generator().manual_seed(4)) ** 8 * 1000
    converter = fit_word_converter(src, tgt, weight, ridge=ridge)
    W, b = float64_solution(src, tgt, weight, ridge)
    assert relative_error(converter.weight.double(), W) < 1e-4
    assert relative_error(converter.bias.double(), b) < 1e-4


def test_converter_recovers_a_linear_map_and_heeds_weights():
    src = random(400, 20)
    W = random(30, 20, seed=1)
    b = random(30, seed=2)
    tgt = src @ W.T + b
    converter = fit_word_converter(src, tgt, ridge=1e-7)
    assert relative_error(converter.weight, W) < 1e-4
    assert relative_error(converter.bias, b) < 1e-4
    tgt[200:] = random(200, 30, seed=3)  # nonsense, which no caption uses
    weight = torch.cat([torch.ones(200), torch.zeros(200)])
    assert relative_error(fit_word_converter(src, tgt, weight, ridge=1e-7).weight, W) < 1e-4
    assert relative_error(fit_word_converter(src, tgt, ridge=1e-7).weight, W) > 0.1


@pytest.mark.parametrize("src_words, tgt_words, weight", [
    (5, 6, None),
    (5, 5, torch.zeros(5)),
    (5, 5, -torch.ones(5)),
    (0, 0, None),
])
def test_converter_refuses_what_it_cannot_fit(src_words, tgt_words, weight):
    with pytest.raises(ValueError, match="word converter needs"):
        fit_word_converter(random(src_words, 3), random(tgt_words, 3), weight)


def test_merged_projector_is_projector_then_converter():
    projector = nn.Linear(8, 6)
    converter = nn.Linear(6, 10)
    x = random(4, 8)
    assert relative_error(merge(projector, converter)(x), converter(projector(x))) < 1e-6


# --------------------------------------------------------------------------------- fit to captions


def test_soft_prompts_are_carried_to_the_words_that_they_mean():
    """Words without any linear relation between the LLMs. Each query says one word in its first 30
    dimensions, and in the others what words have not; its soft prompt is both, and a mean that all share. A
    caption holds its image's five words and one that nobody says."""
    src_words = random(30, 48)
    tgt_words = random(30, 20, seed=1)
    projector = nn.Linear(64, 48)
    with torch.no_grad():
        projector.weight.copy_(torch.cat([src_words.T, random(48, 34, seed=2)], dim=1))
        projector.bias.copy_(5 * random(48, seed=3))
    said = torch.randint(30, (100, 5), generator=torch.Generator().manual_seed(4))
    queries = torch.cat([F.one_hot(said, 30), 0.3 * random(100, 5, 34, seed=5)], dim=2)
    captions = [torch.cat([ids, (ids[:1] + 1) % 30]) for ids in said]
    src_captions = [src_words[ids] for ids in captions]
    tgt_captions = [tgt_words[ids] for ids in captions]

    def share_right(projector):
        distances = torch.cdist(projector(queries), tgt_words.expand(100, 30, 20))
        return (distances.argmin(-1) == said).float().mean()

    def error(projector):
        return (projector(queries) - tgt_words[said]).pow(2).mean()

    fitted = fit_to_captions(queries, projector, src_captions, tgt_captions)
    one_round = fit_to_captions(queries, projector, src_captions, tgt_captions, rounds=1)
    converted = merge(projector, fit_word_converter(src_words, tgt_words))
    assert share_right(fitted) > 0.95
    assert share_right(converted) < 0.5
    # what the first round misreads, the second one reads
    assert error(fitted) < 0.01 * error(one_round) < 0.01
    assert all(parameter.requires_grad for parameter in fitted.parameters())


@pytest.mark.parametrize("count, words", [(100, 0), (99, 30)])
def test_the_fit_to_captions_needs_a_word_and_a_caption_for_each_image(count, words):
    queries = random(100, 5, 64)
    src_captions = [random(words, 48)] * count
    tgt_captions = [random(words, 20)] * count
    with pytest.raises(ValueError, match="of one word at least"):
        fit_to_captions(queries, nn.Linear(64, 48), src_captions, tgt_captions)


# ---------------------------------------------------------------------------------------- the model


def load_both(folder, llm_config, image_id):
    """The same random BLIP-2: ours, transformers'."""
    theirs = make_blip2(AutoConfig.for_model(**llm_config), image_token_index=image_id)
    if llm_config["model_type"] == "t5":  # transformers ties the head of any new T5
        head = theirs.language_model.lm_head
        head.weight = nn.Parameter(random(*head.weight.shape, seed=3) * 0.25)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = theirs.config.to_dict() | {"text_config": llm_config}
    (folder / "config.json").write_text(json.dumps(config))
    vpg = load_vpg(folder, dtype=torch.float32)
    return VisualLLM(vpg, load_projector(folder), load_llm(folder, dtype=torch.float32)), theirs


@pytest.mark.parametrize("llm_config", [OPT_CONFIG, LLAMA_CONFIG, T5_CONFIG], ids=lambda c: c["model_type"])
def test_loss_and_gradients_equal_transformers_blip2(llm_config, tmp_path):
    """The whole model: images in, the caption's loss out, and its gradients to all that VPGTrans trains (in
    float64, since some of them are tiny behind softmaxes of random weights)."""
    image_id = llm_config["vocab_size"] - 1
    ours, theirs = load_both(tmp_path, llm_config, image_id)
    trained = ours.saved()
    for parameter in trained.values():
        parameter.requires_grad_()

    images = random(2, 3, 28, 28)
    target = torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(1))
    target[1, 4:] = -100
    encoder_decoder = theirs.config.is_encoder_decoder
    behind = torch.full((2, 1), 1 if encoder_decoder else 2)  # </s>, BOS
    prompt = torch.cat([torch.full((2, 5), image_id), behind], dim=1)
    our_prompt = prompt.where(prompt != image_id, IMAGE)
    inputs = dict(input_ids=prompt, labels=target)
    if not encoder_decoder:
        inputs = dict(input_ids=torch.cat([prompt, target.clamp(min=0)], dim=1),
                      labels=torch.cat([torch.full((2, 6), -100), target], dim=1))

    loss, tokens = ours(our_prompt, target, images=images)
    assert tokens == 10
    assert relative_error(loss / 10, theirs(pixel_values=images, **inputs).loss) < 2e-5

    ours.double()
    theirs.double()
    loss, _ = ours(our_prompt, target, images=images.double())
    (loss / 10).backward()
    theirs(pixel_values=images.double(), **inputs).loss.backward()
    references = dict(theirs.named_parameters())
    parts = {name.split(".")[0] for name in trained}
    assert parts == {"vision_model", "query_tokens", "qformer", "language_projection"}
    for name, parameter in trained.items():
        # a key's bias shifts all scores of a query alike: softmax does not see it, its gradient is rounding
        if not name.endswith("key.bias"):
            assert relative_error(parameter.grad, references[name].grad) < 2e-5, name
    for name, parameter in ours.named_parameters():
        if name.startswith("llm.") or "encoder.layers" in name:
            assert parameter.grad is None, name


def test_images_features_and_queries_give_one_loss(model):
    images = random(2, 3, 28, 28)
    features = model.vpg.features(images)
    queries = model.vpg.query(features)
    target = torch.tensor([[5, 6], [7, 8]])
    prompt = torch.tensor([[IMAGE] * 5 + [2]] * 2)
    loss, _ = model(prompt, target, images=images)
    assert loss == model(prompt, target, features=features)[0]
    assert loss == model(prompt, target, queries=queries)[0]


def test_of_a_models_targets_those_scored_count(model):
    images = random(2, 3, 28, 28)
    target = torch.tensor([[5, 6, 7], [8, 9, -100]])
    scored = torch.tensor([[False, True, True], [True, False, False]])
    prompt = torch.tensor([[IMAGE] * 5 + [2]] * 2)
    loss, tokens = model(prompt, target, scored, images=images)
    prefix, mask = model.prefix(prompt, images=images)
    log_p = model.llm(prefix, target, mask).log_softmax(-1)
    expected = -(log_p[0, 1, 6] + log_p[0, 2, 7] + log_p[1, 0, 8])
    assert tokens == 3
    assert relative_error(loss, expected) < 1e-5


def test_soft_prompts_may_stand_anywhere_and_padding_changes_nothing(model):
    images = random(1, 3, 28, 28)
    target = torch.tensor([[5, 6, 7]])
    padded_places = [PADDING, 2, 9, PADDING, *[IMAGE] * 3, PADDING, *[IMAGE] * 2, 8, PADDING]

    def loss(*prompt):
        return model(torch.tensor([prompt]), target, images=images)[0]

    plain = loss(2, 9, *[IMAGE] * 5, 8)
    assert relative_error(loss(*padded_places), plain) < 1e-5
    assert relative_error(loss(*[IMAGE] * 5, 2, 9, 8), plain) > 1e-5


def test_a_step_reads_nothing_that_a_gpu_computes(model):
    """On a GPU every read waits for all that it was given before. Here, each shows in a profile; prompts are
    on the CPU there, too."""
    enter_stage(model, STAGES["fine-tune"])
    prompts = torch.tensor([[PADDING] + [IMAGE] * 5 + [2]] * 2)
    targets = torch.tensor([[5, 6], [7, -100]])
    loss, _ = model(prompts, targets, images=random(2, 3, 28, 28))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    done = {event.name for event in profile.events()}
    assert "aten::mm" in done
    assert not done & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


def test_a_prompt_with_too_few_places_is_refused(model):
    prompt = torch.tensor([[IMAGE] * 4 + [2]])
    with pytest.raises(ValueError, match="5 IMAGE places"):
        model(prompt, torch.tensor([[5]]), images=random(1, 3, 28, 28))


def test_a_projector_of_another_width_is_refused(model):
    with pytest.raises(ValueError, match="must be 32 -> 32"):
        VisualLLM(model.vpg, nn.Linear(32, 40), model.llm)


def test_saved_names_are_those_of_blip2(model, world):
    with safe_open(world[0] / "model.safetensors", framework="pt") as source:
        names = set(source.keys())
    frozen = {name for name in names if name.startswith(("language_model.", "vision_model."))}
    norm = {name for name in names if "post_layernorm" in name}
    assert set(model.saved()) == names - frozen | norm


# --------------------------------------------------------------------------------------- the stages

TRAINED = {
    "warm-up": r"projector\.",
    "fine-tune": r"projector\.|vpg\.query_tokens|vpg\.qformer\.|vpg\.vision_model\.post_layernorm\.",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_exactly_the_intended_parameters_train(model, name):
    """In the table, in the optimizer, and by what really changes in a step."""
    parameters = dict(model.named_parameters())
    expected = {n for n in parameters if re.match(TRAINED[name], n)}
    table = enter_stage(model, STAGES[name])
    assert sum(trainable for _, _, trainable, _ in table) == sum(parameters[n].numel() for n in expected)
    assert sum(total for _, total, _, _ in table) == sum(p.numel() for p in parameters.values())

    optimizer = torch.optim.AdamW(parameter_groups(model, STAGES[name]), lr=0.01)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {n for n, p in parameters.items() if id(p) in optimized} == expected

    before = {n: p.detach().clone() for n, p in parameters.items()}
    prompts = torch.tensor([[IMAGE] * 5 + [2]])
    loss, _ = model(prompts, torch.tensor([[5, 6]]), images=random(1, 3, 28, 28))
    loss.backward()
    optimizer.step()
    assert {n for n, p in parameters.items() if not torch.equal(p, before[n])} == expected


def test_frozen_parts_are_in_eval_mode_and_only_they(model):
    parts = {
        "vit": model.vpg.vision_model,
        "norm": model.vpg.vision_model.post_layernorm,
        "qformer": model.vpg.qformer,
        "projector": model.projector,
        "llm": model.llm,
    }

    def in_train_mode():
        return {name for name, part in parts.items() if part.training}

    enter_stage(model, STAGES["fine-tune"])
    assert in_train_mode() == {"qformer", "norm", "projector"}
    assert all(module.training for module in model.vpg.qformer.modules())
    enter_stage(model, STAGES["warm-up"])
    assert in_train_mode() == {"projector"}
    assert not any(module.training for module in model.vpg.modules())


def test_weight_decay_spares_biases_and_norms(model):
    enter_stage(model, STAGES["fine-tune"])
    decayed, spared = parameter_groups(model, STAGES["fine-tune"])
    assert decayed["weight_decay"] == 0.05
    assert all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0
    assert spared["params"]
    assert all(p.ndim == 1 for p in spared["params"])


@pytest.mark.parametrize("stage, step, steps, expected", [
    ("warm-up", 0, 800, 5e-4),
    ("warm-up", 799, 800, 5e-4),
    ("fine-tune", 0, 7500, 1e-4),
    ("fine-tune", 3750, 7500, pytest.approx(7.5e-5, rel=1e-3)),
    ("fine-tune", 7499, 7500, pytest.approx(5e-5)),
    ("from-scratch", 0, 30000, 1e-6),
    ("from-scratch", 2000, 30000, 1e-4),
    ("from-scratch", 29999, 30000, pytest.approx(1e-5)),
])
def test_rates_are_the_papers(stage, step, steps, expected):
    assert learning_rate(STAGES[stage], step, steps) == expected
