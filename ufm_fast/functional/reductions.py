"""How the losses of rows become a result: of one label a row, of many heads, of class
probabilities.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.accumulation import accumulating_value
from ufm_fast.functional.head_inputs import MARGINS, SOFTCAP
from ufm_fast.functional.labels import checked_labels
from ufm_fast.functional.precision import prepared
from ufm_fast.functional.row_weights import (
    Reduction,
    Weights,
    counted,
    defined,
    normalised,
    scaled_without_ignored,
    without_ignored,
)
from ufm_fast.functional.rules import row_losses, value_and_gradients


def single_label(
    tensors: dict[str, Any],
    target: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Any],
    reduction: str,
    ignore_index: int,
    loss: str,
    parameter: float,
    logit_scale: object = None,
    adjustment: object = None,
) -> Tensor:
    """A loss of one label a row; ``weights``: of classes, of samples, and the divisor."""
    features, matrix, bias, dtype = prepared(tensors, logit_scale)
    adjusted = checks.check_adjustment(adjustment, matrix)
    matrix, bias = adjusted.classifier(matrix, bias)
    checks.check_target(target, features.device)
    chosen = Reduction.checked(reduction, matrix, tuple(target.shape), *weights)
    if matrix.dim() != 2:
        raise InputError(f"linear_weight must have shape (K, d), got {tuple(matrix.shape)}")
    if target.is_floating_point():
        raise InputTypeError(
            f"target must hold class indices, got {target.dtype}; convert it with target.long()"
        )
    checks.check_labels_shape(target, tuple(features.shape[:-1]))
    labels, kept = checked_labels(target, matrix.shape[0], checks.check_ignore_index(ignore_index))
    rows = chosen.weights(kept.reshape(-1), labels.reshape(-1))
    features = scaled_without_ignored(features, rows.factor, tensors["input"], logit_scale)
    values = of_rows(
        features.reshape(-1, features.shape[-1]),
        matrix,
        bias,
        labels.reshape(-1),
        None,
        rows,
        loss,
        parameter,
        adjusted.margin,
    )
    return (values.reshape(target.shape) if reduction == "none" else values).to(dtype)


def of_rows(
    features: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    weights: Weights,
    loss: str,
    parameter: float,
    margin: Tensor | None = None,
) -> Tensor:
    """The losses of rows as ``weights`` reduces them, NaN for a mean that is not defined;
    ``margin`` (K,) of the classes.
    """
    features = without_ignored(features, weights.kept)

    rows, loss = (
        (features, matrix, bias, indices, indptr),
        loss if margin is None else loss + MARGINS,
    )
    values = reduced(*rows, weights, loss, parameter, margin)
    if weights.reduction != "mean":
        return values
    summed = replace(weights, reduction="sum")
    return defined(
        values, weights, lambda total: reduced(*rows, summed, loss, parameter, margin) / total
    )


def over_heads(
    features: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    chosen: Reduction,
    smoothing: float,
    softcap: float | None = None,
    margin: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each of the d_1 x ... heads (one in the common case), put together as
    ``chosen`` says.
    """
    rows = features.reshape(-1, features.shape[-1])
    shape, (classes, *out) = labels.shape, matrix.shape[:-1]
    heads = math.prod(out)
    labels = labels.reshape(-1, heads)
    weights = chosen.weights(kept.reshape(-1, heads), labels)
    if heads == 1:
        parts = [(matrix.reshape(classes, -1), None if bias is None else bias.reshape(classes))]
    else:
        matrices, biases = (
            matrix.reshape(classes, heads, -1),
            None if bias is None else bias.reshape(classes, heads),
        )
        parts = [(matrices[:, j], None if biases is None else biases[:, j]) for j in range(heads)]

    def of_heads(weights: Weights, smoothing: float) -> list[Tensor]:
        return [
            _one_head(
                rows,
                W,
                b,
                labels[:, j],
                weights.head(j),
                chosen.class_weight,
                smoothing,
                softcap,
                margin,
            )
            for j, (W, b) in enumerate(parts)
        ]

    values = of_heads(weights, smoothing)
    if weights.reduction == "none":
        return torch.stack(values, dim=1).reshape(shape)
    total = values[0] if heads == 1 else torch.stack(values).sum()
    if weights.reduction != "mean":
        return total

    def divided(divisor: Tensor) -> Tensor:
        """The two parts of a smoothed loss one by one, as torch divides them: infinities of two
        signs are NaN.
        """
        parts = [(1.0 - smoothing, 0.0), (smoothing, 1.0)] if smoothing else [(1.0, 0.0)]
        summed = replace(weights, reduction="sum")
        shares = [share * (torch.stack(of_heads(summed, e)).sum() / divisor) for share, e in parts]
        return torch.stack(shares).sum()

    return defined(total, weights, divided)


