"""Classes grouped by their number of samples: all that a minimum over interchangeable classes needs
to know of its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufm_fast.arguments import MOST, integers, whole
from ufm_fast.errors import InputError, InputTypeError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ClassGroups:
    """G groups of classes with equal counts: group g has `sizes[g]` classes of `counts[g]` samples,
    counts ascending.

    Classes are numbered run by run: `runs` holds (classes, samples each), in the order of the
    classes. `locate` says which group a class is in and which of its members it is. Nothing is of
    length K unless the runs are.
    """

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of_pairs(cls, pairs: Iterable[Sequence[int]]) -> ClassGroups:
        """From pairs (classes, samples each). Errors: InputError for too few or too many of
        either.
        """
        runs = []
        for pair in pairs:
            if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
                raise InputTypeError(f"groups must be pairs (classes, samples each), got {pair!r}")
            runs.append(
                (whole(pair[0], "groups: classes", 1), whole(pair[1], "groups: samples", 0))
            )
        total, samples = sum(k for k, _ in runs), sum(k * n for k, n in runs)
        if total < 2 or samples == 0:
            raise InputError(
                f"groups must hold at least 2 classes and a sample, got {total} and {samples}"
            )
        if max(total, samples) > MOST:
            raise InputError(
                f"groups must hold at most {MOST} classes and samples, got {total:.3g} and "
                f"{samples:.3g}"
            )
        return cls(tuple(runs))

    @classmethod
    def of_words(cls, text: str) -> ClassGroups:
        """From ``classes:samples,classes:samples``. Errors: InputError for other words, and as
        ``of_pairs``.
        """
        try:
            pairs = [tuple(int(number) for number in word.split(":")) for word in text.split(",")]
        except ValueError as error:
            raise InputError(
                f"groups must be classes:samples,classes:samples (as 10:500,90:50), got {text!r}"
            ) from error
        return cls.of_pairs(pairs)

    @classmethod
    def of_counts(cls, counts: Sequence[int] | Tensor) -> ClassGroups:
        """From samples per class (K,). Errors: InputError for fewer than two classes, or counts
        that are none.
        """
        values, lengths = torch.unique_consecutive(
            integers(counts, "counts").cpu().reshape(-1), return_counts=True
        )
        return cls.of_pairs(zip(lengths.tolist(), values.tolist(), strict=True))

    @cached_property
    def counts(self) -> Array:
        """n_g (G,), the distinct counts, ascending."""
        return np.unique([float(n) for _, n in self.runs])

    @cached_property
    def sizes(self) -> Array:
        """K_g (G,), classes of each count."""
        return np.bincount(
            self._run_group, weights=self._run_sizes, minlength=len(self.counts)
        ).astype(np.float64)

    @cached_property
    def _run_sizes(self) -> Indices:
        return np.array([k for k, _ in self.runs], dtype=np.int64)

    @cached_property
    def _run_group(self) -> Indices:
        return np.searchsorted(self.counts, [float(n) for _, n in self.runs])

    @cached_property
    def _run_place(self) -> Indices:
        """How many members of its group stand before each run."""
        order = np.argsort(self._run_group, kind="stable")
        before = np.cumsum(self._run_sizes[order]) - self._run_sizes[order]
        starts = (np.cumsum(self.sizes) - self.sizes).astype(np.int64)
        place = np.empty_like(before)
        place[order] = before - starts[self._run_group[order]]
        return place

    @property
    def classes(self) -> int:
        """K."""
        return int(self._run_sizes.sum())

    @property
    def samples(self) -> int:
        """N."""
        return sum(k * n for k, n in self.runs)

    def locate(self, classes: Any) -> tuple[Indices, Indices]:
        """(group, place in the group) of each class number. Errors: InputError for a number outside
        [0, K).
        """
        index = np.asarray(classes)
        if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
            raise InputTypeError(f"classes must be a list of class numbers, got {classes!r}")
        if index.min() < 0 or index.max() >= self.classes:
            raise InputError(
                f"classes must lie in [0, {self.classes}), got {int(index.min())} to "
                f"{int(index.max())}"
            )
        ends = np.cumsum(self._run_sizes)
        run = np.searchsorted(ends, index, side="right")
        return self._run_group[run], self._run_place[run] + index - (ends - self._run_sizes)[run]

    def expanded(self) -> Tensor:
        """Samples per class, int64 (K,)."""
        return torch.repeat_interleave(
            torch.tensor([n for _, n in self.runs]), torch.from_numpy(self._run_sizes)
        )
