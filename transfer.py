"""From the names of source and target to the model before its first step; and from a run or
checkpoint to a model that answers.

    src, tgt = find_models("opt-2.7b", "opt-6.7b", tokenizer)
    model, start = build_model(args, src, tgt, tok, sets, processes)   # stage 1 begins with it
    model, tok = load_model("out/opt-2.7b-to-opt-6.7b")
    answer(model, tok, images)                                       # (B,3,H,W) uint8 -> B captions
    model, tok, template = load_chat("out/opt-6.7b-to-vicuna-7b-chat")      # one that converses

A transfer goes: find both models; build the source's VPG around the target's LLM; between them put
the source's projector in the target's words, by the word converter or by what its soft prompts mean
in captions.

Functions raise OSError and ValueError that say what is wrong and what to do, before anything long
begins.

Dq Q-Former width, Ds and Dt LLM widths of source and target, N shared tokens, V vocabulary.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import operator
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import hub
import llm as language_models
import loop
import memvp
import qformer
import vpgtrans
from pairs import one_caption_per_image

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of frozen weights, by --precision


# --------------------------------------------------------------------------------------------- find


def find_tokenizer(tgt, tgt_tokenizer=None):
    """Names of the target and of where its tokenizer is, if elsewhere -> (the tokenizer's folder,
    the Tokenizer), after a look at the target's config.json: gigabytes for a target that cannot be
    used are not fetched."""
    folder = hub.resolve(tgt, "tokenizer").tokenizer
    language_models.read_llm_config(folder)
    if tgt_tokenizer:
        folder = hub.resolve(tgt_tokenizer, "tokenizer").tokenizer
    return folder, data.load_tokenizer(folder)


def find_models(src, tgt, tokenizer, shapes_only=False):
    """Names of source and target, and the target's tokenizer folder -> hub.Place of both. With
    shapes_only no weights are fetched."""
    src = hub.resolve(src, "shapes" if shapes_only else "source")
    tgt = hub.resolve(tgt, "tokenizer" if shapes_only else "target")
    return src, dataclasses.replace(tgt, tokenizer=tokenizer)


# -------------------------------------------------------------- the projector in the target's words


@dataclasses.dataclass
class SharedWords:
    """What two language models have in common: tokenizers, word embeddings, and the tokens that
    both know."""

    src_tok: data.Tokenizer
    tgt_tok: data.Tokenizer
    src_words: torch.Tensor  # (V, Ds)
    tgt_words: torch.Tensor  # (V, Dt)
    src_ids: torch.Tensor  # (N,)
    tgt_ids: torch.Tensor  # (N,)


def read_shared_words(projector, src, tgt):
    """The source's projector, and where source and target lie -> SharedWords."""
    src_tok = data.load_tokenizer(src.tokenizer)
    tgt_tok = data.load_tokenizer(tgt.tokenizer)
    src_ids, tgt_ids = vpgtrans.shared_tokens(src_tok.vocab(), tgt_tok.vocab())
    src_words = language_models.read_word_embeddings(src.llm)
    tgt_words = language_models.read_word_embeddings(tgt.llm)
    Ds, Dt = src_words.shape[1], tgt_words.shape[1]
    if projector.out_features != Ds:
        raise ValueError(f"{src.folder}: the projector's output is {projector.out_features} wide, but the "
                         f"word embeddings of its LLM ({src.llm}) are {Ds} wide, and the target's {Dt}; it "
                         "belongs to another LLM")
    if len(src_ids) == 0:
        raise ValueError(f"the tokenizers of {src.llm} and {tgt.llm} share no token; use --init random")
    return SharedWords(src_tok, tgt_tok, src_words, tgt_words, src_ids, tgt_ids)


COUNTED = 100_000  # captions that tell how often a token is used: all of a million would take 17 s


