"""The solvers that one would pick for a truncated SVD, ours among them, each on a sweep of its knob.

Each gets the two weights. What takes an operator gets ours, what needs a dense matrix forms delta in float32, which is
part of its time. The knobs go from cheap to dear; where a solver has several, the others have the values that its
documentation or its users recommend: ten columns more than the rank, as sklearn has it.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lox_stream.delta import Delta, KeptDelta, operator
from lox_stream.kernels.cpu import Run
from lox_stream.options import Options
from lox_stream.samples import Sample
from lox_stream.update import ROUNDED, Matrix, Outlet, Setting, Solved, solve_matrices

Array = npt.NDArray[np.float32]

OVERSAMPLES = 10
MODULES = {"scipy": "scipy.sparse.linalg", "sklearn": "sklearn.utils.extmath"}  # of what a solver needs
ITERATIONS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
TOLERANCES = (0.1, 0.03, 0.01, 3e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5)
FULL_FLOPS, GRAM_FLOPS = (6.0, 20.0), (2.0, 9.0)  # of q p^2 and p^3, p the short side (Golub and Van Loan, 8.6 and 8.3)


@dataclass(frozen=True, slots=True)
class Problem:
    """The rank-k part of W1 - W0, (m, n) both."""

    w1: Tensor
    w0: Tensor
    rank: int
    alpha: float
    seed: int
    run: Run

    def dense(self) -> Tensor:
        """(m, n) float32."""
        return self.w1.to(torch.float32, copy=True).sub_(self.w0)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, slots=True)
class Found:
    """What a solver gave: (m, k), (k,) and (k, n), k at most the rank, float32 or float64."""

    u: Tensor
    s: Tensor
    vh: Tensor
    passes: int | None = None  # products with delta or its transpose, or both at once
    predicted_share: float | None = None  # of output elements that differ from the exact result
    method: str = ""  # that the solver picked


@dataclass(frozen=True, slots=True)
class Contender:
    """A solver and the values of its knob, from cheap to dear."""

    name: str
    knob: str
    values: tuple[float, ...]
    solve: Callable[[Problem, float], Found]
    needs: str = ""  # a package that is not among our dependencies
    in_worker: bool = False  # computes in our threads, with torch at one thread in each
    flops: tuple[float, float] = (0.0, 0.0)  # of q p^2 and p^3, for what is cubic

    def sweep(self, dtype: torch.dtype) -> tuple[float, ...]:
        """The knob's values; a tolerance means nothing for wide outputs."""
        return self.values[:1] if self.knob == "tolerance" and dtype not in ROUNDED else self.values

    @property
    def installed(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def load(self) -> None:
        """Import what it needs, or its first solve would pay for that."""
        if self.needs:
            importlib.import_module(MODULES[self.needs])

    def cubic_flops(self, m: int, n: int) -> float:
        """Of one solve by a method that costs so many, whatever the matrix is; 0.0 for those that iterate."""
        p, q = sorted((m, n))
        return self.flops[0] * q * p * p + self.flops[1] * p**3


def ours(problem: Problem, tolerance: float) -> Found:
    """What `lox-stream run --tolerance` does with one matrix."""
    return ours_together([problem], tolerance)[0]


def ours_together(problems: Sequence[Problem], tolerance: float) -> list[Found]:
    """What it does with several of one shape, which have one rank, alpha and `run`."""
    rank, alpha, run = problems[0].rank, problems[0].alpha, problems[0].run
    options = Options(rank=rank, alpha=alpha, tolerance=tolerance)
    matrices = [Matrix(one.w1, one.w0, Setting(options, rank, one.seed), (Outlet(alpha),)) for one in problems]
    return [_of_solved(one, alpha) for one in solve_matrices(matrices, run)]


def _of_solved(one: object, alpha: float) -> Found:
    assert isinstance(one, Solved), "delta is finite and not zero"
    found = one.found
    return Found(found.u, found.s.double() / one.scale, found.vh, found.passes, one.predicted_share(alpha), one.method)


def full_svd(problem: Problem, _: float) -> Found:
    u, s, vh = torch.linalg.svd(problem.dense(), full_matrices=False)
    k = problem.rank
    return Found(u[:, :k], s[:k], vh[:k])


def gram_eigh(problem: Problem, bits: float) -> Found:
    """Eigenvectors of the Gram matrix of the short side, in float32 or float64."""
    a = problem.dense()
    a = a.double() if bits == 64 else a
    turned = a.shape[0] < a.shape[1]
    tall = a.T if turned else a
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    return _from_right(tall, values, vectors, problem.rank, turned)


def _from_right(tall: Tensor, squares: Tensor, v: Tensor, rank: int, turned: bool) -> Found:
    """Factors from eigenpairs of A'A, ascending."""
    s, v = squares[-rank:].flip(0).clamp(min=0).sqrt(), v[:, -rank:].flip(1)
    u = tall @ v / s
    return Found(v, s, u.T) if turned else Found(u, s, v.T)


def svd_lowrank(problem: Problem, niter: float) -> Found:
    torch.manual_seed(problem.seed)  # it takes no generator
    a = problem.dense()
    k = problem.rank
    u, s, v = torch.svd_lowrank(a, q=min(k + OVERSAMPLES, *a.shape), niter=int(niter))
    return Found(u[:, :k], s[:k], v[:, :k].T, passes=2 * int(niter) + 2)


def torch_lobpcg(problem: Problem, niter: float) -> Found:
    """Of the dense Gram matrix, for it takes no operator."""
    a = problem.dense()
    turned = a.shape[0] < a.shape[1]
    tall = a.T if turned else a
    k = problem.rank
    start = torch.randn(tall.shape[1], k + OVERSAMPLES, generator=problem.generator())
    values, vectors = torch.lobpcg(tall.T @ tall, k=k, X=start, niter=int(niter), tol=0.0)
    return _from_right(tall, values.flip(0), vectors.flip(1), k, turned)


def sklearn_randomized(problem: Problem, n_iter: float) -> Found:
    from sklearn.utils.extmath import randomized_svd

    u, s, vh = randomized_svd(
        problem.dense().numpy(), problem.rank, n_oversamples=OVERSAMPLES, n_iter=int(n_iter), random_state=problem.seed
    )
    return Found(torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vh), passes=2 * int(n_iter) + 2)


