"""Dense autograd: the definition, in any dtype. It holds the R x K logits, so it is for small
problems and for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import (
    Gradients,
    HeadByLoss,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    RowStatistics,
)
from ufm_fast.losses import SoftmaxLoss, SquaredError


class ReferenceBackend(HeadByLoss):
    """Value by ``loss.dense`` on the full logits, derivatives by torch autograd."""

    name = "reference"

    def __init__(self) -> None:
        super().__init__((SoftmaxLoss, DenseSoftmaxHead()), (SquaredError, DenseHead()))


class DenseHead:
    """Any loss with a dense definition; it has no row statistics."""

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        leaves = _leaves(x)
        with torch.enable_grad():
            value = _value(x, leaves)
            grads = torch.autograd.grad(value, leaves)
        _add(out.cleared(), grads)
        return HeadResult(value.detach().double(), self._statistics(x) if statistics else None)

    def _statistics(self, x: HeadInput) -> RowStatistics | None:
        return None

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        leaves = _leaves(x)
        bias = (
            torch.zeros_like(x.bias) if v.bias is None and x.bias is not None else v.bias
        )  # a fixed one has no direction
        direction: list[Any] = [t for t in (v.features, v.weight, bias) if t is not None]
        with torch.enable_grad():
            grads = torch.autograd.grad(_value(x, leaves), leaves, create_graph=True)
            product = torch.autograd.grad(grads, leaves, direction)
        _add(out.cleared(), product)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        z = _less_margin(x, _logits(x)).detach().requires_grad_()
        with torch.enable_grad():
            (G,) = torch.autograd.grad(
                (x.row_weight.to(z.dtype) * x.loss.dense(z, x.targets)).sum(), z
            )
        return DenseGradient(G)

    def losses(self, x: HeadInput) -> Tensor:
        return x.loss.dense(_less_margin(x, _logits(x)), x.targets).double()

    def plan(self, shape: HeadShape) -> HeadPlan:
        # All R x K work whatever the loss, and autograd keeps logits, softmax and gradient.
        dense = 3 * shape.rows * shape.classes * shape.itemsize
        return HeadPlan(shape.rows, dense, 2 * dense, 6.0 * shape.rows * shape.classes * shape.dim)


class DenseSoftmaxHead(DenseHead):
    """The softmax losses, with row statistics."""

    def _statistics(self, x: HeadInput) -> RowStatistics:
        z = _logits(x).double()
        rows, columns = x.targets.slice(0, x.targets.rows)
        target = z[rows, columns]
        mean = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device).index_add(0, rows, target)
        mean = mean / x.targets.sizes()
        least = torch.full_like(mean, float("inf")).scatter_reduce(0, rows, target, "amin")
        off = z.index_put((rows, columns), torch.full_like(target, -float("inf")))
        return RowStatistics(least - off.amax(1), torch.logsumexp(off, 1) - mean)


class DenseGradient:
    """A logit gradient that is held as a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def times(self, right: Tensor) -> Tensor:
        return self.matrix @ right

    def transposed_times(self, left: Tensor) -> Tensor:
        return self.matrix.T @ left


def _logits(x: HeadInput) -> Tensor:
    z = x.features @ x.weight.T
    return z if x.bias is None else z + x.bias


def _less_margin(x: HeadInput, z: Tensor) -> Tensor:
    return (
        z
        if x.margin is None
        else z.scatter_add(1, x.targets.indices[:, None], -x.margin.to(z.dtype)[:, None])
    )


def _leaves(x: HeadInput) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (x.features, x.weight, x.bias) if t is not None]


def _value(x: HeadInput, leaves: list[Tensor]) -> Tensor:
    """The data term at the leaves: features, weight and perhaps a bias."""
    z = leaves[0] @ leaves[1].T
    z = _less_margin(x, z if len(leaves) == 2 else z + leaves[2])
    return (x.row_weight.to(z.dtype) * x.loss.dense(z, x.targets)).sum()


def _add(out: Gradients, grads: tuple[Tensor, ...]) -> None:
    for buffer, grad in zip((out.features, out.weight, out.bias), grads, strict=False):
        if buffer is not None:
            buffer.add_(grad)
