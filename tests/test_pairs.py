"""Facts about pairs.py: what is read, what is left out and how it is named, damage, the command."""

import csv
import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import decoded, encoded, make_pairs, save_image, write, write_pairs, write_shard
from PIL import Image

import data
import pairs as pairs_module
import train
from pairs import (
    Strings,
    clean_caption,
    hold_out,
    main,
    one_caption_an_image,
    parse_spec,
    read_pairs,
)

ROOT = Path(__file__).parent.parent


def of(pairs):
    """[(image's name, caption)] of all pairs"""
    return [(Path(pairs.file(i)).name, pairs.captions[i]) for i in range(len(pairs))]


def pixels(file):
    return np.asarray(data.load_image(file))


# -------------------------------------------------------------------------------------------- pairs


def test_captions_are_cleaned_as_blip_does():
    said = clean_caption('A "Red" square; (on) a ~table!  #1: yes.')
    assert said == "a red square on a table 1 yes"
    assert len(clean_caption("word " * 80).split()) == 50


def test_many_strings_are_kept_in_two_arrays():
    strings = Strings.of(["one", "", "Ωραία", "last"])
    assert list(strings) == ["one", "", "Ωραία", "last"]
    assert strings[-1] == strings[3]
    assert len(strings) == 4
    assert list(strings.take([2, 0])) == ["Ωραία", "one"]
    assert list(Strings.joined([strings, Strings.of([]), strings])) == [*strings, *strings]
    with pytest.raises(IndexError):
        strings[4]


def test_whole_images_are_held_out_always_the_same():
    pairs = make_pairs([f"{i // 5}.png" for i in range(500)], [str(i) for i in range(500)])
    held = hold_out(pairs, most=500, share=0.05)
    assert len(held) == 5
    assert held < set(pairs.files())
    assert hold_out(pairs) == held
    assert len(hold_out(pairs, most=3)) == 3
    rest = pairs.without(held)
    val = pairs.without(held, instead=True)
    assert len(rest) == 475
    assert len(val) == 25
    assert set(val.files()) == held
    assert set(rest.files()) | held == set(pairs.files())
    for some in (pairs, rest):
        for i, caption in enumerate(some.captions):
            assert int(caption) // 5 == int(some.file(i)[:-4])


# ------------------------------------------------------------------------------- files of annotations


def write_coco(folder, annotations):
    """COCO's layout of two images, 7 and 9."""
    for i in (7, 9):
        save_image(folder / "train2017" / f"{i:012d}.jpg")
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (7, 9)]
    content = {"images": images, "annotations": annotations}
    return write(folder / "annotations" / "captions_train2017.json", json.dumps(content))


def test_coco_annotations_find_their_images_and_every_caption(tmp_path):
    file = write_coco(tmp_path, [
        {"image_id": 7, "caption": "A cat."}, {"image_id": 9, "caption": "A dog"},
        {"image_id": 7, "caption": "the same cat"}, {"image_id": 9, "caption": " ."},
        {"image_id": 8, "caption": "nothing"}])
    pairs = read_pairs(f"coco={file}:0.5")
    assert pairs.name == "coco"
    assert list(pairs.captions) == ["a cat", "a dog", "the same cat"]
    assert len(pairs.images) == 2
    assert pairs.left_out == {"empty caption": [f"{file}, annotation 4"],
                              "no image": [f"{file}, annotation 5"]}
    assert pairs.file(0) == pairs.file(2) == str(tmp_path / "train2017" / "000000000007.jpg")
    assert list(one_caption_an_image(pairs, 10).captions) == ["a cat", "a dog"]


def test_a_list_in_json_and_images_elsewhere(tmp_path):
    save_image(tmp_path / "1.png")
    rows = [{"image": "1.png", "caption": ["one", "two"]}]
    file = write(tmp_path / "notes" / "deep" / "pairs.json", json.dumps(rows))
    assert list(read_pairs(f"{file}@{tmp_path}").captions) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="pairs.json@FOLDER"):
        read_pairs(str(file))


@pytest.mark.parametrize("text, captions", [
    ('{"image": "1.png", "caption": "a"}\n\n{"image": "1.png", "text": "b"}', ["a", "b"]),
    ('{"file_name": "1.png", "captions": ["a", "b"]}', ["a", "b"]),
    ('{"filepath": "1.png", "caption": "x", "all_captions": ["a", "b", "c"],'
     ' "all_similarities": [0.1, 0.5, null]}', ["b"]),
    ('{"image": "1.png", "caption": "x", "all_captions": ["a"], "all_similarities": [null]}', ["x"])])
