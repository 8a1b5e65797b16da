"""Driver of mode fp8 on torch tensors: loss and gradients of a softmax head, chunk by chunk, with
the fall-back to bfloat16.

Whether a chunk falls back is a number on the device that kernels read: both ways are launched, and
one of them ends at once.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import fp8
from .head_checks import check, check_buffers
from .head_parts import add_targets, coefficients, column_sums, features_of, finish
from .launch import on_device
from .off_target import off_target
from .operands import MODES, logit_operands, operand, padded
from .products import add_finished, add_product
from .rows import (
    HeadResult,
    LossFunction,
    Rows,
    as_labels,
    cross_entropy_value,
    cross_entropy_weight,
)
from .segments import Segments, target_logits

BOUND = 2e-3  # of the root mean square of a chunk's error estimates


@torch.no_grad()
@on_device
def fp8_value_and_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    value_fn: LossFunction = cross_entropy_value,
    weight_fn: LossFunction = cross_entropy_weight,
    *,
    grad_features: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    chunk_rows: int = 4096,
    bound: float = BOUND,
    segments: Segments | None = None,
) -> tuple[HeadResult, Tensor]:
    """`head.softmax_value_and_grad` in mode fp8, and the estimate of every row's error in the
    products, fp32 (R,).

    Bfloat16 features and weight, one label a row, no smoothing; buffers are added to, and None
    costs no product. Chunks whose estimates have a root mean square above `bound` take bfloat16
    products.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a device other than sm_90.
    """
    mode, labels = MODES["bf16"], as_labels(targets)
    check(features, weight, labels, row_weight, 0.0, value_fn, chunk_rows, "triton", mode)
    need = grad_features is not None, grad_weight is not None
    check_buffers(features, weight, bias, grad_features, grad_weight, grad_bias, *need)
    if labels.shape[1] != 1 or {features.dtype, weight.dtype} != {torch.bfloat16}:
        raise ValueError("mode fp8: takes one label a row, and bfloat16 features and weight")
    H, W = logit_operands(features, weight, mode)
    z = target_logits(features_of(features, H, mode), features_of(weight, W, mode), bias, labels)
    every, columns = Rows.of(z, labels, row_weight), column_sums(grad_bias)
    room = Room(min(chunk_rows, len(H)), len(W), H.device)
    level = H.float() @ W.float().mean(0)
    level = level if bias is None else level + bias.float().mean()
    turned, errors = quantised(W[:, : features.shape[1]]), []
    for start in range(0, len(H), chunk_rows):
        part = slice(start, start + chunk_rows)
        rows, chunk = every.part(part), room.part(len(H[part]))
        sweep = partial(
            fp8.exponentials,
            H[part],
            W,
            bias,
            rows.offset,
            rows.mean,
            level[part],
            rows.labels,
            *chunk[:4],
        )
        statistics = rows.settle(sweep, weight_fn)
        errors.append(estimates(statistics[3], rows.mass))
        flag = (errors[-1].square().mean() > bound**2).int()
        factors = factors_of(rows, statistics, flag, H[part], W, bias, chunk.wide)
        if grad_features is not None:
            add_features(grad_features[part], chunk, rows, turned, W, factors[0], flag)
        lift = (rows.mean - level[part]).clamp(-80.0, 80.0).exp()
        lift = torch.where((flag == 0) & (rows.offset == rows.mean), lift, 1.0)
        if grad_weight is not None:
            add_weight(
                grad_weight, chunk, features[part].float() * (factors[1] / lift)[:, None], flag
            )
        if columns is not None:
            sums = torch.zeros((len(W), 16), device=W.device)
            add_weight(sums, chunk, (factors[1] / lift)[:, None].expand(-1, 16), flag)
            columns += sums[:, 0]
    add_targets(features, labels, every.own, every.own, grad_weight, columns, segments, len(W))
    if grad_bias is not None:
        grad_bias += columns
    return finish(every.result(value_fn), 0.0, z, None), torch.cat(errors)


class Chunk(NamedTuple):
    """E (rows, width) and its transpose (classes, height) in e4m3, the scales of each, and E in
    bfloat16 in their place.
    """

    E: Tensor
    T: Tensor
    scale: Tensor
    scale_t: Tensor
    wide: Tensor


class Room:
    """Memory of a chunk: E, its transpose and their scales, and in the place of both E in
    bfloat16.
    """

    def __init__(self, rows: int, classes: int, device: torch.device) -> None:
        width, height = padded(classes, fp8.TERMS), padded(rows, fp8.TERMS)
        self.classes, self.width = classes, width
        self.bytes = torch.empty(
            max(rows * width + classes * height, 2 * rows * width), dtype=torch.uint8, device=device
        )
        self.scale = torch.empty(width // fp8.TERMS * rows, device=device)
        self.scale_t = torch.empty(height // fp8.TERMS * classes, device=device)

    def part(self, rows: int) -> Chunk:
        """Views for so many rows."""
        size, height = rows * self.width, padded(rows, fp8.TERMS)
        E, rest = self.bytes[:size], self.bytes[size : size + self.classes * height]
        wide = self.bytes[: 2 * size].view(torch.bfloat16).view(rows, self.width)
        scale = self.scale[: self.width // fp8.TERMS * rows]
        scale_t = self.scale_t[: height // fp8.TERMS * self.classes]
        kind = torch.float8_e4m3fn
        return Chunk(
            E.view(kind).view(rows, -1),
            rest.view(kind).view(self.classes, -1),
            scale,
            scale_t,
            wide,
        )


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (depth, columns) turned, in e4m3 (columns, depth padded), and its scales (depth / 128,
    columns).
    """
    turned = torch.nn.functional.pad(x.T.float(), (0, -len(x) % fp8.TERMS)).unflatten(
        1, (-1, fp8.TERMS)
    )
    top = turned.abs().amax(2)
    scale = torch.where(top > 0, top / fp8.LARGEST.value, 1.0)
    return (turned / scale[:, :, None]).to(torch.float8_e4m3fn).flatten(1), scale.T.contiguous()


