"""Tables that fail closed: rows (serves(kind), row), looked up by ``Problem.kind``; no row means
none.

What holds for one model is wrong for the next, which differs from it by a field of the kind. So
nothing is taken for "the usual one": a row names what it serves, and a kind that no row names (a
loss of a user's own, a new trunk) has no theory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ufm_fast.kinds import Kind
from ufm_fast.problem import BIASES

Serves = Callable[[Kind], bool]
Row = TypeVar("Row")


def plain(
    *losses: str, bias: Sequence[str] = BIASES, frozen: Sequence[str | None] = (None,)
) -> Serves:
    """Serves the one-layer model without constraints, for the losses, biases and frozen factors
    named.
    """

    def serves(kind: Kind) -> bool:
        same = kind.trunk == "none" and kind.geometry == "none"
        return same and kind.loss in losses and kind.bias in bias and kind.frozen in frozen

    return serves


def layered(
    *losses: str, trunks: Sequence[str] = ("linear",), bias: Sequence[str] = BIASES
) -> Serves:
    """Serves the model with hidden layers of the trunks named, without constraints and with nothing
    frozen.
    """

    def serves(kind: Kind) -> bool:
        same = kind.trunk in trunks and kind.geometry == "none" and kind.frozen is None
        return same and kind.loss in losses and kind.bias in bias

    return serves


def sphere(kind: Kind) -> bool:
    """Serves cross-entropy (with smoothing) of unit rows."""
    return kind == Kind("none", "sphere", "ce", "none", None)


def adjusted_sphere(kind: Kind) -> bool:
    """Serves the same with adjusted logits."""
    return kind._replace(loss="ce") == Kind(
        "none", "sphere", "ce", "none", None
    ) and kind.loss in adjusted("ce")


def angular_sphere(kind: Kind) -> bool:
    """Serves the same with margins in the angle."""
    return kind == Kind("none", "sphere", "ce angular", "none", None)


def adjusted(*losses: str) -> tuple[str, ...]:
    """The names of these losses with offsets or margins, and with scales or penalties of each class
    (`adjustments`).
    """
    return tuple(f"{loss} {how}" for loss in losses for how in ("shifted", "scaled"))


def lookup(table: Sequence[tuple[Serves, Row]], kind: Kind) -> Row | None:
    """The row that serves ``kind``, or None. Rows of one table serve different kinds
    (`tests/test_tables.py`).
    """
    return next((row for serves, row in table if serves(kind)), None)


def in_words(kind: Kind, loss: object) -> str:
    """The kind for a message: what there is no row for."""
    parts = [f"loss {kind.loss or type(loss).__name__}", f"bias {kind.bias}"]
    parts += [f"trunk {kind.trunk}"] if kind.trunk != "none" else []
    parts += [f"geometry {kind.geometry}"] if kind.geometry != "none" else []
    parts += [f"frozen {kind.frozen}"] if kind.frozen else []
    return ", ".join(parts)
