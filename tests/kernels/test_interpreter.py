"""Values of every kernel against float64: under triton's interpreter on a CPU, compiled where there is a CUDA device."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ufm_fast.losses import Focal
from ufm_kernels import head, one_pass
from ufm_kernels import rows as rows_of
from ufm_kernels.curvature import cross_entropy_curvature, logit_gradient, softmax_hvp
from ufm_kernels.hvp import move_exponentials
from ufm_kernels.launch import Launch
from ufm_kernels.off_target import off_target
from ufm_kernels.operands import MODES, chunk_bytes, empty_chunk, logit_operands, operand, operand_bytes, product_operand
from ufm_kernels.products import add_product, add_weighted_sums
from ufm_kernels.segments import Segments, add_class_sums, check_labels, target_logits
from ufm_kernels.squared_error import gram, library_gram
from ufm_kernels.squared_head import squared_error_value_and_grad
from ufm_kernels.tiles import TILES, Tile, architecture_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bfloat16 where the device rounds, and meets infinities that numpy remarks upon.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

quick = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
sizes = {
    "rows": st.integers(1, 40),
    "classes": st.integers(2, 75),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 2**31 - 1),
}
GRADIENT = {"bf16": 2e-2, "fp16": 2e-3, "tf32": 3e-3, "bf16x3": 1e-4, "fp16x3": 3e-5, "tf32x3": 2e-6}
LOSS = {"bf16": 3e-6, "fp16": 3e-6, "tf32": 3e-3, "bf16x3": 3e-5, "fp16x3": 3e-6, "tf32x3": 3e-6}


class Case:
    """A random head with float64 copies of exactly what the mode can represent."""

    def __init__(self, rows, classes, dim, seed, mode="bf16x3", targets=1, margin=None, bias=True):
        make = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
        targets = min(targets, classes - 1)
        labels = torch.stack([torch.randperm(classes, generator=make)[:targets] for _ in range(rows)])
        if targets > 1:
            labels[::3, 1:] = -1
        weight, features = normal(classes, dim) / dim**0.5, normal(rows, dim) * 2
        if margin is not None:
            weight = torch.nn.functional.normalize(torch.eye(classes, max(dim, classes))[:, :dim] + 0.02 * weight)
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
        return losses.detach(), torch.autograd.grad((self.row_weight.double() * losses).sum(), parameters)

    def run(self, driver=head.softmax_value_and_grad, smoothing=0.0, gamma=0.0, **options):
        loss = Focal(gamma=gamma) if gamma else None
        value, weight = (loss.value, loss.weight) if loss else (rows_of.cross_entropy_value, rows_of.cross_entropy_weight)
        buffers = {"grad_features": self.features, "grad_weight": self.weight}
        if self.bias is not None:
            buffers["grad_bias"] = self.bias
        empty = float("nan") if options.get("fresh") else 0.0
        buffers = {key: torch.full_like(x, empty, dtype=torch.float32) for key, x in buffers.items()}
        targets = self.labels if self.labels.shape[1] > 1 else self.labels[:, 0]
        result = driver(
            self.features, self.weight, self.bias, targets, self.row_weight, value, weight, smoothing,
            mode=self.mode, **buffers, **options,
        )  # fmt: skip
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


@pytest.mark.parametrize("mode", list(MODES))
@given(**sizes, chunk=st.integers(7, 50), bias=st.booleans())
@quick
def test_chunked_gradients(mode, rows, classes, dim, seed, chunk, bias):
    case = Case(rows, classes, dim, seed, mode, bias=bias)
    agree(case, *case.run(chunk_rows=chunk))


@pytest.mark.parametrize("mode", ["bf16", "tf32", "bf16x3", "fp16x3"])
@given(**sizes)
@quick
def test_one_pass_gradients(mode, rows, classes, dim, seed):
    case = Case(rows, classes, dim, seed, mode)
    agree(case, *case.run(head.one_pass_value_and_grad))


@given(**sizes, smoothing=st.floats(0.01, 0.3), gamma=st.sampled_from([0.0, 0.5, 2.0]))
@quick
def test_smoothing_and_focal(rows, classes, dim, seed, smoothing, gamma):
    case = Case(rows, classes, dim, seed, "tf32x3")
    agree(case, *case.run(smoothing=smoothing, gamma=gamma), smoothing, gamma, scale=10)


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
@given(**sizes, targets=st.integers(2, 4))
@quick
def test_several_targets(driver, rows, classes, dim, seed, targets):
    case = Case(rows, max(classes, 3), dim, seed, "tf32x3", targets=targets)
    agree(case, *case.run(driver), scale=5)


@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
@pytest.mark.parametrize("mode", ["bf16", "tf32x3"])
def test_collapsed_margins_keep_their_digits(margin, mode):
    """At 50 nats the loss is 1e-21: any loss made of lse - z_y is exactly zero there in fp32, or noise."""
    case = Case(33, 40, 40, 5, mode, margin=margin, bias=False)
    losses, _ = case.reference()
    assert losses.max() < 1e-6
    assert losses.min() > 0
    agree(case, *case.run(), scale=20 if mode == "tf32x3" else 2)
    agree(case, *case.run(head.one_pass_value_and_grad), scale=20 if mode == "tf32x3" else 2)
    focal = Case(33, 40, 40, 5, mode, margin=20.0, bias=False)
    agree(focal, *focal.run(gamma=0.5), gamma=0.5, scale=20 if mode == "tf32x3" else 2)


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
@pytest.mark.parametrize(("margin", "bound"), [(20.0, 1e-5), (50.0, 1e-5), (80.0, 2e-5)])
@pytest.mark.parametrize("dim", [24, 40])
def test_three_passes_in_half_precision_hold_single_precision(driver, margin, bound, dim):
    """Pairs of float16 for the logits; at 80 nats the low half of E, in bfloat16, is below its smallest normal number."""
    case = Case(33, 40, dim, 5, "fp16x3", margin=margin, bias=False)
    result, gradients = case.run(driver)
    losses, expected = case.reference()
    for found, wanted in zip((result.losses, *gradients), (losses, *expected), strict=True):
        assert error(found, wanted) < bound


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_operands_are_rounded_split_and_padded(mode, dtype):
    chosen = MODES[mode]
    x, weight = (torch.randn(*size, generator=torch.Generator().manual_seed(3)).to(DEVICE) for size in ((37, 135), (37,)))
    x, weight[5] = x.to(dtype), float("nan")
    x[7, 3] = float("inf")

    def nearest_of(y, element):
        if element != torch.float32:
            return y.to(element)
        return torch.where(y.isfinite(), ((y.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32), y)

    for element, factor in ((chosen.logits, None), (chosen.products, weight)):
        y = x.float() if factor is None else x.float() * factor[:, None]
        halves = [nearest_of(y, element)]
        halves += [nearest_of(y - halves[0].float(), element)] if chosen.passes == 3 else []
        found = operand(x, element, chosen.passes, factor)
        assert found.dtype == element
        assert found.nbytes == operand_bytes(*x.shape, element, chosen.passes)
        width = found.shape[1] // len(halves)
        assert width * found.element_size() % (128 if chosen.passes == 3 else 16) == 0
        for i, half in enumerate(halves):
            part = found[:, i * width : (i + 1) * width]
            torch.testing.assert_close(part[:, :135], half, rtol=0, atol=0, equal_nan=True)
            assert not part[:, 135:].any()


@pytest.mark.parametrize("targets", [1, 3])
def test_rows_are_finished_from_their_sums(targets):
    """Against the formulas in float64, of rows before and after they moved to their maximum, and of one without targets."""
    make = torch.Generator().manual_seed(targets)
    u = 30 * torch.randn(70, 50, generator=make, dtype=torch.float64)
    u[:3] *= 1e-3  # hardly any logits
    u[3:6, 0] += 200.0  # hostile
    z = (2 * torch.randn(70, targets, generator=make)).float()
    labels = torch.zeros(70, targets, dtype=torch.int32)
    labels[7, -1] = -1  # padding, or no target at all
    z[7, -1] = 0.0
    rows = rows_of.Rows.of(z.to(DEVICE), labels.to(DEVICE), torch.rand(70, generator=make).to(DEVICE))

    def sweep(flag=None, into=None):
        if flag is not None and not bool(flag[0]):
            return into
        parts = u.split(20, 1)
        e = [(x - rows.offset.cpu().double()[:, None]).exp().float() for x in parts]
        statistics = torch.stack([torch.stack([f(x) for x in xs]) for xs, f in (
            (e, lambda x: x.sum(1)), (e, lambda x: 0.99 * x.sum(1)), (parts, lambda x: x.amax(1).float()))
        ]).to(DEVICE)  # fmt: skip
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
    torch.testing.assert_close(result.losses.cpu().double(), loss, rtol=2e-5, atol=2e-5 if targets > 1 else 1e-35)
    torch.testing.assert_close(result.log_ratio.cpu().double()[log_ratio > 1e-9], log_ratio[log_ratio > 1e-9], **close)
    torch.testing.assert_close(result.probability.cpu().double(), p, **close)
    gradient = count[:, None] * torch.softmax(torch.cat((z.masked_fill(~known, float("-inf")), u), 1), 1)[:, :targets] - 1.0
    expected = torch.where(labels != -1, -rows.scale.cpu()[:, None] * gradient, 0.0)
    torch.testing.assert_close(rows.own.cpu().double(), expected, rtol=2e-5, atol=3e-7)
    off = rows.scale.cpu().double() * count * p  # what the factor makes of the rounded exponentials
    torch.testing.assert_close((rows.factor * rows.kept).cpu().double(), off, **close)


def test_operands_keep_nan_and_alignment():
    """A device's nan has all bits set, so that adding to it wraps; a descriptor's base must be a multiple of 16 bytes."""
    nan = torch.tensor([[0x7FFFFFFF, -1]], dtype=torch.int32, device=DEVICE).view(torch.float32)
    assert operand(nan, torch.float32, 1).isnan()[:, :2].all()
    shifted = torch.zeros(8 * 16 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(16, 8)
    assert operand(shifted, torch.bfloat16, 1).data_ptr() % 16 == 0


@pytest.mark.parametrize("scale", [2.0**-30, 3e5, 1e8])
def test_pairs_of_float16_share_their_scale(scale):
    """Only the product of the factors' scales counts: the larger one lends its exponent to the smaller, exactly."""
    case = Case(20, 30, 16, 1, "fp16x3")
    H, W = case.features * scale, case.weight / scale
    pair = logit_operands(H, W, MODES["fp16x3"])
    left, right = ((x[:, :16].double() + x[:, 64:80].double()) for x in pair)
    assert error(left @ right.T, H.double() @ W.double().T) < 1e-7
    for bad in (float("nan"), float("inf")):
        spoilt = torch.cat((case.features, torch.full((1, 16), bad, device=DEVICE)))
        pair = logit_operands(spoilt, case.weight, MODES["fp16x3"])
        left, right = ((x[:, :16].double() + x[:, 64:80].double()) for x in pair)
        assert error(left[:-1] @ right.T, case.features.double() @ case.weight.double().T) < 1e-6
        assert not left[-1].isfinite().any()
    zero = logit_operands(torch.zeros_like(H), W, MODES["fp16x3"])
    assert all(x.isfinite().all() for x in zero)


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("mode", ["bf16", "fp16x3", "tf32x3"])
def test_hostile_logits(driver, targets, mode):
    """Wrong classes that lead by hundreds of nats go through the row maximum; the other rows are untouched."""
    case = Case(21, 50, 20, 3, mode, targets=targets)
    case.features[3] *= 300
    case.features[11] *= -300
    result, gradients = case.run(driver)
    losses, _ = case.reference()
    assert losses.max() > 200
    agree(case, result, gradients, scale=5)


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_an_impossible_target_is_an_infinite_loss(driver, targets, scale):
    """The target's bias is -inf: its row is infinite, pulls as far as it can, and the others are as they were."""
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


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
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


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
@pytest.mark.parametrize("scale", [1e4, 1e9, 3e15, 1e30])
def test_rows_move_to_their_maximum_itself(driver, scale):
    """Not to the offset plus what lies between, which at 1e9 misses it by dozens of nats."""
    case = Case(5, 9, 4, 1, "tf32x3", bias=False)
    case.features *= scale
    result, gradients = case.run(driver)
    torch.testing.assert_close(result.losses.double(), case.reference()[0], rtol=1e-5, atol=1e-30)
    for found, expected in zip(gradients, case.reference()[1], strict=True):
        assert error(found, expected) < 1e-4


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
        driver(case.features, case.weight, case.bias, single, case.row_weight, smoothing=0.1, **buffers, **rest)
        made.append(outs)
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    moves = [torch.randn_like(x) for x in (case.features, case.weight, case.bias)]
    outs = [torch.zeros_like(x) for x in moves]
    softmax_hvp(
        case.features, case.weight, case.bias, case.labels, case.row_weight, mode="tf32x3",
        **dict(zip(("d_features", "d_weight", "d_bias"), moves, strict=True)),
        **dict(zip(("out_features", "out_weight", "out_bias"), outs, strict=True)),
    )  # fmt: skip
    parameters = [x.double().requires_grad_() for x in (case.features, case.weight, case.bias)]
    z = parameters[0] @ parameters[1].T + parameters[2]
    z = torch.cat((z, torch.zeros_like(z[:, :1])), 1)
    z = torch.where((torch.arange(10, device=DEVICE) < 9) | (torch.arange(6, device=DEVICE) == 2)[:, None], z, float("-inf"))
    index = torch.where(case.labels < 0, torch.tensor([9, -1], device=DEVICE), case.labels)
    own = torch.where(index >= 0, z.gather(1, index.clamp_min(0)), 0.0)
    losses = torch.where(index >= 0, z.logsumexp(1)[:, None] - own, 0.0).sum(1)
    first = torch.autograd.grad((case.row_weight.double() * losses).sum(), parameters, create_graph=True)
    expected = torch.autograd.grad(sum((a * b.double()).sum() for a, b in zip(first, moves, strict=True)), parameters)
    for found, wanted in zip(outs, expected, strict=True):
        assert error(found, wanted) < 1e-4


