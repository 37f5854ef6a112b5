"""Conversations about scenes of coloured shapes, in the layout of LLaVA's, and how many answers of a
model are right.

    python -m demo.conversations out/conversations        # FOLDER/train/, val/ and test/
    python -m demo.conversations out/conversations --score out/chat

`make chat` teaches them to a language model. With --score, the model of a run of stage 3 is asked what
stands in test/, a turn after the other behind its own answers, with the right pictures and with those of
other conversations, and so is the model that the run began with. Without a picture both are the same
language model, which is frozen. Answers are kept in the run's folder, and not asked for again.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import transfer
from study.scenes import BACKGROUNDS, CANONICAL, COLOURS, SHAPES, WORDS, article, named, random_scene, render

# ------------------------------------------------------------------------------- what is asked and said

# The last wording of each is never trained; of what "other" stands for, the turn before has spoken.
QUESTIONS = {
    "describe": ["What is in the picture?", "Describe the picture.", "What do you see?",
                 "Tell me what this picture shows.", "What does the image show?"],
    "colour": ["What colour is the {shape}?", "What color is the {shape}?",
               "Which colour does the {shape} have?", "Tell me the colour of the {shape}.",
               "The {shape}, what colour is it?"],
    "shape": ["What is the {colour} thing?", "What shape is the {colour} one?", "Which shape is {colour}?",
              "What is it that is {colour}?", "Which thing here is {colour}?"],
    "count": ["How many shapes are there?", "How many things are in the picture?", "Count the shapes.",
              "How many objects do you see?", "What is the number of shapes?"],
    "background": ["What colour is the background?", "What color is the background?",
                   "What is behind it all?", "Which background does the picture have?",
                   "On what background is it?"],
    "place": ["What is {place} the {shape}?", "Which shape is {place} the {shape}?",
              "What do you see {place} the {shape}?", "Tell me what is {place} the {shape}.",
              "The {shape}, what is {place} it?"],
    "yes or no": ["Is there {claim}?", "Do you see {claim}?", "Is {claim} in the picture?",
                  "Does the picture show {claim}?", "Can {claim} be seen?"],
    "other": ["And the other one?", "What is the other one?", "And the other shape?",
              "What about the other one?", "And what else is there?"],
}
NUMBERS = {1: "one", 2: "two"}
PLACES = {"above": ("above", "below"), "beside": ("next to", "beside")}  # of the first and the second object


def name(thing):
    return f"{thing['colour']} {thing['shape']}"


def describe(scene):
    """All of a scene in one sentence."""
    things = [article(name(thing)) for thing in scene["objects"]]
    between = {"above": " above ", "beside": " next to "}.get(scene["arrangement"], "")
    return f"{between.join(things).capitalize()}."


def ask(scene, rng):
    """What can be asked of a scene: [(kind, what its wording needs, answer, the object asked about)]"""
    objects = scene["objects"]
    count = len(objects)
    ground = scene["background"]
    number = "is one shape" if count == 1 else "are two shapes"
    asked = [("describe", {}, describe(scene), None),
             ("count", {}, f"There {number}.", None),
             ("background", {}, f"The background is {ground}.", None)]
    for i, thing in enumerate(objects):
        other = objects[1 - i] if count == 2 else {}
        colour = thing["colour"]
        shape = thing["shape"]
        if shape != other.get("shape"):
            asked.append(("colour", {"shape": shape}, f"The {shape} is {colour}.", i))
        if colour != other.get("colour"):
            asked.append(("shape", {"colour": colour}, f"The {colour} one is {article(shape)}.", i))
        if other and shape != other["shape"]:
            place = PLACES[scene["arrangement"]][1 - i]
            answer = f"{article(name(other)).capitalize()} is {place} the {shape}."
            asked.append(("place", {"shape": shape, "place": place}, answer, i))
    claim = name(rng.choice(objects))
    answer = f"Yes, there is {article(claim)}."
    if rng.random() < 0.5:
        claim = f"{rng.choice(list(COLOURS))} {rng.choice(list(SHAPES))}"
        while claim in map(name, objects):
            claim = f"{rng.choice(list(COLOURS))} {rng.choice(list(SHAPES))}"
        answer = f"No, there is no {claim}."
    asked.append(("yes or no", {"claim": article(claim)}, answer, None))
    return asked


def word(kind, needs, rng, unseen=False):
    """A question of a kind, in one of the wordings that are trained, or in the one that is not."""
    wording = QUESTIONS[kind][-1] if unseen else rng.choice(QUESTIONS[kind][:-1])
    return wording.format(**needs)


def converse(scene, rng, most=4, unseen=False):
    """-> [(kind, question, answer)], one to `most` turns, no question twice. It begins with any of them;
    where a turn is about one object of two, the next may be about the other."""
    asked = ask(scene, rng)
    rng.shuffle(asked)
    turns = []
    while asked and len(turns) < most:
        kind, needs, answer, about = asked.pop()
        turns.append((kind, word(kind, needs, rng, unseen), answer))
        if about is not None and kind != "place" and len(scene["objects"]) == 2 and rng.random() < 0.4:
            other = article(name(scene["objects"][1 - about]))
            turns.append(("other", word("other", {}, rng, unseen), f"The other one is {other}."))
    return turns[:most]


def write(folder, count, seed, unseen=False):
    """Writes `count` conversations, each about a picture of its own, into conversations.json and images/.
    What LLaVA's layout does not know, "kinds" and "shapes", how many there are, is for the score."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        scene = random_scene(rng)
        Image.fromarray(render(scene)[0]).save(folder / "images" / f"{i}.png")
        turns = converse(scene, rng, unseen=unseen)
        said = []
        for n, (_, question, answer) in enumerate(turns):
            mark = "" if n else "<image>\n"
            said += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        kinds = [kind for kind, _, _ in turns]
        rows.append({"id": f"{folder.name}-{i}", "image": f"{i}.png", "kinds": kinds,
                     "shapes": len(scene["objects"]), "conversations": said})
    (folder / "conversations.json").write_text(json.dumps(rows, indent=1))


