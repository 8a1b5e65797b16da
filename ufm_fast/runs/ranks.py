"""Several ranks that solve one problem into one run directory, as torchrun starts them.

    torchrun --nproc-per-node 4 -m ufm_fast solve ...

Every rank reads the same settings and data; what is read, checked and hashed is compared before
anything is written, and what one rank refuses all refuse, in the same words. The first rank writes
log, summary and state, each rank its blocks of the point (`shards`), into a folder that all of them
see. A signal that ends a run stops all ranks after the evaluation they are in.

A rank that is killed takes its connections with it: the others' next exchange fails, and they end
with one line. What was saved last is whole, and goes on with any number of ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import config_hash
from ufm_fast.runs.guarded import Stamp

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.runs.job import Job

#: Ranks that have not met by then are not all there: one that is killed in its first moment ends
#: the others so long after they have read torch, which takes a busy machine its own time. torchrun
#: watches ranks itself, and stops all where one has died: then a cluster may take its time to read
#: torch from a shared disk.
START, WATCHED_START = timedelta(seconds=20), timedelta(minutes=5)
#: An exchange that takes longer has lost a rank that still has its connections. Between two of them
#: lie a chunk's products, or a block of the state on its way to the disk.
LIMIT = timedelta(minutes=10)
_Found = TypeVar("_Found")


def started() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


class RefusedError(InputError):
    """What all ranks refuse together."""


@dataclass(frozen=True)
class Ranks:
    """This rank among all."""

    rank: int
    number: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(
        self, stage: Callable[[], _Found], said_by: Callable[[_Found], str] | None = None
    ) -> _Found:
        """``stage`` on every rank. Errors: InputError on all of them where one refuses, or where
        what ``said_by`` tells of the outcome is not the same on all.
        """
        import torch.distributed as dist

        found: _Found | None = None
        try:
            found = stage()
            own = "", said_by(found) if said_by is not None else ""
        except InputError as error:
            own = str(error), ""
        told: list[Any] = [None] * self.number
        dist.all_gather_object(told, own)
        refused = [(rank, words) for rank, (words, _) in enumerate(told) if words]
        if refused:
            rank, words = refused[0]
            raise RefusedError(own[0] or (words if rank == 0 else f"rank {rank}: {words}"))
        unlike = [rank for rank, (_, content) in enumerate(told) if content != told[0][1]]
        if unlike:
            raise RefusedError(
                f"rank {unlike[0]} has other settings or data than rank 0; start every rank with "
                f"the same command and files"
            )
        return found  # type: ignore[return-value]

    def of_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        import torch.distributed as dist

        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]


@contextmanager
def joined() -> Iterator[Ranks]:
    """The process group of all ranks, by gloo on CPUs and NCCL on GPUs, while the block runs. All
    leave it together.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from torch.distributed.rendezvous import rendezvous

    most = WATCHED_START if "TORCHELASTIC_RUN_ID" in os.environ else START
    store, rank, number = next(iter(rendezvous("env://", timeout=most)))
    store.set(f"here {rank}", "")
    store.wait([f"here {other}" for other in range(number)], most)
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A rank that ends between its word and its connections must not keep the others for LIMIT.
    dist.init_process_group(kind, store=store, rank=rank, world_size=number, timeout=most)
    _set_pg_timeout(LIMIT)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    yield Ranks(rank, number)
    leave()
    dist.destroy_process_group()  # not after an error: others may be gone


def leave() -> None:
    """Wait for all ranks, with all said: torchrun stops the others as soon as one ends with another
    exit code than 0.
    """
    import torch.distributed as dist

    flush()
    dist.barrier()


