"""Facts about --caption-with source: a transfer from images, with captions that the source draws."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_lines, rows, save_image, train_in

import captioning
import loop
import train
from pairs import clean_caption, read_pairs

ALONE = loop.Processes(0, 1, torch.device("cpu"), "fp32")
MADE_WITH = {"source": "a", "fingerprint": "0a1b", "captions": 2}


@pytest.fixture
def args():
    return train.parse_arguments(["--src", "a", "--tgt", "b", "--micro-batch", "8", "--precision", "fp32"])


@pytest.fixture
def pairs(world, tmp_path):
    """The world's images in a folder of this test's own."""
    shutil.copytree(world[2].parent, tmp_path / "pairs")
    return read_pairs(str(tmp_path / "pairs" / "pairs.jsonl"))


def kept_file(pairs):
    (file,) = Path(pairs.root).glob("*.captions-*.jsonl")
    return file


def test_every_image_gets_as_many_captions_as_asked_for_and_they_are_kept(world, pairs, args, monkeypatch):
    (captioned,) = captioning.caption_images(str(world[0]), 2, [pairs], args, ALONE)
    first, *lines = read_lines(kept_file(pairs))
    assert first["source"] == str(world[0]) and first["captions"] == 2 and len(first["fingerprint"]) > 8
    assert sorted(line["image"] for line in lines) == sorted(pairs.images)
    assert all(len(line["captions"]) == 2 for line in lines)
    said = {line["image"]: [clean_caption(text) for text in line["captions"]] for line in lines}
    for i, caption in enumerate(captioned.captions):
        assert caption in said[captioned.images[captioned.image[i]]]
    # the next run draws nothing
    monkeypatch.setattr(captioning, "look_and_say", None)
    (again,) = captioning.caption_images(str(world[0]), 2, [pairs], args, ALONE)
    assert list(again.captions) == list(captioned.captions)


def test_captions_are_drawn_and_not_the_likeliest(world, pairs, args):
    (captioned,) = captioning.caption_images(str(world[0]), 4, [pairs], args, ALONE)
    assert len(set(captioned.captions)) > 2 * len(pairs.images)


def test_a_run_that_was_stopped_goes_on_where_it_stood(world, pairs, args, monkeypatch, capsys):
    """With what it had, a last line torn by a kill drawn anew, and the captions that it would have drawn."""
    captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    file = kept_file(pairs)
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[: 1 + args.micro_batch]) + whole[10][:8])
    asked = []
    look = captioning.look_and_say

    def watched(model, tok, files, *rest):
        asked.extend(files)
        return look(model, tok, files, *rest)

    monkeypatch.setattr(captioning, "look_and_say", watched)
    captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    assert len(asked) == len(pairs.images) - args.micro_batch
    assert file.read_bytes().splitlines(keepends=True) == whole
    assert f"{args.micro_batch} from before" in capsys.readouterr().out


def test_it_stops_when_asked_and_nothing_is_lost(world, pairs, args, monkeypatch):
    monkeypatch.setattr(loop, "must_stop", lambda: True)
    with pytest.raises(SystemExit) as stop:
        captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    assert stop.value.code == 130 and len(read_lines(kept_file(pairs))) == 1 + args.micro_batch


def test_an_image_that_cannot_be_read_is_named_and_left_out(world, pairs, args, capsys):
    (Path(pairs.root) / pairs.images[3]).write_bytes(b"no image")
    (captioned,) = captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    assert pairs.images[3] not in list(captioned.images)
    said = capsys.readouterr().out
    assert "1 images cannot be read" in said and pairs.images[3] in said


def test_a_picture_that_has_replaced_another_is_captioned_anew(world, pairs, args, capsys):
    captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    capsys.readouterr()
    save_image(Path(pairs.root) / pairs.images[3], size=(90, 60))
    captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    assert f"{len(pairs.images)} images with 1" in capsys.readouterr().out
    images = [line["image"] for line in read_lines(kept_file(pairs))[1:]]
    assert len(images) == len(pairs.images) + 1 and images.count(pairs.images[3]) == 2


def test_captions_do_not_depend_on_the_seed(world, pairs, args):
    """So that they are drawn once for the runs of several seeds."""
    (captioned,) = captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    kept_file(pairs).unlink()
    args.seed = 7
    (again,) = captioning.caption_images(str(world[0]), 1, [pairs], args, ALONE)
    assert list(again.captions) == list(captioned.captions)


def test_captions_of_another_source_are_refused(tmp_path):
    file = tmp_path / "x.jsonl"
    assert captioning.read_kept(file, MADE_WITH) == {}
    with pytest.raises(ValueError, match="captions made with .*remove it"):
        captioning.read_kept(file, MADE_WITH | {"fingerprint": "2c3d"})
    assert captioning.read_kept(file, MADE_WITH | {"source": "./a"}) == {}


@pytest.mark.parametrize("line", ["{", '"a"', "[]", '{"image": "1.png", "captions": ["a"]}'])
def test_a_damaged_file_of_captions_is_named(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(MADE_WITH) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="x.jsonl: damaged"):
        captioning.read_kept(file, MADE_WITH)


def test_images_without_a_word_go_and_a_source_without_one_is_refused(pairs):
    kept = {image: ["", " "] for image in pairs.images}
    with pytest.raises(ValueError, match="has not said a word"):
        captioning.with_captions(pairs, kept)
    some = kept | {pairs.images[5]: ["a  cat ", ""]}
    captioned = captioning.with_captions(pairs, some)
    assert list(captioned.captions) == ["a cat"] and list(captioned.images) == [pairs.images[5]]


def test_where_nothing_can_be_written_beside_the_images_the_cache_is_taken(pairs, monkeypatch, tmp_path):
    assert captioning.file_beside(pairs, "f" * 20, 1).parent == Path(pairs.root)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    file = captioning.file_beside(pairs, "f" * 20, 1)
    assert file.parent.parent == tmp_path / "cache"
    # another folder's images may have the same names
    other = dataclasses.replace(pairs, root=str(tmp_path))
    assert captioning.file_beside(other, "f" * 20, 1) != file


@pytest.mark.parametrize("wrong", ["target", "source:0", "source:x", "source:-1"])
def test_what_is_not_the_source_does_not_caption(wrong, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--src", "a", "--tgt", "b", "--caption-with", wrong])
    assert "source:N" in capsys.readouterr().err


def on_a_disk_of_its_own(argv):
    """train.py, whose second process cannot read what the first one keeps."""
    if os.environ["RANK"] == "1":
        captioning.read_kept = None
    train.main(argv)


@pytest.mark.slow
def test_a_transfer_reads_the_captions_that_its_source_drew(world, pairs, tmp_path):
    """In two processes, which share the drawing: every image once, and both stages train."""
    source, target, _ = world
    own = source, target, Path(pairs.root) / "pairs.jsonl"
    argv = arguments(own, tmp_path / "run", "--caption-with", "source:2", "--micro-batch", "4")
    train_in(2, argv, main=on_a_disk_of_its_own)
    images = [line["image"] for line in read_lines(kept_file(pairs))[1:]]
    held_out = 2  # for validation, with people's captions
    assert len(images) == len(set(images)) == len(pairs.images) - held_out
    assert {stage for stage, in rows(tmp_path / "run", "stage")} == {"warm-up", "fine-tune"}


@pytest.mark.slow
def test_a_folder_of_images_alone_is_enough(world, pairs, tmp_path, capsys):
    """Validation has captions of the source's, too."""
    source, target, _ = world
    (Path(pairs.root) / "pairs.jsonl").unlink()
    train.main(arguments((source, target, pairs.root), tmp_path / "run", "--caption-with", "source"))
    said = capsys.readouterr().out
    assert "22 images with 1 of" in said and "2 images with 1 of" in said
    assert {stage for stage, in rows(tmp_path / "run", "stage")} == {"warm-up", "fine-tune"}


def test_a_dry_run_counts_the_captions_that_would_be_drawn(world, pairs, tmp_path, capsys):
    """A text that is of no image, or macOS's copy of one, does not make a folder of images one of pairs."""
    source, target, _ = world
    (Path(pairs.root) / "pairs.jsonl").unlink()
    (Path(pairs.root) / "README.txt").write_text("My photos.")
    for copy in ("._0.txt", "._0.png"):
        (Path(pairs.root) / copy).write_bytes(b"\0")
    argv = ["--src", str(source), "--tgt", str(target), "--data", pairs.root, "--batch-size", "2"]
    train.main([*argv, "--caption-with", "source:5", "--dry-run", "a100", "--out", str(tmp_path / "run")])
    images = 22  # and two for validation
    assert f"stage warm-up: {5 * images // 2} steps of 2 = {5 * images} samples" in capsys.readouterr().out


def test_without_captioning_a_folder_of_images_alone_is_refused(world, pairs, tmp_path, capsys):
    source, target, _ = world
    (Path(pairs.root) / "pairs.jsonl").unlink()
    with pytest.raises(SystemExit):
        train.main(arguments((source, target, pairs.root), tmp_path / "run"))
    assert "not one image with a caption" in capsys.readouterr().err
