"""Value and gradient of mean cross-entropy from features, weight and labels, in as many ways as are
installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends import Gradients, HeadInput, make_backend
from ufm_fast.functional import linear_cross_entropy
from ufm_fast.losses import CrossEntropy
from ufm_fast.targets import Targets

SHAPES = ((4096, 4096, 512), (2048, 32768, 256), (8192, 8192, 128), (1024, 65536, 1024))
OURS, DROP_IN, PRODUCTS = "ufm_fast tiled", "ufm_fast drop-in", "three products"


def inputs(
    N: int, K: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(H, W, y) with a separating direction for each class, so that the loss is as in training and
    not all noise.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(K, d, generator=generator) / d**0.5
    y = torch.randint(K, (N,), generator=generator)
    H = torch.randn(N, d, generator=generator) + 4.0 * W[y]
    return H.to(dtype), W.to(dtype), y


def make(
    name: str, N: int, K: int, d: int, data: tuple[Tensor, Tensor, Tensor] | None = None
) -> Callable[[], object]:
    """A call that computes the value and both gradients, of these (H, W, y) instead of
    ``inputs``.
    """
    H, W, y = data or inputs(N, K, d)
    if name == OURS:
        backend, loss, targets = make_backend("auto", H.device, H.dtype), CrossEntropy(), Targets(y)
        weight = torch.full((N,), 1.0 / N, dtype=torch.float64, device=H.device)

        def ours() -> object:
            out = Gradients(torch.empty_like(H), torch.empty_like(W), None, fresh=True)
            return backend.head(HeadInput(loss, H, W, None, targets, weight), out).value, out

        return ours
    if name == PRODUCTS:
        E, G, D = H.new_empty(N, K), torch.empty_like(H), torch.empty_like(W)

        def products() -> object:
            torch.mm(H, W.T, out=E)
            torch.mm(E, W, out=G)
            return torch.mm(E.T, H, out=D)

        return products
    H, W = (x.detach().requires_grad_() for x in (H, W))
    if name == "autograd":
        return lambda: torch.autograd.grad(
            torch.nn.functional.cross_entropy(torch.nn.functional.linear(H, W), y), (H, W)
        )
    if name == DROP_IN:
        return lambda: torch.autograd.grad(linear_cross_entropy(H, W, y), (H, W))
    options = (
        None
        if name == "torch linear_cross_entropy"
        else torch.nn.LinearCrossEntropyOptions(**CHUNKINGS[name])
    )

    def fused() -> object:
        loss = torch.nn.functional.linear_cross_entropy(H, W, y, options=options)
        return torch.autograd.grad(loss, (H, W))

    return fused


#: torch's own chunked path: its automatic choice, and explicit chunks of the batch.
CHUNKINGS: dict[str, dict[str, Any]] = {
    "torch chunked auto": {},
    **{
        f"torch chunked {rows}": {"batch_chunk_size": rows, "chunking_method": None}
        for rows in (256, 512, 1024, 2048)
    },
}


def available() -> list[str]:
    """Names of the contenders that this torch has; ours and the products first."""
    names = [OURS, PRODUCTS, "autograd"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        names += ["torch linear_cross_entropy", *CHUNKINGS]
    return names
