"""The solver against LAPACK in float64, over spectra whose answer is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dense import Dense, OnePass

from lox_stream.bases import orthonormal
from lox_stream.convergence import NO_GAP, RATE_KEPT, SLOWEST, Pace
from lox_stream.costs import basis_columns, block_width
from lox_stream.krylov import Space
from lox_stream.svd import relative, truncated_svd, truncated_svds
from lox_stream.synthetic import matrix, power_law

EPS = torch.finfo(torch.float32).eps
RANK = 6
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", [Dense, OnePass])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_and_spikes(size, ratio):
    bulk = torch.linalg.svdvals(torch.randn(size, size, generator=generator(1), dtype=torch.float64))
    return torch.cat([torch.linspace(2, 1, RANK), bulk[: size - RANK] / bulk[0] * ratio]).float()


def spectra(size):
    i = torch.arange(1, size + 1, dtype=torch.float32)
    step = torch.full((size,), 0.1)
    step[:RANK] = 1.0
    return {
        "power 0.55": i**-0.55,
        "power 0.55, s7/s6 0.95": power_law(size),
        "power 1": i**-1.0,
        "power 2": i**-2.0,
        "exponential": torch.exp(-i / 10),
        "step": step,
        "noise 0.5": noise_and_spikes(size, 0.5),
        "noise 0.9": noise_and_spikes(size, 0.9),
        "noise 0.97": noise_and_spikes(size, 0.97),
        "clusters": torch.cat([torch.tensor([2.0, 2, 2, 1, 1, 1]), torch.full((size - 6,), 0.5)]),
    }


SPECTRA = spectra(320)


def planted(name, m=320, n=320):
    return matrix(m, n, spectra(min(m, n))[name], generator(2)).double()


def rank_part(a, rank=RANK):
    u, s, vh = torch.linalg.svd(a.float().double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], s


def product(found):
    return (found.u.double() * found.s.double()) @ found.vh.double()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("tolerance", [1e-2, 3e-3, 1e-3, 3e-4, 1e-5])
@KINDS
def test_the_predicted_error_is_the_true_one_within_a_factor_of_three(name, tolerance, kind):
    """Fast decay may be overestimated more: there the next product settles it anyway."""
    a = planted(name)
    found = truncated_svd(kind(a), RANK, generator=generator(), enough=relative(tolerance))
    part, _ = rank_part(a)
    true = float(torch.linalg.norm(product(found) - part))
    assert found.converged
    assert true <= 3 * tolerance * float(torch.linalg.norm(part))
    assert found.error >= true / 3
    if found.passes > 7:
        assert found.error <= max(10 * true, 8 * EPS * float(torch.linalg.norm(part)))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(320, 320), (320, 96), (96, 320), (30, 320)])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
@KINDS
def test_residual_and_intervals_hold(name, shape, tolerance, kind):
    a = planted(name, *shape).float().double()
    found = truncated_svd(kind(a), RANK, generator=generator(), enough=relative(tolerance))
    u, v, s = found.u.double(), found.vh.double().T, found.s.double()
    residuals = torch.maximum(
        torch.linalg.vector_norm(a @ v - u * s, dim=0), torch.linalg.vector_norm(a.T @ u - v * s, dim=0)
    )
    assert float(residuals.max() / s[0]) <= found.residual
    true = torch.linalg.svdvals(a)
    for value, radius in zip(s, found.radius, strict=True):
        assert float((true - value).abs().min()) <= radius


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@KINDS
def test_factors_are_orthonormal_and_values_descend(name, tolerance, kind):
    found = truncated_svd(kind(planted(name)), RANK, generator=generator(), enough=relative(tolerance))
    eye = torch.eye(RANK, dtype=torch.float64)
    assert torch.allclose(found.u.double().T @ found.u.double(), eye, atol=20 * EPS, rtol=0)
    assert torch.allclose(found.vh.double() @ found.vh.double().T, eye, atol=20 * EPS, rtol=0)
    assert (found.s[:-1] >= found.s[1:] * (1 - 4 * EPS)).all()


@pytest.mark.parametrize("name", SPECTRA)
def test_the_gap_is_the_true_gap(name):
    a = planted(name)
    found = truncated_svd(Dense(a), RANK, generator=generator())
    _, s = rank_part(a)
    assert found.gap == pytest.approx(float((s[5] - s[6]) / s[5]), abs=0.01)


@KINDS
def test_passes_are_counted_and_there_are_at_least_three_looks(kind):
    op = kind(planted("power 0.55"))
    found = truncated_svd(op, RANK, generator=generator(), enough=lambda error, part: True)
    assert found.passes == op.passes == (10 if kind is Dense else 6)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(320, 320), (96, 320), (131, 77)])
@KINDS
def test_a_matrix_has_the_bits_that_it_has_alone(name, shape, kind):
    """Its companions leave earlier and later, and one of them is of low rank."""
    others = [planted(other, *shape) for other in ("power 2", "noise 0.97")]
    flat = matrix(*shape, torch.linspace(2, 1, 3), generator(4)).double()
    given = [others[0], planted(name, *shape), flat, others[1], torch.zeros(*shape)]
    enough = [relative(1e-4)] * len(given)
    together = truncated_svds(
        [kind(a) for a in given], RANK, generators=[generator(i) for i in range(5)], enough=enough
    )
    for i, found in enumerate(together):
        alone = truncated_svd(kind(given[i]), RANK, generator=generator(i), enough=relative(1e-4))
        assert torch.equal(found.u, alone.u)
        assert torch.equal(found.s, alone.s)
        assert torch.equal(found.vh, alone.vh)
        assert (found.error, found.radius, found.passes) == (alone.error, alone.radius, alone.passes)


def test_one_pass_for_two_products_gives_the_same_part():
    a = planted("power 0.55")
    one, two = (truncated_svd(kind(a), RANK, generator=generator()) for kind in (OnePass, Dense))
    assert one.passes < 0.6 * two.passes
    assert float(torch.linalg.norm(product(one) - product(two))) <= 3e-5 * float(torch.linalg.norm(product(two)))


def test_an_ill_conditioned_block_is_not_multiplied_as_it_is():
    """Its images span eight decades: A'A at once would drown the small ones, so the second product is taken apart."""
    a = matrix(300, 200, torch.logspace(0, -8, 200), generator(9)).double()
    op = OnePass(a)
    found = truncated_svd(op, RANK, generator=generator())
    part, _ = rank_part(a)
    assert found.passes == op.passes
    assert float(torch.linalg.norm(product(found) - part)) <= 2e-5 * float(torch.linalg.norm(part))


