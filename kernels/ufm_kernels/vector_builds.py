"""The builds of the kernels without a product of matrices: along labels, rows and operands."""

from collections.abc import Iterator

from .build import Build, typed
from .tiles import Tile


def epilogue_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(16, 128, 0, 4, 2)
    for stored in ("bf16", "fp32"):
        for targets, add in ((1, True), (1, False), (32, True), (32, False)):
            types = {
                "points": f"*{stored}",
                **typed("*fp32", "product out factor coefficient"),
                **typed("*i32", "labels"),
                **typed("i32", "rows columns classes stride"),
            }
            constants = {
                "FACTOR": True,
                "TARGETS": targets,
                "PAIRS": False,
                "ADD": add,
                "BLOCK_M": tile.rows,
                "BLOCK_N": tile.columns,
            }
            name = f"epilogue/{stored}/targets={targets}{'' if add else '/fresh'}"
            yield Build(name, "products.epilogue_kernel", architecture, tile, types, constants)


def segment_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(16, 128, 128, 4, 2)
    for element in ("bf16", "fp16", "fp32"):
        types = {
            "H": f"*{element}",
            "W": f"*{element}",
            **typed("*fp32", "bias out"),
            **typed("*i32", "labels"),
            **typed("i32", "rows columns classes stride_h stride_w"),
        }
        constants = {"TARGETS": 1, "BIAS": True, "BLOCK_M": 16, "BLOCK_K": 128}
        yield Build(
            f"target_logits/{element}",
            "segments.target_logits_kernel",
            architecture,
            tile,
            types,
            constants,
        )
        types = {
            "H": f"*{element}",
            **typed("*fp32", "weight out"),
            **typed("*i64", "order starts"),
            **typed("*i32", "ordered"),
            **typed("i32", "columns classes stride"),
            **typed("fp32", "scale"),
        }
        sums = [(span, pairs, "fp32") for span in (128, 512) for pairs in (False, True)]
        if element == "fp32":  # of a bias
            sums += [(128, False, "fp64"), (128, True, "fp64")]
        for span, pairs, out in sums:
            constants = {
                "PAIRS": pairs,
                "TARGETS": 1,
                "SPLITS": 16,
                "BLOCK_M": 2048 // span,
                "BLOCK_N": span,
            }
            name = f"class_sums/{element}/{span}/{'pairs' if pairs else 'classes'}/{out}"
            yield Build(
                name,
                "segments.class_sums_kernel",
                architecture,
                tile,
                {**types, "out": f"*{out}"},
                constants,
            )


def row_builds(architecture: int) -> Iterator[Build]:
    tile = Tile(32, 64, 0, 4, 2)
    for targets in (1, 32):
        common = {
            "statistics": "*fp32",
            "z": "*fp32",
            "labels": "*i32",
            "mean": "*fp32",
            "offset": "*fp32",
            "flag": "*i32",
            "totals": "*fp64",
            "rows": "i32",
            "tiles": "i32",
            "plane": "i32",
        }
        raised = {**common, "band": "fp32"}
        constants: dict[str, object] = {
            "TARGETS": targets,
            "BLOCK": tile.rows,
            "SPAN": tile.columns,
        }
        yield Build(
            f"rows/raise/targets={targets}",
            "row_sums.raise_kernel",
            architecture,
            tile,
            raised,
            constants,
        )
        types = {**common, **typed("*fp32", "scale out own")}
        constants = {**constants, "ROUNDED": True}
        yield Build(
            f"rows/finish/targets={targets}",
            "row_sums.finish_kernel",
            architecture,
            tile,
            types,
            constants,
        )


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
                "X": f"*{element}",
                "out": f"*{stored}",
                **typed("*fp32", "weight"),
                **typed("i32", "rows columns width stride"),
            }
            constants = {
                "WEIGHT": weight,
                "HALVES": halves,
                "TURNED": turned,
                "BLOCK_M": height,
                "BLOCK_N": span,
            }
            name = f"prepare/{element}/{stored}/halves={halves}{'/turned' if turned else ''}"
            yield Build(name, "prepare.prepare_kernel", architecture, tile, types, constants)


def weighted_sums_builds(architecture: int) -> Iterator[Build]:
    types = {
        **typed("*bf16", "E"),
        **typed("*fp32", "weight out"),
        **typed("i32", "rows classes stride"),
    }
    for element in ("bf16", "fp32"):
        for transposed, halves, block, span in ((True, 1, 64, 64), (False, 2, 16, 256)):
            tile = Tile(block, span, 0, 4, 2)
            constants = {"TRANSPOSED": transposed, "HALVES": halves, "BLOCK": block, "SPAN": span}
            name = f"weighted_sums/{element}/{'transposed' if transposed else 'rows'}"
            stored = {**types, "E": f"*{element}", "out": "*fp64" if transposed else "*fp32"}
            yield Build(
                name, "products.weighted_sums_kernel", architecture, tile, stored, constants
            )
