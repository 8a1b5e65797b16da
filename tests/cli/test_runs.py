"""Runs that go on: resume, interruption, kills, and starts from other runs."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ENDLESS, SMALL, child, printed, refused, saved, solve

from ufm_fast.cli import main
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.foreign import read_tensors
from ufm_fast.runs.options import resumable
from ufm_fast.runs.state import load_state


def test_a_resumed_run_goes_on_from_its_point(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, "--start", "normal", "--method", "gd", "--learning-rate", "0.1", "--json")
    assert solve(*arguments, "--out", "whole", "--max-steps", "20") == 3
    whole = printed(capsys)
    assert solve(*arguments, "--out", "parts", "--max-steps", "12") == 3
    assert solve("--resume", "parts", "--max-steps", "8", "--json") == 3
    text = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(text)["steps"] == whole["steps"] == 20
    assert json.loads(text)["value"] == pytest.approx(whole["value"], rel=1e-14)


def test_an_interrupt_after_the_last_step_keeps_the_last_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ufm_fast.solving.certify", stop)
        assert solve(*SMALL, "--start", "normal", "--out", "r", "--json") == 130
    streams = capsys.readouterr()
    assert "--resume r" in streams.err
    assert json.loads(streams.out)["outcome"] == "interrupted"
    last = RunDirectory.open(Path("r")).records()[-1]["step"]
    assert load_state(RunDirectory.open(Path("r")))[1].step == last > 0
    assert solve("--resume", "r", "--quiet") == 0


def test_an_interrupt_before_the_first_step_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ufm_fast.runs.settings.build_problem", stop)
    assert solve(*SMALL, "--out", "r") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not Path("r").exists()


def test_a_tighter_tolerance_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--start", "normal", "--out", "r", "--tol", "1e-2", "--json") == 0
    loose = printed(capsys)
    assert solve("--resume", "r", "--tol", "1e-9", "--json") == 0
    assert printed(capsys)["gradient_norm"] < loose["gradient_norm"]
    assert RunDirectory.open(Path("r")).config["tol"] == 1e-9


def test_resume_refuses_contradictions_and_names_what_may_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert solve(*SMALL, "--out", "r", "--max-steps", "1", "--start", "normal", "--quiet") == 3
    message = refused(capsys, "solve", "--resume", "r", "--lambda-w", "0.5")
    assert "lambda_w" in message
    assert all(name in message for name in resumable())
    assert "--out" in refused(capsys, "solve", "--resume", "r", "--out", "s")
    assert (
        solve(
            "--resume",
            "r",
            "--lambda-w",
            "0.01",
            "--method",
            "newton-cg",
            "--max-steps",
            "99",
            "--quiet",
        )
        == 0
    )


def test_a_start_from_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--quiet", "--start", "normal") == 0
    assert solve(*SMALL, "--out", "s", "--json", "--start-from", "r") == 0
    assert printed(capsys)["steps"] <= 1
    np.savez("bad.npz", W=np.ones((3, 6)), H=np.ones((4, 6)))
    assert "shape" in refused(capsys, "solve", *SMALL, "--no-plots", "--start-from", "bad.npz")
    np.savez("nan.npz", W=np.full((4, 6), np.nan), H=np.ones((4, 6)))
    assert "nan" in refused(capsys, "solve", *SMALL, "--start-from", "nan.npz")
    assert "lacks" in refused(
        capsys, "solve", *SMALL, "--start-from", saved("w.npz", W=np.ones((4, 6)))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_saved_and_resumed(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(
        *SMALL, "--dtype", dtype, "--out", "r", "--start", "normal", "--max-steps", "3", "--quiet"
    ) in (0, 3)
    assert load_state(RunDirectory.open(Path("r")))[0]["W"].dtype == torch.float32
    assert solve("--resume", "r", "--max-steps", "3", "--quiet") in (0, 3)


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
    assert (
        solve(
            "--resume", "r", "--method", "lbfgs", "--tol", "1e-8", "--max-steps", "1000", "--json"
        )
        == 0
    )
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
    assert (
        solve(
            "--resume", "r", "--method", "lbfgs", "--tol", "1e-8", "--max-steps", "1000", "--json"
        )
        == 0
    )
    assert printed(capsys)["outcome"] in ("converged", "stalled")
    steps = [record["step"] for record in RunDirectory.open(Path("r")).records()]
    assert steps == sorted(set(steps))


def test_as_a_process_exit_codes_and_streams() -> None:
    process = child("solve", "--classes", "1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: classes")


def test_a_resume_that_is_killed_does_not_count_as_finished(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert solve(*SMALL, "--start", "normal", "--out", "r", "--tol", "1e-2", "--quiet") == 0
    log = Path("r/metrics.jsonl")
    lines = log.read_text().count("\n")
    slow = (
        "--method",
        "gd",
        "--learning-rate",
        "1e-6",
        "--max-steps",
        "100000000",
        "--tol",
        "1e-9",
        "--log-every",
        "20",
    )
    process = child("solve", "--resume", "r", *slow)
    _until(lambda: log.read_text().count("\n") > lines, process)
    process.kill()
    process.communicate()
    run = RunDirectory.open(Path("r"))
    assert run.config["tol"] == 1e-9
    loose = run.summary
    assert loose is not None
    assert loose["tol"] == 1e-2
    assert solve("--resume", "r", "--method", "lbfgs", "--max-steps", "1000", "--json") == 0
    assert printed(capsys)["steps"] > loose["steps"]
    assert solve("--resume", "r", "--tol", "1e-8") == 0
    assert "finished (converged at tol 1e-09)" in capsys.readouterr().err


def test_a_closed_form_has_no_tolerance_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        solve("--classes", "4", "--dim", "5", "--method", "closed-form", "--out", "r", "--quiet")
        == 0
    )
    files = {path: path.read_bytes() for path in Path("r").iterdir()}
    message = refused(capsys, "solve", "--resume", "r", "--tol", "1e-12")
    assert "tol = 1e-12" in message
    assert "--method auto" in message
    assert files == {path: path.read_bytes() for path in files}
    assert solve("--resume", "r") == 0
    note = capsys.readouterr().err
    assert "finished (by the closed form)" in note
    assert "--tol" not in note
    assert solve("--resume", "r", "--method", "auto", "--tol", "1e-12", "--json") == 0
    assert printed(capsys)["method"] == "auto: lbfgs+newton-cg"


def test_the_closed_form_may_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        solve(
            *SMALL,
            "--start",
            "normal",
            "--max-steps",
            "1",
            "--method",
            "gd",
            "--out",
            "r",
            "--quiet",
        )
        == 3
    )
    assert solve("--resume", "r", "--method", "closed-form", "--json") == 0
    found = printed(capsys)
    assert found["value"] == pytest.approx(found["theory"]["value"], rel=1e-12)


def test_a_configuration_that_was_edited_is_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--start", "normal", "--max-steps", "1", "--out", "r", "--quiet") == 3
    config = Path("r/config.json")
    text = config.read_text()
    for old, new in (
        ('"lambda_w": 0.01', '"lambda_w": 0.02'),
        ('"seed": 0', '"seed": 1'),
        ('"method": "auto"', '"method": "gd"'),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        message = refused(capsys, "solve", "--resume", "r")
        assert "hash" in message
        assert "-c file" in message
    config.write_text(text)
    for method in ("gd", "lbfgs", "newton-cg"):  # what a resume may change it may change again
        assert solve("--resume", "r", "--method", method, "--max-steps", "2", "--quiet") in (0, 3)


def test_a_run_without_a_state_goes_on_from_its_data_and_its_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = np.random.default_rng(0)
    saved("start.npz", W=generator.normal(size=(3, 4)), H=generator.normal(size=(5, 4)))
    np.save("y.npy", np.array([2, 0, 1, 1, 0]))
    flags = (
        "--labels",
        "y.npy",
        "--dim",
        "4",
        "--freeze",
        "h",
        "--start-from",
        "start.npz",
        "--json",
    )
    assert solve(*flags, "--out", "r") == 0
    whole = printed(capsys)
    for name in (
        "state.safetensors",
        "summary.json",
        "metrics.jsonl",
    ):  # as if killed before the first save
        Path("r", name).unlink()
    np.save("y.npy", np.array([2, 0, 1, 0, 1]))
    assert "data" in refused(capsys, "solve", "--resume", "r")
    np.save("y.npy", np.array([2, 0, 1, 1, 0]))
    assert solve("--resume", "r", "--json") == 0
    assert printed(capsys)["value"] == pytest.approx(whole["value"], rel=1e-9)


@pytest.mark.parametrize("data", ["counts", "labels", "sets"])
def test_data_give_the_same_hash_when_they_come_from_the_state(data: str) -> None:
    np.save("y.npy", np.array([2, 0, 1, 1, 0, 2, 2]))
    saved(
        "sets.npz",
        indptr=np.array([0, 1, 3, 5]),
        indices=np.array([0, 2, 1, 0, 1]),
        counts=np.array([4, 1, 2]),
    )
    flags = {
        "counts": ("--counts", "4,0,2"),
        "labels": ("--labels", "y.npy"),
        "sets": ("--loss", "pick-all", "--targets", "sets.npz"),
    }[data]
    for loss in ((), ("--loss", "pick-all"))[: 1 if data == "sets" else 2]:
        out = "-".join(("r", *loss[1:]))
        assert (
            solve(
                *flags,
                *loss,
                "--dim",
                "4",
                "--start",
                "normal",
                "--max-steps",
                "1",
                "--out",
                out,
                "--quiet",
            )
            == 3
        )
        assert solve("--resume", out, "--max-steps", "1", "--quiet") in (0, 3)


def test_a_start_is_put_in_the_order_of_the_problems_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = np.random.default_rng(0)
    labels = np.array([2, 0, 1, 1, 0, 2, 2])
    np.save("y.npy", labels)
    head = {"W": generator.normal(size=(3, 4)), "H": generator.normal(size=(7, 4))}
    saved("given.npz", **head)
    order = generator.permutation(7)
    saved("turned.npz", W=head["W"], H=head["H"][order], labels=labels[order].astype(np.int32))
    values = []
    for frozen in (
        ("--freeze", "h"),
        ("--reduce", "none", "--max-steps", "1"),
        ("--max-steps", "1"),
    ):
        for name in ("given", "turned"):
            flags = (
                "--labels",
                "y.npy",
                "--dim",
                "4",
                *frozen,
                "--start-from",
                f"{name}.npz",
                "--json",
            )
            assert solve(*flags, "--out", f"{name}{len(values)}") in (0, 3)
            values.append(printed(capsys)["value"])
    assert values[::2] == pytest.approx(values[1::2], rel=1e-9)
    # What a run is, its state says: its rows by class, whatever the order of these labels.
    assert (
        solve("--labels", "y.npy", "--dim", "4", "--reduce", "none", "--out", "r", "--quiet") == 0
    )
    np.save("sorted.npy", np.sort(labels))
    flags = ("--labels", "sorted.npy", "--dim", "4", "--freeze", "h", "--start-from", "r", "--json")
    assert solve(*flags) == 0
    H = torch.from_numpy(
        read_tensors(Path("r"), "r")["H"].numpy()[np.argsort(labels, kind="stable")]
    )
    assert torch.equal(read_tensors(Path(printed(capsys)["run"]), "s")["H"], H)


def test_a_start_for_other_rows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    W, H = np.eye(3, 4), np.eye(7, 4)
    np.save("y.npy", np.array([2, 0, 1, 1, 0, 2, 2]))
    base = ("solve", "--labels", "y.npy", "--dim", "4", "--freeze", "h", "--start-from")
    other = saved("other.npz", W=W, H=H, labels=np.array([2, 0, 1, 1, 0, 2, 1]))
    message = refused(capsys, *base, other)
    assert all(
        word in message
        for word in ("start-from", "other.npz", "class 1 there", "of 2 here", "without labels")
    )
    short = saved("short.npz", W=W, H=H, labels=np.arange(3))
    assert "(7,)" in refused(capsys, *base, short)
    assert "integers" in refused(capsys, *base, saved("float.npz", W=W, H=H, labels=np.zeros(7)))


def test_a_start_for_target_sets_is_matched_set_by_set(capsys: pytest.CaptureFixture[str]) -> None:
    saved("sets.npz", indptr=np.array([0, 1, 3, 4]), indices=np.array([0, 2, 1, 1]))
    saved("turned.npz", indptr=np.array([0, 1, 2, 4]), indices=np.array([1, 0, 1, 2]))
    saved("other.npz", indptr=np.array([0, 1, 2, 4]), indices=np.array([1, 0, 0, 2]))
    base = ("--loss", "pick-all", "--dim", "4", "--targets")
    assert solve(*base, "sets.npz", "--out", "r", "--start", "normal", "--quiet") == 0
    assert solve(*base, "turned.npz", "--out", "s", "--start-from", "r", "--json") == 0
    assert printed(capsys)["steps"] <= 1
    assert "class 1+2 there" in refused(capsys, "solve", *base, "other.npz", "--start-from", "r")


def test_eight_bit_floats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_file(
        {"W": torch.ones(4, 6).to(torch.float8_e4m3fn), "H": torch.ones(4, 6)}, "f8.safetensors"
    )
    message = refused(capsys, "solve", *SMALL, "--start-from", "f8.safetensors")
    assert "start-from: w in f8.safetensors" in message
    assert "float64" in message
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    with safe_open("r/state.safetensors", "pt") as content:
        metadata = content.metadata()
    tensors = load_file("r/state.safetensors")
    save_file(
        {**tensors, "H": tensors["H"].to(torch.float8_e4m3fn)}, "r/state.safetensors", metadata
    )
    for command in (
        ("metrics", "r"),
        ("solve", "--resume", "r"),
        ("solve", *SMALL, "--lambda-w", "0.1", "--start-from", "r"),
    ):
        assert "damaged" in refused(capsys, *command)


def test_the_first_command_twice_is_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert solve(*SMALL) == 0
    words = capsys.readouterr().err
    first, second = sorted(Path("runs").iterdir())
    assert second.name == f"{first.name}-2"
    assert f"--resume {first}" in words
    assert f"this run is {second}" in words


def test_hints_quote_names_that_a_shell_would_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--start", "normal", "--max-steps", "1", "--out", "my run") == 3
    assert "ufm-fast solve --resume 'my run' --max-steps N" in capsys.readouterr().err
    assert "--resume 'my run'" in refused(
        capsys, "solve", *SMALL, "--start", "normal", "--out", "my run"
    )


def test_a_run_of_restarts_goes_on_from_its_best(capsys: pytest.CaptureFixture[str]) -> None:
    base = (
        *SMALL,
        "--start",
        "normal",
        "--restarts",
        "2",
        "--max-steps",
        "1",
        "--out",
        "r",
        "--quiet",
    )
    assert solve(*base) == 3
    assert solve("--resume", "r", "--max-steps", "300", "--json") == 0
    found = printed(capsys)
    assert found["value"] == pytest.approx(found["theory"]["value"], rel=1e-9)


def test_a_deep_run_goes_on_and_is_measured_behind_its_layers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    deep = (
        "--layers",
        "2",
        "--loss",
        "mse",
        "--activation",
        "relu",
        "--widths",
        "7,9",
        "--dim",
        "7",
    )
    assert (
        solve(
            *SMALL[:2],
            *deep,
            *SMALL[4:],
            "--start",
            "normal",
            "--max-steps",
            "3",
            "--out",
            "r",
            "--quiet",
        )
        == 3
    )
    assert solve("--resume", "r", "--max-steps", "3", "--json") == 3
    assert printed(capsys)["steps"] == 6
    for source in ("r", "r/state.safetensors"):
        assert main(["metrics", source, "--json"]) == 0
        assert "nc2_means" in printed(capsys)["metrics"]
    assert main(["plot", "r"]) == 0
    assert main(["export", "r", "--quiet"]) == 0
    with np.load("r/export/run.npz") as content:
        assert content["hidden1"].shape == (9, 7)
