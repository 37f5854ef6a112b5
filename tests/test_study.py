"""Facts about the study: its commands are real, what is recorded is what they say, and its parts do what they are named for."""

import itertools
import json
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "miniature"))

import data
import make
import qformer
import report
import study
import train
from demo import scenes
import initialise
from llm import ARCHITECTURES
from qformer import VPG

PLAN = study.plan()


def test_all_commands_are_of_train_py_and_parse():
    for run in PLAN.values():
        if run.script == "train.py":
            args = train.parse_arguments([*map(str, run.flags), "--out", f"{study.RUNS}/{run.name}"])
            assert args.out.name == run.name


def test_what_a_run_needs_stands_before_it():
    order = list(PLAN)
    for run in PLAN.values():
        assert all(order.index(need) < order.index(run.name) for need in run.needs)
        read = [word for word in map(str, run.flags) if word.startswith(study.RUNS)]
        assert {Path(word).name for word in read} <= set(run.needs)


def test_choices_are_made_on_validation_images_and_figures_reported_on_test_images():
    for run in PLAN.values():
        if run.script == "train.py":
            split = Path(run.flags[run.flags.index("--val") + 1]).stem
            assert split == ("val" if run.name.startswith(("sweep-", "source-")) else "test"), run.name


def fake_run(folder, name, code=0, needs=()):
    """A run whose script notes how it was called and leaves a model, or fails."""
    script = folder / f"{name}.py"
    script.write_text(f"""
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls", "a") as file: file.write(" ".join(sys.argv[1:]) + "\\n")
if {code}: sys.exit("it broke")
(out / "model.safetensors").write_text("")
""")
    return study.Run(name, [], list(needs), str(script))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    return tmp_path, results


def calls(folder, name):
    return (folder / study.RUNS / name / "calls").read_text().splitlines()


@pytest.mark.slow
def test_runs_are_recorded_with_their_command_and_not_done_again(workplace, capsys):
    folder, results = workplace
    runs = {run.name: run for run in (fake_run(folder, "a"), fake_run(folder, "b", needs=["a"]))}
    for _ in range(2):
        study.do_all(list(runs.values()), results, jobs=2)
    assert [len(calls(folder, name)) for name in runs] == [1, 1]
    assert json.loads((results / "b.json").read_text())["command"] == shlex.join(runs["b"].command)
    assert capsys.readouterr().out.count("$ python") == 2


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_log_and_stops_what_needs_it(workplace):
    folder, results = workplace
    runs = {run.name: run for run in (fake_run(folder, "a", code=1), fake_run(folder, "b", needs=["a"]), fake_run(folder, "c"))}
    with pytest.raises(SystemExit, match="a: ended with 1.*a.log"):
        study.do_all(list(runs.values()), results, jobs=2)
    assert not (results / "a.json").exists() and not (results / "b.json").exists() and (results / "c.json").exists()
    assert "it broke" in (folder / study.WORLD / "logs" / "a.log").read_text()


