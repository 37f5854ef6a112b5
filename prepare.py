"""What happens before the first step of train.py: processes, data, models, and what is computed about them.

    processes   one a GPU under torchrun
    data        from --data or the paper's layout to data sets, mixtures and lengths
    models      source and target, the projector in words of the target, the model as it starts
    the run     its config.json, what must be the same on --resume, the cache of stage 1, --dry-run

Functions take train.py's arguments; what can be wrong raises OSError or ValueError before anything long begins.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import cache
import data
import estimate
import hub
import llm as language_models
import qformer
import runs
import vpgtrans
from vpgtrans import STAGES

# -------------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among its peers: one a GPU under torchrun, else a single one."""

    rank: int
    world: int
    device: torch.device
    precision: str

    @classmethod
    def start(cls, precision):
        rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
        return cls(rank, world, device, precision)

    def say(self, text):
        """Prints on the first process only."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)

    def sum(self, *numbers):
        """The sums of some numbers over all processes, as floats; on the CPU, so that no GPU has to be waited for."""
        total = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, things):
        """The lists of all processes, one behind the other."""
        lists = [things] * self.world
        if self.world > 1:
            dist.all_gather_object(lists, things)
        return list(itertools.chain.from_iterable(lists))

    def autocast(self):
        """bf16 arithmetic around float32 trained weights; torch keeps losses and norms in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


# -------------------------------------------------------------------------------------------------------------------- data


def name_data(args, stages, say):
    """-> {stage: specs of its data sets}, spec of the validation set or None: as the arguments say, or the paper's choice."""
    if args.data:
        return {name: args.warm_up_data or args.data if name == "warm-up" else args.data for name in stages}, args.val
    root = Path(os.environ.get("VPGTRANS_DATA", "datasets"))
    found, specs = data.find_paper_data(root), {}
    for name in stages:
        shares = data.FINE_TUNE if name == "fine-tune" else data.WARM_UP
        specs[name] = [f"{d}={found[d]}" + (f":{share}" if name == "fine-tune" else "") for d, share in shares.items() if d in found]
        missing = [d for d in shares if d not in found]
        if not specs[name]:
            raise FileNotFoundError(f"stage {name} needs {' or '.join(shares)}\n{data.how_to_get_paper_data(root)}")
        if missing:
            say(f"stage {name}: not under {root}/ and left out: {', '.join(missing)}")
    return specs, args.val or (f"val={found['val']}" if "val" in found else None)


def find_data(args, stages, say):
    """-> ({stage: (data sets, weights or None)}, validation Pairs), and says what was found and what is left out."""
    specs, val_spec = name_data(args, stages, say)
    place = lambda spec: data.parse_spec(spec)[1:3]  # (file, images): what a stage weights is read once
    pairs = {place(spec): data.read_pairs(spec, crop=not spec.startswith("vg=")) for spec in sum(specs.values(), [])}
    val = data.read_pairs(val_spec) if val_spec else None
    for p in [*pairs.values(), *([val] if val else [])]:
        check_left_out(p, args.max_bad, say)
    if not val:
        whole = pairs[place(specs[list(stages)[-1]][0])]
        held = data.hold_out(whole, args.val_samples)
        val = whole.without(held, instead=True)
        pairs = {key: p.without(held) for key, p in pairs.items()}
        say(f"validation: {len(held)} images of {whole.name} held out")
    for (file, _), p in pairs.items():
        say(f"data: {p.name}, {len(p):,} pairs, {len(p.images):,} images ({file})")
        if not len(p):
            raise ValueError(f"{file}: no pair is left to train on; name --val, or use more pairs")
    sets = {}
    for name in stages:
        weights = [data.parse_spec(spec)[3] for spec in specs[name]]
        if any(weights) and not all(weights):
            raise ValueError(f"give each of {', '.join(specs[name])} a :WEIGHT above 0, or none of them")
        sets[name] = [pairs[place(spec)] for spec in specs[name]], weights if any(weights) else None
    return sets, data.one_caption_an_image(val, args.val_samples)


