"""Check every kernel against float64 on the device, then time the heads against their peers.

    python bench/gpu.py [--quick] [--out bench/results/gpu] [--skip-tests]

NOT YET RUN ON A DEVICE: written and checked on a machine without one (its CPU parts are exercised there). Treat the
first run as a test of this script, too.

Protocol: variants are interleaved launch by launch; medians with the 20th and 80th percentile; the same data for all
rivals, never zeros, at four stages of collapse; buffers rotate so that the L2 cache does not serve them. Reported are
TFLOP/s counting the logits and both gradients as 6 N K d, percent of the same run's library products, peak extra
bytes, and the errors of loss and gradients against float64. One long table (CSV) and two plots are written.
Exit status: 2 without CUDA, 1 if a check fails.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from common import environment
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

WIDTHS = (64, 128, 512, 1024, 4096)
SHAPES = [(n, n, d) for n in (16384, 65536, 262144) for d in WIDTHS] + [(8192, 256000, 2304), (4096, 128256, 4096)]
QUICK_SHAPES = [(4096, 4096, 64), (4096, 8192, 512)]
SQUARED = [(n, n, d) for n in (65536, 1048576) for d in (512, 2048)]
QUICK_SQUARED = [(8192, 8192, 256)]
# Nats by which the target leads the mean of the others: from initialisation to the terminal phase.
STAGES = {"start": 0.0, "learning": 8.0, "late": 20.0, "terminal": 45.0}
SAMPLED = 256  # rows and classes on which the float64 reference is evaluated


def data(
    N: int, K: int, d: int, margin: float, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(features, weight, labels), every feature near its class direction so that the target leads by about `margin`."""
    make = torch.Generator(device).manual_seed(seed)
    weight = torch.nn.functional.normalize(torch.randn(K, d, generator=make, device=device))
    labels = torch.randint(K, (N,), generator=make, device=device).sort().values
    features = torch.randn(N, d, generator=make, device=device).mul_(0.3)
    for part in torch.arange(N, device=device).split(65536):
        features[part] += margin * weight[labels[part]]
    return features.to(dtype), weight.to(dtype), labels


def row_block(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E, s, loss) of some rows in float64, by the off-target mass."""
    z = features.double() @ weight.double().T
    own = z.gather(1, labels[:, None])
    z.sub_(own).exp_().scatter_(1, labels[:, None], 0.0)
    mass = z.sum(1)
    return z, mass, torch.log1p(mass)


def reference(features: Tensor, weight: Tensor, labels: Tensor, block: int = 256) -> dict[str, Tensor]:
    """float64 mean loss, and both gradients on the sampled rows and classes."""
    N, K = len(features), len(weight)
    device = features.device
    rows = torch.linspace(0, N - 1, min(N, SAMPLED), device=device).long()
    classes = torch.linspace(0, K - 1, min(K, SAMPLED), device=device).long()
    total = torch.zeros((), dtype=torch.float64, device=device)
    grad_weight = torch.zeros(len(classes), features.shape[1], dtype=torch.float64, device=device)
    for part in torch.arange(N, device=device).split(block):
        E, mass, loss = row_block(features[part], weight, labels[part])
        total += loss.sum()
        chosen = E[:, classes] - mass[:, None] * (labels[part][:, None] == classes)
        grad_weight += (chosen / (1 + mass[:, None])).T @ features[part].double() / N
    E, mass, _ = row_block(features[rows], weight, labels[rows])
    grad_features = (E @ weight.double() - mass[:, None] * weight[labels[rows]].double()) / (1 + mass[:, None]) / N
    return {"loss": total / N, "rows": rows, "classes": classes, "grad_features": grad_features, "grad_weight": grad_weight}


def errors(found: tuple[Tensor, Tensor, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the loss, normwise of the gradients on the sample."""
    loss, grad_features, grad_weight = found

    def normwise(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    return {
        "loss_error": float((loss.double() - expected["loss"]).abs() / expected["loss"]),
        "grad_features_error": normwise(grad_features[expected["rows"]], expected["grad_features"]),
        "grad_weight_error": normwise(grad_weight[expected["classes"]], expected["grad_weight"]),
    }


def interleaved(calls: dict[str, Callable[[int], object]], rounds: int, buffers: int) -> dict[str, list[float]]:
    """Milliseconds of every call by CUDA events, one launch of each in turn, rotating through `buffers` inputs."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rotation = cycle(range(buffers))
    for call in calls.values():
        call(0)
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            index = next(rotation)
            torch.cuda.synchronize()
            start.record()
            call(index)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak allocation of one call above what was there before, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def chunk_for(K: int, free_bytes: int) -> int:
    """Rows of E that take at most a sixth of the free memory, between 1024 and 8192."""
    return int(max(1024, min(8192, free_bytes // 6 // (4 * K) // 1024 * 1024)))


def head_rows(shape: tuple[int, int, int], stage: str, modes: list[str], dtype: torch.dtype, rounds: int) -> Iterator[dict]:
    """Check and time every contender at one shape and stage."""
    import peers

    N, K, d = shape
    chunk = chunk_for(K, torch.cuda.mem_get_info()[0])
    found, missing = peers.contenders(modes, d, chunk)
    common = {"task": "cross-entropy", "N": N, "K": K, "d": d, "stage": stage, "dtype": str(dtype), "chunk_rows": chunk}
    for name, reason in missing.items():
        yield {**common, "contender": name, "note": reason}
    inputs = [data(N, K, d, STAGES[stage], dtype, "cuda")]
    copies = 3 if 3 * (N + K) * d * dtype.itemsize < torch.cuda.mem_get_info()[0] // 8 else 1
    inputs += [tuple(x.clone() for x in inputs[0]) for _ in range(copies - 1)]
    expected = reference(*inputs[0])
    records: dict[str, dict] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for name, contender in found.items():
        record = {**common, "contender": name}
        try:
            checked = errors(contender(*inputs[0]), expected) if name != peers.PRODUCTS else {}
            record |= checked | {"peak_extra_bytes": extra_bytes(lambda contender=contender: contender(*inputs[0]))}
        except Exception as error:  # a rival that fails at a shape is a result, not the end of the run
            torch.cuda.empty_cache()
            yield {**record, "note": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        records[name] = record
        calls[name] = lambda index, contender=contender: contender(*inputs[index])
    times = interleaved(calls, rounds, copies)
    products = statistics.median(times[peers.PRODUCTS]) if peers.PRODUCTS in times else float("nan")
    for name, values in times.items():
        median = statistics.median(values)
        yield records[name] | {
            "ms": median, "p20_ms": quantile(values, 0.2), "p80_ms": quantile(values, 0.8),
            "tflops_6NKd": 6 * N * K * d / median / 1e9, "percent_of_products": 100 * products / median,
        }  # fmt: skip


def squared_rows(shape: tuple[int, int, int], rounds: int) -> Iterator[dict]:
    """The squared error by Gram matrices, and densely in row chunks where that ends within reason."""
    from ufm_kernels.squared_head import squared_error_value_and_grad

    N, K, d = shape
    features, weight, labels = data(N, K, d, 1.0, torch.float32, "cuda")
    gradients = torch.zeros_like(features), torch.zeros_like(weight)

    def ours(_: int) -> Tensor:
        return squared_error_value_and_grad(
            features, weight, None, labels, None, 1.0 / N, grad_features=gradients[0], grad_weight=gradients[1]
        )

    def dense(_: int) -> Tensor:
        value = torch.zeros((), device="cuda")
        for part in torch.arange(N, device="cuda").split(4096):
            residual = features[part] @ weight.T
            residual[torch.arange(len(part), device="cuda"), labels[part]] -= 1
            value += residual.square().sum() / (2 * N)
            gradients[0][part] = residual @ weight / N
            gradients[1].addmm_(residual.T, features[part], alpha=1 / N)
        return value

    calls: dict[str, Callable[[int], object]] = {"ufm_kernels squared error": ours}
    if N * K * d < 2e13:
        calls["torch dense chunked"] = dense
    for name, values in interleaved(calls, rounds, 1).items():
        median = statistics.median(values)
        yield {
            "task": "squared error", "contender": name, "N": N, "K": K, "d": d, "dtype": "torch.float32", "ms": median,
            "p20_ms": quantile(values, 0.2), "p80_ms": quantile(values, 0.8), "tflops_8Nd2": 8 * N * d * d / median / 1e9,
        }  # fmt: skip


def device_tests() -> bool:
    """The value tests of the kernels, compiled for this device, each kernel against float64."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "kernels" / "test_interpreter.py")]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_record() -> dict[str, str]:
    """Device and versions beside machine, commit and date."""
    properties = torch.cuda.get_device_properties(0)
    rivals = {name: version(name) for name in ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")}
    return {**environment(), "device": properties.name, "capability": f"{properties.major}.{properties.minor}", **rivals}


def write(rows: list[dict], path: Path) -> None:
    """One long table: the union of the columns, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict], stem: Path) -> None:
    """Two plots: TFLOP/s against d with the library products as the roof, and time of each rival over ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row.get("task") == "cross-entropy" and "ms" in row]
    if not timed:
        return
    last = list(STAGES)[-1]
    largest = max(row["N"] for row in timed if row["N"] == row["K"]) if any(r["N"] == r["K"] for r in timed) else timed[0]["N"]
    figure, axes = plt.subplots()
    for name in dict.fromkeys(row["contender"] for row in timed):
        mine = sorted((row["d"], row["tflops_6NKd"]) for row in timed if row["contender"] == name and row["N"] == largest)
        if mine:
            axes.plot(*zip(*mine, strict=True), "--" if name == "library products" else "o-", label=name)
    axes.set(xscale="log", xlabel="feature width d", ylabel="TFLOP/s of 6 N K d", title=f"N = {largest}")
    axes.legend(fontsize=6)
    figure.savefig(f"{stem}_roofline.png", dpi=150, bbox_inches="tight")
    figure, axes = plt.subplots(figsize=(9, 4))
    shapes = list(dict.fromkeys((row["N"], row["K"], row["d"]) for row in timed))
    for name in dict.fromkeys(row["contender"] for row in timed):
        ratios = []
        for index, shape in enumerate(shapes):
            here = [row for row in timed if (row["N"], row["K"], row["d"]) == shape and row["stage"] in (last, "start")]
            own = [row["ms"] for row in here if row["contender"].startswith("ufm_kernels")]
            rival = [row["ms"] for row in here if row["contender"] == name]
            if own and rival:
                ratios.append((index, min(rival) / min(own)))
        if ratios and not name.startswith("ufm_kernels"):
            axes.plot(*zip(*ratios, strict=True), "o", label=name)
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_xticks(range(len(shapes)), [f"{n}\n{k}\n{d}" for n, k, d in shapes], fontsize=6)
    axes.set(yscale="log", ylabel="time over our best", xlabel="N, K, d")
    axes.legend(fontsize=6)
    figure.savefig(f"{stem}_ratio.png", dpi=150, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, two stages, few rounds")
    parser.add_argument("--skip-tests", action="store_true", help="time without the value tests")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="stem of the CSV and plots")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 2
    passed = chosen.skip_tests or device_tests()
    rounds = 5 if chosen.quick else 25
    stages = ["start", "terminal"] if chosen.quick else list(STAGES)
    record, rows = device_record(), []

    def keep(row: dict) -> None:
        rows.append(row | record)
        print({key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        write(rows, chosen.out.with_suffix(".csv"))  # a run that is cut short keeps what it has

    for shape in QUICK_SHAPES if chosen.quick else SHAPES:
        for stage in stages:
            for modes, dtype in ((["bf16"], torch.bfloat16), (["tf32", "bf16x3", "fp16x3", "tf32x3"], torch.float32)):
                if dtype == torch.float32 and (shape[0] > 65536 or stage in ("learning", "late")):
                    continue  # the fp32 modes scale as bf16 does; two stages show their digits
                for row in head_rows(shape, stage, modes, dtype, rounds):
                    keep(row)
                torch.cuda.empty_cache()
    for shape in QUICK_SQUARED if chosen.quick else SQUARED:
        for row in squared_rows(shape, rounds):
            keep(row)
        torch.cuda.empty_cache()
    plot(rows, chosen.out)
    print(f"{len(rows)} rows in {chosen.out.with_suffix('.csv')}; value tests {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
