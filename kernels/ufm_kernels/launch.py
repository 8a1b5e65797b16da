"""How a kernel is launched: tile, grid and compile options for the device that holds the
operands.
"""

from dataclasses import dataclass
from functools import lru_cache, wraps

import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .primitives import Block, Head
from .tiles import Tile, architecture_of, tile_for


def ceil_div(total, size):
    """Blocks of `size` that hold `total`; triton's own takes microseconds on the host."""
    return -(-total // size)


def next_power_of_2(number):
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


def descriptor(matrix, block):
    """The host-side TMA descriptor of a row-major matrix whose tiles are `block` (zero outside the
    matrix).
    """
    stride = (
        matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]
    )  # torch leaves that of a single row at 1
    return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], list(block))


# A wrapped constant by its value and type (True is not 1): to wrap one takes microseconds.
_constant = lru_cache(maxsize=None, typed=True)(tl.constexpr)


def constants(*values):
    """The last members of a bundle of arguments: what a kernel is compiled for."""
    return map(_constant, values)


def head_of(bias, labels, unused, classes):
    """The bundle of bias (or None, for which ``unused`` stands) and labels (rows, targets)."""
    rows, targets = labels.shape
    known = constants(targets, bias is not None)
    return Head(unused if bias is None else bias, labels, rows, classes, *known)


def laid_out(*tensors):
    """Each tensor row by row in memory, as kernels read it: itself, or a copy where it is strided
    or expanded.
    """
    return tuple(x if x is None or x.is_contiguous() else x.contiguous() for x in tensors)


def check_written(**tensors):
    """ValueError for a tensor that a kernel writes and that is not contiguous."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name}: is written in place and must be contiguous")


def on_device(driver):
    """The driver with the device of its first argument current, where triton launches, and without
    autocast.
    """

    @wraps(driver)
    def run(*given, **named):
        first = given[0] if given else next(iter(named.values()))
        if not getattr(first, "is_cuda", False):
            return driver(*given, **named)
        import torch  # as one name: this runs before every launch

        if torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return run(*given, **named)
        if first.device.index == torch.cuda.current_device():
            return driver(*given, **named)
        with torch.cuda.device(first.device):
            return driver(*given, **named)

    return run


@dataclass(frozen=True)
class Launch:
    """A tile and the number of programs that are resident at once (0: one program a tile)."""

    tile: Tile
    resident: int = 0

    @classmethod
    def of(cls, kernel, operand, passes=1):
        """The table's launch of `kernel` for the dtype and device of `operand`; CPU tensors mean
        the interpreter.
        """
        bits = 8 * operand.element_size()
        if not operand.is_cuda:
            return cls(tile_for(kernel, bits, 0))
        from torch.cuda import get_device_properties

        properties = get_device_properties(operand.device)
        tile = tile_for(kernel, bits, architecture_of((properties.major, properties.minor)), passes)
        return cls(tile, tile.programs * properties.multi_processor_count if tile.tma else 0)

    def grid(self, tiles):
        """One program a tile, or as many as stay and walk over the tiles."""
        return (min(tiles, self.resident) if self.resident else tiles,)

    def options(self):
        """The keyword arguments of a tiled kernel."""
        tile = self.tile
        sizes = (tile.rows, tile.columns, tile.depth, tile.tma, tile.group)
        return {"block": Block(*constants(*sizes)), **self.compile_options()}

    def compile_options(self):
        """Warps and stages. fp fusion is asked for by name because a later triton turns it off."""
        return {
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "enable_fp_fusion": True,
        }
