"""Class indices as an operator of torch: their range is checked in compiled graphs too."""

from __future__ import annotations

import torch
from torch import Tensor

from ufm_fast.arguments import INTEGERS
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional.registration import one_by_one, operator


@operator("(Tensor labels, SymInt classes, int ignore_index) -> (Tensor, Tensor)")
def checked_labels(labels: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(labels as int64 with 0 for ignored ones, factor of each row: 1, or 0 where ignored), after a
    check of the range.

    An operator, so that a compiled graph checks too. While a CUDA graph is captured nothing may be
    read back: then a label out of range costs a NaN factor in place of an error, and never a read
    out of bounds.
    """
    if labels.dtype not in INTEGERS:
        raise InputTypeError(
            f"target must hold integers, got {labels.dtype}; convert class indices with "
            f"target.long()"
        )
    wrapping = labels.dtype == torch.uint64
    labels = labels.to(torch.int64)
    kept = labels != ignore_index
    if wrapping:  # beyond int64: no class, and not the ignored one either
        kept |= labels < 0
    clean = torch.where(kept, labels, 0)
    wrong = (clean < 0) | (clean >= classes)
    factor = kept.double()
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.where(wrong, 0, clean), factor.masked_fill(wrong, float("nan"))
    if bool(wrong.any()):
        if wrapping and int(labels.min()) < 0:
            raise InputError(f"target holds values beyond int64; it must lie in [0, {classes})")
        raise InputError(
            f"target must lie in [0, {classes}) or equal ignore_index ({ignore_index}), "
            f"got values from {int(labels.min())} to {int(labels.max())}; mend the labels or the "
            f"rows of linear_weight"
        )
    return clean, factor


def _checked_labels_shapes(
    labels: Tensor, classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(labels, dtype=torch.int64), torch.empty_like(
        labels, dtype=torch.float64
    )


checked_labels.register_fake(_checked_labels_shapes)
checked_labels.register_vmap(one_by_one(checked_labels))
