"""Damaged and hostile files: what benchmarks/fuzz.py found and was mended, and its short form."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from folders import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lox_stream import CheckpointError, LoxError, OptionError, Options, OutputError, ResumeError, extrapolate, plan
from lox_stream.checkpoint import open_checkpoint
from lox_stream.journal import FORMAT, replay
from lox_stream.manifest import read_manifest
from lox_stream.model_card import completed
from lox_stream.options import MAX_NUMBER, check_options
from lox_stream.output_rules import JOURNAL, MANIFEST
from lox_stream.recipes import read_recipe
from lox_stream.shards import read_shard
from lox_stream.verifying import verify_checksums

ROOT = Path(__file__).parents[1]
INDEX = "model.safetensors.index.json"
TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
IDENTITY = {"format": FORMAT, "versions": {}, "options": {}, "inputs": {"base": {}, "aligned": {}}}


def benchmark(name: str):
    """A module of benchmarks/, imported as the scripts there import each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def shard(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.torture
def test_the_short_form_of_the_fuzzer_breaks_no_law():
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--cases", "10000", "--seed", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stdout
    record = json.loads(ran.stdout.splitlines()[-1])
    assert sum(target["cases"] for target in record["targets"]) >= 10000
    assert all(target["accepted"] for target in record["targets"])
    assert [target["target"] for target in record["targets"] if not target["refused"]] == ["card"], (
        "which is left as it is"
    )


class Bad:
    """A target that breaks a law."""

    name = "bad"

    def __init__(self, read):
        self.read = read


def refuse_rawly(path):
    raise LoxError("\x1b[2J")


@pytest.mark.parametrize(
    ("read", "law"),
    [
        (lambda path: "\u202e", "a terminal obeys"),
        (refuse_rawly, "a terminal obeys"),
        (lambda path: Path("/etc/hostname").open().close() or "", "outside"),
        (lambda path: [*Path("/").iterdir()] and "", "outside"),
        (lambda path: (path / "x").write_text("") or "", "a change"),
        (lambda path: (path / "y").mkdir() or "", "a change"),
        (lambda path: (path / "link").read_text() and "", "outside"),
    ],
)
def test_the_fuzzer_finds_a_reader_that_breaks_a_law(tmp_path, read, law):
    fuzz = benchmark("fuzz")
    (tmp_path / "link").symlink_to("/proc/self/status")
    watch = fuzz.Watch(tmp_path)
    with pytest.raises(fuzz.Law, match=law):
        fuzz.run_case(Bad(lambda: read(tmp_path)), watch)
    assert fuzz.run_case(Bad(lambda: str((tmp_path / "x.txt").exists())), watch)


def test_a_case_is_made_of_seed_and_number_alone(tmp_path):
    targets = benchmark("fuzz_targets")
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        target = targets.Header(folder)
        target.make(random.Random("0 header 0"))
        target.make(random.Random("0 header 7"))
        made.append(target.path.read_bytes())
    assert made[0] == made[1]


# What was found, each as small as it goes.


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**62, 100_000_001, 60])
def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path, length):
    path = shard(tmp_path / "x.safetensors", {"a": TENSOR}, bytes(4), length)
    with pytest.raises(CheckpointError):
        read_shard(path)


def test_the_product_of_a_million_sizes_is_not_taken(tmp_path):
    entry = {"dtype": "F32", "shape": [2**62] * 300_000, "data_offsets": [0, 16]}
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"takes .* bytes, found 16") as raised:
        read_shard(shard(tmp_path / "x.safetensors", {"a": entry}, bytes(16)))
    assert len(str(raised.value)) < 1000
    assert time.process_time() - started < 20, "it would take hours"


@pytest.mark.parametrize("depth", [900, 960, 980, 990, 2000, 100_000])
@pytest.mark.parametrize("place", ['{"a": %s}', '{"a": {"dtype": %s}}', '{"a": {"dtype": "F32", "shape": %s}}'])
def test_a_header_that_is_nested_deeply_is_refused(tmp_path, depth, place):
    text = (place % ("[" * depth + "]" * depth)).encode()
    with pytest.raises(CheckpointError):
        read_shard(shard(tmp_path / "x.safetensors", text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank = 0x" + "f" * 5000, "recipe.toml, line 1: --rank is a int that is too large to be shown"),
        (
            "\nrank = 99999999999999999999",
            f"recipe.toml, line 2: --rank is 9{{20}}, expected a whole number, 0 to {MAX_NUMBER}",
        ),
        ("alpha = 1\nrank = '1'", "recipe.toml, line 2: --rank is '1', expected a whole number"),
        ("alpha = 0x" + "f" * 300, "recipe.toml, line 1: --alpha is"),
        ("rank = " + "9" * 5000, "is no TOML"),
        ("rank = 1\n" + "a." * 3000 + "b = 1", "recipe.toml, line 2: a name of more than 64 parts"),
        ("[" + "'a' . " * 3000 + "b]", "recipe.toml, line 1: a name of more than 64 parts"),
        ("a = 1\n" * (1 << 18), "has over 1048576 characters"),
        ("\n".join(f"a{i} = 1" for i in range(1000)), "and 980 more"),
        ("skip = " + "[" * 5000, "is no TOML: it is nested too deeply"),
        (
            "on-missing = 'copy'\non_missing = 'copy'",
            "line 2: on_missing is said already, as on-missing; expected it once",
        ),
        ("skip = ['']\nskip_ = 1", "line 1: --skip holds an empty glob"),
        ("'\\u001b[2J' = 1", "is no TOML|nothing that a recipe says"),
        ('"\\u001b[2J" = 1', r"\\x1b\[2J is nothing that a recipe says"),
        ("{" * 100_000, "is no TOML and no manifest"),
        ('{"options": {"rank": "x"}}', "recipe.toml: --rank is 'x'"),
    ],
)
def test_recipes_that_mean_nothing_are_refused_with_file_and_line(tmp_path, text, told):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(OptionError, match=told):
        read_recipe(tmp_path / "recipe.toml")


