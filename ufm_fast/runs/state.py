"""The state of a run on disk: W, H, b and the data, in a safetensors file that serves alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import atomic
from ufm_fast.targets import TargetSets

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a saved state had come, earlier runs included."""

    step: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Head:
    """A classifier and the features it meets: row r of ``H`` has ``labels[r]`` and stands for ``counts[r]`` samples.

    Rows of multi-label data with several targets have no label; they are left out of ``H`` (``skipped`` of them).
    """

    W: Tensor | None
    H: Tensor | None
    b: Tensor | None
    labels: Tensor | None
    counts: Tensor | None = None
    skipped: int = 0


def save_state(run: RunDirectory, problem: Problem, point: Point, reduce: str, progress: Progress) -> None:
    """Write W, H (a row for each row of ``reduce``), b and the data, so that the file serves alone."""
    rows = problem.rows(reduce)
    tensors: Tensors = {"W": point.W, "H": point.H, "counts": problem.counts, "row_counts": rows.counts}
    if point.b is not None:
        tensors["b"] = point.b
    if problem.target_sets is not None:
        sets = problem.target_sets
        tensors |= {"target_indptr": sets.indptr, "target_indices": sets.indices, "target_counts": sets.counts}
        pointer = rows.targets.indptr
        tensors["row_indices"] = rows.targets.indices
        tensors["row_indptr"] = torch.arange(rows.number + 1) if pointer is None else pointer
    else:
        tensors["labels"] = rows.targets.indices
        if problem.samples.given_labels is not None:
            tensors["sample_labels"] = problem.samples.given_labels
    metadata = {
        "format": "ufm-fast-state", "reduce": reduce, "step": str(progress.step),
        "evaluations": repr(progress.evaluations), "seconds": repr(progress.seconds),
    }  # fmt: skip
    with run.alone(), atomic(run.state_file) as temporary:
        # A copy of each: safetensors refuses tensors that share memory.
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, temporary, metadata)


def load_state(run: RunDirectory) -> tuple[Tensors, Progress, str]:
    """Tensors, progress and ``reduce`` of a run's state. Errors: InputError for a missing or foreign file."""
    tensors, metadata = read_safetensors(run.state_file, "run")
    missing = [key for key in ("W", "H", "counts", "row_counts") if key not in tensors]
    if metadata.get("format") != "ufm-fast-state" or missing:
        raise InputError(f"run: {run.state_file} is not a state of ufm-fast; solve it anew")
    check_state(tensors, run.state_file)
    try:
        progress = Progress(int(metadata["step"]), float(metadata["evaluations"]), float(metadata["seconds"]))
        return tensors, progress, metadata["reduce"]
    except (KeyError, ValueError) as error:
        raise InputError(f"run: {run.state_file} lacks its step, evaluations or seconds; the file was damaged") from error


def data_arguments(tensors: Tensors) -> dict[str, Any]:
    """The data of a saved state as keyword arguments of Problem."""
    if "target_indptr" in tensors:
        keys = ("target_indptr", "target_indices", "target_counts")
        return {"target_sets": TargetSets(*(tensors[key] for key in keys))}
    if "sample_labels" in tensors:
        return {"labels": tensors["sample_labels"]}
    return {"counts": tensors["counts"]}


def check_state(tensors: Tensors, path: Path, name: str = "run") -> None:
    """Errors: InputError for a state whose tensors are missing or do not fit one another, or that is not finite."""
    W, H, counts = (tensors.get(key) for key in ("W", "H", "row_counts"))
    b, labels = tensors.get("b"), tensors.get("row_indptr", tensors.get("labels"))
    fits = (
        W is not None and H is not None and counts is not None and labels is not None
        and W.ndim == H.ndim == 2 and W.shape[1] == H.shape[1] and counts.shape == H.shape[:1]
        and labels.shape == (H.shape[0] + ("row_indptr" in tensors),) and (b is None or b.shape == W.shape[:1])
        and all(computable(x) for x in (W, H, b) if x is not None)
        and ("row_indptr" not in tensors or "row_indices" in tensors)
    )  # fmt: skip
    if not fits:
        raise InputError(f"{name}: the tensors in {path} are missing or do not fit one another; the file was damaged")
    if not all(bool(torch.isfinite(x).all()) for x in (W, H, b) if x is not None):
        raise InputError(f"{name}: {path} holds nan or infinite numbers; solve it anew, maybe with smaller steps")


def state_head(tensors: Tensors) -> Head:
    """The classifier and single-label rows of a saved state."""
    W, H, b, counts = tensors["W"], tensors["H"], tensors.get("b"), tensors["row_counts"]
    if "row_indptr" not in tensors:
        return Head(W, H, b, tensors["labels"], counts)
    pointer = tensors["row_indptr"]
    single = torch.nonzero(torch.diff(pointer) == 1).reshape(-1)
    if single.numel() == 0:
        return Head(W, None, b, None, None, H.shape[0])
    labels = tensors["row_indices"][pointer[single]]
    return Head(W, H[single], b, labels, counts[single], H.shape[0] - single.numel())


def read_safetensors(path: Path, name: str) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{name}: {path} is missing, truncated or not a safetensors file ({error})") from error


def computable(x: Tensor) -> bool:
    """Whether torch computes with the dtype: an eight-bit float is for storage."""
    return x.is_floating_point() and x.dtype.itemsize >= 2
