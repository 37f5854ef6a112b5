"""Facts about export.py: transformers loads what it writes, whole, and says with it what we say."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    LLAMA_CONFIG,
    OPT_CONFIG,
    T5_CONFIG,
    arguments,
    edited,
    make_model,
    picture,
    relative_error,
    write_clip,
    write_kind,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2Processor

import data
import export
import qformer
import sample
import train
import transfer

T5_WITHOUT_START = {key: value for key, value in T5_CONFIG.items() if key != "decoder_start_token_id"}
GROUPED_HEADS = dict(num_key_value_heads=2)
# kind of tokenizer and LLM; the vocabulary ends with the tokenizer's last id (no room for the image token),
# or goes on behind it
TARGETS = {
    "opt": ("GPT-2", OPT_CONFIG | dict(vocab_size=600)),
    "llama": ("LLaMA, pre-tokenizer", LLAMA_CONFIG | dict(pad_token_id=None)),
    "llama, tied": ("LLaMA, normalizer", LLAMA_CONFIG | GROUPED_HEADS | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen", LLAMA_CONFIG | GROUPED_HEADS | dict(model_type="qwen3", head_dim=12, vocab_size=600)),
    "t5": ("Unigram", T5_CONFIG),
    "t5, room": ("Unigram, bytes", T5_WITHOUT_START | dict(vocab_size=700)),
}


def write_llm(folder, target, **changes):
    """A random LLM with its tokenizer."""
    kind, options = TARGETS[target]
    write_kind(folder, kind)
    size = data.load_tokenizer(folder).encoder.get_vocab_size()
    make_model(folder, options | dict(vocab_size=max(size, options["vocab_size"])) | changes)
    return folder


def train_a_little(world, out, *options):
    """One step from a random projector: nothing of a run is left at what it started from."""
    start = [] if "--from-scratch" in options else ["--no-warm-up", "--init", "random"]
    train.main(arguments(world, out, "--steps", "1", "--lr", "1e-2", *start, *options))
    return out


@pytest.fixture(params=TARGETS, scope="module")
def exported(request, world, tmp_path_factory):
    """(run, folder that it was exported to, pictures)"""
    folder = tmp_path_factory.mktemp("export")
    target = write_llm(folder / "llm", request.param)
    run = train_a_little((world[0], target, world[2]), folder / "run")
    export.main([str(run), str(folder / "blip2"), "--precision", "fp32"])
    return run, folder / "blip2", [picture(world, i) for i in range(3)]


def load_ours(run):
    return transfer.load_model(str(run), torch.float32)


def load_theirs(folder):
    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(loading.values()), loading  # missing, unexpected, misshapen
    return theirs.eval()


def read_images(files):
    return torch.stack([data.resize(data.load_image(file), 28) for file in files])


def inputs_of(processor, files, text=""):
    images = [Image.open(file) for file in files]
    return processor(images=images, text=[text] * len(files), return_tensors="pt")


def said(processor, ids):
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


# ------------------------------------------------------------------------ transformers computes the same


@pytest.mark.slow
def test_whoever_may_read_one_file_of_an_export_may_read_all(exported):
    _, folder, _ = exported
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


@pytest.mark.slow
def test_transformers_computes_the_same_logits(exported):
    run, folder, files = exported
    ours, tok = load_ours(run)
    theirs = load_theirs(folder)
    images = qformer.normalise(read_images(files))
    inputs = inputs_of(Blip2Processor.from_pretrained(folder), files)
    # a level of 255: Pillow's kernel, torch's kernel
    assert (inputs["pixel_values"] - images).abs().max() < 0.0151
    inputs["pixel_values"] = images

    last_id = tok.encoder.get_vocab_size()
    targets = torch.randint(5, last_id, (3, 7), generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([data.prompt_ids(tok, 5)] * 3)
    with torch.no_grad():
        reference = ours.llm(ours.prefix(prompt, images)[0], targets)
        if tok.encoder_decoder:
            logits = theirs(**inputs, labels=targets).logits
        else:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], targets], dim=1)
            inputs.pop("attention_mask")
            logits = theirs(**inputs).logits[:, -8:-1]
    V = reference.shape[-1]
    assert relative_error(logits[..., :V], reference) < 2e-5
    # of the image token, where there was no room for it: the mean of all others
    new = logits[..., V:]
    assert new.shape[-1] == (last_id == V)
    assert torch.allclose(new, reference.mean(-1, keepdim=True)[..., : new.shape[-1]], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a red"])
def test_transformers_says_the_same(exported, beams, prompt):
    """Greedily and in beams, with and without a prompt, through its own processor, and up to the end that
    config.json says."""
    run, folder, files = exported
    ours, tok = load_ours(run)
    theirs = load_theirs(folder)
    processor = AutoProcessor.from_pretrained(folder)
    options = dict(num_beams=beams, max_new_tokens=12)
    says = transfer.answer(ours, tok, read_images(files), prompt, **options)
    assert any(says)

    inputs = inputs_of(processor, files, prompt)
    ids = theirs.generate(**inputs, **options, do_sample=False)
    if not tok.encoder_decoder:  # transformers gives the prompt back before the answer
        prompt_length = inputs["input_ids"].shape[1]
        assert torch.equal(ids[:, :prompt_length], inputs["input_ids"])
        ids = ids[:, prompt_length:]
    assert said(processor, ids) == says
    ends = [tok.end_id, tok.eos_id] if tok.end_id != tok.eos_id else [tok.eos_id]
    assert theirs.language_model.generation_config.eos_token_id == ends
    if not prompt and (tok.encoder_decoder or tok.bos_id is not None):  # nor need there be a text
        ids = theirs.generate(pixel_values=inputs["pixel_values"], **options, do_sample=False)
        assert said(processor, ids) == says


@pytest.mark.slow
def test_padded_prompts_and_grey_images(exported):
    """Prompts of two lengths in a batch, padded as the processor does, and an image that is not RGB."""
    run, folder, files = exported
    ours, tok = load_ours(run)
    theirs = load_theirs(folder)
    processor = Blip2Processor.from_pretrained(folder)
    images = [Image.open(files[0]), Image.open(files[1]).convert("L")]
    prompts = ["a red", "a green square on a"]
    says = []
    for image, prompt in zip(images, prompts):
        pixels = data.resize(image, 28)[None]
        says += transfer.answer(ours, tok, pixels, prompt, num_beams=1, max_new_tokens=8)

    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    ids = theirs.generate(**inputs, max_new_tokens=8)
    if not tok.encoder_decoder:  # image tokens stand before the padding
        ids = ids[:, inputs["input_ids"].shape[1] :]
    assert said(processor, ids) == says


@pytest.mark.slow
def test_the_tokenizer_is_the_same_and_knows_the_image_token(exported):
    run, folder, _ = exported
    _, tok = load_ours(run)
    theirs = Blip2Processor.from_pretrained(folder).tokenizer
    config = json.loads((folder / "config.json").read_text())
    assert theirs.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    for text in ("a red square", "Two  dogs, one cat!", "naïve 7\n", ""):
        ids = data.prompt_ids(tok, 0, text)
        assert (theirs(text)["input_ids"] or [tok.eos_id]) == ids  # ours never reads nothing at all
        assert theirs.decode(ids, skip_special_tokens=True) == tok.decode(ids)


# ----------------------------------------------------------------------------------- what is written


@pytest.mark.slow
def test_in_bf16_and_in_shards(world, tmp_path, monkeypatch):
    """The default: all weights in bf16, which from_pretrained loads them in if nothing else is said."""
    run = train_a_little(world, tmp_path / "run")
    folder = tmp_path / "blip2"
    monkeypatch.setattr(export, "SHARD_BYTES", 5e4)
    export.main([str(run), str(folder)])
    files = list(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 7e4 for file in files)

    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert theirs.language_projection.weight.dtype == torch.bfloat16
    assert theirs.language_model.lm_head.weight.dtype == torch.bfloat16

    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    trained = load_file(run / "model.safetensors")
    assert trained.keys() < stored.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in trained.items())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("blip2", dtype="bfloat16")' in card
    assert "moved to target by VPGTrans" in card


BLIP2_DEFAULTS = ("hidden_act", "layer_norm_eps", "qkv_bias", "model_type", "cross_attention_frequency")


@pytest.mark.slow
@pytest.mark.parametrize("options, layers", [([], 3), (["--from-scratch", "--vit-layers", "2"], 2)])
def test_what_is_left_out_of_configs_is_written_down(world, tmp_path, options, layers):
    """Of a source whose config.json leaves out what is BLIP-2's default; whole, and with its ViT cut behind
    the second block."""
    source = tmp_path / "source"
    shutil.copytree(world[0], source)
    with edited(source / "config.json") as config:
        for part in ("vision_config", "qformer_config"):
            for key in BLIP2_DEFAULTS:
                config[part].pop(key, None)
    run = train_a_little((source, *world[1:]), tmp_path / "run", *options)
    export.main([str(run), str(tmp_path / "blip2"), "--precision", "fp32"])
    ours, _ = load_ours(run)
    theirs = load_theirs(tmp_path / "blip2")
    assert len(theirs.vision_model.encoder.layers) == layers
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    features = theirs.get_image_features(images).pooler_output
    assert relative_error(features[0], ours.projector(ours.vpg(images))[0]) < 2e-5


@pytest.mark.slow
def test_another_image_size_is_written_into_the_position_embeddings(world, tmp_path):
    run = train_a_little(world, tmp_path / "run", "--image-size", "42", "--from-scratch")
    export.main([str(run), str(tmp_path / "blip2"), "--precision", "fp32"])
    assert "A BLIP-2 model around target." in (tmp_path / "blip2" / "README.md").read_text()
    ours, _ = load_ours(run)
    theirs = load_theirs(tmp_path / "blip2")
    processor = Blip2Processor.from_pretrained(tmp_path / "blip2")
    images = inputs_of(processor, [picture(world)])["pixel_values"]
    assert images.shape == (1, 3, 42, 42)
    features = ours.vpg.vision_model.post_layernorm(ours.vpg.features(images))
    assert relative_error(theirs.vision_model(images).last_hidden_state, features) < 2e-5


@pytest.mark.slow
def test_what_a_killed_export_left_is_not_taken_over(world, tmp_path):
    """Shards of another run under a name that an export in progress had."""
    run = train_a_little(world, tmp_path / "run")
    unfinished = tmp_path / "blip2.unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "here").mkdir()
    (tmp_path / "blip2").symlink_to(tmp_path / "here")
    export.main([str(run), str(tmp_path / "blip2")])
    assert "model.safetensors" in os.listdir(tmp_path / "here")
    assert "model.safetensors.index.json" not in os.listdir(tmp_path / "here")
    assert os.listdir(unfinished) == ["model.safetensors.index.json"]
    assert {file.name for file in tmp_path.iterdir()} == {"run", "here", "blip2", "blip2.unfinished"}


@pytest.mark.slow
def test_an_export_is_a_source(exported, world, tmp_path, capsys):
    """And for us it is what any BLIP-2 checkpoint is."""
    _, folder, files = exported
    sample.main([str(files[0]), "--model", str(folder), "--precision", "fp32", "--num-beams", "1"])
    assert capsys.readouterr().out.startswith(f"{files[0]}: ")
    length = ["--warm-up-steps", "1", "--steps", "1"]
    train.main(arguments((folder, *world[1:]), tmp_path / "run", *length))
    assert "word converter: 32 -> 32" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.slow
def test_what_the_format_cannot_say_is_refused(world, tmp_path, small_q_former, fails):
    """opt-350m, and CLIP."""
    narrow = dict(do_layer_norm_before=False, word_embed_proj_dim=16)
    target = write_llm(tmp_path / "opt-350m", "opt", **narrow)
    run = train_a_little((world[0], target, world[2]), tmp_path / "a")
    says = "in 16 numbers and works with 32 (opt-350m)"
    fails(export.main, [run, tmp_path / "blip2"], says, "sample.py")

    write_clip(tmp_path / "clip")
    run = train_a_little((tmp_path / "clip", *world[1:]), tmp_path / "b", "--from-scratch")
    fails(export.main, [run, tmp_path / "blip2"], "ViT is CLIP's", "sample.py")
    assert not (tmp_path / "blip2").exists()
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_bad_folders_and_disks_are_refused_and_nothing_is_left(world, tmp_path, monkeypatch, fails):
    run = train_a_little(world, tmp_path / "run")
    fails(export.main, [tmp_path / "nowhere", tmp_path / "blip2"], "nowhere: no such folder")
    fails(export.main, [run, run], "is not empty; name a new folder")
    (tmp_path / "file").write_text("")
    fails(export.main, [run, tmp_path / "file"], "file: is not empty")
    monkeypatch.setattr(Path, "is_mount", lambda folder: folder.name == "disk")
    fails(export.main, [run, tmp_path / "disk"], "a disk is mounted there; name a new folder in it")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1000, 900, 100))
        fails(export.main, [run, tmp_path / "blip2"], "GB are free there")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        fails(export.main, [run, tmp_path / "blip2"], "No space left on device")
    assert {file.name for file in tmp_path.iterdir()} == {"run", "file"}
    (tmp_path / "empty").mkdir()
    export.main([str(run), str(tmp_path / "empty")])
    assert os.listdir(tmp_path / "empty")
