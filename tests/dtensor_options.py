"""What the ranks of `dtensor_worker` check of the arguments of the drop-in loss: scales, adjusted
and capped logits, weights with smoothing, buffers of gradients, second derivatives.

Each is a case of `compared`: value and gradients of both ways, the classifier by class and whole,
against one process with full tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ufm_fast.adjustments import Adjustment
from ufm_fast.functional import linear_cross_entropy

Check = tuple[str, float, float]
#: (N, K, d): ragged blocks of both, and ranks without rows and without classes.
SHAPES = ((7, 5, 3), (1, 2, 2))
REDUCTIONS = ("mean", "sum", "none")


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spread(mesh: DeviceMesh, x: Tensor) -> DTensor:
    """By rows; a number on each rank."""
    placement = Shard(0) if x.dim() else Replicate()
    return distribute_tensor(x.detach(), mesh, [placement], src_data_rank=None).requires_grad_(
        x.requires_grad
    )


def copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def placed(mesh: DeviceMesh, leaves: Sequence[Tensor], by_class: bool) -> list[Tensor]:
    """Features by sample, and the others by class or whole."""
    return [spread(mesh, x) if i == 0 or by_class else copied(x) for i, x in enumerate(leaves)]


def whole(mesh: DeviceMesh, gradient: Tensor) -> Tensor:
    """Of a DTensor, or the sum of the ranks' shares."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    dist.all_reduce(gradient, group=mesh.get_group())
    return gradient


def compared(
    mesh: DeviceMesh,
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    kinds: tuple[bool, ...] = (True, False),
    **given: Any,
) -> Iterator[Check]:
    """Value and gradients of features, classifier, bias and scale. ``kinds``: by class or not."""
    leaves = [copied(x) for x in tensors if x is not None]
    scale = given.pop("logit_scale", None)
    if isinstance(scale, Tensor):
        leaves.append(scale := copied(scale))
    bias = leaves[2] if tensors[2] is not None else None
    one = linear_cross_entropy(*leaves[:2], target, linear_bias=bias, logit_scale=scale, **given)
    upstream = torch.randn_like(one) if one.dim() else torch.full_like(one, 2.0)
    one.backward(upstream)
    samples = given.pop("sample_weight", None)
    for by_class in kinds:
        parts = placed(mesh, leaves, by_class)
        factor = scale
        if isinstance(scale, Tensor):  # a parameter on every rank, plain or a DTensor
            factor = parts[-1] = spread(mesh, scale) if by_class else copied(scale)
        many = linear_cross_entropy(
            *parts[:2],
            spread(mesh, target),
            linear_bias=parts[2] if bias is not None else None,
            logit_scale=factor,
            sample_weight=None if samples is None else spread(mesh, samples),
            **given,
        )
        many.backward(spread(mesh, upstream))
        said = f"{name}, by class {by_class}"
        yield f"{said}: value", relative(many.full_tensor(), one), 1e-12
        for x, part in zip(leaves, parts, strict=True):
            if part.grad is None:
                yield f"{said}: gradient", 1.0, 0.0
            else:
                yield f"{said}: {tuple(x.shape)}", relative(whole(mesh, part.grad), x.grad), 1e-12
            if isinstance(part, DTensor):
                yield f"{said}: placements", float(part.grad.placements != part.placements), 0.0


def _adjustments(K: int) -> dict[str, Adjustment]:
    offset, margin, scale = numbers(K), numbers(K).abs(), 0.5 + torch.rand(K, dtype=torch.float64)
    return {
        "offset": Adjustment(offset=offset),
        "margin": Adjustment(margin=margin),
        "vector scaling": Adjustment(offset, margin, scale),
    }


