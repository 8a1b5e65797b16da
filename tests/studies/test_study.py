"""Running a study: the table, a restart, parts of it, what fails, and who is asked to stop."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from command_line import child, printed
from study_cells import CONTENT, SOLVE, InProcess, compared

import ufm_fast
from ufm_fast import Problem, solve
from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.studies import library, runner, worker
from ufm_fast.studies.cells import chains
from ufm_fast.studies.folder import StudyFolder
from ufm_fast.studies.spec import make_study
from ufm_fast.studies.table import MEASURED, UNFINISHED, Table, read_rows


def test_a_study_is_a_row_a_cell_and_a_second_call_solves_nothing() -> None:
    if sys.version_info >= (3, 11):  # no worker takes a file of the user for a module
        Path("random.py").write_text("raise ImportError('a file of the user')")
    result = ufm_fast.study(CONTENT, "out", jobs=2)
    assert not result.failed
    assert [(row["classes"], row["seed"], row["ratio"]) for row in result.rows] == [
        (4, 0, 4 / 6), (4, 1, 4 / 6), (5, 0, 5 / 6), (5, 1, 5 / 6),
    ]  # fmt: skip
    for row in result.rows:
        problem = Problem(
            classes=row["classes"], dim=6, per_class=3, lambda_w=1e-2, lambda_h=1e-2 / 3
        )
        plain = solve(problem, start="normal")
        assert row["value"] == pytest.approx(plain.value, rel=1e-9)
        assert (row["outcome"], row["certificate"], row["certified"]) == (
            "converged",
            "exact",
            True,
        )
        assert row["evaluations"] > row["steps"] > 0
        assert 0 < row["peak_extra_bytes"] < row["peak_bytes"]
        assert row["nc3"] == pytest.approx(plain.metrics["nc3"], rel=1e-3, abs=1e-6)
        assert row["simplex_level"] == pytest.approx(-1 / (row["classes"] - 1))
        assert row["threads"] == 1
        assert RunDirectory.open(Path("out/cells", row["cell"])).summary["value"] == row["value"]
    with Path("out/table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["value"]) for row in written] == [row["value"] for row in result.rows]
    import pyarrow.parquet

    assert pyarrow.parquet.read_table("out/table.parquet").column("value").to_pylist() == [
        row["value"] for row in result.rows
    ]
    before = {path: path.stat().st_mtime_ns for path in Path("out/cells").rglob("*")}
    again = ufm_fast.study(CONTENT, "out")
    assert compared(again.rows) == compared(result.rows)
    assert {path: path.stat().st_mtime_ns for path in Path("out/cells").rglob("*")} == before


@pytest.mark.usefixtures("in_process")
def test_shards_share_a_folder_and_make_the_whole_study() -> None:
    for part in (1, 2, 3):
        result = library.study(CONTENT, "parts", shard=f"{part}/3")
        assert sum(row["outcome"] != UNFINISHED for row in result.rows) == (2, 3, 4)[part - 1]
    whole = library.study(CONTENT, "whole")
    assert compared(result.rows) == compared(whole.rows)
    assert Path("parts/study.toml").read_text() == Path("whole/study.toml").read_text()


@pytest.mark.usefixtures("in_process")
def test_a_study_grows_and_no_other_takes_its_folder() -> None:
    library.study(CONTENT, "out")
    before = {path: path.stat().st_mtime_ns for path in Path("out/cells").rglob("*.json")}
    more = {**CONTENT, "axes": {**CONTENT["axes"], "seed": [0, 1, 2]}}
    assert len(library.study(more, "out").rows) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for other in (CONTENT, {**more, "study": {"starts": 2}}):
        with pytest.raises(InputError, match="holds another study"):
            library.study(other, "out")


@pytest.mark.usefixtures("in_process")
def test_all_starts_are_kept_and_the_best_is_the_result() -> None:
    content = {
        "solve": {**SOLVE, "classes": 4, "dim": 2},
        "axes": {"seed": [0]},
        "study": {"starts": 3},
    }
    row = library.study(content, "out").rows[0]
    kept = json.loads(Path("out/cells", row["cell"], "summary.json").read_text())["restarts"]
    assert row["starts"] == len(kept) == 3
    assert row["value"] == min(start["value"] for start in kept)
    assert 1 <= row["starts_at_best"] <= 3


@pytest.mark.usefixtures("in_process")
def test_warm_cells_start_where_the_one_before_ended() -> None:
    solve = {name: value for name, value in SOLVE.items() if name not in ("start", "lambda_w")}
    axes = {"lambda_w": [1e-2, 1.01e-2, 1.02e-2]}
    content = {
        "solve": {**solve, "classes": 5, "method": "lbfgs"},
        "axes": axes,
        "study": {"warm": "lambda_w"},
    }
    rows = library.study(content, "out").rows
    starts = [
        json.loads(Path("out/cells", row["cell"], "summary.json").read_text())["start"]
        for row in rows
    ]
    assert starts == ["spectral", "given", "given"]
    assert all(row["certified"] for row in rows)


@pytest.mark.usefixtures("in_process")
def test_a_cell_that_fails_is_said_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = worker._solve

    def broken(path: Path, given: dict[str, object]) -> str:
        if given["seed"] == 1 and given["classes"] == 4:
            raise RuntimeError("it broke\nbadly")
        return plain(path, given)

    Path("s.toml").write_text(library.toml_text(CONTENT))
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_solve", broken)
        assert main(["study", "s.toml", "--out", "out", "--json"]) == 3
    found = printed(capsys)
    assert list(found["failed"].values()) == ["RuntimeError: it broke"]
    assert [row["outcome"] for row in found["rows"]] == [
        "converged",
        UNFINISHED,
        "converged",
        "converged",
    ]
    assert "raise RuntimeError" in Path("out/errors.log").read_text()
    assert main(["study", "s.toml", "--out", "out"]) == 0
    assert "4 of 4 cells finished, 3 of them before" in capsys.readouterr().out


# ---- cells that go on


def interrupted(
    path: Path, given: dict[str, object], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that was stopped at a step."""
    from ufm_fast.solvers.first_order import GradientDescent

    plain, count = GradientDescent.step, iter(range(10**6))

    def stopping(solver: GradientDescent, *arguments: object) -> object:
        if next(count) == step:
            raise KeyboardInterrupt
        return plain(solver, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GradientDescent, "step", stopping)
        assert worker.solve_cell(path, given) == {"state": "interrupted"}


