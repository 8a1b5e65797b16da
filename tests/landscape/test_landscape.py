"""Curvature at critical points whose Hessian is known exactly, verdicts on them, and the way out of
saddles.
"""

from __future__ import annotations

import math

import pytest
import torch
from strategies import random_point

from ufm_fast.errors import InputError
from ufm_fast.landscape import classify, curvature_unit, escape, smallest_curvature, spectrum
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solving import solve
from ufm_fast.targets import TargetSets
from ufm_fast.theory.certificates import certify

_MU = {"lambda_w": 2e-3, "lambda_h": 5e-4}  # mu = 1e-3, and unequal, so that balancing matters
_LOSSES = ["ce", "mse", "focal"]
_SHAPES = [
    {"layers": 2, "activation": "relu", "lambda_hidden": 3e-3},
    {"layers": 3, "widths": [5, 4, 6]},
    {"constraint": "sphere", "temperature": 2.5},
    {"freeze": "w", "bias": "free"},
    {"freeze": "h", "lambda_w": 1e-2},
    {"bias": "penalised", "lambda_b": 0.1},
]
_CASES = [
    {"loss": loss, **shape}
    for shape in _SHAPES
    for loss in _LOSSES
    if loss == "ce" or "constraint" not in shape
]


def at_zero(objective: Objective) -> Point:
    return random_point(objective, 0).zeros()


def embedded(objective: Objective, s: torch.Tensor) -> Point:
    """Factors that are all diagonal with the entries s, in balanced variables: orthogonal frames of
    the classes.
    """
    x = at_zero(objective)
    for part in x.parts():
        part[range(len(s)), range(len(s))] = s
    return x


def frame_roots(M: int, K: int, n: int, mu: float) -> tuple[float, float]:
    """Singular values of the balanced factors at both critical frames of squared error behind M - 1
    linear layers: those of x^(M-1) / (x^M + 1)^2 = beta, the minimum and the saddle that parts it
    from zero.
    """
    N, P = K * n, M + 1
    beta = (mu**P * N ** (M + 1)) ** (1 / M) / n

    def logits(low: float, high: float) -> float:
        def excess(x: float) -> float:
            return x ** (M - 1) / (x**M + 1) ** 2 - beta

        rising = excess(low) < 0
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if (excess(middle) < 0) == rising else (low, middle)
        t = low**M
        return math.sqrt(n) * t / (1 + t)

    top = ((M - 1) / (M + 1)) ** (1 / M)  # of x^(M-1) / (x^M + 1)^2
    return logits(top, 1 / beta) ** (1 / P), logits(1e-12, top) ** (1 / P)


@pytest.mark.parametrize("shape", _CASES, ids=str)
def test_lanczos_finds_the_smallest_of_all_eigenvalues(shape: dict) -> None:
    objective = Objective(Problem(counts=[3, 1, 2, 2], dim=5, **shape))
    x = objective.geometry.project(random_point(objective, 1))
    values = spectrum(objective, x)
    found = smallest_curvature(objective, x, max_products=400, thorough=True)
    assert found.eigenvalue == pytest.approx(float(values[0]), abs=1e-8 * float(values.abs().max()))
    assert found.lower_bound <= float(values[0]) + 1e-10
    assert found.largest <= float(values[-1]) * (1 + 1e-12)
    v = found.vector
    assert objective.geometry.tangent(x, v).axpy(-1.0, v).norm() < 1e-13
    assert objective.hvp(x, v).axpy(-found.eigenvalue, v).norm() == pytest.approx(
        found.residual, abs=1e-13
    )
    few = smallest_curvature(objective, x, max_products=12, failure_probability=0.5)
    assert few.eigenvalue >= float(values[0]) - 1e-12  # a Rayleigh quotient
    assert few.lower_bound <= float(values[0])
    # A quarter of the probability at either end: what 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)) = 1/4
    # says of the least.
    missed = (math.log(4 * 1.648 * math.sqrt(values.numel())) / (2 * few.products - 3)) ** 2
    assert few.exhausted or few.lower_bound <= few.eigenvalue - missed * (
        few.largest - few.eigenvalue
    )


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        ({"classes": 1000, "loss": "ce"}, 1.0),
        ({"classes": 1000, "loss": "mse"}, 1.0),
        ({"classes": 50, "loss": "ce", "smoothing": 0.2}, 0.8),
        ({"classes": 200, "loss": "focal", "gamma": 2.0}, None),
    ],
    ids=str,
)
def test_the_zero_point_is_a_saddle_of_known_curvature(shape: dict, weight: float | None) -> None:
    problem = Problem(dim=64, per_class=3, lambda_w=4e-4, lambda_h=1e-4, **shape)
    K, N = problem.num_classes, problem.num_samples
    if weight is None:
        p = 1 / K
        weight = (1 - p) ** 2 - 2 * p * (1 - p) * math.log(p)
    objective = Objective(problem)
    found = classify(objective, at_zero(objective))
    exact = problem.mu - weight * math.sqrt(3) / N
    assert found.curvature.eigenvalue == pytest.approx(exact, rel=1e-8)
    assert found.curvature.products <= 60
    assert exact < 0
    assert found.classification == "strict saddle"


