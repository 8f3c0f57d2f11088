"""Checkpoints of torch.distributed: read tensor by tensor, put together from the pieces of several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

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
