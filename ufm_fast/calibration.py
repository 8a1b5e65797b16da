"""Seconds an evaluation of a solve on this machine, from a calibration of a few seconds that is
kept.

A step's time is taken for a sum of terms, each with a rate of its own:

    1                     what Python and torch take for their calls
    flops                 of the head's products, of hidden layers, and of building a model of the
                          Hessian now and then
    passes                over R x K exponentials of softmax losses
    rows                  vectors of a number a row
    model                 passes over that model
    vectors               passes of the method over vectors of the size of the parameters

Small problems of a few shapes are solved for a dozen steps, and the rates are fitted to them
without going negative, relatively (`scipy.optimize.nnls`). They are kept in the user's cache folder
by processor, threads, versions, device, dtype and kind of loss, so that a second plan takes none of
that time. With one thread CPU time is measured, which other processes disturb less.

Decisions

2026-11-30. The rate of one square product, which stood for all, was right for square heads and up
to 5 times off for others (d = 8,000 at K = 60). `bench/plan.py` has what the fit predicts and what
is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch

from ufm_fast.losses import SquaredError
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.runs.files import WriteError, pretty_json, read_json, write_text
from ufm_fast.solvers.solution import StepRecord
from ufm_fast.solving import solve
from ufm_fast.version import __version__

VERSION = 1  # of the terms: rates of others are not read
#: (classes, samples of each, dim, variables): products and passes in every proportion, milliseconds
#: each. In raw variables there is no model of the Hessian; the others have that of softmax losses
#: with d >= K, of codes, or of squared errors.
_SHAPES = (
    (10, 1, 8, "raw"), (300, 1, 16, "raw"), (800, 1, 8, "raw"),
    (30, 1, 600, "raw"), (20, 1, 4000, "raw"), (300, 1, 300, "raw"),
    (700, 1, 300, "raw"), (10, 1500, 10, "raw"), (20, 100, 200, "raw"),
    (200, 1, 220, "balanced"), (300, 1, 12, "balanced"), (100, 1, 24, "balanced"),
)  # fmt: skip
_STEPS, _HISTORY = 12, 4
_MEAN_HISTORY = 3.2  # pairs that a step has on the way there


@dataclass(frozen=True)
class Terms:
    """The terms of a step, without their rates."""

    flops: float
    passes: float  # over the R x K exponentials
    vectors: float  # numbers that the method's passes over vectors touch
    rows: float  # of the head
    model: float = 0.0  # numbers that the model of the Hessian is passed over

    def row(self) -> list[float]:
        return [1.0, self.flops, self.passes, self.vectors, self.rows, self.model]


def seconds(terms: Terms, rates: list[float]) -> float:
    """Of an evaluation."""
    return float(np.dot(terms.row(), rates))


#: The terms of an objective's step with so many pairs of history.
CountTerms = Callable[[Objective, float], Terms]


def rates_of(problem: Problem, terms_of: CountTerms) -> list[float]:
    """The rates for problems of this kind, from the cache or measured; ``terms_of`` counts."""
    kind = {
        "loss": "mse" if isinstance(problem.loss, SquaredError) else "softmax",
        "dtype": problem.dtype,
    }
    place = _cache_file({**kind, **_machine(torch.device(problem.device))})
    with suppress(Exception):  # no cache, or none of ours: measure
        content = read_json(place, "cache")
        if content["version"] == VERSION and len(content["rates"]) == len(fields(Terms)) + 1:
            return [float(rate) for rate in content["rates"]]
    rates = _fitted(problem, terms_of)
    with suppress(
        OSError, WriteError
    ):  # a cache that can't be written costs the next plan its seconds
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, pretty_json({"version": VERSION, "rates": rates, **kind}))
    return rates


def _machine(device: torch.device) -> dict[str, Any]:
    """What rates depend on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "processor": f"{name} {processor_model()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ufm-fast": __version__,
        "device": device.type,
    }


def processor_model() -> str:
    """The processor's model by /proc/cpuinfo; nothing where there is none."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return ""


def _cache_file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = os.environ.get("UFM_FAST_CACHE") or platformdirs.user_cache_dir("ufm-fast")
    return Path(folder) / f"rates-{digest}.json"


def _fitted(problem: Problem, terms_of: CountTerms) -> list[float]:
    from scipy.optimize import nnls  # type: ignore[attr-defined]

    rows, times = [], []
    loss = "mse" if isinstance(problem.loss, SquaredError) else "ce"
    for classes, per_class, dim, variables in _SHAPES:
        small = Problem(
            counts=[per_class + k % 3 for k in range(classes)],
            dim=dim,
            loss=loss,
            dtype=problem.dtype,
            device=problem.device,
            lambda_w=1e-4,
            lambda_h=1e-5,
        )
        objective = Objective(
            small, reduce="classes" if per_class == 1 else "none", variables=variables
        )
        rows.append(terms_of(objective, _MEAN_HISTORY).row())
        times.append(measured(objective))
    relative = np.array(rows) / np.array(times)[:, None]
    scale = np.where(relative.max(0) > 0, relative.max(0), 1.0)
    found, _ = nnls(relative / scale, np.ones(len(times)))
    return [float(rate) for rate in found / scale]


def measured(objective: Objective) -> float:
    """Seconds an evaluation of L-BFGS on its problem, the better of two tries."""
    problem = objective.problem
    alone = torch.get_num_threads() == 1 and torch.device(problem.device).type == "cpu"
    clock = time.thread_time if alone else time.perf_counter
    best = float("inf")
    for _ in range(2):
        marks: list[tuple[float, float]] = []

        def mark(
            record: StepRecord, point: object, marks: list[tuple[float, float]] = marks
        ) -> None:
            marks.append((clock(), record.evaluations))

        solve(
            problem,
            method="lbfgs",
            start="normal",
            reduce=objective.reduce,
            variables=objective.variables,
            history=_HISTORY,
            max_steps=_STEPS,
            log_every=_STEPS,
            certificate=False,
            metrics=False,
            tol=1e-15,
            on_log=mark,
        )
        (first, before), (last, after) = marks[0], marks[-1]
        best = min(best, (last - first) / max(after - before, 1.0))
    return best
