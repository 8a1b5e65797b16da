"""Cross-entropy to weighted sparse targets: top-k distillation, distributions of the next token; q
in CSR form or (N, k).

For a row with weights q over its targets, Q their sum and y the target of largest weight,

    sum_k q_k (logsumexp(z) - z_k)  =  Q (logsumexp(z) - z_y)  +  h . (Q w_y - sum_k q_k w_k)
    (+ the same of the bias).

So it is Q times the fused cross-entropy of the label y, and a sparse product with the classes,
O(nnz d): no second pass over N x K, no dense targets, and every mode of autograd that the
cross-entropy has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.backends.sums import add_class_sums
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.precision import prepared
from ufm_fast.functional.reductions import reduced
from ufm_fast.functional.registration import differentiable, one_by_one, operator
from ufm_fast.functional.row_weights import (
    Reduction,
    counted,
    normalised,
    scaled_without_ignored,
    without_ignored,
)
from ufm_fast.targets import check_labels

_BLOCK = 1 << 21  # numbers of a block of gathered rows


def linear_soft_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    indptr: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
) -> Tensor:
    """-sum_k q_k log p_k of every row, q its weights on a few classes, p the softmax of a linear
    classifier.

    Shapes: input (N, d), linear_weight (K, d), linear_bias (K,). Either indices and weights (N, k),
    negative indices being padding; or both (entries,) with ``indptr`` (N + 1,): row r has the
    entries indptr[r] to indptr[r + 1]. Weights are at least 0 and need not sum to 1; a class may be
    named twice. A row whose weights are all 0 is ignored. 'mean' is over the other rows, or divides
    by their sample weights; the rest as in ``linear_cross_entropy``. The divergence from a teacher
    is this less the teacher's entropy. Equivalent, with a dense q: ``-(q *
    F.log_softmax(F.linear(input, linear_weight), 1)).sum(1)``.
    Errors: as ``linear_cross_entropy``; InputError for weights that are negative, infinite, or
    require a gradient.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    features, matrix, bias, dtype = prepared(tensors, logit_scale)
    if input.dim() != 2 or linear_weight.dim() != 2:
        raise InputError(
            f"input must have shape (N, d) and linear_weight (K, d), got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    chosen = Reduction.checked(
        reduction, linear_weight, (input.shape[0],), None, sample_weight, divisor
    )
    entries = _entries(indices, weights, indptr, input)
    labels, total, pull = checked_soft(*entries, linear_weight.shape[0])
    rows = chosen.weights((total != 0).double())
    rows = replace(rows, factor=counted(rows.kept, rows.kept * total))
    features = scaled_without_ignored(features, rows.kept, input, logit_scale)
    features = without_ignored(features, rows.kept)
    value = reduced(features, matrix, bias, labels, None, rows, "ce", 0.0)
    with torch.autocast(matrix.device.type, enabled=False):
        tilt = (features.to(compute_dtype(features.dtype)) * mixed(matrix, *entries[:2], pull)).sum(
            1
        )
        if bias is not None:
            tilt = tilt + mixed(bias[:, None], *entries[:2], pull)[:, 0]
        tilt = counted(rows.kept, tilt * normalised(rows.kept, rows).to(tilt.dtype))
    value = value + (tilt if rows.reduction == "none" else tilt.sum()).to(value.dtype)
    if rows.reduction == "mean":
        value = value + torch.where(rows.total.sum() == 0, torch.nan, 0.0)
    return value.to(dtype)


