"""Modules: the unconstrained features model with its parameters, and the classifier head with its
loss, as torch has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ufm_fast.arguments import cpu_by_default, whole
from ufm_fast.backends.base import compute_dtype
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import linear_cross_entropy
from ufm_fast.functional.checks import (
    check_ignore_index,
    check_options,
    check_reduction,
    check_smoothing,
    check_weight_alone,
)
from ufm_fast.functional.head_inputs import loss_arguments
from ufm_fast.functional.rules import value_and_gradients
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.starts import make_start


class UFM(nn.Module):
    """The regularised unconstrained features model as a module, for any optimiser of
    ``torch.optim``.

    Parameters W (K x d), H (R x d, a row per class or per sample), b (K,) or None and ``hidden``,
    the layers between (none of a plain problem), in the model's own units; a frozen factor does not
    require a gradient. ``model()`` is the objective, a scalar differentiable twice:

        f = sum_r (n_r/N) l(W h_r + b, y_r) + lambda_w/2 |W|^2 + lambda_h/2 sum_r n_r |h_r|^2 +
        lambda_b/2 |b|^2

    with layers W s(W_(M-1) .. s(W_1 h_r)) in the place of W h_r, and lambda_hidden_j/2 |W_j|^2 of
    each.

    ``reduce``: 'classes' (one row for each class or distinct target set, exact, since samples with
    equal targets have equal features at a minimum), 'none' (one row a sample), 'auto' is 'classes'.
    ``start`` and ``seed``: the initial point, a name of ``ufm_fast.starts``. Training is two lines;
    L-BFGS needs the closure, the others may use it:

        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        optimizer.step(model.closure)

    Errors: InputTypeError unless ``problem`` is a Problem; InputError for an unknown reduce or
    start, and for a problem on spheres, which torch's optimisers would leave.
    Source: Mixon et al., arXiv 2011.11619; Zhu et al., arXiv 2105.02375, eq. 3; Tirer and Bruna,
    arXiv 2202.08087 (layers).
    """

    W: nn.Parameter
    H: nn.Parameter
    b: nn.Parameter | None
    hidden: nn.ParameterList
    indices: Tensor
    indptr: Tensor | None
    row_weight: Tensor
    row_penalty: Tensor

    @cpu_by_default
    def __init__(
        self,
        problem: Problem,
        *,
        reduce: str = "auto",
        start: str = "normal",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(problem, Problem):
            raise InputTypeError(f"problem must be a Problem, got {type(problem).__name__}")
        if problem.constraint != "none":
            raise InputError(
                f"UFM has free parameters, and constraint is {problem.constraint}; use solve, "
                f"which moves on spheres"
            )
        if problem.adjustment:
            raise InputError(
                "UFM has logits as they are; use solve for logit_adjustment, margin and "
                "class_scales, or drop them"
            )
        if problem.classifier_factors is not None:
            raise InputError(
                "UFM has one penalty on W; use solve for classifier_penalties, or drop them"
            )
        if problem.dense or problem.weighted:
            raise InputError(
                "UFM has labels or sets of them; use solve for target vectors (targets) and "
                "weighted sets"
            )
        objective = Objective(problem, reduce=reduce, variables="raw")
        self.problem, self.reduce = problem, objective.reduce
        self._loss, self._parameter = loss_arguments(problem.loss)
        point = objective.to_model(make_start(objective, start, seed=seed))
        self.W = nn.Parameter(point.W, requires_grad=problem.freeze != "w")
        self.H = nn.Parameter(point.H, requires_grad=problem.freeze != "h")
        self.register_parameter("b", None if point.b is None else nn.Parameter(point.b))
        self.hidden = nn.ParameterList(point.hidden)
        targets = objective.targets
        self.register_buffer("indices", targets.indices, persistent=False)
        self.register_buffer("indptr", targets.indptr, persistent=False)
        self._lambdas = problem.penalties(objective.rows)
        self.register_buffer("row_weight", objective.row_weight, persistent=False)
        self.register_buffer(
            "row_penalty",
            self._lambdas.rows[:, 0].to(objective.row_weight.device),
            persistent=False,
        )
        self._master = objective.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> UFM:
        """``to`` and its kin: what rows weigh is no parameter, and is not rounded with them."""
        exact = {name: getattr(self, name) for name in ("row_weight", "row_penalty")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            if not buffer.is_meta:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def features(self) -> Tensor:
        """What W sees of each row: H, or with layers s(W_(M-1) .. s(W_1 h)); differentiable, and
        not rounded by autocast.
        """
        if not len(self.hidden):
            return self.H
        with torch.autocast(self.H.device.type, enabled=False):
            return self.problem.trunk.forward(self.H, tuple(self.hidden)).features

    def forward(self) -> Tensor:
        """f at the current parameters, a scalar in their dtype, of half precision in float32."""
        inputs = (self.features(), self.W, self.b)
        need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
        if (
            self.problem.torch_dtype != self._master
        ):  # half precision rounds parameters before each product
            inputs = tuple(None if x is None else x.to(self.problem.torch_dtype) for x in inputs)  # type: ignore[assignment]
        rows = (self.indices, self.indptr, None, self.row_weight)
        fit: Tensor = value_and_gradients(*inputs, *rows, self._loss, self._parameter, need)[0]
        with torch.autocast(fit.device.type, enabled=False):
            value: Tensor = fit + self.penalty()
        return value

    def penalty(self) -> Tensor:
        """The lambda terms of f, in the parameters' dtype, of half precision in float32; under
        autocast too.

        Dot products, because a square would make a copy of each parameter.
        """
        lambdas, dtype = self._lambdas, compute_dtype(self.W.dtype)

        def square(x: Tensor) -> Tensor:
            flat = x.to(dtype).reshape(-1)
            product: Tensor = torch.dot(flat, flat)
            return product

        with torch.autocast(self.W.device.type, enabled=False):
            H = self.H.to(dtype)
            features: Tensor = 0.5 * (self.row_penalty.to(dtype) @ torch.linalg.vecdot(H, H))
            total = 0.5 * lambdas.weight * square(self.W) + features
            for coefficient, layer in zip(lambdas.hidden, self.hidden, strict=True):
                total = total + 0.5 * coefficient * square(layer)
            return total if self.b is None else total + 0.5 * lambdas.bias * square(self.b)

    def closure(self) -> Tensor:
        """Clear the gradients, evaluate f, back-propagate, return f: what ``optimizer.step`` takes.

        Errors: InputError if no parameter requires a gradient.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputError(
                "closure needs a parameter that requires a gradient; call "
                "model.W.requires_grad_(), or model()"
            )
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            value: Tensor = self()
            torch.autograd.backward(value)
        return value.detach()

    def point(self, *, lift: bool = False) -> Point:
        """All parameters now, detached; with ``lift`` one row of H for each of the N samples. What
        the metrics take.
        """
        H = self.H.detach()
        if lift and self.reduce == "classes":
            H = H.index_select(0, self.problem.sample_row().to(H.device))
        b = None if self.b is None else self.b.detach()
        return Point(self.W.detach(), H, b, tuple(layer.detach() for layer in self.hidden))

    def extra_repr(self) -> str:
        rows, dim = self.H.shape
        layers = f", layers={1 + len(self.hidden)}" if len(self.hidden) else ""
        return (
            f"classes={self.W.shape[0]}, dim={dim}, rows={rows}, loss={self._loss}, "
            f"reduce={self.reduce}{layers}"
        )


