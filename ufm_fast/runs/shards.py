"""The point of a run on several ranks: W, H and b by torch.distributed.checkpoint, each rank its
blocks.

They are in a folder ``shards-N`` beside the state, as safetensors (the checkpoint's own format
pickles its index, and nothing here is ever pickled). The state (`state`) holds the rest, hidden
layers too, and names the folder, and is written when all ranks have written theirs: so it names a
whole one at any moment, and older ones are removed after that. Any number of ranks reads them, and
one process.

The state also has a sum of each of W, H and b over all numbers (`fingerprint`), to which any cut
into blocks adds up: so a flipped bit of a disk is seen by whoever reads them, also by ranks that
read the state of one process.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ufm_fast.backends.base import compute_dtype
from ufm_fast.errors import InputError
from ufm_fast.layout import Layout, block
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.runs.files import WriteError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

PREFIX = "shards-"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20  # numbers that a fingerprint takes at a time


@dataclass(frozen=True)
class Blocks:
    """Where a state has W, H and b, and their fingerprints: ``folder`` in its own, or none where
    they are in the file; no ``sums`` in states of earlier versions.
    """

    folder: str | None
    sums: Mapping[str, int]


def fingerprint(x: Tensor, first: int = 0) -> Tensor:
    """Sum over the numbers of x, row by row, of their bits times 2 i + 1 at place i from ``first``
    on, modulo 2^64: int64 (). Those of blocks add up, and no change of one number leaves it alike.
    """
    words, total = x.detach().contiguous().reshape(-1).view(_BITS[x.itemsize]), None
    for start in range(0, words.numel(), _BLOCK):
        part = words[start : start + _BLOCK].to(torch.int64)
        place = torch.arange(first + start, first + start + part.numel(), device=x.device)
        found = (part * (2 * place + 1)).sum()
        total = found if total is None else total + found
    return torch.zeros((), dtype=torch.int64, device=x.device) if total is None else total


def _sums(layout: Layout, parts: Mapping[str, Tensor]) -> dict[str, int]:
    """Fingerprints of the whole tensors, of this rank's blocks of them."""
    world, found = layout.mesh.world, []
    for name, part in parts.items():
        rows = layout.row_part if name == "H" else layout.class_part
        found.append(fingerprint(part, rows.start * part[:1].numel() if len(part) else 0))
    return dict(zip(parts, world.sum_(torch.stack(found), "checkpoint").tolist(), strict=True))


def _check_sums(found: Mapping[str, int], blocks: Blocks, where: Path, name: str) -> None:
    for key, value in found.items():
        if blocks.sums.get(key, value) != value:
            raise InputError(
                f"{name}: the numbers of {key} in {where} are not those that were written; the "
                f"file was damaged, solve it anew"
            )


def save_shards(path: Path, point: Point) -> Blocks:
    """Write this rank's blocks; all ranks call it. Where they are. Errors: WriteError on all
    ranks.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    layout = point.layout
    assert layout is not None
    mesh, number = layout.mesh, torch.zeros(1, dtype=torch.int64, device=layout.mesh.device)
    if mesh.rank == 0:
        number += 1 + max((int(name.removeprefix(PREFIX)) for name in _folders(path)), default=0)
    folder = path / f"{PREFIX}{int(mesh.shared(number))}"
    parts = replace(point, hidden=()).named()
    tensors = {name: _spread(layout, name, part.detach()) for name, part in parts.items()}
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise WriteError(folder, _first(error)) from error
    return Blocks(folder.name, _sums(layout, parts))


def keep_shards(path: Path, name: str | None) -> None:
    """Remove the folders of blocks in ``path``, but for that one."""
    for other in _folders(path):
        if other != name:
            shutil.rmtree(path / other, ignore_errors=True)


def read_shards(path: Path, blocks: Blocks, name: str) -> dict[str, Tensor]:
    """The whole W, H and b, in one process. Errors: InputError for a folder that is missing or
    damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    folder = path / str(blocks.folder)
    try:
        entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        tensors = {key: torch.empty(x.size, dtype=x.properties.dtype) for key, x in entries.items()}  # type: ignore[union-attr]
        _load(tensors, folder, alone=True)
    except Exception as error:
        raise _damaged(folder, name, error) from error
    _check_sums({key: int(fingerprint(x)) for key, x in tensors.items()}, blocks, folder, name)
    return tensors


