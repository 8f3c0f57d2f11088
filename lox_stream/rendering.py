"""Tables for people: plans, summaries, checkpoints, comparisons. Nothing in here computes.

Every cell is a rich Text made of printable characters, so that a name from a stranger's file is neither markup nor
an order to the terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lox_stream.checkpoint import whence
from lox_stream.costs import PINNED_BYTES
from lox_stream.matching import output_bytes
from lox_stream.names import address_of, counted, listing, pattern_of, place_name, printable
from lox_stream.options import Options, gpu_count, is_gpu, options_for
from lox_stream.planning import Plan, Step, card_memory_needed, memory_needed
from lox_stream.predicting import Prediction
from lox_stream.sharing import FOLDER
from lox_stream.showing import budget_text, size_text, time_text

if TYPE_CHECKING:
    from lox_stream.api import Summary
    from lox_stream.carrying import LeftOut
    from lox_stream.comparing import Measured
    from lox_stream.inspecting import Inspection
    from lox_stream.recomputing import Comparison

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank may be
PIPE_WIDTH = 140  # of a table that goes to a file or a pipe


def console_of(*, stderr: bool = False) -> Console:
    """A console without markup or highlighting; colours as NO_COLOR and the terminal want them."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(PIPE_WIDTH, console.width)
    return console


def cell(value: object, style: str = "") -> Text:
    return Text(printable(str(value)), style=style, overflow="fold")


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> Group:
    """A table; the columns whose numbers are in `right` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numeric = set(right)
    for number, column in enumerate(columns):
        table.add_column(
            cell(column), justify="right" if number in numeric else "left", no_wrap=number in numeric, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(cell, row))
    return Group(cell(title, "bold"), table)


def pairs_table(title: str, rows: Iterable[tuple[str, object]]) -> Group:
    """Names and values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(cell(name, "dim"), cell(value))
    return Group(cell(title, "bold"), table)


def percent(share: float | None, digits: int = 1) -> str:
    """`84.2 %`; what no tensor has is a dash. A share next to 1 is not rounded up to it."""
    if share is None:
        return "-"
    while digits < 5 and 0 < 1 - share < 0.5 * 10 ** -(digits + 2):
        digits += 1
    return f"{100 * share:.{digits}f} %"


def shape_text(shapes: Iterable[tuple[int, ...]], most: int = 2) -> str:
    """`576 x 1536`, several of them with commas, and the rest counted."""
    texts = [" x ".join(map(str, shape)) or "scalar" for shape in dict.fromkeys(shapes)]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def plan_tables(plan: Plan) -> list[Group]:
    """A plan: tensors that differ only in numbers (layers, experts) share a row."""
    groups: dict[tuple[str, ...], list[Step]] = {}
    for step in plan.steps:
        why = _why(step, plan.options)
        dtype = " to ".join(filter(None, [step.aligned.dtype, step.dtype]))
        groups.setdefault((pattern_of(step.name), step.action, why, dtype), []).append(step)
    rows = [
        (
            pattern if len(steps) > 1 else steps[0].name,
            len(steps),
            shape_text(step.aligned.shape for step in steps),
            dtype,
            action,
            why,
            _size(steps),
        )
        for (pattern, action, why, dtype), steps in groups.items()
    ]
    columns = ("tensors", "count", "shape", "dtype", "action", "why", "size")
    return [table_of("Plan", columns, rows, right=(1, 6)), pairs_table("Totals", _plan_totals(plan))]


def _why(step: Step, options: Options) -> str:
    """The reason; with the parts of a fused one, and what a recipe says of the tensor."""
    own = options_for(step.seed_name or step.name, options)
    reason = ": ".join(filter(None, [step.reason, ", ".join(part.label for part in step.parts)]))
    if step.action == "copy" or own == options:
        return reason
    said = [f"rank {own.rank}"] * (own.rank != options.rank) + [f"alpha {own.alpha:g}"] * (own.alpha != options.alpha)
    return ", ".join([reason, *said, *[own.rounding] * (own.rounding != options.rounding)])