def _entries(
    indices: Tensor, weights: Tensor, indptr: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, indices, weights) of the entries, flat."""
    checks.check_floats({"input": input, "weights": weights}, one_dtype=False)
    checks.check_tensor(indices, "indices")
    if weights.requires_grad:
        raise InputError("weights must not require a gradient; pass weights.detach()")
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.shape != weights.shape:
        raise InputTypeError(
            f"indices must be integers of the shape of weights, {tuple(weights.shape)}, got "
            f"{indices.dtype} of shape {tuple(indices.shape)}"
        )
    rows, flat = input.shape[0], weights.double().reshape(-1)
    if indptr is None:
        if indices.dim() != 2 or indices.shape[0] != rows:
            raise InputError(
                f"indices must have shape (N, k) with N = {rows}, got {tuple(indices.shape)}; or "
                f"pass indptr"
            )
        padding = (indices < 0).reshape(-1)
        pointer = torch.arange(rows + 1, device=input.device) * indices.shape[1]
        return (
            pointer,
            indices.reshape(-1).long().masked_fill(padding, 0),
            flat.masked_fill(padding, 0.0),
        )
    if indptr.is_floating_point() or indptr.dtype == torch.bool:
        raise InputTypeError(f"indptr must be integers, got {indptr.dtype}; pass indptr.long()")
    if tuple(indptr.shape) != (rows + 1,):
        raise InputError(
            f"indptr must have shape ({rows + 1},), one more than the {rows} rows of input, got "
            f"{tuple(indptr.shape)}"
        )
    if indices.dim() != 1:
        raise InputError(
            f"with indptr, indices and weights must be vectors, got {tuple(indices.shape)}; "
            f"flatten them"
        )
    return indptr.long(), indices.long(), flat


@operator(
    "(Tensor indptr, Tensor indices, Tensor weights, SymInt classes) -> (Tensor, Tensor, Tensor)"
)
def checked_soft(
    indptr: Tensor, indices: Tensor, weights: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(class of largest weight, sum of weights, for each entry -q and at that class Q more), after
    a look at the data.
    """
    check_labels(indices, classes, "indices", "give linear_weight more rows")
    if not bool(((weights >= 0) & (weights < torch.inf)).all()):
        raise InputError("weights must be finite numbers of at least 0")
    sizes = indptr[1:] - indptr[:-1]
    if int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel() or bool((sizes < 0).any()):
        raise InputError(f"indptr must rise from 0 to the number of entries, {indices.numel()}")
    rows = torch.repeat_interleave(torch.arange(sizes.numel(), device=indices.device), sizes)
    total = torch.zeros(sizes.numel(), dtype=weights.dtype, device=weights.device).index_add_(
        0, rows, weights
    )
    largest = torch.full_like(total, -1.0).scatter_reduce(0, rows, weights, "amax")
    places = torch.arange(indices.numel(), device=indices.device)
    first = torch.where(weights == largest[rows], places, indices.numel())
    first = torch.full_like(sizes, indices.numel()).scatter_reduce(0, rows, first, "amin")
    some = sizes > 0
    pull = (-weights).index_add(0, first[some], total[some])
    labels = torch.zeros_like(sizes).masked_scatter(some, indices[first[some]])
    return labels, total, pull


def _checked_soft_shapes(
    indptr: Tensor, indices: Tensor, weights: Tensor, classes: int
) -> tuple[Tensor, ...]:
    rows = indptr.shape[0] - 1
    return indptr.new_empty(rows), weights.new_empty(rows), torch.empty_like(weights)


checked_soft.register_fake(_checked_soft_shapes)
checked_soft.register_vmap(one_by_one(checked_soft))


@operator("(Tensor points, Tensor indptr, Tensor indices, Tensor weights) -> Tensor")
def mix(points: Tensor, indptr: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_e weight_e points[index_e] over the entries of each row, (N, d) in the dtype of sums."""
    out = points.new_zeros(indptr.numel() - 1, points.shape[1], dtype=compute_dtype(points.dtype))
    for part, rows in _blocks(indptr, indices, points.shape[1]):
        out.index_add_(
            0, rows, points[indices[part]].to(out.dtype) * weights[part].to(out.dtype)[:, None]
        )
    return out


@operator("(Tensor rows, Tensor indptr, Tensor indices, Tensor weights, SymInt classes) -> Tensor")
def spread(rows: Tensor, indptr: Tensor, indices: Tensor, weights: Tensor, classes: int) -> Tensor:
    """The transpose of ``mix``: (classes, d) from (N, d)."""
    out = rows.new_zeros(classes, rows.shape[1])
    for part, of_entries in _blocks(indptr, indices, rows.shape[1]):
        add_class_sums(out, indices[part], rows[of_entries], weights[part])
    return out


def _blocks(indptr: Tensor, indices: Tensor, columns: int) -> list[tuple[slice, Tensor]]:
    sizes = indptr[1:] - indptr[:-1]
    rows = torch.repeat_interleave(torch.arange(sizes.numel(), device=indptr.device), sizes)
    step = max(1, _BLOCK // columns)
    return [(slice(i, i + step), rows[i : i + step]) for i in range(0, indices.numel(), step)]


mix.register_fake(
    lambda points, indptr, indices, weights: points.new_empty(
        indptr.shape[0] - 1, points.shape[1], dtype=compute_dtype(points.dtype)
    )
)
spread.register_fake(
    lambda rows, indptr, indices, weights, classes: rows.new_empty(classes, rows.shape[1])
)


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    points, *entries = inputs
    ctx.classes, ctx.dtype = points.shape[0], points.dtype
    ctx.save_for_backward(*entries)
    ctx.save_for_forward(*entries)


def _spread_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *entries, ctx.classes = inputs
    ctx.save_for_backward(*entries)
    ctx.save_for_forward(*entries)


mixed: Callable[..., Any] = differentiable(
    mix,
    _mix_context,
    lambda ctx, upstream: (
        spreading(upstream, *ctx.saved_tensors, ctx.classes).to(ctx.dtype),
        None,
        None,
        None,
    ),
    lambda ctx, saved, move, *_: mixed(move, *saved),
)
spreading: Callable[..., Any] = differentiable(
    spread,
    _spread_context,
    lambda ctx, upstream: (mixed(upstream, *ctx.saved_tensors), None, None, None, None),
    lambda ctx, saved, move, *_: spreading(move, *saved, ctx.classes),
)
