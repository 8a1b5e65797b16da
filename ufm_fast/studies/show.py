"""What a study says in a few rows: mean and spread over seeds of the best over starts, and slopes
on logarithms.

A row of the table is the best of its cell's starts. Cells that differ in their seed alone are a
group: its mean and its standard deviation (with n - 1) are over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ufm_fast.errors import InputError
from ufm_fast.studies.spec import finite
from ufm_fast.studies.table import UNFINISHED, Row

#: Columns that ``ufm-fast study show`` shows where none are named.
SHOWN = ("value", "relative_gap", "evaluations", "seconds")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Group:
    """Finished cells that differ in their seed alone: their place on the other axes, and their
    rows.
    """

    place: dict[str, Any]
    rows: list[Row]

    def numbers(self, column: str) -> list[float]:
        """The finite numbers of a column; true and false count as 1 and 0."""
        values = [row.get(column) for row in self.rows]
        return [float(value) for value in values if isinstance(value, bool) or finite(value)]  # type: ignore[arg-type]

    def mean(self, column: str) -> tuple[float, float] | None:
        """Mean and standard deviation over the seeds (0 of one); None where the column has no
        numbers.
        """
        found = self.numbers(column)
        if not found:
            return None
        return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def finished(rows: Iterable[Row]) -> list[Row]:
    """Those rows that have a result."""
    return [row for row in rows if row["outcome"] != UNFINISHED]


def groups(
    rows: Sequence[Row], varied: Sequence[str], over: Sequence[str] = ("seed",)
) -> list[Group]:
    """The finished rows in groups of equal values of ``varied``, but for ``over``, in the order of
    the table.
    """
    names = [name for name in varied if name not in over]
    found: dict[str, Group] = {}
    for row in finished(rows):
        place = {name: row.get(name) for name in names}
        found.setdefault(repr(place), Group(place, [])).rows.append(row)
    return list(found.values())


def check_column(rows: Sequence[Row], column: str) -> None:
    """Errors: InputError for a column that no finished cell has numbers in."""
    done = finished(rows)
    if not done:
        raise InputError(
            "study: no cell is finished, so there is nothing to show; run the study first"
        )
    if not any(finite(row.get(column)) or isinstance(row.get(column), bool) for row in done):
        numeric = sorted({name for row in done for name, value in row.items() if finite(value)})
        raise InputError(
            f"column: {column!r} has no numbers in this study; those that have are "
            f"{', '.join(numeric)}"
        )


# ---- slopes


@dataclass(frozen=True)
class Slope:
    """d log y / d log x by least squares; ``low`` and ``high`` hold 95 % of the slopes of resampled
    seeds (None of one).
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def words(self) -> str:
        return (
            f"{self.value:.3g}"
            if self.low is None
            else f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"
        )


def slope(rows: Sequence[Row], column: str, against: str, seed: int = 0) -> Slope | None:
    """The slope of log ``column`` on log ``against`` over all rows; None where fewer than two
    places have positive numbers.

    The interval: all rows of a seed are drawn together, with replacement, a thousand times (a
    bootstrap over seeds).
    """
    points: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        x, y = row.get(against), row.get(column)
        if finite(x) and finite(y) and x > 0 and y > 0:  # type: ignore[operator]
            points.setdefault(row.get("seed"), []).append((math.log(x), math.log(y)))  # type: ignore[arg-type]
    curves = [np.array(curve) for curve in points.values()]
    value = _fit(curves)
    if value is None:
        return None
    if len(curves) < 2:
        return Slope(value)
    random = np.random.default_rng(seed)
    drawn = (
        _fit([curves[i] for i in random.integers(len(curves), size=len(curves))])
        for _ in range(_RESAMPLES)
    )
    low, high = np.percentile([one for one in drawn if one is not None], [2.5, 97.5])
    return Slope(value, float(low), float(high))


def _fit(curves: Sequence[np.ndarray[Any, Any]]) -> float | None:
    if not curves:
        return None
    x, y = np.concatenate(curves).T
    if np.ptp(x) == 0:
        return None
    x = x - x.mean()
    return float(
        np.sum(x * y) / np.sum(x * x)
    )  # LAPACK's least squares start threads, a thousand times here