def _plan_totals(plan: Plan) -> list[tuple[str, object]]:
    changed, copied, rescaled, merged = (
        [step for step in plan.steps if step.action == action] for action in ("extrapolate", "copy", "rescale", "merge")
    )
    rank = f"rank {plan.options.rank}" if plan.options.rank else "full rank"
    rules = f", but for {counted(len(plan.options.recipe), 'rule')}" if plan.options.recipe else ""
    rows: list[tuple[str, object]] = [
        ("base", whence(plan.base)),
        ("aligned", whence(plan.aligned)),
        *([("adapter", _adapter_text(plan.steps))] if plan.aligned.overlay else []),
        ("out", place_name(plan.out or "none")),
        *([("merge", f"{counted(len(merged), 'tensor')}, {_size(merged)}")] if merged else []),
    ]
    if changed or not merged:
        text = f"{counted(len(changed), 'tensor')}, {_size(changed)}, {rank}, alpha {plan.options.alpha:g}{rules}"
        rows.append(("extrapolate", text))
    if plan.options.form != "weights":
        return [*rows, *_adapter_rows(plan)]
    rows += [
        (
            "copy",
            f"{counted(len(copied), 'tensor')}, {_size(copied)}, {counted(len(plan.aligned.companions), 'other file')}",
        ),
        *([("rescale", f"{counted(len(rescaled), 'tensor')}, {_size(rescaled)}, scales of FP8")] if rescaled else []),
    ]
    if changed:
        rows.append(("memory", f"{_memory(plan, changed)}, of a budget of {budget_text(plan.options.memory_bytes)}"))
    return rows


def _memory(plan: Plan, changed: Sequence[Step]) -> str:
    """What of the host's memory the largest step takes, and copies over a GPU; a GPU's own is not in it."""
    most = max(changed, key=lambda step: memory_needed(step, plan.options))
    needed = memory_needed(most, plan.options)
    words = [f"{budget_text(needed)} for {most.name}"] if needed else []
    if is_gpu(plan.options.device) and any(card_memory_needed(step, plan.options.svd) for step in changed):
        words.append(f"{budget_text(gpu_count(plan.options.device) * PINNED_BYTES)} for copies over the GPU")
    return " and ".join(words) or "tiles alone"


def _adapter_rows(plan: Plan) -> list[tuple[str, object]]:
    """What an adapter holds, and what it cannot."""
    pairs = [pair for step in plan.steps for pair in step.pairs]
    factors = f"{counted(len(pairs), 'module')}, rank {pairs[0].rank}, {pairs[0].b.dtype}, {_size(plan.steps)}"
    return [("factors", factors), *[("left out", line) for line in _left_out(plan.left_out)]]


def _left_out(left: Sequence[LeftOut]) -> list[str]:
    """A line for each reason, with the names that it is for."""
    reasons = dict.fromkeys(one.reason for one in left)
    return [
        f"{listing(dict.fromkeys(pattern_of(one.name) for one in left if one.reason == reason))}: {reason}"
        for reason in reasons
    ]


def _adapter_text(steps: Sequence[Step]) -> str:
    """How much of the model an adapter changes."""
    ranks = [step.factors.rank for step in steps if step.factors is not None]
    ends = sorted({min(ranks, default=0), max(ranks, default=0)})
    return f"LoRA of rank {' to '.join(map(str, ends))} on {counted(len(ranks), 'tensor')}"


def prediction_table(prediction: Prediction) -> Group:
    """What a plan will move and hold; with a machine's rates, how long each part is busy."""
    rows: list[tuple[str, object]] = [
        ("disk", f"reads {size_text(prediction.read_bytes)}, writes {size_text(prediction.written_bytes)}"),
        ("memory", f"{budget_text(prediction.host_bytes)} at most on the host"),
    ]
    if prediction.gpu_bytes:
        blocks = f"; {counted(prediction.in_blocks, 'tensor')} in blocks, in each pass" if prediction.in_blocks else ""
        rows.append(("GPU memory", f"{size_text(prediction.gpu_bytes)} at most, for the largest matrix{blocks}"))
    if prediction.passes:
        rows.append(
            ("passes", f"{prediction.passes:g}, each with both products; hard spectra take three times as many")
        )
    rows += [(f"{part} busy", time_text(seconds)) for part, seconds in prediction.busy_s.items()]
    if prediction.elapsed_s is not None:
        rows.append(("time", f"{time_text(prediction.elapsed_s)} at least, for the parts overlap"))
    return pairs_table("Predicted", rows)


def _size(steps: Sequence[Step]) -> str:
    return size_text(sum(map(output_bytes, steps)))


def outputs_table(plans: Sequence[Plan], summaries: Sequence[Summary]) -> Group:
    """What a run of several outputs did, one a line."""
    rows = [
        (
            place_name(summary.out),
            "weights" if plan.options.form == "weights" else "adapter",
            f"{plan.options.alpha:g}",
            summary.totals.extrapolated,
            percent(summary.totals.retention),
            percent(summary.totals.predicted_share, 4),
            size_text(summary.written_bytes),
        )
        for plan, summary in zip(plans, summaries, strict=True)
    ]
    columns = ("output", "of", "alpha", "extrapolated", "retention", "worst predicted", "written")
    elapsed_s = max(summary.elapsed_s for summary in summaries)
    return table_of(f"Done in {time_text(elapsed_s)}", columns, rows, right=range(2, 7))


