"""Tests that run in the interpreter's process (conftest.py): where they run, and that what fails
there fails here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import MARKS

ROOT = Path(__file__).parents[1]
FAIL = "UFM_TEST_FAIL"


@pytest.mark.interpreted
def test_values_are_interpreted_where_there_is_no_device():
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    assert FAIL not in os.environ, "asked to fail"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled on the device")
def test_a_failure_in_the_interpreters_process_is_one_here():
    assert MARKS[0].name == "interpreted"
    case = (
        f"{Path(__file__).relative_to(ROOT)}::test_values_are_interpreted_where_there_is_no_device"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        FAIL: "1"
    }
    command = [sys.executable, "-m", "pytest", case]
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "asked to fail" in run.stdout
