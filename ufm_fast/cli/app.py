"""Commands, flags and exit codes: 0 converged or stalled at rounding, 3 not converged (saved), 2
bad input, 130 interrupted (saved if it had begun), 1 a test of doctor failed or the reader of a
pipe left.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ufm_fast.cli import practice, study
from ufm_fast.cli.flags import with_flags
from ufm_fast.cli.terminal import forgiving_stderr
from ufm_fast.errors import InputError
from ufm_fast.runs.options import SETTINGS
from ufm_fast.runs.words import printable

OK, FAILED, BAD_INPUT, NOT_CONVERGED, INTERRUPTED = 0, 1, 2, 3, 130
TOLD = -INTERRUPTED  # inside: an interrupt that its command has already spoken of

app = typer.Typer(
    name="ufm-fast",
    help="Solve unconstrained features models, prove how good the answer is, and measure its "
    "geometry.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help takes 0.15 s of imports: half of what --help may take
)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only")]
ConfigFile = Annotated[
    Optional[Path], typer.Option("--config", "-c", help="TOML file of settings; flags override it")
]
Pairwise = Annotated[
    str, typer.Option(help="Metrics over pairs of classes: auto | exact | sampled | none")
]


@app.command()
@with_flags(SETTINGS.values())
def solve(
    config: ConfigFile = None,
    out: Annotated[
        Optional[Path], typer.Option(help="Run directory (default runs/LOSS-K-d-HASH)")
    ] = None,
    resume: Annotated[Optional[Path], typer.Option(help="Go on with this run directory")] = None,
    json: Json = False,
    quiet: Quiet = False,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw figures at the end")
    ] = True,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Seconds by phase: logits, dH, dW, solver, metrics"),
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to RUN/tensorboard (needs the extra)")
    ] = False,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="Print the presets and stop")
    ] = False,
    **given: Any,
) -> None:
    """Solve a problem into a run directory. Without flags: a small balanced cross-entropy
    problem.
    """
    if list_presets:
        from ufm_fast.cli import commands

        commands.print_presets(json)
        return
    from ufm_fast.cli import solve as command

    shown = command.Shown(
        json=json, quiet=quiet, plots=plots, verbose=verbose, tensorboard=tensorboard
    )
    code = command.solve(given, config, out, resume, shown)
    raise typer.Exit(TOLD if code == INTERRUPTED else code)


@app.command()
def metrics(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run directory, or .npz / .safetensors with W, H, labels and optional b, counts"
        ),
    ],
    json: Json = False,
    pairwise: Pairwise = "auto",
    seed: Annotated[int, typer.Option(help="Seed of sampled metrics")] = 0,
) -> None:
    """Neural-collapse metrics of a run or of a saved head and features."""
    from ufm_fast.cli import commands

    commands.metrics(source, json=json, pairwise=pairwise, seed=seed)


_PLAN = ("preset", "method", "reduce", "history", "variables")
_PLANNED = [row for row in SETTINGS.values() if row.to in ("problem", "data") or row.name in _PLAN]


@app.command()
@with_flags(_PLANNED)
def plan(config: ConfigFile = None, json: Json = False, **given: Any) -> None:
    """Memory and time of a problem before running it."""
    from ufm_fast.cli import commands

    commands.plan(given, config, json=json)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or the folder of a study")],
    compare: Annotated[
        Path | None,
        typer.Option(help="Draw the runs together in this folder; equal but for the seed: a band"),
    ] = None,
    column: Annotated[
        Optional[str], typer.Option(help="Of a study: the column to draw (default: its figures)")
    ] = None,
    against: Annotated[
        Optional[str], typer.Option(help="Of a study: the axis to draw it against")
    ] = None,
    lines: Annotated[
        Optional[str], typer.Option(help="Of a study: the axis with a curve for each value")
    ] = None,
    across: Annotated[
        Optional[str], typer.Option(help="Of a study: the axis with a panel for each value")
    ] = None,
) -> None:
    """Draw the figures of runs into RUN/plots, as PNG and PDF, or all of them in one figure; or
    those of a study.
    """
    from ufm_fast.cli import commands, study_runs

    if not study_runs.plot(
        runs, compare, {"column": column, "against": against, "lines": lines, "across": across}
    ):
        commands.plot(runs, compare)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:0")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="One shape and few rounds: under a minute")
    ] = False,
    out: Annotated[Optional[Path], typer.Option(help="Folder for bench.json and bench.png")] = None,
    json: Json = False,
) -> None:
    """The claims of the README on this machine: heads, memory, solves and digits beside torch's
    own.
    """
    from ufm_fast.cli import bench as command

    command.bench(device=device, quick=quick, out=out, json=json)


@app.command()
def doctor(json: Json = False) -> None:
    """Versions, devices, backends and a self-test. Exit code 1 if a test fails."""
    from ufm_fast.cli import commands

    raise typer.Exit(OK if commands.doctor(json=json) else FAILED)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory")],
    format: Annotated[str, typer.Option("--format", help="npz | csv | parquet")] = "npz",
    out: Annotated[
        Optional[Path], typer.Option(help="Folder to write to (default RUN/export)")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a run's state and log in another format."""
    from ufm_fast.cli import commands

    commands.export(run, format, out, quiet=quiet)


