# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""Image-text pairs: reading, tokenizing, augmenting, mixing, and sharing them out over ranks and
workers.

    tok = load_tokenizer("folder of facebook/opt-6.7b")
    pairs = read_pairs("coco/annotations/captions_train2017.json")
    batches = load_batches([pairs], plan([len(pairs)], samples), ...)      # images (B,3,H,W) uint8, prompt_ids, target_ids

What comes when is decided before a stage begins: `plan` says which pair is sample i, for all i. A
rank takes its share of every batch, a worker its share of that, and a killed run continues at any
sample, without a replay.

B batch, P prompt length, T target length, Q query tokens.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers
from tqdm import tqdm

IMAGE, PADDING = -1, -100  # in prompts: the place of a soft prompt, and a place to be passed over

# --------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """A tokenizer of the `tokenizers` package, with the ids that a language model needs beside its
    words."""

    def __init__(self, encoder, bos_id, eos_id, pad_id, encoder_decoder=False):
        self.encoder, self.bos_id, self.eos_id, self.pad_id = encoder, bos_id, eos_id, pad_id
        self.encoder_decoder = encoder_decoder  # is the LLM one (T5)?
        self.end_id = eos_id if encoder_decoder else self.vocab().get(b"\n", eos_id)  # ends a caption

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
        pieces = {piece: id for piece, id in self.encoder.get_vocab().items() if piece not in specials}
        if isinstance(self.encoder.decoder, decoders.ByteLevel):
            byte_of = byte_level_alphabet()
            return {bytes(byte_of[c] for c in piece): id for piece, id in pieces.items() if all(c in byte_of for c in piece)}
        one_byte = {piece for piece in pieces if re.fullmatch("<0x[0-9A-F]{2}>", piece)}  # of bytes that no plain piece writes
        return ({bytes.fromhex(piece[3:5]): pieces[piece] for piece in one_byte}
                | {piece.replace("▁", " ").encode(): id for piece, id in pieces.items() if piece not in one_byte})


def byte_level_alphabet():
    """{character: byte} of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest
    for 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


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
    named, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    tokens = read_json(named) if named.is_file() else {}
    if "added_tokens_decoder" not in tokens and older.is_file():  # transformers reads it only then, and then it prevails
        tokens |= read_json(older)
    ids = []
    for key, assumed in zip(("bos_token", "eos_token", "pad_token"), ASSUMED_IDS.get(config.get("model_type"), [None] * 3)):
        id = config.get(f"{key}_id", assumed)
        id = id[0] if isinstance(id, list) else id
        if key in tokens:
            token = tokens[key].get("content") if isinstance(tokens[key], dict) else tokens[key]
            id = encoder.token_to_id(token) if isinstance(token, str) else None
            if token and id is None and key != "pad_token":  # a pad that was added later has no embedding, and is not needed here
                raise ValueError(f"{folder}: the {key} {token!r} of {named.name} or {older.name} "
                                 "is not in the vocabulary; are the files of one model?")
            encoder.add_special_tokens([token] if id is not None else [])
        ids.append(None if id == -1 else id)
    if ids[1] is None:
        raise ValueError(f"{folder}: no eos_token in {named.name}, and no eos_token_id in "
                         "config.json; say in one which token ends a text")
    return ids


def load_tokenizer(folder):
    """The tokenizer of a checkpoint: tokenizer.json, or vocab.json + merges.txt (facebook/opt-*).

    Byte-level BPE (GPT-2, OPT, Llama-3, Qwen), BPE with byte fallback (LLaMA) and Unigram (T5),
    read as the file says. The ids of specials come from `special_ids`. FileNotFoundError and
    ValueError name the file and the remedy."""
    folder = Path(folder)
    file = folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else folder / "vocab.json"
    if not file.is_file() or file.name == "vocab.json" and not (folder / "merges.txt").is_file():
        only_model = " but tokenizer.model, which is not read" if (folder / "tokenizer.model").is_file() else ""
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and "
                                f"merges.txt){only_model}; copy them there, or name a model that "
                                "has the same one: --tgt-tokenizer, huggyllama/llama-7b for Vicuna")
    try:
        if file.name == "tokenizer.json":
            encoder = Encoder.from_file(str(file))
        else:
            encoder = Encoder(models.BPE.from_file(str(file), str(folder / "merges.txt")))
            encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            encoder.decoder = decoders.ByteLevel()
            encoder.add_special_tokens([t for t in ("<pad>", "</s>") if encoder.token_to_id(t) is not None])
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ValueError(f"{file}: damaged or no tokenizer ({error}); download it again") from error
    kind = type(encoder.model).__name__
    if not (isinstance(encoder.decoder, decoders.ByteLevel) or kind == "Unigram" or kind == "BPE" and encoder.model.byte_fallback):
        raise ValueError(f"{file}: {kind} tokenizers of this kind are not implemented; there are "
                         "byte-level BPE (GPT-2, OPT, Llama-3, Qwen), BPE with byte fallback "
                         "(LLaMA) and Unigram (T5)")
    encoder.no_truncation(), encoder.no_padding()
    config = read_json(folder / "config.json")
    config = config.get("text_config", config)
    encoder_decoder = bool(config.get("is_encoder_decoder")) or config.get("model_type") == "t5"
    return Tokenizer(encoder, *special_ids(folder, config, encoder), encoder_decoder)


