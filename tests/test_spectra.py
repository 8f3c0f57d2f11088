"""What singular values say: closed forms, bounds that hold for every spectrum, and noise that is told as such."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lox_stream import spectra
from lox_stream.spectra import Spectrum, bulk_of, entropy_rank

VALUES = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=40)


def spectrum(values, shape=None, known=None):
    """Of a matrix with these singular values, of which the first `known` were looked at."""
    s = sorted(values, reverse=True)
    m, n = shape or (len(s), len(s))
    norm = math.sqrt(math.fsum(value * value for value in s))
    return Spectrum(m, n, tuple(s[:known]), norm, known is None or known == len(s))


def of_matrix(a, known=None):
    return spectrum(torch.linalg.svdvals(a.double()).tolist(), tuple(a.shape), known)


def test_the_examples_hold():
    assert doctest.testmod(spectra).failed == 0


@given(VALUES)
def test_energy_grows_to_one_and_ranks_lie_between_one_and_all(values):
    found = spectrum(values)
    assert list(found.curve) == sorted(found.curve)
    assert found.curve[-1] == pytest.approx(1.0)
    assert all(found.energy(k + 1) == pytest.approx(share, rel=1e-9) for k, share in enumerate(found.curve))
    assert 1 - 1e-9 <= found.stable_rank <= len(values) * (1 + 1e-9)
    least, most = entropy_rank(found)
    assert least == most
    assert (
        found.stable_rank * (1 - 1e-9) <= most <= len(values) * (1 + 1e-9)
    )  # the energies' entropy is over min-entropy


@given(VALUES, st.data())
def test_the_interval_of_the_entropy_rank_holds_what_the_whole_spectrum_gives(values, data):
    known = data.draw(st.integers(1, len(values)))
    least, most = entropy_rank(spectrum(values, known=known))
    exact, _ = entropy_rank(spectrum(values))
    assert least * (1 - 1e-6) <= exact <= most * (1 + 1e-6)


@given(VALUES, st.integers(-20, 20))
def test_nothing_but_the_sizes_depends_on_the_scale(values, exponent):
    found, other = spectrum(values), spectrum([value * 2.0**exponent for value in values])
    assert other.curve == pytest.approx(found.curve)
    assert other.gaps == pytest.approx(found.gaps)
    assert entropy_rank(other) == pytest.approx(entropy_rank(found))
    assert bulk_of(other).outliers == bulk_of(found).outliers


@pytest.mark.parametrize("shape", [(60, 60), (300, 100), (80, 500)])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_stands_out_of_noise_and_its_deviation_is_found(shape, seed):
    noise = 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    for known in (8, None):
        found = bulk_of(of_matrix(noise, known))
        assert found.outliers == 0
        assert found.sigma == pytest.approx(0.3, rel=0.03)
        assert found.edge > float(torch.linalg.matrix_norm(noise, 2))


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("shape", [(200, 200), (300, 100)])
def test_planted_directions_stand_out_and_are_counted(shape, count):
    generator = torch.Generator().manual_seed(count)
    u, v = (torch.linalg.qr(torch.randn(side, count, generator=generator))[0] for side in shape)
    size = 2 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    found = bulk_of(of_matrix(torch.randn(*shape, generator=generator) + size * u @ v.T, 32))
    assert found.outliers == count
    assert found.sigma == pytest.approx(1.0, rel=0.05)


def test_a_spectrum_that_is_all_known_leaves_no_noise():
    found = bulk_of(spectrum([3.0, 2.0, 1.0], (100, 100)))
    assert (found.outliers, found.sigma, found.edge) == (3, 0.0, 0.0)
