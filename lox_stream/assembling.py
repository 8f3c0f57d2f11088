"""Matrices whose parts lie scattered: each part is computed in one piece, and written once the whole is there."""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor

from lox_stream.reader import grouped
from lox_stream.regions import Region


class Writes(Protocol):
    """Where a tensor's bytes go."""

    def write(self, offset: int, data: memoryview) -> None: ...


class Assembly:
    """The wholes of a tensor that are not complete yet, each in memory of its own. Several threads may add to it."""

    def __init__(self, target: Writes) -> None:
        self._target = target
        self._wholes: dict[int, Tensor] = {}  # by the place of the first element
        self._missing: dict[int, int] = {}  # elements
        self._lock = threading.Lock()

    def add(self, region: Region, first: int, tile: Tensor) -> None:
        """Take the elements first, first + 1, ... of a region; the last ones of a whole write it."""
        with self._lock:
            whole = self._wholes.get(region.start)
            if whole is None:
                whole = self._wholes[region.start] = torch.empty(region.span, dtype=tile.dtype)
                self._missing[region.start] = region.span
        _put(tile.reshape(-1), grouped(whole, region), first)
        with self._lock:
            self._missing[region.start] -= tile.numel()
            if self._missing[region.start]:
                return
            del self._wholes[region.start], self._missing[region.start]
        self._target.write(region.start * whole.element_size(), whole.view(torch.uint8).numpy().data)


def _put(values: Tensor, there: Tensor, first: int) -> None:
    """Values to the elements first, first + 1, ... of (groups, length): the end of a group, whole ones, a beginning."""
    length = there.shape[1]
    while len(values):
        group, at = divmod(first, length)
        whole = len(values) // length if at == 0 else 0
        count = whole * length or min(length - at, len(values))
        place = there[group : group + whole] if whole else there[group, at : at + count]
        place.copy_(values[:count].view(place.shape))
        values, first = values[count:], first + count