# --------------------------------------------------------------------------------------------- text


def clean_caption(text, max_words=50):
    """BLIP's caption clean-up: lower case, punctuation (and control characters) to spaces, single
    spaces, at most 50 words."""
    return " ".join(re.sub(r'[.!"()*#:;~\x00-\x1f\x7f-\x9f]', " ", text.lower()).split()[:max_words])


def caption_ids(tok, caption, max_tokens=32):
    """Caption -> its ids and the end mark; a long one loses its last words, never the end mark.

    The end mark's id is appended: newer BPEs would merge a "\\n" in the text with what stands
    before it."""
    return tok.encode(caption)[: max_tokens - 1] + [tok.end_id]


def prompt_ids(tok, num_query_tokens, text=""):
    """What the LLM reads before it answers: [IMAGE x Q, BOS, text], T5's encoder [IMAGE x Q, text,
    </s>].

    BOS belongs to the prompt, so it is never scored."""
    ids = tok.encode(text) if text else []
    if tok.encoder_decoder:
        return [IMAGE] * num_query_tokens + ids + [tok.eos_id]
    return [IMAGE] * num_query_tokens + ([] if tok.bos_id is None else [tok.bos_id]) + ids


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
    fill = lambda row: [value] * (longest - len(row))
    return torch.tensor([fill(row) + row if left else row + fill(row) for row in rows])


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

@contextlib.contextmanager
def open_image(file):
    """An image file, or SHARD.tar::MEMBER@OFFSET+SIZE, opened but not decoded yet. OSError names
    one that cannot be read, also if that shows later on."""
    try:
        if shard := re.fullmatch(r"(?s)(.+?\.tar)::.*@(\d+)\+(\d+)", str(file)):
            with open(shard[1], "rb") as tar:
                tar.seek(int(shard[2]))
                source = io.BytesIO(tar.read(int(shard[3])))
        else:
            source = file
        with Image.open(source) as image:
            yield image
    except Exception as error:  # Pillow raises all kinds at damaged files: SyntaxError, struct.error, DecompressionBombError, ...
        raise OSError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error


def upright_rgb(image):
    """An opened image of any mode -> decoded, RGB, turned as its EXIF orientation says (in place),
    transparency on white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
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
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
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
        area, aspect = width * height * rng.uniform(*scale), np.exp(rng.uniform(*np.log(ratio)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
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
    factor = next((f for f in (8, 4, 2) if min(right - left, bottom - top) >= least * size * f), 1)
    image.draft(None, (image.width // factor, image.height // factor))  # for JPEGs alone
    image = upright_rgb(image)
    across, down = image.width / width, image.height / height
    pixels = resample(image.crop((round(left * across), round(top * down), round(right * across), round(bottom * down))), size)
    return pixels.flip(2) if rng.random() < 0.5 else pixels


def thumbnail(image):
    """RGB -> (768,) int16: its colours on a grid of 16 x 16, nearly the same whatever its size and
    quality."""
    return np.asarray(image.resize((128, 128), Image.NEAREST).reduce(8), np.int16).reshape(-1)


class Lookalikes:
    """Finds pictures that are among given ones, also under another name, in another size or
    quality, as COCO's in Visual Genome."""

    def __init__(self, files):
        """Reads the files; those that cannot be read, and those that show next to nothing, are
        passed over."""
        def read(file):
            with contextlib.suppress(OSError):
                return file, thumbnail(load_image(file))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
            known = [pair for pair in pool.map(read, files) if pair]
        known = [pair for pair in known if pair[1].std() >= 13]  # what is nearly plain looks like any other such picture
        self.files, thumbnails = zip(*known) if known else ((), ())
        self.thumbnails = np.array(thumbnails, np.int16).reshape(-1, 768)

    def find(self, image, most=32):
        """An RGB image -> the file whose picture it is, or None. No cell of the grid differs by
        more than `most` of 255 levels."""
        alike = np.flatnonzero(np.abs(self.thumbnails - thumbnail(image)).max(1) <= most)
        return self.files[alike[0]] if len(alike) else None


# -------------------------------------------------------------------------------------------- pairs


class Strings:
    """Many strings in two arrays, `text` one behind the other and where each `ends`: a third of a
    list's memory, which processes share (of a list's strings each would get a copy, since reading
    one counts its references), and which is saved as it is."""

    def __init__(self, text, ends):
        self.text, self.ends = text, ends  # (bytes,) uint8; (N,) int64

    @classmethod
    def of(cls, strings):
        encoded = [string.encode() for string in strings]
        return cls(np.frombuffer(bytearray(b"".join(encoded)), np.uint8), np.cumsum([len(e) for e in encoded], dtype=np.int64))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes().decode()

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def take(self, indices):
        return Strings.of([self[i] for i in indices])

    @classmethod
    def joined(cls, parts):
        before = np.cumsum([0, *(len(part.text) for part in parts)])
        return cls(np.concatenate([part.text for part in parts]), np.concatenate([part.ends + b for part, b in zip(parts, before)]))