def count_shared(words, sets, max_tokens):
    """How often captions use each of the shared tokens, (N,), by a sample of them."""
    total = sum(map(len, sets))
    every = -(-total // COUNTED)
    captions = (pairs.captions[i] for pairs in sets for i in range(0, len(pairs), every))
    size = max(words.src_tok.vocab().values()) + 1
    return data.count_tokens(words.src_tok, captions, size, max_tokens)[words.src_ids]


def convert_projector(projector, words, counts, say, ridge=vpgtrans.RIDGE):
    """--init converter: the source's projector, then the word converter. -> nn.Linear(Dq, Dt)"""
    src_words = words.src_words[words.src_ids]
    tgt_words = words.tgt_words[words.tgt_ids]
    began = time.time()
    weights = vpgtrans.token_weights(counts)
    converter = vpgtrans.fit_word_converter(src_words, tgt_words, weights, ridge)
    error = weighted_variance(tgt_words - converter(src_words), counts)
    explained = 1 - error / weighted_variance(tgt_words, counts)
    say(f"word converter: {converter.in_features} -> {converter.out_features}, fitted on {len(counts):,} "
        f"shared tokens, {(counts > 0).sum():,} of them in the captions, ridge {ridge:g}; explains "
        f"{explained:.1%} of the target embeddings' variance there ({time.time() - began:.1f} s)")
    return vpgtrans.merge(projector, converter)


def weighted_variance(x, counts):
    """(N,D), (N,) -> the variance of the rows, each as often as it counts, up to a factor."""
    counts = counts.float()
    mean = counts @ x / counts.sum()
    return (counts @ (x - mean) ** 2).sum()


def match_tokens(src_ids, tgt_ids, src_names, tgt_names):
    """Where two tokenizers spell parts of one caption alike: ids of both -> [(source id, target
    id)]; names are {id: bytes}.

    The same bytes match first; else a space before them does not count, which some tokenizers write
    before the first word."""
    named = [(tgt_names[id], id) for id in tgt_ids if id in tgt_names]
    there = {name.strip(): id for name, id in named} | dict(named)
    matched = []
    for id in src_ids:
        name = src_names.get(id)
        if not name:
            continue
        same = name if name in there else name.strip()
        if same in there:
            matched.append((id, there[same]))
    return matched


# ------------------------------------------------------------- training images that a start looks at

LOOKS = 300  # images: a hundred are nearly as good as a thousand


def look_at_images(vpg, sets, args, processes, count=LOOKS):
    """-> data sets of `count` images in all, as many of each of `sets`, with one caption each, and as
    their `cache` {file: queries (Q,Dq)} what the VPG makes of them.

    Images that cannot be read are passed over and counted; ValueError if none can be."""
    looks = []
    for pairs in sets:
        pairs = one_caption_per_image(pairs, len(pairs.images))
        every = -(-len(pairs) * len(sets) // count)
        looks.append(pairs.subset(np.arange(0, len(pairs), every)))
    files = [file for pairs in looks for file in pairs.files()]
    unreadable = {}

    def read(file):
        try:
            return data.read_image(file, vpg.image_size)
        except OSError as error:
            unreadable[file] = str(error)

    with concurrent.futures.ThreadPoolExecutor(max(1, args.workers)) as pool:
        bar = tqdm(pool.map(read, files), "images to start from", len(files), leave=False,
                   disable=processes.hides_bars)
        pixels = {file: image for file, image in zip(files, bar) if image is not None}
    if unreadable:
        problem = f"{len(unreadable):,} cannot be read, the first: {next(iter(unreadable.values()))}"
        if not pixels:
            raise ValueError(f"of the {len(files):,} training images to start from {problem}")
        processes.say(f"of the {len(files):,} training images to start from {problem}")
    queries = []
    with torch.no_grad(), processes.autocast():
        for batch in torch.stack(list(pixels.values())).split(args.micro_batch):
            queries.append(vpg(batch.to(processes.device)).float().cpu())
    seen = dict(zip(pixels, torch.cat(queries)))
    return [dataclasses.replace(pairs.without(unreadable), cache=seen) for pairs in looks]


def refit_projector(projector, words, looks, say):
    """--init captions: the source's projector fitted anew to words of the target. -> nn.Linear(Dq,
    Dt)

    Images whose caption has not one token in both tokenizers are passed over and counted; ValueError
    if all are."""
    began = time.time()
    src_names = {id: token for token, id in words.src_tok.vocab().items()}
    tgt_names = {id: token for token, id in words.tgt_tok.vocab().items()}
    queries, src_captions, tgt_captions = [], [], []
    for pairs in looks:
        for i, caption in enumerate(pairs.captions):
            src_ids = words.src_tok.encode(caption)
            tgt_ids = words.tgt_tok.encode(caption)
            matched = match_tokens(src_ids, tgt_ids, src_names, tgt_names)
            if matched:
                src_ids, tgt_ids = map(list, zip(*matched))
                queries.append(pairs.cache[pairs.file(i)])
                src_captions.append(words.src_words[src_ids])
                tgt_captions.append(words.tgt_words[tgt_ids])
    wordless = sum(map(len, looks)) - len(queries)
    if not queries:
        raise ValueError(f"of {wordless:,} captions not one has a word that the tokenizers of source and "
                         "target share; use --init converter or random")
    projector = vpgtrans.fit_to_captions(torch.stack(queries), projector, src_captions, tgt_captions)
    said = f"projector: fitted to the captions of {len(queries):,} images ({time.time() - began:.1f} s)"
    if wordless:
        said += f"; without {wordless:,} whose captions have no word in both LLMs"
    say(said)
    return projector


def keep_back(looks):
    """Data sets -> two thirds of each to start from, and the others to judge a start by. ValueError if
    these are fewer than two images."""
    kept = [np.arange(len(pairs)) % 3 == 2 for pairs in looks]
    train = [pairs.subset(np.flatnonzero(~rows)) for pairs, rows in zip(looks, kept)]
    judge = [pairs.subset(np.flatnonzero(rows)) for pairs, rows in zip(looks, kept)]
    if sum(map(len, judge)) < 2:
        raise ValueError(f"--init auto judges its starts by a third of the training images, two at least: "
                         f"{sum(map(len, looks))} are too few; use --init captions or converter")
    return train, judge


# --------------------------------------------------------------- --init auto: which start goes furthest

RIDGES = (1.0, 10.0)  # of the word converters that are tried
RATES = (5e-4, 2e-3, 5e-3, 2e-2)  # that each start is tried at, until one does worse
LOWER_RATES = (1e-4, 2e-5)  # and these, where the first of those was best
TRIAL_STEPS = 20
TRIAL_BATCH = 16
# Of the best trial's rate, for the warm-up: so few steps favour rates at which more of them may leap up.
# After sixty steps half of it is 0.04 behind at most, but for T5's noise (docs/notes.md).
RATE_SHARE = 0.5


def look_samples(looks, model, tok, args, split):
    """Data sets with their queries -> Samples, of which each is one of the looks; `split`: as for
    training, where the encoder of a T5 reads a part of the caption."""
    vpg = model.vpg
    return data.Samples(looks, tok, vpg.image_size, vpg.num_query_tokens, args.max_tokens, augment=False,
                        split=split, seed=args.seed)


def starts(projector, words, counts, looks, random):
    """{name: projector nn.Linear(Dq, Dt)} of all starts at hand, the `random` projector among them."""
    def quietly(_):
        pass

    named = {}
    for ridge in RIDGES:
        named[f"converter, ridge {ridge:g}"] = convert_projector(projector, words, counts, quietly, ridge)
    with contextlib.suppress(ValueError):  # no caption has a word in both
        named["captions"] = refit_projector(projector, words, looks, quietly)
    named["random"] = copy.deepcopy(random)
    return named


def try_start(model, projector, lr, train, processes, args):
    """A few optimizer steps of the model's projector alone, from a start, on samples of `train`."""
    model.projector.load_state_dict(projector.state_dict())
    stage = dataclasses.replace(vpgtrans.STAGES["warm-up"], lr=lr, final_lr=lr)
    optimizer = loop.new_optimizer(model, stage)
    order = data.plan([train.starts[-1]], TRIAL_STEPS * TRIAL_BATCH, train.seed)
    for step in range(TRIAL_STEPS):
        positions = torch.arange(step * TRIAL_BATCH, (step + 1) * TRIAL_BATCH)
        micro_batches = []
        for some in positions.split(args.micro_batch):
            micro_batches.append(train.collate([train[i, order[i]] for i in some.tolist()]))
        loop.optimizer_step(model, micro_batches, optimizer, processes, args.clip)


def pick_start(model, named, train, held_out, args, processes):
    """--init auto: of the starts, {name: projector}, the one whose loss is lowest after a few steps,
    each at the rate that suits it best. -> {"init", "lr", "tried": [{"init", "lr", "first", "loss",
    "shuffled"}, ...]}: what was taken and half of its rate, for the warm-up; of all trials the rates,
    and the losses at first, after the steps, and then with shuffled images.

    The loss before any step misleads: a random projector's may be lower than a converted one's that
    is ahead after twenty steps. The steps are on the samples of `train`, the losses on those
    `held_out`, on which nothing was fitted. Rates rise until one does worse, and fall
    where that is so at once: what one language model needs spoils in twenty steps the start of
    another."""
    alone = dataclasses.replace(processes, rank=0, world=1)
    validation = loop.Validation(held_out, args.micro_batch, alone)
    vpgtrans.enter_stage(model, vpgtrans.STAGES["warm-up"])
    tried = []
    for name, projector in tqdm(named.items(), "starts", leave=False, disable=processes.hides_bars):
        model.projector.load_state_dict(projector.state_dict())
        first, _ = validation.losses(model)
        rows = []
        best = None
        for rates in (RATES, LOWER_RATES):
            for lr in rates:
                try_start(model, projector, lr, train, alone, args)
                loss, shuffled = validation.losses(model)
                if processes.mesh:  # nobody goes another way for a rounding error
                    loss, shuffled = processes.gather([(loss, shuffled)])[0]
                rows.append({"init": name, "lr": lr, "first": first, "loss": loss, "shuffled": shuffled})
                best = min(rows, key=loss_or_infinity)
                if best is not rows[-1]:
                    break
            if best["lr"] > RATES[0]:
                break
        tried += rows
    best = min(tried, key=loss_or_infinity)
    if not math.isfinite(best["loss"]):
        raise ValueError("the loss of every start is NaN or infinite; look at --tgt and --precision")
    return {"init": best["init"], "lr": RATE_SHARE * best["lr"], "tried": tried}


def loss_or_infinity(row):
    return row["loss"] if math.isfinite(row["loss"]) else math.inf


def describe_start(start):
    """Lines: what --init auto has tried, each start at its best rate, and what it took."""
    tried = len(start["tried"])
    yield (f"{tried} trials of {TRIAL_STEPS} steps of {TRIAL_BATCH} samples, the projector alone "
           f"({start['seconds']:.0f} s); {RATE_SHARE:g} of the best one's rate is for the warm-up")
    yield f"  start                     at first   after {TRIAL_STEPS} steps   shuffled images   at rate"
    for name, rows in itertools.groupby(start["tried"], key=operator.itemgetter("init")):
        row = min(rows, key=loss_or_infinity)
        taken = "  <- taken" if name == start["init"] else ""
        yield (f"  {name:24}{row['first']:10.3f}{row['loss']:17.3f}{row['shuffled']:18.3f}"
               f"{row['lr']:10g}{taken}")


# ------------------------------------------------------------------ the model before its first step


def size_of(module):
    """Bytes of a module's parameters in this process."""
    own = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]  # of a DTensor
    return sum(parameter.nbytes for parameter in own)


def describe_weights(llm):
    """A line about an LLM that takes less memory than its checkpoint, else None."""
    size = f"{size_of(llm) / 1e9:.2f} GB"
    if llm.weights:
        return f"LLM: the matrices of its blocks in {llm.weights}, {size} in all"
    if llm.mesh:
        return f"LLM: the matrices of its blocks sharded over {llm.mesh.size()} processes, {size} in each"


def with_llm_weights(model, weights):
    """A model without weights, whose LLM's matrices take as much memory as --llm-weights says."""
    if weights:
        language_models.quantise_blocks(model.llm, weights)
    return model


def shape_model(args, src, tgt):
    """The model of a run without weights, on the meta device: what is computed beforehand needs
    shapes alone."""
    folder = hub.resolve(args.q_former, "shapes").folder if args.q_former else src.folder
    is_clip = str(hub.read_config(folder).get("model_type")).startswith("clip")
    if is_clip and not args.from_scratch:
        raise ValueError(f"{folder}: holds no Q-Former; a ViT alone is a source for training "
                         "--from-scratch only")
    vpg = qformer.empty_vpg(folder, args.image_size, args.vit_layers)
    llm = language_models.empty_llm(tgt.llm)
    model = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm)
    return with_llm_weights(model.to("meta", DTYPES[args.precision]), args.llm_weights)


