"""What a tensor costs in memory, known from its shape alone. Plans refuse with it, the solver sizes itself by it."""

from __future__ import annotations

TILE_ELEMENTS = 1 << 19  # a tile in float32 is 2 MiB: two of them and the factors stay in a core's cache
BASIS_COLUMNS = 512


def block_width(m: int, n: int, rank: int) -> int:
    """Columns of a Krylov block: ten more than the rank, in whole vectors of eight.

    >>> block_width(4096, 4096, 6), block_width(4096, 4096, 64), block_width(12, 4096, 6)
    (16, 80, 12)
    """
    return min(-(-(rank + 10) // 8) * 8, m, n)


def basis_columns(m: int, n: int, rank: int) -> int:
    """Vectors that the basis may hold: 512, or eight blocks where blocks are wide; never more than the short side."""
    width = block_width(m, n, rank)
    return min(max(BASIS_COLUMNS, 8 * width), m, n)


def solver_bytes(m: int, n: int, rank: int) -> int:
    """Most bytes that the randomized solver holds: the basis and its images, some of them in float64, the blocks
    in work, partial sums of a product with the transpose (32 at most), and small matrices."""
    width, columns = block_width(m, n, rank), basis_columns(m, n, rank)
    blocks = (m + n) * width * (4 * 3 + 8 * 2)
    return (
        (m + n) * columns * 4 + max(m, n) * (64 + width) * 8 + blocks + 33 * n * width * 4 + 6 * columns * columns * 8
    )


def exact_bytes(m: int, n: int) -> int:
    """Most bytes of a full SVD in float64: delta, a working copy, both factors, and LAPACK's workspace."""
    short = min(m, n)
    return 8 * (2 * m * n + (m + n) * short + 8 * short * short)


def step_bytes(m: int, n: int, rank: int, svd: str, dtype: str = "") -> int:
    """Most bytes of our own that one matrix needs while it is in work, the threads' tiles not counted."""
    if rank == 0 or rank >= min(m, n):
        return 0
    return exact_bytes(m, n) if svd == "exact" else solver_bytes(m, n, rank)


def thread_bytes(threads: int) -> int:
    """Bytes that the computing threads hold for themselves: three tiles in float64 at most, words, one tile out, and
    a small difference that is kept."""
    return threads * 14 * TILE_ELEMENTS * 4
