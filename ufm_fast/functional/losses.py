"""Losses of features and a classifier: torch's own signature, fused, differentiable twice, exact
when collapsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ufm_fast.adjustments import Adjustment
from ufm_fast.errors import InputError
from ufm_fast.functional import checks
from ufm_fast.functional.cross_entropy import Asked, checked_call
from ufm_fast.functional.precision import prepared
from ufm_fast.functional.reductions import of_rows, single_label
from ufm_fast.functional.row_weights import Reduction, scaled_without_ignored
from ufm_fast.functional.target_sets import checked_sets
from ufm_fast.targets import Targets, TargetSets


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    softcap: float | None = None,
    adjustment: Adjustment | None = None,
    main_grad: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """Cross-entropy of ``linear(input, linear_weight, linear_bias)`` without holding the logits.

    For a row with logits z and target y, class weights w and smoothing e, with a = (1 - e) w_y + e
    mean(w):

        l = a log(1 + sum_{k != y} exp(z_k - z_y)) + e (mean(w) z_y - mean_k(w_k z_k)),   nats

    'mean' divides the sum by sum w_y over the rows that are not ignored. Equivalent to
    ``torch.nn.functional.linear_cross_entropy`` of torch 2.13 with the same arguments, i.e.
    ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``, but relatively
    accurate even where the loss is 1e-35, differentiable twice, in reverse and forward mode, and at
    home in torch.compile and autocast.

    Shapes: input (d) or (N, d); linear_weight (K, d) or (K, d_1, ..., d); linear_bias as
    linear_weight less its last; target (), (N) or (N, d_1, ...) of class indices, or probabilities
    in the logits' shape (N, K, d_1, ...); weight (K,); sample_weight as the row losses. The result
    has the input's dtype (float32 under autocast) and, for 'none', the shape of the class indices.
    Class probabilities are as large as the logits, so the dense expression evaluates and
    differentiates them. ``options`` (torch's chunking) is accepted and not used: memory is bounded
    always. A mean over no rows is NaN with zero gradients, as in torch. Class weights that sum to 0
    over the rows give torch's value, x/0 (NaN on a GPU, in compiled graphs, torch.func and forward
    mode), and NaN gradients.

    Beyond torch's: ``sample_weight`` multiplies the loss of each row, and 'mean' divides by the sum
    of the weights of rows that count, of samples times classes; a row of weight 0 may hold
    anything. ``divisor``, a number or a tensor of one: the result is the sum of the row losses over
    it for both 'mean' and 'sum', so that the parts of a batch add up under gradient accumulation.
    ``logit_scale``, a number or a tensor of one, differentiable: z = logit_scale (W h + b).
    ``softcap`` c: the logits are c tanh(z / c), without smoothing; by torch's products on every
    device.
    ``adjustment``: offsets, margins and scales of the classes, of ``make_adjustment(counts, ..)``:
    logit adjustment, LDAM, CosFace (with unit rows and ``logit_scale``), CDT and VS. After the
    scale; with one head and class indices. Margins go by ``tiled`` on every device, and not with a
    softcap, nor with class weights and smoothing at once.
    ``main_grad``: buffers in the dtype of sums (float32 for half precision) for linear_weight and
    linear_bias; the backward adds their gradients there, and they have no ``.grad``. With 'mean'
    and 'sum', one head, and class indices.

    On several ranks: DTensors on one device mesh, input and linear_weight (and linear_bias) with
    ``Shard(0)``, target and sample_weight alike or of each rank's rows; the result is a DTensor,
    and no weight moves. Under FSDP2, in the forward of its module, linear_weight is plain and
    whole. Every argument is served alike; a DTensor linear_weight has one head and class indices,
    and main_grad then holds DTensors like it. ``weight`` and ``adjustment`` are whole on each rank,
    ``logit_scale`` a number, a plain tensor (whose gradient is this rank's share) or a DTensor with
    ``Replicate()``. With weight and label_smoothing at once the rows of a DTensor linear_weight
    that a rank's labels name come to it.

    Errors: InputError / InputTypeError for labels out of range other than ignore_index (default
    -100), mixed devices or dtypes, wrong shapes, fewer than 2 classes, a class weight that requires
    a gradient. All of input, linear_weight and linear_bias are kept for the backward, so none may
    be written in place before it (RuntimeError).
    """
    asked = Asked(
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        options,
        sample_weight,
        divisor,
        logit_scale,
        softcap,
        adjustment,
        main_grad,
    )
    if checks.is_dtensor(input) or checks.is_dtensor(linear_weight):
        from ufm_fast.functional.distributed import sharded_cross_entropy

        return sharded_cross_entropy(input, linear_weight, target, linear_bias, asked)
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    call = checked_call(tensors, target, asked)
    return call.value().to(call.dtype)


def linear_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    adjustment: Adjustment | None = None,
) -> Tensor:
    """Focal loss  w_y (1 - p_y)^gamma (-log p_y)  of a linear classifier, without holding the
    logits.

    Shapes and class indices as in ``linear_cross_entropy`` with one head: input (d) or (N, d),
    linear_weight (K, d), target () or (N). 'mean' divides by sum w_y over the rows that are not
    ignored. gamma = 0 is the cross-entropy. ``sample_weight``, ``divisor``, ``logit_scale`` and
    ``adjustment`` as there. Finite, with its digits, at p_y = 0 and p_y = 1, where the textbook
    form is NaN or 0. Equivalent, for moderate logits: ``l = F.cross_entropy(F.linear(input,
    linear_weight), target, reduction="none")``, then ``((1 - torch.exp(-l)) ** gamma * l).mean()``.

    Errors: as ``linear_cross_entropy``; InputError for a negative or infinite gamma. Source: arXiv
    1708.02002, eq. 4.
    """
    exponent = checks.real(gamma, "gamma")
    if not 0.0 <= exponent < math.inf:
        raise InputError(f"gamma must be a finite number >= 0, got {gamma}")
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    weights = (weight, sample_weight, divisor)
    return single_label(
        tensors,
        target,
        weights,
        reduction,
        ignore_index,
        "focal",
        exponent,
        logit_scale,
        adjustment,
    )


def linear_squared_error(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Half squared error  w_y/2 |z - e_y|^2  of linear outputs z to the one-hot target, in O((N +
    K) d^2).

    Gram matrices give value and gradients: no N x K work at all. Shapes, ``weight`` (by the
    target's class), ignored rows, ``sample_weight``, ``divisor`` and 'mean' (over rows, not over
    entries) as in ``linear_focal_loss``. Equivalent: ``0.5 * (F.linear(input, linear_weight) -
    F.one_hot(target, K)).square().sum(1).mean()``.
    Errors: as ``linear_cross_entropy``.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    return single_label(
        tensors, target, (weight, sample_weight, divisor), reduction, ignore_index, "mse", 0.0
    )


def linear_pick_all(
    input: Tensor,
    linear_weight: Tensor,
    target: Targets | TargetSets | Tensor | Sequence[Sequence[int]],
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
) -> Tensor:
    """Pick-all-label loss  sum_{k in S} (logsumexp(z) - z_k)
    of a linear classifier, S the set of a row's targets.

    Shapes: input (N, d), linear_weight (K, d), linear_bias (K,). ``target`` is one of

    - Targets or TargetSets: the sets in CSR form, ``indices[indptr[r]:indptr[r + 1]]`` those of row
      r;
    - an integer tensor (N, m): the classes of each row, padded with negative numbers; (N,) is one
      class a row;
    - a sequence of N sequences of classes.

    'mean' is over rows; ``sample_weight`` (N,), ``divisor`` and ``logit_scale`` as in
    ``linear_cross_entropy``. One target a row is the cross-entropy. Equivalent, with a 0/1 matrix Y
    of the sets: ``-(Y * F.log_softmax(F.linear(input, linear_weight), dim=1)).sum(1).mean()``.
    Errors: as ``linear_cross_entropy``; InputError for an empty set, a set of all classes, a class
    named twice in a row.
    Source: arXiv 2310.15903, eq. 2.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    features, matrix, bias, dtype = prepared(tensors, logit_scale)
    chosen = Reduction.checked(
        reduction, linear_weight, (input.shape[0],), None, sample_weight, divisor
    )
    if input.dim() != 2 or linear_weight.dim() != 2:
        raise InputError(
            f"input must have shape (N, d) and linear_weight (K, d), got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    indptr, indices = checked_sets(target, input.shape[0], linear_weight.shape[0], input.device)
    weights = chosen.weights(torch.ones(input.shape[0], dtype=torch.float64, device=input.device))
    features = scaled_without_ignored(features, weights.kept, input, logit_scale)
    return of_rows(features, matrix, bias, indices, indptr, weights, "pick-all", 0.0).to(dtype)
