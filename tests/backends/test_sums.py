"""Sums over many rows: as right at a million rows as at one, where terms that are added in turn
lose digits.

All rows are equal, the worst case, so that the mean over them has the value and derivatives of a
single one.
"""

from __future__ import annotations

import pytest
import torch
from strategies import LOSS_CASES

from ufm_fast.backends import HeadInput, ReferenceBackend, TiledBackend
from ufm_fast.backends.sums import (
    add_class_sums,
    add_product,
    class_totals,
    sums_along,
    weighted_sum,
)
from ufm_fast.functional import HeadGradients, hvp, linear_cross_entropy, value_and_grad
from ufm_fast.losses import make_loss
from ufm_fast.targets import Targets

N = 300_000
DTYPES = [(torch.float32, 3e-6), (torch.bfloat16, 3e-6), (torch.float64, 1e-11)]


def _heads(dtype, shape):
    """A head of N equal rows in ``dtype``, and the head of one of them in float64: (features,
    weight, bias, labels) each.
    """
    make = torch.Generator().manual_seed(1)
    row, weight, bias = (
        torch.randn(*size, generator=make).to(dtype) for size in ((1, shape[1]), shape, shape[:1])
    )
    one = (row.double(), weight.double(), bias.double(), torch.ones(1, dtype=torch.int64))
    return (row.expand(N, -1), weight, bias, torch.ones(N, dtype=torch.int64)), one


def _close(found, expected, tolerance):
    for have, wanted in zip(found, expected, strict=True):
        assert float((have.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize(
    "shape", [(2, 1), (9, 2)]
)  # E becomes the gradient, or stays beside the targets
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_gradients_and_hessian_products_of_many_rows(shape, dtype, tolerance, case):
    many, one = _heads(dtype, shape)
    case = {**case}
    loss, need = case.pop("loss"), ("weight", "bias")
    found, expected = (
        value_and_grad(loss, h, w, y, b, need=need, **case) for h, w, b, y in (many, one)
    )
    assert float(found.value) == pytest.approx(float(expected.value), rel=tolerance)
    _close(found.gradient[1:], expected.gradient[1:], tolerance)
    make = torch.Generator().manual_seed(2)
    direction = [torch.randn(*x.shape, generator=make, dtype=torch.float64) for x in one[:3]]
    moves = (HeadGradients(direction[0].expand(h.shape), *direction[1:]) for h in (many[0], one[0]))
    products = [
        hvp(
            loss,
            h,
            w,
            y,
            v.__class__(*(x.to(torch.promote_types(h.dtype, torch.float32)) for x in v)),
            b,
            need=need,
            **case,
        )
        for v, (h, w, b, y) in zip(moves, (many, one), strict=True)
    ]
    _close(products[0][1:], products[1][1:], tolerance)


def test_the_bias_of_a_drop_in_head():
    N = 1_000_000
    bias = torch.zeros(2, requires_grad=True)
    loss = linear_cross_entropy(
        torch.zeros(N, 1), torch.zeros(2, 1), torch.zeros(N, dtype=torch.int64), linear_bias=bias
    )
    (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 0.5]), rtol=4e-7, atol=0.0)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_products_with_the_logit_gradient(case):
    """G' left, of which each row is the same."""
    many, one = _heads(torch.float32, (3, 2))
    case = {**case}
    loss, products = make_loss(case.pop("loss"), **case), []
    for backend, (h, w, b, y) in ((TiledBackend(), many), (ReferenceBackend(), one)):
        weight = torch.full((len(h),), 1 / len(h), dtype=torch.float64)
        x = HeadInput(loss, h.contiguous(), w, b, Targets(y), weight)
        products.append(
            backend.logit_gradient(x).transposed_times(torch.ones(len(h), 1, dtype=w.dtype))
        )
    _close(products[:1], products[1:], 3e-6)


def test_sums_by_class_and_along_rows():
    """Classes more and fewer than the rows, and rows of more than one block."""
    make = torch.Generator().manual_seed(3)
    for rows, classes, dim in ((3, 8, 5), (40, 8, 5), (9000, 3, 2), (5000, 6000, 1)):
        x, weight = torch.randn(rows, dim, generator=make), torch.rand(rows, generator=make)
        y, E = (
            torch.randint(classes, (rows,), generator=make),
            torch.rand(classes, rows, generator=make),
        )
        expected = torch.zeros(classes, dim, dtype=torch.float64).index_add_(
            0, y, x.double() * weight[:, None].double()
        )
        out = torch.ones(classes, dim)
        add_class_sums(out, y, x, weight)
        torch.testing.assert_close(out.double(), 1 + expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            class_totals(classes, y, weight), torch.bincount(y, weight.double(), classes)
        )
        torch.testing.assert_close(
            sums_along(E, weight), E.double() @ weight.double(), rtol=1e-6, atol=0.0
        )
        torch.testing.assert_close(
            weighted_sum(x, weight), weight.double() @ x.double(), rtol=1e-5, atol=1e-4
        )
        for fresh in (False, True):
            out = torch.full((classes, dim), float("nan") if fresh else 1.0)
            add_product(out, E, x, fresh=fresh)
            torch.testing.assert_close(
                out.double(), (not fresh) + E.double() @ x.double(), rtol=1e-4, atol=1e-3
            )
