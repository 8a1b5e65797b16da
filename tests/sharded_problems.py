"""The problems that several ranks are tested on, and how two answers are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from strategies import BIAS_CASES, LOSS_CASES

from ufm_fast.layout import gathered
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import TargetSets

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


EASY, TINY = {"lambda_w": 0.03, "lambda_h": 0.03}, {"lambda_w": 1e-7, "lambda_h": 1e-7}


SMALL = {"counts": [3, 1, 2], "dim": 4, **EASY}


OWN = {"classifier_penalties": [1.0, 3.0, 0.2]}
