"""Which packages are installed: looked at before any of them is imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

State = Literal["ok", "note", "missing"]
REQUIRED = ("torch", "safetensors", "numpy", "xxhash", "click", "rich", "PyYAML")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `lox-stream doctor` looked at."""

    what: str
    state: State  # "missing": a run cannot work; "note": something could be had, or is slow
    found: str
    way_out: str = ""


def packages() -> Iterator[Finding]:
    """Python, and what lox-stream cannot do without."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in REQUIRED:
        try:
            yield Finding(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "missing", "is not installed", f"pip install {package}")
