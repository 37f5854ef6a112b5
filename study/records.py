"""What runs of the study left behind: a line of JSON for each, in one file for each kind of run.

    scratch.jsonl: {"name": "scratch-random-300-s0", "command": "python train.py ...", "said": [...],
                    "right": 0.7, ..., "captions": [...], "metrics": [{"stage": ..., "step": ...}, ...]}

The metrics are the rows of the run's metrics.jsonl. Runs that train nothing have none.
"""

import json

from study.experiments import SEEDS

LOSS = "validation loss"


def file_of(folder, name):
    """Where the run of a name is recorded: by the first word of its name."""
    return folder / f"{name.split('-')[0]}.jsonl"


def read(folder):
    """-> {name of a run: its record}"""
    records = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a kill has cut it: its run is made again
                continue
            if "name" not in record:
                raise SystemExit(f"{file}: no records of runs, which name them; move {folder} away")
            records[record.pop("name")] = record
    return records


def add(folder, name, record):
    """Appends the record of a run, in one write, so that runs which end at the same time do not mix."""
    file = file_of(folder, name)
    line = json.dumps({"name": name} | record) + "\n"
    cut = file.is_file() and not file.read_bytes().endswith(b"\n")
    with open(file, "ab", buffering=0) as lines:
        lines.write(("\n" * cut + line).encode())


def curves(rows):
    """Rows of metrics -> {LOSS or the name of a score: [(steps, samples, seconds; value), ...]}, counted
    through all stages."""
    found = {}
    steps = samples = 0  # of the stages that have ended
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == stage]
        for row in of_stage:
            if "val_loss" in row:
                at = steps + row["step"], samples + row["samples"], row["seconds"]
                for name, value in ({LOSS: row["val_loss"]} | row.get("scores", {})).items():
                    found.setdefault(name, []).append((*at, value))
        steps += of_stage[-1]["step"]
        samples += of_stage[-1]["samples"]
    return found


def curve(rows):
    """Rows of a run's metrics -> [(optimizer steps, warm-up counted; validation loss)]"""
    return [(steps, loss) for steps, _, _, loss in curves(rows)[LOSS]]


class Results:
    """What was recorded, by the names of the runs; a name without its seed stands for all seeds."""

    def __init__(self, folder):
        self.records = read(folder)
        self.rows = {name: record["metrics"] for name, record in self.records.items() if "metrics" in record}

    def seeds(self, name):
        """The names of the runs of all seeds that are recorded."""
        return [f"{name}-s{seed}" for seed in SEEDS if f"{name}-s{seed}" in self.rows]

    def curve(self, name):
        """[(optimizer steps, warm-up counted; loss)] of one run"""
        return curve(self.rows[name])

    def final(self, name):
        """The loss at the end of one run."""
        return self.curve(name)[-1][1]

    def finals(self, name):
        """The losses at the end, of all seeds."""
        return [self.final(run) for run in self.seeds(name)]

    def lowest(self, name):
        """The lowest loss of each seed: behind it a run from scratch may learn its pairs by heart."""
        return [min(loss for _, loss in self.curve(run)) for run in self.seeds(name)]

    def losses(self, names):
        """{anything: name of one run} -> {the same: its loss at the end}, of those that are recorded"""
        return {key: self.final(name) for key, name in names.items() if name in self.rows}

    def first_below(self, name, loss):
        """Optimizer steps after which a run first has at most this loss, or None"""
        return next((steps for steps, reached in self.curve(name) if reached <= loss), None)
