"""``ufm-fast landscape``: the smallest Hessian eigenvalue at a run's point, and what kind of point
that makes it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ufm_fast.cli import report
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.model import saved_model

if TYPE_CHECKING:
    from ufm_fast.objective import Objective
    from ufm_fast.point import Point


def landscape(path: Path, *, json: bool, variables: str, max_products: int, tol: float) -> None:
    """Classify the saved point of a run, in float64 whatever the run's dtype, and print the
    verdict.
    """
    from ufm_fast.landscape import classify

    run = RunDirectory.open(path, "run")
    objective, x = _saved_point(run, variables)
    found = classify(objective, x, tol=tol, max_products=max_products).summary()
    found = {
        "run": str(path),
        "variables": objective.variables,
        "reduce": objective.reduce,
        **found,
    }
    if json:
        report.print_json(found)
        return
    table = Table(title=str(path), title_justify="left", show_header=False, title_style="bold")
    for name, text in _rows(found):
        table.add_row(name, text)
    Console().print(table)


def _saved_point(run: RunDirectory, variables: str) -> tuple[Objective, Point]:
    """The objective of a run, and its point in the objective's variables."""
    from ufm_fast.objective import Objective

    problem, reduce, model = saved_model(run, dtype="float64")
    objective = Objective(problem, reduce=reduce, variables=variables)
    return objective, objective.from_model(model.W, model.H, model.b, model.hidden)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    number, certificate, bound = report.number, found["certificate"], found["lower_bound"]
    certain = f"but for probability {number(found['failure_probability'], 1)}"
    converged = "" if found["converged"] else "  (not converged; give more --max-products)"
    rows = [
        ("classification", found["classification"]),
        (
            "smallest eigenvalue",
            f"{number(found['eigenvalue'], 9)}  (negative is below "
            f"-{number(found['threshold'], 2)})",
        ),
        ("residual", number(found["residual"], 2) + converged),
        (
            "none below",
            f"{number(bound)}  ({certain})"
            if math.isfinite(bound)
            else "-  (too few products to say)",
        ),
        ("largest eigenvalue", f"{number(found['largest'])} at least"),
        (
            "gradient norm",
            f"{number(found['gradient_norm'])}  (relative {number(found['relative_gradient'], 2)})",
        ),
        ("value", number(found["value"], 15)),
        ("products", str(found["products"])),
        ("rows, variables", f"{found['reduce']}, {found['variables']}"),
    ]
    if certificate is not None and certificate["spectral_ratio"] is not None:
        rows.insert(2, ("spectral ratio", number(certificate["spectral_ratio"], 9)))
    if found["note"]:
        rows.append(("kinks", found["note"]))
    return rows