def example_batch(model, tok, tokens):
    """A batch of two for the model of shape_model, with captions of so many tokens, on the meta
    device."""
    prompt = data.prompt_ids(tok, model.vpg.num_query_tokens)
    size = model.vpg.image_size
    return {
        "prompt_ids": torch.tensor([prompt] * 2),
        "target_ids": torch.zeros(2, tokens, dtype=torch.long, device="meta"),
        "images": torch.empty(2, 3, size, size, dtype=model.projector.weight.dtype, device="meta"),
    }


def check_vocabulary(tok, llm, tgt):
    """ValueError if a target's tokenizer has ids that its LLM does not know."""
    last_id = max(tok.vocab().values())
    if last_id >= llm.vocab_size:
        raise ValueError(f"the tokenizer in {tgt.tokenizer} has ids up to {last_id}, the vocabulary of "
                         f"{tgt.llm} only up to {llm.vocab_size - 1}: it belongs to another LLM (see "
                         "--tgt-tokenizer, of finetune.py and export.py --llm-tokenizer)")


def build_model(args, src, tgt, tok, sets, processes, resumed=False):
    """The model as a run starts: the source's ViT and (but from scratch) Q-Former, a projector, the
    target's LLM. -> (VisualLLM, what --init auto has found or None)

    `tok` is the target's tokenizer, `sets` are the pairs that help to start the projector, unless
    the run is `resumed` with a projector that was saved."""
    dtype = DTYPES[args.precision]
    device = processes.device
    reads_q_former = not args.from_scratch or args.q_former is not None
    q_former = hub.resolve(args.q_former, "vpg") if args.q_former else src
    vpg = qformer.load_vpg(q_former.folder, dtype, device, vit_folder=src.vit, q_former=reads_q_former,
                           image_size=args.image_size, vit_layers=args.vit_layers, mesh=processes.mesh)
    hub.check_belongs(src, vit=vpg.frozen_parameters())
    llm = language_models.load_llm(tgt.llm, dtype, device, args.llm_weights, processes.mesh)
    if said := describe_weights(llm):
        processes.say(said)
    check_vocabulary(tok, llm, tgt)
    torch.manual_seed(args.seed)
    model = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim).to(device), llm)
    start = None
    if args.from_scratch:
        if not reads_q_former:  # drawn anew, by the run's seed
            vpg.reset()
        source = f"Q-Former of {args.q_former}" if reads_q_former else "random Q-Former"
        processes.say(f"from scratch: {source}, random projector")
    elif resumed:
        processes.say("projector: as it was saved")
    elif processes.rank == 0 or processes.mesh:  # the first sends its own; into shards all go together
        start = start_projector(args, model, src, tgt, tok, sets, processes)
    if processes.world > 1:
        for parameter in model.saved().values():
            dist.broadcast(parameter.data, src=0)
        start = processes.gather([start])[0]
    return model, start


