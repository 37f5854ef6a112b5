# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""MemVP: images in the memory of a frozen language model's FFNs, instead of in its input.
"Memory-Space Visual Prompting for Efficient Vision-Language Fine-Tuning", ICML 2024,
arXiv:2405.05615.

    image -> ViT -> projector -> visual memory <- every FFN of the LLM       (ViT and LLM frozen)

What a ViT sees usually stands in front of the question as soft prompts: 256 positions more in every
layer, which cost several times the question's own. But an FFN is a memory, too: W1 holds its keys,
W2 its values, and W2 act(W1 h) reads them with h (Geva et al. 2021). MemVP lays what it has seen
beside these keys and values:

    FFN(h) + s act(h K^T) V      K = P + E1,  V = P + E2,  P = 0.01 projector(features)

`act` is the FFN's own activation. There is no softmax, no mask and no gate, and the text gets no
longer. All layers share P and the position embeddings E1 and E2, so that K and V are computed once a
batch. Rows of E1 and E2 beyond the patches say the same whatever the image: they learn the task's
form. A question without an image reads E1 and E2 alone, all of their rows.

`VisualMemory` makes K and V, `MemoryRead` is the sum's second term. What trains (STAGES):
positions, projector and small adapters in the ViT: 0.06% of LLaMA-7B's parameters.

Beside any FFN, of ours or not:

    memory = VisualMemory(features_dim=1024, dim=4096)
    read = memory(features, has_image)                        # once a batch
    y = ffn(h) + read(h, F.silu)                              # in each layer; h is what enters the FFN

Where the numbers are from: the authors' code, JieShibo/MemVP at 5eef19f. Their code for
the paper's BART and T5 was not published: that T5 reads in both of its stacks, with LLaMA's numbers,
is our choice.

B batch, S positions read, T target length, D LLM width, N visual tokens, Dv their width, M memory
rows."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

PADDING = -100  # in prompts: a place that is masked

# -------------------------------------------------------------------------------- the visual memory


class MemoryRead:
    """What every FFN calls with its own input and activation: keys and values (B,M,D) of one
    batch."""

    def __init__(self, keys, values, dropout=0.0):
        self.keys = keys
        self.values = values  # times s
        self.dropout = dropout

    def __call__(self, h, activation):
        """(B,S,D) -> (B,S,D), to be added to the FFN's output, before residual and norm. S may be
        positions of a text, or the next tokens of its beams."""
        weights = activation(h @ self.keys.transpose(1, 2))  # (B, S, M)
        if self.dropout:
            weights = F.dropout(weights, self.dropout)
        return weights @ self.values

    def rows(self, index):
        """The same for row i of the batch, for each i of index."""
        return MemoryRead(self.keys[index], self.values[index], self.dropout)


