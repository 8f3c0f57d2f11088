"""Where the results of a step go: tiles into the tensor of the output, or the factors of its update into an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lox_stream.adapters import Pair
from lox_stream.assembling import Assembly
from lox_stream.checkpoint import TensorInfo
from lox_stream.copying import Target, as_bytes, copy_from, emit_unchanged
from lox_stream.delta import NotFinite
from lox_stream.errors import DataError
from lox_stream.facts import TensorFacts
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step, covered
from lox_stream.merging import sides_of
from lox_stream.names import in_quotes, printable
from lox_stream.options import Options, options_for
from lox_stream.outcomes import Found, facts_for
from lox_stream.reader import TORCH_DTYPES
from lox_stream.regions import Region
from lox_stream.update import Matrix, Outlet


@dataclass(frozen=True, slots=True)
class Way:
    """One output of a run: what becomes of each tensor there, and where that goes."""

    steps: Mapping[str, Step]  # by the tensor's name; without those that are finished
    options: Options
    place: Callable[[Step], Target]  # makes a step's target, a second time if the tensor has to be written anew
    place_factor: Callable[[TensorInfo], Target] | None = None  # of an adapter's tensor


@dataclass(frozen=True, slots=True)
class Use:
    """A step in one of the outputs."""

    step: Step
    way: Way


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of an output whose last byte was written to its target."""

    use: Use
    facts: TensorFacts
    target: Target


class TileSink:
    """The tensor itself."""

    def __init__(self, use: Use) -> None:
        self.use, self.target = use, use.way.place(use.step)
        self._assembly = Assembly(self.target)

    def outlet(self, region: Region) -> Outlet:
        """Takes the tiles of a matrix of the tensor."""

        def emit(first: int, tile: Tensor) -> None:
            if region.groups == 1:
                self.target.write((region.start + region.first + first) * tile.element_size(), as_bytes(tile))
            else:
                self._assembly.add(region, first, tile)

        return Outlet(alpha_of(self.use), emit)

    def unchanged(self, region: Region, matrix: Matrix, run: Run) -> NotFinite | None:
        """A matrix that has no update; what is wrong where the output's dtype cannot hold it."""
        return emit_unchanged(matrix, self.outlet(region).emit, run)

    def copied(self, run: Run, *, again: bool) -> None:
        """The tensor as it is, `again` where some of it was written already."""
        if again:
            self.target = self.use.way.place(self.use.step)
        copy_from(0, self.use.step, self.target, run)

    def ended(self, run: Run) -> None:
        """What lies behind the matrices."""
        if covered(self.use.step) < prod(self.use.step.aligned.shape):
            copy_from(covered(self.use.step), self.use.step, self.target, run)

    def written(self, found: Found, told: Sequence[str], elapsed_s: float) -> list[Written]:
        facts = facts_for(self.use.step, found, told, self.target.checksum(), elapsed_s)
        return [Written(self.use, facts, self.target)]


class FactorSink:
    """A pair of LoRA factors, or several of one weight: each a tensor of an adapter, written once it is whole."""

    def __init__(self, use: Use) -> None:
        assert use.way.place_factor is not None, "an adapter has places for factors"
        infos = [info for pair in use.step.pairs for info in (pair.b, pair.a)]
        self.use, self._targets = use, {info.name: use.way.place_factor(info) for info in infos}
        self._factors = {info.name: torch.zeros(info.shape, dtype=TORCH_DTYPES[info.dtype]) for info in infos}

    def outlet(self, region: Region) -> Outlet:
        """Takes the factors of a matrix."""

        def take(b: Tensor, a: Tensor) -> None:
            for pair in self.use.step.pairs:
                self._store(pair, region.index, *as_stored(pair, b, a))

        return Outlet(alpha_of(self.use), take=take)

    def _store(self, pair: Pair, number: int, b: Tensor, a: Tensor) -> None:
        places = sides_of(self._factors[pair.b.name], self._factors[pair.a.name], pair.count, number)
        for info, place, factor in zip((pair.b, pair.a), places, (b, a), strict=True):
            place.copy_(factor)
            if not bool(place.isfinite().all()):
                name = printable(self.use.step.name)
                raise DataError(
                    f"{printable(info.name)}: a factor of {name} is beyond the range of {info.dtype}. Leave the "
                    f"tensor out with --skip {in_quotes(name)}"
                )

    def unchanged(self, region: Region, matrix: Matrix, run: Run) -> NotFinite | None:
        """Factors of zeros, which they are."""
        del region, matrix, run
        return None

    def copied(self, run: Run, *, again: bool) -> None:
        """The same for all matrices: nothing is to be added."""
        del again
        for factor in self._factors.values():
            factor.zero_()
        self.ended(run)

    def ended(self, run: Run) -> None:
        """All of them are there."""
        del run
        for name, factor in self._factors.items():
            self._targets[name].write(0, as_bytes(factor))

    def written(self, found: Found, told: Sequence[str], elapsed_s: float) -> list[Written]:
        """The first pair's B has the facts; the others say that they are factors."""
        first, *others = [info for pair in self.use.step.pairs for info in (pair.b, pair.a)]
        facts = facts_for(self.use.step, found, told, self._targets[first.name].checksum(), elapsed_s)
        rows = [replace(facts, name=first.name, n_bytes=first.n_bytes)]
        rows += [
            TensorFacts(info.name, "factor", "matrix", info.n_bytes, 0.0, self._targets[info.name].checksum())
            for info in others
        ]
        return [Written(self.use, row, self._targets[row.name]) for row in rows]


Sink = TileSink | FactorSink


def sink_of(use: Use) -> Sink:
    """Where the step's results go."""
    return FactorSink(use) if use.step.pairs else TileSink(use)


def alpha_of(use: Use) -> float:
    """The factor of a step's update."""
    return options_for(use.step.seed_name or use.step.name, use.way.options).alpha


def as_stored(pair: Pair, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B and A as the adapter has those of a matrix, (out, rank) and (rank, in): padded with zeros, turned, folded."""
    if pair.fold != 1.0:
        b = (b.double() * pair.fold).to(b.dtype)
    rows, columns = b.shape[0], a.shape[1]
    full_b, full_a = torch.zeros(pair.rows, pair.rank, dtype=b.dtype), torch.zeros(pair.rank, columns, dtype=a.dtype)
    full_b[:rows, : b.shape[1]] = b
    full_a[: a.shape[0]] = a
    if pair.turned:
        full_b, full_a = full_a.T, full_b.T
    return full_b, full_a
