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
    one_caption_per_image,
    parse_spec,
    read_conversations,
    read_pairs,
    read_pictures,
    read_questions,
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
    assert list(one_caption_per_image(pairs, 10).captions) == ["a cat", "a dog"]


def test_a_list_in_json_and_images_elsewhere(tmp_path):
    save_image(tmp_path / "1.png")
    rows = [{"image": "1.png", "caption": ["one", "two"]}]
    file = write(tmp_path / "notes" / "deep" / "pairs.json", json.dumps(rows))
    assert list(read_pairs(f"{file}@{tmp_path}").captions) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="pairs.json@FOLDER"):
        read_pairs(str(file))
    rows = [{"image": "/export/share/vg/1.png", "caption": "one"}]  # as LAVIS's vg_caption.json
    file = write(tmp_path / "notes" / "deep" / "whole.json", json.dumps(rows))
    with pytest.raises(FileNotFoundError, match="whole paths.*'s#/export/share/vg/##g'.*whole.json@FOLDER"):
        read_pairs(f"{file}@{tmp_path}")


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
    # commas outside of quotes would cut a caption; empty cells cut nothing
    ("a.csv", "image,caption\n1.png,A man, smiling, in a park\n1.png,a cat,,\n2.png,a dog\n",
     [("1.png", "a cat"), ("2.png", "a dog")], {"more cells than columns": [2]}),
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


def test_pictures_of_a_folder_are_read_or_named_by_their_endings(tmp_path):
    for name, format in (("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.pgm", "PPM"), ("d.PNM", "PPM")):
        save_image(tmp_path / name, "L", 90, format=format)
    for name in ("e.heic", "f.HEIF", "g.jxl", "h.jp2"):
        write(tmp_path / name, "x")
    for stem in "abcdefgh":
        write(tmp_path / f"{stem}.txt", stem)
    pairs = read_pairs(str(tmp_path))
    items = read_pictures(str(tmp_path))
    assert list(pairs.captions) == ["a", "b", "c", "d"]
    assert items.files() == pairs.files()
    assert all(pixels(file).shape == (30, 40, 3) for file in pairs.files())
    for left_out in (pairs.left_out, items.left_out):
        ((problem, places),) = left_out.items()
        assert problem.endswith("convert it to JPEG or PNG")
        assert [Path(place).name for place in places] == ["e.heic", "f.HEIF", "g.jxl", "h.jp2"]


def test_a_link_to_nowhere_is_an_image_without_a_text(tmp_path):
    save_image(tmp_path / "0.png")
    write(tmp_path / "0.txt", "a cat")
    (tmp_path / "lost.png").symlink_to("/nowhere/lost.png")
    (tmp_path / "self.png").symlink_to("self.png")
    pairs = read_pairs(str(tmp_path))
    assert list(pairs.captions) == ["a cat"]
    assert {Path(place).name for place in sum(pairs.left_out.values(), [])} == {"lost.png", "self.png"}


def test_shards_are_told_from_folders_whatever_the_letters(tmp_path):
    write_shard(tmp_path / "a.TAR", {"1.png": save_image(tmp_path / "1.png").read_bytes(), "1.txt": b"a cat"})
    pairs = read_pairs(str(tmp_path / "a.TAR"))
    assert list(pairs.captions) == ["a cat"] and data.load_image(pairs.file(0)).size
    save_image(tmp_path / "named.tar" / "2.png")
    write(tmp_path / "named.tar" / "2.txt", "a dog")
    pairs = read_pairs(str(tmp_path / "named.tar"))
    assert list(pairs.captions) == ["a dog"] and data.load_image(pairs.file(0)).size


def test_what_is_hidden_in_a_folder_or_of_macos_is_passed_over(tmp_path):
    for name in ("a/1", "a/._1", "__MACOSX/a/1", "__MACOSX/a/._1", ".thumbnails/1"):
        save_image(tmp_path / f"{name}.jpg")
        write(tmp_path / f"{name}.txt", "one")
    for items in (read_pairs(str(tmp_path)), read_pictures(str(tmp_path))):
        assert items.files() == [str(tmp_path / "a/1.jpg")]
        assert not items.left_out


# ---------------------------------------------------------------------------- files as distributed


def show(place, *names):
    """Pictures of these names."""
    for name in names:
        save_image(place / name)


def write_object(file, content):
    return write(file, json.dumps(content))


