"""torch's default device and dtype are the caller's: problems, solves and modules make their
tensors where they say.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ufm_fast import Problem, solve
from ufm_fast.nn import UFM
from ufm_fast.targets import TargetSets

PROBLEMS = {
    "balanced": {"classes": 5, "dim": 6},
    "counts, free bias": {"counts": [5, 3, 1], "dim": 4, "bias": "free"},
    "labels, mse": {
        "labels": [0, 1, 1, 2],
        "dim": 5,
        "loss": "mse",
        "bias": "penalised",
        "lambda_b": 0.1,
    },
    "float32": {"classes": 4, "dim": 6, "dtype": "float32", "loss": "focal"},
    "sets": {"classes": 4, "dim": 4, "loss": "pick-all"},
}


def _values(name: str) -> tuple[float, float]:
    problem = dict(PROBLEMS[name])
    if name == "sets":
        problem["target_sets"] = TargetSets.create([0, 2, 3, 4, 6], [0, 1, 2, 3, 1, 0], 4)
    found = Problem(**problem, lambda_w=1e-3, lambda_h=1e-3)
    value = UFM(found)()
    torch.autograd.backward(value)
    return solve(found, start="normal").value, float(value.detach())


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("name", PROBLEMS)
def test_defaults_of_torch_change_nothing(name):
    expected = _values(name)
    torch.set_default_device("meta")
    assert _values(name) == expected
    torch.set_default_device(None)
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        assert _values(name) == expected
