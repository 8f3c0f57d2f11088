"""The way over a GPU, on a card that is as late as it may be: every wait that it needs is there, and each is needed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from late_card import LateCard, LateLane, lane_here, spoil
from safetensors.torch import load_file

from lox_stream import Options, blocks, card_delta, costs, execute_all, extrapolate, lending, on_card, plan, stream
from lox_stream.costs import bytes_on_card, part_rows
from lox_stream.delta import NotFinite
from lox_stream.device import indices, usable_bytes
from lox_stream.errors import Cancelled, DataError, DeviceError
from lox_stream.kernels import by_torch
from lox_stream.pipeline import Finished, compute, compute_all
from lox_stream.planning import too_large
from lox_stream.sinks import Way
from lox_stream.synthetic import write_pair
from lox_stream.update import alike

# not imported yet: tests/test_gpu_kernels.py decides first whether kernels are interpreted
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
MEMORY, IN_BLOCKS = 1 << 30, 2 * 32 * 220 * 4  # of the card: for all, and for the smallest blocks
SHAPES = {
    "model.a.weight": (220, 150),
    "model.b.weight": (150, 220),
    "model.c.weight": (300, 100),
    "model.d.weight": (400, 60),
    "model.e.weight": (200, 200),
    "model.norm.weight": (64,),
}
MUTATIONS = [  # the module, what is right, what is wrong
    (lending, "busy.wait()\n            yield", "pass\n            yield"),
    (on_card, "compute.wait_for(resident.ready)", "pass"),
    (on_card, "moves.back.wait_for(compute.record())\n        outcome", "outcome"),
    (on_card, "moves.back.wait_for(compute.record())\n                moves", "moves"),
    (on_card, "block.start * columns", "block.start"),
    (blocks, "slot.busy = self.into.record()", "pass"),
    (blocks, "slot.busy.wait()\n            found", "found"),
    (blocks, "slot.busy.wait()\n                emit", "emit"),
    (blocks, "    found: list[float] = memory", "found: list[float] = memory"),  # once the slot is given back
    (blocks, "    emit(part.start", "emit(part.start"),
    (blocks, "memory.copy_(source[part])\n                self.into", "self.into"),
    (blocks, "self.into.copy(there[part], memory)", "pass"),
    (blocks, "slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES)", "slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES - 2)"),
    (blocks, "self.ready = moves.into.record()", "self.ready = moves.back.record()"),
    (blocks, "self._moves.into.wait_for(used)", "pass"),
    (blocks, "self._compute.wait_for(self._moves.into.record())", "pass"),
    (blocks, "self._used[place] = self._compute.record()", "pass"),
    (blocks, "if both:", "if not both:"),
    (card_delta, "first = rows.start //", "first = 0 * rows.start //"),
    (card_delta, "self._compute.record().wait()", "pass"),
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
    """All matrices on the card, cut into many parts that go through slots which are used many times."""
    if not request.node.get_closest_marker("gpu"):
        stand_in(monkeypatch)


def stand_in(monkeypatch):
    monkeypatch.setattr("lox_stream.kernels.gpu.products.GRAIN_M", 32)
    monkeypatch.setattr("lox_stream.kernels.gpu.products.FEWEST_GRAINS", 1)
    monkeypatch.setattr("lox_stream.kernels.by_torch.TILE_ELEMENTS", 4000)
    for module in (blocks, lending, on_card):
        small(module, monkeypatch)


def small(module, monkeypatch):
    for name, value in {
        "SLOT_BYTES": 4096,
        "goes_on_card": lambda m, n, rank, svd: 0 < rank < min(m, n),
        "bytes_on_card": bytes_of_weights,
    }.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    if hasattr(module, "Loan"):  # `lending`, or a mutant of it
        monkeypatch.setattr(module.Slots, "lent", spoiling(module.Slots.lent))


def spoiling(lent):
    """Slots that are spoiled when they are given back."""

    @contextmanager
    def spoiled(self):
        with lent(self) as loan:
            try:
                yield loan
            finally:
                spoil(loan.memory, loan.busy)

    return spoiled


def bytes_of_weights(m, n, rank, element_bytes, rows=0):
    """What memory is for in these tests, so that one budget makes all matrices go through in blocks."""
    return (min(m, 2 * rows) if rows else m) * n * sum(element_bytes)


class Watched(LateCard):
    """One whose lanes can be looked at: into, back, and two that compute."""

    def __init__(self):
        super().__init__()
        self.lanes = []

    def lane(self):
        self.lanes.append(super().lane())
        return self.lanes[-1]


def one(card=None, memory=MEMORY, module=on_card):
    return module.OnCard(card or LateCard(), memory, by_torch)


def computed(pair, monkeypatch, *cards, options=Options(device="cuda", threads=4)):  # noqa: B008
    """name -> its last event."""
    given = on_card.Cards(cards or [one()])
    monkeypatch.setattr("lox_stream.pipeline.cards_of", lambda options: given)
    events = compute(plan(*pair, options=options).steps, Kept, options)
    return {event.step.name: event for event in events if isinstance(event, Finished)}


def bytes_of(finished):
    return {name: bytes(event.target.data) for name, event in finished.items()}


@pytest.fixture(scope="module")
def expected(pair):
    """What a card gives whose lanes do everything at once."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
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
        patch.setattr("lox_stream.pipeline.cards_of", lambda options: None)
        events = compute(plan(*pair).steps, Kept, Options())
        here = bytes_of({event.step.name: event for event in events if isinstance(event, Finished)})
    for name, data in expected.items():
        words = torch.frombuffer(bytearray(data), dtype=torch.int16)
        others = torch.frombuffer(bytearray(here[name]), dtype=torch.int16)
        assert (words != others).double().mean() < 2 * Options().tolerance, name


