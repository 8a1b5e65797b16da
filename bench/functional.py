"""The drop-in cross-entropy, forward and backward through autograd, float32: time against torch's
own at four shapes.

The ratio is a contender's time over the drop-in's; the error is that of its weight gradient against
float64, normwise.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.measure import in_turn, ratio
from bench.table import Record
from ufm_fast.benchmark.rivals import DROP_IN, OURS, PRODUCTS, SHAPES, available, make


def data(N: int, K: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features near their class's weight row: between the start of training and collapse."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(K, d, generator=generator) / d**0.5
    y = torch.randint(0, K, (N,), generator=generator)
    return 5.0 * W[y] + torch.randn(N, d, generator=generator), W, y


def measure(shape: tuple[int, int, int], rounds: int) -> Iterator[Record]:
    """Records of one shape; a contender that fails says so in its own."""
    case, given = dict(zip("NKd", shape, strict=True)), data(*shape)
    names = [DROP_IN, *(name for name in available() if name not in (OURS, PRODUCTS))]
    makers = {name: functools.partial(make, name, *shape, data=given) for name in names}
    H, W, y = given
    exact = make(DROP_IN, *shape, data=(H.double(), W.double(), y))()[1]
    seconds, failed = in_turn(makers, rounds, slow=3.0)
    for name, times in seconds.items():
        gradient = makers[name]()()[1]
        error = float((gradient.double() - exact).norm() / exact.norm())
        median = statistics.median(times)
        yield Record(
            case,
            {
                "seconds": f"{median:.4g}",
                "rounds": len(times),
                "time_over_ours": f"{ratio(times, seconds[DROP_IN]):.3f}",
                "GFLOP/s": f"{6e-9 * shape[0] * shape[1] * shape[2] / median:.4g}",
                "error": f"{error:.1e}",
            },
            name,
        )
    for name, why in failed.items():
        yield Record(case, {}, name, why)


def records(rounds: int = 11, shapes: str = "0,1,2,3") -> Iterator[Record]:
    for index in shapes.split(","):
        yield from measure(SHAPES[int(index)], rounds)
