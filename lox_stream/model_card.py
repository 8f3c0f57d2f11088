"""The model card of the output: aligned's own README.md with its front matter completed and one section more.

The front matter is edited as text: what is there stays as it is spelled, comments and all, since a round trip
through YAML 1.1 would make `language: no` false and `version: 1.10` 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from lox_stream.checkpoint import Checkpoint
from lox_stream.journal import version
from lox_stream.manifest import Totals
from lox_stream.names import address_of, counted, hub_name, printable
from lox_stream.output_rules import MODEL_CARD
from lox_stream.planning import Plan, Point

TAGS = ("lox", "safety")
LOW_RETENTION = 0.6
MAX_FRONT_MATTER = 1 << 16  # characters
MAX_BRACKETS = 1 << 9  # two thousand, one inside the other, take yaml a second
FRONT_MATTER = re.compile(r"\A(\ufeff?---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
CITATION = """```bibtex
@inproceedings{perin2025lox,
  title     = {{LoX}: Low-Rank Extrapolation Robustifies {LLM} Safety Against Fine-tuning},
  author    = {Perin, Gabriel J. and Chen, Runjin and Chen, Xuxi and Hirata, Nina S. T. and
               Wang, Zhangyang and Hong, Junyuan},
  booktitle = {Conference on Language Modeling (COLM)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2506.15606}
}
```
"""


def card_for(plan: Plan, totals: Totals) -> bytes:
    """README.md for the output of `plan`: aligned's completed, or a new one where aligned has none."""
    path = plan.aligned.folder / MODEL_CARD
    third = () if plan.point is None else (plan.point.finetuned,)
    models = list(dict.fromkeys(map(model_name, (plan.aligned, plan.base, *third))))
    entries: dict[str, str | Sequence[str]] = {"base_model": models, "base_model_relation": "merge"}
    if plan.options.form != "weights":
        entries = {"base_model": models[:1], "base_model_relation": "adapter", "library_name": "peft"}
    elif "model_type" in plan.aligned.config or "architectures" in plan.aligned.config:
        entries["library_name"] = "transformers"
    elif plan.aligned.components:
        entries["library_name"] = "diffusers"
    entries["tags"] = TAGS
    if Path(MODEL_CARD) in plan.aligned.companions:
        card = path.read_bytes().decode("utf-8", "surrogateescape")
    else:
        name = plan.out.name if plan.out is not None else models[0]
        card = f"---\n---\n\n# {printable(name)}\n"
    ending = "" if card.endswith("\n") or not card else "\n"
    text = f"{completed(card, entries)}{ending}\n{section(plan, totals, models)}"
    return text.encode("utf-8", "surrogateescape")


def model_name(checkpoint: Checkpoint) -> str:
    """The name on the hub, also of a checkpoint in the hub's cache (`models--ORG--NAME/...`), else its folder's own."""
    if checkpoint.origin:
        name = checkpoint.origin.partition("@")[0]
        return name.rpartition("/")[2] if address_of(name) else name
    folder = checkpoint.folder if checkpoint.overlay is None else checkpoint.overlay.folder
    return hub_name(folder) or folder.resolve().name


