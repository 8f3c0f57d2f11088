"""Reports out of what is on the disk: of an analysis, and of the manifest of a finished run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from lox_stream.analysed import layer_of
from lox_stream.names import pattern_of
from lox_stream.options import Options
from lox_stream.reporting import Metric, Page, Row

TYPED = ("rank", "alpha", "skip", "only", "seed", "on_nonfinite", "rename", "on_missing", "on_shape_mismatch")
TYPED_OF = {  # options that are typed as the command has them
    "analyze": (*TYPED, "split_fused", "dtype"),
    "run": (*TYPED, "svd", "tolerance", "rounding", "split_fused", "dtype", "max_shard_size"),
    "adapter": (*TYPED, "svd", "tolerance"),
    "apply": ("rounding", "seed", "dtype", "max_shard_size"),
}


def page_of_analysis(document: Mapping[str, Any]) -> Page:
    """Of `analysis.json`."""
    k, alpha, totals = document["options"]["rank"], document["options"]["alpha"], document["totals"]
    tuned, reference = document["finetuned"] is not None, totals["robustness"]["reference"] is not None
    metrics = [
        Metric(f"energy in {k}", "percent"),
        Metric("retention, nearest", "percent"),
        Metric("|update| / |W|", "percent"),
        Metric("|delta| / |W|", "percent"),
        Metric("retention, stochastic", "percent"),
        Metric(f"s{k + 1} / s{k}", "number"),
        Metric("stand out of noise", "count"),
        Metric("stable rank", "number"),
        Metric("R_align", "number"),
        *[Metric("R_ft", "number"), Metric("leading part kept", "percent")] * tuned,
        *[Metric("R_align, paper's code", "number")] * reference,
        *[Metric("R_ft, paper's code", "number")] * tuned,
    ]
    sides = [(side, document[side]) for side in ("base", "aligned", "finetuned") if document[side] is not None]
    return Page(
        title=f"The difference of two models: {_last(document['aligned'])}",
        facts=(*sides, ("rank, alpha", f"{k}, {alpha:g}"), ("matrices", str(totals["matrices"]))),
        sentences=tuple(document["advice"]),
        warnings=tuple(document["warnings"]),
        command=_command("analyze", sides, document["options"], _measured(document)),
        options=document["options"],
        metrics=tuple(metrics),
        rows=[_analysed(one, k, alpha, tuned=tuned, reference=reference) for one in document["matrices"]],
        grid=_cells(totals["retention"]),
    )


def _analysed(one: Mapping[str, Any], k: int, alpha: float, *, tuned: bool, reference: bool) -> Row:
    energy = one["energy"][min(k, len(one["energy"])) - 1] if one["energy"] else None
    cells = _cells(one["retention"])
    left = {rounding: left for rank, factor, rounding, left in cells if (rank, factor) == (k, alpha)}
    ours, theirs = one["ours"] or {}, one["reference"] or {}
    figures = [
        energy,
        left.get("nearest"),
        None if energy is None else abs(alpha) * energy**0.5 * one["relative"],
        one["relative"],
        left.get("stochastic"),
        one["gaps"][k - 1] if len(one["gaps"]) >= k else None,
        one["noise"] and one["noise"]["outliers"],
        one["stable_rank"],
        ours.get("r_align"),
        *[ours.get("r_ft"), ours.get("kept")] * tuned,
        *[theirs.get("r_align")] * reference,
        *[theirs.get("r_ft")] * tuned,
    ]
    return Row(
        name=one["name"],
        module=one["module"],
        layer=one["layer"],
        shape=" x ".join(map(str, one["shape"])),
        dtype=one["dtype"],
        figures=tuple(figures),
        values=tuple(one["singular_values"]),
        curve=tuple(one["energy"]),
        edge=one["noise"] and one["noise"]["edge"],
        cells=cells,
        notices=tuple(one["notices"]),
    )


def _cells(rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[int, float, str, float | None], ...]:
    return tuple((row["rank"], row["alpha"], row["rounding"], row["retention"]) for row in rows)


def page_of_run(manifest: Mapping[str, Any]) -> Page:
    """Of `lox_stream.json`."""
    options, totals = manifest["options"], manifest["totals"]
    metrics = (
        Metric("energy", "percent"),
        Metric("retention", "percent"),
        Metric("|update| / |W|", "percent"),
        Metric("|delta| / |W|", "percent"),
        Metric("residual", "number"),
        Metric("predicted share of differing elements", "percent"),
        Metric("gap after the rank", "number"),
        Metric("passes", "count"),
    )
    sides = [(side, manifest["inputs"][side]["path"]) for side in manifest["inputs"]]
    return Page(
        title=f"What a run of LoX did: {_last(sides[-1][1])}",
        facts=(
            *sides,
            ("rank, alpha", f"{options['rank']}, {options['alpha']:g}"),
            ("tensors", f"{totals['extrapolated']} of {totals['tensors']} extrapolated"),
            ("finished", manifest["times"]["finished"]),
            ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
        ),
        sentences=tuple(_sentences(totals, options)),
        warnings=tuple(manifest["warnings"]),
        command=_command(_written_by(options), sides, options),
        options=options,
        metrics=metrics,
        rows=[row for name, one in manifest["tensors"].items() for row in _written(name, one)],
    )


def _written(name: str, one: Mapping[str, Any]) -> Iterator[Row]:
    """The matrices of a tensor."""
    several = len(one["matrices"]) > 1
    labels = one.get("parts") or [str(i) for i in range(len(one["matrices"]))]
    for i, matrix in enumerate(one["matrices"]):
        size = matrix["weight_norm"]
        figures = [
            matrix["energy"],
            matrix["retention"],
            matrix["update_norm"] / size if size else None,
            matrix["delta_norm"] / size if size else None,
            *(matrix[key] for key in ("residual", "predicted_share", "gap", "passes")),
        ]
        yield Row(
            name=f"{name}[{labels[i % len(labels)]}]" if several else name,
            module=pattern_of(name),
            layer=layer_of(name),
            shape=" x ".join(map(str, one["shape"])),
            dtype=one["dtype"],
            figures=tuple(figures),
            values=tuple(matrix["singular_values"]),
            notices=tuple(one["notices"]),
        )


def _sentences(totals: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{totals['extrapolated']} of {totals['tensors']} tensors were extrapolated, {totals['copied']} copied as they "
        f"are; alpha {options['alpha']:g}, rank {options['rank'] or 'full'}."
    )
    if totals["energy"] is not None:
        yield f"The updates follow {100 * totals['energy']:.3g} % of the energy of all differences."
    if totals["retention"] is not None:
        yield f"Rounding ({options['rounding']}) left {100 * totals['retention']:.3g} % of them."
    if totals["predicted_share"] is not None:
        yield (
            "Of no matrix more elements differ from the exact result than an estimated "
            f"{100 * totals['predicted_share']:.2g} %."
        )
    for key, what in (
        ("not_converged", "did not reach the tolerance"),
        ("not_unique", "have no gap after the rank, so that the leading part is one of many"),
    ):
        if totals[key]:
            yield f"{len(totals[key])} tensors {what}."


def _last(path: str) -> str:
    return PurePath(path).name or path


def _written_by(options: Mapping[str, Any]) -> str:
    """The command that writes such an output."""
    if options["form"] != "weights":
        return "adapter"
    return "apply" if options["scaling"] is not None else "run"


def _measured(document: Mapping[str, Any]) -> list[str]:
    """What was measured, as it is typed."""
    words = ["--values", str(document["values"])]
    for option in ("ranks", "alphas"):
        words += [f"--{option}", ",".join(f"{one:g}" for one in document[option])]
    return [*words, *["--reference"] * bool(document["reference"])]


def _command(
    command: str, paths: Iterable[tuple[str, str]], options: Mapping[str, Any], more: Iterable[str] = ()
) -> str:
    """What to type; options as they are by default are left out."""
    words = ["lox-stream", command]
    for side, path in paths:
        words += [f"--{side}", path]
    if command != "analyze":
        words += ["--out", "OUT"]
    if command == "adapter":
        words += ["--target", options["form"], "--dtype", options["factor_dtype"]]
    for field in fields(Options):
        value = options.get(field.name, field.default)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if field.name not in TYPED_OF[command] or value == default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, f"{one}"]
    recipe = "   # and with the recipe that is among the options" if options["recipe"] else ""
    return shlex.join([*words, *more]) + recipe
