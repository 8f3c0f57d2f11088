"""How far an iterated rank-k part still is from the true one: what is bounded, what is estimated, when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable

from lox_stream.bases import DEFLATION, EPS

UNITS = 4  # of rounding that a product may be off by
ROUNDING = UNITS * EPS  # what float32 products leave in a triplet, as a share of s_1
RATE_KEPT = 0.7  # at most, of a rate from before the space began anew: a slow one may be over
SLOWEST = 0.999  # rate that is reckoned with
NO_GAP = 1e-5  # (s_k - s_(k+1)) / s_k that float32 cannot tell from zero

Enough = Callable[[float, float], bool]  # enough(predicted |E|_F, |rank-k part|_F)


class Pace:
    """Steps of the rank-k part, |B - earlier B|_F from look to look, and the rate at which they get shorter."""

    def __init__(self) -> None:
        self.steps: list[float] = []  # of a block each
        self.rate = SLOWEST  # a step over the one before it
        self._seen: list[float] = []  # rates that the steps alone tell, of each look
        self._before = 0.0  # least rate to reckon with, since the space last began anew
        self._spans_two = False  # blocks, the next step
        self._double: float | None = None  # the last step, if it did

    def add(self, step: float) -> None:
        """The step to a new look."""
        self.steps.append(step)
        if self._spans_two:
            rate, self._double, self._spans_two = self._before, step, False
            self.steps[-1] *= rate / math.hypot(1.0, rate)
        elif self._double is not None:
            rate, self._double = self._after(self._double, step), None
            self.steps[-2] = step / rate
            self._before = min(self._before, rate)
        else:
            rate = self._of_last_three()
        self._seen.append(rate)
        self.rate = max(rate, self._before)

    def begin_anew(self) -> None:
        """The space begins anew, and is not looked at after its first block, which brings half of what others do.

        So the next step spans two, and what the second has of it is known by the rate that there was, until the step
        after it tells. That one's rate, or the one before, is the least to reckon with from there on: the last steps
        before the next beginning get shorter faster than those that come.
        """
        self._before, self._spans_two = min(max(self._seen[-2:]), RATE_KEPT), True

    def _of_last_three(self) -> float:
        d2, d1, d0 = ([math.inf, math.inf, *self.steps])[-3:]
        return min(max(d0 / d1, math.sqrt(d0 / d2)) if d1 and d2 else SLOWEST, SLOWEST)

    @staticmethod
    def _after(double: float, step: float) -> float:
        """The rate r of a step after two of which the sum is known: double^2 = (step / r)^2 + (step / r^2)^2."""
        if double <= step or step == 0.0:
            return SLOWEST
        q = (double / step) ** 2
        return min(math.sqrt((math.sqrt(1.0 + 4.0 * q) + 1.0) / (2.0 * q)), SLOWEST)


class Watch:
    """Follows the rank-k part from look to look and predicts how far it still is from the true one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.norm = 0.0  # running estimate of |A|_2, from below
        self.pace = Pace()
        self.s: list[float] = []
        self.radius: list[float] = []
        self.next = self.next_radius = 0.0  # of s_(k+1)
        self.squared_norm = 0.0
        self.missed = 0.0  # |A - A P P'|_F
        self.noise = 1.0  # condition of the blocks that were multiplied by A'A at once: rounding grows with it
        self.blocks = 0  # in the space, each with its own rounding
        self.exhausted = self.halved = False

    def look(self, step: float, trace: float, s: list[float], shares: list[float], squared_norm: float) -> None:
        """`step` is |B - earlier B|_F^2, `trace` |A P|_F^2, `shares` the newest images' part of each s u."""
        values = [value for value in s if value > 0]
        self.pace.add(math.sqrt(max(step, 0.0)))
        self.norm = values[0] if values else 0.0
        self.missed = math.sqrt(max(squared_norm - trace, 0.0) + ROUNDING * squared_norm)  # of either sum
        radius = [
            share / value * self.missed + self._rounding(value) for value, share in zip(values, shares, strict=False)
        ]
        k = self.rank
        self.s, self.radius = values[:k], radius[:k]
        self.next, self.next_radius = (values[k], radius[k]) if len(values) > k else (0.0, 0.0)
        self.squared_norm = squared_norm

    def _rounding(self, value: float) -> float:
        """What float32, and the directions that were dropped, leave in the residual of a value."""
        return math.sqrt(max(self.blocks, 1)) * self.noise * (ROUNDING + DEFLATION * self.norm / value) * self.norm

    def exhaust(self) -> None:
        """The space is invariant: the last look saw the matrix itself, up to rounding."""
        self.exhausted = True
        self.radius, self.next_radius = [self._rounding(value) for value in self.s], 0.0

    def half_step(self, t: list[float], rests: list[float]) -> None:
        """The values of U'A, and the column norms of R = A'U - V S in the new u's coordinates.

        A' u = t v then, and A v - t u = (I - U U') A R / t, for R is orthogonal to the basis: at most |A|_2 |R| / t.
        """
        self.halved = True
        largest = math.hypot(self.norm, self.missed)
        self.s = t
        self.radius = [largest * rest / value + self._rounding(value) for value, rest in zip(t, rests, strict=True)]

    @property
    def part(self) -> float:
        return math.hypot(*self.s)

    @property
    def error(self) -> float:
        """Estimate of |E|_F now: the last step, carried on as a series at the slowest rate seen lately.

        The steps to come add up to d * r / (1 - r) if they all point one way and to d * r / sqrt(1 - r^2) if each is
        orthogonal to the others. Measured over ten spectra (tests/test_svd.py), the truth lies between;
        d * r / sqrt(1 - r) is within a factor of three of it, and errs upwards where convergence is fast.
        """
        return math.hypot(self._to_come, self._floor)

    @property
    def _to_come(self) -> float:
        """What further products would change."""
        if self.exhausted or not self.pace.steps:
            return 0.0
        to_come = self.pace.steps[-1] * self.pace.rate / math.sqrt(1 - self.pace.rate)
        return to_come * math.sqrt(self.pace.rate) if self.halved else to_come

    @property
    def _floor(self) -> float:
        """What they would not: float32 rounding, which turns the k-th direction the more the smaller the gap is."""
        return ROUNDING * self.part + 0.25 * EPS * self.norm / max(self.gap, NO_GAP)

    @property
    def _last(self) -> float:
        """s_k, zero where fewer than k values are above rounding."""
        return self.s[-1] if len(self.s) == self.rank else 0.0

    @property
    def gap(self) -> float:
        return (self._last - self.next) / self._last if self._last > 0 else 1.0

    @property
    def unique(self) -> bool:
        """False when the k-th and the next value are both settled and equal."""
        if self._last <= DEFLATION * self.norm or self.gap > NO_GAP:
            return True
        return max(self.radius[-1], self.next_radius) > 0.01 * self._last

    def converged(self, enough: Enough) -> bool:
        return enough(self.error, self.part) or not self.unique

    def settled(self, enough: Enough) -> bool:
        """Converged, or as near to it as float32 comes; three looks at least, for two steps make a rate."""
        return len(self.pace.steps) > 2 and (self.converged(enough) or self._to_come < 0.5 * self._floor)

    def half_way(self, enough: Enough) -> bool:
        """Whether half a step from here is enough."""
        half = self._to_come * math.sqrt(self.pace.rate)
        return len(self.pace.steps) > 2 and enough(math.hypot(half, self._floor), self.part)

    def one_to_go(self, enough: Enough) -> bool:
        """Whether the next look will probably be the last."""
        if len(self.pace.steps) < 2:
            return False
        # 0.1 to 1 of to_come * rate in most cases, as rates still fall; 0.45 the median
        ahead = 0.5 * self._to_come * self.pace.rate
        return ahead < 0.5 * self._floor or enough(math.hypot(ahead, self._floor), self.part)
