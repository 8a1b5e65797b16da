"""Closed forms of the squared error."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ufm_fast.problem import Problem
from ufm_fast.theory.arguments import bias_penalty, nuclear_coefficient
from ufm_fast.theory.forms.base import ClosedForm, class_counts, grouped, proved
from ufm_fast.theory.forms.layers import spectral_mse
from ufm_fast.theory.frames import OrthogonalFrame
from ufm_fast.theory.squared_error import (
    BiasedSpectrum,
    balanced_mse_minimum,
    bias_leak,
    kept_classes,
    mse_minimum,
)


def bias_free_mse(problem: Problem) -> ClosedForm:
    """Without a bias: any counts, any d."""
    counts = class_counts(problem).to(torch.float64)
    penalties = (problem.lambda_w, problem.lambda_h)
    kept = kept_classes(counts, problem.dim, *penalties)
    sigma = counts[kept].sqrt() - float(counts.sum()) * nuclear_coefficient(*penalties)
    logits = OrthogonalFrame(problem.dim, counts, kept, sigma, *penalties)
    source = "squared error without bias, orthogonal frame (arXiv 2202.08087)"
    return ClosedForm(mse_minimum(counts, problem.dim, *penalties), source, len(kept) == 0, logits)


def biased_mse(problem: Problem) -> ClosedForm | None:
    """With a bias: balanced classes, a free bias, or d no less than the minimiser's rank."""
    values, sizes = problem.samples.distinct_counts
    if len(values) == 1:
        return _balanced_mse(problem, int(values[0]))
    if problem.bias == "penalised":
        return _imbalanced_mse(problem, values, sizes)
    form = spectral_mse(problem)
    alone = int((problem.counts > 0).sum()) == 1  # the bias alone fits it, whatever rounding says
    return replace(form, value=0.0) if alone and form is not None else form


def _balanced_mse(problem: Problem, n: int) -> ClosedForm:
    classes, lambda_b, penalties = (
        len(problem.counts),
        bias_penalty(problem),
        (problem.lambda_w, problem.lambda_h),
    )
    leak, root = bias_leak(lambda_b), math.sqrt(n)
    c = classes * root * nuclear_coefficient(*penalties)
    tilted = problem.dim >= classes and c < leak
    axis = torch.ones(1, int(tilted), dtype=torch.float64)
    logits = grouped(
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


def _imbalanced_mse(problem: Problem, values: Tensor, sizes: Tensor) -> ClosedForm | None:
    if len(values) > problem.dim:
        return None  # its spectral problem has that order
    n, size = values.to(torch.float64).numpy(), sizes.to(torch.float64).numpy()
    first = int(n[0] == 0)  # empty classes take part in nothing: zero row, zero bias
    found = BiasedSpectrum(
        n[first:],
        size[first:],
        nuclear_coefficient(problem.lambda_w, problem.lambda_h),
        bias_penalty(problem),
    )
    kept = found.sigma > found.tau
    within = np.maximum(np.sqrt(n) - found.tau, 0)
    rank = int(kept.sum() + (size - 1) @ (within > 0))
    if rank > problem.dim or not proved(found.value, found.shortfall):
        return None
    pad = ((first, 0), (0, 0))
    logits = grouped(
        problem,
        within=within.tolist(),
        shared=(found.sigma[kept] - found.tau).tolist(),
        left=torch.from_numpy(np.pad(found.left[:, kept], pad)),
        right=torch.from_numpy(np.pad(found.right[:, kept], pad)),
        bias=np.pad(found.bias, (first, 0)).tolist(),
    )
    source = (
        "squared error with bias and imbalanced classes, convex problem in the bias (our "
        "derivation)"
    )
    return ClosedForm(found.value, source, rank == 0, logits)
