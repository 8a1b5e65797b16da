"""What a run keeps when it is stopped, fails, meets another writer or has no space, and what
folders it starts in.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import SMALL, refused, solve

from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import WriteError, append_line, sweep
from ufm_fast.runs.guarded import FILES, LOCK
from ufm_fast.runs.job import prepare
from ufm_fast.runs.running import execute
from ufm_fast.runs.state import load_state

GIVEN = {
    "classes": 4,
    "dim": 6,
    "per_class": 3,
    "lambda_w": 0.01,
    "lambda_h": 0.01,
    "start": "normal",
    "device": "cpu",
}


def saved_step(path: str = "r") -> int:
    return load_state(RunDirectory.open(Path(path)))[1].step


# ---- what was reached is saved


def test_a_certificate_that_runs_out_of_memory_keeps_the_last_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ufm_fast.solving.certify", full)
        assert solve(*SMALL, "--start", "normal", "--out", "r", "--quiet") == 2
    streams = capsys.readouterr().err
    assert "go on with: ufm-fast solve --resume r (--no-certificate" in streams
    assert "not enough memory" in streams
    assert saved_step() == RunDirectory.open(Path("r")).records()[-1]["step"] > 0
    assert solve("--resume", "r", "--quiet") == 0


def test_an_error_in_a_step_keeps_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from ufm_fast.solvers.first_order import GradientDescent

    plain, count = GradientDescent.step, iter(range(100))

    def step(solver: GradientDescent, *arguments: object) -> object:
        if next(count) == 7:
            raise ZeroDivisionError
        return plain(solver, *arguments)

    monkeypatch.setattr(GradientDescent, "step", step)
    with pytest.raises(ZeroDivisionError):
        execute(
            prepare({**GIVEN, "method": "gd", "log_every": 100}, None, Path("r")),
            lambda record: None,
        )
    assert saved_step() == 7


def test_the_state_is_saved_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from ufm_fast.solvers import minimise
    from ufm_fast.solvers.first_order import GradientDescent

    steps, plain = [], GradientDescent.step

    def step(solver: GradientDescent, *arguments: object) -> object:
        steps.append(saved_step())
        return plain(solver, *arguments)

    monkeypatch.setattr(GradientDescent, "step", step)
    monkeypatch.setattr(minimise, "SAVE_SECONDS", 0.0)
    now = iter(range(10**6))
    monkeypatch.setattr(
        minimise.time, "perf_counter", lambda: float(next(now))
    )  # a save takes a second: 20 until the next
    execute(
        prepare({**GIVEN, "method": "gd", "log_every": 10**6, "max_steps": 90}, None, Path("r")),
        lambda record: None,
    )
    assert 3 <= len(set(steps)) <= 12
    assert saved_step() == 90


# ---- places that can't be written any more


def test_a_folder_that_is_moved_meanwhile_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = RunDirectory.append

    def append(run: RunDirectory, record: dict[str, object]) -> None:
        if record["step"] == 2:
            run.path.rename("elsewhere")
        plain(run, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", append)
        assert solve(*SMALL, "--start", "normal", "--out", "r", "--quiet") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not Path("r").exists()
    assert solve("--resume", "elsewhere", "--quiet") == 0


def test_a_line_of_the_log_is_written_whole_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(Path("log"), "first")
    plain, sizes = os.write, iter((3, 0))

    def write(handle: int, content: bytes) -> int:
        size = next(sizes)
        if not size:
            raise OSError(28, "No space left on device")
        return plain(handle, content[:size])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(
        WriteError, match=r"can't write log \(No space left on device\).*free some space"
    ):
        append_line(Path("log"), "second")
    assert Path("log").read_text() == "first\n"


# ---- folders


def test_what_a_killed_start_left_is_swept_and_foreign_files_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("r").mkdir()
    Path("r", LOCK).touch()
    Path("r/environment.json").write_text('{"versions": {"ufm-fast": "0.1.0"}}')
    for name in (
        ".config.json.abcdefg1",
        ".environment.json.host-1.abcdefg1",
        f".state.safetensors.x-{2**40}.abcdefg1",
    ):
        Path("r", name).write_text("half")
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert {path.name for path in Path("r").iterdir()} == {*FILES, LOCK}
    for number, (name, text) in enumerate(
        (
            (".config.json.mine", ""),
            ("environment.json", '{"versions": 3}'),
            ("environment.json", "{}"),
            ("metrics.jsonl", ""),
        )
    ):
        Path(f"f{number}").mkdir()
        Path(f"f{number}", name).write_text(text)
        assert "not empty" in refused(capsys, "solve", *SMALL, "--out", f"f{number}")
        assert [path.name for path in Path(f"f{number}").iterdir()] == [name]


def test_temporary_files_of_the_living_stay() -> None:
    from ufm_fast.runs.files import atomic

    Path("plots").mkdir()
    old, strange = Path("plots/.gram.pdf.abcdefg1"), Path("plots/.gram.pdf.other-1.abcdefg1")
    for path in (old, strange, Path("plots/.mine.pdf")):
        path.touch()
    os.utime(old, (0, 0))
    with atomic(Path("plots/gram.png")) as ours:
        sweep(Path("plots"))
        assert {path.name for path in Path("plots").iterdir()} == {
            ours.name,
            strange.name,
            ".mine.pdf",
        }


def test_links_do_not_lead_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    Path("other").mkdir()
    for name, command in (("plots", ("plot", "r")), ("export", ("export", "r"))):
        Path("r", name).symlink_to(Path("other").absolute())
        assert "link" in refused(capsys, *command)
    assert not list(Path("other").iterdir())
    Path("victim").write_text("mine")
    Path("r", LOCK).unlink()
    Path("r", LOCK).symlink_to(Path("victim").absolute())
    assert "lock" in refused(capsys, "solve", "--resume", "r", "--tol", "1e-12")
    assert Path("victim").read_text() == "mine"


# ---- several writers


def test_a_writer_stops_where_another_has_gone_on() -> None:
    """As where .lock was removed, or the file system has no locks."""
    job = prepare(GIVEN, None, Path("r"))

    def meanwhile(record: object) -> None:
        if record.step == 3:
            other = RunDirectory.open(Path("r"))
            other.write_summary({"outcome": "converged"})

    with pytest.raises(InputError, match="another process has gone on with r"):
        execute(job, meanwhile)
    assert RunDirectory.open(Path("r")).summary == {"outcome": "converged"}


def test_a_late_process_hears_of_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    job = prepare(
        {**GIVEN, "max_steps": 1}, None, Path("r")
    )  # which holds the folder from its first file on
    assert "another process is writing to r" in refused(capsys, "solve", *SMALL, "--out", "r")
    execute(job, lambda record: None)
    assert "--resume r" in refused(
        capsys, "solve", *SMALL, "--start", "normal", "--device", "cpu", "--out", "r"
    )


# ---- figures


def test_what_keeps_a_figure_from_being_drawn_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "x")
        assert main(["solve", *SMALL, "--out", "r"]) == 0
        assert (
            "no plots: plots: matplotlib can't draw r/plots/collapse.pdf" in capsys.readouterr().err
        )
        assert "matplotlib can't draw" in refused(capsys, "plot", "r")
    # A run that was killed while it drew is finished, and draws when it is resumed.
    assert main(["solve", "--resume", "r"]) == 0
    assert "convergence.pdf" in capsys.readouterr().out
    assert main(["solve", "--resume", "r"]) == 0
    assert "convergence.pdf" not in capsys.readouterr().out
