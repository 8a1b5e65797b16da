"""Which classes each row is a sample of, and how many samples a row stands for.

Decisions

2026-11-26. What is derived from targets lives on them (`Targets.remembered`), labels sorted for the
kernels by class count and stream. The backend's single place for the last ones was overwritten by
the next call with others, and a captured graph went on reading what had been freed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ufm_fast.arguments import (
    LEAST_FACTOR,
    MOST,
    MOST_FACTOR,
    cpu_by_default,
    integers,
    whole,
)
from ufm_fast.errors import InputError, InputTypeError

#: Of all sets of some sizes; beyond it the number was a slip, and no machine holds their features.
MOST_SETS = 10**6


def check_labels(
    labels: Tensor, classes: int, name: str = "labels", mend: str = "raise classes"
) -> Tensor:
    """Return ``labels`` as int64 after checking that they are integers in [0, classes).

    Errors: InputTypeError for a non-integer dtype, InputError for a value out of range. No kernel
    indexes before this.
    """
    labels = integers(labels, name)
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise InputError(
                f"{name} must not be negative, got {low}; drop samples without a class, or number "
                f"classes from 0"
            )
        if high >= classes:
            raise InputError(
                f"{name} must lie in [0, {classes}), got {high}; number the classes from 0, or "
                f"{mend}"
            )
    return labels


@dataclass(frozen=True)
class Targets:
    """Target classes of R rows in CSR form: row r has ``indices[indptr[r]:indptr[r+1]]``.

    ``indptr`` is None when every row has exactly one target (then ``indices`` has shape (R,)), the
    single-label case.
    """

    indices: Tensor
    indptr: Tensor | None = None
    # What is derived from them, for whom: it ends with them, and copies begin without.
    remembered: dict[tuple[object, ...], object] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, object]:
        return {"indices": self.indices, "indptr": self.indptr, "remembered": {}}

    def occupied(self, classes: int) -> tuple[Tensor, Tensor]:
        """Classes that have rows and those that have none, ascending, remembered: a step must not
        wait for it.
        """
        key = ("occupied", classes)
        if key not in self.remembered:
            present = torch.zeros(classes, dtype=torch.bool, device=self.indices.device)
            present[self.indices] = True
            self.remembered[key] = (torch.nonzero(present)[:, 0], torch.nonzero(~present)[:, 0])
        return cast("tuple[Tensor, Tensor]", self.remembered[key])

    @property
    def rows(self) -> int:
        return int(self.indices.numel() if self.indptr is None else self.indptr.numel() - 1)

    @property
    def single(self) -> bool:
        return self.indptr is None

    def sizes(self) -> Tensor:
        """Number of targets M_r of each row, int64 (R,)."""
        if self.indptr is None:
            return torch.ones_like(self.indices)
        return self.indptr[1:] - self.indptr[:-1]

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Entries of rows start..stop as (row within the slice, class), both int64 (entries,)."""
        if self.indptr is None:
            columns = self.indices[start:stop]
            return torch.arange(columns.numel(), device=columns.device), columns
        pointer = self.indptr[start : stop + 1]
        columns = self.indices[int(pointer[0]) : int(pointer[-1])]
        rows = torch.repeat_interleave(
            torch.arange(stop - start, device=columns.device), pointer[1:] - pointer[:-1]
        )
        return rows, columns

    def part(self, start: int, stop: int) -> Targets:
        """The targets of rows start..stop alone."""
        if self.indptr is None:
            return Targets(self.indices[start:stop])
        pointer = self.indptr[start : stop + 1]
        return Targets(self.indices[int(pointer[0]) : int(pointer[-1])], pointer - pointer[0])

    def to(self, device: torch.device | str) -> Targets:
        return Targets(
            self.indices.to(device), None if self.indptr is None else self.indptr.to(device)
        )


