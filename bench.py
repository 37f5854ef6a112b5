"""Speed and memory of training and generation, side by side with transformers' BLIP-2.

    python bench.py                                          # a small model in a minute or two, also on a laptop
    python bench.py --size opt-2.7b --batch-size 32 --compile    # the paper's source, with random weights, on one GPU
    python bench.py --size small --precision fp32 --repeats 15

Ours and transformers run in one process, on the same random weights (each tensor exists once), images and captions, with
the same parts frozen, in the same precisions, and take turns. Before anything is timed they must agree: in the loss and in
the projector's gradient (and in float32 in the generated ids), else the run stops. Prints two Markdown tables:

    a training step   forward, backward and AdamW of both stages. "of the limit" is the share of the time that the step's
                      arithmetic alone would take at the speed of one large matrix product, measured here in that precision
    generation        30 tokens behind 33 soft prompts and words, greedy and with 5 beams, in which nothing ends early

A ratio above 1 means that ours is faster than the better of transformers' two kinds of attention. Figures mean something
only on a machine that does nothing else: look at the spread.
"""

import argparse
import contextlib
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import llm as language_models
import qformer
import vpgtrans

try:
    import transformers
except ImportError:
    transformers = None

EVA = dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224, patch_size=14)
SIZES = {  # ViT, layers of the Q-Former, OPT
    "small": (dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14),
              6, dict(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12)),
    "opt-2.7b": (EVA, 12, dict(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32)),
    "opt-6.7b": (EVA, 12, dict(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32)),
}
VOCAB, BOS, IMAGE_ID, NEW_TOKENS = 50272, 2, 50265, 30  # IMAGE_ID is transformers' stand-in for a soft prompt
# The greatest differences between ours and transformers: of the losses, and (relative) of the projector's gradient.
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 0.25)}


# ---------------------------------------------------------------------------------------------------------------- models


def blank_peer(size, attention):
    """transformers' BLIP-2 of a size, without weights (on the meta device); attention is "eager" or "sdpa"."""
    vit, layers, opt = SIZES[size]
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**vit), num_query_tokens=32, image_token_index=IMAGE_ID,
        qformer_config=transformers.Blip2QFormerConfig(num_hidden_layers=layers, encoder_hidden_size=vit["hidden_size"]),
        # without use_cache=False transformers would keep keys and values in training, for nothing
        text_config=transformers.OPTConfig(**opt, vocab_size=VOCAB, word_embed_proj_dim=opt["hidden_size"], use_cache=False))
    with torch.device("meta"):
        return transformers.Blip2ForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def random_tensors(shapes, dtype, device):
    """{name: tensor on the meta device} -> random ones on the device: the ViT's and the LLM's in dtype, the others float32."""
    torch.manual_seed(0)
    tensors = {}
    for name, like in shapes.items():
        # nothing is zero or one, and hidden states keep their scale, so that the losses depend on every tensor
        scale = 0.1 if like.ndim < 2 else like.flatten(1).shape[1] ** -0.5 if like.shape[0] > 1 else like.shape[-1] ** -0.5
        frozen = qformer.is_frozen(name) or name.startswith("language_model.")
        tensor = torch.randn(like.shape, dtype=dtype if frozen else torch.float32, device=device).mul_(scale)
        tensors[name] = tensor.add_(1) if "norm" in name.lower() and name.endswith("weight") else tensor
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.decoder.embed_tokens.weight"]
    return tensors


def build_models(size, dtype, device):
    """-> ours, {"eager": transformers' BLIP-2, "sdpa": the same}, all three around the same tensors."""
    peers = {attention: blank_peer(size, attention) for attention in ("eager", "sdpa")}
    tensors = random_tensors(peers["sdpa"].state_dict(), dtype, device)
    for attention, peer in peers.items():
        peer.load_state_dict(tensors, strict=True, assign=True)
        assert {m.config._attn_implementation for m in (peer.vision_model, peer.qformer, peer.language_model)} == {attention}
    config = peers["sdpa"].config.to_dict()
    with torch.device("meta"):
        vpg, llm = qformer.VPG(config), language_models.OPT(config["text_config"])
        ours = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm)
    part = lambda beginning: {name.removeprefix(beginning): tensor for name, tensor in tensors.items() if name.startswith(beginning)}
    vpg.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("language_")}, assign=True)
    ours.projector.load_state_dict(part("language_projection."), assign=True)
    llm.load_state_dict({name: tensor for name, tensor in part("language_model.").items() if name != "lm_head.weight"}, assign=True)
    return ours.eval(), peers


