"""From flags, a TOML file and a preset to one resolved configuration, and from that to a
Problem.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast.arguments import number
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.presets import get_preset
from ufm_fast.runs.files import config_hash, toml_of
from ufm_fast.runs.options import SETTINGS, taken_by

if TYPE_CHECKING:
    from ufm_fast.problem import Problem

Config = dict[str, Any]

#: Who gave the classes' sizes: one of these settings.
DATA = taken_by("data")
#: Settings of the first version, whose runs have a hash of all of them, defaults included.
_FIRST = (
    "loss",
    "classes",
    "dim",
    "per_class",
    "counts",
    "labels",
    "targets",
    "lambda_w",
    "lambda_h",
    "lambda_b",
    "bias",
    "smoothing",
    "gamma",
    "freeze",
    "dtype",
    "seed",
    "method",
    "backend",
    "reduce",
    "variables",
    "start",
    "start_from",
    "learning_rate",
    "momentum",
    "history",
)


def resolve(given: Mapping[str, Any], file: Path | None = None) -> Config:
    """Defaults, under a preset, under the file, under the flags that were given (those that are not
    None).

    Errors: InputError for an unknown key or name, InputTypeError for a value of the wrong type.
    """
    flags = {key: typed(key, value) for key, value in given.items() if value is not None}
    content = {} if file is None else read_toml(file)
    preset = flags.get("preset", content.get("preset"))
    if preset is None and not {"loss", "classes", "dim", *DATA}.intersection([*flags, *content]):
        preset = "demo"
    layers = [content, flags] if preset is None else [get_preset(preset).defaults, content, flags]
    config: Config = {row.name: row.default for row in SETTINGS.values()}
    for layer in layers:
        _check_layer(layer)
        lay_over(config, layer)
    config["preset"] = preset
    for name in ("lambda_w", "lambda_h"):
        if not any(name in layer for layer in layers):
            config[name] = None  # which Problem scales with classes and samples
    if all(config[name] is None for name in DATA):
        config["per_class"] = 10
    if config["per_class"] is not None and config["classes"] is None:
        config["classes"] = 100
    return config


def _check_layer(layer: Mapping[str, Any]) -> None:
    data = [name for name in DATA if layer.get(name) is not None]
    if len(data) > 1:
        raise InputError(f"give one of {', '.join(DATA)}; got {' and '.join(data)}")
    if "start" in layer and "start_from" in layer:
        raise InputError("start and start_from contradict one another; give one")


def lay_over(config: Config, layer: Mapping[str, Any]) -> None:
    """Put a layer of settings over ``config``, and drop from it what no longer fits."""
    data = [name for name in DATA if name in layer]
    if data:
        config.update(dict.fromkeys(DATA))
        if data[0] not in (
            "per_class",
            "multiplicities",
        ):  # which do not tell the number of classes
            config["classes"] = None
    changed = {name for name in layer if layer[name] != config[name]}
    config.update({row.name: row.default for row in SETTINGS.values() if row.follows in changed})
    if "start" in layer:
        config["start_from"] = None
    config.update(layer)


def read_toml(path: Path) -> Config:
    """Settings of a TOML file, keys as the flags are named, with dashes or underscores."""
    try:
        content = toml_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"config: can't read {path} ({error.strerror}); give a TOML file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"config: {path} is not valid TOML ({error})") from error
    settings: Config = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in settings:
            raise InputError(f"config: {path} gives {key!r} twice; keep one")
        settings[name] = typed(name, value, f" in {path}", "config: ")
    return settings


def read_saved(config: Mapping[str, Any], path: Path, argument: str = "resume") -> Config:
    """The configuration of the run directory ``path``, which ``argument`` names, where a missing
    setting has its default.

    Errors: InputError for a setting of a wrong type, without a value that it needs, or unknown
    here.
    """
    where, found = (
        f" in {path / 'config.json'}",
        {row.name: row.default for row in SETTINGS.values()},
    )
    for name, value in config.items():
        if name not in SETTINGS:
            raise InputError(
                f"{argument}: this version does not know the setting {name}{where}; go on with "
                f"the one that wrote it"
            )
        if value is None and SETTINGS[name].default is not None:
            raise InputError(f"{argument}: {name}{where} has no value; the file was damaged")
        found[name] = None if value is None else typed(name, value, where, "config: ")
    return found


def typed(name: str, value: Any, where: str = "", prefix: str = "") -> Any:
    """``value`` in the type of the setting ``name``.

    Errors: InputError for an unknown name, InputTypeError for another type; with ``prefix``, name
    and ``where``.
    """
    row = SETTINGS.get(name)
    if row is None:
        near = [
            near.replace("_", "-") for near in difflib.get_close_matches(name, SETTINGS, 3, 0.5)
        ]
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "see ufm-fast solve --help for the names"
        )
        raise InputError(f"{prefix}unknown key {name!r}{where}; {hint}")
    if row.several:
        if isinstance(value, str) and row.kind is not str:
            value = [_parsed(row.kind, word) for word in value.split(",")]
            value = value[0] if len(value) == 1 else value
        if isinstance(value, (list, tuple)):
            return (
                list(value)
                if row.kind is str
                else [_one(row.kind, item, f"{prefix}{name}{where}") for item in value]
            )
    return _one(row.kind, value, f"{prefix}{name}{where}")


def _parsed(kind: type, word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        return word.strip()  # which its check refuses, by name


def _one(kind: type, value: Any, name: str) -> Any:
    if kind is float:
        return number(value, name)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "a whole number", str: "a string", bool: "true or false"}
        raise InputTypeError(f"{name} must be {words[kind]}, got {value!r}")
    return value


# ---- what a configuration stands for


def pick_device(name: str) -> tuple[str, str]:
    """The device and, for ``auto``, a line that says what was chosen and why."""
    import torch

    if name != "auto":
        return name, ""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # torchrun's: a device a rank
        return f"cuda:{os.environ['LOCAL_RANK']}", ""
    if torch.cuda.is_available():
        return "cuda", f"device: cuda ({torch.cuda.get_device_name()}), chosen by auto"
    return "cpu", "device: cpu, chosen by auto (no CUDA device)"


def build_problem(config: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> Problem:
    """The Problem of a configuration. ``data``: Problem arguments in the place of the configured
    files.
    """
    from ufm_fast.problem import Problem

    arguments = {name: config[name] for name in taken_by("problem")}
    return Problem(**arguments, **(read_data(config) if data is None else data))


def read_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a configuration as keyword arguments of Problem; files are read here."""
    if config["targets"] is not None:
        from ufm_fast.runs.foreign import read_target_sets, read_target_vectors

        if Path(config["targets"]).suffix == ".npy":
            return {"targets": read_target_vectors(Path(config["targets"]))}
        return {"target_sets": read_target_sets(Path(config["targets"]), config["classes"])}
    if config["counts"] is not None:
        from ufm_fast.runs.foreign import read_counts

        return {"counts": read_counts(config["counts"])}
    return {
        name: config[name]
        for name in ("labels", "per_class", "groups", "multiplicities")
        if config[name] is not None
    }


