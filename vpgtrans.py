"""VPGTrans: move the visual prompt generator (VPG) of a vision-language model to another language model.
Zhang et al., "VPGTrans: Transfer Visual Prompt Generator across LLMs", NeurIPS 2023, arXiv:2305.01278.

The model   image -> ViT -> Q-Former -> projector -> soft prompts -> LLM -> caption      (ViT and LLM stay frozen)

Training the Q-Former for a new LLM from scratch takes hundreds of GPU hours: it has to learn to see, and to speak the
LLM's language. A VPG that was trained with another LLM can see already. What is left is the language, and that is mostly
the projector, a single linear layer. VPGTrans therefore goes in two stages:

    1. projector warm-up    inherit the source's VPG                                     load_vpg, in qformer.py
                            start from its projector, translated by a *word converter*   shared_tokens, fit_word_converter, merge
                            (or from its soft prompts, read as words: not of the paper)  fit_to_captions
                            train the projector alone, one epoch at 5 x the usual rate   STAGES["warm-up"]
    2. fine-tuning          train Q-Former and projector together                        STAGES["fine-tune"]

Without stage 1, gradients that come through a wrong projector damage the inherited Q-Former.

B batch, P prompt length, T target length, Q query tokens, Dq Q-Former width, D LLM width (Ds source, Dt target), V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, HOLE = -1, -100  # in prompts: the place of a soft prompt, and a place to be passed over


# ------------------------------------------------------------------------------------ stage 1: initialising the projector


def shared_tokens(src_vocab, tgt_vocab):
    """The tokens that two tokenizers spell alike, the "overlapped tokens" of the paper's section 4.

    {bytes: id}, {bytes: id} -> ids (N,) in the source and ids (N,) in the target, in the order of the source's ids."""
    shared = sorted(src_vocab.keys() & tgt_vocab.keys(), key=src_vocab.get)
    return torch.tensor([src_vocab[t] for t in shared]), torch.tensor([tgt_vocab[t] for t in shared])


def fit_word_converter(src, tgt, weight=None, ridge=1e-3, block=8192):
    """The linear map that best turns source word embeddings into target word embeddings of the same tokens.

    src (N,Ds), tgt (N,Dt) float32; weight (N,) >= 0, say how often captions use each token -> nn.Linear(Ds, Dt).

    The paper fits it by gradient descent on the cosine distance and finds the Euclidean one as good; that one has a closed
    form, the weighted ridge regression with bias  W = C A^-1, b = mean(tgt) - W mean(src),  where A and C are the
    (co)variances of the centred embeddings. `ridge` is relative to the mean of A's diagonal. Products of `block` rows are
    taken in float32 and summed in float64: 50k tokens, 2560 -> 4096, take ten seconds and half a gigabyte on 2 CPU cores."""
    if src.ndim != 2 or tgt.ndim != 2 or len(src) != len(tgt) or len(src) == 0:
        raise ValueError(f"the word converter needs as many source as target embeddings, not {tuple(src.shape)} and {tuple(tgt.shape)}")
    weight = torch.ones(len(src)) if weight is None else weight.float()
    if weight.shape != (len(src),) or weight.min() < 0 or weight.sum() == 0:
        raise ValueError("the word converter needs one weight >= 0 for each token, and not all of them 0")
    weight = weight / weight.sum()
    (_, Ds), (_, Dt) = src.shape, tgt.shape
    blocks = list(zip(weight.split(block), src.split(block), tgt.split(block)))
    src_mean, tgt_mean = (sum((b[0] @ b[i]).double() for b in blocks) for i in (1, 2))
    A, C = torch.zeros(Ds, Ds, dtype=torch.float64), torch.zeros(Dt, Ds, dtype=torch.float64)
    for w, s, t in blocks:
        s, t = (s - src_mean.float()).mul_(w.sqrt()[:, None]), (t - tgt_mean.float()).mul_(w.sqrt()[:, None])
        C += t.T @ s
        for i in range(0, Ds, 256):  # A is symmetric: the panels on and below its diagonal will do
            A[i : i + 256, : i + 256] += s[:, i : i + 256].T @ s[:, : i + 256]
    A.diagonal().add_(ridge * A.diagonal().mean())
    converter = nn.Linear(Ds, Dt)
    W = torch.cholesky_solve(C.T, torch.linalg.cholesky(A)).T  # reads the lower triangle of A
    with torch.no_grad():
        converter.weight.copy_(W)
        converter.bias.copy_(tgt_mean - W @ src_mean)
    return converter.requires_grad_(False)


