"""From flags, a TOML file and a preset to one resolved configuration, and from that to a Problem."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast.arguments import number
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.presets import get_preset
from ufm_fast.runs.files import config_hash
from ufm_fast.runs.options import BY_NAME, SETTINGS

if TYPE_CHECKING:
    from ufm_fast.problem import Problem

Config = dict[str, Any]

DATA = ("per_class", "counts", "labels", "targets")
#: Settings that another choice in a higher layer voids in a lower one: a preset's gamma goes when --loss ce is given.
_FOLLOWERS = {
    "loss": ("smoothing", "gamma"),
    "bias": ("lambda_b",),
    "method": ("learning_rate", "momentum", "history"),
}
#: What does not change which minimum is sought: left out of the hash, and free to change when a run is resumed.
FREE = ("tol", "max_steps", "pairwise", "log_every", "log_metrics", "certificate")
RESUMABLE = (*FREE, "method", "learning_rate", "momentum", "history", "backend", "device")
_NOT_HASHED = (*FREE, "device", "preset")


def resolve(given: Mapping[str, Any], file: Path | None = None) -> Config:
    """Defaults, under a preset, under the file, under the flags that were given (those that are not None).

    Errors: InputError for an unknown key or name, InputTypeError for a value of the wrong type.
    """
    flags = {key: value for key, value in given.items() if value is not None}
    content = {} if file is None else read_toml(file)
    preset = flags.get("preset", content.get("preset"))
    if preset is None and not {"loss", "classes", "dim", *DATA}.intersection([*flags, *content]):
        preset = "demo"
    layers = [content, flags] if preset is None else [get_preset(preset).defaults, content, flags]
    config: Config = {row.name: row.default for row in SETTINGS}
    for layer in layers:
        _check_layer(layer)
        lay_over(config, layer)
    config["preset"] = preset
    if all(config[name] is None for name in DATA):
        config["per_class"] = 10
    if config["per_class"] is not None and config["classes"] is None:
        config["classes"] = 100
    return config


def _check_layer(layer: Mapping[str, Any]) -> None:
    data = [name for name in DATA if layer.get(name) is not None]
    if len(data) > 1:
        raise InputError(f"give one of per_class, counts, labels, targets; got {' and '.join(data)}")
    if "start" in layer and "start_from" in layer:
        raise InputError("start and start_from contradict one another; give one")


def lay_over(config: Config, layer: Mapping[str, Any]) -> None:
    """Put a layer of settings over ``config``, and drop from it what no longer fits."""
    data = [name for name in DATA if name in layer]
    if data:
        config.update(dict.fromkeys(DATA))
        if data != ["per_class"]:
            config["classes"] = None
    for leader, followers in _FOLLOWERS.items():
        if leader in layer and layer[leader] != config[leader]:
            config.update({name: BY_NAME[name].default for name in followers})
    if "start" in layer:
        config["start_from"] = None
    config.update(layer)


def read_toml(path: Path) -> Config:
    """Settings of a TOML file, keys as the flags are named, with dashes or underscores."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config: can't read {path} ({error.strerror}); give a TOML file") from error
    except ValueError as error:
        raise InputError(f"config: {path} is not valid TOML ({error})") from error
    settings: Config = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in BY_NAME:
            near = [near.replace("_", "-") for near in difflib.get_close_matches(name, BY_NAME, 3, 0.5)]
            hint = f"did you mean {' or '.join(near)}?" if near else "see ufm-fast solve --help for the names"
            raise InputError(f"config: unknown key {key!r} in {path}; {hint}")
        if name in settings:
            raise InputError(f"config: {path} gives {key!r} twice; keep one")
        settings[name] = _typed(name, value, path)
    return settings


def check_saved(config: Mapping[str, Any], path: Path) -> None:
    """Errors: InputError for a saved configuration, in the run directory ``path``, that lacks a setting or has a wrong type."""
    for row in SETTINGS:
        if row.name not in config:
            raise InputError(f"resume: config.json in {path} lacks {row.name}; the file was damaged")
        if config[row.name] is not None:
            _typed(row.name, config[row.name], path / "config.json")
        elif row.default is not None:
            raise InputError(f"resume: config.json in {path} has no {row.name}; the file was damaged")


def _typed(name: str, value: Any, path: Path) -> Any:
    kind = BY_NAME[name].kind
    if name == "counts" and isinstance(value, list):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return number(value, f"config: {name} in {path}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise InputTypeError(f"config: {name} in {path} must be {words[kind]}, got {value!r}")
    return value


# ---- what a configuration stands for ---------------------------------------------------------------------------------


def pick_device(name: str) -> tuple[str, str]:
    """The device and, for ``auto``, a line that says what was chosen and why."""
    import torch

    if name != "auto":
        return name, ""
    if torch.cuda.is_available():
        return "cuda", f"device: cuda ({torch.cuda.get_device_name()}), chosen by auto"
    return "cpu", "device: cpu, chosen by auto (no CUDA device)"


def build_problem(config: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> Problem:
    """The Problem of a configuration. ``data``: Problem arguments in the place of the configured files."""
    from ufm_fast.problem import Problem

    names = (
        "loss", "classes", "dim", "lambda_w", "lambda_h", "lambda_b", "bias", "smoothing", "gamma", "freeze", "dtype",
        "device", "seed",
    )  # fmt: skip
    arguments = {name: config[name] for name in names}
    return Problem(**arguments, **(read_data(config) if data is None else data))


def read_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a configuration as keyword arguments of Problem; files are read here."""
    if config["targets"] is not None:
        from ufm_fast.runs.foreign import read_target_sets

        return {"target_sets": read_target_sets(Path(config["targets"]), config["classes"])}
    if config["counts"] is not None:
        from ufm_fast.runs.foreign import read_counts

        return {"counts": read_counts(config["counts"])}
    return {name: config[name] for name in ("labels", "per_class") if config[name] is not None}


def digest(config: Mapping[str, Any], problem: Problem) -> str:
    """Hash of the problem and the way it is solved: the same for the same minimum, whatever limits a run had."""
    import hashlib

    content = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    if config["per_class"] is None:  # data from outside: their content counts, not their file's name
        text = hashlib.sha256(problem.counts.numpy().tobytes())
        sets = problem.target_sets
        for part in (problem._labels,) if sets is None else (sets.indptr, sets.indices, sets.counts):
            text.update(b"" if part is None else part.numpy().tobytes())
        content |= {name: None for name in DATA} | {"data": text.hexdigest()}
    return config_hash(content)
