"""The modules: UFM under every kind of optimiser reaches what theory says, and the loss module is
torch's.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.nn import functional as F  # noqa: N812

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import head_inputs, linear_cross_entropy
from ufm_fast.losses import LOSSES
from ufm_fast.nn import UFM, LinearCrossEntropyLoss
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.targets import Targets, TargetSets


def entropy_minimum(K: int, n: int, lambda_w: float, lambda_h: float) -> float:
    """Minimum of the balanced cross-entropy problem: the entropy of (1 - (K-1) s, s, ..., s), s =
    sqrt(n lambda_w lambda_h).
    """
    s = math.sqrt(n * lambda_w * lambda_h)
    top = 1 - (K - 1) * s
    return -top * math.log(top) - (K - 1) * s * math.log(s)


def problem(**changes: Any) -> Problem:
    settings: dict[str, Any] = {
        "dim": 6,
        "classes": 5,
        "per_class": 3,
        "lambda_w": 5e-3,
        "lambda_h": 5e-3,
    } | changes
    return Problem(**settings)


@pytest.mark.parametrize("reduce", ["classes", "none"])
def test_lbfgs_reaches_the_minimum(reduce: str) -> None:
    torch.manual_seed(0)
    model = UFM(problem(), reduce=reduce)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=400,
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(model.closure)
    assert abs(float(model().detach()) - entropy_minimum(5, 3, 5e-3, 5e-3)) < 1e-10


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [("SGD", {"lr": 1.0, "momentum": 0.9, "nesterov": True}, 250), ("Adam", {"lr": 0.1}, 300)],
)
def test_first_order_optimisers_reach_the_minimum(
    name: str, settings: dict[str, Any], steps: int
) -> None:
    model = UFM(problem())
    optimizer = getattr(torch.optim, name)(model.parameters(), **settings)
    for _ in range(steps):
        optimizer.step(model.closure)
    assert abs(float(model().detach()) - entropy_minimum(5, 3, 5e-3, 5e-3)) < 1e-9


@pytest.mark.parametrize("bias", ["none", "penalised", "free"])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("reduce", ["classes", "none"])
def test_value_and_gradients_are_those_of_the_objective(loss: str, bias: str, reduce: str) -> None:
    data: dict[str, Any] = {"counts": [3, 1, 2, 4, 2], "per_class": None}
    if loss == "pick-all":
        sets = TargetSets.create([0, 1, 3, 5, 6, 8], [0, 1, 2, 0, 3, 4, 1, 2], 5, [2, 1, 3, 1, 1])
        data = {"target_sets": sets, "per_class": None}
    chosen = problem(loss=loss, bias=bias, lambda_b=0.1 if bias == "penalised" else 0.0, **data)
    model = UFM(chosen, reduce=reduce, seed=3)
    if model.b is not None:
        torch.nn.init.normal_(model.b, generator=torch.Generator().manual_seed(1))
    objective = Objective(chosen, reduce=reduce, variables="raw")
    expected = objective.value_and_grad(model.point())
    assert abs(float(model.closure()) - expected.value) < 1e-12
    for found, truth in zip(
        (model.W, model.H), (expected.gradient.W, expected.gradient.H), strict=True
    ):
        torch.testing.assert_close(found.grad, truth, rtol=1e-11, atol=1e-13)
    if model.b is not None:
        torch.testing.assert_close(model.b.grad, expected.gradient.b, rtol=1e-11, atol=1e-13)


def test_twice_differentiable() -> None:
    model = UFM(problem(bias="penalised", lambda_b=0.1, dim=2, classes=3))

    def value(W: torch.Tensor, H: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(model, {"W": W, "H": H, "b": b}, ())
        return result

    parameters = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(value, parameters)
    assert torch.autograd.gradgradcheck(value, parameters)


@pytest.mark.parametrize(("freeze", "moving"), [("w", {"H"}), ("h", {"W"})])
def test_a_frozen_factor_stays(freeze: str, moving: set[str]) -> None:
    model = UFM(problem(freeze=freeze))
    model.closure()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == moving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision(dtype: str) -> None:
    model, exact = UFM(problem(dtype=dtype)), UFM(problem())
    assert (
        model.W.dtype == torch.float32
    )  # bfloat16 rounds before each product, the parameters are kept
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    assert abs(float(model.closure()) / float(exact.closure()) - 1) < tolerance


@pytest.mark.parametrize("loss", list(LOSSES))
def test_checkpointing_changes_no_gradient(loss: str) -> None:
    model, plain = UFM(problem(loss=loss), seed=1), UFM(problem(loss=loss), seed=1)
    value = torch.utils.checkpoint.checkpoint(model, use_reentrant=False)
    value.backward()
    assert float(plain.closure()) == float(value.detach())
    for found, truth in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-13, atol=0)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`"
)  # torch's own, when forward mode is used for the first time
@pytest.mark.parametrize("loss", list(LOSSES))
def test_tangents_of_parameters(loss: str) -> None:
    """A dual W put in by functional_call: the derivative along W is <gradient, W>."""
    model = UFM(problem(loss=loss), seed=1)
    model.closure()
    assert model.W.grad is not None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(model.W.detach(), model.W.detach())
        value = torch.func.functional_call(model, {"W": dual}, ())
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(tangent, (model.W.grad * model.W).sum(), rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch.compile itself
@pytest.mark.parametrize("loss", list(LOSSES))
def test_compiles_inside_a_transform(loss: str) -> None:
    torch.compiler.reset()
    model = UFM(problem(loss=loss), seed=1)
    model.closure()
    gradient = torch.func.grad(lambda W: torch.func.functional_call(model, {"W": W}, ()))
    found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(model.W.detach().clone())
    torch.testing.assert_close(found, model.W.grad, rtol=1e-12, atol=1e-14)


def test_compiles_and_copies_and_saves() -> None:
    torch.compiler.reset()
    model = UFM(problem())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), model())
    other = UFM(problem(), seed=9)
    assert float(other().detach()) != float(model().detach())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert set(model.state_dict()) == {"W", "H"}
    for twin in (other, copy.deepcopy(model)):
        assert float(twin().detach()) == float(model().detach())


@pytest.mark.parametrize("loss", ["ce", "mse", "pick-all"])
def test_steps_share_one_view_of_the_labels(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends remember what they find out about targets by the object; finding out anew would wait
    for a device.
    """
    made: list[Targets] = []

    def create(*arguments: Any) -> Targets:
        made.append(Targets(*arguments))
        return made[-1]

    monkeypatch.setattr(head_inputs, "Targets", create)
    model = UFM(problem(loss=loss))
    for _ in range(5):
        model.closure()
    assert len(made) == 2  # the first call may be the only one, so the second is remembered
    model.indices.add_(0)  # written to: looked at again
    for _ in range(3):
        model.closure()
    assert len(made) == 4


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_autocast_does_not_round_the_model(loss: str) -> None:
    model = UFM(problem(loss=loss, bias="penalised", lambda_b=0.1, dtype="float32"), seed=1)
    plain, penalty = model.closure(), model.penalty()
    gradient = model.W.grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.penalty(), penalty)
        assert torch.equal(model.closure(), plain)
    assert gradient is not None
    assert model.W.grad is not None
    assert torch.equal(model.W.grad, gradient)


