# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""What lies on disk: image-text pairs in the formats in which people have them.

    pairs = read_pairs("coco/annotations/captions_train2017.json")
    pairs.file(0), pairs.captions[0]

    python pairs.py coco/annotations/captions_train2017.json    # what is in it, and a picture of it

FORMATS is a table of what is read: the next format is one more entry and a function of a few lines.
Such a function gives a row for each annotation, (where it stands, image, text, problem), with None
for what there is not; whoever collects the rows leaves those out that have a problem, and counts
and names them. A bad annotation never ends a run by itself.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tarfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# -------------------------------------------------------------------------------------------- pairs


class Strings:
    """Many strings in two arrays, `text` one behind the other and where each `ends`: a third of a
    list's memory, which processes share (of a list's strings each would get a copy, since reading
    one counts its references), and which is saved as it is."""

    def __init__(self, text, ends):
        self.text = text  # (bytes,) uint8
        self.ends = ends  # (N,) int64

    @classmethod
    def of(cls, strings):
        encoded = [string.encode() for string in strings]
        text = np.frombuffer(bytearray(b"".join(encoded)), np.uint8)
        return cls(text, np.cumsum([len(e) for e in encoded], dtype=np.int64))

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
        ends = [part.ends + b for part, b in zip(parts, before)]
        return cls(np.concatenate([part.text for part in parts]), np.concatenate(ends))


@dataclass
class Pairs:
    """One data set: images, and cleaned captions of them, each of which is a sample."""

    name: str
    root: str  # folder that the images are named from
    images: Strings  # without duplicates: a file, or FILE.tar::MEMBER@OFFSET+SIZE
    captions: Strings
    image: np.ndarray  # (captions,) which image each belongs to
    left_out: dict = field(default_factory=dict)  # why pairs were left out -> which
    crop: bool = True  # augment by random crops (Visual Genome's regions are only resized)
    cache: object = None  # cache[file] -> what a frozen VPG has made of it, used for its pixels

    def __len__(self):
        return len(self.captions)

    def file(self, i):
        """The image of pair i: a file, or a place in a shard."""
        return os.path.join(self.root, self.images[self.image[i]])

    def files(self):
        """All images, without duplicates."""
        return [os.path.join(self.root, image) for image in self.images]

    def without(self, files, instead=False):
        """The pairs whose image is not one of `files`, or (instead) those whose image is."""
        chosen = np.array([file in files for file in self.files()])
        if not instead and not chosen.any():
            return self
        return self.subset(np.flatnonzero(chosen[self.image] == instead))

    def by_image(self):
        """-> the captions' numbers in the order of their images, and where each image's begin:
        order[begins[i] : begins[i + 1]]"""
        counts = np.bincount(self.image, minlength=len(self.images))
        return np.argsort(self.image, kind="stable"), np.cumsum([0, *counts])

    def subset(self, indices):
        used, image = np.unique(self.image[indices], return_inverse=True)
        return replace(self, images=self.images.take(used), captions=self.captions.take(indices),
                       image=image)


def hold_out(pairs, most=500, share=0.05):
    """The images to hold out for validation, at least two: a set of files."""
    images = sorted(pairs.files())
    count = max(2, min(most, int(len(images) * share)))
    return set(np.random.default_rng(0).permutation(images)[:count].tolist())


def one_caption_an_image(pairs, most):
    """The first caption of each of the first `most` images, for validation."""
    return pairs.subset(np.sort(np.unique(pairs.image, return_index=True)[1])[:most])


def clean_caption(text, max_words=50):
    """BLIP's caption clean-up: lower case, punctuation (and control characters) to spaces, single
    spaces, at most 50 words."""
    text = re.sub(r'[.!"()*#:;~\x00-\x1f\x7f-\x9f]', " ", text.lower())
    return " ".join(text.split()[:max_words])


def collect_pairs(rows):
    """(where, image, caption, problem) of many annotations -> (images, captions, image, left_out)
    of Pairs."""
    number_of, captions, image_of, left_out = {}, [], [], {}
    for where, image, caption, problem in rows:
        if not problem:
            caption = clean_caption(caption) if isinstance(caption, str) else ""
            problem = None if caption else "empty caption"
        if not problem and re.search("[\ud800-\udfff]", image + caption):
            problem = "broken Unicode"
        if problem:
            printable = where.encode(errors="backslashreplace").decode()
            left_out.setdefault(problem, []).append(printable)
            continue
        captions.append(caption)
        image_of.append(number_of.setdefault(image, len(number_of)))
    return Strings.of(number_of), Strings.of(captions), np.array(image_of, np.int64), left_out


