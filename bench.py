"""Speed and memory of training, generation and loading, side by side with transformers.

    python bench.py                                              # a small BLIP-2, minutes on a laptop
    python bench.py --size opt-2.7b --batch-size 32 --compile    # the paper's source with random weights, on one GPU
    python bench.py --llm opt-125m                               # a language model alone, behind soft prompts
    python bench.py --loading                                    # a checkpoint of 2 GB, from disk to the first logits
    python bench.py --captions 5                                 # so many captions an image: each alone, or packed behind one prefix
    python bench.py --techniques                                 # a training step, and the same without each thing that makes it fast
    python bench.py --images                                     # JPEG photographs to the ViT's input, on one core
    python bench.py --pairs                                      # files and shards to batches, beside transformers and webdataset

Ours and transformers' two kinds of attention run in one process, on the same random weights (each tensor exists once) and
the same batch, with the same parts frozen, and take turns. They are timed only if they agree: in the loss and in the
projector's gradient, and with fp32 in the generated ids. Prints three Markdown tables, to be pasted as they are:

    forward       ViT and Q-Former alone, without gradients
    training      forward, backward and AdamW, in both stages. "of the limit" is the time that the arithmetic alone would
                  take, at the speed of one large matrix product measured here, over the time it took. "ours, cached" has the
                  queries of the frozen VPG at hand, as with train.py --cache
    generation    30 tokens behind 33 embeddings, greedy and with 5 beams; nothing ends early, and nothing is compiled

With --llm, training is forward and backward to the soft prompts: 32 of them, then the target.

A ratio above 1: ours is faster than the better of the two. Figures mean something on an otherwise idle machine only.
"""

import argparse
import contextlib
import copy
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import data
import pairs
import llm as language_models
import qformer
import vpgtrans

try:
    import transformers
except ImportError:
    transformers = None

shape = lambda **sizes: {"num_hidden_layers": 12, **sizes}
EVA = shape(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16)
SIZES = {  # ViT, Q-Former, OPT
    "small": (shape(hidden_size=384, intermediate_size=1536, num_attention_heads=6), shape(num_hidden_layers=6),
              shape(hidden_size=768, ffn_dim=3072, num_attention_heads=12)),
    "opt-2.7b": (EVA, shape(), shape(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32)),
    "opt-6.7b": (EVA, shape(), shape(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32)),
}
LLMS = {
    "opt-125m": dict(model_type="opt", word_embed_proj_dim=768),  # the rest is OPT's defaults
    "opt-6.7b": dict(model_type="opt", word_embed_proj_dim=4096, **SIZES["opt-6.7b"][2]),
    "llama-7b": dict(model_type="llama"),
    "smollm2-135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "flan-t5-base": shape(model_type="t5", d_model=768, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu",
                          tie_word_embeddings=False)}
LLMS["2 GB"] = LLMS["smollm2-135m"] | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=13, num_attention_heads=32, num_key_value_heads=8)
BOS, IMAGE_ID, NEW_TOKENS = 2, 50265, 30  # IMAGE_ID stands for a soft prompt in transformers' prompts
# The greatest differences allowed: of mean losses, and (relative, by norm) of the projector's gradients. The latter jump a
# little where rounding puts an input of one of OPT's ReLUs on the other side of zero; T5's loss is rounded to bf16 in transformers.
TOLERANCE = {"fp32": (1e-4, 1e-2), "bf16": (7e-2, 0.25)}

# ---------------------------------------------------------------------------------------------------------------- models


def blank_peer(size, attention):
    """transformers' BLIP-2 without weights (on the meta device); attention is "eager" or "sdpa"."""
    vit, former, opt = SIZES[size]
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**vit, image_size=224, patch_size=14), num_query_tokens=32, image_token_index=IMAGE_ID,
        qformer_config=transformers.Blip2QFormerConfig(**former, encoder_hidden_size=vit["hidden_size"]),
        # use_cache=False: else transformers keeps keys and values in training, for nothing
        text_config=transformers.OPTConfig(**opt, vocab_size=50272, word_embed_proj_dim=opt["hidden_size"], use_cache=False))
    with torch.device("meta"):
        return transformers.Blip2ForConditionalGeneration._from_config(config, attn_implementation=attention)


def random_tensors(shapes, dtype, device):
    """{name: meta tensor} -> random ones: ViT and LLM in dtype, the rest float32. None is zero or one, and hidden states keep
    their scale through the layers, so that the loss depends on every tensor."""
    torch.manual_seed(0)
    tensors = {}
    for name, like in shapes.items():
        scale = 0.1 if like.ndim == 1 else (like.shape[-1] if like.shape[0] == 1 else like[0].numel()) ** -0.5
        frozen = qformer.is_frozen(name) or name.startswith("language_model.")
        tensors[name] = torch.randn(like.shape, dtype=dtype if frozen else torch.float32, device=device).mul_(scale)
        if "norm" in name.lower() and name.endswith("weight"):
            tensors[name] += 1
        if name.endswith("Attention.q.weight"):  # T5's attention has no 1/sqrt(64)
            tensors[name] /= 8
    return tensors


