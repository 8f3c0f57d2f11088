"""What singular values of a delta say: energy, effective ranks, gaps, and how many stand out of a bulk of noise."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

TRACY_WIDOM = 3.2724  # that one in a thousand matrices of noise exceeds (Tracy-Widom's law of real ones)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The leading singular values of a matrix (m, n) that is not zero, in falling order, and its norm."""

    m: int
    n: int
    values: tuple[float, ...]  # the first of them, or all that are not rounding
    norm: float  # |A|_F
    whole: bool  # no other value is more than rounding

    def energy(self, k: int) -> float:
        """Share of |A|_F^2 in the first k directions.

        >>> Spectrum(3, 2, (4.0, 3.0), 5.0, True).energy(1)
        0.64
        """
        return min(1.0, math.fsum(s * s for s in self.values[:k]) / self.norm**2)

    @property
    def curve(self) -> tuple[float, ...]:
        """`energy` of 1, 2, ... directions."""
        sums = itertools.accumulate((s / self.norm) ** 2 for s in self.values)
        return tuple(min(1.0, energy) for energy in sums)

    @property
    def gaps(self) -> tuple[float, ...]:
        """s_(k+1) / s_k after 1, 2, ... directions: near 1 where a cut at k is arbitrary."""
        return tuple(after / before for before, after in itertools.pairwise(self.values))

    @property
    def stable_rank(self) -> float:
        """|A|_F^2 / s_1^2: 1 for one direction, min(m, n) for equal ones.

        >>> Spectrum(2, 2, (1.0, 1.0), 2**0.5, True).stable_rank
        2.0
        """
        return round((self.norm / self.values[0]) ** 2, 12)


def entropy_rank(spectrum: Spectrum) -> tuple[float, float]:
    """exp(-sum p ln p) with p_i = s_i^2 / |A|_F^2: how many directions would share the energy evenly. Least and most.

    Equal where the spectrum is whole. Else the values that are not known have the rest of the energy, none more than
    the last that is known: the entropy is least where they are as unequal as that allows, most where they are equal.

    Source: Roy and Vetterli 2007, the effective rank, with squares of the values, whose sum is known.

    >>> entropy_rank(Spectrum(4, 4, (1.0, 1.0), 2**0.5, True))
    (2.0, 2.0)
    """
    shares = [(s / spectrum.norm) ** 2 for s in spectrum.values]
    known = math.fsum(map(_entropy, shares))
    rest, left = 1.0 - math.fsum(shares), min(spectrum.m, spectrum.n) - len(shares)
    if spectrum.whole or left == 0 or rest <= 0:
        return (round(math.exp(known), 9),) * 2
    most = left * _entropy(rest / left)
    full = min(int(rest / shares[-1]), left)
    least = full * _entropy(shares[-1]) + _entropy(max(rest - full * shares[-1], 0.0))
    return math.exp(known + least), math.exp(known + most)


def _entropy(share: float) -> float:
    return -share * math.log(share) if share > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Bulk:
    """Independent noise that would explain what is left when the directions that stand out are taken away."""

    outliers: int  # directions that stand out
    more: bool  # all that are known do, and there may be others
    edge: float  # singular value up to which such noise reaches
    sigma: float  # standard deviation of its entries


def bulk_of(spectrum: Spectrum) -> Bulk:
    """Fit of Marchenko and Pastur's law: directions are taken away while the next is beyond the edge of the rest.

    The edge is that which the largest singular value of an (m, n) matrix of such noise passes once in a thousand times
    (Johnstone 2001). It assumes entries that are independent and alike, which training does not promise: the count is
    a description, not a test. Source: Kritchman and Nadler 2008.
    """
    m, n = spectrum.m, spectrum.n
    left, outliers = spectrum.norm**2, 0
    for s in spectrum.values:
        if s <= _edge(m, n, _sigma(left, m - outliers, n - outliers)):
            break
        left, outliers = max(left - s * s, 0.0), outliers + 1
    sigma = _sigma(left, m - outliers, n - outliers)
    return Bulk(outliers, outliers == len(spectrum.values) and not spectrum.whole, _edge(m, n, sigma), sigma)


def _sigma(square: float, m: int, n: int) -> float:
    return math.sqrt(square / (m * n)) if m > 0 and n > 0 else 0.0


def _edge(m: int, n: int, sigma: float) -> float:
    long, short = math.sqrt(max(m, n) - 1), math.sqrt(min(m, n))
    if long == 0.0:
        return sigma * math.inf if sigma else 0.0
    spread = (long + short) * (1 / long + 1 / short) ** (1 / 3)
    return sigma * math.sqrt((long + short) ** 2 + TRACY_WIDOM * spread)
