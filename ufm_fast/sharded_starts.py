"""Starts that are spread over ranks: each rank draws the rows that it holds, the same on any number
of ranks.

Normal numbers are drawn by blocks of 1,024 rows, from a generator that the seed, the part and the
block's number seed. They are not those of a start in one process, whose generator runs through W
and then H. The spectral start of up to 4,096 classes and rows is worked out by the first rank, as
in one process; beyond that, or with d < K - 1, it is a random code, whose rows of H are the code
words of their classes. With layers the spectral start is worked out by every rank, of any
size; of target vectors each works out its rows (`starts`). Orthonormal and balanced factors are
made of the normal ones by their triangular factors (`tall`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ufm_fast.deep_starts import deep_start
from ufm_fast.layout import Layout
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.tall import matched, orthonormal

_BLOCK = 1 << 10  # rows of a generator


def normal_rows(seed: int, part: str, rows: slice, columns: int) -> Tensor:
    """Rows of a normal matrix of any height, float64; the same whatever slice they are asked for
    in.
    """
    found = torch.empty(rows.stop - rows.start, columns, dtype=torch.float64)
    for number in range(rows.start // _BLOCK, -(-rows.stop // _BLOCK)):
        digest = hashlib.sha256(f"{seed} {part} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.randn(_BLOCK, columns, generator=generator, dtype=torch.float64)
        begin = number * _BLOCK
        first, last = max(rows.start, begin), min(rows.stop, begin + _BLOCK)
        found[first - rows.start : last - rows.start] = drawn[first - begin : last - begin]
    return found


def chosen_rows(
    seed: int, part: str, wanted: Tensor, columns: int, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Those rows of it, after ``change``, in any order: a block at a time."""
    found = torch.zeros(wanted.numel(), columns, dtype=torch.float64)
    for number in torch.unique(wanted // _BLOCK).tolist():
        here = torch.nonzero(wanted // _BLOCK == number)[:, 0]
        rows = change(
            normal_rows(seed, part, slice(number * _BLOCK, (number + 1) * _BLOCK), columns)
        )
        found[here] = rows[wanted[here] - number * _BLOCK]
    return found


def sharded_start(
    objective: Objective,
    name: str,
    seed: int,
    strength: Tensor,
    dense: Callable[[Objective], Point | None],
) -> Point:
    """The point of this rank in the solver's variables. ``dense``: the spectral start of a whole
    objective, None for a code; ``strength`` (R,): the logit gap of each row times the root of its
    count.
    """
    layout, problem = objective.layout, objective.problem
    assert layout is not None
    if name != "spectral" and not objective.trunk.empty:
        drawn = deep_start(objective, name, partial(_part, layout, seed), layout.row_part)
        return Point(drawn[0], drawn[1], None, drawn[2])
    if name in ("orthogonal", "balanced"):
        return _framed(objective, layout, name, seed)
    if name != "spectral":
        d = problem.dim
        factor = (1e-3 if name == "small" else 1.0) / math.sqrt(d)
        W = normal_rows(seed, "W", layout.class_part, d).mul_(factor).div_(objective.scales.weight)
        W = W.to(objective.dtype)  # before the next one is drawn, in float64
        H = normal_rows(seed, "H", layout.row_part, d).mul_(factor)
        return Point(W, H.div_(objective.scales.rows.double().cpu()).to(objective.dtype))
    whole = dense(Objective(problem, reduce=objective.reduce, variables=objective.variables))
    if whole is None:
        return _code(objective, layout, seed, strength)
    shared = whole.to(device=layout.mesh.device).map(layout.mesh.shared).to(device="cpu")
    return cut(layout, shared)


def _framed(objective: Objective, layout: Layout, name: str, seed: int) -> Point:
    """Random factors with orthonormal columns, or with one Gram matrix, made of normal ones."""
    K, R, d = layout.classes, layout.rows, objective.problem.dim
    W, H = (_part(layout, seed, part, (n, d)) / math.sqrt(d) for part, n in (("W", K), ("H", R)))
    if name == "balanced":
        return Point(*matched(W, H, min(K, R, d), layout.mesh))
    return Point(orthonormal(W, layout.mesh), orthonormal(H, layout.mesh))


def _code(objective: Objective, layout: Layout, seed: int, strength: Tensor) -> Point:
    """Random unit codewords, features along those of their targets (`starts._random_code`)."""
    problem, rows = objective.problem, layout.row_part
    root, unit = strength.mean().sqrt(), torch.nn.functional.normalize
    W = unit(normal_rows(seed, "W", layout.class_part, problem.dim)) * root
    entry_rows, columns = objective.rows.targets.slice(rows.start, rows.stop)
    code = chosen_rows(seed, "W", columns, problem.dim, unit)
    H = torch.zeros(rows.stop - rows.start, problem.dim, dtype=torch.float64).index_add_(
        0, entry_rows, code
    )
    return Point(W, H * (strength[rows] / root)[:, None])


def _part(layout: Layout, seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """The rows here of a normal part of a point; all of a hidden layer, which has ``shape``."""
    blocks = {"H": layout.row_part, "W": layout.class_part, "b": layout.class_part}
    return normal_rows(seed, name, blocks.get(name, slice(0, shape[0])), shape[1])


def sharded_normal(x: Point, seed: int = 0) -> Point:
    """A normal point like x, of which this rank draws its blocks, and the hidden layers."""
    layout = x.layout
    assert layout is not None

    def drawn(name: str, part: Tensor) -> Tensor:
        shape = len(part), part.shape[1] if part.ndim == 2 else 1
        return _part(layout, seed, name, shape).reshape(part.shape).to(part)

    return replace(
        Point.of({name: drawn(name, part) for name, part in x.named().items()}), layout=layout
    )


def cut(layout: Layout, x: Point) -> Point:
    """This rank's blocks of a whole point."""
    b = None if x.b is None else x.b[layout.class_part]
    return replace(x, W=x.W[layout.class_part], H=x.H[layout.row_part], b=b, layout=layout)