def enter_stage(ours, peers, stage):
    """Makes the same parts trainable, and the same Q-Former drop out, in ours and in transformers."""
    vpgtrans.enter_stage(ours, stage)
    trained = {name for name, parameter in vpgtrans.blip2_names(ours).items() if parameter.requires_grad}
    for peer in peers.values():
        for name, parameter in peer.named_parameters():
            parameter.requires_grad_(name in trained)
        peer.eval().qformer.train(ours.vpg.qformer.training)
        assert sum(p.requires_grad for p in peer.parameters()) == len(trained)


def mean_losses(ours, peers, batch_size, target_tokens, device):
    """{name: function that returns the mean loss of one and the same batch}."""
    images = torch.randn(batch_size, 3, ours.vpg.image_size, ours.vpg.image_size, device=device)
    target_ids = torch.randint(4, IMAGE_ID, (batch_size, target_tokens), device=device)
    head = lambda image: torch.tensor([image] * ours.vpg.num_query_tokens + [BOS]).expand(batch_size, -1)
    # transformers reads the caption's last token as well, which predicts nothing; the tokens that count are the same
    ids = torch.cat([head(IMAGE_ID).to(device), target_ids], dim=1)
    labels = torch.cat([head(0).to(device) * 0 - 100, target_ids], dim=1)

    def our_loss():
        loss, tokens = ours(head(vpgtrans.IMAGE), target_ids, images=images)
        return loss / tokens

    return {"ours": our_loss} | {f"transformers, {attention}": lambda peer=peer: peer(pixel_values=images, input_ids=ids, labels=labels).loss
                                 for attention, peer in peers.items()}


def check_agreement(ours, peers, losses, autocast, tolerance):
    """Stops unless losses and gradients agree, without dropout. -> the greatest differences (absolute, relative)"""
    found = []
    for model, loss in zip((ours, *peers.values()), losses.values(), strict=True):
        model.eval()
        with autocast():
            loss = loss()
            loss.backward()
        projector = model.projector if model is ours else model.language_projection
        found.append((loss.item(), projector.weight.grad.clone()))
        model.zero_grad(set_to_none=True)
    (loss, grad), *others = found
    apart = max(abs(other - loss) for other, _ in others), max(((other - grad).norm() / grad.norm()).item() for _, other in others)
    if not all(a <= t for a, t in zip(apart, tolerance)):  # not(<=) also catches nan
        raise ValueError(f"ours and transformers compute different things: their losses are {', '.join(f'{l:.6f}' for l, _ in found)}, "
                         f"their projectors' gradients {apart[1]:.2g} apart; at most {tolerance[0]:g} and {tolerance[1]:g} are allowed")
    return apart


# ----------------------------------------------------------------------------------------------------------- measurement