def merge(projector, converter):
    """Projector, then converter, as one linear layer: W = Wc Ws, b = Wc bs + bc.

    nn.Linear(Dq, Ds), nn.Linear(Ds, Dt) -> nn.Linear(Dq, Dt). (Equation 2 of the paper prints the reverse order.)"""
    Ws, bs, Wc, bc = (x.detach().double() for x in (projector.weight, projector.bias, converter.weight, converter.bias))
    merged = nn.Linear(Ws.shape[1], Wc.shape[0])
    with torch.no_grad():
        merged.weight.copy_(Wc @ Ws)
        merged.bias.copy_(Wc @ bs + bc)
    return merged


@torch.no_grad()
def fit_to_captions(queries, projector, src_captions, tgt_captions, rounds=2, sharpness=20.0):
    """Instead of the word converter, and not of the paper: the projector that says in the target's words what the source's soft
    prompts mean. -> nn.Linear(Dq, Dt)

    Soft prompts are many times longer than word embeddings, so a converter that was fitted on words says little about them; but their
    direction, once their mean is subtracted, points to the words that they stand for. Each is read as a mixture of its caption's words,
    a softmax over `sharpness` times the cosine (20: a word whose cosine is 0.1 larger counts seven times as much), and the new projector
    is the least-squares map from queries to the same mixtures of the target's words. What it makes are words, nearly; so a second round
    reads these, and corrects what the first one misread.

    queries (N,Q,Dq) of N images, the source's projector nn.Linear(Dq, Ds), and for each image the embeddings (W,Ds) and (W,Dt) of
    W >= 1 words of its caption in both LLMs."""
    if not len(queries) == len(src_captions) == len(tgt_captions) or not all(map(len, src_captions)):
        raise ValueError(f"queries of {len(queries)} images, {len(src_captions)} and {len(tgt_captions)} captions: each image needs one in both "
                         "LLMs, of one word at least")
    read_as = src_captions
    for _ in range(rounds):
        mean, goals = projector(queries.mean((0, 1))), []
        for image, words, tgt_words in zip(queries, read_as, tgt_captions):
            cosine = F.normalize(projector(image) - mean, dim=-1) @ F.normalize(words, dim=-1).T  # (Q, W)
            goals.append((sharpness * cosine).softmax(-1) @ tgt_words)
        projector, read_as = fit_word_converter(queries.flatten(0, 1), torch.cat(goals)), tgt_captions
    return projector.requires_grad_()


# -------------------------------------------------------------------------------------------------------------- the model


class VisualLLM(nn.Module):
    """VPG, projector and LLM as one model; its forward is the caption loss, so that DDP wraps one thing.

    A prompt is ids (B,P) in which IMAGE (-1) stands for a soft prompt and HOLE (-100) is passed over:
    [IMAGE x Q, BOS] for a caption. Prompts are checked here: keep them on the CPU, and no GPU has to wait for that."""

    def __init__(self, vpg, projector, llm):
        super().__init__()
        if (projector.in_features, projector.out_features) != (vpg.dim, llm.dim):
            raise ValueError(f"the projector is {projector.in_features} -> {projector.out_features}; between this Q-Former and "
                             f"this LLM it must be {vpg.dim} -> {llm.dim}")
        self.vpg, self.projector, self.llm = vpg, projector, llm

    def prefix(self, prompt_ids, images=None, features=None, queries=None):
        """What the LLM reads before its answer: (B,P) and the images in one of their forms -> (B,P,D), mask or None.

        images (B,3,H,W), features (B,N,Dv) of the ViT, or queries (B,Q,Dq) of the Q-Former."""
        if queries is None:
            queries = self.vpg.query(self.vpg.features(images) if features is None else features)
        soft_prompts = self.projector(queries)  # (B, Q, D)
        places, holes = prompt_ids == IMAGE, prompt_ids == HOLE
        if (places.sum(1) != soft_prompts.shape[1]).any():
            raise ValueError(f"each prompt needs {soft_prompts.shape[1]} IMAGE places, one for each soft prompt")
        mask = ~holes if holes.any() else None  # None takes the LLM's fast path
        device = soft_prompts.device
        words = self.llm.embed(prompt_ids.clamp(min=0).to(device, non_blocking=True))
        columns = places.nonzero()[:, 1].view(len(places), -1, 1).to(device, non_blocking=True)  # (B, Q, 1)
        prefix = words.scatter(1, columns.expand_as(soft_prompts), soft_prompts.to(words.dtype))  # masked_scatter's gradient waits for the GPU
        return prefix, None if mask is None else mask.to(device, non_blocking=True)

    def forward(self, prompt_ids, target_ids, images=None, features=None, queries=None):
        """(B,P), (B,T) and the images in one of their forms -> (sum of the tokens' cross-entropies, number of tokens); with
        several captions an image, (B,K,T), see the LLM's loss."""
        prefix, mask = self.prefix(prompt_ids, images, features, queries)
        return self.llm.loss(prefix, target_ids, mask)

    def generate(self, prompt_ids, images=None, features=None, queries=None, **options):
        """The LLM's answers as B lists of ids; `options` are those of the LLM's generate (num_beams, stop, ...)."""
        with torch.inference_mode():
            prefix, mask = self.prefix(prompt_ids, images, features, queries)
        return self.llm.generate(prefix, mask, **options)


