"""Losses of features and a classifier: torch's own signature, fused, differentiable twice, exact when collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.functional import checks
from ufm_fast.functional.operators import checked_labels
from ufm_fast.functional.reductions import Reduction, of_probabilities, of_rows, over_heads, prepared, single_label
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
) -> Tensor:
    """Cross-entropy of ``linear(input, linear_weight, linear_bias)`` without holding the logits.

    For a row with logits z and target y, class weights w and smoothing e, with a = (1 - e) w_y + e mean(w):

        l = a log(1 + sum_{k != y} exp(z_k - z_y)) + e (mean(w) z_y - mean_k(w_k z_k)),   nats

    'mean' divides the sum by sum w_y over the rows that are not ignored. Equivalent to
    ``torch.nn.functional.linear_cross_entropy`` of torch 2.13 with the same arguments, i.e.
    ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``, but relatively accurate even where the
    loss is 1e-35, differentiable twice, in reverse and forward mode, and at home in torch.compile and autocast.

    Shapes: input (d) or (N, d); linear_weight (K, d) or (K, d_1, ..., d); linear_bias as linear_weight less its last;
    target (), (N) or (N, d_1, ...) of class indices, or probabilities in the logits' shape (N, K, d_1, ...); weight (K,);
    sample_weight as the row losses. The result has the input's dtype (float32 under autocast) and, for 'none', the shape of
    the class indices. Class probabilities are as large as the logits, so the dense expression evaluates and
    differentiates them. ``options`` (torch's chunking) is accepted and not used: memory is bounded always.
    A mean over no rows is NaN with zero gradients, as
    in torch. Class weights that sum to 0 over the rows give torch's value, x/0 (NaN on a GPU, in compiled graphs, torch.func
    and forward mode), and NaN gradients.

    Beyond torch's: ``sample_weight`` multiplies the loss of each row, and 'mean' divides by the sum of the weights of rows that
    count, of samples times classes; a row of weight 0 may hold anything. ``divisor``, a number or a tensor of one: the result
    is the sum of the row losses over it for both 'mean' and 'sum', so that the parts of a batch add up under gradient
    accumulation. ``logit_scale``, a number or a tensor of one, differentiable: z = logit_scale (W h + b).

    Errors: InputError / InputTypeError for labels out of range other than ignore_index (default -100), mixed devices or
    dtypes, wrong shapes, fewer than 2 classes, a class weight that requires a gradient. All of input, linear_weight and
    linear_bias are kept for the backward, so none may be written in place before it (RuntimeError).
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    features, matrix, bias, dtype = prepared(tensors, logit_scale)
    checks.check_target(target, input.device, differentiable=True)
    shape = (*input.shape[:-1], *linear_weight.shape[1:-1])
    chosen = Reduction.checked(reduction, linear_weight, shape, weight, sample_weight, divisor)
    smoothing = checks.check_smoothing(label_smoothing)
    checks.check_options(options)
    if target.is_floating_point():
        if ignore_index is not None:
            raise InputError("ignore_index goes with class indices only; drop it or pass class indices as target")
        return of_probabilities(features, matrix, bias, target, chosen, smoothing).to(dtype)
    checks.check_labels_shape(target, shape)
    ignore = -100 if ignore_index is None else checks.check_ignore_index(ignore_index)
    labels, kept = checked_labels(target, linear_weight.shape[0], ignore)
    return over_heads(features, matrix, bias, labels, kept, chosen, smoothing).to(dtype)


