#!/usr/bin/env python3
"""The cost model of `--dry-run --assume` against computations that were measured: benchmarks/results/stream.json.

    python benchmarks/check_model.py          seconds: the pairs' headers are made, their weights are not

The model's rates are those of one core of the machine that stream.json names, so what is shown is how well it adds up
over shapes: predicted "cores busy" against the computation alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import giants
import pairs
from harness import ROOT, Table, finish

from lox_stream import plan
from lox_stream.predicting import Machine, predict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    measured = json.loads((ROOT / "benchmarks" / "results" / "stream.json").read_text())
    cores = measured["machine"]["cores"]
    rows, errors = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, figures in measured["pairs"].items():
            folders = [Path(scratch) / name / side for side in ("base", "aligned")]
            for folder in folders:
                giants.write(folder, giants.shards_of(iter(pairs.MODELS[name].shapes.items())))
            predicted = predict(plan(*folders), Machine(cores=cores)).busy_s["cores"]
            taken = figures["alone"]["median_s"]
            errors[name] = predicted / taken - 1
            rows.append((name, f"{predicted:.2f} s", f"{taken:.2f} s", f"{errors[name]:+.0%}"))
    heads = ("pair", "predicted", f"measured, {cores} cores of {measured['machine']['cpu']}", "error")
    finish("check_model", [Table("Computation alone", heads, tuple(rows))], {"errors": errors}, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
