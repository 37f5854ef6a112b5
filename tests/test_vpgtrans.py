"""Facts about vpgtrans.py: the word converter, the merged projector, the model's loss, and what trains in each stage."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from conftest import make_blip2, relative_error
from llm import load_llm
from qformer import load_projector, load_vpg
from conftest import LLAMA_CONFIG as LLAMA, OPT_CONFIG as OPT, T5_CONFIG as T5
from vpgtrans import PADDING, IMAGE, STAGES, VisualLLM, enter_stage, fit_to_captions, fit_word_converter, learning_rate, merge, parameter_groups, shared_tokens


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(world):
    source, target, _ = world
    return VisualLLM(load_vpg(source, dtype=torch.float32), nn.Linear(32, 32), load_llm(target, dtype=torch.float32))


# ------------------------------------------------------------------------------------------------ converter and merge


def test_shared_tokens_are_those_spelled_alike():
    src, tgt = shared_tokens({b" cat": 5, b"dog": 4, b"red": 9}, {b"red": 1, b" cat": 7, b" dog": 2})
    assert src.tolist() == [5, 9] and tgt.tolist() == [7, 1]


def float64_solution(src, tgt, weight, ridge):
    """Weighted ridge regression with a bias by the normal equations of the augmented problem, all in float64."""
    weight = weight.double() / weight.double().sum()
    ones = torch.ones(len(src), 1, dtype=torch.float64)
    X = torch.cat([src.double(), ones], 1)
    centred = src.double() - weight @ src.double()
    penalty = torch.eye(src.shape[1] + 1, dtype=torch.float64) * ridge * (weight @ centred**2).mean()
    penalty[-1, -1] = 0
    solution = torch.linalg.solve(X.T @ (weight[:, None] * X) + penalty, X.T @ (weight[:, None] * tgt.double()))
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_converter_is_the_weighted_ridge_regression(ridge):
    """Embeddings with a common mean and very unequal weights, as real ones have; more tokens than one block."""
    src = random(9000, 700) * 0.05 + 0.3 * random(700, seed=1)
    tgt = src @ random(700, 90, seed=2) + 0.1 * random(9000, 90, seed=3) - 1.0
    weight = torch.rand(9000, generator=torch.Generator().manual_seed(4)) ** 8 * 1000
    converter = fit_word_converter(src, tgt, weight, ridge=ridge)
    W, b = float64_solution(src, tgt, weight, ridge)
    assert relative_error(converter.weight.double(), W) < 1e-4 and relative_error(converter.bias.double(), b) < 1e-4


def test_converter_recovers_a_linear_map_and_heeds_weights():
    src, W, b = random(400, 20), random(30, 20, seed=1), random(30, seed=2)
    tgt = src @ W.T + b
    converter = fit_word_converter(src, tgt, ridge=1e-7)
    assert relative_error(converter.weight, W) < 1e-4 and relative_error(converter.bias, b) < 1e-4
    tgt[200:] = random(200, 30, seed=3)  # nonsense, which no caption uses
    weight = torch.cat([torch.ones(200), torch.zeros(200)])
    assert relative_error(fit_word_converter(src, tgt, weight, ridge=1e-7).weight, W) < 1e-4
    assert relative_error(fit_word_converter(src, tgt, ridge=1e-7).weight, W) > 0.1


@pytest.mark.parametrize("src, tgt, weight", [(random(5, 3), random(6, 3), None), (random(5, 3), random(5, 3), torch.zeros(5)),
                                              (random(5, 3), random(5, 3), -torch.ones(5)), (random(0, 3), random(0, 3), None)])
def test_converter_refuses_what_it_cannot_fit(src, tgt, weight):
    with pytest.raises(ValueError, match="word converter needs"):
        fit_word_converter(src, tgt, weight)


def test_merged_projector_is_projector_then_converter():
    projector, converter, x = nn.Linear(8, 6), nn.Linear(6, 10), random(4, 8)
    assert relative_error(merge(projector, converter)(x), converter(projector(x))) < 1e-6


def test_soft_prompts_are_carried_to_the_words_that_they_mean():
    """Words without any linear relation between the LLMs. Each query says one word in its first 30 dimensions, and in the others what words
    have not; its soft prompt is both, and a mean that all share. A caption holds its image's five words and one that nobody says."""
    src_words, tgt_words, projector = random(30, 48), random(30, 20, seed=1), nn.Linear(64, 48)
    with torch.no_grad():
        projector.weight.copy_(torch.cat([src_words.T, random(48, 34, seed=2)], dim=1))
        projector.bias.copy_(5 * random(48, seed=3))
    said = torch.randint(30, (100, 5), generator=torch.Generator().manual_seed(4))
    queries = torch.cat([F.one_hot(said, 30), 0.3 * random(100, 5, 34, seed=5)], dim=2)
    captions = [torch.cat([ids, (ids[:1] + 1) % 30]) for ids in said]
    fit = lambda **options: fit_to_captions(queries, projector, [src_words[ids] for ids in captions], [tgt_words[ids] for ids in captions], **options)
    right = lambda p: (torch.cdist(p(queries), tgt_words.expand(100, 30, 20)).argmin(-1) == said).float().mean()
    assert right(fit()) > 0.95 and right(merge(projector, fit_word_converter(src_words, tgt_words))) < 0.5
    error = lambda p: (p(queries) - tgt_words[said]).pow(2).mean()
    assert error(fit()) < 0.01 * error(fit(rounds=1)) < 0.01  # what the first round misreads, the second one reads
    assert all(parameter.requires_grad for parameter in fit().parameters())
    nothing = [src_words[:0]] * 100
    for wrong in ((nothing, nothing), ([src_words] * 99, [tgt_words] * 99)):
        with pytest.raises(ValueError, match="of one word at least"):
            fit_to_captions(queries, projector, *wrong)


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("options", [OPT, LLAMA, T5], ids=lambda options: options["model_type"])
def test_loss_and_gradients_equal_transformers_blip2(options, tmp_path):
    """The whole model: images in, the caption's loss out, and its gradients to all that VPGTrans trains (in float64, since some
    of them are tiny behind softmaxes of random weights)."""
    image_id = options["vocab_size"] - 1
    theirs = make_blip2(AutoConfig.for_model(**options), image_token_index=image_id)
    if options["model_type"] == "t5":  # transformers ties the head of any new T5
        theirs.language_model.lm_head.weight = nn.Parameter(random(*theirs.language_model.lm_head.weight.shape, seed=3) * 0.25)
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict() | {"text_config": options}))
    ours = VisualLLM(load_vpg(tmp_path, dtype=torch.float32), load_projector(tmp_path), load_llm(tmp_path, dtype=torch.float32))
    trained = ours.saved()
    for parameter in trained.values():
        parameter.requires_grad_()

    images, target = random(2, 3, 28, 28), torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(1))
    target[1, 4:] = -100
    behind = torch.full((2, 1), 1 if theirs.config.is_encoder_decoder else 2)  # </s>, BOS
    prompt = torch.cat([torch.full((2, 5), image_id), behind], dim=1)
    if theirs.config.is_encoder_decoder:
        inputs = dict(input_ids=prompt, labels=target)
    else:
        inputs = dict(input_ids=torch.cat([prompt, target.clamp(min=0)], dim=1), labels=torch.cat([torch.full((2, 6), -100), target], dim=1))

    loss, tokens = ours(prompt.where(prompt != image_id, IMAGE), target, images=images)
    assert tokens == 10 and relative_error(loss / 10, theirs(pixel_values=images, **inputs).loss) < 2e-5
    ours, theirs, images = ours.double(), theirs.double(), images.double()
    (ours(prompt.where(prompt != image_id, IMAGE), target, images=images)[0] / 10).backward()
    theirs(pixel_values=images, **inputs).loss.backward()
    references = dict(theirs.named_parameters())
    assert {name.split(".")[0] for name in trained} == {"vision_model", "query_tokens", "qformer", "language_projection"}
    for name, parameter in trained.items():
        if not name.endswith("key.bias"):  # shifts all scores of a query alike: softmax does not see it, the gradient is rounding
            assert relative_error(parameter.grad, references[name].grad) < 2e-5, name
    assert all(parameter.grad is None for name, parameter in ours.named_parameters() if name.startswith("llm.") or "encoder.layers" in name)


