"""Benchmarks in miniature: captions of and questions about scenes of coloured shapes, in the files of
COCO, NoCaps, VQAv2, GQA and OK-VQA, laid out as evaluate.py finds them.

    python -m demo.questions out/questions --scenes 200
    VPGTRANS_DATA=out/questions python evaluate.py --model demo/source
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from demo.scenes import BACKGROUNDS, COLOURS, SHAPES, article, caption, random_scene, render, truth

DOMAINS = {"alone": "in-domain", "beside": "near-domain", "above": "out-domain"}


def ask(scene, rng):
    """-> [(question, its answer, what else people may say, answer type, what GQA calls it)]"""
    objects = scene["objects"]
    colour, shape = objects[0]["colour"], objects[0]["shape"]
    asked = [("How many shapes are there?", str(len(objects)), [], "number", "query"),
             ("What color is the background?", scene["background"], BACKGROUNDS[scene["background"]], "other", "query")]
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
    said = [rng.choice(others) if others and rng.random() < 0.3 else answer for _ in range(10)]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(said)]


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_benchmarks(folder, scenes=100, seed=1):
    """Writes images, captions and questions of so many scenes into a folder."""
    rng = random.Random(seed)
    coco = []
    images, captions = [], []
    questions, annotations, gqa = [], [], {}
    known, known_annotations = [], []
    for i in range(scenes):
        scene = random_scene(rng)
        picture = Image.fromarray(render(scene)[0])
        for name in (f"coco/val2014/COCO_val2014_{i:012d}.jpg", f"nocaps/val/{i:016x}.jpg", f"gqa/images/n{i}.jpg"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / name, quality=95)
        texts = [caption(scene, rng).capitalize() + "." for _ in range(5)]
        coco.append({"image": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": texts})
        images.append({"id": i, "file_name": f"{i:016x}.jpg", "domain": DOMAINS[scene["arrangement"]]})
        captions += [{"id": len(captions) + n, "image_id": i, "caption": text} for n, text in enumerate(texts)]
        for n, (question, answer, others, kind, structural) in enumerate(ask(scene, rng)):
            row = {"question_id": 1000 * i + n, "image_id": i}
            questions.append(row | {"question": question})
            answers = ten_answers(answer, others, rng)
            annotations.append(row | {"question_type": question[:8].lower(), "answer_type": kind,
                                      "multiple_choice_answer": answer, "answers": answers})
            gqa[f"{i:05d}{n:03d}"] = {"imageId": f"n{i}", "question": question, "answer": answer,
                                      "types": {"structural": structural}}
            if kind == "other":  # five people, each twice
                twice = [answers[k // 2 * 2] | {"raw_answer": answers[k // 2 * 2]["answer"]} for k in range(10)]
                known.append(questions[-1])
                known_annotations.append(annotations[-1] | {"answers": twice})
    write_json(folder / "coco/annotations/coco_karpathy_test.json", coco)
    write_json(folder / "nocaps/nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    name = "OpenEnded_mscoco_val2014_questions.json"
    write_json(folder / f"vqav2/v2_{name}", {"questions": questions})
    write_json(folder / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    write_json(folder / f"okvqa/{name}", {"questions": known})
    write_json(folder / "okvqa/mscoco_val2014_annotations.json", {"annotations": known_annotations})
    write_json(folder / "gqa/testdev_balanced_questions.json", gqa)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    write_benchmarks(args.folder, args.scenes, args.seed)


if __name__ == "__main__":
    main()
