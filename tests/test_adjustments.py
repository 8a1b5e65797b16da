"""Adjusted logits: offsets, margins and scales of the classes, against dense autograd, identities
and certificates.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from strategies import random_point, relative

from ufm_fast import Problem, solve
from ufm_fast.backends import ReferenceBackend
from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.nn import UFM
from ufm_fast.objective import Objective
from ufm_fast.theory.certificates import certify

COUNTS = [7, 4, 2, 1]
SMALL = {"counts": COUNTS, "dim": 5, "lambda_w": 0.01, "lambda_h": 0.004}
CASES = [
    {"logit_adjustment": 1.0},
    {"logit_adjustment": [0.3, -2.0, 0.1, 40.0], "bias": "penalised", "lambda_b": 0.1},
    {"margin": 0.5, "margin_power": 0.25, "loss": "focal", "logit_adjustment": -0.5},
    {"margin": [0.1, 30.0, 0.0, -2.0], "smoothing": 0.1, "bias": "free"},
    {"class_scales": 0.3, "logit_adjustment": 1.0, "margin": 0.2, "bias": "free"},
    {"class_scales": [2.0, 1.0, 0.1, 3.0], "layers": 2, "activation": "relu"},
    {"margin": 0.2, "constraint": "sphere", "temperature": 8.0, "lambda_w": 0.0, "lambda_h": 0.0},
    {"classifier_penalties": -0.5, "bias": "penalised", "lambda_b": 0.1},
    {"classifier_penalties": [2.0, 1.0, 0.1, 3.0], "class_scales": 0.3, "feature_penalties": -1.0},
    {"classifier_penalties": [2.0, 1.0, 0.1, 3.0], "loss": "mse", "bias": "free"},
    {"classifier_penalties": -1.0, "layers": 2, "activation": "relu"},
    {"classifier_penalties": -1.0, "freeze": "h"},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variables", ["balanced", "raw"])
def test_value_gradient_and_products_are_those_of_dense_autograd(case, variables):
    problem = Problem(**{**SMALL, **case})
    ours, dense = (
        Objective(problem, backend=b, variables=variables) for b in (None, ReferenceBackend())
    )
    x, v = random_point(ours, 0), random_point(ours, 1)
    if ours.geometry.curved:
        x = ours.geometry.project(x)
        v = ours.geometry.tangent(x, v)
    mine, theirs = ours.value_and_grad(x), dense.value_and_grad(x)
    assert mine.value == pytest.approx(theirs.value, rel=1e-12)
    assert relative(mine.gradient, theirs.gradient) < 1e-12
    assert relative(ours.hvp(x, v), dense.hvp(x, v)) < 1e-12


def test_the_textbook_formula():
    problem = Problem(
        **SMALL,
        bias="penalised",
        lambda_b=0.1,
        logit_adjustment=0.7,
        margin=0.5,
        margin_power=0.25,
        class_scales=0.3,
    )
    objective = Objective(problem, variables="raw")
    x, n = random_point(objective, 3), torch.tensor(COUNTS).double()
    pi, share = (n / n.sum()).log(), (n / n.max()) ** 0.3
    z = x.H @ (share[:, None] * x.W).T + x.b + 0.7 * pi - torch.diag(0.5 * n**-0.25)
    data = (n / n.sum()) @ torch.nn.functional.cross_entropy(z, torch.arange(4), reduction="none")
    assert objective.value_and_grad(x).data_value == pytest.approx(float(data), rel=1e-13)


@pytest.mark.parametrize("loss", ["ce", "mse", "pick-all"])
@pytest.mark.parametrize("variables", ["balanced", "raw"])
def test_rows_of_w_have_the_penalty_of_their_class(loss, variables):
    eta = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    problem = Problem(**SMALL, loss=loss, classifier_penalties=eta)
    objective = Objective(problem, variables=variables)
    raw = Objective(problem, variables="raw")
    at = random_point(raw, 3)
    W, H = at.W.clone().requires_grad_(), at.H.clone().requires_grad_()
    n, target = torch.tensor(COUNTS).double(), torch.eye(4).double()
    z = H @ W.T
    errors = 0.5 * (z - target).square().sum(1)
    rows = errors if loss == "mse" else -(target * z.log_softmax(1)).sum(1)
    penalty = 0.005 * (eta @ W.square().sum(1)) + 0.002 * (n @ H.square().sum(1))
    value = (n / n.sum()) @ rows + penalty
    value.backward()
    x = objective.from_model(at.W, at.H, None)
    found = objective.value_and_grad(x)
    assert found.value == pytest.approx(value.item(), rel=1e-12)
    back = objective.to_model(x)
    torch.testing.assert_close(back.W, at.W, rtol=1e-14, atol=0.0)
    # The chain rule: the model's rows are a factor times the solver's.
    torch.testing.assert_close(found.gradient.W, W.grad * (at.W / x.W), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found.gradient.H, H.grad * (at.H / x.H), rtol=1e-11, atol=1e-14)
    assert problem.penalties(raw.rows).energies(at)["W"] == pytest.approx(
        0.01 * float(eta @ at.W.square().sum(1)), rel=1e-13
    )


def test_solutions_are_in_the_variables_that_were_asked_for():
    eta = [0.5, 1.0, 2.0, 4.0]
    problem = Problem(**SMALL, classifier_penalties=eta)
    found, raw = solve(problem), solve(problem, variables="raw")
    assert found.certificate.certified
    assert found.value == pytest.approx(raw.value, rel=1e-10)
    gram = found.point.W @ found.point.W.T
    torch.testing.assert_close(gram, raw.point.W @ raw.point.W.T, rtol=1e-5, atol=1e-6)
    assert "balancedness" not in found.metrics
    twice = solve(Problem(**SMALL, classifier_penalties=[2.0] * 4))
    assert twice.value == pytest.approx(
        solve(Problem(**{**SMALL, "lambda_w": 0.02})).value, rel=1e-10
    )
    # The same minimum by scales, in other variables.
    scales = Problem(**SMALL, class_scales=torch.tensor(eta, dtype=torch.float64).rsqrt())
    assert found.value == pytest.approx(solve(scales).value, rel=1e-10)
    assert Problem(**SMALL, classifier_penalties=[1.0] * 4).kind == Problem(**SMALL).kind
    with pytest.raises(InputError, match="one penalty on W"):
        UFM(problem)
    with pytest.raises(InputError, match="not for classifier_penalties"):
        solve(problem, reduce="groups")
    with pytest.raises(InputError, match="goes with one penalty on W"):
        solve(Problem(**SMALL, loss="mse", classifier_penalties=eta), method="alternating")


def test_penalties_of_each_class_are_scales():
    lambdas = torch.tensor([0.01, 0.02, 0.05, 0.1], dtype=torch.float64)
    plain = Objective(Problem(**SMALL), variables="raw")
    scaled = Objective(Problem(**SMALL, class_scales=(0.01 / lambdas).sqrt()), variables="raw")
    x = random_point(plain, 0)
    extra = 0.5 * float((lambdas - 0.01) @ x.W.square().sum(1))
    y = replace(x, W=x.W * (lambdas / 0.01).sqrt()[:, None])
    assert scaled.value_and_grad(y).value == pytest.approx(
        plain.value_and_grad(x).value + extra, rel=1e-13
    )


@pytest.mark.parametrize(
    "case", [{"loss": "ce", "smoothing": 0.1}, {"loss": "focal"}, {"loss": "pick-all"}]
)
def test_nothing_to_change_changes_no_bit(case):
    plain = Problem(**SMALL, **case)
    ones = {"class_scales": [1.0] * 4, "classifier_penalties": [1.0] * 4}
    nothing = replace(plain, logit_adjustment=0.0, margin=[0.0] * 4, **ones)
    x = random_point(Objective(plain), 0)
    a, b = (Objective(problem).value_and_grad(x) for problem in (plain, nothing))
    assert a.value == b.value
    assert all(
        torch.equal(p, q) for p, q in zip(a.gradient.parts(), b.gradient.parts(), strict=True)
    )
    assert nothing.kind == plain.kind


@pytest.mark.parametrize(
    "case",
    [
        *CASES[:2],
        {"margin": 0.5, "margin_power": 0.25},
        {"margin": [0.1, 3.0, 0.0, -2.0], "smoothing": 0.1, "bias": "free"},
        {"loss": "pick-all", "logit_adjustment": 1.0},
        {"class_scales": 0.3, "logit_adjustment": 1.0, "margin": 0.2, "bias": "free"},
        {"class_scales": [2.0, 1.0, 0.5, 3.0]},
        {"feature_penalties": -1.0, "bias": "penalised", "lambda_b": 0.1},
        {"feature_penalties": -1.0, "class_scales": 0.3, "smoothing": 0.1},
        {"feature_penalties": [1.0, 0.2, 3.0, 1.0], "loss": "mse"},
        {"feature_penalties": -1.0, "loss": "mse", "bias": "free"},
        {"classifier_penalties": -0.5, "bias": "penalised", "lambda_b": 0.1},
        {"classifier_penalties": [1.0, 0.2, 3.0, 1.0], "class_scales": 0.3, "smoothing": 0.1},
        {"classifier_penalties": [1.0, 0.2, 3.0, 1.0], "loss": "mse", "bias": "free"},
        {"classifier_penalties": -0.5, "loss": "pick-all", "logit_adjustment": 1.0},
        {"classifier_penalties": -0.5, "loss": "focal", "margin": 0.1},
        {"loss": "focal", "margin": 0.1, "class_scales": 0.2},
        {"loss": "focal", "margin": 0.1, "bias": "penalised", "lambda_b": 0.1},
        {
            "margin": 0.2,
            "constraint": "sphere",
            "temperature": 8.0,
            "lambda_w": 0.0,
            "lambda_h": 0.0,
        },
        {
            "class_scales": 0.3,
            "constraint": "sphere",
            "temperature": 4.0,
            "lambda_w": 0.0,
            "lambda_h": 0.0,
        },
    ],
)
def test_adjusted_logits_and_penalties_of_each_class_are_certified(case):
    problem = Problem(**{**SMALL, **case})
    solution = solve(problem)
    assert solution.certificate.certified, solution.certificate
    assert solution.theory is None
    objective = Objective(problem)
    elsewhere = objective.geometry.project(random_point(objective, 5))
    bound = certify(problem, objective.rows, objective.to_model(elsewhere))
    assert bound.lower_bound <= solution.value * (1 + 1e-12)
    # The norm by blocks and by products is one, so that what is proved of many classes is as true.
    few = certify(problem, objective.rows, solution.point, exact_classes=0)
    assert few.lower_bound <= solution.value * (1 + 1e-12)
    assert few.relative_gap < 1e-5


@pytest.mark.parametrize("freeze", ["w", "h"])
@pytest.mark.parametrize(
    "case",
    [
        {"margin": 0.1},
        {"class_scales": 0.3, "logit_adjustment": 1.0},
        {"classifier_penalties": [2.0, 1.0, 0.5, 3.0], "feature_penalties": -1.0},
        {"classifier_penalties": -1.0, "class_scales": 0.3, "bias": "penalised", "lambda_b": 0.1},
        {"classifier_penalties": -1.0, "loss": "mse"},
    ],
)
def test_the_bound_of_a_frozen_factor_knows_them(case, freeze):
    problem = Problem(**SMALL, **case, freeze=freeze)
    found, begun = (solve(problem, start="normal", max_steps=n) for n in (500, 2))
    assert found.certificate.certified, found.certificate
    assert begun.certificate.lower_bound <= found.value * (1 + 1e-12)


def test_layers_have_the_bound_of_their_least_price():
    for case in (
        {"margin": 0.1},
        {"class_scales": 0.3},
        {"feature_penalties": -1.0},
        {"loss": "mse", "feature_penalties": -1.0},
        {"classifier_penalties": -1.0},
    ):
        found = solve(Problem(**{**SMALL, **case}, layers=2), max_steps=300)
        assert 0 < found.certificate.lower_bound <= found.value


def test_features_have_the_penalty_of_their_class():
    kappa = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    problem = Problem(**SMALL, feature_penalties=kappa)
    every = Objective(problem, reduce="none", variables="raw")
    x, y = random_point(every, 0), problem.sample_labels
    expected = 0.005 * x.W.square().sum() + 0.002 * (kappa[y] * x.H.square().sum(1)).sum()
    assert every.penalty(x) == pytest.approx(float(expected), rel=1e-13)
    leaf = x.H.clone().requires_grad_()
    data = torch.nn.functional.cross_entropy(leaf @ x.W.T, y)
    (data + 0.002 * (kappa[y] * leaf.square().sum(1)).sum()).backward()
    torch.testing.assert_close(
        every.value_and_grad(x).gradient.H, leaf.grad, rtol=1e-12, atol=1e-14
    )
    for reduce in ("classes", "none"):
        raw, balanced = (
            Objective(problem, reduce=reduce, variables=v) for v in ("raw", "balanced")
        )
        at = random_point(raw, 1)
        assert balanced.value_and_grad(
            balanced.from_model(at.W, at.H, None)
        ).value == pytest.approx(raw.value_and_grad(at).value, rel=1e-12)
    same, twice = (
        Problem(**SMALL, feature_penalties=[2.0] * 4),
        Problem(**{**SMALL, "lambda_h": 0.008}),
    )
    assert solve(same).value == pytest.approx(solve(twice).value, rel=1e-10)
    one = Problem(**SMALL, feature_penalties=[1.0] * 4)
    assert one.kind == Problem(**SMALL).kind
    assert UFM(problem, reduce="none").penalty().isfinite()
    rule = Problem(**SMALL, feature_penalties=-1.0)
    assert rule.feature_factors.tolist() == pytest.approx([7 / n for n in COUNTS])


def test_what_was_not_derived_is_not_served():
    scaled = Problem(**SMALL, class_scales=0.3)
    focal = replace(scaled, loss="focal", freeze="h")
    assert solve(focal, max_steps=1).certificate.kind == "none"
    with pytest.raises(InputError, match="not for feature_penalties"):
        solve(Problem(**SMALL, feature_penalties=-1.0), reduce="groups")
    with pytest.raises(InputError, match="reduce groups"):
        solve(scaled, reduce="groups")
    with pytest.raises(InputError, match="UFM has logits as they are"):
        UFM(scaled)


def test_a_free_bias_takes_the_offsets_in():
    plain = Problem(**SMALL, bias="free")
    adjusted = replace(plain, logit_adjustment=1.0)
    a, b = solve(plain), solve(adjusted)
    assert b.value == pytest.approx(a.value, rel=1e-12)
    offset = (torch.tensor(COUNTS).double() / sum(COUNTS)).log()
    moved, free = b.point.b + offset, a.point.b
    assert torch.allclose(moved - moved.mean(), free - free.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"margin": [1.0, 2.0]}, "margin must be one number or 4"),
        ({"class_scales": [1.0, 2.0, 0.0, 1.0]}, "class_scales must lie in"),
        ({"class_scales": [1.0]}, "class_scales must be one number or 4"),
        ({"margin_power": 0.25}, "margin_power goes with one number as margin"),
        ({"margin": 1.0, "margin_power": -1.0}, "margin_power must be >= 0"),
        ({"logit_adjustment": float("nan")}, "logit_adjustment"),
        ({"logit_adjustment": 1.0, "counts": [3, 0, 2, 1]}, "a class is empty"),
        ({"margin": 1.0, "loss": "mse"}, "go with softmax losses"),
        ({"margin": 1.0, "loss": "pick-all"}, "margin goes with one label"),
        ({"classifier_penalties": [1.0, 2.0]}, "classifier_penalties must be one number or 4"),
        ({"classifier_penalties": [1.0, 2.0, 0.0, 1.0]}, "classifier_penalties must lie in"),
        (
            {"classifier_penalties": 1.0, "constraint": "sphere", "lambda_w": 0.0, "lambda_h": 0.0},
            "not with unit rows",
        ),
        ({"feature_penalties": [1.0, 2.0]}, "feature_penalties must be one number or 4"),
        ({"feature_penalties": [1.0, 2.0, 0.0, 1.0]}, "feature_penalties must lie in"),
        ({"feature_penalties": -1.0, "loss": "pick-all"}, "not with loss pick-all"),
        (
            {"feature_penalties": -1.0, "constraint": "sphere", "lambda_w": 0.0, "lambda_h": 0.0},
            "not with unit rows",
        ),
    ],
)
def test_what_contradicts_is_said(case, words):
    with pytest.raises(InputError, match=words):
        Problem(**{**SMALL, **case})


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("classifier_penalties", (1e-16, 1e16)),
        ("feature_penalties", (1e-16, 1e16)),
        ("class_scales", (1e-8, 1e8)),
    ],
)
def test_factors_that_the_arithmetic_does_not_bear_are_refused(name, ends):
    for end in ends:
        found = solve(Problem(**SMALL, **{name: [1.0, end, 1.0, 1.0]}), metrics=False)
        assert found.certificate.certified, (end, found.certificate)
    for beyond in (ends[0] / 2, ends[1] * 2, 1e-320, 1e300):
        words = f"{name} must lie in .*, got {beyond} for class 1; bring it nearer to 1"
        with pytest.raises(InputError, match=words.replace("+", "\\+")):
            Problem(**SMALL, **{name: [1.0, beyond, 1.0, 1.0]})
    with pytest.raises(InputError, match=f"{name} = 60.0 is .* for class [12]; go nearer to 0"):
        Problem(**SMALL, **{name: 60.0})


def test_the_penalty_of_a_class_is_one_that_all_could_have():
    for name, of_all in (("classifier_penalties", "lambda_w"), ("feature_penalties", "lambda_h")):
        given = {**SMALL, of_all: 1e-20, name: [1.0, 1.0, 1e-12, 1.0]}
        with pytest.raises(InputError, match=f"{of_all} times {name} must .* for class 2; change"):
            Problem(**given)


def test_on_the_command_line(tmp_path, capsys):
    flags = ["--counts", "7,4,2,1", "--dim", "5", "--lambda-w", "0.01", "--lambda-h", "0.004"]
    ours = [
        "--margin",
        "0.5",
        "--margin-power",
        "0.25",
        "--logit-adjustment",
        "0.1,0,-0.2,0",
        "--feature-penalties=-1",
        "--classifier-penalties",
        "1,2,0.5,1",
    ]
    assert main(["solve", "--no-plots", *flags, *ours, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    problem = Problem(
        **SMALL,
        margin=0.5,
        margin_power=0.25,
        logit_adjustment=[0.1, 0.0, -0.2, 0.0],
        feature_penalties=-1.0,
        classifier_penalties=[1.0, 2.0, 0.5, 1.0],
    )
    assert summary["value"] == pytest.approx(solve(problem).value, rel=1e-12)
    assert main(["solve", "--no-plots", *flags, "--margin", "0.5,1"]) == 2
    assert "margin must be one number or 4" in capsys.readouterr().err
