"""The drop-in losses against the dense expressions of torch in float64, in value and gradients, in
every argument.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import pathlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ufm_fast import functional as fused
from ufm_fast.targets import Targets, TargetSets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaf(
    generator: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype).requires_grad_()


def dense_logits(h: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """The logits in the shape that cross_entropy takes: classes second, the heads after them."""
    flat = F.linear(h, W.reshape(-1, W.shape[-1]), None if b is None else b.reshape(-1))
    return flat.reshape(*h.shape[:-1], *W.shape[:-1])


def agree(
    ours: Tensor,
    theirs: Tensor,
    leaves: list[Tensor],
    generator: torch.Generator,
    tol: float = 1e-11,
) -> None:
    """Equal value and equal gradients under a random incoming gradient."""
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol, equal_nan=True)
    upstream = torch.randn(theirs.shape, generator=generator, dtype=torch.float64).to(theirs.dtype)
    found = torch.autograd.grad(ours, leaves, upstream)
    for a, b in zip(found, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


SHAPES = st.sampled_from(
    [
        (1, 2, 1, ()),
        (7, 2, 3, ()),
        (5, 9, 4, ()),
        (33, 17, 8, ()),
        (4, 3, 2, (2,)),
        (3, 4, 5, (2, 3)),
    ]
)
SMOOTHING = st.sampled_from([0.0, 0.1, 0.5, 1.0])
REDUCTION = st.sampled_from(["none", "mean", "sum"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=SHAPES,
    reduction=REDUCTION,
    smoothing=SMOOTHING,
    weighted=st.booleans(),
    biased=st.booleans(),
    ignore=st.sampled_from([None, -100, -1, 1]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_cross_entropy_equals_torch(
    seed: int,
    shape: tuple[int, int, int, tuple[int, ...]],
    reduction: str,
    smoothing: float,
    weighted: bool,
    biased: bool,
    ignore: int | None,
    scale: float,
) -> None:
    N, K, d, out = shape
    g = torch.Generator().manual_seed(seed)
    h, W, b = leaf(g, N, d, scale=scale), leaf(g, K, *out, d), leaf(g, K, *out) if biased else None
    w = torch.rand(K, generator=g, dtype=torch.float64) + 0.1 if weighted else None
    y = torch.randint(0, K, (N, *out), generator=g)
    index = -100 if ignore is None else ignore
    y = torch.where(torch.rand(y.shape, generator=g) < 0.3, index, y)
    y.view(-1)[0] = 0 if index != 0 else 1  # a mean over nothing has its own test
    shared: dict[str, Any] = {"weight": w, "reduction": reduction, "label_smoothing": smoothing}
    ours = fused.linear_cross_entropy(h, W, y, linear_bias=b, ignore_index=ignore, **shared)
    theirs = F.cross_entropy(dense_logits(h, W, b), y, ignore_index=index, **shared)
    agree(ours, theirs, [x for x in (h, W, b) if x is not None], g)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=SHAPES,
    reduction=REDUCTION,
    smoothing=SMOOTHING,
    weighted=st.booleans(),
)
def test_class_probabilities_equal_torch(
    seed: int,
    shape: tuple[int, int, int, tuple[int, ...]],
    reduction: str,
    smoothing: float,
    weighted: bool,
) -> None:
    N, K, d, out = shape
    g = torch.Generator().manual_seed(seed)
    h, W, b = leaf(g, N, d), leaf(g, K, *out, d), leaf(g, K, *out)
    w = torch.rand(K, generator=g, dtype=torch.float64) + 0.1 if weighted else None
    target = torch.rand(N, K, *out, generator=g, dtype=torch.float64).softmax(1).requires_grad_()
    shared: dict[str, Any] = {"weight": w, "reduction": reduction, "label_smoothing": smoothing}
    ours = fused.linear_cross_entropy(h, W, target, linear_bias=b, **shared)
    agree(ours, F.cross_entropy(dense_logits(h, W, b), target, **shared), [h, W, b, target], g)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    reduction=REDUCTION,
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
    weighted=st.booleans(),
)
def test_focal_equals_the_textbook(seed: int, reduction: str, gamma: float, weighted: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    h, W, b = leaf(g, 11, 4), leaf(g, 6, 4), leaf(g, 6)
    y = torch.randint(0, 6, (11,), generator=g)
    y[3] = -100
    w = (
        torch.rand(6, generator=g, dtype=torch.float64) + 0.1
        if weighted
        else torch.ones(6, dtype=torch.float64)
    )
    kept = torch.tensor(
        [i for i in range(11) if i != 3]
    )  # the textbook form has no gradient where its base is 0
    log_loss = F.cross_entropy(dense_logits(h, W, b), y, reduction="none")[kept]
    each = w[y[kept]] * (1 - torch.exp(-log_loss)) ** gamma * log_loss
    padded = torch.zeros(11, dtype=torch.float64).index_copy(0, kept, each)
    theirs = {"none": padded, "sum": each.sum(), "mean": each.sum() / w[y[kept]].sum()}[reduction]
    ours = fused.linear_focal_loss(
        h, W, y, linear_bias=b, gamma=gamma, weight=w if weighted else None, reduction=reduction
    )
    agree(ours, theirs, [h, W, b], g)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), reduction=REDUCTION, biased=st.booleans(), weighted=st.booleans()
)
def test_squared_error_equals_dense(
    seed: int, reduction: str, biased: bool, weighted: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    h, W, b = leaf(g, 9, 3), leaf(g, 5, 3), leaf(g, 5) if biased else None
    y = torch.randint(0, 5, (9,), generator=g)
    w = torch.rand(5, generator=g, dtype=torch.float64) + 0.1 if weighted else None
    factor = torch.ones(9, dtype=torch.float64) if w is None else w[y]
    each = 0.5 * factor * (dense_logits(h, W, b) - F.one_hot(y, 5)).square().sum(1)
    theirs = {"none": each, "sum": each.sum(), "mean": each.sum() / factor.sum()}[reduction]
    ours = fused.linear_squared_error(h, W, y, linear_bias=b, weight=w, reduction=reduction)
    agree(ours, theirs, [x for x in (h, W, b) if x is not None], g)


SETS = st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sets=SETS,
    reduction=REDUCTION,
    form=st.sampled_from(["list", "padded", "csr", "sets"]),
)
def test_pick_all_equals_dense(seed: int, sets: list[set[int]], reduction: str, form: str) -> None:
    g = torch.Generator().manual_seed(seed)
    h, W, b = leaf(g, len(sets), 4), leaf(g, 6, 4), leaf(g, 6)
    rows = [sorted(s) for s in sets]
    pointer = torch.tensor([0, *(len(s) for s in rows)]).cumsum(0)
    flat = torch.tensor([k for s in rows for k in s])
    target: Any = {
        "list": rows,
        "padded": torch.tensor([s + [-1] * (5 - len(s)) for s in rows]),
        "csr": Targets(flat, pointer),
        "sets": TargetSets.create(pointer, flat, 6),
    }[form]
    hot = torch.zeros(len(sets), 6, dtype=torch.float64)
    for r, s in enumerate(rows):
        hot[r, s] = 1.0
    each = -(hot * F.log_softmax(dense_logits(h, W, b), dim=1)).sum(1)
    theirs = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
    agree(
        fused.linear_pick_all(h, W, target, linear_bias=b, reduction=reduction),
        theirs,
        [h, W, b],
        g,
    )


def test_relations_between_the_losses() -> None:
    g = torch.Generator().manual_seed(1)
    h, W, b = leaf(g, 8, 3), leaf(g, 6, 3), leaf(g, 6)
    y = torch.randint(0, 6, (8,), generator=g)
    for other in (
        fused.linear_focal_loss(h, W, y, linear_bias=b, gamma=0.0),
        fused.linear_pick_all(h, W, y, linear_bias=b),
        fused.linear_pick_all(h, W, y[:, None], linear_bias=b),
        fused.linear_cross_entropy(
            h, W, y, linear_bias=b, weight=torch.ones(6, dtype=torch.float64)
        ),
        fused.linear_cross_entropy(h, W, y, linear_bias=b + 100.0),
        fused.linear_cross_entropy(h, W, y.to(torch.int32), linear_bias=b),
    ):
        agree(other, fused.linear_cross_entropy(h, W, y, linear_bias=b), [h, W], g)


def test_one_row_without_a_batch() -> None:
    g = torch.Generator().manual_seed(2)
    h, W = leaf(g, 3), leaf(g, 5, 3)
    for reduction in ("none", "mean", "sum"):
        for function in (
            fused.linear_cross_entropy,
            fused.linear_focal_loss,
            fused.linear_squared_error,
        ):
            assert function(h, W, torch.tensor(2), reduction=reduction).shape == ()
        ours = fused.linear_cross_entropy(h, W, torch.tensor(2), reduction=reduction)
        agree(
            ours, F.cross_entropy(F.linear(h, W), torch.tensor(2), reduction=reduction), [h, W], g
        )
        target = torch.rand(5, generator=g, dtype=torch.float64).softmax(0)
        ours = fused.linear_cross_entropy(h, W, target, reduction=reduction)
        agree(ours, F.cross_entropy(F.linear(h, W), target, reduction=reduction), [h, W], g)


def test_signature_is_that_of_torch() -> None:
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy to compare with")
    left, right = (
        list(inspect.signature(f).parameters.values()) for f in (fused.linear_cross_entropy, theirs)
    )
    assert [(p.name, p.kind, p.default) for p in left[: len(right)]] == [
        (p.name, p.kind, p.default) for p in right
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in left[len(right) :])


def test_torch_options_are_accepted() -> None:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this torch has no LinearCrossEntropyOptions")
    g = torch.Generator().manual_seed(3)
    h, W, y = leaf(g, 6, 3), leaf(g, 5, 3), torch.randint(0, 5, (6,), generator=g)
    ours = fused.linear_cross_entropy(
        h, W, y, options=options(batch_chunk_size=2, chunking_method=None)
    )
    torch.testing.assert_close(ours, fused.linear_cross_entropy(h, W, y), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("rows", [0, 4])
def test_a_mean_over_nothing_is_nan_with_zero_gradients_as_in_torch(
    rows: int, smoothing: float, weighted: bool
) -> None:
    g = torch.Generator().manual_seed(4)
    h, W = leaf(g, rows, 3), leaf(g, 5, 3)
    y = torch.full((rows,), -100)
    w = torch.rand(5, generator=g, dtype=torch.float64) if weighted else None
    shared: dict[str, Any] = {"weight": w, "label_smoothing": smoothing}
    for reduction in ("mean", "sum", "none"):
        ours = fused.linear_cross_entropy(h, W, y, reduction=reduction, **shared)
        theirs = F.cross_entropy(F.linear(h, W), y, reduction=reduction, **shared)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        for found in torch.autograd.grad(ours, (h, W), torch.ones_like(ours)):
            assert not found.any()


@pytest.mark.parametrize("out", [(), (2,)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("own", [[0.0, 0.0], [2.0, -2.0], [-2.0, 2.0]])
def test_class_weights_that_sum_to_zero_divide_by_it_as_in_torch(
    own: list[float], smoothing: float, out: tuple[int, ...]
) -> None:
    g = torch.Generator().manual_seed(4)
    h, W, b = leaf(g, 5, 3), leaf(g, 4, *out, 3), leaf(g, 4, *out)
    y = torch.tensor([0, 1, -100, 1, 0])
    y = torch.stack([y, y], 1) if out else y
    w = torch.tensor([*own, 1.0, 1.0], dtype=torch.float64)
    shared: dict[str, Any] = {"weight": w, "label_smoothing": smoothing}
    ours = fused.linear_cross_entropy(h, W, y, linear_bias=b, **shared)
    theirs = F.cross_entropy(dense_logits(h, W, b), y, **shared)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    found, truth = (torch.autograd.grad(loss, (h, W, b)) for loss in (ours, theirs))
    assert not found[0][2].any()  # the ignored row
    assert bool(found[0][[0, 1, 3, 4]].isnan().all())
    for gradient, other in zip(found, truth, strict=True):
        if (
            min(own) == 0.0
        ):  # with weights of both signs torch has some infinities in place of a NaN
            torch.testing.assert_close(gradient, other, equal_nan=True)
        assert torch.equal(gradient.isfinite(), other.isfinite())


@pytest.mark.parametrize("name", ["linear_focal_loss", "linear_squared_error"])
def test_class_weights_that_sum_to_zero_in_the_other_losses(name: str) -> None:
    g = torch.Generator().manual_seed(4)
    h, W, y = leaf(g, 3, 3), leaf(g, 4, 3), torch.tensor([0, 1, -100])
    for own in ([0.0, 0.0], [2.0, -2.0]):
        w = torch.tensor([*own, 1.0, 1.0], dtype=torch.float64)
        loss = getattr(fused, name)(h, W, y, weight=w)
        torch.testing.assert_close(
            loss, getattr(fused, name)(h, W, y, weight=w, reduction="sum") / 0.0, equal_nan=True
        )
        features, weight = torch.autograd.grad(loss, (h, W))
        assert bool(weight.isnan().all())
        assert bool(features[:2].isnan().all())
        assert not features[2].any()


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"weight": 1, "label_smoothing": 0.1}],
)
def test_an_ignored_row_may_hold_anything(options: dict[str, Any]) -> None:
    if "weight" in options:
        options = {**options, "weight": torch.arange(1.0, 6.0, dtype=torch.float64)}
    g = torch.Generator().manual_seed(5)
    h, W, y = leaf(g, 4, 3), leaf(g, 5, 3), torch.tensor([0, -100, 2, 3])
    spoilt = h.detach().clone()
    spoilt[1] = math.nan
    spoilt.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        ours = fused.linear_cross_entropy(spoilt, W, y, reduction=reduction, **options)
        theirs = fused.linear_cross_entropy(h, W, y, reduction=reduction, **options)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.ones_like(theirs)
        for a, b in zip(
            torch.autograd.grad(ours, (spoilt, W), upstream),
            torch.autograd.grad(theirs, (h, W), upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.ones(5), "label_smoothing": 0.1}]
)
@pytest.mark.parametrize("masked", [0, 4])
def test_an_ignored_row_loses_nothing_beside_a_masked_class(
    masked: int, options: dict[str, Any]
) -> None:
    g = torch.Generator().manual_seed(5)
    h, W, y = (
        torch.randn(4, 3, generator=g),
        torch.randn(5, 3, generator=g),
        torch.tensor([1, -100, 2, 3]),
    )
    bias = torch.zeros(5).index_fill(0, torch.tensor([masked]), -math.inf)
    for reduction in ("none", "sum", "mean"):
        theirs = F.cross_entropy(F.linear(h, W, bias), y, reduction=reduction, **options)
        torch.testing.assert_close(
            fused.linear_cross_entropy(h, W, y, linear_bias=bias, reduction=reduction, **options),
            theirs,
        )


def test_all_sampled_classes_may_be_masked() -> None:
    """What is left then lies at the end of the range, and must have its own offset."""
    g = torch.Generator().manual_seed(5)
    h, W = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((20, 40), (128, 40)))
    y, bias = torch.arange(1, 128, 2)[:20], torch.full((128,), -math.inf)
    bias[1::2] = -110.0
    losses = (
        fused.linear_cross_entropy(h, W, y, linear_bias=bias),
        F.cross_entropy(F.linear(h.double(), W.double(), bias.double()), y),
    )
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-6, atol=0.0)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (h, W)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [2, 1])
def test_a_bias_that_has_diverged_does_not_pass_for_a_fit(target: int) -> None:
    """Its class leads by infinitely much: no loss, taken literally, but torch gives NaN, which is
    what watchers look for.
    """
    g = torch.Generator().manual_seed(5)
    h, W, bias = leaf(g, 4, 3), leaf(g, 5, 3), torch.zeros(5, dtype=torch.float64)
    bias[2] = math.inf
    loss = fused.linear_cross_entropy(h, W, torch.full((4,), target), linear_bias=bias)
    assert bool(loss.isnan())
    assert all(bool(x.isnan().any()) for x in torch.autograd.grad(loss, (h, W)))


def test_an_ignored_row_may_hold_anything_in_second_derivatives_too() -> None:
    g = torch.Generator().manual_seed(5)
    h, W, y = leaf(g, 4, 3), leaf(g, 5, 3), torch.tensor([0, -100, 2, 3])
    spoilt = h.detach().clone()
    spoilt[1] = math.nan
    spoilt.requires_grad_()
    found = []
    for features in (spoilt, h):
        (gradient,) = torch.autograd.grad(
            fused.linear_cross_entropy(features, W, y), W, create_graph=True
        )
        found.append(torch.autograd.grad(gradient.square().sum(), (features, W)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "linear_focal_loss", "linear_squared_error"]
)
def test_a_row_of_class_weight_0_may_hold_anything(name: str, reduction: str) -> None:
    """To the second order; in torch 0 times NaN is NaN."""
    g = torch.Generator().manual_seed(5)
    h, W, y = leaf(g, 4, 3), leaf(g, 5, 3), torch.tensor([0, 1, 2, 3])
    w = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    spoilt = h.detach().clone()
    spoilt[1] = math.nan
    spoilt.requires_grad_()
    found = []
    for features in (spoilt, h):
        loss = getattr(fused, name)(features, W, y, weight=w, reduction=reduction).sum()
        first = torch.autograd.grad(loss, (features, W), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (features, W))
        found.append((loss, *first, *second))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_target_that_alone_is_possible(classes: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    h, W = leaf(g, 3, 4, dtype=dtype), leaf(g, classes, 4, dtype=dtype)
    bias = torch.full((classes,), -math.inf, dtype=dtype)
    bias[0] = 0.0
    for y in (torch.tensor([0, 0, 0]), torch.tensor([0, -100, 0])):
        loss = fused.linear_cross_entropy(h, W, y, linear_bias=bias)
        assert loss.item() == 0.0
        assert not any(bool(x.any()) for x in torch.autograd.grad(loss, (h, W)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_and_expanded_tensors(reduction: str) -> None:
    g = torch.Generator().manual_seed(6)
    h = leaf(g, 3, 8).T[::2]
    expanded = leaf(g, 1, 3).expand(4, 3)
    W = leaf(g, 3, 5).T
    b = leaf(g, 1).expand(5)
    y, one = torch.randint(0, 5, (8,), generator=g)[::2], torch.tensor([3]).expand(4)
    for features, labels in ((h, y), (expanded, one)):
        ours = fused.linear_cross_entropy(features, W, labels, linear_bias=b, reduction=reduction)
        theirs = F.cross_entropy(F.linear(features, W, b), labels, reduction=reduction)
        agree(ours, theirs, [features, W, b], g)
    for function in (fused.linear_focal_loss, fused.linear_squared_error, fused.linear_pick_all):
        a = function(expanded, W, one, linear_bias=b, reduction=reduction)
        c = function(
            expanded.contiguous(),
            W.contiguous(),
            one.contiguous(),
            linear_bias=b.contiguous(),
            reduction=reduction,
        )
        torch.testing.assert_close(a, c, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "linear_focal_loss", "linear_squared_error", "linear_pick_all"]
)
def test_lower_precision(dtype: torch.dtype, name: str) -> None:
    """Value and gradients are those of the rounded inputs in float64, rounded once: 4 units of the
    dtype.
    """
    g = torch.Generator().manual_seed(7)
    h, W, b = (leaf(g, *shape, dtype=dtype) for shape in ((40, 16), (30, 16), (30,)))
    y = torch.randint(0, 30, (40,), generator=g)
    ours = getattr(fused, name)(h, W, y, linear_bias=b)
    exact = [x.detach().double().requires_grad_() for x in (h, W, b)]
    theirs = getattr(fused, name)(exact[0], exact[1], y, linear_bias=exact[2])
    assert ours.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert abs(float(ours.detach()) - float(theirs.detach())) <= 4 * unit * float(theirs.detach())
    pairs = zip(
        torch.autograd.grad(ours, (h, W, b)), torch.autograd.grad(theirs, exact), strict=True
    )
    for found, truth in pairs:
        assert found.dtype == dtype
        assert float((found.double() - truth).norm()) <= 4 * unit * float(truth.norm())


def terminal(
    margin: float, dtype: torch.dtype, K: int = 12, d: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and weights near a simplex, each target about ``margin`` nats above the other
    classes.
    """
    g = torch.Generator().manual_seed(8)
    frame = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q[:K]
    W = frame + 1e-3 * torch.randn(K, d, generator=g, dtype=torch.float64)
    y = torch.arange(K).repeat(2)
    h = margin * frame[y] + 1e-2 * torch.randn(2 * K, d, generator=g, dtype=torch.float64)
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), y


