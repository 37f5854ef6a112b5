"""Adapt what sees: to instructions, so that it converses about a picture (stage 3 of VL-Vicuna), or to
a task by MemVP, with images in the memory of a frozen language model's FFNs.

    torchrun --nproc-per-node 8 finetune.py --model out/opt-6.7b-to-vicuna-7b --template vicuna-v1.1 \\
        --instruct datasets/cc_sbu_align
    torchrun --nproc-per-node 8 finetune.py --llm llama-7b --vit openai/clip-vit-large-patch14 \\
        --memvp scienceqa=datasets/scienceqa
    python finetune.py --llm opt-6.7b --vit out/opt-2.7b-to-opt-6.7b --features queries --memvp ...

The first goes on with a transfer, as the paper's last system did; without --template it converses as the
checkpoint's own chat template says. The second is MemVP's paper; the third puts in the memory what a
transferred VPG's Q-Former makes of an image. --prompts input trains the comparison, the same features as
soft prompts in the input.

A run writes OUT/: model.safetensors (what was trained alone), config.json, metrics.jsonl, curves.png,
bad_data.jsonl (what of the data was left out, and why), and resume.safetensors, from which --resume
continues a killed one with the same losses. sample.py and evaluate.py take OUT as --model; one that
converses is also for chat.py, export.py, finetune.py --model and train.py --src.

The file goes: instructions, MemVP, arguments, and the run, which is the same for both."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shlex
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

# --------------------------------------------------------------------------- instructions: stage 3

# MiniGPT-4's for captions that have no question, prompts/alignment.txt; one is drawn for each sample.
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


def name_file(spec):
    """The spec of the conversations in a folder, its only .json or .jsonl; another spec as it is."""
    parsed = pairs.parse_spec(spec)
    if not parsed.source.is_dir():
        return spec
    there = filter(lambda file: pairs.is_shown(file.name), parsed.source.iterdir())
    files = sorted(file for file in there if file.suffix in (".json", ".jsonl"))
    if len(files) != 1:
        there = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{parsed.source}: a folder of conversations holds one .json or .jsonl; here are: "
                         f"{there}. Name the file")
    name = f"{parsed.name}=" if spec.startswith(f"{parsed.name}=") else ""
    return f"{name}{files[0]}" + (f"@{parsed.images}" if parsed.images else "")


def read_conversations(spec, tok, template, args, say):
    """-> pairs.Items of the conversations about an image that the template writes. The others are named
    in left_out, but for those without an image, of which there may be many: they are counted."""
    items = pairs.read_conversations(name_file(spec))
    about_image = np.flatnonzero(items.image >= 0)
    if len(about_image) < len(items):
        without = len(items) - len(about_image)
        say(f"data: {items.name}, {without:,} of {len(items):,} conversations left out: they are about no "
            "image, and what alone reads them, the language model, is frozen")
    why_not = functools.cache(partial(data.why_not_written, tok, template))
    left_out = dict(items.left_out)
    good = []
    for i in about_image:
        item = json.loads(items.texts[i])
        asked = item.get("system", "") + (item["turns"][0][0] or "")
        why = why_not(len(item["turns"]), "system" in item)
        # a token spells a byte at least
        may_be_long = len(asked.encode()) > args.max_tokens
        if not why and may_be_long and len(tok.encode(asked)) > args.max_tokens:
            why = f"a first question longer than --max-tokens {args.max_tokens}"
        if why:
            left_out.setdefault(why, []).append(f"{spec}, {item['id'] or i}")
        else:
            good.append(i)
    if not good:
        raise ValueError(f"{spec}: no conversation to train on: {', '.join(left_out) or 'none has an image'}")
    items = dataclasses.replace(items.subset(np.array(good)), left_out=left_out)
    train.check_left_out(items, args.max_bad, say)
    return items.each_answer() if tok.encoder_decoder else items


class InstructionTuning:
    """A model that sees learns to converse, in the chat template of its language model."""

    name = "instruct"
    assumption = "taken are cc_sbu_align's amounts, and 90 tokens an answer"

    def __init__(self, args, is_dry):
        self.place = transfer.find_whole(args.model)
        self.tok = data.load_tokenizer(self.place.tokenizer)
        self.template = transfer.choose_template(self.place, args.template)
        self.stop = data.stop_ids(self.tok, self.template)
        # the run goes on as the model was trained, and says so in its config.json
        args.llm_weights = args.llm_weights or transfer.trained_with(hub.read_config(self.place.folder))
        if args.llm_weights and args.shard:
            raise ValueError(f"{args.model}: was trained beside an LLM in {args.llm_weights}, which is not "
                             "sharded; leave --shard out")
        dtype = transfer.DTYPES[args.precision]
        self.shapes = transfer.shape_whole(self.place, dtype, args.llm_weights)
        if not is_dry:
            hub.resolve(args.model, "model")  # fetches the weights

    @property
    def assumed(self):
        """Samples; longest and typical (prompt, target): for a dry run."""
        turns = [[INSTRUCTIONS[1], None]]
        prompt, _ = data.chat_ids(self.tok, self.template, turns, self.shapes.num_query_tokens)
        return 3_439, (len(prompt), 160), (len(prompt), 90)

    def check_length(self, most):
        """ValueError if questions and answers of so many tokens do not fit into the language model."""
        longest = getattr(self.shapes.llm, "longest", None)
        ids, _ = data.chat_ids(self.tok, self.template, [["", None]], self.shapes.num_query_tokens)
        if longest is not None and len(ids) + 2 * most > longest:
            fits = max(0, longest - len(ids)) // 2
            raise ValueError(f"--max-tokens {most}, for a first question and what stands behind it, are more "
                             f"than {self.place.llm} reads, {longest} with the {len(ids)} of image and "
                             f"template; {fits} would fit")

    def read(self, args, say):
        """-> data.Samples to train on and for validation, and the weights of the data sets or None."""
        self.check_length(args.max_tokens)
        own = self.template is not data.TEMPLATES.get(args.template)
        say(f"conversations: in {'its own chat template' if own else args.template}")
        sets = [read_conversations(spec, self.tok, self.template, args, say) for spec in args.instruct]
        if args.val:
            val = read_conversations(args.val, self.tok, self.template, args, say)
        else:
            held = pairs.hold_out(sets[0], args.val_samples)
            val = sets[0].without(held, instead=True)
            sets = [items.without(held) for items in sets]
            say(f"validation: {len(held)} images of {sets[0].name} held out")
        for items in sets:
            say(f"data: {items.name}, {len(items):,} conversations, {len(items.images):,} images")
            if not len(items):
                raise ValueError(f"{items.name}: no conversation is left to train on; name --val, or use "
                                 "more")
        # neighbours lend each other their images, so that each has one of its own
        val = pairs.one_caption_per_image(val, args.val_samples)
        Q = self.shapes.num_query_tokens
        text = data.Conversations(self.tok, self.template, Q, args.max_tokens, INSTRUCTIONS)
        what = self.tok, self.shapes.image_size, Q
        how = {"augment": False, "split": False, "seed": args.seed, "text": text}
        samples = data.Samples(sets, *what, known=data.Lookalikes(val.files()), **how)
        return samples, data.Samples([val], *what, **how), train.read_weights(args.instruct)

    def stage(self, args):
        """The recipe's, with the arguments' rate and batch size in the place of its own."""
        stage = vpgtrans.STAGES["instruct"]
        batch_size = args.batch_size or stage.batch_size
        lr = args.lr or stage.lr
        final_lr = lr * stage.final_lr / stage.lr
        trains = (args.trains,) if args.trains else stage.trains
        return dataclasses.replace(stage, batch_size=batch_size, lr=lr, final_lr=final_lr, trains=trains)

    def build(self, args, processes):
        """The model with its weights."""
        dtype = transfer.DTYPES[args.precision]
        model, _ = transfer.load_model(args.model, dtype, processes.device, args.llm_weights, processes.mesh)
        transfer.check_vocabulary(self.tok, model.llm, self.place)
        return model

    def fill_cache(self, args, samples, model, processes):
        """Opens, and fills, the caches of what the frozen VPG makes of each image."""
        samples.sets = train.open_caches(args, samples.sets, model.vpg, processes.say)
        for items in samples.sets:
            train.fill_cache(items.cache, model.vpg, model.image_size, args, processes)

    def config(self, args, model):
        """config.json of the run."""
        return transfer.chat_config(args, self.place, model, self.template)


# ------------------------------------------------------------------- MemVP: questions, as they are asked

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

    A decoder-only LLM reads them as one text. Where that has a token across the prompt's end, as
    Qwen's ":The" for "Response:The answer is A.", each is encoded by itself: when a question is asked,
    the answer is not there yet."""
    ids = tok.encode(prompt)
    if tok.encoder_decoder:
        answer = tok.encode(target.strip())
    else:
        joined = tok.encode(prompt + target)
        answer = joined[len(ids) :]
        if joined[: len(ids)] != ids:
            answer = tok.encode(target)
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
  problems.json and pid_splits.json (data/scienceqa/), for evaluate.py --captions captions.json (data/)
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


