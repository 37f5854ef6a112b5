"""What each process of test_shard.py does: the jobs of a JSON file, [name, argument, ...] each, one after the
other in one group of processes. (The commands would begin a group each; there can be but one.)"""

import datetime
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import finetune
import hub
import llm as language_models
import loop
import qformer
import runs
import train


def touched():
    """Bytes of files and of its own that this process has in memory (Linux)."""
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith(("RssAnon:", "RssFile:"))]
    return sum(int(size) for _, size, _ in lines) * 1024


def check_rows(model, blocks, mesh):
    """Of the matrices of the blocks there are this process's rows, and no others; all else is whole."""
    inside = [module for block in blocks for module in block.modules()]
    matrices = {module.weight for module in inside if isinstance(module, nn.Linear)}
    assert matrices
    for parameter in model.parameters():
        assert hasattr(parameter, "to_local") == (parameter in matrices)
    for matrix in matrices:
        share = -(-len(matrix) // mesh.size())
        left = len(matrix) - mesh.get_local_rank() * share
        assert len(matrix.to_local()) == max(0, min(share, left))


def check_llm(mesh, folder):
    """A sharded LLM answers, scores and differentiates as the whole one, whichever is first, and has its
    fingerprint. Each process has other texts, and more or fewer of them, which end earlier or later."""
    rank = dist.get_rank()
    whole = language_models.load_llm(folder, torch.float32)
    part = language_models.load_llm(folder, torch.float32, mesh=mesh)
    check_rows(part, part.layers, mesh)
    assert hub.fingerprint(part.as_read()) == hub.fingerprint(whole.as_read())
    generator = torch.Generator().manual_seed(rank)
    prefix = torch.randn(2 + rank, 6, whole.dim, generator=generator)
    target = torch.randint(3, 100, (2 + rank, 5), generator=generator)
    said = whole.generate(prefix, max_new_tokens=6, stop=((-5,),))
    assert part.generate(prefix, max_new_tokens=6, stop=((-5,),)) == said
    stop = [(ids[rank],) for ids in said]
    for beams in (1, 3):
        options = dict(num_beams=beams, max_new_tokens=6, stop=stop)
        assert part.generate(prefix, **options) == whole.generate(prefix, **options)
    losses, gradients = [], []
    for llm in (whole, part):
        x = prefix.clone().requires_grad_()
        loss, _ = llm.loss(x, target)
        loss.backward()
        losses.append(loss)
        gradients.append(x.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def check_vit(mesh, folder):
    whole = qformer.load_vpg(folder, torch.float32)
    part = qformer.load_vpg(folder, torch.float32, mesh=mesh)
    check_rows(part, part.frozen_layers, mesh)
    assert hub.fingerprint(part.frozen_parameters()) == hub.fingerprint(whole.frozen_parameters())
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(part(images), whole(images))


def check_loading(mesh, folder):
    """No process reads more than its part, half of the file; the kernel maps some pages around it."""
    size = (Path(folder) / "model.safetensors").stat().st_size
    language_models.load_llm(folder, mesh=mesh)  # what is imported and cached by then does not count
    gc.collect()
    before = touched()
    llm = language_models.load_llm(folder, mesh=mesh)
    assert 0.4 * size < touched() - before < 0.9 * size
    assert llm.mesh is mesh


def run(mesh, command, argv, stop_at=None):
    """A command; `stop_at`: [stage, step] at which it is asked to stop."""
    def watch(at):
        if [at["stage"], at["step"]] == stop_at:
            loop.stop_asked.set()

    try:
        {"train": train, "finetune": finetune}[command].main(argv, watch)
    except SystemExit as end:
        assert stop_at and end.code == 130, end.code


def without_dropout(x, *_, **__):
    return x


def nothing(*_, **__):
    pass


def main(file):
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
    dist.init_process_group = nothing
    nn.functional.dropout = without_dropout  # each process would draw its own
    runs.Log.draw = nothing  # takes a third of the time
    mesh = loop.shard_mesh("node", dist.get_world_size(), torch.device("cpu"))
    jobs = {"llm": check_llm, "vit": check_vit, "loading": check_loading, "run": run}
    for name, *arguments in json.loads(Path(file).read_text()):
        jobs[name](mesh, *arguments)


loop.run_command(lambda: main(sys.argv[1]))
