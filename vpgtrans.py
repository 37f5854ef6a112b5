# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports
# nothing of ours.
"""VPGTrans: move the visual prompt generator (VPG) of a vision-language model to another language
model. Zhang et al., "VPGTrans: Transfer Visual Prompt Generator across LLMs", NeurIPS 2023,
arXiv:2305.01278.

    image -> ViT -> Q-Former -> projector -> soft prompts -> LLM -> caption     (ViT and LLM frozen)

Training the Q-Former for a new LLM from scratch takes hundreds of GPU hours: it has to learn to
see, and to speak the LLM's language. A VPG that was trained with another LLM can see already. What
is left is the language, and that is mostly the projector, a single linear layer. VPGTrans therefore
goes in two stages:

    1. projector warm-up    inherit the source's VPG                     load_vpg, in qformer.py
                            translate its projector by a word converter  fit_word_converter, merge
                            train the projector alone, one epoch at 5 x
                            the usual rate                               STAGES["warm-up"]
    2. fine-tuning          train Q-Former and projector together        STAGES["fine-tune"]

Stage 1 is there, the paper says, because gradients that come through a wrong projector damage the
inherited Q-Former. (In miniature no lasting damage was seen: docs/miniature.md.)

B batch, P prompt length, T target length, K captions of an image, W words of one, Q query tokens,
Dq Q-Former width, N image tokens, Dv ViT width, D LLM width (Ds source, Dt target); where something
is fitted, N tokens or images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

IMAGE = -1  # in prompts: the place of a soft prompt
PADDING = -100  # in prompts: a place that is masked


# ----------------------------------------------------- stage 1: the projector in the target's words


def shared_tokens(src_vocab, tgt_vocab):
    """The tokens that two tokenizers spell alike, the "overlapped tokens" of the paper's section 4.

    {bytes: id}, {bytes: id} -> ids (N,) in the source and ids (N,) in the target, in the order of
    the source's ids."""
    shared = sorted(src_vocab.keys() & tgt_vocab.keys(), key=src_vocab.get)
    src_ids = torch.tensor([src_vocab[token] for token in shared])
    tgt_ids = torch.tensor([tgt_vocab[token] for token in shared])
    return src_ids, tgt_ids


def token_weights(counts):
    """How often captions use each of the shared tokens, (N,) -> the weights (N,) that the word
    converter gives them.

    Tokens that these captions happen not to use weigh a hundredth of the average."""
    counts = counts.float()
    return counts + 0.01 * counts.mean()


RIDGE = 10.0  # relative: see fit_word_converter
ROWS = 8192  # that are multiplied at a time


def fit_word_converter(src, tgt, weight=None, ridge=RIDGE):
    """The linear map that best turns source word embeddings into target word embeddings of the same
    tokens.

    src (N,Ds), tgt (N,Dt) float32, weight (N,) >= 0, such as `token_weights` -> nn.Linear(Ds, Dt),
    frozen. ValueError if the shapes do not fit.

    The paper fits it by gradient descent on the cosine distance and finds the Euclidean distance as
    good. For that one there is a closed form, weighted ridge regression with a bias:

        W = C A^-1        b = mean(tgt) - W mean(src)

    A is the covariance of the source embeddings, C that of target and source. `ridge` is relative
    to the mean of A's diagonal: at 10 the map keeps what many words agree on, and leaves out
    directions that few words have, along which soft prompts, whose norm is many times that of
    words, would be thrown far from all words. Blocks of rows are multiplied in float32 and summed
    in float64: 50k tokens, 2560 -> 4096, take ten seconds and half a gigabyte on 2 CPU cores."""
    if src.ndim != 2 or tgt.ndim != 2 or len(src) != len(tgt) or len(src) == 0:
        raise ValueError(f"the word converter needs as many source as target embeddings, "
                         f"not {tuple(src.shape)} and {tuple(tgt.shape)}")
    weight = torch.ones(len(src)) if weight is None else weight.float()
    if weight.shape != (len(src),) or weight.min() < 0 or weight.sum() == 0:
        raise ValueError("the word converter needs one weight >= 0 for each token, not all of them 0")
    weight = weight / weight.sum()
    (_, Ds), (_, Dt) = src.shape, tgt.shape
    blocks = list(zip(weight.split(ROWS), src.split(ROWS), tgt.split(ROWS)))
    src_mean = sum((w @ s).double() for w, s, _ in blocks)
    tgt_mean = sum((w @ t).double() for w, _, t in blocks)
    A = torch.zeros(Ds, Ds, dtype=torch.float64)
    C = torch.zeros(Dt, Ds, dtype=torch.float64)
    for w, s, t in blocks:
        root = w.sqrt()[:, None]
        s = (s - src_mean.float()).mul_(root)
        t = (t - tgt_mean.float()).mul_(root)
        C += t.T @ s
        # A is symmetric, and cholesky reads its lower triangle alone: panels up to the diagonal
        # will do
        for i in range(0, Ds, 256):
            A[i : i + 256, : i + 256] += s[:, i : i + 256].T @ s[:, : i + 256]
    A.diagonal().add_(ridge * A.diagonal().mean())
    W = torch.cholesky_solve(C.T, torch.linalg.cholesky(A)).T
    converter = nn.Linear(Ds, Dt)
    with torch.no_grad():
        converter.weight.copy_(W)
        converter.bias.copy_(tgt_mean - W @ src_mean)
    return converter.requires_grad_(False)


