"""Target sets in each form a user has them in, brought to checked CSR arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ufm_fast.arguments import integers
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.functional.registration import one_by_one, operator
from ufm_fast.targets import Targets, TargetSets, check_labels
from ufm_fast.weighted_targets import WeightedTargets


@operator("(Tensor indptr, Tensor indices, SymInt classes) -> (Tensor, Tensor)")
def checked_csr(indptr: Tensor, indices: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(indptr, indices) after the checks of TargetSets. The data decide, so compiled graphs must
    see an operator.
    """
    try:
        sets = TargetSets.create(indptr, indices, classes)
    except InputError as error:
        check_labels(
            indices, classes, "target", "give the weight more rows"
        )  # in this function's words
        raise type(error)(f"target: {error}") from error
    return sets.indptr.to(indptr.device, copy=True), sets.indices.to(indices.device, copy=True)


def _checked_csr_shapes(indptr: Tensor, indices: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(indptr, dtype=torch.int64), torch.empty_like(indices, dtype=torch.int64)


checked_csr.register_fake(_checked_csr_shapes)
checked_csr.register_vmap(one_by_one(checked_csr))


def checked_sets(
    target: Targets | TargetSets | Tensor | Sequence[Sequence[int]],
    rows: int,
    classes: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor]:
    """(indptr, indices) on ``device`` for ``rows`` rows. Errors: InputError / InputTypeError."""
    indptr, indices = _csr(target)
    number = indices.numel() if indptr is None else indptr.numel() - 1
    if number != rows:
        raise InputError(
            f"target holds sets for {number} rows but input has {rows}; give one set of classes "
            f"for each row"
        )
    if rows == 0:
        return None, indices.new_zeros(0, dtype=torch.int64, device=device)
    if indptr is None:
        indptr = torch.arange(rows + 1, device=indices.device)
    indptr, indices = checked_csr(indptr, indices, classes)
    return indptr.to(device), indices.to(device)


def _csr(target: object) -> tuple[Tensor | None, Tensor]:
    if isinstance(target, (Targets, TargetSets)):
        if isinstance(target, TargetSets) and bool((target.counts != 1).any()):
            raise InputError(
                "target has counts other than 1, but each row of input is one sample; repeat the "
                "sets instead"
            )
        if isinstance(target, WeightedTargets) or (
            isinstance(target, TargetSets) and target.weights is not None
        ):
            raise InputError(
                "target has weights, which linear_soft_cross_entropy takes; use that, or sets "
                "without weights"
            )
        return target.indptr, target.indices
    if isinstance(target, Tensor):
        # Each item would have its own number of targets.
        if target.dim() > 1 and not torch.compiler.is_compiling() and _mapped(target):
            raise InputError(
                "target must not be mapped over by vmap; give all rows in one call, or loop over "
                "them"
            )
        return _from_tensor(target)
    if isinstance(target, Sequence) and not isinstance(target, str):
        sets = [integers(members, "target").reshape(-1) for members in target]
        sizes = torch.tensor([members.numel() for members in sets], dtype=torch.int64)
        return _pointer(sizes), torch.cat(sets) if sets else torch.zeros(0, dtype=torch.int64)
    raise InputTypeError(
        f"target must be Targets, TargetSets, an integer tensor (N, m) or a sequence of "
        f"sequences, got {type(target).__name__}"
    )


def _mapped(x: Tensor) -> bool:
    """Whether vmap maps over it, inside whatever other transforms."""
    inside = torch._C._functorch
    while inside.is_functorch_wrapped_tensor(x):
        if inside.is_batchedtensor(x):
            return True
        x = inside.get_unwrapped(x)
    return False


def _from_tensor(target: Tensor) -> tuple[Tensor | None, Tensor]:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise InputTypeError(
            f"target must hold class indices, got {target.dtype}; for a 0/1 matrix pass its "
            f"classes by row"
        )
    if target.dim() == 1:
        return None, target
    target = integers(target, "target")
    if target.dim() != 2:
        raise InputError(f"target must have shape (N, m) or (N,), got {tuple(target.shape)}")
    present = target >= 0
    return _pointer(present.sum(1)), target[present]


def _pointer(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
