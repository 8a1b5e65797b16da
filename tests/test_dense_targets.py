"""Target vectors under squared error: backends, closed form, certificate, metrics, runs and bad
input.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ufm_fast import Problem, solve
from ufm_fast.backends import Gradients, HeadInput, ReferenceBackend, TiledBackend, squared_error
from ufm_fast.cli import main
from ufm_fast.dense_targets import DenseTargets, Spectrum
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.losses import SquaredError
from ufm_fast.metrics.regression import weight_structure
from ufm_fast.nn import UFM
from ufm_fast.plan import make_plan
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.state import load_state, write_state
from ufm_fast.theory import closed_form

LAMBDAS = {"loss": "mse", "lambda_w": 1e-3, "lambda_h": 2e-5}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(N: int, t: int, seed: int = 0) -> torch.Tensor:
    """Rows of a normal distribution whose mean is not zero."""
    return normal(N, t, seed=seed) @ normal(t, t, seed=seed + 1) + 2 * normal(t, seed=seed + 2)


def least(Y: torch.Tensor, dim: int, lambda_w: float, lambda_h: float, *, centred: bool) -> float:
    """The closed form, written out."""
    s = np.linalg.svd((Y - Y.mean(0) if centred else Y).numpy(), compute_uv=False)
    N, tau = len(Y), len(Y) * math.sqrt(lambda_w * lambda_h)
    kept = (np.arange(len(s)) < dim) & (s > tau)
    return float(np.where(kept, tau * s - tau * tau / 2, s * s / 2).sum() / N)


@pytest.mark.parametrize("biased", [True, False])
def test_backends_agree_with_the_definition(biased):
    H, W, Y = normal(7, 4), normal(3, 4, seed=1), normal(7, 3, seed=2)
    b, o = normal(3, seed=3) if biased else None, normal(7, seed=4)
    x = HeadInput(SquaredError(), H, W, b, DenseTargets.of(Y), o)
    v = replace(
        x,
        features=normal(7, 4, seed=5),
        weight=normal(3, 4, seed=6),
        bias=None if b is None else normal(3, seed=7),
    )
    E = H @ W.T + (0 if b is None else b) - Y
    found = []
    for backend in (TiledBackend(), ReferenceBackend()):
        outs = [
            Gradients(
                torch.ones_like(H), torch.ones_like(W), None if b is None else torch.ones_like(b)
            )
            for _ in "gh"
        ]
        value = backend.head(x, outs[0]).value
        backend.head_hvp(x, v, outs[1])
        gradient = backend.logit_gradient(x)
        products = (
            gradient.times(normal(3, 2, seed=8)),
            gradient.transposed_times(normal(7, 2, seed=9)),
        )
        parts = [
            part
            for out in outs
            for part in (out.features, out.weight, out.bias)
            if part is not None
        ]
        found.append([value, *parts, *products, backend.losses(x)])
    for tiled, dense in zip(*found, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-12, atol=1e-12)
    shift = normal(3, seed=10)
    torch.testing.assert_close(squared_error.residual_sum(x), o @ E)
    torch.testing.assert_close(
        squared_error.along_targets(x, shift), (o[:, None] * (E - shift) * Y).sum()
    )


@pytest.mark.parametrize("bias", ["none", "free"])
@pytest.mark.parametrize(("outputs", "dim"), [(1, 1), (1, 6), (5, 2), (5, 9), (50, 20), (50, 60)])
def test_solver_closed_form_and_certificate_meet(outputs, dim, bias):
    Y = correlated(2000, outputs)
    problem = Problem(targets=Y, dim=dim, bias=bias, **LAMBDAS)
    wanted = least(Y, dim, problem.lambda_w, problem.lambda_h, centred=bias == "free")
    found = solve(problem, start="normal")
    assert found.theory.value == pytest.approx(wanted, rel=1e-12)
    assert found.value == pytest.approx(wanted, rel=1e-10)
    assert found.certificate.certified
    assert found.certificate.lower_bound <= wanted
    if outputs <= dim:
        assert max(found.metrics[name] for name in ("nrc1", "nrc2", "nrc3")) < 1e-10
        assert found.certificate.spectral_ratio == pytest.approx(1.0, abs=1e-6)
    if bias == "free":
        torch.testing.assert_close(found.point.b, Y.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", ["none", "free"])
def test_the_closed_forms_point_is_the_minimum_with_merged_rows_and_dropped_directions(bias):
    Y = correlated(30, 4)[torch.arange(90) % 30]
    problem = Problem(targets=Y, loss="mse", dim=6, bias=bias, lambda_w=0.3, lambda_h=0.3 / 9)
    found = solve(problem, method="closed-form")
    assert problem.rows().number == 30
    assert found.certificate.certified
    assert 0 < int(torch.linalg.matrix_rank(found.point.W)) < 4
    assert found.metrics["nrc3"] < 1e-10
    assert solve(problem, reduce="none", start="normal").value == pytest.approx(
        found.value, rel=1e-10
    )
    torch.testing.assert_close(found.lifted().H[:30], found.lifted().H[60:])


def test_a_penalised_bias_is_the_minimum_of_the_convex_problem_in_it():
    Y, lambda_b = correlated(60, 3), 0.05
    problem = Problem(targets=Y, dim=5, bias="penalised", lambda_b=lambda_b, **LAMBDAS)
    found = solve(problem, start="normal")

    def profile(b: np.ndarray) -> float:
        return least(Y - torch.from_numpy(b), 3, 1e-3, 2e-5, centred=False) + lambda_b / 2 * float(
            b @ b
        )

    assert found.certificate.certified
    assert found.theory is None
    assert found.value == pytest.approx(minimize(profile, np.zeros(3), tol=1e-12).fun, rel=1e-9)


@pytest.mark.parametrize("bias", [{}, {"bias": "free"}, {"bias": "penalised", "lambda_b": 0.02}])
def test_one_hot_vectors_are_labels(bias):
    labels = torch.tensor([0, 2, 2, 1, 0, 2, 3, 0, 2])
    common = {"dim": 5, "lambda_w": 0.02, "lambda_h": 0.005, "loss": "mse", **bias}
    named, vectors = (
        Problem(labels=labels, **common),
        Problem(targets=torch.nn.functional.one_hot(labels), **common),
    )
    assert sorted(vectors.rows().counts.tolist()) == sorted(named.rows().counts.tolist())
    found = solve(vectors, start="normal")
    assert found.value == pytest.approx(solve(named).value, rel=1e-11)
    assert found.metrics["nc1_pinv"] == 0.0
    if "lambda_b" not in bias:
        assert closed_form(vectors).value == pytest.approx(closed_form(named).value, rel=1e-13)
    assert (
        Problem(labels=labels, dim=5, loss="mse").lambda_w
        == Problem(targets=torch.nn.functional.one_hot(labels), dim=5, loss="mse").lambda_w
    )


@pytest.mark.parametrize("bias", ["none", "free"])
def test_linear_layers(bias):
    problem = Problem(
        targets=correlated(40, 3),
        dim=4,
        bias=bias,
        layers=2,
        lambda_w=2e-3,
        lambda_h=2e-4,
        loss="mse",
    )
    found = solve(problem, start="orthogonal")
    assert found.value == pytest.approx(found.theory.value, rel=1e-10)
    assert found.certificate.certified
    assert solve(problem, method="closed-form").success
    relu = solve(replace(problem, activation="relu"), start="orthogonal", max_steps=5)
    assert closed_form(relu.problem) is None
    assert relu.certificate.lower_bound <= relu.value


def test_a_frozen_factor_is_certified_and_alternating_least_squares_end_at_the_minimum():
    problem = Problem(targets=correlated(30, 3), dim=5, loss="mse", lambda_w=0.05, lambda_h=0.05)
    assert solve(replace(problem, freeze="h"), start="normal").certificate.certified
    for bias in ("none", "free"):
        found = solve(replace(problem, bias=bias), method="alternating", start="normal")
        assert found.value == pytest.approx(found.theory.value, rel=1e-8)


def test_targets_that_are_all_alike_are_fitted_by_the_bias_alone():
    problem = Problem(targets=torch.tensor([[1.5, -0.3]] * 5), dim=3, loss="mse", bias="free")
    found = solve(problem, start="normal")
    assert found.value == found.theory.value == 0.0
    assert found.point.b.tolist() == pytest.approx([1.5, -0.3])
    assert "the bias alone fits them" in found.notes[0]
    above = solve(replace(problem, bias="none", lambda_w=9.0, lambda_h=9.0))
    assert "would fit more than the mean" in above.notes[0]


def test_structure_of_the_weights_is_the_best_over_all_gamma():
    W, Y = normal(4, 6), correlated(50, 4)
    U, s, Vh = torch.linalg.svd(Y / math.sqrt(50), full_matrices=False)
    gram = W @ W.T / (W @ W.T).norm()

    def distance(g: float) -> float:
        A = Vh.T @ torch.diag((s - g).clamp_min(0)) @ Vh
        return float((gram - A / A.norm()).square().sum())

    grid = np.linspace(0, float(s[0]) * 0.999, 4001)
    found = weight_structure(W, Spectrum(U, s, Vh.T, None))
    assert found == pytest.approx(min(map(distance, grid)), rel=1e-5)
    assert found <= min(map(distance, grid)) + 1e-15
    assert math.isnan(weight_structure(0 * W, Spectrum(U, s, Vh.T, None)))


def test_a_run_with_target_vectors_stops_goes_on_and_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", correlated(30, 3).numpy())
    np.save("other.npy", correlated(30, 3, seed=9).numpy())
    given = [
        "solve",
        "--targets",
        "y.npy",
        "--loss",
        "mse",
        "--dim",
        "5",
        "--bias",
        "free",
        "--start",
        "normal",
        "--json",
    ]
    assert main([*given, "--out", "run", "--max-steps", "3", "--no-plots"]) == 3
    capsys.readouterr()
    assert main(["solve", "--resume", "run", "--max-steps", "500", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["value"] == pytest.approx(summary["theory"]["value"], rel=1e-10)
    assert (tmp_path / "run/plots/collapse.png").exists()
    assert main(["metrics", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["nrc1"] == pytest.approx(
        summary["metrics"]["nrc1"], abs=1e-12
    )
    assert main(["export", "run", "--format", "csv", "-q"]) == 0
    assert len((tmp_path / "run/export/target_vectors.csv").read_text().splitlines()) == 31
    assert (
        main([*given, "--out", "again", "--start-from", "run", "--no-plots"]) == 2
    )  # start and start-from
    assert main([*given[:-3], "--out", "again", "--start-from", "run", "--no-plots", "-q"]) == 0
    assert main([*given[:1], "--targets", "other.npy", *given[3:], "--out", "run"]) == 2
    tensors, progress, reduce = load_state(RunDirectory.open(tmp_path / "run"))
    write_state(
        RunDirectory.open(tmp_path / "run"),
        {**tensors, "target_vectors": tensors["target_vectors"][1:]},
        progress,
        reduce,
    )
    assert main(["solve", "--resume", "run"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_one_output_has_no_angles_to_draw_and_no_pairs_to_measure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", normal(20, 1).numpy())
    assert (
        main(["solve", "--targets", "y.npy", "--loss", "mse", "--dim", "2", "--out", "run", "-q"])
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "run/plots").glob("*.png")) == [
        "collapse.png",
        "convergence.png",
    ]


def test_plan_counts_residuals():
    plan = make_plan(Problem(targets=correlated(300, 20), dim=8, loss="mse"))
    assert plan.flops == 6.0 * 300 * 20 * 8
    assert "each row has a target of its own" in plan.notes[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": [[1.0, math.nan], [0.0, 1.0]]}, "NaN or infinity in 1 rows, the first 0"),
        ({"targets": [[1.0, 2.0], [math.inf, 1.0]]}, "the first 1"),
        ({"targets": [[1e80, 2.0]]}, "beyond 1e\\+70"),
        ({"targets": [1.0, 2.0]}, r"targets\[:, None\]"),
        ({"targets": np.zeros((2, 2, 2))}, "shape N x t"),
        ({"targets": np.zeros((0, 2))}, r"got \(0, 2\), which holds nothing"),
        ({"targets": [["a", "b"]]}, "real numbers"),
        ({"targets": [[1.0], [1.0, 2.0]]}, "real numbers"),
        ({"targets": [[True, False]]}, "torch.bool"),
        ({"targets": np.ones((3, 2)), "loss": "ce"}, "choose loss mse"),
        ({"targets": np.ones((3, 2)), "labels": [0, 1, 1]}, "labels and targets"),
        ({"targets": np.ones((3, 2)), "classes": 3}, "leave classes out"),
        ({"targets": np.ones((3, 2)), "margin": 0.1}, "drop them"),
        ({"targets": np.ones((3, 2)), "constraint": "sphere"}, "loss mse"),
    ],
)
def test_bad_input_names_the_argument_and_the_mend(given, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        Problem(**{"dim": 4, "loss": "mse", **given})


def test_arrays_of_other_byte_orders_and_strides_are_read():
    plain = correlated(6, 3).numpy()
    for given in (plain.astype(">f8"), plain[::-1][::-1], np.asfortranarray(plain), plain.tolist()):
        assert torch.equal(
            Problem(targets=given, dim=2, loss="mse").samples.given_vectors, torch.from_numpy(plain)
        )


def test_faces_that_know_classes_only_refuse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problem = Problem(targets=correlated(9, 3), dim=4, loss="mse")
    with pytest.raises(InputError, match="use solve"):
        UFM(problem)
    with pytest.raises(InputError, match="no labels"):
        problem.sample_labels  # noqa: B018
    with pytest.raises(InputTypeError, match="only squared error"):
        problem.rows().targets.occupied(3)
    np.save("y.npy", np.array([[1.0, np.nan]]))
    for flags, message in (
        (["--targets", "none.npy"], "there is no file none.npy"),
        (["--targets", "y.npy"], "NaN"),
        (["--targets", "y.npy", "--labels", "digits"], "labels and targets"),
    ):
        assert main(["solve", "--loss", "mse", "--dim", "4", "--out", "run", *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    np.save("y.npy", np.ones((4, 2)))
    assert (
        main(["solve", "--loss", "mse", "--targets", "y.npy", "--reduce", "groups", "--out", "run"])
        == 2
    )
    assert "not for target vectors" in capsys.readouterr().err
