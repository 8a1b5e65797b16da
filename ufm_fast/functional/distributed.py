"""Cross-entropy of DTensors: features by sample over the ranks of one device mesh, the classifier
by class, or whole on each.

By class (linear_weight is a DTensor). Each rank computes the products of its classes with all rows:
chunks of features go round, row sums and target logits are summed over the ranks, and gradients in
the features are summed and scattered back (`backends.sharded`, on a mesh of P x 1). No weight
moves, nor its gradient: each is made where it is held. A parameter of FSDP2 outside its hooks is
such a DTensor, and is served the same way.

Whole (linear_weight is a plain tensor). Inside the forward of a module under FSDP2 its hooks have
gathered the weight, once. Then each rank computes the loss of its own rows, one number is summed,
and the gradient in the weight is this rank's share of it, which FSDP2 reduces.

Before the first product the ranks tell one another what they were asked, in one message of a few
numbers. So what is wrong on one of them is an error on all, and none is left waiting; and the
divisor of a mean, the weights of rows that count, comes with it.

The result is a DTensor on the same mesh: the same number on each rank, or the losses of rows by
sample. Gradients are those of this result, of all ranks' rows together: FSDP2 and DDP take the mean
of shares over ranks by default, and shall take their sum (``set_gradient_divide_factor(1.0)``).

This file, and torch.distributed.tensor with it, is imported by the first call with a DTensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.sharded import ShardedSoftmaxHead
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.labels import checked_labels
from ufm_fast.functional.operators import zeros_for
from ufm_fast.functional.precision import NAMES, dtypes_of
from ufm_fast.functional.reductions import over_heads
from ufm_fast.functional.row_weights import Reduction, without_ignored
from ufm_fast.layout import Axis, Layout, Mesh, block
from ufm_fast.losses import CrossEntropy
from ufm_fast.targets import Targets

_TWICE = (
    "second derivatives of a head that is sharded by class are not available; gather it with "
    "linear_weight.full_tensor()"
)
#: What ranks must have been asked alike.
_ALIKE = (
    "rows of input",
    "classes",
    "features a row",
    "itemsize",
    "reduction",
    "label_smoothing",
    "requires_grad",
    *NAMES[1:],
    "weight",
    "divisor",
)


@dataclass(frozen=True)
class Asked:
    """What the caller gave beside tensors; ``rows``: class weights, sample weights and divisor;
    ``others``: arguments of the plain function, by name, None where not given.
    """

    reduction: str
    ignore_index: int | None
    label_smoothing: float
    rows: tuple[Any, Any, Any]
    others: dict[str, object]


@dataclass(frozen=True)
class _Part:
    """What this rank has of a checked call, in the dtype of the products; its weight is that of its
    classes, or whole.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    kept: Tensor  # 1, or 0 where a row is ignored
    chosen: Reduction
    smoothing: float
    dtype: torch.dtype  # of the result

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.features, self.weight, self.bias

    @property
    def factor(self) -> Tensor:
        """What each row counts, float64, over the divisor where one was given."""
        return self.chosen.weights(self.kept, self.labels).factor

    @property
    def need(self) -> list[bool]:
        return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in self.tensors]


def sharded_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, asked: Asked
) -> DTensor:
    """``linear_cross_entropy`` of DTensors, as the head of this file has it: features (N, d) and
    classifier (K, d), one head.

    ``target``: a DTensor like the input, or a plain tensor of the labels of this rank's rows.
    Errors, on every rank: as ``linear_cross_entropy``; InputError for other placements than
    Shard(0), several or different meshes, blocks that are not those of ``distribute_tensor``, ranks
    that were asked different things, and what is not served.
    """
    if not isinstance(input, DTensor):
        raise InputTypeError(
            "input must be a DTensor where linear_weight is one; write DTensor.from_local(input, "
            "mesh, [Shard(0)]) of each "
            "rank's samples, or pass linear_weight.full_tensor()"
        )
    device_mesh = input.device_mesh
    if device_mesh.ndim != 1:
        raise InputError(
            f"input must be on a mesh of one dimension, got {device_mesh}; take one of it, as "
            f"mesh['data']"
        )
    head = _head(
        device_mesh.get_group(), device_mesh.size(), device_mesh.get_local_rank(), input.device
    )
    part, error = None, None
    try:
        part = _checked(input, linear_weight, target, bias, asked)
    except InputError as problem:
        error = problem
    count = _agreed(head.mesh.world, input, linear_weight, asked, part, error)
    assert part is not None
    layout = Layout(head.mesh, linear_weight.shape[0], input.shape[0])
    by_class = isinstance(linear_weight, DTensor)
    value = _by_class(head, part, layout, count) if by_class else _whole(part, count)
    if asked.reduction == "none":
        shape = torch.Size([layout.rows])
        return DTensor.from_local(
            value.to(part.dtype), device_mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,)
        )
    placement = Replicate() if by_class else Partial()
    result = DTensor.from_local(value, device_mesh, [placement], run_check=False).redistribute(
        placements=[Replicate()]
    )
    undefined = asked.reduction == "mean" and part.chosen.divisor is None and count == 0
    return (result + math.nan if undefined else result).to(part.dtype)  # type: ignore[return-value]


