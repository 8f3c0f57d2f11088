"""What of an output is damaged, and the state from which a run makes just that again.

The survey trusts no file: every tensor that a manifest or a journal calls finished is held against its checksum there,
every header against the plan. What is right is what an interrupted run would have finished, so that a repair is a
resumed run, and a crash of it leaves one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lox_stream.errors import OutputError
from lox_stream.facts import TensorFacts
from lox_stream.files import is_own, partial
from lox_stream.journal import Replay, byte_options, identity, tensor_facts
from lox_stream.manifest import read_manifest
from lox_stream.matching import whole_pairs
from lox_stream.names import printable
from lox_stream.output_rules import MANIFEST, is_finished
from lox_stream.planning import Plan
from lox_stream.resuming import Damage, Survey, agreed, resumable
from lox_stream.sampling import options_of
from lox_stream.sealing import opened
from lox_stream.shards import Shard, is_regular, written_bytes, written_start
from lox_stream.verifying import Check, Span, check_files, check_shard

AGAIN = "Start again with --overwrite"
Seen = Callable[[Check], None]


def survey(plan: Plan, seen: Seen = lambda check: None) -> Survey:
    """Look through the output of `plan`, finished or not; reads every byte of it once and writes nothing.

    `seen` is called after each tensor and file; what it raises ends the survey. Raises ResumeError for the output of
    another run, OutputError for a manifest whose facts are lost.
    """
    assert plan.out is not None, "a plan that repairs has a folder"
    state, warnings = resumable(plan)
    complete = state is None
    damaged: list[Damage] = []
    if state is None:
        damaged += _seal(plan.out)
        found = read_manifest(plan.out)
        state = _state_of(plan, found)
        warnings = agreed(plan, state.header)
        damaged += _beside(plan.out, found, seen)
    known = {name: facts for name, facts in state.finished.items() if name in plan.written.tensors}
    right: dict[str, TensorFacts] = {}
    sound = []
    for shard in plan.written.shards:
        failed = _damage(plan.out, shard, known, seen)
        lost = {damage.name for damage in failed}
        damaged += failed
        right |= {info.name: known[info.name] for info in shard.tensors if info.name in known.keys() - lost}
        if not failed and not partial(plan.out / shard.name).exists() and all(t.name in known for t in shard.tensors):
            sound.append(shard)
    right = whole_pairs(plan.steps, right)
    whole = frozenset(shard.name for shard in sound if all(info.name in right for info in shard.tensors))
    sums = {damage.name: known[damage.name].checksum for damage in damaged if damage.name in known}
    now = Replay(identity(plan), state.sessions, right)
    return Survey(now, whole, tuple(damaged), sums, complete, tuple(warnings))


def finished_before(plan: Plan, own: Mapping[str, Any] | None = None) -> dict[str, TensorFacts] | None:
    """The facts of an output that an earlier session of the same run finished; None where there is none.

    What lies there is not read. `own` is the identity of `plan`, where it is known already. Raises ResumeError for the
    output of another run, OutputError for a manifest that was changed.
    """
    assert plan.out is not None, "a plan that writes has a folder"
    if not is_finished(plan.out):
        return None
    _seal(plan.out)
    state = _state_of(plan, read_manifest(plan.out))
    agreed(plan, state.header, own)
    return dict(state.finished)


def require_sealed(folder: Path) -> None:
    """Raise OutputError for a manifest that was changed, of which nobody knows what is true."""
    _seal(folder)


def _damage(folder: Path, shard: Shard, known: Mapping[str, TensorFacts], seen: Seen) -> list[Damage]:
    """Each finished tensor of a shard that is not what was written, and the shard itself if its header or size is."""
    finished = [info for info in shard.tensors if info.name in known]
    path = folder / shard.name
    name = shard.name + ".partial" if partial(path).exists() else shard.name
    if shard.tensors and not finished:
        return []
    lost = [Damage(info.name, shard.name) for info in finished] or [Damage(shard.name, shard.name)]
    if not (folder / name).exists() or not is_regular(folder / name):
        return lost
    spans = [Span(info.name, written_start(info), info.n_bytes, known[info.name].checksum) for info in finished]
    failed, right = [], set()
    for check in check_shard(folder, name, written_bytes(shard), len(shard.header), shard.header_hash, spans):
        seen(check)
        if check.ok and check.part == "tensor":
            right.add(check.name)
        elif not check.ok:
            failed.append(Damage(check.name if check.part == "tensor" else shard.name, shard.name))
    failed += [Damage(info.name, shard.name) for info in finished if info.name not in right]  # a disk that cannot read
    return lost if failed and not is_own(folder / name) else list(dict.fromkeys(failed))


def _seal(folder: Path) -> list[Damage]:
    """The manifest itself, where a bit of it was put right.

    Raises OutputError where it was changed, so that nobody knows what of it is true.
    """
    path = folder / MANIFEST
    if not path.exists() or not is_regular(path):
        return []  # whoever reads it says so
    state = opened(path.read_bytes()).state
    if state == "broken":
        raise OutputError(
            f"{folder / MANIFEST}: was changed or damaged beyond one bit, and with it the checksums of the weights: "
            f"nothing can be told from them. Restore it from a copy. {AGAIN}, which computes everything"
        )
    return [Damage(MANIFEST, MANIFEST)] if state == "mended" else []


def _beside(folder: Path, found: Mapping[str, Any], seen: Seen) -> list[Damage]:
    """The damaged files beside the weights."""
    failed = []
    for check in check_files(folder, found.get("files")):
        seen(check)
        if not check.ok:
            failed.append(Damage(check.name, check.name))
    return failed


def _state_of(plan: Plan, found: Mapping[str, Any]) -> Replay:
    """What the journal of a finished run would say, out of its manifest."""
    assert plan.out is not None, "a plan that repairs has a folder"
    try:
        began = {
            "versions": {name: found["versions"][name] for name in ("lox-stream", "torch")},
            "options": byte_options(options_of(plan.out, found["options"])),
            "inputs": {side: _inputs(found["inputs"][side]["shards"]) for side in ("base", "aligned")},
        }
        times = found["times"]
        session = {"session": None, "host": "", "time": times["started"]}
        return Replay(began, (session,) * min(int(times["sessions"]), 1000), facts_of(found["tensors"]))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise OutputError(
            f"{plan.out / MANIFEST}: parts of the manifest mean nothing ({printable(str(error))}). {AGAIN}"
        ) from error


def _inputs(shards: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = {"size": "size", "header": "header_xxh3_128", "sample": "sample_xxh3_64"}
    return {name: {key: row[said] for key, said in keys.items() if said in row} for name, row in shards.items()}


def facts_of(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorFacts]:
    """The facts of every tensor of a manifest; raises LookupError, TypeError or AttributeError for other things."""
    return {name: tensor_facts({**row, "name": name, "checksum": row["xxh3_128"]}) for name, row in tensors.items()}
