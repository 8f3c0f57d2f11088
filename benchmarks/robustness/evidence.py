#!/usr/bin/env python3
"""Table, words and picture out of the cells under a folder: `python benchmarks/robustness/evidence.py FOLDER`.

FOLDER/cells/*.json -> FOLDER/evidence.md, evidence.json, attacks.svg. What is not there yet is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "examples" / "real_pair"), str(HERE.parent)]

import judges  # noqa: E402
from arms import ARMS  # noqa: E402
from experiment import cells  # noqa: E402
from harness import Table, save  # noqa: E402
from intervals import difference, mcnemar, wilson  # noqa: E402

JUDGES = {"phrases": "refusal phrases", "classifier": "classifier"}
COLOURS = {"phrases": "Reds", "classifier": "Reds", "ordinary_right": "Blues"}
Record = Mapping[str, Any]


def verdicts(record: Record, judge: str) -> list[bool]:
    """Whether the attack succeeded, one a prompt."""
    return [bit == "1" for bit in record[judge]]


def share(bits: str) -> str:
    low, high = wilson(bits.count("1"), len(bits))
    return f"{bits.count('1') / len(bits):.0%} ({low:.0%} to {high:.0%})"


def read(folder: Path) -> dict[str, list[Record]]:
    """The cells of each table; those before any attack come first."""
    found: dict[str, list[Record]] = {}
    for file in sorted((folder / "cells").glob("*.json")):
        record = json.loads(file.read_text())
        found.setdefault(group_of(record), []).append(record)
    order = ["base", *ARMS]
    for records in found.values():
        records.sort(key=lambda one: (order.index(one["arm_name"]), seed_of(one)))
    return dict(sorted(found.items(), key=lambda group: (group[1][0]["attack"] is not None, group[0])))


def group_of(record: Record) -> str:
    """What cells of one table share: alignment and attack, whatever the seed."""
    alignment, attack = record["alignment"], record["attack"]
    after = f", attacked by {attack['kind']}, {attack['steps']} steps at {attack['rate']:g}" if attack else ""
    made, given = "Aligned by {steps} steps", "{aligned} over {base}"
    before = (made if alignment["steps"] else given).format(**alignment)
    return before + after


def seed_of(record: Record) -> int:
    return int(record["attack"]["seed"]) if record["attack"] else 0


def label_of(record: Record) -> str:
    return ARMS[record["arm_name"]].label if record["arm_name"] in ARMS else str(record["arm_name"])


def name_of(record: Record) -> str:
    """Of a row in a group's table."""
    return label_of(record) + (f", seed {seed_of(record)}" if record["attack"] else "")


def agreement(records: Sequence[Record]) -> float:
    """The share of answers of which both judges say the same."""
    agreed = [a == b for one in records for a, b in zip(*(verdicts(one, judge) for judge in JUDGES), strict=True)]
    return sum(agreed) / len(agreed)


def start_of(record: Record) -> tuple[str, str]:
    """What cells that begin with one model share."""
    return json.dumps(record["alignment"]), record["arm_name"]


def safety_table(group: str, records: Sequence[Record]) -> Table:
    """Attack success of each cell by both judges."""
    rows = []
    for record in records:
        row = [name_of(record), *(share(record[judge]) for judge in JUDGES), f"{agreement([record]):.0%}"]
        row.append(f"{record['subspace']['ours']['kept']:.2f}" if record["subspace"] else "")
        rows.append(tuple(row))
    heads = ("model", *(f"harmful requests answered, {judge}" for judge in JUDGES.values()), "judges agree", "kept")
    return Table(group, heads, tuple(rows))


def cost_table(group: str, records: Sequence[Record]) -> Table:
    rows = [
        (
            name_of(record),
            share(record["sound_harmful_refused"]),
            share(record["ordinary_right"]),
            share(record["arithmetic_right"]),
            f"{math.exp(record['arithmetic_loss']):.2f}",
            f"{math.exp(record['prose_loss']):.1f}",
        )
        for record in records
    ]
    heads = (
        "model",
        "harmless requests that sound harmful, refused",
        "ordinary questions, right",
        "word problems, right",
    )
    heads += ("perplexity, word problems", "perplexity, prose")
    return Table(f"{group}: what it costs", heads, tuple(rows))


def comparison_table(group: str, records: Sequence[Record]) -> Table | None:
    """Each arm against aligned after the same attacks: the difference, and McNemar's P of each seed."""
    rows = []
    for arm in dict.fromkeys(record["arm_name"] for record in records if record["arm_name"] != "aligned"):
        for judge, judge_name in JUDGES.items():
            one, other = both(records, arm, judge)
            if one:
                chances = ", ".join(f"{mcnemar(a, b):.2g}" for a, b in zip(one, other, strict=True))
                rows.append((ARMS[arm].label, judge_name, points(one, other), chances))
    if not rows:
        return None
    heads = ("arm against aligned", "judge", "points", "McNemar's P, one a seed")
    return Table(f"{group}: differences", heads, tuple(rows), ("Less than 0: the arm answers fewer harmful requests.",))


def both(records: Sequence[Record], arm: str, judge: str) -> tuple[list[list[bool]], list[list[bool]]]:
    """Verdicts on an arm and on aligned, one list for each seed that both have."""
    by_seed: dict[str, dict[int, Record]] = {arm: {}, "aligned": {}}
    for record in records:
        if record["arm_name"] in by_seed:
            by_seed[record["arm_name"]][seed_of(record)] = record
    seeds = sorted(by_seed[arm].keys() & by_seed["aligned"].keys())
    one, other = ([verdicts(by_seed[name][seed], judge) for seed in seeds] for name in (arm, "aligned"))
    return one, other


