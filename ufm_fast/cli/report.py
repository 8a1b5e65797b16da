"""What a person sees: the progress bar, the result's table, and one line for an error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ufm_fast.runs.files import json_ready
from ufm_fast.runs.words import printable

if TYPE_CHECKING:
    from ufm_fast.groups.planning import GroupPlan
    from ufm_fast.plan import Plan
    from ufm_fast.runs.job import Job
    from ufm_fast.solvers.solution import StepRecord

#: Metrics of the final table, by the frame that theory predicts: one for each of NC1-NC4; all are
#: in summary.json.
_SHOWN = (
    "nc1_pinv",
    "nc2_classifier",
    "nc2_means",
    "nc3",
    "nrc1",
    "nrc2",
    "nrc3",
    "nc4",
    "balancedness_relative",
)
_SHOWN_ORTHOGONAL = (
    "nc1_pinv",
    "nc2_classifier_frame",
    "nc2_means_frame",
    "nc3_frame",
    "nc4",
    "balancedness_relative",
)


def print_json(content: Mapping[str, Any]) -> None:
    """The one object that --json prints."""
    sys.stdout.write(json.dumps(json_ready(content)) + "\n")


def note(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(printable(text) + "\n")


@contextmanager
def progress_bar(job: Job, shown: bool) -> Iterator[Callable[[StepRecord], None]]:
    """The job's notes, once it really runs, and a bar of the decades that the gradient norm has
    fallen.

    The bar needs standard error to be a terminal.
    """
    console = Console(stderr=True)
    notes = list(job.notes) if shown else []

    def announce(record: StepRecord | None = None) -> None:
        while notes:
            note(notes.pop(0))

    if not shown or not console.is_terminal:
        yield announce
        announce()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} % of the way to tol"),
        TextColumn("value {task.fields[value]}"),
        TextColumn("gradient {task.fields[gradient]}"),
        TimeElapsedColumn(),
    )
    way = _Way(max(job.config["tol"] * job.problem.mu, 1e-300))
    most = job.config["max_steps"]
    last = "" if most is None else f"/{job.progress.step + most:,}"
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(
            "solve", total=1.0, step=f"{job.progress.step:,}{last}", value="", gradient=""
        )

        def report(record: StepRecord) -> None:
            announce()
            progress.update(
                task,
                completed=way.gone(record.gradient_norm),
                step=f"{record.step:,}{last}",
                value=f"{record.value:.9g}",
                gradient=f"{record.gradient_norm:.1e}",
            )

        yield report
        progress.update(task, completed=1.0)


class _Way:
    """How many of the decades from the first gradient norm to the one of tol are behind, at best so
    far.
    """

    def __init__(self, target: float) -> None:
        self._target, self._best = target, 0.0
        self._first: float | None = None

    def gone(self, norm: float) -> float:
        if self._first is None:
            self._first = norm
        self._best = max(self._best, _decades(self._first, norm, self._target))
        return self._best


def _decades(first: float, now: float, target: float) -> float:
    if not (math.isfinite(first) and math.isfinite(now) and first > target and now > 0):
        return 0.0
    return min(max(math.log(first / now) / math.log(first / target), 0.0), 1.0)


def result_table(summary: Mapping[str, Any], title: str) -> Table:
    """The table that a solve ends in."""
    table = Table(
        title=Text(printable(title)), title_justify="left", show_header=False, title_style="bold"
    )
    table.add_column(style="dim")
    table.add_column()
    for name, text in (*_result_rows(summary), *_of_code(summary), *_metric_rows(summary)):
        table.add_row(name, text)
    return table


def _result_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "problem", _problem(summary)
    outcome = (
        f"{summary['outcome']}  ({summary['message']})"
        if summary["message"]
        else str(summary["outcome"])
    )
    colour = _colour(summary)
    yield "outcome", f"[{colour}]{escape(outcome)}[/]" if colour else escape(outcome)
    for words in summary.get("notes", []):
        yield "note", f"[yellow]{escape(words)}[/]"
    yield "value", number(summary["value"], 15)
    theory, certificate = summary["theory"], summary["certificate"]
    if theory is not None:
        yield "theory", f"{number(theory['value'], 15)}  [{theory['source']}]".replace("[", r"\[")
        scale = abs(theory["value"]) or 1.0
        yield "relative difference", number((summary["value"] - theory["value"]) / scale)
    else:
        yield "theory", "no closed form for this problem"
    if summary.get("structure"):
        yield (
            "structure",
            f"{escape(summary['structure']['name'])}, by its value "
            f"{number(summary['structure']['value'], 15)}",
        )
    yield "certificate", _certificate(certificate)
    yield "gradient norm", number(summary["gradient_norm"])
    yield from _starts_and_layers(summary)
    if "groups" in summary:
        groups = summary["groups"]
        yield (
            "groups",
            f"{groups['counts']} distinct counts, {groups['collapsed']} of them collapsed; rank "
            f"{groups['rank']}",
        )
    yield "steps, evaluations", f"{summary['steps']}, {summary['evaluations']:g}"
    yield "seconds", f"{summary['seconds']:.2f}"
    yield "method, backend", f"{summary['method']}, {summary['backend']}"
    yield (
        "rows, variables, start",
        f"{summary['reduce']}, {summary['variables']}, {summary['start']}",
    )


def _starts_and_layers(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How many starts ended at the best value; of layers the rank of the logits, energies, NC1 and
    NC2 of each.
    """
    metrics, best = summary["metrics"], summary["value"]
    ends = [row["value"] for row in summary.get("restarts", ())]
    if ends:
        near = sum(abs(value - best) <= 1e-8 * abs(best) for value in ends)
        yield "starts", f"the best of {len(ends)}, and {near} within 1e-8 of it"
    if "logit_rank" in metrics:
        yield "rank of the logits", f"{metrics['logit_rank']:.0f}"
        energies = {
            name.split("/")[1]: value
            for name, value in metrics.items()
            if name.startswith("energy/")
        }
        listed = ", ".join(f"{name} {number(value, 6)}" for name, value in energies.items())
        yield "energies lambda |X|^2", f"{listed}  (equal at critical points)"
    frame = "nc2_means_frame" if summary.get("frame") == "orthogonal" else "nc2_means"
    for name in ("nc1_pinv", frame):
        found = [
            value
            for key, value in metrics.items()
            if key.startswith("layer") and key.endswith(f"/{name}")
        ]
        if found:
            yield f"{name} by layer", ", ".join(map(number, found))


