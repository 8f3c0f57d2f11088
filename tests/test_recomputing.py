"""Laws of `verify` with inputs: what is sampled, what it costs, and that the float64 recomputation can be trusted."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lox_stream.anywhere import extrapolate
from lox_stream.errors import CheckpointError, OptionError, OutputError
from lox_stream.kernels import key_of
from lox_stream.kernels.random_words import words16
from lox_stream.options import Options
from lox_stream.output_rules import MANIFEST
from lox_stream.recomputing import compare, compare_all, recomputed, rounded_once
from lox_stream.sampling import choose_sample, units_of
from lox_stream.synthetic import pair_of

FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A matrix, a wide one, a stack of three, one that is the same on both sides, and a vector."""
    generator = torch.Generator().manual_seed(0)
    pairs = {
        "matrix": pair_of(90, 70, generator, dtype=dtype),
        "wide": pair_of(40, 300, generator, dtype=dtype),
        "stack": tuple(
            torch.stack(side) for side in zip(*(pair_of(50, 60, generator, dtype=dtype) for _ in range(3)), strict=True)
        ),
        "same": (torch.eye(9, dtype=dtype), torch.eye(9, dtype=dtype)),
        "vector": (torch.zeros(7, dtype=dtype), torch.ones(7, dtype=dtype)),
    }
    base = save(folder / "base", {name: sides[0].contiguous() for name, sides in pairs.items()})
    return base, save(folder / "aligned", {name: sides[1].contiguous() for name, sides in pairs.items()})


CASES = {
    "bfloat16": (torch.bfloat16, Options()),
    "stochastic": (torch.bfloat16, Options(rounding="stochastic", seed=5)),
    "float16 stochastic": (torch.float16, Options(rounding="stochastic")),
    "float16": (torch.float16, Options()),
    "float32": (torch.float32, Options()),
    "float64": (torch.float64, Options()),
    "full rank": (torch.bfloat16, Options(rank=0)),
    "rank over all": (torch.bfloat16, Options(rank=1000)),
    "exact": (torch.bfloat16, Options(svd="exact", alpha=-2.0)),
    "alpha 0": (torch.bfloat16, Options(alpha=0)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_of_a_right_output_passes(tmp_path, case):
    dtype, options = CASES[case]
    base, aligned = make(tmp_path, dtype)
    extrapolate(base, aligned, tmp_path / "out", options=options)
    sample = choose_sample(tmp_path / "out", base, aligned, count=100)
    compared = list(compare_all(sample))
    assert {seen.name for seen in compared} >= {"matrix", "wide", "same", "vector"}
    assert [seen for seen in compared if not seen.ok] == []
    kinds = {seen.name: seen.kind for seen in compared}
    assert kinds["vector"] == kinds["same"] == "copy"
    if options.alpha:
        assert sum(seen.name.startswith("stack[") for seen in compared) == 3
        assert kinds["matrix"] == ("rank-k" if options.rank == 6 else "full rank")
    if dtype in FRACTION_BITS:
        assert min(seen.share for seen in compared) > 0.995


@pytest.mark.parametrize("name", ["matrix", "stack[1]", "vector"])
def test_an_output_with_another_update_fails(tmp_path, name):
    """Checksums would say so too; here the recomputation has to see it alone."""
    base, aligned = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "out")
    options, units = units_of(tmp_path / "out", base, aligned)
    unit = next(unit for unit in units if unit.name == name)
    assert compare(unit, options).ok
    place = unit.out.start + (0 if unit.region is None else unit.region.start * 2)
    data = bytearray(unit.out.path.read_bytes())
    some = np.frombuffer(data, np.uint16, count=unit.n_bytes // 2, offset=place)
    some[:: 50 if len(some) > 50 else 3] ^= 1
    unit.out.path.write_bytes(data)
    assert not compare(unit, options).ok
    wide = next(unit for unit in units if unit.name == "wide")
    assert compare(wide, options).ok
    assert not compare(wide, replace(options, alpha=1.0)).ok


def test_the_same_seed_picks_the_same_matrices_and_cheap_ones_more_often(tmp_path):
    base, aligned = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "out")

    def names(count: int, seed: int) -> list[str]:
        return [unit.name for unit in choose_sample(tmp_path / "out", base, aligned, count=count, seed=seed).units]

    assert names(3, 1) == names(3, 1)
    picked = [names(1, seed)[0] for seed in range(40)]
    assert len(set(picked)) > 2
    assert not {"same", "vector"} & set(picked), "copies only fill up"
    assert len(names(100, 0)) == 7
    with pytest.raises(OptionError, match="--sample is 0"):
        names(0, 0)


def test_the_cost_is_that_of_the_sample(tmp_path):
    base, aligned = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "out")
    everything = choose_sample(tmp_path / "out", base, aligned, count=100)
    shapes = [(70, 90), (40, 300), *[(50, 60)] * 3]
    assert everything.flops == sum(6 * q * p * p + 20 * p**3 for p, q in shapes)
    assert everything.memory_bytes > 0
    assert everything.expected_s > choose_sample(tmp_path / "out", base, aligned, count=1).expected_s > 0
    assert 1 <= everything.workers <= 7


