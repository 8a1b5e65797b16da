"""Gradients of the classifier added in place to buffers of the caller, as Megatron's ``main_grad``:
no ``.grad``, no rounding.

The sweep of the forward makes the gradient in the dtype of sums, and the backward adds upstream
times it to the buffer: the gradient in the parameter's own dtype, which half precision rounds,
never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional.checks import is_dtensor
from ufm_fast.functional.registration import operator
from ufm_fast.functional.rules import value_and_gradients

TWICE = "second derivatives in a parameter with main_grad are not available; leave main_grad out"


class MainGrad(NamedTuple):
    """Buffers of the gradients of linear_weight and linear_bias, or None for those that go to
    ``.grad``.
    """

    weight: Tensor | None
    bias: Tensor | None


def checked_buffers(main_grad: object, weight: Tensor, bias: Tensor | None) -> MainGrad | None:
    """Errors: InputError / InputTypeError for what is no pair of such buffers."""
    if main_grad is None:
        return None
    if not isinstance(main_grad, (tuple, list)) or len(main_grad) != 2:
        raise InputTypeError(
            "main_grad must be a pair of buffers (of linear_weight, of linear_bias or None)"
        )
    for name, buffer, like in zip(
        ("linear_weight", "linear_bias"), main_grad, (weight, bias), strict=True
    ):
        if buffer is None:
            continue
        if (
            like is None
            or not isinstance(buffer, Tensor)
            or is_dtensor(buffer)
            or buffer.shape != like.shape
            or buffer.device != like.device
        ):
            raise InputError(
                f"main_grad of {name} must be a plain tensor of its shape and on its device"
            )
        if buffer.dtype != compute_dtype(like.dtype) or buffer.requires_grad:
            raise InputError(
                f"main_grad of {name} must be {compute_dtype(like.dtype)} and require no gradient "
                f"itself"
            )
    if weight.dim() != 2:
        raise InputError("main_grad goes with one head: linear_weight (K, d)")
    return MainGrad(*main_grad)


@torch.library.custom_op("ufm_fast::accumulate", mutates_args=("buffer",))
def accumulate(buffer: Tensor, gradient: Tensor, upstream: Tensor) -> None:
    """buffer += upstream * gradient."""
    buffer.addcmul_(gradient, upstream.to(gradient.dtype))


@operator("(Tensor value, Tensor part, Tensor gradient, Tensor buffer) -> Tensor")
def accumulated(value: Tensor, part: Tensor, gradient: Tensor, buffer: Tensor) -> Tensor:
    """The value, whose backward adds the gradient of a parameter to its buffer and hands none
    on.
    """
    return value.clone()


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, gradient, buffer = inputs
    ctx.save_for_backward(gradient)
    ctx.buffer = buffer  # which is written between calls


def _backward(ctx: Any, upstream: Tensor) -> Any:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(TWICE)
    accumulate(ctx.buffer, ctx.saved_tensors[0], upstream)
    return upstream, None, None, None


accumulated.register_fake(lambda value, part, gradient, buffer: torch.empty_like(value))
accumulated.register_autograd(_backward, setup_context=_context)


def accumulating_value(
    inputs: Sequence[Tensor | None],
    row_weight: Tensor,
    loss: str,
    parameter: float,
    need: Sequence[bool],
    into: MainGrad,
) -> Tensor:
    """The value of ``value_and_gradients``; the parts that have a buffer are differentiated into
    it.
    """
    features, *parts, indices, indptr, class_weight = inputs
    held = [wanted and buffer is not None for wanted, buffer in zip(need[1:], into, strict=True)]
    fixed = [
        x.detach() if x is not None and hold else x for x, hold in zip(parts, held, strict=True)
    ]
    value, _, *found = value_and_gradients(
        features, *fixed, indices, indptr, class_weight, row_weight, loss, parameter, need
    )
    result: Tensor = value
    for part, gradient, buffer, hold in zip(parts, found, into, held, strict=True):
        if hold:
            result = accumulated(result, part, gradient.detach(), buffer)
    return result
