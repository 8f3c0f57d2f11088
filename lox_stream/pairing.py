"""Which tensor of base a tensor of aligned belongs to: by its name, by `--rename`, across wrappers, by ties."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lox_stream.checkpoint import Checkpoint, TensorInfo
from lox_stream.names import counted, listing, near_misses, pattern_of, printable, suggestion
from lox_stream.ties import tied_names, tied_partner

WRAPPERS = (  # what models that hold another model put before its names
    *("", "model.", "language_model.", "model.language_model.", "language_model.model."),
    *("base_model.model.", "base_model.model.model.", "module.", "transformer."),
)
_WILDCARD = re.compile(r"[*?]")  # as in --skip; brackets stand for themselves


@dataclass(frozen=True, slots=True)
class Pairs:
    """The partner in base of each name of aligned that wants one, or None."""

    partners: dict[str, TensorInfo | None]
    leaders: dict[str, str]  # names of aligned that follow another one which they are tied to
    across: bool  # some are paired under other names: by a rename, or across a wrapper
    unused: tuple[str, ...]  # names of base that belong to none of aligned's
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def pair(base: Checkpoint, aligned: Checkpoint, names: Sequence[str], renames: Sequence[str]) -> Pairs:
    """Pair the tensors `names` of aligned with those of base; complete messages."""
    called, problems = renamed(base, renames)
    partners: dict[str, TensorInfo | None] = {name: called.get(name) for name in names}
    across = _across_wrappers(aligned, called, [name for name in names if partners[name] is None])
    partners |= across
    theirs = base
    if renames:
        theirs = replace(base, tensors={name: replace(tensor, name=name) for name, tensor in called.items()})
    for name in names:
        tied = None if partners[name] else tied_partner(aligned.tensors[name], theirs, aligned)
        partners[name] = called[tied.name] if tied else partners[name]
    leaders = {name: leader for name, leader in tied_names(aligned).items() if name in partners and leader in partners}
    for name, leader in leaders.items():  # base may have but one of the names
        partners[leader] = partners[leader] or partners[name]
    partners |= {name: partners[leader] for name, leader in leaders.items()}
    unused = tuple(_unused(aligned, called, partners))
    return Pairs(partners, leaders, bool(across or renames), unused, tuple(problems), tuple(_told(across)))


def overlapping(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two matrices differ in their rows alone, as embeddings do whose vocabulary grew."""
    return len(shape) == len(other) == 2 and shape[1] == other[1]


def _unused(
    aligned: Checkpoint, called: Mapping[str, TensorInfo], partners: Mapping[str, TensorInfo | None]
) -> Iterator[str]:
    """Names of base that are no partner's, and none that aligned has, under another wrapper's prefix either."""
    used = {partner.name for partner in partners.values() if partner is not None}
    rest = [name for name, tensor in called.items() if name not in aligned.tensors and tensor.name not in used]
    bare = {_bare(name) for name in aligned.tensors} if rest else set()
    return (called[name].name for name in rest if not any(name.removeprefix(prefix) in bare for prefix in WRAPPERS))


def _bare(name: str) -> str:
    """A name without the longest of the wrappers' prefixes."""
    return min((name.removeprefix(prefix) for prefix in WRAPPERS), key=len)


def renamed(base: Checkpoint, renames: Sequence[str]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Base's tensors by the names that they have once the first rename that matches is applied, and problems."""
    if not renames:
        return base.tensors, []
    rules = [_rule(text) for text in renames]
    problems = [
        f"--rename {text!r} matches no tensor of {printable(base.root)}; expected one at least. {_near(text, base)}"
        for text, (pattern, _) in zip(renames, rules, strict=True)
        if not any(pattern.fullmatch(name) for name in base.tensors)
    ]
    called: dict[str, TensorInfo] = {}
    for name, tensor in base.tensors.items():
        found = ((pattern.fullmatch(name), parts) for pattern, parts in rules)
        new = next((_filled(parts, match.groups()) for match, parts in found if match is not None), name)
        if new in called:
            problems.append(
                f"--rename gives {printable(called[new].name)} and {printable(name)} of base the same name "
                f"{printable(new)}; expected different ones. Make the patterns narrower"
            )
        called[new] = tensor
    return called, problems


def _rule(text: str) -> tuple[re.Pattern[str], list[str]]:
    """The pattern with a group for each wildcard, and the replacement's pieces between them."""
    pattern, _, replacement = text.partition("=")
    inner = {"*": "(.*)", "?": "(.)"}
    parts = re.split(r"([*?])", pattern)
    expression = "".join(inner.get(part) or re.escape(part) for part in parts)
    return re.compile(expression, re.DOTALL), _WILDCARD.split(replacement)


def _filled(pieces: Sequence[str], groups: Sequence[str]) -> str:
    return "".join(piece + group for piece, group in zip(pieces, (*groups, ""), strict=True))


def _near(text: str, base: Checkpoint) -> str:
    return suggestion(near_misses(text.partition("=")[0], base.tensors))


def _across_wrappers(
    aligned: Checkpoint, called: Mapping[str, TensorInfo], names: Iterable[str]
) -> dict[str, TensorInfo]:
    """Partners that have the same name but for a wrapper's prefix; only where there is one alone.

    Of the same shape, or else of as many columns: a vocabulary that grew.
    """
    found: dict[str, TensorInfo] = {}
    for name in names:
        rests = {name.removeprefix(prefix) for prefix in WRAPPERS}
        candidates = {f"{prefix}{rest}" for rest in rests for prefix in WRAPPERS}
        fitting = [called[one] for one in candidates if one in called and one not in aligned.tensors]
        shape = aligned.tensors[name].shape
        alike = [one for one in fitting if one.shape == shape] or [
            one for one in fitting if overlapping(one.shape, shape)
        ]
        if len(alike) == 1:
            found[name] = alike[0]
    counts = Counter(partner.name for partner in found.values())
    return {name: partner for name, partner in found.items() if counts[partner.name] == 1}


def _told(across: Mapping[str, TensorInfo]) -> list[str]:
    examples = dict.fromkeys(
        f"{printable(pattern_of(name))} with {printable(pattern_of(one.name))}" for name, one in across.items()
    )
    if not examples:
        return []
    return [
        f"{counted(len(across), 'tensor')} paired with those of base under another prefix: {listing(examples, 2)}. If "
        "that is wrong, name them with --rename"
    ]
