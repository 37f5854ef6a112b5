"""Facts about the start of a transfer: what the projector begins with, and how --init auto chooses."""

import json

import numpy as np
import pytest
import torch
from conftest import arguments, rows, train_in
from safetensors import safe_open
from torch import nn

import data
import hub
import loop
import qformer
import train
import transfer
from pairs import read_pairs

ALONE = loop.Processes(0, 1, torch.device("cpu"), "fp32")


def command(world, out, *more):
    return arguments(world, out, "--steps", "4", "--val-every", "9", *more)


@pytest.fixture(scope="module")
def auto(world, tmp_path_factory):
    """A run with --init auto, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "auto"
    return out, train_in(1, command(world, out, "--init", "auto"))


@pytest.mark.slow
def test_init_auto_takes_what_is_ahead_after_a_few_steps_and_its_rate(auto):
    out, said = auto
    start = json.loads((out / "config.json").read_text())["start"]
    kinds = {row["init"] for row in start["tried"]}
    assert kinds == {"converter, ridge 1", "converter, ridge 10", "captions", "random"}
    for kind in kinds:  # rates rise until one does worse, and fall where that is so at once
        trials = [(row["lr"], row["loss"]) for row in start["tried"] if row["init"] == kind]
        rising = [trial for trial in trials if trial[0] in transfer.RATES]
        rates, losses = zip(*rising)
        assert rates == transfer.RATES[: len(rising)]
        assert list(losses[:-1]) == sorted(losses[:-1], reverse=True)
        assert len(rising) == len(transfer.RATES) or losses[-1] > losses[-2]
        lower = [lr for lr, _ in trials[len(rising) :]]
        assert lower == list(transfer.LOWER_RATES[: len(lower)])
        assert bool(lower) == (min(losses) == losses[0])
    best = min(start["tried"], key=lambda row: row["loss"])
    assert (start["init"], start["lr"]) == (best["init"], best["lr"] / 2)
    assert rows(out, "stage", "lr")[0] == ("warm-up", best["lr"] / 2)
    (taken,) = [line for line in said.splitlines() if line.endswith("<- taken")]
    assert best["init"] in taken and f"{best['loss']:.3f}" in taken


@pytest.mark.slow
def test_a_resumed_run_keeps_its_start_and_the_rate_of_it(world, auto, tmp_path, monkeypatch):
    """Nothing is tried anew, and the losses are those of the run that was not stopped."""
    out = tmp_path / "run"
    steps = []

    def stop(at):
        steps.append(at)
        if at["step"] == 2:
            loop.stop_asked.set()

    with pytest.raises(SystemExit):
        train.main(command(world, out, "--init", "auto"), watch=stop)
    with safe_open(out / "resume.safetensors", "pt") as file:
        assert "captions" in str(file.metadata())
    monkeypatch.setattr(transfer, "pick_start", None)
    train.main(command(world, out, "--init", "auto", "--resume"))
    assert rows(out, "stage", "step", "loss", "lr") == rows(auto[0], "stage", "step", "loss", "lr")


@pytest.mark.slow
def test_a_rate_that_is_given_goes_before_the_one_that_was_found(world, tmp_path):
    train.main(command(world, tmp_path / "run", "--init", "auto", "--warm-up-lr", "3e-3"))
    assert rows(tmp_path / "run", "lr")[0] == (3e-3,)


@pytest.mark.slow
def test_the_first_process_picks_for_all(world, auto, tmp_path):
    out = tmp_path / "two"
    train_in(2, command(world, out, "--init", "auto"))
    for one, two in zip(rows(auto[0], "stage", "lr", "loss"), rows(out, "stage", "lr", "loss"), strict=True):
        assert one[:2] == two[:2] and abs(one[2] - two[2]) < 1e-5


@pytest.fixture
def places(world):
    return hub.resolve(str(world[0]), "source"), hub.resolve(str(world[1]), "target")


def pick(monkeypatch, losses):
    """pick_start of starts whose losses after the trials are these, {name: one a rate}."""
    now = []

    class Judge:
        def __init__(self, *_):
            pass

        def losses(self, _):
            name, rate = now[-1] if now else (None, None)
            return (9.0 if rate is None else losses[name][rate]), 9.0

    class Model:
        class projector:
            load_state_dict = staticmethod(lambda name: now.append((name, None)))

    def tried(model, projector, lr, *_):
        now.append((projector.state_dict(), (*transfer.RATES, *transfer.LOWER_RATES).index(lr)))

    class Start(str):
        state_dict = str.__str__

    monkeypatch.setattr(loop, "Validation", Judge)
    monkeypatch.setattr(transfer, "try_start", tried)
    monkeypatch.setattr(transfer.vpgtrans, "enter_stage", lambda *_: None)
    args = train.parse_arguments(["--src", "a", "--tgt", "b", "--micro-batch", "2"])
    return transfer.pick_start(Model, {name: Start(name) for name in losses}, None, None, args, ALONE)


def test_a_dry_run_names_the_rates_that_a_warm_up_may_have(world, tmp_path, capsys):
    """Half of those that are tried, as pick_start gives them."""
    train.main(command(world, tmp_path / "run", "--init", "auto", "--dry-run"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "will be one of" in line]
    named = sorted(map(float, line.partition("one of ")[2].split(", ")))
    assert named == sorted(rate / 2 for rate in (*transfer.RATES, *transfer.LOWER_RATES))


def test_rates_rise_until_one_does_worse(monkeypatch):
    start = pick(monkeypatch, {"captions": [3.0, 2.0, 2.5, 0.0], "random": [5.0, 4.0, 3.0, 2.5]})
    assert (start["init"], start["lr"]) == ("captions", transfer.RATES[1] / 2)
    assert [(row["init"], row["loss"]) for row in start["tried"]] == [
        ("captions", 3.0), ("captions", 2.0), ("captions", 2.5),
        ("random", 5.0), ("random", 4.0), ("random", 3.0), ("random", 2.5)]


@pytest.mark.parametrize("lower, tried, best", [((4.0, 0.0), [3.0, 3.5, 4.0], 0), ((2.0, 2.5), None, 4),
                                                ((2.0, 1.0), None, 5)])
def test_rates_fall_where_the_second_does_worse_at_once(monkeypatch, lower, tried, best):
    losses = [3.0, 3.5, 0.0, 0.0, *lower]
    start = pick(monkeypatch, {"captions": losses, "random": [5.0, 6.0, 0.0, 0.0, 7.0, 0.0]})
    rates = (*transfer.RATES, *transfer.LOWER_RATES)
    assert (start["init"], start["lr"]) == ("captions", rates[best] / 2)
    of_captions = [row["loss"] for row in start["tried"] if row["init"] == "captions"]
    assert of_captions == (tried or [3.0, 3.5, *lower])


def test_a_start_whose_loss_is_nan_at_first_is_tried_at_lower_rates(monkeypatch):
    nan = float("nan")
    start = pick(monkeypatch, {"captions": [nan, nan, 0.0, 0.0, 2.0, 3.0], "random": [5.0, 4.0, 4.5, 0.0]})
    assert (start["init"], start["lr"]) == ("captions", transfer.LOWER_RATES[0] / 2)


def test_a_loss_that_is_nan_is_never_taken(monkeypatch):
    nan = float("nan")
    start = pick(monkeypatch, {"captions": [nan] * 6, "random": [5.0, 4.0, nan, 3.0]})
    assert (start["init"], start["lr"]) == ("random", transfer.RATES[1] / 2)
    lines = transfer.describe_start(start | {"seconds": 1.0})
    (taken,) = [line for line in lines if line.endswith("<- taken")]
    assert "random" in taken and "4.000" in taken
    with pytest.raises(ValueError, match="NaN or infinite"):
        pick(monkeypatch, {"captions": [nan] * 6, "random": [float("inf")] * 6})


def test_no_image_is_both_trained_on_and_judged_by(world):
    train_sets, judge_sets = transfer.keep_back([read_pairs(str(world[2]))])
    (trained,) = [set(pairs.files()) for pairs in train_sets]
    (judged,) = [set(pairs.files()) for pairs in judge_sets]
    assert not trained & judged and (len(trained), len(judged)) == (16, 8)


def test_starts_are_fitted_and_tried_on_other_images_than_those_that_judge_them(world, tmp_path, monkeypatch):
    """Of a whole run: what the fits and the trials' steps are given, and what the losses are of."""
    given = {}

    class Enough(Exception):
        pass

    def starts(projector, words, counts, looks, random, starts=transfer.starts):
        given["fitted"] = looks
        return starts(projector, words, counts, looks, random)

    def pick_start(model, named, train, judge, *_):
        given.update(tried=train.sets, judged=judge.sets)
        raise Enough

    monkeypatch.setattr(transfer, "starts", starts)
    monkeypatch.setattr(transfer, "pick_start", pick_start)
    with pytest.raises(Enough):
        train.main(command(world, tmp_path / "run", "--init", "auto"))
    files = {use: {file for pairs in sets for file in pairs.files()} for use, sets in given.items()}
    assert files["fitted"] == files["tried"] and len(files["judged"]) >= 2
    assert not files["judged"] & files["tried"]


