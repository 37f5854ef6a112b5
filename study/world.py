"""The small world of the study as data: its seeds, sizes and configurations; and how its models are
trained and written.
"""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

IGNORE = -100
SEEDS = {"train": 1, "val": 2, "test": 8, "tokenizers": 3, "vit": 4, "llms": 5, "stage1": 6,
         "demo-train": 9, "demo-val": 10}
PAIRS = dict(train=20000, val=500, test=1000)
SHARES = {"5": 0.05, "10.7": 0.107, "25": 0.25}  # parts of the training images: how many are needed?

# --------------------------------------------------------------------------------- configurations

VISION = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    image_size=64, patch_size=8, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)
QFORMER = dict(
    vocab_size=30523, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, cross_attention_frequency=2, encoder_hidden_size=128)
VPG_CONFIG = dict(
    model_type="blip-2", num_query_tokens=12,
    vision_config=dict(model_type="blip_2_vision_model", **VISION),
    qformer_config=dict(model_type="blip_2_qformer", **QFORMER))


def opt_config(dim, layers, heads):
    return dict(
        model_type="opt", architectures=["OPTForCausalLM"], vocab_size=4032,
        hidden_size=dim, word_embed_proj_dim=dim, ffn_dim=4 * dim, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=256, activation_function="relu",
        do_layer_norm_before=True, _remove_final_layer_norm=False, enable_bias=True,
        layer_norm_elementwise_affine=True, dropout=0.1, attention_dropout=0.0, layerdrop=0.0,
        init_std=0.02, bos_token_id=2, eos_token_id=2, pad_token_id=1, prefix="</s>",
        tie_word_embeddings=True, torch_dtype="bfloat16")


def llama_config(dim, layers, heads):
    return dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=3000,
        hidden_size=dim, intermediate_size=8 * dim // 3 // 8 * 8, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=256, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, torch_dtype="bfloat16")


def t5_config(dim, layers, heads):
    return dict(
        model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True,
        vocab_size=3000, d_model=dim, d_kv=dim // heads, d_ff=2 * dim, num_layers=layers,
        num_decoder_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32, relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        tie_word_embeddings=False, torch_dtype="bfloat16")


LLMS = {
    "opt-64": opt_config(64, 3, 2), "opt-128": opt_config(128, 4, 4),
    "opt-192": opt_config(192, 4, 4), "opt-256": opt_config(256, 5, 4),
    "llama-128": llama_config(128, 4, 4), "llama-256": llama_config(256, 5, 4),
    "t5-128": t5_config(128, 3, 4), "t5-256": t5_config(256, 3, 4)}
STEPS = dict(vit=2000, stage1=1500) | {name: 1600 if "256" in name else 1000 for name in LLMS}

# ------------------------------------------------------------------------------------------ files


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def save_bf16(file, tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)", flush=True)


def glosses():
    """[("dog", "a member of the genus Canis"), ...] from WordNet."""
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        raise SystemExit(f"{folder}/data.noun: missing; install WordNet with: apt-get install wordnet-base")
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        text = (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line[:1].isdigit() and " | " in line:
                word = re.sub(r"\(.*\)", "", line.split()[4]).replace("_", " ")
                found.append((word, line.split(" | ", 1)[1].strip()))
    return found


# --------------------------------------------------------------------------------------- training


def batches(count, size, steps, rng):
    """`steps` arrays of `size` indices below `count`, in epochs without repetition."""
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def initialise(module):
    """Normal 0.02 for matrices, as in GPT-2, OPT and BERT."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(part.weight, std=0.02)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)


def inner_matrices(model):
    """The trained weights of linear layers, but for heads: those that Muon is for."""
    layers = [part for name, part in model.named_modules() if isinstance(part, nn.Linear) and "head" not in name]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def optimise(name, model, steps, step_loss, evaluate=None, muon=0.02, adam=2e-3, every=100, warm=100):
    """Trains a model: step_loss(step) -> loss. What evaluate() says is printed at the end.

    Muon (Jordan et al. 2024) is for the matrices inside, AdamW for the rest, or with muon=None for
    all. The rate rises linearly and falls to zero as a cosine, gradients are clipped to norm 1,
    and the model computes under bf16 autocast.

    With AdamW alone, language models took three times as many steps until they could copy what
    colour goes with what shape. What AdamW is to go on training it had better train from the start:
    Muon leaves weights so large that AdamW's steps hardly move them."""
    inside = inner_matrices(model) if muon else []
    ids = {id(weight) for weight in inside}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    adamw = torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    optimizers = [(adam, adamw)]
    if muon:
        optimizers.append((muon, torch.optim.Muon(inside, lr=muon, momentum=0.95, weight_decay=0.01)))
    start = time.time()
    recent = []
    for step in range(steps):
        share = min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for rate, optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(step)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*inside, *others], 1.0)
        for _, optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item())
        if (step + 1) % every == 0:
            seconds = (time.time() - start) / (step + 1)
            mean = np.mean(recent[-every:])
            print(f"{name} {step + 1}/{steps} loss {mean:.3f} {seconds:.3f} s/step", flush=True)
    minutes = (time.time() - start) / 60
    print(f"{name}: {steps} steps in {minutes:.1f} min; {evaluate() if evaluate else ''}", flush=True)
