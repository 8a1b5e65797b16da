"""What theory says before a solve: whether the penalties let the classes separate, and which frame
they form.

A class of n_k samples loses its own logits once mu = sqrt(lambda_W lambda_H) >= (1 - smoothing)
sqrt(n_k)/N (`thresholds.collapse_penalty`); where that holds for all, W = H = 0 is the minimum, and
a solve returns rounding. Nothing in the numbers shows that, so it is said, with the lambda_W that
would separate the classes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.kinds import Kind
from ufm_fast.penalties import LEAST_PENALTY
from ufm_fast.problem import Problem
from ufm_fast.theory.forms import ClosedForm, closed_form
from ufm_fast.theory.tables import layered, plain

_SIMPLEX, _ORTHOGONAL = "simplex", "orthogonal"
#: Kinds whose balanced minimiser is known to be which frame; the norms differ where classes do.
FRAMES = [
    (plain("ce", "focal", "pick-all"), _SIMPLEX),
    (plain("mse", bias=("penalised", "free")), _SIMPLEX),
    (plain("mse", bias=("none",)), _ORTHOGONAL),
    (layered("mse", trunks=("linear", "relu"), bias=("none",)), _ORTHOGONAL),
    (layered("mse", bias=("free",)), _SIMPLEX),
]
_grouped = plain("ce", "mse", "pick-all")
_apart = plain("mse", bias=("none",))


def held_together(problem: Problem, form: ClosedForm | None = None) -> str:
    """In words, which classes the penalties hold together, and up to which lambda_w they would not;
    '' if none.

    ``form``: the problem's closed form where it is at hand.

    Exact where it speaks: all classes, by the closed form; else classes of equal count, for
    cross-entropy with d >= K - 1 and the squared error.
    """
    if problem.samples.occupied < 2 and not problem.dense:
        return ""
    form = form or closed_form(problem)
    if problem.dense and form is not None and form.value == 0:
        return "the targets are all alike, and the bias alone fits them"
    if form is not None and form.collapsed:
        effect = "fit more than the mean" if problem.dense else "separate classes"
        return (
            "the minimum is zero, W = H = 0: penalties are above the threshold of collapse; "
            f"lambda_w <= {_separating(problem)} would {effect}"
        )
    counts = _held_counts(problem)
    if counts.numel() == 0:
        return ""
    limit = (1.0 - problem.loss.smoothing) * math.sqrt(int(counts.min())) / problem.num_samples
    most = int(counts.max())
    return (
        f"{counts.numel():,} of {problem.num_classes:,} classes, those of at most {most:,} "
        f"sample{'s' * (most > 1)}, "
        "are held together by the penalties; "
        f"lambda_w <= {_below(limit * limit / problem.lambda_h)} would separate all classes"
    )


def _held_counts(problem: Problem) -> Tensor:
    """Counts of the classes with samples that can't be told from others of their count."""
    kind, counts = (
        problem.kind,
        problem.counts[problem.counts > 0],
    )  # of 2^28 classes few may have samples
    nothing = counts[:0]
    if not _grouped(kind) or (problem.dim < problem.num_classes - 1 and kind.loss != "mse"):
        return nothing
    if problem.target_sets is not None and not bool((problem.target_sets.indptr.diff() == 1).all()):
        return nothing
    values, index, sizes = torch.unique(counts, return_inverse=True, return_counts=True)
    roots = values.double().sqrt() * (1.0 - problem.loss.smoothing) / problem.num_samples
    held = (roots <= problem.mu) & ((sizes > 1) | _apart(kind))
    return counts[held[index]]


def _separating(problem: Problem) -> str:
    """The largest lambda_w at which the closed form is not collapsed, to three digits."""

    def collapsed(log_lambda: float) -> bool:
        form = closed_form(replace(problem, lambda_w=math.exp(log_lambda)))
        return form is not None and form.collapsed

    low, high = math.log(LEAST_PENALTY) + 1e-9, math.log(problem.lambda_w)
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if collapsed(middle) else (middle, high)
    return _below(math.exp(low))


def _below(value: float) -> str:
    """Three digits, rounded down."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.floor(value / unit * (1 + 1e-12)) * unit:.3g}"


def predicted_frame(kind: Kind) -> str:
    """The frame that theory predicts of balanced classes: 'simplex', 'orthogonal', or '' where it
    says nothing.
    """
    return next((frame for serves, frame in FRAMES if serves(kind)), "")
