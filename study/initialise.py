"""Other ways to initialise the projector than the word converter of vpgtrans.py.

    python -m study.initialise --src SOURCE --tgt LLM --data PAIRS.jsonl --how cosine --out DIR
    python train.py --src DIR --tgt LLM ...      # source and target are the same LLM now: the projector stays

unweighted      least squares over all shared tokens, each counted once, with a ridge of a thousandth
ridge           weighted as in vpgtrans.py, with a ridge of a tenth of the variance
cosine          the original's: gradient descent on the cosine distance, over batches of captions
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import data
import hub
import llm as language_models
import pairs
import qformer
import runs
import transfer
import vpgtrans


def fit_unweighted(src, tgt, counts):
    return vpgtrans.fit_word_converter(src, tgt, ridge=1e-3)


def fit_ridge(src, tgt, counts):
    return vpgtrans.fit_word_converter(src, tgt, counts + 0.01 * counts.mean(), ridge=0.1)


def fit_cosine(src, tgt, counts, steps=720, tokens=32768, lr=5.0):
    """The original's converter: SGD at rate 5 on 1 - cosine, over batches of 4,096 captions.

    720 steps are its five epochs of 590,000 captions. A batch holds `tokens` tokens, drawn by use.
    src (N,Ds), tgt (N,Dt), counts (N,) uses in the captions -> nn.Linear(Ds, Dt)"""
    converter = nn.Linear(src.shape[1], tgt.shape[1])
    optimizer = torch.optim.SGD(converter.parameters(), lr=lr)
    for _ in range(steps):
        drawn = torch.multinomial(counts, tokens, replacement=True)
        weights = torch.bincount(drawn, minlength=len(counts)).float()
        distances = 1 - F.cosine_similarity(converter(src), tgt, dim=1)  # (N,)
        loss = (weights * distances).sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return converter.requires_grad_(False)


FITS = {"unweighted": fit_unweighted, "ridge": fit_ridge, "cosine": fit_cosine}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True)
    parser.add_argument("--tgt", required=True)
    parser.add_argument("--data", required=True, help="pairs whose captions say how often a token is used")
    parser.add_argument("--how", choices=FITS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    src = hub.resolve(args.src, "source")
    tgt = hub.resolve(args.tgt, "target")
    projector = qformer.load_projector(src.folder)
    words = transfer.read_shared_words(projector, src, tgt)
    captions = pairs.read_pairs(args.data).captions
    counts = data.count_tokens(words.src_tok, captions, len(words.src_words))[words.src_ids].float()
    began = time.time()
    converter = FITS[args.how](words.src_words[words.src_ids], words.tgt_words[words.tgt_ids], counts)
    projector = vpgtrans.merge(projector, converter)
    print(f"{args.how}: {time.time() - began:.1f} s")

    vpg = qformer.load_vpg(src.folder, vit_folder=src.vit)
    model = vpgtrans.VisualLLM(vpg, projector, language_models.load_llm(tgt.llm))
    # The arguments of train.py that a run's config.json names
    options = SimpleNamespace(src=args.src, tgt=args.tgt, tgt_tokenizer=None, cache=None)
    args.out.mkdir(parents=True, exist_ok=True)
    config = transfer.run_config(options, src, model)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    runs.save_model(args.out, model.saved())


if __name__ == "__main__":
    main()
