"""Whether all ranks were asked alike, before any of them computes: one message of a few numbers.

Numbers must be equal to the bit, and vectors in the sum of their bits, which no order of adding
rounds. What is left out is equal wherever it is 1 or infinite: a scale, a cap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.adjustments import Adjustment
from ufm_fast.errors import InputError
from ufm_fast.functional import checks
from ufm_fast.functional.cross_entropy import CheckedCall
from ufm_fast.functional.precision import NAMES
from ufm_fast.layout import Axis

#: What ranks must have been asked alike.
_ALIKE = (
    "rows of input",
    "classes",
    "features a row",
    "heads",
    "itemsize",
    "the kind of target",
    "reduction",
    "label_smoothing",
    "requires_grad",
    *NAMES[1:],
    "weight",
    "divisor",
    "logit_scale",
    "softcap",
    *["adjustment"] * 3,
    *["main_grad"] * 2,
)
_DIGITS = (1 << 52) - 1  # of a sum of bits: what a float64 holds


def _said(input: Tensor, linear_weight: Tensor, call: CheckedCall) -> list[float]:
    """The numbers that `_ALIKE` names."""
    asked, chosen = call.asked, call.chosen
    adjusted, scale = asked.adjustment or Adjustment(), asked.logit_scale
    rows, classes, dim = input.shape[0], linear_weight.shape[0], linear_weight.shape[-1]
    return [
        *map(float, (rows, classes, dim, linear_weight.numel(), call.features.element_size())),
        float(call.kept is None),
        float(checks.REDUCTIONS.index(asked.reduction)),
        call.smoothing,
        sum(2.0**i for i, wanted in enumerate(call.need) if wanted),
        float(checks.is_dtensor(linear_weight)),
        float(call.bias is not None),
        _digest(chosen.class_weight),
        float(chosen.divisor or 0.0),
        1.0 if scale is None else float(scale.detach() if isinstance(scale, Tensor) else scale),
        math.inf if call.softcap is None else call.softcap,
        *map(_digest, (adjusted.offset, adjusted.margin, adjusted.scale)),
        *(float(buffer is not None) for buffer in chosen.into or (None, None)),
    ]


def _digest(vector: Tensor | None) -> float:
    """A number that vectors share if they are equal to the bit, and hardly otherwise; 0 of none.

    Remembered on the vector while it is unwritten: of a million classes it takes as long as a step
    may.
    """
    if vector is None:
        return 0.0
    version = None if vector.is_inference() else vector._version
    known = getattr(vector, "_ufm_digest", None)
    if known is not None and version is not None and known[0] == version:
        return float(known[1])
    bits = vector.detach().double().contiguous().view(torch.int64)
    places = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
    digest = 1.0 + (int((bits * places).sum()) & _DIGITS)
    vector._ufm_digest = version, digest  # type: ignore[attr-defined]
    return digest


def agreed(
    axis: Axis,
    input: Tensor,
    linear_weight: Tensor,
    call: CheckedCall | None,
    error: InputError | None,
) -> float:
    """The sum of the weights of all ranks' rows. ``call``: this rank's part, or None with the
    ``error`` of its checks.

    Errors: InputError on every rank where one has an error or was asked otherwise.
    """
    said, count = [0.0] * len(_ALIKE), 0.0
    if call is not None:
        said, count = _said(input, linear_weight, call), float(call.weights.factor.sum())
    message = torch.tensor(
        [[float(error is not None), count, *said]], dtype=torch.float64, device=input.device
    )
    told = axis.gather(message, "settings").wait().tolist()
    if error is not None:
        raise error
    for rank, (failed, _, *heard) in enumerate(told):
        if failed:
            raise InputError(
                f"rank {rank} was given what it can't use, and says what; rank {axis.place} stops "
                f"with it"
            )
        for name, mine, other in zip(_ALIKE, said, heard, strict=True):
            if mine != other and not (math.isnan(mine) and math.isnan(other)):
                raise InputError(
                    f"ranks must be asked alike, but {name} differs between ranks {axis.place} "
                    f"and {rank}"
                )
    return float(sum(row[1] for row in told))
