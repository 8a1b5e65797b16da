"""Random heads for the tests of kernels, and how near to float64 each precision comes.

Values are tested under triton's interpreter on a CPU (`conftest.py`), compiled where there is a
CUDA device.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from triton.runtime.interpreter import TensorHandle

from ufm_fast.losses import Focal
from ufm_kernels import head
from ufm_kernels import rows as rows_of
from ufm_kernels.operands import MODES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of a file of values. The interpreter truncates to bfloat16 where the device rounds; numpy remarks
#: upon its infinities.
MARKS = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
DRIVERS = [head.softmax_value_and_grad, head.one_pass_value_and_grad]

quick = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
sizes = {
    "rows": st.integers(1, 40),
    "classes": st.integers(2, 75),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 2**31 - 1),
}
GRADIENT = {
    "bf16": 2e-2,
    "fp16": 2e-3,
    "tf32": 3e-3,
    "bf16x3": 1e-4,
    "fp16x3": 3e-5,
    "tf32x3": 2e-6,
}
LOSS = {"bf16": 3e-6, "fp16": 3e-6, "tf32": 3e-3, "bf16x3": 3e-5, "fp16x3": 3e-6, "tf32x3": 3e-6}


class Case:
    """A random head with float64 copies of exactly what the mode can represent."""

    def __init__(self, rows, classes, dim, seed, mode="bf16x3", targets=1, margin=None, bias=True):
        make = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
        targets = min(targets, classes - 1)
        labels = torch.stack(
            [torch.randperm(classes, generator=make)[:targets] for _ in range(rows)]
        )
        if targets > 1:
            labels[::3, 1:] = -1
        weight, features = normal(classes, dim) / dim**0.5, normal(rows, dim) * 2
        if margin is not None:
            weight = torch.nn.functional.normalize(
                torch.eye(classes, max(dim, classes))[:, :dim] + 0.02 * weight
            )
            features = margin * weight[labels[:, 0]] + 0.01 * normal(rows, dim)
        if mode in ("bf16", "fp16"):
            weight, features = (x.to(MODES[mode].logits) for x in (weight, features))
        self.mode = mode
        self.features, self.weight = features.to(DEVICE), weight.to(DEVICE)
        self.bias = (normal(classes) * 0.1).to(DEVICE) if bias else None
        self.labels = labels.to(DEVICE)
        self.row_weight = torch.rand(rows, generator=make).to(DEVICE)

    def parameters(self):
        given_ones = [self.features, self.weight] + ([] if self.bias is None else [self.bias])
        return [x.double().requires_grad_() for x in given_ones]

    def losses(self, features, weight, bias=None, smoothing=0.0, gamma=0.0):
        """float64 losses that keep their digits near collapse and at extreme logits."""
        z = features @ weight.T + (0 if bias is None else bias)
        known = self.labels >= 0
        index = self.labels.clamp_min(0)
        own = z.gather(1, index)
        if self.labels.shape[1] > 1:
            return torch.where(known, z.logsumexp(1)[:, None] - own, 0.0).sum(1)
        off = (z - own).scatter(1, index, float("-inf")).logsumexp(1)
        loss = torch.logaddexp(torch.zeros_like(off), off)
        return torch.sigmoid(off) ** gamma * loss + smoothing * (own[:, 0] - z.mean(1))

    def reference(self, smoothing=0.0, gamma=0.0):
        parameters = self.parameters()
        losses = self.losses(*parameters, smoothing=smoothing, gamma=gamma)
        return losses.detach(), torch.autograd.grad(
            (self.row_weight.double() * losses).sum(), parameters
        )

    def run(self, driver=head.softmax_value_and_grad, smoothing=0.0, gamma=0.0, **options):
        loss = Focal(gamma=gamma) if gamma else None
        value, weight = (
            (loss.value, loss.weight)
            if loss
            else (rows_of.cross_entropy_value, rows_of.cross_entropy_weight)
        )
        buffers = {"grad_features": self.features, "grad_weight": self.weight}
        if self.bias is not None:
            buffers["grad_bias"] = self.bias
        empty = float("nan") if options.get("fresh") else 0.0
        buffers = {
            key: torch.full_like(x, empty, dtype=torch.float32) for key, x in buffers.items()
        }
        targets = self.labels if self.labels.shape[1] > 1 else self.labels[:, 0]
        result = driver(
            self.features,
            self.weight,
            self.bias,
            targets,
            self.row_weight,
            value,
            weight,
            smoothing,
            mode=self.mode,
            **buffers,
            **options,
        )
        return result, list(buffers.values())


def error(found, expected):
    """Normwise error relative to the expected, absolute where that is zero."""
    size = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (size if size > 0 else 1.0))


def agree(case, result, gradients, smoothing=0.0, gamma=0.0, scale=1.0):
    losses, expected = case.reference(smoothing, gamma)
    assert error(result.losses, losses) < scale * LOSS[case.mode]
    for found, wanted in zip(gradients, expected, strict=True):
        assert error(found, wanted) < scale * GRADIENT[case.mode]


def descriptors():
    """Tiles that load by pointer and by descriptor, the latter where the device has them."""
    by_descriptor = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    return [False, True] if by_descriptor else [False]


def truncating_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A tensor core: exact products of 16 terms at a time, added to an accumulator that is
    truncated to fp32.
    """
    left, right, total = (
        a.data.astype(np.float64),
        b.data.astype(np.float64),
        d.data.astype(np.float64),
    )
    for k in range(0, left.shape[1], 16):
        exact = total + left[:, k : k + 16] @ right[k : k + 16]
        single = exact.astype(np.float32)
        total = np.where(
            np.abs(single) > np.abs(exact), np.nextafter(single, np.float32(0)), single
        ).astype(np.float64)
    return TensorHandle(total.astype(np.float32), d.dtype.scalar)
