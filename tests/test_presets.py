"""Presets: valid problems, and the constants of the papers in our conventions."""

from __future__ import annotations

import math

import pytest
import torch

from ufm_fast.errors import InputError
from ufm_fast.presets import PRESETS, get_preset
from ufm_fast.problem import Problem
from ufm_fast.solving import solve


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_problem_with_a_nonzero_minimum(name: str) -> None:
    preset = get_preset(name)
    problem = Problem(**preset.settings)
    if problem.constraint == "none":
        assert 0 < problem.mu < math.sqrt(float(problem.counts.max())) / problem.num_samples
    assert preset.exact
    assert preset.choice
    assert preset.source == "this project" or preset.source.startswith("arXiv ")


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(InputError, match="zhu2021"):
        get_preset("zhu21")
    with pytest.raises(InputError, match="there are"):
        get_preset("%")


def test_a_mean_over_all_entries_is_our_objective_times_two_over_k() -> None:
    """torch's MSELoss with weight decay wd, against ours with lambda = (K/2) wd."""
    preset = get_preset("zhou2022-mse")
    problem = Problem(**preset.settings)
    K, wd = problem.num_classes, 5e-4
    assert problem.lambda_w == problem.lambda_h == problem.lambda_b == pytest.approx(K / 2 * wd)
    generator = torch.Generator().manual_seed(0)
    W, H = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (K, 3 * K))
    y = torch.nn.functional.one_hot(torch.arange(3 * K) % K, K).double()
    penalty = 0.5 * (W.square().sum() + H.square().sum())
    theirs = torch.nn.functional.mse_loss(H @ W.T, y) + wd * penalty
    ours = 0.5 * (H @ W.T - y).square().sum(1).mean() + problem.lambda_w * penalty
    assert float(ours) == pytest.approx(K / 2 * float(theirs), rel=1e-13)


def test_penalties_without_the_half_are_doubled() -> None:
    """lambda_W = 5 l and lambda_H = l/20 on |.|^2 mean that the nuclear norm's coefficient is l."""
    problem = Problem(**get_preset("hong-ling2023").settings)
    level = 0.0033
    assert problem.lambda_w == pytest.approx(2 * 5 * level)
    assert problem.lambda_h == pytest.approx(2 * level / 20)
    assert problem.mu == pytest.approx(level)
    assert problem.lambda_b == pytest.approx(2 * 0.01)
    assert problem.mu < math.sqrt(100) / problem.num_samples  # below minority collapse


def test_a_penalty_on_a_batchs_features_is_one_of_an_epoch() -> None:
    """Loss averaged over batches of 128 and 1e-3 |H|^2 summed over each: on average over the
    batches that is ours.
    """
    problem = Problem(**get_preset("li2023-mlab").settings)
    features = torch.arange(1.0, problem.num_samples + 1).double().sqrt()
    batches = features[: len(features) // 128 * 128].split(128)
    theirs = sum(1e-3 * batch.square().sum() for batch in batches) / len(batches)
    ours = 0.5 * problem.lambda_h * features.square().sum()
    assert float(theirs) == pytest.approx(float(ours), rel=1e-2)


def test_dang_has_the_minimum_that_follows_from_its_constants() -> None:
    """c - c^2/2 with c = K sqrt(n) lambda = 0.02."""
    from ufm_fast.theory import closed_form

    theory = closed_form(Problem(**get_preset("dang2023").settings))
    assert theory is not None
    assert theory.value == pytest.approx(0.02 - 0.02**2 / 2, rel=1e-13)


def test_fangs_energies_are_those_of_its_bounds() -> None:
    solution = solve(Problem(**get_preset("fang2021").settings), metrics=False, certificate=False)
    W, H = solution.point.W, solution.point.H
    assert float(W.square().sum()) == pytest.approx(10 * 1.0, rel=2e-3)
    assert float(solution.problem.counts.double() @ H.square().sum(1)) / 550 == pytest.approx(
        5.0, rel=2e-3
    )
    assert 0.0 < float(torch.nn.functional.cosine_similarity(W[5], W[6], dim=0)) < 1.0


def test_yaras_ends_at_the_simplex() -> None:
    solution = solve(Problem(**get_preset("yaras2022").settings), **get_preset("yaras2022").solver)
    assert solution.value == pytest.approx(math.log1p(9 * math.exp(-50 / 9)), rel=1e-10)


def test_what_is_not_known_is_not_called_the_papers() -> None:
    for name in ("tirer2022", "tirer2022-bias"):
        assert get_preset(name).exact == "the objective"
        assert "our choice" in get_preset(name).choice
