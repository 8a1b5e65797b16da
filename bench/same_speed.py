"""Evaluations a second of plain problems, and of the drop-in loss without any of its options,
against another checkout's: pairs of child processes, block by block in turn.

    python -m bench same_speed OLD_CHECKOUT [--rounds 31] [--out FILE.csv]

``new_over_old`` is the median over rounds of the new checkout's seconds over the old one's, of
blocks of about 50 ms that ran one after the other, in seconds of the processor (set
OMP_NUM_THREADS=1), which others on the machine disturb less; ``least_new_over_old`` is the ratio of
the least seconds of all rounds, which they disturb least. Measured are a value and gradient of
cross-entropy and squared error at two sizes, in the balanced variables; and `drop-in`, the loss of
5 K rows forward and backward through autograd, which says what options cost that are not used
(against the commit before they came).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPES = ((100, 128), (1000, 64))
LOSSES = ("ce", "mse", "drop-in")
PAIRS = 5  # of children: where memory falls to a process moves its speed by per cents


def drop_in(K: int, d: int) -> Callable[[], object]:
    """Forward and backward of the drop-in cross-entropy, nothing asked for."""
    import torch

    from ufm_fast.functional import linear_cross_entropy

    make = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, d, generator=make).requires_grad_() for n in (5 * K, K))
    labels = torch.randint(K, (5 * K,), generator=make)
    return lambda: torch.autograd.grad(
        linear_cross_entropy(features, weight, labels), (features, weight)
    )


def objective(loss: str, K: int, d: int) -> Callable[[], object]:
    """Value and gradient of a plain problem."""
    from ufm_fast.objective import Objective
    from ufm_fast.problem import Problem
    from ufm_fast.starts import make_start

    found = Objective(
        Problem(classes=K, dim=d, per_class=5, loss=loss, lambda_w=1e-4, lambda_h=1e-4)
    )
    x = make_start(found, "normal")
    return lambda: found.value_and_grad(x)


def child(loss: str, K: int, d: int) -> None:
    """Answers each line of a number with the seconds of the processor that so many evaluations
    take.
    """
    call = drop_in(K, d) if loss == "drop-in" else objective(loss, K, d)
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            call()
        print(time.process_time() - start, flush=True)


class Worker:
    """A child that evaluates with the package of a checkout."""

    def __init__(self, checkout: Path, *arguments: str) -> None:
        path = os.pathsep.join(str(checkout / part) for part in ("", "kernels"))
        command = [sys.executable, __file__, "--child", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=checkout,
        )

    def seconds(self, number: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def seconds(old: Path, arguments: tuple[str, ...], rounds: int) -> list[dict[str, float]]:
    """Seconds of an evaluation in each round, old and new, by a pair of children."""
    workers = {
        name: Worker(path, *arguments)
        for name, path in (("old", old), ("new", Path(__file__).parents[1]))
    }
    for worker in workers.values():
        worker.seconds(3)
    number = max(1, round(0.05 / (workers["old"].seconds(20) / 20)))
    found = [
        {name: workers[name].seconds(number) / number for name in random.sample(list(workers), 2)}
        for _ in range(rounds)
    ]
    for worker in workers.values():
        worker.close()
    return found


def measure(
    old: Path, loss: str, K: int, d: int, rounds: int
) -> tuple[dict[str, object], dict[str, object]]:
    """The case and its figures."""
    arguments = loss, str(K), str(d)
    found = [x for _ in range(PAIRS) for x in seconds(old, arguments, -(-rounds // PAIRS))]
    ratios = [x["new"] / x["old"] for x in found]
    quarters = statistics.quantiles(ratios, n=4)
    least = {name: min(x[name] for x in found) for name in ("old", "new")}
    return {"loss": loss, "K": K, "d": d}, {
        "rounds": len(found),
        "new_over_old": f"{statistics.median(ratios):.4f}",
        "quartiles": f"{quarters[0]:.3f} {quarters[2]:.3f}",
        "least_new_over_old": f"{least['new'] / least['old']:.4f}",
    }


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], int(args.child[1]), int(args.child[2]))
    if args.old is None:
        parser.error("give the old checkout's folder")
    from measure import environment  # not in a child, which takes the package of its checkout
    from table import Record, add, lines

    for K, d in SHAPES:
        for loss in args.losses:
            figures = measure(args.old.resolve(), loss, K, d, args.rounds)
            record = Record(*figures, note=f"against {commit_of(args.old)}")
            print(*record.case.values(), *record.measured.values(), sep="\t")
            if args.out:
                add(args.out, lines("same_speed", record, environment()))


if __name__ == "__main__":
    main()