# Sources: cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip); its raw captions
# keep their line ends. Flickr's files have no filepath and no cocoid.
def karpathy_row(split, filename, texts, number, **more):
    sentences = [{"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 10 * number + i}
                 for i, text in enumerate(texts)]
    return {"sentids": [s["sentid"] for s in sentences], "imgid": number, "sentences": sentences,
            "split": split, "filename": filename, **more}


KARPATHY = {"dataset": "coco", "images": [
    karpathy_row("test", "COCO_val2014_000000391895.jpg", ["A man.", "A rider"], 0, cocoid=391895,
                 filepath="val2014"),
    karpathy_row("restval", "COCO_val2014_000000522418.jpg", ["A woman cuts a cake.\n"], 1,
                 cocoid=522418, filepath="val2014"),
    karpathy_row("val", "COCO_val2014_000000184613.jpg", ["A child"], 2, cocoid=184613,
                 filepath="val2014"),
    karpathy_row("train", "COCO_train2014_000000057870.jpg", ["A table", "Chairs"], 3, cocoid=57870,
                 filepath="train2014")]}


@pytest.mark.parametrize("row, problem", [
    ({"image_id": 1, "caption": None}, "no caption"), ({"image_id": 1, "caption": " "}, "no caption"),
    ({"image_id": 1, "caption": ["a"]}, "no caption")])
def test_an_answer_to_learn_is_a_text(tmp_path, row, problem):
    show(tmp_path, "0.jpg", "1.jpg")
    file = write_object(tmp_path / "filter_cap.json", {"annotations": [row, {"image_id": 0, "caption": "a"}]})
    items = read_conversations(str(file))
    assert len(items) == 1 and items.left_out == {problem: [f"{file}, annotation 1"]}


@pytest.mark.parametrize("change, problem", [
    ({"question_id": [1]}, "an id that is neither text nor number"),
    ({"question": 5}, "a question that is no text"),
    ({"answer": [2, 2]}, "an answer that is no text"), ({"image": 5}, "an image that is no text")])
def test_a_question_that_would_end_an_evaluation_is_left_out(tmp_path, change, problem):
    show(tmp_path, "1.jpg")
    row = {"question_id": 1, "question": "What?", "answer": ["cat"], "image": "1.jpg"}
    file = write_object(tmp_path / "vqa_val_eval.json", [row | {"question_id": 2}, row | change])
    items = read_questions(str(file))
    assert len(items) == 1 and items.left_out == {problem: [f"{file}, annotation 2"]}


@pytest.fixture
def karpathy(tmp_path):
    show(tmp_path, "train2014/COCO_train2014_000000057870.jpg", *(
        f"val2014/COCO_val2014_{id:012d}.jpg" for id in (391895, 522418, 184613)))
    return write_object(tmp_path / "annotations" / "dataset_coco.json", KARPATHY)


def test_karpathys_splits_are_read_each_by_its_name(karpathy):
    """Training takes train and restval, evaluation test, as the papers do."""
    of_training = [("COCO_val2014_000000522418.jpg", "a woman cuts a cake"),
                   ("COCO_train2014_000000057870.jpg", "a table"),
                   ("COCO_train2014_000000057870.jpg", "chairs")]
    pairs = read_pairs(f"coco={karpathy}")
    assert of(pairs) == of_training
    assert not pairs.left_out
    assert of(read_pairs(f"coco={karpathy}#train:0.5")) == of_training[1:]
    assert of(read_pairs(f"{karpathy}#val")) == [("COCO_val2014_000000184613.jpg", "a child")]
    questions = read_questions(str(karpathy))
    assert [questions[i] for i in range(len(questions))] == [
        {"id": 391895, "question": None, "answers": ["A man.", "A rider"],
         "image": str(karpathy.parent.parent / "val2014" / "COCO_val2014_000000391895.jpg")}]
    with pytest.raises(ValueError, match="nothing is of the split dev.*restval, test, train, val"):
        read_pairs(f"{karpathy}#dev")


def test_a_split_of_what_has_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match='pairs.jsonl#test: a list of .* has no splits'):
        read_pairs(f"{write_pairs(tmp_path, 2)}#test")


FLICKR8K_ROWS = {"dataset": "flickr8k", "images": [
    karpathy_row("train", "2513260012_03d33305cf.jpg", ["A black dog is running ."], 0)]}

# Flickr30k's results.csv (Kaggle, hsankesara): bars, blanks behind them, quotes that mean nothing,
# and one line, of 2199200615.jpg, in which the second bar is missing
RESULTS = """image_name| comment_number| comment
1000092795.jpg| 0| Two young guys with shaggy hair look at their hands .
1000092795.jpg| 1| Two "friends , White males are outside .
2199200615.jpg| 3| A dog runs .
2199200615.jpg| 4   A dog runs across the grass .
"""

# Flickr8k.token.txt (Flickr8k_text.zip, Hodosh et al.): one image is named .jpg.1, and not there
TOKENS = """1000268201_693b08cb0e.jpg#0\tA child in a pink dress .
1000268201_693b08cb0e.jpg#1\tA girl going into a wooden building .
2258277193_586949ec62.jpg.1#0\tsome people
"""

# Flickr8k's captions.txt (Kaggle, adityajn105): commas, quoted where a caption has one
KAGGLE = """image,caption
1000268201_693b08cb0e.jpg,A child in a pink dress .
1001773457_577c3a7d70.jpg,"A black dog , and a spotted dog"
1001773457_577c3a7d70.jpg,\"\"\"Look\"\" says a sign .\"
"""

# TextCaps_0.1_train.json (textvqa.org): a row a caption, with all five in each; TextVQA's images
TEXTCAPS = {"dataset_type": "train", "dataset_name": "textcaps", "dataset_version": "0.1", "data": [
    {"image_id": "0054c91397f2fe05", "image_path": "train/0054c91397f2fe05.jpg", "caption_id": i,
     "image_name": "0054c91397f2fe05", "set_name": "train", "image_classes": ["Mobile phone"],
     "caption_str": caption, "caption_tokens": caption.lower().split(),
     "reference_strs": ["The front of a phone.", "a Nokia"], "image_width": 1024}
    for i, caption in enumerate(["The front of a phone.", "a Nokia"])]}

# region_descriptions.json (visualgenome.org): regions of an image, which is in one of two folders
REGIONS = [
    {"id": 1, "regions": [
        {"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "x": 421, "y": 57,
         "phrase": "the clock is green in colour"},
        {"region_id": 1383, "width": 182, "height": 213, "image_id": 1, "x": 194, "y": 372,
         "phrase": "shade is along the street "}]},
    {"id": 2410000, "regions": [
        {"region_id": 9, "width": 1, "height": 1, "image_id": 2410000, "x": 0, "y": 0, "phrase": "a cow"}]}]

# cc_sbu_align/filter_cap.json (Vision-CAIR/MiniGPT-4), image/NUMBER.jpg; VPGTrans reads a plain list
ALIGNED = [{"image_id": "2", "caption": "The image shows a man."}, {"image_id": 3, "caption": "A boat."}]

# blip_laion_cc_sbu_558k.json (liuhaotian/LLaVA-Pretrain), images in folders beside it
PRETRAIN = [
    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam"}]},
    {"id": "002239345", "image": "00223/002239345.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
        {"from": "gpt", "value": "a grey watch with an army style strap"}]}]

# img2dataset's "files": 00000/, with .txt and .json beside what could be fetched, and statistics
META = {"caption": "a small dog", "url": "http://x/1.jpg", "key": "000000001", "status": "success",
        "error_message": None, "width": 40, "height": 30, "sha256": "00"}

