"""The losses: softmax losses as functions of the target's log-loss, and squared error.

For a row with target y let  s = sum_{k != y} exp(z_k - z_y)  (the off-target mass),
p = s / (1 + s) = 1 - p_y  and l = log1p(s) = -log p_y.  Each softmax loss here is g(l): a backend
computes l and p to full relative accuracy even when both are 1e-35, and the loss adds three
elementwise functions of them. Nothing else about a loss needs device code.

Decisions

2026-11-25. A softmax loss is a function g(l) of the target's log-loss. With s the off-target mass,
l = log1p(s) and p = s/(1+s), a loss gives `value` g, `weight` g' and `bend` p g''. Cross-entropy,
smoothing, focal and pick-all differ in three lines each, and no loss needs device code. l and p
come from u = log s as softplus and sigmoid, in float64, whatever the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ufm_fast.arguments import number
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.targets import Targets
from ufm_fast.weighted_targets import WeightedTargets

_LARGEST = 1e30  # stands for an infinite l where it is multiplied by exp(-l) = 0


def _entries(targets: Targets) -> tuple[Tensor, Tensor]:
    return targets.slice(0, targets.rows)


@dataclass(frozen=True)
class SoftmaxLoss:
    """Base of the softmax losses, with g(l) = l. All methods are elementwise on (R,) tensors.

    A loss of one's own is a subclass with a ``name``, entered in LOSSES to be called by it.
    ``parameters`` are the fields that ``make_loss`` takes; nothing is proved of a loss until a
    table of theory names it, so ``convex`` is False unless said.
    """

    name: ClassVar[str] = "softmax"
    parameters: ClassVar[tuple[str, ...]] = ()
    multi_label: ClassVar[bool] = False
    convex: ClassVar[bool] = False
    smoothing: float = 0.0

    def value(self, l: Tensor, p: Tensor) -> Tensor:
        """g(l), in nats."""
        return l

    def weight(self, l: Tensor, p: Tensor) -> Tensor:
        """g'(l), the factor on the cross-entropy gradient."""
        return torch.ones_like(l)

    def bend(self, l: Tensor, p: Tensor) -> Tensor:
        """p g''(l): the product stays finite as p -> 0, where g'' alone need not."""
        return torch.zeros_like(l)

    def dense(self, z: Tensor, targets: Tensor | Targets) -> Tensor:
        """The textbook definition from logits z (R x K): the loss of each row, differentiable. The
        reference.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(SoftmaxLoss):
    """Cross-entropy with label smoothing eps: target distribution (1 - eps) e_y + eps / K.

    l_i = log1p(s) + eps (z_y - mean_k z_k).  Equivalent: ``F.cross_entropy(z, y,
    label_smoothing=eps)``. Errors: InputError unless 0 <= smoothing < 1.
    """

    name: ClassVar[str] = "ce"
    parameters: ClassVar[tuple[str, ...]] = ("smoothing",)
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= number(self.smoothing, "smoothing") < 1.0:
            raise InputError(f"smoothing must lie in [0, 1), got {self.smoothing}")

    def dense(self, z: Tensor, targets: Tensor | Targets) -> Tensor:
        y = targets.indices if isinstance(targets, Targets) else targets
        return torch.nn.functional.cross_entropy(
            z, y, reduction="none", label_smoothing=self.smoothing
        )


@dataclass(frozen=True)
class Focal(SoftmaxLoss):
    """Focal loss (1 - p_y)^gamma (-log p_y) of Lin et al. (arXiv 1708.02002). gamma = 0 is
    cross-entropy.

    Written in p = 1 - p_y and r = l (1 - p) / p (-> 1 as p -> 0), which stay finite where the
    textbook form is NaN.
    Errors: InputError for a negative or infinite gamma.
    """

    name: ClassVar[str] = "focal"
    parameters: ClassVar[tuple[str, ...]] = ("gamma",)
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if number(self.gamma, "gamma") < 0.0:
            raise InputError(f"gamma must be a finite number >= 0, got {self.gamma}")
        if self.smoothing:
            raise InputError(
                "smoothing goes with the cross-entropy only; drop smoothing or choose loss ce"
            )

    def _ratio(self, l: Tensor, p: Tensor) -> Tensor:
        l = l.clamp_max(_LARGEST)
        return torch.where(
            p > 0, torch.exp(-l) * l / p.clamp_min(torch.finfo(p.dtype).tiny), torch.ones_like(p)
        )

    def value(self, l: Tensor, p: Tensor) -> Tensor:
        return p**self.gamma * l

    def weight(self, l: Tensor, p: Tensor) -> Tensor:
        return p**self.gamma * (1.0 + self.gamma * self._ratio(l, p))

    def bend(self, l: Tensor, p: Tensor) -> Tensor:
        g, l = self.gamma, l.clamp_max(_LARGEST)
        return g * p**g * torch.exp(-l) * (2.0 + (g - 1.0) * self._ratio(l, p) - l)

    def dense(self, z: Tensor, targets: Tensor | Targets) -> Tensor:
        y = targets.indices if isinstance(targets, Targets) else targets
        l = torch.nn.functional.cross_entropy(z, y, reduction="none")
        return (-torch.expm1(-l)).clamp_min(torch.finfo(z.dtype).tiny) ** self.gamma * l


@dataclass(frozen=True)
class PickAll(SoftmaxLoss):
    """Pick-all-label loss of Li et al. (arXiv 2310.15903): sum over the row's targets of the
    cross-entropy.

    l_i = sum_{k in S} (logsumexp(z) - z_k).  With one target a row it is the cross-entropy.
    Weighted sets (`weighted_targets`) have q_k times each term.
    """

    name: ClassVar[str] = "pick-all"
    multi_label: ClassVar[bool] = True
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.smoothing:
            raise InputError(
                "smoothing goes with the cross-entropy only; drop smoothing or choose loss ce"
            )

    def dense(self, z: Tensor, targets: Tensor | Targets) -> Tensor:
        if isinstance(targets, Tensor):
            targets = Targets(targets)
        rows, columns = _entries(targets)
        log_loss = torch.logsumexp(z, 1)[rows] - z[rows, columns]
        if isinstance(targets, WeightedTargets):
            log_loss = log_loss * targets.weights.to(z.dtype)
        return torch.zeros(targets.rows, dtype=z.dtype, device=z.device).index_add(
            0, rows, log_loss
        )


@dataclass(frozen=True)
class SquaredError:
    """Half squared error 1/2 |z - e_y|^2 to the one-hot target, K outputs. Not a softmax loss: Gram
    matrices suffice. To target vectors (`dense_targets`) 1/2 |z - y|^2.

    Backends compute exactly this where a loss is no softmax loss, so it has no subclasses
    (InputTypeError).
    """

    name: ClassVar[str] = "mse"
    parameters: ClassVar[tuple[str, ...]] = ()
    multi_label: ClassVar[bool] = False
    convex: ClassVar[bool] = True
    smoothing: ClassVar[float] = 0.0

    def __init_subclass__(cls) -> None:
        raise InputTypeError(
            f"{cls.__name__} can't be a subclass of SquaredError: backends compute just that; use "
            f"SoftmaxLoss"
        )

    def dense(self, z: Tensor, targets: Tensor | Targets) -> Tensor:
        if isinstance(targets, DenseTargets):
            return 0.5 * (z - targets.values.to(z.dtype)).square().sum(1)
        y = targets.indices if isinstance(targets, Targets) else targets
        return 0.5 * (z - torch.nn.functional.one_hot(y, z.shape[1]).to(z.dtype)).square().sum(1)


Loss = SoftmaxLoss | SquaredError

#: Every loss by its name on the command line; tests, benchmarks and documents iterate this table.
LOSSES: dict[str, type[Loss]] = {
    "ce": CrossEntropy,
    "focal": Focal,
    "pick-all": PickAll,
    "mse": SquaredError,
}


def make_loss(name: str, **parameters: float | None) -> Loss:
    """Build a loss of LOSSES from its name and parameters (those of the built-in ones:
    ``smoothing``, ``gamma``).

    A parameter that is None, and a smoothing of 0, count as not given. Errors: InputError for an
    unknown name or a parameter that the loss has not.
    """
    if name not in LOSSES:
        raise InputError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}")
    given = _not_left_out(parameters)
    for key in given:
        if key not in LOSSES[name].parameters:
            takers = " or ".join(taker for taker, row in LOSSES.items() if key in row.parameters)
            raise InputError(
                f"{key} goes with the loss {takers} only; drop {key} or choose that loss instead "
                f"of {name}"
            )
    return LOSSES[name](**given)


def _not_left_out(parameters: Mapping[str, float | None]) -> dict[str, float]:
    return {
        key: value
        for key, value in parameters.items()
        if value is not None and (key, value) != ("smoothing", 0.0)
    }


def loss_of(given: object, **parameters: float | None) -> Loss:
    """The loss that a user gives by name, with its parameters, or as an object.

    Errors: as `make_loss`; InputTypeError for neither; InputError for parameters beside an object
    that is not the one they make.
    """
    if isinstance(given, str):
        return make_loss(given, **parameters)
    if not isinstance(given, Loss):
        raise InputTypeError(f"loss must be a name or a loss object, got {type(given).__name__}")
    if _not_left_out(parameters) and not (
        registered_name(given) and given == make_loss(given.name, **parameters)
    ):
        raise InputError(
            f"{' and '.join(parameters)} go with a loss given by name; set them in the loss object"
        )
    return given


def registered_name(loss: Loss) -> str:
    """The name of the row of LOSSES whose class is exactly that of ``loss``; empty for every other,
    whatever its name says.
    """
    return loss.name if type(loss) is LOSSES.get(loss.name) else ""
