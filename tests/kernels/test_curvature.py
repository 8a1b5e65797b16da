"""Second derivatives and products with the logit gradient, by their drivers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, GRADIENT, MARKS, Case, error, quick, sizes

from ufm_fast.losses import Focal
from ufm_kernels import rows as rows_of
from ufm_kernels.curvature import cross_entropy_curvature, logit_gradient, softmax_hvp

pytestmark = MARKS


@pytest.mark.parametrize(
    ("mode", "gamma"), [("bf16", 0.0), ("fp16x3", 0.0), ("tf32x3", 0.0), ("tf32x3", 2.0)]
)
@given(
    **{**sizes, "rows": st.integers(1, 20), "classes": st.integers(2, 30)},
    smoothing=st.sampled_from([0.0, 0.1]),
)
@settings(quick, max_examples=2)
def test_hessian_vector_product(mode, gamma, rows, classes, dim, seed, smoothing):
    case = Case(rows, classes, dim, seed, mode)
    make = torch.Generator().manual_seed(seed)
    directions = [
        torch.randn(x.shape, generator=make).to(DEVICE, x.dtype)
        for x in (case.features, case.weight)
    ]
    directions.append(torch.randn(classes, generator=make).to(DEVICE))

    def objective(*parameters):
        return (
            case.row_weight.double() * case.losses(*parameters, smoothing=smoothing, gamma=gamma)
        ).sum()

    parameters = tuple(x.detach() for x in case.parameters())
    expected = torch.autograd.functional.hvp(
        objective, parameters, tuple(x.double() for x in directions)
    )[1]
    outs = [torch.zeros_like(x, dtype=torch.float32) for x in directions]
    softmax_hvp(
        case.features,
        case.weight,
        case.bias,
        case.labels[:, 0],
        case.row_weight,
        Focal(gamma=gamma).weight if gamma else rows_of.cross_entropy_weight,
        (lambda l, p: Focal(gamma=gamma).bend(l, p) / p) if gamma else cross_entropy_curvature,
        smoothing,
        d_features=directions[0],
        d_weight=directions[1],
        d_bias=directions[2],
        out_features=outs[0],
        out_weight=outs[1],
        out_bias=outs[2],
        chunk_rows=13,
        mode=mode,
    )
    size = sum(x.norm() ** 2 for x in expected) ** 0.5
    for found, wanted in zip(outs, expected, strict=True):
        assert (
            float((found.double() - wanted).norm() / size)
            < 10 * GRADIENT["bf16x3" if mode == "fp16x3" else mode]
        )


@pytest.mark.parametrize(("mode", "margin"), [("bf16", None), ("tf32x3", None), ("tf32x3", 30.0)])
@given(
    **{**sizes, "rows": st.integers(1, 20), "classes": st.integers(5, 30)},
    targets=st.integers(2, 4),
)
@settings(quick, max_examples=2)
def test_hessian_vector_product_of_several_targets(mode, margin, rows, classes, dim, seed, targets):
    case = Case(rows, classes, dim, seed, mode, targets=targets, margin=margin)
    make = torch.Generator().manual_seed(seed)
    directions = [
        torch.randn(x.shape, generator=make).to(DEVICE, x.dtype)
        for x in (case.features, case.weight)
    ]
    directions.append(torch.randn(classes, generator=make).to(DEVICE))
    parameters = tuple(x.detach() for x in case.parameters())
    expected = torch.autograd.functional.hvp(
        lambda *p: (case.row_weight.double() * case.losses(*p)).sum(),
        parameters,
        tuple(x.double() for x in directions),
    )[1]
    outs = [torch.zeros_like(x, dtype=torch.float32) for x in directions]
    softmax_hvp(
        case.features,
        case.weight,
        case.bias,
        case.labels,
        case.row_weight,
        d_features=directions[0],
        d_weight=directions[1],
        d_bias=directions[2],
        out_features=outs[0],
        out_weight=outs[1],
        out_bias=outs[2],
        chunk_rows=13,
        mode=mode,
    )
    size = sum(x.norm() ** 2 for x in expected) ** 0.5
    for found, wanted in zip(outs, expected, strict=True):
        assert float((found.double() - wanted).norm() / size) < 10 * GRADIENT[mode]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@given(**sizes)
@settings(quick, max_examples=2)
def test_products_with_the_logit_gradient(smoothing, rows, classes, dim, seed):
    case = Case(rows, classes, dim, seed, "tf32x3")
    features, weight, bias = (x.detach() for x in case.parameters())
    z = (features @ weight.T + bias).requires_grad_()
    losses = torch.nn.functional.cross_entropy(z, case.labels[:, 0], reduction="none")
    losses = losses + smoothing * (z.gather(1, case.labels)[:, 0] - z.mean(1))
    G = torch.autograd.grad((case.row_weight.double() * losses).sum(), z)[0]
    operator = logit_gradient(
        case.features,
        case.weight,
        case.bias,
        case.labels[:, 0],
        case.row_weight,
        smoothing=smoothing,
        mode="tf32x3",
        chunk_rows=17,
    )
    make = torch.Generator().manual_seed(seed)
    X, Y = (torch.randn(n, 3, generator=make).to(DEVICE) for n in (classes, rows))
    assert error(operator.times(X), G @ X.double()) < 1e-5
    assert error(operator.transposed_times(Y), G.T @ Y.double()) < 1e-5
