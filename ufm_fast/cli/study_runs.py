"""What ``ufm-fast study`` does; imported when it runs, since it imports torch."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
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
from ufm_fast.errors import InputError
from ufm_fast.runs.files import WriteError, first_line
from ufm_fast.runs.words import printable
from ufm_fast.studies import library, ready
from ufm_fast.studies.cells import Cell, problem_of
from ufm_fast.studies.figures import Fitted, draw_study
from ufm_fast.studies.folder import TABLE, StudyFolder, is_study
from ufm_fast.studies.predict import predict
from ufm_fast.studies.runner import Progress, Report, parse_shard, sharded
from ufm_fast.studies.show import SHOWN, check_column, finished, groups
from ufm_fast.studies.spec import Plot
from ufm_fast.studies.table import UNFINISHED, read_rows


def run(
    source: str,
    out: Path | None,
    jobs: int | None,
    shard: str | None,
    *,
    dry: bool,
    json: bool,
    quiet: bool,
    plots: bool = True,
) -> int:
    """Run a study, or print its cells; returns the exit code."""
    prepared = library.prepare(source)
    folder = out or library.default_folder(prepared.study)
    if dry:
        _print_cells(
            [cell for chain in sharded(prepared.chains, parse_shard(shard)) for cell in chain],
            json=json,
        )
        return OK
    with _bar(shown=not (json or quiet)) as show:
        result, progress = library.run(prepared, folder, jobs=jobs, shard=shard, report=show)
    if json:
        report.print_json(
            {
                "study": str(folder),
                "cells": progress.cells,
                "finished": progress.finished,
                "earlier": progress.earlier,
                "failed": result.failed,
                "interrupted": result.interrupted,
                "rows": result.rows,
            }
        )
    elif not quiet:
        _say_end(progress, folder)
    if result.interrupted:
        report.note(
            f"interrupted and saved; the same command goes on ({progress.finished} of "
            f"{progress.cells} cells finished)"
        )
        return TOLD
    if plots and all(row["outcome"] != UNFINISHED for row in result.rows):
        _draw(folder, silent=json or quiet)
    return NOT_CONVERGED if result.failed else OK


def _draw(folder: Path, *, silent: bool) -> None:
    """Figures are an extra of a study: what keeps them from being drawn is said, and is no
    failure.
    """
    try:
        paths, fits = draw_study(StudyFolder.open(folder))
    except (WriteError, OSError):  # a full disk, as at any other moment
        raise
    except Exception as error:  # matplotlib raises whatever a setting of its own leads it to
        report.note(f"no plots: {first_line(error)}")
        return
    if paths and not silent:
        print_figures(folder, paths, fits)


def print_figures(folder: Path, paths: Sequence[Path], fits: Sequence[Fitted]) -> None:
    """The slopes, and where the figures are."""
    for fit in fits:
        where = ", ".join(filter(None, (fit.panel, fit.label if fit.plot.lines else "")))
        print(
            f"{fit.plot.column} against {fit.plot.against}{' where ' if where else ''}{where}: "
            f"slope {fit.slope.words}"
        )
    print(printable(f"{folder}: {', '.join(str(path.relative_to(folder)) for path in paths)}"))


def _say_end(progress: Progress, folder: Path) -> None:
    if progress.failed:
        report.note(
            f"{len(progress.failed)} of {progress.cells} cells failed; the same command tries "
            f"them again"
        )
        report.note(f"why, with the trace: {folder / 'errors.log'}")
    done = f"{progress.finished} of {progress.cells} cells finished"
    earlier = f", {progress.earlier} of them before" if progress.earlier else ""
    print(f"{done}{earlier}; {printable(str(folder / TABLE))}")


# ---- while it runs


@contextmanager
def _bar(shown: bool) -> Iterator[Report | None]:
    """A bar over the cells with the remaining time, in 80 columns; without a terminal a line a
    cell.
    """
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
            bar.update(
                task, description=done, total=progress.cells, completed=_ended(progress), left=words
            )
            if cell is not None and cell.name in progress.failed:
                bar.console.print(_failure(progress, cell), markup=False, highlight=False)

        yield show


def _lines(progress: Progress, cell: Cell | None) -> None:
    if cell is None:
        return
    if cell.name in progress.failed:
        report.note(_failure(progress, cell))
    else:
        report.note(
            f"{_ended(progress)}/{progress.cells} {_short(cell.words, 50)}, {_remaining(progress)}"
        )


def _failure(progress: Progress, cell: Cell) -> str:
    return (
        f"cell {cell.name} ({_short(cell.words, 50)}) failed: "
        f"{printable(progress.failed[cell.name])}"
    )


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


# ---- before it runs


def _print_cells(cells: list[Cell], *, json: bool) -> None:
    """A row a cell: what it will take."""
    from ufm_fast.plan.notes import readable

    rows: list[dict[str, Any]] = []
    for cell in cells:
        found = predict(*problem_of(cell))
        rows.append(
            {
                "cell": cell.name,
                **cell.columns,
                "bytes": found.bytes,
                "seconds_per_evaluation": found.seconds_per_evaluation,
            }
        )
    if json:
        report.print_json({"cells": rows})
        return
    table = Table(title=f"{len(cells)} cells", title_justify="left", box=SIMPLE, pad_edge=False)
    names = list(dict.fromkeys(name for cell in cells for name in cell.columns))
    for header in ("cell", *names, "memory", "s / eval"):
        table.add_column(header, overflow="fold", no_wrap=header == "cell")
    for row in rows:
        values = (_word(row.get(name, "")) for name in names)
        table.add_row(
            row["cell"],
            *values,
            readable(row["bytes"]),
            report.number(row["seconds_per_evaluation"], 2),
        )
    Console().print(table)


def _word(value: Any) -> str:
    """A value of an axis in a table of 80 columns, where not all digits of a derived one fit."""
    return report.number(value) if isinstance(value, float) else _short(str(value), 20)


def plot(runs: Sequence[Path], compare: Path | None, named: Mapping[str, str | None]) -> bool:
    """Draw studies; whether ``runs`` are some. Errors: InputError for a mixture, and for flags of
    the other kind.
    """
    given = {name: value for name, value in named.items() if value is not None}
    studies = [path for path in runs if is_study(path)]
    if not studies and given:
        raise InputError(
            f"{next(iter(given))} is for studies, and {runs[0]} is the folder of none; drop it"
        )
    if studies and (len(studies) < len(runs) or compare is not None):
        raise InputError(
            f"runs: {studies[0]} is a study: draw it alone, without runs and --compare"
        )
    for path in studies:
        folder = StudyFolder.open(path)
        wanted = [_plot(given, folder.study.varied)] if given else []
        paths, fits = draw_study(folder, wanted)
        if not paths:
            raise InputError(
                f"study: no axis of {path} has numbers; say what is drawn with --column and "
                f"--against"
            )
        print_figures(path, paths, fits)
    return bool(studies)


def _plot(given: Mapping[str, str], varied: Sequence[str]) -> Plot:
    if not {"column", "against"} <= set(given):
        raise InputError("a figure of a study needs --column and --against")
    for name in ("lines", "across"):
        if given.get(name) not in (None, *varied):
            raise InputError(
                f"{name} = {given[name]!r} is no axis of the study; there are {', '.join(varied)}"
            )
    return Plot(f"{given['column']}-{given['against']}".replace("/", "-"), **given)


def show(path: Path, columns: str | None, *, json: bool) -> None:
    """Print the table of groups."""
    folder = StudyFolder.open(path)
    rows, varied = read_rows(folder), folder.study.varied
    names = list(SHOWN) if columns is None else [name.strip() for name in columns.split(",")]
    for name in names if columns is not None else names[:1]:
        check_column(rows, name)
    found = [(group, {name: group.mean(name) for name in names}) for group in groups(rows, varied)]
    if json:
        parts = [
            {**group.place, "seeds": len(group.rows)}
            | {name: value and {"mean": value[0], "std": value[1]} for name, value in means.items()}
            for group, means in found
        ]
        report.print_json(
            {"study": str(path), "groups": parts, "unfinished": len(rows) - len(finished(rows))}
        )
        return
    table = Table(box=SIMPLE, pad_edge=False)
    axes = [name for name in varied if name != "seed" and name not in folder.study.derived]
    for header in (*axes, "cells", *names):
        table.add_column(header, overflow="fold")
    for group, means in found:
        words = (_word(group.place[name]) for name in axes)
        table.add_row(*words, str(len(group.rows)), *(_spread(means[name]) for name in names))
    Console().print(table)
    left = len(rows) - len(finished(rows))
    print(
        "mean and, in brackets, standard deviation over seeds"
        + (f"; {left} cells are unfinished" if left else "")
    )


def _spread(value: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    mean, deviation = value
    return (
        report.number(mean)
        if deviation <= 1e-12 * abs(mean)
        else f"{report.number(mean)} ({report.number(deviation, 1)})"
    )


def list_ready(*, json: bool) -> None:
    """Print the ready studies."""
    titles = {name: ready.title(name) for name in ready.names()}
    if json:
        report.print_json(titles)
        return
    for name, title in titles.items():
        print(f"{name}: {title}")