@given(**sizes)
@quick
def test_margin_and_mass(rows, classes, dim, seed):
    case = Case(rows, classes, dim, seed, "tf32x3")
    features, weight, bias = case.parameters()
    z = (features @ weight.T + bias).detach()
    own = z.gather(1, case.labels)
    rival = z.scatter(1, case.labels, float("-inf"))
    result, _ = case.run()
    torch.testing.assert_close(result.margin.double(), own[:, 0] - rival.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.off_target_mass.double(), (rival - own).exp().sum(1), rtol=1e-5, atol=1e-30)


def test_adds_to_buffers_skips_frozen_and_repeats_bit_for_bit():
    case = Case(37, 71, 24, 1, "bf16")
    _, first = case.run(chunk_rows=20)
    _, again = case.run(chunk_rows=20)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    filled = torch.full_like(first[0], 3.0)
    head.softmax_value_and_grad(
        case.features, case.weight, case.bias, case.labels[:, 0], case.row_weight, grad_features=filled,
        need_weight=False, chunk_rows=20,
    )  # fmt: skip
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


def test_fresh_buffers_of_one_pass_and_of_library_products_in_tf32():
    case = Case(30, 40, 24, 6, "tf32")
    agree(case, *case.run(head.one_pass_value_and_grad, fresh=True))
    agree(case, *case.run(products="library", chunk_rows=8, fresh=True))


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
def test_a_buffer_that_is_not_needed_is_not_touched(driver):
    case = Case(9, 12, 8, 0, "bf16", bias=False)
    keep = torch.full_like(case.features, 7.0, dtype=torch.float32)
    driver(
        case.features, case.weight, None, case.labels[:, 0], case.row_weight, grad_features=keep,
        grad_weight=torch.empty_like(case.weight, dtype=torch.float32), need_features=False, mode="bf16", fresh=True,
    )  # fmt: skip
    assert bool((keep == 7.0).all())


