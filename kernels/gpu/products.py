"""What the two products with the difference share: how a matrix is cut, what a kernel is given, sums of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .launching import Arguments, Launch, check_weights, power_of_two_over, tiles_of

LANES = 64  # columns of X or Y that one pass over the weights multiplies
DOT_LANES = 16  # columns that a tensor core multiplies at least
PROGRAMS = 1024  # that a matrix is cut into where it is large enough: four rounds of two blocks on 132 processors
GRAIN_M, GRAIN_N = 64, 128  # rows and columns in whole numbers of which a loop is cut, whatever the tiles
FEWEST_SPLITS = 8  # of the rows, where there are enough: so a matrix can go through in blocks of a few of these
FEWEST_GRAINS = 4  # of one program: below, starting its loads costs more than further programs give
REGISTERS = 255  # that a thread can have
PRECISION = "tf32x3"  # of a product; delta_matmul.py says why

Tiles = Mapping[int, tuple[int, int, int]]  # lanes: rows and columns of a tile of 16-bit weights, warps


def part_of(m: int, n: int, *, turned: bool) -> int:
    """Columns of an (m, n) matrix that one program of `delta_matmul` goes through; rows, of `delta_rmatmul` (`turned`).

    A function of the shape alone, so that the order of a sum, and with it its bits, are the same on every device.

    >>> part_of(28672, 8192, turned=False), part_of(28672, 8192, turned=True), part_of(64, 8192, turned=True)
    (2816, 1792, 64)
    """
    programs, grain = (tiles_of(n, GRAIN_N), GRAIN_M) if turned else (tiles_of(m, GRAIN_M), GRAIN_N)
    grains = tiles_of(m if turned else n, grain)
    wanted = max(tiles_of(PROGRAMS, programs), FEWEST_SPLITS if turned else 1)
    splits = max(1, min(wanted, grains // FEWEST_GRAINS))
    return tiles_of(grains, splits) * grain


def fits_loads(length: int) -> bool:
    """Whether what lies `length` elements after a load of 16 bytes is loaded so: Triton knows it of multiples of 16.

    Where the columns of the weights are others, they are loaded element by element, and all the addresses and masks
    take registers; where those of x are, its masks do. A tile is half as wide there: at the whole width sm_80 spilled
    up to 876 bytes a thread, and 24 for x, and with twice the warps one block fitted a processor, not two. There, and
    where the rows by which y's columns may lie apart are others, the assembler may use all registers: it spilled up to
    52 bytes for one more block.
    """
    return length % 16 == 0


def part_rows(m: int, n: int) -> int:
    """Rows of an (m, n) matrix that one term of a product with the transpose sums over."""
    return part_of(m, n, turned=True)


def launch_of(
    kernel: Any,
    tiles: Tiles,
    w1: Tensor,
    w0: Tensor,
    x: Tensor,
    *,
    turned: bool,
    whole: int | None = None,
    scale: float = 1.0,
    squares: bool = False,
    precision: str = PRECISION,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch for x (n, l), or (m, l) where it is `turned`, l up to LANES; its partial sums, and those of squares.

    The partial sums are (splits, m, l), or (splits, l, n) where it is turned. The weights may be some rows of matrices
    with `whole` of them.
    """
    check_weights(w1, w0)
    m, n = w1.shape
    lanes = x.shape[1]
    check_float32(x, m if turned else n, w1.device)
    block_l = power_of_two_over(lanes, DOT_LANES)
    block_m, block_n, warps = tiles[block_l]
    fits = fits_loads(n) and fits_loads(lanes)
    if max(w1.element_size(), w0.element_size()) > 2 or not fits:
        block_n //= 2  # of 32 bits a row of a tile has as many bytes then
    (outer, block_outer), (inner, block_inner) = (
        ((n, block_n), (m, block_m)) if turned else ((m, block_m), (n, block_n))
    )
    part = part_of(whole or m, n, turned=turned)
    assert part % block_inner == 0, "a loop is cut between its tiles"
    bands, splits = tiles_of(outer, block_outer), tiles_of(inner, part)
    shape = (splits, lanes, n) if turned else (splits, m, lanes)
    parts = torch.empty(shape, dtype=torch.float32, device=w1.device)
    sums = torch.empty(splits * bands if squares else 1, dtype=torch.float64, device=w1.device)
    arguments: Arguments = {
        "w1_ptr": w1,
        "w0_ptr": w0,
        "x_ptr": x,
        "out_ptr": parts,
        "squares_ptr": sums,
        "m": m,
        "n": n,
        "lanes": lanes,
        "stride1": w1.stride(0),
        "stride0": w0.stride(0),
        "stride_x": x.stride(0),
        "stride_l": x.stride(1),
        "part": part,
        "scale": scale,
        "one": 1.0,
    }
    constants = {"SQUARES": squares, "PRECISION": precision}
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_L": block_l}
    most = None if fits and (not turned or fits_loads(whole or m)) else REGISTERS
    launch = Launch(kernel, (bands, splits), arguments, constants | blocks, warps, num_stages=3, most_registers=most)
    return launch, parts, sums


def parts_of(
    launch_of: Callable[..., tuple[Launch, Tensor, Tensor]],
    w1: Tensor,
    w0: Tensor,
    x: Tensor,
    *,
    squares: list[Tensor] | None,
    **how: Any,
) -> list[Tensor]:
    """The partial sums for each group of LANES columns of x; `squares` receives a vector of float64 sums."""
    found: list[Tensor] = []
    for group in x.split(LANES, 1):
        wanted = squares is not None and not found
        launch, parts, sums = launch_of(w1, w0, group, squares=wanted, **how)
        launch()
        found.append(parts)
        if squares is not None and wanted:
            squares.append(sums)
    return found


def joined(groups: list[Tensor], along: int) -> Tensor:
    """What was computed for groups of columns, side by side."""
    return groups[0] if len(groups) == 1 else torch.cat(groups, along)


def check_float32(x: Tensor, rows: int, device: torch.device) -> None:
    """What a kernel asks of the other factor; its strides may be any."""
    assert x.ndim == 2, "the other factor has to be a matrix"
    assert x.shape[0] == rows, f"the other factor has {x.shape[0]} rows, expected {rows}"
    assert x.dtype == torch.float32, f"the other factor is {x.dtype}, expected torch.float32"
    assert x.device == device, f"the other factor is on {x.device}, the weights on {device}"
