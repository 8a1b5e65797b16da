"""Memory and time of a solve before it runs: arithmetic from the problem's sizes, and one short measured product.

With R rows (classes, or samples), (K + R) d parameters and one evaluation = value and gradient:

    softmax losses     6 R K d floating-point operations (three products), the exponentials a chunk of rows at a time
    squared error      8 (R + K) d^2 (Gram matrices), nothing of size R K; 6 R P d (residuals) where at most P = d classes,
                       d + 1 with a bias, have rows; 6 R t d (residuals) to target vectors, R x t themselves
    hidden layers      6 R d_(j-1) d_j each; d is then the last width. What a forward pass leaves (a tape) is R x d_j for
                       each layer, with a ReLU also its slopes and bends, and the tape of the last point stays

Decisions

2026-11-25. Few rows in many dimensions need no d x d matrix. The gauge of L-BFGS works in the 2K dimensions that A and
B span, balancedness in the K + R that all rows span, and the squared error by residuals where K <= d. Alternating least
squares does form them; `plan` says so.

2026-11-26. A plan counts the vectors that a method holds at its peak, measured by `bench/memory.py`: within 4 % at K =
100, d = 60,000. The loop lets go of the start, and plain gradient descent has no velocity.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from ufm_fast.backends import BACKENDS, make_backend
from ufm_fast.backends.base import HeadPlan, HeadShape, compute_dtype
from ufm_fast.errors import InputError
from ufm_fast.losses import SquaredError
from ufm_fast.memory import available_bytes
from ufm_fast.problem import Problem
from ufm_fast.solvers.curvature import sets
from ufm_fast.solvers.table import HISTORY, METHODS
from ufm_fast.theory.certificates import EXACT_CLASSES, held_bytes
from ufm_fast.theory.separation import held_together


@dataclass(frozen=True)
class BackendPlan:
    """One backend: rows of a chunk, bytes beside the vectors for a gradient and a Hessian product, seconds an evaluation."""

    name: str
    chunk: int
    workspace: int
    workspace_hessian: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds. ``methods``: optimiser state of each. ``hidden``: of the parameters, those of the
    hidden layers; ``tape``: what a pass through them leaves (both zero of one layer). ``notes``: what a user should know.
    """

    device: str
    dtype: str
    samples: int
    classes: int
    dim: int
    widths: tuple[int, ...]
    reduce: str
    rows: int
    rows_unreduced: int
    parameters: int
    hidden: int
    tape: int
    gradient: int
    methods: dict[str, int]
    flops: float
    rate: float
    backends: list[BackendPlan]
    certificate: int
    free: int
    notes: list[str]

    def total(self, method: str, backend: str) -> int:
        """Peak bytes of a solve: of its steps, or of the certificate that follows them."""
        return max(self.steps(method, backend), self.parameters + self.certificate)

    def steps(self, method: str, backend: str) -> int:
        """Bytes that the steps of a method need; ``auto`` is lbfgs with a finish by newton-cg."""
        plan = next(b for b in self.backends if b.name == backend)
        work = max(plan.workspace, plan.workspace_hessian) if method in ("auto", "newton-cg") else plan.workspace
        return self.parameters + self.gradient + self.methods["lbfgs" if method == "auto" else method] + work

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        totals = {b.name: {m: self.total(m, b.name) for m in self.methods} for b in self.backends}
        return {**asdict(self), "totals": totals}


