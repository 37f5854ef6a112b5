"""What a training step needs, without any weights: its arithmetic, and the memory of a GPU that does it.

    with torch.device("meta"): model = ...                       # the shapes alone
    step = trace(model, {"prompt_ids": ..., "target_ids": ..., "images": ...})
    memory(model, step, micro_batch=36)                          # bytes, by what they hold

The step is run on torch's meta device, where tensors have shapes but no content: its matrix products are counted, and the
tensors that autograd keeps for the backward pass. What a kernel needs beside that is not: leave a tenth of a card free.
"""

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

# Memory in GB, and dense bf16 TFLOP/s as their makers state them.
CARDS = {"a100-40gb": (40, 312), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989), "l40s": (48, 362), "a6000": (48, 155),
         "a10": (24, 125), "l4": (24, 121), "rtx-4090": (24, 165), "rtx-3090": (24, 71)}
SHARE = 0.4  # of these TFLOP/s, which training is assumed to reach


@dataclass(frozen=True)
class Step:
    """Of one sample: floating-point operations forward and backward, bytes kept for the backward pass, and of its logits."""

    operations: float
    kept: float
    logits: float


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
    return Step(counter.get_total_flops() / B, sum(storage.nbytes() for storage in kept.values()) / B, 4 * model.llm.vocab_size * batch["target_ids"].numel() / B)


def memory(model, step, micro_batch, world=1):
    """{what: bytes} on one of `world` GPUs. What trains is float32: weight, gradient and two moments, a bf16 copy under autocast,
    and under DDP a second gradient. Of the logits there is one block, in bf16, and twice a slice of it, in float32, of 256 MB each at most."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * (16 + 2 * (p.element_size() == 2) + 4 * (world > 1)) for p in model.parameters() if p.requires_grad)
    return {"frozen weights": frozen, "what trains, its gradients and moments": trained,
            "activations": step.kept * micro_batch, "logits": min(step.logits * micro_batch / 2, 2**28) + 2 * min(step.logits * micro_batch, 2**28)}


def largest_micro_batch(model, step, capacity, most=36, world=1):
    """The samples that fit at a time into nine tenths of `capacity` bytes, `most` at most. ValueError if not even one does."""
    fixed = sum(memory(model, step, 0, world).values())
    fits = int((0.9 * capacity - fixed) // (step.kept + 2.5 * step.logits))
    if fits < 1:
        raise ValueError(f"this should need {(fixed + step.kept + 2.5 * step.logits) / 0.9 / 1e9:.1f} GB of GPU memory, and there are {capacity / 1e9:.1f}; use a "
                         "smaller --tgt, or --micro-batch 1 to try all the same")
    return min(most, fits)


def machine(card=""):
    """(name, bytes of memory or None, FLOP/s assumed) of a card of CARDS, or of what this process finds: there, 60% of what one
    large matrix product reaches. ValueError for a card that is not known."""
    if card:
        if card not in CARDS:
            raise ValueError(f"--dry-run {card}: the cards known are {', '.join(CARDS)}")
        size, speed = CARDS[card]
        return f"{card} ({size} GB; {SHARE:.0%} of its {speed} TFLOP/s assumed)", size * 1e9, SHARE * speed * 1e12
    on_gpu = torch.cuda.is_available()
    a, b = torch.randn(2, *(2 * [8192 if on_gpu else 1024]), device="cuda" if on_gpu else "cpu").bfloat16()
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    speed = 2 * len(a) ** 3 / min(seconds)
    name = torch.cuda.get_device_name() if on_gpu else "this CPU"
    return f"{name} (60% of the {speed / 1e12:.3g} TFLOP/s of a large matrix product assumed)", torch.cuda.mem_get_info()[1] if on_gpu else None, 0.6 * speed


def in_words(seconds):
    return f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{seconds / 60:,.1f} minutes"


def report(model, step, typical, samples, machine, micro_batch, world):
    """Lines about a stage of so many samples: its arithmetic with `typical` captions, its memory with the longest ones (`step`)."""
    name, capacity, speed = machine
    seconds = typical.operations * samples / speed
    yield (f"  {typical.operations / 1e12:.3g} TFLOP a sample, {typical.operations * samples / 1e15:,.1f} PFLOP in all: {in_words(seconds / world)} on "
           f"{world} x {name}" + (f", {in_words(seconds)} of one" if world > 1 else ""))
    needs = memory(model, step, micro_batch, world)
    yield (f"  memory: {sum(needs.values()) / 1e9:.1f} GB with --micro-batch {micro_batch}: "
           f"{', '.join(f'{what} {size / 1e9:.2f}' for what, size in needs.items())}")
    if capacity:
        most = largest_micro_batch(model, step, capacity, 10_000, world)
        yield f"  a tenth of {capacity / 1e9:.0f} GB left free, --micro-batch {most} would fit" if most < 10_000 else "  any micro-batch would fit"
