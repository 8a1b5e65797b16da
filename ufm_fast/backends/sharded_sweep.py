"""A pass of the sharded softmax head: chunks of rows that go round (`rounds`), and what the ranks
tell one another of them. `sharded` says what moves and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends.base import (
    Gradients,
    HeadInput,
    HeadPlan,
    HeadShape,
    compute_dtype,
    softmax_loss,
    weighed,
)
from ufm_fast.backends.chunks import chunk_rows, stride
from ufm_fast.backends.exponentials import Exponentials, exponentials, target_logits
from ufm_fast.backends.logit_gradient import ChunkGradient, centred
from ufm_fast.backends.rounds import (
    chunk_weights,
    gathered_classes,
    going_round,
    layout_of,
    own_rows,
)
from ufm_fast.backends.sharded_hessian import Direction
from ufm_fast.backends.sharded_weighted import TiltedGradient, tilts
from ufm_fast.backends.sums import class_totals
from ufm_fast.backends.sweep import Chunk, Entries, Sweep, Told, finished
from ufm_fast.backends.tiled import TiledSoftmaxHead, spends
from ufm_fast.backends.weighted import Tilt, one_label
from ufm_fast.layout import Axis, Layout, gathered, padded
from ufm_fast.targets import Targets
from ufm_fast.weighted_targets import WeightedTargets


def _means(
    layout: Layout, W: Tensor, bias: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mean row of W (d,) in float64, with smoothing to all its digits, and the mean bias."""
    axis, K = layout.mesh.classes, layout.classes
    sums = [W.sum(0, dtype=torch.float64), *([] if bias is None else [bias.sum()[None]])]
    mean = axis.sum_(torch.cat(sums)) / K
    if smoothing:  # right to eps of what the rows differ by
        rest = [(W - mean[: W.shape[1]].to(W.dtype)).sum(0, dtype=torch.float64)]
        rest += [] if bias is None else [(bias - mean[-1]).sum()[None]]
        base = torch.cat([mean[: W.shape[1]].to(W.dtype).double(), mean[W.shape[1] :]])
        mean = base + axis.sum_(torch.cat(rest)) / K
    return mean[: W.shape[1]].to(W.dtype), mean[: W.shape[1]], None if bias is None else mean[-1]


def _known(x: HeadInput, layout: Layout, height: int) -> list[Targets]:
    """The targets of each chunk's rows, remembered on the targets.

    Rows that fill a chunk up weigh nothing and have class 0 as their target.
    """
    axis, kept = layout.mesh.classes, x.targets.remembered
    key = "chunks", height, layout.mesh.shape
    if key not in kept:
        sizes = gathered(axis, x.targets.sizes(), "targets")
        classes = gathered(axis, x.targets.indices, "targets")
        kept[key] = [
            _targets(sizes, classes, start, height, x.targets.single)
            for start in range(0, layout.row_height, height)
        ]
    return cast("list[Targets]", kept[key])


def uneven_here(x: HeadInput) -> Tensor:
    """Weight of each class's rows less the mean over the classes, of this rank's classes
    (`tiled.uneven`).
    """
    layout = layout_of(x)
    weight = layout.mesh.world.sum_(
        class_totals(layout.classes, x.targets.indices, x.row_weight.double()), "class weights"
    )
    return centred(weight)[layout.class_part]


def _targets(
    sizes: list[Tensor], classes: list[Tensor], start: int, height: int, single: bool
) -> Targets:
    """The targets of rows ``start`` and on of each rank, ``height`` of each."""
    counts, found = [], []
    for size, targets in zip(sizes, classes, strict=True):
        first, last = int(size[:start].sum()), int(size[: start + height].sum())
        here = size[start : start + height]
        missing = height - here.numel()
        counts.append(torch.cat([here, here.new_ones(missing)]))
        found.append(torch.cat([targets[first:last], targets.new_zeros(missing)]))
    indices = torch.cat(found)
    if single:
        return Targets(indices)
    return Targets(indices, torch.cat([indices.new_zeros(1), torch.cat(counts).cumsum(0)]))


