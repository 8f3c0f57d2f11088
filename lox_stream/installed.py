"""Which packages are installed: looked at before any of them is imported."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

State = Literal["ok", "note", "missing"]
REQUIRED = ("torch", "safetensors", "numpy", "xxhash", "click", "rich", "PyYAML")
EXTRAS = {  # what for, and the packages with the versions that work, as pyproject.toml has them
    "hub": ("models on the hub", ("huggingface_hub>=0.30",)),
    "cloud": ("s3:// and https:// addresses", ("obstore>=0.8", "boto3>=1.34")),
    "numpy": ("bfloat16 and FP8 as NumPy arrays", ("ml_dtypes>=0.5",)),
    "peft": ("adapters in PEFT", ("peft>=0.17", "transformers>=4.51")),
    "mergekit": ("lox-mergekit", ("mergekit>=0.1.5,<0.2",)),
    "gguf": ("GGUF files", ("gguf>=0.17",)),
    "ray": ("run --ray", ("ray>=2.40",)),
    "bench": ("all solvers of bench", ("scipy>=1.15", "scikit-learn>=1.5", "matplotlib>=3.9", "plotext>=5.3,<6")),
    "gpu": ("kernels on a GPU", ("triton>=3.6",)),
}


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


def way_to(extra: str) -> str:
    """How to get what an extra brings: by itself, or with lox-stream where that is installed from a clone.

    >>> way_to("cloud")
    "pip install 'obstore>=0.8' 'boto3>=1.34' (or in a clone of lox-stream: pip install '.[cloud]')"
    """
    words = " ".join(f"'{package}'" for package in EXTRAS[extra][1])
    return f"pip install {words} (or in a clone of lox-stream: pip install '.[{extra}]')"


def extras() -> Iterator[Finding]:
    """Whether the packages of each extra are there, in versions that work."""
    for extra, (what, packages) in EXTRAS.items():
        found = {package: _version(name_of(package)) for package in packages}
        lacking = [name_of(package) for package, version in found.items() if not version]
        others = [f"{name_of(package)} {version}" for package, version in found.items() if not fits(package, version)]
        if lacking or others:
            said = [f"without {', '.join(lacking)}"] if lacking else []
            said += [f"{', '.join(others)} will not do"] if others else []
            yield Finding(f"[{extra}]", "note", f"{what}: {'; '.join(said)}", way_to(extra))
        else:
            there = ", ".join(f"{name_of(package)} {version}" for package, version in found.items())
            yield Finding(f"[{extra}]", "ok", f"{what}: {there}")


def name_of(package: str) -> str:
    """Its name, without the versions."""
    return re.split("[<>=]", package)[0]


def fits(package: str, version: str) -> bool:
    """Whether a version is one of those that `package` names; "", of what is not there, does.

    >>> fits("mergekit>=0.1.5,<0.2", "0.1.10"), fits("mergekit>=0.1.5,<0.2", "0.1.4"), fits("plotext>=5.3,<6", "6.0")
    (True, False, False)
    """
    least, most = (re.search(rf"{sign}([\d.]+)", package) for sign in (">=", "<"))
    return not version or (
        (least is None or _numbers(version) >= _numbers(least[1]))
        and (most is None or _numbers(version) < _numbers(most[1]))
    )


def _numbers(version: str) -> list[int]:
    """Of a release, without what follows: [0, 1, 5] of 0.1.5.post1."""
    return [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
