"""Memory and time of a solve before it runs: what is held, counted, and seconds by rates that were
measured (`calibration`).

With R rows (classes, or samples), (K + R) d parameters and one evaluation = value and gradient:

    softmax losses     6 R K d floating-point operations (three products), the exponentials a chunk
                       of rows at a time
    squared error      8 (R + K) d^2 (Gram matrices), nothing of size R K; 6 R P d (residuals) where
                       at most P = d classes, d + 1 with a bias, have rows; 6 R t d (residuals) to
                       target vectors, R x t themselves
    hidden layers      6 R d_(j-1) d_j each; d is then the last width. What a forward pass leaves (a
                       tape) is R x d_j for each layer, with a ReLU also its slopes and bends, and
                       the tape of the last point stays

A solve has three phases, and its peak is the largest of theirs: the steps; the certificate and the
metrics, beside which the solver's point, its gradient and the model's point stay (3 times the
parameters), and the backend's buffer.

Decisions

2026-11-25. Few rows in many dimensions need no d x d matrix. The gauge of L-BFGS works in the 2K
dimensions that A and B span, balancedness in the K + R that all rows span, and the squared error by
residuals where K <= d. Alternating least squares does form them; `plan` says so.

2026-11-26. A plan counts the vectors that a method holds at its peak, measured by
`bench/memory.py`: within 4 % at K = 100, d = 60,000. The loop lets go of the start, and plain
gradient descent has no velocity.

2026-11-30. Certificates, metrics, alternating least squares and the model of codes are planned by
the arrays that they hold (`bench/plan.py`; measured over planned memory had been up to 8). A
curvature says itself what its model takes. Of 30 settings measured memory is 0.86 to 1.16 of what
is planned for all, and CPU seconds an evaluation 2/3 to 1.5 for 28; Adam and multi-label rows take
1.51 to 1.55 (`bench/results/amd-epyc.csv`, two cores of an AMD EPYC, torch 2.13.0, shared).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from ufm_fast.backends import BACKENDS, make_backend
from ufm_fast.backends.base import HeadPlan, HeadShape, compute_dtype
from ufm_fast.backends.chunks import buffer_bytes, chunk_rows
from ufm_fast.backends.residual import block_bytes
from ufm_fast.calibration import Terms, rates_of, seconds
from ufm_fast.errors import InputError
from ufm_fast.losses import SquaredError
from ufm_fast.memory import available_bytes
from ufm_fast.metrics.rows import block_rows
from ufm_fast.objective import Objective
from ufm_fast.plan_notes import notes_of
from ufm_fast.problem import DTYPES, Problem
from ufm_fast.solvers.curvature.base import Curvature
from ufm_fast.solvers.curvature.table import curvature_of
from ufm_fast.solvers.table import HISTORY, METHODS
from ufm_fast.theory.certificates import EXACT_CLASSES, held_bytes
from ufm_fast.theory.separation import held_together


@dataclass(frozen=True)
class BackendPlan:
    """One backend: rows of a chunk, bytes beside the vectors for a gradient and a Hessian product,
    of which ``kept`` stay between calls, and seconds an evaluation of the method.
    """

    name: str
    chunk: int
    workspace: int
    workspace_hessian: int
    kept: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds. ``methods``: optimiser state of each. ``hidden``: of the
    parameters, those of the hidden layers; ``tape``: what a pass through them leaves (both zero of
    one layer). ``certificate``, ``measuring``: of the proof and of the metrics beside points and
    gradient. ``notes``: what a user should know.
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
    measuring: int
    free: int
    notes: list[str]

    def total(self, method: str, backend: str) -> int:
        """Peak bytes of a solve: of its steps, or of what follows them."""
        return max(self.steps(method, backend), self.proof(backend), self.metrics(backend))

    def steps(self, method: str, backend: str) -> int:
        """Bytes that the steps of a method need; ``auto`` is lbfgs with a finish by newton-cg."""
        return self.vectors(method) + self._work(method, backend)

    def vectors(self, method: str) -> int:
        """Bytes of the vectors of a method, which a mesh of devices shares out."""
        return (
            self.parameters + self.gradient + self.methods["lbfgs" if method == "auto" else method]
        )

    def _work(self, method: str, backend: str) -> int:
        plan = self.backend(backend)
        return (
            max(plan.workspace, plan.workspace_hessian)
            if method in ("auto", "newton-cg")
            else plan.workspace
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the parameters."""
        return compute_dtype(DTYPES[self.dtype]).itemsize

    def backend(self, name: str) -> BackendPlan:
        """The row of a backend."""
        return next(row for row in self.backends if row.name == name)

    def proof(self, backend: str) -> int:
        """Bytes while the certificate is made; 0 where none is wanted."""
        return self._after(backend) + self.certificate if self.certificate else 0

    def metrics(self, backend: str) -> int:
        """Bytes while the metrics are made."""
        return self._after(backend) + self.measuring

    def _after(self, backend: str) -> int:
        """What stays after the steps: the solver's point, its gradient and the model's point, and
        the backend's buffer.
        """
        return 3 * self.parameters + self.backend(backend).kept

    def devices(self, method: str, backend: str) -> int | None:
        """The least number of devices like this that hold the steps, each its share of the vectors;
        None: no number does.
        """
        room = self.free - self._work(method, backend)
        return None if room <= 0 else max(1, math.ceil(self.vectors(method) / room))

    def fits(self, backend: str) -> str:
        """Whether L-BFGS and what follows it fit the device, in words, or how many devices would
        hold it.
        """
        if self.total("auto", backend) <= self.free:
            return "yes"
        number = self.devices("auto", backend)
        if self.steps("auto", backend) <= self.free:
            return "without a certificate"
        return "no" if number is None or backend == "reference" else f"on {number} devices"

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        totals = {b.name: {m: self.total(m, b.name) for m in self.methods} for b in self.backends}
        return {**asdict(self), "totals": totals}


