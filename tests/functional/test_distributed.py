"""The drop-in loss of DTensors: what `dtensor_worker` checked on two gloo processes, and what a plain call does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[str, float, float]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("dtensor_worker.py", 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_dtensors_give_what_one_process_does(checked: list[list[tuple[str, float, float]]], rank: int) -> None:
    assert len(checked[rank]) > 200
    assert not [found for found in checked[rank] if not found[1] <= found[2]]


def test_a_plain_call_does_not_import_what_dtensors_need() -> None:
    code = (
        "import sys, torch; from ufm_fast.functional import linear_cross_entropy\n"
        "linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))\n"
        "sys.exit('ufm_fast.functional.distributed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
