"""One matrix at a time: agreement with the float64 oracle, the flip law, retention, and weights that are unusual."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from lox_stream.delta import Delta, KeptDelta, NotFinite
from lox_stream.errors import Cancelled
from lox_stream.kernels import key_of
from lox_stream.kernels.cpu import in_order
from lox_stream.options import Options
from lox_stream.samples import Sample
from lox_stream.synthetic import matrix, pair_of, power_law
from lox_stream.update import Matrix, Outlet, Setting, extrapolate_matrices, extrapolate_matrix

SPEC = importlib.util.spec_from_file_location("lox_oracle", Path(__file__).parents[1] / "benchmarks" / "oracle.py")
oracle = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = oracle
SPEC.loader.exec_module(oracle)


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def extrapolated(w1, w0, key=None, rank=6, seed=1, **options):
    out = torch.full_like(w1, math.nan).view(-1)

    def emit(first, tile):
        out[first : first + tile.numel()] = tile.reshape(-1)

    setting = Setting(Options(rank=rank, **options), rank=rank, seed=seed, key=key)
    facts = extrapolate_matrix(w1, w0, setting, emit, in_order)
    return out.view(w1.shape), facts


def bulk_and_spikes(m, n, ratio):
    bulk = torch.linalg.svdvals(torch.randn(m, n, generator=generator(1)))
    return torch.cat([torch.linspace(2, 1, 6), bulk[: min(m, n) - 6] / bulk[0] * ratio])


@pytest.mark.parametrize("shape", [(300, 300), (500, 120), (220, 500)])
@pytest.mark.parametrize("kind", ["power", "spikes 0.9", "spikes 0.97"])
@pytest.mark.parametrize(("dtype", "law"), [(torch.bfloat16, 0.9995), (torch.float16, 0.996)])
def test_the_output_is_the_oracles_bit_for_bit_but_for_the_promised_share(shape, kind, dtype, law):
    spectrum = power_law(min(shape)) if kind == "power" else bulk_and_spikes(*shape, float(kind.split()[1]))
    w0, w1 = pair_of(*shape, generator(), dtype=dtype, spectrum=spectrum)
    out, facts = extrapolated(w1, w0)
    found = oracle.agreement("w", w1, w0, out, 6, 1.25)
    assert found.share >= law
    assert found.worst_ulps <= 1.0
    assert facts.converged
    assert facts.predicted_share <= 2e-4
    exact = oracle.decompose(w1, w0, 6)
    assert facts.singular_values == pytest.approx(exact.singular_values[:6].tolist(), rel=1e-3)
    assert facts.gap == pytest.approx(exact.gap, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_outputs_reach_a_relative_error_of_1e_5(dtype):
    w0, w1 = pair_of(200, 150, generator(), dtype=dtype)
    out, facts = extrapolated(w1, w0)
    update = oracle.decompose(w1, w0, 6).update(1.25)
    slack = torch.finfo(dtype).eps * w1.double().norm()
    assert (out.double() - w1.double() - update).norm() <= 2e-5 * update.norm() + slack
    assert facts.predicted_share is None
    assert facts.predicted_error <= 1e-5


def test_exact_is_the_oracle_in_bfloat16():
    w0, w1 = pair_of(150, 200, generator())
    out, facts = extrapolated(w1, w0, svd="exact")
    assert oracle.agreement("w", w1, w0, out, 6, 1.25).share >= 1 - 1e-4
    assert facts.method == "exact"
    assert facts.residual <= 1e-12


@pytest.mark.parametrize("rank", [0, 40, 41, 1000])
def test_full_rank_and_a_rank_above_the_short_side_are_delta_itself(rank):
    w0, w1 = pair_of(40, 90, generator())
    out, facts = extrapolated(w1, w0, rank=rank, alpha=0.7)
    assert torch.equal(out, (w1.float() + 0.7 * (w1.float() - w0.float())).bfloat16())
    assert facts.method == "full rank"
    assert facts.energy == 1.0


def test_a_negative_alpha_goes_the_other_way():
    w0, w1 = pair_of(90, 80, generator(), dtype=torch.float32)
    plus, _ = extrapolated(w1, w0, alpha=1.0)
    minus, _ = extrapolated(w1, w0, alpha=-1.0)
    assert torch.allclose(plus.double() - w1.double(), w1.double() - minus.double(), atol=1e-7)


def test_identical_weights_emit_nothing():
    w0, _ = pair_of(40, 30, generator())
    emitted = []
    facts = extrapolate_matrix(w0, w0.clone(), Setting(Options(), 6, 0), lambda *tile: emitted.append(tile), in_order)
    assert facts.method == "zero"
    assert emitted == []


def test_one_changed_element_in_a_large_matrix_is_found():
    w0, _ = pair_of(700, 600, generator(), dtype=torch.float32)
    w1 = w0.clone()
    w1[123, 457] += 1e-3
    out, facts = extrapolated(w1, w0)
    assert out[123, 457].item() == pytest.approx(float(w1[123, 457]) + 1.25e-3, rel=1e-5)
    assert facts.energy == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_of_any_size_are_extrapolated(size, dtype):
    w0, w1 = pair_of(120, 100, generator(), dtype=torch.float64)
    w0, w1 = (w0 / 0.02 * size).to(dtype), (w1 / 0.02 * size).to(dtype)
    out, facts = extrapolated(w1, w0)
    if dtype == torch.bfloat16:
        assert oracle.agreement("w", w1, w0, out, 6, 1.25).share >= 0.9995
    exact = oracle.decompose(w1, w0, 6)
    assert facts.singular_values == pytest.approx(exact.singular_values[:6].tolist(), rel=1e-3)
    update = exact.update(1.25)
    assert (out.double() - w1.double() - update).norm() <= 3e-5 * update.norm() + torch.finfo(
        dtype
    ).eps * w1.double().norm()


def test_a_tiny_delta_that_the_sample_missed_is_scaled_all_the_same():
    """The first product shows that its squares vanish; the largest entry then sets the scale."""
    w0 = torch.zeros(700, 600)
    w1 = w0.clone()
    w1[123, 457], w1[124, 458] = 1e-30, 2e-30
    assert Sample(w1, w0, w1.dtype).delta_rms == 0.0
    _, facts = extrapolated(w1, w0, rank=1)
    assert facts.singular_values == pytest.approx([2e-30], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["aligned", "base"])
@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"svd": "exact"}])
def test_nan_and_inf_are_found_with_side_and_index(bad, side, options):
    w0, w1 = pair_of(50, 40, generator())
    (w1 if side == "aligned" else w0)[7, 11] = bad
    with pytest.raises(NotFinite, match=rf"{side} has {bad} at \[7, 11\]"):
        extrapolated(w1, w0, **options)


def test_an_output_beyond_the_dtype_is_an_error():
    w0, w1 = pair_of(50, 40, generator(), dtype=torch.float16)
    w1[0] = 60000.0
    with pytest.raises(NotFinite, match="beyond the range of float16"):
        extrapolated(w1, w0)


@pytest.mark.parametrize("alpha", [1.25, 0.3])
def test_nearest_keeps_part_of_the_update_and_stochastic_keeps_it_on_average(alpha):
    w0, w1 = pair_of(400, 400, generator())
    nearest, kept = extrapolated(w1, w0, alpha=alpha)
    update = oracle.decompose(w1, w0, 6).update(alpha)
    true = float(((nearest.double() - w1.double()) * update).sum() / update.square().sum())
    assert kept.retention == pytest.approx(true, abs=2e-3)
    assert kept.retention < 0.97
    _, stochastic = extrapolated(w1, w0, alpha=alpha, key=key_of(0, "w"))
    assert stochastic.retention == pytest.approx(1.0, abs=0.02)


def test_the_flip_law_predicts_the_share_that_differs():
    """Stop early on purpose: the predicted share is then large enough to be counted."""
    for seed in range(4):
        w0, w1 = pair_of(512, 512, generator(seed), spectrum=bulk_and_spikes(512, 512, 0.9))
        out, facts = extrapolated(w1, w0, tolerance=5e-3)
        true = 1 - oracle.agreement("w", w1, w0, out, 6, 1.25).share
        assert facts.predicted_share <= 5e-3
        assert facts.predicted_share == pytest.approx(true, abs=2e-3)


def test_a_tolerance_that_no_float32_program_reaches_is_reported():
    for shape, options in (((100, 90), {}), ((230, 220), {}), ((100, 90), {"svd": "exact"})):
        w0, w1 = pair_of(*shape, generator())
        _, facts = extrapolated(w1, w0, tolerance=1e-9, **options)
        assert facts.predicted_share > 1e-9
        assert not facts.converged


@pytest.mark.parametrize("kind", [Delta, KeptDelta])
@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (3, 40_000)])
def test_an_operator_multiplies_by_the_difference_and_knows_its_norm(kind, shape):
    w0, w1 = pair_of(*shape, generator())
    op = kind(w1, w0, in_order)
    delta = w1.double() - w0.double()
    delta = delta.T if op.turned else delta
    assert op.turned == (kind is KeptDelta and shape[0] < shape[1])
    assert op.shape == tuple(delta.shape)
    y, x = torch.randn(op.shape[0], 3), torch.randn(op.shape[1], 3)
    close = {"rtol": 1e-4, "atol": 1e-5 * float(delta.norm())}
    assert torch.allclose(op.rmatmul(y).double(), delta.T @ y.double(), **close)
    assert torch.allclose(op.matmul(x).double(), delta @ x.double(), **close)
    image, back = op.normal(x)
    assert torch.allclose(image.double(), delta @ x.double(), **close)
    assert torch.allclose(back.double(), delta.T @ image.double(), **close)
    assert op.squared_norm() == pytest.approx(float(delta.square().sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(96, 80), (51, 333), (7, 13), (224, 208), (208, 224), (1100, 1000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_have_the_bits_that_they_have_alone(shape, dtype):
    """Beside others, one that is identical in both models, and one with a NaN, which does not hurt them."""
    pairs = [pair_of(*shape, generator(i), dtype=dtype) for i in range(5)]
    pairs[1] = (pairs[1][0], pairs[1][0].clone())
    pairs[3][1][2, 3] = math.nan
    outs = [torch.full_like(w1, math.nan).view(-1) for _, w1 in pairs]

    def emit(first, tile, out):
        out[first : first + tile.numel()] = tile.reshape(-1)

    matrices = [
        Matrix(w1, w0, Setting(Options(), 6, seed), (Outlet(1.25, functools.partial(emit, out=out)),))
        for seed, ((w0, w1), out) in enumerate(zip(pairs, outs, strict=True))
    ]
    outcomes = [outcome for (outcome,) in extrapolate_matrices(matrices, in_order)]
    assert outcomes[1].method == "zero"
    assert isinstance(outcomes[3], NotFinite)
    assert "aligned has nan at [2, 3]" in str(outcomes[3])
    for seed in (0, 2, 4):
        w0, w1 = pairs[seed]
        alone, facts = extrapolated(w1, w0, seed=seed)
        assert torch.equal(outs[seed].view(shape), alone)
        assert facts == outcomes[seed]


def test_rank_one_and_low_rank_deltas():
    w0 = torch.randn(80, 70, generator=generator()) * 0.02
    w1 = w0 + 1e-3 * matrix(80, 70, torch.tensor([1.0]), generator(3))
    out, facts = extrapolated(w1.double(), w0.double(), rank=6)
    update = 1.25 * (w1.double() - w0.double())
    assert (out - w1.double() - update).norm() <= 1e-4 * update.norm()
    assert facts.unique


@pytest.mark.parametrize("kept", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_holds_for_pruned_weights(kept, dtype):
    """A zero weight's grid is that of the update, however coarse the others' is."""
    mask = torch.rand(400, 400, generator=generator(3)) < kept
    w0 = 0.02 * torch.randn(400, 400, generator=generator(4)) * mask
    low = torch.randn(400, 4, generator=generator(5)) @ torch.randn(4, 400, generator=generator(6))
    w1 = (w0 + 3e-4 * mask * (low + torch.randn(400, 400, generator=generator(7)))).to(dtype)
    w0 = w0.to(dtype)
    out, facts = extrapolated(w1, w0)
    true = 1 - oracle.agreement("w", w1, w0, out, 6, 1.25).share
    assert true / 3 <= facts.predicted_share <= 8 * true + 2e-4


@pytest.mark.parametrize("size", [1e-42, 1e-39, 1e-36])
def test_a_difference_among_subnormals_is_extrapolated(size):
    w1 = torch.randn(120, 100, generator=generator()) * 0.02
    w0 = w1.clone()
    w0[3, 5], w1[3, 5] = 0.0, size
    out, facts = extrapolated(w1, w0)
    assert facts.singular_values[0] == pytest.approx(float(w1[3, 5]), rel=1e-5)
    assert out[3, 5].item() == pytest.approx(2.25 * float(w1[3, 5]), rel=1e-3)


@pytest.mark.parametrize("size", [1e-200, 1e-170, 1e150])
@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_float64_reaches_as_far_as_it_does(size, svd):
    w0, w1 = pair_of(60, 50, generator(), dtype=torch.float64)
    w1_before = w1 * size
    out, facts = extrapolated(w1_before, w0 * size, svd=svd)
    assert torch.equal(w1_before, w1 * size), "the inputs are never touched"
    plain, _ = extrapolated(w1, w0, svd=svd)
    assert torch.allclose(out / size, plain, rtol=1e-5, atol=1e-9)
    assert 0 < facts.energy <= 1


def test_identical_weights_may_hold_nan():
    w = torch.randn(30, 20)
    w[3, 4] = math.nan
    assert extrapolated(w, w.clone())[1].method == "zero"


def test_the_callers_default_dtype_does_not_matter():
    w0, w1 = pair_of(90, 80, generator())
    expected, _ = extrapolated(w1, w0)
    torch.set_default_dtype(torch.float64)
    try:
        found, _ = extrapolated(w1, w0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(300, 250), (250, 300), (1200, 1100)])
def test_a_solve_sees_a_stop_at_its_next_product(shape):
    w0, w1 = pair_of(*shape, generator(), dtype=torch.bfloat16, spectrum=power_law(min(shape)))
    loops = []

    def run(task, count):
        loops.append(count)
        if len(loops) == 5:
            raise Cancelled("stopped on request")
        in_order(task, count)

    setting = Setting(Options(), rank=6, seed=1)
    outlet = Outlet(1.25, lambda first, tile: pytest.fail("emitted"))
    matrices = [Matrix(w1, w0, setting, (outlet,)) for _ in range(3)]
    with pytest.raises(Cancelled):
        extrapolate_matrices(matrices, run)
    assert len(loops) == 5


def test_where_float32_itself_misses_the_tolerance_the_run_says_so():
    """float16, an update as large as the weights, a gap of two percent: LAPACK's float32 misses it as well."""
    spectrum = bulk_and_spikes(240, 200, 0.98)
    w0 = 0.02 * torch.randn(240, 200, generator=generator())
    delta = matrix(240, 200, spectrum, generator(1))
    w0, w1 = w0.half(), (w0 + delta * (w0.norm() / delta.norm())).half()
    out, facts = extrapolated(w1, w0)
    u, s, vh = torch.linalg.svd(w1.float() - w0.float(), full_matrices=False)
    lapack = (w1.float() + 1.25 * (u[:, :6] * s[:6]) @ vh[:6]).half()
    assert not facts.converged
    assert oracle.agreement("w", w1, w0, lapack, 6, 1.25).share < 1 - Options().tolerance
    assert oracle.agreement("w", w1, w0, out, 6, 1.25).share >= oracle.agreement("w", w1, w0, lapack, 6, 1.25).share


def test_a_short_side_goes_by_float32_where_that_is_enough_and_else_by_float64():
    w0, w1 = pair_of(200, 150, generator())
    out, facts = extrapolated(w1, w0)
    assert facts.method == "gram"
    assert 1e-8 < facts.predicted_error < 1e-3
    assert oracle.agreement("w", w1, w0, out, 6, 1.25).share >= 0.9995
    w0 = 0.02 * torch.randn(200, 150, generator=generator())
    delta = matrix(200, 150, bulk_and_spikes(200, 150, 0.98), generator(1))
    w0, w1 = w0.half(), (w0 + delta * (w0.norm() / delta.norm())).half()
    out, facts = extrapolated(w1, w0)
    assert facts.method == "gram"
    assert facts.predicted_error < 1e-10
    assert facts.converged
    assert oracle.agreement("w", w1, w0, out, 6, 1.25).share >= 0.9995
