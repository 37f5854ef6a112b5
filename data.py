"""Image-text pairs: reading, tokenizing, augmenting, mixing, and sharing them out over ranks and workers.

    tok = load_tokenizer("folder of facebook/opt-6.7b")
    pairs = read_pairs("coco/annotations/captions_train2017.json")
    batches = load_batches([pairs], plan([len(pairs)], samples), ...)      # images (B,3,H,W) uint8, prompt_ids, target_ids

What comes when is decided before a stage begins: `plan` says which pair is sample i, for all i. A rank takes its share of
every batch, a worker its share of that, and a killed run continues at any sample, without a replay.

B batch, P prompt length, T target length, Q query tokens.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers

IMAGE, HOLE = -1, -100  # in prompts: the place of a soft prompt, and a place to be passed over

# ------------------------------------------------------------------------------------------------------------ tokenizers


class Tokenizer:
    """A tokenizer of the `tokenizers` package, with the ids that a language model needs beside its words."""

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
        """{bytes that a token spells: id} without specials: what two tokenizers can be compared by."""
        specials = {token.content for token in self.encoder.get_added_tokens_decoder().values()}
        pieces = {piece: id for piece, id in self.encoder.get_vocab().items() if piece not in specials}
        if isinstance(self.encoder.decoder, decoders.ByteLevel):
            byte_of = byte_level_alphabet()
            return {bytes(byte_of[c] for c in piece): id for piece, id in pieces.items() if all(c in byte_of for c in piece)}
        one_byte = {piece for piece in pieces if re.fullmatch("<0x[0-9A-F]{2}>", piece)}  # of bytes that no plain piece writes
        return ({bytes.fromhex(piece[3:5]): pieces[piece] for piece in one_byte}
                | {piece.replace("▁", " ").encode(): id for piece, id in pieces.items() if piece not in one_byte})


def byte_level_alphabet():
    """{character: byte} of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest for 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# BOS, EOS and pad of model types whose files may leave them out, as transformers' configurations assume them
ASSUMED_IDS = {"opt": (2, 2, 1), "llama": (1, 2, None), "mistral": (1, 2, None), "t5": (None, 1, 0)}


def read_json(file):
    """The object in a JSON file; FileNotFoundError and ValueError name one that is missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: missing; {file.parent} is not a checkpoint in Hugging Face layout") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); download it again") from error


def special_ids(folder, config, encoder):
    """[BOS, EOS, pad], None where there is none: the tokens that tokenizer_config.json names, else config.json's ids.

    The named tokens become specials of the encoder where they are not yet. ValueError without an EOS."""
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
                raise ValueError(f"{folder}: the {key} {token!r} of {named.name} or {older.name} is not in the vocabulary; are the "
                                 "files of one model?")
            encoder.add_special_tokens([token] if id is not None else [])
        ids.append(None if id == -1 else id)
    if ids[1] is None:
        raise ValueError(f"{folder}: no eos_token in {named.name}, and no eos_token_id in config.json; say in one which token ends a text")
    return ids


def load_tokenizer(folder):
    """The tokenizer of a checkpoint: tokenizer.json, or vocab.json + merges.txt (facebook/opt-*).

    Byte-level BPE (GPT-2, OPT, Llama-3, Qwen), BPE with byte fallback (LLaMA) and Unigram (T5), read as the file says. The ids of
    specials come from `special_ids`. FileNotFoundError and ValueError name the file and the remedy."""
    folder = Path(folder)
    file = folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else folder / "vocab.json"
    if not file.is_file() or file.name == "vocab.json" and not (folder / "merges.txt").is_file():
        only_model = " but tokenizer.model, which is not read" if (folder / "tokenizer.model").is_file() else ""
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt){only_model}; copy them there, or name "
                                "a model that has the same one: --tgt-tokenizer, huggyllama/llama-7b for Vicuna")
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
        raise ValueError(f"{file}: {kind} tokenizers of this kind are not implemented; there are byte-level BPE (GPT-2, OPT, Llama-3, "
                         "Qwen), BPE with byte fallback (LLaMA) and Unigram (T5)")
    encoder.no_truncation(), encoder.no_padding()
    config = read_json(folder / "config.json")
    config = config.get("text_config", config)
    encoder_decoder = bool(config.get("is_encoder_decoder")) or config.get("model_type") == "t5"
    return Tokenizer(encoder, *special_ids(folder, config, encoder), encoder_decoder)


# ------------------------------------------------------------------------------------------------------------------ text


def clean_caption(text, max_words=50):
    """BLIP's caption clean-up: lower case, punctuation to spaces, single spaces, at most 50 words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:max_words])