def test_library_products_leave_the_precision_of_matmuls_as_it_was():
    """A setting that is inherited goes on being inherited."""
    backends = torch.backends
    generic, own = backends.fp32_precision, backends.cuda.matmul.fp32_precision
    try:
        backends.fp32_precision = "tf32"
        with head.tensor_float32():
            assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == "ieee"
        with head.tensor_float32():
            assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "tf32"
        assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = "none", "ieee"
        with head.tensor_float32():
            pass
        assert backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = generic, "none" if own == generic else own


def test_library_products_agree():
    case = Case(37, 71, 24, 2, "bf16")
    agree(case, *case.run(products="library", chunk_rows=20))


def test_a_label_that_is_no_class_is_refused_or_poisons_its_row():
    case = Case(9, 12, 8, 0, "bf16x3")
    with pytest.raises(ValueError, match="0 to 11"):
        check_labels(torch.tensor([[3], [12]], device=DEVICE), 12)
    check_labels(case.labels, 12)
    for driver in (head.one_pass_value_and_grad, head.softmax_value_and_grad):
        for wrong in (10**6, 2**32 + 3, -(2**40)):
            case.labels[4] = wrong
            result, gradients = case.run(driver)
            assert result.losses.isnan().nonzero().tolist() == [[4]]
            assert gradients[0][:4].isfinite().all()
        case.labels = case.labels.int()  # which no conversion marks
        case.labels[4] = -5
        assert case.run(driver)[0].losses.isnan().nonzero().tolist() == [[4]]
        case.labels = case.labels.long()


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
        "features": torch.zeros(5, 3), "weight": torch.zeros(4, 3), "bias": None,
        "targets": torch.zeros(5, dtype=torch.long), "row_weight": torch.ones(5),
        "grad_features": torch.zeros(5, 3), "grad_weight": torch.zeros(4, 3), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        head.softmax_value_and_grad(**arguments)


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
    assert rows_of.as_labels(torch.tensor([-1, -7]))[:, 0].tolist() == [-1, -2]  # no padding, and no class


