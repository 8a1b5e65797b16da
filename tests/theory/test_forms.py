"""Closed forms against a plain dense objective: values, minimisers, thresholds, and multi-start
minimisation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ufm_fast import theory
from ufm_fast.errors import InputError
from ufm_fast.problem import Problem
from ufm_fast.targets import TargetSets

FREE, PENALISED, NONE = "free", "penalised", "none"


class Dense:
    """The full problem as written in the papers, with a row of features for each distinct target
    (or each sample).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        sets = problem.target_sets
        if sets is None:
            self.targets = torch.eye(problem.classes, dtype=torch.float64)
            self.counts = problem.counts.double()
        else:
            self.targets = torch.zeros(len(sets.counts), problem.classes, dtype=torch.float64)
            rows = torch.repeat_interleave(torch.arange(len(sets.counts)), sets.indptr.diff())
            self.targets[rows, sets.indices] = 1.0
            self.counts = sets.counts.double()

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        loss, targets = self.problem.loss, self.targets
        if loss.name == "mse":
            return 0.5 * (logits - targets).square().sum(1)
        log_p = logits.log_softmax(1)
        if loss.name == "focal":
            log_p = (log_p * targets).sum(1)
            return (-torch.expm1(log_p)) ** loss.gamma * -log_p
        smooth = (1 - loss.smoothing) * targets + loss.smoothing / targets.shape[1]
        return -(smooth * log_p).sum(1)

    def __call__(self, W: torch.Tensor, H: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        p = self.problem
        logits = H @ W.T if b is None else H @ W.T + b
        fit = (self.counts * self.losses(logits)).sum() / p.num_samples
        penalty = p.lambda_w * W.square().sum() + p.lambda_h * (self.counts @ H.square().sum(1))
        return fit + penalty / 2 + (0.0 if b is None else p.lambda_b / 2 * b.square().sum())

    def random_minimum(self, seed: int, scale: float = 1.0) -> float:
        """L-BFGS from a random start, in the variables sqrt(n_k) h_k."""
        p = self.problem
        shapes = [(p.classes, p.dim), (len(self.counts), p.dim)] + (
            [] if p.bias == NONE else [(p.classes,)]
        )
        sizes = [math.prod(shape) for shape in shapes]
        roots = self.counts.clamp(min=1).sqrt()[:, None]

        def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
            flat = torch.from_numpy(x).requires_grad_(True)
            W, H, *b = (
                part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)
            )
            ratio = (p.lambda_h / p.lambda_w) ** 0.25
            value = self(ratio * W, H / ratio / roots, b[0] if b else None)
            return value.item(), torch.autograd.grad(value, flat)[0].numpy()

        start = scale * np.random.default_rng(seed).standard_normal(sum(sizes))
        options = {"maxiter": 4000, "maxfun": 8000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 30}
        return float(
            minimize(value_and_grad, start, jac=True, method="L-BFGS-B", options=options).fun
        )


def make(
    name="ce",
    counts=(3, 3, 3),
    dim=None,
    lam=(1e-2, 1e-2),
    bias=NONE,
    lambda_b=0.0,
    smoothing=0.0,
    gamma=0.0,
    sets=None,
):
    data = {"counts": list(counts)}
    if sets is not None:
        indptr = np.cumsum([0] + [len(members) for members, _ in sets])
        indices = np.array([k for members, _ in sets for k in members])
        data = {
            "target_sets": TargetSets.create(
                indptr, indices, len(counts), np.array([n for _, n in sets])
            )
        }
    return Problem(
        classes=len(counts),
        dim=len(counts) if dim is None else dim,
        loss=name,
        smoothing=smoothing,
        gamma=gamma if name == "focal" else None,
        lambda_w=lam[0],
        lambda_h=lam[1],
        lambda_b=lambda_b,
        bias=bias,
        **data,
    )


def sets_of(classes: int, per_set: dict[int, int]):
    return [
        (members, n)
        for size, n in per_set.items()
        for members in combinations(range(classes), size)
    ]


