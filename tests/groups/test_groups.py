"""Grouped classes: the reduction to G + G^2 numbers against the full solver, and its geometry
against the lifted point.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ufm_fast import InputError, InputTypeError, Objective, Problem, solve
from ufm_fast.groups import GROUP_METRICS, ClassGroups, group_metrics, group_minimum
from ufm_fast.losses import CrossEntropy, Focal, PickAll, SquaredError
from ufm_fast.metrics import METRICS, collect
from ufm_fast.theory import collapsed_classes, seli_spectrum

LOSSES = (CrossEntropy(), CrossEntropy(smoothing=0.1), SquaredError())
BIASES = {"none": math.inf, "penalised": 0.02, "free": 0.0}


def power_law(classes: int, most: int, distinct: int) -> ClassGroups:
    """K_g in proportion to 1/n_g."""
    counts = np.unique(np.geomspace(1, most, distinct).round().astype(int))
    sizes = np.maximum(1, (classes / counts / (1 / counts).sum()).round().astype(int))
    return ClassGroups.of_pairs(zip(sizes.tolist(), counts.tolist(), strict=True))


def full_problem(groups: ClassGroups, dim: int, loss, mu: float, bias: str) -> Problem:
    lambda_b = BIASES[bias] if bias == "penalised" else 0.0
    return Problem(
        dim=dim,
        counts=groups.expanded(),
        loss=loss,
        lambda_w=3 * mu,
        lambda_h=mu / 3,
        lambda_b=lambda_b,
        bias=bias,
    )


def grouped(groups: ClassGroups, loss, mu: float, bias: str):
    return group_minimum(groups, 3 * mu, mu / 3, loss=loss, lambda_b=BIASES[bias])


def random_groups(generator: np.random.Generator, empty: bool) -> ClassGroups:
    number = int(generator.integers(1, 7))
    counts = generator.choice(np.arange(0 if empty else 1, 40), number, replace=False)
    counts[0] = max(counts[0], 1)
    sizes = generator.integers(1, 60 // number, number)
    sizes[0] = max(sizes[0], 2)
    return ClassGroups.of_pairs(zip(sizes.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("loss", LOSSES, ids=["ce", "smoothing", "mse"])
def test_the_minimum_is_the_full_solvers_and_its_certificate_agrees(loss, bias):
    generator = np.random.default_rng([len(bias), int(loss.smoothing * 10), len(loss.name)])
    for exponent in (-3.0, -0.4, -0.1):  # nothing, some groups, nearly all of them collapsed
        groups = random_groups(generator, empty=bias != "free" or loss != CrossEntropy())
        mu = 10**exponent * math.sqrt(groups.counts.max()) / groups.samples
        best = grouped(groups, loss, mu, bias)
        full = solve(full_problem(groups, groups.classes + 1, loss, mu, bias), metrics=False)
        assert best.converged
        assert best.certificate.relative_gap <= 1e-9
        assert best.value == pytest.approx(full.value, rel=1e-9)
        assert best.certificate.lower_bound <= full.value * (1 + 1e-12)
        assert full.certificate.lower_bound <= best.value * (1 + 1e-12)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("loss", LOSSES, ids=["ce", "smoothing", "mse"])
def test_geometry_is_that_of_the_lifted_point(loss, bias):
    empty = 0 if loss.smoothing or bias != "free" or loss.name == "mse" else 7
    groups = ClassGroups.of_pairs([(40, 1), (58, 5), (1, 9), (98, 30), (2, empty), (1, 5)])
    mu = (
        1.2 * math.sqrt(1 if loss.name == "mse" else 5) / groups.samples
    )  # the rarer groups have collapsed
    best = grouped(groups, loss, mu, bias)
    counts = groups.expanded()
    assert best.collapsed.any()
    assert best.collapsed.tolist() == ((mu >= best.thresholds) & (groups.sizes > 1)).tolist()
    dim = best.rank + 1
    W, means, b = best.lifted(dim)
    present = torch.nonzero(counts).reshape(-1)
    problem = full_problem(groups, dim, loss, mu, bias)
    objective = Objective(problem)
    at = objective.value_and_grad(objective.from_model(W, means[present], b))
    assert at.value == pytest.approx(best.value, rel=1e-12)
    assert at.data_value == pytest.approx(best.data_value, rel=1e-11)
    wanted = collect(
        means[present],
        W,
        present,
        b,
        counts=counts[present],
        lambda_w=3 * mu,
        lambda_h=mu / 3,
        pairwise="exact",
    )
    found = group_metrics(best)
    assert set(found) == {*METRICS, "seli_classifier", "seli_means"}
    for name, value in wanted.items():
        if name != "cdnv":  # 0/0 where class means coincide, of rounding when lifted
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name
    group = np.searchsorted(groups.counts, counts.numpy())
    Z = means @ W.T + (0.0 if b is None else b)
    logits = torch.from_numpy(best.logits)[group][:, group]
    logits[range(len(counts)), range(len(counts))] = torch.from_numpy(best.target_logits)[group]
    torch.testing.assert_close(Z[present], logits[present], rtol=1e-11, atol=1e-11)
    losses = loss.dense(Z[present], present)
    torch.testing.assert_close(
        losses, torch.from_numpy(best.losses)[group][present], rtol=1e-10, atol=1e-12
    )
    others = Z.clone()
    others[range(len(counts)), range(len(counts))] = -math.inf
    margins = Z.diagonal() - others.max(1).values
    torch.testing.assert_close(
        margins[present], torch.from_numpy(best.margins)[group][present], rtol=1e-9, atol=1e-11
    )
    chosen = [0, 3, 41, 199, 150, 41, 98, 99]
    rows, features = best.class_vectors(chosen)
    for mine, other, whole, second in (
        (rows, rows, W, W),
        (rows, features, W, means),
        (features, features, means, means),
    ):
        torch.testing.assert_close(
            mine @ other.T, whole[chosen] @ second[chosen].T, rtol=1e-9, atol=1e-11
        )


def test_distances_to_seli_are_those_of_its_gram_matrices():
    groups = ClassGroups.of_pairs([(3, 10), (4, 1), (2, 4)])
    best = group_minimum(groups, 1e-6, 1e-6)
    counts = groups.expanded().double()
    V, sigma, U = seli_spectrum(counts)
    W, means, _ = best.lifted(8)
    scaled = means * counts.sqrt()[:, None]
    for name, rows, limit in (
        ("seli_classifier", W, (V * sigma) @ V.T),
        ("seli_means", scaled, (U * sigma) @ U.T),
    ):
        gram = rows @ rows.T
        distance = torch.linalg.matrix_norm(gram / gram.norm() - limit / limit.norm())
        assert group_metrics(best)[name] == pytest.approx(float(distance), rel=1e-9)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("classes", "distinct", "part"), [(10**6, 30, 1e-6), (10**9, 40, 0.3)])
def test_millions_of_classes_are_certified(classes, distinct, part, bias):
    groups = power_law(classes, 1000, distinct)
    mu = part * math.sqrt(1000) / groups.samples
    best = grouped(groups, CrossEntropy(), mu, bias)
    assert best.certificate.kind == "exact"
    assert best.certificate.relative_gap <= 1e-8
    assert best.steps < 60
    norms = group_metrics(best)
    assert all(
        math.isfinite(value) for name, value in norms.items() if name != "cdnv" or part < 1e-3
    )


def test_logits_that_overflow_on_the_way_leave_numbers():
    best = group_minimum(ClassGroups.of_pairs([(10, 500), (90, 50), (900_000, 5)]), 1e-8, 1e-8)
    assert best.certificate.relative_gap <= 1e-9
    assert best.rank == 900_099


def test_a_group_at_its_threshold_has_no_negative_gap():
    groups = ClassGroups.of_pairs([(30, 9), (5, 4), (7, 1)])
    best = group_minimum(groups, 2 / groups.samples * (1 - 1e-16), 2 / groups.samples)
    assert (best.gaps >= 0).all()
    assert math.isfinite(group_metrics(best)["nc2_classifier"])


def test_groups_collapse_at_their_thresholds():
    groups = ClassGroups.of_pairs([(5, 500), (5, 100), (3, 1)])
    for smoothing in (0.0, 0.2):
        level = (1 - smoothing) * math.sqrt(100) / groups.samples
        for factor, collapsed in (
            (1 - 1e-6, [True, False, False]),
            (1 + 1e-6, [True, True, False]),
        ):
            mu = factor * level
            best = group_minimum(groups, mu, mu, loss=CrossEntropy(smoothing=smoothing))
            assert best.collapsed.tolist() == collapsed
            of_classes = collapsed_classes(groups.expanded(), mu, mu, smoothing)
            assert best.collapsed[groups.locate(range(13))[0]].tolist() == of_classes.tolist()
            cosine = best.class_vectors([5, 6])[0]
            cosine = torch.nn.functional.cosine_similarity(cosine[:1], cosine[1:])
            assert bool(cosine >= 1 - 1e-12) == collapsed[1]


def test_data_come_as_pairs_or_counts_in_any_order():
    groups = ClassGroups.of_counts([5, 5, 1, 9, 5, 0])
    assert groups.runs == ((2, 5), (1, 1), (1, 9), (1, 5), (1, 0))
    assert groups.counts.tolist() == [0, 1, 5, 9]
    assert groups.sizes.tolist() == [1, 1, 3, 1]
    assert groups.expanded().tolist() == [5, 5, 1, 9, 5, 0]
    group, place = groups.locate(range(6))
    assert group.tolist() == [2, 2, 1, 3, 2, 0]
    assert place.tolist() == [0, 1, 0, 0, 2, 0]
    same = group_minimum(ClassGroups.of_pairs([(3, 5), (1, 0), (1, 1), (1, 9)]), 1e-2, 1e-2)
    assert group_minimum(groups, 1e-2, 1e-2).value == same.value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassGroups.of_pairs([(1, 5)]), "at least 2 classes"),
        (lambda: ClassGroups.of_pairs([(5, 0)]), "a sample"),
        (lambda: ClassGroups.of_pairs([(0, 5)]), "groups: classes"),
        (lambda: ClassGroups.of_pairs([(2**40, 2**20)]), "at most"),
        (
            lambda: group_minimum(ClassGroups.of_pairs([(9, 5)]), 1e-3, 1e-3).lifted(7),
            "dim must be at least 8",
        ),
        (
            lambda: group_minimum(ClassGroups.of_pairs([(9, 5)]), 1e-3, 1e-3).class_vectors([9]),
            r"\[0, 9\)",
        ),
        (
            lambda: group_minimum(ClassGroups.of_pairs([(9, 5)]), 1e-3, 1e-3, loss=Focal()),
            "not convex",
        ),
        (
            lambda: group_minimum(ClassGroups.of_pairs([(9, 5)]), 1e-3, 1e-3, loss=PickAll()),
            "sets of classes",
        ),
        (
            lambda: group_minimum(ClassGroups.of_pairs([(9, 5), (1, 0)]), 1e-3, 1e-3, lambda_b=0.0),
            "free bias",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_pairs_of_another_kind_are_refused():
    with pytest.raises(InputTypeError, match="pairs"):
        ClassGroups.of_pairs(["12"])


def test_every_metric_has_its_grouped_form():
    assert set(METRICS) <= set(GROUP_METRICS)
