"""Tables and pictures of docs/miniature.md, from what study.py recorded.

    python miniature/report.py                                                    # docs/miniature.md and -*.png from miniature/results
    python miniature/report.py --results out/study/results --out out/study       # the same of runs of one's own

A loss is the cross-entropy a token of the test images' captions. Means are over seeds, ± is their standard deviation (n - 1).
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "miniature")]


import study
from demo import report as demo
from demo import scenes
from make import SEEDS as SCENES
from study import BUDGETS, FAMILIES, FINE_TUNE_RATES, RATES, SEEDS, SOURCES, STARTS, SWEPT, WARM_UP_RATES

# --------------------------------------------------------------------------------------------------------------- results


class Results:
    """What was recorded, by the names of the runs; a name without its seed stands for all seeds."""

    def __init__(self, folder):
        self.records = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
        self.rows = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob("*.jsonl"))}

    def seeds(self, name):
        return [f"{name}-s{seed}" for seed in SEEDS if f"{name}-s{seed}" in self.rows]

    def curve(self, name):
        """[(optimizer steps, warm-up counted; loss with matched images; with shuffled ones; seconds of training)] of one run"""
        points, before = [], 0
        for stage in dict.fromkeys(row["stage"] for row in self.rows[name]):
            rows = [row for row in self.rows[name] if row["stage"] == stage and "val_loss" in row]
            points += [(before + row["step"], row["val_loss"], row["val_loss_shuffled"], row["seconds"]) for row in rows]
            before += rows[-1]["step"]
        return points

    def final(self, name):
        return self.curve(name)[-1][1]

    def finals(self, name):
        return [self.final(run) for run in self.seeds(name)]

    def first_below(self, name, loss):
        """(optimizer steps, seconds) after which a run first has at most this loss, or None"""
        return next(((steps, seconds) for steps, matched, _, seconds in self.curve(name) if matched <= loss), None)


def spread(values, digits=3):
    """mean ± standard deviation"""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def share(values):
    return spread([100 * value for value in values], 1) + " %" if values else "–"


def table(head, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- tables


def sweep_table(results):
    """The baseline's rates, on validation images."""
    rates, rows = RATES, []
    for start in STARTS:
        for steps in SWEPT:
            losses = {rate: results.final(name) for rate in rates if (name := f"sweep-scratch-{start}-{steps}-{rate}") in results.rows}
            cell = lambda rate: f"**{losses[rate]:.3f}**" if losses[rate] == min(losses.values()) else f"{losses[rate]:.3f}"
            rows.append([start, steps, *(cell(rate) if rate in losses else "–" for rate in rates)])
    return table(["Q-Former at first", "steps", *rates], rows)


def transfer_sweep_table(results):
    """VPGTrans's rates, on validation images: after 60 steps of warm-up and 240 of fine-tuning."""
    loss = lambda warm, rate: results.final(name) if (name := f"sweep-transfer-{warm}-{rate}-s0") in results.rows else None
    best = min((loss(warm, rate) or 9.0 for warm in WARM_UP_RATES for rate in FINE_TUNE_RATES))
    cell = lambda value: "–" if value is None else f"**{value:.3f}**" if value == best else f"{value:.3f}"
    return table(["fine-tuning \\ warm-up", *WARM_UP_RATES], [[rate, *(cell(loss(warm, rate)) for warm in WARM_UP_RATES)] for rate in FINE_TUNE_RATES])


def scores(results, name):
    """test loss, pairs right, pairs found, words right, seconds of training"""
    records = [results.records[run] for run in results.seeds(name)]
    seconds = [results.rows[run][-1]["seconds"] for run in results.seeds(name)]
    return [spread(results.finals(name)), share([r["right"] for r in records]), share([r["found"] for r in records]),
            share([r["words_right"] for r in records]), f"{statistics.mean(seconds):.0f}" if seconds else "–"]


HEAD = ["test loss", "coloured shapes right", "found", "words right", "seconds"]


def main_table(results):
    """From scratch and VPGTrans, by optimizer steps."""
    rows = [[f"from scratch, {name}", f"{steps:,}", *scores(results, f"scratch-{start}-{steps}")]
            for start, name in (("random", "random Q-Former"), ("stage1", "Q-Former after the first stage")) for steps in BUDGETS]
    rows += [[f"VPGTrans, {part or 100} % of the images", f"{steps:,}", *scores(results, f"images-{part}-{steps}" if part else f"transfer-{steps}")]
             for part in ("", "25", "10.7", "5") for steps in (100, 300, 1000)]
    rows += [[f"source: {llm}, {study.SOURCE_STEPS:,} steps, validation images", "", *scores(results, f"source-{llm}")] for llm in SOURCES]
    return table(["run", "steps", *HEAD], rows)


