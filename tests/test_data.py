"""Facts about data.py: tokenizers, captions, images, files of pairs, the order of samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import data
from conftest import write_pairs


@pytest.fixture(scope="module")
def tok(world):
    return data.load_tokenizer(world[1])


# ------------------------------------------------------------------------------------------------------- tokenizers, text


def test_ids_equal_transformers(world, tok):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(world[1] / "tokenizer.json"))
    for text in ["a red square", "  Two  spaces ", "naïve café 漢字 \U0001f600", "tab\tand\nnewline", "", "don't stop"]:
        ids = tok.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"] and tok.decode(ids) == text


def test_vocab_json_and_merges_equal_tokenizer_json(world, tok, tmp_path):
    """facebook/opt-* have no tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(world[1] / "tokenizer.json"))
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    old = data.load_tokenizer(tmp_path)
    for text in ["a red square on a brown table", "naïve 漢字", "x</s>y"]:
        assert old.encode(text) == tok.encode(text)
    assert old.decode([2, *old.encode(" red"), 2]) == " red"
    assert (old.bos_id, old.eos_id, old.pad_id, old.end_id) == (2, 2, 1, tok.encode("\n")[0])


def test_vocab_spells_bytes(tok):
    vocab = tok.vocab()
    assert vocab["é".encode()[:1]] == tok.encode("é")[0] and vocab[b"\n"] == tok.end_id and vocab[b" red"] == tok.encode(" red")[0]
    assert not {0, 1, 2, 3} & set(vocab.values()) and len(vocab) == tok.encoder.get_vocab_size() - 4


def test_captions_are_cleaned_as_blip_does():
    assert data.clean_caption('A "Red" square; (on) a ~table!  #1: yes.') == "a red square on a table 1 yes"
    assert len(data.clean_caption("word " * 80).split()) == 50


def test_a_long_caption_keeps_its_end_mark(tok):
    ids = data.caption_ids(tok, "a red square on a brown table " * 9, max_tokens=10)
    assert len(ids) == 10 and ids[-1] == tok.end_id and ids[:-1] == tok.encode("a red square on a brown table " * 9)[:9]
    assert data.caption_ids(tok, "a red square") == [*tok.encode("a red square"), tok.end_id]


def test_the_prompt_is_soft_prompts_then_bos(tok):
    assert data.prompt_ids(tok, 3) == [-1, -1, -1, 2] and data.prompt_ids(tok, 1, "a red") == [-1, 2, *tok.encode("a red")]


def test_tokens_are_counted_on_captions(tok):
    counts = data.count_tokens(tok, ["a red square", "a red circle"], 400)
    assert counts[tok.end_id] == 2 and counts[tok.encode(" red")[0]] == 2 and counts.sum() == sum(len(data.caption_ids(tok, c)) for c in ("a red square", "a red circle"))


# ------------------------------------------------------------------------------------------------------------- images


def save(path, mode, colour, size=(40, 30), **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = lambda file: data.load_image(file).getpixel((0, 0))
    assert rgb(save(tmp_path / "grey.png", "L", 90)) == (90, 90, 90)
    assert rgb(save(tmp_path / "clear.png", "RGBA", (10, 20, 30, 0))) == (255, 255, 255)  # transparency is white
    assert rgb(save(tmp_path / "half.png", "LA", (0, 128))) == (127, 127, 127)
    assert rgb(save(tmp_path / "deep.png", "I;16", 256 * 90)) == (90, 90, 90)
    assert max(rgb(save(tmp_path / "cmyk.jpg", "CMYK", (0, 0, 0, 255)))) < 10
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 10, 10, 0, 0, 0])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert rgb(tmp_path / "palette.png") == (200, 10, 10) and rgb(tmp_path / "clear.gif") == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert data.load_image(save(tmp_path / "turned.jpg", "RGB", "red", exif=turned)).size == (30, 40)


def test_evaluation_images_equal_transformers(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    theirs = BlipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=list(data.MEAN), image_std=list(data.STD))
    reference = torch.as_tensor(np.array(theirs(image)["pixel_values"][0]))
    assert (data.normalise(data.resize(image, 28)[None])[0] - reference).abs().max() < 1e-5


