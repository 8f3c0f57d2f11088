"""The CPU kernels against float64, over shapes with remainders, dtypes, scales and roundings."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import pytest
import torch

from lox_stream.kernels import (
    cpu,
    delta_matmul,
    delta_normal,
    delta_rmatmul,
    fullrank_update,
    key_of,
    lowrank_update,
    tiling,
)
from lox_stream.kernels.random_words import words16

EPS = torch.finfo(torch.float32).eps
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 5), (300, 70), (1500, 700), (3, 70_000), (40_000, 3)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


GOLDEN = [[6627, 15746, 4384, 2220, 36497, 39832], [24780, 63665, 15752, 51440, 56140]]


def pair(m, n, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(m, n, generator=generator)
    return (w0 + 0.01 * torch.randn(m, n, generator=generator)).to(dtype), w0.to(dtype)


def shuffled(task, count):
    """A `Run` that takes the tasks in another order."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    for i in order:
        task(i)


def bound(delta, x):
    """What float32 sums of delta @ x may be off by: (m, l)."""
    return 8 * EPS * math.sqrt(delta.shape[1]) * (delta.norm(dim=1, keepdim=True) * x.norm(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_agree_with_float64(shape, dtype):
    w1, w0 = pair(*shape, dtype)
    delta = w1.double() - w0.double()
    x, y = torch.randn(shape[1], 5), torch.randn(shape[0], 5)
    squares: list[float] = []
    ax = delta_matmul(w1, w0, x, squares=squares)
    other: list[float] = []
    aty = delta_rmatmul(w1, w0, y, squares=other)
    assert ax.dtype == aty.dtype == torch.float32
    assert ((ax.double() - delta @ x.double()).abs() <= bound(delta, x.double())).all()
    assert ((aty.double() - delta.T @ y.double()).abs() <= bound(delta.T, y.double())).all()
    for sums in (squares, other):
        assert math.fsum(sums) == pytest.approx(float(delta.square().sum()), rel=20 * EPS)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] <= cpu.WIDE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_products_of_one_pass_agree_with_float64(shape, dtype):
    w1, w0 = pair(*shape, dtype)
    delta = (w1.double() - w0.double()) * 4
    x = torch.randn(shape[1], 5)
    y, z = delta_normal(w1, w0, x, scale=4.0)
    assert y.dtype == z.dtype == torch.float32
    assert ((y.double() - delta @ x.double()).abs() <= bound(delta, x.double())).all()
    assert ((z.double() - delta.T @ y.double()).abs() <= bound(delta.T, y.double())).all()


def test_mixed_dtypes_are_widened_before_the_difference():
    w1, w0 = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([[1.0 + 2**-20, 2.0]], dtype=torch.float32)
    assert delta_matmul(w1, w0, torch.eye(2)).tolist() == [[-(2**-20), 0.0]]
    wide = torch.tensor([[1.0 + 2**-40, 2.0]], dtype=torch.float64)
    assert delta_matmul(w1, wide, torch.eye(2)).tolist() == [[-(2**-40), 0.0]]


@pytest.mark.parametrize("shape", [(1500, 700), (3, 70_000), (40_000, 3)])
def test_the_order_of_the_tasks_changes_no_bit(shape):
    w1, w0 = pair(*shape)
    x, y = torch.randn(shape[1], 4), torch.randn(shape[0], 4)
    assert torch.equal(delta_matmul(w1, w0, x), delta_matmul(w1, w0, x, run=shuffled))
    assert torch.equal(delta_rmatmul(w1, w0, y), delta_rmatmul(w1, w0, y, run=shuffled))
    if shape[1] <= cpu.WIDE:
        pairs = zip(delta_normal(w1, w0, x), delta_normal(w1, w0, x, run=shuffled), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_backward_product_keeps_few_partial_sums():
    calls = []

    def run(task, count):
        calls.append(count)
        cpu.in_order(task, count)

    w1, w0 = pair(40_000, 8)
    delta_rmatmul(w1, w0, torch.randn(40_000, 2), run=run)
    rows, _ = tiling(40_000, 8)
    assert calls == [min(cpu.MAX_CHUNKS, math.ceil(40_000 / (rows * cpu.CHUNK_TILES)))]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_scale_keeps_tiny_and_huge_entries_apart_from_zero_and_infinity(size):
    w1, w0 = pair(40, 30, torch.float32)
    scale = 2.0 ** -math.frexp(size)[1]
    found = delta_matmul(w1 * size, w0 * size, torch.eye(30), scale=scale)
    exact = ((w1 * size).double() - (w0 * size).double()) * scale
    assert torch.allclose(found.double(), exact, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4000)])
