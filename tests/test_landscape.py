"""The landscape: where its models lie, that each is made, judged and removed once, and what is refused."""

from __future__ import annotations

import csv
import json
import re
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
from safetensors.torch import load_file, save_file

from lox_stream import Cancelled, CheckpointError, DataError, OptionError, Options, OutputError, ResumeError
from lox_stream.blending import blend_of
from lox_stream.cli import commands
from lox_stream.delta import OutOfRange
from lox_stream.errors import InUseError, JudgeError
from lox_stream.grids import places_of
from lox_stream.judging import judge_by, verdict_of
from lox_stream.landscape import explore, measure_axes, write_point
from lox_stream.landscape_file import read_landscape
from lox_stream.pairing import WRAPPERS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MATRICES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight")
NORM, COUNT = "model.norm.weight", "model.steps"
PLAIN_ONLY = ("1/3", "1_0", "\u0663", "0:1:1_0", "1e-9999999")
TOKENIZER = '{"version": "1.0"}'


def weights(dtype=torch.bfloat16):
    """aligned, lox and finetuned; LoX leaves the norm alone, the fine-tuning does not, and takes some of LoX back."""
    g = torch.Generator().manual_seed(3)
    aligned, lox, finetuned = {}, {}, {}
    for name in (*MATRICES, NORM):
        shape = (48,) if name == NORM else (96, 48)
        w = torch.randn(shape, generator=g, dtype=torch.float64) / 7
        towards = torch.randn(*shape[:-1], 1, generator=g, dtype=torch.float64) * torch.randn(
            48, generator=g, dtype=torch.float64
        )
        d1 = towards * (0.0 if name == NORM else 0.01)
        aligned[name] = w.to(dtype)
        lox[name] = (w + d1).to(dtype)
        finetuned[name] = (w - 0.4 * d1 + torch.randn(shape, generator=g, dtype=torch.float64) / 300).to(dtype)
    for side, count in ((aligned, 1), (lox, 2), (finetuned, 3)):
        side[COUNT] = torch.tensor([count])
    return aligned, lox, finetuned


def make(folder, sides):
    """Folders of the three; aligned's also with a tokenizer."""
    made = [write(folder / name, side) for name, side in zip(("aligned", "lox", "attacked"), sides, strict=True)]
    (made[0] / "tokenizer.json").write_text(TOKENIZER)
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"), weights())


def oracle(sides, x, y):
    """The weights at (x, y) in float64, c, and what each element's float32 arithmetic may be off by."""
    names = [name for name in sides[0] if sides[0][name].dtype.is_floating_point]
    flat = [torch.cat([side[name].double().reshape(-1) for name in names]) for side in sides]
    d1, g = flat[1] - flat[0], flat[2] - flat[0]
    c = float(d1 @ g / (d1 @ d1))
    eps = torch.finfo(torch.float64 if sides[0][names[0]].dtype == torch.float64 else torch.float32).eps
    exact = flat[0] + x * d1 + y * (g - c * d1)
    slack = 4 * eps * (flat[0].abs() + abs(x - c * y) * d1.abs() + abs(y) * g.abs())
    sizes = [sides[0][name].numel() for name in names]
    return dict(zip(names, zip(exact.split(sizes), slack.split(sizes), strict=True), strict=True)), c, d1, g - c * d1


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def raw(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def ulp(values, dtype):
    """The distance of the numbers of a dtype at these values."""
    info = torch.finfo(dtype)
    return (values.abs().clamp_min(info.tiny).log2().floor().exp2()) * info.eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0.5, 0.5), (-1.25, 0.75), (1.5, -2.0), (0.3, 0.0), (0.0, 1.0)])
