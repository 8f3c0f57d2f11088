"""The bounds that docs/accuracy.md calls rigorous, against float64, over spectra, shapes, ranks and tolerances.

None is excluded: where an inequality fails for one drawn matrix, the test fails.
"""

from __future__ import annotations

import math

import pytest
import torch
from dense import Dense, OnePass
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_stream.costs import block_width
from lox_stream.errors import DataError
from lox_stream.svd import relative, truncated_svd
from lox_stream.synthetic import matrix

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = torch.finfo(torch.float32).eps


def hilbert(n):
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


def kahan(n, theta=1.2):
    scale = math.sin(theta) ** torch.arange(n, dtype=torch.float64)
    return scale[:, None] * (torch.eye(n, dtype=torch.float64) - math.cos(theta) * torch.ones(n, n).double().triu(1))


def graded(n, least=1e-12):
    """Rows and columns that fall together."""
    scale = torch.logspace(0, math.log10(least), n, dtype=torch.float64)
    return scale[:, None] * torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


def duplicated_rows(n):
    few = torch.randn(4, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return few[torch.arange(n) % 4]


def few_rows(n):
    """A difference that lies in three rows, as of tokens that were added."""
    a = torch.zeros(n, n, dtype=torch.float64)
    a[[1, 7, 11]] = torch.randn(3, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return a


ADVERSARIES = {
    "Hilbert": hilbert(120),
    "Kahan": kahan(120),
    "graded": graded(120),
    "duplicated rows": duplicated_rows(120),
    "few rows": few_rows(120),
    "one entry": torch.eye(120, dtype=torch.float64)[:, :1] @ torch.eye(120, dtype=torch.float64)[5:6],
    "triangle of ones": torch.ones(120, 120, dtype=torch.float64).tril(),
}


def spectra():
    """Singular values of some kind, `count` of them."""
    laws = {
        "power": lambda i, x: i**-x,
        "exponential": lambda i, x: torch.exp(-i * x / 4),
        "flat": lambda i, x: torch.ones_like(i),
        "all but flat": lambda i, x: 1 + 1e-5 * torch.sin(i * x),
        "step": lambda i, x: torch.where(i <= 4 * x, 1.0, 0.05),
        "plateaus": lambda i, x: 2.0 ** -torch.floor(i / (2 + 4 * x)),
        "low rank": lambda i, x: torch.where(i <= 1 + 6 * x, 1 / i, 0.0),
    }
    return st.tuples(st.sampled_from(sorted(laws)), st.floats(0.1, 2.0)).map(
        lambda drawn: lambda count: laws[drawn[0]](torch.arange(1, count + 1, dtype=torch.float32), drawn[1])
    )


def check(a, found, rank):
    """Every rigorous inequality, with what float32 products round added: four units of s_1, as the docs say."""
    a = a.double()
    true = torch.linalg.svdvals(a)
    s, u, v = found.s.double(), found.u.double(), found.vh.double().T
    unit = EPS * float(true[0])
    assert len(s) <= rank
    if not len(s):
        assert float(true[0]) == 0.0
        return
    for value, radius in zip(s, found.radius, strict=True):
        assert float((true - value).abs().min()) <= radius
    assert (s <= true[: len(s)] + 4 * unit + 2.0**-149).all(), "no value is above the true one"
    residuals = torch.maximum(
        torch.linalg.vector_norm(a @ v - u * s, dim=0), torch.linalg.vector_norm(a.T @ u - v * s, dim=0)
    )
    assert float(residuals.max()) <= found.residual * float(s[0]) * (1 + 8 * EPS) + 1e-300
    assert found.squared_norm == pytest.approx(float(a.square().sum()), rel=16 * EPS)
    rest = found.squared_norm - float(s.square().sum())
    after = float(true[len(s)]) if len(s) < len(true) else 0.0
    assert after <= math.sqrt(max(rest, 0.0)) + 8 * math.sqrt(EPS) * float(true[0])
    eye = torch.eye(len(s), dtype=torch.float64)
    apart = 20 * EPS * float(s[0] / s.min())  # one side is the other's product over s, with that product's rounding
    assert float((u.T @ u - eye).abs().max()) <= apart
    assert float((v.T @ v - eye).abs().max()) <= apart


def drawn(least, most, rank):
    """Strategies for matrices with sides from `least` to `most`, and what is asked of them."""
    return {
        "spectrum": spectra(),
        "m": st.integers(least, most),
        "n": st.integers(least, most),
        "rank": st.integers(1, rank),
        "tolerance": st.sampled_from([1e-1, 1e-2, 1e-3, 1e-5]),
        "kind": st.sampled_from([Dense, OnePass]),
        "seed": st.integers(0, 1 << 20),
    }


@settings(max_examples=300, deadline=None)
@given(**drawn(1, 90, 12), size=st.sampled_from([1.0, 1.0, 1.0, 1e-40, 1e-30, 1e30]))
def test_what_is_called_rigorous_holds(spectrum, m, n, rank, tolerance, kind, size, seed):
    generator = torch.Generator().manual_seed(seed)
    a = matrix(m, n, spectrum(min(m, n)), generator) * size
    rank = min(rank, m, n)
    found = truncated_svd(kind(a), rank, generator=generator, enough=relative(tolerance))
    check(a, found, rank)


@pytest.mark.torture
@settings(max_examples=4000, deadline=None)
@given(**drawn(70, 240, 20))
def test_it_holds_in_thousands_of_larger_cases(spectrum, m, n, rank, tolerance, kind, seed):
    """Most have more columns than a basis (64 to 192, by rank), which may begin anew then."""
    generator = torch.Generator().manual_seed(seed)
    a = matrix(m, n, spectrum(min(m, n)), generator)
    check(a, truncated_svd(kind(a), rank, generator=generator, enough=relative(tolerance)), rank)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-22, 1e22, 1e30])
