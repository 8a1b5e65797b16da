"""Where a step's time goes on the device: milliseconds of every kernel in one value and gradient,
by the profiler.

    python bench/breakdown.py [--out STEM]
    python bench/breakdown.py --rehearse      on a CPU, under triton's interpreter: no figures

Heads in bfloat16 by both kinds of products, one in float32, the squared error in float32, and the
ways to a Gram matrix in float64. `wall` is the step as a caller sees it; where it is much more than
the sum of its kernels, launches are what costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from device import CUDA, DEVICE, arguments, forget, milliseconds, reason, with_peak
from measure import environment
from oracle import data
from table import Record, add, lines

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
HEADS = (
    ("bf16", 65536, 65536, 1024), ("bf16", 65536, 65536, 512),
    ("bf16", 16384, 65536, 4096), ("bf16", 65536, 65536, 128), ("bf16", 65536, 65536, 64),
    ("tf32x3", 16384, 65536, 1024), ("bf16x3", 16384, 65536, 1024),
)  # fmt: skip
SQUARED = ((65536, 65536, 512), (131072, 131072, 2048))
TINY, TINY_SQUARED = (("bf16", 40, 72, 24),), ((72, 72, 24),)


def head_steps(
    mode: str, shape: tuple[int, int, int], chunk: int
) -> dict[str, Callable[[], object]]:
    import peers

    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    inputs = data(*shape, 20.0, dtype, DEVICE)
    ways = {"triton": peers.ours(mode, chunk, "triton")}
    if mode == "bf16":
        ways["library"] = peers.ours(mode, chunk, "library")
    if shape[2] <= 128:
        ways["one pass"] = peers.one_pass(mode)
    return {name: (lambda way=way: way(*inputs)) for name, way in ways.items()}


def squared_steps(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    from ufm_kernels.squared_error import gram, library_gram
    from ufm_kernels.squared_head import squared_error_value_and_grad

    features, weight, labels = data(*shape, 1.0, torch.float32, DEVICE)

    def step(mode: str) -> object:
        out = torch.zeros_like(features), torch.zeros_like(weight)
        return squared_error_value_and_grad(
            features,
            weight,
            None,
            labels,
            None,
            1 / len(features),
            grad_features=out[0],
            grad_weight=out[1],
            mode=mode,
        )

    def square() -> object:
        double = features.double()
        return double.T @ double

    steps: dict[str, Callable[[], object]] = {
        mode: (lambda mode=mode: step(mode)) for mode in ("bf16x3", "tf32x3")
    }
    grams = {
        "triton": lambda: gram(features),
        "library": lambda: library_gram(features),
        "library, whole": square,
    }
    return steps | {f"gram {name}": call for name, call in grams.items()}


def profiled(call: Callable[[], object]) -> list[dict[str, object]]:
    """A row a kernel, most time first, and one for the whole call."""
    if not CUDA:
        return [{"kernel": "wall", "ms": milliseconds(call), "calls": 1}]
    from torch.profiler import ProfilerActivity, profile

    call()
    _, peak = with_peak(call)
    wall = statistics.median([milliseconds(call) for _ in range(3)])
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    found = [
        {"kernel": event.key[:90], "ms": event.self_device_time_total / 1e3, "calls": event.count}
        for event in record.key_averages()
        if event.self_device_time_total > 0
    ]
    found.sort(key=lambda row: -row["ms"])
    return [{"kernel": "wall", "ms": wall, "calls": 1, "peak_extra_bytes": peak}, *found]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = arguments(parser, "breakdown")
    plan = [(*head[:1], head[1:], "head") for head in (TINY if chosen.rehearse else HEADS)]
    plan += [
        ("", shape, "squared error") for shape in (TINY_SQUARED if chosen.rehearse else SQUARED)
    ]
    for mode, shape, task in plan:
        try:
            steps = head_steps(mode, shape, 8192) if task == "head" else squared_steps(shape)
        except Exception as error:
            print(task, mode, shape, reason(error))
            continue
        for way, call in steps.items():
            common = {
                "task": task,
                "mode": mode,
                "N": shape[0],
                "K": shape[1],
                "d": shape[2],
                "way": way,
            }
            try:
                found = profiled(call)
            except Exception as error:  # one way that fails must not hide the others
                forget()
                found = [{"kernel": reason(error), "ms": float("nan"), "calls": 0}]
            for row in found:
                figures = {name: value for name, value in row.items() if name != "kernel"}
                record = Record(common, figures, str(row["kernel"]))
                add(chosen.out.with_suffix(".csv"), lines("breakdown", record, environment()))
            print(*common.values(), flush=True)
            for row in found[:12]:
                print(
                    f"    {row['ms']:9.3f} ms {row['calls']:4} x {row['kernel'][:70]}", flush=True
                )
        del steps
        forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
