"""``ufm-fast export``: a run's log and state as npz, csv or parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import atomic, sweep
from ufm_fast.runs.grouped import group_table, load_groups
from ufm_fast.runs.state import load_state

Arrays = dict[str, "np.ndarray[Any, Any]"]


def export_run(run: RunDirectory, kind: str, out: Path | None = None) -> list[Path]:
    """Write into ``out`` (default RUN/export) and return the paths.

    npz: one file with the state's arrays and the log's columns (``log_step``, ...). csv, parquet:
    ``log`` with a row a log point, and a table for each array of the state: ``W``, ``H`` and
    ``hidden1``, .. with a column a dimension, ``b``, ``labels``.
    Errors: InputError for an unknown format, a missing package, a damaged run or a folder that
    can't be written.
    """
    writers: dict[str, Callable[[Path, Arrays, Arrays], list[Path]]] = {
        "npz": _npz,
        "csv": _csv,
        "parquet": _parquet,
    }
    if kind not in writers:
        raise InputError(f"format must be one of {', '.join(writers)}; got {kind!r}")
    state = _state(run)
    log = log_columns(run.records())
    if kind == "parquet":
        _need_parquet()
    folder = out or run.path / "export"
    if out is None and folder.is_symlink():
        raise InputError(
            f"out: {folder} is a link to another place; name that with --out, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        return writers[kind](folder, state, log)
    except OSError as error:
        raise InputError(
            f"out: can't write to {folder} ({error.strerror or error}); choose another --out"
        ) from error


def _state(run: RunDirectory) -> Arrays:
    """The arrays of a run's state; of one that was solved on groups their numbers and a table of
    groups.
    """
    grouped = load_groups(run) if run.state_file.exists() else None
    if grouped is not None:
        numbers = {"group_means": grouped.means, "group_logits": grouped.logits}
        return {
            **{f"group_{name}": column for name, column in group_table(grouped).items()},
            **numbers,
        }
    return {
        key: tensor.float().numpy() if tensor.dtype.itemsize == 2 else tensor.numpy()
        for key, tensor in load_state(run)[0].items()
    }


def log_columns(records: list[dict[str, Any]]) -> Arrays:
    """The log as one float64 column for each key, nan where a record lacks it; ``step`` as
    integers.
    """
    keys = list(dict.fromkeys(key for record in records for key in record))
    columns: Arrays = {}
    for key in keys:
        values = [record.get(key) for record in records]
        dtype = np.int64 if key == "step" else np.float64
        columns[key] = np.array(
            [np.nan if value is None else value for value in values], dtype=dtype
        )
    return columns


def _npz(folder: Path, state: Arrays, log: Arrays) -> list[Path]:
    path = folder / "run.npz"
    with atomic(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {**state, **{f"log_{key}": column for key, column in log.items()}}
        np.savez_compressed(file, **arrays)
    return [path]


def _tables(state: Arrays, log: Arrays) -> dict[str, Arrays]:
    """Tables of named columns: the log, and each array of the state."""
    tables = {"log": log}
    of_groups = {
        key: array for key, array in state.items() if key.startswith("group_") and array.ndim == 1
    }
    if of_groups:  # a row a group
        tables["groups"] = {key.removeprefix("group_"): array for key, array in of_groups.items()}
    for key, array in state.items():
        if key in of_groups:
            continue
        columns = (
            {key: array}
            if array.ndim == 1
            else {f"{key}_{j}": array[:, j] for j in range(array.shape[1])}
        )
        tables[key] = columns
    return tables


def _csv(folder: Path, state: Arrays, log: Arrays) -> list[Path]:
    paths = []
    for name, columns in _tables(state, log).items():
        path = folder / f"{name}.csv"
        with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            # repr of a Python float has all digits: what is read back is what was written
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        paths.append(path)
    return paths


def _need_parquet() -> None:
    try:
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(
            "format parquet needs pandas and pyarrow: pip install 'ufm-fast[tables]'"
        ) from error


def _parquet(folder: Path, state: Arrays, log: Arrays) -> list[Path]:
    import pandas

    paths = []
    for name, columns in _tables(state, log).items():
        path = folder / f"{name}.parquet"
        with atomic(path) as temporary:
            pandas.DataFrame(columns).to_parquet(temporary)
        paths.append(path)
    return paths
