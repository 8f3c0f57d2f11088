"""Tables of a vocabulary, and what a plan has to know of their bytes: which are equal, and how many rows are padding.

All that is read here is read through a `Read`, so that of a model that lies elsewhere the same bytes can be fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lox_stream.checkpoint import Checkpoint, TensorInfo
from lox_stream.errors import CheckpointError
from lox_stream.names import matches, pattern_of, printable
from lox_stream.shards import unreadable

Read = Callable[[TensorInfo, int, int], bytes]  # bytes [start, end) of a tensor

SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a table that is compared: at most 1 MiB of it is read
TAIL_BYTES = 16 << 20  # of its last rows, where one after the other is padding
ROW_BYTES = 1 << 20  # a row of more is none of a vocabulary
EQUAL_ROWS = 16  # so many last rows that are equal were never trained; fewer may be equal by chance
POSITIONS = ("*pos*", "*type*")  # tables that are not of words


def read_here(tensor: TensorInfo, start: int, end: int) -> bytes:
    """Bytes [start, end) of a tensor from its file. Raises CheckpointError."""
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.start + start)
            found = file.read(end - start)
    except OSError as error:
        raise CheckpointError([unreadable(tensor.path, error)]) from error
    if len(found) != end - start:
        raise CheckpointError([f"{printable(tensor.path)}: has been cut meanwhile. Leave inputs alone during a run"])
    return found


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """The numbers that a config, or a config in it, gives as sizes of vocabularies."""
    configs = [config, *(inner for inner in config.values() if isinstance(inner, Mapping))]
    found = [value for one in configs for key, value in one.items() if str(key).endswith("vocab_size")]
    return {value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0}


def tables_of(model: Checkpoint) -> list[TensorInfo]:
    """What may be a head or an embedding: matrices with a row for each word, and those of no numbered layer."""
    sizes = vocabulary_sizes(model.config)
    return [tensor for tensor in model.tensors.values() if _is_table(tensor, sizes)]


def _is_table(tensor: TensorInfo, sizes: set[int]) -> bool:
    if len(tensor.shape) != 2 or min(tensor.shape) < 2:
        return False
    return tensor.shape[0] in sizes or pattern_of(tensor.name) == tensor.name


def equal_tables(tables: Iterable[TensorInfo], read: Read = read_here) -> list[tuple[list[TensorInfo], bool]]:
    """Those of one shape and dtype with the same bytes, in groups; and whether that tells anything.

    It does not where all bytes are the same, as in a table of zeros or a hole. Of tables of over 1 MiB sixteen pieces
    are compared, the first and the last among them; of those that differ in the first piece no other is read.
    """
    alike: dict[tuple[object, ...], list[TensorInfo]] = {}
    for table in tables:
        alike.setdefault((table.dtype, table.shape), []).append(table)
    result = []
    for group in alike.values():
        groups = [(group, False)]
        for start, end in _samples(group[0].n_bytes):
            groups = [part for one, told in groups for part in _parted(one, told, start, end, read)]
        result += groups
    return result


def _samples(n_bytes: int) -> list[tuple[int, int]]:
    last = max(0, n_bytes - SAMPLE_BYTES)
    starts = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}) if n_bytes > SAMPLES * SAMPLE_BYTES else []
    whole = [(start, min(n_bytes, start + SAMPLE_BYTES)) for start in range(0, n_bytes, SAMPLE_BYTES)]
    return [(start, start + SAMPLE_BYTES) for start in starts] or whole


def _parted(
    group: list[TensorInfo], told: bool, start: int, end: int, read: Read
) -> Iterator[tuple[list[TensorInfo], bool]]:
    """A group by the bytes of one piece; who is alone is left out."""
    if len(group) < 2:
        return
    places = {(table.path, table.start): table for table in group}
    pieces = {place: read(table, start, end) for place, table in places.items()}  # one storage is read once
    parts: dict[bytes, list[TensorInfo]] = {}
    for table in group:
        parts.setdefault(pieces[table.path, table.start], []).append(table)
    for piece, part in parts.items():
        if len(part) > 1:
            yield part, told or piece.count(piece[:1]) != len(piece)


def padding_rows(table: TensorInfo, model: Checkpoint, read: Read = read_here) -> int:
    """How many of a table's last rows stand for no word.

    Rows beyond the config's vocab_size; rows of zeros; sixteen rows and more that are all equal. At most 16 MiB of
    them are looked at. 0 for what is no table, and where nothing but padding would be left.
    """
    known = vocabulary_sizes(model.config)
    if not _is_table(table, known):
        return 0
    rows = table.shape[0]
    sizes = [size for size in known if size <= rows]
    beyond = rows - max(sizes) if sizes and not matches(table.name, POSITIONS) else 0
    return max(beyond, _equal_rows(table, read))


def _equal_rows(table: TensorInfo, read: Read) -> int:
    """How many last rows are zeros, or equal and many."""
    rows, width = table.shape[0], table.n_bytes // table.shape[0]
    if not 0 < width <= ROW_BYTES:
        return 0
    at_once, least = max(1, SAMPLE_BYTES // width), max(0, rows - TAIL_BYTES // width)
    last, count = read(table, (rows - 1) * width, rows * width), 0
    for end in range(rows, least, -at_once):
        first = max(0, end - at_once)
        data = read(table, first * width, end * width)
        found = [data[i * width : (i + 1) * width] == last for i in reversed(range(end - first))]
        count += found.index(False) if False in found else len(found)
        if False in found:
            break
    return count if count < rows and (count >= EQUAL_ROWS or not any(last)) else 0
