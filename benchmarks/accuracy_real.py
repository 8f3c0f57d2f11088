#!/usr/bin/env python3
"""Measure on the real pair what docs/accuracy.md quotes, and write it to benchmarks/results/real_pair_accuracy.json.

Which share of the output's elements equals the float64 oracle; which share equals the arithmetic of the paper's own
script (bf16 difference, float32 full SVD); and how much of the update survives the rounding, by alpha and by mode.
Counted over the elements of all matrices; vectors are copies.

    .venv-real/bin/python benchmarks/accuracy_real.py --pair build/real/pair      (2 minutes)

Exits with 1 when the law of the tests (99.95 % identical to the oracle) does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from oracle import Weights, authors_output, decompose, rounded_once, same_bits
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "real_pair_accuracy.json"
RANK = 6
LAW = 0.9995
RUNS = tuple((alpha, rounding) for alpha in (1.25, 0.5) for rounding in ("nearest", "stochastic"))


@dataclass(slots=True)
class Tally:
    """Sums over the tensors of one run; `counts` of elements, the two products for retention."""

    counts: Counter[str] = field(default_factory=Counter)
    kept: float = 0.0  # <rounded - W1, update>
    update: float = 0.0  # |update|^2
    worst: tuple[float, str, float] = (1.0, "", 1.0)  # share of a matrix identical to the oracle, its name, its gap


def extrapolate(pair: Path, out: Path, alpha: float, rounding: str) -> Weights:
    options = ["--rank", str(RANK), "--alpha", str(alpha), "--rounding", rounding, "--quiet"]
    paths = ["--base", str(pair / "base"), "--aligned", str(pair / "aligned"), "--out", str(out)]
    subprocess.run([sys.executable, "-P", "-m", "lox_stream", "run", *paths, *options], check=True)
    return Weights(out)


def add_matrix(tally: Tally, name: str, w1: Tensor, out: Tensor, update: Tensor, gap: float, authors: Tensor) -> None:
    """Count one matrix (m, n) of a run; `update` is the exact one in float64."""
    right = rounded_once(w1.double() + update, w1.dtype)
    same = same_bits(out, right)
    tally.counts["elements"] += out.numel()
    tally.counts["oracle"] += same
    tally.counts["authors"] += same_bits(out, authors)
    tally.counts["authors_oracle"] += same_bits(authors, right)
    tally.kept += float(torch.sum((out.double() - w1.double()) * update))
    tally.update += float(torch.sum(update * update))
    tally.worst = min(tally.worst, (same / out.numel(), name, gap))


def measure(pair: Path, outputs: dict[tuple[float, str], Weights]) -> dict[tuple[float, str], Tally]:
    """One SVD of each kind for a matrix serves all runs."""
    tallies = {run: Tally() for run in outputs}
    base, aligned = Weights(pair / "base"), Weights(pair / "aligned")
    for name in aligned:
        w1, w0 = aligned[name], base[name]
        if w1.ndim == 1:
            continue
        exact = decompose(w1, w0, RANK)
        authors = {alpha: authors_output(w1, w0, RANK, alpha) for alpha in {alpha for alpha, _ in outputs}}
        for (alpha, rounding), out in outputs.items():
            args = (name, w1, out[name], exact.update(alpha), exact.gap, authors[alpha])
            add_matrix(tallies[alpha, rounding], *args)
    return tallies


def summary(alpha: float, rounding: str, tally: Tally) -> dict[str, Any]:
    elements = tally.counts["elements"]
    return {
        "alpha": alpha,
        "rounding": rounding,
        "identical_to_oracle": tally.counts["oracle"] / elements,
        "identical_to_authors": tally.counts["authors"] / elements,
        "authors_identical_to_oracle": tally.counts["authors_oracle"] / elements,
        "worst_matrix": {"name": tally.worst[1], "identical_to_oracle": tally.worst[0], "gap": tally.worst[2]},
        "retention": tally.kept / tally.update,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Stochastic rounding is meant to differ from the oracle: its shares say how often."""
    lines = [
        f"{'alpha':>5}  {'rounding':<10}  {'= oracle':>9}  {'= authors':>9}  {'authors = oracle':>16}  {'kept':>7}"
    ]
    for row in rows:
        shares = "  ".join(
            f"{row[key]:>{width}.{digits}%}"
            for key, width, digits in (
                ("identical_to_oracle", 9, 4),
                ("identical_to_authors", 9, 4),
                ("authors_identical_to_oracle", 16, 4),
                ("retention", 7, 1),
            )
        )
        lines.append(f"{row['alpha']:>5}  {row['rounding']:<10}  {shares}")
    worst = rows[0]["worst_matrix"]
    lines.append(f"worst matrix at alpha {rows[0]['alpha']}: {worst['name']}, {worst['identical_to_oracle']:.3%} "
                 f"identical to the oracle, gap {worst['gap']:.4f}")  # fmt: skip
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=Path("build/real/pair"), help="folder with base/ and aligned/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    torch.set_num_threads(1)  # LAPACK on matrices of 576 columns is faster on one thread
    with tempfile.TemporaryDirectory() as folder:
        outputs = {
            (alpha, rounding): extrapolate(args.pair, Path(folder) / f"{alpha}-{rounding}", alpha, rounding)
            for alpha, rounding in RUNS
        }
        rows = [summary(*run, tally) for run, tally in measure(args.pair, outputs).items()]
    record = {
        "benchmark": "accuracy_real",
        "command": "python benchmarks/accuracy_real.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": cpu_name(),
        "versions": {"lox-stream": version("lox-stream"), "torch": torch.__version__, "python": sys.version.split()[0]},
        "pair": json.loads((args.pair / "pair.json").read_text()),
        "rank": RANK,
        "runs": rows,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(record, indent=2) + "\n")
    print(table(rows))
    print(json.dumps(record))
    return 0 if rows[0]["identical_to_oracle"] >= LAW else 1


if __name__ == "__main__":
    sys.exit(main())
