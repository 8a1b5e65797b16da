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

A lock may fail: its file can be removed, and some file systems have none. So whoever holds it also
remembers when the files were written last, and looks before each write whether somebody else has
written since.

Decisions

2026-11-25. One process at a time writes a run directory, by a lock that dies with its process
(`filelock`, which torch brings along). A resume also notes when the files that it read were
written, and is refused if another process has gone on with them before it holds the lock.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ufm_fast.arguments import MOST
from ufm_fast.errors import InputError
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
from ufm_fast.runs.words import quoted

FORMAT = "ufm-fast-run"
VERSION = 1
FILES = ("config.json", "environment.json", "metrics.jsonl", "state.safetensors", "summary.json")
LOCK, LOG = ".lock", "metrics.jsonl"

Stamp = tuple[int, ...]


def is_run(path: Path) -> bool:
    """Whether ``path`` is a folder with a config.json of our format (a corrupt one is not)."""
    try:
        return read_json(path / "config.json", "run").get("format") == FORMAT
    except InputError:
        return False


class RunDirectory:
    """One run on disk; make it with ``create`` or ``open``."""

    def __init__(self, path: Path, config: dict[str, Any], digest: str) -> None:
        self.path, self.config, self.hash = path, config, digest
        self._made: list[Path] = []
        self._lock: FileLock | None = None
        self._stamp: Stamp | None = None

    # ---- making and opening
    # ----------------------------------------------------------------------------------------

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

    # ---- several processes
    # -----------------------------------------------------------------------------------------

    def lock(self, stamp: Stamp | None = None) -> None:
        """Keep other processes from writing here, and sweep what killed ones left. ``stamp``: of
        the run when it was read.

        Errors: InputError where another process writes, or has written since.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"run: another process is writing to {self.path}; wait for it or choose another "
                f"--out"
            ) from None
        except NotImplementedError:
            pass  # a file system without locks: the stamp is all there is
        except OSError as error:
            raise InputError(
                f"run: can't lock {self.path} ({error.strerror or error}); choose another --out"
            ) from error
        self._lock, self._stamp = lock, self.stamp()
        if stamp is not None and stamp != self._stamp:
            self.unlock()
            raise InputError(
                f"run: another process has gone on with {self.path} meanwhile; resume it again"
            )
        sweep(self.path, FILES)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self._stamp = None

    @contextmanager
    def locked(self, stamp: Stamp | None = None) -> Iterator[None]:
        """``lock``, unless this object holds it already (as after ``create``), and ``unlock`` at
        the end.
        """
        if self._lock is None:
            self.lock(stamp)
        try:
            yield
        finally:
            self.unlock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around each write. Errors: InputError where another process has written since this one
        did.
        """
        if self._stamp is not None and self.stamp() != self._stamp:
            raise InputError(
                f"run: another process has gone on with {self.path} meanwhile; nothing more is "
                f"written here"
            )
        try:
            yield
        finally:
            if self._stamp is not None:
                self._stamp = self.stamp()

    def stamp(self) -> Stamp:
        """When the files that a resume reads were last written, and how long the log is."""
        found = [_stat(self.path / name) for name in FILES]
        return tuple(
            0 if s is None else s.st_size if name == LOG else s.st_mtime_ns
            for name, s in zip(FILES, found, strict=True)
        )

    # ---- summary and log
    # -------------------------------------------------------------------------------------------

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the last solve ended with; None where none has ended."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        content = read_json(path, "run")
        wrong = _wrong_in_summary(content)
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
            if not _is_record(record):
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
    # ----------------------------------------------------------------------------------------------

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


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _wrong_in_summary(content: Mapping[str, Any]) -> str:
    """The first entry that is not what a solve or a training writes, of those that are read again;
    "" where there is none.
    """
    parts = {name: content.get(name) or {} for name in ("theory", "certificate", "metrics")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            return name
    numbers = {name: content.get(name) for name in ("value", "tol", "steps")}
    numbers |= {
        "theory": parts["theory"].get("value"),
        "certificate": parts["certificate"].get("lower_bound"),
    }
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return name
    words = {name: content.get(name, "") for name in ("outcome", "method", "message")}
    return next((name for name, value in words.items() if not isinstance(value, str)), "")


def _is_record(content: Any) -> bool:
    """A log record: a whole step, and numbers or null under every other name."""
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("step"), int)
        or not 0 <= content["step"] <= MOST
    ):
        return False
    return all(
        value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)
        for value in content.values()
    )
