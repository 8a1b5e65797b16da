"""Derivatives of the operators of a head, backwards and in forward mode, to the second order.

    value_and_gradients    `operators.head`; its own derivative is hessian_product and row_losses
    row_losses             `operators.head_losses`; its derivative is value_and_gradients with
                           row_weight = the incoming gradient
    hessian_product        `operators.head_product`; linear in row_weight and in the direction
    row_slopes             `operators.head_slopes`: what row_weight's gradient needs in a double
                           backward

``value_and_gradients`` returns its gradients as *outputs* that are differentiable themselves, so
first and second order share one formula:  d(value) = g . gradient  and  d(gradient . v) =
Hessian v. A third order is refused in words.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.functional.operators import filled, head, head_losses, head_product, head_slopes
from ufm_fast.functional.registration import (
    blind,
    differentiable,
    forward_mode,
    graph_is_kept,
    hooks_are_set,
    keep,
    refuses,
    refusing,
    wrapped,
)

THIRD = "third derivatives of a fused loss are not available; take them of the dense expression"


def _head_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.loss, ctx.parameter, ctx.need = inputs
    ctx.hooked = hooks_are_set()
    keep(ctx, *tensors, *output[1:])


def _head_backward(
    ctx: Any, upstream: Tensor | None, *directions: Tensor | None
) -> tuple[Any, ...]:
    """upstream * gradient + Hessian @ directions; for row_weight  upstream * l + slopes along the
    directions.
    """
    return head_rule(ctx, ctx.saved_tensors, upstream, directions)


def head_rule(
    ctx: Any, saved: Sequence[Any], upstream: Tensor | None, directions: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """``saved``: read once, for torch.utils.checkpoint hands out what it recomputed a single
    time.
    """
    *inputs, row_weight = saved[:7]
    needed = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    along = [v if wanted else None for v, wanted in zip(directions, ctx.need, strict=True)]
    loss = (ctx.loss, ctx.parameter)
    total: list[Tensor | None] = [None, None, None]
    weight_gradient = None
    if upstream is not None and any(needed):
        gradients = _gradients(ctx, saved, needed)
        own = not ctx.hooked
        total = [
            _scaled(upstream, g, own) if w else None for g, w in zip(gradients, needed, strict=True)
        ]
    if any(v is not None for v in along):
        if any(needed):
            product = hessian_product(*_of_second_order(*inputs, row_weight), *along, *loss, needed)
            total = [
                summed(a, b if w else None) for a, b, w in zip(total, product, needed, strict=True)
            ]
        if ctx.needs_input_grad[6]:
            weight_gradient = row_slopes(*inputs, *along, *loss).to(row_weight.dtype)
    if upstream is not None and ctx.needs_input_grad[6]:
        weight_gradient = summed(
            weight_gradient, (upstream * row_losses(*inputs, *loss)).to(row_weight.dtype)
        )
    total = [t if t is None else t.to(x.dtype) for t, x in zip(total, inputs, strict=False)]
    return (*total, None, None, None, weight_gradient, None, None, None)


def _gradients(ctx: Any, saved: Sequence[Any], needed: list[bool]) -> Sequence[Tensor]:
    """The gradients of the forward sweep; a new sweep where it could not know that one would be
    needed.
    """
    if all(have or not wanted for have, wanted in zip(ctx.need, needed, strict=True)):
        return saved[7:]
    again: tuple[Tensor, ...] = value_and_gradients(*saved[:7], ctx.loss, ctx.parameter, needed)[1:]
    return again


def _scaled(upstream: Tensor, gradient: Tensor, own: bool) -> Tensor:
    """upstream * gradient, in place where this backward is the last reader of the buffer: K x d may
    be gigabytes.

    ``own`` is False where somebody else may hold it. ``loss.backward()`` has upstream 1: on the
    CPU, where looking is free, the buffer is handed over as it is.
    """
    if not own or blind() or torch.is_grad_enabled() or graph_is_kept() or forward_mode():
        return upstream * gradient
    if any(type(x) is not Tensor or wrapped(x) for x in (upstream, gradient)):
        return upstream * gradient
    gradient = (
        gradient.detach()
    )  # a saved output comes back with its graph, which the caller did not ask for
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient.mul_(upstream)


def summed(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def head_tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> tuple[Tensor | None, ...]:
    """<gradient, move> and Hessian @ move; for a move of row_weight the value and gradients that it
    weighs.
    """
    *inputs, row_weight = saved[:7]
    along, row_move, loss = in_sums(moves[:3]), moves[6], (ctx.loss, ctx.parameter)
    moving = [v is not None for v in along]
    total: list[Tensor | None] = [None] * 4
    if any(moving):
        gradients = _gradients(ctx, saved, moving)
        slopes = [
            torch.dot(g.reshape(-1), v.reshape(-1))
            for g, v in zip(gradients, along, strict=True)
            if v is not None
        ]
        total[0] = functools.reduce(torch.add, slopes)
        if any(ctx.need):
            total[1:] = hessian_product(*inputs, row_weight, *along, *loss, ctx.need)
    if row_move is not None:
        weighed = value_and_gradients(*inputs, row_move, *loss, ctx.need)
        total = [summed(have, more) for have, more in zip(total, weighed, strict=True)]
    return total[0], *filled(
        [t if wanted else None for t, wanted in zip(total[1:], ctx.need, strict=True)], inputs[1]
    )


def in_sums(moves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tangents, which have the dtype of what moves, in the dtype of sums."""
    return [v if v is None else v.to(compute_dtype(v.dtype)) for v in moves]