def test_stochastic_rounding_on_a_card_is_that_of_the_cpu(pair, monkeypatch):
    """But for the few elements whose update is another: the words are the same."""
    given = Options(rounding="stochastic", tolerance=1e-5)
    ways = []
    for cards in (on_card.Cards([one()]), None):
        monkeypatch.setattr("lox_stream.pipeline.cards_of", lambda options, cards=cards: cards)
        events = compute(plan(*pair, options=given).steps, Kept, given)
        ways.append(b"".join(bytes(e.target.data) for e in sorted_by_name(events)))
    words, others = (torch.frombuffer(bytearray(data), dtype=torch.int16) for data in ways)
    assert (words != others).double().mean() < 1e-3


def sorted_by_name(events):
    return sorted((e for e in events if isinstance(e, Finished)), key=lambda event: event.step.name)


def mutated(module, right, wrong, tmp_path, monkeypatch):
    """`on_card` where a line of it, or of a module that it uses, is wrong."""
    source = Path(module.__file__).read_text()
    assert right in source, f"{module.__name__} has no {right!r} any more"
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("lox_stream_mutant", file)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)  # where dataclasses look their module up
    spec.loader.exec_module(mutant)
    small(mutant, monkeypatch)
    for name, value in vars(mutant).items():
        for user in (blocks, on_card):
            if getattr(value, "__module__", "") == spec.name and hasattr(user, name):
                monkeypatch.setattr(user, name, value)
    return mutant if module is on_card else on_card


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("module", "right", "wrong"),
    [(on_card, "", ""), *MUTATIONS],
    ids=lambda text: " ".join(text.split()) if isinstance(text, str) else text.__name__,
)
def test_a_wait_or_a_copy_that_is_missing_shows(module, right, wrong, pair, expected, monkeypatch, tmp_path):
    mutant = mutated(module, right, wrong, tmp_path, monkeypatch)
    same = True
    for threads in (4, 1):  # alone no other thread's waiting may by chance do what is missing
        monkeypatch.setattr(costs, "CARD_THREADS", threads)
        options = Options(device="cuda", threads=threads)
        for memory in (MEMORY, IN_BLOCKS):
            try:
                card = one(memory=memory, module=mutant)
                same = same and bytes_of(computed(pair, monkeypatch, card, options=options)) == expected
            except (DataError, AssertionError, RuntimeError, ValueError):
                same = False
    assert same == (right == wrong)