def test_too_few_images_to_judge_by_are_named(world):
    few = read_pairs(str(world[2])).subset(np.arange(5))
    with pytest.raises(ValueError, match="third of the training images, two at least: 5 are too few"):
        transfer.keep_back([few])


@pytest.fixture
def look(world, tmp_path, capsys):
    """A function: some lines of pairs.jsonl -> what the VPG makes of their images, and what was said."""
    vpg = qformer.load_vpg(world[0], torch.float32)
    args = train.parse_arguments(["--src", "a", "--tgt", "b", "--micro-batch", "4", "--workers", "0"])

    def look(lines, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        looks = transfer.look_at_images(vpg, [read_pairs(str(file))], args, ALONE, **options)
        return looks, capsys.readouterr().out

    return look


@pytest.fixture
def lines(world, tmp_path):
    """Ten lines of pairs.jsonl with whole paths, and one whose image is broken."""
    lines = [json.loads(line) for line in world[2].read_text().splitlines()][:10]
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [line | {"image": str(world[2].parent / line["image"])} for line in lines]
    return [*lines, lines[0] | {"image": str(tmp_path / "broken.png")}]


def test_images_that_cannot_be_read_are_counted_and_named(look, lines):
    (pairs,), said = look(lines)
    assert len(pairs) == 10 and "1 cannot be read" in said and "broken.png" in said
    with pytest.raises(ValueError, match="of the 1 training images to start from 1 cannot be read"):
        look(lines[10:])


def test_queries_are_those_of_the_images_and_as_many_as_asked_for(world, look, lines):
    (pairs,), _ = look(lines[:10], count=5)
    assert len(pairs) == 5
    vpg = qformer.load_vpg(world[0], torch.float32)
    for i in range(5):
        with torch.no_grad():
            queries = vpg(data.read_image(pairs.file(i), vpg.image_size)[None])
        assert torch.allclose(pairs.cache[pairs.file(i)], queries[0], atol=1e-5)


def test_captions_without_a_word_in_both_llms_are_passed_over(world, places, look, lines, monkeypatch):
    projector = qformer.load_projector(world[0])
    words = transfer.read_shared_words(projector, *places)
    match = transfer.match_tokens

    def nothing_of_one(ids, *others):  # as if the target had no such token
        return match(ids, *others) if len(ids) > 1 else []

    monkeypatch.setattr(transfer, "match_tokens", nothing_of_one)
    wordless = [line | {"caption": "?"} for line in lines[:3]]
    said = []
    fitted = transfer.refit_projector(projector, words, look(lines[3:10])[0], said.append)
    with_others = transfer.refit_projector(projector, words, look([*lines[3:10], *wordless])[0], said.append)
    assert torch.equal(fitted.weight, with_others.weight)
    assert "captions of 7 images" in said[0] and "without" not in said[0]
    assert "without 3 whose captions have no word in both" in said[1]
    with pytest.raises(ValueError, match="of 3 captions not one has a word"):
        transfer.refit_projector(projector, words, look(wordless)[0], said.append)


def test_the_converter_counts_words_in_a_sample_of_the_captions(world, places, monkeypatch):
    words = transfer.read_shared_words(qformer.load_projector(world[0]), *places)
    pairs = read_pairs(str(world[2]))
    whole = transfer.count_shared(words, [pairs, pairs], 32)
    monkeypatch.setattr(transfer, "COUNTED", 48)
    assert torch.equal(transfer.count_shared(words, [pairs, pairs], 32), whole)
    assert transfer.count_shared(words, [pairs, pairs], 2).sum() < whole.sum()  # what is read of them
    monkeypatch.setattr(transfer, "COUNTED", 24)
    every_other = [pairs.subset(np.arange(0, 24, 2))] * 2
    sample = transfer.count_shared(words, [pairs, pairs], 32)
    assert torch.equal(sample, transfer.count_shared(words, every_other, 32)) and sample.sum() < whole.sum()


def test_the_ridge_pulls_what_words_do_not_say_towards_nothing(world, places):
    """Along directions that no word has a soft prompt says nothing, the larger the ridge the less."""
    projector = qformer.load_projector(world[0])
    words = transfer.read_shared_words(projector, *places)
    counts = transfer.count_shared(words, [read_pairs(str(world[2]))], 32)
    sizes = []
    for ridge in (1e-3, 1e-1, 10.0):
        merged = transfer.convert_projector(projector, words, counts, print, ridge)
        sizes.append(merged.weight.norm().item())
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.5 * sizes[0]


def test_the_random_start_is_the_models_own(world, places):
    projector = qformer.load_projector(world[0])
    words = transfer.read_shared_words(projector, *places)
    pairs = read_pairs(str(world[2]))
    pairs = pairs.subset(np.arange(4))
    pairs.cache = {file: torch.randn(5, 32) for file in pairs.files()}
    random = nn.Linear(32, 32)
    named = transfer.starts(projector, words, transfer.count_shared(words, [pairs], 32), [pairs], random)
    assert torch.equal(named["random"].weight, random.weight) and named["random"] is not random
