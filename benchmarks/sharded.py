"""What an LLM takes in each of some processes that share it (--shard), or alone in fewer bits, beside what a
dry run says of it.

    export CUDA_VISIBLE_DEVICES= MALLOC_MMAP_THRESHOLD_=65536
    torchrun --nproc-per-node 2 -m benchmarks.sharded datasets/smollm2
    python -m benchmarks.sharded datasets/smollm2 --llm-weights nf4
    python -m benchmarks.sharded out/random-1b --make       # writes a random LLaMA of 1.1B there, 2.2 GB

The peak is of a pass forward and back over 4 + 4 positions, beyond what was there before, of the host's
memory. (Without the second variable glibc keeps what was freed, and it says nothing.)
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import estimate
import llm as language_models
import loop
import transfer
from benchmarks.quantised import Peak

ONE_BILLION = dict(model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                   num_attention_heads=32, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)


class Alone(nn.Module):
    """An LLM without anything that sees, for estimate.memory."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm
        self.frozen_layers = llm.layers


def make(folder):
    """A random LLaMA of 1.1B in bf16, as a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ONE_BILLION))
    tensors = {}
    for name, parameter in language_models.empty_llm(folder).named_parameters():
        tensors[name] = 0.02 * torch.randn(parameter.shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")


def forward_and_back(llm):
    prefix = torch.randn(1, 4, llm.dim, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = llm.loss(prefix, torch.randint(3, 99, (1, 4)))
    loss.backward()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm", type=Path, help="folder of the language model")
    parser.add_argument("--llm-weights", choices=("int8", "nf4"))
    parser.add_argument("--make", action="store_true", help="write a random one there first")
    args = parser.parse_args(argv)
    if args.make:
        make(args.llm)
    shard = "all" if "RANK" in os.environ else None
    processes = loop.Processes.start("bf16", shard)
    shapes = Alone(language_models.empty_llm(args.llm)).to("meta", torch.bfloat16).requires_grad_(False)
    transfer.with_llm_weights(shapes, args.llm_weights)
    nothing = estimate.Step(operations=0, kept=0, logits=0)
    needs = estimate.memory(shapes, nothing, 0, shards=processes.shards)
    llm = language_models.load_llm(args.llm, weights=args.llm_weights, mesh=processes.mesh)
    forward_and_back(llm)  # once, so that all that stays is there
    with Peak() as peak:
        for _ in range(4):
            forward_and_back(llm)
    found = processes.gather([(transfer.size_of(llm), peak.bytes)])
    for rank, (size, most) in enumerate(found):
        processes.say(f"process {rank}: {size:,} bytes of weights, {most / 1e6:.1f} MB more at work")
    said = f"dry run:   {needs['frozen weights']:,} bytes of weights"
    if "gathered blocks" in needs:
        said += f", {needs['gathered blocks'] / 1e6:.1f} MB gathered"
    processes.say(said)


if __name__ == "__main__":
    loop.run_command(main)