def build_models(size, dtype, device):
    """{name: model}, ours first, around the same tensors."""
    peers = {f"transformers, {attention}": blank_peer(size, attention) for attention in ("eager", "sdpa")}
    config, tensors = (peer := peers["transformers, sdpa"]).config.to_dict(), random_tensors(peer.state_dict(), dtype, device)
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.decoder.embed_tokens.weight"]
    for peer in peers.values():
        peer.load_state_dict(tensors, assign=True)
        peer.language_model.generation_config.eos_token_id = None  # as our stop=(): nothing ends a text
    with torch.device("meta"):
        vpg, llm = qformer.VPG(config), language_models.OPT(config["text_config"])
        ours = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm)
    names = {"language_projection.": "projector.", "language_model.": "llm."}
    rename = lambda name: next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), "vpg." + name)
    ours.load_state_dict({rename(name): tensor for name, tensor in tensors.items()}, assign=True)
    ours.llm.tie_head()
    return {"ours": ours, **peers}


def build_llms(name, dtype, device):
    """{name: language model}, ours first, around the same random tensors; ours is frozen, as load_llm leaves it."""
    config = transformers.AutoConfig.for_model(**LLMS[name], use_cache=False, decoder_start_token_id=0)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        ours = language_models.ARCHITECTURES[config.model_type](LLMS[name])
        peers = {f"transformers, {attention}": kind.from_config(config, attn_implementation=attention) for attention in ("eager", "sdpa")}
    tied = ours.lm_head.weight is ours.get_parameter(ours.WORDS)
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(ours.state_dict(), dtype, device).items()}
    tensors |= {"lm_head.weight": tensors[ours.WORDS]} if tied else {}
    ours.load_state_dict(tensors, assign=True)
    if tied:
        ours.tie_head()
    for peer in peers.values():
        also = {name: tensors[ours.WORDS] for name in peer.state_dict().keys() - tensors.keys()}  # T5's other names of its word embeddings
        peer.load_state_dict(tensors | also, assign=True)
        if config.model_type == "llama":  # its angles are no parameters, and were left on the meta device
            peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(device)
        peer.generation_config.eos_token_id = None
    return {"ours": ours.to(device).requires_grad_(False).eval()} | {name: peer.eval() for name, peer in peers.items()}


def enter_stage(models, stage):
    """The same parts train in all models, and the same Q-Former drops out."""
    vpgtrans.enter_stage(models["ours"], stage)
    trained = {name for name, parameter in models["ours"].saved().items() if parameter.requires_grad}
    for peer in list(models.values())[1:]:
        peer.eval().qformer.train(models["ours"].vpg.qformer.training)
        for name, parameter in peer.named_parameters():
            parameter.requires_grad_(name in trained)


def mean_losses(models, B, T, device):
    """{name: function that returns the mean loss a token of the one batch}"""
    ours = models["ours"]
    images = torch.randn(B, 3, ours.vpg.image_size, ours.vpg.image_size, device=device)
    target_ids = torch.randint(4, IMAGE_ID, (B, T), device=device)
    prompt = lambda image: torch.tensor([image] * ours.vpg.num_query_tokens + [BOS]).expand(B, -1)
    # transformers reads [image, BOS, caption], its last token too, which predicts nothing: the tokens that count are the same
    input_ids = torch.cat([prompt(IMAGE_ID).to(device), target_ids], dim=1)
    labels = input_ids.clone()
    labels[:, :-T] = -100

    def our_loss(queries=None):
        loss, tokens = ours(prompt(vpgtrans.IMAGE), target_ids, images=images, queries=queries)
        return loss / tokens

    their_loss = lambda peer: peer(pixel_values=images, input_ids=input_ids, labels=labels).loss
    return {name: our_loss if model is ours else partial(their_loss, model) for name, model in models.items()}


def mean_llm_losses(models, B, T, device):
    """({name: function that returns the mean loss a token of one batch}, the 32 soft prompts (B,32,D) that they read)"""
    ours = models["ours"]
    soft_prompts = torch.randn(B, 32, ours.dim, device=device).to(ours.lm_head.weight.dtype).requires_grad_()
    target_ids = torch.randint(4, ours.vocab_size, (B, T), device=device)

    def our_loss():
        loss, tokens = ours.loss(soft_prompts, target_ids)
        return loss / tokens

    def their_loss(peer):
        if peer.config.is_encoder_decoder:
            return peer(inputs_embeds=soft_prompts, labels=target_ids).loss
        inputs = torch.cat([soft_prompts, peer.get_input_embeddings()(target_ids)], dim=1)
        return peer(inputs_embeds=inputs, labels=F.pad(target_ids, (32, 0), value=-100)).loss

    return {name: our_loss if model is ours else partial(their_loss, model) for name, model in models.items()}, soft_prompts


def check_agreement(losses, weights, autocast, tolerance):
    """Raises ValueError unless losses and their gradients to {name: tensor} agree (without dropout). -> the greatest differences"""
    values, grads = [], []
    for name, weight in weights.items():
        with autocast():
            (loss := losses[name]()).backward()
        values.append(loss.item())
        grads.append(weight.grad)
        weight.grad = None
    apart = max(abs(v - values[0]) for v in values), max(((g - grads[0]).norm() / grads[0].norm()).item() for g in grads)
    if not (apart[0] <= tolerance[0] and apart[1] <= tolerance[1]):  # nan, too, is no agreement
        raise ValueError(f"ours and transformers compute different things: losses {values}, gradients {apart[1]:.2g} apart "
                         f"(relative); at most {tolerance[0]:g} and {tolerance[1]:g} are allowed")
    return apart


