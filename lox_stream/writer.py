"""Writing the output folder: bytes to their places in any order, made durable, and published all at once.

The output mirrors the aligned checkpoint, so each tensor's place is known from the start. Until `publish` the
weights are called NAME.partial and the journal says which tensors are finished; after it there is no journal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lox_stream import files
from lox_stream.checkpoint import Shard, companion_path, index_names
from lox_stream.committer import Committer
from lox_stream.errors import Cancelled, InUseError, OutputError, ResumeError
from lox_stream.facts import Documents, TensorFacts
from lox_stream.files import GO_ON
from lox_stream.journal import Journal, Replay, identity, replay, session
from lox_stream.layout import is_index
from lox_stream.matching import whole_pairs
from lox_stream.names import listing, printable
from lox_stream.output_rules import JOURNAL, MANIFEST, PARTIAL, foreign_weights, superseded
from lox_stream.placing import Place
from lox_stream.planning import Plan, output_names
from lox_stream.resuming import Survey, changed_inputs, resumable, written_file
from lox_stream.shards import written_bytes, written_start

AGAIN = "Choose another --out, or run the same command again."


class Output:
    """The folder that a run writes, from the lock to the publication: a context manager.

    `finished` holds the facts of the tensors that are done (on resume also of earlier sessions), `sessions` who
    worked on it, `inputs` what they read, `warnings` what a person should know. Left without `publish` it keeps its
    .partial files and its journal, for --resume. Raises OutputError: the folder is in use, full or not writable;
    ResumeError: its state is of another run.

    With `look`, which is called when the folder is locked, the run repairs: it goes on from the `survey` that `look`
    returns, and touches nothing where that is complete and names no damage. What is finished is durable after
    `batch_s` and a sync (see `Committer`).
    """

    def __init__(
        self,
        plan: Plan,
        *,
        resume: bool = False,
        overwrite: bool = False,
        look: Callable[[], Survey] | None = None,
        batch_s: float | None = None,
    ) -> None:
        assert plan.out is not None, "a plan without a folder cannot be written"
        assert not (resume and overwrite), "planning refuses these two together"
        self.plan, self.folder, self._resume, self._overwrite = plan, plan.out, resume, overwrite
        self._look, self._batch_s = look, batch_s
        self.survey: Survey | None = None
        self.finished: dict[str, TensorFacts] = {}
        self.sessions: tuple[dict[str, Any], ...] = ()
        self.inputs: dict[str, Any] = {}
        self.warnings: list[str] = []
        self._renamed: set[str] = set()  # shards that an earlier session published
        self._fds: dict[str, int] = {}  # of the others
        self._shard_of = {tensor.name: shard for shard in plan.written.shards for tensor in shard.tensors}
        self._shard_names = [shard.name for shard in plan.written.shards]
        self._committer: Committer | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack, files.explained(self.folder, "prepare the output", AGAIN):
            self._lock(stack)
            before = self._before()
            foreign = foreign_weights(self.folder, self.plan.written)
            if foreign:
                raise OutputError("\n".join(foreign))
            if self.has_nothing_to_do:
                self.finished, self._stack = dict(before.finished), stack.pop_all()
                return self
            with contextlib.ExitStack() as undo:
                self._journal = self._begin(before, stack, undo)
                if self.survey is not None or len(before.finished) < len(self._shard_of):
                    self._retract()
                for shard in self.plan.written.shards:
                    self._reserve(shard, stack, undo)
                self._sync_names(self._shard_names)  # a record of a tensor outlives no name of its file
                undo.pop_all()
            self._committer = Committer(self._journal, lambda: not changed_inputs(self.plan), self._batch_s)
            self._stack = stack.pop_all()
        return self

    @property
    def has_nothing_to_do(self) -> bool:
        """Whether a repair found a finished output with no damage."""
        return self.survey is not None and self.survey.complete and not self.survey.damaged

    def _lock(self, stack: contextlib.ExitStack) -> None:
        files.make_folder(self.folder)
        try:
            fd, locked = files.lock_folder(self.folder)
        except BlockingIOError:
            raise InUseError(f"{self.folder}: {self._owner()}. Wait for it, or choose another --out") from None
        stack.callback(files.close, fd)
        if not locked:
            self.warnings.append(f"{self.folder}: this file system has no locks: let only one run write here")

    def _owner(self) -> str:
        with contextlib.suppress(OutputError):
            state = replay(self.folder)
            if state is not None and state.sessions:
                last = state.sessions[-1]
                at = printable(f"on {last['host']} since {last['time']}")
                return f"is being written by process {last['session']} {at}"
        return "is being written by another process"

    def _before(self) -> Replay:
        """What this run builds on: what is right when repairing, the journal when resuming, or nothing."""
        if self._look is not None:
            self.survey = self._look()
            self.warnings += self.survey.warnings
            self._renamed |= self.survey.whole
            return self.survey.state
        state, warned = resumable(self.plan) if self._resume else (None, [])
        new = identity(self.plan)
        if state is None:
            self._check_fresh()
            return Replay(new, (), {})
        self.warnings += warned
        kept, before = state.finished, None
        while kept != before:  # what is lost in one shard may belong to something in another
            before, self._renamed = kept, set()
            lost = [shard for shard in self.plan.written.shards if not self._kept(shard, before)]
            gone = {tensor.name for shard in lost for tensor in shard.tensors}
            kept = {name: facts for name, facts in before.items() if name in self._shard_of.keys() - gone}
            kept = whole_pairs(self.plan.steps, kept)
        return Replay(state.header | {"options": new["options"]}, state.sessions, kept)

    def _kept(self, shard: Shard, finished: Mapping[str, TensorFacts]) -> bool:
        path = written_file(self.folder, shard, finished)
        if path == self.folder / shard.name:
            self._renamed.add(shard.name)
        return path is not None

    def _check_fresh(self) -> None:
        """Refuse to begin over the files of another run, which may be newer than the plan."""
        if self._overwrite:
            return
        if self._resume and (self.folder / MANIFEST).exists():
            raise ResumeError(
                f"{self.folder}: is finished, there is nothing to resume; --repair mends it, --overwrite runs it again"
            )
        found = [name for name in output_names(self.plan) if (self.folder / name).exists()]
        if any(not name.endswith(PARTIAL) for name in found):
            raise OutputError(
                f"{self.folder}: already holds {listing(found)}. Choose another --out, go on with --resume where a run "
                "was interrupted, or replace what is there with --overwrite"
            )

    def _retract(self) -> None:
        """Withdraw what is to be replaced: no index and no manifest over weights that are half new.

        The journal is there already, so that a crash leaves a folder that is still known to be ours. What an earlier
        run wrote under other names goes after the indexes, and before the manifest, which names it.
        """
        earlier = superseded(self.folder, self.plan.written)
        indexes = [*reversed(index_names(self.plan.written)), *filter(is_index, earlier)]
        for names in (indexes, earlier, [MANIFEST]):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            self._sync_names(names)

    def _begin(self, before: Replay, stack: contextlib.ExitStack, undo: contextlib.ExitStack) -> Journal:
        self.finished, self.inputs = dict(before.finished), before.header["inputs"]
        self.sessions = (*before.sessions, session())
        if not (self._resume or self._overwrite):
            undo.callback(files.forget, self.folder / JOURNAL)
        journal = Journal(self.folder, Replay(before.header, self.sessions, before.finished))
        stack.callback(journal.close)
        return journal

    def _reserve(self, shard: Shard, stack: contextlib.ExitStack, undo: contextlib.ExitStack) -> None:
        """Claim the space of a shard and write its header, unless an earlier session renamed it already."""
        path = files.partial(self.folder / shard.name)
        if shard.name in self._renamed:
            return
        files.make_folder(path.parent)
        if self.survey is not None and not path.exists() and files.is_own(self.folder / shard.name):
            (self.folder / shard.name).replace(path)
            files.sync_folder(path.parent)
        if not path.exists():
            undo.callback(files.forget, path)
        with files.explained(path, f"reserve {written_bytes(shard):,} bytes", AGAIN):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(files.close, fd)
            files.reserve(fd, written_bytes(shard))
            files.write_at(fd, memoryview(shard.header), 0)
        self._fds[shard.name] = fd

    def place(self, name: str) -> Place:
        """Where the bytes of an unfinished tensor go."""
        shard, tensor = self._shard_of[name], self.plan.written.tensors[name]
        return Place(
            self._fds[shard.name],
            files.partial(self.folder / shard.name),
            written_start(tensor),
            tensor.n_bytes,
        )

    def done(self, facts: TensorFacts) -> None:
        """Hand in a tensor all of whose bytes were written. Raises OutputError if an earlier one was not synced."""
        assert self._committer is not None, "a folder with nothing to do has no places"
        self._committer.put(facts, self.place(facts.name))
        self.finished[facts.name] = facts

    def publish(self, documents: Documents) -> None:
        """Make the finished checkpoint appear: companions and card, weights, index, manifest, each synced in turn.

        A crash at any point leaves a state that --resume publishes again.
        """
        missing = self._shard_of.keys() - self.finished.keys()
        assert not missing, f"not finished: {sorted(missing)[:3]}"
        assert self._committer is not None, "a folder with nothing to do is published"
        self._committer.finish()
        self._committer.check()
        last = [*index_names(self.plan.written), MANIFEST]
        with files.explained(self.folder, "publish the result", GO_ON):
            for fd in self._fds.values():
                os.fsync(fd)
                files.drop_cache(fd)
            self._copy_companions(documents.copied)
            for name in [name for name in documents.written if name not in last]:
                files.replace_file(self.folder / name, documents.written[name])
            files.sync_folder(self.folder)
            self._rename_shards()
            for name in last:
                files.replace_file(self.folder / name, documents.written[name])
                files.sync_folder((self.folder / name).parent)
            self._journal.remove()
            files.sync_folder(self.folder)

    def _copy_companions(self, checksums: Mapping[str, str]) -> None:
        """Copy what travels with the weights; OutputError for a file that is no longer what the manifest says."""
        for name, checksum in checksums.items():
            source, target = companion_path(self.plan.aligned, Path(name)), self.folder / name
            files.make_folder(target.parent)
            if files.copy_file(source, target) != checksum:
                raise OutputError(f"{source}: was modified while the result was published. {GO_ON}")
            files.sync_folder(target.parent)

    def _rename_shards(self) -> None:
        for name in self._fds:
            files.partial(self.folder / name).replace(self.folder / name)
        self._sync_names(self._shard_names)

    def _sync_names(self, names: Iterable[str]) -> None:
        """Sync the folders of these files, and the output's own: a pipeline has several."""
        for folder in {(self.folder / name).parent for name in names} | {self.folder}:
            if folder.is_dir():
                files.sync_folder(folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._committer is None:
                return
            self._committer.finish(stopping=isinstance(error, Cancelled | KeyboardInterrupt | GeneratorExit))
            if error is None:
                self._committer.check()
