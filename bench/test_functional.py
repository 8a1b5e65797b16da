"""Forward and backward through autograd of the drop-in cross-entropy against torch's own, float32,
at four shapes.

    python -m pytest bench/test_functional.py --benchmark-only
    python bench/test_functional.py [--threads 2] [--shapes 2]

The first form is pytest-benchmark's. The second interleaves the variants call by call, compares
their medians, checks each gradient against float64, and prints one row for each shape and variant:
the ratio is the variant's time over the fused one's.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent))
from common import median_ratio, write_csv

from ufm_fast.functional import linear_cross_entropy

SHAPES = ((4096, 4096, 512), (2048, 32768, 256), (8192, 8192, 128), (1024, 65536, 1024))
SLOW = 3.0  # a variant that takes so many times the fused one's time is called once
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, W), y)


def variants() -> dict[str, Loss]:
    """The rivals that this torch has: chunked ones by its own options."""
    found: dict[str, Loss] = {"fused": linear_cross_entropy, "dense": dense}
    theirs: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if theirs is not None:
        found["torch"] = theirs
    if theirs is not None and options is not None:
        found["torch-chunked"] = lambda h, W, y: theirs(h, W, y, options=options())
        for rows in (256, 512, 1024):
            by_hand = options(batch_chunk_size=rows, chunking_method=None)
            found[f"torch-chunked-{rows}"] = lambda h, W, y, by_hand=by_hand: theirs(
                h, W, y, options=by_hand
            )
        found["torch-accurate"] = lambda h, W, y: theirs(
            h, W, y, options=options(acc_policy="accurate")
        )
    return found


def data(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features near their class's weight row: between the start of training and collapse."""
    rows, classes, dim = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(classes, dim, generator=generator) / dim**0.5
    y = torch.randint(0, classes, (rows,), generator=generator)
    h = 5.0 * W[y] + torch.randn(rows, dim, generator=generator)
    return h.requires_grad_(), W.requires_grad_(), y


def step(loss: Loss, h: Tensor, W: Tensor, y: Tensor) -> None:
    h.grad = W.grad = None
    loss(h, W, y).backward()


@pytest.mark.parametrize("name", list(variants()))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_and_backward(benchmark: Any, shape: tuple[int, int, int], name: str) -> None:
    h, W, y = data(shape)
    benchmark.pedantic(step, (variants()[name], h, W, y), rounds=3, warmup_rounds=1)
    benchmark.extra_info["GFLOP/s"] = (
        6e-9 * shape[0] * shape[1] * shape[2] / benchmark.stats.stats.median
    )


def errors(found: dict[str, Tensor], h: Tensor, W: Tensor, y: Tensor) -> dict[str, float]:
    """Normwise error of each variant's weight gradient against float64."""
    exact = [x.detach().double().requires_grad_() for x in (h, W)]
    linear_cross_entropy(*exact, y).backward()
    truth = exact[1].grad
    assert truth is not None
    return {name: float((g.double() - truth).norm() / truth.norm()) for name, g in found.items()}


def measure(shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    h, W, y = data(shape)
    times: dict[str, list[float]] = {name: [] for name in variants()}
    gradients: dict[str, Tensor] = {}
    for turn in range(rounds + 1):
        # In random order: what runs after a variant that gave its memory back pays for fetching it
        # again.
        for name, loss in (
            random.sample(list(variants().items()), len(times)) if turn else variants().items()
        ):
            if times[name] and times[name][0] > SLOW * times["fused"][0]:
                continue  # one call of those tells enough
            start = time.perf_counter()
            step(loss, h, W, y)
            elapsed = time.perf_counter() - start
            if turn:  # the first is the warm-up, and where the gradients are kept
                times[name].append(elapsed)
            elif W.grad is not None:
                gradients[name] = W.grad.clone()
    error = errors(gradients, h, W, y)
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "shape": shape,
            "variant": name,
            "seconds": median[name],
            "rounds": len(times[name]),
            "ratio": median_ratio(times[name], times["fused"][: len(times[name])]),
            "GFLOP/s": 6e-9 * shape[0] * shape[1] * shape[2] / median[name],
            "error": error[name],
        }
        for name in times
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of the shapes, the cheapest first"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write a CSV file too")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {flags.threads} threads, float32, "
        f"median of {flags.rounds}"
    )
    rows = []
    for shape in SHAPES[: flags.shapes]:
        for row in measure(shape, flags.rounds):
            rows.append(row)
            print(
                "N, K, d = {shape}  {variant:18s} {seconds:8.3f} s  {GFLOP/s:7.1f} GFLOP/s  ratio "
                "{ratio:5.2f}  "
                "gradient error {error:.1e}".format(**row),
                flush=True,
            )
    if flags.out:
        write_csv(flags.out, rows)


if __name__ == "__main__":
    main()
