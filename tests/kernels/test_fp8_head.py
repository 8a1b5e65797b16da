"""Mode fp8 against float64: errors within their estimates, the fall-back, rows that overflow,
refusals.
"""

import pytest
import torch
from kernel_cases import DEVICE, MARKS

from ufm_kernels import fp8_head
from ufm_kernels.fp8_head import fp8_value_and_grad, quantised
from ufm_kernels.tiles import tile_for

pytestmark = [
    *MARKS,
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="sm_90 only"
    ),
]
K, N, D = 1000, 200, 48


def parts(deviation, margin=0.0, hostile=0, seed=0):
    """bfloat16 features and weight whose logits have that deviation, the targets' raised by the
    margin.
    """
    make = torch.Generator().manual_seed(seed)
    W = torch.randn(K, D, generator=make)
    H = torch.randn(N, D, generator=make) * deviation / D**0.5
    labels = torch.randint(K, (N,), generator=make)
    H += margin * W[labels] / W[labels].square().sum(1, keepdim=True)
    H[:hostile] += 60.0 * W[5] / W[5].square().sum()
    return (
        H.bfloat16().to(DEVICE),
        W.bfloat16().to(DEVICE),
        labels.to(DEVICE),
        torch.randn(K, generator=make).to(DEVICE) * 0.1,
    )


def run(H, W, labels, bias, **options):
    weight = torch.full((len(H),), 1 / len(H), device=DEVICE)
    out = torch.zeros(H.shape, device=DEVICE), torch.zeros(W.shape, device=DEVICE)
    db = None if bias is None else torch.zeros(len(W), device=DEVICE)
    result, error = fp8_value_and_grad(
        H,
        W,
        bias,
        labels,
        weight,
        grad_features=out[0],
        grad_weight=out[1],
        grad_bias=db,
        **options,
    )
    return result.losses, error, [x for x in (*out, db) if x is not None]


def reference(H, W, labels, bias):
    leaves = [x.double().requires_grad_() for x in (H, W, bias) if x is not None]
    z = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    losses = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.mean(), leaves)


def apart(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("deviation", "margin"), [(1.0, 0.0), (3.0, 0.0), (0.5, 10.0)])
def test_errors_are_within_their_estimates(deviation, margin):
    H, W, labels, _ = parts(deviation, margin)
    losses, estimate, gradients = run(H, W, labels, None, bound=1.0, chunk_rows=150)
    expected = reference(H, W, labels, None)
    assert apart(losses, expected[0]) < 1e-5 * (1 + 100 * (margin > 0))
    allowed = 1.5 * float(estimate.square().mean().sqrt())
    for found, wanted in zip(gradients, expected[1], strict=True):
        assert apart(found, wanted) < allowed


def test_a_chunk_beyond_the_bound_takes_bfloat16_products():
    H, W, labels, bias = parts(3.0)
    _, estimate, gradients = run(H, W, labels, bias)
    assert float(estimate.square().mean().sqrt()) > fp8_head.BOUND
    expected = reference(H, W, labels, bias)
    for found, wanted in zip(gradients, expected[1], strict=True):
        assert apart(found, wanted) < 1e-3


def test_rows_that_overflow_and_a_bias():
    H, W, labels, bias = parts(1.0, hostile=3)
    losses, estimate, gradients = run(H, W, labels, bias, bound=1.0, chunk_rows=100)
    expected = reference(H, W, labels, bias)
    assert apart(losses, expected[0]) < 1e-5
    allowed = 1.5 * float(estimate.square().mean().sqrt())
    for found, wanted in zip(gradients, expected[1], strict=True):
        assert apart(found, wanted) < allowed


def test_quantised_operands_have_a_scale_for_128_terms():
    x = (
        torch.randn(300, 7, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-20, 20, 300)[:, None]
    )
    turned, scale = quantised(x)
    assert turned.shape == (7, 384)
    assert scale.shape == (3, 7)
    back = turned.float().unflatten(1, (3, 128)) * scale.T[:, :, None]
    block = torch.nn.functional.pad(x.T, (0, 84)).unflatten(1, (3, 128))
    assert float(((back - block).abs() / block.abs().amax(2, keepdim=True)).max()) <= 16 / 448


def test_what_does_not_fit_is_refused_in_words():
    H, W, labels, _ = parts(1.0)
    with pytest.raises(ValueError, match="fp8_product: has no tile on sm_80, only on sm_90"):
        tile_for("fp8_product", 8, 80)
    with pytest.raises(ValueError, match="one label a row, and bfloat16"):
        run(H.float(), W.float(), labels, None)
