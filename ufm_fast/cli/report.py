"""What a person sees at the end: the result's tables, a line, or one JSON object."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ufm_fast.runs.files import json_ready
from ufm_fast.runs.words import printable

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


def list_paths(title: str, paths: list[Path]) -> None:
    # Not through rich, which would break long paths.
    print(printable(title))
    for path in paths:
        print(f"  {printable(str(path))}")
