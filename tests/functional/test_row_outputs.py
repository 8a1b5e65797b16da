"""What the sweep tells of every row beside the loss, against dense torch, in every mode of
autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ufm_fast import functional as fused
from ufm_fast.functional import row_operators

N, K, D = 7, 9, 4
LABELS = torch.tensor([0, 4, 2, -100, 8, 1, 1])
KEPT = LABELS != -100
SAMPLES = torch.linspace(0.5, 2.0, N, dtype=torch.float64)


def head(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (K, D), (K,))
    return tuple(
        (scale * torch.randn(*s, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
        for s in shapes
    )


def dense(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p, y = F.log_softmax(z, 1), LABELS.clamp_min(0)[:, None]
    own = z.gather(1, y)
    rank = (z > own).sum(1)
    mass = torch.exp(z - own).sum(1) - 1.0
    return p.gather(1, y)[:, 0] * KEPT, -(p.exp() * p).sum(1) * KEPT, mass * KEPT, z.argmax(1), rank


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float64, 1.0), (torch.float64, 4.0), (torch.float32, 1.0)]
)
def test_the_rows_are_those_of_dense_torch(dtype: torch.dtype, scale: float) -> None:
    h, W, b = head(dtype, scale)
    loss, rows = fused.linear_cross_entropy_rows(h, W, LABELS, linear_bias=b)
    z = F.linear(h, W, b)
    torch.testing.assert_close(loss, F.cross_entropy(z, LABELS))
    p, entropy, mass, argmax, rank = dense(z)
    torch.testing.assert_close(rows.log_probability, p)
    torch.testing.assert_close(rows.entropy, entropy)
    torch.testing.assert_close(rows.off_target_mass, mass)
    assert torch.equal(rows.argmax, torch.where(KEPT, argmax, -1))
    assert torch.equal(rows.rank, torch.where(KEPT, rank, -1))
    for k in (1, 3, K):
        assert torch.equal(rows.correct(k), KEPT & (rank < k))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_the_loss_and_of_the_rows(reduction: str) -> None:
    h, W, b = head()
    options: dict[str, Any] = {"linear_bias": b, "reduction": reduction, "sample_weight": SAMPLES}
    loss, rows = fused.linear_cross_entropy_rows(h, W, LABELS, **options)
    expected = fused.linear_cross_entropy(h, W, LABELS, **options)
    torch.testing.assert_close(loss, expected)
    p, entropy, mass, *_ = dense(F.linear(h, W, b))
    for mine, theirs in (
        (loss.sum(), expected.sum()),
        (rows.log_probability @ SAMPLES, p @ SAMPLES),
        (rows.entropy @ SAMPLES, entropy @ SAMPLES),
        (rows.off_target_mass @ SAMPLES, mass @ SAMPLES),
        (
            loss.sum() + (rows.log_probability * rows.entropy).sum(),
            expected.sum() + (p * entropy).sum(),
        ),
    ):
        found, truth = (
            torch.autograd.grad(v, (h, W, b), retain_graph=True) for v in (mine, theirs)
        )
        for left, right in zip(found, truth, strict=True):
            torch.testing.assert_close(left, right)


def test_double_backward_of_all_but_the_entropy() -> None:
    def value(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        loss, rows = fused.linear_cross_entropy_rows(h, W, LABELS, linear_bias=b)
        return loss + (rows.log_probability * SAMPLES).sum().square() + rows.off_target_mass.sum()

    assert torch.autograd.gradgradcheck(value, head(scale=0.5))
    h, W, b = head()
    entropy = fused.linear_cross_entropy_rows(h, W, LABELS, linear_bias=b)[1].entropy
    (gradient,) = torch.autograd.grad(entropy.sum(), W, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of the entropy"):
        gradient.sum().backward()


def test_near_collapse_the_rows_keep_their_digits() -> None:
    h = torch.eye(3) * 60.0
    loss, rows = fused.linear_cross_entropy_rows(h, torch.eye(3), torch.arange(3), reduction="sum")
    mass = 2 * torch.exp(torch.tensor(-60.0, dtype=torch.float64))
    torch.testing.assert_close(rows.off_target_mass.double(), mass.expand(3), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(rows.entropy.double(), (mass * 61.0).expand(3), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(loss.double(), 3 * mass, rtol=1e-5, atol=0.0)


def test_ties_go_to_the_target() -> None:
    W = torch.randn(1, D, generator=torch.Generator().manual_seed(1)).expand(K, D).contiguous()
    rows = fused.linear_cross_entropy_rows(torch.full((K, D), 3.3), W, torch.arange(K))[1]
    assert torch.equal(rows.argmax, torch.arange(K))
    assert not rows.rank.any()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch 2.14 looks at it while it copies what it checks
def test_operators_and_a_full_graph() -> None:
    h, W, b = head()
    rows = SAMPLES.clone().requires_grad_()
    call = (h, W, b, LABELS.clamp_min(0), None, None, rows, [True] * 3)
    assert set(torch.library.opcheck(row_operators.head_details, call).values()) == {"SUCCESS"}

    def value(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        loss, rows = fused.linear_cross_entropy_rows(h, W, LABELS, linear_bias=b)
        return loss + (rows.entropy + rows.log_probability).sum() + rows.correct(2).sum()

    results = []
    for function in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        found = function(h, W, b)
        results.append((found, *torch.autograd.grad(found, (h, W, b))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
