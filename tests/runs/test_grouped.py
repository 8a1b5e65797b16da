"""Solves on groups of equal counts through every face: solve, run directory, resume, plan, metrics,
export, figures.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import printed, refused, solve

from ufm_fast import InputError, Problem
from ufm_fast import solve as minimise
from ufm_fast.class_groups import ClassGroups
from ufm_fast.cli import main
from ufm_fast.groups import group_minimum
from ufm_fast.groups.choice import by_groups
from ufm_fast.metrics import METRICS
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.grouped import load_groups
from ufm_fast.solvers.options import SolveOptions

TAIL = ("--groups", "3:50,5:9,40:2", "--dim", "47", "--lambda-w", "0.01", "--lambda-h", "0.005")


def test_a_solution_on_groups_is_that_of_the_classes() -> None:
    problem = Problem(
        dim=12,
        groups=[(2, 9), (4, 3), (3, 9)],
        lambda_w=3e-3,
        lambda_h=1e-3,
        bias="penalised",
        lambda_b=0.1,
    )
    assert problem.counts.tolist() == [9, 9, 3, 3, 3, 3, 9, 9, 9]
    found, full = (minimise(problem, reduce=reduce) for reduce in ("groups", "classes"))
    assert found.reduce == "groups"
    assert found.success
    assert found.value == pytest.approx(full.value, rel=1e-12)
    assert found.certificate is not None
    assert found.certificate.certified
    assert found.lifted().H.shape == (57, 12)
    torch.testing.assert_close(
        found.point.H @ found.point.W.T, full.point.H @ full.point.W.T, rtol=1e-6, atol=1e-6
    )
    assert set(METRICS) <= set(found.metrics)


def test_auto_takes_groups_where_classes_have_no_exact_certificate() -> None:
    sizes = {"lambda_w": 1.0, "lambda_h": 1.0, "dim": 5}  # so large that all has collapsed
    assert minimise(Problem(groups=[(4097, 2)], **sizes), metrics=False).reduce == "groups"
    assert (
        minimise(Problem(groups=[(4096, 2)], **sizes), metrics=False, certificate=False).reduce
        == "classes"
    )
    for options in (
        {"max_steps": 1},
        {"method": "gd", "max_steps": 1},
        {"reduce": "classes", "max_steps": 1},
    ):
        solution = minimise(
            Problem(groups=[(4097, 2)], **sizes), metrics=False, certificate=False, **options
        )
        assert solution.reduce == "classes"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dim": 5}, {}, "dim must be at least 8, the rank"),
        ({"loss": "focal"}, {}, "not convex"),
        ({"loss": "pick-all"}, {}, "sets of classes"),
        ({"layers": 2}, {}, "layers = 2"),
        ({"freeze": "w"}, {}, "freeze w"),
        ({"dtype": "float32"}, {}, "dtype float32"),
        ({"constraint": "sphere", "lambda_w": 0, "lambda_h": 0}, {}, "constraint sphere"),
        ({}, {"method": "gd"}, "drop method"),
        ({}, {"start": "normal"}, "drop start"),
        ({}, {"max_steps": 5}, "drop max_steps"),
        ({}, {"backend": "tiled"}, "drop backend"),
    ],
)
def test_what_groups_do_not_serve_is_refused(change: dict, options: dict, message: str) -> None:
    problem = Problem(
        **{"dim": 9, "groups": [(4, 3), (5, 2)], "lambda_w": 1e-3, "lambda_h": 1e-3, **change}
    )
    with pytest.raises(InputError, match=message):
        minimise(problem, reduce="groups", **options)


@pytest.mark.parametrize("backend", ["sharded", "sharded-tiled"])
def test_ranks_are_told_that_one_process_solves_groups(backend: str) -> None:
    problem = Problem(dim=9, groups=[(4, 3), (5, 2)], lambda_w=1e-3, lambda_h=1e-3)
    with pytest.raises(InputError, match="start it without torchrun"):
        by_groups(problem, SolveOptions(reduce="groups", backend=backend))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("3:5,x", "10:500"),
        ("3:5:1,2:1", "pairs"),
        ("3:0", "a sample"),
        ("300000000:1", "group_minimum"),
    ],
)
def test_groups_in_words_are_checked(groups: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Problem(dim=3, groups=groups)


def test_points_that_do_not_fit_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ufm_fast.groups.lifting.available_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="group_minimum"):
        minimise(Problem(dim=9, groups=[(9, 3)]), reduce="groups")


def test_a_run_on_groups_is_saved_read_and_finished(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*TAIL, "--reduce", "groups", "--out", "r", "--json") == 0
    summary = printed(capsys)
    best = group_minimum(ClassGroups.of_words("3:50,5:9,40:2"), 0.01, 0.005)
    assert summary["value"] == pytest.approx(best.value, rel=1e-12)
    saved = json.loads(Path("r/summary.json").read_text())
    assert saved["peak_bytes"] > saved["peak_extra_bytes"] >= 0
    assert summary["certificate"]["certified"]
    assert summary["groups"]["collapsed"] == best.collapsed.sum() == 1
    assert summary["groups"]["rank"] == best.rank < 47
    found = load_groups(RunDirectory.open(Path("r")))
    assert found is not None
    assert found.certificate.relative_gap == pytest.approx(best.certificate.relative_gap, abs=1e-12)
    np.testing.assert_allclose(found.logits, best.logits)
    assert main(["solve", "--resume", "r", "--json"]) == 0
    assert printed(capsys)["value"] == summary["value"]
    Path("r/summary.json").unlink()  # as where it was killed before it wrote it
    assert main(["solve", "--resume", "r", "--json", "--no-plots"]) == 0
    assert printed(capsys)["value"] == summary["value"]
    assert main(["metrics", "r", "--json"]) == 0
    assert printed(capsys)["metrics"]["nc2_classifier"] == pytest.approx(
        summary["metrics"]["nc2_classifier"]
    )
    assert "no w and h" in refused(capsys, "landscape", "r")


def test_the_groups_table_is_exported_and_drawn() -> None:
    assert (
        main(
            [
                "solve",
                *TAIL,
                "--reduce",
                "groups",
                "--bias",
                "penalised",
                "--lambda-b",
                "0.1",
                "--out",
                "r",
                "-q",
            ]
        )
        == 0
    )
    assert Path("r/plots/geometry.png").stat().st_size > 10_000
    assert main(["export", "r", "--format", "csv", "-q"]) == 0
    rows = list(csv.DictReader(Path("r/export/groups.csv").read_text().splitlines()))
    assert [float(row["count"]) for row in rows] == [2, 9, 50]
    assert [float(row["classes"]) for row in rows] == [40, 5, 3]
    assert float(rows[0]["classifier_cosine"]) == pytest.approx(1)
    losses = [float(row["loss"]) * float(row["count"]) * float(row["classes"]) for row in rows]
    log = list(csv.DictReader(Path("r/export/log.csv").read_text().splitlines()))
    assert sum(losses) / 275 == pytest.approx(float(log[0]["data_value"]))


def test_a_refused_solve_leaves_nothing_and_a_plan_says_what_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "rank" in refused(capsys, "solve", *TAIL, "--dim", "3", "--reduce", "groups")
    assert main(["plan", *TAIL, "--reduce", "groups", "--json"]) == 0
    plan = printed(capsys)
    assert plan["reduce"] == "groups"
    assert plan["groups"] == 3
    assert plan["most_rank"] <= 47
    assert main(["plan", *TAIL, "--reduce", "groups"]) == 0
    assert "distinct counts" in capsys.readouterr().out
