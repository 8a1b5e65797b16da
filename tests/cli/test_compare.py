"""``ufm-fast plot --compare``: several runs in one figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import refused, solve

from ufm_fast.cli import main
from ufm_fast.runs.directory import RunDirectory


def test_runs_are_drawn_together(capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed, loss in (("a", "0", "ce"), ("b", "1", "ce"), ("c", "0", "mse")):
        assert (
            solve(
                "--start",
                "normal",
                "--loss",
                loss,
                "--seed",
                seed,
                "--out",
                name,
                "--no-plots",
                "--quiet",
            )
            == 0
        )
    capsys.readouterr()
    assert main(["plot", "a", "b", "c", "--compare", "together"]) == 0
    assert sorted(path.name for path in Path("together").iterdir()) == [
        "compare.pdf",
        "compare.png",
    ]
    assert "compare.png" in capsys.readouterr().out
    assert not Path("a/plots").exists() or not list(Path("a/plots").iterdir())
    Path("file").write_text("")
    assert "compare" in refused(capsys, "plot", "a", "--compare", "file/sub")
    log = Path("a/metrics.jsonl")
    for text, words in (('{"step": 1}\n', "no value"), ("", "no log")):
        log.write_text(text)
        assert words in refused(capsys, "plot", "b", "a", "--compare", "never")
        assert words in refused(capsys, "plot", "a")
    assert not Path("never").exists()


def test_a_group_keeps_its_style_where_a_panel_lacks_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ufm_fast import plots
    from ufm_fast.runs import figures
    from ufm_fast.runs.directory import RunDirectory

    shown = []
    monkeypatch.setattr(plots, "save", lambda figure, folder, name: shown.append(figure) or [])
    record = {"step": 0, "seconds": 0.0, "value": 1.0, "gradient_norm": 0.5}
    runs = []
    for dim in range(7):
        run = RunDirectory(Path(f"r{dim}"), {"dim": dim, "seed": 0}, "0")
        run.path.mkdir()
        run.append({**record, "nc3": 0.1 if dim == 1 else 0.0})
        runs.append(run)
    figures.draw_together([*runs, runs[0]], Path("figures"))
    axes, legend = shown[0].axes, shown[0].legends[0]
    gradient, nc3 = axes[1].lines, axes[5].lines
    assert len(gradient) == 7
    assert [line.get_color() for line in nc3] == [gradient[1].get_color()]
    assert gradient[6].get_color() == gradient[0].get_color()
    assert gradient[6].get_linestyle() != gradient[0].get_linestyle()
    assert [text.get_text() for text in legend.get_texts()] == [f"dim {dim}" for dim in range(7)]


def test_groups_of_a_comparison_are_named_by_what_differs() -> None:
    from ufm_fast.runs.directory import RunDirectory
    from ufm_fast.runs.figures import _group_labels

    def run(**config: object) -> RunDirectory:
        return RunDirectory(Path("runs/x"), config, "0")

    groups = [
        [run(loss="ce", lambda_w=0.1, seed=0), run(loss="ce", lambda_w=0.1, seed=1)],
        [run(loss="ce", lambda_w=1, seed=0)],
    ]
    assert _group_labels(groups) == ["lambda-w 0.1 (2 seeds)", "lambda-w 1"]
    assert _group_labels(groups[1:]) == ["x"]


def _logged(
    name: str, values: list[float], summary: dict[str, object] | None = None, **config: object
) -> RunDirectory:
    run = RunDirectory(Path(name), {"seed": 0, **config}, "0")
    run.path.mkdir()
    for step, value in enumerate(values):
        run.append({"step": step, "seconds": 0.0, "value": value, "gradient_norm": 0.5})
    if summary is not None:
        run.write_summary(summary)
    return run


def test_gaps_of_a_problem_have_one_reference_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ufm_fast import plots
    from ufm_fast.runs import figures

    shown = []
    monkeypatch.setattr(plots, "save", lambda figure, folder, name: shown.append(figure) or [])
    runs = [_logged("a", [3.0, 2.0], max_steps=2), _logged("b", [3.0, 1.5, 1.0], max_steps=3)]
    figures.draw_together(runs, Path("figures"))
    first, second = shown[-1].axes[0].lines
    assert list(first.get_ydata()) == [2.0, 1.0]  # not from its own lowest value, 2
    assert list(second.get_ydata()) == [2.0, 0.5]
    assert shown[-1].axes[0].get_ylabel() == "relative gap to best value"
    bound = {"certificate": {"certified": True, "lower_bound": 0.5}}
    runs += [
        _logged("c", [3.0, 1.0], bound, method="gd"),
        _logged("d", [4.0, 3.0], {"theory": {"value": 2.0}}, loss="mse"),
    ]
    figures.draw_together(runs, Path("figures"))
    for line, gaps in zip(
        shown[-1].axes[0].lines, ([5, 3], [5, 2, 1], [5, 1], [1, 0.5]), strict=True
    ):
        assert list(line.get_ydata()) == pytest.approx(gaps)
    assert shown[-1].axes[0].get_ylabel() == "relative gap to lower bound or theory"


def test_a_run_of_before_a_setting_has_its_default_in_a_comparison() -> None:
    from ufm_fast.runs.figures import _group_labels, shared_references

    old, new = _logged("old", [1.0], lambda_w=0.1), _logged("new", [2.0], lambda_w=0.1, layers=1)
    assert _group_labels([[old], [new]]) == ["old", "new"]
    assert _group_labels([[_logged("a\x1b$b$", [1.0])]]) == [r"a\x1b\$b\$"]
    assert len(shared_references([old, new])) == 1
