"""Ranks against one process: peak memory, bytes and seconds of an evaluation; and what many GPUs
would take, computed.

    python -m bench sharded [--out TABLE]     # two ranks of one thread, one process of two
    python -m bench sharded --computed        # the table of docs/howto/distributed.md

Cross-entropy, float32. Each contender is a process of its own; its memory is the peak above what
importing took. The bytes that ranks count are compared with `backends.cost`. Computed times take
the rates below as given: nothing was run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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
_ROUNDS = 3


def worker(rank: int, ranks: int, store: str, sizes: dict[str, int]) -> dict[str, Any]:
    """One process: seconds of each evaluation, its peak memory above importing, and the bytes it
    sent.
    """
    import torch

    from ufm_fast import Problem
    from ufm_fast.backends import ShardedBackend, TiledBackend
    from ufm_fast.layout import Mesh
    from ufm_fast.objective import Objective
    from ufm_fast.starts import make_start

    torch.set_num_threads(2 // ranks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backend: Any = TiledBackend()
    if ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
        )
        backend = ShardedBackend(Mesh.of_world())
    problem = Problem(
        classes=sizes["classes"],
        dim=sizes["dim"],
        per_class=1,
        dtype="float32",
        lambda_w=1e-6,
        lambda_h=1e-6,
    )
    objective = Objective(problem, backend=backend)
    x = make_start(objective, "normal")
    seconds, sent, height = [], {}, 0
    for _ in range(_ROUNDS + 1):
        if ranks > 1:
            backend.mesh.traffic.clear()
        begun = time.perf_counter()
        objective.value_and_grad(x)
        seconds.append(time.perf_counter() - begun)
    if ranks > 1:
        sent, height = dict(backend.mesh.traffic), next(iter(backend.heads[0][1].heights.values()))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "peak_mib": peak,
        "seconds": sorted(seconds[1:])[_ROUNDS // 2],
        "sent": sent,
        "height": height,
    }


def run(ranks: int, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """The results of all ranks."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join((str(root), str(root / "kernels")))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--worker",
            json.dumps([ranks, f"{folder}/store", sizes]),
        ]
        started = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]
        return [json.loads(process.communicate()[0]) for process in started]


def measured(sizes: dict[str, int], out: Path | None) -> None:
    from ufm_fast.backends.cost import Cost

    [one], many = run(1, sizes), run(2, sizes)
    cost = Cost(**sizes, mesh=(2, 1), chunk=many[0]["height"]).sent()
    for name, found in (("one process", one), ("rank 0 of 2", many[0]), ("rank 1 of 2", many[1])):
        sent = {kind: number for kind, number in found["sent"].items() if kind in cost}
        equal = sent == {kind: number for kind, number in cost.items() if number} if sent else ""
        record = Record(
            sizes,
            {
                "peak_mib": round(found["peak_mib"], 1),
                "seconds": round(found["seconds"], 3),
                "memory_ratio": round(found["peak_mib"] / one["peak_mib"], 3),
                "time_ratio": round(found["seconds"] / one["seconds"], 3),
                "sent_mib": round(sum(sent.values()) / 2**20, 2),
                "as_computed": equal,
            },
            name,
        )
        print(name, record.measured)
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
