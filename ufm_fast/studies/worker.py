"""Processes that solve cells: a worker imports the library once, and forks itself for each cell.

So a cell has a process of its own (one that dies, by a signal or for want of memory, takes nothing
with it) and does not wait seconds for its imports. Where there is no fork a worker solves one cell
and ends.

    runner  --request, a line of JSON-->  worker  --fork-->  cell
    runner  <--reply, a line of JSON---   worker  <--pipe--  cell

A request is {"path": run directory, "given": settings}. A reply has a ``state``: done, interrupted
(saved), busy (another process has the cell), failed (``error`` in one line, ``trace``), unwritable
(the disk, ``error``) or died (``error``).

Signals: the worker is the leader of a process group and ignores those that stop a study; a cell in
it saves and ends, as Ctrl-C makes any solve do. A cell that loses its worker, or a worker that
loses its runner (a kill), ends at once, without saving more than a solve saves every ten seconds: a
study that goes on must not find its cells still being solved by nobody's processes.

A broken cell goes on from its saved state, by the steps that are left of ``max_steps``. Two begin
anew, so that the table is that of an undisturbed study: one that has taken less than ten seconds,
and one of several restarts, of which a resume would begin no other. What a state does not hold (the
pairs of L-BFGS, a momentum, the step length of a search) is lost to a resume: it may take other
steps to the same minimum, and end elsewhere where ``max_steps`` ends it. A method without any, such
as gradient descent at a given rate, evaluates the saved point once more and takes the same steps.
The table says of such cells where they went on (``resumed_at``).

Decisions

2026-11-30. No `multiprocessing`, whose forkserver does the same: it runs the caller's main module
again in every child, so ``study`` could not be called from a script without a guard. No pool of
processes, in which a death breaks the pool.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast.errors import InputError
from ufm_fast.runs.files import WriteError, first_line

if TYPE_CHECKING:
    from ufm_fast.runs.job import Job

Reply = dict[str, Any]

#: The command of a worker.
COMMAND = (sys.executable, "-m", "ufm_fast.studies.worker")
#: What a scheduler, a terminal and Ctrl-C stop a study with.
STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)
)
#: A cell that was solved for less begins anew.
ANEW_SECONDS = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


# ---- the runner's end


class Worker:
    """A worker process, started when it is first needed, and anew where it died."""

    def __init__(self, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        # A file of the user's folder must not pass for a module (Python 3.11 and later).
        self._environment = {
            **os.environ,
            **dict.fromkeys(names, str(threads)),
            "PYTHONSAFEPATH": "1",
        }
        here = str(Path(__file__).parents[2])  # a checkout that only the caller's sys.path has
        self._environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [here, os.environ.get("PYTHONPATH")])
        )
        self._process: subprocess.Popen[bytes] | None = None

    def solve(self, path: Path, given: Mapping[str, Any]) -> Reply:
        """Solve a cell and wait for it."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # a worker that died has no reply either
            process.stdin.write(json.dumps({"path": str(path), "given": given}).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            return {"state": "died", "error": f"its worker ended ({_cause(process.wait())})"}
        reply: Reply = json.loads(line)
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )
        return self._process

    def stop(self, kill: bool = False) -> None:
        """Let the cell that is being solved save and end; ``kill``: end at once."""
        if self._process is None or self._process.poll() is not None:
            return
        with suppress(OSError):
            if not hasattr(os, "killpg"):
                self._process.terminate()
            else:
                os.killpg(self._process.pid, signal.SIGKILL if kill else signal.SIGTERM)

    def close(self) -> None:
        """End the worker, and a cell that is still being solved."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self._process.wait()
            self._process = None


def _cause(code: int) -> str:
    """How a process ended, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"{name}, as where memory runs out" if name == "SIGKILL" else name


# ---- the worker's end


def main() -> None:
    """Read requests until there is no more."""
    import ufm_fast.doctor
    import ufm_fast.runs.log
    import ufm_fast.runs.resuming
    import ufm_fast.runs.running
    import ufm_fast.runs.state
    import ufm_fast.solving  # noqa: F401

    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    forks = hasattr(os, "fork")
    while line := requests.readline():
        request = json.loads(line)
        if not forks:
            _listen()
        reply = _in_fork(request) if forks else solve_cell(Path(request["path"]), request["given"])
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        if not forks:
            return


