"""Checkpoints of torch.distributed (DCP, FSDP) as inputs: tensor by tensor, whatever ranks wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lox_stream.dcp_metadata import read_metadata
from lox_stream.errors import CheckpointError, DataError, OutputError
from lox_stream.layout import INDEX_SUFFIX
from lox_stream.names import listing, printable
from lox_stream.pickles import RefusedError
from lox_stream.rewriting import balanced

SHARD_BYTES = 2_000_000_000


class DcpTensors(Mapping[str, Tensor]):
    """The tensors of a DCP folder, each read and put together when it is asked for; one process, no process group.

    `prefix` is what the trainer put before the model's names, such as "model." or "app.model."; what has another
    beginning (optimizers) is left out. No code of the folder is run: of its pickles only what describes tensors is
    read (`dcp_metadata`, and torch's own `weights_only`). Raises CheckpointError.

        tensors = DcpTensors("step-1000", prefix="model.")
        w = extrapolate_tensor(name, tensors[name], base[name])
    """

    def __init__(self, folder: str | Path, *, prefix: str = "") -> None:
        self.folder, self._prefix = Path(folder), prefix
        where = printable(self.folder)
        if not (self.folder / ".metadata").is_file():
            raise CheckpointError(
                [f"{where}: has no .metadata, expected a checkpoint of torch.distributed. Check the path"]
            )
        try:
            self._metadata = read_metadata(self.folder / ".metadata")
        except (RefusedError, OSError) as error:
            raise CheckpointError(
                [
                    f"{where}/.metadata: cannot be read: {printable(str(error))}. Copy the checkpoint again; if it is "
                    "the same then, do not trust it before you know why"
                ]
            ) from error
        found = self._metadata.state_dict_metadata
        self._known = {
            name.removeprefix(prefix): said
            for name, said in found.items()
            if name.startswith(prefix) and isinstance(said, TensorStorageMetadata)
        }
        if not self._known:
            firsts = dict.fromkeys(f"{name.split('.')[0]}." for name in found)
            raise CheckpointError(
                [f"{where}: no tensor has a name that begins with {prefix!r}, expected some: found {listing(firsts)}"]
            )

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError for a name that is none, DataError for a file that cannot be read."""
        said = self._known[name]
        try:
            tensor = torch.empty(said.size, dtype=said.properties.dtype)
            load({self._prefix + name: tensor}, storage_reader=_Reader(self.folder, self._metadata), no_dist=True)
        except (Exception, CheckpointException) as error:  # torch's own has the traceback of each rank in its text
            last = " ".join(str(error).strip().splitlines()[-1:])
            raise DataError(
                f"{printable(self.folder)}: {printable(name)} cannot be read: {printable(last)}. Copy the checkpoint "
                "again"
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._known))

    def __len__(self) -> int:
        return len(self._known)

    def n_bytes(self, name: str) -> int:
        """Of a tensor, without reading it."""
        said = self._known[name]
        return said.size.numel() * said.properties.dtype.itemsize


class _Reader(FileSystemReader):
    """torch's own, which would unpickle `.metadata` again, and all that is in it."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def as_safetensors(
    folder: str | Path, out: str | Path, *, prefix: str = "", companions: Iterable[str | Path] = ()
) -> Path:
    """Copy the model in a DCP folder to a new folder of safetensors shards, which all of lox-stream reads.

    Holds one shard of at most 2 GB, or one larger tensor, in memory. `companions` are files that belong to the model
    (config.json, the tokenizer), which DCP does not keep. The folder appears when it is whole. Raises CheckpointError,
    and OutputError where `out` exists.
    """
    tensors, out = DcpTensors(folder, prefix=prefix), Path(out)
    if out.exists():
        raise OutputError(f"{printable(out)}: exists already, expected a new folder. Choose another")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = list(tensors)
    runs = balanced([tensors.n_bytes(name) for name in names], SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        save_file({name: tensors[name] for name in names[run]}, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[run], file)
    for companion in map(Path, companions):
        shutil.copy(companion, partial / companion.name)
    total = sum(map(tensors.n_bytes, names))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2))
    return partial.rename(out)
