"""The kernels that never store E."""

import pytest
import torch
from hypothesis import given
from kernel_cases import MARKS, Case, agree, quick, sizes

from ufm_kernels import head, one_pass
from ufm_kernels.operands import operand
from ufm_kernels.segments import target_logits

pytestmark = MARKS


@pytest.mark.parametrize("mode", ["bf16", "tf32", "bf16x3", "fp16x3"])
@given(**sizes)
@quick
def test_one_pass_gradients(mode, rows, classes, dim, seed):
    case = Case(rows, classes, dim, seed, mode)
    agree(case, *case.run(head.one_pass_value_and_grad))


def test_fresh_buffers_of_one_pass_and_of_library_products_in_tf32():
    case = Case(30, 40, 24, 6, "tf32")
    agree(case, *case.run(head.one_pass_value_and_grad, fresh=True))
    agree(case, *case.run(products="library", chunk_rows=8, fresh=True))


def test_one_pass_loops_can_be_cut_into_parts():
    case = Case(37, 71, 24, 4, "tf32x3")
    labels = case.labels.int().contiguous()
    H, W = operand(case.features, torch.float32, 3), operand(case.weight, torch.float32, 3)
    offset = target_logits(case.features, case.weight, case.bias, labels)[:, 0]
    whole, cut = (
        one_pass.forward(H, W, W, case.bias, offset, labels, passes=3, parts=parts)
        for parts in ((1, 128), (2, 64))
    )
    for reduce in (lambda x: x[:2].sum(1), lambda x: x[2].amax(0)):
        torch.testing.assert_close(reduce(whole[0]), reduce(cut[0]), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(whole[1].sum(0), cut[1].sum(0), rtol=1e-4, atol=1e-5)
