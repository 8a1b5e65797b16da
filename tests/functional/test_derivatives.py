"""value_and_grad and hvp against autograd on the dense expression, over every loss and both CPU
backends.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ufm_fast.functional import HeadGradients, hvp, operators, value_and_grad
from ufm_fast.losses import LOSSES, make_loss
from ufm_fast.targets import Targets

PENALTIES = {"lambda_w": 0.3, "lambda_h": 0.2, "lambda_b": 0.1}
PARAMETERS: dict[str, dict[str, float]] = {"ce": {"smoothing": 0.1}, "focal": {"gamma": 1.5}}


def setup(seed: int, loss: str, biased: bool) -> tuple[Tensor, Tensor, Tensor | None, Any, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h, W = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((9, 4), (6, 4)))
    b = torch.randn(6, generator=g, dtype=torch.float64) if biased else None
    y = torch.randint(0, 6, (9,), generator=g)
    targets = (
        Targets(torch.stack([y, (y + 2) % 6], 1).reshape(-1), torch.arange(0, 19, 2))
        if loss == "pick-all"
        else y
    )
    return h, W, b, targets, torch.rand(9, generator=g, dtype=torch.float64) + 0.1


def dense(loss: str, h: Tensor, W: Tensor, b: Tensor | None, targets: Any, rows: Tensor) -> Tensor:
    made = make_loss(loss, **PARAMETERS.get(loss, {}))
    z = h @ W.T if b is None else h @ W.T + b
    penalty = (
        0.3 * W.square().sum()
        + 0.2 * h.square().sum()
        + (0.0 if b is None else 0.1 * b.square().sum())
    )
    return rows @ made.dense(z, targets) + 0.5 * penalty


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    loss=st.sampled_from(list(LOSSES)),
    biased=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    backend=st.sampled_from(["auto", "tiled", "reference"]),
)
def test_equals_autograd(seed: int, loss: str, biased: bool, reduction: str, backend: str) -> None:
    h, W, b, targets, rows = setup(seed, loss, biased)
    leaves = [x.clone().requires_grad_() for x in (h, W, b) if x is not None]
    scale = rows / rows.sum() if reduction == "mean" else rows
    value = dense(loss, leaves[0], leaves[1], leaves[2] if biased else None, targets, scale)
    gradient = torch.autograd.grad(value, leaves, create_graph=True)
    options: dict[str, Any] = (
        PENALTIES | PARAMETERS.get(loss, {}) | {"row_weight": rows, "reduction": reduction}
    )
    found = value_and_grad(loss, h, W, targets, b, backend=backend, **options)
    torch.testing.assert_close(found.value, value.detach(), rtol=1e-12, atol=1e-12)
    parts = [x for x in found.gradient if x is not None]
    direction = [torch.cos(x.detach()) for x in leaves]
    product = torch.autograd.grad(gradient, leaves, direction)
    moved = [
        x
        for x in hvp(loss, h, W, targets, tuple(direction), b, backend=backend, **options)
        if x is not None
    ]
    for ours, theirs in zip([*parts, *moved], [*gradient, *product], strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("part", ["features", "weight", "bias"])
def test_only_what_is_needed(loss: str, part: str) -> None:
    h, W, b, targets, rows = setup(1, loss, True)
    everything = value_and_grad(loss, h, W, targets, b, row_weight=rows)
    one = value_and_grad(loss, h, W, targets, b, row_weight=rows, need=(part,))
    assert [x is not None for x in one.gradient] == [name == part for name in HeadGradients._fields]
    torch.testing.assert_close(getattr(one.gradient, part), getattr(everything.gradient, part))
    direction = HeadGradients(h, W, b)
    whole, only = (
        hvp(loss, h, W, targets, direction, b, need=n) for n in (HeadGradients._fields, (part,))
    )
    torch.testing.assert_close(getattr(only, part), getattr(whole, part))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_missing_direction_is_zero_and_products_add(loss: str) -> None:
    h, W, b, targets, _ = setup(2, loss, True)
    pieces = [
        hvp(loss, h, W, targets, d, b) for d in ((h, None), (None, W), HeadGradients(None, None, b))
    ]
    whole = hvp(loss, h, W, targets, (h, W, b), b)
    for field in HeadGradients._fields:
        total = sum(getattr(p, field) for p in pieces)
        torch.testing.assert_close(total, getattr(whole, field), rtol=1e-11, atol=1e-11)


def test_accuracy_and_margins() -> None:
    h, W, b, y, rows = setup(3, "ce", True)
    assert b is not None
    z = h @ W.T + b
    own = z.gather(1, y[:, None])[:, 0]
    off = z.scatter(1, y[:, None], -math.inf).amax(1)
    found = value_and_grad("ce", h, W, y, b, row_weight=rows)
    assert found.margins is not None
    assert found.accuracy is not None
    torch.testing.assert_close(found.margins, own - off, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.accuracy, rows[z.argmax(1) == y].sum() / rows.sum())
    squared = value_and_grad("mse", h, W, y, b)
    assert squared.accuracy is None
    assert squared.margins is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_lower_precision_has_gradients_in_the_dtype_of_sums(loss: str, dtype: torch.dtype) -> None:
    h, W, b, targets, _ = setup(4, loss, True)
    assert b is not None
    low = [x.to(dtype) for x in (h, W, b)]
    wide = [x.double() for x in low]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not matter
        ours = value_and_grad(loss, low[0], low[1], targets, low[2], **PENALTIES)
        moved = hvp(loss, low[0], low[1], targets, tuple(low), low[2], **PENALTIES)
    theirs = value_and_grad(loss, wide[0], wide[1], targets, wide[2], **PENALTIES)
    expected = hvp(loss, wide[0], wide[1], targets, tuple(wide), wide[2], **PENALTIES)
    assert ours.value.dtype == torch.float64
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-5, atol=0)
    for a, c in zip([*ours.gradient, *moved], [*theirs.gradient, *expected], strict=True):
        assert a is not None
        assert c is not None
        assert a.dtype == torch.float32
        assert float((a.double() - c).norm()) <= 1e-5 * float(c.norm())


def test_inputs_are_left_alone_and_may_require_gradients() -> None:
    h, W, _, y, _ = setup(5, "ce", False)
    before = h.clone(), W.clone()
    h.requires_grad_()
    found = value_and_grad("ce", h, W.T.contiguous().T, y, lambda_w=1.0, lambda_h=1.0)
    assert not found.value.requires_grad
    assert found.gradient.features is not None
    assert not found.gradient.features.requires_grad
    assert torch.equal(h.detach(), before[0])
    assert torch.equal(W, before[1])


@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
def test_collapsed_value_and_gradient_are_the_formula(margin: float) -> None:
    """W = I and h = m e_y: every loss is log1p((K - 1) exp(-m)), the gradient known in closed
    form.
    """
    K = 40
    W, y = torch.eye(K), torch.arange(K)
    found = value_and_grad("ce", margin * W, W, y, reduction="sum")
    s = (K - 1) * math.exp(-margin)
    assert abs(float(found.value) / (K * math.log1p(s)) - 1) < 1e-6
    expected = (
        torch.full((K, K), math.exp(-margin) / (1 + s), dtype=torch.float64)
    ).fill_diagonal_(-s / (1 + s))
    assert found.gradient.features is not None
    torch.testing.assert_close(found.gradient.features.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("penalty", [0.0, 0.2])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_row_of_weight_0_is_left_out_whatever_it_holds(
    loss: str, penalty: float, reduction: str, backend: str
) -> None:
    h, W, b, targets, rows = setup(6, loss, True)
    out = torch.tensor([1, 4, 8])
    rows[out] = 0.0
    spoilt, moved = h.clone(), torch.cos(h)
    spoilt[out[0]], spoilt[out[1]] = math.nan, math.inf
    moved[out[1]], moved[out[2]] = math.nan, math.inf
    kept = rows > 0
    options: dict[str, Any] = {
        "reduction": reduction,
        "lambda_w": penalty,
        "backend": backend,
        "row_weight": rows,
    }
    options |= PARAMETERS.get(loss, {})
    found = value_and_grad(loss, spoilt, W, targets, b, **options)
    product = hvp(loss, spoilt, W, targets, (moved, W, b), b, **options)
    clean = value_and_grad(loss, h, W, targets, b, **options)
    truth = hvp(loss, h, W, targets, (torch.cos(h), W, b), b, **options)
    torch.testing.assert_close(found.value, clean.value)
    for ours, theirs in ((found.gradient, clean.gradient), (product, truth)):
        assert ours.features is not None
        assert not ours.features[out].any()
        torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-12, atol=1e-14)
    if loss != "mse":
        full = value_and_grad(loss, h, W, targets, b, **PARAMETERS.get(loss, {}))
        assert found.margins is not None
        assert full.margins is not None
        torch.testing.assert_close(found.margins[kept], full.margins[kept])
        torch.testing.assert_close(
            found.margins[out[2]], full.margins[out[2]]
        )  # finite features: its margin is known
        torch.testing.assert_close(found.accuracy, clean.accuracy)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_rows_of_weight_0_are_the_same_as_rows_that_are_not_there(loss: str) -> None:
    h, W, b, _, rows = setup(7, loss, True)
    sets = [[0, 2], [1], [3, 4, 5], [2], [0], [5, 1], [4], [3, 0], [2]]
    y = torch.tensor([members[0] for members in sets])
    kept = torch.tensor([i for i in range(9) if i not in (0, 5, 6)])
    weights = torch.zeros(9, dtype=torch.float64).index_copy(0, kept, rows[kept])
    whole: Any = sets if loss == "pick-all" else y
    few: Any = [sets[i] for i in kept] if loss == "pick-all" else y[kept]
    found = value_and_grad(loss, h, W, whole, b, row_weight=weights)
    truth = value_and_grad(loss, h[kept], W, few, b, row_weight=rows[kept])
    product = hvp(loss, h, W, whole, (h, W, b), b, row_weight=weights)
    expected = hvp(loss, h[kept], W, few, (h[kept], W, b), b, row_weight=rows[kept])
    torch.testing.assert_close(found.value, truth.value)
    for ours, theirs in ((found.gradient, truth.gradient), (product, expected)):
        assert ours.features is not None
        assert theirs.features is not None
        torch.testing.assert_close(ours.features[kept], theirs.features)
        torch.testing.assert_close((ours.weight, ours.bias), (theirs.weight, theirs.bias))


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_mean_over_nothing_is_nan_and_has_no_gradient(loss: str, rows: int) -> None:
    h, W = torch.ones(rows, 3, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    y, weights = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
    found = value_and_grad(loss, h, W, y, row_weight=weights)
    assert found.value.isnan()
    assert found.gradient.features is not None
    assert found.gradient.weight is not None
    assert not found.gradient.features.any()
    assert not found.gradient.weight.any()
    total = value_and_grad(loss, h, W, y, row_weight=weights, reduction="sum", lambda_w=2.0)
    torch.testing.assert_close(float(total.value), 15.0)
    torch.testing.assert_close(total.gradient.weight, 2.0 * W)
    product = hvp(loss, h, W, y, (h, W), row_weight=weights)
    assert not any(bool(x.any()) for x in product if x is not None)


def test_without_row_weights_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    h, W, _, y, rows = setup(8, "ce", False)
    monkeypatch.setattr(operators, "rows_of", lambda *_: pytest.fail("rows were copied"))
    value_and_grad("ce", h, W, y)
    value_and_grad("ce", h, W, y, row_weight=rows)
