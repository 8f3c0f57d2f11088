"""The memory budget, measured from outside: RssAnon of a run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon from /proc")


def peak_rss_anon(command):
    """(peak bytes of anonymous memory, return code) of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    return peak


def test_a_tensor_three_times_the_budget_stays_within_it(tmp_path):
    budget, (m, n) = 128 * MIB, (12_288, 8_192)
    assert m * n * 4 == 3 * budget
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(m, n, generator=generator)
    for side in ("base", "aligned"):
        (tmp_path / side).mkdir()
        save_file({"w": w}, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
        w.addmm_(torch.randn(m, 8, generator=generator), torch.randn(8, n, generator=generator), alpha=1e-3)
    del w
    paths = [f"--{side}={tmp_path / side}" for side in ("base", "aligned", "out")]
    run = [sys.executable, "-P", "-m", "lox_stream", "run", *paths, "--memory", f"{budget // MIB}MiB", "--quiet"]
    assert peak_rss_anon(run) <= budget + 400 * MIB