def test_keys_that_lie_around_are_understood(tmp_path, text, captions):
    save_image(tmp_path / "1.png")
    pairs = read_pairs(str(write(tmp_path / "pairs.jsonl", text)))
    assert of(pairs) == [("1.png", caption) for caption in captions]


@pytest.fixture
def two_images(tmp_path):
    for name in ("1.png", "2.png"):
        save_image(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name, text, found, left_out", [
    # quotes, commas and line breaks inside of a caption; columns in any order; a short line
    ("a.csv", 'url,Caption,image\nx,"a cat, on\na mat",1.png\ny,a dog,2.png\nz,short\n',
     [("1.png", "a cat, on a mat"), ("2.png", "a dog")], {"no image": [5]}),
    ("a.tsv", "filepath\ttitle\n1.png\ta, cat\n", [("1.png", "a, cat")], {}),
    ("a.tsv", b"image\tcaption\n1.png\ta \xff cat\n1.png\ta cat\n",
     [("1.png", "a cat")], {"broken Unicode": [2]}),
    # a quote that is never closed
    ("a.csv", 'image,caption\n1.png,a cow\n1.png,"a cat\n2.png,a dog\n2.png,a horse\n',
     [("1.png", "a cow")], {"damaged line": [3, 4, 5]}),
    # as Excel writes them
    ("a.csv", "\ufeffimage,caption\r\n1.png,a cat\r\n,no image\r\n".encode(),
     [("1.png", "a cat")], {"no image": [3]})])
def test_tables_name_their_columns(two_images, name, text, found, left_out):
    file = write(two_images / name, text)
    pairs = read_pairs(str(file))
    assert of(pairs) == found
    for problem, lines in left_out.items():
        assert pairs.left_out[problem] == [f"{file}, line {line}" for line in lines]
    assert pairs.left_out.keys() == left_out.keys()


def test_lines_cut_or_damaged_are_left_out_and_named(two_images):
    file = write(two_images / "pairs.jsonl", "\n".join([
        '{"image": "1.png", "caption": "first"}',
        '{"image": "1.png", "cap',
        '{"image": "1.png", "caption": "\\ud800 half"}',
        '{"image": "1.png", "caption": 7}',
        '{"image": "1.png", "caption": "Ωραία \u0007γάτα"}',
        '["1.png", "x"]',
        '{"image": "1.png", "caption": "last"}']))
    pairs = read_pairs(str(file))
    assert list(pairs.captions) == ["first", "ωραία γάτα", "last"]
    assert pairs.left_out == {
        "damaged line": [f"{file}, line 2"], "broken Unicode": [f"{file}, line 3"],
        "empty caption": [f"{file}, line 4"],
        "no object with image and caption": [f"{file}, line 6"]}


@pytest.mark.parametrize("text, says", [
    ('{"image": "1.png", "caption": ""}', "1 left out: empty caption"),
    ("", "not one image"),
    ("[1]", "no object"),
    ("7", "no object"),
    ("[" * 200_000, "damaged line"),
    ('{"image": "1.p', "damaged line, such as .*pairs.jsonl, line 1"),
    ('{"image": true, "caption": "x"}', "no image"),
    ('{"picture": "1.png"}', "no image")])
