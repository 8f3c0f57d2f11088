"""The poison of tests/conftest.py is there in every thread, and what allocates still works."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_an_element_that_nobody_wrote_is_nan(dtype):
    like = torch.zeros(3, dtype=dtype)
    for made in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3), like.new_empty((2, 3))):
        assert made.dtype == dtype
        assert made.isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_an_integer_that_nobody_wrote_is_the_largest(dtype):
    assert (torch.empty(2, 2, dtype=dtype) == torch.iinfo(dtype).max).all()
    assert torch.empty(2, dtype=torch.bool).all()


def test_threads_get_the_same_poison():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.empty, 5).result().isnan().all()


def test_every_way_to_ask_for_memory_still_works():
    out = torch.zeros(4)
    assert torch.empty(4, out=out) is out
    assert torch.empty(0).numel() == 0
    assert torch.empty((2, 3), device="meta").shape == (2, 3)
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(1, 2, 2, 2, memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)
    assert torch.empty_strided((2, 3), (1, 2)).stride() == (1, 2)
