"""Bad input on the command line: exit code 2, one line that names the argument, nothing left
behind.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, printed, refused, saved, solve

from ufm_fast.cli import main

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
    "classes beyond memory": (("--classes", "1000000000000"), ("classes", "at most")),
    "classes beyond integers": (("--classes", "1" + "0" * 23), ("classes", "at most")),
    "dimension beyond memory": (("--dim", "1000000000000"), ("dim", "at most")),
    "a matrix beyond memory": (
        ("--classes", "1000000", "--dim", "2000000000", "--start", "normal"),
        ("memory", "plan"),
    ),
    "samples beyond float64": (("--per-class", "9" * 16), ("per_class", "at most")),
    "samples beyond integers": (("--per-class", "1" + "0" * 23), ("per_class", "at most")),
    "seed beyond integers": (("--seed", "1" + "0" * 23), ("seed", "at most")),
    "counts that wrap": (
        ("--counts", "9223372036854775807,9223372036854775807"),
        ("counts", "sum"),
    ),
    "counts beyond int64": (
        ("--counts", "1,1" + "0" * 23),
        ("counts", "at most 9007199254740992 samples", "got 1" + "0" * 23),
    ),
    "freeze in Python's words": (("--freeze", "None"), ("freeze must be w or h, or be left out",)),
    "tiny penalties": (("--lambda-w", "1e-170", "--lambda-h", "1e-170"), ("lambda_w", "1e-30")),
    "huge penalty": (("--lambda-w", "1e200"), ("lambda_w", "1e+30")),
    "tiny bias penalty": (("--bias", "penalised", "--lambda-b", "1e-20"), ("lambda_b", "free")),
    "infinite learning rate": (
        ("--method", "gd", "--learning-rate", "inf"),
        ("learning_rate", "finite"),
    ),
    "frozen features merged": (("--freeze", "h", "--reduce", "classes"), ("reduce", "freeze")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument_and_leaves_nothing(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    base = (
        ()
        if {"--counts", "--labels", "--targets", "-c"} & set(arguments)
        else ("--classes", "4", "--dim", "3")
    )
    given = [
        word
        for pair in zip(base[::2], base[1::2], strict=True)
        if pair[0] not in arguments
        for word in pair
    ]
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
    np.save("far.npy", np.array([0, 10**12]))
    np.save("unsigned.npy", np.array([0, 2**63], dtype=np.uint64))
    np.save("complex.npy", np.array([0, 1j]))
    header = bytearray(whole)
    header[10:20] = b"{'descr': ("
    Path("header.npy").write_bytes(header)
    for name in (
        "float",
        "matrix",
        "negative",
        "objects",
        "cut",
        "empty",
        "far",
        "unsigned",
        "complex",
        "header",
    ):
        assert "labels" in refused(capsys, "solve", "--labels", f"{name}.npy"), name
    for name in ("float", "matrix", "negative", "objects", "cut", "unsigned", "complex", "header"):
        assert "counts" in refused(capsys, "solve", "--counts", f"{name}.npy"), name
    assert "classes" in refused(capsys, "solve", "--labels", "large.npy", "--classes", "3")


def test_bad_target_files(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("solve", "--loss", "pick-all", "--targets")
    saved("half.npz", indptr=np.array([0, 1]))
    saved("float.npz", indptr=np.array([0, 1]), indices=np.array([0.0]))
    saved("twice.npz", indptr=np.array([0, 2, 3]), indices=np.array([1, 1, 2]))
    saved("all.npz", indptr=np.array([0, 2]), indices=np.array([0, 1]))
    saved("short.npz", indptr=np.array([0, 2]), indices=np.array([0]))
    saved("none.npz", indptr=np.array([0, 0, 1]), indices=np.array([0]))
    Path("cut.npz").write_bytes(Path("all.npz").read_bytes()[:60])
    saved("far.npz", indptr=np.array([0, 1, 2]), indices=np.array([0, 10**12]))
    saved("complex.npz", indptr=np.array([0, 1, 2]), indices=np.array([0, 1j]))
    np.savez_compressed("packed.npz", indptr=np.arange(200), indices=np.arange(199) % 7)
    packed = bytearray(Path("packed.npz").read_bytes())
    packed[60:160] = bytes(100)
    Path("packed.npz").write_bytes(packed)
    for name in (
        "half",
        "float",
        "twice",
        "all",
        "short",
        "none",
        "cut",
        "far",
        "complex",
        "packed",
    ):
        message = refused(capsys, *base, f"{name}.npz")
        assert "target" in message or "indptr" in message or "indices" in message, message
    saved("good.npz", indptr=np.array([0, 1, 2]), indices=np.array([0, 1]))
    assert "pick-all" in refused(capsys, "solve", "--targets", "good.npz")


def test_bad_places_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    Path("file").write_text("")
    assert "full" in refused(capsys, "solve", *SMALL, "--out", "full")
    assert "file" in refused(capsys, "solve", *SMALL, "--out", "file")
    assert "can't write" in refused(capsys, "solve", *SMALL, "--out", "file/below")
    long = refused(capsys, "solve", *SMALL, "--out", "x" * 300)
    assert all(word in long for word in ("out: ", "too long", "another --out"))
    foreign = refused(capsys, "solve", *SMALL, "--out", os.fsdecode(b"bad\xff"))
    assert all(word in foreign for word in ("out: ", "bad", "utf-8", "another --out"))
    assert solve(*SMALL, "--out", "r", "--quiet") == 0
    assert "another" in refused(capsys, "solve", *SMALL, "--lambda-w", "0.02", "--out", "r")
    assert Path("full/thesis.txt").read_text() == "mine"


def test_damaged_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(*SMALL, "--out", "r", "--max-steps", "1", "--start", "normal", "--quiet") == 3
    whole = Path("r/state.safetensors").read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        Path("r/state.safetensors").write_bytes(damage)
        for command in (
            ("solve", "--resume", "r"),
            ("metrics", "r"),
            ("plot", "r"),
            ("export", "r"),
        ):
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
    for name, value in (
        ("history", '"q"'),
        ("dim", "null"),
        ("tol", "[]"),
        ("certificate", '"yes"'),
    ):
        Path("r/config.json").write_text(re.sub(rf'"{name}": [^,]*', f'"{name}": {value}', config))
        assert name in refused(capsys, "solve", "--resume", "r")
    Path("r/config.json").write_text(config)
    log = Path("r/metrics.jsonl").read_text()
    Path("r/metrics.jsonl").write_text(re.sub('"value": [^,]*', '"value": "low"', log))
    for command in (("solve", "--resume", "r"), ("plot", "r"), ("export", "r")):
        assert "metrics.jsonl" in refused(capsys, *command)


def test_a_refused_resume_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    unsolved = ("--loss", "focal", "--counts", "5,3,1", "--dim", "4")
    assert solve(*unsolved, "--out", "r", "--max-steps", "2", "--start", "normal", "--quiet") == 3
    files = {path: path.read_bytes() for path in Path("r").iterdir() if path.name != ".lock"}
    for wrong in (
        "--tol 5",
        "--method alternating",
        "--method lbfgs --momentum .9",
        "--backend triton",
        "--method closed-form",
    ):
        refused(capsys, "solve", "--resume", "r", *wrong.split())
        assert files == {path: path.read_bytes() for path in files}
    assert main(["solve", "--no-plots", "--resume", "r", "--max-steps", "500", "--quiet"]) == 0


def test_states_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    assert solve(*SMALL, "--out", "r", "--max-steps", "1", "--start", "normal", "--quiet") == 3
    tensors = load_file("r/state.safetensors")
    with safe_open("r/state.safetensors", "pt") as content:
        metadata = content.metadata()
    for name, damaged in (
        ("H", tensors["H"].reshape(-1)),
        ("W", tensors["W"] * float("nan")),
        ("H", tensors["H"][:, :2]),
        ("labels", None),
        ("W", tensors["W"].long()),
        ("row_counts", tensors["row_counts"][:1]),
    ):
        changed = {key: damaged if key == name else value for key, value in tensors.items()}
        kept = {key: value.contiguous() for key, value in changed.items() if value is not None}
        save_file(kept, "r/state.safetensors", metadata)
        for command in (
            ("solve", "--resume", "r"),
            ("metrics", "r"),
            ("plot", "r"),
            ("export", "r"),
        ):
            assert "state.safetensors" in refused(capsys, *command)


def test_bad_heads_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    saved("wide.npz", W=np.eye(6), H=np.eye(6), labels=np.zeros((1, 6), int))
    assert "labels" in refused(capsys, "metrics", "wide.npz")
    saved("equal.npz", W=np.eye(6), H=np.eye(6), labels=np.zeros(5, int))
    assert "labels" in refused(capsys, "metrics", "equal.npz")
    saved("words.npz", W=np.eye(6), H=np.eye(6), labels=np.array(list("abcdef")))
    assert "array of numbers" in refused(capsys, "metrics", "words.npz")
    saved(
        "other.npz",
        W=np.eye(6, dtype=">f8"),
        H=np.eye(6, dtype=">f4"),
        labels=np.arange(6, dtype=">i4"),
    )
    assert main(["metrics", "other.npz", "--json"]) == 0
    saved("half.npz", W=np.eye(6), H=np.eye(6), row_counts=np.ones(6, int))
    assert "half.npz" in refused(capsys, "metrics", "half.npz")
    Path("huge.toml").write_text("lambda_w = 1" + 400 * "0")
    assert "lambda_w" in refused(capsys, "solve", "-c", "huge.toml")
    saved("far.npz", W=np.full((4, 6), 1e200), H=np.full((4, 6), 1e200))
    assert solve(*SMALL, "--start-from", "far.npz", "--quiet") == 3


def test_unsigned_files_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (np.uint16, np.uint32, np.uint64):
        np.save("counts.npy", np.array([2, 1, 3], dtype=kind))
        np.save("labels.npy", np.array([2, 1, 0, 1], dtype=kind))
        saved(
            "sets.npz", indptr=np.array([0, 1, 2], dtype=kind), indices=np.array([0, 2], dtype=kind)
        )
        head = {
            "W": np.eye(3),
            "H": np.eye(3)[[2, 1, 0, 1]],
            "labels": np.array([2, 1, 0, 1], dtype=kind),
        }
        saved("head.npz", **head)
        for data in (
            ("--counts", "counts.npy"),
            ("--labels", "labels.npy"),
            ("--loss", "pick-all", "--targets", "sets.npz"),
        ):
            assert (
                solve(*data, "--dim", "4", "--quiet", "--out", f"{kind.__name__}{data[1][:6]}") == 0
            )
        assert main(["metrics", "head.npz", "--json"]) == 0


def test_one_class_alone_is_solved_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert solve("--counts", "4,0,0", "--dim", "4", "--quiet", "--out", "r") == 0
    capsys.readouterr()
    assert main(["metrics", "r", "--json"]) == 0
    assert "nc2_classifier" in printed(capsys)["metrics"]


@pytest.mark.parametrize(
    "arguments",
    [("solve", "--resume"), ("metrics",), ("plot",), ("export",), ("solve", "--start-from")],
)
def test_names_that_are_too_long_are_named(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name = {
        "--resume": "resume",
        "metrics": "source",
        "plot": "runs",
        "export": "run",
        "--start-from": "start-from",
    }
    message = refused(capsys, *arguments, "x" * 300)
    assert message.startswith(f"error: {name[arguments[-1]]}: ")
    assert "; give" in message


def test_settings_and_data_with_names_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, name in (
        ("-c", "config"),
        ("--labels", "labels"),
        ("--counts", "counts"),
        ("--targets", "targets"),
    ):
        message = refused(capsys, "solve", "--loss", "pick-all", flag, "x" * 300)
        assert message.startswith(f"error: {name}")
        assert "give" in message or "must be" in message


def test_only_solve_runs_on_several_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for command in (("train", "--data", "digits"), ("doctor",), ("study", "sweep")):
        message = refused(capsys, *command)
        assert f"run ufm-fast {command[0]} without" in message
