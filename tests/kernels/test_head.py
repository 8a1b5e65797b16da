"""The drivers of the softmax head against float64: values and gradients by both, and what they do
with their buffers.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, DRIVERS, MARKS, Case, agree, error, quick, sizes

from ufm_kernels import head
from ufm_kernels import rows as rows_of
from ufm_kernels.curvature import softmax_hvp
from ufm_kernels.library import tensor_float32
from ufm_kernels.operands import MODES

pytestmark = MARKS


@pytest.mark.parametrize("mode", list(MODES))
@given(**sizes, chunk=st.integers(7, 50), bias=st.booleans())
@quick
def test_chunked_gradients(mode, rows, classes, dim, seed, chunk, bias):
    case = Case(rows, classes, dim, seed, mode, bias=bias)
    agree(case, *case.run(chunk_rows=chunk))


@given(**sizes, smoothing=st.floats(0.01, 0.3), gamma=st.sampled_from([0.0, 0.5, 2.0]))
@quick
def test_smoothing_and_focal(rows, classes, dim, seed, smoothing, gamma):
    case = Case(rows, classes, dim, seed, "tf32x3")
    agree(case, *case.run(smoothing=smoothing, gamma=gamma), smoothing, gamma, scale=10)


@pytest.mark.parametrize("driver", DRIVERS)
@given(**sizes, targets=st.integers(2, 4))
@quick
def test_several_targets(driver, rows, classes, dim, seed, targets):
    case = Case(rows, max(classes, 3), dim, seed, "tf32x3", targets=targets)
    agree(case, *case.run(driver), scale=5)


@given(**sizes)
@quick
def test_margin_and_mass(rows, classes, dim, seed):
    case = Case(rows, classes, dim, seed, "tf32x3")
    features, weight, bias = case.parameters()
    z = (features @ weight.T + bias).detach()
    own = z.gather(1, case.labels)
    rival = z.scatter(1, case.labels, float("-inf"))
    result, _ = case.run()
    torch.testing.assert_close(
        result.margin.double(), own[:, 0] - rival.amax(1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        result.off_target_mass.double(), (rival - own).exp().sum(1), rtol=1e-5, atol=1e-30
    )


def test_adds_to_buffers_skips_frozen_and_repeats_bit_for_bit():
    case = Case(37, 71, 24, 1, "bf16")
    _, first = case.run(chunk_rows=20)
    _, again = case.run(chunk_rows=20)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    filled = torch.full_like(first[0], 3.0)
    head.softmax_value_and_grad(
        case.features,
        case.weight,
        case.bias,
        case.labels[:, 0],
        case.row_weight,
        grad_features=filled,
        need_weight=False,
        chunk_rows=20,
    )
    torch.testing.assert_close(filled - 3.0, first[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("products", [None, "triton", "library"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@given(**sizes, chunk=st.integers(7, 50), bias=st.booleans())
@quick
def test_fresh_buffers_are_written(products, smoothing, rows, classes, dim, seed, chunk, bias):
    """Memory that nobody has cleared may hold anything."""
    case = Case(rows, classes, dim, seed, "bf16", bias=bias)
    found = case.run(chunk_rows=chunk, products=products, smoothing=smoothing, fresh=True)
    agree(case, *found, smoothing)
    added = case.run(chunk_rows=chunk, products=products, smoothing=smoothing)
    for written, wanted in zip(found[1], added[1], strict=True):
        torch.testing.assert_close(written, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_buffer_that_is_not_needed_is_not_touched(driver):
    case = Case(9, 12, 8, 0, "bf16", bias=False)
    keep = torch.full_like(case.features, 7.0, dtype=torch.float32)
    driver(
        case.features,
        case.weight,
        None,
        case.labels[:, 0],
        case.row_weight,
        grad_features=keep,
        grad_weight=torch.empty_like(case.weight, dtype=torch.float32),
        need_features=False,
        mode="bf16",
        fresh=True,
    )
    assert bool((keep == 7.0).all())


def test_library_products_leave_the_precision_of_matmuls_as_it_was():
    """A setting that is inherited goes on being inherited."""
    backends = torch.backends
    generic, own = backends.fp32_precision, backends.cuda.matmul.fp32_precision
    try:
        backends.fp32_precision = "tf32"
        with tensor_float32():
            assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == "ieee"
        with tensor_float32():
            assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "tf32"
        assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = "none", "ieee"
        with tensor_float32():
            pass
        assert backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = (
            generic,
            "none" if own == generic else own,
        )


def test_library_products_agree():
    case = Case(37, 71, 24, 2, "bf16")
    agree(case, *case.run(products="library", chunk_rows=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fp8"}, "fp8"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"products": "library", "mode": "bf16x3"}, "library"),
        ({"targets": torch.zeros(5)}, "targets"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, "one entry"),
        ({"targets": torch.zeros(5, 2, dtype=torch.long), "smoothing": 0.1}, "several targets"),
        ({"weight": torch.zeros(1, 3)}, "1 classes"),
        ({"weight": torch.zeros(4, 2)}, "must be"),
        ({"grad_weight": torch.zeros(3, 3)}, "grad_weight"),
        ({"grad_features": torch.zeros(5, 3, dtype=torch.float64)}, "grad_features"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"bias": torch.zeros(8)[::2]}, "bias: is strided"),
        ({"smoothing": 2.0}, "smoothing=2.0"),
    ],
)
def test_bad_input_is_refused_in_words(change, message):
    arguments = {
        "features": torch.zeros(5, 3),
        "weight": torch.zeros(4, 3),
        "bias": None,
        "targets": torch.zeros(5, dtype=torch.long),
        "row_weight": torch.ones(5),
        "grad_features": torch.zeros(5, 3),
        "grad_weight": torch.zeros(4, 3),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        head.softmax_value_and_grad(**arguments)


@pytest.mark.parametrize("products", ["triton", "library"])
def test_parameters_that_want_gradients_leave_the_buffers_alone(products):
    case = Case(20, 30, 8, 0, "bf16")
    features, weight = case.features.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = [torch.zeros(x.shape, device=DEVICE) for x in (features, weight)]
    result = head.softmax_value_and_grad(
        features,
        weight,
        None,
        case.labels[:, 0],
        case.row_weight,
        smoothing=0.1,
        grad_features=out[0],
        grad_weight=out[1],
        mode="bf16",
        products=products,
    )
    assert not any(x.requires_grad for x in (*out, result.losses))


def test_rows_without_targets_count_as_one_of_logit_zero_everywhere():
    """Value, gradient by both drivers with smoothing, and the Hessian as the gradient's change."""
    case = Case(6, 9, 5, 3, "tf32x3", targets=2)
    case.labels[2] = -1
    rest = {"weight_fn": rows_of.cross_entropy_weight, "mode": "tf32x3"}
    single = torch.where(torch.arange(6, device=DEVICE) == 2, -1, case.labels[:, 0].clamp_min(0))
    made = []
    for driver in (head.softmax_value_and_grad, head.one_pass_value_and_grad):
        outs = [torch.zeros_like(x) for x in (case.features, case.weight, case.bias)]
        buffers = dict(zip(("grad_features", "grad_weight", "grad_bias"), outs, strict=True))
        driver(
            case.features,
            case.weight,
            case.bias,
            single,
            case.row_weight,
            smoothing=0.1,
            **buffers,
            **rest,
        )
        made.append(outs)
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    moves = [torch.randn_like(x) for x in (case.features, case.weight, case.bias)]
    outs = [torch.zeros_like(x) for x in moves]
    softmax_hvp(
        case.features,
        case.weight,
        case.bias,
        case.labels,
        case.row_weight,
        mode="tf32x3",
        **dict(zip(("d_features", "d_weight", "d_bias"), moves, strict=True)),
        **dict(zip(("out_features", "out_weight", "out_bias"), outs, strict=True)),
    )
    parameters = [x.double().requires_grad_() for x in (case.features, case.weight, case.bias)]
    z = parameters[0] @ parameters[1].T + parameters[2]
    z = torch.cat((z, torch.zeros_like(z[:, :1])), 1)
    z = torch.where(
        (torch.arange(10, device=DEVICE) < 9) | (torch.arange(6, device=DEVICE) == 2)[:, None],
        z,
        float("-inf"),
    )
    index = torch.where(case.labels < 0, torch.tensor([9, -1], device=DEVICE), case.labels)
    own = torch.where(index >= 0, z.gather(1, index.clamp_min(0)), 0.0)
    losses = torch.where(index >= 0, z.logsumexp(1)[:, None] - own, 0.0).sum(1)
    first = torch.autograd.grad(
        (case.row_weight.double() * losses).sum(), parameters, create_graph=True
    )
    expected = torch.autograd.grad(
        sum((a * b.double()).sum() for a, b in zip(first, moves, strict=True)), parameters
    )
    for found, wanted in zip(outs, expected, strict=True):
        assert error(found, wanted) < 1e-4
