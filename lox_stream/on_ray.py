"""One run on the nodes of a Ray cluster: each file of the output is a part and a task, wherever a node is free.

    driver: plan --parts--> nodes: carry_out, each with its folder, journal and lock --all of them--> a node: finish

All state lies in the shared output. A task whose node or process dies is begun again on another node and goes on from
the part's journal, which follows the work closely, so that what is lost are the tensors that were in work. The plan is
made once, by the driver, and every node carries out that one.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.api import Progress, Summary, execute_all
from lox_stream.device import settled
from lox_stream.errors import Cancelled, DeviceError, InUseError, LoxError, OptionError
from lox_stream.finishing import finish
from lox_stream.installed import way_to
from lox_stream.options import Options, is_gpu, thread_count
from lox_stream.output_rules import is_finished
from lox_stream.planning import Plan
from lox_stream.sharing import folder_of_part
from lox_stream.spreading import Reach, part_of, parts_of, reached, require_seen

LOCAL = "local"  # a cluster of this machine alone, for this run
MISSING = "ray is not installed; expected it for --ray. Install it, which is the extra [ray]: " + way_to("ray")
RETRIES = 16  # times that a part's node or process may die
PATIENCE_S = 120.0  # for the lock of a process that was killed: servers of NFS keep one for 90 s
TELL_EVERY_S, POLL_S = 0.5, 0.2
REACHED_S = 10.0
BATCH_S = 0.0  # what finishes while the last tensors are synced is synced next: a node that dies had no more in hand
LAST_S = 0.8  # for tasks that are stopped, within the patience of `signals`
OBJECT_BYTES = 256 << 20  # of shared memory for objects of Ray, which are plans here


def execute_on_ray(
    wholes: Sequence[Plan],
    address: str = LOCAL,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> list[Summary]:
    """Carry out the plans of `plan_spread` on a Ray cluster, and put their parts together; as `execute_all` otherwise.

    `address` is "local", "auto", HOST:PORT or ray://HOST:PORT; a program that is connected already stays so. A part
    takes `threads` CPUs of its node, all of the largest one by default, and `memory_bytes`.

    Raises LoxError: what a part raises, once and as it is; a cluster that cannot be reached; a node that does not see
    the inputs or the output; a part whose processes die again and again.
    """
    started = time.monotonic()
    stop = cancel or threading.Event()
    with connected(address) as ray:
        tasks = _Tasks(ray, wholes[0].options, stop)
        with closing(tasks):
            ways = [replace(whole, options=replace(whole.options, threads=tasks.threads)) for whole in wholes]
            parts = parts_of(wholes)
            shared = ray.put(ways)
            before = tasks.result(tasks.submit(look, shared, parts)) if resume else {}
            todo = [part for part in parts if part not in before or not before[part].finished]
            for whole in ways:
                for part in todo:
                    assert whole.out is not None, "what is spread is written"
                    with files.explained(whole.out, "make the folder of a part", files.GO_ON):
                        files.make_folder(folder_of_part(whole.out, part))
            done = _carried_out(tasks, shared, todo, _Shown(ways, before, progress, started))
            return [_put_together(tasks, whole, done, number, started) for number, whole in enumerate(wholes)]


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The library, connected to a cluster; that of this machine alone ends with the context. Raises LoxError."""
    ray = _library()
    if ray.is_initialized():
        yield ray
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own = {"num_cpus": thread_count(Options()), "include_dashboard": False, "object_store_memory": OBJECT_BYTES}
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)  # which Ray takes for itself
    try:
        _require_there(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own if address == LOCAL else {}))
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise LoxError(
            f"--ray {address}: no Ray cluster can be reached there: {error}\n"
            "Expected auto, HOST:PORT or ray://HOST:PORT. Start one with `ray start --head`, or leave the address out"
        ) from error
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_there(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACHED_S).close()


def _library() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise LoxError(MISSING) from error
    return ray