def linear_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, gamma: float = 2.0,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100, sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None, logit_scale: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Focal loss  w_y (1 - p_y)^gamma (-log p_y)  of a linear classifier, without holding the logits.

    Shapes and class indices as in ``linear_cross_entropy`` with one head: input (d) or (N, d), linear_weight (K, d),
    target () or (N). 'mean' divides by sum w_y over the rows that are not ignored. gamma = 0 is the cross-entropy.
    ``sample_weight``, ``divisor`` and ``logit_scale`` as there.
    Finite, with its digits, at p_y = 0 and p_y = 1, where the textbook form is NaN or 0. Equivalent, for moderate logits:
    ``l = F.cross_entropy(F.linear(input, linear_weight), target, reduction="none")``, then
    ``((1 - torch.exp(-l)) ** gamma * l).mean()``.

    Errors: as ``linear_cross_entropy``; InputError for a negative or infinite gamma. Source: arXiv 1708.02002, eq. 4.
    """
    exponent = checks.real(gamma, "gamma")
    if not 0.0 <= exponent < math.inf:
        raise InputError(f"gamma must be a finite number >= 0, got {gamma}")
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    weights = (weight, sample_weight, divisor)
    return single_label(tensors, target, weights, reduction, ignore_index, "focal", exponent, logit_scale)


def linear_squared_error(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100, sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Half squared error  w_y/2 |z - e_y|^2  of linear outputs z to the one-hot target, in O((N + K) d^2).

    Gram matrices give value and gradients: no N x K work at all. Shapes, ``weight`` (by the target's class), ignored
    rows, ``sample_weight``, ``divisor`` and 'mean' (over rows, not over entries) as in ``linear_focal_loss``. Equivalent:
    ``0.5 * (F.linear(input, linear_weight) - F.one_hot(target, K)).square().sum(1).mean()``.
    Errors: as ``linear_cross_entropy``.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    return single_label(tensors, target, (weight, sample_weight, divisor), reduction, ignore_index, "mse", 0.0)


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
    """Pick-all-label loss  sum_{k in S} (logsumexp(z) - z_k)  of a linear classifier, S the set of a row's targets.

    Shapes: input (N, d), linear_weight (K, d), linear_bias (K,). ``target`` is one of

    - Targets or TargetSets: the sets in CSR form, ``indices[indptr[r]:indptr[r + 1]]`` those of row r;
    - an integer tensor (N, m): the classes of each row, padded with negative numbers; (N,) is one class a row;
    - a sequence of N sequences of classes.

    'mean' is over rows; ``sample_weight`` (N,), ``divisor`` and ``logit_scale`` as in ``linear_cross_entropy``.
    One target a row is the cross-entropy. Equivalent, with a 0/1 matrix Y of the sets:
    ``-(Y * F.log_softmax(F.linear(input, linear_weight), dim=1)).sum(1).mean()``.
    Errors: as ``linear_cross_entropy``; InputError for an empty set, a set of all classes, a class named twice in a row.
    Source: arXiv 2310.15903, eq. 2.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    features, matrix, bias, dtype = prepared(tensors, logit_scale)
    chosen = Reduction.checked(reduction, linear_weight, (input.shape[0],), None, sample_weight, divisor)
    if input.dim() != 2 or linear_weight.dim() != 2:
        raise InputError(f"input must have shape (N, d) and linear_weight (K, d), got {tuple(input.shape)} and "
                         f"{tuple(linear_weight.shape)}")  # fmt: skip
    indptr, indices = checked_sets(target, input.shape[0], linear_weight.shape[0], input.device)
<<<<<<< HEAD
    weights = chosen.weights(torch.ones(input.shape[0], dtype=torch.float64, device=input.device))
    return of_rows(features, matrix, bias, indices, indptr, weights, "pick-all", 0.0).to(dtype)
=======
    factor = torch.ones(input.shape[0], dtype=torch.float64, device=input.device)
    loss = _reduced(features, matrix, bias, indices, indptr, factor, None, factor, reduction, "pick-all", 0.0)
    return (_defined(loss, factor) if reduction == "mean" else loss).to(dtype)


# ---- what they share ---------------------------------------------------------------------------------------------


def _prepared(tensors: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """Checked (features, matrix, bias) in the dtype of the products, and the dtype of the result.

    Under autocast as torch's ``linear`` and ``cross_entropy``: products in autocast's dtype, the loss in float32.
    """
    features, matrix, bias = tensors.values()
    checks.check_tensor(features, "input")
    device = features.device.type
    cast = device in _AUTOCAST and torch.is_autocast_enabled(device)
    checks.check_floats(tensors, one_dtype=not cast)
    checks.check_shapes(features, matrix, bias, _NAMES)
    if not cast or any(x is not None and x.dtype == torch.float64 for x in (features, matrix, bias)):
        checks.check_floats(tensors, one_dtype=True)
        return features, matrix, bias, features.dtype
    dtype = torch.get_autocast_dtype(device)
    return features.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype), torch.float32