def test_lines_without_a_pair_say_what_is_wrong(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_pairs(str(write(tmp_path / "pairs.jsonl", text)))


@pytest.mark.parametrize("name, text, says", [
    ("a.json", "[{", "not valid JSON"),
    ("a.json", "[" * 200_000, "not valid JSON"),
    ("a.json", "7", "no object and no list, but 7. It is read if it holds .*COCO.*a list of"),
    ("a.json", "{}", "an empty object"),
    ("a.json", '{"images": null, "annotations": []}', "the keys 'images', 'annotations'.*COCO's"),
    ("a.json", '{"images": [{"id": [1], "file_name": "x"}], "annotations": [{"image_id": [2]}]}',
     "no image"),
    ("a.parquet", "x", "are read from"),
    ("a.csv", "", "it names none"),
    ("a.csv", "url,words\n1,2\n", "must name a column .* it names url, words")])
def test_files_of_no_format_say_what_was_found_and_what_would_do(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        read_pairs(str(write(tmp_path / name, text)))


# ------------------------------------------------------------------------------------------- folders


def test_a_folder_of_images_with_texts_beside_them(tmp_path):
    images = ("b/2.JPG", "b/1.png", "a.webp", "lonely.png", "empty.png", "broken.png")
    for name in images:
        save_image(tmp_path / name)
    texts = {"b/2": "\ufefftwo", "b/1": "one\n\nagain one\n", "a": "a", "empty": " \n",
             "broken": b"\xff\xfe", "notes": "no image"}
    for name, text in texts.items():
        write(tmp_path / f"{name}.txt", text)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    pairs = read_pairs(str(tmp_path))
    assert of(pairs) == [("a.webp", "a"), ("1.png", "one"), ("1.png", "again one"), ("2.JPG", "two")]
    names = {kind: [Path(place).name for place in places] for kind, places in pairs.left_out.items()}
    assert names == {"damaged caption file": ["broken.txt"], "empty caption": ["empty.png"],
                     "no caption file": ["lonely.png"], "link to a folder": ["link"]}


# --------------------------------------------------------------------------------------------- specs


def test_a_spec_names_source_images_and_weight(tmp_path):
    assert parse_spec("a/b.jsonl@c") == ("a", Path("a/b.jsonl"), Path("c"), None)
    assert parse_spec("n=x/y.json@images:0.5") == ("n", Path("x/y.json"), Path("images"), 0.5)
    assert parse_spec("x.jsonl")[0] == "x"
    assert parse_spec("coco/x.jsonl")[0] == "coco"


def test_paths_with_signs_in_them_are_read_as_they_are(tmp_path):
    folder = tmp_path / "we@ird=x" / "a:5"
    file = write_pairs(folder, 4)
    assert parse_spec(str(file)) == ("a:5", file, None, None)
    assert len(read_pairs(str(file))) == 4
    assert parse_spec(str(folder)) == ("a:5", folder, None, None)


def test_the_papers_data_is_found_where_it_lies(tmp_path):
    write(tmp_path / "coco" / "annotations" / "captions_train2014.json", "")
    write(tmp_path / "coco" / "annotations" / "captions_val2017.json", "")
    write(tmp_path / "vg" / "vg_caption.json", "")
    found = {name: file.name for name, file in train.find_paper_data(tmp_path).items()}
    assert found == {"coco": "captions_train2014.json", "vg": "vg_caption.json",
                     "val": "captions_val2017.json"}
    write(tmp_path / "laion" / "00000.tar", "")
    assert train.find_paper_data(tmp_path)["laion"] == tmp_path / "laion"


# -------------------------------------------------------------------------------------- scans are kept


def test_a_scan_is_kept_until_its_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "scans"))
    file = write_pairs(tmp_path / "pairs", 8)
    read_pairs(str(file))
    assert not (tmp_path / "scans").exists()  # too few to be worth it
    monkeypatch.setattr(pairs_module, "KEPT_FROM", 8)
    first = of(read_pairs(str(file)))
    assert len(first) == 8
    with monkeypatch.context() as patch:
        patch.setattr(pairs_module, "read_rows", lambda *_: pytest.fail("scanned again"))
        assert of(read_pairs(str(file))) == first
    with open(file, "a") as lines:
        lines.write('{"image": "0.png", "caption": "one more"}\n')
    assert of(read_pairs(str(file))) == [*first, ("0.png", "one more")]
    for scan in (tmp_path / "scans").glob("*"):
        scan.write_bytes(b"damaged")
    assert len(read_pairs(str(file))) == 9
    monkeypatch.setenv("VPGTRANS_CACHE", str(file / "not a folder"))  # a read-only home
    assert len(read_pairs(str(file))) == 9


