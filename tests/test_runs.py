"""Facts about runs.py: one run at a time writes in a folder, and what it wrote before stays whole."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import time

import pytest
from conftest import arguments

import runs
import train
import transfer

# ------------------------------------------------------------------------------------------- the lock


def hold(folder, locked, done):
    with runs.locked(folder, "train.py --tgt other"):
        locked.set()
        done.wait(60)


@pytest.fixture
def held(tmp_path):
    """A folder in which another process writes a run, and this process."""
    fork = multiprocessing.get_context("fork")
    locked = fork.Event()
    done = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "run", locked, done))
    process.start()
    assert locked.wait(60)
    yield tmp_path / "run", process
    if process.is_alive():  # an event waits for whoever waits for it, dead or alive
        done.set()
        process.join()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_told_who_is_there(world, held, refused):
    folder, process = held
    refused(train.main, arguments(world, folder), f"process {process.pid} on ", "train.py --tgt other")
    assert [file.name for file in folder.iterdir()] == [runs.LOCK]


@pytest.mark.slow
def test_a_lock_dies_with_its_process_however_that_ends(held):
    folder, process = held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (folder / runs.LOCK).exists()
    with runs.locked(folder, "next"):
        assert json.loads((folder / runs.LOCK).read_text())["command"] == "next"
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.slow
def test_processes_that_a_run_starts_do_not_hold_its_lock(tmp_path):
    """As those that read images: forked while the lock is held, and perhaps there after their run is gone."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / runs.LOCK
    opened = runs.take_lock(file, "first", print)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        opened.close()
        runs.take_lock(file, "second", print).close()
    finally:
        child.kill()
        child.join()


def test_where_there_are_no_locks_the_run_says_so_and_goes_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(runs.fcntl, "lockf", no_locks)
    said = []
    with runs.locked(tmp_path / "run", "command", said.append):
        assert "this file system has no locks (Operation not supported)" in said[0]


def test_a_folder_made_for_a_run_that_wrote_nothing_goes_with_it(tmp_path):
    with runs.locked(tmp_path / "run", "command"):
        assert (tmp_path / "run" / runs.LOCK).exists()
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- the disk


def test_two_runs_that_begin_together_find_a_folder_writable(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(runs.check_writable, [tmp_path / "a" / "cache"] * 200))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=f"{tmp_path}/a: cannot be written .*No space left"):
        runs.check_writable(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "weights"
    runs.write(file, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        runs.write(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_a_run_says_beforehand_what_it_takes_on_disk(world, tmp_path):
    argv = arguments(world, tmp_path / "run")
    train.main(argv)
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    state = (tmp_path / "run" / runs.STATE).stat().st_size

    args = train.parse_arguments(argv)
    tokenizer, _ = transfer.find_tokenizer(args.tgt)
    shapes = transfer.shape_model(args, *transfer.find_models(args.src, args.tgt, tokenizer))
    assert 0.8 < runs.disk_need(shapes.saved()) / (weights + 3 * state) < 1
