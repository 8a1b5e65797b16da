"""Unit rows: minima against theory, certificates, codes, continuation in the temperature,
one-vs-rest margins.
"""

from __future__ import annotations

import math

import pytest
import torch

from ufm_fast import Problem, solve
from ufm_fast.metrics.one_vs_rest import margins, one_vs_rest
from ufm_fast.solvers.staged import temperatures
from ufm_fast.theory import closed_form
from ufm_fast.theory.codes import hardmax_margin, known_code, margin_bounds, welch_level
from ufm_fast.theory.frames import simplex_frame

QUICK = {"metrics": False, "certificate": False}


def sphere(classes: int, dim: int, temperature: float, **more: object) -> Problem:
    return Problem(classes=classes, dim=dim, constraint="sphere", temperature=temperature, **more)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0, 100.0])
def test_a_random_start_meets_the_simplex(temperature):
    for seed in range(2):
        found = solve(sphere(10, 16, temperature, seed=seed), start="normal", **QUICK)
        assert found.value == pytest.approx(found.theory.value, rel=1e-10)
        assert found.evaluations <= 500


@pytest.mark.parametrize("margin", [0.3, -0.2, 3.0])
def test_one_margin_for_all_classes_leaves_the_simplex(margin):
    found = solve(sphere(5, 4, 6.0, margin=margin), start="normal", metrics=False)
    assert found.theory.value == pytest.approx(
        math.log1p(4 * math.exp(-6.0 * (5 / 4 - margin))), rel=1e-13
    )
    assert found.value == pytest.approx(found.theory.value, rel=1e-10)
    assert found.certificate.certified
    assert closed_form(sphere(5, 4, 6.0, margin=[0.1, 0.1, 0.1, 0.1, 0.2])) is None
    assert closed_form(sphere(5, 4, 6.0, margin=0.1, smoothing=0.1)) is None
    assert closed_form(sphere(5, 4, 6.0, margin=0.1, logit_adjustment=[1.0, 0, 0, 0, 0])) is None


@pytest.mark.parametrize("method", ["cg", "newton-cg", "lbfgs"])
def test_every_method_keeps_to_the_spheres(method):
    found = solve(sphere(7, 6, 3.0), start="normal", method=method, **QUICK)
    assert found.success
    assert found.value == pytest.approx(math.log1p(6 * math.exp(-3.0 * 7 / 6)), rel=1e-10)
    assert float((found.point.W.norm(dim=1) - 1).abs().max()) < 1e-14


@pytest.mark.parametrize(
    "problem",
    [
        sphere(10, 16, 5.0),
        sphere(10, 9, 1.0),
        sphere(4, 6, 5.0, smoothing=0.1),
        sphere(4, 6, 50.0, smoothing=0.1),
        Problem(counts=[9, 5, 3, 2, 1], dim=6, constraint="sphere", temperature=4.0),
    ],
)
def test_minima_are_certified(problem):
    found = solve(problem, start="normal", metrics=False)
    assert found.certificate.kind == "exact"
    assert found.certificate.relative_gap < 1e-6
    if found.theory is not None:
        assert found.value == pytest.approx(found.theory.value, rel=1e-10)
        closed = solve(problem, method="closed-form", metrics=False)
        assert closed.success
        assert closed.certificate.certified


@pytest.mark.parametrize("margin", [{}, {"margin": 0.3}, {"angular_margin": 0.5}])
@pytest.mark.parametrize("start", ["spectral", "normal"])
def test_rounded_lengths_take_no_value_below_the_minimum(margin, start):
    problem = sphere(4, 6, 1.0, dtype="float32", **margin)
    solution = solve(problem, start=start)
    assert solution.value >= closed_form(problem).value * (1 - 1e-12)
    assert solution.certificate.kind == "exact"
    assert "please report" not in solution.message


def test_squares_that_vanish_in_float32_end_no_solve():
    problem = Problem(
        counts=[7, 4, 2, 1], dim=5, constraint="sphere", temperature=1e4, dtype="float32"
    )
    assert solve(problem, metrics=False).value == pytest.approx(0.0, abs=1e-30)


def test_with_few_dimensions_the_bound_holds_and_certifies_nothing():
    for problem in (sphere(5, 3, 4.0), sphere(12, 3, 10.0)):
        at_minimum, at_start = (
            solve(problem, start="normal", metrics=False, **more) for more in ({}, {"max_steps": 0})
        )
        for found in (at_minimum, at_start):
            assert found.certificate.lower_bound <= at_minimum.value
            assert not found.certificate.certified


@pytest.mark.parametrize(("dim", "classes"), [(3, 12), (5, 16), (2, 7), (4, 8)])
@pytest.mark.parametrize("temperature", [10.0, 5.0])
def test_many_classes_settle_on_known_codes(dim, classes, temperature):
    code = known_code(classes, dim)
    found = solve(sphere(classes, dim, temperature), start="normal", restarts=2, **QUICK)
    assert found.value == pytest.approx(code.value(temperature), rel=1e-10)
    margin = hardmax_margin(classes, dim)
    if margin is not None:
        assert one_vs_rest(found.point.W)[0] == pytest.approx(margin, abs=1e-6)
        low, high = margin_bounds(classes, dim)
        assert low <= margin <= high


def test_the_schedule_of_temperatures_ends_below_the_problems_own():
    assert temperatures(sphere(10, 16, 5.0)) == []
    assert temperatures(sphere(10, 16, 100.0)) == [10.0, 30.0]
    assert temperatures(sphere(12, 3, 12.0)) == []
    assert temperatures(sphere(12, 3, 100.0)) == [12.0, 24.0, 48.0, 96.0]


def test_margins_are_those_of_the_simplex_and_zero_inside_the_hull():
    W = simplex_frame(6, 8) * math.sqrt(6 / 5)
    torch.testing.assert_close(
        margins(W), torch.full((6,), 6 / 5, dtype=torch.float64), rtol=1e-10, atol=0.0
    )
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0.1, 0.1]], dtype=torch.float64)
    assert margins(square)[4] == 0.0
    assert margins(square[:4])[0] == pytest.approx(1.0, rel=1e-10)
    least, mean = one_vs_rest(torch.randn(40, 5, dtype=torch.float64), exact_classes=10, sample=20)
    assert mean.stderr is not None
    assert least <= mean.value
    assert welch_level(8, 4) == pytest.approx(1 / math.sqrt(7))


def test_how_far_codes_are_apart_is_measured_and_shown():
    from ufm_fast.cli.report import result_table

    found = solve(sphere(12, 3, 10.0), start="normal", certificate=False)
    assert found.metrics["one_vs_rest"] == pytest.approx(1 - 1 / math.sqrt(5), abs=1e-6)
    assert "one_vs_rest" not in solve(sphere(4, 6, 1.0), certificate=False).metrics
    assert "one-vs-rest margin" in list(result_table(found.summary(), "").columns[0].cells)
