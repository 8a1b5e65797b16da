"""What every launch checks."""

import pytest
import torch
from kernel_cases import MARKS

from ufm_kernels.curvature import softmax_hvp
from ufm_kernels.squared_head import squared_error_value_and_grad

pytestmark = MARKS


def test_shapes_that_a_kernel_would_read_beyond_are_refused():
    x, W, t, one = torch.randn(5, 3), torch.randn(4, 3), torch.randint(4, (5,)), torch.ones(5)
    out = {"out_features": torch.zeros(5, 3), "out_weight": torch.zeros(4, 3)}
    for name, wrong in (("d_weight", W[:3]), ("d_features", x[:, :2]), ("d_bias", torch.ones(4))):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            softmax_hvp(x, W, None, t, one, **{"d_features": x, "d_weight": W, **out, name: wrong})
    with pytest.raises(ValueError, match="features"):
        squared_error_value_and_grad(
            x[:, :1], W, None, t, grad_features=torch.zeros(5, 1), grad_weight=torch.zeros(4, 3)
        )
