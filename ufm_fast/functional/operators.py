"""The head as torch operators: one sweep for value and gradients, differentiable twice, traceable,
never R x K.

    head           (value, gradients) of  sum_r row_weight_r l_r;
                   its own derivative is head_product and head_losses
    head_losses    l_r;  its derivative is head with row_weight = the incoming gradient
    head_product   Hessian of the sum times a direction
    head_slopes    derivative of every l_r along a direction: what row_weight's gradient needs in a
                   double backward

``head`` returns its gradients as *outputs* that are differentiable themselves, so first and second
order share one
formula:  d(value) = g . gradient  and  d(gradient . v) = Hessian v.
A third order is refused in words. All take the loss as its name and its one parameter (the first
that its row of LOSSES names: smoothing of ce, gamma of focal): operators take no objects.
Class weights come with a smoothed cross-entropy only, where they are more than a weight of its
rows; and a loss whose name ends in MARGINS has the margins of the classes in their place.
Library users want the functions of ``ufm_fast.functional``; these names are not part of the public
interface.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ufm_fast.adjustments import margins_of
from ufm_fast.arguments import INTEGERS
from ufm_fast.backends import Backend, Gradients, HeadInput, TiledBackend, make_backend
from ufm_fast.backends.base import compute_dtype
from ufm_fast.backends.class_weights import ClassWeighted
from ufm_fast.backends.softcap import SoftcapBackend
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional.registration import (
    blind,
    differentiable,
    forward_mode,
    graph_is_kept,
    hooks_are_set,
    keep,
    one_by_one,
    operator,
    refuses,
    refusing,
    wrapped,
)
from ufm_fast.functional.rows import over_rows, rows_of, rows_with_weight
from ufm_fast.losses import LOSSES, Loss, make_loss, registered_name
from ufm_fast.targets import Targets

TILED = TiledBackend()
HEAD = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor indices, Tensor? indptr, Tensor? "
    "class_weight"
)
_LOSS = "str loss, float parameter"
MARGINS = " with margins"  # after the name of a loss of one label a row
# The cross-entropy of capped logits, with the cap for its parameter: no loss of the solver's table.
SOFTCAP = "ce-softcap"


@functools.lru_cache(maxsize=8)
def backend_for(device_type: str, dtype: torch.dtype) -> Backend:
    """The backend that ``auto`` means on this kind of device; kept, because looking packages up
    costs more than a head.

    All dtypes share one ``TiledBackend`` and so the one buffer that it keeps.
    """
    backend = make_backend("auto", device_type, dtype)
    return TILED if isinstance(backend, TiledBackend) else backend


def named_loss(name: str, parameter: float) -> Loss:
    """The loss object of an operator's (name, parameter) pair: the parameter is that of the loss's
    row.
    """
    return make_loss(name, **dict.fromkeys(LOSSES[name].parameters[:1], parameter))


def loss_arguments(loss: Loss) -> tuple[str, float]:
    """The (name, parameter) pair of a loss object.

    Errors: InputTypeError for one that is not of LOSSES, or that name and one parameter do not make
    again.
    """
    name = registered_name(loss)
    if not name:
        raise InputTypeError(
            f"loss must be one of {', '.join(LOSSES)} here, got an object of {type(loss).__name__}"
        )
    parameter = next((float(getattr(loss, field)) for field in loss.parameters), 0.0)
    if vars(named_loss(name, parameter)) != vars(loss):
        raise InputTypeError(
            f"loss {name} can't be handed on here: it has settings beside its row's one parameter"
        )
    return name, parameter


def head_input(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    loss: str,
    parameter: float,
) -> tuple[Backend, HeadInput]:
    """The head, and the backend that knows its loss."""
    targets = _targets(indices, indptr)
    # Backends may read memory directly, so what is strided or expanded is laid out first.
    bias = None if bias is None else bias.contiguous()
    backend, margin = backend_for(weight.device.type, weight.dtype), None
    if loss.endswith(MARGINS) and class_weight is not None:
        margin, class_weight, loss = (
            margins_of(class_weight, targets.indices),
            None,
            loss.removesuffix(MARGINS),
        )
    if loss == SOFTCAP:
        backend, loss, parameter = SoftcapBackend(parameter), "ce", 0.0
    if class_weight is not None:
        backend, parameter = ClassWeighted(backend, class_weight.double(), parameter), 0.0
    x = HeadInput(
        named_loss(loss, parameter),
        features.contiguous(),
        weight.contiguous(),
        bias,
        targets,
        row_weight.contiguous(),
        margin,
    )
    return backend, x


def _targets(indices: Tensor, indptr: Tensor | None) -> Targets:
    """The Targets of these tensors, the same object from the third call with them on, if they are
    unwritten since.

    What backends remember of targets (sorted labels, the widest set) hangs on the object, and a
    step that repeats must not wait for the device to find it out again. It is kept on the tensor
    and ends with it.
    """
    known = getattr(indices, "_ufm_targets", None)
    tensors = [x for x in (indices, indptr) if x is not None]
    versions = (
        None if any(x.is_inference() for x in tensors) else [x._version for x in tensors]
    )  # an inference tensor has none
    same = False
    if known is not None and versions is not None:
        pointer, seen, found = known
        same = pointer is indptr and seen == versions
        if same and found is not None:
            return cast("Targets", found)
    # An alias, for a tensor that holds itself would stay until the garbage collector runs.
    targets = Targets(
        indices.detach().contiguous(), None if indptr is None else indptr.contiguous()
    )
    if versions is not None:
        indices._ufm_targets = (indptr, versions, targets if same else None)  # type: ignore[attr-defined]
    return targets


def zeros_for(
    likes: Sequence[Tensor | None],
    need: Sequence[bool],
    create: Callable[..., Tensor] = torch.zeros,
) -> list[Tensor | None]:
    """A buffer (zero, or as ``create`` makes it) in the dtype of sums for each tensor whose
    derivative is needed.
    """
    return [
        create(x.shape, dtype=compute_dtype(x.dtype), device=x.device)
        if wanted and x is not None
        else None
        for x, wanted in zip(likes, need, strict=True)
    ]


def filled(buffers: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators cannot return None: an empty tensor stands for a derivative that was not asked
    for.
    """
    absent = [like.new_empty(0, dtype=compute_dtype(like.dtype)) for _ in buffers]
    return tuple(
        other if buffer is None else buffer for buffer, other in zip(buffers, absent, strict=True)
    )


