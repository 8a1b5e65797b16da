"""What of a problem does not go together. Each argument is checked alone where it is read
(`arguments`, `sample_data`, `trunks`, `penalties`, `adjustments`); here are the rules that look at
two of them.

Each function raises InputError naming both and the mend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.losses import SquaredError
from ufm_fast.penalties import LEAST_BIAS_PENALTY, LEAST_PENALTY, MOST_PENALTY

if TYPE_CHECKING:
    from ufm_fast.problem import Problem


def of_layers(problem: Problem) -> None:
    """What goes with one layer alone, or with several."""
    if problem.layers == 1 and problem.activation != "linear":
        raise InputError(
            f"activation {problem.activation} stands between layers, and layers is 1; give layers "
            f">= 2"
        )
    if problem.layers > 1 and problem.freeze is not None:
        raise InputError(
            f"freeze {problem.freeze} goes with one layer; drop freeze, or layers = "
            f"{problem.layers}"
        )


def of_data(problem: Problem) -> None:
    """Target sets and target vectors, and the loss."""
    samples, name = problem.samples, problem.loss.name
    if samples.given_sets is not None and not problem.multi_label:
        raise InputError(
            f"{next(iter(samples.given))} goes with the loss pick-all, not {name}; choose loss "
            f"pick-all"
        )
    if problem.dense and not isinstance(problem.loss, SquaredError):
        raise InputError(
            f"targets are vectors, which go with the loss mse, not {name}; choose loss mse"
        )


def of_penalties(problem: Problem) -> None:
    """Penalties, bias, constraint and what is frozen."""
    if problem.constraint != "none":
        return _of_sphere(problem)
    if 0 < problem.lambda_b < LEAST_BIAS_PENALTY:
        raise InputError(
            f"lambda_b must be 0 or at least {LEAST_BIAS_PENALTY:g}, got {problem.lambda_b}; use "
            f"bias 'free' for less"
        )
    for name, frozen in (("lambda_w", "w"), ("lambda_h", "h")):
        if getattr(problem, name) == 0 and problem.freeze != frozen:
            raise InputError(
                f"{name} = 0 leaves the objective without a minimiser; give {name} > 0 or freeze "
                f"{frozen}"
            )
    _of_bias(problem)


def _of_sphere(problem: Problem) -> None:
    """What goes with unit rows of W and H."""
    for clash, given, wanted in (
        (problem.bias != "none", f"bias {problem.bias!r}", "bias 'none'"),
        (problem.lambda_b != 0, f"lambda_b = {problem.lambda_b}", "no penalties (or zeros)"),
        (
            problem.lambda_w != 0 or problem.lambda_h != 0,
            "lambda_w or lambda_h > 0",
            "no penalties (or zeros)",
        ),
        (problem.layers > 1, f"layers = {problem.layers}", "one layer"),
        (problem.freeze is not None, f"freeze {problem.freeze}", "nothing frozen"),
        (problem.loss.name != "ce", f"loss {problem.loss.name}", "loss ce"),
        (problem.dim < 2, f"dim = {problem.dim}", "dim >= 2"),
    ):
        if clash:
            raise InputError(
                f"constraint sphere contradicts {given}; rows of length one take {wanted}"
            )


def _of_bias(problem: Problem) -> None:
    if problem.bias == "penalised" and problem.lambda_b == 0:
        raise InputError("bias 'penalised' needs lambda_b > 0; give lambda_b or choose bias 'free'")
    if problem.bias != "penalised" and problem.lambda_b > 0:
        raise InputError(
            f"lambda_b = {problem.lambda_b} contradicts bias {problem.bias!r}; choose bias "
            f"'penalised'"
        )
    softmax = not isinstance(problem.loss, SquaredError)
    empty = problem.bias == "free" and softmax and bool((problem.counts == 0).any())
    if empty and not problem.loss.smoothing:
        raise InputError(
            "a free bias has no minimiser when a class is empty; choose bias 'penalised' or drop "
            "the class"
        )


def of_adjustments(problem: Problem) -> None:
    """What each class has of its own in the logits and in the penalties."""
    adjustment = problem.adjustment
    if isinstance(problem.loss, SquaredError) and adjustment:
        raise InputError(
            "logit_adjustment, margin and class_scales go with softmax losses, not mse; drop them, "
            "or choose ce"
        )
    _of_angular(problem)
    if problem.multi_label and adjustment.margin is not None:
        raise InputError(
            f"margin goes with one label a sample, not with the loss {problem.loss.name}; drop it, "
            f"or choose ce"
        )
    _of_factors(problem)


def _of_angular(problem: Problem) -> None:
    """What goes with margins in the angle."""
    if problem.angular is None:
        return
    for clash, given, wanted in (
        (problem.constraint != "sphere", f"constraint {problem.constraint}", "constraint sphere"),
        (problem.loss.smoothing != 0, f"smoothing = {problem.loss.smoothing}", "no smoothing"),
        (problem.adjustment.scale is not None, "class_scales", "rows without scales"),
        (problem.dtype == "bfloat16", "dtype bfloat16", "dtype float64 or float32"),
    ):
        if clash:
            raise InputError(
                f"angular_margin is of the angle between unit rows and takes {wanted}, not {given}"
            )


def _of_factors(problem: Problem) -> None:
    """What goes with penalties of each class."""
    clashes = [
        (problem.constraint != "none", "unit rows"),
        (problem.dense, "target vectors"),
        (problem.multi_label, f"loss {problem.loss.name}"),
    ]
    for name, factors, wanted, against in (
        ("feature_penalties", problem.feature_factors, "one label a sample", clashes),
        ("classifier_penalties", problem.classifier_factors, "classes", clashes[:2]),
    ):
        what = next((words for clash, words in against if clash), "")
        if factors is not None and what:
            raise InputError(f"{name} go with {wanted} and penalties, not with {what}; drop them")
    _of_products("lambda_w", problem.lambda_w, "classifier_penalties", problem.classifier_factors)
    _of_products("lambda_h", problem.lambda_h, "feature_penalties", problem.feature_factors)


def _of_products(of_all: str, value: float, name: str, factors: Tensor | None) -> None:
    """The penalty of each class is one that all could have."""
    if factors is None or value == 0:
        return
    products = value * factors
    outside = torch.nonzero((products < LEAST_PENALTY) | (products > MOST_PENALTY))[:1, 0].tolist()
    for k in outside:
        raise InputError(
            f"{of_all} times {name} must lie in [{LEAST_PENALTY:g}, {MOST_PENALTY:g}], got "
            f"{float(products[k]):g} for class {k}; change {of_all}"
        )
