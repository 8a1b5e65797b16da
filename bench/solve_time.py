"""Time to a certified relative gap of 1e-8, cross-entropy in float64, K = 1000, d = 1024 (no closed
form is used).

Ours from the random start ('normal') and from the spectral start, reported apart; against
``torch.optim.LBFGS`` (lr 1, history 10: without line search, on f and on f / mu, and strong Wolfe)
and gradient descent. These run on dense ``F.cross_entropy`` autograd in (W, H) with one row a class
weighted by its count, the cheapest form of the same problem, until the same gap or the iteration
limit; the gap is looked at every ``--check`` iterations, outside the clock. ``--case balanced`` is
the other problem.

torch's L-BFGS keeps a pair (s, y) only where y.s > 1e-10, whatever the scale of the objective. On a
mean over many samples it may keep none, and then it is gradient descent: hence f / mu, mu =
sqrt(lambda_W lambda_H), and the column ``pairs``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from bench.table import Record
from ufm_fast import Point, Problem, solve
from ufm_fast.theory.certificates import certify

GAP = 1e-8


def problem(case: str, K: int, d: int) -> Problem:
    if case == "balanced":
        return Problem(classes=K, dim=d, lambda_w=1e-6, lambda_h=1e-6)
    counts = torch.logspace(0, math.log10(500.0), K, dtype=torch.float64).round().long()
    return Problem(counts=counts, dim=d, lambda_w=1e-3, lambda_h=1e-3 / int(counts.sum()))


def ours(case: Problem, start: str) -> dict[str, object]:
    """One solve, the start and the certificate included in the clock."""
    began = time.perf_counter()
    solution = solve(case, start=start, tol=3e-10, metrics=False)
    gap = solution.certificate.relative_gap
    return {
        "method": solution.method,
        "start": start,
        "seconds": round(time.perf_counter() - began, 2),
        "iterations": solution.steps,
        "evaluations": solution.evaluations,
        "gap": f"{gap:.2e}",
        "value": repr(solution.value),
        "ended": solution.outcome.value,
    }


def baseline(case: Problem, kind: str, limit: int, check: int) -> dict[str, object]:
    """torch.optim on dense autograd, from the same random start."""
    start = solve(case, start="normal", max_steps=0, metrics=False, certificate=False)
    W, H = start.point.W.clone().requires_grad_(), start.point.H.clone().requires_grad_()
    rows, share = case.rows("classes"), case.counts[case.counts > 0].double() / case.num_samples
    y, weight = rows.targets.indices, rows.counts.double()

    def objective() -> torch.Tensor:
        data = share @ torch.nn.functional.cross_entropy(H @ W.T, y, reduction="none")
        return (
            data
            + case.lambda_w / 2 * W.square().sum()
            + case.lambda_h / 2 * (weight @ H.square().sum(1))
        )

    optimiser, scale, evaluations = (
        _optimiser(kind, [W, H]),
        1 / math.sqrt(case.lambda_w * case.lambda_h) if kind == "lbfgs over mu" else 1.0,
        0,
    )

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        value = scale * objective()
        value.backward()
        return value

    seconds, iterations, pairs, gap, ended = 0.0, 0, 0, math.inf, "iteration limit"
    while iterations < limit:
        began = time.perf_counter()
        before = (
            objective().item()
            if kind == "lbfgs strong wolfe" and iterations % check == 0
            else math.nan
        )
        seconds += -(time.perf_counter() - began) if before == before else 0.0
        for _ in range(min(check, limit - iterations)):
            optimiser.step(closure)
            iterations += 1
        seconds += time.perf_counter() - began
        value = objective().item()
        if not math.isfinite(value):
            ended = "diverged"
            break
        pairs = max(
            (len(state.get("old_dirs", ())) for state in optimiser.state.values()), default=0
        )
        gap = certify(case, rows, Point(W.detach(), H.detach())).relative_gap
        print(
            f"  {kind}: {iterations} iterations, {seconds:.1f} s, value {value!r}, gap {gap:.2e}, "
            f"{pairs} pairs",
            flush=True,
        )
        if gap <= GAP:
            ended = "gap reached"
            break
        if value == before:
            ended = "stalled"
            break
    return {
        "method": kind,
        "start": "normal",
        "seconds": round(seconds, 2),
        "iterations": iterations,
        "evaluations": evaluations,
        "pairs": pairs,
        "gap": f"{gap:.2e}",
        "value": repr(objective().item()),
        "ended": ended,
    }


def _optimiser(kind: str, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The optimiser whose ``step(closure)`` is one iteration; its state lives on between calls."""
    if kind == "gradient descent":
        return torch.optim.SGD(parameters, lr=1.0)
    search = "strong_wolfe" if kind == "lbfgs strong wolfe" else None
    return torch.optim.LBFGS(
        parameters,
        lr=1,
        history_size=10,
        max_iter=1,
        max_eval=26,
        line_search_fn=search,
        tolerance_grad=0,
        tolerance_change=0,
    )


def records(
    classes: int = 1000,
    dim: int = 1024,
    case: str = "imbalanced",
    limit: int = 2000,
    check: int = 100,
    only: str = "ours,lbfgs,lbfgs over mu,lbfgs strong wolfe,gradient descent",
) -> Iterator[Record]:
    chosen = problem(case, classes, dim)
    solve(Problem(classes=20, dim=32))  # first use of the libraries is nobody's time
    for name in only.split(","):
        for start in ("spectral", "normal") if name == "ours" else ("normal",):
            row = ours(chosen, start) if name == "ours" else baseline(chosen, name, limit, check)
            method, figures = str(row.pop("method")), row
            del figures["start"]
            yield Record({"case": case, "K": classes, "d": dim, "start": start}, figures, method)
