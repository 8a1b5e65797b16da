"""What a rank does in the tests of several ranks: ``python sharded_worker.py RANK FOLDER`` joins
worlds of 1, 2, 3 and 4 ranks.

One set of four processes serves all tests, for starting them is what costs. The first rank writes
RANKS.json: for each check its name, an error and what is allowed; an exception on any rank is a
check that failed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from strategies import BIAS_CASES, LOSS_CASES, random_point

from ufm_fast import measure as measuring
from ufm_fast import point, solving
from ufm_fast.backends import ShardedBackend, TiledBackend, has_triton, sharded_sweep
from ufm_fast.backends.cost import Cost
from ufm_fast.backends.sharded_sweep import parts_of
from ufm_fast.errors import InputError
from ufm_fast.layout import STOP, Mesh, block, gathered
from ufm_fast.measure import collapse_metrics, measure
from ufm_fast.metrics import Sampling, collect
from ufm_fast.metrics.spread import spread_metrics
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.sharded_starts import cut
from ufm_fast.solvers import first_order, minimise
from ufm_fast.solvers.curvature import Curvature, codes, curvature_of, squares
from ufm_fast.solvers.solution import StepRecord
from ufm_fast.solving import solve
from ufm_fast.starts import STARTS, make_start
from ufm_fast.targets import TargetSets
from ufm_fast.theory import closed_form
from ufm_fast.theory.certificates import certify

RANKS = (1, 2, 3, 4)
Check = tuple[str, float, float]


#: Distributions over some classes or all, of whatever sum, and a label alone.
WEIGHTED: dict[str, Any] = {
    "target_sets": TargetSets.create(
        [0, 2, 3, 8, 10, 12, 13],
        [0, 3, 1, 0, 1, 2, 3, 4, 2, 3, 4, 0, 2],
        5,
        [3, 1, 2, 2, 4, 1],
        [0.7, 0.3, 1.0, 0.2, 0.2, 0.3, 0.1, 0.2, 0.25, 0.5, 0.3, 0.7, 1.5],
    ),
    "loss": "pick-all",
}


#: Fewer outputs than ranks, some rows alike.
VECTORS: dict[str, Any] = {
    "targets": torch.linspace(-2.0, 3.0, 21, dtype=torch.float64)
    .exp()
    .reshape(7, 3)
    .cos()[[0, 3, 1, 2, 1, 6, 5, 4, 0, 0, 6]],
    "loss": "mse",
}


def problems() -> Iterator[tuple[str, Problem]]:
    """Every loss and bias kind: ragged blocks, an empty one for 3 and 4 ranks, classes without
    samples.
    """
    both = ("vectors", VECTORS), ("weighted", WEIGHTED)
    for (bias, lambda_b), first in zip(BIAS_CASES, (0, 1, 1), strict=True):  # some ranks skip half
        for name, given in (both[first], both[1 - first]):
            common = {"dim": 4, "lambda_w": 0.02, "lambda_h": 0.005, "bias": bias}
            yield f"{name} {bias}", Problem(**given, **common, lambda_b=lambda_b)
    for case in LOSS_CASES:
        for bias, lambda_b in BIAS_CASES:
            common = {
                "dim": 4,
                "bias": bias,
                "lambda_b": lambda_b,
                "lambda_w": 0.02,
                "lambda_h": 0.005,
                **case,
            }
            name = " ".join(map(str, [*case.values(), bias]))
            if case["loss"] == "pick-all":
                sets = [[0, 1], [2], [3, 1, 4], [0], [1], [3], [4], [2, 0], [4, 3]]
                indptr = torch.tensor([0, *map(len, sets)]).cumsum(0)
                flat = [k for members in sets for k in members]
                yield (
                    name,
                    Problem(
                        classes=5,
                        target_sets=TargetSets.create(indptr, flat, 5, range(1, 10)),
                        **common,
                    ),
                )
                continue
            counts = [3, 1, 2, 5, 4] if bias == "free" else [3, 0, 1, 0, 4]
            yield name, Problem(counts=counts, **common)
    yield (
        "labels",
        Problem(
            labels=torch.tensor([4, 0, 2, 2, 4, 0, 1, 4, 4, 2, 9]), classes=11, dim=3, lambda_w=0.01
        ),
    )


ANGULAR: dict[str, Any] = {
    "constraint": "sphere",
    "temperature": 5.0,
    "angular_margin": [0.5, 0.3, 0.0, 1.2, 0.02],
}
DATA = {"targets", "target_sets"}  # in the place of counts
#: What stands before the head, or changes its logits and penalties.
MODELS: list[dict[str, Any]] = [
    {"layers": 3, "activation": "relu", "bias": "free", "lambda_hidden": [0.01, 0.03]},
    {"layers": 2, "loss": "mse"},
    {"constraint": "sphere", "temperature": 5.0},
    {"logit_adjustment": 1.0, "margin": 0.5, "class_scales": 0.3, "smoothing": 0.1},
    {"feature_penalties": 0.5, "loss": "focal"},
    {"feature_penalties": 0.5, "loss": "mse"},
    {"classifier_penalties": [2.0, 1.0, 0.1, 3.0, 0.5], "class_scales": 0.3, "bias": "free"},
    {"classifier_penalties": -0.5, "loss": "mse", "bias": "penalised", "lambda_b": 0.1},
    {"classifier_penalties": -0.5, "loss": "focal", "feature_penalties": 0.5},
    {"classifier_penalties": -1.0, "layers": 2, "activation": "relu"},
    {**WEIGHTED, "logit_adjustment": [0.1, 0.0, -1.0, 2.0, 0.3], "class_scales": 0.3},
    {**WEIGHTED, "layers": 2},
    {**WEIGHTED, "classifier_penalties": [2.0, 1.0, 0.1, 3.0, 0.5], "bias": "free"},
    {**VECTORS, "layers": 2, "activation": "relu"},
    {**VECTORS, "freeze": "h"},
    {**ANGULAR, "logit_adjustment": 0.5, "margin": 0.1},
]


def models() -> Iterator[tuple[str, Problem]]:
    for given in MODELS:
        plain = {} if "constraint" in given else {"lambda_w": 0.02, "lambda_h": 0.005}
        data = {} if DATA & given.keys() else {"counts": [3, 1, 2, 5, 4]}
        yield words(given), Problem(dim=4, **data, **plain, **given)


def words(given: dict[str, Any]) -> str:
    """Settings in a line: of arrays their names."""
    shown = (int, float, str)
    return ", ".join(f"{k} {v}" if isinstance(v, shown) else k for k, v in given.items())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (
        float((found - expected).norm() / expected.norm().clamp_min(1e-300))
        if expected.numel()
        else 0.0
    )


def whole(x: Point) -> Point:
    """The blocks of all ranks together."""
    world = x.layout.mesh.world
    parts = {
        name: part if name.startswith("hidden") else torch.cat(gathered(world, part, "test"))
        for name, part in x.named().items()
    }
    return Point.of(parts)


def heads(
    mesh: Mesh,
    cases: list[tuple[str, Problem]],
    scale: float = 1.0,
    reduce: str = "auto",
) -> Iterator[Check]:
    """Value, gradient, Hessian product, statistics, products and losses against `tiled` in one
    process.
    """
    for name, problem in cases:
        one = Objective(problem, backend=TiledBackend(), reduce=reduce)
        many = Objective(problem, backend=ShardedBackend(mesh, chunk=3 * mesh.ranks), reduce=reduce)
        x = one.geometry.project(random_point(one, 1, scale))
        v = one.geometry.tangent(x, random_point(one, 2))
        at, along = cut(many.layout, x), cut(many.layout, v)
        softmax = problem.loss.name != "mse"
        expected, found = (
            one.value_and_grad(x, statistics=True),
            many.value_and_grad(at, statistics=True),
        )
        again = many.value_and_grad(at)
        repeats = again.value == found.value and all(
            map(torch.equal, again.gradient.parts(), found.gradient.parts())
        )
        yield f"{name} repeats to the bit", float(not repeats), 0.0
        yield f"{name} value", abs(found.value / expected.value - 1), 1e-12
        gradient = whole(found.gradient)
        yield (
            f"{name} gradient",
            gradient.axpy(-1.0, expected.gradient).norm() / expected.gradient.norm(),
            1e-12,
        )
        yield f"{name} dot", abs(found.gradient.dot(along) / expected.gradient.dot(v) - 1), 1e-10
        product, exact = whole(many.hvp(at, along)), one.hvp(x, v)
        yield (
            f"{name} hessian",
            product.axpy(-1.0, exact).norm() / exact.norm(),
            1e-12 * max(1.0, scale) ** 2,
        )
        world = mesh.world
        if softmax:
            for field in ("margin", "log_off_target_mass"):
                all_rows = torch.cat(gathered(world, getattr(found.statistics, field), "test"))
                yield (
                    f"{name} {field}",
                    relative(all_rows, getattr(expected.statistics, field)),
                    1e-12,
                )
        generator = torch.Generator().manual_seed(0)
        right, left = (
            torch.randn(n, 2, generator=generator, dtype=torch.float64)
            for n in (len(x.W), len(x.H))
        )
        exact, G = (o.backend.logit_gradient(o.head_input(p)) for o, p in ((one, x), (many, at)))
        forward, backward = (
            G.times(right[many.layout.class_part]),
            G.transposed_times(left[many.layout.row_part]),
        )
        for side, a, b in (
            ("G", exact.times(right), forward),
            ("G'", exact.transposed_times(left), backward),
        ):
            yield (
                f"{name} {side} product",
                relative(torch.cat(gathered(world, b, "test")), a),
                1e-12,
            )
        losses = torch.cat(gathered(world, many.backend.losses(many.head_input(at)), "test"))
        yield f"{name} losses", relative(losses, one.backend.losses(one.head_input(x))), 1e-11


#: What the kernels are run on, under their interpreter: a label a row, several, smoothing, a wrong
#: class far ahead, on the first of two ranks more targets a row than kernels take, weights, and on
#: the last of three no classes.
KERNELS: list[tuple[dict[str, Any], float]] = [
    ({"counts": [3, 1, 2, 5, 4], "bias": "free", "smoothing": 0.1}, 1.0),
    ({"counts": [3, 1, 2, 5, 4]}, 60.0),
    ({"classes": 5, "multiplicities": "1:1,2:1", "loss": "pick-all"}, 1.0),
    (
        {
            "target_sets": TargetSets.create([0, 40, 41], [*range(40), 3], 80),
            "loss": "pick-all",
            "classes": 80,
        },
        1.0,
    ),
    ({**WEIGHTED, "bias": "free"}, 1.0),
    ({"counts": [3, 0, 1, 4], "loss": "focal", "bias": "penalised", "lambda_b": 0.03}, 1.0),
]


ON_KERNELS = {2: (0, 3), 3: (1, 2, 4, 5)}  # cases by numbers of ranks


def kernels(mesh: Mesh, *some: int) -> Iterator[Check]:
    """`triton` on each rank, in float32, against `tiled` in one process in float64."""
    for number in some:
        given, scale = KERNELS[number]
        case = f"kernels {number}"
        problem = Problem(**given, dim=20, lambda_w=0.02, lambda_h=0.01)
        one = Objective(problem, backend=TiledBackend(), reduce="classes")
        backend = ShardedBackend(mesh, chunk=4 * mesh.ranks, inner="triton")
        many = Objective(replace(problem, dtype="float32"), backend=backend, reduce="classes")
        x = random_point(one, 1, scale).to(dtype=torch.float32).to(dtype=torch.float64)
        at = cut(many.layout, x.to(dtype=torch.float32))
        expected, found = (o.value_and_grad(p, statistics=True) for o, p in ((one, x), (many, at)))
        yield f"{case} value", abs(found.value / expected.value - 1), 1e-6
        for name, part in whole(found.gradient).named().items():
            of_one = expected.gradient.named()[name]
            yield f"{case} gradient in {name}", relative(part.double(), of_one), 5e-6
        margins = torch.cat(gathered(mesh.world, found.statistics.margin, "test"))
        yield f"{case} margins", relative(margins, expected.statistics.margin), 1e-5
        exact, G = (o.backend.logit_gradient(o.head_input(p)) for o, p in ((one, x), (many, at)))
        left = exact.transposed_times(x.H[:, :2])
        product = torch.cat(gathered(mesh.world, G.transposed_times(at.H[:, :2]), "test"))
        yield f"{case} G' product", relative(product.double(), left), 1e-5
        v = random_point(one, 2).to(dtype=torch.float32).to(dtype=torch.float64)
        along = cut(many.layout, v.to(dtype=torch.float32))
        exact_product, product = one.hvp(x, v), whole(many.hvp(at, along)).to(dtype=torch.float64)
        error = product.axpy(-1.0, exact_product).norm() / exact_product.norm()
        yield f"{case} hessian", error, 5e-6 if scale == 1.0 else 5e-3


def level(mesh: Mesh) -> Iterator[Check]:
    """Equal logits stay equal, whatever their size and whichever rank has the others: the last of
    three ranks has one class alone.
    """
    problem = Problem(counts=[3, 1, 2, 5, 4], dim=20, dtype="float32")
    backend = ShardedBackend(mesh, chunk=4 * mesh.ranks, inner="triton")
    objective = Objective(problem, backend=backend, reduce="classes")
    x = random_point(objective, 1, 60.0)
    x = replace(x, W=x.W[:1].expand_as(x.W), H=x.W[:1] + x.H)
    at = objective.head_input(cut(objective.layout, x.to(dtype=torch.float32)))
    for losses in gathered(mesh.world, objective.backend.losses(at), "test"):
        yield "equal logits", (losses - math.log(5)).abs().max(), 1e-6


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


_EASY, _TINY = {"lambda_w": 0.03, "lambda_h": 0.03}, {"lambda_w": 1e-7, "lambda_h": 1e-7}
_SMALL = {"counts": [3, 1, 2], "dim": 4, **_EASY}
_OWN = {"classifier_penalties": [1.0, 3.0, 0.2]}
_TEN = {"max_steps": 10, "tol": 1e-14}
_BY_TURNS, _FIXED = {"method": "alternating", **_TEN}, {"freeze": "w"}
#: Solves from one start, whose minima (or tenth points) are those of one process.
SOLVES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"counts": [3, 0, 2, 5, 4], "dim": 6, **_EASY}, {}),
    ({**_SMALL, "loss": "mse", "bias": "free"}, {}),
    ({**_SMALL, "smoothing": 0.1, "bias": "penalised", "lambda_b": 0.01}, {"method": "newton-cg"}),
    ({**_SMALL, "loss": "focal", "bias": "free"}, {"method": "cg"}),
    ({**_SMALL, "freeze": "h"}, {"reduce": "none", "method": "lbfgs"}),
    ({**_SMALL, "layers": 3, "loss": "mse"}, {}),
    ({"counts": [3, 1, 2], "dim": 4, "constraint": "sphere", "temperature": 20.0}, {}),
    ({**_SMALL, "logit_adjustment": 1.0, "class_scales": 0.3, "feature_penalties": 0.5}, {}),
    ({**_SMALL, **_OWN, "bias": "free"}, {}),
    ({"counts": [3, 0, 2, 4, 0, 0], "dim": 3, "loss": "mse", **_TINY}, {}),
    ({**_SMALL, **_OWN, "loss": "mse"}, {"variables": "raw"}),
    (
        {"labels": torch.tensor([2, 0, 1, 0, 2, 1]), "classes": 3, "dim": 4, "constraint": "sphere"}
        | {"temperature": 2.0, "angular_margin": 0.3},
        {"reduce": "none"},
    ),
    ({**WEIGHTED, "dim": 4, "bias": "free", **_EASY}, {}),
    ({**VECTORS, "dim": 5, "bias": "free", "lambda_w": 1e-4, "lambda_h": 1e-5}, {}),
    ({"targets": [[1.5, -0.3]] * 5, "dim": 3, "loss": "mse", "bias": "free"}, {}),
    *(
        (_SMALL, {"method": name, **_TEN})
        for name in ("sign", "momentum", "nesterov", "adam", "spectral")
    ),
    ({**_SMALL, "layers": 2, "bias": "free", "dim": 2}, {"method": "spectral", **_TEN}),
    (_SMALL, {"method": "gd", "learning_rate": 0.5, **_TEN}),
    *(
        ({"counts": [3, 0, 2, 4], "dim": 3, **_EASY, "loss": "mse", **given}, _BY_TURNS)
        for given in ({}, {"bias": "free", "feature_penalties": 0.5}, {"bias": "free", **_FIXED})
    ),
    ({**VECTORS, "dim": 3, "bias": "free", **_EASY}, _BY_TURNS),
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


#: Classes up to which norms are exact. Krylov spaces of few dimensions are exhausted, so that the
#: other norms are right too.
EXACT, SAMPLED = 4096, 1


def certificates(mesh: Mesh, every: int) -> Iterator[Check]:
    """Every rank's certificate is that of one process, also at points that are no minima; of a
    focal loss with a bias it lacks the rows that follow the bias.
    """
    cases = [
        *problems(),
        *models(),
        *(
            ("frozen " + f, Problem(**_SMALL, **_OWN, freeze=f, bias="penalised", lambda_b=0.1))
            for f in "wh"
        ),
    ]
    for (name, problem), exact in itertools.product(cases[::every], (EXACT, SAMPLED)):
        one, many = Objective(problem), Objective(problem, backend=ShardedBackend(mesh))
        x = one.to_model(one.geometry.project(random_point(one, 1, 0.3)))
        expected = certify(problem, one.rows, x, exact_classes=exact)
        found = certify(problem, many.rows, cut(many.layout, x), exact_classes=exact)
        assert found.kind == expected.kind, (name, found, expected)
        numbers = torch.tensor(
            [found.value, found.lower_bound, found.spectral_ratio or 0.0], dtype=torch.float64
        )
        own = torch.tensor(
            [expected.value, expected.lower_bound, expected.spectral_ratio or 0.0],
            dtype=torch.float64,
        )
        follows = problem.loss.name == "focal" and problem.bias != "none"
        least = numbers.minimum(own) if follows else own
        yield (
            f"certificate {name} {exact}",
            ((numbers - least).abs() / own.abs().clamp_min(1.0)).max(),
            1e-10,
        )
        for other in gathered(mesh.world, numbers, "test"):
            yield f"certificate of all ranks {name} {exact}", (other - numbers).abs().max(), 0.0


#: More and fewer classes than dimensions, classes without rows, equal counts, a rank without rows,
#: one class.
MEASURED: list[tuple[dict[str, Any], str]] = [
    ({"counts": [3, 0, 1, 2, 5, 2, 2], "dim": 3, "lambda_w": 0.02}, "none"),
    ({"counts": [3, 1, 2, 2], "dim": 2}, "classes"),
    ({"counts": [2] * 7, "dim": 3}, "none"),
    ({"counts": [3, 0, 1, 4], "dim": 6}, "none"),
    ({"counts": [0, 4, 0, 0, 0], "dim": 3}, "none"),
    ({"counts": [3, 1, 1, 2, 5, 2, 2], "dim": 3, "bias": "free"}, "classes"),
    ({"counts": [3, 1, 2], "dim": 6, "bias": "free"}, "classes"),
    ({"counts": [3, 1, 2, 4, 2], "dim": 3, "layers": 2}, "none"),
    ({"counts": [3, 1, 2, 4], "dim": 5, "layers": 3, "loss": "mse"}, "classes"),
    ({"classes": 5, "multiplicities": "1:2,2:1", "loss": "pick-all", "dim": 3}, "classes"),
    ({"counts": [3, 1, 2, 2], "dim": 2, "classifier_penalties": -1.0}, "classes"),
    ({**VECTORS, "targets": VECTORS["targets"][:4], "dim": 5}, "classes"),
    ({**VECTORS, "dim": 2, "bias": "free"}, "none"),
]


def on_ranks(name: str) -> bool:
    """Whether ranks have a metric of a large point: all but those of target sets."""
    return not name.startswith(("tag_", "nc1_sets"))


def metrics(mesh: Mesh) -> Iterator[Check]:
    """What ranks measure together is as in one process, the same on every rank; also where all is
    zero.
    """
    for given, reduce in MEASURED:
        problem = Problem(**given)
        one, many = (
            Objective(problem, reduce=reduce),
            Objective(problem, backend=ShardedBackend(mesh), reduce=reduce),
        )
        start = one.to_model(random_point(one, 1))
        for x in (start, start.zeros()):
            expected = {
                k: v for k, v in measure(problem, one.rows, x, "auto", 1.0).items() if on_ranks(k)
            }
            logged = {
                k: v for k, v in collapse_metrics(problem, x, reduce, 1.0).items() if on_ranks(k)
            }
            expected |= {f"logged {k}": v for k, v in logged.items()}
            with mock.patch.object(measuring, "GATHERED", 0):
                found = measure(problem, many.rows, cut(many.layout, x), "auto", 1.0)
                found |= {
                    f"logged {k}": v
                    for k, v in collapse_metrics(problem, cut(many.layout, x), reduce, 1.0).items()
                }
            assert list(found) == list(expected), (given, found, expected)
            numbers, own = (
                torch.tensor(list(values.values()), dtype=torch.float64)
                for values in (found, expected)
            )
            yield (
                f"metrics {words(given)}",
                float(not torch.allclose(numbers, own, rtol=1e-10, atol=1e-10, equal_nan=True)),
                0.0,
            )
            for other in gathered(mesh.world, numbers, "test"):
                yield (
                    f"metrics of all ranks {words(given)}",
                    (other - numbers).nan_to_num().abs().max(),
                    0.0,
                )


def sampled(mesh: Mesh) -> Iterator[Check]:
    """Drawn pairs and rows are those of one process."""
    sampling = Sampling("sampled", pairs=6, rows=3, seed=2)
    for given, reduce in MEASURED[:2]:
        problem = Problem(**given)
        one = Objective(problem, reduce=reduce)
        many = Objective(problem, backend=ShardedBackend(mesh), reduce=reduce)
        x = one.to_model(random_point(one, 1))
        at, here = cut(many.layout, x), parts_of(many.rows, many.layout)
        labels, counts = one.rows.targets.indices, one.rows.counts
        drawn = {"pairwise": "sampled", "pairs": 6, "rows": 3, "seed": 2}
        expected = collect(x.H, x.W, labels, counts=counts, **drawn)
        found = spread_metrics(at.H, at.W, None, here, many.layout, (None, None), sampling)
        assert list(found) == list(expected), (found, expected)
        numbers, own = (
            torch.tensor(list(values.values()), dtype=torch.float64) for values in (found, expected)
        )
        assert "cdnv_stderr" in found
        yield f"sampled {given}", relative(numbers, own), 1e-10


def metrics_of_first(mesh: Mesh) -> Iterator[Check]:
    """Metrics of a small point are all of those of one process, on every rank."""
    for name, problem in [*list(problems())[4:8], *models()]:
        one, many = Objective(problem), Objective(problem, backend=ShardedBackend(mesh))
        x = one.to_model(one.geometry.project(random_point(one, 1)))
        expected = measure(problem, one.rows, x, "auto", 1.0)
        found = measure(problem, many.rows, cut(many.layout, x), "auto", 1.0)
        expected |= {
            "log " + k: v for k, v in collapse_metrics(problem, x, one.reduce, 1.0).items()
        }
        logged = collapse_metrics(problem, cut(many.layout, x), one.reduce, 1.0)
        found |= {"log " + k: v for k, v in logged.items()}
        yield f"metrics of the first {name}", float(repr(found) != repr(expected)), 0.0


def asked(objective: Objective) -> tuple[int, int]:
    """How many classes of other ranks this one's rows have, and how many here those of others."""
    here, P = objective.layout.mesh.rank, objective.layout.mesh.ranks
    y, K, R = objective.rows.targets.indices, objective.layout.classes, objective.rows.number

    def wanted(rank: int, of: int) -> int:
        classes, part = y[block(R, P, rank)], block(K, P, of)
        return len(torch.unique(classes[(classes >= part.start) & (classes < part.stop)]))

    others = [rank for rank in range(P) if rank != here]
    return sum(wanted(here, r) for r in others), sum(wanted(r, here) for r in others)


