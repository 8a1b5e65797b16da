"""What the compile gate builds: every kernel with the types, constants and tiles that the drivers
launch it with. Here those with a product of matrices; the others stand in `vector_builds`.
"""

from collections.abc import Iterator

from . import vector_builds
from .build import Build, blocks, described, typed
from .off_target import DEEP, kernel_name
from .products import kernel_name as product_name
from .tiles import SHARED_MEMORY, Tile, tile_for

TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}

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
        size = 4 if stored == "fp32" else 2
        depths = (64, DEEP) if mode == "bf16" else (64,)
        single = [
            (1, bias, flag, depth, False)
            for bias in (False, True)
            for flag in (False, True)
            for depth in depths
        ]
        parts = [(1, bias, False, 64, True) for bias in (False, True) if mode == "bf16"]
        for targets, bias, flag, depth, part in (*single, *parts, (32, True, False, 64, False)):
            tile = tile_of(
                kernel_name(passes, targets, size, depth, bias), operand, architecture, passes
            )
            types = {
                "H": described(operand, tile, (tile.rows, tile.depth)),
                "W": described(operand, tile, (tile.columns, tile.depth)),
                "E": described(stored, tile, (tile.rows, tile.columns // tile.split)),
                **typed("*fp32", "bias offset statistics"),
                **typed("*i32", "labels flag"),
                **typed("i32", "rows classes depth stride first count"),
            }
            constants = {
                "TARGETS": targets,
                "BIAS": bias,
                "FLAG": flag,
                "PART": part,
                "SINGLE": stored == "fp32",
                "PASSES": passes,
                "FLATTEN": tile.flatten,
                "SPLIT": tile.split,
                **blocks(tile),
            }
            options = "".join(
                f"/{name}"
                for name, on in (
                    ("bias", bias),
                    ("flag", flag),
                    ("deep", depth == DEEP),
                    ("part", part),
                )
                if on
            )
            name = f"off_target/{mode}/targets={targets}{options}"
            yield Build(
                name,
                "off_target.off_target_kernel",
                architecture,
                tile,
                types,
                constants,
                TENSOR_CORE[architecture],
            )


def product_builds(architecture: int) -> Iterator[Build]:
    for mode, (_, stored, passes) in MODES.items():
        if mode in ("fp16", "fp16x3"):  # their products are those of tf32 and of bf16x3
            continue
        usual = stored != "fp32"
        flagged: tuple[tuple[bool, int, bool, bool, bool], ...] = ()
        if mode == "bf16":  # of `blocks`, the second of mode fp8
            flagged = ((False, 0, usual, False, True), (True, 0, usual, False, True))
            flagged = flagged if architecture == 90 else flagged[:1]
        for transposed, targets, down, exact, flag in (
            (False, 1, usual, False, False),
            (False, 32, usual, False, False),
            (False, 0, usual, False, False),
            (True, 0, usual, False, False),
            (False, 0, False, True, False),
            (False, 1, False, True, False),
            *flagged,
        ):
            tile = tile_of(product_name(transposed, targets), stored, architecture, passes)
            left = (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth)
            right = (tile.depth, tile.columns) if down else (tile.columns, tile.depth)
            types = {
                "A": described(stored, tile, left),
                "B": described(stored, tile, right),
                "points": "*fp32" if exact else f"*{stored}",
                **typed("*fp32", "out factor coefficient"),
                **typed("*i32", "labels flag"),
                **typed("i32", "rows columns classes depth stride_a stride_b stride"),
            }
            constants = {
                "TRANSPOSED": transposed,
                "DOWN": down,
                "FACTOR": targets > 0,
                "TARGETS": targets,
                "PASSES": passes,
                "PAIRS": passes == 3 and not exact,
                "ADD": True,
                "FLAG": flag,
                "FLATTEN": tile.flatten,
                **blocks(tile),
            }
            kind = "transposed" if transposed else f"targets={targets}"
            name = f"product/{mode}/{kind}{'/exact' if exact else ''}{'/flag' if flag else ''}"
            yield Build(
                name,
                "products.product_kernel",
                architecture,
                tile,
                types,
                constants,
                TENSOR_CORE[architecture],
            )


def one_pass_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, stored, passes) in MODES.items():
        for depth, targets in ((64, 1), (128, 32)):
            of_rows, of_classes = (
                tile_of(name, stored, architecture, passes)
                for name in ("one_pass", "one_pass_weight")
            )
            common = {"bias": "*fp32", "offset": "*fp32", "labels": "*i32", "out": "*fp32", **SIZES}
            matrices = {"H": f"*{operand}", "W": f"*{operand}"}
            constants = {
                "TARGETS": targets,
                "BIAS": True,
                "SINGLE": stored == "fp32",
                "PASSES": passes,
                "D": depth,
            }
            forward = {
                **matrices,
                "V": f"*{stored}",
                "flag": "*i32",
                "statistics": "*fp32",
                **common,
            }
            weight = {**matrices, "X": f"*{stored}", "factor": "*fp32", "sums": "*fp64", **common}
            yield Build(
                f"one_pass/{mode}/d={depth}/forward",
                "one_pass.forward_kernel",
                architecture,
                of_rows,
                forward,
                {**constants, "FLAG": True, "BLOCK_M": of_rows.rows, "BLOCK_N": of_rows.columns},
                TENSOR_CORE[architecture],
            )
            yield Build(
                f"one_pass/{mode}/d={depth}/weight",
                "one_pass.weight_kernel",
                architecture,
                of_classes,
                weight,
                {**constants, "BLOCK_M": of_classes.rows, "BLOCK_N": of_classes.columns},
                TENSOR_CORE[architecture],
            )


SIZES = typed("i32", "rows classes depth width span")


def gram_builds(architecture: int) -> Iterator[Build]:
    for element, weight in (("bf16", False), ("fp16", False), ("fp32", False), ("fp32", True)):
        wide = element == "fp32"
        if not (
            wide and architecture == 100
        ):  # no float64 product there in this compiler: the library's is used
            tile = tile_of("gram", element, architecture)
            types = {
                "X": f"*{element}",
                **typed("*fp32", "weight"),
                **typed("*fp64", "out"),
                **typed("i32", "rows columns stride span"),
            }
            constants = {
                "WIDE": wide,
                "WEIGHT": weight,
                "BLOCK_M": tile.rows,
                "BLOCK_N": tile.columns,
                "BLOCK_K": tile.depth,
            }
            core = "mma.sync" if wide else TENSOR_CORE[architecture]
            name = (
                f"gram/{element}/{'float64' if wide else 'promoted'}{'/weighted' if weight else ''}"
            )
            yield Build(
                name, "squared_error.gram_kernel", architecture, tile, types, constants, core
            )


def matvec_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, _, passes) in MODES.items():
        tile = tile_of("matvec", operand, architecture, passes)
        for transposed in (False, True):
            types = {
                "A": f"*{operand}",
                "B": f"*{operand}",
                **typed("*fp32", "X bias offset out"),
                **typed("*i32", "labels"),
                **typed("i32", "rows classes depth span"),
            }
            constants = {
                "TRANSPOSED": transposed,
                "TARGETS": 32,
                "BIAS": True,
                "PASSES": passes,
                "VECTORS": 16,
                **blocks(tile),
            }
            name = f"matvec/{mode}{'/transposed' if transposed else ''}"
            kernel = "matvec.logit_product_kernel"
            yield Build(
                name, kernel, architecture, tile, types, constants, TENSOR_CORE[architecture]
            )