def merge(projector, converter):
    """Projector, then converter, as one linear layer:  W = Wc Ws,  b = Wc bs + bc.

    nn.Linear(Dq, Ds), nn.Linear(Ds, Dt) -> nn.Linear(Dq, Dt). (Equation 2 of the paper prints the
    reverse order.)"""
    Ws, bs = projector.weight.detach().double(), projector.bias.detach().double()
    Wc, bc = converter.weight.detach().double(), converter.bias.detach().double()
    merged = nn.Linear(Ws.shape[1], Wc.shape[0])
    with torch.no_grad():
        merged.weight.copy_(Wc @ Ws)
        merged.bias.copy_(Wc @ bs + bc)
    return merged


# ---------------------- another start, not of the paper: what soft prompts mean, in captions' words


@torch.no_grad()
def fit_to_captions(queries, projector, src_captions, tgt_captions, rounds=2, sharpness=20.0):
    """The projector that says in the target's words what the source's soft prompts mean. ->
    nn.Linear(Dq, Dt)

    queries (N,Q,Dq) of N images, the source's projector nn.Linear(Dq, Ds), and of each image the
    word embeddings (W,Ds) and (W,Dt) of W >= 1 words of its caption in both LLMs. ValueError if
    there are not as many of each.

    The norm of soft prompts is many times that of word embeddings, so a converter that was fitted on
    words says little about them. Their direction says more: once their mean is subtracted, it points to
    the words that they stand for. Each soft prompt is read as a mixture of its caption's words, a
    softmax over `sharpness` times the cosine (at 20, a word whose cosine is 0.1 larger counts seven
    times as much). The new projector is the least-squares map from queries to the same mixtures of
    the target's words. A second round reads what the first projector makes, and corrects its
    mistakes."""
    as_many = len(queries) == len(src_captions) == len(tgt_captions)
    if not as_many or not all(map(len, src_captions)):
        raise ValueError(f"queries of {len(queries)} images, {len(src_captions)} source captions and "
                         f"{len(tgt_captions)} target captions: each image needs one of each, of one "
                         "word at least")
    read_as = src_captions
    for _ in range(rounds):
        mean = projector(queries.mean((0, 1)))
        goals = []
        for own, words, tgt_words in zip(queries, read_as, tgt_captions):  # (Q, Dq), (W, Ds or Dt), (W, Dt)
            directions = F.normalize(projector(own) - mean, dim=-1)
            cosine = directions @ F.normalize(words, dim=-1).T  # (Q, W)
            goals.append((sharpness * cosine).softmax(-1) @ tgt_words)  # (Q, Dt)
        # the same regression, from queries; a small ridge will do, since it is used on queries, too
        projector = fit_word_converter(queries.flatten(0, 1), torch.cat(goals), ridge=1e-3)
        read_as = tgt_captions  # from now on the soft prompts are the target's
    return projector.requires_grad_()