value_and_gradients = differentiable(head, _head_context, _head_backward, head_tangents)


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.loss, ctx.parameter = inputs
    keep(ctx, *tensors)


def _losses_backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    if upstream is None:
        return (None,) * 8
    needed = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    gradients = value_and_gradients(*inputs, upstream, ctx.loss, ctx.parameter, needed)[1:]
    total = [
        g.to(x.dtype) if w else None for g, x, w in zip(gradients, inputs, needed, strict=False)
    ]
    return (*total, None, None, None, None, None)


def _losses_tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> Tensor:
    slopes: Tensor = row_slopes(*saved, *in_sums(moves[:3]), ctx.loss, ctx.parameter)
    return slopes


row_losses = differentiable(head_losses, _losses_context, _losses_backward, _losses_tangents)


def _product_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For derivatives in the direction, and in forward mode in row_weight, which are of the second
    order.
    """
    *tensors, ctx.loss, ctx.parameter, ctx.need = inputs
    ctx.linear = all(refuses(x) for x in (*tensors[:3], tensors[6]))
    keep(ctx, *(tensors if ctx.linear or forward_mode() else ()))


def _product_backward(ctx: Any, *upstream: Tensor | None) -> Any:
    """The Hessian is symmetric: its product with ``upstream`` is the derivative in the
    direction.
    """
    if not ctx.linear:
        raise NotImplementedError(THIRD)
    *inputs, row_weight, _, _, _ = ctx.saved_tensors
    moving = list(ctx.needs_input_grad[7:10])
    total: list[Tensor | None] = [None] * 3
    if any(moving) and any(v is not None for v in upstream):
        along = [v if wanted else None for v, wanted in zip(upstream, ctx.need, strict=True)]
        product = hessian_product(
            *_of_second_order(*inputs, row_weight), *along, ctx.loss, ctx.parameter, moving
        )
        total = [g if wanted else None for g, wanted in zip(product, moving, strict=True)]
    return (None,) * 7 + (*total, None, None, None)


def _of_second_order(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a Hessian product is taken at: derivatives in it are of the third order. The product
    itself tells transforms.
    """
    if blind() or forward_mode() or not torch.is_grad_enabled():
        return tensors
    features, weight, bias, indices, indptr, class_weight, row_weight = tensors
    features, weight, bias, row_weight = (
        refusing(x, THIRD) for x in (features, weight, bias, row_weight)
    )
    return features, weight, bias, indices, indptr, class_weight, row_weight


def _product_tangents(
    ctx: Any, saved: list[Any], *moves: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The product is linear in row_weight and in the direction."""
    if any(v is not None for v in moves[:3]):
        raise NotImplementedError(THIRD)
    *inputs, row_weight, v_features, v_weight, v_bias = saved
    loss = (ctx.loss, ctx.parameter, ctx.need)
    total: list[Tensor | None] = [None] * 3
    if moves[6] is not None:
        total = list(hessian_product(*inputs, moves[6], v_features, v_weight, v_bias, *loss))
    if any(v is not None for v in moves[7:10]):
        more = hessian_product(*inputs, row_weight, *moves[7:10], *loss)
        total = [summed(a, b) for a, b in zip(total, more, strict=True)]
    return filled(
        [t if wanted else None for t, wanted in zip(total, ctx.need, strict=True)], inputs[1]
    )


def _slopes_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.loss, ctx.parameter = inputs
    keep(ctx, *tensors)


def _slopes_backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    """sum_r upstream_r slope_r is the derivative along v of the sum that upstream weighs: Hessian @
    v, and its gradient.
    """
    *inputs, v_features, v_weight, v_bias = ctx.saved_tensors
    if upstream is None:
        return (None,) * 11
    needed, moving = list(ctx.needs_input_grad[:3]), list(ctx.needs_input_grad[6:9])
    loss = (ctx.loss, ctx.parameter)
    total: list[Tensor | None] = [None] * 6
    if any(needed):
        product = hessian_product(*inputs, upstream, v_features, v_weight, v_bias, *loss, needed)
        total[:3] = [
            t.to(x.dtype) if w else None for t, x, w in zip(product, inputs, needed, strict=False)
        ]
    if any(moving):
        gradients = value_and_gradients(*inputs, upstream, *loss, moving)[1:]
        total[3:] = [g if w else None for g, w in zip(gradients, moving, strict=True)]
    return (*total[:3], None, None, None, *total[3:], None, None)


def _slopes_tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> Tensor:
    """Linear in the direction. How a single row's slope changes with the point is a curvature that
    no sweep gives.
    """
    if any(v is not None for v in moves[:3]):
        raise NotImplementedError(
            "second derivatives of single rows, both in forward mode, are not available; "
            "take one of them in reverse mode, or reduce the loss to its mean or sum first"
        )
    slopes: Tensor = row_slopes(*saved[:6], *moves[6:9], ctx.loss, ctx.parameter)
    return slopes


hessian_product = differentiable(
    head_product, _product_context, _product_backward, _product_tangents
)
row_slopes = differentiable(head_slopes, _slopes_context, _slopes_backward, _slopes_tangents)
