"""The solver where products lie on a GPU: the same numbers, nothing mixed up between the two memories, few waits."""

from __future__ import annotations

import pytest
import torch
from dense import Dense, OnePass
from pretend_gpu import GPU, PretendGPU, on_gpu

from lox_stream.svd import truncated_svds
from lox_stream.synthetic import matrix, power_law

RANK = 6
WAITS = 2  # for each block: the Gram matrices of the new images, and of the next block
pytestmark = pytest.mark.usefixtures("one_thread")


class Away(Dense):
    """An operator whose products lie on the GPU."""

    def __init__(self, a):
        super().__init__(a)
        self.a, self.device = on_gpu(self.a), GPU


class AwayOnePass(Away, OnePass):
    pass


def deltas(m, n, kind):
    spectra = [power_law(min(m, n), 0.55), power_law(min(m, n), 2.0), torch.ones(3), torch.linspace(1, 0.9, min(m, n))]
    return [kind(matrix(m, n, spectrum, torch.Generator().manual_seed(i))) for i, spectrum in enumerate(spectra)]


def solved(ops):
    generators = [torch.Generator().manual_seed(7) for _ in ops]
    return truncated_svds(ops, RANK, generators=generators)


@pytest.mark.parametrize("shape", [(300, 200), (150, 700), (7, 2000)])
@pytest.mark.parametrize(("here", "away"), [(Dense, Away), (OnePass, AwayOnePass)])
def test_a_gpu_gives_what_the_same_operations_give_on_the_cpu(shape, here, away):
    expected = solved(deltas(*shape, here))
    with PretendGPU():
        found = solved(deltas(*shape, away))
        assert {(svd.u.device, svd.vh.device, svd.s.device.type) for svd in found} == {(GPU, GPU, "cpu")}
    for one, other in zip(found, expected, strict=True):
        for name in ("u", "s", "vh"):
            assert torch.equal(getattr(one, name).as_subclass(torch.Tensor), getattr(other, name)), name
        facts = [(svd.error, svd.radius, svd.passes, svd.converged) for svd in (one, other)]
        assert facts[0] == facts[1]


def test_the_host_waits_twice_a_block():
    with PretendGPU() as gpu:
        (found,) = solved(deltas(900, 900, AwayOnePass)[:1])
    assert found.converged
    assert gpu.fetches <= WAITS * found.passes + 6, "a block takes a pass or two; six for norms, the start and the end"


def test_a_mixture_of_the_two_memories_is_noticed():
    with PretendGPU():
        away = on_gpu(torch.ones(3))
        with pytest.raises(AssertionError, match="of the host"):
            away + torch.ones(3)
        with pytest.raises(AssertionError, match="NumPy"):
            away.numpy()
        assert (away * 2).device == GPU
        assert (away.cpu() + torch.ones(3)).device.type == "cpu"
