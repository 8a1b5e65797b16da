"""What the metrics accept: checked once, at the door, with messages that name the argument and the
mend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import number
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.metrics.rows import block_rows

LARGEST = 1e70  # fourth powers, summed, stay finite


def as_tensor(value: Any, name: str) -> Tensor:
    """`value` as a detached tensor; numpy arrays are accepted and not copied."""
    if isinstance(value, np.ndarray):
        native = value.dtype.newbyteorder("=")
        readable = (
            value.flags.writeable and value.dtype == native and min(value.strides, default=0) >= 0
        )
        try:
            value = torch.from_numpy(
                value if readable else np.array(value, dtype=native, order="C")
            )
        except TypeError as error:  # objects, strings, long doubles
            raise InputTypeError(
                f"{name} must hold numbers that torch knows, got dtype {value.dtype}"
            ) from error
    if not isinstance(value, Tensor):
        raise InputTypeError(
            f"{name} must be a torch tensor or a numpy array, got {type(value).__name__}"
        )
    if value.layout != torch.strided or value.is_meta:
        raise InputTypeError(
            f"{name} must be a dense tensor with data, got layout {value.layout} on {value.device}"
        )
    return value.detach()


def check_matrix(value: Any, name: str) -> Tensor:
    """`value` as a finite floating matrix with at least one row and one column."""
    matrix = as_tensor(value, name)
    if not matrix.is_floating_point() or matrix.dtype.itemsize < 2:
        raise InputTypeError(
            f"{name} must have a real floating dtype, got {matrix.dtype}; convert it to float64"
        )
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise InputError(
            f"{name} must be a matrix of shape (rows, dim), neither of them 0, got "
            f"{tuple(matrix.shape)}"
        )
    for block in torch.split(matrix, block_rows(matrix.shape[1])):
        check_finite(block, name)
        if float(block.abs().max()) > LARGEST:
            raise InputError(
                f"{name} has entries beyond {LARGEST:g}, whose squares overflow; divide it by a "
                f"constant"
            )
    return matrix


def check_finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            f"{name} must be finite, got NaN or infinity; look for a diverged run or a damaged file"
        )


def check_vector(value: Any, name: str, length: int, match: str) -> Tensor:
    """`value` as a finite float64 vector of the given length; integers are accepted."""
    vector = as_tensor(value, name)
    if vector.is_complex() or vector.dtype == torch.bool:
        raise InputTypeError(f"{name} must hold real numbers, got {vector.dtype}")
    if vector.shape != (length,):
        raise InputError(
            f"{name} must have shape ({length},) to match {match}, got {tuple(vector.shape)}"
        )
    vector = vector.to(torch.float64)
    check_finite(vector, name)
    return vector


def check_counts(value: Any, length: int) -> Tensor:
    """Samples that each row stands for, as float64: finite, not negative, not all zero."""
    counts = check_vector(value, "counts", length, "the rows of features")
    if float(counts.min()) < 0 or float(counts.max()) == 0:
        raise InputError(
            "counts must not be negative, nor all zero: row r stands for counts[r] samples"
        )
    return counts


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise InputError(
            f"all inputs must be on one device, got {devices}; move them with .to(device)"
        )


def check_positive(value: float, name: str) -> float:
    if not number(value, name) > 0:
        raise InputError(f"{name} must be positive, got {value!r}")
    return float(value)


def check_same_dim(weight: Tensor, features: Tensor) -> None:
    if weight.shape[1] != features.shape[1]:
        raise InputError(
            f"weight and features must have as many columns, got {tuple(weight.shape)} and "
            f"{tuple(features.shape)}; "
            "both hold a row per class or sample: transpose the one that does not"
        )
