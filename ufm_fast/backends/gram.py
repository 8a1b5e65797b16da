"""Squared error by Gram matrices: no R x K work at all, O((K + R) d^2) for value, gradients and
Hessian products.

With weights o_r and D = diag(o), A = W'W, S = H'DH, C = sum_r o_r e_{y_r} h_r' (K x d), m = H'o,
v_k = sum_{y_r = k} o_r:

    fit = 1/2 [<A, S> + 2 b'Wm + |o|_1 |b|^2 - 2 <W, C> - 2 v'b + |o|_1]
    grad_W = W S + b m' - C      grad_H = D (H A + 1 (W'b)' - W_y)      grad_b = W m + |o|_1 b - v

The value is a difference of O(1) terms: its absolute error is about eps, so the Grams are formed in
float64. Without ``targets`` (Y = 0: classes that no row belongs to) nothing cancels.

A `Home` says where rows and classes are: on several ranks (`exchange`) its totals are over them,
and a function returns this rank's part of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.home import Home
from ufm_fast.backends.sums import weighted_sum

_CHUNK = 1 << 13  # rows: a block and its float64 copy stay in the cache


def gram(x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """sum_r weight_r x_r other_r' (d x d), in float64 by chunks of rows: a million rows need no
    float64 copy.
    """
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


def value_and_grad(
    x: HeadInput, out: Gradients, *, targets: bool = True, home: Home | None = None
) -> Tensor:
    """Value (float64 scalar); adds gradients into ``out``. Beside them it holds d x d matrices and
    a block of rows.
    """
    H, W, b, home = x.features, x.weight, x.bias, home or Home(x.targets.indices)
    o = x.row_weight.double()
    total = home.total(o.sum())
    A, S = home.total(gram(W)), home.total(_weighted_gram(H, o))
    fit = home.once(0.5 * (A * S).sum())
    if targets:
        fit = fit + home.once(0.5 * total)
    shift = None if b is None else home.total(b @ W)
    of_targets = home.rows(W) if targets else None
    weight, A_cast = o.to(H.dtype)[:, None], A.to(H.dtype)
    if out.weight is not None:
        for part in row_blocks(W.shape[0]):
            out.weight[part].addmm_(W[part], S.to(W.dtype))
    for part in row_blocks(H.shape[0]):
        h, own = H[part], None if of_targets is None else of_targets(part)
        if own is not None:
            weighted = h * weight[part]
            fit = fit - (weighted * own).sum(dtype=torch.float64)
            if out.weight is not None:
                home.add(out.weight, part, h, -o[part])
        if out.features is not None:
            residual = h @ A_cast
            if own is not None:
                residual.sub_(own)
            if shift is not None:
                residual.add_(shift)
            out.features[part].addcmul_(residual, weight[part])
    if targets and out.weight is not None:
        home.settle(out.weight)
    if b is not None:
        m = home.total(weighted_sum(H, o))
        Wm, bias = W.double() @ m, b.double()
        slope = Wm + total * bias
        fit = fit + bias @ Wm + 0.5 * total * (bias @ bias)
        if targets:
            v = home.totals(W.shape[0], o)
            fit, slope = fit - v @ bias, slope - v
        if out.weight is not None:
            out.weight.addr_(b, m.to(W.dtype))
        if out.bias is not None:
            out.bias.add_(slope.to(b.dtype))
    return fit


def hvp(
    x: HeadInput, v: HeadInput, out: Gradients, *, targets: bool = True, home: Home | None = None
) -> None:
    """Adds the Hessian product; dG = (dH W' + H dW' + 1 db') D, so grad_H' = dG W + G dW and
    grad_W' = dG' H + G' dH.
    """
    H, W, b, home = x.features, x.weight, x.bias, home or Home(x.targets.indices)
    dH, dW, db = v.features, v.weight, v.bias
    o = x.row_weight.double()
    cross = home.total(gram(W, other=dW))
    if out.features is not None:
        change = dH @ home.total(gram(W)).to(H.dtype) + H @ (cross + cross.T).to(H.dtype)
        if targets:
            change -= home.rows(dW)(slice(None))
        if b is not None and db is not None:
            change += home.total(db @ W + b @ dW)
        out.features.addcmul_(change, x.row_weight[:, None].to(H.dtype))
    mixed = home.total(gram(H, o, dH))
    if out.weight is not None:
        out.weight.addmm_(dW, home.total(gram(H, o)).to(W.dtype)).addmm_(
            W, (mixed + mixed.T).to(W.dtype)
        )
        if targets:
            for part in row_blocks(H.shape[0]):
                home.add(out.weight, part, dH[part], -o[part])
            home.settle(out.weight)
    if b is not None and db is not None:
        m, dm = home.total(weighted_sum(H, o)), home.total(weighted_sum(dH, o))
        if out.weight is not None:
            out.weight.addr_(db, m.to(W.dtype)).addr_(b, dm.to(W.dtype))
        if out.bias is not None:
            out.bias.add_(
                (dW.double() @ m + W.double() @ dm + home.total(o.sum()) * db.double()).to(b.dtype)
            )


class GramGradient:
    """G = D (H W' + 1 b' - Y) as an operator of low rank: no R x K array."""

    def __init__(self, x: HeadInput, home: Home | None = None) -> None:
        self.x, self.weight, self.home = x, x.row_weight.double(), home or Home(x.targets.indices)

    def times(self, right: Tensor) -> Tensor:
        """G right."""
        x, home = self.x, self.home
        product = x.features @ home.total(x.weight.T @ right) - home.rows(right)(slice(None))
        if x.bias is not None:
            product += home.total(x.bias @ right)
        return product.mul_(self.weight[:, None].to(x.features.dtype))

    def transposed_times(self, left: Tensor) -> Tensor:
        """G' left."""
        x, home = self.x, self.home
        product = x.weight @ home.total(gram(x.features, self.weight, left)).to(x.weight.dtype)
        for part in row_blocks(x.features.shape[0]):
            home.add(product, part, left[part], -self.weight[part])
        home.settle(product)
        if x.bias is not None:
            product += torch.outer(
                x.bias, home.total(weighted_sum(left, self.weight)).to(x.bias.dtype)
            )
        return product


def losses(x: HeadInput, *, targets: bool = True, home: Home | None = None) -> Tensor:
    """1/2 |W h_r + b - e_y|^2 for each row, float64 (R,), by the Gram form."""
    H, W, home = x.features.double(), x.weight.double(), home or Home(x.targets.indices)
    value: Tensor = torch.linalg.vecdot(H @ home.total(gram(W)), H).mul_(0.5)
    if x.bias is not None:
        b = x.bias.double()
        value += H @ home.total(W.T @ b) + 0.5 * home.total(b @ b)
        if targets:
            value -= home.rows(b)(slice(None))
    if targets:
        value += 0.5 - torch.linalg.vecdot(H, home.rows(W)(slice(None)))
    return value
