"""Statistics of batches are those of all features at once, whatever the batches, near collapse
too.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm_fast.errors import InputError
from ufm_fast.metrics import ClassStatistics, StreamingStatistics, nc1_pinv, nc1_quotient, nc1_trace

CLASSES, DIM = 5, 4


def _features(seed: int, spread: float, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = 1 + torch.randn(CLASSES + 1, DIM, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(labels), DIM, dtype=torch.float64, generator=generator)
    return (means[labels] + spread * noise).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1.0, 1e-3, 1e-6]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    sort=st.booleans(),  # then most classes are absent from most batches
)
def test_any_batches_give_the_statistics_of_the_whole(seed, spread, sizes, dtype, sort):
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.cat(
        [
            torch.arange(CLASSES).repeat(2),
            torch.randint(CLASSES, (sum(sizes),), generator=generator),
        ]
    )
    labels = (
        labels.sort().values if sort else labels[torch.randperm(len(labels), generator=generator)]
    )
    features = _features(seed, spread, labels, dtype)
    whole, sums = ClassStatistics(features, labels, CLASSES + 1), StreamingStatistics(CLASSES + 1)
    for x, y in zip(features.split([10, *sizes]), labels.split([10, *sizes]), strict=True):
        sums.update(x, y)
    found = sums.result()
    assert torch.equal(found.present, whole.present)
    assert torch.equal(found.class_counts, whole.class_counts)
    for name in ("variances", "class_means", "sample_centre"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-10, atol=0)
    for measure in (nc1_pinv, nc1_trace, nc1_quotient):
        assert measure(found) == pytest.approx(measure(whole), rel=1e-10)
    scale = whole.within.abs().max()
    torch.testing.assert_close(found.within / scale, whole.within / scale, rtol=0, atol=1e-10)
    scale = whole.between().abs().max()
    torch.testing.assert_close(found.between() / scale, whole.between() / scale, rtol=0, atol=1e-10)


def test_what_does_not_fit_is_refused_and_not_counted():
    sums = StreamingStatistics(3)
    x = torch.randn(4, 2, dtype=torch.float64)
    with pytest.raises(InputError, match="at least 2 classes"):
        sums.result()
    sums.update(x, torch.tensor([0, 1, 1, 2]))
    before = sums.result().within
    for features, labels, message in (
        (x, torch.zeros(3, dtype=torch.int64), r"shape \(4,\)"),
        (torch.full_like(x, float("nan")), torch.zeros(4, dtype=torch.int64), "finite"),
        (x, torch.full((4,), 3), "labels"),
        (x[:, :1], torch.zeros(4, dtype=torch.int64), "2 columns"),
    ):
        with pytest.raises(InputError, match=message):
            sums.update(features, labels)
    assert torch.equal(sums.result().within, before)
