"""Starts and solves of several ranks against those of one process."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sharded_problems import (
    DATA,
    EASY,
    OWN,
    SMALL,
    TINY,
    VECTORS,
    WEIGHTED,
    Check,
    whole,
    words,
)

from ufm_fast import point, solving
from ufm_fast.backends import ShardedBackend, sharded_sweep
from ufm_fast.errors import InputError
from ufm_fast.layout import STOP, Mesh, gathered
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.sharded_starts import cut
from ufm_fast.solvers import first_order, minimise
from ufm_fast.solvers.curvature import Curvature, codes, curvature_of, squares
from ufm_fast.solvers.solution import StepRecord
from ufm_fast.solving import solve
from ufm_fast.starts import STARTS, make_start
from ufm_fast.theory import closed_form

_NINE = {"counts": [3, 0, 1, 0, 4, 2, 2, 2, 1]}


def starts(mesh: Mesh, folder: Path) -> Iterator[Check]:
    """Starts are those of the world before, of another number of ranks; the spectral one is that of
    one process.
    """
    for name in STARTS:
        for d, given in (
            (2, _NINE),
            (12, _NINE),
            (4, {**_NINE, "layers": 2}),
            (8, {**_NINE, "constraint": "sphere"}),
            (6, WEIGHTED),
            (3, WEIGHTED),
            (5, {**VECTORS, "bias": "free"}),
            (1, VECTORS),
            (7, {**VECTORS, "layers": 2}),
        ):
            if name == "balanced" and "layers" in given:
                continue  # which no start is
            problem = Problem(dim=d, **given)
            objective = Objective(problem, backend=ShardedBackend(mesh))
            found = whole(make_start(objective, name, seed=3))
            path = folder / f"{name}{d}.pt"
            if mesh.ranks == 1:
                torch.save(found.named(), path)
            before = Point.of(torch.load(path))
            if name == "spectral" and d in (1, 5, 6, 7, 12):
                before = make_start(Objective(problem), name, seed=3)
            yield f"start {name} {d}", found.axpy(-1.0, before).norm(), 1e-13
            if given is _NINE and name in ("orthogonal", "balanced"):
                yield f"start {name} {d} is {name}", _unlike(name, found), 1e-13


def _unlike(name: str, x: Point) -> torch.Tensor:
    """How far the factors are from orthonormal columns (or rows), or from one Gram matrix."""
    if name == "balanced":
        return (x.W.T @ x.W - x.H.T @ x.H).norm()
    inner = [X.T @ X if len(X) >= X.shape[1] else X @ X.T for X in (x.W, x.H)]
    return torch.stack([(G - torch.eye(len(G), dtype=G.dtype)).norm() for G in inner]).max()


_TEN = {"max_steps": 10, "tol": 1e-14}


_BY_TURNS, _FIXED = {"method": "alternating", **_TEN}, {"freeze": "w"}


#: Solves from one start, whose minima (or tenth points) are those of one process.
SOLVES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"counts": [3, 0, 2, 5, 4], "dim": 6, **EASY}, {}),
    ({**SMALL, "loss": "mse", "bias": "free"}, {}),
    ({**SMALL, "smoothing": 0.1, "bias": "penalised", "lambda_b": 0.01}, {"method": "newton-cg"}),
    ({**SMALL, "loss": "focal", "bias": "free"}, {"method": "cg"}),
    ({**SMALL, "freeze": "h"}, {"reduce": "none", "method": "lbfgs"}),
    ({**SMALL, "layers": 3, "loss": "mse"}, {}),
    ({"counts": [3, 1, 2], "dim": 4, "constraint": "sphere", "temperature": 20.0}, {}),
    ({**SMALL, "logit_adjustment": 1.0, "class_scales": 0.3, "feature_penalties": 0.5}, {}),
    ({**SMALL, **OWN, "bias": "free"}, {}),
    ({"counts": [3, 0, 2, 4, 0, 0], "dim": 3, "loss": "mse", **TINY}, {}),
    ({**SMALL, **OWN, "loss": "mse"}, {"variables": "raw"}),
    (
        {"labels": torch.tensor([2, 0, 1, 0, 2, 1]), "classes": 3, "dim": 4, "constraint": "sphere"}
        | {"temperature": 2.0, "angular_margin": 0.3},
        {"reduce": "none"},
    ),
    ({**WEIGHTED, "dim": 4, "bias": "free", **EASY}, {}),
    ({**VECTORS, "dim": 5, "bias": "free", "lambda_w": 1e-4, "lambda_h": 1e-5}, {}),
    ({"targets": [[1.5, -0.3]] * 5, "dim": 3, "loss": "mse", "bias": "free"}, {}),
    *(
        (SMALL, {"method": name, **_TEN})
        for name in ("sign", "momentum", "nesterov", "adam", "spectral")
    ),
    ({**SMALL, "layers": 2, "bias": "free", "dim": 2}, {"method": "spectral", **_TEN}),
    (SMALL, {"method": "gd", "learning_rate": 0.5, **_TEN}),
    *(
        ({"counts": [3, 0, 2, 4], "dim": 3, **EASY, "loss": "mse", **given}, _BY_TURNS)
        for given in ({}, {"bias": "free", "feature_penalties": 0.5}, {"bias": "free", **_FIXED})
    ),
    ({**VECTORS, "dim": 3, "bias": "free", **EASY}, _BY_TURNS),
]


OF_DATA = [n for n, (given, _) in enumerate(SOLVES) if DATA & given.keys()]  # sets, vectors


def solves(*some: int, mesh: str | None = None) -> Iterator[Check]:
    for given, options in (SOLVES[number] for number in some):
        problem = Problem(**given)
        one = Objective(problem, reduce=options.get("reduce", "auto"))
        initial = one.to_model(make_start(one, "normal", seed=5))
        with mock.patch.object(first_order, "largest_curvature", return_value=2.0):
            expected, found = (
                solve(problem, initial=initial, backend=name, mesh=shape, **options)
                for name, shape in (("tiled", None), ("sharded", mesh))
            )
        assert found.outcome is expected.outcome, (given, options, found.message)
        if problem.dense and mesh is None:  # rows stay where outputs are fewer
            shape = found.point.layout.mesh.shape
            stay = problem.num_classes < one.rows.number
            yield f"default mesh {shape}", float((shape[0] == 1) is not stay), 0.0
        error = abs(found.value - expected.value) / max(expected.value, 1e-300)
        yield f"solve {words(given)} {options}", error, 1e-10
        yield (
            f"certified {words(given)} {options}",
            found.certificate.certified != expected.certificate.certified,
            0.0,
        )


def unlike_ranks(mesh: Mesh) -> Iterator[Check]:
    """Ranks whose clocks, memories and roundings differ take the same steps and save at the same
    time.
    """
    rank, saves = mesh.rank, []
    clock = itertools.count()
    patches = (
        mock.patch.object(
            time, "perf_counter", side_effect=lambda: 7.0 * rank + 0.1 * (1 + rank) * next(clock)
        ),
        mock.patch.object(sharded_sweep, "chunk_rows", return_value=1 + 2 * rank),
        mock.patch.object(
            point, "inner", lambda a, b, exact=point.inner: exact(a, b) * (1.0 + 3e-16 * rank)
        ),
        mock.patch.object(minimise, "SAVE_SECONDS", 0.5),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        found = solve(
            Problem(counts=[3, 1, 2, 5, 4], dim=6, **EASY),
            backend="sharded",
            on_save=lambda *_: saves.append(1),
        )
    numbers = torch.tensor([found.value, found.steps, len(saves)], dtype=torch.float64)
    for other in gathered(mesh.world, numbers, "test"):
        yield "unlike ranks", (other - numbers).abs().max(), 0.0
    yield "unlike ranks saved", 2 - len(saves), 0.0


_FIVE, _SETS = {"counts": [9, 3, 1, 1, 5]}, {"classes": 5, "multiplicities": "1:1,2:1"}


_GROUPS = {"lambda_w": 0.01, "lambda_h": 0.01}


_BUILT = {"method": "lbfgs", "max_steps": 8, "tol": 1e-14}  # at steps 3 and 6 or so


#: Problems for each model of the Hessian: its name, the problem, and options.
MODELLED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("pairs", {**_FIVE, "dim": 6, "bias": "free"}, _BUILT),
    ("squares", {**_FIVE, "dim": 3, "loss": "mse", "bias": "free"}, _BUILT),
    ("codes", {"counts": [1, 2, 1, 3, 1, 1, 2], "dim": 3, "bias": "free"}, _BUILT),
    ("sets", {**_SETS, "dim": 5, "loss": "pick-all", "bias": "free"}, _BUILT),
    ("pairs", {**_FIVE, "dim": 11, "loss": "focal"}, _BUILT),
    ("squares", {**_FIVE, "dim": 6, "loss": "mse"}, {**_BUILT, "method": "newton-cg"}),
    ("squares", {**VECTORS, "dim": 4, "bias": "free"}, _BUILT),
]


def of_product(name: str, many: Objective, ranks: int) -> int:
    """Bytes that a rank with a full block sends for a product with a model, as the models' files
    have them.
    """
    K, bias = many.problem.num_classes, many.problem.bias != "none"
    block, total = -(-K // ranks), 2 * (ranks - 1) * 8
    span = min(K, many.rows.number, many.problem.dim)  # of balanced factors
    spans = total * span * (span + bias) // ranks
    entries = 20  # ten pairs of five classes
    sent = {"pairs": 16 * (K - block) * block, "squares": 2 * spans, "codes": 0}
    return {**sent, "sets": total * entries // ranks}[name]


def products(model: Curvature, many: Objective, start: Point) -> Iterator[Check]:
    """What a rank sends for a product with a model is what is written, to the byte."""
    mesh, x = many.layout.mesh, cut(many.layout, start)
    built = model.build(many, x, many.value_and_grad(x)).model
    mesh.traffic.clear()
    built.apply(x)
    sent = of_product(model.name, many, mesh.ranks)
    yield f"{model.name} sends {dict(mesh.traffic)}", abs(mesh.traffic["curvature"] - sent), 0.0


def modelled(*some: int) -> Iterator[Check]:
    """Ranks have the models of the Hessian of one process, so they take its steps."""
    for name, given, options in (MODELLED[number] for number in some):
        problem = Problem(**{"lambda_w": 3e-3, "lambda_h": 3e-3, **given})
        one = Objective(problem)
        initial = one.to_model(make_start(one, "normal", seed=5))
        many = Objective(problem, backend=ShardedBackend(Mesh.of_world()))
        model = curvature_of(many)
        assert model is not None
        yield f"{name} serves", float(model.name != name), 0.0
        yield from products(model, many, make_start(one, "normal", seed=5))
        with mock.patch.object(codes, "_ROUND", 2), mock.patch.object(squares, "FIRST", 3):
            expected, found = (
                solve(problem, initial=initial, backend=backend, **options)
                for backend in ("tiled", "sharded")
            )
        yield f"{name} {words(given)} value", abs(found.value / expected.value - 1), 1e-10
        more = found.evaluations - expected.evaluations
        yield f"{name} {words(given)} {more} evaluations", abs(more), 4.0


#: Problems whose minimum is known as a point: all samples apart, groups of classes, spheres, sets,
#: layers.
KNOWN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"counts": [3, 3, 3, 1, 0], "dim": 5, "loss": "mse", **EASY}, {"reduce": "none"}),
    ({"counts": [2, 5, 2, 5, 5], "dim": 5, "bias": "free", **_GROUPS}, {}),
    ({"classes": 5, "dim": 6, "constraint": "sphere", "temperature": 5.0}, {"reduce": "none"}),
    ({"classes": 5, "multiplicities": "1:1,2:1", "loss": "pick-all", "dim": 6, "bias": "free"}, {}),
    ({"counts": [2, 2, 1], "dim": 4, "loss": "mse", "layers": 2}, {}),
    ({**VECTORS, "dim": 4, "bias": "free", **EASY}, {}),
]


def known_minima() -> Iterator[Check]:
    """The closed form's point, proved where one process proves it; more numbers are refused where
    it is made as a whole.
    """
    for given, options in KNOWN:
        by_class = closed_form(Problem(**given)).logits.by_class
        with mock.patch.object(solving, "GATHERED", 0 if by_class else 1 << 24):
            expected, found = (
                solve(Problem(**given), method="closed-form", backend=name, **options)
                for name in ("tiled", "sharded")
            )
        yield f"closed form {words(given)}", abs(found.value / expected.value - 1), 1e-12
        yield (
            f"closed form {words(given)} {found.message}",
            found.outcome is not expected.outcome,
            0.0,
        )
    layered, refused = Problem(counts=[2, 2, 1], dim=4, loss="mse", layers=2), ""
    try:
        with mock.patch.object(solving, "GATHERED", 10):
            solve(layered, method="closed-form", backend="sharded")
    except InputError as error:
        refused = str(error)
    yield f"closed form of many numbers: {refused}", "up to 10 numbers" not in refused, 0.0
    problem = Problem(counts=[0, 5, 0], loss="mse", bias="free", dim=4)
    found = solve(problem, backend="sharded", tol=1e-3)
    yield "all that a bias fits", found.value, 0.0
    yield "the bias alone fits it", abs(found.point.norm() - 1.0), 0.0
    again = solve(layered, backend="sharded", method="lbfgs", max_steps=5)
    on = solve(layered, backend="sharded", initial=again.point, max_steps=0)
    yield "goes on with layers", abs(on.value / again.value - 1), 1e-14


def several_starts() -> Iterator[Check]:
    """Each of several starts has its row, with the rank of its logits."""
    found = solve(
        Problem(counts=[3, 1, 2, 5, 4], dim=6, **EASY),
        backend="sharded",
        start="orthogonal",
        restarts=2,
        max_steps=0,
    )
    yield f"several starts {found.restarts}", sum(row.rank != 4 for row in found.restarts), 0.0


def interrupted(mesh: Mesh) -> Iterator[Check]:
    """A rank that is told to stop stops all of them, at the same step."""

    def tell(record: StepRecord, _: object) -> None:
        if mesh.rank == mesh.ranks - 1 and record.step == 3:
            STOP.set()

    found = solve(
        Problem(counts=[3, 1, 2, 5, 4], dim=6), backend="sharded", start="normal", on_log=tell
    )
    yield (
        f"interrupted: {found.outcome} {found.steps}",
        abs(found.steps - 3) + (found.outcome.value != "interrupted"),
        0.0,
    )
