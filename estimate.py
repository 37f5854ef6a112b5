# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports
# nothing of ours.
"""What a training step needs, without any weights: its arithmetic, and the memory of a GPU that
does it.

    with torch.device("meta"): model = ...                       # the shapes alone
    step = trace(model, {"prompt_ids": ..., "target_ids": ..., "images": ...})
    memory(model, step, micro_batch=36)                          # bytes, by what they hold

The step is run on torch's meta device, where tensors have shapes but no content: its matrix
products are counted, and the tensors that autograd keeps for the backward pass. What a kernel needs
beside that is not counted: leave a tenth of a card free. The model and its batches are the
caller's; the model's call returns (loss sum, tokens).
"""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CARDS = {  # memory in GB, and dense bf16 TFLOP/s as their makers state them
    "a100-40gb": (40, 312), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989), "l40s": (48, 362),
    "a6000": (48, 155), "a10": (24, 125), "l4": (24, 121), "rtx-4090": (24, 165), "rtx-3090": (24, 71),
}
SHARE = 0.4  # of these TFLOP/s, which training is assumed to reach
LARGEST = 36  # micro-batch that is chosen by itself: the paper's


def readable_size(size):
    """Bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} KB"


def readable_time(seconds):
    """Minutes or hours for people."""
    return f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{seconds / 60:,.1f} minutes"


@dataclass(frozen=True)
class Step:
    """Of one sample: floating-point operations forward and backward, bytes kept for the backward
    pass, and of its logits in float32."""

    operations: float
    kept: float
    logits: float


def trace(model, batch):
    """The Step of a model on the meta device, as it is trained now, averaged over a batch of its
    inputs."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # views share one; held, so that no other gets its address
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, watched:
        loss, _ = model(**batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    B = len(batch["prompt_ids"])
    return Step(
        operations=counter.get_total_flops() / B,
        kept=sum(storage.nbytes() for storage in kept.values()) / B,
        logits=4 * model.llm.vocab_size * batch["target_ids"].numel() / B,
    )


def spread(blocks, shards):
    """Frozen blocks whose matrices are sharded by rows over so many GPUs -> bytes that each of these is
    spared, and of the largest block's matrices."""
    spared = largest = 0
    for block in blocks:
        matrices = [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
        for matrix in matrices:
            rows = -(-len(matrix) // shards)
            spared += (len(matrix) - rows) * matrix.shape[1] * matrix.element_size()
        largest = max(largest, sum(matrix.nbytes for matrix in matrices))
    return spared, largest


def memory(model, step, micro_batch, world=1, shards=1):
    """{what: bytes} on one of `world` GPUs, of which so many share the frozen blocks.

    Of blocks that are shared, FSDP has one whole at work, what it was copied from, and what the next is
    gathered in.

    Of quantised weights, one matrix at a time exists as such, twice while its scales are multiplied
    in. What trains is float32: weight, gradient and two moments, a bf16 copy under autocast, and under
    DDP a second gradient. Of the logits there is one block, in bf16, and twice a slice of it in
    float32, of 256 MB each at most."""
    frozen = trained = 0
    for p in model.parameters():
        if p.requires_grad:
            trained += p.numel() * (16 + 2 * (p.element_size() == 2) + 4 * (world > 1))
        else:
            frozen += p.numel() * p.element_size()
    logits = step.logits * micro_batch
    needs = {
        "frozen weights": frozen,
        "what trains, its gradients and moments": trained,
        "activations": step.kept * micro_batch,
        "logits": min(logits / 2, 2**28) + 2 * min(logits, 2**28),
    }
    if matrix := model.llm.largest_quantised:
        needs["a quantised matrix at work"] = 4 * matrix
    if shards > 1:
        spared, largest = spread(model.frozen_layers, shards)
        needs["frozen weights"] -= spared
        needs["gathered blocks"] = 3 * largest
    return needs


def largest_micro_batch(model, step, capacity, most=LARGEST, world=1, shards=1):
    """The samples that fit at a time into nine tenths of `capacity` bytes, `most` at most.
    ValueError if none does."""
    fixed = sum(memory(model, step, 0, world, shards).values())
    each = step.kept + 2.5 * step.logits
    fits = int((0.9 * capacity - fixed) // each)
    if fits < 1:
        smaller = "a smaller language model"
        if shards > 1:
            smaller = f"--shard over more GPUs, or --llm-weights int8 or nf4 in its place, {smaller}"
        elif not model.llm.largest_quantised:
            smaller = f"--llm-weights int8 or nf4, --shard over several GPUs, {smaller}"
        raise ValueError(f"this should need {(fixed + each) / 0.9 / 1e9:.1f} GB of GPU memory, and there are "
                         f"{capacity / 1e9:.1f}; use {smaller}, or --micro-batch 1 to try all the same")
    return min(most, fits)


def machine(card=""):
    """(name, bytes of memory or None, FLOP/s assumed) of a card of CARDS, or of what this process
    finds: there, 60% of what one large matrix product reaches. ValueError for a card that is not
    known."""
    if card:
        if card not in CARDS:
            raise ValueError(f"--dry-run {card}: the cards known are {', '.join(CARDS)}")
        size, speed = CARDS[card]
        name = f"{card} ({size} GB; {SHARE:.0%} of its {speed} TFLOP/s assumed)"
        return name, size * 1e9, SHARE * speed * 1e12
    on_gpu = torch.cuda.is_available()
    side = 8192 if on_gpu else 1024
    a, b = torch.randn(2, side, side, device="cuda" if on_gpu else "cpu").bfloat16()
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    speed = 2 * side**3 / min(seconds)
    name = torch.cuda.get_device_name() if on_gpu else "this CPU"
    name += f" (60% of the {speed / 1e12:.3g} TFLOP/s of a large matrix product assumed)"
    return name, torch.cuda.mem_get_info()[1] if on_gpu else None, 0.6 * speed


def report(model, longest, typical, samples, machine, micro_batch=None, world=1, shards=1):
    """Lines about a stage of so many samples, as the model is trained now: the arithmetic of
    `typical` batches, and the memory of `longest` ones (inputs of the model on the meta device).
    Without a micro-batch it is what fits. `world` and `shards` are as memory's."""
    name, capacity, speed = machine
    operations = trace(model, typical).operations
    step = trace(model, longest)
    seconds = operations * samples / speed
    alone = f", {readable_time(seconds)} of one" if world > 1 else ""
    yield (f"  {operations / 1e12:.3g} TFLOP a sample, {operations * samples / 1e15:,.1f} PFLOP in all: "
           f"{readable_time(seconds / world)} on {world} x {name}{alone}")
    if not micro_batch:
        micro_batch = LARGEST
        if capacity:
            micro_batch = largest_micro_batch(model, step, capacity, world=world, shards=shards)
    needs = memory(model, step, micro_batch, world, shards)
    parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in needs.items())
    yield f"  memory: {sum(needs.values()) / 1e9:.1f} GB with --micro-batch {micro_batch}: {parts}"
    if capacity:
        most = largest_micro_batch(model, step, capacity, 10_000, world, shards)
        fits = f"--micro-batch {most} would fit" if most < 10_000 else "any micro-batch would fit"
        yield f"  a tenth of {capacity / 1e9:.0f} GB left free, {fits}"