# ------------------------------------------------------------------------------------ what is right


def words_of(text, table):
    """The words of a table in a text, as the table's keys."""
    return {CANONICAL[word] for word in WORDS.findall(text) if CANONICAL[word] in table}


def is_right(kind, answer, expected):
    """Does an answer say what the expected one says? What else it says does not count, nor how: a
    colour or shape may be any word for it, but another beside it is wrong."""
    answer = answer.lower()
    expected = expected.lower()
    if kind in ("describe", "place", "other"):
        return named(answer) == named(expected)
    if kind in ("colour", "shape"):
        table = COLOURS if kind == "colour" else SHAPES
        return words_of(answer, table) == words_of(expected, table)
    if kind == "background":
        said = set(re.findall(r"\w+", answer))
        known = [ground for ground, words in BACKGROUNDS.items() if said & set(words)]
        return known == [re.search(r"is (\w+)", expected)[1]]
    if kind == "count":
        found = set(re.findall(r"\b(one|two|1|2|three|3|four|4|five|5)\b", answer))
        return found in ({"one"}, {"1"}) if " one " in expected else found in ({"two"}, {"2"})
    return answer.split(",")[0].strip(" .!") == expected.split(",")[0]


def put_questions(model, tok, template, rows, files, batch_size=20):
    """Asks every question of some conversations behind the model's own answers; `files`, a picture for
    each of them, or None for conversations without one. -> [[answer, ...], ...]"""
    stop = data.stop_ids(tok, template)
    said = [[] for _ in rows]
    pixels = None
    if files:
        pixels = torch.stack([data.read_image(file, model.image_size) for file in files])
    places = model.num_query_tokens if files else 0
    for turn in range(max(len(row["kinds"]) for row in rows)):
        still = [i for i, row in enumerate(rows) if turn < len(row["kinds"])]
        for begin in range(0, len(still), batch_size):
            some = still[begin : begin + batch_size]
            prompts = []
            for i in some:
                question = rows[i]["conversations"][2 * turn]["value"].replace("<image>\n", "")
                prompts.append(data.chat_ids(tok, template, [*said[i], [question, None]], places)[0])
            prompts = data.pad(prompts, data.PADDING, left=True)
            answers = answer_all(model, prompts, None if pixels is None else pixels[some], stop)
            for i, ids in zip(some, answers):
                question = rows[i]["conversations"][2 * turn]["value"].replace("<image>\n", "")
                said[i].append([question, tok.decode(ids).strip()])
    return [[answer for _, answer in turns] for turns in said]


def answer_all(model, prompts, pixels, stop):
    """What a model says to prompts (B,P), with pixels (B,3,H,W) or without a picture -> B lists of ids"""
    if pixels is not None:
        return model.generate(prompts, images=pixels, stop=stop, max_new_tokens=40)
    with torch.inference_mode():
        words = model.llm.embed(prompts.clamp(min=0))
    return model.llm.generate(words, prompts != data.PADDING, stop=stop, max_new_tokens=40)


def ask_models(run, folder, most, precision):
    """The model of a run of stage 3, and the one that it began with, in the run's template -> the
    conversations, and {"model, pictures": answers to each of them}. What was answered before is read from
    the run's folder, where all is kept."""
    rows = json.loads((folder / "conversations.json").read_text())[:most]
    files = [folder / "images" / row["image"] for row in rows]
    shuffled = files[1:] + files[:1]
    config = json.loads((run / "config.json").read_text())
    template = data.ChatTemplate(**config["chat_template"])
    weights = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    kept = run / f"answers-{folder.name}.json"
    table = {"asked": rows, "weights": weights, "precision": precision, "answers": {}}
    if kept.is_file():
        before = json.loads(kept.read_text())
        table["answers"] = before["answers"] if before == table | {"answers": before["answers"]} else {}
    said = table["answers"]
    passes = {"after it": {"right": files, "shuffled": shuffled}, "both": {"none": None},
              "before stage 3": {"right": files, "shuffled": shuffled}}
    names = {"after it": str(run), "both": str(run), "before stage 3": config["arguments"]["model"]}
    for who, pictures in passes.items():
        left = [picture for picture in pictures if f"{who}, {picture}" not in said]
        if left:
            model, tok = transfer.load_model(names[who], transfer.DTYPES[precision])
        for picture in tqdm(left, f"{run}, {who}", leave=False, disable=None):
            said[f"{who}, {picture}"] = put_questions(model, tok, template, rows, pictures[picture])
            kept.write_text(json.dumps(table, indent=1))
    return rows, said


