"""Starts of problems with layers, made in the balanced variables, where each of the P factors has
the penalty mu/2 |x|^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ufm_fast.dense_targets import DenseTargets
from ufm_fast.errors import InputError
from ufm_fast.losses import SquaredError
from ufm_fast.objective import Objective
from ufm_fast.penalties import balancing_scales
from ufm_fast.tall import orthonormal

Factors = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # W, H, hidden
#: Of ``small``: close to zero, which with layers is a strict local minimum.
SMALL = 1e-3


def deep_start(
    objective: Objective,
    name: str,
    draw: Callable[[str, tuple[int, int]], Tensor],
    part: slice = slice(None),
) -> Factors:
    """Factors in the solver's variables; the names are those of ``starts.make_start``. ``draw``
    gives a normal factor by its name and shape, of the rows here alone where those of H are
    ``part``. Errors: InputError for ``balanced``.
    """
    problem, trunk, counts = objective.problem, objective.trunk, objective.rows.counts.double()
    shapes = [(problem.num_classes, problem.head_dim), (len(counts), problem.dim), *trunk.shapes]
    names = ["W", "H", *(f"hidden{j}" for j in range(1, problem.layers))]
    if name == "balanced":
        raise InputError(
            "start balanced is of one layer; with layers give normal, orthogonal or spectral"
        )
    if name == "spectral":
        factors = _spectral(objective)
    else:
        factors = list(map(draw, names, shapes))
        if name == "orthogonal":
            mesh = None if objective.layout is None else objective.layout.mesh
            spread = [mesh, mesh, *(None for _ in trunk.shapes)]  # all ranks have hidden layers
            factors = list(map(orthonormal, factors, spread))
        else:
            factors = [X / math.sqrt(X.shape[1]) for X in factors]
            factors[0] = factors[0] * trunk.activation.gain
            factors[3:] = [X * trunk.activation.gain for X in factors[3:]]
        factors = [SMALL * X for X in factors] if name == "small" else factors
    scales = balancing_scales((problem.lambda_w, problem.lambda_h, *problem.hidden_penalties))
    W, H, *hidden = (X * s for X, s in zip(factors, scales, strict=True))
    H = H / counts[part].sqrt()[:, None]
    x = objective.from_model(W, H.to(objective.scales.rows.device), None, hidden)
    return x.W, x.H, x.hidden


def _spectral(objective: Objective) -> list[Tensor]:
    """All factors share the singular values of D^1/2 Z, each the P-th root: those of a frame, or of
    a simplex.
    """
    problem, trunk = objective.problem, objective.trunk
    P, least = 1 + problem.layers, min(trunk.widths)
    U, full, V = _frame(objective)
    squared = isinstance(problem.loss, SquaredError)
    values = (
        shrunk(full, problem.num_samples, problem.mu, P)
        if squared
        else full * deep_level(objective, P)
    )
    order = torch.argsort(values, descending=True)[:least]
    root = values[order] ** (1.0 / P)
    pad = torch.nn.functional.pad

    def of(X: Tensor, columns: int) -> Tensor:
        return pad(X[:, order] * root, (0, columns - len(order)))

    hidden = [
        pad(torch.diag(root), (0, inputs - len(root), 0, outputs - len(root)))
        for outputs, inputs in trunk.shapes
    ]
    return [of(V, problem.head_dim), of(U, problem.dim), *hidden]


def _frame(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(U, values, V) with U values V' = D^1/2 Y of the rows' targets, centred where the loss or a
    free bias takes means off.

    The columns of U are non-negative, as a ReLU needs them, where nothing is centred or the
    activation is one.
    """
    if objective.problem.dense:
        return target_spectrum(objective)
    problem, rows = objective.problem, objective.rows
    K, R = problem.num_classes, rows.number
    index, classes = rows.targets.slice(0, R)
    Z = torch.zeros(R, K, dtype=torch.float64)
    Z[index, classes] = rows.counts.double().sqrt()[index]
    centred = not isinstance(problem.loss, SquaredError) or problem.bias == "free"
    if centred and problem.kind.trunk == "linear":
        shift = (
            Z.mean(1, keepdim=True)
            if not isinstance(problem.loss, SquaredError)
            else _explained(Z, rows.counts.double())
        )
        U, values, Vh = torch.linalg.svd(Z - shift, full_matrices=False)
        return U, values, Vh.T
    values = torch.linalg.vector_norm(Z, dim=0)
    V = torch.eye(K, dtype=torch.float64) - (1.0 / K if centred else 0.0)
    return Z / values.clamp_min(1e-300), values, V


def target_spectrum(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(U, values, V) of the rows' target vectors, centred where a free bias takes the mean off, on
    the CPU.
    """
    targets = objective.rows.targets
    assert isinstance(targets, DenseTargets)
    found = targets.spectrum(objective.rows.counts, centred=objective.problem.bias == "free")
    return found.U, found.values, found.V


def _explained(Z: Tensor, counts: Tensor) -> Tensor:
    """What a free bias b_k = n_k/N takes off D^1/2 Y."""
    root = counts.sqrt()
    shift: Tensor = torch.outer(root, root @ Z / counts.sum())
    return shift


def shrunk(sigma: Tensor, samples: int, mu: float, factors: int) -> Tensor:
    """argmin over s >= 0 of (sigma - s)^2 / 2N + (P/2) mu s^(2/P), zero where nothing smaller than
    s = 0 exists.

    The larger root of s = sigma - N mu s^(2/P - 1), from above, where the iteration falls to it.
    """
    s, power = sigma.clone(), 2.0 / factors
    for _ in range(500):
        s = (sigma - samples * mu * s.clamp_min(1e-300) ** (power - 1.0)).clamp_min(0.0)
    cost = (sigma - s).square() / (2 * samples) + 0.5 * factors * mu * s**power
    return torch.where((s > 0) & (cost < sigma.square() / (2 * samples)), s, 0.0)


def deep_level(objective: Objective, factors: int) -> float:
    """The logit gap a > 0 of least log(1 + (K-1) e^-a) + (P/2) mu (K-1) (a sqrt(n))^(2/P), n the
    mean count, on a grid.
    """
    problem = objective.problem
    K, n = problem.num_classes, problem.num_samples / problem.num_classes
    a = torch.logspace(-1, 2.5, 2000, dtype=torch.float64)
    cost = torch.log1p((K - 1) * torch.exp(-a)) + 0.5 * factors * problem.mu * (K - 1) * (
        a * math.sqrt(n)
    ) ** (2 / factors)
    return float(a[cost.argmin()])
