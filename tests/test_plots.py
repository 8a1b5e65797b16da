"""Figures: what is drawn is what the data say; axes in, axes out; nothing global."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
    plots.collapse_metrics(ax, [{"step": step, "value": 1.0, "nc4": 1 - 0.5 ** (step + 1)} for step in range(3)])
    assert list(ax.lines[0].get_ydata()) == [0.5, 0.25, 0.125]


def test_no_metrics_no_legend(ax: object) -> None:
    plots.collapse_metrics(ax, [{"step": 0, "value": 1.0}])
    assert ax.get_legend() is None


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
    plots.cosine_histogram(ax, {"classifier": torch.randn(20, 3, generator=torch.Generator().manual_seed(0))})
    assert [line.get_xdata()[0] for line in ax.lines] == [-1 / 19, math.sqrt(17 / (3 * 19))]


def test_a_band_is_the_median_within_least_and_most(ax: object) -> None:
    runs = [[{"step": step, "nc3": factor * 0.5**step} for step in steps] for factor, steps in
            ((1.0, (0, 1, 2, 4)), (2.0, (0, 2, 4)), (3.0, (0, 4, 5)))]  # fmt: skip
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
        "import sys; from ufm_fast import plots; plots.new_figure().subplots()\nassert 'matplotlib.pyplot' not in sys.modules"
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


@pytest.mark.parametrize("classes", [2, 10, 1000, 10_000])
def test_tick_labels_do_not_overlap(classes: int) -> None:
    matrices = {"classifier": torch.randn(classes, 8), "class means": torch.randn(classes, 8)}
    with plots.paper_style():
        figure = plots.new_figure(6.8, 2.4)
        left, middle, right = figure.subplots(1, 3)
        plots.gram_heatmap(left, matrices["classifier"])
        plots.spectrum(middle, matrices)
        plots.cosine_histogram(right, matrices)
        figure.draw_without_rendering()
        for ax in (left, middle, right):
            low, high = sorted(ax.get_xlim())
            boxes = [
                t.label1.get_window_extent()
                for t in ax.xaxis.get_major_ticks()
                if low <= t.get_loc() <= high and t.label1.get_text()
            ]
            assert boxes
            boxes.sort(key=lambda box: box.x0)
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)), ax.get_title()


def test_no_curve_sets_a_limit_for_those_that_come_later() -> None:
    def log(last: int) -> list[dict[str, float]]:
        return [{"step": step, "gradient_norm": 1 / (1 + step)} for step in (0, 10, last // 2, last)]

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
        {"step": step, "value": 1 + 10.0**-step, "nc3": 10.0 ** (-8 - step), "gradient_norm": 1e-14} for step in range(8)
    ]
    plots.collapse_metrics(ax, records)
    assert max(ax.lines[0].get_xdata()) == 4
    other = plots.new_figure().subplots()
    plots.collapse_metrics(other, [{"step": step, "nc3": 1e-16 * (1 + step)} for step in range(4)])
    assert not other.lines
    plots.gradient_norm(other, records)
    assert len(other.lines[0].get_xdata()) == 8
    empty = plots.band(plots.new_figure().subplots(), [[{"step": 0, "nc3": 1e-15}, {"step": 1, "nc3": 2e-15}]], "nc3")
    assert not empty.lines


def test_labels_do_not_overlap_near_collapse(ax: object) -> None:
    generator = torch.Generator().manual_seed(0)
    near = frame(100) + 1e-9 * torch.randn(100, 100, generator=generator, dtype=torch.float64)
    plots.cosine_histogram(ax, {"classifier": near})
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    inside = [box for box in boxes if box.x1 > ax.bbox.x0 and box.x0 < ax.bbox.x1]
    assert len(inside) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(inside))


def test_figures_of_several_panels_stay_on_their_canvas() -> None:
    from ufm_fast.runs.figures import _gram

    rows = 1e-4 * frame(3)[torch.arange(900) % 3] + torch.randn(900, 3, dtype=torch.float64)
    figure = _gram({"classifier": rows, "class means": rows}, centred=True)
    figure.canvas.draw()
    assert figure.bbox.x0 <= figure.get_tightbbox().x0 * figure.dpi
    assert figure.get_tightbbox().x1 * figure.dpi <= figure.bbox.x1


def test_fonts_are_outlines_whatever_the_users_settings(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"pdf.fonttype": 3, "text.usetex": True}), plots.style():
        figure = plots.new_figure()
        plots.gradient_norm(figure.subplots(), RECORDS)
        _, pdf = plots.save(figure, tmp_path, "x")
    assert b"/Type3" not in pdf.read_bytes()
    assert b"/CIDFontType2" in pdf.read_bytes()


def test_a_backend_of_another_environment_is_no_obstacle() -> None:
    environment = {**os.environ, "MPLBACKEND": "module://a_notebook_of.another_environment", "PYTHONPATH": str(ROOT)}
    code = "import os; from ufm_fast import plots; plots.new_figure(); assert os.environ['MPLBACKEND'].startswith('module')"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
