"""Peak memory of every method's steps against what `ufm-fast plan` says of them, each in a process
of its own.

python bench/memory.py [--classes 100] [--dim 60000] [--steps 45] [--out FILE.csv]

In multiples of the parameters' bytes P, above what the process held before. The C library must hand
back what is freed, which the script asks it for (MALLOC_MMAP_THRESHOLD_). Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import peak_rss_bytes, reset_peak, write_csv

from ufm_fast import Problem, solve
from ufm_fast.plan import make_plan

METHODS = (
    "gd",
    "momentum",
    "nesterov",
    "sign",
    "spectral",
    "adam",
    "lbfgs",
    "newton-cg",
)  # alternating holds d x d matrices beside


def peak(
    method: str, loss: str, start: str, classes: int, dim: int, steps: int
) -> dict[str, float]:
    """Bytes of the parameters, of the plan, and of a run; imbalanced, for equal counts would save a
    copy of the features.
    """

    def problem(dim: int) -> Problem:
        return Problem(
            counts=[5 + 3 * k % 7 for k in range(classes)],
            dim=dim,
            loss=loss,
            lambda_w=1e-3,
            lambda_h=1e-5,
        )

    def run(dim: int, steps: int) -> None:
        solve(
            problem(dim),
            method=method,
            max_steps=steps,
            start=start,
            certificate=False,
            metrics=False,
        )

    run(min(2 * classes, dim), 3)  # imports and buffers
    reset_peak()
    before = peak_rss_bytes()
    run(dim, steps)
    plan = make_plan(problem(dim), method=method)
    return {
        "P": plan.parameters,
        "planned": plan.steps(method, "tiled"),
        "measured": peak_rss_bytes() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dim", type=int, default=60000)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--loss", choices=("ce", "mse"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(peak(*args.child, args.classes, args.dim, args.steps)))
        return
    rows = []
    cases = (
        [("ce", "normal"), ("ce", "spectral"), ("mse", "normal")]
        if args.loss is None
        else [(args.loss, "normal")]
    )
    for loss, start in cases:
        for method in METHODS:
            command = [sys.executable, __file__, "--child", method, loss, start]
            command += [f"--{name}={getattr(args, name)}" for name in ("classes", "dim", "steps")]
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            )
            if ran.returncode:
                raise SystemExit(ran.stderr)
            found = json.loads(ran.stdout)
            size = {name: round(found[name] / found["P"], 1) for name in ("planned", "measured")}
            row = {
                "loss": loss,
                "start": start,
                "method": method,
                "classes": args.classes,
                "dim": args.dim,
                **size,
            }
            print(row, flush=True)
            rows.append(row)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