TRIES = 5
RIGHT_AGAIN = [
    (on_card, "", ""),
    (on_card, "resident.restore(w1, run)", "pass"),
    (on_card, "run)\n                        compute.wait_for(resident.ready)", "run)"),
    (blocks, "self.ready, self.used = self._moves.into.record(), False", "self.used = False"),
]


@pytest.mark.parametrize("memory", [MEMORY, IN_BLOCKS])
@pytest.mark.parametrize(("module", "right", "wrong"), RIGHT_AGAIN, ids=lambda value: str(value)[:30])
def test_several_outputs_are_those_that_each_has_alone(
    module, right, wrong, memory, pair, expected, monkeypatch, tmp_path
):
    """From one solve: W1 is copied to the card again for each, for the output lies in its place."""
    if right and memory == IN_BLOCKS:
        pytest.skip("where the weights go through in blocks, each walk brings them anew")
    mutant = mutated(module, right, wrong, tmp_path, monkeypatch)
    for _ in range(1 if right == wrong else TRIES):  # another thread's waiting may by chance do what is missing
        monkeypatch.setattr(
            "lox_stream.pipeline.cards_of", lambda options: on_card.Cards([one(memory=memory, module=mutant)])
        )
        ways = []
        for alpha in (0.5, 2.0, 1.25):
            options = Options(device="cuda", threads=4, alpha=alpha, solved_for=1.25)
            ways.append(Way({step.name: step for step in plan(*pair, options=options).steps}, options, Kept))
        finished = [event for event in compute_all(ways) if isinstance(event, Finished)]
        several = [
            {event.step.name: bytes(event.target.data) for event in finished if event.way == number}
            for number in range(3)
        ]
        if several[2] != expected:
            break
    assert (several[2] == expected) == (right == wrong)
    if right == wrong:
        assert several[0] != several[1] != several[2]
        assert [event.way for event in finished if event.step.name == "model.a.weight"] == [0, 1, 2]


def test_a_card_that_is_short_of_memory_takes_one_at_a_time(pair, expected, monkeypatch):
    most = max(bytes_of_weights(*shape, 6, (2, 2)) for shape in SHAPES.values() if len(shape) == 2)
    assert bytes_of(computed(pair, monkeypatch, one(memory=most))) == expected


