"""Where the model of `pairs` begins: a proximal step on the convex problem, and the gauge in which
the factors of a softmax loss with one row a class are nearly diagonal.

Both are singular value decompositions of the size of the point, made once. Of ranks each gathers
what they are made of, and all take the first one's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.sharded_starts import cut
from ufm_fast.spread import Spread
from ufm_fast.starts import levels


def fix_gauge(x: Point) -> Point:
    """The point with its factors rotated (`_rotated`), of ranks by each of them as a whole."""
    if x.layout is None:
        return _rotated(x)
    spread = Spread(x.layout, "curvature")
    turned = _rotated(Point(spread.whole(x.W), spread.whole(x.H)))
    here = cut(x.layout, turned.map(spread.first))
    return replace(x, W=here.W, H=here.H)


def _rotated(x: Point) -> Point:
    """Rotate R^d so that the first K columns of A + B are symmetric positive semidefinite (its
    polar factor).

    A and B span at most 2 K dimensions. Where d is larger they are taken into those first, which no
    d x d matrix is needed for.
    """
    K, d = x.W.shape
    if d > 2 * K:
        basis = torch.linalg.qr(torch.cat([x.W, x.H]).double().T).Q.to(x.W.dtype)
        small = _rotated(Point(x.W @ basis, x.H @ basis, x.b))
        W, H = (torch.nn.functional.pad(part, (0, d - 2 * K)) for part in (small.W, small.H))
        return Point(W, H, x.b)
    U, _, Vh = torch.linalg.svd((x.W + x.H).double(), full_matrices=True)
    Q = torch.cat([U @ Vh[:K], Vh[K:]]).to(x.W.dtype)
    return Point(x.W @ Q.T, x.H @ Q.T, x.b)


def lifted_step(objective: Objective, x: Point, evaluation: Evaluation) -> tuple[Point, Evaluation]:
    """One proximal gradient step on the convex problem in Z = A B', from the best point on the ray
    towards zero.

    Z <- shrink(Z - eta G, eta mu): singular values are shrunk towards zero, which is what the
    penalty is in Z; then the balanced factors. From a random point that one step finds the
    subspaces that descent in (A, B) spends most of its steps on. Then each class's rows are scaled
    to the logit gap that its count has at a minimum, which its neighbours hardly disturb. A move
    that does not lower the value is not made.
    """
    best, found = _shortest(objective, x, evaluation)
    K, N, mu = objective.problem.num_classes, objective.problem.num_samples, objective.problem.mu
    spread, here = Spread(objective.layout, "curvature"), classes_here(objective)
    identity = torch.eye(K, dtype=x.W.dtype, device=x.W.device)[here]
    gap = levels(objective).to(x.W.device)
    # From zero, eta is N times the logit gap that the step reaches.
    eta = N * float(gap.mean())
    G = objective.backend.logit_gradient(objective.head_input(best)).times(identity)
    moved = best.H @ spread.whole(best.W).T - (eta * objective.scales.logits) * G
    U, s, Vh = map(spread.first, torch.linalg.svd(spread.whole(moved)))
    root = (s - eta * mu).clamp_min(0.0).sqrt()
    A, B = torch.zeros_like(x.H), torch.zeros_like(x.W)
    A[:, :K], B[:, :K] = U[here] * root, Vh.T[here] * root
    best, found = _better(objective, best, found, replace(best, W=B, H=A))
    assert found.statistics is not None
    present = math.log(K - 1) - found.statistics.log_off_target_mass
    scale = (gap[here] / present).clamp(0.25, 4.0).sqrt().to(x.W.dtype)[:, None]
    return _better(objective, best, found, replace(best, W=best.W * scale, H=best.H * scale))


def classes_here(objective: Objective) -> slice:
    """The classes here, and the rows, which are as many."""
    K = objective.problem.num_classes
    return slice(0, K) if objective.layout is None else objective.layout.class_part


def _better(
    objective: Objective, x: Point, found: Evaluation, candidate: Point
) -> tuple[Point, Evaluation]:
    at_candidate = objective.value_and_grad(candidate, statistics=True)
    return (candidate, at_candidate) if at_candidate.value < found.value else (x, found)


def _shortest(objective: Objective, x: Point, evaluation: Evaluation) -> tuple[Point, Evaluation]:
    """Halve x while that lowers the value: random logits are worse than none."""
    for _ in range(5):
        trial = x.scale(0.5)
        at_trial = objective.value_and_grad(trial, statistics=True)
        if not at_trial.value < evaluation.value:
            break
        x, evaluation = trial, at_trial
    return x, evaluation
