# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""What lies on disk: image-text pairs in the formats in which people have them.

    pairs = read_pairs("coco/annotations/captions_train2017.json")
    pairs.file(0), pairs.captions[0]

    python pairs.py coco/annotations/captions_train2017.json    # what is in it, and a picture of it

Beside pairs there are conversations and questions, each in one form whatever file they come from,
and folders of images alone: read_conversations, read_questions, read_pictures.

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
import itertools
import json
import multiprocessing
import os
import re
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

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
class Items:
    """One data set: images, and for each item a text of JSON, in which questions or conversations
    stand as read_questions and read_conversations say."""

    name: str
    root: str  # folder that the images are named from
    images: Strings  # without duplicates: a file, or FILE.tar::MEMBER@OFFSET+SIZE
    texts: Strings
    image: np.ndarray  # (items,) which image each belongs to; -1: to none
    left_out: dict = field(default_factory=dict)  # why items were left out -> which
    crop: bool = True  # augment by random crops (Visual Genome's regions are only resized)
    cache: object = None  # cache[file] -> what a frozen VPG has made of it, used for its pixels

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        """Item i as an object, its image in it: a file as `file` gives it, or None."""
        return json.loads(self.texts[i]) | {"image": self.file(i)}

    def file(self, i):
        """The image of item i: a file, or a place in a shard; None if it has none."""
        number = self.image[i]
        return None if number < 0 else os.path.join(self.root, self.images[number])

    def files(self):
        """All images, without duplicates."""
        return [os.path.join(self.root, image) for image in self.images]

    def without(self, files, instead=False):
        """The items whose image is not one of `files`, or (instead) those whose image is."""
        # the last is that of -1: no image
        chosen = np.array([*(file in files for file in self.files()), False])
        if not instead and not chosen.any():
            return self
        return self.subset(np.flatnonzero(chosen[self.image] == instead))

    def by_image(self):
        """-> the captions' numbers in the order of their images, and where each image's begin:
        order[begins[i] : begins[i + 1]]"""
        counts = np.bincount(self.image, minlength=len(self.images))
        return np.argsort(self.image, kind="stable"), np.cumsum([0, *counts])

    def each_answer(self):
        """Of conversations: each answer as an item of its own, the last of its turns, with all turns
        before it. So an encoder-decoder has them: its encoder reads what was said before."""
        texts, image = [], []
        for number, text in zip(self.image, self.texts):
            item = json.loads(text)
            for i in range(len(item["turns"])):
                part = item | {"turns": item["turns"][: i + 1]}
                texts.append(json.dumps(part, ensure_ascii=False))
                image.append(number)
        return replace(self, texts=Strings.of(texts), image=np.array(image, np.int64))

    def subset(self, indices):
        image = self.image[indices]
        has_one = image >= 0
        used, image[has_one] = np.unique(image[has_one], return_inverse=True)
        return replace(self, images=self.images.take(used), texts=self.texts.take(indices),
                       image=image)


class Pairs(Items):
    """One data set of images and cleaned captions of them, each of which is a sample."""

    @property
    def captions(self):
        return self.texts


def hold_out(pairs, most=500, share=0.05):
    """The images to hold out for validation, at least two: a set of files."""
    images = sorted(pairs.files())
    count = max(2, min(most, int(len(images) * share)))
    return set(np.random.default_rng(0).permutation(images)[:count].tolist())


def one_caption_per_image(pairs, most):
    """The first caption of each of the first `most` images, for validation."""
    return pairs.subset(np.sort(np.unique(pairs.image, return_index=True)[1])[:most])


def clean_caption(text, max_words=50):
    """BLIP's caption clean-up: lower case, punctuation (and control characters) to spaces, single
    spaces, at most 50 words."""
    text = re.sub(r'[.!"()*#:;~\x00-\x1f\x7f-\x9f]', " ", text.lower())
    return " ".join(text.split()[:max_words])


def caption_text(caption, seen):
    """A caption as Pairs keeps it -> (text, problem)"""
    text = clean_caption(caption) if isinstance(caption, str) else ""
    return text, None if text else "empty caption"


def item_text(item, seen):
    """An item as Items keeps it -> (text, problem)"""
    return json.dumps(item, ensure_ascii=False), None


def question_text(item, seen):
    """As item_text, but each id is there once: it is what results are scored by."""
    if type(item["id"]) not in (str, int):
        return "", "an id that is neither text nor number"
    if not isinstance(item["question"], str | None):
        return "", "a question that is no text"
    if not all(isinstance(answer, str) for answer in item["answers"]):
        return "", "an answer that is no text"
    if item["id"] in seen:
        return "", "an id for the second time"
    seen.add(item["id"])
    return item_text(item, seen)


def collect(rows, as_text):
    """(where, image, content, problem) of many annotations -> (images, texts, image, left_out) of
    Items; as_text(content, what was seen before) -> (text, problem)."""
    number_of, texts, image_of, left_out = {}, [], [], {}
    seen = set()
    for where, image, content, problem in rows:
        text = ""
        if not problem and not isinstance(image, str | None):
            problem = "an image that is no text"
        if not problem:
            text, problem = as_text(content, seen)
        if not problem and re.search("[\ud800-\udfff]", (image or "") + text):
            problem = "broken Unicode"
        if problem:
            printable = where.encode(errors="backslashreplace").decode()
            left_out.setdefault(problem, []).append(printable)
            continue
        texts.append(text)
        image_of.append(-1 if image is None else number_of.setdefault(image, len(number_of)))
    return Strings.of(number_of), Strings.of(texts), np.array(image_of, np.int64), left_out


# ------------------------------------------------------------------------------- files of annotations


class Unusable(ValueError):
    """Why an annotation is left out."""


class Source:
    """A file or folder to be read, and what the entries of FORMATS want to know of it."""

    def __init__(self, path, root, images=None, split=None):
        self.path = path
        self.root = root  # folder that the images of a shard are named from
        self.images = images  # folder of the images of a file of annotations, where that is given
        self.split = split  # such as "train+restval"; None: as the reader has it

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

    @functools.cached_property
    def first_line(self):
        with open(self.path, "rb") as lines:
            return lines.readline(10_000).decode("utf-8-sig", errors="replace")

    def has(self, key, kind=object):
        """Is this an object in JSON with such a thing in it?"""
        content = self.content if self.ending == ".json" else None
        return isinstance(content, dict) and isinstance(content.get(key), kind)

    def objects(self, key=None):
        """(where, object, None) for every annotation of a list, of the list at a key, or of a file
        with one in each line; (where, None, problem) for one that is damaged."""
        if self.ending == ".jsonl":
            with open(self.path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    where = f"{self.path}, line {number}"
                    if not line.strip():
                        continue
                    try:
                        yield where, json.loads(line, strict=False), None
                    except (ValueError, RecursionError):
                        yield where, None, "damaged line"
        else:
            for number, row in enumerate(self.content[key] if key else self.content, 1):
                yield f"{self.path}, annotation {number}", row, None

    @functools.cached_property
    def first(self):
        """The first hundred objects of a list or of lines, which tell what the others are."""
        if self.ending == ".json" and not isinstance(self.content, list):
            return []
        some = itertools.islice(self.objects(), 100)
        return [row for _, row, _ in some if isinstance(row, dict)]


def tried(where, read_row, *row):
    """The (image, content) that read_row gives of an annotation -> rows; one with its problem, if
    there is any."""
    try:
        for image, content in read_row(*row):
            yield where, image, content, None
    except Unusable as error:
        yield where, None, None, str(error)
    except KeyError as error:
        yield where, None, None, f"no {error.args[0]}"
    except (AttributeError, IndexError, TypeError, ValueError):
        yield where, None, None, "an annotation of another layout"


def each(read_row, key=None):
    """A reader of lists and lines: read_row(object) gives (image, content) of each."""
    def read(source):
        for where, row, problem in source.objects(key):
            if not problem and not isinstance(row, dict):
                problem = "no object with image and caption"
            if problem:
                yield where, None, None, problem
            else:
                yield from tried(where, read_row, row)

    return read


def in_split(source, default):
    """As source.objects("images"), of the split that is asked for. ValueError if there is none."""
    wanted = set((source.split or default).split("+"))
    rows = list(source.objects("images"))
    there = {str(row.get("split")) for _, row, _ in rows if isinstance(row, dict)}
    if not wanted & there:
        raise ValueError(f"{source.path}: nothing is of the split {'+'.join(sorted(wanted))}; there "
                         f"are {', '.join(sorted(there))}: {source.path}#SPLIT")
    for where, row, _ in rows:
        if isinstance(row, dict) and row.get("split") in wanted:
            yield where, row


# ------------------------------------------------------------------------------------------ captions

# What annotations call the two, in the formats that lie around; the first that is there counts.
IMAGE_KEYS = ("image", "file_name", "filename", "filepath", "image_path", "path", "file", "image_name")
CAPTION_KEYS = ("caption", "captions", "text", "title", "sentence", "comment")


def best_caption(row, caption):
    """Of LAION-COCO's `all_captions` the one with the largest of `all_similarities`; where there
    are none, the caption given."""
    captions = row.get("all_captions")
    similarities = row.get("all_similarities")
    if not isinstance(captions, list) or not isinstance(similarities, list):
        return caption
    numbers = [(s, c) for s, c in zip(similarities, captions) if isinstance(s, (int, float))]
    return max(numbers, key=lambda pair: pair[0])[1] if numbers else caption


def image_of(row):
    for key in IMAGE_KEYS:
        if type(row.get(key)) in (str, int) and row[key] != "":
            return str(row[key])
    raise Unusable("no image")


def captions_of(row):
    """{image: ..., caption: ...}; a list of captions is that many pairs."""
    image = image_of(row)
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    caption = best_caption(row, caption)
    if caption is None:
        raise Unusable("no caption")
    for one in caption if isinstance(caption, list) else [caption]:
        yield image, one


def read_coco(source):
    """COCO's captions, which refer to images by id."""
    def read_row(row):
        image = names.get(str(row.get("image_id")))
        return captions_of({"image": image, "caption": row.get("caption")} if image else row)

    names = {}
    for image in source.content["images"]:
        if isinstance(image, dict) and "id" in image:
            names[str(image["id"])] = image.get("file_name")
    return each(read_row, "annotations")(source)


def karpathy_name(row):
    """COCO's are in folders, filepath; Flickr's are not."""
    return os.path.join(row.get("filepath", ""), row["filename"])


def read_karpathy(source):
    """Of dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json the splits train and
    restval, or another: FILE#test."""
    def read_row(row):
        for sentence in row["sentences"]:
            yield karpathy_name(row), sentence["raw"]

    for where, row in in_split(source, "train+restval"):
        yield from tried(where, read_row, row)


REGIONS_FOLDERS = ("VG_100K", "VG_100K_2")  # of their images


def regions_of(row, folder):
    """Visual Genome's regions: each phrase is a caption of the whole image. Images are in two
    folders."""
    name = f"{row['id'] if 'id' in row else row['image_id']}.jpg"
    image = next((f"{part}/{name}" for part in REGIONS_FOLDERS if (folder / part / name).exists()), name)
    for region in row["regions"]:
        yield image, region["phrase"]


def read_regions(source):
    folder = source.images or source.path.parent
    return each(functools.partial(regions_of, folder=folder))(source)


def textcaps_of(row):
    """A caption each; the test split has none."""
    yield f"{row['image_id']}.jpg", row["caption_str"]


def numbered_of(row):
    """cc_sbu_align and other lists by number: the image is NUMBER.jpg."""
    yield f"{row['image_id']}.jpg", row["caption"]


def read_numbered(source):
    return each(numbered_of, "annotations" if source.has("annotations") else None)(source)


def said_of(row):
    """The answer of a conversation of one turn, as LLaVA-Pretrain's and ShareGPT4V's captions."""
    ((image, conversation),) = conversation_of(row)
    if image is None:
        raise Unusable("no image")
    if len(conversation["turns"]) > 1:
        raise Unusable("a conversation of several turns, which is no caption")
    yield image, conversation["turns"][0][1]


def read_token_lines(source):
    """Flickr8k.token.txt, results_20130124.token of Flickr30k: IMAGE#NUMBER, a tab, the caption."""
    with open(source.path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{source.path}, line {number}"
            found = re.fullmatch(r"(\S.*)#\d+\t(.*)\n?", line)
            if found:
                yield where, found[1], found[2], None
            elif line.strip():
                yield where, None, None, "damaged line"


def read_table(source):
    """A table whose first row names its columns: .csv, .tsv, Flickr8k's captions.txt, and
    Flickr30k's results.csv with its bars."""
    file = source.path
    bars = source.first_line.count("|") >= 2
    delimiter = "|" if bars else "\t" if source.ending == ".tsv" else ","
    # strict, or an open quote swallows what follows; where there are bars, quotes mean nothing
    options = {"quoting": csv.QUOTE_NONE} if bars else {"strict": True}
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, delimiter=delimiter, **options)
        try:
            columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
        except csv.Error as error:
            raise ValueError(f"{file}: no table ({error})") from error
        if not (columns.keys() & set(IMAGE_KEYS) and columns.keys() & set(CAPTION_KEYS)):
            raise ValueError(f"{file}: its first row must name a column {' or '.join(IMAGE_KEYS)} "
                             f"and one {' or '.join(CAPTION_KEYS)}; it names "
                             f"{', '.join(columns)[:200] or 'none'}")
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
            if any(cell.strip() for cell in row.get(None, ())):
                # a text with the delimiter in it, which would lose its end
                yield f"{file}, line {start}", None, None, "more cells than columns"
                continue
            row = {key: row[name] for key, name in columns.items()}
            yield from tried(f"{file}, line {start}", captions_of, row)


# ------------------------------------------------------------------------------------- conversations

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}
IMAGE_MARK = "<image>"


