"""Every example in README.md and docs/ runs as it stands, in a folder that holds a small pair: base and aligned.

Those that need another program run in test_toolchains.py and test_adapter_in_peft.py.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from pages import BLOCK, PAGES, ROOT, Shown, blocks, commands_shown, lines_shown

from lox_stream import Options, extrapolate, plan
from lox_stream.cli import commands
from lox_stream.recipes import read_recipe
from lox_stream.synthetic import llama_shapes, write_pair

TOOLCHAINS, CLUSTER = ROOT / "examples" / "toolchains", ROOT / "examples" / "cluster"
INSTRUCTIONS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "examples" / "real_pair" / "README.md"]
MAKEFILES = [ROOT / "Makefile", *ROOT.glob("*/*/*.mk")]
TARGETS = {
    name: recipe
    for path in MAKEFILES
    for name, recipe in re.findall(r"^([a-z-]+):(?!=).*\n((?:\t.*\n|  .*\n)*)", path.read_text(), re.MULTILINE)
}
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
QUICK = ["--repeat", "1", "--solvers", "lox-stream,full"]
MINUTES = {"accuracy-real"}  # measures on the pair that `make test-real` has laws for


def own_commands() -> dict[Path, list[str]]:
    """Those of indented blocks that run here, each once: of lox-stream, and what makes the models for one."""
    found: dict[str, Path] = {}
    for page in PAGES:
        for one in lines_shown(page.read_text()):
            if one.line.startswith(("lox-stream ", "python benchmarks/giants.py ")) and not (one.needs or one.synopsis):
                found.setdefault(one.line, page)
    return {page: [line for line, first in found.items() if first == page] for page in dict.fromkeys(found.values())}


OWN = own_commands()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_pair(folder: Path) -> None:
    write_pair(folder, llama_shapes(256, 512, layers=2, vocabulary=1024), aligned_shards=2)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_examples_of_a_page_run_in_order(page, folder):
    """An `output` block after an example is what it prints; `...` stands for anything."""
    text = page.read_text()
    if "write_pair(" not in text:
        make_pair(folder)
    namespace = {"__name__": "__main__"}
    printed = ""
    for language, block in BLOCK.findall(text):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as told:
                exec(compile(block, f"{page.name}: {block[:60]!r}", "exec"), namespace)
            printed = told.getvalue()
        elif language == "output":
            assert doctest.OutputChecker().check_output(block, printed, doctest.ELLIPSIS), printed


@pytest.mark.parametrize("page", [page for page in PAGES if "$ lox-stream" in page.read_text()], ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_order_and_say_what_the_page_says(page, folder):
    """A line `$ lox-stream ...` in a `console` block; of the output, if it is shown, the words are compared."""
    make_pair(folder)
    for block in blocks(page, "console"):
        for part in block.split("$ lox-stream ")[1:]:
            command, _, shown = part.partition("\n")
            arguments = [sys.executable, "-P", "-m", "lox_stream", *shlex.split(command)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"lox-stream {command}\n{done.stderr}"
            if shown.strip():
                assert words(shown) == words(done.stdout), done.stdout


def words(text: str) -> list[str]:
    """Without numbers and paths, which differ from machine to machine; a rate's unit may differ too."""
    return [word for word in re.findall(r"\S+", text) if not re.search(r"\d|/|^[kMG]?B\b", word)]


def test_the_manifest_of_the_docs_has_the_shape_of_a_real_one(folder):
    make_pair(folder)
    extrapolate("base", "aligned", "out")
    real = json.loads((folder / "out" / "lox_stream.json").read_text())
    (shown,) = [json.loads(block) for block in blocks(ROOT / "docs" / "cli.md", "json")]
    assert shape_of(shown, real) == shape_of(real, real)
    assert shown["format"] == real["format"]
    assert shown["options"] == real["options"]


def shape_of(value, real):
    """Keys and types; of what is listed by the names of files and tensors only the first, which is to be a real one."""
    if isinstance(value, dict):
        if value and all(name.endswith((".safetensors", ".weight")) for name in value):
            assert value.keys() <= real.keys()
            name = next(iter(value))
            return {name: shape_of(value[name], real[name])}
        return {key: shape_of(item, real.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item, item) for item in value]
    return type(value).__name__


@pytest.mark.parametrize(("page", "examples"), [("toolchains.md", TOOLCHAINS), ("machines.md", CLUSTER)])
def test_the_examples_of_other_programs_are_the_files_that_ci_runs(page, examples):
    """The docs show them as they are; test_toolchains.py (`make examples`), or a test below, runs each."""
    text = (ROOT / "docs" / page).read_text()
    shown = dict(re.findall(r"^\[([\w.]+)\]\(\.\./examples/[\w./]+\):\n\n```\w+\n(.*?)^```$", text, re.M | re.S))
    files = {path.name: path.read_text() for path in examples.iterdir() if path.is_file()}
    assert shown == files
    tests = (ROOT / "tests" / ("test_toolchains.py" if examples == TOOLCHAINS else "test_docs.py")).read_text()
    assert [name for name in files if name not in tests] == []