class ShardedSweep(Sweep):
    """One pass over all chunks of a place's classes with its rows, whose exponentials torch makes
    and multiplies (`exponentials`). ``W`` and ``bias`` are those of the place; ``height``: rows of
    a rank in a chunk.
    """

    def __init__(
        self, x: HeadInput, layout: Layout, W: Tensor, bias: Tensor | None, height: int
    ) -> None:
        self.tilts: list[Tilt] | None = None
        if isinstance(x.targets, WeightedTargets):
            self.tilts = tilts(x, layout, height, chunk_weights(x, layout, height))
            self.totals, x = x.targets.sums(), one_label(x)
        self.x, self.loss, self.layout, self.height = x, softmax_loss(x), layout, height
        self.W, self.bias = W, bias
        self.buffer = self._empty(layout.mesh.shape[0] * height)
        self.mean, self.exact, self.mean_bias = _means(layout, W, bias, self.loss.smoothing)
        self.targets, self.row_weight = (
            _known(x, layout, height),
            chunk_weights(x, layout, height),
        )
        rows, axis = len(self.targets) * height, layout.mesh.classes
        self.margin = (
            None
            if x.margin is None
            else axis.gather(padded(x.margin, rows), "row sums").wait().reshape(axis.size, -1)
        )
        self.first = layout.group_classes().start

    @property
    def tops(self) -> bool:
        """Whether the largest logits off target are asked for."""
        return self.statistics

    @staticmethod
    def rows_of_chunk(x: HeadInput, rows: int, classes: int, buffers: int) -> int:
        """Rows of a chunk that suit this rank; ``buffers``: how many of its size the ranks of this
        machine hold.
        """
        return chunk_rows(
            rows, classes, compute_dtype(x.weight.dtype).itemsize, x.weight.device, buffers
        )

    @staticmethod
    def plan(shape: HeadShape, chunk: int | None) -> HeadPlan:
        """What this rank takes for a head of its classes and all rows of its place."""
        return TiledSoftmaxHead(chunk).plan(shape)

    def _empty(self, rows: int) -> Tensor:
        """Room for the exponentials of a chunk."""
        return self.W.new_empty(self.W.shape[0], stride(rows))[:, :rows]

    def gradient(self, c: Chunk) -> ChunkGradient:
        """The gradient in the logits of the chunk that was made last."""
        return ChunkGradient(self.loss, c)

    def with_tilt(self, c: Chunk) -> ChunkGradient | TiltedGradient:
        """The same, with what weighted sets add to it."""
        G = self.gradient(c)
        return G if self.tilt is None else TiltedGradient(G, self.tilt)

    def value(self, c: Chunk, h: Tensor) -> Tensor:
        """What this rank counts of the chunk's part of the data term."""
        first = self.layout.mesh.classes.place == 0
        total = weighed(c.row_weight, c.value) if first else c.value.new_zeros(())
        tilt = self.tilt
        return total if tilt is None else total + tilt.row_weight @ self._tilted(tilt, h)

    def losses(self, c: Chunk, h: Tensor, part: slice) -> Tensor:
        """The losses of this rank's rows in the chunk."""
        own = self.own(c.value, part)
        if self.tilt is None:
            return own
        tilted = self.layout.mesh.classes.sum_(self._tilted(self.tilt, h), "row sums")
        return self.totals[part] * own + self.own(tilted, part)

    def _tilted(self, tilt: Tilt, h: Tensor) -> Tensor:
        return tilt.values(h, self.W, self.bias)

    def along(self, v: HeadInput) -> Direction:
        """What chunks add to the Hessian product along ``v``."""
        return Direction(self, v)

    def bent(self, z: Tensor) -> Tensor:
        """What the loss sees of logits z."""
        return z

    def spends(self, out: Gradients) -> bool:
        """Whether the gradient takes the place of its exponentials (`tiled.spends`)."""
        return spends(self.W, out)

    def group(self, x: Tensor) -> Tensor:
        """The rows of x of all classes of the place."""
        return gathered_classes(self.layout, x.to(self.W.dtype))

    def chunks(
        self, *moving: Tensor, statistics: bool = False
    ) -> Iterator[tuple[slice, Chunk, list[Tensor]]]:
        """Each chunk: which of this rank's rows are in it, the chunk, and its rows of what moves
        (the features first).
        """
        self.statistics = statistics
        for number, part, now in going_round(self.layout, self.height, self.W.dtype, *moving):
            self.tilt = None if self.tilts is None else self.tilts[number]
            place = slice(number * self.height, (number + 1) * self.height)
            weights, margin = (
                None if x is None else x[:, place].reshape(-1)
                for x in (self.row_weight, self.margin)
            )
            assert weights is not None
            rows = replace(
                self.x,
                features=now[0],
                targets=self.targets[number],
                row_weight=weights,
                margin=margin,
            )
            yield part, self._of_rows(rows), now

    def own(self, values: Tensor, part: slice) -> Tensor:
        """Those of this rank's rows, of numbers of a chunk's rows."""
        return own_rows(self.layout, self.height, values, part)

    def _of_rows(self, x: HeadInput) -> Chunk:
        """The chunk of these rows, whose E and target entries are those of the classes here."""
        axis, n = self.layout.mesh.classes, x.targets.rows
        entries = Entries(*x.targets.slice(0, n), n, x.targets.single)
        here = torch.nonzero(
            (entries.classes >= self.first) & (entries.classes < self.first + self.W.shape[0])
        )[:, 0]
        mine = Entries(entries.rows[here], entries.classes[here] - self.first, n, False)
        told, offset = self._told_by_ranks(x, entries, mine, here)
        c = finished(x, slice(0, n), x.features, self.buffer, entries, told, self.layout.classes)
        return replace(
            c,
            mass=told.mass * torch.exp(told.offset - offset),
            entry_row=mine.rows,
            entry_class=mine.classes,
            entry_logit=c.entry_logit[here],
            entry_share=c.entry_share[here],
            single=False,
            total=axis.sum_,
        )

    def _told_by_ranks(
        self, x: HeadInput, entries: Entries, mine: Entries, here: Tensor
    ) -> tuple[Told, Tensor]:
        """What the ranks' sweeps tell together, and the offset of E here. ``here``: which of the
        entries are ``mine``.
        """
        h, W, axis, smooth = x.features, self.W, self.layout.mesh.classes, self.loss.smoothing
        guess = torch.mv(h, self.mean).double()
        z = target_logits(h, W, mine.rows, mine.classes, False)
        tilt = target_logits(h, W, mine.rows, mine.classes, False, self.exact) if smooth else None
        if self.bias is not None and self.mean_bias is not None:
            guess, z = guess + self.mean_bias, z + self.bias[mine.classes]
            tilt = None if tilt is None else tilt + (self.bias[mine.classes] - self.mean_bias)
        guess, z = self.bent(guess), self.bent(z)
        mass, offset, top, rounded = self._exponentials(h, guess, mine, z)
        # One message: a sum of exponentials a row, and two or three numbers a target from the rank
        # that has its class.
        told = [part for part in (z, rounded, tilt) if part is not None]
        number = entries.rows.numel()
        of_entries = [guess.new_zeros(number).index_copy_(0, here, part) for part in told]
        message = axis.sum_(torch.cat([mass * torch.exp(offset - guess), *of_entries]), "row sums")
        total, z, rounded, *tilts = torch.split(message, [guess.numel(), *[number] * len(told)])
        level = guess
        if not bool(
            ((total > 1e-200) & (total < 1e200)).all()
        ):  # of all ranks' numbers: the same on each
            total, level = _by_the_largest(axis, mass, offset)
        if tilts and x.margin is not None:
            tilts = [tilts[0] - x.margin * (1.0 - 1.0 / self.layout.classes)]
        rounded, top = self._compared(z, rounded, (total, level), top, entries)
        return Told(
            z,
            rounded,
            tilts[0] if tilts else None,
            entries.sum(torch.ones_like(z)),
            total,
            level,
            top,
        ), offset

    def _compared(
        self,
        z: Tensor,
        rounded: Tensor,
        others: tuple[Tensor, Tensor],
        top: Tensor | None,
        entries: Entries,
    ) -> tuple[Tensor, Tensor | None]:
        """The targets' logits as products round them, and with statistics the largest logit off
        target of each row, over all ranks. ``others``: sums of the exponentials off target, and
        their offset; ``top``: the largest here.
        """
        if top is None:
            return rounded, None
        # A clone: it may be the offset itself.
        return rounded, self.layout.mesh.classes.most_(top.clone(), "row sums")

    def _exponentials(self, h: Tensor, guess: Tensor, mine: Entries, z: Tensor) -> Exponentials:
        """`exponentials.exponentials` of the classes here, also of none. ``z``: the exact logits of
        the entries.
        """
        W, bias = self.W, self.bias
        if W.shape[0] == 0:
            least = torch.full_like(guess, -math.inf) if self.tops else None
            return Exponentials(torch.zeros_like(guess), guess, least, guess.new_zeros(0))
        of_logits = None if bias is None else bias.to(W.dtype)
        rows, classes, top = mine.rows, mine.classes, self.tops
        return exponentials(h, W, of_logits, guess, rows, classes, self.buffer, top=top)


def _by_the_largest(axis: Axis, mass: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials over the ranks relative to the largest of theirs, and that offset."""
    level = mass.log() + offset
    largest = axis.most_(level.clone(), "row sums")
    safe = torch.where(largest.isfinite(), largest, 0.0)
    return axis.sum_(torch.exp(level - safe), "row sums"), safe
