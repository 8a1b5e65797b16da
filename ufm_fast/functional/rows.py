"""A head without the rows that weigh nothing: 0 times NaN is NaN, so a backend must not see what
they hold.

Decisions

2026-11-25. Ignored rows may hold anything (padding of a batch often does), in values, first and
second derivatives. Their features are replaced by zeros where labels are read, in a copy that is
made only if a row is ignored; inside a compiled or captured graph, which can't ask, always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ufm_fast.backends import Gradients, HeadInput
from ufm_fast.targets import Targets

_Result = TypeVar("_Result")


def rows_with_weight(x: HeadInput) -> Tensor | None:
    """Indices of the rows whose weight is not 0, or None if that is every row."""
    rows = torch.nonzero(x.row_weight).reshape(-1)
    return None if rows.numel() == x.row_weight.numel() else rows


def rows_of(x: HeadInput, rows: Tensor) -> HeadInput:
    """``x`` with these rows only."""
    targets = x.targets
    if targets.indptr is None:
        chosen = Targets(targets.indices[rows])
    else:
        sizes = targets.sizes()[rows]
        pointer = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        shift = torch.repeat_interleave(targets.indptr[:-1][rows] - pointer[:-1], sizes)
        chosen = Targets(
            targets.indices[torch.arange(shift.numel(), device=shift.device) + shift], pointer
        )
    margin = None if x.margin is None else x.margin[rows]
    return HeadInput(x.loss, x.features[rows], x.weight, x.bias, chosen, x.row_weight[rows], margin)


def over_rows(
    rows: Tensor | None,
    x: HeadInput,
    out: Gradients,
    run: Callable[[HeadInput, Gradients], _Result],
) -> _Result:
    """``run`` on these rows (None: all), adding or, if ``out`` is fresh, writing; the others get no
    sum: 0 times NaN is NaN.
    """
    if rows is None:
        return run(x, out)
    features, block = out.features, None
    if features is not None:
        block = features[rows]
        features = features.zero_() if out.fresh else features
    result = run(rows_of(x, rows), Gradients(block, out.weight, out.bias, fresh=out.fresh))
    if features is not None and block is not None:
        features[rows] = block
    return result
