"""What `ufm-fast plan` predicts against what happens: peak memory, and CPU seconds an evaluation, a
process a setting.

Memory in MiB: the peak above what the process held before, of the steps, the certificate and the
metrics of one solve, in a process that hands back what is freed. Linux. Seconds: CPU time of the
steps over their evaluations, one thread, so that a busy machine counts less, in a process that
keeps what is freed, as any does. ``--only PART``:
settings whose name holds it. Rates are calibrated anew, at the first setting of each kind.
``--again TABLE``: what a table of results has measured, beside what is planned now. The last record
counts the settings whose memory is within 20 % of the plan's, and whose seconds are within 1.5
times.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measure import in_child, peak_rss_bytes, reset_peak
from bench.table import Record, read
from ufm_fast import Problem, solve
from ufm_fast.plan import make_plan
from ufm_fast.solvers.callbacks import Callback
from ufm_fast.solvers.solution import Solution, StepRecord

_PHASES = ("steps", "certificate", "metrics", "all")
_UNEVEN = {"lambda_w": 1e-4, "lambda_h": 1e-5}


def _counts(classes: int, most: int = 7) -> list[int]:
    return [1 + 3 * k % most for k in range(classes)]


#: Problem and options by name; penalties far below collapse, so that steps are real ones.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ce wide": ({"counts": _counts(60), "dim": 8000}, {}),
    "ce square": ({"counts": _counts(700), "dim": 512}, {}),
    "ce thin": ({"counts": _counts(900), "dim": 50}, {"max_steps": 60}),
    "ce probabilistic": (
        {"counts": _counts(4200), "dim": 24},
        {"variables": "raw", "max_steps": 6},
    ),
    "ce samples": ({"counts": _counts(100, 200), "dim": 128}, {"reduce": "none"}),
    "ce many samples": ({"classes": 10, "per_class": 20000, "dim": 10}, {"reduce": "none"}),
    "ce smoothing": ({"counts": _counts(600), "dim": 700, "smoothing": 0.1}, {}),
    "ce bias": ({"counts": _counts(700), "dim": 500, "bias": "free"}, {}),
    "ce penalised bias": (
        {"counts": _counts(700), "dim": 500, "bias": "penalised", "lambda_b": 0.01},
        {},
    ),
    "ce float32": ({"counts": _counts(800), "dim": 900, "dtype": "float32"}, {}),
    "ce bfloat16": ({"counts": _counts(800), "dim": 900, "dtype": "bfloat16"}, {}),
    "ce gd": ({"counts": _counts(700), "dim": 2000}, {"method": "gd", "max_steps": 6}),
    "ce momentum": ({"counts": _counts(700), "dim": 2000}, {"method": "momentum", "max_steps": 6}),
    "ce adam": ({"counts": _counts(700), "dim": 2000}, {"method": "adam", "max_steps": 6}),
    "ce cg": ({"counts": _counts(700), "dim": 2000}, {"method": "cg", "max_steps": 5}),
    "ce newton": ({"counts": _counts(500), "dim": 800}, {"method": "newton-cg", "max_steps": 2}),
    "ce history 20": ({"counts": _counts(200), "dim": 1000}, {"history": 20, "max_steps": 40}),
    "ce frozen": ({"counts": _counts(600), "dim": 1500, "freeze": "w"}, {}),
    "ce reference": ({"counts": _counts(1200), "dim": 200}, {"backend": "reference"}),
    "ce margin": ({"counts": _counts(800), "dim": 500, "margin": 1.0}, {}),
    "focal": ({"counts": _counts(800), "dim": 500, "loss": "focal"}, {}),
    "focal bias": ({"counts": _counts(300), "dim": 1500, "loss": "focal", "bias": "free"}, {}),
    "pick-all": ({"classes": 40, "multiplicities": "1:3,2:1", "dim": 1000, "loss": "pick-all"}, {}),
    "mse grams": ({"counts": _counts(1500), "dim": 400, "loss": "mse"}, {}),
    "mse thin": ({"counts": _counts(20000), "dim": 32, "loss": "mse"}, {}),
    "mse residuals": ({"counts": _counts(300), "dim": 1200, "loss": "mse"}, {}),
    "mse bias": ({"counts": _counts(300), "dim": 1200, "loss": "mse", "bias": "free"}, {}),
    "mse samples": ({"counts": _counts(50, 200), "dim": 300, "loss": "mse"}, {"reduce": "none"}),
    "mse float32": ({"counts": _counts(1500), "dim": 600, "loss": "mse", "dtype": "float32"}, {}),
    "mse alternating": (
        {"counts": _counts(1500), "dim": 1000, "loss": "mse"},
        {"method": "alternating", "max_steps": 3},
    ),
    "mse alternating thin": (
        {"counts": _counts(20000), "dim": 200, "loss": "mse"},
        {"method": "alternating", "max_steps": 3},
    ),
    "mse alternating bias": (
        {"counts": _counts(400), "dim": 1200, "loss": "mse", "bias": "free"},
        {"method": "alternating", "max_steps": 3},
    ),
    "linear layers": ({"counts": _counts(300), "dim": 700, "layers": 3, "loss": "mse"}, {}),
    "relu layers": ({"counts": _counts(200), "dim": 700, "layers": 2, "activation": "relu"}, {}),
    "sphere": ({"classes": 800, "dim": 500, "constraint": "sphere", "temperature": 10.0}, {}),
    "sphere codes": ({"classes": 1500, "dim": 100, "constraint": "sphere", "temperature": 5.0}, {}),
}


class Peaks(Callback):
    """The peak memory of each phase above what was held before, and CPU seconds an evaluation of
    the steps.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.marks: list[tuple[float, float]] = []
        reset_peak()
        self.before, self._name = peak_rss_bytes(), "steps"

    def phase(self, name: str) -> None:
        name = "steps" if name == "start" else name
        self.bytes[self._name] = peak_rss_bytes() - self.before
        if name != self._name:
            reset_peak()
        self._name = name

    def log(self, record: StepRecord, point: object) -> None:
        self.marks.append((time.thread_time(), record.evaluations))

    def end(self, solution: Solution) -> None:
        self.phase("end")

    @property
    def seconds(self) -> float:
        (first, before), (last, after) = self.marks[0], self.marks[-1]
        return (last - first) / (after - before)


