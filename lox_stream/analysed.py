"""What `analyze` finds: of a matrix, and of a pair as a whole."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lox_stream.names import pattern_of
from lox_stream.spectra import Bulk, Spectrum

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")


@dataclass(frozen=True, slots=True)
class Cell:
    """What rounding leaves of one update, alpha * Proj_k(delta), as sums over the elements that were looked at."""

    rank: int
    alpha: float
    rounding: Rounding
    dot: float  # <rounded - W1, update>
    square: float  # |update|^2

    @property
    def retention(self) -> float | None:
        """The share of the update that is left; None without an update."""
        return self.dot / self.square if self.square > 0 and math.isfinite(self.dot) else None


@dataclass(frozen=True, slots=True)
class Robustness:
    """How much of a delta lies in the k leading left singular directions of W_aligned - W_base (U_k).

    R(M) = |U_k U_k' M|_F / |M|_F. Source: the LoX paper's R_align and R_ft.
    """

    rank: int
    align: float  # R of W_aligned - W_base
    finetuned: float | None = None  # R of W_finetuned - W_base
    kept: float | None = None  # <W_finetuned - W_base, Proj_k delta> / |Proj_k delta|^2: 1 all, 0 none, < 0 reversed


@dataclass(frozen=True, slots=True)
class Finding:
    """One matrix (m, n)."""

    tensor: str
    label: str  # "", or "[3]" in a stack, "[q]" of a fused one
    m: int
    n: int
    dtype: str  # of the output, as safetensors names it
    delta_norm: float  # |W1 - W0|_F
    weight_norm: float  # |W1|_F
    spectrum: Spectrum | None = None  # of W1 - W0; None where that is zero
    radius: tuple[float, ...] = ()  # each leading s_i lies within radius_i of a singular value
    entropy_rank: tuple[float, float] = (0.0, 0.0)  # least and most that it can be
    bulk: Bulk | None = None
    cells: tuple[Cell, ...] = ()
    looked_at: int = 0  # elements that the cells are sums over: all, or whole rows at even distances
    ours: Robustness | None = None
    reference: Robustness | None = None  # by the conventions of the paper's code; of what is an nn.Linear alone
    notices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.tensor + self.label

    @property
    def relative(self) -> float:
        """|delta|_F / |W1|_F."""
        return self.delta_norm / self.weight_norm if self.weight_norm > 0 else 0.0

    @property
    def layer(self) -> int | None:
        """The first number in the tensor's name."""
        return layer_of(self.tensor)

    @property
    def module(self) -> str:
        """The name without its numbers: what it is in each layer."""
        return pattern_of(self.tensor)

    def retention(self, rank: int, alpha: float, rounding: Rounding) -> float | None:
        """Of one cell of the grid."""
        for cell in self.cells:
            if (cell.rank, cell.alpha, cell.rounding) == (rank, alpha, rounding):
                return cell.retention
        return None


def layer_of(name: str) -> int | None:
    """The first number among the parts of a tensor's name.

    >>> layer_of("model.layers.7.mlp.experts.12.up_proj.weight"), layer_of("lm_head.weight")
    (7, None)
    """
    found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Means:
    """R over the matrices that have it: the plain mean, as the paper's code takes it."""

    matrices: int
    rank: int
    align: float
    finetuned: float | None
    kept: float | None

    @property
    def left(self) -> float | None:
        """R_ft / R_align: how much of the subspace a fine-tuning left."""
        return self.finetuned / self.align if self.finetuned is not None and self.align > 0 else None


def mean_of(found: Iterable[Robustness | None]) -> Means | None:
    """The means of what is there, where the fine-tuned model has some matrices of these alone; None for nothing."""
    rows = [one for one in found if one is not None]
    later = [one for one in rows if one.finetuned is not None]
    rows = later or rows
    if not rows:
        return None
    return Means(
        matrices=len(rows),
        rank=max(one.rank for one in rows),
        align=math.fsum(one.align for one in rows) / len(rows),
        finetuned=math.fsum(one.finetuned or 0.0 for one in later) / len(later) if later else None,
        kept=math.fsum(one.kept or 0.0 for one in later) / len(later) if later else None,
    )


def retained(findings: Sequence[Finding], rank: int, alpha: float, rounding: Rounding) -> float | None:
    """Retention of a whole model's update: each matrix weighs as much as its update is large."""
    dot = square = 0.0
    for finding in findings:
        for cell in finding.cells:
            if (cell.rank, cell.alpha, cell.rounding) == (rank, alpha, rounding) and finding.looked_at:
                weight = finding.m * finding.n / finding.looked_at
                dot, square = dot + cell.dot * weight, square + cell.square * weight
    return dot / square if square > 0 and math.isfinite(dot) else None


def energy_of(findings: Sequence[Finding], k: int) -> float:
    """Share of all deltas' energy, |delta|_F^2 summed, in the k leading directions of each."""
    whole = math.fsum(one.delta_norm**2 for one in findings)
    return leading_energy(findings, k) / whole if whole > 0 else 0.0


def leading_energy(findings: Iterable[Finding], k: int) -> float:
    """Of all rank-k parts, |Proj_k(delta)|_F^2 summed."""
    return math.fsum(one.spectrum.energy(k) * one.delta_norm**2 for one in findings if one.spectrum)


def gaps_after(findings: Iterable[Finding], k: int) -> list[float]:
    """s_(k+1) / s_k of the matrices of which both are known."""
    return [one.spectrum.gaps[k - 1] for one in findings if one.spectrum and len(one.spectrum.gaps) >= k]


def grouped(findings: Iterable[Finding], key: Callable[[Finding], str]) -> dict[str, list[Finding]]:
    """Those that have one key, in the order in which the keys come."""
    groups: dict[str, list[Finding]] = {}
    for one in findings:
        groups.setdefault(key(one), []).append(one)
    return groups
