"""The head by the kernels of ufm_kernels: float32 and half precision, on CUDA.

E = exp(z - z_y) off the targets exists for a bounded chunk of rows at a time, in the precision that the dtype asks for:

    bfloat16  bf16, one pass      float16  fp16, products in tf32      float32  tf32x3, which keeps 1e-5 at any margin

float64 has no kernel and is refused. Losses are summed in float64 over float32 rows. What a kernel would not do better goes
to ``TiledBackend``, which runs on any device: squared error with at most d classes that have rows, and its second
derivatives; more than ``MAX_TARGETS`` targets in a row; rows with margins; and products with more than ``MAX_VECTORS`` columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput, HeadResult, RowStatistics, weighed
from ufm_fast.backends.squared_error import by_residuals
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.errors import InputError
from ufm_fast.losses import SoftmaxLoss
from ufm_fast.memory import available_bytes
from ufm_fast.targets import Targets
from ufm_kernels import rows as kernel_rows
from ufm_kernels.curvature import cross_entropy_curvature, logit_gradient, softmax_hvp
from ufm_kernels.fp8_head import fp8_value_and_grad
from ufm_kernels.head import NARROW, one_pass_value_and_grad, softmax_value_and_grad
from ufm_kernels.operands import MODES, chunk_bytes, operand_bytes
from ufm_kernels.segments import Segments
from ufm_kernels.squared_error import gram_bytes
from ufm_kernels.squared_head import squared_error_value_and_grad

MAX_TARGETS = 32  # targets of a row that the kernels compare each class with
MAX_VECTORS = 64  # columns of a product with G: each 16 of them form the logits once more
# Of a chunk: beyond, its pass over the gradient is little, and so are its launches; below, most of a device idles.
_MOST_ROWS, _MOST_BYTES, _LEAST_ROWS = 8192, 2 << 30, 128
_VECTORS = 16
_SOFTMAX_MODE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32x3"}
# One pass loses the residual of the squared error near collapse, and its products are small.
_FP8 = "fp8"  # by name only: E and its products in fp8, on sm_90; second derivatives and products with G in bfloat16
_SQUARED_MODE = {torch.bfloat16: "bf16x3", torch.float16: "bf16x3", torch.float32: "tf32x3"}


def plan_chunk(rows: int, dim: int, classes: int, mode: str, free_bytes: int) -> int:
    """Rows of E at a time: up to 8192, or 2 GiB, in a quarter of the free memory. 0 where not even 128 rows (or all) fit.

    Beside its row of E a row takes its features as an operand, and their gradient before it is added.
    """
    a_row = chunk_bytes(1, classes, mode) + 16 * dim
    most = free_bytes // 4 // a_row
    wanted = min(rows, max(_MOST_ROWS, _MOST_BYTES // a_row // _LEAST_ROWS * _LEAST_ROWS))
    return wanted if most >= wanted else most - most % _LEAST_ROWS


def planned_rows(rows: int, dim: int, classes: int, mode: str, device: torch.device, *, one_pass: bool) -> int:
    """``plan_chunk`` on the device as it is; without the one-pass kernels at least ``_LEAST_ROWS``."""
    chunk = plan_chunk(rows, dim, classes, mode, free_bytes(device))
    return min(rows, _LEAST_ROWS) if chunk == 0 and not one_pass else chunk


def softmax_plan(rows: int, dim: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """(rows of a chunk, bytes of ``head``, bytes of ``head_hvp``) beside parameters and gradients, as the backend runs them."""
    mode = _SOFTMAX_MODE[dtype]
    chunk, second = (planned_rows(rows, dim, classes, mode, device, one_pass=one) for one in (dim <= NARROW, False))
    sizes = (workspace(rows, dim, classes, dtype, chunk), workspace(rows, dim, classes, dtype, second, second=True))
    return chunk, *sizes


def workspace(rows: int, dim: int, classes: int, dtype: torch.dtype, chunk: int, *, second: bool = False) -> int:
    """Bytes beside parameters and gradients of a softmax head by chunks of so many rows; ``second``: of a Hessian product.

    The chunk of E with an eighth for its statistics, its features times their factors, and the copies of H and W (and of
    their directions) that are split, padded or change their dtype. A chunk of 0 rows: E is never stored.
    """
    mode = _SOFTMAX_MODE[dtype]
    chosen, matrices = MODES[mode], 2 if second else 1
    copies = 0
    if chosen.passes > 1 or chosen.logits != dtype or dim * dtype.itemsize % 16:
        copies += operand_bytes(rows + classes, dim, chosen.logits, chosen.passes)
    if chosen.logits != chosen.products:
        copies += operand_bytes(classes, dim, chosen.products, chosen.passes)
    if chosen.products == torch.float32 and (second or chosen.passes > 1):  # its transpose, unless the library multiplies
        copies += operand_bytes(dim, classes, chosen.products, chosen.passes)
    of_chunk = operand_bytes(chunk or rows, dim, chosen.products, chosen.passes)
    of_chunk += (
        8 * chunk * dim if second else 4 * chunk * dim if chosen.passes == 1 else 0
    )  # products of E before they are added
    vectors = 84 * rows + (0 if chunk else 8 * rows * dim)  # of the rows; without E, its product with W and their sum
    return chunk_bytes(chunk, classes, mode) * 9 // 8 + of_chunk + matrices * copies + vectors


def squared_workspace(rows: int, dim: int, classes: int, dtype: torch.dtype) -> int:
    """The same of the squared error: operands and Gram matrices; nothing of size rows x classes."""
    chosen = MODES[_SQUARED_MODE[dtype]]
    single = 0 if dtype == torch.float32 else 4 * (rows + classes) * dim  # float32 copies of H and W
    return operand_bytes(rows + classes, dim, chosen.products, chosen.passes) + single + gram_bytes(max(rows, classes), dim)


@dataclass(frozen=True)
class _Labels:
    """Targets as the kernels read them: (R, T) int32, padded with -1, sorted by class; None where T is too large or R is 0."""

    padded: Tensor | None
    segments: Segments | None

    @classmethod
    def of(cls, targets: Targets, classes: int) -> _Labels:
        if targets.rows == 0:
            return cls(None, None)
        if targets.indptr is None:
            padded = targets.indices[:, None].int()
        else:
            sizes = targets.sizes()
            widest = int(sizes.max())
            if widest > MAX_TARGETS:
                return cls(None, None)
            rows, columns = targets.slice(0, targets.rows)
            place = torch.arange(rows.numel(), device=rows.device) - targets.indptr[rows]
            padded = torch.full((targets.rows, widest), -1, dtype=torch.int32, device=rows.device)
            padded[rows, place] = columns.int()
        return cls(padded, Segments.of(padded, classes))

    @classmethod
    def remembered(cls, targets: Targets, classes: int) -> _Labels:
        """``of``, once for each stream: a step must not wait for it, and no other stream is known to have made it in time.

        It ends with the targets. A captured graph reads it at every replay: its owner keeps the targets. A capture waits for
        all streams first, so it takes any; what it makes is not there before the first replay, so it is not remembered.
        """
        device = targets.indices.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = ("layout", classes, stream)
        found = targets.remembered.get(key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if found is None and capturing:
            found = next((x for other, x in targets.remembered.items() if other[:2] == key[:2]), None)
        if found is None:
            found = cls.of(targets, classes)
            if not capturing:
                targets.remembered[key] = found
        return cast("_Labels", found)


@dataclass(frozen=True)
class _Swept:
    """Rows after a sweep, (R,): float64 losses, log1p(s / T) and float32 off-target mass s / T and margin."""

    losses: Tensor
    log_ratio: Tensor | None
    mass: Tensor
    margin: Tensor


class TritonBackend:
    """Softmax and squared-error heads by Triton kernels. ``mode``: a precision of ufm_kernels instead of the dtype's own.

    ``chunk``: rows at a time (default: from the free memory when a shape is first seen, halved when it runs out).
    The layout of targets, on them, and the chunk of each shape are remembered: results do not depend on it, repeated calls
    do not wait for the device, and a solve repeats bit for bit. A graph that captures a call needs its Targets kept alive.
    Mode ``fp8`` is for bfloat16 heads on sm_90 (see ``ufm_kernels.fp8``); all but ``head`` and ``losses`` run in bf16 there.
    The log of the off-target mass is -inf in rows whose mass underflows float32, from a margin of about 87 nats.
    Errors: InputError for an unknown mode, and by every method for float64 inputs.
    """

    name = "triton"

    def __init__(self, mode: str | None = None, chunk: int | None = None) -> None:
        if mode is not None and mode not in (*MODES, _FP8):
            raise InputError(f"mode must be one of {', '.join((*MODES, _FP8))}; got {mode!r}")
        self.mode = mode
        self.chunk = chunk
        self._tiled = TiledBackend()
        self._chunks: dict[tuple[object, ...], int] = {}

    # ---- the interface ---------------------------------------------------------------------------------------------

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        mode = self._mode_of(x)
        if not isinstance(x.loss, SoftmaxLoss):
            return self._squared_error(x, out, mode)
        labels = self._labels_of(x)
        if labels.padded is None:
            return self._tiled.head(x, out, statistics=statistics)
        buffers = _writable(out)
        swept = self._sweep(x, x.loss, labels, labels.padded, buffers, mode)
        _hand_over(buffers, out)
        return HeadResult(weighed(x.row_weight, swept.losses), _statistics(swept, x.targets) if statistics else None)

    def losses(self, x: HeadInput) -> Tensor:
        mode = self._mode_of(x)
        labels = self._labels_of(x)
        if not isinstance(x.loss, SoftmaxLoss) or labels.padded is None:
            return self._tiled.losses(x)
        return self._sweep(x, x.loss, labels, labels.padded, Gradients(None, None, None), mode).losses

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        mode, loss = self._mode_of(x), x.loss
        labels = self._labels_of(x)
        if not isinstance(loss, SoftmaxLoss) or labels.padded is None:
            return self._tiled.head_hvp(x, v, out)
        out = out.cleared()
        buffers = _writable(out)
        slope = _slope(loss)
        bend = cross_entropy_curvature if slope is kernel_rows.cross_entropy_weight else _curvature(loss)
        features, weight = (  # the driver has no way to leave one out
            torch.zeros(like.shape, device=like.device) if buffer is None else buffer
            for buffer, like in ((buffers.features, x.features), (buffers.weight, x.weight))
        )
        # float16 has not the range of a direction; the driver takes float32 beside it.
        dtype = torch.float32 if x.weight.dtype == torch.float16 else x.weight.dtype
        with _on(x.weight.device):
            softmax_hvp(
                x.features, x.weight, _bias(x), labels.padded, x.row_weight.float(), slope, bend,
                loss.smoothing, d_features=v.features.to(dtype), d_weight=v.weight.to(dtype),
                d_bias=_bias(v), out_features=features, out_weight=weight, out_bias=buffers.bias,
                chunk_rows=self._chunk_of(x, mode), mode=mode, segments=labels.segments,
            )  # fmt: skip
        _hand_over(buffers, out)
        return None

    def logit_products(self, x: HeadInput, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        mode, loss = self._mode_of(x), x.loss
        labels = self._labels_of(x)
        wide = any(t is not None and t.shape[1] > MAX_VECTORS for t in (right, left))
        if not isinstance(loss, SoftmaxLoss) or labels.padded is None or wide:
            return self._tiled.logit_products(x, right, left)
        with _on(x.weight.device):
            G = logit_gradient(
                x.features, x.weight, _bias(x), labels.padded, x.row_weight.float(), _slope(loss), loss.smoothing,
                chunk_rows=self._chunk_of(x, mode), mode=mode,
            )  # fmt: skip
            forward = backward = None
            if right is not None:
                forward = torch.cat([G.times(part) for part in _columns(right)], 1).to(right.dtype)
            if left is not None:
                backward = torch.cat([G.transposed_times(part) for part in _columns(left)], 1).to(left.dtype)
        return forward, backward

    # ---- the drivers -----------------------------------------------------------------------------------------------

    def _sweep(self, x: HeadInput, loss: SoftmaxLoss, labels: _Labels, padded: Tensor, out: Gradients, mode: str) -> _Swept:
        """Run a driver: losses of every row, gradients added into ``out``."""
        if self.mode == _FP8:
            return self._fp8_sweep(x, loss, labels, padded, out)
        options: dict[str, Any] = {
            "grad_features": out.features, "grad_weight": out.weight, "grad_bias": out.bias, "mode": mode,
            "need_features": out.features is not None, "need_weight": out.weight is not None, "segments": labels.segments,
            "fresh": out.fresh,
        }  # fmt: skip
        scale, value_fn = x.row_weight.float(), kernel_rows.cross_entropy_value
        arguments = (x.features, x.weight, _bias(x), padded, scale, value_fn, _slope(loss), loss.smoothing)
        with _on(x.weight.device):
            chunk = self._chunk_of(x, mode, one_pass=x.features.shape[1] <= NARROW)
            if chunk == 0:
                result = one_pass_value_and_grad(*arguments, **options)
            else:
                result = softmax_value_and_grad(*arguments, **options, chunk_rows=chunk)
        losses, log_ratio = result.losses.double(), None
        if not loss.multi_label:
            log_ratio = result.log_ratio.double()
            if not loss.smoothing:
                losses = loss.value(log_ratio, result.probability.double())  # p ** gamma underflows float32 long before p does
        return _Swept(losses, log_ratio, result.off_target_mass, result.margin)

    def _fp8_sweep(self, x: HeadInput, loss: SoftmaxLoss, labels: _Labels, padded: Tensor, out: Gradients) -> _Swept:
        """The same with products in fp8; whatever else a sweep is asked for has no such mode, which is said."""
        if loss.smoothing or padded.shape[1] > 1 or x.weight.dtype != torch.bfloat16:
            raise InputError("mode fp8 takes bfloat16 heads, one label a row, and no smoothing; choose another mode")
        out = out.cleared()
        with _on(x.weight.device):
            result, _ = fp8_value_and_grad(
                x.features, x.weight, _bias(x), padded, x.row_weight.float(), kernel_rows.cross_entropy_value, _slope(loss),
                grad_features=out.features, grad_weight=out.weight, grad_bias=out.bias, segments=labels.segments,
                chunk_rows=max(self._chunk_of(x, "bf16"), 1),
            )  # fmt: skip
        log_ratio = result.log_ratio.double()
        losses = loss.value(log_ratio, result.probability.double())
        return _Swept(losses, log_ratio, result.off_target_mass, result.margin)

    def _squared_error(self, x: HeadInput, out: Gradients, mode: str) -> HeadResult:
        # The driver's value is a difference of Grams.
        if by_residuals(x.targets, *x.weight.shape, bias=x.bias is not None) or x.features.shape[0] == 0:
            return self._tiled.head(x, out)
        out = out.cleared()
        buffers = _writable(out)
        with _on(x.weight.device):
            value = squared_error_value_and_grad(
                x.features, x.weight, _bias(x), x.targets.indices, x.row_weight.float(),
                grad_features=buffers.features, grad_weight=buffers.weight, grad_bias=buffers.bias, mode=mode,
                need_features=buffers.features is not None, need_weight=buffers.weight is not None,
                segments=self._labels_of(x).segments,
            )  # fmt: skip
        _hand_over(buffers, out)
        return HeadResult(value, None)

    # ---- what is remembered ----------------------------------------------------------------------------------------

    def _mode_of(self, x: HeadInput) -> str:
        dtype = torch.promote_types(x.features.dtype, x.weight.dtype)
        table = _SOFTMAX_MODE if isinstance(x.loss, SoftmaxLoss) else _SQUARED_MODE
        if dtype not in table:
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"backend triton has no {name} kernels; use backend tiled for {name}, or dtype float32")
        return (None if self.mode == _FP8 else self.mode) or table[dtype]

    def _labels_of(self, x: HeadInput) -> _Labels:
        if x.margin is not None:
            return _Labels(None, None)
        return _Labels.remembered(x.targets, x.weight.shape[0])

    def _chunk_of(self, x: HeadInput, mode: str, *, one_pass: bool = False) -> int:
        """Rows of a chunk whose memory is there; 0 where none can be afforded and ``one_pass`` does without."""
        (rows, columns), classes, device = x.features.shape, x.weight.shape[0], x.weight.device
        key = (rows, columns, classes, mode, one_pass, device)
        chunk = self._chunks.get(key, self.chunk)
        if chunk is None:
            chunk = planned_rows(rows, columns, classes, mode, device, one_pass=one_pass)
        if device.type == "cuda":
            chunk = _reserve(chunk, columns, classes, mode, device)
        if len(self._chunks) > 256:
            self._chunks.clear()
        self._chunks[key] = chunk = chunk if one_pass else max(chunk, 1)
        return chunk


def _reserve(chunk: int, columns: int, classes: int, mode: str, device: torch.device) -> int:
    """Halve the chunk until its memory can be had. Asked before the sweep: one that fails midway has spoilt its buffers."""
    while chunk:
        # E, statistics of its tiles, and the operands and products of a chunk of features.
        wanted = chunk_bytes(chunk, classes, mode) * 9 // 8 + 16 * chunk * columns
        try:
            torch.empty(wanted, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            chunk //= 2
        else:
            break
    return chunk


def free_bytes(device: torch.device) -> int:
    """Free memory, that which torch keeps for reuse included."""
    free = available_bytes(device)
    if device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bias(x: HeadInput) -> Tensor | None:
    return None if x.bias is None else x.bias.float().contiguous()


def _columns(x: Tensor) -> Iterator[Tensor]:
    return (part.float() for part in torch.split(x, _VECTORS, 1))


def _slope(loss: SoftmaxLoss) -> kernel_rows.LossFunction:
    """g', by the driver's own name where it is 1: then nothing is multiplied."""
    return kernel_rows.cross_entropy_weight if type(loss).weight is SoftmaxLoss.weight else loss.weight


def _curvature(loss: SoftmaxLoss) -> kernel_rows.LossFunction:
    """g'' from p g''; 0 where p underflows, for it is multiplied by numbers as small as p."""

    def curvature(l: Tensor, p: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).tiny
        return torch.where(p > tiny, loss.bend(l, p) / p.clamp_min(tiny), torch.zeros_like(p))

    return curvature


def _writable(out: Gradients) -> Gradients:
    """Contiguous float32 buffers, fresh if the given ones are: those, or zeros (or nothing yet) in place of any other kind."""
    make = torch.empty if out.fresh else torch.zeros

    def own(buffer: Tensor | None) -> Tensor | None:
        if buffer is None or (buffer.dtype == torch.float32 and buffer.is_contiguous()):
            return buffer
        return make(buffer.shape, device=buffer.device)

    return Gradients(own(out.features), own(out.weight), own(out.bias), fresh=out.fresh)


def _hand_over(buffers: Gradients, out: Gradients) -> None:
    """Add what was written into the buffers that stood in for the caller's, or copy it where those are fresh."""
    for written, wanted in ((buffers.features, out.features), (buffers.weight, out.weight), (buffers.bias, out.bias)):
        if written is not None and wanted is not None and written is not wanted:
            wanted.copy_(written) if out.fresh else wanted.add_(written)


def _statistics(swept: _Swept, targets: Targets) -> RowStatistics:
    """log s: log(s / T) for one target, where T = 1; for several log T is the rest of the loss, M (log1p(s / T) + log T)."""
    mass = swept.mass.double()
    if swept.log_ratio is not None:
        log_mass, largest = mass.log(), swept.log_ratio
    else:
        largest = swept.losses / targets.sizes()
        log_mass = largest - torch.log1p(mass) + mass.log()
    return RowStatistics(swept.margin.double(), torch.where(mass.isfinite(), log_mass, largest))
