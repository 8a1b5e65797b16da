"""Bytes of each thing that a solve holds, by the arrays that it makes."""

from __future__ import annotations

import torch

from ufm_fast.backends.base import compute_dtype
from ufm_fast.backends.chunks import buffer_bytes, chunk_rows
from ufm_fast.backends.residual import block_bytes
from ufm_fast.losses import SquaredError
from ufm_fast.memory import available_bytes
from ufm_fast.metrics.rows import block_rows
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.solvers.curvature.table import curvature_of
from ufm_fast.solvers.table import METHODS
from ufm_fast.theory.certificates import EXACT_CLASSES, held_bytes


def method_bytes(objective: Objective, size: int, history: int) -> dict[str, int]:
    """What each method holds: vectors of ``size``, that of the parameters, alternating its
    factorisations, and those with a model of the Hessian that.
    """
    d, R, item = objective.problem.dim, objective.rows.number, objective.dtype.itemsize
    model = curvature_of(objective)
    held = 0 if model is None else model.bytes_of(objective)
    # Gram, eigenvectors and their workspace, of W; or Gram, factor and the right-hand side of H;
    # three copies of the rows.
    own = {"alternating": 5 * 8 * d**2 + 3 * R * d * item, "lbfgs": held}
    if model is not None and model.newton:
        own["newton-cg"] = held
    vectors = _vectors(objective, history, modelled=model is not None)
    return {name: number * size + own.get(name, 0) for name, number in vectors.items()}


def _vectors(objective: Objective, history: int, *, modelled: bool) -> dict[str, int]:
    """Vectors that each method for the problem holds, L-BFGS with so many pairs."""
    problem = objective.problem
    vectors = {
        name: row.vectors
        for name, row in METHODS.items()
        if name != "auto" and row.refuses(problem) is None
    }
    vectors["lbfgs"] += 2 * history
    if objective.geometry.curved:  # the pairs of both ends of a step, while they are carried
        vectors["lbfgs"] += 2 * history + 2
    if isinstance(problem.loss, SquaredError) and modelled:
        vectors["newton-cg"] += 1  # building it there
    return vectors


def tape_bytes(problem: Problem, R: int, item: int) -> int:
    """Bytes that a pass through the hidden layers leaves: outputs; of a ReLU slopes, and bends
    where kinks are rounded.
    """
    return (3 if problem.activation == "relu" else 1) * R * sum(problem.trunk.widths[1:]) * item


def trunk_workspace(problem: Problem, R: int, item: int) -> tuple[int, int]:
    """Bytes beside the head's, of a gradient and of a Hessian product: the tapes of this point and
    the last, the gradients of features, H and layers on their way back; for a product one tape, the
    directions of it and twice those gradients.
    """
    if problem.trunk.empty:
        return 0, 0
    rows = R * (problem.dim + problem.head_dim + max(problem.trunk.widths)) * item
    back, tape = rows + problem.trunk.entries * item, tape_bytes(problem, R, item)
    return 2 * tape + back, tape + 2 * (R * sum(problem.trunk.widths) * item + back)


def certificate_bytes(problem: Problem, R: int) -> int:
    """Bytes of the certificate beside the points, of which it makes float64 copies.

    Of softmax losses a chunk of exponentials, its gradient and that scaled, and vectors of its
    rows; dense K x K matrices where it is exact, else the gradient itself if it fits, and bases of
    W and H. Of the squared error blocks of residuals and Grams.
    """
    K, d, item, device = (
        problem.num_classes,
        problem.head_dim,
        problem.torch_dtype.itemsize,
        torch.device(problem.device),
    )
    entries = problem.entries(R)
    copies = 0 if item == 8 else 8 * entries
    if problem.freeze is not None:
        return copies + 8 * entries
    if isinstance(problem.loss, SquaredError):
        norm = 3 * 8 * K**2 if K <= EXACT_CLASSES else 4 * 8 * (K + R) * d
        return copies + 8 * R * d + 3 * block_bytes(R, K, d) + norm + 4 * 8 * min(d, K) ** 2
    chunk = chunk_rows(R, K, 8, device)
    swept = 3 * buffer_bytes(chunk, K, 8) + 15 * 8 * chunk
    if (
        problem.constraint != "none"
    ):  # scaled by rows and by columns, and what holds the rows at their length
        swept += 3 * buffer_bytes(chunk, K, 8) + 2 * 8 * entries
    if K <= EXACT_CLASSES:
        return copies + max(swept + 8 * K**2, 3 * 8 * K**2)
    return copies + swept + held_bytes(R, K, available_bytes(device)) + 4 * 8 * (K + R) * d


def metrics_bytes(problem: Problem, R: int) -> int:
    """Bytes of the metrics beside the points: copies of the features, blocks of rows, and tiles of
    pairs of classes.
    """
    K, d = problem.num_classes, problem.head_dim
    item = compute_dtype(problem.torch_dtype).itemsize
    block = 8 * d * min(max(R, K), block_rows(d))
    return R * d * (item + 2 * 8) + (10 if d > K else 8) * block + 5 * 8 * min(K, 1024) ** 2
