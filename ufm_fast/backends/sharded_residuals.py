"""Squared error on several ranks where the classes that have rows are no more than the dimensions,
so that a Gram value would lose digits (`squared_error`).

Those classes are then no more rows of W than a Gram matrix has: all ranks gather them, each forms
the residuals of its own rows, and the gradients in W are summed and taken by the ranks that hold
the classes. Classes without rows have zero targets: beyond d classes in all they go by Gram
matrices, which have nothing to cancel there. Hessian products go by Grams; nothing in them cancels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends import gram, residual
from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.exchange import Exchange
from ufm_fast.layout import Axis, Layout, gathered
from ufm_fast.targets import Targets

_WHAT = "residuals"  # in the counts of bytes that are sent


def near_classes(x: HeadInput, layout: Layout) -> Tensor | None:
    """The classes of all ranks that go by residuals, ascending, remembered on the targets; None
    where all go by Grams.
    """
    room, kept = x.weight.shape[1] + (x.bias is not None), x.targets.remembered
    key = "near", room, layout.classes, layout.mesh.ranks
    if key not in kept:
        present = torch.zeros(layout.classes, device=x.targets.indices.device)
        present[x.targets.indices] = 1.0
        occupied = torch.nonzero(layout.mesh.world.sum_(present, _WHAT))[:, 0]
        near = occupied if layout.classes > room else torch.arange(layout.classes).to(occupied)
        kept[key] = near if 0 < occupied.numel() <= room else None
    return cast("Tensor | None", kept[key])


def value_and_grad(x: HeadInput, out: Gradients, layout: Layout, near: Tensor) -> Tensor:
    """This rank's part of the value (float64 scalar); adds gradients into ``out``."""
    part, world = layout.class_part, layout.mesh.world
    here = (near >= part.start) & (near < part.stop)
    mine = near[here] - part.start
    rows = replace(
        x,
        weight=torch.cat(gathered(world, x.weight[mine], _WHAT)),
        bias=None if x.bias is None else torch.cat(gathered(world, x.bias[mine], _WHAT)),
        targets=Targets(torch.searchsorted(near, x.targets.indices)),
        layout=None,
    )
    weight, bias = (
        None if whole is None else whole.new_zeros(near.numel(), *whole.shape[1:])
        for whole in (out.weight, out.bias)
    )
    fit = residual.value_and_grad(rows, Gradients(out.features, weight, bias))
    _take(world, out, (weight, bias), here, mine)
    if near.numel() < layout.classes:
        fit = fit + _others(x, out, layout, mine)
    return fit


def _take(
    world: Axis,
    out: Gradients,
    sums: tuple[Tensor | None, Tensor | None],
    here: Tensor,
    mine: Tensor,
) -> None:
    """Sum the gradients of the gathered classes, and add those of the classes here."""
    for whole, found in zip((out.weight, out.bias), sums, strict=True):
        if whole is not None and found is not None:
            whole.index_add_(0, mine, world.sum_(found, _WHAT)[here])


def _others(x: HeadInput, out: Gradients, layout: Layout, near: Tensor) -> Tensor:
    """The part of the classes here that are not ``near``: none of them has rows."""
    far = torch.ones(x.weight.shape[0], dtype=torch.bool, device=x.weight.device)
    far[near] = False
    classes = torch.nonzero(far)[:, 0]
    weight, bias = (None if whole is None else whole[classes] for whole in (out.weight, out.bias))
    rest = replace(x, weight=x.weight[classes], bias=None if x.bias is None else x.bias[classes])
    home, buffers = Exchange(x.targets, layout), Gradients(out.features, weight, bias)
    fit = gram.value_and_grad(rest, buffers, targets=False, home=home)
    for whole, found in ((out.weight, weight), (out.bias, bias)):
        if whole is not None and found is not None:
            whole[classes] = found
    return fit
