"""Runs that the first version saved go on, are drawn, exported and measured; and runs of today will
tomorrow.

``data/`` holds two of them: a cross-entropy that stopped after 3 steps, and a squared error of
labels, which converged.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ufm_fast.errors import InputError
from ufm_fast.metrics import collect
from ufm_fast.runs import options, settings
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.exports import export_run
from ufm_fast.runs.figures import draw_run
from ufm_fast.runs.foreign import read_head
from ufm_fast.runs.job import Job, prepare
from ufm_fast.runs.resuming import resume
from ufm_fast.runs.running import execute

DATA = Path(__file__).parent / "data"


def copied(name: str) -> Path:
    return Path(shutil.copytree(DATA / name, name))


def going_on(path: Path, **given: object) -> Job:
    job = resume(path, given, None)
    assert isinstance(job, Job)
    return job


def test_an_unfinished_run_goes_on_to_its_minimum() -> None:
    path = copied("unfinished")
    solution = execute(going_on(path, max_steps=200), lambda record: None)
    assert solution.steps > 3
    assert solution.theory is not None
    assert solution.value == pytest.approx(solution.theory.value, rel=1e-12)
    run = RunDirectory.open(path)
    steps = [record["step"] for record in run.records()]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert isinstance(resume(path, {}, None), RunDirectory)


def test_a_finished_run_is_finished_and_a_smaller_tolerance_goes_on() -> None:
    path = copied("finished")
    assert isinstance(resume(path, {}, None), RunDirectory)
    solution = execute(going_on(path, tol=1e-12), lambda record: None)
    assert solution.value == pytest.approx(
        RunDirectory.open(DATA / "finished").summary["value"], rel=1e-12
    )


@pytest.mark.parametrize("name", ["unfinished", "finished"])
def test_it_is_drawn_exported_and_measured(name: str) -> None:
    run = RunDirectory.open(copied(name))
    assert len(draw_run(run)) == 8
    with np.load(export_run(run, "npz")[0]) as content:
        assert content["W"].shape == (6, run.config["dim"])
        assert content["log_step"][-1] == run.summary["steps"]
    head = read_head(run.path, "run")
    found = collect(head.H, head.W, head.labels, head.b, counts=head.counts)
    assert found["nc2_classifier"] == pytest.approx(
        run.summary["metrics"]["nc2_classifier"], rel=1e-9
    )


def test_the_same_run_is_recognised_in_its_folder() -> None:
    path = copied("unfinished")
    given = {
        "classes": 6,
        "dim": 8,
        "per_class": 3,
        "lambda_w": 0.01,
        "lambda_h": 0.01,
        "start": "normal",
        "device": "cpu",
    }
    with pytest.raises(InputError, match="holds this very run"):
        prepare(given, None, path)
    with pytest.raises(InputError, match="another configuration"):
        prepare({**given, "seed": 1}, None, path)


@pytest.mark.parametrize("first", [True, False])
def test_a_setting_of_tomorrow_damages_no_run_of_today(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"classes": 4, "dim": 5, "start": "normal", "max_steps": 1, "device": "cpu"}
    path = copied("unfinished") if first else Path("r")
    if not first:
        execute(prepare(given, None, path), lambda record: None)
    monkeypatch.setitem(
        options.SETTINGS,
        "depth_of_tomorrow",
        options.Setting("depth_of_tomorrow", int, 1, "", "run"),
    )
    run = RunDirectory.open(path)
    job = going_on(path)
    assert job.config["depth_of_tomorrow"] == 1
    with pytest.raises(InputError, match="depth_of_tomorrow = 2 contradicts the run"):
        resume(path, {"depth_of_tomorrow": 2}, None)
    run.write_config({**run.config, "depth_of_tomorrow": 2}, run.hash)
    with pytest.raises(InputError, match="the hash in"):
        resume(path, {}, None)
    names = {
        settings.digest({**job.config, "depth_of_tomorrow": value}, job.problem)
        for value in (1, 2, 3)
    }
    assert len(names) == 3
    monkeypatch.delitem(options.SETTINGS, "depth_of_tomorrow")
    with pytest.raises(InputError, match="does not know the setting depth_of_tomorrow"):
        resume(path, {}, None)


def test_a_row_is_all_that_a_setting_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        options.SETTINGS, "widths", options.Setting("widths", int, None, "", several=True)
    )
    monkeypatch.setattr("ufm_fast.problem.Problem", dict)
    for value, found in (("7", 7), ("7,5", [7, 5]), ([7, 5], [7, 5]), (7, 7)):
        assert (
            settings.build_problem(settings.resolve({"classes": 3, "widths": value}))["widths"]
            == found
        )
    Path("run.toml").write_text("widths = [7, 5]\nclasses = 3\n")
    assert settings.resolve({}, Path("run.toml"))["widths"] == [7, 5]
    for wrong in ("7,x", [7, 0.5], "", True):
        with pytest.raises(InputError, match="widths must be a whole number"):
            settings.resolve({"widths": wrong})
