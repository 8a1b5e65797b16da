"""Signals that end a process from outside, as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM, SIGUSR2 and SIGHUP raise KeyboardInterrupt inside, so that a batch system's kill,
    its warning before, or a terminal that is closed, saves the run as Ctrl-C does. A SIGHUP that is
    ignored stays so: that is what nohup does.
    """
    if threading.current_thread() is not threading.main_thread():  # signals can be set there only
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals() -> list[int]:
    """The signals that end a process from outside, beside Ctrl-C, and are not ignored."""
    numbers = [
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
    ]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
