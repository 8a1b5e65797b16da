"""How everything here is timed: contenders in turn, in random order, and ratios of calls that ran
side by side.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

#: What was freed goes back to the system at once: else a contender would reuse it, unseen.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender, called round by round in random order, so that a machine's drift
    touches all alike.
    """
    for _ in range(warmup):
        for function in contenders.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            settle()
            start = time.perf_counter()
            contenders[name]()
            settle()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def settle() -> None:
    """Wait for what runs on a device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a / b: the pairs of one round ran side by side."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def number_of(code: str) -> int:
    """The last word that Python code prints in a process of its own."""
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return int(done.stdout.split()[-1])
