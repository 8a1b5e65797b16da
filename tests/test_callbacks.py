"""What a solve tells while it runs: callbacks, metrics in its history, seconds by phase, words of
long phases, TensorBoard.
"""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from command_line import printed, refused

from ufm_fast import Problem, solve
from ufm_fast.cli import heartbeat, main
from ufm_fast.errors import InputError
from ufm_fast.measure import collapse_metrics
from ufm_fast.solvers import restarts
from ufm_fast.solvers.callbacks import Callback
from ufm_fast.stopwatch import NO_WATCH, Stopwatch
from ufm_fast.tensorboard import TensorBoard

PROBLEM = Problem(counts=[4, 2, 1], dim=4, lambda_w=1e-2, lambda_h=1e-2)


class Record(Callback):
    def __init__(self):
        self.heard = []

    def phase(self, name):
        self.heard.append(("phase", name))

    def log(self, record, point):
        self.heard.append(("log", record.step, float(point().W.norm())))

    def step(self, step, value, gradient_norm):
        self.heard.append(("step", step, value, gradient_norm))

    def end(self, solution):
        self.heard.append(("end", solution))


def test_callbacks_hear_phases_log_points_steps_and_the_end_in_order():
    first, second = Record(), Record()
    solution = solve(
        PROBLEM, start="normal", method="gd", max_steps=5, log_every=2, callbacks=[first, second]
    )
    assert first.heard == second.heard
    assert [event[:2] for event in first.heard[:-1]] == [
        ("phase", "start"),
        ("phase", "steps"),
        ("log", 0),
        ("step", 1),
        ("step", 2),
        ("log", 2),
        ("step", 3),
        ("step", 4),
        ("log", 4),
        ("step", 5),
        ("log", 5),
        ("phase", "certificate"),
        ("phase", "metrics"),
    ]
    assert first.heard[-1] == ("end", solution)
    last = next(event for event in reversed(first.heard) if event[0] == "step")
    assert last[2:] == (solution.value, solution.gradient_norm)
    assert first.heard[-4][2] == float(solution.point.W.norm())


def test_steps_of_several_starts_are_numbered_through():
    heard = Record()
    solve(PROBLEM, start="normal", restarts=2, method="gd", max_steps=3, callbacks=[heard])
    assert [event[1] for event in heard.heard if event[0] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_callback_that_stops_keeps_the_solution():
    class Stop(Callback):
        def step(self, step, value, gradient_norm):
            if step == 3:
                raise KeyboardInterrupt

    solution = solve(PROBLEM, start="normal", method="gd", callbacks=[Stop()])
    assert (solution.outcome.value, solution.steps) == ("interrupted", 3)


@pytest.mark.parametrize("wanted", [False, True, None])
def test_the_history_has_metrics_where_they_are_asked_for(wanted):
    solution = solve(PROBLEM, start="normal", max_steps=4, log_metrics=wanted)
    last = solution.history[-1]
    expected = (
        {}
        if wanted is False
        else collapse_metrics(PROBLEM, solution.point, solution.reduce, solution.value)
    )
    assert last.metrics == expected
    assert {"step", "value", *expected} <= last.flat().keys()
    assert "metrics" not in last.flat()


def test_a_watch_gives_each_phase_its_own_seconds():
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0])
    watch = Stopwatch(clock=lambda: next(now))
    with watch("outer"):  # from 1
        with watch("inner"):  # from 3 to 6
            pass
        for _ in watch.each("inner", [None]):  # 10 to 15; and the end of the items, 21 to 28
            pass
    assert watch.seconds == {"outer": 2.0 + 4.0 + 6.0 + 8.0, "inner": 3.0 + 5.0 + 7.0}
    with NO_WATCH("outer"):
        assert list(NO_WATCH.each("inner", [1, 2])) == [1, 2]
    assert NO_WATCH.seconds == {}


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_a_watched_solve_tells_its_phases_and_has_the_same_bits(loss):
    problem = Problem(counts=[4, 2, 1], dim=4, loss=loss, lambda_w=1e-2, lambda_h=1e-2)
    watched, plain = (
        solve(problem, start="normal", watch=Stopwatch()),
        solve(problem, start="normal"),
    )
    assert torch.equal(watched.point.W, plain.point.W)
    assert plain.phases == {}
    products = {"logits", "dH", "dW"} if loss == "ce" else set()
    assert watched.phases.keys() == {"solver", "head", "certificate", "metrics", *products}
    assert all(seconds > 0 for seconds in watched.phases.values())