@pytest.mark.parametrize("variables", ["balanced", "raw"])
def test_saddles_of_classes_left_at_zero(variables: str) -> None:
    K, d, n, kept = 5, 7, 4, 2
    problem = Problem(classes=K, dim=d, per_class=n, loss="mse", **_MU)
    objective, N = Objective(problem, variables=variables), K * n
    balanced = Objective(problem)
    s = torch.full((kept,), math.sqrt(math.sqrt(n) - N * problem.mu), dtype=torch.float64)
    model = balanced.to_model(embedded(balanced, s))
    x = objective.from_model(model.W, model.H, None)
    found = classify(objective, x)
    h, G = problem.lambda_h, 1 / math.sqrt(n * K * K)
    if variables == "raw":  # one row a class: lambda_h -> n lambda_h, |G| -> sqrt(n) |G|
        h, G = n * h, math.sqrt(n) * G
        mean, half = (problem.lambda_w + h) / 2, (problem.lambda_w - h) / 2
        exact = mean - math.hypot(half, G)
    else:
        exact = problem.mu - G
    assert found.classification == "strict saddle"
    assert found.curvature.eigenvalue == pytest.approx(exact, rel=1e-8)
    values = spectrum(objective, x)
    assert int((values < exact * (1 - 1e-8)).sum()) == (K - kept) * (d - kept)
    below = objective.value_and_grad(escape(objective, x, found.curvature)).value
    assert below < found.value - 1e-3


def test_a_solution_of_low_rank_padded_is_a_saddle_of_mu_times_one_minus_the_spectral_ratio() -> (
    None
):
    narrow, wide = (Problem(counts=[50, 20, 10, 5, 2], dim=d, **_MU) for d in (2, 6))
    model = solve(narrow, metrics=False, certificate=False).point
    objective = Objective(wide)
    x = objective.from_model(
        *(torch.nn.functional.pad(part, (0, 4)) for part in (model.W, model.H)), None
    )
    ratio = certify(wide, objective.rows, objective.to_model(x)).spectral_ratio
    found = classify(objective, x)
    assert ratio is not None
    assert ratio > 1.5
    assert found.classification == "strict saddle"
    assert found.curvature.eigenvalue == pytest.approx(wide.mu * (1 - ratio), rel=1e-8)
    down = solve(
        wide, initial=objective.to_model(escape(objective, x, found.curvature)), metrics=False
    )
    assert down.value < found.value
    assert down.certificate is not None
    assert down.certificate.certified


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize(
    "data", [{"classes": 6, "per_class": 5}, {"counts": [50, 20, 10, 5, 2]}], ids=str
)
def test_certified_minima_curve_up(loss: str, data: dict) -> None:
    problem = Problem(dim=8, loss=loss, **data, **_MU)
    objective, model = Objective(problem), solve(problem, metrics=False, certificate=False).point
    x = objective.from_model(model.W, model.H, None)
    found = classify(objective, x)
    assert found.classification == "global minimum (certified)"
    assert -1e-9 * problem.mu <= found.curvature.eigenvalue <= 1e-7 * problem.mu
    if data.get(
        "classes"
    ):  # a simplex of rank K - 1, or a frame of rank K: exactly its rotations leave zeros
        r, d = (6 if loss == "mse" else 5), 8
        values = spectrum(objective, x)
        zeros = values.abs() < 1e-7 * problem.mu
        assert int(zeros.sum()) == r * (2 * d - r - 1) // 2
        assert float(values[~zeros].min()) > 1e-2 * problem.mu
    with pytest.raises(InputError, match=r"no step along the vector|the curvature is"):
        escape(objective, x, found.curvature)


