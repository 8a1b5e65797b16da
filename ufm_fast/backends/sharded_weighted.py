"""Weighted sets on several ranks: the term that is linear in the logits (`weighted`) beside the
sweep of the leading labels' cross-entropy.

Each entry is on the ranks where its row meets its class, which is where the sweep brings both: so
nothing goes from rank to rank for it, and an evaluation sends what one of single labels does
(`cost`). Who has which entry is worked out once for the targets, from 24 bytes an entry that the
ranks with the same rows give one another.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends.base import HeadInput
from ufm_fast.backends.logit_gradient import ChunkGradient
from ufm_fast.backends.weighted import Tilt
from ufm_fast.layout import Layout, gathered


def tilts(x: HeadInput, layout: Layout, height: int, weights: Tensor) -> list[Tilt]:
    """The term of each chunk, on its rows and the classes of this rank's place; remembered on the
    targets. ``height``: rows of a rank in a chunk; ``weights`` (C, rows): those of all rows.
    """
    kept, key = x.targets.remembered, ("tilts", height, layout.mesh.shape)
    found = cast("tuple[Tensor, list[Tilt]] | None", kept.get(key))
    if found is None or found[0] is not weights:
        found = weights, _made(Tilt.of(x), layout, height, weights)
        kept[key] = found
    return found[1]


def _made(own: Tilt, layout: Layout, height: int, weights: Tensor) -> list[Tilt]:
    axis, part = layout.mesh.classes, layout.group_classes()
    rows = [
        place * height + rows % height + rows // height * axis.size * height
        for place, rows in enumerate(gathered(axis, own.rows, "targets"))
    ]
    row = torch.cat(rows)
    classes, pull = (
        torch.cat(gathered(axis, values, "targets")) for values in (own.classes, own.pull)
    )
    here = (classes >= part.start) & (classes < part.stop)
    of_chunk, made = row // (axis.size * height), []
    for number in range(weights.shape[1] // height):
        mine = torch.nonzero(here & (of_chunk == number))[:, 0]
        of_rows = weights[:, number * height : (number + 1) * height].reshape(-1)
        at = row[mine] - number * axis.size * height
        made.append(Tilt(at, classes[mine] - part.start, pull[mine], of_rows))
    return made


class TiltedGradient:
    """The gradient in the logits of a chunk, with that term."""

    def __init__(self, inner: ChunkGradient, tilt: Tilt) -> None:
        self.inner, self.tilt = inner, tilt

    def store(self, class_sums: Tensor | None) -> None:
        self.inner.store(class_sums)
        if class_sums is not None:
            self.tilt.add_class_sums(class_sums)

    def add_class_sums(self, out: Tensor) -> None:
        self.inner.add_class_sums(out)
        self.tilt.add_class_sums(out)

    def add_times(self, right: Tensor, out: Tensor) -> None:
        self.inner.add_times(right, out)
        out.add_(self.tilt.times(right))

    def add_transposed_times(self, left: Tensor, out: Tensor) -> None:
        self.inner.add_transposed_times(left, out)
        self.tilt.add_transposed(out, left)
