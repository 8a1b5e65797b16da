"""The study file, read and checked: what stands in it, and which words are refused.

    [solve]    any setting of ``solve``, the same in all cells
    [axes]     a list, {log = [first, last, number]} or {range = [start, stop, step]} for each
               setting that varies; their grid is the study. zip = {classes = [10, 100], dim = [16,
               128]} varies several together, a list of such tables more
    [derived]  name = "expression" of the others (`expressions`)
    [study]    jobs (cells at a time), starts (restarts of each cell, of which the best is its
               result), warm (an axis along which each cell starts at the end of the one before),
               version (of this format)
    [plots]    name = {column = .., against = .., lines = .., across = ..}: the figures that are
               drawn at the end

An axis or derived value that is no setting is a variable: it serves expressions, and is a column of
the table. So that a misspelt setting is not taken for one, a variable of [axes] must be used, and
none may look like a setting.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ufm_fast.arguments import number, whole
from ufm_fast.errors import InputError
from ufm_fast.runs.files import read_text, toml_of
from ufm_fast.runs.options import SETTINGS
from ufm_fast.runs.settings import typed
from ufm_fast.studies.expressions import SYMBOLS

VERSION = 1
_SECTIONS = ("solve", "axes", "derived", "study", "plots")
_STUDY = ("version", "jobs", "starts", "warm")
_PLOT = ("column", "against", "lines", "across")

Content = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """What varies together: ``names``, and a row of values for each place on the axis."""

    names: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A figure: ``column`` against ``against``, a line for each value of ``lines``, a panel for
    each of ``across``.
    """

    name: str
    column: str
    against: str
    lines: str | None = None
    across: str | None = None


