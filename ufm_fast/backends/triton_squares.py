"""The squared-error head by the kernels of ufm_kernels."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ufm_fast.backends.base import (
    Gradients,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
)
from ufm_fast.backends.squared_error import by_residuals
from ufm_fast.backends.squared_head import SquaredErrorHead, room
from ufm_fast.backends.triton_buffers import bias_of, hand_over, mode_of, on_device, writable
from ufm_fast.backends.triton_labels import Labels
from ufm_fast.backends.triton_memory import SQUARED_MODE, squared_workspace
from ufm_kernels.squared_head import squared_error_value_and_grad


class TritonSquaredErrorHead(SquaredErrorHead):
    """Squared error: values and gradients by the kernels where Grams serve; the rest on any
    device.
    """

    def __init__(self, mode: str | None) -> None:
        self.mode = mode

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        mode = self._mode(x)
        # The driver's value is a difference of Grams.
        if (
            by_residuals(x.targets, *x.weight.shape, bias=x.bias is not None)
            or x.features.shape[0] == 0
        ):
            return super().value_and_grad(x, out)
        out = out.cleared()
        buffers = writable(out)
        with on_device(x.weight.device):
            value = squared_error_value_and_grad(
                x.features,
                x.weight,
                bias_of(x),
                x.targets.indices,
                x.row_weight.float(),
                grad_features=buffers.features,
                grad_weight=buffers.weight,
                grad_bias=buffers.bias,
                mode=mode,
                need_features=buffers.features is not None,
                need_weight=buffers.weight is not None,
                segments=Labels.of_head(x).segments,
            )
        hand_over(buffers, out)
        return HeadResult(value, None)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        self._mode(x)
        super().hvp(x, v, out)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        self._mode(x)
        return super().logit_gradient(x)

    def losses(self, x: HeadInput) -> Tensor:
        self._mode(x)
        return super().losses(x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        usual = super().plan(shape)
        if shape.dense or shape.occupied <= room(shape):
            return usual
        return replace(
            usual, workspace=squared_workspace(shape.rows, shape.dim, shape.classes, shape.dtype)
        )

    def _mode(self, x: HeadInput) -> str:
        return mode_of(self.mode, x, SQUARED_MODE)