def make_plan(
    problem: Problem,
    *,
    reduce: str = "auto",
    method: str = "auto",
    history: int | None = None,
    variables: str = "balanced",
    certificate: bool = True,
) -> Plan:
    """The plan of a problem on its device, whose rates are measured at first use in a few seconds
    (`calibration`).

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
    K, N = problem.num_classes, problem.num_samples
    reduced = problem.rows("classes").number
    R = reduced if chosen == "classes" else N
    dtype = compute_dtype(problem.torch_dtype)
    size = (problem.entries(R) + (0 if problem.bias == "none" else K)) * dtype.itemsize
    vectors = {
        name: row.vectors
        for name, row in METHODS.items()
        if name != "auto" and row.refuses(problem) is None
    }
    pairs = HISTORY if history is None else history
    vectors["lbfgs"] += 2 * pairs
    objective = Objective(problem, reduce=chosen, variables=variables)
    if objective.geometry.curved:  # the pairs of both ends of a step, while they are carried
        vectors["lbfgs"] += 2 * pairs + 2
    model = curvature_of(objective)
    if isinstance(problem.loss, SquaredError) and model is not None:
        vectors["newton-cg"] += 1  # building it there
    device = torch.device(problem.device)
    backends, flops = _backends(objective, history or HISTORY, method, device)
    plan = Plan(
        device=str(device),
        dtype=problem.dtype,
        samples=N,
        classes=K,
        dim=problem.dim,
        widths=problem.trunk.widths,
        reduce=chosen,
        rows=R,
        rows_unreduced=N,
        parameters=size,
        gradient=size,
        hidden=problem.trunk.entries * dtype.itemsize,
        tape=_tape(problem, R, dtype.itemsize),
        methods=_method_bytes(vectors, size, objective, model),
        flops=flops,
        rate=matmul_rate(dtype, device),
        backends=backends,
        certificate=_certificate(problem, R) if certificate else 0,
        measuring=_measuring(problem, R),
        free=available_bytes(device),
        notes=[],
    )
    plan.notes.extend([*filter(None, [held_together(problem)]), *notes_of(plan, reduced, method)])
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


def _method_bytes(
    vectors: dict[str, int], size: int, objective: Objective, model: Curvature | None
) -> dict[str, int]:
    """What each method holds: vectors of the size of the parameters, alternating its
    factorisations, and those with a model of the Hessian that.
    """
    d, R, item = objective.problem.dim, objective.rows.number, objective.dtype.itemsize
    held = 0 if model is None else model.bytes_of(objective)
    # Gram, eigenvectors and their workspace, of W; or Gram, factor and the right-hand side of H;
    # three copies of the rows.
    own = {"alternating": 5 * 8 * d**2 + 3 * R * d * item, "lbfgs": held}
    if model is not None and model.newton:
        own["newton-cg"] = held
    return {name: number * size + own.get(name, 0) for name, number in vectors.items()}


def terms_of(
    objective: Objective, history: float, head: HeadPlan | None = None, method: str = "lbfgs"
) -> Terms:
    """The terms of a step of a method: the head (of the tiled backend, unless given), hidden
    layers, vectors, and of L-BFGS with so many pairs the recursion and the model of the Hessian. On
    spheres each pair is carried along, 45 passes.
    """
    problem, R, model = objective.problem, objective.rows.number, curvature_of(objective)
    head = head or _heads(problem, R, torch.device(problem.device))["tiled"]
    recursive, curved = method in ("auto", "lbfgs"), objective.geometry.curved
    served = model is not None and (recursive or (model.newton and method == "newton-cg"))
    passed, built = model.work(objective) if model is not None and served else (0.0, 0.0)
    flops = head.flops + _trunk_flops(problem, R) + built
    passes = (
        20.0
        + (4.0 * history if recursive else 0.0)
        + (55.0 + 45.0 * history * recursive if curved else 0.0)
    )
    return Terms(flops, head.passes, passes * problem.entries(R), R, passed)


def _trunk_flops(problem: Problem, R: int) -> float:
    return 6.0 * R * problem.trunk.entries


def _tape(problem: Problem, R: int, item: int) -> int:
    """Bytes that a pass through the hidden layers leaves: outputs; of a ReLU slopes, and bends
    where kinks are rounded.
    """
    return (3 if problem.activation == "relu" else 1) * R * sum(problem.trunk.widths[1:]) * item


def _backends(
    objective: Objective, history: int, method: str, device: torch.device
) -> tuple[list[BackendPlan], float]:
    """The head on each backend that there is, and what the trunk takes beside it; the usual
    operations of an evaluation.
    """
    problem, R = objective.problem, objective.rows.number
    work, second = _trunk_workspace(problem, R, objective.dtype.itemsize)
    plans, usual, rates = [], 0.0, rates_of(problem, terms_of)
    for name, head in _heads(problem, R, device).items():
        usual = _trunk_flops(problem, R) + head.flops if name == "tiled" else usual
        time = seconds(terms_of(objective, history, head, method), rates)
        plans.append(
            BackendPlan(
                name,
                head.chunk,
                head.workspace + work,
                head.workspace_hessian + second,
                head.kept,
                time,
            )
        )
    return plans, usual


def _heads(problem: Problem, R: int, device: torch.device) -> dict[str, HeadPlan]:
    """What each backend says of the head; those that this device or dtype has not are left out."""
    found = {}
    shape = HeadShape(
        problem.loss,
        R,
        problem.num_classes,
        problem.head_dim,
        problem.samples.occupied,
        problem.bias != "none",
        problem.torch_dtype,
        device,
        problem.dense,
        problem.angular is not None,
    )
    for name in BACKENDS:
        try:
            backend = make_backend(name, device, problem.torch_dtype)
        except InputError:
            continue
        if name != "auto":
            found[name] = backend.plan(shape)
    return found


def _trunk_workspace(problem: Problem, R: int, item: int) -> tuple[int, int]:
    """Bytes beside the head's, of a gradient and of a Hessian product: the tapes of this point and
    the last, the gradients of features, H and layers on their way back; for a product one tape, the
    directions of it and twice those gradients.
    """
    if problem.trunk.empty:
        return 0, 0
    rows = R * (problem.dim + problem.head_dim + max(problem.trunk.widths)) * item
    back, tape = rows + problem.trunk.entries * item, _tape(problem, R, item)
    return 2 * tape + back, tape + 2 * (R * sum(problem.trunk.widths) * item + back)


def _certificate(problem: Problem, R: int) -> int:
    """Bytes of the certificate beside the points, of which it makes float64 copies.

    Of softmax losses a chunk of exponentials, its gradient and that scaled, and vectors of its
    rows; dense K x K matrices where it is exact, else the gradient itself if it fits, and bases of
    W and H. Of the squared error blocks of residuals and Grams.
    """
    K, d, item, device = (
        problem.num_classes,
        problem.head_dim,
        problem.torch_dtype.itemsize,
        torch.device(problem.device),
    )
    entries = problem.entries(R)
    copies = 0 if item == 8 else 8 * entries
    if problem.freeze is not None:
        return copies + 8 * entries
    if isinstance(problem.loss, SquaredError):
        norm = 3 * 8 * K**2 if K <= EXACT_CLASSES else 4 * 8 * (K + R) * d
        return copies + 8 * R * d + 3 * block_bytes(R, K, d) + norm + 4 * 8 * min(d, K) ** 2
    chunk = chunk_rows(R, K, 8, device)
    swept = 3 * buffer_bytes(chunk, K, 8) + 15 * 8 * chunk
    if (
        problem.constraint != "none"
    ):  # scaled by rows and by columns, and what holds the rows at their length
        swept += 3 * buffer_bytes(chunk, K, 8) + 2 * 8 * entries
    if K <= EXACT_CLASSES:
        return copies + max(swept + 8 * K**2, 3 * 8 * K**2)
    return copies + swept + held_bytes(R, K, available_bytes(device)) + 4 * 8 * (K + R) * d


def _measuring(problem: Problem, R: int) -> int:
    """Bytes of the metrics beside the points: copies of the features, blocks of rows, and tiles of
    pairs of classes.
    """
    K, d = problem.num_classes, problem.head_dim
    item = compute_dtype(problem.torch_dtype).itemsize
    block = 8 * d * min(max(R, K), block_rows(d))
    return R * d * (item + 2 * 8) + (10 if d > K else 8) * block + 5 * 8 * min(K, 1024) ** 2
