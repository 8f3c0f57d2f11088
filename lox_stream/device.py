"""Which device computes."""

from __future__ import annotations

from lox_stream.errors import DeviceError
from lox_stream.options import Options


def check_device(options: Options) -> None:
    """Raise DeviceError for a device that cannot be used. "auto" and "cpu" compute on the CPU in this release."""
    import torch

    if torch.get_float32_matmul_precision() != "highest":
        raise DeviceError(
            f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()!r}, expected 'highest': "
            "float32 products would be rounded further. Call torch.set_float32_matmul_precision('highest') before"
        )
    if not options.device.startswith("cuda"):
        return
    if torch.cuda.is_available():
        found = (
            f"torch {torch.__version__} sees {torch.cuda.get_device_name()}, but this release computes on the CPU only"
        )
    elif torch.version.cuda is None:
        found = f"torch {torch.__version__} was built without CUDA"
    else:
        found = (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; nvidia-smi tells if the driver does"
        )
    raise DeviceError(f"--device {options.device}: no usable CUDA GPU: {found}. Compute on the CPU with --device cpu")
