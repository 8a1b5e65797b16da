"""One solve on the device: evaluations of L-BFGS by the kernels, and where their time goes.

Cross-entropy of balanced classes, a sample a row, penalties of 0.05 / K, from a normal start. `ms`
is the wall time of an evaluation with the solver's own work; of that wall time, by a profiler in a
second solve, `busy_percent` passes in kernels of any kind, `kernels_percent` in those of
ufm_kernels and `products_percent` in the library's matrix products. The rest of the busy time is
the solver's vectors, the rest of the wall time waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from device import CUDA, DEVICE, synchronise, with_peak

EVALUATIONS = 100
_PRODUCTS = ("gemm", "cutlass", "nvjet", "xmma")  # in the names of a library's matrix products


def solver(
    N: int, K: int, d: int, dtype: torch.dtype, evaluations: int
) -> Callable[[], tuple[float, float]]:
    """A call that solves from the start for so many evaluations and returns those spent and the
    value that was reached.
    """
    from ufm_fast.backends.triton import TritonBackend
    from ufm_fast.objective import Objective
    from ufm_fast.problem import Problem
    from ufm_fast.solvers.lbfgs import LBFGS
    from ufm_fast.starts import make_start

    penalty = 0.05 / K
    problem = Problem(
        classes=K,
        dim=d,
        per_class=N // K,
        lambda_w=penalty,
        lambda_h=penalty,
        device=DEVICE,
        dtype=str(dtype).removeprefix("torch."),
    )

    def run() -> tuple[float, float]:
        objective, method = Objective(problem, backend=TritonBackend(), reduce="none"), LBFGS()
        state = method.init(objective, make_start(objective, "normal"))
        while objective.evaluations < evaluations and state.outcome is None:
            state = method.step(objective, state)
        synchronise()
        return objective.evaluations, state.evaluation.value

    return run


def shares(call: Callable[[], object]) -> dict[str, float]:
    """Percent of a call's wall time in kernels of any kind, in ours and in the library's products;
    nothing on a CPU.
    """
    if not CUDA:
        return {}
    from torch.profiler import ProfilerActivity, profile

    from ufm_kernels.compile_gate import all_builds

    ours = {build.kernel.split(".")[1] for build in all_builds((90,))}
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        began = time.perf_counter()
        call()
        wall = 1e6 * (time.perf_counter() - began)
    spent = {
        event.key: event.self_device_time_total
        for event in record.key_averages()
        if event.self_device_time_total > 0
    }
    return {
        "busy_percent": 100 * sum(spent.values()) / wall,
        "kernels_percent": 100 * sum(us for name, us in spent.items() if name in ours) / wall,
        "products_percent": 100
        * sum(us for name, us in spent.items() if any(x in name for x in _PRODUCTS))
        / wall,
    }


def solve_rows(task: tuple[str, int, int, int, str, torch.dtype]) -> Iterator[dict]:
    """One row: a solve that is timed after one that warms up, and its shares by a third."""
    name, N, K, d, stage, dtype = task
    warm, count = (3, EVALUATIONS) if CUDA else (1, 2)
    solver(N, K, d, dtype, warm)()  # compiles
    run = solver(N, K, d, dtype, count)
    began = time.perf_counter()
    (spent, value), peak = with_peak(run)
    seconds = time.perf_counter() - began
    yield {
        "task": name,
        "N": N,
        "K": K,
        "d": d,
        "stage": stage,
        "dtype": dtype,
        "contender": "ufm_fast lbfgs",
        "evaluations": spent,
        "ms": 1e3 * seconds / spent,
        "value": value,
        "peak_extra_bytes": peak,
        "tflops_6NKd": 6 * N * K * d * spent / seconds / 1e12,
        **shares(run),
    }
