"""Facts about export.py: transformers loads what it writes, whole, and says with it what we say."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2Processor

import conftest
import data
import export
import qformer
import sample
import train
import transfer
from conftest import LLAMA_CONFIG as LLAMA, OPT_CONFIG as OPT, T5_CONFIG as T5, make_model, write_kind

pytestmark = pytest.mark.slow

# kind of tokenizer and LLM; the vocabulary ends with the tokenizer's last id (no room for the image token) or goes on behind it
FAMILIES = {"opt": ("GPT-2", OPT | dict(vocab_size=600)), "llama": ("LLaMA, pre-tokenizer", LLAMA | dict(pad_token_id=None)), "llama, tied": ("LLaMA, normalizer", LLAMA | dict(
                tie_word_embeddings=True, num_key_value_heads=2)),
            "qwen3": ("Qwen", LLAMA | dict(model_type="qwen3", num_key_value_heads=2, head_dim=12, vocab_size=600)),
            "t5": ("Unigram", T5), "t5, room": ("Unigram, bytes", {key: T5[key] for key in T5 if key != "decoder_start_token_id"} | dict(vocab_size=700))}


def write_llm(folder, family):
    """A random LLM with its tokenizer."""
    kind, options = FAMILIES[family]
    write_kind(folder, kind)
    tokens = (folder / "tokenizer_config.json").read_text()
    size = data.load_tokenizer(folder).encoder.get_vocab_size()
    make_model(folder, options | (dict(vocab_size=size) if options["vocab_size"] < size else {}))
    (folder / "tokenizer_config.json").write_text(tokens)
    return folder


def train_a_little(source, target, pairs, out, *options):
    """One step from a random projector: nothing of a run is left at what it started from."""
    train.main(["--src", str(source), "--tgt", str(target), "--data", str(pairs), "--out", str(out), *(() if "--from-scratch" in options else ("--no-warm-up", "--init", "random")), "--steps", "1",
                "--batch-size", "8", "--lr", "1e-2", "--workers", "0", "--precision", "fp32", *options])
    return out


@pytest.fixture(params=FAMILIES, scope="module")
def exported(request, world, tmp_path_factory):
    """(run, folder that it was exported to, pictures)"""
    folder = tmp_path_factory.mktemp("export")
    run = train_a_little(world[0], write_llm(folder / "llm", request.param), world[2], folder / "run")
    export.main([str(run), str(folder / "blip2"), "--precision", "fp32"])
    return run, folder / "blip2", [world[2].parent / f"{i}.png" for i in range(3)]


def test_whoever_may_read_one_file_of_an_export_may_read_all(exported):
    assert len({file.stat().st_mode for file in exported[1].iterdir()}) == 1


def load_theirs(folder):
    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(loading.values()), loading  # missing, unexpected, misshapen
    return theirs.eval()


def inputs_of(processor, files, text=""):
    return processor(images=[Image.open(file) for file in files], text=[text] * len(files), return_tensors="pt")


def test_transformers_computes_the_same_logits(exported):
    run, folder, files = exported
    (ours, tok), theirs = transfer.load_model(str(run), torch.float32), load_theirs(folder)
    images = qformer.normalise(torch.stack([data.resize(data.load_image(file), 28) for file in files]))
    inputs = inputs_of(Blip2Processor.from_pretrained(folder), files)
    assert (inputs["pixel_values"] - images).abs().max() < 0.0151  # a level of 255: Pillow's kernel, torch's kernel
    inputs["pixel_values"] = images
    targets = torch.randint(5, tok.encoder.get_vocab_size(), (3, 7), generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([data.prompt_ids(tok, 5)] * 3)
    with torch.no_grad():
        reference = ours.llm(ours.prefix(prompt, images)[0], targets)
        if tok.encoder_decoder:
            logits = theirs(**inputs, labels=targets).logits
        else:
            ids = torch.cat([inputs["input_ids"], targets], dim=1)
            logits = theirs(pixel_values=inputs["pixel_values"], input_ids=ids).logits[:, -8:-1]
    assert conftest.relative_error(logits[..., : reference.shape[-1]], reference) < 2e-5
    new = logits[..., reference.shape[-1] :]  # of the image token, where there was no room for it: the mean of all others
    assert new.shape[-1] == (tok.encoder.get_vocab_size() == ours.llm.vocab_size) and torch.allclose(
        new, reference.mean(-1, keepdim=True)[..., : new.shape[-1]], atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a red"])
def test_transformers_says_the_same(exported, beams, prompt):
    """Greedily and in beams, with and without a prompt, through its own processor, and up to the end that config.json says."""
    run, folder, files = exported
    ours, tok = transfer.load_model(str(run), torch.float32)
    images = torch.stack([data.resize(data.load_image(file), 28) for file in files])
    says = transfer.answer(ours, tok, images, prompt, num_beams=beams, max_new_tokens=12)
    theirs, processor = load_theirs(folder), AutoProcessor.from_pretrained(folder)
    options = dict(num_beams=beams, max_new_tokens=12, do_sample=False)
    inputs = inputs_of(processor, files, prompt)
    ids = theirs.generate(**inputs, **options)
    if not tok.encoder_decoder:  # transformers gives the prompt back before the answer
        assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        ids = ids[:, inputs["input_ids"].shape[1] :]
    assert [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)] == says and any(says)
    assert theirs.language_model.generation_config.eos_token_id == ([tok.end_id, tok.eos_id] if tok.end_id != tok.eos_id else [tok.eos_id])
    if not prompt and (tok.encoder_decoder or tok.bos_id is not None):  # nor need there be a text
        ids = theirs.generate(pixel_values=inputs_of(processor, files)["pixel_values"], **options)
        assert [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)] == says


def test_the_tokenizer_is_the_same_and_knows_the_image_token(exported):
    run, folder, _ = exported
    _, tok = transfer.load_model(str(run), torch.float32)
    processor, config = Blip2Processor.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"] < config["text_config"]["vocab_size"]
    for text in ("a red square", "Two  dogs, one cat!", "naïve 7\n", ""):
        ours = data.prompt_ids(tok, 0, text)
        assert processor.tokenizer(text)["input_ids"] == ours and processor.tokenizer.decode(ours, skip_special_tokens=True) == tok.decode(ours)


def test_in_bf16_and_in_shards(world, tmp_path, monkeypatch):
    """The default: all weights in bf16, which from_pretrained loads them in if nothing else is said."""
    run = train_a_little(*world, tmp_path / "run")
    monkeypatch.setattr(export, "SHARD_BYTES", 5e4)
    export.main([str(run), str(tmp_path / "blip2")])
    files = list((tmp_path / "blip2").glob("model-*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 7e4 for file in files)
    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2", output_loading_info=True)
    assert not any(loading.values()) and theirs.language_projection.weight.dtype == theirs.language_model.lm_head.weight.dtype == torch.bfloat16
    stored, trained = {name: t for file in files for name, t in load_file(file).items()}, load_file(run / "model.safetensors")
    assert trained.keys() < stored.keys() and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in trained.items())
    index = json.loads((tmp_path / "blip2" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys() and index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    card = (tmp_path / "blip2" / "README.md").read_text()
    assert 'from_pretrained("blip2", dtype="bfloat16")' in card and "moved to target by VPGTrans" in card


def test_padded_prompts_and_grey_images(exported):
    """Prompts of two lengths in a batch, padded as the processor does, and an image that is not RGB."""
    run, folder, files = exported
    ours, tok = transfer.load_model(str(run), torch.float32)
    theirs, processor = load_theirs(folder), Blip2Processor.from_pretrained(folder)
    images, prompts = [Image.open(files[0]), Image.open(files[1]).convert("L")], ["a red", "a green square on a"]
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    if tok.encoder_decoder:
        ids = theirs.generate(**inputs, max_new_tokens=8)
    else:  # image tokens stand before the padding
        ids = theirs.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    says = [transfer.answer(ours, tok, data.resize(image, 28)[None], prompt, num_beams=1, max_new_tokens=8)[0] for image, prompt in zip(images, prompts)]
    assert [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)] == says


def test_what_is_left_out_of_configs_is_written_down(world, tmp_path):
    """A ViT that is cut behind its second block, in a source whose config.json leaves out what is BLIP-2's default."""
    source = tmp_path / "source"
    shutil.copytree(world[0], source)
    config = json.loads((source / "config.json").read_text())
    for part in ("vision_config", "qformer_config"):
        config[part] = {key: value for key, value in config[part].items() if key not in ("hidden_act", "layer_norm_eps", "qkv_bias", "model_type",
                                                                                        "cross_attention_frequency")}
    (source / "config.json").write_text(json.dumps(config))
    run = train_a_little(source, world[1], world[2], tmp_path / "run")
    scratch = train_a_little(source, world[1], world[2], tmp_path / "scratch", "--from-scratch", "--vit-layers", "2")
    for run in (run, scratch):
        export.main([str(run), str(tmp_path / f"{run.name}-blip2"), "--precision", "fp32"])
        ours, theirs = transfer.load_model(str(run), torch.float32)[0], load_theirs(tmp_path / f"{run.name}-blip2")
        assert len(theirs.vision_model.encoder.layers) == (2 if run == scratch else 3)
        images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        assert conftest.relative_error(theirs.get_image_features(images).pooler_output[0], ours.projector(ours.vpg(images))[0]) < 2e-5


