"""Facts about the study: its commands are real, what is recorded is what they say, and its parts do
what they are named for."""

import ast
import itertools
import json
import os
import random
import re
import shlex
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import arguments

import data
import qformer
import train
from llm import ARCHITECTURES
from study import (
    captions,
    experiments,
    initialise,
    languages,
    make,
    records,
    report,
    runs,
    scenes,
    sight,
    speedup,
    tables,
)
from study.experiments import Run
from study.world import IGNORE, write_json
from study.world import initialise as initialise_weights

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "study" / "results"
EVERY = experiments.all_runs()
SECOND = experiments.smollm2_runs()
THIRD = experiments.small_runs()


def imported(file):
    """The names of all that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("file", sorted((ROOT / "study").glob("*.py")), ids=lambda file: file.stem)
def test_the_study_stands_without_the_demo_and_is_found_without_a_patched_path(file):
    """demo/ takes the world of shapes from study/, which takes nothing of demo/."""
    assert not any(name.split(".")[0] == "demo" for name in imported(file))
    assert "sys.path" not in file.read_text()


# --------------------------------------------------------------------------------- the experiments


def test_all_commands_are_of_train_py_and_parse():
    for run in [*EVERY.values(), *SECOND.values(), *THIRD.values()]:
        if run.trains:
            args = train.parse_arguments(run.command[2:])
            assert args.out == Path(experiments.RUNS) / run.name


@pytest.mark.parametrize("study", experiments.STUDIES)
def test_what_a_run_needs_stands_before_it(study):
    every = experiments.STUDIES[study]()
    order = list(every)
    for run in every.values():
        assert all(order.index(need) < order.index(run.name) for need in run.needs)
        read = [word for word in map(str, run.flags) if word.startswith(experiments.RUNS)]
        assert {Path(word).name for word in read} <= set(run.needs)


def test_choices_are_made_on_validation_images_and_figures_reported_on_test_images():
    for run in EVERY.values():
        if run.trains:
            split = Path(run.flags[run.flags.index("--val") + 1]).stem
            assert split == ("val" if run.name.startswith(("sweep-", "source-")) else "test"), run.name
            captioned = "val" if run.name.startswith("sweep-") else "test"
            assert run.scenes == f"{experiments.WORLD}/pairs/{captioned}.jsonl"
    for run in filter(lambda run: run.trains, [*SECOND.values(), *THIRD.values()]):
        split = Path(run.flags[run.flags.index("--val") + 1]).stem
        assert split == ("val" if "-sweep-" in run.name else "test"), run.name
        assert run.scenes == f"{experiments.HELD_OUT}/{split}.tar"


@pytest.mark.parametrize("study, targets", [
    (SECOND, {experiments.SMOLLM2}), (THIRD, {*experiments.SMALL_TARGETS.values(), "demo/source"})])
def test_runs_from_the_demos_source_are_all_as_long_and_differ_in_their_start_and_rates(study, targets):
    """Same steps, samples, clipping and images, or a part of them; a rate of the warm-up where there is
    one to give; the demo's source, but where a weak one is the question, or its projector."""
    common, used = set(), set()
    for run in filter(lambda run: run.trains, study.values()):
        args = train.parse_arguments(run.command[2:])
        warm_up = 0 if args.from_scratch or args.no_warm_up else args.warm_up_steps
        length = next((steps for steps in (40, 60, 80, 100, 120, 1000) if f"-{steps}-s" in run.name), 300)
        assert warm_up + args.steps == length
        assert warm_up in (0, min(60, length // 5))
        assert args.compile == (length == 1000 and study is SECOND)
        other = re.search("-weak-|-cosine-", run.name)
        assert (args.src == "demo/source") != bool(other)
        assert not other or args.src == f"{experiments.RUNS}/{run.needs[0]}"
        has_rate = args.init != "auto" and not args.from_scratch and not args.no_warm_up
        assert (args.warm_up_lr is not None) == has_rate, run.name
        few = re.search(r"-10\.7-", run.name)
        images = f"{experiments.HELD_OUT}/train-10.7.tar" if few else "demo/pairs/train.tar"
        assert args.data == [images], run.name
        common.add((args.batch_size, args.clip, args.augment))
        used.add(args.tgt)
    assert len(common) == 1
    assert used == targets


def test_the_demos_scenes_are_parted_for_choices_for_figures_and_in_a_part_to_train_on(tmp_path):
    make.make_splits(tmp_path / "smollm2")
    whole = captions.read_scenes(ROOT / "demo" / "pairs" / "val.tar")
    parts = [captions.read_scenes(tmp_path / "smollm2" / f"{split}.tar") for split in ("val", "test")]
    assert [len(files) for files, _, _ in parts] == [100, 200]
    for known in (1, 2):  # captions, truths
        assert parts[0][known] + parts[1][known] == whole[known]
    images = [data.load_image(file).tobytes() for files, _, _ in parts for file in files]
    assert images == [data.load_image(file).tobytes() for file in whole[0]]
    files, some, _ = captions.read_scenes(tmp_path / "smollm2" / "train-10.7.tar")
    assert len(files) == 257
    assert some == captions.read_scenes(ROOT / "demo" / "pairs" / "train.tar")[1][:257]


def test_what_a_chosen_run_needs_is_chosen_too():
    every = {run.name: run for run in (Run("a", []), Run("b", [], ["a"]), Run("c", [], ["b"]), Run("d", []))}
    assert [run.name for run in experiments.with_needs([every["c"]], every)] == ["a", "b", "c"]


# -------------------------------------------------------------------------------------- the runs

SCRIPT = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if {code}:
    sys.exit("it broke")
(out / "model.safetensors").write_text("")
"""


def fake_run(folder, name, code=0, needs=()):
    """A run whose script notes how it was called and leaves a model, or fails."""
    script = folder / f"{name}.py"
    script.write_text(SCRIPT.format(code=code))
    return Run(name, [], list(needs), (str(script),))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder of its own, and the folder of its records."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    return tmp_path, results


def calls(folder, name):
    return (folder / runs.RUNS / name / "calls").read_text().splitlines()


@pytest.mark.slow
def test_runs_are_recorded_with_their_command_and_not_done_again(workplace, capsys):
    folder, results = workplace
    first = fake_run(folder, "a")
    second = fake_run(folder, "b", needs=["a"])
    for _ in range(2):
        runs.do_all([first, second], results, jobs=2)
    assert len(calls(folder, "a")) == len(calls(folder, "b")) == 1
    assert records.read(results)["b"]["command"] == shlex.join(second.command)
    assert capsys.readouterr().out.count("$ python") == 2


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_log_and_stops_what_needs_it(workplace):
    folder, results = workplace
    todo = [fake_run(folder, "a", code=1), fake_run(folder, "b", needs=["a"]), fake_run(folder, "c")]
    with pytest.raises(SystemExit, match="a: ended with 1.*a.log"):
        runs.do_all(todo, results, jobs=2)
    assert records.read(results).keys() == {"c"}
    assert "it broke" in (folder / runs.WORLD / "logs" / "a.log").read_text()


METRICS = [{"stage": "warm-up", "step": 0, "val_loss": 2.5}, {"stage": "warm-up", "step": 10, "loss": 0.1}]
SAID = "projector: fitted to the captions of 9 images (0.1 s)"


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize("start", [None, {"init": "captions"}])
def test_a_run_of_train_py_goes_on_where_it_stood_and_is_measured_on_its_scenes(
        resumed, start, workplace, monkeypatch):
    folder, results = workplace
    name = "sweep-some"
    out = folder / runs.RUNS / name
    out.mkdir(parents=True)
    called = []

    def run(command, stdout=None, **others):
        called.append(command)
        if "--measure" in command:
            return SimpleNamespace(returncode=0, stdout='{"right": 0.5, "claims": 8}', stderr="")
        stdout.write(f"reading\n{SAID}\n")
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
        (out / "config.json").write_text(json.dumps({"start": start} if start else {}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runs.subprocess, "run", run)
    if resumed:
        (out / "resume.safetensors").write_text("")
    log = folder / runs.WORLD / "logs" / f"{name}.log"
    log.parent.mkdir()
    log.write_text("projector: of the part before\n")
    runs.do(Run(name, ["--flag"], scenes="some/val.tar"), results, print)

    trained, measured = called
    assert trained[1:3] == ["train.py", "--flag"]
    assert ("--resume" in trained) == resumed
    assert measured[1:] == ["-m", "study.runs", "--measure", str(out), "--scenes", "some/val.tar"]
    record = records.read(results)[name]
    assert record["right"] == 0.5
    assert record["said"] == (["projector: of the part before"] if resumed else []) + [SAID]
    assert "torch" in record["machine"]
    assert record["metrics"] == METRICS
    assert record.get("start") == start
    assert "--resume" not in record["command"]


def test_after_ctrl_c_no_other_run_begins(workplace, monkeypatch):
    _, results = workplace
    begun = []

    def do(run, *others):
        begun.append(run.name)
        time.sleep(0.2)
        if run.name == "a":
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    monkeypatch.setattr(runs, "do", do)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        runs.do_all([Run(name, []) for name in "abcdef"], results, jobs=2)
    signal.signal(signal.SIGINT, handler)
    assert begun[0] == "a"
    assert len(begun) < 4


def test_runs_that_tell_the_time_come_last_and_one_at_a_time(workplace, monkeypatch):
    _, results = workplace
    every = {run.name: run for run in (Run("a", []), Run("time-a", [], ["a"]), Run("b", []))}
    done = []

    def do_all(todo, results, jobs, do_all=runs.do_all):
        done.append(jobs)
        do_all(todo, results, jobs)

    monkeypatch.setitem(runs.STUDIES, "miniature", lambda: every)
    monkeypatch.setattr(runs, "do", lambda run, *others: done.append(run.name))
    monkeypatch.setattr(runs, "do_all", do_all)
    runs.main(["--results", str(results)])
    assert done[0] == 2
    assert set(done[1:3]) == {"a", "b"}
    assert done[3:] == [1, "time-a"]


def test_what_is_recorded_is_not_made_again(workplace, monkeypatch):
    """What a run needs is looked at once more, since its model may be gone."""
    _, results = workplace
    done = []
    monkeypatch.setattr(runs, "do", lambda run, *others: done.append(run.name))
    runs.main(["--results", str(RESULTS)])
    assert done == []
    for name in EVERY:
        if name != "transfer-300-s1":
            records.add(results, name, {"command": ""})
    runs.main(["--results", str(results), "--jobs", "1"])
    assert done == ["source-opt-128-s1", "transfer-300-s1"]


def test_runs_are_chosen_by_their_whole_names(capsys):
    """1000 is not 10000; and a pattern of nothing is an error."""
    runs.main(["--list", "scratch-stage1-1000-*"])
    names = [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"scratch-stage1-1000-s{seed}" for seed in experiments.SEEDS]
    with pytest.raises(SystemExit) as stop:
        runs.main(["--only", "sweeps-*"])
    assert stop.value.code == 2
    assert "sweeps-*" in capsys.readouterr().err


def test_what_a_model_says_about_a_split_is_counted(tmp_path, monkeypatch):
    """The demo's source about forty scenes that it has not seen; and about the same images with the
    facts of others."""
    files, texts, truths = (known[:40] for known in captions.read_scenes(ROOT / "demo" / "pairs" / "val.tar"))
    pairs = tmp_path / runs.WORLD / "pairs"
    pairs.mkdir(parents=True)
    for i, file in enumerate(files):
        data.load_image(file).save(pairs / f"{i}.png")
    for split, facts in (("val", truths), ("test", truths[1:] + truths[:1])):
        rows = [dict(image=f"{i}.png", caption=texts[i], objects=list(facts[i])) for i in range(40)]
        (pairs / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    threads = torch.get_num_threads()
    right = runs.measure(ROOT / "demo" / "source", f"{runs.WORLD}/pairs/val.jsonl")
    wrong = runs.measure(ROOT / "demo" / "source", f"{runs.WORLD}/pairs/test.jsonl")
    torch.set_num_threads(threads)
    assert right["captions"] == wrong["captions"]
    assert len(right["captions"]) == 24
    assert right["right"] > 0.9
    assert right["found"] > 0.85
    assert right["words_right"] > right["right"]
    assert wrong["right"] < 0.2
    assert wrong["claims"] == right["claims"] > 40


# ------------------------------------------------------------------------------------- the records


def test_a_run_is_recorded_in_the_file_of_its_kind_behind_the_others(tmp_path):
    records.add(tmp_path, "sweep-a", {"command": "first"})
    records.add(tmp_path, "sweep-b", {"command": "é", "metrics": METRICS})
    records.add(tmp_path, "init-a", {"command": "third"})
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["init.jsonl", "sweep.jsonl"]
    assert records.read(tmp_path) == {
        "init-a": {"command": "third"}, "sweep-a": {"command": "first"},
        "sweep-b": {"command": "é", "metrics": METRICS}}


def test_a_run_that_is_recorded_again_counts_once_as_it_was_last(tmp_path):
    for command in ("first", "second"):
        records.add(tmp_path, "sweep-a", {"command": command})
    assert records.read(tmp_path) == {"sweep-a": {"command": "second"}}


def test_a_line_that_a_kill_has_cut_is_no_record_and_spoils_no_other(tmp_path):
    for name in ("sweep-a", "sweep-b"):
        records.add(tmp_path, name, {"command": name})
    file = tmp_path / "sweep.jsonl"
    whole = file.read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert records.read(tmp_path).keys() == {"sweep-a"}
        records.add(tmp_path, "sweep-c", {"command": "after"})
        assert records.read(tmp_path).keys() == {"sweep-a", "sweep-c"}


def test_lines_that_are_no_records_are_named(tmp_path):
    """Before, the metrics of a run were a file of their own."""
    (tmp_path / "sweep-a.jsonl").write_text('{"stage": "fine-tune", "step": 0}\n')
    with pytest.raises(SystemExit, match="sweep-a.jsonl: no records"):
        records.read(tmp_path)


# ------------------------------------------------------------------- other starts of the projector


@pytest.mark.slow
def test_the_cosine_converter_finds_a_linear_map():
    torch.manual_seed(0)
    src = torch.randn(200, 8)
    tgt = src @ torch.randn(8, 12) + torch.randn(12)
    converter = initialise.fit_cosine(src, tgt, torch.rand(200) + 0.1, steps=50, tokens=100, lr=1.0)
    assert torch.cosine_similarity(converter(src), tgt, dim=1).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("how", initialise.FITS)
def test_what_initialise_leaves_is_a_source_whose_projector_fits_the_target(
        how, world, tmp_path, monkeypatch, capsys):
    """Other projectors than train.py's word converter makes, and train.py leaves them alone."""
    source, target, pairs = map(str, world)
    flags = EVERY[f"init-{how}-s0"].flags
    given = dict(zip(flags[::2], map(str, flags[1::2])))
    made = tmp_path / "source"
    given |= {"--src": source, "--tgt": target, "--data": pairs, "--out": str(made)}
    threads = torch.get_num_threads()
    monkeypatch.setitem(initialise.FITS, "cosine", partial(initialise.fit_cosine, steps=10))
    initialise.main(list(itertools.chain.from_iterable(given.items())))

    frozen = "--stage", "warm-up", "--warm-up-steps", "1", "--warm-up-lr", "1e-9"
    train.main(arguments((made, target, pairs), tmp_path / "run", *frozen, "--val-samples", "4"))
    assert "the projector stays as it is" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    fitted = qformer.load_projector(made).weight
    trained = qformer.load_projector(tmp_path / "run").weight
    assert torch.allclose(fitted, trained, atol=1e-6)
    assert fitted.shape != qformer.load_projector(world[0]).weight.shape


# -------------------------------------------------------------------------------------- the report


def write_run(folder, name, said=(), **stages):
    """A recorded run: losses of its stages, 10 steps apart.

    A step takes 0.1 s in the warm-up and 0.2 s in others, of 32 samples."""
    metrics = []
    for stage, losses in stages.items():
        speed = 320.0 if stage == "warm-up" else 160.0
        for i, loss in enumerate(losses):
            at = dict(stage=stage, step=10 * i, samples=320 * i, seconds=0.0)
            metrics.append(at | dict(val_loss=loss, val_loss_shuffled=3.0, samples_per_second=speed))
    shares = dict(right=0.5, claims=10, found=0.5, words_right=0.9)
    records.add(folder, name, dict(command=name, said=said, captions=[], metrics=metrics, **shares))


def test_steps_are_counted_through_both_stages(tmp_path):
    write_run(tmp_path, "run-s0", **{"warm-up": [3.0, 2.0], "fine-tune": [2.0, 1.5, 1.0]})
    results = records.Results(tmp_path)
    assert results.curve("run-s0") == [(0, 3.0), (10, 2.0), (10, 2.0), (20, 1.5), (30, 1.0)]
    assert results.first_below("run-s0", 1.5) == 20
    assert results.first_below("run-s0", 0.9) is None
    assert results.final("run-s0") == 1.0


def test_a_start_that_is_ahead_before_its_first_step_has_taken_none(tmp_path):
    runs = {"scratch": [3.0, 2.0, 1.5], "auto": [1.4, 1.3], "captions": [1.7, 1.6], "converter": [2.0, 1.5]}
    for start, losses in runs.items():
        write_run(tmp_path, f"sweep-{start}-1e-3", **{"fine-tune": losses})
    rates = {start: [("", "1e-3")] for start in runs}
    rows = tables.sweep_rows(records.Results(tmp_path), "sweep", rates, ["scratch"])
    assert [row[-1] for row in rows] == [20, 0, "not in 300", 10]


# a run of two stages, and what it is compared with: (stage, step, loss, CIDEr or None), a step is 0.5 s
TRANSFER = [("warm-up", 0, 3.0, 10.0), ("warm-up", 4, 2.0, 50.0), ("fine-tune", 0, 2.0, 50.0),
            ("fine-tune", 6, 1.4, 80.0)]
SCRATCH = [("from-scratch", 0, 4.0, 1.0), ("from-scratch", 20, 1.9, 60.0), ("from-scratch", 40, 1.5, 55.0)]


def write_metrics(folder, name, points, start=None):
    out = folder / name
    out.mkdir()
    lines = []
    before = 0
    for (stage, step, loss, score), (following, *_) in zip(points, [*points[1:], (None,)]):
        row = dict(stage=stage, step=step, samples=8 * step, val_loss=loss, seconds=0.5 * (before + step))
        if score is not None:
            row["scores"] = {"COCO CIDEr": score}
        lines.append(json.dumps(row) + "\n")
        before += step if following != stage else 0
    (out / "metrics.jsonl").write_text("".join(lines))
    (out / "config.json").write_text(json.dumps({"start": start} if start else {}))
    return str(out)


def told(capsys, *folders):
    speedup.main(list(folders))
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_speed_up_rate_is_by_the_best_score_and_through_both_stages(tmp_path, capsys):
    """From scratch is at its best CIDEr after 20 of 40 steps; the transfer is there after 4 + 6."""
    start = {"tried": [{}] * 7, "seconds": 3.2}
    run = write_metrics(tmp_path, "run", TRANSFER, start)
    lines = told(capsys, run, write_metrics(tmp_path, "scratch", SCRATCH))
    assert lines[1] == "by COCO CIDEr: the baseline is at its best, 60, after"
    assert lines[2:5] == [
        "20 steps and the run is there after 10: 2.0 ×", "160 samples and the run is there after 80: 2.0 ×",
        "10 seconds and the run is there after 5: 2.0 ×"]
    assert lines[5] == ("not counted: before the first step --init auto tried 7 starts and rates, by 2,240 "
                        "samples in 3 s")
    lines = told(capsys, str(tmp_path / "scratch"), run)
    assert lines[1:] == ["by COCO CIDEr: the baseline is at its best, 80, after",
                         "10 steps; the run does not get there, 60 is its best"]


def test_the_speed_up_rate_is_by_the_loss_where_one_run_was_not_scored(tmp_path, capsys):
    run = write_metrics(tmp_path, "run", [(*at, None) for *at, _ in TRANSFER])
    lines = told(capsys, run, write_metrics(tmp_path, "scratch", SCRATCH))
    assert lines[1:3] == ["by validation loss: the baseline is at its best, 1.5, after",
                          "40 steps and the run is there after 10: 4.0 ×"]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: no folder of a run"):
        speedup.main([str(tmp_path / "nowhere"), str(tmp_path)])


def speed_up(folder, *names):
    return tables.speed_up(records.Results(folder), names, "scratch", 60)


@pytest.fixture
def timed(tmp_path):
    """Records of runs: from scratch 60 steps, to a mean loss of 1.5."""
    for seed in experiments.SEEDS:
        write_run(tmp_path, f"scratch-s{seed}", **{"from-scratch": [3.0] * 6 + [1.3 + 0.2 * seed]})
        write_run(tmp_path, f"slow-s{seed}", **{"warm-up": [2.0, 1.9], "fine-tune": [1.9, 1.8, 1.4]})
    return tmp_path


def test_a_speed_up_is_of_mean_steps_and_not_given_where_a_seed_does_not_get_there(timed):
    write_run(timed, "fast-s0", **{"warm-up": [2.0, 1.5]})
    write_run(timed, "fast-s1", **{"warm-up": [2.0, 1.6, 1.5]})
    assert speed_up(timed, "slow", "fast") == ["15 ± 7 (2 of 3 seeds)", "4.0 ×", "4.0 ×", "–"]
    write_run(timed, "fast-s1", **{"warm-up": [2.0, 1.6, 1.6]})
    write_run(timed, "time-scratch-s0", **{"from-scratch": [1.0]})
    write_run(timed, "time-transfer-s0", **{"warm-up": [1.0], "fine-tune": [1.0]})
    assert speed_up(timed, "slow", "fast", "none") == ["30 ± 0", "2.0 ×", "2.0 ×", "2.4 ×"]
    assert speed_up(timed, "fast", "none") == ["not reached (2 of 3 seeds)", "", "", ""]
    write_run(timed, "good-s0", **{"warm-up": [1.4, 1.3]})
    assert speed_up(timed, "good") == ["0 (1 of 3 seeds)", "∞", "∞", "∞"]


def test_a_mean_of_one_seed_has_no_deviation_and_one_of_none_is_a_dash():
    assert tables.spread([1.0]) == "1.000"
    assert tables.spread([]) == "–"


def test_what_the_fit_of_a_projector_reads_and_takes_is_counted(tmp_path):
    said = ["source", "projector: fitted to the captions of 1,280 images (3.0 s); without 2 that"]
    for name in ("time-scratch-s0", "scratch-s0"):
        write_run(tmp_path, name, **{"from-scratch": [3.0] * 6 + [1.5]})
    for name in ("time-transfer-s0", "fitted-s0"):
        write_run(tmp_path, name, said, **{"warm-up": [2.0, 1.9], "fine-tune": [1.9, 1.5]})
    # 20 of 60 steps; 640 + 1,280 of 1,920 samples; 1 + 2 + 3 of 12 s
    assert speed_up(tmp_path, "fitted") == ["20 (1 of 3 seeds)", "3.0 ×", "1.0 ×", "2.0 ×"]


@pytest.mark.parametrize("document", report.DOCUMENTS)
def test_the_document_says_what_was_recorded(document):
    text = (ROOT / "docs" / document).read_text()
    assert report.fill(text, records.Results(RESULTS)) == text


def test_what_was_recorded_are_the_experiments_with_their_commands():
    results = records.Results(RESULTS)
    assert results.rows
    every = EVERY | SECOND | THIRD
    assert results.rows.keys() == {name for name in results.records if every[name].trains}
    for name, record in results.records.items():
        # Recorded before the module had this name
        command = record["command"].replace("miniature/initialise.py", "-m study.initialise")
        assert shlex.split(command) == every[name].command


@pytest.mark.parametrize("init", experiments.WARM_UP_RATES)
def test_transfers_have_the_best_rates_of_their_sweep(init):
    results = records.Results(RESULTS)
    pairs = itertools.product(experiments.WARM_UP_RATES[init], experiments.FINE_TUNE_RATES)
    losses = {pair: results.final(f"sweep-{init}-{'-'.join(pair)}-s0") for pair in pairs}
    assert experiments.TRANSFER_RATES[init] == min(losses, key=losses.get)


@pytest.mark.parametrize("start", experiments.STARTS)
@pytest.mark.parametrize("steps", experiments.SWEPT)
def test_the_baseline_has_the_best_rate_of_its_sweep(start, steps):
    results = records.Results(RESULTS)
    losses = {rate: results.final(f"sweep-scratch-{start}-{steps}-{rate}") for rate in experiments.RATES}
    assert experiments.CHOSEN[start, steps] == min(losses, key=losses.get)


@pytest.mark.parametrize("start", experiments.SMOLLM2_CHOSEN)
def test_runs_to_smollm2_have_the_best_rates_that_were_tried(start):
    results = records.Results(RESULTS)
    pairs = experiments.SMOLLM2_RATES[start]
    best = tables.best_of_sweep(results, "smollm2-sweep", start, pairs)
    assert best in (None, experiments.sweep_name("smollm2-sweep", start, pairs[0]))


@pytest.mark.parametrize("tgt", experiments.SMALL_TARGETS)
def test_runs_to_small_targets_have_the_best_rates_that_were_tried(tgt):
    results = records.Results(RESULTS)
    for start, pairs in experiments.SMALL_RATES[tgt].items():
        best = tables.best_of_sweep(results, f"small-sweep-{tgt}", start, pairs)
        assert best in (None, experiments.sweep_name(f"small-sweep-{tgt}", start, pairs[0])), start


# --------------------------------------------------------------------------------------- the world


def test_no_word_means_two_things():
    words = [word for table in (scenes.COLOURS, scenes.SHAPES) for words in table.values() for word in words]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_can_be_seen_and_fits_its_circle(shape):
    assert max(np.hypot(x, y) for x, y in scenes.outline(shape)) < 1.35
    looks = dict(colour="red", shape=shape, size="small", shade=scenes.RGB["red"])
    thing = looks | dict(x=32, y=32, radius=9, turn=10)
    ground = dict(background="white", shade=(244, 244, 244), arrangement="alone")
    image, owner = scenes.render(ground | dict(objects=[thing]))
    assert 40 < (owner == 1).sum() < 18 * 18
    assert image[owner == 1].std() > 0


def test_shapes_are_drawn_with_the_frequencies_of_the_table():
    rng = random.Random(0)
    drawn = [scenes.draw_from(scenes.SHAPES, 2, rng) for _ in range(20000)]
    first, *_, last = scenes.SHAPES
    assert 13 < drawn.count(first) / drawn.count(last) < 27


def test_patches_are_labelled_by_the_object_that_covers_them():
    scene = scenes.random_scene(random.Random(3))
    _, owner = scenes.render(scene)
    labels = sight.patch_labels([scene], owner[None])[0]
    for thing in scene["objects"]:
        patch = int(thing["y"]) // 8 * 8 + int(thing["x"]) // 8
        if thing["shape"] not in ("ring", "frame", "corner", "chevron"):  # which are empty in their middle
            assert labels[0, patch] == list(scenes.COLOURS).index(thing["colour"])
            assert labels[1, patch] == 1 + list(scenes.SHAPES).index(thing["shape"])


@pytest.mark.parametrize("family", languages.TOKENIZERS)
def test_tokenizers_of_the_world_read_like_those_of_their_family(family, tmp_path):
    build, config = languages.TOKENIZERS[family]
    rng = random.Random(0)
    texts = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(3000)]
    build(texts).save(str(tmp_path / "tokenizer.json"))
    llm = languages.LLMS[f"{family}-256"]
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "config.json", llm)
    tok = data.load_tokenizer(tmp_path)
    for text in texts[:50]:
        assert tok.decode(tok.encode(text)).strip() == text
    assert len(tok.encode(texts[0])) < len(texts[0])
    assert max(tok.vocab().values()) < llm["vocab_size"]
    assert (tok.end_id == tok.eos_id) == (family == "t5")


