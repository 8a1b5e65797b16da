"""Certificates and metrics of several ranks against those of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from sharded_problems import (
    OWN,
    SMALL,
    VECTORS,
    Check,
    models,
    problems,
    relative,
    words,
)
from strategies import random_point

from ufm_fast import measure as measuring
from ufm_fast.backends import ShardedBackend
from ufm_fast.layout import Mesh, gathered
from ufm_fast.measure import collapse_metrics, measure
from ufm_fast.metrics import Sampling, collect
from ufm_fast.metrics.spread import spread_metrics
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.sharded_starts import cut
from ufm_fast.theory.certificates import certify

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
            ("frozen " + f, Problem(**SMALL, **OWN, freeze=f, bias="penalised", lambda_b=0.1))
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
        at, here = cut(many.layout, x), many.rows.part(many.layout.row_part)
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