# ----------------------------------------------------------------------------------------------------------- measurement


def matrices(module, only=""):
    """The number of parameters in the matrices of a module."""
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and only in name)


def vpg_products(vpg):
    """Multiply-adds that ViT and Q-Former need for an image."""
    vit, former, N, Q = vpg.vision_model, vpg.qformer, vpg.vision_model.embeddings.position_embedding.shape[1], vpg.num_query_tokens
    blocks = former.encoder["layer"]
    crossings, on_image = sum(hasattr(b, "crossattention") for b in blocks), 2 * matrices(former, "crossattention.attention.key")  # and value
    see = (matrices(vit.encoder) * N + matrices(vit.embeddings.patch_embedding) * (N - 1)
           + 2 * len(vit.encoder["layers"]) * N * N * vit.post_layernorm.weight.numel())  # attention: scores, then weighted sums
    return see, (matrices(former) - on_image) * Q + on_image * N + 2 * Q * (len(blocks) * Q + crossings * N) * vpg.dim


def step_flops(model, stage, B, T):
    """Floating-point operations that a training step cannot do without: forward 2 x parameters x tokens, backward as much
    for gradients to activations, and as much for those to weights. So 2 x for the ViT; 4 x for the LLM, frozen, but gradients
    pass through it; 2 x, then 6 x for the Q-Former; 4 x, then 6 x for the projector. Below in multiply-adds."""
    llm, Q, S = model.llm, model.vpg.num_query_tokens, model.vpg.num_query_tokens + T  # S = P + T - 1
    see, query, joint = *vpg_products(model.vpg), "Q-Former" in stage.trains
    read = 2 * (matrices(llm.layers) * S + llm.vocab_size * llm.dim * T) + 3 * len(llm.layers) * S * S * llm.dim  # causal: half
    return 2 * B * (see + (3 if joint else 1) * query + (3 if joint else 2) * matrices(model.projector) * Q + read)


def llm_flops(llm, B, T, P=32):
    """As step_flops, for a language model alone: 2 x parameters x tokens forward, and as much for gradients to activations;
    the products in attention, of two activations, need twice as much backward."""
    head = T * llm.vocab_size * llm.dim
    if isinstance(llm, language_models.T5):  # the decoder reads T, but makes keys and values of what the encoder has read
        keys = sum(matrices(block.layer[1]["EncDecAttention"].k) for block in llm.decoder.block) * 2
        read = matrices(llm.encoder.block) * P + (matrices(llm.decoder.block) - keys) * T + keys * P
        inner = llm.heads * llm.encoder.block[0].layer[0]["SelfAttention"].head_dim
        return 4 * B * (read + 3 * inner * (len(llm.encoder.block) * P * P + len(llm.decoder.block) * (T * T / 2 + T * P)) + head)
    S = P + T - 1
    return 4 * B * (matrices(llm.layers) * S + 1.5 * len(llm.layers) * S * S * llm.layers[0].self_attn.q_proj.out_features + head)


def take_turns(functions, repeats, device):
    """{name: function} -> {name: seconds of each call}: one call each in turn, so that a disturbance meets all alike."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in functions}
    for name, function in list(functions.items()) * repeats:
        wait()
        began = time.perf_counter()
        function()
        wait()
        seconds[name].append(time.perf_counter() - began)
    return seconds


def matrix_product_speed(dtype, device):
    """FLOP/s of one large matrix product, the best of a dozen."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(take_turns({"product": lambda: a @ b}, 12, device)["product"])


def train_step(loss, optimizer, autocast):
    with autocast():
        loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_training(models, stage, losses, autocast, repeats, device):
    """-> {name: seconds of each step}, {name: peak GiB}. The rate is 0: the same work, but the shared weights stay.

    Memory (GPUs only) is taken before the turns, while one optimizer exists: all weights, once, and the activations,
    gradients and moments of one implementation."""
    def new_step(name):
        optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(models[name], stage), lr=0.0, betas=stage.betas, fused=True)
        step = partial(train_step, losses[name], optimizer, autocast)
        for _ in range(5):  # compiles, allocates the moments; and memory that no step has touched yet is slow for a few
            step()
        return step

    peak = {}
    for name in models if device.type == "cuda" else ():
        step = new_step(name)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak[name] = torch.cuda.max_memory_allocated(device) / 2**30
        del step
    return take_turns({name: new_step(name) for name in models}, repeats, device), peak


def time_vpg(models, B, autocast, repeats, device):
    """-> ((part, {name: seconds of each forward pass}), ...) of ViT and Q-Former; ValueError if they compute different things."""
    ours, outputs, rows = models["ours"].vpg, {}, []
    images = torch.randn(B, 3, ours.image_size, ours.image_size, device=device)

    @torch.no_grad()
    def run(what, name):
        model = models[name]
        with autocast():
            if name == "ours":
                y = ours.vision_model.post_layernorm(ours.features(images)) if what == "ViT" else ours.qformer(ours.query_tokens.expand(B, -1, -1), image)
            elif what == "ViT":
                y = model.vision_model(images).last_hidden_state
            else:
                y = model.qformer(query_embeds=model.query_tokens.expand(B, -1, -1), encoder_hidden_states=image).last_hidden_state
        outputs[what, name] = y.float()

    for what in ("ViT", "Q-Former"):
        for name in models:
            run(what, name)
            apart = ((outputs[what, name] - outputs[what, "ours"]).norm() / outputs[what, "ours"].norm()).item()
            if not apart < 5e-2:
                raise ValueError(f"{what}: ours and {name} compute different things: {apart:.2g} apart (relative)")
        image = outputs["ViT", "ours"]  # what the Q-Formers look at
        rows.append((what, take_turns({name: partial(run, what, name) for name in models}, repeats, device)))
    return rows