def start_projector(args, model, src, tgt, tok, sets, processes):
    """Gives a model, which has a random projector, the one that a transfer begins with, by --init.
    -> what --init auto has found, else None"""
    say = processes.say
    if args.init == "random":
        say("projector: random")
        return None
    began = time.time()
    projector = qformer.load_projector(src.folder)
    if src.llm.resolve() == tgt.llm.resolve():
        model.projector.load_state_dict(projector.state_dict())
        say("source and target are the same LLM: the projector stays as it is")
        return None
    words = read_shared_words(projector, src, tgt)
    start = None
    if args.init == "converter":
        counts = count_shared(words, sets, args.max_tokens)
        projector = convert_projector(projector, words, counts, say, args.ridge)
    else:
        looks = look_at_images(model.vpg, sets, args, processes)
    if args.init == "captions":
        projector = refit_projector(projector, words, looks, say)
    if args.init == "auto":
        fitted, kept_back = keep_back(looks)
        counts = count_shared(words, sets, args.max_tokens)
        named = starts(projector, words, counts, fitted, model.projector)
        say(f"starts: {', '.join(named)}; {TRIAL_STEPS} steps each, at rates that rise until one does worse")
        train = look_samples(fitted, model, tok, args, split=True)
        held_out = look_samples(kept_back, model, tok, args, split=False)
        start = pick_start(model, named, train, held_out, args, processes)
        start["seconds"] = time.time() - began
        say("\n".join(describe_start(start)))
        projector = named[start["init"]]
    model.projector.load_state_dict(projector.state_dict())
    return start