def estimates(squares: Tensor, mass: Tensor) -> Tensor:
    """ERROR sqrt(sum E^2) / sum E of every row; 0 where nothing is off the target."""
    return torch.where(mass > 0, fp8.ERROR * squares.double().sum(0).sqrt() / mass, 0.0).float()


def factors_of(rows, statistics, flag, H, W, bias, wide):
    """The factors of E for dH and for dW, each by the sum of E as that product reads it; bfloat16 E
    is made if flag is 1.
    """
    again = off_target(
        H, W, bias, rows.offset, rows.labels, wide, passes=1, classes=len(W), flag=flag
    )
    whole = rows.factor * torch.where(rows.mass > 0, rows.kept / rows.mass, 1.0)

    def rescaled(kept):
        kept = torch.where(flag == 1, again[1].double().sum(0), kept)
        return (whole * torch.where(kept > 0, rows.mass / kept, 1.0)).float()

    return rescaled(rows.kept.double()), rescaled(statistics[4].double().sum(0))


def add_features(out, chunk, rows, turned, W, factor, flag):
    """out += factor * (E W) less the target terms."""
    product = torch.zeros_like(out)
    fp8.product(product, chunk.E, turned[0], chunk.scale, turned[1], flag, add=False)
    add_product(product, chunk.wide, W, passes=1, depth=len(W), flag=flag)
    add_finished(out, product, factor, coefficients(rows, 0.0), rows.labels, W)


def add_weight(out, chunk, X, flag):
    """out += E' X."""
    turned, scale = quantised(X)
    fp8.product(out, chunk.T, turned, chunk.scale_t, scale, flag, add=True)
    add_product(
        out,
        chunk.wide,
        operand(X.contiguous(), torch.bfloat16, 1),
        passes=1,
        depth=len(X),
        transposed=True,
        flag=flag,
    )
