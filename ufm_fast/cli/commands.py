"""What the commands do that are short; imported when one runs, since it imports torch. Others have
a file of their own: `solve`, `landscape`, `bench`, `study_runs`, `practice_runs`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ufm_fast.cli import report
from ufm_fast.cli.plan_tables import group_plan_table, plan_tables
from ufm_fast.presets import PRESETS
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.model import is_network, saved_model


def metrics(source: Path, *, json: bool, pairwise: str, seed: int) -> None:
    run = RunDirectory.open(source, "source") if os.path.isdir(source) else None
    if run is None or is_network(run):
        found, skipped = _metrics_of_head(source, pairwise, seed)
    else:
        found, skipped = _metrics_of_run(run, pairwise, seed)
    if json:
        report.print_json({"source": str(source), "skipped_rows": skipped, "metrics": found})
        return
    Console().print(report.metrics_table(found))
    if skipped:
        print(
            f"{skipped} rows with several targets have no class; metrics of means are over the "
            f"other rows"
        )


def _metrics_of_run(run: RunDirectory, pairwise: Any, seed: int) -> tuple[dict[str, float], int]:
    """Metrics of a saved model, as ``solve`` measures them, and how many rows have several
    targets.
    """
    from ufm_fast.groups import group_metrics
    from ufm_fast.measure import measure
    from ufm_fast.runs.grouped import load_groups

    grouped = load_groups(run)
    if grouped is not None:
        return group_metrics(grouped), 0
    problem, reduce, model = saved_model(run, "source", device="cpu", seed=seed)
    rows = problem.rows(reduce)
    skipped = 0 if rows.targets.single or problem.dense else int((rows.targets.sizes() != 1).sum())
    value = (run.summary or {}).get(
        "value"
    ) or 0.0  # beside which factors of a minimum of zero are rounding
    return measure(problem, rows, model, pairwise, value), skipped


def _metrics_of_head(source: Path, pairwise: Any, seed: int) -> tuple[dict[str, float], int]:
    """Metrics of a classifier and features from a file, or of a trained network."""
    from ufm_fast.metrics import collect, comparable
    from ufm_fast.runs.foreign import read_head

    head = read_head(source, "source")
    H, labels, counts = comparable(head.H, head.labels, head.counts)
    return collect(
        H, head.W, labels, head.b, counts=counts, pairwise=pairwise, seed=seed
    ), head.skipped


def plan(given: Mapping[str, Any], file: Path | None, *, json: bool) -> None:
    from ufm_fast.groups.planning import make_group_plan
    from ufm_fast.plan import make_plan
    from ufm_fast.runs.job import check_choices, on_groups

    config = settings.resolve(given, file)
    check_choices(config)
    config["device"], _ = settings.pick_device(config["device"])
    problem = settings.build_problem(config)
    if on_groups(problem, config):
        planned = make_group_plan(problem)
        if json:
            report.print_json(planned.summary())
        else:
            Console().print(group_plan_table(planned))
        return
    names = ("reduce", "method", "history", "variables", "certificate")
    made = make_plan(problem, **{name: config[name] for name in names})
    if json:
        report.print_json(made.summary())
    else:
        for table in plan_tables(made):
            Console().print(table)
        for note in made.notes:
            print(f"- {note}")


def plot(runs: list[Path], compare: Path | None = None) -> None:
    from ufm_fast.runs.figures import draw_run, draw_together

    opened = [RunDirectory.open(path, "runs") for path in runs]
    if compare is not None:
        report.list_paths(f"{compare}:", draw_together(opened, compare))
        return
    for run in opened:
        report.list_paths(f"{run.path}:", draw_run(run))


def doctor(*, json: bool) -> bool:
    from ufm_fast import doctor as checks

    results = checks.self_test()
    passed = all(check.passed for check in results)
    if json:
        content = {
            "versions": checks.versions(),
            "devices": checks.devices(),
            "backends": checks.backends(),
            "self_test": [asdict(check) for check in results],
            "passed": passed,
        }
        report.print_json(content)
        return passed
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, found in checks.versions().items():
        table.add_row(name, found or "not installed")
    for device in checks.devices():
        table.add_row("device", device)
    for name, state in checks.backends().items():
        table.add_row(f"backend {name}", state)
    for check in results:
        table.add_row(check.name, f"{'ok' if check.passed else 'FAILED'}  ({check.detail})")
    Console().print(table)
    print(
        "all tests passed" if passed else "a test FAILED: results on this machine can't be trusted"
    )
    return passed


def export(run: Path, kind: str, out: Path | None, *, quiet: bool) -> None:
    from ufm_fast.runs.exports import export_run

    paths = export_run(RunDirectory.open(run, "run"), kind, out)
    if not quiet:
        report.list_paths("written:", paths)


def print_presets(json: bool) -> None:
    if json:
        report.print_json({name: asdict(preset) for name, preset in PRESETS.items()})
        return
    for preset in PRESETS.values():
        settings = " ".join(f"{key}={value}" for key, value in preset.defaults.items())
        print(f"{preset.name}: {preset.title} ({preset.source})")
        print(f"  exact: {preset.exact}\n  our choice: {preset.choice}\n  settings: {settings}\n")
