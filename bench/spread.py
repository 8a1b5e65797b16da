"""The drop-in loss on the CPU where logits spread far, as those of freshly drawn parameters do:
time against dense torch.

Forward and backward in fp32 at heads of common sizes, with logits of a standard deviation of 1 and
of sqrt(d), in one run; the three matrix products alone are the ceiling.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from bench.measure import interleave, median_ratio
from bench.table import Record
from ufm_fast.benchmark.rivals import CHUNKINGS, DROP_IN, OURS, available, make

SHAPES = ((512, 1000, 512), (2048, 1000, 2048), (1024, 4096, 512), (2048, 16384, 768))


def drawn(N: int, K: int, d: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(H, W, y) of which the logits have this standard deviation."""
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(N, d, generator=generator)
    return (
        H,
        spread / d**0.5 * torch.randn(K, d, generator=generator),
        torch.randint(K, (N,), generator=generator),
    )


def records(rounds: int = 15) -> Iterator[Record]:
    for shape in SHAPES:
        for scale in (1.0, shape[2] ** 0.5):
            data = drawn(*shape, scale)
            names = [name for name in (DROP_IN, *available()) if name not in (OURS, *CHUNKINGS)]
            calls = {name: make(name, *shape, data) for name in names}
            seconds = interleave(calls, rounds, warmup=2)
            for name, times in sorted(seconds.items()):
                yield Record(
                    {**dict(zip("NKd", shape, strict=True)), "spread": f"{scale:.3g}"},
                    {
                        "seconds": f"{statistics.median(times):.4g}",
                        "time_over_ours": f"{median_ratio(times, seconds[DROP_IN]):.3f}",
                    },
                    name,
                )
