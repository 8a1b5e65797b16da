"""Solving the cells of a study: so many at a time, each in a process of its own, until none is left
or somebody stops it.

A thread of a pool holds a worker (`worker`) and solves one chain of cells after the other. The main
thread waits, writes the table and takes signals: SIGINT, SIGTERM, SIGUSR2 and SIGHUP let the cells
save and end. What is finished is known from the run directories, so the same command goes on after
anything.

Shard i of n takes the chains i, i + n, ... of those in the study's order. Shards may share the
folder: no cell is in two, the lock of a run directory keeps one process at a cell whoever asks, and
a cell that another process has is waited for.

A cell that fails is said, and the others go on. Where the disk fails, nothing more can be saved, so
the study ends there.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ufm_fast.errors import InputError
from ufm_fast.runs.signals import terminate_like_interrupt
from ufm_fast.studies.cells import Cell, Chain
from ufm_fast.studies.folder import StudyFolder
from ufm_fast.studies.table import Row, Table
from ufm_fast.studies.worker import Worker

#: Seconds between two tables, or twenty times what the last one took, where that is more.
_TABLE_SECONDS = 5.0


class UnwritableError(InputError):
    """The disk is full or broken: what is finished is kept, and no more can be."""


@dataclass
class Progress:
    """How far a study has come: cells of this call by how they ended, and the share of the work
    that is left.
    """

    cells: int
    finished: int = 0
    earlier: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    waiting: int = 0
    interrupted: bool = False
    work_left: float = 0.0
    work_done: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float | None:
        """Seconds that are left if work goes on at the rate so far; None before the first cell has
        ended.
        """
        if not self.work_done:
            return None
        return (time.monotonic() - self.began) * self.work_left / self.work_done


Report = Callable[[Progress, Cell | None], None]


def threads_each(jobs: int) -> int:
    """Threads of a cell where ``jobs`` run at a time: OMP_NUM_THREADS, or the processors of this
    process, shared out.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdecimal() and int(given) > 0:
        total = int(given)
    elif hasattr(os, "sched_getaffinity"):
        total = len(os.sched_getaffinity(0))
    else:
        total = os.cpu_count() or 1
    return max(1, total // jobs)


def parse_shard(text: str | None) -> tuple[int, int]:
    """(i, n) of the words ``i/n``. Errors: InputError unless 1 <= i <= n."""
    if text is None:
        return 1, 1
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"shard must be i/n with 1 <= i <= n, as 3/8; got {text!r}")
    return int(first), int(last)


def sharded(studied: Sequence[Chain], shard: tuple[int, int]) -> list[Chain]:
    """The chains of a shard."""
    return list(studied[shard[0] - 1 :: shard[1]])


