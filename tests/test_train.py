"""Facts about train.py: the command runs from end to end, resumes, agrees across processes, and refuses bad input untouched."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache
import conftest
import data
import loop
import qformer
import runs
import sample
import train
import transfer
import vpgtrans
from conftest import LLAMA_CONFIG as LLAMA, T5_CONFIG as T5, make_model, write_kind, write_shard
from pairs import Pairs, Strings, read_pairs

pytestmark = pytest.mark.slow

ROOT = Path(train.__file__).parent


def arguments(world, out, *more):
    source, target, pairs = world
    return ["--src", str(source), "--tgt", str(target), "--data", str(pairs), "--out", str(out), "--batch-size", "8", "--steps", "6",
            "--warm-up-steps", "3", "--lr", "1e-3", "--log-every", "1", "--val-every", "3", "--workers", "0", "--precision", "fp32", "--gate", "0", *more]


def rows(out, *keys):
    return [tuple(row[key] for key in keys) for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if set(keys) <= row.keys()]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One run of VPGTrans from end to end, in bf16, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(world, out, "--precision", "bf16", "--micro-batch", "3")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


# ---------------------------------------------------------------------------------------------------------- end to end


def test_a_run_leaves_weights_metrics_and_curves(finished, world):
    out, printed = finished
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json", "metrics.jsonl", "curves.png", "bad_data.jsonl", "resume.safetensors"}
    with safe_open(world[0] / "model.safetensors", framework="pt") as source:
        for name, tensor in load_file(out / "model.safetensors").items():
            assert name in source.keys() and (name.startswith("language_projection") or source.get_slice(name).get_shape() == list(tensor.shape))
    assert [s for s, _ in rows(out, "stage", "loss")] == ["warm-up"] * 3 + ["fine-tune"] * 6
    assert rows(out, "stage", "step", "val_loss_shuffled")[0][:2] == ("warm-up", 0) and rows(out, "step", "val_loss")[-1][0] == 6
    assert {"stage", "step", "samples", "loss", "lr", "seconds", "samples_per_second", "peak_memory"} <= json.loads(
        (out / "metrics.jsonl").read_text().splitlines()[1]).keys()
    assert "stage warm-up: 3 steps of 8 = 24 samples" in printed and "word converter: 40 -> 32" in printed and "(people: " in printed


def test_whoever_may_read_one_file_of_a_run_may_read_all(finished):
    assert len({file.stat().st_mode for file in finished[0].iterdir()}) == 1


def test_the_tables_printed_say_what_trains(finished):
    trainable = [line.split()[-2] for line in finished[1].splitlines() if line.endswith(("  train", "  eval"))]
    assert trainable == ["0", "0", "0", "0", "1,056", "0"] + ["0", "96", "160", "44,864", "1,056", "0"]


def test_the_warm_up_trains_only_the_projector(world, tmp_path):
    train.main(arguments(world, tmp_path / "run", "--stage", "warm-up"))
    trained, source = load_file(tmp_path / "run" / "model.safetensors"), load_file(world[0] / "model.safetensors")
    changed = {name for name in trained if name not in source or not torch.equal(trained[name], source[name])}
    assert changed == {"language_projection.weight", "language_projection.bias"}


def test_the_loss_falls(world, tmp_path):
    train.main(arguments(world, tmp_path / "run", "--steps", "60", "--lr", "1e-2"))
    losses = [loss for loss, in rows(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("options", [["--lr", "0"], ["--steps", "0"], ["--max-tokens", "1"], ["--from-scratch", "--no-warm-up"],
                                     ["--from-scratch", "--init", "random"], ["--data"]])
def test_arguments_out_of_range_are_refused(world, tmp_path, options):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "run", *options))
    assert stop.value.code == 2


@pytest.mark.parametrize("options, stages, says", [
    (["--no-warm-up"], ["fine-tune"], "word converter"), (["--init", "random"], ["warm-up", "fine-tune"], "projector: random"),
    (["--from-scratch"], ["from-scratch"], "random Q-Former"), (["--stage", "fine-tune"], ["fine-tune"], "word converter"),
    (["--init", "captions"], ["warm-up", "fine-tune"], "fitted to the captions of")])
def test_the_papers_baselines_run(world, tmp_path, capsys, options, stages, says):
    train.main(arguments(world, tmp_path / "run", *options))
    assert list(dict.fromkeys(s for s, in rows(tmp_path / "run", "stage"))) == stages and says in capsys.readouterr().out


def test_from_scratch_forgets_the_q_former_but_not_the_vit(world, tmp_path):
    """BERT's initialisation: weights of deviation 0.02, biases 0, norms 1."""
    train.main(arguments(world, tmp_path / "run", "--from-scratch", "--lr", "1e-9"))
    ours = load_file(tmp_path / "run" / "model.safetensors")
    weight = ours["qformer.encoder.layer.1.intermediate_query.dense.weight"]
    assert 0.015 < weight.std() < 0.025 and 0.01 < ours["query_tokens"].std() < 0.03
    assert torch.allclose(ours["vision_model.post_layernorm.weight"], torch.ones(48), atol=1e-5)
    assert torch.allclose(ours["qformer.encoder.layer.1.output_query.dense.bias"], torch.zeros(32), atol=1e-5)


def test_images_that_cannot_be_read_do_not_stop_the_fit_to_captions(world, tmp_path, capsys, monkeypatch):
    """Unless there are no others."""
    import hub

    source, target = hub.resolve(str(world[0]), "source"), hub.resolve(str(world[1]), "target")
    projector, vpg, processes = qformer.load_projector(world[0]), qformer.load_vpg(world[0], torch.float32), loop.Processes.start("fp32")
    lines = [json.loads(line) for line in world[2].read_text().splitlines()][:10]
    for line in lines:
        line["image"] = str(world[2].parent / line["image"])
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines += [lines[0] | {"image": str(tmp_path / "broken.png")}]
    read = lambda some: (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some)) and [read_pairs(str(tmp_path / "pairs.jsonl"))]
    fit = lambda some: transfer.refit_projector(projector, vpg, source, target, read(some), 4, processes)
    match = transfer.match_tokens
    monkeypatch.setattr(transfer, "match_tokens", lambda ids, *others: match(ids, *others) if len(ids) > 1 else [])
    lines += [lines[0] | {"caption": "?"}]  # one token, as if the target had no such
    fitted, alone = fit(lines), fit(lines[:10])
    assert torch.equal(fitted.weight, alone.weight)
    some, all_there = capsys.readouterr().out.splitlines()
    assert "captions of 10 images" in some and "without 1 whose captions have no word in both" in some
    assert "without 1 that cannot be read" in some and "broken.png" in some and "without" not in all_there
    with pytest.raises(ValueError, match="no image could be read"):
        fit(lines[10:])


