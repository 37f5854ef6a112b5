"""The training loop: takes any model and its samples, makes optimizer steps, and keeps a folder from
which a killed run goes on.

    processes = Processes.start("bf16")                      # one a GPU under torchrun
    run = Run(args, saved, processes, model, Validation(...), log)
    for job in jobs:
        train_stage(run, job)

What trains, on which samples, for how long is a `Job`. Of a model the loop asks this much; VisualLLM
(vpgtrans.py) and MemoryLLM (memvp.py) have it:

    model(prompt_ids, target_ids, scored=None, **sees)
                                              -> (loss sum, tokens); sees: images=..., features=... or
                                              queries=..., and has_image where samples are without
    model.see(images)                         -> {name: (B,...)}, computed once to be looked at twice
    model.generate(prompt_ids, **sees, ...)   -> lists of ids
    model.parts, model.saved()                -> {part: beginning of its names}, {name: parameter}
    model.layers                              -> the blocks that repeat, to be compiled

The file goes from the outside in and back: processes, stopping, validation, one optimizer step, one
run, one stage.
"""

import argparse
import atexit
import contextlib
import datetime
import inspect
import itertools
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

import data
import runs
import vpgtrans

# ---------------------------------------------------------------------------------------- processes

# On Hopper GPUs torch prefers cuDNN's attention, whose gradients may be NaN behind a mask (pytorch 196678),
# and which makes a plan for each new length. The others, flash and memory-efficient, do neither.
torch.backends.cuda.enable_cudnn_sdp(False)

# What keeps DDP from sending buffers; before torch 2.13 it had the older name.
DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
NO_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers": False}