# --------------------------------------------------------------------------------------------- MemVP

MEMORY_MODELS = {"memory": memvp.MemoryLLM, "input": memvp.InputPromptLLM}


def make_memory_llm(options, vit, llm):
    """`options`: a run's {prompts, features, adapters, normalise, image_size, rows, image_scale};
    a ViT or VPG and an LLM -> the model that MemVP trains, float32 where it does."""
    if options["features"] == "patches":
        vit = memvp.AdaptedViT(vit, options["adapters"], options["normalise"], options["image_size"])
    memory = memvp.VisualMemory(vit.dim, llm.dim, options["rows"], image_scale=options["image_scale"])
    return MEMORY_MODELS[options["prompts"]](vit, memory, llm)


def memory_options(args, vit, llm):
    """What make_memory_llm needs, of a command's arguments and where ViT and LLM lie."""
    vision = hub.read_config(vit.folder)
    image_size = vision.get("image_size") or vision.get("vision_config", {}).get("image_size", 224)
    dim = language_models.empty_llm(llm.llm).dim
    blocks = len(qformer.empty_vit(vit.vit).encoder["layers"])
    return {
        "prompts": args.prompts,
        "features": args.features,
        "vit_layers": (args.vit_layers or blocks - 1) if args.features == "patches" else None,
        "adapters": args.adapters if args.features == "patches" else 0,
        "normalise": args.normalise,
        "image_size": image_size,
        "rows": args.rows or (320 if dim <= 4096 else 400),
        "image_scale": args.image_scale,
    }


