"""The ready studies' results in the docs: each is run (or gone on with), its table and figures
copied here.

python docs/studies_figures.py NAME.. [--jobs N]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ufm_fast.studies import library
from ufm_fast.studies.figures import draw_study
from ufm_fast.studies.folder import TABLE, StudyFolder

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    for name in args.names:
        result = library.study(name, jobs=args.jobs)
        assert not result.failed, result.failed
        (HERE / "studies").mkdir(exist_ok=True)
        shutil.copy(result.path / TABLE, HERE / "studies" / f"{name}.csv")
        for path in draw_study(StudyFolder.open(result.path))[0]:
            if path.suffix == ".png":
                shutil.copy(path, HERE / "figures" / f"study-{name}-{path.name}")


if __name__ == "__main__":
    main()
