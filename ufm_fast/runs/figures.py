"""The figures of a run directory, from its log and its state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast import plots
from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import sweep
from ufm_fast.runs.options import SETTINGS
from ufm_fast.runs.words import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def draw_run(run: RunDirectory) -> list[Path]:
    """Draw all figures into the run's plots/. Errors: InputError without matplotlib, or for a
    damaged run.
    """
    if run.plots.is_symlink():
        raise InputError(
            f"run: {run.plots} is a link to another place, where nothing is written; remove it"
        )
    with plots.paper_style():
        return save_figures(make_figures(run), run.plots, "run")


def are_drawn(run: RunDirectory) -> bool:
    """Whether all figures are there and no older than the run's result."""
    last = run.plots / (
        "geometry.pdf" if (run.summary or {}).get("reduce") == "groups" else "convergence.pdf"
    )
    return (
        last.exists() and last.stat().st_mtime_ns >= (run.path / "summary.json").stat().st_mtime_ns
    )


def make_figures(run: RunDirectory) -> dict[str, Figure]:
    """The figures of a run by name, the one of ``are_drawn`` last: where that is saved, so are the
    others.
    """
    from ufm_fast.runs.grouped import group_table, load_groups
    from ufm_fast.runs.state import run_head

    records = log_of(run)
    if not run.state_file.exists():
        raise InputError(f"run: {run.path} holds no state to draw; solve it first")
    grouped = load_groups(run)
    if grouped is not None:
        figure, axes = plots.panels(3)
        plots.against_frequency(axes, group_table(grouped))
        return {"geometry": plots.finish(figure)}
    head = run_head(run)
    figures = {}
    if any("nc1_pinv" in record or "nrc1" in record for record in records):
        figures["collapse"] = plots.new_figure(plots.PAGE, 3.2)
        plots.collapse_metrics(figures["collapse"].subplots(), records)
    if any("layer0/nc1_pinv" in record for record in records):
        figures["layers"] = _layers(records)
    assert head.W is not None
    matrices = {"classifier": head.W}
    if head.H is not None and head.labels is not None:
        matrices["class means"] = class_means(head.H, head.labels)
    several = head.W.shape[0] > 1  # of one output there are no angles
    if several and not is_zero(run.summary or {}):
        centred = (run.summary or {}).get("frame") != "orthogonal"
        figures |= {"gram": _gram(matrices, centred), "geometry": _geometry(matrices, centred)}
    figures["convergence"] = _convergence(records, run.summary or {})
    return {name: plots.finish(figure) for name, figure in figures.items()}


def _layers(records: list[dict[str, Any]]) -> Figure:
    """NC1 and NC2 of each layer's input, two panels."""
    figure, (left, right) = plots.panels(2)
    frame = any("layer0/nc2_means_frame" in record for record in records)
    ideal, name = ("orthogonal frame", "nc2_means_frame") if frame else ("simplex", "nc2_means")
    plots.layer_metric(left, records, "nc1_pinv", title="NC1")
    plots.layer_metric(right, records, name, title=f"NC2 to the {ideal}")
    for ax, what in ((left, "NC1 is zero throughout"), (right, "NC2 is not logged")):
        if not ax.lines:
            ax.set_axis_off()
            ax.text(0.5, 0.5, what, ha="center", va="center", color="0.4", transform=ax.transAxes)
    return figure


