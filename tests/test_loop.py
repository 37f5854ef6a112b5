"""Facts about how runs share a machine: one at a time in a folder, how launchers end them, what is said."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import hub
import runs
import sample
import train
import transfer

ROOT = Path(train.__file__).parent
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def arguments(world, out, *more):
    source, target, pairs = world
    return ["--src", str(source), "--tgt", str(target), "--data", str(pairs), "--out", str(out),
            "--batch-size", "8", "--steps", "6", "--warm-up-steps", "3", "--lr", "1e-3", "--log-every", "1",
            "--workers", "0", "--precision", "fp32", "--gate", "0", *more]


def torchrun(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, *map(str, command)]


def hold(folder, locked, done):
    with runs.locked(folder, "train.py --tgt other"):
        locked.set()
        done.wait(60)


@pytest.fixture
def held(tmp_path):
    """A folder in which another process writes a run."""
    fork = multiprocessing.get_context("fork")
    locked, done = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "run", locked, done))
    process.start()
    assert locked.wait(60)
    yield tmp_path / "run", process
    if process.is_alive():  # an event waits for whoever waits for it, dead or alive
        done.set()
        process.join()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_told_who_is_there(world, held, capsys):
    folder, process = held
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, folder))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"process {process.pid} on " in said and "train.py --tgt other" in said
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


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_alone_save_and_stop(world, tmp_path):
    argv = arguments(world, tmp_path / "run", "--steps", "20000", "--val-every", "20000")
    run = subprocess.Popen(torchrun(ROOT / "train.py", *argv), env=ALONE, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, start_new_session=True)
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.time()
    try:
        while not (metrics.is_file() and '"fine-tune"' in metrics.read_text()) and time.time() - began < 120:
            time.sleep(0.1)
        run.kill()
        run.wait()
        while (tmp_path / "run" / runs.LOCK).exists() and time.time() - began < 180:
            time.sleep(0.1)
        with safe_open(tmp_path / "run" / runs.STATE, framework="pt") as saved:
            assert json.loads(saved.metadata()["state"])["stage"] == "fine-tune"
        assert not (tmp_path / "run" / runs.LOCK).exists()
    finally:
        try:
            os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.slow
def test_under_torchrun_the_message_is_the_cause_that_it_names_last(world, tmp_path):
    argv = arguments((*world[:2], tmp_path / "none.jsonl"), tmp_path / "run")
    done = subprocess.run(torchrun(ROOT / "train.py", *argv), capture_output=True, text=True, env=ALONE)
    assert done.returncode != 0
    cause = done.stderr[done.stderr.index("Root Cause"):]
    assert "train.py: " in cause and "none.jsonl: there is no such file" in cause
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_e_with_an_accent_does_not_end_a_command_whose_output_is_ascii(world, tmp_path):
    folder = tmp_path / "café"
    folder.symlink_to(world[2].parent)
    argv = arguments((*world[:2], folder / "pairs.jsonl"), tmp_path / "run", "--stage", "warm-up")
    ascii_only = ALONE | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert b"caf?/pairs.jsonl" in done.stdout
    image = [sys.executable, str(ROOT / "sample.py"), str(folder / "0.png"), "--model", str(tmp_path / "run")]
    done = subprocess.run(image, capture_output=True, env=ascii_only)
    assert done.returncode == 0 and b"caf?/0.png: " in done.stdout, done.stderr


def test_a_blank_at_the_end_of_a_prompt_is_taken_off(world, monkeypatch):
    model, tok = transfer.load_model(str(world[0]))
    asked = []
    monkeypatch.setattr(model, "generate", lambda prompts, **_: asked.append(prompts.tolist()) or [[]])
    images = sample.torch.zeros(1, 3, 28, 28, dtype=sample.torch.uint8)
    for prompt in ("a red", "a red  "):
        transfer.answer(model, tok, images, prompt)
    assert asked[0] == asked[1] and len(asked[0][0]) > 6


@pytest.mark.parametrize("name, says", [("adapter_config.json", "merge_and_unload"),
                                        ("model-Q4.gguf", "gguf_file='model-Q4.gguf'"), ("x", "neither")])
def test_a_folder_without_a_checkpoint_says_what_it_is_and_the_way_out(tmp_path, name, says):
    (tmp_path / name).write_text("{}")
    for asked in (tmp_path, tmp_path / name):
        with pytest.raises(FileNotFoundError, match="neither" if says == "neither" else ".") as error:
            hub.resolve(str(asked), "target")
        assert says in str(error.value)


@pytest.mark.parametrize("then, same", [("absent", True), (None, True), ("", False), ("blip2", False)])
def test_states_of_earlier_versions_resume(world, tmp_path, then, same):
    """An option that they do not know has its default; from_scratch was None, "" or a name."""
    args = train.parse_arguments(arguments(world, tmp_path / "run"))
    saved = transfer.arguments(args)
    del saved["q_former"], saved["from_scratch"], saved["clip"]
    if then != "absent":
        saved["from_scratch"] = then
    if same:
        train.check_same_run(args, {"arguments": saved})
    else:
        with pytest.raises(ValueError, match="--from-scratch was True, is False"):
            train.check_same_run(args, {"arguments": saved})
