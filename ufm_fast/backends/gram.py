"""Squared error without R x K arrays: Gram matrices, O((K + R) d^2), and residuals where they are the smaller of the two.

With weights o_r and D = diag(o), A = W'W, S = H'DH, C = sum_r o_r e_{y_r} h_r' (K x d), m = H'o, v_k = sum_{y_r = k} o_r:

    fit = 1/2 [<A, S> + 2 b'Wm + |o|_1 |b|^2 - 2 <W, C> - 2 v'b + |o|_1]
    grad_W = W S + b m' - C      grad_H = D (H A + 1 (W'b)' - W_y)      grad_b = W m + |o|_1 b - v

The value is a difference of O(1) terms: its absolute error is about eps. For d below the number of classes that have rows it
is harmless, for the minimum has what the missing dimensions leave, v_k / 2 each. Otherwise the minimum falls with lambda
and the digits would run out, so there the classes that have rows, P <= d of them, go by their residuals E = H W' + b - Y,
in blocks of rows and no more work than the Grams', fit = 1/2 sum_r o_r |E_r|^2; the classes without rows have no targets,
and their Grams nothing to cancel. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.targets import Targets

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


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, rows, _CHUNK))


def by_residuals(targets: Targets, classes: int, dim: int) -> Tensor | None:
    """Mask (K,) of the classes that have rows where they are at most d, so that they go by their residuals; else None."""
    present = torch.zeros(classes, dtype=torch.bool, device=targets.indices.device)
    present[targets.indices] = True
    return present if 0 < int(present.sum()) <= dim else None


def _near(x: HeadInput) -> Tensor | None:
    return by_residuals(x.targets, *x.weight.shape)


def value_and_grad(x: HeadInput, out: Gradients) -> Tensor:
    """Value (float64 scalar); adds gradients into ``out``. Beside them it holds d x d matrices and a block of rows."""
    near = _near(x)
    if near is None:
        return _by_grams(x, out)
    if bool(near.all()):
        return _by_residuals(x, out)
    total = x.row_weight.new_zeros((), dtype=torch.float64)
    for classes, evaluate in ((near, _by_residuals), (~near, _untargeted)):
        weight = None if out.weight is None else out.weight[classes]
        bias = None if out.bias is None else out.bias[classes]
        total = total + evaluate(_of_classes(x, classes), Gradients(out.features, weight, bias))
        for whole, part in ((out.weight, weight), (out.bias, bias)):
            if whole is not None and part is not None:
                whole[classes] = part
    return total


def _of_classes(x: HeadInput, classes: Tensor) -> HeadInput:
    """The same rows and only those classes (a mask); targets outside them are meaningless there."""
    slot = torch.cumsum(classes, 0) - 1
    bias = None if x.bias is None else x.bias[classes]
    return replace(x, targets=Targets(slot[x.targets.indices]), weight=x.weight[classes], bias=bias)


def residuals(x: HeadInput, *, exact: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their E = H W' + b - Y in float64, to eps |h| |w| absolutely.

    ``exact``: H and W are cut into leading and trailing bits so that the product of the leading ones has no rounding
    (Ozaki et al., Numer. Algorithms 59, 2012), and E is right to eps |h| |w| 2^-18: for proofs.
    """
    H, W, b = x.features, x.weight.double(), x.bias
    bits = _bits(W.shape[1])
    top, rest = _cut(W, bits) if exact else (W, W)
    for start in range(0, H.shape[0], _residual_chunk(W.shape[0])):
        part = slice(start, start + _residual_chunk(W.shape[0]))
        h, y = H[part].double(), x.targets.indices[part]
        if exact:
            high, low = _cut(h, bits)
            E, correction = high @ top.T, (high @ rest.T).addmm_(low, W.T)
        else:
            E, correction = h @ W.T, None
        E[torch.arange(E.shape[0], device=E.device), y] -= 1.0
        if b is not None:
            E += b.double()
        yield part, E if correction is None else E.add_(correction)


