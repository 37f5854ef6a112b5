"""A checkpoint loaded once, in a fresh process: generation.py --loading starts it.

    python -m benchmarks.load_once ours FOLDER bfloat16
    python -m benchmarks.load_once transformers FOLDER float32

Prints seconds to load, seconds to the first logits, and the bytes by which peak memory has grown. Each
process imports only what it measures, before the clock starts.
"""

import sys
import time

import torch


def peak_memory():
    """Bytes (Linux)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def load_ours(load, folder, dtype):
    llm = load(folder, dtype=dtype)
    loaded = time.perf_counter()
    llm(torch.zeros(1, 4, llm.dim), torch.zeros(1, 1, dtype=torch.long))
    return loaded


def load_theirs(load, folder, dtype):
    llm = load(folder, dtype=dtype)
    loaded = time.perf_counter()
    llm(inputs_embeds=torch.zeros(1, 4, llm.config.hidden_size, dtype=dtype))
    return loaded


def main():
    torch.manual_seed(0)
    who, folder, dtype = sys.argv[1:]
    if who == "ours":
        from llm import load_llm as load
    else:
        from transformers import AutoModelForCausalLM
        load = AutoModelForCausalLM.from_pretrained
    before = peak_memory()
    began = time.perf_counter()
    with torch.no_grad():
        measure = load_ours if who == "ours" else load_theirs
        loaded = measure(load, folder, getattr(torch, dtype))
    print(loaded - began, time.perf_counter() - began, peak_memory() - before)


if __name__ == "__main__":
    main()