@functools.lru_cache(maxsize=8)
def _head(group: Any, ranks: int, rank: int, device: torch.device) -> ShardedSoftmaxHead:
    """Kept, because it remembers the height of its chunks, which the ranks have agreed on."""
    return ShardedSoftmaxHead(Mesh((ranks, 1), rank, device, group=group))


# ---- checks
# --------------------------------------------------------------------------------------------------


def _checked(
    input: DTensor, weight: Tensor, target: Tensor, bias: Tensor | None, asked: Asked
) -> _Part:
    for name, value in asked.others.items():
        if value is not None:
            raise InputError(
                f"{name} does not go with DTensors; leave it out, or pass full tensors"
            )
    smoothing = checks.check_smoothing(asked.label_smoothing)
    checks.check_shapes(input, weight, bias, NAMES)
    if input.dim() != 2 or weight.dim() != 2:
        shapes = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        raise InputError(
            f"input must have shape (N, d) and linear_weight (K, d) where they are DTensors, got "
            f"{shapes}"
        )
    by_class = isinstance(weight, DTensor)
    if by_class and smoothing and asked.rows[0] is not None:
        raise InputError(
            "weight does not go with label_smoothing where linear_weight is a DTensor; leave one "
            "of them out"
        )
    if by_class and smoothing == 1.0:
        raise InputError(
            "label_smoothing must be less than 1 where linear_weight is a DTensor, got 1.0"
        )
    parts: dict[str, Tensor | None] = {"input": _local(input, "input", input)}
    for name, x in zip(NAMES[1:], (weight, bias), strict=True):
        parts[name] = _local(x, name, input) if by_class and x is not None else x
    dtype, products = dtypes_of(parts)
    features, matrix, offsets = (
        None if x is None else x.to(products).contiguous() for x in parts.values()
    )
    assert features is not None
    assert matrix is not None
    labels = _local(target, "target", input) if isinstance(target, DTensor) else target
    checks.check_target(labels, features.device)
    if labels.is_floating_point():
        raise InputTypeError(
            f"target must hold class indices where input is a DTensor, got {labels.dtype}"
        )
    checks.check_labels_shape(labels, (features.shape[0],))
    ignore = -100 if asked.ignore_index is None else checks.check_ignore_index(asked.ignore_index)
    labels, kept = checked_labels(labels, weight.shape[0], ignore)
    of_classes, of_samples, divisor = asked.rows
    if isinstance(of_samples, DTensor):
        of_samples = _local(of_samples, "sample_weight", input)
    if isinstance(of_classes, DTensor):
        raise InputTypeError(
            "weight must be a plain tensor of all classes; write weight.full_tensor()"
        )
    shape = (features.shape[0],)
    classes = features.new_empty(weight.shape[0], 0)  # stands for the classifier of all
    chosen = Reduction.checked(asked.reduction, classes, shape, of_classes, of_samples, divisor)
    features = without_ignored(features, kept)
    return _Part(features, matrix, offsets, labels, kept, chosen, smoothing, dtype)


def _local(x: Tensor, name: str, input: DTensor) -> Tensor:
    """The block that this rank has of a DTensor on the mesh of the input."""
    mesh = input.device_mesh
    if not isinstance(x, DTensor):
        raise InputTypeError(
            f"{name} must be a DTensor on the mesh of input; write distribute_tensor({name}, "
            f"mesh, [Shard(0)])"
        )
    if x.device_mesh != mesh:
        raise InputError(
            f"{name} is on {x.device_mesh} but input on {mesh}; distribute both over one device "
            f"mesh"
        )
    if tuple(x.placements) != (Shard(0),):
        raise InputError(
            f"{name} must have placements [Shard(0)], got {list(x.placements)}; "
            f"write {name}.redistribute(placements=[Shard(0)])"
        )
    local, part = x.to_local(), block(x.shape[0], mesh.size(), mesh.get_local_rank())
    if local.shape[0] != part.stop - part.start:
        raise InputError(
            f"{name} of {x.shape[0]} rows has {local.shape[0]} on rank {mesh.get_local_rank()} "
            f"where distribute_tensor puts "
            f"{part.stop - part.start}; fill all ranks up to one number of rows, with targets "
            f"that are ignore_index"
        )
    return local


