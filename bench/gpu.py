"""Check every kernel against float64 on the device, then time the heads against their peers.

    python bench/gpu.py [--minutes 9] [--quick] [--skip-tests] [--out bench/results/gpu]
    python bench/gpu.py --rehearse            on a CPU, at tiny shapes under triton's interpreter:
    no figures

Protocol: variants are interleaved launch by launch, in random order; medians, 20th and 80th
percentile; the same data for all rivals, never zeros, at four stages of collapse; buffers rotate so
that the L2 cache does not serve them. Reported are TFLOP/s counting the logits and both gradients
as 6 N K d, percent of the same run's library products, peak extra bytes, and the errors of loss and
gradients against float64; for the squared error percent of its floor, which is the larger of its
bytes at the rate of a copy and its flops at the rates of library products in the same precisions.

One long table (CSV), two plots, and a list of where library products beat the fused ones. The tasks
run in order of interest; with --minutes none is started that would not end in time, and the same
command goes on from there: tasks whose rows are in the table with this commit and device are done.
A task that costs the process its device is one of them, and the command begins again by itself.
Exit status: 2 without CUDA, 1 if a check fails.

Decisions

2026-11-25. The GPU scripts have a rehearsal (`--rehearse`): the same code at shapes of a few dozen,
under the interpreter, run by the tests. Time on a device is scarce, so tasks are ordered by
interest, `--minutes` starts none that would not end, and a second call goes on. The adapters for
Liger have been run so; Cut Cross-Entropy's kernels stop in the interpreter, QuACK needs a device to
be imported.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from device import (
    CUDA,
    DEVICE,
    arguments,
    forget,
    free_bytes,
    interleaved,
    milliseconds,
    reason,
    usable,
    with_peak,
)
from device_solve import EVALUATIONS, solve_rows
from gpu_plots import PRODUCTS, draw, fused_or_library
from measure import environment
from oracle import LADDER, STAGES, data, errors, margin_of, reference, squared_reference
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

BF16, FP32 = torch.bfloat16, torch.float32
MODES = {BF16: ["bf16"], FP32: ["tf32", "bf16x3", "fp16x3", "tf32x3"]}
MILLION = (1 << 20, 1 << 20, 1024)


class Task(NamedTuple):
    """One line of the plan: what is timed, at which shape, stage of collapse and dtype."""

    task: str
    N: int
    K: int
    d: int
    stage: str
    dtype: torch.dtype

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(map(str, self))

    @property
    def estimate(self) -> float:
        """Seconds, cautiously: a dozen contenders two or three times each at a third of the
        device's rate, and the oracle.
        """
        if self.task == "squared error":
            return 12.0
        flops, slow = 6.0 * self.N * self.K * self.d, 1 if self.dtype == BF16 else 5
        if self.task == "solve":  # three of them, the first a short one
            return 30.0 + 2.5 * EVALUATIONS * slow * flops / 2e14
        return 8.0 + flops / 3e14 * (3 if self[1:4] == MILLION else 30 * slow + 10)


def plan(quick: bool, rehearse: bool) -> list[Task]:
    """Every task, the most telling first: mid-sized shapes at both ends of training, then the
    rest.
    """
    if quick or rehearse:
        heads = [(40, 40, 24)] if rehearse else [(4096, 4096, 64), (4096, 8192, 512)]
        squared = [(64, 64, 32)] if rehearse else [(8192, 8192, 256)]
        ends = [
            Task("cross-entropy", *s, stage, t)
            for s in heads
            for stage in ("start", "terminal")
            for t in (BF16, FP32)
        ]
        rungs = [
            Task("errors", *heads[0], rung, t)
            for rung, t in zip(LADDER[1:4:2], (BF16, FP32), strict=True)
        ]
        rest = [
            *(Task("squared error", *s, "start", FP32) for s in squared),
            Task("solve", *heads[-1], "start", FP32),
        ]
        return [*ends, *rest, *rungs]
    middle = [(65536, 65536, d) for d in (1024, 512, 128, 64, 4096)]
    # 65,664 and 128,256 are multiples of 192, which QuACK's fast tile needs.
    named = [
        (4096, 128256, 4096),
        (65536, 65664, 1024),
        (16384, 248320, 2048),
        (8192, 256000, 2304),
        (16384, 128256, 4096),
    ]
    small = [(16384, 16384, d) for d in (512, 1024, 4096, 128, 64)]
    large = [(262144, 262144, d) for d in (128, 64, 512, 1024, 4096)]
    squared = [
        Task("squared error", n, n, d, "start", FP32) for n in (65536, 1 << 20) for d in (512, 2048)
    ]
    tasks = [Task("cross-entropy", *s, "terminal", BF16) for s in (*middle, *named)]
    tasks += [Task("errors", 8192, 65536, 1024, rung, t) for rung in LADDER for t in (BF16, FP32)]
    tasks += [Task("solve", 65536, 65536, 512, "start", t) for t in (BF16, FP32)]
    tasks += [*squared, Task("cross-entropy", *MILLION, "terminal", BF16)]
    tasks += [Task("cross-entropy", *s, "start", BF16) for s in (*middle[:4], *named)]
    tasks += [
        Task("cross-entropy", *s, stage, FP32)
        for s in middle[1:2]
        for stage in ("terminal", "start")
    ]
    tasks += [Task("cross-entropy", *s, "terminal", BF16) for s in (*small, *large[:3])]
    tasks += [
        Task("cross-entropy", *s, stage, FP32)
        for s in (*middle, *small, *named)
        for stage in ("terminal", "start")
    ]
    tasks += [
        Task("cross-entropy", *s, stage, BF16) for s in small for stage in ("terminal", "start")
    ]
    tasks += [
        Task("cross-entropy", *s, stage, BF16)
        for s in (*middle, *small)
        for stage in ("late", "learning")
    ]
    tasks += [
        Task("cross-entropy", *s, stage, BF16) for s in large for stage in ("terminal", "start")
    ]
    # The rest of all shapes at all stages in both dtypes: an hour and more, for whoever has the
    # device that long.
    everything = [
        Task("cross-entropy", *s, stage, t)
        for t in (BF16, FP32)
        for s in (*named, *middle, *small, *large)
        for stage in STAGES
    ]
    return list(dict.fromkeys([*tasks, *everything]))


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "ms": statistics.median(values),
        "p20_ms": quantile(values, 0.2),
        "p80_ms": quantile(values, 0.8),
    }


def head_rows(task: Task, most: int) -> Iterator[dict]:
    """Check and time every contender at one shape and stage."""
    import peers

    from ufm_fast.backends.triton_memory import plan_chunk

    _, N, K, d, stage, dtype = task
    chunk = plan_chunk(N, d, K, "bf16", free_bytes())
    found, missing = peers.contenders(MODES[dtype], d, chunk)
    million = (
        N,
        K,
        d,
    ) == MILLION  # a pass in float64 would take minutes, one of ours takes ten seconds
    if (
        million
    ):  # the question there is whether a step can be had; rivals are compared where they are quick
        found = {name: found[name] for name in (f"{peers.OURS} bf16", PRODUCTS)}
    elif (d <= 1024 or N * K <= 1 << 28) and dtype == BF16:  # where launches show
        found = {f"{peers.OURS} bf16, captured": peers.captured("bf16", chunk), **found}
    common = {**task._asdict(), "chunk_rows": chunk}
    for name, why in missing.items():
        yield {**common, "contender": name, "note": why}
    inputs = [data(N, K, d, STAGES[stage], dtype, DEVICE)]
    copies = 3 if 3 * (N + K) * d * dtype.itemsize < free_bytes() // 8 else 1
    inputs += [tuple(x.clone() for x in inputs[0]) for _ in range(copies - 1)]
    expected = reference(*inputs[0], sweep=not million)
    records: dict[str, dict] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for name, contender in found.items():
        record = {**common, "contender": name}
        try:
            result, record["peak_extra_bytes"] = with_peak(
                lambda contender=contender: contender(*inputs[0])
            )
        except (
            Exception
        ) as error:  # a rival that fails at a shape is a result, not the end of the run
            forget()
            yield {**record, "note": reason(error)}
            continue
        records[name] = record | ({} if name == PRODUCTS else errors(result, expected))
        del result
        if name.endswith("captured"):  # a graph for each set of inputs, before the clock runs
            for given in [*inputs, *inputs]:
                contender(*given)
        calls[name] = lambda index, contender=contender: contender(*inputs[index])
    times, failed = interleaved(calls, 4.0, 1 if million else most, copies, warm=million)
    for name, why in failed.items():
        yield records[name] | {"note": why}
    products = statistics.median(times[PRODUCTS]) if PRODUCTS in times else float("nan")
    for name, values in times.items():
        median = statistics.median(values)
        rate = {
            "tflops_6NKd": 6 * N * K * d / median / 1e9,
            "percent_of_products": 100 * products / median,
        }
        yield records[name] | spread(values) | rate


def error_rows(task: Task, most: int) -> Iterator[dict]:
    """Errors of every contender on one rung of the ladder, untimed; `left` is the mean 1 - p_y of
    its rows.
    """
    import peers

    from ufm_fast.backends.triton_memory import plan_chunk

    _, N, K, d, rung, dtype = task
    chunk = plan_chunk(N, d, K, "bf16", free_bytes())
    found, missing = peers.contenders(MODES[dtype], d, chunk)
    del found[PRODUCTS]  # whose values are no loss
    inputs = data(N, K, d, margin_of(rung, K, d), dtype, DEVICE)
    expected = reference(*inputs)
    common = {**task._asdict(), "chunk_rows": chunk, "left": float(-torch.expm1(-expected["loss"]))}
    for name, why in missing.items():
        yield {**common, "contender": name, "note": why}
    for name, contender in found.items():
        try:
            yield {**common, "contender": name, **errors(contender(*inputs), expected)}
        except (
            Exception
        ) as error:  # a rival that fails at a shape is a result, not the end of the run
            forget()
            yield {**common, "contender": name, "note": reason(error)}


def squared_floor(N: int, K: int, d: int, mode: str) -> float:
    """Milliseconds: bytes of parameters and gradients at the rate of a copy, or flops at the rates
    of library products.
    """
    from ufm_kernels.library import tensor_float32

    block = torch.randn(min(N, 1 << 18), d, device=DEVICE)
    moved = statistics.median([milliseconds(block.clone) for _ in range(7)]) / (2 * block.numel())
    dtype = BF16 if mode == "bf16x3" else FP32
    square, thin = torch.randn(d, d, device=DEVICE).to(dtype), block.to(dtype)
    with tensor_float32():
        product = statistics.median([milliseconds(lambda: thin @ square) for _ in range(7)])
    double = block[: 1 << 16].double()
    gram = (
        statistics.median([milliseconds(lambda: double.T @ double) for _ in range(7)]) / 2
    )  # the upper half
    flops = (N + K) * (3 * product / len(block) + gram / len(double))
    return max(flops, 2 * (N + K) * d * moved)


def squared_rows(task: Task, most: int) -> Iterator[dict]:
    """The squared error by Gram matrices, and densely in row chunks where that ends within
    reason.
    """
    from ufm_kernels.squared_head import squared_error_value_and_grad

    _, N, K, d, _, dtype = task
    features, weight, labels = data(N, K, d, 1.0, dtype, DEVICE)
    expected = squared_reference(features, weight, labels)

    def ours(mode: str) -> tuple[Tensor, Tensor, Tensor]:
        gradients = torch.zeros_like(features), torch.zeros_like(weight)
        value = squared_error_value_and_grad(
            features,
            weight,
            None,
            labels,
            None,
            1.0 / N,
            grad_features=gradients[0],
            grad_weight=gradients[1],
            mode=mode,
        )
        return value, *gradients

    def dense() -> tuple[Tensor, Tensor, Tensor]:
        value, grad_features, grad_weight = (
            torch.zeros((), device=DEVICE),
            torch.empty_like(features),
            torch.zeros_like(weight),
        )
        for part in torch.arange(N, device=DEVICE).split(4096):
            residual = features[part] @ weight.T
            residual[torch.arange(len(part), device=DEVICE), labels[part]] -= 1
            value += residual.square().sum() / (2 * N)
            grad_features[part] = residual @ weight / N
            grad_weight.addmm_(residual.T, features[part], alpha=1 / N)
        return value, grad_features, grad_weight

    calls: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
        f"ufm_kernels {mode}": lambda mode=mode: ours(mode) for mode in ("bf16x3", "tf32x3")
    }
    if N * K * d < 2e13:
        calls["torch dense chunked"] = dense
    records = {}
    for name, call in calls.items():
        try:
            result, peak = with_peak(call)
        except Exception as error:
            forget()
            yield {**task._asdict(), "contender": name, "note": reason(error)}
            continue
        records[name] = {
            **task._asdict(),
            "contender": name,
            "peak_extra_bytes": peak,
            **errors(result, expected),
        }
        del result  # gradients of gigabytes, which the next one needs
    timed = {name: (lambda _, call=calls[name]: call()) for name in records}
    times, failed = interleaved(timed, 3.0, most)
    for name, why in failed.items():
        yield records[name] | {"note": why}
    for name, values in times.items():
        record = records[name] | spread(values)
        if name.startswith("ufm_kernels"):
            record["floor_ms"] = squared_floor(N, K, d, name.split()[1])
            record["percent_of_floor"] = 100 * record["floor_ms"] / record["ms"]
        yield record


def device_tests() -> bool:
    """The value tests of kernels and backend, compiled for this device, against float64; in
    parallel where xdist is.
    """
    folders = [str(ROOT / "tests" / name) for name in ("kernels", "backends")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:benchmark",
        "-m",
        "interpreted",
        *folders,
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=480).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_record() -> dict[str, str]:
    """Device and versions beside machine, commit and date."""
    rivals = {
        name: version(name)
        for name in ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    }
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if CUDA else ""
    return {"device": "none: a rehearsal", **environment(), "capability": capability, **rivals}


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict], path: Path) -> None:
    """One long table: the union of the columns, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


