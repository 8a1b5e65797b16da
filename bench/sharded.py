"""Ranks against one process: peak memory, bytes and seconds of an evaluation; and what many GPUs
would take, computed.

    python -m bench sharded [--out TABLE]     # two ranks of one thread, one process of two
    python -m bench sharded --computed        # the table of docs/howto/distributed.md

Cross-entropy, float32. Each contender is a process of its own. Its memory is the peak above what
importing took, with a C library that hands back what is freed (MALLOC_MMAP_THRESHOLD_; Linux): then
it is what is held, and no matter of chance. Its seconds are of other processes, without that; the
two sorts take turns, and a ratio is the median over turns. The bytes that ranks count are compared
with `backends.cost`. Computed times take the rates below as given: nothing was run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measure import environment
from table import Record, add, lines

SIZES = {"classes": 20_000, "rows": 20_000, "dim": 128}
#: Of one H200, as given: products in bfloat16 (bench/results/nvidia-h200.csv has 585
#: TFLOP/s at d = 512), NVLink and network.
FLOPS, NEAR, FAR = 5.0e14, 4.0e11, 5.0e10
_ROUNDS, _TURNS = 3, 3


def worker(rank: int, ranks: int, store: str, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """One process: the median seconds of an evaluation after the first, its peak memory above
    importing, and the bytes it sent.
    """
    import torch

    from ufm_fast import Problem
    from ufm_fast.backends import ShardedBackend, TiledBackend
    from ufm_fast.layout import Mesh
    from ufm_fast.memory import begin_peak, peak_memory
    from ufm_fast.objective import Objective
    from ufm_fast.starts import make_start

    torch.set_num_threads(2 // ranks)
    cpu = torch.device("cpu")
    before = begin_peak(cpu)
    backend: Any = TiledBackend()
    if ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
        )
        backend = ShardedBackend(Mesh.of_world())
    penalties = {"lambda_w": 1e-6, "lambda_h": 1e-6}
    number, dim = sizes["classes"], sizes["dim"]
    problem = Problem(classes=number, dim=dim, per_class=1, dtype="float32", **penalties)
    objective = Objective(problem, backend=backend)
    x = make_start(objective, "normal")
    seconds, sent, height = [], {}, 0
    for _ in range(rounds + 1):
        if ranks > 1:
            backend.mesh.traffic.clear()
        begun = time.perf_counter()
        objective.value_and_grad(x)
        seconds.append(time.perf_counter() - begun)
    if ranks > 1:
        sent, height = dict(backend.mesh.traffic), next(iter(backend.heads[0][1].heights.values()))
    peak = peak_memory(cpu, before)["peak_extra_bytes"] / 2**20
    median = statistics.median(seconds[1:])
    return {"peak_mib": peak, "seconds": median, "sent": sent, "height": height}


def run(
    ranks: int, sizes: dict[str, int], rounds: int, extra: dict[str, str]
) -> list[dict[str, Any]]:
    """The results of all ranks; ``extra``: of their environment."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join((str(root), str(root / "kernels")))
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([ranks, f"{folder}/store", sizes, rounds])
        command = [sys.executable, __file__, "--worker", given]
        started = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env={**os.environ, **extra, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]
        return [json.loads(process.communicate()[0]) for process in started]


def measured(sizes: dict[str, int], out: Path | None) -> None:
    from ufm_fast.backends.cost import Cost
    from ufm_fast.benchmark.measuring import ENVIRONMENT

    held = [*run(1, sizes, 1, ENVIRONMENT), *run(2, sizes, 1, ENVIRONMENT)]
    turns = [[*run(1, sizes, _ROUNDS, {}), *run(2, sizes, _ROUNDS, {})] for _ in range(_TURNS)]
    cost = Cost(**sizes, mesh=(2, 1), chunk=held[1]["height"]).sent()
    for i, name in enumerate(("one process", "rank 0 of 2", "rank 1 of 2")):
        sent = {kind: number for kind, number in held[i]["sent"].items() if kind in cost}
        equal = sent == {kind: number for kind, number in cost.items() if number} if sent else ""
        ratios = [turn[i]["seconds"] / turn[0]["seconds"] for turn in turns]
        record = Record(
            sizes,
            {
                "peak_mib": round(held[i]["peak_mib"], 1),
                "seconds": round(statistics.median(turn[i]["seconds"] for turn in turns), 3),
                "memory_ratio": round(held[i]["peak_mib"] / held[0]["peak_mib"], 3),
                "time_ratio": round(statistics.median(ratios), 3),
                "sent_mib": round(sum(sent.values()) / 2**20, 2),
                "as_computed": equal,
            },
            name,
        )
        print(name, record.measured, flush=True)
        if out is not None:
            add(out, lines("sharded", record, environment()))


def computed(dim: int) -> None:
    """A table in Markdown: K = N, float32 parameters, bfloat16 products."""
    from ufm_fast.backends.cost import Cost, best_mesh

    print(
        "| K = N | GPUs | mesh | W, H and L-BFGS, GB a GPU | sent, GB a GPU | products, s | "
        "sending, s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for K in (10**6, 10**7, 10**8):
        for ranks in (8, 64, 1024):
            mesh = best_mesh(K, K, dim, ranks)
            cost = Cost(K, K, dim, mesh, 512)
            products, sending = cost.seconds(FLOPS, NEAR if ranks <= 8 else FAR)
            held = 2 * K * dim * 4 * 24 / ranks / 1e9
            sent = sum(cost.sent().values()) / 1e9
            print(
                f"| {K:.0e} | {ranks} | {mesh[0]}x{mesh[1]} | {held:.3g} | {sent:.3g} | "
                f"{products:.3g} | {sending:.3g} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--dim", type=int, default=512, help="of the computed table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.rank, *json.loads(args.worker))))
    elif args.computed:
        computed(args.dim)
    else:
        measured(SIZES, args.out)


if __name__ == "__main__":
    main()
