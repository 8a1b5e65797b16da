"""The kernel of the products with E, its epilogue, and sums of E."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, MARKS, descriptors, error, quick, sizes, truncating_dot
from triton.runtime.interpreter import InterpreterBuilder

from ufm_kernels.launch import Launch
from ufm_kernels.operands import MODES, empty_chunk, operand
from ufm_kernels.products import add_product, add_weighted_sums
from ufm_kernels.tiles import Tile

pytestmark = MARKS


@pytest.mark.parametrize("tma", descriptors())
@pytest.mark.parametrize("mode", ["bf16", "tf32x3"])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@given(**sizes, exact=st.booleans())
@settings(quick, max_examples=2)
def test_product_kernel(mode, tma, transposed, down, rows, classes, dim, seed, exact):
    """Exact integers, so that only the indexing can be wrong."""
    make = torch.Generator().manual_seed(seed)
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=make).float().to(DEVICE)  # noqa: E731
    chosen = MODES[mode]
    whole, B = integers(rows, classes), integers(rows if transposed else classes, dim)
    E = empty_chunk(rows, classes, chosen, whole.device).zero_()
    E[:, :classes] = whole
    out, labels = (
        integers(classes if transposed else rows, dim),
        torch.randint(-1, classes, (rows, 2), generator=make),
    )
    factor, coefficient = integers(rows), integers(rows, 2)
    expected = out + (whole.T @ B if transposed else factor[:, None] * (whole @ B))
    labels = labels.int().to(DEVICE)
    extra = {}
    V = operand(B, chosen.products, chosen.passes)
    if not transposed:
        known = (labels >= 0).float()
        expected -= ((coefficient * known)[..., None] * B[labels.long().clamp_min(0)]).sum(1)
        extra = {"factor": factor, "coefficient": coefficient, "labels": labels}
        extra |= {"points": B.bfloat16() if exact else V, "exact": exact}
    launch = Launch(Tile(32, 64, 32, tma=tma, flatten=down), resident=2)
    right = V if down else operand(B.T.contiguous(), chosen.products, chosen.passes)
    add_product(
        out,
        E,
        right,
        passes=chosen.passes,
        depth=len(B),
        transposed=transposed,
        down=down,
        launch=launch,
        **extra,
    )
    assert torch.equal(out, expected)


@given(**sizes, transposed=st.booleans())
@quick
def test_weighted_sums(rows, classes, dim, seed, transposed):
    make = torch.Generator().manual_seed(seed)
    whole = torch.randn(rows, classes, generator=make).to(DEVICE)
    E = (
        operand(whole, torch.bfloat16, 3)
        if transposed
        else operand(whole.bfloat16(), torch.bfloat16, 1)
    )
    weight = torch.randn(rows if transposed else classes, generator=make).to(DEVICE)
    out = torch.ones(classes if transposed else rows, device=DEVICE)
    add_weighted_sums(
        out, E, weight, passes=3 if transposed else 1, classes=classes, transposed=transposed
    )
    expected = 1 + ((whole.T if transposed else whole.bfloat16().float()) @ weight)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="the device has tensor cores of its own")
@pytest.mark.parametrize("mode", ["bf16x3", "tf32x3"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_pairs_outlive_truncating_tensor_cores(monkeypatch, mode, transposed):
    make, chosen, depth = torch.Generator().manual_seed(0), MODES[mode], 8192
    E = torch.rand(40, depth, generator=make)
    B = torch.rand(depth, 16, generator=make)
    pair = operand(E.T if transposed else E, chosen.products, 3)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating_dot)
    out = torch.zeros(40, 16)
    add_product(
        out, pair, operand(B, chosen.products, 3), passes=3, depth=depth, transposed=transposed
    )
    assert error(out, E.double() @ B.double()) < 1e-5  # sums on the tensor cores leave 6e-5