def _residual_chunk(classes: int) -> int:
    return max(64, (1 << 20) // classes)


def _bits(dim: int) -> int:
    """Bits of each factor so that a sum of ``dim`` products has at most 53."""
    return (52 - dim.bit_length()) // 2


def _cut(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x = high + low with ``bits`` leading bits of each row's largest entry in ``high``."""
    largest = x.abs().amax(1, keepdim=True).clamp_min(1e-300)
    anchor = torch.exp2(torch.ceil(torch.log2(largest)) + (53 - bits))
    high = (x + anchor) - anchor
    return high, x - high


def residual_sum(x: HeadInput) -> Tensor:
    """sum_r o_r E_r, float64 (K,), to the accuracy of exact residuals where those serve."""
    ones = torch.ones_like(x.row_weight)[:, None]
    product = logit_products(x, None, ones)[1]
    assert product is not None
    total, near = product[:, 0], _near(x)
    if near is not None:
        total[near] = sum(x.row_weight[part] @ E for part, E in residuals(_of_classes(x, near), exact=True))
    return total


def own_residual(x: HeadInput) -> Tensor:
    """The target's entry of each row of E, float64 (R,), as accurate as an exact residual."""
    bits, y = _bits(x.weight.shape[1]), x.targets.indices
    (high, low), W = _cut(x.features.double(), bits), x.weight.index_select(0, y).double()
    top, rest = _cut(W, bits)
    dot = torch.linalg.vecdot
    own: Tensor = dot(high, top) - 1.0
    if x.bias is not None:
        own += x.bias.double()[y]
    own += dot(high, rest) + dot(low, W)
    return own


def _by_residuals(x: HeadInput, out: Gradients) -> Tensor:
    W, o = x.weight.double(), x.row_weight.double()
    fit = torch.zeros((), dtype=torch.float64, device=W.device)
    for part, E in residuals(x):
        fit += 0.5 * (o[part] @ torch.linalg.vecdot(E, E))
        E *= o[part, None]
        if out.weight is not None:
            out.weight.add_((E.T @ x.features[part].double()).to(out.weight.dtype))
        if out.features is not None:
            out.features[part].add_((E @ W).to(out.features.dtype))
        if out.bias is not None:
            out.bias.add_(E.sum(0).to(out.bias.dtype))
    return fit


def _by_grams(x: HeadInput, out: Gradients, *, targets: bool = True) -> Tensor:
    """The formulas above; without ``targets`` those of classes that no row belongs to."""
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
        for part in _blocks(W.shape[0]):
            out.weight[part].addmm_(W[part], S.to(W.dtype))
    for part in _blocks(H.shape[0]):
        h = H[part]
        residual = h @ A_cast if out.features is not None else None
        if targets:
            own, weighted = W.index_select(0, y[part]), h * weight[part]
            fit = fit - (weighted * own).sum(dtype=torch.float64)
            if out.weight is not None:
                out.weight.index_add_(0, y[part], weighted, alpha=-1)
            if residual is not None:
                residual.sub_(own)
        if out.features is not None and residual is not None:
            if shift is not None:
                residual.add_(shift)
            out.features[part].addcmul_(residual, weight[part])
    if b is not None:
        m = (H.double() * o[:, None]).sum(0)
        Wm, bias = W.double() @ m, b.double()
        fit = fit + bias @ Wm + 0.5 * total * (bias @ bias)
        slope = Wm + total * bias
        if targets:
            v = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device).index_add_(0, y, o)
            fit, slope = fit - v @ bias, slope - v
        if out.weight is not None:
            out.weight.addr_(b, m.to(W.dtype))
        if out.bias is not None:
            out.bias.add_(slope.to(b.dtype))
    return fit


def _untargeted(x: HeadInput, out: Gradients) -> Tensor:
    return _by_grams(x, out, targets=False)


def hvp(x: HeadInput, v: HeadInput, out: Gradients) -> None:
    """Adds the Hessian product; dG = (dH W' + H dW' + 1 db') D, so grad_H' = dG W + G dW and grad_W' = dG' H + G' dH."""
    H, W, b, y = x.features, x.weight, x.bias, x.targets.indices
    dH, dW, db = v.features, v.weight, v.bias
    o = x.row_weight.double()
    cross = gram(W, other=dW)
    if out.features is not None:
        change = dH @ gram(W).to(H.dtype) + H @ (cross + cross.T).to(H.dtype) - dW.index_select(0, y)
        if b is not None and db is not None:
            change += db @ W + b @ dW
        out.features.addcmul_(change, x.row_weight[:, None].to(H.dtype))
    mixed = gram(H, o, dH)
    if out.weight is not None:
        out.weight.addmm_(dW, gram(H, o).to(W.dtype)).addmm_(W, (mixed + mixed.T).to(W.dtype))
        out.weight.index_add_(0, y, dH * x.row_weight[:, None].to(dH.dtype), alpha=-1)
    if b is not None and db is not None:
        m, dm = (H.double() * o[:, None]).sum(0), (dH.double() * o[:, None]).sum(0)
        if out.weight is not None:
            out.weight.addr_(db, m.to(W.dtype)).addr_(b, dm.to(W.dtype))
        if out.bias is not None:
            out.bias.add_((dW.double() @ m + W.double() @ dm + o.sum() * db.double()).to(b.dtype))


def logit_products(x: HeadInput, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """G right and G' left for G = D (H W' + 1 b' - Y), by low rank: no R x K array."""
    H, W, b, y = x.features, x.weight, x.bias, x.targets.indices
    o = x.row_weight[:, None].to(H.dtype)
    forward = backward = None
    if right is not None:
        forward = H @ (W.T @ right) - right.index_select(0, y)
        if b is not None:
            forward += b @ right
        forward *= o
    if left is not None:
        weighted = left * o
        backward = W @ (H.T @ weighted)
        backward.index_add_(0, y, weighted, alpha=-1)
        if b is not None:
            backward += torch.outer(b, weighted.sum(0))
    return forward, backward


def losses(x: HeadInput) -> Tensor:
    """1/2 |W h_r + b - e_y|^2 for each row, float64 (R,): by residuals or by the Gram form, as the value."""
    near = _near(x)
    if near is None:
        y = x.targets.indices
        own = torch.linalg.vecdot(x.features.double(), x.weight.index_select(0, y).double())
        squares: Tensor = _squares(x) - own + 0.5
        return squares if x.bias is None else squares - x.bias.double()[y]
    value = torch.cat([0.5 * torch.linalg.vecdot(E, E) for _, E in residuals(_of_classes(x, near))])
    return value if bool(near.all()) else value + _squares(_of_classes(x, ~near))


def _squares(x: HeadInput) -> Tensor:
    """1/2 |W h_r + b|^2 of each row."""
    H = x.features.double()
    value: Tensor = torch.linalg.vecdot(H @ gram(x.weight), H).mul_(0.5)
    if x.bias is not None:
        b = x.bias.double()
        value = value.add_(H @ (x.weight.double().T @ b)).add_(b @ b, alpha=0.5)
    return value