def role_of(name):
    if name not in ROLES:
        raise Unusable(f"a turn of {name!r}")
    return ROLES[name]


def conversation(id, said):
    """[(role, text), ...] -> {"id", "turns": [[question, answer], ...]}, and "system" where such a
    text comes first.

    What stands before the first question is dropped, as LLaVA does. The mark of the image's place
    is taken out: it stands in the first question, and an image comes before it. Unusable if turns
    do not alternate, or an image comes later."""
    item = {"id": id, "turns": []}
    if said and said[0][0] == "system":
        item["system"] = said[0][1]
        said = said[1:]
    while said and said[0][0] != "user":
        said = said[1:]
    questions, answers = said[::2], said[1::2]
    roles = {role for role, _ in questions}, {role for role, _ in answers}
    if not said or len(said) % 2 or roles != ({"user"}, {"assistant"}):
        raise Unusable("turns that do not alternate")
    if sum(text.count(IMAGE_MARK) for _, text in said) > 1:
        raise Unusable("several images")
    if any(IMAGE_MARK in text for _, text in said[1:]):
        raise Unusable("an image in a later turn")
    if not all(text.strip() for _, text in answers):
        raise Unusable("an empty answer")
    for (_, question), (_, answer) in zip(questions, answers):
        item["turns"].append([question.replace(IMAGE_MARK, "").strip(), answer])
    return item


def one_image(images, said):
    """The one of a list of images, or of none. Unusable if there are several, or none where one is
    spoken of."""
    images = [image.get("path") if isinstance(image, dict) else image for image in images]
    if len(images) > 1:
        raise Unusable("several images")
    if not images and any(IMAGE_MARK in text for _, text in said):
        raise Unusable("no image")
    if images and not (isinstance(images[0], str) and images[0]):
        raise Unusable("no image")
    return images[0] if images else None


def conversation_of(row):
    """LLaVA's, ShareGPT4V's: {"id", "image", "conversations": [{"from", "value"}, ...]}."""
    if "video" in row:
        raise Unusable("a video")
    said = [(role_of(turn["from"]), turn["value"]) for turn in row["conversations"]]
    images = row.get("image")
    images = images if isinstance(images, list) else [] if images is None else [images]
    yield one_image(images, said), conversation(row.get("id"), said)


def messages_of(row):
    """transformers' and TRL's: {"messages": [{"role", "content": text or parts}, ...], "images"}."""
    said, images = [], []
    for message in row["messages"]:
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        texts = []
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image":
                texts.insert(0, IMAGE_MARK)
                images += [part[key] for key in ("image", "path", "url") if key in part]
            else:
                raise Unusable(f"a part of the kind {part['type']}")
        said.append((role_of(message["role"]), "\n".join(texts)))
    images = images or row.get("images") or list(filter(None, [row.get("image")]))
    yield one_image(images, said), conversation(row.get("id"), said)


def aligned_of(row):
    """MiniGPT-4's second-stage data: one turn, whose instruction the command draws."""
    image, caption = next(numbered_of(row))
    if not (isinstance(caption, str) and caption.strip()):
        raise Unusable("no caption")
    yield image, {"id": str(row["image_id"]), "turns": [[None, caption]]}


def read_aligned(source):
    return each(aligned_of, "annotations" if source.has("annotations") else None)(source)


# ----------------------------------------------------------------------------------------- questions


def coco_number(name):
    """The image id in COCO's names, "val2014/COCO_val2014_000000391895.jpg" -> 391895; another name as
    it is."""
    digits = re.search(r"(?:^|/)(?:COCO_\w+?_)?(\d{12})\.jpg$", name)
    return int(digits[1]) if digits else name


def coco_name(id, part="val2014"):
    return f"COCO_{part}_{int(id):012d}.jpg"


def read_references(source):
    """LAVIS's lists for COCO and NoCaps, or a caption a row: all captions of an image together."""
    found = {}

    def read_row(row):
        image = image_of(row)
        captions = row.get("caption") or []
        captions = captions if isinstance(captions, list) else [captions]
        if not all(isinstance(caption, str) for caption in captions):
            raise Unusable("a caption that is no text")
        id = row.get("img_id", coco_number(image))
        if (image, id) in found:
            found[image, id]["answers"] += captions
            return
        found[image, id] = {"id": id, "question": None, "answers": list(captions)}
        yield image, found[image, id]

    yield from list(each(read_row)(source))  # each item is whole at the end alone


def read_coco_references(source):
    """COCO's and NoCaps' captions, all of an image together. "group" is NoCaps' domain."""
    captions = {}
    for where, row, _ in source.objects("annotations"):
        if isinstance(row, dict) and isinstance(row.get("caption"), str):
            texts, _ = captions.setdefault(str(row.get("image_id")), ([], where))
            texts.append(row["caption"])

    def read_row(row):
        answers, _ = captions.pop(str(row["id"]), ([], None))
        if not answers:
            raise Unusable("no caption")
        item = {"id": row["id"], "question": None, "answers": answers}
        if "domain" in row:
            item["group"] = row["domain"]
        yield row.get("file_name") or coco_name(row["id"]), item

    yield from each(read_row, "images")(source)
    for _, where in captions.values():
        yield where, None, None, "captions of an image that is not listed"


def read_karpathy_references(source):
    """All captions of each image of the split test, or another: FILE#val."""
    def read_row(row):
        id = row.get("cocoid", row.get("imgid"))
        answers = [sentence["raw"] for sentence in row["sentences"]]
        yield karpathy_name(row), {"id": id, "question": None, "answers": answers}

    for where, row in in_split(source, "test"):
        yield from tried(where, read_row, row)


