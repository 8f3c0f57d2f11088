"""Which devices compute, and by which kernels."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from lox_stream.cards import CudaCard
from lox_stream.costs import CARD_MOST, CARD_SHARE
from lox_stream.errors import DeviceError
from lox_stream.installed import way_to
from lox_stream.kernels import on_gpu
from lox_stream.on_card import Cards, OnCard
from lox_stream.options import Options, is_gpu
from lox_stream.planning import Plan, too_large

DRIVER = Path("/proc/driver/nvidia/version")
SLOWER = "the GPU computes with the kernels of torch, which are slower (--kernels torch)"


def settled(made: Plan) -> Plan:
    """The plan as it is carried out here: on a GPU, with the choice of kernels made, and a warning where that is slow.

    "auto" computes on the CPU in this release. Raises DeviceError for a device that cannot be used, or whose memory is
    too small for a matrix.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError as problem:  # where torch's two interfaces for it were both used
        precision = str(problem).splitlines()[0]
    if precision != "highest":
        raise DeviceError(
            f"torch.get_float32_matmul_precision() is {precision!r}, expected 'highest': float32 products would be "
            "rounded further. Call torch.set_float32_matmul_precision('highest') before"
        )
    options = made.options
    if not is_gpu(options.device):
        return made
    found = missing(options.device) or _too_little(made)
    if found:
        raise DeviceError(f"--device {options.device}: {found}. Compute on the CPU with --device cpu")
    if options.kernels == "torch":
        said = any(warning.startswith(SLOWER) for warning in made.warnings)  # where a plan is settled twice
        return made if said else replace(made, warnings=(*made.warnings, f"{SLOWER}, as was asked for"))
    broken = without_triton(_asked(options)[0])
    if broken and options.kernels == "triton":
        raise DeviceError(f"--kernels triton: {broken}. Compute with those of torch, which are slower: --kernels torch")
    return replace(
        made,
        options=replace(options, kernels="torch" if broken else "triton"),
        warnings=(*made.warnings, *([f"{SLOWER}: {broken}"] if broken else [])),
    )


def cards_of(options: Options) -> Cards | None:
    """The GPUs that were asked for; None for the CPU."""
    if not is_gpu(options.device):
        return None
    kernels = on_gpu("torch" if options.kernels == "torch" else "triton")
    cards = [CudaCard(index) for index in _asked(options)]
    return Cards([OnCard(card, usable_bytes(options, card.free_bytes()), kernels) for card in cards])


def usable_bytes(options: Options, free_bytes: int) -> int:
    """Of a card's memory, so much as was asked for, or a share of what is free."""
    return options.gpu_memory_bytes or int(free_bytes * CARD_SHARE)


def indices(device: str, count: int) -> list[int]:
    """The numbers of the GPUs that a value of `Options.device` names, where there are `count`.

    >>> indices("cuda", 2), indices("cuda:all", 2), indices("cuda:3,1", 2)
    ([0], [0, 1], [3, 1])
    """
    named = device.removeprefix("cuda").removeprefix(":")
    return list(range(count)) if named == "all" else [int(number) for number in (named or "0").split(",")]


def _asked(options: Options) -> list[int]:
    return indices(options.device, torch.cuda.device_count())


def missing(device: str) -> str:
    """What is wrong with the GPUs that are asked for, in words; nothing if they can be used."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"no usable CUDA GPU: torch {torch.__version__} was built without CUDA"
        return f"no usable CUDA GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) finds none, {driver()}"
    count = torch.cuda.device_count()
    asked = indices(device, count)
    if max(asked) >= count:
        return f"no such GPU: torch sees {count}, numbered from 0"
    kinds = sorted({torch.cuda.get_device_name(index) for index in asked})
    if len(kinds) > 1:
        return f"these GPUs are of several kinds, whose sums differ in the last bits: {', '.join(kinds)}. Name one kind"
    return ""


def driver() -> str:
    """Which driver of NVIDIA runs here, in words."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text())
    except OSError:
        return "and no driver of NVIDIA runs here"
    return f"with NVIDIA's driver {found[1] if found else 'of unknown version'}: nvidia-smi tells more"


def without_triton(index: int) -> str:
    """Why the kernels in Triton cannot be used, in words; nothing where they can."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed. The extra [gpu] has it: {way_to('gpu')}"
    from lox_stream.kernels.gpu.working import why_not

    with torch.cuda.device(index):
        broken = why_not(torch.device("cuda", index))
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return broken and (
        f"Triton {version('triton')} does not work here (torch {torch.__version__}, compute capability {capability}): "
        f"{broken}. It needs a C compiler and Python's headers"
    )


def _too_little(made: Plan) -> str:
    options = made.options
    free_bytes = min(CudaCard(index).free_bytes() for index in _asked(options))
    if options.gpu_memory_bytes > CARD_MOST * free_bytes:
        most = int(CARD_MOST * free_bytes)
        return f"--gpu-memory is {options.gpu_memory_bytes}, expected at most {most}: CUDA's libraries need the rest"
    return too_large(made.steps, options.svd, usable_bytes(options, free_bytes))
