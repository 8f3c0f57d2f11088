"""Laws of the command line: exit codes, what is on stdout, what is on stderr, and what is written."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from folders import write
from safetensors.torch import load_file, save_file

from lox_stream import cli_run, messages
from lox_stream.cli import commands
from lox_stream.planning import plan
from lox_stream.synthetic import llama_shapes, write_pair

RUN_OPTIONS = (
    *("--base", "--aligned", "--out", "--rank", "--alpha", "--svd", "--tolerance", "--skip", "--only", "--rounding"),
    *(
        "--seed",
        "--on-nonfinite",
        "--dtype",
        "--max-shard-size",
        "--scratch",
        "--scratch-size",
        "--device",
        "--memory",
        "--threads",
        "--resume",
        "--overwrite",
        "--dry-run",
    ),
    "--repair",
    *("--assume", "--gpu-memory", "--kernels", "--rename", "--on-missing", "--on-shape-mismatch"),
    *("--recipe", "--split-fused", "--save-factors", "--push-to", "--part", "--ray"),
    *("--json", "--quiet"),
)
HEAVY = ("torch", "numpy", "safetensors", "rich")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama of two tiny layers, in a folder whose name is no plain word."""
    return write_pair(tmp_path_factory.mktemp("mödel ✓ α"), llama_shapes(32, 48, 2, 64, 16), aligned_shards=2)


