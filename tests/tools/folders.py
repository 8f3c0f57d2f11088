"""Checkpoints as folders."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """One safetensors file and a config.json, in a new folder."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
