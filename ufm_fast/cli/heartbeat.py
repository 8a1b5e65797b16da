"""Words while a solve takes long and shows nothing: what it does now, after 10 s, 30 s, and then
every minute.

A thread speaks, for the work is in one call that may take minutes: the start of 1e8 rows, a
certificate, a step. Where a bar is shown it speaks of what the bar can't show.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ufm_fast.solvers.callbacks import Callback

if TYPE_CHECKING:
    from types import TracebackType

#: Seconds until the first words, then until the next; the last is repeated.
WAITS = (10.0, 20.0, 30.0, 60.0)
_WORDS = {
    "start": "making the start",
    "steps": "on the first step",
    "certificate": "proving how good the point is",
    "metrics": "measuring the point",
}


class Heartbeat(Callback):
    """``say`` takes a line; ``bar``: whether steps are shown otherwise. Nothing is said where it is
    not ``shown``.
    """

    def __init__(
        self, say: Callable[[str], None], *, shown: bool = True, bar: bool = False
    ) -> None:
        self.say, self.shown, self.bar = say, shown, bar
        self.size = ""  # of the problem, once it is known
        self._doing, self._stepping = "reading and checking the problem", False
        self._begun, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        if self.shown:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self.shown:
            self._thread.join()

    def doing(self, words: str) -> None:
        self._doing, self._stepping = words, False

    def phase(self, name: str) -> None:
        self.doing(_WORDS[name])

    def step(self, step: int, value: float, gradient_norm: float) -> None:
        self._stepping = True
        self._doing = f"step {step:,}, value {value:.9g}, gradient {gradient_norm:.1e}"

    def _run(self) -> None:
        number = 0
        while not self._over.wait(WAITS[min(number, len(WAITS) - 1)]):
            number += 1
            if not (self.bar and self._stepping):
                self.say(f"{time.monotonic() - self._begun:.0f} s: {self._doing}{self.size}")
