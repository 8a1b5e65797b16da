"""Bad input to the metrics: a message that names the argument, before any number is formed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.metrics import METRICS, ClassStatistics, balancedness, collect


@pytest.fixture
def good():
    generator = torch.Generator().manual_seed(0)
    return {
        "features": torch.randn(6, 3, generator=generator),
        "weight": torch.randn(4, 3, generator=generator),
        "labels": torch.tensor([0, 1, 2, 3, 0, 1]),
    }


def with_nan(*shape):
    values = torch.ones(shape)
    values.view(-1)[-1] = torch.nan
    return values


BAD = [
    ({"features": torch.ones(6, 2)}, "weight and features"),
    ({"features": torch.ones(6)}, "features"),
    ({"features": torch.ones(6, 0)}, "features"),
    ({"features": torch.ones(0, 3), "labels": torch.ones(0, dtype=torch.int64)}, "features"),
    ({"features": with_nan(6, 3)}, "features must be finite"),
    ({"features": None}, "features and labels"),
    ({"weight": with_nan(4, 3)}, "weight must be finite"),
    ({"weight": torch.full((4, 3), torch.inf)}, "weight must be finite"),
    (
        {"weight": torch.ones(1, 3), "labels": torch.zeros(6, dtype=torch.int64)},
        "weight must have at least 2",
    ),
    ({"labels": torch.tensor([0, 1, 2, 4, 0, 1])}, "labels"),
    ({"labels": torch.tensor([0, 1, 2, -1, 0, 1])}, "labels"),
    ({"labels": torch.zeros(6, dtype=torch.int64)}, "labels must name at least 2"),
    ({"labels": torch.arange(3)}, "labels"),
    ({"labels": None}, "features and labels"),
    (
        {"features": torch.full((6, 3), 1e80, dtype=torch.float64)},
        "features has entries beyond 1e+70",
    ),
    ({"bias": torch.ones(3)}, "bias"),
    ({"bias": with_nan(4)}, "bias must be finite"),
    ({"counts": torch.ones(5)}, "counts"),
    ({"counts": -torch.ones(6)}, "counts"),
    ({"counts": torch.zeros(6)}, "counts"),
    ({"counts": with_nan(6)}, "counts must be finite"),
    ({"classes": 5}, "classes"),
    ({"lambda_w": 1.0}, "lambda_w and lambda_h"),
    ({"lambda_w": 0.0, "lambda_h": 1.0}, "lambda_w"),
    ({"lambda_w": 1.0, "lambda_h": -1.0}, "lambda_h"),
    ({"pairwise": "all"}, "pairwise must be one of"),
    ({"pairs": 1}, "pairs"),
    ({"rows": 0}, "rows"),
    ({"tile": 0}, "tile"),
    ({"seed": -1}, "seed"),
    ({"weight": None, "bias": torch.ones(4)}, "bias belongs to weight"),
    ({"weight": None, "features": None, "labels": None}, "features and weight are both None"),
    ({"features": None, "labels": None, "counts": torch.ones(6)}, "counts belong"),
]
WRONG_TYPE = [
    ({"labels": torch.zeros(6)}, "labels"),
    ({"labels": torch.full((6,), torch.nan)}, "labels"),
    ({"labels": [0, 1, 2, 3, 0, 1]}, "labels"),
    ({"features": torch.ones(6, 3, dtype=torch.int64)}, "features"),
    ({"weight": torch.ones(4, 3, dtype=torch.complex64)}, "weight"),
    ({"weight": "head.npz"}, "weight"),
    ({"weight": np.ones((4, 3), dtype=object)}, "weight must hold numbers"),
    ({"weight": np.full((4, 3), "a")}, "weight must hold numbers"),
    ({"features": np.ones((6, 3), dtype=np.longdouble)}, "features must hold numbers"),
    ({"features": torch.ones(6, 3).to_sparse()}, "features must be a dense tensor"),
    ({"features": torch.ones(6, 3, device="meta")}, "features must be a dense tensor"),
    (
        {"features": torch.ones(6, 3).to(torch.float8_e4m3fn)},
        "features must have a real floating dtype",
    ),
    ({"counts": torch.ones(6, dtype=torch.bool)}, "counts"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_values(good, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        collect(**{**good, **change})


@pytest.mark.parametrize(("change", "message"), WRONG_TYPE)
def test_wrong_types(good, change, message):
    with pytest.raises(InputTypeError, match=message):
        collect(**{**good, **change})


def test_statistics_alone_check_their_labels(good):
    for labels in (torch.zeros(6), torch.full((6,), torch.nan)):
        with pytest.raises(InputTypeError, match="labels"):
            ClassStatistics(good["features"], labels)
    with pytest.raises(InputError, match="labels"):
        ClassStatistics(good["features"], good["labels"] - 1)
    with pytest.raises(InputError, match="classes"):
        ClassStatistics(good["features"], good["labels"], classes=1)


def test_balancedness_checks_its_own_arguments(good):
    with pytest.raises(InputError, match="lambda_w"):
        balancedness(good["weight"], good["features"], 0.0, 1.0)
    with pytest.raises(InputError, match="columns"):
        balancedness(good["weight"], good["features"][:, :2], 1.0, 1.0)


def test_numpy_and_parameters_are_accepted(good):
    plain = collect(**good)
    arrays = {name: value.numpy() for name, value in good.items()}
    arrays["features"].flags.writeable = False
    assert collect(**arrays) == plain
    assert collect(**{**good, "weight": torch.nn.Parameter(good["weight"])}) == plain


def test_arrays_may_be_turned(good):
    turned = {"features": good["features"].numpy()[::-1], "labels": good["labels"].numpy()[::-1]}
    assert collect(**{**good, **turned}) == pytest.approx(collect(**good), rel=1e-12)


def test_inputs_are_left_as_they_were(good):
    before = {name: value.clone() for name, value in good.items()}
    double = {**good, "features": good["features"].double(), "weight": good["weight"].double()}
    kept = {name: value.clone() for name, value in double.items()}
    for pairwise in ("exact", "sampled"):
        collect(**double, pairwise=pairwise, pairs=3, rows=2, lambda_w=1.0, lambda_h=1.0)
    collect(double["features"][:4], double["weight"], torch.arange(4))
    assert all(torch.equal(double[name], kept[name]) for name in kept)
    assert all(torch.equal(good[name], before[name]) for name in good)


def test_every_row_of_the_table_is_described():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert metric.cost in ("linear", "pairwise")
        assert all((metric.description, metric.formula, metric.source))
        assert metric.needs <= {"features", "weight", "penalties"}


def test_no_array_of_classes_by_classes_nor_samples_by_classes():
    """Beyond the tile, nothing allocated grows with K^2 or N K: the largest tensor made is
    watched.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    rng = np.random.default_rng(0)
    labels = torch.from_numpy(np.repeat(np.arange(1500), 2))
    features, weight = (torch.from_numpy(rng.standard_normal((rows, 4))) for rows in (3000, 1500))
    with Largest() as watch:
        collect(features, weight, labels, tile=64)
    assert watch.numel <= 4 * 3000
