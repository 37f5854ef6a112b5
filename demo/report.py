"""The end of `make demo`: what was transferred, how well it sees, and a picture of held-out images with their captions.

    python demo/report.py out/demo out/demo-from-scratch      # a run, and the baselines to put beside it
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import transfer
from demo.scenes import named


def read_scenes(file):
    """-> (image files, captions, the (colour, shape) pairs that each image really shows)"""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return ([file.parent / row["image"] for row in rows], [row["caption"] for row in rows],
            [{tuple(pair) for pair in row["objects"]} for row in rows])


def caption_all(model, tok, files, batch_size=50):
    """Greedy captions of image files."""
    images = torch.stack([data.resize(data.load_image(file), model.vpg.image_size) for file in files])
    return [text for batch in images.split(batch_size) for text in transfer.answer(model, tok, batch)]


def share_right(captions, truths):
    """-> (share of the claimed (colour, shape) pairs that are in the image, number of claims)"""
    claims = [(claim, truth) for text, truth in zip(captions, truths) for claim in named(text)]
    return sum(claim in truth for claim, truth in claims) / max(1, len(claims)), len(claims)


def draw(file, images, rows, columns=3, side=150, width=400):
    """A sheet of images, each with what people and every model say about it. rows: {who: captions}"""
    font, line = ImageFont.load_default(13), 17
    height = max(side, 2 * line * len(rows)) + 16
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * width + 8, i // columns * height + 8
        sheet.paste(data.load_image(image).resize((side, side), Image.NEAREST), (x, y))
        for j, (who, captions) in enumerate(rows.items()):
            pen.text((x + side + 10, y + 2 * line * j), who, font=font, fill=(120, 120, 120))
            text = captions[i]
            while pen.textlength(text, font) > width - side - 26:
                text = text[:-2].rstrip() + "…"
            pen.text((x + side + 10, y + 2 * line * j + line - 2), text, font=font, fill="black")
    sheet.save(file)


def losses(run):
    """{stage: (first row, last row)} of a run's validation."""
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]
    stages = dict.fromkeys(row["stage"] for row in rows)
    return {stage: [row for row in rows if row["stage"] == stage] for stage in stages}


def curve(run):
    """[(optimizer steps since the run began, validation loss)]"""
    points, before = [], 0
    for rows in losses(run).values():
        points += [(before + row["step"], row["val_loss"]) for row in rows]
        before += rows[-1]["step"]
    return points


def draw_curves(file, runs):
    """Validation losses of some runs over their optimizer steps, in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="tight")
    axes = figure.subplots()
    for run in runs:
        axes.plot(*zip(*curve(run)), "o-", markersize=3, label=run.name)
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="validation loss a token")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, the transfer first")
    parser.add_argument("--val", type=Path, default=Path("demo/pairs/val.jsonl"), help="held-out scenes (default: %(default)s)")
    args = parser.parse_args()
    began = time.time()
    files, people, truths = read_scenes(args.val)
    config = json.loads((args.runs[0] / "config.json").read_text())
    source, target = config["arguments"]["src"], config["arguments"]["tgt"]
    models = {f"source ({source}), as it was": source} | {run.name: run for run in args.runs}
    captions = {who: caption_all(*transfer.load_model(str(name)), files) for who, name in models.items()}

    print(f"\n{'=' * 100}\nThe VPG of {source} was moved to the language model {target}. On {len(files)} held-out images, which no model has seen:\n")
    print(f"  {'loss a caption token':28} {'stage':14} {'steps':>6} {'at first':>9} {'at the end':>11} {'shuffled images':>16} {'seconds':>8}")
    for run in args.runs:
        for stage, rows in losses(run).items():
            first, last = rows[0], rows[-1]
            print(f"  {run.name:28} {stage:14} {last['step']:6} {first['val_loss']:9.3f} {last['val_loss']:11.3f} {last['val_loss_shuffled']:16.3f} {last['seconds']:8.0f}")
    print("\n  (seconds: of training, since the run began; with shuffled images the caption belongs to another picture)\n")
    print(f"  {'colour and shape named right':40} {'right':>6} {'claims':>7} {'by chance':>10}")
    for who, texts in captions.items():
        right, claims = share_right(texts, truths)
        chance, _ = share_right(texts, truths[1:] + truths[:1])
        print(f"  {who:40} {right:6.1%} {claims:7} {chance:10.1%}")
    print("\n  (of the coloured shapes that the captions name, how many are in the image; by chance: in the next image)\n")
    for baseline in args.runs[1:]:
        steps, loss = curve(baseline)[-1]
        passed = next((step for step, reached in curve(args.runs[0]) if reached < loss), None)
        print(f"{baseline.name} ends at {loss:.3f} after {steps} steps; {args.runs[0].name} "
              + (f"is below that after {passed} steps, warm-up counted." if passed else "does not get there."))
    pictures = {name: args.runs[0] / f"{name}.png" for name in ("captions", "comparison", "curves")}
    draw(pictures["captions"], files[:12], {"people": people} | captions)
    draw_curves(pictures["comparison"], args.runs)
    print(f"\nPictures: {pictures['captions']} (held-out images and captions), {pictures['comparison']} (the runs' losses), "
          f"{pictures['curves']} (matched and shuffled images). This report took {time.time() - began:.0f} s.")


if __name__ == "__main__":
    main()
