"""The Triton kernels against float64 and against the CPU's, on a GPU where there is one, else by Triton's interpreter.

Each law takes the kernels it judges, so that wrong kernels are judged too: this file run as a program does that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lox_stream.costs import part_rows
from lox_stream.kernels import by_torch, cpu
from lox_stream.kernels.gpu import products
from lox_stream.kernels.random_words import words16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ["TRITON_INTERPRET"] = "1" if DEVICE == "cpu" else "0"  # read when Triton is imported
pytest.importorskip("triton")

FOLDER = Path(cpu.__file__).parent / "gpu"
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (1, 9), (3, 5), (64, 64), (65, 130), (130, 65)]
KEY = (123, 0xF0000001)
# of each binade, both signs, and what lies on and beside a rounding boundary
HARD = [0.0, 1.0, 1.00390625, 1.01171875, 3.0039062, 65504.0, 65519.996, 65520.0, 3.3895e38, 3.3e38, 1e30, 1e-3, 1e-5]
HARD += [6.1035156e-05, 6.1e-05, 5.9604645e-08, 2.9802322e-08, 2.98e-08, 1e-12, 1e-39, 1.4e-45, float("inf")]


def loaded(folder: Path, name: str) -> SimpleNamespace:
    """The package of kernels in `folder`."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    names = ("delta_matmul", "delta_rmatmul", "lowrank_update", "fullrank_update", "partial_sums", "products")
    modules = {part: importlib.import_module(f"{name}.{part}") for part in names}
    return SimpleNamespace(**modules, whole=lambda m: {})


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    return loaded(FOLDER, "lox_kernels_gpu")


def pair(m: int, n: int, dtype: torch.dtype, base: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * 7919 + n)
    w0 = torch.randn(m, n, generator=generator)
    w1 = w0 + 0.05 * torch.randn(m, n, generator=generator)
    return w1.to(dtype).to(DEVICE), w0.to(base or dtype).to(DEVICE)


def strided(values: Tensor) -> Tensor:
    """The same values with rows further apart, between them poison."""
    wide = torch.full((values.shape[0], values.shape[1] + 5), torch.nan, dtype=values.dtype, device=values.device)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def normal(m: int, n: int) -> Tensor:
    """(m, n), contiguous, with poison behind the last row."""
    values = torch.full((m + 1, n), torch.nan)
    values[:m].normal_(generator=torch.Generator().manual_seed(m + n))
    return values.to(DEVICE)[:m]


def judge_product(found: Tensor, delta: Tensor, x: Tensor, what: object) -> None:
    """Within what float32 sums of delta @ x may be off by; tf32x3 doubles it."""
    bound = 16 * EPS * delta.shape[1] ** 0.5 * (delta.norm(dim=1, keepdim=True) * x.double().norm(dim=0))
    assert found.dtype == torch.float32, what
    assert found.shape == bound.shape, what
    assert ((found.double() - delta @ x.double()).abs() <= bound).all(), what


def both_products(k: SimpleNamespace, w1: Tensor, w0: Tensor, lanes: int, scale: float = 1.0) -> None:
    """The one with the sum of squares, and x in columns; the other with x in rows."""
    m, n = w1.shape
    delta = (w1.double() - w0.double()) * scale
    total = delta.square().sum()
    what = (m, n, lanes, w1.dtype, w0.dtype)
    for function, matrix in ((k.delta_matmul.delta_matmul, delta), (k.delta_rmatmul.delta_rmatmul, delta.T)):
        x, squares = normal(matrix.shape[1], lanes), []
        judge_product(function(w1, w0, x, scale=scale, squares=squares), matrix, x, what)
        assert abs(torch.cat(squares).sum() - total) <= 20 * EPS * total, what
        x = normal(lanes, matrix.shape[1]).T
        judge_product(function(w1, w0, x, scale=scale), matrix, x, what)


def law_products_agree_with_float64(k: SimpleNamespace) -> None:
    for shape in SHAPES:
        both_products(k, *pair(*shape, torch.bfloat16), 8)
    for dtype in DTYPES[1:]:
        both_products(k, *pair(65, 70, dtype), 8)
    for lanes in (1, 17, 33, 64):
        both_products(k, *pair(70, 130, torch.bfloat16), lanes)
    both_products(k, *pair(40, 70, torch.bfloat16, torch.float32), 8)
    both_products(k, *pair(40, 70, torch.float32, torch.float16), 8)


