"""One run taken apart for the nodes of a cluster: a part for each file of the output, out of one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lox_stream.checkpoint import files_of
from lox_stream.errors import LoxError, OptionError, OutputError
from lox_stream.journal import identity
from lox_stream.names import listing, printable
from lox_stream.options import Options
from lox_stream.output_rules import is_finished
from lox_stream.planning import Plan, plan, plan_all
from lox_stream.repairing import finished_before
from lox_stream.resuming import resumable
from lox_stream.sharing import begun_in_parts, count_problems, folder_of_part, most_parts, own_share


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a part is, its outputs taken together. Bytes are of aligned's tensors, as in `Progress`."""

    done_bytes: int
    done_tensors: int
    finished: bool


def plan_spread(
    base: str | Path,
    aligned: str | Path,
    outputs: Sequence[tuple[str | Path, Options]],
    *,
    resume: bool = False,
    dry: bool = False,
) -> list[Plan]:
    """As `plan_all`, for outputs that the nodes of a cluster are to write in parts.

    On resume an output may be begun in parts, finished in all of them, or half put together. Raises OptionError for
    what cannot be spread, and what `plan` raises.
    """
    if any(options.form != "weights" for _, options in outputs):
        raise OptionError("--ray is given for an adapter, expected a model: an adapter is one file. Leave --ray out")
    if any(options.part for _, options in outputs):
        raise OptionError("--ray and --part are both given, expected one: --ray makes parts of its own")
    if not (resume and any(begun_in_parts(Path(out)) for out, _ in outputs)):
        return plan_all(base, aligned, outputs, resume=resume, dry=dry)
    wholes = [_going_on(base, aligned, Path(out), options) for out, options in outputs]
    count = len(parts_of(wholes))
    problems = [problem for out, _ in outputs for problem in count_problems(Path(out), count, f"--ray makes {count}")]
    if problems:
        raise OutputError("\n".join(problems))
    return wholes


def _going_on(base: str | Path, aligned: str | Path, out: Path, options: Options) -> Plan:
    """The plan of an output which may be begun; what lies in its parts is looked at by whoever carries them out."""
    if not (begun_in_parts(out) or is_finished(out)):
        return plan(base, aligned, out, options=options, resume=True)
    return replace(plan(base, aligned, options=options), out=out.absolute())


def parts_of(wholes: Sequence[Plan]) -> list[str]:
    """The parts of a run, as --part names them: as many as there are files that can be written alone."""
    count = min(most_parts(whole.written, whole.steps) for whole in wholes)
    return [f"{number}/{count}" for number in range(1, count + 1)]


def part_of(whole: Plan, part: str) -> Plan:
    """What `plan` gives for the option `part`, out of the plan of the whole."""
    assert whole.out is not None, "what is spread is written"
    written, steps = own_share(whole.written, whole.steps, part)
    options = replace(whole.options, part=part)
    return replace(whole, out=folder_of_part(whole.out, part), options=options, written=written, steps=steps)


def reached(wholes: Sequence[Plan], parts: Sequence[str]) -> dict[str, Reach]:
    """How far each part is that an earlier session began; raises ResumeError for one of another run."""
    own = [identity(whole) for whole in wholes]
    for whole, now in zip(wholes, own, strict=True):
        if is_finished(_out(whole)):
            finished_before(whole, now)
    pending = [(whole, now) for whole, now in zip(wholes, own, strict=True) if not is_finished(_out(whole))]
    found = {}
    for part in parts:
        begun = [one for one in pending if folder_of_part(_out(one[0]), part).is_dir()]
        if begun or not pending:
            each = [_reach(part_of(whole, part), now) for whole, now in begun]
            finished = len(begun) == len(pending) and all(one.finished for one in each)
            found[part] = Reach(sum(one.done_bytes for one in each), sum(one.done_tensors for one in each), finished)
    return found


def _reach(made: Plan, whole: Mapping[str, Any]) -> Reach:
    """Of one part, by its journal or manifest; `whole` is the identity of the run."""
    own = {**whole, "options": whole["options"] | {"part": made.options.part}}
    facts = finished_before(made, own)
    finished = facts is not None
    if facts is None:
        state, _ = resumable(made, own)
        facts = state.finished if state is not None else {}
    done = [step.aligned.n_bytes for step in made.steps if step.name in facts]
    return Reach(sum(done), len(done), finished)


def require_seen(made: Plan, node: str) -> None:
    """Raise LoxError where a node lacks the inputs, or the folder of its part, which was made beforehand."""
    files = [shard.path for side in (made.base, made.aligned) for shard in files_of(side)]
    unseen = [printable(path) for path in [_out(made), *files] if not path.exists()]
    if unseen:
        raise LoxError(
            f"node {printable(node)} does not see {listing(unseen)}; expected inputs and --out on paths that every "
            "node sees. Use a file system that all of them mount at one place, and go on with --resume"
        )


def _out(made: Plan) -> Path:
    assert made.out is not None, "what is spread is written"
    return made.out
