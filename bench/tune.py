"""Time candidate tiles of the N x K kernels on the device: what the table in `ufm_kernels.tiles`
should say.

    python bench/tune.py [--minutes 9] [--kernels off_target,product,transposed] [--widths
    512,1024,4096] [--out STEM]
    python bench/tune.py --rehearse           on a CPU, under triton's interpreter: no figures

One chunk of 8192 rows against 65,536 classes in bfloat16. Candidates that cannot fit the registers
or the shared memory are left out, the rest are compiled by processes side by side, each is timed
once, and the best five are timed again, interleaved with the table's own tile. A candidate whose
result differs from the table's is an error.
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
from device import CUDA, DEVICE, arguments, interleaved, milliseconds
from measure import environment
from table import Record, add, lines

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from ufm_kernels.tiles import SHARED_MEMORY, Tile

if TYPE_CHECKING:  # what imports triton waits for the interpreter to be asked for
    from ufm_kernels.launch import Launch

KERNELS = ("off_target", "product", "transposed", "forward", "weight", "gram")
# Of the one-pass kernels, which hold whole rows of features, and of Gram matrices in float64.
WIDTHS = {"forward": (64, 128), "weight": (64, 128), "gram": (512, 2048)}
SHAPE, TINY = (
    (8192, 65536),
    (64, 256),
)  # rows of a chunk and classes; what the compiling processes launch
LIMIT = SHARED_MEMORY[90]  # bytes a block


def candidates(kernel: str) -> list[Tile]:
    """What the device can hold, as many programs a multiprocessor as their registers and shared
    memory allow.
    """
    found = []
    if kernel in ("forward", "weight"):
        for rows, columns, stages in itertools.product((64, 128), (32, 64, 128), (1, 2, 3)):
            found.append(Tile(rows, columns, 0, rows // 16, stages))
        return found
    if kernel == "gram":
        for (rows, columns), depth, warps in itertools.product(
            ((64, 64), (128, 64), (64, 128), (128, 128)), (16, 32), (4, 8)
        ):
            found += [
                Tile(rows, columns, depth, warps, n)
                for n in (2, 3, 4)
                if rows * columns <= 2048 * warps
            ]
        return found
    off = kernel == "off_target"
    blocks = ((64, 256, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
    for (rows, columns, warps), stages in itertools.product(
        blocks if off else blocks[3:], (2, 3, 4)
    ):
        for flatten, group in itertools.product((True,) if off else (False, True), (8, 16)):
            shared = stages * (rows + columns) * 128 + (rows * columns if off else 0)
            programs = 2 if warps == 4 and 2 * shared <= LIMIT - 2048 else 1
            if LIMIT // 2.8 <= programs * shared <= LIMIT - 1024:
                found.append(
                    Tile(
                        rows,
                        columns,
                        64,
                        warps,
                        stages,
                        True,
                        group,
                        programs,
                        flatten,
                        split=2 if off else 1,
                    )
                )
    return found


def name_of(tile: Tile) -> str:
    return " ".join(str(int(x)) for x in tile)


class Case:
    """The operands of one chunk, and a kernel's call on them with any launch."""

    def __init__(self, kernel: str, shape: tuple[int, int], d: int, device: str = DEVICE) -> None:
        from ufm_kernels.operands import MODES, empty_chunk

        make = torch.Generator(device).manual_seed(0)
        (C, K), self.kernel, self.classes = shape, kernel, shape[1]
        if kernel == "gram":
            self.X, self.narrow, self.flops = (
                torch.randn(K, d, generator=make, device=device),
                True,
                1.0 * K * d * d,
            )
            return
        self.H, self.W = (
            torch.randn(n, d, generator=make, device=device).mul_(d**-0.25).bfloat16()
            for n in (C, K)
        )
        self.labels = torch.randint(K, (C, 1), generator=make, device=device, dtype=torch.int32)
        self.offset, self.factor = (
            torch.zeros(C, device=device),
            torch.rand(C, generator=make, device=device),
        )
        self.narrow = kernel in ("forward", "weight")
        self.flops = (4.0 if self.narrow else 2.0) * C * K * d
        if self.narrow:
            return
        self.E = empty_chunk(C, K, MODES["bf16"], torch.device(device))
        if kernel != "off_target":
            self.E.copy_(torch.rand(self.E.shape, generator=make, device=device))
        self.out = torch.zeros(K if kernel == "transposed" else C, d, device=device)

    def call(self, launch: Launch) -> torch.Tensor:
        """One launch; returns what the kernel wrote."""
        from ufm_kernels.off_target import off_target
        from ufm_kernels.one_pass import forward, transposed
        from ufm_kernels.products import add_product
        from ufm_kernels.squared_error import gram

        if self.kernel == "gram":
            return gram(self.X, launch=launch)
        common = (
            self.H,
            self.W,
            self.W if self.kernel == "forward" else self.H,
            None,
            self.offset,
            self.labels,
        )
        if self.kernel == "forward":
            return forward(*common, passes=1, launch=launch)[1].sum(0)
        if self.kernel == "weight":
            return transposed(*common, self.factor, passes=1, launch=launch)[0]
        if self.kernel == "off_target":
            off_target(
                self.H,
                self.W,
                None,
                self.offset,
                self.labels,
                self.E,
                passes=1,
                classes=self.classes,
                launch=launch,
            )
            return self.E
        if self.kernel == "transposed":
            add_product(
                self.out,
                self.E,
                self.H,
                passes=1,
                depth=len(self.H),
                transposed=True,
                launch=launch,
            )
        else:
            add_product(
                self.out,
                self.E,
                self.W,
                passes=1,
                depth=self.classes,
                factor=self.factor,
                coefficient=self.factor[:, None],
                labels=self.labels,
                points=self.W,
                launch=launch,
            )
        return self.out

    def library(self) -> torch.Tensor:
        """The same product by the library: bare logits, or a gradient with its epilogue."""
        from ufm_kernels.library import library_product
        from ufm_kernels.products import add_finished
        from ufm_kernels.squared_error import library_gram

        if self.kernel == "gram":
            return library_gram(self.X)
        if self.kernel == "off_target":
            return torch.mm(self.H, self.W.T)
        if self.kernel == "transposed":
            return library_product(self.E[:, : self.classes].T, self.H, self.out)
        product = library_product(self.E[:, : self.classes], self.W)
        add_finished(self.out, product, self.factor, self.factor[:, None], self.labels, self.W)
        return self.out

    def result(self, launch: Launch) -> torch.Tensor:
        if not self.narrow:
            (
                self.E if self.kernel == "off_target" else self.out
            ).zero_()  # what a launch leaves out must show
        return self.call(launch).float().clone()