# file, its content, the images that are there, the pairs in it, {why one is left out: how many}
DISTRIBUTED = {
    "dataset_flickr8k": (
        "dataset_flickr8k.json", FLICKR8K_ROWS, ["Flicker8k_Dataset/2513260012_03d33305cf.jpg"],
        [("2513260012_03d33305cf.jpg", "a black dog is running")], {}),
    "results.csv": (
        "results.csv", RESULTS,
        ["flickr30k_images/1000092795.jpg", "flickr30k_images/2199200615.jpg"],
        [("1000092795.jpg", "two young guys with shaggy hair look at their hands"),
         ("1000092795.jpg", "two friends , white males are outside"),
         ("2199200615.jpg", "a dog runs")], {"no caption": 1}),
    "Flickr8k.token.txt": (
        "Flickr8k_text/Flickr8k.token.txt", TOKENS, ["Flicker8k_Dataset/1000268201_693b08cb0e.jpg"],
        [("1000268201_693b08cb0e.jpg", "a child in a pink dress"),
         ("1000268201_693b08cb0e.jpg", "a girl going into a wooden building"),
         ("2258277193_586949ec62.jpg.1", "some people")], {}),
    "results.token": (
        "results_20130124.token", TOKENS[:53] + "\nno tab", ["flickr30k-images/1000268201_693b08cb0e.jpg"],
        [("1000268201_693b08cb0e.jpg", "a child in a pink dress")], {"damaged line": 1}),
    "captions.txt": (
        "captions.txt", KAGGLE, ["Images/1000268201_693b08cb0e.jpg"],
        [("1000268201_693b08cb0e.jpg", "a child in a pink dress"),
         ("1001773457_577c3a7d70.jpg", "a black dog , and a spotted dog"),
         ("1001773457_577c3a7d70.jpg", "look says a sign")], {}),
    "TextCaps": (
        "TextCaps_0.1_train.json", TEXTCAPS, ["train_images/0054c91397f2fe05.jpg"],
        [("0054c91397f2fe05.jpg", "the front of a phone"), ("0054c91397f2fe05.jpg", "a nokia")], {}),
    "TextCaps, test": (
        "TextCaps_0.1_test.json", {"data": [TEXTCAPS["data"][0], {"image_id": "1", "image_name": "1"}]},
        ["test_images/0054c91397f2fe05.jpg"],
        [("0054c91397f2fe05.jpg", "the front of a phone")], {"no caption_str": 1}),
    "Visual Genome": (
        "region_descriptions.json", REGIONS, ["VG_100K/1.jpg", "VG_100K_2/2410000.jpg"],
        [("1.jpg", "the clock is green in colour"), ("1.jpg", "shade is along the street"),
         ("2410000.jpg", "a cow")], {}),
    "LAVIS": (
        "coco_karpathy_train.json",
        [{"caption": "A woman ", "image": "val2014/COCO_val2014_000000522418.jpg",
          "image_id": "coco_522418"}],
        ["images/val2014/COCO_val2014_000000522418.jpg"],
        [("COCO_val2014_000000522418.jpg", "a woman")], {}),
    "cc_sbu_align": (
        "filter_cap.json", {"annotations": ALIGNED}, ["image/2.jpg", "image/3.jpg"],
        [("2.jpg", "the image shows a man"), ("3.jpg", "a boat")], {}),
    "cc_sbu_align, a list": (
        "filter_cap.json", ALIGNED, ["image/2.jpg"],
        [("2.jpg", "the image shows a man"), ("3.jpg", "a boat")], {}),
    "LLaVA-Pretrain": (
        "blip_laion_cc_sbu_558k.json", PRETRAIN, ["00453/004539375.jpg", "images/x.jpg"],
        [("004539375.jpg", "select luxury furniture 3 - inch gel memory foam"),
         ("002239345.jpg", "a grey watch with an army style strap")], {}),
    "ShareGPT4V": (
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        [PRETRAIN[0] | {"image": "sam/images/sa_1.jpg"},
         PRETRAIN[1] | {"conversations": PRETRAIN[1]["conversations"] * 2},
         {"id": "t", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]}],
        ["sam/images/sa_1.jpg"],
        [("sa_1.jpg", "select luxury furniture 3 - inch gel memory foam")],
        {"several images": 1, "no image": 1}),
    "metadata.jsonl": (
        "metadata.jsonl", '{"file_name": "a/1.png", "text": "one", "label": 3}\n', ["a/1.png"],
        [("1.png", "one")], {}),
}


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_files_are_read_as_they_are_distributed(tmp_path, name):
    file, content, images, found, left_out = DISTRIBUTED[name]
    show(tmp_path, *images)
    content = content if isinstance(content, str) else json.dumps(content)
    pairs = read_pairs(str(write(tmp_path / file, content)))
    assert of(pairs) == found
    assert {problem: len(places) for problem, places in pairs.left_out.items()} == left_out
    assert Path(pairs.file(0)).is_file()
    if name == "Visual Genome":
        assert all(Path(file).is_file() for file in pairs.files())


def test_images_of_a_known_data_set_are_found_in_the_folder_that_is_named(tmp_path):
    file = write_object(tmp_path / "notes" / "here" / "region_descriptions.json", REGIONS)
    show(tmp_path, "elsewhere/VG_100K/1.jpg", "elsewhere/VG_100K_2/2410000.jpg")
    pairs = read_pairs(f"vg={file}@{tmp_path / 'elsewhere'}")
    assert all(Path(file).is_file() for file in pairs.files())
    with pytest.raises(FileNotFoundError, match="region_descriptions.json@FOLDER"):
        read_pairs(str(file))


def test_img2datasets_files_are_a_folder(tmp_path):
    """The .txt counts where there is one; without --caption_col, there is none, nor a caption in
    the .json."""
    show(tmp_path, *(f"00000/{i:09d}.jpg" for i in range(5)))
    write(tmp_path / "00000" / "000000000.txt", "a cat")
    write_object(tmp_path / "00000" / "000000000.json", META | {"caption": "another"})
    write_object(tmp_path / "00000" / "000000001.json", META)
    write_object(tmp_path / "00000" / "000000002.json", META | {"caption": None})
    write(tmp_path / "00000" / "000000003.json", "{")
    write_object(tmp_path / "00000_stats.json", {"count": 5, "successes": 5})
    write(tmp_path / "00000.parquet", b"PAR1")
    pairs = read_pairs(str(tmp_path))
    assert of(pairs) == [("000000000.jpg", "a cat"), ("000000001.jpg", "a small dog")]
    names = {problem: [Path(place).name for place in places] for problem, places in pairs.left_out.items()}
    assert names == {"no caption": ["000000002.jpg"], "damaged caption file": ["000000003.json"],
                     "no caption file": ["000000004.jpg"]}


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", '{"file_name": "0001.png", "text": "one"}\n'
                       '{"file_name": "deep/2.png", "text": "two"}\n'),
    ("metadata.csv", "file_name,text\n0001.png,one\ndeep/2.png,two\n")])