def test_images_features_and_queries_give_one_loss(model):
    images, target, prompt = random(2, 3, 28, 28), torch.tensor([[5, 6], [7, 8]]), torch.tensor([[IMAGE] * 5 + [2]] * 2)
    features = model.vpg.features(images)
    losses = [model(prompt, target, **x)[0] for x in ({"images": images}, {"features": features}, {"queries": model.vpg.query(features)})]
    assert losses[0] == losses[1] == losses[2]


def test_soft_prompts_may_stand_anywhere_and_holes_change_nothing(model):
    """[BOS, 9, IMAGE x 5, 8] with holes strewn in gives what it gives without them."""
    images, target = random(1, 3, 28, 28), torch.tensor([[5, 6, 7]])
    plain = model(torch.tensor([[2, 9] + [IMAGE] * 5 + [8]]), target, images=images)[0]
    holes = model(torch.tensor([[PADDING, 2, 9, PADDING] + [IMAGE] * 3 + [PADDING] + [IMAGE] * 2 + [8, PADDING]]), target, images=images)[0]
    elsewhere = model(torch.tensor([[IMAGE] * 5 + [2, 9, 8]]), target, images=images)[0]
    assert relative_error(holes, plain) < 1e-5 < relative_error(elsewhere, plain)


def test_a_step_reads_nothing_that_a_gpu_computes(model):
    """On a GPU every read waits for all that it was given before. Here, each shows in a profile; prompts are on the CPU there, too."""
    enter_stage(model, STAGES["fine-tune"])
    loss, _ = model(torch.tensor([[PADDING] + [IMAGE] * 5 + [2]] * 2), torch.tensor([[5, 6], [7, -100]]), images=random(2, 3, 28, 28))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    done = {event.name for event in profile.events()}
    assert "aten::mm" in done and not done & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


