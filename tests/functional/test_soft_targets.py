"""Weighted sparse targets and gradients accumulated into buffers, against dense torch, in every
mode of autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ufm_fast import functional as fused
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import soft_targets

N, K, D = 5, 8, 4
INDICES = torch.tensor([[0, 3, 3], [7, -1, -1], [2, 1, 4], [5, 6, 0], [1, 2, 3]])
WEIGHTS = torch.tensor(
    [[0.2, 0.3, 0.4], [1.5, 9.0, 9.0], [0.1, 0.6, 0.3], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0]],
    dtype=torch.float64,
)
SAMPLES = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.0], dtype=torch.float64)
KEPT = torch.tensor([True, True, True, False, True])


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (K, D), (K,))
    return tuple(
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    )


def dense_targets() -> Tensor:
    q = torch.zeros(N, K, dtype=torch.float64)
    return q.scatter_add_(1, INDICES.clamp_min(0), torch.where(INDICES < 0, 0.0, WEIGHTS))


def dense(h: Tensor, W: Tensor, b: Tensor, reduction: str, samples: Tensor | None) -> Tensor:
    rows = -(dense_targets().to(h.dtype) * F.log_softmax(F.linear(h, W, b), 1)).sum(1)
    weights = KEPT.to(h.dtype) if samples is None else KEPT * samples
    return {"none": rows * weights, "sum": rows @ weights, "mean": rows @ weights / weights.sum()}[
        reduction
    ]


def csr() -> tuple[Tensor, Tensor, Tensor]:
    present = INDICES >= 0
    pointer = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
    return INDICES[present], WEIGHTS[present], pointer


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("samples", [None, SAMPLES])
@pytest.mark.parametrize("flat", [False, True])
def test_soft_targets_equal_dense_torch(reduction: str, samples: Tensor | None, flat: bool) -> None:
    h, W, b = head()
    indices, weights, pointer = csr() if flat else (INDICES, WEIGHTS, None)
    found = fused.linear_soft_cross_entropy(
        h,
        W,
        indices,
        weights,
        indptr=pointer,
        linear_bias=b,
        reduction=reduction,
        sample_weight=samples,
    )
    expected = dense(h, W, b, reduction, samples)
    torch.testing.assert_close(found, expected)
    pairs = zip(
        *(torch.autograd.grad(v.square().sum(), (h, W, b)) for v in (found, expected)), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_half_precision_and_a_full_graph() -> None:
    def value(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return fused.linear_soft_cross_entropy(h, W, INDICES, WEIGHTS, linear_bias=b, divisor=3.0)

    assert torch.autograd.gradgradcheck(value, head())
    halves = head(torch.bfloat16)
    wide = [x.detach().double() for x in halves]
    torch.testing.assert_close(
        value(*halves).double(), dense(*wide, "sum", None) / 3.0, rtol=1e-2, atol=0.0
    )
    results = []
    for function in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        inputs = head()
        found = function(*inputs)
        results.append((found, *torch.autograd.grad(found, inputs)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_target_is_the_cross_entropy_near_collapse() -> None:
    h = 60.0 * torch.eye(3)
    found = fused.linear_soft_cross_entropy(
        h, torch.eye(3), torch.arange(3)[:, None], torch.ones(3, 1)
    )
    assert torch.equal(found, fused.linear_cross_entropy(h, torch.eye(3), torch.arange(3)))
    assert 0.0 < float(found) < 1e-20


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch 2.14 looks at it while it copies what it checks
def test_the_operators() -> None:
    _, W, _ = head()
    pointer = torch.arange(N + 1) * 3
    entries = pointer, INDICES.clamp_min(0).reshape(-1), WEIGHTS.reshape(-1)
    for operator, arguments in (
        (soft_targets.checked_soft, (*entries, K)),
        (soft_targets.mix, (W, *entries)),
        (soft_targets.spread, (torch.ones(N, D, requires_grad=True), *entries, K)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": -WEIGHTS}, InputError, "weights must be finite numbers of at least 0"),
        (
            {"weights": WEIGHTS.clone().requires_grad_()},
            InputError,
            "weights must not require a gradient",
        ),
        ({"indices": INDICES + 1}, InputError, r"indices must lie in \[0, 8\)"),
        (
            {"indices": INDICES[:2]},
            InputTypeError,
            "indices must be integers of the shape of weights",
        ),
        ({"indptr": torch.arange(99)}, InputError, r"indptr must have shape .* got \(99,\)"),
        ({"indptr": torch.zeros(len(INDICES) + 1)}, InputTypeError, "indptr must be integers"),
        ({"indptr": torch.arange(len(INDICES) + 1)}, InputError, "weights must be vectors, got"),
    ],
)
def test_bad_soft_targets_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    h, W, _ = head()
    with pytest.raises(error, match=message):
        fused.linear_soft_cross_entropy(h, W, **({"indices": INDICES, "weights": WEIGHTS} | change))


LABELS = torch.tensor([0, 7, -100, 2, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_added_to_the_buffers(dtype: torch.dtype, compiled: bool) -> None:
    h, W, b = head(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffers = torch.ones(K, D, dtype=wide), torch.ones(K, dtype=wide)

    def loss(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return 2.0 * fused.linear_cross_entropy(
            h, W, LABELS, linear_bias=b, main_grad=buffers, divisor=3
        )

    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for _ in range(2):
        function(h, W, b).backward()
    assert W.grad is None
    assert b.grad is None
    exact = [x.detach().to(wide).requires_grad_() for x in (h, W, b)]
    expected = (
        F.cross_entropy(F.linear(exact[0], exact[1], exact[2]), LABELS, reduction="sum") * 2.0 / 3.0
    )
    gradients = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(h.grad.to(wide), 2 * gradients[0], rtol=2e-2, atol=2e-2)
    for buffer, gradient in zip(buffers, gradients[1:], strict=True):
        torch.testing.assert_close(buffer, 1.0 + 2 * gradient, rtol=1e-5, atol=1e-5)


def test_a_frozen_classifier_and_a_part_without_a_buffer() -> None:
    h, W, b = head()
    buffer = torch.zeros(K, dtype=torch.float64)
    fused.linear_cross_entropy(h, W, LABELS, linear_bias=b, main_grad=(None, buffer)).backward()
    assert W.grad is not None
    assert b.grad is None
    assert bool(buffer.any())
    untouched = torch.zeros(K, D, dtype=torch.float64)
    fused.linear_cross_entropy(h, W.detach(), LABELS, main_grad=(untouched, None)).backward()
    assert not bool(untouched.any())
    with pytest.raises(
        NotImplementedError, match="second derivatives in a parameter with main_grad"
    ):
        torch.autograd.grad(
            fused.linear_cross_entropy(h, W, LABELS, main_grad=(untouched, None)),
            h,
            create_graph=True,
        )
    for wrong in ((untouched.float(), None), (untouched[:2], None), (untouched, untouched)):
        with pytest.raises(InputError, match="main_grad of linear_"):
            fused.linear_cross_entropy(h, W, LABELS, main_grad=wrong)
