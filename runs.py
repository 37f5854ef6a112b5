"""The folder of a run: what training writes there, and how a killed run finds its place again.

    model.safetensors            what was trained
    resume.safetensors           weights, AdamW's moments, where the run stands; resume.previous.safetensors is the one before
    metrics.jsonl, curves.png    an object a logged step, and the curves drawn from it
    bad_data.jsonl               which of the data were left out, and why

Whatever is killed or full, whole files stay: each is written under another name, flushed to the disk, and then renamed.
Nothing is pickled.
"""

import contextlib
import json
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

STATE, PREVIOUS = "resume.safetensors", "resume.previous.safetensors"


def flush(path):
    """Waits until a file's content, or a folder's names, have reached the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write(file, save):
    """save(temporary) writes a file that then takes the place of `file`. OSError if it cannot; what was there before stays."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner may read
        save(temporary)
        temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, file)
        flush(file.parent)
    except Exception as error:  # safetensors has its own kind
        raise OSError(f"{file}: cannot be written ({error}); what was there before still is") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder):
    """OSError unless files can be made in a folder, which is made for the moment where it is not there yet."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "writable", lambda file: file.touch())
    (folder / "writable").unlink()
    if is_new:
        folder.rmdir()


# --------------------------------------------------------------------------------------------------------------- weights


def disk_need(parameters):
    """Bytes that a run with these trained parameters takes at most: weights, two states, and one more being written."""
    weights = sum(p.numel() * 4 for p in parameters.values())
    return weights + 3 * 3 * weights  # a state holds each number three times: the weight and its two moments


def save_model(folder, parameters):
    """model.safetensors: {name: parameter}."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    write(folder / "model.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))


def save_state(folder, parameters, optimizer, state, name=STATE):
    """Weights, the optimizer's moments and, as JSON, where the run stands; the state before this one is kept."""
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in moments.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def save(file):
        save_file(tensors, file, metadata={"state": json.dumps(state)})
        if name == STATE and (folder / STATE).exists():  # a kill between the two renames leaves the previous one
            os.replace(folder / STATE, folder / PREVIOUS)

    write(folder / name, save)


def load_state(folder, say=print):
    """-> (state, tensors) of the newest whole state in a folder; says which is damaged. FileNotFoundError if there is none."""
    problems = []
    for file in (folder / STATE, folder / PREVIOUS):
        if file.is_file():
            try:
                with safe_open(file, framework="pt") as saved:
                    state = json.loads(saved.metadata()["state"])
                    tensors = {name: saved.get_tensor(name) for name in saved.keys()}
            except Exception as error:  # safetensors has its own kind, and a header may hold anything
                problems.append(f"{file}: damaged ({error})")
            else:
                for problem in problems:
                    say(f"{problem}; going on from {file.name}, step {state['step']:,} of stage {state['stage']}")
                return state, tensors
    if problems:
        raise ValueError("; ".join(problems) + "; start anew with another --out")
    raise FileNotFoundError(f"{folder / STATE}: nothing to resume; start without --resume")


def restore(parameters, optimizer, tensors):
    """Puts the tensors of load_state into {name: parameter} and, where they are of this stage, the optimizer."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
    moments = {}
    for name in (name for name in tensors if name.startswith("optimizer.")):
        _, i, key = name.split(".")
        moments.setdefault(int(i), {})[key] = tensors[name]
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


# -------------------------------------------------------------------------------------------------------------------- log


class Log:
    """metrics.jsonl and the curves drawn from it, and bad_data.jsonl; written by the first process alone."""

    def __init__(self, folder, rank):
        self.file, self.png, self.rank, self.seconds = folder / "metrics.jsonl", folder / "curves.png", rank, 0.0
        self.bad_data, self.reported = folder / "bad_data.jsonl", {}  # {problem: where}

    def begin(self, left_out):
        """Empty metrics, and the (problem, where) of what was left out when the data were read."""
        write(self.file, lambda file: file.write_text(""))
        write(self.bad_data, lambda file: file.write_text("".join(self.bad_line(*row) for row in left_out)))

    def continue_from(self, stages, state):
        """Forgets what a killed run logged after the state that it resumes from."""
        self.seconds, at = state["seconds"], (stages.index(state["stage"]), state["step"])
        if self.rank == 0:
            kept = [row for row in self.rows() if (stages.index(row["stage"]), row["step"]) <= at]
            write(self.file, lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in kept)))
            bad = self.rows(self.bad_data)
            write(self.bad_data, lambda file: file.write_text("".join(self.bad_line(**row) for row in bad)))
            for row in bad:
                self.reported.setdefault(row["problem"], set()).add(row["where"])

    def rows(self, file=None):
        """All rows of the metrics, or of another file, but what a kill has cut in the middle."""
        rows, file = [], file or self.file
        for line in file.read_text().splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    @staticmethod
    def append(file, lines):
        try:
            with open(file, "a") as opened:
                opened.writelines(lines)
        except OSError as error:
            raise OSError(f"{file}: cannot be written ({error})") from error

    def add(self, **row):
        if self.rank == 0:
            self.append(self.file, [json.dumps(row | {"seconds": round(self.seconds, 3)}) + "\n"])

    @staticmethod
    def bad_line(problem, where):
        return json.dumps({"problem": problem, "where": where}) + "\n"

    def report(self, problems):
        """Writes down, and of each kind prints the first ten, what is wrong with the data: (problem, where), each of them once."""
        for problem, where in problems if self.rank == 0 else ():
            reported = self.reported.setdefault(problem, set())
            if where not in reported:
                reported.add(where)
                self.append(self.bad_data, [self.bad_line(problem, where)])
                if len(reported) <= 10:
                    tqdm.write(f"{problem}: {where}{f' (further ones: {self.bad_data})' * (len(reported) == 10)}", file=sys.stderr)

    def draw(self):
        """Training loss, and validation loss with matched and with shuffled images, over all stages."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        rows, offset, figure = self.rows(), 0, Figure(figsize=(9, 4.5), layout="tight")
        axes = figure.subplots()
        looks = {"loss": ("training", "0.65", "-"), "val_loss": ("validation", "C0", "o-"),
                 "val_loss_shuffled": ("validation, shuffled images", "C3", "o-")}
        for stage in dict.fromkeys(row["stage"] for row in rows):
            of_stage = [row for row in rows if row["stage"] == stage]
            for key, (label, colour, line) in looks.items():
                points = [(offset + row["step"], row[key]) for row in of_stage if key in row]
                axes.plot([x for x, _ in points], [y for _, y in points], line, color=colour, label=None if offset else label, markersize=3)
            axes.axvline(offset, color="0.8", linewidth=0.8)
            axes.text(offset, 1.01, f" {stage}", transform=axes.get_xaxis_transform(), fontsize=9)
            offset += of_stage[-1]["step"]
        axes.set(xlabel="optimizer step", ylabel="cross-entropy a token")
        axes.legend(frameon=False)
        write(self.png, lambda file: figure.savefig(file, format="png", dpi=130))