@dataclass
class Pairs:
    """One data set: images, and cleaned captions of them, each of which is a sample."""

    name: str
    root: str  # folder that the images are named from
    images: Strings  # without doubles: a file, or FILE.tar::MEMBER@OFFSET+SIZE
    captions: Strings
    image: np.ndarray  # (captions,) which image each belongs to
    left_out: dict = field(default_factory=dict)  # why pairs were left out -> which
    crop: bool = True  # augment by random crops (Visual Genome's regions are only resized)
    cache: object = None  # cache[file] -> what a frozen VPG has made of an image, to be used instead of its pixels

    def __len__(self):
        return len(self.captions)

    def file(self, i):
        """The image of pair i, as open_image takes it."""
        return os.path.join(self.root, self.images[self.image[i]])

    def files(self):
        """All images, without doubles."""
        return [os.path.join(self.root, image) for image in self.images]

    def without(self, files, instead=False):
        """The pairs whose image is not one of `files`, or (instead) those whose image is."""
        chosen = np.array([file in files for file in self.files()])
        return self.subset(np.flatnonzero(chosen[self.image] == instead)) if instead or chosen.any() else self

    def by_image(self):
        """-> the captions' numbers in the order of their images, and where each image's begin:
        order[begins[i] : begins[i + 1]]"""
        return np.argsort(self.image, kind="stable"), np.cumsum([0, *np.bincount(self.image, minlength=len(self.images))])

    def subset(self, indices):
        used, image = np.unique(self.image[indices], return_inverse=True)
        return replace(self, images=self.images.take(used), captions=self.captions.take(indices), image=image)


def collect_pairs(rows):
    """(where, image, caption or None, problem or None) of many annotations -> (images, captions,
    image, left_out) of Pairs."""
    number_of, captions, image_of, left_out = {}, [], [], {}
    for where, image, caption, problem in rows:
        if not problem:
            caption = clean_caption(caption) if isinstance(caption, str) else ""
            problem = None if caption else "empty caption"
        if not problem and re.search("[\ud800-\udfff]", image + caption):
            problem = "broken Unicode"
        if problem:
            left_out.setdefault(problem, []).append(where.encode(errors="backslashreplace").decode())  # so that it can be printed
            continue
        captions.append(caption)
        image_of.append(number_of.setdefault(image, len(number_of)))
    return Strings.of(number_of), Strings.of(captions), np.array(image_of, np.int64), left_out


# What annotations call the two, in the formats that lie around; the first that is there counts.
IMAGE_KEYS = ("image", "file_name", "filename", "filepath", "image_path", "path", "file")
CAPTION_KEYS = ("caption", "captions", "text", "title", "sentence")


def row_pairs(where, row):
    """One annotation {image: ..., caption: ...} -> rows for collect_pairs; a list of captions is
    that many pairs.

    Of LAION-COCO's `all_captions` it is the one with the largest of `all_similarities`."""
    if not isinstance(row, dict):
        yield where, None, None, "no object with image and caption"
        return
    image = next((row[key] for key in IMAGE_KEYS if type(row.get(key)) in (str, int) and row[key] != ""), None)
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    if isinstance(row.get("all_captions"), list) and isinstance(row.get("all_similarities"), list):
        scored = [pair for pair in zip(row["all_similarities"], row["all_captions"]) if isinstance(pair[0], (int, float))]
        caption = max(scored, key=lambda pair: pair[0])[1] if scored else caption
    if image is None or caption is None:
        yield where, None, None, f"no {'image' if image is None else 'caption'}"
        return
    for one in caption if isinstance(caption, list) else [caption]:
        yield where, str(image), one, None


def read_jsonl(file):
    """An annotation a line."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line, strict=False)  # control characters in captions are cleaned away
                except (ValueError, RecursionError):
                    yield f"{file}, line {number}", None, None, "damaged line"
                else:
                    yield from row_pairs(f"{file}, line {number}", row)


def read_annotations(file):
    """A list of annotations, or COCO's {"images": [...], "annotations": [...]}, whose captions
    refer to images by id."""
    try:
        rows = json.loads(file.read_bytes(), strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON in UTF-8 ({error}); download it again") from error
    if isinstance(rows, dict) and isinstance(rows.get("images"), list) and isinstance(rows.get("annotations"), list):
        names = {str(image["id"]): image["file_name"] for image in rows["images"] if isinstance(image, dict) and {"id", "file_name"} <= image.keys()}
        for number, row in enumerate(rows["annotations"], 1):
            image = names.get(str(row.get("image_id"))) if isinstance(row, dict) else None
            yield from row_pairs(f"{file}, annotation {number}", {"image": image, "caption": row.get("caption")} if image else row)
    elif isinstance(rows, list):
        for number, row in enumerate(rows, 1):
            yield from row_pairs(f"{file}, annotation {number}", row)
    else:
        raise ValueError(f'{file}: holds neither a list of {{"image", "caption"}} nor COCO\'s "images" and "annotations"')


def read_table(file):
    """A .csv or .tsv whose first row names its columns."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)  # or an open quote swallows what follows
        try:
            columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
        except csv.Error as error:
            raise ValueError(f"{file}: no table ({error})") from error
        if not (columns.keys() & set(IMAGE_KEYS) and columns.keys() & set(CAPTION_KEYS)):
            raise ValueError(f"{file}: its first row must name a column {' or '.join(IMAGE_KEYS)} "
                             f"and one {' or '.join(CAPTION_KEYS)}; it names "
                             f"{', '.join(columns) or 'none'}")
        while True:
            start = rows.reader.line_num + 1
            where = f"{file}, line {start}"
            try:
                row = next(rows, None)
            except csv.Error:
                yield from ((f"{file}, line {line}", None, None, "damaged line") for line in range(start, max(rows.reader.line_num, start) + 1))
                continue
            if row is None:
                return
            yield from row_pairs(where, {key: row[name] for key, name in columns.items()})