@dataclass(frozen=True)
class Processes:
    """This process among its peers: one a GPU under torchrun, else a single one."""

    rank: int
    world: int
    device: torch.device
    precision: str
    mesh: DeviceMesh = None  # the processes over which frozen blocks are sharded, this one among them

    @classmethod
    def start(cls, precision, shard=None):
        """`shard`: frozen blocks are sharded over the processes of each "node", or over "all". ValueError
        if this one would be alone."""
        rank = int(os.environ.get("RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if world > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        mesh = shard_mesh(shard, world, device) if shard else None
        return cls(rank, world, device, precision, mesh)

    @property
    def shards(self):
        """How many processes share the frozen blocks."""
        return self.mesh.size() if self.mesh else 1

    def say(self, text):
        """Prints on the first process only."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)

    def sum(self, *numbers):
        """The sums of some numbers over all processes, as floats; on the CPU, so that no GPU is
        waited for."""
        # a number more, since gloo waits for nobody where there is none to add up
        total = torch.tensor([0.0, *(float(n) for n in numbers)], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total[1:].tolist()

    def gather(self, things):
        """The lists of all processes, one behind the other."""
        lists = [things] * self.world
        if self.world > 1:
            dist.all_gather_object(lists, things)
        return list(itertools.chain.from_iterable(lists))

    @contextlib.contextmanager
    def first_goes_first(self):
        """What follows is done by the first process, and then by the others: it fetches files and
        scans data sets, and they find them made. Where it fails the others end without a word,
        since it says why."""
        if self.rank == 0:
            failed = True
            try:
                yield
                failed = False
            finally:
                self.sum(failed)
        else:
            (failed,) = self.sum(False)
            if failed:
                end_silently()
            yield

    @property
    def hides_bars(self):
        """`disable` of tqdm: True but on the first process; there None, which hides bars where no
        terminal is."""
        return None if self.rank == 0 else True

    def autocast(self):
        """bf16 arithmetic around float32 trained weights; torch keeps losses and norms in
        float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def shard_mesh(shard, world, device):
    """The processes that share frozen blocks with this one, as a DeviceMesh of one dimension."""
    size = world
    if shard == "node":
        size = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if size < 2:
        raise ValueError(f"--shard {shard}: one process has nobody to share the LLM with; start one for each "
                         "GPU, by torchrun --nproc-per-node N. On a single GPU, --llm-weights int8 or nf4 "
                         "makes the LLM smaller")
    mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=("nodes", "shards"))
    return mesh["shards"]


# ----------------------------------------------------------------------------------------- stopping

stop_asked = threading.Event()


def ask_to_stop(number, _):
    """On SIGTERM or SIGINT: the run is saved after the next step; a second Ctrl-C ends it at once.
    SIGTERM comes several times where a scheduler and torchrun both send it."""
    stop_asked.set()
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def stopping_when_asked():
    """Within this, SIGTERM and SIGINT ask the loop to save and stop."""
    stop_asked.clear()
    before = {n: signal.signal(n, ask_to_stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def must_stop():
    """Has this process been asked to stop? A torchrun that was killed alone asks nobody: its
    processes, which would go on beside the run's successor, notice that they have another
    parent."""
    return stop_asked.is_set() or LAUNCHER not in (None, os.getppid())


class Failure(Exception):
    """Ends the command with a message for people."""


@contextlib.contextmanager
def explaining_memory(args, command):
    """Within this, a GPU whose memory runs out ends the command with what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        end_with(f"GPU memory ran out, with micro-batches of {args.micro_batch}: lower --micro-batch (the "
                 "result stays the same but for the draws of dropout), quantise the LLM by --llm-weights, or "
                 "share it over several GPUs by --shard; with --resume if a state was saved already; "
                 f"--dry-run says what should fit ({error})", command)


def end_with(message, command):
    """Ends `command` with a message for people and exit code 2. Under torchrun, whose own report
    comes last on the screen, that report names the message as the cause."""
    print(f"{command}: {message}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": f"{command}: {message}"}))
    sys.exit(2)


def run_command(main):
    """Runs a command's `main` and ends the process with its exit code. One process of several skips
    what Python does at its end: gloo's threads outlive destroy_process_group where there was DDP,
    and one that lets go of a tensor while Python is being taken down aborts the process (SIGABRT,
    seen in 2 of 160)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return main()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):  # a message, as Python has it
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def end_silently():
    """Ends a process whose first peer says why all of them end. torchrun ends the others as soon as
    one has ended, so that one is given time to speak."""
    time.sleep(2)
    sys.exit(2)


# --------------------------------------------------------------------------------------- validation


@contextlib.contextmanager
def evaluating(model):
    """Eval mode, and afterwards the modes that were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def generating(model, processes):
    """Within this, the model may generate. The few steps of an answer are too short to compile for."""
    with evaluating(model), processes.autocast(), torch.compiler.set_stance("force_eager"):
        yield


def swap_neighbours(rows):
    """(B,...) -> the same rows, each in the place of its neighbour: 1, 0, 3, 2, ..."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def targets_and_masks(batch, device):
    """-> the targets of a batch; {"scored": which of them count, "has_image": which samples have one},
    each only where that is not all of them."""
    targets = batch["target_ids"]
    if targets.ndim == 2:  # packed ones are laid out on the CPU
        targets = targets.to(device, non_blocking=True)
    masks = {}
    if "scored" in batch:
        masks["scored"] = batch["scored"]  # left on the CPU: which they are is asked there, of no GPU
    has_image = batch.get("has_image")
    if has_image is not None and not has_image.all():
        masks["has_image"] = has_image
    return targets, masks


class Validation:
    """The loss on held-out pairs with their own and with other pairs' images: the difference is
    what the LLM sees."""

    def __init__(self, samples, micro_batch, processes, stop=None):
        """`stop`: the ids that end an answer; None: those that end a caption."""
        self.tok = samples.tok
        self.stop = stop or ((samples.tok.end_id,), (samples.tok.eos_id,))
        self.processes = processes
        count = int(samples.starts[-1]) // 2 * 2
        if count < 2:
            raise ValueError(f"validation needs at least two samples, and there are {samples.starts[-1]}")
        # neighbours lend each other their images, so no chunk separates two, whatever its size and
        # rank
        chunks = torch.arange(count).view(-1, 2).tensor_split(-(-count // max(2, micro_batch)))
        mine = chunks[processes.rank :: processes.world]
        rows = [chunk.flatten().tolist() for chunk in mine]
        self.batches = [samples.collate([samples[i, i] for i in some]) for some in rows]
        # into sharded blocks all processes go equally often
        if processes.mesh and len(rows) < -(-len(chunks) // processes.world):
            some = samples.collate([samples[i, i] for i in chunks[0].flatten().tolist()])
            self.batches.append(data.without_targets(some))
        bad = [message for batch in self.batches for message in batch["bad"]]
        self.bad = [("validation image left out", message) for message in bad]

    @torch.no_grad()
    def losses(self, model):
        """-> cross-entropy a token with matched images, and with shuffled ones."""
        sums = torch.zeros(3, dtype=torch.float64)
        device = self.processes.device
        for batch in self.batches:
            prompts = batch["prompt_ids"]
            targets, masks = targets_and_masks(batch, device)
            with evaluating(model), self.processes.autocast():
                if "queries" in batch:
                    sees = {"queries": batch["queries"].to(device)}
                else:
                    sees = model.see(batch["images"].to(device))
                matched, tokens = model(prompts, targets, **masks, **sees)
                others = {name: swap_neighbours(x) for name, x in sees.items()}
                shuffled, _ = model(prompts, targets, **masks, **others)
            sums += torch.stack([matched, shuffled, tokens]).double().cpu()
        matched, shuffled, tokens = self.processes.sum(*sums)
        return matched / tokens, shuffled / tokens

    def examples(self, model, count):
        """Lines with captions of the first validation images, or with the first answers about them, as
        people wrote them and as the model does."""
        batch = self.batches[0]
        images = batch["images"][:count].to(self.processes.device)
        which = {}
        if not batch["has_image"].all():
            which["has_image"] = batch["has_image"][:count]
        with generating(model, self.processes):
            answers = model.generate(batch["prompt_ids"][:count], images=images, stop=self.stop, **which)
        truths = batch["target_ids"]
        if "scored" in batch:
            first_answer = batch["scored"].long().cumprod(1).bool()
            truths = truths.masked_fill(~first_answer, data.PADDING)
        for file, truth, answer in zip(batch["files"], truths.tolist(), answers):
            truth = self.tok.decode(i for i in truth if i >= 0).strip()
            yield f"    {Path(file).name}: {self.tok.decode(answer).strip()}  (people: {truth})"


# ------------------------------------------------------------------------------- one optimizer step


def new_optimizer(model, stage):
    """AdamW for what trains in a stage. found_inf is what a GradScaler would give it: once it is 1,
    AdamW stands still."""
    groups = vpgtrans.parameter_groups(model, stage)
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=True)
    optimizer.found_inf = torch.zeros((), device=groups[0]["params"][0].device)
    return optimizer


def optimizer_step(trained, micro_batches, optimizer, processes, clip=None):
    """Forward, backward and update for one batch, of which this process has some micro-batches;
    `trained` is the model, or DDP around it.

    Each token counts alike, whichever process and micro-batch it is in: -> (their number in all,
    this process's loss sum, has any process been asked to stop). Where one process has no batch,
    micro_batches None, no process takes the step: -> None."""
    own_tokens = sum(data.count_targets(micro) for micro in micro_batches or ())
    tokens, stop, without = processes.sum(own_tokens, must_stop(), micro_batches is None)
    if without:
        return None
    loss_sum = torch.zeros((), device=processes.device)
    for i, micro in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        no_sync = contextlib.nullcontext() if last or processes.world == 1 else trained.no_sync()
        with no_sync, processes.autocast():
            kinds = [kind for kind in ("images", "features", "queries") if kind in micro]
            sees = {kind: micro[kind].to(processes.device, non_blocking=True) for kind in kinds}
            targets, masks = targets_and_masks(micro, processes.device)
            loss, _ = trained(micro["prompt_ids"], targets, **masks, **sees)
            # times world, since DDP takes the mean over processes
            (loss * (processes.world / tokens)).backward()
        loss_sum += loss.detach()
    # a gradient that is NaN or infinite stops AdamW by found_inf: nothing waits for the GPU, and
    # nothing is spoilt
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm(gradients)
    optimizer.found_inf = torch.maximum(optimizer.found_inf, (~norm.isfinite()).float())
    if clip:
        optimizer.grad_scale = (norm / clip).clamp(min=1)  # AdamW divides by it
    loss_sum += 0 * norm  # so that the step's loss is NaN, too, and the log finds it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return tokens, loss_sum, bool(stop)


# ------------------------------------------------------------------------------------------ one run


@dataclass
class Job:
    """One stage of a run: what trains, on which samples, in which order, for how many optimizer
    steps."""

    name: str
    stage: vpgtrans.Stage
    samples: data.Samples
    order: np.ndarray  # of data.plan
    steps: int

    def at(self, step):
        """Where a run stands after so many steps of this stage."""
        return {"stage": self.name, "step": step, "samples": step * self.stage.batch_size}


@dataclass
class Since:
    """What this process has done since the last line of the log, a loss and files for each step."""

    samples: int  # of the stage, by then
    seen: int = 0  # samples since the stage was entered, of all processes
    bad: int = 0  # images among these that could not be read
    lowest: float = math.inf  # loss in the log since the stage was entered or the loss last leapt up
    losses: list = field(default_factory=list)
    tokens: float = 0.0
    files: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    began: float = field(default_factory=time.time)

    def add(self, loss, tokens, micro_batches):
        self.losses.append(loss)
        self.tokens += tokens
        self.files.append([file for micro in micro_batches for file in micro["files"]])
        for micro in micro_batches:
            self.problems += [("unreadable image", message) for message in micro["bad"]]
            for file, known in micro["twins"].items():
                self.problems.append(("validation image in training", f"{file} looks like {known}"))


def peak_memory():
    """Bytes: of the GPU, or without one of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# A loss this many times its lowest has leapt up; the draw of samples alone moves it less.
RISE = 1.5


@dataclass
class Run:
    """What the stages of a run share: what is logged, saved and checked along the way."""

    args: argparse.Namespace  # of the command: out, micro_batch, workers, clip, gate, ..._every
    saved: dict  # with the state: arguments as JSON has them, the data sets' sizes, --init auto's start
    processes: Processes
    model: nn.Module
    validation: Validation
    log: runs.Log
    watch: Callable = None  # is told where the run stands, after each line of the log
    last_validation: tuple = None  # losses with matched and with shuffled images
    remedy: str = ""  # what to do when the loss is NaN or infinite, for people
    score: Callable = None  # model -> {name: number}, called by every process at each validation

    def write(self, at, **row):
        self.log.add(**at, **row)
        if self.watch:
            self.watch(at)

    def validate(self, at):
        """Logs, prints and draws how the model does at a step."""
        matched, shuffled = self.last_validation = self.validation.losses(self.model)
        row = {"val_loss": matched, "val_loss_shuffled": shuffled}
        said = f"step {at['step']:>6,}  validation loss {matched:.3f}, with shuffled images {shuffled:.3f}"
        if self.score:
            with generating(self.model, self.processes):
                row["scores"] = self.score(self.model)
            said += "".join(f", {name} {score:.1f}" for name, score in row["scores"].items())
        self.write(at, **row)
        self.processes.say(said)
        if self.processes.rank == 0 or self.processes.mesh:  # into sharded blocks all go together
            self.processes.say("\n".join(self.validation.examples(self.model, 2)))
        if self.processes.rank == 0:
            self.log.draw()

    def report(self, since, optimizer, at, lr, bar):
        """Looks at what has happened since the last line of the log, and writes the next. -> the
        Since to go on with"""
        losses = self.processes.sum(*since.losses)
        problems = self.processes.gather(since.problems)
        self.check_loss(losses, since.files, optimizer, at)
        self.log.report(problems)
        seconds = time.time() - since.began
        samples = at["samples"] - since.samples
        bad = since.bad + sum(problem == "unreadable image" for problem, _ in problems)
        loss = sum(losses) / since.tokens
        speed = samples / seconds
        memory = peak_memory()
        self.log.seconds += seconds
        self.write(at, loss=loss, lr=lr, samples_per_second=speed, peak_memory=memory,
                   bad_samples=bad)
        self.check_images(bad, since.seen + samples)
        bar.set_postfix(loss=f"{loss:.3f}", samples_per_second=f"{speed:.0f}")
        if bar.disable:  # what is printed goes into a file
            seconds_left = (bar.total - at["step"]) * seconds / len(losses)
            left = datetime.timedelta(seconds=round(seconds_left))
            self.processes.say(f"{at['stage']} {at['step']:,}/{bar.total:,}  loss {loss:.3f}  "
                               f"rate {lr:.3g}  {speed:,.0f} samples/s  {memory / 1e9:.1f} GB  "
                               f"{left} left in this stage")
        lowest = self.notice_rise(loss, since.lowest, lr, at)
        return Since(at["samples"], since.seen + samples, bad, lowest)

    def save(self, optimizer, at, name=runs.STATE):
        """Writes where the run stands, and the weights alone."""
        if self.processes.rank == 0:
            parameters = self.model.saved()
            state = {**at, "seconds": self.log.seconds, **self.saved}
            runs.save_state(self.args.out, parameters, optimizer, state, name)
            if name == runs.STATE:
                runs.save_model(self.args.out, parameters)
        self.processes.sum()  # nobody leaves while the first process writes: torchrun would end it

    def fail(self, message):
        """Ends a run in which all processes have found the same: the first one says what."""
        if self.processes.rank:
            end_silently()
        raise Failure(message)

    def check_loss(self, losses, files, optimizer, at):
        """Stops a run whose loss is NaN or infinite. `losses` and the `files` of this process, a
        step each, are the last ones before `at`; the optimizer has not moved since the first such
        loss."""
        wrong = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is None:
            return
        at = {**at, "step": at["step"] - len(losses) + wrong + 1}
        report = self.args.out / "broken.json"
        files = sorted(self.processes.gather(files[wrong]))
        if self.processes.rank == 0:
            text = json.dumps(at | {"loss": str(losses[wrong]), "files": files}, indent=2)
            runs.write(report, lambda file: file.write_text(text))
        self.save(optimizer, at, name="broken.safetensors")
        self.fail(f"the loss or its gradient at step {at['step']:,} of stage {at['stage']} is "
                  f"{losses[wrong]}. {report} names the samples of that step, broken.safetensors holds "
                  f"the weights and moments before it. {self.remedy}")

    def notice_rise(self, loss, lowest, lr, at):
        """Says so where the loss leaps up from its lowest so far. -> what the next is compared with"""
        if loss <= RISE * lowest:
            return min(loss, lowest)
        option = "--warm-up-lr" if at["stage"] == "warm-up" else "--lr"
        self.processes.say(f"step {at['step']:>6,}  the loss has risen from {lowest:.3f} to {loss:.3f} at "
                           f"rate {lr:.3g}: if it stays up, begin anew with a lower {option}")
        return loss

    def check_images(self, bad, seen):
        """Stops a run too many of whose images cannot be read."""
        if bad > self.args.max_bad * max(seen, 1000):
            self.fail(f"{bad} of {seen} images could not be read, more than --max-bad "
                      f"{self.args.max_bad:g}; {self.log.bad_data} says which")

    def check_gate(self):
        """Stops a run after the warm-up if its LLM does not look at the images."""
        matched, shuffled = self.last_validation or self.validation.losses(self.model)
        if self.args.gate and not shuffled - matched >= self.args.gate:
            self.fail(f"after the warm-up, the validation loss is {matched:.3f} with the right images "
                      f"and {shuffled:.3f} with shuffled ones: the LLM does not use the image (--gate "
                      f"{self.args.gate:g}). Look at whether captions fit their images (python pairs.py "
                      f"SPEC), at --src, and at the curves in {self.args.out}; try more --warm-up-steps or "
                      "another --warm-up-lr in a new --out. The state is saved: the same command with "
                      "--resume --gate 0 goes on regardless")


# ---------------------------------------------------------------------------------------- one stage


def describe_stage(name, stage, steps, available, table):
    """What is printed on entering a stage over so many available samples: its length and rate, and
    the table of what trains."""
    samples = steps * stage.batch_size
    yield (f"\nstage {name}: {steps:,} steps of {stage.batch_size:,} = {samples:,} samples, "
           f"{samples / available:.2g} epochs; rate {stage.lr:g} -> {stage.final_lr:g}")
    yield f"  {'part':24} {'parameters':>14} {'trainable':>14}  mode"
    for part, total, trainable, mode in table:
        yield f"  {part:24} {total:14,} {trainable:14,}  {mode}"


def compile_layers(model):
    """torch.compile of the repeated blocks. All layers of a kind share one limit of recompilations:
    train and eval, several stages, odd last batches."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        block.compile()


def begin_stage(run, job, resumed):
    """What trains in a stage does, and what was saved is back. -> (the optimizer, the first step)"""
    model, stage = run.model, job.stage
    table = vpgtrans.enter_stage(model, stage)
    lines = describe_stage(job.name, stage, job.steps, job.samples.starts[-1], table)
    run.processes.say("\n".join(lines))
    optimizer = new_optimizer(model, stage)
    if not resumed:
        return optimizer, 0
    state, tensors = resumed
    runs.restore(model.saved(), optimizer, tensors)
    if run.processes.rank == 0:  # a kill may have come between the two files of a save
        runs.save_model(run.args.out, model.saved())
    return optimizer, state["step"]


def next_batch(batches, least=0):
    """-> (this process's micro-batches of the next step, None); or (None, why there are none). Where they
    are fewer than `least`, more follow of which no token counts."""
    try:
        batch = next(batches)
        return batch + [data.without_targets(batch[-1])] * (least - len(batch)), None
    except (OSError, data.Stopped) as error:
        return None, error


def where_it_stands(run, at):
    """Where a run ends before its end, and how it goes on, as a message does."""
    place = f"at step {at['step']:,} of stage {at['stage']}"
    if (run.args.out / runs.STATE).is_file():
        return f"{place}; the same command with --resume goes on from there"
    return f"{place}; no state is saved yet, so the same command begins anew"


def end_stopped(run, at):
    """Says where a run that was asked to stop stands, and ends it."""
    run.processes.say(f"stopped {where_it_stands(run, at)}")
    sys.exit(130)


def leave_between_steps(run, optimizer, since, at, error, bar):
    """Saves and ends a run to which no more batches come, or that was asked to stop while it waited
    for one; `error` says so on the processes that it happened to."""
    errors = run.processes.gather([error] if error else [])
    if at["step"]:
        if since.losses:  # no state is saved whose loss was not looked at
            run.report(since, optimizer, at, optimizer.param_groups[0]["lr"], bar)
        run.save(optimizer, at)
    for error in errors:
        if not isinstance(error, data.Stopped):
            run.fail(f"{error}. The run ends {where_it_stands(run, at)}")
    end_stopped(run, at)


def train_stage(run, job, resumed=None):
    """One stage, from its first step or from where `resumed`, load_state's (state, tensors), stands."""
    args, processes, model, stage = run.args, run.processes, run.model, job.stage
    optimizer, first = begin_stage(run, job, resumed)
    trained = model
    if processes.world > 1:
        # buffers follow from config.json, in every process; DDP passes over what is frozen, sharded or not
        trained = nn.parallel.DistributedDataParallel(model, init_sync=False, **NO_BUFFERS)
    # sharded blocks are entered by all processes equally often: with as many micro-batches as the first has
    share = -(-stage.batch_size // processes.world)
    least = -(-share // args.micro_batch) if processes.mesh else 0
    val_every = args.val_every or max(1, job.steps // 10)
    if first == 0:
        run.validate(job.at(0))
    since = Since(job.at(first)["samples"])
    batches = data.load_batches(job.samples, job.order, stage.batch_size, args.micro_batch,
                                processes.rank, processes.world, first, args.workers,
                                must_stop)
    bar = tqdm(total=job.steps, initial=first, desc=job.name, unit="step",
               disable=processes.hides_bars)
    with contextlib.closing(batches), bar:
        for step in range(first, job.steps):
            micro_batches, error = next_batch(batches, least)
            lr = vpgtrans.learning_rate(stage, step, job.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # dropout is a function of seed, step and rank, so that a resumed run draws what it
            # would have drawn
            torch.manual_seed(hash((job.samples.seed, step, processes.rank)))
            taken = optimizer_step(trained, micro_batches, optimizer, processes, args.clip)
            if taken is None:
                leave_between_steps(run, optimizer, since, job.at(step), error, bar)
            tokens, loss, stop = taken
            since.add(loss, tokens, micro_batches)

            at = job.at(step + 1)
            last = step + 1 == job.steps
            save = last or stop or (step + 1) % args.save_every == 0
            # no state is saved whose loss was not looked at
            if save or (step + 1) % args.log_every == 0:
                since = run.report(since, optimizer, at, lr, bar)
            bar.update()
            if last or (step + 1) % val_every == 0:
                pause = time.time()
                run.validate(at)
                since.began += time.time() - pause
            if save:
                run.save(optimizer, at)
            if stop:
                end_stopped(run, at)
