"""The arms of the experiment: aligned itself, LoX by `lox-stream run`, and controls whose updates are as large.

A control changes the same matrices as LoX, each by an update of the norm that LoX's has there, and rounds as LoX does:

    random   alpha * U diag(s_1 .. s_k) V', with U and V random and orthonormal
    tail     the directions k + 1 to 2 k of the difference in place of the first k
    scaling  the whole difference, all directions in proportion

So what sets LoX apart from them is the direction, and nothing of size, rank or rounding.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lox_stream import plan

RANK, ALPHA = 6, 1.25  # of the paper
Control = Literal["random", "tail", "scaling"]


@dataclass(frozen=True, slots=True)
class Arm:
    """How an arm's weights come from base and aligned."""

    label: str  # in tables
    run: tuple[str, ...] = ()  # options of `lox-stream run`
    control: Control | None = None
    seed: int = 0  # of a random control
    rung: int | None = None  # of a ladder: base and so many directions of the alignment

    @property
    def recipe(self) -> dict[str, Any]:
        """All that sets its weights, for the cache."""
        rung = {} if self.rung is None else {"rung": self.rung}
        return {"run": list(self.run), "control": self.control, "seed": self.seed, **rung}


def lox(label: str, rank: int = RANK, alpha: float = ALPHA, *more: str) -> Arm:
    return Arm(label, ("--rank", str(rank), "--alpha", str(alpha), *more))


ARMS = {
    "aligned": Arm("aligned"),
    "lox": lox("LoX, k 6, alpha 1.25"),
    "random": Arm("random directions, as large", control="random"),
    "tail": Arm("directions 7 to 12, as large", control="tail"),
    "scaling": Arm("whole difference, as large", control="scaling"),
    "lox-alpha0.5": lox("LoX, k 6, alpha 0.5", alpha=0.5),
    "lox-alpha2": lox("LoX, k 6, alpha 2", alpha=2.0),
    "lox-rank1": lox("LoX, k 1, alpha 1.25", rank=1),
    "lox-rank3": lox("LoX, k 3, alpha 1.25", rank=3),
    "lox-rank12": lox("LoX, k 12, alpha 1.25", rank=12),
    "lox-full": lox("all directions, alpha 1.25", rank=0),
    "lox-stochastic": lox("LoX, rounded stochastically", RANK, ALPHA, "--rounding", "stochastic"),
    "lox-float32": lox("LoX, not rounded", RANK, ALPHA, "--dtype", "float32"),
    **{f"rung-{k}": Arm(f"base and rank {k} of the alignment", rung=k) for k in (1, 2, 3, 4, 6, 8)},
}


def make(arm: Arm, base: Path, aligned: Path, out: Path) -> None:
    """Write the arm's checkpoint to `out`, which must not be there."""
    if arm.control is not None:
        write_control(arm.control, base, aligned, out, arm.seed)
    elif arm.run:
        lox_stream("run", base, aligned, "--out", str(out), *arm.run)
    elif arm.rung is not None:
        lox_stream("analyze", base, aligned, "--ladder", f"{out}-{{k}}", "--rungs", str(arm.rung))
        out.with_name(f"{out.name}-{arm.rung}").rename(out)
    else:
        shutil.copytree(aligned, out)


def lox_stream(command: str, base: Path, aligned: Path, *options: str) -> bytes:
    """What the command prints on a pair."""
    words = [command, "--base", str(base), "--aligned", str(aligned), *options, "--quiet"]
    return subprocess.run([sys.executable, "-m", "lox_stream", *words], check=True, stdout=subprocess.PIPE).stdout


def write_control(control: Control, base: Path, aligned: Path, out: Path, seed: int = 0) -> None:
    """Aligned with each matrix that LoX extrapolates changed as the control says."""
    out.mkdir(parents=True)
    matrices = {step.name for step in plan(base, aligned).steps if step.action == "extrapolate"}
    before = {name: tensor for _, tensors in shards(base) for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(aligned.iterdir()):
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy2(file, out / file.name)
    for name, tensors in shards(aligned):
        for each in sorted(matrices & tensors.keys()):
            tensors[each] = changed(tensors[each], before[each], control, generator)
        save_file(tensors, out / name, metadata={"format": "pt"})


def shards(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of each file of weights, in the order of their names."""
    for file in sorted(folder.glob("*.safetensors")):
        yield file.name, load_file(file)


def changed(aligned: Tensor, base: Tensor, control: Control, generator: torch.Generator) -> Tensor:
    """aligned (m, n) plus the control's update, computed in float64 and rounded once to aligned's dtype."""
    delta = aligned.double() - base.double()
    size = ALPHA * float(leading(delta, RANK)[1].square().sum().sqrt())
    update = direction(delta, control, generator)
    norm = float(update.square().sum().sqrt())
    return (aligned.double() + update * (size / norm if norm else 0.0)).to(aligned.dtype)


def direction(delta: Tensor, control: Control, generator: torch.Generator) -> Tensor:
    """The control's update up to its size, (m, n) float64."""
    if control == "scaling":
        return delta
    if control == "tail":
        u, s, v = leading(delta, 2 * RANK)
        return (u[:, RANK:] * s[RANK:]) @ v[:, RANK:].T
    s = leading(delta, RANK)[1]
    u, v = (
        torch.linalg.qr(torch.randn(size, len(s), generator=generator, dtype=torch.float64))[0] for size in delta.shape
    )
    return (u * s) @ v.T


def leading(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k) of a float64 (m, n) matrix, by the Gram matrix of its short side.

    That leaves no digits to a value of the relative size eps^(1/2): the first twelve of a difference are larger.
    """
    if delta.shape[0] < delta.shape[1]:
        v, s, u = leading(delta.T, rank)
        return u, s, v
    vectors = torch.linalg.eigh(delta.T @ delta).eigenvectors.flip(1)[:, :rank]
    products = delta @ vectors
    s = torch.linalg.vector_norm(products, dim=0)
    return products / s.clamp_min(torch.finfo(s.dtype).tiny), s, vectors
