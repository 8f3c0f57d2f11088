"""`lox-stream run`: plan, carry out, show. A thin shell over `plan` and `execute`."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_stream.adapters import is_adapter
from lox_stream.errors import Cancelled, CheckpointError, LoxError, OptionError, reworded
from lox_stream.hub import hushed, is_hub_id, lies_elsewhere, local, planned_first, prepared, push
from lox_stream.messages import NOT_CONVERGED, echo_json, escaped, warn
from lox_stream.names import address_of, counted, listing, place_name, printable
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL
from lox_stream.planning import Plan, plan, plan_all, plan_summary
from lox_stream.predicting import Machine, parse_machine, predict
from lox_stream.reaching import Reached, as_given, named, reach, require_place
from lox_stream.scratch_disk import Scratch, scratch_at
from lox_stream.sharing import begun_in_parts, folder_of_part
from lox_stream.signals import Interruption
from lox_stream.spreading import plan_spread

if TYPE_CHECKING:
    from lox_stream.api import Summary


OF_ALIGNED = "is the folder of aligned"
PLACEHOLDER = "{alpha}"  # in the name of an output's folder


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed."""

    base: Path
    aligned: Path
    outputs: tuple[tuple[Path, Options], ...]  # folders, and what is to be written there
    resume: bool
    overwrite: bool
    repair: bool
    dry_run: bool
    assume: str
    as_json: bool
    quiet: bool
    scratch: Path | None
    scratch_size: int  # bytes; 0: as it says
    typed: tuple[str, ...]  # the command's arguments, `run` included
    merging: bool  # aligned is an adapter, and nothing else is
    ray: str = ""  # the address of a Ray cluster, "local" for one of this machine; "": without


def request_for(
    typed: tuple[str, ...],
    base: Path,
    aligned: Path,
    outputs: Sequence[tuple[Path, Options]],
    flags: Mapping[str, Any],
    *,
    merging: bool = False,
) -> Request:
    """What was typed, put together."""
    return Request(base, aligned, tuple(outputs), typed=typed, merging=merging, **flags)


def outputs_of(out: str, alphas: Sequence[float], factors: Path | None, options: Options) -> list[tuple[Path, Options]]:
    """The folders of a run with their options: one for each factor, and one for the update itself.

    All are solved as accurately as the largest factor asks. Raises OptionError.
    """
    if out == "":
        raise OptionError("--out is empty, expected a folder ('.' is the current folder)")
    if len(alphas) > 1 and PLACEHOLDER not in out:
        raise OptionError(
            f"--alpha names {len(alphas)} factors, and --out is {out!r}; expected a place for them in it, such as "
            f"--out 'out-{PLACEHOLDER}'"
        )
    largest = max(alphas, key=abs)
    if len(alphas) > 1:
        options = replace(options, solved_for=largest)
    outputs = [(Path(out.replace(PLACEHOLDER, f"{alpha:g}")), replace(options, alpha=alpha)) for alpha in alphas]
    if factors is not None:
        place = Path(str(factors).replace(PLACEHOLDER, f"{largest:g}"))
        outputs.append((place, replace(options, alpha=largest, form="peft", max_shard_size=0)))
    places = [folder.absolute() for folder, _ in outputs]
    for one, other in itertools.permutations(places, 2):
        if one.is_relative_to(other):
            where = "is asked for twice" if one == other else f"lies inside {printable(other)}, another output"
            raise OptionError(f"{printable(one)}: {where}; expected a folder of its own for each output")
    return outputs


def require_adapter(path: Path) -> None:
    """Raise CheckpointError for what holds no adapter."""
    if not is_adapter(path):
        raise CheckpointError(
            [
                f"adapter: {printable(path)}: holds no LoRA adapter, expected adapter_config.json and its weights, as "
                "PEFT or `lox-stream adapter` saves them. Check the path"
            ]
        )


def require_model(path: Path) -> None:
    """Raise CheckpointError for an adapter where a model is asked for."""
    if is_adapter(path):
        raise CheckpointError(
            [
                f"aligned: {printable(path)}: holds an adapter, expected the model that --adapter changes. Merge it "
                "into its own model first: lox-stream apply --adapter DIR --aligned MODEL --out DIR"
            ]
        )


def in_words_of_apply(error: LoxError) -> LoxError:
    """An error of a run on a base and an adapter, as who typed --aligned and --adapter understands it."""
    lines = [re.sub(r"^base: ", "aligned: ", line) for line in str(error).split("\n")]
    text = "\n".join(lines).replace("give that as aligned", "use that").replace("is the folder of base", OF_ALIGNED)
    return reworded(error, text)


