"""Facts about the project as a whole: rooms stand alone, what stands twice is equal, lines fit a page."""

import ast
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, python

import data
import vpgtrans

# -------------------------------------------------------------------------------------- who imports whom

ROOMS = ["vpgtrans.py", "memvp.py", "llm.py", "qformer.py", "data.py", "pairs.py", "hub.py", "cache.py",
         "runs.py", "estimate.py"]
OPENS = {"pairs.py": {"data"}}  # its command alone, to show samples as they are trained on
OURS = {file.stem for file in ROOT.glob("*.py")}
TESTS = sorted(file.name for file in (ROOT / "tests").glob("*.py"))


def imported(file):
    """Names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_of_ours(room):
    assert imported(ROOT / room) & OURS <= OPENS.get(room, set())


IMPORTS_ALONE = """
import importlib, sys
for room in sys.argv[2:]:
    sys.path.insert(0, f"{sys.argv[1]}/{room}")  # nothing else of ours is on the path
    print(importlib.import_module(room).__file__)
    del sys.modules[room], sys.path[0]
"""


@pytest.mark.slow
def test_a_room_imports_alone_in_an_empty_folder(tmp_path):
    """One after the other in one process, which loads torch once."""
    copies = []
    for room in ROOMS:
        copies.append(tmp_path / Path(room).stem / room)
        copies[-1].parent.mkdir()
        shutil.copy(ROOT / room, copies[-1])
    done = python("-I", "-c", IMPORTS_ALONE, tmp_path, *(file.stem for file in copies))
    assert done.stdout.split() == list(map(str, copies)), done.stderr


@pytest.mark.parametrize("file", TESTS)
def test_no_test_module_imports_another(file):
    assert not [name for name in imported(ROOT / "tests" / file) if "test_" in name]


# ------------------------------------------------------------------------------------ what stands twice


def definitions(room):
    """{name: code} of a room's functions and classes."""
    nodes = ast.parse((ROOT / room).read_text()).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.unparse(node) for node in nodes if isinstance(node, kinds)}


@pytest.mark.parametrize("name", [
    "not_a_checkpoint", "checkpoint_files", "read_file", "read_tensors", "assign_tensors", "Ends", "as_read",
    "shard_blocks", "own_rows", "gather_once"])
def test_what_stands_in_two_rooms_is_equal(name):
    assert definitions("llm.py")[name] == definitions("qformer.py")[name]


def test_prompts_mean_the_same_in_both_rooms():
    assert (data.IMAGE, data.PADDING) == (vpgtrans.IMAGE, vpgtrans.PADDING)


def test_the_six_packages_are_pinned():
    pinned = [line.split("==") for line in (ROOT / "requirements.txt").read_text().split()]
    names = [name for name, _ in pinned]
    assert names == ["torch", "safetensors", "tokenizers", "numpy", "pillow", "einops"]


# --------------------------------------------------------------------------------------- lines fit a page

WIDTH = 110
NOT_OURS = ("out", "datasets", "shared")


def texts():
    """All Python, Markdown and Makefile of the repository."""
    for folder, below, files in os.walk(ROOT):
        below[:] = [name for name in below if not name.startswith(".") and name not in NOT_OURS]
        for name in files:
            if name.endswith((".py", ".md")) or name == "Makefile":
                yield Path(folder) / name


def wide_lines(text):
    """Numbers of the lines beyond WIDTH, tables of Markdown aside."""
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if len(line) > WIDTH and not line.lstrip().startswith("|")]


def test_lines_fit_a_page():
    wide = {}
    for file in texts():
        numbers = wide_lines(file.read_text())
        if numbers:
            wide[str(file.relative_to(ROOT))] = numbers
    assert wide == {}
