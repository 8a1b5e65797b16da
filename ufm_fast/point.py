"""A point of the model, and a gradient or direction at it: solvers touch vectors only through this
class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.layout import Layout


@dataclass(frozen=True)
class Point:
    """Classifier W (K x d), features H (R x d_0, a row per sample or per class), bias b (K,) or
    None, and the weights of the layers between, first to last (none: the head sees H, and d = d_0).
    Sums run in float64 whatever the dtype of the parts. On several ranks each has its blocks of the
    parts, and all of the hidden layers; ``layout`` says which, and only what sums over all parts
    looks at it.
    """

    W: Tensor
    H: Tensor
    b: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()
    layout: Layout | None = None

    def parts(self) -> Iterator[Tensor]:
        yield self.W
        yield self.H
        if self.b is not None:
            yield self.b
        yield from self.hidden

    def named(self) -> dict[str, Tensor]:
        """Each part by the name that files and tables know it by: W, H, b, hidden1, hidden2, ..."""
        names = (
            ["W", "H"]
            + ([] if self.b is None else ["b"])
            + [f"hidden{j}" for j in range(1, len(self.hidden) + 1)]
        )
        return dict(zip(names, self.parts(), strict=True))

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Point:
        """The point of ``named`` parts; other names are left alone."""
        hidden: list[Tensor] = []
        while f"hidden{len(hidden) + 1}" in parts:
            hidden.append(parts[f"hidden{len(hidden) + 1}"])
        return cls(parts["W"], parts["H"], parts.get("b"), tuple(hidden))

    def map(self, function: Callable[[Tensor], Tensor]) -> Point:
        """A new point with ``function`` applied to each part."""
        bias = None if self.b is None else function(self.b)
        return Point(
            function(self.W), function(self.H), bias, tuple(map(function, self.hidden)), self.layout
        )

    def zip(self, other: Point, function: Callable[[Tensor, Tensor], Tensor]) -> Point:
        """A new point with ``function`` applied to matching parts."""
        bias = None if self.b is None or other.b is None else function(self.b, other.b)
        hidden = tuple(map(function, self.hidden, other.hidden))
        return Point(
            function(self.W, other.W), function(self.H, other.H), bias, hidden, self.layout
        )

    def dot(self, other: Point) -> float:
        """Euclidean inner product."""
        total = 0.0
        pairs = list(zip(self.parts(), other.parts(), strict=True))
        for left, right in pairs[: len(pairs) - self._elsewhere]:
            total += inner(left, right)
        return self.summed(total)

    def summed(self, part: float) -> float:
        """A sum over the entries of the whole point, of which ``part`` is that over the entries
        here.
        """
        return part if self.layout is None else self.layout.total(part)

    @property
    def _elsewhere(self) -> int:
        """How many hidden layers, which every rank has, another rank counts: the first does."""
        return 0 if self.layout is None or self.layout.mesh.rank == 0 else len(self.hidden)

    @property
    def counted(self) -> tuple[Tensor, ...]:
        """The hidden layers, where this rank is the one that counts them in sums over all."""
        return () if self._elsewhere else self.hidden

    def norm(self) -> float:
        return float(max(self.dot(self), 0.0) ** 0.5)

    def axpy(self, factor: float, direction: Point) -> Point:
        """self + factor * direction, a new point."""
        return self.zip(direction, lambda x, v: torch.add(x, v, alpha=factor))

    def scale(self, factor: float) -> Point:
        return self.map(lambda x: x * factor)

    def clone(self) -> Point:
        return self.map(torch.clone)

    def zeros(self) -> Point:
        return self.map(torch.zeros_like)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Point:
        return self.map(lambda x: x.to(device=device, dtype=dtype))

    def finite(self) -> bool:
        here = all(bool(torch.isfinite(x).all()) for x in self.parts())
        return here if self.layout is None else self.layout.all(here)


def inner(left: Tensor, right: Tensor) -> float:
    """Inner product of two tensors of a shape, summed in float64."""
    if left.dtype == torch.float64:
        return float(torch.dot(left.reshape(-1), right.reshape(-1)))
    # Products in the parts' dtype, sums in float64, in pieces: no float64 copy of a million-class
    # gradient.
    x, y = torch.split(left.reshape(-1), 1 << 20), torch.split(right.reshape(-1), 1 << 20)
    return float(sum((a * c).sum(dtype=torch.float64) for a, c in zip(x, y, strict=True)))
