"""The heads by the kernels of ufm_kernels: float32 and half precision, on CUDA.

E = exp(z - z_y) off the targets exists for a bounded chunk of rows at a time, in the precision that
the dtype asks for:

    bfloat16  bf16, one pass      float16  fp16, products in tf32
    float32   tf32x3, which keeps 1e-5 at any margin

float64 has no kernel and is refused. Losses are summed in float64 over float32 rows. What a kernel
would not do better goes to the heads of ``TiledBackend``, which run on any device: squared error
with at most d classes that have rows, and its second derivatives; more than ``MAX_TARGETS`` targets
in a row; rows with margins; and products with more than ``MAX_VECTORS`` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

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
    softmax_loss,
    weighed,
)
from ufm_fast.backends.tiled import TiledSoftmaxHead
from ufm_fast.backends.triton_buffers import FP8, bias_of, hand_over, mode_of, on_device, writable
from ufm_fast.backends.triton_labels import Labels
from ufm_fast.backends.triton_memory import (
    SOFTMAX_MODE,
    ChunkRows,
    softmax_plan,
)
from ufm_fast.backends.triton_squares import TritonSquaredErrorHead
from ufm_fast.backends.weighted import PickAllHead
from ufm_fast.errors import InputError
from ufm_fast.losses import PickAll, SoftmaxLoss, SquaredError
from ufm_fast.targets import Targets
from ufm_kernels import rows as kernel_rows
from ufm_kernels.curvature import cross_entropy_curvature, logit_gradient, softmax_hvp
from ufm_kernels.fp8_head import fp8_value_and_grad
from ufm_kernels.head import NARROW, one_pass_value_and_grad, softmax_value_and_grad
from ufm_kernels.head_parts import who_multiplies
from ufm_kernels.operands import MODES
from ufm_kernels.replays import Replays
from ufm_kernels.tiles import REPLAYED

MAX_VECTORS = 64  # columns of a product with G: each 16 of them form the logits once more
_VECTORS = 16


class _Swept(NamedTuple):
    """Rows after a sweep, (R,): float64 losses, log1p(s / T) and float32 off-target mass s / T and
    margin.
    """

    losses: Tensor
    log_ratio: Tensor | None
    mass: Tensor
    margin: Tensor


class TritonBackend(HeadByLoss):
    """Softmax and squared-error heads by Triton kernels. ``mode``: a precision of ufm_kernels
    instead of the dtype's own.

    ``chunk``: rows at a time (default: from the free memory when a shape is first seen, halved when
    it runs out). The layout of targets, on them, and the chunk of each shape are remembered:
    results do not depend on it, repeated calls do not wait for the device, and a solve repeats bit
    for bit. A graph that captures a call needs its Targets kept alive. Mode ``fp8`` is for bfloat16
    heads on sm_90 (see ``ufm_kernels.fp8``); all but ``head`` and ``losses`` run in bf16 there. The
    log of the off-target mass is -inf in rows whose mass underflows float32, from a margin of about
    87 nats.

    ``replay``: record a repeated softmax step as a CUDA graph and replay it (see
    ``ufm_kernels.replays``; a second chunk of memory); None: as the table ``ufm_kernels.tiles``
    says for the mode, which is no.
    Errors: InputError for an unknown mode, and by every method for float64 inputs.
    """

    name = "triton"

    def __init__(
        self, mode: str | None = None, chunk: int | None = None, replay: bool | None = None
    ) -> None:
        if mode is not None and mode not in (*MODES, FP8):
            raise InputError(f"mode must be one of {', '.join((*MODES, FP8))}; got {mode!r}")
        softmax = TritonSoftmaxHead(mode, chunk, replay)
        super().__init__(
            (PickAll, PickAllHead(softmax)),
            (SoftmaxLoss, softmax),
            (SquaredError, TritonSquaredErrorHead(mode)),
        )


class TritonSoftmaxHead:
    """Every softmax loss: its kernels multiply by two elementwise functions of the loss, in
    torch.
    """

    def __init__(self, mode: str | None, chunk: int | None, replay: bool | None = None) -> None:
        self.mode = mode
        self.tiled = TiledSoftmaxHead()
        self.replay, self.replays = replay, Replays()
        self._chunks = ChunkRows(chunk)

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        mode, labels = self._mode(x), Labels.of_head(x)
        if labels.padded is None:
            return self.tiled.value_and_grad(x, out, statistics=statistics)
        buffers = writable(out)
        swept = self._sweep(x, labels, labels.padded, buffers, mode)
        hand_over(buffers, out)
        return HeadResult(
            weighed(x.row_weight, swept.losses),
            _statistics(swept, x.targets) if statistics else None,
        )

    def losses(self, x: HeadInput) -> Tensor:
        mode, labels = self._mode(x), Labels.of_head(x)
        if labels.padded is None:
            return self.tiled.losses(x)
        return self._sweep(x, labels, labels.padded, Gradients(None, None, None), mode).losses

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        mode, loss, labels = self._mode(x), softmax_loss(x), Labels.of_head(x)
        if labels.padded is None:
            return self.tiled.hvp(x, v, out)
        out = out.cleared()
        buffers = writable(out)
        slope = _slope(loss)
        bend = (
            cross_entropy_curvature
            if slope is kernel_rows.cross_entropy_weight
            else _curvature(loss)
        )
        features, weight = (  # the driver has no way to leave one out
            torch.zeros(like.shape, device=like.device) if buffer is None else buffer
            for buffer, like in ((buffers.features, x.features), (buffers.weight, x.weight))
        )
        # float16 has not the range of a direction; the driver takes float32 beside it.
        dtype = torch.float32 if x.weight.dtype == torch.float16 else x.weight.dtype
        with on_device(x.weight.device):
            softmax_hvp(
                x.features,
                x.weight,
                bias_of(x),
                labels.padded,
                x.row_weight.float(),
                slope,
                bend,
                loss.smoothing,
                d_features=v.features.to(dtype),
                d_weight=v.weight.to(dtype),
                d_bias=bias_of(v),
                out_features=features,
                out_weight=weight,
                out_bias=buffers.bias,
                chunk_rows=self._chunks.of(x, mode),
                mode=mode,
                segments=labels.segments,
            )
        hand_over(buffers, out)
        return None

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        mode, labels = self._mode(x), Labels.of_head(x)
        if labels.padded is None:
            return self.tiled.logit_gradient(x)
        return _Gradient(x, labels.padded, mode, self._chunks.of(x, mode), self.tiled)

    def plan(self, shape: HeadShape) -> HeadPlan:
        chunk, first, second = softmax_plan(
            shape.rows, shape.dim, shape.classes, shape.dtype, shape.device
        )
        # A recording holds what its step took, beside what the plain call before it took.
        kept = first if self._replayed(SOFTMAX_MODE[shape.dtype]) else 0
        flops = 6.0 * shape.rows * shape.classes * shape.dim
        return HeadPlan(chunk, first + kept, second, flops=flops, kept=kept)

    def _replayed(self, mode: str) -> bool:
        return mode in REPLAYED if self.replay is None else self.replay

    def _mode(self, x: HeadInput) -> str:
        return mode_of(self.mode, x, SOFTMAX_MODE)

    def _sweep(
        self, x: HeadInput, labels: Labels, padded: Tensor, out: Gradients, mode: str
    ) -> _Swept:
        """Run a driver, or its recording: losses of every row, gradients added into ``out``."""
        step = self._fp8_sweep if self.mode == FP8 else self._plain_sweep
        arguments = x, labels, padded, out, mode
        if not self._replayed(mode):
            return step(*arguments)
        with on_device(x.weight.device):
            return _Swept(*self.replays(lambda: step(*arguments), *_memory(*arguments)))

    def _plain_sweep(
        self, x: HeadInput, labels: Labels, padded: Tensor, out: Gradients, mode: str
    ) -> _Swept:
        loss = softmax_loss(x)
        options: dict[str, Any] = {
            "grad_features": out.features,
            "grad_weight": out.weight,
            "grad_bias": out.bias,
            "mode": mode,
            "need_features": out.features is not None,
            "need_weight": out.weight is not None,
            "segments": labels.segments,
            "fresh": out.fresh,
        }
        scale, value_fn = x.row_weight.float(), kernel_rows.cross_entropy_value
        arguments = (
            x.features,
            x.weight,
            bias_of(x),
            padded,
            scale,
            value_fn,
            _slope(loss),
            loss.smoothing,
        )
        with on_device(x.weight.device):
            chunk = self._chunks.of(x, mode, one_pass=x.features.shape[1] <= NARROW)
            if chunk == 0:
                result = one_pass_value_and_grad(*arguments, **options)
            else:
                result = softmax_value_and_grad(*arguments, **options, chunk_rows=chunk)
        losses, log_ratio = result.losses.double(), None
        if not loss.multi_label:
            log_ratio = result.log_ratio.double()
            if not loss.smoothing:
                losses = loss.value(
                    log_ratio, result.probability.double()
                )  # p ** gamma underflows float32 long before p does
        return _Swept(losses, log_ratio, result.off_target_mass, result.margin)

    def _fp8_sweep(
        self, x: HeadInput, labels: Labels, padded: Tensor, out: Gradients, mode: str
    ) -> _Swept:
        """The same with products in fp8; whatever else a sweep is asked for has no such mode, which
        is said.
        """
        loss = softmax_loss(x)
        if loss.smoothing or padded.shape[1] > 1 or x.weight.dtype != torch.bfloat16:
            raise InputError(
                "mode fp8 takes bfloat16 heads, one label a row, and no smoothing; choose another "
                "mode"
            )
        out = out.cleared()
        with on_device(x.weight.device):
            result, _ = fp8_value_and_grad(
                x.features,
                x.weight,
                bias_of(x),
                padded,
                x.row_weight.float(),
                kernel_rows.cross_entropy_value,
                _slope(loss),
                grad_features=out.features,
                grad_weight=out.weight,
                grad_bias=out.bias,
                segments=labels.segments,
                chunk_rows=max(self._chunks.of(x, mode), 1),
            )
        log_ratio = result.log_ratio.double()
        losses = loss.value(log_ratio, result.probability.double())
        return _Swept(losses, log_ratio, result.off_target_mass, result.margin)


class _Gradient:
    """The logit gradient by the kernels, 16 columns of a product at a time; wide products go to the
    tiled head.
    """

    def __init__(
        self, x: HeadInput, padded: Tensor, mode: str, chunk: int, tiled: TiledSoftmaxHead
    ) -> None:
        self.x, self.padded, self.mode, self.chunk, self.tiled = x, padded, mode, chunk, tiled

    @cached_property
    def _swept(self) -> Any:
        """The drivers' operator, which has swept the rows."""
        x, loss = self.x, softmax_loss(self.x)
        return logit_gradient(
            x.features,
            x.weight,
            bias_of(x),
            self.padded,
            x.row_weight.float(),
            _slope(loss),
            loss.smoothing,
            chunk_rows=self.chunk,
            mode=self.mode,
        )

    def times(self, right: Tensor) -> Tensor:
        if right.shape[1] > MAX_VECTORS:
            return self.tiled.logit_gradient(self.x).times(right)
        return self._by_columns(right, lambda part: self._swept.times(part))

    def transposed_times(self, left: Tensor) -> Tensor:
        if left.shape[1] > MAX_VECTORS:
            return self.tiled.logit_gradient(self.x).transposed_times(left)
        return self._by_columns(left, lambda part: self._swept.transposed_times(part))

    def _by_columns(self, matrix: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        with on_device(self.x.weight.device):
            return torch.cat([product(part) for part in _columns(matrix)], 1).to(matrix.dtype)


def _memory(
    x: HeadInput, labels: Labels, padded: Tensor, out: Gradients, mode: str
) -> tuple[tuple[Tensor | None, ...], Hashable]:
    """All that a sweep's launches read or write, and what else decides them."""
    parts = labels.segments
    of_labels = () if parts is None else (parts.order, parts.ordered, parts.starts)
    tensors = x.features, x.weight, x.bias, x.row_weight, padded, *of_labels
    who = who_multiplies(None, mode, x.features)  # which the process's settings change
    return (*tensors, out.features, out.weight, out.bias), (mode, x.loss, out.fresh, who)


def _columns(x: Tensor) -> Iterator[Tensor]:
    return (part.float() for part in torch.split(x, _VECTORS, 1))


def _slope(loss: SoftmaxLoss) -> kernel_rows.LossFunction:
    """g', by the driver's own name where it is 1: then nothing is multiplied."""
    return (
        kernel_rows.cross_entropy_weight if type(loss).weight is SoftmaxLoss.weight else loss.weight
    )


def _curvature(loss: SoftmaxLoss) -> kernel_rows.LossFunction:
    """g'' from p g''; 0 where p underflows, for it is multiplied by numbers as small as p."""

    def curvature(l: Tensor, p: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).tiny
        return torch.where(p > tiny, loss.bend(l, p) / p.clamp_min(tiny), torch.zeros_like(p))

    return curvature


def _statistics(swept: _Swept, targets: Targets) -> RowStatistics:
    """log s: log(s / T) for one target, where T = 1; for several log T is the rest of the loss, M
    (log1p(s / T) + log T).
    """
    mass = swept.mass.double()
    if swept.log_ratio is not None:
        log_mass, largest = mass.log(), swept.log_ratio
    else:
        largest = swept.losses / targets.sizes()
        log_mass = largest - torch.log1p(mass) + mass.log()
    return RowStatistics(swept.margin.double(), torch.where(mass.isfinite(), log_mass, largest))
