"""Move the visual prompt generator of one vision-language model to another language model.

    torchrun --nproc-per-node 8 train.py --src opt-2.7b --tgt opt-6.7b
    python train.py --src demo/source --tgt demo/target --data demo/pairs/train.tar --steps 240

and the paper's baselines with the same loop: --init random (no word converter), --no-warm-up --init
random (VPG inheritance alone), --from-scratch (TFS).

A run writes OUT/: model.safetensors, config.json, metrics.jsonl, curves.png, bad_data.jsonl (which
pairs were left out, and why), and resume.safetensors, from which --resume continues a killed one
with the same losses. --src takes such a folder, so that transfers chain.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import cache
import captioning
import data
import estimate
import evaluate
import hub
import loop
import runs
import transfer
import vpgtrans
from pairs import (
    Pairs,
    hold_out,
    is_shard,
    one_caption_per_image,
    parse_spec,
    read_pairs,
    read_pictures,
)
from vpgtrans import STAGES

# ---------------------------------------------------------------------------------------- arguments

SPEC = "[NAME=]SOURCE[#SPLIT][@IMAGES][:WEIGHT]"


def add_models(parser):
    models = parser.add_argument_group("models: a short name (opt-2.7b), a Hub id, a folder, or a "
                                       "run of ours")
    models.add_argument("--src", required=True,
                        help="the vision-language model whose VPG moves, such as BLIP-2")
    models.add_argument("--tgt", required=True, help="the language model that it moves to")
    models.add_argument("--tgt-tokenizer", metavar="NAME",
                        help="where the target's tokenizer is, if not with the target: "
                             "lmsys/vicuna-* lack a tokenizer.json, and huggyllama/llama-7b has "
                             "the same one")
    models.add_argument("--image-size", type=int, metavar="PIXELS",
                        help="of the images that the ViT reads (default: the source's); its "
                             "position embeddings are interpolated for another size")
    models.add_argument("--out", type=Path, help="folder of this run (default: out/<src>-to-<tgt>)")


def add_method(parser):
    method = parser.add_argument_group("method: without any of these, VPGTrans by the paper's recipe")
    method.add_argument("--init", choices=("converter", "captions", "random", "auto"),
                        default="converter",
                        help="start of the projector. converter: the source's, merged with the word "
                             "converter, as in the paper, by least squares; captions: fitted to what "
                             "its soft prompts mean in the captions of "
                             f"{transfer.LOOKS} images; random; auto: the one of these whose loss is "
                             f"lowest after {transfer.TRIAL_STEPS} steps, each at the best of a few "
                             "rates, half of which is then the warm-up's unless --warm-up-lr is "
                             "given (default: %(default)s)")
    method.add_argument("--ridge", type=float, default=vpgtrans.RIDGE,
                        help="of the word converter, relative to the mean variance of the source's "
                             "word embeddings (default: %(default)g; 0.001 in runs before "
                             "25 November 2026)")
    method.add_argument("--no-warm-up", action="store_true",
                        help="skip the training of stage 1; with --init random, this is the "
                             "paper's VPG inheritance")
    method.add_argument("--from-scratch", nargs="?", const="", metavar="VPG",
                        help="baseline: a random Q-Former (or that of VPG, a first-stage BLIP-2 as "
                             "Salesforce/blip2-itm-vit-g, the paper's baseline) and a random "
                             "projector, trained jointly; the ViT is still the "
                             "source's, which may be CLIP alone: openai/clip-vit-large-patch14")
    method.add_argument("--vit-layers", type=int, metavar="N",
                        help="with --from-scratch: read features after block N of the ViT "
                             "(default: the last; of CLIP ViT-L's 24, the paper's runs keep 21, "
                             "LAVIS 23)")
    method.add_argument("--stage", choices=("warm-up", "fine-tune"), help="run one stage alone")


def add_data(parser):
    pairs = parser.add_argument_group("data: without --data, the paper's sets and mixture, from "
                                      "datasets/ or $VPGTRANS_DATA")
    pairs.add_argument("--data", action="append", metavar=SPEC,
                       help="image-text pairs: .jsonl, .json, .csv or .tsv of image and caption, "
                            "COCO captions, a folder of images with .txt beside them, or shards "
                            "(laion/{00000..01299}.tar); may be given several times, and is mixed "
                            "by WEIGHT where that is given. python pairs.py SOURCE shows what is "
                            "in it")
    pairs.add_argument("--warm-up-data", action="append", metavar=SPEC,
                       help="other pairs for stage 1 (default: as --data)")
    pairs.add_argument("--captions", choices=("each", "one", "packed"), default="each",
                       help="a sample is each caption, as in the paper; or an image with one of "
                            "its captions, drawn anew each time; or an image with all of them (16 "
                            "at most) packed behind one prefix, which is read once: less than half "
                            "the work for COCO's five, in twice the memory a sample; weights and "
                            "the paper's 13M then count captions, batches images; not for T5 "
                            "(default: %(default)s)")
    pairs.add_argument("--caption-with", metavar="source[:N]",
                       help="in the place of the captions that the training images have, N of the "
                            "source's own (default: 1), drawn at temperature 1 and top-p 0.95 "
                            "before the first step and kept as lines beside the images; a folder "
                            "of images alone will do then; needs the source's own language model, "
                            "too")
    pairs.add_argument("--val", metavar=SPEC,
                       help="validation pairs (default: 5%% of the images of the last stage's "
                            "first set, --val-samples at most, are held out)")
    pairs.add_argument("--val-samples", type=int, default=500,
                       help="validation images at most (default: %(default)s)")
    pairs.add_argument("--augment", choices=("crop", "none"), default="crop",
                       help="random crops of 50-100%% and flips, or plain resizing (default: "
                            "%(default)s)")
    pairs.add_argument("--max-tokens", type=int, default=32,
                       help="of a caption, its end mark included (default: %(default)s)")
    pairs.add_argument("--max-bad", type=float, default=0.01,
                       help="stop when more than this share of a set's annotations is unusable, or "
                            "of the images cannot be read; the share is of 1,000 at least, since a "
                            "few are no harm (default: %(default)s)")


def add_length(parser):
    length = parser.add_argument_group("length and rate: the defaults are the paper's")
    length.add_argument("--batch-size", type=int,
                        help="samples an optimizer step, over all GPUs (default: 1728)")
    length.add_argument("--warm-up-steps", type=int,
                        help="optimizer steps of stage 1 (default: one epoch)")
    length.add_argument("--steps", type=int,
                        help="optimizer steps of stage 2, or from scratch (default: 13M samples, "
                             "however much of the paper's data is there; with --data 10 epochs at "
                             "most; from scratch 10 epochs)")
    length.add_argument("--lr", type=float,
                        help="peak rate of stage 2, or from scratch (default: 1e-4)")
    length.add_argument("--warm-up-lr", type=float, help="rate of stage 1 (default: 5 x --lr)")
    length.add_argument("--clip", type=float, metavar="NORM",
                        help="scale gradients down to this norm where theirs is larger (default: "
                             "never, as the paper)")
    length.add_argument("--seed", type=int, default=0,
                        help="a run is a function of its arguments and this (default: %(default)s)")


def add_machine_options(machine):
    """Of every command that trains."""
    machine.add_argument("--dry-run", nargs="?", const="", metavar="[Nx]CARD",
                         help="print what would train, how long, and the memory, operations and "
                              f"hours that it should take on N of CARD ({', '.join(estimate.CARDS)}; "
                              "default: what is found here), and load no weights")
    machine.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                         help="of frozen weights and of the arithmetic; trained weights are always "
                              "float32 (default: %(default)s)")
    memory = machine.add_mutually_exclusive_group()
    memory.add_argument("--llm-weights", choices=("int8", "nf4"),
                        help="keep the matrices of the LLM, which is frozen, in half (int8) or 0.28 "
                             "(nf4) of bf16's memory; a step takes longer, and what the LLM answers "
                             "changes a little (docs/beyond-one-card.md; default: as --precision "
                             "says)")
    memory.add_argument("--shard", nargs="?", const="node", choices=("node", "all"),
                        help="share the frozen blocks of LLM and ViT among the processes of each node "
                             "(or of all), which gather one block at a time: under torchrun, N GPUs "
                             "together hold an LLM that none holds alone (docs/beyond-one-card.md)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction,
                         default=torch.cuda.is_available(),
                         help="torch.compile the repeated blocks (default: on GPUs)")
    machine.add_argument("--workers", type=int, default=min(8, os.cpu_count() // 2),
                         help="processes that read images, for each GPU (default: %(default)s)")
    machine.add_argument("--resume", action="store_true",
                         help="continue the run in --out where it stands")


CACHE_OR_SHARD = ("--cache and --shard exclude each other: beside an LLM that needs several GPUs, what the "
                  "ViT costs is little")


def add_machine(parser):
    machine = parser.add_argument_group("machine")
    machine.add_argument("--micro-batch", type=int,
                         help="samples at a time on one GPU; but for the draws of dropout, the "
                              "result is the same whatever it is (default: what should fit into "
                              f"the GPU's memory, {estimate.LARGEST} at most)")
    add_machine_options(machine)
    machine.add_argument("--cache", type=Path, metavar="DIR",
                         help="keep there what the frozen VPG makes of each image of stage 1 (49 "
                              "KB in bf16), computed once for all runs with this VPG and data; "
                              "stage 1 then sees images without crops")
    machine.add_argument("--gate", type=float, default=0.01, metavar="LOSS",
                         help="after the warm-up, stop unless shuffled images raise the validation "
                              "loss by at least this: else the LLM does not look at them, and days "
                              "of fine-tuning would be in vain; 0: never (default: %(default)s)")


def add_log(parser):
    log = parser.add_argument_group("log")
    log.add_argument("--log-every", type=int, default=10, metavar="STEPS",
                     help="(default: %(default)s)")
    log.add_argument("--val-every", type=int, metavar="STEPS", help="(default: ten times a stage)")
    log.add_argument("--save-every", type=int, default=500, metavar="STEPS",
                     help="(default: %(default)s)")
    return log


def add_log_and_score(parser):
    log = add_log(parser)
    log.add_argument("--score", action="append", metavar="NAME=FILE[@IMAGES]",
                     help="at each validation score the model, too, on at most --val-samples items of a "
                          "benchmark of evaluate.py, by greedy answers: coco=coco_karpathy_val.json@coco "
                          "gives CIDEr, in metrics and curves; may be given several times")


EXCLUDE_EACH_OTHER = [
    ("from_scratch", "no_warm_up"),
    ("from_scratch", "stage"),
    ("no_warm_up", "stage"),
]
AT_LEAST_0 = ["adapters", "workers", "seed"]
AT_LEAST_1 = ["image_size", "vit_layers", "steps", "warm_up_steps", "batch_size", "micro_batch",
              "val_samples", "log_every", "val_every", "save_every", "rows"]
ABOVE = {"ridge": 0, "lr": 0, "warm_up_lr": 0, "clip": 0, "max_tokens": 1}


def option(name):
    """How the command line spells an argument."""
    return f"--{name.replace('_', '-')}"


def check_ranges(parser, args):
    """Ends the command where a number is too small; options that it does not have are skipped."""
    for least, names in enumerate((AT_LEAST_0, AT_LEAST_1)):
        for name in names:
            if getattr(args, name, None) is not None and getattr(args, name) < least:
                parser.error(f"{option(name)} must be at least {least}")
    for name, least in ABOVE.items():
        if getattr(args, name, None) is not None and not getattr(args, name) > least:
            parser.error(f"{option(name)} must be above {least}")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (add_models, add_method, add_data, add_length, add_machine, add_log_and_score):
        add(parser)
    args = parser.parse_args(argv)
    # from scratch: with a random Q-Former, or that of the model named
    args.q_former = args.from_scratch or None
    args.from_scratch = args.from_scratch is not None
    for one, other in EXCLUDE_EACH_OTHER:
        if getattr(args, one) and getattr(args, other):
            parser.error(f"{option(one)} and {option(other)} exclude each other")
    check_ranges(parser, args)
    if args.from_scratch and args.init != "converter":
        parser.error("--from-scratch has a random projector; --init is for the transfer of a VPG")
    if args.stage == "warm-up" and args.steps:
        parser.error("--steps is the length of stage 2; with --stage warm-up, give --warm-up-steps")
    if args.ridge != vpgtrans.RIDGE and (args.init != "converter" or args.from_scratch):
        parser.error("--ridge is for --init converter; --init auto tries a few of its own")
    if args.vit_layers and (args.q_former or not args.from_scratch):
        parser.error("--vit-layers is for --from-scratch with a random Q-Former: a Q-Former that "
                     "was trained on one block's features does not read another's")
    if args.cache and "warm-up" not in choose_stages(args):
        parser.error("--cache is for stage 1, which this run has not: only there the VPG stands "
                     "still")
    if args.cache and args.shard:
        parser.error(CACHE_OR_SHARD)
    if args.caption_with and not re.fullmatch(r"source(:[1-9]\d*)?", args.caption_with):
        parser.error("--caption-with must be source, or source:N with N captions an image")
    if args.caption_with and args.from_scratch:
        parser.error("--caption-with needs a source that captions; --from-scratch has none")
    if args.warm_up_data and not args.data:
        parser.error("--warm-up-data needs --data, for the other stage")
    args.out = args.out or Path("out") / f"{Path(args.src).name}-to-{Path(args.tgt).name}"
    return args


def choose_stages(args):
    """{name: Stage} of this run, with the arguments' rates and batch sizes in the place of the
    paper's."""
    names = ["warm-up", "fine-tune"]
    if args.from_scratch:
        names = ["from-scratch"]
    elif args.stage:
        names = [args.stage]
    elif args.no_warm_up:
        names = ["fine-tune"]
    stages = {}
    for name in names:
        stage = STAGES[name]
        lr = args.lr
        if name == "warm-up":
            lr = args.warm_up_lr or (5 * args.lr if args.lr else None)
        if lr:
            stage = dataclasses.replace(stage, lr=lr, final_lr=lr * stage.final_lr / stage.lr)
        stages[name] = dataclasses.replace(stage, batch_size=args.batch_size or stage.batch_size)
    return stages