def law_weights_may_have_any_row_stride(k: SimpleNamespace) -> None:
    w1, w0 = pair(70, 130, torch.bfloat16)
    both_products(k, strided(w1), w0, 8)
    both_products(k, w1, strided(w0), 8)


def law_a_wide_factor_goes_in_groups(k: SimpleNamespace) -> None:
    both_products(k, *pair(20, 40, torch.bfloat16), 70)


def law_scales_are_applied_before_the_products(k: SimpleNamespace) -> None:
    w1, w0 = pair(33, 40, torch.float32)
    both_products(k, w1 * 1e-38, w0 * 1e-38, 8, scale=2.0**120)


def law_a_long_loop_is_split(k: SimpleNamespace) -> None:
    for module, shape, splits in ((k.delta_matmul, (70, 1100), 2), (k.delta_rmatmul, (1100, 70), 4)):
        w1, w0 = pair(*shape, torch.bfloat16)
        assert len(module.launch_of(w1, w0, normal(max(shape), 8))[1]) == splits
        both_products(k, w1, w0, 8)


def law_rows_of_a_matrix_have_the_bits_that_they_have_in_the_whole(k: SimpleNamespace) -> None:
    before = k.products.PROGRAMS, k.products.FEWEST_SPLITS
    k.products.PROGRAMS, k.products.FEWEST_SPLITS = 4, 2  # as if the matrix were so large that these are enough
    try:
        judge_rows(k, 1100, 150)
    finally:
        k.products.PROGRAMS, k.products.FEWEST_SPLITS = before


