"""How an operator gets its derivatives in every mode of torch: reverse, forward, torch.func,
torch.compile.

``operator`` registers a function, ``differentiable`` gives it one rule for all modes. The rest
answers what a rule must know of the mode it runs in; most of that is not public in torch.

Decisions

2026-11-25. `vmap` of a fused loss is a loop: one sweep fills the machine, and the operators would
have to carry a batch dimension through every kernel.

2026-11-26. A Hessian product is differentiable in its direction. It is linear there, and torch's
older functional interface (`hvp`, `jvp` of a gradient) asks for just that. But a node is not told
which of its derivatives are wanted; so the point goes in through nodes of one input each that
refuse to be run (`registration.Refusal`), and a third derivative is refused as before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ufm_fast.errors import InputError

_Function = TypeVar("_Function", bound=Callable[..., Any])

# None of these is public in torch, so each may go. Without the first, torch.func refuses the
# operators; without the others, gradients are copied rather than handed over.
transforming: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)
graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
_STAND_INS: list[Callable[[Tensor], bool]] = [
    getattr(torch._C._functorch, name, lambda _: True)
    for name in ("is_functorch_wrapped_tensor", "is_legacy_batchedtensor")
]


def blind() -> bool:
    """Whether a tracer runs that records operations and refuses questions about their numbers."""
    return torch.compiler.is_compiling() or transforming() or _traced()


def _traced() -> bool:
    """Inside ``make_fx``, on which torch.func.linearize is built."""
    mode, key = (
        getattr(torch._C, "_get_dispatch_mode", None),
        getattr(torch._C, "_TorchDispatchModeKey", None),
    )
    return mode is not None and key is not None and mode(key.PROXY) is not None


def _forward_mode_on() -> Any:
    switch = getattr(forward_ad, "_set_fwd_grad_enabled", None)
    return contextlib.nullcontext() if switch is None else switch(True)


def forward_mode() -> bool:
    """Whether tensors may carry tangents now. A torch that no longer tells is taken to say yes."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def wrapped(x: Tensor) -> bool:
    """A batch of either vmap, of torch.func or of ``is_grads_batched``, or another transform's
    stand-in.
    """
    return any(ask(x) for ask in _STAND_INS)


def differentiable(
    registered: Any,
    context: Callable[..., None],
    backward: Callable[..., Any],
    tangents: Callable[..., Any],
) -> Callable[..., Any]:
    """``registered`` with its derivatives, inside torch.func transforms and in forward mode as
    well.

    A custom operator's own autograd rule refuses torch.func and drops tangents (as of torch 2.13),
    a Function with setup_context does neither; torch.compile in turn sees through the operator.
    Both are given the same rule.
    """
    registered.register_autograd(backward, setup_context=context)
    registered.register_vmap(one_by_one(registered))
    rules = {
        "forward": registered,
        "setup_context": context,
        "backward": backward,
        "jvp": _at_outer_levels(tangents),
        "vmap": one_by_one(lambda *given: call(*given)),
    }
    function: Any = type(
        "FusedHead",
        (torch.autograd.Function,),
        {name: staticmethod(f) for name, f in rules.items()},
    )
    traceable = _traceable(registered, context, backward)

    def call(*arguments: Any) -> Any:
        if not transforming() and not forward_mode():
            return registered(*arguments)
        # Compiled code must not lose tangents either: with ``function`` torch.compile says that it
        # knows no jvp.
        if forward_mode() or not torch.compiler.is_compiling():
            return function.apply(*arguments)
        # For what came straight into the graph it has noted requires_grad before the transform set
        # it: views are noted anew.
        return traceable.apply(*(a.view_as(a) if isinstance(a, Tensor) else a for a in arguments))

    return call


def _traceable(registered: Any, context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The same Function as torch.compile reads it inside a transform: without a jvp, of plain
    Python functions.
    """

    plain = registered._opoverload  # it knows what this is, but not what ``registered`` is

    def forward(*arguments: Any) -> Any:
        return plain(*arguments)

    # It tells by their number whether a ctx is among the parameters.
    names = [argument.name for argument in plain._schema.arguments]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    rules = {"forward": forward, "setup_context": context, "backward": backward}
    return type(
        "FusedHead",
        (torch.autograd.Function,),
        {name: staticmethod(f) for name, f in rules.items()},
    )


class Refusal(torch.autograd.Function):
    """The same tensor, through which no derivative is taken: where the engine gets here, it was
    asked for one.

    A node of several inputs does not learn which of their derivatives are wanted; a node of one
    runs only for its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise NotImplementedError(ctx.message)


def refusing(x: Tensor | None, message: str) -> Tensor | None:
    """``x``, of which a derivative raises NotImplementedError(message)."""
    return Refusal.apply(x, message) if x is not None and x.requires_grad else x  # type: ignore[no-untyped-call]


def refuses(x: Tensor | None) -> bool:
    """Whether no derivative in ``x`` will be taken."""
    return (
        x is None
        or not x.requires_grad
        or (x.grad_fn is not None and x.grad_fn.name() == "RefusalBackward")
    )


def hooks_are_set() -> bool:
    """Whether saved tensors go through hooks, which may keep them (in a compiled graph they do not
    reach this code).
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
    return not torch.compiler.is_compiling() and top(True) is not None


def _at_outer_levels(rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule(ctx, saved, *moves)`` as a Function's jvp, with the saved tensors free of the tangents
    of its own level.

    torch switches forward mode off around a jvp, for all levels: what encloses this one would lose
    its tangents.
    """

    def jvp(ctx: Any, *moves: Tensor | None) -> Any:
        with _forward_mode_on():
            return rule(ctx, [x if x is None else _primal(x) for x in ctx.saved_tensors], *moves)

    return jvp


def _primal(x: Tensor) -> Tensor:
    return cast("Tensor", forward_ad.unpack_dual(x).primal) if x.is_floating_point() else x  # type: ignore[no-untyped-call]


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save for ``backward`` and, where tangents may follow, for ``tangents``; absent ones of either
    are None, not zeros.
    """
    ctx.save_for_backward(*tensors)
    if forward_mode():
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of torch.func.vmap: a call for each item of the batch. A sweep fills the machine by
    itself.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def item(i: int) -> list[Any]:
            return [
                a.select(d, i) if isinstance(d, int) else a
                for a, d in zip(arguments, in_dims, strict=True)
            ]

        if not info.batch_size:
            raise InputError(
                "vmap over no items at all: a fused loss has no shape to return; leave the call out"
            )
        found = [function(*item(i)) for i in range(info.batch_size)]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(torch.stack(column) for column in zip(*found, strict=True)), (0,) * len(
            found[0]
        )

    return rule


def operator(schema: str) -> Callable[[_Function], Any]:
    """Register under ufm_fast::<function name>; autocast is off inside, where sums must keep the
    dtype they have.
    """

    def register(function: _Function) -> Any:
        @functools.wraps(function)
        def exact(*arguments: Any) -> Any:
            with torch.autocast(arguments[0].device.type, enabled=False):
                return function(*arguments)

        return torch.library.custom_op(
            f"ufm_fast::{function.__name__}", exact, mutates_args=(), schema=schema
        )

    return register
