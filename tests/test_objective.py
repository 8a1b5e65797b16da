"""The objective: relations that hold for every loss, difference quotients, the class-mean
reduction, frozen factors.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, random_point, relative

from ufm_fast.errors import InputError
from ufm_fast.losses import make_loss
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem

SOFTMAX = [
    {"loss": "ce"},
    {"loss": "ce", "smoothing": 0.2},
    {"loss": "focal", "gamma": 1.5},
    {"loss": "pick-all"},
]


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["balanced", "raw"]), st.integers(0, 10**6))
def test_derivatives_match_central_differences(problem, variables, seed):
    """The slope and the Hessian product along a direction, to the second order of the step."""
    objective = Objective(problem, variables=variables)
    x, v = random_point(objective, seed, 0.7), random_point(objective, seed + 1, 0.7)
    t = 1e-4 / v.norm()
    ahead, behind = (objective.value_and_grad(x.axpy(sign * t, v)) for sign in (1.0, -1.0))
    slope = objective.value_and_grad(x).gradient.dot(v)
    assert (ahead.value - behind.value) / (2 * t) == pytest.approx(
        slope, rel=1e-6, abs=1e-7 * v.norm()
    )
    product = objective.hvp(x, v)
    difference = ahead.gradient.axpy(-1.0, behind.gradient).scale(0.5 / t)
    assert difference.axpy(-1.0, product).norm() <= 1e-6 * (product.norm() + v.norm())


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_hessian_is_symmetric(problem, seed):
    objective = Objective(problem)
    x, u, v = (random_point(objective, seed + i) for i in range(3))
    left, right = objective.hvp(x, u).dot(v), objective.hvp(x, v).dot(u)
    assert left == pytest.approx(right, rel=1e-9, abs=1e-10 * u.norm() * v.norm())


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_rotating_both_factors_changes_nothing(problem, seed):
    objective = Objective(problem)
    x = random_point(objective, seed)
    Q = torch.linalg.qr(torch.randn(problem.dim, problem.dim, dtype=torch.float64)).Q
    a, b = objective.value_and_grad(x), objective.value_and_grad(Point(x.W @ Q, x.H @ Q, x.b))
    assert b.value == pytest.approx(a.value, rel=1e-12)
    assert relative(b.gradient, Point(a.gradient.W @ Q, a.gradient.H @ Q, a.gradient.b)) < 1e-11


@settings(max_examples=40, deadline=None)
@given(problems(SOFTMAX), st.integers(0, 10**6), st.floats(-30, 30))
def test_a_constant_added_to_all_logits_changes_nothing(problem, seed, shift):
    if problem.bias == "none":
        return
    objective = Objective(problem)
    x = random_point(objective, seed)
    moved = Point(x.W, x.H, x.b + shift)
    a, b = objective.value_and_grad(x), objective.value_and_grad(moved)
    assert b.data_value == pytest.approx(a.data_value, rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["balanced", "raw"]), st.integers(0, 10**6))
def test_reduction_equals_the_full_problem_at_equal_features(problem, variables, seed):
    """f on class rows = f on all samples with those rows repeated; the row's gradient is the sum
    over its samples.
    """
    reduced, full = (Objective(problem, reduce=r, variables=variables) for r in ("classes", "none"))
    x = random_point(reduced, seed)
    lifted = reduced.lift(x)
    assert lifted.H.shape[0] == problem.num_samples
    at, every = (
        reduced.value_and_grad(x),
        full.value_and_grad(full.from_model(lifted.W, lifted.H, lifted.b)),
    )
    assert every.value == pytest.approx(at.value, rel=1e-12)
    assert every.data_value == pytest.approx(at.data_value, rel=1e-12)
    to_raw = every.gradient.H / full.scales.rows
    summed = torch.zeros_like(x.H).index_add_(0, problem.sample_row(), to_raw)
    torch.testing.assert_close(summed, at.gradient.H / reduced.scales.rows, rtol=1e-9, atol=1e-12)


def test_relations_between_losses():
    z = torch.randn(6, 5, dtype=torch.float64) * 3
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    plain = make_loss("ce").dense(z, y)
    torch.testing.assert_close(make_loss("ce", smoothing=0.0).dense(z, y), plain)
    torch.testing.assert_close(make_loss("focal", gamma=0.0).dense(z, y), plain)
    torch.testing.assert_close(make_loss("pick-all").dense(z, y), plain)


@pytest.mark.parametrize("freeze", ["w", "h"])
@pytest.mark.parametrize("loss", ["ce", "mse", "focal", "pick-all"])
def test_a_frozen_factor_has_no_gradient(freeze, loss):
    problem = Problem(classes=5, dim=4, freeze=freeze, loss=loss)
    objective = Objective(problem, reduce="none" if freeze == "h" else "classes")
    x, v = random_point(objective, 0), random_point(objective, 1)
    for g in (objective.value_and_grad(x).gradient, objective.hvp(x, v)):
        assert float((g.W if freeze == "w" else g.H).abs().max()) == 0.0
        assert float((g.H if freeze == "w" else g.W).abs().max()) > 0.0


def test_unknown_variables_are_refused():
    with pytest.raises(InputError, match="variables must be one of"):
        Objective(Problem(classes=3, dim=2), variables="log")
