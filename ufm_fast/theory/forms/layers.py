"""Closed forms with linear layers, and of one layer with a free bias: spectra of the targets
(`deep`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.problem import Problem
from ufm_fast.theory.deep import LayeredMinimum, layered_mse
from ufm_fast.theory.forms.base import ClosedForm, class_counts
from ufm_fast.theory.frames import Logits, Parameters
from ufm_fast.theory.squared_error import MOST_GROUPS

_PAPERS = (
    "squared error with linear layers (arXiv 2202.08087, 2301.00437; any counts and widths: our "
    "derivation)"
)
_FREE = "squared error with a free bias, b = n/N, any counts and widths (our derivation)"


@dataclass(frozen=True, eq=False)
class LayeredLogits(Logits):
    """The factors of a spectrum that all layers share."""

    found: LayeredMinimum
    counts: Tensor
    widths: tuple[int, ...]
    penalties: tuple[float, ...]

    @cached_property
    def _factors(self) -> list[Tensor]:
        return self.found.factors(self.counts, self.widths, self.penalties)

    def point(self) -> Parameters:
        return self._factors[0], self._factors[1], self.found.bias

    def hidden(self) -> tuple[Tensor, ...]:
        return tuple(self._factors[2:])


def spectral_mse(problem: Problem) -> ClosedForm | None:
    """Squared error, no bias or a free one (up to 1,024 distinct counts), one layer or linear ones
    of any widths.
    """
    counts, widths, free = class_counts(problem), problem.trunk.widths, problem.bias == "free"
    if free and len(torch.unique(counts)) > MOST_GROUPS:
        return None  # its spectral problem has that order
    found = layered_mse(counts, min(widths), problem.mu, 1 + problem.layers, free_bias=free)
    penalties = (problem.lambda_w, problem.lambda_h, *problem.hidden_penalties)
    logits = LayeredLogits(found, counts, widths, penalties)
    return ClosedForm(found.value, _FREE if free else _PAPERS, len(found.sigma) == 0, logits)
