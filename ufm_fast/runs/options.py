"""The settings of a solve: one table that the flags, the TOML keys, the defaults and the help are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A setting ``name`` (the TOML key; the flag is ``--name`` with dashes), its type, default and help."""

    name: str
    kind: type
    default: Any
    help: str
    group: str = "problem"


SETTINGS = (
    Setting("preset", str, None, "Start from a paper's conventions; see --list-presets"),
    Setting("loss", str, "ce", "ce | mse | focal | pick-all"),
    Setting("classes", int, None, "Number of classes K (default 100, or what the data tell)"),
    Setting("dim", int, 128, "Feature dimension d"),
    Setting("per_class", int, None, "Samples of each class n (default 10)"),
    Setting("counts", str, None, "Samples of each class: a,b,c or a file (.npy, or text with a number a line)"),
    Setting("labels", str, None, "Labels: a .npy file of integers, or digits | glyphs"),
    Setting("targets", str, None, "Multi-label targets: a .npz with CSR indptr, indices and optional counts"),
    Setting("lambda_w", float, 5e-4, "Penalty on W, as lambda/2 |W|^2"),
    Setting("lambda_h", float, 5e-4, "Penalty on H, as lambda/2 |H|^2"),
    Setting("lambda_b", float, 0.0, "Penalty on b; goes with --bias penalised"),
    Setting("bias", str, "none", "none | penalised | free"),
    Setting("smoothing", float, 0.0, "Label smoothing of the cross-entropy, in [0, 1)"),
    Setting("gamma", float, None, "Focusing parameter of the focal loss (default 2)"),
    Setting("freeze", str, None, "Keep a factor at its start: w | h"),
    Setting("dtype", str, "float64", "float64 | float32 | bfloat16"),
    Setting("device", str, "auto", "auto | cpu | cuda | cuda:0; auto takes CUDA where there is one"),
    Setting("seed", int, 0, "Seed of the start and of sampled metrics"),
    Setting(
        "method",
        str,
        "auto",
        "auto | gd | momentum | nesterov | adam | lbfgs | newton-cg | alternating | closed-form",
        "solver",
    ),
    Setting("backend", str, "auto", "auto | reference | tiled | triton", "solver"),
    Setting("reduce", str, "auto", "Rows to solve on: classes (exact class means) | none (every sample) | auto", "solver"),
    Setting("variables", str, "balanced", "Variables the solver works in: balanced | raw", "solver"),
    Setting("start", str, "spectral", "normal | balanced | small | spectral", "solver"),
    Setting(
        "start_from",
        str,
        None,
        "Start from a file (.npz, .safetensors) with W, H, maybe b and labels of H's rows, or from a run directory",
        "solver",
    ),
    Setting("tol", float, 1e-10, "Converged when gradient norm <= tol max(lambda_W |W| + lambda_H |H|, mu)", "solver"),
    Setting(
        "max_steps", int, None, "Most steps of this call (default: the method's, or those of the run that goes on)", "solver"
    ),
    Setting("learning_rate", float, None, "Step size of gd, momentum, nesterov and adam", "solver"),
    Setting("momentum", float, None, "Momentum of momentum and nesterov", "solver"),
    Setting("history", int, None, "Pairs that lbfgs remembers", "solver"),
    Setting("certificate", bool, True, "Prove how close the value is to the global minimum", "solver"),
    Setting("pairwise", str, "auto", "Metrics over pairs of classes: auto | exact | sampled | none", "log"),
    Setting("log_every", int, None, "Log every so many steps (default: log-spaced steps)", "log"),
    Setting("log_metrics", bool, None, "NC1-NC3 at each log point (default: where it costs little)", "log"),
)

#: Settings by name.
BY_NAME = {setting.name: setting for setting in SETTINGS}
