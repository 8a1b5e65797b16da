"""The lower bound is a lower bound: at thousands of random points, and against minima that theory
knows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from named_problems import CASES, build
from strategies import problems, random_point

from ufm_fast import Point, Problem, solve
from ufm_fast.losses import Focal
from ufm_fast.objective import Objective
from ufm_fast.theory import NO_BIAS, biased_mse_minimum, closed_form, focal_gap, focal_minimum
from ufm_fast.theory.certificates import certify, softmax, squares
from ufm_fast.theory.certificates.focal_with_bias import balanced_bound, following_bound
from ufm_fast.theory.certificates.operator_norm import dense_norm, split_norm
from ufm_fast.theory.squared_error import mse_bound


@pytest.mark.parametrize("loss", ["ce", "pick-all", "focal"])
def test_a_gradient_that_is_held_gives_the_same_certificate(loss, monkeypatch):
    problem = Problem(counts=[4, 3, 1, 7, 2], dim=3, loss=loss, lambda_w=0.02, lambda_h=0.01)
    objective = Objective(problem)
    x = objective.to_model(random_point(objective, 5))
    held = certify(problem, objective.rows, x, exact_classes=0)
    monkeypatch.setattr(softmax, "available_bytes", lambda device: 0)
    swept = certify(problem, objective.rows, x, exact_classes=0)
    assert held.lower_bound == pytest.approx(swept.lower_bound, rel=1e-9)
    assert held.spectral_ratio == pytest.approx(swept.spectral_ratio, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_never_above_the_minimum_at_random_points(name):
    """Two hundred points a case, from nearly zero to far out, near the minimum and away from it."""
    problem = build(name)
    objective = Objective(problem)
    least = closed_form(problem).value
    best = objective.from_model(*_model(solve(problem, metrics=False).point))
    for seed in range(200):
        scale = 10.0 ** ((seed % 10) / 2 - 4)
        noise = random_point(objective, seed, scale)
        x = noise if seed % 2 else best.axpy(1.0, noise)
        certificate = certify(problem, objective.rows, objective.to_model(x))
        assert certificate.lower_bound <= least * (1 + 1e-12)
        assert certificate.kind in ("exact", "none")


def _model(point):
    return point.W, point.H, point.b


@settings(max_examples=100, deadline=None)
@given(problems(max_classes=6), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 3.0]))
def test_bound_from_any_point_is_below_the_best_value_found(problem, seed, scale):
    objective = Objective(problem)
    solution = solve(problem, metrics=False, certificate=False, tol=1e-8, max_steps=300)
    certificate = certify(
        problem, objective.rows, objective.to_model(random_point(objective, seed, scale))
    )
    assert certificate.lower_bound <= solution.value * (1 + 1e-10)


@settings(max_examples=60, deadline=None)
@given(problems(max_classes=7), st.integers(0, 10**6))
def test_probabilistic_bound_agrees_with_the_exact_one(problem, seed):
    """With the K x K path off, the split norm bounds the same operator: never below the exact
    norm.
    """
    objective = Objective(problem)
    x = objective.to_model(random_point(objective, seed))
    exact = certify(problem, objective.rows, x)
    split = certify(problem, objective.rows, x, exact_classes=0)
    if exact.spectral_ratio is not None:
        assert split.spectral_ratio >= exact.spectral_ratio * (1 - 1e-9)
    assert (
        split.lower_bound <= exact.lower_bound + 1e-9 * abs(exact.value) + 1e-12
        or problem.loss.name == "mse"
    )


@pytest.mark.parametrize("loss", ["ce", "mse", "focal"])
def test_split_certificate_is_tight_at_the_minimum(loss):
    problem = Problem(counts=[9, 7, 5, 3, 2, 2, 1], dim=9, loss=loss, lambda_w=0.01, lambda_h=0.002)
    solution = solve(problem, metrics=False, tol=1e-12)
    rows = problem.rows("classes")
    certificate = certify(problem, rows, solution.point, exact_classes=0)
    assert certificate.relative_gap < 1e-6
    assert certificate.certified


@pytest.mark.parametrize("case", [{}, {"loss": "focal"}, {"loss": "mse"}, {"smoothing": 0.1}])
def test_a_saddle_is_shown_by_its_gap(case):
    """At the zero saddle and at a point that leaves one class out the gradient vanishes; the
    certificate does not.
    """
    problem = Problem(classes=6, dim=8, lambda_w=1e-3, lambda_h=1e-3, **case)
    objective = Objective(problem)
    zero = Point(torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64))
    assert objective.value_and_grad(zero).gradient.norm() == 0.0
    certificate = certify(problem, objective.rows, zero)
    assert certificate.relative_gap > 0.5
    assert certificate.spectral_ratio > 1.5
    assert not certificate.certified


@pytest.mark.parametrize("loss", ["ce", "focal"])
def test_free_bias_is_certified(loss):
    problem = Problem(
        counts=[12, 7, 4, 2, 1], dim=7, loss=loss, bias="free", lambda_w=0.01, lambda_h=0.002
    )
    solution = solve(problem, metrics=False)
    assert solution.certificate.relative_gap < 1e-7
    assert solution.certificate.lower_bound <= solution.value


@pytest.mark.parametrize("gamma", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("ratio", [0.3, 0.98, 1.02, 1.3, 1.8])
@pytest.mark.parametrize("counts", [[3] * 7, [20, 5, 5, 2, 0, 1]])
def test_focal_is_certified_on_both_sides_of_collapse(counts, ratio, gamma):
    """Where the loss is not convex: the bound is below every value found and meets the lowest."""
    mu = ratio * max(counts) ** 0.5 / sum(counts)
    problem = Problem(
        counts=counts, dim=8, loss="focal", gamma=gamma, lambda_w=0.5 * mu, lambda_h=2.0 * mu
    )
    objective = Objective(problem)
    found = [solve(problem, start=start, metrics=False) for start in ("spectral", "normal")]
    best = min(found, key=lambda solution: solution.value)
    assert best.certificate.relative_gap < 1e-7
    near = objective.from_model(*_model(best.point))
    for seed in range(20):
        noise = random_point(objective, seed, 10.0 ** (seed % 5 - 3))
        x = objective.to_model(noise if seed % 2 else near.axpy(1.0, noise))
        for exact_classes in (4096, 0):
            bound = certify(problem, objective.rows, x, exact_classes=exact_classes).lower_bound
            assert bound <= best.value * (1 + 1e-12)


def test_with_a_bias_the_focal_minimum_is_no_simplex_where_the_gap_jumps():
    """Some classes collapse and others do not: below every simplex, so no formula, and no bound
    that says otherwise.
    """
    problem = Problem(
        classes=30,
        dim=30,
        loss="focal",
        gamma=3.0,
        lambda_w=0.0412288,
        lambda_h=0.0412288,
        bias="free",
    )
    simplex = focal_minimum(30, 1, 0.0412288, 0.0412288, 3.0)
    apart = (torch.arange(30) < 15).double()
    W = torch.eye(30, dtype=torch.float64) - 1 / 30
    found = solve(
        problem, initial=Point(W, 2.0 * torch.diag(apart), 0.3 - 0.6 * apart), metrics=False
    )
    assert found.success
    assert found.certificate.lower_bound < found.value < simplex * (1 - 1.5e-5)
    penalised = replace(problem, bias="penalised", lambda_b=0.1)
    unbiased = replace(problem, bias="none")
    assert [closed_form(p) is None for p in (problem, penalised, unbiased)] == [True, True, False]
    gentle = replace(problem, lambda_w=0.03, lambda_h=0.03)
    assert solve(gentle, metrics=False).value == pytest.approx(closed_form(gentle).value, rel=1e-10)


@pytest.mark.parametrize("bias", ["free", "penalised"])
@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.05, 1.4])
@pytest.mark.parametrize("counts", [[4] * 9, [5, 4, 4, 3, 2], [12, 3, 1]])
def test_focal_with_a_bias_is_certified_beyond_its_convex_part(counts, ratio, gamma, bias):
    """Pulls above 1, where the convex envelope proves less by up to a tenth: rows that follow the
    bias are tight.
    """
    mu = ratio * max(counts) ** 0.5 / sum(counts)
    lambda_b = 0.1 if bias == "penalised" else 0.0
    problem = Problem(
        counts=counts,
        dim=9,
        loss="focal",
        gamma=gamma,
        lambda_w=0.5 * mu,
        lambda_h=2.0 * mu,
        bias=bias,
        lambda_b=lambda_b,
    )
    objective = Objective(problem)
    found = [solve(problem, start=start, metrics=False) for start in ("spectral", "normal")]
    best = min(found, key=lambda solution: solution.value)
    assert best.certificate.relative_gap < 1e-7
    assert best.certificate.kind == "exact"
    near = objective.from_model(*_model(best.point))
    for seed in range(12):
        noise = random_point(objective, seed, 10.0 ** (seed % 6 - 4))
        x = objective.to_model(noise if seed % 2 else near.axpy(1.0, noise))
        assert certify(problem, objective.rows, x).lower_bound <= best.value * (1 + 1e-12)


@pytest.mark.parametrize(
    ("counts", "gamma", "ratio"),
    [([1, 4, 12, 44], 3.0, 0.3), ([7, 1, 1, 1, 1], 2.0, 0.5), ([9, 5, 1], 8.0, 0.7)],
)
def test_a_bound_that_follows_the_bias_is_below_every_value_found(counts, gamma, ratio):
    """Partly collapsed classes, where it is not tight, from points good and bad and with any upper
    bound on the minimum.
    """
    mu = ratio * max(counts) ** 0.5 / sum(counts)
    for bias, lambda_b in (("free", 0.0), ("penalised", 1e-3), ("penalised", 3.0)):
        problem = Problem(
            counts=counts,
            dim=6,
            loss="focal",
            gamma=gamma,
            lambda_w=mu,
            lambda_h=mu,
            bias=bias,
            lambda_b=lambda_b,
        )
        objective = Objective(problem)
        found = [
            solve(replace(problem, seed=seed), start="normal", metrics=False) for seed in range(4)
        ]
        best = min(found, key=lambda solution: solution.value)
        near = objective.from_model(*_model(best.point))
        for seed in range(30):
            x = near.axpy(1.0, random_point(objective, seed, 10.0 ** (seed % 6 - 4)))
            bound = following_bound(
                problem,
                objective.rows,
                objective.to_model(x),
                best.value * (1.0 + 10.0 ** (-seed % 9 - 7)),
            )
            assert bound <= best.value * (1 + 1e-12)
        for scale in (0.0, 1e4, 1e30):
            x = objective.to_model(random_point(objective, 1, scale))
            assert 0.0 <= following_bound(problem, objective.rows, x, best.value) <= best.value


def _bound_and_simplex(classes, gamma, kappa):
    mu = kappa / classes
    return balanced_bound(Focal(gamma=gamma), classes, 1, mu), focal_minimum(
        classes, 1, mu, mu, gamma
    )


@settings(max_examples=60, derandomize=True)
@given(
    classes=st.integers(2, 60),
    gamma=st.sampled_from([0.25, 1.0, 2.0, 3.0, 8.0]),
    kappa=st.floats(0.05, 1.6),
)
def test_the_balanced_bound_meets_the_simplex_but_close_to_the_jump(classes, gamma, kappa):
    """It is never above; and away from the penalty at which the gap jumps to zero, where other
    states win, it is tight.
    """
    mu = kappa / classes
    bound, simplex = _bound_and_simplex(classes, gamma, kappa)
    assert simplex * (1 - 3e-4) <= bound <= simplex * (1 + 1e-13)
    gaps = [focal_gap(classes, 1, factor * mu, factor * mu, gamma) > 0 for factor in (0.99, 1.01)]
    if gaps[0] == gaps[1]:
        assert bound == pytest.approx(simplex, rel=1e-12)


@pytest.mark.parametrize(
    ("classes", "gamma", "below"),
    [(20, 3.0, 1.01e-5), (40, 4.0, 1.56e-4), (60, 6.0, 2.93e-4), (200, 8.0, 7.53e-4)],
)
def test_how_far_the_balanced_bound_lies_below_the_simplex_at_the_jump(classes, gamma, below):
    """The numbers that `balanced_bound` states, at the last penalty at which there is a gap."""
    low, high = 0.5, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if focal_gap(classes, 1, middle / classes, middle / classes, gamma) > 0
            else (low, middle)
        )
    bound, simplex = _bound_and_simplex(classes, gamma, low)
    assert 1 - bound / simplex == pytest.approx(below, rel=0.02)
    near = [_bound_and_simplex(classes, gamma, low * factor) for factor in (0.9999, 1.0001)]
    assert all(0 < 1 - bound / simplex < below for bound, simplex in near)


def test_low_dimension_is_bounded_but_not_certified():
    solution = solve(Problem(classes=12, dim=3), metrics=False)
    assert solution.success
    assert 0 < solution.certificate.lower_bound < solution.value
    assert not solution.certificate.certified


@pytest.mark.parametrize("bias", ["none", "penalised", "free"])
@pytest.mark.parametrize(
    ("lam", "counts"), [(1e-6, [7, 4, 2, 1]), (1e-9, [7, 4, 2, 1]), (1e-4, [0, 3, 0, 5])]
)
def test_squared_error_bound_stays_below_a_minimum_of_the_size_of_rounding(lam, counts, bias):
    """Residuals are of the order of N mu: the bound must not carry the rounding of the O(1) logits
    that they are left from.
    """
    lambda_b = lam if bias == "penalised" else 0.0
    problem = Problem(
        counts=counts, dim=6, loss="mse", bias=bias, lambda_w=lam, lambda_h=lam, lambda_b=lambda_b
    )
    objective, least = Objective(problem), closed_form(problem)
    W, H, b = least.point()
    if b is None and bias != "none":
        b = torch.zeros(4, dtype=torch.float64)
    best = objective.from_model(W, H[problem.counts > 0], b)
    for seed in range(300):
        x = best.axpy(1.0, random_point(objective, seed, 10.0 ** -(seed % 15)))
        if bias != "none" and seed % 3 == 0:  # the right factors with any bias
            x = Point(best.W, best.H, 10.0 ** (seed % 6) * x.b)
        certificate = certify(problem, objective.rows, objective.to_model(x))
        assert certificate.lower_bound <= least.value * (1 + 1e-13)
        assert certificate.value >= least.value * (1 - 1e-13)
        assert certificate.kind == "exact"


@pytest.mark.parametrize("bias", ["none", "penalised", "free"])
@pytest.mark.parametrize(
    ("lam", "counts"), [(1e-9, [7, 4, 2, 1]), (1e-10, [3, 3, 3, 3]), (1e-10, [9, 0, 2, 2])]
)
def test_squared_error_gap_is_closed_where_residuals_are_rounding(lam, counts, bias):
    """The gradient of a point whose logits are right to 1e-16 is right to 1e-16 / lambda only: the
    best dual rows are known.
    """
    lambda_b = 1e-3 if bias == "penalised" else 0.0
    problem = Problem(
        counts=counts, dim=6, loss="mse", bias=bias, lambda_w=lam, lambda_h=lam, lambda_b=lambda_b
    )
    assert solve(problem, metrics=False).certificate.relative_gap <= 1e-12


@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(any),
    level=st.floats(1e-3, 2.0),
    bias=st.sampled_from(["none", "penalised", "free"]),
    lambda_b=st.floats(1e-6, 10.0),
)
@settings(max_examples=80, deadline=None)
def test_two_proofs_of_the_squared_error_agree_at_its_minimum(counts, level, bias, lambda_b):
    """The gradient of the minimiser and the dual rows of theory prove the same bound; neither lies
    above the value.
    """
    mu = level * max(counts) ** 0.5 / sum(counts)
    lambda_b = lambda_b if bias == "penalised" else 0.0
    problem = Problem(
        counts=counts, dim=9, loss="mse", bias=bias, lambda_w=mu, lambda_h=mu, lambda_b=lambda_b
    )
    solution = solve(problem, metrics=False)
    with patch.object(squares, "mse_bound", lambda *_: -math.inf):
        of_gradient = certify(problem, Objective(problem).rows, solution.point)
    known = mse_bound(problem.counts, mu, mu, {"none": NO_BIAS}.get(bias, lambda_b))
    assert known <= solution.value
    assert known == pytest.approx(of_gradient.lower_bound, rel=1e-7, abs=1e-13)


@pytest.mark.parametrize(
    ("counts", "lambda_w", "lambda_h", "lambda_b"),
    [
        ([2, 10**6], 0.083, 0.2043, 1e-12),
        ([1000, 10, 10**6], 7.3, 407.0, 1e-12),
        ([1, 0], 1e3, 1e3, 1e-9),
    ],
)
def test_squared_error_bound_is_tight_where_penalties_are_huge(
    counts, lambda_w, lambda_h, lambda_b
):
    penalties = {"lambda_w": lambda_w, "lambda_h": lambda_h, "lambda_b": lambda_b}
    solution = solve(
        Problem(counts=counts, dim=5, loss="mse", bias="penalised", **penalties), metrics=False
    )
    assert solution.certificate.relative_gap <= 1e-7
    least = biased_mse_minimum(counts, **penalties)
    assert least * (1 - 1e-9) <= mse_bound(counts, **penalties) <= least * (1 + 1e-15)


def test_one_class_alone_is_fitted_by_a_free_bias_exactly():
    problem = Problem(counts=[0, 20, 0], dim=4, loss="mse", bias="free")
    for start in ("spectral", "normal"):
        solution = solve(problem, start=start)
        assert (solution.value, solution.gradient_norm, solution.certificate.relative_gap) == (
            0.0,
            0.0,
            0.0,
        )
        assert solution.certificate.certified
    frozen = solve(replace(problem, freeze="w"), metrics=False)
    assert float(frozen.point.W.norm()) > 0.0


def test_norms():
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(40, 30, dtype=torch.float64, generator=generator)
    exact = float(torch.linalg.matrix_norm(G, 2))
    assert dense_norm(G.split(7), 30).value == pytest.approx(exact, rel=1e-12)
    assert dense_norm(G.split(7), 30).value >= exact * (1 - 1e-15)
    U = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64, generator=generator)).Q
    bound = split_norm(lambda X: G @ X, lambda Y: G.T @ Y, U, V)
    assert bound.value >= exact * (1 - 1e-12)
    assert bound.estimate <= exact * (1 + 1e-12)
    assert math.isfinite(bound.value)


def test_a_free_bias_whose_column_sums_are_all_rounding_is_certified():
    """At this optimum every column sum is a positive 1e-17: there is no deficit to share a surplus
    by.
    """
    sets = solve(
        Problem(classes=3, dim=6, per_class=5, loss="pick-all", bias="free"), metrics=False
    )
    assert sets.certificate.certified


def test_one_class_alone_and_a_frozen_factor_without_penalty_have_results():
    alone = solve(Problem(counts=[5, 0, 0], dim=4)).metrics
    assert "nc2_classifier" in alone  # the classifier's own
    assert "nc1_pinv" not in alone
    assert closed_form(Problem(counts=[0, 20, 0], dim=4, loss="mse", bias="free")).value == 0.0
    for freeze in ("w", "h"):
        for loss in ("ce", "mse"):
            frozen = solve(
                Problem(classes=5, dim=8, loss=loss, freeze=freeze, **{f"lambda_{freeze}": 0.0})
            )
            assert frozen.certificate.certified
            assert "balancedness" not in frozen.metrics
