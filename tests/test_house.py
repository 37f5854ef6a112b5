"""Facts about the project as a whole: rooms stand alone, what stands twice is equal."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["vpgtrans.py", "llm.py", "qformer.py", "data.py", "hub.py", "cache.py", "runs.py", "estimate.py"]


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


def test_the_six_packages_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "safetensors", "tokenizers", "numpy", "pillow", "einops"] and all("==" in line for line in lines)
