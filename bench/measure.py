"""How everything in bench/ is measured: contenders in turn (`interleave`, and ratios of calls that
ran side by side), memory in a process of its own (`in_child`), and the record of where that was.

`interleave` and `median_ratio` are those of `ufm-fast bench`; clocks of a GPU stand in `device`,
which needs no package.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
from ufm_fast.benchmark.measuring import ENVIRONMENT, interleave, median_ratio
from ufm_fast.calibration import processor_model

ROOT = Path(__file__).resolve().parents[1]

__all__ = [
    "ENVIRONMENT",
    "environment",
    "in_child",
    "in_turn",
    "interleave",
    "median_ratio",
    "peak_rss_bytes",
    "ratio",
    "reset_peak",
]


def environment() -> dict[str, str]:
    """Machine, versions, commit and date: a figure without them is no figure."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": f"{processor_model() or platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("UFM_COMMIT")
        or commit
        or "unknown",  # named where a copy of the tree has not its history
        "date": datetime.date.today().isoformat(),
        **({"device": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}),
    }


def in_turn(
    makers: Mapping[str, Callable[[], Callable[[], object]]], rounds: int, slow: float = 8.0
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of each contender, `interleave`d; reasons of those that fail). One that takes more
    than ``slow`` seconds is called once, which tells enough.
    """
    calls, once, failed = {}, {}, {}
    for name, maker in makers.items():
        try:
            call = maker()
            began = time.perf_counter()
            call()
            taken = time.perf_counter() - began
        except Exception as error:  # a rival that fails at a shape is a result
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if taken > slow:
            once[name] = [taken]
        else:
            calls[name] = call
    return {**interleave(calls, rounds, warmup=0), **once}, failed


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """`median_ratio` over the rounds that both have: one of them may have been called once."""
    rounds = min(len(a), len(b))
    return median_ratio(a[:rounds], b[:rounds])


def in_child(module: str, function: str, *arguments: object, hands_back: bool = True) -> Any:
    """What a function of a module of bench/ returns in a process of its own, by JSON.

    There, memory that is freed goes back to the system at once: else a contender would reuse what
    the set-up freed, unseen. That costs time: seconds are measured without ``hands_back``.
    Errors: RuntimeError with the last line that the child said.
    """
    code = (
        f"import json, sys; from {module} import {function}; "
        f"print(json.dumps({function}(*json.loads(sys.argv[1]))))"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(ENVIRONMENT if hands_back else {}), "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function}: {(done.stderr.splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, or since ``reset_peak``."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def reset_peak() -> None:
    """Forget the peak so far (Linux): what was allocated and freed before must not hide what
    comes.
    """
    Path("/proc/self/clear_refs").write_text("5", "ascii")
