"""The manifest and the verification: what they say of the bytes is true, and every wrong byte is found."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from lox_stream.checkpoint import Checkpoint, open_checkpoint
from lox_stream.documents import written_documents
from lox_stream.errors import OutputError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.manifest import FORMAT, as_json, corrected_index, joined, manifest_of, read_manifest, totals
from lox_stream.options import Options
from lox_stream.output_rules import MANIFEST
from lox_stream.planning import Plan
from lox_stream.verifying import Check, verify_checksums

INDEX = "model.safetensors.index.json"
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.ones(3, np.int8)},
    "model-00002-of-00002.safetensors": {"c": np.ones((2, 2), np.float16), "empty": np.ones((0, 3), np.float32)},
}


def matrix(**changes: object) -> MatrixFacts:
    facts = {
        "delta_norm": 1.0,
        "weight_norm": 10.0,
        "update_norm": 1.0,
        "retention": 0.5,
        "method": "krylov",
        "energy": 0.5,
        "predicted_share": 1e-4,
        "passes": 8,
    }
    return MatrixFacts(**(facts | changes))


def tensor(name: str, *matrices: MatrixFacts, action: str = "extrapolate", reason: str = "matrix") -> TensorFacts:
    return TensorFacts(name, action, reason, 24, 0.5, "00" * 16, matrices)


@pytest.fixture
def aligned(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "aligned"
    folder.mkdir()
    for name, tensors in SHARDS.items():
        (folder / name).write_bytes(save(tensors, {"format": "pt"}))
    weight_map = {key: name for name, tensors in SHARDS.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 7, "x": [1]}, "weight_map": weight_map}))
    return open_checkpoint(folder)


@pytest.fixture
def finished(aligned: Checkpoint) -> dict[str, TensorFacts]:
    """The facts of a copy of every tensor."""
    facts = {}
    for info in aligned.tensors.values():
        data = info.path.read_bytes()[info.start : info.start + info.n_bytes]
        facts[info.name] = TensorFacts(info.name, "copy", "vector", info.n_bytes, 0.0, xxhash.xxh3_128_hexdigest(data))
    return facts


@pytest.fixture
def plan(aligned: Checkpoint, tmp_path: Path) -> Plan:
    return Plan(aligned, aligned, aligned, tmp_path / "out", Options(skip=("x.*",)), (), ())


@pytest.fixture
def output(plan: Plan, finished: dict[str, TensorFacts]) -> Path:
    """A finished output that copies aligned."""
    shutil.copytree(plan.aligned.folder, plan.out)
    for name, data in written_documents(plan, finished, elapsed_s=2.0).written.items():
        (plan.out / name).write_bytes(data)
    return plan.out


def failures(out: Path) -> list[Check]:
    return [check for check in verify_checksums(out) if not check.ok]


def test_totals_weigh_energy_by_the_delta_and_retention_by_the_update() -> None:
    found = totals(
        [
            tensor("a", matrix(delta_norm=1.0, energy=0.9, update_norm=2.0, retention=0.5)),
            tensor("b", matrix(delta_norm=3.0, energy=0.1, update_norm=1.0, retention=1.0, predicted_share=0.25)),
            tensor("c", matrix(converged=False), matrix(unique=False, energy=None, retention=None)),
            tensor("d", action="copy", reason="identical"),
            tensor("e", action="copy", reason="vector"),
        ]
    )
    assert found.energy == pytest.approx((0.9 * 1 + 0.1 * 9 + 0.5 * 1) / 11, rel=1e-15)
    assert found.retention == pytest.approx((0.5 * 4 + 1.0 * 1 + 0.5 * 1) / 6, rel=1e-15)
    assert (found.tensors, found.extrapolated, found.copied, found.identical) == (5, 3, 2, 1)
    assert (found.n_bytes, found.passes, found.predicted_share) == (120, 32, 0.25)
    assert (found.not_converged, found.not_unique) == (("c",), ("c",))


def test_totals_of_nothing_are_none_and_not_nan() -> None:
    found = totals([tensor("a", action="copy"), tensor("b", matrix(delta_norm=0.0, update_norm=0.0))])
    assert (found.energy, found.retention) == (None, None)
    assert totals([]).predicted_share is None


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_the_squares_of_norms_neither_overflow_nor_vanish(scale: float) -> None:
    rows = [tensor("a", matrix(delta_norm=scale, energy=0.2)), tensor("b", matrix(delta_norm=scale, energy=0.4))]
    assert totals(rows).energy == pytest.approx(0.3, rel=1e-15)


def test_a_tensor_with_numbers_that_are_none_does_not_spoil_the_totals() -> None:
    rows = [tensor("a", matrix(delta_norm=math.nan)), tensor("b", matrix(energy=math.nan)), tensor("c", matrix())]
    assert totals(rows).energy == 0.5


@given(order=st.permutations(range(6)))
def test_totals_do_not_depend_on_the_order_in_which_tensors_finish(order: list[int]) -> None:
    rows = [tensor(f"t{i}", matrix(delta_norm=0.1 + i / 3, energy=1 / (i + 2), passes=i)) for i in range(6)]
    assert totals([rows[i] for i in order]) == totals(rows)


def test_the_manifest_covers_every_byte(plan: Plan, finished: dict[str, TensorFacts]) -> None:
    found = manifest_of(plan, finished, elapsed_s=2.0)
    for shard in plan.aligned.shards:
        row = found["shards"][shard.name]
        assert row["header_xxh3_128"] == xxhash.xxh3_128_hexdigest(shard.header)
        assert row["size"] == len(shard.header) + sum(info.n_bytes for info in shard.tensors)
        assert row["tensors_xxh3_128"] == joined(finished[info.name].checksum for info in shard.tensors)
    row = found["tensors"]["a"]
    assert (row["shard"], row["dtype"], row["shape"]) == ("model-00001-of-00002.safetensors", "F32", [2, 3])
    assert row["xxh3_128"] == xxhash.xxh3_128_hexdigest(np.arange(6, dtype=np.float32).tobytes())


def test_the_manifest_says_what_was_run_on_what(plan: Plan, finished: dict[str, TensorFacts]) -> None:
    sessions = [{"session": 1, "host": "h", "time": "2026-01-01"}, {"session": 2, "host": "h", "time": "2026-01-02"}]
    found = manifest_of(plan, finished, elapsed_s=2.0, sessions=sessions, warnings=["look"])
    assert found["format"] == FORMAT
    assert set(found["versions"]) == {"lox-stream", "torch", "numpy", "safetensors", "python"}
    assert found["options"]["skip"] == ["x.*"]
    assert found["inputs"]["aligned"]["path"] == str(plan.aligned.root)
    assert found["inputs"]["base"]["shards"][plan.base.shards[0].name]["size"] == plan.base.shards[0].size_bytes
    assert found["warnings"] == ["look"]
    assert found["times"]["started"] == "2026-01-01"
    assert (found["times"]["sessions"], found["times"]["elapsed_s"]) == (2, 2.0)


def test_no_nan_and_no_infinity_reaches_json(plan: Plan, finished: dict[str, TensorFacts]) -> None:
    finished["a"] = TensorFacts(
        "a", "extrapolate", "matrix", 24, math.inf, "00" * 16, (matrix(delta_norm=math.nan, gap=-math.inf),)
    )
    found = json.loads(as_json(manifest_of(plan, finished, elapsed_s=math.nan)))
    assert found["tensors"]["a"]["matrices"][0]["delta_norm"] is None
    assert found["tensors"]["a"]["elapsed_s"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json({"x": math.nan})


def test_the_index_is_aligneds_own_with_its_bytes_counted(aligned: Checkpoint) -> None:
    index = corrected_index(aligned)
    assert index["metadata"] == {"total_size": 24 + 3 + 8, "x": [1]}
    assert index["weight_map"] == aligned.index["weight_map"]
    assert aligned.index["metadata"]["total_size"] == 7


def test_a_manifest_is_read_back(output: Path, plan: Plan, finished: dict[str, TensorFacts]) -> None:
    assert read_manifest(output)["tensors"] == manifest_of(plan, finished, elapsed_s=0.0)["tensors"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a finished output of lox-stream"),
        ("{", "is not JSON"),
        ("[]", "has no format version"),
        ('{"format": "1"}', "has no format version"),
        (json.dumps({"format": FORMAT + 1}), rf"has format {FORMAT + 1}, .* reads up to {FORMAT}"),
        (json.dumps({"format": FORMAT}), "parts of the manifest are missing"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_explained(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(OutputError, match=message):
        read_manifest(tmp_path)


def test_a_right_output_passes_and_every_byte_of_it_is_read(output: Path, plan: Plan) -> None:
    checks = list(verify_checksums(output))
    assert all(check.ok and check.message == "" for check in checks)
    assert {check.name for check in checks} == {MANIFEST, INDEX, "README.md", *SHARDS, *plan.aligned.tensors}
    assert sum(check.n_bytes for check in checks) == sum(path.stat().st_size for path in output.iterdir())
    assert list(verify_checksums(output / "model-00001-of-00002.safetensors")) == checks


def test_every_wrong_byte_is_found(output: Path) -> None:
    path = output / "model-00001-of-00002.safetensors"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert failures(output), at


def test_a_wrong_tensor_is_named_alone(output: Path) -> None:
    path = output / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    name = open_checkpoint(output).shards[0].tensors[-1].name
    (found,) = failures(output)
    (info,) = [info for info in open_checkpoint(output).shards[0].tensors if info.name == name]
    assert (found.name, found.file, found.part, found.first_byte) == (name, path.name, "tensor", info.start)
    assert f"{name} (bytes {info.start} to {info.start + info.n_bytes} of the file)" in found.message
    assert "expected" in found.message


@pytest.mark.parametrize("n_bytes", [-1, 1])
def test_a_file_of_another_length_is_found(output: Path, n_bytes: int) -> None:
    path = output / "model-00002-of-00002.safetensors"
    size = path.stat().st_size
    os.truncate(path, size + n_bytes)
    assert f"found {size + n_bytes} bytes, expected {size}" in failures(output)[0].message


def test_a_missing_file_is_found_and_the_others_are_still_checked(output: Path) -> None:
    (output / "model-00001-of-00002.safetensors").unlink()
    checks = list(verify_checksums(output))
    assert [check.name for check in checks if not check.ok] == ["model-00001-of-00002.safetensors"]
    assert {"c", "empty"} <= {check.name for check in checks if check.ok}


@pytest.mark.parametrize("content", [None, "{", '{"weight_map": {"a": "elsewhere"}}', "[]"])
def test_an_index_that_does_not_lead_to_the_tensors_is_found(output: Path, content: str | None) -> None:
    (output / INDEX).unlink()
    if content is not None:
        (output / INDEX).write_text(content)
    assert [check.name for check in failures(output)] == [INDEX]


def test_a_manifest_that_was_edited_reads_no_file_outside_its_folder(output: Path) -> None:
    found = json.loads((output / MANIFEST).read_bytes())
    found["shards"]["../aligned/model-00001-of-00002.safetensors"] = found["shards"]["model-00001-of-00002.safetensors"]
    found["index"] = "/etc/passwd"
    (output / MANIFEST).write_text(json.dumps(found))
    assert [check.message.count("outside the folder") for check in failures(output)] == [0, 1, 1]
    assert failures(output)[0].name == MANIFEST


def test_a_manifest_that_says_nonsense_fails_and_does_not_crash(output: Path) -> None:
    found = json.loads((output / MANIFEST).read_bytes())
    found["shards"] = dict.fromkeys(found["shards"], 5)
    found["tensors"]["a"] = None
    found["tensors"]["ghost"] = {"shard": "model-00002-of-00002.safetensors"}
    (output / MANIFEST).write_text(json.dumps(found))
    assert {check.name for check in failures(output)} >= set(SHARDS)
    found["index"] = 5
    (output / MANIFEST).write_text(json.dumps(found))
    assert "5" in {check.name for check in failures(output)}


@pytest.mark.parametrize("header", ['{"a": 5}', "5", "not JSON", '{"a": {"data_offsets": [0]}}'])
def test_a_file_that_is_shorter_than_its_tensors_fails_even_with_the_right_hash(output: Path, header: str) -> None:
    path = output / "model-00001-of-00002.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    found = json.loads((output / MANIFEST).read_bytes())
    row = found["shards"][path.name]
    row["size"], row["header_xxh3_128"] = path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes())
    (output / MANIFEST).write_text(json.dumps(found))
    assert {check.file for check in failures(output)} == {MANIFEST, path.name}