@pytest.mark.parametrize("kind", [Dense, OnePass])
@pytest.mark.parametrize("rank", [6, 200])
def test_the_size_of_the_entries_does_not_matter(size, kind, rank):
    """1e-40 is below float32's normal numbers: what is left of their digits is enough for these."""
    a = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * size
    found = truncated_svd(kind(a), rank, generator=torch.Generator().manual_seed(1))
    check(a, found, rank)
    assert found.converged
    assert len(found.s) == rank
    assert torch.allclose(found.s.double(), torch.linalg.svdvals(a.double())[:rank], rtol=1e-4, atol=2.0**-149)


def test_a_precision_asked_for_is_in_the_units_of_the_matrix():
    a = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 1e-12
    asked = []

    def enough(error, part):
        asked.append(part)
        return error <= 1e-5 * part

    found = truncated_svd(OnePass(a), 6, generator=torch.Generator().manual_seed(1), enough=enough)
    assert found.converged
    assert asked[-1] == pytest.approx(float(found.s.norm()), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("kind", [Dense, OnePass])
def test_what_float32_cannot_hold_is_refused(bad, kind):
    a = torch.ones(30, 20)
    a[3:9, 4:9] = bad
    with pytest.raises(DataError, match=r"\(30, 20\).*not finite"):
        truncated_svd(kind(a), 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("kind", [Dense, OnePass])
def test_adversaries(name, rank, kind):
    """Also as good as the best part of that rank, whether or not there is one best."""
    a = ADVERSARIES[name].float()
    found = truncated_svd(kind(a), rank, generator=torch.Generator().manual_seed(0))
    check(a, found, rank)
    assert found.converged
    left = a.double() - (found.u.double() * found.s.double()) @ found.vh.double()
    true = torch.linalg.svdvals(a.double())
    best = float(torch.linalg.vector_norm(true[rank:]))
    assert float(left.norm()) <= (1 + 1e-4) * best + 4e-6 * float(true[0])


@pytest.mark.parametrize("kind", [Dense, OnePass])
def test_a_leading_direction_that_the_start_block_misses_is_found_all_the_same(kind):
    """The one random block, made orthogonal to the leading left direction: rounding brings it in, and it grows."""
    rows = torch.randn(block_width(200, 200, 6), 200, generator=torch.Generator().manual_seed(3))
    u = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(4)).double())[0]
    lead = u[:, 0].float()
    missing = torch.linalg.qr(torch.cat([rows.double().T, lead.double()[:, None]], 1))[0][:, -1]
    v = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(5)).double())[0]
    s = torch.arange(1, 201).double() ** -0.55
    left = torch.linalg.qr(torch.cat([missing[:, None], u[:, 1:]], 1))[0]
    a = ((left * s) @ v.T).float()
    found = truncated_svd(kind(a), 6, generator=torch.Generator().manual_seed(3))
    assert float(found.s[0]) == pytest.approx(1.0, rel=1e-3)
    check(a, found, 6)


def kinds(m, n):
    """Spectra of differences: power laws, six spikes over noise by the ratio of the seventh to the sixth, and noise."""
    noise = torch.linalg.svdvals(torch.randn(m, n, generator=torch.Generator().manual_seed(m)))
    laws = {f"power {x}": torch.arange(1, min(m, n) + 1, dtype=torch.float32) ** -x for x in (0.3, 0.55)}
    for ratio in (0.8, 0.9, 0.95, 0.97, 0.99):
        laws[f"spikes {ratio}"] = torch.cat([torch.linspace(3, 1, 6), noise[:-6] / noise[0] * ratio])
    return {**laws, "noise": noise}


def test_the_estimated_error_is_within_its_stated_factor_in_the_stated_share_of_cases():
    """Always a third of the truth at least; in 95 of 100 cases between a half and two and a half times the truth."""
    ratios = []
    for seed in range(2):
        for m, n in ((320, 320), (640, 320), (512, 1024)):
            for s in kinds(m, n).values():
                a = matrix(m, n, s, torch.Generator().manual_seed(seed))
                u, s_true, vh = torch.linalg.svd(a.double(), full_matrices=False)
                part = (u[:, :6] * s_true[:6]) @ vh[:6]
                for tolerance in (3e-3, 1e-3, 1e-4, 1e-5):
                    generator = torch.Generator().manual_seed(seed)
                    found = truncated_svd(OnePass(a), 6, generator=generator, enough=relative(tolerance))
                    assert found.converged
                    truth = (found.u.double() * found.s.double()) @ found.vh.double() - part
                    ratios.append(found.error / float(truth.norm()))
    assert len(ratios) == 192
    assert min(ratios) > 1 / 3
    assert sum(0.5 < ratio < 2.5 for ratio in ratios) >= 0.95 * len(ratios)