@pytest.mark.parametrize("memory", [IN_BLOCKS, IN_BLOCKS * 3 // 2])
def test_matrices_that_are_larger_than_the_card_go_through_in_blocks(memory, pair, expected, monkeypatch):
    walked = []
    real = blocks.Streamed.__init__

    def init(self, moves, w1, w0, rows, compute, run):
        walked.append((w1.shape, rows))
        real(self, moves, w1, w0, rows, compute, run)

    monkeypatch.setattr(blocks.Streamed, "__init__", init)
    assert bytes_of(computed(pair, monkeypatch, one(memory=memory))) == expected
    assert len(walked) == 5
    assert all(rows % 32 == 0 and 2 * rows * n * 4 <= memory for (_, n), rows in walked)


def test_several_cards_share_the_matrices(pair, expected, monkeypatch):
    cards = [one(Watched()) for _ in range(2)]
    assert bytes_of(computed(pair, monkeypatch, *cards)) == expected
    assert all(card.card.lanes[0].given for card in cards), "each had something to do"


@pytest.mark.parametrize("often", [1, 100])
def test_a_card_that_runs_out_of_memory_takes_blocks_and_says_so(often, pair, expected, monkeypatch):
    """And where they do not fit either, it says what to do."""
    real, failed = blocks.Moves.room, []

    def failing(self, *shape, dtype):
        if len(failed) < often:
            failed.append(shape)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return real(self, *shape, dtype=dtype)

    monkeypatch.setattr(blocks.Moves, "room", failing)
    if often > 1:
        with pytest.raises(DeviceError, match=r"in blocks of \d+ rows: .* 2\.00 GiB\. Others"):
            computed(pair, monkeypatch)
        return
    finished = computed(pair, monkeypatch)
    assert bytes_of(finished) == expected
    (told,) = (notice for event in finished.values() for notice in event.facts.notices)
    assert "the GPU ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): the matrix went" in told
    assert "2.00 GiB" in told


def test_gpus_are_named_as_torch_names_them():
    assert [indices(device, 3) for device in ("cuda", "cuda:2", "cuda:2,0", "cuda:all")] == [
        [0],
        [2],
        [2, 0],
        [0, 1, 2],
    ]


def test_a_matrix_that_a_card_cannot_take_is_named_before_the_run(tmp_path):
    steps = plan(*write_pair(tmp_path, {"model.a.weight": (2000, 1000), "model.b.weight": (90, 90)})).steps
    needed = bytes_on_card(2000, 1000, 6, (2, 2), part_rows(2000, 1000))
    assert too_large(steps, "randomized", needed) == ""
    assert too_large(steps, "exact", needed - 1) == "", "which the CPU computes"
    told = too_large(steps, "randomized", needed - 1)
    assert f"model.a.weight (2000, 1000) takes {needed} bytes of GPU memory in the smallest blocks" in told
    assert "--gpu-memory" in told


def test_what_is_asked_for_of_a_card_is_used_and_else_a_share_of_what_is_free():
    assert usable_bytes(Options(gpu_memory_bytes=5), 100) == 5
    assert usable_bytes(Options(), 100) == 80


def test_memory_that_is_held_is_waited_for_and_given_back():
    budget = lending.Budget(10)
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
    budget = lending.Budget(10)

    def stopped(task, count):
        raise Cancelled("stopped on request")

    with budget.held(5, stopped), pytest.raises(Cancelled), budget.held(8, stopped):
        pass
    with budget.held(10, stopped):
        pass


def test_who_waits_for_much_is_not_overtaken():
    budget, order = lending.Budget(10), []

    def take(n_bytes):
        with budget.held(n_bytes, lambda task, count: None):
            order.append(n_bytes)

    with budget.held(6, lambda task, count: None):
        threads = [threading.Thread(target=take, args=(n_bytes,)) for n_bytes in (9, 3)]
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            while len(budget._waiting) < waiting:
                pass
    for thread in threads:
        thread.join(5)
    assert order == [9, 3]


def test_a_budget_may_become_smaller_while_all_of_it_is_held():
    budget = lending.Budget(10)
    with budget.held(10, lambda task, count: None):
        budget.lower(4)
        budget.lower(8)
    assert (budget.n_bytes, budget._left) == (4, 4)
    with budget.held(9, lambda task, count: None):
        assert budget._left == -5, "all that there is, and nobody else gets any"
    assert budget._left == 4


def test_a_card_is_held_to_its_budget_and_what_libraries_keep(pair, monkeypatch):
    card = LateCard()
    computed(pair, monkeypatch, one(card, memory=MEMORY))
    assert card.bound_bytes == MEMORY + 5 * 2 * (32 << 20), "five threads, two lanes"


def test_after_an_error_nothing_is_on_its_way(pair, monkeypatch):
    """What was given to the lanes is done before its memory is given back."""
    card = Watched()

    def failing(*given, **how):
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr(by_torch, "partial_products", failing)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        computed(pair, monkeypatch, one(card))
    assert [lane.left for lane in card.lanes] == [0] * 4
    assert card.closed


def test_memory_that_ends_when_a_part_is_written_ends_the_run(pair, monkeypatch):
    """A byte is written once."""
    real, calls = by_torch.lowrank_update, []

    def failing(*given, **how):
        calls.append(given)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*given, **how)

    monkeypatch.setattr(by_torch, "lowrank_update", failing)
    with pytest.raises(DeviceError, match=r"in blocks of \d+ rows: CUDA out of memory\. Others"):
        computed(pair, monkeypatch, one(memory=IN_BLOCKS), options=Options(device="cuda", threads=1))


def test_memory_that_others_took_is_told(pair, monkeypatch):
    with pytest.raises(DeviceError, match=r"at most the 1000 that may be used: others took some"):
        computed(pair, monkeypatch, one(memory=1000))


def test_what_is_not_finite_is_said_with_its_place(tmp_path, monkeypatch):
    base, aligned = write_pair(tmp_path, {"model.a.weight": (220, 150)})
    data = bytearray((aligned / "model.safetensors").read_bytes())
    data[-2:] = b"\x80\x7f"  # the last element: infinity
    (aligned / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"aligned has inf at \[219, 149\]"):
        computed((base, aligned), monkeypatch)


@pytest.mark.parametrize("memory", [MEMORY, IN_BLOCKS])
def test_what_the_first_product_finds_not_finite_spoils_no_other_matrix(memory, tmp_path, expected, monkeypatch):
    """The look at samples does not see the last element: the matrix is on the card when it is given up."""
    base, aligned = write_pair(tmp_path, SHAPES)
    file = aligned / "model.safetensors"
    data = bytearray(file.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:first])["model.a.weight"]["data_offsets"]
    data[first + end - 2 : first + end] = b"\x80\x7f"  # infinity
    file.write_bytes(data)
    options = Options(device="cuda", threads=4, on_nonfinite="copy")
    found = bytes_of(computed((base, aligned), monkeypatch, one(memory=memory), options=options))
    assert found.pop("model.a.weight") == bytes(data[first + begin : first + end])
    assert found == {name: written for name, written in expected.items() if name != "model.a.weight"}


