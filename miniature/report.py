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
from study import BUDGETS, FAMILIES, FINE_TUNE_RATES, LENGTHS, RATES, SEEDS, SOURCES, STARTS, SWEPT, TRANSFER_RATES, WARM_UP_RATES

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
    """In Markdown, without the rows of which nothing was run yet: all "–" behind what says which run it is."""
    rows = [row for row in rows if any(cell not in ("–", "") for cell in row[2:])]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- tables


def best_bold(losses, rate):
    """One of {rate: loss}."""
    if rate not in losses:
        return "–"
    return f"**{losses[rate]:.3f}**" if losses[rate] == min(losses.values()) else f"{losses[rate]:.3f}"


def sweep_table(results):
    """The baseline's rates, on validation images."""
    rows = []
    for start in STARTS:
        for steps in SWEPT:
            losses = {rate: results.final(name) for rate in RATES if (name := f"sweep-scratch-{start}-{steps}-{rate}") in results.rows}
            rows.append([start, steps, *(best_bold(losses, rate) for rate in RATES)])
    return table(["Q-Former at first", "steps", *RATES], rows)


def transfer_sweep_table(results):
    """VPGTrans's rates, on validation images: after 60 steps of warm-up and 240 of fine-tuning."""
    rows = []
    for init, rates in WARM_UP_RATES.items():
        losses = {(warm, rate): results.final(name) for warm in rates for rate in FINE_TUNE_RATES
                  if (name := f"sweep-{init}-{warm}-{rate}-s0") in results.rows}
        rows += [[INITS[init], warm, *(best_bold(losses, (warm, rate)) for rate in FINE_TUNE_RATES)] for warm in rates]
    return table(["projector", "warm-up", *(f"fine-tuning {rate}" for rate in FINE_TUNE_RATES)], rows)


def few(seeds):
    """A remark on figures that do not rest on all seeds yet."""
    return f" ({len(seeds)} of {len(SEEDS)} seeds)" if 0 < len(seeds) < len(SEEDS) else ""


def scores(results, name):
    """test loss, pairs right, pairs found, words right; and the number of seeds, where some are missing"""
    records = [results.records[run] for run in results.seeds(name)]
    return [spread(results.finals(name)) + few(records), *(share([record[key] for record in records]) for key in ("right", "found", "words_right"))]


INITS = {"transfer": "word converter", "captions": "`--init captions`"}
TRANSFERS = {"VPGTrans": "transfer", "VPGTrans, 10.7 % of the images": "images-10.7", "`--init captions`": "captions",
             "`--init captions`, 10.7 % of the images": "captions-10.7"}
STARTED = {"random": "random Q-Former", "stage1": "Q-Former after the first stage"}
HEAD = ["test loss", "coloured shapes right", "found", "words right"]


def main_table(results):
    """From scratch and VPGTrans, by optimizer steps."""
    rows = [[f"from scratch, {name}", f"{steps:,}", *scores(results, f"scratch-{start}-{steps}")]
            for start, name in STARTED.items() for steps in BUDGETS]
    rows += [[label, f"{steps:,}", *scores(results, f"{name}-{steps}")]
             for label, name in (TRANSFERS | {f"VPGTrans, {part} % of the images": f"images-{part}" for part in ("25", "5")}).items()
             for steps in LENGTHS]
    rows += [[f"source with {llm} (loss on validation images)", f"{study.SOURCE_STEPS:,}", *scores(results, f"source-{llm}")] for llm in SOURCES]
    return table(["run", "steps", *HEAD], rows)


def difference(results, name, other):
    """Of the final losses, seed by seed, where both have run."""
    pairs = [(f"{name}-s{seed}", f"{other}-s{seed}") for seed in SEEDS]
    return [results.final(one) - results.final(two) for one, two in pairs if one in results.rows and two in results.rows]


def change_rows(results, names, other="transfer-300"):
    losses = lambda run: {step: loss for step, loss, *_ in results.curve(run)}
    at = lambda name, steps: spread([losses(run)[steps] for run in results.seeds(name) if steps in losses(run)])
    rows = [[label, at(name, 0), at(name, 60), at(name, 120), *scores(results, name)[:2],
             spread(difference(results, name, other)) if name != other else ""] for name, label in names.items()]
    return table(["run", "loss at step 0", "60", "120", "300", "coloured shapes right", "300, difference to VPGTrans"], rows)


def variant_table(results):
    names = {"transfer-300": "VPGTrans", "variant-no-warm-up": "no warm-up", "variant-random-projector": "no converter: random projector",
             "variant-inheritance": "neither: VPG inheritance",
             "variant-rate-x1": f"warm-up at the rate of fine-tuning, {TRANSFER_RATES['transfer'][1]}",
             "variant-rate-x5": "warm-up at 5 times that rate, as in the paper",
             "variant-projector-only": "the projector alone, all 300 steps", "scratch-stage1-300": "from scratch, Q-Former after the first stage",
             "scratch-random-300": "from scratch, random Q-Former"}
    return change_rows(results, names)