def lox(*words: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(commands, [str(word) for word in words], prog_name="lox-stream")


def run(pair: tuple[Path, Path], out: Path, *words: object) -> Result:
    return lox("run", "--base", pair[0], "--aligned", pair[1], "--out", out, *words)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def spawn(*words: object, code: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `code` runs there when it ends."""
    text = f"import atexit, sys\nfrom lox_stream.cli import main\nsys.argv = {['lox-stream', *map(str, words)]!r}\n"
    text += f"atexit.register(lambda: exec({code!r}))\nmain()"
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)


def test_a_run_ends_with_0_a_table_and_the_next_command(pair, tmp_path):
    out = tmp_path / "out put"
    result = run(pair, out)
    assert result.exit_code == 0, result.output
    assert f"lox-stream verify '{out}'" in result.stdout
    assert "retention" in result.stdout
    assert "read and" in result.stdout, "the rate says which bytes it counts"
    assert lox("verify", out).exit_code == 0


def test_with_json_stdout_holds_one_document_and_nothing_else(pair, tmp_path):
    result = run(pair, tmp_path / "out", "--json", "--alpha", -0.5)
    summary = json.loads(result.stdout)
    assert (summary["exit_code"], result.exit_code) == (0, 0)
    assert (summary["out"], summary["totals"]["tensors"]) == (str(tmp_path / "out"), 20)
    assert summary["totals"]["extrapolated"] + summary["totals"]["copied"] == 20
    assert summary["read_bytes"] > summary["written_bytes"] > 0
    assert any("negative" in warning for warning in summary["warnings"])
    assert result.stderr.count("warning: alpha is -0.5") == 1


@pytest.mark.parametrize("words", [["run"], ["inspect"], ["verify"], ["verify", "--base"]])
def test_json_is_one_document_whatever_the_command(pair, tmp_path, words):
    run(pair, tmp_path / "out")
    result = {
        "run": lambda: run(pair, tmp_path / "other", "--dry-run", "--json"),
        "inspect": lambda: lox("inspect", pair[1], "--json"),
        "verify": lambda: lox("verify", tmp_path / "out", "--json"),
        "verify--base": lambda: lox("verify", tmp_path / "out", "--base", pair[0], "--aligned", pair[1], "--json"),
    }["".join(words)]()
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict)
    assert result.stdout.isascii()


def test_quiet_says_nothing_but_errors(pair, tmp_path):
    assert run(pair, tmp_path / "out", "--quiet", "--alpha", -1).output == ""
    again = run(pair, tmp_path / "out", "--quiet")
    assert again.exit_code == 1
    assert again.stderr.startswith("error: ")


def test_a_dry_run_shows_each_tensor_and_writes_nothing(pair, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    table = run(pair, tmp_path / "out", "--dry-run", "--skip", "*embed*")
    document = json.loads(run(pair, tmp_path / "out", "--dry-run", "--json", "--skip", "*embed*").stdout)
    assert table.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    counts = [int(count) for count in re.findall(r"^\s*model\.\S+\s+(\d+) ", table.stdout, re.MULTILINE)]
    assert sum(counts) == len(document["steps"]) == document["totals"]["tensors"] == 20
    assert len(counts) == 11, "layers share a row"
    assert {step["reason"] for step in document["steps"]} == {"matrix", "vector", "skipped"}
    assert "budget of 4 GiB" in table.stdout


def test_the_bytes_do_not_depend_on_how_the_command_was_called(pair, tmp_path):
    run(pair, tmp_path / "a", "--quiet")
    words = ["run", "--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "b", "--threads", "1"]
    called = subprocess.run([sys.executable, "-m", "lox_stream", *map(str, words)], capture_output=True, check=True)
    assert b"Done" in called.stdout
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "-1"], "--rank is -1"),
        (["--alpha", "nan"], "--alpha is nan"),
        (["--rank", "many"], "'--rank'"),
        (["--svd", "quick"], "'--svd'"),
        (["--memory", "potato"], "--memory: 'potato' is not a size"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--resume", "--overwrite"], "--resume and --overwrite"),
        (["--skip", "*q_porj*"], "q_proj"),
        (["--no-such-thing"], "--no-such-thing"),
    ],
)
def test_a_value_that_cannot_be_obeyed_is_usage_2(pair, tmp_path, words, said):
    result = run(pair, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--base", "--aligned", "--out"])
def test_the_three_folders_are_named_and_required(tmp_path, missing):
    words = {"--base": tmp_path, "--aligned": tmp_path, "--out": tmp_path / "out"}
    del words[missing]
    result = lox("run", *[word for item in words.items() for word in item])
    assert result.exit_code == 2
    assert f"'{missing}'" in result.stderr
    assert lox("run", tmp_path, tmp_path, tmp_path / "out").exit_code == 2, "nothing goes by position"


def test_all_problems_of_the_inputs_are_listed_and_exit_is_1(tmp_path):
    result = run((tmp_path / "a", tmp_path / "b"), tmp_path / "out", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: 2 problems:\n  - base: ")
    assert "\n  - aligned: " in result.stderr


def test_a_folder_that_is_not_empty_is_an_error_that_names_both_ways_out(pair, tmp_path):
    run(pair, tmp_path / "out")
    result = run(pair, tmp_path / "out")
    assert result.exit_code == 1
    assert "--resume" in result.stderr
    assert "--overwrite" in result.stderr
    assert run(pair, tmp_path / "out", "--overwrite").exit_code == 0


def test_a_tensor_that_misses_the_tolerance_is_exit_3_and_the_output_is_there(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(600, 600, generator=generator)
    for factor, side in ((0.0, "base"), (1e-2, "aligned")):
        (tmp_path / side).mkdir()
        noisy = {"w": (weights + factor * torch.randn(600, 600, generator=generator)).bfloat16()}
        save_file(noisy, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    result = run((tmp_path / "base", tmp_path / "aligned"), tmp_path / "out", "--json", "--tolerance", "1e-9")
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["exit_code"] == 3
    assert json.loads(result.stdout)["totals"]["not_converged"] == ["w"]
    assert "did not reach the tolerance" in result.stderr
    assert lox("verify", tmp_path / "out").exit_code == 0


def test_names_from_files_reach_the_terminal_escaped(pair, tmp_path):
    name, config = "evil\x1b[2J[red]bold[/red]\u202e.weight", {}
    sides = tmp_path / "base", tmp_path / "aligned\x07[bold]"
    for factor, side in enumerate(sides, 1):
        side.mkdir()
        save_file({name: torch.eye(4) * factor}, side / "model.safetensors", metadata={"format": "pt"})
        (side / "config.json").write_text(json.dumps(config))
    results = [
        run(sides, tmp_path / "out", "--dry-run"),
        run(sides, tmp_path / "out"),
        run(sides, tmp_path / "out"),
        lox("inspect", sides[1]),
        lox("verify", tmp_path / "out", "--base", sides[0], "--aligned", sides[1]),
        lox("inspect", tmp_path / "\x1b]0;title\x07"),
        lox("run", "--\x1b[2J"),
    ]
    assert [result.exit_code for result in results] == [0, 0, 1, 0, 0, 1, 2]
    for result in results:
        assert all(char.isprintable() or char == "\n" for char in result.output), result.output
    assert r"evil\x1b[2J[red]bold[/red]\u202e.weight" in results[0].stdout


FORGED = "OK: all is well"
EVIL = f"x\n{FORGED}\r\x1b[2J\u202e.weight"


def evil_side(folder: Path, weight: torch.Tensor) -> Path:
    """A model whose tensor and whose shard have that name."""
    folder.mkdir()
    names = dict.fromkeys((EVIL, "y.weight"), f"{EVIL}.safetensors")
    save_file({EVIL: weight, "y.weight": torch.eye(8)}, folder / names[EVIL], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text("{}")
    return folder


def evil_adapter(folder: Path) -> Path:
    folder.mkdir()
    stem = f"base_model.model.{EVIL.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": torch.ones(1, 8), f"{stem}.lora_B.weight": torch.ones(8, 1)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def attempts(root: Path) -> Iterator[Result]:
    """Commands that say the name of a tensor, in each way in which something may be wrong with it."""
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(8, 8, generator=generator)
    base, aligned = evil_side(root / "base", w0), evil_side(root / "aligned", 3 * w0)
    nan, wide = evil_side(root / "nan", w0 * torch.nan), evil_side(root / "wide", torch.ones(9, 8))
    whole, short = evil_side(root / "whole", torch.ones(8, 8).int()), evil_side(root / "short", torch.ones(8, 8).half())
    big, lacking = evil_side(root / "big", 1e30 * w0), root / "lacking"
    lacking.mkdir()
    save_file({"y.weight": torch.eye(8)}, lacking / "model.safetensors")
    sides = ("--base", base, "--aligned", aligned)
    yield run((base, aligned), root / "out")
    yield run((base, aligned), root / "out", "--resume")
    yield run((base, aligned), root / "recipe", "--recipe", recipe(root / "a.toml", "[[group]]\nmatch='y*'\nrank=1"))
    yield run((base, aligned), root / "none", "--recipe", recipe(root / "b.toml", "[[group]]\nmatch='xx*'\nrank=1"))
    yield run((base, aligned), root / "none", "--skip", "xx*")
    yield run((base, aligned), root / "flat", "--tolerance", 1e-9, "--rank", 3)
    for other in (nan, wide, whole, short, big, lacking):
        for words in ([], ["--on-nonfinite", "copy", "--on-shape-mismatch", "overlap", "--on-missing", "copy"]):
            for one in ((base, other), (other, aligned)):
                yield run(one, root / f"{one[0].name}-{one[1].name}{len(words)}", *words)
    yield run((base, big), root / "half", "--dtype", "float16")
    yield run((base, aligned), root / "copy", "--on-shape-mismatch", "copy", "--on-missing", "copy", "--split-fused")
    yield lox("inspect", aligned)
    yield lox("bench", *sides, "--rank", "2,9", "--solvers", "lox-stream,full", "--repeat", 1)
    yield lox("bench", *sides, "--tensors", "nothing")
    yield lox("adapter", *sides, "--out", root / "adapter")
    yield lox("apply", "--adapter", root / "adapter", "--aligned", aligned, "--out", root / "applied")
    yield lox("inspect", evil_adapter(root / "peft"))
    yield lox("verify", root / "out", *sides, "--sample", 2)
    shard = root / "out" / f"{EVIL}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-600] + bytes(600))
    yield lox("verify", root / "out")
    yield lox("verify", root / "out", *sides)
    yield run((base, aligned), root / "out", "--resume", "--repair")
    shard.unlink()
    yield lox("verify", root / "out")
    yield lox("push", root / "out", "org/name")
    shard.touch()
    yield lox("verify", root / "out", *sides)
    (root / "aligned" / shard.name).write_bytes(b"")
    yield run((base, aligned), root / "more")
    yield lox("push", root / "out", EVIL)
    yield lox("finish", root / "out")


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_no_name_forges_a_line(tmp_path, monkeypatch):
    """A line break in the name of a tensor begins no line, whatever is said of it."""
    monkeypatch.setattr("lox_stream.showing.LINE_EVERY_S", 0.0)
    told = 0
    for number, result in enumerate(attempts(tmp_path)):
        for stream in (result.stdout, result.stderr):
            assert "this is a bug in lox-stream" not in stream, stream
            assert all(char.isprintable() or char == "\n" for char in stream), (number, stream)
            assert not any(line.strip(" -").startswith(FORGED) for line in stream.split("\n")), (number, stream)
            told += stream.count(FORGED)
    assert told > 50


def test_verify_finds_a_flipped_bit_and_does_not_recompute_what_is_damaged(pair, tmp_path):
    run(pair, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for words in ([], ["--base", pair[0], "--aligned", pair[1]]):
        result = lox("verify", tmp_path / "out", *words)
        assert result.exit_code == 1
        assert "FAILED" in result.stdout
        assert f"error: {shard}" in result.stderr
    document = json.loads(lox("verify", tmp_path / "out", "--json").stdout)
    assert (document["ok"], document["exit_code"]) == (False, 1)
    assert document["failed"]


def test_verify_wants_both_inputs_or_neither(pair, tmp_path):
    run(pair, tmp_path / "out")
    for words in (["--base", pair[0]], ["--aligned", pair[1]]):
        result = lox("verify", tmp_path / "out", *words)
        assert result.exit_code == 2
        assert "belong together" in result.stderr
    result = lox("verify", tmp_path / "out", "--base", pair[0], "--aligned", pair[1], "--sample", 2)
    assert result.exit_code == 0
    assert "GFLOP" in result.stderr.split("recomputed")[0], "the cost is said beforehand"
    assert "2 matrices agree with float64" in result.stdout
    assert lox("verify", tmp_path / "out", "--base", pair[1], "--aligned", pair[0]).exit_code == 1


def test_verify_of_a_folder_without_manifest_is_an_error(pair):
    result = lox("verify", pair[0])
    assert result.exit_code == 1
    assert "not a finished output" in result.stderr


def test_inspect_says_of_each_tensor_what_run_would_do(pair):
    document = json.loads(lox("inspect", pair[1], "--json").stdout)
    said = {row["name"]: (row["action"], row["reason"]) for row in document["rows"]}
    assert said == {step.name: (step.action, step.reason) for step in plan(*pair).steps}
    table = lox("inspect", pair[1]).stdout
    assert "config.json says tied" in table
    assert "model.layers.*.mlp.up_proj.weight" in table


def test_a_single_file_stands_for_its_folder(pair, tmp_path):
    """Base is one file here; as an output it is named like a folder's."""
    file = pair[0] / "model.safetensors"
    assert lox("inspect", file).exit_code == 0
    assert lox("run", "--base", file, "--aligned", pair[1], "--out", tmp_path / "out").exit_code == 0
    run(pair, tmp_path / "same")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "same")


def test_alpha_0_gives_the_aligned_bytes(pair, tmp_path):
    run(pair, tmp_path / "out", "--alpha", 0)
    for path in pair[1].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))


