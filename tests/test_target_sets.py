"""Multi-label data by multiplicities, and metrics of target sets, against the tag-wise average of
theory.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from ufm_fast import Problem, solve
from ufm_fast.cli import main
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.metrics.target_sets import tag_metrics
from ufm_fast.runs.settings import build_problem, resolve
from ufm_fast.targets import Targets, TargetSets
from ufm_fast.theory import pick_all_minimum


def test_multiplicities_are_all_sets_of_their_sizes():
    problem = Problem(classes=4, dim=5, loss="pick-all", multiplicities={2: 3, 1: 7})
    sets = problem.target_sets
    assert sets.indptr.diff().tolist() == [1] * 4 + [2] * 6
    assert sets.indices.tolist() == [0, 1, 2, 3, 0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3]
    assert sets.counts.tolist() == [7] * 4 + [3] * 6
    assert (
        Problem(classes=4, dim=5, loss="pick-all", multiplicities="1:7,2:3").counts.tolist()
        == [7 + 3 * 3] * 4
    )


@pytest.mark.parametrize(("lambda_w", "scale"), [(1e-3, 0.92431), (1e-4, 0.93948), (1e-5, 0.94960)])
def test_value_and_tag_average_are_those_of_theory(lambda_w, scale):
    problem = Problem(
        classes=10,
        dim=16,
        loss="pick-all",
        multiplicities={1: 310, 2: 20},
        lambda_w=lambda_w,
        lambda_h=lambda_w / 4000,
    )
    solution = solve(problem, start="normal")
    theory = pick_all_minimum(10, {1: 310, 2: 20}, lambda_w, lambda_w / 4000)
    assert solution.value == pytest.approx(theory.value, rel=1e-8)
    found = solution.metrics
    assert found["tag_scale2"] == pytest.approx(theory.slopes[2] / theory.slopes[1], abs=1e-8)
    assert found["tag_scale2"] == pytest.approx(scale, abs=5e-6)
    assert found["tag_scale2_sd"] < 1e-8
    assert found["tag_cosine2"] == pytest.approx(1.0, abs=1e-12)
    assert found["tag_angle_ratio2"] < 1e-6
    assert found["nc1_sets"] == 0.0
    assert found["balancedness_relative"] < 1e-6


def test_metrics_of_sets_by_hand():
    generator = torch.Generator().manual_seed(0)
    sets = [[0], [1], [2], [0, 1], [1, 2], [1, 0]]  # the last is the fourth once more
    pointer = torch.tensor([0, 1, 2, 3, 5, 7, 9])
    H = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    targets = Targets(torch.tensor([k for s in sets for k in sorted(s)]), pointer)
    found = tag_metrics(H, targets, torch.tensor([1, 2, 3, 1, 2, 3]), 3)
    means, sums = (
        torch.stack([(H[3] + 3 * H[5]) / 4, H[4]]),
        torch.stack([H[0] + H[1], H[1] + H[2]]),
    )
    scale = (means * sums).sum(1) / sums.square().sum(1)
    angles = torch.nn.functional.cosine_similarity(means[:, None], sums[None], dim=2).acos()
    assert found["tag_scale2"] == pytest.approx(float(scale.mean()), rel=1e-14)
    assert found["tag_scale2_sd"] == pytest.approx(
        float((scale - scale.mean()).square().mean().sqrt()), rel=1e-12
    )
    assert found["tag_cosine2"] == pytest.approx(float(angles.diagonal().cos().mean()), rel=1e-14)
    assert found["tag_angle_ratio2"] == pytest.approx(
        float(angles.diagonal().mean() / angles.mean()), rel=1e-12
    )
    assert found["nc1_sets"] > 0.0


def test_labels_that_never_stand_alone_are_said():
    sets = TargetSets.create([0, 1, 2, 4, 6], [0, 1, 0, 1, 1, 2], 3)
    solution = solve(
        Problem(dim=3, loss="pick-all", target_sets=sets, lambda_w=1e-2, lambda_h=1e-2)
    )
    assert math.isnan(solution.metrics["tag_scale2"])
    assert any("1 labels never stand alone: 2" in note for note in solution.notes)


@pytest.mark.parametrize("counts", [[3, 1, 2, 1, 1, 4], [1, 1, 2, 5, 1, 1]])
def test_missing_sets_and_unequal_frequencies_are_certified(counts):
    sets = TargetSets.create([0, 1, 2, 3, 5, 7, 8], [0, 1, 2, 0, 1, 1, 3, 3], 4, counts)
    solution = solve(
        Problem(dim=4, loss="pick-all", target_sets=sets, lambda_w=1e-2, lambda_h=1e-3)
    )
    assert solution.certificate.certified


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"multiplicities": {4: 1}}, "sizes from 1 to classes - 1 = 3"),
        ({"multiplicities": {0: 1}}, "labels of a set"),
        ({"multiplicities": {1: 0}}, "samples of each set of 1"),
        ({"multiplicities": "1-3"}, "multiplicities must be labels:samples"),
        ({"multiplicities": {5: 1}, "classes": 100}, "75,287,520 target sets"),
        ({"multiplicities": {1: 1}, "classes": None}, "classes is needed beside multiplicities"),
        ({"multiplicities": {1: 1}, "loss": "ce"}, "multiplicities goes with the loss pick-all"),
        ({"multiplicities": {1: 1}, "per_class": 3}, "give one of"),
    ],
)
def test_what_contradicts_is_said(given, words):
    with pytest.raises(InputError, match=words):
        Problem(**{"classes": 4, "dim": 5, "loss": "pick-all", **given})


def test_other_types_are_refused():
    with pytest.raises(InputTypeError, match="multiplicities must be a dictionary"):
        Problem(classes=4, dim=5, loss="pick-all", multiplicities=[1, 2])


def test_a_presets_classes_stay():
    config = resolve({"preset": "li2023-mlab", "multiplicities": "1:31,2:2"})
    problem = build_problem(config | {"device": "cpu"})
    assert (problem.num_classes, problem.num_samples) == (10, 310 + 90)


def test_on_the_command_line(tmp_path, capsys):
    flags = [
        "--classes",
        "4",
        "--dim",
        "5",
        "--loss",
        "pick-all",
        "--lambda-w",
        "0.01",
        "--lambda-h",
        "0.004",
        "--no-plots",
    ]
    run = str(tmp_path / "run")
    assert main(
        ["solve", *flags, "--multiplicities", "1:3,2:1", "--out", run, "--max-steps", "1"]
    ) in (0, 3)
    assert main(["solve", "--resume", run, "--max-steps", "100", "--no-plots"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["value"] == pytest.approx(
        pick_all_minimum(4, {1: 3, 2: 1}, 0.01, 0.004).value, rel=1e-8
    )
    capsys.readouterr()
    assert main(["solve", *flags, "--multiplicities", "4:1"]) == 2
    assert "multiplicities must name sizes" in capsys.readouterr().err