def hvp_builds(architecture: int) -> Iterator[Build]:
    for mode, (operand, stored, passes) in MODES.items():
        if mode == "fp16x3":  # Hessian products run in bf16x3 there
            continue
        tile = tile_of("hvp", operand, architecture, passes)
        left = described(operand, tile, (tile.rows, tile.depth))
        right = described(operand, tile, (tile.columns, tile.depth))
        types = {
            "H": left,
            "W": right,
            "dH": left,
            "dW": right,
            "E": f"*{stored}",
            **typed("*fp32", "db base slope curvature sums"),
            **typed("i32", "rows classes depth stride"),
        }
        constants = {"BIAS": True, "SINGLE": stored == "fp32", "PASSES": passes, **blocks(tile)}
        yield Build(
            f"hvp/{mode}",
            "hvp.hvp_kernel",
            architecture,
            tile,
            types,
            constants,
            TENSOR_CORE[architecture],
        )


def fp8_builds(architecture: int) -> Iterator[Build]:
    if architecture != 90:
        return
    tile = tile_for("fp8_exponentials", 16, architecture)
    types = {
        "H": described("bf16", tile, (tile.rows, tile.depth)),
        "W": described("bf16", tile, (tile.columns, tile.depth)),
        **typed("*fp32", "bias offset target level scale statistics"),
        **typed("*i32", "labels flag"),
        **typed("*fp8e4nv", "E"),
        **typed("i32", "rows classes depth stride"),
    }
    for bias, flag in ((False, False), (True, True)):
        constants = {"TARGETS": 1, "BIAS": bias, "FLAG": flag, **blocks(tile)}
        name = f"fp8/exponentials{'/bias' if bias else ''}"
        kernel = "fp8.exponentials_kernel"
        yield Build(name, kernel, architecture, tile, types, constants, TENSOR_CORE[architecture])
    tile = tile_for("fp8_product", 8, architecture)
    types = {
        "A": described("fp8e4nv", tile, (tile.rows, tile.depth)),
        "B": described("fp8e4nv", tile, (tile.columns, tile.depth)),
        **typed("*fp32", "scale_a scale_b out"),
        **typed("*i32", "flag"),
        **typed("i32", "rows columns depth stride_a stride_b stride_out"),
    }
    for add in (False, True):
        constants = {"ADD": add, **blocks(tile)}
        yield Build(
            f"fp8/product{'/add' if add else ''}",
            "fp8.product_kernel",
            architecture,
            tile,
            types,
            constants,
            "m64n128k32.f32.e4m3.e4m3",  # wgmma's alone: mma.sync has 16 rows
        )


def all_builds(architectures=tuple(SHARED_MEMORY)) -> list[Build]:
    """Every kernel x configuration of the table."""
    makers = [
        value
        for module in (globals(), vars(vector_builds))
        for name, value in module.items()
        if name.endswith("_builds") and name not in ("all_builds", "vector_builds")
    ]
    return [
        build for architecture in architectures for maker in makers for build in maker(architecture)
    ]
