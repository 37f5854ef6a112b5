# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""The path of one sample: from a picture and its caption to a row of a batch.

    tok = load_tokenizer("folder of facebook/opt-6.7b")
    samples = Samples([pairs], tok, image_size=224, num_query_tokens=32)   # pairs as in pairs.py
    order = plan([len(pairs)], count, seed=0)
    for step in load_batches(samples, order, batch_size, micro_batch): ...  # lists of micro-batches

A micro-batch holds images (B,3,H,W) uint8, prompt_ids (B,P) and target_ids (B,T). What comes when
is decided before a stage begins: `plan` says which pair is sample i, for all i. A rank takes its
share of every batch, a worker its share of that, and a killed run continues at any sample, without
a replay. Where pairs come from is told in pairs.py.

The file follows a sample: tokenizer, ids and prompts, images, order, samples and batches. Behind
that stands what not every run needs: finding pictures that must not be trained on, and how
conversations are written for a language model that was taught to converse.

B batch, P prompt length, T target length, Q query tokens, K captions of an image.
"""

import concurrent.futures
import contextlib
import copy
import datetime
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import ExifTags, Image, UnidentifiedImageError, features
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers

IMAGE = -1  # in prompts: the place of a soft prompt
PADDING = -100  # in prompts: a place to be passed over; in targets: behind a row's end

# --------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """A tokenizer of the `tokenizers` package, with the ids that a language model needs beside its
    words."""

    def __init__(self, encoder, bos_id, eos_id, pad_id, encoder_decoder=False):
        self.encoder = encoder
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.encoder_decoder = encoder_decoder  # is the LLM one (T5)?
        # what ends a caption
        self.end_id = eos_id if encoder_decoder else self.vocab().get(b"\n", eos_id)

    def encode(self, text):
        """text -> ids, without BOS, EOS or other specials than it spells, as prompts may."""
        return self.encoder.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts):
        """As encode, for many texts at once and on all cores."""
        return [e.ids for e in self.encoder.encode_batch(texts, add_special_tokens=False)]

    @contextlib.contextmanager
    def specials_as_texts(self):
        """Within it, a special token that a text spells is a text like any other. (Not T5's </s>, which
        its tokenizer has among its words.)"""
        self.encoder.encode_special_tokens = True
        try:
            yield
        finally:
            self.encoder.encode_special_tokens = False

    def decode(self, ids):
        """ids -> text, without specials."""
        return self.encoder.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def specials(self):
        """The special tokens as texts, longest first, so that none is taken for the beginning of
        another."""
        added = self.encoder.get_added_tokens_decoder().values()
        return sorted((token.content for token in added if token.special), key=len, reverse=True)

    def vocab(self):
        """{bytes that a token spells: id} without specials: what two tokenizers can be compared
        by."""
        specials = {token.content for token in self.encoder.get_added_tokens_decoder().values()}
        pieces = {p: id for p, id in self.encoder.get_vocab().items() if p not in specials}
        if isinstance(self.encoder.decoder, decoders.ByteLevel):
            byte_of = byte_level_alphabet()
            known = {p: id for p, id in pieces.items() if all(c in byte_of for c in p)}
            return {bytes(byte_of[c] for c in piece): id for piece, id in known.items()}
        spelled = {}
        for piece, id in pieces.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # a byte that no plain piece writes
                spelled.setdefault(bytes.fromhex(piece[3:5]), id)
            else:
                spelled[piece.replace("▁", " ").encode()] = id
        return spelled


def byte_level_alphabet():
    """{character: byte} of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest
    for 256, 257, ..."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for a, b in ranges for byte in range(ord(a), ord(b) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# BOS, EOS and pad of model types whose files may leave them out, as transformers' configurations
# assume them
ASSUMED_IDS = {"opt": (2, 2, 1), "llama": (1, 2, None), "mistral": (1, 2, None), "t5": (None, 1, 0)}


