"""Driver of the squared error: value and gradients by Gram matrices, 8 N d^2 flops instead of 6 N K
d.
"""

import torch
from torch import Tensor

from .head_checks import check_buffers
from .head_parts import add_targets
from .launch import on_device
from .operands import mode_named, operand
from .products import add_product
from .rows import as_labels
from .segments import Segments, target_logits
from .squared_error import block_rows, gram, weighted_sum


@torch.no_grad()
@on_device
def squared_error_value_and_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None = None,
    scale: float = 1.0,
    *,
    grad_features: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    mode: str = "bf16x3",
    need_features: bool = True,
    need_weight: bool = True,
    segments: Segments | None = None,
) -> Tensor:
    """sum_i scale_i / 2 |W h_i + b - e_(y_i)|^2 (float64, 0-d), its gradients added to the buffers;
    8 N d^2 flops.

    scale_i = scale * row_weight_i. Buffers as in `softmax_value_and_grad`. Gram matrices are
    accumulated in float64, so the value is exact to float64 rounding of the sums, relative to N,
    not to itself. 'bf16' is allowed but loses the residual near collapse: A h - w_y cancels.
    """
    chosen = mode_named(mode)
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)}: must be (R, d) and "
            f"(K, d)"
        )
    check_buffers(
        features, weight, bias, grad_features, grad_weight, grad_bias, need_features, need_weight
    )
    column = as_labels(labels)
    rows, columns = features.shape
    if column.shape != (rows, 1):
        raise ValueError(
            f"labels: one for each of the {rows} rows, got shape {tuple(labels.shape)}"
        )
    if row_weight is not None and row_weight.shape != (rows,):
        raise ValueError(
            f"row_weight: one for each of the {rows} rows, got shape {tuple(row_weight.shape)}"
        )
    weights = (
        torch.full((rows,), scale, device=features.device)
        if row_weight is None
        else row_weight * scale
    )
    classes_gram = gram(weight)
    rows_gram = gram(features) * scale if row_weight is None else gram(features, weights)
    total = weights.double().sum()
    mean = weighted_sum(features, weights) if bias is not None else None
    picked = target_logits(features, weight, bias, column)[:, 0]
    value = (
        (classes_gram * rows_gram).sum() + total - 2 * (weights.double() * picked.double()).sum()
    )
    own = weights[:, None].contiguous()
    W, H = (
        operand(weight, chosen.products, chosen.passes),
        operand(features, chosen.products, chosen.passes),
    )
    if need_features:
        product = operand(classes_gram, chosen.products, chosen.passes)
        add_product(
            grad_features,
            H,
            product,
            passes=chosen.passes,
            depth=columns,
            down=False,
            factor=weights,
            coefficient=own,
            labels=column,
            points=weight,
            exact=True,
        )
    if need_weight:
        product = operand(rows_gram, chosen.products, chosen.passes)
        add_product(grad_weight, W, product, passes=chosen.passes, depth=columns, down=False)
    if bias is not None:
        shift = weighted_sum(weight, bias)
        value = value + 2 * (shift @ mean) + total * bias.double().square().sum()
        if need_features:
            grad_features.addr_(weights, shift.float())
        if need_weight:
            grad_weight.addr_(bias.float(), mean.float())
    if grad_bias is not None:
        for part, out, own_bias in zip(
            *(x.split(block_rows(columns)) for x in (weight, grad_bias, bias)), strict=True
        ):
            out += (part.double() @ mean + total * own_bias.double()).float()
    add_targets(
        features,
        column,
        own,
        own,
        grad_weight if need_weight else None,
        grad_bias,
        segments,
        weight.shape[0],
    )
    return value / 2
