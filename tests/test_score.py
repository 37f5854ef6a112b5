"""Facts about train.py --score: what a model scores while it trains."""

import json

import matplotlib.figure
import pytest
import torch
from conftest import ROOT, arguments, curves, demo_world, rows, train_in, values

import evaluate
import loop
import runs
import train
import transfer
from demo.questions import write_benchmarks
from study.captions import caption_all

SCENES = 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's models with 24 of its pairs, and COCO's and VQAv2's files of some scenes."""
    folder = tmp_path_factory.mktemp("score")
    write_benchmarks(folder, scenes=SCENES)
    return demo_world(folder, 24), folder


def scored(demo, out, *more):
    world, folder = demo
    start = ("--init", "captions", "--val-samples", SCENES, "--val-every", 6)
    return arguments(world, out, *start, "--score", f"coco={folder / 'coco'}", *more)


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "scored"
    train.main(scored(demo, out))
    return out


@pytest.mark.slow
def test_a_run_logs_the_cider_of_its_greedy_captions(demo, run):
    """At every validation, beside the loss; the last is that of the finished model."""
    _, folder = demo
    scores = rows(run, "stage", "step", "val_loss", "scores")
    assert [at[:2] for at in scores] == [("warm-up", 0), ("warm-up", 3), ("fine-tune", 0), ("fine-tune", 6)]
    assert len(scores) == len(values(run, "val_loss"))
    items = evaluate.read_task("coco", str(folder / "coco")).items
    captions = caption_all(*transfer.load_model(str(run), torch.float32), [item["image"] for item in items])
    said = {item["id"]: text for item, text in zip(items, captions)}
    expected, _ = evaluate.cider(said, {item["id"]: item["answers"] for item in items})
    assert expected > 0.1
    assert scores[-1][3] == {"COCO CIDEr": pytest.approx(100 * expected)}


@pytest.mark.slow
def test_a_score_changes_nothing_of_the_run_and_may_be_left_out_of_the_rest(demo, run, tmp_path):
    """The same losses to the bit; a run that was scored goes on without, and the other way round."""
    out = tmp_path / "run"

    def stop(at):
        if at["stage"] == "fine-tune" and at["step"] == 2:
            loop.stop_asked.set()

    plain = scored(demo, out)
    place = plain.index("--score")
    plain = plain[:place] + plain[place + 2 :]
    with pytest.raises(SystemExit):
        train.main(plain, watch=stop)
    train.main([*scored(demo, out), "--resume"])
    assert rows(out, "stage", "step", "loss") == rows(run, "stage", "step", "loss")
    assert values(out, "scores") == values(run, "scores")[-1:]


@pytest.mark.slow
def test_two_processes_share_the_images_and_find_the_same(demo, run, tmp_path):
    train_in(2, scored(demo, tmp_path / "two"))
    (first, *_), (alone, *_) = values(tmp_path / "two", "scores"), values(run, "scores")
    assert first == {name: pytest.approx(score) for name, score in alone.items()}


def score_once(specs, model, say=print, limit=99):
    tok = transfer.load_model(model, torch.float32)
    processes = loop.Processes(0, 1, torch.device("cpu"), "fp32")
    score = evaluate.scorer(specs, limit, tok[1], 4, processes)
    with torch.no_grad():
        return score(tok[0])


def test_of_several_benchmarks_each_has_its_first_score(demo):
    _, folder = demo
    found = score_once([f"{name}={folder / name}" for name in ("coco", "nocaps")], str(ROOT / "demo/source"))
    assert found.keys() == {"COCO CIDEr", "NoCaps CIDEr"} and min(found.values()) > 100


def test_an_image_that_cannot_be_read_is_named_and_counts_as_no_answer(demo, tmp_path, capsys):
    rows = json.loads((demo[1] / "coco/annotations/coco_karpathy_test.json").read_text())
    listed = [row | {"image": str(demo[1] / "coco" / row["image"])} for row in rows]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    file = tmp_path / "captions.json"
    model = str(ROOT / "demo/source")
    file.write_text(json.dumps(listed))
    whole = score_once([f"coco={file}"], model)
    file.write_text(json.dumps([listed[0] | {"image": str(broken)}, *listed[1:]]))
    less = score_once([f"coco={file}"], model)
    assert less["COCO CIDEr"] < whole["COCO CIDEr"] - 100 / SCENES
    assert "coco: 1 scored as no answer" in capsys.readouterr().out


def test_what_is_left_out_of_a_benchmark_is_said(demo, tmp_path, capsys):
    rows = json.loads((demo[1] / "coco/annotations/coco_karpathy_test.json").read_text())
    listed = [row | {"image": str(demo[1] / "coco" / row["image"])} for row in rows]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps([*listed, listed[0] | {"caption": 5}]))
    processes = loop.Processes(0, 1, torch.device("cpu"), "fp32")
    evaluate.scorer([f"coco={file}"], None, None, 4, processes)
    assert f"coco: 1 left out: a caption that is no text, such as {file}" in capsys.readouterr().out


@pytest.mark.parametrize("spec, complaint", [
    ("coco=nowhere.json", "nowhere.json"), ("bleu=a.json", "NAME one of"), ("coco", "does not read NAME=")])
def test_what_cannot_be_scored_is_said_before_the_run_begins(world, tmp_path, refused, spec, complaint):
    refused(train.main, arguments(world, tmp_path / "run", "--score", spec), complaint)
    assert not (tmp_path / "run").exists()


def test_scienceqa_is_refused(memvp_world, tmp_path):
    with pytest.raises(ValueError, match="scienceqa is for runs of MemVP"):
        evaluate.scorer([f"scienceqa={memvp_world[2]}"], 5, None, 4, None)


def test_scores_are_drawn_over_the_steps_of_all_stages(tmp_path, monkeypatch):
    """And the picture of a run without scores has one axis alone."""
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    log = runs.Log(tmp_path, 0)
    steps = [("warm-up", 0, 10.0), ("warm-up", 4, 20.0), ("fine-tune", 0, 20.0), ("fine-tune", 8, 70.0)]
    for scored in (False, True):
        log.begin([])
        for stage, step, score in steps:
            scores = {"scores": {"COCO CIDEr": score}} if scored else {}
            log.add(stage=stage, step=step, val_loss=1.0, val_loss_shuffled=2.0, **scores)
        with curves(drawn=True):
            log.draw()
    plain, figure = drawn
    assert len(plain.axes) == 1
    _, right = figure.axes
    points = [tuple(point) for line in right.get_lines() for point in line.get_xydata()]
    assert points == [(0, 10), (4, 20), (4, 20), (12, 70)]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["training", "validation", "validation, shuffled images", "COCO CIDEr"]
