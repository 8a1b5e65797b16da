"""The plan of a problem, put together."""

from __future__ import annotations

import torch

from ufm_fast.backends.base import compute_dtype
from ufm_fast.calibration import rates_of, seconds
from ufm_fast.errors import InputError
from ufm_fast.memory import available_bytes
from ufm_fast.objective import Objective
from ufm_fast.plan.base import BackendPlan, Plan
from ufm_fast.plan.memory import (
    certificate_bytes,
    method_bytes,
    metrics_bytes,
    tape_bytes,
    trunk_workspace,
)
from ufm_fast.plan.notes import notes_of
from ufm_fast.plan.work import heads, matmul_rate, terms_of, trunk_flops
from ufm_fast.problem import Problem
from ufm_fast.solvers.table import HISTORY, METHODS
from ufm_fast.theory.separation import held_together


def make_plan(
    problem: Problem,
    *,
    reduce: str = "auto",
    method: str = "auto",
    history: int | None = None,
    variables: str = "balanced",
    certificate: bool = True,
) -> Plan:
    """The plan of a problem on its device, whose rates are measured at first use in a few seconds
    (`calibration`).

    Arguments as in ``solve``. Errors: InputError for an unknown method, or a history below 1.
    """
    _check(problem, method, history)
    chosen = problem.reduction(reduce)
    K, N = problem.num_classes, problem.num_samples
    reduced = problem.rows("classes").number
    R = reduced if chosen == "classes" else N
    dtype = compute_dtype(problem.torch_dtype)
    size = (problem.entries(R) + (0 if problem.bias == "none" else K)) * dtype.itemsize
    objective = Objective(problem, reduce=chosen, variables=variables)
    pairs = HISTORY if history is None else history
    device = torch.device(problem.device)
    backends, flops = _backends(objective, pairs, method, device)
    plan = Plan(
        device=str(device),
        dtype=problem.dtype,
        samples=N,
        classes=K,
        dim=problem.dim,
        widths=problem.trunk.widths,
        reduce=chosen,
        rows=R,
        rows_unreduced=N,
        parameters=size,
        gradient=size,
        hidden=problem.trunk.entries * dtype.itemsize,
        tape=tape_bytes(problem, R, dtype.itemsize),
        methods=method_bytes(objective, size, pairs),
        flops=flops,
        rate=matmul_rate(dtype, device),
        backends=backends,
        certificate=certificate_bytes(problem, R) if certificate else 0,
        measuring=metrics_bytes(problem, R),
        free=available_bytes(device),
        notes=[],
    )
    said = notes_of(plan, reduced, method, vectors=problem.dense)
    plan.notes.extend([*filter(None, [held_together(problem)]), *said])
    return plan


def _check(problem: Problem, method: str, history: int | None) -> None:
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    refusal = METHODS[method].refuses(problem)
    if refusal:
        raise InputError(f"method {method} {refusal}")
    if history is not None and history < 1:
        raise InputError(f"history must be at least 1, got {history}")


def _backends(
    objective: Objective, history: int, method: str, device: torch.device
) -> tuple[list[BackendPlan], float]:
    """The head on each backend that there is, and what the trunk takes beside it; the usual
    operations of an evaluation.
    """
    problem, R = objective.problem, objective.rows.number
    work, second = trunk_workspace(problem, R, objective.dtype.itemsize)
    plans, usual, rates = [], 0.0, rates_of(problem, terms_of)
    for name, head in heads(problem, R, device).items():
        usual = trunk_flops(problem, R) + head.flops if name == "tiled" else usual
        time = seconds(terms_of(objective, history, head, method), rates)
        plans.append(
            BackendPlan(
                name,
                head.chunk,
                head.workspace + work,
                head.workspace_hessian + second,
                head.kept,
                time,
            )
        )
    return plans, usual
