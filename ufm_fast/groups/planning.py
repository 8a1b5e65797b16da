"""Memory and time of a solve on groups, from the number of distinct counts and one measured
decomposition.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ufm_fast.groups.choice import most_rank
from ufm_fast.memory import available_bytes
from ufm_fast.problem import Problem

#: G x G matrices of float64 that the path holds at its peak (`bench/groups.py`), and its work in
#: decompositions of one.
MATRICES, DECOMPOSITIONS = 40, 120


@dataclass(frozen=True)
class GroupPlan:
    """Sizes in bytes, seconds. ``most_rank``: a bound on the rank of the minimiser, which dim must
    hold.
    """

    samples: int
    classes: int
    dim: int
    groups: int
    most_rank: int
    memory: int
    free: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"reduce": "groups", **asdict(self)}


def make_group_plan(problem: Problem) -> GroupPlan:
    """The plan of a problem that groups serve."""
    groups = problem.samples.groups
    number = len(groups.counts)
    return GroupPlan(
        samples=problem.num_samples,
        classes=problem.num_classes,
        dim=problem.dim,
        groups=number,
        most_rank=most_rank(problem, groups),
        memory=MATRICES * 8 * number**2,
        free=available_bytes(torch.device("cpu")),
        seconds=DECOMPOSITIONS * decomposition_seconds(number),
    )


def decomposition_seconds(size: int) -> float:
    """Seconds of a singular value decomposition of that order, measured at 256 at most."""
    tried = min(size, 256)
    matrix = np.sin(np.arange(tried**2, dtype=np.float64)).reshape(tried, tried)
    np.linalg.svd(matrix)
    began = time.perf_counter()
    np.linalg.svd(matrix)
    return (time.perf_counter() - began) * (size / tried) ** 3
