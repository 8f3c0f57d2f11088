"""The extrapolated checkpoint for programs, with nothing written: tensor by tensor, or on demand."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lox_stream.copying import InMemory
from lox_stream.device import settled
from lox_stream.errors import OptionError
from lox_stream.hub import local
from lox_stream.installed import way_to
from lox_stream.matching import Step, output_bytes, rescaled, written_names
from lox_stream.names import counted, listing, near_misses, printable, shown, suggestion, unmatched
from lox_stream.names import matches as named
from lox_stream.options import Options, check_platform
from lox_stream.pipeline import Finished, compute_all
from lox_stream.planning import DEFAULTS, Plan, plan
from lox_stream.reader import TORCH_DTYPES
from lox_stream.shards import TensorInfo
from lox_stream.sinks import Way

Framework = Literal["torch", "numpy"]
CACHE_BYTES = 1 << 30
BITS = {8: torch.uint8, 16: torch.int16}  # what NumPy can be given in place of what it does not know


class _Memory(InMemory):
    """A target that is a tensor of its own."""

    def __init__(self, n_bytes: int, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(n_bytes)
        self.shape, self.dtype = shape, TORCH_DTYPES.get(dtype)

    @classmethod
    def of(cls, step: Step) -> _Memory:
        """For the tensor that a step writes."""
        return cls(output_bytes(step), step.aligned.shape, step.dtype or step.aligned.dtype)

    @classmethod
    def of_factor(cls, info: TensorInfo) -> _Memory:
        """For a tensor of an adapter."""
        return cls(info.n_bytes, info.shape, info.dtype)

    def tensor(self) -> Tensor:
        """In its own dtype and shape; plain bytes where torch has no such dtype."""
        return self.data if self.dtype is None else self.data.view(self.dtype).view(self.shape)


def stream(
    base: str | Path,
    aligned: str | Path,
    *,
    options: Options = DEFAULTS,
    names: Iterable[str] | None = None,
    ordered: bool = True,
    framework: Framework = "torch",
    cancel: threading.Event | None = None,
) -> Generator[tuple[str, Any], None, None]:
    """Yield (name, tensor) of the extrapolated checkpoint, with nothing written.

    In the order of its files, or with `ordered=False` each as soon as it is finished. `names` are those that are
    wanted, or globs; the others are not read. The tensors hold the very bytes that `extrapolate` writes and are the
    caller's own; they are torch's, which other libraries take by DLPack, or NumPy's (bfloat16 and FP8 as `ml_dtypes`
    has them).

    Problems are raised here, before the first tensor: OptionError for a name that is none, and what `plan` raises.
    Closing the generator, or setting `cancel`, stops the work, with no thread left behind; after `cancel` the next
    tensor that is asked for raises Cancelled. Tensors that wait for the
    caller count towards `options.memory_bytes`.

        from lox_stream import stream

        model.load_state_dict(dict(stream("base", "aligned")), strict=False)
    """
    made = _plan(base, aligned, options)
    wanted = None if names is None else _asked(names)
    steps = made.steps if wanted is None else _chosen(made, wanted)
    turned = _into(framework, (step for step in steps if wanted is None or named(step.name, wanted)))
    cancel = cancel or threading.Event()
    tensors = tensors_of(made, steps, cancel, in_order=ordered)
    return _given(tensors, turned, wanted)


def _given(
    tensors: Generator[tuple[str, Tensor], None, None], turned: Callable[[Tensor], Any], wanted: tuple[str, ...] | None
) -> Generator[tuple[str, Any], None, None]:
    with contextlib.closing(tensors):
        for name, tensor in tensors:
            if wanted is None or named(name, wanted):
                yield name, turned(tensor)


def tensors_of(
    plan: Plan, steps: Sequence[Step], cancel: threading.Event, *, in_order: bool = True
) -> Generator[tuple[str, Tensor], None, None]:
    """(name, tensor) for what these steps of a settled plan write; see `stream`."""
    way = Way({step.name: step for step in steps}, plan.options, _Memory.of, _Memory.of_factor)
    events = compute_all([way], stop=cancel, in_order=in_order, held_bytes=output_bytes)
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Finished):
                assert isinstance(event.target, _Memory), "the only target made here"
                yield event.facts.name, event.target.tensor()


class Extrapolated(Mapping[str, Any]):
    """The extrapolated checkpoint as a mapping from names to tensors, each computed when it is asked for.

    Made by `lox_stream.open`. The last ones are kept, up to `cache_bytes`; do not write into them. Several threads may
    ask; they are answered one after the other. Pickled, it is the same pair opened again, so that it can be handed to
    worker processes.
    """

    def __init__(
        self,
        base: str | Path,
        aligned: str | Path,
        *,
        options: Options = DEFAULTS,
        cache_bytes: int = CACHE_BYTES,
        framework: Framework = "torch",
        cancel: threading.Event | None = None,
    ) -> None:
        if not isinstance(cache_bytes, int) or cache_bytes < 0:
            raise OptionError(f"cache_bytes is {shown(cache_bytes)}, expected a whole number of bytes, 0 or more")
        self.plan = _plan(base, aligned, options)
        self._again = functools.partial(
            Extrapolated,
            self.plan.base.root,
            self.plan.aligned.root,
            options=options,
            cache_bytes=cache_bytes,
            framework=framework,
        )
        self._steps = {step.name: step for step in self.plan.steps}
        self._turned = _into(framework, self.plan.steps)
        self._cancel = cancel or threading.Event()
        self._room, self._kept = cache_bytes, OrderedDict[str, Tensor]()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        """The tensor; raises KeyError for a name that is none, and what the computation raises."""
        if name not in self._steps:
            hint = suggestion(near_misses(name, self._steps)) if isinstance(name, str) else ""
            raise KeyError(f"{name!r}: no such tensor. {hint}".rstrip())
        with self._lock:
            if name not in self._kept:
                return self._turned(self._computed(name))
            self._kept.move_to_end(name)
            return self._turned(self._kept[name])

    def _computed(self, name: str) -> Tensor:
        """Computed, and kept as far as there is room, with what is made at the same time."""
        found = dict(tensors_of(self.plan, with_pairs(self.plan, {name}), self._cancel))
        for other, tensor in found.items():
            self._kept[other] = tensor
        while self._kept and sum(tensor.nbytes for tensor in self._kept.values()) > self._room:
            self._kept.popitem(last=False)
        return found[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the files."""
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, name: object) -> bool:
        return name in self._steps

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return self._again, ()

    def __repr__(self) -> str:
        root = printable(self.plan.aligned.root)
        return f"<{counted(len(self), 'tensor')} of {root}, extrapolated when asked for>"


