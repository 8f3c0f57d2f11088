"""A recipe: options, and rules for groups of tensors, out of a TOML file or out of the manifest of an earlier run."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from lox_stream.errors import OptionError
from lox_stream.names import printable
from lox_stream.options import Rule, from_json, rule_problems
from lox_stream.shards import unreadable

OPTIONS = (  # that change bytes
    *("rank", "alpha", "svd", "tolerance", "skip", "only", "rounding", "seed"),
    *("rename", "on_missing", "on_shape_mismatch", "on_nonfinite"),
)
MAX_CHARACTERS = 1 << 28  # a manifest of a million tensors has so many
KEYS = tuple(field.name for field in fields(Rule))


def read_recipe(path: Path) -> dict[str, Any]:
    """What a TOML file, or a manifest (`lox_stream.json`), says of the fields of Options; `recipe` is among them.

        rank = 6
        alpha = 1.25

        [[group]]
        match = "*.mlp.*"
        rank = 16

    Raises OptionError, with lines, but for the options themselves: `check_options` checks these.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--recipe {unreadable(path, error)}") from error
    if len(text) > MAX_CHARACTERS:
        raise OptionError(f"--recipe {printable(path)}: has over {MAX_CHARACTERS} characters, expected a recipe")
    if text.lstrip().startswith("{"):
        return _of_manifest(path, text)
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"--recipe {printable(path)}: is no TOML: {error}. Correct it there") from error
    groups = said.pop("group", [])
    problems = [
        _at(path, _line(text, key), _unknown(key, (*OPTIONS, "group"))) for key in said if _name(key) not in OPTIONS
    ]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        problems.append(_at(path, _line(text, "group"), "group is no table, expected [[group]] for each rule"))
        groups = []
    rules = []
    for number, group in enumerate(groups):
        problems += [
            _at(path, _line(text, key, number), _unknown(key, KEYS)) for key in group if _name(key) not in KEYS
        ]
        rule = Rule(**{"match": "", **{_name(key): value for key, value in group.items() if _name(key) in KEYS}})
        problems += [_at(path, _line(text, problem.split()[0], number), problem) for problem in rule_problems(rule)]
        rules.append(rule)
    if problems:
        raise OptionError("\n".join(problems))
    return {**from_json({_name(key): value for key, value in said.items()}), "recipe": tuple(rules)}


def _of_manifest(path: Path, text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)["options"]
        return from_json({"recipe": [], **{key: said[key] for key in (*OPTIONS, "recipe") if key in said}})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"--recipe {printable(path)}: is no TOML and no manifest of lox-stream ({error!r}). Give lox_stream.json "
            "of an output, or a TOML file"
        ) from error


def _name(key: str) -> str:
    return key.replace("-", "_")


def _unknown(key: str, known: tuple[str, ...]) -> str:
    return f"{printable(key)} is nothing that a recipe says here, expected one of {', '.join(known)}"


def _at(path: Path, line: int, problem: str) -> str:
    return f"--recipe {printable(path)}, line {line}: {problem}"


def _line(text: str, key: str, group: int | None = None) -> int:
    """Where a key stands: before the first [[group]], or in the group of that number; else where that begins."""
    lines = text.splitlines()
    begins = [i for i, line in enumerate(lines) if re.match(r"\s*\[\[\s*group\s*\]\]", line)]
    if group is None:
        first, last = 0, begins[0] if begins else len(lines)
    else:
        first, last = ([*begins, len(lines)] + [len(lines)] * (group + 2))[group : group + 2]
    wanted = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=|\s*\[+\s*{re.escape(key)}")
    return next((i for i in range(first, last) if wanted.match(lines[i])), first) + 1