# ------------------------------------------------------------------------------------ one annotation

# What annotations call the two, in the formats that lie around; the first that is there counts.
IMAGE_KEYS = ("image", "file_name", "filename", "filepath", "image_path", "path", "file")
CAPTION_KEYS = ("caption", "captions", "text", "title", "sentence")


def best_caption(row, caption):
    """Of LAION-COCO's `all_captions` the one with the largest of `all_similarities`; where there
    are none, the caption given."""
    captions = row.get("all_captions")
    similarities = row.get("all_similarities")
    if not isinstance(captions, list) or not isinstance(similarities, list):
        return caption
    numbers = [(s, c) for s, c in zip(similarities, captions) if isinstance(s, (int, float))]
    return max(numbers, key=lambda pair: pair[0])[1] if numbers else caption


def row_pairs(where, row):
    """One annotation {image: ..., caption: ...} -> rows; a list of captions is that many pairs."""
    if not isinstance(row, dict):
        yield where, None, None, "no object with image and caption"
        return
    named = (row[key] for key in IMAGE_KEYS if type(row.get(key)) in (str, int) and row[key] != "")
    image = next(named, None)
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    caption = best_caption(row, caption)
    if image is None or caption is None:
        yield where, None, None, f"no {'image' if image is None else 'caption'}"
        return
    for one in caption if isinstance(caption, list) else [caption]:
        yield where, str(image), one, None


# ------------------------------------------------------------------------------- files of annotations


class Source:
    """A file or folder to be read, and what the entries of FORMATS want to know of it."""

    def __init__(self, path, root):
        self.path = path
        self.root = root  # folder that the images of a shard are named from

    @functools.cached_property
    def ending(self):
        return "/" if self.path.is_dir() else self.path.suffix.lower()

    @functools.cached_property
    def content(self):
        """What a .json holds. ValueError if it is damaged."""
        try:
            # control characters in captions are cleaned away
            return json.loads(self.path.read_bytes(), strict=False)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: not valid JSON in UTF-8 ({error}); download it "
                             "again") from error


