"""The command `lox-stream`: its options and its help. Each command is carried out by a module of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lox_stream import __version__
from lox_stream.errors import OptionError
from lox_stream.messages import guarded
from lox_stream.options import Options, check_platform, parse_size

EPILOG = """\b
Example:
  lox-stream run --base llama-base --aligned llama-instruct --out llama-lox

\b
Exit codes:
  0    done
  1    error: the inputs, the output folder, the disk, or a check that failed
  2    usage: an unknown option, or a value that cannot be obeyed (also a glob that matches no tensor)
  3    finished, but some tensor did not reach the tolerance
  130  stopped by SIGINT (Ctrl-C); run prints the command that goes on
  143  stopped by SIGTERM; the same
"""


class _Command(click.Command):
    """A command that refuses a platform it cannot work on, after its options were read."""

    def invoke(self, ctx: click.Context) -> Any:
        check_platform()
        return super().invoke(ctx)


class _Program(click.Group):
    """The group of commands; its `main` ends the process with the documented exit codes."""

    command_class = _Command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        typed = tuple(sys.argv[1:] if args is None else args)
        extra |= {"standalone_mode": False, "obj": typed}
        for name in ("stdout", "stderr"):  # closed by whoever started us: nobody reads them
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a character that the terminal's encoding lacks is no reason to stop
                stream.reconfigure(errors="backslashreplace")
        sys.exit(guarded(lambda: super(_Program, self).main(list(typed), *rest, **extra)))


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    """A number of bytes as people write it; 0 for what was not given."""
    if value is None:
        return 0
    try:
        return parse_size(value)
    except OptionError as error:
        raise OptionError(f"{param.opts[0]}: {error}") from error


class _Folder(click.Path):
    """A path that is not empty: an unset variable of a shell must not mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty, expected a folder or a file ('.' is the current folder)", param, ctx)
        return super().convert(value, param, ctx)


FLAGS = ("resume", "overwrite", "repair", "dry_run", "assume", "as_json", "quiet")  # of `run`, beside Options
FOLDER = _Folder(path_type=Path)
DEFAULTS = Options()


@click.group(
    cls=_Program,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="lox-stream")
def commands() -> None:
    """Low-rank extrapolation (LoX) of LLM weights: aligned + alpha * (leading part of aligned - base).

    Works on safetensors checkpoints of any size, at the speed of the disk, in bounded memory.
    """


