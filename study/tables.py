"""The tables of docs/miniature.md and docs/smollm2.md: functions of what was recorded, each of which
gives Markdown.

A loss is the cross-entropy a token of the test images' captions (of the validation images', in sweeps
and for sources). Means are over seeds, ± is their standard deviation (n - 1).
"""

import re
import statistics

from study.experiments import (
    BUDGETS,
    FAMILIES,
    FINE_TUNE_RATES,
    LENGTHS,
    LONG,
    RATES,
    SEEDS,
    SMALL_RATES,
    SMALL_TARGETS,
    SMOLLM2_LONG_RATES,
    SMOLLM2_RATES,
    SOURCE_STEPS,
    SOURCES,
    STARTS,
    SWEPT,
    TRANSFER_RATES,
    WARM_UP_RATES,
    all_runs,
    small_runs,
    smollm2_reported,
    smollm2_runs,
    sweep_name,
)

BATCH = 32
STARTED = {
    "random": "random Q-Former",
    "stage1": "pre-trained Q-Former",
    "half": "half the ViT, random Q-Former"}
INITS = {"transfer": "word converter", "captions": "`--init captions`"}
TRANSFERS = {  # {label: beginning of the runs' names}
    "VPGTrans": "transfer",
    "VPGTrans, 10.7 % of the images": "images-10.7",
    "`--init captions`": "captions"}
HALF = {
    "VPGTrans": "half",
    "VPGTrans, 10.7 % of the images": "half-10.7",
    "`--init captions`": "half-captions"}
SCORES = ["test loss", "coloured shapes right", "found", "words right"]

# ------------------------------------------------------------------------------------- formatting


def spread(values, digits=3):
    """mean ± standard deviation"""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def share(values):
    """The same of shares, in percent."""
    return spread([100 * value for value in values], 1) + " %" if values else "–"


def few(seeds):
    """A remark on figures that do not rest on all seeds yet."""
    return f" ({len(seeds)} of {len(SEEDS)} seeds)" if 0 < len(seeds) < len(SEEDS) else ""


def best_bold(losses, rate):
    """One of {rate: loss}."""
    if rate not in losses:
        return "–"
    return f"**{losses[rate]:.3f}**" if losses[rate] == min(losses.values()) else f"{losses[rate]:.3f}"


def table(head, rows):
    """In Markdown, without the rows of which nothing was run yet.

    These have nothing but "–" behind the two cells that say which run it is."""
    rows = [row for row in rows if any(cell not in ("–", "") for cell in row[2:])]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ----------------------------------------------------------------------------- what has been done


def count_made(results, every):
    """How many of a study's experiments are recorded, in words."""
    made = [name for name in every if name in results.records]
    hours = sum(results.rows[name][-1]["seconds"] for name in made if name in results.rows) / 3600
    return (f"{len(made)} of {len(every)} runs are recorded, {hours:.1f} hours of training on one core, "
            "validation and captions not counted.")


def progress(results):
    """How many of the first study's experiments are recorded, and which are not."""
    every = all_runs()
    text = count_made(results, every)
    names = [re.sub(r"-s\d$", "", name) for name in every if name not in results.records]
    if names:
        missing = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
        text += f" Not yet, or not with all seeds: {missing}."
    return text


def sweep_table(results):
    """The baseline's rates, on validation images."""
    rows = []
    for start in STARTS:
        for steps in SWEPT:
            names = {rate: f"sweep-scratch-{start}-{steps}-{rate}" for rate in RATES}
            losses = results.losses(names)
            rows.append([STARTED[start], f"{steps:,}", *(best_bold(losses, rate) for rate in RATES)])
    return table(["from scratch", "steps", *RATES], rows)


def transfer_sweep_table(results):
    """VPGTrans's rates, on validation images: after 60 steps of warm-up and 240 of fine-tuning."""
    rows = []
    for init, warm_ups in WARM_UP_RATES.items():
        pairs = [(warm, rate) for warm in warm_ups for rate in FINE_TUNE_RATES]
        losses = results.losses({pair: f"sweep-{init}-{'-'.join(pair)}-s0" for pair in pairs})
        for warm in warm_ups:
            cells = [best_bold(losses, (warm, rate)) for rate in FINE_TUNE_RATES]
            rows.append([INITS[init], warm, *cells])
    return table(["projector", "warm-up", *(f"fine-tuning {rate}" for rate in FINE_TUNE_RATES)], rows)


