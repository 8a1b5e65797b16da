"""Clock and memory of the machine a benchmark runs on: CUDA, or a CPU where a script is only
rehearsed.

A rehearsal runs the kernels under triton's interpreter at shapes of a few dozen: it shows that a
script and its rivals work, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FEWEST = 3  # rounds, however long a call takes


def arguments(parser: argparse.ArgumentParser, out: str) -> argparse.Namespace:
    """What a script for a device was asked, with --rehearse and --out; exit status 2 where the
    machine is not for it.
    """
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="tiny shapes on a CPU, under the interpreter: no figures",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / out,
        help="stem of what it writes",
    )
    chosen = parser.parse_args()
    if chosen.rehearse == CUDA:
        parser.exit(
            2,
            "--rehearse is for a CPU\n"
            if CUDA
            else f"{parser.prog} needs a CUDA device; torch sees none here\n",
        )
    if chosen.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    return chosen


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0]) if CUDA else 1 << 30


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def usable() -> bool:
    """Whether the device still answers: after an illegal access no later call of the process
    does.
    """
    try:
        synchronise()
    except RuntimeError:
        return False
    return True


def forget() -> None:
    """Hand cached memory back, so that one contender's peak is not another's failure."""
    if CUDA:
        torch.cuda.empty_cache()


def milliseconds(call: Callable[[], object]) -> float:
    """One call by CUDA events, or by the clock."""
    synchronise()
    if not CUDA:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    calls: dict[str, Callable[[int], object]],
    seconds: float,
    most: int,
    buffers: int = 1,
    *,
    warm: bool = False,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(milliseconds of every call, reasons of failures): one launch of each a round, rotating
    through the inputs.

    The order changes from round to round: what ran before sets the clock that the card's power
    limit allows.

    As many rounds as fit the seconds, between 3 and ``most``; the first pass warms up and tells how
    long a round takes. A call that raises is out from then on, and the others go on. warm: they
    need no first pass, and run ``most`` times.
    """
    rotation, order = cycle(range(buffers)), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}

    def take(name: str, index: int) -> float:
        try:
            return milliseconds(lambda: calls[name](index))
        except Exception as error:  # a rival that fails is a result, not the end of the run
            failed[name] = reason(error)
            times.pop(name)
            forget()
            return 0.0

    rounds = most
    if not warm:
        spent = sum(take(name, 0) for name in calls)
        rounds = max(min(FEWEST, most), min(most, int(1e3 * seconds / max(spent, 1e-3))))
    for _ in range(rounds):
        index = next(rotation)
        for name in order.sample(list(times), len(times)):
            taken = take(name, index)
            if name in times:
                times[name].append(taken)
    return times, failed


def reason(error: Exception) -> str:
    """What went wrong, in the length of a table's cell."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def with_peak(call: Callable[[], object]) -> tuple[object, int]:
    """(result of one call, peak allocation above what was there before, the result included; 0 on a
    CPU).
    """
    if not CUDA:
        return call(), 0
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    synchronise()
    return result, torch.cuda.max_memory_allocated() - before