def follow_start(args, stages, start):
    """The stages with the rate of the warm-up that suits the start which --init auto has taken,
    unless --warm-up-lr says another."""
    if not start or args.warm_up_lr or "warm-up" not in stages:
        return stages
    warm_up = dataclasses.replace(stages["warm-up"], lr=start["lr"], final_lr=start["lr"])
    return {**stages, "warm-up": warm_up}


# ------------------------------------------------------------------------------------- what is read

# The paper's data (section 4.1), by the names of their folders: where the annotations are, and how
# to get them.
PAPER = {
    "coco": (["coco_karpathy_train.json", "annotations/coco_karpathy_train.json",
              "annotations/captions_train2017.json",
              "annotations/captions_train2014.json"],
             "of cocodataset.org: train2017.zip and annotations_trainval2017.zip, unpacked"),
    "sbu": (["sbu.json", "sbu.jsonl"],
            "SBU captions, downloaded with img2dataset, as a list of {image, caption}"),
    "vg": (["vg_caption.json", "annotations/vg_caption.json", "region_descriptions.json", "vg.jsonl"],
           "Visual Genome, of homes.cs.washington.edu/~ranjay/visualgenome: LAVIS's vg_caption.json and all "
           "images in images/; or region_descriptions.json, and the images in VG_100K/ and VG_100K_2/"),
    "laion": (["laion.jsonl", "laion.json"],
              "LAION-COCO, 13M pairs will do, as {image, caption} lines or the .tar shards of "
              "img2dataset"),
}
PAPER_VALIDATION = ["coco_karpathy_val.json", "annotations/coco_karpathy_val.json",
                    "annotations/captions_val2017.json",
                    "annotations/captions_val2014.json"]
