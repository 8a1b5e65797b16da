"""Softmax losses without the R x K logits: a bounded chunk of rows at a time, on any torch device.
The CPU default.

A `Sweep` makes the exponentials of each chunk relative to an offset and what they tell of its rows;
a `ChunkGradient` turns them into products with the logit gradient. The offset is the *mean*
off-target logit, known before a row is swept (it needs only the mean row of W), so E is moderate
near collapse; where a row still overflows (a hostile logit) its own maximum takes over. No
difference of nearly equal numbers anywhere, at any margin. Squared error is `SquaredErrorHead`.

The exponentials of C rows are stored K x C, a column a row of the head: the product that makes them
and the one that takes H then both read and write along memory, which the libraries do up to a third
faster than the usual C x K.

Decisions

2026-11-26. Where classes are few, E becomes the logit gradient. Factors, and the gathered and
scattered rows of the targets, are passes over N x d; up to K = 4 d they cost more than E times its
factor with the labels' entries put in, after which two plain products follow
(`bench/reasons/few_classes.py`: 25 % less time at (4096, 100, 512), 5 to 6 % around a thousand
classes, 2 % at K = 4 d, 1 to 6 % more beyond). The errors are then those of a dense product, which
has the same sum to form: 2e-7 to 3e-7 instead of 3e-8 to 1.5e-7 before collapse; the terminal phase
keeps its digits either way (`tests/backends/test_tiled.py`). The logits' scale to bits is the
product's own factor, and a chunk asks for fewer operations on vectors, which are most of a small
head's time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    softmax_loss,
    weighed,
)
from ufm_fast.backends.chunks import Buffers, buffer_bytes, chunk_rows, kept_bytes
from ufm_fast.backends.logit_gradient import ChunkGradient, add_change, uneven
from ufm_fast.backends.squared_head import SquaredErrorHead
from ufm_fast.backends.sweep import Chunk, Sweep
from ufm_fast.backends.weighted import PickAllHead
from ufm_fast.losses import PickAll, SoftmaxLoss, SquaredError
from ufm_fast.stopwatch import NO_WATCH, NoWatch

# Classes to a column of features up to which a pass over E is cheaper than several over the
# features.
_FEW = 4


class TiledBackend(HeadByLoss):
    """Bounded memory on any torch device. ``chunk``: rows at a time (default: from free memory,
    halved when it runs out).

    On the CPU the buffer of the last ``head`` is kept for the next one of the same sizes, up to 132
    MiB.
    """

    name = "tiled"

    def __init__(self, chunk: int | None = None) -> None:
        self.softmax = TiledSoftmaxHead(chunk)
        super().__init__(
            (PickAll, PickAllHead(self.softmax)),
            (SoftmaxLoss, self.softmax),
            (SquaredError, SquaredErrorHead()),
        )


class TiledSoftmaxHead:
    """Every softmax loss, by chunks of exponentials. ``watch`` gets the seconds of its products."""

    watch: NoWatch = NO_WATCH

    def __init__(self, chunk: int | None = None) -> None:
        self._buffers = Buffers(chunk)

    def sweep(self, x: HeadInput) -> Sweep:
        """Every chunk of rows with its exponentials and row vectors; a chunk is valid until the
        next one is asked for.
        """
        return Sweep(x, self._buffers.new(x, compute_dtype(x.weight.dtype), 1)[0])

    def value_and_grad(
        self,
        x: HeadInput,
        out: Gradients,
        *,
        statistics: bool = False,
        visit: Callable[[Chunk], None] | None = None,
    ) -> HeadResult:
        """``visit`` sees every chunk before its exponentials are used up."""
        if x.features.shape[0] == 0:
            out = out.cleared()  # no chunk will write
        sweep = Sweep(
            x, self._buffers.take(x, compute_dtype(x.weight.dtype)), statistics=statistics
        )
        total = torch.zeros((), dtype=torch.float64, device=x.weight.device)
        class_sums = None if out.bias is None else total.new_zeros(x.weight.shape[0])
        margins, masses = [], []
        for c in self.watch.each("logits", sweep):
            total += weighed(c.row_weight, c.value)
            if c.margin is not None:
                margins.append(c.margin)
                masses.append(c.log_mass)
            if visit is not None:
                visit(c)
            _add_gradients(c, sweep, out, class_sums, self.watch)
        if out.bias is not None and class_sums is not None:
            if sweep.loss.smoothing:
                class_sums += sweep.loss.smoothing * uneven(
                    x.targets.indices, x.row_weight, x.weight.shape[0]
                )
            out.bias.copy_(class_sums) if out.fresh else out.bias.add_(class_sums)
        self._buffers.keep(sweep.buffer)
        none = total.new_zeros(0)
        rows = (
            RowStatistics(torch.cat([none, *margins]), torch.cat([none, *masses]))
            if statistics
            else None
        )
        return HeadResult(total, rows)

    def losses(self, x: HeadInput) -> Tensor:
        return torch.cat(
            [x.row_weight.new_zeros(0, dtype=torch.float64), *(c.value for c in self.sweep(x))]
        )

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return _Gradient(self, x)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        out = out.cleared()
        buffer, change = self._buffers.new(x, compute_dtype(x.weight.dtype), 2)
        sweep = Sweep(x, buffer)
        W, dW = sweep.W, v.weight.to(sweep.W.dtype)
        class_sums = (
            None
            if out.bias is None
            else torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
        )
        for c in self.watch.each("logits", sweep):
            dz = change[:, : c.stop - c.start]
            dh = v.features[c.start : c.stop].to(W.dtype)
            with self.watch("logits"):
                torch.mm(W, dh.T, out=dz)
                dz.addmm_(dW, c.features.T)
                if v.bias is not None:
                    dz.add_(v.bias.to(W.dtype)[:, None])
            # First the part G dW and G' dH, which uses E as it is; then E is overwritten by the
            # change of G.
            G = ChunkGradient(sweep.loss, c)
            if out.features is not None:
                with self.watch("dH"):
                    G.add_times(dW, out.features[c.start : c.stop])
            if out.weight is not None:
                with self.watch("dW"):
                    G.add_transposed_times(dh, out.weight)
            add_change(sweep.loss, c, W, dz, Gradients(out.features, out.weight, class_sums))
        if out.bias is not None and class_sums is not None:
            out.bias.add_(class_sums)

    def plan(self, shape: HeadShape) -> HeadPlan:
        R, K, d, item = shape.rows, shape.classes, shape.dim, shape.itemsize
        chunk, second = (chunk_rows(R, K, item, shape.device, buffers) for buffers in (1, 2))
        # Beside the exponentials: features in units of their logits, and rows of d entries for a
        # chunk.
        first_order = buffer_bytes(chunk, K, item) + (R + 3 * chunk) * d * item
        second_order = 2 * buffer_bytes(second, K, item) + (2 * R + 4 * second) * d * item
        return HeadPlan(
            chunk,
            first_order,
            second_order,
            6.0 * R * K * d,
            kept_bytes(chunk, K, item, shape.device),
            float(R) * K,
        )


def spends(W: Tensor, out: Gradients) -> bool:
    """Whether a pass over E, in which G takes its place, is cheaper than several over the
    features.
    """
    return W.shape[0] <= _FEW * W.shape[1] and not (out.features is None and out.weight is None)


def _add_gradients(
    c: Chunk, sweep: Sweep, out: Gradients, class_sums: Tensor | None, watch: NoWatch
) -> None:
    """The chunk's part of the gradients; E is spent where classes are few."""
    G, W = ChunkGradient(sweep.loss, c), sweep.W
    if spends(W, out):
        G.store(class_sums)
    elif class_sums is not None:
        G.add_class_sums(class_sums)
    if out.features is not None:
        with watch("dH"):
            G.add_times(W, out.features[c.start : c.stop], fresh=out.fresh)
    if out.weight is not None:
        with watch("dW"):
            G.add_transposed_times(c.features, out.weight, fresh=out.fresh and c.start == 0)


class _Gradient:
    """The logit gradient by a sweep for each product."""

    def __init__(self, head: TiledSoftmaxHead, x: HeadInput) -> None:
        self.head, self.x = head, x

    def times(self, right: Tensor) -> Tensor:
        product = right.new_zeros(self.x.features.shape[0], right.shape[1])
        for c in self.head.sweep(self.x):
            ChunkGradient(softmax_loss(self.x), c).add_times(right, product[c.start : c.stop])
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        product = left.new_zeros(self.x.weight.shape[0], left.shape[1])
        for c in self.head.sweep(self.x):
            ChunkGradient(softmax_loss(self.x), c).add_transposed_times(
                left[c.start : c.stop], product
            )
        return product
