"""The planner's arithmetic against what really happens."""

from __future__ import annotations

import pytest
import torch

from ufm_fast.backends.cost import Cost, best_mesh, what_moves
from ufm_fast.errors import InputError
from ufm_fast.plan import make as planning
from ufm_fast.plan import make_plan
from ufm_fast.plan.notes import readable
from ufm_fast.plan.work import matmul_rate
from ufm_fast.problem import Problem
from ufm_fast.solving import METHODS


def test_flops_and_bytes_of_a_softmax_loss() -> None:
    plan = make_plan(Problem(dim=7, classes=5, per_class=4, bias="free"), reduce="none")
    assert plan.rows == 20
    assert plan.flops == 6 * 20 * 5 * 7
    assert plan.parameters == plan.gradient == 8 * ((20 + 5) * 7 + 5)
    tiled = next(backend for backend in plan.backends if backend.name == "tiled")
    assert tiled.chunk == 20
    # Rows of 20 numbers are padded to 32; scaled features, and three blocks of a chunk's rows.
    assert tiled.workspace == 32 * 5 * 8 + (20 + 3 * 20) * 7 * 8
    assert plan.steps("gd", "tiled") == plan.parameters * 2 + plan.methods["gd"] + tiled.workspace
    # What stays after the steps: the point and its gradient, the model's point, and that block of
    # exponentials.
    assert tiled.kept == 32 * 5 * 8
    assert plan.proof("tiled") == 3 * plan.parameters + tiled.kept + plan.certificate
    assert plan.metrics("tiled") == 3 * plan.parameters + tiled.kept + plan.measuring
    assert plan.total("gd", "tiled") == max(
        plan.steps("gd", "tiled"), plan.proof("tiled"), plan.metrics("tiled")
    )


def test_squared_error_needs_no_rows_times_classes() -> None:
    plan = make_plan(Problem(dim=7, classes=500, per_class=4, loss="mse"))
    assert plan.flops == 8 * (500 + 500) * 7**2
    assert (
        next(backend for backend in plan.backends if backend.name == "tiled").workspace
        < 500 * 500 * 8
    )


def test_few_classes_go_by_residuals_and_need_no_square_matrices() -> None:
    plan = make_plan(Problem(dim=700, classes=5, per_class=4, loss="mse"), reduce="none")
    assert plan.flops == 6 * 20 * 5 * 700
    assert (
        next(backend for backend in plan.backends if backend.name == "tiled").workspace
        == (3 * 20 * (5 + 700) + 20 * 700) * 8
    )
    assert plan.methods["alternating"] > 700 * 700 * 8  # its factorisations


def test_every_method_is_planned() -> None:
    plan = make_plan(Problem(dim=4, classes=5, loss="mse"))
    assert set(plan.methods) == set(METHODS) - {"auto"}


def test_what_goes_with_the_squared_error_is_planned_for_it_alone() -> None:
    assert "alternating" not in make_plan(Problem(dim=4, classes=5)).methods
    with pytest.raises(InputError, match="squared error"):
        make_plan(Problem(dim=4, classes=5), method="alternating")


def test_the_reduction_is_announced() -> None:
    problem = Problem(dim=4, classes=5, per_class=40)
    assert any("5 rows for 200 samples" in note for note in make_plan(problem).notes)
    assert any("--reduce classes" in note for note in make_plan(problem, reduce="none").notes)
    assert any("saves nothing" in note for note in make_plan(Problem(dim=4, classes=5)).notes)


def test_too_little_memory_is_said_with_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda device: 10_000)
    problem = Problem(dim=64, classes=50, per_class=9)
    notes = "\n".join(make_plan(problem).notes)
    assert "not enough memory for lbfgs on tiled" in notes
    assert "--history" in notes
    assert "--backend tiled" in notes
    assert "--reduce classes" in "\n".join(make_plan(problem, reduce="none", method="gd").notes)
    assert "--no-certificate" in notes
    assert "more memory" in "\n".join(make_plan(problem, method="gd").notes)