@KINDS
def test_it_ends_at_whole_and_at_half_steps(kind):
    """A v = s u after a product with A, and A'u = s v after one with A'."""
    a = planted("power 0.55").float().double()
    ends = set()
    for tolerance in (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4):
        found = truncated_svd(kind(a), RANK, generator=generator(), enough=relative(tolerance))
        u, v, s = found.u.double(), found.vh.double().T, found.s.double()
        right, left = float(torch.linalg.norm(a @ v - u * s)), float(torch.linalg.norm(a.T @ u - v * s))
        assert min(left, right) <= 8 * EPS * float(s.norm())
        ends.add("half" if left < right else "whole")
    assert ends == {"half", "whole"}


def test_easy_matrices_stop_early_and_hard_ones_go_on():
    passes = {
        name: truncated_svd(Dense(planted(name)), RANK, generator=generator(), enough=relative(1e-4)).passes
        for name in ("power 2", "power 0.55", "noise 0.97")
    }
    assert passes["power 2"] < passes["power 0.55"] < passes["noise 0.97"]


def test_the_same_generator_gives_the_same_bits():
    a = planted("power 0.55")
    first, second = (truncated_svd(Dense(a), RANK, generator=generator(7)) for _ in range(2))
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.vh, second.vh)


@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [
        (1, 50, 1),
        (50, 1, 1),
        (1, 1, 1),
        (2, 2, 1),
        (7, 300, 6),
        (300, 7, 6),
        (17, 17, 16),
        (5000, 64, 6),
        (64, 5000, 6),
    ],
)
def test_oblong_and_tiny_matrices(m, n, rank):
    a = torch.randn(m, n, generator=generator(3), dtype=torch.float64).float().double()
    found = truncated_svd(Dense(a), rank, generator=generator())
    part, _ = rank_part(a, rank)
    assert found.converged
    assert float(torch.linalg.norm(product(found) - part)) <= 2e-5 * float(torch.linalg.norm(part))


