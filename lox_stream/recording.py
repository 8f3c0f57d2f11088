"""An analysis as data: one JSON document, and a table with a line for each matrix."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lox_stream import __version__
from lox_stream.advising import advice
from lox_stream.analysed import ROUNDINGS, Finding, Robustness, energy_of, mean_of, retained
from lox_stream.analysing import Analysis
from lox_stream.journal import finite
from lox_stream.names import place_name
from lox_stream.options import to_json

FORMAT = 1


def document_of(found: Analysis) -> dict[str, Any]:
    """The analysis as JSON holds it; what no matrix has, NaN and infinities are null."""
    asked, changed = found.asked, [one for one in found.findings if one.spectrum is not None]
    means = {
        name: mean and asdict(mean) | {"left": mean.left}
        for name, mean in (
            ("ours", mean_of(one.ours for one in changed)),
            ("reference", mean_of(one.reference for one in changed)),
        )
    }
    said = {
        "format": FORMAT,
        "lox_stream": __version__,
        "base": place_name(found.base),
        "aligned": place_name(found.aligned),
        "finetuned": None if found.finetuned is None else place_name(found.finetuned),
        "options": to_json(asked.options),
        "values": asked.values,
        "ranks": list(asked.ranks),
        "alphas": list(asked.alphas),
        "reference": asked.reference,
        "advice": list(advice(found.findings, asked)),
        "totals": {
            "matrices": len(found.findings),
            "changed": len(changed),
            "delta_norm": math.sqrt(math.fsum(one.delta_norm**2 for one in changed)),
            "weight_norm": math.sqrt(math.fsum(one.weight_norm**2 for one in found.findings)),
            "energy": [energy_of(changed, k) for k in range(1, asked.values + 1)],
            "retention": _grid(changed, asked.ranks, asked.alphas),
            "robustness": means,
        },
        "matrices": [record_of(one) for one in found.findings],
        "copied": dict(found.copied),
        "warnings": list(found.warnings),
        "elapsed_s": found.elapsed_s,
    }
    return dict(finite(said))


def _grid(findings: Sequence[Finding], ranks: Sequence[int], alphas: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"rank": k, "alpha": alpha, "rounding": rounding, "retention": retained(findings, k, alpha, rounding)}
        for k in ranks
        for alpha in alphas
        for rounding in ROUNDINGS
    ]


def record_of(one: Finding) -> dict[str, Any]:
    """One matrix."""
    spectrum, bulk = one.spectrum, one.bulk
    return {
        "name": one.name,
        "tensor": one.tensor,
        "module": one.module,
        "layer": one.layer,
        "shape": [one.m, one.n],
        "dtype": one.dtype,
        "delta_norm": one.delta_norm,
        "weight_norm": one.weight_norm,
        "relative": one.relative,
        "singular_values": [] if spectrum is None else list(spectrum.values),
        "radius": list(one.radius),
        "energy": [] if spectrum is None else list(spectrum.curve),
        "gaps": [] if spectrum is None else list(spectrum.gaps),
        "stable_rank": None if spectrum is None else spectrum.stable_rank,
        "entropy_rank": None if spectrum is None else list(one.entropy_rank),
        "noise": None if bulk is None else asdict(bulk),
        "retention": [
            {"rank": c.rank, "alpha": c.alpha, "rounding": c.rounding, "retention": c.retention} for c in one.cells
        ],
        "looked_at": one.looked_at,
        "ours": _robustness(one.ours),
        "reference": _robustness(one.reference),
        "notices": list(one.notices),
    }


def _robustness(found: Robustness | None) -> dict[str, Any] | None:
    return (
        None
        if found is None
        else {
            "rank": found.rank,
            "r_align": found.align,
            "r_ft": found.finetuned,
            "kept": found.kept,
        }
    )


def table_text(found: Analysis) -> str:
    """CSV: a line for each matrix, at the run's own rank and alpha."""
    k, alpha = found.asked.options.rank, found.asked.options.alpha
    values = [f"s_{i}" for i in range(1, found.asked.values + 1)]
    heads = [
        *("name", "module", "layer", "rows", "columns", "dtype", "delta_norm", "weight_norm", "relative"),
        *(
            f"energy_{k}",
            f"gap_{k}",
            "stable_rank",
            "entropy_rank_least",
            "entropy_rank_most",
            "outliers",
            "noise_edge",
        ),
        *(f"retention_{rounding}" for rounding in ROUNDINGS),
        *("r_align", "r_ft", "kept", "reference_r_align", "reference_r_ft", "reference_kept", *values),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for one in found.findings:
        spectrum, bulk = one.spectrum, one.bulk
        gaps = spectrum.gaps if spectrum else ()
        measured: list[Any] = [
            *(one.name, one.module, one.layer, one.m, one.n, one.dtype, one.delta_norm, one.weight_norm, one.relative),
            *(spectrum and spectrum.energy(k), gaps[k - 1] if len(gaps) >= k else None),
            *(spectrum and spectrum.stable_rank, *(one.entropy_rank if spectrum else (None, None))),
            *(bulk and bulk.outliers, bulk and bulk.edge),
            *(one.retention(k, alpha, rounding) for rounding in ROUNDINGS),
            *(
                part
                for of in (one.ours, one.reference)
                for part in ((of.align, of.finetuned, of.kept) if of else (None,) * 3)
            ),
        ]
        own = list(spectrum.values) if spectrum else []
        writer.writerow([*measured, *own, *[None] * (len(values) - len(own))])
    return text.getvalue()
