"""A recipe: options, and rules for groups of tensors, out of a TOML file or out of the manifest of an earlier run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lox_stream.errors import OptionError
from lox_stream.names import printable
from lox_stream.options import Options, Rule, check_options, from_json, parse_size, rule_problems
from lox_stream.sealing import opened
from lox_stream.shards import is_regular, parse_json, unreadable

OPTIONS = (  # that change bytes
    *("rank", "alpha", "svd", "tolerance", "skip", "only", "rounding", "seed"),
    *("rename", "on_missing", "on_shape_mismatch", "on_nonfinite", "split_fused", "dtype", "max_shard_size"),
)
TOLD = ("form", "factor_dtype", "scaling", "solved_for")  # by a manifest alone: what other commands were told
MAX_CHARACTERS = 1 << 28  # a manifest of a million tensors has so many
MAX_TOML_CHARACTERS = 1 << 20
MAX_PROBLEMS = 20
DOTTED = re.compile(  # tomllib takes memory and time as the square of a key's parts
    r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}"""
)
GROUP = re.compile(r"""\s*\[\[\s*["']?group["']?\s*\]\]""")
KEYS = tuple(field.name for field in fields(Rule) if field.name != "at")


def read_recipe(path: Path) -> dict[str, Any]:
    """What a TOML file, or a manifest (`lox_stream.json`), says of the fields of Options; `recipe` is among them.

        rank = 6
        alpha = 1.25

        [[group]]
        match = "*.mlp.*"
        rank = 16

    Raises OptionError, with file and line of every problem; of a manifest, with its file.
    """
    try:
        if path.exists() and not is_regular(path):
            raise OptionError(f"--recipe {printable(path)}: is a folder, device, pipe or socket, expected a file")
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        raise OptionError(f"--recipe {unreadable(path, error)}") from error
    if len(text) > MAX_CHARACTERS:
        raise OptionError(f"--recipe {printable(path)}: has over {MAX_CHARACTERS} characters, expected a recipe")
    if text.lstrip().startswith("{"):
        return _of_manifest(path, text)
    return _of_toml(path, text)


def _of_toml(path: Path, text: str) -> dict[str, Any]:
    said = _parsed(path, text)
    groups = said.pop("group", [])
    problems: list[tuple[str, int, str]] = [(key, 0, problem) for key, problem in _top_problems(said)]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        problems.append(("group", 0, "group is no table, expected [[group]] for each rule"))
        groups = []
    sections = _sections(text, len(groups))
    rules = []
    for number, group in enumerate(groups, 1):
        problems += [(key, number, problem) for key, problem in _key_problems(group, KEYS, KEYS)]
        said_here = {_name(key): value for key, value in group.items() if _name(key) in KEYS}
        rule = Rule(**{"match": "", **said_here}, at=_at(path, _line(sections[number], "match")))
        problems += [(problem.split()[0], number, problem) for problem in rule_problems(rule)]
        rules.append(rule)
    if problems:
        found = [
            f"{_at(path, _line(sections[number], key))}: {problem}" for key, number, problem in problems[:MAX_PROBLEMS]
        ]
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise OptionError("\n".join([*found, *more]))
    top = {_name(key): _in_bytes(key, value) for key, value in said.items()}
    return {**from_json(top), "recipe": tuple(rules)}


def _in_bytes(key: str, value: Any) -> Any:
    return parse_size(value) if _name(key) == "max_shard_size" and isinstance(value, str) else value


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if len(text) > MAX_TOML_CHARACTERS:
        raise OptionError(
            f"--recipe {printable(path)}: has over {MAX_TOML_CHARACTERS} characters, expected a recipe. Use globs"
        )
    if found := DOTTED.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise OptionError(f"{_at(path, line)}: a name of more than 64 parts; expected none with dots but in quotes")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, or a number of 4300 digits and more
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        raise OptionError(f"--recipe {printable(path)}: is no TOML: {reason}. Correct it there") from error


def _of_manifest(path: Path, text: str) -> dict[str, Any]:
    sealed = opened(text.encode())
    try:
        said = parse_json(sealed.data)[0]["options"]
        found = from_json({"recipe": [], **{key: said[key] for key in (*OPTIONS, *TOLD, "recipe") if key in said}})
        check_options(Options(**found))
    except OptionError as error:
        raise OptionError(f"--recipe {printable(path)}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"--recipe {printable(path)}: is no TOML and no manifest of lox-stream ({error!r}). Give lox_stream.json "
            "of an output, or a TOML file"
        ) from error
    if sealed.state == "broken":
        raise OptionError(
            f"--recipe {printable(path)}: was changed since its run wrote it, so that its options may be "
            "another's. Restore it from a copy, or say in a TOML file what is wanted"
        )
    rules = (replace(rule, at=f"--recipe {printable(path)}, rule {i}") for i, rule in enumerate(found["recipe"], 1))
    return found | {"recipe": tuple(rules)}


def _name(key: str) -> str:
    return key.replace("-", "_")


def _key_problems(said: dict[str, Any], known: tuple[str, ...], shown: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each key that means nothing, or the same as one before it, and why."""
    before: dict[str, str] = {}
    for key in said:
        if _name(key) not in known:
            yield key, f"{printable(key)} is nothing that a recipe says here, expected one of {', '.join(shown)}"
        elif _name(key) in before:
            yield key, f"{key} is said already, as {before[_name(key)]}; expected it once"
        before.setdefault(_name(key), key)


def _top_problems(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong above the groups: keys, and options that cannot be obeyed."""
    yield from _key_problems(said, OPTIONS, (*OPTIONS, "group"))
    for key, value in said.items():
        if _name(key) in OPTIONS:
            try:
                check_options(Options(**from_json({_name(key): _in_bytes(key, value)})))
            except OptionError as error:
                yield key, str(error)


def _at(path: Path, line: int) -> str:
    return f"--recipe {printable(path)}, line {line}"


def _sections(text: str, n_groups: int) -> list[list[tuple[int, str]]]:
    """The lines above the groups, then those of each group, all with their numbers; a group in brackets has one."""
    sections: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        if GROUP.match(line):
            sections.append([])
        sections[-1].append((number, line))
    missing = n_groups + 1 - len(sections)
    return sections + [[(_line(sections[0], "group"), "")]] * missing


def _line(section: list[tuple[int, str]], key: str) -> int:
    """Where a key stands, also where it is spelled with - for _ or the other way; else where its section begins."""
    for spelled in (re.escape(key), "[-_]".join(map(re.escape, re.split("[-_]", key)))):
        wanted = re.compile(rf"\s*[\"']?{spelled}[\"']?\s*=|\s*\[+\s*{spelled}")
        for number, line in section:
            if wanted.match(line):
                return number
    return section[0][0] if section else 1