def counted(mesh: Mesh) -> Iterator[Check]:
    """What a rank sends for an evaluation is what `cost` says, to the byte."""
    eleven: dict[str, Any] = {"counts": [3, 1, 2, 5, 4, 1, 2, 6, 2, 3, 1]}
    pairs = [k for row in range(11) for k in (row, (row + 1) % 11)]
    sets = TargetSets.create(range(0, 23, 2), pairs, 11, None, [0.8, 0.2] * 11)
    settings: list[dict[str, Any]] = [
        {},
        {"target_sets": sets, "loss": "pick-all", "bias": "free"},
        {"targets": torch.eye(11) - 0.3, "loss": "mse", "bias": "free", "layers": 2},
        {"bias": "free", "margin": 0.5},
        {"smoothing": 0.1, "layers": 3},
        {"bias": "free", "smoothing": 0.1},
        {**ANGULAR, "angular_margin": 0.5},
        {**ANGULAR, "angular_margin": 0.5, "labels": [3, 1, 0, 9, 2, 4, 4, 7, 10, 6, 5]},
    ]
    for given in settings:
        data = {} if {*DATA, "labels"} & given.keys() else eleven
        problem, reduce = Problem(**data, dim=4, **given), "none" if "labels" in given else "auto"
        backend = ShardedBackend(mesh, chunk=2 * mesh.shape[0])
        objective = Objective(problem, backend=backend, reduce=reduce)
        x = make_start(objective, "normal")
        objective.value_and_grad(x)  # which exchanges the targets
        head = objective.backend.of(problem.loss)
        height = (
            head.vectors.sweep(objective.head_input(x)).height
            if problem.dense
            else next(iter(head.heights.values()))
        )
        mesh.traffic.clear()
        objective.value_and_grad(x.clone())  # a point of which nothing is remembered
        cost = Cost(
            11,
            11,
            4,
            mesh.shape,
            height,
            8,
            bias=problem.bias != "none",
            smoothing=problem.loss.smoothing > 0,
            margins="margin" in given,
            angular=problem.angular is not None,
            targets=(0, 0) if problem.dense else asked(objective),
            hidden=tuple(W.numel() for W in x.hidden),
            vectors=problem.dense,
        ).sent()
        for kind, sent in cost.items():
            yield (
                f"{mesh.shape} {words(given)} {kind} {mesh.traffic[kind]} {sent}",
                abs(mesh.traffic[kind] - sent),
                0.0,
            )


