"""Target vectors: rows whose target is y_r in R^t, of regression and of encoded labels, under
squared error.

    l_r = 1/2 |W h_r + b - y_r|^2,      W is t x d, b is (t,)

They are a kind of targets beside labels and sets of labels: `Samples` are made of an N x t array,
rows with equal vectors are one row (as those of a class are: exact, for their features are equal at
a minimum), and backends see a `DenseTargets`. What names classes is not there: each method that
would is refused, the problem's kind is 'mse dense', and no row of a table that was made for one-hot
targets serves it.

Decisions

2026-11-30. Squared error with target vectors goes by residuals H W' + b - Y, in float64 by blocks
of rows. They are no more numbers than Y itself, which is there; Gram matrices save none of the
products with Y and lose the digits of small values (`backends/squared_error.py`), on several ranks
too (`backends/sharded_vectors.py`). One-hot targets, which are never written out, keep their Gram
matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.targets import Rows, Targets

#: Squares of larger entries, summed, overflow where squares of sums are taken.
LARGEST = 1e70
_SHAPE = "a row for each sample and a column for each output"


class Spectrum(NamedTuple):
    """U diag(values) V' = D^1/2 (Y - 1 mean'), D the rows' counts: (R, r), (r,) descending, (t, r);
    ``mean`` (t,) or None.
    """

    U: Tensor
    values: Tensor
    V: Tensor
    mean: Tensor | None


@dataclass(frozen=True)
class DenseTargets(Targets):
    """``values`` float64 (R, t), a row's target vector. ``indices`` is empty, and whatever asks for
    classes is refused.
    """

    values: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, values: Tensor) -> DenseTargets:
        return cls(torch.empty(0, dtype=torch.int64, device=values.device), values=values)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "values": self.values}

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def single(self) -> bool:
        return False

    def occupied(self, classes: int) -> NoReturn:
        raise _no_classes()

    def sizes(self) -> NoReturn:
        raise _no_classes()

    def slice(self, start: int, stop: int) -> NoReturn:
        raise _no_classes()

    def to(self, device: torch.device | str) -> DenseTargets:
        return (
            self
            if self.values.device == torch.device(device)
            else DenseTargets.of(self.values.to(device))
        )

    def part(self, start: int, stop: int) -> DenseTargets:
        return DenseTargets.of(self.values[start:stop])

    def spectrum(self, counts: Tensor, *, centred: bool) -> Spectrum:
        """Of the rows' targets, their weighted mean taken off if ``centred`` (a free bias is that
        mean). Remembered.
        """
        key = ("spectrum", centred)
        if key not in self.remembered:
            self.remembered[key] = _spectrum(self.values, counts.to(self.values), centred=centred)
        return cast("Spectrum", self.remembered[key])


def _no_classes() -> InputTypeError:
    return InputTypeError(
        "rows have target vectors, which name no classes; only squared error takes them"
    )


def _spectrum(Y: Tensor, counts: Tensor, *, centred: bool) -> Spectrum:
    mean = counts @ Y / counts.sum() if centred else None
    U, values, Vh = torch.linalg.svd(
        (Y if mean is None else Y - mean) * counts.sqrt()[:, None], full_matrices=False
    )
    # What centring leaves of targets that are all alike is rounding.
    noise = 4 * torch.finfo(Y.dtype).eps * float(Y.norm()) * float(counts.max()) ** 0.5
    return Spectrum(U, torch.where(values > noise, values, 0.0), Vh.T, mean)


def target_vectors(given: Any) -> Tensor:
    """An N x t array of real numbers as float64 on the CPU, a copy.

    Errors: InputError / InputTypeError for another shape, numbers that are not finite or too large,
    and no numbers.
    """
    if hasattr(given, "tocsr"):
        raise InputTypeError(
            f"targets must be a dense N x t array, {_SHAPE}, got a sparse one; give "
            f"targets.toarray()"
        )
    try:
        array = (
            given.detach().cpu()
            if isinstance(given, Tensor)
            else torch.from_numpy(_native(np.asarray(given)))
        )
    except (TypeError, ValueError) as error:
        raise InputTypeError(
            f"targets must be an N x t array of real numbers, {_SHAPE} ({error})"
        ) from error
    if array.dtype == torch.bool or array.is_complex() or array.layout != torch.strided:
        raise InputTypeError(
            f"targets must be a dense array of real numbers, got {array.dtype}; convert it to "
            f"float64"
        )
    if array.ndim != 2 or 0 in array.shape:
        mend = (
            ", which holds nothing"
            if 0 in array.shape
            else "; of one output give targets[:, None]"
            if array.ndim == 1
            else ""
        )
        raise InputError(f"targets must have shape N x t, {_SHAPE}, got {tuple(array.shape)}{mend}")
    values = array.to(torch.float64, copy=True)
    _check_finite(values)
    return values


def _native(array: np.ndarray) -> np.ndarray:
    """In this machine's byte order, laid out in rows, as torch reads it."""
    return array.astype(array.dtype.newbyteorder("="), order="C")


def _check_finite(values: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(values).all(1))[:, 0]
    if bad.numel():
        raise InputError(
            f"targets must be finite, got NaN or infinity in {bad.numel():,} rows, the first "
            f"{int(bad[0])}; drop or fill them"
        )
    if float(values.abs().max()) > LARGEST:
        raise InputError(
            f"targets has entries beyond {LARGEST:g}, whose squares overflow; divide it by a "
            f"constant"
        )


def merged_rows(values: Tensor) -> tuple[Rows, Tensor]:
    """Rows of equal targets as one, in the order in which they first appear, and the row of each
    sample, int64 (N,).
    """
    _, index, counts = torch.unique(values, dim=0, return_inverse=True, return_counts=True)
    samples = torch.arange(len(index))
    first = torch.full_like(counts, len(index)).scatter_reduce(0, index, samples, "amin")
    order = torch.argsort(first)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return Rows(DenseTargets.of(values[first[order]]), counts[order]), place[index]
