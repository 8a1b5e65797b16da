"""What reaches the terminal: names with anything in them, a standard error that is gone, and the
progress bar.
"""

from __future__ import annotations

import errno
import math
import sys
from pathlib import Path

import pytest
from command_line import SMALL, child, refused, solve

from ufm_fast.cli import main
from ufm_fast.cli.progress import _Way
from ufm_fast.runs.words import printable


def test_names_of_folders_and_arrays_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("r[/]", "r[bold]", "a\n\x1b[31mb"):
        assert solve(*SMALL, "--out", name) == 0
        out = capsys.readouterr().out
        assert printable(name) in out
        assert "\x1b" not in out
        assert main(["plot", name, "--compare", "figures"]) == 0
        message = refused(capsys, "solve", *SMALL, "--lambda-w", "0.1", "--out", name)
        assert message.count("\n") == 1
        assert "\x1b" not in message


class _Gone:
    """A terminal that hung up."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def isatty(self) -> bool:
        return True

    encoding = "utf-8"


def test_a_standard_error_that_is_gone_costs_its_words_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", _Gone())
    assert solve(*SMALL, "--start", "normal", "--out", "r") == 0
    assert Path("r/summary.json").exists()
    assert solve(*SMALL, "--start", "normal", "--max-steps", "1", "--out", "s") == 3
    assert solve("--resume", "nowhere") == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_error_leaves_the_exit_code(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = child("solve", *SMALL, "--no-plots", "--out", "r", stderr=full)
        process.communicate()
    assert process.returncode == 0
    assert Path("r/summary.json").exists()


def test_the_bar_never_goes_backwards() -> None:
    way = _Way(1e-10)
    gone = [way.gone(norm) for norm in (1.0, 1e-5, 1e-3, math.nan, 1e-6, 1e-12)]
    assert gone == sorted(gone)
    assert gone[0] == 0.0
    assert gone[1] == pytest.approx(0.5)
    assert gone[-1] == 1.0