def cases(K: int, N: int) -> Iterator[dict[str, Any]]:
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    of_classes, of_samples = torch.rand(K), torch.rand(N)
    if N > 1:
        of_samples[N // 2] = 0.0
    adjustments = _adjustments(K)
    yield {"logit_scale": 0.3, "label_smoothing": 0.1}
    yield {"logit_scale": scale}
    for adjustment in adjustments.values():
        yield {"adjustment": adjustment}
        yield {"adjustment": adjustment, "logit_scale": scale, "label_smoothing": 0.1}
    yield {"softcap": 2.0}
    yield {"softcap": 2.0, "logit_scale": scale, "weight": of_classes}
    yield {"softcap": 0.5, "adjustment": adjustments["offset"], "sample_weight": of_samples}
    yield {"weight": of_classes, "label_smoothing": 0.1}
    yield {"weight": of_classes, "label_smoothing": 1.0, "sample_weight": of_samples}
    yield {
        "weight": of_classes,
        "label_smoothing": 0.3,
        "adjustment": adjustments["offset"],
        "logit_scale": scale,
    }
    yield {"label_smoothing": 1.0}


def options(mesh: DeviceMesh) -> Iterator[Check]:
    """Every argument, also together with others."""
    for shift, ((N, K, d), biased) in enumerate(itertools.product(SHAPES, (False, True))):
        H, W, b = numbers(N, d), 3.0 * numbers(K, d), numbers(K) if biased else None
        target = torch.randint(K, (N,))
        if N > 1:
            target[N // 2] = -100
            H[N // 2] = torch.nan  # an ignored row may hold anything
        for x in (H, W, b):
            if x is not None:
                x.requires_grad_()
        for number, given in enumerate(cases(K, N)):
            how = REDUCTIONS[(number + shift) % 3]
            said = ", ".join(f"{name} {value}" for name, value in given.items())
            yield from compared(
                mesh, f"{N} {biased} {how}: {said}", (H, W, b), target, reduction=how, **given
            )


def whole_only(mesh: DeviceMesh) -> Iterator[Check]:
    """A whole classifier has all that one process has: probabilities and several heads too."""
    N, K, d = 7, 5, 3
    tensors = (numbers(N, d).requires_grad_(), numbers(K, d).requires_grad_(), None)
    soft, of_classes, of_samples = numbers(N, K).softmax(1), torch.rand(K), torch.rand(N)
    for how, weight, samples in itertools.product(
        REDUCTIONS, (None, of_classes), (None, of_samples)
    ):
        given = {"reduction": how, "weight": weight, "sample_weight": samples}
        name = f"probabilities {how} {weight} {samples}"
        yield from compared(
            mesh, name, tensors, soft, (False,), label_smoothing=0.1, logit_scale=2.0, **given
        )
        yield from _gathered(mesh, name, tensors[0], tensors[1], soft, reduction=how)
        heads = (tensors[0], numbers(K, 2, d).requires_grad_(), numbers(K, 2).requires_grad_())
        target = torch.randint(K, (N, 2))
        given["sample_weight"] = None if samples is None else torch.rand(N, 2)
        yield from compared(mesh, f"two heads {how} {weight}", heads, target, (False,), **given)


def _gathered(
    mesh: DeviceMesh, name: str, H: Tensor, W: Tensor, soft: Tensor, **given: Any
) -> Iterator[Check]:
    """A classifier by class that is gathered for what only a whole one has, as refusals say."""
    x, leaf = spread(mesh, H), spread(mesh, W)
    whole_weight = leaf.full_tensor(grad_placements=[Partial()])
    linear_cross_entropy(x, whole_weight, spread(mesh, soft), **given).sum().backward()
    H.grad = W.grad = None
    linear_cross_entropy(H, W, soft, **given).sum().backward()
    yield f"{name}: gathered", relative(whole(mesh, leaf.grad), W.grad), 1e-12


def buffers(mesh: DeviceMesh) -> Iterator[Check]:
    """Gradients of the classifier go to main_grad, which holds this rank's classes, or its share of
    a whole one; and they have no .grad.
    """
    for (N, K, d), how, both in itertools.product(SHAPES, ("mean", "sum"), (True, False)):
        H, W, b = numbers(N, d), numbers(K, d), numbers(K)
        target, start = torch.randint(K, (N,)), (numbers(K, d), numbers(K))
        leaves = [x.requires_grad_() for x in (H, W, b)]
        into = (start[0].clone(), start[1].clone() if both else None)
        given = {"reduction": how, "logit_scale": 1.5, "label_smoothing": 0.1}
        value = linear_cross_entropy(H, W, target, linear_bias=b, main_grad=into, **given)
        (3.0 * value).backward()
        for by_class in (True, False):
            parts = placed(mesh, leaves, by_class)
            first = mesh.get_local_rank() == 0
            held = [spread(mesh, x) if by_class else x.clone() * first for x in start]
            if not both:
                held[1] = None
            many = linear_cross_entropy(
                *parts[:2], spread(mesh, target), linear_bias=parts[2], main_grad=held, **given
            )
            (3.0 * many).backward()
            name = f"main_grad {N} {how} {both} by class {by_class}"
            for x, part, expected, found in zip(
                leaves, parts, (None, *into), (None, *held), strict=True
            ):
                if expected is None:
                    yield (
                        f"{name} {tuple(x.shape)}",
                        relative(whole(mesh, part.grad), x.grad),
                        1e-12,
                    )
                else:
                    yield f"{name}: no .grad", float(part.grad is not None), 0.0
                    yield f"{name} buffer", relative(whole(mesh, found), expected), 1e-12


def second_derivatives(mesh: DeviceMesh) -> Iterator[Check]:
    """Gradients of <gradient of f, v> with f the square of a sum or mean, or rows' losses that are
    weighed by what is differentiated too.
    """
    for number, (N, K, d) in enumerate(SHAPES):
        H, W, b = (x.requires_grad_() for x in (numbers(N, d), numbers(K, d), numbers(K)))
        target, v = torch.randint(K, (N,)), [numbers(N, d), numbers(K, d), numbers(K)]
        for case, given in enumerate(cases(K, N)):
            given = {**given, "reduction": REDUCTIONS[(case + number) % 3]}
            samples = given.pop("sample_weight", None)
            scale = given.pop("logit_scale", None)
            if scale is not None:
                scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
            leaves = [H, W, b, numbers(N).requires_grad_(), scale]
            for x in (H, W, b):
                x.grad = None
            _differentiate_twice(leaves, target, v, samples, given)
            for by_class in (True, False):
                parts = [*placed(mesh, (H, W, b), by_class), spread(mesh, leaves[3]), None]
                if scale is not None:
                    parts[4] = placed(mesh, (H, scale), by_class)[1]
                along = placed(mesh, v, by_class)
                of_samples = None if samples is None else spread(mesh, samples)
                _differentiate_twice(parts, spread(mesh, target), along, of_samples, given)
                said = ", ".join(f"{name} {value}" for name, value in given.items())
                for x, part in zip(leaves, parts, strict=True):
                    if x is not None and x.grad is not None:
                        name = f"second derivative {N} by class {by_class} {tuple(x.shape)}: {said}"
                        yield name, relative(whole(mesh, part.grad), x.grad), 1e-12


def _differentiate_twice(
    leaves: list[Any],
    target: Tensor,
    v: list[Tensor],
    samples: Tensor | None,
    given: dict[str, Any],
) -> None:
    H, W, b, rows, scale = leaves
    value = linear_cross_entropy(
        H, W, target, linear_bias=b, sample_weight=samples, logit_scale=scale, **given
    )
    f, upstream = (value, rows) if value.dim() else (value.square(), None)
    slopes = torch.autograd.grad(f, (H, W, b), upstream, create_graph=True)
    # A share of the whole is a number of its own on each rank.
    torch.autograd.backward([(slope * x).sum() for slope, x in zip(slopes, v, strict=True)])
