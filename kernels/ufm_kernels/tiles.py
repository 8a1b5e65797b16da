"""Which tile every kernel uses, by architecture and operand: the one table that is tuned.

Those of sm_90 for bfloat16 heads and float32 Gram matrices were among the fastest of
`bench/tune.py` on an H100 and an H200, one for all widths but where a row says otherwise. The rest
are chosen by resources (registers, shared memory, occupancy of the epilogue). `compile_gate` builds
every one.
"""

from functools import cache
from typing import NamedTuple

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use


class Tile(NamedTuple):
    """Rows x columns of the output a program owns, depth of one step, and how it is scheduled.

    With `tma` programs stay and walk over the tiles, `programs` of them a multiprocessor;
    with `flatten` a program loads for its next tile while it finishes this one. `split`: the parts,
    a power of two, in which the epilogue takes a tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    tma: bool = False
    group: int = 8
    programs: int = 1
    flatten: bool = False
    split: int = 1


# Small enough that shapes of a few dozen are ragged in every direction.
INTERPRETED = Tile(32, 64, 32)
SCALED = Tile(128, 128, 128)  # and of mode fp8, where a scale is of 128 terms

# (kernel, bits of an operand's element) -> architecture -> tile. Pointer tiles for sm_80 stay below
# the 99 KiB of its smaller relatives (8.6, 8.9, 12.0), which use the same row.
TILES: dict[tuple[str, int], dict[int, Tile]] = {
    ("off_target", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(128, 128, 64, 4, 3, tma=True, programs=2, flatten=True, split=2),
        100: Tile(128, 128, 64, 8, 4, tma=True),
    },
    # With a bias, whose columns take registers too.
    ("off_target_biased", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(128, 128, 64, 4, 3, tma=True, programs=2, flatten=True, split=2),
        100: Tile(128, 128, 64, 8, 4, tma=True),
    },
    # Features of many columns: the product is long, and the epilogue little.
    ("off_target_deep", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(128, 256, 64, 8, 3, tma=True, flatten=True, split=2),
        100: Tile(128, 128, 64, 8, 4, tma=True),
    },
    ("off_target_deep_biased", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(256, 128, 64, 8, 3, tma=True, flatten=True, split=2),
        100: Tile(128, 128, 64, 8, 4, tma=True),
    },
    # E in fp32 or split, or several targets: the epilogue holds more of the tile at once.
    ("off_target_wide", 16): {
        80: Tile(64, 128, 32, 8, 4),
        90: Tile(128, 128, 64, 8, 4, tma=True),
        100: Tile(128, 64, 64, 4, 4, tma=True),
    },
    ("off_target_wide", 32): {
        80: Tile(64, 64, 32, 4, 3),
        90: Tile(128, 128, 32, 8, 4, tma=True),
        100: Tile(128, 128, 32, 8, 4, tma=True),
    },
    ("product", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(128, 256, 64, 8, 3, tma=True),
        100: Tile(128, 64, 64, 8, 4, tma=True),
    },
    # Several targets a row.
    ("product_wide", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(128, 128, 64, 8, 4, tma=True),
        100: Tile(128, 64, 64, 8, 4, tma=True),
    },
    ("product_wide", 32): {
        80: Tile(64, 128, 32, 4, 3),
        90: Tile(128, 128, 32, 8, 3, tma=True),
        100: Tile(128, 128, 32, 8, 3, tma=True),
    },
    ("product", 32): {
        80: Tile(64, 128, 32, 4, 3),
        90: Tile(128, 128, 32, 8, 3, tma=True),
        100: Tile(128, 128, 32, 8, 3, tma=True),
    },
    ("transposed", 16): {
        80: Tile(128, 128, 32, 8, 4),
        90: Tile(128, 256, 64, 8, 3, tma=True),
        100: Tile(128, 128, 64, 8, 4, tma=True),
    },
    ("transposed", 32): {
        80: Tile(64, 128, 32, 4, 3),
        90: Tile(128, 128, 32, 8, 3, tma=True),
        100: Tile(128, 128, 32, 8, 3, tma=True),
    },
    # Rows kept and columns streamed a step; the depth is the whole feature width.
    ("one_pass", 16): {
        80: Tile(64, 64, 0, 8, 2),
        90: Tile(128, 128, 0, 8, 3),
        100: Tile(128, 32, 0, 8, 2),
    },
    ("one_pass", 32): {
        80: Tile(64, 32, 0, 8, 2),
        90: Tile(64, 32, 0, 4, 1),
        100: Tile(64, 32, 0, 8, 2),
    },
    ("one_pass_weight", 16): {
        80: Tile(64, 64, 0, 8, 2),
        90: Tile(64, 32, 0, 4, 2),
        100: Tile(128, 32, 0, 8, 2),
    },
    ("one_pass_weight", 32): {
        80: Tile(64, 32, 0, 8, 2),
        90: Tile(64, 32, 0, 4, 1),
        100: Tile(64, 32, 0, 8, 2),
    },
    ("gram", 16): {
        80: Tile(64, 64, 32, 4, 3),
        90: Tile(64, 64, 32, 4, 3),
        100: Tile(64, 64, 32, 4, 3),
    },
    ("gram", 32): {
        80: Tile(32, 32, 32, 4, 3),
        90: Tile(64, 64, 16, 4, 4),
        100: Tile(64, 64, 32, 4, 3),
    },
    ("matvec", 16): {
        80: Tile(64, 64, 32, 8, 3),
        90: Tile(64, 64, 64, 4, 3),
        100: Tile(128, 64, 64, 8, 3),
    },
    ("matvec", 32): {
        80: Tile(64, 64, 32, 8, 3),
        90: Tile(64, 64, 32, 4, 3),
        100: Tile(128, 64, 32, 8, 3),
    },
    # One scale a row and 128 terms: a tile of E is as wide, and a step of the product as deep.
    ("fp8_exponentials", 16): {90: Tile(128, 128, 64, 8, 3, tma=True)},
    ("fp8_product", 8): {90: Tile(128, 128, 128, 8, 3, tma=True)},
    ("hvp", 16): {
        80: Tile(64, 128, 32, 8, 3),
        90: Tile(128, 128, 64, 8, 3, tma=True),
        100: Tile(128, 128, 64, 8, 3, tma=True),
    },
    ("hvp", 32): {
        80: Tile(64, 64, 32, 8, 3),
        90: Tile(128, 64, 32, 8, 3, tma=True),
        100: Tile(128, 64, 32, 8, 3, tma=True),
    },
}


# Pairs: a step loads four tiles and a second accumulator holds its three products. Where the tile
# above does not fit.
PAIRS: dict[tuple[str, int], dict[int, Tile]] = {
    ("off_target_wide", 16): {
        90: Tile(128, 128, 64, 8, 3, tma=True),
        100: Tile(128, 64, 64, 8, 3, tma=True),
    },
    ("off_target_wide", 32): {
        80: Tile(64, 64, 32, 8, 3),
        90: Tile(128, 128, 32, 8, 2, tma=True),
        100: Tile(128, 64, 32, 8, 2, tma=True),
    },
    ("product", 16): {90: Tile(128, 128, 64, 8, 3, tma=True)},
    ("product", 32): {100: Tile(128, 64, 32, 8, 2, tma=True)},
    ("product_wide", 16): {
        90: Tile(128, 128, 64, 8, 3, tma=True),
        100: Tile(128, 32, 64, 8, 4, tma=True),
    },
    ("product_wide", 32): {100: Tile(128, 64, 32, 8, 2, tma=True)},
    ("transposed", 16): {
        90: Tile(128, 128, 64, 8, 3, tma=True),
        100: Tile(128, 64, 64, 8, 3, tma=True),
    },
    ("transposed", 32): {80: Tile(64, 64, 32, 4, 3), 100: Tile(64, 64, 32, 4, 2, tma=True)},
    ("one_pass", 16): {
        80: Tile(32, 32, 0, 4, 1),
        90: Tile(64, 32, 0, 4, 2),
        100: Tile(128, 32, 0, 8, 2),
    },
    ("one_pass", 32): {
        80: Tile(32, 32, 0, 8, 1),
        90: Tile(64, 32, 0, 4, 1),
        100: Tile(64, 32, 0, 4, 1),
    },
    ("one_pass_weight", 16): {
        80: Tile(32, 32, 0, 4, 1),
        90: Tile(64, 32, 0, 4, 2),
        100: Tile(128, 32, 0, 8, 2),
    },
    ("one_pass_weight", 32): {
        80: Tile(32, 32, 0, 8, 1),
        90: Tile(64, 32, 0, 4, 1),
        100: Tile(64, 32, 0, 8, 1),
    },
    ("matvec", 16): {100: Tile(128, 32, 32, 8, 3)},
    ("matvec", 32): {80: Tile(64, 32, 32, 8, 3), 100: Tile(64, 32, 32, 8, 3)},
    ("hvp", 16): {100: Tile(128, 64, 64, 8, 3, tma=True)},
}


# From triton 3.8 on, whose compiler keeps more in registers: where the tiles above, which were
# timed with 3.6, spill.
NEWER_TRITON = (3, 8)
NEWER: dict[tuple[str, int], dict[int, Tile]] = {
    ("off_target", 16): {90: Tile(128, 128, 64, 4, 3, tma=True, programs=2, flatten=True, split=4)},
    ("off_target_biased", 16): {90: Tile(128, 128, 64, 4, 3, tma=True, programs=2, split=2)},
    ("off_target_deep", 16): {90: Tile(128, 256, 64, 8, 3, tma=True, flatten=True, split=4)},
    ("off_target_deep_biased", 16): {90: Tile(128, 256, 64, 8, 3, tma=True, flatten=True, split=8)},
    ("product", 16): {100: Tile(128, 128, 64, 8, 3, tma=True)},
    ("one_pass", 16): {90: Tile(128, 64, 0, 8, 3)},
}


# Mode of a single pass -> (least columns of features, (who forms dH, who forms dW)), widest first:
# what measured faster on an H200, see bench/results. A library's product beats ours by what it has
# in hand, ours saves the pass of the epilogue.
PRODUCTS: dict[str, tuple[tuple[int, tuple[str, str]], ...]] = {
    "bf16": (
        (4096, ("triton", "library")),
        (2048, ("library", "library")),
        (1024, ("triton", "library")),
        (0, ("library", "library")),
    ),
    "fp16": ((0, ("library", "library")),),
    "tf32": ((0, ("library", "library")),),
}


def products_for(mode: str, columns: int) -> tuple[str, str]:
    """Who forms dH and dW on a device: 'triton' or 'library'. Pairs have no library product."""
    for least, who in PRODUCTS.get(mode, ()):
        if columns >= least:
            return who
    return "triton", "triton"


# Mode -> (most columns of features, bytes of a block of E), see `blocks`: dH straight after each
# block, while the L2 cache (50 MB on sm_90) holds it. Undecided: no device has timed it, so no mode
# has a row. To be asked by bench/gpu.py: "bf16": (128, 24 << 20).
BLOCKS: dict[str, tuple[int, int]] = {}


def blocks_for(mode: str, columns: int) -> int:
    """Bytes of a block of E after which dH follows; 0: dH follows a whole chunk."""
    most, size = BLOCKS.get(mode, (0, 0))
    return size if columns <= most else 0


# Modes whose repeated steps are recorded as CUDA graphs, see `replays`. Undecided, as above.
REPLAYED: frozenset[str] = frozenset()


def architecture_of(capability: tuple[int, int]) -> int:
    """The row of the table for a compute capability: 80 also serves 8.6, 8.9 and 12.x; 100 serves
    10.x.
    """
    major = capability[0]
    if major < 8:
        raise ValueError(
            f"capability={capability}: these kernels need compute capability 8.0 or newer"
        )
    return {9: 90, 10: 100}.get(major, 80)


@cache
def newer_triton() -> bool:
    """Whether the installed triton is one that `NEWER` is for."""
    from triton import __version__ as version  # here, for the table itself needs no triton

    return tuple(int(part) for part in version.split(".")[:2]) >= NEWER_TRITON


def tile_for(kernel: str, bits: int, architecture: int, passes: int = 1) -> Tile:
    """The tile of `kernel` for operands of `bits` bits on sm_`architecture`; architecture 0 is the
    interpreter.
    """
    if architecture == 0:
        return SCALED if kernel.startswith("fp8") else INTERPRETED
    special = PAIRS if passes == 3 else NEWER if newer_triton() else {}
    rows = {**TILES[kernel, bits], **special.get((kernel, bits), {})}
    if architecture not in rows:
        raise ValueError(
            f"{kernel}: has no tile on sm_{architecture}, only on "
            f"{', '.join(f'sm_{known}' for known in rows)}"
        )
    return rows[architecture]