def kinks(mesh: Mesh) -> Iterator[Check]:
    """Rows that are held at their class's row, wherever that is, with more pull than they withstand
    and less: gradient, tangents, products and moves, and where rows that come near are put.
    """
    labels = torch.tensor([4, 0, 2, 1, 4, 0, 1, 4, 3, 2, 3, 1, 0])
    problem = Problem(labels=labels, classes=5, dim=4, **ANGULAR)
    one = Objective(problem, reduce="none")
    many = Objective(problem, backend=ShardedBackend(mesh, chunk=2 * mesh.ranks), reduce="none")
    x, other = one.geometry.project(random_point(one, 1)), random_point(one, 2)
    held = torch.arange(len(x.H)) % 3 > 0
    x = replace(x, H=torch.where(held[:, None], x.W[one.targets.indices], x.H))
    at = cut(many.layout, x)
    assert one.geometry.together(x) == many.geometry.together(at) > 0
    v, along = (
        o.geometry.tangent(p, d)
        for o, p, d in ((one, x, other), (many, at, cut(many.layout, other)))
    )
    expected, found = one.value_and_grad(x), many.value_and_grad(at)
    near = one.move(x, other, 1e-3), many.move(at, cut(many.layout, other), 1e-3)
    pairs = {
        "gradient": (expected.gradient, found.gradient),
        "tangent": (v, along),
        "product": (one.hvp(x, v), many.hvp(at, along)),
        "move": (one.move(x, v, 0.3), many.move(at, along, 0.3)),
        "parting": near,
        "joined": tuple(o.geometry.joined(p, 2e-3) for o, p in zip((one, many), near, strict=True)),
    }
    yield f"{mesh.shape} kinks value", abs(found.value / expected.value - 1), 1e-12
    for name, (exact, part) in pairs.items():
        error = whole(part).axpy(-1.0, exact).norm() / exact.norm()
        yield f"{mesh.shape} kinks {name}", error, 1e-12
    left = (expected.gradient.H - expected.gradient.W[labels]).norm(dim=1)[held & (labels != 2)]
    assert 0 < int((left > 1e-9).sum()) < len(left)
    apart = [many.geometry.together(p) for p in (pairs["move"][1], near[1], pairs["joined"][1])]
    alone = [one.geometry.together(p) for p in (pairs["move"][0], near[0], pairs["joined"][0])]
    yield f"{mesh.shape} kinks held {apart} {alone}", float(apart != alone), 0.0


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
            Problem(counts=[3, 1, 2, 5, 4], dim=6, **_EASY),
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
    ({"counts": [3, 3, 3, 1, 0], "dim": 5, "loss": "mse", **_EASY}, {"reduce": "none"}),
    ({"counts": [2, 5, 2, 5, 5], "dim": 5, "bias": "free", **_GROUPS}, {}),
    ({"classes": 5, "dim": 6, "constraint": "sphere", "temperature": 5.0}, {"reduce": "none"}),
    ({"classes": 5, "multiplicities": "1:1,2:1", "loss": "pick-all", "dim": 6, "bias": "free"}, {}),
    ({"counts": [2, 2, 1], "dim": 4, "loss": "mse", "layers": 2}, {}),
    ({**VECTORS, "dim": 4, "bias": "free", **_EASY}, {}),
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
        Problem(counts=[3, 1, 2, 5, 4], dim=6, **_EASY),
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


