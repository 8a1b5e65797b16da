"""A build of the compile gate, and the words that its tables are written in."""

from dataclasses import dataclass, field

from .tiles import Tile


@dataclass(frozen=True)
class Build:
    """One kernel with one set of types and constants. `types` maps runtime arguments to triton type
    strings.
    """

    name: str
    kernel: str
    architecture: int
    tile: Tile
    types: dict[str, str]
    constants: dict[str, object]
    tensor_core: str = ""
    aligned: tuple[str, ...] = field(
        default=(
            "depth",
            "columns",
            "width",
            "span",
            "stride",
            "stride_a",
            "stride_b",
        )
    )


def typed(kind: str, names: str) -> dict[str, str]:
    """Arguments of one type."""
    return dict.fromkeys(names.split(), kind)


def described(element: str, tile: Tile, block: tuple[int, int]) -> str:
    """The type of a matrix argument: a descriptor with its block, or a pointer."""
    return f"tensordesc<{element}[{block[0]}, {block[1]}]>" if tile.tma else f"*{element}"


def blocks(tile: Tile) -> dict[str, object]:
    """The constants of a tiled kernel."""
    return {
        "HEIGHT": tile.rows,
        "WIDTH": tile.columns,
        "DEPTH": tile.depth,
        "TMA": tile.tma,
        "GROUP": tile.group,
    }
