"""Facts about transfer.py: two checkpoints to the model before its first step, a run to one that answers."""

import json
import os
import shutil

import pytest
import torch
from conftest import (
    LLAMA_CONFIG,
    T5_CONFIG,
    arguments,
    copy_checkpoint,
    edited,
    make_model,
    picture,
    train_in,
    values,
    write_clip,
    write_kind,
    write_source,
    write_target,
)
from safetensors.torch import load_file

import data
import hub
import qformer
import sample
import train
import transfer

# ---------------------------------------------------------------- the projector in the target's words


def names_of(tok):
    return {id: token for token, id in tok.vocab().items()}


@pytest.mark.parametrize("kind", ["LLaMA, pre-tokenizer", "Unigram"])
def test_a_first_word_is_one_word_to_all_tokenizers(world, tmp_path, kind):
    """OPT's has no space before it, those of LLaMA and T5 do. All other tokens match by the same bytes."""
    opt = data.load_tokenizer(world[0])
    other = data.load_tokenizer(write_kind(tmp_path / "other", kind))
    for caption in ("red circle on a table", "a red circle beside a red square"):
        for src, tgt in ((opt, other), (other, opt), (opt, opt)):
            src_names = names_of(src)
            tgt_names = names_of(tgt)
            src_ids = src.encode(caption)
            tgt_ids = tgt.encode(caption)
            matched = transfer.match_tokens(src_ids, tgt_ids, src_names, tgt_names)
            words = [src_names[i].strip() for i, _ in matched]
            assert words == [tgt_names[j].strip() for _, j in matched]
            shared = {src_names[i].strip() for i in src_ids} & {tgt_names[j].strip() for j in tgt_ids}
            assert set(words) == shared
            assert len(shared) >= 2
        ids = opt.encode(caption)
        assert transfer.match_tokens(ids, ids, names_of(opt), names_of(opt)) == [(i, i) for i in ids]


def test_the_converter_heeds_how_often_captions_use_a_token(world):
    """Its fit is better on what the captions say than on the rest, and says so."""
    source = hub.resolve(str(world[0]), "source")
    target = hub.resolve(str(world[1]), "target")
    said = []

    def convert(caption):
        projector = qformer.load_projector(world[0])
        words = transfer.read_shared_words(projector, source, target)
        size = max(words.src_tok.vocab().values()) + 1
        counts = data.count_tokens(words.src_tok, [caption], size)[words.src_ids]
        return transfer.convert_projector(projector, words, counts, said.append, ridge=1e-3)

    one = convert("a red square")
    other = convert("a blue circle on a table")
    assert not torch.allclose(one.weight, other.weight, atol=1e-2)
    assert (one.in_features, one.out_features) == (32, 32)
    used = set(data.caption_ids(data.load_tokenizer(world[0]), "a red square"))
    assert f"{len(used)} of them in the captions" in said[0]


# ------------------------------------------------------------------------------------------- the VPG


@pytest.mark.slow
def test_from_scratch_forgets_the_q_former_but_not_the_vit(world, tmp_path):
    """BERT's initialisation: weights of deviation 0.02, biases 0, norms 1."""
    train.main(arguments(world, tmp_path / "run", "--from-scratch", "--lr", "1e-9"))
    ours = load_file(tmp_path / "run" / "model.safetensors")
    block = "qformer.encoder.layer.1"
    assert 0.015 < ours[f"{block}.intermediate_query.dense.weight"].std() < 0.025
    assert 0.01 < ours["query_tokens"].std() < 0.03
    assert torch.allclose(ours["vision_model.post_layernorm.weight"], torch.ones(48), atol=1e-5)
    assert torch.allclose(ours[f"{block}.output_query.dense.bias"], torch.zeros(32), atol=1e-5)


@pytest.mark.slow
def test_from_scratch_can_start_from_a_given_vpg(world, tmp_path):
    write_source(tmp_path / "given", seed=5)
    train.main(arguments(world, tmp_path / "run", "--from-scratch", tmp_path / "given", "--lr", "1e-9"))
    queries, given, source = (load_file(folder / "model.safetensors")["query_tokens"]
                              for folder in (tmp_path / "run", tmp_path / "given", world[0]))
    assert torch.allclose(queries, given, atol=1e-5)
    assert not torch.allclose(queries, source, atol=1e-2)


@pytest.mark.parametrize("options, says", [
    (["--num-beams", "0"], "num_beams = 0"), (["--max-new-tokens", "0"], "max_new_tokens = 0"),
    (["--temperature", "0.7"], "num_beams = 1 or")])
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(
        world, fails, monkeypatch, options, says):
    monkeypatch.setattr(transfer, "load_model", None)
    fails(sample.main, [picture(world), "--model", world[0], *options], says)


