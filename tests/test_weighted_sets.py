"""Weighted sparse target sets: backends, identities, certificate, runs and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import random_point, relative

from ufm_fast import Problem, solve
from ufm_fast.backends import ReferenceBackend, TiledBackend
from ufm_fast.cli import main
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import linear_pick_all, linear_soft_cross_entropy
from ufm_fast.nn import UFM
from ufm_fast.objective import Objective
from ufm_fast.targets import TargetSets
from ufm_fast.theory import closed_form
from ufm_fast.theory.certificates import certify

POINTER, ENTRIES = [0, 2, 3, 6, 8, 10], [0, 3, 1, 0, 1, 2, 3, 2, 3, 0]
WEIGHTS, COUNTS = (
    [0.7, 0.3, 1.0, 0.2, 0.5, 0.3, 0.25, 0.5, 0.3, 0.7],
    [3, 1, 2, 2, 4],
)  # the last set is the first
LAMBDAS = {"dim": 5, "lambda_w": 0.01, "lambda_h": 0.004, "loss": "pick-all"}


def sets(weights=WEIGHTS) -> TargetSets:
    return TargetSets.create(POINTER, ENTRIES, 4, COUNTS, weights)


def dense() -> tuple[torch.Tensor, torch.Tensor]:
    """(q of every set, counts)."""
    q = torch.zeros(5, 4, dtype=torch.float64)
    q[
        torch.repeat_interleave(torch.arange(5), torch.tensor(POINTER).diff()),
        torch.tensor(ENTRIES),
    ] = torch.tensor(WEIGHTS, dtype=torch.float64)
    return q, torch.tensor(COUNTS).double()


@pytest.mark.parametrize(
    "bias", [{}, {"bias": "free"}, {"logit_adjustment": [0.1, 0.0, -1.0, 2.0]}]
)
@pytest.mark.parametrize("reduce", ["classes", "none"])
def test_value_gradient_and_products_are_those_of_dense_autograd(bias, reduce):
    problem = Problem(target_sets=sets(), **LAMBDAS, **bias)
    tiled, reference = (
        Objective(problem, backend=b, reduce=reduce) for b in (TiledBackend(), ReferenceBackend())
    )
    x, v = random_point(tiled, 0), random_point(tiled, 1)
    ours, theirs = tiled.value_and_grad(x), reference.value_and_grad(x)
    assert ours.value == pytest.approx(theirs.value, rel=1e-13)
    assert relative(ours.gradient, theirs.gradient) < 1e-12
    assert relative(tiled.hvp(x, v), reference.hvp(x, v)) < 1e-12
    head = tiled.head_input(x)
    right, left = (
        torch.rand(4, 2, dtype=torch.float64),
        torch.rand(tiled.rows.number, 2, dtype=torch.float64),
    )
    mine, dense_one = (
        backend.logit_gradient(head) for backend in (TiledBackend(), ReferenceBackend())
    )
    torch.testing.assert_close(mine.times(right), dense_one.times(right), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        mine.transposed_times(left), dense_one.transposed_times(left), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        TiledBackend().losses(head), ReferenceBackend().losses(head), rtol=1e-12, atol=0
    )


def test_the_textbook_formula_and_the_drop_in_loss():
    q, n = dense()
    objective = Objective(Problem(target_sets=sets(), **LAMBDAS), reduce="none", variables="raw")
    assert objective.rows.number == 12
    x = random_point(objective, 2)
    repeated = q.repeat_interleave(n.long(), 0)
    expected = -(repeated * torch.log_softmax(x.H @ x.W.T, 1)).sum(1).mean()
    assert objective.value_and_grad(x).data_value == pytest.approx(float(expected), rel=1e-13)
    merged = Objective(Problem(target_sets=sets(), **LAMBDAS))
    assert merged.rows.counts.tolist() == [7, 1, 2, 2]
    soft = linear_soft_cross_entropy(x.H, x.W, torch.arange(4).expand(12, 4), repeated)
    assert float(soft) == pytest.approx(float(expected), rel=1e-12)


def test_weights_of_one_change_no_bit_and_one_hot_is_cross_entropy():
    plain, ones = (Problem(target_sets=sets(w), **LAMBDAS) for w in (None, [1.0] * 10))
    x = random_point(Objective(plain), 0)
    a, b = (Objective(problem).value_and_grad(x) for problem in (plain, ones))
    assert a.value == b.value
    assert torch.equal(a.gradient.W, b.gradient.W)
    assert ones.kind == plain.kind
    single = TargetSets.create([0, 1, 2, 3], [0, 1, 2], 3, [4, 4, 4], [2.0, 2.0, 2.0])
    found = solve(
        Problem(target_sets=single, dim=4, lambda_w=0.02, lambda_h=0.01, loss="pick-all"),
        start="normal",
    )
    twice = solve(Problem(classes=3, per_class=4, dim=4, lambda_w=0.01, lambda_h=0.005))
    assert found.value == pytest.approx(2 * twice.value, rel=1e-10)


@pytest.mark.parametrize(
    "bias",
    [
        {},
        {"bias": "penalised", "lambda_b": 0.05},
        {"bias": "free"},
        {"logit_adjustment": [0.5, 0, 0, -1]},
        {"logit_adjustment": [0.5, 0, 0, -1], "bias": "penalised", "lambda_b": 0.05},
        {"class_scales": [2.0, 1.0, 0.5, 3.0], "logit_adjustment": [0.5, 0, 0, -1]},
        {"classifier_penalties": [2.0, 1.0, 0.5, 3.0], "bias": "free"},
    ],
)
def test_minima_are_certified(bias):
    problem = Problem(target_sets=sets(), **LAMBDAS, **bias)
    found = solve(problem, start="normal")
    assert closed_form(problem) is None
    assert found.certificate.certified, found.certificate
    objective = Objective(problem)
    elsewhere = certify(problem, objective.rows, objective.to_model(random_point(objective, 3)))
    assert elsewhere.lower_bound <= found.value * (1 + 1e-12)
    assert "tag_scale2" not in found.metrics
    assert not any("never stand alone" in words for words in found.notes)
    few = certify(problem, objective.rows, found.point, exact_classes=0)
    assert few.lower_bound <= found.value * (1 + 1e-12)
    assert few.relative_gap < 1e-5
    assert solve(replace(problem, freeze="h"), start="normal").certificate.kind == (
        "none" if problem.bias == "free" else "exact"
    )


def test_layers_have_the_bound_of_their_least_price():
    for case in ({}, {"logit_adjustment": [0.5, 0, 0, -1]}):
        found = solve(Problem(target_sets=sets(), **LAMBDAS, layers=2, **case), max_steps=100)
        assert 0 < found.certificate.lower_bound <= found.value


def test_runs_keep_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arrays = {"indptr": POINTER, "indices": ENTRIES, "counts": COUNTS}
    np.savez("soft.npz", weights=WEIGHTS, **arrays)
    flags = [
        "--loss",
        "pick-all",
        "--dim",
        "5",
        "--lambda-w",
        "0.01",
        "--lambda-h",
        "0.004",
        "--no-plots",
        "--json",
    ]
    assert main(["solve", "--targets", "soft.npz", *flags, "--out", "run", "--max-steps", "2"]) == 3
    capsys.readouterr()
    assert main(["solve", "--resume", "run", "--max-steps", "500", "--json", "--no-plots"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == pytest.approx(
        solve(Problem(target_sets=sets(), **LAMBDAS)).value, rel=1e-10
    )
    assert found["certificate"]["certified"]
    assert main(["metrics", "run", "--json"]) == 0
    np.savez("soft.npz", weights=[0.6, *WEIGHTS[1:]], **arrays)
    assert main(["solve", "--targets", "soft.npz", *flags, "--out", "run"]) == 2  # other data
    assert "another configuration" in capsys.readouterr().err
    np.savez("soft.npz", weights=[0.0, *WEIGHTS[1:]], **arrays)
    assert main(["solve", "--targets", "soft.npz", *flags, "--out", "other"]) == 2
    assert "drop the entries that weigh nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ([1.0] * 9, InputError, r"shape \(10,\)"),
        ([float("nan")] * 10, InputError, "finite and > 0"),
        (["a"] * 10, InputTypeError, "weights"),
        ([1e-30] * 10, InputError, "largest weight .* must lie in .* divide all weights by it"),
        ([1.0] * 9 + [1e200], InputError, "largest weight .* must lie in"),
    ],
)
def test_bad_weights_are_named(weights, error, words):
    with pytest.raises(error, match=words):
        sets(weights)


def test_plain_numbers_keep_their_digits():
    found = TargetSets.create([0, 2, 3], [0, 1, 2], 4, weights=[0.3, 0.7, 1.1])
    assert found.weights.tolist() == [0.3, 0.7, 1.1]
    rows = Problem(target_sets=found, **LAMBDAS).rows()
    assert rows.targets.weights.tolist() == [0.3, 0.7, 1.1]


@pytest.mark.parametrize("heavy", [1e8, 1e16])
def test_light_labels_beside_a_heavy_one_keep_their_digits(heavy):
    data = TargetSets.create([0, 2, 3, 4], [0, 1, 2, 3], 4, weights=[heavy, 1.0, 1.0, 1.0])
    found = solve(Problem(target_sets=data, **LAMBDAS), metrics=False)
    assert found.certificate.certified, found.certificate
    assert found.certificate.relative_gap < 1e-10


def test_faces_that_take_sets_without_weights_say_so():
    problem = Problem(target_sets=sets(), **LAMBDAS)
    with pytest.raises(InputError, match="weighted sets"):
        UFM(problem)
    with pytest.raises(InputError, match="linear_soft_cross_entropy"):
        linear_pick_all(torch.ones(4, 3), torch.ones(4, 3), problem.rows().targets)
    full = TargetSets.create(
        [0, 3, 4], [0, 1, 2, 0], 3, None, [0.2, 0.3, 0.5, 1.0]
    )  # a distribution over all classes
    assert solve(
        Problem(target_sets=full, dim=3, lambda_w=0.01, lambda_h=0.01, loss="pick-all")
    ).certificate.certified
    with pytest.raises(InputError, match="holds every class"):
        TargetSets.create([0, 3, 4], [0, 1, 2, 0], 3)