class LinearCrossEntropyLoss(nn.Module):
    """A linear classifier and its cross-entropy in one module: ``torch.nn.LinearCrossEntropyLoss``,
    fused.

    Constructor, ``state_dict`` and initial values as in torch 2.13 (also on torch 2.11, which has
    none); ``forward`` calls ``ufm_fast.functional.linear_cross_entropy``, where formula, shapes and
    errors stand. ``out_features``: (d_1, ...) heads beside the classes. Differentiable twice, exact
    when collapsed, never holding the logits; ``options`` is accepted and not needed for that. Under
    FSDP2 or sharded by class it takes DTensors too.
    Equivalent: ``nn.CrossEntropyLoss(...)(nn.Linear(in_features, num_classes, bias)(input),
    target)``.

    Errors: InputError / InputTypeError for fewer than 2 classes, sizes that are no whole numbers, a
    weight that is no floating-point tensor (num_classes,) without gradient, smoothing outside [0,
    1], an unknown reduction or ignore_index.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__()
        in_features, num_classes = (
            whole(in_features, "in_features", 1),
            whole(num_classes, "num_classes", 2),
        )
        if isinstance(out_features, str) or not isinstance(out_features, Sequence):
            raise InputTypeError(
                f"out_features must be a tuple of whole numbers (d_1, ...), got {out_features!r}"
            )
        out_features = tuple(whole(heads, "out_features", 1) for heads in out_features)
        if weight is not None:
            check_weight_alone(weight, num_classes)
        ignore_index = None if ignore_index is None else check_ignore_index(ignore_index)
        label_smoothing = check_smoothing(label_smoothing)
        check_reduction(reduction)
        check_options(options)
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index, self.label_smoothing = (
            reduction,
            ignore_index,
            label_smoothing,
        )
        self.options = options
        self.register_buffer("weight", weight)
        # Flat, as torch keeps it: Linear has no multi-dimensional weight, and saved states stay
        # interchangeable.
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: input (d) or (N, d), target class indices or probabilities; weights of
        its rows, and a divisor.
        """
        matrix: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            matrix, bias = matrix.reshape(*shape, -1), None if bias is None else bias.reshape(shape)
        return linear_cross_entropy(
            input,
            matrix,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            sample_weight=sample_weight,
            divisor=divisor,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )
