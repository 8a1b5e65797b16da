"""The squared-error head."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import MARKS, Case, error, quick, sizes

from ufm_kernels.squared_head import squared_error_value_and_grad

pytestmark = MARKS


@given(**sizes, bias=st.booleans(), weighted=st.booleans())
@quick
def test_squared_error(rows, classes, dim, seed, bias, weighted):
    case = Case(rows, classes, dim, seed, "tf32x3", bias=bias)
    parameters = case.parameters()
    z = parameters[0] @ parameters[1].T + (parameters[2] if bias else 0)
    wanted = torch.nn.functional.one_hot(case.labels[:, 0], classes)
    weights = 0.5 * (case.row_weight.double() if weighted else 1)
    value = (weights * ((z - wanted) ** 2).sum(1)).sum() / 2
    buffers = [torch.zeros_like(x, dtype=torch.float32) for x in parameters]
    names = ("grad_features", "grad_weight", "grad_bias")
    found = squared_error_value_and_grad(
        case.features,
        case.weight,
        case.bias,
        case.labels[:, 0],
        case.row_weight if weighted else None,
        0.5,
        mode="tf32x3",
        **dict(zip(names, buffers, strict=False)),
    )
    torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-7)
    for gradient, expected in zip(buffers, torch.autograd.grad(value, parameters), strict=True):
        assert error(gradient, expected) < 1e-5


def test_squared_error_wants_a_label_and_a_weight_for_each_row():
    H, W = torch.randn(9, 16), torch.randn(12, 16)
    for labels, weight in (
        (torch.tensor([3]), None),
        (torch.zeros(9, 2, dtype=torch.long), None),
        (torch.zeros(9).long(), torch.ones(1)),
    ):
        with pytest.raises(ValueError, match="one for each of the 9 rows"):
            squared_error_value_and_grad(
                H,
                W,
                None,
                labels,
                weight,
                grad_features=torch.zeros(9, 16),
                grad_weight=torch.zeros(12, 16),
                mode="tf32x3",
            )
