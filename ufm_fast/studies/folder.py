"""The folder of a study.

    study.toml    the study as it was given; what makes the folder that of a study
    cells/NAME    a run directory for each cell
    table.csv     a row a cell, and table.parquet where pandas and pyarrow are installed
    plots/        figures
    errors.log    what went wrong in cells, with the traceback
    .lock         held while study.toml or the table is written: shards may share the folder

What is there is known from the run directories alone: a cell is finished when its summary says how
it ended, and not that it was interrupted. So nothing can contradict them after a kill.

A folder takes the study it has, or one that has grown: all its cells, and more. Any other study is
refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import WriteError, append_line, read_text, sweep, write_text
from ufm_fast.studies.cells import Cell, chains
from ufm_fast.studies.spec import Study, make_study, parse

FILE, TABLE, PARQUET, ERRORS = "study.toml", "table.csv", "table.parquet", "errors.log"


def is_study(path: Path) -> bool:
    """Whether ``path`` is the folder of a study."""
    return os.path.isfile(path / FILE)


class StudyFolder:
    """One study on disk; make it with ``create`` or ``open``."""

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study = path, study

    @classmethod
    def open(cls, path: Path, name: str = "study") -> StudyFolder:
        """Errors: InputError for a folder without a study."""
        if not is_study(path):
            raise InputError(
                f"{name}: {path} is no folder of a study (it has no {FILE}); give one that "
                f"ufm-fast study wrote"
            )
        text = read_text(path / FILE, name)
        return cls(path, make_study(parse(text, str(path / FILE)), path.name))

    @classmethod
    def create(cls, path: Path, study: Study, text: str) -> StudyFolder:
        """The folder of a study, made or gone on with. ``text``: of its file.

        Errors: InputError where another study or something else stands there, or it can't be
        written.
        """
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            _refuse_occupied(path, study)
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, study)
            with folder.locked():
                folder._claim(text)
            folder.cells.mkdir(exist_ok=True)
        except OSError as error:
            _take_back(made)
            raise InputError(
                f"out: can't write to {path} ({error.strerror or error}); choose another --out"
            ) from error
        except WriteError:
            _take_back(made)
            raise
        return folder

    def _claim(self, text: str) -> None:
        """Write study.toml, unless it says the same already. Errors: InputError for another
        study.
        """
        sweep(self.path, (FILE, TABLE, PARQUET))
        _refuse_occupied(self.path, self.study)  # again, for another process may have been as quick
        if (
            not is_study(self.path)
            or StudyFolder.open(self.path, "out").study.content != self.study.content
        ):
            write_text(self.path / FILE, text)

    @property
    def cells(self) -> Path:
        return self.path / "cells"

    def cell(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.cells / cell.name

    def summary(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell ended with; None for one that is not. Errors: InputError for a
        damaged file.
        """
        path = self.cell(cell)
        if not (path / "summary.json").exists():
            return None
        found = RunDirectory.open(path, "study").summary
        return None if found is None or found.get("outcome") == "interrupted" else found

    def note_error(self, text: str) -> None:
        """Add to errors.log, if that can be written."""
        with suppress(WriteError):
            append_line(self.path / ERRORS, text)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that write study.toml and the table; they hold it for
        moments.
        """
        lock = FileLock(self.path / ".lock")
        with suppress(
            NotImplementedError
        ):  # a file system without locks: each write is whole all the same
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _same(there: Study, here: Study) -> bool:
    """Whether ``here`` has all cells of ``there``, solved in the same way."""
    if (there.warm, there.starts) != (here.warm, here.starts):
        return False
    return _names(there) <= _names(here)


def _names(study: Study) -> set[str]:
    return {cell.name for chain in chains(study) for cell in chain}


def _refuse_occupied(path: Path, study: Study) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"out: {path} is a file; choose another --out")
    if is_study(path):
        if not _same(StudyFolder.open(path, "out").study, study):
            raise InputError(
                f"out: {path} holds another study; choose another --out (a study may grow by "
                f"values)"
            )
    elif path.is_dir() and any(not _ours(entry.name) for entry in path.iterdir()):
        raise InputError(f"out: {path} is not empty and holds no study; choose another --out")


def _ours(name: str) -> bool:
    """Whether a killed process left the file before study.toml was there."""
    return name == ".lock" or name.startswith(f".{FILE}.")


def _take_back(made: Sequence[Path]) -> None:
    """Remove the folders that were made, with our own first files."""
    for folder in made:
        with suppress(OSError):
            for entry in folder.iterdir():
                if _ours(entry.name):
                    entry.unlink()
            folder.rmdir()


def toml_text(content: Mapping[str, Any]) -> str:
    """A study's content as TOML."""
    import tomli_w

    return tomli_w.dumps(content)
