"""Figures of runs. Each function draws on the axes that it is given and returns them; nothing touches pyplot.

Data come as plain numbers: ``records`` is a run's log (a list of flat dictionaries), matrices are tensors or arrays
with a row for each class.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ufm_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

#: Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LABELS = {
    "nc1_pinv": "NC1  tr(Σ$_W$Σ$_B^+$)/K",
    "nc2_classifier": "NC2  classifier",
    "nc2_means": "NC2  class means",
    "nc3": "NC3  self-duality",
    "nc2_classifier_frame": "NC2  classifier, orthogonal frame",
    "nc2_means_frame": "NC2  class means, orthogonal frame",
    "nc3_frame": "NC3  self-duality, orthogonal frame",
    "nrc1": "NRC1  features beside their components",
    "nrc2": "NRC2  features beside the rows of W",
    "nrc3": "NRC3  W against the targets' covariance",
    "nc4": "NC4  share predicted unlike the nearest mean",
}
#: One colour for one quantity, in every figure.
QUANTITY_COLOURS = {
    "gap": "0.35", "relative_gap": "0.35", "nc1_pinv": COLOURS[0], "nc1_quotient": COLOURS[0], "nc2_classifier": COLOURS[1],
    "nc2_classifier_frame": COLOURS[1], "nc2_means": COLOURS[2], "nc2_means_frame": COLOURS[2], "nc3": COLOURS[3],
    "nc3_frame": COLOURS[3], "self_duality_uncentred": COLOURS[3], "nc4": COLOURS[4], "nrc1": COLOURS[0], "nrc2": COLOURS[1],
    "nrc3": COLOURS[3],
}  # fmt: skip
_BLOCKS = 200
_LARGEST = 1e100  # a diverged run would stretch an axis beyond what it can label
_PAIRS = 200_000
_ROUNDING = 1e-12


@contextmanager
def paper_style() -> Iterator[None]:
    """Text of eight points for figures of one or two columns; what is drawn and saved inside has it. Nothing stays set.

    Errors: InputError without matplotlib.
    """
    _import_matplotlib()
    import matplotlib

    sizes: dict[Any, Any] = {"font.size": 8.0, "axes.titlesize": 8.0, "lines.markersize": 4.0}
    sizes |= {name: 7.0 for name in ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")}
    with style(), matplotlib.rc_context(sizes):
        yield


def new_figure(width: float = 5.2, height: float = 3.8) -> Figure:
    """A figure with an Agg canvas that no global state knows of. Errors: InputError without matplotlib."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _import_matplotlib() -> None:
    """Import it, also where MPLBACKEND, of which our figures make no use, names a backend that this environment has not: a
    notebook's shell commands inherit the notebook's. Errors: InputError without matplotlib.
    """
    first = "matplotlib" not in sys.modules
    inherited = os.environ.pop("MPLBACKEND", None) if first else None
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'ufm-fast[plot]'") from error
    finally:
        if inherited is not None:
            os.environ["MPLBACKEND"] = inherited
    if inherited:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = inherited


@contextmanager
def style() -> Iterator[None]:
    """Settings that our figures need whatever the user's: fonts as outlines that every reader and press takes (no Type 3), and
    labels that are not TeX.
    """
    _import_matplotlib()
    from matplotlib import rc_context

    with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "text.usetex": False}):
        yield


# ---- convergence -----------------------------------------------------------------------------------------------------


def loss_gap(ax: Axes, records: Records, reference: float, *, against: str = "step", label: str | None = None) -> Axes:
    """(f - reference)/reference against ``step`` or ``seconds``; points at or below rounding are left out.

    ``reference``: the theory value, the certificate's lower bound, or the best value seen.
    """
    scale = abs(reference) or 1.0
    values = [(record["value"] - reference) / scale for record in records if record["value"] is not None]
    places = [record[against] for record in records if record["value"] is not None]
    return _curve(ax, places, _beyond_rounding(values), against, "relative gap  $(f - f^*)/f^*$", label)


def gradient_norm(ax: Axes, records: Records, *, against: str = "step", label: str | None = None) -> Axes:
    """Gradient norm in the solver's variables against ``step`` or ``seconds``."""
    places = [record[against] for record in records]
    return _curve(ax, places, [record["gradient_norm"] for record in records], against, "gradient norm", label)


