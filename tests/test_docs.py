"""Every example in README.md and docs/ runs as it stands, in a folder that holds a small pair: base and aligned."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lox_stream.synthetic import llama_shapes, write_pair

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_pair(folder: Path) -> None:
    write_pair(folder, llama_shapes(256, 512, layers=2, vocabulary=1024), aligned_shards=2)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_examples_of_a_page_run_in_order(page, folder):
    """An `output` block after an example is what it prints; `...` stands for anything."""
    text = page.read_text()
    if "write_pair(" not in text:
        make_pair(folder)
    namespace = {"__name__": "example"}
    printed = ""
    for language, block in BLOCK.findall(text):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as told:
                exec(compile(block, f"{page.name}: {block[:60]!r}", "exec"), namespace)
            printed = told.getvalue()
        elif language == "output":
            assert doctest.OutputChecker().check_output(block, printed, doctest.ELLIPSIS), printed


@pytest.mark.parametrize("page", [page for page in PAGES if "$ lox-stream" in page.read_text()], ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_order_and_say_what_the_page_says(page, folder):
    """A line `$ lox-stream ...` in a `console` block; of the output, if it is shown, the words are compared."""
    make_pair(folder)
    for block in blocks(page, "console"):
        for part in block.split("$ lox-stream ")[1:]:
            command, _, shown = part.partition("\n")
            arguments = [sys.executable, "-P", "-m", "lox_stream", *shlex.split(command)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"lox-stream {command}\n{done.stderr}"
            if shown.strip():
                assert words(shown) == words(done.stdout), done.stdout


def words(text: str) -> list[str]:
    """Without numbers and paths, which differ from machine to machine; a rate's unit may differ too."""
    return [word for word in re.findall(r"\S+", text) if not re.search(r"\d|/|^[kMG]?B\b", word)]


def test_the_manifest_of_the_docs_has_the_shape_of_a_real_one(folder):
    from lox_stream import extrapolate

    make_pair(folder)
    extrapolate("base", "aligned", "out")
    real = json.loads((folder / "out" / "lox_stream.json").read_text())
    (shown,) = [json.loads(block) for block in blocks(ROOT / "docs" / "cli.md", "json")]
    assert shape_of(shown, real) == shape_of(real, real)
    assert shown["format"] == real["format"]
    assert shown["options"] == real["options"]


def shape_of(value, real):
    """Keys and types; of what is listed by the names of files and tensors only the first, which is to be a real one."""
    if isinstance(value, dict):
        if value and all(name.endswith((".safetensors", ".weight")) for name in value):
            assert value.keys() <= real.keys()
            name = next(iter(value))
            return {name: shape_of(value[name], real[name])}
        return {key: shape_of(item, real.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item, item) for item in value]
    return type(value).__name__


def test_the_examples_of_other_programs_are_the_files_that_ci_runs():
    """`make examples` runs each of them; docs/library.md shows them as they are."""
    text = (ROOT / "docs" / "library.md").read_text()
    shown = dict(
        re.findall(r"^\[([\w.]+)\]\(\.\./examples/toolchains/[\w.]+\):\n\n```\w+\n(.*?)^```$", text, re.M | re.S)
    )
    files = {path.name: path.read_text() for path in (ROOT / "examples" / "toolchains").iterdir() if path.is_file()}
    assert shown == files
    tests = (ROOT / "tests" / "test_toolchains.py").read_text()
    assert [name for name in files if name not in tests] == []