@commands.command("run")
@click.option("--base", type=FOLDER, required=True, metavar="DIR", help="The model before alignment.")
@click.option(
    "--aligned", type=FOLDER, required=True, metavar="DIR", help="The model after alignment, or its LoRA adapter."
)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="Folder for the result, new or empty.")
@click.option(
    "--rank",
    default=DEFAULTS.rank,
    metavar="K",
    show_default=True,
    help="Leading singular triplets of each difference; 0: all of it, with no SVD.",
)
@click.option(
    "--alpha",
    default=DEFAULTS.alpha,
    metavar="A",
    show_default=True,
    help="Extrapolation factor; 0 gives a byte copy of the aligned weights.",
)
@click.option(
    "--svd",
    type=click.Choice(["randomized", "exact"]),
    default=DEFAULTS.svd,
    show_default=True,
    help="exact: full SVD in float64, for checking and small matrices.",
)
@click.option(
    "--tolerance",
    default=DEFAULTS.tolerance,
    metavar="T",
    show_default=True,
    help="Share of 16-bit output elements that may differ from the exact result (wider ones: relative error 1e-5).",
)
@click.option("--skip", multiple=True, metavar="GLOB", help="Copy the tensors with these names; repeatable.")
@click.option("--only", multiple=True, metavar="GLOB", help="Extrapolate only tensors with these names; repeatable.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default=DEFAULTS.rounding,
    show_default=True,
    help="stochastic keeps updates that are smaller than a rounding step, on average.",
)
@click.option("--seed", default=DEFAULTS.seed, metavar="N", show_default=True, help="Of stochastic rounding.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Options and rules for groups of tensors: a TOML file, or lox_stream.json of an earlier output.",
)
@click.option(
    "--rename",
    multiple=True,
    metavar="PATTERN=NAME",
    help="Names of base as aligned has them: 'model.*=language_model.model.*'; repeatable.",
)
@click.option(
    "--on-missing",
    type=click.Choice(["error", "copy"]),
    default=DEFAULTS.on_missing,
    show_default=True,
    help="What to do with a matrix that base lacks.",
)
@click.option(
    "--on-shape-mismatch",
    type=click.Choice(["error", "copy", "overlap"]),
    default=DEFAULTS.on_shape_mismatch,
    show_default=True,
    help="What to do where shapes differ; overlap: extrapolate the rows that both have (a vocabulary that grew).",
)
@click.option(
    "--split-fused",
    is_flag=True,
    help="Extrapolate the parts of fused projections (qkv_proj, gate_up_proj, c_attn, ...) each by itself.",
)
@click.option(
    "--on-nonfinite",
    type=click.Choice(["error", "copy"]),
    default=DEFAULTS.on_nonfinite,
    show_default=True,
    help="What to do with a tensor that holds NaN or Inf.",
)
@click.option(
    "--dtype",
    type=click.Choice(["same", "float32", "float16", "bfloat16"]),
    default=DEFAULTS.dtype,
    show_default=True,
    help="Of the output's floats; same: as aligned has them.",
)
@click.option(
    "--max-shard-size",
    callback=_size,
    metavar="SIZE",
    show_default="the files of aligned",
    help="Write files of at most so many bytes of tensors, of even size, such as 5GB.",
)
@click.option(
    "--device",
    default=DEFAULTS.device,
    metavar="auto|cpu|cuda[:N,...|:all]",
    show_default=True,
    help="What computes: the CPU, a GPU, or several of one kind.",
)
@click.option(
    "--kernels",
    type=click.Choice(["auto", "triton", "torch"]),
    default=DEFAULTS.kernels,
    show_default=True,
    help="With --device cuda: torch's are slower, and work without Triton.",
)
@click.option(
    "--memory",
    callback=_size,
    default="4GiB",
    metavar="SIZE",
    show_default=True,
    help="Budget for the program's own buffers, such as 4GiB or 512M.",
)
@click.option(
    "--gpu-memory",
    callback=_size,
    metavar="SIZE",
    show_default="80 % of what is free",
    help="With --device cuda: budget for weights and solver on each GPU, such as 20GiB.",
)
@click.option("--threads", default=DEFAULTS.threads, metavar="N", show_default="all", help="Threads that compute.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out.")
@click.option(
    "--repair",
    is_flag=True,
    help="With --resume: check every byte in --out, finished or not, and make again just what is damaged.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace what a run writes in --out: an earlier output, or a folder of nothing but such names.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option(
    "--assume",
    default="",
    metavar="RATES",
    show_default="none",
    help="Predict the time on such a machine: disk=7GB/s,pcie=25GB/s,gpu=3TB/s,card=24GB,cores=32. With --dry-run.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, messages on stderr.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def _run(ctx: click.Context, /, base: Path, aligned: Path, out: Path, **given: Any) -> int:
    """Write the extrapolated model to a new folder.

    \b
    Example:
      lox-stream run --base llama-base --aligned llama-instruct --out llama-lox --rank 6 --alpha 1.25
    """
    from lox_stream.cli_run import Request, carry_out

    flags = {name: given.pop(name) for name in FLAGS}
    recipe = given.pop("recipe")
    if recipe is not None:
        from lox_stream.recipes import read_recipe

        found = read_recipe(recipe)
        typed = {name for name in given if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
        given |= {name: value for name, value in found.items() if name not in typed}
    options = Options(memory_bytes=given.pop("memory"), gpu_memory_bytes=given.pop("gpu_memory"), **given)
    return carry_out(Request(base, aligned, out, options, typed=ctx.obj, **flags))


@commands.command("inspect")
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option(
    "--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Show what each rule of this recipe hits, too."
)
@click.option("--split-fused", is_flag=True, help="Show the parts of fused projections, as `run` would split them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, each tensor in it.")
def _inspect(folder: Path, recipe: Path | None, split_fused: bool, as_json: bool) -> int:
    """Show what a checkpoint holds and what `run` would do with it.

    \b
    Examples:
      lox-stream inspect llama-instruct
      lox-stream inspect llama-instruct --recipe mlp-only.toml
    """
    from lox_stream.cli_inspect import look

    return look(folder, recipe, split_fused=split_fused, as_json=as_json)


@commands.command("verify")
@click.argument("out", type=FOLDER, metavar="OUT")
@click.option("--base", type=FOLDER, metavar="DIR", help="The base that the run had; with --aligned.")
@click.option("--aligned", type=FOLDER, metavar="DIR", help="The aligned model that the run had; with --base.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=3,
    metavar="N",
    show_default=True,
    help="Matrices to recompute, with inputs given.",
)
@click.option("--seed", default=0, metavar="N", show_default=True, help="Picks the matrices.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, messages on stderr.")
def _verify(out: Path, base: Path | None, aligned: Path | None, sample: int, seed: int, as_json: bool) -> int:
    """Check every byte of an output against the checksums of its manifest.

    With --base and --aligned also recompute a sample of its matrices by a full SVD in float64, which costs minutes
    for large ones and is said beforehand. A matrix fails when more of its elements differ than twice the share that
    the manifest predicts and 0.2 points.

    \b
    Examples:
      lox-stream verify llama-lox
      lox-stream verify llama-lox --base llama-base --aligned llama-instruct --sample 5
    """
    if (base is None) != (aligned is None):
        raise click.UsageError("--base and --aligned belong together: give both to recompute a sample, or neither")
    from lox_stream.cli_verify import check_output

    inputs = (base, aligned) if base is not None and aligned is not None else None
    return check_output(out, inputs, count=sample, seed=seed, as_json=as_json)


@commands.command("bench")
@click.option("--base", type=FOLDER, required=True, metavar="DIR", help="The model before alignment.")
@click.option("--aligned", type=FOLDER, required=True, metavar="DIR", help="The model after alignment.")
@click.option("--tensors", multiple=True, metavar="GLOB", help="Only matrices with these names; repeatable.")
@click.option("--rank", default="6", metavar="K,...", show_default=True, help="Ranks to look for.")
@click.option("--solvers", default="", metavar="NAME,...", show_default="all", help="Only these solvers.")
@click.option(
    "--share",
    default="99.95,99.99",
    metavar="P,...",
    show_default=True,
    help="Percent of elements that are to be right.",
)
@click.option("--per-shape", default=1, metavar="N", show_default=True, help="Matrices of each shape.")
@click.option("--repeat", default=5, metavar="N", show_default=True, help="Timings of each setting, in turns.")
@click.option("--limit", default=60.0, metavar="S", show_default=True, help="Seconds that one solve may take.")
@click.option("--seed", default=0, metavar="N", show_default=True, help="Picks the matrices, starts the solvers.")
@click.option(
    "--device", default=DEFAULTS.device, metavar="auto|cpu|cuda|cuda:N", show_default=True, help="What computes."
)
@click.option("--plot", is_flag=True, help="Also draw time against accuracy in the terminal.")
@click.option(
    "--picture", type=FOLDER, multiple=True, metavar="FILE", help="Also draw it into a .png or .svg; repeatable."
)
@click.option("--csv", "table", type=FOLDER, metavar="FILE", help="Also write every single result.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, messages on stderr.")
def _bench(base: Path, aligned: Path, tensors: tuple[str, ...], table: Path | None, as_json: bool, **given: Any) -> int:
    """Compare the solvers that one would pick for a truncated SVD, on matrices of this pair.

    Each is judged by the float64 result: what share of the output's elements is bit-identical, and what that costs.
    Nothing is written but the files that are asked for. Some solvers need `pip install 'lox-stream[bench]'`.

    \b
    Examples:
      lox-stream bench --base llama-base --aligned llama-instruct
      lox-stream bench --base llama-base --aligned llama-instruct --tensors '*q_proj*' --rank 6,16 --plot
    """
    from lox_stream.cli_bench import Request, carry_out, numbers

    for option, value, least in (("--per-shape", given["per_shape"], 1), ("--repeat", given["repeat"], 1)):
        if value < least:
            raise OptionError(f"{option} is {value}, expected {least} or more")
    if not 0 <= given["seed"] < 1 << 32:
        raise OptionError(f"--seed is {given['seed']}, expected 0 to {(1 << 32) - 1}, which every solver takes")
    if not given["limit"] > 0:
        raise OptionError(f"--limit is {given['limit']}, expected more than 0 seconds")
    request = Request(
        base=base,
        aligned=aligned,
        tensors=tensors,
        ranks=numbers(given["rank"], "--rank", int, 1, 1 << 20),
        solvers=tuple(dict.fromkeys(name for name in given["solvers"].split(",") if name)),
        shares=tuple(percent / 100 for percent in numbers(given["share"], "--share", float, 1, 100)),
        per_shape=given["per_shape"],
        repeats=given["repeat"],
        limit_s=given["limit"],
        seed=given["seed"],
        device=given["device"],
        as_json=as_json,
        plot=given["plot"],
        pictures=given["picture"],
        table=table,
    )
    return carry_out(request)


@commands.command("demo")
@click.option("--keep", type=FOLDER, metavar="DIR", help="Keep the pair and the result in this folder, new or empty.")
def _demo(keep: Path | None) -> int:
    """Make a small pair of models, extrapolate it, and show what came out. Takes half a minute at most.

    \b
    Example:
      lox-stream demo --keep lox-demo
    """
    from lox_stream.cli_demo import demonstrate

    return demonstrate(keep)


def main() -> None:
    """The console script."""
    commands(prog_name="lox-stream")
