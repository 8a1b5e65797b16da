"""Settings: flags over file over preset over defaults, and the hash of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from ufm_fast.errors import InputError
from ufm_fast.runs.options import SETTINGS
from ufm_fast.runs.settings import build_problem, digest, resolve


def test_flags_over_file_over_preset_over_defaults() -> None:
    Path("run.toml").write_text('preset = "dang2023"\nlambda-w = 0.25\nlambda_h = 1\ndim = 7\n')
    config = resolve({"dim": 9, "classes": None}, Path("run.toml"))
    assert (config["loss"], config["classes"], config["per_class"]) == ("mse", 4, 100)
    assert (config["lambda_w"], config["lambda_h"], config["dim"]) == (0.25, 1.0, 9)
    assert isinstance(config["lambda_h"], float)
    assert config["tol"] == SETTINGS["tol"].default


def test_a_higher_layer_voids_what_no_longer_fits() -> None:
    config = resolve({"preset": "zhou2022-focal", "loss": "ce", "bias": "none", "counts": "3,2,1"})
    assert (config["gamma"], config["lambda_b"], config["per_class"], config["classes"]) == (
        None,
        0.0,
        None,
        None,
    )
    assert resolve({"preset": "zhou2022-focal", "gamma": 1.0})["gamma"] == 1.0


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
        ("classes = ", ("TOML",)),
        ('preset = "dang"', ("preset", "dang2023")),
    ],
)
def test_bad_files_of_settings(text: str, words: tuple[str, ...]) -> None:
    Path("run.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        build_problem({**resolve({}, Path("run.toml")), "device": "cpu"})
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_hash_knows_what_changes_the_minimum() -> None:
    def name(**given: object) -> str:
        config = {**resolve({"classes": 3, "dim": 4, **given}), "device": "cpu"}
        return digest(config, build_problem(config))

    assert name() == name(tol=1e-3, max_steps=7, pairwise="none")
    assert (
        len(
            {
                name(),
                name(lambda_w=0.1),
                name(seed=1),
                name(method="gd"),
                name(per_class=11),
                name(dtype="float32"),
            }
        )
        == 6
    )
    assert name(classes=None, counts="1,2") != name(classes=None, counts="2,1")
