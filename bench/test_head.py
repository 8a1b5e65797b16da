"""The same comparison for pytest-benchmark: ``python -m pytest bench/test_head.py
--benchmark-only``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ufm_fast.benchmark.rivals import SHAPES, available, make


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_value_and_gradient(benchmark, shape, name):
    N, K, d = shape
    benchmark.group = f"N={N} K={K} d={d}"
    benchmark.extra_info["flops"] = 6 * N * K * d
    benchmark.pedantic(make(name, N, K, d), rounds=3, warmup_rounds=1)
