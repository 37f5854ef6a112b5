"""Facts about qformer.py, established against transformers on small random models in which every tensor is random."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import relative_error, write_source
from qformer import load_projector, load_vpg

@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    return write_source(folder), folder


def test_features_queries_and_soft_prompts_equal_transformers(blip2):
    theirs, folder = blip2
    vpg, projector = load_vpg(folder, dtype=torch.float32), load_projector(folder)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image = theirs.vision_model(images).last_hidden_state
        queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=image).last_hidden_state
        features = vpg.features(images)
        assert relative_error(vpg.vision_model.post_layernorm(features), image) < 2e-5
        assert relative_error(vpg.query(features), queries) < 2e-5
        assert relative_error(projector(vpg(images)), theirs.language_projection(queries)) < 2e-5


def test_gradients_equal_transformers(blip2):
    """In float64: behind softmaxes of random weights some gradients are tiny, and float32 rounding would decide."""
    theirs, folder = copy.deepcopy(blip2[0]).double(), blip2[1]
    vpg = load_vpg(folder, dtype=torch.float32).double()
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).double()
    direction = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).double()
    trained = vpg.trained_parameters()
    for parameter in trained.values():
        parameter.requires_grad_()
    (vpg(images) * direction).sum().backward()
    image = theirs.vision_model(images).last_hidden_state
    queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=image).last_hidden_state
    (queries * direction).sum().backward()
    references = dict(theirs.named_parameters())
    assert {"query_tokens", "vision_model.post_layernorm.weight", "qformer.encoder.layer.2.crossattention.attention.key.weight"} <= trained.keys()
    for name, parameter in trained.items():
        if name.endswith("key.bias"):  # shifts all scores of a query alike: softmax does not see it, the gradient is rounding
            continue
        assert relative_error(parameter.grad, references[name].grad) < 2e-5, name
    assert all(p.grad is None for n, p in vpg.named_parameters() if n not in trained)


def test_dropout_is_active_in_train_mode_alone(tmp_path):
    write_source(tmp_path, dropout=0.5)
    vpg, images = load_vpg(tmp_path, dtype=torch.float32), torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vpg(images), vpg(images))
    vpg.qformer.train()
    assert not torch.allclose(vpg(images), vpg(images), atol=1e-2)


def test_a_first_stage_checkpoint_loads_without_its_text_branch(blip2, tmp_path):
    """Salesforce/blip2-itm-vit-g has no LLM, no projector, and a Q-Former that also reads text."""
    tensors = {name: tensor for name, tensor in load_file(blip2[1] / "model.safetensors").items() if not name.startswith("language_")}
    extra = ["embeddings.word_embeddings.weight", "qformer.encoder.layer.0.intermediate.dense.weight", "qformer.encoder.layer.0.output.LayerNorm.bias",
             "itm_head.weight", "vision_projection.bias", "text_projection.weight", "embeddings.position_ids"]
    save_file(tensors | {name: torch.zeros(3) for name in extra}, tmp_path / "model.safetensors")
    shutil.copy(blip2[1] / "config.json", tmp_path)
    reference = load_vpg(blip2[1]).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in load_vpg(tmp_path).state_dict().items())
    with pytest.raises(ValueError, match="no projector"):
        load_projector(tmp_path)
    save_file(tensors | {"qformer.surprise": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown tensors, the first: qformer.surprise"):
        load_vpg(tmp_path)


def test_images_of_another_size_are_refused(blip2):
    with pytest.raises(ValueError, match="28, 28"):
        load_vpg(blip2[1], dtype=torch.float32)(torch.zeros(1, 3, 30, 30))
