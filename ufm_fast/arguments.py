"""Checks of plain numbers and integer arrays that users give; every message names the argument, the
value and the mend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ufm_fast.errors import InputError, InputTypeError

#: Dtypes of labels and counts. torch converts the unsigned ones but computes little with them.
INTEGERS = (
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
#: Factors of a class, a row or of all logits. Of what stands beside one that is further from 1 than
#: 1 / eps nothing is left in float64, and solves end far from their minimum.
LEAST_FACTOR, MOST_FACTOR = 1e-16, 1e16
#: What float64 counts one by one: sums of samples beyond it would not be exact.
MOST = 2**53
#: Columns of H or of a layer. Beyond it no machine holds the vectors: a slip.
MOST_DIM = 2**31 - 1

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def cpu_by_default(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """``function`` with the tensors it makes where it says, and else on the CPU, whatever
    ``torch.set_default_device`` says.
    """

    @functools.wraps(function)
    def run(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        if (
            torch.get_default_device().type == "cpu"
        ):  # a device as a context costs every operation something
            return function(*given, **named)
        with torch.device("cpu"):
            return function(*given, **named)

    return run


def device_of(name: str) -> torch.device:
    """The device of that name. Errors: InputError for one that is unknown, or not of this
    machine.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device cuda is not available on this machine; use cpu (--device cpu or auto)"
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {name!r}")
    return device


def whole(value: object, name: str, least: int, most: int = MOST) -> int:
    """``value`` as int. Errors: InputTypeError unless it is a whole number, InputError outside
    [least, most].
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputTypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise InputError(f"{name} must be at most {most}, got {value}")
    return int(value)


def number(value: object, name: str) -> float:
    """``value`` as a finite float. Errors: InputTypeError unless it is a real number, InputError
    for nan and infinities.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputTypeError(f"{name} must be a number, got {value!r}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise InputError(f"{name} must be a finite number, got {found}")
    return found


def sequence(values: Any, name: str) -> list[Any]:
    """``values`` as a list. Errors: InputTypeError unless they are in an array or a sequence."""
    try:
        return list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError as error:
        raise InputTypeError(
            f"{name} must be a number or a sequence of numbers, got {values!r}"
        ) from error


def factor(value: object, name: str) -> float:
    """``value`` as a float between the least and the most factor. Errors: as `number`, and
    InputError beyond them.
    """
    found = number(value, name)
    if not LEAST_FACTOR <= found <= MOST_FACTOR:
        raise InputError(
            f"{name} must lie in [{LEAST_FACTOR:g}, {MOST_FACTOR:g}], got {found}; bring it nearer "
            f"to 1"
        )
    return found


def integers(values: object, name: str) -> Tensor:
    """``values``, a tensor, array or sequence, as an int64 tensor of the same shape.

    Errors: InputTypeError for floats, booleans, ragged or foreign content; InputError for values
    beyond int64.
    """
    try:
        if isinstance(
            values, np.ndarray
        ):  # torch reads neither the other byte order nor read-only memory gladly
            values = np.array(values, dtype=values.dtype.newbyteorder("="))
        found = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if "overflow" in str(error).lower() or isinstance(error, OverflowError):
            raise InputError(
                f"{name} holds values beyond int64; give numbers below {2**63}"
            ) from error
        raise InputTypeError(
            f"{name} must hold integers, in an array or a plain sequence ({error})"
        ) from error
    if found.layout != torch.strided or found.is_meta:
        raise InputTypeError(
            f"{name} must be a dense tensor with data, got layout {found.layout} on {found.device}"
        )
    if found.numel() == 0 and not isinstance(values, (Tensor, np.ndarray)):
        found = found.to(torch.int64)  # an empty list says nothing of its type
    if found.dtype not in INTEGERS:
        raise InputTypeError(f"{name} must hold integers, got {found.dtype}; convert them to int64")
    converted = found.to(torch.int64)
    if found.dtype == torch.uint64 and bool((converted < 0).any()):
        raise InputError(f"{name} holds values beyond int64; give numbers below {2**63}")
    return converted