def read_lines(source):
    """JSON lines: an annotation a line."""
    with open(source.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{source.path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line, strict=False)
            except (ValueError, RecursionError):
                yield where, None, None, "damaged line"
            else:
                yield from row_pairs(where, row)


def read_list(source):
    """A list of annotations in one JSON file."""
    for number, row in enumerate(source.content, 1):
        yield from row_pairs(f"{source.path}, annotation {number}", row)


def read_coco(source):
    """COCO's captions, which refer to images by id."""
    names = {}
    for image in source.content["images"]:
        if isinstance(image, dict) and {"id", "file_name"} <= image.keys():
            names[str(image["id"])] = image["file_name"]
    for number, row in enumerate(source.content["annotations"], 1):
        where = f"{source.path}, annotation {number}"
        image = names.get(str(row.get("image_id"))) if isinstance(row, dict) else None
        if image:
            row = {"image": image, "caption": row.get("caption")}
        yield from row_pairs(where, row)


def read_table(source):
    """A .csv or .tsv whose first row names its columns."""
    file = source.path
    delimiter = "\t" if source.ending == ".tsv" else ","
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        # strict, or an open quote swallows what follows
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
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
            try:
                row = next(rows, None)
            except csv.Error:
                for line in range(start, max(rows.reader.line_num, start) + 1):
                    yield f"{file}, line {line}", None, None, "damaged line"
                continue
            if row is None:
                return
            row = {key: row[name] for key, name in columns.items()}
            yield from row_pairs(f"{file}, line {start}", row)


# ------------------------------------------------------------------------------------------- folders

IMAGE_TYPES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif"}


def walk(folder):
    """-> (file, None) for everything in a folder and those below it, in order, and (None, row) for
    what cannot be looked into."""
    unreadable = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                yield None, (os.path.join(place, name), None, None, "link to a folder")
        for name in sorted(names):
            yield os.path.join(place, name), None
    for error in unreadable:
        yield None, (str(error.filename), None, None, "unreadable folder")


def read_folder(source):
    """Images anywhere in a folder, and beside each a .txt of its captions, one a line."""
    for file, problem in walk(source.path):
        if problem:
            yield problem
            continue
        stem, _, kind = file.rpartition(".")
        if kind.lower() not in IMAGE_TYPES:
            continue
        text = Path(stem + ".txt")
        try:
            lines = text.read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError:
            yield file, None, None, "no caption file"
        except (OSError, UnicodeDecodeError):
            yield str(text), None, None, "damaged caption file"
        else:
            for line in [line for line in lines if line.strip()] or [""]:
                yield file, os.path.relpath(file, source.path), line, None


# ------------------------------------------------------------------------------------------- shards

LONGEST_END = 2 * 10_240  # bytes of zeros with which tar ends a file, in blocks of 512


def members_of(content, file):
    """-> (member, None) for every file in the tar `content`, and (None, row) for what is damaged,
    unsafe or missing.

    tarfile takes a damaged header in the middle for the end and says nothing: what lies behind it
    is lost, and named here."""
    def bad(what, problem):
        return None, (f"{file}: {what}", None, None, problem)

    size = os.path.getsize(file)
    end = 0  # of what was read
    try:
        shard = tarfile.open(fileobj=content, mode="r:", errors="surrogateescape")
        while member := shard.next():
            shard.members.clear()  # or tarfile keeps them all
            if member.size < 0 or shard.offset <= end:
                raise tarfile.InvalidHeaderError("impossible size")
            if member.offset_data + member.size > size:
                yield bad(f"{member.name}, at byte {end}", "cut short")
                return
            end = shard.offset
            # macOS puts ._1.jpg beside 1.jpg
            if member.isdir() or os.path.basename(member.name).startswith("."):
                continue
            is_plain = member.isreg() and not member.issparse()
            if not is_plain or ".." in member.name.split("/") or member.name.startswith("/"):
                yield bad(member.name, "link or unsafe name")
            else:
                yield member, None
    except Exception as error:  # tarfile raises all kinds at damaged files
        yield bad(f"{error}, at byte {end}; the rest of it is lost", "damaged shard")
        return
    content.seek(end)
    rest = content.read(LONGEST_END + 1)
    if rest[:1024].strip(b"\0"):
        yield bad(f"no header at byte {end}; the rest of it is lost", "damaged shard")
    elif rest.strip(b"\0"):
        yield bad(f"not read, from byte {end} on: what stands behind its end mark", "joined shards")
    elif len(rest) > LONGEST_END:
        yield bad(f"nothing but zeros from byte {end} on", "damaged shard")
    elif len(rest) < 1024:
        yield bad(f"no end mark at byte {end}", "cut short")


def samples_of(content, file):
    """As members_of, but what has the same key together: ((key, {ending: member}), None)."""
    key, parts = None, {}
    for member, problem in members_of(content, file):
        if problem:
            yield None, problem
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        kind = kind.lower()
        new = f"{folder}/{stem}" if folder else stem
        if parts and (new != key or kind in parts):  # the sample before is whole
            yield (key, parts), None
            parts = {}
        key = new
        parts[kind] = member
    if parts:
        yield (key, parts), None


SHARD_KEYS = ("image", *CAPTION_KEYS, "all_captions", "all_similarities")  # of the .json that count


def sample_of_shard(content, where, parts, place):
    """The pairs of one sample of a shard, {ending: member} -> rows."""
    kind = next((kind for kind in parts if kind in IMAGE_TYPES), None)
    texts = {kind: parts[kind] for kind in ("txt", "json") if kind in parts}
    if kind is None or not texts:
        yield where, None, None, "no image" if kind is None else "no caption next to it"
        return
    picture = parts[kind]
    row = {"image": f"{place}::{picture.name}@{picture.offset_data}+{picture.size}"}
    try:
        for ending, member in texts.items():
            content.seek(member.offset_data)
            text = content.read(min(member.size, 1_000_000)).decode("utf-8-sig")
            found = json.loads(text, strict=False) if ending == "json" else {"caption": text}
            row = found | row  # .txt goes before the caption in .json
    except (ValueError, TypeError, RecursionError):
        yield where, None, None, "damaged caption"
        return
    yield from row_pairs(where, {key: row[key] for key in SHARD_KEYS if key in row})


def read_shard(source):
    """A tar as img2dataset and webdataset write them: KEY.jpg (.png, .webp, ...), and behind or
    before it KEY.txt or KEY.json.

    Only headers and captions are read. An image is known by its bytes in the shard; nothing is ever
    extracted to disk."""
    file = source.path
    place = os.path.relpath(file, source.root)
    seen = set()
    with open(file, "rb") as content:
        if content.read(2) == b"\x1f\x8b":
            yield f"{file}", None, None, "compressed shard, gunzip it"
            return
        content.seek(0)
        for sample, problem in samples_of(content, file):
            if problem:
                yield problem
                continue
            key, parts = sample
            if key in seen:
                yield f"{file}: {key}", None, None, "duplicate key"
            else:
                yield from sample_of_shard(content, f"{file}: {key}", parts, place)
            seen.add(key)


# -------------------------------------------------------------------------------- the table of formats


@dataclass
class Format:
    """A format, by what a file of it looks like, and what gives its rows."""

    endings: tuple  # of the file's name; "/" is a folder
    description: str
    looks: Callable  # source -> bool
    captions: Callable  # source -> rows


def looks_like_coco(source):
    content = source.content
    if not isinstance(content, dict):
        return False
    return isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list)