def test_a_run_of_train_py_goes_on_where_it_stood_and_is_measured_on_its_split(workplace, monkeypatch):
    folder, results = workplace
    called = []

    def run(command, stdout=None, **others):
        called.append(command)
        if "--measure" in command:
            return SimpleNamespace(returncode=0, stdout='{"right": 0.5, "claims": 8}', stderr="")
        stdout.write("reading\nprojector: fitted to the captions of 9 images (0.1 s)\n")
        (folder / study.RUNS / Path(command[-2 if "--resume" in command else -1]).name / "metrics.jsonl").write_text("rows\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    for name, split, state in (("sweep-some", "val", True), ("source-some", "test", False), ("transfer-some", "test", True)):
        (folder / study.RUNS / name).mkdir(parents=True)
        if state:
            (folder / study.RUNS / name / "resume.safetensors").write_text("")
        (log := folder / study.WORLD / "logs" / f"{name}.log").parent.mkdir(exist_ok=True)
        log.write_text("projector: of the part before\n")
        study.do(study.Run(name, ["--flag"]), results, print)
        trained, measured = called[-2:]
        assert trained[1:3] == ["train.py", "--flag"] and ("--resume" in trained) == state
        assert measured[-4:] == ["--measure", str(folder / study.RUNS / name), "--split", split]
        record = json.loads((results / f"{name}.json").read_text())
        assert record["right"] == 0.5 and record["said"] == ["projector: of the part before"] * state + ["projector: fitted to the captions of 9 images (0.1 s)"] and "torch" in record["machine"]
        assert (results / f"{name}.jsonl").read_text() == "rows\n" and "--resume" not in record["command"]


def test_after_ctrl_c_no_other_run_begins(workplace, monkeypatch):
    folder, results = workplace
    begun = []

    def do(run, *others):
        begun.append(run.name)
        time.sleep(0.2)
        if run.name == "a":
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    monkeypatch.setattr(study, "do", do)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        study.do_all([study.Run(name, []) for name in "abcdef"], results, jobs=2)
    signal.signal(signal.SIGINT, handler)
    assert begun[0] == "a" and len(begun) < 4


def test_what_a_chosen_run_needs_is_chosen_too():
    runs = {"a": study.Run("a", []), "b": study.Run("b", [], ["a"]), "c": study.Run("c", [], ["b"]), "d": study.Run("d", [])}
    assert [run.name for run in study.with_needs([runs["c"]], runs)] == ["a", "b", "c"]


def test_runs_that_tell_the_time_come_last_and_one_at_a_time(workplace, monkeypatch):
    _, results = workplace
    done = []
    monkeypatch.setattr(study, "plan", lambda: {name: study.Run(name, [], needs) for name, needs in (("a", []), ("time-a", ["a"]), ("b", []))})
    monkeypatch.setattr(study, "do", lambda run, *others: done.append(run.name))
    monkeypatch.setattr(study, "do_all", lambda todo, folder, jobs, do_all=study.do_all: done.append(jobs) or do_all(todo, folder, jobs))
    monkeypatch.setattr(sys, "argv", ["study.py", "--results", str(results)])
    study.main()
    assert done[0] == 2 and set(done[1:3]) == {"a", "b"} and done[3:] == [1, "time-a"]


def test_runs_are_chosen_by_their_whole_names(monkeypatch, capsys):
    """1000 is not 10000; and a pattern of nothing is an error."""
    monkeypatch.setattr(sys, "argv", ["study.py", "--list", "scratch-stage1-1000-*"])
    study.main()
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()] == [f"scratch-stage1-1000-s{seed}" for seed in study.SEEDS]
    monkeypatch.setattr(sys, "argv", ["study.py", "--only", "sweeps-*"])
    with pytest.raises(SystemExit) as stop:
        study.main()
    assert stop.value.code == 2 and "sweeps-*" in capsys.readouterr().err


