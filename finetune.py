"""Adapt what sees to a task, by MemVP: images in the memory of a frozen language model's FFNs.

    torchrun --nproc-per-node 8 finetune.py --llm llama-7b --vit openai/clip-vit-large-patch14 \\
        --memvp scienceqa=datasets/scienceqa
    python finetune.py --llm opt-6.7b --vit out/opt-2.7b-to-opt-6.7b --features queries ...

The first is the paper's; the second puts in the memory what a transferred VPG's Q-Former makes of
an image. --prompts input trains the comparison, the same features as soft prompts in the input.

A run writes OUT/: model.safetensors (a memory and adapters, some 15 MB), config.json,
metrics.jsonl, curves.png, bad_data.jsonl (which questions were left out, and why), and
resume.safetensors, from which --resume continues a killed one with the same losses. sample.py takes
OUT as its --model."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cache
import data
import estimate
import hub
import loop
import memvp
import pairs
import runs
import train
import transfer
import vpgtrans

# ----------------------------------------------------------------------- questions, as they are asked

LETTERS = "ABCDE"  # ScienceQA has five choices at most


def ask_scienceqa(item, with_caption=False):
    """(prompt, target) of a question, the paper's QCM-A. They are joined without a blank.

    As in MemVP's code, each pair of blanks becomes one, in one pass over the prompt."""
    caption = item.get("caption", "") if with_caption else ""
    context = f"{item.get('hint', '')} {caption}".strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, item["choices"]))
    lines = [f"Question: {item['question']}", f"Context: {context}", f"Options: {options}", "Response:"]
    return "\n".join(lines).replace("  ", " ").strip(), f"The answer is {LETTERS[item['answer']]}."


def ask_in_words(item):
    """(prompt, target) of a question that is answered in words and not by a letter: what a small
    LLM can do that never learnt to read choices."""
    return f"Question: {item['question']}\nAnswer:", f" {item['choices'][item['answer']]}"


def ask_vqa(prefix, item):
    """As VL-T5 and VL-PET ask VQAv2 ("vqa: ") and GQA ("gpa: ", sic)."""
    return f"{prefix}: {item['question']}", f" {item['drawn']}"


def ask_caption(item):
    return "caption:", f" {item['drawn']}"


def draw_answer(item, rng):
    """One of the people's answers to a question of VQAv2, in proportion to its soft score: 0.3 for
    each who gave it, 1 at most."""
    texts = list(dict.fromkeys(item["answers"]))
    scores = np.array([min(1.0, 0.3 * item["answers"].count(text)) for text in texts])
    return item | {"drawn": texts[rng.choice(len(texts), p=scores / scores.sum())]}


def draw_any(item, rng):
    return item | {"drawn": item["answers"][rng.integers(len(item["answers"]))]}


def question_ids(tok, prompt, target, most=(None, None)):
    """(prompt, target) as texts -> as ids: [BOS, prompt] and [target, EOS]; T5's encoder reads
    [prompt, </s>]. Each is cut on the right to `most` ids, of which the mark is one.

    A decoder-only LLM reads one text, whose tokens must part where the prompt ends: ValueError if
    they do not."""
    ids = tok.encode(prompt)
    if tok.encoder_decoder:
        answer = tok.encode(target.strip())
    else:
        joined = tok.encode(prompt + target)
        answer = joined[len(ids) :]
        if joined[: len(ids)] != ids:
            raise ValueError(f"this tokenizer has a token across the end of {prompt[-20:]!r} and the "
                             f"beginning of {target[:20]!r}: the prompt cannot be read alone")
    prompt_most, answer_most = (n and n - 1 for n in most)
    ids = ids[:prompt_most]
    if tok.encoder_decoder:
        ids = ids + [tok.eos_id]
    elif tok.bos_id is not None:
        ids = [tok.bos_id] + ids
    return ids, answer[:answer_most] + [tok.eos_id]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task is made of."""

    train: tuple  # FILE or FILE#SPLIT of its questions, one of which lies in its folder
    val: tuple
    how: str  # to get them, for people
    ask: Callable  # item -> (prompt, target)
    stage: memvp.Stage
    draw: Callable = None  # (item, rng) -> item, with the answer "drawn" that is learnt this time
    most: tuple = (None, None)  # ids of prompt and target, which are cut


SCIENCEQA = """put there, of github.com/lupantech/ScienceQA (CC BY-NC-SA 4.0):
  problems.json and pid_splits.json (data/scienceqa/)
  images/train/1/image.png and so on (tools/download.sh)"""
VQAV2 = """put there, of visualqa.org: questions and annotations of train2014 and val2014, unpacked,
  and COCO's images in train2014/ and val2014/"""
