"""What the functions accept, checked before any number is computed; every message names the
argument and the mend.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from ufm_fast.adjustments import Adjustment
from ufm_fast.arguments import whole
from ufm_fast.errors import InputError, InputTypeError

REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_dtensor(value: object) -> bool:
    """Whether it is a tensor on several ranks; without importing what that is."""
    return hasattr(value, "full_tensor")


def check_tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise InputTypeError(
            f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor() or "
            f"{name}.to_local()"
        )
    return value


def check_floats(tensors: dict[str, Tensor | None], *, one_dtype: bool) -> None:
    """All on one device, floating point, and of one dtype if ``one_dtype`` (autocast brings them
    together itself).
    """
    first_name, first = next((name, check_tensor(x, name)) for name, x in tensors.items())
    for name, x in tensors.items():
        if x is None:
            continue
        check_tensor(x, name)
        if x.is_nested:
            raise InputTypeError(
                f"{name} must be a dense tensor, got a nested one; use "
                f"torch.nested.to_padded_tensor"
            )
        if x.layout != torch.strided:
            raise InputTypeError(
                f"{name} must be a dense tensor, got layout {x.layout}; convert it with "
                f"{name}.to_dense()"
            )
        if x.dtype not in _FLOATS:
            raise InputTypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}"
            )
        if x.device != first.device:
            raise InputError(
                f"{name} is on {x.device} but {first_name} on {first.device}; move them to one "
                f"device with .to()"
            )
        if one_dtype and x.dtype != first.dtype:
            raise InputTypeError(
                f"{name} is {x.dtype} but {first_name} is {first.dtype}; convert one with .to(), "
                f"or use torch.autocast"
            )


def check_shapes(
    features: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]
) -> None:
    """features (d) or (N, d); weight (K, ..., d) with K >= 2; bias (K, ...)."""
    if features.dim() not in (1, 2):
        raise InputError(
            f"{names[0]} must have shape (d) or (N, d), got {tuple(features.shape)}; flatten "
            f"leading dimensions with "
            f"{names[0]}.flatten(0, -2) and target.flatten()"
        )
    if weight.dim() < 2:
        raise InputError(
            f"{names[1]} must have shape (K, d) or (K, d_1, ..., d), got {tuple(weight.shape)}"
        )
    if features.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"{names[0]} has {features.shape[-1]} features a row but {names[1]} has "
            f"{weight.shape[-1]}; "
            "their last dimensions must agree"
        )
    if features.shape[-1] < 1:
        raise InputError(
            f"{names[0]} must have at least one feature a row, got shape {tuple(features.shape)}"
        )
    if weight.shape[0] < 2:
        raise InputError(
            f"{names[1]} must have at least 2 rows (classes), got {weight.shape[0]}: one class "
            f"has no loss"
        )
    if 0 in weight.shape[1:-1]:
        raise InputError(f"{names[1]} must have at least one head, got shape {tuple(weight.shape)}")
    if weight.dim() > 2 and features.dim() == 1:
        raise InputError(
            f"{names[1]} of shape {tuple(weight.shape)} needs batched {names[0]} (N, d); use "
            f"{names[0]}[None]"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise InputError(
            f"{names[2]} must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}"
        )


def check_target(target: Tensor, device: torch.device, *, differentiable: bool = False) -> None:
    """A dense tensor on ``device``; ``differentiable`` says that it may require a gradient."""
    check_tensor(target, "target")
    if target.layout != torch.strided:
        raise InputTypeError(
            f"target must be a dense tensor, got layout {target.layout}; convert it with "
            f"target.to_dense()"
        )
    if target.requires_grad and not differentiable:
        raise InputError("target must not require a gradient; pass target.detach()")
    if target.device != device:
        raise InputError(
            f"target is on {target.device} but the input on {device}; move it with "
            f"target.to({str(device)!r})"
        )
    if target.dtype == torch.bool or target.is_complex():
        raise InputTypeError(
            f"target must hold class indices (int64) or probabilities (floats), got {target.dtype}"
        )


def check_labels_shape(target: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(target.shape) != expected:
        raise InputError(
            f"target must have shape {expected}, one class index for each row, got "
            f"{tuple(target.shape)}"
        )


def check_class_weight(class_weight: Tensor | None, weight: Tensor) -> None:
    if class_weight is not None:
        check_floats({"linear_weight": weight, "weight": class_weight}, one_dtype=False)
        check_weight_alone(class_weight, weight.shape[0])


def check_weight_alone(class_weight: Tensor, classes: int) -> None:
    """A floating-point tensor (classes,) without gradient, on any device."""
    check_floats({"weight": class_weight}, one_dtype=True)
    if tuple(class_weight.shape) != (classes,):
        raise InputError(
            f"weight must have shape ({classes},), one for each class, got "
            f"{tuple(class_weight.shape)}"
        )
    if class_weight.requires_grad:
        raise InputError(
            "weight (of the classes) must not require a gradient; pass weight.detach()"
        )


def check_adjustment(adjustment: object, weight: Tensor) -> Adjustment:
    """On the device of a classifier of one head. Errors: InputError / InputTypeError."""
    if adjustment is None:
        return Adjustment()
    if not isinstance(adjustment, Adjustment):
        raise InputTypeError(
            f"adjustment must be one of make_adjustment(counts, ..), got "
            f"{type(adjustment).__name__}"
        )
    if weight.dim() != 2:
        raise InputError(
            f"adjustment goes with one head, linear_weight (K, d), got shape "
            f"{tuple(weight.shape)}; leave it out"
        )
    sizes = {
        x.numel() for x in (adjustment.offset, adjustment.margin, adjustment.scale) if x is not None
    }
    if sizes - {weight.shape[0]}:
        raise InputError(
            f"adjustment is of {max(sizes)} classes but linear_weight has {weight.shape[0]} rows; "
            f"make it of its counts"
        )
    return adjustment.to(weight.device)


def check_sample_weight(
    sample_weight: Tensor | None, weight: Tensor, shape: tuple[int, ...]
) -> None:
    if sample_weight is None:
        return
    check_floats({"linear_weight": weight, "sample_weight": sample_weight}, one_dtype=False)
    if tuple(sample_weight.shape) != shape:
        raise InputError(
            f"sample_weight must have shape {shape}, one for each row loss, got "
            f"{tuple(sample_weight.shape)}"
        )
    if sample_weight.requires_grad:
        raise InputError(
            "sample_weight must not require a gradient; multiply the losses of reduction='none' "
            "by it instead"
        )


def check_divisor(divisor: object, reduction: str, device: torch.device) -> float | Tensor | None:
    """A positive number, or a tensor of one, which is not looked at: a device would have to be
    waited for.
    """
    if divisor is None:
        return None
    if reduction == "none":
        raise InputError(
            "divisor divides the sum of the losses; with reduction='none' leave it out and divide "
            "the rows"
        )
    if isinstance(divisor, Tensor):
        if divisor.requires_grad:
            raise InputError("divisor must not require a gradient; pass divisor.detach()")
        return _scalar(divisor, "divisor", device).detach().double()
    value = real(divisor, "divisor")
    if not 0.0 < value < math.inf:
        raise InputError(f"divisor must be a positive number, got {divisor}")
    return value


def check_logit_scale(logit_scale: object, device: torch.device) -> float | Tensor:
    """A finite number, or a tensor of one, which may require a gradient."""
    if isinstance(logit_scale, Tensor):
        return _scalar(logit_scale, "logit_scale", device)
    value = real(logit_scale, "logit_scale")
    if not math.isfinite(value):
        raise InputError(f"logit_scale must be a finite number, got {logit_scale}")
    return value


def check_softcap(softcap: object) -> float | None:
    if softcap is None:
        return None
    value = real(softcap, "softcap")
    if not 0.0 < value < math.inf:
        raise InputError(f"softcap must be a positive number, got {softcap}")
    return value


def _scalar(value: Tensor, name: str, device: torch.device) -> Tensor:
    check_tensor(value, name)
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        raise InputError(
            f"{name} must be a number or a real tensor of one, got shape {tuple(value.shape)} of "
            f"{value.dtype}"
        )
    if value.device != device and value.device.type != "cpu":
        raise InputError(
            f"{name} is on {value.device} but the input on {device}; move it with "
            f"{name}.to({str(device)!r})"
        )
    return value.reshape(())


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def plain(value: object) -> object:
    """A number for what torch takes as one as well: a tensor or an array of no dimension that needs
    no gradient.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad:
        return value.item()
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def real(value: object, name: str) -> float:
    """As ``arguments.number`` for a range that the caller checks, in words that torch.compile can
    trace.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputTypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_options(options: object) -> None:
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise InputTypeError(
            f"options must be None or torch.nn.LinearCrossEntropyOptions, got "
            f"{type(options).__name__}"
        )


def check_smoothing(label_smoothing: object) -> float:
    smoothing = real(label_smoothing, "label_smoothing")
    if not 0.0 <= smoothing <= 1.0:
        raise InputError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    return smoothing


def check_ignore_index(ignore_index: object) -> int:
    return whole(plain(ignore_index), "ignore_index", -(2**63), 2**63 - 1)


def check_need(need: object, parts: tuple[str, ...]) -> None:
    allowed = f"need must be a collection of parts among {', '.join(parts)}"
    if isinstance(need, str):
        raise InputTypeError(f"{allowed}, got the string {need!r}; write ({need!r},)")
    if not isinstance(need, Collection):
        raise InputTypeError(f"{allowed}, got {need!r}")
    unknown = [part for part in need if part not in parts]
    if unknown:
        raise InputError(
            f"need must name parts among {', '.join(parts)}; got {', '.join(map(str, unknown))}"
        )
