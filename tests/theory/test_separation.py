"""What numbers do not tell is said: a minimum of zero, classes held together, labels that begin at
1, local minima.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from ufm_fast import Problem, solve
from ufm_fast.cli import main
from ufm_fast.plan import make_plan
from ufm_fast.theory import closed_form
from ufm_fast.theory.separation import held_together, predicted_frame

ZERO = [
    {"classes": 50, "per_class": 10, "loss": "ce"},
    {"classes": 50, "per_class": 10, "loss": "ce", "smoothing": 0.2, "bias": "free"},
    {"classes": 50, "per_class": 10, "loss": "focal"},
    {"classes": 50, "per_class": 10, "loss": "pick-all"},
    {"classes": 50, "per_class": 10, "loss": "mse", "bias": "free"},
    {"counts": [9, 9, 4, 4, 4], "loss": "ce", "bias": "penalised", "lambda_b": 0.1},
    {"counts": [9, 4, 1, 0], "loss": "mse"},
    {"counts": [9, 4, 1], "loss": "ce"},
]


def _limit(words):
    return float(re.search(r"lambda_w <= (\S+) would", words).group(1))


@pytest.mark.parametrize("case", ZERO)
def test_a_minimum_of_zero_is_said_with_the_penalty_that_separates(case):
    problem = Problem(dim=60, lambda_w=1.0, lambda_h=0.5, **case)
    words = held_together(problem)
    assert "minimum is zero" in words
    below, above = (closed_form(replace(problem, lambda_w=f * _limit(words))) for f in (1.0, 1.02))
    assert below is None or not below.collapsed
    assert above.collapsed


@pytest.mark.parametrize(
    "case", [{"loss": "ce"}, {"loss": "ce", "smoothing": 0.1, "bias": "free"}, {"loss": "mse"}]
)
def test_classes_of_a_long_tail_are_counted(case):
    problem = Problem(
        counts=[900, 900, 30, 30, 2, 2, 2], dim=9, lambda_w=2e-2, lambda_h=2e-4, **case
    )
    words = held_together(problem)
    assert words.startswith("3 of 7 classes, those of at most 2 samples,")
    free = replace(problem, lambda_w=_limit(words))
    assert held_together(free) == ""
    assert "3 of 7" in held_together(replace(problem, lambda_w=1.02 * _limit(words)))
    tied, apart = (solve(p).point.W[4:] for p in (problem, free))
    spread = [float((W - W.mean(0)).norm() / W.norm()) for W in (tied, apart)]
    assert spread[0] < 1e-5 < spread[1] or case["loss"] == "mse"  # whose rows are zero
    assert words in make_plan(problem).notes


@pytest.mark.parametrize("loss", ["ce", "mse", "focal", "pick-all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [10, 1000, 30000])
@pytest.mark.parametrize("per_class", [1, 10, 5000])
def test_default_penalties_separate_at_any_number_of_classes(classes, per_class, loss, smoothing):
    if smoothing and loss != "ce":
        return
    problem = Problem(
        classes=classes, per_class=per_class, dim=classes, loss=loss, smoothing=smoothing
    )
    level = classes * math.sqrt(per_class) * problem.mu
    assert level <= 0.53 * (1 - smoothing)
    assert problem.lambda_w == problem.lambda_h <= 5e-4
    assert Problem(classes=100, per_class=10, dim=128, smoothing=0.1).lambda_w == 5e-4
    assert (
        Problem(classes=1000, per_class=10, dim=8, lambda_w=5e-4, lambda_h=5e-4).mu == 5e-4
    )  # what is given stays


def test_directions_of_a_minimum_of_zero_are_nan_and_not_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--classes 40 --dim 16 --lambda-w 0.3 --lambda-h 0.3 --out r --json"
    assert main(["solve", *flags.split(), "--start", "normal"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "minimum is zero" in found["notes"][0]
    directions = [
        name
        for name in found["metrics"]
        if name.startswith(("nc2", "nc3", "nc4", "self", "cosine"))
    ]
    assert {found["metrics"][name] for name in directions} == {None}
    assert not [path for path in tmp_path.glob("r/plots/*") if path.stem in ("gram", "geometry")]
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "nc2_classifier" not in last
    assert main(["metrics", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["nc2_classifier"] is None


def test_sizes_and_labels_that_begin_at_1_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["solve", "--counts", "0,5,5,5", "--dim", "6", "--out", "r", "--no-plots"]) == 0
    screen = capsys.readouterr().out
    assert "K = 4 (1 without samples), N = 15, d = 6" in screen
    assert "labels that begin at 1" in screen
    some = solve(Problem(counts=[3, 0, 5, 0], dim=4), metrics=False)
    assert some.notes == ["2 of 4 classes have no samples: 1, 3"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"classes": 10, "dim": 4}, "local minimum; the bound is not tight here (d < K - 1)"),
        ({"counts": [9, 1, 1, 1], "dim": 6, "loss": "mse", "max_steps": 0, "start": "normal"}, ""),
        ({"classes": 10, "dim": 4, "loss": "mse", "per_class": 3}, ""),
        ({"classes": 10, "dim": 20}, ""),
    ],
)
def test_a_local_minimum_is_called_one(case, words):
    options = {name: case.pop(name) for name in ("max_steps", "start") if name in case}
    found = solve(Problem(**case), metrics=False, **options)
    assert found.notes == ([words] if words else [])


def test_a_focal_minimum_that_is_not_proved_is_called_local():
    mu = 0.02
    problem = Problem(counts=[100] + [1] * 20, dim=21, loss="focal", lambda_w=mu, lambda_h=mu)
    found = solve(problem, metrics=False)
    assert not found.certificate.certified
    assert found.notes == [
        "local minimum; the bound is not tight here (the loss focal is not convex)"
    ]


def test_a_stalled_run_far_from_the_minimum_is_not_green():
    from ufm_fast.cli.report import _colour

    certificate = {"kind": "exact", "certified": False}
    far = {"outcome": "stalled", "value": 1.0, "theory": None, "certificate": certificate}
    assert _colour(far) == "yellow"
    assert _colour({**far, "certificate": {"kind": "exact", "certified": True}}) == "green"
    assert _colour({**far, "theory": {"value": 1.0}}) == "green"
    assert (
        _colour(
            {**far, "outcome": "converged", "certificate": {"kind": "none", "certified": False}}
        )
        == ""
    )
    assert _colour({**far, "outcome": "max_steps"}) == "red"


@pytest.mark.parametrize(("bias", "frame"), [("none", "orthogonal"), ("free", "simplex")])
def test_the_frame_that_theory_predicts_is_shown(bias, frame, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (
        f"--loss mse --classes 4 --dim 20 --per-class 5 --lambda-w 5e-3 --lambda-h 5e-3 --bias "
        f"{bias} --start normal"
    )
    assert main(["solve", *flags.split(), "--out", "r"]) == 0
    screen = capsys.readouterr().out
    suffix = "_frame" if frame == "orthogonal" else ""
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["frame"] == frame
    for name in ("nc2_classifier", "nc2_means", "nc3"):
        assert (f"{name}_frame" in screen) == bool(suffix)
        assert summary["metrics"][name + suffix] < 1e-8
        assert last[name + suffix] == pytest.approx(summary["metrics"][name + suffix], abs=1e-8)
    gap = "self_duality_gap" + ("_uncentred" if suffix else "")
    assert summary["metrics"][gap] < 1e-12
    assert (tmp_path / "r" / "plots" / "collapse.png").exists()


def test_frames_are_those_of_the_kind():
    problem = Problem(classes=3, dim=4)
    assert predicted_frame(problem.kind) == "simplex"
    assert predicted_frame(problem.kind._replace(trunk="relu")) == ""
    assert predicted_frame(problem.kind._replace(loss="")) == ""
