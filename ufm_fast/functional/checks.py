"""What the functions accept, checked before any number is computed; every message names the argument and the mend."""

from __future__ import annotations

import torch
from torch import Tensor

from ufm_fast.errors import InputError, InputTypeError

REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    return value


def check_floats(tensors: dict[str, Tensor | None], *, one_dtype: bool) -> None:
    """All on one device, floating point, and of one dtype if ``one_dtype`` (autocast brings them together itself)."""
    first_name, first = next((name, check_tensor(x, name)) for name, x in tensors.items())
    for name, x in tensors.items():
        if x is None:
            continue
        check_tensor(x, name)
        if x.layout != torch.strided:
            raise InputTypeError(f"{name} must be a dense tensor, got layout {x.layout}; convert it with {name}.to_dense()")
        if x.dtype not in _FLOATS:
            raise InputTypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != first.device:
            raise InputError(f"{name} is on {x.device} but {first_name} on {first.device}; move them to one device with .to()")
        if one_dtype and x.dtype != first.dtype:
            raise InputTypeError(
                f"{name} is {x.dtype} but {first_name} is {first.dtype}; convert one with .to(), or use torch.autocast"
            )


def check_shapes(features: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]) -> None:
    """features (d) or (N, d); weight (K, ..., d) with K >= 2; bias (K, ...)."""
    if features.dim() not in (1, 2):
        raise InputError(
            f"{names[0]} must have shape (d) or (N, d), got {tuple(features.shape)}; flatten leading dimensions with "
            f"{names[0]}.flatten(0, -2) and target.flatten()"
        )
    if weight.dim() < 2:
        raise InputError(f"{names[1]} must have shape (K, d) or (K, d_1, ..., d), got {tuple(weight.shape)}")
    if features.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"{names[0]} has {features.shape[-1]} features a row but {names[1]} has {weight.shape[-1]}; "
            "their last dimensions must agree"
        )
    if features.shape[-1] < 1:
        raise InputError(f"{names[0]} must have at least one feature a row, got shape {tuple(features.shape)}")
    if weight.shape[0] < 2:
        raise InputError(f"{names[1]} must have at least 2 rows (classes), got {weight.shape[0]}: one class has no loss")
    if 0 in weight.shape[1:-1]:
        raise InputError(f"{names[1]} must have at least one head, got shape {tuple(weight.shape)}")
    if weight.dim() > 2 and features.dim() == 1:
        raise InputError(f"{names[1]} of shape {tuple(weight.shape)} needs batched {names[0]} (N, d); use {names[0]}[None]")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise InputError(f"{names[2]} must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")


def check_target(target: Tensor, device: torch.device, *, differentiable: bool = False) -> None:
    """A dense tensor on ``device``; ``differentiable`` says that it may require a gradient."""
    check_tensor(target, "target")
    if target.layout != torch.strided:
        raise InputTypeError(f"target must be a dense tensor, got layout {target.layout}; convert it with target.to_dense()")
    if target.requires_grad and not differentiable:
        raise InputError("target must not require a gradient; pass target.detach()")
    if target.device != device:
        raise InputError(f"target is on {target.device} but the input on {device}; move it with target.to({str(device)!r})")
    if target.dtype == torch.bool or target.is_complex():
        raise InputTypeError(f"target must hold class indices (int64) or probabilities (floats), got {target.dtype}")


def check_labels_shape(target: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(target.shape) != expected:
        raise InputError(f"target must have shape {expected}, one class index for each row, got {tuple(target.shape)}")


def check_class_weight(class_weight: Tensor | None, weight: Tensor) -> None:
    if class_weight is None:
        return
    check_floats({"linear_weight": weight, "weight": class_weight}, one_dtype=False)
    if tuple(class_weight.shape) != (weight.shape[0],):
        raise InputError(f"weight must have shape ({weight.shape[0]},), one for each class, got {tuple(class_weight.shape)}")
    if class_weight.requires_grad:
        raise InputError("weight (of the classes) must not require a gradient; pass weight.detach()")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
