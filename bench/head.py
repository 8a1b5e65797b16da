"""Cross-entropy value and gradient on the CPU, fp32: time against every torch alternative and the
three products alone.

    python bench/head.py [--rounds 7] [--shapes 0,1,2,3] [--out bench/results/head_cpu.csv]

One row a contender and shape: median seconds, the ratio to ours (median over rounds), percent of
the three products' rate (6 N K d flops), and peak memory beyond inputs and gradients, from a fresh
process that runs that contender alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, interleave, median_ratio, peak_rss_bytes, reset_peak, write_csv

from ufm_fast.benchmark.rivals import OURS, PRODUCTS, SHAPES, available, inputs, make

SLOW = 8.0  # seconds: a contender slower than this is called once


def extra_bytes(name: str, shape: tuple[int, int, int]) -> int:
    """Peak resident memory beyond inputs and gradients, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--shape", ",".join(map(str, shape))]
    # What the set-up freed goes back to the system at once: else the contender would reuse it,
    # unseen.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def report_memory(name: str, shape: tuple[int, int, int]) -> None:
    """Child process: print the rise of the peak over inputs and gradient buffers."""
    make(
        name, 64, 64, shape[2]
    )()  # thread pools and workspaces of the libraries, which any contender has
    function = make(name, *shape)
    kept = [torch.ones_like(t) for t in inputs(*shape)[:2]]  # what the gradients take
    reset_peak()
    before = peak_rss_bytes()
    del kept
    function()
    print(max(peak_rss_bytes() - before, 0))


def measure(shape: tuple[int, int, int], rounds: int) -> list[dict[str, object]]:
    """Rows of one shape; a contender that fails says so in its row."""
    contenders, failed, slow = {}, {}, {}
    for name in available():
        try:
            function = make(name, *shape)
            began = time.perf_counter()
            function()
            taken = time.perf_counter() - began
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if taken > SLOW:
            slow[name] = taken
        else:
            contenders[name] = function
    seconds = interleave(contenders, rounds, warmup=0)
    for name, taken in slow.items():  # one call of those tells enough
        seconds[name] = [taken] * rounds
    rows = []
    for name in seconds:
        rows.append(
            {
                "N": shape[0],
                "K": shape[1],
                "d": shape[2],
                "contender": name,
                "seconds": round(statistics.median(seconds[name]), 4),
                "time_over_ours": round(median_ratio(seconds[name], seconds[OURS]), 3),
                "percent_of_products": round(
                    100 * median_ratio(seconds[PRODUCTS], seconds[name]), 1
                ),
                "calls": 1 if name in slow else rounds,
                "extra_MB": ""
                if name == PRODUCTS or name in slow
                else round(extra_bytes(name, shape) / 1e6, 1),
            }
        )
        print(*rows[-1].values(), sep="\t", flush=True)
    rows += [
        {"N": shape[0], "K": shape[1], "d": shape[2], "contender": n, "note": why}
        for n, why in failed.items()
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", default="0,1,2,3", help="indices into the four shapes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        N, K, d = map(int, args.shape.split(","))
        report_memory(args.memory_of, (N, K, d))
        return
    print(environment())
    print(
        "N",
        "K",
        "d",
        "contender",
        "seconds",
        "time/ours",
        "% of products",
        "calls",
        "extra MB",
        sep="\t",
    )
    rows = [row for i in args.shapes.split(",") for row in measure(SHAPES[int(i)], args.rounds)]
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