def spread_point(
    folder: Path,
    blocks: Blocks,
    problem: Problem,
    layout: Layout,
    hidden: tuple[Tensor, ...] = (),
) -> Point:
    """This rank's blocks of the point in a run's folder, whoever saved it; all ranks call it.
    ``hidden``: its layers, which are in the state.

    Errors: InputError for files that are damaged or do not fit the problem.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    shapes: dict[str, tuple[int, ...]] = {
        "W": (layout.classes, problem.head_dim),
        "H": (layout.rows, problem.dim),
    }
    shapes |= {} if problem.bias == "none" else {"b": (layout.classes,)}
    where = folder / (blocks.folder or "state.safetensors")
    try:
        if blocks.folder is None:
            parts = _slices(where, shapes, layout)
        else:
            dtype = compute_dtype(problem.torch_dtype)
            empty = {
                name: torch.empty(_rows(shape[0], layout), *shape[1:], dtype=dtype)
                for name, shape in shapes.items()
            }
            tensors = {
                name: _spread(layout, name, part.to(layout.mesh.device))
                for name, part in empty.items()
            }
            _load(tensors, where, alone=False)
            parts = {name: part.to_local() for name, part in tensors.items()}
    except InputError:
        raise
    except CheckpointException as error:
        raise _damaged(where, "resume", _first(error)) from error
    except Exception as error:
        raise _damaged(where, "resume", error) from error
    if tuple(tuple(layer.shape) for layer in hidden) != problem.trunk.shapes:
        raise InputError(
            f"resume: the layers in {folder} do not fit config.json; the run was damaged, solve it "
            f"anew"
        )
    point = Point(parts["W"], parts["H"], parts.get("b"), hidden, layout)
    return point.to(device=layout.mesh.device)


def check_spread(folder: Path, blocks: Blocks, point: Point) -> None:
    """Whether ``spread_point`` read what was written; all ranks call it, once all have read.
    Errors: InputError on all of them.
    """
    assert point.layout is not None
    found = _sums(point.layout, replace(point, hidden=()).named())
    _check_sums(found, blocks, folder / (blocks.folder or "state.safetensors"), "resume")


def _rows(number: int, layout: Layout) -> int:
    part = block(number, layout.mesh.ranks, layout.mesh.rank)
    return int(part.stop - part.start)


def _slices(path: Path, shapes: dict[str, tuple[int, ...]], layout: Layout) -> dict[str, Tensor]:
    """This rank's rows of the tensors in a safetensors file."""
    parts: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as content:
        for name, shape in shapes.items():
            whole = content.get_slice(name)
            if tuple(whole.get_shape()) != shape:
                raise InputError(
                    f"resume: {name} in {path} does not fit config.json; the run was damaged, "
                    f"solve it anew"
                )
            parts[name] = whole[block(shape[0], layout.mesh.ranks, layout.mesh.rank)]
    return parts


def _spread(layout: Layout, name: str, part: Tensor) -> Any:
    """A DTensor of which ``part`` is this rank's block."""
    from torch.distributed.tensor import DTensor, Shard

    rows = layout.rows if name == "H" else layout.classes
    shape = torch.Size((rows, *part.shape[1:]))
    stride = (part.shape[1], 1) if part.ndim == 2 else (1,)
    return DTensor.from_local(
        part.contiguous(), layout.mesh.flat, [Shard(0)], run_check=False, shape=shape, stride=stride
    )


def _load(tensors: dict[str, Any], folder: Path, *, alone: bool) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings(), _silent_log():
        warnings.filterwarnings(
            "ignore", "torch.distributed is", UserWarning
        )  # which one process does without
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def _first(error: CheckpointException) -> Exception:
    """What failed on some rank, of an error that all ranks are told; it is no Exception itself."""
    first = next(iter(error.failures.values()))[0]
    return first if isinstance(first, Exception) else OSError(str(first))


@contextmanager
def _silent_log() -> Iterator[None]:
    """Without what torch logs of a folder that it can't read: the error says it."""
    log = logging.getLogger()  # which it takes
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _folders(path: Path) -> list[str]:
    found = [entry.name for entry in path.glob(f"{PREFIX}*") if entry.is_dir()]
    return [name for name in found if name.removeprefix(PREFIX).isdecimal()]


def _damaged(folder: Path, name: str, error: Exception) -> InputError:
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    kind = "truncated" if isinstance(error, (SafetensorError, OSError)) else "damaged"
    return InputError(f"{name}: {folder} is missing or {kind} ({words}); solve it anew")