def test_what_a_killed_export_left_is_not_taken_over(world, tmp_path):
    """Shards of another run under a name that an export in progress had."""
    run = train_a_little(*world, tmp_path / "run")
    (tmp_path / "blip2.unfinished").mkdir()
    (tmp_path / "blip2.unfinished" / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "here").mkdir()
    (tmp_path / "blip2").symlink_to(tmp_path / "here")
    export.main([str(run), str(tmp_path / "blip2")])
    assert "model.safetensors" in os.listdir(tmp_path / "here") and "model.safetensors.index.json" not in os.listdir(tmp_path / "here")
    assert os.listdir(tmp_path / "blip2.unfinished") == ["model.safetensors.index.json"] and len(list(tmp_path.iterdir())) == 4


def test_an_export_is_a_source(exported, world, tmp_path, capsys):
    """And for us it is what any BLIP-2 checkpoint is."""
    _, folder, files = exported
    sample.main([str(files[0]), "--model", str(folder), "--precision", "fp32", "--num-beams", "1"])
    assert capsys.readouterr().out.startswith(f"{files[0]}: ")
    train.main(["--src", str(folder), "--tgt", str(world[1]), "--data", str(world[2]), "--out", str(tmp_path / "run"), "--gate", "0", "--steps", "1",
                "--warm-up-steps", "1", "--batch-size", "8", "--workers", "0", "--precision", "fp32"])
    assert "word converter: 32 -> 32" in capsys.readouterr().out