def test_kept_scans_of_links_to_one_file_are_told_apart(tmp_path, monkeypatch):
    """As in the Hub's cache, where all names are links."""
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "scans"))
    monkeypatch.setattr(pairs_module, "KEPT_FROM", 1)
    shard = write_shard(tmp_path / "blobs" / "0a1b", {"1.jpg": encoded(1), "1.txt": b"one"})
    for name in ("a/00000.tar", "b/train.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(shard)
        assert pixels(read_pairs(str(tmp_path / name)).file(0)).shape == (30, 40, 3)


# -------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("ending, format", [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_shards_of_webdataset_are_read_without_unpacking(tmp_path, ending, format):
    """As img2dataset writes them with that package: image, .txt, and .json beside it; the same
    pictures come out."""
    with webdataset.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=10, verbose=0) as writer:
        for i in range(25):
            meta = {"url": "x", "key": f"{i:09d}", "caption": "no"}
            writer.write({"__key__": f"{i:09d}", ending: encoded(i, format),
                          "txt": f"Picture {i}.", "json": meta})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    numbered = f"{tmp_path}/{{00000..00002}}.tar"
    for spec in (numbered, f"{tmp_path}/*.tar", f"laion={tmp_path}", f"laion={numbered}:0.7"):
        pairs = read_pairs(spec)
        assert list(pairs.captions) == [f"picture {i}" for i in range(25)]
        assert len(pairs.images) == 25
        assert not pairs.left_out
    theirs = webdataset.WebDataset([str(file) for file in sorted(before)], shardshuffle=False)
    for i, sample in enumerate(theirs):
        assert np.array_equal(pixels(pairs.file(i)), decoded(sample[ending]))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="00003.tar"):
        read_pairs(f"{tmp_path}/{{00000..00003}}.tar")
    with pytest.raises(ValueError, match="holds its images"):
        read_pairs(f"{tmp_path}/*.tar@{tmp_path}")


@pytest.mark.slow
def test_many_shards_are_scanned_by_several_processes(tmp_path):
    """In the order of their names, with what is left out of each."""
    for i in range(9):
        bad = {"bad.jpg": encoded(0)} if i % 4 == 0 else {}
        write_shard(tmp_path / f"{i:05d}.tar", {"1.jpg": encoded(i), "1.txt": f"{i}".encode(), **bad})
    pairs = read_pairs(str(tmp_path))
    assert list(pairs.captions) == [f"{i}" for i in range(9)]
    assert [Path(pairs.file(i)).name[:5] for i in range(9)] == [f"{i:05d}" for i in range(9)]
    for i in range(9):
        assert np.array_equal(pixels(pairs.file(i)), decoded(encoded(i)))
    lonely = [f"{tmp_path}/{i:05d}.tar: bad" for i in (0, 4, 8)]
    assert pairs.left_out == {"no caption next to it": lonely}


def test_captions_of_shards_come_from_txt_or_json(tmp_path):
    scored = {"all_captions": ["x", "best"], "all_similarities": [0.1, 0.2], "caption": "y"}
    shard = write_shard(tmp_path / "00000.tar", {
        "a/1.jpg": encoded(1), "a/1.txt": b"from txt", "a/1.json": b'{"caption": "from json"}',
        "a/2.json": b'{"caption": "from json"}', "a/2.jpg": encoded(2),
        "b/1.jpg": encoded(3), "b/1.json": json.dumps(scored).encode()})
    pairs = read_pairs(str(shard))
    assert list(pairs.captions) == ["from txt", "from json", "best"]
    for i in range(3):
        assert np.array_equal(pixels(pairs.file(i)), decoded(encoded(i + 1)))


def test_unsafe_and_broken_members_are_left_out_and_nothing_is_written(tmp_path):
    shard = write_shard(tmp_path / "deep" / "shard.tar", {
        "1.jpg": encoded(1), "1.txt": b"one",
        "../2.jpg": encoded(2), "../2.txt": b"two",
        "/3.jpg": encoded(3),
        "4.jpg": encoded(4),
        "5.txt": b"five",
        "6.jpg": encoded(6), "6.txt": b"\xff",
        "7.jpg": encoded(7), "7.txt": b" . ",
        "8.jpg": encoded(8), "8.json": b'["no object"]',
        "1b.jpg": encoded(9), "1b.txt": b"last"})
    with tarfile.open(shard, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo("9.jpg")
            link.type = kind
            link.linkname = "/etc/passwd"
            tar.addfile(link)
        for name in ("1.jpg", "1.txt"):  # a key for the second time
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"two"))
    pairs = read_pairs(str(shard))
    assert list(pairs.captions) == ["one", "last"]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["deep", "shard.tar"]
    named = {}
    for problem, places in pairs.left_out.items():
        named[problem] = [place.split(": ")[1] for place in places]
    assert named == {
        "link or unsafe name": ["../2.jpg", "../2.txt", "/3.jpg", "9.jpg", "9.jpg", "9.jpg"],
        "no caption next to it": ["4"], "no image": ["5"], "damaged caption": ["6", "8"],
        "empty caption": ["7"], "duplicate key": ["1"]}