def _plan(base: str | Path, aligned: str | Path, options: Options) -> Plan:
    """What is to be computed; an adapter is a file and no checkpoint."""
    check_platform()
    if options.form != "weights":
        raise OptionError(f"form is {options.form!r}, expected 'weights': an adapter is written by `extrapolate`")
    return settled(plan(local(base), local(aligned), options=options))


def _asked(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise OptionError(f"names is one string, {names!r}, expected several: [{names!r}]")
    wanted = tuple(names)
    strange = [name for name in wanted if not isinstance(name, str)]
    if strange:
        raise OptionError(f"names holds {shown(strange[0])}, expected names of tensors, or globs")
    return wanted


def _chosen(made: Plan, wanted: tuple[str, ...]) -> list[Step]:
    """The steps of these names, in their order; raises OptionError for one that is none."""
    known = [step.name for step in made.steps]
    missing = unmatched(wanted, known)
    if missing:
        raise OptionError(
            f"names: {listing(missing)} is no tensor of {printable(made.aligned.root)}; expected names or globs. "
            f"{suggestion(near_misses(missing[0], known))}".rstrip()
        )
    return with_pairs(made, {name for name in known if named(name, wanted)})


def with_pairs(made: Plan, names: AbstractSet[str]) -> list[Step]:
    """The steps that write these names, and the other halves of weights of FP8, which are made with their scales."""
    pairs = [(step.name, step.scaled.scale.name) for step in made.steps if step.scaled is not None and rescaled(step)]
    wanted = names | {other for pair in pairs if names & {*pair} for other in pair}
    return [step for step in made.steps if wanted & {*written_names(step)}]


def _into(framework: Framework, steps: Iterable[Step]) -> Callable[[Tensor], Any]:
    """What makes the caller's tensors of torch's; raises OptionError."""
    if framework == "torch":
        return lambda tensor: tensor
    if framework != "numpy":
        raise OptionError(f"framework is {framework!r}, expected 'torch' or 'numpy'")
    dtypes = {TORCH_DTYPES[name] for step in steps if (name := step.dtype or step.aligned.dtype) in TORCH_DTYPES}
    small = {dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize == 1}
    strange = [*small, *({torch.bfloat16} & dtypes)]
    if not strange:
        return lambda tensor: tensor.numpy()
    try:
        known = importlib.import_module("ml_dtypes")
    except ModuleNotFoundError as error:
        raise OptionError(
            f"framework='numpy': NumPy has no {_plain(strange[0])} of its own, and ml_dtypes is not installed; "
            "expected it. Ask for Options(dtype='float32'), or install it, which is the extra [numpy]: "
            + way_to("numpy")
        ) from error

    def turned(tensor: Tensor) -> Any:
        if tensor.dtype not in strange:
            return tensor.numpy()
        return tensor.view(BITS[8 * tensor.itemsize]).numpy().view(getattr(known, _plain(tensor.dtype)))

    return turned


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
