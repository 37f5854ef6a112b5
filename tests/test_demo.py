"""Facts about the embedded default: `make demo` shortened, and what lies in demo/."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from demo import report
from demo.scenes import caption, named, random_scene, truth

ROOT = Path(report.__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`make demo` with the Makefile's own commands, but a few steps: (its folder, what it printed)"""
    out, printed = tmp_path_factory.mktemp("demo"), ""
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout.replace("\\\n", " ").splitlines()
    commands = [line for line in recipe if "train.py" in line or "report.py" in line]
    assert len(commands) == 3
    for command in commands:
        shorter = " --warm-up-steps 4 --steps 4 --val-samples 20 --val-every 4" if "train.py" in command else ""
        command = command.replace(".venv/bin/python", sys.executable).replace("out/", f"{out}/") + shorter
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return out, printed


@pytest.mark.slow
def test_the_demo_runs_and_sums_up(demo):
    out, printed = demo
    assert (out / "demo" / "captions.png").stat().st_size > 10_000 and (out / "demo" / "curves.png").exists()
    for text in ("word converter: ", "stage warm-up", "stage fine-tune", "stage from-scratch", "colour and shape named right", "by chance"):
        assert text in printed


@pytest.mark.slow
def test_the_source_sees_and_its_captions_are_no_chance(demo):
    """The embedded VPG with its own language model: 64 pairs of colour and shape there are."""
    line = next(line for line in demo[1].splitlines() if "as it was" in line and "%" in line)
    right, claims, chance = line.split()[-3:]
    assert float(right[:-1]) > 80 and float(chance[:-1]) < 10 and int(claims) > 300


@pytest.mark.slow
def test_warmed_up_soft_prompts_depend_on_the_image(demo):
    rows = [row for row in map(json.loads, (demo[0] / "demo" / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]
    assert rows[-1]["val_loss"] < rows[-1]["val_loss_shuffled"] - 0.1


def test_what_is_embedded_is_small_and_whole():
    files = [file for folder in ("pairs", "source", "target") for file in (ROOT / "demo" / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    for name, count in (("train", 2400), ("val", 300)):
        rows = [json.loads(line) for line in (ROOT / "demo" / "pairs" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) >= count and all((ROOT / "demo" / "pairs" / row["image"]).is_file() for row in rows)


def test_named_reads_what_captions_claim():
    assert named("a crimson disc next to a big square that is navy blue on white") == {("red", "circle"), ("blue", "square")}
    assert named("a picture of a dog") == set()
    rng = random.Random(0)
    for _ in range(300):
        scene = random_scene(rng)
        assert named(caption(scene, rng)) == {tuple(pair) for pair in truth(scene)}


def test_right_shares_are_counted_by_claim():
    truths = [{("red", "circle")}, {("blue", "square")}]
    assert report.share_right(["a red circle and a red square", "a blue square"], truths) == (2 / 3, 3)
