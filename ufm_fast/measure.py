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

from ufm_fast.dense_targets import DenseTargets
from ufm_fast.factor_metrics import balance, of_classifier, of_layers, penalties_of
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
    spread_pairwise,
)
from ufm_fast.metrics.checks import LARGEST
from ufm_fast.metrics.pairwise import Mode as Pairwise
from ufm_fast.metrics.regression import regression_metrics
from ufm_fast.metrics.spread import SpreadMoments, bias_beside, spread_metrics
from ufm_fast.metrics.spread_rows import matrix
from ufm_fast.metrics.statistics import ClassMoments
from ufm_fast.metrics.target_sets import tag_metrics
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import Rows, Targets
from ufm_fast.theory.separation import predicted_frame

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
    return 0.5 * sum(penalties_of(problem, rows, model).energies(model).values()) <= _LOST * value


def measure(
    problem: Problem, rows: Rows, model: Point, pairwise: Pairwise = "auto", value: float = 0.0
) -> dict[str, float]:
    """Neural-collapse metrics of a model point; of multi-label data those of the rows with one
    label (as Li et al., arXiv 2310.15903), and those of the target sets. Where all factors are zero
    but for rounding beside ``value``, the metrics are those of zero: directions are nan. On several
    ranks, of which the point is one's, the first one measures a point of up to ``GATHERED``
    numbers; a larger one they measure together (`metrics.spread`), but for the metrics of target
    sets, which compare the means of all sets.
    """
    told = _by_first(model, lambda whole: measure(problem, rows, whole, pairwise, value))
    if told is not None:
        return told
    here = rows if model.layout is None else rows.part(model.layout.row_part)
    gone = vanished(problem, here, model, value)
    model = model.zeros() if gone else model
    inputs = problem.trunk.forward(model.H, model.hidden).inputs
    if problem.dense:
        return _of_vectors(problem, rows, here, model, inputs)
    found = _of_head(problem, here, model, inputs[-1], pairwise)
    if not rows.targets.single:
        if model.layout is None and not problem.weighted:
            found |= tag_metrics(inputs[-1], rows.targets, rows.counts, problem.num_classes)
        found |= balance(problem, here, model) if len(inputs) == 1 else {}
    if pairwise != "none" and not gone:
        found |= of_classifier(problem, here, inputs[-1], model)
    if len(inputs) > 1:
        for j, features in enumerate(inputs):
            of_layer = _of_head(problem, here, model, features, pairwise, alone=True)
            found |= {f"layer{j}/{name}": value for name, value in of_layer.items()}
        found |= of_layers(problem, here, model)
    return found | ({"nc4": math.nan} if gone and "nc4" in found else {})


def _of_head(
    problem: Problem,
    rows: Rows,
    model: Point,
    features: Tensor,
    pairwise: Pairwise,
    *,
    alone: bool = False,
) -> dict[str, float]:
    """The table's metrics of the rows with one label and of the classifier; ``alone``: of the rows
    alone.
    """
    labels, counts, single = _single(rows, features.device)
    H, W, b = features[single], None if alone else model.W, None if alone else model.b
    of_all = rows.targets.single and problem.one_penalty and problem.kind.trunk == "none"
    lambdas = penalties(problem.lambda_w, problem.lambda_h) if of_all else (None, None)
    if model.layout is not None:
        chosen, sampling = Rows(Targets(labels), counts), Sampling(pairwise, seed=problem.seed)
        return spread_metrics(H, W, b, chosen, model.layout, lambdas, sampling)
    given = comparable(H, labels, counts) if labels.numel() else (None, None, None)
    if given[0] is None and W is None:
        return {}
    return collect(
        given[0],
        W,
        given[1],
        b,
        counts=given[2],
        classes=problem.num_classes,
        pairwise=pairwise,
        seed=problem.seed,
        lambda_w=lambdas[0],
        lambda_h=lambdas[1],
    )


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
    problem: Problem, rows: Rows, here: Rows, model: Point, inputs: Sequence[Tensor]
) -> dict[str, float]:
    """Metrics with target vectors: of regression, of each layer's input, and of the factors.
    ``rows`` are all, and ``here`` those of this rank.
    """
    found = _of_regression(problem, rows, inputs[-1], model.W, model.layout)
    if len(inputs) > 1:
        for j, features in enumerate(inputs):
            found |= {
                f"layer{j}/{name}": value
                for name, value in _of_regression(
                    problem, rows, features, None, model.layout
                ).items()
            }
        return found | of_layers(problem, here, model)
    return found | balance(problem, here, model)


