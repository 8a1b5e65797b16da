"""The three products of the tiled backend with exponentials stored C x K and K x C, fp32: why it
stores K x C.

Each layout runs all chunks of its shape, nothing else; in random order within a round, ratios are
medians over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from bench.measure import interleave, median_ratio
from bench.table import Record
from ufm_fast.backends.chunks import chunk_rows, stride
from ufm_fast.benchmark.rivals import SHAPES, inputs

LAYOUTS = ("C x K", "K x C, rows of C", "K x C, padded rows")


def products(layout: str, shape: tuple[int, int, int], chunk: int) -> Callable[[], None]:
    """A call that forms the logits of each chunk and both gradients' products from them."""
    H, W, _ = inputs(*shape)
    G, D = torch.empty_like(H), torch.zeros_like(W)
    width = {"C x K": shape[1], "K x C, rows of C": chunk, "K x C, padded rows": stride(chunk)}[
        layout
    ]
    buffer = torch.empty(chunk if layout == "C x K" else shape[1], width)

    def call() -> None:
        for start in range(0, shape[0], chunk):
            h = H[start : start + chunk]
            if layout == "C x K":
                E = buffer[: len(h)]
                torch.mm(h, W.T, out=E)
            else:
                E = buffer[:, : len(h)].T
                torch.mm(W, h.T, out=E.T)
            torch.mm(E, W, out=G[start : start + chunk])
            D.addmm_(E.T, h)

    return call


def records(rounds: int = 9) -> Iterator[Record]:
    for shape in SHAPES:
        chunk = chunk_rows(shape[0], shape[1], 4, torch.device("cpu"))
        calls = {layout: products(layout, shape, chunk) for layout in LAYOUTS}
        seconds = interleave(calls, rounds)
        for layout in LAYOUTS:
            yield Record(
                {"N": shape[0], "K": shape[1], "d": shape[2], "chunk": chunk},
                {
                    "seconds": round(statistics.median(seconds[layout]), 4),
                    "time_over_first": round(median_ratio(seconds[layout], seconds[LAYOUTS[0]]), 3),
                },
                layout,
            )
