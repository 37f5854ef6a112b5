"""On which cards a target fits, in bf16, int8 and nf4 (--llm-weights), and in bf16 on several that share it
(--shard): what train.py --dry-run computes, from shapes alone.

    python -m benchmarks.fits
    python -m benchmarks.fits opt-66b llama-70b --captions 64

The source is a BLIP-2 with EVA-g; the stage is fine-tuning. Prints a Markdown table of the gigabytes that
one sample at a time takes on a card, a tenth of it left free, and for each card the samples that fit.
"""

import argparse
import itertools
from types import SimpleNamespace

import torch
from torch import nn

import estimate
import llm as language_models
import qformer
import transfer
import vpgtrans
from benchmarks.peers import EVA, print_table, shape

TARGETS = {  # the shapes in their config.json
    "opt-13b": dict(model_type="opt", hidden_size=5120, ffn_dim=20480, num_hidden_layers=40,
                    num_attention_heads=40),
    "opt-30b": dict(model_type="opt", hidden_size=7168, ffn_dim=28672, num_hidden_layers=48,
                    num_attention_heads=56),
    "opt-66b": dict(model_type="opt", hidden_size=9216, ffn_dim=36864, num_hidden_layers=64,
                    num_attention_heads=72),
    "llama-70b": dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                      num_attention_heads=64, num_key_value_heads=8),
    "flan-t5-xxl": dict(model_type="t5", d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
                        feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
CARDS = ("l4", "a100-40gb", "a6000", "a100", "h200")
# weights, and how many cards share them
KINDS = ((None, 1), ("int8", 1), ("nf4", 1), (None, 2), (None, 4), (None, 8))


def shapes(target, weights):
    """The model of a transfer without weights, as it is fine-tuned."""
    with torch.device("meta"):
        vpg = qformer.VPG({"vision_config": EVA | dict(image_size=224, patch_size=14),
                           "qformer_config": shape(encoder_hidden_size=EVA["hidden_size"])})
        llm = language_models.ARCHITECTURES[TARGETS[target]["model_type"]](TARGETS[target])
        model = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm)
    model = transfer.with_llm_weights(model.to("meta", torch.bfloat16), weights)
    vpgtrans.enter_stage(model, vpgtrans.STAGES["fine-tune"])
    return model


def row(target, weights, shards, tokens):
    """Of the table."""
    model = shapes(target, weights)
    tok = SimpleNamespace(bos_id=2, eos_id=1, encoder_decoder=target.startswith("flan"))
    step = estimate.trace(model, transfer.example_batch(model, tok, tokens))
    spared, _ = estimate.spread(model.llm.layers, shards)
    llm = sum(parameter.nbytes for parameter in model.llm.parameters()) - spared
    together = dict(world=shards, shards=shards)
    need = sum(estimate.memory(model, step, micro_batch=1, **together).values()) / 0.9
    cells = [target, weights or "bf16", str(shards), f"{llm / 1e9:.1f}", f"{need / 1e9:.1f}"]
    for card in CARDS:
        size, _ = estimate.CARDS[card]
        try:
            cells.append(str(estimate.largest_micro_batch(model, step, size * 1e9, **together)))
        except ValueError:
            cells.append("")
    return cells


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[*TARGETS], help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--captions", type=int, default=32, metavar="TOKENS",
                        help="the longest (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.targets) - TARGETS.keys():
        parser.error(f"{min(unknown)}: the targets are {', '.join(TARGETS)}")
    sizes = [f"{card}, {estimate.CARDS[card][0]} GB" for card in CARDS]
    head = ["target", "weights", "cards", "LLM, GB", "needs, GB", *sizes]
    rows = [row(target, *kind, args.captions) for target, kind in itertools.product(args.targets, KINDS)]
    print_table(head, rows)


if __name__ == "__main__":
    main()
