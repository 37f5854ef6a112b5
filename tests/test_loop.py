"""Facts about loop.py: what one step computes, how a run stops and goes on, what it says."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    arguments,
    assert_same_losses,
    bad_data,
    demo_world,
    in_a_process,
    one_thread,
    python,
    python_command,
    rows,
    stop_at,
    torchrun,
    train_in,
    values,
    write_pairs,
    write_source,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import data
import loop
import runs
import sample
import train
import transfer
import vpgtrans

# ------------------------------------------------------------------------------------------- one step


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipped_gradients_are_those_of_torch(clip):
    """Three steps with gradients of very different norms, against clip_grad_norm_ and a plain AdamW."""
    torch.manual_seed(0)
    ours = nn.Linear(3, 4)
    theirs = copy.deepcopy(ours)
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    our_optimizer.found_inf = torch.zeros(())
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1, fused=True)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = dict(prompt_ids=torch.zeros(2, 1), target_ids=torch.zeros(2, 5), images=images)
    processes = loop.Processes.start("fp32")

    def loss_sum(layer, images, size):
        return size * layer(images.float().mean((2, 3)) / 255).pow(2).sum()

    for size in (1.0, 300.0, 0.01):
        def trained(prompts, targets, images):
            return loss_sum(ours, images, size), 10

        loop.optimizer_step(trained, [batch], our_optimizer, processes, clip)
        (loss_sum(theirs, images, size) / 10).backward()
        if clip:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        their_optimizer.step()
        their_optimizer.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


@pytest.mark.slow
def test_micro_batches_give_the_whole_batch(world, tmp_path):
    """Caption lengths are unequal: a mean over micro-batches instead of tokens would show."""
    train.main(arguments(world, tmp_path / "one"))
    train.main(arguments(world, tmp_path / "three", "--micro-batch", "3"))
    assert_same_losses(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_several_processes_equal_one(world, tmp_path):
    """Some gradients are clipped: to a factor that they all have in common, AdamW itself is blind."""
    options = ["--steps", "20", "--clip", "0.1"]
    train.main(arguments(world, tmp_path / "1", *options))
    for count in (2, 3):  # three do not share a batch of eight evenly
        train_in(count, arguments(world, tmp_path / str(count), *options))
        for key in ("loss", "val_loss", "val_loss_shuffled"):
            assert_same_losses(tmp_path / "1", tmp_path / str(count), key)


# --------------------------------------------------------------------------- a run is stopped, and goes on


def read_state(out, name=runs.STATE):
    """Where a run stands, as it saved it."""
    with safe_open(out / name, framework="pt") as saved:
        return json.loads(saved.metadata()["state"])


@pytest.mark.slow
@pytest.mark.parametrize("stage, step, killed_by, code, init", [
    ("warm-up", 2, signal.SIGKILL, -9, "converter"),
    ("fine-tune", 3, signal.SIGKILL, -9, "random"),
    ("fine-tune", 2, signal.SIGTERM, 130, "captions"),
])
def test_a_killed_run_continues_with_the_same_losses(world, tmp_path, stage, step, killed_by, code, init):
    """Killed after a line of the log, with dropout on: a resumed run draws what it would have drawn. The
    log's last line is cut in the middle, as a kill may leave it."""
    write_source(tmp_path / "source", dropout=0.1)
    world = (tmp_path / "source", *world[1:])
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    options = ["--save-every", "1", "--init", init]

    def kill(at):
        if (at["stage"], at["step"]) == (stage, step):
            os.kill(os.getpid(), killed_by)

    train.main(arguments(world, whole, *options))
    assert in_a_process(train.main, arguments(world, killed, *options), kill) == code
    with open(killed / "metrics.jsonl", "a") as log:
        log.write('{"stage": "warm-up", "st')
    train.main(arguments(world, killed, *options, "--resume"))
    assert rows(killed, "stage", "step", "loss") == rows(whole, "stage", "step", "loss")
    assert rows(killed, "step", "val_loss") == rows(whole, "step", "val_loss")


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.slow
def test_a_damaged_state_gives_way_to_the_one_before(world, tmp_path, capsys, refused):
    out = tmp_path / "run"
    argv = arguments(world, out, "--save-every", "2")
    train.main(arguments(world, tmp_path / "whole"))
    for damage in (Path.unlink, cut, empty):
        stop_at("fine-tune", 4, argv)
        files = {file.name for file in out.glob("*.safetensors")}
        assert files == {"model.safetensors", runs.STATE, runs.PREVIOUS}
        damage(out / runs.STATE)
        capsys.readouterr()
        train.main([*argv, "--resume"])
        said = capsys.readouterr().out
        assert "projector: as it was saved" in said
        assert "word converter" not in said
        is_damaged = damage is not Path.unlink
        assert (": damaged (" in said) == is_damaged
        assert (f"from {runs.PREVIOUS}, step 4 of stage fine-tune" in said) == is_damaged
        assert rows(out, "stage", "step", "loss") == rows(tmp_path / "whole", "stage", "step", "loss")
        shutil.rmtree(out)

    stop_at("fine-tune", 4, argv)
    for file in (runs.STATE, runs.PREVIOUS):
        (out / file).write_bytes(b"no state")
    refused(train.main, [*argv, "--resume"], runs.STATE, runs.PREVIOUS, "damaged")