def push_output(folder: Path, name: str) -> int:
    """Upload an output, and say where it is."""
    with Interruption(lambda: "stopped: the model on the hub is as it was. Go on with the same command"):
        click.echo(push(folder, name))
    return 0


def carry_out(request: Request, push_to: str | None = None) -> int:
    """Do what was asked and return the exit code; raises LoxError."""
    if push_to is not None and len(request.outputs) > 1:
        raise OptionError(
            "--push-to is given for several outputs, expected one. Push each with `lox-stream push OUT NAME`"
        )
    if request.assume and not request.dry_run:
        raise OptionError("--assume is what --dry-run predicts with, expected both. Add --dry-run, or leave it out")
    if request.repair and request.dry_run:
        raise OptionError(
            "--repair and --dry-run are both given, expected one: `lox-stream verify` says what is damaged"
        )
    _check_ray(request)
    machine = parse_machine(request.assume)
    _require_sensible_places(request, push_to)
    with Interruption(lambda: _stopped(request)) as interruption, ExitStack() as stack:
        if request.quiet and any(is_hub_id(path) for path in (request.base, request.aligned)):
            stack.enter_context(hushed())
        reached, scratch = _reached(request, stack)
        stack.enter_context(named(reached))
        request = replace(request, base=reached.base, aligned=reached.aligned)
        if request.merging:
            require_adapter(request.aligned)
            require_model(request.base)
        made = [as_given(one, reached) for one in _plans(request)]
        if not (request.dry_run or request.ray):  # of a cluster each node settles for itself
            from lox_stream.device import settled

            made = [settled(one) for one in made]
        if not request.quiet:
            warn(dict.fromkeys(warning for one in made for warning in one.warnings))
        if request.dry_run:
            _show_plans(request, made, machine)
            return 0
        if push_to is not None:
            prepared(push_to)  # before hours of work: an account, and the right to write
        try:
            summaries = _execute(request, made, interruption, scratch)
        except Cancelled:
            assert interruption.number is not None, "nobody else cancels"
            if scratch is not None:
                scratch.remove()
            interruption.leave(interruption.number)
    code = NOT_CONVERGED if any(summary.totals.not_converged for summary in summaries) else 0
    _show_summaries(request, made, summaries, code)
    if push_to is not None:
        _pushed(request, push_to, code)
    return code


def _pushed(request: Request, name: str, code: int) -> None:
    """Upload what was written, unless it is to be looked at first."""
    (folder, _), *_ = request.outputs
    again = f"lox-stream push {quoted(str(folder))} {quoted(name)}"
    if code:
        reason = "some tensor did not reach the tolerance"
        warn([f"not pushed to {printable(name)}: {reason}. To push it nevertheless: {again}"])
        return
    try:
        with hushed() if request.quiet else nullcontext():
            address = push(folder, name)
    except LoxError as error:
        text = f"{error}\nThe output itself is finished. Push it with: {again}"
        raise reworded(error, text) from error
    if not request.quiet:
        click.echo(f"pushed to {printable(address)}", err=True)


def _require_sensible_places(request: Request, push_to: str | None) -> None:
    """Raise OptionError for what an output in a bucket cannot be."""
    for out, one in request.outputs:
        require_place(out, one, repair=request.repair)
    addresses = [out for out, _ in request.outputs if address_of(out)]
    if not addresses:
        return
    if len({one.form for _, one in request.outputs}) > 1 or len(addresses) < len(request.outputs):
        raise OptionError(
            "--save-factors is given, and an address for --out or for itself; expected folders. Write the adapter by "
            "itself: lox-stream adapter"
        )
    if request.dry_run and request.resume:
        raise OptionError(
            "--dry-run and --resume are both given for an output in a bucket, expected one: what is left to do is told "
            "by the run"
        )
    if push_to is not None:
        raise OptionError("--push-to is given for an output in a bucket, expected one in a folder. Leave one out")


def _check_ray(request: Request) -> None:
    """Raise OptionError for what cannot be done on a cluster."""
    refused = {
        "--overwrite": (request.overwrite, "Remove the earlier output, or choose another --out"),
        "--repair": (request.repair, "Repair on one machine: the finished output, or a part with --part I/N"),
        "--dry-run with --resume": (request.dry_run and request.resume, "What is left to do is told by the run"),
    }
    elsewhere = [path for path in (request.base, request.aligned, request.outputs[0][0]) if address_of(path)]
    refused |= {
        "an address": (bool(elsewhere), "The nodes read and write folders that all of them see"),
        "--scratch": (request.scratch is not None, "The nodes read folders that all of them see"),
    }
    for option, (given, way_out) in refused.items():
        if request.ray and given:
            raise OptionError(f"--ray and {option} are both given, expected one. {way_out}")