GQA = """put there, of cs.stanford.edu/people/dorarad/gqa: train_balanced_questions.json,
  val_balanced_questions.json, and the images in images/"""
COCO = """put there Karpathy's dataset_coco.json (cs.stanford.edu/people/karpathy/deepimagesent),
  and COCO's images in train2014/ and val2014/"""
STAGES = memvp.STAGES
SCIENCEQA_FILES = [tuple(f"{name}#{split}" for name in ("problems.json", "problem.json"))
                   for split in ("train", "val")]  # readers of it use both names
TASKS = {
    "scienceqa": Task(*SCIENCEQA_FILES, SCIENCEQA, ask_scienceqa, STAGES["scienceqa"]),
    "scienceqa-words": Task(*SCIENCEQA_FILES, SCIENCEQA, ask_in_words, STAGES["scienceqa"]),
    "vqav2": Task(("v2_OpenEnded_mscoco_train2014_questions.json",),
                  ("v2_OpenEnded_mscoco_val2014_questions.json",), VQAV2,
                  partial(ask_vqa, "vqa"), STAGES["vqav2"], draw_answer, (20, 10)),
    "gqa": Task(("train_balanced_questions.json",), ("val_balanced_questions.json",), GQA,
                partial(ask_vqa, "gpa"), STAGES["gqa"], draw_any, (20, 10)),
    "coco": Task(("dataset_coco.json#train+restval",), ("dataset_coco.json#val",), COCO,
                 ask_caption, STAGES["coco"], draw_any, (20, 40)),
}


# ------------------------------------------------------------------------------------- what is read


def make_text(tok, task, content, has_image, rng):
    """An item as Items keeps it -> its data.Text; what data.Samples asks for."""
    item = json.loads(content)
    if task.draw:
        item = task.draw(item, rng)
    prompt, target = question_ids(tok, *task.ask(item), task.most)
    return data.Text(prompt, [target])


class Questions(data.Samples):
    """Samples whose features, where they are kept, are called so."""

    def collate(self, samples):
        batch = super().collate(samples)
        if "queries" in batch:
            batch["features"] = batch.pop("queries")
        return batch


def what_is_wrong(tok, task, item, max_tokens):
    """Why a question cannot be asked, or None. One with choices is not cut: on the right it would
    lose its answer, on the left the question."""
    if not any(item["answers"]):
        return "no answer"
    if task.draw:
        return None
    if len(item["choices"]) > len(LETTERS):
        return f"more than {len(LETTERS)} choices"
    prompt, target = question_ids(tok, *task.ask(item))
    if len(prompt) + len(target) > max_tokens:
        return f"longer than --max-tokens {max_tokens}"
    return None


def find_file(args, task, names):
    """The spec of the first of some FILE#SPLIT that lies in the task's folder; FileNotFoundError
    says what to put there."""
    folder, at, images = args.source.partition("@")
    for name in names:
        if (Path(folder) / name.partition("#")[0]).is_file():
            return f"{folder}/{name}{at}{images}"
    raise FileNotFoundError(f"{folder}: no {names[0].partition('#')[0]}; {task.how}")


