"""Drop-in functions: a classifier head and its loss in one call, with torch's own signatures.

In ``from torch.nn.functional import linear_cross_entropy`` write ``ufm_fast.functional``: the same
arguments and results, on torch from 2.11 on.
"""

from ufm_fast.adjustments import Adjustment, make_adjustment
from ufm_fast.functional.derivatives import HeadEvaluation, HeadGradients, hvp, value_and_grad
from ufm_fast.functional.losses import (
    linear_cross_entropy,
    linear_focal_loss,
    linear_pick_all,
    linear_squared_error,
)
from ufm_fast.functional.row_outputs import RowOutputs, linear_cross_entropy_rows
from ufm_fast.functional.soft_targets import linear_soft_cross_entropy

__all__ = [
    "Adjustment",
    "HeadEvaluation",
    "HeadGradients",
    "RowOutputs",
    "hvp",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "linear_focal_loss",
    "linear_pick_all",
    "linear_soft_cross_entropy",
    "linear_squared_error",
    "make_adjustment",
    "value_and_grad",
]