# COCO's splits of 2017 part the images otherwise than Karpathy's, on whose captions are scored.
MIXED_UP = ("  among them are 4,407 of Karpathy's 5,000 test images and 4,392 of his validation images:\n"
            "  CIDEr on COCO would be of images trained on; LAVIS's coco_karpathy_train.json has none")
WARM_UP = {"coco": 1.0, "sbu": 1.0}  # one epoch of both
FINE_TUNE = {"coco": 0.1, "vg": 0.2, "laion": 0.7}  # shares of samples


def find_paper_data(root):
    """{name: annotation file, or folder of shards} of what lies under `root` in the layout of
    PAPER; "val" is the validation set."""
    found = {}
    for name, (files, _) in PAPER.items():
        folder = Path(root) / name
        there = [folder / file for file in files if (folder / file).is_file()]
        if there or folder.is_dir() and any(map(is_shard, folder.iterdir())):
            found[name] = there[0] if there else folder
    validation = [Path(root) / "coco" / file for file in PAPER_VALIDATION]
    for file in validation:
        if file.is_file():
            found.setdefault("val", file)
    return found


def how_to_get_paper_data(root):
    """The text for somebody who has no data yet."""
    lines = []
    for name, (files, how) in PAPER.items():
        lines.append(f"  {Path(root) / name}/{' or '.join(files)}  ({how})")
    return "\n".join([
        f"no data: nothing lies under {root}/. Put there one or more of", *lines,
        "(coco alone will do to begin with), name another folder in $VPGTRANS_DATA, or name your "
        "own pairs:",
        "  --data pairs.jsonl      with lines {\"image\": \"cat.jpg\", \"caption\": \"a cat on a "
        "mat\"}"])


def name_data(args, stages, say):
    """-> {stage: specs of its data sets}, spec of the validation set or None: as the arguments say,
    or the paper's."""
    if args.data:
        specs = {name: args.data for name in stages}
        if "warm-up" in stages:
            specs["warm-up"] = args.warm_up_data or args.data
        return specs, args.val
    root = Path(os.environ.get("VPGTRANS_DATA", "datasets"))
    found = find_paper_data(root)
    specs = {}
    for name in stages:
        shares = FINE_TUNE if name == "fine-tune" else WARM_UP
        there = [d for d in shares if d in found]
        missing = [d for d in shares if d not in found]
        if not there:
            raise FileNotFoundError(f"stage {name} needs {' or '.join(shares)}\n"
                                    f"{how_to_get_paper_data(root)}")
        weight = {d: f":{shares[d]}" if name == "fine-tune" else "" for d in there}
        specs[name] = [f"{d}={found[d]}{weight[d]}" for d in there]
        if missing:
            say(f"stage {name}: not under {root}/ and left out: {', '.join(missing)}")
    return specs, args.val or (f"val={found['val']}" if "val" in found else None)


def source_key(spec):
    """(source, images, split) of a spec: what several stages weight differently is read once."""
    spec = parse_spec(spec)
    return spec.source, spec.images, spec.split


def read_weights(specs):
    """The weights of data sets, or None where their specs give none. ValueError where some do."""
    weights = [parse_spec(spec).weight for spec in specs]
    if any(weights) and not all(weights):
        raise ValueError(f"give each of {', '.join(specs)} a :WEIGHT above 0, or none of them")
    return weights if any(weights) else None


def holds_images_alone(source):
    """Is it a folder of images of which none has a text beside it?"""
    if not source.is_dir() or any(map(is_shard, source.iterdir())):
        return False
    texts = {file.with_suffix("") for file in source.rglob("*.txt") if not file.name.startswith(".")}
    return not texts or not any(file.suffix != ".txt" and file.with_suffix("") in texts
                                for file in source.rglob("*"))


def find_data(args, stages, say):
    """-> ({stage: (data sets, weights or None)}, validation Pairs); says what was found and what is
    left out."""
    specs, val_spec = name_data(args, stages, say)
    once = {source_key(spec): spec for spec in itertools.chain.from_iterable(specs.values())}
    # a crop of Visual Genome's regions would lose what their captions describe
    sets = {}
    for key, spec in once.items():
        crop = not spec.startswith("vg=")
        if args.caption_with and holds_images_alone(parse_spec(spec).source):
            sets[key] = captioning.uncaptioned(read_pictures(spec, crop))
        else:
            sets[key] = read_pairs(spec, crop)
    val = read_pairs(val_spec) if val_spec else None
    for pairs in [*sets.values(), *([val] if val else [])]:
        check_left_out(pairs, args.max_bad, say)
    if not val:
        last_stage = list(stages)[-1]
        whole = sets[source_key(specs[last_stage][0])]
        held = hold_out(whole, args.val_samples)
        val = whole.without(held, instead=True)
        sets = {key: pairs.without(held) for key, pairs in sets.items()}
        say(f"validation: {len(held)} images of {whole.name} held out")
    for (file, *_), pairs in sets.items():
        say(f"data: {pairs.name}, {len(pairs):,} pairs, {len(pairs.images):,} images ({file})")
        if Path(file).name == "captions_train2017.json":
            say(MIXED_UP)
        if not len(pairs):
            raise ValueError(f"{file}: no pair is left to train on; name --val, or use more pairs")
    of_stages = {}
    for name in stages:
        of_stage = [sets[source_key(spec)] for spec in specs[name]]
        of_stages[name] = of_stage, read_weights(specs[name])
    return of_stages, one_caption_per_image(val, args.val_samples)


