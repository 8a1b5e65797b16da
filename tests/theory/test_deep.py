"""Minima with layers: numbers of the papers' settings, minimisers that have their values, and
bounds below them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm_fast import Problem, solve
from ufm_fast.theory import biased_mse_minimum, ce_minimum, closed_form, mse_minimum
from ufm_fast.theory.codes import codes_of
from ufm_fast.theory.deep import ce_bound, chord, deep_code_value, layered_mse, mse_bound, profile
from ufm_fast.theory.structures import recognise, structures

LAMBDA = 5e-4
DANG = [
    (1, [100] * 4, 0.0198), (2, [100] * 4, 0.013881543501534), (3, [100] * 4, 0.012629046991768),
    (6, [100] * 4, 0.013507408249553), (9, [100] * 4, 0.015843895355463),
    (1, [200, 100, 50, 50], 0.018942135623731), (2, [200, 100, 50, 50], 0.013346614046270),
    (3, [200, 100, 50, 50], 0.012218400372035), (6, [200, 100, 50, 50], 0.013220353373000),
    (9, [200, 100, 50, 50], 0.015596261534276),
]  # fmt: skip
DANG_BIAS = [
    (1, 0.01485),
    (2, 0.010411157626150),
    (3, 0.009471785243826),
    (6, 0.010130556187165),
    (9, 0.011882921516597),
]


@pytest.mark.parametrize(("layers", "counts", "value"), DANG)
def test_linear_layers_without_a_bias(layers, counts, value):
    assert layered_mse(counts, 64, LAMBDA, layers + 1).value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("layers", "value"), DANG_BIAS)
def test_linear_layers_with_a_free_bias(layers, value):
    assert layered_mse([100] * 4, 64, LAMBDA, layers + 1, free_bias=True).value == pytest.approx(
        value, rel=1e-12
    )


def dense(found, counts, widths, penalties):
    """The objective of a minimum's factors, as the papers write it."""
    n = torch.tensor(counts, dtype=torch.float64)
    W, H, *hidden = found.factors(n, widths, penalties)
    Z = H
    for V in hidden:
        Z = Z @ V.T
    Z = Z @ W.T + (0.0 if found.bias is None else found.bias)
    fit = (n[:, None] * (Z - torch.eye(len(n), dtype=torch.float64)).square()).sum() / (2 * n.sum())
    squares = [
        W.square().sum(),
        (n[:, None] * H.square()).sum(),
        *(V.square().sum() for V in hidden),
    ]
    return float(fit + sum(own / 2 * s for own, s in zip(penalties, squares, strict=True))), (
        W,
        H,
        hidden,
        Z,
    )


@settings(max_examples=120, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 5, 40]), min_size=2, max_size=7).filter(
        lambda c: sum(c) > 0
    ),
    layers=st.integers(1, 5),
    width=st.integers(1, 8),
    level=st.floats(-4.0, 0.3),
    free=st.booleans(),
)
def test_the_minimiser_has_the_value_and_is_critical(counts, layers, width, level, free):
    """Value, equal energies of all factors, and a residual that is stationary in every singular
    value.
    """
    penalties = [
        0.5 * 10**level,
        2.0 * 10**level,
        *(10**level * (j + 1) for j in range(layers - 1)),
    ]
    penalties = [p / sum(counts) for p in penalties]
    mu = math.prod(penalties) ** (1 / len(penalties))
    found = layered_mse(counts, width, mu, layers + 1, free_bias=free)
    widths = [width + 2, *[width] * (layers - 1)] if layers > 1 else [width]
    value, (W, H, hidden, Z) = dense(found, counts, widths, penalties)
    assert value == pytest.approx(found.value, rel=1e-9, abs=1e-15)
    n = torch.tensor(counts, dtype=torch.float64)
    G = n[:, None] * (Z - torch.eye(len(n), dtype=torch.float64)) / n.sum()
    assert float(G.sum(0).norm()) < 1e-12 or not free
    features = H
    for V in hidden:
        features = features @ V.T
    assert torch.allclose(G.T @ features, -penalties[0] * W, atol=1e-9 * (1 + float(W.norm())))