class _Tasks:
    """The tasks of one run: functions of this module, on nodes that have what the options ask for."""

    def __init__(self, ray: Any, options: Options, stop: threading.Event) -> None:
        self.ray, self._stop = ray, stop
        self._gpus = _gpus(options.device)
        self.threads = _threads([node["Resources"] for node in ray.nodes() if node["Alive"]], options, self._gpus)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self.board = ray.remote(Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        self._running: list[Any] = []

    def submit(self, function: Callable[..., Any], *given: Any, threads: int = 1) -> Any:
        """A reference to what `function(*given)` will return."""
        task = self.ray.remote(outcome).options(
            num_cpus=threads, num_gpus=self._gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        self._running.append(task.remote(function, PATIENCE_S, *given))
        return self._running[-1]

    def finished(self, waiting: Sequence[Any]) -> list[Any]:
        """Those that are done by now, after a moment. Raises Cancelled."""
        if self._stop.is_set():
            raise Cancelled("stopped on request")
        ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
        return list(ready)

    def result(self, task: Any) -> Any:
        """What a task returns, waited for; raises what it raised, Cancelled, and LoxError where its processes die."""
        while not self.finished([task]):
            pass
        self._running.remove(task)
        try:
            found = self.ray.get(task)
        except self.ray.exceptions.RayTaskError:  # an error of ours that is no LoxError: a bug, or no memory
            raise
        except self.ray.exceptions.RayError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LoxError(
                f"a part of the run was given up after {RETRIES} tries, as its processes or nodes died: {reason}\n"
                "Look at the logs of Ray and the memory of the nodes. What is finished is kept: go on with --resume"
            ) from error
        if isinstance(found, LoxError):
            raise found
        return found

    def told(self) -> Mapping[str, Progress]:
        """How far the parts say they are; nothing while the board is not there."""
        try:
            return dict(self.ray.get(self.board.told.remote(), timeout=POLL_S))
        except self.ray.exceptions.RayError:
            return {}

    def close(self) -> None:
        """Stop what is running: between two tiles, or the end of the connection kills it."""
        for task in self._running:
            self.ray.cancel(task)
        if self._running:
            self.ray.wait(self._running, num_returns=len(self._running), timeout=LAST_S)
        self.ray.kill(self.board)


def _gpus(device: str) -> int:
    """GPUs of a part. Which of a node's, Ray says."""
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device is {device}, and with --ray expected cuda: Ray gives each part a GPU of its own")
    return int(is_gpu(device))


def _threads(nodes: Sequence[Mapping[str, float]], options: Options, gpus: int) -> int:
    """CPUs of a part: as asked, or those of the largest node, or of that for each of its GPUs."""
    usable = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    if not usable:
        raise DeviceError(f"--device {options.device}: no node of the Ray cluster has a CPU{' and a GPU' * gpus}")
    most = max(int(node["CPU"] // (node["GPU"] if gpus else 1)) or 1 for node in usable)
    largest = max(int(node["CPU"]) for node in usable)
    if options.threads > largest:
        raise OptionError(f"--threads is {options.threads}, and the largest node has {largest} CPUs; expected no more")
    return options.threads or most


class Board:
    """An actor: how far each part is. What it knew before it was moved is told again."""

    def __init__(self) -> None:
        self._told: dict[str, Progress] = {}

    def tell(self, part: str, reach: Progress) -> None:
        self._told[part] = reach

    def told(self) -> dict[str, Progress]:
        return self._told


def outcome(function: Callable[..., Any], patience_s: float, *given: Any) -> Any:
    """A task: what `function` returns, or the LoxError that it raises, which is nothing to try again.

    But a folder in use is, for so long: it may be that of a process that was killed and is not gone yet.
    """
    until_s = time.monotonic() + patience_s
    while True:
        try:
            return function(*given)
        except InUseError as error:
            if time.monotonic() > until_s:
                return error
            time.sleep(1.0)
        except LoxError as error:
            return error


def look(wholes: Sequence[Plan], parts: Sequence[str]) -> dict[str, Reach]:
    """What an earlier session has done, seen from a node: on one with a GPU, the plan is that of a GPU."""
    return reached([settled(whole) for whole in wholes], parts)


def carry_out(wholes: Sequence[Plan], part: str, board: Any) -> list[Summary | None]:
    """A part, of each output that is not finished, in the folders of the part; from its journal, if it was begun."""
    plans = [None if is_finished(_out(whole)) else part_of(whole, part) for whole in wholes]
    mine = [made for made in plans if made is not None]
    for made in mine:
        require_seen(made, socket.gethostname())
    done = iter(execute_all(mine, resume=True, progress=_Teller(board, part), batch_s=BATCH_S))
    return [None if made is None else next(done) for made in plans]


class _Teller:
    """Tells the board how far a part is, now and then."""

    def __init__(self, board: Any, part: str) -> None:
        self._board, self._part, self._due_s = board, part, 0.0

    def __call__(self, reach: Progress) -> None:
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + TELL_EVERY_S
            self._board.tell.remote(self._part, reach)


def finish_whole(out: Path, base: Path, aligned: Path, machine: Options) -> Summary:
    """Puts the parts of an output together, which were synced by whoever wrote them: nothing is read again."""
    return finish(out, base=base, aligned=aligned, machine=machine, trusting=True)


def _carried_out(tasks: _Tasks, shared: Any, todo: Sequence[str], shown: _Shown) -> list[list[Summary | None]]:
    """All parts that are to be done: what came of each."""
    waiting = {tasks.submit(carry_out, shared, part, tasks.board, threads=tasks.threads): part for part in todo}
    done = []
    while waiting:
        for task in tasks.finished([*waiting]):
            done.append(tasks.result(task))
            shown.ended(waiting.pop(task))
        shown(tasks.told())
    return done


def _put_together(
    tasks: _Tasks, whole: Plan, done: Sequence[Sequence[Summary | None]], number: int, started: float
) -> Summary:
    """One output out of its parts, with what they read and wrote."""
    task = tasks.submit(finish_whole, whole.out, whole.base.root, whole.aligned.root, whole.options)
    summary: Summary = tasks.result(task)
    parts = [row[number] for row in done]
    return replace(
        summary,
        elapsed_s=time.monotonic() - started,
        read_bytes=sum(part.read_bytes for part in parts if part is not None),
        written_bytes=sum(part.written_bytes for part in parts if part is not None),
    )


class _Shown:
    """The progress of all parts as that of one run."""

    def __init__(
        self,
        wholes: Sequence[Plan],
        before: Mapping[str, Reach],
        progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        self._wholes = [whole for whole in wholes if not is_finished(_out(whole))]
        self._progress, self._started = progress, started
        self._steps = [step.aligned.n_bytes for whole in self._wholes for step in whole.steps]
        self._before = {part: (reach.done_bytes, reach.done_tensors) for part, reach in before.items()}
        self._done = dict(self._before)

    def ended(self, part: str) -> None:
        steps = [step.aligned.n_bytes for whole in self._wholes for step in part_of(whole, part).steps]
        self._done[part] = (sum(steps), len(steps))

    def __call__(self, told: Mapping[str, Progress]) -> None:
        if self._progress is None:
            return
        now = {part: (reach.done_bytes, reach.done_tensors) for part, reach in told.items()}
        done = [max(now.get(part, (0, 0)), self._done.get(part, (0, 0))) for part in {*now, *self._done}]
        going = [reach for part, reach in told.items() if reach.done_tensors < reach.total_tensors]
        self._progress(
            Progress(
                done_bytes=sum(n_bytes for n_bytes, _ in done),
                total_bytes=sum(self._steps),
                resumed_bytes=sum(n_bytes for n_bytes, _ in self._before.values()),
                done_tensors=sum(tensors for _, tensors in done),
                total_tensors=len(self._steps),
                working=tuple(name for reach in going for name in reach.working),
                elapsed_s=time.monotonic() - self._started,
            )
        )


def _out(whole: Plan) -> Path:
    assert whole.out is not None, "what is spread is written"
    return whole.out
