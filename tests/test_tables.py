"""Tables fail closed: no kind is served by two rows, and what no row names has no theory, in every
face of the library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import pytest
import torch

from ufm_fast import Problem, solve
from ufm_fast.backends import BACKENDS, TiledBackend
from ufm_fast.cli import main
from ufm_fast.errors import Contradiction, InputError, InputTypeError
from ufm_fast.functional import value_and_grad
from ufm_fast.kinds import Kind
from ufm_fast.losses import LOSSES, CrossEntropy, Focal, SoftmaxLoss, SquaredError, make_loss
from ufm_fast.nn import UFM
from ufm_fast.plan import make_plan
from ufm_fast.problem import BIASES, FREEZES
from ufm_fast.targets import Targets
from ufm_fast.theory import FORMS, closed_form
from ufm_fast.theory.certificates import CERTIFIERS, certify
from ufm_fast.theory.certificates.softmax import softmax

TABLES = {"closed forms": FORMS, "certificates": CERTIFIERS}
EPS = -0.9


@dataclass(frozen=True)
class Tilted(SoftmaxLoss):
    """g(l) = l + eps (1 - p_y): a user's own loss, for which the cross-entropy's bound lies above
    the value.
    """

    name: ClassVar[str] = "tilted"

    def value(self, l, p):
        return l + EPS * p

    def weight(self, l, p):
        return 1.0 + EPS * (1.0 - p)

    def bend(self, l, p):
        return -EPS * p * (1.0 - p)

    def dense(self, z, targets):
        y = targets.indices if isinstance(targets, Targets) else targets
        l = torch.nn.functional.cross_entropy(z, y, reduction="none")
        return l - EPS * torch.expm1(-l)


@dataclass(frozen=True)
class Pretender(Tilted):
    """The same under a name that theory serves."""

    name: ClassVar[str] = "ce"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(LOSSES, "tilted", Tilted)


@pytest.mark.parametrize("name", TABLES)
def test_rows_serve_different_kinds_that_they_were_derived_for(name):
    table, used = TABLES[name], set()
    changed = (
        "ce shifted",
        "ce scaled",
        "focal shifted",
        "focal scaled",
        "pick-all shifted",
        "pick-all scaled",
        "mse scaled",
    )
    changed += tuple(f"pick-all weighted{how}" for how in ("", " shifted", " scaled"))
    angular = ("ce angular",)
    for loss, bias, frozen in product(
        ("", "tilted", "mse dense", *angular, *changed, *LOSSES), BIASES, FREEZES
    ):
        for trunk, geometry in product(("none", "linear", "relu"), ("none", "sphere")):
            rows = [
                i
                for i, (serves, _) in enumerate(table)
                if serves(Kind(trunk, geometry, loss, bias, frozen))
            ]
            served = (
                "ce",
                "focal",
                "pick-all",
                "mse",
                "mse dense",
                *(changed if name == "certificates" else ()),
            )
            known = loss in served and (trunk, geometry) == ("none", "none")
            deep = (
                trunk != "none"
                and geometry == "none"
                and loss in (*LOSSES, "mse dense", *changed)
                and frozen is None
            )
            on_spheres = ("ce", "ce shifted", "ce scaled", *angular)
            unit = (trunk, geometry, bias, frozen) == (
                "none",
                "sphere",
                "none",
                None,
            ) and loss in on_spheres
            assert len(rows) <= (
                known
                or unit
                or (deep and name == "certificates")
                or (deep and trunk == "linear" and loss in ("mse", "mse dense"))
            )
            used.update(rows)
    assert used == set(range(len(table)))


@pytest.mark.parametrize("loss", [Tilted(), Pretender()])
def test_a_loss_that_no_row_names_has_no_theory(loss):
    """Once it was `exact, certified, gap 0` a step from the start: cross-entropy's bound, cut down
    to the value.
    """
    problem = Problem(classes=6, dim=8, per_class=3, lambda_w=2e-2, lambda_h=2e-2, loss=loss)
    assert closed_form(problem) is None
    for frozen in FREEZES:
        found = solve(replace(problem, freeze=frozen), max_steps=1)
        summary = found.summary()
        assert summary["theory"] is None
        assert (summary["certificate"]["kind"], summary["certificate"]["certified"]) == (
            "none",
            False,
        )
        assert type(loss).__name__ in summary["certificate"]["reason"]


def test_a_bound_above_the_value_is_said_and_never_clipped(monkeypatch):
    problem = Problem(classes=6, dim=8, per_class=3, lambda_w=2e-2, lambda_h=2e-2, loss=Tilted())
    monkeypatch.setattr(
        "ufm_fast.theory.certificates.table.CERTIFIERS", [(lambda kind: True, softmax)]
    )
    with pytest.warns(Contradiction, match="came out above the value"):
        found = solve(problem, max_steps=1).certificate
    assert (found.kind, found.certified) == ("none", False)
    assert "came out above the value" in found.reason


def test_a_loss_of_a_users_own_goes_through_every_face(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problem = Problem(classes=6, dim=8, per_class=3, lambda_w=2e-2, lambda_h=2e-2, loss="tilted")
    assert problem.loss == make_loss("tilted") == Tilted()
    solved = solve(problem)
    dense = solve(problem, backend="reference")
    assert solved.success
    assert solved.value == pytest.approx(dense.value, rel=1e-9)
    assert "loss tilted" in solved.certificate.reason
    model = UFM(problem)
    W, H = model.W.detach(), model.H.detach()
    logits = torch.nn.functional.linear(H, W)
    data = Tilted().dense(logits, model.indices).mean()
    assert float((model() - model.penalty()).detach()) == pytest.approx(float(data), rel=1e-12)
    evaluated = value_and_grad("tilted", H, W, model.indices)
    assert float(evaluated.value) == pytest.approx(float(data), rel=1e-12)
    assert make_plan(problem).classes == 6
    flags = [
        "--loss",
        "tilted",
        "--classes",
        "6",
        "--dim",
        "8",
        "--per-class",
        "3",
        "--lambda-w",
        "2e-2",
        "--lambda-h",
        "2e-2",
    ]
    assert main(["solve", "--no-plots", "--json", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["certificate"]["kind"], result["theory"]) == ("none", None)
    assert result["value"] == pytest.approx(solved.value, rel=1e-9)
    assert main(["plan", *flags]) == 0


def test_what_a_face_cannot_carry_is_refused_in_words(registered):
    @dataclass(frozen=True)
    class Steeper(Tilted):
        power: float = 2.0

    LOSSES["tilted"] = Steeper  # the fixture puts it back
    with pytest.raises(InputTypeError, match="settings beside"):
        UFM(Problem(classes=3, dim=4, loss=Steeper(power=3.0)))
    with pytest.raises(InputTypeError, match="loss must be one of"):
        UFM(Problem(classes=3, dim=4, loss=Pretender()))
    with pytest.raises(InputTypeError, match="subclass of SquaredError"):
        type("Hinge", (SquaredError,), {})


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_made_by_its_row(name):
    assert type(make_loss(name)) is LOSSES[name]
    made = make_loss(name, **dict.fromkeys(LOSSES[name].parameters, 0.5))
    assert all(getattr(made, parameter) == 0.5 for parameter in LOSSES[name].parameters)
    assert made.name == name


def test_a_name_is_no_class():
    assert Problem(classes=3, dim=4, loss=Focal(gamma=1.0)).kind.loss == "focal"
    assert Problem(classes=3, dim=4, loss=Pretender()).kind.loss == ""
    assert Problem(classes=3, dim=4, loss=CrossEntropy(0.1)).kind == Kind(
        "none", "none", "ce", "none", None
    )


def test_a_registered_backend_is_used_by_name(monkeypatch):
    class Counting(TiledBackend):
        name = "counting"

    monkeypatch.setitem(BACKENDS, "counting", lambda device, dtype: Counting())
    found = solve(Problem(classes=4, dim=4), backend="counting")
    assert found.backend == "counting"
    assert found.success


def test_rows_beyond_the_plain_model_say_what_is_missing(monkeypatch):
    problem = Problem(classes=4, dim=4)
    monkeypatch.setattr(Problem, "kind", Kind("relu", "sphere", "ce", "none", "w"))
    found = certify(problem, problem.rows(), solve(problem, metrics=False).point)
    assert (
        found.reason
        == "no certificate is known for loss ce, bias none, trunk relu, geometry sphere, frozen w"
    )
    assert closed_form(problem) is None


def test_a_registered_backend_is_planned(monkeypatch):
    class Counting(TiledBackend):
        name = "counting"

    monkeypatch.setitem(BACKENDS, "counting", lambda device, dtype: Counting())
    plans = {plan.name: plan for plan in make_plan(Problem(classes=4, dim=4)).backends}
    assert plans["counting"] == replace(plans["tiled"], name="counting")


def test_a_loss_that_no_head_serves_is_refused_in_words(registered, monkeypatch):
    def squares_only(device, dtype):
        backend = TiledBackend()
        backend.heads = backend.heads[-1:]
        return backend

    monkeypatch.setitem(BACKENDS, "squares", squares_only)
    with pytest.raises(InputError, match="has no head for the loss tilted; choose another backend"):
        solve(Problem(classes=4, dim=4, loss="tilted"), backend="squares")
