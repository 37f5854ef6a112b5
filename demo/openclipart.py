"""Image-text pairs from Debian's Open Clip Art: 5,642 public-domain drawings with the titles and tags
of their authors, for trying train.py offline and without a download of gigabytes.

    apt-get install openclipart-png openclipart-svg
    python demo/openclipart.py [--root /usr/share/openclipart] [--out datasets/openclipart]

writes OUT/train.jsonl and OUT/val.jsonl (500 held out), a line a pair:
{"image": absolute path, "caption": text}. The pictures stay where they are and as they are (palettes,
transparency, 3 to 8,240 pixels a side); captions are lower case, as LAVIS makes every caption. The
same packages give the same files, byte for byte.
"""

import argparse
import hashlib
import html
import json
import re
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

# Its expat reads no external entity, and bounds the expansion of internal ones.
from xml.etree import ElementTree

from PIL import Image
from tqdm import tqdm

HELD_OUT = 500
MAX_TAGS = 5
LARGE_SERIES = 250  # at most so many drawings of one series: 1,375 of the 6,900 are one kind of star
SMALL_SERIES = 25  # only series up to here are held out, or a few would fill the validation set

# Titles that name a collection, not the drawing; there the file name says more.
COLLECTION = re.compile(
    r"clip ?arts?\b|collection|theme|icon ?set|etiquette icons|aiga|^card$|gramastar|road signs"
    r"|map symbols|australian maps|sibmission|^r\d\d |^advertising$|^moons$|sallite|simple arrows"
    r"|balloons-aj|boating rules|chess pieces|pc connectors", re.I)
NOISE = re.compile(
    r"\S+@\S+|\bhttps?:\S+|\bwww\.\S+|\bhash_0x\w*|\.(svg|png)\b|\bclip ?art[ _]by[ _].* ?-"
    r"|[ -]*rpg map elements", re.I)
# Where words meet: PointingHand2 -> Pointing Hand 2, but mp3.
SEAM = re.compile(
    r"(?<=[a-zà-ÿ])(?=[A-Z][a-z])"
    r"|(?<=[A-Za-z]{3})(?=\d)|(?<=[A-Za-z]{2})(?=\d\d)|(?<=\d)(?=[A-Za-z]{3})")
CARD = re.compile(r"(bordered|ornamental|simple|white)_([cdhs])_(\w\w?)")
JOKER = re.compile(r"(bordered|ornamental|simple|white)_jk_.")
SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king"}
# In titles and file names: what to write for a word ("" drops it); found by reading.
DROPPED_WORDS = (
    "aiga bb ganson zazou md aj bwh 1m 10cm gnome mime fs gtk stock x r clipart cliparts openclipart "
    "svg png http www com 14 iconset theme").split()
WORDS = {
    **dict.fromkeys(DROPPED_WORDS, ""),
    "bw": "black and white", "ppl": "people", "ppls": "people", "sm": "stick man",
    "fc": "flowchart symbol", "fldr": "folder", "wrld": "world", "pckg": "package", "trsh": "trash",
    "mov": "movie", "pingu": "penguin", "rnd": "round", "rectg": "rectangle", "elips": "ellipse",
    "baloon": "balloon", "stappler": "stapler", "viewmag": "magnifying glass",
    "fforward": "fast forward", "bback": "fast back", "uparrow": "up arrow",
    "downarrow": "down arrow", "leftarrow": "left arrow", "rightarrow": "right arrow"}
# In tags: what to write for a tag ("" drops it).
DROPPED_TAGS = (
    "unsorted special magick theme hash sign svg vector image picture clipart openclipart media "
    "miscellany work activity activities stuff lumen samples e mo r en and do girlsymbol").split()
DROPPED_TAGS += [
    "clip art", "public domain", "lemon theme icon", "united nations member", "signs and symbols",
    "sing", "signs and symbols traffic", "webpage", "appicon icon", "shapes", "noze", "skewl"]
