"""Seconds of a certificate: exact at K = 1000, 2000, 4096, probabilistic beyond; cross-entropy,
float64.

The point is a spectral start of imbalanced counts; what a certificate costs does not depend on how
good the point is, but for the probabilistic one, whose Lanczos iteration ends earlier where the
norm stands apart. ``--swept`` adds the probabilistic ones as they are where the gradient finds no
room in memory: each product sweeps the classes anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest.mock import patch

import torch

from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.theory.certificates import EXACT_CLASSES, certify
from ufm_fast.theory.certificates import softmax as module


def measure(K: int, d: int, gradient: str) -> Record:
    counts = torch.logspace(0, 2, K, dtype=torch.float64).round().long()
    problem = Problem(counts=counts, dim=d, lambda_w=1e-3, lambda_h=1e-3 / int(counts.sum()))
    solution = solve(problem, max_steps=0, metrics=False, certificate=False)
    began = time.perf_counter()
    found = certify(problem, problem.rows("classes"), solution.point)
    seconds = time.perf_counter() - began
    return Record(
        {"K": K, "d": d},
        {
            "kind": found.kind,
            "seconds": round(seconds, 2),
            "relative_gap": f"{found.relative_gap:.3g}",
            "spectral_ratio": f"{found.spectral_ratio:.6g}",
        },
        gradient,
    )


def records(
    classes: str = "1000,2000,4096,8413", dim: int = 64, swept: bool = False
) -> Iterator[Record]:
    numbers = [int(word) for word in classes.split(",")]
    for K in numbers:
        yield measure(K, dim, "held")
    for K in (K for K in numbers if swept and K > EXACT_CLASSES):
        with patch.object(module, "available_bytes", lambda device: 0):
            yield measure(K, dim, "swept")