@pytest.mark.parametrize("kind", ["LLaMA, pre-tokenizer", "Unigram"])
def test_a_first_word_is_one_word_to_all_tokenizers(world, tmp_path, kind):
    """OPT's has no space before it, those of LLaMA and T5 do. All other tokens match by the same bytes."""

    tokenizers = [data.load_tokenizer(folder) for folder in (world[0], write_kind(tmp_path / "other", kind))]
    names = [{id: token for token, id in tok.vocab().items()} for tok in tokenizers]
    for caption in ("red circle on a table", "a red circle beside a red square"):
        (one, two), (ours, theirs) = [tok.encode(caption) for tok in tokenizers], names
        for here, there, here_names, there_names in ((one, two, ours, theirs), (two, one, theirs, ours), (one, one, ours, ours)):
            matched = transfer.match_tokens(here, there, here_names, there_names)
            assert all(here_names[i].strip() == there_names[j].strip() for i, j in matched)
            words = {here_names[i].strip() for i in here} & {there_names[j].strip() for j in there}
            assert {here_names[i].strip() for i, _ in matched} == words and len(words) >= 2
        assert transfer.match_tokens(one, one, ours, ours) == [(i, i) for i in one]


def test_the_converter_heeds_how_often_captions_use_a_token(world):
    """Its fit is better on what the captions say than on the rest, and says so."""
    import hub

    source, target, said = hub.resolve(str(world[0]), "source"), hub.resolve(str(world[1]), "target"), []
    projectors = [transfer.convert_projector(qformer.load_projector(world[0]), source, target, captions, said.append)
                  for captions in (["a red square"], ["a blue circle on a table"])]
    assert not torch.allclose(projectors[0].weight, projectors[1].weight, atol=1e-2)
    used = set(data.caption_ids(data.load_tokenizer(world[0]), "a red square"))
    assert f"{len(used)} of them in the captions" in said[0] and (projectors[0].in_features, projectors[0].out_features) == (32, 32)


def test_no_validation_image_is_trained_on_in_any_stage(world, tmp_path):
    """Also where the stages name the same file with other weights."""
    args = train.parse_arguments(["--src", "a", "--tgt", "b", "--data", f"{world[2]}:0.5", "--warm-up-data", str(world[2])])
    sets, val = train.find_data(args, train.choose_stages(args), lambda text: None)
    assert len(val) == 2 and sets["fine-tune"][1] == [0.5] and sets["warm-up"][1] is None
    for pairs, _ in sets.values():
        assert len(pairs[0]) == 22 and not set(pairs[0].files()) & set(val.files())


def test_from_scratch_can_start_from_a_given_vpg(world, tmp_path):
    other = tmp_path / "first-stage"
    conftest.write_source(other, seed=5)
    train.main(arguments(world, tmp_path / "given", "--from-scratch", str(other), "--lr", "1e-9"))
    ours, given = load_file(tmp_path / "given" / "model.safetensors"), load_file(other / "model.safetensors")
    assert torch.allclose(ours["query_tokens"], given["query_tokens"], atol=1e-5)
    assert not torch.allclose(ours["query_tokens"], load_file(world[0] / "model.safetensors")["query_tokens"], atol=1e-2)


def test_a_run_remembers_how_its_vpg_is_configured(world, tmp_path, capsys):
    """That of --from-scratch VPG, not that of the source."""
    seven = broken(world[0], tmp_path / "seven", query_tokens=torch.randn(1, 7, 32))
    config = json.loads((seven / "config.json").read_text())
    config["qformer_config"]["layer_norm_eps"] = 1e-6
    (seven / "config.json").write_text(json.dumps(config | {"num_query_tokens": 7}))
    train.main(arguments(world, tmp_path / "run", "--from-scratch", str(seven)))
    sample.main([str(world[2].parent / "0.png"), "--model", str(tmp_path / "run"), "--precision", "fp32"])
    vpg = transfer.load_model(str(tmp_path / "run"))[0].vpg
    assert vpg.num_query_tokens == 7 and vpg.qformer.layernorm.eps == 1e-6