IMAGE_TYPES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"}


def read_folder(folder):
    """Images anywhere in a folder, and beside each a .txt of its captions, one a line."""
    unreadable = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        yield from ((os.path.join(place, name), None, None, "link to a folder") for name in folders if os.path.islink(os.path.join(place, name)))
        for name in sorted(names):
            stem, _, kind = name.rpartition(".")
            if kind.lower() in IMAGE_TYPES:
                where, text = os.path.join(place, name), Path(place, stem + ".txt")
                try:
                    lines = [line for line in text.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
                except FileNotFoundError:
                    yield where, None, None, "no caption file"
                except (OSError, UnicodeDecodeError):
                    yield str(text), None, None, "damaged caption file"
                else:
                    for line in lines or [""]:
                        yield where, os.path.relpath(where, folder), line, None
    yield from ((str(error.filename), None, None, "unreadable folder") for error in unreadable)


DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError)  # what tarfile raises at damaged shards
LONGEST_PAUSE = 2 * 10_240  # bytes of zeros with which tar ends, and what may be between the parts of joined shards


class Header(tarfile.TarInfo):
    """tarfile passes damaged headers over in silence, looking for the next whole one; this has the
    shard write them down."""

    @classmethod
    def frombuf(cls, block, encoding, errors):
        member = super().frombuf(block, encoding, errors)
        if member.size < 0 or member.size > 1_000_000 and member.type in b"gxXLK":  # tarfile would go in circles, or read it all
            raise tarfile.InvalidHeaderError("impossible size")
        return member

    @classmethod
    def fromtarfile(cls, shard):
        try:
            return super().fromtarfile(shard)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.SubsequentHeaderError) as error:
            shard.damaged.add(shard.offset)
            if isinstance(error, tarfile.SubsequentHeaderError):  # behind a long name or pax records: look on there, too
                raise tarfile.InvalidHeaderError(str(error)) from None
            raise


class Shard(tarfile.TarFile):
    """A tar in which what is no header is passed over, but remembered."""

    tarinfo, ignore_zeros, errors = Header, True, "surrogateescape"

    def __init__(self, *args, **options):
        self.damaged = set()  # where a header should be and is not
        super().__init__(*args, **options)


def sample_of_shard(shard, where, parts, place):
    """The pairs of one sample of a shard, {ending: member} -> rows for collect_pairs."""
    kind = next((kind for kind in parts if kind in IMAGE_TYPES), None)
    texts = {kind: parts[kind] for kind in ("txt", "json") if kind in parts}
    if kind is None or not texts:
        yield where, None, None, "no image" if kind is None else "no caption next to it"
        return
    row = {"image": f"{place}::{parts[kind].name}@{parts[kind].offset_data}+{parts[kind].size}"}
    try:
        for ending, member in texts.items():
            shard.fileobj.seek(member.offset_data)
            text = shard.fileobj.read(min(member.size, 1_000_000)).decode("utf-8-sig")
            row = (json.loads(text, strict=False) if ending == "json" else {"caption": text}) | row  # .txt goes before the caption in .json
    except (ValueError, TypeError, RecursionError):
        yield where, None, None, "damaged caption"
        return
    yield from row_pairs(where, {key: row[key] for key in ("image", *CAPTION_KEYS, "all_captions", "all_similarities") if key in row})


def members_of(shard, file):
    """Of a shard, (member, None) for every file in it, and (None, row for collect_pairs) for what
    is damaged, unsafe or missing."""
    size, end = os.path.getsize(file), 0  # end: of the last member
    bad = lambda what, problem: (None, (f"{file}: {what}", None, None, problem))
    while True:
        try:
            member = shard.next()
        except DAMAGE as error:
            yield bad(f"{error}, at byte {shard.offset}", "damaged shard")
            break
        if member is None:
            break
        shard.members.clear()  # or tarfile keeps them all
        if member.offset - end > LONGEST_PAUSE and end not in shard.damaged:
            yield bad(f"byte {end}", "hole")
        end = member.offset_data + (member.size + 511) // 512 * 512
        if member.isdir() or os.path.basename(member.name).startswith("."):  # macOS puts ._1.jpg beside 1.jpg
            continue
        if not member.isreg() or member.issparse() or ".." in member.name.split("/") or member.name.startswith("/"):
            yield bad(member.name, "link or unsafe name")
        elif member.offset_data + member.size > size:
            yield bad(member.name, "cut short")
            shard.offset = member.offset_data  # look on behind its header
        else:
            yield member, None
    for at in sorted(shard.damaged):
        if at - 512 not in shard.damaged:  # the first of a row of blocks that are no headers
            yield bad(f"byte {at}", "damaged header")
    shard.fileobj.seek(end)
    tail = shard.fileobj.read(LONGEST_PAUSE + 1)
    if not shard.damaged and (len(tail) < 1024 or len(tail) > LONGEST_PAUSE):
        yield bad(f"byte {end}", "no end mark, it is cut short" if len(tail) < 1024 else "hole")