def blank_prompt(name):
    """How a task without letters is asked, with {} in the question's place."""
    prompt, _ = TASKS[name].ask({"question": "{}", "choices": [""], "answer": 0, "drawn": ""})
    return prompt


def quoted(word):
    """As a shell takes it for one word."""
    return shlex.quote(str(word))


def way_to_ask(args):
    """A command that asks a run as its task was asked."""
    if args.task == "scienceqa":
        return f"evaluate.py --model {quoted(args.out)} scienceqa={quoted(args.source)}"
    prompt = blank_prompt(args.task).replace("{}", "What is it?")
    return f"sample.py IMAGE --model {quoted(args.out)} --prompt {quoted(prompt)}"


# ------------------------------------------------------------------------------ MemVP: what is read


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


# ------------------------------------------------------------------------------ MemVP: what it trains


def choose_stage(args, task, has_adapters):
    """The task's Stage, with the arguments' rate and batch size in the place of the paper's."""
    stage = task.stage
    batch_size = args.batch_size or stage.batch_size
    lr = args.lr or stage.lr * batch_size / stage.batch_size
    trains = tuple(part for part in stage.trains if has_adapters or part != "adapters")
    return dataclasses.replace(stage, batch_size=batch_size, lr=lr, trains=trains)


def fill_cache(args, questions, model, options, processes):
    """Opens, and fills, the cache of what the frozen ViT or VPG makes of each image."""
    def see(images):
        return model.see(images)["features"]

    nothing = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
    with torch.no_grad(), processes.autocast():
        shape = see(nothing.to(processes.device))[0].shape
    made_with = {name: options[name] for name in ("features", "vit_layers", "normalise", "image_size")}
    made_with["vit"] = transfer.memory_fingerprints(model)["vit"]
    (items,) = questions.sets
    dtype = transfer.DTYPES[args.precision]
    features = cache.FeatureCache(args.cache / args.task, items.files(), shape, dtype, made_with)
    train.check_cache_fits(args.cache, [features], processes.say)
    train.fill_cache(features, see, model.image_size, args, processes)
    questions.sets = [dataclasses.replace(items, cache=features)]


