"""``metrics``, ``plan``, ``doctor``, ``export``, ``plot`` and presets on the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, printed, refused, saved, solve

from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.foreign import read_tensors


def test_plan_refuses_what_solve_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ("--method", "foo"),
        ("--method", "closed_form"),
        ("--history", "0"),
        ("--reduce", "rows"),
    ):
        assert flags[0].strip("-") in refused(
            capsys, "plan", "--classes", "5", "--dim", "8", *flags
        )


def test_metrics_of_a_run_are_those_of_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--json", "--start", "normal") == 0
    solved = printed(capsys)["metrics"]
    assert main(["metrics", "r", "--json"]) == 0
    found = printed(capsys)["metrics"]
    assert found["nc2_classifier"] == pytest.approx(solved["nc2_classifier"], abs=1e-12)
    assert main(["metrics", "r/state.safetensors", "--json", "--pairwise", "none"]) == 0
    assert "nc4" not in printed(capsys)["metrics"]
    assert main(["metrics", "r"]) == 0
    assert "nc2_classifier" in capsys.readouterr().out


def test_metrics_of_saved_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "W": generator.normal(size=(3, 5)),
        "H": generator.normal(size=(9, 5)),
        "labels": np.arange(9) % 3,
    }
    assert main(["metrics", saved("head.npz", **arrays), "--json"]) == 0
    assert printed(capsys)["metrics"]["nc1_pinv"] > 0
    assert "labels" in refused(capsys, "metrics", saved("a.npz", W=arrays["W"], H=arrays["H"]))
    assert "labels" in refused(
        capsys, "metrics", saved("b.npz", **{**arrays, "labels": np.arange(9) % 3 / 1.0})
    )
    for name, words, change in (
        ("nan", "h in nan.npz must be finite", {"H": np.full((9, 5), np.nan)}),
        ("whole", "w in whole.npz must have a real floating dtype", {"W": np.ones((3, 5), int)}),
        (
            "turned",
            "w and h in turned.npz must have as many columns",
            {"H": np.ones((5, 9)), "labels": np.arange(5) % 3},
        ),
        (
            "single",
            "w in single.npz must have at least 2 rows",
            {"W": np.ones((1, 5)), "labels": np.zeros(9, int)},
        ),
        ("few", "labels in few.npz must have shape (9,) to match h", {"labels": np.arange(3)}),
        ("high", "labels in high.npz must lie in [0, 3)", {"labels": np.arange(9)}),
        ("bias", "b in bias.npz must have shape (3,) to match the rows of w", {"b": np.ones(4)}),
        ("classes", "counts in classes.npz must have shape (9,)", {"counts": np.array([3, 3, 3])}),
        ("minus", "counts in minus.npz must not be negative", {"counts": -np.ones(9)}),
    ):
        message = refused(capsys, "metrics", saved(f"{name}.npz", **{**arrays, **change}))
        assert f"source: {words}" in message
        assert not {"weight", "features", ".float()"} & set(re.split("[ ;]", message)), message
    assert "pairwise" in refused(capsys, "metrics", "head.npz", "--pairwise", "some")
    assert "no file" in refused(capsys, "metrics", "missing.npz")
    Path("head.txt").write_text("1 2 3")
    assert ".npz" in refused(capsys, "metrics", "head.txt")
    Path("empty").mkdir()
    assert "run directory" in refused(capsys, "metrics", "empty")


def test_counts_in_a_file_weigh_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    W, H, labels, counts = (
        generator.normal(size=(3, 5)),
        generator.normal(size=(6, 5)),
        np.arange(6) % 3,
        np.arange(1, 7),
    )
    found = []
    for number, arrays in enumerate(
        (
            {"H": H, "labels": labels, "counts": counts},
            {"H": np.repeat(H, counts, 0), "labels": np.repeat(labels, counts)},
        )
    ):
        assert main(["metrics", saved(f"{number}.npz", W=W, **arrays), "--json"]) == 0
        found.append(printed(capsys)["metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-10)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--classes", "50", "--dim", "16", "--json"]) == 0
    plan = printed(capsys)
    assert plan["flops"] == 6 * 50 * 50 * 16
    assert main(["plan", "--labels", "digits"]) == 0
    assert "reduce=classes" in capsys.readouterr().out
    assert "reduce" in refused(capsys, "plan", "--reduce", "some")
    assert "dim" in refused(capsys, "plan", "--dim", "0")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = printed(capsys)
    assert report["passed"]
    assert len(report["self_test"]) >= 5
    assert report["versions"]["torch"] == torch.__version__


def test_doctor_fails_when_an_answer_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ufm_fast import doctor

    monkeypatch.setattr(doctor, "_ALLOWED", dict.fromkeys(doctor._ALLOWED, -1.0))
    monkeypatch.setattr(doctor, "_against_theory", lambda loss: lambda: 1 / 0)
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_export_keeps_every_digit(kind: str) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet", "--start", "normal") == 0
    assert main(["export", "r", "--format", kind, "--out", "e", "--quiet"]) == 0
    W = read_tensors(Path("r"), "run")["W"].numpy()
    values = [record["value"] for record in RunDirectory.open(Path("r")).records()]
    if kind == "npz":
        with np.load("e/run.npz") as content:
            found, log = content["W"], content["log_value"]
    elif kind == "csv":
        found = np.loadtxt("e/W.csv", delimiter=",", skiprows=1)
        log = np.genfromtxt("e/log.csv", delimiter=",", names=True)["value"]
    else:
        from pandas import read_parquet

        found, log = (
            read_parquet("e/W.parquet").to_numpy(),
            read_parquet("e/log.parquet")["value"].to_numpy(),
        )
    assert np.array_equal(found, W)
    assert log.tolist() == values


def test_export_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert "format" in refused(capsys, "export", "r", "--format", "xls")
    Path("file").write_text("")
    assert "can't write" in refused(capsys, "export", "r", "--out", "file/x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "ufm-fast[tables]" in refused(capsys, "export", "r", "--format", "parquet", "--out", ".")


def test_plots_are_drawn_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet", "--start", "normal") == 0
    assert not Path("r/plots").exists()
    assert main(["plot", "r"]) == 0
    names = {path.name for path in Path("r/plots").iterdir()}
    assert names == {
        f"{name}.{kind}"
        for name in ("convergence", "collapse", "gram", "geometry")
        for kind in ("png", "pdf")
    }


def test_without_matplotlib_a_solve_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["solve", *SMALL, "--out", "r"]) == 0
    assert "ufm-fast[plot]" in capsys.readouterr().err
    assert "ufm-fast[plot]" in refused(capsys, "plot", "r")


def test_presets_are_listed_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "--list-presets"]) == 0
    assert "our choice" in capsys.readouterr().out
    assert solve("--preset", "dang2023", "--json") == 0
    assert printed(capsys)["value"] == pytest.approx(0.0198, rel=1e-9)


def test_an_error_that_is_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from ufm_fast.cli import commands

    monkeypatch.setattr(commands, "plot", lambda runs, compare: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plot", "r"])


def test_input_errors_of_the_library_become_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ufm_fast.cli import commands

    def fail(runs: object, compare: object) -> None:
        raise InputError("runs are wrong; mend them")

    monkeypatch.setattr(commands, "plot", fail)
    assert refused(capsys, "plot", "r") == "error: runs are wrong; mend them\n"
