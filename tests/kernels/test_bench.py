"""The GPU scripts, rehearsed on a CPU: plan, checks against float64, table, and that a second call
goes on.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

BENCH = Path(__file__).parents[2] / "bench"
rehearsal = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the scripts run in earnest on a device"
)


def call(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCH / script), "--rehearse", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@rehearsal
def test_the_heads_are_checked_timed_and_not_timed_twice(tmp_path, monkeypatch):
    """With a peer that cannot be imported, which its rows say."""
    broken = tmp_path / "cut_cross_entropy"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('no device here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "table"
    call("gpu.py", "--out", str(out))
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["contender"].startswith("ufm_kernels")]
    assert {
        "ufm_kernels bf16",
        "ufm_kernels bf16, captured",
        "ufm_kernels bf16, blocks",
        "ufm_kernels bf16, blocks, captured",
        "ufm_kernels fp8",
        "ufm_kernels fp16x3",
        "ufm_kernels tf32x3, one pass",
    } <= {row["contender"] for row in ours}
    assert any(
        "no device here" in row["note"] for row in rows if row["contender"].startswith("Cut")
    )
    ladder, solved = ([row for row in rows if row["task"] == task] for task in ("errors", "solve"))
    assert {row["stage"] for row in ladder} == {"1e-3", "1e-8"}
    assert all(
        float(row["loss_error"]) < 1e-2
        for row in ladder
        if row["contender"].startswith("ufm_kernels")
    )
    assert [float(row["evaluations"]) >= 2 for row in solved] == [True]
    ours = [row for row in ours if row["task"] in ("cross-entropy", "squared error")]
    assert all(float(row["ms"]) > 0 for row in ours)
    assert all(float(row["grad_weight_error"]) < 2e-2 for row in ours)
    terminal = [
        row
        for row in ours
        if row["stage"] == "terminal" and row["contender"] == "ufm_kernels tf32x3"
    ]
    assert terminal
    assert all(float(row["loss_error"]) < 1e-5 for row in terminal)
    assert any(
        row["task"] == "squared error" and float(row["percent_of_floor"]) > 0 for row in rows
    )
    assert (tmp_path / "table_roofline.png").exists()
    assert (tmp_path / "table_ratio.png").exists()
    again = call("gpu.py", "--out", str(out))
    assert f"{len(rows)} rows" in again
    assert "0 tasks left" in again


def test_rows_of_a_rung_are_as_far_as_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from oracle import LADDER, data, margin_of, reference

    for rung in LADDER[:-1]:
        inputs = data(64, 4096, 512, margin_of(rung, 4096, 512), torch.float32, "cpu")
        left = float(-torch.expm1(-reference(*inputs)["loss"]))
        assert left == pytest.approx(float(rung), rel=0.3)


def test_peers_that_fail_do_not_end_the_run(monkeypatch):
    """One fails only when it is called the second time."""
    monkeypatch.syspath_prepend(str(BENCH))
    from device import interleaved

    calls = {"fine": lambda index: None, "late": iter([0]).__next__}
    times, failed = interleaved(
        {"fine": calls["fine"], "late": lambda index: calls["late"]()}, 0.01, 3
    )
    assert len(times["fine"]) == 3
    assert list(failed) == ["late"]


@rehearsal
def test_a_lost_device_is_left_for_a_new_process(tmp_path, monkeypatch):
    """What the task had is in the table before the command begins again, without the tests and with
    the time that is left.
    """
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    begun = []
    monkeypatch.setattr(
        gpu,
        "survived",
        lambda task, most: iter([{**task._asdict(), "note": "illegal memory access"}]),
    )
    monkeypatch.setattr(gpu, "usable", lambda: False)
    monkeypatch.setattr(gpu.os, "execv", lambda path, command: begun.append(command))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "table"])
    tasks = gpu.plan(quick=False, rehearse=True)[:1]
    table = tmp_path / "table.csv"
    gpu.run(tasks, {"commit": "c", "device": "d"}, table, time.monotonic() + 600, 1, passed=False)
    assert "illegal memory access" in table.read_text()
    assert begun[0][1:5] == ["gpu.py", "--out", "table", "--skip-tests"]
    assert 0 < float(begun[0][-2]) <= 10
    assert begun[0][-1] == "--tests-failed"


@rehearsal
def test_no_task_is_started_that_would_not_end_in_time(tmp_path):
    assert "0 rows" in call("gpu.py", "--out", str(tmp_path / "table"), "--minutes", "0.1")


@rehearsal
def test_tiles_are_compared_with_the_tables(tmp_path):
    printed = call("tune.py", "--out", str(tmp_path / "tiles"))
    assert all(
        f"{kernel} d=40 tile present" in printed
        for kernel in ("off_target", "product", "transposed")
    )
    assert "WRONG" not in (tmp_path / "tiles.csv").read_text()