def test_inputs_that_are_not_the_runs_are_refused(tmp_path):
    base, aligned = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "out")
    (tmp_path / "else").mkdir()
    other, _ = make(tmp_path / "else", torch.float32)
    with pytest.raises(CheckpointError, match=r"base: .* is not what the output was made from") as caught:
        choose_sample(tmp_path / "out", other, aligned)
    assert str(base) in str(caught.value), "the way out names the right one"


@pytest.mark.parametrize("damage", [{"options": {"rank": "six"}}, {"options": {}}, {"tensors": {}}])
def test_a_manifest_that_does_not_say_what_was_run_is_an_error(tmp_path, damage):
    base, aligned = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "out")
    said = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(said | damage))
    with pytest.raises(OutputError, match="manifest"):
        choose_sample(tmp_path / "out", base, aligned)


def test_where_the_part_is_not_unique_another_one_passes_and_a_wrong_one_does_not(tmp_path):
    """delta = I: every rank-6 part that projects on six orthonormal vectors is as good as any other."""
    w0 = torch.randn(208, 208, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    base, aligned = save(tmp_path / "base", {"w": w0}), save(tmp_path / "aligned", {"w": w0 + torch.eye(208)})
    extrapolate(base, aligned, tmp_path / "out")
    options, (unit,) = units_of(tmp_path / "out", base, aligned)
    assert not unit.unique
    seen = compare(unit, options)
    assert seen.ok
    save_file({"w": w0 + torch.eye(208)}, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert not compare(unit, options).ok, "no update at all"


def exactly(value: float, dtype: torch.dtype, word: int | None) -> float:
    """Rounded in rational arithmetic: to nearest even, or with a 16-bit word."""
    lowest = round(math.log2(torch.finfo(dtype).tiny))
    step = Fraction(2) ** (max(math.frexp(value)[1] - 1, lowest) - FRACTION_BITS[dtype])
    if word is None:
        return float(round(Fraction(value) / step) * step)
    size, sign = (abs(value), math.copysign(1, value)) if dtype == torch.bfloat16 else (value, 1)
    return sign * float(math.floor(Fraction(size) / step + Fraction(word, 1 << 16)) * step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_it_rounds_once(dtype, stochastic):
    """On ties, just beside them, at powers of two and among the subnormals."""
    rng, numbers = random.Random(0), []
    for _ in range(4000):
        whole = rng.choice((rng.randrange(128, 257), rng.randrange(1024, 2049)))
        beside = rng.choice((0, 2**-40, -(2**-40), rng.random()))
        numbers.append(
            rng.choice((1, -1)) * (whole + rng.choice((0, 0.5)) + beside) * 2.0 ** rng.choice((0, -7, -24, -26))
        )
    key = key_of(3, "w") if stochastic else None
    words = words16(17, len(numbers), key).tolist() if key else [None] * len(numbers)
    rounded = rounded_once(torch.tensor(numbers, dtype=torch.float64), dtype, key, 17)
    assert rounded.dtype == dtype
    right = [exactly(number, dtype, word) for number, word in zip(numbers, words, strict=True)]
    assert rounded.double().tolist() == right


def test_the_recomputation_finds_what_was_put_in():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(40, 5, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(30, 5, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)
    w0 = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    exact = recomputed(w0 + (u * spectrum) @ v.T, w0, 2, 1.25)
    close = 1000 * torch.finfo(torch.float64).eps
    assert exact.singular_values[:5] == pytest.approx(spectrum.tolist(), rel=close)
    assert torch.allclose(exact.update, 1.25 * (u[:, :2] * spectrum[:2]) @ v[:, :2].T, rtol=0, atol=close)
    assert exact.rest == pytest.approx(1.25 * math.sqrt(9 + 4 + 1), rel=close)
