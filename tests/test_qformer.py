"""Facts about qformer.py, established against transformers on small models, every tensor random."""

import copy
import json
import shutil

import pytest
import torch
from conftest import QFORMER, VISION, edit_config, randomise, relative_error, write_clip, write_source
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from qformer import CLIP, EVA, VPG, interpolate_positions, load_projector, load_vit, load_vpg


def random_images(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def their_queries(theirs, image):
    """transformers' Q-Former, looking at an image (B,N,Dv)."""
    query_tokens = theirs.query_tokens.expand(len(image), -1, -1)
    return theirs.qformer(query_embeds=query_tokens, encoder_hidden_states=image).last_hidden_state


def copy_with_config(folder, new_folder, **new):
    """A checkpoint with another config.json."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, new_folder)
    edit_config(new_folder, **new)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """(a random BLIP-2 of transformers', its folder)"""
    folder = tmp_path_factory.mktemp("blip2")
    return write_source(folder), folder


def test_features_queries_and_soft_prompts_equal_transformers(blip2):
    theirs, folder = blip2
    vpg = load_vpg(folder, dtype=torch.float32)
    projector = load_projector(folder)
    images = random_images(28, 28)
    with torch.no_grad():
        image = theirs.vision_model(images).last_hidden_state
        queries = their_queries(theirs, image)
        features = vpg.features(images)
        assert relative_error(vpg.vision_model.post_layernorm(features), image) < 2e-5
        assert relative_error(vpg.query(features), queries) < 2e-5
        assert relative_error(projector(vpg(images)), theirs.language_projection(queries)) < 2e-5


def test_bytes_are_normalised_by_clips_mean_and_deviation(blip2):
    """Numbers of openai/clip-vit-large-patch14's preprocessor_config.json, which BLIP-2's has, too."""
    vpg = load_vpg(blip2[1], dtype=torch.float32)
    images = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    by_hand = (images.float() / 255 - mean) / deviation
    assert relative_error(vpg.features(images), vpg.features(by_hand)) < 1e-6
    assert relative_error(vpg.features(images), vpg.features(images.float())) > 0.1


def test_gradients_equal_transformers(blip2):
    """In float64: behind softmaxes of random weights some gradients are tiny, and rounding would decide."""
    theirs = copy.deepcopy(blip2[0]).double()
    vpg = load_vpg(blip2[1], dtype=torch.float32).double()
    images = random_images(28, 28).double()
    direction = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).double()
    trained = vpg.trained_parameters()
    for parameter in trained.values():
        parameter.requires_grad_()
    (vpg(images) * direction).sum().backward()
    image = theirs.vision_model(images).last_hidden_state
    (their_queries(theirs, image) * direction).sum().backward()
    references = dict(theirs.named_parameters())
    some = {"query_tokens", "vision_model.post_layernorm.weight",
            "qformer.encoder.layer.2.crossattention.attention.key.weight"}
    assert some <= trained.keys()
    for name, parameter in trained.items():
        if name.endswith("key.bias"):  # shifts all scores of a query alike: its gradient is rounding
            continue
        assert relative_error(parameter.grad, references[name].grad) < 2e-5, name
    others = [parameter for name, parameter in vpg.named_parameters() if name not in trained]
    assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("kind, places", [
    ("hidden_dropout_prob", 1 + 4 + 2 + 4),
    ("attention_probs_dropout_prob", 4 + 2)])
def test_dropout_is_active_in_train_mode_alone(blip2, tmp_path, monkeypatch, kind, places):
    """Both of its kinds, and in all the places that transformers has."""
    config = json.loads((blip2[1] / "config.json").read_text())
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, kind: 0.5}
    copy_with_config(blip2[1], tmp_path, qformer_config=config["qformer_config"] | rates)
    vpg = load_vpg(tmp_path, dtype=torch.float32)
    images = random_images(28, 28)
    assert torch.equal(vpg(images), vpg(images))
    vpg.qformer.train()
    assert not torch.allclose(vpg(images), vpg(images), atol=1e-2)

    dropout = nn.functional.dropout
    drawn = []

    def watched(x, p=0.5, training=True, inplace=False):
        drawn.append(p * training > 0)
        return dropout(x, p, training)

    vpg.requires_grad_()  # or attention and its dropout are torch's fused ones
    monkeypatch.setattr(nn.functional, "dropout", watched)  # nn.Dropout, too, calls this function
    vpg(images)
    assert sum(drawn) == places
    drawn.clear()
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    theirs.qformer.train()
    their_queries(theirs, vpg.features(images))
    assert sum(drawn) == places