def _agreed(
    axis: Axis,
    input: Tensor,
    weight: Tensor,
    asked: Asked,
    part: _Part | None,
    error: InputError | None,
) -> float:
    """The sum of the weights of all ranks' rows. Errors: InputError on every rank where one has an
    error or was asked otherwise.
    """
    said = [0.0] * len(_ALIKE)
    if part is not None:
        need = sum(2.0**i for i, wanted in enumerate(part.need) if wanted)
        reduction = float(checks.REDUCTIONS.index(asked.reduction))
        sizes = [input.shape[0], *weight.shape, part.features.element_size()]
        sharded = float(isinstance(weight, DTensor))
        said = [
            *map(float, sizes),
            reduction,
            part.smoothing,
            need,
            sharded,
            float(part.bias is not None),
            float(part.chosen.class_weight is not None),
            float(part.chosen.divisor or 0.0),
        ]
    count = 0.0 if part is None else float(part.factor.sum())
    message = torch.tensor(
        [[float(error is not None), count, *said]], dtype=torch.float64, device=input.device
    )
    told = axis.gather(message, "settings").wait().tolist()
    if error is not None:
        raise error
    for rank, (failed, _, *heard) in enumerate(told):
        if failed:
            raise InputError(
                f"rank {rank} was given what it can't use, and says what; rank {axis.place} stops "
                f"with it"
            )
        for name, mine, other in zip(_ALIKE, said, heard, strict=True):
            if mine != other:
                raise InputError(
                    f"ranks must be asked alike, but {name} differs between ranks {axis.place} "
                    f"and {rank}"
                )
    return float(sum(row[1] for row in told))


# ---- values
# --------------------------------------------------------------------------------------------------


def _whole(part: _Part, count: float) -> Tensor:
    """This rank's part of the loss: its rows by the whole classifier."""
    chosen = part.chosen
    if chosen.how != "none":
        divisor = _divisor(chosen, count) if chosen.divisor is None else chosen.divisor
        chosen = replace(chosen, how="sum", divisor=divisor)
    return over_heads(*part.tensors, part.labels, part.kept, chosen, part.smoothing)


def _by_class(head: ShardedSoftmaxHead, part: _Part, layout: Layout, count: float) -> Tensor:
    """The loss of all ranks' rows, or the losses of this rank's."""
    loss = CrossEntropy(smoothing=part.smoothing)
    x = functools.partial(HeadInput, loss, targets=Targets(part.labels), layout=layout)
    weights = part.factor / _divisor(part.chosen, count)
    if part.chosen.how == "none":
        losses: Tensor = _Losses.apply(*part.tensors, head, x, weights)  # type: ignore[no-untyped-call]
        return torch.where(part.factor == 0, 0.0, losses * part.factor)
    value: Tensor = _Sum.apply(*part.tensors, head, x, weights, part.need)  # type: ignore[no-untyped-call]
    return value


def _divisor(chosen: Reduction, count: float) -> float:
    """What a mean divides by; a divisor that was given is in the rows' weights already."""
    return (count or 1.0) if chosen.how == "mean" and chosen.divisor is None else 1.0


class _Sum(torch.autograd.Function):
    """sum_r row_weight_r l_r over the rows of all ranks; its gradients come with the same sweep."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: ShardedSoftmaxHead,
        x: Callable[..., HeadInput],
        row_weight: Tensor,
        need: list[bool],
    ) -> Tensor:
        of_features, of_weight, of_bias = zeros_for((features, weight, bias), need)
        at = x(features=features, weight=weight, bias=bias, row_weight=row_weight)
        value = head.value_and_grad(at, Gradients(of_features, of_weight, of_bias)).value
        ctx.save_for_backward(of_features, of_weight, of_bias)
        ctx.dtype = features.dtype
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _once()
        gradients = [
            None if g is None else (upstream.to(g.dtype) * g).to(ctx.dtype)
            for g in ctx.saved_tensors
        ]
        return (*gradients, None, None, None, None)


class _Losses(torch.autograd.Function):
    """l_r of this rank's rows; the backward is a sweep with what comes in as the rows' weights."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: ShardedSoftmaxHead,
        x: Callable[..., HeadInput],
        row_weight: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, bias)
        ctx.head, ctx.x = head, x
        return head.losses(x(features=features, weight=weight, bias=bias, row_weight=row_weight))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _once()
        features, weight, bias = ctx.saved_tensors
        x = ctx.x(
            features=features, weight=weight, bias=bias, row_weight=upstream.double().contiguous()
        )
        of_features, of_weight, of_bias = gradients = zeros_for(
            (features, weight, bias), ctx.needs_input_grad[:3]
        )
        ctx.head.value_and_grad(x, Gradients(of_features, of_weight, of_bias))
        return (*(None if g is None else g.to(features.dtype) for g in gradients), None, None, None)


def _once() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(_TWICE)
