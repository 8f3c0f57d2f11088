"""`lox_stream.json`: what was run, on what, what came out of it, and a checksum of every byte.

A tensor's checksum is the xxh3_128 of its bytes. A shard has its size, the xxh3_128 of its header, and in `tensors`
the xxh3_128 of its tensors' digests (16 raw bytes each) in the order of the file: together they cover the file.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from lox_stream import files
from lox_stream.checkpoint import Checkpoint, Shard, files_of, whence
from lox_stream.errors import OutputError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.journal import finite, sample_hash, version
from lox_stream.landscape_file import DOCUMENT as LANDSCAPE
from lox_stream.names import printable
from lox_stream.options import to_json
from lox_stream.output_rules import MANIFEST
from lox_stream.planning import Plan, inputs_of
from lox_stream.sealing import opened
from lox_stream.shards import is_regular, parse_json, source_name, written_bytes

FORMAT = 1
PACKAGES = ("lox-stream", "torch", "numpy", "safetensors")


@dataclass(frozen=True, slots=True)
class Totals:
    """What a whole run comes to. A share is None where no tensor has one."""

    tensors: int
    extrapolated: int
    copied: int  # identical ones included
    rescaled: int  # scales of FP8 that were made anew
    merged: int  # changed by an adapter, and not extrapolated
    identical: int  # base and aligned hold the same bytes
    n_bytes: int
    energy: float | None  # share of sum |delta|_F^2 that the updates follow, over the matrices that know theirs
    retention: float | None  # share of the updates that survived the rounding, weighted by |update|^2
    predicted_share: float | None  # the largest of any matrix
    not_converged: tuple[str, ...]  # tensors
    not_unique: tuple[str, ...]
    passes: int


def totals(finished: Iterable[TensorFacts]) -> Totals:
    """Sum up the facts; the order in which they come changes nothing."""
    rows = sorted(finished, key=lambda facts: facts.name)
    matrices = [matrix for facts in rows for matrix in facts.matrices]
    shares = [m.predicted_share for m in matrices if m.predicted_share is not None]
    return Totals(
        tensors=len(rows),
        extrapolated=sum(facts.action == "extrapolate" for facts in rows),
        copied=sum(facts.action == "copy" for facts in rows),
        rescaled=sum(facts.action == "rescale" for facts in rows),
        merged=sum(facts.action == "merge" for facts in rows),
        identical=sum(facts.reason == "identical" for facts in rows),
        n_bytes=sum(facts.n_bytes for facts in rows),
        energy=_mean((m.energy, m.delta_norm) for m in matrices),
        retention=_mean((m.retention, m.update_norm) for m in matrices),
        predicted_share=max(shares, default=None),
        not_converged=_tensors_with(rows, lambda m: not m.converged),
        not_unique=_tensors_with(rows, lambda m: not m.unique),
        passes=sum(m.passes for m in matrices),
    )


def _mean(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """The mean of the values that are there, weighted by the squares of the norms; no square over- or underflows."""
    known = [
        (value, norm) for value, norm in pairs if value is not None and math.isfinite(value) and 0 < norm < math.inf
    ]
    largest = max((norm for _, norm in known), default=1.0)
    weights = [(norm / largest) ** 2 for _, norm in known]
    if not known:
        return None
    return math.fsum(value * weight for (value, _), weight in zip(known, weights, strict=True)) / math.fsum(weights)


def _tensors_with(rows: Iterable[TensorFacts], law: Callable[[MatrixFacts], bool]) -> tuple[str, ...]:
    return tuple(facts.name for facts in rows if any(law(matrix) for matrix in facts.matrices))


def manifest_of(
    plan: Plan,
    finished: Mapping[str, TensorFacts],
    *,
    elapsed_s: float,
    sessions: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    began: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a finished run as JSON values: no NaN, no infinity, no tuple.

    `elapsed_s` is the time of the last session; `sessions` are the journal's records of all of them. `beside` has the
    `stamp` of each file beside the weights, `began` the inputs as the journal has them: what was read, and not what
    lies there by now.
    """
    left = {"left_out": [asdict(one) for one in plan.left_out]} if plan.left_out else {}
    parts = {step.name: {"parts": [part.label for part in step.parts]} for step in plan.steps if step.parts}
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "options": finite(to_json(plan.options)),
        "inputs": {
            side: input_of(checkpoint, (began or {}).get(side, {})) for side, checkpoint in inputs_of(plan).items()
        },
        **({"point": {"x": plan.point.x, "y": plan.point.y}} if plan.point else {}),
        "index": plan.written.index_name,
        **_components(plan.written),
        **left,
        "shards": {shard.name: _shard(shard, finished) for shard in plan.written.shards},
        "tensors": {
            tensor.name: _tensor(shard, finished[tensor.name], tensor.dtype, tensor.shape) | parts.get(tensor.name, {})
            for shard in plan.written.shards
            for tensor in shard.tensors
        },
        "files": dict(sorted((beside or {}).items())),
        "totals": finite(asdict(totals(finished.values()))),
        "warnings": list(warnings),
        "times": {
            "started": sessions[0]["time"] if sessions else None,
            "finished": datetime.now(UTC).isoformat("T", "seconds"),
            "elapsed_s": finite(elapsed_s),
            "sessions": max(1, len(sessions)),
        },
    }