def adapter_summary(plan: Plan, summary: Summary) -> Group:
    """What was written as an adapter, what was not, and the next command to type."""
    total = summary.totals
    rows: list[tuple[str, object]] = [
        ("adapter", place_name(summary.out)),
        ("time", time_text(summary.elapsed_s)),
        *_adapter_rows(plan),
        ("energy captured", f"{percent(total.energy)} of |delta|^2 of these lies in the leading singular triplets"),
        ("load", _loading(plan, summary)),
        (
            "merge",
            _command("lox-stream apply --adapter", summary.out, "--aligned", Path(whence(plan.aligned)), "--out DIR"),
        ),
    ]
    return pairs_table("Done", [row for row in rows if row[0] != "energy captured" or total.energy is not None])


def _loading(plan: Plan, summary: Summary) -> str:
    """How the program that it is for takes it."""
    if address_of(summary.out):
        return "copy it into a folder first: neither PEFT nor vLLM reads a bucket"
    if plan.options.form == "peft":
        return f"PeftModel.from_pretrained(model, {place_name(summary.out)!r})"
    rank = next(one for one in VLLM_RANKS if one >= min(plan.steps[0].pairs[0].rank, VLLM_RANKS[-1]))
    named = f"lox={place_name(summary.out)}"
    return _command(
        "vllm serve", Path(whence(plan.aligned)), "--enable-lora --lora-modules", named, "--max-lora-rank", rank
    )


def _command(*words: object) -> str:
    return " ".join(shlex.quote(place_name(word)) if isinstance(word, Path) else str(word) for word in words)


def summary_table(summary: Summary, *, kept: bool = True) -> Group:
    """What a run did; where the output is `kept` also where, and the next command to type."""
    total = summary.totals
    moved = summary.read_bytes + summary.written_bytes
    rows: list[tuple[str, object]] = [
        ("output", place_name(summary.out)),
        ("time", time_text(summary.elapsed_s)),
        (
            "rate",
            f"{size_text(moved / max(summary.elapsed_s, 1e-9))}/s, {size_text(summary.read_bytes)} read and "
            f"{size_text(summary.written_bytes)} written",
        ),
        *([("merged", f"{total.merged} of {total.tensors} tensors, by an adapter")] if total.merged else []),
        ("extrapolated", f"{total.extrapolated} of {total.tensors} tensors, {size_text(total.n_bytes)} in all"),
        (
            "copied",
            f"{counted(total.copied, 'tensor')}, {total.identical} of them because base and aligned are the same",
        ),
        *([("rescaled", f"{counted(total.rescaled, 'tensor')} of scales of FP8, made anew")] if total.rescaled else []),
        ("energy captured", f"{percent(total.energy)} of |delta|^2 lies in the leading singular triplets"),
        ("retention", f"{percent(total.retention)} of the update survives the rounding to the output's dtype"),
        (
            "worst predicted",
            f"{percent(total.predicted_share, 4)} of a tensor's elements may differ from the exact result",
        ),
        ("next", verify_command(summary)),
    ]
    if (part := FOLDER.fullmatch(summary.out.name)) is not None:
        command = _command("lox-stream finish", summary.out.parent)
        rows[-1] = ("next", f"{command}, once all {part[2]} parts are finished")
    shown = {"energy captured": total.energy, "retention": total.retention, "worst predicted": total.predicted_share}
    rows = [row for row in rows if shown.get(row[0], 0) is not None and (kept or row[0] not in ("output", "next"))]
    if total.merged and not total.extrapolated:
        rows = [row for row in rows if row[0] != "extrapolated"]
    return pairs_table("Done", rows)


def verify_command(summary: Summary) -> str:
    if address := address_of(summary.out):
        return f"aws s3 sync {shlex.quote(address)} DIR, and lox-stream verify DIR"
    return f"lox-stream verify {shlex.quote(str(summary.out))}"


