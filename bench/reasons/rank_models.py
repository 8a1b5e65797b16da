"""Gradient evaluations on several ranks with and without the models of the Hessian of
`solvers.curvature`, beside one process. No clock.

One problem for each model, float64, a normal start, the default method. ``identity``: no model, as
ranks had it before 2026-11-30. Ranks are gloo processes of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
COUNTS = [3, 100, 30, 1, 5, 1, 5, 1, 100, 100, 2, 1]
PROBLEMS: dict[str, dict[str, Any]] = {
    "pairs": {"counts": [1, 2, 3, 5, 8, 13, 21, 34] * 5, "dim": 48, "lambda": 5e-5},
    "squares": {"counts": COUNTS, "dim": 12, "loss": "mse", "lambda": 1e-5},
    "sets": {"classes": 8, "multiplicities": "1:3,2:1", "dim": 8, "loss": "pick-all"}
    | {"lambda": 1e-5},
    "codes": {"classes": 40, "dim": 8, "lambda": 1e-4},
}


def solved(name: str, backend: str, *, model: bool) -> dict[str, Any]:
    """The evaluations of a solve in this process, and its value."""
    from ufm_fast import Problem, solve
    from ufm_fast.objective import Objective
    from ufm_fast.solvers import lbfgs, newton_cg
    from ufm_fast.solvers.curvature import curvature_of
    from ufm_fast.starts import make_start

    given = dict(PROBLEMS[name])
    penalty = given.pop("lambda")
    problem = Problem(**given, lambda_w=penalty, lambda_h=penalty)
    one = Objective(problem)
    start = one.to_model(make_start(one, "normal", seed=3))
    found = curvature_of if model else (lambda objective: None)
    with patch.object(lbfgs, "curvature_of", found), patch.object(newton_cg, "curvature_of", found):
        solution = solve(problem, initial=start, backend=backend, metrics=False, certificate=False)
    return {"evaluations": solution.evaluations, "value": f"{solution.value:.10e}"}


def on_ranks(name: str, ranks: int, *, model: bool) -> dict[str, Any]:
    """The same on so many ranks, as the first one says."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    with tempfile.TemporaryDirectory() as folder:
        given = [name, f"file://{folder}/store", ranks, model]
        started = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps([*given, rank])],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]
        first, *_ = [json.loads(process.communicate()[0]) for process in started]
        return first


def records(most_ranks: int = 2) -> Iterator[Any]:
    from bench.table import Record

    for name, given in PROBLEMS.items():
        setting = {key: str(value) for key, value in given.items()}
        yield Record(setting, solved(name, "tiled", model=True), f"one process, {name}")
        for ranks in range(1, most_ranks + 1):
            for model in (True, False):
                who = f"{ranks} ranks, {name if model else 'identity'}"
                yield Record(setting, on_ranks(name, ranks, model=model), who)


if __name__ == "__main__":
    import torch

    name, store, ranks, model, rank = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    print(json.dumps(solved(name, "sharded", model=model)))
    torch.distributed.destroy_process_group()
