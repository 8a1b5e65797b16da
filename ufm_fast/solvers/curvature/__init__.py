"""Curvatures: models of the Hessian that precondition L-BFGS and Newton-CG, one file each, one row
each of `table`.
"""

from ufm_fast.solvers.curvature.base import Curvature, Model
from ufm_fast.solvers.curvature.table import CURVATURES, curvature_of

__all__ = ["CURVATURES", "Curvature", "Model", "curvature_of"]
