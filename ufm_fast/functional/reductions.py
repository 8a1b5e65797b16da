"""How the losses of rows become a result: weights of classes and samples, ignored rows, mean, sum,
divisor, and many heads.

A row's weight is kept_r w_(y_r) with kept its sample weight over the divisor, 0 where it is
ignored. A mean divides by the sum of these weights; with a divisor there is a sum only. All of it
is decided before the sweep, in vectors of length N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.accumulation import MainGrad, accumulating_value
from ufm_fast.functional.operators import (
    MARGINS,
    SOFTCAP,
    checked_labels,
    row_losses,
    value_and_gradients,
)
from ufm_fast.functional.registration import blind, forward_mode

# Asked once: torch 2.11 can't trace the question.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)
NAMES = ("input", "linear_weight", "linear_bias")


@dataclass(frozen=True)
class Weights:
    """What each row counts, (N,) or (N, heads) float64: kept without and factor with the class
    weights; how they are reduced.

    ``total``: the factors whose sum a mean divides by, those of all heads. ``uneven``: some weight
    may differ from 0 and 1.
    """

    kept: Tensor
    factor: Tensor
    total: Tensor
    uneven: bool
    reduction: str
    into: MainGrad | None = None

    def view(self, *shape: int) -> Weights:
        return replace(self, kept=self.kept.reshape(shape), factor=self.factor.reshape(shape))

    def head(self, j: int) -> Weights:
        return replace(self, kept=self.kept[:, j], factor=self.factor[:, j])


@dataclass(frozen=True)
class Reduction:
    """What the caller asked for, checked: 'none', 'sum' or 'mean', and the weights."""

    how: str
    class_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    divisor: float | Tensor | None = None
    into: MainGrad | None = None

    @classmethod
    def checked(
        cls,
        reduction: str,
        matrix: Tensor,
        shape: tuple[int, ...],
        class_weight: Tensor | None,
        sample_weight: Tensor | None,
        divisor: object,
    ) -> Reduction:
        """``shape``: that of the row losses."""
        checks.check_reduction(reduction)
        checks.check_class_weight(class_weight, matrix)
        checks.check_sample_weight(sample_weight, matrix, shape)
        return cls(
            reduction,
            class_weight,
            sample_weight,
            checks.check_divisor(divisor, reduction, matrix.device),
        )

    def weights(self, kept: Tensor, labels: Tensor | None = None) -> Weights:
        """``kept``: 1, 0 where a row is ignored, or NaN."""
        how, class_weight = self.how, self.class_weight
        if self.sample_weight is not None:
            kept = counted(kept, kept * self.sample_weight.double().reshape(kept.shape))
        if self.divisor is not None:
            kept, how = kept / self.divisor, "sum"
        factor = kept
        if class_weight is not None and labels is not None:
            # An ignored row's label stands for no class; one without rows may weigh anything.
            factor = counted(kept, kept * class_weight.double()[labels])
        return Weights(
            kept,
            factor,
            factor,
            class_weight is not None or self.sample_weight is not None,
            how,
            self.into,
        )


def prepared(
    tensors: dict[str, Any], logit_scale: object = None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """Checked (features, matrix, bias) in the dtype of the products, times the scale, and the dtype
    of the result.
    """
    features, matrix, bias = tensors.values()
    dtype, products = dtypes_of(tensors)
    checks.check_shapes(features, matrix, bias, NAMES)
    if (
        logit_scale is not None
    ):  # a pass over N x d, before the one rounding to the dtype of the products
        scale = checks.check_logit_scale(logit_scale, features.device)
        wide = compute_dtype(features.dtype)
        features, bias = features.to(wide) * scale, None if bias is None else bias.to(wide) * scale
    return (
        features.to(products),
        matrix.to(products),
        None if bias is None else bias.to(products),
        dtype,
    )


def dtypes_of(tensors: dict[str, Any]) -> tuple[torch.dtype, torch.dtype]:
    """Of the result and of the products, of checked features, matrix and bias.

    Under autocast as torch's ``linear`` and ``cross_entropy``: products in autocast's dtype, the
    loss in float32.
    """
    features = checks.check_tensor(tensors["input"], "input")
    device = features.device.type
    cast = device in _AUTOCAST and torch.is_autocast_enabled(device)
    checks.check_floats(tensors, one_dtype=not cast)
    if cast and not any(x is not None and x.dtype == torch.float64 for x in tensors.values()):
        return torch.float32, torch.get_autocast_dtype(device)
    checks.check_floats(tensors, one_dtype=True)
    return features.dtype, features.dtype


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


def counted(kept: Tensor, values: Tensor) -> Tensor:
    """The values of rows that count, and 0 for those that are ignored: 0 times infinity is NaN.
    ``kept`` may be NaN itself.
    """
    return torch.where(kept == 0, 0.0, values)


def without_ignored(features: Tensor, kept: Tensor) -> Tensor:
    """The features with zeros for ignored rows, which may hold anything: 0 times NaN is NaN. A copy
    where there is one.
    """
    if not _unseen(kept) and not bool((kept == 0).any()):
        return features
    return torch.where((kept != 0)[:, None], features, 0.0)


def _unseen(x: Tensor) -> bool:
    """Whether nothing may be read from ``x`` now: in a tracer, a transform, without data, or while
    a CUDA graph is captured.
    """
    return (
        blind()
        or type(x) is not Tensor
        or x.is_meta
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


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


def normalised(factor: Tensor, weights: Weights) -> Tensor:
    """factor over the sum of all. Where weights that are uneven sum to 0, rows that count are
    NaN.
    """
    if weights.reduction != "mean":
        return factor
    total = weights.total.sum()
    shares = factor / torch.where(total == 0, 1, total)
    return (
        torch.where((total == 0) & (weights.kept != 0), math.nan, shares)
        if weights.uneven
        else shares
    )


def defined(mean: Tensor, weights: Weights, divided: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean, NaN where its divisor is zero. Over no rows the gradients stay zero, as in torch.

    With weights that sum to 0 the gradients are NaN, by their row weights, and torch's value is the
    sum over 0, ``divided(0)``: infinite where weights have both signs.
    """
    total = weights.total.sum()
    hidden = total.is_cuda or _unseen(total) or forward_mode()  # a look would wait for the device
    if not weights.uneven or hidden or not bool((total == 0) & (weights.kept != 0).any()):
        return mean + torch.where(total == 0, math.nan, 0.0)
    with torch.no_grad():
        value = divided(total).to(mean.dtype)
    return torch.where(total == 0, value, mean)  # 0 times the mean's gradient, NaN, is NaN


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