def test_hugging_faces_image_folders_say_what_their_images_show(tmp_path, name, text):
    """In the folder or, for each split, in a folder below it."""
    show(tmp_path, "train/0001.png", "train/deep/2.png")
    write(tmp_path / "train" / name, text)
    for place in (tmp_path, tmp_path / "train"):
        pairs = read_pairs(str(place))
        assert of(pairs) == [("0001.png", "one"), ("2.png", "two")]
        assert not pairs.left_out
        assert all(Path(file).is_file() for file in pairs.files())


def test_a_folder_of_images_without_texts_is_a_data_set_of_images(tmp_path):
    show(tmp_path, "b/2.jpg", "a.png")
    write(tmp_path / "notes.md", "x")
    write(tmp_path / "metadata.csv", "file_name,text\n")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    items = read_pictures(str(tmp_path))
    assert items.left_out == {"link to a folder": [str(tmp_path / "link")]}
    assert [items[i]["image"] for i in range(2)] == [str(tmp_path / "a.png"), str(tmp_path / "b/2.jpg")]
    assert len(items) == 2
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="not one image with a caption .*2 left out: no caption file"):
        read_pairs(str(tmp_path))


@pytest.mark.parametrize("name, text, says", [
    ("a.json", '{"model": {}}', "an object with the keys 'model'.*Karpathy.*COCO.*TextCaps"),
    ("a.txt", "Dear reader\n", "must name a column .* it names dear reader"),
    ("a.json", json.dumps({"questions": [{"question_id": 1, "image_id": 1, "question": "?"}]}),
     "VQA's .* gives questions, but no captions; these are in .*COCO's")])
def test_what_is_read_otherwise_or_not_at_all_is_said(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        read_pairs(str(write(tmp_path / name, text)))


# ------------------------------------------------------------------------ conversations and questions


def items_of(items):
    """All items, each with the name of its image alone."""
    found = []
    for i in range(len(items)):
        item = items[i]
        item["image"] = item["image"] and Path(item["image"]).name
        found.append(item)
    return found


def say(*texts, names=("human", "gpt")):
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


# llava_instruct_150k.json, llava_v1_5_mix665k.json (haotian-liu/LLaVA): the mark of the image before
# or behind the text; ShareGPT's conversations, without an image, begin with an answer at times
LLAVA = [
    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": say(
        "<image>\nWhat are the colors of the bus?", "White and red.", "Where is it?", "On a street.")},
    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": say(
        "Describe it.\n<image>", "A bus.")},
    {"id": "wgByO4Y_0", "model": "", "conversations": say("Hi", "Hello!")},
    {"id": "wgByO4Y_1", "conversations": say("and so on", "More?", "Yes.", names=("gpt", "human"))}]


def test_llavas_conversations_are_questions_and_answers(tmp_path):
    show(tmp_path, "coco/train2017/000000033471.jpg")
    items = read_conversations(str(write_object(tmp_path / "llava.json", LLAVA)))
    bus = "000000033471.jpg"
    assert items_of(items) == [
        {"id": "000000033471", "image": bus, "turns": [
            ["What are the colors of the bus?", "White and red."], ["Where is it?", "On a street."]]},
        {"id": "000000033471", "image": bus, "turns": [["Describe it.", "A bus."]]},
        {"id": "wgByO4Y_0", "image": None, "turns": [["Hi", "Hello!"]]},
        {"id": "wgByO4Y_1", "image": None, "turns": [["More?", "Yes."]]}]
    assert items.image.tolist() == [0, 0, -1, -1]
    assert len(items.files()) == 1
    assert not items.left_out and not items.crop


# transformers' and TRL's: contents are texts or parts, images beside them or in a part
MESSAGES = [
    {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}], "images": ["1.png"]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "And"},
                                               {"type": "image", "path": "1.png"}]},
                  {"role": "assistant", "content": "A dog."}]},
    {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "I."}],
     "images": [{"path": "1.png"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello "}]}]


@pytest.mark.parametrize("key, image", [("image", "1.png"), ("images", ["1.png"])])
def test_a_picture_beside_messages_is_theirs_by_either_name(tmp_path, key, image):
    show(tmp_path, "1.png")
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said, key: image}) + "\n")
    items = read_conversations(str(tmp_path / "a.jsonl"))
    assert items.file(0) == str(tmp_path / "1.png")


@pytest.mark.parametrize("name", ["messages.json", "messages.jsonl"])
def test_messages_are_questions_and_answers(tmp_path, name):
    show(tmp_path, "1.png")
    text = json.dumps(MESSAGES)
    if name.endswith("l"):
        text = "\n".join(map(json.dumps, MESSAGES))
    items = read_conversations(str(write(tmp_path / name, text)))
    assert items_of(items) == [
        {"id": None, "image": "1.png", "system": "Be brief.", "turns": [["What is it?", "A cat."]]},
        {"id": None, "image": "1.png", "turns": [["And", "A dog."]]},
        {"id": None, "image": "1.png", "turns": [["Who?", "I."]]},
        {"id": None, "image": None, "turns": [["Hi", " Hello "]]}]


def test_cc_sbu_align_is_one_turn_whose_instruction_is_to_be_drawn(tmp_path):
    """Its captions are not cleaned."""
    show(tmp_path, "image/2.jpg")
    for content in (ALIGNED, {"annotations": ALIGNED}):
        items = read_conversations(str(write_object(tmp_path / "filter_cap.json", content)))
        assert items_of(items) == [
            {"id": "2", "image": "2.jpg", "turns": [[None, "The image shows a man."]]},
            {"id": "3", "image": "3.jpg", "turns": [[None, "A boat."]]}]


