"""Margins in the angle: derivatives against dense autograd, minima against theory from random
starts, rows that are held together at the kink, certificates.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from strategies import random_point, relative

from ufm_fast import Problem, solve
from ufm_fast.angular_margins import together
from ufm_fast.backends import ReferenceBackend
from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.landscape import classify
from ufm_fast.nn import UFM
from ufm_fast.objective import Objective
from ufm_fast.plan import make_plan
from ufm_fast.solvers.solution import Outcome
from ufm_fast.theory import angular_ce_minimum, closed_form
from ufm_fast.theory.certificates import certify

SPHERE = {"constraint": "sphere", "temperature": 6.0}
SMALL = {"counts": [7, 4, 2, 1], "dim": 5, **SPHERE}
QUICK = {"metrics": False, "certificate": False, "start": "normal"}


def dense(objective: Objective, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The data term by the textbook's formula."""
    problem, angular, y = objective.problem, objective.angular, objective.targets.indices
    t, m, e = problem.temperature, angular.angles[y], angular.rounding
    x, reach = (W[y] * H).sum(1), math.hypot(1.0, e)
    turned = x * m.cos() - m.sin() * ((1 + e * e - x * x).sqrt() - e)
    target = torch.where(x <= -reach * m.cos(), m.sin() * e - reach, turned)
    z = (t * H @ W.T).scatter(1, y[:, None], t * target[:, None])
    offset = problem.adjustment.offset
    z = z if offset is None else z + offset
    return objective.row_weight @ torch.nn.functional.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("backend", [None, ReferenceBackend()])
@pytest.mark.parametrize(
    ("rounding", "reduce", "near"),
    [(0.0, "classes", 1.0), (0.0, "none", 0.1), (0.1, "none", -0.2), (1e-3, "classes", 1e-3)],
)
def test_value_gradient_and_products_are_those_of_dense_autograd(backend, rounding, reduce, near):
    problem = Problem(**SMALL, angular_margin=[0.5, 0.3, 0.0, 1.2], logit_adjustment=0.5)
    objective = Objective(problem, backend=backend, reduce=reduce)
    objective = objective.rounded(rounding) if rounding else objective
    space, x = objective.geometry, random_point(objective, 0)
    x = space.project(x)
    if near != 1.0:  # rows near their own class's, or far beyond theta + m = pi
        H = math.copysign(1.0, near) * x.W[objective.targets.indices] + abs(near) * x.H
        x = space.project(replace(x, H=H))
    v = space.tangent(x, random_point(objective, 1))
    W, H = (part.clone().requires_grad_() for part in (x.W, x.H))
    value = dense(objective, W, H)
    gradient = torch.autograd.grad(value, (W, H), create_graph=True)
    along = sum((g * d).sum() for g, d in zip(gradient, (v.W, v.H), strict=True))
    product = torch.autograd.grad(along, (W, H))
    theirs, normal = space.split(x, replace(x, W=gradient[0].detach(), H=gradient[1].detach()))
    mine = objective.value_and_grad(x)
    assert mine.value == pytest.approx(value.item(), rel=1e-12)
    loose = 1.0 if abs(near) > 1e-2 else 1e4  # what autograd's cosines lose beside the kink
    assert relative(mine.gradient, theirs) < 1e-12 * loose
    curved = space.hessian(x, v, normal, replace(x, W=product[0], H=product[1]))
    assert relative(objective.hvp(x, v), curved) < 1e-12 * loose


@pytest.mark.parametrize("dim", [9, 12])
@pytest.mark.parametrize(
    ("temperature", "margin"), [(1.0, 0.5), (5.0, 1.0), (10.0, 0.1), (64.0, 0.5)]
)
def test_a_random_start_meets_the_simplex(dim, temperature, margin):
    problem = Problem(
        classes=10, dim=dim, constraint="sphere", temperature=temperature, angular_margin=margin
    )
    found = solve(problem, start="normal", metrics=False)
    assert found.theory.value == angular_ce_minimum(10, temperature, dim, margin)
    assert found.value == pytest.approx(found.theory.value, rel=1e-10)
    assert found.outcome is Outcome.CONVERGED
    assert bool(together(found.point.W, found.point.H).all())
    assert found.certificate.certified or found.value < 1e-10  # where the bound has no digits left


def test_the_closed_form_is_a_point_and_knows_where_it_ends():
    problem = Problem(classes=6, dim=5, **SPHERE, angular_margin=0.5)
    built = solve(problem, method="closed-form", metrics=False)
    assert built.success
    assert built.value == pytest.approx(built.theory.value, rel=1e-12)
    for change in (
        {"angular_margin": [0.5] * 5 + [0.4]},
        {"margin": 0.1},
        {"dim": 4},
        {"angular_margin": 1.5},
        {"counts": [2, 1, 1, 1, 1, 1]},
    ):
        assert closed_form(replace(problem, **change)) is None


