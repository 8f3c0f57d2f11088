"""Options that several commands share, in the groups in which --help shows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lox_stream.errors import OptionError
from lox_stream.names import address_of, printable, without_secrets
from lox_stream.options import Options, parse_size

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]
DEFAULTS = Options()


class GroupedOption(click.Option):
    """An option that knows under which heading --help shows it."""

    def __init__(self, *names: Any, group: str = "Options", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help has a heading for each group of options, in the order in which they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "group", "Options"), []).append(record)
        for title, records in sorted(groups.items(), key=lambda group: group[0] == "Options"):
            with formatter.section(title):
                formatter.write_dl(records)


class Folder(click.Path):
    """A path that is not empty: an unset variable of a shell must not mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty, expected a folder or a file ('.' is the current folder)", param, ctx)
        return super().convert(value, param, ctx)


class Here(Folder):
    """A path of this machine: an address would become a strange one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and (address := address_of(value)):
            self.fail(f"{without_secrets(address)} is an address, expected a folder here. Copy it first", param, ctx)
        return super().convert(value, param, ctx)


FOLDER, HERE = Folder(path_type=Path), Here(path_type=Path)


def option(group: str, *names: str, **attributes: Any) -> Decorator[Any]:
    """`click.option` under a heading."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def with_options(*options: Decorator[Any] | tuple[Decorator[Any], ...]) -> Decorator[Any]:
    """Adds options and groups of them to a command, in this order."""
    flat = [one for some in options for one in (some if isinstance(some, tuple) else (some,))]

    def decorate(function: F) -> F:
        for one in reversed(flat):
            function = one(function)
        return function

    return decorate


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    """A number of bytes as people write it; 0 for what was not given."""
    if value is None:
        return 0
    try:
        return parse_size(value)
    except OptionError as error:
        raise OptionError(f"{param.opts[0]}: {error}") from error


def alphas_of(text: str, name: str = "--alpha") -> tuple[float, ...]:
    """The factors in `0.5,1,1.25`, of the option of that name; raises OptionError."""
    found: list[float] = []
    for word in text.split(","):
        try:
            value = float(word) + 0.0  # of which -0 is 0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise OptionError(
                f"{name} is {printable(text)}, expected a finite number, or several with commas such as 0.5,1,1.25; "
                "1.25 is the paper's"
            )
        if value in found:
            raise OptionError(f"{name} is {printable(text)}, which names {value:g} twice; expected each once")
        found.append(value)
    return tuple(found)


FILES, METHOD, TENSORS = "Models", "Method", "Tensors"
PAIRS, MACHINE, WAYS, SPEAKING = "Pairs that do not match", "Machine", "Going on, and over", "What is said"

PLACES = "a folder, org/name[@revision] on the hub, s3:// or https://"  # of models


def side(name: str, told: str) -> Decorator[Any]:
    """One of the two models."""
    return option(FILES, name, type=FOLDER, required=True, metavar="DIR", help=told)


