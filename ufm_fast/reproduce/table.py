"""The table of claims: every row of every paper's file. A new row is an entry of ROWS there; a new
paper a file, named here.
"""

from __future__ import annotations

from ufm_fast.reproduce import (
    dang2023,
    fang2021,
    garrod2024,
    glyphs,
    harun2025,
    hongling2023,
    jiang2023,
    li2023,
    rangamani2023,
    sukenik2024,
    thrampoulidis2022,
    tirer2022,
    tirer2022_layers,
    tirer2022_network,
    yaras2022,
    zhou2022,
    zhu2021,
)
from ufm_fast.reproduce.claim import Claim

_PAPERS = (
    tirer2022,
    tirer2022_layers,
    tirer2022_network,
    zhu2021,
    zhou2022,
    dang2023,
    garrod2024,
    sukenik2024,
    yaras2022,
    jiang2023,
    fang2021,
    hongling2023,
    thrampoulidis2022,
    li2023,
    rangamani2023,
    harun2025,
    glyphs,
)

#: Every claim by its name.
CLAIMS: dict[str, Claim] = {row.name: row for paper in _PAPERS for row in paper.ROWS}
