"""``ufm-fast bench``: tables and a picture of the claims on this machine."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ufm_fast.arguments import device_of
from ufm_fast.benchmark.claims import measure
from ufm_fast.calibration import processor_model
from ufm_fast.cli import report
from ufm_fast.doctor import environment
from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.files import WriteError, pretty_json, write_text

TITLES = {
    "heads": "value and gradient of the cross-entropy, float32",
    "solves": "a solve to a certified gap, float64",
    "digits": "relative error of a float32 loss as the margin grows",
}


def bench(*, device: str, quick: bool, out: Path | None, json: bool) -> None:
    """Measure, print, and write bench.json and bench.png into ``out``."""
    chosen, _ = settings.pick_device(device)
    place = device_of(chosen)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"out: can't write to {out} ({error.strerror or error}); choose another --out"
            ) from error
    found = measure(place, quick=quick)
    where = {
        **environment(chosen),
        "processor": processor_model() or platform.processor(),
        "date": datetime.date.today().isoformat(),
    }
    content = {"environment": where, **found}
    if json:
        report.print_json(content)
    else:
        for name, title in TITLES.items():
            Console().print(_table(title, found[name]))
    if out is not None:
        _write(out, content, found, silent=json)


def _write(
    out: Path, content: Mapping[str, Any], found: dict[str, list[dict[str, Any]]], *, silent: bool
) -> None:
    try:
        write_text(out / "bench.json", pretty_json(content))
        from ufm_fast.benchmark.picture import picture

        picture(found).savefig(out / "bench.png", dpi=200)
    except ImportError as error:
        raise InputError("the picture needs matplotlib: pip install 'ufm-fast[plot]'") from error
    except (OSError, WriteError) as error:
        raise InputError(f"out: can't write to {out} ({error}); choose another --out") from error
    if not silent:
        print(f"written: {out / 'bench.json'}, {out / 'bench.png'}")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "contender" else "right")
    for row in rows:
        table.add_row(*(cell(name, value) for name, value in row.items()))
    return table


def cell(name: str, value: Any) -> str:
    """A value of that column in words."""
    from ufm_fast.plan.notes import readable

    if value is None or isinstance(value, str):
        return value or ""
    if name == "extra_bytes":
        return readable(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if name == "percent_of_products" else f"{value:.3g}"