@pytest.mark.parametrize("driver", [head.one_pass_value_and_grad, head.softmax_value_and_grad])
@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
def test_smoothing_leaves_the_bias_its_digits(driver, margin):
    """Its part of the gradient is zero where classes are balanced, and what is left is of the order of exp(-margin)."""
    case = Case(10, 10, 16, 0, "tf32x3")
    W = (torch.eye(10, 16) - torch.eye(16)[:10].mean(0)) * margin**0.5
    case.features, case.weight, case.labels = W.to(DEVICE), W.to(DEVICE), torch.arange(10, device=DEVICE)[:, None]
    case.row_weight = torch.ones(10, device=DEVICE)
    plain, smooth = (case.run(driver, smoothing=eps)[1][2] for eps in (0.0, 0.1))
    assert torch.equal(plain, smooth)
    _, expected = case.reference()
    assert error(plain, expected[2]) < 5e-5  # sums of numbers that cancel, each good to the logits rounding


def strided(x):
    """The same numbers with gaps between them."""
    wide = x.new_full((*x.shape, 2), float("nan") if x.is_floating_point() else 2**30)
    wide[..., 0] = x
    return wide[..., 0]


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


def test_squared_error_wants_a_label_and_a_weight_for_each_row():
    H, W = torch.randn(9, 16), torch.randn(12, 16)
    for labels, weight in (
        (torch.tensor([3]), None),
        (torch.zeros(9, 2, dtype=torch.long), None),
        (torch.zeros(9).long(), torch.ones(1)),
    ):
        with pytest.raises(ValueError, match="one for each of the 9 rows"):
            squared_error_value_and_grad(
                H, W, None, labels, weight, grad_features=torch.zeros(9, 16), grad_weight=torch.zeros(12, 16), mode="tf32x3"
            )


def descriptors():
    """Tiles that load by pointer and by descriptor, the latter where the device has them."""
    by_descriptor = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    return [False, True] if by_descriptor else [False]


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
    sums = off_target(H, W, case.bias, offset, labels, E, passes=chosen.passes, classes=classes, launch=launch)
    u = z - offset.double()[:, None]
    spare = torch.cat((u, torch.zeros_like(u[:, :1])), 1)  # padding -1 points at the extra column
    spare.scatter_(1, torch.where(case.labels < 0, classes, case.labels), float("-inf"))
    u = spare[:, :classes]
    width = E.shape[1] // chosen.halves
    stored = E[:, :classes].double() + (E[:, width : width + classes].double() if chosen.passes == 3 else 0)
    assert error(stored, u.exp()) < 2 * GRADIENT[mode]  # relative, it is the absolute error of a logit
    assert error(sums[0].sum(0), u.exp().sum(1)) < 1e-5
    assert error(sums[1].sum(0), stored.sum(1)) < 1e-5
    torch.testing.assert_close(sums[2].amax(0).double(), u.amax(1) + offset.double(), rtol=1e-5, atol=1e-5)
    assert not E[:, classes:width].any()
    before = E.clone(), sums.clone()
    flag = torch.zeros((), dtype=torch.int32, device=z.device)
    options = {"passes": chosen.passes, "classes": classes, "launch": launch}
    assert off_target(H, W, None, offset * 0, labels, E, flag=flag, into=sums, **options) is sums
    assert torch.equal(E, before[0])
    assert torch.equal(sums, before[1])