ENDS = [
    (on_card, "", ""),
    (on_card, "compute.record().wait()\n                        return", "return"),
]


@pytest.mark.parametrize(("module", "right", "wrong"), ENDS, ids=lambda value: str(value)[:30])
def test_a_matrix_without_an_update_leaves_when_its_work_is_done(module, right, wrong, pair, monkeypatch, tmp_path):
    """What the solver launched last, and fetched nothing of, may still read memory that the next matrix will get."""
    mutant = mutated(module, right, wrong, tmp_path, monkeypatch)
    card, left = Watched(), []

    def solve_away(matrix, sample, op):
        op._compute.launch(lambda: None)
        return alike(matrix, NotFinite("aligned has nan"))

    real = mutant.OnCard._extrapolate

    def leaving(self, *given):
        found = real(self, *given)
        left.extend(lane.left for lane in card.lanes)
        return found

    monkeypatch.setattr(mutant, "solve_away", solve_away)
    monkeypatch.setattr(mutant.OnCard, "_extrapolate", leaving)
    monkeypatch.setattr(costs, "CARD_THREADS", 1)  # no other matrix is on its way meanwhile
    options = Options(device="cuda", threads=1, on_nonfinite="copy")
    computed(pair, monkeypatch, one(card, module=mutant), options=options)
    assert len(left) == 5 * 4
    assert any(left) == (right != wrong)


OVERFLOWS = [
    (on_card, "", ""),
    (on_card, "if not isinstance(outcome, NotFinite):", "if outcome:"),
]


@pytest.mark.parametrize(("module", "right", "wrong"), OVERFLOWS, ids=lambda value: str(value)[:30])
def test_an_output_beyond_its_dtype_does_not_leave_the_card(module, right, wrong, monkeypatch, tmp_path):
    mutant = mutated(module, right, wrong, tmp_path, monkeypatch)
    pair, written = write_pair(tmp_path, {"model.a.weight": (220, 150)}, dtype=torch.float16), []
    monkeypatch.setattr(Kept, "write", lambda self, offset, data: written.append(offset))
    options = Options(device="cuda", threads=4, alpha=1e12)
    with pytest.raises(DataError, match="the extrapolated weight is beyond the range of float16"):
        computed(pair, monkeypatch, one(module=mutant), options=options)
    assert bool(written) == (right != wrong)


def test_memory_of_the_card_is_made_in_the_lane_that_fills_it(monkeypatch):
    """torch keeps what was freed by lane, and earlier work there may use it still."""
    moves, made_in, real = blocks.Moves(LateCard()), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: made_in.append(lane_here()) or real(*shape, **how))
    with moves.card.entered():
        moves.room(2, 3, dtype=torch.bfloat16)
    assert made_in == [moves.into]


