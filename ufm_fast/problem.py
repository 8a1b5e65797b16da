"""Problem: what is minimised, over which data, in which numbers. Everything is checked when it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ufm_fast.arguments import MOST, integers, number, whole
from ufm_fast.datasets import load_labels
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.losses import Loss, make_loss
from ufm_fast.targets import Rows, Targets, TargetSets, check_labels

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BIASES = ("none", "penalised", "free")
FREEZES = (None, "w", "h")
REDUCTIONS = ("auto", "classes", "none")
#: Beyond these no machine holds the vectors; a number that large is a slip.
MOST_CLASSES, MOST_DIM = 2**28, 2**31 - 1
#: Smaller or larger ones leave nothing of the objective in float64. Written out: 1 / 1e-30 is a little less than 1e30.
LEAST_PENALTY, MOST_PENALTY = 1e-30, 1e30
#: With a smaller one a bias is free but for rounding, and neither theory nor certificate can tell.
LEAST_BIAS_PENALTY = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """The regularised unconstrained features model.

    f(W, H, b) = (1/N) sum_i l(W h_i + b, y_i) + lambda_w/2 |W|^2 + lambda_h/2 |H|^2 + lambda_b/2 |b|^2

    with H of shape N x d (a row per sample), W of shape K x d, b of shape (K,). Data are given by exactly one of

    - ``per_class``: n samples of each of the K classes;
    - ``counts``: K class counts (zeros allowed: an empty class still is an output);
    - ``labels``: integers in [0, K), an array or tensor, a .npy file, or the name of a data set (``digits``, ``glyphs``);
    - ``target_sets``: a TargetSets of multi-label data (loss ``pick-all``).

    ``dataclasses.replace(problem, lambda_w=...)`` works: what a problem derives from its data (``counts``, ``target_sets``) is
    derived anew. ``classes`` may be left out where the data tell it. ``bias``: 'none', 'penalised' (lambda_b > 0) or
    'free'. ``freeze``: 'w' or 'h' keeps that factor at its initial value. ``loss``: a name of LOSSES or a loss object;
    ``smoothing`` and ``gamma`` are its parameters. ``dtype``: 'float64', 'float32' or 'bfloat16'.

    Errors: InputError / InputTypeError naming the argument, the value and what is allowed.
    Source: Tirer and Bruna, arXiv 2202.08087; Zhu et al., arXiv 2105.02375.
    """

    dim: int
    classes: int | None = None
    per_class: int | None = None
    counts: Any = None
    labels: Any = None
    target_sets: TargetSets | None = None
    loss: Any = "ce"
    smoothing: float = 0.0
    gamma: float | None = None
    lambda_w: float = 5e-4
    lambda_h: float = 5e-4
    lambda_b: float = 0.0
    bias: str = "none"
    freeze: str | None = None
    dtype: str = "float64"
    device: str = "cpu"
    seed: int = 0
    _labels: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._set("dim", whole(self.dim, "dim", 1, MOST_DIM))
        self._set("seed", whole(self.seed, "seed", 0, 2**63 - 1))
        if self.classes is not None:
            self._set("classes", whole(self.classes, "classes", 2, MOST_CLASSES))
        if isinstance(self.loss, str):
            self._set("loss", self._named_loss(self.loss))
        elif not isinstance(self.loss, Loss):
            raise InputTypeError(f"loss must be a name or a loss object, got {type(self.loss).__name__}")
        elif (self.smoothing or self.gamma is not None) and self.loss != self._named_loss(self.loss.name):
            raise InputError("smoothing and gamma go with a loss given by name; set them in the loss object")
        self._check_choices()
        self._check_data()
        self._check_penalties()

    def _named_loss(self, name: str) -> Loss:
        return make_loss(name, smoothing=self.smoothing, gamma=self.gamma)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        for name, value, allowed in (
            ("bias", self.bias, BIASES),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
        if self.freeze not in FREEZES:
            raise InputError(f"freeze must be w or h, or be left out (None in Python); got {self.freeze!r}")
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"device {self.device!r} is unknown; use cpu, cuda or cuda:0") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda is not available on this machine; use cpu (--device cpu or auto)")
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda, got {self.device!r}")

    def _check_data(self) -> None:
        given = [n for n in ("labels", "per_class", "target_sets", "counts") if getattr(self, n) is not None]
        # dataclasses.replace hands on what another problem derived from its data: it is derived anew.
        given = [n for n in given if not _is_derived(getattr(self, n))] or given[-1:]  # counts, if they are another's
        if len(given) > 1:
            raise InputError(
                f"give one of per_class, counts, labels, target_sets; got {' and '.join(given)} (for dataclasses.replace, "
                f"set the other to None)"
            )
        for name in ("counts", "target_sets"):
            if name not in given:
                self._set(name, None)
        multi_label = getattr(self.loss, "multi_label", False)
        if self.target_sets is not None:
            self._from_target_sets()
        elif self.labels is not None:
            self._from_labels()
        elif self.counts is not None:
            self._from_counts()
        else:
            self._from_per_class()
        if multi_label and self.target_sets is None:
            self._set("target_sets", _derived(self._single_targets()))

    def _from_labels(self) -> None:
        labels = load_labels(self.labels) if _is_path(self.labels) else _vector(self.labels, "labels")
        if labels.numel() == 0:
            raise InputError("labels must hold at least one sample")
        labels = check_labels(labels, self.classes or MOST_CLASSES)
        self._set_classes(int(labels.max()) + 1)
        self._set("_labels", labels)
        self._set("counts", _derived(torch.bincount(labels, minlength=self.num_classes)))

    def _from_per_class(self) -> None:
        n = whole(1 if self.per_class is None else self.per_class, "per_class", 1)
        self._set("per_class", n)
        if self.classes is None:
            raise InputError("classes is needed beside per_class; give the number of classes K >= 2")
        if n * self.num_classes > MOST:
            raise InputError(f"per_class times classes must be at most {MOST} samples, got {n * self.num_classes:.3g}")
        self._set("counts", _derived(torch.full((self.num_classes,), n, dtype=torch.int64)))

    def _from_counts(self) -> None:
        counts = _vector(self.counts, "counts")
        if counts.numel() < 2:
            raise InputError(
                f"counts must hold an entry for each of at least 2 classes (0 for an empty one), got {counts.numel()}"
            )
        self._set_classes(counts.numel())
        self._set("counts", counts)
        if counts.numel() != self.num_classes:
            raise InputError(f"counts has {counts.numel()} entries but classes is {self.num_classes}; make them agree")
        if bool((counts < 0).any()) or not bool(counts.any()):
            raise InputError("counts must be non-negative with at least one sample in all")
        if float(counts.double().sum()) > MOST:
            raise InputError(f"counts must sum to at most {MOST} samples, got {float(counts.double().sum()):.3g}")

    def _single_targets(self) -> TargetSets:
        """A set of one class for each sample, or for each class that has samples."""
        if self._labels is not None:
            return TargetSets(torch.arange(self._labels.numel() + 1), self._labels, torch.ones_like(self._labels))
        y = torch.nonzero(self.counts).reshape(-1)
        return TargetSets(torch.arange(y.numel() + 1), y, self.counts[y])

    def _from_target_sets(self) -> None:
        sets = self.target_sets
        if not isinstance(sets, TargetSets):
            raise InputTypeError("target_sets must be a TargetSets; build it with TargetSets.create(indptr, indices, classes)")
        if not getattr(self.loss, "multi_label", False):
            raise InputError(f"target_sets goes with the loss pick-all, not {self.loss.name}; choose loss pick-all")
        sets = TargetSets.create(sets.indptr, sets.indices, self.classes or MOST_CLASSES, sets.counts)
        self._set("target_sets", sets)
        self._set_classes(int(sets.indices.max()) + 1)
        check_labels(sets.indices, self.num_classes, "target_sets")
        if int(torch.diff(sets.indptr).max()) >= self.num_classes:
            raise InputError("a target set holds every class; leave one out or raise classes")
        rows = torch.repeat_interleave(torch.arange(sets.counts.numel()), torch.diff(sets.indptr))
        counts = torch.zeros(self.num_classes, dtype=torch.int64).index_add_(0, sets.indices, sets.counts[rows])
        self._set("counts", _derived(counts))

    def _set_classes(self, found: int) -> None:
        if self.classes is None:
            if found < 2:
                raise InputError("the data name fewer than 2 classes; give classes >= 2")
            self._set("classes", found)

    def _check_penalties(self) -> None:
        for name in ("lambda_w", "lambda_h", "lambda_b"):
            value = number(getattr(self, name), name)
            if value < 0:
                raise InputError(f"{name} must be a finite number >= 0, got {value}")
            if value != 0 and not LEAST_PENALTY <= value <= MOST_PENALTY:
                raise InputError(f"{name} must be 0 or lie in [{LEAST_PENALTY:g}, {MOST_PENALTY:g}], got {value}")
            self._set(name, value)
        if 0 < self.lambda_b < LEAST_BIAS_PENALTY:
            raise InputError(
                f"lambda_b must be 0 or at least {LEAST_BIAS_PENALTY:g}, got {self.lambda_b}; use bias 'free' for less"
            )
        for name, frozen in (("lambda_w", "w"), ("lambda_h", "h")):
            if getattr(self, name) == 0 and self.freeze != frozen:
                raise InputError(f"{name} = 0 leaves the objective without a minimiser; give {name} > 0 or freeze {frozen}")
        if self.bias == "penalised" and self.lambda_b == 0:
            raise InputError("bias 'penalised' needs lambda_b > 0; give lambda_b or choose bias 'free'")
        if self.bias != "penalised" and self.lambda_b > 0:
            raise InputError(f"lambda_b = {self.lambda_b} contradicts bias {self.bias!r}; choose bias 'penalised'")
        empty = self.bias == "free" and self.loss.name != "mse" and bool((self.counts == 0).any())
        if empty and not self.loss.smoothing:
            raise InputError("a free bias has no minimiser when a class is empty; choose bias 'penalised' or drop the class")

    @property
    def num_classes(self) -> int:
        """K, the number of outputs."""
        assert self.classes is not None
        return self.classes

    @cached_property
    def num_samples(self) -> int:
        """N: samples, also for multi-label data (not samples times targets)."""
        return int(self.counts.sum()) if self.target_sets is None else self.target_sets.num_samples

    @property
    def mu(self) -> float:
        """sqrt(lambda_w lambda_h), the coefficient of the nuclear norm in the convex form."""
        return math.sqrt(self.lambda_w * self.lambda_h)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @cached_property
    def sample_labels(self) -> Tensor:
        """Labels of the N samples, int64 (N,); by ascending class when the data were given as counts."""
        if self._labels is not None:
            return self._labels
        return torch.repeat_interleave(torch.arange(self.num_classes), self.counts)

    def reduction(self, reduce: str = "auto") -> str:
        """What ``reduce`` means here, 'classes' or 'none'. Frozen features are given one a sample, and merging would change
        them: 'auto' is 'none' there, and 'classes' otherwise. Errors: InputError for another name, or 'classes' there.
        """
        if reduce not in REDUCTIONS:
            raise InputError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
        if self.freeze == "h" and reduce == "classes":
            raise InputError("reduce classes merges the features that freeze h holds fixed; use reduce none")
        return ("none" if self.freeze == "h" else "classes") if reduce == "auto" else reduce

    def rows(self, reduce: str = "classes") -> Rows:
        """Rows to solve on. 'classes': one row for each non-empty class (or distinct target set), exact because samples
        with equal targets have equal features at a minimum. 'none': one row a sample.
        """
        if reduce not in ("classes", "none"):
            raise InputError(f"reduce must be classes or none, got {reduce!r}")
        if self.target_sets is not None:
            return self._set_rows(self.target_sets, reduce)
        if reduce == "classes":
            present = torch.nonzero(self.counts).reshape(-1)
            return Rows(Targets(present), self.counts[present])
        return Rows(Targets(self.sample_labels), torch.ones(self.num_samples, dtype=torch.int64))

    def sample_row(self) -> Tensor:
        """Row of ``rows('classes')`` that each of the N samples belongs to, int64 (N,): how a solution is lifted back."""
        if self.target_sets is not None:
            index = self.target_sets.grouped()[1]
            return torch.repeat_interleave(index, self.target_sets.counts)
        row_of_class = torch.cumsum(self.counts > 0, 0) - 1
        return row_of_class[self.sample_labels]

    def _set_rows(self, sets: TargetSets, reduce: str) -> Rows:
        if reduce == "classes":
            distinct = sets.grouped()[0]
            return Rows(Targets(distinct.indices, distinct.indptr), distinct.counts)
        sample_set = torch.repeat_interleave(torch.arange(sets.counts.numel()), sets.counts)
        sizes = torch.diff(sets.indptr)[sample_set]
        pointer = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        offset = torch.arange(int(pointer[-1])) - torch.repeat_interleave(pointer[:-1], sizes)
        indices = sets.indices[torch.repeat_interleave(sets.indptr[:-1][sample_set], sizes) + offset]
        return Rows(Targets(indices, pointer), torch.ones(sample_set.numel(), dtype=torch.int64))


def _is_path(value: object) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")


_Data = TypeVar("_Data", Tensor, TargetSets)


def _derived(data: _Data) -> _Data:
    """Mark what a problem worked out of its data, so that another one does not take it for data of its own."""
    object.__setattr__(data, "_ufm_derived", True)
    return data


def _is_derived(data: object) -> bool:
    return getattr(data, "_ufm_derived", False)


def _vector(values: object, name: str) -> Tensor:
    vector = integers(values, name).cpu()
    if vector.ndim != 1:
        raise InputError(f"{name} must be a vector, got shape {tuple(vector.shape)}")
    return vector
