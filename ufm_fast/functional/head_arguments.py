"""The arguments of `derivatives`, checked and made the head that a backend takes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ufm_fast.arguments import number
from ufm_fast.backends import BACKENDS, Backend, HeadInput, make_backend
from ufm_fast.backends.base import compute_dtype
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.head_inputs import backend_for
from ufm_fast.functional.target_sets import checked_sets
from ufm_fast.losses import Loss, loss_of
from ufm_fast.targets import Targets, check_labels

PARTS = ("features", "weight", "bias")


def checked_head(
    loss: str | Loss,
    features: Tensor,
    weight: Tensor,
    targets: Any,
    bias: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    smoothing: float,
    gamma: float | None,
    need: Collection[str],
    backend: str | Backend,
) -> tuple[Backend, HeadInput, list[bool]]:
    """The backend, the head, and which of PARTS are to have gradients."""
    tensors = {"features": features, "weight": weight, "bias": bias}
    checks.check_floats(tensors, one_dtype=True)
    checks.check_shapes(features, weight, bias, ("features", "weight", "bias"))
    if features.dim() != 2 or weight.dim() != 2:
        raise InputError(
            f"features must be (N, d) and weight (K, d), got {tuple(features.shape)}, "
            f"{tuple(weight.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be mean or sum, got {reduction!r}")
    loss = loss_of(loss, smoothing=smoothing, gamma=gamma)
    checks.check_need(need, PARTS)
    rows = _row_weight(row_weight, features, reduction)
    checked = _targets(loss, targets, features, weight.shape[0])
    bias = None if bias is None else bias.detach().contiguous()
    x = HeadInput(
        loss, features.detach().contiguous(), weight.detach().contiguous(), bias, checked, rows
    )
    return (
        _backend(backend, weight.device, weight.dtype),
        x,
        [part in need and tensors[part] is not None for part in PARTS],
    )


def _backend(backend: str | Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    if backend == "auto":
        return backend_for(device.type, dtype)
    if isinstance(backend, str):
        return make_backend(backend, device, dtype)
    if not hasattr(backend, "head_hvp"):
        raise InputTypeError(
            f"backend must be one of {', '.join(BACKENDS)} or a backend, got "
            f"{type(backend).__name__}"
        )
    return backend


def _targets(loss: Loss, targets: Any, features: Tensor, classes: int) -> Targets:
    if loss.multi_label:
        indptr, indices = checked_sets(targets, features.shape[0], classes, features.device)
        return Targets(indices, indptr)
    targets = targets.indices if isinstance(targets, Targets) and targets.single else targets
    checks.check_tensor(targets, "targets")
    if targets.requires_grad:
        raise InputError("targets must not require a gradient; pass targets.detach()")
    if targets.device != features.device:
        raise InputError(
            f"targets are on {targets.device} but features on {features.device}; move them with "
            f".to()"
        )
    if tuple(targets.shape) != (features.shape[0],):
        raise InputError(
            f"targets must have shape ({features.shape[0]},), one class a row, got "
            f"{tuple(targets.shape)}"
        )
    return Targets(check_labels(targets, classes, "targets", "give weight more rows").contiguous())


def _row_weight(row_weight: Tensor | None, features: Tensor, reduction: str) -> Tensor:
    if row_weight is None:
        weights = torch.ones(features.shape[0], dtype=torch.float64, device=features.device)
    else:
        checks.check_floats({"features": features, "row_weight": row_weight}, one_dtype=False)
        if tuple(row_weight.shape) != (features.shape[0],):
            raise InputError(
                f"row_weight must have shape ({features.shape[0]},), got {tuple(row_weight.shape)}"
            )
        weights = row_weight.detach().double()
        if not capturing(weights) and not bool(torch.isfinite(weights).all()):
            raise InputError(
                "row_weight must be finite, got NaN or infinity; give 0 to leave a row out"
            )
    return (
        torch.where(weights == 0, 0.0, weights / weights.sum()) if reduction == "mean" else weights
    )


def capturing(x: Tensor) -> bool:
    """While a CUDA graph is captured nothing may wait for the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def checked_penalties(
    lambda_h: float, lambda_w: float, lambda_b: float
) -> tuple[float, float, float]:
    """lambda of features, weight and bias, in that order."""
    for name, value in (("lambda_h", lambda_h), ("lambda_w", lambda_w), ("lambda_b", lambda_b)):
        if number(value, name) < 0:
            raise InputError(f"{name} must be a finite number >= 0, got {value}")
    return float(lambda_h), float(lambda_w), float(lambda_b)


def checked_direction(
    direction: Any, points: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The three parts of a direction in the dtype of sums, zeros for a part left out."""
    if not isinstance(direction, tuple) or not 2 <= len(direction) <= 3:
        raise InputError(
            "direction must have the parts (features, weight) or (features, weight, bias), None "
            "for zeros"
        )
    parts = [*direction, None][:3]
    checked: list[Tensor | None] = []
    for name, part, point in zip(PARTS, parts, points, strict=True):
        if point is None and part is not None:
            raise InputError(
                f"direction has a {name} part but the head has no {name}; pass None there"
            )
        if part is not None and point is not None:
            checks.check_floats({name: point, f"direction's {name}": part}, one_dtype=False)
            if part.shape != point.shape:
                raise InputError(
                    f"direction's {name} must have shape {tuple(point.shape)}, got "
                    f"{tuple(part.shape)}"
                )
        if point is None:
            checked.append(None)
        elif part is None:
            checked.append(torch.zeros_like(point, dtype=compute_dtype(point.dtype)))
        else:
            checked.append(part.detach().to(compute_dtype(point.dtype)).contiguous())
    return tuple(checked)
