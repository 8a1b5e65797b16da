"""The data term over the ranks of a mesh: `tiled`, or `triton` on CUDA devices, on each rank's
block of classes and rows, and plain collectives between.

Softmax losses. In an evaluation the rank at places (i, j) of the mesh multiplies the classes of
place i with the rows of place j. Rows go round: chunk by chunk the ranks of one column give their
part of it to one another, and what each of them has of the gradient in the features is summed and
scattered back. Classes are gathered over the S ranks of one place (none where S = 1, the usual
mesh: then no weight ever moves), and their gradients are summed and scattered back likewise. So a
rank holds at most K/C classes and a chunk of rows beside its own blocks, never all of W and H. With
d columns of b bytes a number it sends about
2 (R/S + K/C) d b bytes (`cost`): 2 R d b with S = 1, the least where rows are no more than classes;
a square mesh sends least where ranks are many.

Beside the features a chunk needs few numbers a row: the target's logit from the rank that holds its
class (also as the product rounded it, `exponentials.alike`), and one sum of exponentials relative
to an offset that is known before the sweep, the row's mean logit, for which the mean row of W is
enough. A row whose sum leaves the range takes the ranks' largest, by one exchange more. While a
chunk is multiplied the next one is on its way, and so are the last one's gradients.

Squared error (`gram`). Gram matrices, d x d, are summed over the ranks; each rank asks the others
for the rows of W that are its rows' targets, and sends the sums of its rows back to them: nothing
where a class's rows are with their class. Few classes go by residuals (`sharded_residuals`); so do
target vectors, which meet the classes as they do for softmax losses (`sharded_vectors`).

Sums have a fixed order on a fixed mesh, so results repeat to the bit.

2026-11-30. The ranks of one machine share its cache and its memory, so the size of a chunk is bound
for all of their buffers together (`Mesh.neighbours`), and a start is drawn into the dtype of the
solve: at K = N = 20,000, d = 128, float32 on two ranks that is most of a rank's peak
(`bench/sharded.py`). Fewer rows than a process takes would save little more, and cost time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends import gram
from ufm_fast.backends import sharded_residuals as residuals
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
)
from ufm_fast.backends.exchange import Exchange
from ufm_fast.backends.logit_gradient import ChunkGradient
from ufm_fast.backends.rounds import Sums, chunk_height, gathered_classes, layout_of
from ufm_fast.backends.sharded_residuals import near_classes
from ufm_fast.backends.sharded_sweep import ShardedSweep, uneven_here
from ufm_fast.backends.sharded_vectors import ShardedVectorsHead
from ufm_fast.backends.sharded_weighted import TiltedGradient
from ufm_fast.backends.squared_head import SquaredErrorHead
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.layout import Layout, Mesh, share
from ufm_fast.losses import SoftmaxLoss, SquaredError


class ShardedBackend(HeadByLoss):
    """The backend of inputs with a layout, on the ranks of ``mesh``. ``chunk``: rows of a chunk on
    all ranks together. ``inner``: who multiplies on each rank, 'tiled' or 'triton'
    (`triton_sharded`).
    """

    def __init__(self, mesh: Mesh, chunk: int | None = None, inner: str = "tiled") -> None:
        self.mesh, self.name = mesh, f"sharded-{inner}"
        super().__init__(
            (SoftmaxLoss, ShardedSoftmaxHead(mesh, chunk, _SWEEPS[inner]())),
            (SquaredError, ShardedSquaredErrorHead(mesh, chunk)),
        )


def _by_kernels() -> type[ShardedSweep]:
    from ufm_fast.backends.triton_sharded import KernelSweep  # needs triton

    return KernelSweep


_SWEEPS: dict[str, Callable[[], type[ShardedSweep]]] = {
    "tiled": lambda: ShardedSweep,
    "triton": _by_kernels,
}


class ShardedSoftmaxHead:
    """Every softmax loss, by chunks of rows that go round. ``kind``: of the sweeps."""

    def __init__(
        self,
        mesh: Mesh,
        chunk: int | None = None,
        kind: type[ShardedSweep] = ShardedSweep,
    ) -> None:
        self.mesh, self.chunk, self.kind = mesh, chunk, kind
        self.heights: dict[tuple[object, ...], int] = {}

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        out = out.cleared()
        sweep, sums = self.sweep(x, 1), Sums.of(self.mesh, x, out)
        total = torch.zeros((), dtype=torch.float64, device=x.weight.device)
        margins, masses = [total.new_zeros(0)], [total.new_zeros(0)]
        for part, c, (h,) in sweep.chunks(x.features, statistics=statistics):
            total += sweep.value(c, h)
            if c.margin is not None:
                margins.append(sweep.own(c.margin, part))
                masses.append(sweep.own(c.log_mass, part))
            G, forward = sweep.with_tilt(c), sums.forward(h)
            if sweep.spends(out):
                G.store(sums.bias)
            elif sums.bias is not None:
                G.add_class_sums(sums.bias)
            _add_products(G, sweep.W, forward, h, sums.weight)
            sums.send(forward, part)
        sums.settle()
        if out.bias is not None and sweep.loss.smoothing:
            out.bias.add_(sweep.loss.smoothing * uneven_here(x))
        value = self.mesh.total(float(total))
        rows = RowStatistics(torch.cat(margins), torch.cat(masses)) if statistics else None
        return HeadResult(total.new_tensor(value), rows)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        out = out.cleared()
        sweep, sums = self.sweep(x, 2), Sums.of(self.mesh, x, out)
        along = sweep.along(v)
        for part, c, (h, dh) in sweep.chunks(x.features, v.features):
            forward = sums.forward(h)
            along.add(c, dh, Gradients(forward, sums.weight, sums.bias))
            sums.send(forward, part)
        sums.settle()

    def losses(self, x: HeadInput) -> Tensor:
        sweep = self.sweep(x, 1)
        parts = [sweep.losses(c, h, part) for part, c, (h,) in sweep.chunks(x.features)]
        return torch.cat([x.row_weight.new_zeros(0, dtype=torch.float64), *parts])

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return _Gradient(self, x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        C, S = self.mesh.shape
        here = replace(shape, rows=share(shape.rows, S), classes=share(shape.classes, C))
        return self.kind.plan(here, self.chunk)

    def sweep(self, x: HeadInput, buffers: int = 1) -> ShardedSweep:
        """The chunks of an input, and what is known before the first of them. A Hessian product
        has two buffers.
        """
        layout, dtype = layout_of(x), compute_dtype(x.weight.dtype)
        height = self._height(x, layout, buffers)
        W = gathered_classes(layout, x.weight.to(dtype))
        bias = None if x.bias is None else gathered_classes(layout, x.bias.double())
        return self.kind(x, layout, W, bias, height)

    def _height(self, x: HeadInput, layout: Layout, buffers: int) -> int:
        """Rows of a rank in a chunk: what suits the rank with the least memory, on all of them."""
        C, S = self.mesh.shape
        key = layout.classes, layout.rows, x.weight.dtype, buffers
        if key not in self.heights:
            rows, classes = C * layout.row_height, max(1, S * layout.class_height)
            shared = buffers * self.mesh.neighbours
            most = self.chunk or self.kind.rows_of_chunk(x, rows, classes, shared)
            self.heights[key] = chunk_height(layout, int(self.mesh.least(most)))
        return self.heights[key]


class ShardedSquaredErrorHead:
    """Squared error by Gram matrices that are summed over the ranks, or by residuals where Grams
    would lose digits, and to target vectors.
    """

    def __init__(self, mesh: Mesh, chunk: int | None = None) -> None:
        self.mesh, self.vectors = mesh, ShardedVectorsHead(mesh, chunk)

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        if isinstance(x.targets, DenseTargets):
            return self.vectors.value_and_grad(x, out)
        x, out, layout = in_sums_dtype(x), out.cleared(), layout_of(x)
        near = near_classes(x, layout)
        if near is None:
            fit = gram.value_and_grad(x, out, home=Exchange.of(x))
        else:
            fit = residuals.value_and_grad(x, out, layout, near)
        return HeadResult(fit.new_tensor(self.mesh.total(float(fit))), None)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        if isinstance(x.targets, DenseTargets):
            return self.vectors.hvp(x, v, out)
        gram.hvp(in_sums_dtype(x), in_sums_dtype(v), out.cleared(), home=Exchange.of(x))

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        if isinstance(x.targets, DenseTargets):
            return self.vectors.logit_gradient(x)
        return gram.GramGradient(in_sums_dtype(x), Exchange.of(x))

    def losses(self, x: HeadInput) -> Tensor:
        if isinstance(x.targets, DenseTargets):
            return self.vectors.losses(x)
        return gram.losses(x, home=Exchange.of(x))

    def plan(self, shape: HeadShape) -> HeadPlan:
        if shape.dense:
            return self.vectors.plan(shape)
        return SquaredErrorHead().plan(
            replace(
                shape,
                rows=share(shape.rows, self.mesh.ranks),
                classes=share(shape.classes, self.mesh.ranks),
            )
        )


class _Gradient:
    """The logit gradient of a softmax loss: this rank's rows of G right, and its classes of G'
    left, of its blocks of those.
    """

    def __init__(self, head: ShardedSoftmaxHead, x: HeadInput) -> None:
        self.head, self.x = head, x

    def times(self, right: Tensor) -> Tensor:
        product = right.new_zeros(self.x.features.shape[0], right.shape[1])
        sweep, sums = (
            self.head.sweep(self.x),
            Sums.of(self.head.mesh, self.x, Gradients(product, None, None)),
        )
        of_classes = sweep.group(right)
        for part, c, (h,) in sweep.chunks(self.x.features):
            forward = sums.forward(h)
            _add_products(sweep.with_tilt(c), of_classes, forward, h, None)
            sums.send(forward, part)
        sums.settle()
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        product = left.new_zeros(self.x.weight.shape[0], left.shape[1])
        sweep, sums = (
            self.head.sweep(self.x),
            Sums.of(self.head.mesh, self.x, Gradients(None, product, None)),
        )
        for _, c, (_, own) in sweep.chunks(self.x.features, left):
            _add_products(sweep.with_tilt(c), None, None, own, sums.weight)
        sums.settle()
        return product


def _add_products(
    G: ChunkGradient | TiltedGradient,
    right: Tensor | None,
    forward: Tensor | None,
    left: Tensor,
    backward: Tensor | None,
) -> None:
    if forward is not None and right is not None:
        G.add_times(right, forward)
    if backward is not None:
        G.add_transposed_times(left, backward)