def judge(rows, answers):
    """-> [(kind, is it the first turn, how many shapes there are, is the answer right)] of all turns"""
    judged = []
    for row, said in zip(rows, answers):
        expected = [turn["value"] for turn in row["conversations"][1::2]]
        for turn, (kind, answer, truth) in enumerate(zip(row["kinds"], said, expected)):
            judged.append((kind, turn == 0, row["shapes"], is_right(kind, answer, truth)))
    return judged


SEEN = ("colour", "shape")


def by_column(judged):
    """{column of the report: is each of its answers right?}"""
    columns = {
        "first turn": [right for _, first, _, right in judged if first],
        "colour, shape": [right for kind, first, _, right in judged if first and kind in SEEN],
        "later turns": [right for _, first, _, right in judged if not first],
        # in any turn: of two shapes, the answer must not be the other's
        "colour, shape: of one": [right for kind, _, n, right in judged if kind in SEEN and n == 1],
        "of two": [right for kind, _, n, right in judged if kind in SEEN and n == 2]}
    for kind in QUESTIONS:
        columns[kind] = [right for of_kind, *_, right in judged if of_kind == kind]
    return columns


def share(of_runs):
    """Right answers, [True, ...] of each run, for people: their share, of how many, and the least and the
    most of a run."""
    rights = sum(of_runs, [])
    if not rights:
        return "-"
    text = f"{sum(rights) / len(rights):.0%} of {len(rights)}"
    if len(of_runs) > 1:
        each = [100 * sum(run) / len(run) for run in of_runs]
        text += f" ({min(each):.0f}-{max(each):.0f})"
    return text


def report(rows, of_runs):
    """Lines: how many answers are right, in first and in later turns, and of each kind; the answers of
    each run are {"model, pictures": answers}."""
    columns = {}
    for who in of_runs[0]:
        # without a picture all runs are the same language model
        asked = of_runs[:1] if who == "both, none" else of_runs
        each = [by_column(judge(rows, said[who])) for said in asked]
        columns[who] = {name: share([run[name] for run in each]) for name in each[0]}
    turns = list(by_column([]))[: -len(QUESTIONS)]
    for title, names in (("answers right", turns), ("of all turns", QUESTIONS)):
        yield f"  {title:26}" + "".join(f"{name:>23}" for name in names)
        for who, cells in columns.items():
            yield f"  {who:26}" + "".join(f"{cells[name]:>23}" for name in names)


def print_losses(run):
    """Held-out loss at the beginning and at the end of a run of stage 3."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "val_loss" in line]
    for line in (held_out[0], held_out[-1]):
        print(f"  {run}: held-out loss a token after {line['step']} steps of stage 3: "
              f"{line['val_loss']:.3f}, with shuffled pictures {line['val_loss_shuffled']:.3f}")


def score(runs, folder, most, precision):
    """Prints the report on runs of stage 3 that differ in their seed."""
    of_runs = []
    for run in runs:
        rows, said = ask_models(run, folder, most, precision)
        of_runs.append(said)
    for run in runs:
        print_losses(run)
    print(*report(rows, of_runs), sep="\n")
    print(f"\n  every answer: {', '.join(str(run / f'answers-{folder.name}.json') for run in runs)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=2400, help="to train on (default: %(default)s)")
    parser.add_argument("--score", type=Path, nargs="+", metavar="RUN",
                        help="runs of stage 3, to be asked; several are reported together")
    parser.add_argument("--part", choices=("test", "unseen"), default="test",
                        help="with --score: questions as they were trained, or in wordings that never were "
                             "(default: %(default)s)")
    parser.add_argument("--most", type=int, default=200, help="conversations asked (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    if args.score:
        return score(args.score, args.folder / args.part, args.most, args.precision)
    # a scene is of its part alone: each has a seed of its own
    write(args.folder / "train", args.scenes, seed=11)
    write(args.folder / "val", 100, seed=12)
    write(args.folder / "test", 300, seed=13)
    write(args.folder / "unseen", 100, seed=14, unseen=True)
    print(f"{args.folder}: {args.scenes:,} conversations to train on, 100 for validation, 300 and 100 to be "
          "scored by")


if __name__ == "__main__":
    main()
