"""The checkpoint pairs that are timed: made once with the spectra that training leaves, warmed and cooled at will."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness import say

from lox_stream.checkpoint import open_checkpoint
from lox_stream.synthetic import llama_shapes, write_pair

READ_BYTES = 4 << 20
HUGE = 1e11  # m * n * min(m, n) from which the naive way takes most of a minute and is measured once


@dataclass(frozen=True, slots=True)
class Model:
    """What a pair looks like, and how much faster than the naive way it is to be (ISSUE section 8)."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    base_shards: int = 1
    aligned_shards: int = 1
    target: float | None = None

    @property
    def matrices(self) -> Counter[tuple[int, int]]:
        """How often each shape of a matrix occurs."""
        return Counter((shape[0], shape[1]) for shape in self.shapes.values() if len(shape) == 2)

    def first(self, shape: tuple[int, int]) -> str:
        """Name of the first tensor of that shape."""
        return next(name for name, found in self.shapes.items() if found == shape)


def _layers_only(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if ".layers." in name}


MODELS = {
    model.name: model
    for model in (
        Model("135m", llama_shapes(576, 1536, 30, 49152, 192), target=10),
        Model("1.1b", llama_shapes(2048, 5632, 22, 32000, 256, tied=False), 2, 3, target=60),
        Model("4096", _layers_only(llama_shapes(4096, 14336, 2, 64, 1024)), target=150),
    )
}
SMOKE = Model("smoke", llama_shapes(128, 160, 2, 300, 48, tied=False), 1, 2)
TINY = Model("tiny", {"weight": (64, 64)})  # whose run is nothing but start-up


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair on disk."""

    model: Model
    base: Path
    aligned: Path
    sides: tuple[tuple[Path, ...], tuple[Path, ...]]  # the weight files of base and of aligned
    input_bytes: int
    output_bytes: int
    made: bool  # in this run; otherwise it was found

    @property
    def files(self) -> tuple[Path, ...]:
        return self.sides[0] + self.sides[1]


def make(model: Model, work: Path) -> Pair:
    """The pair in work/NAME: found there, or made (135M takes a minute or two, the others some ten minutes each)."""
    folder = work / model.name
    found = folder.is_dir()
    if not found:
        say(f"{model.name}: making the pair in {folder}")
        making = work / f"{model.name}.making"
        shutil.rmtree(making, ignore_errors=True)
        write_pair(making, model.shapes, base_shards=model.base_shards, aligned_shards=model.aligned_shards)
        making.rename(folder)
    base, aligned = open_checkpoint(folder / "base"), open_checkpoint(folder / "aligned")
    for side, shards in ((base, model.base_shards), (aligned, model.aligned_shards)):
        shapes = {name: info.shape for name, info in side.tensors.items()}
        if shapes != model.shapes or len(side.shards) != shards:
            raise SystemExit(f"{side.root}: is not the {model.name} pair that is timed here. Remove {folder}")
    base_bytes, aligned_bytes = (sum(shard.size_bytes for shard in side.shards) for side in (base, aligned))
    return Pair(
        model=model,
        base=base.folder,
        aligned=aligned.folder,
        sides=(tuple(shard.path for shard in base.shards), tuple(shard.path for shard in aligned.shards)),
        input_bytes=base_bytes + aligned_bytes,
        output_bytes=aligned_bytes,
        made=not found,
    )


def warm(files: Iterable[Path]) -> None:
    """Read the files into the page cache."""
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Iterable[Path]) -> None:
    """Sync everything, so that no earlier write is waited for later, and drop the files from the page cache."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
