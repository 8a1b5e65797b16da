"""Named convention presets: a paper's constants, translated into our conventions, with what is
exact said apart. They stand in presets.toml.

Only what the authors' code or text states counts as exact. Everything else is marked 'our choice':
the papers train networks, or leave sizes open, where the model needs a number.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ufm_fast.errors import InputError
from ufm_fast.runs.files import toml_of


@dataclass(frozen=True)
class Preset:
    """Defaults for a problem. ``settings`` are keyword arguments of Problem, and of solve where
    ``solver`` is given.

    ``exact``: what the source states; ``choice``: what is ours. Flags given beside a preset
    override it.
    """

    name: str
    title: str
    source: str
    exact: str
    choice: str
    settings: Mapping[str, Any]
    solver: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        return {**self.settings, **self.solver}


#: Every preset by its name.
PRESETS: dict[str, Preset] = {
    name: Preset(name, **content)
    for name, content in toml_of(Path(__file__).with_suffix(".toml").read_text("utf-8")).items()
}


def get_preset(name: str) -> Preset:
    """Errors: InputError for an unknown name, with the nearest ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise InputError(f"preset {name!r} is unknown; {hint}")
    return PRESETS[name]
