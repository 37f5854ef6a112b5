"""The paper's speed-up rate: how much sooner a run is where another one is at its best.

    python -m study.speedup out/demo out/demo-from-scratch         # a transfer, and what it is compared with

Table 3 of the paper divides the epochs in which training from scratch reaches its best CIDEr by those in
which the transfer reaches the same. Here it is steps, samples and seconds, by each score that both runs took
along the way (train.py --score coco=...), or by the validation loss where they took none.
"""

import argparse
import json
from pathlib import Path

import transfer
from study.records import LOSS, curves


def read_run(folder):
    """-> (rows of a run's metrics, what its config.json says). SystemExit names what is missing."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise SystemExit(f"{folder}: no folder of a run ({error})") from None
    return [json.loads(line) for line in lines], config


def first_at(points, goal, name):
    """Where a curve first is as good as a goal, or None; a loss is good where it is low."""
    def good(value):
        return value <= goal if name == LOSS else value >= goal

    return next((point for point in points if good(point[-1])), None)


def best(points, name):
    """Where a curve is at its best for the first time."""
    pick = min if name == LOSS else max
    return pick(points, key=lambda point: point[-1])


def times(whole, part):
    """How many times less a part is than the whole."""
    return f"{whole / part:.1f} ×" if part else "∞"


def compare(run, baseline):
    """The curves of two runs -> lines, for each score that both have, or for the loss."""
    names = [name for name in run if name in baseline and name != LOSS] or [LOSS]
    for name in names:
        *whole, goal = best(baseline[name], name)
        yield f"by {name}: the baseline is at its best, {goal:.4g}, after"
        passed = first_at(run[name], goal, name)
        if passed is None:
            *_, nearest = best(run[name], name)
            yield f"  {whole[0]:,} steps; the run does not get there, {nearest:.4g} is its best"
            continue
        for what, there, here in zip(("steps", "samples", "seconds"), whole, passed):
            yield f"  {there:10,.0f} {what:8} and the run is there after {here:8,.0f}: {times(there, here)}"


def search(config):
    """A line about what --init auto took before the first step, which is not among the run's steps."""
    start = config.get("start")
    if start and "seconds" in start:
        samples = len(start["tried"]) * transfer.TRIAL_STEPS * transfer.TRIAL_BATCH
        yield (f"not counted: before the first step --init auto tried {len(start['tried'])} starts and "
               f"rates, by {samples:,} samples in {start['seconds']:.0f} s")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, such as a transfer")
    parser.add_argument("baseline", type=Path, help="folder of the run that it is compared with")
    args = parser.parse_args(argv)
    rows, config = read_run(args.run)
    others, _ = read_run(args.baseline)
    lines = [*compare(curves(rows), curves(others)), *search(config)]
    print(f"{args.run}, beside {args.baseline}:", *lines, sep="\n")


if __name__ == "__main__":
    main()
