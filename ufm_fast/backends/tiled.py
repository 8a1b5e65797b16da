"""Softmax losses without the R x K logits: a bounded chunk of rows at a time, on any torch device. The CPU default.

For row i let o be an offset near the off-target logits, E_k = exp(z_k - o) off target and 0 on target, s' = sum E_k. Then

    u = log s' + o - z_y = log(off-target mass),   l = softplus(u) = -log p_y,   p = sigmoid(u) = 1 - p_y,

are vectors of length R, taken in float64 whatever the dtype of the products, and the gradient in the logits is
weight * p * E_k / s' off target and -weight * p on target: no difference of nearly equal numbers anywhere, at any margin.
The offset is the *mean* off-target logit, known before the row is swept (it needs only the mean row of W), so E is
moderate near collapse; where a row still overflows (a hostile logit) its own maximum takes over.

The exponentials of C rows are stored K x C, a column a row of the head: the product that makes them and the one that
takes H then both read and write along memory, which the libraries do up to a third faster than the usual C x K.

Decisions

2026-11-25. The tiled backend stores exponentials K x C (a column a row of the head) with rows of a length that is a
multiple of 16 but not of 64. The first product then writes, and the product with H reads, along memory: the three
products of all chunks take 4 % less time than with C x K at (4096, 4096, 512), and 17, 9 and 13 % less at the other
three shapes (`bench/layout.py`, two Zen 3 cores), and the best chunked rivals, level before, are behind. Tried and
dropped: `softmax` in place of subtract and exp (no faster, and its sums in float32 are biased at K = 65536, where all
terms are nearly equal), a contiguous copy of W', larger chunks.

2026-11-25. Chunks of the tiled backend hold 24 MiB of exponentials, or 528 rows where that is more, up to 132 MiB, all
of one height that needs no padding: measured with `bench/head.py` at its four shapes, smaller ones lose to the
products' inefficiency, larger ones to the cache. What is free, in the machine or its container, bounds them by a power
of two, so that chunks do not change from call to call with the memory.

2026-11-25. The tiled backend keeps its last buffer on the CPU, up to 132 MiB, and takes it away while it is in use, so
that threads never share one. Above 32 MiB the C library gives memory back at once, and fetching 33 thousand pages anew
shows in a head's time.

2026-11-25. Smoothing's part of the bias gradient is added once, as the weight of each class less the mean, exactly zero
for equal classes. Added as two parts chunk by chunk it left rounding where at margins of 50 nats nothing else is left.

2026-11-26. A Hessian product takes the mean off first. Where a wrong class has all the mass, its change and the mean of
all changes cancelled in float32: up to 5e-3 of the largest entry, 1e-5 now, for one more pass over the changes
(`tests/test_backends.py`). The kernels still do it in one.

2026-11-26. Where classes are few, E becomes the logit gradient. Factors, and the gathered and scattered rows of the
targets, are passes over N x d; up to K = 4 d they cost more than E times its factor with the labels' entries put in,
after which two plain products follow (`bench/few_classes.py`: 25 % less time at (4096, 100, 512), 5 to 6 % around a
thousand classes, 2 % at K = 4 d, 1 to 6 % more beyond). The errors are then those of a dense product, which has the
same sum to form: 2e-7 to 3e-7 instead of 3e-8 to 1.5e-7 before collapse; the terminal phase keeps its digits either way
(`tests/test_backends.py`). The logits' scale to bits is the product's own factor, and a chunk asks for fewer operations
on vectors, which are most of a small head's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.backends import squared_error
from ufm_fast.backends.base import Gradients, HeadInput, HeadResult, RowStatistics, compute_dtype, weighed
from ufm_fast.backends.exponentials import alike, exact_mean, exponentials, target_logits
from ufm_fast.backends.sums import add_class_sums, add_product, class_totals, sums_along, weighted_sum
from ufm_fast.losses import SoftmaxLoss
from ufm_fast.memory import available_bytes, out_of_memory

_NEAR_BYTES, _FAR_BYTES, _EFFICIENT_ROWS = 24 << 20, 132 << 20, 528
_SMALL_BYTES = 1 << 20  # is had without asking what is free, which takes as long as such a head's products
_BLOCK = 4096  # classes at a time where an elementwise product is summed
_FEW = 4  # classes to a column of features up to which a pass over E is cheaper than several over the features


def chunk_rows(rows: int, classes: int, itemsize: int, device: torch.device, buffers: int = 1) -> int:
    """Rows of a chunk: 24 MiB of exponentials stay near the cache; but 528 rows keep the products efficient, up to 132 MiB.

    Never more than an eighth of the free memory, and at least 32 rows (a product of fewer is slow) where that allows it.
    With ``buffers`` the bounds are on all of them together. The padding of ``buffer_bytes`` is within the bounds. What fits
    1 MiB is one chunk, whatever is free.
    """
    row, rows = classes * itemsize * buffers, max(rows, 1)
    if _stride(rows) * row <= _SMALL_BYTES:
        return rows
    # The power of two below: what is free changes from call to call, the chunks and so the last bits should not.
    most = 1 << max(1, available_bytes(device) // 8 // row).bit_length() - 1
    limit = min(max(_NEAR_BYTES // row, min(_EFFICIENT_ROWS, _FAR_BYTES // row), 32), most)
    if _stride(rows) <= limit:
        return rows
    number = -(-rows // _longest_stride(limit))
    return min(_stride(-(-rows // number)), _longest_stride(limit))  # equal chunks: a short last one would be slow


def buffer_bytes(chunk: int, classes: int, itemsize: int) -> int:
    """Bytes of the exponentials of ``chunk`` rows as they are stored."""
    return _stride(chunk) * classes * itemsize


@dataclass
class Chunk:
    """One chunk of rows after its sweep; vectors are float64 of the chunk's length C."""

    start: int
    stop: int
    features: Tensor  # C x d, in the compute dtype
    E: Tensor  # K x C exponentials, zero on targets; overwritten by later steps
    mass: Tensor  # s', the sum of E
    entry_row: Tensor  # row within the chunk of each target entry
    entry_class: Tensor
    entry_logit: Tensor  # z at the target entries
    entry_share: Tensor  # softmax among the row's targets (1 for a single label)
    M: Tensor  # targets a row
    margin: Tensor | None  # lowest target logit less the largest other, with statistics
    l: Tensor
    p: Tensor
    log_mass: Tensor  # u + log T: log of the off-target mass relative to the mean target logit
    excess: Tensor  # D / T with D = sum expm1(z_k - mean target logit), T = M + D
    value: Tensor  # loss of each row, without row weight
    mean_target: Tensor
    row_weight: Tensor


