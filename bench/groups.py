"""The minimum of long-tailed classes on groups of equal counts: seconds, memory and certified gap,
K = 10^6 to 10^9.

Counts run from 1 to 1000, K_g in proportion to 1/n_g. ``part``: mu over the penalty at which the
largest class collapses. ``seconds`` are the wall's, ``cpu_seconds`` the process' own, which is what
counts where others share the machine. ``--cases`` chooses: all, small, G1000, random. ``random``:
equality with the full solver on 200 random problems (K <= 60; every loss and bias), the largest
relative difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np

from bench.measure import peak_rss_bytes, reset_peak
from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.class_groups import ClassGroups
from ufm_fast.groups import GroupMinimum, group_metrics, group_minimum
from ufm_fast.losses import CrossEntropy, SquaredError

BIASES = {"none": math.inf, "penalised": 0.01, "free": 0.0}
SMALL = [
    (classes, distinct, part, bias, smoothing)
    for classes in (10**6, 10**9)
    for distinct in (100, 300)  # of which 75 and 179 differ
    for part in (1e-3, 0.1)
    for bias, smoothing in (("none", 0.0), ("free", 0.0), ("none", 0.1))
]


def power_law(classes: int, distinct: int, most: int = 1000) -> ClassGroups:
    counts = (
        np.unique(np.geomspace(1, most, distinct).round().astype(int))
        if distinct < most
        else np.arange(1, most + 1)
    )
    sizes = np.maximum(1, (classes / counts / (1 / counts).sum()).round().astype(int))
    return ClassGroups.of_pairs(zip(sizes.tolist(), counts.tolist(), strict=True))


def timed(classes: int, distinct: int, part: float, bias: str, smoothing: float) -> Record:
    groups = power_law(classes, distinct)
    mu = part * math.sqrt(groups.counts.max()) / groups.samples
    reset_peak()
    began, used = time.perf_counter(), time.process_time()
    best = group_minimum(
        groups, mu, mu, loss=CrossEntropy(smoothing=smoothing), lambda_b=BIASES[bias]
    )
    group_metrics(best)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return Record(
        {
            "what": "solve",
            "K": groups.classes,
            "G": len(groups.counts),
            "part": part,
            "bias": bias,
            "smoothing": smoothing,
        },
        {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "peak_MB": round(peak_rss_bytes() / 1e6),
            "steps": best.steps,
            "gap": f"{best.certificate.relative_gap:.1e}",
            "collapsed": int(best.collapsed.sum()),
            "rank": best.rank,
        },
    )


def compared(number: int = 200) -> Record:
    """The largest relative difference to the full solver, and the largest gap, over random
    problems.
    """
    generator, worst, gap, slack, done = np.random.default_rng(0), 0.0, 0.0, 0.0, 0
    while done < number:
        found = _random(generator)
        if found is None:
            continue
        best, problem = found
        full = solve(problem, metrics=False, reduce="classes")
        worst = max(
            worst,
            abs(best.value - full.value) / max(full.value, 1e-300)
            if full.value > 1e-12
            else best.value,
        )
        gap = max(gap, best.certificate.relative_gap)
        assert full.certificate is not None
        slack = max(
            slack,
            full.certificate.lower_bound - best.value,
            best.certificate.lower_bound - full.value,
        )
        done += 1
        print(done, f"{worst:.1e} {gap:.1e} {slack:.1e}", flush=True)
    return Record(
        {"what": "random problems", "K": "<= 60", "G": "1..6"},
        {"difference": f"{worst:.1e}", "gap": f"{gap:.1e}", "problems": done},
    )


def _random(generator: np.random.Generator) -> tuple[GroupMinimum, Problem] | None:
    number = int(generator.integers(1, 7))
    counts = generator.choice(np.arange(0, 40), number, replace=False)
    sizes = generator.integers(1, 11, number)
    loss = (CrossEntropy(), CrossEntropy(smoothing=0.1), SquaredError())[generator.integers(3)]
    bias = list(BIASES)[generator.integers(3)]
    if (
        sizes.sum() < 2
        or counts @ sizes == 0
        or (bias == "free" and loss == CrossEntropy() and counts.min() == 0)
    ):
        return None
    groups = ClassGroups.of_pairs(zip(sizes.tolist(), counts.tolist(), strict=True))
    mu = math.sqrt(counts.max()) / groups.samples * 10 ** generator.uniform(-3, 0.1)
    best = group_minimum(groups, 3 * mu, mu / 3, loss=loss, lambda_b=BIASES[bias])
    lambda_b = BIASES[bias] if bias == "penalised" else 0.0
    penalties = {"lambda_w": 3 * mu, "lambda_h": mu / 3, "lambda_b": lambda_b}
    return best, Problem(
        dim=groups.classes + 1, groups=groups.runs, loss=loss, bias=bias, **penalties
    )


def records(cases: str = "all") -> Iterator[Record]:
    if cases in ("all", "small"):
        yield from (timed(*case) for case in SMALL)
    if cases in ("all", "G1000"):
        yield timed(10**6, 1000, 0.1, "none", 0.0)
    if cases in ("all", "random"):
        yield compared()