def test_a_broken_cell_takes_the_steps_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ANEW_SECONDS", 0.0)
    given = {
        **SOLVE,
        "classes": 4,
        "method": "gd",
        "learning_rate": 0.1,
        "max_steps": 40,
        "tol": 1e-15,
    }
    assert worker.solve_cell(Path("whole"), given) == {"state": "done"}
    interrupted(Path("half"), given, 13, monkeypatch)
    interrupted(Path("half"), given, 20, monkeypatch)
    assert worker.solve_cell(Path("half"), given) == {"state": "done"}
    whole, half = (RunDirectory.open(Path(name)).summary for name in ("whole", "half"))
    assert (
        (half["steps"], half["outcome"]) == (whole["steps"], whole["outcome"]) == (40, "max_steps")
    )
    assert half["value"] == pytest.approx(whole["value"], rel=1e-12)
    assert (half["resumed_at"], whole.get("resumed_at")) == (33, None)
    assert half["evaluations"] == whole["evaluations"] + 2  # the saved point, at each resume
    assert worker.solve_cell(Path("half"), given) == {
        "state": "done"
    }  # a limit that was reached is an end
    assert RunDirectory.open(Path("half")).summary == half


def test_cells_of_less_than_ten_seconds_and_of_several_starts_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, step, more, least in (("short", 17, {}, 10.0), ("starts", 50, {"restarts": 2}, 0.0)):
        monkeypatch.setattr(worker, "ANEW_SECONDS", least)
        given = {**SOLVE, "classes": 4, "method": "gd", "max_steps": 40, "tol": 1e-15, **more}
        assert worker.solve_cell(Path(name), given) == {"state": "done"}
        whole = RunDirectory.open(Path(name)).summary
        interrupted(Path(f"broken-{name}"), given, step, monkeypatch)
        assert worker.solve_cell(Path(f"broken-{name}"), given) == {"state": "done"}
        again = RunDirectory.open(Path(f"broken-{name}")).summary
        times = ("seconds", *MEASURED, "hash")
        assert {k: v for k, v in again.items() if k not in times} == {
            k: v for k, v in whole.items() if k not in times
        }