class MemVPTuning:
    """A task is learnt by what a language model's FFNs find in their memory of an image."""

    stop = None  # what ends a caption
    assumed = 12_726, (505, 7), (121, 7)  # as InstructionTuning's
    assumption = "taken are ScienceQA's amounts, and 128 tokens a question"

    def __init__(self, args, is_dry):
        self.name = args.task
        self.task = TASKS[args.task]
        tokenizer, self.tok = transfer.find_tokenizer(args.llm, args.llm_tokenizer)
        llm = hub.resolve(args.llm, "tokenizer" if is_dry else "target")
        self.llm = dataclasses.replace(llm, tokenizer=tokenizer)
        self.vit = hub.resolve(args.vit, "shapes" if is_dry else "vpg")
        self.options = transfer.memory_options(args, self.vit, self.llm)
        dtype = transfer.DTYPES[args.precision]
        self.shapes = transfer.shape_memory_llm(self.options, self.vit, self.llm, dtype, args.llm_weights)

    def read(self, args, say):
        """As InstructionTuning's."""
        return *read_questions(args, self.task, self.tok, self.shapes.image_size, say), None

    def stage(self, args):
        return choose_stage(args, self.task, "adapters" in self.shapes.parts)

    def build(self, args, processes):
        """The model with its weights; its memory is drawn."""
        torch.manual_seed(args.seed)
        dtype = transfer.DTYPES[args.precision]
        model = transfer.build_memory_llm(self.options, self.vit, self.llm, dtype, processes.device,
                                          args.llm_weights, processes.mesh)
        transfer.check_vocabulary(self.tok, model.llm, self.llm)
        return model

    def fill_cache(self, args, questions, model, processes):
        """As InstructionTuning's."""
        fill_cache(args, questions, model, self.options, processes)

    def config(self, args, model):
        return transfer.memory_config(args, self.options, model)