def _one_head(
    features: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Weights,
    class_weight: Tensor | None,
    smoothing: float,
    softcap: float | None,
    margin: Tensor | None,
) -> Tensor:
    """One K x d classifier. Class weights are weights of its rows, but for smoothing, which weighs
    every class by its own.
    """
    features = without_ignored(features, weights.kept)
    if margin is not None:
        return reduced(
            features, matrix, bias, labels, None, weights, "ce" + MARGINS, smoothing, margin
        )
    if softcap is not None:
        return reduced(features, matrix, bias, labels, None, weights, SOFTCAP, softcap)
    if (class_weight is None and smoothing < 1.0) or smoothing == 0.0:
        return reduced(features, matrix, bias, labels, None, weights, "ce", smoothing)
    if class_weight is None:
        class_weight = torch.ones(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    kept = weights.kept
    if weights.reduction == "mean":  # infinite weights over their infinite sum, as in torch
        kept = torch.where(weights.total.sum().isinf() & (kept != 0), math.nan, kept)
    rows = replace(weights, factor=kept)
    return reduced(features, matrix, bias, labels, None, rows, "ce", smoothing, class_weight)


def reduced(
    features: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    weights: Weights,
    loss: str,
    parameter: float,
    class_weight: Tensor | None = None,
) -> Tensor:
    """factor_r l_r of each row, or its sum, over the sum of all factors for the mean."""
    inputs = (features, matrix, bias, indices, indptr, class_weight)
    if weights.reduction == "none":
        losses: Tensor = row_losses(*inputs, loss, parameter)
        # An ignored row contributes 0 whatever its features hold, so it must not be multiplied by
        # 0.
        return torch.where(weights.factor == 0, 0, losses * weights.factor.to(losses.dtype))
    grad = torch.is_grad_enabled()
    need = [grad and x is not None and x.requires_grad for x in (features, matrix, bias)]
    row_weight = normalised(weights.factor, weights)
    if weights.into is not None:
        return accumulating_value(inputs, row_weight, loss, parameter, need, weights.into)
    value: Tensor = value_and_gradients(*inputs, row_weight, loss, parameter, need)[0]
    return value


def of_probabilities(
    features: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    chosen: Reduction,
    smoothing: float,
) -> Tensor:
    """Dense: class probabilities are as large as the logits. 'mean' is over rows, or over the
    sample weights.
    """
    classes, *out = matrix.shape[:-1]
    shape = (*features.shape[:-1], classes, *out)
    if tuple(target.shape) != shape:
        raise InputError(
            f"target of dtype {target.dtype} must hold class probabilities of shape {shape}, got "
            f"{tuple(target.shape)}; class indices must be integers"
        )
    flat = None if bias is None else bias.reshape(-1)
    logits = torch.nn.functional.linear(
        features, matrix.reshape(-1, matrix.shape[-1]), flat
    ).reshape(shape)
    dtype = compute_dtype(logits.dtype)
    class_weight = None if chosen.class_weight is None else chosen.class_weight.to(dtype)
    plain = chosen.sample_weight is None and chosen.divisor is None
    losses = torch.nn.functional.cross_entropy(
        logits.to(dtype),
        target.to(dtype),
        weight=class_weight,
        reduction=chosen.how if plain else "none",
        label_smoothing=smoothing,
    )
    if plain:
        return losses
    weights = chosen.weights(torch.ones(losses.shape, dtype=torch.float64, device=losses.device))
    weighted = counted(weights.kept, losses * weights.kept.to(dtype))
    if weights.reduction == "none":
        return weighted
    return (
        weighted.sum() / weights.kept.sum().to(dtype)
        if weights.reduction == "mean"
        else weighted.sum()
    )
