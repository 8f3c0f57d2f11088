"""`lox-stream bench`: the float64 reference, each solver, the judge, and the command."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from lox_stream import comparing
from lox_stream.cli import commands
from lox_stream.comparing import Case, Judge, LeftOut, Measured, PeakMemory, compare, fastest, ranking, verdict
from lox_stream.contenders import CONTENDERS, Contender, Found, Problem
from lox_stream.errors import DataError
from lox_stream.kernels.cpu import in_order
from lox_stream.reference import Bands, leading
from lox_stream.synthetic import llama_shapes, matrix, pair_of, power_law, write_pair
from lox_stream.workers import Workers

RANK = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def weights():
    return pair_of(160, 128, generator())


@pytest.fixture(scope="module")
def case(weights):
    w0, w1 = weights
    delta = Bands(w1, w0)
    return Case("w", delta, RANK, leading(delta, RANK))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), llama_shapes(208, 216, 2, 224, 16))


def bench(pair, *words):
    arguments = ["bench", "--base", pair[0], "--aligned", pair[1], "--repeat", 1, *words]
    return CliRunner().invoke(commands, [str(word) for word in arguments], prog_name="lox-stream")


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (400, 400)])
@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("spectrum", ["power", "noise"])
def test_the_reference_is_lapacks_full_svd(shape, rank, spectrum):
    count = min(shape)
    s = (
        power_law(count)
        if spectrum == "power"
        else torch.linalg.svdvals(torch.randn(count, count, generator=generator()))
    )
    w0 = torch.randn(shape, generator=generator(1))
    delta = Bands(w0 + matrix(*shape, s, generator(2)), w0)
    iterated, full = leading(delta, rank, lapack_up_to=0), leading(delta, rank, lapack_up_to=1024)
    assert len(iterated.s) == rank + 1
    assert torch.allclose(iterated.s, full.s, rtol=1e-12)
    part, exact = ((x.u[:, :rank] * x.s[:rank]) @ x.vh[:rank] for x in (iterated, full))
    assert float((part - exact).norm()) <= 1e-9 * float(exact.norm())
    assert iterated.gap(rank) == pytest.approx(full.gap(rank), abs=1e-10)


def test_a_reference_that_does_not_settle_is_an_error_and_no_reference(monkeypatch):
    monkeypatch.setattr("lox_stream.reference.MOST_STEPS", 2)
    w0, w1 = pair_of(300, 200, generator())
    with pytest.raises(DataError, match="did not settle in 2 steps"):
        leading(Bands(w1, w0), RANK, lapack_up_to=0)


def test_a_reference_in_bands_is_the_same(monkeypatch):
    w0, w1 = pair_of(300, 200, generator())
    whole = leading(Bands(w1, w0), RANK, lapack_up_to=0)
    monkeypatch.setattr("lox_stream.reference.KEPT_BYTES", 0)
    monkeypatch.setattr("lox_stream.reference.BAND_ELEMENTS", 7000)
    delta = Bands(w1, w0)
    assert len(delta.slices) == 9
    assert torch.allclose(leading(delta, RANK, lapack_up_to=0).s, whole.s, rtol=1e-12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("shape", [(160, 128), (128, 160)])
def test_each_solver_finds_the_rank_k_part_at_its_dearest(name, shape):
    contender = CONTENDERS[name]
    w0, w1 = pair_of(*shape, generator())
    exact = leading(Bands(w1, w0), RANK)
    found = contender.solve(Problem(w1, w0, RANK, 1.25, 1, in_order), contender.values[-1])
    assert found.u.shape == (shape[0], RANK)
    assert found.vh.shape == (RANK, shape[1])
    assert torch.allclose(found.s.double(), exact.s[:RANK], rtol=1e-3)
    right = Judge(Bands(w1, w0), exact, RANK, 1.25).measure(found)
    assert right["error"] < 2e-3
    assert right["differing"] < 2e-3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["svds-arpack", "svds-lobpcg"])
def test_scipy_is_given_our_operator_for_the_smallest_matrices_too(name):
    """There it solves densely, by products with arrays whose strides are negative."""
    w0, w1 = pair_of(30, 20, generator())
    found = CONTENDERS[name].solve(Problem(w1, w0, RANK, 1.25, 1, in_order), CONTENDERS[name].values[-1])
    assert Judge(Bands(w1, w0), leading(Bands(w1, w0), RANK), RANK, 1.25).measure(found)["error"] < 1e-4


def test_the_judge_measures_what_it_says(case):
    """Against the plain formulas, for a result that is off by a known turn of its last direction."""
    exact = case.leading
    u, s, vh = exact.u[:, :RANK].clone(), exact.s[:RANK], exact.vh[:RANK].clone()
    turn = 0.01
    u[:, -1] = math.cos(turn) * u[:, -1] + math.sin(turn) * exact.u[:, RANK]
    vh[-1] = math.cos(turn) * vh[-1] + math.sin(turn) * exact.vh[RANK]
    right = Judge(case.delta, exact, RANK, 1.25).measure(Found(u, s, vh))
    part, found = (exact.u[:, :RANK] * s) @ exact.vh[:RANK], (u * s) @ vh
    delta = case.delta.w1.double() - case.delta.w0.double()
    assert right["error"] == pytest.approx(float((found - part).norm() / part.norm()), rel=1e-6)
    assert right["angle"] == pytest.approx(turn, rel=1e-9)
    lost = 1 - float((delta @ vh.T).square().sum() / s.square().sum())
    assert right["energy_lost"] == pytest.approx(lost, rel=1e-6)
    out, true = ((case.delta.w1.double() + 1.25 * x).bfloat16() for x in (found, part))
    assert right["differing"] == pytest.approx(float((out != true).double().mean()), abs=2e-4)
    assert Judge(case.delta, exact, RANK, 1.25).measure(Found(exact.u[:, :RANK], s, exact.vh[:RANK]))["error"] < 1e-7


def test_a_sweep_ends_where_float32_does_and_a_failure_is_said(case):
    calls = []

    def solve(problem, value):
        calls.append(value)
        if value == 3:
            raise RuntimeError("no convergence\nat all")
        exact = case.leading
        s = exact.s[:RANK] * (1.1 if value == 1 else 1.0)
        return Found(exact.u[:, :RANK], s, exact.vh[:RANK])

    good = Contender("good", "knob", (1, 2, 3), solve)
    bad = Contender("bad", "knob", (3, 1), solve)
    absent = Contender("absent", "knob", (1,), solve, needs="no_such_package")
    slow = Contender("slow", "knob", (1,), solve, flops=(1e9, 1e9))
    with Workers(1) as workers:
        rows = list(compare(case, [good, bad, absent, slow], workers, alpha=1.25, repeats=2, limit_s=60))
    assert calls == [1, 2, 3, 2, 2]
    measured = [row for row in rows if isinstance(row, Measured)]
    assert [(row.solver, row.value, row.repeats) for row in measured] == [("good", 1, 1), ("good", 2, 2)]
    left = {row.solver: row.why for row in rows if isinstance(row, LeftOut)}
    assert left["bad"] == "knob 3: no convergence"
    assert "pip install '.[bench]'" in left["absent"]
    assert "over the limit of 60 s" in left["slow"]


def test_the_ranking_counts_only_those_that_get_there_on_every_matrix(case):
    row = Measured(
        "a", 4, 4, "bfloat16", 6, 0.1, "x", "k", 1, "", 1.0, 3, None, None, 0.0, 0.0, 0.0, 1e-4, None
    )  # fmt: skip
    rows = [
        row,
        replace(row, value=2, elapsed_s=0.5, differing=2e-3),  # faster, and wrong
        replace(row, case="b", elapsed_s=2.0),
        replace(row, solver="y", elapsed_s=5.0),
        replace(row, solver="y", case="b", elapsed_s=4.0),
        replace(row, solver="z", elapsed_s=0.1),  # on one matrix only
        replace(row, solver="z", case="b", elapsed_s=0.1, differing=1.0),
    ]
    assert fastest(rows[:2], 0.9995) == {"x": row}
    assert ranking(rows, 0.9995) == [("x", 3.0), ("y", 9.0)]
    assert verdict(rows, 0.9995) == (
        "at 99.95 % over 2 matrices, their times added up, the fastest is x, 3.0 times faster than the next, y"
    )
    assert verdict(rows[:3], 0.9995) == (
        "at 99.95 % over 2 matrices, their times added up, x is the only one that gets there, of 1 tried"
    )
    assert verdict(rows, 0.99999) == "at 99.999 % no solver gets there on each of 2 matrices"


def test_peak_memory_is_what_was_held_at_once():
    with PeakMemory() as memory:
        torch.ones(1 << 24)
    assert memory.peak_bytes is None or 60 << 20 <= memory.peak_bytes <= 90 << 20


def test_the_command_shows_a_table_a_shape_and_a_sentence_a_share(pair):
    result = bench(pair, "--solvers", "lox-stream,full,svd_lowrank")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("99.95 % of the elements bit-identical") == 5  # shapes of the pair
    assert "At 99.95 % over 5 matrices, their times added up, the fastest is" in result.stdout
    assert "At 99.99 % over 5 matrices" in result.stdout
    assert "the exact result, in float64" in result.stderr


def test_what_misses_the_share_has_no_time(pair, monkeypatch):
    coarse = replace(CONTENDERS["svd_lowrank"], values=(1,))
    monkeypatch.setitem(CONTENDERS, "svd_lowrank", coarse)
    result = bench(pair, "--solvers", "svd_lowrank,full", "--tensors", "*embed*")
    (line,) = [line for line in result.stdout.splitlines() if "svd_lowrank" in line]
    assert "misses" in line
    assert "ms" not in line
    assert "full is the only one that gets there, of 2 tried" in result.stdout


def test_json_and_files_hold_every_result(pair, tmp_path):
    table, picture = tmp_path / "all.csv", tmp_path / "time.svg"
    words = ("--rank", "2,6", "--per-shape", 2, "--json", "--csv", table, "--picture", picture)
    result = bench(pair, *words, "--solvers", "lox-stream,full", "--tensors", "*q_proj*", "--tensors", "*embed*")
    document = json.loads(result.stdout)
    assert {(row["case"], row["rank"]) for row in document["rows"]} == {
        (name, rank)
        for name in (*(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)), "model.embed_tokens.weight")
        for rank in (2, 6)
    }
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    assert picture.read_text().count("lox-stream") >= 1
    ours = [row for row in document["rows"] if row["solver"] == "lox-stream"]
    assert all(row["method"] == "krylov" and row["predicted"] is not None for row in ours)
    assert set(document["verdicts"]) == {"0.9995", "0.9999"}


def test_the_terminal_plot_names_each_solver(pair):
    result = bench(pair, "--solvers", "lox-stream,full", "--tensors", "*embed*", "--plot")
    assert "a lox-stream" in result.stdout
    assert "b full" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tensors", "*q_porj*"), "matches no matrix"),
        (("--solvers", "lapack"), "no such solver, expected some of lox-stream, full"),
        (("--rank", "six"), "--rank six: expected numbers from 1"),
        (("--rank", "0"), "--rank 0: expected numbers from 1"),
        (("--share", "101"), "--share 101: expected numbers from 1 to 100"),
        (("--repeat", "0"), "--repeat is 0, expected 1 or more"),
        (("--limit", "0"), "--limit is 0"),
        (("--picture", "a.pdf"), "expected a name that ends in .png or .svg"),
        (("--picture", "no/such/a.png"), "the folder does not exist"),
        (("--csv", "no/such/a.csv"), "the folder does not exist"),
        (("--csv", "/"), "--csv /: is a folder"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_before_the_work(pair, monkeypatch, words, message):
    monkeypatch.setattr(comparing, "compare", lambda *rest, **more: pytest.fail("worked"))
    result = bench(pair, *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_matrix_without_a_difference_or_of_too_low_a_rank_is_left_out(tmp_path):
    base, _ = write_pair(tmp_path, {"a.weight": (40, 30), "b.weight": (5, 30)})
    result = bench((base, shutil.copytree(base, tmp_path / "copy")))
    assert result.exit_code == 2
    assert "left out: all on a.weight: base and aligned are the same" in result.stdout
    assert "left out: all on b.weight: rank 6 is not under its short side, 5" in result.stdout


def test_float64_weights_are_compared_as_they_are():
    w1 = torch.eye(3, dtype=torch.float64)
    bands = Bands(w1, torch.zeros(3, 3, dtype=torch.float64) + 1)
    assert torch.equal(w1, torch.eye(3, dtype=torch.float64)), "the aligned weights are not overwritten"
    assert torch.equal(bands[slice(0, 3)], w1 - 1)


def test_a_rank_that_a_matrix_does_not_have_is_said(pair):
    result = bench(pair, "--rank", "2,5000", "--solvers", "full", "--tensors", "*embed*")
    assert result.exit_code == 0
    assert "rank 5000 is not under its short side" in result.stdout


def test_where_nothing_was_compared_nothing_is_concluded(pair, tmp_path):
    result = bench(pair, "--rank", "5000", "--solvers", "full", "--tensors", "*embed*", "--csv", tmp_path / "a.csv")
    assert result.exit_code == 2
    assert "nothing was compared" in result.stderr
    assert not (tmp_path / "a.csv").exists()


def test_a_file_that_cannot_be_written_costs_no_result(pair, tmp_path):
    full = tmp_path / "full.csv"
    full.symlink_to("/dev/full")
    result = bench(pair, "--solvers", "full", "--tensors", "*embed*", "--csv", full)
    assert result.exit_code == 2
    assert "--csv" in result.stderr
    assert "No space left on device" in result.stderr
    assert "At 99.95 %" in result.stdout


def test_a_sweep_that_the_limit_ends_is_said(pair):
    result = bench(pair, "--solvers", "lox-stream", "--tensors", "*embed*", "--limit", "1e-9")
    assert "no further than tolerance 0.1: the next may take over the limit" in result.stdout