@pytest.mark.parametrize("tma", descriptors())
@pytest.mark.parametrize("mode", ["bf16", "tf32x3"])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@given(**sizes, exact=st.booleans())
@settings(quick, max_examples=2)
def test_product_kernel(mode, tma, transposed, down, rows, classes, dim, seed, exact):
    """Exact integers, so that only the indexing can be wrong."""
    make = torch.Generator().manual_seed(seed)
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=make).float().to(DEVICE)  # noqa: E731
    chosen = MODES[mode]
    whole, B = integers(rows, classes), integers(rows if transposed else classes, dim)
    E = empty_chunk(rows, classes, chosen, whole.device).zero_()
    E[:, :classes] = whole
    out, labels = integers(classes if transposed else rows, dim), torch.randint(-1, classes, (rows, 2), generator=make)
    factor, coefficient = integers(rows), integers(rows, 2)
    expected = out + (whole.T @ B if transposed else factor[:, None] * (whole @ B))
    labels = labels.int().to(DEVICE)
    extra = {}
    V = operand(B, chosen.products, chosen.passes)
    if not transposed:
        known = (labels >= 0).float()
        expected -= ((coefficient * known)[..., None] * B[labels.long().clamp_min(0)]).sum(1)
        extra = {"factor": factor, "coefficient": coefficient, "labels": labels}
        extra |= {"points": B.bfloat16() if exact else V, "exact": exact}
    launch = Launch(Tile(32, 64, 32, tma=tma, flatten=down), resident=2)
    right = V if down else operand(B.T.contiguous(), chosen.products, chosen.passes)
    add_product(out, E, right, passes=chosen.passes, depth=len(B), transposed=transposed, down=down, launch=launch, **extra)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["tf32", "tf32x3"])
