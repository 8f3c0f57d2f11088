"""What a tensor costs in memory, known from its shape alone. Plans refuse with it, the solver sizes itself by it."""

from __future__ import annotations

TILE_ELEMENTS = 1 << 19  # a tile in float32 is 2 MiB: two of them and the factors stay in a core's cache
BASIS_BLOCKS, BLOCKS_LEFT = 8, 3  # of a Krylov space before it begins anew, and after
MOST_BLOCKS = 64  # of one, over all its beginnings
GRAM_COLUMNS = 4096  # of the images that are in float64 at a time
KEPT_ELEMENTS = 1 << 20  # a difference of at most 4 MiB is formed once and kept
GRAM_SIDE = 192  # short side up to which eigenvectors of the Gram matrix are the faster way
CARD_SHARE = 0.8  # of a GPU's free memory that is used
CARD_MOST = 0.9  # of it, that may be asked for
WORKSPACE_BYTES = 64 << 20  # of CUDA's libraries, and partial sums of kernels
SLOTS, SLOT_BYTES = 4, 16 << 20  # of pinned memory, for each direction over a card
PINNED_BYTES = 2 * SLOTS * SLOT_BYTES
CARD_THREADS = 5  # for a GPU: two solve, one copies in, one writes, and one is on its way
EXACT_FLOPS = 2e10  # a second of a float64 SVD, one core of an AMD EPYC (Zen 4) with other work beside it
MOST_TOGETHER = 16  # 135M on 2 threads: 1.41 s by eights, 1.33 s by sixteens, 1.7 s one by one


def kept(m: int, n: int) -> bool:
    """Whether a matrix is small: its difference is formed once and kept.

    >>> kept(1536, 576), kept(4096, 4096)
    (True, False)
    """
    return m * n <= KEPT_ELEMENTS