def test_weights_that_are_views_are_read_where_they_lie(shape):
    w1, w0 = pair(shape[0] * 2, shape[1])
    x = torch.randn(shape[1], 3)
    assert torch.equal(delta_matmul(w1[::2], w0[::2], x), delta_matmul(w1[::2].clone(), w0[::2].clone(), x))


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (128256, 8192), (8, 10**8)])
def test_tiles_are_about_half_a_million_elements(m, n):
    rows, columns = tiling(m, n)
    assert 1 <= rows <= m
    assert 1 <= columns <= n
    assert rows * columns <= cpu.TILE_ELEMENTS
    assert rows * columns >= min(m * n, cpu.TILE_ELEMENTS // 4)


def exactly_rounded(values, dtype):
    """float64 to a 16-bit dtype, ties to even, by scaling to integers."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    lowest = {torch.bfloat16: -133, torch.float16: -24}[dtype]
    _, exponent = np.frexp(values)
    place = np.ldexp(1.0, np.maximum(exponent - digits, lowest))
    return torch.from_numpy(np.rint(values / place) * place).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_of_float64_rounds_once(dtype):
    """Values just beside a tie, which a way through float32 rounds to the tie and then to even."""
    steps = np.array(
        [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40]
    )
    values = np.concatenate([steps, -steps, np.random.default_rng(0).normal(size=4000)])
    total = torch.from_numpy(values).view(1, -1)
    out = torch.empty(total.shape, dtype=dtype)
    cpu.round_to_nearest(total, out)
    assert torch.equal(out, exactly_rounded(values, dtype).view(1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_low_rank_update_is_the_rounded_sum(dtype):
    w1, _ = pair(200, 90, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    us, vh = torch.randn(200, 6, dtype=wide) * 1e-2, torch.randn(6, 90, dtype=wide)
    out = torch.empty_like(w1)
    kept = lowrank_update(w1, us, vh, out)
    update = us.double() @ vh.double()
    exact = w1.double() + update
    assert out.dtype == dtype
    slack = 20 * torch.finfo(wide).eps * (exact.abs() + us.double().abs() @ vh.double().abs())
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()
    assert kept.square == pytest.approx(float(update.square().sum()), rel=1e-5)
    assert kept.dot == pytest.approx(float(((out.double() - w1.double()) * update).sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_rank_is_task_arithmetic_with_one_rounding(dtype):
    w1, w0 = pair(60, 50, dtype)
    out = torch.empty_like(w1)
    kept = fullrank_update(w1, w0, 0.5, out)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (w1.to(wide) + (w1.to(wide) - w0.to(wide)) * 0.5).to(dtype)
    assert torch.equal(out, expected)
    assert kept.square == pytest.approx(float((0.5 * (w1.double() - w0.double())).square().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_overflow_shows_in_the_sums(dtype):
    w1 = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    out = torch.empty_like(w1)
    kept = lowrank_update(w1, torch.full((4, 1), torch.finfo(dtype).max), torch.ones(1, 4), out)
    assert not math.isfinite(kept.dot)


def test_golden_words():
    """Computed once by an implementation in plain Python integers (below); a GPU has to draw the same."""
    key = key_of(0, "model.layers.0.mlp.up_proj.weight")
    assert key == tuple(
        int.from_bytes(
            hashlib.blake2b(b"0:model.layers.0.mlp.up_proj.weight", digest_size=8).digest()[i : i + 4], "little"
        )
        for i in (0, 4)
    )
    assert words16(0, 6, key).tolist() == GOLDEN[0]
    assert words16(2**33 + 1, 5, key).tolist() == GOLDEN[1]


def lowbias32(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def plain_word(index, key):
    pair_index = index // 2
    word = lowbias32(lowbias32(pair_index & 0xFFFFFFFF ^ key[0]) ^ key[1] ^ pair_index >> 32)
    return word >> 16 if index % 2 else word & 0xFFFF


@pytest.mark.parametrize("first", [0, 1, 7, 2**32 - 3, 2**33 - 3, 2**40 + 5])
def test_words_are_a_function_of_the_index_alone(first):
    key = key_of(3, "w")
    assert words16(first, 11, key).tolist() == [plain_word(first + i, key) for i in range(11)]


def test_words_differ_by_seed_and_name():
    drawn = {words16(0, 4, key_of(seed, name)).tobytes() for seed in (0, 1) for name in ("a", "b")}
    assert len(drawn) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased(dtype):
    count = 1 << 16
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(1, count, generator=generator).to(dtype)
    step = torch.finfo(dtype).eps * w1.float().abs()
    update = step * 0.37  # elementwise, as a rank-1 product with one row
    out = torch.empty_like(w1)
    kept = lowrank_update(w1, torch.ones(1, 1), update, out, key=key_of(0, "x"))
    exact = (w1.float() + update).double()
    below, above = (
        torch.nextafter(out, torch.tensor(-math.inf, dtype=dtype)),
        torch.nextafter(out, torch.tensor(math.inf, dtype=dtype)),
    )
    assert ((exact > below.double()) & (exact < above.double())).all()
    bias = float((out.double() - exact).mean())
    spread = float((out.double() - exact).std())
    assert abs(bias) <= 4 * spread / math.sqrt(count)
    assert kept.dot / kept.square == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_does_not_depend_on_the_tiles(dtype):
    w1, _ = pair(30, 40, dtype)
    us, vh = torch.randn(30, 2) * 0.01, torch.randn(2, 40)
    whole, parts = torch.empty_like(w1), torch.empty_like(w1)
    key = key_of(0, "w")
    lowrank_update(w1, us, vh, whole, key=key)
    for top in range(0, 30, 7):
        band = slice(top, top + 7)
        lowrank_update(w1[band], us[band], vh, parts[band], key=key, first=top * 40)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-20, -(2.0**-24), 1000.0])
def test_stochastic_rounding_keeps_what_is_exact(dtype, value):
    w1 = torch.full((1, 64), value, dtype=dtype)
    out = torch.empty_like(w1)
    lowrank_update(w1, torch.zeros(1, 1), torch.zeros(1, 64), out, key=key_of(0, "w"))
    assert torch.equal(out, w1)


def test_float16_rounds_stochastically_below_its_normal_range_too():
    w1 = torch.zeros(1, 1 << 14, dtype=torch.float16)
    tiny = 2.0**-24
    out = torch.empty_like(w1)
    lowrank_update(w1, torch.full((1, 1), 0.25 * tiny), torch.ones(1, 1 << 14), out, key=key_of(0, "w"))
    assert set(out.double().unique().tolist()) == {0.0, tiny}
    assert float(out.double().mean()) == pytest.approx(0.25 * tiny, rel=0.06)
