"""Compile the GPU kernels where there is no GPU, and show what each takes of a processor: registers, spills, memory.

    python benchmarks/compile_kernels.py                          all cases for sm_80, sm_90 and sm_100: some minutes
    python benchmarks/compile_kernels.py --target 90 --only 'delta*'

What is compiled is what would be launched: the same description of a launch (kernels/gpu/launching.py), for weights
that are not there. Exits 1 where a kernel spills registers, where two blocks do not fit a processor, where weights are
loaded in less than 16 bytes though their sides are multiples of 16, or where the tensor cores go on summing from tile
to tile. The last line is JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # or there would be nothing to compile

import torch
import triton
from harness import Table, cores, finish, say
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from lox_stream.kernels.gpu import delta_matmul, delta_rmatmul, fullrank_update, lowrank_update, partial_sums
from lox_stream.kernels.gpu.launching import Launch

REGISTERS, THREADS = 65536, 2048  # of a processor
SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of a processor
RESERVED_KIB = 1  # of shared memory, for each block
FEW = 40  # cases that are not worth processes of their own
BLOCKS = 2  # that have to fit a processor, so that one loads while the other computes
LOAD_BYTES = 16
M, N = 8192, 28672
IN_ROWS = "x in rows"  # whose lengths are no multiple of 16 either
ODD = 8  # rows or columns more: no multiple of 16, so Triton does not know where a row begins, and loads fewer bytes
SMOKE = [
    "delta*bf16, 16 columns, squares",
    "delta_matmul bf16, 16 columns, squares, *",
    "delta_matmul bf16, 40 columns, squares",
    "delta_rmatmul fp32, 24 columns, squares, x in rows",
    "lowrank_update bf16, rank 6, nearest",
    "partial_sums",
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DOT = r"tt\.dot \S+, \S+, (\S+),|warp_group_dot \S+, \S+, (\S+) |tc_gen5_mma \S+, \S+, \S+, (\S+),"  # its sum before


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a kernel takes, and how it loads and sums."""

    case: str
    target: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_kib: float  # of a block
    blocks: int  # that fit a processor
    load_bytes: int  # of the narrowest load that runs ahead
    fresh: bool  # the tensor cores' sums begin with each tile

    @property
    def good(self) -> bool:
        wide = self.load_bytes >= LOAD_BYTES or self.case.endswith((" more", IN_ROWS))
        return self.spilled_bytes == 0 and self.blocks >= BLOCKS and wide and self.fresh

    def row(self) -> tuple[str, ...]:
        figures = (self.registers, self.spilled_bytes, self.shared_kib, self.blocks, self.load_bytes)
        return (self.case, *map(str, figures), ("yes" if self.fresh else "no") + (" (bad)" if not self.good else ""))


def cases() -> Iterator[tuple[str, Launch]]:
    """Each kernel in the variants that are launched, for a weight of 70B and for others of odder sides."""
    for name, dtype in DTYPES.items():
        yield from products(name, dtype, M, N)
        yield from updates(name, dtype, M, N)
        for case, launch in (*products(name, dtype, M, N + ODD), *updates(name, dtype, M, N + ODD)):
            yield f"{case}, {ODD} columns more", launch
        for case, launch in products(name, dtype, M + ODD, N):
            if case.startswith("delta_rmatmul"):  # in no other kernel do rows lie side by side: those of y
                yield f"{case}, {ODD} rows more", launch
    yield "partial_sums", partial_sums.launch_of(empty(8, M, 16), empty(M, 16))