def _of_code(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of more classes than d + 1: the largest cosine beside what no code can go below, and the
    least margin.
    """
    from ufm_fast.theory.codes import simplex_level, welch_level

    metrics, K, d = summary["metrics"], summary["classes"], summary["dim"]
    if "one_vs_rest" not in metrics:
        return
    levels = f"simplex {simplex_level(K):.4f}, Welch {welch_level(K, d):.4f}"
    yield "largest cosine of W", f"{number(metrics['max_cosine_classifier'])}  ({levels})"
    sampled = "one_vs_rest_mean_stderr" in metrics
    yield (
        "one-vs-rest margin",
        f"{number(metrics['one_vs_rest'])}{'  (least of 64 rows)' if sampled else ''}",
    )


def phases_table(phases: Mapping[str, float]) -> Table:
    """Seconds by phase, the most first; 'head' is what is left of the head beside its products, or
    all of it.
    """
    table = Table(title="seconds by phase", title_justify="left", title_style="bold")
    table.add_column("phase", style="dim")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    total = max(sum(phases.values()), 1e-300)
    for name, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.3f}", f"{seconds / total:.0%}")
    return table


def restarts_table(summary: Mapping[str, Any]) -> Table:
    """A row for each of several starts."""
    table = Table(title="starts", title_justify="left")
    for header in ("seed", "value", "evaluations", "rank of the logits", "outcome"):
        table.add_column(header)
    for row in summary["restarts"]:
        rank = "-" if row["rank"] is None else str(row["rank"])
        table.add_row(
            str(row["seed"]),
            number(row["value"], 15),
            f"{row['evaluations']:g}",
            rank,
            row["outcome"],
        )
    return table


def _certificate(certificate: Mapping[str, Any]) -> str:
    if certificate["kind"] == "none":
        return escape(f"none ({certificate['reason']})") if certificate.get("reason") else "none"
    state = "globally optimal" if certificate["certified"] else "not certified"
    gap = number(certificate.get("relative_gap"))
    return f"{state}: relative gap {gap} ({certificate['kind']})"


def _problem(summary: Mapping[str, Any]) -> str:
    empty = summary.get("empty_classes")
    without = f" ({empty:,} without samples)" if empty else ""
    sizes = (
        ("K", f"{summary['classes']:,}{without}"),
        ("N", f"{summary['samples']:,}"),
        ("d", f"{summary['dim']:,}"),
    )
    config = summary.get("config", {})
    layers = config.get("layers", 1)
    between = f", {layers} layers ({config['activation']})" if layers > 1 else ""
    return ", ".join(f"{name} = {text}" for name, text in sizes) + between


def _colour(summary: Mapping[str, Any]) -> str:
    """Green for a minimum that is proved or known, yellow for an end that may lie far from it, red
    for none.
    """
    if summary["outcome"] not in ("converged", "stalled"):
        return "red"
    theory, certificate = summary["theory"], summary["certificate"]
    known = theory is not None and abs(summary["value"] - theory["value"]) <= 1e-6 * abs(
        theory["value"]
    )
    if known or certificate["certified"]:
        return "green"
    return "" if certificate["kind"] == "none" and summary["outcome"] == "converged" else "yellow"


def _metric_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metrics = summary["metrics"]
    for name in _SHOWN_ORTHOGONAL if summary.get("frame") == "orthogonal" else _SHOWN:
        if name in metrics:
            yield name, number(metrics[name])


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """All metrics with their definitions."""
    from ufm_fast.metrics import DESCRIPTIONS

    table = Table(box=None, pad_edge=False)
    for header in ("metric", "value", "what it is"):
        table.add_column(header, no_wrap=header != "what it is")
    for name, value in metrics.items():
        if name.endswith("_stderr"):
            continue
        error = metrics.get(f"{name}_stderr")
        text = number(value) if error is None else f"{number(value)} ± {number(error, 2)}"
        table.add_row(name, text, DESCRIPTIONS.get(name, ""))
    return table


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}g}"


def group_plan_table(plan: GroupPlan) -> Table:
    """The table of ``ufm-fast plan`` for a solve on groups."""
    from ufm_fast.plan import readable

    table = Table(title="solved on groups of equal counts", title_justify="left", show_header=False)
    for name, text in (
        ("samples, classes, dim", f"{plan.samples:,}, {plan.classes:,}, {plan.dim:,}"),
        ("groups", f"{plan.groups:,} distinct counts, so {plan.groups + plan.groups**2:,} numbers"),
        ("rank of the minimiser", f"{plan.most_rank:,} at most; dim must hold it"),
        ("memory", f"{readable(plan.memory)}, {readable(plan.free)} free"),
        ("seconds", f"about {plan.seconds:.2g}"),
    ):
        table.add_row(name, text)
    return table


def _layer_sizes(plan: Plan) -> Iterator[tuple[str, str]]:
    from ufm_fast.plan import readable

    if len(plan.widths) > 1:
        yield "widths", ", ".join(map("{:,}".format, plan.widths))
        yield (
            "hidden layers",
            f"{readable(plan.hidden)} of the parameters; {readable(plan.tape)} that a pass leaves",
        )


def plan_tables(plan: Plan) -> Iterator[Table]:
    """The tables of ``ufm-fast plan``."""
    from ufm_fast.plan import readable

    sizes = Table(title="problem", title_justify="left", show_header=False)
    for name, text in (
        ("samples, classes, dim", f"{plan.samples:,}, {plan.classes:,}, {plan.dim:,}"),
        ("rows", f"{plan.rows:,} (reduce={plan.reduce})"),
        ("parameters", f"{readable(plan.parameters)}, and as much for the gradient"),
        *_layer_sizes(plan),
        ("certificate", readable(plan.certificate) if plan.certificate else "none"),
        ("metrics", readable(plan.measuring)),
        (
            "evaluation",
            f"{plan.flops:.2e} flops; products of {plan.device} run at {plan.rate / 1e9:.0f} "
            f"Gflop/s",
        ),
        ("memory free", readable(plan.free)),
    ):
        sizes.add_row(name, text)
    yield sizes
    backends = Table(title="backends", title_justify="left")
    for header in ("backend", "chunk rows", "workspace", "s / evaluation", "fits"):
        backends.add_column(header)
    for backend in plan.backends:
        seconds = number(backend.seconds, 2)
        backends.add_row(
            backend.name,
            f"{backend.chunk:,}",
            readable(backend.workspace),
            seconds,
            plan.fits(backend.name),
        )
    yield backends
    methods = Table(title="methods: memory in all", title_justify="left")
    for header in ("method", "own state", *(backend.name for backend in plan.backends)):
        methods.add_column(header)
    for name, size in plan.methods.items():
        methods.add_row(
            name,
            readable(size),
            *(readable(plan.total(name, backend.name)) for backend in plan.backends),
        )
    yield methods