def check_left_out(pairs, max_bad, say):
    """Says what of a data set is unusable; ValueError if that is more than a share of `max_bad` (of
    1,000 at least: a few are no harm)."""
    def lines(most):
        for problem, places in pairs.left_out.items():
            some = ", ".join(places[:most]) + (", ..." if len(places) > most else "")
            yield f"data: {pairs.name}, {len(places):,} left out: {problem} ({some})"

    bad = sum(map(len, pairs.left_out.values()))
    total = bad + len(pairs)
    if bad > max_bad * max(total, 1000):
        head = f"{bad:,} of {total:,} annotations are unusable, more than --max-bad {max_bad:g}"
        raise ValueError("\n".join([head, *lines(20)]))
    for line in lines(3):
        say(line)


# ----------------------------------------------------------------------------------------- how long


def mixture(captions, sets, weights):
    """How data sets are mixed where a sample is "each" caption, "one" of an image's, or all of them
    "packed" (--captions).

    -> (weights of the data sets as shares of samples, or None; captions a sample on average). The
    weights given are shares of captions."""
    per_sample = [data.captions_per_sample(pairs, captions) for pairs in sets]
    if weights:
        weights = [weight / n for weight, n in zip(weights, per_sample)]
    shares = weights or data.sizes(sets, captions)
    average = sum(share * n for share, n in zip(shares, per_sample)) / sum(shares)
    return weights, average


def what_there_is(args, found, name, stage):
    """-> (samples of a stage's data sets, captions a sample on average); a dry run without data takes
    the paper's amounts."""
    if not found.sets:
        return stage.samples or 1_400_000, 1
    sets, weights = found.sets[name]
    _, captions = mixture(args.captions, sets, weights)
    return sum(data.sizes(sets, args.captions)), captions


def count_steps(args, name, stage, available, captions, world):
    """The number of optimizer steps of a stage over so many available samples, each of so many
    captions on average.

    The paper's amounts are captions."""
    if stage.batch_size < world:
        raise ValueError(f"--batch-size {stage.batch_size} leaves some of the {world} processes "
                         "without a sample")
    steps = args.warm_up_steps if name == "warm-up" else args.steps
    if not steps:
        samples = stage.epochs * available
        if stage.samples:
            amount = round(stage.samples / captions)
            samples = min(amount, 10 * available) if args.data else amount
        steps = samples // stage.batch_size
    if steps < 1:
        length = "--warm-up-steps" if name == "warm-up" else "--steps"
        raise ValueError(f"{available:,} samples do not fill one batch of {stage.batch_size:,}, the length "
                         f"of stage {name}; lower --batch-size or set {length}")
    return steps


# ---------------------------------------------------------------------- what must agree on --resume

# What a run's result does not depend on, or by the draws of dropout alone, so that --resume may
# change it.
FREE = {"out", "micro_batch", "dry_run", "shard", "compile", "workers", "resume", "gate", "log_every",
        "val_every", "save_every", "max_bad", "score"}


def check_same_run(args, state):
    """ValueError if a state is that of a run with other arguments, as far as they matter."""
    # an option that is newer than the state had its default's effect
    defaults = transfer.arguments(parse_arguments(["--src", args.src, "--tgt", args.tgt]))
    then = defaults | state["arguments"]
    # until November 2026 it was None, "" or the VPG's name
    if not isinstance(then["from_scratch"], bool):
        then["q_former"] = then["from_scratch"] or None
        then["from_scratch"] = then["from_scratch"] is not None
    check_same_arguments(args, then)


def check_same_arguments(args, then):
    """ValueError if a run that had the arguments `then` would be another one with those of today, as far
    as they matter."""
    now = transfer.arguments(args)
    other = []
    for key in now:
        if key not in FREE and now[key] != then.get(key):
            other.append(f"{option(key)} was {then.get(key)}, is {now[key]}")
    if other:
        raise ValueError(f"{args.out}: --resume with other arguments would be another run: "
                         f"{'; '.join(other)}")


def describe_data(of_stages):
    """{stage: data sets} -> {stage: [[name, number of samples], ...]}, what a state keeps of them."""
    return {stage: [[some.name, len(some)] for some in sets] for stage, sets in of_stages.items()}


def check_same_data(args, state, now):
    """ValueError if a state's run read other data than describe_data says `now`: their order would be
    another, and with it the run."""
    then = state.get("data", now)  # a state of before December 2026 does not say
    for stage, sets in now.items():
        if then.get(stage) != sets:
            was, are = (", ".join(f"{name} {count:,}" for name, count in some)
                        for some in (then.get(stage, []), sets))
            raise ValueError(f"{args.out}: --resume with other data would be another run: stage {stage} had "
                             f"{was} samples, and now there are {are}")


# ---------------------------------------------------------------------------------------- the cache


def free_space(folder):
    """Bytes that are free where a folder is or will be."""
    nearest = next(place for place in [folder, *folder.absolute().parents] if place.is_dir())
    return shutil.disk_usage(nearest).free


