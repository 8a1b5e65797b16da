"""Build every kernel and tile ahead of time, without a GPU, and inspect the machine code.

    python -m ufm_kernels.compile_gate [--json] [--only TEXT] [--architecture 90] [--processes 2]

For each build: no spills, shared memory within the device's limit (the compiler itself does not check it), the
architecture's tensor-core instructions where there is a dot (mma.sync, wgmma, tcgen05), TMA loads where the tile asks
for them, and sums of products of pairs that round to nearest. One line a build, a summary, exit status 1 if any build
fails. It needs triton only, not torch.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from .off_target import DEEP, kernel_name
from .products import kernel_name as product_name
from .tiles import SHARED_MEMORY, Tile, tile_for

TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Build:
    """One kernel with one set of types and constants. `types` maps runtime arguments to triton type strings."""

    name: str
    kernel: str
    architecture: int
    tile: Tile
    types: dict[str, str]
    constants: dict[str, object]
    tensor_core: str = ""
    aligned: tuple[str, ...] = field(
        default=("depth", "columns", "width", "span", "stride", "stride_a", "stride_b", "stride_points")
    )


def described(element: str, tile: Tile, block: tuple[int, int]) -> str:
    """The type of a matrix argument: a descriptor with its block, or a pointer."""
    return f"tensordesc<{element}[{block[0]}, {block[1]}]>" if tile.tma else f"*{element}"


def blocks(tile: Tile) -> dict[str, object]:
    """The constants of a tiled kernel."""
    return {
        "TMA": tile.tma, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": tile.group,
    }  # fmt: skip


# Mode -> operand of the logits, element of E and of its products, passes.
MODES = {
    "bf16": ("bf16", "bf16", 1),
    "fp16": ("fp16", "fp32", 1),
    "tf32": ("fp32", "fp32", 1),
    "bf16x3": ("bf16", "bf16", 3),
    "fp16x3": ("fp16", "bf16", 3),
    "tf32x3": ("fp32", "fp32", 3),
}


def tile_of(kernel: str, element: str, architecture: int, passes: int = 1) -> Tile:
    return tile_for(kernel, 32 if element == "fp32" else 16, architecture, passes)


def off_target_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, stored, passes) in MODES.items():
        for targets, bias, flag, deep in ((1, True, False, False), (1, False, True, True), (32, True, False, False)):
            kernel = kernel_name(passes, targets, 4 if stored == "fp32" else 2, DEEP if deep else 64)
            tile = tile_of(kernel, operand, architecture, passes)
            types = {
                "H": described(operand, tile, (tile.rows, tile.depth)),
                "W": described(operand, tile, (tile.columns, tile.depth)),
                "bias": "*fp32", "offset": "*fp32", "labels": "*i32", "flag": "*i32",
                "E": described(stored, tile, (tile.rows, tile.columns // (1 + tile.split))), "statistics": "*fp32",
                "rows": "i32", "classes": "i32", "depth": "i32", "stride": "i32",
            }  # fmt: skip
            constants = {
                "TARGETS": targets, "BIAS": bias, "FLAG": flag, "SINGLE": stored == "fp32", "PASSES": passes,
                "FLATTEN": tile.flatten, "SPLIT": tile.split, **blocks(tile),
            }  # fmt: skip
            name = f"off_target/{mode}/targets={targets}{'/bias' if bias else ''}{'/flag' if flag else ''}"
            yield Build(name, "off_target.off_target_kernel", architecture, tile, types, constants, TENSOR_CORE[architecture])


def product_builds(architecture: int) -> Iterator[Build]:
    for mode, (_, stored, passes) in MODES.items():
        if mode in ("fp16", "fp16x3"):  # their products are those of tf32 and of bf16x3
            continue
        usual = stored != "fp32"
        for transposed, targets, step, down in (
            (False, 1, False, usual), (False, 32, False, usual), (False, 0, False, usual), (False, 0, False, False),
            (True, 0, False, usual), (False, 1, True, usual), (False, 32, True, usual), (True, 0, True, usual),
        ):  # fmt: skip
            tile = tile_of(product_name(transposed, targets, step), stored, architecture, passes)
            left = (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth)
            right = (tile.depth, tile.columns) if down else (tile.columns, tile.depth)
            types = {
                "A": described(stored, tile, left), "B": described(stored, tile, right),
                "out": "*fp32", "factor": "*fp32", "coefficient": "*fp32", "labels": "*i32", "points": f"*{stored}",
                "current": "*fp32", "velocity": "*fp32", "updated": "*fp32", "settings": "*fp32",
                "rows": "i32", "columns": "i32", "classes": "i32", "depth": "i32", "stride_a": "i32", "stride_b": "i32",
                "stride_points": "i32",
            }  # fmt: skip
            constants = {
                "TRANSPOSED": transposed, "DOWN": down, "FACTOR": targets > 0, "TARGETS": targets, "PASSES": passes,
                "PAIRS": passes == 3, "STEP": step,
                "FLATTEN": tile.flatten, **blocks(tile),
            }  # fmt: skip
            kind = "transposed" if transposed else f"targets={targets}"
            name = f"product/{mode}/{kind}{'/step' if step else ''}{'' if down else '/along'}"
            yield Build(name, "products.product_kernel", architecture, tile, types, constants, TENSOR_CORE[architecture])


def epilogue_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(16, 128, 0, 4, 2)
    for stored in ("bf16", "fp32"):
        for targets in (1, 32):
            types = {
                "product": "*fp32", "out": "*fp32", "factor": "*fp32", "coefficient": "*fp32", "labels": "*i32",
                "points": f"*{stored}", "rows": "i32", "columns": "i32", "classes": "i32", "stride": "i32",
            }  # fmt: skip
            constants = {"TARGETS": targets, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns}
            name = f"epilogue/{stored}/targets={targets}"
            yield Build(name, "products.epilogue_kernel", architecture, tile, types, constants)


def one_pass_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, stored, passes) in MODES.items():
        for depth, targets in ((64, 1), (128, 32)):
            of_rows, of_classes = (tile_of(name, stored, architecture, passes) for name in ("one_pass", "one_pass_weight"))
            common = {"bias": "*fp32", "offset": "*fp32", "labels": "*i32", "out": "*fp32", **SIZES}
            matrices = {"H": f"*{operand}", "W": f"*{operand}"}
            constants = {
                "TARGETS": targets, "BIAS": True, "SINGLE": stored == "fp32", "PASSES": passes, "D": depth,
            }  # fmt: skip
            forward = {**matrices, "V": f"*{stored}", "flag": "*i32", "statistics": "*fp32", **common}
            weight = {**matrices, "X": f"*{stored}", "factor": "*fp32", "sums": "*fp32", **common}
            yield Build(
                f"one_pass/{mode}/d={depth}/forward", "one_pass.forward_kernel", architecture, of_rows, forward,
                {**constants, "FLAG": True, "BLOCK_M": of_rows.rows, "BLOCK_N": of_rows.columns},
                TENSOR_CORE[architecture],
            )  # fmt: skip
            yield Build(
                f"one_pass/{mode}/d={depth}/weight", "one_pass.weight_kernel", architecture, of_classes, weight,
                {**constants, "BLOCK_M": of_classes.rows, "BLOCK_N": of_classes.columns}, TENSOR_CORE[architecture],
            )  # fmt: skip


SIZES = {"rows": "i32", "classes": "i32", "depth": "i32", "width": "i32", "span": "i32"}


def gram_builds(architecture: int) -> Iterator[Build]:
    for element, weight in (("bf16", False), ("fp16", False), ("fp32", False), ("fp32", True)):
        wide = element == "fp32"
        if not (wide and architecture == 100):  # no float64 product there in this compiler: the library's is used
            tile = tile_of("gram", element, architecture)
            types = {
                "X": f"*{element}", "weight": "*fp32", "out": "*fp64", "rows": "i32", "columns": "i32", "stride": "i32",
                "span": "i32",
            }  # fmt: skip
            constants = {"WIDE": wide, "WEIGHT": weight, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
            core = "mma.sync" if wide else TENSOR_CORE[architecture]
            name = f"gram/{element}/{'float64' if wide else 'promoted'}{'/weighted' if weight else ''}"
            yield Build(name, "squared_error.gram_kernel", architecture, tile, types, constants, core)


def nearest_builds(architecture: int) -> Iterator[Build]:
    for element in ("bf16", "fp16", "fp32"):
        tile = tile_of("nearest", element, architecture)
        types = {
            "Q": f"*{element}", "C": f"*{element}", "bias": "*fp32", "labels": "*i32", "best": "*i32",
            "moments": "*fp32", "rows": "i32", "classes": "i32", "depth": "i32", "span": "i32", "center": "fp32",
        }  # fmt: skip
        constants = {"BIAS": True, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
        name = f"nearest/{element}"
        yield Build(name, "nearest.nearest_kernel", architecture, tile, types, constants, TENSOR_CORE[architecture])


def matvec_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, _, passes) in MODES.items():
        tile = tile_of("matvec", operand, architecture, passes)
        for transposed in (False, True):
            types = {
                "A": f"*{operand}", "B": f"*{operand}", "X": "*fp32", "bias": "*fp32", "offset": "*fp32",
                "labels": "*i32", "out": "*fp32", "rows": "i32", "columns": "i32", "depth": "i32", "span": "i32",
            }  # fmt: skip
            constants = {
                "TRANSPOSED": transposed, "TARGETS": 32, "BIAS": True, "PASSES": passes, "VECTORS": 16,
                "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
            }  # fmt: skip
            name = f"matvec/{mode}{'/transposed' if transposed else ''}"
            kernel = "matvec.logit_product_kernel"
            yield Build(name, kernel, architecture, tile, types, constants, TENSOR_CORE[architecture])


def hvp_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, stored, passes) in MODES.items():
        if mode == "fp16x3":  # Hessian products run in bf16x3 there
            continue
        tile = tile_of("hvp", operand, architecture, passes)
        left = described(operand, tile, (tile.rows, tile.depth))
        right = described(operand, tile, (tile.columns, tile.depth))
        types = {
            "H": left, "W": right, "dH": left, "dW": right, "db": "*fp32", "base": "*fp32", "slope": "*fp32",
            "curvature": "*fp32", "E": f"*{stored}", "sums": "*fp32",
            "rows": "i32", "classes": "i32", "depth": "i32", "stride": "i32",
        }  # fmt: skip
        constants = {"BIAS": True, "SINGLE": stored == "fp32", "PASSES": passes, **blocks(tile)}
        yield Build(f"hvp/{mode}", "hvp.hvp_kernel", architecture, tile, types, constants, TENSOR_CORE[architecture])


def segment_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(16, 128, 128, 4, 2)
    for element in ("bf16", "fp16", "fp32"):
        types = {
            "H": f"*{element}", "W": f"*{element}", "bias": "*fp32", "labels": "*i32", "out": "*fp32", "rows": "i32",
            "columns": "i32", "classes": "i32", "stride_h": "i32", "stride_w": "i32",
        }  # fmt: skip
        constants = {"TARGETS": 1, "BIAS": True, "BLOCK_M": 16, "BLOCK_K": 128}
        yield Build(f"target_logits/{element}", "segments.target_logits_kernel", architecture, tile, types, constants)
        types = {
            "H": f"*{element}", "weight": "*fp32", "order": "*i64", "starts": "*i64", "out": "*fp32",
            "columns": "i32", "classes": "i32", "stride": "i32", "scale": "fp32",
        }  # fmt: skip
        for span in (128, 512):
            constants = {"TARGETS": 1, "SPLITS": 16, "BLOCK_M": 2048 // span, "BLOCK_N": span}
            name = f"class_sums/{element}/{span}"
            yield Build(name, "segments.class_sums_kernel", architecture, tile, types, constants)


def row_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(32, 64, 0, 4, 2)
    for targets in (1, 32):
        common = {
            "statistics": "*fp32", "z": "*fp32", "labels": "*i32", "mean": "*fp32", "offset": "*fp32",
            "rows": "i32", "tiles": "i32",
        }  # fmt: skip
        constants: dict[str, object] = {"TARGETS": targets, "BLOCK": tile.rows, "SPAN": tile.columns}
        types = {**common, "flag": "*i32"}
        yield Build(f"rows/raise/targets={targets}", "row_sums.raise_kernel", architecture, tile, types, constants)
        types = {**common, "scale": "*fp32", "out": "*fp32", "own": "*fp32", "plane": "i32"}
        constants = {**constants, "ROUNDED": True}
        yield Build(f"rows/finish/targets={targets}", "row_sums.finish_kernel", architecture, tile, types, constants)


def prepare_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(16, 128, 0, 4, 2)
    for element in ("bf16", "fp16", "fp32", "fp64"):
        for stored, halves, weight, turned in (
            ("bf16", 1, True, False),
            ("bf16", 2, True, False),
            ("fp16", 2, False, False),
            ("fp32", 1, False, False),
            ("fp32", 2, True, False),
            ("fp32", 2, True, True),
        ):
            height, span = (32, 64) if turned else (16, 128)
            types = {
                "X": f"*{element}", "weight": "*fp32", "out": f"*{stored}", "rows": "i32", "columns": "i32",
                "width": "i32", "stride": "i32",
            }  # fmt: skip
            constants = {"WEIGHT": weight, "HALVES": halves, "TURNED": turned, "BLOCK_M": height, "BLOCK_N": span}
            name = f"prepare/{element}/{stored}/halves={halves}{'/turned' if turned else ''}"
            yield Build(name, "prepare.prepare_kernel", architecture, tile, types, constants)


def weighted_sums_builds(architecture: int) -> Iterator[Build]:
    types = {
        "E": "*bf16", "weight": "*fp32", "out": "*fp32", "rows": "i32", "classes": "i32", "stride": "i32",
    }  # fmt: skip
    for element in ("bf16", "fp32"):
        for transposed, halves, block, span in ((True, 1, 64, 64), (False, 2, 16, 256)):
            tile = Tile(block, span, 0, 4, 2)
            constants = {"TRANSPOSED": transposed, "HALVES": halves, "BLOCK": block, "SPAN": span}
            name = f"weighted_sums/{element}/{'transposed' if transposed else 'rows'}"
            stored = {**types, "E": f"*{element}"}
            yield Build(name, "products.weighted_sums_kernel", architecture, tile, stored, constants)


def all_builds(architectures=tuple(SHARED_MEMORY)) -> list[Build]:
    """Every kernel x configuration of the table."""
    makers = [value for name, value in globals().items() if name.endswith("_builds") and name != "all_builds"]
    return [build for architecture in architectures for maker in makers for build in maker(architecture)]


def cuobjdump() -> str:
    """The path of the disassembler that triton ships."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers of the only kernel in a cubin, bytes of its stack, and its spills: loads and stores of local memory.

    A small stack without such an instruction is a call frame or a reserve of the tensor cores, not a spill.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([cuobjdump(), option, file.name], capture_output=True, text=True, check=True).stdout

        found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", dump("--dump-resource-usage"))}
        found["SPILLS"] = len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass"))) if found.get("STACK") else 0
    return found


