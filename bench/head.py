"""Cross-entropy value and gradient on the CPU, float32: time against every torch alternative and
the three products alone.

One record a contender and shape: median seconds, the ratio to ours (median over rounds), percent of
the three products' rate (6 N K d flops), and peak memory beyond inputs and gradients, from a fresh
process that runs that contender alone.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator

import torch

from bench.measure import in_child, in_turn, peak_rss_bytes, ratio, reset_peak
from bench.table import Record
from ufm_fast.benchmark.rivals import OURS, PRODUCTS, SHAPES, available, inputs, make


def extra_bytes(name: str, shape: tuple[int, int, int]) -> int:
    """The rise of the peak over inputs and gradient buffers, in this process."""
    # Thread pools and workspaces of the libraries, which any contender has.
    make(name, 64, 64, shape[2])()
    function = make(name, *shape)
    kept = [torch.ones_like(t) for t in inputs(*shape)[:2]]  # what the gradients take
    reset_peak()
    before = peak_rss_bytes()
    del kept
    function()
    return max(peak_rss_bytes() - before, 0)


def measure(shape: tuple[int, int, int], rounds: int) -> Iterator[Record]:
    """Records of one shape; a contender that fails says so in its own."""
    case = dict(zip("NKd", shape, strict=True))
    makers = {name: functools.partial(make, name, *shape) for name in available()}
    seconds, failed = in_turn(makers, rounds)
    for name, times in seconds.items():
        once, figures = len(times) < rounds, {}
        if name != PRODUCTS and not once:
            size = in_child("bench.head", "extra_bytes", name, shape)
            figures["extra_MB"] = round(size / 1e6, 1)
        yield Record(
            case,
            {
                "seconds": round(statistics.median(times), 4),
                "time_over_ours": round(ratio(times, seconds[OURS]), 3),
                "percent_of_products": round(100 * ratio(seconds[PRODUCTS], times), 1),
                "calls": len(times),
                **figures,
            },
            name,
        )
    for name, why in failed.items():
        yield Record(case, {}, name, why)


def records(rounds: int = 7, shapes: str = "0,1,2,3") -> Iterator[Record]:
    for index in shapes.split(","):
        yield from measure(SHAPES[int(index)], rounds)
