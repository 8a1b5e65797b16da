"""Squared error by Gram matrices: no R x K work at all, O((K + R) d^2) for value, gradients and Hessian products.

With weights o_r and D = diag(o), A = W'W, S = H'DH, C = sum_r o_r e_{y_r} h_r' (K x d), m = H'o, v_k = sum_{y_r = k} o_r:

    fit = 1/2 [<A, S> + 2 b'Wm + |o|_1 |b|^2 - 2 <W, C> - 2 v'b + |o|_1]
    grad_W = W S + b m' - C      grad_H = D (H A + 1 (W'b)' - W_y)      grad_b = W m + |o|_1 b - v

The value is a difference of O(1) terms: its absolute error is about eps, so the Grams are formed in float64. Without
``targets`` (Y = 0: classes that no row belongs to) nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.sums import add_class_sums, class_totals, weighted_sum

_CHUNK = 1 << 13  # rows: a block and its float64 copy stay in the cache


def gram(x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """sum_r weight_r x_r other_r' (d x d), in float64 by chunks of rows: a million rows need no float64 copy."""
    y = x if other is None else other
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], _CHUNK):
        left = x[start : start + _CHUNK].double()
        right = left if other is None else y[start : start + _CHUNK].double()
        if weight is not None:
            right = right * weight[start : start + _CHUNK, None].double()
        total.addmm_(left.T, right)
    return total


def _weighted_gram(H: Tensor, o: Tensor) -> Tensor:
    """H' diag(o) H; equal weights, the usual case, come out of the sum."""
    if o.numel() and bool((o == o[0]).all()):
        return gram(H) * o[0]
    return gram(H, o)


def row_blocks(rows: int) -> Iterator[slice]:
    """Slices of rows whose float64 copies stay in the cache."""
    return (slice(start, start + _CHUNK) for start in range(0, rows, _CHUNK))


def value_and_grad(x: HeadInput, out: Gradients, *, targets: bool = True) -> Tensor:
    """Value (float64 scalar); adds gradients into ``out``. Beside them it holds d x d matrices and a block of rows."""
    H, W, b, y = x.features, x.weight, x.bias, x.targets.indices
    o = x.row_weight.double()
    total = o.sum()
    A, S = gram(W), _weighted_gram(H, o)
    fit = 0.5 * (A * S).sum()
    if targets:
        fit = fit + 0.5 * total
    shift = None if b is None else b @ W
    weight, A_cast = o.to(H.dtype)[:, None], A.to(H.dtype)
    if out.weight is not None:
        for part in row_blocks(W.shape[0]):
            out.weight[part].addmm_(W[part], S.to(W.dtype))
    for part in row_blocks(H.shape[0]):
        h, own = H[part], W.index_select(0, y[part]) if targets else None
        if own is not None:
            weighted = h * weight[part]
            fit = fit - (weighted * own).sum(dtype=torch.float64)
            if out.weight is not None:
                add_class_sums(out.weight, y[part], h, -o[part])
        if out.features is not None:
            residual = h @ A_cast
            if own is not None:
                residual.sub_(own)
            if shift is not None:
                residual.add_(shift)
            out.features[part].addcmul_(residual, weight[part])
    if b is not None:
        m = weighted_sum(H, o)
        Wm, bias = W.double() @ m, b.double()
        slope = Wm + total * bias
        fit = fit + bias @ Wm + 0.5 * total * (bias @ bias)
        if targets:
            v = class_totals(W.shape[0], y, o)
            fit, slope = fit - v @ bias, slope - v
        if out.weight is not None:
            out.weight.addr_(b, m.to(W.dtype))
        if out.bias is not None:
            out.bias.add_(slope.to(b.dtype))
    return fit


def hvp(x: HeadInput, v: HeadInput, out: Gradients, *, targets: bool = True) -> None:
    """Adds the Hessian product; dG = (dH W' + H dW' + 1 db') D, so grad_H' = dG W + G dW and grad_W' = dG' H + G' dH."""
    H, W, b, y = x.features, x.weight, x.bias, x.targets.indices
    dH, dW, db = v.features, v.weight, v.bias
    o = x.row_weight.double()
    cross = gram(W, other=dW)
    if out.features is not None:
        change = dH @ gram(W).to(H.dtype) + H @ (cross + cross.T).to(H.dtype)
        if targets:
            change -= dW.index_select(0, y)
        if b is not None and db is not None:
            change += db @ W + b @ dW
        out.features.addcmul_(change, x.row_weight[:, None].to(H.dtype))
    mixed = gram(H, o, dH)
    if out.weight is not None:
        out.weight.addmm_(dW, gram(H, o).to(W.dtype)).addmm_(W, (mixed + mixed.T).to(W.dtype))
        if targets:
            for part in row_blocks(H.shape[0]):
                add_class_sums(out.weight, y[part], dH[part], -o[part])
    if b is not None and db is not None:
        m, dm = weighted_sum(H, o), weighted_sum(dH, o)
        if out.weight is not None:
            out.weight.addr_(db, m.to(W.dtype)).addr_(b, dm.to(W.dtype))
        if out.bias is not None:
            out.bias.add_((dW.double() @ m + W.double() @ dm + o.sum() * db.double()).to(b.dtype))


class GramGradient:
    """G = D (H W' + 1 b' - Y) as an operator of low rank: no R x K array."""

    def __init__(self, x: HeadInput) -> None:
        self.x, self.weight = x, x.row_weight.double()

    def times(self, right: Tensor) -> Tensor:
        """G right."""
        x = self.x
        product = x.features @ (x.weight.T @ right) - right.index_select(0, x.targets.indices)
        if x.bias is not None:
            product += x.bias @ right
        return product.mul_(self.weight[:, None].to(x.features.dtype))

    def transposed_times(self, left: Tensor) -> Tensor:
        """G' left."""
        x, y = self.x, self.x.targets.indices
        product = x.weight @ gram(x.features, self.weight, left).to(x.weight.dtype)
        for part in row_blocks(x.features.shape[0]):
            add_class_sums(product, y[part], left[part], -self.weight[part])
        if x.bias is not None:
            product += torch.outer(x.bias, weighted_sum(left, self.weight).to(x.bias.dtype))
        return product


def losses(x: HeadInput, *, targets: bool = True) -> Tensor:
    """1/2 |W h_r + b - e_y|^2 for each row, float64 (R,), by the Gram form."""
    H, W, y = x.features.double(), x.weight.double(), x.targets.indices
    value: Tensor = torch.linalg.vecdot(H @ gram(W), H).mul_(0.5)
    if x.bias is not None:
        b = x.bias.double()
        value += H @ (W.T @ b) + 0.5 * b @ b
        if targets:
            value -= b[y]
    if targets:
        value += 0.5 - torch.linalg.vecdot(H, W.index_select(0, y))
    return value