def read_textcaps_references(source):
    """All five captions of an image, which the file names with each of them."""
    seen = set()

    def read_row(row):
        image = row["image_id"]
        if image not in seen:
            seen.add(image)
            answers = row["reference_strs"]
            yield f"{image}.jpg", {"id": image, "question": None, "answers": answers}

    return each(read_row, "data")(source)


def read_vqa(source):
    """VQAv2's and OK-VQA's questions, and beside them, by its name, the file of their answers.

    "answers" are ten texts, none where that file is missing (test2015); "answer" is the most
    frequent one, "group" the kind of answer."""
    name = source.path.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    notes = Source(source.path.with_name(name), source.root)
    annotated = {}
    have_answers = name != source.path.name and notes.path.is_file()
    if have_answers:
        if not notes.has("annotations", list):
            raise ValueError(f"{notes.path}: holds no annotations of {source.path.name}")
        for where, row, _ in notes.objects("annotations"):
            if isinstance(row, dict) and "question_id" in row:
                if row["question_id"] in annotated:
                    yield where, None, None, "answers to one question for the second time"
                    continue
                annotated[row["question_id"]] = row, where
    found = re.search(r"(train|val|test)20\d\d", source.path.name)
    part = source.content.get("data_subtype") or (found[0] if found else "val2014")
    asked = set()

    def read_row(row):
        note, _ = annotated.get(row["question_id"], ({}, None))
        asked.add(row["question_id"])
        if have_answers and not note:
            raise Unusable("no answers")
        item = {"id": row["question_id"], "question": row["question"],
                "answers": [answer["answer"] for answer in note.get("answers", [])]}
        if note:
            item["answer"] = note.get("multiple_choice_answer")
            item["group"] = note.get("answer_type")
        yield coco_name(row["image_id"], part), item

    yield from each(read_row, "questions")(source)
    for id, (_, where) in annotated.items():
        if id not in asked:
            yield where, None, None, "answers to a question that is not asked"


def asked_of(row):
    """LAVIS's lists for VQAv2, OK-VQA (ten answers) and GQA (one)."""
    answers = row.get("answer") or []
    answers = answers if isinstance(answers, list) else [answers]
    yield row["image"], {"id": row["question_id"], "question": row["question"], "answers": answers}


def by_id(read_row):
    """A reader of objects {id: question}: read_row(id, question) gives (image, content)."""
    def read(source):
        for id, row in source.content.items():
            yield from tried(f"{source.path}, question {id}", read_row, id, row)

    return read


def gqa_of(id, row):
    """Stanford's; the test splits have no answer."""
    answers = [row["answer"]] if "answer" in row else []
    item = {"id": id, "question": row["question"], "answers": answers}
    if "types" in row:
        item["group"] = row["types"]["structural"]
    yield f"{row['imageId']}.jpg", item


UNASKED = ("image", "lecture", "solution")  # of ScienceQA's questions


def read_scienceqa(source):
    """problems.json, of the split test or another (FILE#train; pid_splits.json beside it has the
    small ones), and captions.json, where it lies beside.

    "choices" and "answer", the number of the right one, which "answers" holds as a text; hint,
    caption, subject, grade, topic and the like as they are, but no lecture and solution, which nobody is
    asked."""
    def beside(name):
        file = Source(source.path.with_name(name), source.root)
        return file.content if file.path.is_file() and isinstance(file.content, dict) else {}

    def read_row(id, row):
        number = row["answer"]
        if not isinstance(number, int) or not 0 <= number < len(row["choices"]):
            raise Unusable("an answer that is none of the choices")
        item = {"id": id} | {key: value for key, value in row.items() if key not in UNASKED}
        item["answers"] = [row["choices"][number]]
        if id in captions:
            item["caption"] = captions[id]
        yield row.get("image") and f"{row['split']}/{id}/{row['image']}", item

    captions = beside("captions.json").get("captions", {})
    lists = beside("pid_splits.json")
    rows = source.content
    for split in (source.split or "test").split("+"):
        of_split = [id for id, row in rows.items() if isinstance(row, dict) and row.get("split") == split]
        ids = lists.get(split) or of_split
        if not ids:
            raise ValueError(f"{source.path}: nothing is of the split {split}: {source.path}#SPLIT, "
                             "where SPLIT is train, val, test, or of pid_splits.json beside it")
        for id in ids:
            where = f"{source.path}, question {id}"
            if id not in rows:
                yield where, None, None, "a question that is not there"
            else:
                yield from tried(where, read_row, id, rows[id])


# ------------------------------------------------------------------------------------------- folders

IMAGE_TYPES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm",
               "pnm", "avif"}
UNREAD_TYPES = {"heic", "heif", "jxl", "jp2"}  # those that people have
METADATA = ("metadata.jsonl", "metadata.csv")  # of Hugging Face's image folders


def is_shown(name):
    return not name.startswith(".") and name != "__MACOSX"


def walk(folder, metadata=METADATA):
    """-> (file, None) for everything in a folder and those below it, in order, and (None, row) for
    what cannot be looked into. Hidden names are passed over, and macOS's copies: ._1.jpg, __MACOSX/."""
    unreadable = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if is_shown(name))
        described = [name for name in metadata if name in names]
        if described:
            folders.clear()  # what is in them is named there, too
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                yield None, (os.path.join(place, name), None, None, "link to a folder")
        for name in described or sorted(filter(is_shown, names)):
            yield os.path.join(place, name), None
    for error in unreadable:
        yield None, (str(error.filename), None, None, "unreadable folder")


def unread(file):
    return file, None, None, "a format that is not read; convert it to JPEG or PNG"


def text_beside(stem):
    """The captions of an image: the lines of a .txt beside it, or what a .json says (img2dataset).
    Unusable if there are none."""
    text = Path(stem + ".txt")
    meta = Path(stem + ".json")
    try:
        if text.is_file() or not meta.is_file():
            lines = text.read_text(encoding="utf-8-sig").split("\n")
            return [line for line in lines if line.strip()] or [""]
        row = json.loads(meta.read_bytes(), strict=False)
        captions = [caption for _, caption in captions_of({**row, "image": stem})]
    except FileNotFoundError:
        raise Unusable("no caption file") from None
    except Unusable:
        raise
    except (OSError, ValueError, TypeError, RecursionError):
        raise Unusable("damaged caption file") from None
    return captions