def flush() -> None:
    """Write what was said; a reader that is gone costs its words."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def is_loss(error: BaseException) -> bool:
    """Whether an error of an exchange says that another rank is gone."""
    import torch.distributed as dist

    words = str(error).lower()
    told = any(word in words for word in ("gloo", "nccl", "connection", "socket", "wait timeout"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and told)


@contextmanager
def stopping_together() -> Iterator[None]:
    """Signals that end a run make all ranks stop at their next sum (`layout.STOP`); a second one
    stops this rank at once.
    """
    from ufm_fast.layout import STOP
    from ufm_fast.runs.signals import ending_signals

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        if STOP.is_set():
            raise KeyboardInterrupt
        STOP.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SharedRun(RunDirectory):
    """A run directory that all ranks see and the first writes."""

    def __init__(self, path: Path, config: dict[str, Any], digest: str, ranks: Ranks) -> None:
        super().__init__(path, config, digest)
        self.ranks = ranks

    @classmethod
    def of(cls, run: RunDirectory | None, ranks: Ranks) -> SharedRun:
        """The first rank's run, with its lock; other ranks have none."""
        path, config, digest = ranks.of_first(
            None if run is None else (str(run.path), run.config, run.hash)
        )
        shared = cls(Path(path), dict(config), digest, ranks)
        if run is not None:
            shared._made, shared._lock, shared._stamp = run._made, run._lock, run._stamp
        return shared

    @property
    def has_state(self) -> bool:
        return bool(self.ranks.of_first(super().has_state))

    def discard(self) -> None:
        if self.ranks.first:
            super().discard()

    def write_config(self, config: Mapping[str, Any], digest: str) -> None:
        self.config, self.hash = dict(config), digest
        if self.ranks.first:
            super().write_config(config, digest)

    def lock(self, stamp: Stamp | None = None) -> None:
        if self.ranks.first:
            super().lock(stamp)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self.ranks.first:
            super().write_summary(summary)

    def append(self, record: Mapping[str, Any]) -> None:
        if self.ranks.first:
            super().append(record)

    def records(self) -> list[dict[str, Any]]:
        return super().records() if self.ranks.first else []

    def truncate_log(self, last_step: int) -> None:
        if self.ranks.first:
            super().truncate_log(last_step)


# ---- jobs


def prepare(ranks: Ranks, given: Mapping[str, Any], file: Path | None, out: Path | None) -> Job:
    """`job.prepare` on several ranks. Errors: InputError on every rank."""
    from ufm_fast.runs import job as runs

    checked = ranks.agree(
        lambda: runs.checked(given, file, ranks.number),
        lambda found: _content(found.config, found.hashes),
    )
    start = ranks.agree(lambda: runs.given_point(checked.problem, checked.config))
    job = ranks.agree(lambda: runs.begun(checked, out, start) if ranks.first else None)
    run = SharedRun.of(None if job is None else job.run, ranks)
    return runs.Job(
        checked.problem,
        checked.config,
        run,
        start,
        notes=[] if job is None else job.notes,
        asked=checked.asked,
    )


def resume(
    ranks: Ranks, path: Path, given: Mapping[str, Any], file: Path | None
) -> Job | RunDirectory:
    """`resuming.resume` on several ranks. Errors: InputError on every rank."""
    from ufm_fast.runs import resuming

    def content(job: Job | RunDirectory) -> str:
        return "finished" if isinstance(job, RunDirectory) else _content(job.config, [job.run.hash])

    found = ranks.agree(lambda: resuming.resume(path, given, file, ranks.number), content)
    if isinstance(found, RunDirectory):
        return found
    ranks.agree(lambda: found.run.lock(found.stamp) if ranks.first else None)
    found.run = SharedRun.of(found.run if ranks.first else None, ranks)
    if found.saved is not None:
        read, check = found.saved
        start = found.start = ranks.agree(lambda: _read(read))
        ranks.agree(lambda: check(start))
    return found


def _read(saved: Callable[[], Point]) -> Point:
    """This rank's blocks of a saved point. Errors: InputError; that of an exchange if a rank is
    gone.
    """
    from ufm_fast.runs.files import first_line

    try:
        return saved()
    except InputError:
        raise
    except Exception as error:
        if is_loss(error):
            raise
        raise InputError(first_line(error)) from error


def _content(config: Mapping[str, Any], hashes: list[str]) -> str:
    """What must be the same on all ranks: all settings but the device, and the data."""
    return config_hash(
        {**{name: value for name, value in config.items() if name != "device"}, "hashes": hashes[0]}
    )
