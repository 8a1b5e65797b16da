"""What a study shows: groups over seeds, slopes, and figures that are legible, say what they show,
and fit a paper.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from command_line import printed
from study_cells import CONTENT, SOLVE

from ufm_fast import plots
from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.studies import library
from ufm_fast.studies.figures import make_figure
from ufm_fast.studies.show import groups, slope
from ufm_fast.studies.spec import Plot

ROWS = [
    {
        "classes": K,
        "seed": seed,
        "dim": d,
        "outcome": "converged",
        "certified": seed < 2,
        "note": "x",
        "evaluations": 3.0 * K**2 * (1.0 + 0.1 * seed),
        "max_cosine_classifier": 0.1 * d / 16 + 0.01 * seed,
        "simplex_level": -1 / (K - 1),
        "welch_level": math.sqrt((K - 1) / K),
    }
    for K in (10, 40, 160)
    for d in (8, 16)
    for seed in (0, 1, 2)
]
NAMES = ("classes", "seed", "dim")


def test_groups_are_means_and_deviations_over_seeds() -> None:
    unfinished = {"classes": 10, "seed": 9, "dim": 8, "outcome": "unfinished"}
    found = groups([*ROWS, unfinished], NAMES)
    assert [group.place for group in found[:2]] == [
        {"classes": 10, "dim": 8},
        {"classes": 10, "dim": 16},
    ]
    assert found[0].mean("evaluations") == pytest.approx((330.0, 30.0))
    assert found[0].mean("certified") == pytest.approx((2 / 3, math.sqrt(1 / 3)))
    assert found[0].mean("note") is None


def test_slopes_are_least_squares_on_logarithms_with_an_interval_over_seeds() -> None:
    exact = slope(ROWS, "evaluations", "classes")
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    tilted = [{**row, "evaluations": row["classes"] ** (1.0 + 0.5 * row["seed"])} for row in ROWS]
    found = slope(tilted, "evaluations", "classes")
    assert found.value == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx((1.0, 2.0))
    one = slope([row for row in ROWS if row["seed"] == 0], "evaluations", "classes")
    assert (one.value, one.low) == (pytest.approx(2.0), None)
    assert slope(ROWS[:6], "evaluations", "classes") is None  # one place


def _texts(figure: object) -> list[object]:
    legends = [
        text for legend in figure.legends for text in (*legend.get_texts(), legend.get_title())
    ]
    found = [*legends]
    for ax in figure.axes:
        axes = [(ax.xaxis, 0), (ax.yaxis, 1)]
        labels = [
            label
            for axis, _ in axes
            for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))
        ]
        inside = [label for label in labels if _shown(ax, label)]
        found += [
            text for text in (*inside, ax.title, ax.xaxis.label, ax.yaxis.label) if text.get_text()
        ]
    return found


def _shown(ax: object, label: object) -> bool:
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    x, y = label.get_position()
    return (
        bool(label.get_text())
        and label.get_visible()
        and (left <= x <= right or x == 0)
        and (bottom <= y <= top or y == 0)
    )


@pytest.mark.parametrize("column", ["evaluations", "max_cosine_classifier", "certified"])
@pytest.mark.parametrize("across", [None, "dim"])
def test_nothing_overlaps_and_all_is_inside(column: str, across: str | None) -> None:
    lines = "dim" if across is None else None
    with plots.paper_style():
        figure, _ = make_figure(ROWS, Plot("x", column, "classes", lines, across), NAMES)
        figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
    assert len(boxes) > 8
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y1 <= figure.bbox.height, text
    for (first, one), (second, other) in itertools.combinations(boxes, 2):
        assert not one.shrunk(0.95, 0.95).overlaps(other), (first, second)


def test_figures_say_what_they_show_in_one_colour_a_quantity() -> None:
    with plots.paper_style():
        curves, fits = make_figure(ROWS, Plot("x", "evaluations", "classes", "dim"), NAMES)
        panels, _ = make_figure(ROWS, Plot("x", "evaluations", "classes", None, "dim"), NAMES)
        share, _ = make_figure(ROWS, Plot("x", "certified", "classes"), NAMES)
    assert curves.legends[0].get_title().get_text() == "median over 3 seeds; band: least to most"
    assert curves.legends[0].get_texts()[0].get_text() == "dimension d = 8: slope 2 [2, 2]"
    assert [fit.slope.value for fit in fits] == pytest.approx([2.0, 2.0])
    assert (
        share.legends[0].get_title().get_text()
        == "share over 3 seeds and dimension d; band: 95 % (Wilson)"
    )
    assert [ax.get_title() for ax in panels.axes] == ["dimension d = 8", "dimension d = 16"]
    assert panels.legends[0].get_texts()[0].get_text() == "cells: slope 2 [2, 2]; 2 [2, 2]"
    assert curves.axes[0].get_xscale() == curves.axes[0].get_yscale() == "log"
    assert curves.axes[0].lines[0].get_color() == panels.axes[1].lines[0].get_color()
    assert share.axes[0].lines[0].get_color() != panels.axes[0].lines[0].get_color()
    assert curves.get_figwidth() < 3.5 < panels.get_figwidth() < 7
    with pytest.raises(
        InputError, match="'note' has no numbers in this study; those that have are classes, "
    ):
        make_figure(ROWS, Plot("x", "note", "classes"), NAMES)


@pytest.mark.usefixtures("in_process")
def test_the_commands_draw_and_show_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    plot = {"evaluations": {"column": "evaluations", "against": "classes"}}
    content = {**CONTENT, "solve": {**SOLVE, "max_steps": 5}, "plots": plot}
    Path("s.toml").write_text(library.toml_text(content))
    assert main(["study", "s.toml", "--out", "out"]) == 0
    assert "plots/evaluations.png" in capsys.readouterr().out
    pdf = Path("out/plots/evaluations.pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"/CIDFontType2" in pdf
    assert (
        main(["plot", "out", "--column", "value", "--against", "classes", "--lines", "seed"]) == 0
    )
    assert Path("out/plots/value-classes.pdf").exists()
    assert main(["plot", "out", "--column", "value", "--against", "classes", "--lines", "sed"]) == 2
    assert main(["plot", "out", "--column", "value"]) == 2
    assert main(["plot", next(map(str, Path("out/cells").iterdir())), "--column", "value"]) == 2
    capsys.readouterr()
    assert main(["study", "show", "out", "--json"]) == 0
    groups = printed(capsys)["groups"]
    assert [(group["classes"], group["seeds"]) for group in groups] == [(4, 2), (5, 2)]
    assert all(group["value"]["std"] >= 0 for group in groups)
    assert main(["study", "show", "out", "--columns", "value,steps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("steps" in line for line in lines)
    assert main(["study", "show", "out", "--columns", "valu"]) == 2
    assert main(["study", "show", "out/cells"]) == 2
    assert "is no folder of a study" in capsys.readouterr().err
