"""Facts about demo/conversations.py: what is asked and answered about scenes, and when an answer is right."""

import json
import random

import pytest
import torch
from conftest import ROOT, arguments, write_language_model
from PIL import Image
from torch import nn

import data
import finetune
import llm as language_models
import pairs
import qformer
import train
import vpgtrans
from demo import conversations, probe
from demo.conversations import ask, converse, is_right
from study.scenes import named, random_scene, truth


def scenes(count=300):
    rng = random.Random(0)
    return [random_scene(rng) for _ in range(count)], rng


def test_answers_are_true_of_their_scenes():
    """By what each names, and by where the second object is: below the first, or beside it."""
    found, rng = scenes()
    for scene in found:
        there = {tuple(pair) for pair in truth(scene)}
        for kind, needs, answer, about in ask(scene, rng):
            claims = named(answer.lower())
            if kind == "describe":
                assert claims == there
            elif kind == "yes or no":
                claimed = named(needs["claim"])
                assert answer.startswith("Yes") == (claimed <= there)
                assert claims <= claimed
            elif kind == "place":
                assert claims <= there and scene["objects"][about]["shape"] == needs["shape"]
                first_is_asked_about = about == 0
                words = {"above": ("below", "above"), "beside": ("beside", "next to")}[scene["arrangement"]]
                assert needs["place"] == words[0 if first_is_asked_about else 1]
            elif kind in ("colour", "shape"):
                thing = scene["objects"][about]
                assert thing["colour"] in answer and thing["shape"] in answer
                key = "shape" if kind == "colour" else "colour"
                assert needs == {key: thing[key]}
                assert [other[key] for other in scene["objects"]].count(thing[key]) == 1


def test_conversations_ask_nothing_twice_and_follow_up_what_was_said():
    found, rng = scenes()
    others = 0
    for scene in found:
        turns = converse(scene, rng)
        assert len(turns) == 4 and len({answer for _, _, answer in turns}) >= 3
        for (before, _, about), (kind, _, answer) in zip(turns, turns[1:]):
            if kind == "other":
                others += 1
                assert before in ("colour", "shape")
                (claim,) = named(answer.lower())
                assert claim in {tuple(pair) for pair in truth(scene)}
                assert not all(word in about for word in claim)
    assert others > 30


def test_half_of_the_answers_are_yes():
    found, rng = scenes(1000)
    said = [answer for scene in found for kind, _, answer, _ in ask(scene, rng) if kind == "yes or no"]
    assert 0.45 < sum(answer.startswith("Yes") for answer in said) / len(said) < 0.55


def test_wordings_that_are_kept_back_are_never_trained():
    for scene, rng in zip(scenes(200)[0], map(random.Random, range(200))):
        kept_back = {question for _, question, _ in converse(scene, rng, unseen=True)}
        trained = {question for _, question, _ in converse(scene, rng)}
        assert not kept_back & trained


@pytest.mark.parametrize("kind, answer, expected, right", [
    ("describe", "I see a navy blue star above an olive dot.", "A blue star above an olive circle.", True),
    ("describe", "A blue star.", "A blue star above an olive circle.", False),
    ("describe", "A blue star above an olive circle and a red tree.", "A blue star above an olive circle.",
     False),
    ("colour", "It is crimson!", "The star is red.", True),
    ("colour", "The star is red and blue.", "The star is red.", False),
    ("colour", "The star.", "The star is red.", False),
    ("shape", "A hut", "The red one is a house.", True),
    ("shape", "The red one is a star.", "The red one is a house.", False),
    ("count", "There are 2.", "There are two shapes.", True),
    ("count", "One, or two.", "There are two shapes.", False),
    ("count", "There is one shape.", "There are two shapes.", False),
    ("background", "Dark.", "The background is black.", True),
    ("background", "The background is white.", "The background is black.", False),
    ("place", "A red tree.", "A red tree is above the star.", True),
    ("place", "A red star is above the star.", "A red tree is above the star.", False),
    ("other", "The other one is a golden fish.", "The other one is a yellow fish.", True),
    ("yes or no", "Yes.", "Yes, there is a red tree.", True),
    ("yes or no", "No, there is no red tree.", "Yes, there is a red tree.", False),
    ("yes or no", "The red tree is not there.", "No, there is no red tree.", False),
])
def test_an_answer_is_right_by_what_it_says(kind, answer, expected, right):
    assert is_right(kind, answer, expected) == right


