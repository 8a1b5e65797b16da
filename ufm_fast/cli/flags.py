"""The settings of a solve: one table that the flags, the TOML keys, the defaults and the help are made from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True)
class Flag:
    """A setting ``name`` (the TOML key; the flag is ``--name`` with dashes), its type, default and help."""

    name: str
    kind: type
    default: Any
    help: str
    group: str = "problem"

    @property
    def option(self) -> str:
        dashed = self.name.replace("_", "-")
        return f"--{dashed}/--no-{dashed}" if self.kind is bool else f"--{dashed}"


SETTINGS = (
    Flag("preset", str, None, "Start from a paper's conventions; see --list-presets"),
    Flag("loss", str, "ce", "ce | mse | focal | pick-all"),
    Flag("classes", int, None, "Number of classes K (default 100, or what the data tell)"),
    Flag("dim", int, 128, "Feature dimension d"),
    Flag("per_class", int, None, "Samples of each class n (default 10)"),
    Flag("counts", str, None, "Samples of each class: a,b,c or a file (.npy, or text with a number a line)"),
    Flag("labels", str, None, "Labels: a .npy file of integers, or digits | glyphs"),
    Flag("targets", str, None, "Multi-label targets: a .npz with CSR indptr, indices and optional counts"),
    Flag("lambda_w", float, 5e-4, "Penalty on W, as lambda/2 |W|^2"),
    Flag("lambda_h", float, 5e-4, "Penalty on H, as lambda/2 |H|^2"),
    Flag("lambda_b", float, 0.0, "Penalty on b; goes with --bias penalised"),
    Flag("bias", str, "none", "none | penalised | free"),
    Flag("smoothing", float, 0.0, "Label smoothing of the cross-entropy, in [0, 1)"),
    Flag("gamma", float, None, "Focusing parameter of the focal loss (default 2)"),
    Flag("freeze", str, None, "Keep a factor at its start: w | h"),
    Flag("dtype", str, "float64", "float64 | float32 | bfloat16"),
    Flag("device", str, "auto", "auto | cpu | cuda | cuda:0; auto takes CUDA where there is one"),
    Flag("seed", int, 0, "Seed of the start and of sampled metrics"),
    Flag(
        "method",
        str,
        "auto",
        "auto | gd | momentum | nesterov | adam | lbfgs | newton-cg | alternating | closed-form",
        "solver",
    ),
    Flag("backend", str, "auto", "auto | reference | tiled | triton", "solver"),
    Flag("reduce", str, "auto", "Rows to solve on: classes (exact class means) | none (every sample) | auto", "solver"),
    Flag("variables", str, "balanced", "Variables the solver works in: balanced | raw", "solver"),
    Flag("start", str, "spectral", "normal | balanced | small | spectral", "solver"),
    Flag(
        "start_from",
        str,
        None,
        "Start from a file (.npz, .safetensors) with W, H, maybe b and labels of H's rows, or from a run directory",
        "solver",
    ),
    Flag("tol", float, 1e-10, "Converged when gradient norm <= tol max(lambda_W |W| + lambda_H |H|, mu)", "solver"),
    Flag("max_steps", int, None, "Most steps of this call (default: the method's, or those of the run that goes on)", "solver"),
    Flag("learning_rate", float, None, "Step size of gd, momentum, nesterov and adam", "solver"),
    Flag("momentum", float, None, "Momentum of momentum and nesterov", "solver"),
    Flag("history", int, None, "Pairs that lbfgs remembers", "solver"),
    Flag("certificate", bool, True, "Prove how close the value is to the global minimum", "solver"),
    Flag("pairwise", str, "auto", "Metrics over pairs of classes: auto | exact | sampled | none", "log"),
    Flag("log_every", int, None, "Log every so many steps (default: log-spaced steps)", "log"),
    Flag("log_metrics", bool, None, "NC1-NC3 at each log point (default: where it costs little)", "log"),
)

#: Settings by name.
BY_NAME = {flag.name: flag for flag in SETTINGS}


def with_flags(flags: Iterable[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**given`` one option for each flag; a flag that was not given arrives as None."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for flag in flags:
            option = typer.Option(None, flag.option, help=_help(flag), show_default=False)
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(flag.name, kind, default=option, annotation=flag.kind | None))
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _help(flag: Flag) -> str:
    return flag.help if flag.default is None or flag.kind is bool else f"{flag.help} (default {flag.default})"