@pytest.mark.parametrize("row, problem", [
    ({"conversations": say("a", "b", "c")}, "turns that do not alternate"),
    ({"conversations": say("a", "b", names=("human", "human"))}, "turns that do not alternate"),
    ({"conversations": say("a", "b", names=("gpt", "gpt"))}, "turns that do not alternate"),
    ({"conversations": []}, "turns that do not alternate"),
    ({"conversations": say("a", " ")}, "an empty answer"),
    ({"conversations": say("a", "b", "<image>c", "d"), "image": "1.png"}, "an image in a later turn"),
    ({"conversations": say("<image><image>a", "b"), "image": "1.png"}, "several images"),
    ({"conversations": say("<image>a", "b"), "image": ["1.png", "2.png"]}, "several images"),
    ({"conversations": say("<image>a", "b")}, "no image"),
    ({"conversations": say("<image>a", "b"), "image": 7}, "no image"),
    ({"conversations": say("a", "b"), "video": "1.mp4"}, "a video"),
    ({"conversations": say("a", "b", names=("human", "tool"))}, "a turn of 'tool'"),
    ({"conversations": [{"from": "human"}]}, "no value"),
    ({"conversations": say(1, 2)}, "an annotation of another layout"),
    ({"conversations": "a"}, "an annotation of another layout"),
    ({"conversations": None}, "an annotation of another layout"),
    ({"conversations": say("\ud800", "b")}, "broken Unicode"),
    ({"text": "b"}, "no conversations"),
    ([], "no object with image and caption")])
def test_conversations_that_cannot_be_used_are_named(tmp_path, row, problem):
    show(tmp_path, "1.png")
    whole = {"id": "1", "image": "1.png", "conversations": say("a", "b")}
    file = write_object(tmp_path / "x.json", [whole, row])
    items = read_conversations(str(file))
    assert len(items) == 1
    assert items.left_out == {problem: [f"{file}, annotation 2"]}


def test_messages_with_parts_of_another_kind_are_named(tmp_path):
    row = {"messages": [{"role": "user", "content": [{"type": "audio"}]},
                        {"role": "assistant", "content": "x"}]}
    items = read_conversations(str(write_object(tmp_path / "x.json", [MESSAGES[3], row])))
    assert items.left_out.keys() == {"a part of the kind audio"}