def _single_label(
    tensors: dict[str, Any], target: Tensor, class_weight: Tensor | None, reduction: str, ignore_index: int,
    loss: str, parameter: float,
) -> Tensor:  # fmt: skip
    features, matrix, bias, dtype = _prepared(tensors)
    checks.check_target(target, features.device)
    checks.check_class_weight(class_weight, matrix)
    checks.check_reduction(reduction)
    if matrix.dim() != 2:
        raise InputError(f"linear_weight must have shape (K, d), got {tuple(matrix.shape)}")
    if target.is_floating_point():
        raise InputTypeError(f"target must hold class indices, got {target.dtype}; convert it with target.long()")
    checks.check_labels_shape(target, tuple(features.shape[:-1]))
    labels, kept = checked_labels(target, matrix.shape[0], checks.check_ignore_index(ignore_index))
    factor = _row_factor(kept, class_weight, labels)
    rows = _without_ignored(features.reshape(-1, features.shape[-1]), kept.reshape(-1))
    labels, known = labels.reshape(-1), None if class_weight is None else kept.reshape(-1)

    def reduced(how: str) -> Tensor:
        return _reduced(rows, matrix, bias, labels, None, factor.reshape(-1), known, factor, how, loss, parameter)

    values = reduced(reduction)
    if reduction == "mean":
        values = _defined(values, factor, known, lambda total: reduced("sum") / total)
    return (values.reshape(target.shape) if reduction == "none" else values).to(dtype)


def _over_heads(
    features: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, kept: Tensor, class_weight: Tensor | None,
    reduction: str, smoothing: float,
) -> Tensor:  # fmt: skip
    """Cross-entropy of each of the d_1 x ... heads (one in the common case), put together as ``reduction`` says."""
    rows = features.reshape(-1, features.shape[-1])
    shape, (classes, *out) = labels.shape, matrix.shape[:-1]
    heads = math.prod(out)
    labels, kept = labels.reshape(-1, heads), kept.reshape(-1, heads)
    factor = _row_factor(kept, class_weight, labels)
    if heads == 1:
        parts = [(matrix.reshape(classes, -1), None if bias is None else bias.reshape(classes))]
    else:
        matrices, biases = matrix.reshape(classes, heads, -1), None if bias is None else bias.reshape(classes, heads)
        parts = [(matrices[:, j], None if biases is None else biases[:, j]) for j in range(heads)]

    def of_heads(how: str, smoothing: float) -> list[Tensor]:
        return [
            _one_head(rows, W, b, labels[:, j], kept[:, j], factor[:, j], factor, class_weight, how, smoothing)
            for j, (W, b) in enumerate(parts)
        ]

    values = of_heads(reduction, smoothing)
    if reduction == "none":
        return torch.stack(values, dim=1).reshape(shape)
    total = values[0] if heads == 1 else torch.stack(values).sum()
    if reduction != "mean":
        return total

    def divided(divisor: Tensor) -> Tensor:
        """The two parts of a smoothed loss one by one, as torch divides them: infinities of two signs are NaN."""
        parts = [(1.0 - smoothing, 0.0), (smoothing, 1.0)] if smoothing else [(1.0, 0.0)]
        shares = [share * (torch.stack(of_heads("sum", e)).sum() / divisor) for share, e in parts]
        return torch.stack(shares).sum()

    return _defined(total, factor, None if class_weight is None else kept, divided)


