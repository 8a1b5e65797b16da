"""Kernels under ranks, on a mesh of one; `sharded_worker` has several."""

import pytest
import torch
from kernel_cases import MARKS
from strategies import BIAS_CASES, LOSS_CASES, random_point

from ufm_fast import Problem
from ufm_fast.backends import ShardedBackend, TiledBackend
from ufm_fast.layout import Mesh
from ufm_fast.objective import Objective
from ufm_fast.sharded_starts import cut
from ufm_fast.targets import TargetSets

pytestmark = MARKS
SETS = TargetSets.create([0, 2, 3, 6, 7], [0, 1, 2, 3, 1, 4, 0], 5, [1, 2, 1, 3])
WEIGHTED = TargetSets.create([0, 2, 5], [0, 1, 4, 2, 3], 5, weights=[0.5, 1.0, 2.0, 0.3, 0.7])
SOFTMAX = [
    *(case for case in LOSS_CASES if case["loss"] not in ("mse", "pick-all")),
    {"loss": "pick-all", "classes": 5, "target_sets": SETS},
    {"loss": "pick-all", "classes": 5, "target_sets": WEIGHTED},
]
#: Of the norm of a product, in each dtype.
NEAR = {"float32": 1e-5, "bfloat16": 3e-2}


def product(case, bias, lambda_b, dtype, scale=1.0):
    """A Hessian product by kernels and in float64 by torch, of the same point and direction."""
    counts = [3, 1, 2, 5, 4] if bias == "free" else [3, 0, 1, 0, 4]
    rows = {} if "target_sets" in case else {"counts": counts}
    given = {**rows, **case, "dim": 20, "bias": bias, "lambda_b": lambda_b}
    problem = Problem(**given, lambda_w=0.02, lambda_h=0.01, dtype=dtype)
    exact = Problem(**given, lambda_w=0.02, lambda_h=0.01)
    one = Objective(exact, backend=TiledBackend(), reduce="classes")
    mesh = Mesh((1, 1), 0, torch.device("cpu"))
    many = Objective(
        problem, backend=ShardedBackend(mesh, chunk=3, inner="triton"), reduce="classes"
    )
    x, v = (
        random_point(one, seed, size).map(lambda part: part.to(problem.torch_dtype).float())
        for seed, size in ((1, scale), (2, 1.0))
    )
    at, along = cut(many.layout, x), cut(many.layout, v)
    x, v = (p.map(lambda part: part.double()) for p in (x, v))
    return many.hvp(at, along).map(lambda part: part.double()), one.hvp(x, v)


@pytest.mark.parametrize(
    ("bias", "lambda_b", "dtype"),
    [*((*case, "float32") for case in BIAS_CASES), (*BIAS_CASES[-1], "bfloat16")],
)
@pytest.mark.parametrize("case", SOFTMAX, ids=range(len(SOFTMAX)))
def test_hessian_products_by_kernels(case, bias, lambda_b, dtype):
    found, exact = product(case, bias, lambda_b, dtype)
    assert found.axpy(-1.0, exact).norm() <= NEAR[dtype] * exact.norm()
