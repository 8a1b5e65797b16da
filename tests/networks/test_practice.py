"""The experiments beside the model: new classes with replay, tag-wise averages of multi-label
features.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ufm_fast.errors import InputError
from ufm_fast.networks import Architecture, Options, Training, load
from ufm_fast.networks.overlay import (
    Tail,
    balanced_penalty,
    compare,
    model_run,
    penalty_at_gap,
    tail_of,
)
from ufm_fast.networks.switch import OPTIONS, VARIANTS, switches
from ufm_fast.networks.tags import tag_average
from ufm_fast.problem import Problem
from ufm_fast.solving import solve


def test_least_squares_rows_start_below_random_ones():
    options = replace(OPTIONS, architecture=Architecture(widths=(64,), unbiased=1), steps=300)
    found = {s.variant: s for s in switches(load("digits"), options, most_steps=25)}
    assert list(found) == list(VARIANTS)
    losses = {name: switch.loss for name, switch in found.items()}
    assert (
        losses["least squares, all rows"]
        < losses["least squares, new rows"]
        < losses["random"]
        < losses["class mean"]
    )
    assert found["least squares, all rows"].accuracy > found["random"].accuracy
    steps = found["least squares, all rows"].steps
    assert steps is not None
    assert found["random"].steps is None or found["random"].steps > steps


def test_a_switch_needs_a_loss_that_says_when_it_is_learned():
    with pytest.raises(InputError, match="loss must be one of mse, ce"):
        next(switches(load("digits"), replace(OPTIONS, loss="focal")))


def test_a_tag_wise_average_is_recognised_with_its_scale():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    means -= means.mean(0)
    pairs = torch.combinations(torch.arange(5)).repeat(4, 1)
    singles = torch.arange(5).repeat(4)
    labels = torch.cat([torch.stack([singles, torch.full_like(singles, -1)], 1), pairs.flip(1)])
    features = 3 + torch.cat([means[singles], 0.7 * means[pairs].sum(1)])
    found = tag_average(features, labels)
    assert found.cosine == pytest.approx(1)
    assert found.scale == pytest.approx(0.7)
    noisy = tag_average(
        features + torch.randn(features.shape, generator=generator, dtype=torch.float64), labels
    )
    assert noisy.cosine < 0.99
    with pytest.raises(InputError, match="on its own"):
        tag_average(features[5:], labels[singles.numel() :].repeat(2, 1)[: len(features) - 5])


def _tail_at_a_minimum() -> tuple[Tail, float, float]:
    """The extended model's own minimum, found by the solver, as a tail."""
    decay, lambda_h, counts = 5e-3, 5e-3, torch.tensor([50] * 4)
    settings = {"lambda_w": decay, "lambda_h": lambda_h, "lambda_hidden": decay}
    x = solve(
        Problem(loss="mse", counts=counts, dim=12, layers=2, activation="relu", **settings),
        start="normal",
    ).point
    return Tail(x.W, x.hidden[0], x.H, torch.arange(4), counts), decay, lambda_h


def test_both_matchings_find_the_penalty_of_a_minimum_and_predict_all_its_numbers():
    tail, decay, lambda_h = _tail_at_a_minimum()
    assert balanced_penalty(tail, decay) == pytest.approx(lambda_h, rel=1e-6)
    assert penalty_at_gap(tail, decay) == pytest.approx(lambda_h, rel=1e-6)
    penalties, *rows = compare([tail], decay)
    assert (penalties["quantity"], penalties["balance"]) == (
        "lambda_H",
        pytest.approx(lambda_h, rel=1e-6),
    )
    for row in rows:
        for matching in ("balance", "gap"):
            assert row[matching] == pytest.approx(row["measured"], rel=1e-6, abs=1e-6)
            assert (row[f"ratio, {matching}"] is None) == (abs(row[matching]) < 1e-12)
    assert len(tail.spectra()["W_2 W_1"]) == 4
    found = tail.collapse()
    assert all(value < 1e-6 for name, value in found.items() if "nc2" in name or "nc3" in name)


def test_the_models_own_descent_collapses_layer_by_layer():
    tail, decay, _ = _tail_at_a_minimum()
    labels = torch.arange(4).repeat_interleave(5)
    first, *_, last = model_run(
        Tail(tail.W2, tail.W1, tail.h[labels], labels, torch.tensor([5] * 4)), decay, steps=150
    )
    assert first["step"] == 0
    assert last["layer1/nc1_quotient"] < 1e-2 * first["layer1/nc1_quotient"]


def test_the_tail_of_a_network_gives_its_logits():
    architecture = Architecture(widths=(9, 7), unbiased=2)
    training = Training(
        load("digits"), Options(architecture=architecture, loss="mse", steps=5)
    ).run()
    tail, images = tail_of(training), training.data.train.images
    logits = (tail.h @ tail.W1.T).clamp_min(0) @ tail.W2.T
    torch.testing.assert_close(
        logits.float(), training.network(images).detach(), rtol=1e-4, atol=1e-5
    )
    assert tail.numbers()["data loss"] == pytest.approx(
        training.evaluate("train")["loss"], rel=1e-4
    )
    for other in (
        Architecture(widths=(9, 7)),
        Architecture(model="cnn-bn", widths=(9, 7), unbiased=2),
    ):
        with pytest.raises(InputError, match="unbiased=2"):
            tail_of(Training(load("digits"), Options(architecture=other, loss="mse")))
    with pytest.raises(InputError, match="train longer"):
        penalty_at_gap(tail, 5e-4)