TAGS = {
    **dict.fromkeys(DROPPED_TAGS, ""),
    "icons": "icon", "appicon": "icon", "mimeicon": "icon", "mapsym": "map symbol",
    "roadsign": "road sign", "mimetypes": "file type", "mime types": "file type",
    "filesystem": "file system", "signalflag": "signal flag", "musicstuff": "music",
    "musicsym": "music", "arrowshape": "arrow", "bodypart": "body part", "icecream": "ice cream",
    "weathersym": "weather symbol", "networksym": "network symbol", "northamerica": "north america",
    "unitedstates": "united states", "latinamerica": "latin america",
    "southamerica": "south america", "airtravel": "air travel", "usholiday": "holiday",
    "xmas": "christmas", "vegitable": "vegetable", "transport": "transportation",
    "festive": "party", "imformation": "information", "stickmen": "stick man",
    "bullethole": "bullet hole"}


def local_name(element):
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def read_metadata(path):
    """SVG file -> (title, tags, words of its authors' names); ElementTree.ParseError if it is not XML."""
    title = ""
    tags = []
    authors = set()
    for work in ElementTree.parse(path).iter():
        if local_name(work) != "Work":
            continue
        for field in work:
            texts = [e.text or "" for e in field.iter() if local_name(e) in ("title", "li")]
            if local_name(field) == "title":
                title = title or texts[0]
            elif local_name(field) == "subject":
                tags += texts
            elif local_name(field) == "creator":
                authors |= set(re.findall(r"\w+", " ".join(texts).lower()))
    return title.strip(), tags, authors


def clean(text):
    """Title or file name -> lower-case words.

    They are without addresses, "by author", camel case, underscores and numbering."""
    text = re.sub(NOISE, " ", html.unescape(text))
    text = re.sub(r"\bb(lack)? and w(hite)?\b|\bb ?[&/] ?w\b", "black and white", text, flags=re.I)
    text = re.sub(SEAM, " ", text)
    found = re.findall(r"(?:[^\W_]|(?<=\w)'(?=\w))+", text.lower())
    words = " ".join(WORDS.get(word, word) for word in found).split()
    # "01", "v08", "70a015"
    words = [word for word in words if not re.fullmatch(r"0\d*|v\d+|\d+a\d+", word)]
    while words and re.fullmatch(r"\d{1,2}[a-z]?|[1-9]\d\d|bw", words[-1]):
        words.pop()
    return words


def name_of(stem, title, authors):
    """What the drawing shows, as words: its title or, where that names a collection, its file name."""
    if star := re.fullmatch(r"star_0?(\d+)pt0?(\d+)step", stem):
        return f"star with {star[1]} points and step {star[2]}".split()
    if card := CARD.fullmatch(stem):
        return f"playing card {RANKS.get(card[3], card[3])} of {SUITS[card[2]]} {card[1]}".split()
    if joker := JOKER.fullmatch(stem):
        return f"playing card joker {joker[1]}".split()
    words = [] if COLLECTION.search(title) else clean(title)
    if not words:
        words = clean(stem)
        # It ends in the author's name, cut off
        while words and any(author.startswith(words[-1]) for author in authors):
            words.pop()
    return words


def clean_tags(tags, authors):
    """Tags as written -> sorted, with spaces for underscores.

    Those of file formats, attribution and Perl addresses are left out."""
    tags = [" ".join(re.sub(r"[_/-]+", " ", tag.lower()).split()) for tag in tags]
    tags = [TAGS.get(tag, tag) for tag in tags if not re.search(r"0x|\d|[^\w ']|\b[a-z]{19,}", tag)]
    tags = {tag for tag in tags if len(tag) > 1 and tag.count(" ") < 3}
    return sorted(tag for tag in tags if not set(tag.split()) <= authors)


def stems(words):
    """Words without the s of plurals."""
    return {word.removesuffix("s") for word in words}


def caption(name, tags, frequency):
    """Name, then the tags that say something new, the most common first: rare ones are mostly noise."""
    said = stems(name)
    parts = [" ".join(name)] if name else []
    for tag in sorted(tags, key=lambda tag: (-frequency[tag], tag)):
        words = stems(tag.split())
        if words - said and len(parts) <= MAX_TAGS:
            parts.append(tag)
            said |= words
    return ", ".join(parts)


