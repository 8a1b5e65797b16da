"""Weights of samples, divisors and logit scales of the drop-in losses, against dense torch, in
every mode of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile

from ufm_fast import functional as fused
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.losses import make_loss
from ufm_fast.nn import LinearCrossEntropyLoss
from ufm_fast.targets import Targets

N, K, D = 6, 5, 3
LABELS = torch.tensor([0, 4, 2, -100, 2, 1])
KEPT = LABELS != -100
SETS = Targets(torch.tensor([0, 4, 2, 1, 3, 2, 1, 0, 2]), torch.tensor([0, 2, 3, 5, 6, 7, 9]))
CLASSES = torch.tensor([0.5, 1.0, 2.0, 0.3, 0.7], dtype=torch.float64)
SAMPLES = torch.tensor([0.3, -1.2, 2.0, 5.0, 0.0, 1.5], dtype=torch.float64)


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (K, D), (K,))
    return tuple(
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    )  # type: ignore[return-value]


LOSSES: dict[str, tuple[Callable[..., Tensor], Any, dict[str, Any]]] = {
    "ce": (fused.linear_cross_entropy, LABELS, {}),
    "ce-weighted-smooth": (
        fused.linear_cross_entropy,
        LABELS,
        {"weight": CLASSES, "label_smoothing": 0.2},
    ),
    "focal": (fused.linear_focal_loss, LABELS, {"weight": CLASSES}),
    "mse": (fused.linear_squared_error, LABELS, {"weight": CLASSES}),
    "pick-all": (fused.linear_pick_all, SETS, {}),
}
name = pytest.mark.parametrize("name", list(LOSSES))


def dense_rows(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """(losses with class weights, class weights) of the rows; ignored ones are 0 in both."""
    if name.startswith("ce"):
        options = LOSSES[name][2]
        rows = F.cross_entropy(z, LABELS, reduction="none", **options)
        return rows, (
            CLASSES[LABELS.clamp_min(0)] if options else torch.ones(N, dtype=torch.float64)
        ) * KEPT
    if name == "pick-all":
        return make_loss(name).dense(z, SETS), torch.ones(N, dtype=torch.float64)
    factor = CLASSES[LABELS.clamp_min(0)] * KEPT
    return factor * make_loss(name).dense(z, LABELS.clamp_min(0)), factor


def dense(name: str, z: Tensor, reduction: str, divisor: float | None = None) -> Tensor:
    rows, factor = dense_rows(name, z)
    rows = rows * SAMPLES
    if divisor is not None:
        return rows.sum() / divisor
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (factor * SAMPLES).sum()}[
        reduction
    ]


@name
@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [("none", None), ("sum", None), ("mean", None), ("sum", 7.0), ("mean", torch.tensor(7))],
)
def test_sample_weights_and_divisors_equal_dense_torch(
    name: str, reduction: str, divisor: Any
) -> None:
    function, target, options = LOSSES[name]
    h, W, b = head()
    found = function(
        h,
        W,
        target,
        linear_bias=b,
        reduction=reduction,
        sample_weight=SAMPLES,
        divisor=divisor,
        **options,
    )
    expected = dense(
        name, F.linear(h, W, b), reduction, None if divisor is None else float(divisor)
    )
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), (h, W, b)),
        torch.autograd.grad(expected.square().sum(), (h, W, b)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@name
def test_a_row_of_weight_zero_may_hold_anything(name: str) -> None:
    function, target, options = LOSSES[name]
    h, W, b = head()
    spoilt = h.detach().clone()
    spoilt[4] = float("nan")
    spoilt.requires_grad_()
    wanted = [W]
    if function is not fused.linear_squared_error:  # a scale's gradient too
        options = {**options, "logit_scale": torch.tensor(0.7).double().requires_grad_()}
        wanted.append(options["logit_scale"])
    values = [
        function(x, W, target, linear_bias=b, sample_weight=SAMPLES, **options) for x in (h, spoilt)
    ]
    assert torch.equal(*values)
    gradients = [
        torch.autograd.grad(v, (x, *wanted)) for v, x in zip(values, (h, spoilt), strict=True)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@name
def test_double_backward(name: str) -> None:
    function, target, options = LOSSES[name]

    def value(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return function(h, W, target, linear_bias=b, sample_weight=SAMPLES, divisor=3.0, **options)

    assert torch.autograd.gradcheck(value, head())
    assert torch.autograd.gradgradcheck(value, head())


def test_a_scale_is_differentiable_and_reaches_the_bias() -> None:
    h, W, b = head()
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    found = fused.linear_cross_entropy(h, W, LABELS, linear_bias=b, logit_scale=scale)
    expected = F.cross_entropy(scale * F.linear(h, W, b), LABELS)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        *(torch.autograd.grad(v, (h, W, b, scale)) for v in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("cap", [1.5, 30.0])
def test_capped_logits_equal_dense_torch_to_second_order_and_in_a_full_graph(cap: float) -> None:
    options: dict[str, Any] = {
        "weight": CLASSES,
        "sample_weight": SAMPLES.abs(),
        "softcap": cap,
        "logit_scale": 2.0,
    }

    def loss(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return fused.linear_cross_entropy(h, W, LABELS, linear_bias=b, **options)

    h, W, b = head()
    rows = F.cross_entropy(
        cap * torch.tanh(2.0 * F.linear(h, W, b) / cap), LABELS, weight=CLASSES, reduction="none"
    )
    weights = CLASSES[LABELS.clamp_min(0)] * KEPT * SAMPLES.abs()
    expected = (rows * SAMPLES.abs()).sum() / weights.sum()
    gradients = torch.autograd.grad(expected, (h, W, b))
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = function(h, W, b)
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(torch.autograd.grad(found, (h, W, b)), gradients, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradgradcheck(loss, head())
    each = fused.linear_cross_entropy(
        h, W, LABELS, linear_bias=b, reduction="none", softcap=cap, logit_scale=2.0
    )
    assert torch.autograd.gradcheck(
        lambda h: fused.linear_cross_entropy(h, W, LABELS, reduction="none", softcap=cap), (h,)
    )
    torch.testing.assert_close(each * CLASSES[LABELS.clamp_min(0)], rows)


def test_probabilities_take_weights_and_divisors() -> None:
    h, W, b = head()
    P = torch.softmax(
        torch.randn(N, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1
    )
    rows = F.cross_entropy(F.linear(h, W, b), P, reduction="none") * SAMPLES
    for options, expected in (
        ({}, rows.sum() / SAMPLES.sum()),
        ({"divisor": 4}, rows.sum() / 4),
        ({"reduction": "none"}, rows),
    ):
        found = fused.linear_cross_entropy(h, W, P, linear_bias=b, sample_weight=SAMPLES, **options)
        torch.testing.assert_close(found, expected)


def test_many_heads_take_a_weight_each() -> None:
    g = torch.Generator().manual_seed(3)
    h, W = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 3), (5, 2, 3)))
    y, w = torch.randint(5, (4, 2), generator=g), torch.rand(4, 2, generator=g, dtype=torch.float64)
    rows = F.cross_entropy(torch.einsum("nd,khd->nkh", h, W), y, reduction="none") * w
    torch.testing.assert_close(
        fused.linear_cross_entropy(h, W, y, sample_weight=w), rows.sum() / w.sum()
    )


@pytest.mark.parametrize(
    "weights", [{}, {"sample_weight": SAMPLES.float(), "divisor": 3.0, "logit_scale": 0.5}]
)
def test_a_full_graph_with_ignored_rows_gives_the_eager_loss(weights: dict[str, Any]) -> None:
    """Half the rows are padding that holds infinities: a compiled graph must not count them, nor
    their gradients.
    """
    h, W, b = head(torch.float32)
    padded = torch.cat([h.detach(), torch.full((N, D), float("inf"))]).requires_grad_()
    y = torch.cat([LABELS, torch.full((N,), -100)])
    if weights:
        weights = {**weights, "sample_weight": torch.cat([weights["sample_weight"], torch.ones(N)])}

    def loss(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return fused.linear_cross_entropy(h, W, y, linear_bias=b, **weights)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(padded, W, b)
        results.append((value, *torch.autograd.grad(value, (padded, W, b))))
    for found, expected in zip(*results, strict=True):
        assert bool(expected.isfinite().all())
        torch.testing.assert_close(found, expected)


def test_the_module_hands_them_on() -> None:
    model = LinearCrossEntropyLoss(D, K, dtype=torch.float64)
    h = head()[0]
    found = model(h, LABELS, sample_weight=SAMPLES, divisor=2.0)
    torch.testing.assert_close(found, dense("ce", F.linear(h, model.linear.weight), "sum", 2.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sample_weight": SAMPLES[:3]}, InputError, r"sample_weight must have shape \(6,\)"),
        ({"sample_weight": SAMPLES.long()}, InputTypeError, "sample_weight must be float64"),
        (
            {"sample_weight": SAMPLES.clone().requires_grad_()},
            InputError,
            "sample_weight must not require a gradient",
        ),
        ({"divisor": 0}, InputError, "divisor must be a positive number, got 0"),
        (
            {"divisor": torch.ones(2)},
            InputError,
            "divisor must be a number or a real tensor of one",
        ),
        (
            {"divisor": torch.tensor(2.0, requires_grad=True)},
            InputError,
            "divisor must not require a gradient",
        ),
        ({"divisor": 2, "reduction": "none"}, InputError, "divisor divides the sum"),
        ({"softcap": 0.0}, InputError, "softcap must be a positive number"),
        ({"softcap": 3.0, "label_smoothing": 0.1}, InputError, "softcap goes with class indices"),
        ({"logit_scale": float("inf")}, InputError, "logit_scale must be a finite number"),
        ({"logit_scale": "warm"}, InputTypeError, "logit_scale must be a number"),
    ],
)
def test_bad_input_is_refused_in_words(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    h, W, _ = head()
    with pytest.raises(error, match=message):
        fused.linear_cross_entropy(h, W, LABELS, **change)


def products(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in a call."""
    call()  # what is set up once
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as record:
        call()
    kinds = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(event.flops for event in record.key_averages() if event.key in kinds)


