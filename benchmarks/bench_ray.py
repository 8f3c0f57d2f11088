#!/usr/bin/env python3
"""How a run on Ray scales: 1, 2 and 4 workers, each with a disk of its own, as it were.

    python benchmarks/bench_ray.py          five minutes
    python benchmarks/bench_ray.py --smoke  that it works

The workers are Ray nodes of one CPU on this machine. In this benchmark alone, what a worker reads of the inputs and
writes of the output goes through a bucket of so many bytes a second, which stands for its disk: whoever comes waits
until his bytes have run through, reads and writes in one queue. It is so slow that neither the cores nor the real disk
are what a run waits for. A time is that of the whole run, from the plan to the published index, with the start of the
workers' processes (some seconds, in which several share the cores) and not that of the cluster. The output is held
against that of a run without Ray before its time is told. Efficiency: the time of one worker over that of n, times n.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from harness import Table, WrongResult, finish, say
from ray.cluster_utils import Cluster

from lox_stream import Options, extrapolate, on_ray
from lox_stream.planning import Plan
from lox_stream.spreading import plan_spread
from lox_stream.synthetic import llama_shapes, write_pair

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
WORKERS = (1, 2, 4)


def throttled(rate_bps: float) -> Callable[..., Any]:
    """The task that carries out a part, in a worker whose reading and writing pass a bucket of `rate_bps`."""

    def carry_out(wholes: Sequence[Plan], part: str, board: Any) -> Any:
        import threading

        from lox_stream import files, on_ray, reader

        lock, free_s = threading.Lock(), [time.monotonic()]

        def pass_bucket(n_bytes: int) -> None:
            with lock:
                free_s[0] = max(free_s[0], time.monotonic()) + n_bytes / rate_bps
                until_s = free_s[0]
            time.sleep(max(0.0, until_s - time.monotonic()))

        fetch, write_at = reader.Prefetch._fetch, files.write_at

        def slow_fetch(self: Any, info: Any, buffer: Any) -> None:
            pass_bucket(info.n_bytes)
            fetch(self, info, buffer)

        def slow_write(fd: int, data: memoryview, offset: int) -> None:
            pass_bucket(data.nbytes)
            write_at(fd, data, offset)

        with (
            mock.patch.object(reader.Prefetch, "_fetch", slow_fetch),
            mock.patch.object(files, "write_at", slow_write),
        ):
            return on_ray.carry_out(wholes, part, board)

    return carry_out


def measured(pair: tuple[Path, Path], out: Path, workers: int, rate_bps: float) -> float:
    """Seconds of a run on so many workers; the head of the cluster is none of them."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(workers):
            cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        with mock.patch.object(on_ray, "carry_out", throttled(rate_bps)):
            started = time.perf_counter()
            wholes = plan_spread(*pair, [(out, Options())])
            on_ray.execute_on_ray(wholes, cluster.address)
            return time.perf_counter() - started
    finally:
        cluster.shutdown()


def require_same(out: Path, right: Path) -> None:
    for path in right.glob("model*"):
        if (out / path.name).read_bytes() != path.read_bytes():
            raise WrongResult(f"{path.name} differs from that of a run without Ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny pair, one and two workers")
    parser.add_argument("--rate", type=float, default=10e6, help="bytes a second of a worker (default: %(default)g)")
    parser.add_argument("--files", type=int, default=16, help="files of the output (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    hidden, layers = (64, 4) if args.smoke else (1024, 16)
    with tempfile.TemporaryDirectory(prefix="lox-stream-bench-") as temporary:
        work = Path(temporary)
        shapes = llama_shapes(hidden, 2 * hidden, layers, 4 * hidden, hidden // 2)
        pair = write_pair(work, shapes, aligned_shards=args.files)
        right = extrapolate(*pair, work / "right")
        moved = right.read_bytes + right.written_bytes
        times: dict[int, float] = {}
        for workers in WORKERS[:2] if args.smoke else WORKERS:
            say(f"{workers} workers: {moved / 1e6:.0f} MB, some {moved / args.rate / workers:.0f} s")
            times[workers] = measured(pair, work / "out", workers, args.rate)
            require_same(work / "out", right.out)
            shutil.rmtree(work / "out")
    efficiency = {workers: times[1] / (workers * took) for workers, took in times.items()}
    rows = tuple(
        (str(n), f"{took:.1f} s", f"{moved / args.rate / n:.1f} s", f"{times[1] / took:.2f}", f"{efficiency[n]:.0%}")
        for n, took in times.items()
    )
    heads = ("workers", "run", "their disks alone", "speed-up", "efficiency")
    note = f"{moved:,} bytes read and written in {args.files} files, {args.rate / 1e6:g} MB/s a worker; one run each."
    results = {
        "moved_bytes": moved,
        "rate_bps": args.rate,
        "files": args.files,
        "run_s": times,
        "efficiency": efficiency,
    }
    finish("bench_ray", [Table("A run on Ray", heads, rows, (note,))], results, args.results)


if __name__ == "__main__":
    main()