def open_caches(args, sets, vpg, say):
    """-> data sets, each with the cache of its images' queries under --cache. OSError if they do not fit
    there."""
    if len({pairs.name for pairs in sets}) < len(sets):
        raise ValueError("--cache: two data sets that it is for have the same name; give each its own, "
                         "NAME=...")
    configuration = json.dumps(vpg.config, sort_keys=True).encode()
    made_with = {
        "VPG": hub.fingerprint(dict(vpg.named_parameters())),
        "image size": vpg.image_size,
        "configuration": hashlib.sha256(configuration).hexdigest()[:16],
    }
    shape = (vpg.num_query_tokens, vpg.dim)
    dtype = transfer.DTYPES[args.precision]
    cached = []
    for pairs in sets:
        folder = args.cache / pairs.name
        features = cache.FeatureCache(folder, pairs.files(), shape, dtype, made_with)
        cached.append(dataclasses.replace(pairs, cache=features))
    check_cache_fits(args.cache, [pairs.cache for pairs in cached], say)
    say("cache: these images are seen whole, without crops, and not looked through for validation images")
    return cached


def check_cache_fits(folder, caches, say):
    """Says what the caches of a --cache folder need; OSError if that is not free on its disk."""
    whole, left = (sum(sizes) for sizes in zip(*(features.need() for features in caches)))
    images = sum(len(features.files) for features in caches)
    free = free_space(folder)
    size = estimate.readable_size
    need = (f"{images:,} images x {size(whole / images)} = {size(whole)}, of which {size(left)} are "
            f"still to be computed; {size(free)} are free")
    if left > free:
        raise OSError(f"{folder}: the cache does not fit on this disk: {need}")
    say(f"cache: {folder}, {need}")


def fill_cache(features, see, image_size, args, processes):
    """Computes what a cache does not hold yet: see((B,3,H,W) uint8) gives the features. A signal ends
    it, and the run."""
    @torch.no_grad()
    def compute(images):
        with processes.autocast():
            return see(images.to(processes.device))

    read = functools.partial(data.read_image, size=image_size)
    done = features.fill(read, compute, args.micro_batch, args.workers, processes.rank, processes.world,
                         loop.must_stop)
    if processes.sum(not done)[0]:
        processes.say("stopped while the cache was computed; the same command goes on with it")
        sys.exit(130)


# ---------------------------------------------------------------------------------- without weights


def captions_per_image(args):
    """How many --caption-with draws."""
    return int(args.caption_with.partition(":")[2] or 1)


def longest_text(args, sets):
    """Tokens that a sample's captions may have: where they are packed, as many as the data set with
    most has on average."""
    most = max(data.captions_per_sample(pairs, args.captions) for pairs in sets)
    if args.caption_with and args.captions == "packed":  # of which it has none yet
        most = captions_per_image(args)
    return round(args.max_tokens * most)


def choose_micro_batch(args, stages, found):
    """How many samples at a time: as --micro-batch says, else what should fit into the memory of
    the smallest GPU."""
    if args.micro_batch or found.processes.device.type == "cpu":
        return args.micro_batch or estimate.LARGEST
    longest = []
    for name, stage in stages.items():
        tokens = longest_text(args, found.sets[name][0])
        longest.append((stage, transfer.example_batch(found.shapes, found.tok, tokens)))
    return fit_micro_batch(found.shapes, longest, found.processes)


def fit_micro_batch(shapes, longest, processes):
    """How many samples at a time fit into the smallest GPU's memory: a model without weights, and of
    each stage (it, its longest batch)."""
    fits = []
    for stage, batch in longest:
        vpgtrans.enter_stage(shapes, stage)
        step = estimate.trace(shapes, batch)
        capacity = torch.cuda.mem_get_info()[1]
        fits.append(estimate.largest_micro_batch(shapes, step, capacity, world=processes.world,
                                                 shards=processes.shards))
    fits = min(processes.gather(fits))
    processes.say(f"micro-batch: {fits} samples at a time on each GPU (--micro-batch)")
    return fits


def find_cards(args, processes):
    """Of a dry run: how many cards, how many of them share the LLM, and estimate's machine."""
    count, card = re.fullmatch(r"(?:(\d+)x)?(.*)", args.dry_run).groups()
    world = int(count or processes.world)
    if args.shard and world < 2:
        raise ValueError(f"--shard: say how many cards share the LLM, such as --dry-run 8x{card or 'a100'}")
    return world, world if args.shard else 1, estimate.machine(card)


def dry_run(args, stages, found):
    """Prints what the run would do and need. Without data, the paper's amounts are taken."""
    model = found.shapes
    world, shards, machine = find_cards(args, found.processes)
    if args.caption_with and found.sets:
        caption_data(args, found)
    for name, stage in stages.items():
        available, captions = what_there_is(args, found, name, stage)
        steps = count_steps(args, name, stage, available, captions, world)
        typical_tokens, longest_tokens = 12, args.max_tokens
        if found.sets:
            sets, _ = found.sets[name]
            samples = new_samples(args, found, model, sets, captions=args.captions)
            typical_tokens = samples.measure().sum(1).mean() - len(samples.prompt)
            longest_tokens = longest_text(args, sets)
        if args.init == "auto" and name == "warm-up" and not args.warm_up_lr:
            tried = sorted(transfer.LOWER_RATES + transfer.RATES)
            rates = ", ".join(f"{transfer.RATE_SHARE * lr:g}" for lr in tried)
            print(f"\n--init auto: the rate of the warm-up will be one of {rates}")
        table = vpgtrans.enter_stage(model, stage)
        print(*loop.describe_stage(name, stage, steps, available, table), sep="\n")
        longest = transfer.example_batch(model, found.tok, longest_tokens)
        typical = transfer.example_batch(model, found.tok, round(typical_tokens))
        lines = estimate.report(model, longest, typical, steps * stage.batch_size, machine, args.micro_batch,
                                world, shards)
        print(*lines, sep="\n")
    need = estimate.readable_size(runs.disk_need(model.saved()))
    free = estimate.readable_size(free_space(args.out))
    print(f"\n{args.out}: {need} while it runs; {free} are free on that disk")


