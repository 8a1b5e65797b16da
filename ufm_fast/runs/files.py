"""Files that are written whole or not at all, and JSON without nan.

A file is written beside its final name and renamed over it, so a reader sees the old one or the new
one. A temporary file is named after its process and machine, so that what a killed process left is
known as such, and swept. What the machine can't write (no space, an error of the disk, a folder
that was moved) is an InputError like a user's other troubles: one line that names the file and the
mend.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ufm_fast.errors import InputError

#: A temporary file: what it will be, the machine and process that write it, and mkstemp's letters.
#: The first version gave the letters only.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+\.(?:json|jsonl|safetensors|png|pdf|npz|csv|parquet))\.(?:(?P<machine>.*)-(?P<process>\d+)\.)?\w{8}"
)
#: Older than this, a temporary file of another machine, or without a process, is nobody's.
_ABANDONED = 24 * 3600.0


class WriteError(InputError):
    """A file can't be written. What was there before is still there."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.reason = (
            error.strerror or str(error) if isinstance(error, OSError) else first_line(error)
        )
        mend = "mend that and go on"
        if (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "No space left" in self.reason
        ):
            mend = "free some space and go on"
        super().__init__(
            f"can't write {path} ({self.reason}); what was there before is kept: {mend}"
        )


# ---- writing


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends without an error.
    Errors: WriteError.
    """
    temporary = None
    try:
        machine = re.sub(r"\W", "_", platform.node())
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.{machine}-{os.getpid()}.", dir=path.parent
        )
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(
            0o666 & ~mask
        )  # mkstemp makes private files; a result is as public as any other file
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise WriteError(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, or nothing. Errors: WriteError."""
    content = (line + "\n").encode()
    try:
        flags = (
            os.O_WRONLY
            | os.O_APPEND
            | os.O_CREAT
            | getattr(os, "O_NOFOLLOW", 0)
            | getattr(os, "O_BINARY", 0)
        )
        handle = os.open(path, flags, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                while content:
                    content = content[os.write(handle, content) :]
            except BaseException:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise WriteError(path, error) from error


def sweep(folder: Path, files: tuple[str, ...] = ()) -> None:
    """Remove temporary files of processes that are no more; those of ``files`` whoever began them:
    the caller has the lock.
    """
    paths = []
    with suppress(OSError):
        paths = list(folder.iterdir())
    for path in paths:
        found = _TEMPORARY.fullmatch(path.name)
        with suppress(OSError):
            if found and (found["name"] in files or _abandoned(path, found)):
                path.unlink()


def is_temporary(name: str, files: tuple[str, ...]) -> bool:
    """Whether ``name`` is that of a temporary file for one of ``files``."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found["name"] in files


def _abandoned(path: Path, found: re.Match[str]) -> bool:
    if found["machine"] == re.sub(r"\W", "_", platform.node()):
        return not _running(int(found["process"]))
    return time.time() - path.stat().st_mtime > _ABANDONED


def _running(process: int) -> bool:
    if os.name != "posix":  # there a signal 0 is no question
        import psutil

        return bool(psutil.pid_exists(process))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


# ---- reading


def read_text(path: Path, name: str, errors: str = "strict") -> str:
    """Errors: InputError for a file that is missing, can't be read, or is none (a pipe would be
    waited for).
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{name}: {path} is not a file; remove it")
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: {path} is missing, truncated or not text ({first_line(error)})"
        ) from error


def toml_of(text: str) -> dict[str, Any]:
    """The content of TOML. Errors: ValueError or RecursionError."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return dict(toml.loads(text))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. Errors: InputError for a missing, truncated or foreign file."""
    try:
        content = json.loads(read_text(path, name))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: {path} is truncated or not JSON ({first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{name}: {path} does not hold an object; it is not a file of ufm-fast")
    return content


# ---- JSON


def json_ready(value: Any) -> Any:
    """``value`` with numpy-free containers and with nan and infinities as None: JSON has no such
    numbers.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def pretty_json(content: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(content), indent=2) + "\n"


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON text."""
    text = json.dumps(json_ready(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
