"""The end of `make demo`: what was transferred, how well it sees, and a picture of held-out images
with their captions.

    python -m demo.report out/demo out/demo-from-scratch      # a run, and the baselines beside it
"""

import argparse
import json
import time
from pathlib import Path

import data
import evaluate
import transfer
from study.captions import caption_all, draw, read_scenes, share_right
from study.records import curve
from study.speedup import search


def read_metrics(run):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validations(run):
    """{stage: rows of a run's validation}"""
    stages = {}
    for row in read_metrics(run):
        if "val_loss" in row:
            stages.setdefault(row["stage"], []).append(row)
    return stages


def draw_curves(file, runs):
    """Validation losses of some runs over their optimizer steps, in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="tight")
    axes = figure.subplots()
    for run in runs:
        axes.plot(*zip(*curve(read_metrics(run))), "o-", markersize=3, label=run.name)
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="validation loss a token")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def print_losses(runs):
    """A line for each stage of each run."""
    print(f"  {'loss a caption token':28} {'stage':14} {'steps':>6} {'at first':>9} "
          f"{'at the end':>11} {'shuffled images':>16} {'seconds':>8}")
    for run in runs:
        for stage, rows in validations(run).items():
            first = rows[0]
            last = rows[-1]
            print(f"  {run.name:28} {stage:14} {last['step']:6} {first['val_loss']:9.3f} "
                  f"{last['val_loss']:11.3f} {last['val_loss_shuffled']:16.3f} {last['seconds']:8.0f}")
    print("\n  (seconds: of training, since the run began; with shuffled images the caption belongs to "
          "another picture)\n")


def cider(texts, people):
    """CIDEr in papers' points of captions, each beside the one that people wrote."""
    score, _ = evaluate.cider(dict(enumerate(texts)), {i: [text] for i, text in enumerate(people)})
    return 100 * score


def print_shares(captions, truths, people):
    """A line for each model: how many of the coloured shapes that it names are in the image, and CIDEr."""
    print(f"  {'colour and shape named right':36} {'right':>6} {'claims':>7} {'by chance':>10} "
          f"{'CIDEr':>7} {'by chance':>10}")
    truths_of_next = truths[1:] + truths[:1]
    people_of_next = people[1:] + people[:1]
    for who, texts in captions.items():
        right, claims = share_right(texts, truths)
        chance, _ = share_right(texts, truths_of_next)
        print(f"  {who:36} {right:6.1%} {claims:7} {chance:10.1%} "
              f"{cider(texts, people):7.1f} {cider(texts, people_of_next):10.1f}")
    print("\n  (of the coloured shapes that the captions name, how many are in the image; CIDEr beside one "
          "caption of people;\n  by chance: both for the next image)\n")


def compare(run, baseline):
    """After how many steps a run is below the loss at which a baseline ends, in words."""
    steps, loss = curve(read_metrics(baseline))[-1]
    passed = next((step for step, reached in curve(read_metrics(run)) if reached < loss), None)
    if passed:
        outcome = f"is below that after {passed} steps, warm-up counted."
    else:
        outcome = "does not get there."
    return f"{baseline.name} ends at {loss:.3f} after {steps} steps; {run.name} {outcome}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, the transfer first")
    parser.add_argument("--val", type=Path, default=Path("demo/pairs/val.tar"),
                        help="held-out scenes (default: %(default)s)")
    args = parser.parse_args(argv)
    began = time.time()
    run, *baselines = args.runs
    files, people, truths = read_scenes(args.val)
    config = json.loads((run / "config.json").read_text())
    source = config["arguments"]["src"]
    target = config["arguments"]["tgt"]
    models = {f"source ({source}), as it was": source} | {run.name: run for run in args.runs}
    captions = {who: caption_all(*transfer.load_model(str(name)), files) for who, name in models.items()}

    print(f"\n{'=' * 100}\nThe VPG of {source} was moved to the language model {target}. "
          f"On {len(files)} held-out images, which no model has seen:\n")
    print_losses(args.runs)
    print_shares(captions, truths, people)
    for baseline in baselines:
        print(compare(run, baseline))
    for line in search(config):
        print(line)
    draw(run / "captions.png", [data.load_image(file) for file in files[:12]], {"people": people} | captions)
    draw_curves(run / "comparison.png", args.runs)
    print(f"\nPictures: {run}/captions.png (held-out images and captions), {run}/comparison.png (the "
          f"runs' losses), {run}/curves.png (matched and shuffled images). This report took "
          f"{time.time() - began:.0f} s.")


if __name__ == "__main__":
    main()
