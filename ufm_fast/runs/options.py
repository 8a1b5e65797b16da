"""The settings of a solve: one table that flags, TOML keys, defaults, help, arguments and hash are
made from.

To add a setting, add its row; nothing else knows the names. ``to`` says who takes it: ``problem`` a
keyword argument of that name of Problem, ``solve`` one of ``solve``, ``run`` the run library itself
(then some code there reads it).

A row's default never changes and its name is never used for another thing, because a run saved
before a setting was there is a run with its default, and a run's hash covers only what is not the
default. What a plain ``solve`` chooses by itself (as a preset does) is written into the run's
configuration by ``settings.resolve``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A setting ``name`` (the TOML key; the flag is ``--name`` with dashes), its type, default and
    help.

    several: a list of ``kind`` is a value too, a,b,c as a flag.
    to: data, problem, solve or run: who takes it.
    follows: the setting whose choice in a higher layer voids this one in a lower: a preset's gamma
    goes with its loss.
    resume: whether a run that goes on may change it.
    identity: whether it belongs to what is sought, and so to the hash.
    """

    name: str
    kind: type
    default: Any
    help: str
    to: str = "problem"
    several: bool = False
    follows: str = ""
    resume: bool = False
    identity: bool = True


def _free(name: str, kind: type, default: Any, help: str, to: str = "solve") -> Setting:
    """A setting that does not change which minimum is sought."""
    return Setting(name, kind, default, help, to, resume=True, identity=False)


