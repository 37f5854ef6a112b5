"""Move the visual prompt generator of one vision-language model to another language model.

    torchrun --nproc-per-node 8 train.py --src opt-2.7b --tgt opt-6.7b     # the paper's run, on what lies under datasets/
    python train.py --src demo/source --tgt demo/target --data demo/pairs/train.jsonl --batch-size 64 --steps 240

and the paper's baselines with the same loop: --init random (no word converter), --no-warm-up --init random (VPG
inheritance alone), --from-scratch (TFS). A run writes OUT/: model.safetensors, config.json, metrics.jsonl, curves.png, bad_data.jsonl (which
pairs were left out, and why), and resume.safetensors, from which --resume continues a killed one with the same losses. --src takes
such a folder, so that transfers chain.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import estimate
import prepare
import runs
import vpgtrans
from vpgtrans import STAGES

# ------------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_argument_group("models: a short name (opt-2.7b), a Hub id, a folder, or a run of ours")
    models.add_argument("--src", required=True, help="the vision-language model whose VPG moves, such as BLIP-2")
    models.add_argument("--tgt", required=True, help="the language model that it moves to")
    models.add_argument("--tgt-tokenizer", metavar="NAME", help="where the target's tokenizer is, if not with the target: lmsys/vicuna-* "
                        "lack a tokenizer.json, and huggyllama/llama-7b has the same one")
    models.add_argument("--image-size", type=int, metavar="PIXELS", help="of the images that the ViT reads (default: the source's); its "
                        "position embeddings are interpolated for another size")
    models.add_argument("--out", type=Path, help="folder of this run (default: out/<src>-to-<tgt>)")
    method = parser.add_argument_group("method: without any of these, VPGTrans as in the paper")
    method.add_argument("--init", choices=("converter", "captions", "random"), default="converter", help="start of the "
                        "projector: the source's, merged with the word converter; or fitted to what its soft prompts mean in the captions of a thousand "
                        "images (not of the paper; it wants no high --warm-up-lr); or random (default: %(default)s)")
    method.add_argument("--no-warm-up", action="store_true", help="skip the training of stage 1; with --init random, this is the paper's "
                        "VPG inheritance")
    method.add_argument("--from-scratch", nargs="?", const="", metavar="VPG", help="baseline: a random Q-Former (or that of "
                        "VPG, a first-stage BLIP-2) and a random projector, trained jointly; the ViT is still the source's, which may be "
                        "CLIP alone: openai/clip-vit-large-patch14")
    method.add_argument("--vit-layers", type=int, metavar="N", help="with --from-scratch: read features after block N of the ViT (default: "
                        "the last; of CLIP ViT-L's 24, the paper's runs keep 21, LAVIS 23)")
    method.add_argument("--stage", choices=("warm-up", "fine-tune"), help="run one stage alone")
    pairs = parser.add_argument_group("data: without --data, the paper's sets and mixture, from datasets/ or $VPGTRANS_DATA")
    spec = "[NAME=]SOURCE[@IMAGES][:WEIGHT]"
    pairs.add_argument("--data", action="append", metavar=spec, help="image-text pairs: .jsonl, .json, .csv or .tsv of image and caption, COCO "
                       "captions, a folder of images with .txt beside them, or shards (laion/{00000..01299}.tar); may be given several "
                       "times, and is mixed by WEIGHT where that is given. python data.py SOURCE shows what is in it")
    pairs.add_argument("--warm-up-data", action="append", metavar=spec, help="other pairs for stage 1 (default: as --data)")
    pairs.add_argument("--captions", choices=("each", "one", "packed"), default="each", help="a sample is each caption, as in the paper; or an "
                       "image with one of its captions, drawn anew each time; or an image with all of them (16 at most) packed behind one "
                       "prefix, which is read once: less than half the work for COCO's five, in twice the memory a sample; weights and the paper's "
                       "13M then count captions, batches images; not for T5 (default: %(default)s)")
    pairs.add_argument("--val", metavar=spec, help="validation pairs (default: 5%% of the images, 500 at most, are held out)")
    pairs.add_argument("--val-samples", type=int, default=500, help="validation images at most (default: %(default)s)")
    pairs.add_argument("--augment", choices=("crop", "none"), default="crop", help="random crops of 50-100%% and flips, or plain "
                       "resizing (default: %(default)s)")
    pairs.add_argument("--max-tokens", type=int, default=32, help="of a caption, its end mark included (default: %(default)s)")
    pairs.add_argument("--max-bad", type=float, default=0.01, help="stop when more than this share of a set's annotations is unusable, "
                       "or of the images cannot be read (default: %(default)s)")
    length = parser.add_argument_group("length and rate: the defaults are the paper's")
    length.add_argument("--batch-size", type=int, help="samples an optimizer step, over all GPUs (default: 1728)")
    length.add_argument("--warm-up-steps", type=int, help="optimizer steps of stage 1 (default: one epoch)")
    length.add_argument("--steps", type=int, help="optimizer steps of stage 2, or from scratch (default: 13M samples with the "
                        "paper's data, at most 10 epochs of --data; from scratch 10 epochs)")
    length.add_argument("--lr", type=float, help="peak rate of stage 2, or from scratch (default: 1e-4)")
    length.add_argument("--warm-up-lr", type=float, help="rate of stage 1 (default: 5 x --lr)")
    length.add_argument("--clip", type=float, metavar="NORM", help="scale gradients down to this norm where theirs is larger (default: never, as the paper)")
    length.add_argument("--seed", type=int, default=0, help="a run is a function of its arguments and this (default: %(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--micro-batch", type=int, help="samples at a time on one GPU; but for the draws of dropout, the result is the "
                         "same whatever it is (default: what should fit into the GPU's memory, 36 at most)")
    machine.add_argument("--dry-run", nargs="?", const="", metavar="CARD", help="print what would train, how long, and the memory, operations and hours that "
                         f"it should take on CARD ({', '.join(estimate.CARDS)}; default: what is found here), and load no weights")
    machine.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of frozen weights and of the arithmetic; "
                         "trained weights are always float32 (default: %(default)s)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                         help="torch.compile the repeated blocks (default: on GPUs)")
    machine.add_argument("--workers", type=int, default=min(8, os.cpu_count() // 2), help="processes that read images, for each "
                         "GPU (default: %(default)s)")
    machine.add_argument("--cache", type=Path, metavar="DIR", help="keep there what the frozen VPG makes of each image of stage 1 (49 KB in bf16), "
                         "computed once for all runs with this VPG and data; stage 1 then sees images without crops")
    machine.add_argument("--gate", type=float, default=0.01, metavar="LOSS", help="after the warm-up, stop unless shuffled images raise the "
                         "validation loss by at least this: else the LLM does not look at them, and days of fine-tuning would be in vain; "
                         "0: never (default: %(default)s)")
    machine.add_argument("--resume", action="store_true", help="continue the run in --out where it stands")
    log = parser.add_argument_group("log")
    log.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="(default: %(default)s)")
    log.add_argument("--val-every", type=int, metavar="STEPS", help="(default: ten times a stage)")
    log.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for one, other in (("from_scratch", "no_warm_up"), ("from_scratch", "stage"), ("no_warm_up", "stage")):
        if getattr(args, one) not in (None, False) and getattr(args, other):
            parser.error(f"--{one.replace('_', '-')} and --{other.replace('_', '-')} exclude each other")
    for name in ("image_size", "vit_layers", "steps", "warm_up_steps", "batch_size", "micro_batch", "val_samples", "log_every", "val_every", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name, least in (("lr", 0), ("warm_up_lr", 0), ("clip", 0), ("max_tokens", 1)):
        if getattr(args, name) is not None and not getattr(args, name) > least:
            parser.error(f"--{name.replace('_', '-')} must be above {least}")
    if args.from_scratch is not None and args.init != "converter":
        parser.error("--from-scratch has a random projector; --init is for the transfer of a VPG")
    if args.vit_layers and args.from_scratch != "":
        parser.error("--vit-layers is for --from-scratch with a random Q-Former: a Q-Former that was trained on one block's features does not read another's")
    if args.cache and "warm-up" not in prepare.plan_stages(args):
        parser.error("--cache is for stage 1, which this run has not: only there the VPG stands still")
    if args.warm_up_data and not args.data:
        parser.error("--warm-up-data needs --data, for the other stage")
    args.out = args.out or Path("out") / f"{Path(args.src).name}-to-{Path(args.tgt).name}"
    return args


# -------------------------------------------------------------------------------------------------------------- validation


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


class Validation:
    """The loss on held-out pairs with their own and with other pairs' images: the difference is what the LLM sees."""

    def __init__(self, samples, micro_batch, processes):
        self.tok, self.processes, count = samples.tok, processes, int(samples.starts[-1]) // 2 * 2
        if count < 2:
            raise ValueError("validation needs at least two images; see --val")
        # neighbours lend each other their images: pairs that no chunk separates, whatever its size and rank
        chunks = torch.arange(count).view(-1, 2).tensor_split(-(-count // max(2, micro_batch)))[processes.rank :: processes.world]
        self.batches = [samples.collate([samples[i, i] for i in chunk.flatten().tolist()]) for chunk in chunks if len(chunk)]
        self.bad = [("validation image left out", message) for batch in self.batches for message in batch["bad"]]

    @torch.no_grad()
    def losses(self, model):
        """-> cross-entropy a token with matched images, and with shuffled ones."""
        sums, device = torch.zeros(3, dtype=torch.float64), self.processes.device
        for batch in self.batches:
            prompts, targets = batch["prompt_ids"], batch["target_ids"].to(device)
            with evaluating(model), self.processes.autocast():
                queries = model.vpg(data.normalise(batch["images"].to(device)))
                matched, tokens = model(prompts, targets, queries=queries)
                shuffled, _ = model(prompts, targets, queries=queries.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
            sums += torch.stack([matched, shuffled, tokens]).double().cpu()
        matched, shuffled, tokens = self.processes.sum(*sums)
        return matched / tokens, shuffled / tokens

    def examples(self, model, count):
        """Lines with captions of the first validation images, as people wrote them and as the model does."""
        batch, device = self.batches[0], self.processes.device
        with evaluating(model), self.processes.autocast(), torch.compiler.set_stance("force_eager"):  # too short to compile for
            ids = model.generate(batch["prompt_ids"][:count], images=data.normalise(batch["images"][:count].to(device)),
                                 stop=((self.tok.end_id,), (self.tok.eos_id,)))
        for file, truth, answer in zip(batch["files"], batch["target_ids"].tolist(), ids):
            truth = self.tok.decode(i for i in truth if i >= 0)
            yield f"    {Path(file).name}: {self.tok.decode(answer).strip()}  (people: {truth.strip()})"


# -------------------------------------------------------------------------------------------------------------------- loop

stop_asked = threading.Event()


def ask_to_stop(number, _):
    """On SIGTERM or SIGINT: the run is saved after the next step; a second Ctrl-C ends it at once. SIGTERM comes several times
    where a scheduler and torchrun both send it."""
    stop_asked.set()
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


@dataclasses.dataclass
class Since:
    """What this process has done since the last line of the log, a loss and files for each step."""

    samples: int  # of the stage, by then
    seen: int = 0  # samples since the stage was entered, of all processes
    bad: int = 0  # images among these that could not be read
    losses: list = dataclasses.field(default_factory=list)
    tokens: float = 0.0
    files: list = dataclasses.field(default_factory=list)
    problems: list = dataclasses.field(default_factory=list)
    began: float = dataclasses.field(default_factory=time.time)

    def add(self, loss, tokens, micro_batches):
        self.losses.append(loss)
        self.tokens += tokens
        self.files.append([file for micro in micro_batches for file in micro["files"]])
        for micro in micro_batches:
            self.problems += [("unreadable image", message) for message in micro["bad"]]
            self.problems += [("validation image in training", f"{file} looks like {known}") for file, known in micro["twins"].items()]


@dataclasses.dataclass
class Run:
    """What the stages of a run share."""

    args: argparse.Namespace
    processes: prepare.Processes
    model: vpgtrans.VisualLLM
    validation: Validation
    log: runs.Log
    gate: tuple = None  # the last validation losses, with matched and with shuffled images

    def validate(self, at):
        """Logs, prints and draws how the model does at a step."""
        matched, shuffled = self.gate = self.validation.losses(self.model)
        self.log.add(**at, val_loss=matched, val_loss_shuffled=shuffled)
        self.processes.say(f"step {at['step']:>6,}  validation loss {matched:.3f}, with shuffled images {shuffled:.3f}")
        if self.processes.rank == 0:
            self.processes.say("\n".join(self.validation.examples(self.model, 2)))
            self.log.draw()

    def report(self, since, optimizer, at, lr, bar):
        """Looks at what has happened since the last line of the log, and writes the next. -> the Since to go on with"""
        losses, problems = self.processes.sum(*since.losses), self.processes.gather(since.problems)
        self.check_loss(losses, since.files, optimizer, at)
        self.log.report(problems)
        seconds, samples = time.time() - since.began, at["samples"] - since.samples
        bad, loss, speed = since.bad + sum(problem == "unreadable image" for problem, _ in problems), sum(losses) / since.tokens, samples / seconds
        self.log.seconds += seconds
        self.log.add(**at, loss=loss, lr=lr, samples_per_second=speed, peak_memory=peak_memory(), bad_samples=bad)
        self.check_images(bad, since.seen + samples)
        bar.set_postfix(loss=f"{loss:.3f}", samples_per_second=f"{speed:.0f}")
        if bar.disable:  # what is printed goes into a file
            left = datetime.timedelta(seconds=round((bar.total - at["step"]) * seconds / len(losses)))
            self.processes.say(f"{at['stage']} {at['step']:,}/{bar.total:,}  loss {loss:.3f}  rate {lr:.3g}  {speed:,.0f} samples/s  "
                               f"{peak_memory() / 1e9:.1f} GB  {left} left in this stage")
        return Since(at["samples"], since.seen + samples, bad)

    def save(self, optimizer, at, name=runs.STATE):
        """Writes where the run stands, and the weights alone."""
        if self.processes.rank == 0:
            parameters = vpgtrans.blip2_names(self.model)
            state = {**at, "seconds": self.log.seconds, "arguments": prepare.arguments(self.args)}
            runs.save_state(self.args.out, parameters, optimizer, state, name)
            if name == runs.STATE:
                runs.save_model(self.args.out, parameters)
        self.processes.sum()  # nobody leaves while the first process writes: torchrun would end it

    def fail(self, error):
        """Ends a run in which all processes have found the same error."""
        fail(error) if self.processes.rank == 0 else sys.exit(2)

    def check_loss(self, losses, files, optimizer, at):
        """Stops a run whose loss is no number any more. `losses` and the `files` of this process, a step each, are the last
        ones before `at`; the optimizer has not moved since the first that is none."""
        wrong = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is None:
            return
        at, out = {**at, "step": at["step"] - len(losses) + wrong + 1}, self.args.out
        files = sorted(self.processes.gather(files[wrong]))
        if self.processes.rank == 0:
            runs.write(out / "broken.json", lambda file: file.write_text(json.dumps(at | {"loss": str(losses[wrong]), "files": files}, indent=2)))
        self.save(optimizer, at, name="broken.safetensors")
        self.fail(f"the loss or its gradient at step {at['step']:,} of stage {at['stage']} is {losses[wrong]}. {out / 'broken.json'} names the samples of "
                  f"that step, broken.safetensors holds the weights and moments before it. To go on from the weights last saved, with another rate or "
                  f"precision: --src {out} --no-warm-up --lr ... --precision ... and a new --out")

    def check_images(self, bad, seen):
        """Stops a run too many of whose images cannot be read."""
        if bad > self.args.max_bad * max(seen, 1000):
            self.fail(f"{bad} of {seen} images could not be read, more than --max-bad {self.args.max_bad:g}; {self.log.bad_data} says which")

    def check_gate(self):
        """Stops a run after the warm-up if its LLM does not look at the images."""
        matched, shuffled = self.gate or self.validation.losses(self.model)
        if self.args.gate and not shuffled - matched >= self.args.gate:
            self.fail(f"after the warm-up, the validation loss is {matched:.3f} with the right images and {shuffled:.3f} with shuffled ones: the LLM does not "
                      f"use the image (--gate {self.args.gate:g}). Look at whether captions fit their images (python data.py SPEC), at --src, and at "
                      f"the curves in {self.args.out}; try more --warm-up-steps or another --warm-up-lr in a new --out. The state is saved: the same command "
                      "with --resume --gate 0 goes on regardless")


def optimizer_step(trained, micro_batches, optimizer, processes, clip=None):
    """Forward, backward and update for one batch, of which this process has some micro-batches; `trained` is the model, or
    DDP around it.

    Each token counts alike, whichever process and micro-batch it is in: -> (their number in all, this process's loss sum, has
    any process been asked to stop)."""
    tokens, stop = processes.sum(sum((micro["target_ids"] != -100).sum() for micro in micro_batches), stop_asked.is_set())
    loss_sum = torch.zeros((), device=processes.device)
    for i, micro in enumerate(micro_batches):
        more = i < len(micro_batches) - 1
        with trained.no_sync() if more and processes.world > 1 else contextlib.nullcontext(), processes.autocast():
            sees = {key: micro[key].to(processes.device, non_blocking=True) for key in ("images", "queries") if key in micro}
            if "images" in sees:
                sees["images"] = data.normalise(sees["images"])
            targets = micro["target_ids"]
            if targets.ndim == 2:  # packed ones are laid out on the CPU
                targets = targets.to(processes.device, non_blocking=True)
            loss, _ = trained(micro["prompt_ids"], targets, **sees)
            (loss * (processes.world / tokens)).backward()  # times world: DDP takes the mean over processes
        loss_sum += loss.detach()
    # once a gradient is no number, AdamW stands still, as under a GradScaler: nothing waits for that, and nothing is spoilt
    norm = nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
    optimizer.found_inf = torch.maximum(optimizer.found_inf, (~norm.isfinite()).float())
    if clip:
        optimizer.grad_scale = (norm / clip).clamp(min=1)  # AdamW divides by it
    loss_sum += 0 * norm  # the loss of a step whose gradient is no number is none, either
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return tokens, loss_sum, bool(stop)


def train_stage(run, name, stage, samples, order, steps, resumed=None):
    """One stage from its first step, or from where `resumed`, the (state, tensors) of load_state, stands."""
    args, processes, model = run.args, run.processes, run.model
    processes.say(prepare.describe_stage(name, stage, steps, samples.starts[-1], vpgtrans.enter_stage(model, stage)))
    if samples.sets[0].cache:
        prepare.fill_cache(args, samples.sets, model.vpg, processes, stop_asked.is_set)
    optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(model, stage), lr=stage.lr, betas=stage.betas, fused=True)
    optimizer.found_inf = torch.zeros((), device=processes.device)
    if resumed:
        runs.restore(vpgtrans.blip2_names(model), optimizer, resumed[1])
        if processes.rank == 0:  # a kill may have come between the two files of a save
            runs.save_model(args.out, vpgtrans.blip2_names(model))
    first = resumed[0]["step"] if resumed else 0
    trained = nn.parallel.DistributedDataParallel(model, init_sync=False) if processes.world > 1 else model
    val_every = args.val_every or max(1, steps // 10)
    at = lambda step: {"stage": name, "step": step, "samples": step * stage.batch_size}
    if first == 0:
        run.validate(at(0))
    since, quiet = Since(at(first)["samples"]), None if processes.rank == 0 else True  # None: where there is no terminal
    batches = data.load_batches(samples, order, stage.batch_size, args.micro_batch, processes.rank, processes.world, first, args.workers)
    with contextlib.closing(batches), tqdm(total=steps, initial=first, desc=name, unit="step", disable=quiet) as bar:
        for step in range(first, steps):
            micro_batches, lr = next(batches), vpgtrans.learning_rate(stage, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # dropout is a function of the stage's seed, step and rank, so that a resumed run draws what it would have drawn
            torch.manual_seed(hash((samples.seed, step, processes.rank)))
            tokens, loss, stop = optimizer_step(trained, micro_batches, optimizer, processes, args.clip)
            since.add(loss, tokens, micro_batches)
            done = at(step + 1)
            save = done["step"] % args.save_every == 0 or done["step"] == steps or stop
            if done["step"] % args.log_every == 0 or save:  # no state is saved whose loss was not looked at
                since = run.report(since, optimizer, done, lr, bar)
            bar.update()
            if done["step"] % val_every == 0 or done["step"] == steps:
                pause = time.time()
                run.validate(done)
                since.began += time.time() - pause
            if save:
                run.save(optimizer, done)
            if stop:
                processes.say(f"stopped at step {done['step']:,} of stage {name}; the same command with --resume continues")
                sys.exit(130)


def peak_memory():
    """Bytes: of the GPU, or without one of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fail(error):
    """Ends the command with a message for people and exit code 2."""
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(2)


def set_up(args, stages):
    """Everything that can be wrong with arguments, files and folders, before anything long begins.

    -> (the Run, {stage: (samples, order, steps)}, the state to resume from or None)"""
    if int(os.environ.get("RANK", 0)) == 0:  # before others wait: what the first process alone looks at, fetches and makes
        if not args.resume and any((args.out / file).exists() for file in ("resume.safetensors", "model.safetensors")):
            raise FileExistsError(f"{args.out}: already holds a run; continue it with --resume, or name another --out")
        prepare.find_models(args)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            prepare.find_data(args, stages, lambda _: None)  # a large scan is kept, and the others need not make it
        for folder in [args.out] + [args.cache] * bool(args.cache):
            runs.check_writable(folder)
    processes = prepare.Processes.start(args.precision)
    src, tgt = prepare.find_models(args)
    shapes = prepare.shape_model(args, src, tgt)
    prepare.check_disk(args.out, shapes)
    sets, val = prepare.find_data(args, stages, processes.say)
    args.micro_batch = prepare.choose_micro_batch(args, stages, sets, shapes, data.load_tokenizer(tgt.tokenizer), processes)
    sizes = {name: data.sizes(pairs, args.captions) for name, (pairs, _) in sets.items()}
    mixtures = {name: prepare.mixture(args, *of_stage) for name, of_stage in sets.items()}  # (shares of samples, captions a sample)
    steps = {name: prepare.plan_length(args, name, stage, sum(sizes[name]), mixtures[name][1], processes.world) for name, stage in stages.items()}
    resumed = runs.load_state(args.out, processes.say) if args.resume else None
    if resumed:
        prepare.check_same_run(args, resumed[0])
    model, tok = prepare.build_model(args, src, tgt, sets[list(stages)[0]][0], processes, resumed is not None)
    new_samples = lambda pairs, **options: data.Samples(pairs, tok, model.vpg.image_size, model.vpg.num_query_tokens, args.max_tokens, **options)
    validation, log = Validation(new_samples([val], augment=False, split=False), args.micro_batch, processes), runs.Log(args.out, processes.rank)
    known = data.Lookalikes(val.files())
    jobs = {}
    for name, (pairs, _) in sets.items():
        weights = mixtures[name][0]
        seed = args.seed * len(STAGES) + list(STAGES).index(name)  # each stage has an order and crops of its own
        samples = steps[name] * stages[name].batch_size
        if weights:
            epochs = (f"{p.name} {samples * weight / sum(weights) / size:.2g}" for p, weight, size in zip(pairs, weights, sizes[name]))
            processes.say(f"stage {name}: epochs of each data set in its {samples:,} samples: {', '.join(epochs)}")
        order = data.plan(sizes[name], samples, seed, weights)
        if args.cache and name == "warm-up" and not (resumed and resumed[0]["stage"] != name):
            pairs = prepare.open_caches(args, pairs, model.vpg, processes.say)
        jobs[name] = new_samples(pairs, captions=args.captions, augment=args.augment == "crop", known=known, seed=seed), order, steps[name]
    if resumed:
        log.continue_from(list(stages), resumed[0])
    elif processes.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        runs.write(args.out / "config.json", lambda file: file.write_text(json.dumps(prepare.run_config(args, src, tgt, model), indent=2)))
        whole = {id(p.left_out): p for p in [*itertools.chain(*(pairs for pairs, _ in sets.values())), val]}  # what several stages read, once
        log.begin((problem, where) for p in whole.values() for problem, places in p.left_out.items() for where in places)
    log.report(processes.gather(validation.bad))
    return Run(args, processes, model, validation, log), jobs, resumed


def main(argv=None):
    args = parse_arguments(argv)
    stages = prepare.plan_stages(args)
    try:
        if args.dry_run is not None:
            return prepare.dry_run(args, stages) if int(os.environ.get("RANK", 0)) == 0 else None
        run, jobs, resumed = set_up(args, stages)
    except (OSError, ValueError) as error:
        fail(error)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # all layers share it: train and eval, both stages, odd last batches
        for block in [*run.model.vpg.layers, *run.model.llm.layers]:
            block.compile()
    stop_asked.clear()
    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for name in list(stages)[list(stages).index(resumed[0]["stage"]) if resumed else 0 :]:
            train_stage(run, name, stages[name], *jobs[name], resumed)
            resumed = None
            if name == "warm-up" and "fine-tune" in stages:
                run.check_gate()
    except torch.OutOfMemoryError as error:
        fail(f"GPU memory ran out with --micro-batch {args.micro_batch}: lower it, the result stays the same but for the draws of dropout; with "
             f"--resume if a state was saved already; --dry-run says what should fit ({error})")
    except OSError as error:
        fail(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if run.processes.rank == 0:
        (args.out / runs.PREVIOUS).unlink(missing_ok=True)
    lengths = ", then ".join(f"{name} {steps:,} steps" for name, (_, _, steps) in jobs.items())
    run.processes.say(f"\n{args.src} -> {args.tgt}: {lengths}, {run.log.seconds:.0f} s of training.\n"
                      f"Weights, metrics and curves are in {args.out}/. Try: python sample.py IMAGE --model {args.out}")
    if run.processes.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