BIASES = [(NONE, 0.0), (FREE, 0.0), (PENALISED, 0.03)]
CASES = {
    "ce": make(lam=(1e-2, 3e-2)),
    "ce, K=2, d=1": make(counts=(4, 4), dim=1),
    "ce, d=K-1, free bias": make(counts=(5,) * 5, dim=4, bias=FREE, lam=(1e-3, 1e-2)),
    "ce, penalised bias": make(counts=(5,) * 5, dim=7, bias=PENALISED, lambda_b=0.1),
    "ce just below collapse": make(counts=(4,) * 4, lam=(0.1249, 0.1249)),
    "ce collapsed, d=1": make(counts=(4,) * 4, dim=1, lam=(0.1251, 0.1251)),
    "smoothing": make(counts=(2,) * 6, dim=5, smoothing=0.1),
    "smoothing collapsed": make(counts=(4,) * 4, lam=(0.12, 0.12), smoothing=0.05),
    "focal": make("focal", counts=(3,) * 4, gamma=3.0, bias=FREE),
    "focal, K=10": make("focal", counts=(2,) * 10, gamma=2.0, lam=(5e-3, 5e-3)),
    "ce two groups": make(counts=(9, 2, 9, 2, 2)),
    "ce two groups, d=K-1, free": make(counts=(9, 2, 9, 2, 2), dim=4, bias=FREE),
    "ce two groups, penalised": make(counts=(9, 2, 9, 2, 2), bias=PENALISED, lambda_b=0.02),
    "ce one against the rest": make(counts=(1, 20, 20, 20), bias=FREE),
    "ce K=2 imbalanced": make(counts=(1, 20), dim=1),
    "ce minority collapse, d=3": make(counts=(20, 1, 20, 1, 20, 1), dim=3, lam=(2e-2, 2e-2)),
    "ce shared direction collapsed": make(
        counts=(20, 1, 20, 1, 20, 1), lam=(6.2e-2, 6.2e-2), bias=PENALISED, lambda_b=0.02
    ),
    "ce two groups collapsed": make(
        counts=(20, 1, 20, 1), lam=(0.2, 0.2), bias=PENALISED, lambda_b=0.1
    ),
    "ce three groups collapsed": make(counts=(20, 5, 20, 1), lam=(0.2, 0.2), bias=FREE, dim=1),
    "ce empty classes": make(counts=(6, 0, 6, 0, 6)),
    "ce empty classes, penalised": make(counts=(6, 0, 6, 0, 6), bias=PENALISED, lambda_b=0.02),
    "ce one class present": make(counts=(6, 0, 0), lam=(1e-3, 1e-3)),
    "smoothing two groups": make(
        counts=(9, 2, 9, 2, 2), smoothing=0.1, bias=PENALISED, lambda_b=0.05
    ),
    "smoothing two groups, empty, free": make(counts=(9, 0, 9, 0), smoothing=0.1, bias=FREE),
    "mse": make("mse", counts=(5,) * 4),
    "mse imbalanced, empty": make("mse", counts=(9, 4, 0, 1), lam=(3e-2, 5e-2)),
    "mse d<K": make("mse", counts=(9, 4, 4, 1), dim=2),
    "mse collapsed": make("mse", counts=(4, 1, 2), lam=(1.0, 1.0)),
    "mse free": make("mse", counts=(5,) * 4, dim=3, bias=FREE),
    "mse simplex": make("mse", counts=(5,) * 4, bias=PENALISED, lambda_b=0.05, lam=(2e-2, 2e-2)),
    "mse tilted": make("mse", counts=(5,) * 4, bias=PENALISED, lambda_b=0.5, lam=(2e-2, 2e-2)),
    "mse tilted but d=K-1": make(
        "mse", counts=(5,) * 4, dim=3, bias=PENALISED, lambda_b=0.5, lam=(2e-2, 2e-2)
    ),
    "mse d<K-1, free": make("mse", counts=(5,) * 5, dim=2, bias=FREE),
    "mse d<K-1, penalised": make("mse", counts=(5,) * 5, dim=2, bias=PENALISED, lambda_b=0.2),
    "mse bias, collapsed": make(
        "mse", counts=(5,) * 5, dim=2, bias=PENALISED, lambda_b=0.2, lam=(0.5, 0.5)
    ),
    "mse imbalanced, d=1, free": make("mse", counts=(9, 4, 4, 1), dim=1, bias=FREE),
    "mse imbalanced, empty, d=2, free": make("mse", counts=(9, 4, 0, 1, 7, 7), dim=2, bias=FREE),
    "mse imbalanced, free": make("mse", counts=(9, 4, 4, 1), bias=FREE),
    "mse imbalanced, penalised": make("mse", counts=(9, 4, 4, 1), bias=PENALISED, lambda_b=0.1),
    "mse imbalanced, empty, penalised": make(
        "mse", counts=(9, 4, 0, 1, 4), bias=PENALISED, lambda_b=0.01
    ),
    "mse imbalanced, d<K, enough": make(
        "mse", counts=(9, 9, 1, 9, 1), dim=3, bias=FREE, lam=(5e-2, 5e-2)
    ),
    "pick-all": make("pick-all", counts=(1,) * 4, sets=sets_of(4, {1: 5, 2: 2})),
    "pick-all, d=K-1, free": make(
        "pick-all", counts=(1,) * 5, dim=4, sets=sets_of(5, {1: 3, 2: 2, 3: 1}), bias=FREE
    ),
    "pick-all pairs": make(
        "pick-all", counts=(1,) * 4, sets=sets_of(4, {2: 2}), bias=PENALISED, lambda_b=0.1
    ),
    "pick-all collapsed": make(
        "pick-all", counts=(1,) * 4, dim=1, sets=sets_of(4, {1: 2, 2: 1}), lam=(0.4, 0.4)
    ),
    "pick-all single labels": make(
        "pick-all", counts=(7, 2, 7), sets=[((2,), 7), ((0,), 7), ((1,), 2)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_point_attains_the_value_with_zero_gradient(name):
    problem = CASES[name]
    form = theory.closed_form(problem)
    assert form is not None
    check_point(problem, form)


def check_point(problem, form, gradient_tolerance=1e-9):
    W, H, b = form.point()
    assert (b is None) == (problem.bias == NONE)
    assert W.shape == (problem.classes, problem.dim)
    assert W.dtype == H.dtype == torch.float64
    assert form.collapsed == (not W.any() and not H.any())
    parameters = [x.clone().requires_grad_(True) for x in (W, H, b) if x is not None]
    value = Dense(problem)(*parameters, *([None] if b is None else []))
    assert value.item() == pytest.approx(form.value, rel=1e-12)
    size = (
        problem.lambda_w * W.norm()
        + problem.lambda_h * H.norm()
        + math.sqrt(problem.lambda_w * problem.lambda_h)
    )
    for gradient in torch.autograd.grad(value, parameters):
        assert gradient.norm() <= gradient_tolerance * size


@pytest.mark.parametrize("name", CASES)
def test_random_starts_reach_the_value_and_never_go_below(name):
    problem = CASES[name]
    form = theory.closed_form(problem)
    found = [Dense(problem).random_minimum(seed) for seed in range(3)]
    assert min(found) == pytest.approx(form.value, rel=1e-9)
    assert min(found) >= form.value * (1 - 1e-13)


@settings(max_examples=40, deadline=None)
@given(
    classes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    counts=st.tuples(st.integers(0, 60), st.integers(1, 60)).filter(lambda n: n[0] != n[1]),
    log_mu=st.floats(-14, 0),
    bias=st.sampled_from(BIASES),
    smoothing=st.sampled_from([0.0, 0.0, 0.1]),
    skew=st.floats(-3, 3),
)
def test_two_group_points_are_critical_and_optimal(classes, counts, log_mu, bias, smoothing, skew):
    per_class = (counts[0],) * classes[0] + (counts[1],) * classes[1]
    lam = (math.exp(log_mu + skew), math.exp(log_mu - skew))
    problem = make(counts=per_class, lam=lam, bias=bias[0], lambda_b=bias[1], smoothing=smoothing)
    form = theory.closed_form(problem)
    if form is None:
        assert bias[0] == FREE
        assert counts[0] == 0
        return
    check_point(problem, form, 1e-6)
    assert form.value - lower_bound(problem, form.point()) <= 1e-6 * form.value


def lower_bound(problem, point):
    """A bound on the global minimum from the logit gradient G at a point: shrink G until |G|_op <=
    mu.
    """
    dense, (W, H, b) = Dense(problem), point
    n = dense.counts
    p = (H @ W.T + (0.0 if b is None else b)).softmax(1)
    t = (1 - problem.loss.smoothing) * dense.targets + problem.loss.smoothing / problem.classes
    G = (n / problem.num_samples)[:, None] * (p - t)
    norm = torch.linalg.matrix_norm(torch.where(n > 0, n.rsqrt(), 0.0)[:, None] * G, 2)
    theta = min(1.0, float(math.sqrt(problem.lambda_w * problem.lambda_h) / norm))
    q = theta * p + (1 - theta) * t
    bound = (n @ torch.special.entr(q).sum(1)) / problem.num_samples
    if problem.bias == PENALISED:
        bound = bound - (theta * G.sum(0)).square().sum() / (2 * problem.lambda_b)
    return float(bound)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=7).filter(any),
    log_mu=st.floats(-14, 1),
    bias=st.sampled_from([*BIASES, (PENALISED, 1e-4), (PENALISED, 50.0)]),
    extra=st.integers(-3, 2),
)
def test_squared_error_points_are_critical(counts, log_mu, bias, extra):
    lam = (math.exp(log_mu), 2 * math.exp(log_mu))
    problem = make(
        "mse",
        counts=counts,
        dim=max(1, len(counts) + extra),
        lam=lam,
        bias=bias[0],
        lambda_b=bias[1],
    )
    form = theory.closed_form(problem)
    if form is None:
        assert problem.dim < len(counts)
        assert bias[0] != NONE
        return
    check_point(problem, form, 1e-7)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(2, 6),
    samples=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    log_mu=st.floats(-14, 1),
)
def test_pick_all_points_are_critical(classes, samples, log_mu):
    per_set = {size: n for size, n in enumerate(samples, 1) if n > 0 and size < classes}
    if not per_set:
        return
    lam = (math.exp(log_mu), math.exp(log_mu))
    problem = make("pick-all", counts=(1,) * classes, sets=sets_of(classes, per_set), lam=lam)
    check_point(problem, theory.closed_form(problem), 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 50),
    per_class=st.integers(1, 100),
    log_mu=st.floats(-45, 0),
    loss=st.sampled_from(
        [("ce", 0.0, 0.0), ("ce", 0.1, 0.0), ("focal", 0.0, 2.0), ("focal", 0.0, 0.5)]
    ),
)
def test_balanced_softmax_value_is_the_least_over_gaps(classes, per_class, log_mu, loss):
    name, smoothing, gamma = loss
    lam = (math.exp(log_mu), math.exp(log_mu))
    form = theory.closed_form(
        make(name, counts=(per_class,) * classes, lam=lam, smoothing=smoothing, gamma=gamma)
    )
    price = (classes - 1) * math.sqrt(per_class) * math.exp(log_mu)

    def value(gap):
        off = (classes - 1) * math.exp(-gap)
        focal = (off / (1 + off)) ** gamma
        return focal * math.log1p(off) + smoothing * (classes - 1) / classes * gap + price * gap

    found = theory.contrastive_minimum(lambda a: value(a) - price * a, classes, per_class, *lam)
    assert found[0] == pytest.approx(form.value, rel=1e-11)
    assert form.value <= min(value(gap) for gap in np.linspace(0, 60, 400)) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("classes", "kappa"), [(200, 1.125), (1000, 1.04), (1000, 1.1), (10**6, 1.03)]
)
def test_a_focal_gap_far_out_is_found_though_the_first_unit_does_not_pay(classes, kappa):
    """With many classes the pull is below its price at first and above it later: the simplex was
    taken for collapsed.
    """
    lam, price = kappa / classes, (classes - 1) * kappa / classes

    def loss(gap):
        off = (classes - 1) * math.exp(-gap)
        return (off / (1 + off)) ** 3 * math.log1p(off)

    gaps = np.linspace(0, 40, 4001)
    least = min(loss(gap) + price * gap for gap in gaps)
    assert least < loss(0.0) * (1 - 1e-3)
    for found in (
        theory.focal_minimum(classes, 1, lam, lam, 3.0),
        theory.contrastive_minimum(loss, classes, 1, lam, lam)[0],
    ):
        assert least * (1 - 1e-5) < found <= least