def _plans(request: Request) -> list[Plan]:
    if address_of(request.outputs[0][0]):
        made = [plan(request.base, request.aligned, options=one, dry=request.dry_run) for _, one in request.outputs]
        return [replace(one, out=out) for one, (out, _) in zip(made, request.outputs, strict=True)]
    if request.ray:
        return plan_spread(request.base, request.aligned, request.outputs, resume=request.resume, dry=request.dry_run)
    return plan_all(
        request.base,
        request.aligned,
        request.outputs,
        resume=request.resume,
        overwrite=request.overwrite,
        repair=request.repair,
        dry=request.dry_run,
    )


def _reached(request: Request, stack: ExitStack) -> tuple[Reached, Scratch | None]:
    """The inputs as folders of this machine, and the scratch that their weights pass through if there is one."""
    addresses = [path for path in (request.base, request.aligned, request.outputs[0][0]) if address_of(path)]
    if request.scratch is not None or addresses:
        scratch = stack.enter_context(scratch_at(request.scratch, request.scratch_size))
        dry = request.dry_run and not request.resume
        return reach(request.base, request.aligned, scratch, dry=dry), scratch
    if lies_elsewhere(request.base) or lies_elsewhere(request.aligned):
        return _by_cache(request, stack), None
    return Reached(request.base, request.aligned, ("", "")), None


def _by_cache(request: Request, stack: ExitStack) -> Reached:
    """Models on the hub: their headers for a dry run, else their downloads.

    Before anything large is downloaded the plan has been made of headers, and what is wrong is raised.
    """
    given = tuple(str(path) if is_hub_id(path) else "" for path in (request.base, request.aligned))
    if request.dry_run and request.resume:
        raise OptionError(
            "--dry-run and --resume are both given for a model on the hub, expected one: what is left to do is told by "
            "its weights, which a dry run does not read"
        )
    headers = stack.enter_context(planned_first(request.base, request.aligned))
    if headers is not None:
        seen = Reached(headers[0], headers[1], (given[0], given[1]))
        if request.dry_run:
            return seen
        with named(seen):
            _plans(replace(request, base=seen.base, aligned=seen.aligned))
    if not request.quiet:
        names = [str(path) for path in (request.base, request.aligned) if is_hub_id(path)]
        fetching = (
            f"fetching {' and '.join(names)} from the hub, as far as the cache lacks it, and checking what is new"
        )
        click.echo(escaped(fetching), err=True)
    base, aligned = (local(path, shown=not request.quiet) for path in (request.base, request.aligned))
    return Reached(base, aligned, ("", ""))


def _still_to_do(request: Request, made: Plan) -> Plan:
    """The plan without what an unfinished run has finished, for --resume; ResumeError if that run is another."""
    from lox_stream.resuming import resumable

    state = resumable(made)[0] if request.resume else None
    finished = state.finished if state is not None else {}
    return replace(made, steps=tuple(step for step in made.steps if step.name not in finished))


def _show_plans(request: Request, made: Sequence[Plan], machine: Machine) -> None:
    predictions = [predict(_still_to_do(request, one), machine) for one in made]
    if request.as_json:
        documents = [
            plan_summary(one) | {"prediction": prediction.record()}
            for one, prediction in zip(made, predictions, strict=True)
        ]
        echo_json(documents[0] if len(documents) == 1 else {"outputs": documents})
    elif not request.quiet:
        from lox_stream.rendering import console_of, plan_tables, prediction_table

        console = console_of()
        for one, prediction in zip(made, predictions, strict=True):
            for table in [*plan_tables(one), prediction_table(prediction)]:
                console.print(table)
        console.print("Nothing was written (--dry-run).")


def _execute(
    request: Request, made: Sequence[Plan], interruption: Interruption, scratch: Scratch | None
) -> list[Summary]:
    from lox_stream.api import execute_all
    from lox_stream.rendering import console_of
    from lox_stream.showing import display

    label = "repairing" if request.repair else "extrapolating"
    with display(console_of(stderr=True), label, quiet=request.quiet) as show, interruption.gently():
        if scratch is not None and address_of(request.outputs[0][0]):
            from lox_stream.shipping import ship

            places = [out for out, _ in request.outputs]
            ways = {"resume": request.resume, "overwrite": request.overwrite}
            return ship(made, places, scratch, **ways, progress=show, cancel=interruption.cancel)
        if request.ray:
            from lox_stream.on_ray import execute_on_ray

            with redirect_stdout(sys.stderr):  # where Ray tells of a node that died
                return execute_on_ray(
                    made, request.ray, resume=request.resume, progress=show, cancel=interruption.cancel
                )
        return execute_all(
            made,
            resume=request.resume,
            overwrite=request.overwrite,
            repair=request.repair,
            progress=show,
            cancel=interruption.cancel,
            source=scratch,
        )