def make_plan(
    problem: Problem, *, reduce: str = "auto", method: str = "auto", history: int | None = None, certificate: bool = True
) -> Plan:
    """The plan of a problem on its device; ``rate`` is measured there in a fraction of a second.

    Arguments as in ``solve``. Errors: InputError for an unknown method, or a history below 1.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    refusal = METHODS[method].refuses(problem)
    if refusal:
        raise InputError(f"method {method} {refusal}")
    if history is not None and history < 1:
        raise InputError(f"history must be at least 1, got {history}")
    chosen = problem.reduction(reduce)
    K, N, plain = problem.num_classes, problem.num_samples, problem.layers == 1
    reduced = problem.rows("classes").number
    R = reduced if chosen == "classes" else N
    dtype = compute_dtype(problem.torch_dtype)
    size = (problem.entries(R) + (0 if problem.bias == "none" else K)) * dtype.itemsize
    squared = _squared(problem)
    vectors = {name: row.vectors for name, row in METHODS.items() if name != "auto" and row.refuses(problem) is None}
    # While that matrix is formed.
    coupled = 48 * sets.entries(problem.rows(chosen).targets, K, problem.dim) ** 2 if plain else 0
    vectors["lbfgs"] += 2 * (HISTORY if history is None else history)
    if squared and plain and problem.freeze is None:  # their model of the squared error, and what building it takes
        vectors = {**vectors, "lbfgs": vectors["lbfgs"] + 3, "newton-cg": vectors["newton-cg"] + 4}
    device = torch.device(problem.device)
    rate = matmul_rate(dtype, device)
    backends, flops = _backends(problem, R, rate, device)
    plan = Plan(
        device=str(device), dtype=problem.dtype, samples=N, classes=K, dim=problem.dim, widths=problem.trunk.widths,
        reduce=chosen, rows=R, rows_unreduced=N, parameters=size, gradient=size,
        hidden=problem.trunk.entries * dtype.itemsize, tape=_tape(problem, R, dtype.itemsize),
        methods=_method_bytes(vectors, size, problem.dim, coupled),
        flops=flops, rate=rate, backends=backends,
        certificate=_certificate(problem, R, size) if certificate else 0, free=available_bytes(device), notes=[],
    )  # fmt: skip
    plan.notes.extend([*filter(None, [held_together(problem)]), *_notes(plan, reduced, method)])
    return plan


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Floating-point operations a second of square products on the device, the best of a few."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(left)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _method_bytes(vectors: dict[str, int], size: int, dim: int, coupled: int) -> dict[str, int]:
    """What each method holds: vectors of the size of the parameters, alternating its d x d factorisations, and those with a
    model of several targets a row that.
    """
    own = {"alternating": 5 * 8 * dim**2, "lbfgs": coupled, "newton-cg": coupled}
    return {name: number * size + own.get(name, 0) for name, number in vectors.items()}


def _squared(problem: Problem) -> bool:
    return isinstance(problem.loss, SquaredError)


def _trunk_flops(problem: Problem, R: int) -> float:
    return 6.0 * R * problem.trunk.entries


def _tape(problem: Problem, R: int, item: int) -> int:
    """Bytes that a pass through the hidden layers leaves: outputs; of a ReLU slopes, and bends where kinks are rounded."""
    return (3 if problem.activation == "relu" else 1) * R * sum(problem.trunk.widths[1:]) * item


def _backends(problem: Problem, R: int, rate: float, device: torch.device) -> tuple[list[BackendPlan], float]:
    """The head on each backend that there is, and what the trunk takes beside it; the usual operations of an evaluation."""
    item = compute_dtype(problem.torch_dtype).itemsize
    work, second = _trunk_workspace(problem, R, item)
    plans, usual, trunk = [], 0.0, _trunk_flops(problem, R)
    for name, head in _heads(problem, R, device).items():
        flops = trunk + head.flops
        usual = flops if name == "tiled" else usual
        plans.append(BackendPlan(name, head.chunk, head.workspace + work, head.workspace_hessian + second, flops / rate))
    return plans, usual


def _heads(problem: Problem, R: int, device: torch.device) -> dict[str, HeadPlan]:
    """What each backend says of the head; those that this device or dtype has not are left out."""
    found = {}
    shape = HeadShape(
        problem.loss, R, problem.num_classes, problem.head_dim, problem.samples.occupied, problem.bias != "none",
        problem.torch_dtype, device, problem.dense,
    )  # fmt: skip
    for name in BACKENDS:
        try:
            backend = make_backend(name, device, problem.torch_dtype)
        except InputError:
            continue
        if name != "auto":
            found[name] = backend.plan(shape)
    return found


def _trunk_workspace(problem: Problem, R: int, item: int) -> tuple[int, int]:
    """Bytes beside the head's, of a gradient and of a Hessian product: the tapes of this point and the last, the gradients of
    features, H and layers on their way back; for a product one tape, the directions of it and twice those gradients.
    """
    if problem.trunk.empty:
        return 0, 0
    rows = R * (problem.dim + problem.head_dim + max(problem.trunk.widths)) * item
    back, tape = rows + problem.trunk.entries * item, _tape(problem, R, item)
    return 2 * tape + back, tape + 2 * (R * sum(problem.trunk.widths) * item + back)


def _certificate(problem: Problem, R: int, size: int) -> int:
    """Bytes of the certificate beside ``size`` bytes of parameters, of which it makes float64 copies.

    Dense K x K matrices where it is exact, else the gradient of softmax losses if it fits; with a frozen factor a gradient.
    """
    K, item = problem.num_classes, compute_dtype(problem.torch_dtype).itemsize
    copy = 0 if item == 8 else size // item * 8
    if problem.freeze is not None:
        return copy + size // item * 8
    if K <= EXACT_CLASSES:
        return copy + 3 * 8 * K**2
    return copy + (0 if _squared(problem) else held_bytes(R, K, available_bytes(torch.device(problem.device))))


def _notes(plan: Plan, reduced: int, method: str) -> list[str]:
    notes = []
    if reduced < plan.samples:
        share = reduced / plan.samples
        if plan.reduce == "classes":
            notes.append(
                f"reduce=classes is exact here: {reduced:,} rows for {plan.samples:,} samples ({share:.1%} of the work)"
            )
        else:
            notes.append(f"--reduce classes would solve {reduced:,} rows for {plan.samples:,} samples, with the same minimum")
    else:
        notes.append("reduce=classes saves nothing here: each row has a target of its own")
    if plan.classes > EXACT_CLASSES:
        notes.append(f"the certificate will be probabilistic: an exact one needs at most {EXACT_CLASSES:,} classes")
    name = "lbfgs" if method == "auto" else method
    for backend in plan.backends:
        need = plan.steps(method, backend.name)
        if need > plan.free:
            notes.append(
                f"not enough memory for {name} on {backend.name}: {readable(need)} needed, {readable(plan.free)} free; "
                + ("use --backend tiled" if backend.name == "reference" else _mend(plan, name))
            )
    if plan.parameters + plan.certificate > plan.free:
        wanted = readable(plan.parameters + plan.certificate)
        notes.append(
            f"not enough memory for the certificate: {wanted} needed, {readable(plan.free)} free; "
            "solve it with --no-certificate"
        )
    return notes


def _mend(plan: Plan, method: str) -> str:
    if plan.reduce == "none" and plan.rows > plan.classes:
        return "use --reduce classes"
    if method == "lbfgs":
        return "use a smaller --history, --method gd or --dtype float32"
    return "use --dtype float32, a smaller --dim, or a machine with more memory"


def readable(size: float) -> str:
    """Bytes in words: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