def shape_memory_llm(options, vit, llm, dtype, weights=None):
    """As build_memory_llm without weights, on the meta device."""
    with torch.device("meta"):
        if options["features"] == "patches":
            vision = qformer.empty_vit(vit.vit, options["vit_layers"])
        else:
            vision = qformer.empty_vpg(vit.folder)
        model = make_memory_llm(options, vision, language_models.empty_llm(llm.llm))
    return with_llm_weights(model.to("meta", dtype), weights)


def build_memory_llm(options, vit, llm, dtype, device, weights=None, mesh=None):
    """The model as MemVP starts, but for the draws of its memory: hub.Place of what sees and of the
    LLM -> a MemoryLLM."""
    if options["features"] == "patches":
        vision = qformer.load_vit(vit.vit, dtype, device, options["vit_layers"], mesh)
    else:
        vision = qformer.load_vpg(vit.folder, dtype, device, vit_folder=vit.vit, mesh=mesh)
        hub.check_belongs(vit, vit=vision.frozen_parameters())
    language_model = language_models.load_llm(llm.llm, dtype, device, weights, mesh)
    return make_memory_llm(options, vision, language_model).to(device)


def memory_fingerprints(model):
    """Of what a run of MemVP was trained with and does not save: {"vit": ..., "llm": ...}"""
    read = qformer.as_read(model.vit)
    vision = {name: tensor for name, tensor in read.items() if not name.startswith("adapters.")}
    return {"vit": hub.fingerprint(vision), "llm": hub.fingerprint(model.llm.as_read())}


