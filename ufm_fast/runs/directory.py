"""A run's folder: configuration, environment, log, state and summary, each written whole or not at
all.

    config.json        what was solved and how, with a hash; its ``format`` is how a run directory
                       is recognised
    environment.json   versions and device
    metrics.jsonl      one flat object a log point, appended
    state.safetensors  W, H, b and the data (class counts, labels or target sets): enough to resume,
                       measure and export
    shards-N/          W, H and b in its place where several ranks wrote them (`shards`)
    summary.json       the result of the last solve that ended, and its tol; absent until one has
    plots/             figures
    .lock              held by the process that writes, so that two never do

Nothing is ever pickled. config.json is written after environment.json, so a folder has it or is no
run yet: what a killed process left in a folder without it is known as ours, and a new run takes its
place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ufm_fast.errors import InputError
from ufm_fast.runs.contents import is_record, wrong_in_summary
from ufm_fast.runs.files import (
    WriteError,
    append_line,
    is_temporary,
    json_ready,
    pretty_json,
    read_json,
    read_text,
    sweep,
    write_text,
)
from ufm_fast.runs.guarded import FILES, LOCK, LOG, Guarded
from ufm_fast.runs.words import quoted

FORMAT = "ufm-fast-run"
VERSION = 1


def is_run(path: Path) -> bool:
    """Whether ``path`` is a folder with a config.json of our format (a corrupt one is not)."""
    try:
        return read_json(path / "config.json", "run").get("format") == FORMAT
    except InputError:
        return False


class RunDirectory(Guarded):
    """One run on disk; make it with ``create`` or ``open``."""

    def __init__(self, path: Path, config: dict[str, Any], digest: str) -> None:
        super().__init__(path)
        self.config, self.hash = config, digest
        self._made: list[Path] = []

    # ---- making and opening

    @classmethod
    def create(
        cls, path: Path, config: Mapping[str, Any], digest: str, environment: Mapping[str, Any]
    ) -> RunDirectory:
        """Make the folder and write its first two files.

        Errors: InputError where the folder holds anything already, or can't be written; then
        nothing is left behind.
        """
        refuse_occupied(path, digest)
        run = cls(path, dict(config), digest)
        try:
            run._make_folders(path)
            run.lock()
        except (OSError, InputError) as error:
            run._remove_folders()
            if isinstance(error, OSError):
                raise InputError(
                    f"out: can't write to {path} ({error.strerror or error}); choose another --out"
                ) from error
            raise
        try:
            refuse_occupied(
                path, digest, locked=True
            )  # again, for another process may have been as quick
        except InputError:
            run.unlock()
            raise
        try:
            with run.alone():
                write_text(path / "environment.json", pretty_json(environment))
            run.write_config(config, digest)
        except BaseException as error:
            run.discard()
            if isinstance(error, WriteError):
                raise InputError(
                    f"out: can't write to {path} ({error.reason}); choose another --out"
                ) from error
            raise
        return run

    def _make_folders(self, path: Path) -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.insert(0, folder)

    def discard(self) -> None:
        """Take back what ``create`` made: for a solve that was refused before its first step."""
        for name in (*FILES[2:], *FILES[:2]):  # without config.json, what is left is known as ours
            with suppress(OSError):
                (self.path / name).unlink()
        sweep(self.path, FILES)
        with suppress(OSError):
            (self.path / LOCK).unlink()
        self.unlock()
        self._remove_folders()

    def _remove_folders(self) -> None:
        """Those that ``create`` made, as far as they are empty."""
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    @classmethod
    def open(cls, path: Path, name: str = "run", by: str = "solve") -> RunDirectory:
        """A run that the command ``by`` wrote. Errors: InputError for a foreign folder or one of
        another format version.
        """
        if not os.path.isdir(path):  # Path.is_dir would raise where the name is too long
            raise InputError(
                f"{name}: {path} is not a folder; give a run directory that ufm-fast {by} wrote"
            )
        if not (path / "config.json").exists():
            raise InputError(
                f"{name}: {path} is not a run directory of ufm-fast (it has no config.json)"
            )
        content = read_json(path / "config.json", name)
        if content.get("format") != FORMAT:
            raise InputError(
                f"{name}: {path} is not a run directory of ufm-fast (foreign config.json)"
            )
        if content.get("version") != VERSION:
            found = content.get("version")
            raise InputError(
                f"{name}: {path} has format version {found}, this program reads {VERSION}; solve "
                f"it anew"
            )
        config, digest = content.get("config"), content.get("hash")
        if not isinstance(config, dict) or not isinstance(digest, str):
            raise InputError(
                f"{name}: {path / 'config.json'} lacks its config or hash; the file was damaged"
            )
        return cls(path, config, digest)

    def write_config(self, config: Mapping[str, Any], digest: str) -> None:
        self.config, self.hash = dict(config), digest
        content = {"format": FORMAT, "version": VERSION, "hash": digest, "config": self.config}
        with self.alone():
            write_text(self.path / "config.json", pretty_json(content))

    # ---- summary and log

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the last solve ended with; None where none has ended."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        content = read_json(path, "run")
        wrong = wrong_in_summary(content)
        if wrong:
            raise InputError(
                f"run: {wrong} in {path} is none of ufm-fast; the file was damaged, remove it and "
                f"resume the run"
            )
        return content

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        with self.alone():
            write_text(self.path / "summary.json", pretty_json(summary))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to the log."""
        with self.alone():
            append_line(self.path / LOG, json.dumps(json_ready(record)))

    def records(self) -> list[dict[str, Any]]:
        """The log. A last line cut short by a kill is left out; any other bad line is an
        InputError.
        """
        path = self.path / LOG
        if not path.exists():
            return []
        lines = read_text(path, "run", "replace").split("\n")[:-1]
        found: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not is_record(record):
                raise InputError(
                    f"run: line {number} of {path} is not a log record; the file was damaged"
                )
            found.append(record)
        return found

    def truncate_log(self, last_step: int) -> None:
        """Drop records after ``last_step``: a run that was killed may have logged further than its
        saved state.
        """
        kept = [
            json.dumps(record) + "\n" for record in self.records() if record["step"] <= last_step
        ]
        with self.alone():
            write_text(self.path / LOG, "".join(kept))

    # ---- state

    @property
    def state_file(self) -> Path:
        return self.path / "state.safetensors"

    @property
    def has_state(self) -> bool:
        """Whether a state was saved."""
        return self.state_file.exists()

    @property
    def plots(self) -> Path:
        return self.path / "plots"