def test_odd_names_in_shards(tmp_path):
    """What looks like a place in a shard, line breaks, and bytes that are no text."""
    odd = write_shard(tmp_path / "odd.tar", {
        "a::b@1+2.jpg": encoded(1), "a::b@1+2.txt": b"one", "c\nd.jpg": encoded(2),
        "c\nd.txt": b"two", "._c.jpg": b"mac", "\udcff.jpg": encoded(3), "\udcff.txt": b"three"})
    pairs = read_pairs(str(odd))
    assert list(pairs.captions) == ["one", "two"]
    assert pairs.left_out == {"broken Unicode": [f"{odd}: \\udcff"]}
    for i in range(2):
        assert np.array_equal(pixels(pairs.file(i)), decoded(encoded(i + 1)))


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory):
    """(bytes, members) of a shard of 12 samples"""
    contents = {}
    for i in range(12):
        contents[f"{i:05d}.jpg"] = encoded(i)
        contents[f"{i:05d}.txt"] = f"number {i}".encode()
    shard = write_shard(tmp_path_factory.mktemp("shard") / "00000.tar", contents)
    with tarfile.open(shard) as tar:
        return shard.read_bytes(), tar.getmembers()


def with_zeros(content, start, end):
    return content[:start] + bytes(end - start) + content[end:]


def with_flip(content, at):
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