@pytest.mark.slow
def test_a_run_remembers_how_its_vpg_is_configured(world, tmp_path):
    """That of --from-scratch VPG, not that of the source."""
    seven = copy_checkpoint(world[0], tmp_path / "seven", query_tokens=torch.randn(1, 7, 32))
    with edited(seven / "config.json") as config:
        config["num_query_tokens"] = 7
        config["qformer_config"]["layer_norm_eps"] = 1e-6
    train.main(arguments(world, tmp_path / "run", "--from-scratch", seven))
    sample.main([str(picture(world)), "--model", str(tmp_path / "run"), "--precision", "fp32"])
    model, _ = transfer.load_model(str(tmp_path / "run"))
    assert model.vpg.num_query_tokens == 7
    assert model.vpg.qformer.layernorm.eps == 1e-6


@pytest.mark.slow
def test_from_scratch_on_clip(world, tmp_path, small_q_former, refused):
    """CLIP's ViT alone, cut behind a block, carries a random Q-Former; the run captions, and is a source
    for another LLM."""
    write_clip(tmp_path / "clip")
    argv = arguments((tmp_path / "clip", *world[1:]), tmp_path / "run")
    refused(train.main, argv, "--from-scratch")
    train.main([*argv, "--from-scratch", "--vit-layers", "2", "--image-size", "42"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vit_layers"], config["image_size"]) == (2, 42)
    assert config["vision_config"]["num_hidden_layers"] == 2

    write_target(tmp_path / "other", seed=9)
    train.main(arguments((tmp_path / "run", tmp_path / "other", world[2]), tmp_path / "chained"))
    for run in (tmp_path / "run", tmp_path / "chained"):
        sample.main([str(picture(world)), "--model", str(run), "--precision", "fp32"])
        model, _ = transfer.load_model(str(run))
        assert model.vpg.image_size == 42
        assert len(model.vpg.vision_model.encoder["layers"]) == 2


@pytest.mark.slow
def test_another_image_size_is_kept(world, tmp_path, refused):
    argv = arguments(world, tmp_path / "run", "--image-size")
    refused(train.main, [*argv, "40"], "40 is not a multiple of the ViT's patch")
    train.main([*argv, "56"])
    sample.main([str(picture(world)), "--model", str(tmp_path / "run"), "--precision", "fp32"])
    model, _ = transfer.load_model(str(tmp_path / "run"))
    assert model.vpg.image_size == 56
    assert model.vpg.vision_model.embeddings.position_embedding.shape[1] == 17


# ------------------------------------------------------------------------------------- other families


@pytest.fixture(params=["LLaMA, pre-tokenizer", "Unigram"], scope="module")
def other_family(request, world, tmp_path_factory):
    """A run from the OPT source towards a LLaMA or a T5: (target, run, what it printed)."""
    folder = tmp_path_factory.mktemp("family")
    target = write_kind(folder / "target", request.param)
    make_model(target, (T5_CONFIG if request.param == "Unigram" else LLAMA_CONFIG) | dict(vocab_size=800))
    argv = arguments((world[0], target, world[2]), folder / "run", "--steps", "20")
    return target, folder / "run", train_in(1, argv)


def assert_learns(run):
    losses = values(run, "val_loss")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_other_families_are_targets(other_family, world, capsys):
    """A LLaMA with its tokenizer, and a T5, trained as a prefix LM: the loss falls, and they caption."""
    _, run, printed = other_family
    assert "word converter: 40 -> 32" in printed
    assert_learns(run)
    images = [str(picture(world, i)) for i in range(2)]
    sample.main(["--model", str(run), *images, "--precision", "fp32", "--num-beams", "2"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "0.png: " in said[0]


@pytest.mark.slow
def test_other_families_are_targets_of_what_soft_prompts_mean(other_family, world, tmp_path, capsys):
    target, _, _ = other_family
    options = ["--init", "captions", "--lr", "5e-5", "--warm-up-lr", "5e-5"]
    train.main(arguments((world[0], target, world[2]), tmp_path / "run", *options))
    assert "fitted to the captions of" in capsys.readouterr().out
    assert_learns(tmp_path / "run")


@pytest.mark.slow
def test_other_families_are_sources(other_family, world, tmp_path, capsys):
    """Back to an OPT: the run's LLM lends its word embeddings."""
    _, run, _ = other_family
    train.main(arguments((run, world[1], world[2]), tmp_path / "back"))
    assert "word converter: 32 -> 32" in capsys.readouterr().out
    assert_learns(tmp_path / "back")


@pytest.mark.slow
def test_a_target_without_tokenizer_takes_that_of_another(other_family, world, tmp_path, capsys, refused):
    """lmsys/vicuna-*: only a tokenizer.model. The run remembers where its tokenizer was."""
    target, _, _ = other_family
    bare = tmp_path / "bare"
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(target, bare)
    tokenizer.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).rename(tokenizer / file)
    shutil.copy(bare / "config.json", tokenizer)
    (bare / "tokenizer.model").write_bytes(b"sentencepiece")
    argv = arguments((world[0], bare, world[2]), tmp_path / "run")
    refused(train.main, argv, "--tgt-tokenizer")
    train.main([*argv, "--tgt-tokenizer", str(tokenizer)])
    capsys.readouterr()
    sample.main(["--model", str(tmp_path / "run"), str(picture(world)), "--precision", "fp32"])
    assert "0.png: " in capsys.readouterr().out


def test_a_tokenizer_of_another_llm_is_refused(world, tmp_path, refused):
    """One with ids that the LLM has no embeddings for."""
    tokenizer = write_kind(tmp_path / "tokenizer", "LLaMA, pre-tokenizer")
    argv = arguments(world, tmp_path / "run", "--tgt-tokenizer", tokenizer)
    refused(train.main, argv, "has ids up to")


# -------------------------------------------------------------------------------- a run as a model


@pytest.mark.slow
def test_transfers_chain(finished, world, tmp_path):
    """A run as the source of the next one; towards the same LLM its projector stays, towards another it is
    converted."""
    run, _ = finished
    same = arguments((run, world[1], world[2]), tmp_path / "same", "--lr", "1e-9", "--stage", "fine-tune")
    train.main(same)
    before = load_file(run / "model.safetensors")["language_projection.weight"]
    after = load_file(tmp_path / "same" / "model.safetensors")["language_projection.weight"]
    assert torch.allclose(after, before, atol=1e-5)
    write_target(tmp_path / "other", seed=9)
    train.main(arguments((run, tmp_path / "other", world[2]), tmp_path / "chained"))
    config = json.loads((tmp_path / "chained" / "config.json").read_text())
    assert config["vit"]["name"] == str(world[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    [],
    ["--prompt", "a red", "--num-beams", "1"],
    ["--num-beams", "1", "--temperature", "0.7", "--top-p", "0.9"],
])
def test_sampling_captions_and_answers(finished, world, capsys, options):
    run, _ = finished
    image = str(picture(world))
    sample.main([image, *options, "--model", str(run)])
    assert capsys.readouterr().out.startswith(f"{image}: ")


def test_a_blank_at_the_end_of_a_prompt_is_taken_off(world, monkeypatch):
    model, tok = transfer.load_model(str(world[0]))
    asked = []

    def generate(prompts, **_):
        asked.append(prompts.tolist())
        return [[]]

    monkeypatch.setattr(model, "generate", generate)
    for prompt in ("a red", "a red  "):
        transfer.answer(model, tok, torch.zeros(1, 3, 28, 28, dtype=torch.uint8), prompt)
    assert asked[0] == asked[1]
    assert len(asked[0][0]) > 6


@pytest.mark.slow
def test_a_run_whose_llm_changed_is_refused(finished, world, tmp_path, fails):
    shutil.copytree(finished[0], tmp_path / "run")
    write_target(tmp_path / "changed", seed=4)
    with edited(tmp_path / "run" / "config.json") as config:
        config["llm"]["name"] = str(tmp_path / "changed")
    fails(sample.main, [picture(world), "--model", tmp_path / "run"], "fingerprint")


# ------------------------------------------------------------------------------------ bad checkpoints


@pytest.mark.parametrize("changes, says", [
    ({"query_tokens": None}, ["1 tensors missing", "query_tokens"]),
    ({"qformer.layernorm.bias": torch.zeros(7)}, ["qformer.layernorm.bias is (7,)", "(32,)"]),
    ({"language_projection.weight": torch.zeros(33, 32), "language_projection.bias": torch.zeros(33)},
     ["33 wide", "40 wide", "32"]),
], ids=["missing", "shape", "width"])
def test_a_source_with_wrong_tensors_is_refused(world, tmp_path, refused, changes, says):
    folder = copy_checkpoint(world[0], tmp_path / "source", **changes)
    refused(train.main, arguments((folder, *world[1:]), tmp_path / "run"), str(folder), *says)


def test_a_target_is_no_source(world, tmp_path, refused):
    refused(train.main, arguments((world[1], *world[1:]), tmp_path / "run"), "has no Q-Former")


def test_a_target_without_one_of_its_tensors_is_refused(world, tmp_path, refused):
    name = "model.decoder.layers.1.fc1.bias"
    folder = copy_checkpoint(world[1], tmp_path / "target", **{name: None})
    refused(train.main, arguments((world[0], folder, world[2]), tmp_path / "run"), name)


@pytest.mark.parametrize("file, content, says", [
    ("config.json", '{"model_type": "gpt_neox"}', "'gpt_neox' is not implemented"),
    ("config.json", "{", "not valid JSON"),
    ("config.json", "[1]", "not valid JSON"),
    ("model.safetensors.index.json", '{"weight', "damaged"),
])
def test_a_target_with_a_bad_file_is_refused(world, tmp_path, refused, file, content, says):
    folder = tmp_path / "target"
    shutil.copytree(world[1], folder)
    (folder / file).write_text(content)
    refused(train.main, arguments((world[0], folder, world[2]), tmp_path / "run"), f"target/{file}", says)


def test_a_target_whose_weights_are_cut_or_gone_is_refused(world, tmp_path, refused):
    folder = tmp_path / "target"
    argv = arguments((world[0], folder, world[2]), tmp_path / "run")
    refused(train.main, argv, f"{folder}: no such folder")
    shutil.copytree(world[1], folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    refused(train.main, argv, "target/model.safetensors", "download or copy it again")
    weights.unlink()
    refused(train.main, argv, str(folder), "no weights")
