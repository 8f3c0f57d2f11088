"""Outputs in a bucket: computed file by file in a scratch, each uploaded while the next one is computed.

There every file appears when it is whole, and index and manifest come last, so that nobody loads half a model. Until
then `lox_stream.journal` says what is run, and a record for each file that has arrived what is in it: a run that was
killed goes on with the next file, from any machine.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_stream.api import Progress, Summary, execute_all
from lox_stream.checkpoint import companion_path, index_names, whence
from lox_stream.device import settled
from lox_stream.documents import written_documents
from lox_stream.errors import CheckpointError, OutputError, ResumeError
from lox_stream.facts import TensorFacts
from lox_stream.journal import finite, identity, session
from lox_stream.layout import is_index
from lox_stream.manifest import read_manifest, totals
from lox_stream.matching import output_bytes
from lox_stream.names import address_of, listing
from lox_stream.objects import Place, place_at
from lox_stream.options import check_ways
from lox_stream.output_rules import JOURNAL, MANIFEST, output_names
from lox_stream.pipeline import jobs_for
from lox_stream.planning import Plan
from lox_stream.reader import read_bytes
from lox_stream.remarks import plan_warnings, run_warnings
from lox_stream.remote import RemoteFile
from lox_stream.repairing import facts_of
from lox_stream.resuming import agreed, changed_inputs
from lox_stream.scratch_disk import Scratch
from lox_stream.shards import parse_json, written_bytes
from lox_stream.sharing import most_parts, own_share

RECORDS = "lox_stream.parts/"


def ship(
    plans: Sequence[Plan],
    places: Sequence[str | Path],
    scratch: Scratch,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> list[Summary]:
    """Carry out plans of one pair that were made without `out`, and upload what they write to addresses.

    The arguments are as for `execute_all`; `scratch` holds the files in work, at most two of each output, and brings
    the inputs that lie elsewhere. Raises OutputError for a place that holds something else, and what `execute_all`
    raises.
    """
    started = time.monotonic()
    check_ways(resume=resume, overwrite=overwrite, repair=False)
    outputs = [
        _Output(settled(plan), address_of(place), scratch.root / "out" / str(number))
        for number, (plan, place) in enumerate(zip(plans, places, strict=True))
    ]
    order = outputs[0].order
    scratch.set_aside(sum(output.staged_bytes for output in outputs))
    for output in outputs:
        scratch.room_for([job for number in order for job in jobs_for(output.piece(number))])
    for output in outputs:
        output.look(resume=resume, overwrite=overwrite)
    for output in outputs:
        output.begin(overwrite=overwrite)
    report = _Reporter(outputs, progress, started)
    for number in order:
        for output in outputs:
            scratch.expect(jobs_for(output.piece(number)) if number not in output.arrived else [])
    with ThreadPoolExecutor(1, thread_name_prefix="lox-upload") as uploads:
        sent: Future[None] | None = None
        for number in order:
            todo = [output for output in outputs if number not in output.arrived]
            if not todo:
                continue
            pieces = [output.piece(number) for output in todo]
            execute_all(pieces, overwrite=True, progress=report, cancel=cancel, source=scratch)
            report.add(pieces)
            if sent is not None:
                sent.result()
            sent = uploads.submit(_upload, todo, number)
        if sent is not None:
            sent.result()
    return [output.publish(started, scratch.warnings) for output in outputs]


def _upload(outputs: Sequence[_Output], number: int) -> None:
    for output in outputs:
        output.upload(number)


class _Output:
    """One output in a bucket."""

    def __init__(self, plan: Plan, address: str, stage: Path) -> None:
        self.plan, self.address = replace(plan, out=Path(address)), address
        self.place: Place = place_at(address)
        self._stage = stage  # a folder for the pieces in work
        self.count = most_parts(plan.written, plan.steps) if plan.options.form == "weights" else 1
        self._pieces = {number: self._cut(number) for number in range(1, self.count + 1)}
        turns = {step.name: turn for turn, step in enumerate(plan.steps)}
        first = {n: min((turns[step.name] for step in piece.steps), default=0) for n, piece in self._pieces.items()}
        self.order = sorted(self._pieces, key=lambda number: first[number])
        largest = max(sum(map(written_bytes, piece.written.shards)) for piece in self._pieces.values())
        self.staged_bytes = min(2, self.count) * largest  # one in work while another is on its way
        self.arrived: dict[int, dict[str, Any]] = {}  # the manifests of the pieces that were uploaded
        self._before: set[int] = set()  # that an earlier session uploaded
        self._found: dict[str, RemoteFile] = {}
        self._header = identity(self.plan)
        self._sessions = [session()]
        self._warnings: list[str] = []

    def piece(self, number: int) -> Plan:
        """The plan of one of the files, or of some that belong together."""
        return self._pieces[number]

    def _cut(self, number: int) -> Plan:
        plan, stage = self.plan, self._stage / str(number)
        if self.count == 1:
            return replace(plan, out=stage)
        options = replace(plan.options, part=f"{number}/{self.count}")
        written, steps = own_share(plan.written, plan.steps, options.part)
        return replace(plan, written=written, steps=steps, options=options, out=stage)

    def look(self, *, resume: bool, overwrite: bool) -> None:
        """What is there already: refuse it, or find out where to go on. Raises OutputError, ResumeError."""
        for source in (whence(self.plan.base), whence(self.plan.aligned)):
            if f"{source}/".startswith(f"{self.address}/") or f"{self.address}/".startswith(f"{source}/"):
                raise OutputError(f"{self.address}: is where an input lies ({source}). Choose another --out")
        try:
            self._found = {file.name: file for file in self.place.files()}
        except CheckpointError as error:
            raise OutputError(str(error)) from error
        if resume and JOURNAL in self._found and MANIFEST not in self._found:
            self._go_on()
        elif resume and MANIFEST in self._found:
            self._clean_up()  # after which a run was killed, if there was one: the manifest is written last
            raise ResumeError(f"{self.address}: is finished, there is nothing to resume; --overwrite runs it again")
        elif self._found and not overwrite:
            ways = "go on with --resume where a run was interrupted, or replace what is there with --overwrite"
            raise OutputError(
                f"{self.address}: holds {listing(sorted(self._found))}, expected nothing. Choose another --out, {ways}"
            )
        elif resume:
            self._warnings.append(f"{self.address}: holds no unfinished run; --resume starts from the beginning")
        foreign = [name for name in self._found if name.endswith(".safetensors") and name not in self._ours()]
        if foreign:
            raise OutputError(
                f"{self.address}: holds weights of another model: {listing(foreign)}; expected none beside the "
                "output's. Choose another --out, or remove them"
            )

    def _ours(self) -> set[str]:
        """The names that this run, or the finished one that it replaces, writes there."""
        try:
            shards = self._json(MANIFEST).get("shards")
        except OutputError:
            shards = None  # damaged: who replaces the output need not know
        return {*output_names(self.plan.written), *(shards if isinstance(shards, dict) else ())}

    def _json(self, name: str) -> dict[str, Any]:
        """A file of ours there; {} where there is none. Raises OutputError."""
        file = self._found.get(name)
        if file is None:
            return {}
        try:
            said, _ = parse_json(bytes(file.read(0, file.size)))
        except (CheckpointError, ValueError) as error:
            raise OutputError(f"{file.address}: cannot be read: {error}. Begin again with --overwrite") from error
        if not isinstance(said, dict):
            raise OutputError(f"{file.address}: holds {type(said).__name__}, expected an object. Use --overwrite")
        return said

    def _go_on(self) -> None:
        said = self._json(JOURNAL)
        try:
            self._warnings += agreed(self.plan, said["run"])
            self._header, self._sessions = said["run"], [*said["sessions"], session()]
        except (LookupError, TypeError, AttributeError) as error:
            problem = f"is damaged ({error!r}). Begin again with --overwrite"
            raise ResumeError(f"{self.place.at(JOURNAL)}: {problem}") from error
        for number in self._pieces if self.count > 1 else ():
            record = self._json(f"{RECORDS}{number}.json")
            if record and self._is_there(record, self._pieces[number]):
                self.arrived[number] = record
        self._before = {*self.arrived}

    def _is_there(self, record: Mapping[str, Any], piece: Plan) -> bool:
        """Whether the files of a record are there, all of a piece."""
        sizes = {shard.name: written_bytes(shard) for shard in piece.written.shards}
        told = record.get("tensors")
        return (
            isinstance(told, dict)
            and {*told} == {*piece.written.tensors}
            and all(name in self._found and self._found[name].size == size for name, size in sizes.items())
        )

    def begin(self, *, overwrite: bool) -> None:
        """Withdraw what is to be replaced, index first; then say what is run."""
        fresh = overwrite or JOURNAL not in self._found
        if fresh:
            old = [name for name in self._found if name in self._ours() or name.startswith(RECORDS)]
            first = [*filter(is_index, old), MANIFEST, JOURNAL]
            self.place.delete([*first, *(name for name in old if name not in first)])
        said = {"run": self._header, "sessions": self._sessions}
        self.place.put(JOURNAL, json.dumps(finite(said)).encode(), new=fresh)

    def upload(self, number: int) -> None:
        """Send a piece, then its record; what lies in the scratch of it goes."""
        piece = self._pieces[number]
        assert piece.out is not None, "pieces are written"
        said = read_manifest(piece.out)
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, piece.out, ignore_errors=True)
            if self.count == 1:
                self._send_all(piece.out, said)
            else:
                for shard in piece.written.shards:
                    self.place.put(shard.name, piece.out / shard.name)
                self.place.put(f"{RECORDS}{number}.json", (piece.out / MANIFEST).read_bytes())
        self.arrived[number] = said

    def _send_all(self, folder: Path, said: Mapping[str, Any]) -> None:
        """An output that is one file of weights: that, and what stands beside it, the manifest last."""
        for name in self._in_order([*said["files"], *said["shards"], MANIFEST]):
            self.place.put(name, folder / name)

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """As they may appear: what says that the weights are there last."""
        last = [*index_names(self.plan.written), MANIFEST]
        return sorted(names, key=lambda name: last.index(name) if name in last else -1)

    def publish(self, started: float, told: Sequence[str]) -> Summary:
        """Send what stands beside the weights, index and manifest last, and take the journal away."""
        finished = {name: row for said in self.arrived.values() for name, row in facts_of(said["tensors"]).items()}
        warnings = (
            *(*self.plan.warnings, *self._warnings, *changed_inputs(self.plan), *plan_warnings(self.plan)),
            *run_warnings(finished.values(), self.plan.options),
            *told,
        )
        if self.count > 1:
            self._send_documents(finished, warnings, time.monotonic() - started)
        self._clean_up()
        steps = [step for n, piece in self._pieces.items() if n not in self._before for step in piece.steps]
        return Summary(
            out=Path(self.address),
            totals=totals(finished.values()),
            elapsed_s=time.monotonic() - started,
            read_bytes=read_bytes(steps),
            written_bytes=sum(map(output_bytes, steps)),
            warnings=warnings,
            left_out=self.plan.left_out,
        )

    def _clean_up(self) -> None:
        """The journal goes first: without it a finished output is one."""
        records = [f"{RECORDS}{number}.json" for number in self._pieces if self.count > 1]
        self.place.delete([JOURNAL, *records])

    def _send_documents(self, finished: Mapping[str, TensorFacts], warnings: Sequence[str], elapsed_s: float) -> None:
        documents = written_documents(
            self.plan,
            finished,
            elapsed_s=elapsed_s,
            sessions=self._sessions,
            warnings=warnings,
            began=self._header["inputs"],
        )
        for name in documents.copied:
            self.place.put(name, companion_path(self.plan.aligned, Path(name)))
        for name in self._in_order(documents.written):
            self.place.put(name, documents.written[name])


class _Reporter:
    """The progress of a piece as one of the whole."""

    def __init__(self, outputs: Sequence[_Output], progress: Callable[[Progress], None] | None, started: float) -> None:
        self._progress, self._started = progress, started
        steps = [step for output in outputs for step in output.plan.steps]
        done = [step for output in outputs for number in output.arrived for step in output.piece(number).steps]
        self._total_bytes, self._total_tensors = sum(step.aligned.n_bytes for step in steps), len(steps)
        self._resumed_bytes = self._done_bytes = sum(step.aligned.n_bytes for step in done)
        self._done_tensors = len(done)

    def add(self, pieces: Sequence[Plan]) -> None:
        """These are done."""
        steps = [step for piece in pieces for step in piece.steps]
        self._done_bytes += sum(step.aligned.n_bytes for step in steps)
        self._done_tensors += len(steps)

    def __call__(self, now: Progress) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    self._done_bytes + now.done_bytes,
                    self._total_bytes,
                    self._resumed_bytes,
                    self._done_tensors + now.done_tensors,
                    self._total_tensors,
                    now.working,
                    time.monotonic() - self._started,
                )
            )