class Runner:
    """One call of a study: the chains that it is to solve, and all cells of the study for its
    table.
    """

    def __init__(
        self,
        folder: StudyFolder,
        cells: Sequence[Cell],
        chains: Sequence[Chain],
        work: dict[str, float],
        jobs: int,
        report: Report,
    ) -> None:
        self.folder, self.chains, self.work, self.jobs, self.report = (
            folder,
            chains,
            work,
            jobs,
            report,
        )
        self.table = Table(folder, cells)
        self.progress = Progress(sum(map(len, chains)))
        self._stopped = threading.Event()
        self._workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._all_workers = [Worker(threads_each(self.jobs)) for _ in range(self.jobs)]
        self._lock = threading.Lock()
        self._table_at = 0.0

    def run(self) -> list[Row]:
        """Solve; the rows of the table. ``progress`` says how it ended.

        Errors: UnwritableError where the disk fails; InputError for a damaged run directory.
        """
        left = [chain for chain in map(self._unfinished, self.chains) if chain]
        self.progress.work_left = sum(self.work[cell.name] for chain in left for cell in chain)
        self.report(self.progress, None)
        for worker in self._all_workers:
            self._workers.put(worker)
        with terminate_like_interrupt():
            try:
                self._solve_all(left)
            except KeyboardInterrupt:
                self.progress.interrupted = True
            return self.table.write()

    def _unfinished(self, chain: Chain) -> Chain:
        """What is left of a chain."""
        done = 0
        while done < len(chain) and self.folder.summary(chain[done]) is not None:
            done += 1
        self.progress.finished += done
        self.progress.earlier += done
        return chain[done:]

    def _solve_all(self, chains: Sequence[Chain]) -> None:
        pool = ThreadPoolExecutor(self.jobs, "cells")
        pending: set[Future[Chain]] = set()
        try:
            pending = {pool.submit(self._solve_chain, chain) for chain in chains}
            while pending:
                done, pending = wait(
                    pending, timeout=1.0, return_when=FIRST_COMPLETED
                )  # timed: signals are taken everywhere
                rests = [future.result() for future in done]
                pending |= {pool.submit(self._solve_chain, rest) for rest in rests if rest}
                self.progress.waiting = len([rest for rest in rests if rest])
                self._write_by_the_clock()
        finally:
            self._stopped.set()
            self._end(pending)
            pool.shutdown(cancel_futures=True)

    def _end(self, pending: set[Future[Chain]]) -> None:
        """Let the cells save and end; a second interrupt ends them at once."""
        try:
            for future in pending:
                future.cancel()
            while pending:  # told again, for a cell that was just begun did not hear
                for worker in self._all_workers:
                    worker.stop()
                pending = wait(pending, timeout=2.0).not_done
        except KeyboardInterrupt:
            for worker in self._all_workers:
                worker.stop(kill=True)
            wait(pending)
        for worker in self._all_workers:
            worker.close()

    def _write_by_the_clock(self) -> None:
        if time.monotonic() >= self._table_at:
            began = time.monotonic()
            self.table.write()
            now = time.monotonic()
            self._table_at = now + max(_TABLE_SECONDS, 20.0 * (now - began))

    # ---- in a thread of the pool

    def _solve_chain(self, chain: Chain) -> Chain:
        """Solve a chain; what is left of it where another process has its next cell."""
        worker = self._workers.get()
        try:
            for place, cell in enumerate(chain):
                if self._stopped.is_set():
                    return ()
                reply = worker.solve(self.folder.cell(cell), self._given(cell))
                if reply["state"] == "busy":
                    self._stopped.wait(1.0)
                    return chain[place:]
                if reply["state"] == "unwritable":
                    raise UnwritableError(reply["error"])
                if reply["state"] == "interrupted":
                    return ()
                self._ended(cell, reply, chain[place + 1 :])
                if reply["state"] != "done":
                    return ()
            return ()
        finally:
            self._workers.put(worker)

    def _given(self, cell: Cell) -> dict[str, object]:
        """The settings of a cell, with the end of the one before in a chain to start from."""
        before = self._before(cell)
        return (
            dict(cell.given)
            if before is None
            else {**cell.given, "start_from": str(self.folder.cell(before))}
        )

    def _before(self, cell: Cell) -> Cell | None:
        if not cell.warm:
            return None
        chain = next(chain for chain in self.chains if any(one is cell for one in chain))
        place = next(place for place, one in enumerate(chain) if one is cell)
        return chain[place - 1] if place else None

    def _ended(self, cell: Cell, reply: dict[str, str], rest: Chain) -> None:
        with self._lock:
            self.progress.work_left -= self.work[cell.name]
            if reply["state"] == "done":
                self.progress.finished += 1
                self.progress.work_done += self.work[cell.name]
            elif not self._stopped.is_set():  # else it was ended by the user
                self.progress.failed[cell.name] = reply["error"]
                for other in rest:
                    self.progress.failed[other.name] = (
                        f"it starts at the end of {cell.name}, which failed"
                    )
                self.folder.note_error(
                    f"{cell.name} ({cell.words}): {reply['error']}\n{reply.get('trace', '')}"
                )
            self.report(self.progress, cell)
