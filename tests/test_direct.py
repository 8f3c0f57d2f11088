"""LAPACK's two ways to the rank-k part, against the true one."""

from __future__ import annotations

import pytest
import torch

from lox_stream.costs import GRAM_SIDE, by_gram, exact_bytes, gram_bytes
from lox_stream.direct import exact_svd, gram_svd
from lox_stream.synthetic import matrix

EPS = torch.finfo(torch.float32).eps
WAYS = pytest.mark.parametrize("way", [exact_svd, gram_svd])


def planted(m, n, spectrum, seed=0):
    return matrix(m, n, spectrum(torch.arange(1, min(m, n) + 1.0)), torch.Generator().manual_seed(seed)).double()


SPECTRA = {
    "power": lambda i: i**-0.55,
    "fast": lambda i: torch.exp(-i),
    "flat": torch.ones_like,
    "low rank": lambda i: torch.where(i <= 3, 1 / i, 0.0),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(60, 300), (300, 60), (7, 5), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@WAYS
def test_the_rank_k_part_is_the_true_one_and_its_bounds_hold(way, spectrum, shape, size):
    delta = planted(*shape, SPECTRA[spectrum]) * size
    rank = min(6, *shape)
    found = way(delta.double(), rank)
    true = torch.linalg.svdvals(delta)
    count = len(found.s)
    assert torch.allclose(found.s, true[:count], rtol=1e-6, atol=1e-7 * float(true[0]))
    assert (true[count:rank] <= 8 * EPS * float(true[0])).all(), "what is left out is rounding"
    for value, radius in zip(found.s, found.radius, strict=True):
        assert float((true - value).abs().min()) <= radius + 1e-14 * float(true[0])
    left = delta - (found.u * found.s) @ found.vh
    assert float(left.norm()) <= float(torch.linalg.vector_norm(true[rank:])) * (1 + 1e-9) + 2e-6 * float(true[0])
    for factor in (found.u.T, found.vh):
        assert torch.allclose(factor @ factor.T, torch.eye(count, dtype=torch.float64), atol=1e-12)
    assert found.squared_norm == pytest.approx(float(delta.square().sum()))


@WAYS
def test_the_error_is_not_below_the_true_one_by_more_than_its_factor(way):
    """Against the same matrix in a rotated basis, whose rounding is another."""
    delta = planted(80, 400, SPECTRA["power"], 1)
    turn = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    one, other = way(delta.double(), 6), way(turn @ delta, 6)
    difference = (one.u * one.s) @ one.vh - turn.T @ ((other.u * other.s) @ other.vh)
    assert 0 < float(difference.norm()) <= 30 * one.error


@WAYS
def test_equal_values_at_the_border_are_not_unique(way):
    delta = torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0]))
    assert not way(delta.double(), 2).unique
    assert way(delta.double(), 3).unique


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(60, 300), (300, 60), (7, 5), (150, 1000)])
def test_in_float32_the_bounds_and_the_estimated_error_hold(spectrum, shape):
    a = planted(*shape, SPECTRA[spectrum]).float()
    rank = min(6, *shape)
    found = gram_svd(a, rank)
    u, true, vh = torch.linalg.svd(a.double(), full_matrices=False)
    for value, radius in zip(found.s, found.radius, strict=True):
        assert float((true - value).abs().min()) <= radius
    truth = (u[:, :rank] * true[:rank]) @ vh[:rank]
    error = float((((found.u * found.s) @ found.vh) - truth).norm())
    assert error <= found.error + 8 * EPS * float(true[0]) or not found.unique
    for factor in (found.u.T, found.vh):
        assert torch.allclose(factor @ factor.T, torch.eye(len(found.s), dtype=torch.float64), atol=1e-12)


def test_zero_has_no_triplets():
    found = gram_svd(torch.zeros(20, 30), 6)
    assert (found.u.shape, len(found.s), found.vh.shape, found.residual) == ((20, 0), 0, (0, 30), 0.0)


def test_only_what_is_small_on_its_short_side_goes_by_its_gram_matrix():
    assert by_gram(GRAM_SIDE, 4096)
    assert by_gram(4096, GRAM_SIDE)
    assert not by_gram(GRAM_SIDE + 1, 4096)
    assert not by_gram(GRAM_SIDE, 1 << 20), "its difference is not kept"
    assert gram_bytes(64, 4096, 6) < 2 * exact_bytes(64, 4096)
