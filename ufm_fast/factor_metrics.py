"""Metrics of a problem's factors beyond those of the head's table: how far apart the rows of W are,
what unequal classes do to them, and energies, balance and rank of a model with layers.

W is whole where rows of it are compared with one another, which is asked of small ones alone; the
ranks that share a larger point then have it whole too (`whole_classifier`). All else are sums over
rows, and over ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.metrics.geometry import imbalance
from ufm_fast.metrics.imbalance import imbalance_metrics
from ufm_fast.metrics.one_vs_rest import one_vs_rest
from ufm_fast.penalties import Penalties
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.spread import ALONE, Spread
from ufm_fast.tall import triangular
from ufm_fast.targets import Rows
from ufm_fast.theory.imbalanced import seli_distance, seli_logit_distance

#: Singular values of the logits below this share of the largest count as zero.
RANK_TOLERANCE = 1e-4
#: One-vs-rest margins of a solution are those of so many rows (`metrics.one_vs_rest` has all of up
#: to 2,000 classes), where a row's non-negative least squares take milliseconds.
MARGIN_ROWS, MOST_MARGIN_CLASSES, MOST_MARGIN_DIM = 64, 10_000, 64
#: Metrics of unequal classes compare all rows of W: up to so many, where that takes a fraction of a
#: second.
MOST_IMBALANCED = 512


def penalties_of(problem: Problem, rows: Rows, model: Point) -> Penalties:
    """The penalties of a point's parts, on its device; ``rows`` are those here."""
    here = replace(rows, counts=rows.counts.to(model.H.device))
    return problem.penalties(here, model.layout)


def balance(problem: Problem, rows: Rows, model: Point) -> dict[str, float]:
    """The balance of W and H, of all rows, where both have one penalty."""
    if not (problem.lambda_w and problem.lambda_h and problem.one_penalty):
        return {}
    ratio, counts = problem.lambda_h / problem.lambda_w, rows.counts.to(model.H.device)
    every = _over(model)
    absolute, relative = imbalance(model.W, model.H, ratio, counts, (every, every))
    return {"balancedness": absolute, "balancedness_relative": relative}


def _over(model: Point) -> Spread:
    return Spread(model.layout, "metrics")


def of_classifier(problem: Problem, rows: Rows, features: Tensor, model: Point) -> dict[str, float]:
    """Metrics of the rows of W among one another; of ``rows``, those here, and their features where
    the logits are compared. Every rank has the first one's.
    """
    W = _whole_classifier(problem, model)
    found = _of_code(problem, W) | _of_imbalance(problem, rows, features, W, _over(model))
    return found if model.layout is None else dict(model.layout.mesh.told(found))


def _whole_classifier(problem: Problem, model: Point) -> Tensor:
    """W, or none of its rows where a rank has a part of one that is too large for these metrics."""
    W, K, d = model.W, problem.num_classes, model.W.shape[1]
    if K <= MOST_IMBALANCED or (K <= MOST_MARGIN_CLASSES and d <= MOST_MARGIN_DIM):
        return _over(model).whole(W)
    return W if model.layout is None else W[:0]


def _of_code(problem: Problem, W: Tensor) -> dict[str, float]:
    """How far apart many classes are, K > d + 1: one-vs-rest margins of up to ``MARGIN_ROWS`` rows
    of W.
    """
    K, d = W.shape
    if not d + 1 < K <= MOST_MARGIN_CLASSES or d > MOST_MARGIN_DIM:
        return {}
    least, mean = one_vs_rest(W, sample=MARGIN_ROWS, seed=problem.seed, exact_classes=MARGIN_ROWS)
    found = {"one_vs_rest": least, "one_vs_rest_mean": mean.value}
    return found if mean.stderr is None else {**found, "one_vs_rest_mean_stderr": mean.stderr}


def _of_imbalance(
    problem: Problem, rows: Rows, features: Tensor, W: Tensor, over: Spread
) -> dict[str, float]:
    """Of single labels whose classes have several counts: collapsed groups, cosines by groups, and
    of the plain cross-entropy, which has that limit, the distances to no penalty.
    """
    counts = problem.counts.to(W.device)
    if (
        not rows.targets.single
        or len(counts) > MOST_IMBALANCED
        or len(torch.unique(counts[counts > 0])) < 2
    ):
        return {}
    found = imbalance_metrics(W, counts)
    if (
        problem.kind.loss == "ce"
        and problem.kind.trunk == "none"
        and not problem.loss.smoothing
        and bool((counts > 0).all())
    ):
        labels, samples = rows.targets.indices.to(W.device), rows.counts.to(W.device)
        found["seli_classifier"] = seli_distance(W, problem.counts)
        found["seli_logits"] = seli_logit_distance(W, features, labels, samples, over.total)
    return found


def of_layers(problem: Problem, rows: Rows, model: Point) -> dict[str, float]:
    """What only a model with layers has; ``rows`` are those here."""
    return _of_factors(problem, rows, model) | {
        "logit_rank": float(logit_rank(_spectrum(problem, rows, model)))
    }


def _of_factors(problem: Problem, rows: Rows, model: Point) -> dict[str, float]:
    lambdas, every = penalties_of(problem, rows, model), _over(model)
    found = {f"energy/{name}": value for name, value in lambdas.energies(model).items()}
    if problem.kind.trunk == "linear":
        factors = [*model.hidden, model.W]
        coefficients = [*problem.hidden_penalties, problem.lambda_w]
        before, of_before = model.H, problem.lambda_h
        counts: Tensor | None = rows.counts.to(model.H.device)
        for j, (X, own) in enumerate(zip(factors, coefficients, strict=True), 1):
            over = (
                every if X is model.W else ALONE,  # all ranks have hidden layers
                every if before is model.H else ALONE,
            )
            found[f"balancedness{j}"] = imbalance(X, before, of_before / own, counts, over)[1]
            before, of_before, counts = X.T, own, None
    return found


def logit_spectrum(problem: Problem, rows: Rows, model: Point) -> Tensor:
    """Singular values of D^1/2 (Z - 1 b'), D the rows' counts, descending, float64: without a
    product of rows x classes. ``rows`` are all of them also where the point is a rank's part.
    """
    here = rows if model.layout is None else rows.part(model.layout.row_part)
    return _spectrum(problem, here, model)


def _spectrum(problem: Problem, here: Rows, model: Point) -> Tensor:
    mesh = None if model.layout is None else model.layout.mesh
    features = problem.features(model).double()
    weighted = features * here.counts.to(features)[:, None].sqrt()
    R, S = (triangular(part, mesh) for part in (weighted, model.W.double()))
    spectrum: Tensor = torch.linalg.svdvals(R @ S.T)
    return spectrum


def logit_rank(spectrum: Tensor) -> int:
    """Numerical rank: singular values above RANK_TOLERANCE of the largest."""
    return int((spectrum > RANK_TOLERANCE * spectrum[:1].clamp_min(1e-300)).sum())
