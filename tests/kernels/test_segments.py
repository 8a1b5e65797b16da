"""Sums by class, target logits, and labels that are no class."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, MARKS, Case, quick, sizes

from ufm_kernels import head
from ufm_kernels.segments import Segments, add_class_sums, check_labels, target_logits

pytestmark = MARKS


@given(**sizes, splits=st.sampled_from([1, 3]))
@settings(quick, max_examples=3)
def test_class_sums_and_target_logits(rows, classes, dim, seed, splits):
    classes = min(classes, 12)
    case = Case(rows, classes, dim, seed, "tf32x3", targets=2)
    labels = case.labels.int().contiguous()
    z = case.features.double() @ case.weight.double().T + case.bias.double()
    expected = torch.where(labels >= 0, z.gather(1, case.labels.clamp_min(0)), 0.0)
    found = target_logits(case.features, case.weight, case.bias, labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    out = torch.ones_like(case.weight)
    coefficient = torch.where(
        labels >= 0, found, 7.0
    )  # what stands beside the padding must not count
    add_class_sums(out, case.features, coefficient, Segments.of(labels, classes), -2.0, splits)
    sums = torch.zeros(classes + 1, dim, dtype=torch.float64, device=DEVICE)
    for t in range(labels.shape[1]):
        index = torch.where(case.labels[:, t] < 0, classes, case.labels[:, t])
        sums.index_add_(0, index, coefficient[:, t, None].double() * case.features.double())
    torch.testing.assert_close(out.double(), 1 - 2 * sums[:classes], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [None, 3])
def test_class_sums_of_fewer_rows_than_classes(splits):
    """A program a row, of which the first of each class works; padding and labels that are no class
    own nothing.
    """
    make = torch.Generator().manual_seed(3)
    labels = torch.tensor([[5], [-1], [90], [5], [0], [96], [97], [-2], [5]], dtype=torch.int32)
    H, weight = torch.randn(9, 140, generator=make), torch.rand(9, 1, generator=make)
    out = torch.ones(97, 140)
    expected = out.clone()
    for row, label in enumerate(labels[:, 0].tolist()):
        if 0 <= label < 97:
            expected[label] -= 2 * weight[row] * H[row]
    labels, H, weight, out = (x.to(DEVICE) for x in (labels, H, weight, out))
    add_class_sums(out, H, weight, Segments.of(labels, 97), -2.0, splits)
    torch.testing.assert_close(out.cpu(), expected)


def test_a_label_that_is_no_class_is_refused_or_poisons_its_row():
    case = Case(9, 12, 8, 0, "bf16x3")
    with pytest.raises(ValueError, match="0 to 11"):
        check_labels(torch.tensor([[3], [12]], device=DEVICE), 12)
    check_labels(case.labels, 12)
    for driver in (head.one_pass_value_and_grad, head.softmax_value_and_grad):
        for wrong in (10**6, 2**32 + 3, -(2**40)):
            case.labels[4] = wrong
            result, gradients = case.run(driver)
            assert result.losses.isnan().nonzero().tolist() == [[4]]
            assert gradients[0][:4].isfinite().all()
        case.labels = case.labels.int()  # which no conversion marks
        case.labels[4] = -5
        assert case.run(driver)[0].losses.isnan().nonzero().tolist() == [[4]]
        case.labels = case.labels.long()