def difference(results, name, other):
    """Of the final losses, seed by seed."""
    return [a - b for a, b in zip(results.finals(name), results.finals(other))]


def change_rows(results, names, other="transfer-300"):
    at = lambda name, steps: spread([loss for run in results.seeds(name) for step, loss, *_ in results.curve(run) if step == steps])
    rows = [[label, at(name, 0), at(name, 60), at(name, 120), *scores(results, name)[:2], spread(difference(results, name, other)) if name != other else ""]
            for name, label in names.items()]
    return table(["run", "loss at step 0", "60", "120", "300", "coloured shapes right", "300, difference to VPGTrans"], rows)


def variant_table(results):
    names = {"transfer-300": "VPGTrans", "variant-no-warm-up": "no warm-up", "variant-random-projector": "no converter: random projector",
             "variant-inheritance": "neither: VPG inheritance", "variant-plain-rate": "warm-up at the rate of fine-tuning",
             "variant-projector-only": "the projector alone, all 300 steps", "scratch-stage1-300": "from scratch, Q-Former after the first stage",
             "scratch-random-300": "from scratch, random Q-Former"}
    return change_rows(results, names)


def converter_table(results):
    names = {"transfer-300": "least squares, weighted by use (VPGTrans here)", "converter-unweighted": "least squares, each token once",
             "converter-ridge": "weighted, a ridge of 0.1 instead of 0.001", "converter-cosine": "cosine distance by SGD (the original)",
             "converter-captions": "soft prompts read as words of their caption", "words-300": "weighted least squares, from a source with word-like soft prompts",
             "variant-random-projector": "none"}
    return change_rows(results, names)


def size_table(results):
    return change_rows(results, {f"size-{llm}" if llm != "opt-128" else "transfer-300": f"source with {llm}" for llm in SOURCES})


def family_table(results):
    rows = []
    for family, pairs in FAMILIES.items():
        for source, tgt in pairs:
            name = f"family-{source}-{tgt}"
            rows.append([f"{source} → {tgt}", spread(results.finals(name)), *(spread(results.finals(f"scratch-{tgt}-{steps}")) for steps in SWEPT),
                         spread(difference(results, name, f"scratch-{tgt}-300")), *speed_up(results, name, f"scratch-{tgt}-1000")])
    return table(["transfer", "300 steps", "from scratch, 300", "1,000", "difference at 300", "steps to pass 1,000 from scratch", "speed-up"], rows)


def speed_up(results, name, scratch):
    """[steps of the runs called `name` until they pass the mean final loss of `scratch`, how many times fewer that is]"""
    runs, goals = results.seeds(name), results.finals(scratch)
    if not runs or not goals:
        return ["–", "–"]
    steps = results.curve(results.seeds(scratch)[0])[-1][0]
    passed = [results.first_below(run, statistics.mean(goals)) for run in runs]
    if None in passed:
        return [f"not in {results.curve(runs[0])[-1][0]}" + f" ({sum(p is None for p in passed)} of {len(passed)} seeds)", "–"]
    return [spread([p[0] for p in passed], 0), f"{steps / statistics.mean([p[0] for p in passed]):.1f} ×"]


def speed_table(results):
    """In how many steps the runs of VPGTrans first pass what training from scratch ends at."""
    rows = []
    for start in STARTS:
        for budget in BUDGETS:
            scratch = f"scratch-{start}-{budget}"
            for part in ("", "10.7"):
                names = [f"images-{part}-{steps}" if part else f"transfer-{steps}" for steps in (100, 300, 1000)]
                rows.append([start, f"{budget:,}", spread(results.finals(scratch)), f"{part or 100} %",
                             *(" / ".join(speed_up(results, name, scratch)) for name in names)])
    return table(["Q-Former at first", "steps from scratch", "test loss", "images of VPGTrans", "VPGTrans, 100 steps", "300 steps", "1,000 steps"], rows)


TABLES = {"sweep": sweep_table, "transfer-sweep": transfer_sweep_table, "main": main_table, "speed": speed_table, "variants": variant_table,
          "converters": converter_table, "sizes": size_table, "families": family_table}