def collapse_metrics(ax: Axes, records: Records) -> Axes:
    """NC1-NC4 against step, as far as the log holds them and a logarithmic axis shows them; NC4 as its distance from 1."""
    for name, text in _LABELS.items():
        found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if name == "nc4":
            found = [(step, 1.0 - value) for step, value in found]
        values = _beyond_rounding([value for _, value in found])
        if any(map(_shown, values)):
            _curve(ax, [step for step, _ in found], values, "step", "distance from collapse", text)
    if ax.lines:
        ax.legend(frameon=False, fontsize="small")
    return ax


def layer_metric(ax: Axes, records: Records, name: str, *, title: str) -> Axes:
    """A metric of each layer's input against step, ``layer0/name`` of H first: a curve a layer, from light to dark."""
    import matplotlib

    keys: list[str] = []
    while any(f"layer{len(keys)}/{name}" in record for record in records):
        keys.append(f"layer{len(keys)}/{name}")
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 0.95, max(len(keys), 1)))
    for j, key in enumerate(keys):
        label = "H" if j == 0 else f"after layer {j}"
        _curve(ax, [record["step"] for record in records], [record.get(key) for record in records], "step", title, label)
        ax.lines[-1].set_color(shades[j])
        ax.lines[-1].set_linestyle("-")
    if ax.lines:
        ax.legend(frameon=False, fontsize="small")
    return ax


def _curve(
    ax: Axes, places: Sequence[float], values: Sequence[float | None], against: str, title: str, label: str | None,
    style: int | None = None,
) -> Axes:  # fmt: skip
    kept = [(x, y) for x, y in zip(places, values, strict=True) if _shown(y)]
    x, y = [place for place, _ in kept], [value for _, value in kept]
    marker = "o" if len(x) <= 80 else ""
    ax.plot(x, y, **line_style(len(ax.lines) if style is None else style), marker=marker, markersize=3, label=label)
    ax.set_yscale("log")
    if against == "step":
        _fit_steps(ax)
    ax.set_xlabel("seconds" if against == "seconds" else "step")
    ax.set_ylabel(title)
    return _plain(ax)


def _fit_steps(ax: Axes) -> None:
    """Steps logarithmic from 10 on where there are many, and none of any curve out of sight, on axes that share theirs too."""
    together = ax.get_shared_x_axes().get_siblings(ax)
    last = max((float(x) for one in together for line in one.lines for x in np.asarray(line.get_xdata())), default=0.0)
    if last > 200:
        ax.set_xscale("symlog", linthresh=10)
        ax.set_xlim(-1, 1.15 * last)


def _beyond_rounding(values: Sequence[float | None]) -> list[float | None]:
    """What is zero but for rounding would be drawn as a trend."""
    return [None if value is not None and value < _ROUNDING else value for value in values]


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the curve of that number: after six colours the dashes change."""
    dashes = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes, "linewidth": 1.5}


def band(
    ax: Axes, runs: Sequence[Records], name: str, *, against: str = "step", label: str | None = None, style: int | None = None
) -> Axes:
    """Quantity ``name`` of the logs of several runs that differ in their seed: the median, and a band from least to most.

    Logs are read at the places of their union, by interpolation of the logarithm, as far as half of the runs go.
    ``style``: the number of the curve for ``line_style``, where the axes do not hold all curves; else the next one.
    """
    curves = [curve for records in runs if (curve := _logarithms(records, name, against))[0]]
    ends = sorted((x[-1] for x, _ in curves), reverse=True)
    places = sorted({place for x, _ in curves for place in x if place <= ends[(len(ends) - 1) // 2]})
    rows = [np.interp(places, x, y, left=math.nan, right=math.nan) for x, y in curves]
    if not rows:
        return ax
    table = np.exp(np.stack(rows))
    middle = np.nanmedian(table, axis=0)
    before = len(ax.lines)
    _curve(ax, places, [float(value) for value in middle], against, name, label, style)
    if len(rows) > 1:
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
        ax.fill_between(places, low, high, color=ax.lines[before].get_color(), alpha=0.2, linewidth=0)
    return ax


def _logarithms(records: Records, name: str, against: str) -> tuple[list[float], list[float]]:
    values = [record.get(name) for record in records]
    if name != "gradient_norm":  # which is small where penalties are
        values = _beyond_rounding(values)
    kept = [(record[against], math.log(y)) for record, y in zip(records, values, strict=True) if _shown(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _shown(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic axis can show the value."""
    return value is not None and 0 < value < _LARGEST


