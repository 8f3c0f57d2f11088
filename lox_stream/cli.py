"""The command `lox-stream`: its options and its help. Each command is carried out by a module of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lox_stream import __version__
from lox_stream.cli_options import (
    BASE,
    DEFAULTS,
    DTYPE,
    FILES,
    FOLDER,
    GLOBS,
    HERE,
    HOST,
    MAX_SHARD_SIZE,
    METHOD,
    MISMATCHES,
    ON_NONFINITE,
    ON_THE_WAY,
    OUT,
    PLACES,
    RANK,
    RECIPE,
    RENAME,
    ROUNDING,
    SCRATCH,
    SOLVING,
    SPLIT_FUSED,
    TELLING,
    THE_REST,
    GroupedCommand,
    alphas_of,
    option,
    side,
    with_options,
)
from lox_stream.errors import LoxError, OptionError
from lox_stream.messages import guarded
from lox_stream.options import Options, check_platform

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


class _Command(GroupedCommand):
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


FLAGS = (
    "resume",
    "overwrite",
    "repair",
    "dry_run",
    "assume",
    "as_json",
    "quiet",
    "scratch",
    "scratch_size",
)  # of `run`, beside Options


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
@with_options(
    BASE,
    side("--aligned", "The model after alignment, or its LoRA adapter: in the same places."),
    option(
        FILES,
        "--out",
        required=True,
        metavar="DIR",
        help="Folder for the result, new or empty; with several alphas such as 'out-{alpha}'.",
    ),
    option(
        FILES,
        "--save-factors",
        type=FOLDER,
        metavar="DIR",
        help="Also write the update as a LoRA adapter, as `lox-stream adapter` does.",
    ),
    option(
        FILES,
        "--part",
        default="",
        metavar="I/N",
        show_default="all of it",
        help="Write one of N shares of the files, for as many machines; then `lox-stream finish`.",
    ),
    option(
        FILES,
        "--ray",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        show_default="off",
        help="Spread the files over the nodes of a Ray cluster: auto, HOST:PORT; this machine without an address.",
    ),
    option(
        FILES,
        "--push-to",
        metavar="ORG/NAME",
        help="Also upload the result to the hub, as a private model, in one commit.",
    ),
    SCRATCH,
    DTYPE,
    MAX_SHARD_SIZE,
    RANK,
    option(
        METHOD,
        "--alpha",
        default=f"{DEFAULTS.alpha:g}",
        metavar="A[,A...]",
        show_default=True,
        help="Extrapolation factor; 0 gives a byte copy of the aligned weights. Several: all from one solve.",
    ),
    SOLVING,
    ROUNDING,
    RECIPE,
    GLOBS,
    SPLIT_FUSED,
    ON_NONFINITE,
    THE_REST,
)
@click.pass_context
def _run(
    ctx: click.Context,
    /,
    base: Path,
    aligned: Path,
    out: str,
    save_factors: Path | None,
    push_to: str | None,
    ray: str | None,
    **given: Any,
) -> int:
    """Write the extrapolated model to a new folder.

    \b
    Examples:
      lox-stream run --base llama-base --aligned llama-instruct --out llama-lox --rank 6 --alpha 1.25
      lox-stream run --base llama-base --aligned llama-instruct --alpha 0.5,1,1.25 --out 'llama-lox-{alpha}'
    """
    from lox_stream.cli_run import carry_out, outputs_of, request_for

    flags, options, alphas = _understood(ctx, given)
    if _typed(ctx, "part") and not options.part:
        raise OptionError("--part is empty, expected such as 2/8; is a variable of the shell not set?")
    if options.part and push_to is not None:
        raise OptionError(
            "--part and --push-to are both given, expected one. Push what `lox-stream finish` puts together"
        )
    options = replace(options, form="weights", factor_dtype=DEFAULTS.factor_dtype)  # a recipe may be an adapter's
    outputs = outputs_of(out, alphas, save_factors, options)
    return carry_out(request_for(ctx.obj, base, aligned, outputs, flags | {"ray": ray or ""}), push_to)


@commands.command("adapter")
@with_options(
    BASE,
    side("--aligned", "The model after alignment, in the same places."),
    option(FILES, "--out", type=FOLDER, required=True, metavar="DIR", help="Folder for the adapter, new or empty."),
    option(
        FILES,
        "--target",
        type=click.Choice(["peft", "vllm"]),
        default="peft",
        show_default=True,
        help="Who loads it; what that one refuses is left out, and said.",
    ),
    option(
        FILES,
        "--dtype",
        "factor_dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default=DEFAULTS.factor_dtype,
        show_default=True,
        help="Of the factors.",
    ),
    SCRATCH,
    RANK,
    option(
        METHOD,
        "--alpha",
        default=f"{DEFAULTS.alpha:g}",
        metavar="A",
        show_default=True,
        help="Extrapolation factor: the adapter's scaling, lora_alpha / r.",
    ),
    SOLVING,
    RECIPE,
    GLOBS,
    ON_NONFINITE,
    THE_REST,
)
@click.pass_context
def _adapter(ctx: click.Context, /, base: Path, aligned: Path, out: Path, target: str, **given: Any) -> int:
    """Write the update alone, as a LoRA adapter of the aligned model.

    alpha * (rank-k part of aligned - base) is a LoRA of rank k: small, switched on and off by PEFT or vLLM, and merged
    by `lox-stream apply`.

    \b
    Example:
      lox-stream adapter --base llama-base --aligned llama-instruct --out llama-lox-adapter
    """
    from lox_stream.cli_run import carry_out, request_for

    flags, options, alphas = _understood(ctx, given)
    if len(alphas) > 1:
        raise OptionError("--alpha names several factors, expected one: an adapter's can be set anew when it is used")
    form: Any = options.form if options.form != "weights" and not _typed(ctx, "target") else target
    options = replace(options, rounding=DEFAULTS.rounding, seed=DEFAULTS.seed, dtype="same", max_shard_size=0)
    place = Path(str(out).replace("{alpha}", f"{alphas[0]:g}"))
    outputs = [(place, replace(options, alpha=alphas[0], form=form))]
    return carry_out(request_for(ctx.obj, base, aligned, outputs, flags))


@commands.command("apply")
@with_options(
    option(
        FILES,
        "--adapter",
        type=FOLDER,
        required=True,
        metavar="DIR",
        help=f"A LoRA adapter, as PEFT saves it: {PLACES}.",
    ),
    side("--aligned", "The model that the adapter changes, in the same places."),
    OUT,
    SCRATCH,
    DTYPE,
    MAX_SHARD_SIZE,
    option(
        METHOD,
        "--alpha",
        type=float,
        metavar="A",
        show_default="as the adapter says",
        help="Another factor in place of lora_alpha / r.",
    ),
    ROUNDING,
    RENAME,
    HOST,
    ON_THE_WAY,
    TELLING,
)
@click.pass_context
def _apply(ctx: click.Context, /, adapter: Path, aligned: Path, out: Path, alpha: float | None, **given: Any) -> int:
    """Merge an adapter into the model that it changes.

    A float32 adapter of lox-stream gives the very bytes that `run` writes.

    \b
    Example:
      lox-stream apply --adapter llama-lox-adapter --aligned llama-instruct --out llama-lox --alpha 0.8
    """
    from lox_stream.cli_run import carry_out, in_words_of_apply, request_for

    flags = {name: given.pop(name) for name in FLAGS}
    options = Options(alpha=0.0, scaling=alpha, memory_bytes=given.pop("memory"), **given)
    try:
        return carry_out(request_for(ctx.obj, aligned, adapter, [(out, options)], flags, merging=True))
    except LoxError as error:
        raise in_words_of_apply(error) from error


def _typed(ctx: click.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    return ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE


def _understood(ctx: click.Context, given: dict[str, Any]) -> tuple[dict[str, Any], Options, tuple[float, ...]]:
    """The flags, the options, and the factors that are asked for; a recipe says what was not typed."""
    flags = {name: given.pop(name) for name in FLAGS if name in given}
    given["alpha"] = alphas_of(given["alpha"])
    recipe = given.pop("recipe")
    if recipe is not None:
        from lox_stream.recipes import read_recipe

        found = read_recipe(recipe)
        given |= {name: value for name, value in found.items() if name not in given or not _typed(ctx, name)}
    alphas = given.pop("alpha")
    alphas = alphas if isinstance(alphas, tuple) else (alphas,)
    options = Options(memory_bytes=given.pop("memory"), gpu_memory_bytes=given.pop("gpu_memory", 0), **given)
    return flags, options, alphas


@commands.command("finish")
@with_options(
    click.argument("out", type=HERE, metavar="OUT"),
    option(FILES, "--base", type=FOLDER, metavar="DIR", show_default="as part 1 had it", help="Where base lies here."),
    option(
        FILES, "--aligned", type=FOLDER, metavar="DIR", show_default="as part 1 had it", help="Where aligned lies here."
    ),
    HOST,
    TELLING,
)
def _finish(out: Path, base: Path | None, aligned: Path | None, **given: Any) -> int:
    """Put the parts of `run --part I/N` together, once all of them are finished.

    They are held against each other, every byte against its checksum, and published as one output.

    \b
    Example:
      lox-stream finish llama-lox
    """
    from lox_stream.cli_finish import put_together

    machine = Options(memory_bytes=given["memory"], threads=given["threads"])
    return put_together(out, base, aligned, machine, as_json=given["as_json"], quiet=given["quiet"])


@commands.command("push")
@click.argument("out", type=HERE, metavar="OUT")
@click.argument("name", metavar="ORG/NAME")
def _push(out: Path, name: str) -> int:
    """Upload a finished output, or an adapter, to the hub: a private model, in one commit.

    \b
    Example:
      lox-stream push llama-lox my-org/llama-lox
    """
    from lox_stream.cli_run import push_output

    return push_output(out, name)


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
@click.argument("out", type=HERE, metavar="OUT")
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
    from lox_stream.hub import local

    inputs = (local(base, shown=True), local(aligned, shown=True)) if base is not None and aligned is not None else None
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
    Nothing is written but the files that are asked for. Some solvers need packages of the extra [bench], and say so.

    \b
    Examples:
      lox-stream bench --base llama-base --aligned llama-instruct
      lox-stream bench --base llama-base --aligned llama-instruct --tensors '*q_proj*' --rank 6,16 --plot
    """
    from lox_stream.cli_bench import Request, carry_out, numbers
    from lox_stream.hub import local

    for name, value, least in (("--per-shape", given["per_shape"], 1), ("--repeat", given["repeat"], 1)):
        if value < least:
            raise OptionError(f"{name} is {value}, expected {least} or more")
    if not 0 <= given["seed"] < 1 << 32:
        raise OptionError(f"--seed is {given['seed']}, expected 0 to {(1 << 32) - 1}, which every solver takes")
    if not given["limit"] > 0:
        raise OptionError(f"--limit is {given['limit']}, expected more than 0 seconds")
    request = Request(
        base=local(base, shown=True),
        aligned=local(aligned, shown=True),
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


@commands.command("analyze")
@with_options(
    side("--base", "The model before alignment: a folder or a file, or its name on the hub."),
    side("--aligned", "The model after alignment, or its LoRA adapter: in the same places."),
    option(
        FILES,
        "--finetuned",
        type=FOLDER,
        metavar="DIR",
        help="A model fine-tuned from aligned, or its LoRA adapter: what it left of the leading subspace.",
    ),
    option(FILES, "--out", type=FOLDER, metavar="DIR", help="Also write analysis.json and analysis.csv there."),
    option(FILES, "--report", type=FOLDER, metavar="FILE", help="Also write a page to look at: one .html file."),
    option(FILES, "--figures", type=FOLDER, metavar="DIR", help="Also draw figures for a paper, as PNG and SVG."),
    option(
        FILES,
        "--ladder",
        metavar="DIR-{k}",
        help="Also write base + rank-k part of the difference, for each k: which is as safe as aligned?",
    ),
    option(FILES, "--rungs", default="0,1,2,3,4,6,8", metavar="K,...", show_default=True, help="Ranks of --ladder."),
    DTYPE,
    RANK,
    option(
        METHOD, "--alpha", default=f"{DEFAULTS.alpha:g}", metavar="A", show_default=True, help="Extrapolation factor."
    ),
    option(
        METHOD, "--values", default=32, metavar="N", show_default=True, help="Leading singular values of each matrix."
    ),
    option(
        METHOD,
        "--ranks",
        default="1,3,6,12",
        metavar="K,...",
        show_default=True,
        help="Of the updates whose rounding is measured, with --rank.",
    ),
    option(
        METHOD,
        "--alphas",
        default="0.25,0.5,1,1.25,2",
        metavar="A,...",
        show_default=True,
        help="Of the same, with --alpha.",
    ),
    option(
        METHOD,
        "--reference",
        is_flag=True,
        help="Also R_align as the paper's code has it: rank 100, bfloat16. Always with --finetuned.",
    ),
    option(METHOD, "--seed", default=DEFAULTS.seed, metavar="N", show_default=True, help="Of stochastic rounding."),
    RECIPE,
    GLOBS,
    SPLIT_FUSED,
    ON_NONFINITE,
    MISMATCHES,
    HOST,
    TELLING,
)
@click.pass_context
def _analyze(
    ctx: click.Context,
    /,
    base: Path,
    aligned: Path,
    finetuned: Path | None,
    out: Path | None,
    report: Path | None,
    figures: Path | None,
    ladder: str | None,
    rungs: str,
    ranks: str,
    alphas: str,
    **given: Any,
) -> int:
    """Show what the difference of the two models is made of, and what that means for rank, alpha and rounding.

    Of each matrix: leading singular values, energy, what stands out of noise, and what rounding leaves of the update;
    with --finetuned how much of the leading subspace a fine-tuning left. Streamed, in bounded memory.

    \b
    Examples:
      lox-stream analyze --base llama-base --aligned llama-instruct
      lox-stream analyze --base llama-base --aligned llama-instruct --finetuned llama-gsm8k --out analysis
    """
    from lox_stream.cli_analyze import Request, carry_out
    from lox_stream.cli_bench import numbers

    if ladder is None and _typed(ctx, "rungs"):
        raise OptionError("--rungs is given, expected --ladder too: they are its ranks")
    values, reference = given.pop("values"), given.pop("reference")
    flags, options, factors = _understood(ctx, given)
    if len(factors) > 1:
        raise OptionError(
            f"--alpha {','.join(f'{one:g}' for one in factors)}: expected one factor; the others go to --alphas"
        )
    request = Request(
        base,
        aligned,
        finetuned,
        out,
        report,
        figures,
        ladder,
        numbers(rungs, "--rungs", int, 0, 1 << 20),
        replace(options, alpha=factors[0]),
        values,
        numbers(ranks, "--ranks", int, 1, 256),
        alphas_of(alphas, "--alphas"),
        reference,
        flags["as_json"],
        flags["quiet"],
    )
    return carry_out(request)


@commands.command("landscape")
@with_options(
    side("--aligned", "The model after alignment: a folder or a file, or its name on the hub."),
    side("--lox", "What LoX made of it, in the same places: axis 1 leads there."),
    side("--finetuned", "The attacked model, fine-tuned from aligned or from LoX's: axis 2 leads there."),
    option(
        FILES,
        "--out",
        type=HERE,
        metavar="DIR",
        show_default="none: the axes are measured",
        help="Folder for the landscape, or the model of --point; new, empty, or to go on with.",
    ),
    option(
        FILES,
        "--picture",
        "pictures",
        type=HERE,
        multiple=True,
        metavar="FILE",
        help="Also draw it into a .png or .svg; repeatable.",
    ),
    option(
        METHOD,
        "--x",
        metavar="FROM:TO:N",
        show_default="-0.5:1.5:5",
        help="Places along LoX's direction, or numbers with commas: aligned is at 0, LoX's output at 1.",
    ),
    option(
        METHOD,
        "--y",
        metavar="FROM:TO:N",
        show_default="-0.5:1.5:5",
        help="Places across it: aligned and LoX's output are at 0, the fine-tuned model at 1.",
    ),
    option(METHOD, "--point", metavar="X,Y", help="Write just the model that lies there, to --out."),
    HOST,
    TELLING,
    click.argument("judge", nargs=-1, type=click.UNPROCESSED, metavar="[-- JUDGE...]"),
)
def _landscape(
    aligned: Path,
    lox: Path,
    finetuned: Path,
    out: Path | None,
    pictures: tuple[Path, ...],
    x: str | None,
    y: str | None,
    point: str | None,
    judge: tuple[str, ...],
    **given: Any,
) -> int:
    """Judge the models on a plane around the aligned one: along LoX's direction, and along that of an attack.

    Each model of the grid is written, JUDGE is run on it, and it is removed before the next one is made. JUDGE is a
    command of yours, run without a shell: {model} in its words is the model's folder, {x} and {y} the point. The last
    line of what it prints is a number, or a JSON object with one; landscape.json and landscape.csv in --out collect
    them. The same command goes on where it stopped; a grid may grow.

    \b
    Examples:
      lox-stream landscape --aligned llama-instruct --lox llama-lox --finetuned llama-attacked
      lox-stream landscape --aligned llama-instruct --lox llama-lox --finetuned llama-attacked --out landscape \\
        --x -0.5:1.5:5 --y 0:1:3 --picture landscape.png -- python3 asr.py {model}
      lox-stream landscape --aligned llama-instruct --lox llama-lox --finetuned llama-attacked --out half --point 0.5,1
    """
    from lox_stream.cli_landscape import Request, carry_out
    from lox_stream.grids import place_of, places_of

    request = Request(
        *(aligned, lox, finetuned, out),
        None if x is None else places_of(x, "--x"),
        None if y is None else places_of(y, "--y"),
        None if point is None else place_of(point),
        judge,
        pictures,
        Options(memory_bytes=given["memory"], threads=given["threads"]),
        given["as_json"],
        given["quiet"],
    )
    return carry_out(request)


@commands.command("report")
@click.argument("out", type=HERE, metavar="OUT")
@click.option(
    "--report", type=FOLDER, metavar="FILE", show_default="OUT-report.html, here", help="Where to write the page."
)
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def _report(out: Path, report: Path | None, quiet: bool) -> int:
    """Write one HTML file that shows what a finished run did, or what an analysis found.

    \b
    Examples:
      lox-stream report llama-lox
      lox-stream report analysis --report analysis.html
    """
    from lox_stream.cli_report import write_report

    return write_report(out, report, quiet=quiet)


@commands.command("doctor")
@click.argument("folder", type=FOLDER, metavar="[DIR]", default=".")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def _doctor(folder: Path, as_json: bool) -> int:
    """Look at this machine: versions, cores, memory, GPU, Triton, extras, and the disk of DIR (default: the current
    folder), where a file of 256 MiB is written and removed. What is missing is said with how to get it.

    \b
    Example:
      lox-stream doctor /data
    """
    from lox_stream.cli_doctor import examine

    return examine(folder, as_json=as_json)


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
