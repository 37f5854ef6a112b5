"""Other ways to initialise the projector than the word converter of vpgtrans.py: makes a folder that train.py takes as --src.

    python miniature/initialise.py --src SOURCE --tgt LLM --data PAIRS.jsonl --how cosine --out DIR
    python train.py --src DIR --tgt LLM ...        # source and target are the same LLM now: the projector stays as it is

unweighted      least squares over all shared tokens, each counted once
ridge           as in vpgtrans.py, with a ridge of a tenth of the variance instead of a thousandth
cosine          the original's: gradient descent on the cosine distance over batches of captions, weights by use
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import pairs
import hub
import llm as language_models
import transfer
import qformer
import runs
import vpgtrans


def fit_cosine(src, tgt, counts, steps=720, tokens=32768, lr=5.0):
    """The original's converter: SGD at rate 5 on 1 - cosine, on batches of 4,096 captions; as many steps as its five epochs of 590,000.

    src (N,Ds), tgt (N,Dt), counts (N,) uses in the captions -> nn.Linear(Ds, Dt). A batch holds `tokens` tokens, drawn by use."""
    converter = nn.Linear(src.shape[1], tgt.shape[1])
    optimizer = torch.optim.SGD(converter.parameters(), lr=lr)
    for _ in range(steps):
        drawn = torch.bincount(torch.multinomial(counts, tokens, replacement=True), minlength=len(counts)).float()
        loss = (drawn * (1 - F.cosine_similarity(converter(src), tgt, dim=1))).sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return converter.requires_grad_(False)


FITS = {"unweighted": lambda src, tgt, counts: vpgtrans.fit_word_converter(src, tgt),
        "ridge": lambda src, tgt, counts: vpgtrans.fit_word_converter(src, tgt, counts + 0.01 * counts.mean(), ridge=0.1),
        "cosine": fit_cosine}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True)
    parser.add_argument("--tgt", required=True)
    parser.add_argument("--data", required=True, help="pairs whose captions say how often a token is used")
    parser.add_argument("--how", choices=FITS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    src, tgt = hub.resolve(args.src, "source"), hub.resolve(args.tgt, "target")
    projector = qformer.load_projector(src.folder)
    words = transfer.read_shared_words(projector, src, tgt)
    src_words, tgt_words = words.src_words[words.src_ids], words.tgt_words[words.tgt_ids]
    captions = pairs.read_pairs(args.data).captions
    counts = data.count_tokens(words.src_tok, captions, len(words.src_words))[words.src_ids].float()
    began = time.time()
    projector = vpgtrans.merge(projector, FITS[args.how](src_words, tgt_words, counts))
    print(f"{args.how}: {time.time() - began:.1f} s")
    model = vpgtrans.VisualLLM(qformer.load_vpg(src.folder, vit_folder=src.vit), projector, language_models.load_llm(tgt.llm))
    args.out.mkdir(parents=True, exist_ok=True)
    options = SimpleNamespace(src=args.src, tgt=args.tgt, tgt_tokenizer=None, cache=None)  # those of train.py that a run's config.json names
    (args.out / "config.json").write_text(json.dumps(transfer.run_config(options, src, model), indent=2))
    runs.save_model(args.out, model.saved())


if __name__ == "__main__":
    main()