def _whole_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


def _plain(ax: Axes) -> Axes:
    ax.set_axisbelow(True)
    ax.grid(True, which="major", color="0.9", linewidth=0.8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


# ---- geometry --------------------------------------------------------------------------------------------------------


def gram_heatmap(ax: Axes, left: Any, right: Any | None = None, *, title: str = "", blocks: int = _BLOCKS) -> Axes:
    """Cosines of the rows of ``left`` with those of ``right`` (default: itself), averaged over blocks of classes.

    Beyond ``blocks`` classes a cell is the mean over a block of pairs, from the block sums of unit rows: never K x K.
    """
    from matplotlib.ticker import ScalarFormatter

    first, second = _unit(left), _unit(left if right is None else right)
    edges = _edges(first.shape[0], blocks)
    image = (_block_means(first, edges) @ _block_means(second, edges).T).numpy()
    K = first.shape[0]
    # Means over blocks are small: they get a scale of their own.
    bound = 1.0 if len(edges) - 1 == K else max(float(np.abs(image).max()), 1e-12)
    shown = ax.imshow(image, cmap="RdBu_r", vmin=-bound, vmax=bound, extent=(0, K, K, 0), interpolation="nearest")
    short = ScalarFormatter()
    short.set_powerlimits((-1, 1))  # labels that a figure of several has room for
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.03, format=short)
    bar.outline.set_visible(False)
    width = math.ceil(K / (len(edges) - 1))
    ax.set_title(title if width == 1 else f"{title}\n(means of {width} x {width} blocks)", fontsize="medium")
    for axis in (ax.xaxis, ax.yaxis):
        _whole_ticks(axis)
        axis.set_label_text("class")
    return ax


def spectrum(ax: Axes, matrices: Mapping[str, Any]) -> Axes:
    """Singular values of each named matrix, divided by its largest, in descending order."""
    ax.set_yscale("log")
    for index, (label, matrix) in enumerate(matrices.items()):
        values = _singular_values(_rows(matrix))
        values = values[values > 0] / values[0]
        marker = "os^v"[index % 4] if values.numel() <= 80 else ""
        style: dict[str, Any] = {"color": COLOURS[index], "marker": marker, "markersize": 5 - 2 * min(index, 1)}
        face = "none" if index == 0 else COLOURS[index]
        ax.plot(range(1, values.numel() + 1), values.numpy(), label=label, linewidth=1.2, markerfacecolor=face, **style)
    # Singular values that are zero but for rounding would stretch the axis to 1e-300.
    lowest = min((float(y) for line in ax.lines for y in np.asarray(line.get_ydata()) if y > 1e-16), default=1e-16)
    ax.set_ylim(min(lowest / 3, 0.1), 3)
    ax.set_xlabel("index")
    ax.set_ylabel("singular value / largest")
    _whole_ticks(ax.xaxis)
    _plain(ax)
    ax.legend(frameon=False, fontsize="small")
    return ax


def cosine_histogram(
    ax: Axes, matrices: Mapping[str, Any], *, pairs: int = _PAIRS, seed: int = 0, centred: bool = True
) -> Axes:
    """Cosines of pairs of rows, about their mean row or not; random pairs where there are many.

    Lines show the simplex's -1/(K-1) and, where K rows are too many for a simplex in R^d, Welch's bound on the largest;
    without centring the orthogonal frame's 0.
    """
    from matplotlib.ticker import MaxNLocator

    found = {label: pair_cosines(_rows(matrix), pairs, seed, centred) for label, matrix in matrices.items()}
    K, d = max(_rows(matrix).shape for matrix in matrices.values())
    ideal = -1.0 / (K - 1) if centred else 0.0
    lines = {f"$-1/(K-1) = {ideal:.4g}$" if centred else "orthogonal": ideal}
    if d < K - 1 and centred:
        welch = math.sqrt((K - d) / (d * (K - 1)))
        lines[f"Welch's bound = {welch:.4g}"] = welch
    everything = np.concatenate([*found.values(), list(lines.values())])
    low, high = float(everything.min()), float(everything.max())
    margin = max(0.05 * (high - low), 0.02 * abs(ideal), 1e-6)
    bins = np.linspace(low - margin, high + margin, 61)
    for index, (label, values) in enumerate(found.items()):
        filled = {"histtype": "stepfilled", "alpha": 0.35} if index == 0 else {"histtype": "step", "linewidth": 1.6}
        ax.hist(values, bins=bins, color=COLOURS[index], label=label, **filled)  # type: ignore[arg-type]
    for (label, place), style in zip(lines.items(), ("--", ":"), strict=False):
        ax.axvline(place, color="0.2", linestyle=style, linewidth=1.2, label=label)
    ax.set_xlabel("cosine of a pair of classes" + ", centred" * centred)
    ax.set_ylabel("pairs")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))  # near collapse labels have many digits
    _plain(ax)
    ax.legend(frameon=False, fontsize="small")
    return ax


