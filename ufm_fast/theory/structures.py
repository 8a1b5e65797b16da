"""Structures of the papers that are feasible but not proved to be minima, recognised by their
values.

A run whose value agrees with one to 1e-8 has very probably found it: deep neural collapse, the
cross-polytope and other tight codes of cross-entropy (`deep.deep_code_value`), with layers, or with
one layer where K > d + 1; and deep neural collapse of the squared error behind ReLUs, whose frame
is orthogonal and non-negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ufm_fast.losses import CrossEntropy
from ufm_fast.problem import Problem
from ufm_fast.theory.codes import codes_of, polygon
from ufm_fast.theory.deep import deep_code_value, layered_mse
from ufm_fast.theory.tables import Serves, layered, lookup, plain

#: Relative difference of values up to which a structure counts as found.
AGREEMENT = 1e-8


@dataclass(frozen=True)
class Structure:
    """A structure's name and the value of its best member."""

    name: str
    value: float


def _codes(problem: Problem) -> list[Structure]:
    counts, width = problem.counts, min(problem.trunk.widths)
    n = int(counts[0])
    assert isinstance(problem.loss, CrossEntropy)
    if n == 0 or not bool((counts == n).all()) or problem.loss.smoothing:
        return []
    codes = [
        code
        for code in (*codes_of(problem.num_classes), polygon(problem.num_classes))
        if code.rank <= width
    ]
    return [
        Structure(code.name, deep_code_value(code, n, problem.mu, 1 + problem.layers))
        for code in codes
    ]


def _behind_relus(problem: Problem) -> list[Structure]:
    least = layered_mse(problem.counts, min(problem.trunk.widths), problem.mu, 1 + problem.layers)
    return [Structure("orthogonal frame (deep neural collapse)", least.value)]


#: Which structures are known for which kind of problem.
STRUCTURES: list[tuple[Serves, Callable[[Problem], list[Structure]]]] = [
    (plain("ce"), _codes),
    (layered("ce"), _codes),
    (layered("mse", trunks=("relu",), bias=("none",)), _behind_relus),
]


def structures(problem: Problem) -> list[Structure]:
    """Every structure that is known for ``problem``, feasible there; empty where none is."""
    of_kind = lookup(STRUCTURES, problem.kind)
    return [] if of_kind is None else of_kind(problem)


def recognise(problem: Problem, value: float) -> Structure | None:
    """The structure whose value this is, to 1e-8; None for none."""
    return next(
        (
            found
            for found in structures(problem)
            if abs(found.value - value) <= AGREEMENT * found.value
        ),
        None,
    )
