"""Pictures of matrices with a row for each class: cosines, spectra, histograms; and of classes
against their frequency.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.plots.palette import QUANTITY_COLOURS, quantity_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCKS = 200
_PAIRS = 200_000


def gram_heatmap(
    ax: Axes, left: Any, right: Any | None = None, *, title: str = "", blocks: int = _BLOCKS
) -> Axes:
    """Cosines of the rows of ``left`` with those of ``right`` (default: itself), averaged over
    blocks of classes.

    Beyond ``blocks`` classes a cell is the mean over a block of pairs, from the block sums of unit
    rows: never K x K.
    """
    from matplotlib.ticker import ScalarFormatter

    first, second = _unit(left), _unit(left if right is None else right)
    edges = _edges(first.shape[0], blocks)
    image = (_block_means(first, edges) @ _block_means(second, edges).T).numpy()
    K = first.shape[0]
    # Means over blocks are small: they get a scale of their own.
    bound = 1.0 if len(edges) - 1 == K else max(float(np.abs(image).max()), 1e-12)
    shown = ax.imshow(
        image, cmap="RdBu_r", vmin=-bound, vmax=bound, extent=(0, K, K, 0), interpolation="nearest"
    )
    short = ScalarFormatter()
    short.set_powerlimits((-1, 1))  # labels that a figure of several has room for
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.03, format=short, label="cosine")
    bar.outline.set_visible(False)
    width = math.ceil(K / (len(edges) - 1))
    ax.set_title(title if width == 1 else f"{title}\n(means of {width} x {width} blocks)")
    ax.set(xlabel="class", ylabel="class")
    return ax


def spectrum(ax: Axes, matrices: Mapping[str, Any]) -> Axes:
    """Singular values of each named matrix, divided by its largest, in descending order."""
    ax.set_yscale("log")
    for index, (label, matrix) in enumerate(matrices.items()):
        values = _singular_values(_rows(matrix))
        values = values[values > 0] / values[0]
        marker = "os^v"[index % 4] if values.numel() <= 80 else ""
        style = quantity_style(label, index) | {
            "linewidth": 1.2,
            "marker": marker,
            "markersize": 5 - 2 * min(index, 1),
        }
        face = "none" if index == 0 else style["color"]
        ax.plot(
            range(1, values.numel() + 1), values.numpy(), label=label, markerfacecolor=face, **style
        )
    # Singular values that are zero but for rounding would stretch the axis to 1e-300.
    lowest = min(
        (float(y) for line in ax.lines for y in np.asarray(line.get_ydata()) if y > 1e-16),
        default=1e-16,
    )
    ax.set_ylim(min(lowest / 3, 0.1), 3)
    ax.set_xlabel("index")
    ax.set_ylabel("singular value / largest")
    return ax


def cosine_histogram(
    ax: Axes,
    matrices: Mapping[str, Any],
    *,
    pairs: int = _PAIRS,
    seed: int = 0,
    centred: bool = True,
) -> Axes:
    """Cosines of pairs of rows, about their mean row or not; random pairs where there are many.

    Lines show the simplex's -1/(K-1) and, where K rows are too many for a simplex in R^d, Welch's
    bound on the largest; without centring the orthogonal frame's 0.
    """
    found = {
        label: pair_cosines(_rows(matrix), pairs, seed, centred)
        for label, matrix in matrices.items()
    }
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
        filled: dict[str, Any] = (
            {"histtype": "stepfilled", "alpha": 0.35}
            if index == 0
            else {"histtype": "step", "linewidth": 1.6}
        )
        color = quantity_style(label, index)["color"]
        ax.hist(values, bins=bins.tolist(), color=color, label=label, **filled)
    for (label, place), style in zip(lines.items(), ("--", ":"), strict=False):
        ax.axvline(place, color="0.2", linestyle=style, linewidth=1.2, label=label)
    ax.set_xlabel("cosine of a pair of classes" + ", centred" * centred)
    ax.set_ylabel("pairs")
    return ax


def against_frequency(axes: Sequence[Axes], table: Mapping[str, Any]) -> Sequence[Axes]:
    """Norms, cosines and loss of classes against their number of samples, on three axes.

    ``table``: a column, one entry a group, for each of count, classifier_norm, mean_norm,
    classifier_cosine, self_duality, loss.
    """
    norms, cosines, losses = axes
    for ax, names, label in (
        (norms, {"classifier_norm": "classifier", "mean_norm": "class mean"}, "norm"),
        (
            cosines,
            {"classifier_cosine": "two rows of equal count", "self_duality": "row and class mean"},
            "cosine",
        ),
        (losses, {"loss": "loss"}, "loss of a sample"),
    ):
        for name, text in names.items():
            seen, shown = (
                (table["count"] > 0) & np.isfinite(table[name]),
                text if len(names) > 1 else None,
            )
            colour = QUANTITY_COLOURS[name]
            ax.plot(
                table["count"][seen],
                table[name][seen],
                ".-",
                color=colour,
                markersize=4,
                linewidth=1,
                label=shown,
            )
        if bool((table["count"] > 0).any()):
            ax.set_xscale("log")
        ax.set_xlabel("samples of the class")
        ax.set_ylabel(label)
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
    rows = rows / rows.abs().max().clamp_min(
        torch.finfo(torch.float64).tiny
    )  # squares of a diverged run overflow
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
