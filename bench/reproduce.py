"""Every claim of ``ufm-fast reproduce``, one after the other: verdict, seconds on the clock and of
the processor.

    python -m bench reproduce [--quick] [--folder runs/reproduce] [--out FILE.csv] [NAME..]

Rows that are finished in the folder are not measured anew, so a run that was stopped goes on. On a
shared machine the clock tells of its other users: compare ``cpu_seconds``, of one thread. Results:
the machine's table in results/, the full settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ufm_fast.reproduce import chosen, reproduce
from ufm_fast.reproduce.runner import Verdict


def row_of(verdict: Verdict) -> dict[str, Any]:
    """What the table has of a verdict: the quantity nearest to failing, and what it took."""
    columns = ("name", "state", "quantity", "measured", "theory", "deviation")
    row = {name: getattr(verdict, name) for name in columns}
    return {**row, "seconds": f"{verdict.seconds:.1f}", "cpu_seconds": f"{verdict.cpu_seconds:.1f}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for verdict in reproduce(chosen(args.names or ["all"]), args.folder, quick=args.quick):
        print(f"{verdict.line} ({verdict.cpu_seconds:.1f} s of the processor)", flush=True)
        rows.append(row_of(verdict))
    total = {
        name: f"{sum(float(row[name]) for row in rows):.0f}" for name in ("seconds", "cpu_seconds")
    }
    print(f"in all {total['cpu_seconds']} s of the processor, {total['seconds']} s on the clock")
    if args.out is not None:
        from measure import environment
        from table import Record, add, lines

        for row in [*rows, *([] if args.names else [{"name": "in all", **total}])]:
            record = Record({"name": row.pop("name")}, row)
            add(args.out, lines("reproduce", record, environment()))


if __name__ == "__main__":
    main()