ASKED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "nothing": lambda h, W, y, q: fused.linear_cross_entropy(h, W, y[:, 0]),
    "rows": lambda h, W, y, q: fused.linear_cross_entropy(h, W, y[:, 0], sample_weight=q[:, 0]),
    "divisor": lambda h, W, y, q: fused.linear_cross_entropy(h, W, y[:, 0], divisor=3.0),
    "scale": lambda h, W, y, q: fused.linear_cross_entropy(h, W, y[:, 0], logit_scale=0.5),
    "main_grad": lambda h, W, y, q: fused.linear_cross_entropy(
        h, W, y[:, 0], main_grad=(torch.zeros_like(W), None)
    ),
    "outputs": lambda h, W, y, q: fused.linear_cross_entropy_rows(h, W, y[:, 0])[0],
    "soft": fused.linear_soft_cross_entropy,
}


@pytest.mark.parametrize("asked", list(ASKED))
def test_nothing_beside_the_loss_costs_a_product_of_its_own(asked: str) -> None:
    g = torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, 16, generator=g).requires_grad_() for n in (40, 90))
    y, q = torch.randint(90, (40, 3), generator=g), torch.rand(40, 3, generator=g)
    assert products(lambda: ASKED[asked](h, W, y, q).backward()) == 6 * 40 * 90 * 16
