"""Values that a study derives from others: ``lambda_h = "lambda_w / n"``, ``dim = "K - 1"``.

An expression is Python's arithmetic (also comparisons, ``a if c else b``, lists and f-strings),
evaluated by simpleeval, which walks the syntax tree and has no access to anything but the names and
functions given here.

Names: every setting that has a value, axis and derived value, and the symbols
K (classes), d (dim), n (per_class), N (samples), M (layers). A derived value may use another; a
circle is refused.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from simpleeval import EvalWithCompoundTypes, NameNotDefined

from ufm_fast.errors import InputError
from ufm_fast.runs.options import SETTINGS

#: The papers' symbols, and the setting that each stands for; N has none.
SYMBOLS = {"K": "classes", "d": "dim", "n": "per_class", "M": "layers", "N": ""}
_FUNCTIONS = {
    "sqrt": math.sqrt,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "exp": math.exp,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
    "sum": sum,
    "int": int,
    "str": str,
}


def evaluate(derived: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``derived`` (name -> expression) beside the settings and axes of one cell.

    Errors: InputError naming the expression that does not evaluate, where, and why.
    """
    scope = _Scope(derived, known)
    return {name: scope.value(name) for name in derived}


class _Scope:
    """Names of one cell, looked up as expressions ask for them."""

    def __init__(self, derived: Mapping[str, str], known: Mapping[str, Any]) -> None:
        self.derived, self.known = derived, known
        self._found: dict[str, Any] = {}
        self._open: list[str] = []

    def value(self, name: str) -> Any:
        """Of a derived value. Errors: InputError."""
        if name in self._found:
            return self._found[name]
        if name in self._open:
            raise InputError(
                f"derived: {' needs '.join([*self._open, name])}, which is a circle; write one of "
                f"them out"
            )
        self._open.append(name)
        self._found[name] = _checked(name, self._evaluated(name), self.derived[name])
        self._open.pop()
        return self._found[name]

    def _evaluated(self, name: str) -> Any:
        evaluator = EvalWithCompoundTypes(functions=dict(_FUNCTIONS), names=self._lookup)
        try:
            return evaluator.eval(self.derived[name])
        except InputError:
            raise
        except NameNotDefined as error:
            values = ", ".join(sorted({**self.known, **self.derived}))
            raise InputError(
                f"derived: {name} = {self.derived[name]!r} uses {error.name!r}, which has no "
                f"value; "
                f"the symbols are {', '.join(SYMBOLS)}, and values have {values}"
            ) from error
        except Exception as error:  # whatever arithmetic and syntax can raise
            where = ", ".join(f"{key} = {value}" for key, value in self.known.items())
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"derived: {name} = {self.derived[name]!r} does not evaluate where {where} "
                f"({reason}); mend the expression"
            ) from error

    def _lookup(self, node: ast.Name) -> Any:
        name = SYMBOLS.get(node.id) or node.id
        if name == "N":
            return self._samples()
        if name in self.derived:
            return self.value(name)
        if name in self.known:
            return self.known[name]
        if name == "classes" and self._groups() is not None:
            return sum(classes for classes, _ in self._groups() or ())
        if name == "per_class" and not self._has_data():
            return 10
        default = SETTINGS[name].default if name in SETTINGS else None
        if default is None or name in (
            "lambda_w",
            "lambda_h",
        ):  # which are scaled where they are not given
            raise NameNotDefined(node.id, "")
        return default

    def _samples(self) -> int:
        groups = self._groups()
        if groups is not None:
            return sum(classes * samples for classes, samples in groups)
        if self._has_data():
            raise InputError(
                "derived: N is known of per_class, counts and groups only; write the number of "
                "samples"
            )
        return int(self._lookup(ast.Name("classes")) * self._lookup(ast.Name("per_class")))

    def _has_data(self) -> bool:
        return any(
            self._given(name) is not None
            for name in ("counts", "groups", "labels", "targets", "multiplicities")
        )

    def _given(self, name: str) -> Any:
        return self.value(name) if name in self.derived else self.known.get(name)

    def _groups(self) -> list[tuple[int, int]] | None:
        """(classes, samples each), where counts or groups say so."""
        counts, groups = self._given("counts"), self._given("groups")
        if isinstance(counts, (list, tuple)):
            return [(1, int(count)) for count in counts]
        if isinstance(groups, str):
            from ufm_fast.class_groups import ClassGroups

            return list(ClassGroups.of_words(groups).runs)
        return None


def _checked(name: str, value: Any, expression: str) -> Any:
    """As the setting's type has it. Errors: InputError for no finite number, word or list, or a
    fraction for a whole number.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"derived: {name} = {expression!r} is {value}; mend the expression")
    if not isinstance(value, (bool, int, float, str, list, tuple)):
        raise InputError(
            f"derived: {name} = {expression!r} is a {type(value).__name__}, no number, word or list"
        )
    row = SETTINGS.get(name)
    if row is not None and row.kind is int and isinstance(value, float):
        if not value.is_integer():
            raise InputError(
                f"derived: {name} = {expression!r} is {value:g}, no whole number; use round(..), "
                f"floor(..) or ceil(..)"
            )
        return int(value)
    return list(value) if isinstance(value, tuple) else value
