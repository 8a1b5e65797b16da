"""The state of a run on disk: the point (W, H, b, hidden layers) and the data, in a safetensors
file that serves alone.

Its metadata say how far the run had come, and hold a checksum of the tensors, which is checked
where there is one: a flipped bit of a disk would pass for a number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ufm_fast.arguments import INTEGERS
from ufm_fast.errors import InputError
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import atomic
from ufm_fast.runs.shards import Blocks, fingerprint, keep_shards, read_shards, save_shards
from ufm_fast.solvers.solution import Restart, Starts
from ufm_fast.targets import TargetSets
from ufm_fast.trunks import TRUNKS, Trunk

FORMAT = "ufm-fast-state"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a saved state had come, earlier runs included; ``starts``: of several."""

    step: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0
    starts: Starts | None = None


@dataclass(frozen=True)
class Head:
    """A classifier and the features it meets: row r of ``H`` has ``labels[r]`` and stands for
    ``counts[r]`` samples.

    Rows of multi-label data with several targets, and rows with target vectors, have no label; they
    are left out of ``H`` (``skipped`` of them).
    """

    W: Tensor | None
    H: Tensor | None
    b: Tensor | None
    labels: Tensor | None
    counts: Tensor | None = None
    skipped: int = 0


def save_state(
    run: RunDirectory, problem: Problem, point: Point, reduce: str, progress: Progress
) -> None:
    """Write the point (H has a row for each row of ``reduce``) and the data."""
    rows = problem.rows(reduce)
    tensors: Tensors = {"counts": problem.counts, "row_counts": rows.counts}
    parts = point.named()
    if point.layout is not None:  # the blocks of W, H and b are `shards`
        parts = {name: part for name, part in parts.items() if name not in ("W", "H", "b")}
    tensors |= parts
    if problem.samples.given_vectors is not None:
        tensors["target_vectors"] = problem.samples.given_vectors
    elif problem.target_sets is not None:
        sets = problem.target_sets
        tensors |= {
            "target_indptr": sets.indptr,
            "target_indices": sets.indices,
            "target_counts": sets.counts,
        }
        if sets.weights is not None:
            tensors["target_weights"] = sets.weights
        pointer = rows.targets.indptr
        tensors["row_indices"] = rows.targets.indices
        tensors["row_indptr"] = torch.arange(rows.number + 1) if pointer is None else pointer
    else:
        tensors["labels"] = rows.targets.indices
        if problem.samples.given_labels is not None:
            tensors["sample_labels"] = problem.samples.given_labels
    if point.layout is None:
        return write_state(run, tensors, progress, reduce, problem.activation)
    blocks = save_shards(run.path, point)
    if point.layout.mesh.rank == 0:
        write_state(run, tensors, progress, reduce, problem.activation, blocks)
    point.layout.mesh.barrier()


def write_state(
    run: RunDirectory,
    tensors: Tensors,
    progress: Progress,
    reduce: str,
    activation: str = "linear",
    blocks: Blocks | None = None,
) -> None:
    """Write any tensors as a run's state; ``blocks``: where W, H and b are, if not among them.
    Errors: WriteError; the state before is kept.
    """
    storages: set[int] = set()
    stored: Tensors = {}
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        place = kept.untyped_storage().data_ptr()
        stored[name] = (
            kept.clone() if place in storages else kept
        )  # safetensors refuses tensors that share memory
        storages.add(place)
    metadata = {
        "format": FORMAT,
        "reduce": reduce,
        "step": str(progress.step),
        "evaluations": repr(progress.evaluations),
        "seconds": repr(progress.seconds),
        "activation": activation,
        "checksum": checksum(stored),
    }
    if progress.starts is not None:
        metadata["starts"] = json.dumps(asdict(progress.starts))
    if blocks is None:
        own = [name for name in ("W", "H", "b") if name in stored]
        blocks = Blocks(None, {name: int(fingerprint(stored[name])) for name in own})
    metadata["sums"] = json.dumps(dict(blocks.sums))
    if blocks.folder is not None:
        metadata["shards"] = blocks.folder
    with run.alone(), atomic(run.state_file) as temporary:
        save_file(stored, temporary, metadata)
    keep_shards(run.path, blocks.folder)


def checksum(tensors: Tensors) -> str:
    """SHA-256 of names and bytes, in the order of the names."""
    text = hashlib.sha256()
    for name in sorted(tensors):
        text.update(name.encode())
        text.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return text.hexdigest()


