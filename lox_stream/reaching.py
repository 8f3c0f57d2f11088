"""The inputs of a run, wherever they are: models on the hub and in buckets become folders that a plan can look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lox_stream.errors import LoxError, OptionError, reworded
from lox_stream.hub import files_elsewhere, is_hub_id, is_offline, lies_elsewhere, local
from lox_stream.names import address_of, place_name, without_secrets
from lox_stream.options import Options
from lox_stream.planning import Plan
from lox_stream.remote import require_safetensors
from lox_stream.scratch_disk import Scratch


@dataclass(frozen=True, slots=True)
class Reached:
    """A pair as folders of this machine. Those of a scratch hold but headers until a run needs the weights."""

    base: Path
    aligned: Path
    given: tuple[str, str]  # base and aligned as they were named, "" for what lies here


def reach(base: str | Path, aligned: str | Path, scratch: Scratch | None, *, dry: bool = False) -> Reached:
    """Both inputs here: what lies elsewhere laid out in the scratch; without one, from the hub's cache.

    `dry`: only what a plan looks at. Raises CheckpointError.
    """
    folders = []
    for side, path in (("base", base), ("aligned", aligned)):
        if scratch is None or not lies_elsewhere(path) or (is_hub_id(path) and is_offline()):
            folders.append(local(path))
        else:
            found = files_elsewhere(path)
            require_safetensors(found, place_name(path))
            folder = scratch.lay_out(side, found, dry=dry)
            only = found[0].name if address_of(path).endswith(".safetensors") else ""
            folders.append(folder / only)
    here = [folder == Path(path) for folder, path in zip(folders, (base, aligned), strict=True)]
    given = ["" if own else place_name(path) for own, path in zip(here, (base, aligned), strict=True)]
    return Reached(folders[0], folders[1], (given[0], given[1]))


def require_place(out: str | Path, options: Options, *, repair: bool) -> None:
    """Raise OptionError for an output at an address that nothing can write to, or not in that way."""
    address = address_of(out)
    if address and not address.startswith("s3:"):
        raise OptionError(f"out is {without_secrets(address)}, which nobody can write to; expected s3:// or a folder")
    for name, given in {"part": options.part, "repair": repair}.items():
        if address and given:
            raise OptionError(f"--{name} is given for an output in a bucket, expected one in a folder. Leave one out")


def as_given(plan: Plan, reached: Reached) -> Plan:
    """A plan in which the inputs are called as they were given, for manifest, card and tables."""
    base, aligned = reached.given
    return replace(
        plan,
        base=replace(plan.base, origin=base),
        aligned=replace(plan.aligned, origin=aligned),
        warnings=tuple(renamed(warning, reached) for warning in plan.warnings),
    )


def renamed(text: str, reached: Reached) -> str:
    """A message with the names that were given in place of folders that will be gone."""
    for path, name in zip((reached.base, reached.aligned), reached.given, strict=True):
        text = text.replace(str(path), name) if name else text
    return text


@contextmanager
def named(reached: Reached) -> Iterator[None]:
    """Errors with those names."""
    try:
        yield
    except LoxError as error:
        text = renamed(str(error), reached)
        if text == str(error):
            raise
        raise reworded(error, text) from error
