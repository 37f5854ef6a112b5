"""Other ways to initialise the projector than the word converter of vpgtrans.py: makes a folder that train.py takes as --src.

    python miniature/initialise.py --src SOURCE --tgt LLM --data PAIRS.jsonl --how cosine --out DIR
    python train.py --src DIR --tgt LLM ...        # source and target are the same LLM now: the projector stays as it is

unweighted      least squares over all shared tokens, each counted once
ridge           as in vpgtrans.py, with a ridge of a tenth of the variance instead of a thousandth
cosine          the original's: gradient descent on the cosine distance over batches of captions, weights by use
captions        no converter of words: every soft prompt of the source is read as a mixture of the words of its image's caption, by cosine,
                and the projector is the least-squares map from queries to the same mixtures of the target's words
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
import hub
import llm as language_models
import prepare
import qformer
import runs
import vpgtrans


def fit_cosine(src, tgt, counts, epochs=5, tokens=32768, lr=5.0):
    """The original's converter: SGD at rate 5 on 1 - cosine, five epochs of batches of 4,096 captions.

    src (N,Ds), tgt (N,Dt), counts (N,) uses in the captions -> nn.Linear(Ds, Dt). A batch holds `tokens` tokens, drawn by use."""
    converter = nn.Linear(src.shape[1], tgt.shape[1])
    optimizer = torch.optim.SGD(converter.parameters(), lr=lr)
    for _ in range(max(1, round(epochs * float(counts.sum()) / tokens))):
        drawn = torch.bincount(torch.multinomial(counts, tokens, replacement=True), minlength=len(counts)).float()
        loss = (drawn * (1 - F.cosine_similarity(converter(src), tgt, dim=1))).sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return converter.requires_grad_(False)


FITS = {"unweighted": lambda src, tgt, counts: vpgtrans.fit_word_converter(src, tgt),
        "ridge": lambda src, tgt, counts: vpgtrans.fit_word_converter(src, tgt, counts + 0.01 * counts.mean(), ridge=0.1),
        "cosine": fit_cosine}


def fit_to_captions(vpg, projector, src_words, tgt_words, src_tok, pairs, shared, images=2000, sharpness=10.0):
    """The projector that best sends the VPG's queries to words of the target that the caption holds. -> nn.Linear(Dq, Dt)

    src_words (Vs,Ds), tgt_words (Vt,Dt), shared {source id: target id}. A soft prompt's weights over the words of its caption
    are a softmax of `sharpness` times the cosines of their source embeddings."""
    queries, goals = [], []
    for start in range(0, min(images, len(pairs)), 50):
        some = range(start, min(start + 50, images, len(pairs)))
        batch = data.normalise(torch.stack([data.read_image(pairs.file(i), vpg.image_size) for i in some]))
        with torch.no_grad():
            q = vpg(batch.to(next(vpg.parameters()).dtype)).float()
        for i, soft in zip(some, projector(q)):
            ids = [id for id in src_tok.encode(data.clean_caption(pairs.captions[i])) if id in shared]
            weights = (sharpness * F.cosine_similarity(soft[:, None], src_words[ids][None], dim=-1)).softmax(-1)  # (Q, words)
            goals.append(weights @ tgt_words[[shared[id] for id in ids]])
        queries.append(q.flatten(0, 1))
    queries, goals = torch.cat(queries), torch.cat(goals)
    return vpgtrans.fit_word_converter(queries, goals)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True)
    parser.add_argument("--tgt", required=True)
    parser.add_argument("--data", required=True, help="pairs whose captions say how often a token is used")
    parser.add_argument("--how", choices=[*FITS, "captions"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    src, tgt = hub.resolve(args.src, "source"), hub.resolve(args.tgt, "target")
    src_tok, tgt_tok = data.load_tokenizer(src.tokenizer), data.load_tokenizer(tgt.tokenizer)
    src_ids, tgt_ids = vpgtrans.shared_tokens(src_tok.vocab(), tgt_tok.vocab())
    counts = data.count_tokens(src_tok, data.read_pairs(args.data).captions, max(src_tok.vocab().values()) + 1)[src_ids].float()
    src_words, tgt_words = language_models.read_word_embeddings(src.llm)[src_ids], language_models.read_word_embeddings(tgt.llm)[tgt_ids]
    began = time.time()
    vpg, llm = qformer.load_vpg(src.folder, vit_folder=src.vit), language_models.load_llm(tgt.llm)
    projector = qformer.load_projector(src.folder)
    if args.how == "captions":
        every = [language_models.read_word_embeddings(place.llm) for place in (src, tgt)]
        projector = fit_to_captions(vpg, projector, *every, src_tok, data.read_pairs(args.data), dict(zip(src_ids.tolist(), tgt_ids.tolist())))
    else:
        converter = FITS[args.how](src_words, tgt_words, counts)
        cosine = (counts * F.cosine_similarity(converter(src_words), tgt_words, dim=1)).sum() / counts.sum()
        print(f"{len(src_ids)} shared tokens, cosine {cosine:.4f} by use")
        projector = vpgtrans.merge(projector, converter)
    print(f"{args.how}: {time.time() - began:.1f} s")
    model = vpgtrans.VisualLLM(vpg, projector, llm)
    args.out.mkdir(parents=True, exist_ok=True)
    config = prepare.run_config(SimpleNamespace(src=args.src, tgt=args.tgt, tgt_tokenizer=None, cache=None, how=args.how, seed=args.seed), src, tgt, model)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    runs.save_model(args.out, vpgtrans.blip2_names(model))


if __name__ == "__main__":
    main()
