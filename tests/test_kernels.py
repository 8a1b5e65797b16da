"""Run the value tests of the kernels under triton's interpreter, in a process of their own (see kernels/conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled on the device")
def test_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="triton has no build for this platform")
    tests = Path(__file__).parent / "kernels"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--durations=5", str(tests)]
    run = subprocess.run(command, env=environment, cwd=tests.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
