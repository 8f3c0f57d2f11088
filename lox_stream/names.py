"""Names from strangers' files: globs over them, patterns of layers, near misses, and how they are shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase, translate
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")


def printable(name: str | PurePath) -> str:
    """The name or path with every character that a terminal could obey written as an escape: `a\\x1b[2J`."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def in_quotes(name: str | PurePath) -> str:
    """A name as one word of a shell's command, which nobody should run unquoted; always in quotes.

    >>> print(in_quotes("lm_head.weight"), in_quotes("a'b"))
    'lm_head.weight' 'a'"'"'b'
    """
    return "'" + printable(name).replace("'", "'\"'\"'") + "'"


def shown(value: Any, limit: int = 80) -> str:
    """A value of a stranger's JSON, TOML or pickle as Python spells it, cut to `limit` characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of 4300 digits and more
        return f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listing(names: Iterable[str], limit: int = 4) -> str:
    """`a, b, c, d and 12 more`, each name printable."""
    shown = [printable(name) for name in names]
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def counted(count: int, one: str, many: str = "") -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def hub_name(folder: Path) -> str:
    """`org/name` of a folder in the cache of huggingface_hub (`models--org--name/...`); "" for another."""
    for part in reversed(folder.resolve().parts):
        if found := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{found[1]}/{found[2]}"
    return ""


def address_of(path: str | Path) -> str:
    """The address that a path is, its two slashes put back, or "" for a path of this machine.

    >>> address_of(Path("s3://bucket/model/")), address_of("https://host/a/b"), address_of("/models/a")
    ('s3://bucket/model', 'https://host/a/b', '')
    """
    found = _ADDRESS.fullmatch(str(path))
    return f"{found[1].lower()}://{found[2].rstrip('/')}" if found else ""


def without_secrets(address: str) -> str:
    """An address without user, password, query and fragment.

    >>> without_secrets("https://user:pw@host/a?key=1")
    'https://host/a'
    """
    return printable(re.sub(r"[?#].*", "", re.sub(r"//[^/]*@", "//", address)))


def place_name(path: str | Path) -> str:
    """A path or an address as people write it."""
    return address_of(path) or str(path)


def is_plain_relative(name: str) -> bool:
    """Whether a file name out of an index stays in its folder: relative, no `..`, one spelling only."""
    if re.search("[\0\\\\\ud800-\udfff]|^[A-Za-z]:", name):  # the range: half characters, which no file name can hold
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def pattern_of(name: str) -> str:
    """The name with its numbers as stars: `model.layers.7.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj.weight`.

    The pattern is also a glob that matches the name.
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether any glob matches the whole name; upper and lower case differ, `*` crosses dots."""
    wanted = tuple(globs)
    return bool(wanted) and _pattern(wanted).match(name) is not None


@lru_cache
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all of them: the names of the largest models are many, and are looked at often."""
    return re.compile("|".join(map(translate, globs)))


def unmatched(globs: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The globs that match none of the names."""
    known = tuple(names)
    return tuple(glob for glob in globs if not any(fnmatchcase(name, glob) for name in known))


def suggestion(patterns: Iterable[str]) -> str:
    """`Did you mean 'a' or 'b'?`, each pattern printable; nothing without any."""
    shown = " or ".join(repr(printable(pattern)) for pattern in patterns)
    return f"Did you mean {shown}?" if shown else ""


def near_misses(glob: str, names: Iterable[str], limit: int = 3) -> tuple[str, ...]:
    """Patterns of names that somebody who typed `glob` may have meant, best first; each works as a glob.

    Names that hold the glob's longest literal stretch come first: `lm_head` finds `lm_head.weight`. Otherwise stretches
    of as many components are compared: `*q_porj*` finds `model.layers.*.self_attn.q_proj.weight`.
    """
    literal = max(re.split(r"[*?\[\]]+", glob), key=len).strip(".").lower()
    patterns = tuple(dict.fromkeys(pattern_of(name) for name in names))
    holding = [pattern for pattern in patterns if literal and literal in pattern.lower()]
    if holding:
        return tuple(holding[:limit])
    width = literal.count(".") + 1
    stretches: dict[str, str] = {}
    for pattern in patterns:
        parts = pattern.lower().split(".")
        for i in range(max(1, len(parts) - width + 1)):
            stretches.setdefault(".".join(parts[i : i + width]), pattern)
    close = difflib.get_close_matches(literal, stretches, n=limit, cutoff=0.6)
    return tuple(dict.fromkeys(stretches[stretch] for stretch in close))