def inspection_tables(seen: Inspection) -> list[Group]:
    """A checkpoint: its groups of tensors, and the whole in numbers."""
    rows = [
        (
            group.pattern if group.count > 1 else name,
            group.count,
            shape_text(group.shapes),
            ", ".join(group.dtypes),
            size_text(group.n_bytes),
            ", ".join(group.actions),
            ": ".join(filter(None, [", ".join(group.reasons), ", ".join(group.parts)])),
        )
        for group, name in zip(seen.groups, _first_names(seen), strict=True)
    ]
    columns = ("tensors", "count", "shape", "dtype", "size", "run would", "why")
    tables = [table_of("Tensors", columns, rows, right=(1, 4)), pairs_table("Checkpoint", _inspection_totals(seen))]
    if seen.rules:
        hits = [(hit.match, hit.says, hit.tensors, hit.matrices, size_text(hit.n_bytes)) for hit in seen.rules]
        tables.append(table_of("Rules", ("match", "says", "tensors", "matrices", "size"), hits, right=(2, 3, 4)))
    return tables


def _first_names(seen: Inspection) -> list[str]:
    first: dict[str, str] = {}
    for row in seen.rows:
        first.setdefault(row.group, row.name)
    return [first[group.pattern] for group in seen.groups]


def _inspection_totals(seen: Inspection) -> list[tuple[str, object]]:
    tied = ", ".join(f"{name} -> {holder}" for name, holder in seen.tied.items())
    schemes = ", ".join(f"{scheme} ({counted(count, 'tensor')})" for scheme, count in seen.quantisation.items())
    said = {None: "config.json does not say", True: "config.json says tied", False: "config.json says not tied"}
    return [
        ("path", place_name(seen.path)),
        ("architecture", seen.architecture or "unknown"),
        ("shards", seen.n_shards),
        ("tensors", f"{len(seen.rows)}, {seen.n_elements:,} elements, {size_text(seen.n_bytes)}"),
        ("by dtype", _sizes(seen.bytes_by_dtype)),
        ("by action", _sizes(seen.bytes_by_action)),
        ("tied", f"{tied or 'none'} ({said[seen.says_tied]})"),
        ("quantisation", ", ".join(filter(None, [seen.quantisation_method or "", schemes])) or "none"),
        ("other files", ", ".join(path.as_posix() for path in seen.companions) or "none"),
    ]


def _sizes(sums: dict[str, int]) -> str:
    return ", ".join(f"{key} {size_text(n_bytes)}" for key, n_bytes in sums.items()) or "none"


def comparison_table(compared: Sequence[Comparison]) -> Group:
    """Recomputed matrices: the share of elements that agree bit by bit, measured and predicted."""
    rows = [
        (
            seen.name,
            shape_text([seen.shape]),
            seen.kind,
            percent(seen.share, 2),
            "-" if seen.predicted_share is None else percent(1 - seen.predicted_share, 2),
            "-" if seen.update_error is None or seen.predicted_share is not None else f"{seen.update_error:.1e}",
            time_text(seen.elapsed_s),
            ("ok" if seen.ok else "FAILED") + ("" if seen.unique else " (not unique)"),
        )
        for seen in compared
    ]
    columns = ("matrix", "shape", "part", "bits agree", "predicted", "|error| / |update|", "time", "")
    return table_of("Against a full SVD in float64", columns, rows, right=(3, 4, 5, 6))


def solver_table(rows: Sequence[Measured], reached: Mapping[str, Measured], share: float) -> Group:
    """Solvers on one matrix; `reached` has the fastest result of each that has `share` right, a miss has no time."""
    best = {row.solver: row for row in sorted(rows, key=lambda row: -row.differing)}  # the least that differs
    shown = sorted(reached.values(), key=lambda row: row.elapsed_s)
    shown += [row for solver, row in best.items() if solver not in reached]
    first = rows[0]
    title = (
        f"{first.case}, {first.m} x {first.n} {first.dtype}, rank {first.rank}, s_{first.rank + 1}/s_{first.rank} = "
        f"{1 - first.gap:.4f}: {100 * share:g} % of the elements bit-identical"
    )
    columns = ("solver", "setting", "time", "passes", "memory", "error", "angle", "energy lost", "differ", "predicted")
    return table_of(title, columns, (_solver_row(row, row.solver in reached) for row in shown), right=range(2, 10))


def _solver_row(row: Measured, reached: bool) -> tuple[object, ...]:
    return (
        row.solver + (f" ({row.method})" if row.method else ""),
        f"{row.knob} {row.value:g}",
        f"{row.elapsed_s * 1e3:.3g} ms" if reached else "misses",
        "-" if row.passes is None else row.passes,
        "-" if row.peak_bytes is None else size_text(row.peak_bytes),
        f"{row.error:.1e}",
        f"{row.angle:.1e}",
        f"{row.energy_lost:.1e}",
        f"{row.differing:.1e}",
        "-" if row.predicted is None else f"{row.predicted:.1e}",
    )
