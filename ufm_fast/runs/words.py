"""Names of files and arrays in messages, hints and figures: they may hold anything."""

from __future__ import annotations

import shlex
from pathlib import Path


def printable(text: str) -> str:
    """``text`` with escapes for what is no letter of a line: a newline or an escape sequence in a
    name, say.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def quoted(path: Path) -> str:
    """``path`` as a word for the shell."""
    return shlex.quote(str(path))
