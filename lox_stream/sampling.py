"""Which matrices of a finished output to recompute, and what that will cost: the plan of `verify` with inputs."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from lox_stream.adapters import Factors
from lox_stream.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, open_checkpoint
from lox_stream.costs import EXACT_FLOPS, exact_bytes, exact_flops
from lox_stream.errors import CheckpointError, OptionError, OutputError
from lox_stream.manifest import input_of, read_manifest
from lox_stream.matching import Step, output_bytes
from lox_stream.names import listing, printable
from lox_stream.options import Options, check_options, from_json
from lox_stream.planning import Plan, plan
from lox_stream.regions import Region, matrix_count, regions_of
from lox_stream.scales import Scaled, scaled_weights
from lox_stream.shards import read_shard
from lox_stream.verifying import folder_of

COPY_BPS = 1e9
AGAIN = "Run again with --overwrite"


@dataclass(frozen=True, slots=True)
class Unit:
    """One matrix of the output, or a tensor that has to be the aligned one."""

    step: Step
    out: TensorInfo
    region: Region | None  # None: copied
    predicted_share: float | None  # of elements that differ from the exact result, as the manifest says
    unique: bool  # whether the rank-k part is
    out_scaled: Scaled | None = None  # of an output of FP8
    alone: bool = False  # what an adapter makes of base, with no extrapolation
    factors: Factors | None = None  # of an output that is an adapter: where its two lie

    @property
    def copied(self) -> bool:
        return self.region is None

    @property
    def name(self) -> str:
        return self.step.name + (self.region.label if self.region is not None else "")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n); of a copied tensor its elements as one row."""
        return (1, prod(self.step.aligned.shape)) if self.region is None else (self.region.m, self.region.n)

    @property
    def n_bytes(self) -> int:
        return self.out.n_bytes if self.region is None else prod(self.shape) * DTYPE_BYTES[self.out.dtype]


@dataclass(frozen=True, slots=True)
class Sample:
    """What is to be recomputed, and its cost: an estimate, for a person who may not want to wait."""

    options: Options  # of the run
    units: tuple[Unit, ...]
    workers: int  # matrices in work at once
    flops: float  # float64
    expected_s: float
    memory_bytes: int
    too_large: tuple[str, ...]  # matrices that half of this machine's memory cannot hold


def choose_sample(out: str | Path, base: str | Path, aligned: str | Path, *, count: int = 3, seed: int = 0) -> Sample:
    """Up to `count` matrices out of those that the run extrapolated, filled up with copied tensors.

    The same seed picks the same ones. A matrix's chance is as 1 / cost, so that the sample costs about as much as
    `count` typical matrices, however large the embeddings are. Raises CheckpointError for inputs that are not those
    of the manifest, OutputError for a manifest that does not say what was run.
    """
    if count < 1:
        raise OptionError(f"--sample is {count}, expected 1 or more matrices")
    options, units = units_of(out, base, aligned)
    limit = _memory_limit()
    fitting = [unit for unit in units if _unit_bytes(unit) <= limit]
    too_large = tuple(unit.name for unit in units if _unit_bytes(unit) > limit)
    chosen = _weighted((unit for unit in fitting if not unit.copied), count, seed)
    chosen += _weighted((unit for unit in fitting if unit.copied), count - len(chosen), seed)
    return _with_cost(options, chosen, too_large, limit)


def units_of(out: str | Path, base: str | Path, aligned: str | Path) -> tuple[Options, list[Unit]]:
    """The options of a finished run and every matrix of its output; errors as for `choose_sample`."""
    folder = folder_of(out)
    made = planned_again(folder, base, aligned)
    rows = read_manifest(folder)["tensors"]
    if made.options.form != "weights":
        return made.options, list(_pairs(made, rows, folder))
    return made.options, list(_units(made, open_checkpoint(out), rows, folder))


def planned_again(folder: Path, base: str | Path, aligned: str | Path) -> Plan:
    """The plan that a finished output was made by, but for its folder; errors as for `choose_sample`."""
    said = read_manifest(folder)
    if "point" in said:
        raise OutputError(
            f"{folder}: is a point of a landscape, expected an output of a run, which alone is recomputed. Check its "
            "bytes: `lox-stream verify` without --base and --aligned"
        )
    made = plan(base, aligned, options=options_of(folder, said["options"]))
    check_inputs(said["inputs"], made)
    return made


def options_of(folder: Path, said: dict[str, Any]) -> Options:
    """The options of the run, as the manifest has them."""
    try:
        if "rank" not in said:
            raise OptionError("rank is missing")
        options = Options(
            **from_json({field.name: said[field.name] for field in fields(Options) if field.name in said})
        )
        check_options(options)
    except (TypeError, OptionError) as error:
        raise OutputError(f"{folder}: its manifest holds options that mean nothing: {error}. {AGAIN}") from error
    return options


