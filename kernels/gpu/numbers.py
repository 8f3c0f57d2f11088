"""What the kernels do to single numbers: widening, rounding to nearest or by chance, and the random words for it.

Everything is spelt out in integer operations where machines differ (an interpreter truncates what a GPU rounds), so the
bits are those of `kernels/cpu.py` wherever a kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(values):
    """bfloat16, float16 or float32 as float32, exactly."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def narrowed(values, DTYPE: tl.constexpr):
    """float32 numbers that DTYPE holds, as DTYPE."""
    if tl.bfloat16 == DTYPE:
        return (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def not_finite(values):
    """Infinite or NaN: float32 -> int1."""
    return (values.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000


@triton.jit
def nearest(values, DTYPE: tl.constexpr):
    """float32 numbers rounded to those of DTYPE, ties to even; still float32."""
    if tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = (up & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(values == values, rounded, values)  # a NaN has no neighbours
    return values.to(DTYPE).to(tl.float32)


@triton.jit
def by_chance(values, words, DTYPE: tl.constexpr):
    """float32 numbers rounded up with the probability of what is cut off, by 16-bit words; DTYPE is of 16 bits."""
    bits = values.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        return tl.where(not_finite(values), values, ((bits + words) & 0xFFFF0000).to(tl.float32, bitcast=True))
    exponent = tl.maximum(((bits >> 23) & 0xFF).to(tl.int32), 113)  # of float16's smallest normal number: 113 - 127
    place = ((exponent - 10) << 23).to(tl.float32, bitcast=True)  # the last one of float16
    many = (280 - exponent) << 23  # 65536 / place
    parts = tl.floor(values * many.to(tl.float32, bitcast=True)).to(tl.int32)  # 65536ths of a step, below 2^27
    rounded = ((parts + words.to(tl.int32)) >> 16).to(tl.float32) * place
    return tl.where(not_finite(values), values, rounded.to(DTYPE).to(tl.float32))


@triton.jit
def words16(index, key0, key1):
    """The 16-bit random words of elements `index` int64, in uint32: `kernels/random_words.py` has the formula."""
    pair = index >> 1
    low, high = (pair & 0xFFFFFFFF).to(tl.uint32), (pair >> 32).to(tl.uint32)
    word = _mixed(low ^ key0.to(tl.uint32))
    word = _mixed(word ^ key1.to(tl.uint32) ^ high)
    return (word >> ((index & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _mixed(x):
    """lowbias32 (Chris Wellons, 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