def test_lower_precision_rounds_parameters_and_not_the_problem() -> None:
    counts = [10**9, 10**8, 40, 5]
    model = UFM(Problem(counts=counts, dim=4, lambda_w=1e-3, lambda_h=1e-3), seed=1)
    exact = model.row_weight
    wide = float(model().detach())
    assert torch.equal(model.half().row_weight, exact)
    assert float(model().detach()) == pytest.approx(wide, rel=1e-3)
    assert torch.equal(model.to(torch.bfloat16).row_weight, exact)
    assert model.W.dtype == torch.bfloat16


def test_a_closure_without_anything_to_train_is_refused() -> None:
    model = UFM(problem(bias="free"))
    model.requires_grad_(False)
    with pytest.raises(InputError, match="closure needs a parameter that requires a gradient"):
        model.closure()


def test_points_lift_to_samples() -> None:
    model = UFM(problem(counts=[2, 0, 3, 1, 1], per_class=None))
    assert model.H.shape == (4, 6)
    point = model.point(lift=True)
    assert point.H.shape == (7, 6)
    assert torch.equal(point.H[0], point.H[1])
    assert not point.H.requires_grad
    assert "rows=4" in repr(model)


DEEP: list[dict[str, Any]] = [
    {"layers": 2, "activation": "relu", "loss": "mse", "bias": "penalised", "lambda_b": 0.1},
    {"layers": 3, "widths": [6, 7, 4], "lambda_hidden": [2e-3, 7e-3]},
]


@pytest.mark.parametrize("shape", DEEP)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_layers_are_those_of_the_objective(shape: dict[str, Any], dtype: str) -> None:
    chosen = problem(counts=[3, 1, 2, 4, 2], per_class=None, dtype=dtype, **shape)
    model = UFM(chosen, seed=3)
    expected = Objective(chosen, variables="raw").value_and_grad(model.point())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which rounds nothing here
        assert (
            abs(float(model.closure()) - expected.value)
            < {"float64": 1e-12, "bfloat16": 1e-6}[dtype]
        )
    tolerance = (
        {"rtol": 1e-11, "atol": 1e-13} if dtype == "float64" else {"rtol": 1e-2, "atol": 1e-3}
    )
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(grads) == {
        "W",
        "H",
        *(["b"] if model.b is not None else []),
        *(f"hidden.{j}" for j in range(len(model.hidden))),
    }
    for name, truth in expected.gradient.named().items():
        found = grads[f"hidden.{int(name[6:]) - 1}" if name.startswith("hidden") else name]
        torch.testing.assert_close(found, truth.to(found), **tolerance)


