#!/usr/bin/env python3
"""Several outputs of one solve against a run for each; an adapter, and merging it.

    python benchmarks/bench_outputs.py --models 135m,4096      a minute or two each, the pairs not counted
    python benchmarks/bench_outputs.py --smoke                 tiny, one repetition

Warm files in, files out and synced, start-up of Python and torch not counted. All ways are checked before they are
timed: the outputs of one solve have to be those of the adapter merged with each alpha.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import pairs
from harness import Table, Timing, WrongResult, alternate, finish, parsed, say

from lox_stream import Options, execute_all, extrapolate, plan_all

ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5)
LARGEST = max(ALPHAS)


class Ways:
    """Each writes into a folder of its own, anew every time."""

    def __init__(self, pair: pairs.Pair, work: Path) -> None:
        self._pair, self._work = pair, work

    def _fresh(self, name: str) -> Path:
        out = self._work / name
        shutil.rmtree(out, ignore_errors=True)
        return out

    def one(self, alpha: float = LARGEST) -> None:
        extrapolate(self._pair.base, self._pair.aligned, self._fresh(f"one-{alpha}"), options=Options(alpha=alpha))

    def each(self) -> None:
        """A run for each alpha."""
        for alpha in ALPHAS:
            self.one(alpha)

    def together(self, *, factors: bool = False) -> None:
        """One run for all alphas, and for the adapter too."""
        ways = [(self._fresh(f"of-{alpha}"), Options(alpha=alpha, solved_for=LARGEST)) for alpha in ALPHAS]
        if factors:
            ways.append((self._fresh("factors"), Options(form="peft", alpha=LARGEST, solved_for=LARGEST)))
        execute_all(plan_all(self._pair.base, self._pair.aligned, ways))

    def adapter(self) -> None:
        options = Options(form="peft", alpha=LARGEST)
        extrapolate(self._pair.base, self._pair.aligned, self._fresh("adapter"), options=options)

    def apply(self, alpha: float = LARGEST) -> None:
        options = Options(alpha=0.0, scaling=alpha)
        extrapolate(self._pair.aligned, self._work / "adapter", self._fresh("merged"), options=options)

    def check(self) -> int:
        """Bytes of the adapter; raises WrongResult."""
        self.adapter()
        self.together()
        for alpha in ALPHAS:
            self.apply(alpha)
            if not _same(self._work / "merged", self._work / f"of-{alpha}"):
                raise WrongResult(f"{self._pair.model.name}: alpha {alpha}: the merged adapter is another output")
        return sum(path.stat().st_size for path in (self._work / "adapter").glob("*.safetensors"))


def _same(folder: Path, other: Path) -> bool:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return bool(names) and all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def measure(pair: pairs.Pair, work: Path, repeats: int) -> tuple[dict[str, Timing], int]:
    """Seconds of each way, in turns, and the bytes of the adapter."""
    ways = Ways(pair, work)
    size = ways.check()
    pairs.warm(pair.files)
    works = {
        "one": ways.one,
        "each": ways.each,
        "together": ways.together,
        "with adapter": lambda: ways.together(factors=True),
        "adapter": ways.adapter,
        "apply": ways.apply,
    }
    return alternate(repeats, works, warm_up=False), size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="135m", help=f"of {', '.join(pairs.MODELS)}; default 135m")
    parser.add_argument("--work", type=Path, help="folder for the pairs, which stay there; default: a temporary one")
    parser.add_argument("--smoke", action="store_true", help="tiny, one repetition")
    args = parsed(parser, argv, 5)
    models = [pairs.SMOKE] if args.smoke else [pairs.MODELS[name] for name in args.models.split(",")]
    lines, records = [], []
    with tempfile.TemporaryDirectory(prefix="bench-outputs-") as temporary:
        for model in models:
            pair = pairs.make(model, args.work or Path(temporary))
            say(f"{model.name}: timing")
            timings, size = measure(pair, Path(temporary), 1 if args.smoke else args.repeat)
            one = timings["one"].median
            cells = [f"{timing}, {timing.median / one:.2f}x" for timing in timings.values()]
            lines.append((model.name, *cells, f"{size:,}"))
            records.append(
                {
                    "model": model.name,
                    "adapter_bytes": size,
                    "output_bytes": pair.output_bytes,
                    "seconds": {name: timing.record() for name, timing in timings.items()},
                }
            )
    heads = ("pair", "one run", "5 runs", "5 alphas at once", "and the adapter", "adapter alone", "apply", "its bytes")
    table = Table("Several outputs of one solve: medians, p20 to p80, and times one run", heads, tuple(lines))
    finish("bench_outputs", [table], {"alphas": ALPHAS, "cases": records}, args.results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WrongResult as problem:
        sys.exit(f"wrong result: {problem}")