def judge_rows(k: SimpleNamespace, m: int, n: int) -> None:
    part = k.products.part_rows(m, n)
    assert part < m
    w1, w0 = pair(m, n, torch.bfloat16)
    x, y, squares, some = normal(n, 70), normal(m, 70), [], []
    image = k.delta_matmul.delta_matmul(w1, w0, x, squares=squares)
    terms = k.delta_rmatmul.partial_products(w1, w0, y)
    assert torch.equal(k.partial_sums.total(terms).T, k.delta_rmatmul.delta_rmatmul(w1, w0, y))
    us, vh, kept = normal(m, 6), normal(6, n), torch.zeros(3, dtype=torch.float64, device=DEVICE)
    out, whole = w1.clone(), torch.empty_like(w1)
    told = k.lowrank_update.lowrank_update(w1, us, vh, whole, key=KEY, first=5)
    for block in (slice(0, part), slice(part, m)):
        here = w1[block], w0[block]
        assert torch.equal(k.delta_matmul.delta_matmul(*here, x, whole=m, squares=some), image[block])
        found = k.delta_rmatmul.partial_products(*here, y[block], whole=m)
        assert torch.equal(found, terms[block.start // part :][: len(found)])
        first = 5 + block.start * n
        rows = out[block], us[block], vh, out[block]
        kept += k.lowrank_update.lowrank_update(*rows, key=KEY, first=first, **k.whole(m))
    assert sorted(torch.cat(some).tolist()) == sorted(torch.cat(squares).tolist())
    assert torch.equal(out, whole), "an update may replace its weight"
    assert torch.allclose(kept, told, rtol=1e-12)


def law_parts_are_added_in_their_order(k: SimpleNamespace) -> None:
    parts = torch.tensor([[1e8], [1.0], [-1e8], [3.0]]).repeat(1, 1500).to(DEVICE)
    assert (k.partial_sums.total(parts) == 3.0).all()  # (1e8 + 1) - 1e8 is 0 in float32


def law_what_is_not_finite_shows_in_the_squares(k: SimpleNamespace) -> None:
    for bad in (torch.nan, torch.inf):
        w1, w0 = pair(65, 70, torch.bfloat16)
        w1[64, 69] = bad
        for function, length in ((k.delta_matmul.delta_matmul, 70), (k.delta_rmatmul.delta_rmatmul, 65)):
            squares: list[Tensor] = []
            function(w1, w0, normal(length, 8), squares=squares)
            assert not torch.cat(squares).sum().isfinite()


def law_offsets_beyond_two_to_the_31_are_right(k: SimpleNamespace) -> None:
    """Three rows that lie 2^30 elements apart, in memory that is mapped and not there but for these rows."""
    far, n = (1 << 30) + 8, 8
    with tempfile.TemporaryFile() as file:
        file.truncate((2 * far + n) * 2)
        spread = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=2 * far + n, dtype=torch.bfloat16)
        w1 = spread.to(DEVICE).as_strided((3, n), (far, 1)) if DEVICE == "cuda" else spread.as_strided((3, n), (far, 1))
        w1.copy_(pair(3, n, torch.bfloat16)[0])
        w0 = pair(3, n, torch.bfloat16)[1]
        both_products(k, w1, w0, 8)
        near = torch.empty(3, n, dtype=torch.bfloat16, device=DEVICE)
        k.fullrank_update.fullrank_update(w1, w0, 1.25, near)
        expected = near.clone()
        k.fullrank_update.fullrank_update(near.copy_(w1), w0, 1.25, w1)
        assert torch.equal(w1, expected)


def judge_update(
    k: SimpleNamespace, m: int, n: int, dtype: torch.dtype, rank: int, key: tuple[int, int] | None
) -> None:
    w1 = strided(pair(m, n, dtype)[0])
    us, vh = normal(m, rank).mul_(0.1), normal(rank, n).mul_(0.1)
    out = strided(torch.full((m, n), torch.nan, dtype=dtype, device=DEVICE))
    sums = k.lowrank_update.lowrank_update(w1, us, vh, out, key=key, first=7, unit=4.0).tolist()
    expected = torch.empty(m, n, dtype=dtype)
    kept = cpu.lowrank_update(w1.cpu().contiguous(), us.cpu(), vh.cpu(), expected, key=key, first=7)
    what = (m, n, dtype, rank, key)
    exact = w1.double() + us.double() @ vh.double()
    grid = torch.finfo(dtype).eps * exact.abs() * (1.0 if key else 0.51)
    sums_of_float32 = 4 * EPS * rank**0.5 * (w1.double().abs() + us.double().abs() @ vh.double().abs())
    assert ((out.double() - exact).abs() <= grid + sums_of_float32 + torch.finfo(dtype).tiny).all(), what
    if dtype != torch.float32:
        assert (out.cpu() != expected).double().mean() <= max(1e-4, 1.5 / (m * n)), what
    assert sums[0] == pytest.approx(kept.dot, rel=1e-4, abs=1e-4 * kept.square), what
    assert sums[1] == pytest.approx(kept.square, rel=20 * EPS * rank), what
    assert sums[2] == 0, what


def law_low_rank_updates_are_those_of_the_cpu(k: SimpleNamespace) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            for key in (None, KEY):
                judge_update(k, *shape, dtype, 6, key)
    for rank in (1, 16, 17, 33, 100):
        judge_update(k, 40, 140, torch.bfloat16, rank, None)
    judge_update(k, 33, 140, torch.bfloat16, 256, KEY)


def law_in_ten_thousand_elements_one_may_differ_from_the_cpu(k: SimpleNamespace) -> None:
    """Of 20,800 two: a smaller matrix cannot tell, for one element is more than that share of it."""
    for dtype, key in ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, KEY)):
        judge_update(k, 160, 130, dtype, 6, key)


def law_full_rank_updates_are_those_of_the_cpu(k: SimpleNamespace) -> None:
    for dtype, base in (
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, None),
        (torch.bfloat16, torch.float32),
    ):
        for key in (None, KEY):
            w1, w0 = pair(40, 140, dtype, base)
            out, expected = torch.empty_like(w1), torch.empty(40, 140, dtype=dtype)
            sums = k.fullrank_update.fullrank_update(w1, w0, 1.25, out, key=key, first=3).tolist()
            kept = cpu.fullrank_update(w1.cpu(), w0.cpu(), 1.25, expected, key=key, first=3)
            assert torch.equal(out.cpu(), expected), (dtype, base, key)
            assert sums == pytest.approx([kept.dot, kept.square, 0.0], rel=1e-4), (dtype, base, key)


def rounded(k: SimpleNamespace, values: Tensor, dtype: torch.dtype, key: tuple[int, int] | None, first: int) -> Tensor:
    """float32 `values` (m, n) as 0 - (0 - values) is rounded, which is exact before that."""
    zeros = torch.zeros(values.shape, dtype=dtype, device=DEVICE)
    out = torch.empty_like(zeros)
    k.fullrank_update.fullrank_update(zeros, values.to(DEVICE), -1.0, out, key=key, first=first)
    return out.cpu()


