"""Groups of collapsed classes, cosines by groups and distances to SELI, by hand and against the
two-group form.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ufm_fast import Problem, solve
from ufm_fast.errors import InputError
from ufm_fast.groups import ClassGroups, group_metrics, group_minimum
from ufm_fast.measure import measure
from ufm_fast.metrics import collapsed_groups, group_cosines
from ufm_fast.point import Point
from ufm_fast.theory import seli_distance, seli_logit_distance, two_group_ce

COUNTS = torch.tensor([10, 10, 1, 1])


def test_groups_of_equal_rows():
    W = torch.tensor(
        [[1.0, 0], [0, 2], [1 + 1e-6, 0], [0, 2 - 1e-7], [1.0, 1e-4]], dtype=torch.float64
    )
    assert collapsed_groups(W).tolist() == [0, 1, 0, 1, 2]
    assert collapsed_groups(W, 1e-3).tolist() == [0, 1, 0, 1, 0]
    assert collapsed_groups(torch.zeros(3, 2)).tolist() == [0, 0, 0]


def test_cosines_by_groups_by_hand():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    W[5] = 1e-9
    found = group_cosines(W, torch.tensor([0, 0, 0, 1, 1, 2]))
    cosine = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=2)
    assert float(found[0, 0]) == pytest.approx(
        float(cosine[[0, 0, 1], [1, 2, 2]].mean()), rel=1e-13
    )
    assert float(found[0, 1]) == pytest.approx(float(cosine[:3, 3:5].mean()), rel=1e-13)
    assert float(found[1, 1]) == pytest.approx(float(cosine[3, 4]), rel=1e-12)
    assert bool(found[2].isnan().all())
    with pytest.raises(InputError, match="groups must have one entry"):
        group_cosines(W, torch.tensor([0]))


@pytest.mark.parametrize(
    ("level", "together", "cosine"), [(0.0033, False, 0.59597), (0.0034, True, 1.0)]
)
def test_minority_classes_collapse(level, together, cosine):
    counts = torch.tensor([500] * 5 + [100] * 5)
    problem = Problem(
        loss="ce",
        counts=counts,
        dim=10,
        bias="penalised",
        lambda_w=10 * level,
        lambda_h=level / 10,
        lambda_b=0.02,
    )
    W = solve(problem, start="normal", metrics=False, certificate=False).point.W
    assert len(set(collapsed_groups(W)[5:].tolist())) == (1 if together else 5)
    assert float(group_cosines(W, counts.unique(return_inverse=True)[1])[0, 0]) == pytest.approx(
        cosine, abs=1e-5
    )


@pytest.mark.parametrize(("penalty", "cosine"), [(1e-3, -0.5298), (1e-5, -0.5018), (1e-7, -0.4897)])
def test_the_way_to_seli(penalty, cosine):
    problem = Problem(loss="ce", counts=COUNTS, dim=8, lambda_w=penalty, lambda_h=penalty)
    point = solve(problem, start="normal", metrics=False, certificate=False).point
    majority = float(group_cosines(point.W, torch.tensor([1, 1, 0, 0]))[1, 1])
    assert majority == pytest.approx(cosine, abs=5e-5)
    assert majority == pytest.approx(
        two_group_ce((2, 2), (10, 1), penalty, penalty).cosine(0), abs=1e-6
    )
    grouped = group_metrics(group_minimum(ClassGroups.of_counts(COUNTS), penalty, penalty))
    assert seli_distance(point.W, COUNTS) == pytest.approx(grouped["seli_classifier"], abs=1e-5)
    found = measure(problem, problem.rows(), point)
    assert found["cosine_majority"] == pytest.approx(majority, rel=1e-12)
    assert found["cosine_minority"] == pytest.approx(
        two_group_ce((2, 2), (10, 1), penalty, penalty).cosine(1), abs=1e-6
    )
    assert found["seli_classifier"] == pytest.approx(seli_distance(point.W, COUNTS), rel=1e-12)
    assert found["seli_logits"] == pytest.approx(
        seli_logit_distance(point.W, point.H, torch.arange(4), COUNTS), rel=1e-12
    )
    X = COUNTS.double().sqrt()[:, None] * (point.H @ point.W.T)
    limit = COUNTS.double().sqrt()[:, None] * (torch.eye(4, dtype=torch.float64) - 0.25)
    expected = float((X / X.norm() - limit / limit.norm()).norm())
    assert seli_logit_distance(point.W, point.H, torch.arange(4), COUNTS) == pytest.approx(
        expected, rel=1e-9
    )


def test_metrics_of_unequal_classes_are_measured_where_they_mean_something():
    W = torch.tensor([[2.0, 0], [0, 2], [1, 1], [1, 1], [0, 0]], dtype=torch.float64)
    problem = Problem(counts=[3, 3, 1, 1, 0], dim=2, lambda_w=0.01, lambda_h=0.01)
    point = Point(W, W[:4])
    found = measure(problem, problem.rows(), point)
    assert (found["collapsed_groups"], found["collapsed_classes"]) == (1.0, 2.0)
    assert (found["cosine_majority"], found["cosine_minority"]) == (0.0, pytest.approx(1.0))
    assert found["cosine_between"] == pytest.approx(0.5**0.5)
    assert "seli_classifier" not in found  # a class without samples has no such limit
    assert "cosine_majority" not in measure(problem, problem.rows(), point, "none")
    equal = Problem(counts=[2, 2, 2, 2, 0], dim=2, lambda_w=0.01, lambda_h=0.01)
    assert "cosine_majority" not in measure(equal, equal.rows(), point)
    vectors = replace(problem, loss="mse")
    assert "seli_logits" not in measure(vectors, vectors.rows(), point)


def test_at_the_limit_and_at_zero():
    V = torch.eye(4, dtype=torch.float64) - 0.25
    assert seli_logit_distance(V, torch.eye(4, dtype=torch.float64), torch.arange(4), COUNTS) < 1e-7
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert math.isnan(seli_logit_distance(zero, V, torch.arange(4), COUNTS))
    assert math.isnan(seli_distance(zero, COUNTS))
    assert bool(group_cosines(zero, torch.zeros(4, dtype=torch.int64)).isnan().all())
