"""``solve``: from a Problem to a Solution with its theory value, certificate and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ufm_fast.arguments import number, whole
from ufm_fast.backends import make_backend
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.losses import SquaredError
from ufm_fast.metrics import collect, comparable, penalties
from ufm_fast.metrics.checks import LARGEST
from ufm_fast.metrics.pairwise import Mode as Pairwise
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.alternating import Alternating, check_loss
from ufm_fast.solvers.auto import LBFGSThenNewton
from ufm_fast.solvers.base import Solver, State
from ufm_fast.solvers.first_order import Adam, GradientDescent
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.minimise import OnLog, Run, log_spaced, minimise
from ufm_fast.solvers.newton_cg import NewtonCG
from ufm_fast.solvers.solution import Outcome, Solution, StepRecord
from ufm_fast.starts import make_start
from ufm_fast.theory import ClosedForm, closed_form
from ufm_fast.theory.certificates import certify
from ufm_fast.verdicts import at_saved_point, contradiction, of_closed_form

#: Methods by the name that ``method=`` and ``--method`` take.
METHODS = ("auto", "gd", "momentum", "nesterov", "adam", "lbfgs", "newton-cg", "alternating", "closed-form")

#: Called with a record and a function that gives the model's Point.
OnPoint = Callable[[StepRecord, Callable[[], Point]], None]


def make_solver(
    problem: Problem,
    method: str,
    *,
    learning_rate: float | None = None,
    momentum: float | None = None,
    history: int | None = None,
) -> Solver:
    """The solver called ``method``. Errors: InputError for an unknown name or a parameter that the method has not."""
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    for name, value, methods in (
        ("learning_rate", learning_rate, ("gd", "momentum", "nesterov", "adam")),
        ("momentum", momentum, ("momentum", "nesterov")),
        ("history", history, ("auto", "lbfgs")),
    ):
        if value is not None and method not in methods:
            raise InputError(f"{name} goes with method {' or '.join(methods)}, not {method}; drop it")
        if value is not None and not number(value, name) > 0:
            raise InputError(f"{name} must be > 0, got {value}")
    if history is not None:
        whole(history, "history", 1)
    if momentum is not None and momentum >= 1:
        raise InputError(f"momentum must lie in (0, 1), got {momentum}")
    beta = 0.9 if momentum is None else momentum
    solvers: dict[str, Callable[[], Solver]] = {
        "auto": lambda: LBFGSThenNewton(history or 10),
        "gd": lambda: GradientDescent(learning_rate),
        "momentum": lambda: GradientDescent(learning_rate, beta),
        "nesterov": lambda: GradientDescent(learning_rate, beta, nesterov=True),
        "adam": lambda: Adam(learning_rate),
        "lbfgs": lambda: LBFGS(history or 10),
        "newton-cg": NewtonCG,
        "alternating": Alternating,
        "closed-form": NewtonCG,  # evaluates its point only
    }
    if method == "alternating":
        check_loss(problem)
    return solvers[method]()


def checked_solver(
    problem: Problem, method: str, tol: float, max_steps: int | None = None, log_every: int | None = None,
    learning_rate: float | None = None, momentum: float | None = None, history: int | None = None,
) -> Solver:  # fmt: skip
    """The solver of a method, with all options of ``solve`` that concern it checked. Errors: InputError naming the option."""
    if not isinstance(problem, Problem):
        raise InputTypeError(f"problem must be a Problem, got {type(problem).__name__}")
    if not 0 < number(tol, "tol") < 1:
        raise InputError(f"tol must lie in (0, 1), got {tol}")
    if max_steps is not None:
        whole(max_steps, "max_steps", 0)
    if log_every is not None:
        whole(log_every, "log_every", 1)
    if method == "closed-form" and closed_form(problem) is None:
        raise InputError("method closed-form: no closed form is known for this problem; use method auto")
    return make_solver(problem, method, learning_rate=learning_rate, momentum=momentum, history=history)


def solve(
    problem: Problem,
    *,
    method: str = "auto",
    backend: str = "auto",
    reduce: str = "auto",
    variables: str = "balanced",
    start: str = "spectral",
    initial: Point | None = None,
    tol: float = 1e-10,
    max_steps: int | None = None,
    log_every: int | None = None,
    learning_rate: float | None = None,
    momentum: float | None = None,
    history: int | None = None,
    certificate: bool = True,
    metrics: bool = True,
    pairwise: Pairwise = "auto",
    on_log: OnPoint | None = None,
    on_save: OnPoint | None = None,
    first_step: int = 0,
    previous_evaluations: float = 0.0,
    previous_seconds: float = 0.0,
) -> Solution:
    """Minimise the problem's objective and prove how good the answer is.

    ``method``: 'auto' is L-BFGS with a Newton-CG finish, always iterative. ``reduce``: 'classes' (and 'auto') solves one row
    for each class or target set, exact; 'none' one a sample. ``variables``: 'balanced' or 'raw'. ``start``: a name of STARTS,
    or ``initial``: a Point with W, one H row for each row (or each sample), and b (``runs.foreign.read_start`` reads one
    from a file). ``tol``: |grad| relative to
    max(lambda_w |W| + lambda_h |H|, mu). ``log_every``: steps between log points (default: log-spaced). ``on_log(record,
    model_point)`` is called at each log point with a function that gives the model's Point; ``on_save`` too, whenever the point
    is worth saving: every ten seconds, at an error, and at the end before certificate and metrics. The first_step and previous_
    arguments number a resumed run. Ctrl-C returns the point that was reached, outcome 'interrupted'.

    Errors: InputError for unknown names, contradictory choices, or an initial point of the wrong shape.
    """
    solver = checked_solver(problem, method, tol, max_steps, log_every, learning_rate, momentum, history)
    objective = Objective(
        problem,
        backend=make_backend(backend, problem.device, problem.torch_dtype),
        reduce=reduce,
        variables=variables,
    )
    objective.evaluations = previous_evaluations
    if method == "closed-form" and not first_step and (initial is not None or start != "spectral"):
        raise InputError(
            "a start goes with iterative methods, and the closed form has none; drop the start or choose another method"
        )
    theory = closed_form(problem)
    with torch.no_grad(), torch.autocast(torch.device(problem.device).type, enabled=False):
        if method == "closed-form":
            run = _closed_form_run(objective, theory)
            start = "closed-form"
        else:
            spaced = log_spaced() if log_every is None else iter(range(0, 1 << 62, log_every))
            log, save = (_of_model(objective, callback) for callback in (on_log, on_save))
            run = minimise(  # which lets go of the start
                objective, solver, make_start(objective, start) if initial is None else _given_start(objective, initial),
                tol=tol, max_steps=max_steps, log_points=spaced, on_log=log, on_save=save,
                first_step=first_step, previous_seconds=previous_seconds,
            )  # fmt: skip
            start = start if initial is None else "given"
            run = _fitted_by_bias(objective, run)
        if on_save is not None:
            on_save(_last_record(objective, run, first_step, previous_seconds), lambda: objective.to_model(run.state.point))
        return _solution(
            objective, run, method if method != "auto" else f"auto: {solver.name}", start, theory, certificate, metrics,
            pairwise, first_step, previous_seconds,
        )  # fmt: skip


def _of_model(objective: Objective, callback: OnPoint | None) -> OnLog | None:
    return None if callback is None else lambda record, point: callback(record, lambda: objective.to_model(point))


def _last_record(objective: Objective, run: Run, first_step: int, previous_seconds: float) -> StepRecord:
    found, step, seconds = run.state.evaluation, first_step + run.steps, previous_seconds + run.seconds
    return StepRecord(step, found.value, found.data_value, found.gradient.norm(), objective.evaluations, seconds)


def _closed_form_run(objective: Objective, theory: ClosedForm | None) -> Run:
    assert theory is not None
    W, H, b = theory.point()
    problem = objective.problem
    if problem.target_sets is None:
        H = H[problem.counts > 0]
    if objective.reduce == "none":
        H = H.index_select(0, problem.sample_row())
    if b is None and problem.bias != "none":
        b = torch.zeros(problem.num_classes, dtype=torch.float64)
    device = torch.device(problem.device)
    x = objective.from_model(W.to(device), H.to(device), None if b is None else b.to(device))
    found = objective.value_and_grad(x)
    return Run(State(x, found), 0, 0.0, Outcome.CONVERGED, "closed form: " + theory.source, [])


def _fitted_by_bias(objective: Objective, run: Run) -> Run:
    """One class, squared error, free bias: once solved, the minimum itself, for no value is near its 0 relatively."""
    problem = objective.problem
    alone = isinstance(problem.loss, SquaredError) and problem.bias == "free" and int((problem.counts > 0).sum()) == 1
    if not alone or problem.freeze is not None or not run.outcome.success:
        return run
    nothing = objective.to_model(run.state.point).zeros()
    assert nothing.b is not None
    exact = objective.from_model(nothing.W, nothing.H, torch.where(problem.counts > 0, 1.0, 0.0).to(nothing.b))
    return replace(run, state=State(exact, objective.value_and_grad(exact)))


def _given_start(objective: Objective, point: Point) -> Point:
    problem, rows = objective.problem, objective.rows.number
    if not isinstance(point, Point) or not all(isinstance(part, torch.Tensor) for part in point.parts()):
        raise InputTypeError("initial must be a Point of torch tensors: Point(W, H, b), with torch.as_tensor around arrays")
    if not all(t.is_floating_point() and t.dtype.itemsize >= 2 for t in point.parts()):
        raise InputTypeError("the start's W, H and b must be floating-point tensors of 16 bits and more")
    device = torch.device(problem.device)
    if tuple(point.W.shape) != (problem.num_classes, problem.dim):
        raise InputError(f"the start's W must have shape {(problem.num_classes, problem.dim)}, got {tuple(point.W.shape)}")
    H = point.H
    if H.ndim == 2 and H.shape[0] == problem.num_samples != rows and H.shape[1] == problem.dim:
        # Samples with equal targets start from their mean, the point of the reduced problem with the least penalty.
        index = problem.sample_row().to(H.device)
        H = torch.zeros(rows, problem.dim, dtype=H.dtype, device=H.device).index_add_(0, index, H)
        H = H / objective.rows.counts.to(H)[:, None]
    if tuple(H.shape) != (rows, problem.dim):
        raise InputError(f"the start's H must have shape {(rows, problem.dim)} (or a row a sample), got {tuple(H.shape)}")
    b = point.b
    if (b is None) != (problem.bias == "none"):
        raise InputError(f"the start {'has no' if b is None else 'has a'} bias b but bias is {problem.bias!r}; make them agree")
    if b is not None and tuple(b.shape) != (problem.num_classes,):
        raise InputError(f"the start's b must have shape {(problem.num_classes,)}, got {tuple(b.shape)}")
    if not Point(point.W, H, b).finite():
        raise InputError("the start holds NaN or infinite values; give finite W, H and b")
    return objective.from_model(point.W.to(device), H.to(device), None if b is None else b.to(device))


def _solution(
    objective: Objective, run: Run, method: str, start: str, theory: ClosedForm | None, certificate: bool, metrics: bool,
    pairwise: Pairwise, first_step: int, previous_seconds: float,
) -> Solution:  # fmt: skip
    problem, model = objective.problem, objective.to_model(run.state.point)
    # Beyond this the squares of squares overflow: a diverged point has no certificate and no metrics.
    finite = math.isfinite(run.state.evaluation.value)
    usable = finite and all(float(part.abs().max()) < LARGEST for part in model.parts())
    proof = certify(problem, objective.rows, model) if certificate and usable else None
    found = at_saved_point(objective, run, model, exactly=proof is not None)
    outcome, message = run.outcome, run.message
    if method == "closed-form" and theory is not None:
        outcome, message = of_closed_form(objective, run, theory, found.value, proof)
    if proof is not None or problem.dtype == "float64":
        message = "; ".join(filter(None, (message, contradiction(objective, theory, found.value))))
    return Solution(
        problem=problem,
        point=model,
        value=found.value,
        data_value=found.data_value,
        gradient_norm=run.state.evaluation.gradient.norm(),
        steps=first_step + run.steps,
        evaluations=objective.evaluations,
        seconds=previous_seconds + run.seconds,
        outcome=outcome,
        message=message,
        method=method,
        backend=objective.backend.name,
        reduce=objective.reduce,
        variables=objective.variables,
        start=start,
        theory=theory,
        certificate=proof,
        metrics=_measure(objective, model, pairwise) if metrics and usable else {},
        history=run.history,
    )


def _measure(objective: Objective, model: Point, pairwise: Pairwise) -> dict[str, float]:
    """Neural-collapse metrics; of multi-label data those of the rows with one label (as Li et al., arXiv 2310.15903)."""
    problem, targets, H = objective.problem, objective.targets, model.H
    counts, labels = objective.rows.counts.to(H.device), targets.indices
    if targets.indptr is not None:
        alone = targets.sizes() == 1
        labels, H, counts = labels[targets.indptr[:-1][alone]], H[alone], counts[alone]
    features, classes_of, weights = comparable(H, labels, counts) if labels.numel() else (None, None, None)
    lambda_w, lambda_h = penalties(problem.lambda_w, problem.lambda_h)
    return collect(
        features,
        model.W,
        classes_of,
        model.b,
        counts=weights,
        classes=problem.num_classes,
        pairwise=pairwise,
        seed=problem.seed,
        lambda_w=lambda_w,
        lambda_h=lambda_h,
    )