def test_smoothing_zero_gamma_zero_and_single_labels_are_cross_entropy():
    plain = theory.ce_minimum(7, 3, 1e-3, 1e-2)
    assert theory.focal_minimum(7, 3, 1e-3, 1e-2, 0.0) == pytest.approx(plain, rel=1e-13)
    assert theory.pick_all_minimum(7, {1: 3}, 1e-3, 1e-2).value == pytest.approx(plain, rel=1e-13)
    assert theory.two_group_ce((3, 4), (3, 3), 1e-3, 1e-2).value == pytest.approx(plain, rel=1e-13)
    assert theory.two_group_ce((3, 4), (3, 3), 1e-3, 1e-2, 0.0).value == pytest.approx(
        plain, rel=1e-13
    )


def test_bias_penalty_joins_its_limits():
    lam = (1e-2, 2e-2)
    for counts in ((5, 5, 5, 5), (9, 4, 4, 1)):
        free, nearly_free = (theory.biased_mse_minimum(counts, *lam, x) for x in (0.0, 1e-12))
        assert nearly_free == pytest.approx(free, rel=1e-9)
        assert theory.biased_mse_minimum(counts, *lam, 1e12) == pytest.approx(
            theory.mse_minimum(counts, 4, *lam), rel=1e-9
        )
    for lambda_b in (0.0, 1e-3, 0.1, 1.0, 1e3):
        balanced = theory.balanced_mse_minimum(4, 5, 4, *lam, lambda_b)
        assert theory.biased_mse_minimum((5,) * 4, *lam, lambda_b) == pytest.approx(
            balanced, rel=1e-13
        )
    assert theory.balanced_mse_minimum(4, 5, 4, *lam) == pytest.approx(
        theory.mse_minimum((5,) * 4, 4, *lam), rel=1e-14
    )


