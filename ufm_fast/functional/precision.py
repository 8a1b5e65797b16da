"""Checked inputs of a head in the dtype of its products, and the dtype of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.functional import checks

# Asked once: torch 2.11 can't trace the question.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)
NAMES = ("input", "linear_weight", "linear_bias")


def prepared(
    tensors: dict[str, Any], logit_scale: object = None, whole: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """Checked (features, matrix, bias) in the dtype of the products, times the scale, and the dtype
    of the result. Unless ``whole`` they are parts of what has been checked for its shapes.
    """
    features, matrix, bias = tensors.values()
    dtype, products = dtypes_of(tensors)
    if whole:
        checks.check_shapes(features, matrix, bias, NAMES)
    if (
        logit_scale is not None
    ):  # a pass over N x d, before the one rounding to the dtype of the products
        scale = checks.check_logit_scale(logit_scale, features.device)
        features, bias = scaled(features, scale), None if bias is None else scaled(bias, scale)
    return (
        features.to(products),
        matrix.to(products),
        None if bias is None else bias.to(products),
        dtype,
    )


def scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    """In the dtype of sums."""
    return x.to(compute_dtype(x.dtype)) * scale


def dtypes_of(tensors: dict[str, Any]) -> tuple[torch.dtype, torch.dtype]:
    """Of the result and of the products, of checked features, matrix and bias.

    Under autocast as torch's ``linear`` and ``cross_entropy``: products in autocast's dtype, the
    loss in float32.
    """
    features = checks.check_tensor(tensors["input"], "input")
    device = features.device.type
    cast = device in _AUTOCAST and torch.is_autocast_enabled(device)
    checks.check_floats(tensors, one_dtype=not cast)
    if cast and not any(x is not None and x.dtype == torch.float64 for x in tensors.values()):
        return torch.float32, torch.get_autocast_dtype(device)
    checks.check_floats(tensors, one_dtype=True)
    return features.dtype, features.dtype
