"""Laws of progress: what a rate counts, how sizes and times are written, when a line appears."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass

import pytest

from lox_stream import showing


@dataclass(frozen=True)
class Reach:
    done_bytes: int
    total_bytes: int
    resumed_bytes: int = 0
    working: tuple[str, ...] = ()
    elapsed_s: float = 1.0


def test_bytes_of_an_earlier_session_are_no_part_of_the_rate():
    assert showing.rate_bps(Reach(900, 1000, resumed_bytes=700, elapsed_s=2.0)) == 100
    assert showing.rate_bps(Reach(700, 1000, resumed_bytes=700, elapsed_s=2.0)) is None
    assert "1.0 s left" in showing.facts_text(Reach(900, 1000, resumed_bytes=700, elapsed_s=2.0))


def test_a_run_without_bytes_is_done():
    assert showing.share_done(Reach(0, 0)) == 1.0


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_500, "1 MB"),
        (1_234_567, "1.23 MB"),
        (2e9, "2 GB"),
        (3e12, "3 TB"),
    ],
)
def test_sizes_have_three_digits(n_bytes, text):
    assert showing.size_text(n_bytes) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(1, "1 B"), (4 << 30, "4 GiB"), (3 << 19, "1.5 MiB"), (1 << 40, "1024 GiB")]
)
def test_budgets_are_binary(n_bytes, text):
    assert showing.budget_text(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_times_are_read_aloud(seconds, text):
    assert showing.time_text(seconds) == text


def test_a_log_gets_a_line_every_few_seconds_and_no_control_characters():
    stream, clock = io.StringIO(), itertools.count(step=1.0)
    lines = showing._Lines(stream, "extrapolating", clock=lambda: next(clock))
    for done in range(12):
        lines(Reach(done * 100, 1200, working=("a\x1b[2Jb",), elapsed_s=done + 0.5))
    text = stream.getvalue()
    assert 1 <= text.count("\n") <= 3
    assert r"a\x1b[2Jb" in text
    assert all(line.isprintable() and line.startswith("extrapolating: ") for line in text.splitlines())