def test_one_layer_is_the_plain_model():
    counts = [9, 4, 4, 1, 0]
    mu = math.sqrt(3e-2 * 5e-2)
    for width in (1, 3, 9):
        assert layered_mse(counts, width, mu, 2).value == pytest.approx(
            mse_minimum(counts, width, 3e-2, 5e-2), rel=1e-14
        )
    least = biased_mse_minimum(counts[:4], 3e-2, 5e-2, 0.0)
    assert layered_mse(counts, 9, mu, 2, free_bias=True).value == pytest.approx(least, rel=1e-13)
    assert deep_code_value(codes_of(6)[0], 3, 1e-2, 2) == pytest.approx(
        ce_minimum(6, 3, 1e-2, 1e-2), rel=1e-12
    )


def test_the_profile_is_the_least_of_a_grid():
    grid = np.geomspace(1e-9, 10.0, 400001)
    for factors in (2, 3, 4, 7):
        for mu in (1e-4, 3e-3, 3e-2, 0.3):
            s, cost = profile(np.array([1.0]), 3.0, mu, factors)
            values = (grid - 1.0) ** 2 / 6 + factors / 2 * mu * grid ** (2 / factors)
            assert cost[0] == pytest.approx(min(values.min(), 1 / 6), rel=1e-6)
            assert s[0] == 0 or s[0] == pytest.approx(grid[values.argmin()], rel=1e-3)


CODES = [
    (4, 2, 5, 2.0**-10, 0.030227583872), (6, 2, 5, 2.0**-10, 0.047254377284),
    (8, 2, 5, 2.0**-10, 0.063656738018), (10, 2, 5, 2.0**-10, 0.080012659245),
    (4, 3, 5, 2.0**-10, 0.023657636972), (10, 3, 5, 2.0**-10, 0.058705223845),
    (10, 1, 5, 2.0**-10, 0.139867258008), (12, 4, 1, 2.0**-10, 0.038801777345),
    (12, 5, 1, 2.0**-10, 0.035652705658), (16, 3, 1, 2.0**-10, 0.058590437614),
    (27, 3, 1, 2.0**-10, 0.086536802594),
]  # fmt: skip


@pytest.mark.parametrize(("classes", "layers", "n", "mu", "value"), CODES)
def test_the_lowest_code_of_cross_entropy(classes, layers, n, mu, value):
    values = {code.name: deep_code_value(code, n, mu, layers + 1) for code in codes_of(classes)}
    assert min(values.values()) == pytest.approx(value, rel=2e-11)
    assert ce_bound(classes, n, mu, layers + 1) <= value * (1 + 1e-11)


def test_codes_are_tight_frames_that_sum_to_zero():
    for classes in (4, 5, 6, 10, 12, 16, 27, 56):
        for code in codes_of(classes):
            pairs = code.cosines.items()
            assert sum(m for _, m in pairs) == classes - 1
            assert sum(m * c for c, m in pairs) == pytest.approx(-1.0, abs=1e-12)
            assert 1 + sum(m * c * c for c, m in pairs) == pytest.approx(
                classes / code.rank, rel=1e-12
            )


def test_lower_bounds_of_any_depth():
    assert ce_bound(4, 5, 2.0**-10, 3) == pytest.approx(0.0216, abs=5e-5)
    assert ce_bound(6, 5, 2.0**-10, 3) == pytest.approx(0.0308, abs=5e-5)
    assert ce_bound(10, 5, 2.0**-10, 3) == pytest.approx(0.0463, abs=5e-5)
    assert mse_bound(10, 1, 4e-3, 5) == pytest.approx(0.0251, abs=5e-5)
    for factors in (2, 3, 5):
        least = layered_mse([3] * 6, 9, 1e-3, factors).value
        assert mse_bound(6, 3, 1e-3, factors) <= least * (1 + 1e-13)
        nu = chord(least, 1e-3, factors)
        x = np.linspace(0, (2 * least / factors / 1e-3) ** (factors / 2), 1001)
        assert bool((factors / 2 * 1e-3 * x ** (2 / factors) >= nu * x - 1e-15).all())
    assert chord(0.7, 1e-3, 2) == pytest.approx(1e-3)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("layers", "widths"), [(1, None), (2, None), (3, [6, 5, 7]), (2, [6, 2])])
