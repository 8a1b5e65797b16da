"""``solve``: from a Problem to a Solution with its theory value, certificate and metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ufm_fast.arguments import cpu_by_default
from ufm_fast.backends import SHARDED, make_backend
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.errors import InputError
from ufm_fast.groups.choice import by_groups, minimise_groups
from ufm_fast.groups.lifting import lifted_solution
from ufm_fast.layout import Layout, Mesh
from ufm_fast.losses import SquaredError
from ufm_fast.measure import GATHERED, measure, usable
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.sharded_starts import cut
from ufm_fast.solvers.base import State
from ufm_fast.solvers.callbacks import Callback, Callbacks, OnLog, OnPoint
from ufm_fast.solvers.minimise import Run
from ufm_fast.solvers.options import SolveOptions
from ufm_fast.solvers.restarts import Begun, OnSave, StartLoop, last_record
from ufm_fast.solvers.solution import Effort, Outcome, Restart, Solution, Starts
from ufm_fast.solvers.table import METHODS
from ufm_fast.stopwatch import NO_WATCH, NoWatch
from ufm_fast.tall import of_first
from ufm_fast.theory import ClosedForm, closed_form
from ufm_fast.theory.certificates import certify
from ufm_fast.theory.structures import recognise
from ufm_fast.verdicts import at_saved_point, contradiction, notes, of_closed_form, of_start

__all__ = ["METHODS", "check", "solve"]


def check(problem: Problem, options: SolveOptions) -> None:
    """What ``solve`` would refuse before its first step. Errors: InputError naming the option."""
    options.check(problem)
    if options.method != "closed-form":
        return
    theory = closed_form(problem)
    if theory is None:
        raise InputError(
            "method closed-form: no closed form is known for this problem; use method auto"
        )
    size = problem.entries(problem.rows(problem.reduction(options.reduce)).number)
    if options.backend in SHARDED and not theory.logits.by_class and size > GATHERED:
        raise InputError(
            f"method closed-form on several ranks has this point as a whole on each of them first, "
            f"up to {GATHERED:,} numbers, and W and H are {size:,}; use method auto, or one process"
        )


@cpu_by_default
def solve(
    problem: Problem,
    options: SolveOptions | None = None,
    *,
    initial: Point | None = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnPoint | None = None,
    on_save: OnSave | None = None,
    watch: NoWatch = NO_WATCH,
    spent: Effort | None = None,
    starts: Starts | None = None,
    **changes: Any,
) -> Solution:
    """Minimise the problem's objective and prove how good the answer is.

    - ``problem``: what is minimised.
    - ``options``: a SolveOptions; or its fields as keywords (``changes``), which also change one
      that is given.
    - ``initial``: a Point to start from, with W, one H row for each row (or each sample), b and
      hidden layers (``runs.foreign.read_start`` reads one from a file).
    - ``callbacks``: hear of phases, log points, steps and the end (`Callback`); ``on_log(record,
      model_point)`` is the ``log`` of one, called with a function that gives the model's Point.
    - ``on_save(record, model_point, starts)``: called whenever the point is worth saving: every ten
      seconds, at an error, at the end before certificate and metrics; of several starts the best,
      at the end of each, too.
    - ``watch``: a Stopwatch for the seconds by phase.
    - ``spent``: what earlier runs that this one continues have spent; ``starts``: how far they came
      of several, ``initial`` being the point that was saved with it.

    Returns a Solution: point, value, outcome, theory, certificate, metrics. Ctrl-C returns the
    point that was reached, outcome 'interrupted'.

    >>> solution = solve(Problem(classes=10, dim=16), method="lbfgs", start="normal")
    >>> solution.value, solution.certificate.relative_gap, solution.metrics["nc2_classifier"]

    Errors: InputError for unknown names, contradictory choices, or an initial point of the wrong
    shape; InputTypeError for an option that there is not.
    """
    options = SolveOptions.of(**changes) if options is None else replace(options, **changes)
    check(problem, options)
    spent, told = (
        spent or Effort(),
        Callbacks([*([] if on_log is None else [OnLog(on_log)]), *callbacks]),
    )
    if by_groups(problem, options, begun=initial is not None or spent.steps > 0):
        best = minimise_groups(problem, options.tol)
        solution = lifted_solution(
            problem, best, certificate=options.certificate, metrics=options.metrics
        )
        told.end(solution)
        return solution
    objective = Objective(
        problem,
        backend=make_backend(
            options.backend, problem.device, problem.torch_dtype, _mesh(problem, options)
        ),
        reduce=options.reduce,
        variables=options.variables,
        watch=watch,
    )
    objective.evaluations = spent.evaluations
    if (
        options.method == "closed-form"
        and not spent.steps
        and (initial is not None or options.start != "spectral")
    ):
        raise InputError(
            "a start goes with iterative methods, and the closed form has none; drop the start or "
            "choose another method"
        )
    if initial is not None and options.restarts > 1 and starts is None:
        raise InputError(
            f"restarts = {options.restarts} contradict a given start; drop one of them"
        )
    theory = closed_form(problem)
    with torch.no_grad(), torch.autocast(torch.device(problem.device).type, enabled=False):
        if options.method == "closed-form":
            result = _Result(_closed_form_run(objective, theory), (), "closed-form", theory)
        else:
            loop = StartLoop(
                objective, options, Begun(initial, spent, starts or Starts()), told, on_save
            )
            run, starts = loop.run(), loop.starts
            start = options.start if initial is None or loop.several else "given"
            result = _Result(_fitted_by_bias(objective, run), loop.rows, start, theory)
        if on_save is not None:
            run = result.run
            total = Effort(spent.steps + run.steps, 0.0, spent.seconds + run.seconds)
            on_save(
                last_record(objective, run, total),
                lambda: objective.to_model(run.state.point),
                starts,
            )
        solution = _solution(objective, result, options, spent, told)
    told.end(solution)
    return solution


# So that help(solve) describes every keyword, from the one place where they stand.
solve.__doc__ = (
    f"{inspect.cleandoc(solve.__doc__ or '')}\n\n{inspect.cleandoc(SolveOptions.__doc__ or '')}"
)


def _mesh(problem: Problem, options: SolveOptions) -> str | None:
    """The mesh that was asked for; with target vectors of fewer outputs than rows all ranks by
    samples where none was: that sends least, and no rank is without outputs to multiply.
    """
    if options.mesh is not None or options.backend not in SHARDED or not problem.dense:
        return options.mesh
    rows = problem.rows(problem.reduction(options.reduce)).number
    return f"1x{Mesh.of_world().ranks}" if problem.num_classes < rows else None


@dataclass(frozen=True)
class _Result:
    run: Run
    restarts: tuple[Restart, ...]
    start: str
    theory: ClosedForm | None


def _closed_form_run(objective: Objective, theory: ClosedForm | None) -> Run:
    assert theory is not None
    layout, device = objective.layout, torch.device(objective.problem.device)
    if layout is None:
        point = _whole_minimiser(objective, theory).to(device=device)
    elif theory.logits.by_class:
        point = _part_of_minimiser(objective, layout, theory).to(device=device)
    else:
        first = partial(of_first, mesh=layout.mesh)
        point = cut(layout, _whole_minimiser(objective, theory).to(device=device).map(first))
    x = objective.from_model(point.W, point.H, point.b, point.hidden)
    found = objective.value_and_grad(x)
    return Run(State(x, found), 0, 0.0, Outcome.CONVERGED, "closed form: " + theory.source, [])


def _whole_minimiser(objective: Objective, theory: ClosedForm) -> Point:
    problem = objective.problem
    W, H, b = theory.point()
    if problem.target_sets is None and not problem.dense:
        H = H[problem.counts > 0]
    if objective.reduce == "none":
        H = H.index_select(0, problem.sample_row())
    return Point(W, H, _with_zeros(problem, W, b), theory.hidden())


def _part_of_minimiser(objective: Objective, layout: Layout, theory: ClosedForm) -> Point:
    """Of the classes here, and of the rows here, which have the means of their classes."""
    part = layout.class_part
    W, _, b = theory.logits.rows(torch.arange(part.start, part.stop))
    _, H, _ = theory.logits.rows(objective.targets.indices.cpu())
    return Point(W, H, _with_zeros(objective.problem, W, b), (), layout)


def _with_zeros(problem: Problem, W: Tensor, b: Tensor | None) -> Tensor | None:
    """The bias of these classes, where the problem has one."""
    return W.new_zeros(len(W)) if b is None and problem.bias != "none" else b


def _fitted_by_bias(objective: Objective, run: Run) -> Run:
    """Squared error that a free bias fits alone: once solved, the minimum itself, for no value is
    near its 0 relatively.
    """
    problem = objective.problem
    if (
        not isinstance(problem.loss, SquaredError)
        or problem.bias != "free"
        or problem.freeze is not None
    ):
        return run
    target = _only_target(objective)
    if target is None or not run.outcome.success:
        return run
    nothing = objective.to_model(run.state.point).zeros()
    assert nothing.b is not None
    here = slice(None) if objective.layout is None else objective.layout.class_part
    exact = objective.from_model(nothing.W, nothing.H, target[here].to(nothing.b))
    return replace(run, state=State(exact, objective.value_and_grad(exact)))


def _only_target(objective: Objective) -> Tensor | None:
    """The target vector of all samples (K,), if they have but one."""
    targets, counts = objective.rows.targets, objective.problem.counts
    if isinstance(targets, DenseTargets):
        first = targets.values[0]
        return first if bool((targets.values == first).all()) else None
    return torch.where(counts > 0, 1.0, 0.0) if int((counts > 0).sum()) == 1 else None


def _solution(
    objective: Objective, result: _Result, options: SolveOptions, spent: Effort, told: Callback
) -> Solution:
    problem, run, theory, rows = objective.problem, result.run, result.theory, objective.rows
    model, method = objective.to_model(run.state.point), options.method
    fits = math.isfinite(run.state.evaluation.value) and usable(
        model
    )  # else there is no certificate, and no metrics
    proof = None
    if options.certificate and fits:
        told.phase("certificate")
        with objective.watch("certificate"):
            proof = certify(problem, rows, model)
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
        method=method
        if method != "auto"
        else f"auto: {METHODS[method].make(problem, options).name}",
        backend=objective.backend.name,
        reduce=objective.reduce,
        variables=objective.variables,
        start=result.start,
        theory=theory,
        certificate=proof,
        metrics=_measured(objective, model, options, found.value, told)
        if options.metrics and fits
        else {},
        notes=[
            *of_start(problem, result.start),
            *notes(problem, theory, proof, outcome, found.value),
        ],
        structure=recognise(problem, found.value) if theory is None else None,
        history=run.history,
        restarts=result.restarts,
        phases=dict(objective.watch.seconds),
    )


def _measured(
    objective: Objective, model: Point, options: SolveOptions, value: float, told: Callback
) -> dict[str, float]:
    told.phase("metrics")
    with objective.watch("metrics"):
        return measure(objective.problem, objective.rows, model, options.pairwise, value)