@dataclass(frozen=True)
class TargetSets:
    """Multi-label data: R target sets in CSR form and how many samples have each (default one).

    ``indptr`` int64 (R+1,), ``indices`` int64 (entries,), ``counts`` int64 (R,). Never an N x K
    array. ``weights``: of the entries, positive float64 (entries,), None where all are one; then a
    row is a distribution over a few classes, or over all.
    """

    indptr: Tensor
    indices: Tensor
    counts: Tensor
    weights: Tensor | None = None

    @classmethod
    @cpu_by_default
    def create(
        cls,
        indptr: object,
        indices: object,
        classes: int,
        counts: object | None = None,
        weights: object | None = None,
    ) -> TargetSets:
        """Check and build. Errors: InputError / InputTypeError naming the array and the mend."""
        whole(classes, "classes", 2)
        pointer = integers(indptr, "indptr").cpu()
        if pointer.ndim != 1 or pointer.numel() < 2 or int(pointer[0]) != 0:
            raise InputError(
                "indptr must be a vector that starts at 0 and has one entry more than there are "
                "rows"
            )
        entries = check_labels(integers(indices, "indices").cpu(), classes, "indices")
        if entries.ndim != 1:
            raise InputError(f"indices must be a vector, got shape {tuple(entries.shape)}")
        if int(pointer[-1]) != entries.numel():
            raise InputError(
                f"indptr must end at the length of indices, {entries.numel()}, got "
                f"{int(pointer[-1])}"
            )
        sizes = pointer[1:] - pointer[:-1]
        if bool((sizes < 1).any()):
            raise InputError(
                "every row of target sets needs at least one class; drop the rows without a label"
            )
        q = None if weights is None else _entry_weights(weights, entries.numel())
        if q is None and bool((sizes >= classes).any()):
            raise InputError(
                "a target set holds every class: its loss has no off-target class; leave one "
                "class out"
            )
        rows = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)
        key, order = torch.sort(rows * classes + entries)
        if bool((key[1:] == key[:-1]).any()):
            raise InputError(
                "indices names a class twice in one row; list each class of a target set once"
            )
        repeats = torch.ones_like(sizes) if counts is None else integers(counts, "counts").cpu()
        if repeats.shape != sizes.shape or bool((repeats < 1).any()):
            raise InputError(
                f"counts must hold {sizes.numel()} positive integers, one for each target set"
            )
        if float((repeats.double() * sizes).sum()) > MOST:
            raise InputError(f"counts must sum to at most {MOST} entries of samples")
        return cls(pointer, key - rows * classes, repeats, None if q is None else q[order])

    @classmethod
    def every(cls, classes: int, multiplicities: Mapping[int, int]) -> TargetSets:
        """All C(K, m) sets of m labels with n_m samples each, for ``multiplicities`` {m: n_m}.

        Errors: InputError / InputTypeError for sizes outside [1, K), and for more than
        ``MOST_SETS`` sets, with their number.
        """
        sizes = {
            whole(m, "multiplicities: labels of a set", 1): n
            for m, n in sorted(multiplicities.items())
        }
        if not sizes or max(sizes) >= classes:
            raise InputError(
                f"multiplicities must name sizes from 1 to classes - 1 = {classes - 1}, got "
                f"{sorted(sizes)}"
            )
        number = sum(math.comb(classes, m) for m in sizes)
        if number > MOST_SETS:
            raise InputError(
                f"multiplicities {sorted(sizes)} of {classes} classes are {number:,} target sets, "
                f"and {MOST_SETS:,} is the "
                "most; give fewer classes or smaller sets, or some of them as target_sets"
            )
        entries, lengths, counts = [], [], []
        for m, n in sizes.items():
            entries.append(torch.combinations(torch.arange(classes), m).flatten())
            lengths.append(torch.full((math.comb(classes, m),), m))
            counts.append(
                torch.full_like(
                    lengths[-1], whole(n, f"multiplicities: samples of each set of {m}", 1)
                )
            )
        pointer = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
        return cls.create(pointer, torch.cat(entries), classes, torch.cat(counts))

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cpu_by_default
    def grouped(self) -> tuple[TargetSets, Tensor]:
        """Merge equal sets. Returns the distinct sets and, for each old row, the index of its set,
        int64 (R,).
        """
        order: dict[tuple[tuple[int, float], ...], int] = {}
        q = (
            torch.ones(self.indices.numel(), dtype=torch.float64)
            if self.weights is None
            else self.weights
        )
        pointer, entries = (
            self.indptr.tolist(),
            list(zip(self.indices.tolist(), q.tolist(), strict=True)),
        )
        index = torch.tensor(
            [order.setdefault(tuple(entries[a:b]), len(order)) for a, b in pairwise(pointer)]
        )
        counts = torch.zeros(len(order), dtype=torch.int64).index_add_(0, index, self.counts)
        sizes = torch.tensor([len(members) for members in order])
        merged = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        flat = torch.tensor([k for members in order for k, _ in members])
        weights = (
            None
            if self.weights is None
            else torch.tensor([q for members in order for _, q in members], dtype=torch.float64)
        )
        return TargetSets(merged, flat, counts, weights), index


def _entry_weights(given: object, entries: int) -> Tensor | None:
    """Positive float64 (entries,); None where all are one. Errors: InputError / InputTypeError."""
    try:
        found = given.detach().cpu() if isinstance(given, Tensor) else given
        weights = torch.as_tensor(found, dtype=torch.float64, device="cpu")  # lists keep digits
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(
            f"weights must hold a number for each entry of indices ({error})"
        ) from error
    if tuple(weights.shape) != (entries,):
        raise InputError(
            f"weights must have shape ({entries},), one for each entry of indices, got "
            f"{tuple(weights.shape)}"
        )
    if not bool((torch.isfinite(weights) & (weights > 0)).all()):
        raise InputError(
            "weights of target sets must be finite and > 0; drop the entries that weigh nothing"
        )
    largest = float(weights.max()) if entries else 1.0
    if not LEAST_FACTOR <= largest <= MOST_FACTOR:
        raise InputError(
            f"the largest weight of target sets must lie in [{LEAST_FACTOR:g}, {MOST_FACTOR:g}], "
            f"got {largest}; divide all weights by it"
        )
    return None if bool((weights == 1).all()) else weights


@dataclass(frozen=True)
class Rows:
    """The rows a solver works on: row r has targets r and stands for ``counts[r]`` samples with
    equal features.
    """

    targets: Targets
    counts: Tensor

    @property
    def number(self) -> int:
        return int(self.counts.numel())

    def part(self, rows: slice) -> Rows:
        """Those rows alone."""
        return Rows(self.targets.part(rows.start, rows.stop), self.counts[rows])