def fake_gradients(
    features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """What an operator returns that is asked last for the gradients in the parts that it
    ``need``s.
    """
    dtype = compute_dtype(features.dtype)
    return tuple(
        features.new_empty(x.shape if wanted and x is not None else (0,), dtype=dtype)
        for x, wanted in zip((features, weight, bias), others[-1], strict=True)
    )


# ---- labels
# --------------------------------------------------------------------------------------------------


@operator("(Tensor labels, SymInt classes, int ignore_index) -> (Tensor, Tensor)")
def checked_labels(labels: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(labels as int64 with 0 for ignored ones, factor of each row: 1, or 0 where ignored), after a
    check of the range.

    An operator, so that a compiled graph checks too. While a CUDA graph is captured nothing may be
    read back: then a label out of range costs a NaN factor in place of an error, and never a read
    out of bounds.
    """
    if labels.dtype not in INTEGERS:
        raise InputTypeError(
            f"target must hold integers, got {labels.dtype}; convert class indices with "
            f"target.long()"
        )
    wrapping = labels.dtype == torch.uint64
    labels = labels.to(torch.int64)
    kept = labels != ignore_index
    if wrapping:  # beyond int64: no class, and not the ignored one either
        kept |= labels < 0
    clean = torch.where(kept, labels, 0)
    wrong = (clean < 0) | (clean >= classes)
    factor = kept.double()
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.where(wrong, 0, clean), factor.masked_fill(wrong, float("nan"))
    if bool(wrong.any()):
        if wrapping and int(labels.min()) < 0:
            raise InputError(f"target holds values beyond int64; it must lie in [0, {classes})")
        raise InputError(
            f"target must lie in [0, {classes}) or equal ignore_index ({ignore_index}), "
            f"got values from {int(labels.min())} to {int(labels.max())}; mend the labels or the "
            f"rows of linear_weight"
        )
    return clean, factor


def _checked_labels_shapes(
    labels: Tensor, classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(labels, dtype=torch.int64), torch.empty_like(
        labels, dtype=torch.float64
    )


checked_labels.register_fake(_checked_labels_shapes)
checked_labels.register_vmap(one_by_one(checked_labels))


# ---- value and gradients in one sweep
# ----------------------------------------------------------------------------


@operator(f"({HEAD}, Tensor row_weight, {_LOSS}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor)")
def head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    loss: str,
    parameter: float,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(sum_r row_weight_r l_r, gradients in features, weight and bias), in the dtype of sums."""
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, row_weight, loss, parameter
    )
    # Fresh memory, which the backend writes: zeroing a gradient first would be a pass over it for
    # nothing.
    buffers = zeros_for((features, weight, bias), need, torch.empty)
    out = Gradients(buffers[0], buffers[1], buffers[2], fresh=True)
    value = over_rows(active_rows(x), x, out, lambda x, out: backend.head(x, out).value)
    return (value.to(compute_dtype(weight.dtype)), *filled(buffers, weight))


def _head_shapes(
    features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    value = weight.new_empty((), dtype=compute_dtype(weight.dtype))
    return (value, *fake_gradients(features, weight, bias, *others))


head.register_fake(_head_shapes)


def active_rows(x: HeadInput) -> Tensor | None:
    """Rows with a weight, where others can be left out: on the CPU, for a GPU would wait for the
    count.
    """
    return rows_with_weight(x) if x.row_weight.device.type == "cpu" else None


def _head_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.loss, ctx.parameter, ctx.need = inputs
    ctx.hooked = hooks_are_set()
    keep(ctx, *tensors, *output[1:])


def _head_backward(
    ctx: Any, upstream: Tensor | None, *directions: Tensor | None
) -> tuple[Any, ...]:
    """upstream * gradient + Hessian @ directions; for row_weight  upstream * l + slopes along the
    directions.
    """
    return head_rule(ctx, ctx.saved_tensors, upstream, directions)


def head_rule(
    ctx: Any, saved: Sequence[Any], upstream: Tensor | None, directions: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """``saved``: read once, for torch.utils.checkpoint hands out what it recomputed a single
    time.
    """
    *inputs, row_weight = saved[:7]
    needed = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    along = [v if wanted else None for v, wanted in zip(directions, ctx.need, strict=True)]
    loss = (ctx.loss, ctx.parameter)
    total: list[Tensor | None] = [None, None, None]
    weight_gradient = None
    if upstream is not None and any(needed):
        gradients = _gradients(ctx, saved, needed)
        own = not ctx.hooked
        total = [
            _scaled(upstream, g, own) if w else None for g, w in zip(gradients, needed, strict=True)
        ]
    if any(v is not None for v in along):
        if any(needed):
            product = hessian_product(*_of_second_order(*inputs, row_weight), *along, *loss, needed)
            total = [
                summed(a, b if w else None) for a, b, w in zip(total, product, needed, strict=True)
            ]
        if ctx.needs_input_grad[6]:
            weight_gradient = row_slopes(*inputs, *along, *loss).to(row_weight.dtype)
    if upstream is not None and ctx.needs_input_grad[6]:
        weight_gradient = summed(
            weight_gradient, (upstream * row_losses(*inputs, *loss)).to(row_weight.dtype)
        )
    total = [t if t is None else t.to(x.dtype) for t, x in zip(total, inputs, strict=False)]
    return (*total, None, None, None, weight_gradient, None, None, None)


def _gradients(ctx: Any, saved: Sequence[Any], needed: list[bool]) -> Sequence[Tensor]:
    """The gradients of the forward sweep; a new sweep where it could not know that one would be
    needed.
    """
    if all(have or not wanted for have, wanted in zip(ctx.need, needed, strict=True)):
        return saved[7:]
    again: tuple[Tensor, ...] = value_and_gradients(*saved[:7], ctx.loss, ctx.parameter, needed)[1:]
    return again


def _scaled(upstream: Tensor, gradient: Tensor, own: bool) -> Tensor:
    """upstream * gradient, in place where this backward is the last reader of the buffer: K x d may
    be gigabytes.

    ``own`` is False where somebody else may hold it. ``loss.backward()`` has upstream 1: on the
    CPU, where looking is free, the buffer is handed over as it is.
    """
    if not own or blind() or torch.is_grad_enabled() or graph_is_kept() or forward_mode():
        return upstream * gradient
    if any(type(x) is not Tensor or wrapped(x) for x in (upstream, gradient)):
        return upstream * gradient
    gradient = (
        gradient.detach()
    )  # a saved output comes back with its graph, which the caller did not ask for
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient.mul_(upstream)


def summed(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def head_tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> tuple[Tensor | None, ...]:
    """<gradient, move> and Hessian @ move; for a move of row_weight the value and gradients that it
    weighs.
    """
    *inputs, row_weight = saved[:7]
    along, row_move, loss = in_sums(moves[:3]), moves[6], (ctx.loss, ctx.parameter)
    moving = [v is not None for v in along]
    total: list[Tensor | None] = [None] * 4
    if any(moving):
        gradients = _gradients(ctx, saved, moving)
        slopes = [
            torch.dot(g.reshape(-1), v.reshape(-1))
            for g, v in zip(gradients, along, strict=True)
            if v is not None
        ]
        total[0] = functools.reduce(torch.add, slopes)
        if any(ctx.need):
            total[1:] = hessian_product(*inputs, row_weight, *along, *loss, ctx.need)
    if row_move is not None:
        weighed = value_and_gradients(*inputs, row_move, *loss, ctx.need)
        total = [summed(have, more) for have, more in zip(total, weighed, strict=True)]
    return total[0], *filled(
        [t if wanted else None for t, wanted in zip(total[1:], ctx.need, strict=True)], inputs[1]
    )


def in_sums(moves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tangents, which have the dtype of what moves, in the dtype of sums."""
    return [v if v is None else v.to(compute_dtype(v.dtype)) for v in moves]


value_and_gradients = differentiable(head, _head_context, _head_backward, head_tangents)


# ---- the loss of each row
# ----------------------------------------------------------------------------------------


@operator(f"({HEAD}, {_LOSS}) -> Tensor")
def head_losses(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    loss: str,
    parameter: float,
) -> Tensor:
    """l_r of each row (R,), in the dtype of sums."""
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, _ones(features), loss, parameter
    )
    if not features.shape[0]:
        return features.new_zeros(0, dtype=compute_dtype(weight.dtype))
    return backend.losses(x).to(compute_dtype(weight.dtype))


def _rows_shape(features: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """A number a row, as losses and slopes have it."""
    return features.new_empty(features.shape[0], dtype=compute_dtype(weight.dtype))


head_losses.register_fake(_rows_shape)


def _ones(features: Tensor) -> Tensor:
    return torch.ones(features.shape[0], dtype=torch.float64, device=features.device)


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.loss, ctx.parameter = inputs
    keep(ctx, *tensors)


def _losses_backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    if upstream is None:
        return (None,) * 8
    needed = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    gradients = value_and_gradients(*inputs, upstream, ctx.loss, ctx.parameter, needed)[1:]
    total = [
        g.to(x.dtype) if w else None for g, x, w in zip(gradients, inputs, needed, strict=False)
    ]
    return (*total, None, None, None, None, None)


def _losses_tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> Tensor:
    slopes: Tensor = row_slopes(*saved, *in_sums(moves[:3]), ctx.loss, ctx.parameter)
    return slopes


row_losses = differentiable(head_losses, _losses_context, _losses_backward, _losses_tangents)


# ---- second order
# ------------------------------------------------------------------------------------------------


@operator(
    f"({HEAD}, Tensor row_weight, Tensor? v_features, Tensor? v_weight, Tensor? v_bias, {_LOSS}, "
    f"bool[] need)"
    " -> (Tensor, Tensor, Tensor)"
)
def head_product(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor,
    v_features: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    loss: str,
    parameter: float,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Hessian of the weighted sum times the direction (None is zero), for the parts in ``need``."""
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, row_weight, loss, parameter
    )
    direction = _direction(x, v_features, v_weight, v_bias)
    buffers, rows = zeros_for((features, weight, bias), need), active_rows(x)
    if rows is not None:
        direction = rows_of(direction, rows)
    over_rows(
        rows,
        x,
        Gradients(buffers[0], buffers[1], buffers[2]),
        lambda x, out: backend.head_hvp(x, direction, out),
    )
    return filled(buffers, weight)


head_product.register_fake(fake_gradients)


def _direction(
    x: HeadInput, features: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> HeadInput:
    """A direction at ``x`` in its dtype of sums, with zeros for parts that do not move."""
    features, weight, bias = (
        v.contiguous() if v is not None else zeros
        for v, zeros in zip(
            (features, weight, bias),
            zeros_for((x.features, x.weight, x.bias), [True] * 3),
            strict=True,
        )
    )
    assert features is not None
    assert weight is not None
    return HeadInput(x.loss, features, weight, bias, x.targets, x.row_weight)


@operator(f"({HEAD}, Tensor? v_features, Tensor? v_weight, Tensor? v_bias, {_LOSS}) -> Tensor")
def head_slopes(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    indptr: Tensor | None,
    class_weight: Tensor | None,
    v_features: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    loss: str,
    parameter: float,
) -> Tensor:
    """Slope of each row's loss along the direction (R,):  v_h . G W + h . G v_W + G v_b
    with G the logit gradient.
    """
    backend, x = head_input(
        features, weight, bias, indices, indptr, class_weight, _ones(features), loss, parameter
    )
    v = _direction(x, v_features, v_weight, v_bias)
    dtype, dim = compute_dtype(weight.dtype), features.shape[1]
    right = (
        [x.weight.to(dtype), v.weight]
        if v.bias is None
        else [x.weight.to(dtype), v.weight, v.bias[:, None]]
    )
    product = backend.logit_gradient(x).times(torch.cat(right, dim=1))
    slopes = (v.features * product[:, :dim]).sum(1) + (x.features * product[:, dim : 2 * dim]).sum(
        1
    )
    return slopes if v.bias is None else slopes + product[:, -1]


head_slopes.register_fake(_rows_shape)


_THIRD = "third derivatives of a fused loss are not available; take them of the dense expression"


def _product_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For derivatives in the direction, and in forward mode in row_weight, which are of the second
    order.
    """
    *tensors, ctx.loss, ctx.parameter, ctx.need = inputs
    ctx.linear = all(refuses(x) for x in (*tensors[:3], tensors[6]))
    keep(ctx, *(tensors if ctx.linear or forward_mode() else ()))


def _product_backward(ctx: Any, *upstream: Tensor | None) -> Any:
    """The Hessian is symmetric: its product with ``upstream`` is the derivative in the
    direction.
    """
    if not ctx.linear:
        raise NotImplementedError(_THIRD)
    *inputs, row_weight, _, _, _ = ctx.saved_tensors
    moving = list(ctx.needs_input_grad[7:10])
    total: list[Tensor | None] = [None] * 3
    if any(moving) and any(v is not None for v in upstream):
        along = [v if wanted else None for v, wanted in zip(upstream, ctx.need, strict=True)]
        product = hessian_product(
            *_of_second_order(*inputs, row_weight), *along, ctx.loss, ctx.parameter, moving
        )
        total = [g if wanted else None for g, wanted in zip(product, moving, strict=True)]
    return (None,) * 7 + (*total, None, None, None)


def _of_second_order(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a Hessian product is taken at: derivatives in it are of the third order. The product
    itself tells transforms.
    """
    if blind() or forward_mode() or not torch.is_grad_enabled():
        return tensors
    features, weight, bias, indices, indptr, class_weight, row_weight = tensors
    features, weight, bias, row_weight = (
        refusing(x, _THIRD) for x in (features, weight, bias, row_weight)
    )
    return features, weight, bias, indices, indptr, class_weight, row_weight


def _product_tangents(
    ctx: Any, saved: list[Any], *moves: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The product is linear in row_weight and in the direction."""
    if any(v is not None for v in moves[:3]):
        raise NotImplementedError(_THIRD)
    *inputs, row_weight, v_features, v_weight, v_bias = saved
    loss = (ctx.loss, ctx.parameter, ctx.need)
    total: list[Tensor | None] = [None] * 3
    if moves[6] is not None:
        total = list(hessian_product(*inputs, moves[6], v_features, v_weight, v_bias, *loss))
    if any(v is not None for v in moves[7:10]):
        more = hessian_product(*inputs, row_weight, *moves[7:10], *loss)
        total = [summed(a, b) for a, b in zip(total, more, strict=True)]
    return filled(
        [t if wanted else None for t, wanted in zip(total, ctx.need, strict=True)], inputs[1]
    )


def _slopes_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.loss, ctx.parameter = inputs
    keep(ctx, *tensors)


def _slopes_backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    """sum_r upstream_r slope_r is the derivative along v of the sum that upstream weighs: Hessian @
    v, and its gradient.
    """
    *inputs, v_features, v_weight, v_bias = ctx.saved_tensors
    if upstream is None:
        return (None,) * 11
    needed, moving = list(ctx.needs_input_grad[:3]), list(ctx.needs_input_grad[6:9])
    loss = (ctx.loss, ctx.parameter)
    total: list[Tensor | None] = [None] * 6
    if any(needed):
        product = hessian_product(*inputs, upstream, v_features, v_weight, v_bias, *loss, needed)
        total[:3] = [
            t.to(x.dtype) if w else None for t, x, w in zip(product, inputs, needed, strict=False)
        ]
    if any(moving):
        gradients = value_and_gradients(*inputs, upstream, *loss, moving)[1:]
        total[3:] = [g if w else None for g, w in zip(gradients, moving, strict=True)]
    return (*total[:3], None, None, None, *total[3:], None, None)


def _slopes_tangents(ctx: Any, saved: list[Any], *moves: Tensor | None) -> Tensor:
    """Linear in the direction. How a single row's slope changes with the point is a curvature that
    no sweep gives.
    """
    if any(v is not None for v in moves[:3]):
        raise NotImplementedError(
            "second derivatives of single rows, both in forward mode, are not available; "
            "take one of them in reverse mode, or reduce the loss to its mean or sum first"
        )
    slopes: Tensor = row_slopes(*saved[:6], *moves[6:9], ctx.loss, ctx.parameter)
    return slopes


hessian_product = differentiable(
    head_product, _product_context, _product_backward, _product_tangents
)
row_slopes = differentiable(head_slopes, _slopes_context, _slopes_backward, _slopes_tangents)
