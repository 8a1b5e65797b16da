"""Sums over many rows, as accurate at ten million rows as at ten.

A product of a matrix with a vector, and ``index_add_``, add one term after the other: in float32 a
million equal terms are then wrong in the third digit. Here terms are added in pairs (torch's own
``sum``) by blocks that a cache holds, and blocks in float64; sums by class run in float64
throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CACHED = 1 << 16  # numbers of a block
_LONGEST = 1 << 12  # terms that may be added in turn in float64, or by a library's product
_BLOCK, _THIN = (
    1 << 11,
    1 << 8,
)  # the same in the dtype of the data; numbers of a product up to which it is an eighth
_DEVICE = 1 << 22  # the same where there is no such cache, and a launch costs more than a pass


def _step(x: Tensor, length: int) -> int:
    """How many vectors of this length make a block."""
    return max(1, (_CACHED if x.device.type == "cpu" else _DEVICE) // max(length, 1))


def sums_along(E: Tensor, factor: Tensor) -> Tensor:
    """E @ factor for E (K, C) and factor (C,): float64 (K,)."""
    return torch.cat(
        [(part * factor).sum(1) for part in torch.split(E, _step(E, E.shape[1]))]
    ).double()


def weighted_sum(rows: Tensor, weight: Tensor) -> Tensor:
    """weight @ rows for rows (C, d) and weight (C,): float64 (d,). Products are formed in the dtype
    of ``weight``.
    """
    total, step = rows.new_zeros(rows.shape[1], dtype=torch.float64), _step(rows, rows.shape[1])
    for part, factor in zip(torch.split(rows, step), torch.split(weight, step), strict=True):
        total += (part.to(weight.dtype) * factor[:, None]).sum(0)
    return total


def add_class_sums(
    out: Tensor, classes: Tensor, rows: Tensor, weight: Tensor | None = None
) -> None:
    """out_k += sum of weight_r rows_r over the r of class k, for out (K, d), classes and weight
    (C,), rows (C, d).

    Beside them it holds 2 min(K, C) x d numbers in float64, or two blocks.
    """
    slot, number = classes, out.shape[0]
    few = rows.shape[0] < number
    if few:  # one row of each class stands for it, whichever was written last
        place, number = classes.new_empty(number), rows.shape[0]
        place[classes] = torch.arange(number, device=classes.device)
        slot = place[classes]
    sums = rows.new_zeros(number, rows.shape[1], dtype=torch.float64)
    step = max(number, min(_LONGEST, _step(rows, rows.shape[1])))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        block = rows[part].double() if weight is None else rows[part].double() * weight[part, None]
        if start == 0:
            sums.index_add_(0, slot[part], block)
        else:
            sums += torch.zeros_like(sums).index_add_(0, slot[part], block)
    if few:
        out.index_add_(0, classes, sums.to(out.dtype))
    else:
        out.add_(sums)


def class_totals(number: int, classes: Tensor, values: Tensor) -> Tensor:
    """Sum of the values of each class, float64 (number,)."""
    total = values.new_zeros(number, 1, dtype=torch.float64)
    add_class_sums(total, classes, values[:, None])
    return total[:, 0]


def add_product(out: Tensor, E: Tensor, rows: Tensor, *, fresh: bool = False) -> None:
    """out += E rows for E (K, C) and rows (C, d); fresh: ``out`` is written.

    A library may add all C terms of a thin product in turn, onto what ``out`` holds; so many rows
    go block by block.
    """
    if rows.shape[0] <= _LONGEST:
        torch.addmm(out, E, rows, beta=0 if fresh else 1, out=out)
        return
    total, step = (
        out.new_zeros(out.shape, dtype=torch.float64),
        _BLOCK // 8 if out.numel() <= _THIN else _BLOCK,
    )
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        total += E[:, part] @ rows[part]
    out.copy_(total) if fresh else out.add_(total)
