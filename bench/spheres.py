"""Minima of cross-entropy on spheres from random starts, with margins in the angle, and with more
classes than d + 1: how many starts meet theory or a known code, in how many evaluations. No clock.

One row a class, float64, start `normal`, the default method. ``met`` are the starts within
``tolerance`` of the reference, ``error`` the worst of theirs, ``evaluations`` the most of all.
``--only NAME``: simplices, angles, codes or margins.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.table import Record
from ufm_fast import Problem, Solution, solve
from ufm_fast.metrics.one_vs_rest import one_vs_rest
from ufm_fast.theory.codes import known_code

TEMPERATURES = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 100.0)
ANGLES = ((1.0, 0.1), (1.0, 0.5), (1.0, 1.0), (10.0, 0.1), (10.0, 0.5), (10.0, 1.0), (64.0, 0.5))
CODES = ((12, 3), (16, 5), (27, 6), (56, 7))
QUICK = {"certificate": False, "metrics": False}


def problem(classes: int, dim: int, temperature: float, **more: object) -> Problem:
    sphere = {"constraint": "sphere", "temperature": temperature}
    return Problem(classes=classes, per_class=1, dim=dim, **sphere, **more)


def started(starts: int, *sizes: float, **more: object) -> list[Solution]:
    return [
        solve(problem(*sizes, seed=seed, **more), start="normal", **QUICK) for seed in range(starts)
    ]


def row(name: str, found: list[Solution], reference: float, tolerance: float) -> Record:
    errors = [abs(one.value / reference - 1) for one in found]
    met = [error for error in errors if error <= tolerance]
    measured = {
        "met": len(met),
        "evaluations": int(max(one.evaluations for one in found)),
        "error": f"{max(met, default=float('nan')):.1e}",
    }
    return Record({"case": name, "starts": len(found), "tolerance": tolerance}, measured)


def simplices() -> Iterator[Record]:
    for K, d, t in (*((10, 16, t) for t in TEMPERATURES), (100, 128, 5.0)):
        found = started(3, K, d, t)
        yield row(f"K = {K}, d = {d}, t = {t:g}", found, found[0].theory.value, 1e-10)


def angles() -> Iterator[Record]:
    for t, m in ANGLES:
        for d in (9, 16):
            found = started(3, 10, d, t, angular_margin=m)
            name = f"K = 10, d = {d}, t = {t:g}, angular margin {m:g}"
            yield row(name, found, found[0].theory.value, 1e-10)


def codes() -> Iterator[Record]:
    for K, d in CODES:
        found = started(8, K, d, 10.0)
        yield row(f"K = {K}, d = {d}, t = 10", found, known_code(K, d).value(10.0), 1e-10)
    found, e8 = started(10, 240, 8, 10.0), known_code(240, 8)
    yield row("K = 240, d = 8, t = 10", found, e8.value(10.0), 1e-9)
    best = min(found, key=lambda one: one.value).point
    after = solve(problem(240, 8, 5.0), initial=best, method="lbfgs", **QUICK)
    yield row("K = 240, d = 8, t = 5 from the best of t = 10", [after], e8.value(5.0), 1e-12)


def margins() -> Iterator[Record]:
    found = solve(problem(100, 10, 96.0), start="normal", tol=1e-6, **QUICK)
    margin = one_vs_rest(found.point.W)[0]
    measured = {"one_vs_rest": f"{margin:.4f}", "evaluations": int(found.evaluations)}
    yield Record({"case": "K = 100, d = 10, t = 96, tol = 1e-6"}, measured)


PARTS = {"simplices": simplices, "angles": angles, "codes": codes, "margins": margins}


def records(only: str = "") -> Iterator[Record]:
    for name, part in PARTS.items():
        if only in name:
            yield from part()
