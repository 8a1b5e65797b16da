"""The kernel that moves E along a direction."""

import pytest
import torch
from kernel_cases import DEVICE, MARKS, descriptors, error

from ufm_kernels.hvp import move_exponentials
from ufm_kernels.launch import Launch
from ufm_kernels.tiles import Tile

pytestmark = MARKS


@pytest.mark.parametrize("tma", descriptors())
def test_hvp_kernel_by_pointer_and_descriptor(tma):
    make = torch.Generator().manual_seed(0)
    H, dH = (torch.randn(35, 40, generator=make).to(DEVICE, torch.bfloat16) for _ in range(2))
    W, dW = (torch.randn(70, 40, generator=make).to(DEVICE, torch.bfloat16) for _ in range(2))
    base, slope, curvature = (torch.randn(35, generator=make).to(DEVICE) for _ in range(3))
    E = torch.rand(35, 72, generator=make).to(DEVICE, torch.bfloat16)
    dz = dH.double() @ W.double().T + H.double() @ dW.double().T - base.double()[:, None]
    expected = E.double()[:, :70] * (slope.double()[:, None] * dz + curvature.double()[:, None])
    launch = Launch(Tile(32, 64, 32, tma=tma), resident=2)
    E[:, 70:] = 0
    sums = move_exponentials(H, W, dH, dW, None, base, slope, curvature, E, passes=1, launch=launch)
    assert error(E[:, :70], expected) < 1e-2
    torch.testing.assert_close(sums, E.float().sum(1), rtol=1e-4, atol=1e-3)