def check_inputs(said: dict[str, Any], made: Plan) -> None:
    """The headers of both inputs have to be those of the manifest."""
    problems = []
    for side, checkpoint in (("base", made.base), ("aligned", made.aligned)):
        record = said.get(side)
        shards = record.get("shards") if isinstance(record, dict) else None
        expected = shards if isinstance(shards, dict) else {}
        found = input_of(checkpoint)["shards"]
        wrong = [name for name in {**expected, **found} if not agree(expected.get(name), found.get(name))]
        if wrong:
            was = record.get("path") if isinstance(record, dict) else None
            problems.append(
                f"{side}: {printable(checkpoint.root)}: is not what the output was made from: size, header or a sample "
                f"of the weights differ from the manifest's in {listing(wrong)}. "
                f"Give the one that was used: {printable(str(was))}"
            )
    if problems:
        raise CheckpointError(problems)


def agree(said: Any, found: Any) -> bool:
    """Whether a file is the one that the manifest speaks of, as far as that tells."""
    if not isinstance(said, dict) or not isinstance(found, dict):
        return False
    return {"sample_xxh3_64": found["sample_xxh3_64"], **said} == found  # manifests of old have no sample


def _units(made: Plan, out: Checkpoint, rows: dict[str, Any], folder: Path) -> Iterator[Unit]:
    scaled = scaled_weights(out)
    for step in made.steps:
        row, written = rows.get(step.name), out.tensors.get(step.name)
        if not isinstance(row, dict) or written is None or written.n_bytes != output_bytes(step):
            raise OutputError(f"{folder}: {printable(step.name)}: manifest, output and aligned do not agree. {AGAIN}")
        if row.get("action") == "rescale":
            continue
        facts = [item for item in row.get("matrices") or () if isinstance(item, dict)]
        if row.get("action") != "extrapolate" or step.action != "extrapolate" or len(facts) != matrix_count(step):
            for alone in regions_of(step) if step.factors is not None else (None,):
                yield Unit(step, written, alone, None, True, alone=alone is not None)
            continue
        for region, matrix in zip(regions_of(step), facts, strict=True):
            share = matrix.get("predicted_share")
            yield Unit(step, written, region, share, matrix.get("unique") is not False, scaled.get(step.name))


def _pairs(made: Plan, rows: dict[str, Any], folder: Path) -> Iterator[Unit]:
    """The matrices of which an adapter holds factors; not those that are zero."""
    written = {info.name: info for info in read_shard(folder / made.written.shards[0].name).tensors}
    for step in made.steps:
        pair = step.pairs[0]
        row, a, b = rows.get(pair.b.name), written.get(pair.a.name), written.get(pair.b.name)
        if not isinstance(row, dict) or a is None or b is None or (a.shape, b.shape) != (pair.a.shape, pair.b.shape):
            raise OutputError(f"{folder}: {printable(step.name)}: manifest, adapter and aligned do not agree. {AGAIN}")
        if row.get("action") == "extrapolate":
            factors = Factors(a, b, pair.rank, 1 / pair.fold, pair.turned, pair.count)
            for region, facts in zip(regions_of(step), _facts_of(row, matrix_count(step)), strict=True):
                unique, own = facts.get("unique") is not False, replace(factors, number=region.index)
                yield Unit(step, b, region, None, unique, factors=own)


def _facts_of(row: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a row says of each of its matrices; nothing where it does not speak of so many."""
    facts = row.get("matrices")
    said = isinstance(facts, list) and len(facts) == count and all(isinstance(one, dict) for one in facts)
    return facts if said and isinstance(facts, list) else [{}] * count


def _weighted(units: Iterable[Unit], count: int, seed: int) -> list[Unit]:
    """`count` units without replacement, the chance of each as 1 / cost (Efraimidis and Spirakis 2006)."""
    keyed = []
    for unit in sorted(units, key=lambda unit: unit.name):
        chance = random.Random(f"{seed}:{unit.name}").random() or 0.5
        keyed.append((-math.log(chance) * (_seconds(unit) + 1e-3), unit))
    return [unit for _, unit in sorted(keyed, key=lambda pair: pair[0])[: max(count, 0)]]


def _flops(unit: Unit) -> float:
    if unit.copied or unit.alone or not 0 < unit.step.rank < min(unit.shape):
        return 0.0
    return exact_flops(*unit.shape)


def _seconds(unit: Unit) -> float:
    return _flops(unit) / EXACT_FLOPS + 3 * unit.n_bytes / COPY_BPS


def _unit_bytes(unit: Unit) -> int:
    """Most bytes that one recomputation holds."""
    m, n = unit.shape
    return unit.n_bytes if unit.copied else exact_bytes(m, n) + 4 * 8 * m * n


def _with_cost(options: Options, units: list[Unit], too_large: tuple[str, ...], limit: int) -> Sample:
    largest = max((_unit_bytes(unit) for unit in units), default=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, len(units), limit // largest))
    seconds = [_seconds(unit) for unit in units]
    return Sample(
        options=options,
        units=tuple(units),
        workers=workers,
        flops=sum(map(_flops, units)),
        expected_s=max([sum(seconds) / workers, *seconds]),
        memory_bytes=sum(sorted(map(_unit_bytes, units))[-workers:]),
        too_large=too_large,
    )


def _memory_limit() -> int:
    """Half of the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
