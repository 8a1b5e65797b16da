"""What a user can get wrong is refused in words that name the argument and the mend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ufm_fast import functional as fused
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import HeadGradients
from ufm_fast.losses import make_loss
from ufm_fast.targets import Targets, TargetSets

H, W, B = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
Y = torch.tensor([0, 1, 2, 3])
P = torch.full((4, 5), 0.2)
SINGLE = ("linear_cross_entropy", "linear_focal_loss", "linear_squared_error")
ALL = (*SINGLE, "linear_pick_all")

COMMON: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "label too high": (
        {"target": torch.tensor([0, 1, 2, 5])},
        InputError,
        r"^target must lie in \[0, 5\)",
    ),
    "rows disagree": ({"target": Y[:3]}, InputError, "target"),
    "target is boolean": ({"target": Y > 1}, InputTypeError, "target must hold class indices"),
    "target is a string": ({"target": "spam"}, InputTypeError, "target must be"),
    "dtypes differ": (
        {"linear_weight": W.double()},
        InputTypeError,
        "linear_weight is torch.float64 but input is",
    ),
    "bias dtype differs": (
        {"linear_bias": B.double()},
        InputTypeError,
        "linear_bias is torch.float64",
    ),
    "integer input": (
        {"input": torch.ones(4, 3, dtype=torch.int64)},
        InputTypeError,
        "input must be float64, float32",
    ),
    "devices differ": (
        {"linear_weight": W.to("meta")},
        InputError,
        "linear_weight is on meta but input on cpu",
    ),
    "not a tensor": ({"input": [[1.0]]}, InputTypeError, "input must be a torch tensor, got list"),
    "weight not a tensor": (
        {"linear_weight": [[1.0]]},
        InputTypeError,
        "linear_weight must be a torch tensor",
    ),
    "three dimensions": ({"input": torch.randn(2, 2, 3)}, InputError, "flatten leading dimensions"),
    "features disagree": (
        {"linear_weight": torch.randn(5, 4)},
        InputError,
        "3 features a row but linear_weight has 4",
    ),
    "one class": (
        {"linear_weight": W[:1], "target": Y * 0, "linear_bias": None},
        InputError,
        "at least 2 rows",
    ),
    "weight is a vector": (
        {"linear_weight": W[0]},
        InputError,
        r"linear_weight must have shape \(K, d\)",
    ),
    "bias is short": (
        {"linear_bias": B[:4]},
        InputError,
        r"linear_bias must have shape \(5,\), got \(4,\)",
    ),
    "no features": (
        {"input": H[:, :0], "linear_weight": W[:, :0]},
        InputError,
        "at least one feature",
    ),
    "nested": (
        {"input": torch.nested.nested_tensor([H, H], layout=torch.jagged)},
        InputTypeError,
        "got a nested one",
    ),
    "sparse": (
        {"linear_weight": W.to_sparse()},
        InputTypeError,
        "linear_weight must be a dense tensor",
    ),
    "reduction": (
        {"reduction": "average"},
        InputError,
        "reduction must be one of none, mean, sum; got 'average'",
    ),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wrong", list(COMMON))
def test_every_loss_refuses(name: str, wrong: str) -> None:
    change, error, message = COMMON[wrong]
    arguments = {"input": H, "linear_weight": W, "target": Y, "linear_bias": B} | change
    with pytest.raises(error, match=message):
        getattr(fused, name)(**arguments)


def test_distributed_tensors_are_refused_in_words() -> None:
    class Distributed(torch.Tensor):
        """What can be told of a DTensor without a process group."""

        def full_tensor(self) -> torch.Tensor:
            raise AssertionError

    spread = W.as_subclass(Distributed)
    with pytest.raises(
        InputTypeError,
        match=r"linear_weight must be a plain tensor, got a DTensor; pass "
        r"linear_weight.full_tensor",
    ):
        fused.linear_focal_loss(H, spread, Y)
    with pytest.raises(InputTypeError, match="input must be a DTensor where linear_weight is one"):
        fused.linear_cross_entropy(H, spread, Y)


LABELLED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "label beyond int64": (
        {"target": torch.tensor([0, 1, 2**64 - 100, 2], dtype=torch.uint64)},
        InputError,
        "beyond int64",
    ),
    "negative label": (
        {"target": torch.tensor([0, 1, -3, 2])},
        InputError,
        "got values from -3 to 2",
    ),
    "default ignore_index replaced": (
        {"target": torch.tensor([0, 1, -100, 2]), "ignore_index": -1},
        InputError,
        r"or equal ignore_index \(-1\)",
    ),
    "float target of another shape": ({"target": torch.rand(4)}, InputError, "target"),
    "class weight short": ({"weight": B[:4]}, InputError, r"weight must have shape \(5,\)"),
    "class weight integer": (
        {"weight": torch.ones(5, dtype=torch.int64)},
        InputTypeError,
        "weight must be float64",
    ),
    "class weight elsewhere": ({"weight": B.to("meta")}, InputError, "weight is on meta"),
    "class weight requires grad": (
        {"weight": B.clone().requires_grad_()},
        InputError,
        "pass weight.detach",
    ),
    "target is sparse": (
        {"target": P.to_sparse()},
        InputTypeError,
        "target must be a dense tensor",
    ),
    "target elsewhere": (
        {"target": Y.to("meta")},
        InputError,
        "target is on meta but the input on cpu",
    ),
    "target too deep": ({"target": Y[:, None]}, InputError, r"target must have shape \(4,\)"),
}


@pytest.mark.parametrize("name", ["linear_focal_loss", "linear_squared_error", "linear_pick_all"])
def test_probabilities_go_with_the_cross_entropy_only(name: str) -> None:
    with pytest.raises(InputError, match="target must"):
        getattr(fused, name)(H, W, P.clone().requires_grad_())


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("wrong", list(LABELLED))
def test_every_single_label_loss_refuses(name: str, wrong: str) -> None:
    change, error, message = LABELLED[wrong]
    with pytest.raises(error, match=message):
        getattr(fused, name)(**({"input": H, "linear_weight": W, "target": Y} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"label_smoothing": "a"}, "label_smoothing must be a number, got 'a'"),
        (
            {"label_smoothing": torch.tensor(0.1, requires_grad=True)},
            "label_smoothing must be a number",
        ),
        ({"ignore_index": "a"}, "ignore_index must be a whole number, got 'a'"),
        ({"ignore_index": 1.0}, "ignore_index must be a whole number"),
        ({"target": P, "ignore_index": 1}, "ignore_index goes with class indices only"),
        ({"target": P[:, :4]}, "must hold class probabilities of shape"),
        ({"options": "chunked"}, "options must be None or"),
        (
            {"input": H[0], "linear_weight": torch.randn(5, 2, 3), "target": Y[:2]},
            "needs batched input",
        ),
        (
            {"linear_weight": torch.randn(5, 0, 3), "target": torch.ones(4, 0).long()},
            "at least one head",
        ),
        ({"linear_weight": torch.randn(5, 2, 3)}, r"target must have shape \(4, 2\)"),
    ],
)
def test_cross_entropy_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fused.linear_cross_entropy(**({"input": H, "linear_weight": W, "target": Y} | change))


@pytest.mark.parametrize("gamma", [-1.0, float("inf"), float("nan"), "2", True])
def test_focal_refuses_gamma(gamma: Any) -> None:
    with pytest.raises(InputError, match="gamma must be a"):
        fused.linear_focal_loss(H, W, Y, gamma=gamma)


@pytest.mark.parametrize("of", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_of_tensors(of: Any) -> None:
    expected = fused.linear_cross_entropy(H, W, Y, label_smoothing=float(of(0.25)))
    assert torch.equal(fused.linear_cross_entropy(H, W, Y, label_smoothing=of(0.25)), expected)
    assert torch.equal(
        fused.linear_focal_loss(H, W, Y, gamma=of(3.0)), fused.linear_focal_loss(H, W, Y, gamma=3.0)
    )


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("of", [np.int64, np.int32, np.array, torch.tensor])
def test_integers_of_numpy_and_of_tensors(name: str, of: Any) -> None:
    function = getattr(fused, name)
    assert torch.equal(function(H, W, Y, ignore_index=of(1)), function(H, W, Y, ignore_index=1))


@pytest.mark.parametrize("name", ["linear_focal_loss", "linear_squared_error", "linear_pick_all"])
def test_many_heads_go_with_cross_entropy_only(name: str) -> None:
    with pytest.raises(InputError, match="linear_weight"):
        getattr(fused, name)(H, torch.randn(5, 2, 3), Y)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([[0], [1], [2]], "sets for 3 rows but input has 4"),
        ([[0], [1], [], [2]], "needs at least one class"),
        ([[0, 1, 2, 3, 4], [1], [2], [3]], "holds every class"),
        ([[0, 0], [1], [2], [3]], "names a class twice"),
        (
            [[0, 9], [1], [2], [3]],
            r"^target must lie in \[0, 5\), got 9; .* or give the weight more rows",
        ),
        (torch.full((4, 2), -1), "needs at least one class"),
        (torch.zeros(4, 2, 2, dtype=torch.int64), r"target must have shape \(N, m\)"),
        (P, "for a 0/1 matrix pass its classes"),
        (Targets(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 1, 3, 4])), "at least one class"),
        (Targets(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 7])), "indptr must end at"),
        (TargetSets.create([0, 1, 2, 3, 4], [0, 1, 2, 3], 5, [1, 1, 2, 1]), "counts other than 1"),
        ([[0], [1], [2], [-1]], "^target must not be negative"),
        (7, "target must be Targets"),
        ([[0.5], [1], [2], [3]], "target must hold integers"),
        ([[0], ["a"], [2], [3]], "target must hold integers"),
    ],
)
def test_pick_all_refuses(target: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fused.linear_pick_all(H, W, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of"),
        ({"loss": make_loss("ce"), "smoothing": 0.1}, "go with a loss given by name"),
        ({"loss": "ce", "gamma": 1.0}, "gamma goes with the loss focal only"),
        ({"reduction": "none"}, "reduction must be mean or sum"),
        (
            {"need": None},
            "need must be a collection of parts among features, weight, bias, got None",
        ),
        ({"need": [1]}, "need must name parts among features, weight, bias; got 1"),
        (
            {"need": "weight"},
            r"need must be a collection .* got the string 'weight'; write \('weight',\)",
        ),
        (
            {"need": ("features", "logits")},
            "need must name parts among features, weight, bias; got logits",
        ),
        ({"backend": "spam"}, "backend must be one of"),
        ({"backend": 3}, "backend must be one of"),
        ({"lambda_w": -1.0}, "lambda_w must be a finite number >= 0"),
        ({"lambda_h": "big"}, "lambda_h must be a number"),
        ({"row_weight": torch.ones(3)}, r"row_weight must have shape \(4,\)"),
        ({"row_weight": Y}, "row_weight must be float64"),
        ({"row_weight": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "row_weight must be finite"),
        ({"loss": 5}, "loss must be a name or a loss object"),
        ({"targets": Y[:2]}, r"targets must have shape \(4,\)"),
        ({"targets": Y + 2}, r"targets must lie in \[0, 5\), got 5; .* or give weight more rows"),
        ({"targets": P}, "targets must"),
        ({"targets": P.clone().requires_grad_()}, "targets must not require a gradient"),
        ({"targets": [0, 1, 2, 3]}, "targets must be a torch tensor"),
        ({"weight": W.double()}, "weight is torch.float64 but features is torch.float32"),
        ({"features": H[0]}, r"features must be \(N, d\)"),
    ],
)
def test_value_and_grad_and_hvp_refuse(change: dict[str, Any], message: str) -> None:
    arguments = {"loss": "ce", "features": H, "weight": W, "targets": Y} | change
    with pytest.raises(InputError, match=message):
        fused.value_and_grad(**arguments)
    with pytest.raises(InputError, match=message):
        fused.hvp(**arguments, direction=(H, W))


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ((H, W, B), "direction has a bias part but the head has no bias"),
        ((H[:2], W), r"direction's features must have shape \(4, 3\)"),
        (HeadGradients(H, None, B), "direction has a bias part"),
        ((H, "w"), "direction's weight must be a torch tensor"),
        ((H, W, None, None), "direction must have the parts"),
        (H, "direction must have the parts"),
    ],
)
def test_hvp_refuses_directions(direction: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fused.hvp("ce", H, W, Y, direction)