# ---------------------------------------------------------------------------------------- arguments


def add_instructions(parser):
    instruct = parser.add_argument_group("instructions (stage 3): the defaults are the recipe of VL-Vicuna")
    instruct.add_argument("--instruct", action="append", metavar=train.SPEC,
                          help="conversations about images: cc_sbu_align, LLaVA's, or \"messages\", a file "
                               "or the folder that it lies in; may be given several times, and is mixed by "
                               "WEIGHT where that is given. python pairs.py SOURCE shows what is in it")
    instruct.add_argument("--model", help="what is to converse: a run of train.py, or a BLIP-2 (folder, Hub "
                                          "id, short name)")
    instruct.add_argument("--template", choices=tuple(data.TEMPLATES),
                          help="how conversations are written, where the checkpoint of the language model "
                               "does not say it by a chat template; the run keeps it")
    instruct.add_argument("--trains", choices=("projector",),
                          help="train the projector alone, as MiniGPT-4 (default: Q-Former and projector, as "
                               "VL-Vicuna)")
    instruct.add_argument("--val", metavar=train.SPEC,
                          help="conversations for validation (default: 5%% of the images of the first set, "
                               "500 at most, are held out)")


def add_memvp(parser):
    method = parser.add_argument_group("MemVP: the defaults are the paper's")
    method.add_argument("--memvp", metavar="TASK[=FOLDER[@IMAGES]]",
                        help=f"what to learn, of {', '.join(TASKS)}, and where it lies, such as "
                             "scienceqa=datasets/scienceqa (default: TASK under $VPGTRANS_DATA, or "
                             "datasets/)")
    method.add_argument("--llm", help="the language model whose FFNs read the memory: a short name "
                                      "(llama-7b), a Hub id, a folder, or a run of ours")
    method.add_argument("--llm-tokenizer", metavar="NAME",
                        help="where its tokenizer is, if not with it (huggyllama/llama-7b for "
                             "Vicuna)")
    method.add_argument("--vit",
                        help="what sees: CLIP (openai/clip-vit-large-patch14, the paper's), or a"
                             " BLIP-2 or a transfer of ours")
    method.add_argument("--features", choices=("patches", "queries"), default="patches",
                        help="what the memory holds of an image: the ViT's patches, with "
                             "adapters in the ViT; or what the Q-Former of a BLIP-2 or a "
                             "transfer makes of them, as it is (not of the paper) (default: "
                             "%(default)s)")
    method.add_argument("--vit-layers", type=int, metavar="N",
                        help="read patches after block N of the ViT (default: all but the last)")
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
    both = parser.add_argument_group("data")
    both.add_argument("--out", type=Path,
                      help="folder of this run (default: out/<model>-chat or out/<llm>-memvp-<task>)")
    both.add_argument("--max-tokens", type=int, default=512,
                      help="of a question and its answer; longer ones are left out and named (VQAv2, GQA and "
                           "COCO have lengths of their own, and are cut). A conversation loses its end where "
                           "so many stand behind its first question (the original: 160) (default: "
                           "%(default)s)")
    both.add_argument("--val-samples", type=int, default=500,
                      help="for validation, at most (default: %(default)s)")
    both.add_argument("--max-bad", type=float, default=0.01,
                      help="stop when more than this share of the data is unusable, or of the images cannot "
                           "be read, of 1,000 at least (default: %(default)s)")


