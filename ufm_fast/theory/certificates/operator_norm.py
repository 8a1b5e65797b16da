"""Upper bounds on an operator norm: exact by a dense Gram matrix, or probabilistic by subspace
split and Lanczos.

Power and Lanczos iterations under-estimate a norm, so by themselves they prove nothing. Two ways
that do:

- ``dense_norm``: eigenvalues of the smaller Gram matrix, enlarged by their rounding error;
- ``split_norm``: G is cut by the spans of two given orthonormal bases U, V into a 2 x 2 block
  operator. Three blocks are formed exactly; the norm of the last, on the complements, is bounded by
  Lanczos but for a failure probability (`lanczos`), and |G| <= |[[g11, g12], [g21, g22]]|_2.

Decisions

2026-11-25. The certificate never trusts a power iteration. The norm |G| comes from the eigenvalues
of the dense K x K Gram matrix up to K = 4096. Beyond, G is cut by span(W) and span(H): three blocks
exactly, the last bounded by Lanczos with the failure probability of Kuczynski and Wozniakowski, and
the certificate says `probabilistic`. G is held for that where it fits a quarter of the free memory:
7.8 s instead of 107 s at K = 8,413 (`bench/certificate.py`), where each of 120 products would sweep
the classes anew. A free bias needs column sums that vanish exactly: a rank-one flow from classes
with too much mass to those with too little makes them so, at second order in the gradient. Without
a bias the rows of the gradient may change their signs, so the focal loss, which is not convex,
needs no envelope: each row's bound is a global minimum over one number, and gaps of balanced minima
are 1e-10 on both sides of the collapse threshold (of unbalanced ones not always, see the end). With
smoothing a class without samples gives its surplus up evenly, from the eps / K that every row has
there. With a frozen factor, strong convexity in the other gives the bound directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.lanczos import Lanczos
from ufm_fast.spread import ALONE, Spread

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class NormBound:
    """``value`` bounds the norm from above, but for ``failure_probability``; ``estimate`` is the
    best guess below it.
    """

    value: float
    estimate: float
    failure_probability: float


def dense_norm(chunks: Iterable[Tensor], columns: int, spread: Spread = ALONE) -> NormBound:
    """Norm of the matrix whose row blocks are ``chunks`` (float64), each R_i x columns, by its
    columns x columns Gram.

    On several ranks ``chunks`` are of the rows here.
    """
    total: Tensor | None = None
    for block in chunks:
        if total is None:
            total = torch.zeros(columns, columns, dtype=torch.float64, device=block.device)
        total.addmm_(block.T, block)
    assert total is not None
    top = float(torch.linalg.eigvalsh(spread.total(total))[-1])
    # eigvalsh is backward stable: the error of an eigenvalue is a small multiple of eps times the
    # norm.
    inflated = max(top, 0.0) * (1.0 + 8.0 * math.sqrt(columns) * _EPS)
    return NormBound(math.sqrt(inflated), math.sqrt(max(top, 0.0)), 0.0)


def split_norm(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    U: Tensor,
    V: Tensor,
    *,
    steps: int = 60,
    failure_probability: float = 1e-9,
    seed: int = 0,
    spread: Spread = ALONE,
) -> NormBound:
    """Norm of G (R x K) given ``forward`` X -> G X and ``adjoint`` Y -> G' Y, and orthonormal V (R
    x r), U (K x r). On several ranks V, G X and Y are their rows here; U, X and G' Y are whole.
    """
    GU, GV = forward(U), adjoint(V)  # R x r, K x r
    inner = spread.total(V.T @ GU)
    g11 = float(torch.linalg.matrix_norm(inner, 2)) if inner.numel() else 0.0
    g12 = _spectral(GU - V @ inner, spread)
    g21 = _spectral(GV - U @ inner.T, ALONE)
    g22, low, probability = _complement_norm(
        forward, adjoint, U, V, steps, failure_probability, seed, spread
    )
    if math.isinf(g22):
        return NormBound(math.inf, max(g11, low), probability)
    blocks = torch.tensor([[g11, g12], [g21, g22]], dtype=torch.float64)
    bound = float(torch.linalg.matrix_norm(blocks, 2)) * (1.0 + 1e-12)
    return NormBound(bound, max(g11, low), probability)


def _spectral(X: Tensor, spread: Spread) -> float:
    """Norm of a tall thin matrix, never under-estimated."""
    if X.shape[1] == 0:
        return 0.0
    top = float(torch.linalg.eigvalsh(spread.total(X.T @ X))[-1])
    return math.sqrt(max(top, 0.0) * (1.0 + 1e-12))


def _complement_norm(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    U: Tensor,
    V: Tensor,
    steps: int,
    failure: float,
    seed: int,
    spread: Spread,
) -> tuple[float, float, float]:
    """(upper bound, estimate, failure probability) of |(I - VV') G (I - UU')| by Lanczos on its K x
    K Gram operator.
    """
    size = U.shape[0] - U.shape[1]
    if size <= 0 or spread.number(V.shape[0]) <= V.shape[1]:
        return 0.0, 0.0, 0.0

    def outside(x: Tensor, basis: Tensor, over: Spread) -> Tensor:
        for _ in range(2):
            x = x - basis @ over.total(basis.T @ x)
        return x

    # On the host: the same start whatever the device.
    start = torch.randn(
        U.shape[0], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(U.device)

    def gram(q: Tensor) -> Tensor:
        q = spread.first(q)
        return outside(adjoint(outside(forward(q[:, None]), V, spread)), U, ALONE)[:, 0]

    krylov = Lanczos(gram, outside(start, U, ALONE)[:, 0], steps, size)
    krylov.step()
    while not spread.agreed(krylov.ended):
        krylov.step()
    low = math.sqrt(max(float(krylov.ritz()[0][-1]), 0.0))
    if krylov.exhausted:
        return low * (1.0 + 1e-10), low, failure
    missed = krylov.missed(failure)
    if missed >= 1.0:
        return math.inf, low, failure  # too few steps to say anything
    return low / math.sqrt(1.0 - missed), low, failure