def test_another_image_size_is_written_into_the_position_embeddings(world, tmp_path):
    run = train_a_little(*world, tmp_path / "run", "--image-size", "42")
    export.main([str(run), str(tmp_path / "blip2"), "--precision", "fp32"])
    ours, _ = transfer.load_model(str(run), torch.float32)
    theirs, processor = load_theirs(tmp_path / "blip2"), Blip2Processor.from_pretrained(tmp_path / "blip2")
    inputs = inputs_of(processor, [world[2].parent / "0.png"])
    assert inputs["pixel_values"].shape == (1, 3, 42, 42)
    features = theirs.vision_model(inputs["pixel_values"]).last_hidden_state
    assert conftest.relative_error(features, ours.vpg.vision_model.post_layernorm(ours.vpg.features(inputs["pixel_values"]))) < 2e-5


# -------------------------------------------------------------------------------------------------------------- refusals


def refused(capsys, argv, *says):
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in argv])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(text in said for text in says), said


def test_what_the_format_cannot_say_is_refused(world, tmp_path, capsys):
    """opt-350m, and CLIP."""
    small = write_llm(tmp_path / "opt-350m", "opt")
    tokens = (small / "tokenizer_config.json").read_text()
    make_model(small, OPT | dict(vocab_size=600, do_layer_norm_before=False, word_embed_proj_dim=16))
    (small / "tokenizer_config.json").write_text(tokens)
    refused(capsys, [train_a_little(world[0], small, world[2], tmp_path / "a"), tmp_path / "blip2"], "in 16 numbers and works with 32 (opt-350m)", "sample.py")
    conftest.write_clip(tmp_path / "clip")
    options = ["--src", str(tmp_path / "clip"), "--tgt", str(world[1]), "--data", str(world[2]), "--out", str(tmp_path / "b"), "--from-scratch", "--steps", "1",
               "--batch-size", "8", "--workers", "0"]
    train.main(options)
    refused(capsys, [tmp_path / "b", tmp_path / "blip2"], "ViT is CLIP's", "sample.py")
    assert not (tmp_path / "blip2").exists() and not list(tmp_path.glob("*.unfinished"))


def test_bad_folders_and_disks_are_refused_and_nothing_is_left(world, tmp_path, capsys, monkeypatch):
    run = train_a_little(*world, tmp_path / "run")
    refused(capsys, [tmp_path / "nowhere", tmp_path / "blip2"], "nowhere: no such folder")
    refused(capsys, [run, run], "is not empty; name a new folder")
    (tmp_path / "file").write_text("")
    refused(capsys, [run, tmp_path / "file"], "file: is not empty")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1000, 900, 100))
        refused(capsys, [run, tmp_path / "blip2"], "GB are free there")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_file", full)
        refused(capsys, [run, tmp_path / "blip2"], "No space left on device")
    assert {file.name for file in tmp_path.iterdir()} == {"run", "file"}
    (tmp_path / "empty").mkdir()
    export.main([str(run), str(tmp_path / "empty")])
    assert os.listdir(tmp_path / "empty")