def test_a_deep_model_trains_compiles_and_saves() -> None:
    torch.compiler.reset()
    chosen = problem(layers=2, loss="mse", activation="relu")
    model, other = UFM(chosen, start="orthogonal"), UFM(chosen, seed=9)
    before = float(model.closure())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(), model())
    torch.optim.SGD(model.parameters(), lr=0.1).step(model.closure)
    assert float(model().detach()) < before
    other.load_state_dict(model.state_dict())
    assert float(other().detach()) == float(model().detach())
    assert [tuple(layer.shape) for layer in model.point(lift=True).hidden] == [(6, 6)]
    assert "layers=2" in repr(model)


def test_a_model_on_spheres_is_refused() -> None:
    with pytest.raises(InputError, match="constraint is sphere; use solve"):
        UFM(Problem(classes=4, dim=5, constraint="sphere"))


def test_the_derivative_at_a_kink_is_that_of_the_objective() -> None:
    """torch's clamp has the derivative 1 at its end, and the objective 0: at collapse whole columns
    lie there.
    """
    chosen = problem(layers=2, activation="relu", loss="mse")
    model = UFM(chosen)
    with torch.no_grad():
        model.hidden[0].zero_()
    model.closure()
    expected = Objective(chosen, variables="raw").value_and_grad(model.point()).gradient
    torch.testing.assert_close(model.hidden[0].grad, expected.hidden[0], rtol=1e-12, atol=1e-15)


def test_frozen_features_are_one_a_sample() -> None:
    assert UFM(problem(freeze="h")).reduce == "none"
    with pytest.raises(InputError, match="merges the features"):
        UFM(problem(freeze="h"), reduce="classes")


def test_ufm_refuses() -> None:
    with pytest.raises(InputTypeError, match="problem must be a Problem, got int"):
        UFM(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reduce must be one of auto, classes, none"):
        UFM(problem(), reduce="rows")
    with pytest.raises(InputError, match="start must be one of"):
        UFM(problem(), start="zero")


# ---- LinearCrossEntropyLoss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True, "reduction": "sum"},
        {"out_features": (2, 3), "bias": True, "label_smoothing": 0.1},
        {"weight": torch.rand(5), "ignore_index": 2, "reduction": "none"},
        {"dtype": torch.float64, "bias": True},
    ],
)
def test_loss_module_is_the_function(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LinearCrossEntropyLoss(4, 5, **settings)
    out = settings.get("out_features", ())
    dtype = settings.get("dtype", torch.float32)
    x, y = torch.randn(6, 4, dtype=dtype), torch.randint(0, 5, (6, *out))
    W = module.linear.weight.reshape(5, *out, 4)
    bias = None if module.linear.bias is None else module.linear.bias.reshape(5, *out)
    shared = {
        k: v
        for k, v in settings.items()
        if k in ("weight", "ignore_index", "reduction", "label_smoothing")
    }
    assert torch.equal(module(x, y), linear_cross_entropy(x, W, y, linear_bias=bias, **shared))
    logits = F.linear(x, module.linear.weight, module.linear.bias).reshape(6, 5, *out)
    torch.testing.assert_close(module(x, y), F.cross_entropy(logits, y, **shared))
    module(x, y).sum().backward()
    assert module.linear.weight.grad is not None


def test_loss_module_is_torchs() -> None:
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is None:
        pytest.skip("this torch has no LinearCrossEntropyLoss to compare with")
    left, right = (
        inspect.signature(c).parameters.values() for c in (LinearCrossEntropyLoss, theirs)
    )
    assert [(p.name, p.kind, p.default) for p in left] == [
        (p.name, p.kind, p.default) for p in right
    ]
    settings: dict[str, Any] = {
        "out_features": (2,),
        "bias": True,
        "weight": torch.rand(5),
        "ignore_index": 1,
    }
    torch.manual_seed(1)
    ours = LinearCrossEntropyLoss(4, 5, **settings)
    torch.manual_seed(1)
    module = theirs(4, 5, **settings)
    x, y = torch.randn(6, 4), torch.randint(0, 5, (6, 2))
    torch.testing.assert_close(ours(x, y), module(x, y))
    ours.load_state_dict(module.state_dict())
    assert ours.extra_repr() == module.extra_repr().replace(",  ", ", ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight must have shape \(5,\)"),
        ({"label_smoothing": 2.0}, "label_smoothing must lie in"),
        ({"label_smoothing": "a"}, "label_smoothing must be a number, got 'a'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"in_features": 4.0}, "in_features must be a whole number"),
        ({"out_features": 3.5}, "out_features must be a tuple of whole numbers"),
        ({"out_features": (2, 0)}, "out_features must be at least 1"),
        ({"weight": [1.0] * 5}, "weight must be a torch tensor, got list"),
        ({"weight": torch.ones(5, dtype=torch.int64)}, "weight must be float64"),
        ({"weight": torch.ones(5, requires_grad=True)}, "must not require a gradient"),
        ({"ignore_index": "a"}, "ignore_index must be a whole number, got 'a'"),
        ({"reduction": "average"}, "reduction must be one of"),
    ],
)
def test_loss_module_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearCrossEntropyLoss(**({"in_features": 4, "num_classes": 5} | settings))
