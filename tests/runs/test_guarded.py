"""One process at a time writes to a run directory, and none over another's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make

from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory

ROOT = Path(__file__).parents[2]


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    held = (
        "import sys\nfrom pathlib import Path\nfrom ufm_fast.runs.directory import RunDirectory\n"
    )
    held += (
        "with RunDirectory.open(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    "
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is writing"), run.locked():
            pass
        other.communicate("")
    with run.locked():
        pass


def test_two_runs_made_at_once_in_one_folder_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process writes between this one's look at the folder and its first file."""
    plain = RunDirectory._make_folders

    def slow(run: RunDirectory, path: Path) -> None:
        monkeypatch.undo()
        plain(run, path)
        make(path, "theirs")

    monkeypatch.setattr(RunDirectory, "_make_folders", slow)
    with pytest.raises(InputError, match="holds a run with another configuration"):
        make(tmp_path / "r", "ours")
    assert RunDirectory.open(tmp_path / "r").hash == "theirs"
    assert (tmp_path / "r" / "environment.json").exists()


def test_a_run_that_another_process_has_gone_on_with_is_not_overwritten(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    read = run.stamp()
    with run.locked(read):
        run.write_summary({"outcome": "converged"})
    with pytest.raises(InputError, match="resume it again"), run.locked(read):
        pass
