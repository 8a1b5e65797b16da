"""``ufm-fast solve`` as a user meets it: help, what is printed where, which exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT, SMALL, printed, refused, solve

from ufm_fast.cli import main
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.options import SETTINGS
from ufm_fast.runs.settings import build_problem, resolve
from ufm_fast.runs.state import load_state


def test_importing_the_command_line_and_its_help_imports_no_torch() -> None:
    code = (
        "import sys; from ufm_fast.cli import main\n"
        "assert main(['solve', '--help']) == 0 and main([]) == 0 and main(['--version']) == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'rich.progress'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=-3,
    )


def test_choices_in_the_help_are_those_of_the_library() -> None:
    from ufm_fast.backends import BACKENDS
    from ufm_fast.losses import LOSSES
    from ufm_fast.problem import BIASES, DTYPES
    from ufm_fast.scales import VARIABLES
    from ufm_fast.solving import METHODS
    from ufm_fast.starts import STARTS

    tables = {
        "loss": LOSSES,
        "bias": BIASES,
        "dtype": DTYPES,
        "method": METHODS,
        "backend": BACKENDS,
        "start": STARTS,
        "variables": VARIABLES,
    }
    for name, table in tables.items():
        words = set(re.split(r"[ |:]+", SETTINGS[name].help))
        assert set(table) <= words, name


def test_defaults_are_those_of_the_library() -> None:
    from dataclasses import asdict

    from ufm_fast.problem import Problem
    from ufm_fast.solvers.options import SolveOptions

    problem = Problem(dim=3, classes=4)
    defaults = {
        **{name: getattr(problem, name) for name in vars(problem)},
        **asdict(SolveOptions()),
    }
    # A problem without flags is the command line's, the device is chosen there, and its log has
    # metrics where they cost little.
    own = {"dim", "device", "loss", "classes", "log_metrics"}
    for name, flag in SETTINGS.items():
        if name in defaults and name not in own:
            assert flag.default == defaults[name], name


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("solve", "metrics", "plan", "plot", "doctor", "export"):
        assert main([command, "--help"]) == 0
        assert "Usage: ufm-fast" in capsys.readouterr().out


def test_without_flags_there_is_a_problem_that_does_not_collapse() -> None:
    config = resolve({})
    assert config["preset"] == "demo"
    problem = build_problem({**config, "device": "cpu"})
    c = problem.num_classes * math.sqrt(config["per_class"]) * problem.mu
    assert 0 < c < 1
    assert problem.dim >= problem.num_classes - 1


def test_json_is_one_object_with_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--json", "--start", "normal") == 0
    result = printed(capsys)
    assert {
        "outcome",
        "value",
        "data_value",
        "gradient_norm",
        "steps",
        "evaluations",
        "seconds",
        "backend",
        "method",
        "theory",
        "certificate",
        "metrics",
        "run",
        "config",
    } <= set(result)
    assert {"value", "source"} <= set(result["theory"])
    assert {"kind", "certified", "lower_bound", "relative_gap", "spectral_ratio"} <= set(
        result["certificate"]
    )
    assert result["value"] == pytest.approx(result["theory"]["value"], rel=1e-9)
    assert result["config"]["device"] in ("cpu", "cuda")
    run = RunDirectory.open(Path(result["run"]))
    assert run.summary is not None
    assert run.summary["value"] == result["value"]
    assert run.config == result["config"]
    assert Path(result["run"]).name == f"ce-4-6-{run.hash[:8]}"
    assert run.records()[0]["step"] == 0
    assert {"nc2_classifier", "nc3", "nc4", "gradient_norm"} <= set(run.records()[-1])
    assert (
        json.loads((run.path / "environment.json").read_text())["versions"]["torch"]
        == torch.__version__
    )


def test_a_table_and_figures_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", *SMALL, "--out", "r"]) == 0
    streams = capsys.readouterr()
    for word in (
        "outcome",
        "converged",
        "theory",
        "certificate",
        "nc2_classifier",
        "r/plots/convergence.png",
    ):
        assert word in streams.out
    assert "chosen by auto" in streams.err
    assert Path("r/plots/geometry.pdf").stat().st_size > 1000


def test_a_file_of_settings_solves(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("counts = [4, 2]\ndim = 3\nlambda_w = 0.01\ncertificate = true\n")
    assert solve("-c", "run.toml", "--json", "--dim", "5") == 0
    config = printed(capsys)["config"]
    assert (config["counts"], config["dim"]) == ([4, 2], 5)


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "extra", [("--loss", "mse", "--bias", "free"), ("--smoothing", "0.1"), ("--freeze", "w")]
)
def test_kinds_of_problems(extra: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, *extra, "--json") == 0
    assert printed(capsys)["outcome"] in ("converged", "stalled")


def test_unconverged_is_exit_3_and_resume_finishes_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, "--start", "normal", "--out", "r", "--json")
    assert solve(*arguments, "--max-steps", "2") == 3
    first = printed(capsys)
    assert first["outcome"] == "max_steps"
    assert "--resume r" in refused(capsys, "solve", *arguments)
    assert solve("--resume", "r", "--max-steps", "500", "--json") == 0
    second = printed(capsys)
    assert second["value"] == pytest.approx(second["theory"]["value"], rel=1e-9)
    assert second["steps"] > first["steps"]
    assert second["evaluations"] > first["evaluations"]
    steps = [record["step"] for record in RunDirectory.open(Path("r")).records()]
    assert steps == sorted(set(steps))
    assert solve("--resume", "r", "--json") == 0
    assert printed(capsys)["value"] == second["value"]
    assert solve("--resume", "r") == 0
    assert "finished" in capsys.readouterr().err


def test_a_diverged_run_is_exit_3_and_resumes_from_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (
        "--loss",
        "mse",
        "--method",
        "gd",
        "--learning-rate",
        "1e6",
        "--start",
        "normal",
        "--out",
        "r",
        "--json",
    )
    assert main(["solve", *SMALL, *arguments]) == 3
    assert printed(capsys)["outcome"] == "diverged"
    assert load_state(RunDirectory.open(Path("r")))[0]["W"].abs().max() < 10
    assert solve("--resume", "r", "--method", "lbfgs", "--json") == 0
    result = printed(capsys)
    assert result["value"] == pytest.approx(result["theory"]["value"], rel=1e-9)


def test_the_closed_form_is_logged_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", *SMALL, "--method", "closed-form", "--out", "r", "--quiet"]) == 0
    assert [record["step"] for record in RunDirectory.open(Path("r")).records()] == [0]
    assert Path("r/plots/gram.png").exists()


def test_frozen_features_keep_a_row_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        solve(
            *SMALL,
            "--freeze",
            "h",
            "--start",
            "normal",
            "--out",
            "r",
            "--quiet",
            "--max-steps",
            "2",
        )
        == 3
    )
    tensors, _, reduce = load_state(RunDirectory.open(Path("r")))
    assert (tensors["H"].shape, reduce) == ((12, 6), "none")
    assert solve("--resume", "r", "--max-steps", "500", "--quiet") == 0
    assert torch.equal(load_state(RunDirectory.open(Path("r")))[0]["H"], tensors["H"])


def test_a_run_that_diverges_by_finite_values_is_no_bad_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (
        "--classes",
        "5",
        "--dim",
        "8",
        "--method",
        "gd",
        "--learning-rate",
        "1e4",
        "--out",
        "r",
    )
    assert solve(*arguments) == 3
    streams = capsys.readouterr()
    assert "diverged" in streams.out
    assert "--learning-rate" in streams.err
    assert "--max-steps" not in streams.err
    run = RunDirectory.open(Path("r"))
    assert (
        1e140 < run.records()[-2]["value"] < math.inf
    )  # far, and yet no number that a log point could not hold
    assert load_state(run)[0]["W"].abs().max() < 1e70
    assert (
        solve(
            "--resume",
            "r",
            "--learning-rate",
            "0.1",
            "--method",
            "gd",
            "--max-steps",
            "5",
            "--quiet",
        )
        == 3
    )
    assert run.summary is not None
    assert run.summary["outcome"] == "max_steps"


def test_a_terminal_that_lacks_a_letter_gets_an_escape() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "1",
    }
    command = [sys.executable, "-m", "ufm_fast.cli", "solve", *SMALL, "--no-plots", "--out", "ü1"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="ascii"
    )
    assert done.returncode == 0, done.stderr
    assert "\\xfc1" in done.stdout
    assert "converged" in done.stdout


def test_streams_that_are_closed_cost_nothing_but_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by ``2>&-`` in a shell, or on a desktop without a console."""
    out = tmp_path / "run"
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    code = main(["solve", "--classes", "3", "--dim", "4", "--no-plots", "--out", str(out)])
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    assert code == 0
    assert (out / "summary.json").exists()
