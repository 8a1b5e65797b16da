"""Rows finished from their sums; labels as the kernels read them."""

import pytest
import torch
from kernel_cases import DEVICE, MARKS

from ufm_kernels import rows as rows_of

pytestmark = MARKS


@pytest.mark.parametrize("targets", [1, 3])
def test_rows_are_finished_from_their_sums(targets):
    """Against the formulas in float64, of rows before and after they moved to their maximum, and of
    one without targets.
    """
    make = torch.Generator().manual_seed(targets)
    u = 30 * torch.randn(70, 50, generator=make, dtype=torch.float64)
    u[:3] *= 1e-3  # hardly any logits
    u[3:6, 0] += 200.0  # hostile
    z = (2 * torch.randn(70, targets, generator=make)).float()
    labels = torch.zeros(70, targets, dtype=torch.int32)
    labels[7, -1] = -1  # padding, or no target at all
    z[7, -1] = 0.0
    rows = rows_of.Rows.of(
        z.to(DEVICE), labels.to(DEVICE), torch.rand(70, generator=make).to(DEVICE)
    )

    def sweep(flag=None, into=None):
        if flag is not None and not bool(flag[0]):
            return into
        parts = u.split(20, 1)
        e = [(x - rows.offset.cpu().double()[:, None]).exp().float() for x in parts]
        statistics = torch.stack(
            [
                torch.stack([f(x) for x in xs])
                for xs, f in (
                    (e, lambda x: x.sum(1)),
                    (e, lambda x: 0.99 * x.sum(1)),
                    (parts, lambda x: x.amax(1).float()),
                )
            ]
        ).to(DEVICE)
        return statistics if into is None else into.copy_(statistics)

    rows.settle(sweep, rows_of.cross_entropy_weight)
    result = rows.result(rows_of.cross_entropy_value)
    assert bool(rows.flag[0])
    known, z = labels != -1, z.double()
    count = known.sum(1).clamp_min(1)
    known[7, -1] |= targets == 1  # no target: one of logit zero
    log_total = torch.where(known, z, float("-inf")).logsumexp(1)
    log_ratio = torch.logaddexp(u.logsumexp(1), log_total) - log_total
    loss = count * (log_ratio + log_total) - torch.where(known, z, 0.0).sum(1)
    p = torch.sigmoid(u.logsumexp(1) - log_total)
    close = {"rtol": 2e-5, "atol": 1e-35}
    torch.testing.assert_close(
        result.losses.cpu().double(), loss, rtol=2e-5, atol=2e-5 if targets > 1 else 1e-35
    )
    torch.testing.assert_close(
        result.log_ratio.cpu().double()[log_ratio > 1e-9], log_ratio[log_ratio > 1e-9], **close
    )
    torch.testing.assert_close(result.probability.cpu().double(), p, **close)
    gradient = (
        count[:, None]
        * torch.softmax(torch.cat((z.masked_fill(~known, float("-inf")), u), 1), 1)[:, :targets]
        - 1.0
    )
    expected = torch.where(labels != -1, -rows.scale.cpu()[:, None] * gradient, 0.0)
    torch.testing.assert_close(rows.own.cpu().double(), expected, rtol=2e-5, atol=3e-7)
    off = rows.scale.cpu().double() * count * p  # what the factor makes of the rounded exponentials
    torch.testing.assert_close((rows.factor * rows.kept).cpu().double(), off, **close)


def test_labels_of_any_integer_type():
    most = torch.iinfo(torch.int32).max
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        labels = torch.tensor([3, 1, 0], dtype=dtype)
        assert rows_of.as_labels(labels)[:, 0].tolist() == [3, 1, 0]
    for dtype, wide in (
        (torch.int64, 2**32 + 3),
        (torch.uint32, 2**32 - 1),
        (torch.uint64, 2**32 + 3),
        (torch.uint64, 2**64 - 1),
    ):
        assert rows_of.as_labels(torch.tensor([wide, 1], dtype=dtype))[:, 0].tolist() == [most, 1]
    assert rows_of.as_labels(torch.tensor([-1, -7]))[:, 0].tolist() == [
        -1,
        -2,
    ]  # no padding, and no class