def step_flops(model, stage, B, T):
    """Floating-point operations that one training step cannot do without; the same for every implementation.

    Forward: 2 x parameters x tokens, and 2 x 2 x queries x keys x width for attention (half of it where causal). Backward:
    as much again for the gradient to the activations, and for the one to weights that train. Hence 2 x for the ViT, 4 x for
    the LLM (frozen, but gradients pass through it), 2 x or 6 x for the Q-Former, 4 x or 6 x for the projector."""
    matrices = lambda module, only="": sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and only in name)
    vit, former, layers = model.vpg.vision_model, model.vpg.qformer, model.llm.layers
    N, Q = vit.embeddings.position_embedding.shape[1], model.vpg.num_query_tokens
    S, joint = Q + T, "Q-Former" in stage.trains  # S = P + T - 1 with P = Q + 1, the BOS
    patches, at_image = matrices(vit.embeddings.patch_embedding), matrices(former, "crossattention.attention.key") * 2
    crossings = sum(hasattr(layer, "crossattention") for layer in former.encoder["layer"])
    vit_forward = matrices(vit.encoder) * N + patches * (N - 1) + 2 * len(vit.encoder["layers"]) * N * N * vit.post_layernorm.weight.numel()
    former_forward = ((matrices(former) - at_image) * Q + at_image * N
                      + 2 * Q * (len(former.encoder["layer"]) * Q + crossings * N) * model.vpg.dim)
    llm_linear, llm_attention = matrices(layers) * S + model.llm.vocab_size * model.llm.dim * T, len(layers) * S * S * model.llm.dim
    return 2 * B * (vit_forward + (3 if joint else 1) * former_forward + (3 if joint else 2) * matrices(model.projector) * Q
                    + 2 * llm_linear + 3 * llm_attention)  # attention's two products have two gradients each


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(functions, repeats, device):
    """{name: function} -> {name: seconds of each call}: one call each in turn, so that a disturbance meets all alike."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronise(device)
            began = time.perf_counter()
            function()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def matrix_product_speed(dtype, device):
    """FLOP/s of one large matrix product, the best of several: what this device can do at all."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    return 2 * size**3 / min(take_turns({"": lambda: a @ b}, 12, device)[""])


def train_step(loss, optimizer, autocast):
    with autocast():
        loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_training(ours, peers, stage, losses, autocast, repeats, device):
    """-> {name: seconds of each step}, {name: peak GiB or None}.

    The rate is 0: the same arithmetic, but the shared weights stay as they are. Memory is taken before the turns, with one
    optimizer at a time: the weights, and one implementation's activations, gradients and moments."""
    peak, steps = {}, {}
    for keep in (False, True):
        for (name, loss), model in zip(losses.items(), (ours, *peers.values()), strict=True):
            optimizer = torch.optim.AdamW(vpgtrans.parameter_groups(model, stage), lr=0.0, betas=stage.betas, fused=True)
            step = partial(train_step, loss, optimizer, autocast)
            if keep:
                steps[name] = step
            step()  # compiles, allocates the moments
            if not keep and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                step()
                peak[name] = torch.cuda.max_memory_allocated(device) / 2**30
    return take_turns(steps, repeats, device), peak


def time_generation(ours, peers, batch_size, beams, repeats, device, exact):
    """-> {name: seconds of each batch}, share of equal ids. Stops if `exact` and they are not all equal."""
    prefix = torch.randn(batch_size, ours.vpg.num_query_tokens + 1, ours.llm.dim, device=device).to(ours.llm.embed(torch.tensor([BOS], device=device)).dtype)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=device)
    functions = {"ours": partial(ours.llm.generate, prefix, max_new_tokens=NEW_TOKENS, num_beams=beams, stop=())}
    for attention, peer in peers.items():
        peer.language_model.generation_config.eos_token_id = None  # as stop=(): nothing ends a text
        functions[f"transformers, {attention}"] = partial(peer.language_model.generate, inputs_embeds=prefix, attention_mask=mask, use_cache=True,
                                                          max_new_tokens=NEW_TOKENS, num_beams=beams, do_sample=False, pad_token_id=1)
    mine, *theirs = (torch.as_tensor(function()).cpu() for function in functions.values())  # (B, 30) each; a warm-up, too
    equal = min((mine == ids).float().mean().item() for ids in theirs)
    if exact and equal < 1:
        raise ValueError(f"ours and transformers generate different ids with {beams} beam(s): {equal:.1%} are equal")
    return take_turns(functions, repeats, device), equal


# ---------------------------------------------------------------------------------------------------------------- report


