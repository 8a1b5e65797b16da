"""A folder in which one process at a time writes.

A lock may fail: its file can be removed, and some file systems have none. So whoever holds it also
remembers when the files were written last, and looks before each write whether somebody else has
written since.

Decisions

2026-11-25. One process at a time writes a run directory, by a lock that dies with its process
(`filelock`, which torch brings along). A resume also notes when the files that it read were
written, and is refused if another process has gone on with them before it holds the lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ufm_fast.errors import InputError
from ufm_fast.runs.files import sweep

FILES = ("config.json", "environment.json", "metrics.jsonl", "state.safetensors", "summary.json")
LOCK, LOG = ".lock", "metrics.jsonl"

Stamp = tuple[int, ...]


class Guarded:
    """A folder with the files of a run, and whether this process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None
        self._stamp: Stamp | None = None

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


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
