"""Squared error at K = N = 1,000,000, d = 128, float32: seconds a step, seconds for the metrics,
peak memory.

python bench/million.py [--classes 1000000] [--dim 128] [--steps 5] [--out FILE.csv]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, peak_rss_bytes, write_csv

from ufm_fast import Problem, solve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", default="gd,alternating,lbfgs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(environment())
    problem = Problem(
        classes=args.classes,
        dim=args.dim,
        loss="mse",
        lambda_w=1e-7,
        lambda_h=1e-7,
        dtype="float32",
    )
    rows = []
    for method in args.methods.split(","):
        options = (
            {"learning_rate": 1.0}
            if method == "gd"
            else {"history": 3}
            if method == "lbfgs"
            else {}
        )
        solution = solve(
            problem,
            method=method,
            start="normal",
            max_steps=args.steps,
            certificate=False,
            metrics=False,
            **options,
        )
        rows.append(_row(args, method, solution.seconds / max(solution.steps, 1)))
    from ufm_fast.metrics import collect

    began = time.perf_counter()
    labels = problem.rows().targets.indices
    collect(
        solution.point.H, solution.point.W, labels, lambda_w=1e-7, lambda_h=1e-7, pairwise="none"
    )
    rows.append(_row(args, "metrics", time.perf_counter() - began))
    if args.out:
        write_csv(args.out, rows)


def _row(args: argparse.Namespace, what: str, seconds: float) -> dict[str, object]:
    row: dict[str, object] = {
        "K": args.classes,
        "d": args.dim,
        "what": what,
        "seconds": round(seconds, 2),
    }
    row["peak_GB"] = round(peak_rss_bytes() / 1e9, 2)
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
