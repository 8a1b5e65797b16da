"""Words on their way to a terminal: names of files may hold anything, and standard error may be gone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """``text`` with escapes for what is no letter of a line: a newline or an escape sequence in a name, say."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def quoted(path: Path) -> str:
    """``path`` as a word for the shell."""
    return shlex.quote(str(path))


class _Words:
    """Standard error whose loss (a full disk, a terminal that hung up) costs its words and nothing else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._lost()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """What is still buffered goes nowhere, or the interpreter would try it again when it ends, and fail."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_stderr() -> Iterator[None]:
    before = sys.stderr
    sys.stderr = _Words(before)
    try:
        yield
    finally:
        sys.stderr = before