def _show_summaries(request: Request, made: Sequence[Plan], summaries: Sequence[Summary], code: int) -> None:
    if request.as_json:
        documents = [summary_document(summary, code) for summary in summaries]
        echo_json(documents[0] if len(documents) == 1 else {"outputs": documents, "exit_code": code})
    elif not request.quiet:
        _print_summaries(made, summaries)
    if not request.quiet:
        known = {warning for one in made for warning in one.warnings}
        warn(dict.fromkeys(w for summary in summaries for w in summary.warnings if w not in known))


def _print_summaries(made: Sequence[Plan], summaries: Sequence[Summary]) -> None:
    repaired = [summary for summary in summaries if summary.repaired is not None]
    for summary in repaired:
        click.echo(escaped(repaired_text(summary)))
    if repaired:
        return
    from lox_stream.rendering import adapter_summary, console_of, outputs_table, summary_table

    if len(made) > 1:
        console_of().print(outputs_table(made, summaries))
    elif made[0].options.form != "weights":
        console_of().print(adapter_summary(made[0], summaries[0]))
    else:
        console_of().print(summary_table(summaries[0]))


def repaired_text(summary: Summary) -> str:
    """`repaired 1 of 291 tensors: NAME in FILE`, and what else was written again."""
    damaged = summary.repaired or ()
    if not damaged:
        ending = "; the run is finished" if summary.written_bytes else ""
        return f"nothing to repair: every byte of {summary.out} is as it was written{ending}"
    tensors = [f"{damage.name} in {damage.file}" for damage in damaged if damage.name != damage.file]
    others = [
        ("header of " if damage.file.endswith(".safetensors") else "") + damage.file
        for damage in damaged
        if damage.name == damage.file
    ]
    lines = [f"repaired {len(tensors)} of {counted(summary.totals.tensors, 'tensor')}"]
    lines[0] += f": {listing(tensors)}" if tensors else ""
    if others:
        lines.append(f"written again: {listing(others)}")
    return "\n".join(lines)


def summary_document(summary: Summary, code: int) -> dict[str, Any]:
    """A summary as JSON-able data, with its rate and the exit code."""
    moved = summary.read_bytes + summary.written_bytes
    rate = moved / summary.elapsed_s if summary.elapsed_s > 0 else None
    rest = {"out": place_name(summary.out), "read_and_written_bytes_per_s": rate, "exit_code": code}
    return asdict(summary) | rest


def _stopped(request: Request) -> str:
    """What a stopped run leaves, and the command that goes on."""
    command = going_on(request.typed)
    places = [folder_of_part(folder, one.part) for folder, one in request.outputs]
    begun = [
        place_name(place) for place in places if (place / JOURNAL).exists() or (request.ray and begun_in_parts(place))
    ]
    away = [place_name(place) for place in places if address_of(place)]
    if away:
        return f"stopped: {listing(away)} keeps what was uploaded, if anything. Go on with:\n  {command}"
    if not begun:
        return "stopped: nothing was written"
    verb = "keeps" if len(begun) == 1 else "keep"
    return f"stopped: {listing(begun)} {verb} what is finished and synced. Go on with:\n  {command}"


def going_on(typed: Sequence[str]) -> str:
    """The command as it was typed, with --resume and without --overwrite, to be pasted into a shell."""
    kept = [word for word in typed if word not in ("--overwrite", "--resume")]
    return " ".join(map(quoted, [*program(), *kept, "--resume"]))


def quoted(word: str) -> str:
    """A word as a shell takes it; what a terminal would obey, or no text at all, as $'...' with hexadecimal bytes."""
    if word.isprintable():
        return shlex.quote(word)
    safe = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return "$'" + "".join(safe) + "'"


def program() -> list[str]:
    """How this program was called: `lox-stream`, a path to it, or `python -m lox_stream`."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    found = shutil.which("lox-stream")
    return (
        ["lox-stream"]
        if found is not None and Path(called).name == "lox-stream" and Path(called) == Path(found)
        else [called]
    )