@pytest.mark.slow
def test_a_kill_between_the_files_of_a_save_is_made_up_for(world, tmp_path, monkeypatch):
    """State and weights are two files; and logs that are missing or cut do not keep a run from going on."""
    out = tmp_path / "run"
    resume = arguments(world, out, "--resume")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs, "save_model", lambda *_: sys.exit(9))
        train.main(arguments(world, out, "--save-every", "2"))
    assert not (out / "model.safetensors").exists()
    (out / "metrics.jsonl").unlink()
    (out / "bad_data.jsonl").write_text('{"problem": "x", "where": "y"}\n{"problem": "unr')
    stop_at("fine-tune", 2, resume)
    assert bad_data(out, "x") == ["y"]

    train.main(resume)
    train.main(arguments(world, tmp_path / "whole"))
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == whole
    (out / "model.safetensors").unlink()
    train.main(resume)
    assert (out / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(world, tmp_path):
    train.main(arguments(world, tmp_path / "whole"))
    stop_at("fine-tune", 2, arguments(world, tmp_path / "run"))
    train_in(2, arguments(world, tmp_path / "run", "--resume"))
    assert_same_losses(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("error, code, says", [
    (OSError("no batch has come"), 2, "no batch has come. The run ends at step 2"),
    (data.Stopped(), 130, "stopped at step 2 of stage fine-tune; the same command with --resume")])
def test_a_run_to_which_no_batch_comes_saves_and_goes_on_with_the_same_losses(
        world, tmp_path, monkeypatch, capsys, error, code, says):
    """Storage that does not answer, a worker that was killed, a signal while it waits."""
    out = tmp_path / "run"
    wait, waits = data.wait_for, iter(range(100))

    def wait_in_vain(*loader):
        if next(waits) == 5:  # three steps of warm-up, two of fine-tuning
            raise error
        return wait(*loader)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(data, "wait_for", wait_in_vain)
        train.main(arguments(world, out, "--log-every", "10", "--micro-batch", "8"))
    assert stop.value.code == code
    said = capsys.readouterr()
    assert says in said.out + said.err
    state, _ = runs.load_state(out, print)
    assert (state["stage"], state["step"]) == ("fine-tune", 2)
    train.main(arguments(world, out, "--resume"))
    train.main(arguments(world, tmp_path / "whole"))
    weights = [load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])


# ---------------------------------------------------------------------------------- how its processes end


@pytest.fixture
def start(tmp_path):
    """start(command, said): begins it in a session of its own, of which nothing is left after the test. What
    it prints goes into the file `said`."""
    started = []

    def start(command, said):
        with open(said, "w") as output:
            process = subprocess.Popen(command, env=one_thread(), start_new_session=True, stdout=output,
                                       stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def wait_until(is_so, seconds=120):
    began = time.time()
    while not is_so() and time.time() - began < seconds:
        time.sleep(0.1)


def fine_tunes(out):
    """Has a run come to its second stage?"""
    metrics = out / "metrics.jsonl"
    return metrics.is_file() and '"stage": "fine-tune"' in metrics.read_text()


ENDLESS = ["--steps", "20000", "--val-every", "20000", "--save-every", "20000", "--log-every", "20000"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], torchrun()], ids=["alone", "torchrun"])
def test_a_run_with_reading_processes_survives_that_all_of_them_are_terminated(
        world, tmp_path, start, launcher):
    """As Slurm and torchrun do it: every process of the group gets the signal, those that read images too."""
    argv = arguments(world, tmp_path / "run", "--workers", "1", *ENDLESS)
    run = start(python_command(*launcher, ROOT / "train.py", *argv), tmp_path / "said")
    wait_until(lambda: fine_tunes(tmp_path / "run"))
    for _ in range(2):  # and some of them twice
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.01)
    run.wait(timeout=120)
    said = (tmp_path / "said").read_text()
    assert "stopped at step" in said
    assert run.returncode == 130 or launcher, said
    assert read_state(tmp_path / "run")["stage"] == "fine-tune"