def test_the_model_at_a_point_is_the_formula_rounded_once(tmp_path, dtype, place):
    sides = weights(DTYPES[dtype])
    exact, *_ = oracle(sides, *place)
    write_point(*make(tmp_path, sides), tmp_path / "out", place)
    found = tensors_of(tmp_path / "out")
    for name, (expected, slack) in exact.items():
        error = (found[name].double().reshape(-1) - expected).abs()
        assert bool((error <= 0.5 * ulp(expected, DTYPES[dtype]) * (1 + 1e-6) + slack).all()), name
        assert found[name].dtype == DTYPES[dtype]
    assert raw(found[COUNT]) == raw(sides[0][COUNT])


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_lox_and_the_finetuned_model_lie_where_they_are_said_to_byte_for_byte(tmp_path, dtype):
    """Also where float32 has not both an element and its difference, and of -0."""
    sides = weights(DTYPES[dtype])
    for side, values in zip(sides, ([1.0, -0.0, 3.0], [1e-7, 2.0, -0.0], [-0.0, 1.0, 1e-7]), strict=True):
        side[NORM][:3] = torch.tensor(values, dtype=DTYPES[dtype])
    made = make(tmp_path, sides)
    c = measure_axes(*made).c
    for side, place in zip(sides, ((0.0, 0.0), (1.0, 0.0), (c, 1.0)), strict=True):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_point(*made, tmp_path / "out", place)
        found = tensors_of(tmp_path / "out")
        for name in (*MATRICES, NORM):
            assert raw(found[name]) == raw(side[name]), (place, name)


def test_the_origin_is_aligned_file_by_file(models, tmp_path):
    write_point(*models, tmp_path / "out", (0.0, 0.0))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models[0] / name).read_bytes()


def test_the_second_direction_is_orthogonal_and_the_axes_are_those_of_float64(models):
    _, c, d1, d2 = oracle(weights(), 0, 0)
    axes = measure_axes(*models)
    assert axes.c == pytest.approx(c, rel=1e-12)
    assert axes.lox_norm == pytest.approx(float(d1.norm()), rel=1e-12)
    assert axes.second_norm == pytest.approx(float(d2.norm()), rel=1e-12)
    assert axes.finetuned_norm**2 == pytest.approx(axes.second_norm**2 + (c * axes.lox_norm) ** 2, rel=1e-12)
    own = d2 + (c - axes.c) * d1  # by the c that is told
    assert abs(float(d1 @ own)) <= 1e-12 * float(d1.norm() * own.norm())
    cosine = float(d1 @ (d2 + c * d1) / (d1.norm() * (d2 + c * d1).norm()))
    assert axes.angle_degrees == pytest.approx(float(torch.tensor(cosine).acos().rad2deg()), abs=1e-4)


