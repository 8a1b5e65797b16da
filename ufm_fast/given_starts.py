"""A point that a user gives, or that a run has saved, as a start: checked, with a row of H for each
row of the problem, in the solver's variables; on several ranks cut into their parts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.layout import Layout
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.sharded_starts import cut


def given_start(objective: Objective, point: Point) -> Point:
    """Solver variables of a model point that a user gives, with an H row for each row, or for each
    sample. On several ranks it is the whole point, or on each rank its part of one.

    Errors: InputError / InputTypeError for what does not fit the problem.
    """
    problem, layout = objective.problem, objective.layout
    _check_tensors(point)
    if point.layout is not None:
        _check_layout(objective, point.layout)
    else:
        point = replace(point, H=_of_rows(objective, point.H))
    _check_shapes(objective, point)
    start = point.to(device=torch.device(problem.device))
    if layout is not None and point.layout is None:
        start = cut(layout, start)
    if not start.finite():
        raise InputError("the start holds NaN or infinite values; give finite W, H and b")
    x = objective.from_model(start.W, start.H, start.b, start.hidden)
    if not x.finite():
        raise InputError(
            f"the start has entries beyond what {problem.dtype} holds; give smaller ones or dtype "
            f"float64"
        )
    return objective.geometry.project(x)


def _check_tensors(point: Point) -> None:
    if not isinstance(point, Point) or not all(
        isinstance(part, torch.Tensor) for part in point.parts()
    ):
        raise InputTypeError(
            "initial must be a Point of torch tensors: Point(W, H, b), with torch.as_tensor "
            "around arrays"
        )
    if not all(t.is_floating_point() and t.dtype.itemsize >= 2 for t in point.parts()):
        raise InputTypeError(
            "the start's W, H and b must be floating-point tensors of 16 bits and more"
        )


def _check_layout(objective: Objective, layout: Layout) -> None:
    """Of a start that ranks have parts of; they all find the same."""
    if objective.layout is None:
        raise InputError(
            "the start is one rank's part of a point; solve with backend sharded, or load its "
            "checkpoint in one process"
        )
    found, own = ((x.classes, x.rows, x.mesh.ranks) for x in (layout, objective.layout))
    if found != own:
        raise InputError(
            f"the start's classes, rows and ranks are {found}, and must be {own}; load its "
            f"checkpoint on these ranks"
        )


def _of_rows(objective: Objective, H: Tensor) -> Tensor:
    """A row for each row of the problem. Samples with equal targets start from their mean, the
    point of the reduced problem with the least penalty.
    """
    problem, rows = objective.problem, objective.rows.number
    if H.ndim == 2 and H.shape[0] == problem.num_samples != rows and H.shape[1] == problem.dim:
        index = problem.sample_row().to(H.device)
        H = torch.zeros(rows, problem.dim, dtype=H.dtype, device=H.device).index_add_(0, index, H)
        return H / objective.rows.counts.to(H)[:, None]
    return H


def _check_shapes(objective: Objective, point: Point) -> None:
    problem, layout, b = objective.problem, point.layout, point.b
    classes, rows = problem.num_classes, objective.rows.number
    if layout is not None:
        classes, rows = (x.stop - x.start for x in (layout.class_part, layout.row_part))
    if tuple(point.W.shape) != (classes, problem.head_dim):
        raise InputError(
            f"the start's W must have shape {(classes, problem.head_dim)}, got "
            f"{tuple(point.W.shape)}"
        )
    layers = [tuple(part.shape) for part in point.hidden]
    if layers != list(problem.trunk.shapes):
        raise InputError(
            f"the start's hidden layers must have shapes {list(problem.trunk.shapes)}, got {layers}"
        )
    if tuple(point.H.shape) != (rows, problem.dim):
        raise InputError(
            f"the start's H must have shape {(rows, problem.dim)} (or a row a sample), got "
            f"{tuple(point.H.shape)}"
        )
    if (b is None) != (problem.bias == "none"):
        raise InputError(
            f"the start {'has no' if b is None else 'has a'} bias b but bias is {problem.bias!r}; "
            f"make them agree"
        )
    if b is not None and tuple(b.shape) != (classes,):
        raise InputError(f"the start's b must have shape {(classes,)}, got {tuple(b.shape)}")