@pytest.mark.slow
def test_a_run_whose_storage_hangs_obeys_a_signal(world, tmp_path, start):
    """A pipe to which nobody writes stands for an image on such a storage. No process stays."""
    pairs = write_pairs(tmp_path / "pairs", 24)
    val = write_pairs(tmp_path / "val", 6)
    (pairs.parent / "5.png").unlink()
    os.mkfifo(pairs.parent / "5.png")
    out = tmp_path / "run"
    argv = arguments((*world[:2], pairs), out, "--val", val, "--workers", "1", *ENDLESS)
    run = start(python_command(ROOT / "train.py", *argv), tmp_path / "said")
    wait_until(lambda: (out / "metrics.jsonl").exists() and rows(out, "stage", "step", "val_loss"))
    time.sleep(2)  # it waits for the first batches, one of which does not come
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(timeout=60) == 130
    assert "stopped at step" in (tmp_path / "said").read_text()
    with pytest.raises(ProcessLookupError):  # nor is anyone left in its group
        os.killpg(run.pid, 0)


def test_a_run_that_has_saved_nothing_yet_is_not_sent_to_resume(tmp_path):
    run = loop.Run(types.SimpleNamespace(out=tmp_path), *[None] * 5)
    at = {"stage": "warm-up", "step": 0}
    assert loop.where_it_stands(run, at).endswith("no state is saved yet, so the same command begins anew")
    (tmp_path / runs.STATE).touch()
    assert loop.where_it_stands(run, at).endswith("the same command with --resume goes on from there")


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_alone_save_and_stop(world, tmp_path, start):
    out = tmp_path / "run"
    argv = arguments(world, out, *ENDLESS)
    launcher = start(python_command(*torchrun(), ROOT / "train.py", *argv), tmp_path / "said")
    wait_until(lambda: fine_tunes(out))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not (out / runs.LOCK).exists(), seconds=60)
    state = read_state(out)
    assert state["stage"] == "fine-tune"
    assert state["step"] < 20000
    assert not (out / runs.LOCK).exists()


