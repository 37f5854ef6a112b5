"""What a training step needs, without any weights: its arithmetic, and the memory of a GPU that does it.

    with torch.device("meta"): model = ...                       # the shapes alone
    step = trace(model, {"prompt_ids": ..., "target_ids": ..., "images": ...})
    memory(model, step, micro_batch=36)                          # bytes, by what they hold

The step is run on torch's meta device, where tensors have shapes but no content: its matrix products are counted, and the
tensors that autograd keeps for the backward pass. What a kernel needs beside that is not: leave a tenth of a card free.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

# Memory in GB, and dense bf16 TFLOP/s as their makers state them.
CARDS = {"a100-40gb": (40, 312), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989), "l40s": (48, 362), "a6000": (48, 155),
         "a10": (24, 125), "l4": (24, 121), "rtx-4090": (24, 165), "rtx-3090": (24, 71)}
SHARE = 0.4  # of these TFLOP/s, which training is assumed to reach


@dataclass(frozen=True)
class Step:
    """Of one sample: floating-point operations forward and backward, and bytes kept for the backward pass."""

    operations: float
    kept: float


def trace(model, batch):
    """The Step of a model on the meta device, as it is trained now, averaged over a batch of its inputs."""
    kept, own = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # views share one; held, so that no other gets its address
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(**batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    B = len(batch["prompt_ids"])
    return Step(counter.get_total_flops() / B, sum(storage.nbytes() for storage in kept.values()) / B)


def memory(model, step, micro_batch, world=1):
    """{what: bytes} on one of `world` GPUs. What trains is float32: weight, gradient and two moments, a bf16 copy under autocast,
    and under DDP a second gradient."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"frozen weights in bf16": 2 * frozen, "what trains, with gradients and moments": (18 + 4 * (world > 1)) * trained,
            f"activations of {micro_batch} samples": step.kept * micro_batch, "a block of logits": 2**29 + 2**28}


def largest_micro_batch(model, step, capacity, most=36, world=1):
    """The samples that fit at a time into nine tenths of `capacity` bytes, `most` at most. ValueError if not even one does."""
    fixed = sum(memory(model, step, 0, world).values())
    fits = int((0.9 * capacity - fixed) // step.kept)
    if fits < 1:
        raise ValueError(f"this needs {(fixed + step.kept) / 0.9 / 1e9:.1f} GB of GPU memory, and there are {capacity / 1e9:.1f}; use a smaller --tgt")
    return min(most, fits)
