"""How many rows a chunk of exponentials has, how they lie in memory, and the buffers that hold
them.

Decisions

2026-11-25. The tiled backend stores exponentials K x C (a column a row of the head) with rows of a
length that is a multiple of 16 but not of 64. The first product then writes, and the product with H
reads, along memory: the three products of all chunks take 4 % less time than with C x K at (4096,
4096, 512), and 17, 9 and 13 % less at the other three shapes (`bench/reasons/layout.py`, two Zen 3
cores), and the best chunked rivals, level before, are behind. Tried and dropped: `softmax` in place
of subtract and exp (no faster, and its sums in float32 are biased at K = 65536, where all terms are
nearly equal), a contiguous copy of W', larger chunks.

2026-11-25. Chunks of the tiled backend hold 24 MiB of exponentials, or 528 rows where that is more,
up to 132 MiB, all of one height that needs no padding: measured with `bench/head.py` at its four
shapes, smaller ones lose to the products' inefficiency, larger ones to the cache. What is free, in
the machine or its container, bounds them by a power of two, so that chunks do not change from call
to call with the memory.

2026-11-25. The tiled backend keeps its last buffer on the CPU, up to 132 MiB, and takes it away
while it is in use, so that threads never share one. Above 32 MiB the C library gives memory back at
once, and fetching 33 thousand pages anew shows in a head's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ufm_fast.backends.base import HeadInput
from ufm_fast.memory import available_bytes, out_of_memory

_NEAR_BYTES, _FAR_BYTES, _EFFICIENT_ROWS = 24 << 20, 132 << 20, 528
_SMALL_BYTES = (
    1 << 20
)  # is had without asking what is free, which takes as long as such a head's products


def chunk_rows(
    rows: int, classes: int, itemsize: int, device: torch.device, buffers: int = 1
) -> int:
    """Rows of a chunk: 24 MiB of exponentials stay near the cache; but 528 rows keep the products
    efficient, up to 132 MiB.

    Never more than an eighth of the free memory, and at least 32 rows (a product of fewer is slow)
    where that allows it. With ``buffers`` the bounds are on all of them together. The padding of
    ``buffer_bytes`` is within the bounds. What fits 1 MiB is one chunk, whatever is free.
    """
    row, rows = classes * itemsize * buffers, max(rows, 1)
    if stride(rows) * row <= _SMALL_BYTES:
        return rows
    # The power of two below: what is free changes from call to call, the chunks and so the last
    # bits should not.
    most = 1 << max(1, available_bytes(device) // 8 // row).bit_length() - 1
    limit = min(max(_NEAR_BYTES // row, min(_EFFICIENT_ROWS, _FAR_BYTES // row), 32), most)
    if stride(rows) <= limit:
        return rows
    number = -(-rows // _longest_stride(limit))
    return min(
        stride(-(-rows // number)), _longest_stride(limit)
    )  # equal chunks: a short last one would be slow


def buffer_bytes(chunk: int, classes: int, itemsize: int) -> int:
    """Bytes of the exponentials of ``chunk`` rows as they are stored."""
    return stride(chunk) * classes * itemsize


def stride(columns: int) -> int:
    """Length of a row in memory: aligned to 16 numbers, and no multiple of 64, whose rows would
    share cache sets.
    """
    if columns < 16:
        return columns
    aligned = -(-columns // 16) * 16
    return aligned + 16 if aligned % 64 == 0 else aligned


def _longest_stride(limit: int) -> int:
    """The longest row up to ``limit`` that needs no padding."""
    if limit < 16:
        return limit
    aligned = limit // 16 * 16
    return aligned - 16 if aligned % 64 == 0 else aligned


def kept_bytes(chunk: int, classes: int, itemsize: int, device: torch.device) -> int:
    """Bytes of the buffer that `Buffers` keeps between calls."""
    size = buffer_bytes(chunk, classes, itemsize)
    return size if device.type == "cpu" and size <= _FAR_BYTES else 0


class Buffers:
    """Memory for chunks, K x C: ``chunk`` rows at a time (None: from the free memory), halved when
    it runs out.
    """

    def __init__(self, chunk: int | None) -> None:
        self.chunk = chunk
        self._spare: list[Tensor] = []  # the last one that was kept

    def new(self, x: HeadInput, dtype: torch.dtype, number: int) -> list[Tensor]:
        """So many buffers of one size."""
        K, device, rows = x.weight.shape[0], x.weight.device, self._rows(x, dtype, number)
        while True:
            try:
                return [
                    torch.empty(K, stride(rows), dtype=dtype, device=device)[:, :rows]
                    for _ in range(number)
                ]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if rows == 1 or not out_of_memory(error):
                    raise
                rows //= 2

    def _rows(self, x: HeadInput, dtype: torch.dtype, number: int) -> int:
        return self.chunk or chunk_rows(
            x.features.shape[0], x.weight.shape[0], dtype.itemsize, x.weight.device, number
        )

    def take(self, x: HeadInput, dtype: torch.dtype) -> Tensor:
        """The spare buffer if it was made for the same sizes, else a new one. Until ``keep``
        another thread makes its own.
        """
        K, device, rows = x.weight.shape[0], x.weight.device, self._rows(x, dtype, 1)
        try:
            spare = self._spare.pop()
        except IndexError:
            return self.new(x, dtype, 1)[0]
        if spare.shape == (K, rows) and spare.dtype == dtype and spare.device == device:
            return spare
        del spare  # before the new one is made
        return self.new(x, dtype, 1)[0]

    def keep(self, buffer: Tensor) -> None:
        """Keep a buffer for the next call: on the CPU, fetching its pages anew takes 2 to 3 % of a
        head's time.
        """
        plain = (
            type(buffer) is Tensor and not buffer.is_inference()
        )  # an inference tensor may not be written elsewhere
        if (
            plain
            and buffer.device.type == "cpu"
            and buffer.untyped_storage().nbytes() <= _FAR_BYTES
        ):
            self._spare[:] = [buffer]