#: Task -> its rows; the second argument is the most rounds.
ROWS: dict[str, Callable[[Task, int], Iterator[dict]]] = {
    "cross-entropy": head_rows,
    "errors": error_rows,
    "solve": lambda task, most: solve_rows(task),
    "squared error": squared_rows,
}


def survived(task: Task, most: int) -> Iterator[dict]:
    """The rows of a task; where it fails as a whole, what it had and a row that says why."""
    try:
        yield from ROWS[task.task](task, most)
    except Exception as error:
        yield {**task._asdict(), "note": reason(error)}


def run(
    tasks: list[Task],
    record: dict[str, str],
    table: Path,
    deadline: float,
    most: int,
    passed: bool = True,
) -> tuple[list[dict], list[Task]]:
    """(all rows of the table, tasks that were left). Rows of earlier commits and devices stay; a
    task's come together.
    """
    rows, left = read(table), []
    done = {
        tuple(row[name] for name in Task._fields)
        for row in rows
        if all(row[x] == record[x] for x in ("commit", "device"))
    }
    for task in tasks:
        if task.key in done:
            continue
        if time.monotonic() + task.estimate > deadline:
            left.append(task)
            continue
        found = []
        for row in survived(task, most):
            found.append(
                {
                    key: str(value) if isinstance(value, torch.dtype) else value
                    for key, value in row.items()
                }
                | record
            )
            print(
                {
                    key: f"{value:.3g}" if isinstance(value, float) else str(value)
                    for key, value in row.items()
                },
                flush=True,
            )
        rows += found
        write(rows, table)
        if (
            not usable()
        ):  # an illegal access ends the context: the table says so, and a new process does the rest
            begin_again(deadline, passed)
        forget()
    return rows, left


