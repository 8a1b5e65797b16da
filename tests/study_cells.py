"""Studies in tests: a small one, cells in this process, and rows to compare."""

from __future__ import annotations

from pathlib import Path

import torch

from ufm_fast.studies import worker
from ufm_fast.studies.table import MEASURED

SOLVE = {"dim": 6, "per_class": 3, "lambda_w": 1e-2, "start": "normal", "device": "cpu"}
CONTENT = {
    "solve": SOLVE,
    "axes": {"classes": [4, 5], "seed": [0, 1]},
    "derived": {"lambda_h": "lambda_w / n", "ratio": "K / d"},
}


class InProcess:
    """In the place of a worker: cells of this process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def solve(self, path: Path, given: dict[str, object]) -> worker.Reply:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return worker.solve_cell(path, given)
        finally:
            torch.set_num_threads(before)

    def stop(self, kill: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


def compared(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows without what two runs differ in."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]