# ------------------------------------------------------------------------------------------ the run


@dataclasses.dataclass
class Found:
    """What a run begins with."""

    processes: loop.Processes
    src: hub.Place
    tgt: hub.Place
    tok: data.Tokenizer  # the target's
    shapes: vpgtrans.VisualLLM  # without weights
    sets: dict = None  # {stage: (data sets, weights or None)}; a dry run may have none
    val: Pairs = None
    score: Callable = None  # of --score: model -> {name: number}


def take_folder(args, processes, held):
    """Makes sure that this run, and no other, writes in --out, until `held` is closed."""
    begun = [file for file in (runs.STATE, "model.safetensors") if (args.out / file).exists()]
    if begun and not args.resume:
        raise FileExistsError(f"{args.out}: already holds a run; continue it with --resume, or "
                              "name another --out")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    held.enter_context(runs.locked(args.out, command, processes.say))
    if args.cache:
        runs.check_writable(args.cache)


def check_disk(out, model):
    """OSError if there is no room for what a run of this model writes, beside what it has written
    already."""
    files = [out / name for name in ("model.safetensors", runs.STATE, runs.PREVIOUS)]
    there = sum(file.stat().st_size for file in files if file.is_file())
    need = runs.disk_need(model.saved()) - there
    free = free_space(out)
    if need > free:
        raise OSError(f"{out}: the run needs {estimate.readable_size(need)} more there, and "
                      f"{estimate.readable_size(free)} are free on that disk; name another --out")


def find(args, stages, held):
    """Models and data. The first process goes first: it fetches, scans, and takes the run's folder
    until `held` is closed."""
    is_dry = args.dry_run is not None
    processes = loop.Processes.start(args.precision, None if is_dry else args.shard)
    with processes.first_goes_first():
        if processes.rank == 0 and not is_dry:
            take_folder(args, processes, held)
        tokenizer, tok = transfer.find_tokenizer(args.tgt, args.tgt_tokenizer)
        if tok.encoder_decoder and args.captions == "packed":
            raise ValueError(f"--captions packed is not for {args.tgt}: the encoder of a T5 reads "
                             "a part of each caption; use one or each")
        src, tgt = transfer.find_models(args.src, args.tgt, tokenizer, shapes_only=is_dry)
        if args.caption_with and not is_dry:
            hub.resolve(args.src, "model")  # with its own language model
        found = Found(processes, src, tgt, tok, transfer.shape_model(args, src, tgt))
        if not is_dry:
            check_disk(args.out, found.shapes)
        try:
            found.sets, found.val = find_data(args, stages, processes.say)
        except FileNotFoundError as error:
            if args.data or not is_dry:
                raise
            said = str(error).splitlines()[0]
            processes.say(f"{said}: taken are the paper's amounts, each caption a sample of 12 "
                          "tokens")
        if args.score:
            batch_size = args.micro_batch or estimate.LARGEST
            found.score = evaluate.scorer(args.score, args.val_samples, tok, batch_size, processes)
    return found


def caption_data(args, found):
    """--caption-with: every training set with the source's own captions, drawn once for all stages;
    and that of validation, if it has none. A dry run has something as long in their place."""
    count = captions_per_image(args)
    once = {id(pairs): pairs for sets, _ in found.sets.values() for pairs in sets}
    if not any(found.val.captions):
        once[id(found.val)] = found.val
    if args.dry_run is not None:
        captioned = [captioning.with_placeholders(pairs, count) for pairs in once.values()]
    else:
        captioned = captioning.caption_images(args.src, count, once.values(), args, found.processes)
    with_captions = dict(zip(once, captioned))
    for stage, (sets, weights) in found.sets.items():
        found.sets[stage] = [with_captions[id(pairs)] for pairs in sets], weights
    if id(found.val) in once:
        found.val = one_caption_per_image(with_captions[id(found.val)], args.val_samples)


def new_samples(args, found, model, sets, **options):
    vpg = model.vpg
    return data.Samples(sets, found.tok, vpg.image_size, vpg.num_query_tokens, args.max_tokens,
                        **options)


# Each stage has an order and crops of its own: three times the run's seed, and this.
SEEDS = {"warm-up": 0, "fine-tune": 1, "from-scratch": 2}


