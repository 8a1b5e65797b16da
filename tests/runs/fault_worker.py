"""A short run, with a fault at each of its file operations in turn; run by test_faults.py, prints
what fell short.

An operation is what Python audits below the working folder (open, rename, mkdir, remove, chmod,
listdir) and a write: of a line of the log, a text, a state or a figure, of which a fault leaves
half. The faulty run is a fork, so that torch is imported once; what goes on from it runs here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import typer
from safetensors import SafetensorError

import ufm_fast.doctor
from ufm_fast.cli import main
from ufm_fast.runs import figures, state
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.guarded import FILES, LOCK

COMMON = ("--max-steps", "100", "--log-every", "100", "--quiet")
SOLVE = [
    "solve",
    "--classes",
    "3",
    "--dim",
    "3",
    "--per-class",
    "1",
    "--device",
    "cpu",
    "--pairwise",
    "none",
    "--no-certificate",
    "--no-log-metrics",
    "--out",
    "run",
]
RESUME = ["solve", "--resume", "run", *COMMON]
FAULTS = {"kill": 0, "no space": errno.ENOSPC, "input/output error": errno.EIO}


class Operations:
    """Counts operations, and lets number ``at`` end in ``fault``."""

    def __init__(self) -> None:
        self.count, self.at, self.fault, self.root = 0, -1, "", ""
        self.takes_space: list[bool] = []
        self.counting = False

    def happens(self, half: Callable[[], object] = lambda: None, takes_space: bool = True) -> None:
        if not self.counting:
            return
        self.count += 1
        if self.at < 0:
            self.takes_space.append(takes_space)
        if self.count - 1 == self.at:
            half()
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(FAULTS[self.fault], os.strerror(FAULTS[self.fault]))

    def audit(self, name: str, arguments: tuple[object, ...]) -> None:
        if self.counting and name in (
            "open",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.remove",
            "os.chmod",
            "os.listdir",
        ):
            path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
            if path and os.path.abspath(path).startswith(self.root):
                reads = name == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR)
                self.happens(takes_space=not reads and name in ("open", "os.rename", "os.mkdir"))


OPERATIONS = Operations()


class Picture:
    """Instead of a figure, whose drawing takes a second."""

    def savefig(self, path: Path, **_: object) -> None:
        path.write_text("a picture")


def install() -> None:
    plain_write, plain_text, plain_save = os.write, Path.write_text, state.save_file

    def write(handle: int, content: bytes) -> int:
        OPERATIONS.happens(lambda: plain_write(handle, content[: len(content) // 2]))
        return plain_write(handle, content)

    def write_text(path: Path, text: str, **options: str) -> int:
        OPERATIONS.happens(lambda: plain_text(path, text[: len(text) // 2], **options))
        return plain_text(path, text, **options)

    def save_file(tensors: object, path: Path, metadata: object) -> None:
        try:
            OPERATIONS.happens(lambda: path.write_bytes(b"half of a state"))
        except OSError as error:
            raise SafetensorError(
                f"Error while serializing: I/O error: {error.strerror}"
            ) from error
        plain_save(tensors, path, metadata)

    def fsync(handle: int) -> None:
        OPERATIONS.happens()  # and no disk is waited for

    os.write, Path.write_text, state.save_file, os.fsync = write, write_text, save_file, fsync
    typer.main.get_command = functools.cache(typer.main.get_command)
    ufm_fast.doctor.environment = lambda device: {"versions": {"ufm-fast": "0"}}
    figures.make_figures = lambda run: {"convergence": Picture()}
    sys.addaudithook(OPERATIONS.audit)


def fresh_folder(begun: Path | None) -> None:
    """``run`` is free or a copy of a begun run, and nothing else stands beside it."""
    for entry in Path().iterdir():
        shutil.rmtree(entry)
    if begun is not None:
        shutil.copytree(begun, "run")


def called(arguments: list[str]) -> tuple[int, str]:
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        return main(arguments), words.getvalue()


def with_fault(command: list[str], at: int, fault: str) -> tuple[int, str]:
    """Exit code and standard error of a command whose operation ``at`` ends in ``fault``; -9 where
    it was killed, in a fork.
    """
    OPERATIONS.at, OPERATIONS.fault, OPERATIONS.count, OPERATIONS.counting = at, fault, 0, True
    try:
        if fault != "kill":
            return called(command)
        process = os.fork()
        if process == 0:
            called(command)
            os._exit(1)  # the operation that was to be its last did not come
        return -os.WTERMSIG(os.waitpid(process, 0)[1]), ""
    except Exception as error:
        return 1, f"Traceback: {error!r}"
    finally:
        OPERATIONS.counting = False


def shortcomings(command: list[str], at: int, fault: str, value: float) -> Iterator[str]:
    """What falls short after a fault in ``command``, and after what anybody would try next."""
    code, words = with_fault(command, at, fault)
    if "Traceback" in words:
        yield f"a traceback: {words}"
    elif code == 2 and (words.count("\n") != 1 or not words.startswith("error: ")):
        yield f"not one line: {words!r}"
    elif code not in (-9, 0, 2):
        yield f"exit code {code}: {words}"
    code, words = called(RESUME if Path("run/config.json").exists() else command)
    if code != 0:
        yield f"does not go on: {words}"
        return
    run = RunDirectory.open(Path("run"))
    if run.summary is None or abs(run.summary["value"] - value) > 1e-12 * value:
        yield f"another value: {run.summary}"
    steps = [record["step"] for record in run.records()]
    if steps != sorted(set(steps)):
        yield f"a log out of order: {steps}"
    wanted = {*FILES, LOCK} | {"plots/convergence.png", "plots/convergence.pdf"}
    found = {str(path.relative_to("run")) for path in Path("run").rglob("*") if not path.is_dir()}
    if found != wanted or list(Path().iterdir()) != [Path("run")]:
        yield f"left over: {sorted(found - wanted)}, missing: {sorted(wanted - found)}"


def try_all(folder: Path) -> None:
    torch.set_num_threads(1)
    begun, place = folder / "begun", folder / "place"
    place.mkdir()
    os.chdir(folder)
    OPERATIONS.root = str(place)
    install()
    called([*SOLVE[:-1], "begun", "--start", "normal", "--max-steps", "2", "--quiet", "--no-plots"])
    os.chdir(place)
    for template, command in ((None, [*SOLVE, *COMMON]), (begun, RESUME)):
        fresh_folder(template)
        code, words = with_fault(command, -1, "")
        takes_space, OPERATIONS.takes_space = OPERATIONS.takes_space, []
        count = len(takes_space)
        value = RunDirectory.open(Path("run")).summary["value"]
        print(
            json.dumps({"command": command[1], "operations": count, "code": code, "words": words}),
            flush=True,
        )
        for at in range(count):
            for fault in FAULTS if takes_space[at] else FAULTS.keys() - {"no space"}:
                fresh_folder(template)
                for text in shortcomings(command, at, fault, value):
                    print(
                        json.dumps(
                            {"command": command[1], "at": at, "fault": fault, "short": text}
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    try_all(Path(sys.argv[1]).resolve())
