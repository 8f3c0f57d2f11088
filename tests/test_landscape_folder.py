"""The folder of a landscape: nothing of a stranger is judged or removed, no judge outlives it, no input changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from folders import write

from lox_stream import DataError, OptionError, OutputError
from lox_stream.cli import commands
from lox_stream.errors import InUseError, JudgeError
from lox_stream.judging import TAIL_BYTES, judge_by
from lox_stream.landscape import explore, write_point
from lox_stream.landscape_file import read_landscape

NAME = "model.layers.0.mlp.up_proj.weight"
VERDICTS = [
    *(0.5, None, [("v", 1)], {"v": object()}, {"v": 1, "w": object()}, {"v": float("nan")}, {"v": 10**400}),
    *({"v": 1, "w": [float("inf")]}, {1: 2}, {"=v": 1}, {"\x1b[2J": 1}, {"": 1}, {"x": 1, "v": 1}),
]
SIDES = ("aligned", "lox", "attacked")


def make(folder):
    """Three models of one matrix."""
    g = torch.Generator().manual_seed(5)
    return [write(folder / side, {NAME: torch.randn(64, 64, generator=g).bfloat16()}) for side in SIDES]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def out(models, tmp_path):
    """A landscape that was judged at (0, 0), and may go on to (1, 0)."""
    explore(*models, tmp_path / "out", (0,), (0,), judged)
    return tmp_path / "out"


def judged(folder, x, y):
    return {"n": x + 2 * y}


def run(models, *words):
    sides = zip(("--aligned", "--lox", "--finetuned"), models, strict=True)
    words = ["landscape", *(str(word) for side in sides for word in side), *map(str, words)]
    return CliRunner().invoke(commands, words, prog_name="lox-stream")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("place", [(0.7, 0.9), (1, 0)])
@pytest.mark.parametrize("name", ["x0_y0", "x1_y0"])
def test_a_folder_that_has_only_the_name_of_a_point_is_neither_judged_nor_removed(models, out, tmp_path, name, place):
    aligned, lox, tuned = models
    three = models if place != (1, 0) else (aligned, tuned, lox)  # of the same place in another landscape
    write_point(*three, tmp_path / "mine", place)
    shutil.move(tmp_path / "mine", out / name)
    before = (out / name / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match=rf"{name}: is not the model of this landscape at x"):
        explore(*models, out, (0, 1), (0,), judged)
    assert (out / name / "model.safetensors").read_bytes() == before


def test_a_users_folder_is_refused_before_anything_is_removed(models, out):
    (out / "x1_y0").mkdir()
    (out / "x1_y0" / "thesis.tex").write_text("mine")
    (out / "notes").mkdir()
    with pytest.raises(OutputError, match=r"x1_y0: is not the model .* Move it away"):
        explore(*models, out, (0, 1), (0,), judged)
    assert (out / "x1_y0" / "thesis.tex").read_text() == "mine"
    (out / "x1_y0" / "thesis.tex").unlink()  # what is empty may be a crash's
    explore(*models, out, (0, 1), (0,), judged)
    assert names(out) == ["landscape.csv", "landscape.json", "notes"]


def test_a_point_is_not_written_into_a_landscape(models, out):
    with pytest.raises(OutputError, match="is the folder of a landscape, expected one outside"):
        write_point(*models, out / "x1_y0", (0.7, 0.9))
    assert names(out) == ["landscape.csv", "landscape.json"]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9] + b"123456789"), Path.unlink])
def test_a_model_that_the_failed_judge_damaged_is_made_again(models, out, damage):
    seen = []

    def damaging(folder, x, y):
        seen.append((folder / "model.safetensors").read_bytes())
        damage(folder / "model.safetensors")
        raise JudgeError("not now")

    def looking(folder, x, y):
        seen.append((folder / "model.safetensors").read_bytes())
        return {"n": 1}

    with pytest.raises(JudgeError):
        explore(*models, out, (0, 1), (0,), damaging)
    explore(*models, out, (0, 1), (0,), looking)
    assert seen[0] == seen[1]


def test_places_that_were_never_judged_may_go(models, out):
    with pytest.raises(DataError, match="beyond the range"):
        explore(*models, out, (0, 1e39), (0,), judged)
    assert read_landscape(out).xs == (0, 1e39)
    explore(*models, out, (0,), (0,), judged)
    assert read_landscape(out).xs == (0,)
    assert names(out) == ["landscape.csv", "landscape.json"]


WRITER = "import sys, time, os\nwhile True:\n    os.makedirs(sys.argv[1], exist_ok=True); open(sys.argv[1] + '/a', 'w')"


def test_what_a_judge_leaves_running_ends_with_it_and_writes_no_more(models, tmp_path):
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WRITER!r}, sys.argv[1]]); print(1)"
    judge = judge_by((sys.executable, "-c", start, "{model}"), threading.Event())
    explore(*models, tmp_path / "new", (0, 1), (0,), judge)
    time.sleep(0.3)
    assert names(tmp_path / "new") == ["landscape.csv", "landscape.json"]


def test_a_judge_that_outlives_a_killed_command_is_waited_for(models, tmp_path):
    script = "import os, sys, time; open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(60)"
    sides = [str(word) for side in zip(("--aligned", "--lox", "--finetuned"), models, strict=True) for word in side]
    judge = (sys.executable, "-c", script, "{model}", str(tmp_path / "pid"))
    grid = ("--out", str(tmp_path / "out"), "--x", "0", "--y", "0", "--", *judge)
    process = subprocess.Popen([sys.executable, "-m", "lox_stream", "landscape", *sides, *grid])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    number = int((tmp_path / "pid").read_text())
    try:
        with pytest.raises(InUseError, match=r"x0_y0: a judge that an earlier command started is still at work"):
            explore(*models, tmp_path / "out", (0,), (0,), judged, judged_by=judge)
    finally:
        os.kill(number, signal.SIGKILL)
    time.sleep(0.3)
    assert explore(*models, tmp_path / "out", (0,), (0,), judged, judged_by=judge).points[0].verdict == {"n": 0}


def test_a_model_that_changes_meanwhile_stops_it_before_the_next_point(tmp_path):
    made = make(tmp_path)

    def judge(folder, x, y):
        weights = made[2] / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
        os.utime(weights, ns=(1, 1))
        return {"n": 1}

    seen = []
    with pytest.raises(DataError, match=r"attacked/model.safetensors: was modified since the work began"):
        explore(*made, tmp_path / "out", (0, 1), (0,), judge, progress=lambda at: seen.append(at.working[0][:3]))
    assert set(seen) == {"mea", "x 0"}  # the next one is not begun
    assert [one.place for one in read_landscape(tmp_path / "out").points] == [(0, 0)]
    assert names(tmp_path / "out") == ["landscape.csv", "landscape.json"]


def test_a_model_that_changes_while_a_point_is_made_leaves_no_point(tmp_path):
    made = make(tmp_path)

    def progress(at):
        if at.working[0].startswith("x "):
            os.utime(made[2] / "model.safetensors", ns=(1, 1))

    with pytest.raises(DataError, match="was modified since the work began"):
        explore(*made, tmp_path / "out", (0.5,), (0.5,), judged, progress=progress)
    assert names(tmp_path / "out") == ["landscape.csv", "landscape.json"]


DAMAGE = {
    "nan": lambda said: said["axes"].update(c=float("nan")),
    "inf": lambda said: said["axes"].update(lox_norm=float("inf")),
    "no number": lambda said: said["points"][0].update(verdict={"of": "x"}),
    "a list": lambda said: said["points"][0].update(verdict=[["n", 1]]),
    "off the grid": lambda said: said["points"][0].update(x=5.0),
    "infinite": lambda said: said["points"][0].update(x=float("inf")),
    "twice": lambda said: said["points"].append(said["points"][0]),
    "warnings": lambda said: said.update(warnings=[1]),
    "places": lambda said: said.update(x=[float("nan")]),
    "text": lambda said: said.update(x="12"),
    "huge": lambda said: said["axes"].update(c=10**400),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_document_that_means_nothing_is_told(models, out, case):
    said = json.loads((out / "landscape.json").read_text())
    DAMAGE[case](said)
    (out / "landscape.json").write_text(json.dumps(said))
    with pytest.raises(OutputError, match="is no landscape of this version, or damaged"):
        explore(*models, out, (0, 1), (0,), judged)


@pytest.mark.parametrize("place", [0.5, (0.5,), ("a", 1), (1, 2, 3), (0, float("nan")), "12", None, (10**400, 0)])
def test_what_is_no_point_is_an_option_error(models, tmp_path, place):
    with pytest.raises(OptionError, match=r"the point is .*, expected \(x, y\), two finite numbers"):
        write_point(*models, tmp_path / "out", place)


@pytest.mark.parametrize("xs", [5, None, "12", ("a",), (10**400,), (True,)])
def test_what_is_no_list_of_places_is_an_option_error(models, tmp_path, xs):
    with pytest.raises(OptionError, match=r"x is .*expected finite numbers"):
        explore(*models, tmp_path / "out", xs, (0,), judged)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_what_is_no_verdict_is_a_judge_error(models, tmp_path, verdict):
    with pytest.raises(JudgeError, match=r"the judge at x 0, y 0 said .*, expected "):
        explore(*models, tmp_path / "out", (0,), (0,), lambda folder, x, y: verdict)


def test_a_judge_says_the_same_names_at_each_point(models, out):
    with pytest.raises(JudgeError, match=r"said \{'m': 1\}, expected n in it, as at the points before"):
        explore(*models, out, (0, 1), (0,), lambda folder, x, y: {"m": 1})


def test_a_table_without_its_document_is_kept(models, out):
    (out / "landscape.json").unlink()
    before = (out / "landscape.csv").read_text()
    with pytest.raises(OutputError, match=r"holds landscape.csv and no landscape.json"):
        explore(*models, out, (0,), (0,), judged)
    assert (out / "landscape.csv").read_text() == before
    (out / "landscape.csv").write_text("x,y\n")  # killed before the first document
    explore(*models, out, (0,), (0,), judged)


def test_texts_in_the_table_are_no_formulas(models, tmp_path):
    explore(*models, tmp_path / "out", (0,), (0,), lambda folder, x, y: {"n": 1, "of": "=1+1", "at": "\x1b"})
    assert (tmp_path / "out" / "landscape.csv").read_text().splitlines()[1:] == ['0.0,0.0,1,"""=1+1""","""\\u001b"""']


def test_weights_that_changed_are_not_told_as_another_path(tmp_path):
    made = make(tmp_path)
    explore(*made, tmp_path / "out", (0,), (0,), judged)
    shutil.rmtree(made[2])
    write(made[2], {NAME: torch.ones(64, 64).bfloat16()})
    with pytest.raises(OutputError, match=r"finetuned: the weights of .*attacked have changed"):
        explore(*made, tmp_path / "out", (0, 1), (0,), judged)


def test_a_judge_that_removes_the_landscape_is_told_what_is_lost(models, out):
    with pytest.raises(JudgeError, match=r"landscape.json is gone after the judge at x 1, y 0.*is lost"):
        explore(*models, out, (0, 1), (0,), lambda folder, x, y: shutil.rmtree(folder.parent) or {"n": 1})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--point", "0,0", "--out", "o", "--x", "0,1"), "--x and --y are given without a judge"),
        (("--y", "0,1"), "--x and --y are given without a judge"),
        (("--point", "nan,0", "--out", "o"), "--point is nan,0, expected X,Y, two finite numbers"),
        (("--point", "1/3,0", "--out", "o"), "--point is 1/3,0, expected X,Y"),
    ],
)
def test_options_of_a_grid_need_one(models, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    ran = run(models, *words)
    assert ran.exit_code == 2
    assert said in " ".join(ran.stderr.split())
    assert names(tmp_path) == []


def test_a_program_that_may_not_be_executed_is_told_as_that(tmp_path):
    (tmp_path / "judge").write_text("")
    with pytest.raises(OptionError, match=r"is there, and may not be executed.*chmod \+x"):
        judge_by((str(tmp_path / "judge"), "{model}"), threading.Event())


def test_a_line_that_is_too_long_is_told_as_that(tmp_path):
    script = f"print('[' + '1,' * {TAIL_BYTES} + '1]')"
    with pytest.raises(JudgeError, match=rf"last line is too long, expected one of {TAIL_BYTES} bytes"):
        judge_by((sys.executable, "-c", script, "{model}"), threading.Event())(tmp_path, 0.0, 0.0)


def test_a_picture_may_lie_in_the_new_folder_and_not_in_an_input(models, tmp_path):
    pytest.importorskip("matplotlib")
    grid = ("--out", tmp_path / "new", "--x", "0,1", "--y", "0,1")
    refused = run(models, *grid, "--picture", models[0] / "a.svg", "--", "stat", "-c", "%s", "{model}/config.json")
    assert refused.exit_code == 2
    assert "inputs are never touched" in " ".join(refused.stderr.split())
    drawn = run(models, *grid, "--picture", tmp_path / "new" / "a.svg", "--", "stat", "-c", "%s", "{model}/config.json")
    assert drawn.exit_code == 0, drawn.stderr
    assert names(tmp_path / "new") == ["a.svg", "landscape.csv", "landscape.json"]


@pytest.mark.parametrize("command", ["report", "verify"])
def test_other_commands_say_that_it_is_a_landscape(out, command):
    ran = CliRunner().invoke(commands, [command, str(out)])
    assert ran.exit_code == 1
    assert "is a landscape, expected a finished output" in " ".join(ran.stderr.split())
