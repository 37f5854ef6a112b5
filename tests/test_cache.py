"""Facts about cache.py: it gives back what was computed, once, and notices what it does not belong to."""

import json
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

import cache
from cache import FeatureCache

FILES = [f"/pictures/{i}.jpg" for i in range(23)]  # in five shards
MADE_WITH = {"VPG": "abc", "image size": 224}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 5)


def new_cache(folder, files=FILES, dtype=torch.float32, **made_with):
    return FeatureCache(folder, files, (2, 3), dtype, MADE_WITH | made_with)


def pixel_of(file):
    """An image file, for these tests: a pixel that is the file's number."""
    number = int(file.split("/")[-1].removesuffix(".jpg"))
    return torch.full((3, 1, 1), number, dtype=torch.uint8)


def read_but_7(file):
    """As pixel_of; 7.jpg cannot be read."""
    if file == FILES[7]:
        raise OSError(f"{file}: broken")
    return pixel_of(file)


def features_of(images):
    return images[:, 0].float() * torch.arange(1, 7).view(2, 3) / 7


def expected(file, dtype=torch.float32):
    return features_of(pixel_of(file)[None])[0].to(dtype)


def fill(cache, **options):
    """-> (was it finished?, the files that were read)"""
    seen = []

    def read(file):
        seen.append(file)
        return read_but_7(file)

    done = cache.fill(read, features_of, batch_size=2, **options)
    return done, seen