# ---------------------------------------------------------------------------------------- the model

# The parts of the model, by the beginning of their parameters' names.
# The LayerNorm behind the ViT trains; the ViT does not.
PARTS = {
    "ViT": "vpg.vision_model",
    "LayerNorm after the ViT": "vpg.vision_model.post_layernorm",
    "query tokens": "vpg.query_tokens",
    "Q-Former": "vpg.qformer",
    "projector": "projector",
    "LLM": "llm",
}
JOINTLY = ("LayerNorm after the ViT", "query tokens", "Q-Former", "projector")


class VisualLLM(nn.Module):
    """VPG, projector and LLM as one model. Its forward is the caption loss, so that DDP wraps one
    thing.

    A prompt is ids (B,P) in which IMAGE (-1) stands for a soft prompt and PADDING (-100) is masked:
    [IMAGE x Q, BOS] for a caption. Images come in one of three forms: images (B,3,H,W) uint8,
    features (B,N,Dv) of the ViT, or queries (B,Q,Dq) of the Q-Former. Prompts are checked here;
    keep them on the CPU, so that no GPU waits for that."""

    parts = PARTS

    def __init__(self, vpg, projector, llm):
        super().__init__()
        if (projector.in_features, projector.out_features) != (vpg.dim, llm.dim):
            raise ValueError(f"the projector is {projector.in_features} -> {projector.out_features}; "
                             f"between this Q-Former and this LLM it must be {vpg.dim} -> {llm.dim}")
        self.vpg = vpg
        self.projector = projector
        self.llm = llm

    @property
    def image_size(self):
        return self.vpg.image_size

    @property
    def num_query_tokens(self):
        """Q, the places that a prompt keeps for an image."""
        return self.vpg.num_query_tokens

    @property
    def layers(self):
        """The blocks that repeat, to be compiled."""
        return [*self.vpg.layers, *self.llm.layers]

    @property
    def frozen_layers(self):
        """Those that never train, which may be sharded."""
        return [*self.vpg.frozen_layers, *self.llm.layers]

    def saved(self):
        """{name in a BLIP-2 checkpoint: parameter} of what VPGTrans trains in any stage: what a run
        has to save."""
        saved = {}
        for name, parameter in self.named_parameters():
            if part_of(PARTS, name) in JOINTLY:
                name = name.removeprefix("vpg.").replace("projector.", "language_projection.")
                saved[name] = parameter
        return saved

    def see(self, images):
        """Images (B,3,H,W) uint8 -> {"queries": (B,Q,Dq)}, to be given to forward or generate, more
        than once."""
        return {"queries": self.vpg(images)}

    def prefix(self, prompt_ids, images=None, features=None, queries=None):
        """What the LLM reads before its answer: (B,P) and the images in one of their forms ->
        (B,P,D), mask or None."""
        if queries is None:
            queries = self.vpg.query(self.vpg.features(images) if features is None else features)
        soft_prompts = self.projector(queries)  # (B, Q, D)
        places = prompt_ids == IMAGE
        padding = prompt_ids == PADDING
        if (places.sum(1) != soft_prompts.shape[1]).any():
            raise ValueError(f"each prompt needs {soft_prompts.shape[1]} IMAGE places, one a soft prompt")
        mask = ~padding if padding.any() else None  # None takes the LLM's fast path
        device = soft_prompts.device
        words = self.llm.embed(prompt_ids.clamp(min=0).to(device, non_blocking=True))
        columns = places.nonzero()[:, 1].view(len(places), -1, 1)  # (B, Q, 1)
        columns = columns.to(device, non_blocking=True)
        # scatter, since the gradient of masked_scatter waits for the GPU
        prefix = words.scatter(1, columns.expand_as(soft_prompts), soft_prompts.to(words.dtype))
        return prefix, None if mask is None else mask.to(device, non_blocking=True)

    def forward(self, prompt_ids, target_ids, scored=None, **sees):
        """(B,P), (B,T) and the images in one of their forms -> (sum of the tokens' cross-entropies,
        number of tokens). scored (B,T) bool: the targets that count. With several captions an
        image, (B,K,T), see the LLM's loss."""
        prefix, mask = self.prefix(prompt_ids, **sees)
        return self.llm.loss(prefix, target_ids, mask, scored)

    def generate(self, prompt_ids, images=None, features=None, queries=None,
                 length_penalty_counts="new", **options):
        """The LLM's answers as B lists of ids; `options` are those of the LLM's generate
        (num_beams, stop, ...). `length_penalty_counts` "prompt": the length penalty counts the
        prompt's words, too, as transformers did before 4.36."""
        if length_penalty_counts == "prompt":
            options["prompt_lengths"] = (prompt_ids >= 0).sum(1)
        with torch.inference_mode():
            prefix, mask = self.prefix(prompt_ids, images, features, queries)
        return self.llm.generate(prefix, mask, **options)