def read_shard(file, place):
    """A tar as img2dataset and webdataset write them: KEY.jpg (.png, .webp, ...), and behind or
    before it KEY.txt or KEY.json.

    Only headers and captions are read. An image is known by its bytes in the shard, called `place`
    in the rows; nothing is ever extracted to disk."""
    seen, key, parts = set(), None, {}
    with open(file, "rb") as content:
        if content.read(2) == b"\x1f\x8b":
            yield f"{file}", None, None, "compressed shard, gunzip it"
            return
        content.seek(0)
        try:
            shard = Shard(fileobj=content)
        except DAMAGE as error:
            yield f"{file}: {error}", None, None, "damaged shard"
            return
        for member, problem in itertools.chain(members_of(shard, file), [(None, None)]):  # the end
            if problem:
                yield problem
                continue
            folder, _, name = member.name.rpartition("/") if member else ("", "", "")
            stem, _, kind = name.partition(".")
            new, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
            if parts and (new != key or kind in parts):  # the sample before is whole
                if key in seen:
                    yield f"{file}: {key}", None, None, "duplicate key"
                else:
                    yield from sample_of_shard(shard, f"{file}: {key}", parts, place)
                seen.add(key)
                parts = {}
            key = new
            if member:
                parts[kind] = member


READERS = {".jsonl": read_jsonl, ".json": read_annotations, ".csv": read_table, ".tsv": read_table}


def expand(source):
    """The shards that SHARDS/{00000..00200}.tar, SHARDS/*.tar or a folder of them name; of another
    source [source]."""
    if numbers := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(source)):
        before, first, last, behind = numbers.groups()
        return [Path(f"{before}{i:0{len(first)}d}{behind}") for i in range(int(first), int(last) + 1)]
    if "*" in source.name or "?" in source.name:
        return sorted(source.parent.glob(source.name))
    if source.is_dir():
        return sorted(source.glob("*.tar")) or [source]
    return [source]


def read_rows(source, root):
    """A shard, folder or file of annotations -> rows for collect_pairs, images named from `root`
    where it is a shard."""
    if source.suffix == ".tar":
        return read_shard(source, os.path.relpath(source, root))
    return read_folder(source) if source.is_dir() else READERS[source.suffix](source)


def scan_one(source, root):
    """A shard, folder or file of annotations -> (images, captions, image, left_out) of Pairs."""
    return collect_pairs(read_rows(source, root))


def scan(sources, root):
    """As scan_one, of many shards on all cores, or of one other source."""
    if len(sources) == 1:
        return collect_pairs(tqdm(read_rows(sources[0], root), desc=f"scan {sources[0]}", unit=" "
                                                                                               "pairs", delay=3))
    if len(sources) < 8:  # processes take seconds to start
        parts = [scan_one(source, root) for source in tqdm(sources, desc="scan "
                                                                         f"{root}", unit="shard")]
        return join_scans(parts)
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count(), len(sources)), multiprocessing.get_context("spawn")) as pool:
        parts = list(tqdm(pool.map(functools.partial(scan_one, root=root), sources), total=len(sources), desc="scan "
                                                                                                              f"{root}", unit="shard"))
    return join_scans(parts)


def join_scans(parts):
    """The scans of several shards -> one."""
    left_out = {}
    for *_, of_part in parts:
        for problem, places in of_part.items():
            left_out.setdefault(problem, []).extend(places)
    before = np.cumsum([0, *(len(images) for images, *_ in parts)])
    return (Strings.joined([p[0] for p in parts]), Strings.joined([p[1] for p in parts]),
            np.concatenate([p[2] + b for p, b in zip(parts, before)]), left_out)


KEPT_FROM = 100_000  # pairs


