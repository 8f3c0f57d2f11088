"""benchmarks/torture.py: the states that its model of a disk leaves, and that it finds programs that are wrong."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str):
    """A module of benchmarks/, imported as the scripts there import each other."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def disk():
    return benchmark("torture_disk")


def states(disk, ops, kinds=("any",), count=400):
    """The different states that these changes may leave."""
    whole = disk.Disk()
    for op in ops:
        whole.take(op)
    found = [disk.left(whole, kind, random.Random(seed)) for kind in kinds for seed in range(count)]
    return {tuple(sorted(state.items())) for state in found}


def created(disk, name="a", file=0):
    return disk.Op("create", file, name=name)


def test_what_was_synced_is_there_and_nothing_else_is_sure(disk):
    ops = [created(disk), disk.Op("write", 0, 0, b"old"), disk.Op("sync", 0), disk.Op("sync folder")]
    assert states(disk, ops) == {(("a", b"old"),)}
    assert states(disk, [*ops, disk.Op("write", 0, 0, b"new")]) == {(("a", b"old"),), (("a", b"new"),)}
    assert states(disk, ops[:2]) == {(), (("a", b""),), (("a", b"old"),), (("a", bytes(3)),)}


def test_a_sync_of_a_file_is_none_of_its_name_and_the_other_way_round(disk):
    write = disk.Op("write", 0, 0, b"x")
    assert () in states(disk, [created(disk), write, disk.Op("sync", 0)])
    assert (("a", b""),) in states(disk, [created(disk), write, disk.Op("sync folder")])


def test_pages_arrive_in_any_order_and_one_may_be_torn(disk):
    ops = [created(disk), disk.Op("size", 0, 8192), disk.Op("sync", 0), disk.Op("sync folder")]
    found = states(disk, [*ops, disk.Op("write", 0, 0, b"n" * 8192)])
    contents = {dict(state)["a"] for state in found}
    old, new = bytes(4096), b"n" * 4096
    assert {first + second for first, second in itertools.product((old, new), repeat=2)} <= contents
    assert any(0 < content[:4096].count(b"n") < 4096 for content in contents)
    assert all(len(content) == 8192 for content in contents)


def test_a_rename_happens_as_a_whole_and_changes_of_one_name_in_their_order(disk):
    ops = [created(disk), disk.Op("write", 0, 0, b"x"), disk.Op("sync", 0), disk.Op("sync folder")]
    rename = disk.Op("rename", 0, name="a", new_name="b")
    assert states(disk, [*ops, rename]) == {(("a", b"x"),), (("b", b"x"),)}
    assert states(disk, [*ops, rename, disk.Op("unlink", 0, name="b")]) == {(("a", b"x"),), (("b", b"x"),), ()}


def test_what_lies_in_a_folder_is_lost_with_its_name(disk):
    inside = [created(disk, "d/a"), disk.Op("write", 0, 0, b"x"), disk.Op("sync", 0), disk.Op("sync folder", name="d")]
    found = states(disk, [disk.Op("mkdir", -1, name="d"), *inside])
    assert found == {(), (("d/", b""), ("d/a", b"x"))}


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def tortured(change: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The harness, run on a program that was changed."""
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import os, torture, torture_world\n"
        "from lox_stream import files, pipeline, reader, resuming, writer\n"
        f"{change}\n"
        "sys.exit(torture.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@linux
@pytest.mark.torture
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("power", "files.sync_data = lambda fd: None"),
        ("power", "files.sync_folder = lambda path: None"),
        ("power", "resuming._holds = lambda *args: True; writer.Output._sync_names = lambda self, names: None"),
        ("kills", "writer.Output._retract = lambda self: None"),
        ("faults", "files.write_all = lambda fd, data: os.write(fd, data)"),
        ("faults", "import contextlib; files.explained = lambda *args: contextlib.nullcontext()"),
        ("inputs", "files.lock_folder = lambda path: (os.open(path, os.O_RDONLY), True)"),
    ],
)
def test_a_program_that_is_wrong_is_found(part, change):
    ran = tortured(change, "--only", part, "--minutes", "0.4")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    failures = json.loads(ran.stdout.splitlines()[-1])["parts"][0]["failures"]
    assert all(case.startswith(f"--only {part}") for case in failures)


@linux
@pytest.mark.torture
def test_a_program_that_hangs_is_told_with_where_it_hangs():
    ran = tortured(
        "import time; torture_world.HANGS_S = 5; files.sync_data = lambda fd: time.sleep(60)", "--only", "power"
    )
    assert ran.returncode == 1
    assert "hangs: not at its end after 5 s" in ran.stderr
    assert re.search(r'File "<string>", line \d+ in <lambda>\n +File ".*committer.py"', ran.stderr), ran.stderr


@linux
@pytest.mark.torture
def test_the_short_form_breaks_no_law_and_counts_what_it_did():
    ran = tortured("", "--minutes", "1", "--seed", "11")
    assert ran.returncode == 0, ran.stdout
    parts = {part["part"]: part for part in json.loads(ran.stdout.splitlines()[-1])["parts"]}
    assert {"kills", "power", "inputs", "memory", "faults"} <= parts.keys()
    assert parts["kills"]["counts"]["kills"] > 20
    assert parts["power"]["counts"]["states"] > 100


def test_the_table_in_the_docs_is_that_of_the_committed_results():
    promises = benchmark("torture_promises")
    results = BENCHMARKS / "results"
    records = [json.loads((results / name).read_text()) for name in ("reliability.json", "fuzzing.json")]
    assert promises.table(*records) in (BENCHMARKS.parent / "docs" / "reliability.md").read_text()
    assert all(not part["failures"] for part in records[0]["parts"])
    assert {part["part"] for part in records[0]["parts"]} <= promises.PROMISES.keys()
