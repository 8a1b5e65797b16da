"""Tensors of an operator to the head that a backend takes: its targets, its loss, and the backend
that knows the loss.

Operators take no objects, so a loss is its name and its one parameter, the first that its row of
LOSSES names: smoothing of ce, gamma of focal. Class weights come with a smoothed cross-entropy
only, where they are more than a weight of its rows; and a loss whose name ends in MARGINS has the
margins of the classes in their place.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from ufm_fast.adjustments import margins_of
from ufm_fast.backends import Backend, HeadInput, TiledBackend, make_backend
from ufm_fast.backends.class_weights import ClassWeighted
from ufm_fast.backends.softcap import SoftcapBackend
from ufm_fast.errors import InputTypeError
from ufm_fast.losses import LOSSES, Loss, make_loss, registered_name
from ufm_fast.targets import Targets

TILED = TiledBackend()
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
