"""The paper in miniature: every run of docs/miniature.md, each a command of train.py that can be repeated alone.

    python miniature/study.py                              # what is not recorded yet, two runs at a time (one thread each)
    python miniature/study.py --list 'transfer-300-*'      # the commands of these
    python miniature/study.py --only 'sweep-*'             # these runs alone, and what they need

A run leaves NAME.jsonl (its metrics.jsonl) and NAME.json (its command, and how the finished model captions the images of its split)
in --results; what is there is not run again, and a run that was killed goes on where it stood. python miniature/make.py all
comes first. Rates were chosen on the validation images (runs named sweep-*; docs/miniature.md names two exceptions), sources are watched on them,
too; all others report the test images.
"""

import argparse
import concurrent.futures
import fnmatch
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORLD, RUNS = "out/study", "out/study/runs"
SEEDS = (0, 1, 2)
SOURCES = ("opt-64", "opt-128", "opt-192")  # language models of sources; opt-128 where nothing else is said
TARGET = "opt-256"
BUDGETS = (300, 1000, 3000)  # optimizer steps of the runs from scratch, each with a schedule of its own
LENGTHS = (100, 300, 1000, 3000)  # of transfers; the last only with the word converter and all images
# From scratch: a random Q-Former; one after BLIP-2's first stage; a random one on top of the first half of the ViT, where seeing is hard to learn
STARTS = {"random": [], "stage1": [f"{WORLD}/stage1"], "half": ["--vit-layers", 2]}
SOURCE_STEPS, SOURCE_RATE = 6000, "1e-3"

RATES = ("5e-4", "1e-3", "2e-3", "4e-3")  # swept from scratch
SWEPT = (300, 1000)  # at these budgets
CHOSEN = {("random", 300): "2e-3", ("random", 1000): "2e-3", ("random", 3000): "1e-3",  # for 3,000 steps 2e-3 is too much: it leaps
          ("stage1", 300): "2e-3", ("stage1", 1000): "1e-3", ("stage1", 3000): "1e-3",
          ("half", 300): "2e-3", ("half", 1000): "1e-3", ("half", 3000): "1e-3"}
# of transfers in 300 steps, with the word converter and with --init captions: all pairs are swept, and the best taken
WARM_UP_RATES = {"transfer": ("1e-2", "2e-2", "4e-2", "8e-2"), "captions": ("5e-5", "1e-4", "2e-4", "5e-4")}
FINE_TUNE_RATES = ("5e-4", "1e-3", "2e-3")
TRANSFER_RATES = {"transfer": ("2e-2", "1e-3"), "captions": ("5e-4", "5e-4")}
T5_RATES = ("1e-4", "1e-4")  # with --init captions: above, T5 forgets how to look
WARM_UP_SHARE = 0.2  # of a transfer's steps


@dataclass
class Run:
    """One command. `needs` are the runs whose models it reads; `script` is train.py, or initialise.py of the study."""

    name: str
    flags: list
    needs: list = field(default_factory=list)
    script: str = "train.py"

    @property
    def command(self):
        return ["python", self.script, *map(str, self.flags), "--out", f"{RUNS}/{self.name}"]


def train(name, src, tgt, *flags, images="", split="test", seed=0, every=None, needs=()):
    """A run of train.py on a part of the training images, watched on a split."""
    common = ["--src", src, "--tgt", f"{WORLD}/{tgt}", "--data", f"{WORLD}/pairs/train{images}.jsonl", "--val", f"{WORLD}/pairs/{split}.jsonl",
              "--batch-size", 32, "--micro-batch", 32, "--augment", "none", "--clip", 0.5, "--workers", 0,
              "--log-every", every or 50, "--gate", 0, "--seed", seed]
    return Run(name, common + (["--val-every", every] if every else []) + list(flags), list(needs))


def scratch(name, tgt, start, steps, rate, *flags, **options):
    return train(name, f"{WORLD}/vit", tgt, "--from-scratch", *STARTS[start], "--steps", steps, "--lr", rate, *flags, **options)


def transfer(name, steps, *flags, seed, source="opt-128", tgt=TARGET, rates=TRANSFER_RATES["transfer"], init=None, **options):
    """VPGTrans in so many steps, warm-up counted, or what `flags` make of it; `rates` are of warm-up and fine-tuning. Seed s takes
    the source of seed s, or what initialise.py made of it."""
    src, before = f"init-{init}-s{seed}" if init else f"source-{source}-s{seed}", round(WARM_UP_SHARE * steps)
    length = ["--steps", steps] if "--no-warm-up" in flags else ["--warm-up-steps", before, "--steps", steps - before]
    if "--stage" in flags:  # the warm-up alone
        length = ["--warm-up-steps", steps]
    return train(f"{name}-s{seed}", f"{RUNS}/{src}", tgt, *flags, *length, "--lr", rates[1], "--warm-up-lr", rates[0],
                 seed=seed, every={100: 10, 300: 20, 1000: 50, 3000: 100}[steps], needs=[src], **options)