def launch_of(tile: Tile) -> Launch:
    from ufm_kernels.launch import Launch

    processors = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else 2
    return Launch(tile, tile.programs * processors if tile.tma else 0)


def compile_one(kernel: str, tile: Tile, width: int = 128) -> str:
    """In a process of its own: compile into triton's cache. Returns the reason where that fails."""
    try:
        Case(kernel, TINY, width).call(launch_of(tile))
        if CUDA:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-2 * float(b.norm())


def tune(kernel: str, d: int, tiles: list[Tile], shape: tuple[int, int]) -> list[dict[str, object]]:
    """Rows of the table: every tile once, then the best five and the present one again, side by
    side.
    """
    from ufm_kernels.launch import Launch
    from ufm_kernels.off_target import kernel_name

    case = Case(kernel, shape, d)
    table = {
        "off_target": kernel_name(1, 1, 2, d, False),
        "forward": "one_pass",
        "weight": "one_pass_weight",
    }
    present = Launch.of(table.get(kernel, kernel), case.X if kernel == "gram" else case.H)
    wanted = case.result(present)
    common = {"kernel": kernel, "rows": shape[0], "classes": shape[1], "d": d}
    rows, good = [], {}
    for tile in tiles:
        row = {**common, "tile": name_of(tile)}
        try:
            right = close(case.result(launch_of(tile)), wanted)
            taken = statistics.median(
                [milliseconds(lambda tile=tile: case.call(launch_of(tile))) for _ in range(3)]
            )
        except Exception as error:
            rows.append({**row, "note": f"{type(error).__name__}: {str(error)[:120]}"})
            continue
        rows.append(
            {
                **row,
                "ms": taken,
                "tflops": case.flops / taken / 1e9,
                "note": "" if right else "WRONG",
            }
        )
        if right:
            good[tile] = taken
    best = sorted(good, key=good.__getitem__)[:5]
    calls: dict[str, Callable[[int], object]] = {
        "present": lambda _: case.call(present),
        "library": lambda _: case.library(),
    }
    if kernel in ("forward", "weight"):
        del calls["library"]
    calls |= {name_of(tile): (lambda _, tile=tile: case.call(launch_of(tile))) for tile in best}
    times, _ = interleaved(calls, 1.0, 25)
    now = statistics.median(times["present"]) if "present" in times else float("nan")
    for name, values in times.items():
        median = statistics.median(values)
        rate = {"ms": median, "tflops": case.flops / median / 1e9, "over_present": now / median}
        rows.append({**common, "tile": name, **rate, "note": "final"})
    return rows


