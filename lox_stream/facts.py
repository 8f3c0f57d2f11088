"""What is known of a tensor once it is written: the rows of the manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MatrixFacts:
    """One matrix (m, n) of a tensor, its delta `W1 - W0` and the update `alpha * U diag(S) Vh` put on it.

    Rigorous, up to float32 rounding: delta_norm, singular_values with their intervals, energy, residual.
    Estimated: gap, predicted_error, predicted_share. Counted: passes, retention.
    """

    delta_norm: float  # |delta|_F
    weight_norm: float  # |W1|_F, from a sample of its elements
    update_norm: float  # |alpha * U diag(S) Vh|_F
    retention: float | None  # <rounded - W1, update> / |update|^2; None without an update
    method: str  # "krylov" | "gram" | "exact" | "full rank" | "factors" | "zero"
    singular_values: tuple[float, ...] = ()
    radius: tuple[float, ...] = ()  # each s_i lies within radius_i of a singular value of delta
    energy: float | None = None  # sum(s^2) / |delta|_F^2
    residual: float | None = None  # max(|A v - s u|, |A' u - s v|) / s_1
    passes: int = 0  # over delta: for one product with it, or for two at once
    gap: float | None = None  # (s_k - s_(k+1)) / s_k, with the Krylov estimate of s_(k+1)
    unique: bool = True  # False: s_k and s_(k+1) agree within what float32 resolves
    predicted_error: float | None = None  # |E|_F / |rank-k part|_F
    predicted_share: float | None = None  # share of output elements that differ from the exact result
    converged: bool = True


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One finished tensor of the output."""

    name: str
    action: str  # "extrapolate" | "copy" | "rescale": as of a Step
    reason: str  # why it was copied, or "matrix"
    n_bytes: int
    elapsed_s: float
    checksum: str  # xxh3_128 of its bytes, hexadecimal
    matrices: tuple[MatrixFacts, ...] = ()
    notices: tuple[str, ...] = ()  # messages for a person about this tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """The files beside the weights of a finished output, by their names in its folder."""

    written: dict[str, bytes]  # manifest, indexes, model card: their content
    copied: dict[str, str]  # what travels with the weights: xxh3_128 of its content, hexadecimal
