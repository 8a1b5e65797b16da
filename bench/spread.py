"""The drop-in loss on the CPU where logits spread far, as those of freshly drawn parameters do: time against dense torch.

    python bench/spread.py [--rounds 15] [--out FILE.csv]

Forward and backward in fp32 at heads of common sizes, with logits of a standard deviation of 1 and of sqrt(d), in one run;
`products` are the three matrix products alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment, interleave, median_ratio, write_csv

from ufm_fast.functional import linear_cross_entropy

SHAPES = ((512, 1000, 512), (2048, 1000, 2048), (1024, 4096, 512), (2048, 16384, 768))
OURS = "ufm_fast"


def contenders(N: int, K: int, d: int, scale: float) -> dict[str, Callable[[], object]]:
    make = torch.Generator().manual_seed(0)
    H = torch.randn(N, d, generator=make).requires_grad_()
    W = (scale / d**0.5 * torch.randn(K, d, generator=make)).requires_grad_()
    y = torch.randint(K, (N,), generator=make)

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(H, W, y), (H, W))

    h, w = H.detach(), W.detach()
    E, G, D = torch.empty(N, K), torch.empty(N, d), torch.empty(K, d)

    def products() -> object:
        torch.mm(h, w.T, out=E)
        torch.mm(E, w, out=G)
        return torch.mm(E.T, h, out=D)

    found = {
        OURS: step(linear_cross_entropy),
        "autograd": step(lambda H, W, y: torch.nn.functional.cross_entropy(torch.nn.functional.linear(H, W), y)),
        "products": products,
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = step(torch.nn.functional.linear_cross_entropy)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(environment())
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        for scale in (1.0, shape[2] ** 0.5):
            calls = list(contenders(*shape, scale).items())
            random.shuffle(calls)
            seconds = interleave(dict(calls), args.rounds, warmup=2)
            for name, times in sorted(seconds.items()):
                row = {"N": shape[0], "K": shape[1], "d": shape[2], "spread": f"{scale:.3g}", "contender": name}
                row |= {
                    "seconds": f"{statistics.median(times):.4g}",
                    "time_over_ours": f"{median_ratio(times, seconds[OURS]):.3f}",
                }
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
