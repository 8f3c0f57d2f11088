"""What a person should know of a finished run, each a complete message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lox_stream.facts import TensorFacts
from lox_stream.manifest import totals
from lox_stream.model_card import LOW_RETENTION
from lox_stream.names import listing
from lox_stream.options import Options
from lox_stream.resuming import Survey


def changed_bytes(survey: Survey | None, finished: Mapping[str, TensorFacts]) -> tuple[str, ...]:
    """A message for the tensors that a repair did not give their old bytes."""
    sums = survey.checksums if survey is not None else {}
    other = [name for name, checksum in sums.items() if finished[name].checksum != checksum]
    if not other:
        return ()
    return (
        f"made again with other bytes than before: {listing(other)}. They are right, but their last bits come from "
        "another version or processor, or from other weights in the inputs; the manifest has their checksums",
    )


def run_warnings(finished: Iterable[TensorFacts], options: Options) -> tuple[str, ...]:
    """What a person should know of the finished tensors, each a complete message."""
    rows = sorted(finished, key=lambda facts: facts.name)
    total = totals(rows)
    warnings = [notice for facts in rows for notice in facts.notices]
    if len(warnings) > 6:
        warnings = [*warnings[:5], f"... and {len(warnings) - 5} more tensors like these; the manifest names them all"]
    if total.retention is not None and total.retention < LOW_RETENTION and options.rounding == "nearest":
        warnings.append(
            f"only {total.retention:.0%} of the update survives the rounding to the output's dtype: most of its "
            "elements are smaller than half a step. Keep all of it on average with --rounding stochastic"
        )
    if total.identical and not total.extrapolated:
        warnings.append(
            f"base and aligned hold the same weights: all {total.identical} matrices were copied, none extrapolated. "
            "Is one of the two the wrong model?"
        )
    if total.not_unique:
        warnings.append(
            f"{len(total.not_unique)} tensors have no gap after singular value {options.rank}: their rank-"
            f"{options.rank} part is one of many equally good ones ({total.not_unique[0]}, ...)"
        )
    if total.not_converged:
        warnings.append(
            f"{len(total.not_converged)} tensors did not reach the tolerance {options.tolerance:g} "
            f"({total.not_converged[0]}, ...). Check them with --svd exact, or choose another rank"
        )
    return tuple(warnings)
