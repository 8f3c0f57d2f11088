"""`lox-stream analyze` as a command: tables, files, JSON, and what it refuses."""

from __future__ import annotations

import csv
import doctest
import json
import shutil

import pytest
from click.testing import CliRunner

from lox_stream import cli_analyze
from lox_stream.cli import commands
from lox_stream.synthetic import llama_shapes, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), llama_shapes(64, 96, 2, 128, 32))


def lox(*words):
    """The command in this process."""
    return CliRunner().invoke(commands, [str(word) for word in words], prog_name="lox-stream")


def of(pair, *words):
    return lox("analyze", "--base", pair[0], "--aligned", pair[1], *words)


def test_the_examples_hold():
    assert doctest.testmod(cli_analyze).failed == 0


def test_tables_and_advice_are_shown_and_files_written(pair, tmp_path):
    ran = of(pair, "--out", tmp_path / "new" / "analysis", "--finetuned", pair[1])
    assert ran.exit_code == 0, ran.stderr
    assert "model.layers.*.mlp.up_proj.weight" in ran.stdout
    assert "█" in ran.stdout
    assert "They look like a pair" in ran.stdout
    assert "R_ft / R_align is 1.000" in ran.stdout
    found = json.loads((tmp_path / "new" / "analysis" / "analysis.json").read_text())
    with (tmp_path / "new" / "analysis" / "analysis.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one["name"] for one in found["matrices"]]
    for row, one in zip(rows, found["matrices"], strict=True):
        assert float(row["energy_6"]) == pytest.approx(one["energy"][5])
        assert float(row["s_1"]) == one["singular_values"][0]
        assert float(row["r_ft"]) == one["ours"]["r_ft"]
    assert found["totals"]["robustness"]["reference"]["left"] == pytest.approx(1.0)


def test_json_is_one_document_and_the_rank_and_alpha_are_in_the_grid(pair):
    ran = of(pair, "--json", "--rank", "2", "--alpha", "0.7", "--ranks", "1,4", "--alphas", "1", "--only", "*up_proj*")
    found = json.loads(ran.stdout)
    assert len(found["matrices"]) == 2
    cells = {(cell["rank"], cell["alpha"], cell["rounding"]) for cell in found["totals"]["retention"]}
    assert cells == {(k, alpha, way) for k in (1, 2, 4) for alpha in (0.7, 1.0) for way in ("nearest", "stochastic")}
    assert "*up_proj*" in found["options"]["only"]
    assert found["copied"]["model.norm.weight"] == "skipped"


def test_quiet_says_nothing(pair, tmp_path):
    ran = of(pair, "--quiet", "--out", tmp_path / "out")
    assert (ran.stdout, ran.stderr, ran.exit_code) == ("", "", 0)
    assert (tmp_path / "out" / "analysis.json").exists()


def test_an_analysis_is_never_replaced(pair, tmp_path):
    (tmp_path / "analysis.json").write_text("mine")
    ran = of(pair, "--out", tmp_path)
    assert ran.exit_code == 1
    assert "analysis.json: is there already" in ran.stderr
    assert (tmp_path / "analysis.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["analysis.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rank", "0"), "--rank 0: expected 1 or more"),
        (("--ranks", "1,x"), "--ranks 1,x: expected numbers"),
        (("--alphas", "1,1"), "--alphas is 1,1, which names 1 twice"),
        (("--alphas", "nan"), "--alphas is nan, expected a finite number"),
        (("--rungs", "1"), "--rungs is given, expected --ladder too"),
        (("--alphas", "0,1"), "expected numbers other than 0"),
        (("--alpha", "1,2"), "--alpha 1,2: expected one factor; the others go to --alphas"),
        (("--values", "1000"), "--values 1000"),
        (("--only", "*norm*"), "no matrix"),
    ],
)
def test_what_cannot_be_obeyed_is_usage_2(pair, words, said):
    ran = of(pair, *words)
    assert ran.exit_code == 2
    assert said in ran.stderr


def test_a_recipe_says_what_is_looked_at(pair, tmp_path):
    (tmp_path / "mlp.toml").write_text('rank = 3\n[[group]]\nmatch = "*self_attn*"\nskip = true\n')
    ran = of(pair, "--json", "--recipe", tmp_path / "mlp.toml")
    found = json.loads(ran.stdout)
    assert found["options"]["rank"] == 3
    assert not any("self_attn" in one["name"] for one in found["matrices"])


def test_a_page_is_written_of_an_analysis_and_of_a_run_and_nothing_is_replaced(pair, tmp_path):
    assert of(pair, "--out", tmp_path / "found", "--report", tmp_path / "a.html", "--only", "*mlp*").exit_code == 0
    assert lox("run", "--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out").exit_code == 0
    for source, name in (("found", "b.html"), ("found/analysis.json", "c.html"), ("out", "d.html")):
        ran = lox("report", tmp_path / source, "--report", tmp_path / name)
        assert (ran.exit_code, ran.stderr) == (0, f"wrote {tmp_path / name}\n")
    assert (tmp_path / "b.html").read_text() == (tmp_path / "c.html").read_text() == (tmp_path / "a.html").read_text()
    again = lox("report", tmp_path / "out", "--report", tmp_path / "d.html")
    assert again.exit_code == 1
    assert "is there already" in again.stderr


def test_figures_are_drawn_into_a_new_folder(pair, tmp_path):
    assert of(pair, "--figures", tmp_path / "figures", "--quiet").exit_code == 0
    names = ("energy", "layers", "retention", "spectra")
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all((tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    assert "mlp.up_proj" in (tmp_path / "figures" / "energy.svg").read_text()
    again = of(pair, "--figures", tmp_path / "figures")
    assert again.exit_code == 1
    assert "expected a new or empty folder" in again.stderr


def test_an_analysis_with_numbers_that_are_none_and_a_pair_without_a_difference_are_no_bugs(pair, tmp_path):
    assert of(pair, "--out", tmp_path / "found", "--only", "*mlp*", "--quiet").exit_code == 0
    document = tmp_path / "found" / "analysis.json"
    found = json.loads(document.read_text())
    found["matrices"][0]["stable_rank"] = float("nan")
    document.write_text(json.dumps(found))
    assert lox("report", document, "--report", tmp_path / "page.html").exit_code == 0
    shutil.copytree(pair[0], tmp_path / "same")
    ran = lox("analyze", "--base", pair[0], "--aligned", tmp_path / "same", "--figures", tmp_path / "figures")
    assert ran.exit_code == 0, ran.stderr
    assert "no figures are drawn" in ran.stderr


def test_what_is_no_run_and_no_analysis_is_told(pair, tmp_path):
    (tmp_path / "analysis.json").write_text('{"options": {}}')
    for source, said in (
        (tmp_path, "is no analysis of this version"),
        (pair[0], "is not a finished output"),
        ("x", "no such"),
    ):
        ran = lox("report", source, "--report", tmp_path / "page.html")
        assert ran.exit_code == 1
        assert said in ran.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_ladder_is_written_beside_the_analysis(pair, tmp_path):
    words = ("--ladder", tmp_path / "rung-{k}", "--rungs", "0,2", "--only", "*mlp*")
    ran = of(pair, *words)
    assert ran.exit_code == 0, ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rung-0", "rung-2"]
    assert (tmp_path / "rung-0" / "model.safetensors").read_bytes() == (pair[0] / "model.safetensors").read_bytes()
    again = of(pair, *words)
    assert again.exit_code == 1
    assert "holds a finished model, expected a new or empty folder" in again.stderr
    assert of(pair, "--ladder", tmp_path / "rung").exit_code == 2
