"""Numbers at the edge: infinite class weights of absent classes, common offsets of the logits,
logits near the range's end.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ufm_fast import functional as fused

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SINGLE = {
    "ce": fused.linear_cross_entropy,
    "focal": fused.linear_focal_loss,
    "mse": fused.linear_squared_error,
}


@pytest.mark.parametrize("absent", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINGLE)
def test_the_weight_of_a_class_without_rows_may_be_anything(name, dtype, reduction, absent):
    """As "balanced" weights make it, 1/0: an ignored row's label stands for no class, and 0 times
    infinity is NaN.
    """
    results = []
    for weight in (absent, 1.0):
        h, w = (
            torch.tensor(x, dtype=dtype, requires_grad=True)
            for x in ([[0.0, 0.5], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
        )
        value = SINGLE[name](
            h,
            w,
            torch.tensor([1, -100]),
            weight=torch.tensor([weight, 1.0], dtype=dtype),
            reduction=reduction,
        )
        results.append((value, *torch.autograd.grad(value.sum(), (h, w))))
    for found, expected in zip(*results, strict=True):
        assert bool(expected.isfinite().all())
        assert torch.equal(found, expected)


def test_an_infinite_weight_of_an_absent_class_has_the_value_of_torch():
    arguments = (torch.tensor([1, -100]), torch.tensor([math.inf, 1.0]))
    value = fused.linear_cross_entropy(
        torch.zeros(2, 2), torch.eye(2), arguments[0], weight=arguments[1]
    )
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    assert float(value) == float(F.cross_entropy(torch.zeros(2, 2), *arguments))


@pytest.mark.parametrize("target", [[1, 2], [1, -100], [0, 1], [0, -100]])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("bias", [False, True])
def test_an_infinite_weight_with_smoothing_has_the_value_of_torch(
    bias, infinite, reduction, target
):
    """Every row has a share of every class, so each that counts loses infinitely; it was NaN."""
    h = torch.tensor([[0.3, -1.0], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.0, 0.2], [0.0, 1.0], [-0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64) if bias else None
    options = {
        "weight": torch.tensor([infinite, 1.0, 2.0]).double(),
        "reduction": reduction,
        "label_smoothing": 0.1,
    }
    found = fused.linear_cross_entropy(h, w, torch.tensor(target), linear_bias=b, **options)
    torch.testing.assert_close(
        found, F.cross_entropy(F.linear(h, w, b), torch.tensor(target), **options), equal_nan=True
    )
    (gradient,) = torch.autograd.grad(found.sum(), h)
    assert gradient.isfinite().all(1).tolist() == [False, target[1] == -100]


def _offset_head(dtype, via, value, logits, rows=5):
    """A head whose logits are value + logits in every row, through its weight or its bias: (H, W,
    b).
    """
    shifted = (value + logits).to(dtype)
    assert torch.equal(shifted.double(), value + logits)
    if via == "weight":
        return torch.ones(rows, 1, dtype=dtype), shifted[:, None], None
    return torch.ones(rows, 1, dtype=dtype), torch.zeros(len(logits), 1, dtype=dtype), shifted


@pytest.mark.parametrize("value", [1e2, 1e4, 2.0**20, 2.0**24, -(2.0**24), 1e10, 1e15, 1e30])
@pytest.mark.parametrize("via", ["weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(
    ("loss", "options"),
    [("ce", {}), ("ce", {"smoothing": 0.1}), ("focal", {"gamma": 2.0}), ("pick-all", {})],
)
def test_a_common_offset_of_the_logits_cancels(loss, options, dtype, via, value):
    """Value, gradients, Hessian product, margins and accuracy are those without it."""
    value = float(torch.tensor(value, dtype=torch.bfloat16))
    gap = torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    exact = abs(value) < 2**20 and dtype != torch.bfloat16  # numbers beside it that differ by 1
    logits, labels = gap if exact else torch.zeros_like(gap), torch.tensor([2, 1, 0, 4, 3])
    found, expected = [], []
    for into, point in (
        (found, _offset_head(dtype, via, value, logits)),
        (expected, _offset_head(torch.float64, via, 0.0, logits)),
    ):
        h, w, b = point
        part = 1 if via == "weight" else 2
        result = fused.value_and_grad(loss, h, w, labels, b, **options)
        moves = [
            None if x is None else torch.arange(x.numel()).reshape(x.shape).to(x.dtype)
            for x in (h, w, b)
        ]
        product = fused.hvp(
            loss,
            torch.zeros_like(h) if via == "bias" else h,
            w,
            labels,
            tuple([None, *moves[1:]]),
            b,
            **options,
        )
        into += [
            result.value,
            result.gradient[part],
            result.margins,
            result.accuracy,
            product[part],
        ]
    for have, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(have.double(), wanted, rtol=3e-6, atol=3e-6)
    assert torch.equal(found[2] > 0, expected[2] > 0)
    assert not exact or torch.equal(found[2], expected[2])


@pytest.mark.parametrize("value", [1e4, 1e6, 1e10, 1e15])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_common_offset_in_the_drop_in_function(dtype, value):
    w = torch.full((2, 1), value, dtype=dtype, requires_grad=True)
    loss = fused.linear_cross_entropy(torch.ones(1, 1, dtype=dtype), w, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(loss.detach()) == pytest.approx(
        math.log(2), rel=4e-3 if dtype == torch.bfloat16 else 1e-7
    )
    assert gradient.flatten().tolist() == [0.5, -0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_tie_far_above_others_tie_exactly(dtype):
    """A thousand classes at zero leave the mean logit small; the two that lead differ by nothing,
    and their margin is 0.
    """
    w = torch.zeros(1000, 3, dtype=dtype)
    w[7] = w[11] = torch.tensor([0.1, 1e5, 0.3])
    h = torch.tensor([[0.7, 1.1, 0.9]], dtype=dtype).expand(4, -1).contiguous()
    result = fused.value_and_grad("ce", h, w, torch.tensor([7, 11, 7, 11]))
    assert float(result.value) == pytest.approx(math.log(2), rel=1e-6)
    assert result.margins.tolist() == [0.0] * 4
    assert float(result.accuracy) == 0.0


@pytest.mark.parametrize("size", [1e38, 2.5e38, 3e38])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_near_the_end_of_float32(size, smoothing, biased):
    """In bits they are beyond it."""
    h, w, y = torch.ones(2, 1), torch.tensor([[size], [0.0]]), torch.tensor([1, 0])
    bias = torch.tensor([size, 0.0]) if biased else None
    w = torch.zeros_like(w) if biased else w
    logits = torch.tensor([[size, 0.0]] * 2, dtype=torch.float64)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        found = fused.linear_cross_entropy(h, w, y, linear_bias=bias, **options)
        torch.testing.assert_close(
            found.double(), F.cross_entropy(logits, y, **options), rtol=1e-6, atol=0.0
        )
    both = torch.full((2, 1), size)
    value = fused.linear_cross_entropy(torch.ones(1, 1), both, y[:1], label_smoothing=smoothing)
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_that_fits_loses_little_in_the_squared_error(dtype):
    """By Gram matrices, whose terms are of 1e6, the loss of the first row is -9.5e-12."""
    w, h = torch.zeros(10, 2, dtype=dtype), torch.zeros(10, 2, dtype=dtype)
    w[0], h[0] = torch.tensor([1.0, 1e3]), torch.tensor([1 + 1e-7 - 1e3, 1.0])
    losses = fused.linear_squared_error(h, w, torch.arange(10), reduction="none")
    exact = 0.5 * (h.double() @ w.double().T - torch.eye(10, dtype=torch.float64)).square().sum(1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0.0)


def test_rows_that_fit_beside_a_class_mean_that_does_not():
    """Rows by the means of their classes: one row of each class fits to rounding, the mean does
    not.
    """
    make = torch.Generator().manual_seed(0)
    w, y = 10 * torch.randn(4, 6, generator=make, dtype=torch.float64), torch.arange(16) // 4
    h = torch.linalg.pinv(w).T[y] + torch.randn(16, 6, generator=make, dtype=torch.float64)
    h[::4] = (1 + 1e-9) * torch.linalg.pinv(w).T
    losses = fused.linear_squared_error(h, w, y, reduction="none")
    exact = 0.5 * (h @ w.T - torch.eye(4, dtype=torch.float64)[y]).square().sum(1)
    torch.testing.assert_close(losses, exact, rtol=1e-4, atol=0.0)
    assert float(losses[::4].max()) < 1e-17


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 1.2e-3)])
@pytest.mark.parametrize("smoothing", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_smoothing_are_rounded_once(weighted, smoothing, dtype, tolerance):
    """Near smoothing 1 the parts of the gradient cancel: rounded one by one they leave several per
    cent of it.
    """
    make = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(*shape, generator=make) * size).to(dtype)
        for shape, size in (((256, 16), 0.3), ((20, 16), 0.1), ((20,), 0.1))
    ]
    y, weight = (
        torch.randint(20, (256,), generator=make),
        torch.rand(20, generator=make) + 0.5 if weighted else None,
    )
    ours, exact = ([x.to(kind).requires_grad_() for x in parts] for kind in (dtype, torch.float64))
    loss = fused.linear_cross_entropy(
        ours[0], ours[1], y, linear_bias=ours[2], weight=weight, label_smoothing=smoothing
    )
    dense = F.cross_entropy(
        F.linear(*exact),
        y,
        weight=None if weight is None else weight.double(),
        label_smoothing=smoothing,
    )
    for found, wanted in zip(
        torch.autograd.grad(loss, ours), torch.autograd.grad(dense, exact), strict=True
    ):
        assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.3, 1.0])
def test_derivatives_of_smoothing_with_class_weights(smoothing, reduction):
    make = torch.Generator().manual_seed(1)
    parts = [
        torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()
        for shape in ((4, 3), (5, 3), (5,))
    ]
    y, weight = (
        torch.tensor([0, 3, -100, 3]),
        torch.tensor([0.5, 0.0, 2.0, 1.0, -0.25], dtype=torch.float64),
    )

    def loss(h, w, b):
        return fused.linear_cross_entropy(
            h, w, y, linear_bias=b, weight=weight, label_smoothing=smoothing, reduction=reduction
        )

    torch.testing.assert_close(
        loss(*parts),
        F.cross_entropy(
            F.linear(*parts), y, weight=weight, label_smoothing=smoothing, reduction=reduction
        ),
    )
    assert torch.autograd.gradcheck(loss, parts)
    assert torch.autograd.gradgradcheck(loss, parts)
