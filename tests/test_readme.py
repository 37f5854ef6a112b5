"""Facts about README.md and docs/: what they print, link and run is real."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language):
    """What stands in the fenced blocks of a language, "" for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [content for named, content in fenced if named == language]


# ----------------------------------------------------------------------------------------- commands


def commands(text):
    """The commands of a page's bash blocks, without their comments."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script(words):
    """What a command of Python runs: a file, or the name of a module after -m; None for other programs."""
    if words[0] == "python" and words[1] == "-m":
        return words[2]
    if words[0] in ("python", "torchrun"):
        return next(word for word in words if word.endswith(".py"))
    return None


def options_of_scripts():
    """{script: options that README and docs give it}, in blocks of bash and in `backticks` of a line's."""
    options = {}
    for page in PAGES:
        text = page.read_text()
        quoted = [shlex.split(code) for code in re.findall(r"`(python (?:-m )?[\w./]+(?: [^`]*)?)`", text)]
        for words in commands(text) + quoted:
            name = script(words)
            if name not in (None, "pytest"):
                given = words[words.index(name) :]
                options.setdefault(name, set()).update(word for word in given if word.startswith("--"))
    return sorted(options.items())


def test_readme_has_the_two_commands():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    made = {words[1] for words in commands(README) if words[0] == "make"}
    assert {"demo", "test"} <= made <= set(targets)


@pytest.mark.parametrize("name, options", options_of_scripts(), ids=lambda x: x if isinstance(x, str) else "")
def test_commands_exist_and_know_their_options(name, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    file = name if name.endswith(".py") else name.replace(".", "/") + ".py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert not ended.value.code
    usage = capsys.readouterr().out
    assert not [option for option in options if not re.search(rf"{re.escape(option)}\b", usage)]


def test_commands_are_found():
    """The test above tests something: these are among what it runs."""
    found = dict(options_of_scripts())
    assert {"train.py", "sample.py", "export.py"} <= found.keys()
    assert "--tgt-tokenizer" in found["train.py"]


# ------------------------------------------------------------------------------------------- Python


def test_readmes_python_prints_what_it_says(monkeypatch):
    """Its last lines are comments: what it prints."""
    (code,) = blocks(README, "python")
    said = re.findall(r"^# (.*)\n", code, re.M)
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert said
    assert printed.getvalue().splitlines() == said


# --------------------------------------------------------------------------------- names and figures


def test_names_that_are_links_stand_in_their_files():
    """[`name`](file.py): the file defines that name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(links) >= 8
    for name, file in links:
        defined = rf"^(class |def |){name}\b( = |\(|:)"
        assert re.search(defined, (ROOT / file).read_text(), re.M), (name, file)


def file_tree():
    """The block of README that says which file is what."""
    (tree,) = [block for block in blocks(README, "") if "vpgtrans.py " in block]
    return tree


def test_the_file_tree_is_that_of_the_project():
    files = set(re.findall(r"\b\w+\.py\b", file_tree()))
    assert files == {file.name for file in ROOT.glob("*.py")}
    folders = re.findall(r"(\w+)/", file_tree())
    assert len(folders) >= 5
    assert all((ROOT / folder).is_dir() for folder in folders)


@functools.cache
def anchors(page):
    """What a page's headings are called in links, as GitHub makes these names."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_readme_fits_on_150_lines():
    assert len(README.splitlines()) <= 150


def test_notes_say_when_they_were_written_and_whether_they_stand():
    titles = re.findall(r"^## (.+)$", (ROOT / "docs" / "notes.md").read_text(), re.M)
    assert len(titles) > 30
    for title in titles:
        assert re.search(r"\(20\d\d-\d\d-\d\d, commit [0-9a-f]{7}, (stands|superseded by).*\)$", title), title


def test_speeds_say_command_date_commit_machine_and_limit():
    """Every question of docs/performance.md, but the last, which points to what is computed."""
    page = (ROOT / "docs" / "performance.md").read_text()
    questions = re.split(r"^## ", page, flags=re.M)[1:-1]
    assert len(questions) > 10
    for question in questions:
        source = question.splitlines()[2]
        assert re.fullmatch(r"`.+`.* · 20\d\d-\d\d-\d\d · commit [0-9a-f]{7} · .+", source), source
        assert "What limits it" in " ".join(question.split()), source
