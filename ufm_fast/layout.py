"""Layout: which rank holds what of a point, and all that ranks say to one another.

P = C S ranks stand in a mesh of C along the class axis and S along the sample axis; rank i S + j
has the places i and j. Rows of W (and b) are cut into P blocks of one height, ceil(K / P), and rank
r holds the r-th; rows of H likewise. The last blocks may be short or empty. So every number of a
point is held once, which is what `Point.dot` needs, and the blocks are those of a DTensor with
``Shard(0)``, which is how checkpoints see them. The ranks of one place i hold neighbouring classes
between them: together they are the classes that an evaluation multiplies there with the rows of
place j (`backends.sharded`).

A number that decides anything is summed over all ranks, and a sum is the same number on each of
them, so that all take the same branch whatever their rounding, memory and clock. What must be one
rank's answer (is it time to save?) is the first one's. A rank that was told to stop says so with
the next sum, and all stop there together: none is left waiting for another.

`Traffic` counts the bytes that a rank sends, by the algorithms that send least; `backends.cost` has
them as formulas.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufm_fast.errors import InputError

#: Set on a rank that shall stop, by a handler of signals, which are the process's: the next sum
#: raises KeyboardInterrupt on all ranks.
STOP = threading.Event()
#: Bytes that this rank has sent, by what for.
Traffic = Counter[str]
# Newer torch has the same under other names, and warns of the older ones.
_gather_into: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_scatter_sum: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


@dataclass(frozen=True)
class Coming:
    """A tensor that is on its way."""

    tensor: Tensor
    work: Any = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class Axis:
    """``size`` ranks that hold parts of the same thing, of which this is the one at ``place``.
    Alone it says nothing.
    """

    size: int
    place: int
    group: Any
    traffic: Traffic

    def sum_(self, x: Tensor, what: str = "sums") -> Tensor:
        """x summed over the ranks, in place."""
        return self._reduced(x, dist.ReduceOp.SUM, what)

    def most_(self, x: Tensor, what: str = "sums") -> Tensor:
        """The largest of the ranks, entry by entry, in place."""
        return self._reduced(x, dist.ReduceOp.MAX, what)

    def _reduced(self, x: Tensor, operation: Any, what: str) -> Tensor:
        if self.size > 1:
            self.traffic[what] += 2 * (self.size - 1) * x.nbytes // self.size
            dist.all_reduce(x, operation, group=self.group)
        return x

    def gather(self, x: Tensor, what: str) -> Coming:
        """The x of all ranks, of one shape, one below the other."""
        if self.size == 1:
            return Coming(x)
        self.traffic[what] += (self.size - 1) * x.nbytes
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return Coming(out, _gather_into(out, x.contiguous(), group=self.group, async_op=True))

    def scatter_sum(self, x: Tensor, what: str) -> Coming:
        """This rank's part of x summed over the ranks: the adjoint of ``gather``."""
        if self.size == 1:
            return Coming(x)
        self.traffic[what] += (self.size - 1) * x.nbytes // self.size
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return Coming(out, _scatter_sum(out, x.contiguous(), group=self.group, async_op=True))

    def swap(self, x: Tensor, sent: list[int], received: list[int], what: str) -> Tensor:
        """``sent[r]`` rows of x go to each rank r; the rows that come, in the order of the
        ranks.
        """
        if self.size == 1:
            return x
        self.traffic[what] += (x.shape[0] - sent[self.place]) * (x[:1].nbytes if x.shape[0] else 0)
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out


@dataclass(frozen=True, eq=False)
class Mesh:
    """C x S ranks of a process group (None: that which torch.distributed was started with), of
    which this is ``rank``.
    """

    shape: tuple[int, int]
    rank: int
    device: torch.device
    traffic: Traffic = field(default_factory=Counter)
    group: Any = None  # another one goes with C or S of 1

    @classmethod
    def of_world(cls, words: str | None = None, device: torch.device | str = "cpu") -> Mesh:
        """The mesh 'CxS' of all ranks; without words P x 1.

        Errors: InputError where torch.distributed was not started, or the mesh does not hold all
        ranks.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "backend sharded needs torch.distributed: start with torchrun --nproc-per-node N "
                "-m ufm_fast solve .., or call "
                "torch.distributed.init_process_group first"
            )
        ranks = dist.get_world_size()
        return cls(mesh_shape(words, ranks), dist.get_rank(), torch.device(device))

    @property
    def ranks(self) -> int:
        return self.shape[0] * self.shape[1]

    @cached_property
    def neighbours(self) -> int:
        """Ranks that share this one's memory and caches, itself too: of a GPU none, else those of
        the machine as torchrun tells, or all.
        """
        if self.device.type != "cpu":
            return 1
        return max(1, min(self.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))))

    @cached_property
    def world(self) -> Axis:
        return Axis(self.ranks, self.rank, self.group, self.traffic)

    @cached_property
    def classes(self) -> Axis:
        """The ranks that hold the other classes of the same rows."""
        return self._axis(0)

    @cached_property
    def samples(self) -> Axis:
        """The ranks that hold the other rows of the same classes."""
        return self._axis(1)

    def _axis(self, number: int) -> Axis:
        place = divmod(self.rank, self.shape[1])[number]
        alone = 1 in self.shape  # then the other axis is the whole world
        group = self.group if alone else self._groups.get_group(("classes", "samples")[number])
        return Axis(self.shape[number], place, group, self.traffic)

    @cached_property
    def _groups(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, self.shape, mesh_dim_names=("classes", "samples"))

    @cached_property
    def flat(self) -> Any:
        """All ranks in a row, as the device mesh of a DTensor."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.ranks,))

    # ---- numbers that decide

    def total(self, value: float) -> float:
        """The sum over the ranks. Raises KeyboardInterrupt on all of them where one was told to
        stop (``STOP``).
        """
        x = torch.tensor([value, float(STOP.is_set())], dtype=torch.float64, device=self.device)
        found, stop = self.world.sum_(x).tolist()
        if stop:
            STOP.clear()
            raise KeyboardInterrupt
        return float(found)

    def least(self, value: float) -> float:
        """The least of the ranks."""
        return -float(
            self.world.most_(torch.tensor([-value], dtype=torch.float64, device=self.device))
        )

    def agreed(self, answer: bool) -> bool:
        """The first rank's answer, on every rank."""
        return self.total(float(answer and self.rank == 0)) > 0

    def barrier(self) -> None:
        """Wait for all ranks, also for one that was told to stop."""
        self.world.sum_(torch.zeros(1, device=self.device))

    def told(self, value: Any) -> Any:
        """The first rank's value, of any kind, on every rank."""
        held = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(held, group=self.group, group_src=0)
        return held[0]

    def shared(self, x: Tensor) -> Tensor:
        """The first rank's x, of one shape on all ranks, in place."""
        if self.ranks > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x


