"""The numbers of one layer, from the statistics of its features and the weight that reads them: a
network's or a model's.

``probe`` takes them of any module's layers; ``probe_solution`` of the layers of a solved model, by
the names that its metrics have: ``layer0`` is H itself, ``layer1`` s(W_1 h), .., each with the next
factor as its weight, the classifier W last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.metrics import (
    ClassMoments,
    ClassStatistics,
    effective_rank,
    nc1_pinv,
    nc1_quotient,
    nc1_trace,
    stable_rank,
)
from ufm_fast.solvers.solution import Solution


@dataclass(frozen=True)
class LayerCollapse:
    """Collapse of one layer's features. None where a number was not asked for or has no meaning.

    within, between: tr Sigma_W and tr Sigma_B (about the sample mean). nc1_*: the three forms of
    ``METRICS``. mismatch: the share of samples whose nearest class mean is not that of their class.
    effective_rank, stable_rank: of the class means about their mean. alignment: see ``alignment``.
    """

    within: float
    between: float
    nc1_pinv: float
    nc1_trace: float
    nc1_quotient: float
    effective_rank: float
    stable_rank: float
    mismatch: float | None = None
    alignment: float | None = None

    def numbers(self) -> dict[str, float]:
        """The numbers that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def layer_collapse(
    moments: ClassMoments, weight: Tensor | None = None, mismatch: float | None = None
) -> LayerCollapse:
    """The numbers of one layer from its statistics and the weight that follows it, if one does."""
    between = moments.sample_centred_means.factor.square().sum() / moments.classes
    fits = weight is not None and weight.shape[1] == moments.dim
    return LayerCollapse(
        within=float(moments.within_factor.square().sum() / moments.samples),
        between=float(between),
        nc1_pinv=nc1_pinv(moments),
        nc1_trace=nc1_trace(moments),
        nc1_quotient=nc1_quotient(moments),
        effective_rank=effective_rank(moments.centred_means),
        stable_rank=stable_rank(moments.centred_means),
        mismatch=mismatch,
        alignment=alignment(moments.class_means, weight) if fits and weight is not None else None,
    )


def alignment(means: Tensor, weight: Tensor) -> float:
    """(1/K) sum svdvals(V_w[:K] U_M[:, :K]): 1 where the class means span the weight's K leading
    input directions.

    means: M' (K, d), not centred, U_M the left singular vectors of M. weight: (out, d) or a
    convolution's (out, d, ...), V_w the right singular vectors of its input side. With fewer than K
    directions the sum is over those there are.
    """
    K, side = means.shape[0], weight.detach().double().transpose(0, 1).flatten(1)
    inputs = torch.linalg.svd(side, full_matrices=False).U[:, :K]
    of_means = torch.linalg.svd(means.double(), full_matrices=False).Vh[:K]
    return float(torch.linalg.svdvals(of_means @ inputs).sum() / K)


@torch.no_grad()
def probe_solution(solution: Solution) -> dict[str, LayerCollapse]:
    """Collapse of each layer's input in a solution of any depth; a plain model has ``layer0``
    alone, which W reads.

    The rows are those of ``solution.reduce``, each counted as the samples that it stands for: with
    one row a class nothing is left to scatter, so within and NC1 are zero; solve with reduce="none"
    to see them.

    >>> probe_solution(solve(Problem(classes=4, per_class=50, dim=20, layers=2), reduce="none",
    start="normal"))

    Errors: InputError for several labels a sample, or fewer than two classes with samples.
    """
    problem, point = solution.problem, solution.point
    rows = problem.rows(solution.reduce)
    if not rows.targets.single:
        raise InputError(
            "solution: its samples have several labels, so that classes have no means; use its "
            "metrics instead"
        )
    labels, counts = rows.targets.indices, rows.counts
    weights = [*point.hidden, point.W]
    inputs = problem.trunk.forward(point.H, point.hidden).inputs
    found = {}
    for number, (features, weight) in enumerate(zip(inputs, weights, strict=True)):
        moments = ClassStatistics(
            features, labels.to(features.device), problem.num_classes, counts.to(features.device)
        )
        wrong = mismatches(moments, *moments.rows) / moments.samples
        found[f"layer{number}"] = layer_collapse(moments, weight, wrong)
    return found


def mismatches(
    moments: ClassMoments, features: Tensor, labels: Tensor, counts: Tensor | None = None
) -> float:
    """Number of samples whose nearest class mean is not that of their class; counts: what each row
    stands for.
    """
    rows, means = moments.about_classes(features), moments.centred_means.take(slice(None))
    wrong = moments.present[(rows @ means.T - means.square().sum(1) / 2).argmax(1)] != labels
    return float(wrong.sum() if counts is None else counts[wrong].sum())