def test_history_sets_the_state_of_lbfgs() -> None:
    problem = Problem(dim=4, classes=5)
    assert (
        make_plan(problem, history=5).methods["lbfgs"]
        < make_plan(problem, history=50).methods["lbfgs"]
    )


def test_the_rate_is_that_of_a_product() -> None:
    rate = matmul_rate(torch.float32, torch.device("cpu"), seconds=0.05)
    assert 1e8 < rate < 1e15


def test_a_large_problem_has_no_exact_certificate() -> None:
    plan = make_plan(Problem(dim=2, classes=5000))
    held = 8 * 5000 * 5000  # the gradient in the logits, where it fits
    assert held < plan.certificate < 1.5 * held
    assert make_plan(Problem(dim=2, classes=5000, loss="mse")).certificate < 0.2 * held
    assert any("probabilistic" in note for note in plan.notes)


def test_the_plan_of_the_kernels_is_what_their_backend_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from ufm_fast.backends import triton_memory as module

    cpu = torch.device("cpu")

    def plan(
        rows: int, dim: int, classes: int, dtype: torch.dtype, free: int
    ) -> tuple[int, int, int]:
        monkeypatch.setattr(module, "free_bytes", lambda device: free)
        return module.softmax_plan(rows, dim, classes, dtype, cpu)

    chunk, size, second = plan(10**6, 1024, 10**6, torch.bfloat16, 80 << 30)
    assert chunk == 8192
    assert 2 * chunk * 10**6 < size < 2.5 * chunk * 10**6
    assert second > size
    chunk, size, second = plan(
        1000, 256, 1000, torch.float32, 80 << 30
    )  # all at once, in pairs of tf32
    assert chunk == 1000
    assert size > 8 * 1000 * 1000 + 8 * 2000 * 256
    assert second > size + 8 * 2000 * 256  # the directions are split too
    assert (
        plan(10**6, 64, 10**6, torch.bfloat16, 100 << 20)[0] == 0
    )  # not even 128 rows: nothing is stored
    assert plan(10**6, 512, 10**6, torch.bfloat16, 100 << 20)[0] == 128
    assert module.squared_workspace(5000, 64, 5000, torch.float32) < 5000 * 5000 * 4


def test_the_peak_is_that_of_the_certificate_where_it_is_larger() -> None:
    problem = Problem(dim=8, classes=5000)
    plan = make_plan(problem)
    assert plan.total("gd", "tiled") == plan.proof("tiled")
    without = make_plan(problem, certificate=False)
    assert without.proof("tiled") == 0
    assert without.total("gd", "tiled") < plan.total("gd", "tiled")
    tiled = without.backend("tiled")
    assert (
        without.steps("auto", "tiled") - without.steps("lbfgs", "tiled")
        == tiled.workspace_hessian - tiled.workspace
    )
    assert (
        make_plan(Problem(dim=8, classes=5000, freeze="w")).certificate < 10**6
    )  # no matrix of classes


def test_the_plan_refuses_what_solve_refuses() -> None:
    with pytest.raises(InputError, match="method must be one of"):
        make_plan(Problem(dim=8, classes=5), method="foo")
    with pytest.raises(InputError, match="history must be at least 1"):
        make_plan(Problem(dim=8, classes=5), history=0)


