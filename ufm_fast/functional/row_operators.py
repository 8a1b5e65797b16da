"""The cross-entropy of labels with what one sweep tells of every row beside it, as an operator of
torch.

    head_details    (value, its gradients, -log p_y, entropy, largest class, rank of the target)
    head_entropy    gradient of  sum_r row_weight_r l_r + entropy_weight_r entropy_r,
                    the backward of the third and fourth

They run by ``TiledBackend`` on every device: the kernels' tables know no entropy and no largest
class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends import Gradients
from ufm_fast.backends.base import compute_dtype
from ufm_fast.backends.details import add_row_gradients, head_with_details
from ufm_fast.functional.head_inputs import TILED, head_input
from ufm_fast.functional.operators import HEAD, fake_gradients, filled, zeros_for
from ufm_fast.functional.registration import differentiable, hooks_are_set, keep, operator
from ufm_fast.functional.rules import (
    head_rule,
    head_tangents,
    in_sums,
    row_slopes,
    summed,
    value_and_gradients,
)

_SECOND = "second derivatives of the entropy are not available; take them of the dense expression"


@operator(
    f"({HEAD}, Tensor row_weight, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
    f"Tensor, Tensor, Tensor)"
)
def head_details(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(sum_r row_weight_r l_r, its gradients, l, entropy) in the dtype of sums, (argmax, rank)
    int64.
    """
    _, x = head_input(features, weight, bias, indices, indptr, None, row_weight, "ce", 0.0)
    buffers = zeros_for((features, weight, bias), need, torch.empty)
    value, rows = head_with_details(
        TILED.softmax, x, Gradients(buffers[0], buffers[1], buffers[2], fresh=True)
    )
    dtype = compute_dtype(weight.dtype)
    return (
        value.to(dtype),
        *filled(buffers, weight),
        rows.log_loss.to(dtype),
        rows.entropy.to(dtype),
        rows.argmax,
        rows.rank,
    )


def _head_details_shapes(
    features: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    dtype, number = compute_dtype(weight.dtype), features.shape[0]
    floats = [weight.new_empty(number, dtype=dtype) for _ in range(2)]
    whole = [indices.new_empty(number, dtype=torch.int64) for _ in range(2)]
    return (
        weight.new_empty((), dtype=dtype),
        *fake_gradients(features, weight, bias, *others),
        *floats,
        *whole,
    )


head_details.register_fake(_head_details_shapes)


@operator(
    f"({HEAD}, Tensor row_weight, Tensor entropy_weight, bool[] need) -> (Tensor, Tensor, Tensor)"
)
def head_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    entropy_weight: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradient of the weighted sum of row losses and entropies, for the parts in ``need``."""
    _, x = head_input(features, weight, bias, indices, indptr, None, row_weight, "ce", 0.0)
    buffers = zeros_for((features, weight, bias), need)
    add_row_gradients(
        TILED.softmax, x, entropy_weight, Gradients(buffers[0], buffers[1], buffers[2])
    )
    return filled(buffers, weight)


def _refused(*_: Any) -> Any:
    raise NotImplementedError(_SECOND)


head_entropy.register_fake(fake_gradients)
entropy_gradients = differentiable(
    head_entropy, lambda ctx, inputs, output: None, _refused, _refused
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.need = inputs
    ctx.loss, ctx.parameter, ctx.hooked = "ce", 0.0, hooks_are_set()
    keep(ctx, *tensors, *output[1:4])


def _backward(ctx: Any, upstream: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    directions, of_losses, of_entropy = rest[:3], rest[3], rest[4]
    saved = ctx.saved_tensors
    total = list(head_rule(ctx, saved, upstream, directions)[:7])
    inputs, needed = saved[:6], [bool(flag) for flag in ctx.needs_input_grad[:3]]
    if any(needed) and (of_losses is not None or of_entropy is not None):
        if of_entropy is None:
            more = value_and_gradients(*inputs, of_losses, "ce", 0.0, needed)[1:]
        else:
            weights = torch.zeros_like(of_entropy) if of_losses is None else of_losses
            more = entropy_gradients(*inputs, weights, of_entropy, needed)
        for i, wanted in enumerate(needed):
            total[i] = summed(total[i], more[i].to(inputs[i].dtype) if wanted else None)
    return (*total, None)


def _tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the value, its gradients and l."""
    first = head_tangents(ctx, saved, *moves)
    along = in_sums(moves[:3])
    slopes = (
        row_slopes(*saved[:6], *along, "ce", 0.0) if any(v is not None for v in along) else None
    )
    return (*first, slopes, None, None, None)


detailed_head = differentiable(head_details, _context, _backward, _tangents)
