"""Which device computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from lox_stream.cards import CudaCard
from lox_stream.costs import CARD_MOST, CARD_SHARE
from lox_stream.errors import DeviceError
from lox_stream.matching import Step
from lox_stream.on_card import OnCard
from lox_stream.options import Options, is_gpu
from lox_stream.planning import card_memory_needed


def check_device(options: Options, steps: Sequence[Step] = ()) -> None:
    """Raise DeviceError for a device that cannot be used, or whose memory is too small for a matrix of `steps`.

    "auto" computes on the CPU in this release.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise DeviceError(
            f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()!r}, expected 'highest': "
            "float32 products would be rounded further. Call torch.set_float32_matmul_precision('highest') before"
        )
    if is_gpu(options.device):
        missing = _missing(options.device) or _too_little(steps, options)
        if missing:
            raise DeviceError(f"--device {options.device}: {missing}. Compute on the CPU with --device cpu")


def card_of(options: Options) -> OnCard | None:
    """The GPU that was asked for; None for the CPU."""
    if not is_gpu(options.device):
        return None
    card = CudaCard(_index(options.device))
    return OnCard(card, usable_bytes(options, card.free_bytes()))


def usable_bytes(options: Options, free_bytes: int) -> int:
    """Of the card's memory, so much as was asked for, or a share of what is free."""
    return options.gpu_memory_bytes or int(free_bytes * CARD_SHARE)


def _index(device: str) -> int:
    return torch.device(device).index or 0


def _missing(device: str) -> str:
    """What a GPU lacks that is asked for, in words; nothing if it can be used."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"no usable CUDA GPU: torch {torch.__version__} was built without CUDA"
        return (
            f"no usable CUDA GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) finds none; nvidia-smi tells "
            "if the driver does"
        )
    count = torch.cuda.device_count()
    if _index(device) >= count:
        return f"no such GPU: torch sees {count}, numbered from 0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which the GPU kernels are written in. Install lox-stream[gpu]"
    from lox_stream.kernels.gpu.working import why_not

    broken = why_not()
    if broken:
        return f"Triton does not work here: {broken}. It needs a C compiler and Python's headers"
    return ""


def _too_little(steps: Sequence[Step], options: Options) -> str:
    free_bytes = CudaCard(_index(options.device)).free_bytes()
    if options.gpu_memory_bytes > CARD_MOST * free_bytes:
        most = int(CARD_MOST * free_bytes)
        return f"--gpu-memory is {options.gpu_memory_bytes}, expected at most {most}: CUDA's libraries need the rest"
    return too_large(steps, options.svd, usable_bytes(options, free_bytes))


def too_large(steps: Sequence[Step], svd: str, usable_bytes: int) -> str:
    """The first matrix that a card cannot take in so many bytes, in words; nothing if it can take them all."""
    for step in steps:
        needed = card_memory_needed(step, svd)
        if needed > usable_bytes:
            return (
                f"{step.name} {(step.m, step.n)} takes {needed / 1e9:.2f} GB of GPU memory, expected at most the "
                f"{usable_bytes / 1e9:.2f} GB that may be used. Free some, or give it more with --gpu-memory"
            )
    return ""
