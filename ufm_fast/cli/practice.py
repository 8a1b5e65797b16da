"""The commands beside the model: flags of ``train``, ``overlay``, ``continual``, ``reproduce``;
practice_runs does the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ufm_fast.cli.flags import with_flags
from ufm_fast.runs.options import Setting

#: Settings of ``train``; their defaults are those of ``networks.Options`` and
#: ``networks.Architecture``.
TRAINING = (
    Setting("data", str, "digits", "digits | mnist5k | glyphs | digit-pairs"),
    Setting("least", int, 15, "Fonts that draw a character of glyphs, at least"),
    Setting("look_alikes", bool, True, "Keep glyphs that look exactly alike in some font"),
    Setting("model", str, "mlp", "mlp | cnn | cnn-bn (batch normalisation before each ReLU)"),
    Setting("widths", str, "128,128", "Widths of the hidden linear layers"),
    Setting("unbiased", int, 0, "Last linear layers without a bias, the head counted"),
    Setting("head", str, "learned", "learned | etf (a fixed simplex)"),
    Setting(
        "normalised",
        float,
        None,
        "Temperature t: unit features and classifier rows, logits t <w, h>",
    ),
    Setting("loss", str, "ce", "ce | mse | smoothing | focal | pick-all"),
    Setting("smoothing", float, 0.05, "Of the loss smoothing"),
    Setting("gamma", float, 3.0, "Of the loss focal"),
    Setting("optimiser", str, "sgd", "sgd (momentum 0.9) | adam"),
    Setting("schedule", str, "cosine", "Of the learning rate: cosine | constant"),
    Setting("learning_rate", float, 0.05, "Learning rate"),
    Setting("weight_decay", float, 5e-4, "lambda of lambda/2 |.|^2 on every trained parameter"),
    Setting("steps", int, 2000, "Steps"),
    Setting("batch", int, 128, "Images in a batch"),
    Setting("seed", int, 0, "Seed of split, start and batches"),
)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only")]


def register(app: typer.Typer) -> None:
    """Give the app its commands."""
    for command in (train, overlay, continual, reproduce):
        app.command()(command)


@with_flags(TRAINING)
def train(
    out: Annotated[
        Optional[Path], typer.Option(help="Run directory (default runs/DATA-MODEL-LOSS-HASH)")
    ] = None,
    resume: Annotated[Optional[Path], typer.Option(help="Go on with this run directory")] = None,
    json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Train a small network on data that ship in packages, and measure the collapse of its
    layers.
    """
    from ufm_fast.cli import practice_runs

    raise typer.Exit(practice_runs.train(given, out, resume, json=json, quiet=quiet))


def overlay(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Runs of train --loss mse --unbiased 2 that differ in their seed alone"
        ),
    ],
    model_steps: Annotated[
        int, typer.Option(help="Steps of the model's own descent, the dashed curves")
    ] = 1000,
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of the figure (default RUN/plots of the first)")
    ] = None,
    json: Json = False,
) -> None:
    """Model against network: the extended model beside the last two layers, predicted and measured
    (arXiv 2202.08087).
    """
    from ufm_fast.cli import practice_runs

    practice_runs.overlay(runs, out, model_steps, json=json)


def continual(
    loss: Annotated[str, typer.Option(help="mse | ce")] = "mse",
    seeds: Annotated[int, typer.Option(help="Number of seeds")] = 5,
    steps: Annotated[int, typer.Option(help="Steps on the first five digits")] = 1500,
    weight_decay: Annotated[
        float, typer.Option(help="lambda of lambda/2 |.|^2 on every parameter")
    ] = 5e-4,
    lam: Annotated[
        Optional[float],
        typer.Option(
            help="lambda of the least-squares head (default: the weight decay; the paper's code "
            "has .05)"
        ),
    ] = None,
    most_steps: Annotated[int, typer.Option(help="Give up after so many steps with all ten")] = 300,
    json: Json = False,
) -> None:
    """Five new digits for a network trained on five: loss, accuracy and steps by how the new rows
    begin (arXiv 2503.06385).
    """
    from ufm_fast.cli import practice_runs

    options = {"loss": loss, "steps": steps, "weight_decay": weight_decay}
    practice_runs.continual(options, seeds, lam, most_steps, json=json)


def reproduce(
    names: Annotated[list[str], typer.Argument(help="list, all, or names of claims")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer seeds and steps, tolerances that fit them")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for figures, tables and verdicts")] = Path(
        "runs/reproduce"
    ),
    json: Json = False,
) -> None:
    """Measure the papers' claims: a figure, a CSV and one line each. Exit code 1 if one fails;
    finished rows are skipped.
    """
    from ufm_fast.cli import practice_runs

    raise typer.Exit(practice_runs.reproduce(names, out, quick=quick, json=json))