@pytest.mark.parametrize("command", [None, "run", "adapter", "apply", "finish", "push", "inspect", "verify", "demo"])
def test_each_help_has_an_example_that_names_only_its_options(command):
    text = lox(*([command] if command else []), "--help").stdout
    examples = re.findall(r"^ +(lox-stream .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        known = {option for param in commands.commands[words[1]].params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("command", ["run", "adapter", "apply"])
def test_help_has_its_options_under_headings(command):
    """In their order, each option under one; `Options` is for --help alone."""
    text = lox(command, "--help").stdout
    headings = re.findall(r"^(\w[^\n]*):\n  -", text, re.MULTILINE)
    known = ["Models", "Method", "Tensors", "Pairs that do not match", "Machine", "Going on, and over", "What is said"]
    assert headings == [one for one in known if command != "apply" or one != "Tensors"] + ["Options"]
    assert re.search(r"^Options:\n  -h, --help +Show this message and exit\.\n\Z", text, re.MULTILINE)
    under = {option.group: {*option.opts} for option in reversed(commands.commands[command].params)}
    for heading, (option, *_) in under.items():
        part = text.split(f"\n{heading}:\n")[1].split("\n\n")[0]
        assert option in part, heading


def test_help_names_every_option_and_every_exit_code():
    text = lox("run", "--help").stdout
    assert [option for option in RUN_OPTIONS if not re.search(rf"^  {option}\b", text, re.MULTILINE)] == []
    assert {option for param in commands.commands["run"].params for option in param.opts} == set(RUN_OPTIONS)
    for code in ("0", "1", "2", "3", "130", "143"):
        assert re.search(rf"^ +{code}  ", lox("--help").stdout, re.MULTILINE)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["demo", "--help"], ["run"]])