def test_neither_files_nor_threads_nor_prefixes_change_a_bit(models, tmp_path):
    sides = weights()
    other = []
    for number, side in enumerate(sides):
        folder = tmp_path / str(number)
        folder.mkdir()
        names = list(side)[:: -1 if number % 2 else 1]
        prefix = WRAPPERS[1] * (number == 2)
        for i, some in enumerate((names[:2], names[2:]), 1):
            save_file({prefix + name: side[name] for name in some}, folder / f"model-0000{i}-of-00002.safetensors")
        index = {prefix + name: f"model-0000{1 if name in names[:2] else 2}-of-00002.safetensors" for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        other.append(folder)
    assert measure_axes(*models, options=Options(threads=1)) == measure_axes(*other, options=Options(threads=2))
    write_point(*models, tmp_path / "a", (0.5, 0.5), options=Options(threads=1))
    summary, _ = write_point(*other, tmp_path / "b", (0.5, 0.5), options=Options(threads=2))
    one, two = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert {name: raw(tensor) for name, tensor in one.items()} == {name: raw(tensor) for name, tensor in two.items()}
    assert any("finetuned" in warning and "prefixes" in warning for warning in summary.warnings)


def test_a_tied_weight_counts_once_and_keeps_both_names_alike(models, tmp_path):
    sides = weights()
    sides[0]["lm_head.weight"] = sides[0][MATRICES[0]].clone()
    config = {"tie_word_embeddings": True, "vocab_size": 96}
    aligned = write(tmp_path / "aligned", sides[0], **config)
    others = [write(tmp_path / name, side, **config) for name, side in zip("lf", sides[1:], strict=True)]
    assert measure_axes(aligned, *others) == measure_axes(*models)
    write_point(aligned, *others, tmp_path / "out", (0.5, 0.5))
    found = tensors_of(tmp_path / "out")
    assert raw(found["lm_head.weight"]) == raw(found[MATRICES[0]])
    assert raw(found[MATRICES[0]]) != raw(sides[0][MATRICES[0]])


def test_a_result_beyond_the_dtype_is_refused_and_never_infinite(tmp_path):
    with pytest.raises(
        DataError, match=r"\.weight: the result is .* beyond the range of float16. Choose points nearer"
    ):
        write_point(*make(tmp_path, weights(torch.float16)), tmp_path / "out", (0.0, 1e8))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    for bad in (float("nan"), float("inf"), 3e38):
        other = torch.ones(70)
        other[41] = bad
        with pytest.raises(OutOfRange):
            blend_of(torch.ones(70).bfloat16(), [(2.0, other)])


def judged(folder, x, y):
    """A number that the weights decide."""
    return {"sum": float(sum(tensor.double().sum() for tensor in tensors_of(folder).values())), "at": f"{x},{y}"}


def test_a_landscape_that_was_stopped_between_points_or_inside_one_is_the_same(models, tmp_path):
    grid = ((0, 0.5, 1), (0, 1))
    whole = explore(*models, tmp_path / "whole", *grid, judged)
    seen = []

    def failing(folder, x, y):
        if len(seen) == 2:
            raise JudgeError("enough")
        seen.append((x, y))
        return judged(folder, x, y)

    out = tmp_path / "parts"
    with pytest.raises(JudgeError):
        explore(*models, out, *grid, failing)
    assert [one.place for one in read_landscape(out).points] == seen == [(0, 0), (0.5, 0)]
    made = list(out.rglob("model.safetensors"))
    assert [path.parent.name for path in made] == ["x1_y0"]  # what was to be judged is kept
    before = made[0].stat().st_mtime_ns
    stop, times = threading.Event(), []

    def look(at):
        if at.working[0].startswith("x 0, y 1") and "judge" not in at.working[0]:
            stop.set()

    def counting(folder, x, y):
        times.append((folder / "model.safetensors").stat().st_mtime_ns)
        return judged(folder, x, y)

    with pytest.raises(Cancelled):
        explore(*models, out, *grid, counting, progress=look, cancel=stop, options=Options(threads=1))
    assert times == [before]  # it was not made again
    assert (out / "x0_y1" / "lox_stream.journal").exists()
    found = explore(*models, out, *grid, judged)
    assert [(one.place, one.verdict) for one in found.points] == [(one.place, one.verdict) for one in whole.points]
    assert found.axes == whole.axes
    assert sorted(path.name for path in out.iterdir()) == ["landscape.csv", "landscape.json"]


KILLING = """
import os, pathlib, sys
model, x, y, flag = sys.argv[1:]
flag = pathlib.Path(flag)
if (x, y) == ("1", "0") and not flag.exists():
    flag.write_text("")
    os.kill(os.getppid(), 9)
print("working")
print({"size": os.path.getsize(model + "/model.safetensors")}.__repr__().replace("'", '"'))
"""


def command(models, *words):
    aligned, lox, attacked = models
    return ["landscape", "--aligned", str(aligned), "--lox", str(lox), "--finetuned", str(attacked), *map(str, words)]


def program(*words):
    return [sys.executable, "-m", "lox_stream", *words]


def test_a_killed_program_goes_on_with_the_same_command(models, tmp_path):
    (tmp_path / "judge.py").write_text(KILLING)
    out, flag = tmp_path / "out", tmp_path / "flag"
    judge = (sys.executable, tmp_path / "judge.py", "{model}", "{x}", "{y}", flag)
    words = program(*command(models, "--out", out, "--x", "0,1", "--y", "0,1", "--quiet", "--", *judge))
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert [one.place for one in read_landscape(out).points] == [(0, 0)]
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (out / "landscape.csv").read_text().splitlines() == [
        "x,y,size",
        *(f"{x},{y},{(models[0] / 'model.safetensors').stat().st_size}" for y in (0.0, 1.0) for x in (0.0, 1.0)),
    ]


def test_the_disk_holds_one_checkpoint_at_a_time_and_in_the_end_none(models, tmp_path):
    out, held = tmp_path / "out", []

    def judge(folder, x, y):
        (folder / "cache").mkdir()
        (folder / "cache" / "of-the-judge").write_text("")
        held.append(sorted(path.name for path in out.iterdir() if path.is_dir()))
        assert folder.is_absolute()
        return {"n": 1}

    explore(*models, out, (0, 1), (0.25,), judge)
    explore(*models, out, (-1, 0, 1), (0.25,), judge)
    assert held == [["x0_y0.25"], ["x1_y0.25"], ["x-1_y0.25"]]
    assert sorted(path.name for path in out.iterdir()) == ["landscape.csv", "landscape.json"]


def test_a_point_whose_model_is_there_is_judged_first_and_one_that_was_judged_is_removed(models, tmp_path):
    out, order = tmp_path / "out", []

    def judge(folder, x, y):
        if order == [(0, 0)] and x == 1:
            raise JudgeError("not now")
        order.append((x, y))
        shutil.copytree(folder, tmp_path / "copy")
        return {"n": 1}

    with pytest.raises(JudgeError):
        explore(*models, out, (0, 1), (0,), judge)
    shutil.copytree(tmp_path / "copy", out / "x0_y0")  # killed before it was removed
    explore(*models, out, (0, 0.5, 1), (0,), lambda folder, x, y: order.append((x, y)) or {"n": 1})
    assert order == [(0, 0), (1, 0), (0.5, 0)]
    assert not (out / "x0_y0").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; print(1); print('first\\nno GPU \\x1b[2J', file=sys.stderr); sys.exit(3)", r"ended with 3, .*"),
        ("print('asr: 0.5')", r"said 'asr: 0.5' on its last line, expected a number"),
        ("", r"said '' on its last line"),
        ("print('nan')", r"said 'nan' on its last line, expected a finite number"),
        ('print(\'{"of": "advbench"}\')', r"expected a number, or a JSON object with one"),
        ("print('{\"x\": 1}')", r"no x or y in it"),
        ("import os; os.kill(os.getpid(), 9)", r"was killed by signal 9, expected 0"),
    ],
)
def test_a_judge_that_fails_stops_it_with_its_last_words_and_nothing_is_lost(models, tmp_path, script, said):
    (tmp_path / "judge.py").write_text("print(0.5)")
    words = command(models, "--out", tmp_path / "out", "--x", "0,1", "--y", "0", "--")
    judge = [sys.executable, str(tmp_path / "judge.py"), "{model}", "{y}"]
    stop = threading.Event()
    explore(*models, tmp_path / "out", (0,), (0,), judge_by(judge, stop), judged_by=judge)
    (tmp_path / "judge.py").write_text(script)
    ran = CliRunner().invoke(commands, [*words, *judge], prog_name="lox-stream")
    assert ran.exit_code == 1
    assert "error: the judge at x 1, y 0: " in ran.stderr
    assert re.search(said, ran.stderr), ran.stderr
    if "GPU" in script:
        assert "\n  first\n  no GPU \\x1b[2J\n" in ran.stderr
    assert [one.verdict for one in read_landscape(tmp_path / "out").points] == [{"value": 0.5}]
    (tmp_path / "judge.py").write_text("print(0.25)")
    ran = CliRunner().invoke(commands, [*words, *judge], prog_name="lox-stream")
    assert ran.exit_code == 0, ran.stderr
    assert [one.verdict for one in read_landscape(tmp_path / "out").points] == [{"value": 0.5}, {"value": 0.25}]


