"""The journal of a run: which tensors are finished, so that a killed run goes on where it stopped.

JSON lines. The first says what is run (format, versions, options, inputs); then one line per session that worked
on it, and one per finished tensor, appended only after that tensor's bytes were synced.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from lox_stream import files
from lox_stream.checkpoint import Checkpoint, Shard, files_of
from lox_stream.errors import DataError, ResumeError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.names import printable, shown
from lox_stream.options import Options, is_gpu, to_json
from lox_stream.output_rules import JOURNAL
from lox_stream.planning import Plan, inputs_of
from lox_stream.shards import is_regular, parse_json, source_name

FORMAT = 3  # 1: weights tied by their names alone, padding rows as rows; 2: other last bits of hard matrices
SAMPLE_PIECES, SAMPLE_BYTES = 16, 4096
FREE_OPTIONS = ("memory_bytes", "threads", "gpu_memory_bytes", "kernels")  # no byte depends on them, or "device" tells
REQUIRED_FLOATS = ("delta_norm", "weight_norm", "update_norm")
OPTIONAL_FLOATS = ("retention", "energy", "residual", "gap", "predicted_error", "predicted_share")


@dataclass(frozen=True, slots=True)
class Replay:
    """What a journal says: what is run, the sessions so far, and the finished tensors."""

    header: dict[str, Any]
    sessions: tuple[dict[str, Any], ...]
    finished: dict[str, TensorFacts]


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def version(package: str) -> str:
    """The installed version of a package, without importing it; "unknown" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def tensor_facts(record: Mapping[str, Any]) -> TensorFacts:
    """The facts that `asdict` and JSON made `record` of; a number that JSON could not hold is NaN again.

    Raises KeyError or TypeError for a record of something else.
    """
    known = {field.name: record[field.name] for field in fields(TensorFacts)}
    known |= {"matrices": tuple(map(_matrix_facts, record["matrices"])), "notices": tuple(record["notices"])}
    _require(str, [known[name] for name in ("name", "action", "reason", "checksum")] + [*known["notices"]])
    _require(int, [known["n_bytes"]])
    _require(float, [known["elapsed_s"] or 0.0])
    return TensorFacts(**known)


def _require(kind: type, values: Sequence[Any]) -> None:
    kinds = (int, float) if kind is float else (kind,)
    for value in values:
        if type(value) not in kinds:
            raise TypeError(f"found {shown(value)}, expected a value of type {kind.__name__}")


def _matrix_facts(record: Mapping[str, Any]) -> MatrixFacts:
    known = {field.name: record[field.name] for field in fields(MatrixFacts)}
    for name in REQUIRED_FLOATS:
        known[name] = math.nan if known[name] is None else known[name]
    for name in ("singular_values", "radius"):
        known[name] = tuple(math.nan if value is None else value for value in known[name])
        _require(float, known[name])
    _require(float, [known[name] for name in REQUIRED_FLOATS])
    _require(float, [known[name] for name in OPTIONAL_FLOATS if known[name] is not None])
    _require(bool, [known["unique"], known["converged"]])
    _require(str, [known["method"]])
    _require(int, [known["passes"]])
    return MatrixFacts(**known)


def byte_options(options: Options) -> dict[str, Any]:
    """The options that the bytes of the output depend on: of the device, whether it is a GPU, which sums in another
    order, and by which kernels."""
    kept = {name: value for name, value in finite(to_json(options)).items() if name not in FREE_OPTIONS}
    by = " --kernels torch" if options.kernels == "torch" else ""
    return kept | {"device": f"cuda{by}" if is_gpu(options.device) else "cpu"}


def identity(plan: Plan) -> dict[str, Any]:
    """The first line of the journal of `plan`: what has to be the same for a run to be resumed."""
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("lox-stream", "torch")},
        "options": byte_options(plan.options) | ({"x": plan.point.x, "y": plan.point.y} if plan.point else {}),
        "inputs": {side: _shards(checkpoint) for side, checkpoint in inputs_of(plan).items()},
    }


def _shards(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        source_name(shard): {
            "size": shard.size_bytes,
            "header": shard.header_hash,
            "sample": sample_hash(shard),
            "mtime_ns": shard.mtime_ns,
        }
        for shard in files_of(checkpoint)
    }


