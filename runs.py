# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports
# nothing of ours.
"""The folder of a run: what training writes there, and how a killed run finds its place again.

    model.safetensors            what was trained
    resume.safetensors           weights, AdamW's moments, where the run stands
    resume.previous.safetensors  the one before
    metrics.jsonl, curves.png    an object a logged step, and the curves drawn from it
    bad_data.jsonl               which of the data were left out, and why
    lock.json                    who writes there now; gone when the run ends

Whatever is killed or full, whole files stay: each is written under another name, flushed to the
disk, and then renamed. Nothing is pickled.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

STATE = "resume.safetensors"
PREVIOUS = "resume.previous.safetensors"
LOCK = "lock.json"


def flush(path):
    """Waits until a file's content, or a folder's names, have reached the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write(file, save):
    """save(temporary) writes a file that then takes the place of `file`. OSError if it cannot; what
    was there before stays."""
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
        message = f"{file}: cannot be written ({error}); what was there before still is"
        raise OSError(message) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder):
    """OSError unless files can be made in a folder, or where it is not there yet in the nearest one
    above."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error})") from error


@contextlib.contextmanager
def locked(folder, command, say=print):
    """Within this, no other process on this or another machine writes a run in the folder, which is
    made.

    OSError names host, process and command of the one that does. Where the file system has no
    locks, it says so and goes on.

    It is a POSIX record lock. Its process alone holds it, and it dies with it, however that ends;
    flock would be inherited by the processes that read images, and outlive it. (Major footgun:
    closing any file object of lock.json gives the lock up.)"""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    opened = take_lock(file, command, say)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        opened.close()
        if is_new:  # and nothing was written
            with contextlib.suppress(OSError):
                folder.rmdir()


def take_lock(file, command, say):
    """-> the lock's file, opened and locked, in which this process has put down who it is."""
    opened = open(file, "a+")
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            say(f"{file.parent}: this file system has no locks ({error.strerror}); see to it that no "
                "other run writes there")
            return opened
        opened.seek(0)
        holder = opened.read()
        opened.close()
        raise OSError(f"{file.parent}: another run writes there now, {describe_holder(holder)}. Wait for "
                      "it or stop it, or name another --out") from None
    if not file.exists() or not os.path.samestat(os.stat(file), os.fstat(opened.fileno())):
        opened.close()  # its holder has ended in between, and took the file away
        return take_lock(file, command, say)
    opened.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"host": socket.gethostname(), "process": os.getpid(), "command": command, "since": now}
    json.dump(holder, opened)
    opened.flush()
    return opened


def describe_holder(text):
    """The content of a lock's file, for people."""
    try:
        return "process {process} on {host} since {since}: {command}".format(**json.loads(text))
    except (ValueError, KeyError, TypeError):
        return "and has not said yet who it is"


# ------------------------------------------------------------------------------------------ weights


def disk_need(parameters):
    """Bytes that a run with these trained parameters takes at most: weights, two states, and one
    more being written."""
    weights = sum(p.numel() * 4 for p in parameters.values())
    state = 3 * weights  # each number three times: the weight and its two moments
    return weights + 3 * state


def save_model(folder, parameters):
    """model.safetensors: {name: parameter}."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    metadata = {"format": "pt"}
    write(folder / "model.safetensors", lambda file: save_file(tensors, file, metadata=metadata))


def save_state(folder, parameters, optimizer, state, name=STATE):
    """Weights, the optimizer's moments and, as JSON, where the run stands; the state before this
    one is kept."""
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in moments.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def save(file):
        save_file(tensors, file, metadata={"state": json.dumps(state)})
        # a kill between this rename and the next leaves the previous state
        if name == STATE and (folder / STATE).exists():
            os.replace(folder / STATE, folder / PREVIOUS)

    write(folder / name, save)


def load_state(folder, say=print):
    """-> (state, tensors) of the newest whole state in a folder; says which is damaged.
    FileNotFoundError if there is none."""
    problems = []
    for file in (folder / STATE, folder / PREVIOUS):
        if not file.is_file():
            continue
        try:
            with safe_open(file, framework="pt") as saved:
                state = json.loads(saved.metadata()["state"])
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}
        except Exception as error:  # safetensors has its own kind, and a header may hold anything
            problems.append(f"{file}: damaged ({error})")
            continue
        for problem in problems:
            place = f"step {state['step']:,} of stage {state['stage']}"
            say(f"{problem}; going on from {file.name}, {place}")
        return state, tensors
    if problems:
        raise ValueError("; ".join(problems) + "; start anew with another --out")
    raise FileNotFoundError(f"{folder / STATE}: nothing to resume; start without --resume")


def restore(parameters, optimizer, tensors):
    """Puts the tensors of load_state into {name: parameter} and, where they are of this stage, the
    optimizer."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
    moments = {}
    for name in (name for name in tensors if name.startswith("optimizer.")):
        _, i, key = name.split(".")
        moments.setdefault(int(i), {})[key] = tensors[name]
    if moments:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