def save_figures(figures: dict[str, Figure], folder: Path, name: str) -> list[Path]:
    """Errors: InputError naming the argument ``name`` where the folder can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{name}: can't write to {folder} ({error.strerror or error}); mend its permissions"
        ) from error
    sweep(folder)
    return [path for stem, figure in figures.items() for path in plots.save(figure, folder, stem)]


def is_zero(summary: dict[str, Any]) -> bool:
    """Whether W was zero but for rounding, so that its directions are undefined: there is no
    geometry to draw.
    """
    metrics = summary.get("metrics") or {}
    return "nc2_classifier" in metrics and metrics["nc2_classifier"] is None


def log_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The run's log, which has something to draw. Errors: InputError for an empty log, or a record
    without a quantity.
    """
    records = run.records()
    if not records:
        raise InputError(f"run: {run.path} holds no log to draw; solve it first")
    for number, record in enumerate(records, 1):
        absent = [name for name in ("value", "gradient_norm", "seconds") if name not in record]
        if absent:
            raise InputError(
                f"run: line {number} of {run.path / 'metrics.jsonl'} has no {absent[0]}; the file "
                f"was damaged"
            )
    return records


def draw_together(runs: list[RunDirectory], folder: Path) -> list[Path]:
    """One figure of all runs in ``folder``: gap, gradient norm, NC1 to NC3. Runs that differ in
    their seed alone are a band.
    """
    with plots.paper_style():
        return save_figures({"compare": _comparison(runs)}, folder, "compare")


def _comparison(runs: list[RunDirectory]) -> Figure:
    groups: dict[str, list[RunDirectory]] = {}
    runs = list(
        {run.path.resolve(): run for run in runs}.values()
    )  # a run that is named twice counts once
    for run in runs:
        groups.setdefault(_key(run, but=("seed",)), []).append(run)
    references = shared_references(runs)
    figure = plots.new_figure(plots.PAGE, 4.6)
    from matplotlib.lines import Line2D

    axes = figure.subplots(2, 3).ravel()
    measured_from = " or ".join(dict.fromkeys(name for _, name in references.values()))
    titles = {
        "gap": f"relative gap to {measured_from}",
        "gradient_norm": "gradient norm",
        "nc1_pinv": "NC1",
        "nc2_classifier": "NC2, classifier",
        "nc2_means": "NC2, class means",
        "nc3": "NC3",
    }
    labels = _group_labels(list(groups.values()))
    for number, group in enumerate(groups.values()):
        logs = [_with_gap(run, references[_problem_key(run)][0]) for run in group]
        for ax, name in zip(axes, titles, strict=True):
            plots.band(ax, logs, name, style=number)
    for ax, title in zip(axes, titles.values(), strict=True):
        ax.set_ylabel(title)
        if not ax.lines:
            ax.set_axis_off()
            ax.text(
                0.5,
                0.5,
                f"{title}: zero or not logged",
                ha="center",
                va="center",
                color="0.4",
                transform=ax.transAxes,
            )
    handles = [
        Line2D([], [], label=label, **plots.line_style(number))
        for number, label in enumerate(labels)
    ]
    several = any(len(group) > 1 for group in groups.values())
    return plots.finish(
        figure, handles, "lines: medians, bands: least to most of the runs" if several else None
    )


def _settings(run: RunDirectory) -> dict[str, Any]:
    """A run's settings, where one that an older version lacks has its default."""
    return {name: row.default for name, row in SETTINGS.items()} | run.config


def _key(run: RunDirectory, but: tuple[str, ...]) -> str:
    return json.dumps(
        {name: value for name, value in _settings(run).items() if name not in but}, sort_keys=True
    )


def _problem_key(run: RunDirectory) -> str:
    """What runs of one problem have in common, however they were solved."""
    others = [name for name, row in SETTINGS.items() if row.to not in ("problem", "data")]
    return _key(run, but=(*others, "seed", "dtype", "device"))