def caption_ids(tok, caption, max_tokens=32):
    """Caption -> its ids and the end mark; a long one loses its last words, never the end mark.

    The end mark's id is appended: newer BPEs would merge a "\\n" in the text with what stands before it."""
    return tok.encode(caption)[: max_tokens - 1] + [tok.end_id]


def prompt_ids(tok, num_query_tokens, text=""):
    """What the LLM reads before it answers: [IMAGE x Q, BOS, text], T5's encoder [IMAGE x Q, text, </s>].

    BOS belongs to the prompt, so it is never scored."""
    ids = tok.encode(text) if text else []
    if tok.encoder_decoder:
        return [IMAGE] * num_query_tokens + ids + [tok.eos_id]
    return [IMAGE] * num_query_tokens + ([] if tok.bos_id is None else [tok.bos_id]) + ids


def first_part(tok, ids, rng):
    """Of a caption's ids (T5's), how many are its first part, which the encoder reads: up to a random word of 0..n/2.

    Prefix language modelling, as BLIP-2 trains with T5. The caption was cut to max_tokens before, so both parts keep to it."""
    starts = [i for i, id in enumerate(ids) if tok.encoder.id_to_token(id).startswith("▁")]
    return int(rng.choice(starts[: len(starts) // 2 + 1])) if starts else 0


def pad(rows, value, left=False):
    """Lists of ids -> (B, longest), filled up with `value` on the right, or on the left (prompts)."""
    longest = max(map(len, rows))
    fill = lambda row: [value] * (longest - len(row))
    return torch.tensor([fill(row) + row if left else row + fill(row) for row in rows])


def count_tokens(tok, captions, vocab_size, max_tokens=32):
    """(V,) how often the captions use each token, end marks included: the weights of the word converter."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for start in range(0, len(captions), 10_000):
        ids = [i for row in tok.encode_all(captions[start : start + 10_000]) for i in row[: max_tokens - 1] + [tok.end_id]]
        counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts


# ---------------------------------------------------------------------------------------------------------------- images

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which EVA and BLIP-2 share
STD = (0.26862954, 0.26130258, 0.27577711)


@contextlib.contextmanager
def open_image(file):
    """An image file, opened but not decoded yet. OSError names a file that cannot be read, also if that shows later on."""
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:  # Pillow raises all kinds at damaged files: SyntaxError, struct.error, DecompressionBombError, ...
        raise OSError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error


def upright_rgb(image):
    """An opened image of any mode -> decoded, RGB, turned as its EXIF orientation says (in place), transparency on white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(file):
    """An image file of any mode -> RGB, upright, transparency on white. OSError names a file that cannot be read."""
    with open_image(file) as image:
        return upright_rgb(image)


def resample(image, size):
    """RGB -> (3,size,size) uint8: bicubic with antialiasing, aspect ratio not kept.

    By torch's kernel, four times as fast as Pillow's; photographs that are made smaller come out within one of 255 levels of it.
    transformers takes the one where torchvision is installed, the other where it is not."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return F.interpolate(pixels[None], size=(size, size), mode="bicubic", antialias=True)[0]


def resize(image, size):
    """PIL -> (3,size,size) uint8; the evaluation transform of BLIP: the whole image."""
    return resample(upright_rgb(image), size)


def read_image(file, size):
    """A file -> (3,size,size) uint8, as for evaluation. OSError names a file that cannot be read."""
    with open_image(file) as image:
        return resize(image, size)


def draw_crop(width, height, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random part of an image's area, as torchvision's RandomResizedCrop draws it. -> (left, top, right, bottom)"""
    for _ in range(10):  # ten tries, else the whole image
        area, aspect = width * height * rng.uniform(*scale), np.exp(rng.uniform(*np.log(ratio)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(x), int(y), int(x + w), int(y + h)
    return 0, 0, width, height


def random_crop(image, size, rng, least=0.75):
    """PIL -> (3,size,size) uint8; the training transform of BLIP: a random part of the area, bicubic, and a random flip.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size (in place), which is less work, where its crop still
    has `least` of the pixels that are wanted, along either side; with least=inf it is always decoded whole."""
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


def normalise(images):
    """(B,3,H,W) uint8 -> float32, CLIP's mean and deviation. Images travel as bytes: a quarter of the traffic."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (MEAN, STD))
    return torch.addcmul(-mean / std, images, 1 / (255 * std))


# ----------------------------------------------------------------------------------------------------------------- pairs


@dataclass
class Pairs:
    """One data set: image files and their cleaned captions, one of each a sample."""

    name: str
    files: list
    captions: list
    crop: bool = True  # augment by random crops (Visual Genome's regions are only resized)
    left_out: dict = field(default_factory=dict)  # why annotations were left out -> how many
    cache: object = None  # cache[file] -> what a frozen VPG has made of an image, to be used instead of its pixels

    def __len__(self):
        return len(self.files)

    def subset(self, indices):
        return replace(self, files=[self.files[i] for i in indices], captions=[self.captions[i] for i in indices])


def parse_spec(spec):
    """`[NAME=]FILE[@IMAGES][:WEIGHT]` -> (name, file, images or None, weight or None)"""
    parts = re.fullmatch(r"(?:([\w-]+)=)?([^@]+?)(?:@(.+?))?(?::(\d+(?:\.\d+)?))?", spec)
    if not parts:
        raise ValueError(f"{spec!r} does not read [NAME=]FILE[@IMAGES][:WEIGHT]")
    name, file, images, weight = parts.groups()
    return name or Path(file).parent.name or Path(file).stem, Path(file), images and Path(images), weight and float(weight)


def read_rows(file):
    """(image name, caption) of every annotation of a .jsonl, a list of such objects, or COCO's captions json."""
    number = 0  # of the line, in a .jsonl
    try:
        if file.suffix == ".jsonl":
            rows = []
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    rows += [json.loads(line)] if line.strip() else []
        else:
            rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file of image-text pairs") from None
    except ValueError as error:
        raise ValueError(f"{file}{f', line {number}' if number else ''}: not valid JSON in UTF-8 ({error})") from error
    try:
        if isinstance(rows, dict):  # COCO: captions refer to images by id
            names = {image["id"]: image["file_name"] for image in rows["images"]}
            return [(str(names[a["image_id"]]), a["caption"]) for a in rows["annotations"]]
        return [(str(row["image"]), caption) for row in rows
                for caption in (row["caption"] if isinstance(row["caption"], list) else [row["caption"]])]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: an annotation lacks {error}; needed are objects with \"image\" and \"caption\", or COCO's "
                         "\"images\" and \"annotations\"") from error


def image_root(file, images, names):
    """The folder that the image names of an annotation file are relative to: the one given, or one that has some of them."""
    split = file.stem.rsplit("_", 1)[-1]  # captions_train2017.json stands beside train2017/, one folder up
    places = [images] if images else [file.parent, file.parent.parent, file.parent / "images", file.parent.parent / split]
    for place in places:
        if any((place / name).is_file() for name in names[:100]):
            return place
    raise FileNotFoundError(f"{file}: its first images, {names[0]} and so on, are in none of {', '.join(map(str, places))}; say "
                            f"where the images are: {file}@FOLDER")


def read_pairs(spec, crop=True):
    """`[NAME=]FILE[@IMAGES][:WEIGHT]` -> Pairs. FILE is a .jsonl or .json of {"image", "caption"}, or COCO's captions json.

    Images are found beside the file, in COCO's layout, or in IMAGES. Each annotation is a sample, as the paper counts them.
    Empty captions are left out and counted. FileNotFoundError and ValueError name file, line and remedy."""
    name, file, images, _ = parse_spec(spec)
    rows = read_rows(file)
    captions = [clean_caption(caption) if isinstance(caption, str) else "" for _, caption in rows]
    kept = [i for i, caption in enumerate(captions) if caption]
    if not kept:
        raise ValueError(f"{file}: {len(rows)} annotations and not one caption; is this the right file?")
    root = image_root(file, images, [rows[i][0] for i in kept])
    left_out = {"empty caption": len(rows) - len(kept)} if len(rows) > len(kept) else {}
    return Pairs(name, [str(root / rows[i][0]) for i in kept], [captions[i] for i in kept], crop, left_out)


def hold_out(pairs, most=500, share=0.05):
    """The images to hold out for validation, at least two: a set of files."""
    images = sorted(set(pairs.files))
    return set(np.random.default_rng(0).permutation(images)[: max(2, min(most, int(len(images) * share)))].tolist())


def one_caption_an_image(pairs, most):
    """The first caption of each of the first `most` images, for validation."""
    first = {file: i for i, file in reversed(list(enumerate(pairs.files)))}
    return pairs.subset(sorted(first.values())[:most])


# The paper's data (section 4.1), by the names of their folders: where the annotations are, and how to get them.
PAPER = {
    "coco": (["coco_karpathy_train.json", "annotations/captions_train2017.json", "annotations/captions_train2014.json"],
             "of cocodataset.org: train2017.zip and annotations_trainval2017.zip, unpacked"),
    "sbu": (["sbu.json", "sbu.jsonl"], "SBU captions, downloaded with img2dataset, as a list of {image, caption}"),
    "vg": (["vg_caption.json", "vg.jsonl"], "Visual Genome region descriptions, as LAVIS's vg_caption.json"),
    "laion": (["laion.jsonl", "laion.json"], "LAION-COCO, 13M pairs will do, as {image, caption} lines"),
}
PAPER_VALIDATION = ["coco_karpathy_val.json", "annotations/captions_val2017.json", "annotations/captions_val2014.json"]
WARM_UP, FINE_TUNE = {"coco": 1.0, "sbu": 1.0}, {"coco": 0.1, "vg": 0.2, "laion": 0.7}


def find_paper_data(root):
    """{name: annotation file} of what lies under `root` in the layout of PAPER, "val" for the validation set included."""
    first = lambda folder, files: next((folder / file for file in files if (folder / file).is_file()), None)
    found = {name: first(Path(root) / name, files) for name, (files, _) in PAPER.items()}
    found["val"] = first(Path(root) / "coco", PAPER_VALIDATION)
    return {name: file for name, file in found.items() if file}


def how_to_get_paper_data(root):
    """The text for somebody who has no data yet."""
    lines = [f"  {Path(root) / name}/{' or '.join(files)}  ({how})" for name, (files, how) in PAPER.items()]
    return "\n".join([f"no data: nothing lies under {root}/. Put there one or more of", *lines,
                      "(coco alone will do to begin with), name another folder in $VPGTRANS_DATA, or name your own pairs:",
                      "  --data pairs.jsonl      with lines {\"image\": \"cat.jpg\", \"caption\": \"a cat on a mat\"}"])


# -------------------------------------------------------------------------------------------------------- order and batches


def plan(sizes, samples, seed, weights=None):
    """(samples,) int64: which pair is sample i, as an index into the concatenation of data sets of the given sizes.

    Without weights, one permutation of everything after another: every `sum(sizes)` samples are an epoch. With weights,
    data set d makes up its share of every window: sample i goes where the golden-ratio sequence falls, which is evener
    than chance; and each data set is permuted anew whenever it has been used up."""
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


class Samples(torch.utils.data.Dataset):
    """Samples by (position in the plan, pair): an image as the ViT wants it (or what a cache has of it), a prompt and a target.

    All randomness is seeded by (seed, position): crops and flips (augment), and where captions are split for T5 (split; both
    are for training). A pair with an unreadable image is named and gives way to the pair after it."""

    def __init__(self, sets, tok, image_size, num_query_tokens, max_tokens=32, augment=True, split=True, seed=0):
        self.sets, self.tok, self.size, self.max_tokens, self.augment, self.seed = sets, tok, image_size, max_tokens, augment, seed
        self.split = split and tok.encoder_decoder
        self.prompt = prompt_ids(tok, num_query_tokens)
        self.starts = np.cumsum([0, *map(len, sets)])

    def __getitem__(self, key):
        position, index = key
        bad = []
        while len(bad) < 10:
            d = int(np.searchsorted(self.starts, index, side="right")) - 1
            pairs, i = self.sets[d], int(index - self.starts[d])
            try:
                image = self.look(pairs, i, position)
                break
            except OSError as error:
                bad.append(str(error))
                index = (index + 1) % self.starts[-1]
        else:
            raise OSError("ten images in a row cannot be read:\n" + "\n".join(bad))
        prompt, target = self.prompt, caption_ids(self.tok, pairs.captions[i], self.max_tokens)
        if self.split:
            cut = first_part(self.tok, target, np.random.default_rng((self.seed, position, 1)))  # the crops use (seed, position)
            prompt, target = [*prompt[:-1], *target[:cut], prompt[-1]], target[cut:]
        return image, prompt, target, pairs.files[i], bad

    def look(self, pairs, i, position):
        """The pixels of pair i, (3,size,size) uint8, or its queries from the cache. OSError if it cannot be read."""
        if pairs.cache:
            return pairs.cache[pairs.files[i]]
        with open_image(pairs.files[i]) as image:
            if self.augment and pairs.crop:
                return random_crop(image, self.size, np.random.default_rng((self.seed, position)))
            return resize(image, self.size)

    @staticmethod
    def collate(samples):
        images, prompts, targets, files, bad = zip(*samples)
        kind = "images" if images[0].dtype == torch.uint8 else "queries"
        return {kind: torch.stack(images), "prompt_ids": pad(prompts, HOLE, left=True), "target_ids": pad(targets, -100),
                "files": files, "bad": [message for messages in bad for message in messages]}


def load_batches(samples, order, batch_size, micro_batch, rank=0, world=1, first_step=0, workers=0):
    """Yields, for every optimizer step from first_step on, this rank's share of the batch as a list of micro-batches.

    Step s takes order[s * batch_size : (s + 1) * batch_size], rank r every world-th of these from r on, so that the union
    over ranks is the same however many there are; what does not fill the last batch is left out."""
    steps = range(first_step, len(order) // batch_size)

    def micro_batches():
        for step in steps:
            positions = range(step * batch_size + rank, (step + 1) * batch_size, world)
            for i in range(0, len(positions), micro_batch):
                yield [(p, int(order[p])) for p in positions[i : i + micro_batch]]

    loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=micro_batches(), collate_fn=samples.collate,
                                              num_workers=workers, pin_memory=torch.cuda.is_available()))
    per_step = -(-len(range(rank, batch_size, world)) // micro_batch)
    for _ in steps:
        yield [next(loader) for _ in range(per_step)]
