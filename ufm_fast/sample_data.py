"""The data of samples as users give them, checked: a reader for each kind.

Data come as a number a class, as counts, as groups of equal counts, as labels, as target sets, as
multiplicities or as target vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ufm_fast.arguments import MOST, integers, whole
from ufm_fast.class_groups import ClassGroups
from ufm_fast.datasets import load_labels
from ufm_fast.dense_targets import target_vectors
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.targets import TargetSets, check_labels

#: Beyond it no machine holds the vectors; a number that large is a slip.
MOST_CLASSES = 2**28


class Content(NamedTuple):
    """What was read: the fields of `Samples`, in their order."""

    classes: int
    counts: Tensor
    given: Mapping[str, Any]
    labels: Tensor | None = None
    sets: TargetSets | None = None
    vectors: Tensor | None = None


def read(classes: int | None, data: Mapping[str, Any]) -> Content:
    """The content of at most one of DATA, for so many classes; without any, one sample a class.

    Errors: InputError / InputTypeError naming the argument and the mend.
    """
    given = {name: data[name] for name in DATA if data.get(name) is not None}
    if len(given) > 1:
        raise InputError(f"give one of {', '.join(DATA)}; got {' and '.join(given)}")
    if classes is not None:
        classes = whole(classes, "classes", 1 if "targets" in given else 2, MOST_CLASSES)
    name, value = next(iter(given.items()), ("per_class", 1))
    return _READERS[name](classes, value)


def _of_labels(classes: int | None, values: Any) -> Content:
    is_path = isinstance(values, str) or hasattr(values, "__fspath__")
    labels = load_labels(values) if is_path else _vector(values, "labels")
    if labels.numel() == 0:
        raise InputError("labels must hold at least one sample")
    labels = check_labels(labels, classes or MOST_CLASSES)
    classes = _told(classes, int(labels.max()) + 1)
    return Content(classes, torch.bincount(labels, minlength=classes), {"labels": labels}, labels)


def _of_per_class(classes: int | None, per_class: Any) -> Content:
    n = whole(per_class, "per_class", 1)
    if classes is None:
        raise InputError("classes is needed beside per_class; give the number of classes K >= 2")
    if n * classes > MOST:
        raise InputError(
            f"per_class times classes must be at most {MOST} samples, got {n * classes:.3g}"
        )
    return Content(
        classes, torch.full((classes,), n, dtype=torch.int64, device="cpu"), {"per_class": n}
    )


def _of_counts(classes: int | None, values: Any) -> Content:
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
    return Content(counts.numel(), counts, {"counts": counts})


def _of_groups(classes: int | None, values: Any) -> Content:
    groups = (
        ClassGroups.of_words(values) if isinstance(values, str) else ClassGroups.of_pairs(values)
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
    return Content(groups.classes, groups.expanded(), {"groups": groups.runs})


def _of_sets(classes: int | None, sets: Any) -> Content:
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
    return Content(classes, counts, {"target_sets": sets}, None, sets)


def _of_multiplicities(classes: int | None, values: Any) -> Content:
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
    made = _of_sets(classes, TargetSets.every(classes, values))
    return made._replace(given={"multiplicities": dict(values)})


def _of_vectors(classes: int | None, values: Any) -> Content:
    vectors = target_vectors(values)
    N, t = vectors.shape
    if classes not in (None, t):
        raise InputError(
            f"targets has {t} columns but classes is {classes}, the number of outputs; leave "
            f"classes out"
        )
    counts = torch.full((t,), N, dtype=torch.int64, device="cpu")
    return Content(t, counts, {"targets": vectors}, vectors=vectors)


def _told(classes: int | None, least: int) -> int:
    if classes is None and least < 2:
        raise InputError("the data name fewer than 2 classes; give classes >= 2")
    return least if classes is None else classes


def _vector(values: object, name: str) -> Tensor:
    vector = integers(values, name).cpu()
    if vector.ndim != 1:
        raise InputError(f"{name} must be a vector, got shape {tuple(vector.shape)}")
    return vector


_READERS: dict[str, Callable[[int | None, Any], Content]] = {
    "labels": _of_labels,
    "per_class": _of_per_class,
    "targets": _of_vectors,
    "target_sets": _of_sets,
    "multiplicities": _of_multiplicities,
    "counts": _of_counts,
    "groups": _of_groups,
}
DATA = tuple(_READERS)
