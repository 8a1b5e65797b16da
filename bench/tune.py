"""Time candidate tiles of the N x K kernels on the device: what the table in `ufm_kernels.tiles` should say.

    python bench/tune.py [--minutes 9] [--kernels off_target,product,transposed] [--widths 512,1024,4096] [--out STEM]
    python bench/tune.py --rehearse           on a CPU, under triton's interpreter: no figures

NOT YET RUN ON A DEVICE. One chunk of 4096 rows against 65,536 classes in bfloat16. Candidates that cannot fit the registers or
the shared memory are left out, the rest are compiled by processes side by side, each is timed once, and the best five are
timed again, interleaved with the table's own tile. A candidate whose result differs from the table's is an error.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import write_csv
from device import CUDA, DEVICE, interleaved, milliseconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from ufm_kernels.tiles import SHARED_MEMORY, Tile

if TYPE_CHECKING:  # what imports triton waits for the interpreter to be asked for
    from ufm_kernels.launch import Launch

KERNELS = ("off_target", "product", "transposed")
SHAPE, TINY = (4096, 65536), (64, 256)  # rows of a chunk and classes; what the compiling processes launch
LIMIT, REGISTERS = SHARED_MEMORY[90], 128  # bytes a block; accumulator numbers a thread


def candidates() -> list[Tile]:
    """What the device can hold, two programs a multiprocessor where their shared memory fits."""
    found = []
    blocks = ((64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128))
    for (rows, columns), depth, warps, stages in itertools.product(blocks, (32, 64, 128), (4, 8), (2, 3, 4, 5)):
        shared = stages * (rows + columns) * depth * 2
        if LIMIT // 4 <= shared <= LIMIT and rows * columns <= 32 * warps * REGISTERS:
            tile = Tile(rows, columns, depth, warps, stages, tma=True)
            found += [tile, tile._replace(programs=2)] if 2 * shared <= LIMIT else [tile]
    return found


def name_of(tile: Tile) -> str:
    return " ".join(str(int(x)) for x in tile)


class Case:
    """The operands of one chunk, and a kernel's call on them with any launch."""

    def __init__(self, kernel: str, shape: tuple[int, int], d: int, device: str = DEVICE) -> None:
        from ufm_kernels.operands import MODES, empty_chunk

        make = torch.Generator(device).manual_seed(0)
        (C, K), self.kernel, self.classes = shape, kernel, shape[1]
        self.H, self.W = (torch.randn(n, d, generator=make, device=device).mul_(d**-0.25).bfloat16() for n in (C, K))
        self.labels = torch.randint(K, (C, 1), generator=make, device=device, dtype=torch.int32)
        self.offset, self.factor = torch.zeros(C, device=device), torch.rand(C, generator=make, device=device)
        self.E = empty_chunk(C, K, MODES["bf16"], torch.device(device))
        if kernel != "off_target":
            self.E.copy_(torch.rand(self.E.shape, generator=make, device=device))
        self.out = torch.zeros(K if kernel == "transposed" else C, d, device=device)
        self.flops = 2.0 * C * K * d

    def call(self, launch: Launch) -> torch.Tensor:
        """One launch; returns what the kernel wrote."""
        from ufm_kernels.off_target import off_target
        from ufm_kernels.products import add_product

        if self.kernel == "off_target":
            off_target(self.H, self.W, None, self.offset, self.labels, self.E, passes=1, classes=self.classes, launch=launch)
            return self.E
        if self.kernel == "transposed":
            add_product(self.out, self.E, self.H, passes=1, depth=len(self.H), transposed=True, launch=launch)
        else:
            add_product(
                self.out, self.E, self.W, passes=1, depth=self.classes, factor=self.factor,
                coefficient=self.factor[:, None], labels=self.labels, points=self.W, launch=launch,
            )  # fmt: skip
        return self.out

    def result(self, launch: Launch) -> torch.Tensor:
        self.out.zero_()
        return self.call(launch).float().clone()


