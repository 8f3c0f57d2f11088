#!/usr/bin/env python3
"""Llama-3.1-70B in small, every dimension divided by 16, run whole: the memory does not grow with the layers.

    python benchmarks/bench_memory.py                    a minute: 40, 80 (as 70B has) and 160 layers
    python benchmarks/bench_memory.py --smoke            seconds

Anonymous memory, as Linux counts it, seen every 20 ms. Matrices of these sizes are small: they are solved in groups,
and their differences kept. So this is about what remains of each; a true 70B's peak is that of its largest matrix.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import disk
import torch
from harness import Table, finish, say
from safetensors.torch import save_file

from lox_stream.synthetic import llama_shapes

LAYERS = (40, 80, 160)
# Of the peak, from the fewest layers to the most, for a byte that a side grew. Noise of the allocator is 0.04; matrices
# that are held until the end are 0.2 and more.
MOST_GROWTH = 0.1
SPIKES = torch.linspace(3, 1, 8)


def write(folder: Path, layers: int) -> None:
    """A pair of random weights whose differences are noise and eight spikes."""
    generator = torch.Generator().manual_seed(layers)
    sides: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for name, shape in llama_shapes(512, 1792, layers, 8016, 64, tied=False).items():
        weight = torch.randn(*shape, generator=generator).mul_(0.02)
        sides[0][name] = weight.bfloat16()
        if len(shape) == 2:
            weight.add_(torch.randn(*shape, generator=generator), alpha=5e-5)
            left, right = (torch.randn(length, len(SPIKES), generator=generator) for length in shape)
            weight.addmm_(left * SPIKES, right.T, alpha=2e-5)
        sides[1][name] = weight.bfloat16()
    for side, tensors in zip(("base", "aligned"), sides, strict=True):
        (folder / side).mkdir(parents=True)
        save_file(tensors, folder / side / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="ascending")
    parser.add_argument("--smoke", action="store_true", help="a few layers")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    if min(args.layers) < 1 or list(args.layers) != sorted(set(args.layers)):
        parser.error(f"--layers is {args.layers}, expected ascending numbers over 0")
    rows, peaks, sizes = [], {}, {}
    for layers in (2, 4) if args.smoke else args.layers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            say(f"{layers} layers")
            write(folder, layers)
            paths = [f"--{side}={folder / side}" for side in ("base", "aligned", "out")]
            ran = disk.watched([sys.executable, "-P", "-m", "lox_stream", "run", *paths, "--quiet"])
            sizes[layers] = (folder / "aligned" / "model.safetensors").stat().st_size
        if ran.code:
            return 1
        peaks[layers] = ran.peak_anon_bytes
        size, peak = f"{sizes[layers] / 1e6:.0f} MB", f"{ran.peak_anon_bytes / 2**20:.0f} MiB"
        rows.append((str(layers), size, peak, f"{ran.elapsed_s:.1f} s"))
    heads = ("layers", "a side", "peak of anonymous memory", "time")
    finish("bench_memory", [Table("Llama-3.1-70B in small", heads, tuple(rows))], {"peaks": peaks}, args.results)
    added, grown = (sizes[max(sizes)] - sizes[min(sizes)], peaks[max(peaks)] - peaks[min(peaks)])
    if args.smoke or grown <= MOST_GROWTH * added:
        return 0
    say(f"the memory grew by {grown} bytes for {added} more bytes a side, expected {MOST_GROWTH} of it at most")
    return 1


if __name__ == "__main__":
    sys.exit(main())
