"""Facts about the embedded default: `make demo` shortened, and what lies in demo/."""

import json
import random
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import curves, train_in, write_shard
from PIL import Image

import data
import transfer
from demo import report
from pairs import read_pairs
from study import captions
from study.make import DEMO_PAIRS, SAMPLES, draw_pairs
from study.scenes import caption, named, random_scene, truth

ROOT = Path(report.__file__).parent.parent
PAIRS = ROOT / "demo" / "pairs"
SHORTER = ["--warm-up-steps", 4, "--steps", 4, "--val-samples", 20, "--val-every", 4]
TRIAL_STEPS = 4  # of --init auto
HELD_OUT = 90  # scenes that are captioned


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`make demo` with the Makefile's own arguments, but a few steps, and fewer scenes at the end: (its
    folder, what it printed)"""
    out = tmp_path_factory.mktemp("demo")
    with tarfile.open(PAIRS / "val.tar") as shard:
        members = shard.getnames()[: 2 * HELD_OUT]
        write_shard(out / "val.tar", {name: shard.extractfile(name).read() for name in members})
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = recipe.replace("\\\n", " ").replace("out/", f"{out}/").splitlines()
    trained = [shlex.split(line)[2:] for line in lines if "python train.py" in line]
    reported = [shlex.split(line)[3:] for line in lines if "python -m demo.report" in line]
    assert (len(trained), len(reported)) == (2, 1)
    with pytest.MonkeyPatch.context() as patch, curves(drawn=True):
        patch.chdir(ROOT)
        patch.setattr(transfer, "TRIAL_STEPS", TRIAL_STEPS)
        printed = [train_in(1, [*argv, *SHORTER]) for argv in trained]
        printed.append(train_in(1, [*reported[0], "--val", out / "val.tar"], report.main))
    return out, "".join(printed)


@pytest.mark.slow
def test_the_demo_runs_and_sums_up(demo):
    out, printed = demo
    assert (out / "demo" / "captions.png").stat().st_size > 10_000
    assert (out / "demo" / "curves.png").exists()
    stages = "stage warm-up", "stage fine-tune", "stage from-scratch"
    for text in ("converter, ridge 10", "<- taken", *stages, "colour and shape named right", "by chance"):
        assert text in printed


@pytest.mark.slow
def test_the_source_sees_and_its_captions_are_no_chance(demo):
    """The embedded VPG with its own language model: 64 pairs of colour and shape there are."""
    _, printed = demo
    line = next(line for line in printed.splitlines() if "as it was" in line and "%" in line)
    right, claims, chance, cider, cider_by_chance = line.split()[-5:]
    assert float(right[:-1]) > 80
    assert float(chance[:-1]) < 10
    assert int(claims) > HELD_OUT
    assert float(cider) > 200 > 50 > float(cider_by_chance)


@pytest.mark.slow
def test_warmed_up_soft_prompts_depend_on_the_image(demo):
    out, _ = demo
    last = report.validations(out / "demo")["fine-tune"][-1]
    assert last["val_loss"] < last["val_loss_shuffled"] - 0.1


# --------------------------------------------------------------------------------- what is embedded


def test_what_is_embedded_is_small_and_whole():
    folders = [ROOT / "demo" / name for name in ("pairs", "source", "target")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    assert len(files) < 40
    for split, count in DEMO_PAIRS.items():
        pairs = read_pairs(str(PAIRS / f"{split}.tar"))
        assert len(pairs) == len(pairs.images) == count
        assert not pairs.left_out


@pytest.mark.parametrize("split", DEMO_PAIRS)
@pytest.mark.slow
def test_the_embedded_pairs_are_the_scenes_of_their_seed_in_their_order(split):
    """As study.make draws them: pixels, captions and truths; and train.py reads the same."""
    shard = PAIRS / f"{split}.tar"
    files, texts, truths = captions.read_scenes(shard)
    pairs = read_pairs(str(shard))
    assert files == pairs.files() and list(pairs.image) == list(range(len(files)))
    assert texts == list(pairs.captions)
    for i, (image, known) in enumerate(draw_pairs(f"demo-{split}", DEMO_PAIRS[split])):
        assert texts[i] == known["caption"]
        assert truths[i] == {tuple(pair) for pair in known["objects"]}
        assert data.load_image(files[i]).tobytes() == image.tobytes()


def test_the_samples_to_look_at_are_the_first_held_out_pairs():
    files, texts, _ = captions.read_scenes(PAIRS / "val.tar")
    samples = sorted((PAIRS / "samples").glob("*.png"))
    assert len(samples) == SAMPLES
    for sample, file, text in zip(samples, files, texts):
        assert Image.open(sample).tobytes() == data.load_image(file).tobytes()
        assert sample.with_suffix(".txt").read_text() == text + "\n"


def test_images_of_scenes_in_lines_are_found_beside_their_file(tmp_path):
    """The study's pairs are lines of JSON beside their images, the demo's are shards."""
    known = {"caption": "a red circle", "objects": [["red", "circle"]]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "val/0.png"} | known) + "\n")
    files, texts, truths = captions.read_scenes(tmp_path / "pairs.jsonl")
    assert files == [tmp_path / "val" / "0.png"]
    assert texts == ["a red circle"]
    assert truths == [{("red", "circle")}]


# -------------------------------------------------------------------------------- what is measured


def test_named_reads_what_captions_claim():
    both = "a crimson disc next to a big square that is navy blue on white"
    assert named(both) == {("red", "circle"), ("blue", "square")}
    assert named("a picture of a dog") == set()
    rng = random.Random(0)
    for _ in range(300):
        scene = random_scene(rng)
        assert named(caption(scene, rng)) == {tuple(pair) for pair in truth(scene)}


def test_right_shares_are_counted_by_claim():
    truths = [{("red", "circle")}, {("blue", "square")}]
    texts = ["a red circle and a red square", "a blue square"]
    assert captions.share_right(texts, truths) == (2 / 3, 3)


def test_cider_is_in_papers_points_beside_each_images_own_caption():
    texts = ["a red circle on white", "two blue squares", "a green star"]
    assert report.cider(texts, texts) > 300
    assert report.cider(texts, texts[1:] + texts[:1]) < 10


def test_a_run_is_compared_with_where_a_baseline_ends(tmp_path):
    """Steps are counted through both stages."""
    def write(name, **stages):
        rows = [dict(stage=stage, step=10 * i, samples=0, seconds=0.0, val_loss=loss)
                for stage, losses in stages.items() for i, loss in enumerate(losses)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    run = write("run", warm=[3.0, 2.0], tune=[2.0, 1.2])
    assert report.compare(run, write("slow", scratch=[3.0, 1.5])) == (
        "slow ends at 1.500 after 10 steps; run is below that after 20 steps, warm-up counted.")
    assert report.compare(run, write("fast", scratch=[3.0, 1.0])).endswith("run does not get there.")
