"""What became of a tensor, as its facts; and how its matrices are to be computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import xxhash

from lox_stream.delta import NotFinite, OutOfRange
from lox_stream.errors import DataError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.kernels import key_of
from lox_stream.matching import Step, output_bytes
from lox_stream.names import in_quotes, printable
from lox_stream.options import Options, options_for
from lox_stream.regions import Region
from lox_stream.update import Setting

Found = tuple[MatrixFacts, ...] | NotFinite  # of a step: an empty tuple for one that is copied
SUSPICIOUS = 0.5  # |delta| / |W| that fine-tuning does not give


def setting_of(step: Step, options: Options, region: Region) -> Setting:
    """Randomness comes from the tensor's name, so no order of work and no resume changes a bit."""
    name = step.seed_name or step.name
    options = options_for(name, options)
    return Setting(
        options=options,
        rank=step.rank,
        seed=xxhash.xxh3_64_intdigest(f"{name}\0{region.index}".encode("utf-8", "surrogatepass")) >> 1,
        key=key_of(options.seed, name) if options.rounding == "stochastic" else None,
        first=region.words,
    )


def facts_for(step: Step, found: Found, told: Sequence[str], checksum: str, elapsed_s: float) -> TensorFacts:
    """The row of a tensor in the manifest; `told` are notices that go before its own."""
    action, reason = step.action, str(step.reason)
    matrices: tuple[MatrixFacts, ...] = ()
    notices: tuple[str, ...]
    if isinstance(found, NotFinite):
        action, done = ("copy", "copied") if step.factors is None else ("merge", "merged")
        done = "carried as zeros" if step.pairs else done
        reason, notices = "not finite", (f"{printable(step.name)}: {done} and not extrapolated: {found}",)
    else:
        matrices, notices = found, _suspicions(step, found)
        if matrices and all(matrix.method == "zero" for matrix in matrices):
            action, reason = ("copy", "identical") if step.factors is None else ("merge", "no change")
    return TensorFacts(
        name=step.name,
        action=action,
        reason=reason,
        n_bytes=output_bytes(step),
        elapsed_s=elapsed_s,
        checksum=checksum,
        matrices=matrices,
        notices=(*told, *notices),
    )


def _suspicions(step: Step, matrices: tuple[MatrixFacts, ...]) -> tuple[str, ...]:
    worst = max((m.delta_norm / m.weight_norm for m in matrices if m.weight_norm > 0), default=0.0)
    if worst <= SUSPICIOUS or not math.isfinite(worst):
        return ()
    doubt = "Is this the right base?" if step.factors is None else "Is the adapter for this model?"
    return (f"{printable(step.name)}: |delta| is {worst:.2f} of |W|; fine-tuning gives a few percent. {doubt}",)


def accepted(step: Step, problem: NotFinite, options: Options) -> NotFinite:
    """The problem, if such tensors are to be copied; else it is raised."""
    if options.on_nonfinite == "copy":
        return problem
    copy = "Copy such tensors unchanged" if step.factors is None else "Merge such tensors and no more"
    copy = "Carry such tensors as zeros" if step.pairs else copy
    if isinstance(problem, OutOfRange) and step.dtype:
        copy = "Write a wider --dtype; or, where aligned itself is within its range, copy such tensors"
    raise DataError(
        f"{printable(step.name)}: {problem}; expected finite numbers. {copy} with --on-nonfinite copy, or this one "
        f"with --skip {in_quotes(step.name)}"
    ) from problem
