"""Run directories of problems with layers and with restarts: saved, resumed, started from,
measured, exported, drawn.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import printed, refused, saved, solve
from rich.console import Console

from ufm_fast.cli import main, report
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.log import Log
from ufm_fast.runs.model import saved_model
from ufm_fast.runs.state import load_state
from ufm_fast.solvers.solution import Starts, StepRecord

DEEP = (
    "--classes",
    "3",
    "--dim",
    "5",
    "--per-class",
    "2",
    "--layers",
    "3",
    "--widths",
    "5,6,4",
    "--loss",
    "mse",
    "--lambda-w",
    "1e-3",
    "--lambda-h",
    "1e-3",
    "--start",
    "orthogonal",
)
RELU = (
    *DEEP[:6],
    "--layers",
    "2",
    "--activation",
    "relu",
    "--lambda-w",
    "1e-3",
    "--lambda-h",
    "1e-3",
    "--start",
    "normal",
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def summary(path: str) -> dict:
    return json.loads(Path(path, "summary.json").read_text())


def test_a_deep_run_is_resumed_where_it_stopped_and_ends_where_one_call_ends() -> None:
    assert solve(*DEEP, "--out", "half", "--max-steps", "8") == 3
    tensors, progress, _ = load_state(RunDirectory.open(Path("half")))
    assert [tuple(tensors[name].shape) for name in ("W", "H", "hidden1", "hidden2")] == [
        (3, 4),
        (3, 5),
        (6, 5),
        (4, 6),
    ]
    assert progress.step == 8
    assert main(["solve", "--no-plots", "--resume", "half", "--max-steps", "5000"]) == 0
    assert solve(*DEEP, "--out", "whole") == 0
    assert summary("half")["value"] == pytest.approx(summary("whole")["value"], rel=1e-9)
    assert summary("half")["steps"] > 8


def test_a_start_with_hidden_layers_fits_its_own_problem_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert solve(*DEEP, "--out", "a") == 0
    given = DEEP[:-2]
    assert solve(*given, "--start-from", "a", "--out", "b") == 0
    assert summary("b")["steps"] <= 2
    plain = (*DEEP[:6], "--start-from", "a", "--out", "c")
    assert "hidden layers must have shapes [], got [(6, 5), (4, 6)]" in refused(
        capsys, "solve", *plain, "--dim", "4"
    )
    tensors = load_state(RunDirectory.open(Path("a")))[0]
    bad = {name: tensors[name].numpy() for name in ("W", "H", "hidden1")}
    name = saved("bad.npz", **bad, hidden2=np.zeros((4, 6), dtype=np.int64))
    assert "hidden2 in bad.npz must be floating" in refused(
        capsys, "solve", *given, "--start-from", name
    )


def test_metrics_of_a_deep_run_are_those_of_its_solve(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*RELU, "--out", "r") == 0
    capsys.readouterr()
    assert main(["metrics", "r", "--json"]) == 0
    found, before = printed(capsys)["metrics"], summary("r")["metrics"]
    assert set(found) == set(before)
    assert {"layer0/nc1_pinv", "layer1/nc2_means_frame", "energy/hidden1", "logit_rank"} <= set(
        found
    )
    for name, value in found.items():
        assert (
            value == pytest.approx(before[name], rel=1e-9, abs=1e-12, nan_ok=True)
            or value is before[name] is None
        )
    assert main(["metrics", "r"]) == 0
    assert "layer1/nc1_pinv" in capsys.readouterr().out
    tensors = {
        name: x.numpy()
        for name, x in load_state(RunDirectory.open(Path("r")))[0].items()
        if name != "row_counts"
    }
    assert "give a run directory" in refused(capsys, "metrics", saved("x.npz", **tensors))


def test_a_damaged_deep_state_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    assert solve(*DEEP, "--out", "r") == 0
    path = Path("r", "state.safetensors")
    tensors = load_file(path)
    meta = {
        "format": "ufm-fast-state",
        "reduce": "classes",
        "step": "1",
        "evaluations": "1",
        "seconds": "1",
    }
    save_file({**tensors, "hidden2": torch.zeros(4, 7, dtype=torch.float64)}, path, meta)
    assert "do not fit one another" in refused(capsys, "solve", "--resume", "r")
    save_file({key: value for key, value in tensors.items() if key != "hidden2"}, path, meta)
    assert "do not fit one another" in refused(capsys, "metrics", "r")
    save_file(
        {
            **tensors,
            "hidden1": tensors["hidden1"][:5].clone(),
            "hidden2": tensors["hidden2"][:, :5].clone(),
        },
        path,
        meta,
    )
    assert "does not fit config.json" in refused(capsys, "metrics", "r")


def test_exports_hold_the_hidden_layers() -> None:
    assert solve(*DEEP, "--out", "r") == 0
    for kind in ("npz", "csv"):
        assert main(["export", "r", "--format", kind, "--quiet"]) == 0
    layer = load_state(RunDirectory.open(Path("r")))[0]["hidden1"].numpy()
    with np.load(Path("r", "export", "run.npz")) as content:
        assert np.array_equal(content["hidden1"], layer)
        assert {"hidden2", "log_layer2/nc1_pinv"} <= set(content.files)
    table = np.loadtxt(Path("r", "export", "hidden1.csv"), delimiter=",", skiprows=1)
    assert np.array_equal(table, layer)


def test_restarts_are_in_the_summary_and_a_resume_goes_on_from_the_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ("--restarts", "3", "--max-steps", "6")
    assert solve(*DEEP, *few, "--out", "r") == 3
    table = summary("r")["restarts"]
    assert [row["seed"] for row in table] == [0, 1, 2]
    assert summary("r")["value"] == min(row["value"] for row in table)
    capsys.readouterr()
    assert main(["solve", "--no-plots", "--resume", "r", "--max-steps", "5000"]) == 0
    assert "goes on from the best point of 3 of 3 starts" in capsys.readouterr().err
    after = summary("r")
    assert after["restarts"] == table  # and none is begun anew
    assert after["value"] < min(row["value"] for row in table)
    assert main(["solve", "--no-plots", "--resume", "r"]) == 0  # finished


def test_the_screen_shows_starts_rank_energies_and_layers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert solve(*DEEP, "--restarts", "3", "--out", "r", "--quiet") == 0
    capsys.readouterr()
    content = {**summary("r"), "config": RunDirectory.open(Path("r")).config}
    console = Console(width=150, record=True)
    console.print(report.result_table(content, "r"))
    console.print(report.restarts_table(content))
    text = console.export_text()
    for words in (
        "3 layers (linear)",
        "the best of 3, and 3 within 1e-8",
        "rank of the logits",
        "hidden2",
        "nc2_means_frame by layer",
    ):
        assert words in text
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("│ ") and "converged" in line and "outcome" not in line
    ]
    assert len(rows) == 3


def test_what_a_kink_and_a_small_start_mean_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert solve(*DEEP[:-2], "--start", "small", "--out", "small") == 0
    assert "zero is a strict local minimum" in " ".join(summary("small")["notes"])
    from ufm_fast.solvers import staged

    monkeypatch.setattr(staged.RoundedKinks, "kinks", (1e-1,))
    monkeypatch.setattr(staged, "STAGE_STEPS", 5)  # too few for any stage
    monkeypatch.setattr(staged.RoundedKinks, "last_steps", 5)
    assert solve(*RELU, "--out", "kink", "--loss", "mse") == 3
    assert summary("kink")["outcome"] == "kink"
    assert "stopped at a kink of the ReLU" in capsys.readouterr().err


def test_layers_have_a_figure() -> None:
    pytest.importorskip("matplotlib")
    from ufm_fast.runs.figures import make_figures

    assert solve(*RELU, "--reduce", "none", "--out", "r") == 0
    axes = make_figures(RunDirectory.open(Path("r")))["layers"].axes
    assert [len(ax.lines) for ax in axes] == [2, 2]
    assert axes[0].get_legend_handles_labels()[1] == ["H", "after layer 1"]


def test_what_is_saved_along_the_way_is_the_best_of_the_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ufm_fast import Problem, solve
    from ufm_fast.solvers import minimise

    monkeypatch.setattr(minimise, "SAVE_SECONDS", 0.0)
    saved: list[tuple[StepRecord, object, Starts]] = []
    problem = Problem(classes=3, dim=4, per_class=2, layers=2, lambda_w=1e-3, lambda_h=1e-3, seed=2)
    solution = solve(
        problem,
        start="normal",
        restarts=4,
        max_steps=9,
        on_save=lambda *given: saved.append(given),
        metrics=False,
    )
    ends = [row.value for row in solution.restarts]
    assert len(ends) == 4
    assert min(ends[1:]) < ends[0]  # so that later starts have something to save
    along = [(record, starts) for record, _, starts in saved if 9 < record.step < 36]
    assert any(starts.pending for _, starts in along)
    for record, starts in along:
        assert (
            starts.done
            == solution.restarts[
                : record.step // 9 if not starts.pending else (record.step - 1) // 9
            ]
        )
        least = min(ends[: len(starts.done)])
        assert record.value < least if starts.pending else record.value == least
    assert saved[-1][0].value == solution.value == min(ends)


class Killed(BaseException):
    """Ends a process as a kill does: nobody catches it."""


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("step", [9, 14, 18, 25])
@pytest.mark.parametrize("clock", [False, True])
def test_a_kill_in_a_later_start_loses_neither_the_best_nor_a_start_that_has_ended(
    seed: int, step: int, clock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill as a start has ended, in its midst, and in a start after that; with saves along the
    way and without.
    """
    from ufm_fast.runs.job import prepare
    from ufm_fast.runs.resuming import resume
    from ufm_fast.runs.running import execute
    from ufm_fast.solvers import minimise, restarts

    given = {
        "classes": 3,
        "dim": 4,
        "per_class": 2,
        "layers": 2,
        "start": "normal",
        "restarts": 3,
        "max_steps": 9,
    }
    given |= {"lambda_w": 1e-3, "lambda_h": 1e-3, "seed": seed, "log_every": 1}
    whole = execute(prepare(given, None, Path("whole")), lambda record: None)
    begun: list[int] = []
    make_start = restarts.make_start
    monkeypatch.setattr(
        restarts,
        "make_start",
        lambda *a, seed, **k: begun.append(seed) or make_start(*a, seed=seed, **k),
    )
    if clock:
        monkeypatch.setattr(minimise, "SAVE_SECONDS", 0.0)

    def kill(record: StepRecord) -> None:
        if record.step == step and len(begun) == 1 + (step - 1) // 9:
            raise Killed

    with pytest.raises(Killed):
        execute(prepare(given, None, Path("r")), kill)
    before = load_state(RunDirectory.open(Path("r")))[1].starts
    assert before.done == whole.restarts[: len(before.done)]
    assert len(before.done) == (step - 1) // 9
    ended = len(begun)
    found = execute(resume(Path("r"), {}, None), lambda record: None)
    assert set(begun[ended:]).isdisjoint(row.seed for row in before.done)
    assert [row.seed for row in found.restarts] == [seed, seed + 1, seed + 2]
    assert found.restarts[: len(before.done)] == before.done
    assert found.value <= whole.value
    if not clock:
        assert [row.value for row in found.restarts] == [row.value for row in whole.restarts]
        assert found.value == whole.value


def test_log_points_of_later_starts_do_not_take_the_place_of_the_best(tmp_path: Path) -> None:
    from ufm_fast.runs.job import prepare

    job = prepare(
        {"classes": 3, "dim": 4, "layers": 2, "start": "normal", "restarts": 2}, None, Path("r")
    )
    log = Log(job, lambda record: None)
    for step, value in enumerate((0.5, 0.9)):
        log(
            StepRecord(step, value, value, 1.0, float(step), 0.0),
            lambda value=value: _filled(job.problem, value),
        )
    log.leave(saving=True)
    assert float(saved_model(job.run)[2].W[0, 0]) == 0.5


def _filled(problem, value: float):
    from ufm_fast.objective import Objective
    from ufm_fast.starts import make_start

    objective = Objective(problem)
    return objective.to_model(make_start(objective, "normal")).map(
        lambda part: torch.full_like(part, value)
    )
