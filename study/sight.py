"""What sees: the ViT, from labels of patches, and a Q-Former that went through a first stage like
BLIP-2's.

B batch, T tokens, N image tokens, Q query tokens, D width.
"""

import json
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
from llm import ARCHITECTURES
from pairs import clean_caption
from qformer import VPG
from qformer import normalise as normalise_pixels
from study import scenes
from study.languages import LLMS, opt_config
from study.world import IGNORE, SEEDS, batches, initialise, optimise, save_bf16, write_json

VISION = dict(
    hidden_size=128, intermediate_size=512,
    num_hidden_layers=4, num_attention_heads=4,
    image_size=64, patch_size=8,
    hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)
QFORMER = dict(
    vocab_size=30523, hidden_size=128, intermediate_size=512,
    num_hidden_layers=4, num_attention_heads=4,
    cross_attention_frequency=2, encoder_hidden_size=128,
    hidden_act="gelu", layer_norm_eps=1e-12,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
VPG_CONFIG = dict(
    model_type="blip-2", num_query_tokens=12,
    vision_config=dict(model_type="blip_2_vision_model", **VISION),
    qformer_config=dict(model_type="blip_2_qformer", **QFORMER))
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
LABELS = ("colour", "shape", "size", "place")


def normalise(images):
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float"""
    return normalise_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))


# ---------------------------------------------------------------------------------------- the ViT


def render_many(count, rng):
    """-> scenes, images (count, 64, 64, 3) uint8, owners (count, 64, 64) uint8"""
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    images, owners = zip(*map(scenes.render, drawn))
    return drawn, np.stack(images), np.stack(owners)


def patch_labels(drawn, owners):
    """For every 8 x 8 patch that an object touches: its colour, shape, size, place. (B, 4, 64) int64

    Elsewhere these are -100, and the shape 0 ("nothing"). The place is there so that the features
    keep where things are: it takes that to tell which colour goes with which shape."""
    colours = list(scenes.COLOURS)
    shapes = list(scenes.SHAPES)
    sizes = list(scenes.SIZES)
    labels = np.full((len(drawn), len(LABELS), PATCHES), IGNORE, dtype=np.int64)
    patches = owners.reshape(-1, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4)
    patches = patches.reshape(len(drawn), 64, 64)  # (B, patches, pixels of a patch)
    for i, scene in enumerate(drawn):
        numbers = range(1, len(scene["objects"]) + 1)
        cover = np.stack([(patches[i] == n).sum(-1) for n in numbers])  # (objects, patches)
        owner = cover.argmax(0)
        touched = cover.max(0) >= 4
        labels[i, 1] = 0
        for n, thing in enumerate(scene["objects"]):
            here = touched & (owner == n)
            colour = colours.index(thing["colour"])
            shape = 1 + shapes.index(thing["shape"])
            size = sizes.index(thing["size"])
            place = {"alone": 0, "above": 1 + n, "beside": 3 + n}[scene["arrangement"]]
            labels[i, :, here] = colour, shape, size, place
    return torch.from_numpy(labels)


class PatchReader(nn.Module):
    """The ViT with linear readers of colour, shape, size and place on each patch.

    The readers are thrown away."""

    def __init__(self):
        super().__init__()
        self.vpg = VPG(VPG_CONFIG)
        initialise(self)
        classes = (len(scenes.COLOURS), 1 + len(scenes.SHAPES), len(scenes.SIZES), 5)
        self.heads = nn.ModuleList(nn.Linear(VISION["hidden_size"], n) for n in classes)
        self.vpg.requires_grad_(False).vision_model.requires_grad_(True)

    def forward(self, images):
        features = self.vpg.features(images)
        x = self.vpg.vision_model.post_layernorm(features)[:, 1:]
        return [head(x) for head in self.heads]

    def loss(self, images, labels):
        losses = []
        for i, logits in enumerate(self(images)):
            logits = logits.float().flatten(0, 1)
            losses.append(F.cross_entropy(logits, labels[:, i].flatten(), ignore_index=IGNORE))
        return sum(losses)


def make_vit(args):
    """The ViT, from dense labels: which colour, shape, size and place has what is under this patch?"""
    folder = args.out / "vit"
    if (folder / "model.safetensors").is_file():
        return
    torch.manual_seed(SEEDS["vit"])
    rng = random.Random(SEEDS["vit"])
    model = PatchReader()
    drawn, images, owners = render_many(40000, rng)
    labels = patch_labels(drawn, owners)
    held_scenes, held_images, held_owners = render_many(512, rng)
    held_labels = patch_labels(held_scenes, held_owners)
    steps = args.steps["vit"]
    index = list(batches(len(images), 64, steps, np.random.default_rng(SEEDS["vit"])))

    def step_loss(step):
        return model.loss(normalise(images[index[step]]), labels[index[step]])

    def evaluate():
        with torch.no_grad():
            guesses = [logits.argmax(-1) for logits in model(normalise(held_images))]
        seen = held_labels[:, 0] != IGNORE
        right = [(guess == held_labels[:, i])[seen].float().mean() for i, guess in enumerate(guesses)]
        shares = [f"{what} {share:.3f}" for what, share in zip(LABELS, right)]
        return f"on patches of held-out objects right: {' '.join(shares)}"

    optimise("vit", model, steps, step_loss, evaluate)
    tensors = model.vpg.state_dict()
    vit = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    write_json(folder / "config.json", VPG_CONFIG)
    save_bf16(folder / "model.safetensors", vit)


# -------------------------------------------------------------------------------- the first stage


class FirstStage(nn.Module):
    """BLIP-2's first stage (Li et al. 2023, section 3.2): a Q-Former learns from pairs alone.

    It has not met any language model. Its three tasks are contrast (the best of the queries against
    the caption), matching (with the most confusing captions of the batch) and captioning.

    BLIP-2's Q-Former reads text with its own self-attention layers. Here a small causal transformer
    does, which is thrown away: it reads [queries, caption] for captioning and matching, and the
    caption alone for contrast."""

    def __init__(self, vpg, vocab_size):
        super().__init__()
        D = QFORMER["hidden_size"]
        self.vpg = vpg
        self.reader = ARCHITECTURES["opt"](opt_config(D, 2, 4) | dict(vocab_size=vocab_size))
        self.image_side = nn.Linear(D, 64)
        self.text_side = nn.Linear(D, 64)
        self.matches = nn.Linear(D, 2)
        initialise(self.reader)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def read(self, prefix, ids):
        """(B,P,D), (B,T) -> hidden states (B,T,D) that predict the ids; the one after the last (B,D)"""
        x = self.reader.hidden_states(prefix, F.pad(ids, (0, 1), value=0))
        lengths = (ids != IGNORE).sum(1)
        return x[:, :-1], x[torch.arange(len(x)), lengths]

    def forward(self, features, ids, bos_id):
        """(B,N,D), (B,T) -> the losses of contrast, matching and captioning"""
        B = len(ids)
        queries = self.vpg.query(features)
        bos = self.reader.embed(torch.full((B, 1), bos_id))
        prefix = torch.cat([queries, bos.to(queries.dtype)], 1)  # (B, Q + 1, D)

        _, alone = self.read(bos, ids)
        images = F.normalize(self.image_side(queries).float(), dim=-1)  # (B, Q, 64)
        texts = F.normalize(self.text_side(alone).float(), dim=-1)  # (B, 64)
        similarity = torch.einsum("iqd,jd->ijq", images, texts).amax(-1) / self.temperature  # (B, B)
        same = torch.arange(B)
        contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2

        # Of every image the caption of another: the more alike, the likelier
        itself = torch.eye(B, dtype=torch.bool)
        chances = similarity.detach().masked_fill(itself, -math.inf).softmax(1)
        others = chances.multinomial(1)[:, 0]

        states, right = self.read(prefix, ids)
        logits = self.reader.lm_head(states).float().flatten(0, 1)
        captioning = F.cross_entropy(logits, ids.flatten(), ignore_index=IGNORE)

        _, wrong = self.read(prefix, ids[others])
        answers = torch.cat([torch.ones_like(same), torch.zeros_like(same)])
        matching = F.cross_entropy(self.matches(torch.cat([right, wrong])).float(), answers)
        return contrast, matching, captioning


def fresh_qformer(vit_file):
    """A VPG with the ViT of a file, which is frozen, and a random Q-Former."""
    vpg = VPG(VPG_CONFIG)
    vpg.reset()
    vit = {name: tensor.float() for name, tensor in load_file(vit_file).items()}
    frozen = vpg.frozen_parameters()
    vpg.load_state_dict(vpg.state_dict() | {name: vit[name] for name in frozen})
    for name in frozen:
        vpg.get_parameter(name).requires_grad_(False)
    nn.init.normal_(vpg.query_tokens, std=0.5)  # apart from each other
    return vpg


@torch.no_grad()
def features_of(vpg, images, batch_size=250):
    """[(64, 64, 3) uint8] -> (B,N,D) bf16"""
    features = []
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(images), batch_size):
            batch = normalise(np.stack(images[i : i + batch_size]))
            features.append(vpg.features(batch).bfloat16())
    return torch.cat(features)


def make_stage1(args):
    """A Q-Former after the first stage, from the training pairs.

    BLIP-2's second stage starts from one like it, and so does its baseline here."""
    folder = args.out / "stage1"
    if (folder / "model.safetensors").is_file():
        return
    torch.manual_seed(SEEDS["stage1"])
    tok = data.load_tokenizer(args.out / "opt-128")
    vpg = fresh_qformer(args.out / "vit" / "model.safetensors")
    model = FirstStage(vpg, LLMS["opt-128"]["vocab_size"])
    pairs = args.out / "pairs"
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    captions = tok.encode_all([clean_caption(row["caption"]) for row in rows])
    features = features_of(vpg, [np.asarray(Image.open(pairs / row["image"])) for row in rows])
    steps = args.steps["stage1"]
    index = list(batches(len(rows), 64, steps, np.random.default_rng(SEEDS["stage1"])))
    losses = []

    def step_loss(step):
        ids = data.pad([captions[i] for i in index[step]], IGNORE)
        parts = model(features[index[step]], ids, tok.bos_id)
        losses.append([part.item() for part in parts])
        return sum(parts)

    def evaluate():
        contrast, matching, captioning = np.mean(losses[-100:], axis=0)
        return f"contrast {contrast:.3f}, matching {matching:.3f}, captioning {captioning:.3f}"

    optimise("stage1", model, steps, step_loss, evaluate, muon=None, adam=1e-3)
    write_json(folder / "config.json", VPG_CONFIG)
    save_bf16(folder / "model.safetensors", vpg.state_dict())