def completed(card: str, entries: dict[str, str | Sequence[str]]) -> str:
    """The card with `entries` in its front matter: lists are added to, keys that have a value keep it.

    A card without front matter gets one; one whose front matter is no YAML mapping in block style, or of over
    64 KiB or 512 brackets, stays as it is.
    """
    found = FRONT_MATTER.match(card)
    if found is None:
        return f"---\n{_yaml(entries)}---\n\n{card}"
    opening, body, closing = found.groups()
    newline = "\r\n" if opening.endswith("\r\n") else "\n"
    if len(body) > MAX_FRONT_MATTER or body.count("[") + body.count("{") > MAX_BRACKETS:
        return card
    try:
        root = yaml.compose(body, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return card
    if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
        return card
    body = _merged(body, root.value if root is not None else [], entries).replace("\r\n", "\n").replace("\n", newline)
    return opening + body + closing + card[found.end() :]


def _merged(body: str, pairs: list[tuple[yaml.Node, yaml.Node]], entries: dict[str, str | Sequence[str]]) -> str:
    """The front matter's text with entries added; from the back, so that the marks of the nodes stay right."""
    lines = body.splitlines(keepends=True)
    there = {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}
    for key, node in reversed(pairs):
        wanted = entries.get(key.value) if isinstance(key, yaml.ScalarNode) else None
        old = _items(node)
        if wanted is None or isinstance(wanted, str) or old is None:
            continue
        if missing := [item for item in wanted if item not in old]:
            first, end = key.start_mark.line, max(_last_line(node), key.start_mark.line) + 1
            lines[first:end] = [_yaml({key.value: [*old, *missing]})]
    if lines and not lines[-1].endswith("\n"):
        lines.append("\n")
    return "".join(lines) + _yaml({key: value for key, value in entries.items() if key not in there})


def _items(node: yaml.Node) -> list[str] | None:
    """The strings of a list or of a lone scalar as they are spelled, None for anything else."""
    if isinstance(node, yaml.ScalarNode):
        return [] if node.tag == "tag:yaml.org,2002:null" else [node.value]
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    return None


def _last_line(node: yaml.Node) -> int:
    """The line that a list or scalar ends on; a block's own end mark is that of whatever comes next."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1])
    return node.end_mark.line if node.end_mark.column > 0 else node.end_mark.line - 1


def _yaml(entries: dict[str, str | Sequence[str]]) -> str:
    plain = {key: value if isinstance(value, str) else list(value) for key, value in entries.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1 << 16) if plain else ""


def section(plan: Plan, totals: Totals, models: Iterable[str]) -> str:
    """What is said of the extrapolation, in Markdown."""
    if plan.point is not None:
        return _point_section(plan, plan.point)
    options, (aligned, *rest) = plan.options, models
    base = rest[0] if rest else aligned
    rank = options.rank or "full"
    if totals.merged and not totals.extrapolated:
        return _merge_section(plan, totals, aligned, base)
    rows = [
        ("aligned", _code(aligned)),
        ("base", _code(base)),
        ("rank", f"{rank}"),
        ("alpha", f"{options.alpha:g}"),
        ("SVD", _svd(plan)),
        ("rounding", options.rounding + (f", seed {options.seed}" if options.rounding == "stochastic" else "")),
        *([("recipe", f"{counted(len(options.recipe), 'rule')}, in lox_stream.json")] if options.recipe else []),
        ("tensors", _tensors(plan, totals)),
        *_measured("energy of the difference in the update", totals.energy),
        *_measured("retention of the update after rounding", totals.retention),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    made = (
        f"These weights were made by lox-stream {version('lox-stream')}: to each weight matrix of the aligned model "
        "was added `alpha` times the rank-`k` part of its difference from the base model, "
    )
    if options.form != "weights":
        made = (
            f"This LoRA adapter was made by lox-stream {version('lox-stream')}: to each weight matrix of the aligned "
            "model that it names it adds `alpha` times the rank-`k` part of its difference from the base model, "
        )
    why = ", which makes the alignment harder to remove by later fine-tuning" if options.alpha > 0 else ""
    return (
        "## LoX: low-rank extrapolation\n\n"
        f"{made}"
        f"`W = W1 + alpha * (W1 - W0)_k`{why}.\n\n"
        f"| | |\n| --- | --- |\n{table}\n"
        f"{_retention_note(totals)}"
        "Checksums and the facts of each tensor are in `lox_stream.json`.\n\n"
        f"{CITATION}"
    )


def _merge_section(plan: Plan, totals: Totals, adapter: str, model: str) -> str:
    """Of an adapter that was merged and no more."""
    rows = [
        ("model", _code(model)),
        ("adapter", _code(adapter)),
        *([("alpha", f"{plan.options.scaling:g}")] if plan.options.scaling is not None else []),
        ("rounding", plan.options.rounding),
        ("tensors", f"{totals.merged} merged, {totals.copied} copied"),
        *_measured("retention of the update after rounding", totals.retention),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return (
        "## Merged adapter\n\n"
        f"These weights were made by lox-stream {version('lox-stream')}: a LoRA adapter was merged into the model, "
        f"`W = W1 + scaling * B A`, rounded once.\n\n| | |\n| --- | --- |\n{table}\n"
        "Checksums and the facts of each tensor are in `lox_stream.json`.\n"
    )


def _point_section(plan: Plan, point: Point) -> str:
    """Of a model that lies in a landscape."""
    rows = [
        ("aligned", _code(model_name(plan.aligned))),
        ("LoX", _code(model_name(plan.base))),
        ("fine-tuned", _code(model_name(point.finetuned))),
        ("x, y", f"{point.x:g}, {point.y:g}"),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return (
        "## A point of a landscape\n\n"
        f"These weights were made by lox-stream {version('lox-stream')}: `W = aligned + x * d1 + y * d2`, where `d1` "
        "is LoX's output minus aligned, and `d2` the fine-tuned model minus aligned, made orthogonal to `d1`; rounded "
        f"once.\n\n| | |\n| --- | --- |\n{table}\n"
        "Checksums of each tensor are in `lox_stream.json`.\n"
    )


def _svd(plan: Plan) -> str:
    if plan.aligned.overlay is not None:
        return "of the adapter's factors"
    return "none" if plan.options.rank == 0 else plan.options.svd


def _tensors(plan: Plan, totals: Totals) -> str:
    if plan.options.form != "weights":
        left = f", {len(plan.left_out)} that it cannot carry left out" if plan.left_out else ""
        return f"factors of {totals.extrapolated}{left}"
    merged = f", {totals.merged} merged and no more" if totals.merged else ""
    rescaled = f", {totals.rescaled} of scales made anew" if totals.rescaled else ""
    return f"{totals.extrapolated} extrapolated, {totals.copied} copied{merged}{rescaled}"


def _retention_note(totals: Totals) -> str:
    if totals.retention is None or totals.retention >= LOW_RETENTION:
        return ""
    return (
        "Rounding to the weights' type lost a good part of the update; `--rounding stochastic` keeps it on average.\n\n"
    )


def _measured(name: str, share: float | None) -> list[tuple[str, str]]:
    return [] if share is None else [(name, f"{100 * share:.1f} %")]


def _code(name: str) -> str:
    return "`" + printable(name).replace("`", "'").replace("|", "/") + "`"