BASE = side("--base", f"The model before alignment: {PLACES}.")
OUT = option(FILES, "--out", type=FOLDER, required=True, metavar="DIR", help="Folder for the result, new or empty.")
MAX_SHARD_SIZE = option(
    FILES,
    "--max-shard-size",
    callback=_size,
    metavar="SIZE",
    show_default="the files of aligned",
    help="Write files of at most so many bytes of tensors, of even size, such as 5GB.",
)
DTYPE = option(
    FILES,
    "--dtype",
    type=click.Choice(["same", "float32", "float16", "bfloat16"]),
    default=DEFAULTS.dtype,
    show_default=True,
    help="Of the output's floats; same: as aligned has them.",
)
RANK = option(
    METHOD,
    "--rank",
    default=DEFAULTS.rank,
    metavar="K",
    show_default=True,
    help="Leading singular triplets of each difference; 0: all of it, with no SVD.",
)
SOLVING = (
    option(
        METHOD,
        "--svd",
        type=click.Choice(["randomized", "exact"]),
        default=DEFAULTS.svd,
        show_default=True,
        help="exact: full SVD in float64, for checking and small matrices.",
    ),
    option(
        METHOD,
        "--tolerance",
        default=DEFAULTS.tolerance,
        metavar="T",
        show_default=True,
        help="Share of 16-bit output elements that may differ from the exact result (wider ones: relative error 1e-5).",
    ),
)
ROUNDING = (
    option(
        METHOD,
        "--rounding",
        type=click.Choice(["nearest", "stochastic"]),
        default=DEFAULTS.rounding,
        show_default=True,
        help="stochastic keeps updates that are smaller than a rounding step, on average.",
    ),
    option(METHOD, "--seed", default=DEFAULTS.seed, metavar="N", show_default=True, help="Of stochastic rounding."),
)
RECIPE = option(
    METHOD,
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Options and rules for groups of tensors: a TOML file, or lox_stream.json of an earlier output.",
)
GLOBS = (
    option(TENSORS, "--skip", multiple=True, metavar="GLOB", help="Copy the tensors with these names; repeatable."),
    option(
        TENSORS, "--only", multiple=True, metavar="GLOB", help="Extrapolate only tensors with these names; repeatable."
    ),
)
SPLIT_FUSED = option(
    TENSORS,
    "--split-fused",
    is_flag=True,
    help="Extrapolate the parts of fused projections (qkv_proj, gate_up_proj, c_attn, ...) each by itself.",
)
ON_NONFINITE = option(
    TENSORS,
    "--on-nonfinite",
    type=click.Choice(["error", "copy"]),
    default=DEFAULTS.on_nonfinite,
    show_default=True,
    help="What to do with a tensor that holds NaN or Inf.",
)
RENAME = option(
    PAIRS,
    "--rename",
    multiple=True,
    metavar="PATTERN=NAME",
    help="Names of base as aligned has them: 'model.*=language_model.model.*'; repeatable.",
)
MISMATCHES = (
    RENAME,
    option(
        PAIRS,
        "--on-missing",
        type=click.Choice(["error", "copy"]),
        default=DEFAULTS.on_missing,
        show_default=True,
        help="What to do with a matrix that base lacks.",
    ),
    option(
        PAIRS,
        "--on-shape-mismatch",
        type=click.Choice(["error", "copy", "overlap"]),
        default=DEFAULTS.on_shape_mismatch,
        show_default=True,
        help="What to do where shapes differ; overlap: extrapolate the rows that both have (a vocabulary that grew).",
    ),
)
GPU = (
    option(
        MACHINE,
        "--device",
        default=DEFAULTS.device,
        metavar="auto|cpu|cuda[:N,...|:all]",
        show_default=True,
        help="What computes: the CPU, a GPU, or several of one kind.",
    ),
    option(
        MACHINE,
        "--kernels",
        type=click.Choice(["auto", "triton", "torch"]),
        default=DEFAULTS.kernels,
        show_default=True,
        help="With --device cuda: torch's are slower, and work without Triton.",
    ),
    option(
        MACHINE,
        "--gpu-memory",
        callback=_size,
        metavar="SIZE",
        show_default="80 % of what is free",
        help="With --device cuda: budget for weights and solver on each GPU, such as 20GiB.",
    ),
)
HOST = (
    option(
        MACHINE,
        "--memory",
        callback=_size,
        default="4GiB",
        metavar="SIZE",
        show_default=True,
        help="Budget for the program's own buffers, such as 4GiB or 512M.",
    ),
    option(
        MACHINE,
        "--threads",
        default=DEFAULTS.threads,
        metavar="N",
        show_default="all",
        help="Threads that compute.",
    ),
)
SCRATCH = (
    option(
        FILES,
        "--scratch",
        type=FOLDER,
        metavar="DIR",
        show_default="TMPDIR, for s3:// and https://",
        help="Where files that lie elsewhere pass through; names on the hub too, past its cache.",
    ),
    option(
        FILES,
        "--scratch-size",
        callback=_size,
        metavar="SIZE",
        show_default="40GiB, or half of what is free",
        help="What may lie there at once.",
    ),
)
ON_THE_WAY = (
    option(WAYS, "--resume", is_flag=True, help="Go on with the unfinished run in --out."),
    option(
        WAYS,
        "--repair",
        is_flag=True,
        help="With --resume: check every byte in --out, finished or not, and make again just what is damaged.",
    ),
    option(
        WAYS,
        "--overwrite",
        is_flag=True,
        help="Replace what a run writes in --out: an earlier output, or a folder of nothing but such names.",
    ),
    option(WAYS, "--dry-run", is_flag=True, help="Show the plan and write nothing."),
    option(
        WAYS,
        "--assume",
        default="",
        metavar="RATES",
        show_default="none",
        help="Predict the time on such a machine: disk=7GB/s,pcie=25GB/s,gpu=3TB/s,card=24GB,cores=32. With --dry-run.",
    ),
)
TELLING = (
    option(SPEAKING, "--json", "as_json", is_flag=True, help="One JSON document on stdout, messages on stderr."),
    option(SPEAKING, "--quiet", is_flag=True, help="Say nothing but errors."),
)
THE_REST = (*MISMATCHES, *GPU, *HOST, *ON_THE_WAY, *TELLING)  # of what computes out of a pair