def time_generation(llms, B, beams, repeats, device, exact):
    """{name: language model} -> {name: seconds of each batch}, share of ids that are equal; ValueError if `exact` and some are not."""
    llm = llms["ours"]
    prefix = torch.randn(B, 33, llm.dim, device=device).to(llm.lm_head.weight.dtype)
    functions = {name: partial(peer.generate, inputs_embeds=prefix, attention_mask=torch.ones(B, 33, device=device).long(),
                               use_cache=True, max_new_tokens=NEW_TOKENS, num_beams=beams, do_sample=False, pad_token_id=1)
                 for name, peer in llms.items() if name != "ours"}
    functions = {"ours": partial(llm.generate, prefix, max_new_tokens=NEW_TOKENS, num_beams=beams, stop=())} | functions
    ids = [torch.as_tensor(function()).cpu()[:, -NEW_TOKENS:] for function in functions.values()]  # (B, 30) each; also warms up
    equal = min((ids[0] == theirs).float().mean().item() for theirs in ids)
    if exact and equal < 1:
        raise ValueError(f"with {beams} beam(s) only {equal:.1%} of the ids that ours and transformers generate are equal")
    return take_turns(functions, repeats, device), equal


# ---------------------------------------------------------------------------------------------------------------- report


def table(header, results, B):
    """Markdown: a row for each result (what, {name: seconds}, function that makes further cells of name and median)."""
    yield from (f"\n| {header} |", "|---" * (header.count("|") + 1) + "|")
    for what, seconds, further in results:
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        better = min(median for name, median in medians.items() if not name.startswith("ours"))
        for name, median in medians.items():
            spread = f"{min(seconds[name]) * 1e3:,.1f} - {max(seconds[name]) * 1e3:,.1f}"
            yield f"| {what} | {name} | {median * 1e3:,.1f} | {spread} | {B / median:,.1f} | {better / median:.2f} | {further(name, median)} |"