def read_folder(source):
    """Images anywhere in a folder, and beside each a .txt of its captions, one a line, or a .json
    (img2dataset's "files"); or metadata.jsonl or .csv, which names those beside it."""
    folder = source.path
    for file, problem in walk(folder):
        stem, _, kind = (file or "").rpartition(".")
        if problem:
            yield problem
        elif os.path.basename(file) in METADATA:
            place = os.path.dirname(os.path.relpath(file, folder))
            for where, image, caption, problem in read_rows(Source(Path(file), folder), "captions"):
                yield where, image and os.path.join(place, image), caption, problem
        elif kind.lower() in IMAGE_TYPES:
            try:
                captions = text_beside(stem)
            except Unusable as error:
                damaged = str(error).startswith("damaged")
                beside = (f for f in (stem + ".txt", stem + ".json") if os.path.exists(f))
                where = next(beside, file)
                yield where if damaged else file, None, None, str(error)
            else:
                for caption in captions:
                    yield file, os.path.relpath(file, folder), caption, None
        elif kind.lower() in UNREAD_TYPES:
            yield unread(file)


def read_images(source):
    """Images anywhere in a folder, for what needs no captions."""
    for file, problem in walk(source.path, ()):
        kind = (file or "").rpartition(".")[2].lower()
        if problem:
            yield problem
        elif kind in IMAGE_TYPES:
            image = os.path.relpath(file, source.path)
            yield file, image, {"id": image}, None
        elif kind in UNREAD_TYPES:
            yield unread(file)


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
    row = {key: row[key] for key in SHARD_KEYS if key in row}
    yield from tried(where, captions_of, row)


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
    readers: dict  # {"captions" | "conversations" | "questions" | "images": source -> rows}
    folders: tuple = ()  # where its images use to lie, beside the file
    has_splits: bool = False


def anything(source):
    return True


def rows_have(*keys):
    """Does a list or a file of lines hold objects with all of these keys?"""
    return lambda source: any(all(key in row for key in keys) for row in source.first)


def list_at(key, *keys):
    """Is at this key of an object in JSON a list, of objects with all of these keys?"""
    def looks(source):
        if not source.has(key, list):
            return False
        some = [row for row in source.content[key][:100] if isinstance(row, dict)]
        return not keys or any(all(k in row for k in keys) for row in some)

    return looks


def values_have(*keys):
    """Does an object in JSON hold, for each id, an object with all of these keys?"""
    def looks(source):
        if not isinstance(source.content, dict):
            return False
        some = list(source.content.values())[:100]
        return any(isinstance(row, dict) and all(key in row for key in keys) for row in some)

    return looks


def looks_like_numbers(source):
    """Are there numbers of images, and no names?"""
    named = any(key in row for row in source.first for key in IMAGE_KEYS)
    return not named and rows_have("image_id", "caption")(source)


def looks_like_coco(source):
    return source.has("images", list) and source.has("annotations", list)


def looks_like_list(source):
    return source.ending == ".jsonl" or isinstance(source.content, list)


def looks_like_token_lines(source):
    return bool(re.match(r"\S.*#\d+\t", source.first_line))


LISTS = (".json", ".jsonl")
TABLES = (".csv", ".tsv", ".txt")
COCO_FOLDERS = ("val2014", "train2014", "train2017", "val2017", "val", "coco/val2014", "coco/train2014")
FLICKR_FOLDERS = ("Images", "Flicker8k_Dataset", "flickr30k_images", "flickr30k-images")

# The first that fits counts, and of its readers the first where no other is asked for.
FORMATS = [
    Format((".tar",), "WebDataset shards of KEY.jpg with KEY.txt or KEY.json", anything,
           {"captions": read_shard}),
    Format(("/",), "a folder of images, with .txt or .json files beside them or metadata.jsonl",
           anything, {"captions": read_folder, "images": read_images}),
    Format((".txt", ".token"), "lines IMAGE#NUMBER, tab, caption (Flickr8k.token.txt)",
           looks_like_token_lines, {"captions": read_token_lines}, FLICKR_FOLDERS),
    Format(TABLES, "a table whose first row names its columns (.csv, captions.txt, results.csv)",
           anything, {"captions": read_table}, FLICKR_FOLDERS),
    Format(LISTS, 'LLaVA\'s "conversations"', rows_have("conversations"),
           {"conversations": each(conversation_of), "captions": each(said_of)}, COCO_FOLDERS),
    Format(LISTS, '"messages" of roles', rows_have("messages"),
           {"conversations": each(messages_of)}, COCO_FOLDERS),
    Format(LISTS, 'LAVIS\'s questions, a list of {"image", "question", "answer"}',
           rows_have("image", "question", "question_id"), {"questions": each(asked_of)},
           COCO_FOLDERS),
    Format(LISTS, 'cc_sbu_align\'s {"image_id", "caption"}', looks_like_numbers,
           {"conversations": read_aligned, "captions": read_numbered}, ("image",)),
    Format((".json",), 'Visual Genome\'s {"regions": [{"phrase"}]}', rows_have("regions"),
           {"captions": read_regions}),
    Format((".json",), 'Karpathy\'s {"images": [{"sentences", "split"}]}',
           list_at("images", "sentences", "split"),
           {"captions": read_karpathy, "questions": read_karpathy_references},
           ("Images", *FLICKR_FOLDERS), has_splits=True),
    Format((".json",), 'COCO\'s {"images", "annotations"}', looks_like_coco,
           {"captions": read_coco, "questions": read_coco_references}, COCO_FOLDERS),
    Format((".json",), 'cc_sbu_align\'s {"annotations": [{"image_id", "caption"}]}',
           list_at("annotations", "image_id", "caption"),
           {"conversations": read_aligned, "captions": read_numbered}, ("image",)),
    Format((".json",), 'TextCaps\' {"data": [{"image_id", "caption_str"}]}',
           list_at("data", "image_id", "caption_str"),
           {"captions": each(textcaps_of, "data"), "questions": read_textcaps_references},
           ("train_images", "test_images", "train", "val", "test")),
    Format((".json",), 'VQA\'s {"questions"}, and its annotations beside it',
           list_at("questions", "question_id", "image_id"), {"questions": read_vqa}, COCO_FOLDERS),
    Format((".json",), 'GQA\'s {id: {"question", "imageId"}}', values_have("question", "imageId"),
           {"questions": by_id(gqa_of)}),
    Format((".json",), 'ScienceQA\'s {id: {"question", "choices"}}',
           values_have("question", "choices"), {"questions": read_scienceqa}, has_splits=True),
    Format(LISTS, 'a list of {"image", "caption"}', looks_like_list,
           {"captions": each(captions_of), "questions": read_references}, COCO_FOLDERS),
]
ENDINGS = {ending for format in FORMATS for ending in format.endings}
AS_TEXT = {"captions": caption_text, "conversations": item_text, "questions": question_text,
           "images": item_text}