def test_help_and_usage_errors_import_nothing_heavy(words):
    result = spawn(*words, code="print(sorted(sys.modules), file=sys.stderr)")
    assert result.returncode == (2 if words == ["run"] else 0)
    assert "'click'" in result.stderr
    assert [name for name in HEAVY if f"'{name}'" in result.stderr] == []


def test_looking_and_planning_import_no_torch(pair, tmp_path):
    run(pair, tmp_path / "out")
    paths = "--base", pair[0], "--aligned", pair[1]
    for words in (
        ("inspect", pair[0]),
        ("run", *paths, "--out", tmp_path / "new", "--dry-run"),
        ("verify", tmp_path / "out"),
    ):
        result = spawn(*words, code="print(sorted(sys.modules), file=sys.stderr)")
        assert result.returncode == 0, result.stderr
        assert "'torch'" not in result.stderr


def test_a_reader_that_went_away_is_no_traceback(pair):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lox_stream", "inspect", str(pair[0]), "--json"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("no_color", [True, False])
def test_on_a_terminal_colour_is_left_out_if_asked(pair, tmp_path, no_color):
    """The parent reads a pseudo-terminal; the bar is drawn there, and its colours only without NO_COLOR."""
    main, side = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    env = kept | {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    words = ["run", "--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lox_stream", *map(str, words)], stdout=side, stderr=side, env=env
    )
    os.close(side)
    seen = b""
    try:
        while piece := os.read(main, 65536):
            seen += piece
    except OSError:  # how Linux says that the other side was closed
        pass
    os.close(main)
    assert process.wait(60) == 0
    assert b"extrapolating" in seen
    colours = re.findall(rb"\x1b\[(?:\d+;)*(?:3[0-7]|38;[0-9;]+)m", seen)
    assert (not colours) == no_color