def converter_table(results):
    names = {"transfer-300": "least squares, weighted by use (VPGTrans here)", "converter-unweighted": "least squares, each token once",
             "converter-ridge": "weighted, a ridge of 0.1 instead of 0.001", "converter-cosine": "cosine distance by SGD (the original)",
             "captions-300": "soft prompts read as words of their caption (`--init captions`)",
             "variant-random-projector": "none"}
    return change_rows(results, names)


def size_table(results):
    return change_rows(results, {f"size-{llm}" if llm != "opt-128" else "transfer-300": f"source with {llm}" for llm in SOURCES})


def family_table(results):
    rows = []
    for family, pairs in FAMILIES.items():
        for source, tgt in pairs:
            name = f"family-{source}-{tgt}"
            scratch = f"scratch-{tgt}-300"
            rows.append([f"{source} → {tgt}", scores(results, scratch)[0], *scores(results, name)[:2], spread(difference(results, name, scratch)),
                         speed_up(results, [name], scratch, 300)])
    return table(["transfer", "from scratch, 300 steps", "VPGTrans, 300", "coloured shapes right", "difference", "passes from scratch after"], rows)


def steps_to_pass(results, name, scratch):
    """Optimizer steps, one a seed, after which the runs called `name` pass the mean final loss of `scratch`; None where one does not."""
    if not results.seeds(name) or not results.seeds(scratch):
        return None
    goal = statistics.mean(results.finals(scratch))
    passed = [results.first_below(run, goal) for run in results.seeds(name)]
    return None if None in passed else [steps for steps, _ in passed]


def speed_up(results, names, scratch, budget):
    """The fewest steps in which runs of one of `names`, schedules of different lengths, pass `scratch`, and how many times fewer that is."""
    if not results.seeds(scratch) or not any(results.seeds(name) for name in names):
        return "–"
    passed = [steps for name in names if (steps := steps_to_pass(results, name, scratch))]
    fewest = min(passed, key=statistics.mean, default=None)
    if fewest is None:
        return "not reached" + few(min(filter(None, map(results.seeds, names)), key=len))
    return f"{spread(fewest, 0)} steps, {budget / statistics.mean(fewest):.1f} ×" + few(fewest)


def speed_table(results):
    """In how many steps VPGTrans passes what training from scratch ends at: of its schedules, of different lengths, the first."""
    rows = [[STARTED[start], f"{budget:,}", spread(results.finals(f"scratch-{start}-{budget}")),
             *(speed_up(results, [f"{name}-{steps}" for steps in LENGTHS], f"scratch-{start}-{budget}", budget) for name in TRANSFERS.values())]
            for start in STARTS for budget in BUDGETS]
    return table(["from scratch", "steps", "test loss", *TRANSFERS], rows)


TABLES = {"sweep": sweep_table, "transfer-sweep": transfer_sweep_table, "main": main_table, "speed": speed_table, "variants": variant_table,
          "converters": converter_table, "sizes": size_table, "families": family_table}


# -------------------------------------------------------------------------------------------------------------- pictures


def band(axes, results, name, label, colour, first=0, **style):
    """The mean test loss of a run's seeds over optimizer steps, from `first` on, and the range of the seeds."""
    curves = [[point for point in results.curve(run) if point[0] >= first] for run in results.seeds(name)]
    if curves:
        steps = [point[0] for point in curves[0]]
        losses = list(zip(*([point[1] for point in curve] for curve in curves)))
        axes.plot(steps, [statistics.mean(at) for at in losses], color=colour, label=label, **style)
        axes.fill_between(steps, [min(at) for at in losses], [max(at) for at in losses], color=colour, alpha=0.15, linewidth=0)


def new_axes():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="tight")
    axes = figure.subplots()
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="test loss a token")
    return figure, axes


def draw_speed(results, file):
    """From scratch, each budget with its own schedule, and VPGTrans."""
    figure, axes = new_axes()
    for (start, name), colour in zip(STARTED.items(), ("0.6", "C0")):
        for budget in BUDGETS:
            band(axes, results, f"scratch-{start}-{budget}", f"from scratch, {name}" if budget == BUDGETS[0] else None, colour, first=1, linewidth=1)
    for (label, name), style in zip(TRANSFERS.items(), (("C3", "-"), ("C3", "--"), ("C2", "-"), ("C2", "--"))):
        for steps in LENGTHS:
            band(axes, results, f"{name}-{steps}", label.replace("`", "") if steps == LENGTHS[0] else None, style[0], first=1, linestyle=style[1])
    axes.set(xscale="log", xlim=(10, 3500), ylim=(0.85, 1.6))
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
    for who, name in (("the source", "source-opt-128-s0"), ("VPGTrans, 300 steps", "transfer-300-s0"),
                      ("from scratch, first stage, 300", "scratch-stage1-300-s0"), ("from scratch, random, 300", "scratch-random-300-s0")):
        if name in results.records:
            said[who] = results.records[name]["captions"][:count]
    demo.draw(file, images, said)
    for image in images:
        image.unlink()
    folder.rmdir()


PICTURES = {"speed": draw_speed, "variants": draw_variants, "captions": draw_captions}


def fill(text, results):
    """The document with its tables made anew: what stands between <!-- table NAME --> and <!-- end -->."""
    made = lambda match: f"<!-- table {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"
    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", made, text, flags=re.S)


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