def read_json(file):
    """The object in a JSON file; FileNotFoundError and ValueError name one that is missing or
    damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: missing; {file.parent} is not a checkpoint in Hugging "
                                "Face layout") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); download it again") from error


def special_ids(folder, config, encoder):
    """[BOS, EOS, pad], None where there is none: the tokens that tokenizer_config.json names, else
    config.json's ids.

    The named tokens become specials of the encoder where they are not yet. ValueError without an
    EOS."""
    named = folder / "tokenizer_config.json"
    older = folder / "special_tokens_map.json"
    tokens = read_json(named) if named.is_file() else {}
    # transformers reads the older file only then, and then it prevails
    if "added_tokens_decoder" not in tokens and older.is_file():
        tokens |= read_json(older)
    all_assumed = ASSUMED_IDS.get(config.get("model_type"), (None, None, None))
    ids = []
    for key, assumed in zip(("bos_token", "eos_token", "pad_token"), all_assumed):
        id = config.get(f"{key}_id", assumed)
        id = id[0] if isinstance(id, list) else id
        if key in tokens:
            token = tokens[key]
            if isinstance(token, dict):
                token = token.get("content")
            id = encoder.token_to_id(token) if isinstance(token, str) else None
            # a pad that was added later has no embedding, and is not needed here
            if token and id is None and key != "pad_token":
                raise ValueError(f"{folder}: the {key} {token!r} of {named.name} or {older.name} "
                                 "is not in the vocabulary; are the files of one model?")
            encoder.add_special_tokens([token] if id is not None else [])
        ids.append(None if id == -1 else id)
    if ids[1] is None:
        raise ValueError(f"{folder}: no eos_token in {named.name}, and no eos_token_id in "
                         "config.json; say in one which token ends a text")
    return ids


def read_encoder(folder):
    """The `tokenizers` object of a folder: tokenizer.json, or vocab.json + merges.txt
    (facebook/opt-*)."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        file = folder / "vocab.json"
        if not (file.is_file() and (folder / "merges.txt").is_file()):
            there = ""
            for name in ("tokenizer.model", "spiece.model"):
                if (folder / name).is_file():
                    there = f" but {name}, a SentencePiece file that is not read here"
            raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and "
                                    f"merges.txt){there}; copy them there, or name a model that "
                                    "has the same one: --tgt-tokenizer (of finetune.py and export.py "
                                    "--llm-tokenizer), huggyllama/llama-7b for Vicuna, "
                                    "google/flan-t5-base for T5 v1.1")
    try:
        if file.name == "tokenizer.json":
            encoder = Encoder.from_file(str(file))
        else:
            encoder = Encoder(models.BPE.from_file(str(file), str(folder / "merges.txt")))
            encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            encoder.decoder = decoders.ByteLevel()
            specials = [t for t in ("<pad>", "</s>") if encoder.token_to_id(t) is not None]
            encoder.add_special_tokens(specials)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ValueError(f"{file}: damaged or no tokenizer ({error}); download it again") from error
    kind = type(encoder.model).__name__
    byte_level = isinstance(encoder.decoder, decoders.ByteLevel)
    byte_fallback = kind == "BPE" and encoder.model.byte_fallback
    if not (byte_level or byte_fallback or kind == "Unigram"):
        raise ValueError(f"{file}: {kind} tokenizers of this kind are not implemented; there are "
                         "byte-level BPE (GPT-2, OPT, Llama-3, Qwen), BPE with byte fallback "
                         "(LLaMA) and Unigram (T5)")
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def load_tokenizer(folder):
    """The tokenizer of a checkpoint: tokenizer.json, or vocab.json + merges.txt (facebook/opt-*).

    Byte-level BPE (GPT-2, OPT, Llama-3, Qwen), BPE with byte fallback (LLaMA) and Unigram (T5),
    read as the file says. The ids of specials come from `special_ids`. FileNotFoundError and
    ValueError name the file and the remedy."""
    folder = Path(folder)
    encoder = read_encoder(folder)
    config = read_json(folder / "config.json")
    config = config.get("text_config", config)
    encoder_decoder = bool(config.get("is_encoder_decoder")) or config.get("model_type") == "t5"
    return Tokenizer(encoder, *special_ids(folder, config, encoder), encoder_decoder)


# ---------------------------------------------------------------------------------- ids and prompts


def caption_ids(tok, caption, max_tokens=32):
    """Caption -> its ids and the end mark; a long one loses its last words, never the end mark.

    The end mark's id is appended: newer BPEs would merge a "\\n" in the text with what stands
    before it."""
    with tok.specials_as_texts():
        ids = tok.encode(caption)
    return ids[: max_tokens - 1] + [tok.end_id]


def prompt_ids(tok, num_query_tokens, text=""):
    """What the LLM reads before it answers: [IMAGE x Q, BOS, text], T5's encoder [IMAGE x Q, text,
    </s>].

    BOS belongs to the prompt, so it is never scored. Without a BOS, a text or an image there would be
    nothing: then it is EOS, the end of a text before."""
    places = [IMAGE] * num_query_tokens
    ids = tok.encode(text) if text else []
    if tok.encoder_decoder:
        return places + ids + [tok.eos_id]
    ids = places + ([] if tok.bos_id is None else [tok.bos_id]) + ids
    return ids or [tok.eos_id]


class Text(NamedTuple):
    """What the LLM reads of a sample, and what it must say to that."""

    prompt: list  # ids, IMAGE where a soft prompt stands: Q of them, or none without an image
    targets: list  # lists of ids: one, or those of all captions of an image
    scored: list | None = None  # of one target: does a token count? None: all do


