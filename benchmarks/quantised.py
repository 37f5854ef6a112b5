"""A language model whose matrices are quantised (--llm-weights) beside itself in full: bytes, loading,
logits, losses of texts and captions, and the time of a step.

    python -m benchmarks.quantised datasets/smollm2
    python -m benchmarks.quantised FOLDER --precision fp32 --texts 50

Texts are pieces of 64 tokens of this repository's own prose. Captions are those of
demo/pairs/val.tar, read behind BOS alone. Each kind of weights is loaded in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from pathlib import Path

import torch
from torch import nn

import data
import llm as language_models
from pairs import read_pairs
from transfer import DTYPES

ROOT = Path(__file__).parent.parent
LENGTH = 64  # tokens of a text


def own_memory():
    """Bytes that this process has written (Linux): files that it maps do not count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """Within it, the most memory that this process has at a time: `bytes` beyond what it began with."""

    def __enter__(self):
        self.began = own_memory()
        self.bytes = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.001):
            self.bytes = max(self.bytes, own_memory() - self.began)

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def texts_and_captions(folder, count):
    """-> the id to be read first, and two lists of lists of ids that come behind it."""
    tok = data.load_tokenizer(folder)
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    ids = tok.encode("\n".join(file.read_text() for file in files))
    texts = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    captions = read_pairs(str(ROOT / "demo/pairs/val.tar")).captions
    captions = [data.caption_ids(tok, caption) for caption in captions]
    every = max(1, len(texts) // count)
    # the start token of a T5's encoder is its end mark
    first_id = tok.eos_id if tok.encoder_decoder else tok.bos_id
    return first_id, texts[::every][:count], captions[:count]


def loss(llm, first_id, rows, batch=20):
    """Nats a token behind `first_id`."""
    total = tokens = 0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), batch):
        some = [torch.tensor(row) for row in rows[start : start + batch]]
        targets = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
        prefix = llm.embed(torch.full((len(some), 1), first_id))
        summed, count = llm.loss(prefix, targets)
        total += summed.item()
        tokens += count.item()
    return total / tokens


def step_seconds(llm, repeats=7):
    """Of the loss of 8 captions behind 32 soft prompts, and of its gradient there: the median."""
    torch.manual_seed(0)
    prefix = (0.1 * torch.randn(8, 32, llm.dim)).requires_grad_()
    ids = torch.randint(3, llm.vocab_size, (8, 16))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        llm.loss(prefix, ids)[0].backward()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(folder, dtype, weights, read, results):
    """Puts on a queue what there is to say of one kind of weights."""
    torch.set_grad_enabled(False)
    first_id, texts, captions = read
    with Peak() as peak:
        began = time.perf_counter()
        llm = language_models.load_llm(folder, dtype, weights=weights)
        seconds = time.perf_counter() - began
    prefix = llm.embed(torch.tensor([[first_id]] * 8))
    found = {
        "bytes": sum(parameter.nbytes for parameter in llm.parameters()),
        "loading": seconds,
        "peak": peak.bytes,
        "logits": llm(prefix, torch.tensor(texts[:8])).float().numpy(),
        "texts": loss(llm, first_id, texts),
        "captions": loss(llm, first_id, captions),
    }
    torch.set_grad_enabled(True)
    results.put(found | {"step": step_seconds(llm)})


def in_a_process(*arguments):
    """What `measure` finds in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(*arguments, results))
    process.start()
    found = results.get()
    process.join()
    return found


def describe(weights, found, full):
    """A row of the table."""
    ours, theirs = torch.tensor(found["logits"]), torch.tensor(full["logits"])
    difference = (ours - theirs).norm() / theirs.norm()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    change = {name: found[name] / full[name] - 1 for name in ("texts", "captions")}
    return (f"{weights:8}{found['bytes'] / 1e6:8.0f} MB{found['loading']:7.1f} s{found['peak'] / 1e6:8.0f} MB"
            f"{difference:10.2%}{same:8.1%}{found['texts']:9.4f} {change['texts']:+.2%}"
            f"{found['captions']:9.4f} {change['captions']:+.2%}{found['step'] * 1e3:8.0f} ms")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a language model in Hugging Face layout")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--texts", type=int, default=200, help="and captions (default: %(default)s)")
    args = parser.parse_args(argv)
    print("weights   in memory  loading     peak    logits  same top  texts, change  captions, change   step")
    read = texts_and_captions(args.folder, args.texts)
    full = None
    for weights in (None, "int8", "nf4"):
        found = in_a_process(args.folder, DTYPES[args.precision], weights, read)
        full = full or found
        print(describe(weights or args.precision, found, full), flush=True)


if __name__ == "__main__":
    main()
