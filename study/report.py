"""Tables and pictures of docs/miniature.md, from what study.py recorded.

    python miniature/report.py                                                    # docs/miniature.md and -*.png from miniature/results
    python miniature/report.py --results out/study/results --out out/study       # the same of runs of one's own

A loss is the cross-entropy a token of the test images' captions (of the validation images', in sweeps and for sources). Means are over seeds, ± is
their standard deviation (n - 1).
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
from make import SEEDS as WORLD_SEEDS
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
        """[(optimizer steps, warm-up counted; loss)] of one run"""
        points, before = [], 0
        for stage in dict.fromkeys(row["stage"] for row in self.rows[name]):
            rows = [row for row in self.rows[name] if row["stage"] == stage and "val_loss" in row]
            points += [(before + row["step"], row["val_loss"]) for row in rows]
            before += rows[-1]["step"]
        return points

    def final(self, name):
        return self.curve(name)[-1][1]

    def finals(self, name):
        return [self.final(run) for run in self.seeds(name)]

    def first_below(self, name, loss):
        """Optimizer steps after which a run first has at most this loss, or None"""
        return next((steps for steps, matched in self.curve(name) if matched <= loss), None)


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
            rows.append([STARTED[start], f"{steps:,}", *(best_bold(losses, rate) for rate in RATES)])
    return table(["from scratch", "steps", *RATES], rows)


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
TRANSFERS = {"VPGTrans": "transfer", "VPGTrans, 10.7 % of the images": "images-10.7", "`--init captions`": "captions"}
HALF = {"VPGTrans": "half", "VPGTrans, 10.7 % of the images": "half-10.7", "`--init captions`": "half-captions"}
STARTED = {"random": "random Q-Former", "stage1": "pre-trained Q-Former", "half": "half the ViT, random Q-Former"}
BATCH = 32
HEAD = ["test loss", "coloured shapes right", "found", "words right"]


def main_table(results):
    """From scratch and VPGTrans, by optimizer steps."""
    rows = [[f"from scratch, {name}", f"{steps:,}", *scores(results, f"scratch-{start}-{steps}")]
            for start, name in STARTED.items() for steps in BUDGETS]
    rows += [[label, f"{steps:,}", *scores(results, f"{name}-{steps}")]
             for label, name in (TRANSFERS | {f"VPGTrans, {part} % of the images": f"images-{part}" for part in ("25", "5")}
                                 | {f"{label}, half the ViT": name for label, name in HALF.items()}).items()
             for steps in LENGTHS]
    rows += [[f"source with {llm} (loss on validation images)", f"{study.SOURCE_STEPS:,}", *scores(results, f"source-{name}")]
             for name, llm in ({llm: llm for llm in SOURCES} | {"half": "opt-128, half the ViT"}).items()]
    return table(["run", "steps", *HEAD], rows)


def difference(results, name, other):
    """Of the final losses, seed by seed, where both have run."""
    pairs = [(f"{name}-s{seed}", f"{other}-s{seed}") for seed in SEEDS]
    return [results.final(one) - results.final(two) for one, two in pairs if one in results.rows and two in results.rows]


def change_rows(results, names, other="transfer-300"):
    losses = lambda run: dict(results.curve(run))
    at = lambda name, steps: spread([losses(run)[steps] for run in results.seeds(name) if steps in losses(run)])
    rows = [[label, at(name, 0), at(name, 60), at(name, 120), *scores(results, name)[:2],
             spread(difference(results, name, other)) if name != other else ""] for name, label in names.items()]
    return table(["run", "loss at step 0", "60", "120", "300", "coloured shapes right", "300, difference to VPGTrans"], rows)


def variant_table(results):
    names = {"transfer-300": "VPGTrans", "variant-no-warm-up": "no warm-up", "variant-random-projector": "no converter: random projector",
             "variant-inheritance": "neither: VPG inheritance",
             "variant-rate-x1": f"warm-up at the rate of fine-tuning, {TRANSFER_RATES['transfer'][1]}",
             "variant-rate-x5": "warm-up at 5 times that rate, as in the paper",
             "variant-projector-only": "the projector alone, all 300 steps", "scratch-stage1-300": "from scratch, pre-trained Q-Former",
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
    for source, tgt in FAMILIES:
        names = f"scratch-{tgt}-300", f"family-{source}-{tgt}", f"family-captions-{source}-{tgt}"
        losses, right, *_ = zip(*(scores(results, name) for name in names))
        rows.append([f"{source} → {tgt}", *losses, *right])
    return table(["300 steps", "test loss from scratch", "VPGTrans", "`--init captions`", "coloured shapes right from scratch", "VPGTrans", "`--init captions`"], rows)


def steps_to_pass(results, name, scratch):
    """{run: optimizer steps after which it passes the mean final loss of `scratch`} of the runs called `name`; None where one does not."""
    goal = statistics.mean(results.finals(scratch))
    passed = {run: results.first_below(run, goal) for run in results.seeds(name)}
    return passed if passed and None not in passed.values() else None


def fewest_steps(results, names, scratch):
    """Of runs called one of `names`, schedules of different lengths, those that pass `scratch` first: {run: steps}, or None."""
    passed = [steps for name in names if (steps := steps_to_pass(results, name, scratch))]
    return min(passed, key=lambda steps: statistics.mean(steps.values()), default=None)


def step_seconds(results):
    """{stage: seconds of a step}, medians of the runs that had the machine for themselves"""
    rows = [row for name in ("time-scratch-s0", "time-transfer-s0") for row in results.rows.get(name, []) if "samples_per_second" in row]
    return {stage: statistics.median(BATCH / row["samples_per_second"] for row in rows if row["stage"] == stage) for stage in {row["stage"] for row in rows}}


def fit_of(results, run):
    """(images, seconds) that --init captions took to fit the projector; zeros where it did not"""
    found = re.search(r"captions of ([\d,]+) images \((.*?) s\)", "\n".join(results.records[run]["said"]))
    return (int(found[1].replace(",", "")), float(found[2])) if found else (0, 0.0)


def seconds_of(results, run, steps, seconds):
    """Of the first steps of a transfer, with the fit of its projector."""
    warm_up = min(steps, max(row["step"] for row in results.rows[run] if row["stage"] == "warm-up"))
    return seconds["warm-up"] * warm_up + seconds["fine-tune"] * (steps - warm_up) + fit_of(results, run)[1]


def speed_up(results, names, scratch, budget):
    """Steps in which runs called one of `names` pass `scratch`, and how many times fewer steps, samples and seconds that is."""
    passed = fewest_steps(results, names, scratch)
    if passed is None:
        return ["not reached" + few(min(filter(None, map(results.seeds, names)), key=len)), "", "", ""]
    times = lambda whole, parts: f"{whole / statistics.mean(parts):.1f} ×" if any(parts) else "∞"  # passed before the first step
    row = [spread(list(passed.values()), 0) + few(passed), times(budget, passed.values()),
           times(BATCH * budget, [BATCH * steps + fit_of(results, run)[0] for run, steps in passed.items()])]
    if not (seconds := step_seconds(results)):
        return [*row, "–"]
    return [*row, times(seconds["from-scratch"] * budget, [seconds_of(results, run, steps, seconds) for run, steps in passed.items()])]


def speed_table(results):
    """In how many steps VPGTrans passes what training from scratch ends at: of its schedules, of different lengths, the first."""
    rows = [[f"{STARTED[start]}, {budget:,} steps: {scores(results, f'scratch-{start}-{budget}')[0]}", label,
             *speed_up(results, names, f"scratch-{start}-{budget}", budget)]
            for start in STARTS for budget in BUDGETS if results.seeds(f"scratch-{start}-{budget}")
            for label, name in (HALF if start == "half" else TRANSFERS).items()
            if any(map(results.seeds, names := [f"{name}-{steps}" for steps in LENGTHS]))]
    return table(["from scratch", "passed by", "after steps", "fewer steps", "fewer samples", "less time"], rows)


def progress(results):
    """How many of the plan's runs are recorded, and which are not."""
    plan = study.plan()
    missing = dict.fromkeys(re.sub(r"-s\d$", "", name) for name in plan if name not in results.records)
    hours = sum(rows[-1]["seconds"] for rows in results.rows.values()) / 3600
    text = f"{len(results.records)} of {len(plan)} runs are recorded, {hours:.1f} hours of training on one core, validation and captions not counted."
    return text + (f" Not yet, or not with all seeds: {', '.join(f'`{name}`' for name in missing)}." if missing else "")