def checks(ranks: int, folder: Path) -> Iterator[Check]:
    yield from starts(Mesh.of_world(), folder)
    cases = list(problems())
    yield from heads(Mesh.of_world(), cases[:: {1: 4, 2: 2, 3: 1, 4: 2}[ranks]])
    if ranks in (2, 3):
        yield from heads(Mesh.of_world(), list(models()))
    if ranks < 4:
        yield from certificates(Mesh.of_world(), every={1: 4, 2: 2, 3: 1}[ranks])
        yield from metrics(Mesh.of_world())
        yield from sampled(Mesh.of_world())
    if ranks == 2:
        yield from metrics_of_first(Mesh.of_world())
    if ranks == 2:
        yield from solves(*range(len(SOLVES)))
    if ranks == 1:
        yield from modelled(0, 1, 2, 3)
    if ranks in ON_KERNELS and has_triton():
        yield from kernels(Mesh.of_world(), *ON_KERNELS[ranks])
    if ranks == 2 and has_triton():
        yield from kernels(Mesh.of_world("1x2"), 0)
    if ranks == 3 and has_triton():
        yield from level(Mesh.of_world())
    if ranks > 1:
        yield from counted(Mesh.of_world())
        yield from counted(Mesh.of_world(f"1x{ranks}"))
    if ranks == 4:
        yield from counted(Mesh.of_world("2x2"))
        yield from kinks(Mesh.of_world("2x2"))
    if ranks == 3:
        yield from kinks(Mesh.of_world())
        yield from kinks(Mesh.of_world("1x3"))
        yield from unlike_ranks(Mesh.of_world())
        yield from several_starts()
        yield from known_minima()
        yield from modelled(*range(len(MODELLED)))
        yield from solves(*range(len(SOLVES) - 4, len(SOLVES)))
        yield from solves(*OF_DATA[:2], mesh="3x1")
    if ranks in (1, 3):
        yield from solves(*(n for n, (given, _) in enumerate(SOLVES) if "angular_margin" in given))
    if ranks == 4:
        yield from solves(0)
        yield from solves(OF_DATA[1], mesh="2x2")
        yield from modelled(0, 1)
        yield from interrupted(Mesh.of_world())
    if ranks == 3:
        few = Problem(counts=[2, 3], dim=4, lambda_w=0.02, lambda_h=0.005, gamma=2.0, loss="focal")
        yield from heads(Mesh.of_world(), [("far logits, a rank without classes", few)], scale=30.0)
        yield from (
            ("1x3 " + name, *rest)
            for name, *rest in heads(
                Mesh.of_world("1x3"), [*cases[::3], *list(models())[3:4]], reduce="none"
            )
        )
    if ranks == 4:
        yield from (
            ("2x2 " + name, *rest)
            for name, *rest in heads(
                Mesh.of_world("2x2"), [*cases[::4], *list(models())[6:8]], scale=30.0
            )
        )


def join(ranks: int, rank: int, folder: Path) -> None:
    store, limit = f"file://{folder}/store{ranks}", timedelta(minutes=8)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)
    found: list[list[object]] = []
    try:
        for name, error, allowed in checks(ranks, folder):
            found.append([name, float(error), allowed])
    except Exception:
        found.append([traceback.format_exc(), 1.0, 0.0])
        (folder / f"{ranks}.failed.{rank}.json").write_text(json.dumps(found[-1:]))
        raise
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = int(sys.argv[1])
    for number in RANKS:
        if own < number:
            join(number, own, Path(sys.argv[2]))
