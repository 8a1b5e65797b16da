"""Squared error: what goes by Gram matrices and what by residuals. No array and no product of R x
K.

A Gram value is a difference of O(1) terms, right to about eps. For d below the number P of classes
that have rows that is harmless, for the minimum has what the missing dimensions leave, half the
weight of a smallest class each; a bias is as good as a dimension. For P <= D, D = d or d + 1 with a
bias, the minimum falls with lambda and the digits would run out, so there residuals E take their
place, hardly more of them than the entries of a Gram matrix. Up to D rows go one by one. More go by
the means m_k of their classes: with delta_r = h_r - m_(y_r), E_r = E(m) + W delta_r,

    fit = 1/2 sum_k o_k |E_k|^2 + sum_k <E_k W, s_k> + 1/2 <W'W, S>,
    s_k = sum_(y_r = k) o_r delta_r,    S = sum_r o_r delta_r delta_r'

where nothing cancels (o_k sums the weights of a class, and s is zero where they are equal). Classes
without rows have zero targets: they go with the others while K <= D, and else by Grams, which have
nothing to cancel there.

Decisions

2026-11-25. Squared error never costs more than Gram matrices do, O((K + R) d^2), formed in float64
by blocks of rows. A Gram value is a difference of O(1) terms. For d below the number P of classes
that have rows that is harmless, for the minimum is at least what the missing dimensions leave, half
the weight of a smallest class each. For P <= d, or d + 1 with a bias, which is as good as a
dimension, it falls with lambda, and with penalties of 1e-7 a random start stalled at a relative
error of 1e-7 and of 0.1 at 1e-9. So there residuals take the Grams' place: of the rows while they
are at most d, else of the class means, beside the Gram of the deviations from them
(`backends/squared_error.py`). They are never more numbers than a d x d matrix, nothing cancels in
the value, and the bias kinds and count vectors of the tests end within 1e-12 of theory. The
certificate cuts the factors into leading and trailing bits first, so that residuals of 1e-9 have
all their digits, and puts a free bias where the residuals' mean vanishes: its bound stays below the
minimum whatever the point (`tests/theory/test_certificates.py`). The point's own rounding then
leaves gaps of 1e-8 at lambda = 1e-9 and 1e-5 at 1e-12; but here the best dual rows of all are known
(`squared_error.mse_bound`), and they close them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.backends import gram, residual
from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.sums import add_class_sums, class_totals
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.targets import Targets

_LOST = 1e5  # times the rounding of its terms: a smaller loss is formed by residuals

__all__ = ["along_targets", "by_residuals", "hvp", "losses", "residual_sum", "value_and_grad"]


def by_residuals(targets: Targets, classes: int, dim: int, *, bias: bool) -> bool:
    """Whether the classes that have rows go by their residuals: where they are at most d, or d + 1
    with a bias. Target vectors always do (`dense_targets`).
    """
    return (
        isinstance(targets, DenseTargets) or 0 < targets.occupied(classes)[0].numel() <= dim + bias
    )


def value_and_grad(x: HeadInput, out: Gradients) -> Tensor:
    """Value (float64 scalar); adds gradients into ``out``."""
    if isinstance(x.targets, DenseTargets):
        return residual.value_and_grad(x, out)
    split = _split(x)
    if split is None:
        return gram.value_and_grad(x, out)
    near, far = split
    evaluate = _value_by_means if _many(x) else residual.value_and_grad
    with _buffers(x, out, near) as mine:
        value = evaluate(_of_classes(x, near), mine)
    if far.numel():
        with _buffers(x, out, far) as rest:
            value = value + gram.value_and_grad(_of_classes(x, far), rest, targets=False)
    return value


def hvp(x: HeadInput, v: HeadInput, out: Gradients) -> None:
    """Adds the Hessian product into ``out``; nothing in it cancels, so that many rows go by
    Grams.
    """
    if isinstance(x.targets, DenseTargets):
        return residual.hvp(x, v, out)
    split = _split(x)
    if split is None or _many(x):
        gram.hvp(x, v, out)
        return
    near, far = split
    with _buffers(x, out, near) as mine:
        residual.hvp(_of_classes(x, near), _of_classes(v, near), mine)
    if far.numel():
        with _buffers(x, out, far) as rest:
            gram.hvp(_of_classes(x, far), _of_classes(v, far), rest, targets=False)


def losses(x: HeadInput) -> Tensor:
    """1/2 |W h_r + b - e_y|^2 of each row, float64 (R,), never negative.

    What Grams leave of a small one is the rounding of their terms: such rows go by their residuals,
    O(K d) each.
    """
    if isinstance(x.targets, DenseTargets):
        return residual.losses(x)
    split = _split(x)
    if split is None:
        return _settled(x, gram.losses(x))
    near, far = split
    mine = _of_classes(x, near)
    value = _settled(mine, _losses_by_means(mine)) if _many(x) else residual.losses(mine)
    return (
        value + gram.losses(_of_classes(x, far), targets=False).clamp_min_(0.0)
        if far.numel()
        else value
    )


def _settled(x: HeadInput, value: Tensor) -> Tensor:
    """The losses with those formed anew that the rounding of (|h| |W| + |b| + 1)^2 may have cost
    five digits.
    """
    if value.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing may be read back
        return value.clamp_min_(0.0)
    size = torch.linalg.vector_norm(x.features, dim=1, dtype=torch.float64)
    size = size * torch.linalg.vector_norm(x.weight, dtype=torch.float64) + 1.0
    if x.bias is not None:
        size += torch.linalg.vector_norm(x.bias, dtype=torch.float64)
    lost = torch.nonzero(value < _LOST * torch.finfo(torch.float64).eps * size.square()).reshape(-1)
    if lost.numel():
        rows = replace(
            x,
            features=x.features[lost],
            targets=Targets(x.targets.indices[lost]),
            row_weight=x.row_weight[lost],
        )
        value = value.index_copy(0, lost, residual.losses(rows))
    return value


def residual_sum(x: HeadInput) -> Tensor:
    """sum_r o_r (W h_r + b - e_y), float64 (K,), by exact residuals where those serve."""
    if isinstance(x.targets, DenseTargets):
        o, none = x.row_weight.double(), x.weight.new_zeros(x.weight.shape[0], dtype=torch.float64)
        sums = (o[part] @ E for part, E in residual.blocks(x, exact=True))
        return torch.stack([none, *sums]).sum(0)  # a rank may have no rows
    total, split = (
        gram.GramGradient(x).transposed_times(torch.ones_like(x.row_weight)[:, None])[:, 0],
        _split(x),
    )
    if split is not None:
        mine = _of_classes(x, split[0])
        means = _Means.of(mine) if _many(x) else None
        rows = mine if means is None else means.rows
        found = torch.stack(
            [rows.row_weight[part].double() @ E for part, E in residual.blocks(rows, exact=True)]
        ).sum(0)
        total[split[0]] = (
            found if means is None else found + mine.weight.double() @ means.tilt.sum(0)
        )
    return total


def along_targets(x: HeadInput, shift: Tensor) -> Tensor:
    """sum_r o_r <E_r - shift, y_r>, float64: the residuals along their targets, exact where
    residuals serve.
    """
    if isinstance(x.targets, DenseTargets):
        return residual.along_vectors(x, x.targets.values, shift)
    own = residual.own(x, exact=by_residuals(x.targets, *x.weight.shape, bias=x.bias is not None))
    return x.row_weight @ (own - shift[x.targets.indices])


@dataclass(frozen=True)
class _Means:
    """Rows by their classes: ``rows`` the class means as rows of their own, ``slot`` (R,) the mean
    of each row, ``tilt`` s, ``spread`` S.
    """

    rows: HeadInput
    slot: Tensor
    tilt: Tensor
    spread: Tensor

    @classmethod
    def of(cls, x: HeadInput) -> _Means:
        near, d = x.targets.occupied(x.weight.shape[0])[0], x.weight.shape[1]
        slot, o = torch.searchsorted(near, x.targets.indices), x.row_weight.double()
        means = torch.zeros(near.numel(), d, dtype=torch.float64, device=o.device)
        add_class_sums(means, slot, x.features)
        means /= class_totals(near.numel(), slot, torch.ones_like(o))[
            :, None
        ]  # bincount waits for the device
        tilt, spread = torch.zeros_like(means), means.new_zeros(d, d)
        for part in gram.row_blocks(slot.numel()):
            delta = x.features[part].double() - means[slot[part]]
            weighted = delta * o[part, None]
            add_class_sums(tilt, slot[part], weighted)
            spread.addmm_(weighted.T, delta)
        weight = class_totals(near.numel(), slot, o)
        return cls(
            replace(x, features=means, targets=Targets(near), row_weight=weight), slot, tilt, spread
        )

    def deviations(self, x: HeadInput) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of rows, their delta and their slots."""
        for part in gram.row_blocks(self.slot.numel()):
            yield (
                part,
                x.features[part].double() - self.rows.features[self.slot[part]],
                self.slot[part],
            )