# --------------------------------------------------------------------------------- losses, shares


def scores(results, name):
    """The cells of SCORES, of all seeds; with their number, where some are missing."""
    records = [results.records[run] for run in results.seeds(name)]
    loss = spread(results.finals(name)) + few(records)
    return [loss, *(share([record[key] for record in records]) for key in ("right", "found", "words_right"))]


def main_table(results):
    """From scratch and VPGTrans, by optimizer steps."""
    rows = []
    for start, label in STARTED.items():
        for steps in BUDGETS:
            of_runs = scores(results, f"scratch-{start}-{steps}")
            rows.append([f"from scratch, {label}", f"{steps:,}", *of_runs])
    transfers = dict(TRANSFERS)
    transfers |= {f"VPGTrans, {part} % of the images": f"images-{part}" for part in ("25", "5")}
    transfers |= {f"{label}, half the ViT": name for label, name in HALF.items()}
    for label, name in transfers.items():
        for steps in LENGTHS:
            rows.append([label, f"{steps:,}", *scores(results, f"{name}-{steps}")])
    sources = {llm: llm for llm in SOURCES} | {"half": "opt-128, half the ViT"}
    for name, llm in sources.items():
        label = f"source with {llm} (loss on validation images)"
        rows.append([label, f"{SOURCE_STEPS:,}", *scores(results, f"source-{name}")])
    return table(["run", "steps", *SCORES], rows)


def difference(results, name, other):
    """Of the final losses, seed by seed, where both have run."""
    pairs = [(f"{name}-s{seed}", f"{other}-s{seed}") for seed in SEEDS]
    both = [pair for pair in pairs if set(pair) <= results.rows.keys()]
    return [results.final(one) - results.final(two) for one, two in both]


def change_table(results, names):
    """Of runs in 300 steps, {name: label}: losses on the way, and the difference to VPGTrans."""
    head = ["run", "loss at step 0", "60", "120", "300", "coloured shapes right",
            "300, difference to VPGTrans"]
    rows = []
    for name, label in names.items():
        curves = [dict(results.curve(run)) for run in results.seeds(name)]
        on_the_way = [spread([curve[step] for curve in curves if step in curve]) for step in (0, 60, 120)]
        loss, right, *_ = scores(results, name)
        change = spread(difference(results, name, "transfer-300")) if name != "transfer-300" else ""
        rows.append([label, *on_the_way, loss, right, change])
    return table(head, rows)


def variant_table(results):
    """VPGTrans with one thing changed."""
    return change_table(results, {
        "transfer-300": "VPGTrans",
        "variant-no-warm-up": "no warm-up",
        "variant-random-projector": "no converter: random projector",
        "variant-inheritance": "neither: VPG inheritance",
        "variant-rate-x1": f"warm-up at the rate of fine-tuning, {TRANSFER_RATES['transfer'][1]}",
        "variant-rate-x5": "warm-up at 5 times that rate, as in the paper",
        "variant-projector-only": "the projector alone, all 300 steps",
        "scratch-stage1-300": "from scratch, pre-trained Q-Former",
        "scratch-random-300": "from scratch, random Q-Former"})


def converter_table(results):
    """Other starts of the projector."""
    return change_table(results, {
        "transfer-300": "least squares, weighted by use (VPGTrans here)",
        "converter-unweighted": "least squares, each token once",
        "converter-ridge": "weighted, a ridge of 0.1 instead of 0.001",
        "converter-cosine": "cosine distance by SGD (the original)",
        "captions-300": "soft prompts read as words of their caption (`--init captions`)",
        "variant-random-projector": "none"})


def size_table(results):
    """Sources of other sizes."""
    names = {f"size-{llm}" if llm != "opt-128" else "transfer-300": llm for llm in SOURCES}
    return change_table(results, {name: f"source with {llm}" for name, llm in names.items()})


