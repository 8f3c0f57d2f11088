"""What is not installed: each message names the extra, and two ways to get it that work."""

from __future__ import annotations

import doctest
import re
import sys
import tomllib
from pathlib import Path

import pytest

from lox_stream import LoxError, for_mergekit, hub, installed, objects, on_ray

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_the_extras_are_those_of_the_project():
    """Without markers for systems, which pip reads."""
    extras = {
        name: tuple(package.partition(";")[0] for package in packages)
        for name, packages in PROJECT["optional-dependencies"].items()
    }
    assert extras == {name: packages for name, (_, packages) in installed.EXTRAS.items()}


def test_its_examples_are_true():
    assert doctest.testmod(installed).failed == 0


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("huggingface_hub", lambda: hub.local("org/name"), "hub"),
        ("obstore", lambda: objects.place_at("s3://bucket/x"), "cloud"),
        ("ray", lambda: on_ray.connected("local").__enter__(), "ray"),
        ("mergekit", for_mergekit.lox_method, "mergekit"),
    ],
)
def test_a_part_that_is_not_there_names_its_extra(package, call, extra, monkeypatch):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LoxError) as caught:
        call()
    said = str(caught.value)
    assert f"{package} is not installed" in said
    assert f"[{extra}]: {installed.way_to(extra)}" in said
    assert "lox-stream[" not in said, "which pip does not find"


def test_a_profile_of_the_aws_command_needs_boto3(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    assert objects._profile() == {}, "the keys of a machine at Amazon are found without"
    monkeypatch.setenv("AWS_PROFILE", "work")
    with pytest.raises(
        LoxError, match=r"boto3 is not installed; expected it for the profile that AWS_PROFILE .*\[cloud\]"
    ):
        objects._profile()


def test_the_command_of_mergekit_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mergekit", None)
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(SystemExit) as caught:
        for_mergekit.main()
    assert re.match(r"error: mergekit is not installed, or of a version .*\[mergekit\]: pip install", caught.value.code)
