"""Files from elsewhere: counts, target sets, heads, features and starts (text, .npy, .npz,
.safetensors).

Nothing is ever unpickled. os.path asks whether a file is there: Path.is_dir and Path.is_file raise
where a name is too long.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import MOST, integers
from ufm_fast.datasets import load_npy
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.memory import available_bytes
from ufm_fast.metrics.checks import check_matrix, check_vector
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.state import (
    Head,
    Tensors,
    check_state,
    computable,
    read_safetensors,
    run_head,
    state_head,
)
from ufm_fast.sample_data import MOST_CLASSES
from ufm_fast.targets import Targets, TargetSets, check_labels


def read_counts(value: str | list[Any]) -> Any:
    if isinstance(value, list):
        return _whole_numbers(value, "counts")
    if not set(value) - set(
        "0123456789,+-. "
    ):  # asked first: a long list is no name that a file system takes
        return _whole_numbers(value.split(","), "counts")
    path = Path(value)
    if path.suffix == ".npy":
        return load_npy(path, "counts")
    if os.path.isfile(path):  # Path.is_file would raise where the name is too long
        try:
            return _whole_numbers(
                path.read_text(encoding="utf-8").replace(",", " ").split(), f"counts in {path}"
            )
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"counts: can't read {path} ({error}); give numbers a,b,c or a text or .npy file"
            ) from error
    raise InputError(f"counts: there is no file {value}; give numbers a,b,c or a text or .npy file")


def _whole_numbers(words: list[Any], name: str) -> list[int]:
    if not words:
        raise InputError(f"{name} must hold at least two numbers")
    numbers = []
    for word in words:
        try:
            numbers.append(int(word) if isinstance(word, str) else word)
        except ValueError as error:
            raise InputTypeError(f"{name} must hold whole numbers, got {word.strip()!r}") from error
        if isinstance(numbers[-1], bool) or not isinstance(numbers[-1], int):
            raise InputTypeError(f"{name} must hold whole numbers, got {word!r}")
        if numbers[-1] > MOST:
            raise InputError(
                f"{name} must sum to at most {MOST} samples, got {numbers[-1]} of one class"
            )
    return numbers


def read_tensors(path: Path, name: str) -> Tensors:
    """All arrays of a .npz or .safetensors file. Errors: InputError naming ``name`` and the
    mend.
    """
    return _read(path, name)[0]


def _read(path: Path, name: str) -> tuple[Tensors, Mapping[str, str]]:
    """Arrays and metadata of a file."""
    if os.path.isdir(path):
        path = path / "state.safetensors"
    if not os.path.isfile(path):
        raise InputError(
            f"{name}: there is no file {path}; give a .npz or .safetensors file, or a run directory"
        )
    if path.suffix == ".safetensors":
        return read_safetensors(path, name)
    if path.suffix == ".npz":
        return read_npz(path, name), {}
    raise InputError(
        f"{name}: {path} must end in .npz or .safetensors; save it with numpy.savez or safetensors"
    )


def read_npz(path: Path, name: str) -> Tensors:
    """Arrays of a .npz file, without pickle."""
    try:
        # Opened here: numpy leaves its own file open where the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            _check_size(content, path, name)
            arrays = {key: content[key] for key in content.files}
    except InputError:
        raise
    except (
        Exception
    ) as error:  # zip, zlib and numpy's parser raise whatever a damaged file leads them to
        raise InputError(
            f"{name}: {path} is not a readable .npz file ({error}); write it with numpy.savez"
        ) from error
    foreign = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]
    if foreign:
        raise InputError(
            f"{name}: {foreign[0]} in {path} is no array; write the file with numpy.savez"
        )
    try:
        native = {
            key: array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
            for key, array in arrays.items()
        }
        return {key: torch.from_numpy(array) for key, array in native.items()}
    except TypeError as error:
        raise InputError(
            f"{name}: {path} holds an array that is no array of numbers torch knows ({error})"
        ) from error


def _check_size(content: Any, path: Path, name: str) -> None:
    """Errors: InputError where the headers promise more than memory has: a few kilobytes may unpack
    to gigabytes.
    """
    needed = 0
    for member in content.zip.namelist():
        if member.endswith(".npy"):
            with content.zip.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
                needed += math.prod(shape) * dtype.itemsize
    free = available_bytes(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"{name}: {path} unpacks to {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; "
            f"give fewer rows"
        )


def read_target_vectors(path: Path) -> Any:
    """Target vectors from a .npy with a row a sample. Errors: InputError where memory can't hold
    them, or for another file.
    """
    array = load_npy(path, "targets", "a .npy file of N x t numbers, or a .npz of label sets")
    free = available_bytes(torch.device("cpu"))
    if 8 * array.size > free:
        raise InputError(
            f"targets: {path} takes {8e-9 * array.size:.3g} GB and {free / 1e9:.3g} GB are free; "
            f"give fewer rows"
        )
    return array


def read_target_sets(path: Path, classes: int | None) -> TargetSets:
    """Multi-label targets from a .npz with CSR ``indptr``, ``indices`` and optional ``counts`` (of
    the sets) and ``weights`` (of the entries).
    """
    if not os.path.isfile(path):
        raise InputError(
            f"targets: there is no file {path}; give a .npz with indptr, indices and optional "
            f"counts, or a .npy of vectors"
        )
    arrays = read_npz(path, "targets")
    missing = [key for key in ("indptr", "indices") if key not in arrays]
    if missing:
        raise InputError(
            f"targets: {path} lacks {' and '.join(missing)}; save both with numpy.savez"
        )
    indices = integers(arrays["indices"], f"targets: indices in {path}")
    if indices.numel() == 0:
        raise InputError(f"targets: indices in {path} must hold at least one class")
    if classes is None:
        classes = min(max(int(indices.max()) + 1, 2), MOST_CLASSES)
    return TargetSets.create(
        arrays["indptr"], indices, classes, arrays.get("counts"), arrays.get("weights")
    )


def read_head(path: Path, name: str) -> Head:
    """W, H, labels and optional b and counts (row r of H stands for counts[r] samples) from a run
    directory or a file.

    Errors: InputError naming the array, as the file names it, and what is allowed.
    """
    if os.path.isdir(path):
        return run_head(RunDirectory.open(path, name))
    tensors, metadata = _read(path, name)
    if "row_counts" in tensors:
        check_state(tensors, metadata, path, name)
        return state_head(tensors, metadata.get("activation", "linear"))
    if "hidden1" in tensors:
        raise InputError(
            f"{name}: {path} holds hidden layers, but not what is between them; give a run "
            f"directory, or save the "
            "features that W sees as H, without hidden1"
        )
    missing = [key for key in ("W", "H", "labels") if key not in tensors]
    if missing:
        raise InputError(
            f"{name}: {path} lacks {', '.join(missing)}; it must hold W (K x d), H (N x d) and "
            f"labels (N,)"
        )
    return _checked_head(tensors, path, name)


def _checked_head(tensors: Tensors, path: Path, name: str) -> Head:
    """The arrays of a file, checked under the names that they have there."""
    arrays = {key: f"{name}: {key} in {path}" for key in ("W", "H", "labels", "b", "counts")}
    W, H = (check_matrix(tensors[key], arrays[key]) for key in ("W", "H"))
    classes, rows = W.shape[0], H.shape[0]
    if classes < 2:
        raise InputError(
            f"{arrays['W']} must have at least 2 rows, one for each class, got {classes}"
        )
    if W.shape[1] != H.shape[1]:
        raise InputError(
            f"{name}: W and H in {path} must have as many columns, got {tuple(W.shape)} and "
            f"{tuple(H.shape)}; W holds a row a "
            "class and H a row a sample: transpose the one that does not"
        )
    labels = integers(tensors["labels"], arrays["labels"])
    if labels.shape != (rows,):
        raise InputError(
            f"{arrays['labels']} must have shape ({rows},) to match H, got {tuple(labels.shape)}; "
            f"give H's labels"
        )
    check_labels(labels, classes, arrays["labels"])
    b, counts = tensors.get("b"), tensors.get("counts")
    if b is not None:
        check_vector(b, arrays["b"], classes, "the rows of W")
    if counts is not None:
        counts = check_vector(
            counts,
            arrays["counts"],
            rows,
            "the rows of H, of which row r stands for counts[r] samples",
        )
        if bool((counts < 0).any()) or not bool(counts.any()):
            raise InputError(
                f"{arrays['counts']} must not be negative, nor all zero: row r of H stands for "
                f"counts[r] samples"
            )
    return Head(W, H, b, labels, counts)


def read_start(path: Path, problem: Problem | None = None, reduce: str = "auto") -> Point:
    """An initial point, W, H and optional b, from a file or a run directory; ``solve`` checks that
    it fits its problem.

    With ``problem``, and where the file says which classes the rows of H belong to (``labels``, or
    the target sets of a state), the rows are put in the order of ``problem.rows(reduce)``, or of
    its samples. How many samples a row stood for there does not matter: it is where a solve starts.
    Errors: InputError for a missing or foreign file, and for rows of other classes than the
    problem's.
    """
    tensors, metadata = _read(path, "start-from")
    missing = [key for key in ("W", "H") if key not in tensors]
    if missing:
        raise InputError(
            f"start-from: {path} lacks {' and '.join(missing)}; it must hold W (K x d) and H "
            f"(rows x d)"
        )
    if "row_counts" in tensors:
        check_state(tensors, metadata, path, "start-from")
    point = Point.of(tensors)
    for name, part in point.named().items():
        if not computable(part):
            raise InputTypeError(
                f"start-from: {name} in {path} must be floating numbers, got {part.dtype}; save "
                f"it as float64"
            )
    if problem is None or point.H.ndim != 2:
        return point
    there, here = _row_targets(tensors, path), problem.rows(problem.reduction(reduce)).targets
    if problem.dense or problem.weighted:  # rows are in the order of the samples
        return point
    if here.rows != point.H.shape[0] == problem.num_samples:
        here = problem.rows("none").targets
    if there is None or there.rows != here.rows:  # then the shape is what ``solve`` refuses
        return point
    return replace(point, H=point.H[_matching(there, here, path)])


def _row_targets(tensors: Tensors, path: Path) -> Targets | None:
    """Classes of the rows of H in a file, None where it does not say."""
    if "row_indptr" in tensors:
        try:
            sets = TargetSets.create(tensors["row_indptr"], tensors["row_indices"], MOST_CLASSES)
        except InputError as error:
            raise InputError(
                f"start-from: the target sets of the rows in {path} are damaged ({error}); solve "
                f"it anew"
            ) from error
        return Targets(sets.indices, sets.indptr)
    if "labels" not in tensors:
        return None
    labels, rows = (
        integers(tensors["labels"], f"start-from: labels in {path}"),
        tensors["H"].shape[:1],
    )
    if labels.shape != rows:
        raise InputError(
            f"start-from: labels in {path} must have shape {tuple(rows)}, a class for each row of "
            f"H, got {tuple(labels.shape)}"
        )
    return Targets(labels)


def _matching(there: Targets, here: Targets, path: Path) -> Tensor:
    """Index of the row of ``there`` for each row of ``here``: the same row where the order is the
    same.

    Errors: InputError where the rows are not the same but for their order.
    """
    if there.single and here.single:
        left, right = there.indices, here.indices
    else:
        numbers: dict[tuple[int, ...], int] = {}
        left, right = (
            torch.tensor([numbers.setdefault(row, len(numbers)) for row in _sets(x)])
            for x in (there, here)
        )
    (left, from_there), (right, from_here) = (torch.sort(x, stable=True) for x in (left, right))
    if not torch.equal(left, right):
        row = int(torch.nonzero(left != right)[0])
        found, wanted = (
            _sets(x)[int(index[row])] for x, index in ((there, from_there), (here, from_here))
        )
        raise InputError(
            f"start-from: the rows of H in {path} are not those of this problem: sorted by class, "
            f"row {row} is of class "
            f"{'+'.join(map(str, found))} there and of {'+'.join(map(str, wanted))} here; give a "
            f"start that was made for these "
            "data, or save W and H without labels if H has this problem's rows"
        )
    index = torch.empty_like(from_there)
    index[from_here] = from_there
    return index


def _sets(targets: Targets) -> list[tuple[int, ...]]:
    entries = targets.indices.tolist()
    if targets.indptr is None:
        return [(entry,) for entry in entries]
    return [tuple(entries[a:b]) for a, b in pairwise(targets.indptr.tolist())]
