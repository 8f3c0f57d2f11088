"""What a POSIX file system may leave when the power fails: changes of files and names, and which of them are durable.

The model, that of Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), and of CrashMonkey (Mohan et
al., OSDI 2018), without the help that any one file system gives on top:

- What a file held at its last fsync or fdatasync is there. Of what was written since, each 4 KiB page is the old or the
  new one, in any combination; one write in ten is torn at 512 bytes. A page that was never written is zeros. The size
  is any that the file has had since.
- The names of a folder are as of its last fsync. Of the changes since (create, rename, unlink, mkdir), any subset has
  happened, with two limits: changes to one name happen in their order, and a rename happens as a whole.
- A sync of a file says nothing of its name, and a sync of a folder nothing of its files.

A call that had not returned is one that may or may not have happened. Half of the states are of the kinds that file
systems are known to leave: nothing of what is pending, all of it, names without data, data without names, names in
order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torture_world import Content

PAGE, SECTOR = 4096, 512
KINDS = (
    "nothing",
    "all",
    "names without data",
    "data without names",
    "names in order",
    "any",
    "any",
    "any",
    "any",
    "any",
)
FOLDER = -1  # in place of a file's number


@dataclass(frozen=True, slots=True)
class Op:
    """One change. `file` is a number that a file keeps through renames."""

    kind: str  # write, size, sync; create, rename, unlink, mkdir, sync folder
    file: int = 0
    offset: int = 0  # of a write; the size
    data: bytes = b""
    name: str = ""  # relative to the output's folder; "" is the folder itself
    new_name: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.new_name) if self.kind == "rename" else (self.name,)


@dataclass(slots=True)
class Disk:
    """What is durable: files by number, and names; and what is pending."""

    files: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    data: dict[int, list[Op]] = field(default_factory=dict)  # pending, of each file
    changes: list[Op] = field(default_factory=list)  # pending, of names

    def take(self, op: Op) -> None:
        """The next change of the log."""
        if op.kind in ("write", "size"):
            self.data.setdefault(op.file, []).append(op)
        elif op.kind == "sync":
            content = bytearray(self.files.get(op.file, b""))
            for pending in self.data.pop(op.file, []):
                apply(content, pending)
            self.files[op.file] = bytes(content)
        elif op.kind == "sync folder":
            mine = [change for change in self.changes if str(Path(change.name).parent) == (op.name or ".")]
            self.changes = [change for change in self.changes if change not in mine]
            rename_all(self.names, mine)
        else:
            self.changes.append(op)


def apply(content: bytearray, op: Op) -> None:
    if op.kind == "size":
        resize(content, op.offset)
        return
    if len(content) < op.offset:
        resize(content, op.offset)
    content[op.offset : op.offset + len(op.data)] = op.data


def resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def rename_all(names: dict[str, int], changes: list[Op]) -> None:
    for op in changes:
        if op.kind in ("create", "mkdir"):
            names[op.name] = FOLDER if op.kind == "mkdir" else op.file
        elif op.kind == "unlink":
            names.pop(op.name, None)
        else:
            names[op.new_name] = names.pop(op.name)


def left(disk: Disk, kind: str, rng: random.Random) -> Content:
    """One of the states that a crash may leave: the files by their names; a folder's name ends with a slash."""
    share = {"nothing": 0.0, "all": 1.0}.get(kind, rng.choice([0.1, 0.5, 0.9]))
    of_names = {"names without data": 1.0, "data without names": 0.0}.get(kind, share)
    of_data = {"names without data": 0.0, "data without names": 1.0}.get(kind, share)
    names = dict(disk.names)
    if kind == "names in order":
        rename_all(names, disk.changes[: rng.randint(0, len(disk.changes))])
    else:
        rename_all(names, happened(disk.changes, of_names, rng))
    state = Content()
    for name, file in names.items():
        if any(parent not in names for parent in parents(name)):
            continue
        if file == FOLDER:
            state[name + "/"] = b""
        else:
            state[name] = torn(disk.files.get(file, b""), disk.data.get(file, []), of_data, rng)
    return state


def parents(name: str) -> Iterator[str]:
    return (str(parent) for parent in Path(name).parents if str(parent) != ".")


def happened(changes: list[Op], share: float, rng: random.Random) -> list[Op]:
    """Some of the changes of names: those of one name in their order, up to one that did not happen."""
    kept: list[Op] = []
    lost: set[str] = set()
    for op in changes:
        if rng.random() < share and not lost & {*op.names, *parents(op.name)}:
            kept.append(op)
        else:
            lost |= {*op.names}
    return kept


def torn(durable: bytes, pending: list[Op], share: float, rng: random.Random) -> bytes:
    """A file with some of the pages that were written since its last sync."""
    content = bytearray(durable)
    sizes = [len(content)]
    whole = bytearray(durable)
    for op in pending:
        apply(whole, op)
        sizes.append(len(whole))
        if op.kind == "size":
            if rng.random() < share:
                resize(content, op.offset)
            continue
        unit = SECTOR if 0 < share < 1 and rng.random() < 0.1 else PAGE
        for start, end in pages(op.offset, op.offset + len(op.data), unit):
            if rng.random() < share:
                apply(content, Op("write", op.file, start, op.data[start - op.offset : end - op.offset]))
    resize(content, sizes[-1] if share == 1 else sizes[0] if share == 0 else rng.choice(sizes))
    return bytes(content)


def pages(start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """[start, end), cut where a page ends."""
    while start < end:
        stop = min(end, start - start % unit + unit)
        yield start, stop
        start = stop
