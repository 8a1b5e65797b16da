"""The focal loss as a function phi(u) of the logarithm u of the off-target mass, and its conjugate
on a half-line.

phi(u) = p^gamma l with p = sigmoid(u), l = softplus(u). Its slope phi' rises from 0 to one peak
above 1 and falls to 1 beyond it, so phi is convex up to the peak and concave from there on. (Our
derivation; the loss: arXiv 1708.02002.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.losses import Focal

_LOWEST, _CELL = -45.0, 0.01  # below, phi' is (1 + gamma) exp((1 + gamma) u) to rounding


def phi(loss: Focal, u: Tensor) -> Tensor:
    """The loss of a row whose off-target mass is exp(u)."""
    return loss.value(torch.nn.functional.softplus(u, threshold=40.0), torch.sigmoid(u))


def slope(loss: Focal, u: Tensor) -> Tensor:
    """phi'(u): what the logit gradient moves from the target to the others."""
    l, p = torch.nn.functional.softplus(u, threshold=40.0), torch.sigmoid(u)
    return p * loss.weight(l, p)


def curvature(loss: Focal, u: Tensor) -> Tensor:
    """phi''(u)."""
    l, p = torch.nn.functional.softplus(u, threshold=40.0), torch.sigmoid(u)
    return p * (torch.sigmoid(-u) * loss.weight(l, p) + loss.bend(l, p))


class Rise:
    """The part on which phi' rises: from 0 to ``level``, or to its peak where none is given."""

    def __init__(self, loss: Focal, level: float | None = None) -> None:
        self.loss = loss
        grid = torch.arange(_LOWEST, 40.0, _CELL, dtype=torch.float64)
        values = slope(loss, grid)
        reached = (
            torch.nonzero(values >= level).reshape(-1)
            if level is not None
            else values.argmax().reshape(1)
        )
        last = int(reached[0]) if reached.numel() else grid.numel() - 1
        self.grid, self.logs = grid[: last + 1], values[: last + 1].log()
        self.end = float(grid[last])

    def invert(self, wanted: Tensor) -> Tensor:
        """u with phi'(u) = ``wanted`` > 0, or the end where that is not reached.

        A table and Newton steps that may not leave its cell; the conjugate's error is second order
        in that of u.
        """
        self.grid, self.logs = self.grid.to(wanted.device), self.logs.to(wanted.device)
        target = wanted.log()
        right = torch.searchsorted(self.logs, target.contiguous()).clamp(1, self.grid.numel() - 1)
        low, high = self.grid[right - 1], self.grid[right]
        share = (target - self.logs[right - 1]) / (self.logs[right] - self.logs[right - 1])
        u = low + (high - low) * share.clamp(0.0, 1.0)
        for _ in range(2):
            step = (wanted - slope(self.loss, u)) / curvature(self.loss, u)
            u = torch.clamp(torch.nan_to_num(u + step, nan=0.0), low, high)
        order = 1.0 + self.loss.gamma
        return torch.where(share < 0.0, (target - math.log(order)) / order, u)

    def below(self, pull: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """phi(u) + ``pull`` (end - u) where phi' = ``pull`` rising if that comes before ``end``,
        and at the end, elementwise.

        The lower of the two is the minimum over u <= ``end``.
        """
        inner = torch.minimum(self.invert(pull), end)
        return phi(self.loss, inner) + pull * (end - inner), phi(self.loss, end)
