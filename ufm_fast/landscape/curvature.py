"""The Hessian's smallest eigenvalue at a point by Lanczos, and of a small problem all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.arguments import number, whole
from ufm_fast.errors import InputError
from ufm_fast.lanczos import Lanczos
from ufm_fast.memory import available_bytes
from ufm_fast.objective import Objective
from ufm_fast.point import Point

#: Lanczos has converged at a residual of that times the eigenvalue, or times the curvature's unit
#: where that is larger.
RESIDUAL = 1e-8
#: Curvature that may be rounding: so many units in the last place of the largest.
_ROUNDING = 100.0
#: Dense Hessians have at most that many rows: matrices of 0.2 GB, and minutes.
_DENSE = 5_000


@dataclass(frozen=True)
class Curvature:
    """The smallest Hessian eigenvalue that Lanczos found, with its unit ``vector`` in the solver's
    variables.

    ``eigenvalue`` is the Rayleigh quotient of the vector, so that some eigenvalue is at most that,
    and one lies within ``residual`` = |Hv - eigenvalue v| of it. None lies below ``lower_bound``,
    but for ``failure_probability``: a rough bound, unless Lanczos came to its end (``exhausted``).
    ``largest``: the other end. ``products``: Hessian products used.
    """

    eigenvalue: float
    vector: Point
    residual: float
    products: int
    converged: bool
    exhausted: bool
    largest: float
    lower_bound: float
    failure_probability: float


class _Tangents:
    """The directions at a point along which it may move, as vectors of R^n in float64."""

    def __init__(self, objective: Objective, x: Point) -> None:
        self.objective, self.x = objective, x
        self.shapes = [part.shape for part in x.parts()]
        self.size = sum(shape.numel() for shape in self.shapes)
        frozen = {"w": x.W.numel(), "h": x.H.numel(), None: 0}[objective.problem.freeze]
        self.dimension = self.size - frozen - objective.geometry.held(x)

    def flat(self, v: Point) -> Tensor:
        return torch.cat([part.reshape(-1) for part in v.parts()]).double()

    def point(self, vector: Tensor) -> Point:
        """The tangent part of a vector, as a Point in the objective's dtype."""
        pieces = torch.split(
            vector.to(self.objective.dtype), [shape.numel() for shape in self.shapes]
        )
        parts = [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        names, frozen = self.x.named(), (self.objective.problem.freeze or "").upper()
        v = Point.of(
            {
                n: torch.zeros_like(p) if n == frozen else p
                for n, p in zip(names, parts, strict=True)
            }
        )
        return self.objective.geometry.tangent(self.x, v)

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian's."""
        return self.flat(self.objective.hvp(self.x, self.point(vector)))

    def start(self, seed: int) -> Tensor:
        """Uniform on the unit sphere but for its length; made on the host: the same whatever the
        device.
        """
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(self.size, dtype=torch.float64, generator=generator)
        return self.flat(self.point(normal.to(self.x.W.device)))


def curvature_unit(objective: Objective) -> float:
    """What an eigenvalue is small against: the least penalty of a factor that moves (mu in balanced
    variables), and on spheres, which have none, temperature / rows.
    """
    if objective.geometry.curved:
        return objective.problem.temperature / objective.rows.number
    of_w = torch.as_tensor(objective.scales.penalties.weight)
    penalties = {"w": float(of_w.min()), "h": float(objective.scales.penalties.rows.min())}
    moving = [value for name, value in penalties.items() if name != objective.problem.freeze]
    return min(*moving, *objective.scales.penalties.hidden, math.inf)


@torch.no_grad()
def smallest_curvature(
    objective: Objective,
    x: Point,
    *,
    max_products: int = 200,
    thorough: bool = False,
    failure_probability: float = 1e-9,
    seed: int = 0,
) -> Curvature:
    """The smallest eigenvalue of the Hessian at x (in the objective's variables) by at most
    ``max_products`` products.

    Lanczos with full orthogonalisation from a random tangent; it holds a vector for each product.
    It ends when the smallest Ritz pair has converged; with ``thorough`` only if that is negative,
    for each further product raises the lower bound.
    Errors: InputError for fewer than 2 products, a probability outside (0, 1), or vectors that do
    not fit the memory.
    """
    whole(max_products, "max_products", 2)
    if not 0 < number(failure_probability, "failure_probability") < 1:
        raise InputError(f"failure_probability must lie in (0, 1), got {failure_probability}")
    space, unit = _Tangents(objective, x), curvature_unit(objective)
    steps = min(max_products - 1, space.dimension)
    needed, free = 8 * steps * space.size, available_bytes(x.W.device)
    if needed > free:
        raise InputError(
            f"max_products = {max_products} vectors of {space.size} numbers need "
            f"{needed / 1e9:.3g} GB and {free / 1e9:.3g} GB "
            "are free; give fewer products"
        )
    krylov = Lanczos(space.product, space.start(seed), steps, space.dimension)
    while True:
        krylov.step()
        values, vectors = krylov.ritz()
        smallest, largest = float(values[0]), float(values[-1])
        small = max(
            RESIDUAL * max(abs(smallest), unit), 0.1 * rounding(objective, smallest, largest)
        )
        converged = krylov.off_diagonal[-1] * abs(float(vectors[-1, 0])) <= small
        if krylov.ended or (converged and (smallest < -RESIDUAL * unit or not thorough)):
            break
    vector = krylov.vector(vectors[:, 0])
    image = space.product(vector)
    eigenvalue = float(image @ vector)
    residual = float((image - eigenvalue * vector).norm())
    return Curvature(
        eigenvalue=eigenvalue,
        vector=space.point(vector),
        residual=residual,
        products=len(krylov.diagonal) + 1,
        converged=converged,
        exhausted=krylov.exhausted,
        largest=largest,
        lower_bound=_lower_bound(krylov, eigenvalue - residual, largest, failure_probability),
        failure_probability=failure_probability,
    )


def rounding(objective: Objective, smallest: float, largest: float) -> float:
    """Curvature that may be rounding, in the Hessian products of the problem's dtype."""
    return (
        _ROUNDING
        * torch.finfo(objective.problem.torch_dtype).eps
        * max(abs(smallest), abs(largest))
    )


def _lower_bound(
    krylov: Lanczos, smallest: float, largest: float, failure_probability: float
) -> float:
    """What no eigenvalue lies below: with the part e missed at either end, the width w is at most
    what was found + 2 e w.
    """
    if krylov.exhausted:
        return smallest
    missed = krylov.missed(failure_probability / 2)
    return (
        smallest - missed * (largest - smallest) / (1 - 2 * missed) if missed < 0.5 else -math.inf
    )


@torch.no_grad()
def spectrum(objective: Objective, x: Point) -> Tensor:
    """All eigenvalues of the Hessian along the space, ascending, float64: a product for each of the
    n numbers of x.

    Errors: InputError for n > 5,000, where `smallest_curvature` serves.
    """
    space = _Tangents(objective, x)
    if space.size > _DENSE:
        raise InputError(
            f"a dense Hessian takes at most {_DENSE} numbers, and the point has {space.size}; ask "
            f"the smallest only"
        )
    identity = torch.eye(space.size, dtype=torch.float64, device=x.W.device)
    basis = identity
    if (
        space.dimension < space.size
    ):  # the eigenvectors of the projection onto the tangents, whose eigenvalues are 0 and 1
        projection = torch.stack([space.flat(space.point(e)) for e in identity])
        basis = torch.linalg.eigh(projection).eigenvectors[:, space.size - space.dimension :]
    H = torch.stack([space.product(v) for v in basis.T]) @ basis
    values: Tensor = torch.linalg.eigvalsh(0.5 * (H + H.T))
    return values