def rows(what, seconds, batch_size, further=lambda name, median: ""):
    """Lines of a Markdown table: medians, their spread, samples a second, ratio to the better peer."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    better = min(median for name, median in medians.items() if name != "ours")
    for name, median in medians.items():
        ms = [1e3 * t for t in (median, min(seconds[name]), max(seconds[name]))]
        yield (f"| {what} | {name} | {ms[0]:,.1f} | {ms[1]:,.1f} - {ms[2]:,.1f} | {batch_size / median:,.1f} | {better / median:.2f} |" + further(name, median))


def machine(device):
    """What the figures were measured on, and by which code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        name = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
        name += f", {torch.get_num_threads()} threads"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}; commit {git.stdout.strip() or 'unknown'}"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="small: ViT 12 x 384, Q-Former 6 x 768, OPT-125M; the others: "
                        "EVA ViT-g, Q-Former 12 x 768 and that OPT, in bf16 about 8 and 16 GiB of weights (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step, or captions generated at a time (default: %(default)s)")
    parser.add_argument("--target-tokens", type=int, default=16, help="of each caption (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of ViT and LLM; what trains is float32, with bf16 "
                        "under autocast (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks of all, in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.target_tokens, args.repeats) < 1:
        parser.error("--batch-size, --target-tokens and --repeats must be at least 1")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if transformers is None:
        sys.exit("bench.py: transformers is missing, and ours is measured beside it: pip install -r requirements-dev.txt")
    transformers.logging.set_verbosity_error()
    device, dtype = torch.device(args.device), torch.bfloat16 if args.precision == "bf16" else torch.float32
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")
    ours, peers = build_models(args.size, dtype, device)
    losses = mean_losses(ours, peers, args.batch_size, args.target_tokens, device)
    speed = matrix_product_speed(dtype, device)
    training, generation = [], []
    for beams in (1, 5):  # before anything is compiled: a cache that grows would be compiled again and again
        seconds, equal = time_generation(ours, peers, args.batch_size, beams, args.repeats, device, args.precision == "fp32")
        generation += rows("greedy" if beams == 1 else f"{beams} beams", seconds, args.batch_size, lambda *_: f" {equal:.0%} |")
    if args.compile:
        for peer in peers.values():
            for block in [*peer.vision_model.encoder.layers, *peer.qformer.encoder.layer, *peer.language_model.model.decoder.layers]:
                block.compile()
        for block in [*ours.vpg.layers, *ours.llm.layers]:
            block.compile()
    notes = []
    for name, stage in ((name, vpgtrans.STAGES[name]) for name in ("warm-up", "fine-tune")):
        enter_stage(ours, peers, stage)
        apart = check_agreement(ours, peers, losses, autocast, TOLERANCE[args.precision])
        enter_stage(ours, peers, stage)
        seconds, peak = time_training(ours, peers, stage, losses, autocast, args.repeats, device)
        flops = step_flops(ours, stage, args.batch_size, args.target_tokens)
        training += rows(name, seconds, args.batch_size, lambda implementation, median: f" {peak.get(implementation, float('nan')):.2f} | "
                         f"{flops / speed / median:.0%} |".replace("nan", "-"))
        notes.append(f"{name}: {flops / 1e12:.3g} TFLOP a step, at best {1e3 * flops / speed:,.1f} ms; losses at most {apart[0]:.1e}, projector "
                     f"gradients {apart[1]:.1e} (relative) from transformers'")
    print(f"`python bench.py {' '.join(sys.argv[1:] if argv is None else argv)}`: {args.size}, {args.precision}, batch {args.batch_size}, "
          f"{args.target_tokens} target tokens, medians of {args.repeats}\n{machine(device)}\n")
    print("| a training step | implementation | ms | min - max | samples/s | ratio | peak GiB | of the limit |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(training), "\n\nLimit: a large matrix product in", args.precision, f"does {speed / 1e12:.3g} TFLOP/s.", *notes, sep="\n")
    print("\n| 30 tokens | implementation | ms | min - max | captions/s | ratio | equal ids |\n|---|---|---|---|---|---|---|")
    print("\n".join(generation))


if __name__ == "__main__":
    main()
