"""Metrics of a solution: what is measured at a model point, in one place for ``solve``, log points
and the command line.

The head's metrics are those of what it sees: H itself, or with layers the features behind them. A
deep point also has the metrics of each layer's input, ``layer0/..`` of H, ``layer1/..`` of s(W_1
h), ..; the energies lambda |X|^2 of its factors, which are equal at every critical point; how far
neighbouring factors are from balanced (linear layers); and the rank of the logits. With target
vectors the head's metrics are those of regression (`metrics.regression`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.sharded_sweep import parts_of
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.layout import Layout, gathered
from ufm_fast.metrics import (
    ClassStatistics,
    RowMatrix,
    Sampling,
    collect,
    comparable,
    nc1_pinv,
    nc2,
    nc3,
    nc4,
    penalties,
)
from ufm_fast.metrics.checks import LARGEST
from ufm_fast.metrics.geometry import imbalance
from ufm_fast.metrics.imbalance import imbalance_metrics
from ufm_fast.metrics.one_vs_rest import one_vs_rest
from ufm_fast.metrics.pairwise import Mode as Pairwise
from ufm_fast.metrics.regression import regression_metrics
from ufm_fast.metrics.spread import SpreadMoments, matrix, spread_balance, spread_metrics
from ufm_fast.metrics.statistics import ClassMoments
from ufm_fast.metrics.target_sets import tag_metrics
from ufm_fast.penalties import Penalties
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.tall import qr
from ufm_fast.targets import Rows
from ufm_fast.theory.imbalanced import seli_distance, seli_logit_distance
from ufm_fast.theory.separation import predicted_frame

#: Singular values of the logits below this share of the largest count as zero.
RANK_TOLERANCE = 1e-4
#: One-vs-rest margins of a solution are those of so many rows (`metrics.one_vs_rest` has all of up
#: to 2,000 classes), where a row's non-negative least squares take milliseconds.
MARGIN_ROWS, MOST_MARGIN_CLASSES, MOST_MARGIN_DIM = 64, 10_000, 64
#: Metrics of unequal classes compare all rows of W: up to so many, where that takes a fraction of a
#: second.
MOST_IMBALANCED = 512
#: Numbers of W and H up to which the first of several ranks measures the whole point: 128 MiB in
#: float64. A problem for several ranks is far larger, or solved there for its time alone.
GATHERED = 1 << 24
_LOST = 4 * torch.finfo(torch.float64).eps


def usable(point: Point) -> bool:
    """Whether metrics and certificates take the point: beyond that squares of squares overflow,
    though values may be finite.
    """
    fits = all(part.numel() == 0 or float(part.abs().max()) < LARGEST for part in point.parts())
    return fits if point.layout is None else point.layout.all(fits)


def vanished(problem: Problem, rows: Rows, model: Point, value: float) -> bool:
    """Whether all factors are zero but for rounding: their penalty is lost in the value, and
    directions mean nothing.
    """
    if problem.freeze is not None or problem.constraint != "none":
        return False
    return 0.5 * sum(_penalties(problem, rows, model).energies(model).values()) <= _LOST * value


def measure(
    problem: Problem, rows: Rows, model: Point, pairwise: Pairwise = "auto", value: float = 0.0
) -> dict[str, float]:
    """Neural-collapse metrics of a model point; of multi-label data those of the rows with one
    label (as Li et al., arXiv 2310.15903), and those of the target sets. Where all factors are zero
    but for rounding beside ``value``, the metrics are those of zero: directions are nan. On several
    ranks, of which the point is one's, the first one measures a point of up to ``GATHERED``
    numbers; the metrics of a larger one are those of `metrics.spread`, every rank has the same.
    """
    told = _by_first(model, lambda whole: measure(problem, rows, whole, pairwise, value))
    if told is not None:
        return told
    here = rows if model.layout is None else parts_of(rows, model.layout)
    gone = vanished(problem, here, model, value)
    model = model.zeros() if gone else model
    inputs = problem.trunk.forward(model.H, model.hidden).inputs
    deep = len(inputs) > 1
    if problem.dense:
        return _of_vectors(problem, rows, model, inputs)
    if model.layout is not None:
        balanced = not deep and problem.one_penalty
        lambdas = (problem.lambda_w, problem.lambda_h)
        given = lambdas if balanced and all(lambdas) else None
        return spread_metrics(
            inputs[-1], model.W, model.b, here, problem.counts, model.layout, given
        )
    labels, counts, alone = _single(rows, model.H.device)
    of_one = not deep and problem.one_penalty  # which balancedness is of
    lambda_w, lambda_h = penalties(problem.lambda_w, problem.lambda_h) if of_one else (None, None)

    def of(features: Tensor, weight: Tensor | None) -> dict[str, float]:
        H, classes_of, weights = (
            comparable(features[alone], labels, counts) if labels.numel() else (None, None, None)
        )
        if H is None and weight is None:
            return {}
        return collect(
            H,
            weight,
            classes_of,
            model.b if weight is not None else None,
            counts=weights,
            classes=problem.num_classes,
            pairwise=pairwise,
            seed=problem.seed,
            lambda_w=lambda_w,
            lambda_h=lambda_h,
        )

    found = of(inputs[-1], model.W)
    if not rows.targets.single and not problem.weighted:
        found |= tag_metrics(inputs[-1], rows.targets, rows.counts, problem.num_classes)
    if pairwise != "none" and not gone:
        found |= _of_code(problem, model.W) | _of_imbalance(problem, rows, inputs[-1], model.W)
    if deep:
        for j, features in enumerate(inputs):
            found |= {f"layer{j}/{name}": value for name, value in of(features, None).items()}
        found |= _of_layers(problem, rows, model)
    return found | ({"nc4": math.nan} if gone and "nc4" in found else {})


def _by_first(
    model: Point, measured: Callable[[Point], dict[str, float]]
) -> dict[str, float] | None:
    """What the first of several ranks measures of the whole point, on every rank; None where the
    point is in one process, or large.
    """
    layout = model.layout
    if (
        layout is None
        or layout.classes * model.W.shape[1] + layout.rows * model.H.shape[1] > GATHERED
    ):
        return None
    mesh, parts = layout.mesh, model.named()
    for name in [name for name in ("W", "H", "b") if name in parts]:
        parts[name] = torch.cat(gathered(mesh.world, parts[name], "metrics"))
    found = measured(Point.of(parts)) if mesh.rank == 0 else None
    return dict(mesh.told(found))


def _of_vectors(
    problem: Problem, rows: Rows, model: Point, inputs: Sequence[Tensor]
) -> dict[str, float]:
    """Metrics with target vectors: of regression, of each layer's input, and of the factors. On
    several ranks those of the head, and of its factors; ``rows`` are all.
    """
    layout, counts = model.layout, rows.counts.to(model.H.device)
    found = _of_regression(problem, rows, inputs[-1], model.W, layout)
    if len(inputs) > 1 and layout is not None:
        return found
    if len(inputs) > 1:
        for j, features in enumerate(inputs):
            found |= {
                f"layer{j}/{name}": value
                for name, value in _of_regression(problem, rows, features, None).items()
            }
        return found | _of_layers(problem, rows, model)
    if None not in penalties(problem.lambda_w, problem.lambda_h):
        names, ratio = (
            ("balancedness", "balancedness_relative"),
            problem.lambda_h / problem.lambda_w,
        )
        if layout is None:
            both = imbalance(model.W, model.H, ratio, counts)
        else:
            own, world = counts[layout.row_part], layout.mesh.world
            both = spread_balance(world, model.W, model.H, own, ratio)
        found |= dict(zip(names, both, strict=True))
    return found


def _of_regression(
    problem: Problem,
    rows: Rows,
    features: Tensor,
    weight: Tensor | None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """NRC1-NRC3, and in one process NC1 where targets repeat. ``rows`` are all."""
    assert isinstance(rows.targets, DenseTargets)
    centred = problem.bias != "none"
    found = regression_metrics(
        features, weight, rows.targets, rows.counts, centred=centred, layout=layout
    )
    distinct = problem.rows("classes").number
    if layout is None and 1 < distinct < problem.num_samples:
        each = rows.number == problem.num_samples
        classes_of = problem.sample_row() if each else torch.arange(distinct)
        device = features.device
        means = ClassStatistics(features, classes_of.to(device), distinct, rows.counts.to(device))
        found["nc1_pinv"] = nc1_pinv(means)
    return found


def _penalties(problem: Problem, rows: Rows, model: Point) -> Penalties:
    """The penalties of a point's parts, on its device."""
    here = replace(rows, counts=rows.counts.to(model.H.device))
    return problem.penalties(here, model.layout)


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


