"""The cells of a study: the grid of its axes, each cell with the settings of one solve.

A cell's name is the hash of its settings that are not the default, as the run library resolves
them: what is added to the settings later changes no name, and a study that grows by values finds
the cells that it has. With warm starts cells that differ in that axis alone are a chain, in the
order of the axis: each starts at the end of the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.files import config_hash
from ufm_fast.runs.options import SETTINGS
from ufm_fast.studies.expressions import evaluate
from ufm_fast.studies.predict import predict
from ufm_fast.studies.spec import Study

if TYPE_CHECKING:
    from ufm_fast.problem import Problem

_DIGITS = 12
#: Operations that stand for starting, saving and measuring a cell, shared out over its evaluations.
_OVERHEAD = 1e8
Chain = tuple["Cell", ...]


@dataclass(frozen=True)
class Cell:
    """One solve: ``given`` are the settings that the study gives it, ``columns`` the values of axes
    and derived values.
    """

    name: str
    given: Mapping[str, Any]
    columns: Mapping[str, Any]
    warm: bool = False

    @property
    def words(self) -> str:
        """The cell for a person: its place on the axes."""
        return ", ".join(f"{name} = {value}" for name, value in self.columns.items()) or self.name


def chains(study: Study) -> list[Chain]:
    """All cells in the order of the axes, the last axis fastest; one a chain, or those along the
    warm axis.

    Errors: InputError for cells that are equal, or whose settings contradict one another; ``check``
    asks the problems.
    """
    cells = [_cell(study, dict(columns)) for columns in _grid(study)]
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.name in seen:
            raise InputError(
                f"study: {cell.words} and {seen[cell.name].words} have the same settings, so they "
                f"are one cell; drop one"
            )
        seen[cell.name] = cell
    if study.warm is None:
        return [(cell,) for cell in cells]
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        rest = {
            name: value
            for name, value in cell.columns.items()
            if name != study.warm and name not in study.derived
        }
        found.setdefault(repr(rest), []).append(cell)
    return [tuple(chain) for chain in found.values()]


def _grid(study: Study) -> Sequence[list[tuple[str, Any]]]:
    rows = ([list(zip(axis.names, row, strict=True)) for row in axis.rows] for axis in study.axes)
    return [list(itertools.chain.from_iterable(parts)) for parts in itertools.product(*rows)]


def _cell(study: Study, columns: dict[str, Any]) -> Cell:
    known = {**study.solve, **columns}
    derived = evaluate(study.derived, known)
    values = {**known, **derived}
    given = {
        name: settings.typed(name, value) for name, value in values.items() if name in SETTINGS
    }
    if study.starts is not None:
        given["restarts"] = study.starts
    cell = Cell("", given, {**columns, **derived}, study.warm is not None)
    return Cell(config_hash(_named(cell))[:_DIGITS], given, cell.columns, cell.warm)


def _named(cell: Cell) -> dict[str, Any]:
    """The settings that make the name: those that are not the default. Errors: InputError naming
    the cell.
    """
    try:
        config = settings.resolve(cell.given)
    except InputError as error:
        raise in_cell(error, cell) from error
    return {name: value for name, value in config.items() if value != SETTINGS[name].default}


def in_cell(error: InputError, cell: Cell) -> InputError:
    """The error with the cell where it stands."""
    return type(error)(f"{error} (in the cell {cell.words})") if cell.columns else error


def problem_of(cell: Cell) -> tuple[Problem, dict[str, Any]]:
    """The cell's problem and configuration, with all checked that a solve checks before its first
    step.

    Errors: InputError naming the cell.
    """
    from ufm_fast.runs.job import check_choices, check_solvable

    try:
        config = settings.resolve(cell.given)
        check_choices(config)
        config["device"], _ = settings.pick_device(config["device"])
        problem = settings.build_problem(config)
        check_solvable(problem, config)
    except InputError as error:
        raise in_cell(error, cell) from error
    return problem, config


def check(studied: Sequence[Chain]) -> dict[str, float]:
    """Build every problem and let go of it: refused in words before anything runs. Returns each
    cell's share of the work.

    The share is the operations of an evaluation, beside what any cell costs.
    Errors: InputError naming the cell; where the points of a chain do not fit one another.
    """
    work = {}
    for chain in studied:
        shape = None
        for cell in chain:
            problem, config = problem_of(cell)
            rows = (
                min(problem.num_samples, problem.num_classes)
                if config["reduce"] != "none"
                else problem.num_samples
            )
            work[cell.name] = _OVERHEAD + predict(problem, config).flops
            found = (
                problem.num_classes,
                problem.dim,
                problem.bias != "none",
                problem.trunk.widths,
                rows,
            )
            if shape is not None and found != shape:
                raise InputError(
                    "study: along a warm axis W, H and b must keep their shapes, and they change "
                    "at "
                    f"{cell.words}; choose another axis for warm"
                )
            shape = found
    return work