def looks_like_list(source):
    return isinstance(source.content, list)


def anything(source):
    return True


# The first that fits counts.
FORMATS = [
    Format((".tar",), "WebDataset shards of KEY.jpg with KEY.txt or KEY.json", anything, read_shard),
    Format(("/",), "a folder of images with .txt files beside them", anything, read_folder),
    Format((".jsonl",), 'a line {"image", "caption"} for each pair', anything, read_lines),
    Format((".csv", ".tsv"), "a table whose first row names its columns", anything, read_table),
    Format((".json",), 'COCO\'s {"images", "annotations"}', looks_like_coco, read_coco),
    Format((".json",), 'a list of {"image", "caption"}', looks_like_list, read_list),
]
ENDINGS = {ending for format in FORMATS for ending in format.endings}


def what_is_in(content):
    """What a JSON file holds, in words."""
    if isinstance(content, dict):
        keys = [repr(key) for key in list(content)[:8]]
        return f"an object with the keys {', '.join(keys)}" if keys else "an empty object"
    return f"no object and no list, but {json.dumps(content)[:40]}"


def find_format(source):
    """The entry of FORMATS that a source is of. ValueError says what was found, and what would
    do."""
    there = [format for format in FORMATS if source.ending in format.endings]
    for format in there:
        if format.looks(source):
            return format
    found = what_is_in(source.content) if source.ending == ".json" else "something else"
    known = "; ".join(format.description for format in there)
    raise ValueError(f"{source.path}: holds {found}. It is read if it holds {known}")


# --------------------------------------------------------------------------------------------- scans


def read_rows(path, root):
    source = Source(path, root)
    return find_format(source).captions(source)


def scan_one(path, root):
    """A shard, folder or file of annotations -> (images, captions, image, left_out) of Pairs."""
    return collect_pairs(read_rows(path, root))


def scan(paths, root):
    """As scan_one, of many shards on all cores, or of one other source."""
    if len(paths) == 1:
        rows = read_rows(paths[0], root)
        return collect_pairs(tqdm(rows, desc=f"scan {paths[0]}", unit=" pairs", delay=3))
    bar = functools.partial(tqdm, desc=f"scan {root}", unit="shard", total=len(paths))
    if len(paths) < 8:  # processes take seconds to start
        return join_scans([scan_one(path, root) for path in bar(paths)])
    workers = min(os.cpu_count(), len(paths))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        return join_scans(list(bar(pool.map(functools.partial(scan_one, root=root), paths))))


def join_scans(parts):
    """The scans of several shards -> one."""
    images, captions, image, left_out = zip(*parts)
    before = np.cumsum([0, *map(len, images)])
    image = np.concatenate([of_part + b for of_part, b in zip(image, before)])
    joined = {}
    for of_part in left_out:
        for problem, places in of_part.items():
            joined.setdefault(problem, []).extend(places)
    return Strings.joined(images), Strings.joined(captions), image, joined


KEPT_FROM = 100_000  # pairs