def law_rounding_has_the_bits_of_the_cpu(k: SimpleNamespace) -> None:
    some = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-30.0, 20.0)
    values = torch.cat([torch.tensor(HARD), -torch.tensor(HARD), some])[:, None].repeat(1, 40)
    for dtype in DTYPES[:2]:
        zeros = torch.zeros(values.shape, dtype=dtype)
        for key, first in ((None, 0), (KEY, 0), (KEY, 3), ((0, 1), 2**33 - 5), ((2**31, 2**32 - 1), 2**40 + 1)):
            expected = torch.empty_like(zeros)
            cpu.fullrank_update(zeros, values, -1.0, expected, key=key, first=first)
            assert torch.equal(rounded(k, values, dtype, key, first), expected), (dtype, key, first)


def law_a_nan_stays_one(k: SimpleNamespace) -> None:
    for bits in (0x7FC00000, 0x7FFFFFFF, -1):
        for dtype in DTYPES[:2]:
            value = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
            for key in (None, KEY):
                assert rounded(k, value, dtype, key, 0).isnan().all(), (bits, dtype, key)


def law_words_are_the_golden_ones(k: SimpleNamespace) -> None:
    """A word w adds to what is cut off: 65535 - w parts of a step do not carry, one more does; below zero as well."""
    words = torch.tensor(words16(5, 40, KEY).astype(int))
    bits = 0x3F800000 + 65535 - words
    step = 2.0**-24  # of float16's subnormal numbers
    for dtype, values, expected in (
        (torch.bfloat16, bits.int().view(torch.float32), 1.0),
        (torch.bfloat16, (bits + 1).int().view(torch.float32), 1.0078125),
        (torch.float16, -words * (step / 65536), 0.0),
        (torch.float16, -(words + 0.5) * (step / 65536), -step),
    ):
        assert (rounded(k, values.float()[None], dtype, KEY, 5).float() == expected).all(), (dtype, expected)


