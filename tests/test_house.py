"""Facts about the project as a whole: rooms stand alone, what stands twice is equal, what README says is so,
lines fit a page."""

import ast
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, python

import data
import vpgtrans

# -------------------------------------------------------------------------------------- who imports whom

ROOMS = ["vpgtrans.py", "llm.py", "qformer.py", "data.py", "pairs.py", "hub.py", "cache.py", "runs.py",
         "estimate.py"]
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


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_alone_in_an_empty_folder(room, tmp_path):
    shutil.copy(ROOT / room, tmp_path)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {Path(room).stem}"
    done = python("-I", "-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", TESTS)
def test_no_test_module_imports_another(file):
    assert not [name for name in imported(ROOT / "tests" / file) if "test_" in name]


# ------------------------------------------------------------------------------------ what stands twice


def functions(room):
    """{name: code} of a room's functions."""
    nodes = ast.parse((ROOT / room).read_text()).body
    return {node.name: ast.unparse(node) for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", [
    "not_a_checkpoint", "checkpoint_files", "read_file", "read_tensors", "assign_tensors"])
def test_what_stands_in_two_rooms_is_equal(name):
    assert functions("llm.py")[name] == functions("qformer.py")[name]


def test_prompts_mean_the_same_in_both_rooms():
    assert (data.IMAGE, data.PADDING) == (vpgtrans.IMAGE, vpgtrans.PADDING)


# ------------------------------------------------------------------------------- what README says is so

README = (ROOT / "README.md").read_text()


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_readme_has_the_two_commands():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    made = [command.split()[1] for command in readme_commands() if command.startswith("make ")]
    assert {"demo", "test"} <= set(made) <= set(targets)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in readme_commands() if ".py" in command])
def test_the_readmes_python_commands_parse(command):
    """The script exists, and knows every option that the README gives it."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    options = [word for word in words[words.index(script) :] if word.startswith("--")]
    done = python(ROOT / script, "--help")
    assert done.returncode == 0, done.stderr
    for option in options:
        assert re.search(rf"{re.escape(option)}\b", done.stdout), option


def test_the_readmes_map_points_at_what_it_says():
    """Links of the form vpgtrans.py#L12 with the text `name` lead to the line where that name stands."""
    links = re.findall(r"\[`([\w\[\]\"-]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 6
    for name, file, line in links:
        there = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.sub(r"\W.*", "", name) in there, (name, line)


def test_the_six_packages_are_pinned():
    pinned = [line.split("==") for line in (ROOT / "requirements.txt").read_text().split()]
    names = [name for name, _ in pinned]
    assert names == ["torch", "safetensors", "tokenizers", "numpy", "pillow", "einops"]


# --------------------------------------------------------------------------------------- lines fit a page

WIDTH = 110
NOT_OURS = ("out", "datasets", "shared")
# not written anew yet; what is struck off stays so
STILL_WIDE = {"README.md", "bench.py", "docs/notes.md"}


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
    assert {name: numbers for name, numbers in wide.items() if name not in STILL_WIDE} == {}