def load_state(run: RunDirectory) -> tuple[Tensors, Progress, str]:
    """Tensors, progress and ``reduce`` of a run's state. Errors: InputError for a missing or
    foreign file.
    """
    tensors, metadata = read_safetensors(run.state_file, "run")
    if "shards" in metadata:
        _check_sum(tensors, metadata, run.state_file, "run")
        tensors |= read_shards(run.path, _blocks(run, metadata), "run")
        metadata = {name: value for name, value in metadata.items() if name != "checksum"}
    missing = [key for key in ("W", "H", "counts", "row_counts") if key not in tensors]
    if "runs" in tensors:
        raise InputError(
            f"run: {run.path} was solved on groups and holds no W and H; solve it with --reduce "
            f"classes"
        )
    if metadata.get("format") != FORMAT or missing:
        raise InputError(f"run: {run.state_file} is not a state of ufm-fast; solve it anew")
    check_state(tensors, metadata, run.state_file)
    return tensors, *_progress(run, metadata)


def load_rest(run: RunDirectory) -> tuple[Tensors, Progress, str, Blocks]:
    """What ``load_state`` gives but for the point, and where that is. Errors: as
    ``load_state``.
    """
    tensors, metadata = read_safetensors(run.state_file, "run", without=("W", "H", "b"))
    if metadata.get("format") != FORMAT or "counts" not in tensors or "row_counts" not in tensors:
        raise InputError(f"run: {run.state_file} is not a state of ufm-fast; solve it anew")
    if "shards" in metadata:
        _check_sum(tensors, metadata, run.state_file, "run")
    return tensors, *_progress(run, metadata), _blocks(run, metadata)