def picture_hash(path):
    """Hash of the pixels on white, None if the picture is blank.

    Raises what Pillow raises, on huge pictures too."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image).convert("RGB")
    if all(low == high for low, high in rgb.getextrema()):
        return None
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()


def read_drawing(path, root):
    """A PNG -> (hash of its pixels, name, tags). Raises what Pillow and ElementTree raise."""
    svg = root / "svg" / path.relative_to(root / "png")
    title, tags, authors = read_metadata(svg.with_suffix(".svg"))
    return picture_hash(path), name_of(path.stem, title, authors), clean_tags(tags, authors)


def read_drawings(root, skipped):
    """Folder -> [(path of the PNG, name, tags)], each picture once.

    What is left out is counted in `skipped`."""
    drawings = []
    seen = set()
    for path in tqdm(sorted((root / "png").rglob("*.png")), desc="drawings", unit=""):
        if path.is_symlink():  # the same drawing in a second category
            skipped["the same picture again"] += 1
            continue
        try:
            pixels, name, tags = read_drawing(path, root)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            skipped["more pixels than Pillow trusts"] += 1
            continue
        except (SyntaxError, OSError, ValueError) as error:
            skipped[f"unreadable, {type(error).__name__}"] += 1
            continue
        if pixels is None:
            skipped["blank picture"] += 1
        elif pixels in seen:
            skipped["the same picture again"] += 1
        elif not name and len(tags) < 2:
            skipped["neither a name nor tags"] += 1
        else:
            seen.add(pixels)
            drawings.append((path, name, tags))
    return drawings


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def split(drawings, skipped):
    """Drawings -> train, val, no series on both sides.

    A series: the names start with the same word, as those of all sizes, colours and versions of one
    drawing do. Its hash decides the side, so that the split is stable."""
    series = defaultdict(list)
    for drawing in drawings:
        _, name, _ = drawing
        words = (word for word in name if word not in ("a", "an", "the", "of") and not word.isdigit())
        series[next(words, "")].append(drawing)
    train = []
    val = []
    for key in sorted(series, key=digest):
        members = sorted(series[key], key=lambda drawing: digest(drawing[0].stem))
        if len(members) > LARGE_SERIES:
            skipped[f"more than {LARGE_SERIES} of one series"] += len(members) - LARGE_SERIES
        held_out = len(members) <= min(SMALL_SERIES, HELD_OUT - len(val))
        side = val if held_out else train
        side.extend(members[:LARGE_SERIES])
    return sorted(train), sorted(val)


def write_lines(file, lines):
    """A line of JSON each, under another name until all are written."""
    part = file.with_name(f"{file.name}.part")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def print_summary(captions, skipped):
    """What was left out, and what the captions are like."""
    for reason, count in skipped.most_common():
        print(f"{count:6,} left out: {reason}")
    words = [word for text in captions for word in re.findall(r"[^\W_]+", text)]
    mean = len(words) / max(1, len(captions))
    print(f"{len(captions) + skipped.total():6,} drawings; {len(set(captions)):,} different captions of "
          f"{mean:.1f} words on average, of {len(set(words)):,} different words")
    common = [f"{word} {count:,}" for word, count in Counter(words).most_common(30)]
    print("most common:", ", ".join(common))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("/usr/share/openclipart"),
                        help="folder with png/ and svg/")
    parser.add_argument("--out", type=Path, default=Path("datasets/openclipart"),
                        help="folder of the two .jsonl files")
    args = parser.parse_args()
    if missing := [kind for kind in ("png", "svg") if not (args.root / kind).is_dir()]:
        folders = " and no ".join(str(args.root / kind) for kind in missing)
        print(f"No {folders}. Get the drawings with\n"
              "    apt-get install openclipart-png openclipart-svg\n"
              "or name the folder that has png/ and svg/ with --root.", file=sys.stderr)
        sys.exit(2)
    # One picture has 168 million pixels of apple.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    skipped = Counter()
    drawings = read_drawings(args.root.resolve(), skipped)
    frequency = Counter(tag for _, _, tags in drawings for tag in tags)
    args.out.mkdir(parents=True, exist_ok=True)
    captions = []
    for side, pairs in zip(("train", "val"), split(drawings, skipped)):
        lines = [dict(image=str(path), caption=caption(name, tags, frequency)) for path, name, tags in pairs]
        write_lines(args.out / f"{side}.jsonl", lines)
        captions += [line["caption"] for line in lines]
        print(f"{len(lines):6,} pairs  {args.out / side}.jsonl")
    print_summary(captions, skipped)


if __name__ == "__main__":
    main()