@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_digits_in_the_terminal_phase(margin: float, dtype: torch.dtype, tol: float) -> None:
    """Value and gradients of log1p(sum exp(z_k - z_y)) in long double, where log-sum-exp of this
    dtype has no digit.
    """
    np = pytest.importorskip("numpy")
    h, W, y = terminal(margin, dtype)
    H, V = (x.detach().double().numpy().astype(np.longdouble) for x in (h, W))
    z = H @ V.T
    E = np.exp(z - z[np.arange(len(y)), y.numpy()][:, None])
    E[np.arange(len(y)), y.numpy()] = 0
    s = E.sum(1)
    G = E / (1 + s)[:, None]
    G[np.arange(len(y)), y.numpy()] = -s / (1 + s)
    each = fused.linear_cross_entropy(h, W, y, reduction="none")
    total = fused.linear_cross_entropy(h, W, y, reduction="sum")
    relative = np.abs(each.detach().double().numpy() - np.log1p(s)) / np.log1p(s)
    assert float(relative.max()) < tol
    assert abs(float(total.detach()) / float(np.log1p(s).sum()) - 1) < tol
    for losses in (total, each):
        found = torch.autograd.grad(losses, (h, W), torch.ones_like(losses))
        for gradient, truth in zip(found, (G @ V, G.T @ H), strict=True):
            error = np.linalg.norm(
                (gradient.double().numpy() - truth).astype(float)
            ) / np.linalg.norm(truth.astype(float))
            assert error < tol
    if dtype == torch.float32:  # what makes the point: torch's own has lost it all
        dense = F.cross_entropy(F.linear(h, W), y, reduction="sum")
        assert abs(float(dense.detach()) / float(np.log1p(s).sum()) - 1) > 1e-2


