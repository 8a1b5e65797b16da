"""The data term over the ranks of a mesh: `tiled` on each rank's block of classes and rows, and plain collectives between.

Softmax losses. In an evaluation the rank at places (i, j) of the mesh multiplies the classes of place i with the rows of place
j. Rows go round: chunk by chunk the ranks of one column give their part of it to one another, and what each of them has of the
gradient in the features is summed and scattered back. Classes are gathered over the S ranks of one place (none where S = 1, the
usual mesh: then no weight ever moves), and their gradients are summed and scattered back likewise. So a rank holds at most
K/C classes and a chunk of rows beside its own blocks, never all of W and H. With d columns of b bytes a number it sends about
2 (R/S + K/C) d b bytes (`cost`): 2 R d b with S = 1, the least where rows are no more than classes; a square mesh sends least
where ranks are many.

Beside the features a chunk needs few numbers a row: the target's logit from the rank that holds its class (also as the product
rounded it, `exponentials.alike`), and one sum of exponentials relative to an offset that is known before the sweep, the row's
mean logit, for which the mean row of W is enough. A row whose sum leaves the range takes the ranks' largest, by one exchange
more. While a chunk is multiplied the next one is on its way, and so are the last one's gradients.

Squared error (`gram`). Gram matrices, d x d, are summed over the ranks; each rank asks the others for the rows of W that are
its rows' targets, and sends the sums of its rows back to them: nothing where a class's rows are with their class.

Sums have a fixed order on a fixed mesh, so results repeat to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends import gram
from ufm_fast.backends.base import (
    Gradients,
    HeadByLoss,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    RowStatistics,
    compute_dtype,
    in_sums_dtype,
    softmax_loss,
    weighed,
)
from ufm_fast.backends.chunks import chunk_rows, stride
from ufm_fast.backends.exchange import Exchange
from ufm_fast.backends.exponentials import Exponentials, exponentials, target_logits
from ufm_fast.backends.logit_gradient import ChunkGradient, add_change, centred
from ufm_fast.backends.squared_head import SquaredErrorHead
from ufm_fast.backends.sums import class_totals
from ufm_fast.backends.sweep import Chunk, Entries, Sweep, Told, finished
from ufm_fast.backends.tiled import TiledSoftmaxHead, spends
from ufm_fast.errors import InputError
from ufm_fast.layout import Axis, Coming, Layout, Mesh, gathered, padded, share
from ufm_fast.losses import SoftmaxLoss, SquaredError
from ufm_fast.targets import Rows, Targets


class ShardedBackend(HeadByLoss):
    """The backend of inputs with a layout, on the ranks of ``mesh``. ``chunk``: rows of a chunk on all ranks together."""

    name = "sharded"

    def __init__(self, mesh: Mesh, chunk: int | None = None) -> None:
        self.mesh = mesh
        super().__init__((SoftmaxLoss, ShardedSoftmaxHead(mesh, chunk)), (SquaredError, ShardedSquaredErrorHead(mesh)))


class ShardedSoftmaxHead:
    """Every softmax loss, by chunks of rows that go round."""

    def __init__(self, mesh: Mesh, chunk: int | None = None) -> None:
        self.mesh, self.chunk = mesh, chunk
        self.heights: dict[tuple[int, ...], int] = {}

    def value_and_grad(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        out = out.cleared()
        sweep, sums = self.sweep(x, 1), _Sums.of(self.mesh, x, out)
        total = torch.zeros((), dtype=torch.float64, device=x.weight.device)
        margins, masses = [total.new_zeros(0)], [total.new_zeros(0)]
        for part, c, (h,) in sweep.chunks(x.features, statistics=statistics):
            total += weighed(c.row_weight, c.value)
            if c.margin is not None:
                margins.append(sweep.own(c.margin, part))
                masses.append(sweep.own(c.log_mass, part))
            G, forward = ChunkGradient(sweep.loss, c), sums.forward(h)
            if spends(sweep.W, out):
                G.store(sums.bias)
            elif sums.bias is not None:
                G.add_class_sums(sums.bias)
            _add_products(G, sweep.W, forward, h, sums.weight)
            sums.send(forward, part)
        sums.settle()
        if out.bias is not None and sweep.loss.smoothing:
            out.bias.add_(sweep.loss.smoothing * _uneven(x))
        value = self.mesh.total(float(total) if self.mesh.classes.place == 0 else 0.0)
        rows = RowStatistics(torch.cat(margins), torch.cat(masses)) if statistics else None
        return HeadResult(total.new_tensor(value), rows)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        out = out.cleared()
        sweep, sums = self.sweep(x, 2), _Sums.of(self.mesh, x, out)
        W, dW = sweep.W, sweep.group(v.weight)
        db = None if v.bias is None else sweep.group(v.bias)
        change = torch.empty(sweep.buffer.shape, dtype=W.dtype, device=W.device)
        for part, c, (h, dh) in sweep.chunks(x.features, v.features):
            dz = torch.mm(W, dh.T, out=change)
            dz.addmm_(dW, h.T)
            if db is not None:
                dz.add_(db[:, None])
            forward = sums.forward(h)
            _add_products(ChunkGradient(sweep.loss, c), dW, forward, dh, sums.weight)
            add_change(sweep.loss, c, W, dz, Gradients(forward, sums.weight, sums.bias))
            sums.send(forward, part)
        sums.settle()

    def losses(self, x: HeadInput) -> Tensor:
        sweep = self.sweep(x, 1)
        parts = [sweep.own(c.value, part) for part, c, _ in sweep.chunks(x.features)]
        return torch.cat([x.row_weight.new_zeros(0, dtype=torch.float64), *parts])

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return _Gradient(self, x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        C, S = self.mesh.shape
        here = replace(shape, rows=share(shape.rows, S), classes=share(shape.classes, C))
        return TiledSoftmaxHead(self.chunk).plan(here)

    def sweep(self, x: HeadInput, buffers: int = 1) -> ShardedSweep:
        """The chunks of an input, and what is known before the first of them."""
        layout, dtype = _layout(x), compute_dtype(x.weight.dtype)
        height = self._height(layout, dtype, buffers)
        W = _group(layout, x.weight.to(dtype))
        bias = None if x.bias is None else _group(layout, x.bias.double())
        rows = self.mesh.shape[0] * height
        buffer = torch.empty(W.shape[0], stride(rows), dtype=dtype, device=W.device)[:, :rows]
        return ShardedSweep(x, layout, W, bias, height, buffer)

    def _height(self, layout: Layout, dtype: torch.dtype, buffers: int) -> int:
        """Rows of a rank in a chunk: what suits the rank with the least memory, on all of them."""
        C, S = self.mesh.shape
        key = layout.classes, layout.rows, dtype.itemsize, buffers
        if key not in self.heights:
            rows, classes = C * layout.row_height, max(1, S * layout.class_height)
            most = self.chunk or chunk_rows(rows, classes, dtype.itemsize, self.mesh.device, buffers)
            number = share(layout.row_height, max(1, int(self.mesh.least(most)) // C))
            self.heights[key] = share(layout.row_height, number)
        return self.heights[key]


class ShardedSquaredErrorHead:
    """Squared error by Gram matrices that are summed over the ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def value_and_grad(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        fit = gram.value_and_grad(in_sums_dtype(x), out.cleared(), home=Exchange.of(x))
        return HeadResult(fit.new_tensor(self.mesh.total(float(fit))), None)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        gram.hvp(in_sums_dtype(x), in_sums_dtype(v), out.cleared(), home=Exchange.of(x))

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return gram.GramGradient(in_sums_dtype(x), Exchange.of(x))

    def losses(self, x: HeadInput) -> Tensor:
        return gram.losses(x, home=Exchange.of(x))

    def plan(self, shape: HeadShape) -> HeadPlan:
        return SquaredErrorHead().plan(
            replace(shape, rows=share(shape.rows, self.mesh.ranks), classes=share(shape.classes, self.mesh.ranks))
        )


class _Gradient:
    """The logit gradient of a softmax loss: this rank's rows of G right, and its classes of G' left, of its blocks of those."""

    def __init__(self, head: ShardedSoftmaxHead, x: HeadInput) -> None:
        self.head, self.x = head, x

    def times(self, right: Tensor) -> Tensor:
        product = right.new_zeros(self.x.features.shape[0], right.shape[1])
        sweep, sums = self.head.sweep(self.x), _Sums.of(self.head.mesh, self.x, Gradients(product, None, None))
        of_classes = sweep.group(right)
        for part, c, (h,) in sweep.chunks(self.x.features):
            forward = sums.forward(h)
            _add_products(ChunkGradient(sweep.loss, c), of_classes, forward, h, None)
            sums.send(forward, part)
        sums.settle()
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        product = left.new_zeros(self.x.weight.shape[0], left.shape[1])
        sweep, sums = self.head.sweep(self.x), _Sums.of(self.head.mesh, self.x, Gradients(None, product, None))
        for _, c, (_, own) in sweep.chunks(self.x.features, left):
            _add_products(ChunkGradient(sweep.loss, c), None, None, own, sums.weight)
        sums.settle()
        return product


def _add_products(
    G: ChunkGradient, right: Tensor | None, forward: Tensor | None, left: Tensor, backward: Tensor | None
) -> None:
    if forward is not None and right is not None:
        G.add_times(right, forward)
    if backward is not None:
        G.add_transposed_times(left, backward)


def parts_of(rows: Rows, layout: Layout) -> Rows:
    """This rank's rows."""
    part, targets = layout.row_part, rows.targets
    if targets.indptr is None:
        return Rows(Targets(targets.indices[part]), rows.counts[part])
    pointer = targets.indptr[part.start : part.stop + 1]
    own = Targets(targets.indices[int(pointer[0]) : int(pointer[-1])], pointer - pointer[0])
    return Rows(own, rows.counts[part])


def _layout(x: HeadInput) -> Layout:
    if x.layout is None:
        raise InputError("backend sharded computes with blocks of a point on several ranks; use it through solve or Objective")
    return x.layout


def _group(layout: Layout, x: Tensor) -> Tensor:
    """The rows of W, or entries of b, of all classes of this rank's place; ``x`` are its own."""
    axis = layout.mesh.samples
    if axis.size == 1:
        return x
    part = layout.group_classes()
    return axis.gather(padded(x, layout.class_height), "classes").wait()[: part.stop - part.start]


def _means(layout: Layout, W: Tensor, bias: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
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


def _known(x: HeadInput, layout: Layout, height: int) -> tuple[list[Targets], Tensor]:
    """The targets of each chunk's rows, and the weights (C, rows) of all; both are remembered on the targets.

    Rows that fill a chunk up weigh nothing and have class 0 as their target.
    """
    axis, kept = layout.mesh.classes, x.targets.remembered
    key = "chunks", height, layout.mesh.shape
    if key not in kept:
        sizes = gathered(axis, x.targets.sizes(), "targets")
        classes = gathered(axis, x.targets.indices, "targets")
        kept[key] = [_targets(sizes, classes, start, height, x.targets.single) for start in range(0, layout.row_height, height)]
    chunks = cast("list[Targets]", kept[key])
    of_weights = (*key, "weights")
    weights = cast("tuple[Tensor, Tensor] | None", kept.get(of_weights))
    if weights is None or weights[0] is not x.row_weight:
        whole = axis.gather(padded(x.row_weight.double(), len(chunks) * height), "targets").wait()
        kept[of_weights] = weights = x.row_weight, whole.reshape(axis.size, -1)
    return chunks, weights[1]


def _uneven(x: HeadInput) -> Tensor:
    """Weight of each class's rows less the mean over the classes, of this rank's classes (`tiled.uneven`)."""
    layout = _layout(x)
    weight = layout.mesh.world.sum_(class_totals(layout.classes, x.targets.indices, x.row_weight.double()), "class weights")
    return centred(weight)[layout.class_part]


def _targets(sizes: list[Tensor], classes: list[Tensor], start: int, height: int, single: bool) -> Targets:
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
    """One pass over all chunks of a place's classes with its rows. ``W`` and ``bias`` are those of the place."""

    def __init__(self, x: HeadInput, layout: Layout, W: Tensor, bias: Tensor | None, height: int, buffer: Tensor) -> None:
        self.x, self.loss, self.layout, self.buffer, self.height = x, softmax_loss(x), layout, buffer, height
        self.W, self.bias = W, bias
        self.mean, self.exact, self.mean_bias = _means(layout, W, bias, self.loss.smoothing)
        self.targets, self.row_weight = _known(x, layout, height)
        self.first = layout.group_classes().start

    def group(self, x: Tensor) -> Tensor:
        """The rows of x of all classes of the place."""
        return _group(self.layout, x.to(self.W.dtype))

    def chunks(self, *moving: Tensor, statistics: bool = False) -> Iterator[tuple[slice, Chunk, list[Tensor]]]:
        """Each chunk: which of this rank's rows are in it, the chunk, and its rows of what moves (the features first)."""
        self.statistics = statistics
        starts = range(0, self.layout.row_height, self.height)
        coming = self._sent(moving, 0) if starts else []
        for number, start in enumerate(starts):
            now = [part.wait() for part in coming]
            coming = self._sent(moving, start + self.height) if start + self.height in starts else []
            weights = self.row_weight[:, start : start + self.height].reshape(-1)
            rows = replace(self.x, features=now[0], targets=self.targets[number], row_weight=weights)
            yield slice(start, min(start + self.height, self.x.features.shape[0])), self._of_rows(rows), now

    def _sent(self, moving: tuple[Tensor, ...], start: int) -> list[Coming]:
        part = slice(start, start + self.height)
        return [self.layout.mesh.classes.gather(padded(x[part].to(self.W.dtype), self.height), "features") for x in moving]

    def own(self, values: Tensor, part: slice) -> Tensor:
        """Those of this rank's rows, of numbers of a chunk's rows."""
        start = self.layout.mesh.classes.place * self.height
        return values[start : start + max(0, part.stop - part.start)]

    def _of_rows(self, x: HeadInput) -> Chunk:
        """The chunk of these rows, whose E and target entries are those of the classes here."""
        axis, n = self.layout.mesh.classes, x.targets.rows
        entries = Entries(*x.targets.slice(0, n), n, x.targets.single)
        here = torch.nonzero((entries.classes >= self.first) & (entries.classes < self.first + self.W.shape[0]))[:, 0]
        mine = Entries(entries.rows[here], entries.classes[here] - self.first, n, False)
        told, offset = self._told_by_ranks(x.features, entries, mine, here)
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

    def _told_by_ranks(self, h: Tensor, entries: Entries, mine: Entries, here: Tensor) -> tuple[Told, Tensor]:
        """What the ranks' sweeps tell together, and the offset of E here. ``here``: which of the entries are ``mine``."""
        W, axis, smooth = self.W, self.layout.mesh.classes, self.loss.smoothing
        guess = torch.mv(h, self.mean).double()
        z = target_logits(h, W, mine.rows, mine.classes, False)
        tilt = target_logits(h, W, mine.rows, mine.classes, False, self.exact) if smooth else None
        if self.bias is not None and self.mean_bias is not None:
            guess, z = guess + self.mean_bias, z + self.bias[mine.classes]
            tilt = None if tilt is None else tilt + (self.bias[mine.classes] - self.mean_bias)
        mass, offset, top, rounded = _exponentials(h, W, self.bias, guess, mine, self.buffer, self.statistics)
        # One message: a sum of exponentials a row, and two or three numbers a target from the rank that has its class.
        told = [part for part in (z, rounded, tilt) if part is not None]
        number = entries.rows.numel()
        of_entries = [guess.new_zeros(number).index_copy_(0, here, part) for part in told]
        message = axis.sum_(torch.cat([mass * torch.exp(offset - guess), *of_entries]), "row sums")
        total, z, rounded, *tilts = torch.split(message, [guess.numel(), *[number] * len(told)])
        level = guess
        if not bool(((total > 1e-200) & (total < 1e200)).all()):  # of all ranks' numbers: the same on each
            total, level = _by_the_largest(axis, mass, offset)
        top = None if top is None else axis.most_(top.clone(), "row sums")  # it may be the offset itself
        return Told(z, rounded, tilts[0] if tilts else None, entries.sum(torch.ones_like(z)), total, level, top), offset


def _exponentials(
    h: Tensor, W: Tensor, bias: Tensor | None, guess: Tensor, mine: Entries, E: Tensor, top: bool
) -> Exponentials:
    """`exponentials.exponentials`, also of no classes."""
    if W.shape[0] == 0:
        least = torch.full_like(guess, -math.inf) if top else None
        return Exponentials(torch.zeros_like(guess), guess, least, guess.new_zeros(0))
    return exponentials(h, W, None if bias is None else bias.to(W.dtype), guess, mine.rows, mine.classes, E, top=top)


def _by_the_largest(axis: Axis, mass: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials over the ranks relative to the largest of theirs, and that offset."""
    level = mass.log() + offset
    largest = axis.most_(level.clone(), "row sums")
    safe = torch.where(largest.isfinite(), largest, 0.0)
    return axis.sum_(torch.exp(level - safe), "row sums"), safe


@dataclass
class _Sums:
    """Where a pass adds: buffers of this place's classes, and of a chunk's rows, which go back while the next is multiplied."""

    mesh: Mesh
    out: Gradients
    weight: Tensor | None
    bias: Tensor | None
    _whole: tuple[Tensor | None, Tensor | None]  # of all S ranks of the place
    _going: tuple[slice, Coming] | None = None

    @classmethod
    def of(cls, mesh: Mesh, x: HeadInput, out: Gradients) -> _Sums:
        layout, S = _layout(x), mesh.shape[1]
        part = layout.group_classes()
        number, weight, bias = S * layout.class_height, out.weight, None
        if weight is not None and S > 1:
            weight = weight.new_zeros(number, weight.shape[1])
        if out.bias is not None:
            bias = torch.zeros(number if S > 1 else out.bias.shape[0], dtype=torch.float64, device=out.bias.device)
        of_weight, of_bias = (None if whole is None else whole[: part.stop - part.start] for whole in (weight, bias))
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
