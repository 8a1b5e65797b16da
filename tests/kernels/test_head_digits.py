"""The drivers of the softmax head where digits are at stake: margins, hostile and impossible
logits, sums that cancel.
"""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DRIVERS, MARKS, Case, agree, error

from ufm_kernels import head
from ufm_kernels.curvature import softmax_hvp

pytestmark = MARKS


@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
@pytest.mark.parametrize("mode", ["bf16", "tf32x3"])
def test_collapsed_margins_keep_their_digits(margin, mode):
    """At 50 nats the loss is 1e-21: any loss made of lse - z_y is exactly zero there in fp32, or
    noise.
    """
    case = Case(33, 40, 40, 5, mode, margin=margin, bias=False)
    losses, _ = case.reference()
    assert losses.max() < 1e-6
    assert losses.min() > 0
    agree(case, *case.run(), scale=20 if mode == "tf32x3" else 2)
    agree(case, *case.run(head.one_pass_value_and_grad), scale=20 if mode == "tf32x3" else 2)
    focal = Case(33, 40, 40, 5, mode, margin=20.0, bias=False)
    agree(focal, *focal.run(gamma=0.5), gamma=0.5, scale=20 if mode == "tf32x3" else 2)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("margin", "bound"), [(20.0, 1e-5), (50.0, 1e-5), (80.0, 2e-5)])
@pytest.mark.parametrize("dim", [24, 40])
def test_three_passes_in_half_precision_hold_single_precision(driver, margin, bound, dim):
    """Pairs of float16 for the logits; at 80 nats the low half of E, in bfloat16, is below its
    smallest normal number.
    """
    case = Case(33, 40, dim, 5, "fp16x3", margin=margin, bias=False)
    result, gradients = case.run(driver)
    losses, expected = case.reference()
    for found, wanted in zip((result.losses, *gradients), (losses, *expected), strict=True):
        assert error(found, wanted) < bound


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("mode", ["bf16", "fp16x3", "tf32x3"])
def test_hostile_logits(driver, targets, mode):
    """Wrong classes that lead by hundreds of nats go through the row maximum; the other rows are
    untouched.
    """
    case = Case(21, 50, 20, 3, mode, targets=targets)
    case.features[3] *= 300
    case.features[11] *= -300
    result, gradients = case.run(driver)
    losses, _ = case.reference()
    assert losses.max() > 200
    agree(case, result, gradients, scale=5)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_an_impossible_target_is_an_infinite_loss(driver, targets, scale):
    """The target's bias is -inf: its row is infinite, pulls as far as it can, and the others are as
    they were.
    """
    case = Case(6, 9, 5, 2, "tf32x3", targets=targets)
    case.features *= scale  # moderate rows, and rows that move to their maximum
    impossible = int(case.labels[0, 0])
    other = (case.labels != impossible).all(1)
    before = case.run(driver)[0].losses
    case.bias[impossible] = float("-inf")
    result, gradients = case.run(driver)
    assert result.losses.isposinf().tolist() == (~other).tolist()
    assert (result.losses[other] <= before[other] * (1 + 1e-4)).all()
    for found in gradients:
        assert found.isfinite().all()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("base", [-30.0, -40.0, -100.0, -110.0, -200.0])
@pytest.mark.parametrize("targets", [[0], [0, 1]])
def test_an_impossible_target_pulls_as_far_as_it_can_whatever_the_others(driver, base, targets):
    """All possible classes lie far below the offset that stands for -inf."""
    case = Case(1, 4, 3, 0, "tf32x3", targets=len(targets))
    case.labels = torch.tensor([targets], device=DEVICE)
    case.features.zero_()
    case.bias = torch.tensor([float("-inf"), base, base - 1, base - 1], device=DEVICE)
    case.row_weight = torch.ones(1, device=DEVICE)
    result, gradients = case.run(driver)
    p = torch.softmax(case.bias.double(), 0) * len(targets)
    p[targets] -= 1
    assert float(result.losses) == float("inf")
    torch.testing.assert_close(gradients[2].double(), p, rtol=1e-5, atol=1e-6)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("scale", [1e4, 1e9, 3e15, 1e30])
