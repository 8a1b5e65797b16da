"""The head as torch operators: one sweep for value and gradients, traceable, never R x K.

    head           (value, gradients) of  sum_r row_weight_r l_r
    head_losses    l_r
    head_product   Hessian of the sum times a direction
    head_slopes    derivative of every l_r along a direction

What they are here has no derivatives yet: `rules` has those, and the operators that callers take.
All take the loss as its name and its one parameter (`head_inputs`). Library users want the
functions of ``ufm_fast.functional``; these names are not part of the public interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends import Backend, Gradients, HeadInput
from ufm_fast.backends.base import compute_dtype
from ufm_fast.functional.head_inputs import head_input
from ufm_fast.functional.registration import operator
from ufm_fast.functional.rows import over_rows, rows_of, rows_with_weight

HEAD = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor indices, Tensor? indptr, Tensor? "
    "class_weight"
)
_LOSS = "str loss, float parameter"


def zeros_for(
    likes: Sequence[Tensor | None],
    need: Sequence[bool],
    create: Callable[..., Tensor] = torch.zeros,
) -> list[Tensor | None]:
    """A buffer (zero, or as ``create`` makes it) in the dtype of sums for each tensor whose
    derivative is needed.
    """
    return [
        create(x.shape, dtype=compute_dtype(x.dtype), device=x.device)
        if wanted and x is not None
        else None
        for x, wanted in zip(likes, need, strict=True)
    ]


def filled(buffers: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators cannot return None: an empty tensor stands for a derivative that was not asked
    for.
    """
    absent = [like.new_empty(0, dtype=compute_dtype(like.dtype)) for _ in buffers]
    return tuple(
        other if buffer is None else buffer for buffer, other in zip(buffers, absent, strict=True)
    )


def fake_gradients(
    features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """What an operator returns that is asked last for the gradients in the parts that it
    ``need``s.
    """
    dtype = compute_dtype(features.dtype)
    return tuple(
        features.new_empty(x.shape if wanted and x is not None else (0,), dtype=dtype)
        for x, wanted in zip((features, weight, bias), others[-1], strict=True)
    )


@operator(f"({HEAD}, Tensor row_weight, {_LOSS}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor)")
def head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    loss: str,
    parameter: float,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(sum_r row_weight_r l_r, gradients in features, weight and bias), in the dtype of sums."""
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, row_weight, loss, parameter
    )
    # Fresh memory, which the backend writes: zeroing a gradient first would be a pass over it for
    # nothing.
    buffers = zeros_for((features, weight, bias), need, torch.empty)
    out = Gradients(buffers[0], buffers[1], buffers[2], fresh=True)
    value = over_rows(active_rows(x), x, out, lambda x, out: backend.head(x, out).value)
    return (value.to(compute_dtype(weight.dtype)), *filled(buffers, weight))


def _head_shapes(
    features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    value = weight.new_empty((), dtype=compute_dtype(weight.dtype))
    return (value, *fake_gradients(features, weight, bias, *others))


head.register_fake(_head_shapes)


def active_rows(x: HeadInput) -> Tensor | None:
    """Rows with a weight, where others can be left out: on the CPU, for a GPU would wait for the
    count.
    """
    return rows_with_weight(x) if x.row_weight.device.type == "cpu" else None


@operator(f"({HEAD}, {_LOSS}) -> Tensor")
def head_losses(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    loss: str,
    parameter: float,
) -> Tensor:
    """l_r of each row (R,), in the dtype of sums."""
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, _ones(features), loss, parameter
    )
    if not features.shape[0]:
        return features.new_zeros(0, dtype=compute_dtype(weight.dtype))
    return backend.losses(x).to(compute_dtype(weight.dtype))


def _rows_shape(features: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """A number a row, as losses and slopes have it."""
    return features.new_empty(features.shape[0], dtype=compute_dtype(weight.dtype))


head_losses.register_fake(_rows_shape)


def _ones(features: Tensor) -> Tensor:
    return torch.ones(features.shape[0], dtype=torch.float64, device=features.device)


@operator(
    f"({HEAD}, Tensor row_weight, Tensor? v_features, Tensor? v_weight, Tensor? v_bias, {_LOSS}, "
    f"bool[] need)"
    " -> (Tensor, Tensor, Tensor)"
)
def head_product(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    v_features: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    loss: str,
    parameter: float,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Hessian of the weighted sum times the direction (None is zero), for the parts in ``need``."""
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, row_weight, loss, parameter
    )
    direction = direction_at(x, v_features, v_weight, v_bias)
    buffers, rows = zeros_for((features, weight, bias), need), active_rows(x)
    if rows is not None:
        direction = rows_of(direction, rows)
    over_rows(
        rows,
        x,
        Gradients(buffers[0], buffers[1], buffers[2]),
        lambda x, out: backend.head_hvp(x, direction, out),
    )
    return filled(buffers, weight)


head_product.register_fake(fake_gradients)


def direction_at(
    x: HeadInput, features: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> HeadInput:
    """A direction at ``x`` in its dtype of sums, with zeros for parts that do not move."""
    features, weight, bias = (
        v.contiguous() if v is not None else zeros
        for v, zeros in zip(
            (features, weight, bias),
            zeros_for((x.features, x.weight, x.bias), [True] * 3),
            strict=True,
        )
    )
    assert features is not None
    assert weight is not None
    return HeadInput(x.loss, features, weight, bias, x.targets, x.row_weight)


@operator(f"({HEAD}, Tensor? v_features, Tensor? v_weight, Tensor? v_bias, {_LOSS}) -> Tensor")
def head_slopes(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    v_features: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    loss: str,
    parameter: float,
) -> Tensor:
    """Slope of each row's loss along the direction (R,):  v_h . G W + h . G v_W + G v_b
    with G the logit gradient.
    """
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, _ones(features), loss, parameter
    )
    return slopes_along(backend, x, direction_at(x, v_features, v_weight, v_bias))


def slopes_along(backend: Backend, x: HeadInput, v: HeadInput) -> Tensor:
    """`head_slopes` of a head's input and a direction."""
    dtype, dim = compute_dtype(x.weight.dtype), x.features.shape[1]
    right = (
        [x.weight.to(dtype), v.weight]
        if v.bias is None
        else [x.weight.to(dtype), v.weight, v.bias[:, None]]
    )
    product = backend.logit_gradient(x).times(torch.cat(right, dim=1))
    slopes = (v.features * product[:, :dim]).sum(1) + (x.features * product[:, dim : 2 * dim]).sum(
        1
    )
    return slopes if v.bias is None else slopes + product[:, -1]


head_slopes.register_fake(_rows_shape)
