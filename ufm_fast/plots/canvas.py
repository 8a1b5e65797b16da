"""Figures without global state: made, styled and saved here, and by nothing of pyplot."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast.errors import InputError
from ufm_fast.plots.palette import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Widths of one and two columns of a paper, in inches.
COLUMN, PAGE = 3.3, 6.8


def new_figure(width: float = 5.2, height: float = 3.8) -> Figure:
    """A figure with an Agg canvas that no global state knows of. Errors: InputError without
    matplotlib.
    """
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(number: int = 1, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A row of panels, one column wide for one and two columns for more."""
    figure = new_figure(COLUMN if number == 1 else PAGE, height)
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _import_matplotlib() -> None:
    """Import it, also where MPLBACKEND, of which our figures make no use, names a backend that this
    environment has not: a notebook's shell commands inherit the notebook's. Errors: InputError
    without matplotlib.
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
    """Settings that our figures need whatever the user's: fonts as outlines that every reader and
    press takes (no Type 3), and labels that are not TeX.
    """
    _import_matplotlib()
    from matplotlib import rc_context

    with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "text.usetex": False}):
        yield


@contextmanager
def paper_style() -> Iterator[None]:
    """Text of eight points for figures of one or two columns; what is drawn and saved inside has
    it. Nothing stays set.

    Errors: InputError without matplotlib.
    """
    _import_matplotlib()
    from cycler import cycler
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "font.size": 8.0,
        "axes.titlesize": 8.0,
        "lines.markersize": 4.0,
        "lines.linewidth": 1.5,
    }
    settings |= {
        name: 7.0
        for name in (
            "xtick.labelsize",
            "ytick.labelsize",
            "legend.fontsize",
            "legend.title_fontsize",
        )
    }
    settings["axes.prop_cycle"] = cycler(color=list(COLOURS))
    with style(), rc_context(settings):
        yield


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
            except (
                ValueError,
                RuntimeError,
            ) as error:  # of settings: a SOURCE_DATE_EPOCH that is no number, say
                raise InputError(
                    f"plots: matplotlib can't draw {path} ({error}); mend its settings"
                ) from error
        paths.append(path)
    return paths