def check_left_out(pairs, max_bad, say):
    """Says what of a data set is unusable; ValueError if that is more than a share of `max_bad` (of 1,000 at least: a few are no harm)."""
    bad = sum(map(len, pairs.left_out.values()))
    lines = lambda most: [f"data: {pairs.name}, {len(places):,} left out: {problem} ({', '.join(places[:most])}{', ...' if len(places) > most else ''})"
                          for problem, places in pairs.left_out.items()]
    if bad > max_bad * max(bad + len(pairs), 1000):
        raise ValueError("\n".join([f"{bad:,} of {bad + len(pairs):,} annotations are unusable, more than --max-bad {max_bad:g}", *lines(20)]))
    for line in lines(3):
        say(line)


def plan_stages(args):
    """The stages of this run, by name, with the arguments' rates and batch sizes in the place of the paper's."""
    if args.from_scratch is not None:
        names = ["from-scratch"]
    else:
        names = [args.stage] if args.stage else ["fine-tune"] if args.no_warm_up else ["warm-up", "fine-tune"]
    stages = {}
    for name in names:
        stage, warm_up = STAGES[name], name == "warm-up"
        lr = (args.warm_up_lr or (5 * args.lr if args.lr else None)) if warm_up else args.lr
        if lr:
            stage = dataclasses.replace(stage, lr=lr, final_lr=lr * stage.final_lr / stage.lr)
        stages[name] = dataclasses.replace(stage, batch_size=args.batch_size or stage.batch_size)
    return stages


def mixture(args, sets, weights):
    """-> (weights of data sets as shares of their samples, or None; captions a sample on average). Where captions are packed, the
    weights given are shares of captions."""
    captions = [data.captions_a_sample(pairs, args.captions) for pairs in sets]
    shares = [weight / c for weight, c in zip(weights, captions)] if weights else data.sizes(sets, args.captions)
    return shares if weights else None, sum(share * c for share, c in zip(shares, captions)) / sum(shares)


def plan_length(args, name, stage, available, captions, world):
    """The number of optimizer steps of a stage over so many samples, each of so many captions; the paper's amounts are captions."""
    if stage.batch_size < world:
        raise ValueError(f"--batch-size {stage.batch_size} leaves some of the {world} processes without a sample")
    steps = args.warm_up_steps if name == "warm-up" else args.steps
    if not steps:
        amount = round(stage.samples / captions)
        samples = stage.epochs * available or (min(amount, 10 * available) if args.data else amount)
        steps = samples // stage.batch_size
    if steps < 1:
        raise ValueError(f"{available:,} samples do not fill one batch of {stage.batch_size:,}; lower --batch-size or set --steps")
    return steps


# ------------------------------------------------------------------------------------------------------------------ models


def load_target_tokenizer(args):
    """-> (where the target's tokenizer lies, the Tokenizer), after a look at the target's config.json."""
    tokenizer = hub.resolve(args.tgt, "tokenizer").tokenizer
    language_models.read_config(tokenizer)
    if args.tgt_tokenizer:
        tokenizer = hub.resolve(args.tgt_tokenizer, "tokenizer").tokenizer
    tok = data.load_tokenizer(tokenizer)
    if tok.encoder_decoder and args.captions == "packed":
        raise ValueError(f"--captions packed is not for {args.tgt}: the encoder of a T5 reads a part of each caption; use one or each")
    return tokenizer, tok


def find_models(args):
    """-> where the source and the target lie. Gigabytes for a target that cannot be used are not fetched: its config.json and
    tokenizer come first."""
    tokenizer, _ = load_target_tokenizer(args)
    src, tgt = hub.resolve(args.src, "source"), hub.resolve(args.tgt, "target")
    return src, dataclasses.replace(tgt, tokenizer=tokenizer)