def save(rows: list[dict[str, object]], path: Path) -> None:
    """Add these rows to a long table."""
    case, where = ("kernel", "rows", "classes", "d"), environment()
    for row in rows:
        figures = {name: row[name] for name in ("ms", "tflops", "over_present") if name in row}
        named = {name: row[name] for name in case if name in row}
        record = Record(named, figures, str(row["tile"]), str(row.get("note", "")))
        add(path, lines("tune", record, where))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no kernel and width after this"
    )
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--widths", default="512,1024,4096")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 4), help="compiling processes"
    )
    chosen = arguments(parser, "tiles")
    began, rows = time.monotonic(), []
    kernels = chosen.kernels.split(",")
    tiles = {
        kernel: candidates(kernel)[:2] if chosen.rehearse else candidates(kernel)
        for kernel in kernels
    }
    widths = [40] if chosen.rehearse else [int(x) for x in chosen.widths.split(",")]
    if not chosen.rehearse:
        builds = [
            (kernel, tile, width)
            for kernel in kernels
            for tile in tiles[kernel]
            for width in WIDTHS.get(kernel, (128,))
        ]
        with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
            reasons = list(pool.map(compile_one, *zip(*builds, strict=True)))
        for (kernel, tile, width), why in zip(builds, reasons, strict=True):
            if why:
                rows.append({"kernel": kernel, "d": width, "tile": name_of(tile), "note": why})
                tiles[kernel] = [x for x in tiles[kernel] if x != tile]
        print(
            f"{len(builds)} builds in {time.monotonic() - began:.0f} s, {len(rows)} failed",
            flush=True,
        )
        save(rows, chosen.out.with_suffix(".csv"))
    for kernel in kernels:
        for d in widths if chosen.rehearse else WIDTHS.get(kernel, widths):
            if time.monotonic() - began > 60 * chosen.minutes:
                print(f"no time left for {kernel} at d = {d}")
                continue
            found = tune(kernel, d, tiles[kernel], TINY if chosen.rehearse else SHAPE)
            rows += found
            for row in found:
                if row["note"] == "final":
                    rate, ratio = (
                        f"{row['tflops']:.3g} TFLOP/s",
                        f"{row['over_present']:.3f}x the table's",
                    )
                    print(f"{kernel} d={d} tile {row['tile']}: {rate}, {ratio}", flush=True)
            save(found, chosen.out.with_suffix(".csv"))
    return 1 if any(row["note"] == "WRONG" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