def scipy_arpack(problem: Problem, tol: float) -> Found:
    return _svds(problem, solver="arpack", tol=tol)


def scipy_lobpcg(problem: Problem, maxiter: float) -> Found:
    return _svds(problem, solver="lobpcg", tol=1e-9, maxiter=int(maxiter))


def _svds(problem: Problem, **given: object) -> Found:
    from scipy.sparse.linalg import LinearOperator, svds

    op = _Counting(
        operator(problem.w1, problem.w0, problem.run, rms=Sample(problem.w1, problem.w0, problem.w1.dtype).delta_rms)
    )
    linear = LinearOperator(
        op.shape, matvec=op.matmul, rmatvec=op.rmatmul, matmat=op.matmul, rmatmat=op.rmatmul, dtype="float32"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge: how far it came is what we measure
        u, s, vh = svds(linear, k=problem.rank, rng=problem.seed, **given)
    u, s, vh = (torch.from_numpy(part.copy()) for part in (u[:, ::-1], s[::-1] / op.op.scale, vh[::-1]))
    return Found(vh.T, s, u.T, op.passes) if op.op.turned else Found(u, s, vh, op.passes)


class _Counting:
    """Our operator, for NumPy arrays of one or more columns, with its passes counted."""

    def __init__(self, op: Delta | KeptDelta) -> None:
        self.op, self.shape = op, op.shape
        self.passes = 0

    def matmul(self, x: Array) -> Array:
        return self._product(self.op.matmul, x)

    def rmatmul(self, y: Array) -> Array:
        return self._product(self.op.rmatmul, y)

    def _product(self, by: Callable[[Tensor], Tensor], x: Array) -> Array:
        self.passes += 1
        columns = torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1), np.float32))
        product: Array = by(columns).numpy().reshape(-1, *x.shape[1:])
        return product


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "lox-stream", "tolerance", (0.1, 0.03, 0.01, 3e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5), ours, in_worker=True
        ),
        Contender("full", "bits", (32,), full_svd, flops=FULL_FLOPS),
        Contender("gram-eigh", "bits", (32, 64), gram_eigh, flops=GRAM_FLOPS),
        Contender("svd_lowrank", "niter", ITERATIONS, svd_lowrank),
        Contender("randomized_svd", "n_iter", ITERATIONS, sklearn_randomized, needs="sklearn"),
        Contender("svds-arpack", "tol", (0.1, 1e-2, 1e-3, 1e-4, 1e-6), scipy_arpack, needs="scipy", in_worker=True),
        Contender("svds-lobpcg", "maxiter", ITERATIONS, scipy_lobpcg, needs="scipy", in_worker=True),
        Contender("torch.lobpcg", "niter", ITERATIONS, torch_lobpcg),
    )
}