def setting(name: str) -> tuple[Problem, dict[str, Any]]:
    """The problem and the options of its solve."""
    given, options = SETTINGS[name]
    problem = Problem(**{**({} if given.get("constraint") else _UNEVEN), **given})
    options = {"method": "lbfgs", "history": 5, "max_steps": 20, "start": "normal", **options}
    if options["method"] != "lbfgs":
        del options["history"]
    return problem, options


def planned(name: str) -> dict[str, Any]:
    """Bytes of each phase, and seconds an evaluation."""
    problem, options = setting(name)
    names = ("reduce", "method", "history", "variables")
    made = make_plan(problem, **{name: options[name] for name in names if name in options})
    backend, method = options.get("backend", "tiled"), options["method"]
    sizes = {
        "steps": made.steps(method, backend),
        "certificate": made.proof(backend),
        "metrics": made.metrics(backend),
    }
    return {**sizes, "all": made.total(method, backend), "seconds": made.backend(backend).seconds}


def measured(name: str) -> dict[str, Any]:
    """What one setting took, in this process: bytes of each phase, and seconds an evaluation."""
    torch.set_num_threads(1)
    for loss in ("ce", "focal", "mse"):  # imports and what libraries keep
        solve(Problem(counts=_counts(9), dim=8, loss=loss), start="normal", max_steps=2)
    problem, options = setting(name)
    peaks = Peaks()
    solve(problem, **options, log_every=1, callbacks=[peaks])
    found = {phase: peaks.bytes[phase] for phase in _PHASES[:3]}
    return {**found, "all": max(peaks.bytes.values()), "seconds": peaks.seconds}


def both(name: str) -> dict[str, Any]:
    """Bytes by a process that hands back what is freed, seconds by one that does not."""
    seconds = in_child("bench.plan", "measured", name, hands_back=False)["seconds"]
    return {**in_child("bench.plan", "measured", name), "seconds": seconds}


def record(name: str, found: dict[str, float]) -> Record:
    """What was planned and measured, in MiB and milliseconds, and the ratios of the two."""
    plan, figures = planned(name), {}
    for phase in _PHASES:
        figures[f"{phase}_planned_MiB"] = round(plan[phase] / 2**20, 1)
        figures[f"{phase}_MiB"] = round(found[phase] / 2**20, 1)
    figures |= {
        "planned_ms": round(1e3 * plan["seconds"], 3),
        "ms": round(1e3 * found["seconds"], 3),
        "memory_over_planned": round(found["all"] / plan["all"], 2),
    }
    if setting(name)[1]["method"] != "alternating":  # whose evaluations are solves of their own
        figures["time_over_planned"] = round(found["seconds"] / plan["seconds"], 2)
    return Record({"setting": name}, figures)


def before(path: str) -> dict[str, dict[str, float]]:
    """What a table has of each setting, the latest."""
    found: dict[str, dict[str, float]] = {}
    for row in read(Path(path), "plan"):
        if "ms" in row.measured:
            sizes = {phase: float(row.measured[f"{phase}_MiB"]) * 2**20 for phase in _PHASES}
            seconds = float(row.measured["ms"]) / 1e3
            found[str(row.case["setting"])] = {**sizes, "seconds": seconds}
    return found


def records(only: str = "", again: str = "") -> Iterator[Record]:
    torch.set_num_threads(1)
    os.environ["UFM_FAST_CACHE"] = tempfile.mkdtemp()  # the rates of this moment, not of another
    old = before(again) if again else None
    memories, times = [], []
    for name in (name for name in SETTINGS if only in name and (old is None or name in old)):
        try:
            found = old[name] if old is not None else both(name)
        except RuntimeError as error:
            yield Record({"setting": name}, {}, note=str(error))
            continue
        row = record(name, found)
        memories.append(row.measured["memory_over_planned"])
        times.append(row.measured.get("time_over_planned"))
        yield row
    counts = {
        "settings": len(memories),
        "memory_within": sum(abs(memory - 1) <= 0.2 for memory in memories),
        "timed": sum(ratio is not None for ratio in times),
        "time_within": sum(2 / 3 <= ratio <= 1.5 for ratio in times if ratio is not None),
    }
    yield Record({"setting": "in all"}, counts)
