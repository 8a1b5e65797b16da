"""Initial points by name. All randomness comes from a generator on the CPU, so a seed means the same on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.arguments import whole
from ufm_fast.errors import InputError
from ufm_fast.losses import SquaredError
from ufm_fast.objective import Objective
from ufm_fast.point import Point

STARTS = ("normal", "balanced", "small", "spectral")
#: Up to this many classes or rows the spectral start takes a dense SVD.
_DENSE = 4096


def make_start(objective: Objective, name: str = "spectral", *, seed: int | None = None) -> Point:
    """Initial point in the solver's variables (B, A, b).

    - ``normal``: W and H iid N(0, 1/d), so that logits are of order 1/sqrt(d);
    - ``small``: the same times 1e-3, near the saddle at zero, where dynamics start in the papers' figures;
    - ``balanced``: random, but with A'A = B'B as every critical point has (in the model lambda_w W'W = lambda_h H'H);
    - ``spectral``: the balanced factors of the logits that each class would have at the minimum of a balanced problem with
      its own count (for equal counts and d >= K - 1 that is the minimiser, a simplex ETF); a random code where d < K - 1.

    The bias starts at zero. Errors: InputError for an unknown name.
    """
    if name not in STARTS:
        raise InputError(f"start must be one of {', '.join(STARTS)} or a file; got {name!r}")
    problem, R = objective.problem, objective.rows.number
    generator = torch.Generator().manual_seed(problem.seed if seed is None else whole(seed, "seed", 0, 2**63 - 1))
    if name == "spectral":
        B, A = _spectral(objective, generator)
    else:
        B = torch.randn(problem.num_classes, problem.dim, dtype=torch.float64, generator=generator) / math.sqrt(problem.dim)
        A = torch.randn(R, problem.dim, dtype=torch.float64, generator=generator) / math.sqrt(problem.dim)
        if name == "balanced":
            B, A = _balance(B, A)
        else:
            factor = 1e-3 if name == "small" else 1.0
            B, A = factor * B / objective.weight_scale, factor * A / objective.row_scale.double().cpu()
    device = torch.device(problem.device)
    bias = None if problem.bias == "none" else torch.zeros(problem.num_classes, dtype=objective.dtype, device=device)
    return Point(B.to(objective.dtype).to(device), A.to(objective.dtype).to(device), bias)


def _balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Give A the Gram matrix of B by a d x d linear map (on the columns that both span)."""
    size = min(B.shape[0], A.shape[0], B.shape[1])
    if size < B.shape[1]:
        B, A = B.clone(), A.clone()
        B[:, size:], A[:, size:] = 0.0, 0.0
    root = torch.linalg.qr(B[:, :size]).R
    A[:, :size] = torch.linalg.qr(A[:, :size]).Q @ root
    return B, A


def levels(objective: Objective) -> Tensor:
    """Logit gap of each row at the minimum of the balanced problem with its count, float64 (R,)."""
    problem, K = objective.problem, objective.problem.num_classes
    counts = objective.rows.counts.double()
    # A frozen factor may have no penalty: its level is that of equal ones.
    strength = problem.num_samples * (problem.mu or max(problem.lambda_w, problem.lambda_h)) / counts.sqrt()
    if isinstance(problem.loss, SquaredError):
        return (1.0 - strength).clamp_min(1e-2)
    off = strength / K + problem.loss.smoothing / K
    return torch.log1p((1.0 - K * off.clamp_max(0.9 / K)) / off.clamp_max(0.9 / K))


def _spectral(objective: Objective, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    problem, K, d, R = objective.problem, objective.problem.num_classes, objective.problem.dim, objective.rows.number
    level = levels(objective)
    strength = level * objective.rows.counts.double().sqrt()
    targets = objective.rows.targets
    if d < min(R, K - 1) or max(R, K) > _DENSE:
        return _random_code(targets.slice(0, R), strength, K, d, generator)
    rows, columns = targets.slice(0, R)
    Z = torch.zeros(R, K, dtype=torch.float64)
    Z[rows, columns] = strength[rows]
    if not isinstance(problem.loss, SquaredError) or problem.bias == "free":
        Z -= Z.mean(1, keepdim=True)
    U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    keep = min(d, s.numel())
    # The logits of a row are <b, a> / (sqrt(n) scales): the factors of Z are those of the solver's variables already,
    # once the rows' own scale is taken out.
    scale = objective.row_scale.double().cpu() * objective.weight_scale * objective.rows.counts.double().sqrt()[:, None]
    A, B = torch.zeros(R, d, dtype=torch.float64), torch.zeros(K, d, dtype=torch.float64)
    A[:, :keep] = U[:, :keep] * s[:keep].sqrt() / scale
    B[:, :keep] = Vh[:keep].T * s[:keep].sqrt()
    return B, A


def _random_code(
    entries: tuple[Tensor, Tensor], strength: Tensor, K: int, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random unit codewords, features along their own: for where K vectors cannot be spread evenly."""
    code = torch.nn.functional.normalize(torch.randn(K, d, dtype=torch.float64, generator=generator), dim=1)
    rows, columns = entries
    B = code * strength.mean().sqrt()
    A = torch.zeros(strength.numel(), d, dtype=torch.float64).index_add_(0, rows, code[columns])
    return B, A * (strength / strength.mean().sqrt())[:, None]
