"""Laws of SIGINT and SIGTERM: at once where nothing is lost, gently where something is, and a second one at once."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lox_stream.anywhere import extrapolate
from lox_stream.output_rules import JOURNAL, MANIFEST
from lox_stream.signals import PATIENCE_S

INT, TERM = signal.SIGINT, signal.SIGTERM
WAITS = """
import sys, time
from lox_stream.signals import Interruption
with Interruption(lambda: "last words") as interruption:
    if sys.argv[1:]:
        print("planning", flush=True)
        time.sleep(30)
    with interruption.gently():
        print("gently", flush=True)
        if {obeys}:
            interruption.cancel.wait(30)
        else:
            time.sleep(30)
print("stopped", interruption.number, flush=True)
time.sleep(30)
"""
SLACK_S = 1.0  # for a machine that is busy


def start(command: list[str]) -> subprocess.Popen[str]:
    """A process with the signals' usual meaning, however this one was started."""
    usual = lambda: signal.signal(INT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=usual)


def ended(process: subprocess.Popen[str], *numbers: int) -> tuple[float, str]:
    """Send the signals, 50 ms apart: the seconds until the process ended, and its stderr."""
    started = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    error = process.communicate(timeout=30)[1]
    return time.monotonic() - started, error


@pytest.mark.parametrize("number", [INT, TERM])
def test_where_nothing_can_be_lost_the_first_one_ends_at_once(number):
    process = start([sys.executable, "-c", WAITS.format(obeys=True), "planning"])
    assert process.stdout.readline() == "planning\n"
    took_s, error = ended(process, number)
    assert (process.returncode, error) == (128 + number, "last words\n")
    assert took_s < PATIENCE_S


@pytest.mark.parametrize(("first", "second"), [(INT, INT), (INT, TERM), (TERM, INT)])
def test_a_second_signal_ends_at_once(first, second):
    process = start([sys.executable, "-c", WAITS.format(obeys=False)])
    assert process.stdout.readline() == "gently\n"
    took_s, error = ended(process, first, second)
    assert process.returncode == 128 + second
    assert took_s < PATIENCE_S
    assert error.endswith("last words\n")


def test_the_first_one_asks_and_once_that_was_heard_signals_mean_what_they_did():
    process = start([sys.executable, "-c", WAITS.format(obeys=True)])
    assert process.stdout.readline() == "gently\n"
    process.send_signal(TERM)
    assert process.stdout.readline() == "stopped 15\n"
    took_s, _ = ended(process, TERM)
    assert process.returncode == -TERM
    assert took_s < PATIENCE_S


def test_who_does_not_stop_is_stopped():
    process = start([sys.executable, "-c", WAITS.format(obeys=False)])
    assert process.stdout.readline() == "gently\n"
    took_s, _ = ended(process, TERM)
    assert process.returncode == 143
    assert PATIENCE_S <= took_s < 2.0 + SLACK_S


def test_a_signal_that_was_ignored_stays_ignored():
    code = "import signal; signal.signal(2, signal.SIG_IGN)\n" + WAITS.format(obeys=False)
    process = start([sys.executable, "-c", code])
    assert process.stdout.readline() == "gently\n"
    process.send_signal(INT)
    ended(process, TERM, TERM)
    assert process.returncode == 143


@pytest.fixture(scope="module")
def slow_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Forty matrices whose deltas are noise, which takes some twenty passes each: most of a second of one thread."""
    root = tmp_path_factory.mktemp("slow pair")
    sides = root / "base", root / "aligned"
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(700, 700, generator=generator) for i in range(40)}
    aligned = {name: w + torch.randn(700, 700, generator=generator) * 5e-3 for name, w in base.items()}
    for side, weights in zip(sides, (base, aligned), strict=True):
        side.mkdir()
        halves = {name: w.bfloat16() for name, w in weights.items()}
        save_file(halves, side / "model.safetensors", metadata={"format": "pt"})
    return sides


def command_for(pair: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    words = ["run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", str(out), "--threads", "1"]
    return [sys.executable, "-m", "lox_stream", *words, *more]


def interrupted(command: list[str], out: Path, *numbers: int) -> tuple[int, float, str]:
    """Start a run and send the signals when it has begun to work: exit code, seconds until the end, stderr."""
    process = start(command)
    deadline = time.monotonic() + 60
    while not (out / JOURNAL).exists() and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.01)
    time.sleep(0.2)
    took_s, error = ended(process, *numbers)
    return process.returncode, took_s, error


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_does_so_byte_for_byte(slow_pair, tmp_path, number, code):
    out = tmp_path / "out put"
    returned, took_s, error = interrupted(command_for(slow_pair, out, "--overwrite"), out, number)
    assert returned == code
    assert took_s < 2.0 + SLACK_S
    assert (out / JOURNAL).exists()
    assert not (out / MANIFEST).exists()
    again = shlex.split(error.splitlines()[-1])
    assert again == command_for(slow_pair, out, "--resume"), "as it was typed, without --overwrite"
    subprocess.run(again, check=True, capture_output=True, timeout=120)
    extrapolate(*slow_pair, tmp_path / "straight")
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert not (out / JOURNAL).exists()


def test_a_run_stopped_twice_ends_at_once_and_can_be_resumed(slow_pair, tmp_path):
    returned, took_s, error = interrupted(
        command_for(slow_pair, tmp_path / "out", "--quiet"), tmp_path / "out", INT, TERM
    )
    assert returned in (130, 143), "130 if the first one was enough within 50 ms"
    assert took_s < PATIENCE_S
    assert "--resume" in error
    assert subprocess.run(shlex.split(error.splitlines()[-1]), capture_output=True, timeout=120).returncode == 0


READS = """
import mmap, os, sys, threading
import torch
from lox_stream.signals import Interruption
with Interruption(lambda: "last words"):
    view = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    os.truncate(sys.argv[1], 5000)
    work = {"torch": lambda: tensor.float().sum(), "Python": lambda: bytes(view)}[sys.argv[2]]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print("went on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the file")
@pytest.mark.parametrize("who", ["torch", "Python"])
def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path, who):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1 << 20))
    ran = subprocess.run(
        [sys.executable, "-c", READS, path, who], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr == f"error: {path}: was cut while it was read. Restore it, and run again\nlast words\n"
    assert ran.stdout == ""