def add_length(parser):
    length = parser.add_argument_group("length and rate: the defaults are those of the recipes")
    length.add_argument("--batch-size", type=int,
                        help="samples an optimizer step, over all GPUs (default: instructions 120; ScienceQA "
                             "32, VQAv2 300, GQA 500, COCO 250)")
    length.add_argument("--steps", type=int,
                        help="optimizer steps (default: instructions 160, or 10 epochs if that is less; "
                             "MemVP 20 epochs; COCO 100 of its images, 20 of its captions)")
    length.add_argument("--lr", type=float,
                        help="peak rate (default: instructions 1e-5; ScienceQA 1.125e-3, the others 3e-4, in "
                             "proportion to --batch-size)")
    length.add_argument("--clip", type=float, metavar="NORM",
                        help="scale gradients down to this norm where theirs is larger (default:"
                             " never)")
    length.add_argument("--seed", type=int, default=0,
                        help="a run is a function of its arguments and this (default: %(default)s)")


ON_CPU = 4  # samples at a time


def add_machine(parser):
    machine = parser.add_argument_group("machine")
    machine.add_argument("--micro-batch", type=int,
                         help="samples at a time on one GPU; but for the draws of dropout, the"
                              " result is the same whatever it is (default: what should fit into the "
                              f"GPU's memory, {estimate.LARGEST} at most; on a CPU {ON_CPU})")
    train.add_machine_options(machine)
    machine.add_argument("--cache", type=Path, metavar="DIR",
                         help="keep there what stands still of each image, computed once for all runs; for "
                              "--trains projector, --features queries or --adapters 0")


# What is for one of the two alone, and what it cannot do without
INSTRUCTION_OPTIONS = ("model", "template", "trains", "val")
MEMVP_OPTIONS = ("llm", "llm_tokenizer", "vit", "features", "vit_layers", "prompts", "rows", "image_scale",
                 "adapters", "normalise")


def check_method(parser, args):
    """Ends the command unless the options are those of one of the two, whole."""
    if bool(args.instruct) == bool(args.memvp):
        parser.error("one of --instruct and --memvp says what is learnt")
    method, needed, others = "--memvp", ("llm", "vit"), INSTRUCTION_OPTIONS
    if args.instruct:
        method, needed, others = "--instruct", ("model",), MEMVP_OPTIONS
    for name in needed:
        if getattr(args, name) is None:
            parser.error(f"{method} needs {train.option(name)}")
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{train.option(name)} is not for {method}")


def check_memvp(parser, args):
    """Ends the command where options of MemVP exclude each other; says what `args.task` and its
    `args.source` are."""
    args.task, _, source = args.memvp.partition("=")
    args.source = source or str(Path(os.environ.get("VPGTRANS_DATA", "datasets")) / args.task)
    if args.task not in TASKS:
        parser.error(f"--memvp {args.task}: the tasks are {', '.join(TASKS)}")
    if args.features == "queries":
        for name in ("vit_layers", "adapters", "normalise"):
            if getattr(args, name) not in (0, parser.get_default(name)):
                parser.error(f"{train.option(name)} is for --features patches: a Q-Former reads what it was "
                             "trained on")
    if args.cache and args.shard:
        parser.error(train.CACHE_OR_SHARD)
    if args.cache and args.features == "patches" and args.adapters:
        parser.error("--cache is for --features queries or --adapters 0: else the ViT's adapters train, and "
                     "its features change")


def check_instructions(parser, args):
    """Ends the command where options of stage 3 exclude each other."""
    if args.cache and args.trains != "projector":
        parser.error("--cache is for --trains projector: else the Q-Former trains, and what it makes of an "
                     "image changes")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (add_instructions, add_memvp, add_data, add_length, add_machine, train.add_log):
        add(parser)
    return parser


