"""Value, gradients and Hessian products of a penalised head without autograd: for solvers and
hand-written loops.

Decisions

2026-11-26. Forward mode uses the same operators: a value's tangent is <gradient, direction>, a
row's its slope, a gradient's a Hessian product. torch switches forward mode off around a Function's
jvp for every level, which lost the outer tangents of jacfwd of jacfwd in silence; it is switched on
again, on primals. Inside a transform torch.compile gets a second Function, without a jvp, that sees
its tensors as views: an input of the graph keeps the `requires_grad` it had before, and gradients
were silently zero. A row that weighs nothing is not shown to a backend, for 0 times NaN is NaN; the
others are copied, only if there is such a row.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ufm_fast.backends import Backend, Gradients, HeadInput, RowStatistics
from ufm_fast.backends.base import compute_dtype
from ufm_fast.functional.head_arguments import (
    PARTS,
    capturing,
    checked_direction,
    checked_head,
    checked_penalties,
)
from ufm_fast.functional.rows import over_rows, rows_of, rows_with_weight
from ufm_fast.losses import Loss


class HeadGradients(NamedTuple):
    """One tensor for each part of a head, or None: a gradient, a direction, or a Hessian
    product.
    """

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None


class HeadEvaluation(NamedTuple):
    """What one sweep gives; ``accuracy`` and ``margins`` are None for the squared error, which
    makes no N x K pass.

    value: the objective, float64 (); gradient: HeadGradients in the dtype of sums; accuracy: share
    of the row weight whose lowest target logit is above every other class's, float64 (); margins:
    by how much, in nats, float64 (N,).
    """

    value: Tensor
    gradient: HeadGradients
    accuracy: Tensor | None
    margins: Tensor | None


def value_and_grad(
    loss: str | Loss,
    features: Tensor,
    weight: Tensor,
    targets: Any,
    bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    lambda_w: float = 0.0,
    lambda_h: float = 0.0,
    lambda_b: float = 0.0,
    smoothing: float = 0.0,
    gamma: float | None = None,
    need: Collection[str] = PARTS,
    backend: str | Backend = "auto",
) -> HeadEvaluation:
    """Value, gradients, accuracy and margins of a penalised head from one sweep over its logits,
    which are never held.

        f = sum_r o_r l(W h_r + b, y_r) + lambda_w/2 |W|^2 + lambda_h/2 |H|^2 + lambda_b/2 |b|^2

    with o = row_weight for reduction 'sum' and row_weight / sum(row_weight) for 'mean'; row_weight
    is 1 by default.
    Shapes: features H (N, d), weight W (K, d), bias b (K,), targets (N,) integers, for the loss
    'pick-all' also sets as in ``linear_pick_all``; row_weight (N,). ``loss``: a name of LOSSES,
    with ``smoothing`` or ``gamma``, or a loss object. A part not in ``need`` has gradient None and
    costs no product. Half-precision inputs have float32 gradients.

    A row of weight 0 is left out of sum and mean whatever it holds (but not while a CUDA graph is
    captured); the penalty sees it still, and its margin is given. A mean over no rows is NaN and
    adds nothing to the gradient.

    Equivalent to ``torch.autograd.grad`` of the dense expression, but accurate also near collapse,
    where l is 1e-35.
    Errors: InputError / InputTypeError naming the argument and the mend.
    """
    chosen, x, wanted = checked_head(
        loss,
        features,
        weight,
        targets,
        bias,
        row_weight,
        reduction,
        smoothing,
        gamma,
        need,
        backend,
    )
    penalties = checked_penalties(lambda_h, lambda_w, lambda_b)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        points = (x.features, x.weight, x.bias)
        out = _prefilled(points, penalties, wanted)
        rows = None if row_weight is None else _counted(x)
        gradients = Gradients(out[0], out[1], out[2], fresh=not any(penalties))
        result = over_rows(rows, x, gradients, lambda x, out: chosen.head(x, out, statistics=True))
        statistics = (
            result.statistics if rows is None else _with_others(chosen, x, rows, result.statistics)
        )
        value = result.value.double()
        if (
            reduction == "mean"
        ):  # undefined over no rows, with zero gradients, as everywhere in torch
            value = value + torch.where((x.row_weight != 0).any(), 0.0, math.nan)
        for point, penalty in zip(points, penalties, strict=True):
            if penalty and point is not None:
                value = (
                    value
                    + 0.5 * penalty * torch.linalg.vector_norm(point, dtype=torch.float64).square()
                )
        accuracy, margins = _quality(statistics, x.row_weight)
    return HeadEvaluation(value, HeadGradients(*out), accuracy, margins)


def hvp(
    loss: str | Loss,
    features: Tensor,
    weight: Tensor,
    targets: Any,
    direction: HeadGradients | tuple[Any, ...],
    bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    lambda_w: float = 0.0,
    lambda_h: float = 0.0,
    lambda_b: float = 0.0,
    smoothing: float = 0.0,
    gamma: float | None = None,
    need: Collection[str] = PARTS,
    backend: str | Backend = "auto",
) -> HeadGradients:
    """Hessian of ``value_and_grad``'s f times a direction (v_features, v_weight, v_bias), at about
    twice its cost.

    A part of the direction that is None stands for zeros; v_bias may be left out. Arguments, dtypes
    and errors otherwise as in ``value_and_grad``. Equivalent to ``torch.autograd.functional.hvp``
    of the dense expression.
    """
    chosen, x, wanted = checked_head(
        loss,
        features,
        weight,
        targets,
        bias,
        row_weight,
        reduction,
        smoothing,
        gamma,
        need,
        backend,
    )
    points = (x.features, x.weight, x.bias)
    parts = checked_direction(direction, points)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        penalties = checked_penalties(lambda_h, lambda_w, lambda_b)
        out = _prefilled(parts, penalties, wanted)
        v_features, v_weight, v_bias = parts
        assert v_features is not None
        assert v_weight is not None
        rows = None if row_weight is None else _counted(x)
        v = HeadInput(x.loss, v_features, v_weight, v_bias, x.targets, x.row_weight)
        v = v if rows is None else rows_of(v, rows)
        products = Gradients(out[0], out[1], out[2], fresh=not any(penalties))
        over_rows(rows, x, products, lambda x, out: chosen.head_hvp(x, v, out))
    return HeadGradients(*out)


def _counted(x: HeadInput) -> Tensor | None:
    """Rows with a weight (None: all). The others may hold anything: 0 times NaN is NaN, so a
    backend must not see them.
    """
    return None if capturing(x.row_weight) else rows_with_weight(x)


def _with_others(
    backend: Backend, x: HeadInput, rows: Tensor, counted: RowStatistics | None
) -> RowStatistics | None:
    """Statistics of all rows from those of ``rows``: the others' in a sweep of their own, which
    costs no gradient.
    """
    if counted is None:
        return None
    others = torch.nonzero(x.row_weight == 0).reshape(-1)
    rest = backend.head(rows_of(x, others), Gradients(None, None, None), statistics=True).statistics
    assert rest is not None
    order = torch.argsort(torch.cat([rows, others]))
    pairs = ((counted.margin, rest.margin), (counted.log_off_target_mass, rest.log_off_target_mass))
    margin, mass = (torch.cat(pair)[order] for pair in pairs)
    return RowStatistics(margin, mass)


def _prefilled(
    points: tuple[Tensor | None, ...], penalties: tuple[float, ...], wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """lambda times each part, which the backend adds its sums onto; without any lambda, memory for
    it to write.
    """
    buffers: list[Tensor | None] = []
    for point, penalty, needed in zip(points, penalties, wanted, strict=True):
        if point is None or not needed:
            buffers.append(None)
        elif penalty:
            buffers.append(point.to(compute_dtype(point.dtype)) * penalty)
        else:
            create = torch.zeros if any(penalties) else torch.empty
            buffers.append(
                create(point.shape, dtype=compute_dtype(point.dtype), device=point.device)
            )
    return tuple(buffers)


def _quality(
    statistics: RowStatistics | None, row_weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if statistics is None:
        return None, None
    total = row_weight.sum()
    return ((statistics.margin > 0) * row_weight).sum() / total, statistics.margin
