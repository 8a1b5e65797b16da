"""The drop-in losses inside torch: opcheck, first and second derivatives, torch.func,
torch.compile, autocast, graph reuse.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ufm_fast import functional as fused
from ufm_fast.errors import InputError
from ufm_fast.functional import head_inputs, labels, operators, rules, target_sets
from ufm_fast.losses import make_loss
from ufm_fast.targets import Targets

# torch's own, when forward mode is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")
N, K, D = 6, 5, 3


def leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(1, N, D, dtype=dtype), leaf(2, K, D, dtype=dtype), leaf(3, K, dtype=dtype)


LABELS = torch.tensor([0, 4, 2, -100, 2, 1])
SETS = Targets(torch.tensor([0, 4, 2, 1, 3, 2, 1, 0, 2]), torch.tensor([0, 2, 3, 5, 6, 7, 9]))
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.3, 0.7], dtype=torch.float64)

LOSS_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "ce": lambda h, W, b, r: fused.linear_cross_entropy(h, W, LABELS, linear_bias=b, reduction=r),
    "ce-weighted-smooth": lambda h, W, b, r: fused.linear_cross_entropy(
        h, W, LABELS, linear_bias=b, reduction=r, weight=WEIGHT, label_smoothing=0.2
    ),
    "focal": lambda h, W, b, r: fused.linear_focal_loss(
        h, W, LABELS, linear_bias=b, reduction=r, weight=WEIGHT
    ),
    "pick-all": lambda h, W, b, r: fused.linear_pick_all(h, W, SETS, linear_bias=b, reduction=r),
    "mse": lambda h, W, b, r: fused.linear_squared_error(h, W, LABELS, linear_bias=b, reduction=r),
}
KEPT = LABELS != -100


def dense_loss(name: str, h: Tensor, W: Tensor, b: Tensor, reduction: str) -> Tensor:
    """The textbook form of LOSS_FUNCTIONS[name], by torch's own operations on the logits."""
    z, y = F.linear(h, W, b), LABELS.clamp_min(0)
    if name.startswith("ce"):
        options: dict[str, Any] = (
            {"weight": WEIGHT, "label_smoothing": 0.2} if name == "ce-weighted-smooth" else {}
        )
        return F.cross_entropy(z, LABELS, reduction=reduction, **options)
    factor = (
        torch.ones(N, dtype=torch.float64)
        if name == "pick-all"
        else KEPT * (WEIGHT[y] if name == "focal" else 1.0)
    )
    each = factor * make_loss(name).dense(z, SETS if name == "pick-all" else y)
    return {"none": each, "sum": each.sum(), "mean": each.sum() / factor.sum()}[reduction]


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    f"{name}-{reduction}": (lambda h, W, b, f=function, r=reduction: f(h, W, b, r))  # type: ignore[misc]
    for name, function in LOSS_FUNCTIONS.items()
    for reduction in ("none", "mean")
}
case = pytest.mark.parametrize("name", list(CASES))


@case
def test_first_and_second_derivatives(name: str) -> None:
    assert torch.autograd.gradcheck(CASES[name], parts())
    assert torch.autograd.gradgradcheck(CASES[name], parts())