@pytest.mark.parametrize(
    ("judge", "said"),
    [(("python3",), r"expected \{model\} in it"), (("no-such-program", "{model}"), "no such program")],
)
def test_what_is_no_judge_is_refused_before_the_work(judge, said):
    with pytest.raises(OptionError, match=said):
        judge_by(judge, threading.Event())


def test_a_judge_is_run_without_a_shell_and_ends_with_all_that_it_started(tmp_path):
    stop = threading.Event()
    strange = tmp_path / "a $(touch b); {y} 'c'"
    strange.mkdir()
    script = "import sys, json; print(json.dumps({'n': 1, 'told': sys.argv[1:]}))"
    words = (sys.executable, "-c", script, "-m={model}", "{x}/{y}")
    told = judge_by(words, stop)(strange, 0.1, -1.0)["told"]
    assert told == [f"-m={strange}", "0.1/-1"]
    child = tmp_path / "child"
    script = f"import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, file=open({str(child)!r}, 'w'))"
    threading.Timer(0.7, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        judge_by((sys.executable, "-c", f"{script}; p.wait()", "{model}"), stop)(tmp_path, 0.0, 0.0)
    assert time.monotonic() - started < 10
    assert is_gone(int(child.read_text()))


def is_gone(number):
    """Whether a process has ended, or is about to be reaped by whoever adopted it."""
    for _ in range(50):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.1)
    return False


