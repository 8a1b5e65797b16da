"""What the kernels' heads take on a device: their precisions, rows of a chunk, bytes beside
parameters and gradients.
"""

from __future__ import annotations

import torch

from ufm_fast.backends.base import HeadInput
from ufm_fast.memory import available_bytes
from ufm_kernels.head import NARROW
from ufm_kernels.operands import MODES, chunk_bytes, operand_bytes
from ufm_kernels.squared_error import gram_bytes

# Of a chunk: beyond, its pass over the gradient is little, and so are its launches; below, most of
# a device idles.
_MOST_ROWS, _MOST_BYTES, _LEAST_ROWS = 8192, 2 << 30, 128
#: The precision of a softmax head of each dtype.
SOFTMAX_MODE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32x3"}
#: Of the squared error: one pass loses its residual near collapse, and its products are small.
SQUARED_MODE = {torch.bfloat16: "bf16x3", torch.float16: "bf16x3", torch.float32: "tf32x3"}


def plan_chunk(rows: int, dim: int, classes: int, mode: str, free_bytes: int) -> int:
    """Rows of E at a time: up to 8192, or 2 GiB, in a quarter of the free memory. 0 where not even
    128 rows (or all) fit.

    Beside its row of E a row takes its features as an operand, and their gradient before it is
    added.
    """
    a_row = chunk_bytes(1, classes, mode) + 16 * dim
    most = free_bytes // 4 // a_row
    wanted = min(rows, max(_MOST_ROWS, _MOST_BYTES // a_row // _LEAST_ROWS * _LEAST_ROWS))
    return wanted if most >= wanted else most - most % _LEAST_ROWS


def planned_rows(
    rows: int, dim: int, classes: int, mode: str, device: torch.device, *, one_pass: bool
) -> int:
    """``plan_chunk`` on the device as it is; without the one-pass kernels at least
    ``_LEAST_ROWS``.
    """
    chunk = plan_chunk(rows, dim, classes, mode, free_bytes(device))
    return min(rows, _LEAST_ROWS) if chunk == 0 and not one_pass else chunk


def softmax_plan(
    rows: int, dim: int, classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    """(rows of a chunk, bytes of ``head``, bytes of ``head_hvp``) beside parameters and gradients,
    as the backend runs them.
    """
    mode = SOFTMAX_MODE[dtype]
    chunk, second = (
        planned_rows(rows, dim, classes, mode, device, one_pass=one)
        for one in (dim <= NARROW, False)
    )
    sizes = (
        workspace(rows, dim, classes, dtype, chunk),
        workspace(rows, dim, classes, dtype, second, second=True),
    )
    return chunk, *sizes


def workspace(
    rows: int, dim: int, classes: int, dtype: torch.dtype, chunk: int, *, second: bool = False
) -> int:
    """Bytes beside parameters and gradients of a softmax head by chunks of so many rows;
    ``second``: of a Hessian product.

    The chunk of E with an eighth for its statistics, its features times their factors, and the
    copies of H and W (and of their directions) that are split, padded or change their dtype. A
    chunk of 0 rows: E is never stored.
    """
    mode = SOFTMAX_MODE[dtype]
    chosen, matrices = MODES[mode], 2 if second else 1
    copies = 0
    if chosen.passes > 1 or chosen.logits != dtype or dim * dtype.itemsize % 16:
        copies += operand_bytes(rows + classes, dim, chosen.logits, chosen.passes)
    if chosen.logits != chosen.products:
        copies += operand_bytes(classes, dim, chosen.products, chosen.passes)
    if chosen.products == torch.float32 and (
        second or chosen.passes > 1
    ):  # its transpose, unless the library multiplies
        copies += operand_bytes(dim, classes, chosen.products, chosen.passes)
    of_chunk = operand_bytes(chunk or rows, dim, chosen.products, chosen.passes)
    of_chunk += (
        8 * chunk * dim if second else 4 * chunk * dim if chosen.passes == 1 else 0
    )  # products of E before they are added
    vectors = 84 * rows + (
        0 if chunk else 8 * rows * dim
    )  # of the rows; without E, its product with W and their sum
    return chunk_bytes(chunk, classes, mode) * 9 // 8 + of_chunk + matrices * copies + vectors


def squared_workspace(rows: int, dim: int, classes: int, dtype: torch.dtype) -> int:
    """The same of the squared error: operands and Gram matrices; nothing of size rows x classes."""
    chosen = MODES[SQUARED_MODE[dtype]]
    single = (
        0 if dtype == torch.float32 else 4 * (rows + classes) * dim
    )  # float32 copies of H and W
    return (
        operand_bytes(rows + classes, dim, chosen.products, chosen.passes)
        + single
        + gram_bytes(max(rows, classes), dim)
    )


class ChunkRows:
    """Rows of a chunk, at most ``chunk``, remembered for each shape, so that repeated calls do not
    wait for the device.
    """

    def __init__(self, chunk: int | None) -> None:
        self._most = chunk
        self._chunks: dict[tuple[object, ...], int] = {}

    def of(self, x: HeadInput, mode: str, *, one_pass: bool = False) -> int:
        """Rows of a chunk whose memory is there; 0 where none can be afforded and ``one_pass`` does
        without.
        """
        (rows, columns), classes, device = x.features.shape, x.weight.shape[0], x.weight.device
        key = (rows, columns, classes, mode, one_pass, device)
        chunk = self._chunks.get(key, self._most)
        if chunk is None:
            chunk = planned_rows(rows, columns, classes, mode, device, one_pass=one_pass)
        if device.type == "cuda":
            chunk = reserved(chunk, columns, classes, mode, device)
        if len(self._chunks) > 256:
            self._chunks.clear()
        self._chunks[key] = chunk = chunk if one_pass else max(chunk, 1)
        return chunk


def reserved(chunk: int, columns: int, classes: int, mode: str, device: torch.device) -> int:
    """Halve the chunk until its memory can be had. Asked before the sweep: one that fails midway
    has spoilt its buffers.
    """
    while chunk:
        # E, statistics of its tiles, and the operands and products of a chunk of features.
        wanted = chunk_bytes(chunk, classes, mode) * 9 // 8 + 16 * chunk * columns
        try:
            torch.empty(wanted, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            chunk //= 2
        else:
            break
    return chunk


def free_bytes(device: torch.device) -> int:
    """Free memory, that which torch keeps for reuse included."""
    free = available_bytes(device)
    if device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free
