"""The squared error as a head: its functions (`squared_error`) behind the interface, and what they
take.
"""

from __future__ import annotations

from torch import Tensor

from ufm_fast.backends import squared_error
from ufm_fast.backends.base import (
    Gradients,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    in_sums_dtype,
)
from ufm_fast.backends.gram import GramGradient
from ufm_fast.backends.residual import ResidualGradient, block_bytes
from ufm_fast.dense_targets import DenseTargets


class SquaredErrorHead:
    """By Gram matrices or residuals, whichever keeps the digits: no R x K work, but to target
    vectors, which are as many numbers. On any torch device.
    """

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        return HeadResult(squared_error.value_and_grad(in_sums_dtype(x), out.cleared()), None)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        squared_error.hvp(in_sums_dtype(x), in_sums_dtype(v), out.cleared())

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        dense = isinstance(x.targets, DenseTargets)
        return ResidualGradient(in_sums_dtype(x)) if dense else GramGradient(in_sums_dtype(x))

    def losses(self, x: HeadInput) -> Tensor:
        return squared_error.losses(x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        # Beside it: features in units of their logits, and for a Hessian product those of the
        # direction and its products.
        work, second = (
            workspace(shape) + copies * shape.rows * shape.dim * shape.itemsize for copies in (1, 3)
        )
        return HeadPlan(shape.rows, work, second, flops(shape))


def room(shape: HeadShape) -> int:
    """Rows and classes up to which residuals serve: d, and one for a bias."""
    return shape.dim + shape.bias


def flops(shape: HeadShape) -> float:
    """Floating-point operations of an evaluation."""
    R, K, d, P, most = shape.rows, shape.classes, shape.dim, shape.occupied, room(shape)
    if shape.dense:
        return 6.0 * R * K * d
    grams = 8.0 * (R + K) * d * d
    if most < P:
        return grams
    rows = (
        R if most >= R else P
    )  # residuals: of the rows, or of the class means beside Grams of the deviations from them
    return 6.0 * rows * (K if most >= K else P) * d + (grams if most < K or most < R else 0.0)


def workspace(shape: HeadShape) -> int:
    """Bytes that any device needs: Gram matrices, or blocks of residuals and float64 copies."""
    R, K, d, P, item, most = (
        shape.rows,
        shape.classes,
        shape.dim,
        shape.occupied,
        shape.itemsize,
        room(shape),
    )
    if shape.dense:  # the targets themselves too
        return 3 * block_bytes(R, K, d) + 8 * R * K + (0 if item == 8 else 16 * K * d)
    grams = 4 * d * d * 8 + R * d * item
    if most < P:
        return grams
    few, rows = K if most >= K else P, R if most >= R else P
    return (
        3 * block_bytes(rows, few, d)
        + (0 if item == 8 else 16 * few * d)
        + (grams if few < K or most < R else 0)
    )
