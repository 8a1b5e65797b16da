"""One call of `linear_cross_entropy`: what was asked, checked, and its value.

The checks and the value are apart, because on several ranks each checks its part, all of them hear
whether that went well, and only then is anything computed (`distributed`). There the tensors are
those of this rank's samples, and those of its classes or the whole classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ufm_fast.adjustments import Adjustment
from ufm_fast.errors import InputError
from ufm_fast.functional import checks
from ufm_fast.functional.accumulation import checked_buffers
from ufm_fast.functional.labels import checked_labels
from ufm_fast.functional.precision import prepared
from ufm_fast.functional.reductions import of_probabilities, over_heads
from ufm_fast.functional.row_weights import Reduction, Weights, scaled_without_ignored


@dataclass(frozen=True)
class Asked:
    """The keyword arguments of ``linear_cross_entropy`` but for the bias."""

    weight: Any
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: Any
    sample_weight: Any
    divisor: Any
    logit_scale: Any
    softcap: float | None
    adjustment: Any
    main_grad: Any


@dataclass(frozen=True)
class CheckedCall:
    """Features and classifier in the dtype of the products, scaled and adjusted; ``target``: class
    indices, 0 where a row is ignored (``kept`` is 0 there and 1 elsewhere), or probabilities
    without ``kept``. ``dtype``: of the result.
    """

    asked: Asked
    features: Tensor
    matrix: Tensor
    bias: Tensor | None
    target: Tensor
    kept: Tensor | None
    chosen: Reduction
    smoothing: float
    softcap: float | None
    margin: Tensor | None
    dtype: torch.dtype

    @property
    def weights(self) -> Weights:
        """What each row counts."""
        if self.kept is not None:
            return self.chosen.weights(self.kept, self.target)
        shape = (self.target.shape[0], *self.target.shape[2:])
        return self.chosen.weights(self.target.new_ones(shape, dtype=torch.float64))

    @property
    def need(self) -> list[bool]:
        """Whether derivatives in features, classifier and bias are needed."""
        grad, tensors = torch.is_grad_enabled(), (self.features, self.matrix, self.bias)
        return [grad and x is not None and x.requires_grad for x in tensors]

    def value(self) -> Tensor:
        """The loss in the dtype of sums, as ``chosen`` reduces it."""
        tensors, chosen, smoothing = (
            (self.features, self.matrix, self.bias, self.target),
            self.chosen,
            self.smoothing,
        )
        if self.kept is None:
            return of_probabilities(*tensors, chosen, smoothing)
        return over_heads(*tensors, self.kept, chosen, smoothing, self.softcap, self.margin)


def checked_call(
    tensors: dict[str, Tensor | None],
    target: Tensor,
    asked: Asked,
    *,
    classes: int | None = None,
    part: slice | None = None,
) -> CheckedCall:
    """``tensors``: input, linear_weight and linear_bias; the latter two of the ``part`` of all
    ``classes`` that this rank has, where these are given.

    Errors: InputError / InputTypeError, naming the argument and the mend.
    """
    features, matrix, bias, dtype = prepared(tensors, asked.logit_scale, part is None)
    input, linear_weight, linear_bias = tensors.values()
    assert input is not None
    assert linear_weight is not None
    into = checked_buffers(asked.main_grad, linear_weight, linear_bias)
    if part is not None:  # stands for the classifier of all classes
        linear_weight = input.new_empty(classes or 0, 0)
    checks.check_target(target, input.device, differentiable=True)
    shape = (*input.shape[:-1], *linear_weight.shape[1:-1])
    weights = asked.weight, asked.sample_weight, asked.divisor
    chosen = replace(Reduction.checked(asked.reduction, linear_weight, shape, *weights), into=into)
    smoothing = checks.check_smoothing(asked.label_smoothing)
    cap = checks.check_softcap(asked.softcap)
    checks.check_options(asked.options)
    adjusted = checks.check_adjustment(asked.adjustment, linear_weight)
    _check_together(asked, target.is_floating_point(), smoothing, adjusted)
    matrix, bias = (adjusted if part is None else adjusted.part(part)).classifier(matrix, bias)
    call = CheckedCall(
        asked, features, matrix, bias, target, None, chosen, smoothing, cap, adjusted.margin, dtype
    )
    if target.is_floating_point():
        return call
    checks.check_labels_shape(target, shape)
    return _with_labels(call, input, linear_weight.shape[0])


def _with_labels(call: CheckedCall, input: Tensor, classes: int) -> CheckedCall:
    """The call with its class indices checked, and what follows from those that are ignored."""
    ignore = call.asked.ignore_index
    ignore = -100 if ignore is None else checks.check_ignore_index(ignore)
    labels, kept = checked_labels(call.target, classes, ignore)
    weights = call.chosen.weights(kept, labels)
    counts = weights.kept if call.smoothing else weights.factor
    features = scaled_without_ignored(call.features, counts, input, call.asked.logit_scale)
    return replace(call, features=features, target=labels, kept=kept)


def _check_together(asked: Asked, soft: bool, smoothing: float, adjusted: Adjustment) -> None:
    """Errors: InputError for arguments that do not go with one another; ``soft``: probabilities."""
    into, cap = asked.main_grad is not None, asked.softcap is not None
    if into and (asked.reduction == "none" or soft):
        raise InputError(
            "main_grad goes with class indices and reduction 'mean' or 'sum'; leave it out"
        )
    if cap and (smoothing or soft):
        raise InputError(
            "softcap goes with class indices and without label_smoothing; leave one of them out"
        )
    weighted = cap or (smoothing and asked.weight is not None)
    if adjusted and (soft or (weighted and adjusted.margin is not None)):
        raise InputError(
            "adjustment goes with class indices, and margins without softcap or smoothed class "
            "weights; leave one of them out"
        )
    if into and (adjusted.scale is not None or adjusted.offset is not None):
        raise InputError(
            "main_grad takes gradients of linear_weight as it is, without offsets and scales; "
            "leave one of them out"
        )
    if soft and asked.ignore_index is not None:
        raise InputError(
            "ignore_index goes with class indices only; drop it or pass class indices as target"
        )
