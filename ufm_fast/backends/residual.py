"""Squared error by its residuals E = H W' + b - Y, in blocks of rows: for few classes, and where no digit may be lost.

With weights o_r and D = diag(o):  fit = 1/2 sum_r o_r |E_r|^2,  grad_W = E'D H,  grad_H = D E W,  grad_b = E'o,  and a
direction changes E by  dE = dH W' + H dW' + 1 db'.  Everything runs in float64, whatever the dtype of the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput

_ENTRIES = 1 << 20  # of a block of E


def blocks(x: HeadInput, *, exact: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their E (float64), right to eps |h| |w|.

    ``exact``: right to eps |h| |w| 2^-18, for proofs about residuals as small as the rounding of the logits. H and W are cut
    into leading and trailing bits so that the product of the leading ones has no rounding (Ozaki et al., Numer. Algorithms
    59, 2012).
    """
    W, b, height = x.weight.double(), x.bias, _height(x.weight.shape[0])
    bits = _bits(W.shape[1])
    top, rest = _cut(W, bits) if exact else (W, W)
    for start in range(0, x.features.shape[0], height):
        part = slice(start, start + height)
        h, y = x.features[part].double(), x.targets.indices[part]
        if exact:
            high, low = _cut(h, bits)
            E, correction = high @ top.T, (high @ rest.T).addmm_(low, W.T)
        else:
            E, correction = h @ W.T, None
        E[torch.arange(E.shape[0], device=E.device), y] -= 1.0
        if b is not None:
            E += b.double()
        yield part, E if correction is None else E.add_(correction)


def own(x: HeadInput) -> Tensor:
    """The target's entry of each row of E, float64 (R,), as accurate as an exact block, in O(R d)."""
    bits, y = _bits(x.weight.shape[1]), x.targets.indices
    (high, low), W = _cut(x.features.double(), bits), x.weight.index_select(0, y).double()
    top, rest = _cut(W, bits)
    dot = torch.linalg.vecdot
    entry: Tensor = dot(high, top) - 1.0
    if x.bias is not None:
        entry += x.bias.double()[y]
    entry += dot(high, rest) + dot(low, W)
    return entry


def value_and_grad(x: HeadInput, out: Gradients) -> Tensor:
    """fit (float64 scalar); adds its gradients into ``out``."""
    W, o = x.weight.double(), x.row_weight.double()
    fit = torch.zeros((), dtype=torch.float64, device=W.device)
    for part, E in blocks(x):
        fit += 0.5 * (o[part] @ torch.linalg.vecdot(E, E))
        E *= o[part, None]
        _add_products(out, part, ((E, x.features[part].double(), W),))
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
        _add_products(out, part, ((dE, h, W), (E, dh, dW)))


def losses(x: HeadInput) -> Tensor:
    """1/2 |E_r|^2 of each row, float64 (R,)."""
    found = [0.5 * torch.linalg.vecdot(E, E) for _, E in blocks(x)]
    return torch.cat(found)


def _add_products(out: Gradients, part: slice, terms: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> None:
    """Sums of G'h and G w over terms (G, h, w), and the first term's G'1, in float64, into the buffers."""
    if out.weight is not None:
        out.weight.add_(sum(G.T @ h for G, h, _ in terms))
    if out.features is not None:
        out.features[part].add_(sum(G @ w for G, _, w in terms))
    if out.bias is not None:
        out.bias.add_(terms[0][0].sum(0))


def block_bytes(rows: int, classes: int) -> int:
    """Bytes of one block of E."""
    return 8 * classes * min(rows, _height(classes))


def _height(classes: int) -> int:
    return max(64, _ENTRIES // classes)


def _bits(dim: int) -> int:
    """Bits of each factor so that a sum of ``dim`` products has at most 53."""
    return (52 - dim.bit_length()) // 2


def _cut(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x = high + low with ``bits`` leading bits of each row's largest entry in ``high``."""
    largest = x.abs().amax(1, keepdim=True).clamp_min(1e-300)
    anchor = torch.exp2(torch.ceil(torch.log2(largest)) + (53 - bits))
    high = (x + anchor) - anchor
    return high, x - high
