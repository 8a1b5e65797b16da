"""Numbers at the edge: infinite class weights of absent classes, common offsets of the logits, logits near the range's end."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ufm_fast import functional as fused

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SINGLE = {"ce": fused.linear_cross_entropy, "focal": fused.linear_focal_loss, "mse": fused.linear_squared_error}


@pytest.mark.parametrize("absent", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINGLE)
def test_the_weight_of_a_class_without_rows_may_be_anything(name, dtype, reduction, absent):
    """As "balanced" weights make it, 1/0: an ignored row's label stands for no class, and 0 times infinity is NaN."""
    results = []
    for weight in (absent, 1.0):
        h, w = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in ([[0.0, 0.5], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]))
        value = SINGLE[name](
            h, w, torch.tensor([1, -100]), weight=torch.tensor([weight, 1.0], dtype=dtype), reduction=reduction
        )  # fmt: skip
        results.append((value, *torch.autograd.grad(value.sum(), (h, w))))
    for found, expected in zip(*results, strict=True):
        assert bool(expected.isfinite().all())
        assert torch.equal(found, expected)


def test_an_infinite_weight_of_an_absent_class_has_the_value_of_torch():
    arguments = (torch.tensor([1, -100]), torch.tensor([math.inf, 1.0]))
    value = fused.linear_cross_entropy(torch.zeros(2, 2), torch.eye(2), arguments[0], weight=arguments[1])
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    assert float(value) == float(F.cross_entropy(torch.zeros(2, 2), *arguments))