def _value_by_means(x: HeadInput, out: Gradients) -> Tensor:
    m, W = _Means.of(x), x.weight.double()
    A, means, o = gram.gram(W), m.rows.features, m.rows.row_weight
    fit, back = 0.5 * (A * m.spread).sum(), torch.empty_like(means)
    for part, E in residual.blocks(m.rows):
        torch.mm(E, W, out=back[part])
        fit += 0.5 * (o[part] @ torch.linalg.vecdot(E, E)) + (back[part] * m.tilt[part]).sum()
        if out.weight is not None:
            out.weight.add_(E.T @ (means[part] * o[part, None] + m.tilt[part]))
        if out.bias is not None:
            out.bias.add_(o[part] @ E)
    if out.weight is not None:
        out.weight.add_(W @ (m.spread + m.tilt.T @ means))
    if out.bias is not None:
        out.bias.add_(W @ m.tilt.sum(0))
    if out.features is not None:
        for part, delta, slot in m.deviations(x):
            out.features[part].add_(
                (delta @ A).add_(back[slot]).mul_(x.row_weight[part, None].double())
            )
    return fit


def _losses_by_means(x: HeadInput) -> Tensor:
    m, W = _Means.of(x), x.weight.double()
    A, found = gram.gram(W), []
    square, back = residual.losses(m.rows), torch.cat([E @ W for _, E in residual.blocks(m.rows)])
    for _, delta, slot in m.deviations(x):
        found.append(square[slot] + torch.linalg.vecdot(delta @ A * 0.5 + back[slot], delta))
    return torch.cat(found)