def _blocks(run: RunDirectory, metadata: Mapping[str, str]) -> Blocks:
    shards = metadata.get("shards")
    try:
        sums = {name: int(value) for name, value in json.loads(metadata.get("sums", "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"run: the sums in {run.state_file} are no numbers; it was damaged"
        ) from error
    return Blocks(None if shards is None else Path(shards).name, sums)


def _progress(run: RunDirectory, metadata: Mapping[str, str]) -> tuple[Progress, str]:
    try:
        starts = _starts(metadata["starts"]) if "starts" in metadata else None
        progress = Progress(
            int(metadata["step"]),
            float(metadata["evaluations"]),
            float(metadata["seconds"]),
            starts,
        )
        return progress, metadata["reduce"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"run: {run.state_file} lacks its step, evaluations, seconds or starts; it was damaged"
        ) from error


def _starts(text: str) -> Starts:
    """Errors: KeyError, ValueError or TypeError where it is none."""
    content = json.loads(text)
    return Starts(tuple(Restart(**row) for row in content["done"]), bool(content["pending"]))


def data_arguments(tensors: Tensors) -> dict[str, Any]:
    """The data of a saved state as keyword arguments of Problem. Errors: InputError where they were
    damaged.
    """
    if "target_vectors" in tensors:
        return {"targets": tensors["target_vectors"]}
    if "target_indptr" in tensors:
        keys = ("target_indptr", "target_indices", "target_counts")
        try:
            indptr, indices, counts = (tensors[key] for key in keys)
            weights = tensors.get("target_weights")
            return {
                "target_sets": TargetSets.create(
                    indptr, indices, tensors["counts"].numel(), counts, weights
                )
            }
        except (KeyError, InputError) as error:
            raise InputError(
                f"resume: the state's target sets are damaged ({error}); solve it anew"
            ) from error
    if "sample_labels" in tensors:
        return {"labels": tensors["sample_labels"]}
    return {"counts": tensors["counts"]}


def check_state(
    tensors: Tensors, metadata: Mapping[str, str], path: Path, name: str = "run"
) -> None:
    """Errors: InputError for tensors that are missing, do not fit one another, are not finite, or
    are not those written.
    """
    if not (_point_fits(tensors) and _rows_fit(tensors)):
        raise InputError(
            f"{name}: the tensors in {path} are missing or do not fit one another; the file was "
            f"damaged"
        )
    if not Point.of(tensors).finite():
        raise InputError(
            f"{name}: {path} holds nan or infinite numbers; solve it anew, maybe with smaller steps"
        )
    _check_sum(tensors, metadata, path, name)


def _check_sum(tensors: Tensors, metadata: Mapping[str, str], path: Path, name: str) -> None:
    if metadata.get("checksum", written := checksum(tensors)) != written:
        raise InputError(
            f"{name}: the numbers in {path} are not those that were written; the file was "
            f"damaged, solve it anew"
        )


def _point_fits(tensors: Tensors) -> bool:
    """Whether W, H, b and the hidden layers are there, of a dtype that computes, and each has the
    width of the one before.
    """
    if "W" not in tensors or "H" not in tensors:
        return False
    point = Point.of(tensors)
    matrices = (point.H, *point.hidden, point.W)
    if not all(computable(x) for x in point.parts()) or any(
        x.ndim != 2 or not x.numel() for x in matrices
    ):
        return False
    widths = [point.H.shape[1], *(W.shape[0] for W in point.hidden)]
    fits = all(
        W.shape[1] == width for W, width in zip((*point.hidden, point.W), widths, strict=True)
    )
    return fits and (point.b is None or point.b.shape == point.W.shape[:1])


def _rows_fit(tensors: Tensors) -> bool:
    """Whether each row of H has its number of samples, and a label or a set of labels among the
    classes; or there are target vectors, one for each sample and of the right length.
    """
    classes, rows = tensors["W"].shape[0], tensors["H"].shape[0]
    counts, indptr = tensors.get("row_counts"), tensors.get("row_indptr")
    vectors = tensors.get("target_vectors")
    if vectors is not None:
        if counts is None or counts.shape != (rows,) or counts.dtype not in INTEGERS:
            return False
        return computable(vectors) and vectors.shape == (int(counts.sum()), classes)
    labels = tensors.get("labels" if indptr is None else "row_indices")
    if (
        counts is None
        or counts.shape != (rows,)
        or labels is None
        or labels.dtype not in INTEGERS
        or labels.ndim != 1
    ):
        return False
    if indptr is not None:
        if (
            indptr.shape != (rows + 1,)
            or indptr.dtype != torch.int64
            or bool((torch.diff(indptr) < 1).any())
        ):
            return False
        if int(indptr[0]) != 0 or int(indptr[-1]) != labels.numel():
            return False
    elif labels.shape != (rows,):
        return False
    return labels.numel() > 0 and int(labels.min()) >= 0 and int(labels.max()) < classes


def fitting_point(
    run: RunDirectory, problem: Problem, tensors: Tensors, reduce: str, name: str = "run"
) -> Point:
    """The saved point on the problem's device. Errors: InputError where it does not fit the problem
    of the run.
    """
    point = Point.of(tensors).to(device=problem.device)
    shapes = [
        (problem.num_classes, problem.head_dim),
        (problem.rows(reduce).number, problem.dim),
        *problem.trunk.shapes,
    ]
    found = [tuple(part.shape) for part in (point.W, point.H, *point.hidden)]
    if found != shapes or (point.b is None) != (problem.bias == "none"):
        raise InputError(
            f"{name}: {run.state_file} does not fit config.json; the run was damaged, solve it anew"
        )
    return point


def state_head(tensors: Tensors, activation: str = "linear") -> Head:
    """The classifier of a saved state, and what it sees of the rows with a single label."""
    W, H, b, counts = tensors["W"], tensors["H"], tensors.get("b"), tensors["row_counts"]
    hidden = Point.of(tensors).hidden
    widths = (H.shape[1], *(layer.shape[0] for layer in hidden))
    H = Trunk(widths, TRUNKS[activation]()).forward(H, hidden).features
    if "target_vectors" in tensors:
        return Head(W, None, b, None, None, H.shape[0])
    if "row_indptr" not in tensors:
        return Head(W, H, b, tensors["labels"], counts)
    pointer = tensors["row_indptr"]
    single = torch.nonzero(torch.diff(pointer) == 1).reshape(-1)
    if single.numel() == 0:
        return Head(W, None, b, None, None, H.shape[0])
    labels = tensors["row_indices"][pointer[single]]
    return Head(W, H[single], b, labels, counts[single], H.shape[0] - single.numel())


def run_head(run: RunDirectory) -> Head:
    """The head of a run's state."""
    return state_head(load_state(run)[0], run.config.get("activation", "linear"))


def read_safetensors(
    path: Path, name: str, without: tuple[str, ...] = ()
) -> tuple[Tensors, dict[str, str]]:
    """Tensors, but for some, and metadata. Errors: InputError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{name}: {path} is not a file; remove it")  # a pipe would be waited for
    try:
        with safe_open(path, framework="pt") as content:
            names = [key for key in content.keys() if key not in without]  # noqa: SIM118
            return {key: content.get_tensor(key) for key in names}, content.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{name}: {path} is missing, truncated or not a safetensors file ({error})"
        ) from error


def computable(x: Tensor) -> bool:
    """Whether torch computes with the dtype: an eight-bit float is for storage."""
    return x.is_floating_point() and x.dtype.itemsize >= 2