def what_is_in(source):
    """What a file holds, in words."""
    if source.ending != ".json":
        return f"lines such as {source.first_line.strip()[:80]!r}"
    content = source.content
    if not isinstance(content, dict):
        return f"no object and no list, but {json.dumps(content)[:40]}"
    keys = [repr(key) for key in list(content)[:8]]
    return f"an object with the keys {', '.join(keys)}" if keys else "an empty object"


def find_format(source, kind):
    """The entry of FORMATS that a source is of, with a reader of that kind. ValueError says what
    was found, and what would do."""
    there = [format for format in FORMATS if source.ending in format.endings]
    format = next((format for format in there if format.looks(source)), None)
    known = "; ".join(format.description for format in there if kind in format.readers)
    if not format:
        raise ValueError(f"{source.path}: holds {what_is_in(source)}. It is read if it holds {known}")
    if kind not in format.readers:
        raise ValueError(f"{source.path}: holds {format.description}, which gives "
                         f"{' and '.join(format.readers)}, but no {kind}; these are in {known}")
    if source.split and not format.has_splits:
        raise ValueError(f"{source.path}#{source.split}: {format.description} has no splits")
    return format


# --------------------------------------------------------------------------------------------- scans


def read_rows(source, kind):
    return find_format(source, kind).readers[kind](source)


def scan_one(source, kind):
    """A shard, folder or file of annotations -> (images, texts, image, left_out) of Items."""
    return collect(read_rows(source, kind), AS_TEXT[kind])


def scan(sources, kind):
    """As scan_one, of many shards on all cores, or of one other source."""
    if len(sources) == 1:
        rows = read_rows(sources[0], kind)
        bar = tqdm(rows, desc=f"scan {sources[0].path}", unit=f" {kind}", delay=3)
        return collect(bar, AS_TEXT[kind])
    count = len(sources)
    bar = functools.partial(tqdm, desc=f"scan {sources[0].root}", unit="shard", total=count)
    if count < 8:  # processes take seconds to start
        return join_scans([scan_one(source, kind) for source in bar(sources)])
    workers = min(os.cpu_count(), count)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        return join_scans(list(bar(pool.map(functools.partial(scan_one, kind=kind), sources))))


def join_scans(parts):
    """The scans of several shards -> one."""
    images, texts, image, left_out = zip(*parts)
    before = np.cumsum([0, *map(len, images)])
    image = np.concatenate([of_part + b for of_part, b in zip(image, before)])
    joined = {}
    for of_part in left_out:
        for problem, places in of_part.items():
            joined.setdefault(problem, []).extend(places)
    return Strings.joined(images), Strings.joined(texts), image, joined


KEPT_FROM = 100_000  # pairs


def state_of(path):
    """What changes when a file does. Links to one file, as in the Hub's cache, are told apart."""
    stat = path.stat()
    return [str(path.absolute()), str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def regions_folders_of(source):
    """What changes when images come to the folders that regions_of looks into; None for one that is
    not there."""
    folders = [(source.images or source.path.parent) / name for name in REGIONS_FOLDERS]
    return [folder.stat().st_mtime_ns if folder.is_dir() else None for folder in folders]


def kept_scan(sources, kind):
    """scan(), a large one of captions (but of a folder) kept in $VPGTRANS_CACHE
    (~/.cache/vpgtrans) until a source changes, and then mapped into memory. -> (images, texts,
    image, left_out), and the format's folders of images"""
    first = sources[0]
    # the texts in a folder may change without a trace in it; questions are in several files
    if first.path.is_dir() or kind != "captions":
        return scan(sources, kind), find_format(first, kind).folders
    state = [6, first.split, str(first.images), [state_of(source.path) for source in sources],
             regions_folders_of(first)]
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("VPGTRANS_CACHE", "~/.cache/vpgtrans")).expanduser()
    file = folder / f"{name}.safetensors"
    try:
        with safe_open(file, framework="pt") as saved:
            tensors = {name: saved.get_tensor(name).numpy() for name in saved.keys()}
            metadata = {key: json.loads(value) for key, value in saved.metadata().items()}
    except Exception:  # not there yet, or damaged
        images, texts, image, left_out = scan(sources, kind)
        folders = find_format(first, kind).folders
        if len(texts) >= KEPT_FROM:
            tensors = {"images.text": images.text, "images.ends": images.ends,
                       "texts.text": texts.text, "texts.ends": texts.ends, "image": image}
            with contextlib.suppress(OSError, SafetensorError):  # costs a scan next time, no more
                keep(file, tensors, {"left_out": left_out, "folders": folders})
        return (images, texts, image, left_out), folders
    images = Strings(tensors["images.text"], tensors["images.ends"])
    texts = Strings(tensors["texts.text"], tensors["texts.ends"])
    return (images, texts, tensors["image"], metadata["left_out"]), metadata["folders"]


def keep(file, tensors, metadata):
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(file)


# --------------------------------------------------------------------------------------------- specs


class Spec(NamedTuple):
    name: str
    source: Path
    images: Path | None
    weight: float | None
    split: str | None


SPEC = r"(?:([\w-]+)=)?([^@]+?)(?:#([\w+-]+))?(?:@(.+?))?(?::(\d+(?:\.\d+)?))?"
AROUND = r"(?s)(?:([\w-]+)=)?(.+?)(?::(\d+(?:\.\d+)?))?"  # of a spec: name, what is between, weight


def is_there(source):
    """Does it exist, or one of the shards that it names?"""
    if not source or os.path.exists(source):
        return bool(source)
    return any(path.exists() for path in expand(Path(source)))


def what_is_there(text):
    """`SOURCE[#SPLIT][@IMAGES]` of a SOURCE that is there, and may have signs in it -> (source, split,
    images), with the longest that fits; None if none does."""
    for at in [len(text), *(found.start() for found in reversed([*re.finditer("@", text)]))]:
        before, images = text[:at], text[at + 1 :] or None
        if text[at:] == "@":  # and nothing behind it
            continue
        source, split = re.fullmatch(r"(?s)(.*?)(?:#([\w+-]+))?", before).groups()
        if is_there(before):
            return before, None, images
        if is_there(source):
            return source, split, images
    return None


