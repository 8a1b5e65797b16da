"""The figures of a run directory, from its log and its state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast import plots
from ufm_fast.errors import InputError
from ufm_fast.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor


def draw_run(run: RunDirectory) -> list[Path]:
    """Draw all figures into the run's plots/. Errors: InputError without matplotlib, or for a damaged run."""
    from ufm_fast.run_state import load_state, state_head

    records = run.records()
    if not records or not run.state_file.exists():
        raise InputError(f"run: {run.path} holds no log or no state to draw; solve it first")
    head = state_head(load_state(run)[0])
    figures = {"convergence": _convergence(records, run.summary or {})}
    if any("nc2_classifier" in record for record in records):
        figures["collapse"] = plots.new_figure(5.6, 4.0)
        plots.collapse_metrics(figures["collapse"].subplots(), records)
    assert head.W is not None
    matrices = {"classifier": head.W}
    if head.H is not None and head.labels is not None:
        matrices["class means"] = class_means(head.H, head.labels)
    figures |= {"gram": _gram(matrices), "geometry": _geometry(matrices)}
    try:
        run.plots.mkdir(exist_ok=True)
        return [path for name, figure in figures.items() for path in plots.save(figure, run.plots, name)]
    except OSError as error:
        raise InputError(f"run: can't write to {run.plots} ({error.strerror or error}); mend its permissions") from error


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Mean row of each class that has one, in ascending order of the labels."""
    import torch

    present, slot, number = torch.unique(labels, return_inverse=True, return_counts=True)
    total = torch.zeros(present.numel(), features.shape[1], dtype=torch.float64)
    total.index_add_(0, slot, features.double())
    total /= number[:, None]
    return total


def reference_value(records: list[dict[str, Any]], summary: dict[str, Any]) -> tuple[float, str]:
    """What the loss gap is measured from, and its name: theory, else a certified lower bound, else the lowest value seen."""
    theory, certificate = summary.get("theory"), summary.get("certificate") or {}
    if theory and theory.get("value") is not None:
        return float(theory["value"]), "theory"
    if certificate.get("certified") and certificate.get("lower_bound") is not None:
        return float(certificate["lower_bound"]), "lower bound"
    return min((float(record["value"]) for record in records if record["value"] is not None), default=0.0), "best value"


def _convergence(records: list[dict[str, Any]], summary: dict[str, Any]) -> Any:
    figure = plots.new_figure(8.6, 5.8)
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    reference, name = reference_value(records, summary)
    for column, against in enumerate(("step", "seconds")):
        plots.loss_gap(axes[0, column], records, reference, against=against)
        plots.gradient_norm(axes[1, column], records, against=against)
    axes[0, 0].set_ylabel(f"relative gap to the {name}")
    for ax in axes.flat:
        ax.label_outer()
    return figure


def _gram(matrices: dict[str, Tensor]) -> Any:
    W, means = matrices["classifier"], matrices.get("class means")
    # The cross cosines pair class k with class k: only where no class is empty.
    paired = means is not None and means.shape == W.shape
    panels: list[tuple[str, Any, Any]] = [("classifier", W - W.mean(0), None)]
    if means is not None:
        panels.append(("class means", means - means.mean(0), None))
    if paired and means is not None:
        panels.append(("classifier and means", W - W.mean(0), means - means.mean(0)))
    figure = plots.new_figure(4.2 * len(panels), 3.7)
    for ax, (title, left, right) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        plots.gram_heatmap(ax, left, right, title=title)
    return figure


def _geometry(matrices: dict[str, Tensor]) -> Any:
    figure = plots.new_figure(9.2, 3.8)
    left, right = figure.subplots(1, 2)
    plots.spectrum(left, matrices)
    plots.cosine_histogram(right, matrices)
    return figure