@app.command()
def landscape(
    run: Annotated[Path, typer.Argument(help="Run directory")],
    json: Json = False,
    variables: Annotated[
        str, typer.Option(help="Variables of the Hessian: balanced | raw")
    ] = "balanced",
    max_products: Annotated[
        int, typer.Option(help="Most Hessian products; more raise the lower bound")
    ] = 200,
    tol: Annotated[
        float,
        typer.Option(help="Critical where the gradient's norm is at most this times its scale"),
    ] = 1e-6,
) -> None:
    """Smallest Hessian eigenvalue at a run's point: saddle, minimum, or neither."""
    from ufm_fast.cli.landscape import landscape

    landscape(run, json=json, variables=variables, max_products=max_products, tol=tol)


practice.register(app)
study.register(app)


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop")] = False,
) -> None:
    if version:
        from ufm_fast.version import __version__

        sys.stdout.write(f"ufm-fast {__version__}\n")
        raise typer.Exit(OK)
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
    elif context.invoked_subcommand != "solve" and os.environ.get("WORLD_SIZE", "1") != "1":
        _refuse_ranks(context.invoked_subcommand)


def _refuse_ranks(command: str) -> None:
    """Errors: InputError on a rank that torchrun started: each would do the whole of it."""
    from ufm_fast.runs.ranks import started

    if started():
        raise InputError(
            f"torchrun starts solve alone on several ranks; run ufm-fast {command} without it"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A user's mistake is one line on standard
    error.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, or by a desktop that has none
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a name that the terminal's encoding lacks is written with escapes
            stream.reconfigure(errors="backslashreplace")
    with forgiving_stderr():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, "ufm-fast", standalone_mode=False)
        if code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
    except InputError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        sys.stderr.close()
        return FAILED
    except (
        OSError
    ) as error:  # a full disk, a name that is too long: the machine's to mend, no traceback
        mend = (
            "; use a folder that can be written"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            else ""
        )
        if (
            error.errno == errno.ENOSPC
        ):  # while writing, of which the error says no more: a file of the run, or the answer
            mend = "; free some where the run (--out) and standard output go"
        return _fail(
            (
                f"{error.strerror}: {error.filename}"
                if error.filename
                else error.strerror or str(error)
            )
            + mend
        )
    except Exception as error:
        if isinstance(error, (RuntimeError, MemoryError)) and _out_of_memory(error):
            return _fail(
                "not enough memory for a problem of this size; ask ufm-fast plan, and make it "
                "smaller"
            )
        # Typer's own usage errors, whichever module its click comes from in this version.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        return _fail(message) if message else BAD_INPUT
    return INTERRUPTED if code == TOLD else int(code or OK)


def _out_of_memory(error: Exception) -> bool:
    from ufm_fast.memory import out_of_memory

    return out_of_memory(error)


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {printable(message)}\n")
    return BAD_INPUT
