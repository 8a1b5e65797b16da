"""``solve``: from a Problem to a Solution with its theory value, certificate and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ufm_fast.arguments import cpu_by_default
from ufm_fast.backends import make_backend
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.errors import InputError
from ufm_fast.groups.choice import by_groups, minimise_groups
from ufm_fast.groups.lifting import lifted_solution
from ufm_fast.losses import SquaredError
from ufm_fast.measure import logit_rank, logit_spectrum, measure, usable
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.base import State
from ufm_fast.solvers.minimise import OnLog, Run, log_spaced, minimise
from ufm_fast.solvers.options import SolveOptions
from ufm_fast.solvers.solution import Effort, Outcome, Restart, Solution, StepRecord
from ufm_fast.solvers.table import METHODS
from ufm_fast.starts import given_start, make_start
from ufm_fast.theory import ClosedForm, closed_form
from ufm_fast.theory.certificates import certify
from ufm_fast.theory.structures import recognise
from ufm_fast.verdicts import at_saved_point, contradiction, notes, of_closed_form, of_start

__all__ = ["METHODS", "check", "solve"]

#: Called with a record and a function that gives the model's Point.
OnPoint = Callable[[StepRecord, Callable[[], Point]], None]


def check(problem: Problem, options: SolveOptions) -> None:
    """What ``solve`` would refuse before its first step. Errors: InputError naming the option."""
    options.check(problem)
    if options.method == "closed-form" and closed_form(problem) is None:
        raise InputError("method closed-form: no closed form is known for this problem; use method auto")


@cpu_by_default
def solve(
    problem: Problem,
    options: SolveOptions | None = None,
    *,
    initial: Point | None = None,
    on_log: OnPoint | None = None,
    on_save: OnPoint | None = None,
    spent: Effort | None = None,
    **changes: Any,
) -> Solution:
    """Minimise the problem's objective and prove how good the answer is.

    ``options``: a SolveOptions, where all are described; or its fields as keywords, which also change one that is given:
    ``solve(problem, method="lbfgs", start="normal", restarts=10)``. ``initial``: a Point to start from, with W, one H row for
    each row (or each sample), b and hidden layers (``runs.foreign.read_start`` reads one from a file). ``on_log(record,
    model_point)`` is called at each log point with a function that gives the model's Point; ``on_save`` too, whenever the point
    is worth saving: every ten seconds, at an error, and at the end before certificate and metrics; with restarts, of the best.
    ``spent``: what earlier runs that this one continues have spent. Ctrl-C returns the point that was reached, outcome
    'interrupted'. Returns a Solution; example: ``solve(Problem(classes=10, dim=16)).value``.

    Errors: InputError for unknown names, contradictory choices, or an initial point of the wrong shape; InputTypeError for an
    option that there is not.
    """
    options = SolveOptions.of(**changes) if options is None else replace(options, **changes)
    check(problem, options)
    spent = spent or Effort()
    if by_groups(problem, options, begun=initial is not None or spent.steps > 0):
        best = minimise_groups(problem, options.tol)
        return lifted_solution(problem, best, certificate=options.certificate, metrics=options.metrics)
    objective = Objective(
        problem,
        backend=make_backend(options.backend, problem.device, problem.torch_dtype),
        reduce=options.reduce,
        variables=options.variables,
    )
    objective.evaluations = spent.evaluations
    if options.method == "closed-form" and not spent.steps and (initial is not None or options.start != "spectral"):
        raise InputError(
            "a start goes with iterative methods, and the closed form has none; drop the start or choose another method"
        )
    if initial is not None and options.restarts > 1:
        raise InputError(f"restarts = {options.restarts} contradict a given start; drop one of them")
    theory = closed_form(problem)
    with torch.no_grad(), torch.autocast(torch.device(problem.device).type, enabled=False):
        if options.method == "closed-form":
            result = _Result(_closed_form_run(objective, theory), (), "closed-form", theory)
        else:
            run, restarts = _runs(objective, options, initial, (on_log, on_save), spent)
            start = options.start if initial is None else "given"
            result = _Result(_fitted_by_bias(objective, run), restarts, start, theory)
        if on_save is not None:
            on_save(_last_record(objective, result.run, spent), lambda: objective.to_model(result.run.state.point))
        return _solution(objective, result, options, spent)


_Callbacks = tuple[OnPoint | None, OnPoint | None]  # on_log, on_save


@dataclass(frozen=True)
class _Result:
    run: Run
    restarts: tuple[Restart, ...]
    start: str
    theory: ClosedForm | None


def _runs(
    objective: Objective, options: SolveOptions, initial: Point | None, callbacks: _Callbacks, spent: Effort
) -> tuple[Run, tuple[Restart, ...]]:
    """The best of all restarts, and a row for each of them (none of a single run)."""
    problem, table, first = objective.problem, [], spent
    best: Run | None = None
    for i in range(options.restarts):
        before = objective.evaluations
        seed = problem.seed + i
        if initial is None:
            point = make_start(objective, options.start, seed=seed, scale=options.start_scale)
        else:
            point = given_start(objective, initial)
        on_log, on_save = callbacks
        run = _run(objective, options, point, (on_log, on_save if best is None else _if_below(best, on_save)), spent)
        del point
        run = _at_exact_point(objective, run)
        spent = Effort(spent.steps + run.steps, 0.0, spent.seconds + run.seconds)
        table.append(_row(objective, run, seed, objective.evaluations - before))
        if best is None or run.state.evaluation.value < best.state.evaluation.value:
            best = run
        if run.outcome is Outcome.INTERRUPTED:
            best = replace(best, outcome=run.outcome, message=run.message)
            break
    assert best is not None
    best = replace(best, steps=spent.steps - first.steps, seconds=spent.seconds - first.seconds)
    return best, tuple(table) if options.restarts > 1 else ()


def _run(objective: Objective, options: SolveOptions, point: Point, callbacks: _Callbacks, spent: Effort) -> Run:
    every = options.log_every
    log, save = (_of_model(objective, callback) for callback in callbacks)
    return minimise(  # which lets go of the start
        objective, METHODS[options.method].make(objective.problem, options), point,
        tol=options.tol, max_steps=options.max_steps, on_log=log, on_save=save,
        log_points=log_spaced() if every is None else iter(range(0, 1 << 62, every)),
        first_step=spent.steps, previous_seconds=spent.seconds,
    )  # fmt: skip


def _at_exact_point(objective: Objective, run: Run) -> Run:
    """The evaluation of the objective itself, where a solver stopped at an easier one."""
    if not run.state.provisional:
        return run
    return replace(run, state=State(run.state.point, objective.value_and_grad(run.state.point)))


def _row(objective: Objective, run: Run, seed: int, evaluations: float) -> Restart:
    model, value = objective.to_model(run.state.point), run.state.evaluation.value
    fits = math.isfinite(value) and usable(model)
    rank = logit_rank(logit_spectrum(objective.problem, objective.rows, model)) if fits else None
    return Restart(seed, value, run.steps, evaluations, rank, run.outcome.value)


def _if_below(best: Run, on_save: OnPoint | None) -> OnPoint | None:
    """``on_save`` of points that are better than the best start so far."""
    value = best.state.evaluation.value
    return None if on_save is None else lambda record, point: on_save(record, point) if record.value < value else None


def _of_model(objective: Objective, callback: OnPoint | None) -> OnLog | None:
    return None if callback is None else lambda record, point: callback(record, lambda: objective.to_model(point))


def _last_record(objective: Objective, run: Run, spent: Effort) -> StepRecord:
    found, step, seconds = run.state.evaluation, spent.steps + run.steps, spent.seconds + run.seconds
    return StepRecord(step, found.value, found.data_value, found.gradient.norm(), objective.evaluations, seconds)


def _closed_form_run(objective: Objective, theory: ClosedForm | None) -> Run:
    assert theory is not None
    W, H, b = theory.point()
    problem = objective.problem
    if problem.target_sets is None and not problem.dense:
        H = H[problem.counts > 0]
    if objective.reduce == "none":
        H = H.index_select(0, problem.sample_row())
    if b is None and problem.bias != "none":
        b = torch.zeros(problem.num_classes, dtype=torch.float64)
    device = torch.device(problem.device)
    hidden = [V.to(device) for V in theory.hidden()]
    x = objective.from_model(W.to(device), H.to(device), None if b is None else b.to(device), hidden)
    found = objective.value_and_grad(x)
    return Run(State(x, found), 0, 0.0, Outcome.CONVERGED, "closed form: " + theory.source, [])


def _fitted_by_bias(objective: Objective, run: Run) -> Run:
    """Squared error that a free bias fits alone: once solved, the minimum itself, for no value is near its 0 relatively."""
    problem = objective.problem
    if not isinstance(problem.loss, SquaredError) or problem.bias != "free" or problem.freeze is not None:
        return run
    target = _only_target(objective)
    if target is None or not run.outcome.success:
        return run
    nothing = objective.to_model(run.state.point).zeros()
    assert nothing.b is not None
    exact = objective.from_model(nothing.W, nothing.H, target.to(nothing.b))
    return replace(run, state=State(exact, objective.value_and_grad(exact)))


def _only_target(objective: Objective) -> Tensor | None:
    """The target vector of all samples (K,), if they have but one."""
    targets, counts = objective.targets, objective.problem.counts
    if isinstance(targets, DenseTargets):
        first = targets.values[0]
        return first if bool((targets.values == first).all()) else None
    return torch.where(counts > 0, 1.0, 0.0) if int((counts > 0).sum()) == 1 else None


def _solution(objective: Objective, result: _Result, options: SolveOptions, spent: Effort) -> Solution:
    problem, run, theory, rows = objective.problem, result.run, result.theory, objective.rows
    model, method = objective.to_model(run.state.point), options.method
    fits = math.isfinite(run.state.evaluation.value) and usable(model)  # else there is no certificate, and no metrics
    proof = certify(problem, rows, model) if options.certificate and fits else None
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
        steps=spent.steps + run.steps,
        evaluations=objective.evaluations,
        seconds=spent.seconds + run.seconds,
        outcome=outcome,
        message=message,
        method=method if method != "auto" else f"auto: {METHODS[method].make(problem, options).name}",
        backend=objective.backend.name,
        reduce=objective.reduce,
        variables=objective.variables,
        start=result.start,
        theory=theory,
        certificate=proof,
        metrics=measure(problem, rows, model, options.pairwise, found.value) if options.metrics and fits else {},
        notes=[*of_start(problem, result.start), *notes(problem, theory, proof, outcome, found.value)],
        structure=recognise(problem, found.value) if theory is None else None,
        history=run.history,
        restarts=result.restarts,
    )