def test_derivatives_of_a_many_headed_loss() -> None:
    y = torch.tensor([[0, 1], [2, 3], [4, -100]])

    def function(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return fused.linear_cross_entropy(h, W, y, linear_bias=b, label_smoothing=0.1)

    inputs = leaf(1, 3, 2), leaf(2, 5, 2, 2), leaf(3, 5, 2)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


ROWS = torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
CLEAN = LABELS.clamp_min(0)


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    h, W, b = parts()
    fixed = [x.detach() for x in (h, W, b)]
    direction = [x.detach() for x in (leaf(5, N, D), leaf(6, K, D), leaf(7, K))]
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "labels": (labels.checked_labels, (LABELS, K, -100)),
        "sets": (target_sets.checked_csr, (SETS.indptr, SETS.indices, K)),
    }
    weighted = {"weighted": WEIGHT}
    for name, parameter in (
        ("ce", 0.1),
        ("weighted", 0.1),
        ("focal", 2.0),
        ("pick-all", 0.0),
        ("mse", 0.0),
    ):
        loss = "ce" if name == "weighted" else name
        targets = (
            *((SETS.indices, SETS.indptr) if loss == "pick-all" else (CLEAN, None)),
            weighted.get(name),
        )
        rows = ROWS.clone().requires_grad_()
        calls[f"head-{name}"] = (
            operators.head,
            (h, W, b, *targets, rows, loss, parameter, [True] * 3),
        )
        calls[f"losses-{name}"] = operators.head_losses, (h, W, b, *targets, loss, parameter)
        calls[f"product-{name}"] = (
            operators.head_product,
            (*fixed, *targets, ROWS, *direction, loss, parameter, [True] * 3),
        )
        calls[f"slopes-{name}"] = (
            operators.head_slopes,
            (*fixed, *targets, *direction, loss, parameter),
        )
    calls["head-frozen"] = (
        operators.head,
        (h, fixed[1], None, CLEAN, None, None, ROWS, "ce", 0.0, [True, False, False]),
    )
    calls["product-partial"] = (
        operators.head_product,
        (
            *fixed,
            CLEAN,
            None,
            None,
            ROWS,
            direction[0],
            None,
            None,
            "ce",
            0.0,
            [False, True, False],
        ),
    )
    return calls


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch 2.14 looks at it while it copies what it checks
@pytest.mark.parametrize("name", list(operator_calls()))
def test_opcheck(name: str) -> None:
    operator, arguments = operator_calls()[name]
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_row_weights_have_derivatives_too() -> None:
    h, W, b = parts()
    rows = ROWS.clone().requires_grad_()

    def value(h: Tensor, W: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        result: Tensor = operators.head(h, W, b, CLEAN, None, None, rows, "ce", 0.1, [True] * 3)[0]
        return result

    assert torch.autograd.gradcheck(value, (h, W, b, rows))
    assert torch.autograd.gradgradcheck(value, (h, W, b, rows))


@case
def test_func_grad_and_its_nesting(name: str) -> None:
    """torch.func.grad equals autograd, and a gradient of a gradient equals the double backward."""
    h, W, b = parts()
    loss = lambda h, W, b: CASES[name](h, W, b).sum()  # noqa: E731
    expected = torch.autograd.grad(loss(h, W, b), (h, W, b), create_graph=True)
    fixed = tuple(x.detach() for x in (h, W, b))
    for found, truth in zip(
        torch.func.grad(loss, argnums=(0, 1, 2))(*fixed), expected, strict=True
    ):
        torch.testing.assert_close(found, truth)
    nested = torch.func.grad(
        lambda h: torch.func.grad(loss, argnums=1)(h, fixed[1], fixed[2]).square().sum()
    )(fixed[0])
    (truth,) = torch.autograd.grad(expected[1].square().sum(), h)
    torch.testing.assert_close(nested, truth)


@pytest.mark.parametrize(
    "of",
    [
        lambda loss, h, W, y: vmap(lambda h, y: loss(h, W, y))(h, y),
        lambda loss, h, W, y: vmap(
            lambda h, y: loss(h, W, y, reduction="none", label_smoothing=0.1)
        )(h, y),
        lambda loss, h, W, y: vmap(vmap(lambda h, y: loss(h[None], W, y[None])))(h, y),
        lambda loss, h, W, y: vmap(grad(lambda W, h, y: loss(h, W, y)), in_dims=(None, 0, 0))(
            W, h, y
        ),
        lambda loss, h, W, y: grad(lambda W: vmap(lambda h, y: loss(h, W, y))(h, y).sum())(W),
        lambda loss, h, W, y: jacrev(lambda W: loss(h[0], W, y[0], reduction="none"))(W),
        lambda loss, h, W, y: jacrev(jacrev(lambda W: loss(h[0], W, y[0])))(W),
    ],
    ids=[
        "batch",
        "rows",
        "nested",
        "gradients of samples",
        "gradient of a batch",
        "jacobian",
        "hessian",
    ],
)
def test_vmap(of: Callable[..., Tensor]) -> None:
    g = torch.Generator().manual_seed(8)
    h, W = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 4, 5), (7, 5)))
    y = torch.randint(7, (3, 4), generator=g)

    def dense(h: Tensor, W: Tensor, y: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(h @ W.T, y, **options)

    torch.testing.assert_close(of(fused.linear_cross_entropy, h, W, y), of(dense, h, W, y))


def dual_tangent(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value = function(*(forward_ad.make_dual(x, torch.cos(x.detach())) for x in leaves))
        tangent: Tensor = forward_ad.unpack_dual(value).tangent
    return tangent


def gradient_tangent(function: Callable[..., Tensor], h: Tensor, W: Tensor, b: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value = function(forward_ad.make_dual(h, torch.cos(h.detach())), W, b).square().sum()
        (gradient,) = torch.autograd.grad(value, W, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent.detach()


def gradient_tangent_alone(
    function: Callable[..., Tensor], h: Tensor, W: Tensor, b: Tensor
) -> Tensor:
    """Of the gradient of a sum, whose upstream is 1 and has no tangent, and nobody asks for a
    graph.
    """
    with forward_ad.dual_level():
        value = function(forward_ad.make_dual(h, torch.cos(h.detach())), W, b).sum()
        (gradient,) = torch.autograd.grad(value, W)
        return forward_ad.unpack_dual(gradient).tangent


@torch.no_grad()
def no_graph(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    return dual_tangent(function, *leaves)


#: Ways to a derivative in which some part goes forward; each takes the loss and (h, W, b).
FORWARD: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, *x: jvp(f, x, tuple(torch.cos(v) for v in x)),
    "jvp of one part": lambda f, h, W, b: jvp(lambda W: f(h, W, b), (W,), (torch.cos(W),)),
    "jacfwd": lambda f, *x: jacfwd(f, (0, 1, 2))(*x),
    "hessian": lambda f, *x: hessian(f, (0, 1, 2))(*x),
    "reverse over forward": lambda f, *x: jacrev(jacfwd(f), 1)(*x),
    "jvp of grad": lambda f, *x: jvp(
        grad(lambda *x: f(*x).square().sum()), x, tuple(torch.cos(v) for v in x)
    ),
    "grad of jvp": lambda f, *x: grad(
        lambda *x: jvp(f, x, tuple(torch.cos(v) for v in x))[1].square().sum(), 1
    )(*x),
    "linearize": lambda f, h, W, b: linearize(lambda W: f(h, W, b), W)[1](torch.cos(W)),
    "vmap of jvp": lambda f, h, W, b: vmap(lambda v: jvp(lambda h: f(h, W, b), (h,), (v,))[1])(
        torch.stack([h, h.cos()])
    ),
    "dual": dual_tangent,
    "dual without a graph": no_graph,
    "dual of a gradient": gradient_tangent,
    "dual of a gradient without a graph": gradient_tangent_alone,
    "jacobian": lambda f, h, W, b: torch.autograd.functional.jacobian(
        lambda W: f(h, W, b), W, vectorize=True, strategy="forward-mode"
    ),
    "autograd's hessian": lambda f, h, W, b: torch.autograd.functional.hessian(
        lambda W: f(h, W, b).sum(), W, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Attempted to insert")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", list(LOSS_FUNCTIONS))
@pytest.mark.parametrize("way", list(FORWARD))
def test_forward_mode(way: str, name: str, reduction: str) -> None:
    leaves = parts() if way.startswith("dual of a gradient") else tuple(x.detach() for x in parts())
    found = FORWARD[way](lambda h, W, b: LOSS_FUNCTIONS[name](h, W, b, reduction), *leaves)
    dense = lambda h, W, b: dense_loss(name, h, W, b, reduction)  # noqa: E731
    # The dense forms of some losses ask for numbers, which linearize's tracer refuses.
    truth = (
        FORWARD["jvp of one part"](dense, *leaves)[1]
        if way == "linearize"
        else FORWARD[way](dense, *leaves)
    )
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSS_FUNCTIONS))
def test_forward_over_forward(name: str) -> None:
    leaves = tuple(x.detach() for x in parts())
    found = jacfwd(jacfwd(lambda h, W, b: LOSS_FUNCTIONS[name](h, W, b, "mean"), 0), 1)(*leaves)
    truth = jacfwd(jacfwd(lambda h, W, b: dense_loss(name, h, W, b, "mean"), 0), 1)(*leaves)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
    with pytest.raises(NotImplementedError, match="single rows, both in forward mode"):
        jacfwd(jacfwd(lambda h, W, b: LOSS_FUNCTIONS[name](h, W, b, "none"), 0), 1)(*leaves)


@pytest.mark.parametrize("name", ["ce", "mse"])
def test_gradcheck_in_forward_mode(name: str) -> None:
    """torch's own judge, for half of it forward over reverse; tangents of row weights too."""
    h, W, b = parts()
    rows = ROWS.clone().requires_grad_()

    def value(h: Tensor, W: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        result: Tensor = rules.value_and_gradients(
            h, W, b, CLEAN, None, None, rows, name, 0.0, [True] * 3
        )[0]
        return result

    assert torch.autograd.gradcheck(
        value, (h, W, b, rows), check_forward_ad=True, check_backward_ad=False
    )
    assert torch.autograd.gradgradcheck(value, (h, W, b, rows), check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode_in_lower_precision(dtype: torch.dtype, reduction: str) -> None:
    low = tuple(x.detach() for x in parts(dtype))
    wide = tuple(x.double() for x in low)
    function = lambda h, W, b: LOSS_FUNCTIONS["ce"](h, W, b, reduction)  # noqa: E731
    found, truth = (jvp(function, x, x) for x in (low, wide))
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", list(LOSS_FUNCTIONS))
def test_the_older_functional_interface(name: str, reduction: str) -> None:
    """Its hvp and jvp differentiate a Hessian product in the direction, in which it is linear: that
    is no third derivative.
    """
    leaves, moves = tuple(x.detach() for x in parts()), tuple(torch.rand_like(x) for x in parts())
    ours = lambda h, W, b: LOSS_FUNCTIONS[name](h, W, b, reduction).sum()  # noqa: E731
    dense = lambda h, W, b: dense_loss(name, h, W, b, reduction).sum()  # noqa: E731
    for way in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        torch.testing.assert_close(
            way(ours, leaves, moves)[1], way(dense, leaves, moves)[1], rtol=1e-10, atol=1e-12
        )
    slopes = (
        torch.autograd.functional.jvp(torch.func.grad(f, (0, 1, 2)), leaves, moves)[1]
        for f in (ours, dense)
    )
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


def test_third_derivatives_in_forward_mode_are_refused_in_words() -> None:
    h, W, b = (x.detach() for x in parts())
    with pytest.raises(NotImplementedError, match="third derivatives"):
        jacfwd(hessian(lambda h: CASES["ce-mean"](h, W, b)))(h)


def test_third_derivatives_are_refused_in_words() -> None:
    h, W, b = parts()
    (first,) = torch.autograd.grad(CASES["ce-mean"](h, W, b), h, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), h, create_graph=True)
    for again in (
        lambda x: torch.autograd.grad(x, h, retain_graph=True),
        lambda x: x.backward(retain_graph=True),
    ):
        with pytest.raises(NotImplementedError, match="third derivatives"):
            again(second.square().sum())
    direction = torch.rand_like(h).requires_grad_()
    (first,) = torch.autograd.grad(CASES["ce-mean"](h, W, b), h, create_graph=True)
    (linear,) = torch.autograd.grad(first, h, direction, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="third derivatives"
    ):  # of the direction alone it would be the second
        torch.autograd.grad(linear.sum(), (direction, h))


@case
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")
    ours, theirs = parts(), parts()
    upstream = torch.rand(CASES[name](*theirs).shape, dtype=torch.float64)
    for leaves, function in ((ours, compiled), (theirs, CASES[name])):
        function(*leaves).backward(upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch.compile itself
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", list(LOSS_FUNCTIONS))
def test_compiles_inside_transforms(name: str, reduction: str) -> None:
    h, W, b = (x.detach() for x in parts())
    loss = lambda h, W, b: LOSS_FUNCTIONS[name](h, W, b, reduction)  # noqa: E731
    gradients = [grad(lambda h, W, b: loss(h, W, b).square().sum(), of) for of in (1, (0, 1, 2))]
    for transform, *arguments in (
        *((gradient, h, W, b) for gradient in gradients),
        (vmap(lambda W: loss(h, W, b)), torch.stack([W, W + 1.0])),
    ):
        torch.compiler.reset()
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(*arguments), transform(*arguments), rtol=1e-12, atol=1e-14
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_forward_mode_is_refused_rather_than_wrong() -> None:
    """torch.compile knows no jvp of a Function; without fullgraph it falls back to eager code,
    which does.
    """
    h, W, b = (x.detach() for x in parts())
    derivative = lambda W: jvp(lambda W: CASES["ce-mean"](h, W, b), (W,), (W,))[1]  # noqa: E731
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(derivative, fullgraph=True, backend="aot_eager")(W)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(derivative, backend="aot_eager")(W), derivative(W))


def test_compiles_with_a_dynamic_batch_and_checks_labels_there() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        fused.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True
    )
    _, W, _ = parts()
    for rows in (4, 7, 9):
        h, y = leaf(rows, rows, D), torch.arange(rows) % K
        torch.testing.assert_close(compiled(h, W, y), F.cross_entropy(F.linear(h, W), y))
    with pytest.raises(ValueError, match="target must lie in"):
        compiled(leaf(1, 4, D), W, torch.tensor([0, 1, 2, K]))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_torch_does(compiled: bool) -> None:
    h, W, b = parts(torch.float32)
    function = fused.linear_cross_entropy
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = function(h, W, LABELS, linear_bias=b)
        mixed = fused.linear_cross_entropy(h.bfloat16(), W, LABELS, linear_bias=b)
        wide = fused.linear_cross_entropy(h.double(), W.double(), LABELS)
    rounded = [x.detach().bfloat16().double() for x in (h, W, b)]
    truth = F.cross_entropy(F.linear(*rounded), LABELS)
    assert (ours.dtype, mixed.dtype, wide.dtype) == (torch.float32, torch.float32, torch.float64)
    for found in (ours, mixed):  # the loss itself is not rounded to bfloat16
        assert abs(float(found.detach()) - float(truth)) < 1e-6
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(ours, (h, W, b)))


def test_autocast_leaves_the_sums_alone() -> None:
    """With float32 inputs given to the operator itself, autocast around it changes nothing."""
    h, W, _ = parts(torch.float32)
    for class_weight in (None, WEIGHT):
        arguments = (h, W, None, CLEAN, None, class_weight, ROWS, "ce", 0.1, [True, True, False])
        plain = operators.head(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for a, b in zip(operators.head(*arguments), plain, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_kept_graph_gives_the_same_gradient_again(factor: float) -> None:
    """Gradient buffers are handed over to the caller, who may overwrite them: never while the graph
    is to be used again.
    """
    h, W, b = parts()
    loss = CASES["ce-mean"](h, W, b) * factor
    loss.backward(retain_graph=True)
    assert W.grad is not None
    first = W.grad.clone()
    W.grad.zero_()
    h.grad = b.grad = None
    loss.backward(retain_graph=True)
    torch.testing.assert_close(W.grad, first, rtol=0, atol=0)
    (again,) = torch.autograd.grad(loss, W)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not again.requires_grad


def test_gradients_are_handed_over_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []
    scaled = rules._scaled

    def spy(upstream: Tensor, gradient: Tensor, own: bool) -> Tensor:
        result = scaled(upstream, gradient, own)
        handed.append((gradient.data_ptr(), result.data_ptr()))
        return result

    monkeypatch.setattr(rules, "_scaled", spy)
    for factor in (1.0, 3.0):
        h, W, b = parts()
        (CASES["ce-mean"](h, W, b) * factor).backward()
        assert all(before == after for before, after in handed)
        assert W.grad is not None
        assert W.grad.data_ptr() in [after for _, after in handed]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", list(LOSS_FUNCTIONS))
def test_checkpointing_changes_no_derivative(name: str, reduction: str) -> None:
    """Inside and outside of a checkpoint, which hands out each saved tensor once, to the second
    order.
    """

    def inside(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return LOSS_FUNCTIONS[name](torch.tanh(h), W, b, reduction).square().sum()

    def penalised(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        loss = inside(h, W, b)
        return loss + sum(
            g.square().sum() for g in torch.autograd.grad(loss, (h, W, b), create_graph=True)
        )

    def kept(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        result: Tensor = checkpoint(function, *leaves, use_reentrant=False)
        return result

    leaves = parts()
    for function in (inside, penalised):
        expected = torch.autograd.grad(function(*leaves), leaves)
        for found, truth in zip(
            torch.autograd.grad(kept(function, *leaves), leaves), expected, strict=True
        ):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)
    gradients = torch.autograd.grad(kept(inside, *leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    gradients = torch.autograd.grad(inside(*leaves), leaves, create_graph=True)
    for found, truth in zip(
        second, torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", list(LOSS_FUNCTIONS))
def test_batched_gradients(name: str, reduction: str) -> None:
    """The vmap of torch.autograd, which is another than torch.func's, over upstreams of the first
    and the second order.
    """
    leaves = parts()
    for order in (1, 2):
        found = []
        for function in (
            lambda: LOSS_FUNCTIONS[name](*leaves, reduction),
            lambda: dense_loss(name, *leaves, reduction),
        ):
            value = function()
            if order == 2:
                (value,) = torch.autograd.grad(value.square().sum(), leaves[1], create_graph=True)
            g = torch.Generator().manual_seed(9)
            upstream = torch.randn(3, *value.shape, generator=g, dtype=torch.float64)
            found.append(torch.autograd.grad(value, leaves, upstream, is_grads_batched=True))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    jacobians = [
        torch.autograd.functional.jacobian(f, leaves, vectorize=True)
        for f in (
            lambda *x: LOSS_FUNCTIONS[name](*x, reduction),
            lambda *x: dense_loss(name, *x, reduction),
        )
    ]
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-10, atol=1e-12)


def test_hooks_on_saved_tensors_keep_what_they_saw() -> None:
    """A gradient is scaled in place only where nobody else can hold it."""
    seen: list[Tensor] = []
    leaves = parts()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (seen.append(x), x)[1], lambda x: x):
        loss = CASES["ce-mean"](*leaves)
    before = [x.detach().clone() for x in seen]
    (loss * 3.0).backward()
    assert len(seen) >= 6
    for after, first in zip(seen, before, strict=True):
        assert torch.equal(after, first)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_costs_no_product(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, ...]] = []
    backend = head_inputs.backend_for("cpu", torch.float64)
    head = backend.head
    monkeypatch.setattr(
        backend,
        "head",
        lambda x, out, **k: (
            seen.append(tuple(g is not None for g in (out.features, out.weight, out.bias))),
            head(x, out, **k),
        )[1],
    )
    leaves = list(parts())
    leaves[frozen] = leaves[frozen].detach()
    loss = CASES["ce-mean"](*leaves)  # type: ignore[arg-type]
    loss.backward()
    assert seen == [tuple(i != frozen for i in range(3))]
    assert leaves[frozen].grad is None
    with torch.no_grad():
        CASES["ce-mean"](*leaves)  # type: ignore[arg-type]
    assert seen[-1] == (False, False, False)


def test_one_sweep_forward_and_none_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = []
    backend = head_inputs.backend_for("cpu", torch.float64)
    for name in ("head", "losses", "head_hvp", "logit_gradient"):
        method = getattr(backend, name)
        monkeypatch.setattr(
            backend, name, lambda *a, m=method, n=name, **k: (sweeps.append(n), m(*a, **k))[1]
        )
    CASES["ce-mean"](*parts()).backward()
    assert sweeps == ["head"]


@pytest.mark.parametrize("loss", ["ce", "mse", "pick-all"])
def test_targets_end_with_the_last_reference_to_them(loss: str) -> None:
    """What is remembered of targets hangs on their tensor and must not hold it: the collector may
    be off.
    """
    h, W, b = (x.detach() for x in parts())
    indices, indptr = (
        (SETS.indices.clone(), SETS.indptr) if loss == "pick-all" else (CLEAN.clone(), None)
    )
    operators.head(
        h, W, b, indices.clone(), indptr, None, ROWS, loss, 0.0, [True] * 3
    )  # what torch sets up once holds its arguments
    gone = weakref.ref(indices)
    gc.disable()
    try:
        for _ in range(4):
            operators.head(h, W, b, indices, indptr, None, ROWS, loss, 0.0, [True] * 3)
        del indices
        assert gone() is None
    finally:
        gc.enable()


def test_shapes_are_inferred_without_data() -> None:
    h, W, y = (
        torch.empty(4, 3, device="meta"),
        torch.empty(5, 3, device="meta"),
        torch.empty(4, device="meta").long(),
    )
    assert fused.linear_cross_entropy(h, W, y).shape == ()
    assert fused.linear_cross_entropy(h, W, y, reduction="none").shape == (4,)


def test_a_penalty_on_the_gradient_through_a_network() -> None:
    """A penalty on the gradient, as in training: the double backward reaches what lies before the
    head.
    """
    x, V, W = leaf(1, N, 4), leaf(2, D, 4), leaf(3, K, D)

    def penalised(V: Tensor, W: Tensor, fast: bool) -> Tensor:
        h = torch.tanh(x.detach() @ V.T)
        loss = (
            fused.linear_cross_entropy(h, W, CLEAN)
            if fast
            else F.cross_entropy(F.linear(h, W), CLEAN)
        )
        (gradient,) = torch.autograd.grad(loss.square(), W, create_graph=True)
        return loss + gradient.square().sum()

    ours = torch.autograd.grad(penalised(V, W, True), (V, W))
    for found, truth in zip(ours, torch.autograd.grad(penalised(V, W, False), (V, W)), strict=True):
        torch.testing.assert_close(found, truth)


def test_vmap_over_target_sets_is_refused_in_words() -> None:
    h, W, y = (
        torch.randn(3, 5, 4).double(),
        torch.randn(6, 4).double(),
        torch.zeros(3, 5, 1, dtype=torch.long),
    )
    with pytest.raises(InputError, match="target must not be mapped over"):
        vmap(lambda h, y: fused.linear_pick_all(h, W, y))(h, y)
    with pytest.raises(InputError, match="target must not be mapped over"):
        vmap(grad(lambda h, y: fused.linear_pick_all(h, W, y)))(h, y)
    single = vmap(lambda h, y: fused.linear_pick_all(h, W, y))(h, y[..., 0])
    torch.testing.assert_close(single, torch.stack([fused.linear_pick_all(x, W, y[0]) for x in h]))
    expected = torch.stack([fused.linear_pick_all(x, W, y[0]) for x in h])
    torch.testing.assert_close(vmap(lambda h: fused.linear_pick_all(h, W, y[0]))(h), expected)