def test_rows_off_the_simplex_are_held_or_stand_apart():
    """Unequal counts: at the end nothing near is lower, from any start, held rows or free ones."""
    for margin, seeds, held in ((0.5, 2, 3), (0.05, 1, 0)):
        problem = Problem(counts=[4, 2, 1], dim=5, **SPHERE, angular_margin=margin)
        found = [solve(replace(problem, seed=seed), **QUICK) for seed in range(seeds)]
        assert all(one.outcome is Outcome.CONVERGED for one in found)
        assert found[0].value == pytest.approx(found[-1].value, rel=1e-9)
        W, H = found[0].point.W, found[0].point.H
        assert int(together(W, H).sum()) == held
        objective = Objective(problem)
        generator = torch.Generator().manual_seed(0)
        for spread in (1e-6, 1e-4, 1e-2):
            for _ in range(10):
                noise = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
                near = replace(found[0].point, W=W + spread * noise[0], H=H + spread * noise[1])
                value = objective.value_and_grad(objective.geometry.project(near)).value
                assert value >= found[0].value * (1 - 1e-12)


def test_every_sample_by_itself_reaches_the_same_minimum():
    problem = Problem(counts=[4, 2, 2], dim=4, **SPHERE, angular_margin=0.4)
    classes, samples = (solve(problem, reduce=reduce, **QUICK) for reduce in ("classes", "none"))
    assert samples.success
    assert samples.value == pytest.approx(classes.value, rel=1e-9)


def test_bounds_hold_everywhere():
    problem = Problem(**SMALL, angular_margin=0.5, margin=0.1)
    found, objective = solve(problem, start="normal", metrics=False), Objective(problem)
    assert found.certificate.kind == "exact"
    assert "margins in the angle" in " ".join(found.notes) or found.certificate.certified
    elsewhere = objective.geometry.project(random_point(objective, 5))
    for point in (found.point, objective.to_model(elsewhere)):
        for exact in (4096, 0):
            bound = certify(problem, objective.rows, point, exact_classes=exact)
            assert bound.lower_bound <= found.value * (1 + 1e-12)


def test_the_landscape_moves_held_rows_together():
    problem = Problem(classes=5, dim=4, **SPHERE, angular_margin=0.5)
    found, objective = solve(problem, start="normal", metrics=False), Objective(problem)
    verdict = classify(objective, objective.from_model(found.point.W, found.point.H, None))
    assert verdict.classification == "global minimum (certified)"
    assert verdict.tied == 5
    assert "keeps them there" in verdict.note
    some = Objective(replace(problem, angular_margin=[0.5, 0.0, 0.5, 0.5, 0.5]))
    assert classify(some, some.from_model(found.point.W, found.point.H, None)).tied == 4
    one = torch.nn.functional.one_hot(torch.zeros(5, dtype=torch.int64), 4).double()
    saddle = classify(objective, objective.from_model(one, one, None))
    assert saddle.classification == "strict saddle"


def test_no_angle_changes_no_bit():
    plain = Problem(**SMALL)
    nothing = replace(plain, angular_margin=[0.0] * 4)
    objective = Objective(plain)
    x = objective.geometry.project(random_point(objective, 0))
    a, b = (Objective(problem).value_and_grad(x) for problem in (plain, nothing))
    assert a.value == b.value
    assert torch.equal(a.gradient.W, b.gradient.W)
    assert nothing.kind == plain.kind


@pytest.mark.parametrize("method", ["gd", "cg", "lbfgs", "newton-cg"])
def test_every_method_goes_down_and_stays_on_the_spheres(method):
    problem = Problem(**SMALL, angular_margin=0.3)
    begun, found = (solve(problem, method=method, max_steps=n, **QUICK) for n in (0, 30))
    assert found.value < begun.value
    assert float((found.point.H.norm(dim=1) - 1).abs().max()) < 1e-14


def test_in_single_precision():
    problem = Problem(classes=5, dim=6, **SPHERE, angular_margin=0.5, dtype="float32")
    found = solve(problem, **QUICK)
    assert found.value == pytest.approx(found.theory.value, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"angular_margin": 30.0}, "must lie in \\[0, pi/2\\) radians, got 30"),
        ({"angular_margin": -0.1}, "must lie in"),
        ({"angular_margin": [0.1, 0.2]}, "angular_margin must be one number or 4"),
        ({"constraint": "none", "temperature": 1.0}, "takes constraint sphere"),
        ({"smoothing": 0.1}, "takes no smoothing"),
        ({"class_scales": 0.3}, "not class_scales"),
        ({"dtype": "bfloat16"}, "not dtype bfloat16"),
    ],
)
def test_what_contradicts_is_said(case, words):
    with pytest.raises(InputError, match=words):
        Problem(**{**SMALL, "angular_margin": 0.5, **case})


def test_what_is_not_served_is_refused():
    problem = Problem(**SMALL, angular_margin=0.5)
    with pytest.raises(InputError, match="reduce groups"):
        solve(problem, reduce="groups")
    with pytest.raises(InputError, match="constraint is sphere"):
        UFM(problem)
    plain, ours = make_plan(replace(problem, angular_margin=None)), make_plan(problem)
    assert ours.steps("lbfgs", "tiled") > plain.steps("lbfgs", "tiled")


def test_on_the_command_line(tmp_path, capsys):
    flags = ["solve", "--no-plots", "--counts", "4,2,1", "--dim", "3", "--start", "normal"]
    sphere = ["--constraint", "sphere", "--temperature", "4", "--angular-margin"]
    assert main([*flags, *sphere, "0.5", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    problem = Problem(
        counts=[4, 2, 1], dim=3, constraint="sphere", temperature=4.0, angular_margin=0.5
    )
    assert summary["value"] == pytest.approx(solve(problem, **QUICK).value, rel=1e-9)
    assert main(["landscape", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main([*flags, *sphere, "45"]) == 2
    assert "angular_margin must lie in" in capsys.readouterr().err