def test_what_a_model_says_about_a_split_is_counted(tmp_path, monkeypatch):
    """The demo's source about forty scenes that it has not seen, and about the same images with the facts of others."""
    lines = [json.loads(line) for line in (ROOT / "demo" / "pairs" / "val.jsonl").read_text().splitlines()][:40]
    pairs = tmp_path / study.WORLD / "pairs"
    pairs.mkdir(parents=True)
    (pairs / "images").symlink_to(ROOT / "demo" / "pairs" / "images")
    others = [line | {"objects": other["objects"]} for line, other in zip(lines, lines[1:] + lines[:1])]
    for split, rows in (("val", lines), ("test", others)):
        (pairs / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    threads = torch.get_num_threads()
    said = {split: study.measure(ROOT / "demo" / "source", split) for split in ("val", "test")}
    torch.set_num_threads(threads)
    assert said["val"]["captions"] == said["test"]["captions"] and len(said["val"]["captions"]) == 24
    assert said["val"]["right"] > 0.9 and said["val"]["found"] > 0.85 and said["val"]["words_right"] > said["val"]["right"]
    assert said["test"]["right"] < 0.2 and said["test"]["claims"] == said["val"]["claims"] > 40


def test_the_cosine_converter_finds_a_linear_map():
    torch.manual_seed(0)
    src = torch.randn(200, 8)
    tgt = src @ torch.randn(8, 12) + torch.randn(12)
    converter = initialise.fit_cosine(src, tgt, torch.rand(200) + 0.1, steps=50, tokens=100, lr=1.0)
    assert torch.cosine_similarity(converter(src), tgt, dim=1).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("how", initialise.FITS)
def test_what_initialise_leaves_is_a_source_whose_projector_fits_the_target(how, tmp_path, capsys):
    """With the demo's models: other projectors than the word converter of train.py makes, and train.py leaves them alone."""
    flags = next(run.flags for run in PLAN.values() if run.name == f"init-{how}-s0")
    given = dict(zip(flags[::2], map(str, flags[1::2]))) | {"--src": "demo/source", "--tgt": "demo/target", "--data": "demo/pairs/train.jsonl"}
    given = [str(ROOT / word) if word.startswith("demo/") else word for word in itertools.chain.from_iterable(given.items())]
    threads = torch.get_num_threads()
    initialise.main([*given, "--out", str(tmp_path / "source")])
    train.main(["--src", str(tmp_path / "source"), "--tgt", str(ROOT / "demo/target"), "--data", str(ROOT / "demo/pairs/val.jsonl"), "--batch-size", "4",
                "--stage", "warm-up", "--warm-up-steps", "1", "--warm-up-lr", "1e-9", "--workers", "0", "--val-samples", "4", "--gate", "0", "--out", str(tmp_path / "run")])
    assert "the projector stays as it is" in capsys.readouterr().out and torch.get_num_threads() == threads
    made, trained, source = (qformer.load_projector(folder).weight for folder in (tmp_path / "source", tmp_path / "run", ROOT / "demo" / "source"))
    assert torch.allclose(made, trained, atol=1e-6) and made.shape != source.shape


# ------------------------------------------------------------------------------------------------------------ the report


def write_run(folder, name, said=(), **stages):
    """A recorded run: losses of its stages, 10 steps apart, at 0.1 s a step of the warm-up and 0.2 s of the others."""
    lines = [dict(stage=stage, step=10 * i, val_loss=loss, samples_per_second=320.0 if stage == "warm-up" else 160.0)
             for stage, losses in stages.items() for i, loss in enumerate(losses)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.json").write_text(json.dumps(dict(command=name, said=said, right=0.5, claims=10, found=0.5, words_right=0.9, captions=[])))


def test_steps_are_counted_through_both_stages(tmp_path):
    write_run(tmp_path, "run-s0", **{"warm-up": [3.0, 2.0], "fine-tune": [2.0, 1.5, 1.0]})
    results = report.Results(tmp_path)
    assert results.curve("run-s0") == [(0, 3.0), (10, 2.0), (10, 2.0), (20, 1.5), (30, 1.0)]
    assert results.first_below("run-s0", 1.5) == 20 and results.first_below("run-s0", 0.9) is None and results.final("run-s0") == 1.0


def test_a_speed_up_is_of_mean_steps_and_not_given_where_a_seed_does_not_get_there(tmp_path):
    for seed in study.SEEDS:
        write_run(tmp_path, f"scratch-s{seed}", **{"from-scratch": [3.0] * 6 + [1.3 + 0.2 * seed]})
        write_run(tmp_path, f"slow-s{seed}", **{"warm-up": [2.0, 1.9], "fine-tune": [1.9, 1.8, 1.4]})
    write_run(tmp_path, "fast-s0", **{"warm-up": [2.0, 1.5]})
    write_run(tmp_path, "fast-s1", **{"warm-up": [2.0, 1.6, 1.5]})
    assert report.speed_up(report.Results(tmp_path), ["slow", "fast"], "scratch", 60) == ["15 ± 7 (2 of 3 seeds)", "4.0 ×", "4.0 ×", "–"]
    write_run(tmp_path, "fast-s1", **{"warm-up": [2.0, 1.6, 1.6]})
    write_run(tmp_path, "time-scratch-s0", **{"from-scratch": [1.0]})  # 0.2 s a step, and of the warm-up 0.1 s
    write_run(tmp_path, "time-transfer-s0", **{"warm-up": [1.0], "fine-tune": [1.0]})
    results = report.Results(tmp_path)
    assert report.speed_up(results, ["slow", "fast", "none"], "scratch", 60) == ["30 ± 0", "2.0 ×", "2.0 ×", "2.4 ×"]
    write_run(tmp_path, "good-s0", **{"warm-up": [1.4, 1.3]})
    assert report.speed_up(report.Results(tmp_path), ["good"], "scratch", 60) == ["0 (1 of 3 seeds)", "∞", "∞", "∞"]
    assert report.speed_up(results, ["fast", "none"], "scratch", 60) == ["not reached (2 of 3 seeds)", "", "", ""]
    assert report.spread([1.0]) == "1.000" and report.spread([]) == "–"


def test_what_the_fit_of_a_projector_reads_and_takes_is_counted(tmp_path):
    said = ["source", "projector: fitted to the captions of 1,280 images (3.0 s); without 2 that"]
    for name in ("time-scratch-s0", "scratch-s0"):
        write_run(tmp_path, name, **{"from-scratch": [3.0] * 6 + [1.5]})
    for name in ("time-transfer-s0", "fitted-s0"):
        write_run(tmp_path, name, said, **{"warm-up": [2.0, 1.9], "fine-tune": [1.9, 1.5]})
    row = report.speed_up(report.Results(tmp_path), ["fitted"], "scratch", 60)  # 20 of 60 steps; 640 + 1,280 of 1,920 samples; 1 + 2 + 3 of 12 s
    assert row == ["20 (1 of 3 seeds)", "3.0 ×", "1.0 ×", "2.0 ×"]


def test_the_document_says_what_was_recorded():
    text = (ROOT / "docs" / "miniature.md").read_text()
    assert report.fill(text, report.Results(ROOT / "miniature" / "results")) == text


def test_what_was_recorded_are_runs_of_the_plan_with_its_commands():
    results = report.Results(ROOT / "miniature" / "results")
    assert results.rows and results.rows.keys() == {name for name in results.records if PLAN[name].script == "train.py"}
    for name, record in results.records.items():
        assert shlex.split(record["command"]) == PLAN[name].command


@pytest.mark.parametrize("init", study.WARM_UP_RATES)
def test_transfers_have_the_best_rates_of_their_sweep(init):
    results = report.Results(ROOT / "miniature" / "results")
    pairs = itertools.product(study.WARM_UP_RATES[init], study.FINE_TUNE_RATES)
    assert min(pairs, key=lambda pair: results.final(f"sweep-{init}-{'-'.join(pair)}-s0")) == study.TRANSFER_RATES[init]


@pytest.mark.parametrize("start", study.STARTS)
@pytest.mark.parametrize("steps", study.SWEPT)
def test_the_baseline_has_the_best_rate_of_its_sweep(start, steps):
    results = report.Results(ROOT / "miniature" / "results")
    losses = {rate: results.final(f"sweep-scratch-{start}-{steps}-{rate}") for rate in study.RATES}
    assert study.CHOSEN[start, steps] == min(losses, key=losses.get)


# ------------------------------------------------------------------------------------------------------------- the world


def test_no_word_means_two_things():
    words = [word for table in (scenes.COLOURS, scenes.SHAPES) for words in table.values() for word in words]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_can_be_seen_and_fits_its_circle(shape):
    assert max(np.hypot(x, y) for x, y in scenes.outline(shape)) < 1.35
    thing = dict(colour="red", shape=shape, size="small", x=32, y=32, radius=9, turn=10, shade=scenes.RGB["red"])
    image, owner = scenes.render(dict(background="white", shade=(244, 244, 244), arrangement="alone", objects=[thing]))
    assert 40 < (owner == 1).sum() < 18 * 18 and image[owner == 1].std() > 0


def test_shapes_are_drawn_with_the_frequencies_of_the_table():
    rng = random.Random(0)
    drawn = [scenes.draw_from(scenes.SHAPES, 2, rng) for _ in range(20000)]
    first, last = list(scenes.SHAPES)[0], list(scenes.SHAPES)[-1]
    assert 13 < drawn.count(first) / drawn.count(last) < 27


def test_patches_are_labelled_by_the_object_that_covers_them():
    scene = scenes.random_scene(random.Random(3))
    labels = make.patch_labels([scene], scenes.render(scene)[1][None])[0]
    for thing in scene["objects"]:
        patch = int(thing["y"]) // 8 * 8 + int(thing["x"]) // 8
        if thing["shape"] not in ("ring", "frame", "corner", "chevron"):  # which are empty in their middle
            assert labels[0, patch] == list(scenes.COLOURS).index(thing["colour"])
            assert labels[1, patch] == 1 + list(scenes.SHAPES).index(thing["shape"])


@pytest.mark.parametrize("family", make.TOKENIZERS)
def test_tokenizers_of_the_world_read_like_those_of_their_family(family, tmp_path):
    build, config = make.TOKENIZERS[family]
    rng = random.Random(0)
    texts = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(3000)]
    build(texts).save(str(tmp_path / "tokenizer.json"))
    make.write_json(tmp_path / "tokenizer_config.json", config)
    make.write_json(tmp_path / "config.json", make.LLMS[f"{family}-256"])
    tok = data.load_tokenizer(tmp_path)
    for text in texts[:50]:
        assert tok.decode(tok.encode(text)).strip() == text
    assert len(tok.encode(texts[0])) < len(texts[0]) and max(tok.vocab().values()) < make.LLMS[f"{family}-256"]["vocab_size"]
    assert (tok.end_id == tok.eos_id) == (family == "t5")


@pytest.mark.parametrize("name", make.LLMS)
def test_the_language_models_of_the_world_can_be_built_and_read_both_corpora(name):
    llm = ARCHITECTURES[name.split("-")[0]](make.LLMS[name])
    make.initialise(llm)
    read = make.read_encoder_ids if name.startswith("t5") else make.read_first_tokens
    total, count = read(llm, [([5, 6, 1], [7, 8, 1]), ([5, 1], [7, 1])] if name.startswith("t5") else [[2, 5, 6, 7], [2, 5]])
    assert count == (5 if name.startswith("t5") else 4) and 7 < total / count < 9.5


@pytest.mark.slow
def test_the_first_stage_learns_all_three_of_its_tasks():
    """On eight fixed pairs: contrast, matching and captioning all fall far below what guessing gives."""
    torch.manual_seed(0)
    vpg = VPG(make.VPG_CONFIG)
    vpg.reset()
    torch.nn.init.normal_(vpg.query_tokens, std=0.5)
    model = make.FirstStage(vpg, 50)
    features, ids = torch.randn(8, 65, 128), torch.randint(5, 50, (8, 6))
    ids[::2, 4:] = make.IGNORE
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "vision_model" not in n], lr=2e-3)
    for _ in range(120):
        parts = model(features, ids, 2)
        optimizer.zero_grad()
        sum(parts).backward()
        optimizer.step()
    contrast, matching, captioning = parts
    assert contrast < 0.7 and matching < 0.4 and captioning < 1.5  # guessing: 2.1, 0.7, 3.9
