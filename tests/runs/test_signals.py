"""Signals from outside act as Ctrl-C."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ufm_fast.runs.signals import terminate_like_interrupt


def test_signals_of_a_scheduler_and_of_a_closed_terminal_interrupt() -> None:
    def hang_on(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        with terminate_like_interrupt(), pytest.raises(KeyboardInterrupt):
            hang_on(number)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with terminate_like_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
