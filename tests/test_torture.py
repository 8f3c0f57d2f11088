"""Runs that are killed, stopped and starved of space at random moments, and resumed: always the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lox_stream.synthetic import llama_shapes, write_pair

pytestmark = pytest.mark.torture


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), llama_shapes(1024, 2816, 6, 8192), aligned_shards=3)


def command(pair, out, *more):
    paths = [f"--base={pair[0]}", f"--aligned={pair[1]}", f"--out={out}"]
    return [sys.executable, "-P", "-m", "lox_stream", "run", *paths, "--quiet", *more]


def weights(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def begun(pair, out):
    """A run that has reserved its space: it computes from here on."""
    process = subprocess.Popen(command(pair, out, "--resume"), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("*.partial")):
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def reference(pair, tmp_path_factory):
    """The weights, and the seconds that a run computes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    process = begun(pair, out)
    started = time.monotonic()
    assert process.wait(300) == 0
    return weights(out), time.monotonic() - started


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_again_and_again_ends_in_the_same_bytes(pair, reference, tmp_path, how):
    expected, computing_s = reference
    rng, out, stops = random.Random(int(how)), tmp_path / "out", 0
    for _ in range(8):
        process = begun(pair, out)
        time.sleep(rng.uniform(0.0, 0.5) * computing_s)
        process.send_signal(how)
        process.wait(30)
        stops += process.returncode != 0
        assert process.returncode in (0, -how, 128 + how)
        if (out / "model.safetensors.index.json").exists():  # finished, or stopped while it was published
            assert weights(out) == expected
            if stops:
                break
            shutil.rmtree(out)  # faster than it was measured: once more
    assert stops
    if not (out / "lox_stream.json").exists():
        subprocess.run(command(pair, out, "--resume"), check=True, timeout=300)
    assert weights(out) == expected


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_is_an_error_before_the_work_and_room_is_enough(pair, reference, tmp_path):
    expected, _ = reference
    size = sum(len(data) for data in expected.values())
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "lox", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        full = subprocess.run(command(pair, disk / "out"), capture_output=True, text=True, timeout=300, check=False)
        assert full.returncode == 1
        assert "space" in full.stderr.lower()
        assert not weights(disk / "out")
        subprocess.run(["mount", "-o", f"remount,size={size + (8 << 20)}", disk], check=True)
        subprocess.run(command(pair, disk / "out"), check=True, timeout=300)
        assert weights(disk / "out") == expected
    finally:
        subprocess.run(["umount", disk], check=True)


def test_memory_does_not_grow_with_the_layers():
    """Llama-3.1-70B in small: half of its layers, and twice of them."""
    program = Path(__file__).parents[1] / "benchmarks" / "bench_memory.py"
    ran = subprocess.run(
        [sys.executable, program, "--layers", "40", "160"], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
