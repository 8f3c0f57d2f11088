"""Files of torch.save: read where they lie, nothing in them is run, and the output is safetensors."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from folders import write
from safetensors.torch import load_file, save_file

from lox_stream import Options, extrapolate, stream
from lox_stream.checkpoint import open_checkpoint
from lox_stream.errors import CheckpointError
from lox_stream.recomputing import compare_all
from lox_stream.sampling import choose_sample
from lox_stream.torch_files import read_torch_file
from lox_stream.verifying import verify_checksums

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(40, 16, generator=generator).bfloat16(),
        "model.layers.0.up_proj.weight": torch.randn(24, 16, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(16, generator=generator),
        "model.ids": torch.arange(5),
    }


def moved(tensors):
    generator = torch.Generator().manual_seed(1)
    return {
        name: (t.float() + 0.01 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def saved(folder, tensors, *, shards=1, name="pytorch_model"):
    """As transformers saved before safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shards == 1:
        torch.save(tensors, folder / f"{name}.bin")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"{name}-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[number::shards])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{name}.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_found_where_they_lie(tmp_path, dtype):
    shared = torch.arange(60).to(dtype)
    given = {
        "a": torch.arange(12).reshape(3, 4).to(dtype),
        "b": shared[10:30].view(4, 5),
        "c": shared[30:].view(5, 6),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "parameter": torch.nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False),
    }
    torch.save(collections.OrderedDict(given), tmp_path / "x.bin")
    shard = read_torch_file(tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    assert {tensor.name for tensor in shard.tensors} == set(given)
    for tensor in shard.tensors:
        right = given[tensor.name].detach().contiguous()
        assert tensor.shape == tuple(right.shape)
        assert data[tensor.start : tensor.start + tensor.n_bytes] == right.view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_an_output_is_what_safetensors_inputs_give(tmp_path, tensors, shards):
    """On either side, in one file or in several."""
    aligned = moved(tensors)
    base, theirs = write(tmp_path / "base", tensors), write(tmp_path / "aligned", aligned)
    expected = dict(stream(base, theirs, options=Options(rank=2)))
    ours = saved(tmp_path / "base_bin", tensors, shards=shards), saved(tmp_path / "aligned_bin", aligned, shards=shards)
    for number, sides in enumerate([(ours[0], theirs), (base, ours[1]), ours]):
        out = tmp_path / f"out{number}"
        extrapolate(*sides, out, options=Options(rank=2))
        assert not list(out.glob("*.bin*"))
        files = sorted(out.glob("*.safetensors"))
        assert len(files) == (shards if sides[1] == ours[1] else 1)
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        if len(files) > 1:
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"].values()) == {file.name for file in files}
        assert all(check.ok for check in verify_checksums(out))
        compared = list(compare_all(choose_sample(out, *sides, count=9)))
        assert len(compared) == 4
        assert all(one.ok for one in compared)
    assert (tmp_path / "out2" / "config.json").exists()


def test_a_stopped_run_goes_on(tmp_path, tensors, monkeypatch):
    sides = saved(tmp_path / "base", tensors), saved(tmp_path / "aligned", moved(tensors), shards=2)
    extrapolate(*sides, tmp_path / "whole", options=Options(rank=2))
    from lox_stream import writer

    real, calls = writer.Output.done, []

    def done(self, facts):
        real(self, facts)
        calls.append(facts.name)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.Output, "done", done)
        with pytest.raises(KeyboardInterrupt):
            extrapolate(*sides, tmp_path / "out", options=Options(rank=2))
    extrapolate(*sides, tmp_path / "out", options=Options(rank=2), resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_safetensors_are_taken_where_both_are_there(tmp_path, tensors):
    folder = saved(tmp_path / "both", tensors)
    save_file(moved(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    assert [shard.name for shard in open_checkpoint(folder).shards] == ["model.safetensors"]


WAS_HERE = Path(tempfile.gettempdir()) / "lox-stream-was-here"


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {WAS_HERE}",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a": Evil()}, r"it asks for (posix|nt|os)\.system"),
        ({"a": torch.nn.Linear(2, 2)}, r"it asks for .*Linear"),
        ([torch.ones(2)], "holds a list, expected named tensors"),
        ({"a": 1, "b": torch.ones(2)}, "a are no tensors"),
        ({3: torch.ones(2)}, "holds a dict, expected named tensors"),
        ({"a": torch.ones(2, 3).T}, r"its elements are not in a row \(shape \(3, 2\), strides \(1, 3\)\)"),
        ({"a": torch.ones(2).to_sparse()}, "is refused"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "is refused"),
    ],
)
def test_what_asks_for_more_than_tensors_is_refused(tmp_path, content, told):
    folder = tmp_path / "x"
    folder.mkdir()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=told) as raised:
        open_checkpoint(folder)
    assert "save it as safetensors" in str(raised.value)
    assert not WAS_HERE.exists()


def test_a_trainers_checkpoint_with_a_state_dict_inside_is_read(tmp_path, tensors):
    folder = tmp_path / "x"
    folder.mkdir()
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "pytorch_model.bin")
    assert set(open_checkpoint(folder).tensors) == set(tensors)


def damaged(path, change):
    """The archive again, with a member changed."""
    old = shutil.move(path, path.with_suffix(".old"))
    with zipfile.ZipFile(old) as archive, zipfile.ZipFile(path, "w") as new:
        for member in archive.infolist():
            name, data, kind = change(member.filename, archive.read(member))
            if name:
                new.writestr(name, data, kind)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda n, d: (n, d, zipfile.ZIP_DEFLATED), "is compressed or cut"),
        (lambda n, d: (n, d[:8] if "/data/" in n else d, zipfile.ZIP_STORED), "reaches beyond its storage"),
        (lambda n, d: (None if "/data/" in n else n, d, zipfile.ZIP_STORED), "reaches beyond its storage"),
        (lambda n, d: (None if n.endswith("data.pkl") else n, d, zipfile.ZIP_STORED), r"no data\.pkl"),
        (lambda n, d: (n, b"big" if n.endswith("byteorder") else d, zipfile.ZIP_STORED), "not little-endian"),
        (lambda n, d: (n, d[:-9] if n.endswith("data.pkl") else d, zipfile.ZIP_STORED), "pickle is refused"),
        (lambda n, d: (n, b"\x80\x02." if n.endswith("data.pkl") else d, zipfile.ZIP_STORED), "pickle is refused"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, tensors, change, told):
    folder = saved(tmp_path / "x", tensors)
    damaged(folder / "pytorch_model.bin", change)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(folder)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, tensors):
    folder = saved(tmp_path / "x", tensors)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for length in range(0, len(whole), 97):
        (folder / "pytorch_model.bin").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)


def test_a_flipped_byte_is_refused_or_changes_no_place(tmp_path, tensors):
    """Whatever a file says, nothing but a CheckpointError comes out, and no tensor lies outside of the file."""
    folder = saved(tmp_path / "x", tensors)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for at in range(0, len(whole), 41):
        changed = bytearray(whole)
        changed[at] ^= 0x41
        (folder / "pytorch_model.bin").write_bytes(changed)
        try:
            found = open_checkpoint(folder).tensors.values()
        except CheckpointError:
            continue
        assert all(0 <= t.start <= t.start + t.n_bytes <= len(whole) for t in found)


def test_an_old_pickle_without_an_archive_is_refused(tmp_path, tensors):
    folder = tmp_path / "x"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="pickle, as old torch"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="not a file that can be mapped"):
        open_checkpoint(folder)
