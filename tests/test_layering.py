"""The order of the modules: imports run one way, as the tables of CONTRIBUTING.md say, and have no side effects."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "lox_stream", ROOT / "kernels"
SPEAKS = {"click", "rich"}
STARTS_THREADS = {"workers", "reader", "committer", "scratch_disk", "shipping", "signals"}
NAMES = {"name", "file", "case", "module", "prefix"}  # attributes that hold what a stranger wrote
OURS = {"contender.name", "damage.name", "damage.file"}  # and these do not, or `listing` makes them printable
TABLES = {"rendering", "cli_demo"}  # of which every cell is made printable
THREADS = {"Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor", "Process", "ThreadPool", "start_new_thread"}


def tables() -> tuple[list[str], list[str], list[str]]:
    """The module names of the three tables of CONTRIBUTING.md: files, torch, people."""
    parts = re.split(r"^### ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)[1:]
    sections = [part.split("\n## ")[0] for part in parts]
    files, torch, people = (re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) for section in sections)
    return files, torch, people


FILES, TORCH, PEOPLE = tables()
ORDER = [*FILES, *TORCH, *PEOPLE]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> set[str]:
    """Absolute names of all that is imported anywhere: `lox_stream.files` for `from lox_stream import files`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            found |= {f"lox_stream.{a.name}" for a in node.names} if module == "lox_stream" else {module}
    return found


def own_imports(module: str) -> set[str]:
    """Modules of lox_stream that a module imports, at its top or inside a function."""
    names = {name.split(".")[1] for name in imports(parsed(PACKAGE / f"{module}.py")) if name.startswith("lox_stream.")}
    return names - {"kernels", "__version__"}


def outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(parsed(path))}


def test_the_map_of_modules_is_complete():
    assert sorted(ORDER) == MODULES, "CONTRIBUTING.md lists each module of lox_stream/ once"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    above = ORDER[: ORDER.index(module)]
    assert own_imports(module) <= set(above), f"{module} imports what stands below it in CONTRIBUTING.md"


def test_kernels_import_nothing_of_lox_stream():
    allowed = {"torch", "numpy", "triton", *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
        assert outside(path) <= allowed, path


def test_triton_is_imported_only_where_a_gpu_computes():
    assert not any("triton" in outside(path) for path in [*KERNELS.glob("*.py"), *PACKAGE.glob("*.py")])
    assert "triton" not in python("import lox_stream.api, lox_stream.kernels, sys; print(*sys.modules)").split()


@pytest.mark.parametrize("module", FILES)
def test_what_looks_at_files_knows_no_kernel(module):
    assert not any(name.startswith("lox_stream.kernels") for name in imports(parsed(PACKAGE / f"{module}.py")))


@pytest.mark.parametrize("module", [*FILES, *TORCH])
def test_only_the_commands_speak_to_people(module):
    path = PACKAGE / f"{module}.py"
    assert not outside(path) & SPEAKS
    calls = {node.func.id for node in ast.walk(parsed(path)) if is_call_of_a_name(node)}
    assert not calls & {"print", "input", "exit", "quit"}


def is_call_of_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize("module", sorted({*MODULES} - TABLES))
def test_a_name_in_a_message_is_printable(module):
    """What a stranger wrote could draw on a terminal, or begin a line of its own there."""
    for text in ast.walk(parsed(PACKAGE / f"{module}.py")):
        parts = text.values if isinstance(text, ast.JoinedStr) else []
        if not any(isinstance(part, ast.Constant) and " " in str(part.value) for part in parts):
            continue  # no message: a key, a path
        for part in parts:
            if isinstance(part, ast.FormattedValue) and part.conversion == -1 and isinstance(part.value, ast.Attribute):
                told = ast.unparse(part.value)
                assert part.value.attr not in NAMES or told in OURS, f"line {part.lineno}: {told}"


def test_threads_are_started_in_few_places():
    starting = {module for module in MODULES if names_in(parsed(PACKAGE / f"{module}.py")) & THREADS}
    assert starting == STARTS_THREADS


def names_in(tree: ast.AST) -> set[str]:
    """Every name and attribute that code mentions: `threading.Thread` gives both words."""
    nodes = list(ast.walk(tree))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}


@pytest.mark.parametrize("path", [*PACKAGE.glob("*.py"), *KERNELS.glob("*.py")], ids=lambda path: path.stem)
def test_no_public_function_has_the_name_of_a_module(path):
    # `from lox_stream import plan` must never depend on whether a module `plan` was imported before
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = {node.name for node in parsed(path).body if isinstance(node, definitions) if node.name[0] != "_"}
    assert not public & {*MODULES, *(kernel.stem for kernel in KERNELS.glob("*.py"))}


def python(code: str) -> str:
    """What a fresh interpreter prints, with no folder of ours on its path."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    loaded = python("import lox_stream, sys; print(*sys.modules)").split()
    assert "lox_stream" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "numpy", "safetensors", *SPEAKS}


def test_what_needs_no_torch_loads_none():
    names = ", ".join(f"lox_stream.{name}" for name in [*FILES, "messages", "signals", "showing", "cli"])
    loaded = python(f"import {names}, sys; print(*sys.modules)").split()
    assert "lox_stream.cli" in loaded
    assert "torch" not in loaded


def test_importing_every_module_has_no_side_effects():
    names = ", ".join(f"lox_stream.{name}" for name in ORDER)
    told = python(
        f"""if True:
        import logging, os, signal, sys, threading, torch
        def state():
            handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            numbers = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled()
            return threading.active_count(), logging.root.handlers[:], dict(os.environ), handlers, numbers
        before = state()
        import {names}
        assert state() == before, (before, state())
        assert not torch.cuda.is_initialized()
        print("done")
        """
    )
    assert told == "done\n", "importing printed something"


def test_kernels_cannot_be_imported_from_the_root():
    # The PyPI package `kernels` would be hidden, and our files would exist twice
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or "/").parents, "run plain `pytest`, not `python -m pytest`"
    assert str(ROOT) not in sys.path


def test_kernels_are_found_under_their_own_name():
    kernels = importlib.util.find_spec("lox_stream.kernels")
    assert kernels is not None
    assert Path(str(kernels.origin)).name == "__init__.py"
    assert "lox_stream.kernels.cpu" in python("import lox_stream.kernels, sys; print(*sys.modules)").split()
