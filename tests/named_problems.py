"""Problems whose minimum theory knows, by name, for solvers and certificates."""

from __future__ import annotations

import torch

from ufm_fast.problem import Problem
from ufm_fast.targets import TargetSets

PENALTIES = {"lambda_w": 3e-3, "lambda_h": 1e-3}


def all_sets(K: int, singles: int, pairs: int) -> TargetSets:
    """Every class alone ``singles`` times and every pair ``pairs`` times."""
    sets = [[k] for k in range(K)] + [[i, j] for i in range(K) for j in range(i)]
    pointer = torch.tensor([0, *[len(s) for s in sets]]).cumsum(0)
    return TargetSets.create(
        pointer, [k for s in sets for k in s], K, [singles] * K + [pairs] * (K * (K - 1) // 2)
    )


CASES = {
    "ce": {"classes": 8, "dim": 10, "per_class": 3},
    "ce d=K-1": {"classes": 8, "dim": 7, "per_class": 3},
    "ce bias free": {"classes": 6, "dim": 9, "bias": "free"},
    "ce bias penalised": {"classes": 6, "dim": 9, "bias": "penalised", "lambda_b": 0.02},
    "smoothing": {"classes": 7, "dim": 7, "smoothing": 0.1},
    "focal": {"classes": 7, "dim": 8, "loss": "focal", "gamma": 2.0},
    "collapsed": {"classes": 7, "dim": 8, "lambda_w": 0.5, "lambda_h": 0.5},
    "mse": {"classes": 6, "dim": 8, "loss": "mse", "per_class": 4},
    "mse counts": {"counts": [9, 5, 2, 1], "dim": 6, "loss": "mse"},
    "mse d<K": {"counts": [9, 5, 2, 1, 7], "dim": 3, "loss": "mse"},
    "mse bias free": {"classes": 6, "dim": 6, "loss": "mse", "bias": "free"},
    "mse bias penalised": {
        "classes": 6,
        "dim": 8,
        "loss": "mse",
        "bias": "penalised",
        "lambda_b": 0.5,
    },
    "mse counts bias free": {"counts": [9, 5, 2, 1], "dim": 6, "loss": "mse", "bias": "free"},
    "mse counts bias penalised": {
        "counts": [9, 5, 2, 1],
        "dim": 6,
        "loss": "mse",
        "bias": "penalised",
        "lambda_b": 0.1,
    },
    "two groups": {"counts": [20] * 3 + [4] * 4, "dim": 9},
    "two groups bias": {
        "counts": [20] * 3 + [4] * 4,
        "dim": 9,
        "bias": "penalised",
        "lambda_b": 0.02,
    },
    "minority collapse": {
        "counts": [60] * 3 + [1] * 4,
        "dim": 9,
        "lambda_w": 0.02,
        "lambda_h": 0.001,
    },
    "pick-all": {"classes": 5, "dim": 6, "loss": "pick-all", "target_sets": all_sets(5, 4, 2)},
}


def build(name: str) -> Problem:
    """The problem of that name."""
    return Problem(**{**PENALTIES, **CASES[name]})