def test_from_scratch_on_clip(world, tmp_path, capsys):
    """CLIP's ViT alone, cut behind a block, carries a random Q-Former; the run captions, and is a source for another LLM."""
    conftest.write_clip(tmp_path / "clip")
    with pytest.raises(SystemExit):
        train.main(arguments((tmp_path / "clip", *world[1:]), tmp_path / "run"))
    assert "--from-scratch" in capsys.readouterr().err and not (tmp_path / "run").exists()
    train.main(arguments((tmp_path / "clip", *world[1:]), tmp_path / "run", "--from-scratch", "--vit-layers", "2", "--image-size", "42"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vit_layers"], config["image_size"], config["vision_config"]["num_hidden_layers"]) == (2, 42, 2)
    conftest.write_target(tmp_path / "other", seed=9)
    train.main(arguments((tmp_path / "run", tmp_path / "other", world[2]), tmp_path / "chained"))
    for run in ("run", "chained"):
        sample.main([str(world[2].parent / "0.png"), "--model", str(tmp_path / run), "--precision", "fp32"])
        model, _ = transfer.load_model(str(tmp_path / run))
        assert model.vpg.image_size == 42 and len(model.vpg.vision_model.encoder["layers"]) == 2


def test_another_image_size_is_kept(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "run", "--image-size", "40"))
    assert stop.value.code == 2 and "40 is not a multiple of the ViT's patch" in capsys.readouterr().err
    train.main(arguments(world, tmp_path / "run", "--image-size", "56"))
    sample.main([str(world[2].parent / "0.png"), "--model", str(tmp_path / "run"), "--precision", "fp32"])
    model, _ = transfer.load_model(str(tmp_path / "run"))
    assert model.vpg.image_size == 56 and model.vpg.vision_model.embeddings.position_embedding.shape[1] == 17


@pytest.fixture(params=["LLaMA, pre-tokenizer", "Unigram"], scope="module")
def other_family(request, world, tmp_path_factory):
    """A run from the OPT source towards a LLaMA or a T5: (target, run, what it printed)."""
    folder = tmp_path_factory.mktemp("family")
    target = write_kind(folder / "target", request.param)
    tokens = json.loads((target / "tokenizer_config.json").read_text())
    make_model(target, (T5 if request.param == "Unigram" else LLAMA) | dict(vocab_size=800))
    (target / "tokenizer_config.json").write_text(json.dumps(tokens))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments((world[0], target, world[2]), folder / "run", "--steps", "20")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, folder / "run", done.stdout


def test_other_families_are_targets(other_family, world, capsys):
    """A LLaMA with its tokenizer, and a T5, which is trained as a prefix LM: the loss falls, and they caption."""
    target, run, printed = other_family
    losses = [loss for loss, in rows(run, "val_loss")]
    assert "word converter: 40 -> 32" in printed and losses[-1] < losses[0]
    sample.main(["--model", str(run), str(world[2].parent / "0.png"), str(world[2].parent / "1.png"), "--precision", "fp32", "--num-beams", "2"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "0.png: " in said[0]


def test_other_families_are_targets_of_what_soft_prompts_mean(other_family, world, tmp_path, capsys):
    train.main(arguments((world[0], other_family[0], world[2]), tmp_path / "run", "--init", "captions", "--lr", "5e-5", "--warm-up-lr", "5e-5"))
    assert "fitted to the captions of" in capsys.readouterr().out
    losses = [loss for loss, in rows(tmp_path / "run", "val_loss")]
    assert losses[-1] < losses[0]


def test_other_families_are_sources(other_family, world, tmp_path, capsys):
    """Back to an OPT: the run's LLM lends its word embeddings."""
    train.main(arguments((other_family[1], world[1], world[2]), tmp_path / "back"))
    assert "word converter: 32 -> 32" in capsys.readouterr().out
    losses = [loss for loss, in rows(tmp_path / "back", "val_loss")]
    assert losses[-1] < losses[0]


def test_a_target_without_tokenizer_takes_that_of_another(other_family, world, tmp_path, capsys):
    """lmsys/vicuna-*: only a tokenizer.model. The run remembers where its tokenizer was."""
    bare, tokenizer = tmp_path / "bare", tmp_path / "tokenizer"
    shutil.copytree(other_family[0], bare)
    tokenizer.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).rename(tokenizer / file)
    (tokenizer / "config.json").write_text((bare / "config.json").read_text())
    (bare / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(SystemExit):
        train.main(arguments((world[0], bare, world[2]), tmp_path / "run"))
    assert "--tgt-tokenizer" in capsys.readouterr().err and not (tmp_path / "run").exists()
    train.main(arguments((world[0], bare, world[2]), tmp_path / "run", "--tgt-tokenizer", str(tokenizer)))
    sample.main(["--model", str(tmp_path / "run"), str(world[2].parent / "0.png"), "--precision", "fp32"])
    assert "0.png: " in capsys.readouterr().out


def test_a_tokenizer_of_another_llm_is_refused(world, tmp_path, capsys):
    """One with ids that the LLM has no embeddings for."""
    tokenizer = write_kind(tmp_path / "tokenizer", "LLaMA, pre-tokenizer")
    with pytest.raises(SystemExit):
        train.main(arguments(world, tmp_path / "run", "--tgt-tokenizer", str(tokenizer)))
    assert "has ids up to" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_transfers_chain(finished, world, tmp_path):
    """A run as the source of the next one; towards the same LLM its projector stays, towards another it is converted."""
    run = finished[0]
    train.main(arguments((run, world[1], world[2]), tmp_path / "same", "--lr", "1e-9", "--stage", "fine-tune"))
    ours, before = load_file(tmp_path / "same" / "model.safetensors"), load_file(run / "model.safetensors")
    assert torch.allclose(ours["language_projection.weight"], before["language_projection.weight"], atol=1e-5)
    conftest.write_target(tmp_path / "other", seed=9)
    train.main(arguments((run, tmp_path / "other", world[2]), tmp_path / "chained"))
    assert json.loads((tmp_path / "chained" / "config.json").read_text())["vit"]["name"] == str(world[0])


def test_without_data_the_papers_layout_is_used(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VPGTRANS_DATA", str(tmp_path))
    source, target, pairs = world
    args = ["--src", str(source), "--tgt", str(target), "--out", str(tmp_path / "run"), "--batch-size", "8", "--steps", "2", "--warm-up-steps", "2", "--workers", "0",
            "--gate", "0"]
    with pytest.raises(SystemExit):
        train.main(args)
    said = capsys.readouterr().err
    assert "annotations" in said and "cocodataset.org" in said and "--data" in said
    shutil.copytree(pairs.parent, tmp_path / "vg")
    (tmp_path / "vg" / "pairs.jsonl").rename(tmp_path / "vg" / "vg.jsonl")
    shutil.copytree(pairs.parent, tmp_path / "sbu")
    (tmp_path / "sbu" / "pairs.jsonl").rename(tmp_path / "sbu" / "sbu.jsonl")
    train.main(args)
    said = capsys.readouterr().out
    assert "stage warm-up: not under" in said and "left out: coco" in said and "left out: coco, laion" in said
    assert "stage fine-tune: epochs of each data set in its 16 samples: vg 0.73" in said


# ------------------------------------------------------------------------------------------------------ resume, processes


@pytest.mark.parametrize("stage, step, killed_by, code, init", [("warm-up", 2, "SIGKILL", -9, "converter"), ("fine-tune", 3, "SIGKILL", -9, "random"),
                                                           ("fine-tune", 2, "SIGTERM", 130, "captions")])
def test_a_killed_run_continues_with_the_same_losses(world, tmp_path, stage, step, killed_by, code, init):
    """Killed after a line of the log, with dropout on: a resumed run draws what it would have drawn. The log's last line
    is cut in the middle, as a kill may leave it."""
    conftest.write_source(tmp_path / "source", dropout=0.1)
    world = (tmp_path / "source", *world[1:])
    train.main(arguments(world, tmp_path / "whole", "--save-every", "1", "--init", init))
    def kill(at):
        if (at["stage"], at["step"]) == (stage, step):
            os.kill(os.getpid(), getattr(signal, killed_by))

    assert in_a_process(train.main, arguments(world, tmp_path / "killed", "--save-every", "1", "--init", init), kill) == code
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as log:
        log.write('{"stage": "warm-up", "st')
    train.main(arguments(world, tmp_path / "killed", "--save-every", "1", "--init", init, "--resume"))
    assert rows(tmp_path / "killed", "stage", "step", "loss") == rows(tmp_path / "whole", "stage", "step", "loss")
    assert rows(tmp_path / "killed", "step", "val_loss") == rows(tmp_path / "whole", "step", "val_loss")


def test_a_damaged_state_gives_way_to_the_one_before(world, tmp_path, capsys):
    train.main(arguments(world, tmp_path / "whole"))
    for damage in (lambda file: file.unlink(), lambda file: os.truncate(file, file.stat().st_size // 2), lambda file: file.write_bytes(b"")):
        out = tmp_path / "run"
        with pytest.raises(SystemExit):
            stop_at("fine-tune", 4, arguments(world, out, "--save-every", "2"))
        assert {file.name for file in out.glob("*.safetensors")} == {"model.safetensors", runs.STATE, runs.PREVIOUS}
        damage(out / runs.STATE)
        capsys.readouterr()
        train.main(arguments(world, out, "--save-every", "2", "--resume"))
        said = capsys.readouterr().out
        assert "projector: as it was saved" in said and "word converter" not in said
        assert (": damaged (" in said) == (f"from {runs.PREVIOUS}, step 4 of stage fine-tune" in said)
        assert rows(out, "stage", "step", "loss") == rows(tmp_path / "whole", "stage", "step", "loss")
        shutil.rmtree(out)
    with pytest.raises(SystemExit):
        stop_at("fine-tune", 4, arguments(world, out, "--save-every", "2"))
    for file in (runs.STATE, runs.PREVIOUS):
        (out / file).write_bytes(b"no state")
    refused(capsys, arguments(world, out, "--resume"), runs.STATE, runs.PREVIOUS, "damaged")


def stop_at(stage, step, argv):
    """The command, asked to stop after a line of the log."""
    def watch(at):
        if (at["stage"], at["step"]) == (stage, step):
            loop.stop_asked.set()

    train.main(argv, watch)


def in_a_process(command, *arguments):
    """Runs a function in a process of its own. -> its exit code, or less than 0: the signal that killed it"""
    process = multiprocessing.get_context("fork").Process(target=command, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_a_warm_up_after_which_the_llm_does_not_look_stops(world, tmp_path, capsys):
    """The random models of these tests do not look at images. With --gate 0 the same run goes on, from the state that was saved."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "run", "--gate", "0.01"))
    assert stop.value.code == 2 and "does not use the image" in capsys.readouterr().err
    assert {stage for stage, in rows(tmp_path / "run", "stage")} == {"warm-up"}
    with pytest.raises(SystemExit):
        train.main(arguments(world, tmp_path / "run", "--gate", "0.01", "--resume"))
    train.main(arguments(world, tmp_path / "run", "--resume"))
    train.main(arguments(world, tmp_path / "whole"))
    assert rows(tmp_path / "run", "stage", "step", "loss") == rows(tmp_path / "whole", "stage", "step", "loss")


def test_models_that_look_pass_the_gate(tmp_path):
    pairs = f"demo={ROOT / 'demo' / 'pairs' / 'val.jsonl'}"
    train.main(arguments((ROOT / "demo" / "source", ROOT / "demo" / "target", pairs), tmp_path / "run", "--gate", "0.01", "--warm-up-steps", "15", "--steps", "1",
                         "--val-every", "15", "--val-samples", "32"))
    assert len(rows(tmp_path / "run", "loss")) == 16


def test_a_loss_that_is_no_number_stops_the_run_and_spoils_nothing(world, tmp_path, monkeypatch, capsys):
    """In step 3 of 4 between two lines of the log. What is left is the state before it: the run with one step less ends there."""
    options = ["--no-warm-up", "--log-every", "4", "--val-every", "6", "--augment", "none"]
    train.main(arguments(world, tmp_path / "shorter", *options, "--steps", "6", "--save-every", "2"))
    forward, calls = vpgtrans.VisualLLM.forward, []

    def poisoned(model, *inputs, **images):
        loss, tokens = forward(model, *inputs, **images)
        if model.training or model.vpg.qformer.training:
            calls.append(inputs)
        return (loss * float("nan") if len(calls) == 3 else loss), tokens

    monkeypatch.setattr(vpgtrans.VisualLLM, "forward", poisoned)
    saved = {}
    step = loop.optimizer_step

    def watched(model, *rest):  # before each step
        saved[len(calls)] = {name: p.detach().clone() for name, p in model.saved().items()}
        return step(model, *rest)

    monkeypatch.setattr(loop, "optimizer_step", watched)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "run", *options))
    assert stop.value.code == 2 and "at step 3 of stage fine-tune is nan" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "broken.json").read_text())
    assert report["step"] == 3 and len(report["files"]) == 8 and all(Path(file).is_file() for file in report["files"])
    broken = load_file(tmp_path / "run" / "broken.safetensors")
    assert all(torch.equal(broken[f"model.{name}"], value) for name, value in saved[2].items())
    assert any(not torch.equal(broken[f"model.{name}"], value) for name, value in saved[1].items())
    assert all(value.isfinite().all() for value in broken.values())


@pytest.mark.parametrize("name", ["projector.bias", "vpg.query_tokens"])
def test_a_gradient_that_is_no_number_stops_the_run_too(world, tmp_path, capsys, monkeypatch, name):
    """The losses are finite, and so are all other gradients."""
    train_stage, before = loop.train_stage, {}

    def poisoned(run, *rest):
        calls, parameter = [], run.model.get_parameter(name).requires_grad_()
        parameter.register_hook(lambda gradient: calls.append(1) or (gradient * float("nan") if len(calls) == 2 else gradient))
        before["parameter"] = parameter
        return train_stage(run, *rest)

    monkeypatch.setattr(loop, "train_stage", poisoned)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "run", "--no-warm-up", "--log-every", "100", "--save-every", "2"))
    assert stop.value.code == 2 and "at step 2 of stage fine-tune is nan" in capsys.readouterr().err
    broken = load_file(tmp_path / "run" / "broken.safetensors")
    assert all(value.isfinite().all() for value in broken.values()) and {value.item() for key, value in broken.items() if key.endswith(".step")} == {1}
    assert not (tmp_path / "run" / runs.STATE).exists()
    with safe_open(tmp_path / "run" / "broken.safetensors", framework="pt") as saved:
        assert json.loads(saved.metadata()["state"])["step"] == 2


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_a_run_with_reading_processes_survives_that_all_of_them_are_terminated(world, tmp_path, launcher):
    """As Slurm and torchrun do it: every process of the group gets the signal, those that read images too."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments(world, tmp_path / "run", "--workers", "1", "--steps", "5000", "--val-every", "5000")]
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.time()
    while not (metrics.is_file() and '"stage": "fine-tune"' in metrics.read_text()) and time.time() - began < 120:
        time.sleep(0.1)
    for _ in range(2):  # and some of them twice
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.01)
    said, _ = run.communicate(timeout=120)
    assert "stopped at step" in said and (run.returncode == 130 or launcher), said
    with safe_open(tmp_path / "run" / runs.STATE, framework="pt") as saved:
        assert json.loads(saved.metadata()["state"])["stage"] == "fine-tune"


def test_without_a_terminal_the_log_has_a_line_now_and_then(finished):
    assert re.search(r"\nfine-tune 4/6  loss \d\.\d+  rate 0.00\d+  [\d,]+ samples/s  \d\.\d GB  0:00:\d\d left in this stage\n", finished[1])


def test_a_gate_is_for_runs_that_go_on_after_the_warm_up(world, tmp_path):
    train.main(arguments(world, tmp_path / "run", "--gate", "9", "--stage", "warm-up"))
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_kill_between_the_files_of_a_save_is_made_up_for(world, tmp_path, monkeypatch):
    """State and weights are two files; and logs that are missing or cut do not keep a run from going on."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_model", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            train.main(arguments(world, out, "--save-every", "2"))
    assert not (out / "model.safetensors").exists()
    (out / "metrics.jsonl").unlink()
    (out / "bad_data.jsonl").write_text('{"problem": "x", "where": "y"}\n{"problem": "unr')
    with pytest.raises(SystemExit):
        stop_at("fine-tune", 2, arguments(world, out, "--resume"))
    assert bad_data(out, "x") == [{"problem": "x", "where": "y"}]
    train.main(arguments(world, out, "--resume"))
    train.main(arguments(world, tmp_path / "whole"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    train.main(arguments(world, out, "--resume"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def shapes_of(args):
    folder, _ = transfer.find_tokenizer(args.tgt)
    return transfer.shape_model(args, *transfer.find_models(args.src, args.tgt, folder))


def test_a_run_says_beforehand_what_it_takes_on_disk(world, tmp_path):
    train.main(arguments(world, tmp_path / "run"))
    size = {name: (tmp_path / "run" / name).stat().st_size for name in ("model.safetensors", runs.STATE)}
    args = train.parse_arguments(arguments(world, tmp_path / "run"))
    need = runs.disk_need(shapes_of(args).saved())
    assert 0.8 < need / (size["model.safetensors"] + 3 * size[runs.STATE]) < 1


def test_memory_that_runs_out_says_what_to_change(world, tmp_path, monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop, "optimizer_step", out_of_memory)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "run", "--micro-batch", "7"))
    assert stop.value.code == 2 and "--micro-batch 7" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_first(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    refused(capsys, arguments(world, tmp_path / "run"), str(tmp_path / "run"), "100.0 KB are free")


def test_a_run_goes_on_with_another_number_of_processes(world, tmp_path):
    train.main(arguments(world, tmp_path / "whole"))
    with pytest.raises(SystemExit):
        stop_at("fine-tune", 2, arguments(world, tmp_path / "run"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"),
               *arguments(world, tmp_path / "run", "--resume")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(tmp_path / "whole", "stage", "step", "loss"), rows(tmp_path / "run", "stage", "step", "loss"), strict=True):
        assert a[:2] == b[:2] and abs(a[2] - b[2]) < 1e-5


def test_an_error_in_one_process_ends_all_of_them(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).parent / "failing_train.py"), *arguments(world, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode != 0 and "this card is broken" in done.stderr


def test_other_arguments_are_not_a_resume(finished, world, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, finished[0], "--resume", "--lr", "2e-3", "--precision", "bf16"))
    assert stop.value.code == 2 and "--lr was 0.001, is 0.002" in capsys.readouterr().err


def test_micro_batches_give_the_whole_batch(world, tmp_path):
    """Caption lengths are unequal: a mean over micro-batches instead of tokens would show."""
    train.main(arguments(world, tmp_path / "one"))
    train.main(arguments(world, tmp_path / "three", "--micro-batch", "3"))
    for (a,), (b,) in zip(rows(tmp_path / "one", "loss"), rows(tmp_path / "three", "loss"), strict=True):
        assert abs(a - b) < 1e-5


@pytest.mark.parametrize("count", [2, 3])  # three do not share a batch of eight evenly
def test_several_processes_equal_one(world, tmp_path, count):
    train.main(arguments(world, tmp_path / "one", "--steps", "20"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(ROOT / "train.py"),
               *arguments(world, tmp_path / "several", "--steps", "20")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss", "val_loss_shuffled"):
        for a, b in zip(rows(tmp_path / "one", "stage", "step", key), rows(tmp_path / "several", "stage", "step", key), strict=True):
            assert a[:2] == b[:2] and abs(a[2] - b[2]) < 1e-5, key


# ------------------------------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-3)])
def test_stage_1_from_the_cache_has_the_same_losses(tmp_path, capsys, monkeypatch, precision, tolerance):
    """As without it when augmentation is off; and a second run computes no image again but those of the validation. With the
    demo's models, whose loss depends on the image."""
    rows_of_demo = (ROOT / "demo" / "pairs" / "train.jsonl").read_text().splitlines()[:64]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows_of_demo))
    world = ROOT / "demo" / "source", ROOT / "demo" / "target", f"demo={tmp_path / 'pairs.jsonl'}@{ROOT / 'demo' / 'pairs'}"
    options = ["--precision", precision, "--stage", "warm-up", "--warm-up-steps", "4", "--val-every", "4", "--batch-size", "16", "--val-samples", "4"]
    train.main(arguments(world, tmp_path / "plain", *options, "--augment", "none"))
    train.main(arguments(world, tmp_path / "crops", *options))
    features, looked_at = qformer.VPG.features, []
    monkeypatch.setattr(qformer.VPG, "features", lambda vpg, images: looked_at.append(len(images)) or features(vpg, images))
    losses = lambda run: torch.tensor(rows(tmp_path / run, "loss"))
    for run in ("first", "second"):
        looked_at.clear(), capsys.readouterr()
        train.main(arguments(world, tmp_path / run, *options, "--cache", str(tmp_path / "cache")))
        images, said = json.loads((tmp_path / "cache" / "demo" / "index.json").read_text())["images"], capsys.readouterr().out
        count = sum(looked_at) - images * (run == "first")
        assert count == 2 * (2 + 2)  # validation, before and after: two images, and again for their captions
        assert f"{images} images x {12 * 128 * (4 if precision == 'fp32' else 2) / 1e3:.1f} KB" in said and ("which 0.0 KB are still" in said) == (run == "second")
        assert "without crops" in said
        assert (losses(run) - losses("plain")).abs().max() < tolerance < 0.2 * (losses("crops") - losses("plain")).abs().max()


def test_stage_2_behind_the_cache_sees_pixels(world, tmp_path):
    """Two processes share the work of the cache; both stages run, and give what one process gives."""
    train.main(arguments(world, tmp_path / "one", "--cache", str(tmp_path / "a")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"),
               *arguments(world, tmp_path / "two", "--cache", str(tmp_path / "b"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(tmp_path / "one", "stage", "step", "loss"), rows(tmp_path / "two", "stage", "step", "loss"), strict=True):
        assert a[:2] == b[:2] and abs(a[2] - b[2]) < 1e-5


def test_a_killed_cache_goes_on(world, tmp_path, monkeypatch):
    """SIGTERM while it is computed: nothing of the run is there yet, and the same command goes on."""
    write, argv = cache.FeatureCache.write, arguments(world, tmp_path / "run", "--cache", str(tmp_path / "cache"), "--micro-batch", "2")
    monkeypatch.setattr(cache, "SHARD", 6)

    def kill(file, save):
        write(file, save)
        if "00001" in str(file):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cache.FeatureCache, "write", staticmethod(kill))
    assert in_a_process(train.main, argv) == 130
    shards = lambda: {file.name for file in (tmp_path / "cache" / "pairs").glob("*.safetensors")}
    assert shards() == {"00000.safetensors", "00001.safetensors"}
    monkeypatch.setattr(cache.FeatureCache, "write", staticmethod(write))
    assert in_a_process(train.main, argv) == 0 and len(shards()) == 4


def test_a_cache_of_another_vpg_or_data_set_is_refused(world, tmp_path, capsys, monkeypatch):
    cached = lambda *changed: arguments(world, tmp_path / "run", "--cache", str(tmp_path / "cache"), *changed)
    train.main(arguments(world, tmp_path / "first", "--cache", str(tmp_path / "cache"), "--stage", "warm-up"))
    conftest.write_source(tmp_path / "other", seed=5)
    fine_tuned = broken(world[0], tmp_path / "fine-tuned", **{"qformer.layernorm.bias": torch.ones(32)})  # the ViT is the same
    corrected = broken(world[0], tmp_path / "corrected")
    config = json.loads((corrected / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-5
    (corrected / "config.json").write_text(json.dumps(config))
    conftest.write_pairs(tmp_path / "pairs", 30)
    refused(capsys, cached("--src", str(tmp_path / "other")), "this cache was made with VPG", "delete this one")
    refused(capsys, cached("--src", str(fine_tuned)), "this cache was made with VPG")
    refused(capsys, cached("--src", str(corrected)), "this cache was made with configuration")
    refused(capsys, cached("--image-size", "42"), "image size 28, not 42")
    refused(capsys, cached("--data", f"pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"), "two data sets of stage 1 have the same name", "NAME=")
    (tmp_path / "file").write_text("")
    refused(capsys, [*cached(), "--cache", str(tmp_path / "file")], "file")
    (tmp_path / "small").mkdir()  # another disk
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 0, 10_000 if place.name == "small" else 10**9))
    both = cached("--data", f"more={tmp_path / 'pairs' / 'pairs.jsonl'}")
    refused(capsys, [*both, "--cache", str(tmp_path / "small")], "the cache does not fit on this disk: 52 images x 0.6 KB = 33.3 KB", "10.0 KB are free")
    refused(capsys, cached("--precision", "bf16"), "float32, not [5, 32] torch.bfloat16")
    refused(capsys, [*cached("--data", str(tmp_path / "pairs" / "pairs.jsonl"))][:-2] + ["--data", f"pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"], "data set")
    with pytest.raises(SystemExit):
        train.main(cached("--no-warm-up"))
    assert "--cache is for stage 1" in capsys.readouterr().err


def test_captions_of_one_image_share_its_place_in_the_cache(world, tmp_path):
    """And the cache may move between a kill and --resume."""
    rows_of_pairs = [json.loads(line) for line in world[2].read_text().splitlines()]
    twice = [json.dumps({"image": row["image"], "caption": [row["caption"], "a square"]}) for row in rows_of_pairs]
    (tmp_path / "twice.jsonl").write_text("\n".join(twice))
    argv = arguments((*world[:2], f"twice={tmp_path / 'twice.jsonl'}@{world[2].parent}"), tmp_path / "run", "--save-every", "1")
    train.main([*argv, "--cache", str(tmp_path / "cache")])
    assert json.loads((tmp_path / "cache" / "twice" / "index.json").read_text())["images"] == 22
    train.main([*argv, "--cache", str(tmp_path / "elsewhere"), "--resume"])
    assert not (tmp_path / "elsewhere").exists()  # the run stands in stage 2, at its end


def test_an_unreadable_image_stays_one_in_the_cache(world, tmp_path, capsys):
    pairs = conftest.write_pairs(tmp_path / "pairs", 24)
    (tmp_path / "pairs" / "5.png").write_bytes(b"<html>")
    for run in ("first", "second"):
        train.main(arguments((*world[:2], pairs), tmp_path / run, "--val", str(world[2]), "--stage", "warm-up", "--cache", str(tmp_path / "cache")))
        assert "unreadable image: " in (said := capsys.readouterr().err) and "5.png" in said
        assert max(bad for bad, in rows(tmp_path / run, "bad_samples")) == 1


def test_shards_train_as_files_do(world, tmp_path, capsys):
    """The same pairs in two shards, read by worker processes; with a cache, too. One annotation that is empty is left out and named."""
    names = [line["image"] for line in map(json.loads, world[2].read_text().splitlines())]
    captions = [line["caption"] for line in map(json.loads, world[2].read_text().splitlines())]
    for shard, start in enumerate((0, 12)):
        write_shard(tmp_path / "shards" / f"{shard:05d}.tar", {f"{i:03d}.{kind}": (world[2].parent / names[i]).read_bytes() if kind == "png" else captions[i].encode()
                                                              for i in range(start, start + 12) for kind in ("png", "txt")})
    write_shard(tmp_path / "shards" / "00002.tar", {"024.png": b"", "024.txt": b" "})
    common = ["--val", str(world[2]), "--workers", "2"]
    train.main(arguments(world, tmp_path / "files", *common))
    capsys.readouterr()
    train.main(arguments((*world[:2], f"pairs={tmp_path}/shards/{{00000..00002}}.tar"), tmp_path / "shards-run", *common, "--cache", str(tmp_path / "cache")))
    assert "1 left out: empty caption" in capsys.readouterr().out
    train.main(arguments((*world[:2], f"pairs={tmp_path}/shards/{{00000..00002}}.tar"), tmp_path / "plain-run", *common))
    assert rows(tmp_path / "plain-run", "loss") == rows(tmp_path / "files", "loss")
    assert rows(tmp_path / "shards-run", "loss") != rows(tmp_path / "files", "loss")  # the first stage saw no crops


# -------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, argv, *says):
    """The command ends with exit code 2 and says all that; and nothing was written."""
    out = Path(argv[argv.index("--out") + 1])
    files = lambda: {file: file.stat().st_mtime_ns for file in out.glob("*")} if out.is_dir() else None
    before = files()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(text in said for text in says), said
    assert before == files()


def broken(folder, copy, **changes):
    """A copy of a checkpoint with tensors of its file replaced, or removed where the change is None."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, copy / "model.safetensors")
    return copy


def test_bad_checkpoints_are_refused_by_file_and_tensor(world, tmp_path, capsys):
    source, target, pairs = world
    out = tmp_path / "run"
    with_source = lambda folder: arguments((folder, target, pairs), out)
    with_target = lambda folder: arguments((source, folder, pairs), out)
    refused(capsys, with_source(broken(source, tmp_path / "a", **{"query_tokens": None})), str(tmp_path / "a"), "1 tensors missing", "query_tokens")
    refused(capsys, with_source(broken(source, tmp_path / "b", **{"qformer.layernorm.bias": torch.zeros(7)})), "qformer.layernorm.bias is (7,)", "(32,)")
    refused(capsys, with_target(broken(target, tmp_path / "c", **{"model.decoder.layers.1.fc1.bias": None})), "model.decoder.layers.1.fc1.bias")
    refused(capsys, with_source(broken(source, tmp_path / "d", **{"language_projection.weight": torch.zeros(33, 32), "language_projection.bias": torch.zeros(33)})),
            "33 wide", "40 wide", "32")
    shutil.copytree(target, tmp_path / "e")
    content = (tmp_path / "e" / "model.safetensors").read_bytes()
    (tmp_path / "e" / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(capsys, with_target(tmp_path / "e"), "e/model.safetensors", "download or copy it again")
    (tmp_path / "e" / "model.safetensors").unlink()
    refused(capsys, with_target(tmp_path / "e"), str(tmp_path / "e"), "no weights")
    (tmp_path / "e" / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    refused(capsys, with_target(tmp_path / "e"), "e/config.json", "'gpt_neox' is not implemented")
    (tmp_path / "e" / "config.json").write_text("{")
    refused(capsys, with_target(tmp_path / "e"), "e/config.json", "not valid JSON")
    (tmp_path / "e" / "config.json").write_text("[1]")
    refused(capsys, with_target(tmp_path / "e"), "e/config.json", "not valid JSON")
    shutil.copytree(target, tmp_path / "f")
    (tmp_path / "f" / "model.safetensors.index.json").write_text('{"weight')
    refused(capsys, with_target(tmp_path / "f"), "f/model.safetensors.index.json", "damaged")
    refused(capsys, with_source(target), "has no Q-Former")
    refused(capsys, with_target(tmp_path / "nowhere"), "nowhere: no such folder")


def test_bad_data_is_refused(world, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    for pairs, says in ((tmp_path / "empty.jsonl", "not one image with a caption"), (tmp_path / "none.jsonl", "there is no such file")):
        refused(capsys, arguments((*world[:2], pairs), tmp_path / "run"), pairs.name, says)
    for spec, says in (("", "does not read"), (f"{world[2]}:1.2.3", ":1.2.3: there is no such file"), (f"{world[2]}@", "does not read")):
        refused(capsys, arguments((*world[:2], spec), tmp_path / "run"), says)
    refused(capsys, arguments(world, tmp_path / "run", "--data", f"{world[2]}:0.5"), "give each of", ":WEIGHT")
    (tmp_path / "half.jsonl").write_text('{"image": "0.png", "caption": "a"}\n' + '{"image": "0.png", "capt\n' * 11)
    refused(capsys, arguments((*world[:2], f"{tmp_path / 'half.jsonl'}@{world[2].parent}"), tmp_path / "run"), "11 of 12 annotations are unusable",
            "11 left out: damaged line", "half.jsonl, line 2", "--max-bad 0.01")
    one = conftest.write_pairs(tmp_path / "one", 1)
    refused(capsys, arguments((*world[:2], one), tmp_path / "run"), "no pair is left to train on", "--val")
    argv = arguments(world, tmp_path / "run", "--stage", "warm-up", "--batch-size", "1000")
    del argv[argv.index("--warm-up-steps") : argv.index("--warm-up-steps") + 2]
    refused(capsys, argv, "do not fill one batch of 1,000", "--batch-size")


def test_out_that_holds_a_run_or_cannot_be_written_is_refused(finished, world, tmp_path, capsys):
    refused(capsys, arguments(world, finished[0]), str(finished[0]), "--resume", "--out")
    (tmp_path / "file").write_text("")
    refused(capsys, arguments(world, tmp_path / "file" / "run"), "file")


def test_unreadable_images_are_named_and_too_many_stop_the_run(world, tmp_path, capsys):
    pairs = conftest.write_pairs(tmp_path / "pairs", 24)
    (tmp_path / "pairs" / "5.png").write_bytes(b"<html>")
    argv = arguments((*world[:2], pairs), tmp_path / "run", "--val", str(world[2]))
    train.main(argv)
    assert capsys.readouterr().err.count("5.png") == 1
    (tmp_path / "pairs" / "5.png").unlink()  # it gives way to the one after it: as often as both were drawn, less one's own turns
    counted = {stage: bad for stage, bad in rows(tmp_path / "run", "stage", "bad_samples")}
    assert counted == {"warm-up": 1, "fine-tune": 2}  # 24 and 48 samples of 24 pairs
    assert len(bad_data(tmp_path / "run", "unreadable image")) == 1 and "5.png" in bad_data(tmp_path / "run", "unreadable image")[0]["where"]
    with pytest.raises(SystemExit) as stop:
        train.main(arguments((*world[:2], pairs), tmp_path / "strict", "--val", str(world[2]), "--max-bad", "0"))
    assert stop.value.code == 2 and "could not be read" in capsys.readouterr().err


def test_bad_data_of_all_processes_and_of_a_resumed_run_is_written_down_once(world, tmp_path, capsys):
    """Two of three broken images are in training, on either process, and one is in validation."""
    pairs = conftest.write_pairs(tmp_path / "pairs", 24)
    val = conftest.write_pairs(tmp_path / "val", 6)
    for file in (pairs.parent / "4.png", pairs.parent / "11.png", val.parent / "2.png"):
        file.write_bytes(b"<html>")
    argv = arguments((*world[:2], pairs), tmp_path / "run", "--val", str(val))
    with pytest.raises(SystemExit):
        stop_at("fine-tune", 2, argv)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *argv, "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    names = lambda out, problem: sorted(row["where"].split("/")[-1].rstrip("'") for row in bad_data(out, problem))
    assert names(tmp_path / "run", "unreadable image") == ["11.png", "4.png"]
    assert names(tmp_path / "run", "validation image left out") == ["2.png"]
    two = [*command[:-1]]
    two[two.index(str(tmp_path / "run"))] = str(tmp_path / "two")
    assert subprocess.run(two, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
    assert names(tmp_path / "two", "unreadable image") == ["11.png", "4.png"]
    assert rows(tmp_path / "two", "stage", "bad_samples")[-1] == ("fine-tune", 4)


def test_weights_are_shares_of_captions_where_these_are_packed():
    pairs = lambda images, captions: Pairs("x", "/", Strings.of(map(str, range(images))), Strings.of(["a"] * images * captions),
                                                np.repeat(np.arange(images), captions))
    sets = [pairs(10, 5), pairs(40, 1), pairs(2, 50)]
    assert train.mixture("each", sets, [0.1, 0.7, 0.2]) == ([0.1, 0.7, 0.2], 1)
    shares, captions = train.mixture("packed", sets, [0.1, 0.7, 0.2])
    assert np.allclose(shares, [0.02, 0.7, 0.0125]) and np.isclose(captions, 1 / 0.7325)  # 16 of 50 are packed
    assert train.mixture("packed", sets[:2], None) == (None, 90 / 50)


def bad_data(out, problem):
    return [row for row in map(json.loads, (out / "bad_data.jsonl").read_text().splitlines()) if row["problem"] == problem]


def test_what_is_left_out_is_written_down(world, tmp_path):
    pairs = conftest.write_pairs(tmp_path / "pairs", 24)
    pairs.write_text(pairs.read_text() + '{"image": "1.png", "caption": " "}\n{"image":\n')
    train.main(arguments((*world[:2], pairs), tmp_path / "run", "--max-bad", "0.1"))
    for problem, line in (("empty caption", 25), ("damaged line", 26)):
        assert bad_data(tmp_path / "run", problem) == [{"problem": problem, "where": f"{pairs}, line {line}"}]


def test_validation_images_in_training_are_named_under_whatever_name(world, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    line = lambda name: json.dumps({"image": name, "caption": "a red square"}) + "\n"
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.BICUBIC).save(tmp_path / f"{i}.png")
    with Image.open(tmp_path / "3.png") as image:
        image.resize((50, 40)).save(tmp_path / "val.jpg", quality=95)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    pairs.write_text("".join(line(f"{i}.png") for i in range(12)))
    (tmp_path / "val.jsonl").write_text(line("val.jpg") + line("red.png"))
    train.main(arguments((*world[:2], pairs), tmp_path / "run", "--val", str(tmp_path / "val.jsonl")))
    where = f"{tmp_path / '3.png'} looks like {tmp_path / 'val.jpg'}"
    assert bad_data(tmp_path / "run", "validation image in training") == [{"problem": "validation image in training", "where": where}]
    assert capsys.readouterr().err.count(where) == 1


@pytest.mark.parametrize("captions", ["one", "packed"])
def test_an_image_with_one_caption_is_the_same_sample_whichever_way(world, tmp_path, captions):
    losses = []
    for way in ("each", captions):
        train.main(arguments(world, tmp_path / way, "--captions", way))
        losses.append(rows(tmp_path / way, "loss") + rows(tmp_path / way, "val_loss"))
    assert len(losses[0]) == 9 + 5 and np.allclose(*losses, atol=2e-5)


def test_captions_are_not_packed_for_t5(other_family, world, tmp_path, capsys):
    target, run, _ = other_family
    argv = arguments((world[0], target, world[2]), tmp_path / "run", "--captions", "packed")
    if json.loads((target / "config.json").read_text())["model_type"] == "t5":
        refused(capsys, argv, "--captions packed", "T5")
    else:
        train.main(argv)
        assert len(rows(tmp_path / "run", "loss")) == 9


def test_packed_captions_count_as_one_sample(world, tmp_path, capsys):
    folder = tmp_path / "pairs"
    single = conftest.write_pairs(folder, 24)
    (folder / "five.jsonl").write_text("".join(json.dumps(json.loads(line) | {"caption": json.loads(line)["caption"] + " on a table" * (k % 3)}) + "\n"
                                               for line in single.read_text().splitlines() for k in range(5)))
    train.main(arguments((*world[:2], folder / "five.jsonl"), tmp_path / "packed", "--val", str(world[2]), "--captions", "packed", "--stage", "warm-up",
                         "--warm-up-steps", "6", "--batch-size", "4"))
    assert "6 steps of 4 = 24 samples, 1 epochs" in capsys.readouterr().out


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "weights"
    runs.write(file, lambda f: f.write_text("old"))

    def fail(f):
        f.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        runs.write(file, fail)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_captions_and_answers(finished, world, capsys):
    image = str(world[2].parent / "0.png")
    for argv in ([image], [image, "--prompt", "a red", "--num-beams", "1"], [image, "--num-beams", "1", "--temperature", "0.7", "--top-p", "0.9"]):
        sample.main([*argv, "--model", str(finished[0])])
        assert capsys.readouterr().out.startswith(f"{image}: ")


def test_a_run_whose_llm_changed_is_refused(finished, world, tmp_path, capsys):
    config = json.loads((finished[0] / "config.json").read_text())
    shutil.copytree(finished[0], tmp_path / "run")
    conftest.write_target(tmp_path / "changed", seed=4)
    config["llm"]["name"] = str(tmp_path / "changed")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        sample.main([str(world[2].parent / "0.png"), "--model", str(tmp_path / "run")])
    assert stop.value.code == 2 and "fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipped_gradients_are_those_of_torch(clip):
    """Three steps with gradients of very different norms, against clip_grad_norm_ and a plain AdamW."""
    torch.manual_seed(0)
    ours, plain = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    plain.load_state_dict(ours.state_dict())
    images, processes = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), loop.Processes.start("fp32")
    loss_of = lambda layer, x, size: size * layer(x.float().mean((2, 3)) / 255).pow(2).sum()
    mine, reference = (torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True) for layer in (ours, plain))
    mine.found_inf = torch.zeros(())
    for size in (1.0, 300.0, 0.01):
        batch = dict(prompt_ids=torch.zeros(2, 1), target_ids=torch.zeros(2, 5), images=images)
        loop.optimizer_step(lambda prompts, targets, images: (loss_of(ours, images, size), 10), [batch], mine, processes, clip)
        (loss_of(plain, images.float(), size) / 10).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        reference.step()
        reference.zero_grad()
    assert torch.allclose(ours.weight, plain.weight, atol=1e-6)
