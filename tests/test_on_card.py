"""The way over a GPU, on a card that is as late as it may be: every wait that it needs is there, and each is needed."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from late_card import LateCard, LateLane, plain
from pretend_gpu import on_gpu
from safetensors.torch import load_file

from lox_stream import Options, extrapolate, on_card, plan
from lox_stream.costs import bytes_on_card
from lox_stream.device import too_large, usable_bytes
from lox_stream.errors import Cancelled, DataError, DeviceError
from lox_stream.kernels import cpu
from lox_stream.pipeline import Finished, compute
from lox_stream.synthetic import write_pair

# not imported yet: tests/test_gpu_kernels.py decides first whether kernels are interpreted
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
MEMORY = 1 << 30
SHAPES = {
    "model.a.weight": (220, 150),
    "model.b.weight": (150, 220),
    "model.c.weight": (300, 100),
    "model.d.weight": (400, 60),
    "model.e.weight": (200, 200),
    "model.norm.weight": (64,),
}
MUTATIONS = [  # of on_card.py: what is right, what is wrong
    ("busy.wait()\n            yield", "pass\n            yield"),
    ("self._compute.wait_for(ready)", "pass"),
    ("self._back.wait_for(done)", "pass"),
    ("slot.busy = self._into.record()", "pass"),
    ("slot.busy.wait()\n            dot", "dot"),
    ("slot.busy.wait()\n                matrix", "matrix"),
    ("memory.copy_(source[part])\n                self._into", "self._into"),
    ("self._into.copy(to[part], memory)", "pass"),
    ("slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES)", "slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES - 2)"),
    ("ready = self._into.record()", "ready = self._back.record()"),
    ("done = self._compute.record()", "done = self._into.record()"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), SHAPES)


class Kept:
    """A target in memory."""

    def __init__(self, step):
        self.data = bytearray(b"\xa5" * step.aligned.n_bytes)

    def write(self, offset, data):
        self.data[offset : offset + data.nbytes] = data.cast("B")

    def checksum(self):
        return ""


@pytest.fixture(autouse=True)
def stand_ins(request, monkeypatch):
    """The kernels for a GPU by those for a CPU, and all matrices on the card, in slots that are used many times."""
    if request.node.get_closest_marker("gpu"):
        return

    def product(function):
        def away(w1, w0, x, *, scale=1.0, squares=None):
            sums = None if squares is None else []
            found = function(plain(w1), plain(w0), plain(x), scale=scale, squares=sums)
            if sums is not None:
                squares.append(on_gpu(torch.tensor(sum(sums), dtype=torch.float64)))
            return on_gpu(found)

        return away

    def update(w1, us, vh, out, *, key=None, first=0, unit=1.0):
        kept = cpu.lowrank_update(plain(w1), plain(us), plain(vh), plain(out), key=key, first=first)
        return on_gpu(torch.tensor([kept.dot, kept.square, float(not kept.finite)], dtype=torch.float64))

    monkeypatch.setattr("lox_stream.kernels.gpu.delta_matmul.delta_matmul", product(cpu.delta_matmul))
    monkeypatch.setattr("lox_stream.kernels.gpu.delta_rmatmul.delta_rmatmul", product(cpu.delta_rmatmul))
    monkeypatch.setattr("lox_stream.kernels.gpu.lowrank_update.lowrank_update", update)
    small(on_card, monkeypatch)


def small(module, monkeypatch):
    monkeypatch.setattr(module, "goes_on_card", lambda m, n, rank, svd: 0 < rank < min(m, n))
    monkeypatch.setattr(module, "SLOT_BYTES", 4096)


def computed(pair, monkeypatch, card=None):
    """name -> its last event."""
    card = card or on_card.OnCard(LateCard(), MEMORY)
    monkeypatch.setattr("lox_stream.pipeline.card_of", lambda options: card)
    given = Options(device="cuda", threads=4)
    events = compute(plan(*pair, options=given).steps, Kept, given)
    return {event.step.name: event for event in events if isinstance(event, Finished)}


def bytes_of(finished):
    return {name: bytes(event.target.data) for name, event in finished.items()}


@pytest.fixture
def expected(pair, monkeypatch):
    """What a card gives whose lanes do everything at once."""
    with monkeypatch.context() as patch:
        patch.setattr(LateLane, "_give", lambda self, work: work())
        return bytes_of(computed(pair, patch))


def test_a_late_card_gives_the_bytes_of_a_prompt_one(pair, expected, monkeypatch):
    finished = computed(pair, monkeypatch)
    assert bytes_of(finished) == expected
    matrices = [one for event in finished.values() for one in event.facts.matrices]
    assert len(matrices) == 5
    assert all(one.method == "krylov" and one.converged and 0.9 < one.retention < 1.1 for one in matrices)


def test_a_card_and_the_cpu_agree_within_the_tolerance(pair, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lox_stream.pipeline.card_of", lambda options: None)
        events = compute(plan(*pair).steps, Kept, Options())
        here = bytes_of({event.step.name: event for event in events if isinstance(event, Finished)})
    for name, data in expected.items():
        words = torch.frombuffer(bytearray(data), dtype=torch.int16)
        others = torch.frombuffer(bytearray(here[name]), dtype=torch.int16)
        assert (words != others).double().mean() < 2 * Options().tolerance, name


def test_stochastic_rounding_on_a_card_is_that_of_the_cpu(pair, monkeypatch):
    """But for the few elements whose update is another: the words are the same."""
    given = Options(rounding="stochastic", tolerance=1e-5)
    card = on_card.OnCard(LateCard(), MEMORY)
    ways = []
    for way in (card, None):
        monkeypatch.setattr("lox_stream.pipeline.card_of", lambda options, way=way: way)
        events = compute(plan(*pair, options=given).steps, Kept, given)
        ways.append(b"".join(bytes(e.target.data) for e in sorted_by_name(events)))
    words, others = (torch.frombuffer(bytearray(data), dtype=torch.int16) for data in ways)
    assert (words != others).double().mean() < 1e-3


def sorted_by_name(events):
    return sorted((e for e in events if isinstance(e, Finished)), key=lambda event: event.step.name)


def mutated(right, wrong, tmp_path):
    """on_card.py as a module of its own with a line that is wrong."""
    source = Path(on_card.__file__).read_text()
    assert right in source, f"on_card.py has no {right!r} any more"
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("lox_stream_mutant_on_card", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("right", "wrong"), [("", ""), *MUTATIONS], ids=lambda text: " ".join(text.split()))
def test_a_wait_or_a_copy_that_is_missing_shows(right, wrong, pair, expected, monkeypatch, tmp_path):
    module = mutated(right, wrong, tmp_path)
    small(module, monkeypatch)
    try:
        same = bytes_of(computed(pair, monkeypatch, module.OnCard(LateCard(), MEMORY))) == expected
    except (DataError, AssertionError, RuntimeError):
        same = False
    assert same == (right == wrong)


def test_a_card_that_is_short_of_memory_takes_one_at_a_time(pair, expected, monkeypatch):
    most = max(bytes_on_card(*shape, 6, (2, 2)) for shape in SHAPES.values() if len(shape) == 2)
    card = on_card.OnCard(LateCard(), most)
    assert bytes_of(computed(pair, monkeypatch, card)) == expected


def test_a_matrix_that_a_card_cannot_take_is_named_before_the_run(tmp_path):
    steps = plan(*write_pair(tmp_path, {"model.a.weight": (2000, 1000), "model.b.weight": (90, 90)})).steps
    needed = bytes_on_card(2000, 1000, 6, (2, 2))
    assert too_large(steps, "randomized", needed) == ""
    assert too_large(steps, "exact", needed - 1) == "", "which the CPU computes"
    told = too_large(steps, "randomized", needed - 1)
    assert "model.a.weight (2000, 1000) takes 0.11 GB of GPU memory, expected at most the 0.11 GB" in told
    assert "--gpu-memory" in told


def test_what_is_asked_for_of_a_card_is_used_and_else_a_share_of_what_is_free():
    assert usable_bytes(Options(gpu_memory_bytes=5), 100) == 5
    assert usable_bytes(Options(), 100) == 80


def test_memory_that_is_held_is_waited_for_and_given_back():
    budget = on_card.Budget(10)
    order = []

    def wait():
        with budget.held(8, lambda task, count: None):
            order.append("second")

    other = threading.Thread(target=wait)
    with budget.held(5, lambda task, count: None):
        other.start()
        other.join(0.2)
        order.append("first")
    other.join(5)
    assert order == ["first", "second"]


def test_waiting_for_memory_ends_when_the_run_is_stopped():
    budget = on_card.Budget(10)

    def stopped(task, count):
        raise Cancelled("stopped on request")

    with budget.held(5, stopped), pytest.raises(Cancelled), budget.held(8, stopped):
        pass
    with budget.held(10, stopped):
        pass


class Watched(LateCard):
    """One whose lanes can be looked at: into, compute, back."""

    def __init__(self):
        super().__init__()
        self.lanes = []

    def lane(self):
        self.lanes.append(super().lane())
        return self.lanes[-1]


def test_after_an_error_nothing_is_on_its_way(pair, monkeypatch):
    """What was given to the lanes is done before its memory is given back."""
    card = Watched()

    def failing(*given, **how):
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr("lox_stream.kernels.gpu.delta_rmatmul.delta_rmatmul", failing)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        computed(pair, monkeypatch, on_card.OnCard(card, MEMORY))
    assert [lane.left for lane in card.lanes] == [0, 0, 0]
    assert card.closed


def test_a_card_that_runs_out_of_memory_says_what_to_do(pair, monkeypatch):
    def failing(*given, **how):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr("lox_stream.kernels.gpu.delta_matmul.delta_matmul", failing)
    with pytest.raises(
        DeviceError, match=r"out of memory at a matrix of .* 2\.00 GiB\. Others .*--gpu-memory.*--resume"
    ):
        computed(pair, monkeypatch)


def test_what_is_not_finite_is_said_with_its_place(tmp_path, monkeypatch):
    base, aligned = write_pair(tmp_path, {"model.a.weight": (220, 150)})
    data = bytearray((aligned / "model.safetensors").read_bytes())
    data[-2:] = b"\x80\x7f"  # the last element: infinity
    (aligned / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"aligned has inf at \[219, 149\]"):
        computed((base, aligned), monkeypatch)


def test_a_difference_of_zero_is_copied(tmp_path, monkeypatch):
    base, aligned = write_pair(tmp_path, {"model.a.weight": (220, 150)})
    shutil.copy(base / "model.safetensors", aligned)
    card = Watched()
    (event,) = computed((base, aligned), monkeypatch, on_card.OnCard(card, MEMORY)).values()
    assert event.facts.reason == "identical"
    assert card.lanes[0].left == 0, "the copies in are done before their memory is given back"
    assert bytes(event.target.data) == (base / "model.safetensors").read_bytes()[-220 * 150 * 2 :]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(tmp_path, dtype):
    """End to end, matrices that the card takes and some that it does not; twice, for the same bytes."""
    shapes = {f"model.{m}.{n}.weight": (m, n) for m, n in ((1500, 2000), (2000, 1500), (4096, 512), (64, 64))}
    base, aligned = write_pair(tmp_path, shapes, dtype=dtype)
    ways = {"cpu": Options(device="cpu"), "first": Options(device="cuda"), "second": Options(device="cuda")}
    files = {}
    for name, options in ways.items():
        extrapolate(base, aligned, tmp_path / name, options=options)
        files[name] = load_file(tmp_path / name / "model.safetensors")
    for name, here in files["cpu"].items():
        away = files["first"][name]
        assert torch.equal(away, files["second"][name]), name
        if dtype == torch.float32:
            assert (away - here).norm() < 1e-4 * (here - load_file(aligned / "model.safetensors")[name]).norm(), name
        else:
            assert (away != here).double().mean() < 2 * Options().tolerance, name