# ---- the hash


def digest(config: Mapping[str, Any], problem: Problem) -> str:
    """Hash of the problem and the way it is solved: the same for the same minimum, whatever limits
    a run had.
    """
    return hashes(config, problem)[0]


def hashes(config: Mapping[str, Any], problem: Problem) -> list[str]:
    """The hash that a run of this configuration and these data gets, and those that it has from
    versions before.

    Today's covers what is not the default, so that a new setting changes no hash; the first
    version's covers all.
    """
    data = _data(config, problem)
    rows = (row for row in SETTINGS.values() if row.identity and row.to != "data")
    content = {row.name: config[row.name] for row in rows if config[row.name] != row.default}
    found = [
        config_hash(content | {name: value for name, value in data.items() if value is not None})
    ]
    if not set(content) - set(_FIRST):
        first = {name: value for name, value in data.items() if name in (*_FIRST, "data")}
        found.append(config_hash({name: config[name] for name in _FIRST} | first))
    return found


def _data(config: Mapping[str, Any], problem: Problem) -> dict[str, Any]:
    """What the hash says of the data: of those from outside their content, not their file's
    name.
    """
    if config["per_class"] is not None:
        return {name: config[name] for name in DATA}
    text = hashlib.sha256(problem.counts.numpy().tobytes())
    sets, samples = problem.target_sets, problem.samples
    outside = (samples.given_labels, samples.given_vectors)
    for part in outside if sets is None else (sets.indptr, sets.indices, sets.counts, sets.weights):
        text.update(b"" if part is None else part.numpy().tobytes())
    return {**dict.fromkeys(DATA), "data": text.hexdigest()}