def _in_fork(request: Mapping[str, Any]) -> Reply:
    reading, writing = os.pipe()
    watched, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.close(held)
        _as_cell(request, writing, watched)
    os.close(writing)
    os.close(watched)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    os.close(held)
    with suppress(ValueError):
        reply: Reply = json.loads(text)
        return reply
    return {
        "state": "died",
        "error": f"its process ended ({_cause(os.waitstatus_to_exitcode(status))})",
    }


def _as_cell(request: Mapping[str, Any], writing: int, watched: int) -> None:
    """What the forked process does; it never returns."""
    try:
        threading.Thread(target=_end_with, args=(watched, sys.stdin.fileno()), daemon=True).start()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        try:
            _listen()
            reply = solve_cell(Path(request["path"]), request["given"])
        except KeyboardInterrupt:
            reply = {"state": "interrupted"}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(reply).encode())
    finally:
        os._exit(0)


def _end_with(*pipes: int) -> None:
    """End this process when the other end of one of ``pipes`` is gone."""
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe, 0)  # a hang-up is always told
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


# ---- a cell


def solve_cell(path: Path, given: Mapping[str, Any]) -> Reply:
    """Solve, or go on with, the run directory of a cell. Never raises."""
    try:
        return {"state": _solve(path, given)}
    except KeyboardInterrupt:
        return {"state": "interrupted"}
    except BaseException as error:
        ours = isinstance(error, InputError)
        state = (
            "unwritable"
            if _of_disk(error)
            else "busy"
            if ours and "another process" in str(error)
            else "failed"
        )
        trace = "" if ours else traceback.format_exc()
        kind = "" if ours else f"{type(error).__name__}: "
        return {"state": state, "error": kind + first_line(error), "trace": trace}  # type: ignore[arg-type]


def _listen() -> None:
    """Take signals that stop: the first interrupts, and a second must not interrupt the saving."""

    def stop(*_: object) -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in STOPPING:
        signal.signal(number, stop)


def _of_disk(error: BaseException) -> bool:
    """Whether the disk, not the cell, is what failed: then no other cell can be saved either."""
    causes = (error, error.__cause__)
    return any(
        isinstance(cause, WriteError) or (isinstance(cause, OSError) and cause.errno in _FULL)
        for cause in causes
    )


def _solve(path: Path, given: Mapping[str, Any]) -> str:
    from ufm_fast.runs.running import execute, execute_groups

    job = _job(path, given)
    if job is None:
        return "done"
    if job.grouped:
        execute_groups(job)
        return "done"
    outcome = execute(job, lambda record: None).outcome.value
    return "interrupted" if outcome == "interrupted" else "done"


def _job(path: Path, given: Mapping[str, Any]) -> Job | None:
    """The solve of a cell as far as it has come; None where it is finished."""
    from ufm_fast.runs.directory import RunDirectory
    from ufm_fast.runs.job import prepare
    from ufm_fast.runs.resuming import resume

    if not (path / "config.json").exists():
        return prepare(given, None, path)
    run = RunDirectory.open(path)
    with run.locked():  # or another process has the cell
        summary = run.summary
        if summary is not None and summary.get("outcome") != "interrupted":
            return None
        anew = _begins_anew(run)
        if anew:
            run.discard()
    if anew:
        return prepare(given, None, path)
    job = resume(path, {}, None)
    if isinstance(job, RunDirectory):
        return None
    job.config["max_steps"] = max(_limit(job, given) - job.progress.step, 0)
    return job


def _begins_anew(run: Any) -> bool:
    from ufm_fast.runs.grouped import saved_data
    from ufm_fast.runs.state import load_state

    if (
        not run.state_file.exists()
        or run.config.get("restarts", 1) > 1
        or saved_data(run) is not None
    ):
        return True
    return load_state(run)[1].seconds < ANEW_SECONDS


def _limit(job: Job, given: Mapping[str, Any]) -> int:
    """The most steps of the whole cell."""
    from ufm_fast.runs.job import options_of
    from ufm_fast.solvers.table import METHODS

    if given.get("max_steps") is not None:
        return int(given["max_steps"])
    options = options_of({**job.config, "max_steps": None})
    return METHODS[options.method].make(job.problem, options).max_steps


if __name__ == "__main__":
    main()