# ---------------------------------------------------------------------------------------------- log


class Log:
    """metrics.jsonl and the curves drawn from it, and bad_data.jsonl; written by the first process
    alone."""

    def __init__(self, folder, rank):
        self.file = folder / "metrics.jsonl"
        self.png = folder / "curves.png"
        self.bad_data = folder / "bad_data.jsonl"
        self.rank = rank
        self.seconds = 0.0
        self.reported = {}  # {problem: where}

    def begin(self, left_out):
        """Empty metrics, and the (problem, where) of what was left out when the data were read."""
        bad = "".join(self.bad_line(*row) for row in left_out)
        write(self.file, lambda file: file.write_text(""))
        write(self.bad_data, lambda file: file.write_text(bad))

    def continue_from(self, stages, state):
        """Forgets what a killed run logged after the state that it resumes from."""
        self.seconds = state["seconds"]
        if self.rank:
            return
        at = stages.index(state["stage"]), state["step"]
        kept = [row for row in self.rows() if (stages.index(row["stage"]), row["step"]) <= at]
        metrics = "".join(json.dumps(row) + "\n" for row in kept)
        write(self.file, lambda file: file.write_text(metrics))
        reported = self.rows(self.bad_data)
        bad = "".join(self.bad_line(**row) for row in reported)
        write(self.bad_data, lambda file: file.write_text(bad))
        for row in reported:
            self.reported.setdefault(row["problem"], set()).add(row["where"])

    def rows(self, file=None):
        """All rows of the metrics, or of another file, but what a kill has cut in the middle."""
        rows = []
        file = file or self.file
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
        """Writes down what is wrong with the data, (problem, where), each of them once, and prints
        the first ten of each kind."""
        for problem, where in problems if self.rank == 0 else ():
            reported = self.reported.setdefault(problem, set())
            if where in reported:
                continue
            reported.add(where)
            self.append(self.bad_data, [self.bad_line(problem, where)])
            if len(reported) <= 10:
                more = f" (further ones: {self.bad_data})" if len(reported) == 10 else ""
                tqdm.write(f"{problem}: {where}{more}", file=sys.stderr)

    def draw(self):
        """Training loss, validation loss with matched and with shuffled images, and scores, over
        all stages."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        rows = self.rows()
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        names = sorted({name for row in rows for name in row.get("scores", {})})
        right = axes.twinx() if names else None
        offset = 0
        for stage in dict.fromkeys(row["stage"] for row in rows):
            of_stage = [row for row in rows if row["stage"] == stage]
            draw_stage(axes, stage, of_stage, offset)
            for i, name in enumerate(names):
                draw_score(right, name, f"C{i + 4}", of_stage, offset)
            offset += of_stage[-1]["step"]
        axes.set(xlabel="optimizer step", ylabel="cross-entropy a token")
        lines = axes.get_lines()
        if names:
            right.set(ylabel="score", ylim=(0, None))
            lines += right.get_lines()
        figure.legend(handles=[line for line in lines if line.get_label()[0] != "_"], frameon=False,
                      loc="outside lower center", ncols=len(CURVES) + len(names))
        write(self.png, lambda file: figure.savefig(file, format="png", dpi=130))


CURVES = {  # of the metrics: label, colour, line
    "loss": ("training", "0.65", "-"),
    "val_loss": ("validation", "C0", "o-"),
    "val_loss_shuffled": ("validation, shuffled images", "C3", "o-"),
}


def draw_stage(axes, stage, rows, offset):
    """The curves of one stage, which begins `offset` steps after the run did."""
    for key, (label, colour, line) in CURVES.items():
        logged = [row for row in rows if key in row]
        steps = [offset + row["step"] for row in logged]
        values = [row[key] for row in logged]
        axes.plot(steps, values, line, color=colour, label=None if offset else label, markersize=3)
    axes.axvline(offset, color="0.8", linewidth=0.8)
    axes.text(offset, 1.01, f" {stage}", transform=axes.get_xaxis_transform(), fontsize=9)


def draw_score(axes, name, colour, rows, offset):
    """What the model scored at the validations of one stage."""
    logged = [row for row in rows if name in row.get("scores", {})]
    steps = [offset + row["step"] for row in logged]
    scores = [row["scores"][name] for row in logged]
    axes.plot(steps, scores, "s--", color=colour, label=None if offset else name, markersize=3)