def sample_hash(shard: Shard) -> str:
    """xxh3_64 of sixteen pieces spread over the weights: all models of one architecture have the same header.

    Raises DataError for a file that cannot be read any more.
    """
    digest = xxhash.xxh3_64()
    with files.explained(shard.path, "read it", files.GO_ON, DataError), files.opened(shard.path) as fd:
        for start, n_bytes in sample_starts(len(shard.header), shard.size_bytes):
            for piece in files.read_pieces(fd, start, n_bytes):
                digest.update(piece)
    return digest.hexdigest()


def sample_starts(header_bytes: int, size_bytes: int) -> list[tuple[int, int]]:
    """Where the pieces of `sample_hash` begin, and their bytes, in a file of that header and size."""
    starts = [header_bytes + (size_bytes - header_bytes) * i // SAMPLE_PIECES for i in range(SAMPLE_PIECES)]
    return [(start, max(0, min(SAMPLE_BYTES, size_bytes - start))) for start in starts]


def session() -> dict[str, Any]:
    """The record of this process."""
    return {"session": os.getpid(), "host": socket.gethostname(), "time": datetime.now(UTC).isoformat("T", "seconds")}


def replay(folder: Path) -> Replay | None:
    """Read the journal of a folder, None without one. Ends quietly at a torn line: what follows is done again.

    Raises ResumeError for a journal of a newer format and for one that is not ours.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    if not is_regular(path):
        raise ResumeError(f"{printable(path)}: is a folder, device, pipe or socket, expected a journal. Remove it")
    with files.explained(path, "read the journal", "Check the permissions of the folder and its disk."):
        lines = path.read_bytes().split(b"\n")[:-1]  # what has no newline was torn
    records = list(_records(lines))
    if not records or type(records[0].get("format")) is not int:
        raise ResumeError(f"{path}: is not a journal of lox-stream, or damaged. Start again with --overwrite")
    if records[0]["format"] < FORMAT:
        raise ResumeError(
            f"{path}: the journal has format {records[0]['format']}, of an earlier lox-stream, which would have made "
            f"some tensors otherwise; expected {FORMAT}. Finish the run with that one, or start again with --overwrite"
        )
    if records[0]["format"] > FORMAT:
        raise ResumeError(
            f"{path}: the journal has format {records[0]['format']}, this lox-stream reads up to {FORMAT}. "
            "Resume with the newer lox-stream that began the run, or start again with --overwrite"
        )
    try:
        _require_identity(records[0])
        tensors = [tensor_facts(record["tensor"]) for record in records if "tensor" in record]
        sessions = tuple(record for record in records if "session" in record)
        _require(str, [session[key] for session in sessions for key in ("host", "time")])
    except (KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else printable(str(error))
        raise ResumeError(f"{path}: the journal is damaged ({reason}). Start again with --overwrite") from error
    return Replay(records[0], sessions, {facts.name: facts for facts in tensors})


def _require_identity(header: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError for what `identity` does not make."""
    _require(dict, [header[key] for key in ("versions", "options", "inputs")])
    sides = [header["inputs"]["base"], header["inputs"]["aligned"], *header["inputs"].values()]
    _require(dict, sides)
    _require(dict, [row for side in sides for row in side.values()])


def _records(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record, _ = parse_json(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        yield record


class Journal:
    """The journal while it is written. Every method raises OSError as the system gives it."""

    def __init__(self, folder: Path, before: Replay) -> None:
        """Begin with what `before` holds and end no older journal until the new one is synced."""
        self.path = folder / JOURNAL
        lines = [before.header, *before.sessions, *({"tensor": asdict(facts)} for facts in before.finished.values())]
        files.replace_file(self.path, b"".join(map(_line, lines)))
        files.sync_folder(folder)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, finished: Sequence[TensorFacts]) -> None:
        """Record tensors whose bytes are synced, and sync the record."""
        files.write_all(self._fd, b"".join(_line({"tensor": asdict(facts)}) for facts in finished))
        os.fsync(self._fd)

    def close(self) -> None:
        files.close(self._fd)

    def remove(self) -> None:
        """Delete the file: the run is finished. The folder is for the caller to sync."""
        for path in (files.partial(self.path), self.path):
            path.unlink(missing_ok=True)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