def test_hostile_logits_are_finite() -> None:
    h = torch.tensor([[1e4, 0.0], [0.0, 1e4]], dtype=torch.float32, requires_grad=True)
    W = torch.eye(2, dtype=torch.float32, requires_grad=True)
    for function in (fused.linear_cross_entropy, fused.linear_focal_loss):
        for y in (torch.tensor([0, 1]), torch.tensor([1, 0])):
            loss = function(h, W, y)
            assert math.isfinite(float(loss.detach()))
            assert all(bool(torch.isfinite(x).all()) for x in torch.autograd.grad(loss, (h, W)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_impossible_target_is_an_infinite_loss_as_in_torch(
    smoothing: float, weighted: bool
) -> None:
    h, W, y = torch.ones(2, 3).double(), torch.ones(4, 3).double(), torch.tensor([0, 1])
    options = {
        "linear_bias": torch.tensor([-math.inf, 0.0, 0.0, 0.0]).double(),
        "label_smoothing": smoothing,
    }
    options["weight"] = torch.ones(4).double() if weighted else None
    found = fused.linear_cross_entropy(h, W, y, reduction="none", **options)
    logits = F.linear(h, W, options["linear_bias"])
    expected = F.cross_entropy(
        logits, y, reduction="none", label_smoothing=smoothing, weight=options["weight"]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_focal_loss_of_an_impossible_target_pulls_like_the_cross_entropy(gamma: float) -> None:
    h, W, y = (
        torch.ones(1, 3).double().requires_grad_(),
        torch.ones(4, 3).double().requires_grad_(),
        torch.tensor([0]),
    )
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0]).double()
    focal, entropy = (
        torch.autograd.grad(loss, (h, W))
        for loss in (
            fused.linear_focal_loss(h, W, y, linear_bias=bias, gamma=gamma),
            fused.linear_cross_entropy(h, W, y, linear_bias=bias),
        )
    )
    for found, expected in zip(focal, entropy, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_example_trains_a_classifier_as_torch_does() -> None:
    pytest.importorskip("sklearn")
    path = pathlib.Path(__file__).parents[2] / "examples" / "train_classifier.py"
    spec = importlib.util.spec_from_file_location("train_classifier", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    data = example.data()
    ours, accuracy, features, head = example.train(example.linear_cross_entropy, *data, epochs=5)
    theirs, *_ = example.train(example.torch_loss, *data, epochs=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert accuracy > 0.9
    example.digits_kept(features, data[1], head)
