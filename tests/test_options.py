"""Laws of options: obeyed or refused, never changed."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest

from lox_stream.errors import LoxError, OptionError
from lox_stream.options import MAX_NUMBER, Options, check_options, check_platform, parse_size


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(rank=0, alpha=0.0, tolerance=0.5, seed=MAX_NUMBER, threads=64),
        Options(rank=10**9, alpha=-3, svd="exact", rounding="stochastic", on_nonfinite="copy", device="cuda:3"),
        Options(skip=("*.bias",), only=("model.*",), device="cuda", memory_bytes=1, gpu_memory_bytes=1),
    ],
)
def test_usable_options_pass(options):
    check_options(options)


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("rank", -1, "--rank"),
        ("rank", 2.0, "--rank"),
        ("rank", True, "--rank"),
        ("alpha", math.inf, "--alpha"),
        ("alpha", math.nan, "--alpha"),
        ("alpha", "1", "--alpha"),
        ("tolerance", 0, "--tolerance"),
        ("tolerance", 1.0, "--tolerance"),
        ("tolerance", math.nan, "--tolerance"),
        ("svd", "fast", "--svd"),
        ("rounding", "up", "--rounding"),
        ("on_nonfinite", "ignore", "--on-nonfinite"),
        ("seed", -1, "--seed"),
        ("seed", MAX_NUMBER + 1, "--seed"),
        ("device", "gpu", "--device"),
        ("device", "cuda:", "--device"),
        ("device", None, "--device"),
        ("memory_bytes", 0, "--memory"),
        ("gpu_memory_bytes", -1, "--gpu-memory"),
        ("gpu_memory_bytes", 1, "--gpu-memory is for --device cuda"),
        ("kernels", "torch", "--kernels is for --device cuda"),
        ("kernels", "cuda", "--kernels"),
        ("device", "cuda:1,1", "--device"),
        ("device", "cuda:٣", "--device"),
        ("device", "cuda:0,", "--device"),
        ("on_missing", "skip", "--on-missing"),
        ("on_shape_mismatch", "pad", "--on-shape-mismatch"),
        ("threads", -2, "--threads"),
        ("skip", "lm_head.weight", "--skip"),
        ("only", ("",), "--only"),
        ("only", ["a"], "--only"),
    ],
)
def test_a_value_that_cannot_be_obeyed_is_refused_by_its_name(field, value, option):
    with pytest.raises(OptionError) as raised:
        check_options(replace(Options(), **{field: value}))
    assert str(raised.value).startswith(option)
    assert "expected" in str(raised.value)


def test_all_bad_options_are_named_at_once():
    with pytest.raises(OptionError) as raised:
        check_options(Options(rank=-1, alpha=math.nan, device="tpu"))
    assert [line.split()[0] for line in str(raised.value).splitlines()] == ["--rank", "--alpha", "--device"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("512M", 512 * 10**6),
        ("512MB", 512 * 10**6),
        ("2Ki", 2048),
        ("1.5GB", 1_500_000_000),
        (".5KiB", 512),
        ("123", 123),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4XB", "-1G", "4 G i B", "1e9", "0", "0.1", "nan", "iB", "4I"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(OptionError, match="4GiB"):
        parse_size(text)


def test_windows_is_refused_and_told_of_wsl(monkeypatch):
    check_platform()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(LoxError, match="WSL"):
        check_platform()