def first_part(tok, ids, rng):
    """Of a caption's ids (T5's), how many are its first part, which the encoder reads: up to a
    random word of 0..n/2.

    Prefix language modelling, as BLIP-2 trains with T5. The caption was cut to max_tokens before,
    so both parts keep to it."""
    starts = [i for i, id in enumerate(ids) if tok.encoder.id_to_token(id).startswith("▁")]
    return int(rng.choice(starts[: len(starts) // 2 + 1])) if starts else 0


def pad(rows, value, left=False):
    """Lists of ids -> (B, longest), filled up with `value` on the right, or on the left
    (prompts)."""
    longest = max(map(len, rows))
    filled = []
    for row in rows:
        padding = [value] * (longest - len(row))
        filled.append(padding + row if left else row + padding)
    return torch.tensor(filled)


def count_tokens(tok, captions, vocab_size, max_tokens=32):
    """(V,) how often the captions use each token, end marks included: the weights of the word
    converter."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    captions = iter(captions)
    while some := list(itertools.islice(captions, 10_000)):
        with tok.specials_as_texts():
            rows = tok.encode_all(some)
        ids = [i for row in rows for i in row[: max_tokens - 1] + [tok.end_id]]
        counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts


# ------------------------------------------------------------------------------------------- images

# Pillow opens forty formats, and starts a program for some: Ghostscript for an EPS that calls
# itself .jpg. These are what pictures of data sets are in.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # MPO is opened as JPEG
IMAGE_FORMATS += ["AVIF"] * features.check("avif")
MOST_PIXELS = 100_000_000  # of a picture, so that none holds up a worker for long


@contextlib.contextmanager
def open_image(file):
    """An image file, or SHARD.tar::MEMBER@OFFSET+SIZE, opened but not decoded yet. OSError names
    one that cannot be read, also if that shows later on."""
    try:
        source = file
        if shard := re.fullmatch(r"(?si)(.+?\.tar)::.*@(\d+)\+(\d+)", str(file)):
            with open(shard[1], "rb") as tar:
                tar.seek(int(shard[2]))
                source = io.BytesIO(tar.read(int(shard[3])))
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width:,} x {image.height:,} pixels are more than the "
                              f"{MOST_PIXELS:,} that are decoded")
            yield image
    except UnidentifiedImageError as error:
        raise OSError(f"{file}: no picture in one of {', '.join(IMAGE_FORMATS)}") from error
    # Pillow raises all kinds at damaged files: SyntaxError, struct.error, DecompressionBombError
    except Exception as error:
        raise OSError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error


TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
         6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by EXIF's orientation


def turn_of(image):
    """What turns an image upright, as its EXIF says; None if nothing does, or EXIF is damaged: the
    pixels are whole."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises all kinds
        return None


def upright_rgb(image):
    """An opened image of any mode -> decoded (in place), RGB, turned as its EXIF orientation says,
    transparency on white."""
    image.load()  # which turns a TIFF
    turn = turn_of(image)
    if image.mode == "I" and image.format == "PPM":
        image = Image.fromarray(np.asarray(image).astype(np.uint16))  # Pillow gives 0 to 65535
    elif image.mode in ("I", "F"):
        raise OSError("pixels of more than 16 bits, or with a sign: convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if turn is not None:
        image = image.transpose(turn)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(file):
    """An image file of any mode -> RGB, upright, transparency on white. OSError names a file that
    cannot be read."""
    with open_image(file) as image:
        return upright_rgb(image)


def resample(image, size):
    """RGB -> (3,size,size) uint8: bicubic with antialiasing, aspect ratio not kept.

    By torch's kernel, four times as fast as Pillow's; photographs that are made smaller come out
    within one of 255 levels of it. transformers takes the one where torchvision is installed, the
    other where it is not."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3,H,W)
    return F.interpolate(pixels[None], size=(size, size), mode="bicubic", antialias=True)[0]


def resize(image, size):
    """PIL -> (3,size,size) uint8; the evaluation transform of BLIP: the whole image."""
    return resample(upright_rgb(image), size)


def read_image(file, size):
    """A file -> (3,size,size) uint8, as for evaluation. OSError names a file that cannot be
    read."""
    with open_image(file) as image:
        return resize(image, size)


def draw_crop(width, height, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random part of an image's area, as torchvision's RandomResizedCrop draws it. -> (left, top,
    right, bottom)"""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w = round((area * aspect) ** 0.5)
        h = round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x = rng.integers(width - w + 1)
            y = rng.integers(height - h + 1)
            return int(x), int(y), int(x + w), int(y + h)
    # ten tries, else the middle, as much of it as the ratios allow
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def random_crop(image, size, rng, least=0.75):
    """PIL -> (3,size,size) uint8; the training transform of BLIP: a random part of the area,
    bicubic, and a random flip.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size (in place), which is
    less work, where its crop still has `least` of the pixels that are wanted, along either side;
    with least=inf it is always decoded whole."""
    # turned by a quarter, when upright; of a TIFF, Pillow says the size that it then has
    quarters = (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
    turned = image.format != "TIFF" and turn_of(image) in quarters
    width, height = image.size[::-1] if turned else image.size
    left, top, right, bottom = draw_crop(width, height, rng)
    smaller_side = min(right - left, bottom - top)
    factor = next((f for f in (8, 4, 2) if smaller_side >= least * size * f), 1)
    image.draft(None, (image.width // factor, image.height // factor))  # for JPEGs alone
    image = upright_rgb(image)
    across = image.width / width
    down = image.height / height
    box = round(left * across), round(top * down), round(right * across), round(bottom * down)
    pixels = resample(image.crop(box), size)
    return pixels.flip(2) if rng.random() < 0.5 else pixels


# -------------------------------------------------------------------------------------------- order


def plan(sizes, samples, seed, weights=None):
    """(samples,) int64: which pair is sample i, as an index into the concatenation of data sets of
    the given sizes.

    Without weights, one permutation of everything after another: every `sum(sizes)` samples are an
    epoch. With weights, data set d makes up its share of every window: sample i goes where the
    golden-ratio sequence falls, which is evener than chance; and each data set is permuted anew
    whenever it has been used up."""
    def passes(size, count, stream):
        order = [np.empty(0, np.int64)]
        for epoch in range(-(-count // size)):
            order.append(np.random.default_rng((seed, stream, epoch)).permutation(size))
        return np.concatenate(order)[:count]

    if weights is None:
        return passes(sum(sizes), samples, 0)
    golden = (np.arange(samples) * ((5**0.5 - 1) / 2)) % 1
    ends = np.cumsum(weights) / sum(weights)
    which = np.searchsorted(ends, golden, side="right").clip(max=len(sizes) - 1)
    order = np.empty(samples, np.int64)
    starts = np.cumsum([0, *sizes])
    for d, size in enumerate(sizes):
        places = np.flatnonzero(which == d)
        order[places] = starts[d] + passes(size, len(places), d)
    return order


# ------------------------------------------------------------------------------ samples and batches

MOST_PACKED = 16  # captions of one image; of more (Visual Genome has 50), so many are drawn anew


def captions_per_sample(pairs, captions):
    """How many captions a sample of a data set has on average."""
    if captions != "packed":
        return 1.0
    return np.minimum(np.bincount(pairs.image), MOST_PACKED).mean()


def sizes(sets, captions="each"):
    """How many samples each data set holds: its captions ("each"), or its images, with "one" or all
    ("packed") of their captions."""
    return [len(pairs) if captions == "each" else len(pairs.images) for pairs in sets]


class Samples(torch.utils.data.Dataset):
    """samples[position, index] is sample `index` as it comes at `position` of the plan: an image as the
    ViT wants it (or what a cache has of it), a prompt and targets.

    A sample is a caption ("each"), or an image with "one" of its captions, drawn anew each time, or
    with all of them ("packed"). Where `text` is given, a sample is an item of the sets, and
    text(the item's text, has_image, rng) makes its Text: its own prompt, target, and what is
    scored. An item may be without an image.

    All randomness is seeded by (seed, position): crops and flips (augment), where captions are split
    for T5 (split; both are for training), which captions are drawn, and what `text` draws. A sample
    with an unreadable image is named and gives way to the one after it. `known`: Lookalikes of
    pictures that are not to be among the samples; those that are, are named."""

    def __init__(self, sets, tok, image_size, num_query_tokens, max_tokens=32, captions="each",
                 augment=True, split=True, known=None, seed=0, text=None):
        self.sets = sets
        self.tok = tok
        self.size = image_size
        self.max_tokens = max_tokens
        self.captions = captions
        self.augment = augment
        self.split = split and tok.encoder_decoder
        self.known = known
        self.seed = seed
        if captions == "packed" and self.split:
            raise ValueError("captions cannot be packed for T5, whose encoder reads a part of "
                             "each; use one or each")
        if captions != "each" and text:
            raise ValueError(f"captions {captions}: a text of its own is for each sample alone")
        self.prompt = prompt_ids(tok, num_query_tokens)
        self.text = text
        self.starts = np.cumsum([0, *sizes(sets, captions)])
        self.groups = [pairs.by_image() for pairs in sets] if captions != "each" else None

    def __getitem__(self, key):
        position, index = key
        image = twin = None
        failed = {}  # {file: why}
        for i in range(index, index + self.starts[-1]):
            pairs, chosen = self.choose(i % self.starts[-1], position)
            file = pairs.file(chosen[0])
            if file is None:
                break
            try:
                if file not in failed:  # else this is another caption of it
                    image, twin = self.look(pairs, file, position)
            except OSError as error:
                failed[file] = str(error)
            if image is not None or len(failed) == 10:
                break
        if image is None and file is not None:
            raise OSError(f"{len(failed)} images in a row cannot be read:\n"
                          + "\n".join(failed.values()))
        text = self.make_text(pairs, chosen, position)
        return {"image": image, "prompt": text.prompt, "targets": text.targets,
                "scored": text.scored, "file": file or f"{pairs.name}: item {chosen[0]}",
                "bad": list(failed.values()), "twin": twin}

    def make_text(self, pairs, chosen, position):
        """The Text of some captions of an image, or of an item."""
        rng = np.random.default_rng((self.seed, position, 1))  # the crops use (seed, position)
        if self.text:
            (i,) = chosen
            return self.text(pairs.texts[i], pairs.file(i) is not None, rng)
        targets = [caption_ids(self.tok, pairs.texts[c], self.max_tokens) for c in chosen]
        if not self.split:
            return Text(self.prompt, targets)
        (whole,) = targets
        cut = first_part(self.tok, whole, rng)
        return Text([*self.prompt[:-1], *whole[:cut], self.prompt[-1]], [whole[cut:]])

    def measure(self, indices=None):
        """Tokens of the prompt and of the targets, (n,2), of these samples, or of 1,000 from all over
        the sets, whose images are not read: what an estimate of time is made from."""
        if indices is None:
            total = int(self.starts[-1])
            count = min(1000, total)
            indices = (i * total // count for i in range(count))
        rows = []
        for index in indices:
            pairs, chosen = self.choose(index, 0)
            text = self.make_text(pairs, chosen, 0)
            rows.append((len(text.prompt), sum(map(len, text.targets))))
        return np.array(rows)

    def longest(self, most=100):
        """Tokens of the prompt and of the targets, (2,), of the sample with most tokens among so many
        with most bytes: what an estimate of memory is made from."""
        rows = self.measure(self.lengths().argsort()[-most:])
        return rows[rows.sum(1).argmax()]

    def lengths(self):
        """The bytes of the captions, or of the text, of every sample: (samples,) int64. An item's
        are those of its prompt and of its target."""
        lengths = []
        for pairs in self.sets:
            of_texts = np.diff(pairs.texts.ends, prepend=0)
            if self.captions != "each":
                of_images = np.bincount(pairs.image, of_texts, len(pairs.images))
                of_texts = of_images.astype(np.int64)
            lengths.append(of_texts)
        return np.concatenate(lengths)

    def choose(self, index, position):
        """Sample `index` -> its data set, and the numbers of its captions there."""
        d = int(np.searchsorted(self.starts, index, side="right")) - 1
        i = int(index - self.starts[d])
        if self.captions == "each":
            return self.sets[d], [i]
        order, begins = self.groups[d]
        of_image = order[begins[i] : begins[i + 1]]
        most = 1 if self.captions == "one" else MOST_PACKED
        if len(of_image) > most:
            rng = np.random.default_rng((self.seed, position, 2))
            of_image = rng.choice(of_image, most, replace=False)
        return self.sets[d], of_image

    def look(self, pairs, file, position):
        """The pixels of an image, (3,size,size) uint8, or its queries from the cache, and which of
        the known pictures it is, if any. OSError if it cannot be read."""
        if pairs.cache:
            return pairs.cache[file], None
        with open_image(file) as image:
            if self.augment and pairs.crop:
                pixels = random_crop(image, self.size, np.random.default_rng((self.seed, position)))
            else:
                pixels = resize(image, self.size)
            return pixels, self.known and self.known.find(upright_rgb(image))

    def collate(self, samples):
        """Samples -> a batch: images (B,3,size,size) or queries (B,Q,Dq), zeros where has_image (B,)
        is False; prompt_ids (B,P), target_ids (B,T), packed (B,K,T); scored (B,T), where a sample
        says which of its tokens count; files; bad, of which images could not be read; twins, {file:
        the known picture that it is}."""
        there = [sample["image"] for sample in samples if sample["image"] is not None]
        blank = torch.zeros_like(there[0]) if there else torch.zeros(3, self.size, self.size).byte()
        has_image = [sample["image"] is not None for sample in samples]
        images = torch.stack([blank if s["image"] is None else s["image"] for s in samples])
        K = max(len(sample["targets"]) for sample in samples)
        rows = []
        for sample in samples:
            rows += sample["targets"] + [[]] * (K - len(sample["targets"]))
        target_ids = pad(rows, PADDING)
        if self.captions == "packed":
            target_ids = target_ids.unflatten(0, (-1, K))  # (B,K,T)
        batch = {
            "images" if images.dtype == torch.uint8 else "queries": images,
            "prompt_ids": pad([sample["prompt"] for sample in samples], PADDING, left=True),
            "target_ids": target_ids,
            "has_image": torch.tensor(has_image),
            "files": [sample["file"] for sample in samples],
            "bad": [message for sample in samples for message in sample["bad"]],
            "twins": {sample["file"]: sample["twin"] for sample in samples if sample["twin"]},
        }
        if any(sample["scored"] is not None for sample in samples):
            scored = [s["scored"] or [True] * len(s["targets"][0]) for s in samples]
            batch["scored"] = pad(scored, False)
        return batch


def count_targets(batch):
    """How many tokens of a batch count in its loss, as a tensor: those that are scored."""
    if "scored" in batch:
        return batch["scored"].sum()
    return (batch["target_ids"] != PADDING).sum()


def without_targets(batch):
    """The same batch, of which no token counts: what a process reads that has less to do than others with
    which it must keep in step."""
    nothing = {"files": [], "bad": [], "twins": {}}
    nothing["target_ids"] = torch.full_like(batch["target_ids"], PADDING)
    if "scored" in batch:
        nothing["scored"] = torch.zeros_like(batch["scored"])
    return batch | nothing


def block_signals(_=None):
    """Neither Ctrl-C nor SIGTERM reaches this process and its children any more. -> what was
    blocked before"""
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


class Packed:
    """A collate function whose batches travel from worker to process through a pipe, as bytes, and
    not through shared memory, of which containers have 64 MB."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, samples):
        packed = {}
        for key, value in self.collate(samples).items():
            if torch.is_tensor(value):
                content = value.contiguous().flatten().view(torch.uint8).numpy()
                value = content, value.dtype, value.shape
            packed[key] = value
        return packed


def unpack(packed):
    batch = {}
    for key, value in packed.items():
        if isinstance(value, tuple):
            content, dtype, shape = value
            value = torch.from_numpy(content).view(dtype).view(shape)
            value = value.pin_memory() if torch.cuda.is_available() else value
        batch[key] = value
    return batch


def shared_memory():
    """Bytes that are free for what processes share."""
    try:
        place = os.statvfs("/dev/shm")
    except OSError:  # a system that keeps it elsewhere
        return float("inf")
    return place.f_bavail * place.f_frsize


def ahead_of(per_step, workers):
    """Micro-batches that each worker reads ahead: together those of a step, which are asked for at once, and
    two more of each, so that nothing waits while the next step's are read."""
    return 2 + -(-per_step // max(1, workers))


def fits_in_shared_memory(samples, micro_batch, per_step, world, workers):
    """Do the micro-batches that are on their way at once fit there, and their files into the limit
    on open ones? If not, torch's workers die or stand still."""
    ahead = workers * ahead_of(per_step, workers) + per_step + 2
    sizes = [3 * samples.size**2]  # bytes of an image, or of what a cache has of it
    for some in samples.sets:
        if some.cache:
            sizes.append(math.prod(some.cache.shape) * some.cache.dtype.itemsize)
    size = micro_batch * max(sizes)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    tensors = 5  # of a micro-batch, each an open file
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ahead * size * neighbours < shared_memory() / 2 and ahead * tensors < files / 2


class Stopped(Exception):
    """The run was asked to stop while it waited for a batch."""


LOOK_EVERY = 5  # seconds; between looks at whether a run that waits is to stop
LONGEST_WAIT = 600  # seconds, for a micro-batch


def wait_for(loader, stop):
    """The next micro-batch of workers. Stopped if stop() says so meanwhile; OSError with the remedy
    if none comes any more."""
    began = time.monotonic()
    while True:
        try:
            return next(loader)
        except RuntimeError as error:
            said = str(error)
            if not said.startswith(("DataLoader", "Too many open files", "Pin memory thread")):
                raise
            if not said.startswith("DataLoader timed out"):
                raise OSError(f"a worker that reads images was ended from outside ({said}): if memory "
                              "ran out, take fewer --workers; if it was a limit on open files, raise "
                              "it by ulimit -n") from error
        if stop and stop():
            raise Stopped
        if time.monotonic() - began > LONGEST_WAIT:
            raise OSError(f"no batch has come from the workers for {LONGEST_WAIT:,} seconds: look at "
                          "whether the storage with the images answers")


def start_workers(samples, batches, collate, workers, ahead):
    """-> what gives the micro-batches, of which each worker reads so many ahead, and its processes."""
    # signals go to all processes: workers ignore them, and end with the one that they read for. And
    # torch's handler of SIGCHLD, which would raise in the middle of a step, is taken off: wait_for
    # finds out
    before = block_signals()
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    try:
        loader = iter(torch.utils.data.DataLoader(
            samples, batch_sampler=batches, collate_fn=collate, num_workers=workers,
            prefetch_factor=ahead if workers else None, worker_init_fn=block_signals,
            # packed ones are pinned as they are unpacked
            pin_memory=torch.cuda.is_available() and not isinstance(collate, Packed),
            timeout=LOOK_EVERY if workers else 0))
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return loader, [child for child in multiprocessing.active_children() if child not in others]


def load_batches(samples, order, batch_size, micro_batch, rank=0, world=1, first_step=0, workers=0,
                 stop=None):
    """Yields, for every optimizer step from first_step on, this rank's share of the batch as a list
    of micro-batches.

    Step s takes order[s * batch_size : (s + 1) * batch_size], sorted by the length of their texts,
    so that those of a micro-batch need little padding; rank r takes every world-th of these from r
    on, so that the union over ranks is the same however many there are. What does not fill the last
    batch is left out.

    Waiting for workers has an end: Stopped when stop() says so, OSError when they are gone or
    nothing comes; no worker is left behind."""
    steps = range(first_step, len(order) // batch_size)
    lengths = samples.lengths()
    per_step = -(-len(range(rank, batch_size, world)) // micro_batch)

    def micro_batches():
        for step in steps:
            first = step * batch_size
            by_length = np.argsort(lengths[order[first : first + batch_size]], kind="stable")
            positions = first + by_length[rank::world]
            for i in range(0, len(positions), micro_batch):
                yield [(int(p), int(order[p])) for p in positions[i : i + micro_batch]]

    shared = fits_in_shared_memory(samples, micro_batch, per_step, world, workers)
    collate = samples.collate if shared or not workers else Packed(samples.collate)
    ahead = ahead_of(per_step, workers)
    loader, children = start_workers(samples, micro_batches(), collate, workers, ahead)
    try:
        for _ in steps:
            batch = [wait_for(loader, stop) for _ in range(per_step)]
            yield [unpack(micro) for micro in batch] if isinstance(collate, Packed) else batch
    except BaseException:  # GeneratorExit, too, where the run stops between two steps
        for child in children:  # they may hang in the storage, and heed no other signal
            child.kill()
        raise


# ----------------------------------------------------------------- pictures that must not be trained on


def thumbnail(image):
    """RGB -> (768,) int16: its colours on a grid of 16 x 16, nearly the same whatever its size and
    quality."""
    small = image.resize((128, 128), Image.NEAREST).reduce(8)
    return np.asarray(small, np.int16).reshape(-1)


class Lookalikes:
    """Finds pictures that are among given ones, also under another name, in another size or
    quality, as COCO's in Visual Genome."""

    def __init__(self, files):
        """Reads the files; those that cannot be read, and those that show next to nothing, are
        passed over."""
        def read(file):
            with contextlib.suppress(OSError):
                return file, thumbnail(load_image(file))

        # Pillow decodes outside of Python's lock
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            known = [pair for pair in pool.map(read, files) if pair]
        # what is nearly plain looks like any other such picture
        known = [(file, grid) for file, grid in known if grid.std() >= 13]
        self.files, thumbnails = zip(*known) if known else ((), ())
        self.thumbnails = np.array(thumbnails, np.int16).reshape(-1, 768)

    def find(self, image, most=32):
        """An RGB image -> the file whose picture it is, or None. No cell of the grid differs by
        more than `most` of 255 levels."""
        alike = np.flatnonzero(np.abs(self.thumbnails - thumbnail(image)).max(1) <= most)
        return self.files[alike[0]] if len(alike) else None


# ------------------------------------------------------------------------------------ conversations

VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The "
                 "assistant gives helpful, detailed, and polite answers to the user's questions.")

# As FastChat writes v1.1, v1.3 and v1.5
VICUNA_V1_1 = """\
{%- if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}
{%- else %}{{ system + ' ' }}{% endif %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{{ 'USER: ' + message.content + ' ASSISTANT:' }}
  {%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

# As MiniGPT-4 and VPGTrans write v0 in training, of one turn; between turns as VPGTrans's conversation does
VICUNA_V0 = """\
{%- for message in messages %}
  {%- if message.role == 'user' %}{{ '###' if loop.first else '' }}{{ 'Human: ' + message.content }}
    {{- ' ###Assistant: ' }}
  {%- elif message.role == 'assistant' %}{{ message.content + ('###' if loop.last else ' ###') }}{% endif %}
{%- endfor %}"""


class ChatTemplate:
    """How a language model writes a conversation: a jinja template, as Hugging Face's files have
    it, and where the image goes.

    `image`: what stands before and behind the soft prompts, in front of the first question.
    bos: BOS goes first, where the template does not write it. separate: each answer is encoded
    alone. stop: the text that ends an answer, where no special token does. tokens: {"bos_token":
    "<s>", ...}"""

    def __init__(self, source, image=("", "\n"), bos=False, separate=False, stop=None, tokens=None):
        self.source = source
        self.image = image
        self.bos = bos
        self.separate = separate
        self.stop = stop
        self.tokens = tokens or {}

    def render(self, messages, add_generation_prompt=False):
        """[{"role", "content"}, ...] -> text. A model that can think first (Qwen3) is told not to.
        ValueError if the template is damaged, or refuses them."""
        try:
            return compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                enable_thinking=False, raise_exception=refuse, strftime_now=the_day, **self.tokens)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        except (ArithmeticError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"chat template: {type(error).__name__} {error}") from error


@functools.lru_cache
def compiled(source):
    """In a sandbox, since templates come from outside."""
    # transformers' own tag, around what the model says
    source = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", source)
    source = re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", source)
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    return sandbox.from_string(source)


def refuse(message):
    raise jinja2.TemplateError(message)


def the_day(format):
    """A day that is always the same (Llama-3.1's own, where it knows none): what a model reads does
    not change overnight."""
    return datetime.date(2024, 7, 26).strftime(format)


TEMPLATES = {
    "vicuna-v0": ChatTemplate(VICUNA_V0, ("<Img>", "</Img> "), bos=True, separate=True, stop="###"),
    "vicuna-v1.1": ChatTemplate(VICUNA_V1_1, bos=True, tokens={"system": VICUNA_SYSTEM}),
}


def load_chat_template(folder):
    """The chat template of a checkpoint: chat_template.jinja, else that of tokenizer_config.json, a
    text or a list of named ones, of which it is "default". None if it has none; ValueError if the
    file is damaged."""
    folder = Path(folder)
    named = folder / "tokenizer_config.json"
    config = read_json(named) if named.is_file() else {}
    source = config.get("chat_template")
    if isinstance(source, list):
        there = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        if "default" not in there:
            raise ValueError(f"{named}: none of its chat templates ({', '.join(map(str, there))}) is "
                             "called default")
        source = there["default"]
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{named}: its chat_template is no text")
    tokens = {}
    for key, token in config.items():
        token = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(token, str):
            tokens[key] = token
    template = ChatTemplate(source, tokens=tokens)
    template.render([{"role": "user", "content": "Hi"}], True)  # or it is damaged
    return template


# Where contents stand in a rendered template: private-use characters, which no text has, and tabs,
# which vanish where the template strips contents
MARK = re.compile("(\t?)\ue000(\\d+)\ue001(\t?)")


class Part(NamedTuple):
    """A piece of a conversation as it is written."""

    text: str
    by: str  # "template", "user", "assistant"; "image": there soft prompts go


def write_chat(tok, template, turns, has_image, system=None):
    """[[question, answer], ...] -> Parts. Without the last answer (None), it ends where the model
    is to speak.

    The template is rendered once, with marks for the contents, which are put in afterwards: what
    they say is never searched for, or taken for a part of the template."""
    contents = [("system", system)] if system is not None else []
    for question, answer in turns:
        contents += [("user", question), ("assistant", answer)]
    asks = contents[-1][1] is None
    contents = contents[:-1] if asks else contents
    messages = [{"role": role, "content": f"\t\ue000{i}\ue001\t"} for i, (role, _) in enumerate(contents)]
    own = {"bos_token": tok.bos_id, "eos_token": tok.eos_id, "pad_token": tok.pad_id}
    tokens = {key: tok.encoder.id_to_token(id) for key, id in own.items() if id is not None}
    known = copy.copy(template)
    known.tokens = tokens | template.tokens
    pieces = MARK.split(known.render(messages, asks))
    written = [int(number) for number in pieces[2::4]]
    if written != list(range(len(contents))):
        raise ValueError("chat template: leaves out or repeats what is said, or changes its order: of "
                         f"{', '.join(role for role, _ in contents)} it writes {written}")
    parts = [Part(pieces[0], "template")]
    for number, before, after, literal in zip(written, pieces[1::4], pieces[3::4], pieces[4::4]):
        role, content = contents[number]
        content = content if before else content.lstrip()
        content = content if after else content.rstrip()
        if has_image and role == "user":
            has_image = False  # in front of the first question
            parts += [Part(template.image[0], "template"), Part("", "image"),
                      Part(template.image[1], "template")]
        parts += [Part(content, "assistant" if role == "assistant" else "user"), Part(literal, "template")]
    return parts


def why_not_written(tok, template, turns, has_system=False):
    """Why a template does not write a conversation of so many turns, or None. What is said does not
    matter: marks stand for it when the template is rendered."""
    try:
        write_chat(tok, template, [["", ""]] * turns, False, "" if has_system else None)
    except ValueError as error:
        return str(error)


def end_of_answer(tok, template, text):
    """How many characters of what the template writes behind an answer end it: a special token, or the
    template's stop."""
    specials = [re.escape(token) for token in tok.specials]
    ends = "|".join([re.escape(template.stop)] if template.stop else specials)
    found = re.match(rf"\s*(?:{ends})", text)
    return len(found[0]) if found else 0


def encode_section(tok, parts, spans):
    """Parts that are encoded as one text -> ids, and for each whether a letter of it is in one of
    the spans [(begin, end)].

    Special tokens are those that the template writes. Where people write one, it is a text like any
    other, and what stands between special tokens is encoded piece by piece."""
    text = "".join(part.text for part in parts)
    specials = tok.specials
    if not any(special in part.text for part in parts if part.by != "template" for special in specials):
        pieces = [(text, 0, False)]
    else:
        pieces, begin, at = [], 0, 0
        for part in parts:
            if part.by == "template":
                for found in re.finditer("|".join(map(re.escape, specials)), part.text):
                    first = at + found.start()
                    last = at + found.end()
                    pieces += [(text[begin:first], begin, True), (text[first:last], first, False)]
                    begin = last
            at += len(part.text)
        pieces.append((text[begin:], begin, True))
    ids, scored = [], []
    for piece, begin, is_plain in pieces:
        tok.encoder.encode_special_tokens = is_plain
        encoding = tok.encoder.encode(piece, add_special_tokens=False)
        tok.encoder.encode_special_tokens = False
        for id, (first, last) in zip(encoding.ids, encoding.offsets):
            ids.append(id)
            scored.append(any(first + begin < b and last + begin > a for a, b in spans))
    return ids, scored


def chat_ids(tok, template, turns, num_query_tokens=0, system=None):
    """A conversation, [[question, answer], ...] -> its ids, with IMAGE at the places of soft prompts
    in front of the first question, and for each whether it is an answer's or ends one.

    With None for the last answer: what the model reads before it answers. ValueError if the template
    refuses the conversation."""
    ids = [tok.bos_id] if template.bos and tok.bos_id is not None else []
    scored = [False] * len(ids)
    section, spans, at = [], [], 0

    def flush():
        nonlocal section, spans, at
        if section:
            more, counts = encode_section(tok, section, spans)
            ids.extend(more)
            scored.extend(counts)
        section, spans, at = [], [], 0

    parts = write_chat(tok, template, turns, num_query_tokens > 0, system)
    for part, behind in itertools.zip_longest(parts, parts[1:]):
        if part.by == "image":
            flush()
            ids.extend([IMAGE] * num_query_tokens)
            scored.extend([False] * num_query_tokens)
            continue
        if part.by == "assistant":
            if template.separate:
                flush()
            spans.append((at, at + len(part.text) + end_of_answer(tok, template, behind.text)))
        section.append(part)
        at += len(part.text)
    flush()
    return ids, scored


def chat_prompt_ids(tok, template, turns, num_query_tokens=0):
    """What the LLM reads before it answers the last question of [[question, answer], ..., [question,
    None]]: ids as of prompt_ids, an encoder's with </s> behind them."""
    ids, _ = chat_ids(tok, template, turns, num_query_tokens)
    return ids + [tok.eos_id] * tok.encoder_decoder


def stop_ids(tok, template):
    """What ends an answer, as generate(stop=...) takes it: tuples of ids. ValueError if nothing
    does."""
    behind = write_chat(tok, template, [["a", "a"]], False)[-1].text
    end = behind[: end_of_answer(tok, template, behind)].strip()
    if not end:
        raise ValueError("chat template: writes nothing that ends an answer")
    if not template.stop:
        return ((tok.encoder.token_to_id(end),),)
    stops = []
    for answer in ("a", "a.", "a ", "a\n"):  # behind a blank, a text is other tokens
        parts = [Part(answer, "assistant"), Part(end, "template")]
        ids, counts = encode_section(tok, parts, [(len(answer), len(answer + end))])
        stops.append(tuple(id for id, counted in zip(ids, counts) if counted))
    return tuple(dict.fromkeys(stops))


def ends_early(text, stop):
    """How many characters at the end of a text may be half a character, or the beginning of `stop`."""
    whole = text.rstrip("\ufffd")  # what a byte is written as until the rest of its character comes
    for n in range(len(stop or "") - 1, 0, -1):
        if whole.endswith(stop[:n]):
            return len(text) - len(whole) + n
    return len(text) - len(whole)


def stream_text(tok, ids, stop=None):
    """Ids as they come -> yields for each of them the text that it adds, at times "": half a
    character is held back, and so is what may be the beginning of the text `stop`, which ends it
    all."""
    seen = []
    text = ""
    given = 0
    for id in ids:
        seen.append(id)
        text = tok.decode(seen)
        if stop and stop in text:
            text = text[: text.index(stop)]
            break
        sure = max(given, len(text) - ends_early(text, stop))
        yield text[given:sure]
        given = sure
    yield text[given:].rstrip("\ufffd")


class Conversations:
    """What makes the Text of a conversation, an item {"turns": [[question, answer], ...]}, for
    Samples: all up to the first answer is the prompt, all behind it the target, whose answers are
    scored.

    For an encoder-decoder (items of pairs.each_answer) the target is the last answer, and the
    encoder reads all before it. A question None is one of `instructions`, drawn for each sample. A
    target of more than max_tokens loses its end."""

    def __init__(self, tok, template, num_query_tokens, max_tokens=2048, instructions=()):
        self.tok = tok
        self.template = template
        self.num_query_tokens = num_query_tokens
        self.max_tokens = max_tokens
        self.instructions = instructions

    def __call__(self, text, has_image, rng):
        item = json.loads(text)
        turns = []
        for question, answer in item["turns"]:
            if question is None:
                question = self.instructions[int(rng.integers(len(self.instructions)))]
            turns.append([question, answer])
        places = self.num_query_tokens if has_image else 0
        ids, scored = chat_ids(self.tok, self.template, turns, places, item.get("system"))
        end = len(scored) - scored[::-1].index(True)  # the template may write more behind it
        if self.tok.encoder_decoder:
            first = end
            while first and scored[first - 1]:
                first -= 1
            target = ids[first:end]
            eos = [] if target[-1] == self.tok.eos_id else [self.tok.eos_id]
            return Text([*ids[:first], self.tok.eos_id], [[*target, *eos][: self.max_tokens]])
        first = scored.index(True)
        target = ids[first:end][: self.max_tokens]
        counts = scored[first:end][: self.max_tokens]
        return Text(ids[:first], [target], None if all(counts) else counts)
