"""Theory and values check one another: wrong closed forms are none, contradictions are said, one
point has one value.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm_fast import Problem, solve
from ufm_fast.errors import Contradiction
from ufm_fast.objective import Objective
from ufm_fast.solvers.solution import Outcome
from ufm_fast.theory import closed_form, imbalanced, two_group_ce
from ufm_fast.theory.convex import GapProblem

EXTREME = [
    ([10**8, 10**8, 1], 1e-6, 1e-11),
    ([3 * 10**7, 1, 1, 1], 1e-4, 1e-9),
    ([1] * 6 + [10**9] * 2, 1e-5, 1e-12),
]


@pytest.mark.parametrize(("counts", "lambda_w", "lambda_h"), EXTREME)
def test_two_group_form_at_extreme_ratios_of_counts(counts, lambda_w, lambda_h):
    """The first was 17 % above the minimum: steps of four nats had not gone the way in 500."""
    problem = Problem(counts=counts, dim=8, lambda_w=lambda_w, lambda_h=lambda_h)
    solution = solve(problem, metrics=False)
    assert solution.certificate.certified
    assert solution.value == pytest.approx(closed_form(problem).value, rel=1e-9)
    assert solve(problem, method="closed-form", metrics=False).certificate.certified


@settings(max_examples=150, deadline=None)
@given(
    classes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    logs=st.tuples(st.floats(0.0, 9.0), st.floats(0.0, 9.0)),
    level=st.floats(-6.0, 0.5),
    lambda_b=st.sampled_from([0.0, 1e-9, 0.1, 30.0, math.inf]),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_two_group_minima_are_proved_by_duality(classes, logs, level, lambda_b, smoothing):
    counts = (int(10 ** logs[0]), int(10 ** logs[1]))
    mu = 10**level * max(counts) ** 0.5 / sum(k * n for k, n in zip(classes, counts, strict=True))
    best = two_group_ce(classes, counts, mu, mu, lambda_b, smoothing)
    assert best.shortfall <= 1e-9 * best.value


@pytest.mark.parametrize(
    "problem",
    [
        Problem(counts=[90, 90, 20, 20, 20], dim=6, bias="free"),
        Problem(counts=[90, 90, 20, 20, 20], dim=6, smoothing=0.1),
        Problem(counts=[90, 90, 20, 20, 20], dim=6, bias="penalised", lambda_b=0.01),
    ],
)
def test_a_form_whose_iteration_ended_early_is_none(problem, monkeypatch):
    assert closed_form(problem) is not None
    newton = GapProblem._newton
    monkeypatch.setattr(GapProblem, "_newton", lambda self, v, free: 1.001 * newton(self, v, free))
    assert closed_form(problem) is None


def test_a_collapsed_form_whose_bias_is_not_found_is_none(monkeypatch):
    problem = Problem(
        counts=[20, 5, 4, 1], dim=3, lambda_w=0.3, lambda_h=0.3, bias="penalised", lambda_b=0.1
    )
    assert closed_form(problem).collapsed
    found = imbalanced._bias_alone
    monkeypatch.setattr(imbalanced, "_bias_alone", lambda *a: (found(*a)[0], 1.001 * found(*a)[1]))
    assert closed_form(problem) is None


def _wrong(factor):
    """The closed form of a balanced problem with a value, and a point, that are not its minimum."""
    problem = Problem(classes=5, dim=6, per_class=2)
    form = closed_form(problem)
    return problem, replace(
        form,
        value=1.1 * form.value,
        logits=replace(form.logits, within=[factor * form.logits.within[0]]),
    )


def test_a_value_below_its_theory_is_said(monkeypatch):
    problem, form = _wrong(1.0)
    monkeypatch.setattr("ufm_fast.solving.closed_form", lambda problem: form)
    with pytest.warns(Contradiction, match="lies below the closed form"):
        found = solve(problem, metrics=False)
    assert "lies below the closed form" in found.summary()["message"]


@pytest.mark.parametrize("certificate", [True, False])
def test_a_closed_form_that_is_no_minimum_is_not_called_converged(certificate, monkeypatch):
    problem, form = _wrong(1.2)
    objective = Objective(problem)
    W, H, _ = form.point()
    form = replace(form, value=objective.value_and_grad(objective.from_model(W, H, None)).value)
    monkeypatch.setattr("ufm_fast.solving.closed_form", lambda problem: form)
    found = solve(problem, method="closed-form", certificate=certificate, metrics=False)
    assert (found.outcome, found.success) == (Outcome.MAX_STEPS, False)
    assert "no proven minimum" in found.message


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "problem", [{}, {"loss": "mse", "bias": "free"}, {"loss": "mse", "dim": 2}]
)
def test_a_closed_form_runs_in_every_dtype(problem, dtype, certificate):
    problem = Problem(**{"classes": 5, "dim": 6, "dtype": dtype, **problem})
    assert solve(problem, method="closed-form", certificate=certificate, metrics=False).success


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize("loss", ["ce", "mse", "focal"])
def test_half_precision_value_and_certificate_are_of_the_point_that_is_saved(loss, certificate):
    """The value was that of parameters rounded to bfloat16, 1e-3 above theory, beside a gap of
    4e-7.
    """
    problem = Problem(classes=5, dim=6, dtype="bfloat16", loss=loss)
    found = solve(problem, metrics=False, certificate=certificate)
    exact = Objective(replace(problem, dtype="float64"), variables="raw")
    truth = exact.value_and_grad(found.point.to(dtype=torch.float64))
    assert found.value == pytest.approx(truth.value, rel=1e-12 if certificate else 1e-5)
    assert found.data_value == pytest.approx(truth.data_value, rel=1e-12 if certificate else 1e-4)
    if certificate:
        assert found.value == pytest.approx(found.certificate.value, rel=1e-12)
        gap = (found.value - found.certificate.lower_bound) / found.value
        assert found.certificate.relative_gap == pytest.approx(gap, rel=1e-6)