def parse_spec(spec):
    """`[NAME=]SOURCE[#SPLIT][@IMAGES][:WEIGHT]` -> Spec; what exists is a SOURCE,
    whatever signs are in it. Without NAME, a folder has its own name, a file that of its folder."""
    name = split = images = weight = None
    around = re.fullmatch(AROUND, spec)
    if os.path.exists(spec):
        source = spec
    elif found := around and what_is_there(around[2]):
        name, _, weight = around.groups()
        source, split, images = found
    elif parts := re.fullmatch(SPEC, spec):
        name, source, split, images, weight = parts.groups()
    else:
        raise ValueError(f"{spec!r} does not read [NAME=]SOURCE[#SPLIT][@IMAGES][:WEIGHT]")
    source = Path(source)
    if not name:
        name = source.is_dir() and source.resolve().name or source.parent.name or source.stem
    return Spec(name, source, images and Path(images), weight and float(weight), split)


def expand(source):
    """The shards that SHARDS/{00000..00200}.tar, SHARDS/*.tar or a folder of them name; of another
    source [source]. ValueError if a folder holds shards and pairs: which are meant?"""
    if numbers := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(source)):
        before, first, last, behind = numbers.groups()
        digits = len(first)
        every = range(int(first), int(last) + 1)
        return [Path(f"{before}{i:0{digits}d}{behind}") for i in every]
    if "*" in source.name or "?" in source.name:
        return sorted(source.parent.glob(source.name))
    if source.is_dir():
        shards = sorted(filter(is_shard, source.iterdir()))
        pair = shards and pair_in(source)
        if pair:
            raise ValueError(f"{source}: holds shards, {shards[0].name}, and pictures with texts beside "
                             f"them, {pair}; for the shards say {source}/*.tar, for the pictures move "
                             "the shards elsewhere")
        return shards or [source]
    return [source]


def is_shard(path):
    return path.suffix.lower() == ".tar" and not path.is_dir()


def pair_in(folder):
    """The name of a picture in a folder that has a text beside it, or "" if there is none."""
    names = set(os.listdir(folder))
    for name in sorted(names):
        stem, _, kind = name.rpartition(".")
        if kind.lower() in IMAGE_TYPES and is_shown(name) and names & {f"{stem}.txt", f"{stem}.json"}:
            return name
    return ""


def image_root(file, images, names, folders=()):
    """The folder that the image names of an annotation file are relative to: the one given, or one
    that has some of them."""
    # captions_train2017.json stands beside train2017/, one folder up
    split = file.stem.rsplit("_", 1)[-1]
    near = [images] if images else [file.parent, file.parent.parent]
    places = [*near, *(place / name for place in near for name in (split, "images", *folders))]
    for place in places:
        if any(os.path.isfile(place / name) for name in names):
            return place
    if os.path.isabs(names[0]):  # as in LAVIS's vg_caption.json
        folder = os.path.dirname(names[0])
        raise FileNotFoundError(f"{file}: its images have whole paths, {names[0]} and so on, where nothing "
                                f"lies. Take the folders off, as with sed -i 's#{folder}/##g' {file}, and "
                                f"say where the images are: {file}@FOLDER")
    where = ", ".join(map(str, near))
    raise FileNotFoundError(f"{file}: its first images, {names[0]} and so on, are not in {where}, nor "
                            f"in {', '.join(dict.fromkeys([split, 'images', *folders]))} there; say "
                            f"where the images are: {file}@FOLDER")


def check_sources(spec, paths):
    """FileNotFoundError and ValueError if what a spec names is not there, or cannot be read
    together."""
    source = spec.source
    if not paths:
        raise FileNotFoundError(f"{source}: there is no such file or folder of image-text pairs")
    if spec.images and (is_shard(paths[0]) or source.is_dir()):
        raise ValueError(f"{source}@{spec.images}: @{spec.images} is for files of annotations; a "
                         "folder or shard holds its images")
    if len({path.suffix.lower() for path in paths}) > 1:
        raise ValueError(f"{source}: names files of several kinds, {paths[0].name} and others; "
                         "give each a --data of its own")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder of image-text pairs")
        if not path.is_dir() and path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path}: image-text pairs are read from {', '.join(sorted(ENDINGS))} "
                             "and folders")


def find_sources(spec):
    """-> the Sources that a Spec names: one, or several shards."""
    paths = expand(spec.source)
    check_sources(spec, paths)
    root = spec.source
    if is_shard(paths[0]):
        root = Path(os.path.commonpath([path.parent for path in paths]))
    return [Source(path, root, spec.images, spec.split) for path in paths]


def read(spec, kind, crop=True):
    """A spec -> Items of a kind, or Pairs. FileNotFoundError and ValueError name file and
    remedy."""
    spec = parse_spec(spec)
    sources = find_sources(spec)
    (images, texts, image, left_out), folders = kept_scan(sources, kind)
    if not len(texts):
        left = [f"{len(places):,} left out: {problem}, such as {places[0]}"
                for problem, places in left_out.items()]
        why = f" ({'; '.join(left)})" if left else ""
        what = "image with a caption" if kind == "captions" else f"item of {kind}"
        raise ValueError(f"{spec.source}: not one {what}{why}; is this the right file?")
    root = sources[0].root
    if len(images) and sources[0].ending not in (".tar", "/"):
        names = [images[i] for i in range(min(100, len(images)))]
        root = image_root(spec.source, spec.images, names, folders)
    make = Pairs if kind == "captions" else Items
    return make(spec.name, str(root), images, texts, image, left_out, crop)


def read_pairs(spec, crop=True):
    """`[NAME=]SOURCE[#SPLIT][@IMAGES][:WEIGHT]` -> Pairs. Each annotation is a pair, as the paper
    counts them.

    SOURCE is a .jsonl, .json, .csv or .tsv of images and captions, or such a file of a known data
    set (FORMATS), a folder of images with .txt files beside them, or WebDataset shards:
    SHARDS/{00000..00200}.tar, SHARDS/*.tar, a folder of them. Images are found beside an annotation
    file, in the data set's own folders, or in IMAGES; whether all are there shows when they are
    read. What is damaged or empty is left out and named, by kind. FileNotFoundError and ValueError
    name file and remedy."""
    return read(spec, "captions", crop)


