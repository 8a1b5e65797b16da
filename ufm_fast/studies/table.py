"""The table of a study: a row a cell, with its settings, its results and where they were computed.

Columns, in this order: cell; axes and derived values; the other settings that are not the default
in some cell; results; every metric by its own name; the environment. A cell that is not finished
has the outcome ``unfinished`` and no other result.
``resumed_at``: the step from which a broken cell went on, whose steps and evaluations may be others
than those of an undisturbed one (`worker`); empty where nothing broke it.
``symmetric``: of models with layers, whether the value is that of deep neural collapse.
What theory says of the largest cosine stands beside it: ``simplex_level`` -1/(K-1), which is
Welch's bound for K <= d + 1, and ``welch_level`` sqrt((K-d)/(d(K-1))) beyond.

table.csv is plain CSV with all digits; an absent number is an empty field. The Parquet file holds
the same columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import atomic, read_json, write_text
from ufm_fast.runs.options import SETTINGS
from ufm_fast.studies.cells import Cell
from ufm_fast.studies.folder import PARQUET, TABLE, StudyFolder

Row = dict[str, Any]

UNFINISHED = "unfinished"
#: Columns that two runs of one study differ in.
MEASURED = (
    "seconds",
    "seconds_per_evaluation",
    "peak_bytes",
    "peak_extra_bytes",
    "device_peak_bytes",
    "resumed_at",
)
_ALWAYS = ("loss", "lambda_w", "lambda_h", "dtype", "seed")
_PLAIN = ("value", "data_value", "outcome", "gradient_norm", "steps", "evaluations", "seconds")


def row_of(folder: StudyFolder, cell: Cell) -> Row:
    """The row of a cell, finished or not. Errors: InputError for a damaged run directory."""
    summary = folder.summary(cell)
    if summary is None:
        return {"cell": cell.name, **cell.columns, **cell.given, "outcome": UNFINISHED}
    config = RunDirectory.open(folder.cell(cell), "study").config
    given = {
        name: config.get(name, row.default)
        for name, row in SETTINGS.items()
        if name not in ("preset", "start_from")
    }
    changed = {
        name: value
        for name, value in given.items()
        if name in _ALWAYS or value != SETTINGS[name].default
    }
    sizes = {
        "classes": summary["classes"] if "classes" in summary else config["classes"],
        "dim": config["dim"],
    }
    settings = {
        **changed,
        **{name: cell.given[name] for name in cell.given if name != "start_from"},
        **sizes,
    }
    return {
        "cell": cell.name,
        **cell.columns,
        **settings,
        **_results(summary, given["layers"]),
        **(summary.get("metrics") or {}),
        **_environment(read_json(folder.cell(cell) / "environment.json", "study")),
    }


def _results(summary: Mapping[str, Any], layers: int) -> Row:
    from ufm_fast.theory.codes import simplex_level, welch_level

    certificate, theory, structure = (
        summary.get(name) or {} for name in ("certificate", "theory", "structure")
    )
    starts = summary.get("restarts") or ()
    evaluations, seconds, best = summary["evaluations"], summary["seconds"], summary["value"]
    found: Row = {name: summary[name] for name in _PLAIN}
    found |= {
        "seconds_per_evaluation": seconds / evaluations if evaluations else None,
        "samples": summary.get("samples"),
        "theory": theory.get("value"),
        "certificate": certificate.get("kind"),
        "certified": certificate.get("certified"),
        "lower_bound": certificate.get("lower_bound"),
        "relative_gap": certificate.get("relative_gap"),
        "spectral_ratio": certificate.get("spectral_ratio"),
        "structure": structure.get("name"),
        "symmetric": "deep neural collapse" in (structure.get("name") or "")
        if layers > 1
        else None,
        "starts": len(starts) or 1,
        "starts_at_best": sum(abs(start["value"] - best) <= 1e-8 * abs(best) for start in starts)
        if starts
        else 1,
        **{name: summary.get(name) for name in (*MEASURED[2:], "backend", "method")},
    }
    if summary.get("classes", 0) > 1 and "dim" in summary:
        K, d = summary["classes"], summary["dim"]
        found["simplex_level"] = simplex_level(K)
        found["welch_level"] = welch_level(K, d) if d < K - 1 else simplex_level(K)
    return found


def _environment(content: Mapping[str, Any]) -> Row:
    versions = content.get("versions") or {}
    return {
        "ufm_fast": versions.get("ufm-fast"),
        "python": versions.get("python"),
        "torch": versions.get("torch"),
        **{name: content.get(name) for name in ("platform", "machine", "device", "threads")},
    }


class Table:
    """The rows of a study's cells, each read once it is finished."""

    def __init__(self, folder: StudyFolder, cells: Sequence[Cell]) -> None:
        self.folder, self.cells = folder, cells
        self._finished: dict[str, Row] = {}

    def rows(self) -> list[Row]:
        """A row for each cell, in their order. Errors: InputError for a damaged run directory."""
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: Cell) -> Row:
        if cell.name not in self._finished:
            row = row_of(self.folder, cell)
            if row["outcome"] == UNFINISHED:
                return row
            self._finished[cell.name] = row
        return self._finished[cell.name]

    def write(self) -> list[Row]:
        """Write table.csv, and table.parquet where that can be; the rows. Errors: WriteError,
        InputError for a damaged run.

        Under the folder's lock, so that no shard lays an older table over a newer one.
        """
        with self.folder.locked():
            rows = self.rows()
            names = columns(rows, self.folder.study.varied)
            write_text(self.folder.path / TABLE, csv_text(rows, names))
            _write_parquet(self.folder, rows, names)
        return rows


def columns(rows: Sequence[Row], varied: Sequence[str]) -> list[str]:
    """The names of all columns in the order of the table, whatever order the cells were solved
    in.
    """
    first = ["cell", *varied]
    settings = [name for name in SETTINGS if name not in first and any(name in row for row in rows)]
    rest = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    return [
        *first,
        *settings,
        *(name for name in rest if name not in first and name not in SETTINGS),
    ]


def csv_text(rows: Sequence[Row], names: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_field(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _field(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "" if value is None else repr(value) if isinstance(value, float) else value


def _write_parquet(folder: StudyFolder, rows: Sequence[Row], names: Sequence[str]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    made = pyarrow.Table.from_pydict(  # type: ignore[attr-defined]
        {name: _column(pyarrow, [row.get(name) for row in rows]) for name in names}
    )
    with atomic(folder.path / PARQUET) as temporary:
        parquet.write_table(made, temporary)


def _column(pyarrow: Any, values: list[Any]) -> Any:
    """An Arrow array; values of several types as words."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1 or kinds & {list, tuple}:
        values = [None if value is None else str(_field(value)) for value in values]
    return pyarrow.array(values)


def read_rows(folder: StudyFolder) -> list[Row]:
    """The rows of a study that was begun, from its run directories."""
    from ufm_fast.studies.cells import chains

    return Table(folder, [cell for chain in chains(folder.study) for cell in chain]).rows()