def _one_head(
    features: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, kept: Tensor, factor: Tensor,
    everything: Tensor, class_weight: Tensor | None, reduction: str, smoothing: float,
) -> Tensor:  # fmt: skip
    """One K x d classifier. Class weights are weights of its rows, but for smoothing, which weighs every class by its own."""
    features, known = _without_ignored(features, kept), None if class_weight is None else kept
    if smoothing == 1.0 and class_weight is None:
        class_weight = torch.ones(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    if smoothing == 0.0 or class_weight is None:
        return _reduced(features, matrix, bias, labels, None, factor, known, everything, reduction, "ce", smoothing)
    return _reduced(features, matrix, bias, labels, None, kept, known, everything, reduction, "ce", smoothing, class_weight)


def _counted(kept: Tensor, values: Tensor) -> Tensor:
    """The values of rows that count, and 0 for those that are ignored: 0 times infinity is NaN. ``kept`` may be NaN itself."""
    return torch.where(kept == 0, 0.0, kept * values)


def _row_factor(kept: Tensor, class_weight: Tensor | None, labels: Tensor) -> Tensor:
    """w_y of rows that count, float64: an ignored row's label stands for no class; one without rows may weigh anything."""
    return kept if class_weight is None else _counted(kept, class_weight.double()[labels])


def _without_ignored(features: Tensor, kept: Tensor) -> Tensor:
    """The features with zeros for ignored rows, which may hold anything: 0 times NaN is NaN. A copy where there is one."""
    if not _unseen(kept) and not bool((kept == 0).any()):
        return features
    return torch.where((kept != 0)[:, None], features, 0.0)


def _unseen(x: Tensor) -> bool:
    """Whether nothing may be read from ``x`` now: in a tracer, a transform, without data, or while a CUDA graph is captured."""
    return blind() or type(x) is not Tensor or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _reduced(
    features: Tensor, matrix: Tensor, bias: Tensor | None, indices: Tensor, indptr: Tensor | None, factor: Tensor,
    kept: Tensor | None, everything: Tensor, reduction: str, loss: str, parameter: float, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """factor_r l_r of each row, or its sum, over the sum of ``everything`` for the mean."""
    inputs = (features, matrix, bias, indices, indptr, class_weight)
    if reduction == "none":
        losses: Tensor = row_losses(*inputs, loss, parameter)
        # An ignored row contributes 0 whatever its features hold, so it must not be multiplied by 0.
        return torch.where(factor == 0, 0, losses * factor.to(losses.dtype))
    grad = torch.is_grad_enabled()
    need = [grad and x is not None and x.requires_grad for x in (features, matrix, bias)]
    row_weight = _normalised(factor, kept, everything, reduction)
    value: Tensor = value_and_gradients(*inputs, row_weight, loss, parameter, need)[0]
    return value


def _normalised(factor: Tensor, kept: Tensor | None, everything: Tensor, reduction: str) -> Tensor:
    """factor over the sum of ``everything``. ``kept`` comes with class weights: if theirs sum to 0, rows that count are NaN."""
    if reduction != "mean":
        return factor
    total = everything.sum()
    normalised = factor / torch.where(total == 0, 1, total)
    return normalised if kept is None else torch.where((total == 0) & (kept != 0), math.nan, normalised)


def _defined(
    mean: Tensor, factor: Tensor, kept: Tensor | None = None, divided: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The mean, NaN where its divisor is zero. Over no rows the gradients stay zero, as in torch.

    With class weights that sum to 0 the gradients are NaN, by their row weights, and torch's value is the sum over 0,
    ``divided(0)``: infinite where weights have both signs.
    """
    total = factor.sum()
    hidden = total.is_cuda or _unseen(total) or forward_mode()  # a look would wait for the device
    if kept is None or divided is None or hidden or not bool((total == 0) & (kept != 0).any()):
        return mean + torch.where(total == 0, math.nan, 0.0)
    with torch.no_grad():
        value = divided(total).to(mean.dtype)
    return torch.where(total == 0, value, mean)  # 0 times the mean's gradient, NaN, is NaN


def _of_probabilities(
    features: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, reduction: str,
    smoothing: float,
) -> Tensor:  # fmt: skip
    classes, *out = matrix.shape[:-1]
    shape = (*features.shape[:-1], classes, *out)
    if tuple(target.shape) != shape:
        raise InputError(f"target of dtype {target.dtype} must hold class probabilities of shape {shape}, got "
                         f"{tuple(target.shape)}; class indices must be integers")  # fmt: skip
    flat = None if bias is None else bias.reshape(-1)
    logits = torch.nn.functional.linear(features, matrix.reshape(-1, matrix.shape[-1]), flat).reshape(shape)
    dtype = compute_dtype(logits.dtype)
    class_weight = None if class_weight is None else class_weight.to(dtype)
    return torch.nn.functional.cross_entropy(
        logits.to(dtype), target.to(dtype), weight=class_weight, reduction=reduction, label_smoothing=smoothing
    )
>>>>>>> ccd543b (Smoothing with class weights is one loss of the operators: gradients in half precision are rounded once)
