"""Weights of rows: of classes and samples, ignored rows, mean, sum or divisor.

A row's weight is kept_r w_(y_r) with kept its sample weight over the divisor, 0 where it is
ignored. A mean divides by the sum of these weights; with a divisor there is a sum only. All of it
is decided before the sweep, in vectors of length N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.functional import checks
from ufm_fast.functional.accumulation import MainGrad
from ufm_fast.functional.precision import scaled
from ufm_fast.functional.registration import blind, forward_mode


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


def scaled_without_ignored(
    features: Tensor, kept: Tensor, input: Tensor, logit_scale: object
) -> Tensor:
    """The ``features``, which are the input times the scale. Where that is differentiated they are
    made anew without what ignored rows hold: its gradient would be 0 times that.
    """
    if not (isinstance(logit_scale, Tensor) and logit_scale.requires_grad):
        return features
    counting = kept if kept.dim() < 2 else kept.flatten(1).ne(0).any(1)
    rows = input.reshape(-1, input.shape[-1])
    clean = without_ignored(rows, counting.reshape(-1))
    if clean is rows:
        return features
    scale = logit_scale.reshape(())
    return scaled(clean, scale).to(features.dtype).reshape(features.shape)


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