@pytest.mark.parametrize("ours, theirs", [
    (EVA.DEFAULTS, Blip2VisionConfig()),
    (CLIP.DEFAULTS, CLIPVisionConfig()),
    (VPG.QFORMER, Blip2QFormerConfig())])
def test_options_left_out_are_transformers_defaults(ours, theirs):
    assert ours.items() <= theirs.to_dict().items()


def test_a_first_stage_checkpoint_loads_without_its_text_branch(tmp_path):
    """Salesforce/blip2-itm-vit-g: no LLM, no projector, and a Q-Former that also reads text."""
    config = Blip2Config(vision_config=Blip2VisionConfig(**VISION), num_query_tokens=5,
                         qformer_config=Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True))
    theirs = randomise(Blip2ForImageTextRetrieval._from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    text_branch = {"qformer.encoder.layer.0.intermediate.dense.weight", "embeddings.word_embeddings.weight",
                   "itm_head.weight"}
    assert text_branch <= tensors.keys()
    save_file(tensors | {"embeddings.position_ids": torch.arange(5)}, file)  # older files have it
    vpg = load_vpg(tmp_path, dtype=torch.float32)
    images = random_images(28, 28)
    with torch.no_grad():
        image = theirs.vision_model(images).last_hidden_state
        assert relative_error(vpg(images), their_queries(theirs, image)) < 2e-5
    with pytest.raises(ValueError, match="no projector"):
        load_projector(tmp_path)
    save_file(tensors | {"qformer.surprise": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="unknown tensors, the first: qformer.surprise"):
        load_vpg(tmp_path)


def test_shards_and_bf16(blip2, tmp_path):
    """In shards, as on the Hub, with the zero key part of EVA's qkv bias; the ViT comes in bf16, what trains
    in float32."""
    theirs = copy.deepcopy(blip2[0])
    images = random_images(28, 28)
    for layer in theirs.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[48:96] = 0
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    vpg = load_vpg(tmp_path, dtype=torch.float32)
    features = vpg.vision_model.post_layernorm(vpg.features(images))
    assert relative_error(features, theirs.vision_model(images).last_hidden_state) < 2e-5
    vpg = load_vpg(tmp_path)
    assert {parameter.dtype for parameter in vpg.frozen_parameters().values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in vpg.trained_parameters().values()} == {torch.float32}
    assert load_projector(tmp_path).weight.dtype == torch.float32


def test_the_frozen_vit_keeps_nothing_for_a_backward_pass(blip2):
    """In stage 2 the Q-Former's activations are kept, not one of the ViT's."""
    vpg = load_vpg(blip2[1], dtype=torch.float32)
    images = random_images(28, 28)
    for parameter in vpg.trained_parameters().values():
        parameter.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        features = vpg.features(images)
        assert not kept
        assert not features.requires_grad
        vpg.query(features)
    assert len(kept) > 50


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("changes, says", [
    ({"num_query_tokens": 7}, "query_tokens is .1, 5, 32., config.json says .1, 7, 32."),
    ({"image_size": 30}, "30 is not a multiple of the ViT's patch, 7"),
    ({"image_size": 0}, "image size 0"),
    ({"image_size": "28"}, "config.json: "),
    ({"vision_config": None}, "config.json: "),
    ({"vit_layers": 4}, "has 3 blocks"),
    ({"vision_config": VISION | {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
    ({"vision_config": VISION | {"hidden_act": "silu"}}, "silu"),
    ({"qformer_config": QFORMER | {"hidden_act": "relu"}}, "relu"),
    ({"qformer_config": QFORMER | {"encoder_hidden_size": 50}}, "50 wide features")])
def test_a_config_that_does_not_fit_is_refused(blip2, tmp_path, changes, says):
    copy_with_config(blip2[1], tmp_path, **changes)
    with pytest.raises(ValueError, match=says) as error:
        load_vpg(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("file, says", [
    ("adapter_config.json", "a PEFT adapter .*merge it into its base model with peft's merge_and_unload"),
    ("clip.gguf", "clip.gguf is a GGUF file.*from_pretrained.*gguf_file='clip.gguf'.*save_pretrained")])
def test_an_adapter_or_a_gguf_file_alone_is_named_with_the_way_out(blip2, tmp_path, has_config, file, says):
    (tmp_path / file).write_text("{}")
    if has_config:
        shutil.copy(blip2[1] / "config.json", tmp_path)
    for read in (load_vpg, load_vit):
        with pytest.raises(FileNotFoundError, match=f"{'no weights' if has_config else 'missing'}.*{says}"):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no weights.*{says}"):
        load_projector(tmp_path)


# ------------------------------------------------------------------------------------------ image sizes


@pytest.mark.parametrize("height, width", [
    (42, 42), (14, 14), (21, 35), (56, 14)])  # the last has as many patches as 28 x 28
def test_other_image_sizes_interpolate_positions_as_transformers(blip2, clip, height, width):
    images = random_images(height, width)
    vpg = load_vpg(blip2[1], dtype=torch.float32)
    with torch.no_grad():
        theirs = blip2[0].vision_model(images, interpolate_pos_encoding=True).last_hidden_state
        assert relative_error(vpg.vision_model.post_layernorm(vpg.features(images)), theirs) < 2e-5
        theirs = clip[0].vision_model(images, interpolate_pos_encoding=True).last_hidden_state
        assert relative_error(load_vit(clip[1], dtype=torch.float32)(images), theirs) < 2e-5


def test_position_embeddings_in_bf16_are_interpolated_in_float32():
    table = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = interpolate_positions(table.float(), 7, 5).bfloat16()
    assert torch.equal(interpolate_positions(table, 7, 5), expected)


@pytest.mark.parametrize("shape", [(1, 3, 30, 28), (1, 3, 28, 30), (1, 1, 28, 28), (3, 28, 28)])
def test_images_that_patches_do_not_cover_are_refused(blip2, clip, shape):
    for vit in (load_vpg(blip2[1], dtype=torch.float32), load_vit(clip[1], dtype=torch.float32)):
        with pytest.raises(ValueError, match="multiples of its patch, 7 pixels"):
            vit(torch.zeros(shape))


# ------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(a random CLIPModel, its folder): as openai/clip-vit-large-patch14, with its text branch, and a buffer
    of older files."""
    folder = tmp_path_factory.mktemp("clip")
    theirs = write_clip(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors")
    return theirs, folder


@pytest.mark.parametrize("layers", [1, 2, 3, None])
def test_features_of_clip_after_any_block_equal_transformers(clip, layers):
    theirs, folder = clip
    images = random_images(28, 28)
    reference = theirs.vision_model(images, output_hidden_states=True)
    vit = load_vit(folder, dtype=torch.float32, layers=layers)
    assert len(vit.encoder["layers"]) == (layers or 3)
    assert relative_error(vit(images), reference.hidden_states[layers or 3]) < 2e-5
    if layers is None:
        assert relative_error(vit.post_layernorm(vit(images)[:, 0]), reference.pooler_output) < 2e-5


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clips_vit_alone_is_written_with_and_without_a_prefix(clip, tmp_path, prefix):
    theirs, folder = clip
    tensors = theirs.vision_model.state_dict()
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.vision_config.to_dict()))
    images = random_images(28, 28)
    expected = load_vit(folder, dtype=torch.float32)(images)
    assert torch.equal(load_vit(tmp_path, dtype=torch.float32)(images), expected)


def test_gelu_and_quick_gelu_are_told_apart(clip, tmp_path):
    """OpenAI's CLIP has the quick one, others of its layout the exact one."""
    config = json.loads((clip[1] / "config.json").read_text())
    copy_with_config(clip[1], tmp_path, vision_config=config["vision_config"] | {"hidden_act": "gelu"})
    images = random_images(28, 28)
    theirs = CLIPVisionModel.from_pretrained(tmp_path, attn_implementation="eager")
    reference = theirs(images).last_hidden_state
    assert relative_error(load_vit(tmp_path, dtype=torch.float32)(images), reference) < 2e-5
    assert relative_error(load_vit(clip[1], dtype=torch.float32)(images), reference) > 1e-3


def test_clip_carries_a_q_former_from_scratch(clip):
    """It has none of its own: one is drawn, as BERT's are, and reads the features after the block asked
    for."""
    with pytest.raises(ValueError, match="holds no Q-Former"):
        load_vpg(clip[1])
    torch.manual_seed(0)
    vpg = load_vpg(clip[1], dtype=torch.float32, q_former=False, vit_layers=2, image_size=42)
    images = random_images(42, 42)
    assert vpg.image_size == 42
    assert vpg(images).shape == (2, 32, 768)
    expected = load_vit(clip[1], dtype=torch.float32, layers=2)(images)
    assert relative_error(vpg.features(images), expected) < 1e-6
    weight = vpg.qformer.encoder["layer"][0].crossattention.attention["key"].weight
    norm = vpg.vision_model.post_layernorm
    assert weight.shape == (768, 48)
    assert abs(weight.std() - 0.02) < 2e-3
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()


# ----------------------------------------------------------------------------- functions beside the MLPs


def random_adapters(count, seed=3):
    """s B2 GELU(B1 y), 12 wide, as MemVP's."""
    adapters = [nn.Sequential(nn.Linear(48, 12, bias=False), nn.GELU(), nn.Linear(12, 48, bias=False))
                for _ in range(count)]
    return randomise(nn.ModuleList(adapters), seed).double()


def add_beside(vit, adapters):
    """transformers' ViT, with each adapter's output added to that of its block's MLP."""
    for layer, adapter in zip(vit.encoder.layers, adapters, strict=True):
        layer.mlp.register_forward_hook(lambda mlp, args, output, adapter=adapter: output + adapter(args[0]))


@pytest.mark.parametrize("kind", ["EVA", "CLIP"])
def test_what_stands_beside_the_mlps_is_added_as_in_transformers(blip2, clip, kind):
    """And gradients reach it through the frozen ViT."""
    whole, folder = blip2 if kind == "EVA" else clip
    theirs = copy.deepcopy(whole.vision_model).double()
    ours = load_vit(folder, dtype=torch.float32).double()
    images = random_images(28, 28).double()
    a = random_adapters(3)
    b = random_adapters(3)
    add_beside(theirs, b)
    features = ours(images, a)
    reference = theirs(images, output_hidden_states=True).hidden_states[-1] if kind == "CLIP" else None
    if kind == "EVA":  # transformers gives the last block's output behind its norm alone
        features = ours.post_layernorm(features)
        reference = theirs(images).last_hidden_state
    assert relative_error(features, reference) < 1e-6
    features.square().sum().backward()
    reference.square().sum().backward()
    for ours_parameter, their_parameter in zip(a.parameters(), b.parameters(), strict=True):
        assert relative_error(ours_parameter.grad, their_parameter.grad) < 1e-6
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_adapters_that_give_zero_leave_features_equal_to_the_bit(clip):
    vit = load_vit(clip[1], dtype=torch.float32)
    adapters = random_adapters(3).float()
    for adapter in adapters:
        adapter[2].weight.data.zero_()
    images = random_images(28, 28)
    with torch.no_grad():
        assert torch.equal(vit(images, adapters), vit(images))


def test_each_block_has_its_function_beside(clip):
    vit = load_vit(clip[1], dtype=torch.float32, layers=2)
    with pytest.raises(ValueError, match="2 blocks; beside them stand 3 functions"):
        vit(random_images(28, 28), random_adapters(3).float())
