"""Cross-entropy of capped logits  q = cap tanh(z / cap),  on any device: chunks of rows,
exponentials off the target.

With J = 1 - (q / cap)^2 and G the gradient in q, the gradient in z is G J, and along a direction dz
it changes by J (H J dz) - (2 q / cap^2) J G dz, H the Hessian of the cross-entropy in q. The cap
bends every logit on its own, so no product of means gives an offset in advance: it is each row's
largest logit off the target, and the kernels have no such mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ufm_fast.backends.base import (
    Gradients,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    compute_dtype,
    weighed,
)
from ufm_fast.backends.chunks import chunk_rows

_ARRAYS = 4  # of a chunk's rows x K at a time


class _Chunk(NamedTuple):
    """C rows: features, capped logits and E (C x K, zero on targets), and vectors of length C in
    float64.
    """

    part: slice
    features: Tensor
    q: Tensor
    E: Tensor
    labels: Tensor
    mass: Tensor
    l: Tensor
    p: Tensor
    row_weight: Tensor


class SoftcapBackend:
    """The interface of ``Backend`` for the cross-entropy of one label a row, without smoothing."""

    name = "softcap"

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        out = out.cleared()
        W = x.weight.to(compute_dtype(x.weight.dtype))
        total = torch.zeros((), dtype=torch.float64, device=W.device)
        for c in self._chunks(x, W):
            total += weighed(c.row_weight, c.l)
            self._add(out, c, self._slope(c).mul_(self._jacobian(c)), W)
        return HeadResult(total, None)

    def losses(self, x: HeadInput) -> Tensor:
        W = x.weight.to(compute_dtype(x.weight.dtype))
        return torch.cat(
            [x.row_weight.new_zeros(0, dtype=torch.float64), *(c.l for c in self._chunks(x, W))]
        )

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return _CappedGradient(self, x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        chunk = chunk_rows(shape.rows, shape.classes, shape.itemsize, shape.device, _ARRAYS)
        work = _ARRAYS * chunk * shape.classes * shape.itemsize
        return HeadPlan(chunk, work, work, 6.0 * shape.rows * shape.classes * shape.dim)

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        out = out.cleared()
        W = x.weight.to(compute_dtype(x.weight.dtype))
        dW = v.weight.to(W.dtype)
        for c in self._chunks(x, W):
            dh = v.features[c.part].to(W.dtype)
            dz = torch.addmm(dh @ W.T, c.features, dW.T)
            if v.bias is not None:
                dz += v.bias.to(W.dtype)
            J, G = self._jacobian(c), self._slope(c)
            R = self._change(c, J * dz).mul_(J).addcmul_(c.q * J * G, dz, value=-2.0 / self.cap**2)
            G.mul_(J)
            self._add(out, c, R, W)
            if out.features is not None:
                out.features[c.part].addmm_(G, dW)
            if out.weight is not None:
                out.weight.addmm_(G.T, dh)

    def gradients(self, x: HeadInput) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows and their gradient in the logits, C x K."""
        for c in self._chunks(x, x.weight.to(compute_dtype(x.weight.dtype))):
            yield c.part, self._slope(c).mul_(self._jacobian(c))

    def _chunks(self, x: HeadInput, W: Tensor) -> Iterator[_Chunk]:
        rows = chunk_rows(x.features.shape[0], W.shape[0], W.itemsize, W.device, _ARRAYS)
        for start in range(0, x.features.shape[0], rows):
            part = slice(start, start + rows)
            h, labels = x.features[part].to(W.dtype), x.targets.indices[part, None]
            z = h @ W.T if x.bias is None else torch.addmm(x.bias.to(W.dtype), h, W.T)
            q = z.div_(self.cap).tanh_().mul_(self.cap)
            E = q.scatter(1, labels, -torch.inf)
            top = E.amax(1, keepdim=True)
            E.sub_(top).exp_()
            mass = E.sum(1, dtype=torch.float64)
            log_mass = mass.log() + (top - q.gather(1, labels))[:, 0].double()
            l, p = torch.nn.functional.softplus(log_mass, threshold=40.0), torch.sigmoid(log_mass)
            yield _Chunk(part, h, q, E, labels, mass, l, p, x.row_weight[part].double())

    def _jacobian(self, c: _Chunk) -> Tensor:
        return 1.0 - (c.q / self.cap).square_()

    @staticmethod
    def _slope(c: _Chunk) -> Tensor:
        """The gradient in the capped logits."""
        pull = c.row_weight * c.p
        G = c.E * (pull / c.mass).to(c.E.dtype)[:, None]
        return G.scatter_(1, c.labels, -pull.to(c.E.dtype)[:, None])

    @staticmethod
    def _change(c: _Chunk, dq: Tensor) -> Tensor:
        """How it changes with the capped logits."""
        mean = (c.E * dq).sum(1, dtype=torch.float64) / c.mass
        own = dq.gather(1, c.labels)[:, 0].double()
        middle = c.p * mean + (1.0 - c.p) * own
        pull = c.row_weight * c.p
        R = (
            (dq - middle.to(dq.dtype)[:, None])
            .mul_(c.E)
            .mul_((pull / c.mass).to(dq.dtype)[:, None])
        )
        return R.scatter_(1, c.labels, (-pull * (1.0 - c.p) * (mean - own)).to(dq.dtype)[:, None])

    @staticmethod
    def _add(out: Gradients, c: _Chunk, G: Tensor, W: Tensor) -> None:
        if out.features is not None:
            out.features[c.part].addmm_(G, W)
        if out.weight is not None:
            out.weight.addmm_(G.T, c.features)
        if out.bias is not None:
            out.bias.add_(G.sum(0, dtype=torch.float64).to(out.bias.dtype))


class _CappedGradient:
    """The logit gradient by a sweep for each product."""

    def __init__(self, backend: SoftcapBackend, x: HeadInput) -> None:
        self.backend, self.x = backend, x

    def times(self, right: Tensor) -> Tensor:
        product = right.new_zeros(self.x.features.shape[0], right.shape[1])
        for part, G in self.backend.gradients(self.x):
            product[part] = G @ right
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        product = left.new_zeros(self.x.weight.shape[0], left.shape[1])
        for part, G in self.backend.gradients(self.x):
            product.addmm_(G.T, left[part])
        return product