def plan_jobs(args, stages, steps, found, model, resumed):
    """What each stage trains on, in which order, for {stage: steps}. -> [loop.Job]"""
    known = data.Lookalikes(found.val.files())
    jobs = []
    for name, stage in stages.items():
        sets, weights = found.sets[name]
        sizes = data.sizes(sets, args.captions)
        weights, _ = mixture(args.captions, sets, weights)
        count = steps[name] * stage.batch_size
        if weights:
            shares = [weight / sum(weights) for weight in weights]
            epochs = []
            for pairs, share, size in zip(sets, shares, sizes):
                epochs.append(f"{pairs.name} {count * share / size:.2g}")
            found.processes.say(f"stage {name}: epochs of each data set in its {count:,} samples: "
                                f"{', '.join(epochs)}")
        seed = 3 * args.seed + SEEDS[name]
        if args.cache and name == "warm-up" and not (resumed and resumed[0]["stage"] != name):
            sets = open_caches(args, sets, model.vpg, found.processes.say)
        samples = new_samples(args, found, model, sets, captions=args.captions,
                              augment=args.augment == "crop", known=known, seed=seed)
        order = data.plan(sizes, count, seed, weights)
        jobs.append(loop.Job(name, stage, samples, order, steps[name]))
    return jobs


def begin_log(args, found, model, log, start):
    """The files of a new run: its config.json, empty metrics, and what of the data was left out."""
    config = json.dumps(transfer.run_config(args, found.src, model, start), indent=2)
    runs.write(args.out / "config.json", lambda file: file.write_text(config))
    read = [pairs for sets, _ in found.sets.values() for pairs in sets]
    once = {id(pairs.left_out): pairs.left_out for pairs in [*read, found.val]}  # stages share them
    left_out = []
    for of_set in once.values():
        for problem, places in of_set.items():
            left_out += [(problem, where) for where in places]
    log.begin(left_out)


def set_up(args, stages, found, watch):
    """All that can be wrong with arguments, files and folders, before anything long begins.

    -> (loop.Run, [loop.Job], the state to resume from or None)"""
    processes = found.processes
    args.micro_batch = choose_micro_batch(args, stages, found)
    resumed = runs.load_state(args.out, processes.say) if args.resume else None
    if resumed:
        check_same_run(args, resumed[0])
    if args.caption_with:
        caption_data(args, found)
    read = describe_data({name: sets for name, (sets, _) in found.sets.items()})
    if resumed:
        check_same_data(args, resumed[0], read)
    steps = {}
    for name, stage in stages.items():
        there = what_there_is(args, found, name, stage)
        steps[name] = count_steps(args, name, stage, *there, processes.world)
    first_sets, _ = found.sets[next(iter(stages))]
    model, start = transfer.build_model(args, found.src, found.tgt, found.tok, first_sets, processes,
                                        resumed is not None)
    if resumed:
        start = resumed[0].get("start")
    stages = follow_start(args, stages, start)
    jobs = plan_jobs(args, stages, steps, found, model, resumed)
    val_samples = new_samples(args, found, model, [found.val], augment=False, split=False)
    validation = loop.Validation(val_samples, args.micro_batch, processes)
    log = runs.Log(args.out, processes.rank)
    if resumed:
        log.continue_from(list(stages), resumed[0])
    elif processes.rank == 0:
        begin_log(args, found, model, log, start)
    log.report(processes.gather(validation.bad))
    saved = {"arguments": transfer.arguments(args), "start": start, "data": read}
    run = loop.Run(args, saved, processes, model, validation, log, watch, score=found.score)
    run.remedy = ("To go on from the weights last saved, with another rate or precision: --src "
                  f"{args.out} --no-warm-up --lr ... --precision ... and a new --out")
    return run, jobs, resumed


def train(run, jobs, resumed):
    """The stages one after the other, from where a run stands."""
    if run.args.compile:
        loop.compile_layers(run.model)
    names = [job.name for job in jobs]
    first = names.index(resumed[0]["stage"]) if resumed else 0
    with loop.stopping_when_asked():
        for job in jobs[first:]:
            for features in [pairs.cache for pairs in job.samples.sets if pairs.cache]:
                vpg = run.model.vpg
                fill_cache(features, vpg, vpg.image_size, run.args, run.processes)
            loop.train_stage(run, job, resumed)
            resumed = None
            if job.name == "warm-up" and len(jobs) > 1:
                run.check_gate()


def main(argv=None, watch=None):
    """The command. `watch` is told where the run stands, {"stage", "step", "samples"}, after each
    line of the log."""
    # where standard output knows no UTF-8, a caption with an é must not end the run
    sys.stdout.reconfigure(errors="replace")
    args = parse_arguments(argv)
    stages = choose_stages(args)
    with contextlib.ExitStack() as held, loop.explaining_memory(args, "train.py"):
        try:
            found = find(args, stages, held)
            if args.dry_run is not None:
                return dry_run(args, stages, found) if found.processes.rank == 0 else None
            run, jobs, resumed = set_up(args, stages, found, watch)
        except (OSError, ValueError) as error:
            loop.end_with(error, "train.py")
        try:
            train(run, jobs, resumed)
        except (OSError, loop.Failure) as error:
            loop.end_with(error, "train.py")
        if run.processes.rank == 0:
            (args.out / runs.PREVIOUS).unlink(missing_ok=True)
        lengths = ", then ".join(f"{job.name} {job.steps:,} steps" for job in jobs)
        run.processes.say(f"\n{args.src} -> {args.tgt}: {lengths}, {run.log.seconds:.0f} s of "
                          f"training.\nWeights, metrics and curves are in {args.out}/. Try: python "
                          f"sample.py IMAGE --model {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    loop.run_command(main)
