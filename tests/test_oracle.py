"""The float64 oracle that the other tests trust: its one rounding, its ulps, its SVD."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("lox_oracle", Path(__file__).parents[1] / "benchmarks" / "oracle.py")
oracle = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = oracle  # dataclasses look their module up
SPEC.loader.exec_module(oracle)


def nearest(value: float, dtype: torch.dtype) -> float:
    """`value` rounded to nearest, ties to even, in exact rational arithmetic."""
    if value == 0:
        return value
    lowest = math.frexp(torch.finfo(dtype).smallest_normal)[1]
    step = Fraction(2) ** (max(math.frexp(value)[1], lowest) - 1 - oracle.FRACTION_BITS[dtype])
    rounded = round(Fraction(value) / step) * step  # Python rounds ties to even
    return math.copysign(math.inf, value) if abs(rounded) > Fraction(torch.finfo(dtype).max) else float(rounded)


def awkward_numbers(count: int) -> list[float]:
    """Numbers on, just beside and between the ties of bf16 and fp16, normal, subnormal and overflowing."""
    rng = random.Random(0)
    numbers = []
    for _ in range(count):
        whole = rng.choice((rng.randrange(128, 256), rng.randrange(1024, 2048)))
        beside = rng.choice((0, 2**-40, -(2**-40), 2**-15, -(2**-15), rng.random()))
        exponent = rng.choice((0, -7, 5, -14, -24, 4, 9, -126, -133, -140, -150, 117, 120, 121))
        numbers.append(rng.choice((1, -1)) * (whole + rng.choice((0, 0.5)) + beside) * 2.0**exponent)
    return numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_rounds_once_to_nearest_even(dtype):
    numbers = awkward_numbers(20_000)
    rounded = oracle.rounded_once(torch.tensor(numbers, dtype=torch.float64), dtype)
    assert rounded.dtype == dtype
    assert rounded.double().tolist() == [nearest(number, dtype) for number in numbers]


def test_torch_itself_rounds_twice():
    """Why rounded_once exists: just above a tie float32 loses what decides."""
    above_tie = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert above_tie.to(torch.bfloat16).item() == 1.0
    assert oracle.rounded_once(above_tie, torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_ulp_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, 0.75, 2.0, 3e-5, 0.0], dtype=dtype)
    away = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(oracle.ulp(values.double(), dtype), away.double() - values.double())
    assert torch.equal(oracle.ulp(-values.double(), dtype), away.double() - values.double())


def test_it_finds_a_spectrum_that_was_put_in():
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(30, 8, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1], dtype=torch.float64)
    w0 = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    exact = oracle.decompose(w0 + (u * spectrum) @ v.T, w0, rank=3)
    eps = torch.finfo(torch.float64).eps
    assert torch.allclose(exact.singular_values[:8], spectrum, rtol=100 * eps, atol=0)
    assert exact.gap == pytest.approx(1 / 6, rel=1e-12)
    assert torch.allclose(exact.update(0.5), 0.5 * (u[:, :3] * spectrum[:3]) @ v[:, :3].T, rtol=0, atol=1000 * eps)


def test_one_element_an_ulp_off_is_seen_and_measured():
    generator = torch.Generator().manual_seed(2)
    w0 = torch.randn(20, 12, generator=generator).bfloat16()
    w1 = (w0.float() + 0.01 * torch.randn(20, 12, generator=generator)).bfloat16()
    right = oracle.rounded_once(w1.double() + oracle.decompose(w1, w0, 2).update(1.25), torch.bfloat16)
    assert oracle.agreement("w", w1, w0, right, 2, 1.25).share == 1.0
    wrong = right.clone()
    wrong.view(torch.int16)[3, 4] += 2
    seen = oracle.agreement("w", w1, w0, wrong, 2, 1.25)
    assert (seen.same, seen.elements) == (239, 240)
    assert seen.beyond == 1
    assert 1.0 < seen.worst_ulps <= 2.0


def test_a_vector_has_to_be_copied():
    w1 = torch.ones(5, dtype=torch.bfloat16)
    assert oracle.agreement("norm", w1, w1 * 2, w1, 6, 1.25).share == 1.0
    assert oracle.agreement("norm", w1, w1 * 2, w1 * 2, 6, 1.25).share == 0.0