@dataclass(frozen=True)
class Study:
    """A study that was read: its name, and what its sections say. ``content`` is the file, as TOML
    has it.
    """

    name: str
    content: Content
    solve: Mapping[str, Any]
    axes: tuple[Axis, ...]
    derived: Mapping[str, str]
    jobs: int = 1
    starts: int | None = None
    warm: str | None = None
    plots: tuple[Plot, ...] = field(default=())

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of the axes, zipped ones one by one, then the derived values."""
        return (*(name for axis in self.axes for name in axis.names), *self.derived)


def read_study(path: Path) -> Study:
    """The study in a TOML file, named as the file is. Errors: InputError naming file, section and
    key.
    """
    return make_study(parse(read_text(path, "study"), str(path)), path.stem)


def parse(text: str, where: str) -> Content:
    """TOML. Errors: InputError."""
    try:
        return toml_of(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"study: {where} is not valid TOML ({error})") from error


def make_study(content: Mapping[str, Any], name: str) -> Study:
    """The study of a file's content. Errors: InputError for whatever is unknown, contradictory or
    of another type.
    """
    sections = {section: _section(content, section) for section in _SECTIONS}
    _known(content, _SECTIONS, "section", "study")
    options = sections["study"]
    version = whole(options.get("version", VERSION), "study: version", 1)
    if version > VERSION:
        raise InputError(
            f"study: version = {version} is newer than this program, which reads {VERSION}; "
            f"update ufm-fast"
        )
    _known(options, _STUDY, "key", "[study]")
    derived = {key: _expression(key, text) for key, text in sections["derived"].items()}
    axes = tuple(_axes(sections["axes"]))
    solve = {
        _setting(key): typed(_setting(key), value, "", "[solve] ")
        for key, value in sections["solve"].items()
    }
    study = Study(
        name,
        dict(content),
        solve,
        axes,
        derived,
        jobs=whole(options.get("jobs", 1), "study: jobs", 1),
        starts=None if "starts" not in options else whole(options["starts"], "study: starts", 1),
        warm=options.get("warm"),
        plots=tuple(_plots(sections["plots"])),
    )
    _check_names(study)
    _check_warm(study)
    for plot in study.plots:
        for name in filter(None, (plot.against, plot.lines, plot.across)):
            if name not in study.varied:
                raise InputError(
                    f"plots: {name!r} of {plot.name} is no axis of the study; there are "
                    f"{', '.join(study.varied)}"
                )
    return study


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name, {})
    if not isinstance(found, Mapping):
        raise InputError(f"study: [{name}] must be a table of keys, got {found!r}")
    return found


def _known(keys: Mapping[str, Any], allowed: tuple[str, ...], what: str, where: str) -> None:
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"
            raise InputError(f"study: unknown {what} {key!r} in {where}; {hint}")


def _setting(key: str) -> str:
    return key.replace("-", "_")


# ---- axes


def _axes(section: Mapping[str, Any]) -> Iterator[Axis]:
    for key, value in section.items():
        if key == "zip":
            tables = value if isinstance(value, list) else [value]
            yield from (_zipped(table) for table in tables)
        else:
            name = _setting(key)
            yield Axis((name,), tuple((value,) for value in _values(name, value)))


def _zipped(table: Any) -> Axis:
    if not isinstance(table, Mapping) or not table:
        raise InputError(
            f"axes: zip must be a table of lists, as {{classes = [10, 100], dim = [16, 128]}}; "
            f"got {table!r}"
        )
    columns = {
        _setting(key): _values(_setting(key), value, repeats=True) for key, value in table.items()
    }
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"axes: zipped lists must be of one length, got {listed} values")
    return Axis(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def _values(name: str, value: Any, *, repeats: bool = False) -> list[Any]:
    """The values of one axis, in the type of its setting. Errors: InputError for none, or one that
    comes twice.
    """
    values = _listed(name, value)
    if not values:
        raise InputError(
            f"axes: {name} has no values, so the study has no cells; give one at least"
        )
    if name in SETTINGS:
        values = [typed(name, item, "", "[axes] ") for item in values]
    else:
        for item in values:
            if not isinstance(item, (bool, int, float, str)):
                raise InputError(f"axes: {name} must hold numbers or words, got {item!r}")
    twice = next((item for place, item in enumerate(values) if item in values[:place]), None)
    if twice is not None and not repeats:
        raise InputError(f"axes: {name} gives {twice!r} twice; keep one")
    return values


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Mapping) and set(value) == {"log"}:
        return _log(name, value["log"])
    if isinstance(value, Mapping) and set(value) == {"range"}:
        return _range(name, value["range"])
    raise InputError(
        f"axes: {name} must be a list, {{log = [first, last, number]}} or {{range = [start, "
        f"stop]}}, got {value!r}"
        + ("" if isinstance(value, Mapping) else "; one value stands in [solve]")
    )


def _log(name: str, bounds: Any) -> list[Any]:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 3:
        raise InputError(
            f"axes: {name}: log must be [first, last, number of values], got {bounds!r}"
        )
    first, last = number(bounds[0], f"axes: {name}: log"), number(bounds[1], f"axes: {name}: log")
    count = whole(bounds[2], f"axes: {name}: number of values", 1)
    if not (first > 0 and last > 0):
        raise InputError(f"axes: {name}: log needs bounds > 0, got {first:g} and {last:g}")
    exponents = [i / max(count - 1, 1) for i in range(count)]
    values = [
        float(f"{first * (last / first) ** t:.12g}") for t in exponents
    ]  # so that decades are 10, 100, ...
    integral = (
        SETTINGS[name].kind is int
        if name in SETTINGS
        else all(isinstance(bound, int) for bound in bounds[:2])
    )
    return [round(value) for value in values] if integral else values


def _range(name: str, bounds: Any) -> list[Any]:
    if (
        not isinstance(bounds, (list, tuple))
        or len(bounds) not in (2, 3)
        or any(type(bound) is not int for bound in bounds)
    ):
        raise InputError(
            f"axes: {name}: range must be whole numbers [start, stop] or [start, stop, step], got "
            f"{bounds!r}"
        )
    if len(bounds) == 3 and bounds[2] == 0:
        raise InputError(f"axes: {name}: range has a step of 0; give another")
    return list(range(*bounds))


# ---- names that contradict one another


def _expression(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise InputError(
            f'derived: {name} must be an expression in quotes, as {name} = "K - 1"; got {text!r}'
        )
    return text


def _check_names(study: Study) -> None:
    """Errors: InputError for a name that stands twice, is a symbol, or is neither a setting nor a
    variable that serves.
    """
    places: dict[str, str] = {}
    listed = [
        *((name, "[solve]") for name in study.solve),
        *((name, "[axes]") for axis in study.axes for name in axis.names),
        *((name, "[derived]") for name in study.derived),
        *((("restarts", "[study] as starts"),) if study.starts is not None else ()),
    ]
    for name, place in listed:
        if name in places:
            raise InputError(f"study: {name} stands in {places[name]} and in {place}; keep one")
        places[name] = place
        if name not in SETTINGS:
            _check_variable(study, name, place)


def _check_variable(study: Study, name: str, place: str) -> None:
    if name in SYMBOLS:
        mend = f"write {SYMBOLS[name]}" if SYMBOLS[name] else "it follows from classes and samples"
        raise InputError(
            f"study: {name} in {place} is a symbol of expressions, not a setting; {mend}"
        )
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError(
            f"study: {name!r} in {place} is no name; use letters, digits and underscores"
        )
    near = difflib.get_close_matches(name, SETTINGS, 1, 0.8)
    used = any(re.search(rf"\b{name}\b", text) for text in study.derived.values())
    if near or (place == "[axes]" and not used):
        hint = (
            f"did you mean {near[0]}?"
            if near
            else "no expression of [derived] uses it; see ufm-fast solve --help for names"
        )
        raise InputError(f"study: {name} in {place} is no setting; {hint}")


def _check_warm(study: Study) -> None:
    if study.warm is None:
        return
    alone = [
        axis.names[0] for axis in study.axes if len(axis.names) == 1 and axis.names[0] in SETTINGS
    ]
    if study.warm not in alone:
        raise InputError(
            f"study: warm = {study.warm!r} must be an axis of its own that is a setting; those "
            f"are {alone}"
        )
    for name in ("start", "start_from", "restarts"):
        if (
            name in study.solve
            or name in study.varied
            or (name == "restarts" and study.starts is not None)
        ):
            raise InputError(f"study: warm starts and {name} contradict one another; drop one")


# ---- figures


def _plots(section: Mapping[str, Any]) -> Iterator[Plot]:
    for name, given in section.items():
        if not isinstance(given, Mapping) or not {"column", "against"} <= set(given):
            raise InputError(
                f"plots: {name} must be {{column = .., against = ..}}, with lines and across if "
                f"wanted; got {given!r}"
            )
        _known(given, _PLOT, "key", f"[plots] {name}")
        if not all(isinstance(value, str) for value in given.values()) or not re.fullmatch(
            r"[\w.-]+", name
        ):
            raise InputError(
                f"plots: {name} must hold names of columns, and have letters, digits, - and _ "
                f"itself; got {given!r}"
            )
        yield Plot(name, **given)


def finite(value: Any) -> bool:
    """Whether a value of a column is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