def read_split(args, task, tok, name):
    """-> pairs.Items of a task's split "train" or "val", without the questions that cannot be
    asked, which are named."""
    spec = find_file(args, task, getattr(task, name))
    items = pairs.read_questions(spec)
    good = []
    left_out = dict(items.left_out)
    for i in range(len(items)):
        item = items[i]
        if wrong := what_is_wrong(tok, task, item, args.max_tokens):
            left_out.setdefault(wrong, []).append(f"{spec.partition('#')[0]}, question {item['id']}")
        else:
            good.append(i)
    if not good:
        raise ValueError(f"{spec}: no question can be asked: {', '.join(left_out)}")
    items = items.subset(np.array(good))
    return dataclasses.replace(items, name=f"{args.task} {name}", left_out=left_out)


def read_questions(args, task, tok, image_size, say):
    """-> Questions to train on, and some for validation: those with an image first, so that what is
    shuffled are images."""
    both = []
    for split in ("train", "val"):
        items = read_split(args, task, tok, split)
        train.check_left_out(items, args.max_bad, say)
        if split == "val":
            every = max(1, len(items) // args.val_samples)
            some = np.arange(0, len(items), every)[: args.val_samples]
            items = items.subset(some[np.argsort(items.image[some] < 0, kind="stable")])
        with_image = (items.image >= 0).sum()
        say(f"data: {items.name}, {len(items):,} questions, {with_image:,} with an image ({args.source})")
        text = partial(make_text, tok, task)
        samples = Questions([items], tok, image_size, 0, augment=False, split=False, seed=args.seed,
                            text=text)
        both.append(samples)
    return both


# ---------------------------------------------------------------------------------------- arguments


def add_models(parser):
    models = parser.add_argument_group("models: a short name (llama-7b), a Hub id, a folder, or a "
                                       "run of ours")
    models.add_argument("--llm", required=True, help="the language model whose FFNs read the memory")
    models.add_argument("--llm-tokenizer", metavar="NAME",
                        help="where its tokenizer is, if not with it (huggyllama/llama-7b for "
                             "Vicuna)")
    models.add_argument("--vit", required=True,
                        help="what sees: CLIP (openai/clip-vit-large-patch14, the paper's), or a"
                             " BLIP-2 or a transfer of ours")
    models.add_argument("--features", choices=("patches", "queries"), default="patches",
                        help="what the memory holds of an image: the ViT's patches, with "
                             "adapters in the ViT; or what the Q-Former of a BLIP-2 or a "
                             "transfer makes of them, as it is (not of the paper) (default: "
                             "%(default)s)")
    models.add_argument("--vit-layers", type=int, metavar="N",
                        help="read patches after block N of the ViT (default: all but the last)")
    models.add_argument("--out", type=Path, help="folder of this run (default: out/<llm>-memvp-<task>)")


def add_method(parser):
    method = parser.add_argument_group("method: the defaults are the paper's")
    method.add_argument("--memvp", required=True, metavar="TASK=FOLDER[@IMAGES]",
                        help=f"what to learn, of {', '.join(TASKS)}, and where it lies, such as "
                             "scienceqa=datasets/scienceqa")
    method.add_argument("--prompts", choices=("memory", "input"), default="memory",
                        help="where an image goes: to the FFNs' memory, or (the comparison) in "
                             "front of the question as soft prompts (default: %(default)s)")
    method.add_argument("--rows", type=int, metavar="M",
                        help="keys of the memory (default: 320; beside LLMs wider than 4096, 400)")
    method.add_argument("--image-scale", type=float, default=0.01, metavar="S",
                        help="times the projector's output (default: %(default)s, of MemVP's code)")
    method.add_argument("--adapters", type=int, default=12, metavar="WIDTH",
                        help="of those beside the ViT's MLPs; 0: none (default: %(default)s)")
    method.add_argument("--normalise", choices=tuple(memvp.NORMALISE), default="imagenet",
                        help="images by whose mean and deviation: ImageNet's, with which the "
                             "paper's figures were made, or CLIP's own (default: %(default)s)")


def add_data(parser):
    questions = parser.add_argument_group("data")
    questions.add_argument("--max-tokens", type=int, default=512,
                           help="of prompt and answer; longer ones are left out and named "
                                "(default: %(default)s)")
    questions.add_argument("--val-samples", type=int, default=500,
                           help="validation questions at most (default: %(default)s)")
    questions.add_argument("--max-bad", type=float, default=0.01,
                           help="stop when more than this share of the questions is unusable, or"
                                " of the images cannot be read (default: %(default)s)")


def add_length(parser):
    length = parser.add_argument_group("length and rate: the defaults are the paper's")
    length.add_argument("--batch-size", type=int,
                        help="questions an optimizer step, over all GPUs (default: ScienceQA 32, "
                             "VQAv2 300, GQA 500, COCO 250)")
    length.add_argument("--steps", type=int, help="optimizer steps (default: 20 epochs)")
    length.add_argument("--lr", type=float,
                        help="peak rate (default: ScienceQA 1.125e-3, the others 3e-4; in proportion "
                             "to --batch-size)")
    length.add_argument("--clip", type=float, metavar="NORM",
                        help="scale gradients down to this norm where theirs is larger (default:"
                             " never)")
    length.add_argument("--seed", type=int, default=0,
                        help="a run is a function of its arguments and this (default: %(default)s)")


def add_machine(parser):
    machine = parser.add_argument_group("machine")
    machine.add_argument("--micro-batch", type=int, default=4,
                         help="questions at a time on one GPU; but for the draws of dropout, the"
                              " result is the same whatever it is (default: %(default)s)")
    train.add_machine_options(machine)
    machine.add_argument("--cache", type=Path, metavar="DIR",
                         help="keep there what stands still of each image, computed once for all "
                              "runs; for --features queries or --adapters 0")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (add_models, add_method, add_data, add_length, add_machine, train.add_log):
        add(parser)
    args = parser.parse_args(argv)
    args.task, _, source = args.memvp.partition("=")
    args.source = source or str(Path(os.environ.get("VPGTRANS_DATA", "datasets")) / args.task)
    if args.task not in TASKS:
        parser.error(f"--memvp {args.task}: the tasks are {', '.join(TASKS)}")
    train.check_ranges(parser, args)
    if args.features == "queries" and args.vit_layers:
        parser.error("--vit-layers is for --features patches: a Q-Former reads the block that it was "
                     "trained on")
    args.out = args.out or Path("out") / f"{Path(args.llm).name}-memvp-{args.task}"
    if args.cache and args.features == "patches" and args.adapters:
        parser.error("--cache is for --features queries or --adapters 0: else the ViT's adapters train, and "
                     "its features change")
    return args


def choose_stage(args, task, has_adapters):
    """The task's Stage, with the arguments' rate and batch size in the place of the paper's."""
    stage = task.stage
    batch_size = args.batch_size or stage.batch_size
    lr = args.lr or stage.lr * batch_size / stage.batch_size
    trains = tuple(part for part in stage.trains if has_adapters or part != "adapters")
    return dataclasses.replace(stage, batch_size=batch_size, lr=lr, trains=trains)


# ---------------------------------------------------------------------------------------- the cache


def fill_cache(args, questions, model, made, processes):
    """Opens, and fills, the cache of what the frozen ViT or VPG makes of each image."""
    def see(images):
        return model.see(images)["features"]

    nothing = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
    with torch.no_grad(), processes.autocast():
        shape = see(nothing.to(processes.device))[0].shape
    made_with = {name: made[name] for name in ("features", "vit_layers", "normalise", "image_size")}
    made_with["vit"] = transfer.memory_fingerprints(model)["vit"]
    (items,) = questions.sets
    dtype = transfer.DTYPES[args.precision]
    features = cache.FeatureCache(args.cache / args.task, items.files(), shape, dtype, made_with)
    train.check_cache_fits(args.cache, [features], processes.say)
    with loop.stopping_when_asked():
        train.fill_cache(features, see, model.image_size, args, processes)
    questions.sets = [dataclasses.replace(items, cache=features)]


# ------------------------------------------------------------------------------------------ the run

def run_config(args, made, model):
    """config.json of a run: how its memory is made, which ViT and LLM belong to it, its
    arguments."""
    found = transfer.memory_fingerprints(model)
    tokenizer = args.llm_tokenizer and hub.lasting_name(args.llm_tokenizer)
    return {
        "model_type": "memvp",
        "memory": made,
        "vit": {"name": hub.lasting_name(args.vit), "fingerprint": found["vit"]},
        "llm": {"name": hub.lasting_name(args.llm), "fingerprint": found["llm"], "tokenizer": tokenizer},
        "arguments": transfer.arguments(args),
    }


def count_steps(args, stage, available, world):
    """The number of optimizer steps over so many questions."""
    if stage.batch_size < world:
        raise ValueError(f"--batch-size {stage.batch_size} leaves some of the {world} processes without a "
                         "question")
    steps = args.steps or stage.epochs * (available // stage.batch_size)
    if steps < 1:
        raise ValueError(f"{available:,} questions do not fill one batch of {stage.batch_size:,}; lower "
                         "--batch-size or set --steps")
    return steps


def example_batch(model, tokens, answer=7):
    """Two questions of so many tokens for a model on the meta device."""
    size = model.image_size
    return {
        "prompt_ids": torch.zeros(2, max(1, tokens - answer), dtype=torch.long),
        "target_ids": torch.zeros(2, answer, dtype=torch.long, device="meta"),
        "images": torch.empty(2, 3, size, size, dtype=torch.uint8, device="meta"),
    }


def dry_run(args, task, found):
    """Prints what the run would do and need. Without data, ScienceQA's amounts are taken."""
    model, world = found.shapes, found.processes.world
    available, longest, typical = 12_726, args.max_tokens, 128
    if found.questions:
        lengths = found.questions[0].measure().sum(1)
        available = int(found.questions[0].starts[-1])
        longest, typical = int(lengths.max()), round(lengths.mean())
    stage = choose_stage(args, task, "adapters" in model.parts)
    steps = count_steps(args, stage, available, world)
    table = vpgtrans.enter_stage(model, stage)
    print(*loop.describe_stage(args.task, stage, steps, available, table), sep="\n")
    machine = estimate.machine(args.dry_run)
    batches = example_batch(model, longest), example_batch(model, typical)
    samples = steps * stage.batch_size
    print(*estimate.report(model, *batches, samples, machine, args.micro_batch, world), sep="\n")


@dataclasses.dataclass
class Found:
    """What a run begins with."""

    processes: loop.Processes
    vit: hub.Place
    llm: hub.Place
    tok: data.Tokenizer
    made: dict  # how the memory is made
    shapes: memvp.MemoryLLM  # without weights
    questions: tuple = None  # to train on, and for validation; a dry run may have none


def find(args, task, held):
    """Models and data. The first process goes first: it fetches, scans, and takes the run's folder
    until `held` is closed."""
    is_dry = args.dry_run is not None
    processes = loop.Processes.start(args.precision)
    with processes.first_goes_first():
        if processes.rank == 0 and not is_dry:
            train.take_folder(args, processes, held)
        tokenizer, tok = transfer.find_tokenizer(args.llm, args.llm_tokenizer)
        llm = hub.resolve(args.llm, "tokenizer" if is_dry else "target")
        llm = dataclasses.replace(llm, tokenizer=tokenizer)
        vit = hub.resolve(args.vit, "shapes" if is_dry else "vpg")
        made = transfer.how_memory_is_made(args, vit, llm)
        shapes = transfer.shape_memory_llm(made, vit, llm, transfer.DTYPES[args.precision],
                                           args.llm_weights)
        found = Found(processes, vit, llm, tok, made, shapes)
        if not is_dry:
            train.check_disk(args.out, shapes)
        try:
            found.questions = read_questions(args, task, tok, shapes.image_size, processes.say)
        except FileNotFoundError as error:
            if not is_dry:
                raise
            missing = str(error).partition(";")[0]
            processes.say(f"{missing}: taken are ScienceQA's amounts, and 128 tokens a question")
    return found


def set_up(args, task, found, watch):
    """All that can be wrong with arguments, files and folders, before anything long begins.

    -> (loop.Run, loop.Job, the state to resume from or None)"""
    processes = found.processes
    questions, held_out = found.questions
    stage = choose_stage(args, task, "adapters" in found.shapes.parts)
    available = int(questions.starts[-1])
    steps = count_steps(args, stage, available, processes.world)
    resumed = runs.load_state(args.out, processes.say) if args.resume else None
    if resumed:
        train.check_same_arguments(args, resumed[0]["arguments"])
    torch.manual_seed(args.seed)  # what the memory draws
    dtype = transfer.DTYPES[args.precision]
    model = transfer.build_memory_llm(found.made, found.vit, found.llm, dtype, processes.device,
                                      args.llm_weights)
    transfer.check_vocabulary(found.tok, model.llm, found.llm)
    validation = loop.Validation(held_out, args.micro_batch, processes)
    log = runs.Log(args.out, processes.rank)
    if resumed:
        log.continue_from([args.task], resumed[0])
    elif processes.rank == 0:
        config = json.dumps(run_config(args, found.made, model), indent=2)
        runs.write(args.out / "config.json", lambda file: file.write_text(config))
        left_out = [(problem, where) for some in found.questions
                    for problem, places in some.sets[0].left_out.items() for where in places]
        log.begin(left_out)
    log.report(processes.gather(validation.bad))
    saved = {"arguments": transfer.arguments(args)}
    run = loop.Run(args, saved, processes, model, validation, log, watch)
    run.remedy = "Start anew with a lower --lr, with --clip 1 or --precision fp32, in a new --out"
    if args.cache:
        fill_cache(args, questions, model, found.made, processes)
    order = data.plan([available], steps * stage.batch_size, args.seed)
    return run, loop.Job(args.task, stage, questions, order, steps), resumed


def main(argv=None, watch=None):
    """The command. `watch` is told where the run stands, {"stage", "step", "samples"}, after each
    line of the log."""
    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    args = parse_arguments(argv)
    task = TASKS[args.task]
    with contextlib.ExitStack() as held:
        try:
            found = find(args, task, held)
            if args.dry_run is not None:
                return dry_run(args, task, found) if found.processes.rank == 0 else None
            run, job, resumed = set_up(args, task, found, watch)
        except (OSError, ValueError) as error:
            loop.end_with(error, "finetune.py")
        try:
            if args.compile:
                loop.compile_layers(run.model)
            with loop.stopping_when_asked():
                loop.train_stage(run, job, resumed)
        except torch.OutOfMemoryError as error:
            loop.end_with(f"GPU memory ran out with --micro-batch {args.micro_batch}: lower it, the result "
                          "stays the same but for the draws of dropout; with --resume if a state was saved "
                          f"already ({error})", "finetune.py")
        except (OSError, loop.Failure) as error:
            loop.end_with(error, "finetune.py")
        if run.processes.rank == 0:
            (args.out / runs.PREVIOUS).unlink(missing_ok=True)
        matched, shuffled = run.last_validation
        run.processes.say(f"\n{args.llm} on {args.task}: {job.steps:,} steps, {run.log.seconds:.0f} s of "
                          f"training; the validation loss is {shuffled - matched:.3f} higher with shuffled "
                          f"images.\nWeights, metrics and curves are in {args.out}/. Try: python sample.py "
                          f"IMAGE --model {args.out}")


if __name__ == "__main__":
    loop.run_command(main)