def read_shared_words(projector, src, tgt):
    """-> both tokenizers, both LLMs' word embeddings (V,Ds) and (V,Dt), and the ids (N,) and (N,) of the tokens that they share"""
    src_tok, tgt_tok = data.load_tokenizer(src.tokenizer), data.load_tokenizer(tgt.tokenizer)
    src_words, tgt_words = language_models.read_word_embeddings(src.llm), language_models.read_word_embeddings(tgt.llm)
    if projector.out_features != src_words.shape[1]:
        raise ValueError(f"{src.folder}: the projector's output is {projector.out_features} wide, but the word embeddings of its LLM "
                         f"({src.llm}) are {src_words.shape[1]} wide, and the target's {tgt_words.shape[1]}; it belongs to another LLM")
    src_ids, tgt_ids = vpgtrans.shared_tokens(src_tok.vocab(), tgt_tok.vocab())
    if len(src_ids) == 0:
        raise ValueError(f"the tokenizers of {src.llm} and {tgt.llm} share no token; use --init random")
    return src_tok, tgt_tok, src_words, tgt_words, src_ids, tgt_ids


def convert_projector(projector, src, tgt, captions, say):
    """Stage 1, initialisation: the source's projector followed by the word converter. -> nn.Linear(Dq, D of the target)"""
    src_tok, _, src_words, tgt_words, src_ids, tgt_ids = read_shared_words(projector, src, tgt)
    src_words, tgt_words = src_words[src_ids], tgt_words[tgt_ids]
    counts, began = data.count_tokens(src_tok, captions, max(src_tok.vocab().values()) + 1)[src_ids].float(), time.time()
    # tokens that these captions happen not to use count a little too: a hundredth of the average
    converter = vpgtrans.fit_word_converter(src_words, tgt_words, weight=counts + 0.01 * counts.mean())
    variance = lambda x: (counts @ (x - counts @ x / counts.sum()) ** 2).sum()
    explained = 1 - variance(tgt_words - converter(src_words)) / variance(tgt_words)
    say(f"word converter: {src_words.shape[1]} -> {tgt_words.shape[1]}, fitted on {len(src_ids):,} shared tokens, {(counts > 0).sum():,} of them "
        f"in the captions; explains {explained:.1%} of the target embeddings' variance there ({time.time() - began:.1f} s)")
    return vpgtrans.merge(projector, converter)


def match_tokens(src_ids, tgt_ids, src_names, tgt_names):
    """Where two tokenizers spell parts of one caption alike: ids of both -> [(source id, target id)]; names are {id: bytes}.

    The same bytes match first; else a space before them does not count, which some tokenizers write before the first word."""
    there = {tgt_names[id].strip(): id for id in tgt_ids if id in tgt_names} | {tgt_names[id]: id for id in tgt_ids if id in tgt_names}
    found = [(id, there.get(src_names[id], there.get(src_names[id].strip()))) for id in src_ids if id in src_names]
    return [pair for pair in found if pair[1] is not None]