VARIANTS = {  # of a transfer in 300 steps, each with one thing changed
    "random-projector": ["--init", "random"], "no-warm-up": ["--no-warm-up"],
    "inheritance": ["--no-warm-up", "--init", "random"], "projector-only": ["--stage", "warm-up"]}
CONVERTERS = ("unweighted", "ridge", "cosine")  # of initialise.py
CAPTIONS = ("--init", "captions")
FAMILIES = [(source, f"{family}-{width}") for family in ("llama", "t5") for source, width in (("opt-128", 128), ("opt-128", 256), ("opt-192", 256))]


def plan():
    """All runs, in the order in which they are best made: {name: Run}."""
    # The baseline, first of all: its rate, on validation images; then annealed budgets, on test images.
    runs = [scratch(f"sweep-scratch-{start}-{steps}-{rate}", TARGET, start, steps, rate, split="val")
            for start in STARTS for steps in SWEPT for rate in RATES]
    # The sources: a Q-Former after the first stage, trained on with a small language model, as BLIP-2 is.
    runs += [scratch(f"source-{llm}-s{seed}", llm, "stage1", SOURCE_STEPS, SOURCE_RATE, split="val", seed=seed)
             for llm in ("opt-128", "opt-64", "opt-192") for seed in SEEDS]
    runs += [scratch(f"source-half-s{seed}", "opt-128", "half", SOURCE_STEPS, SOURCE_RATE, split="val", seed=seed) for seed in SEEDS]
    runs += [scratch(f"scratch-{start}-{steps}-s{seed}", TARGET, start, steps, CHOSEN[start, steps], seed=seed, every=steps // 10)
             for steps in BUDGETS for start in STARTS for seed in SEEDS]
    # VPGTrans: its rates, on validation images; then what is reported.
    runs += [transfer(f"sweep-{init}-{warm}-{rate}", 300, *flags, seed=0, rates=(warm, rate), split="val")
             for init, flags in (("transfer", ()), ("captions", CAPTIONS)) for warm in WARM_UP_RATES[init] for rate in FINE_TUNE_RATES]
    rate = TRANSFER_RATES["transfer"][1]
    for seed in SEEDS:
        runs += [transfer(f"transfer-{steps}", steps, seed=seed) for steps in LENGTHS]
        runs += [transfer(f"images-{part}-{steps}", steps, seed=seed, images=f"-{part}")
                 for part in ("5", "10.7", "25") for steps in LENGTHS[:-1]]
        runs += [transfer(f"variant-{name}", 300, *flags, seed=seed) for name, flags in VARIANTS.items()]
        runs += [transfer(f"variant-rate-x{times}", 300, seed=seed, rates=(f"{times * float(rate):g}", rate)) for times in (1, 5)]
        runs += [transfer(f"captions-{steps}", steps, *CAPTIONS, seed=seed, rates=TRANSFER_RATES["captions"]) for steps in LENGTHS[:-1]]
        runs += [transfer(f"half-{steps}", steps, seed=seed, source="half") for steps in LENGTHS]
        runs += [transfer(f"half-10.7-{steps}", steps, seed=seed, source="half", images="-10.7") for steps in LENGTHS[:-1]]
        runs += [transfer(f"half-captions-{steps}", steps, *CAPTIONS, seed=seed, source="half", rates=TRANSFER_RATES["captions"]) for steps in LENGTHS[:-1]]
        runs += [transfer(f"size-{source}", 300, seed=seed, source=source) for source in SOURCES if source != "opt-128"]
    for tgt in dict.fromkeys(tgt for _, tgt in FAMILIES):
        runs += [scratch(f"scratch-{tgt}-300-s{seed}", tgt, "stage1", 300, CHOSEN["stage1", 300], seed=seed, every=20) for seed in SEEDS]
    runs += [transfer(f"family-{source}-{tgt}", 300, seed=seed, source=source, tgt=tgt)
             for source, tgt in FAMILIES for seed in SEEDS]
    runs += [transfer(f"family-captions-{source}-{tgt}", 300, *CAPTIONS, seed=seed, source=source, tgt=tgt,
                      rates=T5_RATES if tgt.startswith("t5") else TRANSFER_RATES["captions"]) for source, tgt in FAMILIES for seed in SEEDS]
    for how in CONVERTERS:
        for seed in SEEDS:
            source = f"source-opt-128-s{seed}"
            flags = ["--src", f"{RUNS}/{source}", "--tgt", f"{WORLD}/{TARGET}", "--data", f"{WORLD}/pairs/train.jsonl", "--how", how, "--seed", seed]
            runs += [Run(f"init-{how}-s{seed}", flags, [source], "miniature/initialise.py"),
                     transfer(f"converter-{how}", 300, seed=seed, init=how)]
    # One at a time, after all others, for the seconds of a step
    runs += [scratch("time-scratch-s0", TARGET, "stage1", 300, CHOSEN["stage1", 300], every=30), transfer("time-transfer", 300, seed=0)]
    return {run.name: run for run in runs}


# --------------------------------------------------------------------------------------------------------- doing the runs


def measure(folder, split):
    """What a finished run says about the images of a split: {"captions": [...], shares of the claims that are right, ...}."""
    import torch

    import transfer
    from demo.report import caption_all, read_scenes, share_right
    from demo.scenes import mentioned

    torch.set_num_threads(1)
    files, _, truths = read_scenes(ROOT / WORLD / "pairs" / f"{split}.jsonl")
    captions = caption_all(*transfer.load_model(str(folder)), files)
    right, claims = share_right(captions, truths)
    words = [(word, {w for pair in truth for w in pair}) for caption, truth in zip(captions, truths) for word in mentioned(caption)]
    return {"right": right, "claims": claims, "found": right * claims / sum(map(len, truths)),
            "words_right": sum(word in there for word, there in words) / max(1, len(words)), "captions": captions[:24]}


def machine():
    """Processor, torch's version, threads of a run."""
    file = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")] if file.is_file() else []
    return f"{(models or [platform.processor() or platform.machine()])[0]}, torch {importlib.metadata.version('torch')}, 1 thread"


def do(run, results, say):
    """Runs a command to its end, or goes on with it, and records what came out."""
    record, out = results / f"{run.name}.json", ROOT / RUNS / run.name
    if record.is_file() and (out / "model.safetensors").is_file():
        return
    resume = ["--resume"] if run.script == "train.py" and (out / "resume.safetensors").is_file() else []
    say(f"$ {shlex.join(run.command + resume)}")
    log = ROOT / WORLD / "logs" / f"{run.name}.log"
    log.parent.mkdir(exist_ok=True, parents=True)
    with open(log, "a" if resume else "w") as file:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run([sys.executable, *run.command[1:], *resume], cwd=ROOT, stdout=file, stderr=file, env=one_thread).returncode
    if code:
        raise RuntimeError(f"{run.name}: ended with {code}; its last words are in {log}")
    said = dict.fromkeys(line for line in log.read_text().splitlines() if line.startswith(("word converter", "projector", "from scratch")))
    row = {"command": shlex.join(run.command), "said": list(said), "machine": machine()}
    if run.script == "train.py":
        split = "val" if run.name.startswith("sweep-") else "test"
        done = subprocess.run([sys.executable, __file__, "--measure", str(out), "--split", split], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{run.name}: its captions could not be made: {done.stderr}")
        row |= json.loads(done.stdout)
        (results / f"{run.name}.jsonl").write_text((out / "metrics.jsonl").read_text())
    record.write_text(json.dumps(row, indent=1) + "\n")
    say(f"  {run.name}" + (f": {row['right']:.1%} of {row['claims']} claims right" if "right" in row else ""))


def do_all(todo, results, jobs):
    """Does runs, `jobs` at a time, each after those that it needs."""
    lock, done = threading.Lock(), {}

    def say(text):
        with lock:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def work(run):
        for name in set(run.needs) & done.keys():
            done[name].result()
        do(run, results, say)

    pool = concurrent.futures.ThreadPoolExecutor(jobs)  # takes them in their order, and what is needed stands first
    try:
        for run in todo:
            done[run.name] = pool.submit(work, run)
        failed = [error for error in (future.exception() for future in done.values()) if error]
    finally:  # Ctrl-C: no others begin
        pool.shutdown(cancel_futures=True)
    if failed:
        raise SystemExit("\n".join(str(error) for error in dict.fromkeys(failed)))


def with_needs(chosen, every):
    """The chosen runs and those that they need, in the plan's order."""
    names, queue = set(), list(chosen)
    while queue:
        run = queue.pop()
        if run.name not in names:
            names.add(run.name)
            queue += [every[name] for name in run.needs]
    return [run for run in every.values() if run.name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(WORLD) / "results", help="(default: %(default)s; what docs/miniature.md is made "
                        "of is in miniature/results)")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=["*"], help="runs of these names alone; * stands for anything")
    parser.add_argument("--list", metavar="PATTERN", nargs="?", const="*", help="print the commands, and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default: %(default)s)")
    parser.add_argument("--measure", type=Path, metavar="RUN", help="print what a finished run says about the images of --split, as JSON")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.split)))
    every = plan()
    if args.list is not None:
        return print("\n".join(shlex.join(run.command) for run in every.values() if fnmatch.fnmatch(run.name, args.list)))
    chosen = [run for run in every.values() if any(fnmatch.fnmatch(run.name, pattern) for pattern in args.only)]
    if not chosen:
        parser.error(f"no run is called {' or '.join(args.only)}; --list names all")
    todo = with_needs([run for run in chosen if not (args.results / f"{run.name}.json").is_file()], every)
    args.results.mkdir(parents=True, exist_ok=True)
    alone = [run for run in todo if run.name.startswith("time-")]
    do_all([run for run in todo if run not in alone], args.results, args.jobs)
    do_all(alone, args.results, jobs=1)


if __name__ == "__main__":
    main()
