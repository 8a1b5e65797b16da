"""Offsets, margins and scales of the classes in the drop-in losses: dense autograd, the Problem's
numbers, and identities.
"""

from __future__ import annotations

import pytest
import torch

from ufm_fast import Problem
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import linear_cross_entropy, linear_focal_loss, make_adjustment
from ufm_fast.objective import Objective
from ufm_fast.point import Point

COUNTS = [7, 4, 2, 1]
MARGIN = make_adjustment(COUNTS, margin=1.0)
SCALES = make_adjustment(COUNTS, class_scales=1.0)
RULES = {"logit_adjustment": 1.0, "margin": 0.5, "margin_power": 0.25, "class_scales": 0.3}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


def dense(H, W, b, y, how, scale=1.0):
    """The textbook logits."""
    z = scale * (H @ W.T * how.scale + (0 if b is None else b)) + how.offset
    return z - how.margin[y][:, None] * torch.nn.functional.one_hot(y, len(W))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("loss", ["ce", "smoothed", "focal"])
def test_values_gradients_and_second_derivatives_are_those_of_dense_autograd(loss, biased):
    H, W, b = normal(6, 3), normal(4, 3, seed=1), normal(4, seed=2) if biased else None
    y = torch.tensor([0, 3, 1, -100, 2, 0])
    how, kept = make_adjustment(COUNTS, **RULES), y >= 0
    inputs = [x for x in (H, W, b) if x is not None]

    def fused(reduction="mean"):
        common = {"linear_bias": b, "adjustment": how, "reduction": reduction}
        if loss == "focal":
            return linear_focal_loss(H, W, y, **common)
        return linear_cross_entropy(H, W, y, label_smoothing=0.1 * (loss == "smoothed"), **common)

    def textbook():
        z = dense(H[kept], W, b, y[kept], how)
        l = torch.nn.functional.cross_entropy(
            z, y[kept], reduction="none", label_smoothing=0.1 * (loss == "smoothed")
        )
        return (-torch.expm1(-l)) ** 2 * l if loss == "focal" else l

    torch.testing.assert_close(fused(), textbook().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(fused("none")[kept], textbook(), rtol=1e-12, atol=0)
    assert float(fused("none")[3].detach()) == 0.0
    found = []
    for value in (fused(), textbook().mean()):
        first = torch.autograd.grad(value, inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_the_numbers_are_those_of_the_problem():
    problem = Problem(
        counts=COUNTS, dim=3, lambda_w=0.01, lambda_h=0.01, bias="penalised", lambda_b=0.1, **RULES
    )
    objective = Objective(problem, reduce="none", variables="raw")
    H, W, b = (x.detach() for x in (normal(14, 3), normal(4, 3, seed=1), normal(4, seed=2)))
    how = make_adjustment(problem.counts, **RULES)
    value = linear_cross_entropy(H, W, problem.sample_labels, linear_bias=b, adjustment=how)
    assert float(value) == pytest.approx(
        objective.value_and_grad(Point(W, H, b)).data_value, rel=1e-14
    )


def test_cosface_is_a_margin_of_unit_rows_with_a_scale():
    H, W = (torch.nn.functional.normalize(normal(5, 3, seed=s).detach(), dim=1) for s in (0, 1))
    y = torch.tensor([0, 1, 2, 3, 4])
    how = make_adjustment([1] * 5, margin=0.35, temperature=30.0)
    cosine = H @ W.T - 0.35 * torch.eye(5, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(30.0 * cosine, y)
    torch.testing.assert_close(
        linear_cross_entropy(H, W, y, logit_scale=30.0, adjustment=how),
        expected,
        rtol=1e-12,
        atol=0,
    )


def test_nothing_to_change_changes_no_bit():
    H, W, y = normal(5, 3), normal(4, 3, seed=1), torch.tensor([0, 1, 2, 3, 1])
    nothing = make_adjustment(
        COUNTS, logit_adjustment=0.0, margin=[0.0] * 4, class_scales=[1.0] * 4
    )
    assert torch.equal(
        linear_cross_entropy(H, W, y, adjustment=nothing), linear_cross_entropy(H, W, y)
    )
    buffer = torch.zeros(4, 3, dtype=torch.float64)
    linear_cross_entropy(H, W, y, adjustment=MARGIN, main_grad=(buffer, None)).backward()
    torch.testing.assert_close(
        buffer, torch.autograd.grad(linear_cross_entropy(H, W, y, adjustment=MARGIN), W)[0]
    )
    half = linear_cross_entropy(
        H.bfloat16(), W.bfloat16(), y, adjustment=make_adjustment(COUNTS, **RULES)
    )
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("counts", "rules", "words"),
    [
        ([0, 0], {"margin": 1.0}, "counts"),
        ([], {"margin": 1.0}, "counts"),
        ([-1, 2], {"margin": 1.0}, "counts"),
        ([[1, 2]], {"margin": 1.0}, "counts"),
        ([1, 2], {"class_scales": -1e4}, "beyond float64"),
        ([1, 2], {"margin": 1.0, "temperature": float("nan")}, "temperature"),
    ],
)
def test_rules_and_counts_are_checked(counts, rules, words):
    with pytest.raises(InputError, match=words):
        make_adjustment(counts, **rules)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"adjustment": 0.3}, InputTypeError, "make_adjustment"),
        (
            {"adjustment": make_adjustment([2, 1, 1], margin=1.0)},
            InputError,
            "3 classes but linear_weight has 4",
        ),
        ({"adjustment": MARGIN, "softcap": 5.0}, InputError, "without softcap"),
        (
            {"adjustment": MARGIN, "label_smoothing": 0.1, "weight": torch.ones(4)},
            InputError,
            "smoothed class weights",
        ),
        ({"adjustment": SCALES, "target": torch.ones(2, 4) / 4}, InputError, "class indices"),
        ({"adjustment": SCALES, "main_grad": (torch.zeros(4, 3), None)}, InputError, "main_grad"),
    ],
)
def test_what_contradicts_is_said(given, error, words):
    given = {"target": torch.tensor([0, 1]), **given}
    with pytest.raises(error, match=words):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), **given)
