"""The overlay of saved runs: of ``ufm-fast train``, with the last two layers of the extended model,
equal but for the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ufm_fast import plots
from ufm_fast.errors import InputError
from ufm_fast.networks.overlay import (
    Row,
    balanced_penalty,
    compare,
    has_tail,
    model_run,
    predicted,
    tail_of,
)
from ufm_fast.networks.overlay_figure import overlay_figure
from ufm_fast.networks.saved import TrainingRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Overlay:
    """``table``: of ``compare``. ``spectra``: of the first network and of its model by balance.
    ``figure``: both by step.
    """

    table: list[Row]
    spectra: dict[str, dict[str, list[float]]]
    figure: Figure


def overlay_of(paths: Sequence[Path], model_steps: int) -> Overlay:
    """Errors: InputError for a run of another kind, one that the model does not fit, one that
    differs in more than its seed.
    """
    runs = [_fitting(path) for path in paths]
    for run in runs[1:]:
        _same_but_for_the_seed(runs[0], run)
    decay = runs[0].training.options.weight_decay
    tails = [tail_of(run.training) for run in runs]
    table = compare(tails, decay)
    by_balance = predicted(tails[0], decay, balanced_penalty(tails[0], decay))
    with plots.paper_style():
        figure = overlay_figure(
            [run.run.records() for run in runs], model_run(tails[0], decay, model_steps), table
        )
    return Overlay(
        table, {"measured": tails[0].spectra(), "predicted": by_balance.spectra()}, figure
    )


def _fitting(path: Path) -> TrainingRun:
    run = TrainingRun.resume(path, "runs")
    options = run.training.options
    if options.loss != "mse" or not has_tail(run.training):
        raise InputError(
            f"runs: {path} is not of the extended model; train it with --loss mse --unbiased 2 "
            f"and a learned head"
        )
    if not options.weight_decay > 0:
        raise InputError(
            f"runs: {path} has no weight decay, which the model needs; train it with --weight-decay"
        )
    if run.training.step == 0 or any(
        "layer1/nc3_frame" not in record for record in run.run.records()
    ):
        raise InputError(f"runs: {path} has no log of its last two layers; train it anew")
    return run


def _same_but_for_the_seed(first: TrainingRun, other: TrainingRun) -> None:
    configs = [
        {name: value for name, value in run.run.config.items() if name != "seed"}
        for run in (first, other)
    ]
    names = [
        name for name in configs[0] | configs[1] if configs[0].get(name) != configs[1].get(name)
    ]
    if names:
        raise InputError(
            f"runs: {other.run.path} differs from {first.run.path} in {', '.join(names)}; overlay "
            f"them apart"
        )
