"""Speed of generation and of loading, side by side with transformers.

    python -m benchmarks.generation                        # the language model of a small BLIP-2
    python -m benchmarks.generation --size opt-6.7b        # of the paper's target, on one GPU
    python -m benchmarks.generation --llm flan-t5-base     # any of the shapes that --help lists
    python -m benchmarks.generation --loading              # from disk to the first logits

Prints one Markdown table: 30 tokens behind 33 embeddings, as behind 32 soft prompts and BOS, greedy and
with 5 beams. Nothing ends early, and nothing is compiled. A ratio above 1: ours is faster than the
better of transformers' two kinds of attention. "equal ids" is the share of generated ids on which all
agree: all of them with --precision fp32, or nothing is timed; in bf16 rounding decides near ties.

With --loading: a random checkpoint of 2 GB in bf16, in the page cache, read as it is and to float32,
each time in a fresh process. "peak memory" is what the process has grown by.

Figures mean something on an otherwise idle machine only.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import llm as language_models
from benchmarks import peers

NEW_TOKENS = 30
PREFIX = 33

# ---------------------------------------------------------------------------------------- generation


def time_generation(llms, B, beams, repeats, device, exact):
    """{name: language model} -> {name: seconds of each batch}, share of ids that are equal.

    ValueError if `exact` and some are not.
    """
    llm = llms["ours"]
    prefix = torch.randn(B, PREFIX, llm.dim, device=device).to(llm.lm_head.weight.dtype)
    mask = torch.ones(B, PREFIX, device=device).long()
    same = dict(max_new_tokens=NEW_TOKENS, num_beams=beams)
    functions = {"ours": partial(llm.generate, prefix, stop=(), **same)}
    for name, peer in llms.items():
        if name != "ours":
            functions[name] = partial(
                peer.generate, inputs_embeds=prefix, attention_mask=mask, use_cache=True,
                do_sample=False, pad_token_id=1, **same)
    ids = []
    for function in functions.values():  # also warms up
        generated = torch.as_tensor(function()).cpu()
        ids.append(generated[:, -NEW_TOKENS:])  # T5's start with its decoder's first id
    equal = min((ids[0] == theirs).float().mean().item() for theirs in ids)
    if exact and equal < 1:
        raise ValueError(f"with {beams} beam(s) only {equal:.1%} of the ids that ours and "
                         "transformers generate are equal")
    return peers.take_turns(functions, repeats, device), equal


def build(args):
    """{name: language model}, alone or out of a BLIP-2.

    transformers' weights are left unfrozen here: torch would multiply a frozen head the slow way,
    copying it for each row.
    """
    if args.llm:
        return peers.build_llms(args.llm, args.dtype, args.device)
    models = peers.build_models(args.size, args.dtype, args.device)
    llms = {}
    for name, model in models.items():
        model.eval()
        llms[name] = model.llm if name == "ours" else model.language_model
    return llms


def compare_generation(args):
    llms = build(args)
    B = args.batch_size
    exact = args.precision == "fp32"
    rows = []
    for beams in (1, 5):
        seconds, equal = time_generation(llms, B, beams, args.repeats, args.device, exact)
        what = "greedy" if beams == 1 else f"{beams} beams"
        more = {name: [f"{equal:.1%}"] for name in seconds}
        rows += peers.rows_beside(what, seconds, B, more)
    what = f"{NEW_TOKENS} tokens, batch {B}"
    columns = ["implementation", "ms", "min - max", "captions/s", "ratio", "equal ids"]
    peers.print_table([what, *columns], rows)


# ------------------------------------------------------------------------------------------- loading


def write_checkpoint(folder, name):
    """Random weights of a LLaMA in bf16, in Hugging Face layout. -> bytes"""
    with torch.device("meta"):
        llm = language_models.LLaMA(peers.LLMS[name])
    tensors = peers.random_tensors(dict(llm.named_parameters()), torch.bfloat16, "cpu")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    file = Path(folder) / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(peers.LLMS[name]))
    return file.stat().st_size


def load_once(who, folder, dtype):
    """(s to load, s to the first logits, bytes of peak memory), in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.load_once", who, folder, dtype]
    run = subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True, check=True)
    return [float(figure) for figure in run.stdout.split()[-3:]]


def compare_loading(args, argv, name="2 GB"):
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(folder, name)
        what = f"{size / 1e9:.2f} GB in bf16, in the page cache, medians of {args.repeats}"
        peers.print_heading("benchmarks.generation", argv, what, torch.device("cpu"))
        rows = []
        for dtype in ("bfloat16", "float32"):
            runs = {"ours": [], "transformers": []}
            for who in list(runs) * args.repeats:
                runs[who].append(load_once(who, folder, dtype))
            loaded = size * (2 if dtype == "float32" else 1)
            for who, figures in runs.items():
                load, first, peak = (statistics.median(column) for column in zip(*figures))
                rows.append([dtype, who, f"{load:.2f}", f"{first:.2f}", f"{peak / loaded:.2f}"])
    columns = ["s to load", "s to the first logits", "peak memory / size as loaded"]
    peers.print_table(["to", "implementation", *columns], rows)


# ------------------------------------------------------------------------------------------- command


def parse_arguments(argv):
    parser = peers.new_parser("benchmarks.generation", __doc__)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--llm", choices=peers.LLMS,
                         help="a language model of these shapes, in the place of a BLIP-2's")
    instead.add_argument("--loading", action="store_true", help="instead: the loading of a checkpoint")
    peers.add_model_arguments(parser)
    parser.add_argument("--batch-size", type=peers.at_least_one, default=8,
                        help="captions generated at a time (default: %(default)s)")
    return peers.parse(parser, argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.loading:
        return compare_loading(args, argv)
    what = (f"{args.llm or args.size}, {args.precision}, batch {args.batch_size}, "
            f"medians of {args.repeats}")
    peers.print_heading("benchmarks.generation", argv, what, args.device)
    compare_generation(args)


if __name__ == "__main__":
    main()
