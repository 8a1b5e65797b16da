"""What `ufm-fast plan` predicts against what happens: peak memory, and CPU seconds an evaluation, a
process a setting.

    python bench/plan.py [--only PART] [--again RESULT.csv] [--out FILE.csv]

Memory in MiB: the peak above what the process held before, of the steps, the certificate and the
metrics of one solve. The C library must hand back what is freed, which the script asks it for
(MALLOC_MMAP_THRESHOLD_). Linux. Seconds: CPU time of the steps over their evaluations, one thread,
so that a busy machine counts less.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import peak_rss_bytes, reset_peak, write_csv

from ufm_fast import Problem, solve
from ufm_fast.plan import make_plan
from ufm_fast.solvers.callbacks import Callback
from ufm_fast.solvers.solution import Solution, StepRecord

_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
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


def planned(name: str) -> tuple[Problem, dict[str, Any], dict[str, Any]]:
    """The problem, its options, and what is planned."""
    given, options = SETTINGS[name]
    problem = Problem(**{**({} if given.get("constraint") else _UNEVEN), **given})
    options = {"method": "lbfgs", "history": 5, "max_steps": 20, "start": "normal", **options}
    if options["method"] != "lbfgs":
        del options["history"]
    names = ("reduce", "method", "history", "variables")
    made = make_plan(problem, **{name: options[name] for name in names if name in options})
    backend, method = options.get("backend", "tiled"), options["method"]
    sizes = {
        "steps": made.steps(method, backend),
        "certificate": made.proof(backend),
        "metrics": made.metrics(backend),
    }
    return (
        problem,
        options,
        {**sizes, "all": made.total(method, backend), "seconds": made.backend(backend).seconds},
    )


def measured(name: str) -> dict[str, Any]:
    """The numbers of one setting, in this process."""
    problem, options, plan = planned(name)
    peaks = Peaks()
    solve(problem, **options, log_every=1, callbacks=[peaks])
    found = {phase: peaks.bytes[phase] for phase in ("steps", "certificate", "metrics")}
    return rounded(
        name, plan, {**found, "all": max(peaks.bytes.values()), "seconds": peaks.seconds}
    )


def in_child(name: str) -> dict[str, Any] | None:
    """``measured`` in a process of its own: a fork, which needs no imports anew."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as file:
            json.dump(measured(name), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    return json.loads(text) if os.waitpid(child, 0)[1] == 0 else None


def rounded(name: str, plan: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Bytes in MiB, seconds in milliseconds, and the ratios of what was measured to what was
    planned.
    """
    row: dict[str, Any] = {"setting": name}
    for key in ("steps", "certificate", "metrics", "all"):
        row |= {f"{key} planned": round(plan[key] / 2**20, 1), key: round(found[key] / 2**20, 1)}
    row |= {"ms planned": round(1e3 * plan["seconds"], 3), "ms": round(1e3 * found["seconds"], 3)}
    return {
        **row,
        "memory": round(found["all"] / plan["all"], 2),
        "time": round(found["seconds"] / plan["seconds"], 2),
    }


def again(row: dict[str, str]) -> dict[str, Any]:
    """A row of a result, planned anew."""
    found = {key: float(row[key]) * 2**20 for key in ("steps", "certificate", "metrics", "all")}
    return rounded(
        row["setting"], planned(row["setting"])[2], {**found, "seconds": float(row["ms"]) / 1e3}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument(
        "--again", type=Path, help="a result: its measurements beside what is planned now"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ENVIRONMENT})
    for loss in ("ce", "focal", "mse"):
        solve(
            Problem(counts=_counts(9), dim=8, loss=loss), start="normal", max_steps=2
        )  # imports and what libraries keep
    rows = []
    if args.again:
        rows = [
            again(row)
            for row in csv.DictReader(x for x in args.again.open() if not x.startswith("#"))
        ]
    for name in (name for name in SETTINGS if args.only in name and not args.again):
        found = in_child(name)
        if found is None:
            print(f"{name}: failed", flush=True)
            continue
        rows.append(found)
        print(rows[-1], flush=True)
    within = (
        sum(abs(row["memory"] - 1) <= 0.2 for row in rows),
        sum(2 / 3 <= row["time"] <= 1.5 for row in rows),
    )
    print(
        f"of {len(rows)}: memory within 20 % {within[0]}, seconds an evaluation within 1.5 times "
        f"{within[1]}"
    )
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