def test_bytes_in_words() -> None:
    assert [readable(n) for n in (5, 2048, 3 << 20, 5 << 30, 7 << 40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "7.0 TiB",
    ]


def test_layers_are_planned() -> None:
    deep = make_plan(
        Problem(
            dim=7,
            classes=5,
            per_class=4,
            bias="free",
            layers=3,
            widths=[7, 6, 8],
            activation="relu",
        )
    )
    assert deep.hidden == 8 * (6 * 7 + 8 * 6)
    assert deep.parameters == 8 * (5 * 8 + 5 * 7 + 5) + deep.hidden
    assert deep.flops == 6 * 5 * 5 * 8 + 6 * 5 * (6 * 7 + 8 * 6)
    assert deep.tape == 3 * 5 * (6 + 8) * 8
    plain = make_plan(Problem(dim=8, classes=5, per_class=4, bias="free"))
    work, second = ([backend.workspace for backend in plan.backends] for plan in (plain, deep))
    assert all(
        b - a == 2 * deep.tape + 8 * 5 * (7 + 8 + 8) + deep.hidden
        for a, b in zip(work, second, strict=True)
    )
    assert plain.hidden == plain.tape == 0


def test_classes_without_samples_are_not_sorted(monkeypatch):
    labels, sizes, plain = [0, 2, 2, 2**16], [], torch.unique

    def unique(x, *arguments, **options):
        sizes.append(x.numel())
        return plain(x, *arguments, **options)

    monkeypatch.setattr(torch, "unique", unique)
    problem = Problem(labels=labels, dim=2)
    values, number = problem.samples.distinct_counts
    assert (values.tolist(), number.tolist()) == ([0, 1, 2], [2**16 - 2, 2, 1])
    make_plan(problem)
    assert max(sizes) <= 4


def test_a_model_of_the_hessian_is_planned() -> None:
    """Of codes, K > d + 1: blocks d x d of classes and rows. Left out, the steps took eight times
    what was planned.
    """
    codes = make_plan(Problem(dim=20, classes=500, lambda_w=1e-4, lambda_h=1e-4))
    plain = make_plan(Problem(dim=20, classes=500, lambda_w=1e-4, lambda_h=1e-4, loss="focal"))
    assert codes.methods["lbfgs"] - plain.methods["lbfgs"] > 8 * 3 * 1000 * 20**2
    assert codes.methods["gd"] == plain.methods["gd"]
    raw = make_plan(Problem(dim=20, classes=500, lambda_w=1e-4, lambda_h=1e-4), variables="raw")
    assert raw.methods["lbfgs"] == plain.methods["lbfgs"]


def test_devices_share_target_vectors_by_their_own_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meshes by class they send no row sums, as softmax losses do."""
    problem = Problem(targets=torch.randn(30, 400), loss="mse", dim=64)
    whole = make_plan(problem)
    room = whole.backend("tiled").workspace + whole.vectors("lbfgs") // 3
    monkeypatch.setattr(planning, "available_bytes", lambda device: room)
    plan = make_plan(problem, method="lbfgs")
    number = plan.devices("lbfgs", "tiled")
    assert number is not None
    mesh = best_mesh(400, 30, 64, number, vectors=True)
    assert mesh[0] > 1
    sent = Cost(400, 30, 64, mesh, -(-30 // number), 8, vectors=True).sent()
    said = "\n".join(plan.notes)
    assert f"or {number} devices like this (torchrun, --mesh {mesh[0]}x{mesh[1]}" in said
    assert f"which sends least, {readable(sum(sent.values()))} a device" in said


def test_devices_share_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(dim=64, classes=50, per_class=9)
    whole = make_plan(problem)
    work = whole.backend("tiled").workspace
    monkeypatch.setattr(
        planning, "available_bytes", lambda device: work + whole.vectors("lbfgs") // 3
    )
    plan = make_plan(problem, method="lbfgs")
    assert plan.devices("lbfgs", "tiled") == 4
    number = make_plan(problem).devices("auto", "tiled")
    assert make_plan(problem).fits("tiled") == ("no" if number is None else f"on {number} devices")
    said = "\n".join(plan.notes)
    sent = [sum(Cost(50, 50, 64, mesh, 13, 8).sent().values()) for mesh in ((2, 2), (1, 4), (4, 1))]
    assert sent[0] == min(sent)
    assert "or 4 devices like this (torchrun, --mesh 2x2: features go round 2, classes" in said
    assert "for the certificate" in said or "without a certificate, for which each holds" in said
    assert [what_moves(mesh) for mesh in ((4, 1), (1, 4), (2, 2))] == [
        "features go round, classes stay",
        "classes are gathered, features stay",
        "features go round 2, classes are gathered by 2",
    ]
    monkeypatch.setattr(planning, "available_bytes", lambda device: work)
    assert make_plan(problem).devices("lbfgs", "tiled") is None
    assert whole.devices("lbfgs", "tiled") == 1
