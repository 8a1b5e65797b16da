"""What a rank does in the tests of several ranks: ``python sharded_worker.py RANK FOLDER`` joins
worlds of 1, 2, 3 and 4 ranks.

One set of four processes serves all tests, for starting them is what costs. The first rank writes
RANKS.json: for each check its name, an error and what is allowed; an exception on any rank is a
check that failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_heads import counted, heads, kernels, kinks, level
from sharded_measures import certificates, metrics, metrics_of_first, sampled
from sharded_problems import Check, models, problems
from sharded_solves import (
    MODELLED,
    OF_DATA,
    SOLVES,
    interrupted,
    known_minima,
    modelled,
    several_starts,
    solves,
    starts,
    unlike_ranks,
)

from ufm_fast.backends import has_triton
from ufm_fast.layout import Mesh
from ufm_fast.problem import Problem

RANKS = (1, 2, 3, 4)
_ANGULAR = [n for n, (given, _) in enumerate(SOLVES) if "angular_margin" in given]


def checks(ranks: int, folder: Path) -> Iterator[Check]:
    """What every world checks, of every so many cases, and then what this one does."""
    mesh, cases = Mesh.of_world(), list(problems())
    yield from starts(mesh, folder)
    yield from heads(mesh, cases[:: {1: 4, 2: 2, 3: 1, 4: 2}[ranks]])
    if ranks > 1:
        yield from counted(mesh)
        yield from counted(Mesh.of_world(f"1x{ranks}"))
    if ranks < 4:
        yield from certificates(mesh, every={1: 4, 2: 2, 3: 1}[ranks])
        yield from metrics(mesh)
        yield from sampled(mesh)
    yield from {1: _of_one, 2: _of_two, 3: _of_three, 4: _of_four}[ranks](mesh)


def _of_one(mesh: Mesh) -> Iterator[Check]:
    yield from modelled(0, 1, 2, 3)
    yield from solves(*_ANGULAR)


def _of_two(mesh: Mesh) -> Iterator[Check]:
    yield from heads(mesh, list(models()))
    yield from metrics_of_first(mesh)
    yield from solves(*range(len(SOLVES)))
    if has_triton():
        yield from kernels(mesh, 0, 3)
        yield from kernels(Mesh.of_world("1x2"), 0)


def _of_three(mesh: Mesh) -> Iterator[Check]:
    """The last rank of them often has no classes."""
    by_samples, cases = Mesh.of_world("1x3"), [*list(problems())[::3], *list(models())[3:4]]
    yield from heads(mesh, list(models()))
    yield from named("1x3", heads(by_samples, cases, reduce="none"))
    few = Problem(counts=[2, 3], dim=4, lambda_w=0.02, lambda_h=0.005, gamma=2.0, loss="focal")
    yield from heads(mesh, [("far logits, a rank without classes", few)], scale=30.0)
    yield from kinks(mesh)
    yield from kinks(by_samples)
    yield from unlike_ranks(mesh)
    yield from several_starts()
    yield from known_minima()
    yield from modelled(*range(len(MODELLED)))
    yield from solves(*range(len(SOLVES) - 4, len(SOLVES)), *_ANGULAR)
    yield from solves(*OF_DATA[:2], mesh="3x1")
    if has_triton():
        yield from kernels(mesh, 1, 2, 4, 5)
        yield from level(mesh)


def _of_four(mesh: Mesh) -> Iterator[Check]:
    square, cases = Mesh.of_world("2x2"), [*list(problems())[::4], *list(models())[6:8]]
    yield from counted(square)
    yield from kinks(square)
    yield from named("2x2", heads(square, cases, scale=30.0))
    yield from solves(0)
    yield from solves(OF_DATA[1], mesh="2x2")
    yield from modelled(0, 1)
    yield from interrupted(mesh)


def named(mesh: str, found: Iterator[Check]) -> Iterator[Check]:
    """Checks that say on which mesh they were made."""
    return ((f"{mesh} {name}", error, allowed) for name, error, allowed in found)


def join(ranks: int, rank: int, folder: Path) -> None:
    store, limit = f"file://{folder}/store{ranks}", timedelta(minutes=8)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)
    found: list[list[object]] = []
    try:
        for name, error, allowed in checks(ranks, folder):
            found.append([name, float(error), allowed])
    except Exception:
        found.append([traceback.format_exc(), 1.0, 0.0])
        (folder / f"{ranks}.failed.{rank}.json").write_text(json.dumps(found[-1:]))
        raise
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = int(sys.argv[1])
    for number in RANKS:
        if own < number:
            join(number, own, Path(sys.argv[2]))
