"""Checks of the plain numbers that the closed forms take; an error names argument, value and what
is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.problem import Problem

NO_BIAS = math.inf
"""An infinite bias penalty is the same problem as no bias at all: `lambda_b=NO_BIAS`. A
free bias is `lambda_b=0`."""


def check_integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not math.isfinite(value) or int(value) != value or value < least:
        raise InputError(f"{name}={value!r}: expected an integer >= {least}")
    return int(value)


def check_positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name}={value!r}: expected a finite number > 0")
    return float(value)


def check_bias_penalty(value: float) -> float:
    if not value >= 0:
        raise InputError(f"lambda_b={value!r}: expected >= 0 (0: free bias; math.inf: no bias)")
    return float(value)


def bias_penalty(problem: Problem) -> float:
    """lambda_b as the formulas take it: 0 for a free bias, infinite for none."""
    return {"none": NO_BIAS, "free": 0.0}.get(problem.bias, problem.lambda_b)


def check_smoothing(value: float) -> float:
    if not 0 <= value < 1:
        raise InputError(f"smoothing={value!r}: expected 0 <= smoothing < 1")
    return float(value)


def check_counts(counts: Sequence[int] | Tensor) -> Tensor:
    """Samples per class as a float64 vector: at least two classes, at least one sample."""
    values = torch.as_tensor(counts).detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(
            f"counts of shape {tuple(values.shape)}: expected one number for each of K >= 2 classes"
        )
    whole = bool(torch.isfinite(values).all()) and bool((values == values.round()).all())
    if not whole or float(values.min()) < 0 or float(values.max()) < 1:
        raise InputError(
            f"counts={values.tolist()[:10]}: expected integers >= 0, at least one of them positive"
        )
    return values


def nuclear_coefficient(lambda_w: float, lambda_h: float) -> float:
    """mu = sqrt(lambda_W lambda_H), the price of one unit of the logits' nuclear norm.

    min over W H' = Z of lambda_W/2 |W|^2 + lambda_H/2 |H|^2 equals mu |Z|_* when d >= rank Z.
    """
    # Two roots, not the root of the product, which underflows for penalties below 1e-154.
    return math.sqrt(check_positive("lambda_w", lambda_w)) * math.sqrt(
        check_positive("lambda_h", lambda_h)
    )
