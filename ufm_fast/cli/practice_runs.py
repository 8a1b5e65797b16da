"""What ``train``, ``overlay``, ``continual`` and ``reproduce`` do; imported when one runs, since it
imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ufm_fast import reproduce as claims
from ufm_fast.arguments import whole
from ufm_fast.cli import report
from ufm_fast.cli.app import FAILED, OK, TOLD
from ufm_fast.cli.practice import TRAINING
from ufm_fast.errors import InputError
from ufm_fast.networks import load
from ufm_fast.networks.overlay_figure import MATCHINGS
from ufm_fast.networks.overlay_runs import overlay_of
from ufm_fast.networks.saved import Report, TrainingRun
from ufm_fast.networks.switch import OPTIONS, VARIANTS, Switch, switches
from ufm_fast.reproduce.common import median
from ufm_fast.runs.figures import save_figures


def train(
    given: Mapping[str, Any], out: Path | None, resume: Path | None, *, json: bool, quiet: bool
) -> int:
    """Train or go on; returns the exit code."""
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        if given or out is not None:
            raise InputError(
                f"resume takes no other setting, got {', '.join(given) or 'out'}; drop it or "
                f"train anew"
            )
        run = TrainingRun.resume(resume)
        if run.finished:
            summary = dict(run.run.summary or {})
            _show(run, summary, json=json, quiet=quiet)
            return OK
    else:
        run = TrainingRun.begin(
            {row.name: given.get(row.name, row.default) for row in TRAINING}, out
        )
    with _bar(run.training.options.steps, shown=not (json or quiet)) as bar:
        summary = run.execute(bar)
    _show(run, summary, json=json, quiet=quiet)
    if summary["outcome"] == "finished":
        return OK
    report.note(
        f"interrupted after {summary['steps']} steps and saved; go on with: ufm-fast train "
        f"--resume {run.run.path}"
    )
    return TOLD


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Report | None]:
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("step {task.completed:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("train", total=steps, loss="")
        yield lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3g}")


def _show(run: TrainingRun, summary: Mapping[str, Any], *, json: bool, quiet: bool) -> None:
    if json:
        report.print_json({**summary, "run": str(run.run.path), "config": run.run.config})
        return
    if quiet:
        return
    parts = Table(title=str(run.run.path), title_justify="left", title_style="bold")
    for header in ("", *summary["train"]):
        parts.add_column(header)
    for name in ("train", "test"):
        parts.add_row(name, *(report.number(value) for value in summary[name].values()))
    layers = Table(title="layers", title_justify="left")
    for header in ("", *(name.removeprefix("body.") for name in summary["layers"])):
        layers.add_column(header, no_wrap=True)
    for name in dict.fromkeys(name for layer in summary["layers"].values() for name in layer):
        layers.add_row(
            name, *(report.number(layer.get(name), 3) for layer in summary["layers"].values())
        )
    for table in (parts, layers):
        Console().print(table)


def overlay(paths: list[Path], out: Path | None, model_steps: int, *, json: bool) -> None:
    """Compare runs with the extended model, draw both, and print the table."""
    found = overlay_of(paths, whole(model_steps, "model_steps", 1))
    drawn = save_figures({"overlay": found.figure}, out or paths[0] / "plots", "out")
    if json:
        report.print_json(
            {
                "runs": [str(path) for path in paths],
                "rows": found.table,
                "spectra": found.spectra,
                "figures": [str(path) for path in drawn],
            }
        )
        return
    by_balance, by_gap = (report.number(found.table[0][name], 4) for name in MATCHINGS)
    title = (
        f"lambda_H = {by_balance} by balance, {by_gap} by gap; measured against the minimum of "
        f"the extended model"
    )
    table = Table(title=title, title_justify="left")
    for header in ("", "measured", "by balance", "ratio", "by gap", "ratio"):
        table.add_column(header, no_wrap=True)
    for row in found.table[1:]:
        columns = ("measured", "balance", "ratio, balance", "gap", "ratio, gap")
        table.add_row(row["quantity"], *(report.number(row[name], 3) for name in columns))
    Console().print(table)
    print(f"figure: {drawn[0]}")


def continual(
    given: Mapping[str, Any], seeds: int, lam: float | None, most_steps: int, *, json: bool
) -> None:
    """Print medians over the seeds; ``given`` are options of the training."""
    data = load("digits")
    rows: list[Switch] = []
    for seed in range(whole(seeds, "seeds", 1)):
        rows += switches(data, replace(OPTIONS, seed=seed, **given), lam=lam, most_steps=most_steps)
    if json:
        report.print_json({**given, "rows": [asdict(row) for row in rows]})
        return
    table = Table(
        title=f"five new digits, {given['loss']}: medians over {seeds} seeds", title_justify="left"
    )
    for header in (
        "rows of the new classes",
        "loss after the switch",
        "test accuracy then",
        "steps to learn",
    ):
        table.add_column(header)
    for name in VARIANTS:
        mine = [row for row in rows if row.variant == name]
        learned = [row.steps for row in mine if row.steps is not None]
        middle = median([row.loss for row in mine]), median([row.accuracy for row in mine])
        took = report.number(median(learned)) if len(learned) == len(mine) else "-"
        table.add_row(name, *(report.number(value, 3) for value in middle), took)
    Console().print(table)


def reproduce(names: list[str], out: Path, *, quick: bool, json: bool) -> int:
    """List claims or measure them; returns the exit code."""
    if names == ["list"]:
        _list(json=json)
        return OK
    failed, verdicts = False, []
    for verdict in claims.reproduce(claims.chosen(names), out, quick=quick):
        failed |= verdict.state == claims.FAIL
        verdicts.append(asdict(verdict))
        if not json:
            print(verdict.line, flush=True)
    if json:
        report.print_json({"out": str(out), "quick": quick, "verdicts": verdicts})
    return FAILED if failed else OK


def _list(*, json: bool) -> None:
    if json:
        report.print_json({name: _described(claim) for name, claim in claims.CLAIMS.items()})
        return
    for claim in claims.CLAIMS.values():
        print(
            f"{claim.name}  ({claim.paper}; {claim.seconds:g} s, quick "
            f"{claim.expected_seconds(quick=True):g} s)"
        )
        print(
            f"  {claim.claim}\n  the paper's: {claim.papers}\n  our choice: {claim.ours}\n  "
            f"quick: {claim.quick}"
        )
        for quantity in claim.quantities:
            if quantity.theory is not None:
                print(
                    f"  {quantity.name}: {quantity.theory:.15g} ({quantity.relation}, within "
                    f"{quantity.tolerance:g})"
                )
        print()


def _described(claim: claims.Claim) -> dict[str, Any]:
    return {name: value for name, value in asdict(claim).items() if name != "measure"}
