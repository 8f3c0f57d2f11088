"""What is shipped fits together: versions, pins, type marker, and a page for each command and option."""

from __future__ import annotations

import doctest
import importlib
import re
import tomllib
from importlib import metadata, resources
from pathlib import Path

import click
import pytest
import yaml

import lox_stream
from lox_stream.cli import commands

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
REFERENCE = (ROOT / "docs" / "cli.md").read_text()
MODULES = [f"lox_stream.{path.stem}" for path in sorted((ROOT / "lox_stream").glob("*.py")) if "__" not in path.stem]
for folder, package in ((ROOT / "kernels", "lox_stream.kernels"), (ROOT / "kernels" / "gpu", "lox_stream.kernels.gpu")):
    MODULES += [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if "__" not in path.stem]


def pins(path: Path) -> dict[str, str]:
    """name -> version of a constraints file; names as PyPI compares them."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), flags=re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_justified():
    project = PROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    asked = [*project["dependencies"], *extras, *PROJECT["dependency-groups"]["dev"]]
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Dependencies")[1].split("\n## ")[0]
    firsts = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    justified = {name for cell in firsts for name in re.findall(r"`([\w-]+)`", cell.split("(")[0])}
    assert justified == {re.match(r"[\w-]+", line)[0] for line in asked}


def test_the_version_is_the_same_everywhere():
    version = lox_stream.__version__
    assert PROJECT["project"]["version"] == version
    assert metadata.version("lox-stream") == version
    assert CITATION["version"] == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_the_licence_is_the_same_everywhere():
    assert PROJECT["project"]["license"] == CITATION["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_package_says_that_it_is_typed():
    assert resources.files("lox_stream").joinpath("py.typed").is_file()


def test_every_dependency_is_pinned_once_for_tests_and_ci():
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    names = {normal(re.split(r"[<>=!~ \[]", requirement)[0]) for requirement in wanted}
    assert names <= pins(ROOT / "constraints.txt").keys()


def test_no_version_is_pinned_in_two_places():
    ours, real = pins(ROOT / "constraints.txt"), pins(ROOT / "examples" / "real_pair" / "constraints.txt")
    site = pins(ROOT / "docs" / "tools" / "constraints.txt")
    assert "torch" in ours
    assert "transformers" in real
    assert "zensical" in site
    assert not ours.keys() & real.keys(), "examples/real_pair/real.mk installs with both files"
    assert not ours.keys() & site.keys(), "the Makefile installs with both files"


def section(command: str) -> str:
    """The part of docs/cli.md about a command."""
    found = re.search(rf"^## `lox-stream {command}`$(.*?)(?=^## )", REFERENCE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/cli.md has no section `lox-stream {command}`"
    return found[1]


def rows(command: str) -> dict[str, str]:
    """--option -> default, of the command's table of options."""
    return dict(re.findall(r"^\| `(--[\w-]+)[^`]*` \| ([^|]*) \|", section(command), flags=re.MULTILINE))


def options(command: str) -> dict[str, click.Option]:
    return {
        name: option
        for option in commands.commands[command].params
        if isinstance(option, click.Option)
        for name in option.opts
    }


@pytest.mark.parametrize("command", commands.commands)
def test_every_option_of_a_command_is_in_the_reference_and_no_other(command):
    assert rows(command).keys() == options(command).keys()


@pytest.mark.parametrize("command", commands.commands)
def test_the_reference_gives_the_defaults_that_hold(command):
    for name, told in rows(command).items():
        option = options(command)[name]
        if option.required:
            assert told == "required", name
        elif option.is_flag:
            assert told == "off", name
        elif isinstance(option.show_default, str):
            assert told == option.show_default, name
        else:
            default = option.default if isinstance(option.default, str | int | float) else "none"
            assert told == str(default), name


def test_every_choice_is_in_the_reference():
    for option in (option for command in commands.commands for option in options(command).values()):
        if isinstance(option.type, click.Choice):
            choices = "\\|".join(option.type.choices)
            assert f"`{option.opts[0]} {choices}`" in REFERENCE


def test_every_command_and_option_of_run_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for command in commands.commands:
        assert f"lox-stream {command}" in readme
    for name in options("run"):
        assert re.search(rf"{name}\b", readme), name


def test_every_exit_code_of_the_help_is_in_the_reference():
    codes = re.findall(r"^  (\d+) ", str(commands.epilog), flags=re.MULTILINE)
    assert len(codes) == 6
    for code in codes:
        assert f"| {code} | " in REFERENCE


@pytest.mark.parametrize("command", commands.commands)
def test_every_help_has_an_example(command):
    assert f"lox-stream {command} " in str(commands.commands[command].help) + " "


def test_every_public_name_is_documented_in_docs_or_docstrings():
    for name in lox_stream.__all__:
        assert getattr(lox_stream, name).__doc__, name


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_the_papers_citation_is_the_one_that_model_cards_carry():
    from lox_stream.model_card import CITATION as card

    paper = CITATION["preferred-citation"]
    assert "2506.15606" in card
    assert f"https://arxiv.org/abs/{paper['identifiers'][0]['value'].removeprefix('arXiv:')}" == paper["url"]
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in re.sub(r"\s+", " ", card)