class TiledBackend:
    """Bounded memory on any torch device. ``chunk``: rows at a time (default: from free memory, halved when it runs out).

    On the CPU the buffer of the last ``head`` is kept for the next one of the same sizes, up to 132 MiB.
    """

    name = "tiled"

    def __init__(self, chunk: int | None = None) -> None:
        self.chunk = chunk
        self._spare: list[Tensor] = []  # the last head's buffer

    # ---- the sweep -------------------------------------------------------------------------------------------------

    def _buffers(self, x: HeadInput, dtype: torch.dtype, number: int) -> list[Tensor]:
        K, device = x.weight.shape[0], x.weight.device
        rows = self.chunk or chunk_rows(x.features.shape[0], K, dtype.itemsize, device, number)
        while True:
            try:
                return [torch.empty(K, _stride(rows), dtype=dtype, device=device)[:, :rows] for _ in range(number)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if rows == 1 or not out_of_memory(error):
                    raise
                rows //= 2

    def _spare_or_new(self, x: HeadInput, dtype: torch.dtype) -> list[Tensor]:
        """One buffer: the spare one if it was made for the same sizes. Meanwhile it is away: another thread makes its own."""
        K, device = x.weight.shape[0], x.weight.device
        rows = self.chunk or chunk_rows(x.features.shape[0], K, dtype.itemsize, device)
        try:
            spare = self._spare.pop()
        except IndexError:
            return self._buffers(x, dtype, 1)
        if spare.shape == (K, rows) and spare.dtype == dtype and spare.device == device:
            return [spare]
        del spare  # before the new one is made
        return self._buffers(x, dtype, 1)

    def _keep(self, buffer: Tensor) -> None:
        """Keep a buffer for the next call: on the CPU, fetching its pages anew takes 2 to 3 % of a head's time."""
        plain = type(buffer) is Tensor and not buffer.is_inference()  # an inference tensor may not be written elsewhere
        if plain and buffer.device.type == "cpu" and buffer.untyped_storage().nbytes() <= _FAR_BYTES:
            self._spare[:] = [buffer]

    def sweep(self, x: HeadInput) -> Iterator[Chunk]:
        """Every chunk of rows with its exponentials and row vectors; a chunk is valid until the next one is asked for."""
        W = x.weight.to(compute_dtype(x.weight.dtype))
        (buffer,) = self._buffers(x, W.dtype, 1)
        yield from self._chunks(x, W, buffer)

    def _chunks(self, x: HeadInput, W: Tensor, buffer: Tensor, *, statistics: bool = False) -> Iterator[Chunk]:
        assert isinstance(x.loss, SoftmaxLoss)
        means = W.mean(0), exact_mean(W) if x.loss.smoothing else None
        bias = None if x.bias is None else x.bias.double()
        for start in range(0, x.features.shape[0], buffer.shape[1]):
            yield self._sweep(x, x.loss, W, bias, means, start, buffer, statistics)

    def _sweep(
        self, x: HeadInput, loss: SoftmaxLoss, W: Tensor, bias: Tensor | None, means: tuple[Tensor, Tensor | None], start: int,
        buffer: Tensor, statistics: bool,
    ) -> Chunk:  # fmt: skip
        K = W.shape[0]
        h = x.features[start : start + buffer.shape[1]].to(W.dtype)
        stop = start + h.shape[0]
        rows, columns = x.targets.slice(start, stop)
        z = target_logits(h, W, rows, columns, x.targets.single)
        mean_logit = torch.mv(h, means[0]).double()
        M = torch.ones_like(z) if x.targets.single else _segment_sum(torch.ones_like(z), rows, h.shape[0])
        if bias is not None:
            z = z + bias[columns]
            mean_logit = mean_logit + bias.mean()
        offset = (K * mean_logit - (z if x.targets.single else _segment_sum(z, rows, h.shape[0]))) / (K - M)

        E, of_logits = buffer[:, : h.shape[0]], None if bias is None else bias.to(W.dtype)
        mass, offset, top, rounded = exponentials(h, W, of_logits, offset, rows, columns, E, top=statistics)
        margin = None
        if top is not None:
            margin = _segment_min(alike(z, rounded, top[rows]), rows, h.shape[0], x.targets.single) - top
        z = alike(z, rounded, (mass.log() + offset)[rows])

        targets_sum = z if x.targets.single else _segment_sum(z, rows, h.shape[0])
        mean_target = targets_sum / M
        if not x.targets.single:  # an impossible target (-inf) leaves a mean of the best one; 0 without any
            best = torch.full_like(M, -math.inf).scatter_reduce(0, rows, z, "amax")
            mean_target = torch.where(mean_target == -math.inf, best.masked_fill(best == -math.inf, 0.0), mean_target)
        share, log_total, excess = _target_share(z, rows, mean_target, M, x.targets.single)
        log_mass = mass.log() + (offset - mean_target)
        if bias is not None:  # a parameter that has diverged must not pass for a perfect fit
            log_mass = torch.where(mean_target == math.inf, math.nan, log_mass)
        u = log_mass - log_total
        if x.margin is not None:
            u = u + x.margin[start:stop]
        l, p = torch.nn.functional.softplus(u, threshold=40.0), torch.sigmoid(u)
        value = torch.where(targets_sum == -math.inf, math.inf, M * (log_total + l)) if loss.multi_label else loss.value(l, p)
        if loss.smoothing:
            tilt = target_logits(h, W, rows, columns, True, means[1])
            if bias is not None:
                tilt = tilt + (bias[columns] - exact_mean(bias))
            if x.margin is not None:
                tilt = tilt - x.margin[start:stop] * (1.0 - 1.0 / K)
            # Where the target is impossible, the loss is infinite already, and so may its mean logit be.
            value = value + loss.smoothing * torch.where(z == -torch.inf, 0.0, tilt)
        return Chunk(
            start, stop, h, E, mass, rows, columns, z, share, M, margin, l, p, log_mass, excess, value, mean_target,
            x.row_weight[start:stop].double(),
        )  # fmt: skip

    # ---- the interface ---------------------------------------------------------------------------------------------

    def head(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False, visit: Callable[[Chunk], None] | None = None
    ) -> HeadResult:
        """``visit`` sees every chunk before its exponentials are used up."""
        if not isinstance(x.loss, SoftmaxLoss):
            return HeadResult(squared_error.value_and_grad(_upcast(x), out.cleared()), None)
        if x.features.shape[0] == 0:
            out = out.cleared()  # no chunk will write
        W = x.weight.to(compute_dtype(x.weight.dtype))
        (buffer,) = self._spare_or_new(x, W.dtype)
        total = torch.zeros((), dtype=torch.float64, device=W.device)
        columns = None if out.bias is None else total.new_zeros(W.shape[0])
        margins, masses = [], []
        for c in self._chunks(x, W, buffer, statistics=statistics):
            total += weighed(c.row_weight, c.value)
            if c.margin is not None and statistics:
                margins.append(c.margin)
                masses.append(c.log_mass)
            if visit is not None:
                visit(c)
            spend = W.shape[0] <= _FEW * W.shape[1] and not (out.features is None and out.weight is None)
            self._add_products(
                x.loss, c, W, W, c.features, out.features, out.weight, columns, fresh=out.fresh, spend=spend
            )  # fmt: skip
        if out.bias is not None and columns is not None:
            if x.loss.smoothing:
                columns += x.loss.smoothing * uneven(x.targets.indices, x.row_weight, W.shape[0])
            out.bias.copy_(columns) if out.fresh else out.bias.add_(columns)
        self._keep(buffer)
        none = total.new_zeros(0)
        found = RowStatistics(torch.cat([none, *margins]), torch.cat([none, *masses])) if statistics else None
        return HeadResult(total, found)

    def logit_products(self, x: HeadInput, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if not isinstance(x.loss, SoftmaxLoss):
            return squared_error.logit_products(_upcast(x), right, left)
        W = x.weight.to(compute_dtype(x.weight.dtype))
        forward = None if right is None else right.new_zeros(x.features.shape[0], right.shape[1])
        backward = None if left is None else left.new_zeros(W.shape[0], left.shape[1])
        for c in self.sweep(x):
            own = None if left is None else left[c.start : c.stop]
            self._add_products(x.loss, c, W, right, own, forward, backward, None)
        return forward, backward

    def losses(self, x: HeadInput) -> Tensor:
        if not isinstance(x.loss, SoftmaxLoss):
            return squared_error.losses(x)
        return torch.cat([x.row_weight.new_zeros(0, dtype=torch.float64), *(c.value for c in self.sweep(x))])

    def _add_products(
        self, loss: SoftmaxLoss, c: Chunk, W: Tensor, right: Tensor | None, left: Tensor | None,
        forward: Tensor | None, backward: Tensor | None, column_sum: Tensor | None, fresh: bool = False, spend: bool = False,
    ) -> None:  # fmt: skip
        """Add G right into ``forward``, G' left into ``backward`` and G's column sums (float64), for the chunk's rows of G.

        With ``fresh`` forward and backward are written, not added to (backward by the first chunk). With ``spend`` E becomes
        G itself, which has then nothing to add to the products.
        """
        slope = c.row_weight * c.M if loss.multi_label else c.row_weight * loss.weight(c.l, c.p)
        factor = (slope * c.p / c.mass).to(W.dtype)
        exact = _entry_coefficients(loss, c, slope)
        entry = exact.to(W.dtype)
        even = -loss.smoothing / W.shape[0] * c.row_weight if loss.smoothing else None
        one = c.entry_row.numel() == c.M.numel()  # target a row: rows are in order
        if spend:
            c.E.mul_(factor)
        if column_sum is not None:
            column_sum.add_(c.E.sum(1) if spend else sums_along(c.E, factor))
            # Smoothing's part is added once, by the caller: here it would cancel the digits of what is left near collapse.
            own = exact if even is None else (-slope * c.p)[c.entry_row]
            column_sum.add_(class_totals(c.E.shape[0], c.entry_class, own))
        if spend:
            c.E[c.entry_class, c.entry_row] = entry
        if forward is not None and right is not None:
            block = forward[c.start : c.stop]
            if spend:
                torch.addmm(block, c.E.T, right, beta=0 if fresh else 1, out=block)
            else:
                product = torch.mm(c.E.T, right, out=block) if fresh else c.E.T @ right
                product.mul_(factor[:, None])
                own = right.index_select(0, c.entry_class)
                if one:
                    product.addcmul_(own, entry[:, None])
                else:
                    product.index_add_(0, c.entry_row, own.mul_(entry[:, None]))
                if not fresh:
                    block.add_(product)
            if even is not None:
                block.add_(torch.outer(even.to(W.dtype), right.sum(0)))
        if backward is not None and left is not None:
            add_product(backward, c.E, left if spend else left * factor[:, None], fresh=fresh and c.start == 0)
            if not spend:
                own = left if one else left.index_select(0, c.entry_row)
                add_class_sums(backward, c.entry_class, own, exact)
            if even is not None:
                backward.add_(weighted_sum(left, even.to(W.dtype)))

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        if not isinstance(x.loss, SoftmaxLoss):
            return squared_error.hvp(_upcast(x), _upcast(v), out.cleared())
        out = out.cleared()
        W = x.weight.to(compute_dtype(x.weight.dtype))
        dW = v.weight.to(W.dtype)
        buffer, change = self._buffers(x, W.dtype, 2)
        columns = None if out.bias is None else torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
        for c in self._chunks(x, W, buffer):
            dz = change[:, : c.stop - c.start]
            dh = v.features[c.start : c.stop].to(W.dtype)
            torch.mm(W, dh.T, out=dz)
            dz.addmm_(dW, c.features.T)
            if v.bias is not None:
                dz.add_(v.bias.to(W.dtype)[:, None])
            # First the part G dW and G' dH, which uses E as it is; then E is overwritten by the change of G.
            self._add_products(x.loss, c, W, dW, dh, out.features, out.weight, None)
            self._add_change(x.loss, c, W, dz, Gradients(out.features, out.weight, columns))
        if out.bias is not None and columns is not None:
            out.bias.add_(columns)

    def _add_change(self, loss: SoftmaxLoss, c: Chunk, W: Tensor, dz: Tensor, out: Gradients) -> None:
        """dG: with pi the softmax and z~ the change relative to the targets' mean change, off target
        weight p (E/s') (dz - z~) and the mean of dz under E/s' decide everything."""
        entry_dz = dz[c.entry_class, c.entry_row].double()
        one = c.entry_row.numel() == c.M.numel()
        own = entry_dz if one else _segment_sum(entry_dz * c.entry_share, c.entry_row, c.M.shape[0])
        # Taken off first, so that a class with nearly all the mass is left with a small number, and not two that cancel.
        middle = (_column_products(c.E, dz).double() / c.mass).to(dz.dtype)
        dz.sub_(middle)
        rest = _column_products(c.E, dz).double() / c.mass
        mean = middle.double() + rest - own
        if loss.multi_label:
            slope, bend = c.row_weight * c.M, torch.zeros_like(c.p)
        else:
            slope, bend = c.row_weight * loss.weight(c.l, c.p), c.row_weight * loss.bend(c.l, c.p)
        scale = c.p / c.mass
        q = 1.0 - c.p
        factor = (slope * scale).to(W.dtype)
        shift = (scale * ((slope * q + bend) * mean - slope * rest)).to(W.dtype)
        c.E.mul_(dz.mul_(factor).add_(shift))
        share = c.entry_share
        inner = (slope * q)[c.entry_row] * share * (entry_dz - own[c.entry_row])
        exact = inner - ((slope * q + bend) * c.p * mean)[c.entry_row] * share
        entry = exact.to(W.dtype)
        if out.features is not None:
            block = out.features[c.start : c.stop]
            block.addmm_(c.E.T, W)
            block.index_add_(0, c.entry_row, W.index_select(0, c.entry_class).mul_(entry[:, None]))
        if out.weight is not None:
            add_product(out.weight, c.E, c.features)
            own = c.features if one else c.features.index_select(0, c.entry_row)
            add_class_sums(out.weight, c.entry_class, own, exact)
        if out.bias is not None:
            out.bias.add_(c.E.sum(1)).add_(class_totals(c.E.shape[0], c.entry_class, exact))


def _target_share(z: Tensor, rows: Tensor, mean: Tensor, M: Tensor, single: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax among the targets (entries), log T and D / T (rows), with T = sum exp(z - mean) = M + D over the targets."""
    if single:
        return torch.ones_like(z), torch.zeros_like(mean), torch.zeros_like(mean)
    u = z - mean[rows]
    D = _segment_sum(torch.expm1(u), rows, M.shape[0])
    top = torch.full_like(M, -float("inf")).scatter_reduce(0, rows, u, "amax")
    spread = top + _segment_sum(torch.exp(u - top[rows]), rows, M.shape[0]).log()
    log_total = torch.where(D < 1e3, M.log() + torch.log1p(D / M), spread)
    share = torch.where(u == -math.inf, 0.0, torch.exp(u - log_total[rows]))
    return share, log_total, torch.where((D < 1e3) & (M + D > 0), D / (M + D), torch.ones_like(D))


def _entry_coefficients(loss: SoftmaxLoss, c: Chunk, slope: Tensor) -> Tensor:
    """Gradient in the logits at the target entries: -slope p for a single label, plus smoothing.

    For several targets M q share_k - 1 = q (M expm1(u_k) - D) / T - p, which does not cancel when the targets are level.
    """
    if not loss.multi_label:
        pull = -slope * c.p
        return (pull + loss.smoothing * c.row_weight if loss.smoothing else pull)[c.entry_row]
    q = 1.0 - c.p
    rise = torch.expm1(c.entry_logit - c.mean_target[c.entry_row])
    level = c.excess < 1.0
    total = c.M / (1.0 - c.excess).clamp_min(1e-300)  # T = M + D, since D / T = excess
    near = q[c.entry_row] * (c.M[c.entry_row] * rise / total[c.entry_row] - c.excess[c.entry_row]) - c.p[c.entry_row]
    far = (q * c.M)[c.entry_row] * c.entry_share - 1.0
    return c.row_weight[c.entry_row] * torch.where(level[c.entry_row], near, far)


def uneven(labels: Tensor, row_weight: Tensor, classes: int) -> Tensor:
    """Weight of each class's rows less the mean over the classes, float64 (K,): exactly zero where all are equal."""
    weight = class_totals(classes, labels, row_weight.double())
    weight -= weight[0].clone()
    return weight - weight.mean()


def _segment_sum(values: Tensor, rows: Tensor, number: int) -> Tensor:
    return torch.zeros(number, dtype=values.dtype, device=values.device).index_add_(0, rows, values)


def _segment_min(values: Tensor, rows: Tensor, number: int, single: bool) -> Tensor:
    if single:
        return values
    return torch.full((number,), float("inf"), dtype=values.dtype, device=values.device).scatter_reduce(0, rows, values, "amin")


def _upcast(x: HeadInput) -> HeadInput:
    dtype = compute_dtype(x.weight.dtype)
    bias = None if x.bias is None else x.bias.to(dtype)
    return HeadInput(x.loss, x.features.to(dtype), x.weight.to(dtype), bias, x.targets, x.row_weight)


def _stride(columns: int) -> int:
    """Length of a row in memory: aligned to 16 numbers, and no multiple of 64, whose rows would share cache sets."""
    if columns < 16:
        return columns
    aligned = -(-columns // 16) * 16
    return aligned + 16 if aligned % 64 == 0 else aligned


def _longest_stride(limit: int) -> int:
    """The longest row up to ``limit`` that needs no padding."""
    if limit < 16:
        return limit
    aligned = limit // 16 * 16
    return aligned - 16 if aligned % 64 == 0 else aligned


def _column_products(A: Tensor, B: Tensor) -> Tensor:
    """Inner products of the columns of A and B, by blocks of rows that bound the memory of the elementwise product."""
    total = A.new_zeros(A.shape[1])
    for start in range(0, A.shape[0], _BLOCK):
        total += (A[start : start + _BLOCK] * B[start : start + _BLOCK]).sum(0)
    return total
