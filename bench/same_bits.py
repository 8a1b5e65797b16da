"""A dozen plain solves to the last bit: value, evaluations, outcome, certificate gap. What a move
of the house must not change.

    python -m bench same_bits --out before.json        # in the old checkout
    python -m bench same_bits --against before.json    # in the new one, on the same machine: exits
                                                       1 where a bit differs

The same solves' values are held to 1e-12 by tests/test_plain.py, on any machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ufm_fast import Problem, solve
from ufm_fast.targets import TargetSets

SMALL: dict[str, Any] = {"dim": 8, "lambda_w": 1e-3, "lambda_h": 1e-4}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ce balanced": ({**SMALL, "classes": 6, "per_class": 4}, {}),
    "ce counts, random start": ({**SMALL, "counts": [50, 20, 10, 5, 2, 1]}, {"start": "normal"}),
    "ce free bias": ({**SMALL, "counts": [9, 5, 3, 2], "bias": "free"}, {}),
    "ce penalised bias": (
        {**SMALL, "counts": [9, 5, 3, 2], "bias": "penalised", "lambda_b": 1e-2},
        {"start": "normal"},
    ),
    "ce d < K - 1": ({**SMALL, "classes": 12, "dim": 4}, {"start": "normal"}),
    "smoothing": ({**SMALL, "counts": [5, 4, 3, 0], "smoothing": 0.1}, {}),
    "focal": (
        {**SMALL, "classes": 5, "per_class": 3, "loss": "focal", "gamma": 2.0},
        {"start": "normal"},
    ),
    "pick-all": (
        {
            **SMALL,
            "loss": "pick-all",
            "target_sets": TargetSets.create([0, 1, 3, 5, 6], [0, 1, 2, 0, 2, 2], 4, [4, 2, 1, 3]),
            "classes": 4,
        },
        {"start": "normal"},
    ),
    "mse": ({**SMALL, "counts": [9, 5, 3, 2], "loss": "mse"}, {"start": "normal"}),
    "mse free bias": (
        {**SMALL, "counts": [9, 5, 3, 2], "loss": "mse", "bias": "free"},
        {"start": "normal"},
    ),
    "gd raw, all samples": (
        {**SMALL, "classes": 4, "per_class": 3, "loss": "mse"},
        {"method": "gd", "variables": "raw", "reduce": "none", "start": "normal", "max_steps": 300},
    ),
    "momentum": (
        {**SMALL, "classes": 4, "per_class": 3},
        {"method": "momentum", "start": "normal", "max_steps": 300},
    ),
    "newton-cg, frozen w": (
        {**SMALL, "classes": 5, "freeze": "w"},
        {"method": "newton-cg", "start": "normal"},
    ),
    "alternating": (
        {**SMALL, "counts": [9, 5, 3, 2], "loss": "mse"},
        {"method": "alternating", "start": "normal"},
    ),
    "bfloat16": (
        {**SMALL, "classes": 5, "dtype": "bfloat16"},
        {"start": "normal", "max_steps": 100},
    ),
}


def results() -> dict[str, dict[str, Any]]:
    """Value, evaluations, outcome and gap of each case, numbers in hexadecimal."""
    found = {}
    for name, (problem, options) in CASES.items():
        solution = solve(Problem(**problem, seed=1), **options)
        gap = solution.certificate.relative_gap if solution.certificate else float("nan")
        found[name] = {
            "value": solution.value.hex(),
            "evaluations": solution.evaluations,
            "outcome": solution.outcome.value,
            "gap": gap.hex(),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    found = results()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    before = json.loads(args.against.read_text()) if args.against else found
    differing = [name for name in found if found[name] != before[name]]
    for name in differing:
        print(name, before[name], found[name], sep="\n  ")
    print(f"{len(found) - len(differing)} of {len(found)} solves equal to the last bit")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