def shared_references(runs: list[RunDirectory]) -> dict[str, tuple[float, str]]:
    """Of each problem what all its runs' gaps are measured from, and its name: theory, else the
    largest certified bound, else the lowest value of any of them.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for run in runs:
        found.setdefault(_problem_key(run), []).append(
            reference_value(log_of(run), run.summary or {})
        )
    chosen = {}
    for key, references in found.items():
        for name, best in (("theory", max), ("lower bound", max), ("best value", min)):
            values = [value for value, kind in references if kind == name]
            if values:
                chosen[key] = best(values), name
                break
    return chosen


def _with_gap(run: RunDirectory, reference: float) -> list[dict[str, Any]]:
    records, scale = log_of(run), abs(reference) or 1.0
    # NC2 and NC3 are logged against the frame that theory predicts; either is shown under the one
    # name.
    plain = [
        {name.removesuffix("_frame"): value for name, value in record.items()} for record in records
    ]
    return [
        {
            **record,
            "gap": None if record["value"] is None else (record["value"] - reference) / scale,
        }
        for record in plain
    ]


def _group_labels(groups: list[list[RunDirectory]]) -> list[str]:
    """What tells the groups apart: the settings that are not the same in all of them, and the
    number of seeds.
    """
    configs = [_settings(group[0]) for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if key != "seed")
    differing = [key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs)]
    labels = []
    for group in groups:
        words = [
            f"{key.replace('_', '-')} {_settings(group[0]).get(key)}" for key in differing
        ] or [group[0].path.name]
        seeds = len({run.config.get("seed") for run in group})
        several = (
            f" ({len(group)} runs)"
            if seeds < len(group)
            else f" ({seeds} seeds)"
            if seeds > 1
            else ""
        )
        labels.append(
            printable(", ".join(words) + several).replace("$", r"\$")
        )  # which would begin a formula
    return labels


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Mean row of each class that has one, in ascending order of the labels."""
    import torch

    present, slot, number = torch.unique(labels, return_inverse=True, return_counts=True)
    total = torch.zeros(present.numel(), features.shape[1], dtype=torch.float64)
    total.index_add_(0, slot, features.double())
    total /= number[:, None]
    return total


def reference_value(records: list[dict[str, Any]], summary: dict[str, Any]) -> tuple[float, str]:
    """What the loss gap is measured from, and its name: theory, else a certified lower bound, else
    the lowest value seen.
    """
    theory, certificate = summary.get("theory"), summary.get("certificate") or {}
    if theory and theory.get("value") is not None:
        return float(theory["value"]), "theory"
    if certificate.get("certified") and certificate.get("lower_bound") is not None:
        return float(certificate["lower_bound"]), "lower bound"
    return min(
        (float(record["value"]) for record in records if record["value"] is not None), default=0.0
    ), "best value"


def _convergence(records: list[dict[str, Any]], summary: dict[str, Any]) -> Any:
    figure = plots.new_figure(plots.PAGE, 4.4)
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    reference, name = reference_value(records, summary)
    for column, against in enumerate(("step", "seconds")):
        plots.loss_gap(axes[0, column], records, reference, against=against)
        plots.gradient_norm(axes[1, column], records, against=against)
    axes[0, 0].set_ylabel(f"relative gap to the {name}")
    for ax in axes.flat:
        ax.label_outer()
    return figure


def _gram(matrices: dict[str, Tensor], centred: bool) -> Any:
    matrices = {name: rows - rows.mean(0) if centred else rows for name, rows in matrices.items()}
    W, means = matrices["classifier"], matrices.get("class means")
    # The cross cosines pair class k with class k: only where no class is empty.
    paired = means is not None and means.shape == W.shape
    panels: list[tuple[str, Any, Any]] = [("classifier", W, None)]
    if means is not None:
        panels.append(("class means", means, None))
    if paired and means is not None:
        panels.append(("classifier and means", W, means))
    figure, axes = plots.panels(len(panels), 2.1)
    for ax, (title, left, right) in zip(axes, panels, strict=True):
        plots.gram_heatmap(ax, left, right, title=title)
    return figure


def _geometry(matrices: dict[str, Tensor], centred: bool) -> Any:
    figure, (left, right) = plots.panels(2, 2.8)
    plots.spectrum(left, matrices)
    plots.cosine_histogram(right, matrices, centred=centred)
    return figure