def begin_again(deadline: float, passed: bool) -> None:
    """This command anew in a process of its own place, with the time that is left and the verdict
    of the value tests.
    """
    left = "inf" if deadline == float("inf") else f"{(deadline - time.monotonic()) / 60:.3f}"
    command = [
        sys.executable,
        *sys.argv,
        "--skip-tests",
        "--minutes",
        left,
        *([] if passed else ["--tests-failed"]),
    ]
    print("the device is lost to this process; going on in a new one", flush=True)
    os.execv(sys.executable, command)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no task that would end later than this",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two small shapes, two stages, few rounds"
    )
    parser.add_argument("--skip-tests", action="store_true", help="time without the value tests")
    parser.add_argument(
        "--tests-failed", action="store_true", help=argparse.SUPPRESS
    )  # in the process that this one replaced
    chosen = arguments(parser, "gpu")
    deadline = time.monotonic() + 60 * chosen.minutes
    passed = not chosen.tests_failed and (chosen.skip_tests or chosen.rehearse or device_tests())
    table = chosen.out.with_suffix(".csv")
    few = 1 if chosen.rehearse else 3 if chosen.quick else 25
    rows, left = run(
        plan(chosen.quick, chosen.rehearse), device_record(), table, deadline, few, passed
    )
    draw(rows, chosen.out)
    print(*fused_or_library(rows), sep="\n")
    verdict = "passed" if passed else "FAILED"
    print(
        f"{len(rows)} rows in {table}; value tests {verdict}; {len(left)} tasks left for another "
        f"call"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