def test_every_expected_answer_is_right_and_another_scenes_seldom():
    found, rng = scenes()
    asked = [row for scene in found for row in ask(scene, rng)]
    assert all(is_right(kind, answer, answer) for kind, _, answer, _ in asked)
    of_kind = [(answer, asked[(i + 9) % len(asked)][2]) for i, (kind, _, answer, _) in enumerate(asked)
               if kind == "describe"]
    assert sum(is_right("describe", other, answer) for answer, other in of_kind) < 0.05 * len(of_kind)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of conversations, as the command writes it."""
    folder = tmp_path_factory.mktemp("conversations")
    conversations.write(folder / "train", 8, seed=11)
    conversations.write(folder / "test", 6, seed=13)
    return folder


def test_they_are_read_as_llavas_are(written):
    items = pairs.read_conversations(str(written / "train" / "conversations.json"))
    assert len(items) == len(items.images) == 8 and not items.left_out
    assert Image.open(items.file(0)).size == (64, 64)
    rows = json.loads((written / "train" / "conversations.json").read_text())
    for item, row in zip(map(items.__getitem__, range(8)), rows):
        assert len(item["turns"]) == len(row["kinds"])
        assert row["shapes"] in (1, 2)
        assert item["turns"][0][0] == row["conversations"][0]["value"].removeprefix("<image>\n")
    pixels = {part: {file.read_bytes() for file in (written / part / "images").iterdir()}
              for part in ("train", "test")}
    assert not pixels["train"] & pixels["test"]


@pytest.fixture(scope="module")
def talker(world, tmp_path_factory):
    """A random model and its tokenizer."""
    folder = write_language_model(tmp_path_factory.mktemp("talker"))
    vpg = qformer.load_vpg(world[0], torch.float32)
    torch.manual_seed(0)
    model = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, 32), language_models.load_llm(folder, torch.float32))
    return model.eval(), data.load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("has_picture", [True, False])
def test_questions_are_asked_behind_the_models_own_answers(talker, written, has_picture):
    """Of several conversations at a time as of each alone, turn by turn."""
    model, tok = talker
    template = data.TEMPLATES["vicuna-v0"]
    rows = json.loads((written / "test" / "conversations.json").read_text())[:3]
    files = [written / "test" / "images" / row["image"] for row in rows]
    seen = files if has_picture else None
    said = conversations.put_questions(model, tok, template, rows, seen, batch_size=2)
    assert len({answers[0] for answers in said}) > 1 or not has_picture
    for row, file, answers in zip(rows, files, said):
        turns = []
        for n, answer in enumerate(answers):
            question = row["conversations"][2 * n]["value"].removeprefix("<image>\n")
            ids = torch.tensor([data.chat_ids(tok, template, [*turns, [question, None]], 5 * has_picture)[0]])
            sees = {"images": data.read_image(file, 28)[None]}
            prefix = model.prefix(ids, **sees)[0] if has_picture else model.llm.embed(ids)
            (alone,) = model.llm.generate(prefix, stop=data.stop_ids(tok, template), max_new_tokens=40)
            assert answer == tok.decode(alone).strip()
            turns.append([question, answer])


def test_the_report_tells_first_turns_from_later_ones_and_one_shape_from_two():
    """Of two runs together, with the least and the most of one."""
    texts = ["q", "The star is red.", "q", "There are two shapes."]
    rows = [{"kinds": ["colour", "count"], "shapes": n, "conversations": [{"value": text} for text in texts]}
            for n in (1, 2)]
    one = {"after it, right": [["It is red.", "There are two."], ["It is blue.", "There are two."]],
           "both, none": [["Red?", "One."], ["Blue!", "One."]]}
    other = one | {"after it, right": [["Red.", "One."], ["It is red.", "There are two."]]}
    lines = [line.split() for line in conversations.report(rows, [one])]
    assert lines[1] == "after it, right 50% of 2 50% of 2 100% of 2 100% of 1 0% of 1".split()
    assert lines[2] == "both, none 50% of 2 50% of 2 0% of 2 100% of 1 0% of 1".split()
    lines = [line.split() for line in conversations.report(rows, [one, other])]
    share = "75% of 4 (50-100)"
    assert lines[1] == f"after it, right {share} {share} {share} 100% of 2 (100-100) 50% of 2 (0-100)".split()
    # one and the same model
    assert lines[2] == "both, none 50% of 2 50% of 2 0% of 2 100% of 1 0% of 1".split()
    assert lines[4] == "after it, right - 75% of 4 (50-100) - 75% of 4 (50-100) - - - -".split()


@pytest.mark.slow
def test_a_run_of_stage_3_is_scored(world, written, tmp_path, capsys, monkeypatch):
    """From the pictures to the report."""
    target = write_language_model(tmp_path / "target")
    train.main(arguments((world[0], target, world[2]), tmp_path / "moved", "--no-warm-up", "--steps", "1"))
    taught = ["--model", tmp_path / "moved", "--instruct", written / "train", "--template", "vicuna-v0",
              "--val-samples", "4", "--out", tmp_path / "chat", "--batch-size", "4", "--steps", "1",
              "--workers", "0", "--precision", "fp32"]
    finetune.main(list(map(str, taught)))
    capsys.readouterr()
    conversations.score([tmp_path / "chat"], written / "test", 2, "fp32")
    said = capsys.readouterr().out
    assert "held-out loss a token after 1 steps" in said and "both, none" in said
    answers = json.loads((tmp_path / "chat" / "answers-test.json").read_text())
    assert len(answers["asked"]) == 2 and len(answers["answers"]) == 5
    monkeypatch.setattr(conversations, "put_questions", None)  # what was asked is not asked again
    conversations.score([tmp_path / "chat"], written / "test", 2, "fp32")
    assert capsys.readouterr().out == said


def test_a_linear_reader_finds_what_stands_there_and_nothing_else():
    """In numbers of which the first says the answer, and in those of other scenes."""
    torch.manual_seed(0)
    numbers = torch.randn(400, 20)
    answers = ["white" if x > 0 else "black" for x in numbers[:, 0]]
    both = probe.standardise(numbers[:300], numbers[300:])
    assert probe.read(*both, answers[:300], answers[300:]) > 0.9
    assert probe.read(both[0], both[1].roll(1, 0), answers[:300], answers[300:]) < 0.7


@pytest.mark.slow
def test_a_vpg_is_probed(capsys, monkeypatch):
    """The demo's source tells how many shapes there are by its queries."""
    monkeypatch.setattr("sys.argv", ["probe", str(ROOT / "demo" / "source"), "--scenes", "200"])
    probe.main()
    title, vit, queries = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["background", "how", "many"] and "ViT" in vit
    assert int(queries.split()[3].strip("%")) > 80