@pytest.mark.parametrize(
    ("value", "expected", "tolerance"),
    [
        (lambda: theory.ce_minimum(1000, 1, 1e-6, 1e-6), 0.0148001958806561, 1e-13),
        (lambda: theory.ce_minimum(10, 100, 5e-4, 1e-4), 0.142741976332, 1e-11),
        (lambda: theory.ce_gap(10, 100, 5e-4, 1e-4), 6.082706452, 1e-10),
        (lambda: theory.ce_minimum(10, 100, 5e-4, 5e-4), 0.282396242764, 1e-11),
        (lambda: theory.mse_minimum([50] * 4, 20, 0.005, 0.005), 0.131421356237310, 1e-11),
        (
            lambda: theory.balanced_mse_minimum(4, 50, 20, 0.005, 0.005, 0.0),
            0.098566017177983,
            1e-11,
        ),
        (lambda: theory.mse_minimum([50] * 4, 20, 0.005, 0.001), 0.061245553203368, 1e-11),
        (
            lambda: theory.balanced_mse_minimum(4, 50, 20, 0.005, 0.001, 0.0),
            0.045934164902526,
            1e-11,
        ),
        (
            lambda: theory.mse_minimum([200, 100, 50, 50], 2048, 5e-4, 5e-4),
            0.018942135623731,
            1e-11,
        ),
        (lambda: theory.normalised_ce_minimum(10, 0.001, 9), 2.30158514857, 1e-11),
        (lambda: theory.normalised_ce_minimum(10, 1.0, 9), 1.37693492045, 1e-11),
        (lambda: theory.normalised_ce_minimum(10, 5.0, 9), 0.0342016785132, 1e-11),
        (lambda: theory.normalised_ce_minimum(10, 100.0, 9), 5.0038e-48, 1e-5),
        (lambda: theory.layer_peeled_collapse_ratio((3, 7), 1.0, 5.0), 245.4969, 3e-7),
        (lambda: theory.layer_peeled_collapse_ratio((5, 5), 1.0, 5.0), 12.19245, 3e-7),
        (lambda: theory.layer_peeled_collapse_ratio((7, 3), 5.0, 1.0), 4.00047, 1e-6),
        (lambda: theory.collapse_penalty(100, 3000), 1 / 300, 1e-15),
        (lambda: theory.collapse_penalty(100, 2200), 1 / 220, 1e-15),
        (lambda: theory.majority_count_at_collapse((5, 5), 100, 0.005, 0.005), 300, 1e-13),
        (lambda: theory.majority_count_at_collapse((3, 7), 100, 0.005, 0.005), 1300 / 3, 1e-13),
        (
            lambda: theory.collapsed_ce([5000] * 3 + [4000] * 3 + [3000] * 4, 0.005, 0.005, 0.02)[
                0
            ],
            2.283748788,
            2e-10,
        ),
    ],
)
def test_reference_numbers(value, expected, tolerance):
    assert value() == pytest.approx(expected, rel=tolerance)


