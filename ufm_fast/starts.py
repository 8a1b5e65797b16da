"""Initial points by name. All randomness comes from a generator on the CPU, so a seed means the
same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.arguments import whole
from ufm_fast.deep_starts import deep_start
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.errors import InputError
from ufm_fast.losses import SquaredError
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.sharded_starts import sharded_start
from ufm_fast.tall import matched, of_first, orthonormal
from ufm_fast.weighted_targets import WeightedTargets

#: Starts that a seed changes, whatever the problem: what restarts need.
RANDOM_STARTS = ("normal", "orthogonal", "balanced", "small")
STARTS = (*RANDOM_STARTS, "spectral")
DEFAULT_START = "spectral"
#: Up to this many classes or rows the spectral start takes a dense SVD.
_DENSE = 4096


def make_start(
    objective: Objective, name: str = DEFAULT_START, *, seed: int | None = None, scale: float = 1.0
) -> Point:
    """Initial point in the solver's variables.

    - ``normal``: W and H iid N(0, 1/d), so that logits are of order 1/sqrt(d). With layers all
      factors are normal in the balanced variables (`penalties`), of variance 1/width of their
      input, 2/width behind a ReLU;
    - ``orthogonal``: random factors with orthonormal rows or columns, in the balanced variables;
    - ``small``: ``normal`` times 1e-3, near the saddle at zero, where dynamics start in the papers'
      figures. With layers zero is a strict local minimum, and that is where it ends;
    - ``balanced``: random, but with A'A = B'B as critical points have (lambda_w W'W = lambda_h H'H
      in the model); one layer;
    - ``spectral``: the balanced factors of the logits that each class would have at the minimum of
      a balanced problem with its own count (for equal counts and d >= K - 1 that is the minimiser,
      a simplex ETF); a random code where d < K - 1. Of target vectors it is the minimiser, but for
      a penalised bias. With layers each factor takes its share of the singular values of a simplex,
      or of an orthogonal frame (squared error, ReLU), whose level has the least value on its ray.

    All are multiplied by ``scale``. The bias starts at zero. On spheres the rows are then scaled to
    length one. On several ranks each has its blocks of the start (`sharded_starts`).
    Errors: InputError for an unknown name, or ``balanced`` with layers.
    """
    if name not in STARTS:
        raise InputError(f"start must be one of {', '.join(STARTS)} or a file; got {name!r}")
    problem, layout = objective.problem, objective.layout
    seed = problem.seed if seed is None else whole(seed, "seed", 0, 2**63 - 1)
    generator = torch.Generator().manual_seed(seed)
    own_rows = problem.dense and name == "spectral" and objective.trunk.empty
    if layout is not None and not own_rows:
        strength = levels(objective) * objective.rows.counts.double().sqrt()
        spread = sharded_start(
            objective, name, seed, strength, lambda one: _dense_spectral(one, generator)
        )
        W, H, hidden = spread.W, spread.H, spread.hidden
    elif not objective.trunk.empty:
        W, H, hidden = deep_start(objective, name, _drawing(generator))
    elif name == "spectral":
        (W, H), hidden = _spectral(objective, generator), ()
    else:
        (W, H), hidden = _random(objective, name, generator), ()
    device = torch.device(problem.device)
    bias = (
        None
        if problem.bias == "none"
        else torch.zeros(W.shape[0], dtype=objective.dtype, device=device)
    )
    start = Point(W, H, None, hidden, layout).scale(scale).to(dtype=objective.dtype, device=device)
    return objective.geometry.project(replace(start, b=bias))


def _random(objective: Objective, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    problem, R = objective.problem, objective.rows.number
    shapes = (problem.num_classes, problem.dim), (R, problem.dim)
    B, A = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) / math.sqrt(problem.dim)
        for shape in shapes
    )
    if name == "balanced":
        return matched(B, A, min(problem.num_classes, R, problem.dim))
    if name == "orthogonal":
        return orthonormal(B), orthonormal(A)
    factor = 1e-3 if name == "small" else 1.0
    return factor * B / objective.scales.weight, factor * A / objective.scales.rows.double().cpu()


def levels(objective: Objective) -> Tensor:
    """Logit gap of each row at the minimum of the balanced problem with its count, float64 (R,)."""
    problem, K = objective.problem, objective.problem.num_classes
    counts = objective.rows.counts.double()
    if objective.geometry.curved:  # rows have length one whatever it is
        return torch.ones_like(counts)
    # A frozen factor may have no penalty: its level is that of equal ones.
    strength = (
        problem.num_samples
        * (problem.mu or max(problem.lambda_w, problem.lambda_h))
        / counts.sqrt()
    )
    if isinstance(problem.loss, SquaredError):
        return (1.0 - strength).clamp_min(1e-2)
    off = strength / K + problem.loss.smoothing / K
    return torch.log1p((1.0 - K * off.clamp_max(0.9 / K)) / off.clamp_max(0.9 / K))


def _coded(objective: Objective) -> bool:
    """Whether the spectral start is a random code."""
    K, d, R = objective.problem.num_classes, objective.problem.dim, objective.rows.number
    return d < min(R, K - 1) or max(R, K) > _DENSE


def _dense_spectral(objective: Objective, generator: torch.Generator) -> Point | None:
    if not objective.trunk.empty:
        W, H, hidden = deep_start(objective, "spectral", _drawing(generator))
        return Point(W, H, None, hidden)
    return None if _coded(objective) else Point(*_spectral(objective, generator))


def _drawing(generator: torch.Generator) -> Callable[[str, tuple[int, int]], Tensor]:
    """Normal factors, one after the other."""
    return lambda name, shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def _spectral(objective: Objective, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    problem, K, d, R = (
        objective.problem,
        objective.problem.num_classes,
        objective.problem.dim,
        objective.rows.number,
    )
    if problem.dense:
        return _of_vectors(objective)
    level = levels(objective)
    strength = level * objective.rows.counts.double().sqrt()
    targets = objective.rows.targets
    if _coded(objective):
        return _random_code(targets.slice(0, R), strength, K, d, generator)
    rows, columns = targets.slice(0, R)
    Z = torch.zeros(R, K, dtype=torch.float64)
    Z[rows, columns] = strength[rows]
    if isinstance(
        targets, WeightedTargets
    ):  # sets of all classes would leave nothing, once they are centred
        Z[rows, columns] *= targets.weights / targets.sums()[rows]
    if not isinstance(problem.loss, SquaredError) or problem.bias == "free":
        Z -= Z.mean(1, keepdim=True)
    U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    return _factors(objective, U, s, Vh.T, objective.rows.counts)


def _of_vectors(objective: Objective) -> tuple[Tensor, Tensor]:
    """Factors of the targets' singular values less the price of each; a hundredth is left of those
    that cost more. On several ranks this one's rows of them.
    """
    problem, targets = objective.problem, objective.rows.targets
    assert isinstance(targets, DenseTargets)
    counts, layout = objective.rows.counts, objective.layout
    U, s, V, mean = targets.spectrum(counts, centred=problem.bias == "free")
    price = problem.num_samples * (problem.mu or max(problem.lambda_w, problem.lambda_h))
    if layout is not None:  # of the first one's directions, whose signs another machine may turn
        s, V = (of_first(x, layout.mesh) for x in (s, V))
        Y, counts = targets.values[layout.row_part], counts[layout.row_part]
        U = (Y if mean is None else Y - mean) * counts.double().sqrt()[:, None] @ V
        U, V = torch.where(s > 0, U / s, 0.0), V[layout.class_part]
    return _factors(objective, U, torch.maximum(s - price, 1e-2 * s), V, counts)


def _factors(
    objective: Objective, U: Tensor, s: Tensor, V: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, A) of the solver's variables whose weighted logits D^1/2 Z are U diag(s) V', the d
    largest of them, of as many classes and rows as V and U have.
    """
    K, d, R = len(V), objective.problem.dim, len(U)
    keep = min(d, s.numel())
    # The logits of a row are <b, a> / (sqrt(n) scales): the factors of Z are those of the solver's
    # variables already, once the rows' own scale is taken out.
    scale = (
        objective.scales.rows.double().cpu()
        * objective.scales.weight
        * counts.double().sqrt()[:, None]
    )
    A, B = torch.zeros(R, d, dtype=torch.float64), torch.zeros(K, d, dtype=torch.float64)
    A[:, :keep] = U[:, :keep] * s[:keep].sqrt() / scale
    B[:, :keep] = V[:, :keep] * s[:keep].sqrt()
    return B, A


def _random_code(
    entries: tuple[Tensor, Tensor], strength: Tensor, K: int, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random unit codewords, features along their own: for where K vectors cannot be spread
    evenly.
    """
    code = torch.nn.functional.normalize(
        torch.randn(K, d, dtype=torch.float64, generator=generator), dim=1
    )
    rows, columns = entries
    B = code * strength.mean().sqrt()
    A = torch.zeros(strength.numel(), d, dtype=torch.float64).index_add_(0, rows, code[columns])
    return B, A * (strength / strength.mean().sqrt())[:, None]
