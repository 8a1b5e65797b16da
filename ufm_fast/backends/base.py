"""What a backend is: the data term of the objective and its derivatives, and nothing else.

A backend *adds* row-weighted sums into buffers that the objective has filled beforehand, so lambda
and 1/N are decided in one place. Every method takes features (R x d), weight (K x d), bias (K,) or
None, Targets, and row_weight (R,): the factor of each row's loss, n_r / N in the objective.

Decisions

2026-11-25. Gradient buffers may be fresh. The objective fills them with lambda times the parameter,
so a backend adds; the drop-in functions have no penalty, and zeroing a gradient of hundreds of
megabytes first is a pass for nothing, so `Gradients.fresh` lets a backend write.

2026-11-30. A backend is a table of heads, one for each kind of loss (softmax, squared error), and
`HeadByLoss` alone asks which kind a loss is; a loss of no row is refused. What a head takes is its
own knowledge, so a plan asks it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from ufm_fast.angular_margins import AngularMargin
from ufm_fast.backends.angular import AngularHead
from ufm_fast.errors import InputError
from ufm_fast.layout import Layout
from ufm_fast.losses import Loss, SoftmaxLoss
from ufm_fast.targets import Targets


@dataclass(frozen=True)
class HeadInput:
    """One head evaluation: logits are ``features @ weight.T + bias``; the data term is sum_r
    row_weight_r l_r.

    ``margin`` (R,), of single labels, is taken off each row's target logit before the loss, not
    before the statistics, and so are margins in the angle, ``angular``, which heads are not given
    (`HeadByLoss`). With a ``layout`` (`sharded`) features, targets and row_weight are those
    of this rank's rows, weight and bias those of its classes; targets name classes by their numbers
    among all.
    """

    loss: Loss
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Targets
    row_weight: Tensor
    margin: Tensor | None = None
    layout: Layout | None = None
    angular: AngularMargin | None = None


@dataclass(frozen=True)
class Gradients:
    """Buffers to add into; None skips that gradient and its matrix product (a frozen factor).

    ``fresh`` says that they hold no numbers yet: a backend then writes where it would add, which
    saves a pass over gradients of hundreds of megabytes, or calls ``cleared`` first.
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
    """What falls out of the same sweep, one value a row (R,): z_target - max off-target z, and log
    of the off-target mass.

    With several targets the margin is that of the lowest one, and the mass is relative to the
    targets' mean logit.
    """

    margin: Tensor
    log_off_target_mass: Tensor


@dataclass(frozen=True)
class HeadResult:
    """Data term (float64 scalar tensor) and row statistics (None for squared error, which makes no
    N x K pass). ``reach`` (R,): the gradient that a row withstands at the kink of its angular
    margin.
    """

    value: Tensor
    statistics: RowStatistics | None
    reach: Tensor | None = None


@dataclass(frozen=True)
class HeadShape:
    """What a plan needs to know of a head: R ``rows``, K ``classes`` of which ``occupied`` have
    rows, ``dim`` columns.

    ``dense``: rows have target vectors; ``angular``: margins in the angle.
    """

    loss: Loss
    rows: int
    classes: int
    dim: int
    occupied: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    dense: bool = False
    angular: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype of sums."""
        return compute_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class HeadPlan:
    """What one head takes: rows of a chunk, bytes beside parameters and gradients of ``head`` and
    of ``head_hvp``, and the floating-point operations of an evaluation. ``kept``: of those bytes,
    what is held between calls; ``passes``: numbers of the logits that an evaluation passes over.
    """

    chunk: int
    workspace: int
    workspace_hessian: int
    flops: float
    kept: int = 0
    passes: float = 0.0


class LogitGradient(Protocol):
    """G, the R x K gradient of the data term in the logits: an operator, known by its products."""

    def times(self, right: Tensor) -> Tensor:
        """G right, (R, c), for right (K, c), in its dtype."""

    def transposed_times(self, left: Tensor) -> Tensor:
        """G' left, (K, c), for left (R, c), in its dtype."""


class Head(Protocol):
    """What a backend knows of one kind of loss. What it remembers (memory, sorted labels) never
    changes a result.
    """

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        """Add the data term's gradients into ``out``; return its value."""

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        """Add the Hessian of the data term times direction v (its features, weight and bias) into
        ``out``.
        """

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        """The gradient of the data term in the logits."""

    def losses(self, x: HeadInput) -> Tensor:
        """Unweighted loss of each row, float64 (R,)."""

    def plan(self, shape: HeadShape) -> HeadPlan:
        """What a head of this shape takes, on its device as it is now."""


class Backend(Protocol):
    """The interface that the rest of the library calls: each method is that of the `Head` of the
    input's loss.
    """

    name: str

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        """`Head.value_and_grad`."""

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        """`Head.hvp`."""

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        """`Head.logit_gradient`."""

    def losses(self, x: HeadInput) -> Tensor:
        """`Head.losses`."""

    def plan(self, shape: HeadShape) -> HeadPlan:
        """`Head.plan`."""


class HeadByLoss:
    """A backend made of one head for each kind of loss, around which goes that of angular margins.
    No other place asks which kind a loss is.

    ``heads``: (class of losses, head) rows. Errors: InputError for a loss of no row's class.
    """

    name: str

    def __init__(self, *heads: tuple[type[Loss], Head]) -> None:
        self.heads = heads

    def of(self, loss: Loss) -> Head:
        """The head that serves a loss."""
        for kind, head in self.heads:
            if isinstance(loss, kind):
                return head
        raise InputError(
            f"backend {self.name} has no head for the loss {loss.name}; choose another backend"
        )

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        return self._for(x).value_and_grad(x, out, statistics=statistics)

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        self._for(x).hvp(x, v, out)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return self._for(x).logit_gradient(x)

    def losses(self, x: HeadInput) -> Tensor:
        return self._for(x).losses(x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        head = self.of(shape.loss)
        return AngularHead(head).plan(shape) if shape.angular else head.plan(shape)

    def _for(self, x: HeadInput) -> Head:
        head = self.of(x.loss)
        return head if x.angular is None else AngularHead(head)


def weighed(row_weight: Tensor, losses: Tensor) -> Tensor:
    """sum_r row_weight_r l_r in float64. A row that weighs nothing may lose infinitely: an ignored
    one, a masked class.
    """
    products = row_weight.double() * losses
    return torch.where(row_weight == 0, 0.0, products).sum()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums and gradients: float32 for half precision inputs, else the input's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def softmax_loss(x: HeadInput) -> SoftmaxLoss:
    """The loss of a head that only softmax losses reach (`HeadByLoss`)."""
    return cast("SoftmaxLoss", x.loss)


def in_sums_dtype(x: HeadInput) -> HeadInput:
    """The head with features, weight and bias in the dtype of sums."""
    dtype = compute_dtype(x.weight.dtype)
    bias = None if x.bias is None else x.bias.to(dtype)
    return replace(x, features=x.features.to(dtype), weight=x.weight.to(dtype), bias=bias)