# -------------------------------------------------------------------------------------------------------------- pictures


def band(axes, results, name, label, colour, before=0, **style):
    """The mean test loss of a run's seeds over optimizer steps, and the range of the seeds."""
    curves = [results.curve(run) for run in results.seeds(name)]
    if curves:
        steps = [point[0] for point in curves[0]]
        losses = list(zip(*([point[1] for point in curve] for curve in curves)))
        axes.plot(steps, [statistics.mean(at) for at in losses], color=colour, label=label, **style)
        axes.fill_between(steps, [min(at) for at in losses], [max(at) for at in losses], color=colour, alpha=0.15, linewidth=0)


def new_axes(size=(9, 4.8)):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    axes = figure.subplots()
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="test loss a token")
    return figure, axes


def draw_speed(results, file):
    """From scratch, each budget with its own schedule, and VPGTrans."""
    figure, axes = new_axes()
    for start, colour, name in (("random", "0.6", "random Q-Former"), ("stage1", "C0", "Q-Former after the first stage")):
        for budget in BUDGETS:
            band(axes, results, f"scratch-{start}-{budget}", f"from scratch, {name}" if budget == BUDGETS[0] else None, colour, linewidth=1)
    for steps in (100, 300, 1000):
        band(axes, results, f"transfer-{steps}", "VPGTrans" if steps == 100 else None, "C3")
        band(axes, results, f"images-10.7-{steps}", "VPGTrans, 10.7 % of the images" if steps == 100 else None, "C1", linestyle="--")
    axes.set(xscale="log", xlim=(10, 11000), ylim=(0.85, 1.6))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def draw_variants(results, file):
    """What each part of VPGTrans contributes, in the first 300 steps."""
    figure, axes = new_axes()
    for i, (name, label) in enumerate({"transfer-300": "VPGTrans", "variant-random-projector": "random projector, warmed up",
                                       "variant-no-warm-up": "word converter, no warm-up", "variant-inheritance": "VPG inheritance (neither)",
                                       "variant-projector-only": "projector alone", "scratch-stage1-300": "from scratch, first stage",
                                       "scratch-random-300": "from scratch, random"}.items()):
        band(axes, results, name, label, f"C{i}", linewidth=2.5 if i == 0 else 1.3)
    axes.set(xlim=(0, 300), ylim=(0.85, 2.2))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def draw_captions(results, file, count=12):
    """The first test images with what the source, VPGTrans and training from scratch say, after equal steps."""
    import random

    from PIL import Image

    rng, images, people = random.Random(SCENES["test"]), [], []
    folder = file.parent / "miniature-images"
    folder.mkdir(exist_ok=True)
    for number in range(count):
        scene = scenes.random_scene(rng)
        images.append(folder / f"{number:05d}.png")
        Image.fromarray(scenes.render(scene)[0]).save(images[-1])
        people.append(scenes.caption(scene, rng))
    said = {"people": people}
    for who, name in (("VPGTrans, 300 steps", "transfer-300-s0"), ("from scratch, first stage, 300", "scratch-stage1-300-s0"),
                      ("from scratch, random, 300", "scratch-random-300-s0")):
        if name in results.records:
            said[who] = results.records[name]["captions"][:count]
    demo.draw(file, images, said)
    for image in images:
        image.unlink()
    folder.rmdir()


PICTURES = {"speed": draw_speed, "variants": draw_variants, "captions": draw_captions}


def fill(text, results):
    """The document with its tables made anew: what stands between <!-- table NAME --> and <!-- end -->."""
    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", lambda m: f"<!-- table {m[1]} -->\n{TABLES[m[1]](results)}\n<!-- end -->", text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "miniature" / "results", help="(default: miniature/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of miniature.md and the pictures (default: docs)")
    parser.add_argument("--show", nargs="*", metavar="TABLE", help="print these tables, or all, and write nothing")
    args = parser.parse_args()
    results = Results(args.results)
    if args.show is not None:
        for name in args.show or TABLES:
            print(f"{name}\n{TABLES[name](results)}\n")
        return
    (args.out / "miniature.md").write_text(fill((ROOT / "docs" / "miniature.md").read_text(), results))
    for name, draw in PICTURES.items():
        draw(results, args.out / f"miniature-{name}.png")


if __name__ == "__main__":
    main()