def against_frequency(axes: Sequence[Axes], table: Mapping[str, Any]) -> Sequence[Axes]:
    """Norms, cosines and loss of classes against their number of samples, on three axes.

    ``table``: a column, one entry a group, for each of count, classifier_norm, mean_norm, classifier_cosine, self_duality,
    loss.
    """
    norms, cosines, losses = axes
    for ax, names, label in (
        (norms, {"classifier_norm": "classifier", "mean_norm": "class mean"}, "norm"),
        (cosines, {"classifier_cosine": "two rows of equal count", "self_duality": "row and class mean"}, "cosine"),
        (losses, {"loss": "loss"}, "loss of a sample"),
    ):
        for colour, (name, text) in zip(COLOURS, names.items(), strict=False):
            seen = (table["count"] > 0) & np.isfinite(table[name])
            ax.plot(table["count"][seen], table[name][seen], ".-", color=colour, label=text, markersize=4, linewidth=1)
        if bool((table["count"] > 0).any()):
            ax.set_xscale("log")
        ax.set_xlabel("samples of the class")
        ax.set_ylabel(label)
        if len(names) > 1:
            ax.legend(frameon=False, fontsize="small")
        _plain(ax)
    return axes


def pair_cosines(
    rows: Tensor, pairs: int = _PAIRS, seed: int = 0, centred: bool = True
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Cosines of all pairs of (centred) rows, or of ``pairs`` random ones where there are more."""
    unit = _unit(rows - rows.mean(0) if centred else rows)
    K = unit.shape[0]
    if K * (K - 1) // 2 <= pairs:  # noqa: SIM300
        first, second = torch.triu_indices(K, K, 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(K, (pairs,), generator=generator)
        second = (first + torch.randint(1, K, (pairs,), generator=generator)) % K
    parts = zip(first.split(1 << 15), second.split(1 << 15), strict=True)
    cosines = torch.cat([(unit[a] * unit[b]).sum(1) for a, b in parts])
    return np.asarray(cosines[torch.isfinite(cosines)].numpy())


def _rows(matrix: Any) -> Tensor:
    return torch.as_tensor(matrix).detach().cpu().double()


def _unit(matrix: Any) -> Tensor:
    rows = _rows(matrix)
    rows = rows / rows.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # squares of a diverged run overflow
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(torch.finfo(torch.float64).tiny)


def _edges(K: int, blocks: int) -> list[int]:
    number = min(K, blocks)
    return [K * i // number for i in range(number + 1)]


def _block_means(rows: Tensor, edges: list[int]) -> Tensor:
    return torch.stack([rows[a:b].mean(0) for a, b in itertools.pairwise(edges)])


def _singular_values(rows: Tensor) -> Tensor:
    from ufm_fast.metrics import RowMatrix

    values: Tensor = RowMatrix.of(rows).raw.singular_values
    return values[: min(rows.shape)]


# ---- files -----------------------------------------------------------------------------------------------------------


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name``.png and ``name``.pdf, each whole or not at all."""

    from ufm_fast.runs.files import atomic

    paths = []
    for kind in ("png", "pdf"):
        path = folder / f"{name}.{kind}"
        # No date in the file: the same run draws the same bytes.
        metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
        with style(), atomic(path) as temporary:
            try:
                figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
            except (ValueError, RuntimeError) as error:  # of settings: a SOURCE_DATE_EPOCH that is no number, say
                raise InputError(f"plots: matplotlib can't draw {path} ({error}); mend its settings") from error
        paths.append(path)
    return paths
