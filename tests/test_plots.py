"""Figures: what is drawn is what the data say; axes in, axes out; nothing global."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from legible import assert_legible

from ufm_fast import plots
from ufm_fast.errors import InputError
from ufm_fast.theory import simplex_frame

ROOT = Path(__file__).parents[1]
RECORDS = [
    {
        "step": step,
        "seconds": 0.1 * step,
        "value": 1 + 2.0**-step,
        "gradient_norm": 3.0**-step,
        "nc3": 0.5**step,
        "nc1_pinv": 0.0,
    }
    for step in (0, 1, 2, 5, 10)
]


@pytest.fixture
def ax() -> object:
    return plots.new_figure().subplots()


def frame(K: int) -> torch.Tensor:
    return torch.eye(K, dtype=torch.float64) - 1 / K


def test_the_gap_is_relative_to_the_reference(ax: object) -> None:
    assert plots.loss_gap(ax, RECORDS, 1.0) is ax
    x, y = ax.lines[0].get_data()
    assert list(x) == [0, 1, 2, 5, 10]
    assert np.allclose(y, [2.0**-step for step in x], rtol=1e-12)
    assert ax.get_yscale() == "log"


def test_points_that_a_log_axis_cannot_show_are_left_out(ax: object) -> None:
    records = [
        *RECORDS,
        {"step": 11, "value": 1.0},
        {"step": 12, "value": None},
        {"step": 13, "value": math.inf},
        {"step": 14, "value": 1e280},
    ]
    plots.loss_gap(ax, records, 1.0)
    assert list(ax.lines[0].get_xdata()) == [0, 1, 2, 5, 10]


def test_a_run_that_began_at_the_minimum_has_an_empty_plot(ax: object) -> None:
    plots.loss_gap(ax, [{"step": 0, "value": 1.0}], 1.0)
    ax.figure.canvas.draw()


def test_gradient_against_seconds(ax: object) -> None:
    assert plots.gradient_norm(ax, RECORDS, against="seconds") is ax
    assert ax.get_xlabel() == "seconds"
    assert ax.lines[0].get_ydata()[-1] == 3.0**-10


def test_only_metrics_that_were_recorded_and_are_positive_are_drawn(ax: object) -> None:
    assert plots.collapse_metrics(ax, RECORDS) is ax
    assert [line.get_label() for line in ax.lines] == ["NC3  self-duality"]


def test_nc4_is_drawn_as_its_distance_from_one(ax: object) -> None:
    plots.collapse_metrics(
        ax, [{"step": step, "value": 1.0, "nc4": 1 - 0.5 ** (step + 1)} for step in range(3)]
    )
    assert list(ax.lines[0].get_ydata()) == [0.5, 0.25, 0.125]


def test_no_metrics_no_legend(ax: object) -> None:
    plots.collapse_metrics(ax, [{"step": 0, "value": 1.0}])
    assert not plots.finish(ax.figure).legends


def test_a_gram_matrix_of_few_classes_is_exact(ax: object) -> None:
    K = 7
    assert plots.gram_heatmap(ax, frame(K), title="classifier") is ax
    expected = np.where(np.eye(K, dtype=bool), 1.0, -1 / (K - 1))
    assert np.allclose(ax.images[0].get_array(), expected, atol=1e-14)
    assert ax.get_title() == "classifier"


def test_a_large_gram_matrix_is_block_means() -> None:
    ax = plots.new_figure().subplots()
    rows = torch.randn(403, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plots.gram_heatmap(ax, rows, blocks=20)
    image = ax.images[0].get_array()
    assert image.shape == (20, 20)
    unit = rows / rows.norm(dim=1, keepdim=True)
    edges = [403 * i // 20 for i in range(21)]
    block = (unit @ unit.T)[edges[2] : edges[3], edges[7] : edges[8]]
    assert image[2, 7] == pytest.approx(float(block.mean()), abs=1e-14)
    assert "21 x 21 blocks" in ax.get_title()


def test_many_classes_need_no_square_matrix(ax: object) -> None:
    rows = torch.randn(60_000, 3, generator=torch.Generator().manual_seed(1))
    plots.gram_heatmap(ax, rows)
    assert ax.images[0].get_array().shape == (200, 200)
    assert plots.pair_cosines(rows.double(), pairs=1000).shape == (1000,)


def test_zero_rows_are_drawn(ax: object) -> None:
    plots.gram_heatmap(ax, torch.zeros(4, 3))
    other = plots.new_figure().subplots()
    plots.spectrum(other, {"classifier": torch.zeros(4, 3)})
    plots.cosine_histogram(plots.new_figure().subplots(), {"classifier": torch.zeros(4, 3)})
    other.figure.canvas.draw()


def test_the_spectrum_of_a_simplex_is_flat_but_for_one(ax: object) -> None:
    assert plots.spectrum(ax, {"classifier": frame(6), "class means": frame(6) * 3}) is ax
    for line in ax.lines:
        y = line.get_ydata()
        assert np.allclose(y[:5], 1, rtol=1e-12)
        assert (y[5:] < 1e-12).all()


def test_cosines_of_a_simplex_are_all_at_the_line(ax: object) -> None:
    K = 9
    W = simplex_frame(K, K)
    cosines = plots.pair_cosines(torch.as_tensor(W))
    assert cosines.shape == (K * (K - 1) // 2,)
    assert np.allclose(cosines, -1 / (K - 1), atol=1e-12)
    assert plots.cosine_histogram(ax, {"classifier": W}) is ax
    assert ax.lines[0].get_xdata()[0] == -1 / (K - 1)


def test_sampled_cosines_are_pairs_of_different_rows() -> None:
    rows = torch.eye(500, dtype=torch.float64)
    cosines = plots.pair_cosines(rows, pairs=1000, seed=4)
    assert np.allclose(cosines, -1 / 499, atol=1e-12)
    assert np.array_equal(cosines, plots.pair_cosines(rows, pairs=1000, seed=4))


def test_too_many_rows_for_a_simplex_get_the_bound_of_welch(ax: object) -> None:
    plots.cosine_histogram(
        ax, {"classifier": torch.randn(20, 3, generator=torch.Generator().manual_seed(0))}
    )
    assert [line.get_xdata()[0] for line in ax.lines] == [-1 / 19, math.sqrt(17 / (3 * 19))]


def test_a_band_is_the_median_within_least_and_most(ax: object) -> None:
    runs = [
        [{"step": step, "nc3": factor * 0.5**step} for step in steps]
        for factor, steps in ((1.0, (0, 1, 2, 4)), (2.0, (0, 2, 4)), (3.0, (0, 4, 5)))
    ]
    assert plots.band(ax, runs, "nc3", label="three") is ax
    x, y = ax.lines[0].get_data()
    assert list(x) == [0, 1, 2, 4]  # only one run goes on to step 5
    assert np.allclose(y, [2, 1, 0.5, 0.125])
    outline = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(outline[:, 1].max(), 3)
    assert plots.band(ax, [runs[0]], "nc3") is ax
    assert len(ax.collections) == 1
    plots.band(ax, [[{"step": 0, "nc3": None}]], "nc3")
    assert len(ax.lines) == 2


def test_figures_are_saved_twice_and_alike(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure = plots.new_figure()
        plots.loss_gap(figure.subplots(), RECORDS, 1.0)
        paths = plots.save(figure, tmp_path, name)
        assert [path.suffix for path in paths] == [".png", ".pdf"]
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"


def test_no_pyplot_is_loaded_by_a_figure() -> None:
    import subprocess

    code = (
        "import sys; from ufm_fast import plots; plots.new_figure().subplots()\nassert "
        "'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_without_matplotlib_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"ufm-fast\[plot\]"):
        plots.new_figure()


def test_fonts_in_a_pdf_are_truetype_and_no_setting_stays(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plots.paper_style():
        figure = plots.new_figure()
        figure.subplots().set_xlabel("step")
        assert figure.axes[0].xaxis.label.get_size() == 8
        plots.save(figure, tmp_path, "f")
    assert b"/Type3" not in (tmp_path / "f.pdf").read_bytes()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("steps", [3, 40, 90_000])
def test_figures_of_logs_are_legible(steps: int) -> None:
    from ufm_fast.runs.figures import _convergence, _layers

    names = (
        "nc1_pinv",
        "nc2_classifier",
        "nc2_means",
        "nc3",
        "layer0/nc1_pinv",
        "layer1/nc1_pinv",
        "layer0/nc2_means",
    )
    logs = [
        {"step": s, "seconds": 1e-3 * s, "value": 1 + 2.0**-s, "gradient_norm": 0.7**s}
        | dict.fromkeys(names, 0.8**s)
        for s in {round(steps * i / 99) for i in range(100)}
    ]
    with plots.paper_style():
        single, (ax,) = plots.panels()
        plots.collapse_metrics(ax, logs)
        for figure in (single, _convergence(logs, {}), _layers(logs)):
            assert_legible(plots.finish(figure))


@pytest.mark.parametrize("classes", [2, 10, 1000, 10_000])
def test_figures_of_matrices_are_legible(classes: int) -> None:
    from ufm_fast.runs.figures import _geometry, _gram

    W = torch.randn(classes, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with plots.paper_style():
        assert_legible(plots.finish(_gram({"classifier": W, "class means": W}, centred=True)))
        assert_legible(plots.finish(_geometry({"classifier": W, "class means": W}, centred=True)))


def test_labels_do_not_overlap_near_collapse() -> None:
    near = frame(100) + 1e-9 * torch.rand(
        100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with plots.paper_style():
        figure, (ax,) = plots.panels()
        plots.cosine_histogram(ax, {"classifier": near})
        assert_legible(plots.finish(figure))


@pytest.mark.parametrize("counts", [[1], [1000, 900], [100_000, 31, 4, 1]])
def test_classes_against_their_frequency_are_legible(counts: list[int]) -> None:
    table = {
        name: np.linspace(0.5, 0.7, len(counts))
        for name in ("classifier_norm", "mean_norm", "classifier_cosine", "self_duality", "loss")
    }
    with plots.paper_style():
        figure, axes = plots.panels(3)
        plots.against_frequency(axes, {"count": np.array(counts), **table})
        assert_legible(plots.finish(figure))


def test_counts_have_whole_ticks_and_a_legend_says_what_a_label_is_once() -> None:
    with plots.paper_style():
        figure, axes = plots.panels(2)
        for ax, label in zip(axes, ("seed", "temperature"), strict=True):
            ax.plot([0, 1, 2], [3, 4, 5], label="found")
            ax.set(xlabel=label, ylabel="pairs")
        plots.finish(figure)
        figure.draw_without_rendering()
        assert all(
            float(tick).is_integer() for tick in (*axes[0].get_xticks(), *axes[0].get_yticks())
        )
        assert not all(float(tick).is_integer() for tick in axes[1].get_xticks())
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["found"]


@pytest.mark.parametrize(
    ("low", "high"), [(0.31, 0.35), (0.2, 0.9), (0.05, 0.7), (2.0, 90.0), (1e-48, 2.0)]
)
def test_a_logarithmic_axis_has_labels_whatever_its_range(low: float, high: float) -> None:
    with plots.paper_style():
        figure, (ax,) = plots.panels()
        ax.plot([low, high], [low, high], label="found")
        ax.set(xscale="log", yscale="log", xlabel="temperature")
        assert_legible(plots.finish(figure))
        for axis in (ax.xaxis, ax.yaxis):
            ends = sorted(axis.get_view_interval())
            assert sum(ends[0] <= tick <= ends[1] for tick in axis.get_ticklocs()) >= 2


def test_one_colour_for_one_quantity() -> None:
    logs = [
        {"step": s, "value": 1 + 0.5**s, "gradient_norm": 0.5**s, "nc1_pinv": 0.5**s, "nc3": 0.4**s}
        for s in range(5)
    ]
    _, (ax,) = plots.panels()
    plots.collapse_metrics(ax, logs)
    _, (other,) = plots.panels()
    plots.curves(other, logs, {"nc3": "NC3", "nc1_pinv": "NC1"})
    assert [line.get_color() for line in ax.lines] == [
        line.get_color() for line in reversed(other.lines)
    ]
    colours = {
        plots.QUANTITY_COLOURS[name]
        for name in ("nc1_pinv", "nc2_classifier", "nc2_means", "nc3", "gap", "nc4")
    }
    assert len(colours) == 6


def test_no_curve_sets_a_limit_for_those_that_come_later() -> None:
    def log(last: int) -> list[dict[str, float]]:
        return [
            {"step": step, "gradient_norm": 1 / (1 + step)} for step in (0, 10, last // 2, last)
        ]

    for ax in (plots.new_figure().subplots(), plots.new_figure().subplots()):
        plots.gradient_norm(ax, log(300))
        plots.band(ax, [log(3000)], "gradient_norm")
        assert ax.get_xlim()[1] > 3000
    upper, lower = plots.new_figure().subplots(2, 1, sharex=True)
    plots.gradient_norm(upper, log(3000))
    plots.gradient_norm(lower, log(300))  # as a gap, whose last points are rounding
    assert upper.get_xlim()[1] == lower.get_xlim()[1] > 3000


def test_rounding_is_not_drawn_as_a_trend(ax: object) -> None:
    records = [
        {"step": step, "value": 1 + 10.0**-step, "nc3": 10.0 ** (-8 - step), "gradient_norm": 1e-14}
        for step in range(8)
    ]
    plots.collapse_metrics(ax, records)
    assert max(ax.lines[0].get_xdata()) == 4
    other = plots.new_figure().subplots()
    plots.collapse_metrics(other, [{"step": step, "nc3": 1e-16 * (1 + step)} for step in range(4)])
    assert not other.lines
    plots.gradient_norm(other, records)
    assert len(other.lines[0].get_xdata()) == 8
    empty = plots.band(
        plots.new_figure().subplots(),
        [[{"step": 0, "nc3": 1e-15}, {"step": 1, "nc3": 2e-15}]],
        "nc3",
    )
    assert not empty.lines


def test_fonts_are_outlines_whatever_the_users_settings(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"pdf.fonttype": 3, "text.usetex": True}), plots.style():
        figure = plots.new_figure()
        plots.gradient_norm(figure.subplots(), RECORDS)
        _, pdf = plots.save(figure, tmp_path, "x")
    assert b"/Type3" not in pdf.read_bytes()
    assert b"/CIDFontType2" in pdf.read_bytes()


def test_a_backend_of_another_environment_is_no_obstacle() -> None:
    environment = {
        **os.environ,
        "MPLBACKEND": "module://a_notebook_of.another_environment",
        "PYTHONPATH": str(ROOT),
    }
    code = (
        "import os; from ufm_fast import plots; plots.new_figure(); assert "
        "os.environ['MPLBACKEND'].startswith('module')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
