"""Work along the labels: a dot product per row and target, and sums of the rows that share a class.

    target_logits    z_it = <h_i, w_(y_it)> + b_(y_it)
    add_class_sums   out_k += sum over (i, t) with y_it = k of weight_it * h_i

The second runs over (row, target) pairs sorted by label, one program a class and column block, or
one a pair, of which the first of each class does the work, where pairs are fewer than classes: no
atomics, so the sum of a class is the same bits from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import ceil_div, check_written, laid_out, next_power_of_2, on_device

if TYPE_CHECKING:  # the compile gate builds these kernels where torch is not installed
    from torch import Tensor

SMALL = {"num_warps": 4, "num_stages": 2}


@triton.jit
def target_logits_kernel(
    H,
    W,
    bias,
    labels,
    out,
    rows,
    columns,
    classes,
    stride_h,
    stride_w,
    TARGETS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.program_id(1)
    label = tl.load(labels + r.to(tl.int64) * TARGETS + t, mask=r < rows, other=-1)
    known = (label >= 0) & (label < classes)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, columns, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        inside = known[:, None] & (c[None, :] < columns)
        h = tl.load(H + r.to(tl.int64)[:, None] * stride_h + c[None, :], mask=inside, other=0.0)
        w = tl.load(W + label.to(tl.int64)[:, None] * stride_w + c[None, :], mask=inside, other=0.0)
        total += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
    if BIAS:
        total += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)
    # A label that is neither padding nor a class poisons its row: it must not read memory, nor pass
    # unseen.
    total = tl.where(known | (label == -1), total, float("nan"))
    tl.store(out + r.to(tl.int64) * TARGETS + t, total, mask=r < rows)


@triton.jit
def class_sums_kernel(
    H,
    weight,
    order,
    ordered,
    starts,
    out,
    columns,
    classes,
    stride,
    scale,
    PAIRS: tl.constexpr,
    TARGETS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    unit, part = tl.program_id(0), tl.program_id(2)
    label = unit
    known = label < classes
    if PAIRS:
        label = tl.load(ordered + unit)
        before = tl.load(ordered + unit - 1, mask=unit > 0, other=-1)
        known = (label >= 0) & (label < classes) & (label != before)
    start, end = (
        tl.load(starts + label, mask=known, other=0),
        tl.load(starts + label + 1, mask=known, other=0),
    )
    share = (end - start + SPLITS - 1) // SPLITS
    first, last = start + part * share, tl.minimum(start + (part + 1) * share, end)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float64)  # a class may have millions of rows
    for begin in range(first, last, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        pair = tl.load(order + place, mask=place < last, other=0)
        scaled = tl.load(weight + pair, mask=place < last, other=0.0)
        inside = (place < last)[:, None] & (c < columns)[None, :]
        h = tl.load(
            H + (pair // TARGETS).to(tl.int64)[:, None] * stride + c[None, :],
            mask=inside,
            other=0.0,
        )
        total += tl.sum(scaled[:, None] * h.to(tl.float32), 0).to(tl.float64)
    row = out + (part.to(tl.int64) * classes + label) * columns + c
    inside = (c < columns) & (end > start)
    tl.store(row, tl.load(row, mask=inside, other=0.0) + scale * total, mask=inside)


@dataclass(frozen=True)
class Segments:
    """(row, target) pairs sorted by label: `order` indexes the flattened labels, class k owns
    starts[k]:starts[k+1].

    `ordered`: the labels in that order.
    """

    order: Tensor
    ordered: Tensor
    starts: Tensor
    targets: int

    @classmethod
    def of(cls, labels: Tensor, classes: int) -> Segments:
        """Sort labels (rows, T), padding -1 first and unowned. No host synchronisation."""
        import torch

        ordered, order = torch.sort(labels.reshape(-1), stable=True)
        bounds = torch.arange(classes + 1, dtype=ordered.dtype, device=labels.device)
        return cls(order, ordered, torch.searchsorted(ordered, bounds), labels.shape[1])


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless every label is a class or the padding -1. One host synchronisation:
    call it once.

    Kernels never read memory by a label outside the classes in any case; such a row comes out as
    NaN.
    """
    if labels.numel() == 0:
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < -1 or high >= classes:
        raise ValueError(
            f"labels: found values from {low} to {high}; allowed are 0 to {classes - 1} and the "
            f"padding -1"
        )


@on_device
def target_logits(H: Tensor, W: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """<h_i, w_(y_it)> + b_(y_it) as (rows, T) fp32; 0 where the label is -1, NaN where it is no
    class.
    """
    import torch

    H, W, bias, labels = laid_out(H, W, bias, labels)
    rows, targets = labels.shape
    block = 16 if H.is_cuda else 32
    out = torch.empty((rows, targets), device=labels.device)
    target_logits_kernel[(ceil_div(rows, block), targets)](
        H,
        W,
        W if bias is None else bias,
        labels,
        out,
        rows,
        H.shape[1],
        W.shape[0],
        H.stride(0),
        W.stride(0),
        TARGETS=targets,
        BIAS=bias is not None,
        BLOCK_M=block,
        BLOCK_K=128,
        **SMALL,
    )
    return out


@on_device
def add_class_sums(
    out: Tensor,
    H: Tensor,
    weight: Tensor,
    segments: Segments,
    scale: float = 1.0,
    splits: int | None = None,
) -> None:
    """out (K, d) fp32 or fp64 += scale * sum of weight_it h_i over the pairs of each class, weight
    (rows, T) fp32.

    With few classes the segments are cut into `splits` parts, summed in a fixed order.
    """
    check_written(out=out)
    H, weight = laid_out(H, weight)
    classes, columns = out.shape
    span = min(512, max(128, next_power_of_2(columns))) if H.is_cuda else 128
    across = ceil_div(columns, span)
    pairs = len(segments.order) < classes
    if splits is None:
        splits = 16 if H.is_cuda and classes * across < 256 else 1
    target = out if splits == 1 else out.new_zeros((splits, classes, columns))
    class_sums_kernel[(len(segments.order) if pairs else classes, across, splits)](
        H,
        weight,
        segments.order,
        segments.ordered,
        segments.starts,
        target,
        columns,
        classes,
        H.stride(0),
        scale,
        PAIRS=pairs,
        TARGETS=segments.targets,
        SPLITS=splits,
        BLOCK_M=2048 // span,
        BLOCK_N=span,
        **SMALL,
    )
    if splits > 1:
        out += target.sum(0)
