"""The pictures of docs/miniature.md and docs/smollm2.md, from what was recorded."""

import random
import statistics

from matplotlib.figure import Figure
from PIL import Image

from study import captions, scenes
from study.experiments import BUDGETS, LENGTHS, SMOLLM2_RATES
from study.tables import HALF, STARTED, STARTED_SMOLLM2, TRANSFERS, best_of_sweep
from study.world import SEEDS as WORLD_SEEDS


def band(axes, results, name, label, colour, first=0, **style):
    """The mean test loss of a run's seeds over optimizer steps, and the range of the seeds.

    Steps before `first` are left out."""
    curves = []
    for run in results.seeds(name):
        curves.append([(step, loss) for step, loss in results.curve(run) if step >= first])
    if curves:
        steps = [step for step, _ in curves[0]]
        losses = list(zip(*([loss for _, loss in curve] for curve in curves)))  # (steps, seeds)
        means = list(map(statistics.mean, losses))
        axes.plot(steps, means, color=colour, label=label, **style)
        axes.fill_between(
            steps, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.15, linewidth=0)


def draw_speed_of(axes, results, starts, transfers):
    """From scratch, each budget with its own schedule, and transfers."""
    for start, colour in zip(starts, ("0.6", "C0")):
        label = "from scratch, random Q-Former" if start == "half" else f"from scratch, {STARTED[start]}"
        for budget in BUDGETS:
            first = budget == BUDGETS[0]
            name = f"scratch-{start}-{budget}"
            band(axes, results, name, label if first else None, colour, first=1, linewidth=1)
    looks = (("C3", "-"), ("C3", "--"), ("C2", "-"))
    for (label, name), (colour, line) in zip(transfers.items(), looks):
        for steps in LENGTHS:
            plain = label.replace("`", "") if steps == LENGTHS[0] else None
            band(axes, results, f"{name}-{steps}", plain, colour, first=1, linestyle=line)


def draw_speed(results, file):
    """From scratch and transfers; with the whole ViT, and with half of it."""
    figure = Figure(figsize=(13, 5), layout="tight")
    whole, half = figure.subplots(1, 2, sharey=True)
    draw_speed_of(whole, results, ("random", "stage1"), TRANSFERS)
    draw_speed_of(half, results, ("half",), HALF)
    whole.set_title("the whole ViT")
    half.set_title("half the ViT: seeing is hard to learn")
    for axes in (whole, half):
        axes.set(xlabel="optimizer step, warm-up counted", xscale="log", xlim=(10, 3500), ylim=(0.85, 1.8))
        axes.legend(frameon=False)
    whole.set_ylabel("test loss a token")
    figure.savefig(file, dpi=110)


def draw_variants(results, file):
    """What each part of VPGTrans contributes, in the first 300 steps."""
    names = {
        "transfer-300": "VPGTrans",
        "variant-random-projector": "random projector, warmed up",
        "variant-no-warm-up": "word converter, no warm-up",
        "variant-inheritance": "VPG inheritance (neither)",
        "variant-projector-only": "projector alone",
        "scratch-stage1-300": "from scratch, pre-trained",
        "scratch-random-300": "from scratch, random"}
    figure = Figure(figsize=(9, 4.8), layout="tight")
    axes = figure.subplots()
    for i, (name, label) in enumerate(names.items()):
        width = 2.5 if name == "transfer-300" else 1.3
        band(axes, results, name, label, f"C{i}", linewidth=width)
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="test loss a token")
    axes.set(xlim=(0, 300), ylim=(0.85, 2.2))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def draw_captions(results, file, count=12):
    """The first test images with what people and models say, the models after equal steps."""
    rng = random.Random(WORLD_SEEDS["test"])
    images = []
    people = []
    for _ in range(count):
        scene = scenes.random_scene(rng)
        images.append(Image.fromarray(scenes.render(scene)[0]))
        people.append(scenes.caption(scene, rng))
    models = {
        "the source": "source-opt-128-s0",
        "VPGTrans, 300 steps": "transfer-300-s0",
        "from scratch, pre-trained, 300": "scratch-stage1-300-s0",
        "from scratch, random, 300": "scratch-random-300-s0"}
    said = {"people": people}
    for who, name in models.items():
        if name in results.records:
            said[who] = results.records[name]["captions"][:count]
    captions.draw(file, images, said)


def draw_smollm2(results, file):
    """To SmolLM2: of each start the run of 300 steps whose rates ended lowest on validation images."""
    figure = Figure(figsize=(9, 4.8), layout="tight")
    axes = figure.subplots()
    for i, (start, pairs) in enumerate(SMOLLM2_RATES.items()):
        best = best_of_sweep(results, "smollm2-sweep", start, pairs)
        if best:
            label = STARTED_SMOLLM2[start].replace("`", "")
            axes.plot(*zip(*results.curve(best)), "o-", color=f"C{i}", markersize=3, label=label)
    axes.set(xlabel="optimizer step, warm-up counted", ylabel="validation loss a token")
    axes.set(xlim=(0, 300), ylim=(1.2, 4.5))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


PICTURES = {
    "miniature-speed": draw_speed,
    "miniature-variants": draw_variants,
    "miniature-captions": draw_captions,
    "smollm2": draw_smollm2}