def _many(x: HeadInput) -> bool:
    """Whether the rows are more than D: then R x K residuals would be more than a Gram matrix."""
    return x.features.shape[0] > _room(x)


def _room(x: HeadInput) -> int:
    return x.weight.shape[1] + (x.bias is not None)


def _split(x: HeadInput) -> tuple[Tensor, Tensor] | None:
    """Classes that go by residuals and those that go by Grams, ascending; None where all go by
    Grams.
    """
    K, d = x.weight.shape
    if not by_residuals(x.targets, K, d, bias=x.bias is not None):
        return None
    near, far = x.targets.occupied(K)
    return (
        (torch.arange(K, device=near.device), far[:0])
        if far.numel() and _room(x) >= K
        else (near, far)
    )


def _of_classes(x: HeadInput, classes: Tensor) -> HeadInput:
    """The same rows and only those classes, ascending; targets outside them are meaningless
    there.
    """
    if classes.numel() == x.weight.shape[0]:
        return x
    bias = None if x.bias is None else x.bias[classes]
    return replace(
        x,
        targets=Targets(torch.searchsorted(classes, x.targets.indices)),
        weight=x.weight[classes],
        bias=bias,
    )


@contextmanager
def _buffers(x: HeadInput, out: Gradients, classes: Tensor) -> Iterator[Gradients]:
    """The buffers of some classes to add into: copies that are put back, but for the features'
    own.
    """
    if classes.numel() == x.weight.shape[0]:
        yield out
        return
    weight, bias = (None if whole is None else whole[classes] for whole in (out.weight, out.bias))
    yield Gradients(out.features, weight, bias)
    for whole, part in ((out.weight, weight), (out.bias, bias)):
        if whole is not None and part is not None:
            whole[classes] = part
