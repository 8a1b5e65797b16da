"""What a study file says, the cells that it makes, and what is refused in words before anything is
written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import refused

from ufm_fast.errors import InputError
from ufm_fast.runs.options import SETTINGS, Setting
from ufm_fast.studies import library, ready
from ufm_fast.studies.cells import chains, problem_of
from ufm_fast.studies.folder import toml_text
from ufm_fast.studies.spec import make_study, parse

SOLVE = {"dim": 8, "per_class": 3, "start": "normal", "device": "cpu"}


def cells(**sections: object) -> list[dict[str, object]]:
    study = make_study({"solve": SOLVE, **sections}, "test")
    return [dict(cell.given) for chain in chains(study) for cell in chain]


def values(name: str, **sections: object) -> list[object]:
    return [cell[name] for cell in cells(**sections)]


def test_axes_are_lists_logs_ranges_and_zipped_lists_and_their_grid_is_the_study() -> None:
    axes = parse(
        "classes = {log = [10, 10000, 4]}\nseed = {range = [1, 7, 3]}\n"
        "zip = [{lambda_w = [1e-2, 1e-3], lambda-h = [1e-4, 1e-5]}, {gamma = [1.0, 2.0], tol = "
        "[1e-3, 1e-3]}]",
        "here",
    )
    found = cells(axes=axes, solve={**SOLVE, "loss": "focal"})
    assert len(found) == 4 * 2 * 2 * 2
    assert [cell["classes"] for cell in found[:: len(found) // 4]] == [10, 100, 1000, 10000]
    assert [type(cell["classes"]) for cell in found[:1]] == [int]
    assert {cell["seed"] for cell in found} == {1, 4}
    assert {(cell["lambda_w"], cell["lambda_h"]) for cell in found} == {(1e-2, 1e-4), (1e-3, 1e-5)}
    assert [cell["gamma"] for cell in found[:2]] == [1.0, 2.0]
    assert values("lambda_w", axes={"lambda_w": {"log": [1e-4, 1e-2, 3]}}) == [1e-4, 1e-3, 1e-2]


def test_derived_values_are_expressions_of_symbols_settings_axes_and_one_another() -> None:
    derived = {
        "lambda_h": "lambda_w / n",
        "dim": "round(K * ratio)",
        "lambda_w": "scale / N",
        "half": "d / 2",
    }
    axes = {"classes": [4, 10], "ratio": [0.5, 2], "scale": [1.2]}
    found = cells(axes=axes, derived=derived, solve={"per_class": 3})
    assert [cell["dim"] for cell in found] == [2, 8, 5, 20]
    assert [cell["lambda_h"] for cell in found] == pytest.approx(
        [1.2 / 12 / 3] * 2 + [1.2 / 30 / 3] * 2
    )
    assert "half" not in found[0]
    groups = cells(
        axes={"heads": [2, 3]}, derived={"groups": "f'{heads}:100,10:5'", "dim": "K + N"}, solve={}
    )
    assert [(cell["groups"], cell["dim"]) for cell in groups] == [
        ("2:100,10:5", 262),
        ("3:100,10:5", 363),
    ]


def test_a_cell_is_named_by_its_settings_that_are_not_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names(**sections: object) -> list[str]:
        return [cell.name for chain in chains(make_study(sections, "x")) for cell in chain]

    plain = names(solve={"dim": 8, "classes": 4}, axes={"seed": [0, 1]})
    assert len(set(plain)) == 2
    assert plain == names(
        solve={"classes": 4, "loss": "ce"}, axes={"seed": [0, 1]}, derived={"dim": "2 * K"}
    )
    assert plain != names(solve={"dim": 9, "classes": 4}, axes={"seed": [0, 1]})
    monkeypatch.setitem(SETTINGS, "later", Setting("later", int, 3, "a setting of a later version"))
    assert plain == names(solve={"dim": 8, "classes": 4}, axes={"seed": [0, 1]})


def test_warm_cells_are_chains_along_their_axis() -> None:
    study = make_study(
        {"axes": {"lambda_w": [1e-2, 1e-3, 1e-4], "seed": [0, 1]}, "study": {"warm": "lambda_w"}},
        "x",
    )
    found = [
        [(cell.given["seed"], cell.given["lambda_w"]) for cell in chain] for chain in chains(study)
    ]
    assert found == [[(seed, 1e-2), (seed, 1e-3), (seed, 1e-4)] for seed in (0, 1)]


def test_a_study_is_the_same_as_toml_and_as_a_dictionary() -> None:
    content = {
        "solve": SOLVE,
        "axes": {"classes": [4, 6]},
        "derived": {"lambda_h": "lambda_w"},
        "study": {"starts": 2},
    }
    assert make_study(parse(toml_text(content), "here"), "x") == make_study(content, "x")


REFUSED = {
    "no toml": ("[axes", "not valid TOML"),
    "unknown section": ("[axis]\nseed = [1]", "unknown section 'axis'.*did you mean axes"),
    "unknown setting": ("[solve]\nlamda_w = 1e-3", "unknown key 'lamda_w'; did you mean lambda-w"),
    "unknown axis": (
        "[axes]\nlamda_w = [1e-3]",
        "lamda_w in \\[axes\\] is no setting; did you mean lambda_w",
    ),
    "unused variable": ("[axes]\nquux = [1, 2]", "quux in \\[axes\\] is no setting; no expression"),
    "unknown derived": (
        '[derived]\nlamda_h = "1"',
        "lamda_h in \\[derived\\] is no setting; did you mean lambda_h",
    ),
    "a symbol": ("[axes]\nK = [4]", "K in \\[axes\\] is a symbol.*write classes"),
    "newer": ("[study]\nversion = 2", "version = 2 is newer than this program"),
    "option": ("[study]\njob = 2", "unknown key 'job' in \\[study\\]; did you mean jobs"),
    "jobs": ("[study]\njobs = 0", "jobs must be at least 1"),
    "no cells": ("[axes]\nseed = []", "seed has no values.*no cells"),
    "empty range": ("[axes]\nseed = {range = [3, 3]}", "no cells"),
    "one value": ("[axes]\nseed = 3", "seed must be a list.*one value stands in \\[solve\\]"),
    "twice": ("[axes]\nseed = [1, 1]", "gives 1 twice"),
    "twice in a log": ("[axes]\nclasses = {log = [4, 5, 9]}", "gives 4 twice"),
    "two places": (
        "[solve]\nseed = 1\n[axes]\nseed = [1, 2]",
        "seed stands in \\[solve\\] and in \\[axes\\]",
    ),
    "starts": (
        "[solve]\nrestarts = 2\nstart = 'normal'\n[study]\nstarts = 3",
        "restarts stands in \\[solve\\] and in",
    ),
    "zip": ("[axes]\nzip = {classes = [4, 5], dim = [4]}", "one length, got classes 2, dim 1"),
    "type": ("[axes]\nclasses = [4, 'x']", "classes must be a whole number"),
    "log of zero": ("[axes]\nlambda_w = {log = [0, 1, 3]}", "bounds > 0"),
    "no expression": ("[derived]\ndim = 3", "must be an expression in quotes"),
    "syntax": ('[derived]\ndim = "K *"', "dim = 'K \\*' does not evaluate"),
    "zero": (
        '[solve]\nclasses = 4\n[derived]\ndim = "K / (n - n)"',
        "does not evaluate where classes = 4.*division by zero",
    ),
    "no name": (
        '[solve]\nclasses = 4\n[derived]\ndim = "K + width"',
        "'width', which has no value",
    ),
    "a scaled default": (
        '[solve]\nclasses = 4\n[derived]\nlambda_h = "lambda_w"',
        "'lambda_w', which has no value",
    ),
    "fraction": (
        '[solve]\nclasses = 5\n[derived]\ndim = "K / 2"',
        "is 2.5, no whole number; use round",
    ),
    "circle": (
        '[solve]\nclasses = 5\n[derived]\ndim = "extra"\nextra = "d"',
        "dim needs extra needs dim",
    ),
    "no builtins": ("[derived]\ndim = \"open('x')\"", "does not evaluate"),
    "no attributes": ('[derived]\ndim = "(1).__class__"', "does not evaluate"),
    "infinite": ('[derived]\nlambda_w = "1e308 * 10"', "is inf"),
    "equal cells": (
        '[axes]\nratio = [0.4, 0.41]\n[derived]\ndim = "round(10 * ratio)"',
        "have the same settings",
    ),
    "contradiction": (
        "[axes]\nsmoothing = [0.1]\n[solve]\nloss = 'mse'",
        "smoothing.*in the cell smoothing = 0.1",
    ),
    "two data": (
        "[solve]\nper_class = 3\ncounts = '3,4'\n[axes]\nseed = [1]",
        "give one of.*in the cell",
    ),
    "method": (
        "[axes]\nmethod = ['gd', 'simplex']",
        "method must be one of.*in the cell method = simplex",
    ),
    "warm": (
        "[axes]\nseed = [1, 2]\n[study]\nwarm = 'lambda_w'",
        "warm = 'lambda_w' must be an axis",
    ),
    "warm restarts": (
        "[axes]\nlambda_w = [0.1, 0.2]\n[study]\nwarm = 'lambda_w'\nstarts = 2",
        "warm starts and restarts",
    ),
    "warm shapes": (
        "[axes]\nclasses = [4, 5]\n[study]\nwarm = 'classes'",
        "keep their shapes.*classes = 5",
    ),
    "plots": (
        "[axes]\nseed = [1]\n[plots]\na = {column = 'value', against = 'dim'}",
        "'dim' of a is no axis",
    ),
    "plot key": (
        "[axes]\nseed = [1]\n[plots]\na = {column = 'value', against = 'seed', x = 'y'}",
        "unknown key 'x'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_studies_are_refused_in_words(name: str) -> None:
    text, words = REFUSED[name]
    Path("bad.toml").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        library.study("bad.toml", "out")
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_the_command_refuses_in_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "neither a file nor a ready study; did you mean sweep" in refused(
        capsys, "study", "sweeep"
    )
    assert "can't read none.toml" in refused(capsys, "study", "none.toml")
    assert "shard must be i/n" in refused(capsys, "study", "sweep", "--shard", "0/3")
    assert "jobs must be at least 1" in refused(capsys, "study", "sweep", "--jobs", "0")
    Path("mine").mkdir()
    Path("mine/file").touch()
    assert "not empty and holds no study" in refused(capsys, "study", "sweep", "--out", "mine")
    Path("study.toml").write_text("[axes]\nseed = [1]")
    assert "holds another study" in refused(capsys, "study", "sweep", "--out", ".")


@pytest.mark.parametrize("name", ready.names())
def test_ready_studies_are_whole(name: str) -> None:
    study, text = ready.load(name)
    found = chains(study)
    assert len(found) > 3
    assert len(ready.title(name)) < 120
    assert text.startswith("# ")
    assert study.plots
    on_gpu = name.endswith("-gpu")
    assert all(
        cell.given.get("device") == ("cuda" if on_gpu else None)
        for chain in found
        for cell in chain
    )
    if on_gpu:
        assert name.removesuffix("-gpu") in ready.names()
    smallest = min(
        (cell for chain in found for cell in chain), key=lambda cell: cell.given.get("classes", 100)
    )
    problem_of(replace(smallest, given={**smallest.given, "device": "cpu", "backend": "auto"}))
