"""MemVP in the small: questions about scenes in ScienceQA's layout, and what a run answers.

    python -m study.memory make datasets/scene-questions
    python finetune.py --llm datasets/smollm2 --vit demo/source --image-scale 0.1 --lr 5e-3 \\
        --memvp scienceqa-words=datasets/scene-questions --rows 64 --batch-size 16 --steps 200
    python -m study.memory score out/smollm2-memvp-scienceqa-words datasets/scene-questions --limit 600

Which colour, which shape, how many, what is beside it; three to five choices; a third of the questions
is about things that everybody knows, without an image. Colours and shapes are drawn evenly, so that
no answer is likelier: judge by right minus shuffled images.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image

import data
import evaluate
import finetune
import loop
import pairs
import transfer
from study.scenes import COLOURS, RGB, SHAPES, random_scene, render, vary

EVEN_COLOURS = list(COLOURS)[:8]
EVEN_SHAPES = list(SHAPES)[:8]
NUMBERS = ["one", "two", "three"]
KNOWN = {
    "grass": "green", "the sky at noon": "blue", "a ripe lemon": "yellow", "a fire engine": "red",
    "a ripe banana": "yellow", "chocolate": "brown", "a carrot": "orange", "a pig": "pink",
    "blood": "red", "an eggplant": "purple", "a leaf in spring": "green", "the sea": "blue",
}


def even_scene(rng):
    """A scene whose colours and shapes are drawn evenly, no two alike."""
    scene = random_scene(rng)
    count = len(scene["objects"])
    looks = zip(rng.sample(EVEN_COLOURS, count), rng.sample(EVEN_SHAPES, count))
    for thing, (colour, shape) in zip(scene["objects"], looks):
        thing |= dict(colour=colour, shape=shape, shade=vary(RGB[colour], 14, rng))
    return scene


def offer(answer, others, rng):
    """An answer among three to five choices. -> (choices, its number)"""
    others = [other for other in others if other != answer]
    choices = rng.sample(others, min(rng.randint(2, 4), len(others))) + [answer]
    rng.shuffle(choices)
    return choices, choices.index(answer)


def ask_about(scene, rng):
    """-> (category, question, answer, what else it could be)"""
    thing, *more = rng.sample(scene["objects"], len(scene["objects"]))
    asked = [
        ("colour", f"What color is the {thing['shape']}?", thing["colour"], EVEN_COLOURS),
        ("shape", f"What shape is the {thing['colour']} thing?", thing["shape"], EVEN_SHAPES),
        ("count", "How many shapes are there?", NUMBERS[len(more)], NUMBERS),
    ]
    if more:
        others = [shape for shape in EVEN_SHAPES if shape != thing["shape"]]
        asked.append(("beside", f"What is beside the {thing['shape']}?", more[0]["shape"], others))
    return rng.choice(asked)


def make(folder, counts, seed=0):
    """Writes questions in ScienceQA's layout (MEMVP's tests read the same)."""
    rng = random.Random(seed)
    problems = {}
    splits = {split: [] for split in counts}
    for split, count in counts.items():
        for _ in range(count):
            id = str(len(problems) + 1)
            splits[split].append(id)
            has_image = rng.random() < 2 / 3
            if has_image:
                scene = even_scene(rng)
                kind, question, answer, others = ask_about(scene, rng)
                place = folder / "images" / split / id
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(render(scene)[0]).save(place / "image.png")
            else:
                thing = rng.choice(list(KNOWN))
                question = f"What color is {thing}?"
                kind, answer, others = "known", KNOWN[thing], EVEN_COLOURS
            choices, number = offer(answer, others, rng)
            problems[id] = dict(
                question=question, choices=choices, answer=number, hint="", split=split, category=kind,
                image="image.png" if has_image else None, subject="natural science", grade="grade1",
                task="closed choice", topic="scenes", skill=kind, lecture="", solution="")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("problems", problems), ("pid_splits", splits), ("captions", {"captions": {}})):
        (folder / f"{name}.json").write_text(json.dumps(content))


@torch.no_grad()
def chosen(model, tok, items, has_image, features, batch_size=32):
    """The choice whose first id has the largest logit, of each question: a list of numbers."""
    numbers = []
    for first in range(0, len(items), batch_size):
        some = items[first : first + batch_size]
        rows = [finetune.question_ids(tok, *finetune.ask_in_words(item)) for item in some]
        prompts = data.pad([prompt for prompt, _ in rows], data.PADDING, left=True)
        here = slice(first, first + batch_size)
        prefix, mask, memory = model.reads(prompts, has_image[here], features=features[here])
        logits = model.llm(prefix, torch.zeros(len(some), 1, dtype=torch.long), mask, memory)[:, 0]
        for item, scores in zip(some, logits):
            ids = [first_id(tok, item, number) for number in range(len(item["choices"]))]
            numbers.append(int(scores[ids].argmax()))
    return numbers


def first_id(tok, item, number):
    """The first id of one of the choices, as an answer."""
    return finetune.question_ids(tok, *finetune.ask_in_words(item | {"answer": number}))[1][0]


def read_image_features(model, items):
    """(N,n,Dv): of the image of each question, zeros where there is none."""
    size = model.image_size
    nothing = torch.zeros(3, size, size, dtype=torch.uint8)
    images = [data.read_image(item["image"], size) if item["image"] else nothing for item in items]
    with torch.no_grad():
        return torch.cat([model.see(some)["features"] for some in torch.stack(images).split(64)])


def percent(hits):
    return round(100 * hits.float().mean().item(), 1)


def ask_all(run, folder, split, limit=None):
    """What a run chooses, by the right, a shuffled and no image. -> (items, {name: a number each})"""
    model, tok = transfer.load_model(run, torch.bfloat16)
    questions = pairs.read_questions(f"{folder}/problems.json#{split}")
    items = [questions[i] for i in range(len(questions))][:limit]
    seen = torch.tensor([bool(item["image"]) for item in items])
    with torch.autocast("cpu", torch.bfloat16):
        features = read_image_features(model, items)
        rows = seen.nonzero()[:, 0]
        other = features.clone()
        other[rows] = features[rows.roll(1)]  # each the image of the question with one before it
        return items, {
            "right": chosen(model, tok, items, seen, features),
            "shuffled": chosen(model, tok, items, seen, other),
            "none": chosen(model, tok, items, torch.zeros_like(seen), features),
        }


def score(items, found):
    """Percent right with an image, by the right, a shuffled and no image, in all and by kind of
    question; and of text-only questions."""
    kinds = [item["category"] for item in items]
    answers = torch.tensor([item["answer"] for item in items])
    seen = torch.tensor([bool(item["image"]) for item in items])
    hits = {name: torch.tensor(numbers) == answers for name, numbers in found.items()}
    chance = [1 / len(item["choices"]) for item in items if item["image"]]
    result = {name: percent(of_images[seen]) for name, of_images in hits.items()}
    result["text-only"] = percent(hits["none"][~seen])
    result["chance"] = round(100 * sum(chance) / len(chance), 1)
    result["questions"] = [len(chance), len(items) - len(chance)]
    for kind in ("colour", "shape", "count", "beside"):
        of_kind = torch.tensor([name == kind for name in kinds])
        result[kind] = {name: percent(of_images[of_kind]) for name, of_images in hits.items()}
    return result


SHOWN = {"right": "with the image", "shuffled": "with another one", "none": "without an image"}


def draw(file, items, found, count=12):
    """A picture of the first questions with an image, and what was chosen: green if it is right."""
    cells = []
    for number, item in enumerate(items):
        if item["image"]:
            lines = [(item["question"], "black"), (f"of {', '.join(item['choices'])}", "gray")]
            for name, numbers in found.items():
                colour = "darkgreen" if numbers[number] == item["answer"] else "crimson"
                lines.append((f"{SHOWN[name]}: {item['choices'][numbers[number]]}", colour))
            cells.append((item["image"], lines))
    evaluate.draw_sheet(file, cells[:count])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the questions")
    making.add_argument("folder", type=Path)
    scoring = commands.add_parser("score", help="what a run answers")
    scoring.add_argument("run")
    scoring.add_argument("folder", type=Path)
    scoring.add_argument("--split", default="test")
    scoring.add_argument("--limit", type=int, help="questions at most (default: all)")
    scoring.add_argument("--picture", type=Path, metavar="FILE",
                         help="write there some images with questions and answers")
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.folder, {"train": 6_400, "val": 200, "test": 1500})
        return
    items, found = ask_all(args.run, args.folder, args.split, args.limit)
    print(json.dumps(score(items, found)))
    if args.picture:
        draw(args.picture, items, found)


if __name__ == "__main__":
    loop.run_command(main)
