"""Which bytes of a damaged output are wrong: the damaged parts are made again from the inputs, and compared."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xxhash

from lox_stream.checkpoint import companion_path
from lox_stream.device import settled
from lox_stream.documents import written_documents
from lox_stream.manifest import read_manifest
from lox_stream.names import is_plain_relative
from lox_stream.output_rules import MANIFEST, MODEL_CARD
from lox_stream.planning import Plan
from lox_stream.repairing import facts_of
from lox_stream.sampling import planned_again
from lox_stream.shards import is_regular
from lox_stream.streaming import tensors_of, with_pairs
from lox_stream.verifying import Check, folder_of

PIECE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Wrong:
    """Where a damaged part differs from what it should be."""

    check: Check
    first_byte: int  # offset in the file
    n_bytes: int  # that differ, or are missing
    found: int | None  # the value of the first; None where the file has ended
    expected: int


def locate(out: str | Path, base: str | Path, aligned: str | Path, failed: Sequence[Check]) -> Iterator[Wrong]:
    """The wrong bytes of each failed check, where they can be told.

    They cannot for a tensor whose checksum its recomputation does not have (another version or processor), and for
    what is not in the inputs. Computes the damaged tensors, and holds one of them at a time besides the solver's
    memory. Raises CheckpointError for inputs that are not those of the manifest.
    """
    folder = folder_of(out)
    plan = settled(replace(planned_again(folder, base, aligned), out=folder.absolute()))
    said = read_manifest(folder)["tensors"]
    for check in failed:
        expected = None if check.part == "tensor" else _expected(plan, check)
        if expected is not None and (wrong := _compared(folder, check, np.frombuffer(expected, np.uint8))):
            yield wrong
    damaged = {check.name: check for check in failed if check.part == "tensor"}
    steps = with_pairs(plan, damaged.keys())
    with contextlib.closing(tensors_of(plan, steps, threading.Event())) as tensors:
        for name, tensor in tensors:
            if name not in damaged:
                continue
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            if xxhash.xxh3_128_hexdigest(data.data) == said[name].get("xxh3_128"):
                wrong = _compared(folder, damaged[name], data)
                if wrong is not None:
                    yield wrong


def _expected(plan: Plan, check: Check) -> bytes | None:
    """The content of a header, or of a file beside the weights."""
    assert plan.out is not None, "it is the folder that is looked at"
    if check.part == "header":
        return next((shard.header for shard in plan.written.shards if shard.name == check.file), None)
    if check.name == MANIFEST or not is_plain_relative(check.name):
        return None
    if Path(check.name) in plan.aligned.companions and check.name != MODEL_CARD:
        return companion_path(plan.aligned, Path(check.name)).read_bytes()
    facts = facts_of(read_manifest(plan.out)["tensors"])
    return written_documents(plan, facts, elapsed_s=0.0).written.get(check.name)


def _compared(folder: Path, check: Check, expected: np.ndarray) -> Wrong | None:
    """What differs between the part of the file that was checked and what it should be."""
    path = folder / check.file
    if not path.exists() or not is_regular(path):
        return None
    count, first, before, after = 0, -1, None, 0
    with path.open("rb") as file:
        file.seek(check.first_byte)
        for at in range(0, len(expected), PIECE_BYTES):
            right = expected[at : at + PIECE_BYTES]
            found = np.frombuffer(file.read(len(right)), np.uint8)
            wrong = np.flatnonzero(found != right[: len(found)])
            missing = len(right) - len(found)
            if first < 0 and (len(wrong) or missing):
                place = int(wrong[0]) if len(wrong) else len(found)
                before, after = int(found[place]) if len(wrong) else None, int(right[place])
                first = check.first_byte + at + place
            count += len(wrong) + missing
    return None if first < 0 else Wrong(check, first, count, before, after)
