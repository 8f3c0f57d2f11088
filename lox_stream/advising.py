"""What an analysis means for who runs LoX on the pair: sentences, with their numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from lox_stream.analysed import Finding, Means, energy_of, gaps_after, grouped, leading_energy, mean_of, retained
from lox_stream.examining import Asked
from lox_stream.names import printable
from lox_stream.outcomes import SUSPICIOUS

FAINT = 1e-4  # |delta| / |W| of which 16 bits keep next to nothing
ENOUGH = 0.9  # of an update, to be left after rounding
NAMED = 3  # modules or layers in a sentence


def advice(findings: Sequence[Finding], asked: Asked) -> tuple[str, ...]:
    """On the pair, the rank, alpha and rounding, where rounding is worst, what carries the update, and robustness."""
    changed = [one for one in findings if one.spectrum is not None]
    if not changed and any(one.notices for one in findings):
        return ("No matrix could be looked at: the warnings say why.",)
    if not changed:
        return (
            "Base and aligned are the same in every matrix: there is nothing to extrapolate. Is one of them wrong?",
        )
    told = [_pair(findings, changed), *_rank(changed, asked), *_alpha(changed, asked), *_carriers(changed, asked)]
    if any(rule.rank is not None or rule.alpha is not None for rule in asked.options.recipe):
        told.append(
            "The recipe has other ranks or factors for some matrices; what is said here is for rank "
            f"{asked.options.rank} and alpha {asked.options.alpha:g} in all of them."
        )
    for conventions, means in (
        ("", mean_of(one.ours for one in changed)),
        (", by the conventions of the paper's code", mean_of(one.reference for one in changed)),
    ):
        if means is not None and means.finetuned is not None:
            told.append(_robustness(means, conventions))
    return tuple(told)


def _pair(findings: Sequence[Finding], changed: Sequence[Finding]) -> str:
    relative = statistics.median(one.relative for one in changed)
    size = f"|delta| is {_percent(relative)} of |W| in the median matrix"
    still = sum(one.spectrum is None and not one.notices for one in findings)
    same = f"; {still} of {len(findings)} matrices have no difference" if still else ""
    if relative > SUSPICIOUS:
        return f"They do not look like a pair: {size}{same}. Fine-tuning gives a few percent: is this the right base?"
    if relative < FAINT and any(one.dtype not in ("F32", "F64") for one in changed):
        return f"They are nearly the same: {size}{same}. An update of that size is lost in 16 bits; write float32."
    return f"They look like a pair: {size}{same}."


def _rank(changed: Sequence[Finding], asked: Asked) -> list[str]:
    k = asked.options.rank
    gaps = gaps_after(changed, k)
    gap = f"; s_{k + 1} / s_{k} is {statistics.median(gaps):.2f} in the median matrix" if gaps else ""
    told = [f"Rank {k} holds {_percent(energy_of(changed, k))} of the energy of all differences{gap}."]
    bulks = [one.bulk for one in changed if one.bulk]
    standing = int(statistics.median(bulk.outliers for bulk in bulks))
    if 2 * sum(bulk.more for bulk in bulks) > len(bulks):
        told.append(
            f"All {asked.values} directions that were looked at stand out of what noise would give in most matrices: "
            "the difference has no low rank of its own, and any rank is a choice."
        )
    else:
        part = f", with {_percent(energy_of(changed, standing))} of the energy" if 0 < standing <= asked.values else ""
        told.append(
            f"{standing} directions stand out of what noise would give in the median matrix{part}: a rank beyond that "
            "extrapolates noise, too."
        )
    told.append(
        "Which rank is enough to be safe is no matter of energy: --ladder makes the models between base and aligned, "
        "for a judge of refusals to score."
    )
    return told


def _alpha(changed: Sequence[Finding], asked: Asked) -> list[str]:
    k, alpha = asked.options.rank, asked.options.alpha
    left = retained(changed, k, alpha, "nearest")
    if left is None:
        return []
    dtypes = "/".join(sorted({one.dtype for one in changed}))
    told = f"Rounding to nearest leaves {_percent(left)} of the update at rank {k} and alpha {alpha:g} ({dtypes})"
    if left >= ENOUGH:
        return [f"{told}."]
    grid = [(other, retained(changed, k, other, "nearest") or 0.0) for other in asked.alphas if other > alpha > 0]
    better = next((f"; alpha {other:g} leaves {_percent(share)}" for other, share in grid if share >= ENOUGH), "")
    ways = [f"{told}{better}. --rounding stochastic keeps all of it on average, --dtype float32 exactly."]
    worst = _largest(changed, lambda one: one.module, lambda some: 1 - (retained(some, k, alpha, "nearest") or 0.0))
    named = ", ".join(f"{module} ({_percent(1 - lost)})" for module, lost in worst)
    return [*ways, f"It is least in {named}."]


def _carriers(changed: Sequence[Finding], asked: Asked) -> list[str]:
    k = asked.options.rank
    whole = leading_energy(changed, k)
    modules = _largest(changed, lambda one: one.module, lambda some: leading_energy(some, k) / whole)
    told = ["The update lies in " + ", ".join(f"{module} ({_percent(share)})" for module, share in modules) + "."]
    layered = [one for one in changed if one.layer is not None]
    layers = _largest(layered, lambda one: str(one.layer), lambda some: leading_energy(some, k) / whole)
    if len({one.layer for one in layered}) > NAMED:
        told.append(
            "Of the layers, most in " + ", ".join(f"{layer} ({_percent(share)})" for layer, share in layers) + "."
        )
    return told


def _robustness(means: Means, conventions: str) -> str:
    assert means.finetuned is not None, "asked before"
    assert means.kept is not None, "known where R_ft is"
    left = f"; R_ft / R_align is {means.left:.3f}" if means.left is not None else ""
    return (
        f"The {means.rank} leading directions hold {means.align:.3f} of the alignment's norm (R_align) and "
        f"{means.finetuned:.3f} of what is there after fine-tuning (R_ft){conventions}{left}, in the mean of "
        f"{means.matrices} matrices. Of the alignment's leading part itself {_percent(means.kept)} is there after it"
        f"{' (it is reversed)' if means.kept < 0 else ''}."
    )


def _largest(
    findings: Sequence[Finding], key: Callable[[Finding], str], value: Callable[[list[Finding]], float]
) -> list[tuple[str, float]]:
    """The groups with the largest values."""
    found = [(printable(name), value(some)) for name, some in grouped(findings, key).items()]
    return sorted(found, key=lambda pair: -pair[1])[:NAMED]


def _percent(share: float) -> str:
    """Two figures: `0.31 %`, `61 %`."""
    return f"{100 * share:.2g} %" if abs(share) < 0.995 else f"{100 * share:.3g} %"
