"""What a driver of a head refuses: shapes, dtypes and devices, in words."""

import torch

from .rows import (
    cross_entropy_value,
)


def check_buffers(
    features, weight, bias, grad_features, grad_weight, grad_bias, need_features, need_weight
):
    """ValueErrors about the gradient buffers."""
    for name, needed, out, like in (
        ("grad_features", need_features, grad_features, features),
        ("grad_weight", need_weight, grad_weight, weight),
        ("grad_bias", grad_bias is not None, grad_bias, weight[:, 0]),
    ):
        if needed and (
            out is None
            or out.shape != like.shape
            or out.dtype != torch.float32
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"{name}: must be a contiguous float32 tensor of shape {tuple(like.shape)}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: must be of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias is not None and not bias.is_contiguous():
        raise ValueError("bias: is strided or expanded; pass bias.contiguous()")


def check(features, weight, labels, row_weight, smoothing, value_fn, chunk_rows, products, mode):
    """ValueErrors of `softmax_value_and_grad` that concern its inputs."""
    rows, classes = features.shape[0], weight.shape[0]
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)}: must be (R, d) and "
            f"(K, d)"
        )
    if rows == 0 or classes < 2:
        raise ValueError(
            f"features has {rows} rows and weight {classes} classes: at least 1 and 2 are needed"
        )
    if labels.shape[0] != rows or row_weight.shape != (rows,) or row_weight.dtype != torch.float32:
        raise ValueError(
            f"targets, row_weight: one entry for each of the {rows} rows, row_weight in float32"
        )
    devices = {features.device, weight.device, labels.device, row_weight.device}
    if len(devices) > 1:
        raise ValueError(
            f"features, weight, targets, row_weight: on different devices "
            f"{sorted(map(str, devices))}"
        )
    if labels.shape[1] > 1 and (smoothing or value_fn is not cross_entropy_value):
        raise ValueError("targets: several targets a row work with plain cross-entropy only")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing={smoothing}: must lie in [0, 1)")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: must be at least 1")
    if products not in (None, "triton", "library") or (products == "library" and mode.passes != 1):
        raise ValueError(f"products={products!r}: 'triton', or 'library' in a single-pass mode")