_ROWS = (
    Setting(
        "preset",
        str,
        None,
        "Start from a paper's conventions; see --list-presets",
        "run",
        identity=False,
    ),
    Setting("loss", str, "ce", "ce | mse | focal | pick-all"),
    Setting("classes", int, None, "Number of classes K (default 100, or what the data tell)"),
    Setting("dim", int, 128, "Feature dimension d"),
    Setting("per_class", int, None, "Samples of each class n (default 10)", "data"),
    Setting(
        "counts",
        str,
        None,
        "Samples of each class: a,b,c or a file (.npy, or text with a number a line)",
        "data",
        several=True,
    ),
    Setting(
        "groups",
        str,
        None,
        "Classes of equal counts: classes:samples,... as 10:500,90:50,900:5",
        "data",
    ),
    Setting("labels", str, None, "Labels: a .npy file of integers, or digits | glyphs", "data"),
    Setting(
        "targets",
        str,
        None,
        "Target vectors (loss mse): a .npy, N x t; or label sets: a .npz with CSR indptr, "
        "indices, maybe counts, weights",
        "data",
    ),
    Setting(
        "multiplicities",
        str,
        None,
        "All sets of m labels, n samples each: m:n,.. as 1:310,2:20; needs classes",
        "data",
    ),
    Setting(
        "lambda_w",
        float,
        5e-4,
        "Penalty on W, as lambda/2 |W|^2 (default 5e-4, less for very many classes)",
    ),
    Setting("lambda_h", float, 5e-4, "Penalty on H, as lambda/2 |H|^2 (default as of lambda-w)"),
    Setting("lambda_b", float, 0.0, "Penalty on b; goes with --bias penalised", follows="bias"),
    Setting("bias", str, "none", "none | penalised | free"),
    Setting(
        "smoothing", float, 0.0, "Label smoothing of the cross-entropy, in [0, 1)", follows="loss"
    ),
    Setting(
        "gamma", float, None, "Focusing parameter of the focal loss (default 2)", follows="loss"
    ),
    Setting("freeze", str, None, "Keep a factor at its start: w | h"),
    Setting("layers", int, 1, "Weight layers M: 1 is the plain model, more the extended one"),
    Setting("activation", str, "linear", "Between layers: linear | relu"),
    Setting(
        "widths",
        int,
        None,
        "Hidden widths: one number, or all d_0,..,d_(M-1) (default: dim)",
        several=True,
    ),
    Setting(
        "lambda_hidden",
        float,
        None,
        "Penalty on hidden layers, one or one each (default: lambda-w)",
        several=True,
    ),
    Setting(
        "constraint", str, "none", "none | sphere: rows of W and H of length one, no penalties"
    ),
    Setting("temperature", float, 1.0, "Factor on the logits of unit rows", follows="constraint"),
    Setting(
        "logit_adjustment",
        float,
        None,
        "Logit adjustment tau log(n_k/N), or K offsets",
        several=True,
    ),
    Setting(
        "margin",
        float,
        None,
        "Margin off the target's logit, one or K (times the temperature)",
        several=True,
    ),
    Setting(
        "margin_power",
        float,
        0.0,
        "Margins margin (n_min/n_k)^power; LDAM has 0.25",
        follows="margin",
    ),
    Setting(
        "class_scales",
        float,
        None,
        "Class temperatures (n_k/n_max)^gamma, or K factors on W's rows",
        several=True,
    ),
    Setting(
        "angular_margin",
        float,
        None,
        "Margin in the angle (ArcFace), radians, one or K; with constraint sphere",
        several=True,
    ),
    Setting(
        "feature_penalties",
        float,
        None,
        "Factors on lambda-h, (n_k/n_max)^gamma or one for each class",
        several=True,
    ),
    Setting(
        "classifier_penalties",
        float,
        None,
        "Factors on lambda-w, (n_k/n_max)^gamma or one for each class",
        several=True,
    ),
    Setting("dtype", str, "float64", "float64 | float32 | bfloat16"),
    _free(
        "device",
        str,
        "auto",
        "auto | cpu | cuda | cuda:0; auto takes CUDA where there is one",
        "problem",
    ),
    Setting("seed", int, 0, "Seed of the start and of sampled metrics"),
    Setting(
        "method",
        str,
        "auto",
        "auto | gd | momentum | nesterov | sign | spectral | adam | lbfgs | cg | newton-cg | "
        "alternating | closed-form",
        "solve",
        resume=True,
    ),
    Setting(
        "backend",
        str,
        "auto",
        "auto | reference | tiled | triton | sharded | sharded-tiled | sharded-triton (under "
        "torchrun)",
        "solve",
        resume=True,
    ),
    _free(
        "mesh",
        str,
        None,
        "Ranks by classes times ranks by samples, as 4x2, of backend sharded (default: all by "
        "classes, or with target vectors of fewer outputs than rows all by samples)",
    ),
    Setting(
        "reduce",
        str,
        "auto",
        "Solve on classes (exact class means) | none (every sample) | groups (classes of equal "
        "counts alike) | auto",
        "solve",
    ),
    Setting("variables", str, "balanced", "Variables the solver works in: balanced | raw", "solve"),
    Setting("start", str, "spectral", "normal | orthogonal | balanced | small | spectral", "solve"),
    Setting("start_scale", float, 1.0, "Factor on the start", "solve"),
    Setting(
        "restarts",
        int,
        1,
        "Solve from so many seeds, from --seed on, and keep the best; needs a random start",
        "solve",
    ),
    Setting(
        "start_from",
        str,
        None,
        "Start from a file (.npz, .safetensors: W, H, maybe b, hidden1, .. and labels of H's "
        "rows) or a run directory",
        "run",
    ),
    _free(
        "tol",
        float,
        1e-10,
        "Converged when gradient norm <= tol max(lambda_W |W| + lambda_H |H|, mu)",
    ),
    _free(
        "max_steps",
        int,
        None,
        "Most steps of this call (default: the method's, or those of the run that goes on)",
    ),
    Setting(
        "learning_rate",
        float,
        None,
        "Step size of gd, momentum, nesterov, sign, spectral and adam",
        "solve",
        follows="method",
        resume=True,
    ),
    Setting(
        "momentum",
        float,
        None,
        "Momentum of momentum and nesterov",
        "solve",
        follows="method",
        resume=True,
    ),
    Setting(
        "history", int, None, "Pairs that lbfgs remembers", "solve", follows="method", resume=True
    ),
    _free("certificate", bool, True, "Prove how close the value is to the global minimum"),
    _free("pairwise", str, "auto", "Metrics over pairs of classes: auto | exact | sampled | none"),
    _free("log_every", int, None, "Log every so many steps (default: log-spaced steps)"),
    _free("log_metrics", bool, None, "NC1-NC3 at each log point (default: where it costs little)"),
)

#: Settings by name, in the order of the help.
SETTINGS = {row.name: row for row in _ROWS}


def taken_by(taker: str) -> tuple[str, ...]:
    """Names of the settings that ``taker`` takes."""
    return tuple(row.name for row in SETTINGS.values() if row.to == taker)


def resumable() -> tuple[str, ...]:
    """Names of the settings that a run that goes on may change."""
    return tuple(row.name for row in SETTINGS.values() if row.resume)
