"""The tables of ``ufm-fast plan``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from ufm_fast.cli.report import number

if TYPE_CHECKING:
    from ufm_fast.groups.planning import GroupPlan
    from ufm_fast.plan import Plan


def group_plan_table(plan: GroupPlan) -> Table:
    """The table of ``ufm-fast plan`` for a solve on groups."""
    from ufm_fast.plan.notes import readable

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
    from ufm_fast.plan.notes import readable

    if len(plan.widths) > 1:
        yield "widths", ", ".join(map("{:,}".format, plan.widths))
        yield (
            "hidden layers",
            f"{readable(plan.hidden)} of the parameters; {readable(plan.tape)} that a pass leaves",
        )


def plan_tables(plan: Plan) -> Iterator[Table]:
    """The tables of ``ufm-fast plan``."""
    from ufm_fast.plan.notes import readable

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
