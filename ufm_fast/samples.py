"""Samples: which classes the N samples belong to, and the rows that stand for them. Nothing here
knows what is minimised.

Data come as a number a class, as counts, as groups of equal counts, as labels, as target sets or as
target vectors; a Samples is made of one of them, checked once, and never changes, so that what is
derived (labels of all samples, distinct target sets, rows) is worked out once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ufm_fast.arguments import MOST, integers, whole
from ufm_fast.class_groups import ClassGroups
from ufm_fast.datasets import load_labels
from ufm_fast.dense_targets import DenseTargets, merged_rows, target_vectors
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.targets import Rows, Targets, TargetSets, check_labels
from ufm_fast.weighted_targets import WeightedTargets

REDUCTIONS = ("classes", "none")
#: Beyond it no machine holds the vectors; a number that large is a slip.
MOST_CLASSES = 2**28
DATA = ("labels", "per_class", "targets", "target_sets", "multiplicities", "counts", "groups")


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
        given = {name: data[name] for name in DATA if data.get(name) is not None}
        if len(given) > 1:
            raise InputError(f"give one of {', '.join(DATA)}; got {' and '.join(given)}")
        if classes is not None:
            classes = whole(classes, "classes", 1 if "targets" in given else 2, MOST_CLASSES)
        if "targets" in given:
            return cls._of_vectors(classes, given["targets"])
        if "target_sets" in given:
            return cls._of_sets(classes, given["target_sets"])
        if "multiplicities" in given:
            return cls._of_multiplicities(classes, given["multiplicities"])
        if "labels" in given:
            return cls._of_labels(classes, given["labels"])
        if "counts" in given:
            return cls._of_counts(classes, given["counts"])
        if "groups" in given:
            return cls._of_groups(classes, given["groups"])
        return cls._of_per_class(classes, given.get("per_class", 1))

    @classmethod
    def _of_labels(cls, classes: int | None, values: Any) -> Samples:
        is_path = isinstance(values, str) or hasattr(values, "__fspath__")
        labels = load_labels(values) if is_path else _vector(values, "labels")
        if labels.numel() == 0:
            raise InputError("labels must hold at least one sample")
        labels = check_labels(labels, classes or MOST_CLASSES)
        classes = _told(classes, int(labels.max()) + 1)
        return cls(classes, torch.bincount(labels, minlength=classes), {"labels": labels}, labels)

    @classmethod
    def _of_per_class(cls, classes: int | None, per_class: Any) -> Samples:
        n = whole(per_class, "per_class", 1)
        if classes is None:
            raise InputError(
                "classes is needed beside per_class; give the number of classes K >= 2"
            )
        if n * classes > MOST:
            raise InputError(
                f"per_class times classes must be at most {MOST} samples, got {n * classes:.3g}"
            )
        return cls(
            classes, torch.full((classes,), n, dtype=torch.int64, device="cpu"), {"per_class": n}
        )

    @classmethod
    def _of_counts(cls, classes: int | None, values: Any) -> Samples:
        counts = _vector(values, "counts")
        if counts.numel() < 2:
            raise InputError(
                f"counts must hold an entry for each of at least 2 classes (0 for an empty one), "
                f"got {counts.numel()}"
            )
        if classes is not None and counts.numel() != classes:
            raise InputError(
                f"counts has {counts.numel()} entries but classes is {classes}; make them agree"
            )
        if bool((counts < 0).any()) or not bool(counts.any()):
            raise InputError("counts must be non-negative with at least one sample in all")
        if float(counts.double().sum()) > MOST:
            raise InputError(
                f"counts must sum to at most {MOST} samples, got {float(counts.double().sum()):.3g}"
            )
        return cls(counts.numel(), counts, {"counts": counts})

    @classmethod
    def _of_groups(cls, classes: int | None, values: Any) -> Samples:
        groups = (
            ClassGroups.of_words(values)
            if isinstance(values, str)
            else ClassGroups.of_pairs(values)
        )
        if groups.classes > MOST_CLASSES:
            raise InputError(
                f"groups must hold at most {MOST_CLASSES} classes, got {groups.classes}; use "
                f"groups.group_minimum"
            )
        if classes not in (None, groups.classes):
            raise InputError(
                f"groups has {groups.classes} classes but classes is {classes}; make them agree"
            )
        return cls(groups.classes, groups.expanded(), {"groups": groups.runs})

    @classmethod
    def _of_sets(cls, classes: int | None, sets: Any) -> Samples:
        if not isinstance(sets, TargetSets):
            raise InputTypeError(
                "target_sets must be a TargetSets; build it with TargetSets.create(indptr, "
                "indices, classes)"
            )
        sets = TargetSets.create(
            sets.indptr, sets.indices, classes or MOST_CLASSES, sets.counts, sets.weights
        )
        classes = _told(classes, int(sets.indices.max()) + 1)
        check_labels(sets.indices, classes, "target_sets")
        if sets.weights is None and int(torch.diff(sets.indptr).max()) >= classes:
            raise InputError("a target set holds every class; leave one out or raise classes")
        rows = torch.repeat_interleave(
            torch.arange(sets.counts.numel(), device="cpu"), torch.diff(sets.indptr)
        )
        counts = torch.zeros(classes, dtype=torch.int64, device="cpu").index_add_(
            0, sets.indices, sets.counts[rows]
        )
        return cls(classes, counts, {"target_sets": sets}, None, sets)

    @classmethod
    def _of_multiplicities(cls, classes: int | None, values: Any) -> Samples:
        if classes is None:
            raise InputError(
                "classes is needed beside multiplicities; give the number of classes K >= 2"
            )
        if isinstance(values, str):
            try:
                pairs = [[int(x) for x in word.split(":")] for word in values.split(",")]
                values = {m: n for m, n in pairs}
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"multiplicities must be labels:samples,.. (as 1:310,2:20), got {values!r}"
                ) from error
        if not isinstance(values, Mapping):
            raise InputTypeError(
                f"multiplicities must be a dictionary {{labels of a set: samples of each}}, got "
                f"{values!r}"
            )
        made = cls._of_sets(classes, TargetSets.every(classes, values))
        return replace(made, given={"multiplicities": dict(values)})

    @classmethod
    def _of_vectors(cls, classes: int | None, values: Any) -> Samples:
        vectors = target_vectors(values)
        N, t = vectors.shape
        if classes not in (None, t):
            raise InputError(
                f"targets has {t} columns but classes is {classes}, the number of outputs; leave "
                f"classes out"
            )
        counts = torch.full((t,), N, dtype=torch.int64, device="cpu")
        return cls(t, counts, {"targets": vectors}, given_vectors=vectors)

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


def _told(classes: int | None, least: int) -> int:
    if classes is None and least < 2:
        raise InputError("the data name fewer than 2 classes; give classes >= 2")
    return least if classes is None else classes


def _vector(values: object, name: str) -> Tensor:
    vector = integers(values, name).cpu()
    if vector.ndim != 1:
        raise InputError(f"{name} must be a vector, got shape {tuple(vector.shape)}")
    return vector
