"""Dense autograd: the definition, in any dtype. It holds the R x K logits, so it is for small problems and for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput, HeadResult, RowStatistics
from ufm_fast.losses import SquaredError


class ReferenceBackend:
    """Value by ``loss.dense`` on the full logits, derivatives by torch autograd."""

    name = "reference"

    @staticmethod
    def _logits(x: HeadInput) -> Tensor:
        z = x.features @ x.weight.T
        return z if x.bias is None else z + x.bias

    def _value(self, x: HeadInput, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = features @ weight.T
        z = self._less_margin(x, z if bias is None else z + bias)
        return (x.row_weight.to(z.dtype) * x.loss.dense(z, x.targets)).sum()

    @staticmethod
    def _less_margin(x: HeadInput, z: Tensor) -> Tensor:
        return z if x.margin is None else z.scatter_add(1, x.targets.indices[:, None], -x.margin.to(z.dtype)[:, None])

    @staticmethod
    def _leaves(x: HeadInput) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in (x.features, x.weight, x.bias) if t is not None]

    @staticmethod
    def _add(out: Gradients, grads: tuple[Tensor, ...]) -> None:
        for buffer, grad in zip((out.features, out.weight, out.bias), grads, strict=False):
            if buffer is not None:
                buffer.add_(grad)

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        leaves = self._leaves(x)
        with torch.enable_grad():
            value = self._value(x, leaves[0], leaves[1], leaves[2] if len(leaves) == 3 else None)
            grads = torch.autograd.grad(value, leaves)
        self._add(out.cleared(), grads)
        return HeadResult(value.detach().double(), self._statistics(x) if statistics else None)

    def _statistics(self, x: HeadInput) -> RowStatistics | None:
        if isinstance(x.loss, SquaredError):
            return None
        z = self._logits(x).double()
        rows, columns = x.targets.slice(0, x.targets.rows)
        own = z[rows, columns]
        mean = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device).index_add(0, rows, own)
        mean = mean / x.targets.sizes()
        least = torch.full_like(mean, float("inf")).scatter_reduce(0, rows, own, "amin")
        off = z.index_put((rows, columns), torch.full_like(own, -float("inf")))
        return RowStatistics(least - off.amax(1), torch.logsumexp(off, 1) - mean)

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        leaves = self._leaves(x)
        bias = torch.zeros_like(x.bias) if v.bias is None and x.bias is not None else v.bias  # a fixed one has no direction
        direction: list[Any] = [t for t in (v.features, v.weight, bias) if t is not None]
        with torch.enable_grad():
            value = self._value(x, leaves[0], leaves[1], leaves[2] if len(leaves) == 3 else None)
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            product = torch.autograd.grad(grads, leaves, direction)
        self._add(out.cleared(), product)

    def logit_products(self, x: HeadInput, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        z = self._less_margin(x, self._logits(x)).detach().requires_grad_()
        with torch.enable_grad():
            (G,) = torch.autograd.grad((x.row_weight.to(z.dtype) * x.loss.dense(z, x.targets)).sum(), z)
        return (None if right is None else G @ right), (None if left is None else G.T @ left)

    def losses(self, x: HeadInput) -> Tensor:
        return x.loss.dense(self._less_margin(x, self._logits(x)), x.targets).double()
