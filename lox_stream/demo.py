"""A small pair of models, extrapolated and looked at: what `lox-stream demo` shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from lox_stream.anywhere import extrapolate
from lox_stream.api import Progress, Summary
from lox_stream.errors import OutputError
from lox_stream.facts import MatrixFacts
from lox_stream.journal import tensor_facts
from lox_stream.manifest import read_manifest
from lox_stream.options import Options
from lox_stream.reader import mapped
from lox_stream.recomputing import Comparison, compare_all
from lox_stream.sampling import Sample, Unit, units_of
from lox_stream.synthetic import llama_shapes, write_pair
from lox_stream.workers import Workers

SHAPES = llama_shapes(768, 2048, layers=2, vocabulary=2048, kv=256)
LOOKED_AT = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What was made, what the run did, and one matrix beside its full SVD."""

    base: Path
    aligned: Path
    parameters: int
    matrices: int
    making_s: float
    summary: Summary
    changed: float  # share of the matrices' elements that differ from aligned
    facts: MatrixFacts  # of LOOKED_AT
    elapsed_s: float  # that lox-stream took for it, beside other tensors
    comparison: Comparison  # of LOOKED_AT with float64; its time is that of the full SVD, on one core


def make_demo_pair(folder: Path) -> tuple[Path, Path]:
    """Write folder/base and folder/aligned: a Llama of 14M parameters in bfloat16, the aligned one in two shards.

    Each matrix of aligned is its base and a change of 0.3 % of its norm, whose singular values fall as a power law of
    exponent 0.55, as supervised fine-tuning leaves them. Raises OutputError for a folder that holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: is not empty, expected a new or empty folder. Choose another --keep")
    with Workers(1) as worker:  # where other programs run, torch is faster on one core than on all
        return worker.call(lambda: write_pair(folder, SHAPES, aligned_shards=2))


def run_demo(
    folder: Path,
    pair: tuple[Path, Path],
    *,
    making_s: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
) -> Demonstration:
    """Extrapolate the pair into folder/out, and compare one of its matrices with a full SVD in float64."""
    base, aligned = pair
    out = folder / "out"
    summary = extrapolate(base, aligned, out, progress=progress)
    options, units = units_of(out, base, aligned)
    row = read_manifest(out)["tensors"][LOOKED_AT]
    facts = tensor_facts(row | {"name": LOOKED_AT, "checksum": row["xxh3_128"]})
    return Demonstration(
        base=base,
        aligned=aligned,
        parameters=sum(map(prod, SHAPES.values())),
        matrices=sum(len(shape) == 2 for shape in SHAPES.values()),
        making_s=making_s,
        summary=summary,
        changed=changed_share(units),
        facts=facts.matrices[0],
        elapsed_s=facts.elapsed_s,
        comparison=_compared(options, next(unit for unit in units if unit.name == LOOKED_AT)),
    )


def changed_share(units: list[Unit]) -> float:
    """Share of the elements of all extrapolated matrices (16 bits each) whose bits differ from aligned's."""
    changed = elements = 0
    for unit in units:
        if unit.copied:
            continue
        with mapped(unit.step.aligned) as before, mapped(unit.out) as after:
            different = np.frombuffer(before, np.uint16) != np.frombuffer(after, np.uint16)
            changed += int(different.sum())
            elements += different.size
            del different
    return changed / elements


def _compared(options: Options, unit: Unit) -> Comparison:
    sample = Sample(options, (unit,), workers=1, flops=0.0, expected_s=0.0, memory_bytes=0, too_large=())
    return next(compare_all(sample))


def timed_pair(folder: Path) -> tuple[tuple[Path, Path], float]:
    """The pair, and the seconds that making it took."""
    started = time.perf_counter()
    return make_demo_pair(folder), time.perf_counter() - started