def _of_regression(
    problem: Problem,
    rows: Rows,
    features: Tensor,
    weight: Tensor | None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """NRC1-NRC3, and NC1 where targets repeat. ``rows`` are all."""
    assert isinstance(rows.targets, DenseTargets)
    centred = problem.bias != "none"
    found = regression_metrics(
        features, weight, rows.targets, rows.counts, centred=centred, layout=layout
    )
    if 1 < problem.rows("classes").number < problem.num_samples:
        found["nc1_pinv"] = nc1_pinv(_means_of_vectors(problem, rows, features, layout))
    return found


def _means_of_vectors(
    problem: Problem, rows: Rows, features: Tensor, layout: Layout | None
) -> ClassMoments:
    """Means of the features of each distinct target vector."""
    device, counts = features.device, problem.rows("classes").counts
    distinct, each = counts.numel(), rows.number == problem.num_samples
    labels = problem.sample_row() if each else torch.arange(distinct)
    if layout is None:
        return ClassStatistics(features, labels.to(device), distinct, rows.counts.to(device))
    part, of_means = layout.row_part, replace(layout, classes=distinct)
    own = Rows(Targets(labels[part]), rows.counts[part])
    return SpreadMoments(features, own, counts.to(device).double(), of_means)


def _single(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, counts, which rows) of the rows that have one label."""
    targets, counts = rows.targets.to(device), rows.counts.to(device)
    if targets.indptr is None:
        return targets.indices, counts, torch.ones_like(targets.indices, dtype=torch.bool)
    alone = targets.sizes() == 1
    return targets.indices[targets.indptr[:-1][alone]], counts[alone], alone


def collapse_metrics(
    problem: Problem, point: Point, reduce: str, value: float = 0.0
) -> dict[str, float]:
    """NC1-NC4 of a point, of cost O((K + R) d^2), NC2 and NC3 against the frame that theory
    predicts.

    Empty for several targets a row, where classes have no means, and where all factors are zero
    beside ``value``. On several ranks each has the same.
    """
    told = _by_first(point, lambda whole: collapse_metrics(problem, whole, reduce, value))
    if told is not None:
        return told
    every, layout = problem.rows(reduce), point.layout
    rows = every if layout is None else every.part(layout.row_part)
    if vanished(problem, rows, point, value):
        return {}
    if problem.dense and usable(point):
        features = problem.trunk.forward(point.H, point.hidden).inputs[-1]
        return _of_regression(problem, every, features, point.W, layout)
    if not rows.targets.single or problem.samples.occupied < 2 or not usable(point):
        return {}
    inputs = problem.trunk.forward(point.H, point.hidden).inputs
    means, W = _means(problem, rows, inputs[-1], layout), _classifier(point)
    found = {"nc1_pinv": nc1_pinv(means), **_of_frame(problem, W, means)}
    # From 256 rows where there are many: exact it would cost O(R K d), more than the step.
    few = Sampling("sampled")
    if isinstance(means, ClassStatistics):
        found["nc4"] = nc4(means, W.raw, point.b, few).value
    elif isinstance(means, SpreadMoments) and layout is not None:
        world = layout.mesh.world
        b = bias_beside(W, point.b, world)
        found["nc4"] = spread_pairwise.nc4(means, means.here, W.raw, b, few, world).value
    for j, X in enumerate(inputs if len(inputs) > 1 else ()):
        means = _means(problem, rows, X, layout)
        of_layer = {"nc1_pinv": nc1_pinv(means), **_of_means(problem, means)}
        found |= {f"layer{j}/{name}": value for name, value in of_layer.items()}
    return found


def _means(problem: Problem, rows: Rows, X: Tensor, layout: Layout | None) -> ClassMoments:
    """Class means of features X, of the rows here."""
    if layout is not None:
        return SpreadMoments(X, rows, problem.counts.to(X.device).double(), layout)
    labels, counts = rows.targets.indices.to(X.device), rows.counts.to(X.device)
    return ClassStatistics(X, labels, problem.num_classes, counts)


def _classifier(point: Point) -> RowMatrix:
    layout = point.layout
    return (
        RowMatrix.of(point.W)
        if layout is None
        else matrix(layout.mesh.world, point.W, layout.classes)
    )


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
