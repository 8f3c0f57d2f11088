"""Which devices may compute: what is wrong with them is said before the run, with what was found and the way out."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from lox_stream import Options, device, plan
from lox_stream.costs import bytes_on_card, part_rows
from lox_stream.device import cards_of, settled
from lox_stream.errors import DeviceError
from lox_stream.journal import byte_options
from lox_stream.kernels.gpu import working
from lox_stream.synthetic import write_pair

FREE = 1 << 30


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), {"model.a.weight": (2000, 1000)})


@pytest.fixture
def machine(monkeypatch):
    """One that says that it has three GPUs and a Triton that works."""
    has = SimpleNamespace(names=["H100", "H100", "A100"], triton="", free=FREE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(has.names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: has.names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(device.CudaCard, "free_bytes", lambda card: has.free)
    monkeypatch.setattr(working, "why_not", lambda device: has.triton)
    return has


def made(pair, **options):
    return settled(plan(*pair, options=Options(**options)))


def test_triton_computes_where_it_works(pair, machine):
    assert made(pair, device="cuda").options.kernels == "triton"
    assert made(pair, device="cuda", kernels="torch").options.kernels == "torch"
    assert made(pair, device="cuda").warnings == ()
    assert made(pair, device="cpu").options.kernels == "auto"


def test_without_triton_torch_computes_and_says_why(pair, machine):
    machine.triton = "FileNotFoundError: no gcc"
    found = made(pair, device="cuda")
    assert found.options.kernels == "torch"
    (warning,) = found.warnings
    for part in ("slower (--kernels torch)", "no gcc", "compute capability 9.0", torch.__version__, "C compiler"):
        assert part in warning
    assert settled(found).warnings == found.warnings, "said once"
    with pytest.raises(DeviceError, match=r"--kernels triton: Triton .* no gcc.*--kernels torch"):
        made(pair, device="cuda", kernels="triton")


def test_who_asks_for_the_kernels_of_torch_is_told_that_they_are_slower(pair, machine):
    found = made(pair, device="cuda", kernels="torch")
    assert found.warnings == (f"{device.SLOWER}, as was asked for",)
    assert settled(found).warnings == found.warnings, "said once"
    assert made(pair, device="cpu", kernels="auto").warnings == ()


def test_where_triton_is_not_installed_that_is_said(pair, machine, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed. The extra [gpu] has it: pip install" in made(pair, device="cuda").warnings[0]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("cuda:3", "no such GPU: torch sees 3"),
        ("cuda:all", "several kinds, .*A100, H100"),
        ("cuda:1,2", "several kinds"),
    ],
)
def test_gpus_that_do_not_go_are_refused(named, told, pair, machine):
    with pytest.raises(DeviceError, match=f"--device {named}: .*{told}.*--device cpu"):
        made(pair, device=named)


def test_without_a_gpu_torch_and_the_driver_are_named(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    with pytest.raises(DeviceError, match=r"\(CUDA 13\.0\) finds none, and no driver of NVIDIA runs here"):
        made(pair, device="cuda")
    words = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: gcc 12\n"
    (tmp_path / "version").write_text(words)
    with pytest.raises(DeviceError, match=r"driver 570\.86\.15: nvidia-smi"):
        made(pair, device="cuda")
    (tmp_path / "version").write_text("something else")
    with pytest.raises(DeviceError, match="driver of unknown version"):
        made(pair, device="cuda")


def test_gpus_of_one_kind_go_together(pair, machine):
    machine.names = ["H100", "H100"]
    for named in ("cuda:all", "cuda:0,1", "cuda:1,0", "cuda:1"):
        assert made(pair, device=named).options.device == named


def test_memory_that_is_not_there_is_refused(pair, machine):
    with pytest.raises(DeviceError, match=r"--gpu-memory is 1073741824, expected at most 966367641"):
        made(pair, device="cuda", gpu_memory_bytes=FREE)
    least = bytes_on_card(2000, 1000, 6, (2, 2), part_rows(2000, 1000))
    assert made(pair, device="cuda", gpu_memory_bytes=least)
    with pytest.raises(DeviceError, match=r"model\.a\.weight .* in the smallest blocks"):
        made(pair, device="cuda", gpu_memory_bytes=least - 1)
    machine.free = least
    with pytest.raises(DeviceError, match="Free some"):
        made(pair, device="cuda")


def test_a_run_goes_on_with_the_kernels_that_it_began_with():
    began = [byte_options(Options(device=name, kernels=by)) for name, by in (("cuda", "torch"), ("cuda:1", "triton"))]
    assert [kept["device"] for kept in began] == ["cuda --kernels torch", "cuda"]
    assert all("kernels" not in kept for kept in began), "journals know it by the device"


def test_the_cpu_has_no_cards():
    assert cards_of(Options()) is None
