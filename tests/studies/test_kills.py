"""Kills of a study's processes, and disks that are full: nothing is lost, nothing is solved twice,
one line is said.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROOT
from study_cells import SOLVE

from bench import study_kills as kills
from ufm_fast.cli import main
from ufm_fast.runs import state
from ufm_fast.studies.folder import toml_text


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes by /proc")
def test_ten_kills_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = {
        **kills.CONTENT,
        "axes": {"classes": [4, 40], "dim": [8, 48], "method": ["gd", "auto"]},
    }
    Path("s.toml").write_text(toml_text(content))
    assert kills.command(Path("s.toml"), Path("plain"), 2).wait() == 0
    random.seed(1)
    victims = [
        ("cell", 0.1),
        ("worker", 0.0),
        ("cell", 0.0),
        ("runner", 0.5),
        ("cell", 0.2),
        ("cell", 0.1),
        ("cell", 0.05),
    ]
    victims += [("worker", 0.1), ("runner", 0.2), ("cell", 0.0)]
    done = 0
    while done < len(victims):  # a study may end before it took them all: then another one does
        folder = Path(f"disturbed-{done}")
        done += kills.disturbed(Path("s.toml"), folder, victims[done:])[0]
        kills.check(folder, Path("plain"))


# ---- a full disk


def fill(patch: pytest.MonkeyPatch, at: int) -> None:
    """Let everything that takes space fail from the ``at``-th on."""
    count = iter(range(10**9))

    def full(
        plain: Callable[..., object], of: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., object]:
        def write(*arguments: object, **options: object) -> object:
            if of(*arguments) and next(count) >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(*arguments, **options)

        return write

    patch.setattr(tempfile, "mkstemp", full(tempfile.mkstemp))
    patch.setattr(
        Path, "write_text", full(Path.write_text, lambda path, *_: "/proc" not in str(path))
    )
    patch.setattr(os, "write", full(os.write))
    patch.setattr(os, "mkdir", full(os.mkdir))
    patch.setattr(state, "save_file", full(state.save_file))


def finished() -> dict[str, str]:
    return {
        path.parent.name: path.read_text() for path in Path("full").glob("cells/*/summary.json")
    }


@pytest.mark.usefixtures("in_process")
def test_a_full_disk_at_any_write_is_a_line_and_finished_cells_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = {
        "classes": 3,
        "dim": 3,
        "max_steps": 2,
        "certificate": False,
        "pairwise": "none",
        "log_metrics": False,
    }
    content = {"solve": {**SOLVE, **quick}, "axes": {"seed": [0, 1]}}
    Path("s.toml").write_text(toml_text(content))
    command = ["study", "s.toml", "--out", "full", "--quiet"]
    at, code = 0, 2
    while code == 2:
        with pytest.MonkeyPatch.context() as patch:
            fill(patch, at)
            code = main(command)
        words = capsys.readouterr().err
        if code == 2:
            assert words.startswith("error: ")
            assert words.count("\n") == 1
            assert "space" in words.lower()
        before = finished()
        assert main(command) == 0  # once there is space again
        assert {name: finished()[name] for name in before} == before
        assert len(finished()) == 2
        shutil.rmtree("full")
        at += 1
    assert code == 0
    assert at > 30
