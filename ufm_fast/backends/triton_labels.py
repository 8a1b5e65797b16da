"""Targets as the kernels read them, laid out once and remembered on the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends.base import HeadInput
from ufm_fast.targets import Targets
from ufm_kernels.segments import Segments

MAX_TARGETS = 32  # of a row, that the kernels compare each class with


@dataclass(frozen=True)
class Labels:
    """Targets as the kernels read them: (R, T) int32, padded with -1, sorted by class; None where T
    is too large or R is 0.
    """

    padded: Tensor | None
    segments: Segments | None

    @classmethod
    def of(cls, targets: Targets, classes: int) -> Labels:
        if targets.rows == 0:
            return cls(None, None)
        if targets.indptr is None:
            padded = targets.indices[:, None].int()
        else:
            sizes = targets.sizes()
            widest = int(sizes.max())
            if widest > MAX_TARGETS:
                return cls(None, None)
            rows, columns = targets.slice(0, targets.rows)
            place = torch.arange(rows.numel(), device=rows.device) - targets.indptr[rows]
            padded = torch.full((targets.rows, widest), -1, dtype=torch.int32, device=rows.device)
            padded[rows, place] = columns.int()
        return cls(padded, Segments.of(padded, classes))

    @classmethod
    def remembered(cls, targets: Targets, classes: int) -> Labels:
        """``of``, once for each stream: a step must not wait for it, and no other stream is known
        to have made it in time.

        It ends with the targets. A captured graph reads it at every replay: its owner keeps the
        targets. A capture waits for all streams first, so it takes any; what it makes is not there
        before the first replay, so it is not remembered.
        """
        device = targets.indices.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = ("layout", classes, stream)
        layout = targets.remembered.get(key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if layout is None and capturing:
            layout = next(
                (x for other, x in targets.remembered.items() if other[:2] == key[:2]), None
            )
        if layout is None:
            layout = cls.of(targets, classes)
            if not capturing:
                targets.remembered[key] = layout
        return cast("Labels", layout)

    @classmethod
    def of_head(cls, x: HeadInput) -> Labels:
        """Those of a head's targets; none where rows have margins, which the kernels do not
        know.
        """
        return (
            cls(None, None)
            if x.margin is not None
            else cls.remembered(x.targets, x.weight.shape[0])
        )
