"""``ufm-fast landscape``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import SMALL, printed, refused, solve

from ufm_fast.cli import main


def test_the_verdict_on_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert main(["landscape", "r", "--json"]) == 0
    found = printed(capsys)
    assert found["classification"] == "global minimum (certified)"
    assert abs(found["eigenvalue"]) < 1e-9 * 0.01
    assert 2 <= found["products"] <= 200
    assert found["variables"] == "balanced"
    assert main(["landscape", "r", "--variables", "raw"]) == 0
    shown = capsys.readouterr().out
    assert "global minimum (certified)" in shown
    assert "classes, raw" in shown
    assert main(["landscape", "r", "--max-products", "2"]) == 0
    shown = capsys.readouterr().out
    assert "not converged; give more --max-products" in shown
    assert "too few products to say" in shown


def test_a_run_that_has_not_converged_is_not_critical(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--start",
        "normal",
        "--max-steps",
        "3",
        "--dtype",
        "float32",
        "--bias",
        "free",
        "--out",
        "r",
        "--quiet",
    )
    assert solve(*SMALL, *flags) == 3
    assert main(["landscape", "r", "--json"]) == 0
    found = printed(capsys)
    assert found["classification"] == "not critical"
    assert found["certificate"] is None
    assert main(["landscape", "r", "--json", "--tol", "0.999999"]) == 0
    assert printed(capsys)["classification"] != "not critical"


def test_layers_and_spheres(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--layers", "2", "--activation", "relu", "--loss", "mse", "--start", "normal")
    assert solve(*SMALL, *flags, "--out", "deep", "--quiet") == 0
    assert main(["landscape", "deep", "--json"]) == 0
    assert "active piece" in printed(capsys)["note"]
    assert main(["landscape", "deep"]) == 0
    assert "kinks" in capsys.readouterr().out
    ball = (
        "--classes",
        "4",
        "--dim",
        "6",
        "--constraint",
        "sphere",
        "--temperature",
        "5",
        "--start",
        "normal",
    )
    assert solve(*ball, "--out", "ball", "--quiet") == 0
    assert main(["landscape", "ball", "--json"]) == 0
    found = printed(capsys)
    assert found["classification"] in ("global minimum (certified)", "no negative curvature found")
    assert abs(found["eigenvalue"]) < 1e-9


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    shutil.copytree("r", "begun")
    Path("begun/state.safetensors").unlink()
    message = refused(capsys, "landscape", "begun")
    assert "no state" in message
    assert "--resume begun" in message
    config = Path("begun/config.json").read_text()
    for change, words in (
        ("kind", "trained network"),
        ("mood", "run: this version does not know the setting mood"),
    ):
        Path("begun/config.json").write_text(
            config.replace('"config": {', f'"config": {{"{change}": "network",')
        )
        shutil.copy("r/state.safetensors", "begun")
        assert words in refused(capsys, "landscape", "begun")
    assert "not a folder" in refused(capsys, "landscape", "none")
    assert "variables" in refused(capsys, "landscape", "r", "--variables", "polar")
    assert "max_products" in refused(capsys, "landscape", "r", "--max-products", "1")
    assert "tol" in refused(capsys, "landscape", "r", "--tol", "2")
    assert solve(*SMALL, "--dim", "7", "--out", "wider", "--quiet") == 0
    shutil.copy("wider/state.safetensors", "r/state.safetensors")
    assert "does not fit" in refused(capsys, "landscape", "r")
