"""The head over several ranks against `tiled` in one process: value, derivatives, what is sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from sharded_problems import (
    ANGULAR,
    DATA,
    WEIGHTED,
    Check,
    relative,
    whole,
    words,
)
from strategies import random_point

from ufm_fast.backends import ShardedBackend, TiledBackend
from ufm_fast.backends.cost import Cost
from ufm_fast.layout import Mesh, block, gathered
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.sharded_starts import cut
from ufm_fast.starts import make_start
from ufm_fast.targets import TargetSets


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
