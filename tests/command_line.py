"""Calling the command line in tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ufm_fast.cli import main

ROOT = Path(__file__).parents[1]
SMALL = (
    "--classes",
    "4",
    "--dim",
    "6",
    "--per-class",
    "3",
    "--lambda-w",
    "0.01",
    "--lambda-h",
    "0.01",
)
#: Far from converged whatever the machine.
ENDLESS = (
    "--method",
    "gd",
    "--start",
    "normal",
    "--learning-rate",
    "1e-6",
    "--max-steps",
    "100000000",
    "--tol",
    "1e-99",
)


def solve(*arguments: str) -> int:
    return main(["solve", "--no-plots", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with exit code 2, one line of it, and leave nothing
    behind.
    """
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(list(arguments)) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert "Traceback" not in streams.err
    assert sorted(Path().rglob("*")) == before
    return streams.err.lower()


def printed(capsys: pytest.CaptureFixture[str]) -> dict:
    """The one JSON object on standard output; nan is not JSON."""
    text = capsys.readouterr().out
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def child(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ufm_fast.cli", *arguments]
    before = signal.getsignal(signal.SIGINT)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # tests in a shell's background ignore it, and so would the child
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(command, env=environment, text=True, **streams)
    finally:
        signal.signal(signal.SIGINT, before)


def saved(name: str, **arrays: np.ndarray) -> str:
    np.savez(name, **arrays)
    return name
