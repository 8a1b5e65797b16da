"""Squared error: which classes go by Gram matrices and which by their residuals. Never an R x K array.

A Gram value is a difference of O(1) terms, right to about eps. For d below the number P of classes that have rows that is
harmless, for the minimum has what the missing dimensions leave, half a class's weight each. For P <= d the minimum falls with
lambda and the digits would run out, so there those classes go by their residuals, R x P <= R x d numbers in blocks. So do
the classes without rows while K <= d; beyond, they go by Grams, which have nothing to cancel without targets.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends import gram, residual
from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.gram import logit_products
from ufm_fast.targets import Targets

__all__ = ["by_residuals", "hvp", "logit_products", "losses", "own_residual", "residual_sum", "value_and_grad"]


def by_residuals(targets: Targets, classes: int, dim: int) -> bool:
    """Whether the classes that have rows go by their residuals: where they are at most d."""
    return 0 < targets.occupied(classes)[0].numel() <= dim


def value_and_grad(x: HeadInput, out: Gradients) -> Tensor:
    """Value (float64 scalar); adds gradients into ``out``."""
    split = _split(x)
    if split is None:
        return gram.value_and_grad(x, out)
    near, far = split
    if not far.numel():
        return residual.value_and_grad(x, out)
    mine, rest = _taken(out, near), _taken(out, far)
    value = residual.value_and_grad(_of_classes(x, near), mine)
    value = value + gram.value_and_grad(_of_classes(x, far), rest, targets=False)
    _put_back(out, mine, near)
    _put_back(out, rest, far)
    return value


def hvp(x: HeadInput, v: HeadInput, out: Gradients) -> None:
    """Adds the Hessian product into ``out``."""
    split = _split(x)
    if split is None:
        gram.hvp(x, v, out)
        return
    near, far = split
    if not far.numel():
        residual.hvp(x, v, out)
        return
    mine, rest = _taken(out, near), _taken(out, far)
    residual.hvp(_of_classes(x, near), _of_classes(v, near), mine)
    gram.hvp(_of_classes(x, far), _of_classes(v, far), rest, targets=False)
    _put_back(out, mine, near)
    _put_back(out, rest, far)


def losses(x: HeadInput) -> Tensor:
    """1/2 |W h_r + b - e_y|^2 of each row, float64 (R,)."""
    split = _split(x)
    if split is None:
        return gram.losses(x)
    near, far = split
    value = residual.losses(_of_classes(x, near))
    return value + gram.losses(_of_classes(x, far), targets=False) if far.numel() else value


def residual_sum(x: HeadInput) -> Tensor:
    """sum_r o_r (W h_r + b - e_y), float64 (K,), by exact residuals where those serve."""
    product = logit_products(x, None, torch.ones_like(x.row_weight)[:, None])[1]
    assert product is not None
    total, split = product[:, 0], _split(x)
    if split is not None:
        parts = residual.blocks(_of_classes(x, split[0]), exact=True)
        total[split[0]] = torch.stack([x.row_weight[part] @ E for part, E in parts]).sum(0)
    return total


def own_residual(x: HeadInput) -> Tensor:
    """The target's entry of each row's residual, float64 (R,), exact where residuals serve."""
    return residual.own(x, exact=by_residuals(x.targets, *x.weight.shape))


def _split(x: HeadInput) -> tuple[Tensor, Tensor] | None:
    """Classes that go by residuals and those that go by Grams, ascending; None where all go by Grams."""
    K, d = x.weight.shape
    if not by_residuals(x.targets, K, d):
        return None
    near, far = x.targets.occupied(K)
    return (torch.arange(K, device=near.device), far[:0]) if far.numel() and d >= K else (near, far)


def _of_classes(x: HeadInput, classes: Tensor) -> HeadInput:
    """The same rows and only those classes, ascending; targets outside them are meaningless there."""
    if classes.numel() == x.weight.shape[0]:
        return x
    bias = None if x.bias is None else x.bias[classes]
    return replace(x, targets=Targets(torch.searchsorted(classes, x.targets.indices)), weight=x.weight[classes], bias=bias)


def _taken(out: Gradients, classes: Tensor) -> Gradients:
    """The buffers of some classes: copies, but for the features' own."""
    return Gradients(
        out.features, None if out.weight is None else out.weight[classes], None if out.bias is None else out.bias[classes]
    )


def _put_back(out: Gradients, part: Gradients, classes: Tensor) -> None:
    for whole, some in ((out.weight, part.weight), (out.bias, part.bias)):
        if whole is not None and some is not None:
            whole[classes] = some
