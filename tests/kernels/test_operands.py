"""Operands: rounded, split, padded, scaled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, MARKS, Case, error, quick, sizes

from ufm_kernels.operands import MODES, logit_operands, operand, operand_bytes, product_operand

pytestmark = MARKS


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_operands_are_rounded_split_and_padded(mode, dtype):
    chosen = MODES[mode]
    x, weight = (
        torch.randn(*size, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        for size in ((37, 135), (37,))
    )
    x, weight[5] = x.to(dtype), float("nan")
    x[7, 3] = float("inf")

    def nearest_of(y, element):
        if element != torch.float32:
            return y.to(element)
        return torch.where(
            y.isfinite(), ((y.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32), y
        )

    for element, factor in ((chosen.logits, None), (chosen.products, weight)):
        y = x.float() if factor is None else x.float() * factor[:, None]
        halves = [nearest_of(y, element)]
        halves += [nearest_of(y - halves[0].float(), element)] if chosen.passes == 3 else []
        found = operand(x, element, chosen.passes, factor)
        assert found.dtype == element
        assert found.nbytes == operand_bytes(*x.shape, element, chosen.passes)
        width = found.shape[1] // len(halves)
        assert width * found.element_size() % (128 if chosen.passes == 3 else 16) == 0
        for i, half in enumerate(halves):
            part = found[:, i * width : (i + 1) * width]
            torch.testing.assert_close(part[:, :135], half, rtol=0, atol=0, equal_nan=True)
            assert not part[:, 135:].any()


def test_operands_keep_nan_and_alignment():
    """A device's nan has all bits set, so that adding to it wraps; a descriptor's base must be a
    multiple of 16 bytes.
    """
    nan = torch.tensor([[0x7FFFFFFF, -1]], dtype=torch.int32, device=DEVICE).view(torch.float32)
    assert operand(nan, torch.float32, 1).isnan()[:, :2].all()
    shifted = torch.zeros(8 * 16 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(16, 8)
    assert operand(shifted, torch.bfloat16, 1).data_ptr() % 16 == 0


@pytest.mark.parametrize("scale", [2.0**-30, 3e5, 1e8])
def test_pairs_of_float16_share_their_scale(scale):
    """Only the product of the factors' scales counts: the larger one lends its exponent to the
    smaller, exactly.
    """
    case = Case(20, 30, 16, 1, "fp16x3")
    H, W = case.features * scale, case.weight / scale
    pair = logit_operands(H, W, MODES["fp16x3"])
    left, right = ((x[:, :16].double() + x[:, 64:80].double()) for x in pair)
    assert error(left @ right.T, H.double() @ W.double().T) < 1e-7
    for bad in (float("nan"), float("inf")):
        spoilt = torch.cat((case.features, torch.full((1, 16), bad, device=DEVICE)))
        pair = logit_operands(spoilt, case.weight, MODES["fp16x3"])
        left, right = ((x[:, :16].double() + x[:, 64:80].double()) for x in pair)
        assert error(left[:-1] @ right.T, case.features.double() @ case.weight.double().T) < 1e-6
        assert not left[-1].isfinite().any()
    zero = logit_operands(torch.zeros_like(H), W, MODES["fp16x3"])
    assert all(x.isfinite().all() for x in zero)


@pytest.mark.parametrize("mode", ["tf32", "tf32x3"])
@given(**sizes, weighted=st.booleans())
@quick
def test_float32_products_read_the_transpose(mode, rows, classes, dim, seed, weighted):
    case = Case(rows, classes, dim, seed, mode)
    chosen, weight = MODES[mode], case.row_weight if weighted else None
    found, down = product_operand(case.features, chosen, weight)
    scaled = case.features if weight is None else case.features * weight[:, None]
    assert not down
    assert torch.equal(found, operand(scaled.T.contiguous(), chosen.products, chosen.passes))
