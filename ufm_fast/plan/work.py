"""Operations of an evaluation and of a step: of the head, as each backend says, of hidden layers
and of vectors. `calibration` turns them into seconds.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from ufm_fast.backends import BACKENDS, make_backend
from ufm_fast.backends.base import HeadPlan, HeadShape
from ufm_fast.calibration import Terms
from ufm_fast.errors import InputError
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.solvers.curvature.table import curvature_of


def terms_of(
    objective: Objective, history: float, head: HeadPlan | None = None, method: str = "lbfgs"
) -> Terms:
    """The terms of a step of a method: the head (of the tiled backend, unless given), hidden
    layers, vectors, and of L-BFGS with so many pairs the recursion and the model of the Hessian. On
    spheres each pair is carried along, 45 passes.
    """
    problem, R, model = objective.problem, objective.rows.number, curvature_of(objective)
    head = head or heads(problem, R, torch.device(problem.device))["tiled"]
    recursive, curved = method in ("auto", "lbfgs"), objective.geometry.curved
    served = model is not None and (recursive or (model.newton and method == "newton-cg"))
    passed, built = model.work(objective) if model is not None and served else (0.0, 0.0)
    flops = head.flops + trunk_flops(problem, R) + built
    passes = (
        20.0
        + (4.0 * history if recursive else 0.0)
        + (55.0 + 45.0 * history * recursive if curved else 0.0)
    )
    return Terms(flops, head.passes, passes * problem.entries(R), R, passed)


def trunk_flops(problem: Problem, R: int) -> float:
    return 6.0 * R * problem.trunk.entries


def heads(problem: Problem, R: int, device: torch.device) -> dict[str, HeadPlan]:
    """What each backend says of the head; those that this device or dtype has not are left out."""
    found = {}
    shape = HeadShape(
        problem.loss,
        R,
        problem.num_classes,
        problem.head_dim,
        problem.samples.occupied,
        problem.bias != "none",
        problem.torch_dtype,
        device,
        problem.dense,
        problem.angular is not None,
    )
    for name in BACKENDS:
        try:
            backend = make_backend(name, device, problem.torch_dtype)
        except InputError:
            continue
        if name != "auto":
            found[name] = backend.plan(shape)
    return found


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Floating-point operations a second of square products on the device, the best of a few."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(left)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
