"""One tensor's place in the output: bytes arrive in any order and from several threads, one checksum comes out."""

from __future__ import annotations

import threading
from pathlib import Path

import xxhash

from lox_stream import files
from lox_stream.files import GO_ON


class Place:
    """Where one tensor's bytes go. Several threads may write to it, each byte once."""

    def __init__(self, fd: int, path: Path, start: int, n_bytes: int) -> None:
        self.fd, self.path, self.start, self.n_bytes = fd, path, start, n_bytes
        self._hash = xxhash.xxh3_128()
        self._hashed = 0  # bytes from the start of the tensor that are in the hash
        self._hashing = False  # one thread at a time carries the hash on
        self._waiting: dict[int, int] = {}  # written out of order: offset -> bytes
        self._lock = threading.Lock()

    def write(self, offset: int, data: memoryview | bytes | bytearray) -> None:
        """Write contiguous `data` at a byte offset of the tensor. Raises OutputError."""
        view = memoryview(data)
        n_bytes = view.nbytes
        if n_bytes == 0:
            return
        assert 0 <= offset <= offset + n_bytes <= self.n_bytes, f"{offset} + {n_bytes} of {self.n_bytes} bytes"
        view = view.cast("B")
        with files.explained(self.path, "write", GO_ON):
            files.write_at(self.fd, view, self.start + offset)
        with self._lock:
            if self._hashing or offset != self._hashed:
                assert offset >= self._hashed, "bytes written twice"
                assert offset not in self._waiting, "bytes written twice"
                self._waiting[offset] = n_bytes
                return
            self._hashing = True
        self._hash.update(view)  # in order: hashed while it is still in the cache
        self._carry_on(offset + n_bytes)

    def _carry_on(self, hashed: int) -> None:
        """Hash what was written ahead of its turn, re-read from the page cache, up to the next gap."""
        while True:
            with self._lock:
                self._hashed = hashed
                n_bytes = self._waiting.pop(hashed, 0)
                if n_bytes == 0:
                    self._hashing = False
                    return
            with files.explained(self.path, "read back", GO_ON):
                for piece in files.read_pieces(self.fd, self.start + hashed, n_bytes):
                    self._hash.update(piece)
            hashed += n_bytes

    def checksum(self) -> str:
        """xxh3_128 of the tensor's bytes, hexadecimal, when every write has returned."""
        with self._lock:
            assert self._hashed == self.n_bytes, f"{self._hashed} of {self.n_bytes} bytes were written"
            return self._hash.hexdigest()