@pytest.mark.parametrize("seed", range(60))
def test_rounding_never_passes_for_a_dimension_more(seed):
    """Bases that fill their space: what is left of the last blocks is rounding noise."""
    for m, n in ((20, 20), (17, 23), (23, 17)):
        a = torch.randn(m, n, generator=generator(seed), dtype=torch.float64).float().double()
        found = truncated_svd(Dense(a), RANK, generator=generator(seed))
        part, _ = rank_part(a)
        assert float(torch.linalg.norm(product(found) - part)) <= 2e-5 * float(torch.linalg.norm(part))


def test_a_row_that_two_projections_leave_little_of_is_no_direction():
    """Else rounding, made as long as a row, brings old ones back: they would be in the basis twice."""
    old = torch.linalg.qr(torch.randn(100, 20, generator=generator()))[0].T.contiguous()[None]
    old[0, 1] += 1e-5 * old[0, 0]  # so a projection leaves that much
    rows, found = orthonormal(torch.randn(1, 8, 20, generator=generator()) @ old, old, [1.0], [80])
    assert found == [0]
    assert not rows.any()


@pytest.mark.parametrize("true_rank", [1, 3, 5])
def test_rank_below_k_is_found_exactly(true_rank):
    a = matrix(200, 150, torch.linspace(2, 1, true_rank), generator(4)).double()
    found = truncated_svd(Dense(a), RANK, generator=generator())
    assert found.converged
    assert found.unique
    assert float(torch.linalg.norm(product(found) - a)) <= 1e-5 * float(torch.linalg.norm(a))
    assert (found.s[true_rank:] <= 1e-5 * found.s[0]).all()


def test_exact_rank_k_is_the_whole_matrix():
    a = matrix(200, 150, torch.linspace(2, 1, RANK), generator(4)).double()
    found = truncated_svd(Dense(a), RANK, generator=generator())
    assert float(torch.linalg.norm(product(found) - a)) <= 1e-5 * float(torch.linalg.norm(a))
    assert found.unique


def test_zero_has_no_triplets():
    found = truncated_svd(Dense(torch.zeros(40, 30)), RANK, generator=generator())
    assert found.s.numel() == 0
    assert found.u.shape == (40, 0)
    assert found.vh.shape == (0, 30)
    assert found.converged
    assert found.residual == 0.0


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.ones(200),
        torch.cat([torch.linspace(3, 2, 4), torch.ones(196)]),
        torch.ones(200).index_fill(0, torch.arange(5), 2.0),
    ],
    ids=["flat", "ties from the fifth", "ties from the sixth"],
)
def test_without_a_gap_the_result_is_as_good_as_the_best_and_says_so(spectrum):
    a = matrix(200, 200, spectrum, generator(5)).double().float().double()
    found = truncated_svd(Dense(a), RANK, generator=generator())
    part, _ = rank_part(a)
    assert found.converged
    assert not found.unique
    assert found.gap <= NO_GAP
    assert float(torch.linalg.norm(a - product(found))) <= (1 + 1e-4) * float(torch.linalg.norm(a - part))


def test_a_pair_of_equal_values_at_the_border_is_not_unique():
    spectrum = torch.arange(1, 201, dtype=torch.float32) ** -0.7
    spectrum[6] = spectrum[5]
    a = matrix(200, 200, spectrum, generator(6)).double()
    found = truncated_svd(Dense(a), RANK, generator=generator())
    part, _ = rank_part(a)
    assert not found.unique
    assert float(torch.linalg.norm(a - product(found))) <= (1 + 1e-4) * float(torch.linalg.norm(a - part))


