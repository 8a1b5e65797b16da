"""The kernel that makes E and its row sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    GRADIENT,
    MARKS,
    Case,
    descriptors,
    error,
    quick,
    sizes,
    truncating_dot,
)
from triton.runtime.interpreter import InterpreterBuilder

from ufm_kernels.launch import Launch
from ufm_kernels.off_target import off_target
from ufm_kernels.operands import MODES, chunk_bytes, empty_chunk, logit_operands, operand
from ufm_kernels.products import add_product
from ufm_kernels.segments import Segments, add_class_sums, target_logits
from ufm_kernels.tiles import Tile

pytestmark = MARKS


def strided(x):
    """The same numbers with gaps between them."""
    wide = x.new_full((*x.shape, 2), float("nan") if x.is_floating_point() else 2**30)
    wide[..., 0] = x
    return wide[..., 0]


@pytest.mark.parametrize("tma", descriptors())
@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp16x3", "tf32x3"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@given(**sizes, targets=st.integers(1, 3))
@settings(quick, max_examples=2)
def test_off_target_kernel(mode, tma, parts, rows, classes, dim, seed, targets):
    case = Case(rows, max(classes, 4), dim, seed, mode, targets=targets)
    chosen, classes = MODES[mode], case.weight.shape[0]
    H, W = logit_operands(case.features, case.weight, chosen)
    labels = case.labels.int().contiguous()
    z = case.features.double() @ case.weight.double().T + case.bias.double()
    offset = z.gather(1, case.labels[:, :1])[:, 0].float()
    E = empty_chunk(rows, classes, chosen, z.device)
    assert E.numel() * E.element_size() == chunk_bytes(rows, classes, mode)
    launch = Launch(Tile(32, 64, 32, tma=tma, flatten=parts > 1, split=parts), resident=3)
    sums = off_target(
        H, W, case.bias, offset, labels, E, passes=chosen.passes, classes=classes, launch=launch
    )
    u = z - offset.double()[:, None]
    spare = torch.cat((u, torch.zeros_like(u[:, :1])), 1)  # padding -1 points at the extra column
    spare.scatter_(1, torch.where(case.labels < 0, classes, case.labels), float("-inf"))
    u = spare[:, :classes]
    width = E.shape[1] // chosen.halves
    stored = E[:, :classes].double() + (
        E[:, width : width + classes].double() if chosen.passes == 3 else 0
    )
    assert (
        error(stored, u.exp()) < 2 * GRADIENT[mode]
    )  # relative, it is the absolute error of a logit
    assert error(sums[0].sum(0), u.exp().sum(1)) < 1e-5
    assert error(sums[1].sum(0), stored.sum(1)) < 1e-5
    torch.testing.assert_close(
        sums[2].amax(0).double(), u.amax(1) + offset.double(), rtol=1e-5, atol=1e-5
    )
    assert not E[:, classes:width].any()
    before = E.clone(), sums.clone()
    flag = torch.zeros((), dtype=torch.int32, device=z.device)
    options = {"passes": chosen.passes, "classes": classes, "launch": launch}
    assert off_target(H, W, None, offset * 0, labels, E, flag=flag, into=sums, **options) is sums
    assert torch.equal(E, before[0])
    assert torch.equal(sums, before[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="the device has tensor cores of its own")
@pytest.mark.parametrize("mode", ["fp16x3", "tf32x3"])
def test_logits_of_pairs_outlive_truncating_tensor_cores(monkeypatch, mode):
    make, chosen, depth = torch.Generator().manual_seed(0), MODES[mode], 4096
    H, W = (
        torch.rand(20, depth, generator=make) / depth**0.5,
        torch.rand(50, depth, generator=make) / depth**0.5 * 80,
    )
    z = H.double() @ W.double().T
    labels = torch.full((20, 1), -1, dtype=torch.int32)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating_dot)
    E = empty_chunk(20, 50, chosen, H.device)
    offset = z[:, 0].float()
    sums = off_target(*logit_operands(H, W, chosen), None, offset, labels, E, passes=3, classes=50)
    peak = sums[2].amax(0).double()
    assert (
        float((peak - z.amax(1)).abs().max()) < 2e-5
    )  # 1e-6 of the logits; sums on the tensor cores leave 6e-4


def test_strided_operands_are_laid_out():
    """Each kernel alone, on tensors that do not lie row by row."""
    case = Case(9, 12, 16, 0, "tf32x3", targets=2)
    labels, weights = case.labels.int(), torch.rand(9, 2, device=DEVICE)
    given = (case.features, case.weight, case.bias, labels)
    wanted = target_logits(*(x.contiguous() for x in given))
    assert torch.equal(target_logits(*map(strided, given)), wanted)
    segments = Segments.of(labels.contiguous(), 12)
    sums = torch.zeros(2, 12, 16, device=DEVICE)
    add_class_sums(sums[0], case.features, weights, segments)
    add_class_sums(sums[1], strided(case.features), strided(weights), segments)
    assert torch.equal(sums[0], sums[1])
    H, W = (operand(x, torch.float32, 3) for x in (case.features, case.weight))
    E = [empty_chunk(9, 12, MODES["tf32x3"], H.device) for _ in range(2)]
    offset = wanted[:, 0].contiguous()
    off_target(H, W, case.bias, offset, labels.contiguous(), E[0], passes=3, classes=12)
    off_target(*map(strided, (H, W, case.bias, offset, labels)), E[1], passes=3, classes=12)
    assert torch.equal(E[0], E[1])
    for call in (
        lambda: add_class_sums(strided(sums[0]), case.features, weights, segments),
        lambda: off_target(H, W, case.bias, offset, labels, strided(E[0]), passes=3, classes=12),
        lambda: add_product(strided(sums[0]), E[0], H, passes=3, depth=9, transposed=True),
    ):
        with pytest.raises(ValueError, match="must be contiguous"):
            call()