def test_verdicts_are_numbers_or_objects_with_one():
    assert verdict_of("7") == {"value": 7.0}
    for line in (
        '{"asr": 0.5, "nan": NaN}',
        '{"asr": 1' + 400 * "0" + "}",
        '{"asr": 1, "b": [1e999]}',
        '{"=asr": 1}',
        '{"a\\u001b": 1}',
        '{"": 1}',
        "true",
        "[1]",
        '{"ok": true}',
        '{"asr": NaN}',
        '{"y": 1, "asr": 1}',
        "[" * 100000,
    ):
        with pytest.raises(ValueError, match="expected a number"):
            verdict_of(line)


@pytest.mark.parametrize(
    ("text", "places"), [("0:1:11", [i / 10 for i in range(11)]), ("1,-1,0.5", [-1, 0.5, 1]), ("2:-1:2", [-1, 2])]
)
def test_places_are_the_nearest_numbers_to_what_was_asked(text, places):
    assert list(places_of(text, "--x")) == places


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:1", "0:1:x", "1:1:3", "0,0", "nan", "0:1:100000", "1/0", "1e999", *PLAIN_ONLY]
)
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(OptionError, match=r"--y is .*expected FROM:TO:COUNT"):
        places_of(text, "--y")


def changed(side, change):
    """Three sides of which one is changed in place."""
    sides = weights()
    change(sides[side])
    return sides


REFUSED = {
    "the lox model is aligned": (1, lambda t: t.update(weights()[0]), "lox and aligned hold the same weights"),
    "nothing was tuned": (2, lambda t: t.update(weights()[0]), "finetuned and aligned hold the same weights"),
    "missing": (1, lambda t: t.pop(NORM), r"lox: .*lacks 1 tensor: model.norm.weight; expected each"),
    "extra": (
        2,
        lambda t: t.update({"a\nerror: b": torch.ones(2)}),
        r"finetuned: .*has a\\nerror: b, expected no weight",
    ),
    "shape": (
        2,
        lambda t: t.update({NORM: torch.ones(7)}),
        r"model.norm.weight: aligned is \(48,\), finetuned is \(7,\); expected the same shapes",
    ),
    "integers": (1, lambda t: t.update({NORM: torch.ones(48, dtype=torch.int32)}), "hold integers, expected float64"),
    "fp8": (
        0,
        lambda t: t.update({MATRICES[1]: t[MATRICES[1]].to(torch.float8_e4m3fn)}),
        r"aligned: .*F8_E4M3 in model.layers.0.mlp.up_proj.weight; expected float64",
    ),
    "nan": (2, lambda t: t[NORM].fill_(float("nan")), r"model.norm.weight: NaN or Inf in finetuned; expected finite"),
    "inf": (1, lambda t: t[NORM][:1].fill_(float("inf")), r"model.norm.weight: NaN or Inf in lox; expected finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_spans_no_landscape_is_refused_and_nothing_is_written(tmp_path, case):
    side, change, said = REFUSED[case]
    sides = changed(side, change)
    made = make(tmp_path, sides)
    with pytest.raises((CheckpointError, DataError), match=said):
        explore(*made, tmp_path / "out", (0, 1), (0,), judged)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    with pytest.raises((CheckpointError, DataError), match=said):
        write_point(*made, tmp_path / "point", (0.5, 0.5))
    assert not (tmp_path / "point").exists()


def test_directions_that_are_parallel_are_refused(tmp_path):
    sides = [{name: w.double() for name, w in side.items()} for side in weights()]
    for name in sides[0]:
        sides[2][name] = 2 * sides[1][name] - sides[0][name]
    with pytest.raises(CheckpointError, match="aligned is 2 times lox - aligned, expected a second direction"):
        measure_axes(*make(tmp_path, sides))


def test_models_of_other_dtypes_are_rounded_to_aligneds(tmp_path):
    sides = list(weights())
    sides[2] = {name: w.float() + 1e-4 if w.is_floating_point() else w for name, w in sides[2].items()}
    sides[1] = {name: w.half() if w.is_floating_point() else w for name, w in sides[1].items()}
    made = make(tmp_path, sides)
    exact, *_ = oracle(sides, 0.5, 0.5)
    write_point(*made, tmp_path / "between", (0.5, 0.5))
    write_point(*made, tmp_path / "there", (measure_axes(*made).c, 1.0))
    between, there = tensors_of(tmp_path / "between"), tensors_of(tmp_path / "there")
    for name, (expected, slack) in exact.items():
        assert raw(there[name]) == raw(sides[2][name].bfloat16())
        error = (between[name].double().reshape(-1) - expected).abs()
        assert bool((error <= 0.5 * ulp(expected, torch.bfloat16) * (1 + 1e-6) + 4 * slack).all())


def test_the_same_folder_twice_and_an_adapter_are_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match="aligned and finetuned are the same files"):
        measure_axes(models[0], models[1], models[0])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"finetuned: .*is an adapter, expected a model. Merge it first"):
        measure_axes(models[0], models[1], tmp_path)