def test_a_prompt_with_too_few_places_is_refused(model):
    with pytest.raises(ValueError, match="5 IMAGE places"):
        model(torch.tensor([[IMAGE] * 4 + [2]]), torch.tensor([[5]]), images=random(1, 3, 28, 28))


def test_a_projector_of_another_width_is_refused(model):
    with pytest.raises(ValueError, match="must be 32 -> 32"):
        VisualLLM(model.vpg, nn.Linear(32, 40), model.llm)


# ---------------------------------------------------------------------------------------------------------- the stages

EXPECTED = {"warm-up": r"projector\.", "fine-tune": r"projector\.|vpg\.query_tokens|vpg\.qformer\.|vpg\.vision_model\.post_layernorm\."}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_exactly_the_intended_parameters_train(model, name):
    """In the table, in the optimizer, and by what really changes in a step."""
    import re

    expected = {n for n, _ in model.named_parameters() if re.match(EXPECTED[name], n)}
    table = enter_stage(model, STAGES[name])
    optimizer = torch.optim.AdamW(parameter_groups(model, STAGES[name]), lr=0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for group in optimizer.param_groups for p in group["params"]} == expected
    assert sum(trainable for _, _, trainable, _ in table) == sum(p.numel() for n, p in model.named_parameters() if n in expected)
    assert sum(total for _, total, _, _ in table) == sum(p.numel() for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.tensor([[IMAGE] * 5 + [2]]), torch.tensor([[5, 6]]), images=random(1, 3, 28, 28))[0].backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == expected


def test_frozen_parts_are_in_eval_mode_and_only_they(model):
    modes = lambda: {part for part, module in (("vit", model.vpg.vision_model), ("qformer", model.vpg.qformer), ("llm", model.llm),
                     ("norm", model.vpg.vision_model.post_layernorm), ("projector", model.projector)) if module.training}
    enter_stage(model, STAGES["fine-tune"])
    assert modes() == {"qformer", "norm", "projector"} and all(m.training for m in model.vpg.qformer.modules())
    enter_stage(model, STAGES["warm-up"])
    assert modes() == {"projector"} and not any(m.training for m in model.vpg.modules())


def test_weight_decay_spares_biases_and_norms(model):
    enter_stage(model, STAGES["fine-tune"])
    decayed, spared = parameter_groups(model, STAGES["fine-tune"])
    assert decayed["weight_decay"] == 0.05 and all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(p.ndim == 1 for p in spared["params"]) and spared["params"]


def test_rates_are_the_papers():
    rate = lambda name, step, steps: learning_rate(STAGES[name], step, steps)
    assert rate("warm-up", 0, 800) == rate("warm-up", 799, 800) == 5 * rate("fine-tune", 0, 7500) == 5e-4
    assert rate("fine-tune", 7499, 7500) == pytest.approx(5e-5) and rate("fine-tune", 3750, 7500) == pytest.approx(7.5e-5, rel=1e-3)
    assert rate("from-scratch", 0, 30000) == 1e-6 and rate("from-scratch", 2000, 30000) == 1e-4
    assert rate("from-scratch", 29999, 30000) == pytest.approx(1e-5)


def test_saved_names_are_those_of_blip2(model, world):
    from safetensors import safe_open

    with safe_open(world[0] / "model.safetensors", framework="pt") as source:
        blip2 = {n for n in source.keys() if not n.startswith("language_model.") and (not n.startswith("vision_model.") or "post_layernorm" in n)}
    assert set(model.saved()) == blip2


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
