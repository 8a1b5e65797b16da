"""Hypothesis strategies and small helpers that several test files share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import TargetSets

LOSS_CASES = [
    {"loss": "ce"},
    {"loss": "ce", "smoothing": 0.1},
    {"loss": "focal", "gamma": 2.0},
    {"loss": "focal", "gamma": 0.5},
    {"loss": "pick-all"},
    {"loss": "mse"},
]
BIAS_CASES = [("none", 0.0), ("penalised", 0.03), ("free", 0.0)]


@st.composite
def problems(
    draw: st.DrawFn, losses: list[dict[str, object]] | None = None, max_classes: int = 9
) -> Problem:
    """Ragged small problems over every loss and bias kind, empty and singleton classes included."""
    case = draw(st.sampled_from(losses or LOSS_CASES))
    bias, lambda_b = draw(st.sampled_from(BIAS_CASES))
    K, d = draw(st.integers(2, max_classes)), draw(st.integers(1, 7))
    common = {
        "dim": d,
        "bias": bias,
        "lambda_b": lambda_b,
        "lambda_w": 0.02,
        "lambda_h": 0.005,
        **case,
    }
    if case["loss"] == "pick-all" and K > 2 and draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, min(3, K - 1)), min_size=1, max_size=6))
        sets = [
            draw(st.lists(st.integers(0, K - 1), min_size=m, max_size=m, unique=True))
            for m in sizes
        ]
        if bias == "free":  # a free bias wants every class to occur
            sets += [[k] for k in range(K)]
        indptr = [0]
        for members in sets:
            indptr.append(indptr[-1] + len(members))
        counts = draw(st.lists(st.integers(1, 4), min_size=len(sets), max_size=len(sets)))
        flat = [k for members in sets for k in members]
        return Problem(classes=K, target_sets=TargetSets.create(indptr, flat, K, counts), **common)
    fewest = 1 if bias == "free" else 0
    counts = draw(
        st.lists(st.integers(fewest, 5), min_size=K, max_size=K).filter(lambda c: sum(c) > 0)
    )
    return Problem(counts=counts, **common)


def random_point(objective: Objective, seed: int, scale: float = 1.0) -> Point:
    """Gaussian point in the solver's variables."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    problem = objective.problem
    bias = None if problem.bias == "none" else normal(problem.num_classes)
    W, H = normal(problem.num_classes, problem.head_dim), normal(objective.rows.number, problem.dim)
    return Point(W, H, bias, tuple(normal(*shape) for shape in problem.trunk.shapes))


def relative(actual: Point, expected: Point) -> float:
    """Normwise relative error over all parts."""
    return actual.axpy(-1.0, expected).norm() / max(expected.norm(), 1e-300)


def simplex_logits(
    K: int, margin: float, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, W) of a collapsed point: h_k along w_k, target logit ``margin`` above the off-target ones
    (d = K + 3).
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(K + 3, K, generator=generator, dtype=torch.float64)).Q
    frame = (torch.eye(K, dtype=torch.float64) - 1.0 / K) @ basis.T
    # Slightly different lengths and directions, so that off-target logits are not all the same
    # number.
    noise = 1e-3 * torch.randn(K, K + 3, generator=generator, dtype=torch.float64)
    return (margin**0.5 * (frame + noise)).to(dtype), (margin**0.5 * frame).to(dtype)