VQA_QUESTIONS = {
    "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "Is it day?", "question_id": 262148001}]}


def vqa_note(id, answer, kind):
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
    return {"question_id": id, "image_id": 262148, "question_type": "where", "answer_type": kind,
            "multiple_choice_answer": answer, "answers": answers}


# visualqa.org, okvqa.allenai.org: two files, the names of which differ by what they hold
VQA_NOTES = {"annotations": [vqa_note(262148000, "down", "other"), vqa_note(262148001, "yes", "yes/no")]}


@pytest.mark.parametrize("questions, notes", [
    ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")])
def test_vqas_questions_find_their_answers(tmp_path, questions, notes):
    show(tmp_path, "val2014/COCO_val2014_000000262148.jpg")
    file = write_object(tmp_path / questions, VQA_QUESTIONS)
    write_object(tmp_path / notes, VQA_NOTES)
    image = "COCO_val2014_000000262148.jpg"
    assert items_of(read_questions(str(file))) == [
        {"id": 262148000, "image": image, "question": "Where is he looking?", "answers": ["down"] * 10,
         "answer": "down", "group": "other"},
        {"id": 262148001, "image": image, "question": "Is it day?", "answers": ["yes"] * 10,
         "answer": "yes", "group": "yes/no"}]
    strangers = VQA_NOTES["annotations"][:1] + [vqa_note(5, "no", "other")]
    note_file = write_object(tmp_path / notes, {"annotations": strangers})
    items = read_questions(str(file))
    assert len(items) == 1
    assert items.left_out == {
        "no answers": [f"{file}, annotation 2"],
        "answers to a question that is not asked": [f"{note_file}, annotation 2"]}
    write(note_file, "{}")
    with pytest.raises(ValueError, match=f"{notes}: holds no annotations"):
        read_questions(str(file))


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_vqas_images_are_found_where_coco_lies_beside_it(tmp_path, split):
    image = f"coco/{split}/COCO_{split}_000000262148.jpg"
    show(tmp_path, image)
    folder = tmp_path / "vqav2"
    folder.mkdir()
    content = VQA_QUESTIONS | {"data_subtype": split}
    file = write_object(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", content)
    write_object(folder / f"v2_mscoco_{split}_annotations.json", VQA_NOTES)
    assert read_questions(str(file)).file(0) == str(tmp_path / image)


def test_questions_of_test_splits_have_no_answers(tmp_path):
    show(tmp_path, "test2015/COCO_test2015_000000262148.jpg")
    content = VQA_QUESTIONS | {"data_subtype": "test2015"}
    file = write_object(tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", content)
    items = read_questions(f"{file}@{tmp_path / 'test2015'}")
    assert [item["answers"] for item in items_of(items)] == [[], []]
    assert items.file(0).endswith("test2015/COCO_test2015_000000262148.jpg")


# GQA: cs.stanford.edu/people/dorarad/gqa, and LAVIS's file of the same name; LAVIS's for VQAv2 joins
# questions and answers. COCO's references: LAVIS's two files; NoCaps: nocaps.org's, and LAVIS's
GQA = {"201307251": {"semantic": [], "imageId": "n161313", "question": "Is it overcast?", "answer": "no",
                     "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
                     "isBalanced": True, "fullAnswer": "No, it is sunny."}}
NOCAPS = {
    "licenses": [], "info": {}, "images": [
        {"license": 0, "file_name": "0013ea2087020901.jpg", "open_images_id": "0013ea2087020901", "id": 0,
         "coco_url": "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg", "domain": "near-domain"},
        {"file_name": "00.jpg", "id": 1, "domain": "out-domain"}],
    "annotations": [{"image_id": 0, "id": 0, "caption": "A baby."}, {"image_id": 0, "id": 1, "caption": "B"},
                    {"image_id": 7, "id": 2, "caption": "C"}]}
QUESTIONS = {
    "GQA": ("testdev_balanced_questions.json", GQA, "images/n161313.jpg", [
        {"id": "201307251", "image": "n161313.jpg", "question": "Is it overcast?", "answers": ["no"],
         "group": "verify"}], {}),
    "LAVIS, GQA": (
        "testdev_balanced_questions.json",
        [{"image": "n161313.jpg", "question": "Is it?", "question_id": "201", "answer": "no"}],
        "n161313.jpg",
        [{"id": "201", "image": "n161313.jpg", "question": "Is it?", "answers": ["no"]}], {}),
    "LAVIS, VQAv2": (
        "vqa_val_eval.json",
        [{"question_id": 1, "question": "What?", "answer": ["a"] * 10, "image": "val2014/1.jpg"}],
        "coco/val2014/1.jpg", None, {}),
    "LAVIS, COCO": (
        "coco_karpathy_test.json",
        [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man.", "A rider"]}],
        "images/val2014/COCO_val2014_000000391895.jpg",
        [{"id": 391895, "image": "COCO_val2014_000000391895.jpg", "question": None,
          "answers": ["A man.", "A rider"]}], {}),
    "LAVIS, COCO's references": (
        "coco_karpathy_test_gt.json",
        {"images": [{"id": 391895}], "annotations": [{"image_id": 391895, "id": 1, "caption": "A man."}]},
        "val2014/COCO_val2014_000000391895.jpg",
        [{"id": 391895, "image": "COCO_val2014_000000391895.jpg", "question": None,
          "answers": ["A man."]}], {}),
    "NoCaps": (
        "nocaps_val_4500_captions.json", NOCAPS, "images/0013ea2087020901.jpg",
        [{"id": 0, "image": "0013ea2087020901.jpg", "question": None, "answers": ["A baby.", "B"],
          "group": "near-domain"}],
        {"no caption": 1, "captions of an image that is not listed": 1}),
    "LAVIS, NoCaps": (
        "nocaps_val.json", [{"image": "val/0013ea2087020901.jpg", "img_id": 0}],
        "val/0013ea2087020901.jpg",
        [{"id": 0, "image": "0013ea2087020901.jpg", "question": None, "answers": []}], {}),
    "TextCaps": (
        "TextCaps_0.1_val.json", TEXTCAPS, "train_images/0054c91397f2fe05.jpg",
        [{"id": "0054c91397f2fe05", "image": "0054c91397f2fe05.jpg", "question": None,
          "answers": ["The front of a phone.", "a Nokia"]}], {}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_keep_all_references_and_what_scores_are_split_by(tmp_path, name):
    file, content, image, expected, left_out = QUESTIONS[name]
    show(tmp_path, image)
    file = write_object(tmp_path / file, content)
    if expected is None:  # the images are elsewhere
        with pytest.raises(FileNotFoundError, match=f"{file.name}@FOLDER"):
            read_questions(str(file))
        file = f"{file}@{tmp_path / 'coco'}"
        expected = [{"id": 1, "image": "1.jpg", "question": "What?", "answers": ["a"] * 10}]
    items = read_questions(str(file))
    assert items_of(items) == expected
    assert Path(items.file(0)).is_file()
    assert {problem: len(places) for problem, places in items.left_out.items()} == left_out


def test_a_question_that_is_there_twice_counts_once(tmp_path):
    show(tmp_path, "n161313.jpg")
    row = {"image": "n161313.jpg", "question": "Is it?", "question_id": "201", "answer": "no"}
    file = write_object(tmp_path / "x.json", [row, row])
    items = read_questions(str(file))
    assert len(items) == 1
    assert items.left_out == {"an id for the second time": [f"{file}, annotation 2"]}


UNASKED = ("image", "lecture", "solution")

# problems.json, pid_splits.json, captions.json (lupantech/ScienceQA), images/SPLIT/ID/image.png
def problem(split, answer=1, image="image.png", **more):
    return {"question": "Which?", "choices": ["Ohio", "Iowa"], "answer": answer, "hint": "", "image": image,
            "task": "closed choice", "grade": "grade2", "subject": "social science", "topic": "geography",
            "category": "Geography", "skill": "Read a map", "lecture": "Maps.", "solution": "See.",
            "split": split, **more}


def test_scienceqas_problems_are_read_by_split(tmp_path):
    show(tmp_path, "images/test/1/image.png", "images/train/2/image.png")
    problems = {"1": problem("test"), "2": problem("train", 0), "3": problem("test", image=None),
                "4": problem("test", answer=2), "5": problem("val"), "6": 7}
    file = write_object(tmp_path / "problems.json", problems)
    write_object(tmp_path / "pid_splits.json", {"minitest": ["3", "1", "9"]})
    write_object(tmp_path / "captions.json", {"captions": {"1": "a map"}})
    items = read_questions(str(file))
    first, second = items_of(items)
    told = {key: value for key, value in problem("test").items() if key not in UNASKED}
    assert first == told | {"id": "1", "image": "image.png", "answers": ["Iowa"], "caption": "a map"}
    assert second == told | {"id": "3", "image": None, "answers": ["Iowa"]}
    assert items.file(0) == str(tmp_path / "images" / "test" / "1" / "image.png")
    assert items.left_out == {"an answer that is none of the choices": [f"{file}, question 4"]}
    mini = read_questions(f"{file}#minitest")
    assert [item["id"] for item in items_of(mini)] == ["3", "1"]
    assert mini.left_out == {"a question that is not there": [f"{file}, question 9"]}
    both = items_of(read_questions(f"{file}#train+test"))
    assert [item["id"] for item in both] == ["2", "1", "3"]
    with pytest.raises(ValueError, match="problems.json: nothing is of the split minival.*pid_splits"):
        read_questions(f"{file}#minival")


def test_for_an_encoder_each_answer_is_an_item_with_all_turns_before_it(tmp_path):
    show(tmp_path, "coco/train2017/000000033471.jpg")
    items = read_conversations(str(write_object(tmp_path / "llava.json", LLAVA))).each_answer()
    first = ["What are the colors of the bus?", "White and red."]
    found = items_of(items)
    assert [item["turns"] for item in found[:3]] == [
        [first], [first, ["Where is it?", "On a street."]], [["Describe it.", "A bus."]]]
    assert items.image.tolist() == [0, 0, 0, -1, -1]
    assert len(items.files()) == 1


def test_items_can_be_held_out_by_image(tmp_path):
    show(tmp_path, "coco/train2017/000000033471.jpg")
    items = read_conversations(str(write_object(tmp_path / "llava.json", LLAVA)))
    rest = items.without(set(items.files()))
    assert [item["id"] for item in items_of(rest)] == ["wgByO4Y_0", "wgByO4Y_1"]
    assert rest.files() == []
    held = items.without(set(items.files()), instead=True)
    assert [item["image"] for item in items_of(held)] == ["000000033471.jpg"] * 2


# --------------------------------------------------------------------------------------------- specs


def test_a_spec_names_source_images_and_weight(tmp_path):
    assert parse_spec("a/b.jsonl@c") == ("a", Path("a/b.jsonl"), Path("c"), None, None)
    whole = ("n", Path("x/y.json"), Path("images"), 0.5, "train+restval")
    assert parse_spec("n=x/y.json#train+restval@images:0.5") == whole
    assert parse_spec("x/y.json#val:2") == ("x", Path("x/y.json"), None, 2.0, "val")
    assert parse_spec("x.jsonl")[0] == "x"
    assert parse_spec("coco/x.jsonl")[0] == "coco"


def test_paths_with_signs_in_them_are_read_as_they_are(tmp_path):
    folder = tmp_path / "we@ird=x" / "a:5"
    file = write_pairs(folder, 4)
    assert parse_spec(str(file)) == ("a:5", file, None, None, None)
    assert len(read_pairs(str(file))) == 4
    assert parse_spec(str(folder)) == ("a:5", folder, None, None, None)
    assert parse_spec(f"n={file}:0.5") == ("n", file, None, 0.5, None)
    assert parse_spec(f"{file}#val@{tmp_path}/i@m:2") == ("a:5", file, tmp_path / "i@m", 2, "val")
    (folder / "x#val").write_text("")
    assert parse_spec(f"n={folder}/x#val@c") == ("n", folder / "x#val", Path("c"), None, None)
    write_shard(folder / "00.tar", {"1.jpg": encoded(1), "1.txt": b"one"})
    for shards in ("{00..00}.tar", "*.tar"):
        assert list(read_pairs(f"n={folder}/{shards}:2").captions) == ["one"]
    with pytest.raises(ValueError, match="does not read"):
        parse_spec(f"{write_pairs(tmp_path, 1)}@")


def test_the_papers_data_is_found_where_it_lies(tmp_path):
    write(tmp_path / "coco" / "annotations" / "captions_train2014.json", "")
    write(tmp_path / "coco" / "annotations" / "captions_val2017.json", "")
    write(tmp_path / "vg" / "region_descriptions.json", "")
    found = {name: file.name for name, file in train.find_paper_data(tmp_path).items()}
    assert found == {"coco": "captions_train2014.json", "vg": "region_descriptions.json",
                     "val": "captions_val2017.json"}
    write(tmp_path / "vg" / "vg_caption.json", "")
    assert train.find_paper_data(tmp_path)["vg"].name == "vg_caption.json"
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


def test_a_kept_scan_of_regions_ends_when_their_images_are_unpacked(tmp_path, monkeypatch):
    """It knows in which of two folders each lies."""
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "scans"))
    monkeypatch.setattr(pairs_module, "KEPT_FROM", 1)
    rows = [{"id": i, "regions": [{"phrase": f"number {i}"}]} for i in (1, 2)]
    file = write_object(tmp_path / "region_descriptions.json", rows)
    with pytest.raises(FileNotFoundError):
        read_pairs(str(file))
    places = [tmp_path / "VG_100K" / "1.jpg", tmp_path / "VG_100K_2" / "2.jpg"]
    for n, place in enumerate(places, 1):
        save_image(place)
        assert read_pairs(str(file)).files()[:n] == [str(place) for place in places[:n]]


# -------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("ending, format", [
    ("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jfif", "JPEG"), ("pnm", "PPM")])
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


def test_a_shard_in_a_folder_of_pairs_hides_nothing(tmp_path):
    write_shard(tmp_path / "backup.tar", {"1.jpg": encoded(1), "1.txt": b"one"})
    save_image(tmp_path / "contact_sheet.png")  # as pairs.py draws it
    assert list(read_pairs(str(tmp_path)).captions) == ["one"]
    save_image(tmp_path / "2.png")
    write(tmp_path / "2.txt", "two")
    with pytest.raises(ValueError, match=r"backup.tar.*2.png; .*\*.tar, .* move the shards"):
        read_pairs(str(tmp_path))
    assert list(read_pairs(f"{tmp_path}/*.tar").captions) == ["one"]
    (tmp_path / "backup.tar").rename(tmp_path / "backup.tar.old")
    assert of(read_pairs(str(tmp_path)))[-1] == ("2.png", "two")


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


def as_karpathy():
    rows = [karpathy_row("train", f"{i}.png", [CAPTIONS[i]], i) for i in range(COUNT)]
    return json.dumps({"dataset": "flickr8k", "images": rows})


def as_textcaps():
    rows = [{"image_id": f"{i}", "caption_str": CAPTIONS[i], "caption_id": i} for i in range(COUNT)]
    return json.dumps({"dataset_type": "train", "data": rows})


def as_regions():
    rows = [{"id": i, "regions": [{"region_id": i, "phrase": CAPTIONS[i]}]} for i in range(COUNT)]
    return json.dumps(rows)


def as_aligned():
    rows = [{"image_id": f"{i}", "caption": CAPTIONS[i]} for i in range(COUNT)]
    return json.dumps({"annotations": rows})


def as_llava():
    rows = []
    for row in ROWS:
        said = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": row["caption"]}]
        rows.append({"id": row["image"], "image": row["image"], "conversations": said})
    return json.dumps(rows)


def as_results():
    rows = [f"{row['image']}| 0| {row['caption']}\n" for row in ROWS]
    return "image_name| comment_number| comment\n" + "".join(rows)


def as_tokens():
    return "".join(f"{row['image']}#0\t{row['caption']}\n" for row in ROWS)


def as_metadata():
    return "".join(json.dumps({"file_name": r["image"], "text": r["caption"]}) + "\n" for r in ROWS)


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
    "results": ("results.csv", lambda folder: as_results()),
    "captions.txt": ("captions.txt", lambda folder: as_table(",")),
    "token.txt": ("token.txt", lambda folder: as_tokens()),
    "karpathy": ("x.json", lambda folder: as_karpathy()),
    "textcaps": ("x.json", lambda folder: as_textcaps()),
    "regions": ("x.json", lambda folder: as_regions()),
    "aligned": ("x.json", lambda folder: as_aligned()),
    "llava": ("x.json", lambda folder: as_llava()),
    "metadata": ("metadata.jsonl", lambda folder: as_metadata()),
    "folder": ("x/5.txt", lambda folder: CAPTIONS[HIT]),
    "img2dataset": ("x/5.json", lambda folder: json.dumps(META | {"caption": CAPTIONS[HIT]})),
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
    "page": lambda content: b"<!DOCTYPE html><title>404 Not Found</title>\n",
    "zip": lambda content: b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(range(256)) * 8,
    "cut": lambda content: content[: at_hit(content) + 9],
    "end": lambda content: content[:-3],
    "UTF-8": put(b"\xff", 2, 3),
    "letter": put(b"x", 2, 3),
    "zeros": put(bytes(6), 3, 9),
    "lost": put(b"", 3, 12),
    "quote": put(b'"', 0, 1),
    "line": put(b"\n", 6, 7),
    "blank": put(b" " * 17, 0, 17),
    "control": put(b"\x07", 6, 7),
    "number": put(b"7", -1, 18),
    "null": put(b"null", -1, 18),
    "object": put(b'{"text": "number 5"}', -1, 18),
    "half": put(b"\\ud800", 2, 3),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 12 images, and {format: bytes} of what annotates them."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        for kind in ("png", "jpg"):
            save_image(folder / f"{i}.{kind}", colour=(i, 0, 0), size=(8, 8))
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
    if "/" not in name:
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
             empty page zip cut end UTF-8 letter zeros lost quote line blank control number null object half
lines        R     R    R   T   E   5     c      c     c    5     5    5     =       5      5    5      5
list         R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
coco         R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
csv          R     R    R   t   e   5     c      c     c    T     5    5     =       -      -    -      -
tsv          R     R    R   t   e   5     c      c     c    T     5    5     =       -      -    -      -
results      R     R    R   t   e   5     c      c     c    c     5    5     =       -      -    -      -
captions.txt R     R    R   t   e   5     c      c     c    T     5    5     =       -      -    -      -
token.txt    R     R    R   t   e   5     c      c     c    c     5    5     =       -      -    -      -
karpathy     R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
textcaps     R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
regions      R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
aligned      R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
llava        R     R    R   R   R   R     c      c     c    R     =    5     =       5      5    5      5
metadata     R     R    R   T   E   5     c      c     c    5     5    5     =       5      5    5      5
folder       5     c    5   c   c   5     c      c     c    c     c    5     =       -      -    -      -
img2dataset  5     5    5   5   5   5     c      c     c    5     =    5     =       5      5    5      5
tar          R     R    R   T   =   5     c      c     T    c     =    5     =       -      -    -      -
webdataset   R     R    R   T   =   5     c      c     T    c     =    5     =       -      -    -      -
"""
# t, e: a table that ends in the middle of a line looks like any other. = of a tar cut at its end:
# what is missing is some of the zeros behind its end mark.
WHY_NOT = {"csv": "its texts have no types", "tsv": "as csv", "results": "as csv",
           "captions.txt": "as csv", "token.txt": "as csv", "folder": "as csv", "tar": "as csv",
           "webdataset": "as csv"}  # formats with a - in their line


def damage_cells():
    header, *lines = DAMAGE.strip("\n").splitlines()
    cells = []
    for line in lines:
        format, *letters = line.split()
        cells += [(fault, format, letter) for fault, letter in zip(header.split(), letters, strict=True)]
    return cells


def test_no_cell_of_the_table_of_damage_is_empty_without_a_reason():
    cells = {(fault, format): letter for fault, format, letter in damage_cells()}
    assert cells.keys() == {(fault, format) for fault in FAULTS for format in DAMAGED}
    assert {format for (_, format), letter in cells.items() if letter == "-"} == WHY_NOT.keys()
    assert all(WHY_NOT.values())


@pytest.mark.parametrize("fault, format, cell", [cell for cell in damage_cells() if cell[2] != "-"])
def test_damage_costs_what_it_hits_and_is_named(tmp_path, pictures, fault, format, cell):
    spec = write_damaged(tmp_path, pictures, format, FAULTS[fault](pictures[1][format]))
    name, _ = DAMAGED[format]
    assert outcome(spec, "x" if "/" in name else name) == cell


@pytest.mark.parametrize("format", [format for format, (name, _) in DAMAGED.items() if "/" not in name])
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


@pytest.mark.parametrize("content, says", [
    (LLAVA, ["4 items, 1 images; 2 items without one", "turns: 1.25 a conversation",
             "answers: 2.0 words", "questions: 2.8 words"]),
    (NOCAPS, ["1 items", "references: 2 an item", "groups: near-domain 1"]),
    ({"1": problem("test"), "2": problem("test", image=None)}, ["2 items", "references: 1 an item"])])
def test_the_command_shows_conversations_and_questions(tmp_path, capsys, content, says):
    show(tmp_path, "coco/train2017/000000033471.jpg", "0013ea2087020901.jpg", "test/1/image.png")
    file = write_object(tmp_path / "x.json", content)
    sheet = tmp_path / "sheet.png"
    kind = ["--as", "questions"] if content is NOCAPS else []
    main([str(file), "--sheet", str(sheet), "--image-size", "60", *kind])
    said = capsys.readouterr().out
    assert all(words in said for words in says), said
    assert "cannot be read: 0 of 1 images" in said
    assert Image.open(sheet).size == (8 * 68 + 8, 60 + 8 + 96 + 8)
    assert np.asarray(Image.open(sheet).convert("L"))[70:].min() < 100  # something is written there


def test_the_command_shows_a_folder_of_images_without_texts(tmp_path, capsys):
    show(tmp_path, "1.png", "2.png")
    main([str(tmp_path), "--sheet", str(tmp_path / "sheet.png"), "--image-size", "32"])
    assert "2 items, 2 images" in capsys.readouterr().out


def test_the_command_says_in_a_line_why_not(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "pairs.py: " in (said := capsys.readouterr().err)
    assert "no such file" in said


@pytest.mark.parametrize("sheet", ["missing/sheet.png", "sheet", "sheet.txt", "sheet.psd"])
def test_a_sheet_that_cannot_be_written_is_refused_before_anything_is_read(
        tmp_path, monkeypatch, capsys, sheet):
    monkeypatch.setattr(pairs_module, "read", None)
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