@pytest.mark.parametrize("name", languages.LLMS)
def test_the_language_models_of_the_world_can_be_built_and_read_both_corpora(name):
    llm = ARCHITECTURES[name.split("-")[0]](languages.LLMS[name])
    initialise_weights(llm)
    if name.startswith("t5"):
        total, count = languages.read_encoder_ids(llm, [([5, 6, 1], [7, 8, 1]), ([5, 1], [7, 1])])
        assert count == 5
    else:
        total, count = languages.read_first_tokens(llm, [[2, 5, 6, 7], [2, 5]])
        assert count == 4
    assert 7 < total / count < 9.5


@pytest.mark.slow
def test_the_first_stage_learns_all_three_of_its_tasks():
    """On eight fixed pairs: contrast, matching and captioning all fall far below what guessing gives."""
    torch.manual_seed(0)
    vpg = qformer.VPG(sight.VPG_CONFIG)
    vpg.reset()
    torch.nn.init.normal_(vpg.query_tokens, std=0.5)
    model = sight.FirstStage(vpg, 50)
    features = torch.randn(8, 65, 128)
    ids = torch.randint(5, 50, (8, 6))
    ids[::2, 4:] = IGNORE
    trained = [p for name, p in model.named_parameters() if "vision_model" not in name]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for _ in range(80):
        parts = model(features, ids, 2)
        optimizer.zero_grad()
        sum(parts).backward()
        optimizer.step()
    contrast, matching, captioning = parts
    assert contrast < 0.7  # guessing: 2.1
    assert matching < 0.4  # guessing: 0.7
    assert captioning < 1.5  # guessing: 3.9
