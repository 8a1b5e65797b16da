"""The table of curvatures: the first that serves an objective is its own; none is the multiple of
the identity.
"""

from __future__ import annotations

from ufm_fast.objective import Objective
from ufm_fast.solvers.curvature.base import Curvature
from ufm_fast.solvers.curvature.codes import Codes
from ufm_fast.solvers.curvature.pairs import Pairs
from ufm_fast.solvers.curvature.sets import Sets
from ufm_fast.solvers.curvature.squares import Squares

CURVATURES: tuple[Curvature, ...] = (Pairs(), Squares(), Sets(), Codes())


def curvature_of(objective: Objective) -> Curvature | None:
    """The row that serves, or None."""
    return next((row for row in CURVATURES if row.serves(objective)), None)