def read_conversations(spec, crop=False):
    """A spec, as for read_pairs -> Items of conversations, {"id", "turns": [[question, answer],
    ...]}, of one image each or none; "system" where one comes first. A question None is to be drawn
    (cc_sbu_align). Not cropped, nor mirrored: answers say left and right."""
    return read(spec, "conversations", crop)


def read_questions(spec, crop=False):
    """A spec, as for read_pairs -> Items {"id", "question", "answers": all references}, and "group",
    what the metrics are split by, where there is such a thing. The question is None where a caption
    is asked for; ScienceQA's have more to them (read_scienceqa)."""
    return read(spec, "questions", crop)


def read_pictures(spec, crop=True):
    """A folder -> Items of its images, for what needs no captions."""
    return read(spec, "images", crop)


# --------------------------------------------------------------- the command: what is in a data set


def words_of(item):
    """What is written below an item's image."""
    if "turns" in item:
        return " / ".join(f"{question or '...'} > {answer}" for question, answer in item["turns"])
    answers = " | ".join(dict.fromkeys(map(str, item.get("answers", ()))))
    return f"{item['question']} > {answers}" if item.get("question") else answers


def contact_sheet(items, size, look, rows=5, columns=8):
    """A picture of samples drawn at random, look(file, rng) of each, with their captions, or what
    is asked and answered."""
    rng = np.random.default_rng(0)
    margin, lines = 8, 3 if isinstance(items, Pairs) else 8
    across = size + margin
    down = size + margin + 12 * lines
    rows = min(rows, -(-len(items) // columns))
    sheet = Image.new("RGB", (columns * across + margin, rows * down + margin), "white")
    draw = ImageDraw.Draw(sheet)
    drawn = rng.choice(len(items), min(len(items), rows * columns), replace=False)
    for n, i in enumerate(drawn):
        x = margin + n % columns * across
        y = margin + n // columns * down
        file = items.file(i)
        try:
            if file is None:
                draw.text((x + 4, y + 4), "no image", fill="gray")
            else:
                sheet.paste(look(file, rng), (x, y))
        except OSError:
            draw.rectangle((x, y, x + size, y + size), outline="red")
            draw.text((x + 4, y + 4), "cannot be read", fill="red")
        text = items.captions[i] if isinstance(items, Pairs) else words_of(items[i])
        text = "\n".join(textwrap.wrap(text, max(1, size // 6))[:lines])
        draw.text((x, y + size + 1), text, fill="black", font_size=10, spacing=1)
    return sheet


def words_in(name, texts):
    """A line about how long some texts are."""
    words = np.array([len(text.split()) for text in texts])
    few, many = np.quantile(words, (0.05, 0.95))
    return f"{name}: {words.mean():.1f} words on average, {few:.0f} to {many:.0f} in nine of ten"


def describe_texts(items):
    """Lines about the texts of a data set."""
    if isinstance(items, Pairs):
        each = len(items) / len(items.images)
        yield (f"{items.name}: {len(items):,} pairs, {len(items.images):,} images, {each:.3g} captions "
               "an image")
        yield words_in("captions", items.captions)
        return
    without = int((items.image < 0).sum())
    yield (f"{items.name}: {len(items):,} items, {len(items.images):,} images; {without:,} items "
           "without one")
    rows = [items[i] for i in range(len(items))]
    turns = [turn for row in rows for turn in row.get("turns", ())]
    if turns:
        yield f"turns: {len(turns) / len(rows):.3g} a conversation"
        yield words_in("answers", [answer for _, answer in turns])
    questions = [question for question, _ in turns] + [row.get("question") for row in rows]
    if questions := [question for question in questions if question]:
        yield words_in("questions", questions)
    if answers := [str(answer) for row in rows for answer in row.get("answers", ())]:
        yield f"references: {len(answers) / len(rows):.3g} an item"
        yield words_in("references", answers)
    groups = Counter(row["group"] for row in rows if row.get("group"))
    if groups:
        yield "groups: " + ", ".join(f"{group} {count:,}" for group, count in groups.most_common())


def describe(items, count, size_of):
    """Lines about a data set: its texts, what was left out, and what `count` images drawn at random
    are like. size_of(file) -> (width, height) of what can be read, else OSError."""
    def look(file):
        try:
            return size_of(file)
        except OSError as error:
            return str(error)

    yield from describe_texts(items)
    for problem, places in items.left_out.items():
        yield f"left out, {problem}: {len(places):,}"
        yield from (f"    {place}" for place in places[:10])
    drawn = np.random.default_rng(0).permutation(len(items.images))[:count]
    files = [os.path.join(items.root, items.images[i]) for i in drawn]
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
    drawn = " drawn at random" if len(files) < len(items.images) else ""
    yield f"cannot be read: {len(bad):,} of {len(files):,} images{drawn}"
    yield from (f"    {message}" for message in bad[:20])


def read_any(spec):
    """A spec -> Items of the kind that its format has first; of a folder without texts, its
    images."""
    source = find_sources(parse_spec(spec))[0]
    there = [f for f in FORMATS if source.ending in f.endings and f.looks(source)]
    kinds = list(there[0].readers) if there else ["captions"]
    try:
        return read(spec, kinds[0])
    except ValueError:
        if "images" not in kinds:
            raise
        return read(spec, "images")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="What is in a data set, and a contact sheet of it as the model sees it.",
        epilog="What is read:\n" + "\n".join(f"  {f.description}" for f in FORMATS),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", metavar="SPEC",
                        help="[NAME=]SOURCE[#SPLIT][@IMAGES], as for train.py --data")
    parser.add_argument("--as", dest="kind", choices=list(AS_TEXT),
                        help="what to read it as (default: what its format is made for)")
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
            if isinstance(items, Pairs) and items.crop:
                pixels = data.random_crop(image, args.image_size, rng)
            else:
                pixels = data.resize(image, args.image_size)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    try:
        is_picture = Image.registered_extensions().get(args.sheet.suffix.lower()) in Image.SAVE
        if not args.sheet.absolute().parent.is_dir() or not is_picture:
            raise FileNotFoundError(f"{args.sheet}: there is no folder {args.sheet.parent} to "
                                    "write it into, or it ends as no picture does (.png)")
        items = read(args.spec, args.kind) if args.kind else read_any(args.spec)
        count = args.check or len(items.images)
        for line in describe(items, count, lambda file: data.load_image(file).size):
            print(line)
        contact_sheet(items, args.image_size, look).save(args.sheet)
    except (OSError, ValueError) as error:
        print(f"pairs.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.sheet}: samples as the model sees them in training")


if __name__ == "__main__":
    main()