def state_of(path):
    """What changes when a file does. Links to one file, as in the Hub's cache, are told apart."""
    stat = path.stat()
    return [str(path.absolute()), str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def kept_scan(paths, root):
    """scan(), a large one (but of a folder) kept in $VPGTRANS_CACHE (~/.cache/vpgtrans) until a
    source changes, and then mapped into memory."""
    if paths[0].is_dir():  # whose texts may change without a trace in the folder
        return scan(paths, root)
    state = json.dumps([2, [state_of(path) for path in paths]])
    name = hashlib.sha256(state.encode()).hexdigest()[:24]
    folder = Path(os.environ.get("VPGTRANS_CACHE", "~/.cache/vpgtrans")).expanduser()
    file = folder / f"{name}.safetensors"
    try:
        with safe_open(file, framework="pt") as saved:
            tensors = {name: saved.get_tensor(name).numpy() for name in saved.keys()}
            left_out = json.loads(saved.metadata()["left_out"])
    except Exception:  # not there yet, or damaged
        images, captions, image, left_out = scan(paths, root)
        if len(captions) >= KEPT_FROM:
            tensors = {"images.text": images.text, "images.ends": images.ends,
                       "captions.text": captions.text, "captions.ends": captions.ends,
                       "image": image}
            with contextlib.suppress(OSError, SafetensorError):  # costs a scan next time, no more
                keep(file, tensors, left_out)
        return images, captions, image, left_out
    images = Strings(tensors["images.text"], tensors["images.ends"])
    captions = Strings(tensors["captions.text"], tensors["captions.ends"])
    return images, captions, tensors["image"], left_out


def keep(file, tensors, left_out):
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    save_file(tensors, temporary, metadata={"left_out": json.dumps(left_out)})
    temporary.replace(file)


# --------------------------------------------------------------------------------------------- specs


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
    if not name:
        name = source.is_dir() and source.resolve().name or source.parent.name or source.stem
    return name, source, images and Path(images), weight and float(weight)


def expand(source):
    """The shards that SHARDS/{00000..00200}.tar, SHARDS/*.tar or a folder of them name; of another
    source [source]."""
    if numbers := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(source)):
        before, first, last, behind = numbers.groups()
        digits = len(first)
        every = range(int(first), int(last) + 1)
        return [Path(f"{before}{i:0{digits}d}{behind}") for i in every]
    if "*" in source.name or "?" in source.name:
        return sorted(source.parent.glob(source.name))
    if source.is_dir():
        return sorted(source.glob("*.tar")) or [source]
    return [source]


def image_root(file, images, names):
    """The folder that the image names of an annotation file are relative to: the one given, or one
    that has some of them."""
    # captions_train2017.json stands beside train2017/, one folder up
    split = file.stem.rsplit("_", 1)[-1]
    places = [file.parent, file.parent.parent, file.parent / "images", file.parent.parent / split]
    if images:
        places = [images]
    for place in places:
        if any(os.path.isfile(place / name) for name in names):
            return place
    raise FileNotFoundError(f"{file}: its first images, {names[0]} and so on, are in none of "
                            f"{', '.join(map(str, places))}; say where the images are: "
                            f"{file}@FOLDER")


def check_sources(spec, source, images, paths):
    """FileNotFoundError and ValueError if what a spec names is not there, or cannot be read
    together."""
    if not paths:
        raise FileNotFoundError(f"{source}: there is no such file or folder of image-text pairs")
    if images and (paths[0].suffix == ".tar" or source.is_dir()):
        raise ValueError(f"{spec}: @{images} is for files of annotations; a folder or shard holds "
                         "its images")
    if len({path.suffix for path in paths}) > 1:
        raise ValueError(f"{source}: names files of several kinds, {paths[0].name} and others; "
                         "give each a --data of its own")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder of image-text pairs")
        if not path.is_dir() and path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path}: image-text pairs are read from {', '.join(sorted(ENDINGS))} "
                             "and folders")


def read_pairs(spec, crop=True):
    """`[NAME=]SOURCE[@IMAGES][:WEIGHT]` -> Pairs. Each annotation is a pair, as the paper counts
    them.

    SOURCE is a .jsonl, .json, .csv or .tsv of images and captions, COCO's captions json, a folder
    of images with .txt files beside them, or WebDataset shards: SHARDS/{00000..00200}.tar,
    SHARDS/*.tar, a folder of them. Images are found beside an annotation file, in COCO's layout, or
    in IMAGES; whether all are there shows when they are read. What is damaged or empty is left out
    and named, by kind. FileNotFoundError and ValueError name file and remedy."""
    name, source, images, _ = parse_spec(spec)
    paths = expand(source)
    check_sources(spec, source, images, paths)
    of_shards = paths[0].suffix == ".tar"
    root = Path(os.path.commonpath([path.parent for path in paths])) if of_shards else source
    found, captions, image, left_out = kept_scan(paths, root)
    if not len(captions):
        left = [f"{len(places):,} left out: {problem}, such as {places[0]}"
                for problem, places in left_out.items()]
        why = f" ({'; '.join(left)})" if left else ""
        raise ValueError(f"{source}: not one image with a caption{why}; is this the right file?")
    if not of_shards and not source.is_dir():
        root = image_root(source, images, [found[i] for i in range(min(100, len(found)))])
    return Pairs(name, str(root), found, captions, image, left_out, crop)