def launch_of(tile: Tile) -> Launch:
    from ufm_kernels.launch import Launch

    processors = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else 2
    return Launch(tile, tile.programs * processors)


def compile_one(kernel: str, tile: Tile) -> str:
    """In a process of its own: compile into triton's cache. Returns the reason where that fails."""
    try:
        Case(kernel, TINY, 128).call(launch_of(tile))
        if CUDA:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-2 * float(b.norm())


def tune(kernel: str, d: int, tiles: list[Tile], shape: tuple[int, int]) -> list[dict[str, object]]:
    """Rows of the table: every tile once, then the best five and the present one again, side by side."""
    from ufm_kernels.launch import Launch

    case = Case(kernel, shape, d)
    present = Launch.of(kernel, case.H)
    wanted = case.result(present)
    common = {"kernel": kernel, "rows": shape[0], "classes": shape[1], "d": d}
    rows, good = [], {}
    for tile in tiles:
        row = {**common, "tile": name_of(tile)}
        try:
            right = close(case.result(launch_of(tile)), wanted)
            taken = statistics.median([milliseconds(lambda tile=tile: case.call(launch_of(tile))) for _ in range(5)])
        except Exception as error:
            rows.append({**row, "note": f"{type(error).__name__}: {str(error)[:120]}"})
            continue
        rows.append({**row, "ms": taken, "tflops": case.flops / taken / 1e9, "note": "" if right else "WRONG"})
        if right:
            good[tile] = taken
    best = sorted(good, key=good.__getitem__)[:5]
    calls: dict[str, Callable[[int], object]] = {"present": lambda _: case.call(present)}
    calls |= {name_of(tile): (lambda _, tile=tile: case.call(launch_of(tile))) for tile in best}
    times, _ = interleaved(calls, 3.0, 25)
    now = statistics.median(times["present"]) if "present" in times else float("nan")
    for name, values in times.items():
        median = statistics.median(values)
        rate = {"ms": median, "tflops": case.flops / median / 1e9, "over_present": now / median}
        rows.append({**common, "tile": name, **rate, "note": "final"})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no kernel and width after this")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--widths", default="512,1024,4096")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 4), help="compiling processes")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes under the interpreter, without CUDA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tiles")
    chosen = parser.parse_args()
    if chosen.rehearse == CUDA:
        print("bench/tune.py needs a CUDA device of capability 9.0 or newer; --rehearse is for a CPU.", file=sys.stderr)
        return 2
    if chosen.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    began, rows = time.monotonic(), []
    tiles = candidates()[:2] if chosen.rehearse else candidates()
    widths = [40] if chosen.rehearse else [int(x) for x in chosen.widths.split(",")]
    for kernel in chosen.kernels.split(","):
        fit = tiles
        if not chosen.rehearse:
            builds = [tile for tile in tiles if tile.programs == 1]  # the number of programs is not compiled in
            with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
                reasons = dict(zip(builds, pool.map(compile_one, [kernel] * len(builds), builds), strict=True))
            rows += [{"kernel": kernel, "tile": name_of(tile), "note": why} for tile, why in reasons.items() if why]
            fit = [tile for tile in tiles if not reasons[tile._replace(programs=1)]]
        for d in widths:
            if time.monotonic() - began > 60 * chosen.minutes:
                print(f"no time left for {kernel} at d = {d}")
                continue
            rows += tune(kernel, d, fit, TINY if chosen.rehearse else SHAPE)
            for row in rows:
                if row["note"] == "final" and row["kernel"] == kernel and row["d"] == d:
                    rate, ratio = f"{row['tflops']:.3g} TFLOP/s", f"{row['over_present']:.3f}x the table's"
                    print(f"{kernel} d={d} tile {row['tile']}: {rate}, {ratio}")
            write_csv(chosen.out.with_suffix(".csv"), rows)
    return 1 if any(row["note"] == "WRONG" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
