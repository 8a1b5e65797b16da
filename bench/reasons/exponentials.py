"""torch's exp and exp2 in place, fp32 on the CPU: why the tiled backend takes powers of two.

A matrix of 2,048 rows of 1,024 numbers, laid out plainly or as the first columns of a padded
buffer, with results that are normal numbers or underflow. Each call copies its numbers in first;
the copy alone is timed beside and taken off.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from bench.measure import interleave
from bench.table import Record

FUNCTIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "copy": lambda x: x,
    "exp": torch.exp_,
    "exp2": torch.exp2_,
}


def records(rounds: int = 21) -> Iterator[Record]:
    for layout, width in (("plain", 1024), ("padded", 1040)):
        for kind, level in (("normal", 0.0), ("underflow", -200.0)):
            source = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)) + level
            buffer = torch.empty(2048, width)[:, :1024]

            def call(
                function: Callable[[torch.Tensor], object],
                buffer: torch.Tensor = buffer,
                source: torch.Tensor = source,
            ) -> None:
                function(buffer.copy_(source))

            calls = {name: (lambda f=f, call=call: call(f)) for name, f in FUNCTIONS.items()}
            seconds = {
                name: statistics.median(times) for name, times in interleave(calls, rounds).items()
            }
            exp, exp2 = (seconds[name] - seconds["copy"] for name in ("exp", "exp2"))
            yield Record(
                {"layout": layout, "results": kind},
                {
                    "exp_seconds": f"{exp:.3g}",
                    "exp2_seconds": f"{exp2:.3g}",
                    "exp_over_exp2": f"{exp / exp2:.2f}",
                },
            )
