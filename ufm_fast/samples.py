"""Samples: which classes the N samples belong to, and the rows that stand for them. Nothing here
knows what is minimised.

A Samples is made of one kind of data (`sample_data`), checked once, and never changes, so that what
is derived (labels of all samples, distinct target sets, rows) is worked out once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ufm_fast.class_groups import ClassGroups
from ufm_fast.dense_targets import DenseTargets, merged_rows
from ufm_fast.errors import InputError
from ufm_fast.sample_data import read
from ufm_fast.targets import Rows, Targets, TargetSets
from ufm_fast.weighted_targets import WeightedTargets

REDUCTIONS = ("classes", "none")


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples of K classes. ``counts`` int64 (K,): samples that name a class; ``given``: the data
    that it was made of.

    ``given_labels`` (N,), ``given_sets`` and ``given_vectors`` (N, t) are None unless the data were
    labels, target sets or target vectors. Vectors name no class: K is t then, and every sample
    counts for every output.
    """

    classes: int
    counts: Tensor = field(repr=False)
    given: Mapping[str, Any] = field(repr=False)
    given_labels: Tensor | None = field(default=None, repr=False)
    given_sets: TargetSets | None = field(default=None, repr=False)
    given_vectors: Tensor | None = field(default=None, repr=False)
    _kept: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def create(cls, classes: int | None = None, **data: Any) -> Samples:
        """From ``classes`` (None where the data tell it) and at most one of DATA; without any, one
        sample a class.

        Errors: InputError / InputTypeError naming the argument and the mend.
        """
        return cls(*read(classes, data))

    @cached_property
    def groups(self) -> ClassGroups:
        """The classes grouped by their counts."""
        given = self.given.get("groups")
        return ClassGroups.of_counts(self.counts) if given is None else ClassGroups.of_pairs(given)

    def with_classes(self, classes: int | None) -> Samples:
        """The same data with another number of classes. Errors: as ``create``."""
        return self if classes in (None, self.classes) else Samples.create(classes, **self.given)

    # ---- what is derived

    @cached_property
    def number(self) -> int:
        """N: samples, also of target sets (not samples times targets)."""
        if self.given_vectors is not None:
            return self.given_vectors.shape[0]
        return int(self.counts.sum()) if self.given_sets is None else self.given_sets.num_samples

    @cached_property
    def occupied(self) -> int:
        """Number of classes that have samples."""
        return int((self.counts > 0).sum())

    @cached_property
    def distinct_counts(self) -> tuple[Tensor, Tensor]:
        """The distinct class counts, ascending, and the number of classes of each; those without
        samples, which may be nearly all of 2^28, are not sorted.
        """
        values, sizes = torch.unique(self.counts[self.counts > 0].cpu(), return_counts=True)
        empty = self.classes - self.occupied
        if empty:
            values, sizes = (
                torch.cat([x.new_tensor([first]), x]) for x, first in ((values, 0), (sizes, empty))
            )
        return values, sizes

    @cached_property
    def labels(self) -> Tensor:
        """Labels of the N samples, int64 (N,); by ascending class when the data were given as
        counts.

        Errors: InputError of target vectors, which have none.
        """
        if self.given_vectors is not None:
            raise InputError(
                "samples have target vectors and no labels; use rows(), or give labels"
            )
        if self.given_labels is not None:
            return self.given_labels
        return torch.repeat_interleave(torch.arange(self.classes, device="cpu"), self.counts)

    @cached_property
    def sets(self) -> TargetSets:
        """The target sets; of single labels a set of one class for each sample, or for each class
        that has samples.
        """
        if self.given_sets is not None:
            return self.given_sets
        if self.given_labels is not None:
            y = self.given_labels
            return TargetSets(torch.arange(y.numel() + 1, device="cpu"), y, torch.ones_like(y))
        y = torch.nonzero(self.counts).reshape(-1)
        return TargetSets(torch.arange(y.numel() + 1, device="cpu"), y, self.counts[y])

    @cached_property
    def _distinct(self) -> tuple[TargetSets, Tensor]:
        return self.sets.grouped()

    def rows(self, reduce: str = "classes", *, as_sets: bool = False) -> Rows:
        """Rows to solve on. 'classes': one row for each non-empty class (``as_sets``: each distinct
        target set; of target vectors, each distinct one), exact because samples with equal targets
        have equal features at a minimum. 'none': one row a sample. Worked out once.
        """
        if reduce not in REDUCTIONS:
            raise InputError(f"reduce must be classes or none, got {reduce!r}")
        if (reduce, as_sets) not in self._kept:
            make = (
                self._vector_rows
                if self.given_vectors is not None
                else self._set_rows
                if as_sets
                else self._class_rows
            )
            self._kept[reduce, as_sets] = make(reduce)
        return cast("Rows", self._kept[reduce, as_sets])

    @cached_property
    def _merged(self) -> tuple[Rows, Tensor]:
        assert self.given_vectors is not None
        return merged_rows(self.given_vectors)

    def _vector_rows(self, reduce: str) -> Rows:
        assert self.given_vectors is not None
        if reduce == "classes":
            return self._merged[0]
        return Rows(
            DenseTargets.of(self.given_vectors),
            torch.ones(self.number, dtype=torch.int64, device="cpu"),
        )

    def _class_rows(self, reduce: str) -> Rows:
        if reduce == "classes":
            present = torch.nonzero(self.counts).reshape(-1)
            return Rows(Targets(present), self.counts[present])
        return Rows(Targets(self.labels), torch.ones(self.number, dtype=torch.int64, device="cpu"))

    def _set_rows(self, reduce: str) -> Rows:
        if reduce == "classes":
            distinct = self._distinct[0]
            return Rows(
                _targets(distinct.indices, distinct.indptr, distinct.weights), distinct.counts
            )
        sets = self.sets
        sample_set = torch.repeat_interleave(
            torch.arange(sets.counts.numel(), device="cpu"), sets.counts
        )
        sizes = torch.diff(sets.indptr)[sample_set]
        pointer = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.cumsum(0)])
        offset = torch.arange(int(pointer[-1]), device="cpu") - torch.repeat_interleave(
            pointer[:-1], sizes
        )
        place = torch.repeat_interleave(sets.indptr[:-1][sample_set], sizes) + offset
        weights = None if sets.weights is None else sets.weights[place]
        return Rows(
            _targets(sets.indices[place], pointer, weights),
            torch.ones(sample_set.numel(), dtype=torch.int64, device="cpu"),
        )

    def sample_row(self, *, as_sets: bool = False) -> Tensor:
        """Row of ``rows('classes')`` that each of the N samples belongs to, int64 (N,): how a
        solution is lifted back.
        """
        if self.given_vectors is not None:
            return self._merged[1]
        if as_sets:
            return torch.repeat_interleave(self._distinct[1], self.sets.counts)
        row_of_class = torch.cumsum(self.counts > 0, 0) - 1
        return row_of_class[self.labels]


def _targets(indices: Tensor, indptr: Tensor, weights: Tensor | None) -> Targets:
    return (
        Targets(indices, indptr)
        if weights is None
        else WeightedTargets(indices, indptr, weights=weights)
    )
