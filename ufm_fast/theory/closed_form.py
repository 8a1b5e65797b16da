"""One question, one answer: the minimum that theory gives for a problem, with its source and a minimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.losses import Focal
from ufm_fast.theory.arguments import NO_BIAS, nuclear_coefficient
from ufm_fast.theory.following import balanced_bound
from ufm_fast.theory.frames import GroupedLogits, Logits, OrthogonalFrame, Parameters, RowsOfClasses, TagAverages
from ufm_fast.theory.imbalanced import collapsed_ce
from ufm_fast.theory.multilabel import pick_all_minimum
from ufm_fast.theory.softmax import ce_gap, ce_minimum, focal_gap, focal_minimum, focal_pull
from ufm_fast.theory.squared_error import (
    BiasedSpectrum,
    balanced_mse_minimum,
    bias_leak,
    kept_classes,
    mse_minimum,
)
from ufm_fast.theory.two_groups import two_group_ce

if TYPE_CHECKING:
    from ufm_fast.problem import Problem


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """The minimum of f, where it comes from, and how to build a minimiser.

    `collapsed`: W = H = 0 is the minimiser (a bias may remain). `logits`: the spectrum that `point` is built from.
    """

    value: float
    source: str
    collapsed: bool
    logits: Logits

    def point(self) -> Parameters:
        """A minimiser (W of K x d, class means of K x d, b or None), float64 on the CPU.

        Empty classes have zero rows. For pick-all the second item has a row for each distinct target set instead.
        """
        return self.logits.point()


def closed_form(problem: Problem) -> ClosedForm | None:
    """The minimum of `problem` if a formula covers it, else None.

    Covered: cross-entropy (with smoothing) for balanced classes, two distinct counts, and any counts where all
    collapses; focal loss for balanced classes (with a bias, where that is proved: `focal_minimum`); squared error
    without a bias always, with one for balanced classes or where d is no less than the minimiser's rank; pick-all
    where, for each size, all sets are equally frequent. Every kind of bias. Softmax losses need d >= K-1 or a minimiser
    of rank <= d. Nothing is covered with a frozen factor.
    """
    if problem.freeze is not None or not (problem.lambda_w > 0 and problem.lambda_h > 0):
        return None
    form = {"ce": _cross_entropy, "focal": _focal, "mse": _squared_error, "pick-all": _pick_all}.get(problem.loss.name)
    return None if form is None else form(problem)


def bias_penalty(problem: Problem) -> float:
    """lambda_b as the formulas take it: 0 for a free bias, infinite for none."""
    return {"none": NO_BIAS, "free": 0.0}.get(problem.bias, float(problem.lambda_b))


def _class_counts(problem: Problem) -> Tensor:
    return torch.as_tensor(problem.counts).detach().cpu()


def _grouped(problem: Problem, **spectrum: Any) -> GroupedLogits:
    return GroupedLogits(
        dim=problem.dim,
        counts=_class_counts(problem),
        lambda_w=problem.lambda_w,
        lambda_h=problem.lambda_h,
        **spectrum,
    )


def _simplex(problem: Problem, gap: float, n: int) -> GroupedLogits:
    """Balanced logits gap (I - J/K), with a zero bias where there is one."""
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    bias = None if problem.bias == "none" else [0.0]
    return _grouped(problem, within=[math.sqrt(n) * gap], shared=[], left=nothing, right=nothing, bias=bias)


def _cross_entropy(problem: Problem) -> ClosedForm | None:
    values, sizes = torch.unique(_class_counts(problem), return_counts=True)
    if len(values) == 1:
        return _balanced_ce(problem, int(values[0]))
    if len(values) == 2:
        return _two_group_ce(problem, values.tolist(), sizes.tolist())
    return _collapsed_ce(problem)


def _balanced_ce(problem: Problem, n: int) -> ClosedForm | None:
    smoothing = float(getattr(problem.loss, "smoothing", 0.0))
    penalties = (problem.lambda_w, problem.lambda_h, smoothing)
    classes = len(problem.counts)
    gap = ce_gap(classes, n, *penalties)
    if gap > 0 and problem.dim < classes - 1:
        return None
    paper = "label smoothing: arXiv 2210.02192" if smoothing else "arXiv 2105.02375"
    source = f"balanced cross-entropy, explicit entropy formula (simplex of {paper})"
    return ClosedForm(ce_minimum(classes, n, *penalties), source, gap == 0, _simplex(problem, gap, n))


def _two_group_ce(problem: Problem, counts: list[int], sizes: list[int]) -> ClosedForm | None:
    lambda_b, smoothing = bias_penalty(problem), float(getattr(problem.loss, "smoothing", 0.0))
    if lambda_b == 0 and counts[0] == 0 and smoothing == 0:
        return None  # the empty classes' bias runs away to minus infinity
    classes = (sizes[0], sizes[1])
    best = two_group_ce(classes, (counts[0], counts[1]), problem.lambda_w, problem.lambda_h, lambda_b, smoothing)
    if best.rank > problem.dim:
        return None
    logits = _grouped(
        problem,
        within=best.within,
        shared=[best.shared],
        left=torch.tensor(best.left, dtype=torch.float64)[:, None],
        right=torch.tensor(best.right, dtype=torch.float64)[:, None],
        bias=best.bias,
    )
    source = "cross-entropy with two class sizes, convex reduction (setting of arXiv 2101.12699 and 2309.09725)"
    return ClosedForm(best.value, source, best.rank == 0, logits)


def _collapsed_ce(problem: Problem) -> ClosedForm | None:
    if getattr(problem.loss, "smoothing", 0.0) != 0:
        return None
    counts = _class_counts(problem)
    groups, index = torch.unique(counts, return_inverse=True)
    if len(groups) > max(problem.dim, 512):
        return None  # deciding it takes a dense matrix of that order
    found = collapsed_ce(counts, problem.lambda_w, problem.lambda_h, bias_penalty(problem))
    if found is None:
        return None
    value, bias = found
    per_group = None if bias is None else torch.zeros(len(groups), dtype=torch.float64).scatter(0, index, bias).tolist()
    nothing = torch.zeros(len(groups), 0, dtype=torch.float64)
    logits = _grouped(problem, within=[0.0] * len(groups), shared=[], left=nothing, right=nothing, bias=per_group)
    return ClosedForm(value, "collapsed cross-entropy: zero features, bias alone (our derivation)", True, logits)


def _focal(problem: Problem) -> ClosedForm | None:
    counts = _class_counts(problem)
    n, classes = int(counts[0]), len(counts)
    if not bool((counts == n).all()) or problem.dim < classes - 1:
        return None
    arguments = (classes, n, problem.lambda_w, problem.lambda_h, float(getattr(problem.loss, "gamma", 0.0)))
    gap, value = focal_gap(*arguments), focal_minimum(*arguments)
    if problem.bias != "none" and focal_pull(classes, gap, arguments[-1]) > 1.0:
        assert isinstance(problem.loss, Focal)
        if balanced_bound(problem.loss, classes, n, problem.mu) < value * (1.0 - 1e-12):
            return None  # there is a lower minimum, or none is proved
    source = "balanced focal loss, one-dimensional problem in the gap (simplex of arXiv 2210.02192)"
    return ClosedForm(value, source, gap == 0, _simplex(problem, gap, n))


def _squared_error(problem: Problem) -> ClosedForm | None:
    if problem.bias == "none":
        return _bias_free_mse(problem)
    values, sizes = torch.unique(_class_counts(problem), return_counts=True)
    if len(values) == 1:
        return _balanced_mse(problem, int(values[0]))
    form = _biased_mse(problem, values, sizes)
    alone = problem.bias == "free" and int((problem.counts > 0).sum()) == 1  # the bias alone fits it, whatever rounding says
    return replace(form, value=0.0) if alone and form is not None else form


def _bias_free_mse(problem: Problem) -> ClosedForm:
    counts = _class_counts(problem).to(torch.float64)
    penalties = (problem.lambda_w, problem.lambda_h)
    kept = kept_classes(counts, problem.dim, *penalties)
    sigma = counts[kept].sqrt() - float(counts.sum()) * nuclear_coefficient(*penalties)
    logits = OrthogonalFrame(problem.dim, counts, kept, sigma, *penalties)
    source = "squared error without bias, orthogonal frame (arXiv 2202.08087)"
    return ClosedForm(mse_minimum(counts, problem.dim, *penalties), source, len(kept) == 0, logits)


def _balanced_mse(problem: Problem, n: int) -> ClosedForm:
    classes, lambda_b, penalties = len(problem.counts), bias_penalty(problem), (problem.lambda_w, problem.lambda_h)
    leak, root = bias_leak(lambda_b), math.sqrt(n)
    c = classes * root * nuclear_coefficient(*penalties)
    tilted = problem.dim >= classes and c < leak
    axis = torch.ones(1, int(tilted), dtype=torch.float64)
    logits = _grouped(
        problem,
        within=[root * max(1 - c, 0.0)],
        shared=[root * (1 - c / leak)] if tilted else [],
        left=axis,
        right=axis,
        bias=[c / (classes * lambda_b) if tilted else 1 / (classes * (1 + lambda_b))],
    )
    value = balanced_mse_minimum(classes, n, problem.dim, *penalties, lambda_b)
    paper = "free bias: arXiv 2202.08087" if lambda_b == 0 else "penalised bias: arXiv 2203.01238"
    return ClosedForm(value, f"balanced squared error, {paper}", c >= 1, logits)


def _biased_mse(problem: Problem, values: Tensor, sizes: Tensor) -> ClosedForm | None:
    if len(values) > problem.dim:
        return None  # its spectral problem has that order
    n, size = values.to(torch.float64).numpy(), sizes.to(torch.float64).numpy()
    first = int(n[0] == 0)  # empty classes take part in nothing: zero row, zero bias
    found = BiasedSpectrum(
        n[first:], size[first:], nuclear_coefficient(problem.lambda_w, problem.lambda_h), bias_penalty(problem)
    )
    kept = found.sigma > found.tau
    within = np.maximum(np.sqrt(n) - found.tau, 0)
    rank = int(kept.sum() + (size - 1) @ (within > 0))
    if rank > problem.dim:
        return None
    pad = ((first, 0), (0, 0))
    logits = _grouped(
        problem,
        within=within.tolist(),
        shared=(found.sigma[kept] - found.tau).tolist(),
        left=torch.from_numpy(np.pad(found.left[:, kept], pad)),
        right=torch.from_numpy(np.pad(found.right[:, kept], pad)),
        bias=np.pad(found.bias, (first, 0)).tolist(),
    )
    source = "squared error with bias and imbalanced classes, convex problem in the bias (our derivation)"
    return ClosedForm(found.value, source, rank == 0, logits)


def _pick_all(problem: Problem) -> ClosedForm | None:
    sets: Any = problem.target_sets
    if sets is None:
        return _cross_entropy(problem)
    sets = sets.grouped()[0] if hasattr(sets, "grouped") else sets
    sizes = sets.indptr.diff()
    if bool((sizes == 1).all()):  # one label a sample: cross-entropy
        form = _cross_entropy(problem)
        rows = sets.indices.long()
        return form and ClosedForm(form.value, form.source, form.collapsed, RowsOfClasses(form.logits, rows))
    classes = len(problem.counts)
    per_set = _equally_frequent_sets(classes, sizes, sets.counts)
    if per_set is None:
        return None
    best = pick_all_minimum(classes, per_set, problem.lambda_w, problem.lambda_h)
    if best.sigma > 0 and problem.dim < classes - 1:
        return None
    with_bias, penalties = problem.bias != "none", (problem.lambda_w, problem.lambda_h)
    logits = TagAverages(classes, problem.dim, sets.indptr, sets.indices, best.slopes, best.sigma, with_bias, *penalties)
    source = "pick-all cross-entropy, convex reduction (tag-wise average of arXiv 2310.15903)"
    return ClosedForm(best.value, source, best.sigma == 0, logits)


def _equally_frequent_sets(classes: int, sizes: Tensor, counts: Tensor) -> Mapping[int, int] | None:
    """Samples per set by set size, if for every size that occurs all C(K, m) sets do and equally often."""
    per_set = {}
    for size in torch.unique(sizes).tolist():
        of_size = counts[sizes == size]
        if len(of_size) != math.comb(classes, size) or bool((of_size != of_size[0]).any()):
            return None
        per_set[size] = int(of_size[0])
    return per_set
