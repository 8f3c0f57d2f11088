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

from lox_stream import Options, extrapolate, plan, stream
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
        ({3: torch.ones(2)}, "holds tensors whose keys are no names"),
        ({"a": torch.ones(2, 3).T}, r"its elements are not in a row \(shape \(3, 2\), strides \(1, 3\)\)"),
        ({"a": torch.ones(2).to_sparse()}, "it holds a sparse tensor, expected plain ones"),
        ({"a": torch.ones(2, device="meta")}, "it holds a tensor on the device meta, which has no numbers"),
        (
            {"a": torch.ones(2, dtype=torch.complex128)},
            "it holds a tensor of complex128, which safetensors does not have",
        ),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated or negated view"),
        ({"a": torch._neg_view(torch.ones(2))}, "conjugated or negated view"),
        (
            {"model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}},
            "named tensors under model, ema, expected them once",
        ),
        ({"model": {"a": torch.ones(2)}, "b": torch.ones(2)}, "model are no tensors"),
        ({"a\x1b[2J": 1}, r"a\\x1b\[2J are no tensors"),
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


NARROW = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def test_the_manifest_names_the_files_that_were_read(tmp_path, tensors):
    sides = saved(tmp_path / "base", tensors, shards=2), saved(tmp_path / "aligned", moved(tensors))
    extrapolate(*sides, tmp_path / "out")
    inputs = json.loads((tmp_path / "out" / "lox_stream.json").read_bytes())["inputs"]
    assert [*inputs["aligned"]["shards"]] == ["pytorch_model.bin"]
    assert [*inputs["base"]["shards"]] == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_that_have_no_storage_of_their_own_are_known_by_name(tmp_path, dtype):
    data = torch.arange(1, 9, dtype=torch.float32).to(NARROW[dtype])
    torch.save({"a": data[2:]}, tmp_path / "pytorch_model.bin")
    (info,) = read_torch_file(tmp_path / "pytorch_model.bin").tensors
    assert (info.dtype, info.shape) == (dtype, (6,))
    raw = (tmp_path / "pytorch_model.bin").read_bytes()[info.start : info.start + info.n_bytes]
    assert raw == data[2:].clone().view(torch.uint8).numpy().tobytes()


def test_float8_matrices_are_refused_as_what_they_are(tmp_path, tensors):
    eighth = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in tensors.items()}
    sides = saved(tmp_path / "base", tensors), saved(tmp_path / "aligned", eighth)
    with pytest.raises(CheckpointError, match=r"quantised tensors \(F8_E4M3 without a scale beside it\)"):
        plan(*sides)


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_the_only_state_dict_in_a_file_is_taken_wherever_it_lies(tmp_path, tensors, key):
    more = {"epoch": 3, "lr": 0.5, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "groups": [1]}, "nothing": {}}
    torch.save({key: tensors, **more}, tmp_path / "pytorch_model.bin")
    assert {info.name for info in read_torch_file(tmp_path / "pytorch_model.bin").tensors} == set(tensors)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a device, pipe or socket"):
        open_checkpoint(tmp_path)


def archive(path, pickled, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", byteorder)
        made.writestr("archive/data/0", b"12345678")
    return path


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\2tQ"


@pytest.mark.parametrize(
    ("pickled", "told"),
    [
        (b"}" + b")" + b"q\0h\0\x86" * 60 + b"K\1s.", "a key in it is a tuple"),  # 2^60 steps to hash
        (
            b"ccollections\nOrderedDict\n(])" + b"q\0h\0\x86" * 60 + b"K\1\x86atR.",
            "a dictionary in a way that torch does not",
        ),
        (b"\x8f(K\1\x90.", "operations that torch.save does not write"),
        (b"ccollections\nOrderedDict\n)\x81.", "operations that torch.save does not write"),
        (b"}X\1\0\0\0a" + TENSOR + b"K\0)" + b")tRX\5\0\0\0shapeK\1sbs.", ""),
        (b"}X\1\0\0\0a" + TENSOR + b"K\0K\2)tRs.", "without storage, shape or strides"),
        (b"}X\1\0\0\0a" + TENSOR + b"J\xff\xff\xff\xff))tRs.", "are no sizes"),
        (b"}X\1\0\0\0a" + TENSOR + b"K\0(" + b"K\1" * 70 + b"t(" + b"K\1" * 70 + b"ttRs.", "are no sizes"),
        (b"}X\1\0\0\0actorch._utils\n_rebuild_parameter\n(K\1tRs.", "a parameter that is no tensor"),
        (b"\x80\2}X\xff\xff\xff\x7fa.", "damaged or no pickle"),
        (b"\x80\4\x95\0\0\0\0\0\0\0\x40.", "damaged or no pickle"),
        (b"I" + b"9" * 5000 + b"\n.", "operations that torch.save does not write"),
        (b"\x96\0\0\0\0\0\1\0\0.", "operations that torch.save does not write"),  # a bytearray of 2^40 bytes, at once
        (b"}\x8a\xff" + b"\x7f" * 255 + TENSOR + b"K\0))tRs.", "keys are no names"),
        (b"", "damaged or no pickle"),
    ],
)
def test_pickles_that_were_made_to_harm_or_are_damaged_are_refused(tmp_path, pickled, told):
    with pytest.raises(CheckpointError, match="its pickle is refused: .*" + told):
        read_torch_file(archive(tmp_path / "x.bin", pickled))


def test_a_byte_order_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", pickle.dumps({}))
        made.writestr("archive/byteorder", b" " * (1 << 28))
    with pytest.raises(CheckpointError, match="not little-endian"):
        read_torch_file(tmp_path / "x.bin")
