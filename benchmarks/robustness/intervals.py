"""How sure a share is, and whether two arms differ: Wilson's interval, McNemar's exact test, a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

Verdicts = Sequence[bool]  # one a prompt, in the order of the prompts


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which holds at 0 and at 1 too."""
    found = binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(one: Verdicts, other: Verdicts) -> float:
    """P of a split as uneven among the prompts on which two arms differ, were both alike (McNemar 1947, exact)."""
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def difference(one: Sequence[Verdicts], other: Sequence[Verdicts], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of `one` minus that of `other`, with its 95 % interval: prompts are drawn anew, each with all its seeds.

    Seeds are averaged within a prompt, for verdicts on one prompt are no independent draws. The interval speaks of
    other prompts, not of other seeds: two or three seeds cannot.
    """
    per_prompt = np.mean(np.asarray(one, float), axis=0) - np.mean(np.asarray(other, float), axis=0)
    rng = np.random.default_rng(0)
    means = per_prompt[rng.integers(len(per_prompt), size=(draws, len(per_prompt)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(per_prompt.mean()), float(low), float(high)
