"""The gallery's pictures: every claim in its quick setting, the PNGs copied to docs/figures.

    python docs/figures.py [NAME..]

Finished rows of runs/reproduce-quick are not measured anew.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ufm_fast.reproduce import chosen, reproduce

OUT = Path("runs/reproduce-quick")


def main(names: list[str]) -> None:
    target = Path(__file__).parent / "figures"
    target.mkdir(exist_ok=True)
    for verdict in reproduce(chosen(names or ["all"]), OUT, quick=True):
        print(verdict.line, f"({verdict.seconds:.1f} s)", flush=True)
        picture = OUT / verdict.name / f"{verdict.name}.png"
        if picture.exists():
            shutil.copy(picture, target)


if __name__ == "__main__":
    main(sys.argv[1:])
