"""Build every kernel and tile ahead of time, without a GPU, and inspect the machine code.

    python -m ufm_kernels.compile_gate [--json] [--only TEXT] [--architecture 90] [--processes 2]

For each build: no spills, shared memory within the device's limit (the compiler itself does not
check it), the architecture's tensor-core instructions where there is a dot (mma.sync, wgmma,
tcgen05), TMA loads where the tile asks for them, and sums of products of pairs that round to
nearest. One line a build, a summary, exit status 1 if any build fails. It needs triton only, not
torch.
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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from .build import Build
from .builds import all_builds
from .tiles import SHARED_MEMORY, Tile

if TYPE_CHECKING:
    from triton.compiler import ASTSource


def cuobjdump() -> str:
    """The path of the disassembler that triton ships."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers of the only kernel in a cubin, bytes of its stack, and its spills: loads and stores
    of local memory.

    A small stack without such an instruction is a call frame or a reserve of the tensor cores, not
    a spill.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run(
                [cuobjdump(), option, file.name], capture_output=True, text=True, check=True
            ).stdout

        found = {
            key: int(value)
            for key, value in re.findall(r"(REG|STACK):(\d+)", dump("--dump-resource-usage"))
        }
        found["SPILLS"] = (
            len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass"))) if found.get("STACK") else 0
        )
    return found


def promotes(ttir: str) -> bool:
    """Whether every chain of products starts from zero, so that totals are added to outside the
    tensor cores, which truncate.

    The compiler likes to fold an addition into the product before it.
    """
    products = re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%[\w#.]+)", ttir)
    starts = {name for name, _ in products} | set(
        re.findall(r"(%\S+) = arith\.constant dense<0\.0", ttir)
    )
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


def source_of(build: Build) -> "ASTSource":
    """What triton compiles: the kernel with the types of its arguments. Those of a bundle, an
    argument that is annotated with a NamedTuple, stand under the names of its members.
    """
    from triton.compiler import ASTSource

    module, name = build.kernel.split(".")
    kernel = getattr(import_module(f".{module}", __package__), name)
    hints, signature = get_type_hints(kernel.fn), {}
    constants: dict[tuple[int, ...], object] = {}
    aligned = {}
    for place, argument in enumerate(kernel.arg_names):
        bundle = hints.get(argument)
        members = getattr(bundle, "_fields", None)
        kinds = [build.types.get(member, "constexpr") for member in members or (argument,)]
        for i, (member, kind) in enumerate(zip(members or (argument,), kinds, strict=True)):
            path = (place,) if members is None else (place, i)
            if kind == "constexpr":
                constants[path] = build.constants[member]
            elif kind.startswith("*") or member in build.aligned:
                aligned[path] = [["tt.divisibility", 16]]
        signature[argument] = kinds[0] if members is None else bundle(*kinds)
    return ASTSource(kernel, signature, constants, aligned)


def compile_one(build: Build) -> dict[str, object]:
    """Compile one build and return a row of the report; a compiler error is a problem, not an
    exception.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    options = {
        "num_warps": build.tile.warps,
        "num_stages": build.tile.stages,
        "enable_fp_fusion": True,
    }
    row: dict[str, object] = {
        "name": build.name,
        "architecture": build.architecture,
        **asdict_tile(build.tile),
    }
    try:
        built = triton.compile(
            source_of(build), target=GPUTarget("cuda", build.architecture, 32), options=options
        )
        usage = inspect(built.asm["cubin"])
        problems = problems_of(
            build, built.metadata.shared, usage, built.asm["ptx"], built.asm["ttir"]
        )
        row |= {
            "shared": built.metadata.shared,
            "registers": usage.get("REG"),
            "problems": problems,
        }
    except Exception as error:  # a compiler error is what this gate is there to report
        while error.__cause__ is not None:
            error = error.__cause__
        row |= {"problems": [f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"]}
    return row


def asdict_tile(tile: Tile) -> dict[str, object]:
    return {
        "tile": f"{tile.rows}x{tile.columns}x{tile.depth}",
        "warps": tile.warps,
        "stages": tile.stages,
    }


def run(builds: list[Build], processes: int) -> Iterator[dict[str, object]]:
    """Rows in the order of `builds`."""
    if processes == 1:
        yield from map(compile_one, builds)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(compile_one, builds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ufm_kernels.compile_gate", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of text"
    )
    parser.add_argument("--only", default="", help="builds whose name contains this text")
    parser.add_argument(
        "--architecture", type=int, choices=tuple(SHARED_MEMORY), help="one architecture only"
    )
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
                f"sm_{row['architecture']:<4}{row['name']:<44} {row['tile']:>12} w{row['warps']} "
                f"s{row['stages']} "
                f"shared {row.get('shared', '-'):>6} registers {row.get('registers', '-'):>3}  "
                f"{verdict}",
                flush=True,
            )
    import triton

    print(
        f"triton {triton.__version__}: {len(builds)} builds, {failed} failed",
        file=sys.stderr if chosen.json else None,
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