def test_a_folder_of_something_else_or_inside_an_input_is_refused(models, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match=r"holds mine and no landscape.json, expected a new or empty folder"):
        explore(*models, tmp_path, (0,), (0,), judged)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    for place in (models[2] / "landscape", models[1]):
        with pytest.raises(OutputError, match=r"lies inside|is the folder"):
            explore(*models, place, (0,), (0,), judged)
    with pytest.raises(OutputError, match="holds files"):
        write_point(*models, tmp_path, (0, 0))


def test_another_landscape_in_the_folder_is_refused_and_a_grid_may_grow(models, tmp_path):
    out = tmp_path / "out"
    explore(*models, out, (0, 1), (0,), judged, judged_by=("a",))
    before = (out / "landscape.json").read_bytes()
    sides = weights()
    sides[2][NORM] += 1
    others = make(tmp_path / "others", sides)
    for three, grid, judge, said in (
        (models, ((0, 1), (0,)), ("b",), r"the judge is \['b'\], it began with \['a'\]"),
        (others, ((0, 1), (0,)), ("a",), r"finetuned is .*others/attacked, it began with "),
        (models, ((0, 2), (0,)), ("a",), r"the grid lacks \(1, 0\), expected all that was judged"),
    ):
        with pytest.raises(ResumeError, match=said):
            explore(*three, out, *grid, judged, judged_by=judge)
    assert (out / "landscape.json").read_bytes() == before
    new = []
    found = explore(*models, out, (0, 0.5, 1), (0, 1), judged, judged_by=("a",), told=new.append)
    assert [one.place for one in new] == [(0.5, 0), (0, 1), (0.5, 1), (1, 1)]
    assert len(found.points) == 6
    said = json.loads((out / "landscape.json").read_text())
    assert [(one["x"], one["y"]) for one in said["points"]] == found.grid


def test_two_at_once_are_refused(models, tmp_path):
    def judge(folder, x, y):
        with pytest.raises(InUseError, match="another process works on this landscape"):
            explore(*models, tmp_path / "out", (0,), (0,), judged)
        return {"n": 1}

    assert explore(*models, tmp_path / "out", (0,), (0,), judge).points[0].verdict == {"n": 1}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 9}', '{"format": 1}', "{" * 100000, '{"format": 1, "inputs": 3}']
)
def test_a_damaged_document_is_told(models, tmp_path, text):
    (tmp_path / "landscape.json").write_text(text)
    with pytest.raises(OutputError, match=r"landscape.json: is no landscape of this version, or damaged"):
        explore(*models, tmp_path, (0,), (0,), judged)


def test_a_point_is_an_output_like_any_other_but_for_recomputing(models, tmp_path):
    out = tmp_path / "out"
    run = CliRunner().invoke(commands, command(models, "--point", "0.5,-1", "--out", out, "--json"))
    assert run.exit_code == 0, run.stderr
    said = json.loads(run.stdout)
    assert (said["x"], said["y"]) == (0.5, -1)
    assert said["axes"]["c"] == measure_axes(*models).c
    manifest = json.loads((out / "lox_stream.json").read_text())
    assert manifest["point"] == {"x": 0.5, "y": -1}
    assert manifest["inputs"].keys() == {"base", "aligned", "finetuned"}
    assert manifest["tensors"][NORM]["action"] == "blend"
    assert "| x, y | 0.5, -1 |" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").read_text() == TOKENIZER
    assert CliRunner().invoke(commands, ["verify", str(out)]).exit_code == 0
    again = CliRunner().invoke(commands, ["verify", str(out), "--base", str(models[1]), "--aligned", str(models[0])])
    assert again.exit_code == 1
    assert "is a point of a landscape" in again.stderr
    more = CliRunner().invoke(commands, command(models, "--point", "0.5,-1", "--out", out))
    assert more.exit_code == 1
    assert "holds a finished run" in more.stderr
    assert "Choose another --out" in more.stderr
    assert "--overwrite" not in more.stderr


