"""The table of claims and its runner: rows fail closed, leave their files, and do not stop one
another.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from legible import assert_legible

from ufm_fast import plots
from ufm_fast.errors import InputError
from ufm_fast.reproduce import (
    CLAIMS,
    FAIL,
    PASS,
    REPORT,
    Claim,
    Evidence,
    Quantity,
    chosen,
    reproduce,
)
from ufm_fast.reproduce.claim import RELATIONS


def _claim(
    name: str, numbers: dict[str, float], *quantities: Quantity, calls: list[bool] | None = None
) -> Claim:
    def measure(quick: bool) -> Evidence:
        if calls is not None:
            calls.append(quick)
        drawn, (ax,) = plots.panels()
        rows = [{"step": 1, "value": 2.0}, {"step": 2, "value": 1.0, "late": 3}]
        plots.curves(ax, rows, {"value": "value"})
        return Evidence(numbers, rows, drawn)

    return Claim(name, "nobody", "It holds.", "none", "all", quantities, measure, seconds=1)


HOLDS = Quantity("value", 1.0, 1e-3)


@pytest.mark.parametrize(
    ("measured", "quantity", "state"),
    [
        (1.0005, HOLDS, PASS),
        (1.01, HOLDS, FAIL),
        (math.nan, HOLDS, FAIL),
        (None, HOLDS, FAIL),
        (2.0, Quantity("value"), REPORT),
        (None, Quantity("value"), FAIL),
        (1e-9, Quantity("value", 0.0, 1e-8, "absolute"), PASS),
        (1e-7, Quantity("value", 0.0, 1e-8, "absolute"), FAIL),
        (0.5, Quantity("value", 1.0, 0.0, "at most"), PASS),
        (1.5, Quantity("value", 1.0, 0.0, "at most"), FAIL),
        (1.5, Quantity("value", 1.0, 0.0, "at least"), PASS),
        (0.5, Quantity("value", 1.0, 0.0, "at least"), FAIL),
    ],
)
def test_what_a_measurement_is_worth(measured, quantity, state, tmp_path):
    claim = _claim("row", {} if measured is None else {"value": measured}, quantity)
    (verdict,) = reproduce([claim], tmp_path)
    assert verdict.state == state
    assert verdict.line.startswith("row: measured ")
    assert verdict.line.endswith(state)


def test_one_quantity_that_fails_fails_its_row_and_is_the_one_shown(tmp_path):
    claim = _claim(
        "row",
        {"value": 1.0, "other": 5.0, "told": 7.0},
        HOLDS,
        Quantity("other", 4.0, 1e-3),
        Quantity("told"),
    )
    (verdict,) = reproduce([claim], tmp_path)
    assert (verdict.state, verdict.quantity, verdict.deviation) == (FAIL, "other", 0.25)
    assert verdict.line == "row: measured 5 (other), theory 4, deviation 0.25, FAIL"


def test_quick_settings_have_their_own_tolerances_and_quantities(tmp_path):
    claim = _claim(
        "row",
        {"value": 1.1},
        replace(HOLDS, quick_tolerance=0.2),
        Quantity("slow", 1.0, 0.1, quick=False),
    )
    assert [v.state for v in reproduce([claim], tmp_path, quick=True)] == [PASS]
    assert [v.state for v in reproduce([claim], tmp_path)] == [FAIL]


def test_a_row_that_breaks_does_not_stop_the_rest_and_is_run_again(tmp_path):
    calls: list[bool] = []
    broken = _claim("broken", {"value": 1.0, "undeclared": 2.0}, HOLDS, calls=calls)
    fine = _claim("fine", {"value": 1.0}, HOLDS)
    for _ in range(2):
        first, second = reproduce([broken, fine], tmp_path)
        assert first.state == FAIL
        assert "undeclared" in first.line
        assert second.state == PASS
    assert len(calls) == 2
    assert not (tmp_path / "broken").exists()


def test_files_and_finished_rows(tmp_path):
    calls: list[bool] = []
    claim = _claim("row", {"value": 1.0}, HOLDS, calls=calls)
    (verdict,) = reproduce([claim], tmp_path)
    folder = tmp_path / "row"
    assert sorted(path.name for path in folder.iterdir()) == [
        "row.csv",
        "row.pdf",
        "row.png",
        "verdict.json",
    ]
    assert (folder / "row.csv").read_text().splitlines() == ["step,value,late", "1,2.0,", "2,1.0,3"]
    assert json.loads((folder / "verdict.json").read_text())["environment"]
    (again,) = reproduce([claim], tmp_path)
    assert again.earlier
    assert again.line == verdict.line
    assert len(calls) == 1
    list(reproduce([claim], tmp_path, quick=True))  # another setting
    list(
        reproduce([replace(claim, quantities=(replace(HOLDS, tolerance=1.0),))], tmp_path)
    )  # another row
    (folder / "verdict.json").write_text("{")
    list(reproduce([claim], tmp_path))  # a damaged file
    assert len(calls) == 4


def test_names_and_folders_that_are_not_there(tmp_path):
    assert chosen(["all"]) == list(CLAIMS.values())
    with pytest.raises(InputError, match="did you mean tirer2022-frame"):
        chosen(["tirer2022-fram"])
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(InputError, match="can't write to"):
        list(reproduce([_claim("row", {"value": 1.0}, HOLDS)], occupied / "out"))
    assert list(tmp_path.iterdir()) == [occupied]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.name)
def test_every_row_says_what_it_is(claim: Claim):
    assert claim.name.split("-")[0].isalnum()
    assert claim.claim.endswith(".")
    assert claim.paper
    assert claim.papers
    assert claim.ours
    names = [quantity.name for quantity in claim.quantities]
    assert len(set(names)) == len(names)
    assert any(quantity.quick for quantity in claim.quantities)
    for quantity in claim.quantities:
        assert quantity.relation in RELATIONS
        assert quantity.theory != 0 or quantity.relation != "relative"
    assert claim.expected_seconds(quick=True) <= claim.expected_seconds(quick=False)


SHORT = [claim for claim in CLAIMS.values() if claim.expected_seconds(quick=True) < 10]


@pytest.mark.parametrize("claim", SHORT, ids=lambda claim: claim.name)
def test_short_rows_hold(claim: Claim, tmp_path: Path):
    drawn: list[Evidence] = []

    def measure(quick: bool) -> Evidence:
        drawn.append(claim.measure(quick))
        return drawn[0]

    (verdict,) = reproduce([replace(claim, measure=measure)], tmp_path, quick=True)
    assert verdict.state in (PASS, REPORT), (verdict.line, verdict.quantities)
    with plots.paper_style():
        assert_legible(drawn[0].figure)
