"""Cross-entropy of DTensors: features by sample over the ranks of one device mesh, the classifier
by class, or whole on each.

By class (linear_weight is a DTensor). Each rank computes the products of its classes with all rows:
chunks of features go round, row sums and target logits are summed over the ranks, and gradients in
the features are summed and scattered back (`backends.sharded`, on a mesh of P x 1). No weight
moves, nor its gradient: each is made where it is held; but with label smoothing and class weights
at once, each rank asks the others for the rows of W that its own labels name (`class_weights`). A
parameter of FSDP2 outside its hooks is such a DTensor, and is served the same way. Derivatives to
the second order are those of `by_class`.

Whole (linear_weight is a plain tensor). Inside the forward of a module under FSDP2 its hooks have
gathered the weight, once. Then each rank computes the loss of its own rows as one process does, one
number is summed, and the gradient in the weight is this rank's share of it, which FSDP2 reduces.

Before the first product the ranks tell one another what they were asked, in one message of a few
numbers (`agreement`). So what is wrong on one of them is an error on all, and none is left waiting;
and the divisor of a mean, the weights of rows that count, comes with it.

The result is a DTensor on the same mesh: the same number on each rank, or the losses of rows by
sample. Gradients are those of this result, of all ranks' rows together: FSDP2 and DDP take the mean
of shares over ranks by default, and shall take their sum (``set_gradient_divide_factor(1.0)``). The
gradient in a plain ``logit_scale`` is a share likewise; in a DTensor it is the whole one.

This file, and torch.distributed.tensor with it, is imported by the first call with a DTensor.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ufm_fast.adjustments import margins_of
from ufm_fast.backends.base import Backend
from ufm_fast.backends.class_weights import ClassWeighted
from ufm_fast.backends.sharded import ShardedBackend
from ufm_fast.backends.sharded_softcap import CappedCrossEntropy, ShardedSoftcapBackend
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional import checks
from ufm_fast.functional.agreement import agreed
from ufm_fast.functional.by_class import Replicated, ShardedHead, ShardedLosses, ShardedSum
from ufm_fast.functional.cross_entropy import Asked, CheckedCall, checked_call
from ufm_fast.functional.precision import NAMES
from ufm_fast.functional.row_weights import without_ignored
from ufm_fast.layout import Layout, Mesh, block
from ufm_fast.losses import CrossEntropy
from ufm_fast.targets import Targets

#: A whole weight on each rank, of which the gradient is each rank's share.
_GATHERED = "linear_weight.full_tensor(grad_placements=[Partial()])"
_PLAIN = (
    "input must be a DTensor where linear_weight is one; write DTensor.from_local(input, mesh, "
    f"[Shard(0)]) of each rank's samples, or for each rank's own loss pass {_GATHERED}"
)


def sharded_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, asked: Asked
) -> DTensor:
    """``linear_cross_entropy`` of DTensors, as the head of this file has it: features (N, d) and
    classifier (K, d), or whole with several heads.

    ``target``: a DTensor like the input, or a plain tensor of the labels of this rank's rows.
    Errors, on every rank: as ``linear_cross_entropy``; InputError for other placements than
    Shard(0), several or different meshes, blocks that are not those of ``distribute_tensor``, ranks
    that were asked different things, and what is not served.
    """
    mesh = _mesh_of(input, linear_weight)
    call, error = None, None
    try:
        call = _checked(input, linear_weight, target, bias, asked)
    except InputError as problem:
        error = problem
    count = agreed(mesh.world, input, linear_weight, call, error)
    assert call is not None
    assert isinstance(input, DTensor)
    by_class = isinstance(linear_weight, DTensor)
    if by_class:
        layout = Layout(mesh, linear_weight.shape[0], input.shape[0])
        value = _by_class(_head(call, layout), call, count, (linear_weight, bias))
    else:
        value = _whole(call, count)
    if asked.reduction == "none":
        return _of_rows(value.to(call.dtype), input)
    placement = Replicate() if by_class else Partial()
    value = Replicated.apply(value, mesh.world)  # type: ignore[no-untyped-call]
    result = DTensor.from_local(
        value, input.device_mesh, [placement], run_check=False
    ).redistribute(placements=[Replicate()])
    if asked.reduction == "mean" and call.chosen.divisor is None and count == 0:
        # Over 0, as torch has it; over no rows the gradients stay zero.
        return (result + result.detach() / 0.0).to(call.dtype)  # type: ignore[return-value]
    return result.to(call.dtype)  # type: ignore[return-value]


def _of_rows(values: Tensor, input: DTensor) -> DTensor:
    """Numbers of this rank's rows (and heads) as part of all."""
    shape = torch.Size([input.shape[0], *values.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        values, input.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )


def _mesh_of(input: Tensor, weight: Tensor) -> Mesh:
    """The ranks of the input, or of the weight where that alone is on several: they shall hear of
    it. Errors: InputError / InputTypeError for a mesh of several dimensions, or none.
    """
    x = input if isinstance(input, DTensor) else weight
    if not isinstance(x, DTensor):
        raise InputTypeError(_PLAIN)
    mesh = x.device_mesh
    if mesh.ndim != 1:
        raise InputError(
            f"input must be a DTensor on a mesh of one dimension, got {mesh}; take one of it, as "
            f"mesh['data']"
        )
    return _mesh(mesh.get_group(), mesh.size(), mesh.get_local_rank(), x.device)


@functools.lru_cache(maxsize=8)
def _mesh(group: Any, ranks: int, rank: int, device: torch.device) -> Mesh:
    return Mesh((ranks, 1), rank, device, group=group)


# ---- checks


def _checked(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, asked: Asked
) -> CheckedCall:
    """The call with what this rank has of each tensor."""
    if not isinstance(input, DTensor):
        raise InputTypeError(_PLAIN)
    checks.check_shapes(input, weight, bias, NAMES)
    by_class = isinstance(weight, DTensor)
    if input.dim() != 2 or (by_class and weight.dim() != 2):
        shapes = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        raise InputError(
            f"input must have shape (N, d) and linear_weight (K, d) where they are DTensors, got "
            f"{shapes}; for several heads pass {_GATHERED}"
        )
    parts: dict[str, Tensor | None] = {"input": _local(input, "input", input)}
    for name, x in zip(NAMES[1:], (weight, bias), strict=True):
        parts[name] = _local(x, name, input) if by_class and x is not None else x
    labels = _local(target, "target", input) if isinstance(target, DTensor) else target
    if by_class and labels.is_floating_point():
        raise InputTypeError(
            f"target must hold class indices where linear_weight is a DTensor, got "
            f"{labels.dtype}; pass {_GATHERED}"
        )
    here = _here(input, asked, by_class)
    if not by_class:
        return checked_call(parts, labels, here)
    mesh, classes = input.device_mesh, weight.shape[0]
    part = block(classes, mesh.size(), mesh.get_local_rank())
    return checked_call(parts, labels, here, classes=classes, part=part)


def _here(input: DTensor, asked: Asked, by_class: bool) -> Asked:
    """What was asked, of this rank's rows and classes."""
    if isinstance(asked.weight, DTensor):
        raise InputTypeError(
            "weight must be a plain tensor of all classes; write weight.full_tensor()"
        )
    of_samples, scale, main_grad = asked.sample_weight, asked.logit_scale, asked.main_grad
    if isinstance(of_samples, DTensor):
        of_samples = _local(of_samples, "sample_weight", input)
    if isinstance(scale, DTensor):
        _check_placement(scale, "logit_scale", input, Replicate())
        # Each rank has the gradient of its own rows: a part of the sum.
        scale = scale.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if by_class and isinstance(main_grad, (tuple, list)):
        main_grad = tuple(None if x is None else _local(x, "main_grad", input) for x in main_grad)
    return replace(asked, sample_weight=of_samples, logit_scale=scale, main_grad=main_grad)


def _check_placement(x: DTensor, name: str, input: DTensor, placement: Shard | Replicate) -> None:
    if x.device_mesh != input.device_mesh:
        raise InputError(
            f"{name} is on {x.device_mesh} but input on {input.device_mesh}; distribute both over "
            f"one device mesh"
        )
    if tuple(x.placements) != (placement,):
        raise InputError(
            f"{name} must have placements [{placement!r}], got {list(x.placements)}; "
            f"write {name}.redistribute(placements=[{placement!r}])"
        )


def _local(x: Tensor, name: str, input: DTensor) -> Tensor:
    """The block that this rank has of a DTensor on the mesh of the input."""
    mesh = input.device_mesh
    if not isinstance(x, DTensor):
        raise InputTypeError(
            f"{name} must be a DTensor on the mesh of input; write distribute_tensor({name}, "
            f"mesh, [Shard(0)])"
        )
    _check_placement(x, name, input, Shard(0))
    local, part = x.to_local(), block(x.shape[0], mesh.size(), mesh.get_local_rank())
    if local.shape[0] != part.stop - part.start:
        raise InputError(
            f"{name} of {x.shape[0]} rows has {local.shape[0]} on rank {mesh.get_local_rank()} "
            f"where distribute_tensor puts "
            f"{part.stop - part.start}; fill all ranks up to one number of rows, with targets "
            f"that are ignore_index"
        )
    return local


# ---- values


def _whole(call: CheckedCall, count: float) -> Tensor:
    """This rank's part of the loss: its rows by the whole classifier."""
    chosen = call.chosen
    if chosen.how != "none":
        divisor = _divisor(call, count) if chosen.divisor is None else chosen.divisor
        chosen = replace(chosen, how="sum", divisor=divisor)
    return replace(call, chosen=chosen).value()


def _by_class(
    head: ShardedHead, call: CheckedCall, count: float, held: tuple[Tensor, Tensor | None]
) -> Tensor:
    """The loss of all ranks' rows, or the losses of this rank's. ``held``: the parameters as the
    caller has them.
    """
    weights, into = call.weights, call.chosen.into
    factor = weights.kept if isinstance(head.backend, ClassWeighted) else weights.factor
    features = without_ignored(call.features, factor).contiguous()
    parts = [None if x is None else x.contiguous() for x in (call.matrix, call.bias)]
    if call.chosen.how == "none":
        losses: Tensor = ShardedLosses.apply(features, *parts, head)  # type: ignore[no-untyped-call]
        return torch.where(factor == 0, 0.0, losses * factor.to(losses.dtype))
    need = call.need
    buffers = [
        buffer if wanted else None
        for wanted, buffer in zip(need[1:], into or (None, None), strict=True)
    ]
    for j, buffer in enumerate(buffers):
        x = parts[j]
        parts[j] = x if buffer is None or x is None else x.detach()
    tokens = [None if b is None else x for x, b in zip(held, buffers, strict=True)]
    shares = factor / _divisor(call, count)
    value: Tensor = ShardedSum.apply(  # type: ignore[no-untyped-call]
        features, *parts, shares, *tokens, head, need, buffers
    )
    return value


def _divisor(call: CheckedCall, count: float) -> float:
    """What a mean divides by; a divisor that was given is in the rows' weights already."""
    return (count or 1.0) if call.chosen.how == "mean" and call.chosen.divisor is None else 1.0


def _head(call: CheckedCall, layout: Layout) -> ShardedHead:
    """The head that knows the call's loss, as `reductions` chooses it in one process."""
    smoothing, class_weight = call.smoothing, call.chosen.class_weight
    backend: Backend = _backend(layout.mesh)
    loss = CrossEntropy()
    margin = None if call.margin is None else margins_of(call.margin, call.target)
    if call.softcap is not None:
        backend, loss = _softcap(layout.mesh), CappedCrossEntropy(cap=call.softcap)
    elif smoothing and (class_weight is not None or smoothing == 1.0):
        if class_weight is None:
            class_weight = torch.ones(layout.classes, device=call.features.device)
        backend = ClassWeighted(backend, class_weight.double(), smoothing)
    else:
        loss = CrossEntropy(smoothing)
    return ShardedHead(backend, loss, Targets(call.target), margin, layout)


# Kept, because they remember the height of their chunks, which the ranks have agreed on.
_backend = functools.lru_cache(maxsize=8)(ShardedBackend)
_softcap = functools.lru_cache(maxsize=8)(ShardedSoftcapBackend)
