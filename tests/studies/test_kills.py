"""Kills of a study's processes, and disks that are full: nothing is lost, nothing is solved twice, one line is said."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
from command_line import ROOT

from ufm_fast.studies.folder import toml_text


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes by /proc")
def test_ten_kills_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = script("study_kills")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = {**kills.CONTENT, "axes": {"classes": [4, 40], "dim": [8, 48], "method": ["gd", "auto"]}}
    Path("s.toml").write_text(toml_text(content))
    assert kills.command(Path("s.toml"), Path("plain"), 2).wait() == 0
    random.seed(1)
    victims = [("cell", 0.1), ("worker", 0.0), ("cell", 0.0), ("runner", 0.5), ("cell", 0.2), ("worker", 0.2), ("cell", 0.05)]
    victims += [("worker", 0.1), ("runner", 0.2), ("cell", 0.0)]
    done = 0
    while done < len(victims):  # a study may end before it took them all: then another one does
        folder = Path(f"disturbed-{done}")
        done += kills.disturbed(Path("s.toml"), folder, victims[done:])[0]
        kills.check(folder, Path("plain"))
