"""Random words for stochastic rounding: a pure function of (seed, tensor name, element index).

Two elements share one 32-bit word, the even one its low half:

    word(p) = mix(mix(lo(p) ^ key0) ^ key1 ^ hi(p))        p = index // 2, lo and hi its 32-bit halves

`mix` is Chris Wellons' lowbias32 (2018). Only 32-bit xor, shift and multiply are used, so a GPU makes the same words.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_M1, _M2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit keys of a tensor: the first eight bytes, little endian, of BLAKE2b over "seed:name"."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words16(first: int, count: int, key: tuple[int, int]) -> NDArray[np.uint16]:
    """(count,) random 16-bit words of the elements first, first + 1, ...; 4 bytes of scratch an element."""
    start, stop = first // 2, (first + count + 1) // 2
    pairs = np.arange(start, stop, dtype=np.uint64)
    x = pairs.astype(np.uint32)
    high = (pairs >> np.uint64(32)).astype(np.uint32) if stop >> 32 else np.uint32(0)
    scratch = np.empty_like(x)
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
