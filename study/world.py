"""What the parts of the study's small world share: its seeds, and how a model is trained and written."""

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
    parts = [part for name, part in model.named_modules() if "head" not in name]
    return [part.weight for part in parts if isinstance(part, nn.Linear) and part.weight.requires_grad]


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