def refuse_occupied(path: Path, *hashes: str, locked: bool = False) -> None:
    """Errors: InputError unless ``path`` is free for a new run; ``hashes``: what the very same run
    may have.

    ``locked``: the caller holds the lock; else a run is asked whether another process does.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"out: {str(path)!r} is not UTF-8, as safetensors needs; choose another --out"
        ) from error
    try:
        is_file = path.exists() and not path.is_dir()
        occupied = path.is_dir() and not all(_is_leftover(entry) for entry in path.iterdir())
    except OSError as error:
        raise InputError(
            f"out: can't use {path} ({error.strerror}); choose another --out"
        ) from error
    if is_file:
        raise InputError(f"out: {path} is a file; choose another --out")
    if not occupied:
        return
    if not is_run(path):
        raise InputError(
            f"out: {path} is not empty and not a run of ufm-fast; choose another --out"
        )
    run = RunDirectory.open(path)
    if not locked and (path / LOCK).exists():
        with run.locked():  # which says so if another process writes there
            pass
    if run.hash in hashes:
        raise InputError(
            f"out: {path} holds this very run; go on with --resume {quoted(path)} or choose "
            f"another --out"
        )
    raise InputError(f"out: {path} holds a run with another configuration; choose another --out")


def _is_leftover(entry: Path) -> bool:
    """Whether a killed process of ours left the file before its folder was a run: config.json comes
    after all these.
    """
    if entry.name == "environment.json":
        try:
            return "ufm-fast" in read_json(entry, "out").get("versions", ())
        except (InputError, TypeError):
            return False
    return entry.name == LOCK or is_temporary(entry.name, FILES)
