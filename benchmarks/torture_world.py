"""What all parts of the torture harness share: small pairs of several shapes, runs in forked children, and the laws.

torch is imported once and never used before a fork: a child costs milliseconds, where a new interpreter costs seconds.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torture_seam import Counter, Killer, Seam, changes

from lox_stream import Options, api, cli_run, committer, rendering  # noqa: F401  imported here, once for all children
from lox_stream.cli import commands
from lox_stream.output_rules import MANIFEST
from lox_stream.sealing import opened
from lox_stream.synthetic import llama_shapes, write_pair

HANGS_S = 120.0
VOLATILE = ("times", "seal", "warnings")  # of a manifest
Content = dict[str, bytes]
OLD = ("--alpha", "0.5")  # options of an output that is to be replaced


class Law(Exception):
    """A case broke a law; the text says which."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of checkpoint and of run."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    shards: int = 1
    kind: Literal["safetensors", "torch", "pipeline", "adapter"] = "safetensors"  # of aligned; a pipeline has it twice
    options: Mapping[str, str | int] = field(default_factory=dict)


MANY = {f"layers.{i}.{kind}.weight": (16, 16) if kind != "norm" else (16,) for i in range(24) for kind in ("q", "norm")}
SHAPES = (
    Shape("one file", llama_shapes(48, 96, 1, 160)),
    Shape("three shards", llama_shapes(48, 64, 2, 96), 3),
    Shape("many small tensors", MANY, 2),
    Shape("pytorch_model.bin", llama_shapes(48, 96, 1, 160), kind="torch"),
    Shape(
        "a pipeline in new files",
        llama_shapes(32, 48, 1, 64),
        kind="pipeline",
        options={"dtype": "float32", "max_shard_size": 20_000},
    ),
    Shape("a LoRA adapter", llama_shapes(48, 64, 1, 96), kind="adapter"),
    Shape("stochastic rounding", llama_shapes(48, 64, 1, 96), 2, options={"rounding": "stochastic", "seed": 7}),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; what it said on stdout and stderr."""

    code: int
    said: str


class World:
    """One shape's inputs and what its runs have to end in; made once, below `root`."""

    def __init__(self, root: Path, shape: Shape) -> None:
        self.shape, self.root = shape, root
        self.options = Options(threads=2, **shape.options)  # type: ignore[arg-type]
        self.base, self.aligned, self.inputs = root / "base", root / "aligned", Content()
        must(in_child(lambda: self._make(), root / "said"))
        self.inputs = content(self.base) | {f"aligned/{name}": data for name, data in content(self.aligned).items()}
        self.reference = self._finished("reference")
        self.old = self._finished("old", *OLD)
        self._make_half()
        self.weights = tuple(name for name in self.reference if name.endswith(".safetensors"))
        self.indexes = tuple(name for name in self.reference if name.endswith("index.json"))
        assert all(self.old[name] != self.reference[name] for name in self.weights), "an old output is another one"

    def _make(self) -> int:
        if self.shape.kind == "pipeline":
            self._make_pipeline()
        else:
            write_pair(self.root, self.shape.shapes, aligned_shards=self.shape.shards)
        if self.shape.kind in ("torch", "adapter"):
            tensors = load_file(self.aligned / "model.safetensors")
            (self.aligned / "model.safetensors").unlink()
            if self.shape.kind == "torch":
                torch.save(tensors, self.aligned / "pytorch_model.bin")
            else:
                self._make_adapter(tensors)
        home = self.base if self.shape.kind == "adapter" else self.aligned  # what travels with the weights
        (home / "code").mkdir()
        (home / "code" / "run.sh").write_text("#!/bin/sh\n")
        (home / "code" / "run.sh").chmod(0o755)
        (home / "tokenizer.json").write_text(json.dumps({"vocabulary": list(range(3000))}))
        (home / "README.md").write_text("---\nlicense: mit\n---\n# aligned\n")
        return 0

    def _make_pipeline(self) -> None:
        for component in ("transformer", "vae"):
            for side in write_pair(self.root / component, self.shape.shapes):
                (side / "model.safetensors").rename(side / "diffusion_pytorch_model.safetensors")
                (self.root / side.name).mkdir(exist_ok=True)
                side.rename(self.root / side.name / component)
        said = {"_class_name": "Pipe", "transformer": ["diffusers", "A"], "vae": ["diffusers", "B"]}
        for side in (self.base, self.aligned):
            (side / "model_index.json").write_text(json.dumps(said))

    def _make_adapter(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """LoRA of rank 4 on every projection."""
        generator = torch.Generator().manual_seed(0)
        factors = {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                at = f"base_model.model.{name.removesuffix('.weight')}"
                factors[f"{at}.lora_A.weight"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.1
                factors[f"{at}.lora_B.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.1
        save_file(factors, self.aligned / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
        (self.aligned / "adapter_config.json").write_text(json.dumps(said))
        (self.aligned / "config.json").unlink()

    def _finished(self, name: str, *more: str) -> Content:
        must(self.run(self.made(name), *more))
        return content(self.made(name))

    def made(self, name: str) -> Path:
        """The output that is `reference`, `old` or `half`; its folder is called as all are, for a card may say it."""
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name / "out"

    def _make_half(self) -> None:
        """An output that was killed on its way, for resumed runs."""
        out = self.made("half")
        moment = len(self.calls(out, counts=changes)) // 2
        fresh(out)

        def before() -> None:
            commit_often(1)
            Seam(Killer(moment, "before"), out).install()

        self.run(out, before=before)

    def arguments(self, out: Path, *more: str) -> list[str]:
        """Of the command line, with two threads."""
        paths = [f"--base={self.base}", f"--aligned={self.aligned}", f"--out={out}"]
        given = [f"--{name.replace('_', '-')}={value}" for name, value in self.shape.options.items()]
        return ["run", *paths, "--threads=2", "--quiet", *given, *more]

    def with_inputs(self, folder: Path) -> World:
        """The same with inputs of its own, which may be changed."""
        own = copy.copy(self)
        own.base, own.aligned = (shutil.copytree(side, folder / side.name) for side in (self.base, self.aligned))
        return own

    def run(
        self,
        out: Path,
        *more: str,
        before: Callable[[], object] = lambda: None,
        kill_s: float | None = None,
        said: Path | None = None,
    ) -> Ended:
        """Run the command in a child, which calls `before` first; killed after `kill_s` seconds if it lasts so long.

        What it prints goes to the file `said`, or to one beside `out`.
        """

        def work() -> int:
            before()
            return command(self.arguments(out, *more))

        return in_child(work, said or out.with_name(out.name + ".said"), kill_s=kill_s)

    def calls(
        self,
        out: Path,
        *more: str,
        counts: Callable[[str, tuple[Any, ...]], bool] = lambda name, args: True,
        roots: Sequence[Path] = (),
    ) -> list[str]:
        """The calls below `roots` (or `out`) that a run makes which journals each tensor, in order."""

        def work() -> list[str]:
            counter = Counter(counts)
            commit_often(1)
            Seam(counter, *(roots or [out])).install()
            command(self.arguments(out, *more))
            return counter.names

        return found_by_child(work, self.root)


def command(arguments: list[str]) -> int:
    """The exit code of a command line."""
    try:
        commands.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def fork(work: Callable[[], int]) -> int:
    """The process id of a child that does `work` and ends with its result as exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def in_child(work: Callable[[], int], said: Path, kill_s: float | None = None) -> Ended:
    """Let a child do `work`, whose result is its exit code; what it prints goes to the file `said`.

    Killed after `kill_s` seconds if it lasts so long; where that is None it must not last HANGS_S.
    """

    def quietly() -> int:
        fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        faulthandler.register(signal.SIGUSR1)
        return work()

    pid = fork(quietly)
    wait_s = HANGS_S if kill_s is None else kill_s
    started, done, status = time.monotonic(), 0, 0
    while done == 0 and time.monotonic() - started < wait_s:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done == 0:
            time.sleep(0.001)
    if done == 0:
        stacks = _stacks(pid, said) if kill_s is None else ""
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if kill_s is None:
            raise Law(f"hangs: not at its end after {HANGS_S:.0f} s; its threads, and what it said: {stacks}")
    return Ended(os.waitstatus_to_exitcode(status), said.read_text(errors="replace") if said.exists() else "")


def _stacks(pid: int, said: Path) -> str:
    """Where the threads of a child are, by the kernel and by Python, after what it has said."""
    waits = [f"{task.name} in {(task / 'wchan').read_text()}" for task in Path(f"/proc/{pid}/task").iterdir()]
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1)
    return f"{'; '.join(waits)}; {said.read_text(errors='replace')[-4000:]}"


def found_by_child(work: Callable[[], Any], folder: Path) -> Any:
    """What `work` returns, computed in a child."""
    result = folder / "result.pickle"
    must(in_child(lambda: result.write_bytes(pickle.dumps(work())) and 0, folder / "said"))
    return pickle.loads(result.read_bytes())


def must(ended: Ended) -> None:
    """Raise Law for anything but success."""
    if ended.code != 0:
        raise Law(f"exit code {ended.code}: {ended.said[-1500:]}")


def content(folder: Path) -> Content:
    """Every file of a folder; of a manifest what does not change from run to run."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    if MANIFEST in found:
        found[MANIFEST] = lasting(found[MANIFEST])
    return found


def lasting(manifest: bytes) -> bytes:
    """A manifest without times, paths and warnings; one that is not whole stays as it is."""
    seal = opened(manifest)
    if seal.state == "broken":
        return manifest
    document = {name: value for name, value in json.loads(manifest).items() if name not in VOLATILE}
    for row in document["tensors"].values():
        row.pop("elapsed_s", None)
    for side in document["inputs"].values():
        side.pop("path", None)
    return json.dumps(document).encode()


def fresh(folder: Path, source: Path | None = None) -> Path:
    """The folder, empty and absent, or a copy of `source`."""
    shutil.rmtree(folder, ignore_errors=True)
    if source is not None:
        shutil.copytree(source, folder)
    return folder


def require_same(found: Content, expected: Content, what: str) -> None:
    """Raise Law where a file differs, is missing or is too many."""
    if found != expected:
        wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        raise Law(f"{what}: {len(wrong)} files differ: {', '.join(wrong[:4])}")


def require_inputs_untouched(world: World) -> None:
    now = content(world.base) | {f"aligned/{name}": data for name, data in content(world.aligned).items()}
    require_same(now, world.inputs, "the inputs were touched")


def commit_often(n_bytes: int) -> None:
    """Let a run journal after so many bytes: the tensors here are small, and would all be in one batch."""
    committer.BATCH_BYTES = n_bytes


@dataclass(slots=True)
class Outcome:
    """What the cases of one part came to."""

    part: str
    cases: int = 0
    of: int | None = None  # cases that there are; None: any number
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # case -> what went wrong
    skipped: list[str] = field(default_factory=list)  # what could not be tried here, and why
    elapsed_s: float = 0.0

    def count(self, *what: str) -> None:
        for name in what:
            self.counts[name] = self.counts.get(name, 0) + 1

    def add(self, other: Outcome) -> None:
        self.cases += other.cases
        for name, number in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + number
        self.failures |= other.failures
        self.skipped += [reason for reason in other.skipped if reason not in self.skipped]


def rng_of(seed: int, part: str, case: int) -> random.Random:
    return random.Random(f"{seed} {part} {case}")
