"""`lox-stream doctor`: what is there, what is missing with the way to it, and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from click.testing import CliRunner

from lox_stream import doctor, files
from lox_stream.cli import commands


def examined(*words: object) -> tuple[int, dict[str, dict[str, str]]]:
    ended = CliRunner().invoke(commands, ["doctor", *map(str, words), "--json"])
    found = json.loads(ended.stdout)
    return ended.exit_code, {finding["what"]: finding for finding in found["findings"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "TRIED_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "PIECE_BYTES", 1 << 18)


def test_it_looks_at_everything_and_leaves_nothing(tmp_path):
    code, found = examined(tmp_path)
    assert code == 0
    for what in (
        "python",
        "torch",
        "safetensors",
        "cores",
        "memory",
        "free space",
        "locks",
        "disk",
        "[peft]",
        "[bench]",
    ):
        assert found[what]["found"], what
    assert found["torch"]["found"] == metadata.version("torch")
    assert "MB/s" in found["disk"]["found"]
    assert list(tmp_path.iterdir()) == []
    assert all(row["way_out"] for row in found.values() if row["state"] == "missing")


def test_what_is_missing_is_said_with_its_way_out_and_an_exit_code(tmp_path, monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("safetensors", "gguf"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    code, found = examined(tmp_path)
    assert code == 1
    assert (found["safetensors"]["state"], found["safetensors"]["way_out"]) == ("missing", "pip install safetensors")
    assert "disk" not in found, "nothing more can be looked at"
    monkeypatch.setattr(metadata, "version", lambda name: version(name) if name != "safetensors" else real(name))
    code, found = examined(tmp_path)
    assert code == 0
    way_out = "pip install 'gguf>=0.17' (or in a clone of lox-stream: pip install '.[gguf]')"
    assert (found["[gguf]"]["state"], found["[gguf]"]["way_out"]) == ("note", way_out)


@pytest.mark.parametrize(
    ("version", "state"), [("0.1.4", "note"), ("0.1.5", "ok"), ("0.1.10", "ok"), ("0.2.0", "note")]
)
def test_a_version_that_does_not_work_is_said(version, state, tmp_path, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name in ("mergekit", "ml_dtypes") else real(name))
    _, found = examined(tmp_path)
    assert found["[mergekit]"]["state"] == state
    assert f"mergekit {version}" in found["[mergekit]"]["found"]
    assert ("'mergekit>=0.1.5,<0.2'" in found["[mergekit]"]["way_out"]) == (state == "note")
    assert found["[numpy]"]["state"] == "note", "ml_dtypes is too old"


def test_a_folder_where_a_run_writes_or_nobody_can_is_said(tmp_path, monkeypatch):
    fd, _ = files.lock_folder(tmp_path)
    try:
        _, found = examined(tmp_path)
        assert found["locks"]["found"] == "a run is writing here"
    finally:
        os.close(fd)
    ended = CliRunner().invoke(commands, ["doctor", str(tmp_path / "nowhere")])
    assert ended.exit_code == 1
    assert "is no folder, expected one that exists" in ended.stderr
    monkeypatch.setattr(doctor, "SLOW", 1e15)
    _, found = examined(tmp_path)
    assert found["disk"]["state"] == "note"
    assert "will wait for this disk" in found["disk"]["way_out"]


def test_a_gpu_is_shown_with_its_memory_and_triton(tmp_path, monkeypatch):
    """As torch would tell of one; that Triton compiles there is for a machine that has one."""
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda index: "H100",
        "mem_get_info": lambda index: (70 << 30, 80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(doctor, "without_triton", lambda index: "Triton is not installed")
    _, found = examined(tmp_path)
    assert found["GPU 0"]["found"].startswith("H100, 70.0 of 80.0 GiB free")
    assert found["Triton on GPU 0"]["state"] == "note"
    assert "--kernels torch" in found["Triton on GPU 0"]["way_out"]


def test_shells_complete_commands_and_options():
    words = {"COMP_WORDS": "lox-stream run --roun", "COMP_CWORD": "2", "_LOX_STREAM_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv = ['lox-stream']; from lox_stream.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.stdout.strip() == "plain,--rounding"