def family_table(results):
    """Targets of other families."""
    ways = ["VPGTrans", "`--init captions`"]
    rows = []
    for source, tgt in FAMILIES:
        names = f"scratch-{tgt}-300", f"family-{source}-{tgt}", f"family-captions-{source}-{tgt}"
        losses, right, *_ = zip(*(scores(results, name) for name in names))
        rows.append([f"{source} → {tgt}", *losses, *right])
    head = ["300 steps", "test loss from scratch", *ways, "coloured shapes right from scratch", *ways]
    return table(head, rows)


# -------------------------------------------------------------------------------------- speed-ups


def steps_to_pass(results, name, goal):
    """Of the runs called `name`, how many steps it takes to a loss of `goal`.

    -> {run: optimizer steps}, or None where one does not"""
    passed = {run: results.first_below(run, goal) for run in results.seeds(name)}
    return passed if passed and None not in passed.values() else None


def fewest_steps(results, names, scratch):
    """Of runs called one of `names`, schedules of different lengths, those that pass `scratch` first.

    -> {run: optimizer steps}, or None"""
    goal = statistics.mean(results.finals(scratch))
    passed = [steps for name in names if (steps := steps_to_pass(results, name, goal))]
    return min(passed, key=lambda steps: statistics.mean(steps.values()), default=None)


def step_seconds(results):
    """{stage: seconds of a step}, medians of the runs that had the machine for themselves"""
    seconds = {}
    for name in ("time-scratch-s0", "time-transfer-s0"):
        for row in results.rows.get(name, []):
            if "samples_per_second" in row:
                seconds.setdefault(row["stage"], []).append(BATCH / row["samples_per_second"])
    return {stage: statistics.median(of_steps) for stage, of_steps in seconds.items()}


def fit_of(results, run):
    """(images, seconds) that --init captions took to fit the projector; zeros where it did not"""
    said = "\n".join(results.records[run]["said"])
    found = re.search(r"captions of ([\d,]+) images \((.*?) s\)", said)
    return (int(found[1].replace(",", "")), float(found[2])) if found else (0, 0.0)


def seconds_of(results, run, steps, seconds):
    """Of the first steps of a transfer, with the fit of its projector."""
    warm_up = max(row["step"] for row in results.rows[run] if row["stage"] == "warm-up")
    warm_up = min(steps, warm_up)
    _, fit = fit_of(results, run)
    return seconds["warm-up"] * warm_up + seconds["fine-tune"] * (steps - warm_up) + fit


def times(whole, parts):
    """How many times less the parts are than the whole, in the mean."""
    # A transfer may pass before its first step.
    return f"{whole / statistics.mean(parts):.1f} ×" if any(parts) else "∞"


def speed_up(results, names, scratch, budget):
    """Steps in which runs called one of `names` pass `scratch`, which takes `budget` steps.

    -> four cells: these steps; and how many times fewer steps, samples and seconds that is"""
    passed = fewest_steps(results, names, scratch)
    if passed is None:
        seeds = min(filter(None, map(results.seeds, names)), key=len)
        return ["not reached" + few(seeds), "", "", ""]
    steps = list(passed.values())
    samples = [BATCH * count + fit_of(results, run)[0] for run, count in passed.items()]
    row = [spread(steps, 0) + few(passed), times(budget, steps), times(BATCH * budget, samples)]
    seconds = step_seconds(results)
    if not seconds:
        return [*row, "–"]
    taken = [seconds_of(results, run, count, seconds) for run, count in passed.items()]
    return [*row, times(seconds["from-scratch"] * budget, taken)]


def speed_table(results):
    """In how many steps VPGTrans passes what training from scratch ends at.

    Of its schedules, of different lengths, the first to do so counts."""
    rows = []
    for start in STARTS:
        for budget in BUDGETS:
            scratch = f"scratch-{start}-{budget}"
            if not results.seeds(scratch):
                continue
            label = f"{STARTED[start]}, {budget:,} steps: {scores(results, scratch)[0]}"
            for way, name in (HALF if start == "half" else TRANSFERS).items():
                names = [f"{name}-{steps}" for steps in LENGTHS]
                if any(map(results.seeds, names)):
                    rows.append([label, way, *speed_up(results, names, scratch, budget)])
    head = ["from scratch", "passed by", "after steps", "fewer steps", "fewer samples", "less time"]
    return table(head, rows)


# -------------------------------------------------------------------------- the second study