def test_windows_is_told_of_wsl(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    for result in (run(pair, tmp_path / "out"), lox("inspect", pair[0]), lox("demo"), lox("verify", tmp_path)):
        assert result.exit_code == 1
        assert "WSL" in result.stderr
    assert lox("run", "--help").exit_code == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "some\x1bfile"), r"error: some\x1bfile: Permission denied"),
        (MemoryError(), "error: not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "error: not enough memory"),
        (OSError(12, "Cannot allocate memory"), "error: not enough memory"),
        (RuntimeError("can't start new thread"), "error: not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "error: not enough memory"),
        (ZeroDivisionError("division by zero"), "bug in lox-stream"),
    ],
)
def test_what_nobody_foresaw_is_a_message_and_exit_1(pair, tmp_path, monkeypatch, error, said):
    def fails(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(cli_run, "plan_all", fails)
    result = run(pair, tmp_path / "out")
    assert result.exit_code == 1
    assert said in result.stderr
    assert ("Traceback" in result.stderr) == ("bug" in said)


@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 1 << 30])
def test_an_error_of_python_itself_is_one_of_memory_where_that_is_limited(pair, tmp_path, monkeypatch, limit):
    def fails(*args: object, **named: object) -> None:
        raise SystemError("error return without exception set")

    monkeypatch.setattr(cli_run, "plan_all", fails)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    result = run(pair, tmp_path / "out")
    assert ("not enough memory: this process may map 1024 MiB" in result.stderr) == (limit == 1 << 30)
    assert ("bug in lox-stream" in result.stderr) == (limit == resource.RLIM_INFINITY)


