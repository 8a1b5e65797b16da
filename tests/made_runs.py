"""An empty run directory for tests."""

from __future__ import annotations

from pathlib import Path

from ufm_fast.runs.directory import RunDirectory

CONFIG = {"loss": "ce", "tol": 1e-9, "counts": None}


def make(path: Path, digest: str = "digest") -> RunDirectory:
    run = RunDirectory.create(path, CONFIG, digest, {"versions": {"ufm-fast": "0"}})
    run.unlock()
    return run
