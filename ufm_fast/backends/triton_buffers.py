"""What the heads by kernels share: the precision asked for, the device, and buffers that a kernel
writes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.errors import InputError

# By name only: E and its products in fp8, on sm_90; second derivatives and products with G in
# bfloat16.
FP8 = "fp8"


def mode_of(asked: str | None, x: HeadInput, table: dict[torch.dtype, str]) -> str:
    """The precision of a head: the one asked for, but for fp8, or its dtype's."""
    dtype = torch.promote_types(x.features.dtype, x.weight.dtype)
    if dtype not in table:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"backend triton has no {name} kernels; use backend tiled for {name}, or dtype float32"
        )
    return (None if asked == FP8 else asked) or table[dtype]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def bias_of(x: HeadInput) -> Tensor | None:
    return None if x.bias is None else x.bias.float().contiguous()


def writable(out: Gradients) -> Gradients:
    """Contiguous float32 buffers, fresh if the given ones are: those, or zeros (or nothing yet) in
    place of any other kind.
    """
    make = torch.empty if out.fresh else torch.zeros

    def one(buffer: Tensor | None) -> Tensor | None:
        if buffer is None or (buffer.dtype == torch.float32 and buffer.is_contiguous()):
            return buffer
        return make(buffer.shape, device=buffer.device)

    return Gradients(one(out.features), one(out.weight), one(out.bias), fresh=out.fresh)


def hand_over(buffers: Gradients, out: Gradients) -> None:
    """Add what was written into the buffers that stood in for the caller's, or copy it where those
    are fresh.
    """
    for written, wanted in (
        (buffers.features, out.features),
        (buffers.weight, out.weight),
        (buffers.bias, out.bias),
    ):
        if written is not None and wanted is not None and written is not wanted:
            wanted.copy_(written) if out.fresh else wanted.add_(written)