def test_an_unfinished_point_goes_on_and_is_not_taken_for_another(models, tmp_path):
    stop = threading.Event()
    out, options = tmp_path / "out", Options(threads=1)
    with pytest.raises(Cancelled):
        write_point(
            *models,
            out,
            (0.5, 0.5),
            options=options,
            cancel=stop,
            progress=lambda at: at.done_tensors > 2 and out.exists() and stop.set(),
        )
    assert (out / "lox_stream.journal").exists()
    with pytest.raises(ResumeError, match=r"--x is 0.25, the run began with 0.5"):
        write_point(*models, out, (0.25, 0.5))
    write_point(*models, out, (0.5, 0.5))
    write_point(*models, tmp_path / "whole", (0.5, 0.5))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_tables_picture_json_and_csv_say_the_same(models, tmp_path):
    script = 'print(\'{"asr": %s, "of": "a,b", "n": {"m": 1}}\' % (0.5 + float("{x}") / 4))'
    judge = (sys.executable, "-c", script + " # {model}")
    words = ("--out", tmp_path / "out", "--x", "0:1:3", "--y", "0,1", "--picture", tmp_path / "a.svg", "--")
    shown = CliRunner().invoke(commands, command(models, *words, *judge))
    assert shown.exit_code == 0, shown.stderr
    assert "0.625" in shown.stdout
    assert "degrees" in shown.stdout
    assert "x 0.5, y 1: asr 0.625, of 'a,b', n {'m': 1}" in shown.stderr
    assert "fine-tuned" in (tmp_path / "a.svg").read_text()
    again = CliRunner().invoke(commands, command(models, *words[:-3], "--json", "--quiet", "--", *judge))
    assert again.exit_code == 0, again.stderr
    assert again.stderr == ""
    said = json.loads(again.stdout)
    assert said == json.loads((tmp_path / "out" / "landscape.json").read_text())
    with (tmp_path / "out" / "landscape.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(float(row["x"]), float(row["y"]), float(row["asr"])) for row in rows] == [
        (x, y, 0.5 + x / 4) for y in (0, 1) for x in (0, 0.5, 1)
    ]
    assert {(row["of"], row["n"]) for row in rows} == {("a,b", '{"m": 1}')}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--point", "1", "--out", "o"), r"--point is 1, expected X,Y"),
        (("--point", "0,1:2:3", "--out", "o"), r"--point is 0,1:2:3, expected X,Y"),
        (("--point", "0,0"), "--out is missing"),
        (("--out", "o"), "there is no judge"),
        (("--out", "o", "--point", "0,0", "--", "stat", "{model}"), "--point and a judge are both given"),
        (("--out", "o", "--point", "0,0", "--picture", "a.png"), "--picture is given without a judge"),
        (("--out", "o", "--picture", "a.gif", "--", "stat", "{model}"), "ends in .png or .svg"),
        (("--x", "0:0:3"), "--x is 0:0:3,"),
    ],
)
def test_what_does_not_go_together_is_usage_2(models, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(commands, command(models, *words), prog_name="lox-stream")
    assert ran.exit_code == 2
    assert said in ran.stderr.replace("\\", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("xs", [(), (0, 0), (float("nan"),), (1, float("inf")), (0, -0.0)])
def test_what_is_no_grid_is_refused_by_the_library_too(models, tmp_path, xs):
    with pytest.raises(OptionError, match=r"x is .*expected finite numbers, each once"):
        explore(*models, tmp_path / "out", xs, (0,), judged)
    assert list(tmp_path.iterdir()) == []


def test_a_judge_of_the_library_that_says_no_number_stops_it(models, tmp_path):
    with pytest.raises(JudgeError, match=r"the judge at x 0, y 0 said \{'of': 'x'\}, expected a number in it"):
        explore(*models, tmp_path / "out", (0,), (0,), lambda folder, x, y: {"of": "x"})
    assert read_landscape(tmp_path / "out").points == ()


def test_progress_reaches_the_end_and_never_goes_back(models, tmp_path):
    seen = []
    explore(*models, tmp_path / "out", (0, 1), (0, 1), judged, progress=seen.append)
    assert [at.done_bytes for at in seen] == sorted(at.done_bytes for at in seen)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert seen[0].working[0].startswith("measuring")
    assert seen[-1].working == ("x 1, y 1: the judge",)
