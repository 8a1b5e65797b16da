"""Data for ``ufm-fast solve``: counts, labels, named sets, target sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import printed, saved, solve

from ufm_fast.cli import main
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.settings import build_problem, resolve


def test_the_same_counts_from_a_list_a_text_and_an_array(
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save("counts.npy", np.array([5, 3, 2]))
    Path("counts.txt").write_text("5\n3\n2\n")
    found = []
    for number, source in enumerate(("5,3,2", "counts.txt", "counts.npy")):
        assert (
            solve(
                "--counts",
                source,
                "--dim",
                "4",
                "--out",
                f"r{number}",
                "--json",
                "--lambda-w",
                "0.01",
            )
            == 0
        )
        found.append((printed(capsys)["value"], RunDirectory.open(Path(f"r{number}")).hash))
    assert len(set(found)) == 1


def test_a_list_of_counts_may_be_longer_than_a_file_name() -> None:
    config = resolve({"counts": ",".join(["12"] * 1000), "dim": 2})
    assert build_problem({**config, "device": "cpu"}).num_classes == 1000


def test_labels_and_their_resume_without_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("y.npy", np.array([2, 0, 1, 1, 0, 2, 2]))
    assert (
        solve(
            "--labels",
            "y.npy",
            "--dim",
            "4",
            "--out",
            "r",
            "--max-steps",
            "1",
            "--start",
            "normal",
            "--quiet",
        )
        == 3
    )
    Path("y.npy").unlink()
    assert solve("--resume", "r", "--max-steps", "500", "--json") == 0
    assert printed(capsys)["config"]["classes"] == 3


def test_a_named_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve("--labels", "digits", "--dim", "12", "--lambda-h", "1e-5", "--json") == 0
    assert printed(capsys)["config"]["classes"] == 10


def test_multi_label_targets(capsys: pytest.CaptureFixture[str]) -> None:
    sets = saved(
        "sets.npz",
        indptr=np.array([0, 1, 2, 3, 5]),
        indices=np.array([0, 1, 2, 0, 1]),
        counts=np.array([4, 4, 4, 2]),
    )
    assert solve("--loss", "pick-all", "--targets", sets, "--dim", "5", "--out", "r", "--json") == 0
    assert printed(capsys)["config"]["classes"] == 3
    Path(sets).unlink()
    assert main(["metrics", "r", "--json"]) == 0
    found = printed(capsys)
    assert found["skipped_rows"] == 1
    assert found["metrics"]["nc3"] > 0
    assert main(["plot", "r"]) == 0
