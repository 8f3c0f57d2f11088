#!/usr/bin/env python3
"""The cost model of `--dry-run --assume` against what was measured: computation, whole runs, and the host's memory.

    python benchmarks/check_model.py            two minutes: a held-out model is made and run
    python benchmarks/check_model.py --smoke    seconds: two of its layers

The rates of a core were fitted to the three pairs of benchmarks/results/stream.json, so that those only show how well
the model adds up over shapes. The held-out one is Llama-3.1-70B with every dimension divided by 16 (bench_memory.py),
made and measured here. The disk's rate is that of the same reads and writes with nothing computed, each pair's own.

On a machine that does other things a clock measures these too, so the processor time of the computation is beside it,
and the error of the held-out model is that of the processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import bench_memory
import disk
import giants
import pairs
from bench_stream import Discard
from harness import ROOT, Table, Timing, cores, finish, machine, others_share, say

from lox_stream import plan
from lox_stream.pipeline import compute
from lox_stream.predicting import Machine, predict
from lox_stream.synthetic import write_pair

LAYERS, REPEATS = 80, 3
HELD_OUT = "70B in small"


@dataclass(frozen=True, slots=True)
class Measured:
    """A pair and what it took; from a run, the time and memory of one with nothing to do are taken off."""

    folder: Path
    cores: int
    alone_s: float  # the computation alone
    processor_s: float  # of all threads
    floor_s: float  # the same reads and writes, with nothing computed
    run_s: float
    peak_bytes: int


def known(scratch: Path, own_bytes: int) -> dict[str, Measured]:
    """The pairs of stream.json, of which the headers are made and the weights are not."""
    record = json.loads((ROOT / "benchmarks" / "results" / "stream.json").read_text())
    found = {}
    for name, figures in record["pairs"].items():
        for side in ("base", "aligned"):
            giants.write(scratch / name / side, giants.shards_of(iter(pairs.MODELS[name].shapes.items())))
        found[name] = Measured(
            scratch / name,
            record["machine"]["cores"],
            figures["alone"]["median_s"],
            figures["alone"]["cpu_s"],
            figures["floor"]["median_s"],
            figures["run"]["median_s"] - figures["startup"]["median_s"],
            figures["peak_anon_bytes"]["4GiB"] - own_bytes,
        )
    return found


def held_out(scratch: Path, layers: int, repeats: int) -> tuple[Measured, disk.Ran]:
    """70B in small, measured here; and a run of next to nothing."""
    say(f"making {HELD_OUT}, {layers} layers")
    folder, tiny = scratch / "held", scratch / "tiny"
    write_pair(tiny, pairs.TINY.shapes)
    bench_memory.write(folder, layers)
    sides = [sorted((folder / side).glob("*.safetensors")) for side in ("base", "aligned")]
    files = [path for side in sides for path in side]
    made = plan(folder / "base", folder / "aligned")
    alone, floors, runs, startups = Timing(), Timing(), [], []

    def work() -> None:
        for _ in compute(made.steps, Discard, made.options):
            pass

    for turn in range(repeats):
        say(f"repetition {turn + 1} of {repeats}")
        pairs.warm(files)
        alone.take(work)
        pairs.cool(files)
        floors.take(partial(disk.floor, sides, folder / f"floor{turn}"))
        startups.append(run(tiny, f"out{turn}"))
        pairs.cool(files)
        runs.append(run(folder, f"out{turn}"))
    startup = min(startups, key=lambda one: one.elapsed_s)
    return Measured(
        folder,
        cores(),
        alone.median,
        statistics.median(alone.cpu_s),
        floors.median,
        statistics.median(one.elapsed_s for one in runs) - startup.elapsed_s,
        max(one.peak_anon_bytes for one in runs) - startup.peak_anon_bytes,
    ), startup


def run(folder: Path, out: str) -> disk.Ran:
    """`lox-stream run` of the pair in a folder."""
    paths = [f"--base={folder / 'base'}", f"--aligned={folder / 'aligned'}", f"--out={folder / out}"]
    ran = disk.watched([sys.executable, "-P", "-m", "lox_stream", "run", *paths, "--quiet"])
    if ran.code:
        raise SystemExit(f"check_model: lox-stream ended with exit code {ran.code}")
    return ran


def rows_of(name: str, one: Measured) -> tuple[dict[str, float], list[tuple[str, ...]]]:
    """Errors, and a row for each of the three tables."""
    made = plan(one.folder / "base", one.folder / "aligned")
    assumed = Machine(cores=one.cores)
    moved = predict(made, assumed)
    disk_rate = (moved.read_bytes + moved.written_bytes) / one.floor_s
    predicted = predict(made, replace(assumed, disk=disk_rate))
    core_s, whole_s = predicted.busy_s["cores"], predicted.elapsed_s
    assert whole_s is not None, "disk and cores are known"
    taken_s = one.processor_s / one.cores if name == HELD_OUT else one.alone_s
    errors = {"computation": core_s / taken_s - 1, "run": whole_s / one.run_s - 1}
    label = f"{name} ({'held out' if name == HELD_OUT else 'fitted'})"
    times = f"{one.alone_s:.2f} s", f"{one.processor_s / one.cores:.2f} s"
    mib = [f"{n_bytes / 2**20:.0f} MiB" for n_bytes in (predicted.host_bytes, one.peak_bytes)]
    within = one.peak_bytes / predicted.host_bytes
    return errors | {"memory": within}, [
        (label, f"{core_s:.2f} s", *times, f"{errors['computation']:+.1%}"),
        (label, f"{whole_s:.2f} s", f"{one.run_s:.2f} s", f"{errors['run']:+.1%}"),
        (label, *mib, f"{within:.0%}"),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two layers of the held-out model")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args(argv)
    errors, rows = {}, []
    others = others_share()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        held, startup = held_out(scratch, *((2, 1) if args.smoke else (LAYERS, REPEATS)))
        for name, one in {**known(scratch, startup.peak_anon_bytes), HELD_OUT: held}.items():
            errors[name], found = rows_of(name, one)
            rows.append(found)
    alone, whole, memory = (tuple(column) for column in zip(*rows, strict=True))
    busy = (
        f"The fitted pairs as in stream.json; the held-out one on {cores()} cores of {machine()['cpu']}, of which "
        f"other work took {others:.0%} just before."
    )
    tables = [
        Table(
            "Computation alone", ("pair", "predicted", "measured", "processor time of a core", "error"), alone, (busy,)
        ),
        Table("Whole runs, cold, start-up taken off", ("pair", "predicted at least", "measured", "error"), whole),
        Table("Memory of the host, without that of a run of nothing", ("pair", "at most", "measured", "of it"), memory),
    ]
    finish("check_model", tables, {"errors": errors, "others_share": round(others, 2)}, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
