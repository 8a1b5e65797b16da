"""What ``ufm-fast study`` does; imported when it runs, since it imports torch."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ufm_fast.cli import report
from ufm_fast.cli.app import NOT_CONVERGED, OK, TOLD
from ufm_fast.runs.words import printable
from ufm_fast.studies import library, ready
from ufm_fast.studies.cells import Cell
from ufm_fast.studies.folder import TABLE
from ufm_fast.studies.predict import predict
from ufm_fast.studies.runner import Progress, Report, parse_shard, sharded


def run(
    source: str, out: Path | None, jobs: int | None, shard: str | None, *, dry: bool, json: bool, quiet: bool
) -> int:  # fmt: skip
    """Run a study, or print its cells; returns the exit code."""
    prepared = library.prepare(source)
    folder = out or library.default_folder(prepared.study)
    if dry:
        _print_cells([cell for chain in sharded(prepared.chains, parse_shard(shard)) for cell in chain], json=json)
        return OK
    with _bar(shown=not (json or quiet)) as show:
        result, progress = library.run(prepared, folder, jobs=jobs, shard=shard, report=show)
    if json:
        report.print_json(
            {"study": str(folder), "cells": progress.cells, "finished": progress.finished, "earlier": progress.earlier,
             "failed": result.failed, "interrupted": result.interrupted, "rows": result.rows}
        )  # fmt: skip
    elif not quiet:
        _say_end(progress, folder)
    if result.interrupted:
        report.note(f"interrupted and saved; the same command goes on ({progress.finished} of {progress.cells} cells finished)")
        return TOLD
    return NOT_CONVERGED if result.failed else OK


def _say_end(progress: Progress, folder: Path) -> None:
    if progress.failed:
        report.note(f"{len(progress.failed)} of {progress.cells} cells failed; the same command tries them again")
        report.note(f"why, with the trace: {folder / 'errors.log'}")
    done = f"{progress.finished} of {progress.cells} cells finished"
    earlier = f", {progress.earlier} of them before" if progress.earlier else ""
    print(f"{done}{earlier}; {printable(str(folder / TABLE))}")


# ---- while it runs ---------------------------------------------------------------------------------------------------


@contextmanager
def _bar(shown: bool) -> Iterator[Report | None]:
    """A bar over the cells with the remaining time, in 80 columns; without a terminal a line a cell."""
    console = Console(stderr=True)
    if not shown:
        yield None
        return
    if not console.is_terminal:
        yield _lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("cells", total=None, left="")

        def show(progress: Progress, cell: Cell | None) -> None:
            failed = f", {len(progress.failed)} failed" if progress.failed else ""
            done = f"{progress.finished} of {progress.cells} cells{failed}"
            words = _remaining(progress)
            bar.update(task, description=done, total=progress.cells, completed=_ended(progress), left=words)
            if cell is not None and cell.name in progress.failed:
                bar.console.print(_failure(progress, cell), markup=False, highlight=False)

        yield show


def _lines(progress: Progress, cell: Cell | None) -> None:
    if cell is None:
        return
    if cell.name in progress.failed:
        report.note(_failure(progress, cell))
    else:
        report.note(f"{_ended(progress)}/{progress.cells} {_short(cell.words, 50)}, {_remaining(progress)}")


def _failure(progress: Progress, cell: Cell) -> str:
    return f"cell {cell.name} ({_short(cell.words, 50)}) failed: {printable(progress.failed[cell.name])}"


def _ended(progress: Progress) -> int:
    return progress.finished + len(progress.failed)


def _remaining(progress: Progress) -> str:
    if progress.waiting:
        return f"waiting for {progress.waiting} that another process solves"
    seconds = progress.remaining
    return "" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} left"


def _short(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 2]}.."


# ---- before it runs --------------------------------------------------------------------------------------------------


def _print_cells(cells: list[Cell], *, json: bool) -> None:
    """A row a cell: what it will take."""
    from ufm_fast.plan import readable

    rows: list[dict[str, Any]] = []
    for cell in cells:
        found = predict(cell)
        rows.append(
            {"cell": cell.name, **cell.columns, "bytes": found.bytes, "seconds_per_evaluation": found.seconds_per_evaluation}
        )
    if json:
        report.print_json({"cells": rows})
        return
    table = Table(title=f"{len(cells)} cells", title_justify="left", box=SIMPLE, pad_edge=False)
    names = list(dict.fromkeys(name for cell in cells for name in cell.columns))
    for header in ("cell", *names, "memory", "s / eval"):
        table.add_column(header, overflow="fold", no_wrap=header == "cell")
    for row in rows:
        values = (_short(str(row.get(name, "")), 20) for name in names)
        table.add_row(row["cell"], *values, readable(row["bytes"]), report.number(row["seconds_per_evaluation"], 2))
    Console().print(table)


def list_ready(*, json: bool) -> None:
    """Print the ready studies."""
    titles = {name: ready.title(name) for name in ready.names()}
    if json:
        report.print_json(titles)
        return
    for name, title in titles.items():
        print(f"{name}: {title}")