def _components(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a pipeline: the names of its components. Their shards and tensors are called `component/name`."""
    names = [model.prefix.rstrip("/") for model in checkpoint.components]
    return {"components": names} if names else {}


def input_of(checkpoint: Checkpoint, began: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What tells an input from others, as the manifest has it; samples in `began` are not taken again."""
    known = began or {}
    return {
        "path": whence(checkpoint),
        "shards": {
            source_name(shard): {
                "size": shard.size_bytes,
                "header_xxh3_128": shard.header_hash,
                "sample_xxh3_64": known.get(source_name(shard), {}).get("sample") or sample_hash(shard),
            }
            for shard in files_of(checkpoint)
        },
    }


def made_for(folder: Path, checkpoint: Checkpoint) -> bool | None:
    """Whether an adapter's manifest names this checkpoint as the one it is for; None where it has none that is whole.

    By sizes, headers and samples of the weights, whatever the files are called. Raises DataError.
    """
    path = folder / MANIFEST
    if not path.is_file() or (found := opened(path.read_bytes())).state == "broken":
        return None
    try:
        said = parse_json(found.data)[0]
        shards = said["inputs"]["aligned"]["shards"].values() if said["options"].get("form") != "weights" else None
        expected = None if shards is None else sorted(sorted(row.items()) for row in shards)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return (
        None
        if expected is None
        else expected == sorted(sorted(row.items()) for row in input_of(checkpoint)["shards"].values())
    )


def stamp(pieces: Iterable[bytes]) -> dict[str, Any]:
    """Size and checksum of a file, out of its content in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def stamp_of(path: Path) -> dict[str, Any]:
    """The `stamp` of a file on disk; raises OSError."""
    with path.open("rb") as file:
        return stamp(files.read_pieces(file.fileno(), 0, os.fstat(file.fileno()).st_size))


def _shard(shard: Shard, finished: Mapping[str, TensorFacts]) -> dict[str, Any]:
    digests = [finished[tensor.name].checksum for tensor in shard.tensors]
    return {"size": written_bytes(shard), "header_xxh3_128": shard.header_hash, "tensors_xxh3_128": joined(digests)}


def joined(checksums: Iterable[str]) -> str:
    """The checksum of a shard's tensors: xxh3_128 of their digests, 16 raw bytes each, in the order of the file."""
    return xxhash.xxh3_128_hexdigest(b"".join(map(bytes.fromhex, checksums)))


def _tensor(shard: Shard, facts: TensorFacts, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    row = finite(asdict(facts))
    checksum = row.pop("checksum")
    del row["name"]
    return {"shard": shard.name, "dtype": dtype, "shape": list(shape), "xxh3_128": checksum, **row}


def corrected_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own index, with `total_size` the bytes of its tensors; what else it says is kept."""
    index = dict(checkpoint.index or {})
    said = index.get("metadata")
    n_bytes = sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
    return index | {"metadata": (said if isinstance(said, dict) else {}) | {"total_size": n_bytes}}


def as_json(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file; raises ValueError for a NaN or an infinity, which JSON has not."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished output, one flipped bit of it put right.

    Raises OutputError: none there, not ours, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / LANDSCAPE).exists():
            raise OutputError(
                f"{printable(folder)}: is a landscape, expected a finished output. Its points were judged and removed; "
                "write one by `lox-stream landscape --point X,Y`"
            )
        raise OutputError(
            f"{path}: no such file: {folder} is not a finished output of lox-stream. Check the path, or finish its "
            "run: --resume, or `lox-stream finish` for parts"
        )
    if not is_regular(path):
        raise OutputError(f"{printable(path)}: is a folder, device, pipe or socket, expected a file. Check the path")
    with files.explained(path, "read the manifest", "Check its permissions and its disk."):
        data = opened(path.read_bytes()).data
    try:
        found, _ = parse_json(data)
    except ValueError as error:
        raise OutputError(f"{path}: is not JSON: {error}. Run again with --overwrite to make it new") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise OutputError(f"{path}: has no format version, so lox-stream did not write it. Check the path")
    if found["format"] > FORMAT:
        raise OutputError(
            f"{path}: has format {found['format']}, this lox-stream reads up to {FORMAT}. Install a newer lox-stream"
        )
    if not all(isinstance(found.get(key), dict) for key in ("shards", "tensors", "inputs", "options", "totals")):
        raise OutputError(f"{path}: parts of the manifest are missing. Run again with --overwrite to make it new")
    return found