def parse_arguments(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check_method(parser, args)
    train.check_ranges(parser, args)
    if args.memvp:
        check_memvp(parser, args)
        args.out = args.out or Path("out") / f"{Path(args.llm).name}-memvp-{args.task}"
    else:
        check_instructions(parser, args)
        args.out = args.out or Path("out") / f"{Path(args.model).name}-chat"
    return args


# ------------------------------------------------------------------------------------------ the run


def count_steps(args, stage, available, world):
    """The number of optimizer steps over so many samples."""
    if stage.batch_size < world:
        raise ValueError(f"--batch-size {stage.batch_size} leaves some of the {world} processes without a "
                         "sample")
    steps = args.steps
    if not steps and stage.epochs:
        steps = stage.epochs * (available // stage.batch_size)
    elif not steps:
        steps = min(stage.samples, 10 * available) // stage.batch_size
    if steps < 1:
        raise ValueError(f"{available:,} samples do not fill one batch of {stage.batch_size:,}; lower "
                         "--batch-size or set --steps")
    return steps


def example_batch(model, prompt, target):
    """Two samples of so many tokens for a model on the meta device."""
    places = model.num_query_tokens
    ids = [data.IMAGE] * places + [0] * max(1, prompt - places)
    size = model.image_size
    dtype = next(model.llm.parameters()).dtype
    return {
        "prompt_ids": torch.tensor([ids] * 2),
        "target_ids": torch.zeros(2, target, dtype=torch.long, device="meta"),
        "images": torch.empty(2, 3, size, size, dtype=dtype, device="meta"),
    }


def choose_micro_batch(args, stage, found):
    """How many samples at a time: as --micro-batch says, else what should fit into the memory of
    the smallest GPU."""
    if args.micro_batch or found.processes.device.type == "cpu":
        return args.micro_batch or ON_CPU
    batch = example_batch(found.method.shapes, *found.samples.longest().tolist())
    return train.fit_micro_batch(found.method.shapes, [(stage, batch)], found.processes)


def dry_run(args, found):
    """Prints what the run would do and need. Without data, the amounts are assumed."""
    model = found.method.shapes
    world, shards, machine = train.find_cards(args, found.processes)
    available, longest, typical = found.method.assumed
    if found.samples:
        available = int(found.samples.starts[-1])
        longest = found.samples.longest().tolist()
        typical = found.samples.measure().mean(0).round().astype(int).tolist()
    stage = found.method.stage(args)
    steps = count_steps(args, stage, available, world)
    table = vpgtrans.enter_stage(model, stage)
    print(*loop.describe_stage(found.method.name, stage, steps, available, table), sep="\n")
    batches = example_batch(model, *longest), example_batch(model, *typical)
    samples = steps * stage.batch_size
    _, capacity, _ = machine
    micro_batch = args.micro_batch or (None if capacity else ON_CPU)
    print(*estimate.report(model, *batches, samples, machine, micro_batch, world, shards), sep="\n")


@dataclasses.dataclass
class Found:
    """What a run begins with."""

    processes: loop.Processes
    method: InstructionTuning | MemVPTuning
    samples: data.Samples = None  # to train on; a dry run may have none
    held_out: data.Samples = None
    weights: list = None  # of the data sets


def find(args, held):
    """Models and data. The first process goes first: it fetches, scans, and takes the run's folder
    until `held` is closed."""
    is_dry = args.dry_run is not None
    processes = loop.Processes.start(args.precision, None if is_dry else args.shard)
    with processes.first_goes_first():
        if processes.rank == 0 and not is_dry:
            train.take_folder(args, processes, held)
        make = InstructionTuning if args.instruct else MemVPTuning
        found = Found(processes, make(args, is_dry))
        if not is_dry:
            train.check_disk(args.out, found.method.shapes)
        try:
            found.samples, found.held_out, found.weights = found.method.read(args, processes.say)
        except FileNotFoundError as error:
            if not is_dry:
                raise
            missing = str(error).partition(";")[0]
            processes.say(f"{missing}: {found.method.assumption}")
    return found


def begin_log(args, found, model, log):
    """The files of a new run: its config.json, empty metrics, and what of the data was left out."""
    config = json.dumps(found.method.config(args, model), indent=2)
    runs.write(args.out / "config.json", lambda file: file.write_text(config))
    left_out = {}
    for items in found.samples.sets + found.held_out.sets:  # held out of a set, items share its list
        left_out |= {(problem, where): None for problem, places in items.left_out.items() for where in places}
    log.begin(left_out)


def check_same_run(args, state):
    """ValueError if a state is that of a run with other arguments, as far as they matter."""
    # an option that is newer than the state had its default's effect
    defaults = transfer.arguments(make_parser().parse_args([]))
    train.check_same_arguments(args, defaults | state["arguments"])


def set_up(args, found, watch):
    """All that can be wrong with arguments, files and folders, before anything long begins.

    -> (loop.Run, loop.Job, the state to resume from or None)"""
    processes, method, samples = found.processes, found.method, found.samples
    stage = method.stage(args)
    steps = count_steps(args, stage, int(samples.starts[-1]), processes.world)
    args.micro_batch = choose_micro_batch(args, stage, found)
    read = train.describe_data({method.name: samples.sets})
    resumed = runs.load_state(args.out, processes.say) if args.resume else None
    if resumed:
        check_same_run(args, resumed[0])
        train.check_same_data(args, resumed[0], read)
    model = method.build(args, processes)
    if said := transfer.describe_weights(model.llm):
        processes.say(said)
    validation = loop.Validation(found.held_out, args.micro_batch, processes, method.stop)
    log = runs.Log(args.out, processes.rank)
    if resumed:
        log.continue_from([method.name], resumed[0])
    elif processes.rank == 0:
        begin_log(args, found, model, log)
    log.report(processes.gather(validation.bad))
    saved = {"arguments": transfer.arguments(args), "data": read}
    run = loop.Run(args, saved, processes, model, validation, log, watch)
    run.remedy = "Start anew with a lower --lr, with --clip 1 or --precision fp32, in a new --out"
    if args.cache:
        with loop.stopping_when_asked():
            method.fill_cache(args, samples, model, processes)
    order = data.plan(data.sizes(samples.sets), steps * stage.batch_size, args.seed, found.weights)
    return run, loop.Job(method.name, stage, samples, order, steps), resumed


def main(argv=None, watch=None):
    """The command. `watch` is told where the run stands, {"stage", "step", "samples"}, after each
    line of the log."""
    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    args = parse_arguments(argv)
    with contextlib.ExitStack() as held, loop.explaining_memory(args, "finetune.py"):
        try:
            found = find(args, held)
            if args.dry_run is not None:
                return dry_run(args, found) if found.processes.rank == 0 else None
            run, job, resumed = set_up(args, found, watch)
        except (OSError, ValueError) as error:
            loop.end_with(error, "finetune.py")
        try:
            if args.compile:
                loop.compile_layers(run.model)
            with loop.stopping_when_asked():
                loop.train_stage(run, job, resumed)
        except (OSError, loop.Failure) as error:
            loop.end_with(error, "finetune.py")
        if run.processes.rank == 0:
            (args.out / runs.PREVIOUS).unlink(missing_ok=True)
        # a run that had ended before --resume has not been validated again
        matched, shuffled = run.last_validation or run.validation.losses(run.model)
        command = f"chat.py {quoted(args.out)} IMAGE" if args.instruct else way_to_ask(args)
        run.processes.say(f"\n{args.model or args.llm}, {job.name}: {job.steps:,} steps, "
                          f"{run.log.seconds:.0f} s of training; the validation loss is "
                          f"{shuffled - matched:.3f} higher with shuffled images.\nWeights, metrics and "
                          f"curves are in {args.out}/. Try: python {command}")


if __name__ == "__main__":
    loop.run_command(main)