def test_random_crops_are_half_to_all_of_the_area_and_half_are_flipped():
    """On a picture of its own coordinates, a crop shows where it comes from."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None] * 2, np.arange(100)[:, None] * 2
    areas, flips = [], []
    for seed in range(200):
        crop = data.random_crop(Image.fromarray(ramp), 50, np.random.default_rng(seed)).float()
        width, height = (crop[0, 0, -1] - crop[0, 0, 0]) / 2, (crop[1, -1, 0] - crop[1, 0, 0]) / 2
        areas.append(abs(width * height) / 100**2 * (50 / 49) ** 2), flips.append(bool(width < 0))
        assert crop.shape == (3, 50, 50) and height > 0
    assert 0.45 < min(areas) < 0.55 and max(areas) > 0.9 and 70 < sum(flips) < 130


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    file = tmp_path / "bad.jpg"
    if content is None:
        whole = save(tmp_path / "whole.png", "RGB", "red", (300, 300)).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.write_bytes(content)
    with pytest.raises(OSError, match="bad.jpg"):
        data.load_image(file)


# ------------------------------------------------------------------------------------------------------- files of pairs


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_coco_annotations_find_their_images_and_every_caption(tmp_path):
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (7, 9)]
    annotations = [{"image_id": 7, "caption": "A cat."}, {"image_id": 9, "caption": "A dog"}, {"image_id": 7, "caption": "the same cat"}, {"image_id": 9, "caption": " ."}]
    file = write(tmp_path / "annotations" / "captions_train2017.json", json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "train2017").mkdir()
    for i in (7, 9):
        save(tmp_path / "train2017" / f"{i:012d}.jpg", "RGB", "red")
    pairs = data.read_pairs(f"coco={file}:0.5")
    assert (pairs.name, pairs.captions, pairs.left_out) == ("coco", ["a cat", "a dog", "the same cat"], {"empty caption": 1})
    assert data.parse_spec(f"coco={file}:0.5") == ("coco", file, None, 0.5) and data.parse_spec("a/b.jsonl@c") == ("a", Path("a/b.jsonl"), Path("c"), None)
    assert pairs.files[0] == pairs.files[2] == str(tmp_path / "train2017" / "000000000007.jpg")
    assert data.one_caption_an_image(pairs, 10).captions == ["a cat", "a dog"]


def test_a_list_in_json_and_images_elsewhere(tmp_path):
    save(tmp_path / "1.png", "RGB", "red")
    file = write(tmp_path / "notes" / "deep" / "pairs.json", json.dumps([{"image": "1.png", "caption": ["one", "two"]}]))
    assert data.read_pairs(f"{file}@{tmp_path}").captions == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="pairs.json@FOLDER"):
        data.read_pairs(str(file))


@pytest.mark.parametrize("text, says", [('{"image": "1.png", "caption": "a"}\n{"image": "1.p', "line 2"), ('{"picture": "1.png"}', "caption"),
                                        ('{"image": "1.png", "caption": ""}', "not one caption"), ("", "not one caption"), ("[1]", "lacks"), ("7", "lacks")])
def test_bad_files_of_pairs_say_what_is_wrong(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        data.read_pairs(str(write(tmp_path / "pairs.jsonl", text)))


def test_whole_images_are_held_out_always_the_same():
    pairs = data.Pairs("x", [f"{i // 5}.png" for i in range(500)], [str(i) for i in range(500)])
    held = data.hold_out(pairs, most=500, share=0.05)
    assert len(held) == 5 and held < set(pairs.files) and data.hold_out(pairs) == held and len(data.hold_out(pairs, most=3)) == 3


def test_the_papers_data_is_found_where_it_lies(tmp_path):
    write(tmp_path / "coco" / "annotations" / "captions_train2014.json", "")
    write(tmp_path / "coco" / "annotations" / "captions_val2017.json", "")
    write(tmp_path / "vg" / "vg_caption.json", "")
    assert {name: file.name for name, file in data.find_paper_data(tmp_path).items()} == {
        "coco": "captions_train2014.json", "vg": "vg_caption.json", "val": "captions_val2017.json"}


# ------------------------------------------------------------------------------------------------- order and batches


def test_an_epoch_has_every_pair_once_and_the_next_another_order():
    order = data.plan([30, 12], 100, seed=3)
    assert sorted(order[:42]) == sorted(order[42:84]) == list(range(42)) and (order[:42] != order[42:84]).any()
    assert (order == data.plan([30, 12], 100, seed=3)).all() and (order != data.plan([30, 12], 100, seed=4)).any()


def test_a_mixture_holds_in_every_window():
    order = data.plan([1000, 300, 5000], 20000, seed=0, weights=[0.1, 0.2, 0.7])
    which = np.searchsorted([1000, 1300], order, side="right")
    for start in range(0, 19000, 100):
        counts = np.bincount(which[start : start + 1000], minlength=3)
        assert np.abs(counts - [100, 200, 700]).max() <= 6
    assert sorted(order[which == 0][:1000]) == list(range(1000))  # a whole pass before any repeats


@pytest.fixture(scope="module")
def samples(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return data.Samples([data.read_pairs(str(write_pairs(folder, 40)))], tok, 28, 5)


def test_ranks_share_every_batch_whatever_their_number(samples):
    order = data.plan([40], 40, seed=0)
    steps = lambda **options: [[file for micro in step for file in micro["files"]] for step in data.load_batches(samples, order, 8, **options)]
    alone = steps(micro_batch=8)
    ranks = [steps(micro_batch=3, rank=r, world=2) for r in range(2)]
    assert len(alone) == 5 and [sorted(a) for a in alone] == [sorted(x + y) for x, y in zip(*ranks)]


def test_starting_at_a_step_gives_what_would_have_come(samples):
    order = data.plan([40], 40, seed=0)
    whole, rest = list(data.load_batches(samples, order, 8, 4)), list(data.load_batches(samples, order, 8, 4, first_step=3, workers=1))
    assert len(rest) == 2
    for ours, theirs in zip(rest, whole[3:]):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["images"], b["images"]) and torch.equal(a["target_ids"], b["target_ids"]) and a["files"] == b["files"]


def test_an_unreadable_image_is_replaced_and_named(tok, tmp_path):
    pairs = data.read_pairs(str(write_pairs(tmp_path, 12)))
    (tmp_path / "5.png").write_bytes(b"no image")
    samples = data.Samples([pairs], tok, 28, 5)
    (batch,) = next(data.load_batches(samples, np.arange(12), 12, 12))
    assert len(batch["images"]) == 12 and batch["files"].count(str(tmp_path / "6.png")) == 2
    assert len(batch["bad"]) == 1 and "5.png" in batch["bad"][0]


def test_crops_are_drawn_by_the_position_in_the_plan(samples):
    """The same sample comes out the same, at another position differently; and validation is not cropped at all."""
    image, again, elsewhere = (samples[position, 5][0] for position in (3, 3, 4))
    assert torch.equal(image, again) and not torch.equal(image, elsewhere)
    plain = data.Samples(samples.sets, samples.tok, 28, 5, augment=False)[3, 5][0]
    assert torch.equal(plain, data.resize(data.load_image(samples.sets[0].files[5]), 28)) and not torch.equal(image, plain)
