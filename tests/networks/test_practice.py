"""The experiments beside the model: new classes with replay, tag-wise averages of multi-label features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ufm_fast.errors import InputError
from ufm_fast.networks import Architecture, load
from ufm_fast.networks.switch import OPTIONS, VARIANTS, switches
from ufm_fast.networks.tags import tag_average


def test_least_squares_rows_start_below_random_ones():
    options = replace(OPTIONS, architecture=Architecture(widths=(64,), unbiased=1), steps=300)
    found = {s.variant: s for s in switches(load("digits"), options, most_steps=25)}
    assert list(found) == list(VARIANTS)
    losses = {name: switch.loss for name, switch in found.items()}
    assert losses["least squares, all rows"] < losses["least squares, new rows"] < losses["random"] < losses["class mean"]
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
    noisy = tag_average(features + torch.randn(features.shape, generator=generator, dtype=torch.float64), labels)
    assert noisy.cosine < 0.99
    with pytest.raises(InputError, match="on its own"):
        tag_average(features[5:], labels[singles.numel() :].repeat(2, 1)[: len(features) - 5])