def test_pipes_are_refused_and_not_waited_for(tmp_path):
    for name in (JOURNAL, MANIFEST, "recipe.toml", "model.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OptionError, match="is a folder, device, pipe or socket"):
        read_recipe(tmp_path / "recipe.toml")
    with pytest.raises(ResumeError, match="is a folder, device, pipe or socket"):
        replay(tmp_path)
    with pytest.raises(OutputError, match="is a folder, device, pipe or socket"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"a device, pipe or socket, expected a file of weights") as raised:
        open_checkpoint(tmp_path)
    assert any("config.json: is not a file" in problem for problem in raised.value.problems)
    os.mkfifo(tmp_path / INDEX)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a file, expected a JSON file"):
        open_checkpoint(tmp_path)
    with pytest.raises(OptionError, match="is a folder, device, pipe or socket"):
        read_recipe(Path("/dev/zero"))


TENSOR_RECORD = {"name": "a", "action": "copy", "reason": "vector", "n_bytes": 4, "elapsed_s": 0.1, "checksum": "00"}
TENSOR_RECORD |= {"matrices": [], "notices": []}


@pytest.mark.parametrize(
    "lines",
    [
        [{"format": FORMAT}],
        [{"format": True}],
        [IDENTITY | {"versions": 5}],
        [IDENTITY | {"inputs": {"base": {"x": 5}, "aligned": {}}}],
        [IDENTITY, {"session": 1}],
        [IDENTITY, {"session": 1, "host": "h", "time": []}],
        [IDENTITY, {"tensor": 5}],
        [IDENTITY, {"tensor": TENSOR_RECORD | {"name": {}}}],
        [IDENTITY, {"tensor": TENSOR_RECORD | {"n_bytes": "4"}}],
        [IDENTITY, {"tensor": TENSOR_RECORD | {"matrices": [5]}}],
        [IDENTITY, {"tensor": TENSOR_RECORD | {"notices": [5]}}],
    ],
)
def test_journals_that_mean_nothing_are_refused(tmp_path, lines):
    (tmp_path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ResumeError, match="damaged"):
        replay(tmp_path)


def test_a_journal_nested_deeply_ends_there(tmp_path):
    (tmp_path / JOURNAL).write_text(json.dumps(IDENTITY) + "\n" + "[" * 100_000 + "\n")
    assert replay(tmp_path).finished == {}


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "..", "/etc/passwd", "\ud800"])
def test_a_manifest_of_names_that_no_file_has_fails_and_does_not_crash(tmp_path, name):
    found = {"format": 1, "inputs": {}, "options": {}, "totals": {}, "index": {}}
    found |= {"shards": {name: {"size": 4}}, "tensors": {}, "files": {name: {}}}
    (tmp_path / MANIFEST).write_text(json.dumps(found))
    checks = list(verify_checksums(tmp_path))
    assert [check.ok for check in checks] == [False, False, False, False], "and the manifest has no seal"
    assert all(check.message.isprintable() for check in checks)


def test_sizes_that_no_file_has_fail_and_do_not_crash(tmp_path):
    shard(tmp_path / "x.safetensors", {"a": TENSOR}, bytes(16))
    found = {"format": 1, "inputs": {}, "options": {}, "totals": {}, "shards": {"x.safetensors": {"size": 2**64}}}
    found["tensors"] = {"a": {"shard": "x.safetensors", "n_bytes": 2**63}}
    (tmp_path / MANIFEST).write_text(json.dumps(found))
    (_, check) = verify_checksums(tmp_path)
    assert "does not say how long it or its tensors are" in check.message


@pytest.mark.parametrize(
    "value", ["[" * 2000, "[" * 500, "{a: " * 300, "- " * 2000, "x" * (1 << 17), "&a [*a]", "a: b: c"]
)
def test_a_card_whose_front_matter_is_hostile_stays_as_it_is(value):
    card = f"---\ntags: {value}\n---\n# A model\n"
    assert completed(card, {"tags": ["lox"]}) == card