def test_that_there_is_no_memory_is_said_without_memory(monkeypatch, capfd):
    def fails(*args: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(messages, "_say", fails)
    assert messages.guarded(fails) == 1
    assert capfd.readouterr().err.startswith("error: not enough memory: use a smaller --memory")


def test_a_message_cannot_draw_on_the_terminal():
    assert messages.escaped("first\n- \x1b[31msecond\rline") == "first\n  - \\x1b[31msecond\\rline"


@pytest.mark.parametrize("word", ["plain", "two words", "it's", "tab\tand \x1b[2J 'quote' \\ ✓", "ünï", "\udcff\n"])
def test_a_quoted_word_is_the_same_word_to_a_shell(word):
    quoted = cli_run.quoted(word)
    assert quoted.isprintable()
    echoed = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert echoed == os.fsencode(word)


def test_the_command_that_goes_on_is_what_was_typed_with_resume_and_without_overwrite(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lox-stream"])
    typed = ["run", "--base", "my base", "--aligned", "a", "--out", "o", "--overwrite", "--rank", "8"]
    expected = ["/somewhere/bin/lox-stream", *typed[:7], "--rank", "8", "--resume"]
    assert shlex.split(cli_run.going_on(typed)) == expected
    assert shlex.split(cli_run.going_on([*typed, "--resume"])) == expected, "not twice"


def test_without_arguments_the_help_is_shown_as_it_is():
    done = subprocess.run([sys.executable, "-P", "-m", "lox_stream"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert "\b" not in done.stderr
    assert "Exit codes:" in done.stderr


def test_an_empty_path_is_not_the_current_folder():
    line = [sys.executable, "-P", "-m", "lox_stream", "run", "--base", "a", "--aligned", "b", "--out", ""]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert "is empty" in done.stderr


def test_a_closed_stdout_is_no_error(tmp_path):
    line = f"{shlex.quote(sys.executable)} -P -m lox_stream --version >&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["verify"], ["finish"], ["report"], ["push", "me/lox"]], ids=str)
def test_an_address_is_no_folder_of_this_machine(words):
    ran = lox(words[0], "s3://bucket/out", *words[1:])
    assert ran.exit_code == 2
    assert "s3://bucket/out is an address, expected a folder here. Copy it first" in ran.stderr


def test_a_hint_to_skip_a_name_is_one_word_of_a_shell(tmp_path):
    name = "a'; touch pwned; echo '.weight"
    base, aligned = (
        write(tmp_path / side, {name: torch.full((4, 4), value)}) for side, value in (("b", 1.0), ("a", math.nan))
    )
    ran = lox("run", "--base", base, "--aligned", aligned, "--out", tmp_path / "out")
    hint = ran.stderr.split("--skip ")[1].strip()
    assert shlex.split(hint) == [name]