def evil_header(kind, size):
    """A header with a right check sum and an impossible size."""
    header = tarfile.TarInfo("evil.jpg")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    if size < 0:
        block[124:136] = size.to_bytes(12, "big", signed=True)
    else:
        block[124:136] = (0x80 << 88 | size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def shard_damages(content, members):
    """{what: (bytes, how many samples in front of it are whole, problem, the byte that is named)}"""
    picture, caption = members[10], members[11]  # of sample 5
    end = members[-1].offset_data + 512
    cases = {
        "header": (with_flip(content, picture.offset + 3), 5, "damaged shard", picture.offset),
        "header of a caption": (with_flip(content, caption.offset), 5, "damaged shard", caption.offset),
        "header of the first": (with_flip(content, 0), 0, "damaged shard", 0),
        "zeros for a header": (with_zeros(content, picture.offset, picture.offset + 512), 5,
                               "damaged shard", picture.offset),
        "zeros for two samples": (with_zeros(content, picture.offset, members[14].offset), 5,
                                  "joined shards", picture.offset),
        "zeros to the end": (with_zeros(content, picture.offset, len(content) + 99_000), 5,
                             "damaged shard", picture.offset),
        "cut in a picture": (content[: picture.offset_data + 40], 5, "cut short", picture.offset),
        "cut in a header": (content[: picture.offset + 40], 5, "damaged shard", picture.offset),
        "cut between samples": (content[: picture.offset], 5, "cut short", picture.offset),
        "cut at the end mark": (content[:end], 12, "cut short", end),
        "half an end mark": (content[: end + 512], 12, "cut short", end),
        "two joined": (content + content, 12, "joined shards", end),
        "text behind it": (content[:end] + b"<html>" * 2000, 12, "damaged shard", end),
    }
    sizes = [(b"0", -512), (b"S", -1024), (b"x", 10**12), (b"L", 2**62), (b"0", 2**40), (b"x", -512)]
    for kind, size in sizes:
        evil = evil_header(kind, size)
        problem = "cut short" if size == 2**40 else "damaged shard"
        at = picture.offset
        case = f"{kind.decode()} of {size}"
        cases[f"{case}, first"] = (evil + content, 0, problem, 0)
        cases[f"{case}, in the middle"] = (content[:at] + evil + content[at:], 5, problem, at)
    pax = evil_header(b"x", 0)
    cases["pax upon pax"] = (pax * 3000 + content, 0, "damaged shard", 0)
    sparse = bytearray(tarfile.TarInfo("s").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157] = b"S"
    sparse[482] = 1  # more of it is to follow, and nothing does
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    at = picture.offset
    cases["sparse without its rest"] = (content[:at] + bytes(sparse), 5, "damaged shard", at)
    return cases


SHARD_DAMAGES = [
    "header", "header of a caption", "header of the first", "zeros for a header",
    "zeros for two samples", "zeros to the end", "cut in a picture", "cut in a header",
    "cut between samples", "cut at the end mark", "half an end mark", "two joined",
    "text behind it", "pax upon pax", "sparse without its rest",
    *(f"{size}, {place}" for place in ("first", "in the middle")
      for size in ("0 of -512", "S of -1024", f"x of {10**12}", f"L of {2**62}", f"0 of {2**40}",
                   "x of -512"))]


def test_the_list_of_damages_is_whole(whole_shard):
    assert shard_damages(*whole_shard).keys() == set(SHARD_DAMAGES)


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_damage_to_a_shard_costs_the_rest_of_it_and_is_named(tmp_path, whole_shard, damage):
    """With file and byte. What stands before it comes out as it was."""
    content, before, problem, byte = shard_damages(*whole_shard)[damage]
    shard = write(tmp_path / "00000.tar", content)
    if not before:
        with pytest.raises(ValueError, match=f"{problem}.*00000.tar.*byte {byte}"):
            read_pairs(str(shard))
        return
    pairs = read_pairs(str(shard))
    assert list(pairs.captions) == [f"number {i}" for i in range(before)]
    for i in range(before):
        assert np.array_equal(pixels(pairs.file(i)), decoded(encoded(i)))
    (place,) = pairs.left_out[problem]
    assert place.startswith(f"{shard}: ")
    assert f"byte {byte}" in place


def test_a_compressed_shard_is_named(tmp_path, whole_shard):
    content, _ = whole_shard
    with pytest.raises(ValueError, match="gunzip it"):
        read_pairs(str(write(tmp_path / "gz.tar", gzip.compress(content))))


# ------------------------------------------------------------------------- damage: formats x faults

COUNT, HIT = 12, 5  # pairs, and which of them is hit
CAPTIONS = [f"number {i} in a row" for i in range(COUNT)]
ROWS = [{"image": f"{i}.png", "caption": CAPTIONS[i]} for i in range(COUNT)]


def as_table(delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([ROWS[0], *(row.values() for row in ROWS)])
    return text.getvalue()


def as_coco():
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(COUNT)]
    notes = [{"image_id": i, "id": 100 + i, "caption": CAPTIONS[i]} for i in range(COUNT)]
    return json.dumps({"images": images, "annotations": notes})


def as_tar(folder):
    members = {}
    for i in range(COUNT):
        members[f"{i}.png"] = (folder / f"{i}.png").read_bytes()
        members[f"{i}.txt"] = CAPTIONS[i].encode()
    return write_shard(folder / "tar" / "x.tar", members).read_bytes()


def as_webdataset(folder):
    """With pax records before every member, since it keeps times of day in fractions."""
    (folder / "wds").mkdir(exist_ok=True)
    with webdataset.TarWriter(str(folder / "wds" / "x.tar")) as writer:
        for i in range(COUNT):
            picture = (folder / f"{i}.png").read_bytes()
            writer.write({"__key__": f"{i}", "png": picture, "txt": CAPTIONS[i]})
    return (folder / "wds" / "x.tar").read_bytes()


# {format: (name of the file that is damaged, what makes its content)}; of a folder, it is the
# caption of the one that is hit
DAMAGED = {
    "lines": ("x.jsonl", lambda folder: "".join(json.dumps(row) + "\n" for row in ROWS)),
    "list": ("x.json", lambda folder: json.dumps(ROWS)),
    "coco": ("x.json", lambda folder: as_coco()),
    "csv": ("x.csv", lambda folder: as_table(",")),
    "tsv": ("x.tsv", lambda folder: as_table("\t")),
    "folder": ("x/5.txt", lambda folder: CAPTIONS[HIT]),
    "tar": ("x.tar", as_tar),
    "webdataset": ("y.tar", as_webdataset),
}


def at_hit(content):
    return content.index(b"number 5")


def put(by, start, end):
    """A fault: `by` in the place of the bytes from start to end of the caption that is hit."""
    def damage(content):
        at = at_hit(content)
        return content[: at + start] + by + content[at + end :]

    return damage


FAULTS = {
    "empty": lambda content: b"",
    "a web page": lambda content: b"<!DOCTYPE html><title>404 Not Found</title>\n",
    "a zip": lambda content: b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(range(256)) * 8,
    "cut in a caption": lambda content: content[: at_hit(content) + 9],
    "cut at the end": lambda content: content[:-3],
    "no UTF-8": put(b"\xff", 2, 3),
    "a letter": put(b"x", 2, 3),
    "zeros": put(bytes(6), 3, 9),
    "bytes missing": put(b"", 3, 12),
    "a quote": put(b'"', 0, 1),
    "a line break": put(b"\n", 6, 7),
    "blank caption": put(b" " * 17, 0, 17),
    "control characters": put(b"\x07", 6, 7),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 12 images, and {format: bytes} of what annotates them."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        save_image(folder / f"{i}.png", colour=(i, 0, 0), size=(8, 8))
    whole = {}
    for format, (_, make) in DAMAGED.items():
        content = make(folder)
        whole[format] = content if isinstance(content, bytes) else content.encode()
    return folder, whole


def write_damaged(place, pictures, format, content):
    """-> the spec of a data set of which one file has this content"""
    folder, _ = pictures
    name, _ = DAMAGED[format]
    file = write(place / name, content)
    if format != "folder":
        return f"{file}@{folder}" if not name.endswith(".tar") else str(file)
    for i in range(COUNT):
        write(place / "x" / f"{i}.png", (folder / f"{i}.png").read_bytes())
        if i != HIT:
            write(place / "x" / f"{i}.txt", CAPTIONS[i])
    return str(place / "x")


def key_of(name):
    """The number in the name of an image, in a file or in a shard."""
    return Path(name.split("::")[-1].split("@")[0]).stem


def outcome(spec, name):
    """What has become of a data set of which one file, of this name, was damaged: a letter of
    OUTCOMES."""
    try:
        pairs = read_pairs(spec)
    except (ValueError, FileNotFoundError) as error:
        assert name in str(error)
        return "R"
    found = [(key_of(pairs.file(i)), pairs.captions[i]) for i in range(len(pairs))]
    whole = [(str(i), caption) for i, caption in enumerate(CAPTIONS)]
    lost = [i for i in range(COUNT) if whole[i] not in found]
    changed = {int(key) for key, caption in found if (key, caption) not in whole}
    named = any(pairs.left_out.values())
    what = {(): "=", (HIT,): "5", (COUNT - 1,): "E", tuple(range(HIT, COUNT)): "T"}[tuple(lost)]
    if not named and changed:
        assert changed == {lost[0]}
        return {"5": "c", "E": "e", "T": "t"}[what]
    assert named or not lost
    return what


# What a fault costs: = nothing; 5 the pair that is hit, which is named; E the last; T all from the
# hit one on, which is named; R the file is refused by name. Small letters: the caption that is hit
# is another one, and nothing tells: c alone; e of the last pair; t and those behind it are gone.
DAMAGE = """
                    lines list coco csv tsv folder tar webdataset
empty               R     R    R    R   R   5      R   R
a web page          R     R    R    R   R   c      R   R
a zip               R     R    R    R   R   5      R   R
cut in a caption    T     R    R    t   t   c      T   T
cut at the end      E     R    R    e   e   c      =   =
no UTF-8            5     R    R    5   5   5      5   5
a letter            c     c    c    c   c   c      c   c
zeros               c     c    c    c   c   c      c   c
bytes missing       c     c    c    c   c   c      T   T
a quote             5     R    R    T   T   c      c   c
a line break        5     =    =    5   5   c      =   =
blank caption       5     5    5    5   5   5      5   5
control characters  =     =    =    =   =   =      =   =
"""
# t, e: a table that ends in the middle of a line looks like any other. = of a tar that is cut at
# the end: what is missing is some of the zeros behind its end mark.


def damage_cells():
    header, *lines = DAMAGE.strip().splitlines()
    cells = []
    for line in lines:
        fault = line[:20].strip()
        letters = line[20:].split()
        cells += [(fault, *cell) for cell in zip(header.split(), letters, strict=True)]
    return cells


def test_no_cell_of_the_table_of_damage_is_missing():
    cells = {(fault, format) for fault, format, _ in damage_cells()}
    assert cells == {(fault, format) for fault in FAULTS for format in DAMAGED}


@pytest.mark.parametrize("fault, format, cell", damage_cells())
def test_damage_costs_what_it_hits_and_is_named(tmp_path, pictures, fault, format, cell):
    spec = write_damaged(tmp_path, pictures, format, FAULTS[fault](pictures[1][format]))
    name, _ = DAMAGED[format]
    assert outcome(spec, "x" if format == "folder" else name) == cell


@pytest.mark.parametrize("format", [format for format in DAMAGED if format != "folder"])
def test_no_damage_raises_anything_but_a_message(tmp_path, pictures, format):
    """A hundred random ones of each: bytes that are flipped, lost, zeroed or added."""
    content = pictures[1][format]
    rng = np.random.default_rng(0)
    for i in range(100):
        start = int(rng.integers(len(content)))
        end = start + int(rng.integers(1, 30))
        junk = bytes(rng.choice(list(b'"{}[],\t\n\\\0\xff:a'), 10).tolist())
        by = (bytes(end - start), b"", junk, rng.bytes(end - start))[i % 4]
        damaged = content[:start] + by + content[end:]
        spec = write_damaged(tmp_path, pictures, format, damaged)
        try:
            assert len(read_pairs(spec)) <= COUNT + 2  # a line break may make two of one
        except (ValueError, FileNotFoundError) as error:
            assert DAMAGED[format][0] in str(error)


def test_damage_to_an_image_of_a_folder_shows_when_it_is_read(tmp_path, world):
    """And touches no neighbour."""
    for i in range(8):
        write(tmp_path / f"{i}.jpg", encoded(i))
        write(tmp_path / f"{i}.txt", f"number {i}")
    whole = encoded(3)
    tok = data.load_tokenizer(world[1])
    for content in (b"", b"<!DOCTYPE html><p>404", whole[: len(whole) // 2], with_flip(whole, 2)):
        write(tmp_path / "3.jpg", content)
        pairs = read_pairs(str(tmp_path))
        assert len(pairs) == 8
        samples = data.Samples([pairs], tok, 28, 5, augment=False)
        (batch,) = next(data.load_batches(samples, np.arange(8), 8, 8))
        (bad,) = batch["bad"]
        assert "3.jpg" in bad
        for file, image in zip(batch["files"], batch["images"]):
            expected = Image.open(io.BytesIO(encoded(int(Path(file).stem))))
            assert torch.equal(image, data.resize(expected, 28))


# --------------------------------------------------------------------------------------- the command


def test_the_command_shows_what_is_in_a_data_set(tmp_path, capsys):
    """Counts, broken files by name, and a picture of samples with a frame where an image cannot be
    read."""
    members = {}
    for i in range(10):
        members[f"{i}.jpg"] = encoded(i)
        members[f"{i}.txt"] = f"number {i} of ten".encode()
    shard = write_shard(tmp_path / "00000.tar", members | {"3.jpg": b"<html>", "5.txt": b" "})
    sheet = tmp_path / "sheet.png"
    main([f"ten={shard}", "--sheet", str(sheet), "--check", "0", "--image-size", "32"])
    said = capsys.readouterr().out
    assert "ten: 9 pairs, 9 images" in said
    assert f"left out, empty caption: 1\n    {shard}: 5" in said
    assert "4.0 words on average" in said
    assert "cannot be read: 1 of 9 images" in said
    assert "::3.jpg@" in said
    assert "images: 40 x 30 pixels" in said
    assert Image.open(sheet).size == (8 * 40 + 8, 2 * 76 + 8)


def test_the_command_says_in_a_line_why_not(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "pairs.py: " in (said := capsys.readouterr().err)
    assert "no such file" in said


@pytest.mark.parametrize("sheet", ["missing/sheet.png", "sheet", "sheet.txt"])
def test_a_sheet_that_cannot_be_written_is_refused_before_anything_is_read(
        tmp_path, monkeypatch, capsys, sheet):
    monkeypatch.setattr(pairs_module, "read_pairs", None)
    with pytest.raises(SystemExit) as stop:
        main([str(write_pairs(tmp_path, 2)), "--sheet", str(tmp_path / sheet)])
    assert stop.value.code == 2
    assert sheet in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_names_that_standard_output_has_no_signs_for(tmp_path):
    write_pairs(tmp_path / "é", 2)
    command = [sys.executable, str(ROOT / "pairs.py"), str(tmp_path / "é"), "--check", "1"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    write(tmp_path / "é" / "0.txt", "one")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "?: 1 pairs" in done.stdout