def promotes(ttir: str) -> bool:
    """Whether every chain of products starts from zero, so that totals are added to outside the tensor cores, which truncate.

    The compiler likes to fold an addition into the product before it.
    """
    products = re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%[\w#.]+)", ttir)
    starts = {name for name, _ in products} | set(re.findall(r"(%\S+) = arith\.constant dense<0\.0", ttir))
    return bool(products) and all(start in starts for _, start in products)


def problems_of(build: Build, shared: int, usage: dict[str, int], ptx: str, ttir: str) -> list[str]:
    """What a finished build violates, in words."""
    problems = []
    if usage["SPILLS"]:
        problems.append(f"spills: {usage['STACK']} bytes of stack, {usage['SPILLS']} instructions")
    if shared > SHARED_MEMORY[build.architecture]:
        problems.append(f"shared memory {shared} > {SHARED_MEMORY[build.architecture]}")
    if build.tensor_core and build.tensor_core not in ptx:
        problems.append(f"no {build.tensor_core} in the code")
    if build.tile.tma and not re.search(r"cp\.async\.bulk\.tensor\S*\.shared::\S+\.global", ptx):
        problems.append("no TMA load in the code")
    if build.constants.get("PASSES") == 3 and not promotes(ttir):
        problems.append("the products of pairs are summed by the tensor cores, which truncate")
    return problems


def compile_one(build: Build) -> dict[str, object]:
    """Compile one build and return a row of the report; a compiler error is a problem, not an exception."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.split(".")
    kernel = getattr(import_module(f".{module}", __package__), name)
    kinds = {**build.types, **dict.fromkeys(build.constants, "constexpr")}
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    aligned = {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument, kind in build.types.items()
        if kind.startswith("*") or argument in build.aligned
    }
    options = {"num_warps": build.tile.warps, "num_stages": build.tile.stages, "enable_fp_fusion": True}
    row: dict[str, object] = {"name": build.name, "architecture": build.architecture, **asdict_tile(build.tile)}
    try:
        source = ASTSource(kernel, signature, build.constants, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", build.architecture, 32), options=options)
        usage = inspect(built.asm["cubin"])
        problems = problems_of(build, built.metadata.shared, usage, built.asm["ptx"], built.asm["ttir"])
        row |= {"shared": built.metadata.shared, "registers": usage.get("REG"), "problems": problems}
    except Exception as error:  # a compiler error is what this gate is there to report
        while error.__cause__ is not None:
            error = error.__cause__
        row |= {"problems": [f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"]}
    return row


def asdict_tile(tile: Tile) -> dict[str, object]:
    return {"tile": f"{tile.rows}x{tile.columns}x{tile.depth}", "warps": tile.warps, "stages": tile.stages}


def run(builds: list[Build], processes: int) -> Iterator[dict[str, object]]:
    """Rows in the order of `builds`."""
    if processes == 1:
        yield from map(compile_one, builds)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(compile_one, builds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ufm_kernels.compile_gate", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--only", default="", help="builds whose name contains this text")
    parser.add_argument("--architecture", type=int, choices=tuple(SHARED_MEMORY), help="one architecture only")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    chosen = parser.parse_args(arguments)
    architectures = (chosen.architecture,) if chosen.architecture else tuple(SHARED_MEMORY)
    builds = [build for build in all_builds(architectures) if chosen.only in build.name]
    if not builds:
        parser.error(f"--only {chosen.only}: no build has this in its name")
    failed = 0
    for row in run(builds, chosen.processes):
        failed += bool(row["problems"])
        if chosen.json:
            print(json.dumps(row), flush=True)
        else:
            verdict = "; ".join(row["problems"]) or "ok"
            print(
                f"sm_{row['architecture']:<4}{row['name']:<44} {row['tile']:>12} w{row['warps']} s{row['stages']} "
                f"shared {row.get('shared', '-'):>6} registers {row.get('registers', '-'):>3}  {verdict}", flush=True,
            )  # fmt: skip
    import triton

    print(f"triton {triton.__version__}: {len(builds)} builds, {failed} failed", file=sys.stderr if chosen.json else None)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