def train_failing(how, world, out, *more):
    script = ROOT / "tests" / "failing_train.py"
    done = python(*torchrun(), script, how, *arguments(world, out, *more), PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    return done.stderr


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them(world, tmp_path):
    assert "this card is broken" in train_failing("card", world, tmp_path / "run")


@pytest.mark.slow
def test_a_process_to_which_no_batch_comes_lets_all_save(world, tmp_path):
    out = tmp_path / "run"
    said = train_failing("storage", world, out)
    assert "The run ends at step 2 of stage fine-tune; the same command with --resume" in said
    state = read_state(out)
    assert (state["stage"], state["step"]) == ("fine-tune", 2)


def wait_for_a_late_one(argv):
    """What the first process does before `sum` is done when the second has passed it."""
    processes = loop.Processes.start("fp32")
    file = Path(argv[0])
    if processes.rank == 0:
        time.sleep(1)
        file.touch()
    assert processes.sum() == []
    assert file.exists()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_wait_for_each_other_also_where_nothing_is_added_up(tmp_path):
    train_in(2, [str(tmp_path / "written")], main=wait_for_a_late_one)


ENDINGS = """
import atexit, os, sys, loop

class Held:
    def __del__(self):
        os.write(1, b"taken down by Python ")

held = Held()

def end(how):
    atexit.register(print, "said farewell", end=" ")
    if how is not None:
        raise how

for how in (None, SystemExit(), SystemExit(2), SystemExit("in vain"), OSError("the disk is full")):
    child = os.fork()
    if child == 0:
        loop.run_command(lambda: end(how))
        print("went on", end=" ")
    else:
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_one_process_of_several_ends_with_its_code_before_python_takes_it_down():
    done = python("-c", ENDINGS, WORLD_SIZE="2", PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == [f"said farewell {code}" for code in (0, 0, 2, 1, 1)]
    assert done.stderr.count("Traceback") == 1
    assert "in vain" in done.stderr
    assert "OSError: the disk is full" in done.stderr


@pytest.mark.slow
def test_under_torchrun_the_message_is_the_cause_that_it_names_last(world, tmp_path):
    argv = arguments((*world[:2], tmp_path / "none.jsonl"), tmp_path / "run")
    done = python(*torchrun(), ROOT / "train.py", *argv)
    assert done.returncode != 0
    cause = done.stderr[done.stderr.index("Root Cause"):]
    assert "train.py: " in cause
    assert "none.jsonl: there is no such file" in cause
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_leaps_up_names_the_rate_to_lower(world, tmp_path, monkeypatch, capsys):
    """Each leap once, and none between two stages."""
    step = loop.optimizer_step
    times = iter([1, 2, 2] + [4, 1, 1.4, 1.1, 1.6, 3])

    def leap(*given):
        tokens, loss, stop = step(*given)
        return tokens, loss * next(times), stop

    monkeypatch.setattr(loop, "optimizer_step", leap)
    out = tmp_path / "run"
    train.main(arguments(world, out))
    said = re.findall(r"step +(\d) .* risen from (\S+) to (\S+) at rate (\S+): .* lower (\S+)",
                      capsys.readouterr().out)
    losses = [f"{loss:.3f}" for loss in values(out, "loss")]
    rates = [f"{rate:.3g}" for rate in values(out, "lr")]
    assert said == [
        ("2", losses[0], losses[1], rates[1], "--warm-up-lr"),
        ("5", losses[4], losses[7], rates[7], "--lr"),
        ("6", losses[7], losses[8], rates[8], "--lr")]


# ------------------------------------------------------------------------------------------ what stops it


@pytest.mark.slow
def test_a_warm_up_after_which_the_llm_does_not_look_stops(world, tmp_path, fails):
    """The random models of these tests do not look at images. With --gate 0 the same run goes on, from the
    state that was saved."""
    out = tmp_path / "run"
    fails(train.main, arguments(world, out, "--gate", "0.01"), "does not use the image")
    assert {stage for stage, in rows(out, "stage")} == {"warm-up"}
    fails(train.main, arguments(world, out, "--gate", "0.01", "--resume"))
    train.main(arguments(world, out, "--resume"))
    train.main(arguments(world, tmp_path / "whole"))
    assert rows(out, "stage", "step", "loss") == rows(tmp_path / "whole", "stage", "step", "loss")


@pytest.mark.slow
def test_a_gate_is_for_runs_that_go_on_after_the_warm_up(world, tmp_path):
    train.main(arguments(world, tmp_path / "run", "--gate", "9", "--stage", "warm-up"))
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_models_that_look_pass_the_gate(tmp_path):
    length = ["--warm-up-steps", "15", "--steps", "1", "--val-every", "15", "--val-samples", "32"]
    train.main(arguments(demo_world(tmp_path, 300), tmp_path / "run", "--gate", "0.01", *length))
    assert len(values(tmp_path / "run", "loss")) == 16


@pytest.mark.slow
def test_a_loss_that_is_nan_stops_the_run_and_spoils_nothing(world, tmp_path, monkeypatch, fails):
    """In step 3 of 4 between two lines of the log. What is left are the weights before it."""
    weights = {}  # before each step
    step = loop.optimizer_step
    forward = vpgtrans.VisualLLM.forward

    def watched(model, *rest):
        weights[len(weights) + 1] = {name: p.detach().clone() for name, p in model.saved().items()}
        return step(model, *rest)

    def poisoned(model, *inputs, **images):
        loss, tokens = forward(model, *inputs, **images)
        trains = model.vpg.qformer.training
        return loss * float("nan") if trains and len(weights) == 3 else loss, tokens

    monkeypatch.setattr(loop, "optimizer_step", watched)
    monkeypatch.setattr(vpgtrans.VisualLLM, "forward", poisoned)
    out = tmp_path / "run"
    argv = arguments(world, out, "--no-warm-up", "--log-every", "4", "--val-every", "6", "--augment", "none")
    fails(train.main, argv, "at step 3 of stage fine-tune is nan")

    report = json.loads((out / "broken.json").read_text())
    assert report["step"] == 3
    assert len(report["files"]) == 8
    assert all(Path(file).is_file() for file in report["files"])
    broken = load_file(out / "broken.safetensors")
    assert all(value.isfinite().all() for value in broken.values())
    for name, value in weights[3].items():
        assert torch.equal(broken[f"model.{name}"], value)
    assert any(not torch.equal(weights[2][name], value) for name, value in weights[3].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["projector.bias", "vpg.query_tokens"])
def test_a_gradient_that_is_nan_stops_the_run_too(world, tmp_path, monkeypatch, fails, name):
    """The losses are finite, and so are all other gradients."""
    train_stage = loop.train_stage
    steps = []

    def poison(gradient):
        steps.append(1)
        return gradient * float("nan") if len(steps) == 2 else gradient

    def poisoned(run, *rest):
        run.model.get_parameter(name).requires_grad_().register_hook(poison)
        return train_stage(run, *rest)

    monkeypatch.setattr(loop, "train_stage", poisoned)
    out = tmp_path / "run"
    argv = arguments(world, out, "--no-warm-up", "--log-every", "100", "--save-every", "2")
    fails(train.main, argv, "at step 2 of stage fine-tune is nan")
    broken = load_file(out / "broken.safetensors")
    assert all(value.isfinite().all() for value in broken.values())
    assert {value.item() for key, value in broken.items() if key.endswith(".step")} == {1}
    assert read_state(out, "broken.safetensors")["step"] == 2
    assert not (out / runs.STATE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("room, function", [(loop, "optimizer_step"), (transfer, "build_model")])
def test_memory_that_runs_out_says_what_to_change(world, tmp_path, monkeypatch, fails, room, function):
    """In a step, and before the first, where weights are loaded and a start is looked for."""
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(room, function, out_of_memory)
    argv = arguments(world, tmp_path / "run", "--micro-batch", "7")
    fails(train.main, argv, "micro-batches of 7", "--llm-weights", "--shard")


@pytest.mark.slow
def test_unreadable_images_are_named_and_too_many_stop_the_run(world, tmp_path, capsys, fails):
    pairs = write_pairs(tmp_path / "pairs", 24)
    (tmp_path / "pairs" / "5.png").write_bytes(b"<html>")
    world_of_pairs = (*world[:2], pairs)
    train.main(arguments(world_of_pairs, tmp_path / "run", "--val", world[2]))
    assert capsys.readouterr().err.count("5.png") == 1
    # it gives way to the one after it: as often as both were drawn, less one's own turns
    counted = dict(rows(tmp_path / "run", "stage", "bad_samples"))
    assert counted == {"warm-up": 1, "fine-tune": 2}  # 24 and 48 samples of 24 pairs
    where, = bad_data(tmp_path / "run", "unreadable image")
    assert "5.png" in where

    strict = arguments(world_of_pairs, tmp_path / "strict", "--val", world[2], "--max-bad", "0")
    (tmp_path / "pairs" / "5.png").unlink()
    fails(train.main, strict, "could not be read")


def names_of_bad(out, problem):
    return sorted(where.split("/")[-1].split(":")[0] for where in bad_data(out, problem))


@pytest.mark.slow
def test_bad_data_of_all_processes_and_of_a_resumed_run_is_written_down_once(world, tmp_path):
    """Two of three broken images are in training, on either process, and one is in validation."""
    pairs = write_pairs(tmp_path / "pairs", 24)
    val = write_pairs(tmp_path / "val", 6)
    for file in (pairs.parent / "4.png", pairs.parent / "11.png", val.parent / "2.png"):
        file.write_bytes(b"<html>")
    resumed = arguments((*world[:2], pairs), tmp_path / "resumed", "--val", val)
    stop_at("fine-tune", 2, resumed)
    train_in(2, [*resumed, "--resume"])
    train_in(2, arguments((*world[:2], pairs), tmp_path / "whole", "--val", val))
    for run in ("resumed", "whole"):
        assert names_of_bad(tmp_path / run, "unreadable image") == ["11.png", "4.png"]
    assert names_of_bad(tmp_path / "resumed", "validation image left out") == ["2.png"]
    assert rows(tmp_path / "whole", "stage", "bad_samples")[-1] == ("fine-tune", 4)


# ------------------------------------------------------------------------------------------- what is said


@pytest.mark.slow
def test_without_a_terminal_the_log_has_a_line_now_and_then(finished):
    _, said = finished
    assert re.search(r"\nfine-tune 4/6  loss \d\.\d+  rate 0.00\d+  [\d,]+ samples/s  \d\.\d GB  "
                     r"0:00:\d\d left in this stage\n", said)


@pytest.mark.slow
def test_an_e_with_an_accent_does_not_end_a_command_whose_output_is_ascii(world, tmp_path):
    folder = tmp_path / "café"
    folder.symlink_to(world[2].parent)
    said = tmp_path / "said"

    def with_ascii_output(command, *argv):
        with open(said, "w", encoding="ascii") as sys.stdout:
            command(list(map(str, argv)))

    argv = arguments((*world[:2], folder / "pairs.jsonl"), tmp_path / "run", "--stage", "warm-up")
    assert in_a_process(with_ascii_output, train.main, *argv) == 0
    assert "caf?/pairs.jsonl" in said.read_text()
    argv = folder / "0.png", "--model", tmp_path / "run"
    assert in_a_process(with_ascii_output, sample.main, *argv) == 0
    assert "caf?/0.png: " in said.read_text()