def test_numbers_that_no_float_holds_are_refused():
    with pytest.raises(OptionError, match="--alpha is a int that is too large"):
        check_options(Options(alpha=10**5000))


# Files that are valid in a strange way: as the loaders have it.


@pytest.mark.parametrize("metadata", [None, {}, {"a": "b"}])
def test_metadata_that_is_null_is_none_and_is_kept(tmp_path, metadata):
    weights = {"a.weight": torch.randn(4, 4), "b": torch.ones(3)}
    base = write(tmp_path / "base", weights)
    aligned = write(tmp_path / "aligned", {name: tensor + 1 for name, tensor in weights.items()})
    path = aligned / "model.safetensors"
    data = path.read_bytes()
    n_header = int.from_bytes(data[:8], "little")
    header = {"__metadata__": metadata, **{k: v for k, v in json.loads(data[8 : 8 + n_header]).items() if k[0] != "_"}}
    shard(path, header, data[8 + n_header :])
    extrapolate(base, aligned, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert (file.metadata() or {}) == (metadata or {})
    assert read_shard(tmp_path / "out" / "model.safetensors").header == read_shard(path).header


def test_a_shard_without_a_tensor_is_one(tmp_path):
    assert read_shard(shard(tmp_path / "x.safetensors", {})).tensors == ()
    assert load_file(tmp_path / "x.safetensors") == {}
    base, aligned = (
        write(tmp_path / side, {"a.weight": torch.eye(3) + i}) for i, side in enumerate(("base", "aligned"))
    )
    (aligned / "model.safetensors").rename(aligned / "model-00001-of-00002.safetensors")
    shard(aligned / "model-00002-of-00002.safetensors", {})
    (aligned / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}))
    extrapolate(base, aligned, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model-00002-of-00002.safetensors") == {}
    assert all(check.ok for check in verify_checksums(tmp_path / "out"))
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    extrapolate(base, aligned, tmp_path / "out", resume=True, repair=True)
    assert all(check.ok for check in verify_checksums(tmp_path / "out"))


def test_bytes_after_the_last_tensor_are_refused_as_safetensors_refuses_them(tmp_path):
    path = shard(tmp_path / "x.safetensors", {"a": TENSOR}, bytes(20))
    with pytest.raises(CheckpointError, match="4 bytes after the last tensor"):
        read_shard(path)
    with pytest.raises(Exception, match="not fully covered"):
        load_file(path)


# Made up from nothing, by hypothesis: the structures that a mutation of a valid file does not come to.

NUMBERS = st.integers(-1, 20) | st.sampled_from([2**62, 2**63, 2**64, 10**400]) | st.floats()
KEYS = (
    st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "a", "options", "rank", "recipe", "n_bytes"])
    | st.text()
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | st.sampled_from(["F32", "BF16", "model.safetensors", "../x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "I8", "F4"]) | JSON, "shape": st.lists(NUMBERS, max_size=3) | JSON},
    optional={"data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON},
)
SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(header=st.dictionaries(st.text(), ENTRY | JSON, max_size=4) | JSON, data=st.binary(max_size=40))
def test_any_header_is_read_or_refused(tmp_path, header, data):
    path = shard(tmp_path / "x.safetensors", header, data)
    try:
        found = read_shard(path)
        said = ""
        with safe_open(path, "np") as file:
            assert set(file.keys()) == {info.name for info in found.tensors}
    except CheckpointError as error:
        said = str(error).replace("\n", "")
    assert said.isprintable()


@SHARED
@given(index=st.fixed_dictionaries({"weight_map": st.dictionaries(KEYS, JSON, max_size=3)}) | JSON, config=JSON)
def test_any_index_and_config_is_read_or_refused(tmp_path, index, config):
    for name, side in (("base", 0), ("aligned", 1)):
        if not (tmp_path / name).exists():
            write(tmp_path / name, {"a.weight": torch.eye(3) + side})
    (tmp_path / "aligned" / INDEX).write_text(json.dumps(index))
    (tmp_path / "aligned" / "config.json").write_text(json.dumps(config))
    try:
        said = plan(tmp_path / "base", tmp_path / "aligned").warnings
    except CheckpointError as error:
        said = error.problems
    assert "".join(said).isprintable()


PARTS = ("format", "shards", "tensors", "inputs", "options", "totals", "files", "index", "versions", "times")


@SHARED
@given(
    manifest=st.fixed_dictionaries(
        dict.fromkeys(PARTS, st.dictionaries(KEYS, JSON, max_size=3) | JSON) | {"format": st.just(1)}
    )
)
def test_any_manifest_is_read_or_refused(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    try:
        said = [check.message for check in verify_checksums(tmp_path)]
        read_recipe(tmp_path / MANIFEST)
    except LoxError as error:
        said = [str(error).replace("\n", "")]
    assert "".join(said).isprintable()
