"""Seconds of a certificate: exact at K = 1000, 2000, 4096, probabilistic beyond; cross-entropy,
float64.

    python bench/certificate.py [--classes 1000,2000,4096,8413] [--dim 64] [--swept] [--out
    bench/results/certificate_cpu.csv]

The point is a spectral start of imbalanced counts; what a certificate costs does not depend on how
good the point is, but for the probabilistic one, whose Lanczos iteration ends earlier where the
norm stands apart. ``--swept`` adds the probabilistic ones as they are where the gradient finds no
room in memory: each product sweeps the classes anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, write_csv

from ufm_fast import Problem, solve
from ufm_fast.theory.certificates import EXACT_CLASSES, certify
from ufm_fast.theory.certificates import softmax as module


def measure(K: int, d: int, gradient: str) -> dict[str, object]:
    counts = torch.logspace(0, 2, K, dtype=torch.float64).round().long()
    problem = Problem(counts=counts, dim=d, lambda_w=1e-3, lambda_h=1e-3 / int(counts.sum()))
    solution = solve(problem, max_steps=0, metrics=False, certificate=False)
    began = time.perf_counter()
    found = certify(problem, problem.rows("classes"), solution.point)
    seconds = time.perf_counter() - began
    return {
        "K": K,
        "d": d,
        "kind": found.kind,
        "gradient": gradient,
        "seconds": round(seconds, 2),
        "relative_gap": f"{found.relative_gap:.3g}",
        "spectral_ratio": f"{found.spectral_ratio:.6g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", default="1000,2000,4096,8413")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--swept", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(environment())
    rows = []
    for K in map(int, args.classes.split(",")):
        rows.append(measure(K, args.dim, "held"))
        print(*rows[-1].values(), sep="\t", flush=True)
    if args.swept:
        module.available_bytes = lambda device: 0
        for K in (K for K in map(int, args.classes.split(",")) if K > EXACT_CLASSES):
            rows.append(measure(K, args.dim, "swept"))
            print(*rows[-1].values(), sep="\t", flush=True)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
