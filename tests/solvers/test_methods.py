"""Solvers are held to theory: the value they reach, by every method, from every start; and they say
how they ended.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from named_problems import CASES, PENALTIES, build
from strategies import random_point, relative

from ufm_fast import InputError, Outcome, Point, Problem, solve
from ufm_fast.objective import Objective
from ufm_fast.runs.foreign import read_start
from ufm_fast.solvers.curvature import sets as set_models
from ufm_fast.solvers.curvature import squares
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.minimise import log_spaced, minimise
from ufm_fast.solvers.options import SolveOptions
from ufm_fast.solvers.table import METHODS
from ufm_fast.starts import STARTS, make_start
from ufm_fast.tall import polar_factor
from ufm_fast.targets import Targets, TargetSets
from ufm_fast.theory import closed_form


@pytest.mark.parametrize("start", ["spectral", "normal"])
@pytest.mark.parametrize("name", CASES)
def test_the_default_method_reaches_the_theoretical_minimum(name, start):
    problem = build(name)
    theory = closed_form(problem)
    solution = solve(problem, start=start, metrics=False)
    assert solution.success, solution.message
    assert solution.method.startswith("auto")
    assert solution.value == pytest.approx(theory.value, rel=1e-9)
    assert solution.value >= theory.value * (1 - 1e-12)
    assert solution.certificate.lower_bound <= theory.value * (1 + 1e-12)
    if problem.dim >= problem.num_classes:
        assert solution.certificate.kind == "exact"
        assert solution.certificate.relative_gap <= 1e-7


@pytest.mark.parametrize(
    "method",
    ["gd", "momentum", "nesterov", "sign", "spectral", "adam", "lbfgs", "newton-cg", "alternating"],
)
@pytest.mark.parametrize("variables", ["balanced", "raw"])
def test_every_method_reaches_the_same_minimum(method, variables):
    loss = "mse" if method == "alternating" else "ce"
    problem = Problem(classes=4, dim=5, per_class=3, loss=loss, lambda_w=0.02, lambda_h=0.01)
    tol = 1e-3 if method in ("gd", "sign", "spectral", "adam") else 1e-6
    options = {"learning_rate": 1e-3} if method == "adam" else {}
    solution = solve(
        problem,
        method=method,
        variables=variables,
        start="normal",
        tol=tol,
        metrics=False,
        **options,
    )
    assert solution.outcome is Outcome.CONVERGED, solution.message
    assert solution.value == pytest.approx(
        closed_form(problem).value, rel=1e-4 if tol > 1e-4 else 1e-9
    )
    assert solution.method == method


def test_steps_by_signs_and_by_polar_factors():
    problem = Problem(counts=[5, 3, 2, 1], dim=6, bias="free", lambda_w=0.01, lambda_h=0.01)
    objective = Objective(problem)
    point = random_point(objective, 0)
    gradient = objective.value_and_grad(point).gradient

    def polar(G):
        U, _, Vh = torch.linalg.svd(G if G.ndim == 2 else G[:, None], full_matrices=False)
        return (U @ Vh).reshape(G.shape)

    for name, direction in (("sign", torch.sign), ("spectral", polar)):
        solver = METHODS[name].make(problem, SolveOptions(method=name, learning_rate=0.01))
        state = solver.step(objective, solver.init(objective, point))
        assert relative(state.point, point.axpy(-0.01, gradient.map(direction))) < 1e-13
    assert float(polar_factor(torch.zeros(3, 2)).abs().max()) == 0.0


@pytest.mark.parametrize("bias", ["none", "penalised", "free"])
def test_alternating_takes_any_counts_and_bias(bias):
    problem = Problem(
        counts=[9, 5, 2, 1],
        dim=6,
        loss="mse",
        bias=bias,
        lambda_b=0.1 if bias == "penalised" else 0.0,
        **PENALTIES,
    )
    solution = solve(problem, method="alternating", start="normal", tol=1e-8)
    assert solution.value == pytest.approx(closed_form(problem).value, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_method_returns_its_point(name):
    problem = build(name)
    solution = solve(problem, method="closed-form")
    assert solution.method == "closed-form"
    assert solution.evaluations == 1
    assert solution.value == pytest.approx(closed_form(problem).value, rel=1e-12)


def test_no_closed_form_is_said_so():
    with pytest.raises(InputError, match="no closed form is known"):
        solve(Problem(counts=[5, 3, 2, 1], dim=6), method="closed-form")


@pytest.mark.parametrize("reduce", ["classes", "none"])
def test_reduction_does_not_change_the_minimum(reduce):
    problem = Problem(counts=[5, 3, 2, 1], dim=6, lambda_w=0.02, lambda_h=0.01)
    solution = solve(problem, reduce=reduce)
    assert solution.value == pytest.approx(solve(problem).value, rel=1e-10)
    assert solution.certificate.relative_gap < 1e-7
    assert solution.lifted().H.shape == (11, 6)


@pytest.mark.parametrize("freeze", ["w", "h"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_frozen_factor_stays_and_the_other_is_certified(freeze, loss):
    problem = Problem(
        classes=5, dim=6, per_class=2, loss=loss, freeze=freeze, lambda_w=0.01, lambda_h=0.02
    )
    start = solve(problem, max_steps=0, start="normal", metrics=False)
    solution = solve(problem, start="normal", metrics=False, tol=1e-11)
    kept = (start.point.W, solution.point.W) if freeze == "w" else (start.point.H, solution.point.H)
    assert torch.equal(*kept)
    assert solution.certificate.certified
    assert solution.value < start.value
    assert not start.certificate.certified


def test_frozen_features_are_not_merged():
    with pytest.raises(InputError, match="freeze h"):
        solve(Problem(classes=3, dim=4, freeze="h"), reduce="classes")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_stalls_or_converges_near_the_minimum(dtype):
    problem = Problem(classes=10, dim=12, dtype=dtype, **PENALTIES)
    solution = solve(problem, start="normal")
    assert solution.success
    assert solution.value == pytest.approx(
        closed_form(problem).value, rel=1e-5 if dtype == "float32" else 3e-2
    )
    assert solution.certificate.relative_gap < (1e-3 if dtype == "float32" else 0.2)


def test_paired_preconditioner_saves_most_of_the_steps():
    counts = torch.logspace(0, math.log10(300), 60).round().long()
    problem = Problem(counts=counts, dim=64, lambda_w=1e-3, lambda_h=1e-3 / int(counts.sum()))
    used = {}
    for precondition in (True, False):
        objective = Objective(problem)
        x = make_start(objective, "spectral")
        run = minimise(objective, LBFGS(precondition=precondition), x, tol=1e-9)
        assert run.outcome is Outcome.CONVERGED
        used[precondition] = objective.evaluations
    assert used[True] < 0.7 * used[False]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loss", ["ce", "mse", "pick-all"])
def test_starts_have_the_right_shape_and_repeat(start, loss):
    problem = Problem(classes=6, dim=5, loss=loss, bias="penalised", lambda_b=0.1, seed=3)
    first, second = (make_start(Objective(problem), start) for _ in range(2))
    assert first.W.shape == (6, 5)
    assert first.H.shape == (6, 5)
    assert relative(first, second) == 0.0
    assert first.finite()


def test_balanced_start_is_balanced():
    x = make_start(Objective(Problem(classes=9, dim=4)), "balanced")
    torch.testing.assert_close(x.W.T @ x.W, x.H.T @ x.H)


def test_spectral_start_is_the_minimiser_for_equal_counts():
    problem = Problem(classes=9, dim=11, per_class=2)
    objective = Objective(problem)
    assert objective.value_and_grad(make_start(objective, "spectral")).value == pytest.approx(
        closed_form(problem).value, rel=1e-13
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sgd"}, "method must be one of"),
        ({"method": "alternating"}, "goes with the squared error"),
        ({"start": "zero"}, "start must be one of"),
        ({"reduce": "all"}, "reduce must be"),
        ({"variables": "log"}, "variables must be"),
        ({"backend": "cuda"}, "backend must be"),
        ({"tol": 0.0}, "tol must lie"),
        ({"max_steps": -1}, "max_steps must be"),
        ({"log_every": 0}, "log_every must be"),
        ({"learning_rate": 0.1}, "learning_rate goes with"),
        ({"method": "gd", "learning_rate": -1.0}, "learning_rate must be > 0"),
        ({"method": "momentum", "momentum": 1.0}, "momentum must lie"),
        ({"method": "gd", "history": 3}, "history goes with"),
        ({"method": "gd", "learning_rate": float("inf")}, "learning_rate must be a finite number"),
        ({"history": 1.5}, "history must be a whole number"),
        ({"history": 0}, "history must be at least 1"),
        ({"tol": "a"}, "tol must be a number"),
        ({"max_steps": "a"}, "max_steps must be a whole number"),
        ({"max_steps": 2.5}, "max_steps must be a whole number"),
        ({"log_every": 1.5}, "log_every must be a whole number"),
        ({"initial": (1, 2)}, "initial must be a Point of torch tensors"),
        ({"initial": Point([[0.0]], [[0.0]])}, "initial must be a Point of torch tensors"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words):
        solve(Problem(classes=3, dim=3), **options)


def test_solve_takes_problems_only():
    with pytest.raises(InputError, match="problem must be a Problem, got int"):
        solve(5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_first_order_methods_stall_at_the_rounding_of_their_dtype(dtype):
    problem = Problem(classes=6, dim=8, lambda_w=0.01, lambda_h=0.01, dtype=dtype)
    solution = solve(
        problem, start="normal", method="momentum", metrics=False, tol=1e-12, max_steps=4000
    )
    assert solution.outcome is Outcome.STALLED
    assert solution.value == pytest.approx(
        solution.theory.value, rel=1e-2 if dtype == "bfloat16" else 1e-5
    )


@pytest.mark.parametrize("method", ["gd", "momentum", "adam"])
def test_steps_too_small_to_see_are_no_stall_at_rounding(method):
    solution = solve(
        Problem(classes=4, dim=5), start="normal", method=method, learning_rate=1e-16, max_steps=700
    )
    assert solution.outcome is Outcome.MAX_STEPS
    assert solution.gradient_norm > 0.01


@pytest.mark.parametrize(
    ("W", "H", "b", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), None, "start's W must have shape"),
        (torch.zeros(3, 3), torch.zeros(4, 3), None, "start's H must have shape"),
        (torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3), "has a bias b"),
        (torch.full((3, 3), float("nan")), torch.zeros(3, 3), None, "NaN or infinite"),
        (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3), None, "floating-point"),
        (torch.zeros(3, 3), torch.zeros(3, 3).to(torch.float8_e4m3fn), None, "16 bits"),
    ],
)
def test_bad_starts_are_named(W, H, b, words):
    with pytest.raises(InputError, match=words):
        solve(Problem(classes=3, dim=3), initial=Point(W, H, b))


def test_start_files(tmp_path):
    import numpy as np
    from safetensors.torch import save_file

    arrays = {"W": torch.ones(3, 2), "H": torch.zeros(3, 2)}
    save_file(arrays, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{k: v.numpy() for k, v in arrays.items()})
    for name in ("a.safetensors", "a.npz"):
        assert torch.equal(read_start(tmp_path / name).W, arrays["W"])
        (tmp_path / "short").with_suffix((tmp_path / name).suffix).write_bytes(
            (tmp_path / name).read_bytes()[:40]
        )
    for name, words in (
        ("short.npz", "short.npz"),
        ("short.safetensors", "short.safetensors"),
        ("no.npz", "no.npz"),
    ):
        with pytest.raises(InputError, match=words):
            read_start(tmp_path / name)
    save_file({"W": torch.ones(3, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="lacks H"):
        read_start(tmp_path / "b.safetensors")


def test_interrupt_returns_the_latest_point():
    def stop(record, point):
        if record.step >= 3:
            raise KeyboardInterrupt

    solution = solve(
        Problem(counts=[5, 3, 2, 1], dim=6), start="normal", on_log=stop, method="gd", max_steps=50
    )
    assert solution.outcome is Outcome.INTERRUPTED
    assert not solution.success
    assert solution.steps == 3
    assert solution.point.finite()


def test_max_steps_and_divergence_are_outcomes():
    problem = Problem(classes=4, dim=4)
    assert solve(problem, method="gd", max_steps=2, start="normal").outcome is Outcome.MAX_STEPS
    mse = Problem(classes=4, dim=4, loss="mse")
    assert (
        solve(mse, method="gd", learning_rate=1e6, start="normal", max_steps=200).outcome
        is Outcome.DIVERGED
    )


def test_log_points_are_log_spaced_and_history_ends_at_the_last_step():
    points = log_spaced(per_decade=5)
    assert [next(points) for _ in range(8)] == [0, 1, 2, 3, 4, 6, 10, 16]
    solution = solve(
        Problem(classes=4, dim=4), method="gd", max_steps=37, start="normal", log_every=10
    )
    assert [r.step for r in solution.history] == [0, 10, 20, 30, 37]


def test_make_solver_knows_every_method():
    mse = Problem(classes=3, dim=3, loss="mse")
    for name in METHODS:
        assert METHODS[name].make(mse, SolveOptions(method=name)).max_steps > 0


@pytest.mark.parametrize("bias", ["none", "penalised", "free"])
@pytest.mark.parametrize("lam", [1e-5, 1e-7])
def test_squared_error_with_tiny_penalties_reaches_its_minimum_from_a_random_start(lam, bias):
    """The minimum falls with lambda: the value must not be a difference of O(1) terms there."""
    penalties = {"lambda_w": lam, "lambda_h": lam, "lambda_b": lam if bias == "penalised" else 0.0}
    problem = Problem(counts=[100, 20, 5], dim=8, loss="mse", bias=bias, **penalties)
    solution = solve(problem, start="normal", metrics=False)
    assert solution.success
    assert solution.value == pytest.approx(solution.theory.value, rel=1e-12)
    assert solution.certificate.value == pytest.approx(solution.value, rel=1e-12)
    assert solution.certificate.relative_gap < 1e-9
    assert solution.certificate.lower_bound <= solution.theory.value * (1 + 1e-14)


@pytest.mark.parametrize("penalty", [1e-4, 1.0, 100.0])
def test_a_bias_penalty_of_any_size_costs_few_evaluations(penalty):
    """The balanced variables scale the bias too; unscaled, the last of these took 4,571
    evaluations.
    """
    settings = {
        "counts": [7, 0, 3, 0, 2],
        "dim": 5,
        "lambda_w": 1e-6,
        "lambda_h": 1e-5,
        "bias": "penalised",
    }
    found = solve(Problem(**settings, lambda_b=penalty), start="normal", metrics=False)
    assert found.success
    assert found.certificate.relative_gap < 1e-9
    assert found.evaluations < 200


def test_newton_takes_over_where_lbfgs_takes_too_long():
    """Smoothing with d = K and small penalties: L-BFGS alone was not there after 20,000 steps."""
    found = solve(
        Problem(classes=5, dim=5, per_class=3, smoothing=0.1, lambda_w=1e-6, lambda_h=1e-5),
        start="normal",
        metrics=False,
    )
    assert found.success
    assert found.certificate.relative_gap < 1e-9
    assert found.steps < 700


def test_the_closed_form_takes_no_start():
    problem = Problem(classes=4, dim=6)
    start = solve(problem, metrics=False).point
    for given in ({"initial": start}, {"start": "normal"}):
        with pytest.raises(InputError, match="closed form has none"):
            solve(problem, method="closed-form", **given)


def _sets(seed: int, classes: int, rows: int) -> TargetSets:
    """Random target sets of one to three classes, each some dozen times."""
    make = np.random.default_rng(seed)
    sets = [
        np.sort(make.choice(classes, size=int(make.integers(1, 4)), replace=False))
        for _ in range(rows)
    ]
    return TargetSets.create(
        np.cumsum([0, *map(len, sets)]), np.concatenate(sets), classes, make.integers(1, 50, rows)
    )


@pytest.mark.parametrize("bias", ["none", "penalised", "free"])
def test_the_preconditioner_of_several_targets_inverts_what_it_says(bias: str) -> None:
    """mu + J'J, with J from the differential of the logits, row by row."""
    penalty = 0.3 if bias == "penalised" else 0.0
    problem = Problem(
        target_sets=_sets(1, 7, 6),
        loss="pick-all",
        dim=5,
        bias=bias,
        lambda_w=0.02,
        lambda_h=0.01,
        lambda_b=penalty,
    )
    objective = Objective(problem)
    assert set_models.Sets().serves(objective)
    x = make_start(objective, "normal", seed=2)
    v, targets = make_start(objective, "normal", seed=3), objective.targets
    if v.b is not None:
        v = Point(v.W, v.H, torch.linspace(-1, 1, len(v.b)).double())

    def logits(*parts: torch.Tensor) -> torch.Tensor:
        head = objective.head_input(Point(*parts))
        return head.features @ head.weight.T + (0 if head.bias is None else head.bias)

    z = logits(*x.parts())
    dz = (
        logits(*x.axpy(1.0, v).parts()) - logits(*x.axpy(-1.0, v).parts())
    ) / 2  # they are bilinear
    force = torch.zeros_like(z)
    for r in range(targets.rows):
        own = targets.indices[targets.indptr[r] : targets.indptr[r + 1]]
        if len(own) > 1:
            p = torch.softmax(z[r, own], 0)
            force[r, own] = objective.row_weight[r] * len(own) * p * (dz[r, own] - p @ dz[r, own])
    product = Point(*torch.func.vjp(logits, *x.parts())[1](force)).axpy(problem.mu, v)
    found = set_models.TargetPreconditioner.build(objective, x).apply(product)
    for a, b in zip(found.parts(), v.parts(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [4, 24, 25])
def test_several_targets_at_small_penalties_take_hundreds_of_evaluations(seed: int) -> None:
    """Without the preconditioner 3,000 to 5,000."""
    problem = Problem(
        target_sets=_sets(seed, 32, 12),
        loss="pick-all",
        dim=32,
        bias="penalised",
        lambda_b=30.0,
        lambda_w=4e-6,
        lambda_h=4e-6,
    )
    solution = solve(problem, metrics=False)
    assert solution.success
    assert solution.certificate.relative_gap < 1e-9
    assert solution.evaluations < 1500


def test_where_several_targets_are_not_preconditioned(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {
        "target_sets": _sets(1, 7, 6),
        "loss": "pick-all",
        "dim": 5,
        "lambda_w": 0.02,
        "lambda_h": 0.01,
    }
    assert not set_models.Sets().serves(Objective(Problem(**sets), variables="raw"))
    assert not set_models.Sets().serves(Objective(Problem(**sets, freeze="w")))
    assert not set_models.Sets().serves(
        Objective(Problem(classes=4, dim=5, lambda_w=0.02, lambda_h=0.01))
    )
    single = TargetSets.create(np.arange(4), np.arange(3), 4, np.ones(3, dtype=np.int64))
    assert not set_models.Sets().serves(Objective(Problem(**{**sets, "target_sets": single})))
    monkeypatch.setattr(set_models, "MOST_ENTRIES", 3)
    assert not set_models.Sets().serves(Objective(Problem(**sets)))


@pytest.mark.parametrize("method", ["auto", "newton-cg"])
def test_targets_that_coincide_leave_nothing_to_invert_and_no_traceback(method: str) -> None:
    """Equal classes and huge factors: the centred inner products are rounding alone."""
    sets = TargetSets.create([0, 2, 4], [0, 1, 0, 1], 4, [303761, 109674])
    tiny = Problem(
        target_sets=sets,
        classes=4,
        loss="pick-all",
        dim=2,
        lambda_w=1e-12,
        lambda_h=1e-12,
        seed=187,
    )
    assert solve(tiny, method=method, start="normal", metrics=False, max_steps=40).steps > 0
    single = Problem(
        target_sets=_sets(3, 9, 8),
        loss="pick-all",
        dim=6,
        lambda_w=1e-5,
        lambda_h=1e-5,
        dtype="float32",
    )
    W = 1e3 * torch.ones(single.num_classes, 6)
    start = Point(W, 1e-3 * torch.ones(single.num_samples, 6), None)
    assert solve(single, method=method, initial=start, metrics=False, max_steps=20).steps > 0


def test_a_model_that_costs_more_than_it_saves_is_not_made() -> None:
    for rows, expected in ((400, 0), (50, 150)):
        targets = Targets(torch.arange(3 * rows) % 12, torch.arange(0, 3 * rows + 1, 3))
        assert set_models.entries(targets, 12, 4) == expected


@pytest.mark.parametrize(
    ("counts", "dim", "bias", "reduce"),
    [
        ([3, 1, 2], 5, "free", "classes"),
        ([3, 1, 2], 2, "penalised", "classes"),
        ([3, 1, 2, 5], 3, "none", "none"),
        ([2, 0, 3], 4, "free", "classes"),
        ([4] * 5, 3, "penalised", "none"),
    ],
)
def test_the_preconditioner_of_the_squared_error_inverts_its_gauss_newton_matrix(
    counts, dim, bias, reduce
):
    lambda_b = 0.3 if bias == "penalised" else 0.0
    problem = Problem(
        counts=counts,
        dim=dim,
        loss="mse",
        bias=bias,
        lambda_w=0.02,
        lambda_h=0.005,
        lambda_b=lambda_b,
    )
    objective = Objective(problem, reduce=reduce)
    x, g = (make_start(objective, "normal", seed=seed) for seed in (1, 2))
    if x.b is not None:
        x, g = (Point(part.W, part.H, torch.randn_like(part.b)) for part in (x, g))

    def logits(W: torch.Tensor, H: torch.Tensor, *b: torch.Tensor) -> torch.Tensor:
        model = objective.to_model(Point(W, H, *b))
        z = model.H @ model.W.T
        return objective.row_weight.sqrt()[:, None] * (z if model.b is None else z + model.b)

    J = torch.cat(
        [
            part.flatten(2).flatten(0, 1)
            for part in torch.autograd.functional.jacobian(logits, tuple(x.parts()))
        ],
        1,
    )
    matrix = 2.0 * problem.mu * torch.eye(J.shape[1], dtype=J.dtype) + J.T @ J
    want = torch.linalg.solve(matrix, torch.cat([part.flatten() for part in g.parts()]))
    found = torch.cat(
        [
            part.flatten()
            for part in squares.SquaredPreconditioner.build(objective, x).apply(g).parts()
        ]
    )
    assert float((found - want).norm() / want.norm()) < 1e-11


def test_balanced_factors_have_the_same_product_and_the_least_squares():
    generator = torch.Generator().manual_seed(3)
    for rows, classes, dim in ((5, 4, 6), (9, 7, 3), (3, 8, 5)):
        W, H = (
            torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (classes, rows)
        )
        found = squares.balance(Point(W, H))
        torch.testing.assert_close(found.H @ found.W.T, H @ W.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.H.T @ found.H, found.W.T @ found.W, rtol=1e-12, atol=1e-12)
        nuclear = float(torch.linalg.svdvals(H @ W.T).sum())
        assert found.norm() ** 2 == pytest.approx(2 * nuclear, rel=1e-12)


@pytest.mark.parametrize("dim", [11, 12])
@pytest.mark.parametrize("penalty", [1e-5, 1e-7])
def test_squared_error_with_small_penalties_takes_about_a_hundred_evaluations(penalty, dim):
    """They took one to six thousand; and d = K - 1 with a bias has all its digits."""
    counts = [3, 100, 30, 1, 5, 1, 5, 1, 100, 100, 2, 1]
    problem = Problem(
        counts=counts, dim=dim, loss="mse", bias="free", lambda_w=penalty, lambda_h=penalty
    )
    found = solve(problem, start="normal", metrics=False)
    assert found.value == pytest.approx(closed_form(problem).value, rel=1e-13)
    assert found.evaluations < 200
    assert found.certificate.relative_gap < 1e-9


@pytest.mark.parametrize("counts", [[3] * 5, [1, 1, 1], [4] * 6, [7, 2, 3, 6, 7, 6, 7, 7, 1, 7, 1]])
@pytest.mark.parametrize("level", [0.01, 0.3])
def test_no_direction_of_the_squared_error_is_put_out_on_the_way(counts, level):
    """A full step of its model from a random start could end at a saddle, with a class left out."""
    mu = level * min(counts) ** 0.5 / sum(counts)
    for seed in range(4):
        problem = Problem(
            counts=counts, dim=len(counts) + 1, loss="mse", lambda_w=mu, lambda_h=mu, seed=seed
        )
        assert solve(problem, start="normal", metrics=False).value == pytest.approx(
            closed_form(problem).value, rel=1e-9
        )


def test_newton_is_not_stalled_where_its_model_still_promises_a_decrease():
    """Six rejected radii in a row were a stall, 4 % above this minimum."""
    problem = Problem(
        counts=[0, 2, 2, 2, 2, 2, 2],
        dim=40,
        loss="mse",
        bias="free",
        lambda_w=1e-10,
        lambda_h=1e-10,
    )
    assert solve(problem, metrics=False).value == pytest.approx(
        closed_form(problem).value, rel=1e-12
    )


def test_autocast_around_a_solve_changes_nothing():
    problem = Problem(counts=[5, 3, 2], dim=4, dtype="float32", lambda_w=1e-2, lambda_h=1e-2)
    plain = solve(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = solve(problem)
        objective = Objective(problem)
        x = objective.from_model(plain.point.W, plain.point.H, None)
        found, product = objective.value_and_grad(x), objective.hvp(x, x)
    assert under.value == plain.value
    assert found.value == pytest.approx(plain.value, rel=1e-6)
    assert product.W.dtype == torch.float32
