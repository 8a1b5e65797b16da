"""E a block of classes at a time, each multiplied while the cache holds it."""

import pytest
import torch
from kernel_cases import DEVICE, MARKS, Case, agree

from ufm_kernels import blocks, tiles
from ufm_kernels.off_target import off_target
from ufm_kernels.operands import MODES, empty_chunk, logit_operands

pytestmark = MARKS
SMALL = {"products": "library", "chunk_rows": 20, "block_bytes": 2 * 20 * blocks.STEP}


@pytest.fixture
def multiplied(monkeypatch):
    """Columns of E in each product that followed a block."""
    seen, plain = [], blocks.library_product
    monkeypatch.setattr(
        blocks,
        "library_product",
        lambda e, *others, **named: (seen.append(e.shape[1]), plain(e, *others, **named))[1],
    )
    return seen


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_block_by_block(multiplied, fresh, smoothing):
    case = Case(30, 601, 24, 3, "bf16")
    agree(case, *case.run(smoothing=smoothing, fresh=fresh, **SMALL), smoothing)
    assert multiplied == [256, 256, 89] * 2  # two chunks of rows


def test_several_targets_block_by_block():
    case = Case(21, 300, 16, 4, "bf16", targets=3)
    agree(case, *case.run(**SMALL), scale=5)


def test_a_chunk_with_a_row_that_overflows_is_formed_anew():
    case = Case(30, 601, 24, 5, "bf16")
    case.features[7] *= 400.0
    agree(case, *case.run(**SMALL))


def test_a_part_writes_its_columns_alone():
    case = Case(9, 300, 16, 6, "bf16", bias=False)
    H, W = logit_operands(case.features, case.weight, MODES["bf16"])
    E = empty_chunk(9, 300, MODES["bf16"], H.device).fill_(-1.0)
    arguments = H, W, None, torch.zeros(9, device=DEVICE), case.labels.int(), E
    options = {"passes": 1, "classes": 300}
    off_target(*arguments, **options, part=(64, 256) if DEVICE == "cpu" else (0, 256))
    written = (E != -1.0).any(0)
    assert written[64:256].all()
    assert not written[256:].any()
    with pytest.raises(ValueError, match="whole tiles"):
        off_target(*arguments, **options, part=(0, 100))


def test_the_table_of_blocks_decides_and_is_empty(monkeypatch, multiplied):
    assert tiles.BLOCKS == {}
    case = Case(30, 601, 24, 3, "bf16")
    _, whole = case.run(products="library", chunk_rows=20)
    assert multiplied == []
    monkeypatch.setitem(tiles.BLOCKS, "bf16", (24, SMALL["block_bytes"]))
    _, gradients = case.run(products="library", chunk_rows=20)
    assert multiplied
    for a, b in zip(gradients, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    asked = {"mode": "bf16", "rows": 4096, "who": "library"}
    monkeypatch.setitem(tiles.BLOCKS, "bf16", (128, 24 << 20))
    assert blocks.block_classes(None, columns=128, **asked) == 3072
    assert blocks.block_classes(None, columns=129, **asked) == 0  # too wide for the table
    assert blocks.block_classes(None, columns=64, **{**asked, "who": "triton"}) == 0
    assert blocks.block_classes(None, columns=64, **{**asked, "mode": "tf32"}) == 0
    assert blocks.block_classes(None, columns=64, **{**asked, "rows": 1 << 16}) == 0
