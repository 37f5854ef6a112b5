"""Facts about qformer.py, established against transformers on small random models in which every tensor is random."""

import copy

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from qformer import load_projector, load_vpg

VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7)
QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, encoder_hidden_size=48, vocab_size=50)
TEXT = dict(vocab_size=120, hidden_size=40, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            word_embed_proj_dim=40)


def random_blip2(seed=0):
    """A small Blip2 of transformers; every tensor random: it starts query tokens at zero, and the ViT near it."""
    config = Blip2Config(vision_config=Blip2VisionConfig(**VISION), qformer_config=Blip2QFormerConfig(**QFORMER),
                         text_config=OPTConfig(**TEXT), num_query_tokens=5)
    model = Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model.eval()


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    theirs = random_blip2()
    folder = tmp_path_factory.mktemp("blip2")
    theirs.save_pretrained(folder)
    return theirs, folder


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