# --------------------------------------------------------------- the command: what is in a data set


def contact_sheet(pairs, size, look, rows=5, columns=8):
    """A picture of samples drawn at random, look(file, rng) of each, with their captions."""
    rng = np.random.default_rng(0)
    margin, lines = 8, 3
    across = size + margin
    down = size + margin + 12 * lines
    rows = min(rows, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * across + margin, rows * down + margin), "white")
    draw = ImageDraw.Draw(sheet)
    drawn = rng.choice(len(pairs), min(len(pairs), rows * columns), replace=False)
    for n, i in enumerate(drawn):
        x = margin + n % columns * across
        y = margin + n // columns * down
        try:
            sheet.paste(look(pairs.file(i), rng), (x, y))
        except OSError:
            draw.rectangle((x, y, x + size, y + size), outline="red")
            draw.text((x + 4, y + 4), "cannot be read", fill="red")
        text = "\n".join(textwrap.wrap(pairs.captions[i], max(1, size // 6))[:lines])
        draw.text((x, y + size + 1), text, fill="black", font_size=10, spacing=1)
    return sheet


def describe(pairs, count, size_of):
    """Lines about a data set: pairs, captions, what was left out, and what `count` images drawn at
    random are like. size_of(file) -> (width, height) of what can be read, else OSError."""
    def look(file):
        try:
            return size_of(file)
        except OSError as error:
            return str(error)

    words = np.array([caption.count(" ") + 1 for caption in pairs.captions])
    few, many = np.quantile(words, (0.05, 0.95))
    each = len(pairs) / len(pairs.images)
    yield (f"{pairs.name}: {len(pairs):,} pairs, {len(pairs.images):,} images, {each:.3g} captions "
           "an image")
    yield (f"captions: {words.mean():.1f} words on average, {few:.0f} to {many:.0f} in nine of ten")
    for problem, places in pairs.left_out.items():
        yield f"left out, {problem}: {len(places):,}"
        yield from (f"    {place}" for place in places[:10])
    drawn = np.random.default_rng(0).permutation(len(pairs.images))[:count]
    files = [os.path.join(pairs.root, pairs.images[i]) for i in drawn]
    # Pillow decodes outside of Python's lock
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        looked = pool.map(look, files)
        found = list(tqdm(looked, total=len(files), desc="reading images", unit="image"))
    sides = np.array([size for size in found if not isinstance(size, str)])
    bad = [message for message in found if isinstance(message, str)]
    if len(sides):
        width, height = np.median(sides, axis=0)
        yield (f"images: {width:.0f} x {height:.0f} pixels in the median, the smallest side "
               f"{sides.min()}, the largest {sides.max()}")
    drawn = " drawn at random" if len(files) < len(pairs.images) else ""
    yield f"cannot be read: {len(bad):,} of {len(files):,} images{drawn}"
    yield from (f"    {message}" for message in bad[:20])


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="What is in a data set, and a contact sheet of it as the model sees it.",
        epilog=read_pairs.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", metavar="SPEC",
                        help="[NAME=]SOURCE[@IMAGES], as for train.py --data")
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"),
                        help="where to write the picture (default: %(default)s)")
    parser.add_argument("--check", type=int, default=1000, metavar="N",
                        help="read so many images, drawn at random; 0: all (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224,
                        help="of the ViT (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    import data  # here alone: what reads pairs does not need what makes samples of them

    # where standard output knows no UTF-8, a path with an é must not end the command
    sys.stdout.reconfigure(errors="replace")
    args = parse_arguments(argv)

    def look(file, rng):
        with data.open_image(file) as image:
            if pairs.crop:
                pixels = data.random_crop(image, args.image_size, rng)
            else:
                pixels = data.resize(image, args.image_size)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    try:
        is_picture = args.sheet.suffix.lower() in Image.registered_extensions()
        if not args.sheet.absolute().parent.is_dir() or not is_picture:
            raise FileNotFoundError(f"{args.sheet}: there is no folder {args.sheet.parent} to "
                                    "write it into, or it ends as no picture does (.png)")
        pairs = read_pairs(args.spec)
        count = args.check or len(pairs.images)
        for line in describe(pairs, count, lambda file: data.load_image(file).size):
            print(line)
        contact_sheet(pairs, args.image_size, look).save(args.sheet)
    except (OSError, ValueError) as error:
        print(f"pairs.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.sheet}: samples as the model sees them in training")


if __name__ == "__main__":
    main()