def refit_projector(projector, vpg, src, tgt, sets, batch_size, processes, images=1000):
    """--init captions: the source's projector fitted anew to words of the target. -> nn.Linear(Dq, D of the target)

    Reads at most `images` images, as many of each data set; those that cannot be read, or whose caption has not one token in both
    tokenizers, are passed over and counted."""
    src_tok, tgt_tok, src_words, tgt_words, *_ = read_shared_words(projector, src, tgt)
    src_names, tgt_names = ({id: token for token, id in tok.vocab().items()} for tok in (src_tok, tgt_tok))
    began, read, unreadable, wordless = time.time(), [], [], 0
    for pairs in sets:
        for i in range(0, len(pairs), -(-len(pairs) * len(sets) // images)):
            matched = match_tokens(src_tok.encode(pairs.captions[i]), tgt_tok.encode(pairs.captions[i]), src_names, tgt_names)
            if not matched:
                wordless += 1
                continue
            src_ids, tgt_ids = map(list, zip(*matched))
            try:
                read.append((data.read_image(pairs.file(i), vpg.image_size), src_words[src_ids], tgt_words[tgt_ids]))
            except OSError as error:
                unreadable.append(str(error))
    if not read:
        raise ValueError(f"no image could be read whose caption has a word that {src.llm} and {tgt.llm} share; use --init converter or random")
    pixels, src_captions, tgt_captions = zip(*read)
    with torch.no_grad(), processes.autocast():
        queries = torch.cat([vpg(data.normalise(some.to(processes.device))).float().cpu() for some in torch.stack(pixels).split(batch_size)])
    projector = vpgtrans.fit_to_captions(queries, projector, src_captions, tgt_captions)
    said = f"projector: fitted to the captions of {len(read):,} images ({time.time() - began:.1f} s)"
    if wordless:
        said += f"; without {wordless:,} whose captions have no word in both LLMs"
    if unreadable:
        said += f"; without {len(unreadable):,} that cannot be read, the first: {unreadable[0]}"
    processes.say(said)
    return projector


def build_model(args, src, tgt, sets, processes, resumed):
    """The model as a run starts: the source's ViT and (but from scratch) Q-Former, a projector, the target's LLM; and its tokenizer.

    `sets` are the pairs that help to start the projector, unless the run is `resumed` with a projector that was saved."""
    device, say = processes.device, processes.say
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    q_former = hub.resolve(args.from_scratch, "VPG") if args.from_scratch else src
    vpg = qformer.load_vpg(q_former.folder, dtype=dtype, device=device, vit_folder=src.vit, q_former=args.from_scratch != "",
                           image_size=args.image_size, vit_layers=args.vit_layers)
    hub.check_belongs(src, vit=vpg.frozen_parameters())
    llm, tok = language_models.load_llm(tgt.llm, dtype=dtype, device=device), data.load_tokenizer(tgt.tokenizer)
    if (last := max(tok.vocab().values())) >= llm.vocab_size:
        raise ValueError(f"the tokenizer in {tgt.tokenizer} has ids up to {last}, the vocabulary of {tgt.llm} only up to {llm.vocab_size - 1}: it "
                         "belongs to another LLM (see --tgt-tokenizer)")
    torch.manual_seed(args.seed)
    projector = nn.Linear(vpg.dim, llm.dim)
    if args.from_scratch is not None:
        say(f"from scratch: {f'Q-Former of {args.from_scratch}' if args.from_scratch else 'random Q-Former'}, random projector")
        if not args.from_scratch:
            vpg.reset()
    elif args.init == "random":
        say("projector: random")
    elif src.llm.resolve() == tgt.llm.resolve():
        projector = qformer.load_projector(src.folder)
        say("source and target are the same LLM: the projector stays as it is")
    elif resumed:
        say("projector: as it was saved")
    elif processes.rank == 0:
        projector = qformer.load_projector(src.folder)
        if args.init == "captions":
            projector = refit_projector(projector, vpg, src, tgt, sets, args.micro_batch, processes)
        else:
            projector = convert_projector(projector, src, tgt, itertools.chain.from_iterable(pairs.captions for pairs in sets), say)
    model = vpgtrans.VisualLLM(vpg, projector.to(device), llm)
    if processes.world > 1:
        for parameter in vpgtrans.blip2_names(model).values():
            dist.broadcast(parameter.data, src=0)
    return model, tok


# -------------------------------------------------------------------------------------------------------- a run's folder


# What a run's result does not depend on, or by the draws of dropout alone, so that --resume may change it.
FREE = {"out", "micro_batch", "dry_run", "compile", "workers", "resume", "gate", "log_every", "val_every", "save_every", "max_bad"}


def run_config(args, src, tgt, model):
    """config.json of a run: what its weights are, and which ViT and LLM belong to them."""
    source = hub.read_config(src.folder)
    vit = source["vit"]["name"] if source.get("model_type") == "vpgtrans" else hub.lasting_name(args.src)
    return {"model_type": "vpgtrans", **model.vpg.config, "vit": {"name": vit, "fingerprint": hub.fingerprint(model.vpg.frozen_parameters())},
            "llm": {"name": hub.lasting_name(args.tgt), "fingerprint": hub.fingerprint(dict(model.llm.named_parameters())),
                    "tokenizer": args.tgt_tokenizer and hub.lasting_name(args.tgt_tokenizer)}, "arguments": arguments(args)}


def arguments(args):
    """As JSON has them; where the cache lies does not matter, but whether there is one."""
    return json.loads(json.dumps(vars(args) | {"cache": bool(args.cache) or None}, default=str))


def disk_space(folder):
    """Bytes that are free where a folder is or will be."""
    return shutil.disk_usage(next(place for place in [folder, *folder.absolute().parents] if place.is_dir())).free


def check_same_run(args, state):
    """ValueError if a state is that of a run with other arguments, as far as they matter."""
    now, then = arguments(args), state["arguments"]
    other = [f"--{key.replace('_', '-')} was {then.get(key)}, is {now[key]}" for key in now if key not in FREE and now[key] != then.get(key)]
    if other:
        raise ValueError(f"{args.out}: --resume with other arguments would be another run: {'; '.join(other)}")


def open_caches(args, sets, vpg, say):
    """-> the data sets of stage 1, each with the cache of its images' queries under --cache, after making sure that they fit there."""
    if len({pairs.name for pairs in sets}) < len(sets):
        raise ValueError("--cache: two data sets of stage 1 have the same name; give each its own, --data NAME=...")
    configuration = hashlib.sha256(json.dumps(vpg.config, sort_keys=True).encode()).hexdigest()[:16]
    made_with = {"VPG": hub.fingerprint(dict(vpg.named_parameters())), "image size": vpg.image_size, "configuration": configuration}
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    sets = [dataclasses.replace(pairs, cache=cache.FeatureCache(args.cache / pairs.name, pairs.files(), (vpg.num_query_tokens, vpg.dim),
                                                                dtype, made_with)) for pairs in sets]
    whole, left = (sum(sizes) for sizes in zip(*(pairs.cache.need() for pairs in sets)))
    free = disk_space(args.cache)
    images = sum(len(pairs.cache.files) for pairs in sets)
    need = (f"{images:,} images x {in_words(whole / images)} = {in_words(whole)}, of which {in_words(left)} are still to be computed; {in_words(free)} are free")
    if left > free:
        raise OSError(f"{args.cache}: the cache does not fit on this disk: {need}")
    say(f"cache: {args.cache}, {need}; stage 1 sees these images whole, without crops, and does not look for validation images among them")
    return sets


def in_words(size):
    """Bytes for people."""
    return next(f"{size / unit:.1f} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size >= unit or name == "KB")


def fill_cache(args, sets, vpg, processes, stop):
    """Computes what --cache does not hold yet of the images of stage 1, until stop() is true."""
    read = functools.partial(data.read_image, size=vpg.image_size)

    @torch.no_grad()
    def queries(images):
        with processes.autocast():
            return vpg(data.normalise(images.to(processes.device)))

    for pairs in sets:
        done = pairs.cache.fill(read, queries, args.micro_batch, args.workers, processes.rank, processes.world, stop)
        if processes.sum(not done)[0]:
            processes.say("stopped while the cache was computed; the same command goes on with it")
            sys.exit(130)


# --------------------------------------------------------------------------------------------------------- without weights


def describe_stage(name, stage, steps, available, table):
    """What is printed on entering a stage over so many available samples: its length and rate, and the table of what trains."""
    samples = steps * stage.batch_size
    head = (f"\nstage {name}: {steps:,} steps of {stage.batch_size:,} = {samples:,} samples, {samples / available:.2g} epochs; "
            f"rate {stage.lr:g} -> {stage.final_lr:g}\n  {'part':24} {'parameters':>14} {'trainable':>14}  mode")
    return "\n".join([head, *(f"  {part:24} {total:14,} {trainable:14,}  {mode}" for part, total, trainable, mode in table)])


def shape_model(args, src, tgt):
    """The model of a run without weights, on the meta device."""
    q_former = hub.resolve(args.from_scratch, "shapes") if args.from_scratch else src
    if args.from_scratch is None and str(hub.read_config(q_former.folder).get("model_type")).startswith("clip"):
        raise ValueError(f"{q_former.folder}: holds no Q-Former; a ViT alone is a source for training --from-scratch only")
    vpg, llm = qformer.empty_vpg(q_former.folder, args.image_size, args.vit_layers), language_models.empty_llm(tgt.llm)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm).to("meta", dtype)


def check_disk(out, model):
    """OSError if there is no room for what a run of this model writes, beside what it has written already."""
    there = sum(file.stat().st_size for name in ("model.safetensors", runs.STATE, runs.PREVIOUS) if (file := out / name).is_file())
    need, free = runs.disk_need(vpgtrans.blip2_names(model)) - there, disk_space(out)
    if need > free:
        raise OSError(f"{out}: the run needs {in_words(need)} more there, and {in_words(free)} are free on that disk; name another --out")


def trace(model, tok, tokens):
    """What a step of this model needs, by estimate.trace, with captions of so many tokens."""
    prompts = torch.tensor([data.prompt_ids(tok, model.vpg.num_query_tokens)] * 2)
    images = torch.empty(2, 3, model.vpg.image_size, model.vpg.image_size, dtype=model.projector.weight.dtype, device="meta")
    return estimate.trace(model, {"prompt_ids": prompts, "target_ids": torch.zeros(2, tokens, dtype=torch.long, device="meta"), "images": images})


def longest_text(args, sets):
    """Tokens that a sample's captions may have: where they are packed, as many as the data set with most has on average."""
    return round(args.max_tokens * max(data.captions_a_sample(pairs, args.captions) for pairs in sets))


def choose_micro_batch(args, stages, sets, model, tok, processes):
    """How many samples at a time: as --micro-batch says, else what should fit into the memory of the smallest GPU. `model` has shapes
    only."""
    if args.micro_batch or processes.device.type == "cpu":
        return args.micro_batch or 36
    fits = []
    for name, stage in stages.items():
        vpgtrans.enter_stage(model, stage)
        step = trace(model, tok, longest_text(args, sets[name][0]))
        fits.append(estimate.largest_micro_batch(model, step, torch.cuda.mem_get_info()[1], 36, processes.world))
    fits = min(processes.gather(fits))
    processes.say(f"micro-batch: {fits} samples at a time on each GPU (--micro-batch)")
    return fits


def dry_run(args, stages):
    """Prints what the run would do and need, for --dry-run. Without data under datasets/, the paper's amounts are taken."""
    tgt, src, world = hub.resolve(args.tgt, "tokenizer"), hub.resolve(args.src, "shapes"), int(os.environ.get("WORLD_SIZE", 1))
    tok = load_target_tokenizer(args)[1]
    model, machine = shape_model(args, src, tgt), estimate.machine(args.dry_run)
    try:
        sets, _ = find_data(args, stages, print)
    except FileNotFoundError as error:
        if args.data:
            raise
        print(f"{str(error).splitlines()[0]}: taken are the paper's amounts, each caption a sample of 12 tokens")
        sets = None
    for name, stage in stages.items():
        available, tokens, captions = stage.samples or 1_400_000, 12, 1
        if sets:
            texts = [text for some in sets[name][0] for text in itertools.islice(some.captions, 1000)]
            tokens = round(sum(len(data.caption_ids(tok, text, args.max_tokens)) for text in texts) / len(texts))
            available, captions = sum(data.sizes(sets[name][0], args.captions)), mixture(args, *sets[name])[1]
        steps = plan_length(args, name, stage, available, captions, world)
        print(describe_stage(name, stage, steps, available, vpgtrans.enter_stage(model, stage)))
        longest = trace(model, tok, longest_text(args, sets[name][0]) if sets else args.max_tokens)
        typical = trace(model, tok, round(tokens * captions))
        fits = estimate.largest_micro_batch(model, longest, machine[1], 36, world) if machine[1] else 36
        print(*estimate.report(model, longest, typical, steps * stage.batch_size, machine, args.micro_batch or fits, world), sep="\n")
    need = runs.disk_need(vpgtrans.blip2_names(model))
    print(f"\n{args.out}: {in_words(need)} while it runs; {in_words(disk_space(args.out))} are free on that disk")