STARTED_SMOLLM2 = {
    "scratch": "from scratch, random Q-Former",
    "scratch-stage1": "from scratch, pre-trained Q-Former",
    "auto": "`--init auto`",
    "converter": "word converter, ridge 10",
    "captions": "`--init captions`",
    "random": "random projector",
    "cosine": "the original's word converter",
    "ridge-0.001": "word converter, ridge 0.001",
    "no-warm-up": "word converter, ridge 10, no warm-up",
    "captions-no-warm-up": "`--init captions`, no warm-up",
    "own-captions": "word converter, ridge 10, the source's captions",
    "captions-own-captions": "`--init captions`, the source's captions",
    "weak-captions": "`--init captions`, from the weak source",
    "weak-own-captions": "`--init captions`, from the weak source, on its captions",
    "converter-10.7": "word converter, ridge 10, 10.7% of the images",
    "scratch-10.7": "from scratch, random Q-Former, 10.7% of the images"}


def smollm2_progress(results):
    return count_made(results, smollm2_runs())


def at_steps(results, run, steps):
    """The cells of one run's losses after each of so many steps, "–" where none was taken."""
    curve = dict(results.curve(run))
    return [f"{curve[step]:.3f}" if step in curve else "–" for step in steps]


def last_shuffled(results, run):
    return [row["val_loss_shuffled"] for row in results.rows[run] if "val_loss_shuffled" in row][-1]


def best_of_sweep(results, prefix, start, pairs):
    """The name of the run of a start whose pair of rates ended lowest, or None."""
    names = [sweep_name(prefix, start, rates) for rates in pairs]
    losses = results.losses({name: name for name in names})
    return min(losses, key=losses.get, default=None)


def sweep_rows(results, prefix, rates, baselines):
    """Every start at every rate, seed 0: losses and captions of the validation images; and after how many
    steps a run is as low as the best of each baseline's runs ends."""
    best = [best_of_sweep(results, prefix, baseline, rates[baseline]) for baseline in baselines]
    for start, pairs in rates.items():
        for warm_up, rate in pairs:
            name = sweep_name(prefix, start, (warm_up, rate))
            if name not in results.rows:
                continue
            record = results.records[name]
            taken = record.get("start") or {}
            warm_up = f"{taken['lr']:g}, {taken['init']}" if taken else warm_up or "–"
            passed = []
            for run in best:
                steps = results.first_below(name, results.final(run)) if run else "–"
                passed.append("not in 300" if steps is None else steps)
            yield [
                STARTED_SMOLLM2[start], warm_up, rate, *at_steps(results, name, (0, 60, 120, 180, 300)),
                f"{last_shuffled(results, name):.3f}", share([record["right"]]), *passed]


SWEPT_COLUMNS = ["start", "warm-up rate", "then", "loss at step 0", "60", "120", "180", "300",
                 "300, shuffled images", "coloured shapes right", "steps to the best from a random Q-Former"]


def smollm2_sweep_table(results):
    baselines = "scratch", "scratch-stage1"
    rows = list(sweep_rows(results, "smollm2-sweep", SMOLLM2_RATES, baselines))
    return table([*SWEPT_COLUMNS, "from a pre-trained one"], rows)