def test_cosines_between_minority_classes_of_the_layer_peeled_model():
    expected = [-0.11, -0.10, -0.09, -0.07, -0.05, -0.02, 0.02, 0.07, 0.15, 0.28, 0.52, 1.0]
    found = [
        theory.layer_peeled_two_groups((5, 5), 10 ** (j / 10), 1.0, 5.0).cosine(1)
        for j in range(12)
    ]
    assert found == pytest.approx(expected, abs=6e-3)
    balanced = theory.layer_peeled_two_groups((5, 5), 1.0, 1.0, 5.0)
    assert balanced.value / 10 == pytest.approx(
        theory.layer_peeled_ce_minimum(10, 1.0, 5.0), rel=1e-12
    )


def test_tag_average_coefficients():
    expected = [0.8885, 0.9182, 0.9356, 0.9469, 0.9549]
    for mu, coefficient in zip((1e-4, 1e-5, 1e-6, 1e-7, 1e-8), expected, strict=True):
        slopes = theory.pick_all_minimum(10, {1: 3100, 2: 200}, mu, mu).slopes
        assert slopes[2] / slopes[1] == pytest.approx(coefficient, abs=6e-5)


def test_features_of_a_set_are_the_scaled_sum_of_its_labels():
    problem = make("pick-all", counts=(1,) * 4, sets=sets_of(4, {1: 5, 2: 2}))
    form = theory.closed_form(problem)
    _, H, _ = form.point()
    ratio = form.logits.slopes[2] / form.logits.slopes[1]
    assert torch.allclose(H[4], ratio * (H[0] + H[1]), atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", BIASES)
def test_minority_collapses_exactly_at_its_threshold(bias, smoothing):
    limit = theory.collapse_penalty(100, 3000, smoothing)
    lambda_b = {NONE: theory.NO_BIAS}.get(bias[0], bias[1])
    for factor, collapsed in ((1 - 1e-6, False), (1.0, True), (1 + 1e-6, True)):
        mu = factor * limit
        best = theory.two_group_ce((5, 5), (500, 100), mu, mu, lambda_b, smoothing)
        assert (best.within[1] == 0) == collapsed
        assert (best.cosine(1) > 1 - 1e-12) == collapsed
        flags = theory.collapsed_classes([500] * 5 + [100] * 5, mu, mu, smoothing)
        assert flags.tolist() == [False] * 5 + [collapsed] * 5


def test_cosines_of_two_groups_are_those_of_the_point():
    W, _, _ = theory.closed_form(make(counts=(9, 2, 9, 2, 2))).point()
    best = theory.two_group_ce((3, 2), (2, 9), 1e-2, 1e-2)
    unit = torch.nn.functional.normalize(W)
    assert float(unit[1] @ unit[3]) == pytest.approx(best.cosine(0), rel=1e-12)
    assert float(unit[0] @ unit[2]) == pytest.approx(best.cosine(1), rel=1e-12)


@pytest.mark.parametrize("factor", [1 - 1e-4, 1 + 1e-4])
@pytest.mark.parametrize("name", ["ce", "mse", "pick-all"])
def test_everything_collapses_beyond_level_one(name, factor):
    lam = factor / (4 * math.sqrt(9))
    assert theory.collapse_level(4, 9, lam, lam) == pytest.approx(factor, rel=1e-14)
    sets = sets_of(4, {1: 9}) if name == "pick-all" else None
    problem = make(name, counts=(9,) * 4, lam=(lam, lam), sets=sets)
    form = theory.closed_form(problem)
    assert form.collapsed == (factor > 1)
    check_point(problem, form, 1e-7)
    zero = 0.5 if name == "mse" else math.log(4)
    assert (form.value == zero) if factor > 1 else (form.value < zero)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_squared_error_means_leave_the_simplex_beyond_the_bias_threshold(factor):
    limit = theory.simplex_bias_penalty(4, 9, 2e-2, 2e-2)
    problem = make(
        "mse", counts=(9,) * 4, lam=(2e-2, 2e-2), bias=PENALISED, lambda_b=factor * limit
    )
    W, _, _ = theory.closed_form(problem).point()
    assert (W.sum(0).norm() > 1e-6) == (factor > 1)
    assert theory.simplex_bias_penalty(4, 9, 1.0, 1.0) == math.inf


@pytest.mark.parametrize(("counts", "bias"), [((30, 12, 30, 5), b) for b in BIASES])
def test_collapsed_cross_entropy_ends_where_random_starts_leave_zero(counts, bias):
    def collapsed(mu):
        return (
            theory.closed_form(make(counts=counts, lam=(mu, mu), bias=bias[0], lambda_b=bias[1]))
            is not None
        )

    low, high = 1e-3, 1.0
    assert collapsed(high)
    assert not collapsed(low)
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if collapsed(middle) else (middle, high)
    above = make(counts=counts, lam=(high, high), bias=bias[0], lambda_b=bias[1])
    form = theory.closed_form(above)
    check_point(above, form)
    assert Dense(above).random_minimum(0, 0.1) == pytest.approx(form.value, rel=1e-9)
    below = make(counts=counts, lam=(0.97 * low, 0.97 * low), bias=bias[0], lambda_b=bias[1])
    assert Dense(below).random_minimum(0, 0.1) < form.value * (
        1 - 1e-6
    )  # the collapsed value, which has no mu in it


def test_nonnegative_features():
    problem = make(counts=(6, 3, 3, 1), lam=(1e-2, 3e-2))
    expected = theory.nonnegative_ce_minimum(problem.counts, problem.lambda_w, problem.lambda_h)
    dense = Dense(problem)

    def value_and_grad(x):
        flat = torch.from_numpy(x).requires_grad_(True)
        value = dense(flat[:16].reshape(4, 4), flat[16:].reshape(4, 4), None)
        return value.item(), torch.autograd.grad(value, flat)[0].numpy()

    bounds = [(None, None)] * 16 + [(0, None)] * 16
    options = {"maxiter": 5000, "maxfun": 9000, "ftol": 1e-16, "gtol": 1e-10}
    starts = np.abs(np.random.default_rng(0).standard_normal((8, 32)))
    found = [
        minimize(value_and_grad, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun
        for x in starts
    ]
    assert min(found) == pytest.approx(expected, rel=1e-9)
    assert expected > lower_bound(problem, theory.closed_form(make(counts=(3, 3, 3, 3))).point())
    assert theory.nonnegative_ce_minimum([4, 4, 0], 9.0, 9.0) == pytest.approx(
        math.log(3), rel=1e-15
    )


@pytest.mark.parametrize(
    ("classes", "dim", "scale", "smoothing"),
    [(4, 3, 2.0, 0.0), (3, 3, 30.0, 0.2), (4, 5, 1.0, 0.1)],
)
def test_normalised_features(classes, dim, scale, smoothing):
    targets = (1 - smoothing) * torch.eye(classes, dtype=torch.float64) + smoothing / classes

    def value_and_grad(x):
        flat = torch.from_numpy(x).requires_grad_(True)
        W, H = torch.nn.functional.normalize(flat.reshape(2, classes, dim), dim=2)
        value = -(targets * (scale * H @ W.T).log_softmax(1)).sum() / classes
        return value.item(), torch.autograd.grad(value, flat)[0].numpy()

    rng = np.random.default_rng(1)
    options = {"maxiter": 4000, "maxfun": 8000, "ftol": 1e-16, "gtol": 1e-10}
    starts = rng.standard_normal((6, 2 * classes * dim))
    found = min(
        minimize(value_and_grad, x, jac=True, method="L-BFGS-B", options=options).fun
        for x in starts
    )
    assert theory.normalised_ce_minimum(classes, scale, dim, smoothing) == pytest.approx(
        found, rel=1e-9
    )


@pytest.mark.parametrize(("classes", "margin"), [(4, 0.3), (6, 0.9), (3, 1.2)])
def test_margins_in_the_angle(classes, margin):
    """The simplex has the value, and nothing near it, at random or on the way down from there lies
    below.
    """
    scale, dim = 5.0, classes
    generator = torch.Generator().manual_seed(0)

    def value(W, H):
        W, H = (torch.nn.functional.normalize(x, dim=1) for x in (W, H))
        cosine = W @ H.T
        own = cosine.diagonal().clamp(-1 + 1e-12, 1 - 1e-12).acos() + margin
        target = torch.where(own < math.pi, own.cos(), -1.0)
        z = scale * (cosine.T - torch.diag_embed(cosine.diagonal()) + torch.diag_embed(target))
        return torch.nn.functional.cross_entropy(z, torch.arange(classes))

    expected = theory.angular_ce_minimum(classes, scale, dim, margin)
    frame = theory.simplex_frame(classes, dim)
    assert float(value(frame, frame)) == pytest.approx(
        expected, rel=1e-5
    )  # the clamp of an angle of zero
    for spread in (1e-6, 1e-2, 0.3, 10.0):
        for _ in range(20):
            noise = spread * torch.randn(2, classes, dim, generator=generator, dtype=torch.float64)
            assert float(value(frame + noise[0], frame + noise[1])) >= expected * (1 - 1e-12)
    x = torch.randn(2, classes, dim, generator=generator, dtype=torch.float64).requires_grad_()
    for rate in (0.05, 0.005, 0.0005):  # ever smaller steps about the kink
        steps = torch.optim.Adam([x], lr=rate)
        for _ in range(150):
            steps.zero_grad()
            value(*x).backward()
            steps.step()
    assert expected * (1 - 1e-12) <= float(value(*x).detach()) <= expected * 1.5


def test_formulas_say_where_they_do_not_apply():
    assert theory.normalised_ce_minimum(4, 1.0, 2) is None
    assert theory.normalised_ce_minimum(3, 10.0, 2, 0.2) is None
    assert theory.angular_ce_minimum(4, 1.0, 2, 0.3) is None
    assert theory.angular_ce_minimum(10, 1.0, 9, 1.2) is None
    for name in ("ce", "focal", "pick-all"):
        assert theory.closed_form(make(name, counts=(5,) * 4, dim=2, lam=(1e-3, 1e-3))) is None
    assert theory.closed_form(make(counts=(5, 4, 3))) is None
    assert theory.closed_form(make("focal", counts=(5, 5, 3), gamma=2.0)) is None
    assert (
        theory.closed_form(make("mse", counts=(5, 4, 3), dim=1, bias=PENALISED, lambda_b=0.1))
        is None
    )
    assert (
        theory.closed_form(make("pick-all", counts=(1,) * 3, sets=sets_of(3, {2: 3})[:-1])) is None
    )
    assert theory.closed_form(make(counts=(9, 1, 9, 1), dim=2)) is None
    for change in ({"freeze": "w"}, {"freeze": "h", "lambda_h": 0.0}):
        assert theory.closed_form(replace(make(), **change)) is None


@pytest.mark.parametrize("mu", [1e-3, 3e-2, 0.2, 2.0, 20.0])
@pytest.mark.parametrize(("weight", "target"), [(1.0, 15.0), (5.0, 1.0)])
def test_rescaled_squared_error(mu, weight, target):
    s, K = math.sqrt(3) * mu, 4

    def value(x):
        fit = (weight * (x[0] + x[1] - target) ** 2 + (K - 1) * x[1] ** 2) / K
        return fit + s * ((K - 1) * abs(x[0]) + abs(x[0] + K * x[1]))

    expected = theory.rescaled_mse_minimum(K, 3, mu, mu, weight, target)
    starts = [(target, 0.0), (0.0, 0.0), (target, -target / K)]
    options = {"xatol": 1e-11, "fatol": 1e-15, "maxiter": 4000}
    found = min(
        minimize(value, start, method="Nelder-Mead", options=options).fun for start in starts
    )
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected <= found * (1 + 1e-14)


def test_seli_spectrum_of_step_imbalance():
    left, sigma, right = theory.seli_spectrum([100, 100, 10, 10])
    assert sigma.tolist() == pytest.approx([10.0, math.sqrt(55), math.sqrt(10)], rel=1e-13)
    gram = left * sigma @ left.T
    assert float(gram[0, 1] / gram[0, 0]) == pytest.approx(-0.4590, abs=1e-4)
    assert torch.allclose(right.T @ right, torch.eye(3, dtype=torch.float64))


@given(st.integers(1, 9), st.integers(1, 11))
def test_simplex_frame(classes, dim):
    frame = theory.simplex_frame(classes, dim)
    rank = min(dim, classes - 1)
    expected = torch.diag((torch.arange(dim) < rank).double())
    assert torch.allclose(frame.T @ frame, expected, atol=1e-13)
    assert torch.allclose(frame.sum(0), torch.zeros(dim, dtype=torch.float64), atol=1e-13)


def test_tiny_penalties_keep_relative_accuracy():
    s = 1e-30
    assert theory.ce_minimum(1000, 1, s, s) == pytest.approx(999 * s * (1 - math.log(s)), rel=1e-13)
    two = theory.two_group_ce((400, 600), (1, 1), s, s).value
    assert two == pytest.approx(theory.ce_minimum(1000, 1, s, s), rel=1e-12)


@pytest.mark.parametrize("bias", [NONE, FREE])
def test_many_classes_need_no_square_matrix(bias):
    problem = make("mse", counts=(2,) * 200_000, dim=4, lam=(1e-7, 1e-7), bias=bias)
    form = theory.closed_form(problem)
    W, H, _ = form.point()
    assert W.shape == H.shape == (200_000, 4)
    assert 0.499 < form.value < 0.5


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: theory.ce_minimum(1, 3, 1e-3, 1e-3), "classes=1"),
        (lambda: theory.ce_minimum(3, 0, 1e-3, 1e-3), "per_class=0"),
        (lambda: theory.ce_minimum(3, 3, 0.0, 1e-3), "lambda_w=0.0"),
        (lambda: theory.ce_minimum(3, 3, 1e-3, math.nan), "lambda_h=nan"),
        (lambda: theory.ce_minimum(3, 3, 1e-3, 1e-3, 1.0), "smoothing=1.0"),
        (lambda: theory.focal_minimum(3, 3, 1e-3, 1e-3, -1.0), "gamma=-1.0"),
        (lambda: theory.mse_minimum([3], 2, 1e-3, 1e-3), "counts"),
        (lambda: theory.mse_minimum([3, -1], 2, 1e-3, 1e-3), "counts"),
        (lambda: theory.mse_minimum([3, 1], 0, 1e-3, 1e-3), "dim=0"),
        (lambda: theory.biased_mse_minimum([3, 1], 1e-3, 1e-3, -1.0), "lambda_b=-1.0"),
        (lambda: theory.two_group_ce((2, 2), (0, 0), 1e-3, 1e-3), "per_class"),
        (lambda: theory.two_group_ce((2, 2), (5, 0), 1e-3, 1e-3, 0.0), "free bias"),
        (lambda: theory.pick_all_minimum(4, {5: 1}, 1e-3, 1e-3), "size 5"),
        (lambda: theory.pick_all_minimum(4, {}, 1e-3, 1e-3), "per_set"),
        (lambda: theory.layer_peeled_two_groups((2, 2), 0.0, 1.0, 1.0), "ratio=0.0"),
    ],
)
def test_bad_numbers_are_named(call, named):
    with pytest.raises(InputError, match=named):
        call()


def test_takes_the_library_problem():
    from ufm_fast.targets import TargetSets

    form = theory.closed_form(Problem(classes=4, per_class=3, dim=4, lambda_w=1e-2, lambda_h=1e-2))
    assert form.value == theory.ce_minimum(4, 3, 1e-2, 1e-2)
    pairs = sets_of(4, {1: 1, 2: 1}) * 2  # each set given twice, to be merged
    pointer = np.cumsum([0] + [len(members) for members, _ in pairs])
    sets = TargetSets.create(pointer, [k for members, _ in pairs for k in members], 4)
    problem = Problem(classes=4, dim=4, loss="pick-all", target_sets=sets, bias="free")
    form = theory.closed_form(problem)
    assert (
        form.value
        == theory.pick_all_minimum(4, {1: 2, 2: 2}, problem.lambda_w, problem.lambda_h).value
    )
    assert form.point()[1].shape == (10, 4)