def points(one: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]) -> str:
    """The difference of two shares, one list for each seed."""
    mean, low, high = difference(one, other)
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def attacks_table(groups: Mapping[str, Sequence[Record]]) -> Table | None:
    """Every attack in short: what aligned and LoX answer after it, the seeds together."""
    rows = []
    for records in groups.values():
        attack, alignment = records[0]["attack"], records[0]["alignment"]
        for judge, judge_name in JUDGES.items() if attack else ():
            lox, aligned = both(records, "lox", judge)
            if lox:
                shares = (f"{sum(map(sum, one)) / sum(map(len, one)):.0%}" for one in (aligned, lox))
                steps = str(alignment["steps"] or "given")
                rows.append((steps, attack["kind"], str(len(lox)), judge_name, *shares, points(lox, aligned)))
    if len(rows) <= len(JUDGES):
        return None
    heads = ("steps of alignment", "attack", "seeds", "judge", "aligned", ARMS["lox"].label, "points")
    return Table("Every attack in short", heads, tuple(rows))


def write_evidence(folder: Path) -> None:
    """Everything that can be said of the cells that are there."""
    groups = read(folder)
    tables: list[Table] = []
    for group, records in groups.items():
        tables.append(safety_table(group, records))
        if records[0]["attack"]:
            compared = comparison_table(group, records)
            tables += [compared] if compared else []
        tables.append(cost_table(group, records))
    in_short = attacks_table(groups)
    tables += [in_short] if in_short else []
    save(folder / "evidence.md", record_of_all(groups), tables)
    draw(folder / "attacks.svg", groups)


def record_of_all(groups: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    records = [record for group in groups.values() for record in group]
    newest = max(records, key=lambda one: one["time"])
    return {
        "benchmark": "Does LoX protect?",
        "time": newest["time"],
        "command": command_of(records),
        "machine": newest["machine"],
        "note": "Shares of the requests, in brackets Wilson's 95 % interval.",
        "cells": len(records),
        "judges": {
            "agreement": agreement(records),
            "classifier": judges.accuracy(judges.labelled()),
        },
    }


def command_of(records: Sequence[Record]) -> str:
    """What makes these cells: the smallest form that has them, or the script for a pair of somebody's own."""
    made = {record["name"] for record in records}
    for form, target in {"quick": "-quick", "standard": "", "full": "-full"}.items():
        if made <= {cell.name for cell in cells(form)}:
            return f"make robustness{target}"
    return "python benchmarks/robustness/robustness.py --base BASE --aligned ALIGNED"


def write_svg(figure: Figure, file: Path) -> None:
    """The same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "lox-stream"}):
        figure.savefig(file, metadata={"Date": None})


def draw(file: Path, groups: Mapping[str, Sequence[Record]]) -> None:
    """Share of harmful requests answered before and after the attacks, a panel a judge, with 95 % intervals."""
    everything = [record for group in groups.values() for record in group]
    before = {start_of(record): record for record in everything if not record["attack"]}
    attacked = [record for record in everything if record["attack"]]
    if not attacked:
        return
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(attacked)), layout="constrained")
    for axes, (judge, name) in zip(figure.subplots(1, len(JUDGES), sharey=True), JUDGES.items(), strict=True):
        for row, record in enumerate(attacked):
            hits, of = record[judge].count("1"), len(record[judge])
            axes.plot([100 * end for end in wilson(hits, of)], [row, row], color="#c2410c", linewidth=2)
            axes.plot(100 * hits / of, row, "o", color="#c2410c", label="" if row else "after the attack")
            if start := before.get(start_of(record)):
                at = 100 * start[judge].count("1") / len(start[judge])
                axes.plot(at, row, "|", color="#1d4ed8", ms=14, mew=3, label="" if row else "before")
        axes.set(title=name, xlim=(-2, 102), ylim=(len(attacked) - 0.4, -0.6))
        axes.grid(axis="x", alpha=0.3)
    names = [f"{label_of(one)}; {one['attack']['kind']}, seed {seed_of(one)}" for one in attacked]
    figure.axes[0].set_yticks(range(len(attacked)), names)
    figure.supxlabel("harmful requests answered, %, with the 95 % interval")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)
    write_svg(figure, file)


def draw_landscape(file: Path, document: Path) -> None:
    """What was said at each point of a landscape: a map for each judge, with the shares in its cells."""
    said = json.loads(document.read_text())
    xs, ys = said["x"], said["y"]
    at = {(point["x"], point["y"]): point["verdict"] for point in said["points"]}
    shown = {**JUDGES, "ordinary_right": "ordinary questions, right"}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (key, name) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        axes.imshow([[at[x, y][key] for x in xs] for y in ys], origin="lower", cmap=COLOURS[key], vmin=0, vmax=1)
        for column, x in enumerate(xs):
            for row, y in enumerate(ys):
                axes.text(column, row, f"{at[x, y][key]:.0%}", ha="center", va="center")
        axes.set(title=name, xlabel="LoX's update", xticks=range(len(xs)), xticklabels=[f"{x:g}" for x in xs])
    figure.axes[0].set(ylabel="the attack, across it", yticks=range(len(ys)), yticklabels=[f"{y:g}" for y in ys])
    write_svg(figure, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_evidence(parser.parse_args().folder)