@pytest.mark.parametrize("counts", [[3] * 5, [7, 4, 4, 1, 0]])
def test_closed_forms_with_layers(counts, layers, widths, free):
    """A run by the closed form stands still, has the value of theory, and no random start ends
    below it.
    """
    problem = Problem(
        counts=counts,
        dim=6,
        layers=layers,
        widths=widths,
        loss="mse",
        bias="free" if free else "none",
        lambda_w=2e-3,
        lambda_h=1e-3,
        **({} if layers == 1 else {"lambda_hidden": 5e-3}),
    )
    theory = closed_form(problem)
    run = solve(problem, method="closed-form", metrics=False)
    assert run.success
    assert run.value == pytest.approx(theory.value, rel=1e-12)
    found = solve(problem, start="orthogonal", metrics=False, tol=1e-8)
    assert found.value >= theory.value * (1 - 1e-9)


def test_kinds_without_a_proof_have_none():
    for change in (
        {"activation": "relu"},
        {"loss": "ce"},
        {"loss": "mse", "bias": "penalised", "lambda_b": 0.1},
    ):
        assert (
            closed_form(Problem(**{"classes": 4, "dim": 6, "layers": 2, "loss": "mse", **change}))
            is None
        )


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize(
    "case",
    [
        {"loss": "ce"},
        {"loss": "ce", "smoothing": 0.1, "bias": "free"},
        {"loss": "focal"},
        {"loss": "pick-all"},
        {"loss": "mse"},
        {"loss": "mse", "bias": "free"},
        {"loss": "mse", "bias": "penalised", "lambda_b": 0.1},
    ],
)
def test_certificates_with_layers_bound_every_value_found(activation, case):
    problem = Problem(
        counts=[5, 5, 2, 2, 1],
        dim=8,
        layers=2,
        activation=activation,
        lambda_w=2e-3,
        lambda_h=1e-3,
        **case,
    )
    found = [solve(problem, start="normal", metrics=False, max_steps=steps) for steps in (0, 5, 60)]
    least = min(solution.value for solution in found)
    for solution in found:
        assert solution.certificate.kind == "exact"
        assert 0 <= solution.certificate.lower_bound <= least * (1 + 1e-12)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_minima_with_layers_are_certified_where_that_is_proved_and_called_local_elsewhere(loss):
    problem = Problem(
        classes=4, per_class=5, dim=8, layers=2, loss=loss, lambda_w=2e-3, lambda_h=1e-3
    )
    found = solve(problem, start="orthogonal", metrics=False)
    assert found.certificate.certified == (loss == "mse")
    assert found.notes == (
        [] if loss == "mse" else ["local minimum; the bound is not tight here (several layers)"]
    )


@pytest.mark.parametrize(
    ("case", "options", "name"),
    [
        (
            {"classes": 6, "dim": 10, "per_class": 5, "layers": 2},
            {"start": "normal", "restarts": 10},
            "cross-polytope",
        ),
        (
            {"classes": 4, "dim": 8, "per_class": 5, "layers": 2},
            {"start": "normal", "restarts": 5},
            "simplex",
        ),
        ({"classes": 4, "dim": 2, "per_class": 5}, {"start": "normal"}, "cross-polytope"),
        (
            {"classes": 5, "dim": 2, "per_class": 5},
            {"start": "normal", "restarts": 3},
            "regular polygon",
        ),
    ],
)
def test_structures_are_recognised_by_their_values(case, options, name):
    problem = Problem(lambda_w=2.0**-10, lambda_h=2.0**-10, **case)
    found = solve(problem, metrics=False, **options)
    assert found.theory is None
    assert found.structure.name.startswith(name)
    assert found.structure.value == pytest.approx(found.value, rel=1e-8)
    assert found.summary()["structure"]["name"] == found.structure.name


def test_what_is_proved_or_unknown_is_no_structure():
    assert solve(Problem(classes=4, dim=8), metrics=False).structure is None
    relu = Problem(
        classes=4, dim=10, layers=2, activation="relu", loss="mse", lambda_w=5e-3, lambda_h=5e-3
    )
    least = layered_mse([1] * 4, 10, 5e-3, 3).value
    assert recognise(relu, least).name.startswith("orthogonal")
    assert recognise(relu, least * 1.001) is None
    assert structures(Problem(classes=4, dim=10, layers=2, activation="relu")) == []
    assert structures(Problem(counts=[2, 2, 1], dim=10, layers=2)) == []
