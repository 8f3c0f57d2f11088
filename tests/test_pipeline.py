"""Which steps make a job, and that no order of them starves or changes a bit."""

from __future__ import annotations

import pytest
import torch

from lox_stream import Options, plan
from lox_stream.pipeline import SPAN_BYTES, Finished, compute, jobs_of, smallest_first
from lox_stream.synthetic import llama_shapes, write_pair

MIB = 1 << 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, llama_shapes(208, 216, 12, 300, 32), aligned_shards=3)
    return root / "base", root / "aligned"


class Kept:
    """A target in memory."""

    def __init__(self, step):
        self.data = bytearray(step.aligned.n_bytes)

    def write(self, offset, data):
        self.data[offset : offset + data.nbytes] = data.cast("B")

    def checksum(self):
        return ""


def computed(pair, options, **how):
    events = compute(plan(*pair).steps, Kept, options, **how)
    return [(event.step.name, bytes(event.target.data)) for event in events if isinstance(event, Finished)]


@pytest.mark.parametrize("memory_bytes", [1, 64 * MIB, 4096 * MIB])
def test_every_step_is_in_one_job_and_jobs_are_in_the_order_of_their_first(pair, memory_bytes):
    options = Options(memory_bytes=memory_bytes)
    steps = plan(*pair).steps
    jobs = jobs_of(steps, options)
    assert sorted(index for job in jobs for index in job) == list(range(len(steps)))
    assert [job[0] for job in jobs] == sorted(job[0] for job in jobs)
    assert all(list(job) == sorted(job) for job in jobs)
    for job in jobs:
        assert len({(steps[i].action, steps[i].m, steps[i].n) for i in job}) == 1
        assert sum(step.aligned.n_bytes for step in steps[job[0] : job[-1] + 1]) <= max(
            SPAN_BYTES, steps[job[0]].aligned.n_bytes
        )
    together = max(len(job) for job in jobs)
    assert together == 1 if memory_bytes == 1 else together > 4


def test_the_work_begins_with_the_smallest_of_the_first(pair):
    steps = plan(*pair).steps
    jobs = jobs_of(steps, Options(memory_bytes=1))
    ordered = smallest_first(jobs, steps)
    sizes = [sum(steps[i].aligned.n_bytes for i in job) for job in ordered]
    assert sorted(ordered) == sorted(jobs)
    assert sizes[0] == min(sizes[:8]) < max(sizes[:8])
    assert ordered[8:] == jobs[8:]


@pytest.mark.parametrize("options", [Options(rank=0), Options(svd="exact"), Options(rank=64)])
def test_only_what_the_solver_iterates_on_goes_together(pair, options):
    steps = plan(*pair, options=options).steps
    alone = {len(job) for job in jobs_of(steps, options) if steps[job[0]].m <= 64 or options.rank != 64}
    assert alone == {1}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory_bytes", [1, 300 * 1024, 4096 * MIB])
@pytest.mark.parametrize("in_order", [False, True])
def test_neither_companions_nor_threads_nor_budget_change_a_bit(pair, threads, memory_bytes, in_order):
    """With next to no budget each step goes alone, and the caller still gets them all."""
    reference = computed(pair, Options(threads=1))
    options = Options(threads=threads, memory_bytes=memory_bytes)
    found = computed(pair, options, in_order=in_order, held_bytes=lambda step: step.aligned.n_bytes)
    assert dict(found) == dict(reference)
    if in_order:
        assert [name for name, _ in found] == [step.name for step in plan(*pair).steps]


def test_a_nan_spoils_no_companion(pair, tmp_path):
    """One bad tensor of a job is copied, and the others are as they were."""
    root = tmp_path / "pair"
    write_pair(root, llama_shapes(64, 96, 4, 300, 32))
    clean = dict(computed((root / "base", root / "aligned"), Options()))
    name = "model.layers.2.self_attn.q_proj.weight"
    info = next(step for step in plan(root / "base", root / "aligned").steps if step.name == name).aligned
    with info.path.open("r+b") as file:
        file.seek(info.start)
        file.write(torch.tensor([float("nan")], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    found = dict(computed((root / "base", root / "aligned"), Options(on_nonfinite="copy")))
    assert {key for key in clean if clean[key] != found[key]} == {name}
    assert found[name] == info.path.read_bytes()[info.start : info.start + info.n_bytes]