TABLES = {"progress": progress, "sweep": sweep_table, "transfer-sweep": transfer_sweep_table, "main": main_table, "speed": speed_table, "variants": variant_table,
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


def draw_speed(results, file):
    """From scratch, each budget with its own schedule, and transfers; with the whole ViT, and with half of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="tight")
    looks = (("C3", "-"), ("C3", "--"), ("C2", "-"))
    for axes, title, starts, transfers in zip(figure.subplots(1, 2, sharey=True), ("the whole ViT", "half the ViT: seeing is hard to learn"),
                                              (("random", "stage1"), ("half",)), (TRANSFERS, HALF)):
        for start, colour in zip(starts, ("0.6", "C0")):
            for budget in BUDGETS:
                name = "random Q-Former" if start == "half" else STARTED[start]
                band(axes, results, f"scratch-{start}-{budget}", f"from scratch, {name}" if budget == BUDGETS[0] else None, colour, first=1, linewidth=1)
        for (label, name), (colour, line) in zip(transfers.items(), looks):
            for steps in LENGTHS:
                band(axes, results, f"{name}-{steps}", label.replace("`", "") if steps == LENGTHS[0] else None, colour, first=1, linestyle=line)
        axes.set(title=title, xlabel="optimizer step, warm-up counted", xscale="log", xlim=(10, 3500), ylim=(0.85, 1.8))
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("test loss a token")
    figure.savefig(file, dpi=110)


def draw_variants(results, file):
    """What each part of VPGTrans contributes, in the first 300 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="tight")
    axes = figure.subplots()
    for i, (name, label) in enumerate({"transfer-300": "VPGTrans", "variant-random-projector": "random projector, warmed up",
                                       "variant-no-warm-up": "word converter, no warm-up", "variant-inheritance": "VPG inheritance (neither)",
                                       "variant-projector-only": "projector alone", "scratch-stage1-300": "from scratch, pre-trained",
                                       "scratch-random-300": "from scratch, random"}.items()):
        band(axes, results, name, label, f"C{i}", linewidth=2.5 if i == 0 else 1.3)
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="test loss a token", xlim=(0, 300), ylim=(0.85, 2.2))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def draw_captions(results, file, count=12):
    """The first test images with what the source, VPGTrans and training from scratch say, after equal steps."""
    import random

    from PIL import Image

    rng, images, people = random.Random(WORLD_SEEDS["test"]), [], []
    folder = file.parent / "miniature-images"
    folder.mkdir(exist_ok=True)
    for number in range(count):
        scene = scenes.random_scene(rng)
        images.append(folder / f"{number:05d}.png")
        Image.fromarray(scenes.render(scene)[0]).save(images[-1])
        people.append(scenes.caption(scene, rng))
    said = {"people": people}
    for who, name in (("the source", "source-opt-128-s0"), ("VPGTrans, 300 steps", "transfer-300-s0"),
                      ("from scratch, pre-trained, 300", "scratch-stage1-300-s0"), ("from scratch, random, 300", "scratch-random-300-s0")):
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