@given(**sizes, weighted=st.booleans())
@quick
def test_float32_products_read_the_transpose(mode, rows, classes, dim, seed, weighted):
    case = Case(rows, classes, dim, seed, mode)
    chosen, weight = MODES[mode], case.row_weight if weighted else None
    found, down = product_operand(case.features, chosen, weight)
    scaled = case.features if weight is None else case.features * weight[:, None]
    assert not down
    assert torch.equal(found, operand(scaled.T.contiguous(), chosen.products, chosen.passes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(**sizes, weighted=st.booleans())
@quick
def test_gram_matrix_by_the_library(dtype, rows, classes, dim, seed, weighted):
    case = Case(rows, classes, dim, seed, "tf32x3")
    X, weight = case.features.to(dtype), case.row_weight if weighted else None
    double = X.double() if weight is None else X.double() * weight[:, None].double()
    torch.testing.assert_close(library_gram(X, weight), X.double().T @ double, rtol=1e-12, atol=1e-12)


def test_gram_matrix_of_no_rows():
    assert torch.equal(gram(torch.zeros(0, 5, device=DEVICE)), torch.zeros(5, 5, dtype=torch.float64, device=DEVICE))


@given(**sizes, transposed=st.booleans())
@quick
def test_weighted_sums(rows, classes, dim, seed, transposed):
    make = torch.Generator().manual_seed(seed)
    whole = torch.randn(rows, classes, generator=make).to(DEVICE)
    E = operand(whole, torch.bfloat16, 3) if transposed else operand(whole.bfloat16(), torch.bfloat16, 1)
    weight = torch.randn(rows if transposed else classes, generator=make).to(DEVICE)
    out = torch.ones(classes if transposed else rows, device=DEVICE)
    add_weighted_sums(out, E, weight, passes=3 if transposed else 1, classes=classes, transposed=transposed)
    expected = 1 + ((whole.T if transposed else whole.bfloat16().float()) @ weight)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@given(**sizes, splits=st.sampled_from([1, 3]))
@settings(quick, max_examples=3)
def test_class_sums_and_target_logits(rows, classes, dim, seed, splits):
    classes = min(classes, 12)
    case = Case(rows, classes, dim, seed, "tf32x3", targets=2)
    labels = case.labels.int().contiguous()
    z = case.features.double() @ case.weight.double().T + case.bias.double()
    expected = torch.where(labels >= 0, z.gather(1, case.labels.clamp_min(0)), 0.0)
    found = target_logits(case.features, case.weight, case.bias, labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    out = torch.ones_like(case.weight)
    coefficient = torch.where(labels >= 0, found, 7.0)  # what stands beside the padding must not count
    add_class_sums(out, case.features, coefficient, Segments.of(labels, classes), -2.0, splits)
    sums = torch.zeros(classes + 1, dim, dtype=torch.float64, device=DEVICE)
    for t in range(labels.shape[1]):
        index = torch.where(case.labels[:, t] < 0, classes, case.labels[:, t])
        sums.index_add_(0, index, coefficient[:, t, None].double() * case.features.double())
    torch.testing.assert_close(out.double(), 1 - 2 * sums[:classes], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [None, 3])
def test_class_sums_of_fewer_rows_than_classes(splits):
    """A program a row, of which the first of each class works; padding and labels that are no class own nothing."""
    make = torch.Generator().manual_seed(3)
    labels = torch.tensor([[5], [-1], [90], [5], [0], [96], [97], [-2], [5]], dtype=torch.int32)
    H, weight = torch.randn(9, 140, generator=make), torch.rand(9, 1, generator=make)
    out = torch.ones(97, 140)
    expected = out.clone()
    for row, label in enumerate(labels[:, 0].tolist()):
        if 0 <= label < 97:
            expected[label] -= 2 * weight[row] * H[row]
    labels, H, weight, out = (x.to(DEVICE) for x in (labels, H, weight, out))
    add_class_sums(out, H, weight, Segments.of(labels, 97), -2.0, splits)
    torch.testing.assert_close(out.cpu(), expected)


def test_shapes_that_a_kernel_would_read_beyond_are_refused():
    x, W, t, one = torch.randn(5, 3), torch.randn(4, 3), torch.randint(4, (5,)), torch.ones(5)
    out = {"out_features": torch.zeros(5, 3), "out_weight": torch.zeros(4, 3)}
    for name, wrong in (("d_weight", W[:3]), ("d_features", x[:, :2]), ("d_bias", torch.ones(4))):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            softmax_hvp(x, W, None, t, one, **{"d_features": x, "d_weight": W, **out, name: wrong})
    with pytest.raises(ValueError, match="features"):
        squared_error_value_and_grad(x[:, :1], W, None, t, grad_features=torch.zeros(5, 1), grad_weight=torch.zeros(4, 3))


def test_gram_of_float64_keeps_it():
    x, weight = torch.randn(200, 3, dtype=torch.float64), torch.rand(200)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gram(x, weight), x.T @ (x * weight[:, None]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(**sizes, parts=st.sampled_from([1, 3]))
@quick
def test_gram_is_float64_grade(dtype, rows, classes, dim, seed, parts):
    X = torch.randn(rows + classes, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    found = gram(X, parts=parts)
    assert error(found, X.double().T @ X.double()) < (1e-14 if dtype == torch.float32 else 3e-7)
    weight = torch.randn(rows + classes, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE)  # of either sign
    expected = X.double().T @ (X.double() * weight[:, None])
    assert float((gram(X, weight, parts=parts) - expected).norm() / X.double().square().sum()) < 1e-14
    assert torch.equal(found, found.T)


@given(**sizes, bias=st.booleans(), weighted=st.booleans())
@quick
def test_squared_error(rows, classes, dim, seed, bias, weighted):
    case = Case(rows, classes, dim, seed, "tf32x3", bias=bias)
    parameters = case.parameters()
    z = parameters[0] @ parameters[1].T + (parameters[2] if bias else 0)
    wanted = torch.nn.functional.one_hot(case.labels[:, 0], classes)
    weights = 0.5 * (case.row_weight.double() if weighted else 1)
    value = (weights * ((z - wanted) ** 2).sum(1)).sum() / 2
    buffers = [torch.zeros_like(x, dtype=torch.float32) for x in parameters]
    names = ("grad_features", "grad_weight", "grad_bias")
    found = squared_error_value_and_grad(
        case.features, case.weight, case.bias, case.labels[:, 0], case.row_weight if weighted else None, 0.5,
        mode="tf32x3", **dict(zip(names, buffers, strict=False)),
    )  # fmt: skip
    torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-7)
    for gradient, expected in zip(buffers, torch.autograd.grad(value, parameters), strict=True):
        assert error(gradient, expected) < 1e-5


@pytest.mark.parametrize(("mode", "gamma"), [("bf16", 0.0), ("fp16x3", 0.0), ("tf32x3", 0.0), ("tf32x3", 2.0)])
@given(**{**sizes, "rows": st.integers(1, 20), "classes": st.integers(2, 30)}, smoothing=st.sampled_from([0.0, 0.1]))
@settings(quick, max_examples=2)
def test_hessian_vector_product(mode, gamma, rows, classes, dim, seed, smoothing):
    case = Case(rows, classes, dim, seed, mode)
    make = torch.Generator().manual_seed(seed)
    directions = [torch.randn(x.shape, generator=make).to(DEVICE, x.dtype) for x in (case.features, case.weight)]
    directions.append(torch.randn(classes, generator=make).to(DEVICE))

    def objective(*parameters):
        return (case.row_weight.double() * case.losses(*parameters, smoothing=smoothing, gamma=gamma)).sum()

    parameters = tuple(x.detach() for x in case.parameters())
    expected = torch.autograd.functional.hvp(objective, parameters, tuple(x.double() for x in directions))[1]
    outs = [torch.zeros_like(x, dtype=torch.float32) for x in directions]
    softmax_hvp(
        case.features, case.weight, case.bias, case.labels[:, 0], case.row_weight,
        Focal(gamma=gamma).weight if gamma else rows_of.cross_entropy_weight,
        (lambda l, p: Focal(gamma=gamma).bend(l, p) / p) if gamma else cross_entropy_curvature, smoothing,
        d_features=directions[0], d_weight=directions[1], d_bias=directions[2],
        out_features=outs[0], out_weight=outs[1], out_bias=outs[2], chunk_rows=13, mode=mode,
    )  # fmt: skip
    size = sum(x.norm() ** 2 for x in expected) ** 0.5
    for found, wanted in zip(outs, expected, strict=True):
        assert float((found.double() - wanted).norm() / size) < 10 * GRADIENT["bf16x3" if mode == "fp16x3" else mode]


@pytest.mark.parametrize(("mode", "margin"), [("bf16", None), ("tf32x3", None), ("tf32x3", 30.0)])
@given(**{**sizes, "rows": st.integers(1, 20), "classes": st.integers(5, 30)}, targets=st.integers(2, 4))
@settings(quick, max_examples=2)
def test_hessian_vector_product_of_several_targets(mode, margin, rows, classes, dim, seed, targets):
    case = Case(rows, classes, dim, seed, mode, targets=targets, margin=margin)
    make = torch.Generator().manual_seed(seed)
    directions = [torch.randn(x.shape, generator=make).to(DEVICE, x.dtype) for x in (case.features, case.weight)]
    directions.append(torch.randn(classes, generator=make).to(DEVICE))
    parameters = tuple(x.detach() for x in case.parameters())
    expected = torch.autograd.functional.hvp(
        lambda *p: (case.row_weight.double() * case.losses(*p)).sum(), parameters, tuple(x.double() for x in directions)
    )[1]
    outs = [torch.zeros_like(x, dtype=torch.float32) for x in directions]
    softmax_hvp(
        case.features, case.weight, case.bias, case.labels, case.row_weight, d_features=directions[0],
        d_weight=directions[1], d_bias=directions[2], out_features=outs[0], out_weight=outs[1], out_bias=outs[2],
        chunk_rows=13, mode=mode,
    )  # fmt: skip
    size = sum(x.norm() ** 2 for x in expected) ** 0.5
    for found, wanted in zip(outs, expected, strict=True):
        assert float((found.double() - wanted).norm() / size) < 10 * GRADIENT[mode]


@pytest.mark.parametrize("tma", descriptors())
def test_hvp_kernel_by_pointer_and_descriptor(tma):
    make = torch.Generator().manual_seed(0)
    H, dH = (torch.randn(35, 40, generator=make).to(DEVICE, torch.bfloat16) for _ in range(2))
    W, dW = (torch.randn(70, 40, generator=make).to(DEVICE, torch.bfloat16) for _ in range(2))
    base, slope, curvature = (torch.randn(35, generator=make).to(DEVICE) for _ in range(3))
    E = torch.rand(35, 72, generator=make).to(DEVICE, torch.bfloat16)
    dz = dH.double() @ W.double().T + H.double() @ dW.double().T - base.double()[:, None]
    expected = E.double()[:, :70] * (slope.double()[:, None] * dz + curvature.double()[:, None])
    launch = Launch(Tile(32, 64, 32, tma=tma), resident=2)
    E[:, 70:] = 0
    sums = move_exponentials(H, W, dH, dW, None, base, slope, curvature, E, passes=1, launch=launch)
    assert error(E[:, :70], expected) < 1e-2
    torch.testing.assert_close(sums, E.float().sum(1), rtol=1e-4, atol=1e-3)


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
        case.features, case.weight, case.bias, case.labels[:, 0], case.row_weight, smoothing=smoothing, mode="tf32x3",
        chunk_rows=17,
    )  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    X, Y = (torch.randn(n, 3, generator=make).to(DEVICE) for n in (classes, rows))
    assert error(operator.times(X), G @ X.double()) < 1e-5
    assert error(operator.transposed_times(Y), G.T @ Y.double()) < 1e-5


def test_one_pass_loops_can_be_cut_into_parts():
    case = Case(37, 71, 24, 4, "tf32x3")
    labels = case.labels.int().contiguous()
    H, W = operand(case.features, torch.float32, 3), operand(case.weight, torch.float32, 3)
    offset = target_logits(case.features, case.weight, case.bias, labels)[:, 0]
    whole, cut = (one_pass.forward(H, W, W, case.bias, offset, labels, passes=3, parts=parts) for parts in ((1, 128), (2, 64)))
    for reduce in (lambda x: x[:2].sum(1), lambda x: x[2].amax(0)):
        torch.testing.assert_close(reduce(whole[0]), reduce(cut[0]), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(whole[1].sum(0), cut[1].sum(0), rtol=1e-4, atol=1e-5)


def truncating_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A tensor core: exact products of 16 terms at a time, added to an accumulator that is truncated to fp32."""
    left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data.astype(np.float64)
    for k in range(0, left.shape[1], 16):
        exact = total + left[:, k : k + 16] @ right[k : k + 16]
        single = exact.astype(np.float32)
        total = np.where(np.abs(single) > np.abs(exact), np.nextafter(single, np.float32(0)), single).astype(np.float64)
    return TensorHandle(total.astype(np.float32), d.dtype.scalar)


@pytest.mark.skipif(DEVICE == "cuda", reason="the device has tensor cores of its own")
@pytest.mark.parametrize("mode", ["bf16x3", "tf32x3"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_pairs_outlive_truncating_tensor_cores(monkeypatch, mode, transposed):
    make, chosen, depth = torch.Generator().manual_seed(0), MODES[mode], 8192
    E = torch.rand(40, depth, generator=make)
    B = torch.rand(depth, 16, generator=make)
    pair = operand(E.T if transposed else E, chosen.products, 3)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating_dot)
    out = torch.zeros(40, 16)
    add_product(out, pair, operand(B, chosen.products, 3), passes=3, depth=depth, transposed=transposed)
    assert error(out, E.double() @ B.double()) < 1e-5  # sums on the tensor cores leave 6e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="the device has tensor cores of its own")
@pytest.mark.parametrize("mode", ["fp16x3", "tf32x3"])
def test_logits_of_pairs_outlive_truncating_tensor_cores(monkeypatch, mode):
    make, chosen, depth = torch.Generator().manual_seed(0), MODES[mode], 4096
    H, W = torch.rand(20, depth, generator=make) / depth**0.5, torch.rand(50, depth, generator=make) / depth**0.5 * 80
    z = H.double() @ W.double().T
    labels = torch.full((20, 1), -1, dtype=torch.int32)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating_dot)
    E = empty_chunk(20, 50, chosen, H.device)
    offset = z[:, 0].float()
    sums = off_target(*logit_operands(H, W, chosen), None, offset, labels, E, passes=3, classes=50)
    peak = sums[2].amax(0).double()
    assert float((peak - z.amax(1)).abs().max()) < 2e-5  # 1e-6 of the logits; sums on the tensor cores leave 6e-4


def test_every_row_of_the_tile_table_serves_every_architecture():
    assert all(set(row) == ({90} if name.startswith("fp8") else {80, 90, 100}) for (name, _), row in TILES.items())
    assert [architecture_of(x) for x in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0))] == [80, 80, 90, 100, 80]
    with pytest.raises(ValueError, match=r"8\.0"):
        architecture_of((7, 5))


@pytest.mark.parametrize("products", ["triton", "library"])
def test_parameters_that_want_gradients_leave_the_buffers_alone(products):
    case = Case(20, 30, 8, 0, "bf16")
    features, weight = case.features.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = [torch.zeros(x.shape, device=DEVICE) for x in (features, weight)]
    result = head.softmax_value_and_grad(
        features, weight, None, case.labels[:, 0], case.row_weight, smoothing=0.1, grad_features=out[0],
        grad_weight=out[1], mode="bf16", products=products,
    )  # fmt: skip
    assert not any(x.requires_grad for x in (*out, result.losses))


@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
def test_column_sums_over_rows_run_in_float64(driver):
    """Two weights that cancel, far apart, leave the others their digits, as a million equal terms would."""
    case = Case(192, 3, 16, 5, "tf32x3")
    case.features, case.labels = case.features[:1].expand(192, -1).contiguous(), case.labels[:1].expand(192, -1).contiguous()
    case.row_weight = torch.zeros(192, device=DEVICE)
    case.row_weight[0], case.row_weight[64:128], case.row_weight[128] = 1e9, 0.1, -1e9
    options = {"chunk_rows": 64} if driver is head.softmax_value_and_grad else {}
    assert error(case.run(driver, smoothing=0.1, **options)[1][2], case.reference(smoothing=0.1)[1][2]) < 1e-5
    buffers = [torch.zeros_like(x) for x in (case.features, case.weight, case.bias)]
    direction = [torch.ones_like(x) for x in buffers]
    moves = {f"d_{name}": x for name, x in zip(("features", "weight", "bias"), direction, strict=True)}
    into = {f"out_{name}": x for name, x in zip(("features", "weight", "bias"), buffers, strict=True)}
    labels = case.labels[:, 0]
    softmax_hvp(
        case.features, case.weight, case.bias, labels, case.row_weight, chunk_rows=64, mode="tf32x3", **moves, **into
    )  # fmt: skip
    one = case.parameters()
    one[0] = case.features[:1].double().requires_grad_()
    z = torch.nn.functional.cross_entropy(one[0] @ one[1].T + one[2], labels[:1])
    gradient = torch.autograd.grad(z, one, create_graph=True)
    (expected,) = torch.autograd.grad(sum(g.sum() for g in gradient), one[2:])
    assert error(buffers[2], 6.4 * expected) < 1e-4


@pytest.mark.parametrize(
    ("mode", "value"), [("bf16", 1e4), ("bf16", -(2.0**24)), ("tf32", 1e10), ("tf32x3", 1e4), ("tf32x3", 1e30)]
)
@pytest.mark.parametrize("driver", [head.softmax_value_and_grad, head.one_pass_value_and_grad])
def test_a_common_offset_of_the_logits_cancels(driver, mode, value):
    """Tiles add in another order than the target logits do; equal ones stay equal, with smoothing and several targets too."""
    make = torch.Generator().manual_seed(3)
    case = Case(9, 5, 24, 0, mode)
    value = float(torch.tensor(value, dtype=torch.bfloat16))
    row = value * torch.rand(24, generator=make).to(case.weight)
    case.weight, case.bias = row.expand(5, -1).contiguous(), torch.full_like(case.bias, value)
    case.features = torch.rand(9, 24, generator=make).to(case.features)
    for smoothing in (0.0, 0.1):
        result, gradients = case.run(driver, smoothing=smoothing)
        torch.testing.assert_close(result.losses, torch.full_like(result.losses, np.log(5)), rtol=1e-5, atol=1e-6)
        assert result.margin.tolist() == [0.0] * 9
        expected = torch.zeros(5, dtype=torch.float64, device=DEVICE)
        expected.index_add_(0, case.labels[:, 0], -case.row_weight.double())
        expected = (1 - smoothing) * (expected + case.row_weight.double().sum() / 5)
        assert error(gradients[2], expected) < 1e-2 if mode == "bf16" else 1e-5
    case.labels = torch.tensor([[0, 3]] * 9, device=DEVICE)
    result, _ = case.run(driver)
    torch.testing.assert_close(result.losses, torch.full_like(result.losses, 2 * np.log(5)), rtol=1e-5, atol=1e-6)