@KINDS
def test_a_full_basis_begins_anew(kind, monkeypatch):
    """As often as it takes, with no more columns than were promised, and ends at the very part."""
    append, sizes, held = Space.append, [], []

    def appended(self, runs, *given):
        append(self, runs, *given)
        sizes.append(self.size)
        held.append((runs[0].trace, float(self.image[0, : self.size].double().square().sum())))

    monkeypatch.setattr(Space, "append", appended)
    a = matrix(640, 320, noise_and_spikes(320, 0.99), generator(2)).double()
    found = truncated_svd(kind(a), RANK, generator=generator())
    part, _ = rank_part(a)
    assert found.converged
    assert max(sizes) == basis_columns(640, 320, RANK) == 64
    assert sum(later < earlier for earlier, later in itertools.pairwise(sizes)) >= 2
    for told, true in held:  # else what the space does not hold of the matrix would be bounded by too little
        assert told == pytest.approx(true, rel=1e-6)
    assert float(torch.linalg.norm(product(found) - part)) <= 2e-5 * float(torch.linalg.norm(part))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_step_after_a_double_one_takes_it_apart(rate):
    pace = Pace()
    for i in range(4):
        pace.add(rate**i)
    pace.begin_anew()
    pace.add(math.hypot(rate**4, rate**5))
    assert pace.rate == pytest.approx(min(rate, RATE_KEPT))
    pace.add(rate**6)
    assert pace.rate == pytest.approx(rate)
    assert pace.steps[-2] == pytest.approx(rate**5)


@pytest.mark.parametrize("step", [0.0, 1.0, 2.0])
def test_steps_that_do_not_get_shorter_are_no_reason_to_stop(step):
    pace = Pace()
    pace.add(1.0)
    pace.begin_anew()
    pace.add(1.0)
    pace.add(step)
    assert pace.rate == SLOWEST


def test_out_of_blocks_is_reported_and_the_best_is_returned():
    a = planted("noise 0.97")
    found = truncated_svd(Dense(a), RANK, generator=generator(), max_blocks=3)
    assert not found.converged
    assert found.passes == 8  # one, two for the first block, and five for three blocks
    assert found.error > 1e-5 * math.sqrt(float(found.s.square().sum()))


@pytest.mark.parametrize(
    ("m", "n", "rank"), [(4096, 4096, 6), (10, 4096, 6), (4096, 4096, 64), (1, 1, 1), (700, 500, 300)]
)
def test_the_basis_has_room_for_three_blocks(m, n, rank):
    width = block_width(m, n, rank)
    assert width >= rank, "or equal values could be missed"
    assert width % 8 == 0
    assert 3 * width <= basis_columns(m, n, rank) <= 8 * width


@pytest.mark.parametrize("gap", [3e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("size", [64, 200])
def test_a_small_gap_shows_in_the_error_that_is_left(gap, size):
    """Rounding turns the k-th direction the more the nearer the next value is; more products would not help."""
    spectrum = torch.linspace(2, 0.1, size).double()
    spectrum[:RANK] = torch.linspace(3, 2.5, RANK).double()
    spectrum[RANK] = spectrum[RANK - 1] * (1 - gap)
    a = matrix(size, size, spectrum.float(), generator(8)).double()
    found = truncated_svd(Dense(a), RANK, generator=generator())
    part, _ = rank_part(a)
    assert found.error >= float(torch.linalg.norm(product(found) - part)) / 3


@pytest.mark.parametrize("rank", [0, -1, 31])
def test_a_rank_that_means_nothing_is_refused(rank):
    with pytest.raises(ValueError, match="rank is"):
        truncated_svd(Dense(torch.ones(30, 40)), rank, generator=generator())


def test_no_blocks_at_all_are_refused():
    with pytest.raises(ValueError, match="max_blocks is 0"):
        truncated_svd(Dense(torch.ones(30, 40)), RANK, generator=generator(), max_blocks=0)