def kept_scan(sources, root):
    """scan(), a large one (but of a folder) kept in $VPGTRANS_CACHE (~/.cache/vpgtrans) until a
    source changes, and then mapped into memory."""
    if sources[0].is_dir():  # whose texts may change without a trace in the folder
        return scan(sources, root)
    state = [[str(f.absolute()), str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in sources]
    folder = Path(os.environ.get("VPGTRANS_CACHE", "~/.cache/vpgtrans")).expanduser()
    file = folder / f"{hashlib.sha256(json.dumps([1, state]).encode()).hexdigest()[:24]}.safetensors"
    try:
        with safe_open(file, framework="pt") as saved:
            tensors = {name: saved.get_tensor(name).numpy() for name in saved.keys()}
            left_out = json.loads(saved.metadata()["left_out"])
    except Exception:  # not there yet, or damaged
        images, captions, image, left_out = scan(sources, root)
        tensors = {"images.text": images.text, "images.ends": images.ends, "captions.text": captions.text, "captions.ends": captions.ends, "image": image}
        if len(captions) >= KEPT_FROM:
            temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
            with contextlib.suppress(OSError, SafetensorError):  # it costs a scan the next time, no more
                folder.mkdir(parents=True, exist_ok=True)
                save_file({name: torch.from_numpy(array) for name, array in tensors.items()}, temporary, metadata={"left_out": json.dumps(left_out)})
                temporary.replace(file)
    return (Strings(tensors["images.text"], tensors["images.ends"]), Strings(tensors["captions.text"], tensors["captions.ends"]), tensors["image"], left_out)


def parse_spec(spec):
    """`[NAME=]SOURCE[@IMAGES][:WEIGHT]` -> (name, source, images or None, weight or None); what
    exists is a SOURCE as a whole, whatever signs are in it. Without NAME, a folder has its own
    name, a file that of its folder."""
    if os.path.exists(spec):
        name, source, images, weight = None, spec, None, None
    elif parts := re.fullmatch(r"(?:([\w-]+)=)?([^@]+?)(?:@(.+?))?(?::(\d+(?:\.\d+)?))?", spec):
        name, source, images, weight = parts.groups()
    else:
        raise ValueError(f"{spec!r} does not read [NAME=]SOURCE[@IMAGES][:WEIGHT]")
    source = Path(source)
    name = name or source.is_dir() and source.resolve().name or source.parent.name or source.stem
    return name, source, images and Path(images), weight and float(weight)


def image_root(file, images, names):
    """The folder that the image names of an annotation file are relative to: the one given, or one
    that has some of them."""
    split = file.stem.rsplit("_", 1)[-1]  # captions_train2017.json stands beside train2017/, one folder up
    places = [images] if images else [file.parent, file.parent.parent, file.parent / "images", file.parent.parent / split]
    for place in places:
        if any(os.path.isfile(place / name) for name in names):
            return place
    raise FileNotFoundError(f"{file}: its first images, {names[0]} and so on, are in none of "
                            f"{', '.join(map(str, places))}; say where the images are: "
                            f"{file}@FOLDER")


def read_pairs(spec, crop=True):
    """`[NAME=]SOURCE[@IMAGES][:WEIGHT]` -> Pairs. Each annotation is a pair, as the paper counts
    them.

    SOURCE is a .jsonl, .json, .csv or .tsv of images and captions, COCO's captions json, a folder
    of images with .txt files beside them, or WebDataset shards: SHARDS/{00000..00200}.tar,
    SHARDS/*.tar, a folder of them. Images are found beside an annotation file, in COCO's layout, or
    in IMAGES; whether all are there shows when they are read. What is damaged or empty is left out
    and named, by kind. FileNotFoundError and ValueError name file and remedy."""
    name, source, images, _ = parse_spec(spec)
    sources = expand(source)
    if images and (sources[0].suffix == ".tar" or source.is_dir()):
        raise ValueError(f"{spec}: @{images} is for files of annotations; a folder or shard holds "
                         "its images")
    if len({file.suffix for file in sources}) > 1:
        raise ValueError(f"{source}: names files of several kinds, {sources[0].name} and others; "
                         "give each a --data of its own")
    for missing in [file for file in sources if not file.exists()] or ([source] if not sources else []):
        raise FileNotFoundError(f"{missing}: there is no such file or folder of image-text pairs")
    for file in sources:
        if file.suffix not in (".tar", *READERS) and not file.is_dir():
            raise ValueError(f"{file}: image-text pairs are read from {', '.join(READERS)}, .tar "
                             "shards and folders")
    of_shards = sources[0].suffix == ".tar"
    root = Path(os.path.commonpath([file.parent for file in sources])) if of_shards else source
    table = kept_scan(sources, root)
    if not len(table[1]):
        left = "; ".join(f"{len(places):,} left out: {problem}, such as {places[0]}" for problem, places in table[3].items())
        raise ValueError(f"{source}: not one image with a caption{f' ({left})' if left else ''}; "
                         "is this the right file?")
    if not of_shards and not source.is_dir():
        root = image_root(source, images, [table[0][i] for i in range(min(100, len(table[0])))])
    return Pairs(name, str(root), *table, crop)


def hold_out(pairs, most=500, share=0.05):
    """The images to hold out for validation, at least two: a set of files."""
    images = sorted(pairs.files())
    return set(np.random.default_rng(0).permutation(images)[: max(2, min(most, int(len(images) * share)))].tolist())


def one_caption_an_image(pairs, most):
    """The first caption of each of the first `most` images, for validation."""
    return pairs.subset(np.sort(np.unique(pairs.image, return_index=True)[1])[:most])


# -------------------------------------------------------------------------------- order and batches


def plan(sizes, samples, seed, weights=None):
    """(samples,) int64: which pair is sample i, as an index into the concatenation of data sets of
    the given sizes.

    Without weights, one permutation of everything after another: every `sum(sizes)` samples are an
    epoch. With weights, data set d makes up its share of every window: sample i goes where the
    golden-ratio sequence falls, which is evener than chance; and each data set is permuted anew
    whenever it has been used up."""
    def passes(size, count, stream):
        rngs = (np.random.default_rng((seed, stream, epoch)) for epoch in range(-(-count // size)))
        return np.concatenate([np.empty(0, np.int64), *(rng.permutation(size) for rng in rngs)])[:count]

    if weights is None:
        return passes(sum(sizes), samples, 0)
    golden = (np.arange(samples) * ((5**0.5 - 1) / 2)) % 1
    which = np.searchsorted(np.cumsum(weights) / sum(weights), golden, side="right").clip(max=len(sizes) - 1)
    order, starts = np.empty(samples, np.int64), np.cumsum([0, *sizes])
    for d, size in enumerate(sizes):
        places = np.flatnonzero(which == d)
        order[places] = starts[d] + passes(size, len(places), d)
    return order


MOST_PACKED = 16  # captions of one image; of more (Visual Genome has 50), so many are drawn anew each time


def captions_a_sample(pairs, captions):
    """How many captions a sample of a data set has on average."""
    return np.minimum(np.bincount(pairs.image), MOST_PACKED).mean() if captions == "packed" else 1.0


def sizes(sets, captions="each"):
    """How many samples each data set holds: its captions ("each"), or its images, with "one" or all
    ("packed") of their captions."""
    return [len(pairs) if captions == "each" else len(pairs.images) for pairs in sets]


class Samples(torch.utils.data.Dataset):
    """Samples by (position in the plan, which): an image as the ViT wants it (or what a cache has
    of it), a prompt and targets.

    A sample is a caption ("each"), or an image with "one" of its captions, drawn anew each time, or
    with all of them ("packed"). All randomness is seeded by (seed, position): crops and flips
    (augment), where captions are split for T5 (split; both are for training), and which captions
    are drawn. A sample with an unreadable image is named and gives way to the one after it.
    `known`: Lookalikes of pictures that are not to be among the samples; those that are, are
    named."""

    def __init__(self, sets, tok, image_size, num_query_tokens, max_tokens=32, captions="each", augment=True, split=True, known=None, seed=0):
        self.sets, self.tok, self.size, self.max_tokens, self.augment, self.seed = sets, tok, image_size, max_tokens, augment, seed
        self.captions, self.split, self.known = captions, split and tok.encoder_decoder, known
        if captions == "packed" and self.split:
            raise ValueError("captions cannot be packed for T5, whose encoder reads a part of "
                             "each; use one or each")
        self.prompt = prompt_ids(tok, num_query_tokens)
        self.starts = np.cumsum([0, *sizes(sets, captions)])
        self.groups = [pairs.by_image() for pairs in sets] if captions != "each" else None

    def __getitem__(self, key):
        position, index = key
        image, failed = None, {}  # {file: why}
        for index in range(index, index + self.starts[-1]):
            pairs, chosen = self.choose(index % self.starts[-1], position)
            file = pairs.file(chosen[0])
            try:
                if file not in failed:  # else this is another caption of it
                    image, twin = self.look(pairs, file, position)
            except OSError as error:
                failed[file] = str(error)
            if image is not None or len(failed) == 10:
                break
        if image is None:
            raise OSError(f"{len(failed)} images in a row cannot be read:\n" + "\n".join(failed.values()))
        prompt, targets = self.prompt, [caption_ids(self.tok, pairs.captions[i], self.max_tokens) for i in chosen]
        if self.split:
            cut = first_part(self.tok, targets[0], np.random.default_rng((self.seed, position, 1)))  # the crops use (seed, position)
            prompt, targets = [*prompt[:-1], *targets[0][:cut], prompt[-1]], [targets[0][cut:]]
        return {"image": image, "prompt": prompt, "targets": targets, "file": file, "bad": list(failed.values()), "twin": twin}

    def lengths(self):
        """The letters in the captions of every sample: (samples,) int64."""
        letters = [np.diff(pairs.captions.ends, prepend=0) for pairs in self.sets]
        if self.captions != "each":
            letters = [np.bincount(pairs.image, n, len(pairs.images)).astype(np.int64) for pairs, n in zip(self.sets, letters)]
        return np.concatenate(letters)

    def choose(self, index, position):
        """Sample `index` -> its data set, and the numbers of its captions there."""
        d = int(np.searchsorted(self.starts, index, side="right")) - 1
        i = int(index - self.starts[d])
        if self.captions == "each":
            return self.sets[d], [i]
        order, begins = self.groups[d]
        of_image, most = order[begins[i] : begins[i + 1]], 1 if self.captions == "one" else MOST_PACKED
        if len(of_image) > most:
            of_image = np.random.default_rng((self.seed, position, 2)).choice(of_image, most, replace=False)
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
        """Samples -> a batch: images (B,3,size,size) or queries (B,Q,Dq), prompt_ids (B,P),
        target_ids (B,T), packed (B,K,T); files; bad, of which images could not be read; twins,
        {file: the known picture that it is}."""
        images, K = torch.stack([sample["image"] for sample in samples]), max(len(sample["targets"]) for sample in samples)
        target_ids = pad([row for sample in samples for row in sample["targets"] + [[]] * (K - len(sample["targets"]))], -100)
        return {"images" if images.dtype == torch.uint8 else "queries": images,
                "prompt_ids": pad([sample["prompt"] for sample in samples], PADDING, left=True),
                "target_ids": target_ids.unflatten(0, (-1, K)) if self.captions == "packed" else target_ids,
                "files": [sample["file"] for sample in samples], "bad": [message for sample in samples for message in sample["bad"]],
                "twins": {sample["file"]: sample["twin"] for sample in samples if sample["twin"]}}


def block_signals(_=None):
    """Neither Ctrl-C nor SIGTERM reaches this process and its children any more. -> what was
    blocked before"""
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def load_batches(samples, order, batch_size, micro_batch, rank=0, world=1, first_step=0, workers=0):
    """Yields, for every optimizer step from first_step on, this rank's share of the batch as a list
    of micro-batches.

    Step s takes order[s * batch_size : (s + 1) * batch_size], sorted by the length of the captions,
    so that the captions of a micro-batch need little padding; rank r takes every world-th of these
    from r on, so that the union over ranks is the same however many there are. What does not fill
    the last batch is left out."""
    steps, lengths = range(first_step, len(order) // batch_size), samples.lengths()

    def micro_batches():
        for step in steps:
            first = step * batch_size
            positions = first + np.argsort(lengths[order[first : first + batch_size]], kind="stable")[rank::world]
            for i in range(0, len(positions), micro_batch):
                yield [(int(p), int(order[p])) for p in positions[i : i + micro_batch]]

    # workers end with the process that they read for, and leave it to that one what to do when all
    # are told to stop
    before = block_signals()
    try:
        loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=micro_batches(), collate_fn=samples.collate, num_workers=workers,
                                                  pin_memory=torch.cuda.is_available(), worker_init_fn=block_signals))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    per_step = -(-len(range(rank, batch_size, world)) // micro_batch)
    for _ in steps:
        yield [next(loader) for _ in range(per_step)]


# --------------------------------------------------------------- the command: what is in a data set


def check_image(file):
    """(width, height) of an image file after decoding it, or why it cannot be read."""
    try:
        return load_image(file).size
    except OSError as error:
        return str(error)


def contact_sheet(pairs, size, rows=5, columns=8):
    """A picture of samples drawn at random, as the model sees them in training, with their
    captions."""
    rng, margin, lines = np.random.default_rng(0), 8, 3
    rows = min(rows, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * (size + margin) + margin, rows * (size + margin + 12 * lines) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for n, i in enumerate(rng.choice(len(pairs), min(len(pairs), rows * columns), replace=False)):
        x, y = margin + n % columns * (size + margin), margin + n // columns * (size + margin + 12 * lines)
        try:
            with open_image(pairs.file(i)) as image:
                pixels = random_crop(image, size, rng) if pairs.crop else resize(image, size)
            sheet.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (x, y))
        except OSError:
            draw.rectangle((x, y, x + size, y + size), outline="red")
            draw.text((x + 4, y + 4), "cannot be read", fill="red")
        text = textwrap.wrap(pairs.captions[i], max(1, size // 6))[:lines]
        draw.text((x, y + size + 1), "\n".join(text), fill="black", font_size=10, spacing=1)
    return sheet


def describe(pairs, count):
    """Lines about a data set: pairs, captions, what was left out, and what `count` images drawn at
    random are like."""
    words = np.array([caption.count(" ") + 1 for caption in pairs.captions])
    yield f"{pairs.name}: {len(pairs):,} pairs, {len(pairs.images):,} images, {len(pairs) / len(pairs.images):.3g} captions an image"
    yield f"captions: {words.mean():.1f} words on average, {np.quantile(words, 0.05):.0f} to {np.quantile(words, 0.95):.0f} in nine of ten"
    for problem, places in pairs.left_out.items():
        yield f"left out, {problem}: {len(places):,}"
        yield from (f"    {place}" for place in places[:10])
    files = [os.path.join(pairs.root, pairs.images[i]) for i in np.random.default_rng(0).permutation(len(pairs.images))[:count]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
        found = list(tqdm(pool.map(check_image, files), total=len(files), desc="reading "
                                                                               "images", unit="image"))
    sides, bad = np.array([size for size in found if not isinstance(size, str)]), [message for message in found if isinstance(message, str)]
    if len(sides):
        width, height = np.median(sides, axis=0)
        yield f"images: {width:.0f} x {height:.0f} pixels in the median, the smallest side {sides.min()}, the largest {sides.max()}"
    yield f"cannot be read: {len(bad):,} of {len(files):,} images{' drawn at random' if len(files) < len(pairs.images) else ''}"
    yield from (f"    {message}" for message in bad[:20])


def main(argv=None):
    parser = argparse.ArgumentParser(description="What is in a data set, and a contact sheet of it "
                                                 "as the model sees it.",
                                     epilog=read_pairs.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", metavar="SPEC",
                        help="[NAME=]SOURCE[@IMAGES], as for train.py --data")
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"),
                        help="where to write the picture (default: %(default)s)")
    parser.add_argument("--check", type=int, default=1000, metavar="N",
                        help="read so many images, drawn at random; 0: all (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224,
                        help="of the ViT (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not args.sheet.absolute().parent.is_dir() or args.sheet.suffix.lower() not in Image.registered_extensions():
            raise FileNotFoundError(f"{args.sheet}: there is no folder {args.sheet.parent} to "
                                    "write it into, or it ends as no picture does (.png)")
        pairs = read_pairs(args.spec)
        print(*describe(pairs, args.check or len(pairs.images)), sep="\n")
        contact_sheet(pairs, args.image_size).save(args.sheet)
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.sheet}: samples as the model sees them in training")


if __name__ == "__main__":
    main()
