"""Checkpoints of torch.distributed: read tensor by tensor, put together from the pieces of several ranks."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lox_stream import CheckpointError, DataError, OutputError, extrapolate
from lox_stream.for_dcp import DcpTensors, as_safetensors
from lox_stream.synthetic import pair_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.distributed about itself
SHAPES = {"model.layers.0.mlp.up_proj.weight": (70, 40), "model.norm.weight": (9,), "lm_head.weight": (50, 40)}
RANKS = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, store, out, saved = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in torch.load(saved).items()}
dcp.save({"model": tensors}, checkpoint_id=out)
dist.barrier()
os._exit(0)  # how gloo ends is no matter of ours
"""


def tensors(side: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: pair_of(shape[0], (*shape, 1)[1], generator)[side] for name, shape in SHAPES.items()}
    return {name: tensor if len(SHAPES[name]) == 2 else tensor[:, 0].contiguous() for name, tensor in found.items()}


def save(folder: Path, side: int) -> Path:
    dcp.save({"model": tensors(side), "optim": {"step": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_checkpoint_is_read_tensor_by_tensor(tmp_path):
    found = DcpTensors(save(tmp_path / "dcp", 1), prefix="model.")
    assert dict(found).keys() == SHAPES.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(1).items())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo, torch's own for CPUs")
def test_pieces_of_several_ranks_are_put_together(tmp_path):
    """Two processes save their halves, as FSDP does."""
    torch.save(tensors(1), tmp_path / "tensors.pt")
    (tmp_path / "rank.py").write_text(RANKS)
    words = [str(tmp_path / name) for name in ("store", "dcp", "tensors.pt")]
    ranks = [subprocess.Popen([sys.executable, tmp_path / "rank.py", str(rank), *words]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    found = DcpTensors(tmp_path / "dcp", prefix="model.")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(1).items())


def test_it_becomes_a_folder_that_run_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("lox_stream.for_dcp.SHARD_BYTES", 6000)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    sides = [
        as_safetensors(
            save(tmp_path / f"dcp{side}", side), tmp_path / name, prefix="model.", companions=[tmp_path / "config.json"]
        )
        for side, name in enumerate(("base", "aligned"))
    ]
    index = json.loads((sides[1] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    copied = {name: load_file(sides[1] / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(copied[name], tensor) for name, tensor in tensors(1).items())
    assert extrapolate(*sides, tmp_path / "out").totals.extrapolated == 2
    assert (tmp_path / "out" / "config.json").exists()


def test_what_is_none_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no \.metadata, expected a checkpoint of torch\.distributed"):
        DcpTensors(tmp_path)
    folder = save(tmp_path / "dcp", 0)
    with pytest.raises(CheckpointError, match=r"begins with 'app\.', expected some: found model\., optim\."):
        DcpTensors(folder, prefix="app.")
    with pytest.raises(OutputError, match="exists already"):
        as_safetensors(folder, tmp_path)
    (piece,) = folder.glob("*.distcp")
    piece.write_bytes(piece.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot be read: .*Copy the checkpoint again"):
        as_safetensors(folder, tmp_path / "new", prefix="model.")
    assert not (tmp_path / "new").exists()
    (folder / ".metadata").write_bytes(b"\x80nonsense")
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        DcpTensors(folder)


@pytest.mark.parametrize("way", ["as usual", "a file a tensor", "several threads"])
def test_what_torch_writes_is_read_to_the_last_field(tmp_path, way):
    """Whatever lies beside the model: optimizers, numbers, objects; each dtype, scalars, tensors without an element."""
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)
    model = {f"w{i}": torch.ones(3, 4).to(kind) for i, kind in enumerate(kinds)}
    model |= {"scalar": torch.tensor(3), "none": torch.empty(0, 3)}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}
    optim = {"state": {0: {"step": torch.ones(1), "x": [1, torch.ones(2)]}}, "param_groups": [group]}
    said = {"as usual": {}, "a file a tensor": {"single_file_per_rank": False}, "several threads": {"thread_count": 3}}
    writer = FileSystemWriter(tmp_path / "dcp", **said[way])
    dcp.save({"model": model, "optim": optim, "epoch": 3, "made by": Path}, storage_writer=writer, no_dist=True)
    ours, torchs = DcpTensors(tmp_path / "dcp", prefix="model."), FileSystemReader(tmp_path / "dcp").read_metadata()
    known = {name: one for name, one in torchs.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)}
    assert ours._metadata.state_dict_metadata == known
    assert ours._metadata.storage_data == {at: p for at, p in torchs.storage_data.items() if at.fqn in known}
    assert all(
        torch.equal(ours[name].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)) for name, t in model.items()
    )


def metadata_of(folder: Path) -> Metadata:
    return FileSystemReader(save(folder, 0)).read_metadata()


class Calls:
    """What unpickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


CODE = "import pathlib; pathlib.Path({!r}).touch()"


@pytest.mark.parametrize("function", [os.system, builtins.exec, builtins.getattr, torch.load])
@pytest.mark.parametrize("where", ["alone", "as the planner's", "as a tensor", "as a place", "as a dtype"])
def test_no_code_of_a_metadata_is_run(tmp_path, function, where):
    found, mark = metadata_of(tmp_path / "dcp"), tmp_path / "ran"
    evil = Calls(function, f"touch {mark}" if function is os.system else CODE.format(str(mark)))
    if where == "as the planner's":
        found.planner_data = evil
    elif where == "as a tensor":
        found.state_dict_metadata["model.evil"] = evil
    elif where == "as a place":
        found.storage_data[MetadataIndex("model.evil")] = evil
    elif where == "as a dtype":
        found.state_dict_metadata["model.lm_head.weight"].properties = evil
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(evil if where == "alone" else found, protocol=protocol)
        (tmp_path / "dcp" / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"it (asks for|has operations).*do not trust it before you know why"):
            DcpTensors(tmp_path / "dcp")
        assert not mark.exists()


def test_a_pickle_changes_no_class_and_no_function_of_torch(tmp_path):
    """With operations that torch writes: a function of the program gets an attribute, a class another method."""
    for name in (b"torch.distributed.checkpoint.metadata\nMetadata", b"torch.serialization\n_get_layout"):
        for state in (b"}\x8c\x05cacheK\x01s", b"N}\x8c\x0c__setstate__K\x01s\x86"):
            (tmp_path / ".metadata").write_bytes(b"\x80\x04c" + name + b"\n" + state + b"b.")
            with pytest.raises(CheckpointError, match="it changes what is no description of a tensor"):
                DcpTensors(tmp_path)
    assert not hasattr(Metadata, "__setstate__")


def test_a_key_that_takes_for_ever_to_hash_is_refused(tmp_path):
    twice = b"".join(b"\x94h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100))  # a pair of the last, ...
    (tmp_path / ".metadata").write_bytes(b"\x80\x04})" + twice + b"K\x01s.")
    with pytest.raises(CheckpointError, match="a key in it is a tuple"):
        DcpTensors(tmp_path)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_no_name_in_it_leads_outside_of_the_folder(tmp_path, file):
    found = metadata_of(tmp_path / "dcp")
    found.storage_data = {
        at: _StorageInfo(file, place.offset, place.length) for at, place in found.storage_data.items()
    }
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="leads outside of the folder"):
        DcpTensors(tmp_path / "dcp")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: vars(found).clear(), "it holds a Metadata, expected named tensors"),
        (
            lambda found: setattr(found.state_dict_metadata["lm_head.weight"], "size", (3, 4)),
            "no dtype, shape and chunks",
        ),
        (
            lambda found: setattr(found.state_dict_metadata["lm_head.weight"], "chunks", [3]),
            "no dtype, shape and chunks",
        ),
        (lambda found: [setattr(place, "offset", "x") for place in found.storage_data.values()], "does not say where"),
    ],
)
def test_what_describes_no_tensor_is_refused(tmp_path, change, told):
    found = metadata_of(tmp_path / "dcp")
    found.state_dict_metadata = {name.removeprefix("model."): one for name, one in found.state_dict_metadata.items()}
    found.storage_data = {MetadataIndex("lm_head.weight", [0, 0]): next(iter(found.storage_data.values()))}
    change(found)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match=told):
        DcpTensors(tmp_path / "dcp")
