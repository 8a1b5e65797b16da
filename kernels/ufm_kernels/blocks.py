"""E of a chunk a block of classes at a time, each multiplied by its classes while the L2 cache
holds it.

    for every block of classes:  E_b = exp(z_b - o),  sums += E_b W_b
    then:                        dH = factor * sums - targets

Three passes over E are its write, the read for dH and the read for dW; the second then comes from
the cache. The row factor needs the mass of the whole row, so it multiplies the finished sums, in
the epilogue that a library's product has anyway. A row whose exponentials overflow has its whole
chunk formed anew, and then its sums in one product, as a flag on the device says.

Count, bf16, (65536, 65536, 64), chunks of 16,384 rows: a pass over E is 8.6 GB. Three are 25.8 GB,
two 17.2, that is 5.4 ms and 3.6 at the 4.8 TB/s of an H200; the flops, 6 N K d = 1.6e12, stay. A
block of 24 MB is 768 classes, so 344 pairs of launches take the place of four, 4 MB of sums are
read and added to in each, and a product has a depth of 768: a step of 9.8 ms gains at most 1.8 and
loses what these cost. Undecided: `tiles.BLOCKS` has no row before a device has shown one faster,
and `bench/gpu.py` times both.
"""

from functools import partial

import torch
from torch import Tensor

from .library import library_product
from .off_target import off_target
from .products import add_product
from .tiles import blocks_for

STEP = 256  # classes: whole tiles of every kind


def block_classes(asked: int | None, mode: str, rows: int, columns: int, who: str) -> int:
    """Classes of a block of E of at most so many bytes (None: as the table in `tiles` says); 0: all
    at once.

    Only where the library forms dH, and where a block holds a step of the classes.
    """
    most = blocks_for(mode, columns) if asked is None else asked
    return most // (2 * rows) // STEP * STEP if mode == "bf16" and who == "library" else 0


def sweep_by_blocks(
    H: Tensor,
    W: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    labels: Tensor,
    E: Tensor,
    V: Tensor,
    columns: int,
    block: int,
    *,
    flag: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill E as `off_target` does: (its statistics, E V (rows, columns) in fp32).

    flag, into: of a second launch, which forms both anew where the flag is 1.
    """
    sweep = partial(off_target, H, W, bias, offset, labels, E, passes=1, classes=len(W))
    if into is not None and flag is not None:
        statistics, sums = into
        sweep(flag=flag, into=statistics)
        sums.masked_fill_(flag[0] == 1, 0.0)
        add_product(sums, E, V, passes=1, depth=len(V), flag=flag)
        return into
    statistics, sums = None, H.new_empty((len(H), columns), dtype=torch.float32)
    for first in range(0, E.shape[1], block):
        part = first, min(first + block, E.shape[1])
        statistics = sweep(part=part, into=statistics)
        of_block = slice(first, min(part[1], len(V)))
        library_product(E[:, of_block], V[of_block, :columns], sums, fresh=first == 0)
    return statistics, sums