def load_memory_model(place, dtype, device, weights=None):
    """A run of MemVP -> MemoryLLM in eval mode. ValueError if ViT or LLM are not those that it was
    trained with."""
    run = hub.read_config(place.folder)
    vit = hub.resolve(run["vit"]["name"], "vpg")
    model = build_memory_llm(run["memory"], vit, place, dtype, device, weights)
    for part, found in memory_fingerprints(model).items():
        hub.check_fingerprint(place.folder, run, part, found)
    saved = model.saved()
    tensors = dict(language_models.read_tensors(place.folder, lambda name: True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in saved.items()}:
        raise ValueError(f"{place.folder}/model.safetensors: its tensors are not those that config.json "
                         "says; copy the run again")
    with torch.no_grad():
        for name, parameter in saved.items():
            parameter.copy_(tensors[name])
    return model.requires_grad_(False).eval()


# ------------------------------------------------------------------------ what a run says of itself


def arguments(args):
    """A command's arguments as JSON has them; where a cache lies does not matter, but whether there
    is one."""
    return json.loads(json.dumps(vars(args) | {"cache": bool(args.cache) or None}, default=str))


def run_config(args, src, model, start=None):
    """config.json of a run: how its VPG is built, which ViT and LLM belong to its weights, its
    arguments, and what --init auto has found."""
    source = hub.read_config(src.folder)
    is_run = source.get("model_type") == "vpgtrans"
    vit = {
        "name": source["vit"]["name"] if is_run else hub.lasting_name(args.src),
        "fingerprint": hub.fingerprint(model.vpg.frozen_parameters()),
    }
    llm = {
        "name": hub.lasting_name(args.tgt),
        "fingerprint": hub.fingerprint(model.llm.as_read()),
        "tokenizer": args.tgt_tokenizer and hub.lasting_name(args.tgt_tokenizer),
    }
    belongs = {"vit": vit, "llm": llm, "arguments": arguments(args)}
    if start:
        belongs["start"] = start
    return {"model_type": "vpgtrans", **model.vpg.config, **belongs}


def memory_config(args, options, model):
    """config.json of a run of MemVP: how its memory is made, which ViT and LLM belong to it, its
    arguments."""
    found = memory_fingerprints(model)
    tokenizer = args.llm_tokenizer and hub.lasting_name(args.llm_tokenizer)
    return {
        "model_type": "memvp",
        "memory": options,
        "vit": {"name": hub.lasting_name(args.vit), "fingerprint": found["vit"]},
        "llm": {"name": hub.lasting_name(args.llm), "fingerprint": found["llm"], "tokenizer": tokenizer},
        "arguments": arguments(args),
    }


# ----------------------------------------------------------------------------- a model that answers


def trained_with(config):
    """The --llm-weights of a run, by its config.json; None: its LLM was not quantised, or it is no run
    of ours."""
    return config.get("arguments", {}).get("llm_weights")


def load_model(name, dtype=torch.bfloat16, device="cpu", weights=None, mesh=None):
    """A run of ours, a BLIP-2 folder or its Hub id -> (VisualLLM or MemoryLLM in eval mode, its
    tokenizer). With a mesh, a VisualLLM's frozen blocks are sharded over it.

    `weights` of the LLM: "int8", "nf4", or "full", those of `dtype`; None: as in the run's training,
    and "full" where it is no run of ours."""
    place = hub.resolve(name, "model")
    config = hub.read_config(place.folder)
    weights = weights or trained_with(config)
    weights = None if weights == "full" else weights
    if config.get("model_type") == "memvp":
        model = load_memory_model(place, dtype, device, weights)
        return model, data.load_tokenizer(place.tokenizer)
    vpg = qformer.load_vpg(place.folder, dtype, device, vit_folder=place.vit, mesh=mesh)
    llm = language_models.load_llm(place.llm, dtype, device, weights, mesh)
    hub.check_belongs(place, vit=vpg.frozen_parameters(), llm=llm.as_read())
    projector = qformer.load_projector(place.folder).to(device)
    return vpgtrans.VisualLLM(vpg, projector, llm).eval(), data.load_tokenizer(place.tokenizer)


def taught_template(place):
    """The data.ChatTemplate that stage 3 taught a run, or what was exported from it, by its config.json;
    None where there was no stage 3. ValueError if it is damaged."""
    taught = hub.read_config(place.folder).get("chat_template")
    if not isinstance(taught, dict):
        return None
    try:
        return data.ChatTemplate(**taught)
    except TypeError as error:
        raise ValueError(f"{place.folder / 'config.json'}: its chat_template is damaged ({error}); copy the "
                         "run again") from None


def choose_template(place, name=None):
    """The data.ChatTemplate in which a model converses: that of its run, or what was exported from it,
    where stage 3 taught it; else the one of data.TEMPLATES that is named; else its LLM's own. ValueError
    if it has none, or was taught in another than is named."""
    if name is not None and name not in data.TEMPLATES:
        raise ValueError(f"--template {name}: there are {', '.join(data.TEMPLATES)}; without it, a "
                         "checkpoint's own chat template is taken")
    asked = data.TEMPLATES.get(name)
    taught = taught_template(place)
    if taught is None:
        template = asked or data.load_chat_template(place.llm)
        if template is None:
            raise ValueError(f"{place.llm}: has no chat template, neither chat_template.jinja nor in "
                             "tokenizer_config.json; name the one that it was taught with: --template "
                             f"{' or '.join(data.TEMPLATES)}")
        return template
    if asked and describe_template(asked) != describe_template(taught):
        raise ValueError(f"{place.name}: was taught to converse in another chat template than {name}; leave "
                         "--template out, and it is asked in its own")
    return taught


def describe_template(template):
    """A ChatTemplate as JSON has it: what config.json of a run keeps of it."""
    return json.loads(json.dumps(vars(template)))


def find_whole(name):
    """A run of VPGTrans or a BLIP-2 checkpoint -> hub.Place, for which no weights are fetched."""
    place = hub.resolve(name, "shapes")
    run = hub.read_config(place.folder)
    if run.get("model_type") == "memvp":
        raise ValueError(f"{name}: a run of MemVP, which answers the questions of its task and does not "
                         "converse; ask it by sample.py, without --template")
    if run.get("model_type") != "vpgtrans":
        return place
    llm = hub.resolve(run["llm"]["name"], "tokenizer").folder
    tokenizer = hub.resolve(run["llm"].get("tokenizer") or run["llm"]["name"], "tokenizer").folder
    return dataclasses.replace(place, llm=llm, tokenizer=tokenizer)


def shape_whole(place, dtype, weights=None):
    """The model of load_model without weights, on the meta device."""
    vpg = qformer.empty_vpg(place.folder)
    llm = language_models.empty_llm(place.llm)
    model = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm)
    return with_llm_weights(model.to("meta", dtype), weights)


