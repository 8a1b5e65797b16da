"""Processes of torch.distributed for tests: a script's ranks, started together, and what the ranks
have written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_ranks(script: str, number: int, folder: Path, *arguments: str) -> None:
    """Run ``script RANK FOLDER ..`` of tests/ on so many ranks, kernels under triton's interpreter;
    it fails where one of them does, with what they said.
    """
    path = os.pathsep.join(
        str(TESTS.parent / name) for name in (".", "tests", "kernels", "examples")
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, TESTS / script, str(rank), folder, *arguments],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "TRITON_INTERPRET": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        said = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(said)