# --------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Stage:
    """What trains, how fast, how long; one of `epochs` and `samples` says how long."""

    trains: tuple  # names of the model's parts
    lr: float  # peak learning rate
    final_lr: float  # at the end of a cosine; equal to lr: a constant rate
    batch_size: int  # samples an optimizer step, over all GPUs
    epochs: int = 0
    samples: int = 0
    lr_warmup_steps: int = 0  # optimizer steps of linear learning-rate warm-up from 1e-6
    lr_warmup_share: float = 0.1  # of a run's steps, which it takes at most
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.05  # on matrices; never on biases and norms


# The numbers are the paper's, but for learning-rate warm-up from scratch, which is LAVIS's.
STAGES = {
    "warm-up": Stage(trains=("projector",), lr=5e-4, final_lr=5e-4, batch_size=1728, epochs=1),
    # 7,500 steps: 13M pairs
    "fine-tune": Stage(trains=JOINTLY, lr=1e-4, final_lr=5e-5, batch_size=1728, samples=12_960_000),
    # the baseline, TFS
    "from-scratch": Stage(trains=JOINTLY, lr=1e-4, final_lr=1e-5, batch_size=1728, epochs=10,
                          lr_warmup_steps=2000),
    # stage 3 of VL-Vicuna: 160 steps, a quarter of which warms up
    "instruct": Stage(trains=JOINTLY, lr=1e-5, final_lr=1e-6, batch_size=120, samples=19_200,
                      lr_warmup_steps=40, lr_warmup_share=0.25),
}


def part_of(parts, name):
    """The part of a model that a parameter belongs to: of {part: beginning of its names} the
    longest that fits."""
    fitting = [part for part, start in parts.items() if name.startswith(start)]
    return max(fitting, key=lambda part: len(parts[part]))


def enter_stage(model, stage):
    """Makes exactly `stage.trains` trainable and puts it into train mode (dropout), all else into
    eval mode.

    -> the table of what now holds: rows of (part, parameters, trainable parameters, mode)."""
    model.eval()
    trained_modules = [model.parts[part] for part in stage.trains]
    for name, module in model.named_modules():
        if name in trained_modules:
            module.train()
    counts = {part: [0, 0] for part in model.parts}
    for name, parameter in model.named_parameters():
        part = part_of(model.parts, name)
        parameter.requires_grad_(part in stage.trains)
        numbers = parameter.numel()
        if parameter.dtype == torch.uint8:  # codes of nf4, two in a byte
            numbers *= 2
        counts[part][0] += numbers
        counts[part][1] += numbers * parameter.requires_grad
    modes = {part: "train" if part in stage.trains else "eval" for part in model.parts}
    return [(part, *counts[part], modes[part]) for part in model.parts]


def parameter_groups(model, stage):
    """What trains, for AdamW: weight decay on matrices, none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(stage, step, steps):
    """The rate of optimizer step `step` of `steps`: linear warm-up from 1e-6, then a cosine from lr
    to final_lr."""
    warmup = min(stage.lr_warmup_steps, int(steps * stage.lr_warmup_share))
    if step < warmup:
        return 1e-6 + (stage.lr - 1e-6) * step / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return stage.final_lr + (stage.lr - stage.final_lr) * (1 + math.cos(math.pi * progress)) / 2