def test_a_cell_that_another_process_has_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(CONTENT, "s")
    folder = StudyFolder.create(Path("out"), study, library.toml_text(CONTENT))
    first = chains(study)[0][0]
    assert worker.solve_cell(folder.cell(first), first.given) == {"state": "done"}
    Path(folder.cell(first), "summary.json").unlink()
    theirs, states, plain = RunDirectory.open(folder.cell(first)), [], InProcess.solve

    def solve(self: InProcess, path: Path, given: dict[str, object]) -> worker.Reply:
        states.append(plain(self, path, given))
        return states[-1]

    def until_it_is_busy(self: runner.Runner) -> None:
        if any(reply["state"] == "busy" for reply in states):
            theirs.unlock()

    monkeypatch.setattr(runner, "Worker", InProcess)
    monkeypatch.setattr(InProcess, "solve", solve)
    monkeypatch.setattr(runner.Runner, "_write_by_the_clock", until_it_is_busy)
    theirs.lock()
    result = library.study(CONTENT, "out")
    assert not result.failed
    assert [row["outcome"] for row in result.rows] == ["converged"] * 4
    assert [reply["state"] for reply in states].count("done") == 4


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_signal_saves_the_cells_and_the_same_command_goes_on(number: signal.Signals) -> None:
    slow = {
        **SOLVE,
        "classes": 4,
        "method": "gd",
        "learning_rate": 1e-6,
        "max_steps": 10**8,
        "tol": 1e-15,
        "log_every": 1000,
    }
    content = {"solve": slow, "axes": {"seed": [0, 1]}}
    Path("s.toml").write_text(library.toml_text(content))
    process = child("study", "s.toml", "--out", "out")
    until = time.monotonic() + 120
    while not list(Path("out").glob("cells/*/state.safetensors")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted and saved; the same command goes on (0 of 2 cells finished)" in words
    (begun,) = Path("out/cells").iterdir()
    assert RunDirectory.open(begun).summary["outcome"] == "interrupted"
    assert RunDirectory.open(begun).summary["steps"] > 0
    rows = read_rows(StudyFolder.open(Path("out")))
    assert [row["outcome"] for row in rows] == [UNFINISHED] * 2


# ---- before it runs


def test_a_dry_run_prints_the_cells_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(library.toml_text(CONTENT))
    assert main(["study", "s.toml", "--dry-run", "--json"]) == 0
    cells = printed(capsys)["cells"]
    assert [cell["classes"] for cell in cells] == [4, 4, 5, 5]
    assert all(cell["bytes"] > 0 and cell["seconds_per_evaluation"] > 0 for cell in cells)
    assert main(["study", "s.toml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(cells[0]["cell"] in line for line in lines) == 1
    assert list(Path().iterdir()) == [Path("s.toml")]
    assert main(["study", "list"]) == 0
    assert "sweep: " in capsys.readouterr().out


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [runner.threads_each(jobs) for jobs in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    assert runner.threads_each(1) == 3


def test_the_remaining_time_goes_by_the_work_that_is_left() -> None:
    progress = runner.Progress(4, work_left=30.0, work_done=10.0, began=time.monotonic() - 5.0)
    assert progress.remaining == pytest.approx(15.0, rel=0.1)
    assert runner.Progress(4, work_left=30.0).remaining is None


def test_columns_do_not_depend_on_the_order_of_solving() -> None:
    study = make_study(CONTENT, "s")
    folder = StudyFolder.create(Path("out"), study, library.toml_text(CONTENT))
    for chain in reversed(chains(study)):
        worker.solve_cell(folder.cell(chain[0]), chain[0].given)
        Table(folder, [cell for chain in chains(study) for cell in chain]).write()
        header = Path("out/table.csv").read_text().splitlines()[0]
    assert header.startswith("cell,classes,seed,lambda_h,ratio,loss,dim,per_class,lambda_w,")
    assert len(header.split(",")) == len(set(header.split(",")))
