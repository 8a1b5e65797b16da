"""The tiled backend's two ways to the gradients, fp32: factors and labels added to the products, or
put into E first.

Time of value and both gradients, and their relative errors against float64, by classes for each
column of features; dense torch beside them. In random order within a round; ratios are medians over
rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from bench.measure import interleave, median_ratio
from bench.spread import drawn
from bench.table import Record
from ufm_fast.backends import Gradients, HeadInput, TiledBackend, tiled
from ufm_fast.losses import make_loss
from ufm_fast.targets import Targets

SHAPES = (
    (4096, 100, 512), (2048, 512, 1024), (2048, 1000, 2048), (2048, 2048, 1024), (4096, 1000, 256),
    (2048, 4096, 1024), (1024, 4096, 512), (2048, 8192, 512), (4096, 4096, 256), (8192, 8192, 128),
)  # fmt: skip
WAYS = {"added": 0.0, "in E": float("inf")}


def heads(
    H: torch.Tensor, W: torch.Tensor, y: torch.Tensor
) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Each contender as a call that returns (dH, dW)."""
    backend = TiledBackend()
    x = HeadInput(
        make_loss("ce"),
        H,
        W,
        None,
        Targets(y),
        torch.full((len(H),), 1 / len(H), dtype=torch.float64),
    )

    def ours(few: float) -> tuple[torch.Tensor, torch.Tensor]:
        out = (torch.empty_like(H), torch.empty_like(W))
        with mock.patch.object(tiled, "_FEW", few):
            backend.head(x, Gradients(*out, None, fresh=True))
        return out

    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        leaves = (H.detach().requires_grad_(), W.detach().requires_grad_())
        return torch.autograd.grad(
            torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, y), leaves
        )

    return {**{name: lambda few=few: ours(few) for name, few in WAYS.items()}, "dense torch": dense}


def records(rounds: int = 21) -> Iterator[Record]:
    for shape in SHAPES:
        H, W, y = drawn(*shape, 1.0)
        exact = heads(H.double(), W.double(), y)["dense torch"]()
        calls = heads(H, W, y)
        errors = {
            n: [float((a - b).norm() / b.norm()) for a, b in zip(f(), exact, strict=True)]
            for n, f in calls.items()
        }
        seconds = interleave(calls, rounds, warmup=0)
        for name, times in seconds.items():
            yield Record(
                dict(zip("NKd", shape, strict=True)),
                {
                    "seconds": f"{statistics.median(times):.4g}",
                    "time_over_added": f"{median_ratio(times, seconds['added']):.3f}",
                    "error_dH": f"{errors[name][0]:.1e}",
                    "error_dW": f"{errors[name][1]:.1e}",
                },
                name,
            )
