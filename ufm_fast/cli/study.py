"""The flags of ``ufm-fast study``: FILE or NAME runs a study, ``show DIR`` and ``list`` are
commands below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from typer.core import TyperGroup

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else")
]


class _RunsByDefault(TyperGroup):
    """A first word that is no command is what ``run`` is to run."""

    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(cls=_RunsByDefault, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Give the app its commands."""
    app.add_typer(
        group,
        name="study",
        help="Many solves over axes of settings: study FILE | NAME; study show DIR; study list.",
    )


@group.command()
def run(
    source: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A study in TOML, or the name of a ready one")
    ],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of the study (default studies/NAME)")
    ] = None,
    jobs: Annotated[
        Optional[int],
        typer.Option(
            help="Cells at a time, each in a process of its own (default: what the study says, "
            "else 1)"
        ),
    ] = None,
    shard: Annotated[
        Optional[str], typer.Option(metavar="i/n", help="The i-th of n parts, for job arrays")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells with predicted memory and time only")
    ] = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only")] = False,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw figures once all cells are finished")
    ] = True,
) -> None:
    """Run a study, or go on with one. Exit code 0: all cells finished; 3: some failed; 130:
    stopped, and saved.
    """
    from ufm_fast.cli import study_runs

    raise typer.Exit(
        study_runs.run(source, out, jobs, shard, dry=dry_run, json=json, quiet=quiet, plots=plots)
    )


@group.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a study")],
    columns: Annotated[Optional[str], typer.Option(help="Columns of the table: a,b,c")] = None,
    json: Json = False,
) -> None:
    """Mean and standard deviation over seeds, of the best over starts."""
    from ufm_fast.cli import study_runs

    study_runs.show(folder, columns, json=json)


@group.command("list")
def list_ready(json: Json = False) -> None:
    """The studies that ship with the package."""
    from ufm_fast.cli import study_runs

    study_runs.list_ready(json=json)