def test_rows_move_to_their_maximum_itself(driver, scale):
    """Not to the offset plus what lies between, which at 1e9 misses it by dozens of nats."""
    case = Case(5, 9, 4, 1, "tf32x3", bias=False)
    case.features *= scale
    result, gradients = case.run(driver)
    torch.testing.assert_close(result.losses.double(), case.reference()[0], rtol=1e-5, atol=1e-30)
    for found, expected in zip(gradients, case.reference()[1], strict=True):
        assert error(found, expected) < 1e-4


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
def test_smoothing_leaves_the_bias_its_digits(driver, margin):
    """Its part of the gradient is zero where classes are balanced, and what is left is of the order
    of exp(-margin).
    """
    case = Case(10, 10, 16, 0, "tf32x3")
    W = (torch.eye(10, 16) - torch.eye(16)[:10].mean(0)) * margin**0.5
    case.features, case.weight, case.labels = (
        W.to(DEVICE),
        W.to(DEVICE),
        torch.arange(10, device=DEVICE)[:, None],
    )
    case.row_weight = torch.ones(10, device=DEVICE)
    plain, smooth = (case.run(driver, smoothing=eps)[1][2] for eps in (0.0, 0.1))
    assert torch.equal(plain, smooth)
    _, expected = case.reference()
    assert (
        error(plain, expected[2]) < 5e-5
    )  # sums of numbers that cancel, each good to the logits rounding


@pytest.mark.parametrize("driver", DRIVERS)
def test_column_sums_over_rows_run_in_float64(driver):
    """Two weights that cancel, far apart, leave the others their digits, as a million equal terms
    would.
    """
    case = Case(192, 3, 16, 5, "tf32x3")
    case.features, case.labels = (
        case.features[:1].expand(192, -1).contiguous(),
        case.labels[:1].expand(192, -1).contiguous(),
    )
    case.row_weight = torch.zeros(192, device=DEVICE)
    case.row_weight[0], case.row_weight[64:128], case.row_weight[128] = 1e9, 0.1, -1e9
    options = {"chunk_rows": 64} if driver is head.softmax_value_and_grad else {}
    assert (
        error(case.run(driver, smoothing=0.1, **options)[1][2], case.reference(smoothing=0.1)[1][2])
        < 1e-5
    )
    buffers = [torch.zeros_like(x) for x in (case.features, case.weight, case.bias)]
    direction = [torch.ones_like(x) for x in buffers]
    moves = {
        f"d_{name}": x for name, x in zip(("features", "weight", "bias"), direction, strict=True)
    }
    into = {
        f"out_{name}": x for name, x in zip(("features", "weight", "bias"), buffers, strict=True)
    }
    labels = case.labels[:, 0]
    softmax_hvp(
        case.features,
        case.weight,
        case.bias,
        labels,
        case.row_weight,
        chunk_rows=64,
        mode="tf32x3",
        **moves,
        **into,
    )
    one = case.parameters()
    one[0] = case.features[:1].double().requires_grad_()
    z = torch.nn.functional.cross_entropy(one[0] @ one[1].T + one[2], labels[:1])
    gradient = torch.autograd.grad(z, one, create_graph=True)
    (expected,) = torch.autograd.grad(sum(g.sum() for g in gradient), one[2:])
    assert error(buffers[2], 6.4 * expected) < 1e-4


@pytest.mark.parametrize(
    ("mode", "value"),
    [("bf16", 1e4), ("bf16", -(2.0**24)), ("tf32", 1e10), ("tf32x3", 1e4), ("tf32x3", 1e30)],
)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_common_offset_of_the_logits_cancels(driver, mode, value):
    """Tiles add in another order than the target logits do; equal ones stay equal, with smoothing
    and several targets too.
    """
    make = torch.Generator().manual_seed(3)
    case = Case(9, 5, 24, 0, mode)
    value = float(torch.tensor(value, dtype=torch.bfloat16))
    row = value * torch.rand(24, generator=make).to(case.weight)
    case.weight, case.bias = row.expand(5, -1).contiguous(), torch.full_like(case.bias, value)
    case.features = torch.rand(9, 24, generator=make).to(case.features)
    for smoothing in (0.0, 0.1):
        result, gradients = case.run(driver, smoothing=smoothing)
        torch.testing.assert_close(
            result.losses, torch.full_like(result.losses, np.log(5)), rtol=1e-5, atol=1e-6
        )
        assert result.margin.tolist() == [0.0] * 9
        expected = torch.zeros(5, dtype=torch.float64, device=DEVICE)
        expected.index_add_(0, case.labels[:, 0], -case.row_weight.double())
        expected = (1 - smoothing) * (expected + case.row_weight.double().sum() / 5)
        assert error(gradients[2], expected) < 1e-2 if mode == "bf16" else 1e-5
    case.labels = torch.tensor([[0, 3]] * 9, device=DEVICE)
    result, _ = case.run(driver)
    torch.testing.assert_close(
        result.losses, torch.full_like(result.losses, 2 * np.log(5)), rtol=1e-5, atol=1e-6
    )
