"""The cross-entropy together with log-probability, entropy, largest class, correct@k and off-target
mass of every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.labels import checked_labels
from ufm_fast.functional.precision import prepared
from ufm_fast.functional.row_operators import detailed_head
from ufm_fast.functional.row_weights import (
    Reduction,
    counted,
    defined,
    normalised,
    scaled_without_ignored,
    without_ignored,
)


class RowOutputs(NamedTuple):
    """One entry a row, in the dtype of sums or int64; rows that count for nothing have 0, and -1 in
    argmax and rank.

    log_probability: log p_y in nats, differentiable twice; entropy: -sum_k p_k log p_k in nats,
    differentiable once;
    off_target_mass: sum_{k != y} exp(z_k - z_y), differentiable twice; argmax: the largest logit's
    class (the target wins ties); rank: how many classes have a larger logit than the target.
    """

    log_probability: Tensor
    entropy: Tensor
    off_target_mass: Tensor
    argmax: Tensor
    rank: Tensor

    def correct(self, k: int = 1) -> Tensor:
        """Whether the target is among the k largest logits, bool (N,)."""
        return (self.rank >= 0) & (self.rank < k)


def linear_cross_entropy_rows(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
) -> tuple[Tensor, RowOutputs]:
    """(``linear_cross_entropy`` of the same arguments, ``RowOutputs``), from one sweep over logits
    that are never held.

    Shapes: input (N, d), linear_weight (K, d), linear_bias (K,), target (N,) class indices. The
    outputs may be differentiated beside the loss or without it: then their gradient is one sweep
    more, whichever of them it is of. No label smoothing.
    Equivalent: ``p = F.log_softmax(F.linear(input, linear_weight), 1)``, then ``p.gather(1,
    target[:, None])``, ``-(p.exp() * p).sum(1)``, ``p.argmax(1)``; but relatively accurate where
    p_y is 1 up to 1e-35.
    Errors: as ``linear_cross_entropy``; NotImplementedError for a second derivative of the entropy.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    features, matrix, bias, dtype = prepared(tensors, logit_scale)
    checks.check_target(target, features.device)
    if input.dim() != 2 or linear_weight.dim() != 2:
        raise InputError(
            f"input must have shape (N, d) and linear_weight (K, d), got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    if target.is_floating_point():
        raise InputTypeError(
            f"target must hold class indices, got {target.dtype}; convert it with target.long()"
        )
    checks.check_labels_shape(target, (input.shape[0],))
    chosen = Reduction.checked(
        reduction, linear_weight, (input.shape[0],), weight, sample_weight, divisor
    )
    labels, kept = checked_labels(
        target, linear_weight.shape[0], checks.check_ignore_index(ignore_index)
    )
    weights = chosen.weights(kept, labels)
    features = scaled_without_ignored(features, weights.kept, input, logit_scale)
    features = without_ignored(features, weights.kept)
    grad = torch.is_grad_enabled() and reduction != "none"
    need = [grad and x is not None and x.requires_grad for x in (features, matrix, bias)]
    found: tuple[Tensor, ...] = detailed_head(
        features, matrix, bias, labels, None, None, normalised(weights.factor, weights), need
    )
    value, losses, entropy, argmax, rank = found[0], *found[4:]
    if reduction == "none":
        value = counted(weights.factor, losses * weights.factor.to(losses.dtype))
    elif weights.reduction == "mean":
        value = defined(value, weights, lambda total: (losses * weights.factor).sum() / total)
    losses, entropy = (counted(weights.kept, x).to(x.dtype) for x in (losses, entropy))
    argmax, rank = (torch.where(weights.kept == 0, -1, x) for x in (argmax, rank))
    return value.to(dtype), RowOutputs(-losses, entropy, torch.expm1(losses), argmax, rank)
