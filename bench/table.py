"""The long table of a machine, `results/MACHINE.csv`: a line a figure, with where it comes from.

    bench      the case of `python -m bench` that measured it
    case       what was measured: the settings, `N=4096; K=4096; d=512`
    contender  whose figure it is, where several did the same
    quantity, value, unit   `seconds`, `0.366`, `s`; the unit follows from the quantity's name
    note       a word on this line, for example why a contender has no figure
    machine, python, torch, versions, commit, date   versions: of other libraries, where they matter

Lines are only ever added: a later measurement stands below, with its commit and date.

    pandas.read_csv("bench/results/amd-epyc.csv").query("bench == 'head' & quantity == 'seconds'")
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

COLUMNS = (
    "bench", "case", "contender", "quantity", "value", "unit", "note",
    "machine", "python", "torch", "versions", "commit", "date",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
#: Word of a quantity's name -> its unit; a quantity "x_over_y", or without such a word, has none.
UNITS = {
    "seconds": "s", "ms": "ms", "GB": "GB", "MB": "MB", "MiB": "MiB", "mib": "MiB", "bytes": "B",
    "percent": "%", "parameters": "parameters", "second": "1/s", "GFLOP/s": "GFLOP/s",
    "tflops": "TFLOP/s",
}  # fmt: skip
#: What names a line of `gpu.py`'s own table; the contender, the note and where it ran beside.
_GPU_CASE = ("task", "N", "K", "d", "stage", "dtype", "chunk_rows")
_GPU_VERSIONS = ("capability", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
Line = dict[str, str]


class Record(NamedTuple):
    """What a case measured of one contender in one setting; a line a quantity."""

    case: Mapping[str, object]
    measured: Mapping[str, object]
    contender: str = ""
    note: str = ""


def unit(quantity: str) -> str:
    """The unit that a quantity's name tells, or nothing."""
    words = [] if "_over_" in quantity else re.split(r"[_ ]", quantity)
    return next((UNITS[word] for word in reversed(words) if word in UNITS), "")


def lines(bench: str, record: Record, environment: Mapping[str, str]) -> list[Line]:
    """The lines of a record; one without figures, where there is only a note."""
    where = {name: environment.get(name, "") for name in COLUMNS[-6:]}
    common = {
        "bench": bench,
        "case": "; ".join(f"{name}={value}" for name, value in record.case.items()),
        "contender": record.contender,
        "note": record.note,
        **where,
        "machine": machine(environment),
    }
    figures = [
        (name, str(value)) for name, value in record.measured.items() if value not in ("", None)
    ]
    return [
        {**common, "quantity": name, "value": value, "unit": unit(name)}
        for name, value in figures or [("", "")]
    ]


def add(path: Path, more: Iterable[Line]) -> None:
    """Add lines at the end of a table, which is begun where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerows(more)


def read(path: Path, bench: str) -> list[Record]:
    """The records of one case in a table, in order: neighbours of one setting, contender and place
    are one record.
    """
    found: list[Record] = []
    figures: dict[str, str] = {}
    last: tuple[str, ...] = ()
    with path.open(newline="", encoding="utf-8") as file:
        for line in (line for line in csv.DictReader(file) if line["bench"] == bench):
            key = tuple(line[name] for name in COLUMNS if name not in ("quantity", "value", "unit"))
            if key != last or line["quantity"] in figures:
                figures = {}
                case = dict(part.split("=", 1) for part in line["case"].split("; "))
                found.append(Record(case, figures, line["contender"], line["note"]))
            last = key
            figures[line["quantity"]] = line["value"]
    return found


def machine(environment: Mapping[str, str]) -> str:
    """`NVIDIA H200; Intel Xeon, 16 threads`: the device, where there is one, and the processor."""
    device = environment.get("device")
    return f"{device}; {environment['machine']}" if device else environment["machine"]


def path_of(machine: str) -> Path:
    """The table of a machine, by the name of its device or processor."""
    model = re.split(r"; |, \d+ threads", machine)[0]
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}.csv"


def gather(path: Path) -> list[Line]:
    """The lines of another long table, or of one of `gpu.py`, which holds a row a contender: what
    it goes on from.
    """
    found: list[Line] = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) == COLUMNS:
            return list(reader)
        for row in reader:
            versions = ", ".join(f"{name} {row[name]}" for name in _GPU_VERSIONS if row.get(name))
            where = {name: row[name] for name in ("machine", "device", "python", "torch", "commit")}
            where |= {"date": row["date"], "versions": versions}
            named = {"contender", "note", *_GPU_CASE, *_GPU_VERSIONS, *where}
            record = Record(
                {name: row[name] for name in _GPU_CASE if row.get(name)},
                {name: value for name, value in row.items() if name not in named},
                row["contender"],
                row.get("note", ""),
            )
            found += lines("gpu", record, where)
    return found