def products(name: str, dtype: torch.dtype, m: int, n: int) -> Iterator[tuple[str, Launch]]:
    w1, w0 = empty(m, n, dtype=dtype), empty(m, n, dtype=dtype)
    kernels = (("delta_matmul", delta_matmul.launch_of, n), ("delta_rmatmul", delta_rmatmul.launch_of, m))
    for lanes in (16, 32, 64):
        for squares in (False, True):
            how = f"{name}, {lanes} columns" + ", squares" * squares
            for kernel, launch_of, length in kernels:
                yield f"{kernel} {how}", launch_of(w1, w0, empty(lanes, length).T, squares=squares)[0]
    for lanes in (24, 40):  # of a block that is not full; the squares take the most registers
        how = f"{name}, {lanes} columns, squares"
        for kernel, launch_of, length in kernels:
            yield f"{kernel} {how}", launch_of(w1, w0, empty(lanes, length).T, squares=True)[0]
            yield f"{kernel} {how}, {IN_ROWS}", launch_of(w1, w0, empty(length, lanes), squares=True)[0]


def updates(name: str, dtype: torch.dtype, m: int, n: int) -> Iterator[tuple[str, Launch]]:
    w1, w0, out = (empty(m, n, dtype=dtype) for _ in range(3))
    for key in (None, (1, 2)) if dtype != torch.float32 else (None,):
        how = "stochastic" if key else "nearest"
        for rank in (6, 16, 64):
            launch, _ = lowrank_update.launch_of(w1, empty(m, rank), empty(rank, n), out, key=key)
            yield f"lowrank_update {name}, rank {rank}, {how}", launch
        yield f"fullrank_update {name}, {how}", fullrank_update.launch_of(w1, w0, 1.25, out, key=key)[0]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Target:
    """Stands where Triton expects the driver of a GPU: it names the processor to compile for, and cannot launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def every_case() -> list[tuple[str, Launch]]:
    return list(cases())


def compiled_for(capability: int, number: int) -> Compiled:
    """Compile a case; the assembler says what it took."""
    case, launch = every_case()[number]
    triton.runtime.driver.set_active(Target(capability))
    kernel = launch.compiled()
    ptx, threads = kernel.asm["ptx"], 32 * launch.num_warps
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        processor = re.findall(r"\.target (\w+)", ptx)[0]
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={processor}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    shared_kib = kernel.metadata.shared / 1024
    in_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    in_memory = int(SHARED_KIB[capability] / (shared_kib + RESERVED_KIB))
    begun = ["".join(sums) for sums in re.findall(DOT, kernel.asm["ttgir"])]
    return Compiled(
        case,
        f"sm_{capability}",
        registers,
        sum(int(count) for count in re.findall(r"(\d+) bytes spill", said)),
        round(shared_kib, 1),
        min(in_registers, in_memory, THREADS // threads),
        min(
            (int(count, 16) for count in re.findall(r"cp\.async\.c\w\.shared\S* .*, 0x(\w+)", ptx)), default=LOAD_BYTES
        ),
        not begun or begun[0].startswith(("%cst", "%false")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, action="append", choices=sorted(SHARED_KIB), help="default: all")
    parser.add_argument("--only", metavar="GLOB", action="append", help="only cases with such names")
    parser.add_argument("--smoke", action="store_true", help="a handful of cases")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    globs = args.only or (SMOKE if args.smoke else ["*"])
    chosen = [i for i, (case, _) in enumerate(every_case()) if any(fnmatch.fnmatch(case, glob) for glob in globs)]
    work = [(capability, i) for capability in args.target or sorted(SHARED_KIB) for i in chosen]
    if len(work) < FEW:
        found = [compiled_for(*one) for one in work]
    else:
        say(f"{len(work)} kernels")
        with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(compiled_for, *zip(*work, strict=True)))
    heads = ("kernel", "registers", "spilled bytes", "shared KiB", "blocks a processor", "load bytes", "fresh sums")
    tables = [
        Table(target, heads, tuple(one.row() for one in found if one.target == target))
        for target in dict.fromkeys(one.target for one in found)
    ]
    finish("compile_kernels", tables, {"triton": triton.__version__, "kernels": [*map(asdict, found)]}, args.results)
    sys.exit(0 if all(one.good for one in found) else 1)


if __name__ == "__main__":
    main()
