"""Seconds by phase: each phase's own, without those of the phases inside it.

watch = Stopwatch()
with watch("solver"):
    with watch("logits"):
        ...
watch.seconds  # {"solver": .., "logits": ..}

What runs on a device is waited for at both ends of a phase, so that its time is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


class NoWatch:
    """Measures nothing, at the price of a call."""

    _nothing = nullcontext()
    seconds: Mapping[str, float] = MappingProxyType({})

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        return self._nothing

    def each(self, phase: str, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items; what making each of them takes is the phase's."""
        return iter(items)


NO_WATCH = NoWatch()


class Stopwatch(NoWatch):
    """``seconds``: by phase, in the order in which they first began. ``device``: what it waits
    for.
    """

    def __init__(
        self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._clock, self._open = clock, [""]
        self._mark = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._turn(phase)
        try:
            yield
        finally:
            self._turn(None)

    def each(self, phase: str, items: Iterable[_Item]) -> Iterator[_Item]:
        iterator = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _turn(self, phase: str | None) -> None:
        """The time so far is that of the phase that is open; open another in it, or close it."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        now = self._clock()
        if self._open[-1]:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now
        if phase is None:
            self._open.pop()
        else:
            self._open.append(phase)
            self.seconds.setdefault(phase, 0.0)
