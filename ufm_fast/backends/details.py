"""What else a chunk of exponentials tells of its rows while it is there: entropy, largest class,
rank of the target.

With p_k = (p / s') E_k off the target, p = 1 - p_y and l = -log p_y, all of one label a row:

    entropy = (1 - p) l - p log p + p (log s' - sum_k E_k log E_k / s')
    every term >= 0
    its gradient in the logits: -p_k (log p_k + entropy), at the target -(1 - p) (entropy - l)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput, compute_dtype
from ufm_fast.backends.sums import add_product
from ufm_fast.backends.sweep import Chunk
from ufm_fast.backends.tiled import TiledSoftmaxHead

_BLOCK = 4096  # classes at a time where an elementwise product is summed


class RowDetails(NamedTuple):
    """One entry a row: l = -log p_y and the entropy in nats, float64; the largest class and how
    many lie above the target.
    """

    log_loss: Tensor
    entropy: Tensor
    argmax: Tensor
    rank: Tensor


def head_with_details(
    head: TiledSoftmaxHead, x: HeadInput, out: Gradients
) -> tuple[Tensor, RowDetails]:
    """``head.value_and_grad`` and the details of its rows, from one sweep. Only single labels."""
    found: list[RowDetails] = []
    value = head.value_and_grad(
        x, out, statistics=True, visit=lambda c: found.append(details(c))
    ).value
    empty = value.new_zeros(0), value.new_zeros(0, dtype=torch.int64)
    start = RowDetails(empty[0], empty[0], empty[1], empty[1])
    return value, RowDetails(*(torch.cat(column) for column in zip(start, *found, strict=True)))


def details(c: Chunk) -> RowDetails:
    """Of the rows of a chunk whose E is still what it was. Ties go to the target."""
    assert c.margin is not None
    first = c.margin >= 0
    own = torch.exp(c.mass.log() - c.log_mass) * (
        1.0 + 8.0 * torch.finfo(c.E.dtype).eps
    )  # the target's, in units of E
    above = c.E.gt(own.to(c.E.dtype)).sum(0)
    return RowDetails(
        c.l,
        _entropy(c),
        torch.where(first, c.entry_class, c.E.argmax(0)),
        torch.where(first, 0, above.clamp_min(1)),
    )


def _entropy(c: Chunk) -> Tensor:
    products = torch.zeros_like(c.mass)
    for e in torch.split(c.E, _BLOCK):
        products += torch.xlogy(e, e).sum(0, dtype=torch.float64)
    within = (c.mass.log() - products / c.mass).clamp_min(0.0)
    q = torch.sigmoid(-c.log_mass)
    of_target, of_rest = (
        torch.where(share == 0, 0.0, share * torch.nn.functional.softplus(log, threshold=40.0))
        for share, log in ((q, c.log_mass), (c.p, -c.log_mass))
    )
    return of_target + of_rest + torch.where(c.p == 0, 0.0, c.p * within)


def add_row_gradients(
    head: TiledSoftmaxHead, x: HeadInput, entropy_weight: Tensor, out: Gradients
) -> None:
    """Add the gradient of sum_r row_weight_r l_r + entropy_weight_r entropy_r into ``out``: one
    sweep.
    """
    W = x.weight.to(compute_dtype(x.weight.dtype))
    for c in head.sweep(x):
        G = _logit_gradient(c, entropy_weight[c.start : c.stop].double())
        if out.features is not None:
            out.features[c.start : c.stop].addmm_(G.T, W)
        if out.weight is not None:
            add_product(out.weight, G, c.features)
        if out.bias is not None:
            out.bias.add_(G.sum(1))


def _logit_gradient(c: Chunk, b: Tensor) -> Tensor:
    """The gradient in the logits, K x C, in the place of E."""
    entropy, scale = _entropy(c), c.p / c.mass
    log_scale = torch.where(scale == 0, 0.0, scale.log())
    factor = (scale * (c.row_weight - b * (log_scale + entropy))).to(c.E.dtype)
    bent = (scale * b).to(c.E.dtype)
    for e in torch.split(c.E, _BLOCK):
        products = torch.xlogy(e, e).mul_(bent)
        e.mul_(factor).sub_(products)
    q = 1.0 - c.p
    own = -c.row_weight * c.p - torch.where(q == 0, 0.0, b * q * (entropy - c.l))
    c.E[c.entry_class, c.entry_row] = own.to(c.E.dtype)
    return c.E