class VisualMemory(nn.Module):
    """Features of images -> the keys and values that all layers read.

    features_dim and dim are the widths of features and LLM; `rows` is how many keys there are, of
    which the first take up an image's features (320 beside LLaMA-7B, 400 beside 13B). `image_scale`
    is in P, `scale` is s; dropout acts on what is read with, in train mode."""

    def __init__(self, features_dim, dim, rows=320, hidden=128, image_scale=0.01, scale=0.1, dropout=0.1):
        super().__init__()
        self.image_scale = image_scale
        self.scale = scale
        self.dropout = dropout
        self.key_positions = nn.Parameter(0.02 * torch.randn(rows, dim))  # E1
        self.value_positions = nn.Parameter(torch.zeros(rows, dim))  # E2
        self.projector = nn.Sequential(nn.Linear(features_dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        for layer in (self.projector[0], self.projector[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def project(self, features, has_image=None):
        """P: (B,N,Dv) -> (B,N,D); zero in rows without an image, has_image (B,) bool.

        These are multiplied by zero, not left out: so every trained tensor has a gradient in every
        micro-batch, which DDP counts on."""
        features = features.to(self.projector[0].weight.dtype)
        image = self.image_scale * self.projector(features)
        if has_image is None:
            return image
        return image * has_image.to(image.device, image.dtype, non_blocking=True)[:, None, None]

    def forward(self, features, has_image=None, dtype=None):
        """(B,N,Dv), (B,) bool or None for all -> MemoryRead; its keys and values are in `dtype`,
        the LLM's."""
        rows = len(self.key_positions)
        N = features.shape[1]
        if N > rows:
            raise ValueError(f"{N} visual tokens do not fit into {rows} rows of memory")
        image = F.pad(self.project(features, has_image), (0, 0, 0, rows - N))  # (B, M, D)
        keys = image + self.key_positions
        values = self.scale * (image + self.value_positions)
        dropout = self.dropout if self.training else 0.0
        return MemoryRead(keys.to(dtype), values.to(dtype), dropout)


# ------------------------------------------------------------------------------------------ the ViT


class Adapter(nn.Module):
    """Stands beside the MLP of a ViT's block and reads the same input y (B,N,Dv): 0.1 B2
    dropout(GELU(B1 y)). B2 is zero at first, so that the ViT begins as it was."""

    def __init__(self, dim, hidden=12, scale=0.1, dropout=0.1):
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, y):
        hidden = F.gelu(self.down(y.to(self.down.weight.dtype)))
        return (self.scale * self.up(self.dropout(hidden))).to(y.dtype)


# mean and deviation of the channels: the paper's figures are with ImageNet's, CLIP was trained with
# its own
NORMALISE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class AdaptedViT(nn.Module):
    """A frozen ViT with an adapter beside each block's MLP; the class token is cut off.

    `vit(images, beside)` -> (B,1+N,Dv) adds to each block's MLP what the function in `beside` makes
    of the same input; `vit.post_layernorm` is what CLIP has behind its last block, here behind the
    last but one, and on patches: the paper reads CLIP ViT-L/14 after 23 of its 24 blocks. `hidden`
    = 0: no adapters."""

    def __init__(self, vit, hidden=12, normalise="imagenet", image_size=224):
        super().__init__()
        self.vit = vit
        self.image_size = image_size
        self.mean, self.deviation = NORMALISE[normalise]
        self.dim = vit.post_layernorm.weight.shape[0]
        self.adapters = nn.ModuleList(Adapter(self.dim, hidden) for _ in self.layers if hidden)

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return self.vit.encoder["layers"]

    @property
    def frozen_layers(self):
        """The same: beside them stands what trains."""
        return self.layers

    def normalise(self, images):
        """(B,3,H,W) uint8 -> float32."""
        mean = torch.tensor(self.mean).view(3, 1, 1).to(images.device, non_blocking=True)
        deviation = torch.tensor(self.deviation).view(3, 1, 1).to(images.device, non_blocking=True)
        return (images / 255 - mean) / deviation

    def forward(self, images):
        """(B,3,H,W) uint8 -> (B,N,Dv)"""
        x = self.vit(self.normalise(images), list(self.adapters) or None)
        return self.vit.post_layernorm(x[:, 1:])


# ---------------------------------------------------------------------------------------- the model

# The parts of the model, by the beginning of their parameters' names.
PARTS = {
    "ViT": "vit",
    "adapters": "vit.adapters",
    "positions": "memory",
    "projector": "memory.projector",
    "LLM": "llm",
}


class MemoryLLM(nn.Module):
    """What sees, its memory, and an LLM whose FFNs read it, as one model. Its forward is the loss,
    so that DDP wraps one thing.

    `vit(images)` -> (B,N,Dv) is an AdaptedViT, or any other module that makes features of images,
    such as a VPG: MemVP on top of VPGTrans. Of the LLM it asks embed, loss, generate and dim; its
    FFNs call the memory that they are given. A prompt is ids (B,P), PADDING (-100) is masked;
    prompts and has_image stay on the CPU. Images come as images (B,3,H,W) uint8, or as features
    (B,N,Dv) where nothing in the ViT trains; has_image (B,) bool says which rows have one, the
    others' picture is not looked at."""

    num_query_tokens = 0  # places that a prompt keeps for an image

    def __init__(self, vit, memory, llm):
        super().__init__()
        widths = memory.projector[0].in_features, memory.projector[2].out_features
        if widths != (vit.dim, llm.dim):
            raise ValueError(f"the memory is {widths[0]} -> {widths[1]}; between these features and "
                             f"this LLM it must be {vit.dim} -> {llm.dim}")
        self.vit = vit
        self.memory = memory
        self.llm = llm
        has_adapters = len(getattr(vit, "adapters", ())) > 0
        self.parts = {part: start for part, start in PARTS.items() if has_adapters or part != "adapters"}

    @property
    def image_size(self):
        return self.vit.image_size

    @property
    def layers(self):
        """The blocks that repeat, to be compiled."""
        return [*self.vit.layers, *self.llm.layers]

    @property
    def frozen_layers(self):
        """Those that never train, which may be sharded."""
        return [*self.vit.frozen_layers, *self.llm.layers]

    def saved(self):
        """{name: parameter} of what MemVP trains: what a run has to save."""
        starts = ("memory.", "vit.adapters.")
        return {name: p for name, p in self.named_parameters() if name.startswith(starts)}

    def see(self, images):
        """Images (B,3,H,W) uint8 -> {"features": (B,N,Dv)}, to be given to forward or generate,
        more than once."""
        return {"features": self.vit(images)}

    def embed(self, prompt_ids):
        """(B,P) -> word embeddings (B,P,D)"""
        device = self.memory.key_positions.device
        return self.llm.embed(prompt_ids.clamp(min=0).to(device, non_blocking=True))

    def mask(self, real):
        """Real positions (B,P) bool, on the CPU -> the LLM's mask: None, its fast path, where all
        are."""
        device = self.memory.key_positions.device
        return None if real.all() else real.to(device, non_blocking=True)

    def reads(self, prompt_ids, has_image=None, images=None, features=None):
        """What the LLM reads: its prefix (B,P,D), the mask or None, and the memory."""
        features = self.vit(images) if features is None else features
        prefix = self.embed(prompt_ids)
        mask = self.mask(prompt_ids != PADDING)
        return prefix, mask, self.memory(features, has_image, prefix.dtype)

    def forward(self, prompt_ids, target_ids, scored=None, **sees):
        """(B,P), (B,T), and has_image with images or features -> (sum of the tokens'
        cross-entropies, number of tokens). scored (B,T) bool: the targets that count."""
        prefix, mask, memory = self.reads(prompt_ids, **sees)
        return self.llm.loss(prefix, target_ids, mask, scored, memory)

    def generate(self, prompt_ids, has_image=None, images=None, features=None,
                 length_penalty_counts="new", **options):
        """The LLM's answers as B lists of ids; `options` are those of the LLM's generate
        (num_beams, stop, ...). Beam search's length penalty counts the "new" tokens, or the
        "prompt" as well."""
        if length_penalty_counts == "prompt":
            options["prompt_lengths"] = (prompt_ids != PADDING).sum(1)
        with torch.inference_mode():
            prefix, mask, memory = self.reads(prompt_ids, has_image, images, features)
        return self.llm.generate(prefix, mask, memory=memory, **options)


class InputPromptLLM(MemoryLLM):
    """The comparison: the same features and projector, but P stands in front of the prompt as soft
    prompts. The memory says the same whatever the image: without its rows, nothing would learn the
    form of a question that has none."""

    def reads(self, prompt_ids, has_image=None, images=None, features=None):
        features = self.vit(images) if features is None else features
        B, N, _ = features.shape
        words = self.embed(prompt_ids)
        soft_prompts = self.memory.project(features, has_image).to(words.dtype)
        has_image = torch.ones(B, dtype=torch.bool) if has_image is None else has_image.cpu()
        real = torch.cat([has_image[:, None].expand(B, N), prompt_ids != PADDING], dim=1)
        static = self.memory(features[:, :0], dtype=words.dtype)
        return torch.cat([soft_prompts, words], dim=1), self.mask(real), static


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


TRAINS = ("adapters", "positions", "projector")

# The paper's: 12,726 questions are 397 steps an epoch; learning-rate warm-up takes two of the twenty
# epochs; the peak is 9e-3 for 256 questions a step, and in proportion
SCIENCEQA = Stage(trains=TRAINS, lr=9e-3 * 32 / 256, final_lr=0.0, batch_size=32, epochs=20,
                  lr_warmup_steps=2 * 397, betas=(0.9, 0.95), weight_decay=0.02)
# The others are VL-PET's for T5, whose protocol MemVP's paper is thought to follow; its rate falls in
# a line, ours in a cosine. lr_warmup_steps is more than any run has, so that lr_warmup_share decides: a
# tenth of the steps.
OTHER = Stage(trains=TRAINS, lr=3e-4, final_lr=0.0, batch_size=300, epochs=20, lr_warmup_steps=10**6,
              weight_decay=0.01)
STAGES = {
    "scienceqa": SCIENCEQA,
    "vqav2": OTHER,
    "gqa": replace(OTHER, batch_size=500),
    # a sample is an image and one of its five captions: 100 epochs of these are 20 of all captions
    "coco": replace(OTHER, batch_size=250, epochs=100),
}
