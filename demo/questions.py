"""Benchmarks in miniature: captions of and questions about scenes of coloured shapes, in the files of
COCO, NoCaps, VQAv2, GQA and OK-VQA, laid out as evaluate.py finds them.

    python -m demo.questions out/questions --scenes 200
    VPGTRANS_DATA=out/questions python evaluate.py --model demo/source
    python -m demo.questions out/short --scenes 1000 --seed 2 --teach     # for finetune.py --instruct

With --teach the questions are conversations of one turn, in the layout of LLaVA's, with the request for a
short answer that evaluate.py makes: who was taught to converse in sentences does not say one word.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from evaluate import SHORTLY
from study.scenes import BACKGROUNDS, COLOURS, SHAPES, article, caption, random_scene, render, truth

DOMAINS = {"alone": "in-domain", "beside": "near-domain", "above": "out-domain"}


def ask(scene, rng):
    """-> [(question, its answer, what else people may say, answer type, what GQA calls it)]"""
    objects = scene["objects"]
    colour = objects[0]["colour"]
    shape = objects[0]["shape"]
    ground = scene["background"]
    asked = [("How many shapes are there?", str(len(objects)), [], "number", "query"),
             ("What color is the background?", ground, BACKGROUNDS[ground], "other", "query")]
    if len({o["shape"] for o in objects}) == len(objects):
        asked.append((f"What color is the {shape}?", colour, COLOURS[colour], "other", "query"))
    if len({o["colour"] for o in objects}) == len(objects):
        asked.append((f"What is the {colour} shape?", shape, SHAPES[shape], "other", "query"))
    there = [article(" ".join(pair)) for pair in truth(scene)]
    elsewhere = article(f"{rng.choice(list(COLOURS))} {rng.choice(list(SHAPES))}")
    claim = rng.choice(there) if rng.random() < 0.5 else elsewhere
    asked.append((f"Is there {claim}?", "yes" if claim in there else "no", [], "yes/no", "verify"))
    return asked


def ten_answers(answer, others, rng):
    """What ten people say: most of them the answer, some another word for it."""
    said = []
    for id in range(1, 11):
        text = rng.choice(others) if others and rng.random() < 0.3 else answer
        said.append({"answer": text, "answer_confidence": "yes", "answer_id": id})
    return said


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_benchmarks(folder, scenes=100, seed=1):
    """Writes images, captions and questions of so many scenes into a folder."""
    rng = random.Random(seed)
    drawn = [random_scene(rng) for _ in range(scenes)]
    write_images(folder, drawn)
    write_captions(folder, drawn, rng)
    write_questions(folder, drawn, rng)


IMAGES = {"coco": "val2014/COCO_val2014_{:012d}.jpg", "nocaps": "val/{:016x}.jpg", "gqa": "images/n{}.jpg"}


def write_images(folder, scenes):
    for i, scene in enumerate(scenes):
        picture = Image.fromarray(render(scene)[0])
        for benchmark, name in IMAGES.items():
            file = folder / benchmark / name.format(i)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file, quality=95)


def write_captions(folder, scenes, rng):
    """Five captions of each scene, for COCO as LAVIS lists them, for NoCaps in COCO's layout."""
    coco = []
    images = []
    captions = []
    for i, scene in enumerate(scenes):
        texts = [caption(scene, rng).capitalize() + "." for _ in range(5)]
        coco.append({"image": IMAGES["coco"].format(i), "caption": texts})
        images.append({"id": i, "file_name": f"{i:016x}.jpg", "domain": DOMAINS[scene["arrangement"]]})
        for text in texts:
            captions.append({"id": len(captions), "image_id": i, "caption": text})
    write_json(folder / "coco/annotations/coco_karpathy_test.json", coco)
    nocaps = {"images": images, "annotations": captions}
    write_json(folder / "nocaps/nocaps_val_4500_captions.json", nocaps)


def write_questions(folder, scenes, rng):
    """Questions with ten answers for VQAv2; the same with one answer for GQA; those of its "other"
    kind for OK-VQA, where each of five people counts twice."""
    vqav2 = []
    okvqa = []
    gqa = {}
    for i, scene in enumerate(scenes):
        for n, (question, answer, others, kind, structural) in enumerate(ask(scene, rng)):
            answers = ten_answers(answer, others, rng)
            row = {
                "question_id": 1000 * i + n,
                "image_id": i,
                "question": question,
                "answer_type": kind,
                "multiple_choice_answer": answer,
                "answers": answers,
            }
            vqav2.append(row)
            gqa[f"{i:05d}{n:03d}"] = {
                "imageId": f"n{i}",
                "question": question,
                "answer": answer,
                "types": {"structural": structural},
            }
            if kind == "other":
                people = [given | {"raw_answer": given["answer"]} for given in answers[::2]]
                okvqa.append(row | {"answers": [p for p in people for _ in range(2)]})
    name = "mscoco_val2014"
    for benchmark, start, rows in (("vqav2", "v2_", vqav2), ("okvqa", "", okvqa)):
        questions = [{key: row[key] for key in ("question_id", "image_id", "question")} for row in rows]
        answered = [{key: row[key] for key in row if key != "question"} for row in rows]
        write_json(folder / f"{benchmark}/{start}OpenEnded_{name}_questions.json", {"questions": questions})
        write_json(folder / f"{benchmark}/{start}{name}_annotations.json", {"annotations": answered})
    write_json(folder / "gqa/testdev_balanced_questions.json", gqa)


def write_lessons(folder, scenes, seed):
    """Writes conversations of one turn, a question of each scene and its short answer, and images."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(scenes):
        scene = random_scene(rng)
        Image.fromarray(render(scene)[0]).save(folder / "images" / f"{i}.png")
        question, answer, *_ = rng.choice(ask(scene, rng))
        said = [{"from": "human", "value": f"<image>\n{SHORTLY.format(question)}"},
                {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    write_json(folder / "conversations.json", rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--teach", action="store_true", help="instead: what teaches to answer shortly")
    args = parser.parse_args()
    write = write_lessons if args.teach else write_benchmarks
    write(args.folder, args.scenes, args.seed)


if __name__ == "__main__":
    main()