def test_verbose_shows_seconds_by_phase(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("solve", "--classes", "3", "--dim", "4", "--start", "normal", "--no-plots")
    assert main([*small, "--verbose", "--out", "a"]) == 0
    words = capsys.readouterr().out
    assert "seconds by phase" in words
    assert all(name in words for name in ("logits", "dH", "dW", "solver", "metrics"))
    assert main([*small, "--verbose", "--json", "--out", "b"]) == 0
    assert {"logits", "dH", "dW", "solver", "metrics"} <= printed(capsys)["phases"].keys()
    assert main([*small, "--json", "--out", "c"]) == 0
    assert "phases" not in printed(capsys)


def test_a_phase_that_takes_long_is_said(capsys, tmp_path, monkeypatch):
    """1e8 rows ran for two minutes without a word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heartbeat, "WAITS", (0.01,))
    said, make_start = threading.Event(), restarts.make_start
    note = heartbeat.Heartbeat.__init__

    def begin(self, say, **options):
        note(
            self,
            lambda words: (say(words), said.set() if "making the start" in words else None),
            **options,
        )

    def slow(*given, **named):
        assert said.wait(30)
        return make_start(*given, **named)

    monkeypatch.setattr(heartbeat.Heartbeat, "__init__", begin)
    monkeypatch.setattr(restarts, "make_start", slow)
    small = ["solve", "--classes", "3", "--dim", "4", "--per-class", "5", "--no-plots"]
    assert main([*small, "--reduce", "none", "--out", "r"]) == 0
    assert "s: making the start; 15 rows, 3 classes, 4 dimensions\n" in capsys.readouterr().err
    monkeypatch.setattr(heartbeat.Heartbeat, "__init__", note)
    monkeypatch.setattr(restarts, "make_start", make_start)
    monkeypatch.setattr(heartbeat, "WAITS", (0.0,))
    assert main([*small, "--quiet", "--out", "q"]) == 0
    assert capsys.readouterr().err == ""


def test_tensorboard_gets_log_points_and_the_result(tmp_path, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            written["folder"] = folder

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def close(self):
            written["closed"] = True

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    board = TensorBoard(tmp_path)
    assert written == {}
    solution = solve(
        PROBLEM, start="normal", log_metrics=True, callbacks=[board], watch=Stopwatch()
    )
    for record in solution.history:
        assert written["solve/value", record.step] == record.value
        assert written["solve/nc1_pinv", record.step] == record.metrics["nc1_pinv"]
    assert written["result/relative_gap", solution.steps] == solution.certificate.relative_gap
    assert written["seconds/solver", solution.steps] == solution.phases["solver"]
    assert written["closed"]
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "solve",
                "--classes",
                "3",
                "--dim",
                "4",
                "--tensorboard",
                "--quiet",
                "--no-plots",
                "--out",
                "r",
            ]
        )
        == 0
    )
    assert written["folder"] == str(Path("r", "tensorboard"))


def test_without_its_package_tensorboard_is_refused_before_anything_is_left(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install 'ufm-fast"):
        TensorBoard(tmp_path)
    assert "ufm-fast[tensorboard]" in refused(
        capsys, "solve", "--classes", "3", "--dim", "4", "--tensorboard", "--out", "r"
    )
    assert not Path("r").exists()