def law_what_overflows_is_counted(k: SimpleNamespace) -> None:
    for dtype, key in ((torch.float16, None), (torch.float16, KEY), (torch.bfloat16, None)):
        w1 = torch.full((33, 130), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
        us, vh = torch.zeros(33, 1, device=DEVICE), torch.ones(1, 130, device=DEVICE)
        us[32] = torch.finfo(dtype).max / 64
        out = torch.empty_like(w1)
        assert k.lowrank_update.lowrank_update(w1, us, vh, out, key=key).tolist()[2] == 130
        assert (~out.isfinite()).sum() == 130


LAWS = {name.removeprefix("law_"): law for name, law in globals().items() if name.startswith("law_")}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns of infinities
@pytest.mark.parametrize("law", LAWS)
def test_it_holds_that(law, kernels):
    LAWS[law](kernels)


OF_TORCH = (
    *("products_agree_with_float64", "weights_may_have_any_row_stride", "scales_are_applied_before_the_products"),
    *("rows_of_a_matrix_have_the_bits_that_they_have_in_the_whole", "parts_are_added_in_their_order"),
    *("what_is_not_finite_shows_in_the_squares", "low_rank_updates_are_those_of_the_cpu", "what_overflows_is_counted"),
    "in_ten_thousand_elements_one_may_differ_from_the_cpu",
)


@pytest.mark.parametrize("law", OF_TORCH)
def test_of_the_kernels_in_torch_it_holds_that(law, monkeypatch):
    monkeypatch.setattr(by_torch, "TILE_ELEMENTS", 1000)

    def both(*given, **how):
        return by_torch.total(by_torch.partial_products(*given, **how)).T

    back = SimpleNamespace(delta_rmatmul=both, partial_products=by_torch.partial_products, part_rows=by_torch.part_rows)
    all_in_one = SimpleNamespace(
        delta_matmul=by_torch,
        delta_rmatmul=back,
        lowrank_update=by_torch,
        partial_sums=by_torch,
        products=products,
        whole=lambda m: {"whole": m},
    )
    LAWS[law](all_in_one)


def test_the_words_of_the_kernels_in_torch_are_the_golden_ones():
    for first in (0, 5, (1 << 33) - 3, (1 << 34) + 1):
        found = by_torch._words16(first, torch.Size((7, 9)), KEY, torch.device(DEVICE))
        assert found.flatten().tolist() == words16(first, 63, KEY).tolist()


def test_plans_know_how_finely_a_matrix_can_be_cut(kernels):
    for m in (1, 64, 65, 1000, 4096, 28672, 128256):
        for n in (1, 128, 129, 576, 8192, 28672):
            assert part_rows(m, n) == kernels.products.part_rows(m, n)


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", [8, 64])
def test_results_do_not_change_from_launch_to_launch(kernels, lanes):
    w1, w0 = pair(2000, 3000, torch.bfloat16)
    for function, length in ((kernels.delta_matmul.delta_matmul, 3000), (kernels.delta_rmatmul.delta_rmatmul, 2000)):
        x = normal(length, lanes)
        assert len({function(w1, w0, x).cpu().numpy().tobytes() for _ in range(20)}) == 1


@pytest.mark.gpu
def test_large_products_keep_the_accuracy_of_float32(kernels):
    """Tensor cores that summed by themselves would be off by a hundred times more."""
    w1, w0 = pair(512, 65536, torch.bfloat16)
    x, y = normal(65536, 16), normal(512, 16)
    delta = w1.double() - w0.double()
    for found, exact in (
        (kernels.delta_matmul.delta_matmul(w1, w0, x), delta @ x.double()),
        (kernels.delta_rmatmul.delta_rmatmul(w1, w0, y), delta.T @ y.double()),
    ):
        assert (found.double() - exact).norm() <= 8 * EPS * exact.norm()


PRODUCTS, SPLIT, FAR = "products_agree_with_float64", "a_long_loop_is_split", "offsets_beyond_two_to_the_31_are_right"
ROWS = "rows_of_a_matrix_have_the_bits_that_they_have_in_the_whole"
LOW, FULL = "low_rank_updates_are_those_of_the_cpu", "full_rank_updates_are_those_of_the_cpu"
BITS, WORDS = "rounding_has_the_bits_of_the_cpu", "words_are_the_golden_ones"
Mutant = tuple[str, str, str, str]
MUTATIONS: list[Mutant] = [  # file, what is right, what is wrong, the law that is broken
    ("delta_matmul.py", "& (cols[None, :] < n)\n", "& (cols[None, :] < n - 1)\n", PRODUCTS),
    ("delta_matmul.py", "inside = (rows[:, None] < m) &", "inside = (rows[:, None] <= m) &", PRODUCTS),
    ("delta_matmul.py", "(cols[:, None] < n) & (lane", "(cols[:, None] <= n) & (lane", PRODUCTS),
    ("delta_matmul.py", "tl.minimum(first + part, n), BLOCK_N", "tl.minimum(first + part, n - 1), BLOCK_N", PRODUCTS),
    ("delta_matmul.py", ".to(tl.int64) * stride_l", ".to(tl.int64) * stride_x", PRODUCTS),
    ("delta_matmul.py", "(split * m + rows[:, None])", "(rows[:, None])", SPLIT),
    ("delta_matmul.py", "w1 * scale - w0 * scale", "w1 * scale - w0", "scales_are_applied_before_the_products"),
    ("delta_matmul.py", "tl.program_id(0).to(tl.int64), tl", "tl.program_id(0), tl", FAR),
    ("delta_rmatmul.py", "tl.arange(0, BLOCK_M).to(tl.int64)", "tl.arange(0, BLOCK_M)", FAR),
    ("delta_rmatmul.py", "stride0 + cols", "stride1 + cols", "weights_may_have_any_row_stride"),
    ("delta_rmatmul.py", "(lane[:, None] < lanes) & (rows[None, :] < m)", "(lane[:, None] < lanes)", PRODUCTS),
    ("delta_rmatmul.py", "lane[:, None]) * n + cols", "lane[:, None]) * m + cols", PRODUCTS),
    ("delta_rmatmul.py", "first = tl.program_id(1) * part", "first = 0", SPLIT),
    ("delta_rmatmul.py", "if SQUARES:\n            squares +=", "if SQUARES:\n            squares =", SPLIT),
    (
        "products.py",
        "tiles_of(outer, block_outer), tiles_of(inner, part)",
        "tiles_of(outer, block_outer), max(1, inner // part)",
        SPLIT,
    ),
    ("products.py", "part_of(whole or m, n", "part_of(m, n", ROWS),
    ("partial_sums.py", "range(1, SPLITS)", "range(1, SPLITS - 1)", "parts_are_added_in_their_order"),
    ("partial_sums.py", "range(1, SPLITS)", "range(SPLITS - 1, 0, -1)", "parts_are_added_in_their_order"),
    ("lowrank_update.py", "range(0, RANK, BLOCK_K)", "range(0, RANK - BLOCK_K + 1, BLOCK_K)", LOW),
    ("lowrank_update.py", "(k[None, :] < RANK)", "(k[None, :] < RANK - 1)", LOW),
    ("lowrank_update.py", "(k[:, None] < RANK) & (cols[None, :] < n)", "(cols[None, :] < n)", LOW),
    ("numbers.py", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000", BITS),
    ("numbers.py", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits", BITS),
    ("numbers.py", "bits + 0x7FFF", "bits + 0x7FF4", "in_ten_thousand_elements_one_may_differ_from_the_cpu"),
    (
        "numbers.py",
        "tl.where(not_finite(values), values, ((bits",
        "tl.where(values > 0, values, ((bits",
        "a_nan_stays_one",
    ),
    ("numbers.py", "tl.where(values == values, rounded, values)", "rounded", "a_nan_stays_one"),
    (
        "numbers.py",
        "tl.floor(values * many.to(tl.float32, bitcast=True))",
        "(values * many.to(tl.float32, bitcast=True))",
        WORDS,
    ),
    ("numbers.py", "(index & 1) * 16", "0 * index", WORDS),
    ("numbers.py", "^ high)", ")", BITS),
    ("numbers.py", "0x846CA68B", "0x846CA68D", WORDS),
    ("updates.py", "first + rows[:, None] * n", "rows[:, None] * n", WORDS),
    ("updates.py", "rows[:, None] * n + cols", "rows[:, None] * stride_out + cols", LOW),
    ("updates.py", "band.to(tl.int64) * BLOCK_M", "band * BLOCK_M", FAR),
    ("updates.py", "not_finite(rounded))", "not_finite(base))", "what_overflows_is_counted"),
    ("updates.py", "(rounded - base) * unit", "(rounded - base)", LOW),
    ("fullrank_update.py", "(base - w0) * alpha", "base * alpha - w0", FULL),
]


def verdicts(mutants: Sequence[Mutant]) -> list[str]:
    """What becomes of each under the law that it breaks, in a process of its own."""
    if DEVICE == "cuda":
        pytest.skip("wrong kernels are interpreted, where there is no GPU: the interpreters of some Tritons fail")
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, json.dumps(mutants)]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_laws_hold_where_nothing_is_mutated():
    assert verdicts([("numbers.py", "lowbias32", "lowbias32", law) for law in LAWS]) == ["holds"] * len(LAWS)


@pytest.mark.parametrize("file", dict.fromkeys(file for file, *_ in MUTATIONS))
def test_wrong_kernels_are_caught(file):
    mutants = [mutant for mutant in MUTATIONS if mutant[0] == file]
    found = zip(mutants, verdicts(mutants), strict=True)
    assert [(mutant, verdict) for mutant, verdict in found if verdict not in ("broken", "crashed")] == []


def judge(mutants: Sequence[Mutant]) -> None:
    """Print a verdict on each, which has a fork of its own: it may write anywhere."""
    for file, right, wrong, law in mutants:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "mutant"
            shutil.copytree(FOLDER, copy)
            source = (copy / file).read_text()
            assert right in source, f"{file} has no {right!r} any more"
            (copy / file).write_text(source.replace(right, wrong))
            child = os.fork()
            if child == 0:
                os._exit(judged(copy, LAWS[law]))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "holds", 1: "broken", 2: "invalid"}.get(status, "crashed"), flush=True)


def judged(folder: Path, law: Callable[[SimpleNamespace], None]) -> int:
    """0 where the law holds, 1 where it does not, 2 where the kernels do not even run."""
    signal.alarm(60)
    try:
        law(loaded(folder, "lox_kernels_mutant"))
    except AssertionError:
        return 1
    except Exception:
        traceback.print_exc()
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no other threads
    judge(json.loads(sys.argv[1]))
