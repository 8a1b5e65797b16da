"""What goes round the ranks of a mesh in an evaluation: chunks of rows, the classes of a place, and
their sums back home. `sharded` says what moves and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.errors import InputError
from ufm_fast.layout import Coming, Layout, Mesh, padded, share


def layout_of(x: HeadInput) -> Layout:
    if x.layout is None:
        raise InputError(
            "backend sharded computes with blocks of a point on several ranks; use it through "
            "solve or Objective"
        )
    return x.layout


def gathered_classes(layout: Layout, x: Tensor) -> Tensor:
    """The rows of W, or entries of b, of all classes of this rank's place; ``x`` are its own."""
    axis = layout.mesh.samples
    if axis.size == 1:
        return x
    part = layout.group_classes()
    return axis.gather(padded(x, layout.class_height), "classes").wait()[: part.stop - part.start]


def chunk_height(layout: Layout, most: int) -> int:
    """Rows of a rank in a chunk, of which the ranks of a column have at most so many together."""
    number = share(layout.row_height, max(1, most // layout.mesh.shape[0]))
    return share(layout.row_height, number)


def chunk_weights(x: HeadInput, layout: Layout, height: int) -> Tensor:
    """The weights (C, rows) of the rows of all chunks, remembered on the targets; zero where a
    chunk is filled up.
    """
    axis, kept = layout.mesh.classes, x.targets.remembered
    key = "weights", height, layout.mesh.shape
    found = cast("tuple[Tensor, Tensor] | None", kept.get(key))
    if found is None or found[0] is not x.row_weight:
        rows = -(-layout.row_height // height) * height
        whole = axis.gather(padded(x.row_weight.double(), rows), "targets").wait()
        found = x.row_weight, whole.reshape(axis.size, -1)
        kept[key] = found
    return found[1]


def going_round(
    layout: Layout, height: int, dtype: torch.dtype | None, *moving: Tensor
) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Each chunk: its number, which of this rank's rows are in it, and its rows (C height) of what
    moves (the features first), in ``dtype`` if given; the next one is on its way meanwhile.
    """
    axis, starts = layout.mesh.classes, range(0, layout.row_height, height)

    def sent(start: int) -> list[Coming]:
        part = slice(start, start + height)
        return [axis.gather(padded(x[part].to(dtype=dtype), height), "features") for x in moving]

    coming = sent(0) if starts else []
    for number, start in enumerate(starts):
        now = [part.wait() for part in coming]
        coming = sent(start + height) if start + height in starts else []
        yield number, slice(start, min(start + height, moving[0].shape[0])), now


def own_rows(layout: Layout, height: int, values: Tensor, part: slice) -> Tensor:
    """Those of this rank's rows ``part``, of numbers of a chunk's rows."""
    start = layout.mesh.classes.place * height
    return values[start : start + max(0, part.stop - part.start)]


@dataclass
class Sums:
    """Where a pass adds: buffers of this place's classes, and of a chunk's rows, which go back
    while the next is multiplied.
    """

    mesh: Mesh
    out: Gradients
    weight: Tensor | None
    bias: Tensor | None
    _whole: tuple[Tensor | None, Tensor | None]  # of all S ranks of the place
    _going: tuple[slice, Coming] | None = None

    @classmethod
    def of(cls, mesh: Mesh, x: HeadInput, out: Gradients) -> Sums:
        layout, S = layout_of(x), mesh.shape[1]
        part = layout.group_classes()
        number, weight, bias = S * layout.class_height, out.weight, None
        if weight is not None and S > 1:
            weight = weight.new_zeros(number, weight.shape[1])
        if out.bias is not None:
            bias = torch.zeros(
                number if S > 1 else out.bias.shape[0], dtype=torch.float64, device=out.bias.device
            )
        of_weight, of_bias = (
            None if whole is None else whole[: part.stop - part.start] for whole in (weight, bias)
        )
        return cls(mesh, out, of_weight, of_bias, (weight, bias))

    def forward(self, h: Tensor) -> Tensor | None:
        """A buffer for the rows of a chunk, or None where nothing is asked for."""
        like = self.out.features
        return None if like is None else like.new_zeros(h.shape[0], like.shape[1])

    def send(self, forward: Tensor | None, part: slice) -> None:
        """Send the rows' sums home; those of the chunk before have come."""
        self._receive()
        if forward is not None:
            self._going = part, self.mesh.classes.scatter_sum(forward, "features")

    def _receive(self) -> None:
        if self._going is not None and self.out.features is not None:
            (part, coming), self._going = self._going, None
            block = self.out.features[part]
            block.add_(coming.wait()[: block.shape[0]])

    def settle(self) -> None:
        """Everything is where it belongs."""
        self._receive()
        for out, whole in zip((self.out.weight, self.out.bias), self._whole, strict=True):
            if out is not None and whole is not None and whole is not out:
                out.add_(self.mesh.samples.scatter_sum(whole, "classes").wait()[: out.shape[0]])