def chat_config(args, place, model, template):
    """config.json of a run that taught `args.model` to converse: that of a transfer, and the
    template."""
    before = hub.read_config(place.folder)
    belongs = {part: before.get(part) for part in ("vit", "llm")}
    if before.get("model_type") != "vpgtrans":  # a BLIP-2 checkpoint, which holds both
        name = hub.lasting_name(args.model)
        name = hub.SOURCES.get(name, name)  # the LLM is the one in there, not the target of that name
        parts = {"vit": model.vpg.frozen_parameters(), "llm": model.llm.as_read()}
        belongs = {part: {"name": name, "fingerprint": hub.fingerprint(parts[part])} for part in parts}
    kept = {"chat_template": describe_template(template), "arguments": arguments(args)}
    return {"model_type": "vpgtrans", **model.vpg.config, **belongs, **kept}


def load_chat(name, template=None, dtype=torch.bfloat16, device="cpu", weights=None):
    """As load_model, for conversations -> (VisualLLM in eval mode, its tokenizer, its
    data.ChatTemplate); `template` is a name of data.TEMPLATES, for a checkpoint without one. ValueError
    as of choose_template."""
    found = choose_template(find_whole(name), template)  # before gigabytes are fetched and read
    return *load_model(name, dtype, device, weights), found


# A model that continues a text is asked with that text, one that was taught to converse with what a
# person says first. sample.py and evaluate.py ask both, each in its own way; chat.py the second alone.

DESCRIBE = "Describe this image in one sentence."  # who converses is asked so for a caption


def find_template(name, asked=None):
    """The data.ChatTemplate in which a single question is asked: what stage 3 taught, or one of
    data.TEMPLATES that is named (`asked`). None: the model continues a text. ValueError as of
    choose_template."""
    if asked is None and taught_template(hub.resolve(name, "shapes")) is None:
        return None
    return choose_template(find_whole(name), asked)


def caption_prompt(template):
    """What a model is asked for a caption."""
    return DESCRIBE if template else ""


def ask_ids(tok, num_query_tokens, text, template=None):
    """What the LLM reads before it answers a text, as ids of data.prompt_ids or, in a template, of
    data.chat_prompt_ids.

    A blank at the end of a text that is continued is taken off: byte-level BPEs write it as the
    beginning of the next word, so that a model which reads it alone answers nonsense."""
    if template:
        return data.chat_prompt_ids(tok, template, [[text, None]], num_query_tokens)
    return data.prompt_ids(tok, num_query_tokens, text.rstrip(" "))


def answer_ends(model, tok):
    """The single ids that end an answer in a conversation: EOS, and the checkpoint's end marks. But not a
    newline: BLIP-2's OPT names that as its end mark, since it ends a caption."""
    own = [ids for ids in model.llm.stop if ids != (tok.end_id,) or tok.end_id == tok.eos_id]
    return [*own, (tok.eos_id,)]


def ends(model, tok, template=None):
    """What ends an answer, as the LLM's generate takes it as `stop`."""
    if template:
        return tuple(dict.fromkeys([*answer_ends(model, tok), *data.stop_ids(tok, template)]))
    return (tok.end_id,), (tok.eos_id,)


def read_answer(tok, ids, template=None):
    """Ids that the LLM has said -> the answer as a text."""
    text = tok.decode(ids)
    if template and template.stop:  # however it was tokenized
        text = text.partition(template.stop)[0]
    return text.strip()


def answer(model, tok, images, prompt="", template=None, **options):
    """What the model says about images (B,3,H,W) uint8 behind a prompt, or when a person asks it in a
    template: a caption where the prompt is empty. -> B texts. `options` are those of the LLM's
    generate."""
    ids = ask_ids(tok, model.num_query_tokens, prompt or caption_prompt(template), template)
    prompts = torch.tensor([ids]).expand(len(images), -1)
    images = images.to(next(model.parameters()).device)
    answers = model.generate(prompts, images=images, stop=ends(model, tok, template), **options)
    return [read_answer(tok, row, template) for row in answers]