def smollm2_long_table(results):
    """The baseline's rates in 1,000 steps, on validation images."""
    rows = []
    steps = range(0, LONG + 1, LONG // 5)
    for _, rate in SMOLLM2_LONG_RATES["scratch"]:
        name = sweep_name(f"smollm2-sweep-{LONG}", "scratch", ("", rate))
        if name in results.rows:
            shuffled = f"{last_shuffled(results, name):.3f}"
            right = share([results.records[name]["right"]])
            rows.append([rate, *at_steps(results, name, steps), shuffled, right])
    last = f"{LONG:,}, shuffled images"
    return table(["rate", *(f"{step:,}" for step in steps), last, "coloured shapes right"], rows)


def small_progress(results):
    return count_made(results, small_runs())


def small_sweep_table(results):
    """The third study's rates, target by target."""
    rows = []
    for tgt in SMALL_TARGETS:
        baselines = "scratch", "scratch-stage1"
        of_target = sweep_rows(results, f"small-sweep-{tgt}", SMALL_RATES[tgt], baselines)
        rows += [[tgt, *row] for row in of_target]
    return table(["target", *SWEPT_COLUMNS, "from a pre-trained one"], rows)


def small_table(results):
    """The third study's chosen rates on test images."""
    long = f"scratch-stage1-{LONG}"
    labels = STARTED_SMOLLM2 | {long: f"{STARTED_SMOLLM2['scratch-stage1']}, {LONG:,} steps"}
    rows = []
    for tgt in SMALL_TARGETS:
        baselines = [f"small-{tgt}-{start}" for start in ("scratch", "scratch-stage1", long)]
        for start in [*SMALL_RATES[tgt], long]:
            name = f"small-{tgt}-{start}"
            if not results.seeds(name):
                continue
            loss, right, found, _ = scores(results, name)
            row = [tgt, labels[start], loss, spread(results.lowest(name)), right, found]
            if start.startswith("scratch"):
                row += [""] * len(baselines)
            else:
                row += [passes(results, name, baseline) for baseline in baselines]
            rows.append(row)
    head = ["target", "start", "test loss", "its lowest", "coloured shapes right", "found",
            "steps to the best of 300 from a random Q-Former", "of 300 from a pre-trained one",
            f"of {LONG:,} from a pre-trained one"]
    return table(head, rows)


def picks_table(results):
    """What --init auto took, run by run, and of each start the loss after its trial, at its best rate."""
    rows = []
    for name, record in results.records.items():
        if record.get("start"):
            best = {}
            for row in record["start"]["tried"]:
                best[row["init"]] = min(row["loss"], best.get(row["init"], row["loss"]))
            tried = ", ".join(f"{init} {loss:.3f}" for init, loss in best.items())
            start = record["start"]
            taken = f"{start['init']}, {start['lr']:g}"
            rows.append([f"`{name}`", taken, tried, f"{start['seconds']:.0f} s"])
    return table(["run", "taken, and the warm-up's rate", "after the trials", "in"], rows)


def smollm2_table(results):
    """The chosen rates on test images; and after how many steps a transfer is below the best of runs from
    scratch."""
    scratch = ("scratch-300", "scratch-stage1-300", "scratch-1000", "scratch-stage1-1000")
    baselines = [f"smollm2-{name}" for name in scratch]
    rows = []
    for steps, start, _ in smollm2_reported():
        name = f"smollm2-{start}-{steps}"
        if not results.seeds(name):
            continue
        loss, right, found, _ = scores(results, name)
        row = [STARTED_SMOLLM2[start], f"{steps:,}", loss, spread(results.lowest(name)), right, found,
               ciders(results, name)]
        if start.startswith("scratch"):
            row += [""] * len(baselines)
        else:
            row += [passes(results, name, baseline) for baseline in baselines]
        rows.append(row)
    head = ["start", "steps", "test loss", "its lowest", "coloured shapes right", "found", "CIDEr",
            "steps to the best of 300 from a random Q-Former", "of 300 from a pre-trained one",
            "of 1,000 from a random one", "of 1,000 from a pre-trained one"]
    return table(head, rows)


def ciders(results, name):
    """Of the runs called so; those of before it was counted have none."""
    records = [results.records[run] for run in results.seeds(name)]
    counted = [record["cider"] for record in records if "cider" in record]
    return spread(counted, 1) + few(counted)


def passes(results, name, baseline):
    """Steps in which runs called so pass the best of a baseline: the mean of its seeds' lowest losses."""
    if not results.seeds(baseline):
        return "–"
    steps = steps_to_pass(results, name, statistics.mean(results.lowest(baseline)))
    return "not reached" if steps is None else spread(list(steps.values()), 0) + few(steps)


TABLES = {
    "progress": progress,
    "sweep": sweep_table,
    "transfer-sweep": transfer_sweep_table,
    "main": main_table,
    "speed": speed_table,
    "variants": variant_table,
    "converters": converter_table,
    "sizes": size_table,
    "families": family_table,
    "smollm2-progress": smollm2_progress,
    "smollm2-sweep": smollm2_sweep_table,
    "smollm2-long": smollm2_long_table,
    "smollm2": smollm2_table,
    "small-progress": small_progress,
    "small-sweep": small_sweep_table,
    "small": small_table,
    "picks": picks_table}
