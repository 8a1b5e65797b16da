"""What a backend is: the data term of the objective and its derivatives, and nothing else.

A backend *adds* row-weighted sums into buffers that the objective has filled beforehand, so lambda and 1/N are decided in
one place. Every method takes features (R x d), weight (K x d), bias (K,) or None, Targets, and row_weight (R,): the
factor of each row's loss, n_r / N in the objective.

Decisions

2026-11-25. Gradient buffers may be fresh. The objective fills them with lambda times the parameter, so a backend adds;
the drop-in functions have no penalty, and zeroing a gradient of hundreds of megabytes first is a pass for nothing, so
`Gradients.fresh` lets a backend write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ufm_fast.losses import Loss
from ufm_fast.targets import Targets


@dataclass(frozen=True)
class HeadInput:
    """One head evaluation: logits are ``features @ weight.T + bias``; the data term is sum_r row_weight_r l_r.

    ``margin`` (R,), of single labels, is taken off each row's target logit before the loss, not before the statistics.
    """

    loss: Loss
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Targets
    row_weight: Tensor
    margin: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Buffers to add into; None skips that gradient and its matrix product (a frozen factor).

    ``fresh`` says that they hold no numbers yet: a backend then writes where it would add, which saves a pass over
    gradients of hundreds of megabytes, or calls ``cleared`` first.
    """

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    fresh: bool = False

    def cleared(self) -> Gradients:
        """The same buffers, zero where they were fresh."""
        if self.fresh:
            for buffer in (self.features, self.weight, self.bias):
                if buffer is not None:
                    buffer.zero_()
        return Gradients(self.features, self.weight, self.bias)


@dataclass(frozen=True)
class RowStatistics:
    """What falls out of the same sweep, one value a row (R,): z_target - max off-target z, and log of the off-target mass.

    With several targets the margin is that of the lowest one, and the mass is relative to the targets' mean logit.
    """

    margin: Tensor
    log_off_target_mass: Tensor


@dataclass(frozen=True)
class HeadResult:
    """Data term (float64 scalar tensor) and row statistics (None for squared error, which makes no N x K pass)."""

    value: Tensor
    statistics: RowStatistics | None


class Backend(Protocol):
    """The interface. What an implementation remembers (memory, sorted labels) never changes a result."""

    name: str

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        """Add the data term's gradients into ``out``; return its value."""

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        """Add the Hessian of the data term times direction v (its features, weight and bias) into ``out``."""

    def logit_products(self, x: HeadInput, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(G @ right, G.T @ left) for the R x K gradient G of the data term in the logits."""

    def losses(self, x: HeadInput) -> Tensor:
        """Unweighted loss of each row, float64 (R,)."""


def weighed(row_weight: Tensor, losses: Tensor) -> Tensor:
    """sum_r row_weight_r l_r in float64. A row that weighs nothing may lose infinitely: an ignored one, a masked class."""
    products = row_weight.double() * losses
    return torch.where(row_weight == 0, 0.0, products).sum()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums and gradients: float32 for half precision inputs, else the input's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
