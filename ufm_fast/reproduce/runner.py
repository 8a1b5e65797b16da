"""Rows of the table of claims, one after the other: each leaves a figure, a CSV and a verdict in a
folder of its own.

    OUT/NAME/NAME.png, NAME.pdf    the figure
    OUT/NAME/NAME.csv              what it shows
    OUT/NAME/verdict.json          measured, theory, deviation, state; written last, so a row that
                                   has one is finished

A second call skips finished rows of the same setting and version, and takes their verdicts from the
file; one that failed is measured anew.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ufm_fast import plots
from ufm_fast.doctor import environment
from ufm_fast.errors import InputError
from ufm_fast.reproduce.claim import FAIL, PASS, REPORT, Claim, Evidence, Judgement
from ufm_fast.reproduce.table import CLAIMS
from ufm_fast.runs.files import atomic, json_ready, pretty_json, write_text
from ufm_fast.version import __version__


@dataclass(frozen=True)
class Verdict:
    """How a row ended. measured, theory, deviation: of the quantity nearest to failing. earlier:
    taken from an earlier call.

    seconds: on the clock; cpu_seconds: of all threads, which a busy machine stretches less.
    """

    name: str
    state: str
    quantity: str
    measured: float | None
    theory: float | None
    deviation: float | None
    seconds: float
    cpu_seconds: float
    quick: bool
    quantities: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    earlier: bool = False

    @property
    def line(self) -> str:
        """The one line that is printed."""
        if self.error is not None:
            return f"{self.name}: {self.error}, {FAIL}"
        of = f" ({self.quantity})" if self.quantity != "value" else ""
        numbers = (_digits(self.measured, 12), _digits(self.theory, 12), _digits(self.deviation, 2))
        return (
            f"{self.name}: measured {numbers[0]}{of}, theory {numbers[1]}, deviation "
            f"{numbers[2]}, {self.state}"
        )


def chosen(names: Sequence[str]) -> list[Claim]:
    """The rows of these names; "all" is every row. Errors: InputError for an unknown name, with the
    nearest ones.
    """
    if list(names) == ["all"]:
        return list(CLAIMS.values())
    for name in names:
        if name not in CLAIMS:
            near = difflib.get_close_matches(name, CLAIMS, 3, 0.4)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(CLAIMS)}"
            )
            raise InputError(f"claim {name!r} is unknown; {hint}")
    return [CLAIMS[name] for name in dict.fromkeys(names)]


def reproduce(claims: Sequence[Claim], out: Path, *, quick: bool = False) -> Iterator[Verdict]:
    """The verdict of each row, as it ends. A row that fails, or breaks, does not stop the rest.

    Errors: InputError where ``out`` can't be written; then nothing is.
    """
    _writable(out)
    for claim in claims:
        verdict = _earlier(claim, out, quick)
        yield _run(claim, out, quick) if verdict is None else verdict


def _writable(out: Path) -> None:
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / ".probe"):
            pass
        (out / ".probe").unlink()
    except OSError as error:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise InputError(
            f"out: can't write to {out} ({error.strerror or error}); choose another --out"
        ) from error


def _earlier(claim: Claim, out: Path, quick: bool) -> Verdict | None:
    """The verdict of an earlier call, if it was of this very row and did not fail."""
    try:
        found = json.loads((out / claim.name / "verdict.json").read_text(encoding="utf-8"))
        if found.pop("stamp") != _stamp(claim, quick) or found["state"] == FAIL:
            return None
        found.pop("environment")
        return Verdict(**{**found, "quantities": tuple(found["quantities"]), "earlier": True})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a foreign file
        return None


def _stamp(claim: Claim, quick: bool) -> dict[str, Any]:
    """What a verdict is good for: the row as the table has it, the setting, the version."""
    row = {
        name: value
        for name, value in asdict(claim).items()
        if name not in ("measure", "seconds", "quick_seconds")
    }
    return dict(json_ready({"row": row, "quick": quick, "version": __version__}))


def _run(claim: Claim, out: Path, quick: bool) -> Verdict:
    begun = time.perf_counter(), time.process_time()

    def spent() -> dict[str, Any]:
        return {
            "seconds": time.perf_counter() - begun[0],
            "cpu_seconds": time.process_time() - begun[1],
        }

    try:
        with plots.paper_style():
            evidence = claim.measure(quick)
            plots.finish(evidence.figure)
        judgements = claim.judge(evidence.numbers, quick)
    except InputError:
        raise  # a package that is missing, said in one line
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Verdict(claim.name, FAIL, "", None, None, None, **spent(), quick=quick, error=reason)
    verdict = replace(_verdict(claim, judgements, quick), **spent())
    _write(claim, evidence, verdict, out / claim.name, quick)
    return verdict


def _verdict(claim: Claim, judgements: list[Judgement], quick: bool) -> Verdict:
    states = {judgement.state for judgement in judgements}
    state = FAIL if FAIL in states or not states else PASS if PASS in states else REPORT
    worst = max(judgements, key=lambda judgement: judgement.strain)
    quantities = tuple(
        {
            "name": j.quantity.name,
            "measured": j.measured,
            "theory": j.quantity.theory,
            "relation": j.quantity.relation,
            "deviation": j.deviation,
            "tolerance": j.tolerance,
            "state": j.state,
        }
        for j in judgements
    )
    shown = worst.quantity
    return Verdict(
        claim.name,
        state,
        shown.name,
        worst.measured,
        shown.theory,
        worst.deviation,
        0.0,
        0.0,
        quick,
        quantities,
    )


def _write(claim: Claim, evidence: Evidence, verdict: Verdict, folder: Path, quick: bool) -> None:
    folder.mkdir(exist_ok=True)
    with plots.paper_style():
        plots.save(evidence.figure, folder, claim.name)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text,
        list(dict.fromkeys(name for row in evidence.rows for name in row)),
        lineterminator="\n",
    )
    writer.writeheader()
    writer.writerows(evidence.rows)
    write_text(folder / f"{claim.name}.csv", text.getvalue())
    content = {**asdict(verdict), "environment": environment(), "stamp": _stamp(claim, quick)}
    write_text(
        folder / "verdict.json", pretty_json({k: v for k, v in content.items() if k != "earlier"})
    )


def _digits(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}g}"
