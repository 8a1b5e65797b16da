"""ufm-fast: solve and study the unconstrained features model of neural collapse, at any number of
classes.

Names are imported when they are first used, so that ``import ufm_fast`` (and ``ufm-fast --help``)
do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ufm_fast.version import __version__

if TYPE_CHECKING:
    from ufm_fast.errors import InputError, InputTypeError
    from ufm_fast.objective import Objective
    from ufm_fast.point import Point
    from ufm_fast.problem import Problem
    from ufm_fast.solvers.solution import Outcome, Solution
    from ufm_fast.solving import solve
    from ufm_fast.studies.library import study
    from ufm_fast.targets import TargetSets

_HOME = {
    "InputError": "errors",
    "InputTypeError": "errors",
    "Objective": "objective",
    "Outcome": "solvers.solution",
    "Point": "point",
    "Problem": "problem",
    "Solution": "solvers.solution",
    "TargetSets": "targets",
    "solve": "solving",
    "study": "studies.library",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"ufm_fast.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ufm_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "InputError",
    "InputTypeError",
    "Objective",
    "Outcome",
    "Point",
    "Problem",
    "Solution",
    "TargetSets",
    "__version__",
    "solve",
    "study",
]
