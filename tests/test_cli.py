"""The command line as a user meets it: exit codes, what is printed where, what is on disk afterwards."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ufm_fast.cli import main
from ufm_fast.cli.config import RESUMABLE, build_problem, digest, resolve
from ufm_fast.cli.flags import BY_NAME
from ufm_fast.errors import InputError
from ufm_fast.run_directory import RunDirectory
from ufm_fast.run_state import load_state, read_tensors

ROOT = Path(__file__).parents[1]
SMALL = ("--classes", "4", "--dim", "6", "--per-class", "3", "--lambda-w", "0.01", "--lambda-h", "0.01")
#: Far from converged whatever the machine.
ENDLESS = ("--method", "gd", "--start", "normal", "--learning-rate", "1e-6", "--max-steps", "100000000", "--tol", "1e-99")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def solve(*arguments: str) -> int:
    return main(["solve", "--no-plots", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with exit code 2, one line of it, and leave nothing behind."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(list(arguments)) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert "Traceback" not in streams.err
    assert sorted(Path().rglob("*")) == before
    return streams.err.lower()


def printed(capsys: pytest.CaptureFixture[str]) -> dict:
    """The one JSON object on standard output; nan is not JSON."""
    text = capsys.readouterr().out
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def child(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ufm_fast.cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- help -----------------------------------------------------------------------------------------------------------


def test_importing_the_command_line_and_its_help_imports_no_torch() -> None:
    code = (
        "import sys; from ufm_fast.cli import main\n"
        "assert main(['solve', '--help']) == 0 and main([]) == 0 and main(['--version']) == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'rich.progress'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-3)


def test_choices_in_the_help_are_those_of_the_library() -> None:
    from ufm_fast.backends import BACKENDS
    from ufm_fast.losses import LOSSES
    from ufm_fast.objective import VARIABLES
    from ufm_fast.problem import BIASES, DTYPES
    from ufm_fast.solving import METHODS
    from ufm_fast.starts import STARTS

    tables = {
        "loss": LOSSES, "bias": BIASES, "dtype": DTYPES, "method": METHODS, "backend": BACKENDS, "start": STARTS,
        "variables": VARIABLES,
    }  # fmt: skip
    for name, table in tables.items():
        words = set(re.split(r"[ |:]+", BY_NAME[name].help))
        assert set(table) <= words, name


def test_defaults_are_those_of_the_library() -> None:
    import inspect

    from ufm_fast.problem import Problem
    from ufm_fast.solving import solve as library_solve

    parameters = {**inspect.signature(Problem).parameters, **inspect.signature(library_solve).parameters}
    own = {"dim", "device", "loss"}  # a problem without flags is the command line's; the device is chosen there
    for name, flag in BY_NAME.items():
        if name in parameters and name not in own:
            assert flag.default == parameters[name].default, name


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("solve", "metrics", "plan", "plot", "doctor", "export"):
        assert main([command, "--help"]) == 0
        assert "Usage: ufm-fast" in capsys.readouterr().out


# ---- solve ----------------------------------------------------------------------------------------------------------


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
        "outcome", "value", "data_value", "gradient_norm", "steps", "evaluations", "seconds", "backend", "method",
        "theory", "certificate", "metrics", "run", "config",
    } <= set(result)  # fmt: skip
    assert {"value", "source"} <= set(result["theory"])
    assert {"kind", "certified", "lower_bound", "relative_gap", "spectral_ratio"} <= set(result["certificate"])
    assert result["value"] == pytest.approx(result["theory"]["value"], rel=1e-9)
    assert result["config"]["device"] in ("cpu", "cuda")
    run = RunDirectory.open(Path(result["run"]))
    assert run.summary is not None
    assert run.summary["value"] == result["value"]
    assert run.config == result["config"]
    assert Path(result["run"]).name == f"ce-4-6-{run.hash[:8]}"
    assert run.records()[0]["step"] == 0
    assert {"nc2_classifier", "nc3", "nc4", "gradient_norm"} <= set(run.records()[-1])
    assert json.loads((run.path / "environment.json").read_text())["versions"]["torch"] == torch.__version__


def test_a_table_and_figures_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", *SMALL, "--out", "r"]) == 0
    streams = capsys.readouterr()
    for word in ("outcome", "converged", "theory", "certificate", "nc2_classifier", "r/plots/convergence.png"):
        assert word in streams.out
    assert "chosen by auto" in streams.err
    assert Path("r/plots/geometry.pdf").stat().st_size > 1000


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("extra", [("--loss", "mse", "--bias", "free"), ("--smoothing", "0.1"), ("--freeze", "w")])
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


def test_a_resumed_run_goes_on_from_its_point(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, "--start", "normal", "--method", "gd", "--learning-rate", "0.1", "--json")
    assert solve(*arguments, "--out", "whole", "--max-steps", "20") == 3
    whole = printed(capsys)
    assert solve(*arguments, "--out", "parts", "--max-steps", "12") == 3
    assert solve("--resume", "parts", "--max-steps", "8", "--json") == 3
    text = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(text)["steps"] == whole["steps"] == 20
    assert json.loads(text)["value"] == pytest.approx(whole["value"], rel=1e-14)


def test_a_diverged_run_is_exit_3_and_resumes_from_before(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--loss", "mse", "--method", "gd", "--learning-rate", "1e6", "--start", "normal", "--out", "r", "--json")
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
    assert solve(*SMALL, "--freeze", "h", "--start", "normal", "--out", "r", "--quiet", "--max-steps", "2") == 3
    tensors, _, reduce = load_state(RunDirectory.open(Path("r")))
    assert (tensors["H"].shape, reduce) == ((12, 6), "none")
    assert solve("--resume", "r", "--max-steps", "500", "--quiet") == 0
    assert torch.equal(load_state(RunDirectory.open(Path("r")))[0]["H"], tensors["H"])


def test_an_interrupt_after_the_last_step_keeps_the_last_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ufm_fast.solving.certify", stop)
        assert solve(*SMALL, "--start", "normal", "--out", "r") == 130
    assert "--resume r" in capsys.readouterr().err
    last = RunDirectory.open(Path("r")).records()[-1]["step"]
    assert load_state(RunDirectory.open(Path("r")))[1].step == last > 0
    assert solve("--resume", "r", "--quiet") == 0


def test_a_tighter_tolerance_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--start", "normal", "--out", "r", "--tol", "1e-2", "--json") == 0
    loose = printed(capsys)
    assert solve("--resume", "r", "--tol", "1e-9", "--json") == 0
    assert printed(capsys)["gradient_norm"] < loose["gradient_norm"]
    assert RunDirectory.open(Path("r")).config["tol"] == 1e-9


def test_resume_refuses_contradictions_and_names_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--max-steps", "1", "--start", "normal", "--quiet") == 3
    message = refused(capsys, "solve", "--resume", "r", "--lambda-w", "0.5")
    assert "lambda_w" in message
    assert all(name in message for name in RESUMABLE)
    assert "--out" in refused(capsys, "solve", "--resume", "r", "--out", "s")
    assert solve("--resume", "r", "--lambda-w", "0.01", "--method", "newton-cg", "--max-steps", "99", "--quiet") == 0


def test_a_start_from_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet", "--start", "normal") == 0
    assert solve(*SMALL, "--out", "s", "--json", "--start-from", "r") == 0
    assert printed(capsys)["steps"] <= 1
    np.savez("bad.npz", W=np.ones((3, 6)), H=np.ones((4, 6)))
    assert "shape" in refused(capsys, "solve", *SMALL, "--no-plots", "--start-from", "bad.npz")
    np.savez("nan.npz", W=np.full((4, 6), np.nan), H=np.ones((4, 6)))
    assert "nan" in refused(capsys, "solve", *SMALL, "--start-from", "nan.npz")
    assert "lacks" in refused(capsys, "solve", *SMALL, "--start-from", _saved("w.npz", W=np.ones((4, 6))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_saved_and_resumed(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--dtype", dtype, "--out", "r", "--start", "normal", "--max-steps", "3", "--quiet") in (0, 3)
    assert load_state(RunDirectory.open(Path("r")))[0]["W"].dtype == torch.float32
    assert solve("--resume", "r", "--max-steps", "3", "--quiet") in (0, 3)


# ---- data -----------------------------------------------------------------------------------------------------------


def _saved(name: str, **arrays: np.ndarray) -> str:
    np.savez(name, **arrays)
    return name


def test_the_same_counts_from_a_list_a_text_and_an_array(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("counts.npy", np.array([5, 3, 2]))
    Path("counts.txt").write_text("5\n3\n2\n")
    found = []
    for number, source in enumerate(("5,3,2", "counts.txt", "counts.npy")):
        assert solve("--counts", source, "--dim", "4", "--out", f"r{number}", "--json", "--lambda-w", "0.01") == 0
        found.append((printed(capsys)["value"], RunDirectory.open(Path(f"r{number}")).hash))
    assert len(set(found)) == 1


def test_a_list_of_counts_may_be_longer_than_a_file_name() -> None:
    config = resolve({"counts": ",".join(["12"] * 1000), "dim": 2})
    assert build_problem({**config, "device": "cpu"}).num_classes == 1000


def test_labels_and_their_resume_without_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("y.npy", np.array([2, 0, 1, 1, 0, 2, 2]))
    assert solve("--labels", "y.npy", "--dim", "4", "--out", "r", "--max-steps", "1", "--start", "normal", "--quiet") == 3
    Path("y.npy").unlink()
    assert solve("--resume", "r", "--max-steps", "500", "--json") == 0
    assert printed(capsys)["config"]["classes"] == 3


def test_a_named_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve("--labels", "digits", "--dim", "12", "--lambda-h", "1e-5", "--json") == 0
    assert printed(capsys)["config"]["classes"] == 10


def test_multi_label_targets(capsys: pytest.CaptureFixture[str]) -> None:
    sets = _saved(
        "sets.npz", indptr=np.array([0, 1, 2, 3, 5]), indices=np.array([0, 1, 2, 0, 1]), counts=np.array([4, 4, 4, 2])
    )
    assert solve("--loss", "pick-all", "--targets", sets, "--dim", "5", "--out", "r", "--json") == 0
    assert printed(capsys)["config"]["classes"] == 3
    Path(sets).unlink()
    assert main(["metrics", "r", "--json"]) == 0
    found = printed(capsys)
    assert found["skipped_rows"] == 1
    assert found["metrics"]["nc3"] > 0
    assert main(["plot", "r"]) == 0


def test_plan_refuses_what_solve_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--method", "foo"), ("--method", "closed_form"), ("--history", "0"), ("--reduce", "rows")):
        assert flags[0].strip("-") in refused(capsys, "plan", "--classes", "5", "--dim", "8", *flags)


def test_runs_are_drawn_together(capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed, loss in (("a", "0", "ce"), ("b", "1", "ce"), ("c", "0", "mse")):
        assert solve("--start", "normal", "--loss", loss, "--seed", seed, "--out", name, "--no-plots", "--quiet") == 0
    capsys.readouterr()
    assert main(["plot", "a", "b", "c", "--compare", "together"]) == 0
    assert sorted(path.name for path in Path("together").iterdir()) == ["compare.pdf", "compare.png"]
    assert "compare.png" in capsys.readouterr().out
    assert not Path("a/plots").exists() or not list(Path("a/plots").iterdir())
    Path("file").write_text("")
    assert "compare" in refused(capsys, "plot", "a", "--compare", "file/sub")
    log = Path("a/metrics.jsonl")
    for text, words in (('{"step": 1}\n', "no value"), ("", "no log")):
        log.write_text(text)
        assert words in refused(capsys, "plot", "b", "a", "--compare", "never")
        assert words in refused(capsys, "plot", "a")
    assert not Path("never").exists()


def test_a_group_keeps_its_style_where_a_panel_lacks_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from ufm_fast import plots
    from ufm_fast.cli import draw
    from ufm_fast.run_directory import RunDirectory

    shown = []
    monkeypatch.setattr(plots, "save", lambda figure, folder, name: shown.append(figure) or [])
    record = {"step": 0, "seconds": 0.0, "value": 1.0, "gradient_norm": 0.5}
    runs = []
    for dim in range(7):
        run = RunDirectory(Path(f"r{dim}"), {"dim": dim, "seed": 0}, "0")
        run.path.mkdir()
        run.append({**record, "nc3": 0.1 if dim == 1 else 0.0})
        runs.append(run)
    draw.draw_together([*runs, runs[0]], Path("figures"))
    axes, legend = shown[0].axes, shown[0].legends[0]
    gradient, nc3 = axes[1].lines, axes[5].lines
    assert len(gradient) == 7
    assert [line.get_color() for line in nc3] == [gradient[1].get_color()]
    assert gradient[6].get_color() == gradient[0].get_color()
    assert gradient[6].get_linestyle() != gradient[0].get_linestyle()
    assert [text.get_text() for text in legend.get_texts()] == [f"dim {dim}" for dim in range(7)]


def test_groups_of_a_comparison_are_named_by_what_differs() -> None:
    from ufm_fast.cli.draw import _group_labels
    from ufm_fast.run_directory import RunDirectory

    def run(**config: object) -> RunDirectory:
        return RunDirectory(Path("runs/x"), config, "0")

    groups = [
        [run(loss="ce", lambda_w=0.1, seed=0), run(loss="ce", lambda_w=0.1, seed=1)],
        [run(loss="ce", lambda_w=1, seed=0)],
    ]
    assert _group_labels(groups) == ["lambda-w 0.1 (2 seeds)", "lambda-w 1"]
    assert _group_labels(groups[1:]) == ["x"]


# ---- configuration --------------------------------------------------------------------------------------------------


def test_flags_over_file_over_preset_over_defaults() -> None:
    Path("run.toml").write_text('preset = "dang2023"\nlambda-w = 0.25\nlambda_h = 1\ndim = 7\n')
    config = resolve({"dim": 9, "classes": None}, Path("run.toml"))
    assert (config["loss"], config["classes"], config["per_class"]) == ("mse", 4, 100)
    assert (config["lambda_w"], config["lambda_h"], config["dim"]) == (0.25, 1.0, 9)
    assert isinstance(config["lambda_h"], float)
    assert config["tol"] == BY_NAME["tol"].default


def test_a_higher_layer_voids_what_no_longer_fits() -> None:
    config = resolve({"preset": "zhou2022-focal", "loss": "ce", "bias": "none", "counts": "3,2,1"})
    assert (config["gamma"], config["lambda_b"], config["per_class"], config["classes"]) == (None, 0.0, None, None)
    assert resolve({"preset": "zhou2022-focal", "gamma": 1.0})["gamma"] == 1.0


def test_a_file_of_settings_solves(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("counts = [4, 2]\ndim = 3\nlambda_w = 0.01\ncertificate = true\n")
    assert solve("-c", "run.toml", "--json", "--dim", "5") == 0
    config = printed(capsys)["config"]
    assert (config["counts"], config["dim"]) == ([4, 2], 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clases = 3", ("clases", "did you mean classes")),
        ("zzz = 3", ("zzz", "--help")),
        ("[problem]\nclasses = 3", ("problem",)),
        ('classes = "3"', ("classes", "whole number")),
        ("classes = true", ("classes", "whole number")),
        ("classes = 3.5", ("classes", "whole number")),
        ('tol = "small"', ("tol", "a number")),
        ("loss = 3", ("loss", "a string")),
        ("certificate = 1", ("certificate", "true or false")),
        ("per_class = 3\nper-class = 3", ("twice",)),
        ("per_class = 3\ncounts = [1, 2]", ("one of",)),
        ("counts = [1, 2.5]", ("counts", "whole")),
        ("classes = ", ("toml",)),
        ('preset = "dang"', ("preset", "dang2023")),
    ],
)
def test_bad_files_of_settings(text: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(text)
    message = refused(capsys, "solve", "-c", "run.toml")
    assert all(word in message for word in words), message


def test_the_hash_knows_what_changes_the_minimum() -> None:
    def name(**given: object) -> str:
        config = {**resolve({"classes": 3, "dim": 4, **given}), "device": "cpu"}
        return digest(config, build_problem(config))

    assert name() == name(tol=1e-3, max_steps=7, pairwise="none")
    assert len({name(), name(lambda_w=0.1), name(seed=1), name(method="gd"), name(per_class=11), name(dtype="float32")}) == 6
    assert name(classes=None, counts="1,2") != name(classes=None, counts="2,1")


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "loss": (("--loss", "hinge"), ("loss", "ce")),
    "one class": (("--classes", "1"), ("classes", "2")),
    "no dimension": (("--dim", "0"), ("dim", "1")),
    "no number": (("--classes", "many"), ("--classes",)),
    "no samples": (("--per-class", "0"), ("per_class",)),
    "unknown flag": (("--clases", "3"), ("--clases", "--classes")),
    "two kinds of data": (("--per-class", "2", "--counts", "1,2"), ("per_class", "counts")),
    "negative penalty": (("--lambda-w", "-1"), ("lambda_w", ">= 0")),
    "zero penalty": (("--lambda-h", "0"), ("lambda_h", "minimiser")),
    "nan penalty": (("--lambda-w", "nan"), ("lambda_w", "finite")),
    "infinite penalty": (("--lambda-w", "inf"), ("lambda_w", "finite")),
    "bias": (("--bias", "some"), ("bias", "penalised")),
    "bias without penalty": (("--bias", "penalised"), ("lambda_b",)),
    "penalty without bias": (("--lambda-b", "0.1"), ("lambda_b", "penalised")),
    "gamma": (("--gamma", "2"), ("gamma", "focal")),
    "negative gamma": (("--loss", "focal", "--gamma", "-1"), ("gamma",)),
    "smoothing": (("--smoothing", "1.5"), ("smoothing", "[0, 1)")),
    "smoothing of mse": (("--loss", "mse", "--smoothing", "0.1"), ("smoothing", "ce")),
    "dtype": (("--dtype", "int8"), ("dtype", "float64")),
    "device": (("--device", "abacus"), ("device", "cpu")),
    "freeze": (("--freeze", "x"), ("freeze",)),
    "method": (("--method", "magic"), ("method", "lbfgs")),
    "backend": (("--backend", "abacus"), ("backend", "tiled")),
    "triton on the CPU": (("--backend", "triton", "--device", "cpu"), ("triton",)),
    "reduce": (("--reduce", "all"), ("reduce", "classes")),
    "variables": (("--variables", "x"), ("variables", "raw")),
    "start": (("--start", "middle"), ("start", "spectral")),
    "two starts": (("--start", "normal", "--start-from", "x.npz"), ("start_from",)),
    "missing start": (("--start-from", "x.npz"), ("start-from", "x.npz")),
    "pairwise": (("--pairwise", "some"), ("pairwise", "exact")),
    "preset": (("--preset", "zhu2022"), ("preset", "zhu2021")),
    "tol": (("--tol", "-1"), ("tol",)),
    "nan tol": (("--tol", "nan"), ("tol",)),
    "max steps": (("--max-steps", "0"), ("max_steps",)),
    "learning rate": (("--method", "gd", "--learning-rate", "0"), ("learning_rate",)),
    "momentum": (("--method", "momentum", "--momentum", "1"), ("momentum",)),
    "seed": (("--seed", "-1"), ("seed",)),
    "negative counts": (("--counts", "3,-1"), ("counts",)),
    "float counts": (("--counts", "3,1.5"), ("counts", "whole")),
    "no counts": (("--counts", "0,0"), ("counts",)),
    "one count": (("--counts", "3"), ("class", "2")),
    "counts and classes": (("--counts", "1,2", "--classes", "3"), ("counts", "classes")),
    "missing counts": (("--counts", "no.txt"), ("counts", "no.txt")),
    "missing labels": (("--labels", "no.npy"), ("labels", "no.npy", "digits")),
    "missing targets": (("--loss", "pick-all", "--targets", "no.npz"), ("targets", "no.npz")),
    "missing settings": (("-c", "no.toml"), ("no.toml",)),
    "missing run": (("--resume", "no"), ("resume",)),
    "alternating ce": (("--method", "alternating"), ("alternating",)),
    "empty class, free bias": (("--counts", "3,0,2", "--bias", "free"), ("bias",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument_and_leaves_nothing(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[case]
    base = () if {"--counts", "--labels", "--targets", "-c"} & set(arguments) else ("--classes", "4", "--dim", "3")
    given = [word for pair in zip(base[::2], base[1::2], strict=True) if pair[0] not in arguments for word in pair]
    message = refused(capsys, "solve", "--no-plots", *given, *arguments)
    assert all(word in message for word in words), message


def test_bad_label_files(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("float.npy", np.array([0.0, 1.0]))
    np.save("matrix.npy", np.zeros((2, 2), int))
    np.save("negative.npy", np.array([2, -1]))
    np.save("large.npy", np.array([0, 7]))
    np.save("objects.npy", np.array([{}, {}]), allow_pickle=True)
    whole = Path("large.npy").read_bytes()
    Path("cut.npy").write_bytes(whole[: len(whole) - 5])
    Path("empty.npy").write_bytes(b"")
    for name in ("float", "matrix", "negative", "objects", "cut", "empty"):
        assert "labels" in refused(capsys, "solve", "--labels", f"{name}.npy"), name
    assert "classes" in refused(capsys, "solve", "--labels", "large.npy", "--classes", "3")


def test_bad_target_files(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("solve", "--loss", "pick-all", "--targets")
    _saved("half.npz", indptr=np.array([0, 1]))
    _saved("float.npz", indptr=np.array([0, 1]), indices=np.array([0.0]))
    _saved("twice.npz", indptr=np.array([0, 2, 3]), indices=np.array([1, 1, 2]))
    _saved("all.npz", indptr=np.array([0, 2]), indices=np.array([0, 1]))
    _saved("short.npz", indptr=np.array([0, 2]), indices=np.array([0]))
    _saved("none.npz", indptr=np.array([0, 0, 1]), indices=np.array([0]))
    Path("cut.npz").write_bytes(Path("all.npz").read_bytes()[:60])
    for name in ("half", "float", "twice", "all", "short", "none", "cut"):
        message = refused(capsys, *base, f"{name}.npz")
        assert "target" in message or "indptr" in message or "indices" in message, message
    _saved("good.npz", indptr=np.array([0, 1, 2]), indices=np.array([0, 1]))
    assert "pick-all" in refused(capsys, "solve", "--targets", "good.npz")


def test_bad_places_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    Path("file").write_text("")
    assert "full" in refused(capsys, "solve", *SMALL, "--out", "full")
    assert "file" in refused(capsys, "solve", *SMALL, "--out", "file")
    assert "can't write" in refused(capsys, "solve", *SMALL, "--out", "file/below")
    assert "too long" in refused(capsys, "solve", *SMALL, "--out", "x" * 300)
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert "another" in refused(capsys, "solve", *SMALL, "--lambda-w", "0.02", "--out", "r")
    assert Path("full/thesis.txt").read_text() == "mine"


def test_damaged_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--max-steps", "1", "--start", "normal", "--quiet") == 3
    whole = Path("r/state.safetensors").read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        Path("r/state.safetensors").write_bytes(damage)
        for command in (("solve", "--resume", "r"), ("metrics", "r"), ("plot", "r"), ("export", "r")):
            assert "state.safetensors" in refused(capsys, *command)
    Path("r/state.safetensors").write_bytes(whole)
    config = Path("r/config.json").read_text()
    for damage in (
        config[:50],
        "[]",
        "{}",
        config.replace("ufm-fast-run", "other"),
        config.replace('"dim": 6', '"dim": 5'),
    ):
        Path("r/config.json").write_text(damage)
        refused(capsys, "solve", "--resume", "r")


# ---- interruption ---------------------------------------------------------------------------------------------------


def _until(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_solve_is_saved_and_finishes_on_resume(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    process = child("solve", *SMALL, *ENDLESS, "--log-every", "20", "--out", "r", "--json")
    log = Path("r/metrics.jsonl")
    _until(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume r" in err
    result = json.loads(out)
    assert result["outcome"] == "interrupted"
    _, progress, _ = load_state(RunDirectory.open(Path("r")))
    assert progress.step == result["steps"] > 20
    assert [path.name for path in Path("r").glob(".*")] == [".lock"]
    assert solve("--resume", "r", "--method", "lbfgs", "--tol", "1e-8", "--max-steps", "1000", "--json") == 0
    finished = printed(capsys)
    assert finished["value"] == pytest.approx(finished["theory"]["value"], rel=1e-9)
    assert finished["steps"] > progress.step


def test_a_killed_run_goes_on_from_its_last_saved_state(capsys: pytest.CaptureFixture[str]) -> None:
    process = child("solve", *SMALL, *ENDLESS, "--log-every", "20", "--out", "r")
    log = Path("r/metrics.jsonl")
    _until(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.kill()
    process.communicate()
    assert RunDirectory.open(Path("r")).summary is None
    with log.open("a") as file:
        file.write('{"step": 99')
    assert solve("--resume", "r", "--method", "lbfgs", "--tol", "1e-8", "--max-steps", "1000", "--json") == 0
    assert printed(capsys)["outcome"] in ("converged", "stalled")
    steps = [record["step"] for record in RunDirectory.open(Path("r")).records()]
    assert steps == sorted(set(steps))


def test_as_a_process_exit_codes_and_streams() -> None:
    process = child("solve", "--classes", "1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: classes")


# ---- the other commands ---------------------------------------------------------------------------------------------


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
    arrays = {"W": generator.normal(size=(3, 5)), "H": generator.normal(size=(9, 5)), "labels": np.arange(9) % 3}
    assert main(["metrics", _saved("head.npz", **arrays), "--json"]) == 0
    assert printed(capsys)["metrics"]["nc1_pinv"] > 0
    assert "labels" in refused(capsys, "metrics", _saved("a.npz", W=arrays["W"], H=arrays["H"]))
    assert "labels" in refused(capsys, "metrics", _saved("b.npz", **{**arrays, "labels": np.arange(9) % 3 / 1.0}))
    assert "features" in refused(capsys, "metrics", _saved("c.npz", **{**arrays, "H": np.full((9, 5), np.nan)}))
    assert "pairwise" in refused(capsys, "metrics", "head.npz", "--pairwise", "some")
    assert "no file" in refused(capsys, "metrics", "missing.npz")
    Path("head.txt").write_text("1 2 3")
    assert ".npz" in refused(capsys, "metrics", "head.txt")
    Path("empty").mkdir()
    assert "run directory" in refused(capsys, "metrics", "empty")


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


def test_doctor_fails_when_an_answer_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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

        found, log = read_parquet("e/W.parquet").to_numpy(), read_parquet("e/log.parquet")["value"].to_numpy()
    assert np.array_equal(found, W)
    assert log.tolist() == values


def test_export_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert names == {f"{name}.{kind}" for name in ("convergence", "collapse", "gram", "geometry") for kind in ("png", "pdf")}


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


def test_input_errors_of_the_library_become_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ufm_fast.cli import commands

    def fail(runs: object, compare: object) -> None:
        raise InputError("runs are wrong; mend them")

    monkeypatch.setattr(commands, "plot", fail)
    assert refused(capsys, "plot", "r") == "error: runs are wrong; mend them\n"