def block_width(m: int, n: int, rank: int) -> int:
    """Columns of a Krylov block: ten more than the rank, in whole vectors of eight; the rank alone for small matrices.

    A pass over a large matrix costs about the same for one column and for sixteen, so it should take many. A product
    with a small one costs what its columns do, and narrow blocks get further with as many.

    >>> block_width(4096, 4096, 6), block_width(4096, 4096, 64), block_width(576, 576, 6)
    (16, 80, 8)
    """
    wanted = rank if kept(m, n) else rank + 10
    return -(-wanted // 8) * 8


def basis_columns(m: int, n: int, rank: int) -> int:
    """Vectors that the basis may hold before it begins anew: eight blocks, or what fills the short side.

    Measured on spikes over noise, 576 x 576 to 4096 x 4096: 6 blocks take 25 % more passes, 12 more time between them.

    >>> basis_columns(4096, 4096, 6), basis_columns(576, 576, 6), basis_columns(4096, 40, 6)
    (128, 64, 64)
    """
    width = block_width(m, n, rank)
    return min(BASIS_BLOCKS, -(-min(m, n) // width) + 3) * width


def kept_columns(columns: int) -> int:
    """Of a full basis, what is left of it when it begins anew.

    >>> kept_columns(128)
    48
    """
    return columns * BLOCKS_LEFT // BASIS_BLOCKS


def by_gram(m: int, n: int) -> bool:
    """Whether all eigenvectors of the Gram matrix of the short side cost less than an iteration.

    Measured on an AMD EPYC (Zen 4), two threads, as a run solves them: the times cross between 192 and 224 rows on
    power laws, and at some 320 on spikes over noise.

    >>> by_gram(4096, 64), by_gram(576, 576)
    (True, False)
    """
    return min(m, n) <= GRAM_SIDE and kept(m, n)


def solver_bytes(m: int, n: int, rank: int) -> int:
    """Most bytes that the randomized solver holds: the basis and its images, a part of these in float64, what is left
    of either when it begins anew, the blocks in work, partial sums of a product with the transpose (32 at most), and
    small matrices."""
    width, columns = block_width(m, n, rank), basis_columns(m, n, rank)
    bases = (m + n) * columns * 4 + min(max(m, n), GRAM_COLUMNS) * columns * 8
    bases += max(m, n) * kept_columns(columns) * 4
    blocks = (m + n) * width * (4 * 3 + 8 * 3)
    return bases + blocks + 33 * n * width * 4 + 6 * columns * columns * 8


def gram_bytes(m: int, n: int, rank: int) -> int:
    """Most bytes of the way by the Gram matrix: delta in float32 and float64, two copies, the Gram matrix, LAPACK's
    workspace, and factors."""
    short = min(m, n)
    return 4 * m * n + 8 * (3 * m * n + 5 * short * short + 4 * (m + n) * rank)


def exact_bytes(m: int, n: int) -> int:
    """Most bytes of a full SVD in float64: delta, a working copy, both factors, and LAPACK's workspace."""
    short = min(m, n)
    return 8 * (2 * m * n + (m + n) * short + 8 * short * short)


def exact_flops(m: int, n: int) -> float:
    """Of a full SVD with both thin factors: 6 q p^2 + 20 p^3 for a p-by-q matrix, p <= q (Golub and Van Loan, 8.6)."""
    p, q = sorted((m, n))
    return 6.0 * q * p * p + 20.0 * p**3


def together(m: int, n: int, rank: int, svd: str, memory_bytes: int) -> int:
    """How many matrices of a shape are solved at once: small ones, whose steps are less work than the calls for them,
    and only where there are steps.

    >>> [together(m, n, 6, "randomized", 4 << 30) for m, n in ((192, 576), (1536, 576), (4096, 4096))]
    [16, 16, 1]
    >>> together(192, 576, 6, "exact", 4 << 30), together(192, 576, 0, "randomized", 4 << 30)
    (1, 1)
    """
    if svd == "exact" or not 0 < rank < min(m, n) or not kept(m, n):
        return 1
    within = memory_bytes // (8 * step_bytes(m, n, rank, svd))
    return max(1, min(MOST_TOGETHER, within))


def step_bytes(m: int, n: int, rank: int, svd: str) -> int:
    """Most bytes of our own that one matrix needs while it is in work, the threads' tiles not counted."""
    if rank == 0 or rank >= min(m, n):
        return 0
    if svd == "exact":
        return exact_bytes(m, n)
    if by_gram(m, n):
        return gram_bytes(m, n, rank)
    return solver_bytes(m, n, rank) + (4 * m * n if kept(m, n) else 0)


def factors_bytes(m: int, n: int, rank: int) -> int:
    """Most bytes of a change by factors (m, r) and (r, n): these, their orthonormal factors, LAPACK's copies and the
    singular vectors in float64, the last in float32 too; and small matrices."""
    return (m + n) * rank * (5 * 8 + 4) + 8 * 8 * rank * rank


def thread_bytes(threads: int) -> int:
    """Bytes that the computing threads hold for themselves: three tiles in float64 at most, words, and one tile out."""
    return threads * 12 * TILE_ELEMENTS * 4


def goes_on_card(m: int, n: int, rank: int, svd: str) -> bool:
    """Whether a matrix of 16 or 32 bits is computed on a GPU, where there is one.

    Small ones are not, for their many steps would wait for each other, nor what takes no iteration.

    >>> [goes_on_card(side, side, rank, "randomized") for side, rank in ((4096, 6), (576, 6), (4096, 0))]
    [True, False, False]
    """
    return svd == "randomized" and 0 < rank < min(m, n) and not kept(m, n)


def part_rows(m: int, n: int) -> int:
    """Rows in whole numbers of which a matrix can be cut for a GPU: `kernels.GPUKernels.part_rows`.

    >>> part_rows(28672, 8192), part_rows(128256, 8192)
    (1792, 8064)
    """
    programs, grains = -(-n // 128), -(-m // 64)
    splits = max(1, min(max(-(-1024 // programs), 8), grains // 4))
    return -(-grains // splits) * 64


def bytes_on_card(m: int, n: int, rank: int, element_bytes: tuple[int, int], rows: int = 0) -> int:
    """Most that a matrix takes of a GPU's memory: W1, which the output replaces, W0, and what the solver holds.

    `element_bytes` are those of W1 and of W0. With `rows`, two blocks of so many in place of the weights.
    """
    held = min(m, 2 * rows) if rows else m
    return held * n * sum(element_bytes) + solver_bytes(m, n, rank) + WORKSPACE_BYTES
