"""Value and derivatives of a cross-entropy whose classifier is spread over ranks by class.

    ShardedSum       sum_r row_weight_r l_r over the rows of all ranks, the same on each of them;
                     its gradients come with the same sweep
    ShardedLosses    l_r of this rank's rows
    _Gradients       the gradients of such a sum as outputs that are differentiable themselves: of
                     both, their backward is this with row_weight the incoming gradient

What a rank has are its rows of features and row_weight and its classes of weight and bias; of
these a derivative is the whole one, and its direction is this rank's block of all. So products of
the Hessian with the directions are those of the ranks' backend, and a third order is refused. Every
rank calls the same, in the same order: each of these is an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import Backend, Gradients, HeadInput, compute_dtype
from ufm_fast.functional.accumulation import TWICE, accumulate
from ufm_fast.functional.operators import direction_at, slopes_along, zeros_for
from ufm_fast.functional.rules import THIRD
from ufm_fast.layout import Axis, Layout
from ufm_fast.losses import Loss
from ufm_fast.targets import Targets


@dataclass(frozen=True)
class ShardedHead:
    """All of a head but what is differentiated."""

    backend: Backend
    loss: Loss
    targets: Targets
    margin: Tensor | None
    layout: Layout

    def at(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, row_weight: Tensor
    ) -> HeadInput:
        return HeadInput(
            self.loss,
            features,
            weight,
            bias,
            self.targets,
            row_weight.double().contiguous(),
            self.margin,
            self.layout,
        )

    def gradients(self, x: HeadInput, need: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """Value and gradients, in the dtype of sums."""
        out = zeros_for((x.features, x.weight, x.bias), need)
        return self.backend.head(x, Gradients(out[0], out[1], out[2])).value, out


class ShardedSum(torch.autograd.Function):
    """``held``: classifier and bias where their gradients go to ``buffers`` (`accumulation`); the
    graph then knows them by these, and weight and bias require no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor,
        held_weight: Tensor | None,
        held_bias: Tensor | None,
        head: ShardedHead,
        need: Sequence[bool],
        buffers: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        value, gradients = head.gradients(head.at(features, weight, bias, row_weight), need)
        ctx.save_for_backward(features, weight, bias, row_weight, *gradients)
        ctx.head, ctx.need, ctx.buffers = head, need, buffers
        return value.to(compute_dtype(features.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        *inputs, row_weight, of_features, of_weight, of_bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            if any(buffer is not None for buffer in ctx.buffers):
                raise NotImplementedError(TWICE)
            shares = upstream.double() * row_weight
            gradients = _Gradients.apply(*inputs, shares, ctx.head, ctx.need)  # type: ignore[no-untyped-call]
            return *gradients, *[None] * 6
        found = [of_features]
        for gradient, buffer in zip((of_weight, of_bias), ctx.buffers, strict=True):
            if buffer is not None and gradient is not None:
                accumulate(buffer, gradient, upstream)
            found.append(None if buffer is not None else gradient)
        dtype = inputs[0].dtype
        return *(None if g is None else (upstream * g).to(dtype) for g in found), *[None] * 6


class ShardedLosses(torch.autograd.Function):
    """A row's loss depends on the classes of all ranks, so the backward is a sweep on all."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, head: ShardedHead
    ) -> Tensor:
        ctx.save_for_backward(features, weight, bias)
        ctx.head = head
        ones = torch.ones(features.shape[0], dtype=torch.float64, device=features.device)
        losses = head.backend.losses(head.at(features, weight, bias, ones))
        return losses.to(compute_dtype(features.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        need = ctx.needs_input_grad[:3]
        gradients = _Gradients.apply(*ctx.saved_tensors, upstream.double(), ctx.head, need)  # type: ignore[no-untyped-call]
        return *gradients, None


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor,
        head: ShardedHead,
        need: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(features, weight, bias, row_weight)
        ctx.head = head
        _, gradients = head.gradients(head.at(features, weight, bias, row_weight), need)
        return tuple(None if g is None else g.to(features.dtype) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(THIRD)
        *inputs, row_weight = ctx.saved_tensors
        x = ctx.head.at(*inputs, row_weight)
        v = direction_at(x, *directions)
        product = zeros_for(inputs, ctx.needs_input_grad[:3])
        ctx.head.backend.head_hvp(x, v, Gradients(product[0], product[1], product[2]))
        slopes = None
        if ctx.needs_input_grad[3]:
            of_losses = ctx.head.at(*inputs, torch.ones_like(row_weight))
            slopes = slopes_along(ctx.head.backend, of_losses, v).to(row_weight.dtype)
        dtype = inputs[0].dtype
        return *(None if p is None else p.to(dtype) for p in product), slopes, None, None


class Replicated(torch.autograd.Function):
    """A value that is the same on all ranks, or this rank's share of one: its upstream gradient is
    that of the whole, so the gradient in that is summed over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return _Upstream.apply(upstream, ctx.axis), None  # type: ignore[no-untyped-call]


class _Upstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return upstream.view_as(upstream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(THIRD)
        return ctx.axis.sum_(gradient.clone()), None
