"""Heads against each other for pytest-benchmark, with its tables, histograms and saved runs:

    python -m pytest bench/test_heads.py --benchmark-only

The contenders and shapes of `python -m bench head`, which compares them in turn, inside one run.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from ufm_fast.benchmark.rivals import SHAPES, available, make


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_value_and_gradients(benchmark: Any, shape: tuple[int, int, int], name: str) -> None:
    N, K, d = shape
    benchmark.group = f"N = {N}, K = {K}, d = {d}"
    benchmark.pedantic(make(name, N, K, d), rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:  # none with --benchmark-disable
        seconds = statistics.median(benchmark.stats.stats.data)
        benchmark.extra_info["GFLOP/s"] = 6e-9 * N * K * d / seconds
