"""Facts about the project as a whole: rooms stand alone, what stands twice is equal, the README's commands are real."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["vpgtrans.py", "memvp.py", "llm.py", "qformer.py", "data.py", "hub.py", "cache.py", "runs.py", "estimate.py"]


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_alone_in_an_empty_folder(room, tmp_path):
    shutil.copy(ROOT / room, tmp_path)
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); import {room[:-3]}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def functions(room):
    return {node.name: ast.unparse(node) for node in ast.parse((ROOT / room).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", ["not_a_checkpoint", "checkpoint_files", "read_file", "read_tensors", "assign_tensors"])
def test_what_stands_in_two_rooms_is_equal(name):
    assert functions("llm.py")[name] == functions("qformer.py")[name]


def test_prompts_mean_the_same_in_both_rooms():
    import data
    import vpgtrans

    assert (data.IMAGE, data.PADDING) == (vpgtrans.IMAGE, vpgtrans.PADDING)


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_readme_has_the_two_commands():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    made = [command.split()[1] for command in readme_commands() if command.startswith("make ")]
    assert {"demo", "test"} <= set(made) <= set(targets)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in readme_commands() if ".py" in c])
def test_the_readmes_python_commands_parse(command):
    """The script exists, and knows every option that the README gives it."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    options = [word for word in words[words.index(script) :] if word.startswith("--")]
    usage = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert usage.returncode == 0, usage.stderr
    assert all(re.search(rf"{re.escape(option)}\b", usage.stdout) for option in options)


def test_the_readmes_map_points_at_what_it_says():
    """Links of the form vpgtrans.py#L12 with the text `name` lead to the line where that name stands."""
    links = re.findall(r"\[`([\w\[\]\"-]+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 6
    for name, file, line in links:
        assert re.sub(r"\W.*", "", name) in (ROOT / file).read_text().splitlines()[int(line) - 1], (name, line)


def test_the_six_packages_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "safetensors", "tokenizers", "numpy", "pillow", "einops"] and all("==" in line for line in lines)
