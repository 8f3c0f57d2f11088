"""Random words for stochastic rounding: a pure function of (seed, tensor name, element index).

Two elements share one 32-bit word, the even one its low half:

    word(p) = mix(mix(lo(p) ^ key0) ^ key1 ^ hi(p))        p = index // 2, lo and hi its 32-bit halves

`mix` is Chris Wellons' lowbias32 (2018). Only 32-bit xor, shift and multiply are used, so a GPU makes the same words.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_M1, _M2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit keys of a tensor: the first eight bytes, little endian, of BLAKE2b over "seed:name"."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


_local = threading.local()


def _workspace(count: int) -> tuple[Words, Words, Words]:
    """0, 1, ..., count - 1 and two buffers, this thread's own; fresh memory costs a third of the time."""
    counting: Words | None = getattr(_local, "counting", None)
    if counting is None or len(counting) < count:
        counting = _local.counting = np.arange(count, dtype=np.uint32)
        _local.words, _local.scratch = np.empty_like(counting), np.empty_like(counting)
    return counting[:count], _local.words[:count], _local.scratch[:count]


def words16(first: int, count: int, key: tuple[int, int]) -> NDArray[np.uint16]:
    """(count,) random 16-bit words of the elements first, first + 1, ...; valid until this thread's next call."""
    start, stop = first // 2, (first + count + 1) // 2
    counting, x, scratch = _workspace(stop - start)
    np.add(counting, np.uint32(start & 0xFFFFFFFF), out=x)  # modulo 2^32
    high: Words | np.uint32 = np.uint32(start >> 32)
    if start >> 32 != (stop - 1) >> 32:
        high = ((np.uint64(start) + counting.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
    x ^= np.uint32(key[0])
    _mix(x, scratch)
    x ^= np.uint32(key[1]) ^ high
    _mix(x, scratch)
    return x.astype("<u4", copy=False).view("<u2")[first % 2 :][:count]


def _mix(x: Words, scratch: Words) -> None:
    """lowbias32 of every element, in place."""
    for shift, factor in ((16, _M1), (15, _M2), (16, None)):
        np.right_shift(x, np.uint32(shift), out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        if factor is not None:
            np.multiply(x, factor, out=x)
