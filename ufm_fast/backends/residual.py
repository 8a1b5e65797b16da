"""Squared error by its residuals E = H W' + b - Y, in blocks of rows: for few classes, for target
vectors, and where no digit may be lost.

With weights o_r and D = diag(o):  fit = 1/2 sum_r o_r |E_r|^2,  grad_W = E'D H,  grad_H = D E W,
grad_b = E'o,  and a direction changes E by  dE = dH W' + H dW' + 1 db'.  Everything runs in
float64, whatever the dtype of the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.dense_targets import DenseTargets

_ENTRIES = 1 << 20  # of a block of E, and of its rows of H
_CHUNK = 1 << 13  # rows of own's blocks


def blocks(x: HeadInput, *, exact: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their E (float64), to the rounding of the logits.

    ``exact``: to about 2^-bits of that, bits = 26 - log2(d)/2, and eps |E|, for proofs about
    residuals as small as the rounding of the logits. H and W are cut into leading and trailing bits
    so that the product of the leading ones has no rounding (Ozaki et al., Numer. Algorithms 59,
    2012); the bias is added with its error kept.
    """
    W, b, height = (
        x.weight.double(),
        None if x.bias is None else x.bias.double(),
        block_rows(*x.weight.shape),
    )
    bits = _bits(W.shape[1])
    top, rest = _cut(W, bits) if exact else (W, W)
    for start in range(0, x.features.shape[0], height):
        part = slice(start, start + height)
        h = x.features[part].double()
        if exact:
            high, low = _cut(h, bits)
            E, correction = high @ top.T, (high @ rest.T).addmm_(low, W.T)
        else:
            E, correction = h @ W.T, None
        E = _less_targets(E, x, part, correction)
        if b is not None:
            E = E.add_(b) if correction is None else _plus(E, b, correction)
        yield part, E if correction is None else E.add_(correction)


def _less_targets(E: Tensor, x: HeadInput, part: slice, error: Tensor | None) -> Tensor:
    """E - Y of a block, its rounding error added to ``error`` if there is one: next to a target of
    one there is none.
    """
    if isinstance(x.targets, DenseTargets):
        Y = x.targets.values[part]
        return E.sub_(Y) if error is None else _plus(E, -Y, error)
    E[torch.arange(E.shape[0], device=E.device), x.targets.indices[part]] -= 1.0
    return E


def along_vectors(x: HeadInput, values: Tensor, shift: Tensor) -> Tensor:
    """sum_r o_r <E_r - shift, y_r> of target vectors y_r, float64, as accurate as exact
    ``blocks``.
    """
    total, o = torch.zeros((), dtype=torch.float64, device=values.device), x.row_weight.double()
    for part, E in blocks(x, exact=True):
        total += o[part] @ torch.linalg.vecdot(E - shift, values[part])
    return total


class ResidualGradient:
    """G = D E as an operator, by blocks of rows."""

    def __init__(self, x: HeadInput) -> None:
        self.x = x

    def times(self, right: Tensor) -> Tensor:
        """G right."""
        products = ((G @ right.double()).to(right.dtype) for _, G in self._blocks())
        return torch.cat([right[:0], *products])

    def transposed_times(self, left: Tensor) -> Tensor:
        """G' left."""
        total = torch.zeros(
            self.x.weight.shape[0], left.shape[1], dtype=torch.float64, device=left.device
        )
        for part, G in self._blocks():
            total.addmm_(G.T, left[part].double())
        return total.to(left.dtype)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for part, E in blocks(self.x):
            yield part, E.mul_(self.x.row_weight[part, None].double())


def own(x: HeadInput, *, exact: bool = False) -> Tensor:
    """The target's entry of each row of E, float64 (R,), as accurate as that of ``blocks``, in O(R
    d).
    """
    bits, dot, entries = _bits(x.weight.shape[1]), torch.linalg.vecdot, []
    for rows, y in zip(
        torch.split(x.features, _CHUNK), torch.split(x.targets.indices, _CHUNK), strict=True
    ):
        h, w, correction = rows.double(), x.weight.index_select(0, y).double(), None
        if exact:
            (high, low), (top, rest) = _cut(h, bits), _cut(w, bits)
            entry, correction = dot(high, top) - 1.0, dot(high, rest) + dot(low, w)
        else:
            entry = dot(h, w) - 1.0
        if x.bias is not None:
            b = x.bias.double()[y]
            entry = entry + b if correction is None else _plus(entry, b, correction)
        entries.append(entry if correction is None else entry + correction)
    return torch.cat(entries) if entries else x.row_weight.new_zeros(0, dtype=torch.float64)


def _plus(x: Tensor, b: Tensor, error: Tensor) -> Tensor:
    """x + b, its rounding error added to ``error`` (Knuth's two-sum)."""
    total = x + b
    back = total - x
    error += (x - (total - back)) + (b - back)
    return total


def value_and_grad(x: HeadInput, out: Gradients) -> Tensor:
    """fit (float64 scalar); adds its gradients into ``out``."""
    W, o = x.weight.double(), x.row_weight.double()
    fit = torch.zeros((), dtype=torch.float64, device=W.device)
    for part, E in blocks(x):
        fit += 0.5 * (o[part] @ torch.linalg.vecdot(E, E))
        E *= o[part, None]
        add_products(out, part, ((E, x.features[part].double(), W),))
    return fit


def hvp(x: HeadInput, v: HeadInput, out: Gradients) -> None:
    """Adds the Hessian of fit times v."""
    W, dW, o = x.weight.double(), v.weight.double(), x.row_weight.double()
    for part, E in blocks(x):
        h, dh = x.features[part].double(), v.features[part].double()
        dE = (dh @ W.T).addmm_(h, dW.T)
        if v.bias is not None:
            dE += v.bias.double()
        E *= o[part, None]
        dE *= o[part, None]
        add_products(out, part, ((dE, h, W), (E, dh, dW)))


def losses(x: HeadInput) -> Tensor:
    """1/2 |E_r|^2 of each row, float64 (R,)."""
    none = x.row_weight.new_zeros(0, dtype=torch.float64)  # a rank may have no rows
    return torch.cat([none, *(0.5 * torch.linalg.vecdot(E, E) for _, E in blocks(x))])


def add_products(
    out: Gradients, part: slice, terms: tuple[tuple[Tensor, Tensor, Tensor], ...]
) -> None:
    """Sums of G'h and G w over terms (G, h, w), and the first term's G'1, in float64, into the
    buffers.
    """
    if out.weight is not None:
        out.weight.add_(sum(G.T @ h for G, h, _ in terms))
    if out.features is not None:
        out.features[part].add_(sum(G @ w for G, _, w in terms))
    if out.bias is not None:
        out.bias.add_(terms[0][0].sum(0))


def block_bytes(rows: int, classes: int, dim: int) -> int:
    """Bytes of one block of E and of its rows of H."""
    return 8 * (classes + dim) * min(rows, block_rows(classes, dim))


def block_rows(classes: int, dim: int) -> int:
    """Rows of a block of E."""
    return max(64, _ENTRIES // max(classes, dim))


def _bits(dim: int) -> int:
    """Bits of each factor so that a sum of ``dim`` products has at most 53."""
    return (52 - dim.bit_length()) // 2


def _cut(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x = high + low with ``bits`` leading bits of each row's largest entry in ``high``."""
    largest = x.abs().amax(1, keepdim=True).clamp_min(1e-300)
    anchor = torch.exp2(torch.ceil(torch.log2(largest)) + (53 - bits))
    high = (x + anchor) - anchor
    return high, x - high
