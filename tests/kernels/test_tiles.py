"""The tables of tiles."""

import pytest
from kernel_cases import MARKS

from ufm_kernels.tiles import TILES, architecture_of

pytestmark = MARKS


def test_every_row_of_the_tile_table_serves_every_architecture():
    assert all(
        set(row) == ({90} if name.startswith("fp8") else {80, 90, 100})
        for (name, _), row in TILES.items()
    )
    assert [architecture_of(x) for x in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0))] == [
        80,
        80,
        90,
        100,
        80,
    ]
    with pytest.raises(ValueError, match=r"8\.0"):
        architecture_of((7, 5))