def mesh_shape(words: str | None, ranks: int) -> tuple[int, int]:
    """(C, S) of 'CxS', or (ranks, 1). Errors: InputError for other words, or a mesh that does not
    hold the ranks.
    """
    if words is None:
        return ranks, 1
    parts = words.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(
            f"mesh must be CxS, ranks by classes times ranks by samples as 4x2, got {words!r}"
        )
    shape = int(parts[0]), int(parts[1])
    if shape[0] * shape[1] != ranks:
        raise InputError(
            f"mesh {words} holds {shape[0] * shape[1]} ranks and there are {ranks}; make CxS the "
            f"number of ranks"
        )
    return shape


def height(number: int, ranks: int) -> int:
    """Rows of a full block."""
    return -(-number // ranks)


def block(number: int, ranks: int, rank: int) -> slice:
    """The rows of a rank."""
    step = height(number, ranks)
    return slice(min(rank * step, number), min((rank + 1) * step, number))


@dataclass(frozen=True)
class Layout:
    """K ``classes`` and R ``rows`` over the ranks of a mesh."""

    mesh: Mesh
    classes: int
    rows: int

    @property
    def class_part(self) -> slice:
        """The classes that this rank holds."""
        return block(self.classes, self.mesh.ranks, self.mesh.rank)

    @property
    def row_part(self) -> slice:
        """The rows that this rank holds."""
        return block(self.rows, self.mesh.ranks, self.mesh.rank)

    @property
    def class_height(self) -> int:
        return height(self.classes, self.mesh.ranks)

    @property
    def row_height(self) -> int:
        return height(self.rows, self.mesh.ranks)

    def group_classes(self, place: int | None = None) -> slice:
        """The classes that the ranks of a place on the class axis, this rank's if none is given,
        hold between them.
        """
        place = self.mesh.classes.place if place is None else place
        step = self.mesh.shape[1] * self.class_height
        return slice(min(place * step, self.classes), min((place + 1) * step, self.classes))

    def total(self, value: float) -> float:
        """A number that each rank has its part of, summed (`Mesh.total`)."""
        return self.mesh.total(value)

    def all(self, answer: bool) -> bool:
        """Whether it is so on every rank."""
        return self.mesh.total(float(not answer)) == 0

    def least(self, value: float) -> float:
        return self.mesh.least(value)


def padded(x: Tensor, rows: int) -> Tensor:
    """x with zeros below, so many rows in all."""
    missing = rows - x.shape[0]
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def gathered(axis: Axis, x: Tensor, what: str) -> list[Tensor]:
    """The vectors or matrices of all ranks, of whatever number of rows each."""
    if axis.size == 1:
        return [x]
    sizes = axis.gather(torch.tensor([x.shape[0]], device=x.device), what).wait().tolist()
    most = max(sizes)
    whole = axis.gather(padded(x, most), what).wait().reshape(axis.size, most, *x.shape[1:])
    return [part[:size] for part, size in zip(whole, sizes, strict=True)]


def transposed(layout: Layout, x: Tensor) -> Tensor:
    """The rows here of X' for a K x K matrix X of which x are the rows of the classes here: each
    rank sends another the columns that are rows of its own.
    """
    K, ranks, height = layout.classes, layout.mesh.ranks, layout.class_height
    here, others = len(x), [block(layout.classes, ranks, rank) for rank in range(ranks)]
    sent = padded(x, height).T.contiguous()  # K x height: the rows of X' in order, this rank's part
    counts = [part.stop - part.start for part in others], [here] * ranks
    parts = layout.mesh.world.swap(sent, *counts, "curvature").reshape(ranks, here, height)
    return parts.transpose(0, 1).reshape(here, ranks * height)[:, :K]


def share(total: int, parts: int) -> int:
    """Ceiling of a quotient, at least one."""
    return max(1, math.ceil(total / parts))
