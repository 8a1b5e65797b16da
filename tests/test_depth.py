"""Layers between features and head, and unit rows: derivatives by difference quotients, identities,
and what is refused.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_point, relative

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.trunks import ReLU, Trunk

LOSSES = [
    {"loss": "ce", "smoothing": 0.1},
    {"loss": "focal"},
    {"loss": "mse"},
    {"loss": "pick-all"},
]
SHAPES = [
    {"layers": 2, "activation": "relu", "lambda_hidden": 3e-3},
    {"layers": 3, "widths": [5, 4, 6], "lambda_hidden": [2e-3, 7e-3]},
    {"layers": 3, "widths": 7, "activation": "relu"},
    {"constraint": "sphere", "temperature": 2.5},
]


def deep(shape: dict, loss: dict, bias: str = "none", **more: object) -> Problem:
    if "constraint" in shape:
        return Problem(
            counts=[3, 1, 2, 2], dim=5, smoothing=loss.get("smoothing", 0.0), **shape, **more
        )
    lambdas = {"lambda_w": 1e-2, "lambda_h": 4e-3, "lambda_b": 0.1 if bias == "penalised" else 0.0}
    return Problem(counts=[3, 1, 2, 2], dim=5, **lambdas, bias=bias, **shape, **loss, **more)


def start(objective: Objective, seed: int) -> Point:
    return objective.geometry.project(random_point(objective, seed))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(LOSSES),
    st.sampled_from(["balanced", "raw"]),
    st.integers(0, 10**6),
)
def test_derivatives_match_central_differences_along_geodesics(shape, loss, variables, seed):
    objective = Objective(deep(shape, loss, "penalised"), variables=variables)
    if isinstance(objective.trunk.activation, ReLU):  # the exact one has kinks
        objective = objective.rounded(0.3)
    x = start(objective, seed)
    u, v = (objective.geometry.tangent(x, random_point(objective, seed + i)) for i in (1, 2))
    t = 1e-4 / v.norm()
    at = objective.value_and_grad(x)
    ahead, behind = (objective.value_and_grad(objective.move(x, v, s)) for s in (t, -t))
    assert (ahead.value - behind.value) / (2 * t) == pytest.approx(
        at.gradient.dot(v), rel=1e-5, abs=1e-7 * v.norm()
    )
    product = objective.hvp(x, v)
    second = (ahead.value - 2 * at.value + behind.value) / t**2
    assert second == pytest.approx(product.dot(v), rel=1e-4, abs=1e-6 * v.norm() ** 2)
    assert product.dot(u) == pytest.approx(
        objective.hvp(x, u).dot(v), rel=1e-9, abs=1e-10 * u.norm() * v.norm()
    )


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SHAPES[:3]),
    st.sampled_from(LOSSES),
    st.sampled_from(["none", "free"]),
    st.integers(0, 10**6),
)
def test_values_and_gradients_are_those_of_dense_autograd(shape, loss, bias, seed):
    problem = deep(shape, loss, bias)
    for variables in ("balanced", "raw"):
        objective = Objective(problem, variables=variables, reduce="none")
        model = objective.to_model(random_point(objective, seed)).map(
            lambda part: part.clone().requires_grad_()
        )
        A = model.H
        for W in model.hidden:
            A = torch.relu(A @ W.T) if problem.activation == "relu" else A @ W.T
        z = A @ model.W.T + (0 if model.b is None else model.b)
        fit = problem.loss.dense(z, objective.targets).mean()
        lambdas = (problem.lambda_w, problem.lambda_h, *problem.hidden_penalties)
        factors = (model.W, model.H, *model.hidden)
        f = fit + sum(
            0.5 * a * part.square().sum() for a, part in zip(lambdas, factors, strict=True)
        )
        f.backward()
        x = objective.from_model(
            model.W.detach(),
            model.H.detach(),
            None if model.b is None else model.b.detach(),
            [W.detach() for W in model.hidden],
        )
        found = objective.value_and_grad(x)
        assert found.value == pytest.approx(f.item(), rel=1e-12)
        if variables == "raw":
            assert relative(found.gradient, model.map(lambda part: part.grad)) < 1e-11


def test_the_class_mean_reduction_is_exact_behind_layers():
    problem = deep(SHAPES[2], {"loss": "ce"})
    reduced, full = Objective(problem), Objective(problem, reduce="none")
    x = random_point(reduced, 3)
    lifted = reduced.lift(x)
    at, every = (
        reduced.value_and_grad(x),
        full.value_and_grad(full.from_model(lifted.W, lifted.H, None, lifted.hidden)),
    )
    assert every.value == pytest.approx(at.value, rel=1e-13)
    for a, b in zip(every.gradient.hidden, at.gradient.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_one_layer_is_the_plain_problem_to_the_last_bit():
    plain, layered = (
        Objective(Problem(classes=4, dim=5, **more)) for more in ({}, {"layers": 1, "widths": [5]})
    )
    x = random_point(plain, 1)
    a, b = plain.value_and_grad(x), layered.value_and_grad(x)
    assert a.value == b.value
    assert torch.equal(a.gradient.H, b.gradient.H)
    assert layered.plain


def test_the_rounded_relu_tends_to_the_exact_one():
    z = torch.linspace(-3, 3, 25, dtype=torch.float64)
    for e in (1e-1, 1e-4, 1e-8):
        assert float((ReLU(e).value(z) - ReLU().value(z)).abs().max()) <= e / 2 + 1e-15
    assert float(ReLU(1e-8).value(torch.tensor(-1.0, dtype=torch.float64))) == pytest.approx(
        -5e-9 + 2.5e-17, rel=1e-12
    )
    assert Trunk((3,)).empty


def test_carrying_keeps_inner_products_and_moves_stay_on_the_spheres():
    objective = Objective(deep(SHAPES[3], {}))
    x = start(objective, 1)
    d, u, v = (objective.geometry.tangent(x, random_point(objective, i)) for i in (2, 3, 4))
    there = objective.move(x, d, 0.7)
    carried = [objective.carry(x, d, 0.7, w) for w in (u, v)]
    assert carried[0].dot(carried[1]) == pytest.approx(u.dot(v), rel=1e-12)
    assert objective.geometry.tangent(there, carried[0]).axpy(-1.0, carried[0]).norm() < 1e-13
    assert float((there.W.norm(dim=1) - 1).abs().max()) < 1e-15


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"layers": 2.0}, "layers must be a whole number"),
        ({"layers": 2, "widths": [5]}, "widths must hold d_0"),
        ({"layers": 2, "widths": [5, 0]}, "widths must be at least 1"),
        ({"layers": 2, "widths": [4, 5]}, "widths begins with 4 but dim is 5"),
        ({"layers": 2, "widths": "5"}, "widths must be a whole number"),
        ({"widths": 3}, "layers is 1; give layers >= 2"),
        ({"layers": 2, "lambda_hidden": 0.0}, "lambda_hidden must lie in .* give it > 0"),
        ({"layers": 2, "lambda_hidden": [1e-3, 1e-3]}, "one for each of 1 hidden layers, got 2"),
        ({"lambda_hidden": 1e-3}, "lambda_hidden goes with hidden layers"),
        ({"activation": "relu"}, "give layers >= 2"),
        ({"layers": 2, "activation": "tanh"}, "activation must be one of linear, relu"),
        ({"layers": 2, "freeze": "w"}, "freeze w goes with one layer"),
        ({"constraint": "ball"}, "constraint must be one of none, sphere"),
        ({"constraint": "sphere", "bias": "free"}, "constraint sphere contradicts bias 'free'"),
        ({"constraint": "sphere", "lambda_w": 1e-3}, "constraint sphere contradicts lambda_w"),
        ({"constraint": "sphere", "lambda_b": 0.5}, "constraint sphere contradicts lambda_b"),
        ({"constraint": "sphere", "dim": 1}, "dim = 1"),
        ({"constraint": "sphere", "loss": "mse"}, "loss mse"),
        ({"constraint": "sphere", "layers": 2}, "layers = 2"),
        ({"constraint": "sphere", "temperature": 0.0}, "temperature must lie in"),
        ({"temperature": 2.0}, "goes with constraint sphere"),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises((InputError, InputTypeError), match=words):
        Problem(**{"classes": 4, "dim": 5, **change})
