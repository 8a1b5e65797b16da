"""Kills, full disks and broken ones at each file operation of a run: nothing is lost, nothing is
left, one line is said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are forks")
def test_no_fault_of_a_file_operation_costs_a_run(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).parent / "fault_worker.py"),
        str(tmp_path),
    ]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    first = [entry for entry in found if "operations" in entry]
    assert [(entry["code"], entry["words"]) for entry in first] == [(0, "")] * 2
    assert all(entry["operations"] > 40 for entry in first)  # else the worker does not see them
    assert [entry for entry in found if "short" in entry] == []
