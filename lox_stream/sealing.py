"""The manifest's own checksum, its last entry: finds every change, and puts one flipped bit right.

...,
  "seal": "<xxh3_128 of all bytes before this line's comma><crc32 of the same>"
}
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import xxhash

POLYNOMIAL = 0xEDB88320  # of zlib's CRC-32, reflected
CRC_DIGITS = 8
END = b"\n}\n"


@dataclass(frozen=True, slots=True)
class Opened:
    """A sealed document: its bytes, as they were written wherever that can be told."""

    data: bytes
    state: Literal["whole", "mended", "broken"]
    at: int | None = None  # offset of the byte with the flipped bit, where one was mended


def sealed(document: bytes) -> bytes:
    """An indented JSON object, which ends with "\\n}\\n", with the seal as its last entry."""
    assert document.endswith(END), "as json.dumps with indent=2 writes an object, and a newline"
    body = document.removesuffix(END)
    return body + _ending(body)


def opened(data: bytes) -> Opened:
    """What the seal says of a document; one that has none is broken.

    Costs a hash, and where a bit has to be found some 0.1 microseconds a bit.
    """
    body, ending = data[:-ENDING_BYTES], data[-ENDING_BYTES:]
    expected = _ending(body)
    if ending == expected:
        return Opened(data, "whole")
    wrong = int.from_bytes(ending) ^ int.from_bytes(expected)
    if wrong.bit_count() == 1:
        return Opened(body + expected, "mended", len(data) - 1 - (wrong.bit_length() - 1) // 8)
    at = _flipped(body, ending)
    if at is not None:
        byte = at // 8
        mended = body[:byte] + bytes([body[byte] ^ 1 << at % 8]) + body[byte + 1 :]
        if _ending(mended) == ending:
            return Opened(mended + ending, "mended", byte)
    return Opened(data, "broken")


def _ending(body: bytes) -> bytes:
    return f',\n  "seal": "{xxhash.xxh3_128_hexdigest(body)}{zlib.crc32(body):0{CRC_DIGITS}x}"'.encode() + END


ENDING_BYTES = len(_ending(b""))


def _flipped(body: bytes, ending: bytes) -> int | None:
    """The bit of `body` (8 * byte + bit) whose flip explains the CRC of `ending`, if there is one.

    A CRC is linear: a flipped bit changes it by a value that depends only on how far the bit is from the end.
    """
    digits = ending[: -len(END) - 1][-CRC_DIGITS:]
    try:
        found = zlib.crc32(body) ^ int(digits, 16)
    except ValueError:
        return None
    change = POLYNOMIAL
    for at in range(8 * len(body) - 1, -1, -1):
        if change == found:
            return at
        change = change >> 1 ^ (POLYNOMIAL if change & 1 else 0)
    return None