# -------------------------------------------------------------------------------------------------------------- the stages

# The parts of the model, by the beginning of their parameters' names. The LayerNorm behind the ViT trains; the ViT does not.
PARTS = {"ViT": "vpg.vision_model", "LayerNorm after the ViT": "vpg.vision_model.post_layernorm", "query tokens": "vpg.query_tokens",
         "Q-Former": "vpg.qformer", "projector": "projector", "LLM": "llm"}
JOINTLY = ("LayerNorm after the ViT", "query tokens", "Q-Former", "projector")


@dataclass(frozen=True)
class Stage:
    """What trains, how fast, how long. The numbers are the paper's; one of `epochs` and `samples` says how long."""

    trains: tuple  # names of PARTS
    lr: float  # peak learning rate
    final_lr: float  # at the end of a cosine; equal to lr: a constant rate
    batch_size: int  # samples an optimizer step, over all GPUs
    epochs: int = 0
    samples: int = 0
    rise: int = 0  # optimizer steps in which the rate rises linearly from 1e-6
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.05  # on matrices; never on biases and norms


STAGES = {
    "warm-up": Stage(trains=("projector",), lr=5e-4, final_lr=5e-4, batch_size=1728, epochs=1),
    "fine-tune": Stage(trains=JOINTLY, lr=1e-4, final_lr=5e-5, batch_size=1728, samples=12_960_000),
    "from-scratch": Stage(trains=JOINTLY, lr=1e-4, final_lr=1e-5, batch_size=1728, epochs=10, rise=2000),  # the baseline, TFS
}


def part_of(name):
    """The part of the model that a parameter of VisualLLM belongs to: the longest beginning in PARTS that fits."""
    return max((part for part, start in PARTS.items() if name.startswith(start)), key=lambda part: len(PARTS[part]))


def enter_stage(model, stage):
    """Makes exactly `stage.trains` trainable and puts it into train mode (dropout), all else into eval mode.

    -> the table of what now holds: rows of (part, parameters, trainable parameters, mode)."""
    model.eval()
    for name, module in model.named_modules():
        if name in [PARTS[part] for part in stage.trains]:
            module.train()
    table = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in stage.trains)
        table[part][0] += parameter.numel()
        table[part][1] += parameter.numel() * parameter.requires_grad
    return [(part, total, trainable, "train" if part in stage.trains else "eval") for part, (total, trainable) in table.items()]


def parameter_groups(model, stage):
    """What trains, for AdamW: weight decay on matrices, none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]


def learning_rate(stage, step, steps):
    """The rate of optimizer step `step` of `steps`: a linear rise from 1e-6, then a cosine from lr to final_lr."""
    rise = min(stage.rise, steps // 10)
    if step < rise:
        return 1e-6 + (stage.lr - 1e-6) * step / rise
    progress = (step - rise) / max(1, steps - 1 - rise)
    return stage.final_lr + (stage.lr - stage.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def blip2_names(model):
    """{name in a BLIP-2 checkpoint: parameter} of what VPGTrans trains, whichever the stage: what a run has to save."""
    rename = lambda name: name.removeprefix("vpg.").replace("projector.", "language_projection.")
    return {rename(name): p for name, p in model.named_parameters() if part_of(name) in JOINTLY}