def stop_after(batches):
    asked = iter([False] * batches + [True])
    return lambda: next(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_once_is_there_from_then_on(tmp_path, dtype):
    assert fill(new_cache(tmp_path, dtype=dtype)) == (True, FILES)
    modes = {file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}
    assert len(modes) == 1
    again = new_cache(tmp_path, dtype=dtype)
    assert fill(again) == (True, [FILES[7]])  # what could not be read is tried again
    for number in (22, 0, 4, 5, 13):
        assert torch.equal(again[FILES[number]], expected(FILES[number], dtype))
    with pytest.raises(OSError, match="7.jpg: broken"):
        again[FILES[7]]


def test_processes_share_the_work(tmp_path):
    """Each takes the same shards whether others have finished theirs or not."""
    caches = [new_cache(tmp_path) for _ in range(3)]
    parts = [fill(one, rank=rank, world=3)[1] for rank, one in enumerate(caches)]
    assert parts == [FILES[0:5] + FILES[15:20], FILES[5:10] + FILES[20:23], FILES[10:15]]
    assert new_cache(tmp_path).to_do() == {1: [2]}
    shards = [f"{i:05d}.safetensors" for i in range(5)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*shards, "index.json"]


def test_workers_give_the_same(tmp_path):
    one = new_cache(tmp_path / "one")
    two = new_cache(tmp_path / "two")
    fill(one)
    two.fill(read_but_7, features_of, batch_size=3, workers=2)
    assert all(torch.equal(one[file], two[file]) for file in FILES if file != FILES[7])


@pytest.fixture
def storage(monkeypatch):
    """What reads images from a storage that does not answer for one of them, until the test is over."""
    monkeypatch.setattr(cache, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(cache, "LONGEST_WAIT", 0.3)
    answer = threading.Event()

    def read(file):
        if file == FILES[9]:
            answer.wait()
        return pixel_of(file)

    yield read
    answer.set()


def test_waiting_for_storage_has_an_end(tmp_path, storage):
    new = new_cache(tmp_path)
    with pytest.raises(OSError, match=r"/pictures/\d+.jpg: has not been read for 0.3 seconds"):
        new.fill(storage, features_of, batch_size=2, workers=2)
    assert 0 not in new.to_do()


def test_a_cache_that_waits_for_storage_can_be_stopped(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(cache, "LONGEST_WAIT", 600)
    began = time.time()
    assert not new_cache(tmp_path).fill(storage, features_of, batch_size=2, workers=2,
                                        stop=lambda: time.time() > began + 0.5)
    assert time.time() < began + 30


def test_it_stops_when_asked_and_goes_on_later(tmp_path):
    done, _ = fill(new_cache(tmp_path), stop=stop_after(4))
    assert not done
    assert list(new_cache(tmp_path).to_do()) == [1, 2, 3, 4]
    assert fill(new_cache(tmp_path)) == (True, FILES[5:])


@pytest.mark.parametrize("other, says", [
    (dict(VPG="def"), "VPG abc, not def"),
    ({"image size": 448}, "image size 224, not 448"),
    (dict(dtype=torch.bfloat16), "float32, not .* torch.bfloat16"),
    (dict(files=FILES[:-1]), "images 23, not 22"),
    (dict(files=[file.replace("3", "x") for file in FILES]), "data set")])
def test_the_cache_of_another_vpg_or_data_set_is_refused(tmp_path, other, says):
    fill(new_cache(tmp_path))
    with pytest.raises(ValueError, match=says):
        new_cache(tmp_path, **other)


def test_two_caches_in_one_folder_do_not_mix(tmp_path):
    """Both opened while it was empty, as by two runs at a time: the second is refused, and no shard of the
    first passes for its own."""
    one = new_cache(tmp_path)
    two = new_cache(tmp_path, VPG="def")
    fill(one)
    with pytest.raises(ValueError, match="VPG abc, not def"):
        fill(two)
    (tmp_path / "index.json").unlink()
    assert len(two.to_do()) == 5
    with pytest.raises(ValueError, match="missing or damaged"):
        two[FILES[0]]


def test_an_image_that_was_repaired_is_read_again(tmp_path):
    fill(new_cache(tmp_path))
    repaired = new_cache(tmp_path)
    assert repaired.fill(pixel_of, features_of)
    assert repaired.to_do() == {}
    for number in (5, 7, 8):
        assert torch.equal(repaired[FILES[number]], expected(FILES[number]))


def test_the_data_set_may_move_but_not_change(tmp_path):
    """It is known by names below its folder, and by sizes."""
    def fingerprint(folder):
        return cache.fingerprint_files([str(tmp_path / folder / name) for name in ("a.jpg", "b.jpg")])

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("a.jpg", "b.jpg"):
            (tmp_path / folder / name).write_bytes(b"12345")
    assert fingerprint("here") == fingerprint("there")
    (tmp_path / "there" / "b.jpg").write_bytes(b"1234")
    assert fingerprint("here") != fingerprint("there")
    names = cache.fingerprint_files(["/x/a/1.jpg", "/x/b/1.jpg"])
    assert names != cache.fingerprint_files(["/x/a/1.jpg", "/x/c/1.jpg"])


def test_damaged_shards_are_computed_again_and_a_damaged_index_is_named(tmp_path):
    fill(new_cache(tmp_path))
    shard = tmp_path / "00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    (tmp_path / "00003.safetensors").write_bytes(b"")
    save_file({"features": torch.zeros(5, 2, 3)}, tmp_path / "00000.safetensors")  # of somebody else
    assert list(new_cache(tmp_path).to_do()) == [0, 1, 2, 3]
    assert fill(new_cache(tmp_path))[1] == FILES[:5] + [FILES[7]] + FILES[10:20]
    (tmp_path / "index.json").write_text(json.dumps(MADE_WITH)[:9])
    with pytest.raises(ValueError, match="index.json: damaged"):
        new_cache(tmp_path)


def test_it_says_what_it_needs(tmp_path):
    new = new_cache(tmp_path / "not" / "there" / "yet")
    assert new.need() == (23 * 24, 23 * 24)
    assert not (tmp_path / "not").exists()
    fill(new, stop=stop_after(4))  # one shard of five, of 5 images
    assert new.need() == (23 * 24, 18 * 24)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    one = new_cache(tmp_path)
    save = cache.save_file

    def fail_later(tensors, file, metadata):
        save(tensors, file, metadata)
        if "00002" in str(file):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", fail_later)
    with pytest.raises(OSError, match="00002.safetensors: cannot be written.*No space left"):
        fill(one)
    assert list(new_cache(tmp_path).to_do()) == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))
