"""Every kernel x configuration of the tile table builds for sm_80, sm_90 and sm_100, within the
device's resources.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")

from ufm_kernels import compile_gate
from ufm_kernels.tiles import NEWER, PAIRS, TILES, newer_triton

KERNELS = Path(compile_gate.__file__).parents[1]


def gate(*arguments: str) -> tuple[int, list[dict]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ufm_kernels.compile_gate", "--json", *arguments]
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(KERNELS), environment.get("PYTHONPATH")])
    )
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return run.returncode, [
        json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")
    ]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_build_of_the_table(architecture):
    status, rows = gate("--architecture", str(architecture))
    assert [(row["name"], row["problems"]) for row in rows if row["problems"]] == []
    assert status == 0
    assert len(rows) == len(compile_gate.all_builds((architecture,)))


def test_gate_sees_what_it_is_there_for():
    build = next(x for x in compile_gate.all_builds((90,)) if x.name.startswith("off_target/bf16/"))
    fine = {"STACK": 0, "SPILLS": 0}
    load, store = (
        "cp.async.bulk.tensor.2d.shared::cta.global",
        "cp.async.bulk.tensor.2d.global.shared::cta",
    )
    code = f"wgmma {load} {store}"
    assert compile_gate.problems_of(build, 1000, fine, code, "") == []
    assert "spills" in compile_gate.problems_of(build, 1000, {"STACK": 8, "SPILLS": 2}, code, "")[0]
    assert "shared memory" in compile_gate.problems_of(build, 232449, fine, code, "")[0]
    assert "wgmma" in compile_gate.problems_of(build, 1000, fine, load, "")[0]
    assert "TMA" in compile_gate.problems_of(build, 1000, fine, f"wgmma {store}", "")[0]
    pair = replace(build, constants={**build.constants, "PASSES": 3})
    zero = "%zero = arith.constant dense<0.000000e+00> : tensor<8xf32>\n"
    apart = (
        zero
        + "%low = tt.dot %a, %b, %zero : x\n%part = tt.dot %c, %d, %low : x\n%total = arith.addf "
        "%before, %part : x"
    )
    assert compile_gate.problems_of(pair, 1000, fine, code, apart) == []
    folded = (
        zero
        + "%low = tt.dot %a, %b, %zero : x\n%part = tt.dot %c, %d, %before : x\n%z = arith.addf "
        "%low, %bias : x"
    )
    assert "truncate" in compile_gate.problems_of(pair, 1000, fine, code, folded)[0]


def test_gate_fails_on_too_much_shared_memory():
    build = next(x for x in compile_gate.all_builds((90,)) if x.name.startswith("off_target/bf16/"))
    tile = replace_stages(build.tile)
    row = compile_gate.compile_one(replace(build, tile=tile))
    assert any("shared memory" in problem for problem in row["problems"])


def replace_stages(tile):
    """The same tile with more stages than the device's shared memory holds."""
    return tile._replace(stages=tile.stages + 4)


@pytest.mark.parametrize("argument", ["rows", "columns", "depth", "classes"])
def test_an_argument_of_one_builds_too(argument):
    """The launcher turns an integer argument of value 1 into a constant, which is no tensor inside
    the kernel.
    """
    seen = set()
    for build in compile_gate.all_builds((80,)):
        if argument in build.types and build.kernel not in seen:
            seen.add(build.kernel)
            types = {key: kind for key, kind in build.types.items() if key != argument}
            row = compile_gate.compile_one(
                replace(build, types=types, constants={**build.constants, argument: 1})
            )
            assert [x for x in row["problems"] if "Error" in x] == [], build.name


def test_every_entry_of_the_table_is_built():
    built = {(build.tile, build.architecture) for build in compile_gate.all_builds()}
    newer = NEWER if newer_triton() else {}
    for (kernel, bits), tiles in [*TILES.items(), *PAIRS.items(), *newer.items()]:
        for architecture, tile in tiles.items():
            replaced = newer.get((kernel, bits), {}).get(architecture)
            assert (tile, architecture) in built or replaced not in (None, tile), (
                kernel,
                bits,
                architecture,
            )
