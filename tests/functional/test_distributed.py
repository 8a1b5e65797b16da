"""The drop-in loss of DTensors: what `dtensor_worker` checked on gloo processes, and what a
plain call does not import.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks


def _check(folder: Path, number: int) -> None:
    files = sorted(folder.glob(f"*-{number}.json"))
    assert len(files) == number
    for file in files:
        checked = json.loads(file.read_text())
        assert len(checked) > 500
        assert not [found for found in checked if not found[1] <= found[2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("dtensor_worker.py", 3, folder, "cpu", "3")
    return folder


@pytest.mark.parametrize("number", [1, 2, 3])
def test_dtensors_give_what_one_process_does(number: int, folder: Path) -> None:
    _check(folder, number)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one rank a device"
)
def test_dtensors_on_gpus_give_what_one_process_does(tmp_path: Path) -> None:
    run_ranks("dtensor_worker.py", 2, tmp_path, "cuda", "2")
    _check(tmp_path, 2)


def test_a_plain_call_does_not_import_what_dtensors_need() -> None:
    code = (
        "import sys, torch; from ufm_fast.functional import linear_cross_entropy\n"
        "linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))\n"
        "sys.exit('ufm_fast.functional.distributed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