def test_a_difference_of_zero_is_copied(tmp_path, monkeypatch):
    base, aligned = write_pair(tmp_path, {"model.a.weight": (220, 150)})
    shutil.copy(base / "model.safetensors", aligned)
    card = Watched()
    (event,) = computed((base, aligned), monkeypatch, one(card)).values()
    assert event.facts.reason == "identical"
    assert not any(lane.given for lane in card.lanes), "it was never copied to the card"
    assert bytes(event.target.data) == (base / "model.safetensors").read_bytes()[-220 * 150 * 2 :]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_scattered_parts_of_a_fused_projection_go_over_a_card(rounding, tmp_path, monkeypatch):
    base, aligned = write_pair(tmp_path, {"h.0.attn.c_attn.weight": (220, 450), "h.0.attn.qkv.weight": (450, 150)})
    for folder in (base, aligned):
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    options = Options(device="cuda", threads=4, split_fused=True, rounding=rounding)
    away = computed((base, aligned), monkeypatch, options=options)
    assert all(len(event.facts.matrices) == 3 for event in away.values())
    here = dict(stream(base, aligned, options=replace(options, device="cpu")))
    for name, written in bytes_of(away).items():
        found = torch.frombuffer(bytearray(written), dtype=torch.bfloat16).view(here[name].shape)
        assert (found != here[name]).double().mean() < 2 * Options().tolerance, name


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(tmp_path, dtype, kernels):
    """End to end, matrices that the card takes and some that it does not; twice, and in blocks, for the same bytes."""
    shapes = {f"model.{m}.{n}.weight": (m, n) for m, n in ((1500, 2000), (2000, 1500), (4096, 512), (64, 64))}
    base, aligned = write_pair(tmp_path, shapes, dtype=dtype)
    size = (dtype.itemsize, dtype.itemsize)
    blocks_of = max(bytes_on_card(m, n, 6, size, part_rows(m, n)) for m, n in shapes.values())
    away = Options(device="cuda", kernels=kernels)
    ways = {"cpu": Options(), "first": away, "second": away, "blocks": replace(away, gpu_memory_bytes=blocks_of)}
    files = {}
    for name, options in ways.items():
        extrapolate(base, aligned, tmp_path / name, options=options)
        files[name] = load_file(tmp_path / name / "model.safetensors")
    for name, here in files["cpu"].items():
        away = files["first"][name]
        assert torch.equal(away, files["second"][name]), name
        assert torch.equal(away, files["blocks"][name]), name
        if dtype == torch.float32:
            assert (away - here).norm() < 1e-4 * (here - load_file(aligned / "model.safetensors")[name]).norm(), name
        else:
            assert (away != here).double().mean() < 2 * Options().tolerance, name


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_several_outputs_and_an_adapter_on_a_gpu_are_those_that_each_has_alone(tmp_path, blocks):
    """Of one solve: W1 goes to the card again for each, and the factors come back from it."""
    shapes = {f"model.{m}.{n}.weight": (m, n) for m, n in ((1500, 2000), (4096, 512), (64, 64))}
    pair = write_pair(tmp_path, shapes)
    most = max(bytes_on_card(m, n, 6, (2, 2), part_rows(m, n)) for m, n in shapes.values()) if blocks else 0
    away = Options(device="cuda", gpu_memory_bytes=most, solved_for=1.25)
    ways = {"a": replace(away, alpha=0.5), "b": away, "f": replace(away, form="peft")}
    for name, options in ways.items():
        extrapolate(*pair, tmp_path / f"alone {name}", options=options)
    execute_all([plan(*pair, tmp_path / name, options=options) for name, options in ways.items()])
    for name in ways:
        (file,) = (tmp_path / name).glob("*.safetensors")
        assert file.read_bytes() == (tmp_path / f"alone {name}" / file.name).read_bytes()
    extrapolate(pair[1], tmp_path / "f", tmp_path / "merged", options=Options(alpha=0.0))
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "b"))
    assert all((here[name] != there[name]).double().mean() <= 1e-4 for name in here), "sums in another order"