def machine(device):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else f"model name: {platform.processor()}\n"
    cpu = info.partition("model name")[2].partition("\n")[0].strip("\t :") + f", {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return (f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}; torch {torch.__version__}, "
            f"transformers {transformers.__version__}; commit {commit or 'unknown'}")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="small: ViT 12 x 384, Q-Former 6 x 768, OPT-125M; the others: EVA "
                        "ViT-g, Q-Former 12 x 768 and that OPT, 8 and 16 GB of weights in bf16 (default: %(default)s)")
    parser.add_argument("--llm", choices=LLMS, help="a language model of these shapes alone, in the place of a BLIP-2")
    parser.add_argument("--loading", action="store_true", help="the loading of a checkpoint, in the place of both")
    parser.add_argument("--captions", type=int, help="training on so many captions an image, packed and one by one, in the place of all these")
    parser.add_argument("--techniques", action="store_true", help="what each technique contributes to the speed of a training step")
    parser.add_argument("--images", action="store_true", help="reading and resizing of JPEG photographs")
    parser.add_argument("--pairs", action="store_true", help="the whole data path: read, decode, crop, tokenize, collate")
    parser.add_argument("--batch-size", type=int, help="samples a training step (default: 8, and 16 with --llm)")
    parser.add_argument("--generation-batch-size", type=int, default=8, help="captions generated at a time (default: %(default)s)")
    parser.add_argument("--target-tokens", type=int, default=16, help="of each caption (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of ViT, LLM and the arithmetic (autocast); what "
                        "trains is always float32 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks, of all, in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size if args.batch_size is not None else 16 if args.llm else 8
    if min(args.generation_batch_size, args.batch_size, args.target_tokens, args.repeats, 1 if args.captions is None else args.captions) < 1:
        parser.error("--batch-size, --generation-batch-size, --target-tokens, --captions and --repeats must be at least 1")
    return args


LOAD = """
import resource, sys, time
import torch
torch.manual_seed(0)
who, folder, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
if who == "ours":
    from llm import load_llm
else:
    from transformers import AutoModelForCausalLM
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, began = peak(), time.perf_counter()
with torch.no_grad():
    if who == "ours":
        llm = load_llm(folder, dtype=dtype)
        loaded = time.perf_counter()
        llm(torch.zeros(1, 4, llm.dim), torch.zeros(1, 1, dtype=torch.long))
    else:
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        loaded = time.perf_counter()
        llm(inputs_embeds=torch.zeros(1, 4, llm.config.hidden_size, dtype=dtype))
print(loaded - began, time.perf_counter() - began, peak() - before)
"""


def bench_loading(args):
    """A random checkpoint of 2 GB in bf16, loaded as it is and to float32 by ours and by transformers, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            llm = language_models.LLaMA(LLMS["2 GB"])
        tensors = random_tensors(dict(llm.named_parameters()), torch.bfloat16, "cpu")
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(LLMS["2 GB"]))
        size = (Path(folder) / "model.safetensors").stat().st_size
        print(f"`python bench.py --loading`: {size / 1e9:.2f} GB in bf16, in the page cache, medians of {args.repeats}\n{machine(torch.device('cpu'))}\n")
        print("| to | implementation | s to load | s to the first logits | peak memory / size as loaded |\n|---|---|---|---|---|")
        for dtype in ("bfloat16", "float32"):
            rows = {"ours": [], "transformers": []}
            for who in list(rows) * args.repeats:
                run = subprocess.run([sys.executable, "-c", LOAD, who, folder, dtype], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
                rows[who].append([float(x) for x in run.stdout.split()[-3:]])
            for who, runs in rows.items():
                load, first, peak = (statistics.median(column) for column in zip(*runs))
                print(f"| {dtype} | {who} | {load:.2f} | {first:.2f} | {peak / (size * (2 if dtype == 'float32' else 1)):.2f} |")


def photograph(rng, width=640, height=480):
    """A picture with detail at all scales, as photographs have it: a JPEG of 130 KB at quality 90."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]).clip(1 / width)
    channels = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, height, width))) / f**1.2).real
    return Image.fromarray(np.clip(120 + 50 * channels / channels.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def bench_images(args, size=224, count=32):
    """JPEG files to the ViT's input: ours for evaluation and for training, transformers' processor, and decoding alone, all on one core."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil  # what BlipImageProcessor is without torchvision

    torch.set_num_threads(1)
    rng, theirs = np.random.default_rng(0), BlipImageProcessorPil(size={"height": size, "width": size})
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for file in files:
            photograph(rng).save(file, quality=90)
        kilobytes = sum(file.stat().st_size for file in files) / count / 1e3

        def each(look):
            images = []
            for file in files:
                with data.open_image(file) as image:
                    images.append(look(image))
            return images

        def draft(image):
            image.draft(None, (image.width // 2, image.height // 2))
            image.load()

        ours = {"evaluation, normalised": lambda: qformer.normalise(torch.stack(each(lambda image: data.resize(image, size)))),
                "evaluation": lambda: torch.stack(each(lambda image: data.resize(image, size))),
                "training, decoded whole": lambda: torch.stack(each(lambda image: data.random_crop(image, size, rng, least=float("inf")))),
                "training": lambda: torch.stack(each(lambda image: data.random_crop(image, size, rng)))}
        peer, decoding = "transformers' BlipImageProcessorPil", {"decoding alone": lambda: each(lambda image: image.load()) and None,
                                                                 "decoding alone, at half size": lambda: each(draft) and None}
        process = lambda file: theirs(Image.open(file), return_tensors="pt")["pixel_values"]  # one at a time, which is faster than many
        apart = (ours["evaluation, normalised"]() - torch.cat(list(map(process, files)))).abs()
        seconds = take_turns({peer: lambda: list(map(process, files))} | ours | decoding, args.repeats, torch.device("cpu"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"`python bench.py --images`: {count} JPEGs of 640 x 480 and {kilobytes:.0f} KB to {size} x {size}, one thread, medians of {args.repeats}\n"
          f"{machine(torch.device('cpu'))}\n\n| | images/s | min - max | ratio |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {count / median:,.0f} | {count / max(seconds[name]):,.0f} - {count / min(seconds[name]):,.0f} | {medians[peer] / median:.2f} |")
    print(f"\nevaluation, normalised: at most {apart.max():.1e} from transformers' (a level of 255 is {1 / 255 / min(qformer.STD):.1e}), {(apart > 1e-3).float().mean():.2%} "
          "of the values not the same. Without normalisation it is uint8, which the device normalises.")


def bench_pairs(args, size=224, count=96, batch=32):
    """Image-text pairs to batches of the model's inputs on one core: ours from files and from a shard, transformers' processors on the
    files, the webdataset package on the shard. A batch is images (32,3,224,224), prompts and targets."""
    import webdataset
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    torch.set_num_threads(1)
    rng, tok = np.random.default_rng(0), data.load_tokenizer(Path(__file__).parent / "demo" / "target")
    their_images = BlipImageProcessorPil(size={"height": size, "width": size})
    their_words = transformers.AutoTokenizer.from_pretrained(Path(__file__).parent / "demo" / "target")
    their_words.pad_token = their_words.eos_token
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = ["Two red circles, and a blue square on a table in front of the window."[: 20 + i % 50] for i in range(count)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps({"image": f"{i:03}.jpg", "caption": text}) + "\n" for i, text in enumerate(captions)))
        with webdataset.TarWriter(str(folder / "0.tar")) as shard:
            for i, caption in enumerate(captions):
                photograph(rng).save(folder / f"{i:03}.jpg", quality=90)
                shard.write({"__key__": f"{i:03}", "jpg": (folder / f"{i:03}.jpg").read_bytes(), "txt": caption})

        def ours(source, **options):
            samples = data.Samples([pairs.read_pairs(str(source))], tok, size, 32, **options)
            return lambda: sum(len(micro["images"]) for (micro,) in data.load_batches(samples, data.plan([count], count, seed=0), batch, batch))

        def theirs():  # there is no augmentation
            for i in range(0, count, batch):
                torch.cat([their_images(Image.open(folder / f"{j:03}.jpg"), return_tensors="pt")["pixel_values"] for j in range(i, i + batch)])
                their_words(captions[i : i + batch], padding=True, truncation=True, max_length=32, return_tensors="pt")

        def sample_of(image, caption):
            return {"image": data.random_crop(image, size, rng), "prompt": samples.prompt, "file": "", "bad": [], "twin": None,
                    "targets": [data.caption_ids(tok, pairs.clean_caption(caption))]}

        def from_webdataset(decoded):
            stream = webdataset.WebDataset(str(folder / "0.tar"), shardshuffle=False)
            pairs = stream.decode("pil").to_tuple("jpg", "txt") if decoded else stream.to_tuple("jpg", "txt")
            look = lambda pair: sample_of(*pair) if decoded else sample_of(Image.open(io.BytesIO(pair[0])), pair[1].decode())
            return sum(len(micro["images"]) for micro in pairs.map(look).batched(batch, collation_fn=samples.collate))

        samples = data.Samples([pairs.read_pairs(str(folder / "0.tar"))], tok, size, 32)
        ways = {"transformers' processors, files, no crops": theirs, "ours, files": ours(folder / "pairs.jsonl"),
                "ours, files, no crops": ours(folder / "pairs.jsonl", augment=False),
                "ours, files, looking for validation images": ours(folder / "pairs.jsonl", known=data.Lookalikes([folder / f"{i:03}.jpg" for i in range(count)] * 5)),
                "ours, shard": ours(folder / "0.tar"),
                "webdataset, shard, decoded by it, our crops and collation": partial(from_webdataset, True),
                "webdataset, shard, our decoding, crops and collation": partial(from_webdataset, False)}
        seconds = take_turns(ways, args.repeats, torch.device("cpu"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"`python bench.py --pairs`: {count} pairs, JPEGs of 640 x 480, to batches of {batch} at {size} x {size}, one core, medians of {args.repeats}\n"
          f"{machine(torch.device('cpu'))}\n\n| | pairs/s | min - max | ratio | cores for 400 a second |\n|---|---|---|---|---|")
    for name, median in medians.items():
        peer = medians["transformers' processors, files, no crops" if "files" in name else "webdataset, shard, decoded by it, our crops and collation"]
        print(f"| {name} | {count / median:,.0f} | {count / max(seconds[name]):,.0f} - {count / min(seconds[name]):,.0f} | {peer / median:.2f} | "
              f"{400 * median / count:.1f} |")
    print("\nThe ratio is to transformers' processors for files, to webdataset with its own decoding for shards.")


def bench_captions(args, device, dtype):
    """Training on K captions of each of B images: packed behind one prefix, or K times with one of them; losses are checked to agree."""
    B, K, T = args.batch_size, args.captions, args.target_tokens
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    model = build_models(args.size, dtype, device)["ours"]
    if args.compile:
        for block in [*model.vpg.layers, *model.llm.layers]:
            block.compile()
    images = torch.randn(B, 3, model.vpg.image_size, model.vpg.image_size, device=device)
    prompt = torch.tensor([vpgtrans.IMAGE] * model.vpg.num_query_tokens + [BOS]).expand(B, -1)
    targets = torch.randint(4, IMAGE_ID, (B, K, T), device=device)
    lengths = torch.randint(T // 2, T + 1, (B, K, 1), device=device)  # three quarters of T on average
    targets[torch.arange(T, device=device) >= lengths] = -100
    losses = {"each alone": lambda: sum(model(prompt, targets[:, k], images=images)[0] for k in range(K)),
              "packed": lambda: model(prompt, targets, images=images)[0]}

    def step(way, optimizer):
        with autocast():
            if way == "packed":
                losses[way]().backward()
            else:
                for k in range(K):  # one at a time, as from a data set: what a step keeps in memory is one caption's
                    model(prompt, targets[:, k], images=images)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.eval()
    with torch.no_grad(), autocast():
        values = [loss().item() / (targets >= 0).sum().item() for loss in losses.values()]
    if not abs(values[0] - values[1]) <= TOLERANCE[args.precision][0]:
        raise ValueError(f"packed and alone, the captions' losses differ: {values}")
    print(f"\n{(targets >= 0).sum().item() / B / K:.1f} tokens a caption, losses {values[0]:.5f} alone and {values[1]:.5f} packed\n\n"
          f"| training on {K} captions of {B} images | ms | min - max | captions/s | ratio |\n|---|---|---|---|---|")
    for what in ("warm-up", "fine-tune"):
        vpgtrans.enter_stage(model, vpgtrans.STAGES[what])
        optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(model, vpgtrans.STAGES[what]), lr=0.0, fused=True)
        for way in losses:
            step(way, optimizer)
        seconds = take_turns({way: partial(step, way, optimizer) for way in losses}, args.repeats, device)
        alone = statistics.median(seconds["each alone"])
        for way, times in seconds.items():
            median = statistics.median(times)
            print(f"| {what}, {way} | {median * 1e3:,.0f} | {min(times) * 1e3:,.0f} - {max(times) * 1e3:,.0f} | {B * K / median:,.1f} | {alone / median:.2f} |")


def score_all_positions(llm, prefix, target_ids, prefix_mask=None):
    """DecoderOnly.loss as it is usually written: logits of the prefix's positions too, all of them at once."""
    prefix, _, positions, mask = llm.lay_out(prefix, prefix_mask, target_ids.shape[1] - 1)
    x = llm.read(torch.cat([prefix, llm.embed(target_ids[:, :-1].clamp(min=0))], dim=1), positions, mask)
    logits, targets = language_models.word_scores(llm.lm_head, x), F.pad(target_ids, (prefix.shape[1] - 1, 0), value=-100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"), (target_ids >= 0).sum()


def bench_techniques(args, device, dtype):
    """A step of four micro-batches with captions of unequal lengths: as it is, and without each technique. They take turns."""
    B, longest = args.batch_size, args.target_tokens * 3 // 2
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    model = build_models(args.size, dtype, device)["ours"]
    images = torch.randn(B, 3, model.vpg.image_size, model.vpg.image_size, device=device)
    queries = torch.randn(B, model.vpg.num_query_tokens, model.vpg.dim, device=device)
    prompt = torch.tensor([vpgtrans.IMAGE] * model.vpg.num_query_tokens + [BOS]).expand(B, -1)
    lengths = torch.randint(args.target_tokens // 2, longest + 1, (4 * B,), device=device)
    ids = torch.randint(4, IMAGE_ID, (4 * B, longest), device=device).masked_fill(torch.arange(longest, device=device) >= lengths[:, None], -100)
    batches = lambda order: [ids[some, : int(lengths[some].max())] for some in order.split(B)]
    like, unlike = batches(lengths.argsort()), batches(torch.arange(4 * B, device=device))

    def step(model, optimizer, batches, sees):
        for targets in batches:
            with autocast():
                model(prompt, targets, **sees)[0].backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def patched(*changes):
        before = [getattr(place, name) for place, name, _ in changes]
        for place, name, new in changes:
            setattr(place, name, new)
        yield
        for (place, name, _), old in zip(changes, before):
            setattr(place, name, old)

    @contextlib.contextmanager
    def unfrozen():
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        yield
        for p in frozen:
            p.requires_grad_(False)

    compiled = copy.deepcopy(model)
    for block in [*compiled.vpg.layers, *compiled.llm.layers]:
        block.compile()
    sdpa = F.scaled_dot_product_attention
    attentions = [(qformer, "attention", lambda q, k, v, dropout=0.0: sdpa(q, k, v, dropout_p=dropout)),
                  (language_models, "attention", lambda q, k, v, mask=None, causal=False: sdpa(q, k, v, mask, is_causal=causal))]
    for what in ("warm-up", "fine-tune"):
        stage = vpgtrans.STAGES[what]
        vpgtrans.enter_stage(model, stage), vpgtrans.enter_stage(compiled, stage)
        new_optimizer = lambda model: torch.optim.AdamW(vpgtrans.parameter_groups(model, stage), lr=0.0, fused=True)
        optimizer, sees = new_optimizer(model), {"images": images}
        ways = {"as it is": (contextlib.nullcontext, model, like, sees), "without micro-batches of like lengths": (contextlib.nullcontext, model, unlike, sees),
                "all logits at once": (lambda: patched(*((language_models.FrozenHeadLoss, limit, {device.type: 2**62}) for limit in ("BLOCK", "SLICE"))), model, like, sees),
                "logits of the prefix, too": (lambda: patched((language_models.OPT, "loss", score_all_positions)), model, like, sees),
                "gradients for frozen weights, too": (unfrozen, model, like, sees),
                "torch's attention" if device.type == "cpu" else "-": (lambda: patched(*attentions), model, like, sees),
                "blocks compiled": (contextlib.nullcontext, compiled, like, sees)}
        if what == "warm-up":
            ways["queries from a cache"] = contextlib.nullcontext, model, like, {"queries": queries}
        optimizers = {model: optimizer, compiled: new_optimizer(compiled)}

        def run(way):
            context, model, batches, sees = ways[way]
            with context():
                step(model, optimizers[model], batches, sees)

        for way in ways:
            run(way)
        seconds = take_turns({way: partial(run, way) for way in ways}, args.repeats, device)
        usual = statistics.median(seconds["as it is"])
        print(f"\n| {what}, 4 x {B} samples | ms | min - max | times as long |\n|---|---|---|---|")
        for way, times in seconds.items():
            print(f"| {way} | {statistics.median(times) * 1e3:,.0f} | {min(times) * 1e3:,.0f} - {max(times) * 1e3:,.0f} | {statistics.median(times) / usual:.2f} |")


def bench_llm(args, device, dtype):
    B, T, low = args.batch_size, args.target_tokens, dtype == torch.bfloat16
    llms = build_llms(args.llm, dtype, device)
    rows = []
    # transformers' weights are left unfrozen here: torch would multiply a frozen head the slow way, copying it for each row
    for beams in (1, 5):
        seconds, equal = time_generation(llms, args.generation_batch_size, beams, args.repeats, device, exact=not low)
        rows.append(("greedy" if beams == 1 else f"{beams} beams", seconds, lambda name, median, equal=equal: f"{equal:.1%}"))
    for llm in llms.values():
        llm.requires_grad_(False)
        for block in compiled_blocks(llm) if args.compile else ():
            block.compile()
    losses, soft_prompts = mean_llm_losses(llms, B, T, device)
    apart = check_agreement(losses, dict.fromkeys(llms, soft_prompts), contextlib.nullcontext, TOLERANCE[args.precision])
    speed = matrix_product_speed(dtype, device)
    best = llm_flops(llms["ours"], B, T) / speed

    def step(name):
        losses[name]().backward()
        soft_prompts.grad = None

    seconds = take_turns({name: partial(step, name) for name in llms}, args.repeats, device)
    print(*table("training | implementation | ms | min - max | samples/s | ratio | of the limit",
                 [("forward, backward", seconds, lambda name, median: f"{best / median:.0%}")], B), sep="\n")
    print(f"\nThe limit: {best * speed / 1e12:.3g} TFLOP at {speed / 1e12:.3g} TFLOP/s, those of a large matrix product in {args.precision}; losses "
          f"within {apart[0]:.1e}, gradients within {apart[1]:.1e} of transformers'")
    print(*table(f"{NEW_TOKENS} tokens, batch {args.generation_batch_size} | implementation | ms | min - max | captions/s | ratio | equal ids", rows,
                 args.generation_batch_size), sep="\n")


def bench_blip2(args, device, dtype):
    B, low, autocast = args.batch_size, dtype == torch.bfloat16, partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    models = build_models(args.size, dtype, device)
    for model in models.values():
        model.eval()
    generation, training, notes = [], [], []
    llms = {name: model.llm if name == "ours" else model.language_model for name, model in models.items()}
    for beams in (1, 5):  # before anything is compiled: a cache that grows would be compiled again and again
        seconds, equal = time_generation(llms, args.generation_batch_size, beams, args.repeats, device, exact=not low)
        generation.append(("greedy" if beams == 1 else f"{beams} beams", seconds, lambda name, median, equal=equal: f"{equal:.1%}"))
    if args.compile:
        for name, model in models.items():
            vpg = model.vpg.layers if name == "ours" else [*model.vision_model.encoder.layers, *model.qformer.encoder.layer]
            for block in [*vpg, *compiled_blocks(llms[name])]:
                block.compile()
    speed = matrix_product_speed(dtype, device)
    forward = [(what, seconds, lambda name, median, best=2 * B * products / speed: f"{best / median:.0%}") for (what, seconds), products
               in zip(time_vpg(models, B, autocast, args.repeats, device), vpg_products(models["ours"].vpg))]
    losses = mean_losses(models, B, args.target_tokens, device)
    projectors = {name: (model.projector if name == "ours" else model.language_projection).weight for name, model in models.items()}
    for what in ("warm-up", "fine-tune"):
        stage = vpgtrans.STAGES[what]
        enter_stage(models, stage)
        for model in models.values():
            model.eval()
        apart = check_agreement(losses, projectors, autocast, TOLERANCE[args.precision])
        for model in models.values():
            model.zero_grad()
        enter_stage(models, stage)  # dropout is on again
        queries = torch.randn(B, models["ours"].vpg.num_query_tokens, models["ours"].vpg.dim, device=device)
        cached = {"ours, cached": partial(losses["ours"], queries)} if what == "warm-up" else {}
        seconds, peak = time_training(models | dict.fromkeys(cached, models["ours"]), stage, losses | cached, autocast, args.repeats, device)
        best = step_flops(models["ours"], stage, B, args.target_tokens) / speed
        training.append((what, seconds, lambda name, median, peak=peak, best=best:
                         (f"{peak[name]:.2f}" if peak else "-") + f" | {best / median:.0%}"))
        notes.append(f"{what}: {best * speed / 1e12:.3g} TFLOP a step, at best {best * 1e3:,.1f} ms; losses within {apart[0]:.1e}, projector "
                     f"gradients within {apart[1]:.1e} of transformers'")
    print(*table("forward | implementation | ms | min - max | images/s | ratio | of the limit", forward, B), sep="\n")
    print(*table("training | implementation | ms | min - max | samples/s | ratio | peak GiB | of the limit", training, B), sep="\n")
    print(f"\nThe limit: a large matrix product in {args.precision} runs at {speed / 1e12:.3g} TFLOP/s", *notes, sep="\n")
    print(*table(f"{NEW_TOKENS} tokens, batch {args.generation_batch_size} | implementation | ms | min - max | captions/s | ratio | equal ids",
                 generation, args.generation_batch_size), sep="\n")


def compiled_blocks(llm):
    """The repeated blocks of a language model, ours or transformers'."""
    if isinstance(llm, language_models.LanguageModel):
        return llm.layers
    if llm.config.is_encoder_decoder:
        return [*llm.encoder.block, *llm.decoder.block]
    return getattr(llm.model, "decoder", llm.model).layers


def main(argv=None):
    args = parse_arguments(argv)
    if transformers is None:
        sys.exit("bench.py: measures ours beside transformers, which is missing: pip install -r requirements-dev.txt")
    transformers.logging.set_verbosity_error()
    if args.loading:
        return bench_loading(args)
    if args.images or args.pairs:
        return (bench_images if args.images else bench_pairs)(args)
    device, dtype = torch.device(args.device), torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch._dynamo.config.recompile_limit = 64  # all blocks of a kind share one function; past 8 variants, they run eagerly
    print(f"`python bench.py {' '.join(sys.argv[1:] if argv is None else argv)}`: {args.llm or args.size}, {args.precision}, batch {args.batch_size}, "
          f"{args.target_tokens} target tokens, medians of {args.repeats}\n{machine(device)}")
    (bench_techniques if args.techniques else bench_captions if args.captions else bench_llm if args.llm else bench_blip2)(args, device, dtype)


if __name__ == "__main__":
    main()
