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

B batch, P prompt length, T target length, Q query tokens, K captions of an image.
"""

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
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
        """text -> ids, without BOS, EOS or other specials."""
        return self.encoder.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts):
        """As encode, for many texts at once and on all cores."""
        return [e.ids for e in self.encoder.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        """ids -> text, without specials."""
        return self.encoder.decode(list(ids), skip_special_tokens=True)

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
            if (folder / "tokenizer.model").is_file():
                there = " but tokenizer.model, a SentencePiece file that is not read here"
            raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and "
                                    f"merges.txt){there}; copy them there, or name a model that "
                                    "has the same one: --tgt-tokenizer, huggyllama/llama-7b for "
                                    "Vicuna")
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
    return tok.encode(caption)[: max_tokens - 1] + [tok.end_id]


def prompt_ids(tok, num_query_tokens, text=""):
    """What the LLM reads before it answers: [IMAGE x Q, BOS, text], T5's encoder [IMAGE x Q, text,
    </s>].

    BOS belongs to the prompt, so it is never scored."""
    places = [IMAGE] * num_query_tokens
    ids = tok.encode(text) if text else []
    if tok.encoder_decoder:
        return places + ids + [tok.eos_id]
    return places + ([] if tok.bos_id is None else [tok.bos_id]) + ids


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
        ids = [i for row in tok.encode_all(some) for i in row[: max_tokens - 1] + [tok.end_id]]
        counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts


# ------------------------------------------------------------------------------------------- images

# Pillow opens forty formats, and starts a program for some: Ghostscript for an EPS that calls
# itself .jpg. These are what pictures of data sets are in.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # MPO is opened as JPEG
FORMATS += ["AVIF"] * features.check("avif")
MOST_PIXELS = 100_000_000  # of a picture, so that none holds up a worker for long


@contextlib.contextmanager
def open_image(file):
    """An image file, or SHARD.tar::MEMBER@OFFSET+SIZE, opened but not decoded yet. OSError names
    one that cannot be read, also if that shows later on."""
    try:
        source = file
        if shard := re.fullmatch(r"(?s)(.+?\.tar)::.*@(\d+)\+(\d+)", str(file)):
            with open(shard[1], "rb") as tar:
                tar.seek(int(shard[2]))
                source = io.BytesIO(tar.read(int(shard[3])))
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width:,} x {image.height:,} pixels are more than the "
                              f"{MOST_PIXELS:,} that are decoded")
            yield image
    except UnidentifiedImageError as error:
        raise OSError(f"{file}: no picture in one of {', '.join(FORMATS)}") from error
    # Pillow raises all kinds at damaged files: SyntaxError, struct.error, DecompressionBombError
    except Exception as error:
        raise OSError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error


def upright_rgb(image):
    """An opened image of any mode -> decoded, RGB, turned as its EXIF orientation says (in place),
    transparency on white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
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
    for _ in range(10):  # ten tries, else the whole image
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w = round((area * aspect) ** 0.5)
        h = round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x = rng.integers(width - w + 1)
            y = rng.integers(height - h + 1)
            return int(x), int(y), int(x + w), int(y + h)
    return 0, 0, width, height


def random_crop(image, size, rng, least=0.75):
    """PIL -> (3,size,size) uint8; the training transform of BLIP: a random part of the area,
    bicubic, and a random flip.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size (in place), which is
    less work, where its crop still has `least` of the pixels that are wanted, along either side;
    with least=inf it is always decoded whole."""
    # turned by a quarter, when upright; of a TIFF, Pillow says the size that it then has
    turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
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


def captions_a_sample(pairs, captions):
    """How many captions a sample of a data set has on average."""
    if captions != "packed":
        return 1.0
    return np.minimum(np.bincount(pairs.image), MOST_PACKED).mean()


def sizes(sets, captions="each"):
    """How many samples each data set holds: its captions ("each"), or its images, with "one" or all
    ("packed") of their captions."""
    return [len(pairs) if captions == "each" else len(pairs.images) for pairs in sets]


class Samples(torch.utils.data.Dataset):
    """Samples by (position in the plan, which): an image as the ViT wants it (or what a cache has
    of it), a prompt and targets.

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

    def measure(self, most=1000):
        """Tokens of the prompt and of the targets, (n,2), of so many samples from all over the
        sets, whose images are not read: what an estimate of memory and time is made from."""
        total = int(self.starts[-1])
        count = min(most, total)
        rows = []
        for i in range(count):
            pairs, chosen = self.choose(i * total // count, 0)
            text = self.make_text(pairs, chosen, 0)
            rows.append((len(text.prompt), sum(map(len, text.targets))))
        return np.array(rows)

    def lengths(self):
        """The letters in the captions, or in the text, of every sample: (samples,) int64. An item's
        are those of its prompt and of its target."""
        lengths = []
        for pairs in self.sets:
            letters = np.diff(pairs.texts.ends, prepend=0)
            if self.captions != "each":
                of_images = np.bincount(pairs.image, letters, len(pairs.images))
                letters = of_images.astype(np.int64)
            lengths.append(letters)
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


def block_signals(_=None):
    """Neither Ctrl-C nor SIGTERM reaches this process and its children any more. -> what was
    blocked before"""
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def load_batches(samples, order, batch_size, micro_batch, rank=0, world=1, first_step=0, workers=0):
    """Yields, for every optimizer step from first_step on, this rank's share of the batch as a list
    of micro-batches.

    Step s takes order[s * batch_size : (s + 1) * batch_size], sorted by the length of their texts,
    so that those of a micro-batch need little padding; rank r takes every world-th of these
    from r on, so that the union over ranks is the same however many there are. What does not fill
    the last batch is left out."""
    steps = range(first_step, len(order) // batch_size)
    lengths = samples.lengths()

    def micro_batches():
        for step in steps:
            first = step * batch_size
            by_length = np.argsort(lengths[order[first : first + batch_size]], kind="stable")
            positions = first + by_length[rank::world]
            for i in range(0, len(positions), micro_batch):
                yield [(int(p), int(order[p])) for p in positions[i : i + micro_batch]]

    # workers end with the process that they read for, and leave it to that one what to do when all
    # are told to stop
    before = block_signals()
    try:
        loader = iter(torch.utils.data.DataLoader(
            samples, batch_sampler=micro_batches(), collate_fn=samples.collate, num_workers=workers,
            pin_memory=torch.cuda.is_available(), worker_init_fn=block_signals))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    per_step = -(-len(range(rank, batch_size, world)) // micro_batch)
    for _ in steps:
        yield [next(loader) for _ in range(per_step)]


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
