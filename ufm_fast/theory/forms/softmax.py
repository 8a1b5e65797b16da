"""Closed forms of cross-entropy, the focal loss and the pick-all loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ufm_fast.losses import Focal
from ufm_fast.problem import Problem
from ufm_fast.theory.arguments import bias_penalty
from ufm_fast.theory.certificates.focal_with_bias import balanced_bound
from ufm_fast.theory.forms.base import ClosedForm, class_counts, grouped, proved
from ufm_fast.theory.frames import GroupedLogits, RowsOfClasses, TagAverages
from ufm_fast.theory.imbalanced import collapsed_ce
from ufm_fast.theory.multilabel import pick_all_minimum
from ufm_fast.theory.softmax import ce_gap, ce_minimum, focal_gap, focal_minimum, focal_pull
from ufm_fast.theory.two_groups import two_group_ce


def _simplex(problem: Problem, gap: float, n: int) -> GroupedLogits:
    """Balanced logits gap (I - J/K), with a zero bias where there is one."""
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    bias = None if problem.bias == "none" else [0.0]
    return grouped(
        problem, within=[math.sqrt(n) * gap], shared=[], left=nothing, right=nothing, bias=bias
    )


def cross_entropy(problem: Problem) -> ClosedForm | None:
    """Balanced classes, two distinct counts, and any counts where all collapses; d >= K-1 or no
    less than the rank.
    """
    values, sizes = problem.samples.distinct_counts
    if len(values) == 1:
        return _balanced_ce(problem, int(values[0]))
    if len(values) == 2:
        return _two_group_ce(problem, values.tolist(), sizes.tolist())
    return _collapsed_ce(problem)


def _balanced_ce(problem: Problem, n: int) -> ClosedForm | None:
    smoothing = float(problem.loss.smoothing)
    penalties = (problem.lambda_w, problem.lambda_h, smoothing)
    classes = len(problem.counts)
    gap = ce_gap(classes, n, *penalties)
    if gap > 0 and problem.dim < classes - 1:
        return None
    paper = "label smoothing: arXiv 2210.02192" if smoothing else "arXiv 2105.02375"
    source = f"balanced cross-entropy, explicit entropy formula (simplex of {paper})"
    return ClosedForm(
        ce_minimum(classes, n, *penalties), source, gap == 0, _simplex(problem, gap, n)
    )


def _two_group_ce(problem: Problem, counts: list[int], sizes: list[int]) -> ClosedForm | None:
    lambda_b, smoothing = bias_penalty(problem), float(problem.loss.smoothing)
    if lambda_b == 0 and counts[0] == 0 and smoothing == 0:
        return None  # the empty classes' bias runs away to minus infinity
    classes = (sizes[0], sizes[1])
    best = two_group_ce(
        classes, (counts[0], counts[1]), problem.lambda_w, problem.lambda_h, lambda_b, smoothing
    )
    if best.rank > problem.dim or not proved(best.value, best.shortfall):
        return None
    logits = grouped(
        problem,
        within=best.within,
        shared=[best.shared],
        left=torch.tensor(best.left, dtype=torch.float64)[:, None],
        right=torch.tensor(best.right, dtype=torch.float64)[:, None],
        bias=best.bias,
    )
    source = (
        "cross-entropy with two class sizes, convex reduction (setting of arXiv 2101.12699 and "
        "2309.09725)"
    )
    return ClosedForm(best.value, source, best.rank == 0, logits)


def _collapsed_ce(problem: Problem) -> ClosedForm | None:
    if problem.loss.smoothing != 0:
        return None
    values, sizes = problem.samples.distinct_counts
    if len(values) > max(problem.dim, 512):
        return None  # deciding it takes a dense matrix of that order
    alike = values[sizes > 1]
    if alike.numel() and problem.mu * problem.num_samples < math.sqrt(int(alike.max())):
        return None  # which `collapsed_ce` would find too, once it has sorted all classes
    counts = class_counts(problem)
    groups, index = torch.unique(counts, return_inverse=True)
    found = collapsed_ce(counts, problem.lambda_w, problem.lambda_h, bias_penalty(problem))
    if found is None:
        return None
    value, bias = found
    per_group = (
        None
        if bias is None
        else torch.zeros(len(groups), dtype=torch.float64).scatter(0, index, bias).tolist()
    )
    nothing = torch.zeros(len(groups), 0, dtype=torch.float64)
    logits = grouped(
        problem, within=[0.0] * len(groups), shared=[], left=nothing, right=nothing, bias=per_group
    )
    return ClosedForm(
        value, "collapsed cross-entropy: zero features, bias alone (our derivation)", True, logits
    )


def focal(problem: Problem) -> ClosedForm | None:
    """Balanced classes and d >= K-1; with a bias, where that is proved: `focal_minimum`."""
    assert isinstance(problem.loss, Focal)
    counts = class_counts(problem)
    n, classes = int(counts[0]), len(counts)
    if not bool((counts == n).all()) or problem.dim < classes - 1:
        return None
    arguments = (classes, n, problem.lambda_w, problem.lambda_h, float(problem.loss.gamma))
    gap, value = focal_gap(*arguments), focal_minimum(*arguments)
    steep = problem.bias != "none" and focal_pull(classes, gap, arguments[-1]) > 1.0
    if steep and balanced_bound(problem.loss, classes, n, problem.mu) < value * (1.0 - 1e-12):
        return None  # there is a lower minimum, or none is proved
    source = "balanced focal loss, one-dimensional problem in the gap (simplex of arXiv 2210.02192)"
    return ClosedForm(value, source, gap == 0, _simplex(problem, gap, n))


def pick_all(problem: Problem) -> ClosedForm | None:
    """One label a sample, or for each size all sets equally frequent."""
    assert problem.target_sets is not None
    sets = problem.target_sets.grouped()[0]
    sizes = sets.indptr.diff()
    if bool((sizes == 1).all()):  # one label a sample: cross-entropy
        form = cross_entropy(problem)
        rows = sets.indices.long()
        return form and ClosedForm(
            form.value, form.source, form.collapsed, RowsOfClasses(form.logits, rows)
        )
    classes = len(problem.counts)
    per_set = _equally_frequent_sets(classes, sizes, sets.counts)
    if per_set is None:
        return None
    best = pick_all_minimum(classes, per_set, problem.lambda_w, problem.lambda_h)
    if (best.sigma > 0 and problem.dim < classes - 1) or not proved(best.value, best.shortfall):
        return None
    with_bias, penalties = problem.bias != "none", (problem.lambda_w, problem.lambda_h)
    logits = TagAverages(
        classes,
        problem.dim,
        sets.indptr,
        sets.indices,
        best.slopes,
        best.sigma,
        with_bias,
        *penalties,
    )
    source = "pick-all cross-entropy, convex reduction (tag-wise average of arXiv 2310.15903)"
    return ClosedForm(best.value, source, best.sigma == 0, logits)


def _equally_frequent_sets(classes: int, sizes: Tensor, counts: Tensor) -> Mapping[int, int] | None:
    """Samples per set by set size, if for every size that occurs all C(K, m) sets do and equally
    often.
    """
    per_set = {}
    for size in torch.unique(sizes).tolist():
        of_size = counts[sizes == size]
        if len(of_size) != math.comb(classes, size) or bool((of_size != of_size[0]).any()):
            return None
        per_set[size] = int(of_size[0])
    return per_set