def test_what_is_left_of_a_gradient_is_no_saddle() -> None:
    objective = Objective(Problem(classes=4, dim=6, per_class=5, **_MU))
    model = solve(objective.problem, metrics=False, certificate=False).point
    x = objective.from_model(model.W, model.H, None).scale(1 - 1e-7)
    found = classify(objective, x)
    assert (
        found.curvature.eigenvalue < -1e-8 * objective.problem.mu
    )  # along rotations, by the gradient alone
    assert found.classification == "global minimum (certified)"


def test_rows_of_several_targets_and_rows_of_samples() -> None:
    sets = TargetSets.create([0, 1, 2, 3, 5], [0, 1, 2, 0, 1], 3, [4, 4, 4, 2])
    problem = Problem(target_sets=sets, dim=5, loss="pick-all", **_MU)
    for reduce in ("classes", "none"):
        objective = Objective(problem, reduce=reduce)
        model = solve(problem, reduce=reduce, metrics=False, certificate=False).point
        found = classify(objective, objective.from_model(model.W, model.H, None))
        assert found.classification == "global minimum (certified)"
        assert abs(found.curvature.eigenvalue) < 1e-9 * problem.mu
        assert classify(objective, at_zero(objective)).classification == "strict saddle"


@pytest.mark.parametrize("M", [2, 3])
def test_layers_rotate_too_and_zero_is_a_strict_minimum(M: int) -> None:
    K, d, n = 3, 5, 10
    problem = Problem(
        classes=K, dim=d, per_class=n, loss="mse", layers=M, lambda_w=1e-3, lambda_h=4e-3
    )
    objective = Objective(problem)
    zero = classify(objective, at_zero(objective))
    assert zero.classification == "no negative curvature found"
    assert zero.curvature.eigenvalue == pytest.approx(problem.mu, rel=1e-12)
    minimum, saddle = frame_roots(M, K, n, problem.mu)
    x = embedded(objective, torch.full((K,), minimum, dtype=torch.float64))
    found = classify(objective, x)
    assert found.relative_gradient < 1e-9
    assert found.curvature.eigenvalue >= -1e-9 * problem.mu
    values = spectrum(objective, x)
    assert int((values.abs() < 1e-8 * problem.mu).sum()) == M * K * (2 * d - K - 1) // 2
    # Between zero and the minimum lies a saddle: along the rays of the frames the value has its
    # maximum there.
    x = embedded(objective, torch.full((K,), saddle, dtype=torch.float64))
    found = classify(objective, x)
    assert found.classification == "strict saddle"
    assert found.curvature.eigenvalue == pytest.approx(float(spectrum(objective, x)[0]), rel=1e-8)
    assert objective.value_and_grad(escape(objective, x, found.curvature)).value < found.value


def test_at_a_kink_the_value_has_a_say() -> None:
    K, d, n = 3, 5, 10
    problem = Problem(
        classes=K,
        dim=d,
        per_class=n,
        loss="mse",
        layers=2,
        activation="relu",
        lambda_w=1e-3,
        lambda_h=4e-3,
    )
    objective = Objective(problem)
    minimum, saddle = frame_roots(2, K, n, problem.mu)
    x = embedded(objective, torch.full((K,), minimum, dtype=torch.float64))
    found = classify(objective, x)
    assert found.classification == "no negative curvature found"
    assert found.kinks == K * (d - 1)  # all inputs but that of each class's own unit
    assert "active piece" in found.note
    x = embedded(objective, torch.full((K,), saddle, dtype=torch.float64))
    found = classify(objective, x)
    assert found.classification == "strict saddle"
    assert "the value falls" in found.note
    smooth = classify(objective.rounded(1e-2), x)
    assert smooth.kinks == 0
    assert smooth.note == ""


