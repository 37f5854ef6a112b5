"""Makes the runs of the study: commands of train.py, each of which can be repeated alone.

    python -m study.runs                           # what is not recorded yet, two at a time, one thread each
    python -m study.runs --list 'transfer-300-*'   # the commands of these
    python -m study.runs --only 'sweep-*'          # these runs alone, and what they need
    python -m study.runs --study smollm2           # the second study, after `python -m study.make smollm2`

What a run leaves is recorded in --results: its command, its metrics, and how the finished model captions the
images of its split. What is recorded there is not run again, and a run that was killed goes on where it
stood. `python -m study.make all` comes first.
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
from pathlib import Path

from study import records
from study.experiments import RUNS, STUDIES, WORLD, with_needs

ROOT = Path(__file__).resolve().parent.parent
SAID = ("word converter", "projector", "from scratch")  # lines of a log that begin so are recorded


def measure(folder, scenes):
    """What a finished run says about the images of a file of scenes.

    -> {"right": share of its claims that are right, "claims": their number, "found": share of the image's
    objects that it claims, "words_right": share of its colours and shapes that are in the image,
    "cider": in papers' points, beside the scenes' own captions, "captions": the first 24}"""
    # Imported here, so that the processes that only start others do without torch.
    import torch

    import evaluate
    import transfer
    from study.captions import caption_all, read_scenes, share_right
    from study.scenes import mentioned

    torch.set_num_threads(1)
    files, texts, truths = read_scenes(ROOT / scenes)
    captions = caption_all(*transfer.load_model(str(folder)), files)
    right, claims = share_right(captions, truths)
    words = []  # is each colour or shape that is mentioned in the image?
    for caption, truth in zip(captions, truths):
        there = {word for pair in truth for word in pair}
        words += [word in there for word in mentioned(caption)]
    found = right * claims / sum(map(len, truths))
    words_right = sum(words) / max(1, len(words))
    cider, _ = evaluate.cider(dict(enumerate(captions)), {i: [text] for i, text in enumerate(texts)})
    return dict(right=right, claims=claims, found=found, words_right=words_right, cider=100 * cider,
                captions=captions[:24])


def machine():
    """Processor, torch's version, threads of a run."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, torch {importlib.metadata.version('torch')}, 1 thread"


def execute(run, say):
    """Runs a command to its end, or goes on with it. -> the file with what it printed"""
    log = ROOT / WORLD / "logs" / f"{run.name}.log"
    log.parent.mkdir(exist_ok=True, parents=True)
    state = ROOT / RUNS / run.name / "resume.safetensors"
    resume = ["--resume"] if run.trains and state.is_file() else []
    say(f"$ {shlex.join(run.command + resume)}")
    command = [sys.executable, *run.command[1:], *resume]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a" if resume else "w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=one_thread).returncode
    if code:
        raise RuntimeError(f"{run.name}: ended with {code}; its last words are in {log}")
    return log


def measured(run):
    """What `measure` says about a run, in a process of its own; and the run's metrics."""
    out = ROOT / RUNS / run.name
    command = [sys.executable, "-m", "study.runs", "--measure", str(out), "--scenes", run.scenes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{run.name}: its captions could not be made: {done.stderr}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    start = json.loads((out / "config.json").read_text()).get("start")
    return json.loads(done.stdout) | ({"start": start} if start else {}) | {"metrics": metrics}


def do(run, results, say):
    """Makes a run and records what came out, unless it is recorded and its model is still there."""
    model = ROOT / RUNS / run.name / "model.safetensors"
    if model.is_file() and run.name in records.read(results):
        return
    log = execute(run, say)
    said = dict.fromkeys(line for line in log.read_text().splitlines() if line.startswith(SAID))
    record = {"command": shlex.join(run.command), "said": list(said), "machine": machine()}
    if run.trains:
        record |= measured(run)
    records.add(results, run.name, record)
    right = f": {record['right']:.1%} of {record['claims']} claims right" if "right" in record else ""
    say(f"  {run.name}{right}")


def do_all(todo, results, jobs):
    """Makes runs, `jobs` at a time, each after those that it needs."""
    lock = threading.Lock()
    done = {}

    def say(text):
        with lock:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def work(run):
        for name in set(run.needs) & done.keys():
            done[name].result()
        do(run, results, say)

    # A pool takes runs in their order, so none waits for one that has not begun: what is needed stands first.
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for run in todo:
            done[run.name] = pool.submit(work, run)
        failed = [error for error in (future.exception() for future in done.values()) if error]
    finally:  # Ctrl-C: no others begin
        pool.shutdown(cancel_futures=True)
    if failed:
        raise SystemExit("\n".join(str(error) for error in dict.fromkeys(failed)))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(WORLD) / "results",
                        help="(default: %(default)s; what docs/miniature.md is made of is in study/results)")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=["*"],
                        help="runs of these names alone; * stands for anything")
    parser.add_argument("--list", metavar="PATTERN", nargs="?", const="*",
                        help="print the commands, and run nothing")
    parser.add_argument("--jobs", type=int, default=2,
                        help="runs at a time, of one thread each (default: %(default)s)")
    parser.add_argument("--measure", type=Path, metavar="RUN",
                        help="print what a finished run says about the images of --scenes, as JSON")
    parser.add_argument("--scenes", default=f"{WORLD}/pairs/test.jsonl", metavar="FILE",
                        help="(default: %(default)s)")
    parser.add_argument("--study", choices=STUDIES, default="miniature", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not chosen(args):
        parser.error(f"no run is called {' or '.join(args.only)}; --list names all")
    return args


def chosen(args):
    """The runs of --only."""
    runs = STUDIES[args.study]().values()
    return [run for run in runs if any(fnmatch.fnmatch(run.name, pattern) for pattern in args.only)]


def main(argv=None):
    args = parse_arguments(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.scenes)))
    elif args.list is not None:
        runs = STUDIES[args.study]()
        print("\n".join(shlex.join(runs[name].command) for name in fnmatch.filter(runs, args.list)))
    else:
        args.results.mkdir(parents=True, exist_ok=True)
        recorded = records.read(args.results)
        todo = with_needs([run for run in chosen(args) if run.name not in recorded],
                          STUDIES[args.study]())
        alone = [run for run in todo if run.name.startswith("time-")]
        do_all([run for run in todo if run not in alone], args.results, args.jobs)
        do_all(alone, args.results, jobs=1)


if __name__ == "__main__":
    main()
