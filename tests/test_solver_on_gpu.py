"""The solver where products lie on a GPU: the same numbers, nothing mixed up between the two memories, few waits."""

from __future__ import annotations

import pytest
import torch
from dense import Dense, OnePass
from pretend_gpu import GPU, PretendGPU, on_gpu

from lox_stream.svd import truncated_svds
from lox_stream.synthetic import matrix, power_law

RANK = 6
pytestmark = pytest.mark.usefixtures("one_thread")


class Away(Dense):
    """An operator whose products lie on the GPU."""

    def __init__(self, a):
        super().__init__(a)
        self.a, self.device = on_gpu(self.a), GPU
        self.squares = None

    def squared_norm(self):
        """Fetched once, as `DeltaOnCard` does it."""
        if self.squares is None:
            self.squares = super().squared_norm()
        return self.squares


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


def test_the_host_waits_twice_a_block_and_four_times_a_matrix():
    """For the Gram matrices of its images and of the next block; the norm, if it is finite, and the first block."""
    with PretendGPU() as gpu:
        (found,) = solved(deltas(900, 900, AwayOnePass)[:1])
    assert found.converged
    blocks = found.passes - 2  # the random rows take a pass, and so do their images
    assert (blocks, gpu.fetches) == (6, 2 * 6 + 4), "docs/gpu.md has these numbers"


def test_a_mixture_of_the_two_memories_is_noticed():
    with PretendGPU():
        away = on_gpu(torch.ones(3))
        with pytest.raises(AssertionError, match="of the host"):
            away + torch.ones(3)
        with pytest.raises(AssertionError, match="NumPy"):
            away.numpy()
        assert (away * 2).device == GPU
        assert (away.cpu() + torch.ones(3)).device.type == "cpu"