def test_negative_curvature_that_ends_at_a_kink_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    K, d = 4, 6
    problem = Problem(
        classes=K, dim=d, per_class=1, layers=2, activation="relu", lambda_w=2**-10, lambda_h=2**-10
    )
    objective = Objective(problem)

    def slope(
        q: float,
    ) -> (
        float
    ):  # of the value at three simplices of that size, whose logits are q^3 (1 - 1/K) (I - J/K)
        off = 1 / (math.exp(q**3 * (1 - 1 / K)) + K - 1)
        return problem.mu * q - off * q**2 * (1 - 1 / K)

    low, high = 1.0, 10.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    x, simplex = at_zero(objective), torch.eye(K, dtype=torch.float64) - 1 / K
    for part in x.parts():
        part[:K, :K] = low * simplex
    # Two units see nothing but rounding, which switches them on for some classes and off for
    # others, as no weights can.
    x.hidden[0][K:] = 1e-12 * torch.randn(
        d - K, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    found = classify(objective, x)
    assert found.kinks == K * (d - K)
    assert found.relative_gradient < 1e-10
    assert (
        abs(found.curvature.eigenvalue) < 1e-9 * problem.mu
    )  # of the piece on which those units rest
    assert found.classification == "no negative curvature found"
    monkeypatch.setattr(Objective, "resting", lambda objective, part: objective)
    found = classify(objective, x)
    assert found.curvature.eigenvalue == pytest.approx(-problem.mu / 3, rel=1e-8)
    assert found.classification == "no negative curvature found"
    assert "does not fall" in found.note
    with pytest.raises(InputError, match="no step along the vector"):
        escape(objective, x, found.curvature)


@pytest.mark.parametrize("aligned", [True, False])
def test_collapsed_spheres_are_a_saddle(aligned: bool) -> None:
    K, d, t = 6, 5, 3.0
    objective = Objective(Problem(classes=K, dim=d, constraint="sphere", temperature=t))
    u, v = torch.nn.functional.normalize(
        torch.randn(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    x = Point(u.expand(K, d).clone(), (u if aligned else v).expand(K, d).clone())
    found = classify(objective, x)
    assert found.value == pytest.approx(math.log(K), rel=1e-12)
    assert found.classification == "strict saddle"
    assert found.curvature.eigenvalue == pytest.approx(-t / K, rel=1e-8)
    values = spectrum(objective, x)
    assert values.numel() == 2 * K * (d - 1)
    across = d - 1 if aligned else d - 2  # dimensions orthogonal to both vectors
    assert int((values < -t / K * (1 - 1e-8)).sum()) == (K - 1) * across
    there = escape(objective, x, found.curvature)
    assert objective.value_and_grad(there).value < found.value - 0.1
    assert float((there.W.norm(dim=1) - 1).abs().max()) < 1e-12


def test_the_simplex_on_spheres_has_its_rotations_zeros() -> None:
    K, d = 4, 6
    objective = Objective(Problem(classes=K, dim=d, constraint="sphere", temperature=5.0))
    simplex = torch.linalg.eigh(torch.eye(K, dtype=torch.float64) - 1 / K).eigenvectors[:, 1:]
    code = torch.nn.functional.pad(torch.nn.functional.normalize(simplex), (0, d - K + 1))
    values = spectrum(objective, Point(code, code.clone()))
    r = K - 1
    assert int((values.abs() < 1e-12).sum()) == r * (2 * d - r - 1) // 2
    assert float(values[0]) > -1e-12


def test_away_from_critical_points_nothing_is_claimed() -> None:
    objective = Objective(Problem(classes=4, dim=6, **_MU))
    found = classify(objective, random_point(objective, 1))
    assert found.classification == "not critical"
    assert found.certificate is None


def test_a_frozen_factor_does_not_move() -> None:
    problem = Problem(counts=[5, 3, 2], dim=6, freeze="w", **_MU)
    objective = Objective(problem)
    model = solve(problem, metrics=False).point
    found = classify(objective, objective.from_model(model.W, model.H, None))
    assert not found.curvature.vector.W.any()
    assert found.curvature.eigenvalue == pytest.approx(
        curvature_unit(objective), rel=1e-9
    )  # W has no say in its null space
    assert found.classification == "global minimum (certified)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_products": 1}, "max_products"),
        ({"max_products": 2.5}, "max_products"),
        ({"tol": 0.0}, "tol"),
        ({"tol": math.nan}, "tol"),
    ],
    ids=str,
)
def test_bad_input(change: dict, words: str) -> None:
    objective = Objective(Problem(classes=3, dim=2))
    with pytest.raises(InputError, match=words):
        classify(objective, random_point(objective, 1), **change)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(Problem(classes=3, dim=2))
    x = random_point(objective, 1)
    with pytest.raises(InputError, match="failure_probability"):
        smallest_curvature(objective, x, failure_probability=1.0)
    with pytest.raises(InputError, match="finite"):
        classify(objective, x.scale(math.inf))
    monkeypatch.setattr("ufm_fast.landscape.curvature.available_bytes", lambda device: 64)
    with pytest.raises(InputError, match="max_products"):
        smallest_curvature(objective, x)
    wide = Objective(Problem(classes=50, dim=64))
    with pytest.raises(InputError, match="5000"):
        spectrum(wide, random_point(wide, 1))