def _of_imbalance(problem: Problem, rows: Rows, features: Tensor, W: Tensor) -> dict[str, float]:
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
        found["seli_logits"] = seli_logit_distance(W, features, labels, samples)
    return found


def _single(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, counts, which rows) of the rows that have one label."""
    targets, counts = rows.targets.to(device), rows.counts.to(device)
    if targets.indptr is None:
        return targets.indices, counts, torch.ones_like(targets.indices, dtype=torch.bool)
    alone = targets.sizes() == 1
    return targets.indices[targets.indptr[:-1][alone]], counts[alone], alone


def _of_layers(problem: Problem, rows: Rows, model: Point) -> dict[str, float]:
    """What only a model with layers has."""
    return _of_factors(problem, rows, model) | {
        "logit_rank": float(logit_rank(logit_spectrum(problem, rows, model)))
    }


def _of_factors(problem: Problem, rows: Rows, model: Point) -> dict[str, float]:
    lambdas = _penalties(problem, rows, model)
    found = {f"energy/{name}": value for name, value in lambdas.energies(model).items()}
    if problem.kind.trunk == "linear":
        factors = [*model.hidden, model.W]
        coefficients = [*problem.hidden_penalties, problem.lambda_w]
        before, of_before = model.H, problem.lambda_h
        counts: Tensor | None = rows.counts.to(model.H.device)
        for j, (X, own) in enumerate(zip(factors, coefficients, strict=True), 1):
            found[f"balancedness{j}"] = imbalance(X, before, of_before / own, counts)[1]
            before, of_before, counts = X.T, own, None
    return found


def logit_spectrum(problem: Problem, rows: Rows, model: Point) -> Tensor:
    """Singular values of D^1/2 (Z - 1 b'), D the rows' counts, descending, float64: without a
    product of rows x classes. ``rows`` are all of them also where the point is a rank's part.
    """
    layout = model.layout
    here, mesh = (rows, None) if layout is None else (parts_of(rows, layout), layout.mesh)
    features = problem.features(model).double()
    weighted = features * here.counts.to(features)[:, None].sqrt()
    R, S = (qr(part, mesh)[1] for part in (weighted, model.W.double()))
    spectrum: Tensor = torch.linalg.svdvals(R @ S.T)
    return spectrum


def logit_rank(spectrum: Tensor) -> int:
    """Numerical rank: singular values above RANK_TOLERANCE of the largest."""
    return int((spectrum > RANK_TOLERANCE * spectrum[:1].clamp_min(1e-300)).sum())


def collapse_metrics(
    problem: Problem, point: Point, reduce: str, value: float = 0.0
) -> dict[str, float]:
    """NC1-NC4 of a point, of cost O((K + R) d^2), NC2 and NC3 against the frame that theory
    predicts.

    Empty for several targets a row, where classes have no means, and where all factors are zero
    beside ``value``. On several ranks NC4 is among them up to ``GATHERED`` numbers, and each rank
    has the same.
    """
    told = _by_first(point, lambda whole: collapse_metrics(problem, whole, reduce, value))
    if told is not None:
        return told
    every, layout = problem.rows(reduce), point.layout
    rows = every if layout is None else parts_of(every, layout)
    if vanished(problem, rows, point, value):
        return {}
    if problem.dense and usable(point):
        features = problem.trunk.forward(point.H, point.hidden).inputs[-1]
        return _of_regression(problem, every, features, point.W, layout)
    if not rows.targets.single or problem.samples.occupied < 2 or not usable(point):
        return {}
    if layout is not None:
        H = problem.trunk.forward(point.H, point.hidden).features
        moments = SpreadMoments(H, rows, problem.counts.to(point.H.device).double(), layout)
        classifier = matrix(layout.mesh.world, point.W, layout.classes)
        return {"nc1_pinv": nc1_pinv(moments), **_of_frame(problem, classifier, moments)}
    inputs = problem.trunk.forward(point.H, point.hidden).inputs
    H = inputs[-1]
    W, device = RowMatrix.of(point.W), H.device
    labels, counts = rows.targets.indices.to(device), rows.counts.to(device)
    means = ClassStatistics(H, labels, problem.num_classes, counts)
    found = {"nc1_pinv": nc1_pinv(means), **_of_frame(problem, W, means)}
    # From 256 rows where there are many: exact it would cost O(R K d), more than the step.
    found["nc4"] = nc4(means, W.raw, point.b, Sampling("sampled")).value
    for j, X in enumerate(inputs if len(inputs) > 1 else ()):
        means = ClassStatistics(X, labels, problem.num_classes, counts)
        of_layer = {"nc1_pinv": nc1_pinv(means), **_of_means(problem, means)}
        found |= {f"layer{j}/{name}": value for name, value in of_layer.items()}
    return found


def _of_frame(problem: Problem, W: RowMatrix, means: ClassMoments) -> dict[str, float]:
    """NC2 and NC3 against the frame that theory predicts, by the names of ``METRICS``."""
    every = means.classes == problem.num_classes
    if predicted_frame(problem.kind) == "orthogonal":
        found = {"nc2_classifier_frame": nc2(W.raw, frame=True), **_of_means(problem, means)}
        return found | ({"nc3_frame": nc3(W.raw, means.raw_means, frame=True)} if every else {})
    found = {"nc2_classifier": nc2(W.raw), **_of_means(problem, means)}
    return found | ({"nc3": nc3(W.raw, means.sample_centred_means)} if every else {})


def _of_means(problem: Problem, means: ClassMoments) -> dict[str, float]:
    """NC2 of class means against that frame."""
    if predicted_frame(problem.kind) == "orthogonal":
        return {"nc2_means_frame": nc2(means.raw_means, frame=True)}
    return {"nc2_means": nc2(means.centred_means)}
