"""Rates of a machine: fitted to what is measured, kept by what they depend on, measured anew where
nothing is kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ufm_fast import calibration
from ufm_fast.calibration import Terms, rates_of, seconds
from ufm_fast.objective import Objective
from ufm_fast.plan import make_plan
from ufm_fast.plan.work import terms_of
from ufm_fast.problem import Problem
from ufm_fast.solvers.curvature import curvature_of

TRUE = [1e-3, 2e-11, 7e-9, 5e-10, 1e-7, 2e-9]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A machine whose rates are TRUE, and how many shapes were measured on it."""
    asked: list[int] = []

    def measured(objective: Objective) -> float:
        asked.append(objective.rows.number)
        return seconds(terms_of(objective, calibration._MEAN_HISTORY), TRUE)

    monkeypatch.setattr(calibration, "measured", measured)
    monkeypatch.setenv("UFM_FAST_CACHE", str(tmp_path / "cache"))
    return asked


def test_a_fit_finds_the_rates_and_a_plan_uses_them(machine: list[int]) -> None:
    problem = Problem(classes=100, dim=50)
    assert rates_of(problem, terms_of) == pytest.approx(TRUE, rel=1e-6)
    tiled = make_plan(problem).backend("tiled")
    assert tiled.seconds == pytest.approx(seconds(terms_of(Objective(problem), 10), TRUE), rel=1e-6)


def test_rates_are_kept_for_a_kind_of_problem(machine: list[int]) -> None:
    problem = Problem(classes=10, dim=5)
    first = rates_of(problem, terms_of)
    number = len(machine)
    assert number == len(calibration._SHAPES)
    assert rates_of(Problem(counts=[5, 2], dim=9, loss="focal"), terms_of) == first
    assert len(machine) == number
    rates_of(Problem(classes=10, dim=5, loss="mse"), terms_of)
    rates_of(Problem(classes=10, dim=5, dtype="float32"), terms_of)
    assert len(machine) == 3 * number


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"version": 0, "rates": [1, 1, 1, 1, 1, 1]}', '{"version": 1, "rates": [1]}', "[]"],
)
def test_a_cache_that_is_none_is_measured_anew(
    content: str, machine: list[int], tmp_path: Path
) -> None:
    problem = Problem(classes=10, dim=5)
    rates_of(problem, terms_of)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(content)
    assert rates_of(problem, terms_of) == pytest.approx(TRUE, rel=1e-6)
    assert json.loads(file.read_text())["version"] == calibration.VERSION


def test_a_cache_that_can_t_be_written_costs_nothing_else(
    machine: list[int], monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UFM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    assert rates_of(Problem(classes=10, dim=5), terms_of) == pytest.approx(TRUE, rel=1e-6)


def test_terms_count_the_head_the_model_and_the_history() -> None:
    objective = Objective(Problem(classes=30, dim=40, lambda_w=1e-4, lambda_h=1e-4))
    terms = terms_of(objective, 3)
    assert terms == Terms(6 * 30 * 30 * 40, 900.0, 32.0 * 60 * 40, 30, 60.0 * 900)
    assert curvature_of(objective).name == "pairs"
    raw = terms_of(Objective(objective.problem, variables="raw"), 3)
    assert raw.model == 0.0


def test_what_is_measured_is_of_its_size() -> None:
    small, large = (
        Objective(Problem(counts=[1 + k % 3 for k in range(K)], dim=60), variables="raw")
        for K in (5, 400)
    )
    assert 0.0 < calibration.measured(small) < calibration.measured(large)