def test_every_block_is_of_a_kind_that_a_test_runs():
    """`py` is code that needs another program: toolchains.md's are files, others run in test_adapter_in_peft.py."""
    run = {"python", "output", "console", "json", "toml", "text"}  # text: what a command printed that takes minutes
    others = {
        "toolchains.md": {"py", "yaml"},
        "machines.md": {"sh", "yaml"},
        "README.md": {"py"},
        "adapters.md": {"py"},
    }
    for page in PAGES:
        opened = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert {*opened} <= run | others.get(page.name, set()), page.name


@pytest.mark.parametrize(
    ("page", "command"), [(page.name, command) for page in PAGES for command in commands_shown(page)]
)
def test_a_command_that_is_only_shown_is_one_that_the_program_understands(page, command):
    _, name, *words = shlex.split(command)
    whole = commands.make_context("lox-stream", [name])  # without it click remembers other names for --help
    commands.commands[name].make_context(name, words, parent=whole)


@pytest.mark.parametrize("page", INSTRUCTIONS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_run_by_a_test_or_marked_as_needing_what_no_test_has(page):
    """Blocks, and code in the text; commands of lox-stream are run by the tests above and below."""
    text = page.read_text()
    inside = re.findall(r"`((?:make|pip|python|benchmarks/\w+\.sh)(?: [^`]+)?)`", BLOCK.sub("", text))
    consoles = re.findall(r"^\$ (.*)$", "".join(blocks(page, "console")), re.MULTILINE)
    for shown in [*lines_shown(text), *(Shown(line, "") for line in [*consoles, *inside])]:
        assert shown.needs or fault_of(shown.line) is None, f"{shown.line}: {fault_of(shown.line)}"


def fault_of(line: str) -> str | None:
    """Why a command is none that a test runs, if so."""
    program, *words = line.split()
    if program == "lox-stream" or "_LOX_STREAM_COMPLETE" in line or line in ("make", "python -m lox_stream"):
        return None
    if program == "make":
        return next((fault for word in words if (fault := fault_of_target(word))), None)
    if program == "pip":
        return fault_of_pip(words)
    name = words[0] if program == "python" else program
    if name.startswith("benchmarks/"):
        path = ROOT / name
        if not path.is_file() or not re.search(rf"\b{path.stem}\b", TESTS):
            return "no such file, or one that no test names"
        told = path.read_text() + (path.parent / "harness.py").read_text()
        return next((f"it has no {word}" for word in words if word.startswith("--") and word not in told), None)
    if line in ("python -m pytest", "python train_dpo.py") or re.search(r" (=|~|->) ", line):
        return None  # what is not to be typed, and formulas
    return "neither run nor marked: write `(needs a GPU)` or a test"


def fault_of_target(word: str) -> str | None:
    if "=" in word or word in MINUTES:
        return None
    if word not in TARGETS:
        return "no such target"
    in_ci = re.search(rf"^group .* make .*\b{word}(?![\w-])", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    untested = [name for name in re.findall(r"(\w+)\.py", TARGETS[word]) if not re.search(rf"\b{name}\b", TESTS)]
    return f"CI does not run it, nor a test its {untested}" if untested and not in_ci else None


def fault_of_pip(words: list[str]) -> str | None:
    """Extras have to be there. `make wheel` and the environments of `make` install; nothing is installed here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [extra for word in words for found in re.findall(r"\.\[([\w,]+)\]", word) for extra in found.split(",")]
    return next((f"no extra {extra}" for extra in asked if extra not in extras), None)


def test_a_command_that_is_neither_run_nor_marked_is_found():
    page = "Serve it{}:\n\n    vllm serve llama      on one card\n    lox-stream verify OUT\n\n```console\n$ x\n```\n"
    (serve, verify) = lines_shown(page.format(""))
    assert (serve, verify.synopsis, serve.synopsis) == (Shown("vllm serve llama", ""), True, False)
    assert fault_of(serve.line) is not None
    assert [one.needs for one in lines_shown(page.format(" (needs a GPU)"))] == ["a GPU", "a GPU"]
    wrong = ["make nonsense", "make size nonsense", "pip install '.[nonsense]'", "python benchmarks/nonsense.py", "ls"]
    wrong += ["python benchmarks/giants.py --nonsense", "python benchmarks/conftest.py"]
    assert [line for line in wrong if fault_of(line) is None] == []
    right = ["make test", "make demo-real REAL_STEPS=270", "pip install '.[hub,peft]'", "a = b"]
    assert [fault_of(line) for line in right] == [None] * len(right)


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_the_commands_for_folders_of_ones_own_run_on_others_that_stand_in(page, folder):
    """Whatever is not there is made: models by their options, outputs by a run. In the order of the page."""
    shapes = llama_shapes(64, 96, layers=4, vocabulary=128)
    write_pair(folder, shapes, aligned_shards=2)
    write_pair(folder / "other", shapes, seed=1)
    for command in OWN[page]:
        words = shlex.split(command.replace("/tmp/", ""))
        if words[0] == "python":
            subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]], check=True, timeout=300)
            continue
        stand_ins(folder, words)
        ran = CliRunner().invoke(commands, words[1:] + (QUICK if words[1] == "bench" else []))
        assert ran.exit_code == 0, f"{command}\n{ran.output}"


def stand_ins(folder: Path, words: list[str]) -> None:
    """What a command of lox-stream reads, where it is not there: a link to a model, a pipeline of them, an output."""
    Path("asr.py").write_text("print(0.5)\n")  # a judge
    for option, side in (("--base", "base"), ("--aligned", "aligned"), ("--finetuned", "other/aligned")):
        if option not in words or (path := Path(words[words.index(option) + 1])).exists():
            continue
        if not any(word.startswith("vae/") for word in words):
            path.symlink_to(folder / side)
            continue
        components = ("transformer", "vae", "text_encoder")
        for component in components:
            shutil.copytree(folder / side, path / component)
        index = {"_class_name": "Pipeline"} | {component: ["diffusers", "Model"] for component in components}
        (path / "model_index.json").write_text(json.dumps(index))
    at = words.index("--lox") + 1 if "--lox" in words else 2 if words[1] in ("verify", "report") else None
    if at is not None and not Path(words[at]).exists():
        extrapolate("base", "aligned", words[at])


def test_the_recipe_of_the_docs_hits_what_it_names(folder):
    make_pair(folder)
    (text,) = blocks(ROOT / "docs" / "cli.md", "toml")
    (folder / "recipe.toml").write_text(text)
    steps = {
        step.name: step
        for step in plan("base", "aligned", options=Options(**read_recipe(folder / "recipe.toml"))).steps
    }
    assert steps["model.layers.0.mlp.up_proj.weight"].rank == 16
    assert steps["model.layers.0.self_attn.q_proj.weight"].rank == 6
    assert steps["model.embed_tokens.weight"].reason == "skipped"


@pytest.fixture
def models(folder):
    """A pair in four files, what one `run` makes of it, and folder/bin, where `lox-stream` is this one."""
    made = write_pair(folder, llama_shapes(64, 96, layers=2, vocabulary=128), aligned_shards=4)
    extrapolate(*made, folder / "alone")
    program(folder, "lox-stream", f'exec {shlex.quote(sys.executable)} -P -m lox_stream "$@"')
    return folder


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\nset -euo pipefail\n{text}\n")
    path.chmod(0o755)


def run_there(folder: Path, *words: str, **variables: str) -> None:
    """A command of an example, whose models lie in this folder and not in /models."""
    env = os.environ | variables | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    ran = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.mark.torture
def test_the_example_for_slurm_makes_what_one_run_makes(models):
    """`sbatch` and `srun` stand in for Slurm's: an array is run task by task, and what depends on it afterwards."""
    for name in ("slurm.sh", "slurm_part.sh"):
        (models / name).write_text((CLUSTER / name).read_text().replace("/models", str(models)))
    program(models, "srun", 'exec "$@"')
    program(
        models,
        "sbatch",
        """if [ "$1" = --parsable ]; then
             last=$(sed -n 's/^#SBATCH.* --array=1-\\([0-9]*\\).*/\\1/p' "$2")
             for i in $(seq "$last"); do SLURM_ARRAY_TASK_ID=$i bash "$2" >&2; done
             echo 17
           else
             [ "$1 $2" = "--dependency=afterok:17 --wrap" ] && sh -c "$3"
           fi""",
    )
    run_there(models, "bash", "slurm.sh")
    assert weights(models / "lox") == weights(models / "alone") != {}


@pytest.mark.torture
def test_the_example_for_kubernetes_makes_what_one_run_makes(models):
    """The commands of its containers, with the variable that an indexed Job has, for each of its pods."""
    for name in ("kubernetes.yaml", "kubernetes_finish.yaml"):
        job = yaml.safe_load((CLUSTER / name).read_text())
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/models"}]
        command = [word.replace("/models", str(models)) for word in container["command"]]
        for index in range(job["spec"].get("completions", 1)):
            run_there(models, *command, JOB_COMPLETION_INDEX=str(index))
    assert weights(models / "lox") == weights(models / "alone") != {}
