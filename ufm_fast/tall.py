"""Tall matrices: orthonormal bases, triangular factors, polar factors, of a matrix whose rows are
all here or spread over the ranks of a mesh.

With n rows on all P ranks, d columns and k = min(n, d),  X = Q R,  Q'Q = 1,  R (k x d): a rank has
its rows of Q, and all have R. TSQR (Demmel, Grigori, Hoemmen and Langou, arXiv 0808.2664): each
rank factors its rows, the factors R go to all, and their stack is factored in turn. So a rank
receives at most P d^2 numbers, and has all of X only where n <= d. The diagonal of R is not
negative, which makes both factors of a matrix of full rank unique, and the same (to rounding) on
any number of ranks. Where the rank is lower, or processors round otherwise, all take the first
one's answer.

What turns with the rows, f(Q X) = Q f(X) as a polar factor does, needs only f(R).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ufm_fast.layout import Mesh, gathered

_WHAT = "factors"  # in the counts of bytes that are sent
_QUINTIC = 3.4445, -4.7750, 2.0315  # of Muon


def qr(X: Tensor, mesh: Mesh | None = None) -> tuple[Tensor, Tensor]:
    """(Q, R) of the matrix of which X are the rows here; without a mesh ``torch.linalg.qr(X)``."""
    Q, R = cast("tuple[Tensor, Tensor]", torch.linalg.qr(X))
    if mesh is None:
        return Q, R
    factors = gathered(mesh.world, R.to(mesh.device), _WHAT)
    before = sum(map(len, factors[: mesh.rank]))
    placed, whole = torch.linalg.qr(torch.cat(factors).to(R.device))
    sign = torch.where(whole.diagonal() < 0, -1.0, 1.0).to(whole)
    placed, whole = of_first(placed * sign, mesh), of_first(whole * sign[:, None], mesh)
    return Q @ placed[before : before + len(R)], whole


def triangular(X: Tensor, mesh: Mesh | None = None) -> Tensor:
    """R alone, for which no rows of Q are made."""
    R: Tensor = torch.linalg.qr(X, mode="r").R
    if mesh is None:
        return R
    factors = gathered(mesh.world, R.to(mesh.device), _WHAT)
    whole: Tensor = torch.linalg.qr(torch.cat(factors).to(R.device), mode="r").R
    return of_first(whole, mesh)


def of_first(x: Tensor, mesh: Mesh | None) -> Tensor:
    """The first rank's x, of one shape on all: what is not unique must not differ."""
    return x if mesh is None else mesh.shared(x.to(mesh.device).contiguous()).to(x.device)


def turned(f: Callable[[Tensor], Tensor], X: Tensor, mesh: Mesh | None) -> Tensor:
    """The rows here of f of the whole matrix, for f(Q X) = Q f(X)."""
    if mesh is None:
        return f(X)
    Q, R = qr(X, mesh)
    return Q @ of_first(f(R), mesh)


def orthonormal(X: Tensor, mesh: Mesh | None = None) -> Tensor:
    """Orthonormal columns, or rows where they are fewer, that span those of X."""
    return turned(_orthonormal, X, mesh)


def _orthonormal(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X if X.shape[0] >= X.shape[1] else X.T).Q
    return Q if X.shape[0] >= X.shape[1] else Q.T


def matched(B: Tensor, A: Tensor, size: int, mesh: Mesh | None = None) -> tuple[Tensor, Tensor]:
    """B, and A with B's Gram matrix by a linear map of its columns: of the first ``size`` columns,
    that both span, where there are more; the others are zero.
    """
    B, A = B.clone(), A.clone()
    B[:, size:], A[:, size:] = 0.0, 0.0
    A[:, :size] = qr(A[:, :size], mesh)[0] @ qr(B[:, :size], mesh)[1]
    return B, A


def polar_factor(G: Tensor, mesh: Mesh | None = None) -> Tensor:
    """U V' of G = U S V', of a vector G / |G|; zero of zero. By products with the smaller Gram
    matrix alone.

    Newton-Schulz: ten steps of Muon's quintic raise singular values above 4e-6 |G| to within [0.68,
    1.21], six of the cubic take them from there to 1; smaller ones end below 1, and none is divided
    by.
    """
    return turned(_newton_schulz, G[:, None] if G.ndim == 1 else G, mesh).reshape(G.shape)


def _newton_schulz(X: Tensor) -> Tensor:
    wide = X.shape[0] <= X.shape[1]
    X = (X if wide else X.T) / X.norm().clamp_min(torch.finfo(X.dtype).tiny)
    a, b, c = _QUINTIC
    for _ in range(10):
        S = X @ X.T
        X = a * X + (b * S + c * S @ S) @ X
    for _ in range(6):
        X = 1.5 * X - 0.5 * (X @ X.T) @ X
    return X if wide else X.T
